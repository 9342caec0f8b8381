"""A decoder with a learned part: NI Sampling, whose small indicator tells which cells would not
change if they were filled now.

The indicator is trained by `bdlm.harness.indicator` and lives in a file; here it is only read and
asked. Source: arXiv 2604.18471. Shapes as in `base`; d width of the model's last state."""

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
from bdlm.generation.sampling.sampler import NEVER, TOKEN

TOP = 16  # greatest probabilities that are looked at
LEAD = 10.0  # nats; a greater lead counts as this one
NEXT = 3  # likeliest tokens besides the candidate that are looked at


@dataclass(frozen=True)
class Evidence:
    """What the indicator sees of M cells.

    state: [M, d]. probs: [M, TOP + 2], the greatest ones, the candidate's, and its lead. tokens:
    int64 [M, NEXT + 1], the candidate and likely others. The lead: by how much, in units of `LEAD`
    nats, the model's logits would have to move for another candidate; the noise stays as it is."""

    state: Tensor
    probs: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, view: View, candidate: Tensor) -> Evidence:
        """What a view shows of its asked cells. candidate: int64 [M]."""
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
    """How far each asked cell's candidate is from being another one, nats of the model's logits,
    float64 [M], in [0, LEAD].

    Against tokens that can be drawn: the lead of logit and noise at the temperature, times the
    temperature. Against those that filters removed: the lead in the model's logits. At temperature
    0, and in its limit, it is that lead alone.
    """
    row, cell = view.query_mask.nonzero(as_tuple=True)
    keys, tokens = view.noise, torch.arange(view.logits.shape[1], device=row.device)
    place = [x[:, None] for x in (keys.seed[row], keys.position[row, cell], keys.draw[row, cell])]
    noise = randomness.gumbel(place[0], TOKEN, place[1], place[2], tokens)
    heat = view.temperature[row, None].double()
    scores = view.logits.double() + torch.where(heat == 0, 0.0, noise)
    best_two = scores.topk(2)
    lead = (best_two.values[:, :1] - best_two.values[:, 1:]) * torch.where(heat == 0, 1.0, heat)
    if view.model is not None and view.model is not view.logits:
        model = view.model.double()
        removed = model.masked_fill(view.logits != NEVER, NEVER).amax(1, keepdim=True)
        lead = torch.minimum(lead, model.gather(1, best_two.indices[:, :1]) - removed)
    return lead[:, 0].clamp(0, LEAD)


class Indicator(nn.Module):
    """A residual MLP on one cell's evidence; about 40,000 weights at width 256 and 2,048 tokens."""

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
        layer = lambda: nn.Sequential(
            nn.LayerNorm(inner),
            nn.Linear(inner, inner),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(inner, inner),
        )
        self.layers = nn.ModuleList(layer() for _ in range(depth))
        self.out = nn.Linear(inner, 1)

    def forward(self, seen: Evidence) -> Tensor:
        """Logit of "filling this cell now does not change the text", [M]."""
        kind = self.out.weight.dtype
        x = self.join(
            torch.cat(
                (
                    self.state(seen.state.to(kind)),
                    self.probs(seen.probs.to(kind)),
                    self.tokens(seen.tokens).flatten(1),
                ),
                1,
            )
        )
        for layer in self.layers:
            x = x + layer(x)
        return self.out(x)[:, 0]


def save_indicator(net: Indicator, path: str | Path) -> None:
    """Write an indicator as safetensors; written beside and renamed."""
    from safetensors.torch import save

    write_atomically(Path(path), save(net.state_dict(), {"sizes": json.dumps(net.sizes)}))
    load_indicator.cache_clear()


@functools.lru_cache(maxsize=4)
def load_indicator(path: str) -> Indicator:
    """An indicator from its file, in float64, so that a cell's answer does not depend on how many
    are asked. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            sizes: dict[str, Any] = json.loads(file.metadata()["sizes"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no indicator ({error}); train one with bdlm.harness.indicator"
        ) from None
    net = Indicator(**sizes)
    net.load_state_dict(weights)
    return net.double().eval()


@dataclass(frozen=True)
class NaturalIndicator(Decoder):
    """NI Sampling: the most confident cell, all above `conf`, and all that the indicator accepts.

    indicator: file of a trained indicator. accept: its least probability.
    """

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
