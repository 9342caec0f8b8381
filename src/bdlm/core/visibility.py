"""Who may see whom: one rule, and its dense, split and FlexAttention forms.

    a clean key is seen by a clean query when rank_key <= rank_query, by a noisy query when rank_key
    < limit_query; a noisy key is seen only from its own group; documents do not see each other.

In: (rank, group, limit, doc) of queries and keys. Out: boolean masks, or a plan of small attention
calls. Knows nothing about embeddings, heads or caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bdlm.core.types import CLEAN, Layout, Step

# queries per attention call of the split form; measured best on CPU for windows of 256, within 2 %
# of the best at 1,024
CHUNK = 64


@dataclass(frozen=True)
class Cells:
    """The four numbers that visibility needs, int64 [R, N] each (R may be 1)."""

    rank: Tensor
    group: Tensor
    limit: Tensor
    doc: Tensor

    @classmethod
    def of(cls, source: Step | Layout) -> Cells:
        return cls(source.rank, source.group, source.limit, source.doc)

    def __getitem__(self, cells: slice | Tensor) -> Cells:
        return Cells(
            self.rank[:, cells], self.group[:, cells], self.limit[:, cells], self.doc[:, cells]
        )

    def __len__(self) -> int:
        return self.rank.shape[1]

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rank, self.group, self.limit, self.doc

    def one_row_if_equal(self) -> Cells:
        """A single row when all rows agree, so that one mask serves the batch."""
        if self.rank.shape[0] > 1 and all(bool((f == f[:1]).all()) for f in self.fields):
            return Cells(*(f[:1] for f in self.fields))
        return self

    def same(self, other: Cells) -> bool:
        """Whether all numbers agree, on one device."""
        return all(map(torch.equal, self.fields, other.fields))

    def clone(self) -> Cells:
        """A copy in memory of its own."""
        return Cells(*(f.clone() for f in self.fields))


def join(*parts: Cells) -> Cells:
    """Cells side by side; a single row is repeated to the others' rows."""
    rows = max(p.rank.shape[0] for p in parts)
    columns = [
        [getattr(p, n).expand(rows, -1) for p in parts] for n in ("rank", "group", "limit", "doc")
    ]
    return Cells(*(torch.cat(c, 1) for c in columns))


def sees(query: Cells, key: Cells) -> Tensor:
    """The rule. Returns bool [R, Nq, Nk]: query may attend key."""
    noisy_query, noisy_key = (query.group != CLEAN)[:, :, None], (key.group != CLEAN)[:, None, :]
    reach = torch.where(noisy_query, query.limit[:, :, None] - 1, query.rank[:, :, None])
    to_clean = ~noisy_key & (key.rank[:, None, :] <= reach)
    to_noisy = noisy_key & (key.group[:, None, :] == query.group[:, :, None])
    return (to_clean | to_noisy) & (key.doc[:, None, :] == query.doc[:, :, None])


@dataclass(frozen=True)
class Segment:
    """One attention call: queries [start, stop) over the keys of `runs`, under an additive mask
    [R|1, 1, q, k] (None: all seen)."""

    start: int
    stop: int
    runs: tuple[tuple[int, int], ...]
    mask: Tensor | None

    @property
    def keys(self) -> int:
        """Keys that each query meets."""
        return sum(b - a for a, b in self.runs)


@dataclass(frozen=True)
class Plan:
    """How one call attends: the segments cover the queries in order."""

    segments: tuple[Segment, ...]

    def leading(self, count: int) -> Plan:
        """The plan of the first `count` queries only."""
        kept = []
        for s in self.segments:
            if s.start < count:
                stop = min(s.stop, count)
                mask = None if s.mask is None else s.mask[:, :, : stop - s.start]
                kept.append(Segment(s.start, stop, s.runs, mask))
        return Plan(tuple(kept))

    @property
    def pairs(self) -> int:
        """Query-key pairs that are computed, for one row."""
        return sum((s.stop - s.start) * s.keys for s in self.segments)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere, with a head axis: [R, q, k] -> [R, 1, q, k]."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, float("-inf")
    )[:, None]


def split_plan(
    query: Cells,
    key: Cells,
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK,
    breaks: tuple[int, ...] = (),
) -> Plan:
    """The rule cut into chunks of queries, each with only the keys that it can see: about a quarter
    of the dense pairs.

    breaks: query indices that no chunk crosses (the border between the streams). The full mask is
    never built."""
    query, key = query.one_row_if_equal(), key.one_row_if_equal()
    edges = sorted({0, len(query), *breaks})
    bounds = [(s, min(s + chunk, b)) for a, b in pairwise(edges) for s in range(a, b, chunk)]
    segments = []
    for start, stop in bounds:
        visible = sees(query[start:stop], key)
        runs = _runs(visible.any(1).any(0))
        kept = torch.cat([visible[:, :, a:b] for a, b in runs], 2)
        segments.append(
            Segment(start, stop, runs, None if bool(kept.all()) else additive(kept, dtype))
        )
    return Plan(tuple(segments))


def _runs(used: Tensor, align: int = 16) -> tuple[tuple[int, int], ...]:
    """Runs of used keys as [start, stop), widened to multiples of `align`, joined where they meet.

    A few masked keys cost less than a copy, and the runs are then the same for all small block
    sizes: one compiled graph serves them."""
    count = len(used)
    tiles = F.pad(used, (0, -count % align)).view(-1, align).any(1).tolist()
    edges = [i for i, (before, now) in enumerate(pairwise([False, *tiles, False])) if before != now]
    return tuple(
        (a * align, min(b * align, count)) for a, b in zip(edges[::2], edges[1::2], strict=True)
    )


def flex_rule(query: Cells, key: Cells) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as FlexAttention's mask function (batch, head, query index, key index) -> bool."""

    def rule(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        bq = b if query.rank.shape[0] > 1 else torch.zeros_like(b)
        bk = b if key.rank.shape[0] > 1 else torch.zeros_like(b)
        noisy_query, noisy_key = query.group[bq, q] != CLEAN, key.group[bk, k] != CLEAN
        reach = torch.where(noisy_query, query.limit[bq, q] - 1, query.rank[bq, q])
        to_clean = ~noisy_key & (key.rank[bk, k] <= reach)
        to_noisy = noisy_key & (key.group[bk, k] == query.group[bq, q])
        return (to_clean | to_noisy) & (key.doc[bk, k] == query.doc[bq, q])

    return rule
