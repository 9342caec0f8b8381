"""Decoders by name. Adding one: a small frozen class in this folder and a line in `POLICIES`; the contract suite does the rest."""

from __future__ import annotations

import importlib
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from bdlm.core.errors import ConfigError, nearest, pick
from bdlm.generation.policies.base import Policy, View
from bdlm.generation.policies.exact import Ancestral, FirstHitting
from bdlm.generation.policies.learned import NaturalIndicator
from bdlm.generation.policies.modified import AdaptiveBlock, AttentionOrder, Credit, StabilityWeighted
from bdlm.generation.policies.revising import Edit, LeftToRight, ReMDM, SoftParallel
from bdlm.generation.policies.scored import EntropyBounded, Factor, FixedK, Klass, LocalLeap, Threshold
from bdlm.generation.policies.spaced import Dilated, Interleaved, Spaced
from bdlm.generation.policies.trying import Speculative, Wino

__all__ = ["POLICIES", "Policy", "View", "make_policy"]


def make_policy(name: str, options: dict[str, Any] | None = None) -> Policy:
    """The policy of a registered name, or of "package.module:Class", with its options. Raises ConfigError with the nearest name."""
    kind, given = _kind(name), dict(options or {})
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for option, value in given.items():
        if option not in known:
            raise ConfigError(f"policy '{name}' has no option '{option}'{nearest(option, known) if known else '; it has none'}")
        given[option] = _of_kind(f"{name}.{option}", value, hints[option])
    return kind(**given)


def _kind(name: str) -> type[Policy]:
    if ":" not in name:
        return pick("policy", name, POLICIES)
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy '{name}' cannot be imported ({error}); write package.module:Class") from None
    if not (isinstance(kind, type) and is_dataclass(kind) and issubclass(kind, Policy)):
        raise ConfigError(f"policy '{name}' is no subclass of Policy; write package.module:Class of one")
    return kind


def _of_kind(option: str, value: Any, hint: Any) -> Any:
    """The value as its field wants it (a list as a tuple, a whole number as a float). Raises ConfigError where it is of another kind."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in kinds:
        plain = get_origin(kind) or kind
        if plain is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if plain is float and type(value) is int:
            return float(value)
        if type(value) is plain:
            return value
    raise ConfigError(f"{option} is {value!r}; give it as {' or '.join(getattr(k, '__name__', str(k)) for k in kinds)}")


POLICIES: dict[str, type[Policy]] = {
    "first-hitting": FirstHitting,
    "speculative": Speculative,
    "ancestral": Ancestral,
    "left-to-right": LeftToRight,
    "fixed-k": FixedK,
    "threshold": Threshold,
    "factor": Factor,
    "eb": EntropyBounded,
    "klass": Klass,
    "localleap": LocalLeap,
    "dilated": Dilated,
    "interleaved": Interleaved,
    "spaced": Spaced,
    "swd": StabilityWeighted,
    "attention": AttentionOrder,
    "adablock": AdaptiveBlock,
    "credit": Credit,
    "ni": NaturalIndicator,
    "remdm": ReMDM,
    "wino": Wino,
    "edit": Edit,
    "soft": SoftParallel,
}
