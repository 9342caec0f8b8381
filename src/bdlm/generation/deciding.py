"""From a call's logits to decisions: what is drawn from, each policy's choice for its own rows, and who fails if a choice breaks.

In: the model's logits of the asked cells. Out: the canvases changed, and the rows that failed. Knows nothing about calls or caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdlm.core.errors import BdlmError
from bdlm.core.types import Commit, Out
from bdlm.generation.canvas import Board
from bdlm.generation.joining import Desk
from bdlm.generation.logits import log_prob
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
    shaped, asked = _shaped(desk, raw, wide, failed), wide[:, : board.cells]
    attention = None if out.attention is None else out.attention[:, : board.cells, : board.cells]
    rough = out.rough
    if rough is not None and not desk.shaper.idle:
        rough = replace(rough, upper=shaped, temperature=desk.shaper.temperature[wide.nonzero(as_tuple=True)[0]])
    view = View(
        board.masked, board.filled, asked, board.ids, shaped, raw, desk.shaper.temperature, board.step, board.keys(), attention,
        mask_id=board.mask_id, hidden=out.hidden, rough=rough,
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
        chosen = _chosen(view, commit)
        board.apply(replace(commit, extra={f"{name}.{k}": v for k, v in commit.extra.items()}), chosen, mine)
    except Exception as error:
        if row is not None:
            failed[row] = error
        return False
    if view.rough is not None:
        at, cell = commit.cells.nonzero(as_tuple=True)
        desk.owed.note(at, board.position[at, cell], commit.ids[at, cell], view.rough)
    broken = chosen.isnan()
    if bool(broken.any()):
        failed.update(dict.fromkeys(broken.any(1).nonzero()[:, 0].tolist(), BdlmError(NOT_NUMBERS)))
    return True


def _only(view: View, mine: Tensor) -> View:
    """The view of the rows marked in `mine`, bool [R, 1]: the others have nothing masked, filled or asked."""
    subset = (view.asked & mine)[view.asked]
    return replace(
        view,
        masked=view.masked & mine,
        filled=view.filled & mine,
        asked=view.asked & mine,
        logits=view.logits[subset],
        raw=view.raw[subset],
        hidden=None if view.hidden is None else view.hidden[subset],
        rough=None if view.rough is None else view.rough.some(subset),
        tried=None if view.tried is None else _only(view.tried, mine),
    )


def _chosen(view: View, commit: Commit) -> Tensor:
    """The model's own log-probability of the chosen token of every cell that is written now, float32 [R, n], 0 elsewhere.

    A policy may itself say so (`Commit.log_prob`), where it used predictions of another canvas. What was drawn by bounds is owed: 0.
    """
    if view.rough is not None:
        assert torch.equal(commit.cells, view.asked), "a policy that only draws did not fill the cells that it planned"
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


def _shaped(desk: Desk, raw: Tensor, asked: Tensor, failed: Failed) -> Tensor:
    """The logits to draw from, [M, V]."""
    shaper, board = desk.shaper, desk.board
    if shaper.idle:
        return raw
    row = asked.nonzero(as_tuple=True)[0]
    early = (board.position < desk.stops.floor[:, None]).repeat(1, asked.shape[1] // board.cells)
    shaped = shaper.shape(raw, row, early[asked])
    if shaper.processors:
        shaped = shaped.clone()
        for i, processors in shaper.processors.items():
            try:
                process(shaped, (row == i).nonzero()[:, 0], _known(desk, i), processors)
            except Exception as error:
                failed[i] = error
    return shaper.cut(shaped, row)


def _known(desk: Desk, row: int) -> list[int]:
    """The tokens of a row so far, in the order of their places."""
    texts, board = desk.texts, desk.board
    settled = board.real[row] & ~board.masked[row]
    return texts.ids[row, : int(texts.done[row])].tolist() + board.ids[row][settled].tolist()
