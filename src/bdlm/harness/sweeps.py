"""The sweeps of `bdlm frontier`: which option of each decoder varies over which values, and the
words that request others.

In: words such as `threshold`, `fixed-k:k=2,4`, `swd:lam=1,5:k=2`, and temperatures. Out:
`SweepPoint`s, each checked against the model before any forward pass. Knows nothing about prompts,
judges or results."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import yaml

from bdlm.api import LM
from bdlm.core.errors import ConfigError, nearest
from bdlm.generation.decoders import DECODERS
from bdlm.generation.sampling_params import SamplingParams, check_fits, sampling_params

NEWLINES = "newlines"  # in `Sweep.fixed`: the ids of the model's tokens that end a line


@dataclass(frozen=True)
class Sweep:
    """One option of a decoder and its values, slowest first. fixed: other options, the same at
    every point."""

    knob: str
    values: tuple[Any, ...]
    fixed: dict[str, Any] = field(default_factory=dict)


# Thresholds on probabilities: the published value is 0.9, for large models at low temperatures; a
# small model at temperature 1 is seldom so confident of the token that it draws.
SURE = (0.9, 0.1, 0.03, 0.01, 0.003)

SWEEPS: dict[str, Sweep] = {
    "first-hitting": Sweep("temperature", (1.0, 0.9, 0.8, 0.7, 1.1)),
    "ancestral": Sweep("steps", (16, 8, 4, 3, 2)),
    "left-to-right": Sweep("temperature", (1.0,)),
    "fixed-k": Sweep("k", (1, 2, 3, 4, 6)),
    "threshold": Sweep("tau", SURE),
    "factor": Sweep("f", (1.0, 2.5, 2.8, 3.5, 4.5)),
    "eb": Sweep("gamma", (0.1, 2.0, 3.0, 4.0, 6.0)),
    "klass": Sweep("conf", SURE, {"kl": 0.5, "history": 1}),
    "localleap": Sweep("relaxed", (0.1, 0.03, 0.01, 0.003, 0.001), {"tau": 0.1}),
    "dilated": Sweep("stride", (8, 4, 3, 2, 1)),
    "interleaved": Sweep("gap", (8, 5, 4, 3, 2)),
    "spaced": Sweep("k", (1, 2, 3, 4, 8)),
    "swd": Sweep("lam", (0.5, 1.0, 2.0, 5.0, 10.0), {"tau": 0.01}),
    "attention": Sweep("conf", SURE),
    "adablock": Sweep("tau", SURE, {"delimiters": NEWLINES}),
    "credit": Sweep("tau", SURE),
    "remdm": Sweep("steps", (8, 6, 4, 3, 2)),
    "edit": Sweep("tau_mask", SURE),
    "soft": Sweep("tau", SURE),
    "wino": Sweep("tau_draft", SURE, {"tau_verify": 0.003}),
    "speculative": Sweep("k", (2, 3, 4, 6, 8)),
    # ni is missing: its indicator is trained for one model. `--decoders
    # ni:accept=0.9,0.7,0.5:indicator=FILE` sweeps it
}
PLAIN = Sweep("temperature", (1.0,))  # a decoder that is not in the table


@dataclass(frozen=True)
class SweepPoint:
    """One setting of the sweep. options: of the decoder or the request, by name. knob: the option
    over which its decoder is swept."""

    decoder: str
    options: tuple[tuple[str, Any], ...] = ()
    temperature: float = 1.0
    knob: str | None = None

    @property
    def key(self) -> str:
        """Equal for equal settings, whichever sweep they belong to."""
        return json.dumps([self.decoder, sorted(self.options), self.temperature])

    @property
    def setting(self) -> str:
        """The knob in words, then other options that its sweep does not fix: `tau 0.5`, `k 3, gap
        2`; empty for a decoder without any."""
        knob = (
            [(self.knob, dict(self.options).get(self.knob, self.temperature))] if self.knob else []
        )
        others = [
            (k, v)
            for k, v in self.options
            if k != self.knob and k not in SWEEPS.get(self.decoder, PLAIN).fixed
        ]
        return ", ".join(f"{name} {value}" for name, value in knob + others)

    def to_json(self) -> dict[str, Any]:
        return {
            "decoder": self.decoder,
            "options": dict(self.options),
            "temperature": self.temperature,
            "knob": self.knob,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SweepPoint:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in values["options"].items()}
        return cls(values["decoder"], tuple(options.items()), values["temperature"], values["knob"])


# exact, at temperature 1: the reference for every other point
REFERENCE = SweepPoint("first-hitting", knob="temperature")


def points(
    lm: LM, decoders: Sequence[str] = (), temperatures: Sequence[float] = (1.0,), **request: Any
) -> tuple[list[SweepPoint], list[str]]:
    """Make the points of a sweep, the reference first, and a line for each point that was left out.

    decoders: names, or `name:option=value,value:option=value` (other options stay as in `SWEEPS`);
    none means all of `SWEEPS`. request: options of every point (max_new_tokens, block_size, ...).
    Raises ConfigError for what does not exist or does not fit. Default values that do not fit this
    model, such as more cells than a block has, are left out and reported."""
    if not temperatures:
        raise ConfigError("temperatures is empty; give at least one, for example 1.0")
    for temperature in temperatures:
        sampling_params(temperature=temperature)
    found, left = {REFERENCE.key: REFERENCE}, []
    _checked(lm, REFERENCE, request)
    for word in decoders or [name for name in SWEEPS if name in DECODERS]:
        name, options = _read(word)
        sweep, default = SWEEPS.get(name, PLAIN), not options
        knob = sweep.knob if sweep.knob in options or default else next(iter(options))
        wanted = {**_each(sweep.fixed), **({sweep.knob: sweep.values} if default else options)}
        for point in _crossed(lm, name, knob, wanted, temperatures):
            try:
                _checked(lm, point, request)
            except ConfigError as error:
                if not default:
                    raise
                left.append(f"{name} {point.setting}: {error}")
                continue
            found.setdefault(point.key, point)
    return list(found.values()), left


def _each(fixed: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: (value,) for name, value in fixed.items()}


def _crossed(
    lm: LM, name: str, knob: str, wanted: dict[str, tuple[Any, ...]], temperatures: Sequence[float]
) -> list[SweepPoint]:
    """Make every combination of the values at every temperature; a swept temperature replaces the
    given ones."""
    given = tuple(wanted.pop("temperature", temperatures))
    made = []
    for temperature, *values in itertools.product(given, *wanted.values()):
        options = {
            k: _newlines(lm) if v == NEWLINES else v for k, v in zip(wanted, values, strict=True)
        }
        made.append(SweepPoint(name, tuple(options.items()), float(temperature), knob))
    return made


def _newlines(lm: LM) -> tuple[int, ...]:
    special = {lm.spec.mask_id, lm.tokenizer.eos_id}
    return tuple(
        i
        for i in range(lm.spec.vocab_size)
        if i not in special and lm.tokenizer.decode([i]).endswith("\n")
    )


def _read(word: str) -> tuple[str, dict[str, tuple[Any, ...]]]:
    """Split a word into the decoder's name and the values of its options. `package.module:Class` is
    a name too."""
    name, *rest = word.split(":")
    if rest and name not in DECODERS and "=" not in rest[0]:
        name = f"{name}:{rest.pop(0)}"
    if ":" not in name and name not in DECODERS:
        raise ConfigError(f"decoder '{name}' is unknown{nearest(name, DECODERS)}")
    options: dict[str, tuple[Any, ...]] = {}
    for part in rest:
        option, equals, values = part.partition("=")
        if not equals or not values:
            raise ConfigError(
                f"decoder '{word}' has '{part}' where an option stands; write"
                " name:option=value,value"
            )
        options[option.replace("-", "_")] = tuple(yaml.safe_load(v) for v in values.split(","))
    return name, options


def request_of(point: SweepPoint, request: dict[str, Any]) -> dict[str, Any]:
    """Make the keyword options of `LM.generate` for a point: options that are not fields of a
    request go to the decoder."""
    own = {f.name for f in fields(SamplingParams)}
    options = dict(point.options)
    of_request = {k: v for k, v in options.items() if k in own}
    rest = {k: v for k, v in options.items() if k not in own}
    return {
        **request,
        "decoder": point.decoder,
        "temperature": point.temperature,
        **of_request,
        "options": rest,
    }


def _checked(lm: LM, point: SweepPoint, request: dict[str, Any]) -> None:
    """Raise ConfigError, with the nearest name, for an option that the decoder does not have or the
    model does not support."""
    first = lm.spec.first_token
    check_fits(
        sampling_params(**request_of(point, request)), [0 if first is None else first], lm.spec
    )
