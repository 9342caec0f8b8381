"""Decoders by name. Adding one: a small frozen class in this folder and a line in `POLICIES`; the contract suite does the rest."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from bdlm.core.errors import ConfigError, nearest, pick
from bdlm.generation.policies.base import Policy, View
from bdlm.generation.policies.exact import Ancestral, FirstHitting
from bdlm.generation.policies.modified import AdaptiveBlock, AttentionOrder, Credit, StabilityWeighted
from bdlm.generation.policies.revising import Edit, LeftToRight, ReMDM, SoftParallel
from bdlm.generation.policies.scored import EntropyBounded, Factor, FixedK, Klass, LocalLeap, Threshold

__all__ = ["POLICIES", "Policy", "View", "make_policy"]


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """The policy of a registered name, or of "package.module:Class", with its options. Raises ConfigError with the nearest name."""
    options = options or {}
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"policy '{name}' cannot be imported ({error}); write package.module:Class") from None
    else:
        kind = pick("policy", name, POLICIES)
    known = {f.name for f in fields(kind)}
    for option in options:
        if option not in known:
            raise ConfigError(f"policy '{name}' has no option '{option}'{nearest(option, known) if known else '; it has none'}")
    return kind(**options)


POLICIES: dict[str, type[Policy]] = {
    "first-hitting": FirstHitting,
    "ancestral": Ancestral,
    "left-to-right": LeftToRight,
    "fixed-k": FixedK,
    "threshold": Threshold,
    "factor": Factor,
    "eb": EntropyBounded,
    "klass": Klass,
    "localleap": LocalLeap,
    "swd": StabilityWeighted,
    "attention": AttentionOrder,
    "adablock": AdaptiveBlock,
    "credit": Credit,
    "remdm": ReMDM,
    "edit": Edit,
    "soft": SoftParallel,
}
