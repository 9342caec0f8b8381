"""From a call's logits to decisions: what is drawn from, each decoder's choice for its own rows,
and who fails if a choice breaks.

In: the model's logits of the asked cells. Out: the canvases changed, and the rows that failed.
Knows nothing about calls or caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.types import Commit, Out
from bdlm.generation.decoders.base import Decoder, DraftCanvases, View
from bdlm.generation.engine.block_state import BlockState
from bdlm.generation.engine.draft_canvases import split
from bdlm.generation.engine.logits_processors import process
from bdlm.generation.engine.scheduler import Scheduler
from bdlm.generation.sampling.sampler import empty, log_prob

Failed = dict[int, Exception]
NOT_NUMBERS = (
    "the model's logits are not numbers; its weights may hold NaN or overflow: try another"
    " checkpoint, or float32"
)


@dataclass(frozen=True)
class Group:
    """The rows under one decoder. mine: bool [R], None = every row that has a block."""

    decoder: Decoder
    rows: list[int]
    mine: Tensor | None


def decide(
    scheduler: Scheduler,
    groups: list[Group],
    raw: Tensor,
    wide: Tensor,
    drafts: DraftCanvases | None,
    out: Out,
    failed: Failed,
) -> None:
    """The decisions of every group of rows, applied to the block_state.

    raw: [M, V], the model's logits without the mask token (bounds of them, where `out.rough` says
    so), of the cells `wide`, bool [R, W]: the block_state's n cells and then those of the draft
    canvases. out: whatever else the call gave. failed: gets the rows whose decoder or processors
    raised, or whose logits are not numbers."""
    block_state = scheduler.block_state
    model, cut = _shaping(scheduler, raw, wide, failed)
    shaped, asked = cut(model, wide), wide[:, : block_state.cells]
    attention = (
        None
        if out.attention is None
        else out.attention[:, : block_state.cells, : block_state.cells]
    )
    bounds = out.logit_bounds
    if bounds is not None and not scheduler.logits_processors.idle:
        bounds = replace(
            bounds,
            upper=shaped,
            temperature=scheduler.logits_processors.temperature[wide.nonzero(as_tuple=True)[0]],
        )
    view = View(
        block_state.masked,
        block_state.filled,
        asked,
        block_state.ids,
        shaped,
        raw,
        scheduler.logits_processors.temperature,
        block_state.step,
        block_state.keys(),
        attention,
        mask_id=block_state.mask_id,
        hidden=out.hidden,
        logit_bounds=bounds,
        model=model,
        cut=cut,
    )
    if drafts is not None:
        view = split(view, drafts, wide)
    for group in groups:
        if not _decide(scheduler, group.decoder, view, group.mine, failed):
            for i in group.rows:  # one of them is to blame: let each decide alone
                alone = torch.zeros_like(block_state.hold)
                alone[i] = True
                _decide(scheduler, group.decoder, view, alone, failed, i)


def state_of(block_state: BlockState, decoder: Decoder) -> dict[str, Tensor]:
    """What decoders of this kind wanted to see again."""
    name = f"{type(decoder).__name__}."
    return {k.removeprefix(name): v for k, v in block_state.state.items() if k.startswith(name)}


def _decide(
    scheduler: Scheduler,
    decoder: Decoder,
    view: View,
    row_mask: Tensor | None,
    failed: Failed,
    row: int | None = None,
) -> bool:
    """One decoder's decision for its rows. Returns False if it raised; with `row`, that row alone
    has then failed."""
    block_state, name = scheduler.block_state, type(decoder).__name__
    view = replace(view, state=state_of(block_state, decoder))
    if row_mask is not None:
        view = _only(view, row_mask[:, None])
    try:
        commit = decoder.choose(view)
        changed = block_state.check(commit, view.raw.shape[-1])
        chosen = _chosen(view, commit)
        block_state.apply(
            replace(commit, extra={f"{name}.{k}": v for k, v in commit.extra.items()}),
            chosen,
            row_mask,
            changed,
        )
    except Exception as error:
        if row is not None:
            failed[row] = error
        return False
    if view.logit_bounds is not None:
        at, cell = commit.cells.nonzero(as_tuple=True)
        scheduler.deferred.note(
            at, block_state.position[at, cell], commit.ids[at, cell], view.logit_bounds
        )
    lost = view.impossible(commit, changed)
    if scheduler.logits_processors.warpers:
        lost = lost | (changed & view.spread(empty(view.logits), False))
    if bool((chosen.isnan() | lost).any()):
        for i in chosen.isnan().any(1).nonzero()[:, 0].tolist():
            failed.setdefault(i, BdlmError(NOT_NUMBERS))
        for i in lost.any(1).nonzero()[:, 0].tolist():
            failed.setdefault(i, _no_token(scheduler, view, lost, i))
    return True


def _no_token(scheduler: Scheduler, view: View, lost: Tensor, row: int) -> BdlmError:
    """Why a row has no token at the cells `lost`, bool [R, n]."""
    here = torch.zeros_like(lost)
    here[row] = lost[row]
    place = int(
        (scheduler.block_state.position[row] - scheduler.buffer.prompt[row])[lost[row]].min()
    )
    model = view.logits if view.model is None else view.model
    if not bool((empty(model) | empty(view.logits))[here[view.query_mask]].any()):
        return DecoderError(
            f"the decoder wrote a forbidden token as new token {place}; write tokens whose logits"
            " are finite"
        )
    return ConfigError(
        f"no token can be written as new token {place}: forbidden, allowed, min_new_tokens or the"
        " processors leave none with a finite score; forbid fewer, or look at what the processors"
        " return"
    )


def _only(view: View, row_mask: Tensor) -> View:
    """The view of the rows marked in `mine`, bool [R, 1]: the others have nothing masked, filled or
    asked."""
    subset = (view.query_mask & row_mask)[view.query_mask]
    return replace(
        view,
        masked=view.masked & row_mask,
        filled=view.filled & row_mask,
        query_mask=view.query_mask & row_mask,
        **view.lines(subset),
        hidden=None if view.hidden is None else view.hidden[subset],
        logit_bounds=None if view.logit_bounds is None else view.logit_bounds.select(subset),
        drafts=None if view.drafts is None else _only(view.drafts, row_mask),
    )


def _chosen(view: View, commit: Commit) -> Tensor:
    """The model's own log-probability of the chosen token of every cell that is written now,
    float32 [R, n], 0 elsewhere.

    A decoder may itself say so (`Commit.log_prob`), where it used predictions of another canvas.
    What was drawn by bounds is deferred: 0."""
    if view.logit_bounds is not None:
        if not torch.equal(commit.cells, view.query_mask):
            raise DecoderError(
                "a decoder that says `only_draws` did not fill the cells that it planned; fill them"
                " all, or leave it out"
            )
        finite = view.logit_bounds.hidden.isfinite().all(1)
        return _placed(
            torch.zeros_like(finite, dtype=torch.float32).masked_fill_(~finite, float("nan")),
            commit.cells,
        )
    if commit.log_prob is not None:
        return commit.log_prob
    changed = commit.cells if commit.overwrite is None else commit.cells | commit.overwrite
    raw = view.raw
    if changed is not view.query_mask:
        changed = changed & view.query_mask
        raw = raw if bool((changed == view.query_mask).all()) else raw[changed[view.query_mask]]
    return _placed(log_prob(raw, commit.ids[changed]), changed)


def _placed(values: Tensor, cells: Tensor) -> Tensor:
    """Values of some cells, float32 [M], where the cells stand, 0 elsewhere."""
    return torch.zeros_like(cells, dtype=torch.float32).masked_scatter_(cells, values)


def _shaping(
    scheduler: Scheduler, raw: Tensor, wide: Tensor, failed: Failed
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The model's logits after bans and processors, [M, V], which decoders rank by, and `View.cut`:
    warpers, temperature and filters."""
    shaper = scheduler.logits_processors
    if shaper.idle:
        return raw, lambda model, asked: model
    where = _where(scheduler, wide)

    def cut(model: Tensor, query_mask: Tensor) -> Tensor:
        row, early = where if query_mask is wide else _where(scheduler, query_mask)
        if shaper.warpers:
            model = _processed(scheduler, model, row, early, shaper.warpers, failed)
        return shaper.cut(model, row)

    model = shaper.shape(raw, *where)
    return (
        _processed(scheduler, model, *where, shaper.custom, failed) if shaper.custom else model
    ), cut


