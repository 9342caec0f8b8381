"""One forward pass for all rows; and when the model raises, which request caused it.

In: a `Batch`. Out: `Outputs`, or the rows that failed; the cache is then as it was. A model that
raises does not say which row it could not process, so each request is run alone: those that raise
again are the cause, or all of them if none does (the pass as a whole could not be made). Knows
nothing about how decoders choose."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import UnsupportedError
from bdlm.core.forward import advance, predict
from bdlm.core.types import NOWHERE, Canvas, Denoiser, Layout, Out
from bdlm.generation.decoders.exact import hitting_time
from bdlm.generation.engine.batch import Batch, Outputs
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.draft_canvases import concatenate
from bdlm.generation.engine.row_cache import RowCache
from bdlm.generation.engine.token_buffer import TokenBuffer

LOGGER = logging.getLogger("bdlm.engine")
# Up to so many predicted cells, it is faster to read 8 bits of a large head's weights now, and all
# of them later for many cells together, than to read all of them now.
FEW = 6


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward pass is given.

    canvas: the cells being denoised, R rows of W. query_mask: bool [R, W], those to predict.
    commits: cells to commit to the cache, int64 [R, m], and their layout, or None. outputs: as in
    `Step.outputs`."""

    canvas: Canvas
    query_mask: Tensor
    commits: tuple[Tensor, Layout] | None
    outputs: frozenset[str]

    def select(self, rows: list[int]) -> ForwardInputs:
        """The same for some rows; the others are treated as padding."""
        row_mask = torch.zeros(
            len(self.query_mask), dtype=torch.bool, device=self.query_mask.device
        )
        row_mask[rows] = True
        commits = self.commits
        return ForwardInputs(
            replace(self.canvas, layout=_select(self.canvas.layout, row_mask)),
            self.query_mask & row_mask[:, None],
            None if commits is None else (commits[0], _select(commits[1], row_mask)),
            self.outputs,
        )


def _select(layout: Layout, row_mask: Tensor) -> Layout:
    layout = layout.expand(len(row_mask))
    return replace(layout, doc=torch.where(row_mask[:, None], layout.doc, NOWHERE))


class CacheRollback:
    """A context that restores the cache's slot table when its body raises (or, with `always`, in
    any case).

    model_cache: None for models without one."""

    def __init__(self, model_cache: Any, always: bool = False) -> None:
        self._table: Any = None if model_cache is None else model_cache.slots
        self._always = always

    def __enter__(self) -> None:
        self._length = None if self._table is None else self._table.length.clone()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._length is not None and (error is not None or self._always):
            rows = torch.arange(len(self._length), device=self._length.device)
            self._table.drop(rows, self._length)


