"""Decoders that predict several canvases of a block in one forward pass: lossless speculation, and
WINO's draft and verify.

Source: arXiv 2510.00294 (FreeDave, for the greedy case), 2507.18578 (WINO). Shapes as in `base`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError
from bdlm.core.types import Commit, ModelSpec
from bdlm.generation.decoders.base import Decoder, DraftCanvases, View, in_range
from bdlm.generation.decoders.confidence import FixedK, best, candidates, confidence, known_reading
from bdlm.generation.decoders.exact import FirstHitting
from bdlm.generation.sampling.logits_filters import log_prob
from bdlm.generation.sampling.noise import CellNoise


def turns(masked: Tensor, noise: CellNoise) -> tuple[Tensor, Tensor]:
    """Return first-hitting's order: the cells from the first turn to the last, int64 [R, n] (masked
    ones first), and each cell's turn, int64 [R, n]."""
    order = noise.order().masked_fill(~masked, -1.0).argsort(1, descending=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(1, order, place)


@dataclass(frozen=True)
class Speculative(Decoder):
    """Generates the text of first-hitting, token for token, in fewer forward passes: its order and
    its noise are known from the seed.

    A forward pass predicts the next k + 1 cells of the order. Only the first is exact; the others,
    drawn with their own noise, are drafts. The next forward pass has k + 1 canvases: the block as
    it is, and with 1, 2, ..., k drafts filled in. While the exact draw from one canvas equals the
    draft in the next one, the draw from the next one is exact too. The agreeing prefix is kept, and
    the last correct canvas gives the new drafts. The first forward pass of a block has no drafts. k
    is an upper limit, >= 0, and may exceed the cells of the block."""

    needs: ClassVar[frozenset[str]] = frozenset({"draft_canvases"})
    k: int = 3

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"speculative.k is {self.k}; use 0 (first-hitting) or more drafts")

    def plan(self, masked: Tensor, noise: CellNoise) -> Tensor:
        return masked & (turns(masked, noise)[1] <= self.k)

    def draft_canvases(
        self,
        masked: Tensor,
        filled: Tensor,
        ids: Tensor,
        noise: CellNoise,
        state: dict[str, Tensor],
    ) -> DraftCanvases | None:
        draft = state.get("draft")
        if draft is None or self.k == 0:
            return None
        turn = turns(masked, noise)[1][:, None]
        # drafts filled in
        count = torch.arange(1, min(self.k, masked.shape[1] - 1) + 1, device=masked.device)[
            None, :, None
        ]
        open_ = masked[:, None]
        fills = open_ & (turn < count)
        drafted = (fills & (draft[:, None] > 0)).sum(2, keepdim=True) == count
        left = open_ & ~fills
        query_mask = left & drafted & (turn <= count + self.k)
        most = int((query_mask.any(2) * count[:, :, 0]).max()) if query_mask.numel() else 0
        if most == 0:
            return None
        tokens = torch.where(fills & drafted, draft[:, None] - 1, ids[:, None])
        return DraftCanvases(tokens[:, :most], left[:, :most], query_mask[:, :most])

    def choose(self, view: View) -> Commit:
        shape = (view.masked.shape[0], -1, view.masked.shape[1])
        views = [view] if view.drafts is None else [view, view.drafts]
        tokens = [v.drawn(v.query_mask) for v in views]
        drawn = torch.cat([t.view(shape) for t in tokens], 1)
        sure = torch.cat(
            [
                v.spread(log_prob(v.raw, t[v.query_mask]), 0.0).view(shape)
                for v, t in zip(views, tokens, strict=True)
            ],
            1,
        )
        queried = torch.cat([v.query_mask.view(shape) for v in views], 1)
        held = None if view.drafts is None else view.drafts.ids.view(shape)
        order, _ = turns(view.masked, view.noise)
        cells, ids = torch.zeros_like(view.masked), torch.zeros_like(view.ids)
        logp = torch.zeros_like(sure[:, 0])
        right, last = view.masked.any(1, keepdim=True), torch.zeros_like(order[:, :1])
        for j in range(min(drawn.shape[1], shape[2])):
            cell = order[:, j : j + 1]
            right = right & queried[:, j].gather(1, cell)
            if j and held is not None:
                before = order[:, j - 1 : j]
                right = right & (held[:, j - 1].gather(1, before) == ids.gather(1, before))
            now = torch.zeros_like(cells).scatter_(1, cell, right)
            cells, last = cells | now, torch.where(right, j, last)
            ids, logp = torch.where(now, drawn[:, j], ids), torch.where(now, sure[:, j], logp)
        newest = last[:, :, None].expand(-1, 1, shape[2])
        ahead = queried.gather(1, newest)[:, 0] & view.masked & ~cells
        draft = torch.where(ahead, drawn.gather(1, newest)[:, 0] + 1, 0)
        return Commit(cells, ids, extra={"draft": draft}, log_prob=logp)

    def slowest(self) -> Decoder:
        return Speculative(0)

    def reference(self) -> Decoder:
        return FirstHitting()


