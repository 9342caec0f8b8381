"""Train the indicator of NI Sampling, which marks the cells that can be filled now without changing
the text.

    teach     runs of the teacher, one cell per forward pass, and every state on the way
    label     1 where a cell's candidate is the token of the teacher's finished text there
    fit       a small network on both; then states of the student's own runs are added, labelled
              alike, and it is fitted again
    compare   agreement with the teacher against tokens per forward: the student, the threshold
              decoder, and an oracle that knows the labels

The noise of a cell is a function of seed and position, so "the same text" is well defined at any
temperature. A student's block starts from the teacher's text before it: agreement is that of single
blocks and does not include consequences of an early difference. In: a model and prompts as ids.
Out: a file for `decoder="ni"`, and agreement values. Source: arXiv 2604.18471 (how the training set
is drawn is inferred)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.blockmap import block_start
from bdlm.core.errors import ConfigError
from bdlm.core.types import Commit, Denoiser
from bdlm.generation.decoders.base import Decoder, View
from bdlm.generation.decoders.confidence import FixedK, Threshold, best, candidates, confidence
from bdlm.generation.decoders.learned import Evidence, Indicator, NaturalIndicator, save_indicator
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import SamplingParams

ROWS = 32  # texts written at once


@dataclass(frozen=True)
class CandidateStates:
    """M masked cells at some decisions. seed, place, candidate: int64 [M]."""

    seed: Tensor
    place: Tensor
    candidate: Tensor
    evidence: Evidence

    @classmethod
    def join(cls, parts: Sequence[CandidateStates]) -> CandidateStates:
        seed, place, candidate = (
            torch.cat([getattr(p, name) for p in parts]) for name in ("seed", "place", "candidate")
        )
        return cls(seed, place, candidate, Evidence.join([p.evidence for p in parts]))


@dataclass(frozen=True)
class RecordingDecoder(Decoder):
    """A decoder that records its states and how many decisions it took. seen, decisions: filled as
    it runs."""

    inner: Decoder = field(default_factory=FixedK)
    seen: list[CandidateStates] = field(default_factory=list, compare=False, repr=False)
    decisions: list[int] = field(default_factory=list, compare=False, repr=False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner.needs | {"hidden"}

    def plan(self, masked: Tensor, keys: CellNoise) -> Tensor | None:
        return self.inner.plan(masked, keys)

    def choose(self, view: View) -> Commit:
        cells = view.masked & view.query_mask
        self.decisions.append(int(cells.any(1).sum()))
        row, cell = cells.nonzero(as_tuple=True)
        ids = candidates(view)
        evidence = Evidence.of(view, ids[view.query_mask])[view.masked[view.query_mask]]
        self.seen.append(
            CandidateStates(
                view.noise.seed[row].cpu(),
                view.noise.position[row, cell].cpu(),
                ids[cells].cpu(),
                evidence.cpu(),
            )
        )
        return self.inner.choose(view)


@dataclass(frozen=True)
class Teacher:
    """Finished runs. prompts, texts: ids (a text begins with its prompt). params: of each. seen:
    the states on the way."""

    prompts: list[list[int]]
    texts: list[list[int]]
    params: list[SamplingParams]
    seen: CandidateStates

    def label(self, seen: CandidateStates) -> tuple[Tensor, Tensor]:
        """Compare candidates with the teacher's tokens: whether they are equal, bool [M], and
        whether the teacher has a token there, bool [M]."""
        first = self.params[0].seed
        table = torch.full((len(self.texts), max(map(len, self.texts))), -1)
        for i, text in enumerate(self.texts):
            table[i, : len(text)] = torch.tensor(text)
        inside = seen.place < table.shape[1]
        token = torch.where(
            inside, table[seen.seed - first, seen.place.clamp(max=table.shape[1] - 1)], -1
        )
        return token == seen.candidate, token >= 0


def teach(
    model: Denoiser,
    prompts: Sequence[Sequence[int]],
    tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    block_size: int | None = None,
) -> Teacher:
    """Run the teacher: the most confident cell per forward pass. Text i has seed + i."""
    if not prompts:
        raise ConfigError("prompts is empty; give one for each run of the teacher")
    watch = RecordingDecoder(FixedK(1))
    shared = SamplingParams(
        max_new_tokens=tokens,
        temperature=temperature,
        block_size=block_size,
        decoder=watch,
        ignore_eos=True,
    )
    each = [replace(shared, seed=seed + i) for i in range(len(prompts))]
    given = [list(p) or [model.spec.first_token or 0] for p in prompts]
    results = generate(model, given, each, max_num_seqs=min(ROWS, len(given)))
    texts = [p + r.token_ids for p, r in zip(given, results, strict=True)]
    return Teacher(given, texts, each, CandidateStates.join(watch.seen))


def blocks(
    model: Denoiser, teacher: Teacher, decoder: Decoder
) -> list[tuple[list[int], SamplingParams]]:
    """Make a request for each block of the teacher's texts, from the teacher's text before it,
    under another decoder."""
    size = teacher.params[0].block_size or model.spec.block_size
    requests = []
    for prompt, text, own in zip(teacher.prompts, teacher.texts, teacher.params, strict=True):
        starts = [len(prompt), *range(block_start(len(prompt), size) + size, len(text), size)]
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
            if stop > start:
                requests.append(
                    (text[:start], replace(own, max_new_tokens=stop - start, decoder=decoder))
                )
    return requests


@dataclass(frozen=True)
class Agreement:
    """How a decoder compares with the teacher. agreement: share of equal tokens; same_blocks: share
    of blocks without a difference."""

    decoder: str
    tokens_per_forward: float
    agreement: float
    same_blocks: float


def replay(
    model: Denoiser, teacher: Teacher, decoder: Decoder, name: str = ""
) -> tuple[CandidateStates, Agreement]:
    """Generate every block of the teacher's texts again with another decoder. Returns the states on
    the way, and the agreement."""
    watch = RecordingDecoder(decoder)
    requests = blocks(model, teacher, watch)
    results = generate(
        model,
        [p for p, _ in requests],
        [own for _, own in requests],
        max_num_seqs=min(ROWS, len(requests)),
    )
    text = {own.seed: t for own, t in zip(teacher.params, teacher.texts, strict=True)}
    hits = [
        [a == b for a, b in zip(r.token_ids, text[own.seed][len(p) :], strict=False)]
        for (p, own), r in zip(requests, results, strict=True)
    ]
    tokens = sum(map(len, hits))
    point = Agreement(
        name or repr(decoder),
        tokens / sum(watch.decisions),
        sum(map(sum, hits)) / tokens,
        sum(map(all, hits)) / len(hits),
    )
    return CandidateStates.join(watch.seen), point


def fit(
    net: Indicator,
    evidence: Evidence,
    label: Tensor,
    steps: int = 1000,
    batch: int = 512,
    rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Minimise the binary cross-entropy. Returns its mean over the last tenth of the steps,
    nats."""
    generator, losses = torch.Generator().manual_seed(seed), []
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    net.train()
    for _ in range(steps):
        rows = torch.randint(len(label), (batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(net(evidence[rows]), label[rows].float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    last = losses[-max(1, steps // 10) :]
    net.eval()
    return sum(last) / len(last)


def train_indicator(
    model: Denoiser,
    teacher: Teacher,
    path: str | Path,
    rounds: int = 1,
    steps: int = 1000,
    seed: int = 0,
) -> float:
    """Fit an indicator to a teacher's states and then, `rounds` times, also to those of its own
    runs; save it to `path`.

    Returns the last loss. Raises ConfigError for a model that does not return its last state."""
    if "hidden" not in model.spec.supports:
        raise ConfigError(
            "an indicator reads the model's last state, which this model does not give"
        )
    seen, loss = teacher.seen, 0.0
    with torch.random.fork_rng(devices=[]):  # weights and dropout
        torch.manual_seed(seed)
        net = Indicator(teacher.seen.evidence.state.shape[1], model.spec.vocab_size)
        for turn in range(rounds + 1):
            label, known = teacher.label(seen)
            loss = fit(net, seen.evidence[known], label[known], steps, seed=seed + turn)
            save_indicator(net, path)
            if turn < rounds:
                seen = CandidateStates.join(
                    [seen, replay(model, teacher, NaturalIndicator(str(path)))[0]]
                )
    return loss


@dataclass(frozen=True)
class Oracle(Decoder):
    """Fills all cells whose candidate is the teacher's token, or else the most confident one, as a
    perfect indicator would."""

    teacher: Teacher | None = field(default=None, compare=False, repr=False)

    def choose(self, view: View) -> Commit:
        assert self.teacher is not None
        ids, cells = candidates(view), view.masked & view.query_mask
        row, cell = cells.nonzero(as_tuple=True)
        nothing = Evidence(*(torch.zeros(0, 1),) * 3)
        right, _ = self.teacher.label(
            CandidateStates(
                view.noise.seed[row].cpu(),
                view.noise.position[row, cell].cpu(),
                ids[cells].cpu(),
                nothing,
            )
        )
        fills = torch.zeros_like(cells).masked_scatter_(cells, right.to(cells.device))
        none = ~fills.any(1, keepdim=True)
        return Commit(fills | (best(confidence(view, ids), view.masked) & none), ids)


def compare(
    model: Denoiser,
    teacher: Teacher,
    path: str | Path,
    thresholds: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05),
    accepts: Sequence[float] = (0.99, 0.97, 0.95, 0.89, 0.8, 0.6),
) -> list[Agreement]:
    """Compare the indicator, the threshold decoder and the oracle with teacher runs that the
    indicator has not seen."""
    decoders: dict[str, Decoder] = {f"threshold {tau:g}": Threshold(tau) for tau in thresholds}
    decoders |= {f"ni {accept:g}": NaturalIndicator(str(path), accept) for accept in accepts}
    decoders["oracle"] = Oracle(teacher)
    return [replay(model, teacher, decoder, name)[1] for name, decoder in decoders.items()]