class ModelRunner:
    """Runs the model over all rows.

    row_by_row: one forward pass for each row, so that a row's logits do not depend on the others to
    the last bit."""

    def __init__(
        self,
        model: Denoiser,
        cache: RowCache,
        tokens: TokenBuffer,
        blocks: BlockState,
        row_by_row: bool = False,
    ) -> None:
        self.model, self.spec, self.cache = model, model.spec, cache
        self.tokens, self.blocks, self.row_by_row = tokens, blocks, row_by_row

    def run(self, batch: Batch) -> Outputs | None:
        """Commit the final cells of all rows, and predict the cells of the batch's query mask.

        Returns None if a request has failed: `batch.failed` then has its row, and the cache holds
        what it held (besides a window that slid)."""
        if batch.failed:
            return None
        inputs = self._inputs(batch)
        cache = self.cache.model_cache
        try:
            if self.row_by_row:
                rows = sorted(row for rows in batch.requests for row in rows)
                out = run_row_by_row(self.model, inputs, cache, rows)
            else:
                out = run_together(self.model, inputs, cache)
        except Exception as error:
            LOGGER.warning(
                "a forward pass of %d requests raised %s: %s; each is run alone to find the cause",
                len(batch.requests),
                type(error).__name__,
                error,
            )
            batch.failed.update(
                find_failing_requests(self.model, inputs, cache, batch.requests, error)
            )
            return None
        if inputs.commits is not None:
            self.tokens.mark_committed()
        return Outputs(out, inputs.query_mask)

    def _inputs(self, batch: Batch) -> ForwardInputs:
        query_mask, blocks = batch.query_mask, self.blocks
        assert query_mask is not None, "the batch was not planned"
        mask_prob = None
        if self.spec.time_conditioned:
            mask_prob = hitting_time(blocks.masked, blocks.noise())
        shifted = self.spec.shift or self.spec.noise == "none"
        canvas = blocks.canvas(self.tokens.previous() if shifted else None, mask_prob)
        bounds = batch.only_draws and int(query_mask.sum()) <= FEW
        outputs = frozenset({"logit_bounds" if bounds else "logits"}).union(
            *(group.decoder.needs & {"attention", "hidden"} for group in batch.groups)
        )
        if batch.drafts is not None:
            canvas = concatenate(canvas, batch.drafts, blocks.noise(), self.spec.mask_id)
            query_mask = torch.cat((query_mask, batch.drafts.query_mask.flatten(1)), 1)
        commits = self.tokens.to_commit() if self.cache.exists else None
        if commits is not None:
            self._slide(batch)
        return ForwardInputs(canvas, query_mask, commits, outputs)

    def _slide(self, batch: Batch) -> None:
        """Make room for what is about to be committed, and note in the batch which rows slid."""
        slid = self.cache.slide(self.tokens.num_to_commit(), self.tokens.size)
        if slid is not None:
            rows = slid.nonzero()[:, 0]
            committed = self.tokens.committed[rows]
            batch.slid.update(zip(rows.tolist(), committed.tolist(), strict=True))


def run_together(model: Denoiser, inputs: ForwardInputs, cache: Any) -> Out:
    """Make one forward pass for all rows. If it raises, the cache still holds what it held.

    Raises UnsupportedError for a model that leaves out an output that it was asked for."""
    packed = "ragged_batching" in model.spec.supports
    canvas, query_mask, outputs = inputs.canvas, inputs.query_mask, inputs.outputs
    with CacheRollback(cache):
        if inputs.commits is None:
            out = predict(model, canvas, cache, query_mask, outputs, packed)
        else:
            out = advance(model, *inputs.commits, canvas, cache, query_mask, outputs, packed)
        for name in inputs.outputs:
            # logits are as good as bounds of them
            if getattr(out, name) is None and (name != "logit_bounds" or out.logits is None):
                raise UnsupportedError(
                    f"the model's `step` was asked for {name} and gave none; give it, or leave it"
                    " out of `supports`"
                )
        return out


def run_row_by_row(model: Denoiser, inputs: ForwardInputs, cache: Any, rows: list[int]) -> Out:
    """Make one forward pass for each row, so that the shape of every product depends on that row
    alone. rows: all that exist, in order.

    Rounding depends on shapes: a row's logits are then bit for bit those that it has without the
    others, where the model packs the cells that exist."""
    with CacheRollback(cache):
        outs = [run_together(model, inputs.select([row]), cache) for row in rows]
    logits = [out.logits for out in outs if out.logits is not None]
    hidden = [out.hidden for out in outs if out.hidden is not None]
    return Out(torch.cat(logits) if logits else None, torch.cat(hidden) if hidden else None)


def find_failing_requests(
    model: Denoiser, inputs: ForwardInputs, cache: Any, requests: list[list[int]], error: Exception
) -> dict[int, Exception]:
    """Find the requests for which a forward pass fails, by running each alone.

    requests: the rows of each. error: what the pass for all raised. Returns what each raised, by
    its first row; `error` for every request if none raises alone."""
    found: dict[int, Exception] = {}
    for rows in requests if len(requests) > 1 else []:
        try:
            with CacheRollback(cache, always=True):
                run_together(model, inputs.select(rows), cache)
        except Exception as own:
            found[rows[0]] = own
    return found or {rows[0]: error for rows in requests}
