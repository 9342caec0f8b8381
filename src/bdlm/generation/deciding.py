"""From a call's logits to decisions: what is drawn from, each policy's choice for its own rows, and who fails if a choice breaks.

In: the model's logits of the asked cells. Out: the canvases changed, and the rows that failed. Knows nothing about calls or caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError, ConfigError, DecoderError
from bdlm.core.types import Commit, Out
from bdlm.generation.canvas import Board
from bdlm.generation.joining import Desk
from bdlm.generation.logits import empty, log_prob
from bdlm.generation.policies.base import Policy, Trials, View
from bdlm.generation.shaping import process
from bdlm.generation.trials import split

Failed = dict[int, Exception]
NOT_NUMBERS = "the model's logits are not numbers; its weights may hold NaN or overflow: try another checkpoint, or float32"


@dataclass(frozen=True)
class Group:
    """The rows under one policy. mine: bool [R], None = every row that has a block."""

    policy: Policy
    rows: list[int]
    mine: Tensor | None


def decide(desk: Desk, groups: list[Group], raw: Tensor, wide: Tensor, trials: Trials | None, out: Out, failed: Failed) -> None:
    """The decisions of every group of rows, applied to the board.

    raw: [M, V], the model's logits without the mask token (bounds of them, where `out.rough` says so), of the cells `wide`, bool [R, W]:
    the board's n cells and then those of the trial canvases. out: whatever else the call gave. failed: gets the rows whose policy or
    processors raised, or whose logits are not numbers.
    """
    board = desk.board
    model, cut = _shaping(desk, raw, wide, failed)
    shaped, asked = cut(model, wide), wide[:, : board.cells]
    attention = None if out.attention is None else out.attention[:, : board.cells, : board.cells]
    rough = out.rough
    if rough is not None and not desk.shaper.idle:
        rough = replace(rough, upper=shaped, temperature=desk.shaper.temperature[wide.nonzero(as_tuple=True)[0]])
    view = View(
        board.masked, board.filled, asked, board.ids, shaped, raw, desk.shaper.temperature, board.step, board.keys(), attention,
        mask_id=board.mask_id, hidden=out.hidden, rough=rough, model=model, cut=cut,
    )  # fmt: skip
    if trials is not None:
        view = split(view, trials, wide)
    for group in groups:
        if not _decide(desk, group.policy, view, group.mine, failed):
            for i in group.rows:  # one of them is to blame: let each decide alone
                alone = torch.zeros_like(board.hold)
                alone[i] = True
                _decide(desk, group.policy, view, alone, failed, i)


def state_of(board: Board, policy: Policy) -> dict[str, Tensor]:
    """What policies of this kind wanted to see again."""
    name = f"{type(policy).__name__}."
    return {k.removeprefix(name): v for k, v in board.state.items() if k.startswith(name)}


def _decide(desk: Desk, policy: Policy, view: View, mine: Tensor | None, failed: Failed, row: int | None = None) -> bool:
    """One policy's decision for its rows. Returns False if it raised; with `row`, that row alone has then failed."""
    board, name = desk.board, type(policy).__name__
    view = replace(view, state=state_of(board, policy))
    if mine is not None:
        view = _only(view, mine[:, None])
    try:
        commit = policy.choose(view)
        changed = board.check(commit, view.raw.shape[-1])
        chosen = _chosen(view, commit)
        board.apply(replace(commit, extra={f"{name}.{k}": v for k, v in commit.extra.items()}), chosen, mine, changed)
    except Exception as error:
        if row is not None:
            failed[row] = error
        return False
    if view.rough is not None:
        at, cell = commit.cells.nonzero(as_tuple=True)
        desk.owed.note(at, board.position[at, cell], commit.ids[at, cell], view.rough)
    lost = view.impossible(commit, changed)
    if desk.shaper.warpers:
        lost = lost | (changed & view.spread(empty(view.logits), False))
    if bool((chosen.isnan() | lost).any()):
        for i in chosen.isnan().any(1).nonzero()[:, 0].tolist():
            failed.setdefault(i, BdlmError(NOT_NUMBERS))
        for i in lost.any(1).nonzero()[:, 0].tolist():
            failed.setdefault(i, _no_token(desk, view, lost, i))
    return True


