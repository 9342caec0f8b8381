"""Decoders by name. To add one, write a small frozen class in this folder and a line in `DECODERS`;
the contract tests cover it from then on."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from bdlm.core.errors import ConfigError, nearest, pick
from bdlm.core.importing import import_object
from bdlm.core.validation import coerce
from bdlm.generation.decoders.base import Decoder, View
from bdlm.generation.decoders.confidence import (
    EntropyBounded,
    Factor,
    FixedK,
    Klass,
    LocalLeap,
    Threshold,
)
from bdlm.generation.decoders.exact import Ancestral, FirstHitting
from bdlm.generation.decoders.learned import NaturalIndicator
from bdlm.generation.decoders.modifiers import (
    AdaptiveBlock,
    AttentionOrder,
    Credit,
    StabilityWeighted,
)
from bdlm.generation.decoders.revising import Edit, LeftToRight, ReMDM, SoftParallel
from bdlm.generation.decoders.spacing import Dilated, Interleaved, Spaced
from bdlm.generation.decoders.speculative import Speculative, Wino

__all__ = ["DECODERS", "Decoder", "View", "decoder_class", "make_decoder"]


def make_decoder(name: str, options: dict[str, Any] | None = None) -> Decoder:
    """Make the decoder of a registered name, or of "package.module:Class", with its options.

    Raises ConfigError for an unknown name or option, with the nearest known one, and for a value of
    the wrong type."""
    kind, given = decoder_class(name), dict(options or {})
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for option, value in given.items():
        if option not in known:
            raise ConfigError(
                f"decoder '{name}' has no option"
                f" '{option}'{nearest(option, known) if known else '; it has none'}"
            )
        given[option] = coerce(f"{name}.{option}", value, hints[option])
    return kind(**given)


def decoder_class(name: str) -> type[Decoder]:
    """Return the class of a registered name, or of "package.module:Class". Raises ConfigError for
    an unknown name and for a class that is not a decoder."""
    if ":" not in name:
        return pick("decoder", name, DECODERS)
    kind = import_object("decoder", name, trusted=True)  # the user typed it
    if not (isinstance(kind, type) and is_dataclass(kind) and issubclass(kind, Decoder)):
        raise ConfigError(
            f"decoder '{name}' is not a subclass of Decoder; write package.module:Class of one"
        )
    return kind


DECODERS: dict[str, type[Decoder]] = {
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