def _where(scheduler: Scheduler, query_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each asked cell: its row, int64 [M], and whether it stands before its row's floor for stop
    tokens, bool [M]."""
    early = (scheduler.block_state.position < scheduler.stops.floor[:, None]).repeat(
        1, query_mask.shape[1] // scheduler.block_state.cells
    )
    row, cell = query_mask.nonzero(as_tuple=True)
    return row, early[row, cell]


def _processed(
    scheduler: Scheduler,
    logits: Tensor,
    row: Tensor,
    early: Tensor,
    processors: Mapping[int, tuple[object, ...]],
    failed: Failed,
) -> Tensor:
    """A copy of the logits after the processors of some rows. What was banned stays so, whatever
    they return."""
    logits = logits.clone()
    for i, own in processors.items():
        try:
            left = int(scheduler.bound[i] - scheduler.block_state.step[i])
            process(logits, (row == i).nonzero()[:, 0], _known(scheduler, i), own, left)
        except Exception as error:
            failed[i] = error
    return scheduler.logits_processors.after(logits, row, early)


def _known(scheduler: Scheduler, row: int) -> list[int]:
    """The tokens of a row so far, in the order of their places."""
    buffer, block_state = scheduler.buffer, scheduler.block_state
    settled = block_state.real[row] & ~block_state.masked[row]
    return (
        buffer.ids[row, : int(buffer.done[row])].tolist() + block_state.ids[row][settled].tolist()
    )
