"""A decoder with a learned part: NI Sampling, with a small network (the indicator) that predicts
which cells would not change if they were filled now.

`bdlm.harness.indicator` trains the indicator and writes its file; this module reads and evaluates
it. Source: arXiv 2604.18471. Shapes as in `base`; d width of the model's last state."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdlm.core import randomness
from bdlm.core.errors import CheckpointError, ConfigError, UnsupportedError
from bdlm.core.types import Commit, ModelSpec
from bdlm.data.files import write_atomically
from bdlm.generation.decoders.base import Decoder, View, in_range
from bdlm.generation.decoders.confidence import FixedK, best, candidates, confidence, known_reading
from bdlm.generation.sampling.logits_filters import NEVER
from bdlm.generation.sampling.sampler import TOKEN

TOP = 16  # greatest probabilities that the indicator sees
LEAD = 10.0  # nats; greater leads are clamped to this
NEXT = 3  # most likely tokens besides the candidate that the indicator sees


@dataclass(frozen=True)
class Evidence:
    """The indicator's input for M cells.

    state: [M, d]. probs: [M, TOP + 2], the greatest ones, the candidate's, and its lead. tokens:
    int64 [M, NEXT + 1], the candidate and likely others. The lead is how far the model's logits
    would have to move for another candidate with the same noise, in units of `LEAD` nats."""

    state: Tensor
    probs: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, view: View, candidate: Tensor) -> Evidence:
        """Collect the input from a view. candidate: int64 [M]. Raises UnsupportedError for a view
        without the model's last state."""
        if view.hidden is None:
            raise UnsupportedError(
                "decoder 'ni' reads the model's last state, but its view holds none; use"
                " 'threshold'"
            )
        probs = view.probs
        top = probs.topk(min(TOP, probs.shape[1]), -1)
        short = TOP - top.values.shape[1]
        own = probs.gather(1, candidate[:, None])
        greatest = nn.functional.pad(top.values, (0, short))
        others = nn.functional.pad(
            top.indices[:, 1 : NEXT + 1], (0, max(0, NEXT + 1 - top.indices.shape[1]))
        )
        numbers = torch.cat((greatest, own, lead(view)[:, None].float() / LEAD), 1)
        return cls(view.hidden.float(), numbers, torch.cat((candidate[:, None], others), 1))

    def __getitem__(self, rows: Tensor) -> Evidence:
        return Evidence(self.state[rows], self.probs[rows], self.tokens[rows])

    def cpu(self) -> Evidence:
        return Evidence(self.state.cpu(), self.probs.cpu(), self.tokens.cpu())

    @classmethod
    def join(cls, parts: list[Evidence]) -> Evidence:
        return cls(
            *(torch.cat([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__)
        )


def lead(view: View) -> Tensor:
    """Return how far the candidate of each predicted cell is from being another one, nats of the
    model's logits, float64 [M], in [0, LEAD].

    Against tokens that can be drawn, it is the lead of logit plus noise at the temperature, times
    the temperature. Against tokens that filters removed, it is the lead in the model's logits,
    which is the only part at temperature 0 and in its limit."""
    row, cell = view.query_mask.nonzero(as_tuple=True)
    cells, tokens = view.noise, torch.arange(view.logits.shape[1], device=row.device)
    seed, position = cells.seed[row, None], cells.position[row, cell][:, None]
    noise = randomness.gumbel(seed, TOKEN, position, cells.draw[row, cell][:, None], tokens)
    temperature = view.temperature[row, None].double()
    greedy = temperature == 0
    scores = view.logits.double() + torch.where(greedy, 0.0, noise)
    best_two = scores.topk(2)
    lead = best_two.values[:, :1] - best_two.values[:, 1:]
    lead = lead * torch.where(greedy, 1.0, temperature)
    if view.model is not None and view.model is not view.logits:
        model = view.model.double()
        removed = model.masked_fill(view.logits != NEVER, NEVER).amax(1, keepdim=True)
        lead = torch.minimum(lead, model.gather(1, best_two.indices[:, :1]) - removed)
    return lead[:, 0].clamp(0, LEAD)


class Indicator(nn.Module):
    """A residual MLP on one cell's `Evidence`; about 40,000 weights at a model width of 256 and
    2,048 tokens.

    state: d. vocab: V. width, depth: of the MLP. token: width of a token's embedding."""

    def __init__(
        self, state: int, vocab: int, width: int = 32, token: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        self.sizes = {
            "state": state,
            "vocab": vocab,
            "width": width,
            "token": token,
            "depth": depth,
        }
        self.state = nn.Sequential(
            nn.LayerNorm(state, elementwise_affine=False), nn.Linear(state, width)
        )
        self.probs = nn.Linear(TOP + 2, width)
        self.tokens = nn.Embedding(vocab, token)
        inner = 2 * width
        self.join = nn.Linear(2 * width + (NEXT + 1) * token, inner)
        self.layers = nn.ModuleList(_layer(inner) for _ in range(depth))
        self.out = nn.Linear(inner, 1)

    def forward(self, seen: Evidence) -> Tensor:
        """Return the logit of "filling this cell now does not change the text", [M]."""
        dtype = self.out.weight.dtype
        x = self.join(
            torch.cat(
                (
                    self.state(seen.state.to(dtype)),
                    self.probs(seen.probs.to(dtype)),
                    self.tokens(seen.tokens).flatten(1),
                ),
                1,
            )
        )
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)[:, 0]


def _layer(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(width, width),
    )


def save_indicator(net: Indicator, path: str | Path) -> None:
    """Write an indicator as safetensors, to a temporary file that is then renamed."""
    from safetensors.torch import save

    write_atomically(Path(path), save(net.state_dict(), {"sizes": json.dumps(net.sizes)}))
    load_indicator.cache_clear()


@functools.lru_cache(maxsize=4)
def load_indicator(path: str) -> Indicator:
    """Load an indicator from its file, in float64, so that a cell's result does not depend on how
    many cells are evaluated with it. Raises CheckpointError for a file that holds no indicator."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            sizes: dict[str, Any] = json.loads(file.metadata()["sizes"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not an indicator ({error}); train one with bdlm.harness.indicator"
        ) from None
    net = Indicator(**sizes)
    net.load_state_dict(weights)
    return net.double().eval()


@dataclass(frozen=True)
class NaturalIndicator(Decoder):
    """Fills the most confident cell, all with a confidence above `conf`, and all that the indicator
    accepts (NI Sampling).

    indicator: file of a trained indicator. accept: the probability above which it accepts, in [0,
    1]. conf: in [0, 1]."""

    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    indicator: str = ""
    accept: float = 0.89
    conf: float = 0.95
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("ni", "accept", self.accept, 0, 1)
        in_range("ni", "conf", self.conf, 0, 1)

    def check(self, block: int, spec: ModelSpec) -> None:
        if "hidden" not in spec.supports:
            raise ConfigError(
                "decoder 'ni' reads the model's last state, which this model does not give; use"
                " 'threshold'"
            )
        if not self.indicator:
            raise ConfigError(
                "ni.indicator is empty; give the file of an indicator trained with"
                " bdlm.harness.indicator"
            )
        if (vocab := load_indicator(self.indicator).sizes["vocab"]) != spec.vocab_size:
            raise ConfigError(
                f"ni.indicator was trained for {vocab} tokens, this model has {spec.vocab_size};"
                " train one for this model"
            )

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = confidence(view, ids)
        net = load_indicator(self.indicator).to(view.logits.device)
        kept = net(Evidence.of(view, ids[view.query_mask])).sigmoid()
        accepted = view.spread(kept, 0.0) > self.accept
        return Commit(
            view.masked & (accepted | (value > self.conf)) | best(value, view.masked), ids
        )

    def slowest(self) -> Decoder:
        return NaturalIndicator(self.indicator, 1.0, 1.0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)
