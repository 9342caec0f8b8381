"""What one forward pass is for: the running rows by decoder, and the cells that they need.

The scheduler makes a `Batch`, planning adds the query mask and the draft canvases, the model runner
turns it into `Outputs`, and each part adds the rows that failed. Knows nothing about how any of
these are computed.

Shapes: R rows, n cells of a block, W cells of a row with its draft canvases, M predicted cells, V
vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from bdlm.core.types import Out
from bdlm.generation.decoders.base import Decoder, DraftCanvases


@dataclass(frozen=True)
class Group:
    """The rows under one decoder. row_mask: bool [R]; None = every row that has a block."""

    decoder: Decoder
    rows: list[int]
    row_mask: Tensor | None


@dataclass(frozen=True)
class Guidance:
    """Guided rows. leaders, unconditional: int64 [g], rows of requests and their unconditional
    rows. scale: float32 [g], w of (1 + w) log p(. | prompt) - w log p(. | negative prompt)."""

    leaders: Tensor
    unconditional: Tensor
    scale: Tensor


@dataclass
class Batch:
    """The rows of one forward pass.

    groups: rows by decoder. requests: rows of each request (two under guidance). guidance: None if
    no row is guided. limit: int64 [R], the most decisions that the open block may take. only_draws:
    whether bounds of the logits are enough for every decoder.

    query_mask: bool [R, n], cells to predict. drafts: further canvases to predict, or None.

    failed: by row, why its request ends. slid: by row, how many tokens were committed when its
    window slid."""

    groups: list[Group]
    requests: list[list[int]]
    guidance: Guidance | None
    limit: Tensor
    only_draws: bool
    query_mask: Tensor | None = None
    drafts: DraftCanvases | None = None
    failed: dict[int, Exception] = field(default_factory=dict)
    slid: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Outputs:
    """What the model gave. out: predictions of M cells. cells: bool [R, W], which cells those are:
    the n cells of each row's block, then those of its draft canvases."""

    out: Out
    cells: Tensor
