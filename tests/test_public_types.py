"""`Any` in the signatures of the public interface: an explicit list, with reasons, that only
shrinks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import bdlm

OF_DECODER = "the decoder's own parameters, checked by name and kind when the request is made"
PLAIN = "plain JSON values"
ALLOWED = {
    "Cache.slots": "each backbone has its own kind of cache",
    "Canvas.with_(changes)": "fields of the canvas, checked by `dataclasses.replace`",
    "Commit.__init__(extra)": (
        "what a decoder keeps from one decision to the next: tensors, of its own"
    ),
    "Commit.extra": "what a decoder keeps from one decision to the next: tensors, of its own",
    "Denoiser.step(cache)": (
        "each backbone has its own kind of cache and gets back only what it made"
    ),
    "LM.__init__(model)": (
        "a Denoiser, checked; native ones have more (parameters, train) that the protocol does not"
        " promise"
    ),
    "LM.model": (
        "a Denoiser, checked; native ones have more (parameters, train) that the protocol does not"
        " promise"
    ),
    "LM.generate(decoder_options)": OF_DECODER,
    "LM.infill(decoder_options)": OF_DECODER,
    "LM.stream(decoder_options)": OF_DECODER,
    "Layout.to(device)": "what `Tensor.to` takes",
    "SamplingParams.__init__(logits_processor)": "transformers' processors, or lists of them",
    "SamplingParams.logits_processor": "transformers' processors, or lists of them",
    "SamplingParams.__init__(options)": OF_DECODER,
    "SamplingParams.options": OF_DECODER,
    "SamplingParams.with_(changes)": "fields of the record, checked by its constructor",
    "Score.to_json": PLAIN,
    "TrainConfig.from_dict(values)": "plain values, checked field by field",
    "TrainConfig.to_dict": PLAIN,
}


def anys(name: str, annotations: dict[str, Any]) -> Iterator[str]:
    """`name(argument)` of each annotation that says Any; `name` alone for a return value."""
    for argument, kind in annotations.items():
        if re.search(r"\bAny\b", kind if isinstance(kind, str) else str(kind)):
            yield name if argument == "return" else f"{name}({argument})"


def public_anys(name: str, value: Any) -> Iterator[str]:
    """Those of a function, or of a class: its public fields, its constructor and its public
    methods, inherited ones too."""
    if not inspect.isclass(value):
        yield from anys(name, getattr(inspect.unwrap(value), "__annotations__", {}))
        return
    for base in (base for base in value.__mro__ if base.__module__.startswith(("bdlm", __name__))):
        for attribute, kind in inspect.get_annotations(base).items():
            if not attribute.startswith("_"):
                yield from anys(f"{name}.{attribute}", {"return": kind})
        for attribute, member in vars(base).items():
            own: Callable[..., Any] | None = (
                member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            )
            if inspect.isfunction(own) and (
                attribute == "__init__" or not attribute.startswith("_")
            ):
                yield from anys(f"{name}.{attribute}", inspect.unwrap(own).__annotations__)


def test_any_in_public_signatures_only_shrinks() -> None:
    found = {place for name in bdlm.__all__ for place in public_anys(name, getattr(bdlm, name))}
    assert sorted(found - set(ALLOWED)) == [], "say the type; the list of exceptions does not grow"
    assert sorted(set(ALLOWED) - found) == [], "typed by now: take it off the list"


class Planted:
    field: dict[str, Any]
    _hidden: Any

    def __init__(self, start: Any) -> None: ...

    def told(self, what: int, *rest: Any) -> list[Any]:
        return [what, *rest]

    def _inner(self, what: Any) -> None: ...

    @property
    def seen(self) -> Any: ...


def test_the_check_sees_planted_anys() -> None:
    assert set(public_anys("P", Planted)) == {
        "P.field",
        "P.__init__(start)",
        "P.told(rest)",
        "P.told",
        "P.seen",
    }
    assert list(public_anys("f", anys)) == ["f(annotations)"]
