"""Sweep decoders over a model: every point generates text for the same prompts with the same seeds,
a judge scores the texts, and each point is kept.

In: an `LM`, a judge (the reference model of generative perplexity), prompts, points. Out:
`MeasuredPoint`s, one JSON line each in `points.jsonl`, so an interrupted sweep continues where it
stopped. `settings.json` holds what every point of a folder shares; a folder made with other
settings is refused by name. Knows nothing about tables or figures."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.api import LM
from bdlm.core.errors import ConfigError, DataError
from bdlm.core.validation import Count, validate_fields
from bdlm.data.files import write_atomically
from bdlm.harness.judges import Judge, fingerprint
from bdlm.harness.sweeps import SweepPoint, request_of
from bdlm.likelihood.text_statistics import distinct, repetition, text_entropy

POINTS, SETTINGS = "points.jsonl", "settings.json"
Progress = Callable[[int, int, str], None]  # points done, points in all, the last one in words


@dataclass(frozen=True)
class SweepSettings:
    """What all points of a sweep share. Text (seed s, prompt p) uses the noise of seed + s *
    prompts + p, whatever the decoder.

    prompts: P strings. seeds: S texts of each. max_new_tokens: the length of every text, with the
    model's end token banned (entropies of texts of unequal length do not compare), unless
    `early_ends`. batch: texts generated at once. block_size: None = the model's."""

    prompts: tuple[str, ...]
    seeds: Count = 4
    max_new_tokens: Count = 256
    batch: Count = 64
    seed: int = 0
    block_size: Count | None = None
    early_ends: bool = False

    def __post_init__(self) -> None:
        validate_fields(self)
        if not self.prompts:
            raise ConfigError("prompts is empty; give at least one")

    @property
    def texts(self) -> int:
        return self.seeds * len(self.prompts)

    @property
    def request(self) -> dict[str, Any]:
        """The options of every request."""
        least = 0 if self.early_ends else self.max_new_tokens
        return {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": least,
            "block_size": self.block_size,
        }


@dataclass(frozen=True)
class MeasuredPoint:
    """A point and its texts, in order of seed, then prompt; lists have one entry per text.

    tokens, forward_passes: of the model. seconds: of all texts together, the engine alone. finish:
    how often each reason ended a text. nats, judge_tokens: of the judge, -log p(text | prompt) and
    over how many tokens. entropy: of each text's judge tokens, nats. distinct_2, repetition_4: of
    all texts' judge tokens together, `likelihood.text_statistics`."""

    point: SweepPoint
    texts: list[str]
    tokens: list[int]
    forward_passes: list[int]
    seconds: float
    finish: dict[str, int]
    nats: list[float]
    judge_tokens: list[int]
    entropy: list[float]
    distinct_2: float
    repetition_4: float

    def grid(self, values: Sequence[float], prompts: int) -> Tensor:
        """Arrange values of the texts as float64 [S, P], NaN for texts without a scored token."""
        laid = torch.tensor(
            [v if n else float("nan") for v, n in zip(values, self.judge_tokens, strict=True)],
            dtype=torch.float64,
        )
        return laid.view(-1, prompts)

    def log_perplexity(self, prompts: int) -> Tensor:
        """Compute nats per judge token of each text, [S, P]."""
        return self.grid(
            [n / max(t, 1) for n, t in zip(self.nats, self.judge_tokens, strict=True)], prompts
        )

    def quality(self, prompts: int) -> Tensor:
        """Compute log generative perplexity less entropy of each text, nats per judge token, [S,
        P]; lower is better."""
        return self.log_perplexity(prompts) - self.grid(self.entropy, prompts)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "point": self.point.to_json()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> MeasuredPoint:
        return cls(**{**values, "point": SweepPoint.from_json(values["point"])})