def _no_token(desk: Desk, view: View, lost: Tensor, row: int) -> BdlmError:
    """Why a row has no token at the cells `lost`, bool [R, n]."""
    here = torch.zeros_like(lost)
    here[row] = lost[row]
    place = int((desk.board.position[row] - desk.texts.prompt[row])[lost[row]].min())
    model = view.logits if view.model is None else view.model
    if not bool((empty(model) | empty(view.logits))[here[view.asked]].any()):
        return DecoderError(f"the decoder wrote a forbidden token as new token {place}; write tokens whose logits are finite")
    return ConfigError(
        f"no token can be written as new token {place}: forbidden, allowed, min_new_tokens or the processors leave none with a finite "
        "score; forbid fewer, or look at what the processors return"
    )


def _only(view: View, mine: Tensor) -> View:
    """The view of the rows marked in `mine`, bool [R, 1]: the others have nothing masked, filled or asked."""
    subset = (view.asked & mine)[view.asked]
    return replace(
        view,
        masked=view.masked & mine,
        filled=view.filled & mine,
        asked=view.asked & mine,
        **view.lines(subset),
        hidden=None if view.hidden is None else view.hidden[subset],
        rough=None if view.rough is None else view.rough.some(subset),
        tried=None if view.tried is None else _only(view.tried, mine),
    )


def _chosen(view: View, commit: Commit) -> Tensor:
    """The model's own log-probability of the chosen token of every cell that is written now, float32 [R, n], 0 elsewhere.

    A policy may itself say so (`Commit.log_prob`), where it used predictions of another canvas. What was drawn by bounds is owed: 0.
    """
    if view.rough is not None:
        if not torch.equal(commit.cells, view.asked):
            raise DecoderError("a policy that says `only_draws` did not fill the cells that it planned; fill them all, or leave it out")
        finite = view.rough.hidden.isfinite().all(1)
        return _placed(torch.zeros_like(finite, dtype=torch.float32).masked_fill_(~finite, float("nan")), commit.cells)
    if commit.log_prob is not None:
        return commit.log_prob
    changed = commit.cells if commit.overwrite is None else commit.cells | commit.overwrite
    raw = view.raw
    if changed is not view.asked:
        changed = changed & view.asked
        raw = raw if bool((changed == view.asked).all()) else raw[changed[view.asked]]
    return _placed(log_prob(raw, commit.ids[changed]), changed)


def _placed(values: Tensor, cells: Tensor) -> Tensor:
    """Values of some cells, float32 [M], where the cells stand, 0 elsewhere."""
    return torch.zeros_like(cells, dtype=torch.float32).masked_scatter_(cells, values)


def _shaping(desk: Desk, raw: Tensor, wide: Tensor, failed: Failed) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """The model's logits after bans and processors, [M, V], which decoders rank by, and `View.cut`:
    warpers, temperature and filters."""
    shaper = desk.shaper
    if shaper.idle:
        return raw, lambda model, asked: model
    where = _where(desk, wide)

    def cut(model: Tensor, asked: Tensor) -> Tensor:
        row, early = where if asked is wide else _where(desk, asked)
        if shaper.warpers:
            model = _processed(desk, model, row, early, shaper.warpers, failed)
        return shaper.cut(model, row)

    model = shaper.shape(raw, *where)
    return _processed(desk, model, *where, shaper.processors, failed) if shaper.processors else model, cut


def _where(desk: Desk, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Of each asked cell: its row, int64 [M], and whether it stands before its row's floor for stop
    tokens, bool [M]."""
    early = (desk.board.position < desk.stops.floor[:, None]).repeat(1, asked.shape[1] // desk.board.cells)
    row, cell = asked.nonzero(as_tuple=True)
    return row, early[row, cell]


def _processed(
    desk: Desk, logits: Tensor, row: Tensor, early: Tensor, processors: Mapping[int, tuple[object, ...]], failed: Failed
) -> Tensor:
    """A copy of the logits after the processors of some rows. What was banned stays so, whatever
    they return."""
    logits = logits.clone()
    for i, own in processors.items():
        try:
            process(logits, (row == i).nonzero()[:, 0], _known(desk, i), own)
        except Exception as error:
            failed[i] = error
    return desk.shaper.after(logits, row, early)


def _known(desk: Desk, row: int) -> list[int]:
    """The tokens of a row so far, in the order of their places."""
    texts, board = desk.texts, desk.board
    settled = board.real[row] & ~board.masked[row]
    return texts.ids[row, : int(texts.done[row])].tolist() + board.ids[row][settled].tolist()
