"""What decoders decide in one step: before the forward pass, which cells to predict; after it,
which tokens to write.

In: a `Batch`, and the model's logits of the predicted cells. Out: the query mask and draft
canvases, then changed blocks, and the rows that failed. An error in a decoder or a logits processor
ends the request that caused it, and no other. Knows nothing about forward passes or caches.

Shapes: R rows, n cells of a block, W cells of a row with its draft canvases, M predicted cells, V
vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.types import Commit, LogitBounds, ModelSpec, Out
from bdlm.generation.decoders.base import Decoder, DraftCanvases, View
from bdlm.generation.engine.batch import Batch, Group, Outputs
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.draft_canvases import merge, split
from bdlm.generation.engine.logits_processors import LogitsProcessors, process
from bdlm.generation.engine.stopping import StopTokens
from bdlm.generation.engine.token_buffer import TokenBuffer
from bdlm.generation.sampling.guidance import guided
from bdlm.generation.sampling.logits_filters import forbid, log_prob, no_token

NOT_NUMBERS = (
    "the model's logits are not numbers; its weights may hold NaN or overflow: try another"
    " checkpoint, or float32"
)


class DecodeStep:
    """Asks decoders which cells to predict (`plan`), and applies what they choose (`decode`)."""

    def __init__(
        self,
        spec: ModelSpec,
        tokens: TokenBuffer,
        blocks: BlockState,
        processors: LogitsProcessors,
        stops: StopTokens,
        device: torch.device,
    ) -> None:
        self.tokens, self.blocks, self.processors, self.stops = tokens, blocks, processors, stops
        never = sorted(spec.never_written)
        self._never = torch.tensor(never, dtype=torch.long, device=device)

    # -- before the forward pass -------------------------------------------------------------------

    def plan(self, batch: Batch) -> None:
        """Set the batch's query mask, bool [R, n], and its draft canvases.

        Adds to `batch.failed` the rows with a decoder that raised, planned no cell, or has taken
        more decisions than its bound."""
        blocks = self.blocks
        query_mask = torch.zeros_like(blocks.masked)
        drafts: list[tuple[Tensor | None, DraftCanvases]] = []
        any_planned = False
        for group in batch.groups:
            try:
                planned, more = self._planned(group)
            except Exception as error:
                batch.failed.update(dict.fromkeys(group.rows, error))
                continue
            query_mask, any_planned = query_mask | planned, True
            drafts += [] if more is None else [(group.row_mask, more)]
        if any_planned:
            self._fail_endless(batch, query_mask)
        if batch.guidance is not None:
            query_mask[batch.guidance.unconditional] = query_mask[batch.guidance.leaders]
        batch.query_mask, batch.drafts = query_mask, merge(drafts) if drafts else None

    def _planned(self, group: Group) -> tuple[Tensor, DraftCanvases | None]:
        """The cells that one decoder wants predicted, bool [R, n], and its draft canvases."""
        blocks, decoder, noise = self.blocks, group.decoder, self.blocks.noise()
        planned, drafts = decoder.plan(blocks.masked, noise), None
        if "draft_canvases" in decoder.needs:
            state = blocks.state_of(type(decoder).__name__)
            drafts = decoder.draft_canvases(blocks.masked, blocks.filled, blocks.ids, noise, state)
        query_mask = blocks.masked if planned is None else planned
        if "filled" in decoder.needs:
            query_mask = query_mask | blocks.filled
        if group.row_mask is not None:
            query_mask = query_mask & group.row_mask[:, None]
        return query_mask, drafts

    def _fail_endless(self, batch: Batch, query_mask: Tensor) -> None:
        """Add rows with a block that would never be full to the batch's failed ones."""
        blocks = self.blocks
        endless = blocks.real.any(1) & (~query_mask.any(1) | (blocks.step >= batch.limit))
        if batch.guidance is not None:
            endless[batch.guidance.unconditional] = False
        if not bool(endless.any()):
            return
        names = {row: type(group.decoder).__name__ for group in batch.groups for row in group.rows}
        for row in endless.nonzero()[:, 0].tolist():
            error = DecoderError(
                f"the decoder {names[row]} planned no cell, or took more decisions than its bound"
            )
            batch.failed.setdefault(row, error)

    # -- after it ----------------------------------------------------------------------------------

    def decode(self, batch: Batch, outputs: Outputs) -> None:
        """Let every decoder choose from the predictions, and apply its decisions to the blocks.

        Adds to `batch.failed` the rows where the decoder or a logits processor raised, the logits
        are not numbers, or no token can be written."""
        out, cells, guidance = outputs.out, outputs.cells, batch.guidance
        given = out.logits if out.logit_bounds is None else out.logit_bounds.upper
        assert given is not None, "the model runner lets no answer without logits pass"
        logits = forbid(given, self._never)
        if guidance is not None:
            logits, cells = guided(
                logits, cells, guidance.leaders, guidance.unconditional, guidance.scale
            )
        view = self._view(out, logits, cells, batch)
        for group in batch.groups:
            if not self._choose(group.decoder, view, group.row_mask, batch):
                for row in group.rows:  # one of them is the cause: let each choose alone
                    alone = torch.zeros_like(self.blocks.hold)
                    alone[row] = True
                    self._choose(group.decoder, view, alone, batch, row)
        if guidance is not None:
            prompt = self.tokens.prompt[guidance.leaders]
            self.blocks.mirror(guidance.leaders, guidance.unconditional, prompt)

    def _view(self, out: Out, raw: Tensor, cells: Tensor, batch: Batch) -> View:
        """What decoders see of a forward pass.

        raw: [M, V], the model's logits (or bounds of them) without the tokens that are never
        written, of `cells`, bool [R, W]."""
        blocks, processors = self.blocks, self.processors
        n = blocks.cells
        model, cut = self._process(raw, cells, batch)
        logits, bounds = cut(model, cells), out.logit_bounds
        if bounds is not None and not processors.idle:
            temperature = processors.temperature[cells.nonzero(as_tuple=True)[0]]
            bounds = replace(bounds, upper=logits, temperature=temperature)
        view = View(
            blocks.masked,
            blocks.filled,
            cells[:, :n],
            blocks.ids,
            logits,
            raw,
            processors.temperature,
            blocks.step,
            blocks.noise(),
            None if out.attention is None else out.attention[:, :n, :n],
            mask_id=blocks.mask_id,
            hidden=out.hidden,
            logit_bounds=bounds,
            model=model,
            cut=cut,
        )
        return view if batch.drafts is None else split(view, batch.drafts, cells)

    def _choose(
        self,
        decoder: Decoder,
        view: View,
        row_mask: Tensor | None,
        batch: Batch,
        row: int | None = None,
    ) -> bool:
        """Apply one decoder's decision for the rows of `row_mask`, bool [R] (None = all).

        Returns False if it raised; with `row`, that row alone has then failed."""
        blocks, name = self.blocks, type(decoder).__name__
        view = replace(view, state=blocks.state_of(name))
        if row_mask is not None:
            view = _select(view, row_mask[:, None])
        try:
            commit = decoder.choose(view)
            changed = blocks.check(commit, view.raw.shape[-1])
            scores = _log_probs(view, commit)
            extra = {f"{name}.{key}": value for key, value in commit.extra.items()}
            blocks.apply(replace(commit, extra=extra), scores, row_mask, changed)
        except Exception as error:
            if row is not None:
                batch.failed[row] = error
            return False
        if view.logit_bounds is not None:
            self._defer(commit, view.logit_bounds)
        lost = view.impossible(commit, changed)
        if self.processors.warpers:
            lost = lost | (changed & view.spread(no_token(view.logits), False))
        if bool((scores.isnan() | lost).any()):
            for i in scores.isnan().any(1).nonzero()[:, 0].tolist():
                batch.failed.setdefault(i, BdlmError(NOT_NUMBERS))
            for i in lost.any(1).nonzero()[:, 0].tolist():
                batch.failed.setdefault(i, self._no_token_error(view, lost, i))
        return True

    def _defer(self, commit: Commit, bounds: LogitBounds) -> None:
        """Leave the log-probabilities of cells that were drawn from bounds for later."""
        row, cell = commit.cells.nonzero(as_tuple=True)
        self.tokens.defer(row, self.blocks.position[row, cell], commit.ids[row, cell], bounds)

    def _no_token_error(self, view: View, lost: Tensor, row: int) -> BdlmError:
        """The reason why a row has no token at the cells `lost`, bool [R, n]."""
        here = torch.zeros_like(lost)
        here[row] = lost[row]
        place = int((self.blocks.position[row] - self.tokens.prompt[row])[lost[row]].min())
        model = view.logits if view.model is None else view.model
        if not bool((no_token(model) | no_token(view.logits))[here[view.query_mask]].any()):
            return DecoderError(
                f"the decoder wrote a banned token as new token {place}; write tokens with finite"
                " logits"
            )
        return ConfigError(
            f"no token can be written as new token {place}: banned_token_ids, allowed_token_ids,"
            " min_new_tokens or the logits processors leave none with a finite score; ban fewer, or"
            " check what the processors return"
        )

    # -- logits processors -------------------------------------------------------------------------

    def _process(
        self, raw: Tensor, cells: Tensor, batch: Batch
    ) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """The logits after bans and processors, [M, V], which decoders rank by; and `View.cut`,
        which applies warpers, temperature and filters."""
        processors = self.processors
        if processors.idle:
            return raw, lambda model, query_mask: model
        rows = self._rows(cells)

        def cut(model: Tensor, query_mask: Tensor) -> Tensor:
            row, early = rows if query_mask is cells else self._rows(query_mask)
            if processors.warpers:
                model = self._run(processors.warpers, model, row, early, batch)
            return processors.cut(model, row)

        model = processors.ban(raw, *rows)
        if processors.custom:
            model = self._run(processors.custom, model, *rows, batch)
        return model, cut

    def _rows(self, query_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each predicted cell: its row, int64 [M], and whether it is among the row's first new
        tokens, which must not be stop tokens (`min_new_tokens`), bool [M]; None if no row has
        such."""
        row, cell = query_mask.nonzero(as_tuple=True)
        if self.processors.early is None:
            return row, None
        early = self.stops.is_early(self.blocks.position)
        return row, early.repeat(1, query_mask.shape[1] // self.blocks.cells)[row, cell]

    def _run(
        self,
        processors: Mapping[int, tuple[object, ...]],
        logits: Tensor,
        row: Tensor,
        early: Tensor | None,
        batch: Batch,
    ) -> Tensor:
        """A copy of the logits after the processors of some rows. What was banned stays so,
        whatever they return."""
        logits = logits.clone()
        for i, own in processors.items():
            try:
                steps_left = int(batch.limit[i] - self.blocks.step[i])
                cells = (row == i).nonzero()[:, 0]
                process(logits, cells, self._known_tokens(i), own, steps_left)
            except Exception as error:
                batch.failed[i] = error
        return self.processors.ban_again(logits, row, early)

    def _known_tokens(self, row: int) -> list[int]:
        """The tokens of a row so far, in the order of their positions."""
        known = self.blocks.real[row] & ~self.blocks.masked[row]
        done = self.tokens.ids[row, : int(self.tokens.done[row])].tolist()
        in_block: list[int] = self.blocks.ids[row][known].tolist()
        return done + in_block


def _select(view: View, row_mask: Tensor) -> View:
    """The view of the rows marked in a bool [R, 1]; in other rows no cell is masked, filled or
    predicted."""
    subset = (view.query_mask & row_mask)[view.query_mask]
    logits, raw, model = view.select_logits(subset)
    return replace(
        view,
        masked=view.masked & row_mask,
        filled=view.filled & row_mask,
        query_mask=view.query_mask & row_mask,
        logits=logits,
        raw=raw,
        model=model,
        hidden=None if view.hidden is None else view.hidden[subset],
        logit_bounds=None if view.logit_bounds is None else view.logit_bounds.select(subset),
        drafts=None if view.drafts is None else _select(view.drafts, row_mask),
    )


def _log_probs(view: View, commit: Commit) -> Tensor:
    """The model's log-probability of every token that is written now, nats, float32 [R, n], 0
    elsewhere.

    A decoder may give it itself (`Commit.log_prob`) where it used predictions of another canvas.
    For tokens drawn from bounds it is computed later: 0 here, NaN if the state is not finite."""
    if view.logit_bounds is not None:
        if not torch.equal(commit.cells, view.query_mask):
            raise DecoderError(
                "a decoder with `only_draws` did not fill the cells that it planned; fill them all,"
                " or leave `only_draws` out"
            )
        finite = view.logit_bounds.hidden.isfinite().all(1)
        zeros = torch.zeros_like(finite, dtype=torch.float32)
        return _scatter(zeros.masked_fill_(~finite, float("nan")), commit.cells)
    if commit.log_prob is not None:
        return commit.log_prob
    changed = commit.cells if commit.overwrite is None else commit.cells | commit.overwrite
    raw = view.raw
    if changed is not view.query_mask:
        changed = changed & view.query_mask
        raw = raw if bool((changed == view.query_mask).all()) else raw[changed[view.query_mask]]
    return _scatter(log_prob(raw, commit.ids[changed]), changed)


def _scatter(values: Tensor, cells: Tensor) -> Tensor:
    """Values of some cells, float32 [M], at these cells of a [R, n], 0 elsewhere."""
    return torch.zeros_like(cells, dtype=torch.float32).masked_scatter_(cells, values)