def measure_point(lm: LM, judge: Judge, point: SweepPoint, setup: SweepSettings) -> MeasuredPoint:
    """Generate the texts of a point and score them with the judge."""
    prompts = [p for _ in range(setup.seeds) for p in setup.prompts]
    options = request_of(point, setup.request)
    written, seconds = [], 0.0
    for first in range(0, len(prompts), setup.batch):
        start = time.perf_counter()
        written += lm.generate(
            prompts[first : first + setup.batch], seed=setup.seed + first, **options
        )
        seconds += time.perf_counter() - start
    verdicts = judge(prompts, [w.text for w in written])
    units = [v.ids for v in verdicts if v.ids]
    if not any(len(u) >= 4 for u in units):
        raise DataError(
            f"the texts of {point.decoder} {point.setting} are shorter than 4 tokens of the judge;"
            " raise max_new_tokens"
        )
    return MeasuredPoint(
        point=point,
        texts=[w.text for w in written],
        tokens=[w.tokens for w in written],
        forward_passes=[w.forward_passes for w in written],
        seconds=seconds,
        finish=dict(Counter(w.finish_reason for w in written)),
        nats=[v.nats for v in verdicts],
        judge_tokens=[v.tokens for v in verdicts],
        entropy=[text_entropy([v.ids]) if v.ids else 0.0 for v in verdicts],
        distinct_2=distinct(units, 2),
        repetition_4=repetition(units, 4),
    )


def sweep(
    lm: LM,
    judge: Judge,
    points: Sequence[SweepPoint],
    setup: SweepSettings,
    folder: Path,
    progress: Progress | None = None,
) -> list[MeasuredPoint]:
    """Measure the points that the folder does not hold yet. Returns all its points, the old ones
    first.

    Raises ConfigError if the folder was made with other settings, or holds something else."""
    _same_settings(settings_of(lm, judge, setup), folder)
    done = read_points(folder)
    wanted = [p for p in points if p.key not in {m.point.key for m in done}]
    if wanted:
        _warm(lm, setup)
    for number, point in enumerate(wanted, len(points) - len(wanted) + 1):
        done.append(measure_point(lm, judge, point, setup))
        with (folder / POINTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(done[-1].to_json()) + "\n")
        if progress is not None:
            progress(number, len(points), f"{point.decoder} {point.setting}")
    return done


def _warm(lm: LM, setup: SweepSettings) -> None:
    """Generate a short text first: a model's first forward pass folds weights and fills caches,
    which must not count for any point."""
    lm.generate(
        [setup.prompts[0]] * min(setup.batch, 2),
        max_new_tokens=min(8, setup.max_new_tokens),
        block_size=setup.block_size,
    )


def settings_of(lm: LM, judge: Judge, setup: SweepSettings) -> dict[str, Any]:
    """Return what two points must share to be comparable, as plain values."""
    name = (
        "a model"
        if lm.path is None
        else lm.path.parent.name
        if lm.path.name == "model"
        else lm.path.name
    )
    model = f"{name} ({lm.parameters:,} weights {fingerprint(lm.model)})"
    device = next(iter(lm.model.parameters())).device.type
    own = {
        "model": model,
        "judge": judge.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": device,
    }
    return {
        **own,
        **asdict(setup),
        "prompts": list(setup.prompts),
        "block_size": setup.block_size or lm.spec.block_size,
    }


def _same_settings(own: dict[str, Any], folder: Path) -> None:
    """Write the settings into a new folder, or compare them with those of an old one."""
    path = folder / SETTINGS
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder} holds other files and no sweep; choose another folder")
        write_atomically(path, json.dumps(own, indent=1).encode())
        return
    old = read_settings(folder)
    for name, value in own.items():
        if old.get(name) != value:
            difference = "" if name == "prompts" else f" ({old.get(name)!r}, now {value!r})"
            raise ConfigError(
                f"{folder} holds a sweep with another {name}{difference}; choose another folder, or"
                f" the same {name}"
            )


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a sweep's folder. Raises DataError if it has none."""
    path = folder / SETTINGS
    if not path.is_file():
        raise DataError(
            f"{folder} holds no sweep ({SETTINGS} is missing); run it without --front-only first"
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_points(folder: Path) -> list[MeasuredPoint]:
    """Read the finished points of a folder. A last line cut short by a kill is removed from the
    file; any other damage is a DataError."""
    path = folder / POINTS
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        write_atomically(path, whole)
    try:
        return [MeasuredPoint.from_json(json.loads(line)) for line in whole.splitlines()]
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{path} is damaged; remove the line that is not a point in JSON, and it will be"
            " measured again"
        ) from None