@dataclass(frozen=True)
class Wino(Decoder):
    """Fills many cells, and masks those again that the rest of the block does not support (WINO).

    Masked cells with a confidence above tau_draft are filled, at most 0.7 of them (but 5 to 20) and
    always the best one. Filled cells with a probability of their token below tau_verify given all
    other cells are masked again, the least probable first, always fewer than were just filled. The
    original sees the other cells through a second copy of the block; here each filled cell is
    masked in a draft canvas of its own, which gives the same probabilities without a special
    attention mask."""

    needs: ClassVar[frozenset[str]] = frozenset({"draft_canvases"})
    tau_draft: float = 0.6
    tau_verify: float = 0.9
    confidence: str = "model"

    def __post_init__(self) -> None:
        known_reading(self.confidence)
        in_range("wino", "tau_draft", self.tau_draft, 0, 1)
        in_range("wino", "tau_verify", self.tau_verify, 0, 1)

    def check(self, block: int, spec: ModelSpec) -> None:
        if spec.noise == "none":
            raise ConfigError(
                "decoder 'wino' masks cells of a block again, but an autoregressive model sees"
                " none; use 'first-hitting'"
            )

    def draft_canvases(
        self,
        masked: Tensor,
        filled: Tensor,
        ids: Tensor,
        noise: CellNoise,
        state: dict[str, Tensor],
    ) -> DraftCanvases | None:
        most = int(filled.sum(1).max()) if self.tau_verify else 0
        if most == 0:
            return None
        number = filled.long().cumsum(1)[:, None]
        left_out = filled[:, None] & (
            number == torch.arange(1, most + 1, device=ids.device)[None, :, None]
        )
        return DraftCanvases(
            ids[:, None].expand(-1, most, -1), masked[:, None] | left_out, left_out
        )

    def choose(self, view: View) -> Commit:
        ids, view = candidates(view), view.reading(self.confidence)
        value = confidence(view, ids)
        bold = view.masked & (value > self.tau_draft)
        cap = (0.7 * view.masked.sum(1)).clamp(5, 20).long()
        cells = best(value, bold, cap) | best(value, view.masked)
        if view.drafts is None:
            return Commit(cells, ids)
        drafts = view.drafts
        own = view.ids.repeat(1, drafts.query_mask.shape[1] // ids.shape[1])[drafts.query_mask]
        support = (
            drafts.spread(drafts.probs.gather(1, own[:, None])[:, 0], 0.0)
            .view(ids.shape[0], -1, ids.shape[1])
            .sum(1)
        )
        doubtful = view.filled & (support < self.tau_verify)
        reopen = best(-support, doubtful, cells.sum(1) - 1)
        return Commit(cells, ids, reopen=reopen)

    def slowest(self) -> Decoder:
        return Wino(1.0, 0.0, self.confidence)

    def reference(self) -> Decoder:
        return FixedK(1, "confidence", self.confidence)
