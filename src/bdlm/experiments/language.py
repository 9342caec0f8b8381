"""Support before frequency: a small regular language with every string known, to see when a model
learns which strings exist and how frequent they are.

In: sizes and a seed. Out: support mass and frequency error by step. All strings of a random
automaton are enumerated and weighted by Zipf's law in random order, so the true conditionals are
exact. A state is one masked cell with the rest of its block and all earlier blocks known. Support
mass: the model's probability of letters that occur there. Frequency error: KL(true || model) after
both are restricted to those letters. Source: arXiv 2605.13999. Knows nothing about files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.corruption import corrupt
from bdlm.core.forward import train_logits
from bdlm.core.objectives import log_probs, total_nats
from bdlm.core.schedules import Linear
from bdlm.core.types import Denoiser, NoisedBatch
from bdlm.models.dit import DiT, DiTConfig

# learned: at this mass on the support, at these nats of the restricted KL
SUPPORT, FREQUENCY = 0.95, 0.05


@dataclass(frozen=True)
class Language:
    """Strings [S, n] over `letters` letters and their probabilities, float64 [S]."""

    strings: Tensor
    probability: Tensor
    letters: int

    @classmethod
    def random(
        cls, letters: int, length: int, states: int, choices: int, exponent: float, seed: int
    ) -> Language:
        """Make a random language: every state of an automaton allows `choices` letters, each
        leading to some state; the k-th string weighs 1 / k^exponent."""
        draw = torch.Generator().manual_seed(seed)
        allowed = torch.stack(
            [torch.randperm(letters, generator=draw)[:choices] for _ in range(states)]
        )
        # every state is reached
        leads = torch.stack(
            [torch.randperm(choices, generator=draw) % states for _ in range(states)]
        )
        strings, state = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        for _ in range(length):
            strings = torch.cat(
                (strings.repeat_interleave(choices, 0), allowed[state].reshape(-1, 1)), 1
            )
            state = leads[state].reshape(-1)
        rank = torch.randperm(len(strings), generator=draw) + 1
        weight = rank.double() ** -exponent
        return cls(strings, weight / weight.sum(), letters)

    def sample(self, count: int, draw: torch.Generator) -> Tensor:
        """Draw strings, int64 [count, n]."""
        return self.strings[
            torch.multinomial(self.probability, count, replacement=True, generator=draw)
        ]


@dataclass(frozen=True)
class States:
    """States of one masked position: ids [G, n], true probabilities of its letters [G, letters],
    and the probability of each state [G]."""

    place: int
    ids: Tensor
    truth: Tensor
    weight: Tensor

    @classmethod
    def of(cls, language: Language, place: int, block: int) -> States:
        cells = torch.arange(language.strings.shape[1])
        known = (Contiguous(block).block(cells) <= Contiguous(block).block(cells[place])) & (
            cells != place
        )
        # number of the known letters
        number = (
            language.strings[:, known] * language.letters ** torch.arange(int(known.sum()))
        ).sum(1)
        contexts, group = number.unique(return_inverse=True)
        mass = torch.zeros(len(contexts), language.letters, dtype=torch.float64)
        mass.index_put_((group, language.strings[:, place]), language.probability, accumulate=True)
        ids = torch.zeros(len(contexts), len(cells), dtype=torch.long)
        ids[group] = torch.where(known, language.strings, 0)
        weight = mass.sum(1)
        return cls(place, ids, mass / weight[:, None], weight)


@torch.no_grad()
def scores(model: Denoiser, states: list[States], block: int) -> tuple[float, float]:
    """Compute (support mass, restricted KL in nats), means over the positions of a string and the
    states that occur there."""
    mass = error = 0.0
    for s in states:
        masked = torch.zeros_like(s.ids, dtype=torch.bool)
        masked[:, s.place] = True
        noisy, ones = s.ids.masked_fill(masked, model.spec.mask_id), torch.ones(s.ids.shape)
        noised = NoisedBatch(
            s.ids, noisy, masked, ones, ones, masked, make_layout(Contiguous(block), s.ids.shape[1])
        )
        logits = train_logits(model, noised).logits
        assert logits is not None
        log = log_probs(logits, model.spec.mask_id)[:, : s.truth.shape[1]].double()
        there = s.truth > 0
        on = log.masked_fill(~there, float("-inf")).logsumexp(1)
        gap = torch.where(
            there, s.truth * (s.truth.clamp(min=1e-300).log() - (log - on[:, None])), 0.0
        ).sum(1)
        mass += float((s.weight * on.exp()).sum()) / len(states)
        error += float((s.weight * gap).sum()) / len(states)
    return mass, error


def language(
    lm: Any = None,
    *,
    block_size: int,
    seed: int,
    steps: int = 3000,
    every: int = 50,
    letters: int = 6,
    length: int = 6,
    states: int = 3,
    choices: int = 3,
    exponent: float = 1.0,
    hidden_dim: int = 64,
    layers: int = 2,
    rows: int = 128,
    lr: float = 1e-3,
) -> dict[str, Any]:
    """Train on strings of the language and measure both at regular steps.

    Returns the curve, the step at which each threshold is first met (None: never), their ratio, and
    the score of a model that knows nothing."""
    world = Language.random(letters, length, states, choices, exponent, seed)
    states_by_place = [States.of(world, place, block_size) for place in range(length)]
    torch.manual_seed(seed)
    model = DiT(DiTConfig(letters + 1, letters, hidden_dim, layers, 4, 16, length, block_size))
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    draw, layout = (
        torch.Generator().manual_seed(seed + 1),
        make_layout(Contiguous(block_size), length),
    )
    curve = []
    for step in range(steps + 1):
        if step % every == 0:
            mass, error = scores(model, states_by_place, block_size)
            curve.append({"step": step, "support": mass, "frequency": error})
        clean = world.sample(rows, draw)
        cells = torch.ones_like(clean, dtype=torch.bool)
        batch = corrupt(
            clean,
            layout,
            cells,
            Linear(),
            seed=seed,
            step=step,
            row=torch.arange(rows),
            distribution="count",
            mask_id=model.spec.mask_id,
        )
        nats: Any = total_nats(model, batch, float(batch.scored.sum()))
        nats.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    support = next((c["step"] for c in curve if c["support"] >= SUPPORT), None)
    frequency = next((c["step"] for c in curve if c["frequency"] <= FREQUENCY), None)
    return {
        "strings": len(world.strings),
        "states": sum(len(s.ids) for s in states_by_place),
        "choices": sum(float((s.weight * (s.truth > 0).sum(1)).sum()) for s in states_by_place)
        / length,
        "support_step": support,
        "frequency_step": frequency,
        "ratio": None if not support or not frequency else support / frequency,
        "curve": curve,
    }
