"""Every decoder's rule on blocks small enough to work out by hand: probabilities in, the cells and
tokens of the decision out."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.types import Commit
from bdlm.generation.decoders import Decoder, View, make_decoder
from bdlm.generation.sampling.noise import CellNoise

MASK = 3
# three tokens; the orders by confidence (1 2 0 3), margin (2 1 3 0) and entropy (1 0 2 3) all
# differ
BLOCK = [[0.5, 0.45, 0.05], [0.6, 0.4, 0.0], [0.55, 0.15, 0.3], [0.45, 0.275, 0.275]]


def see(
    probs: list[list[float]],
    ids: list[int] | None = None,
    state: dict[str, Tensor] | None = None,
    step: int = 0,
    everywhere: bool = False,
    **more: Any,
) -> View:
    """One greedy row. probs: of the three real tokens at each cell. ids: tokens of filled cells,
    MASK where masked."""
    n = len(probs)
    now = torch.tensor([ids or [MASK] * n])
    masked = now == MASK
    query_mask = torch.ones_like(masked) if everywhere else masked
    logits = torch.cat((torch.tensor(probs).log(), torch.full((n, 1), float("-inf"))), 1)[
        query_mask[0]
    ]
    keys = CellNoise(
        torch.zeros(1, dtype=torch.long), torch.arange(n)[None], torch.zeros(1, n, dtype=torch.long)
    )
    steps, greedy = torch.tensor([step]), torch.zeros(1)
    return View(
        masked,
        ~masked,
        query_mask,
        now,
        logits,
        logits,
        greedy,
        steps,
        keys,
        state=state or {},
        mask_id=MASK,
        **more,
    )


def one_sided(confidences: list[float]) -> list[list[float]]:
    """Cells whose best token, 0, has the given probability; the rest lies on token 1."""
    return [[c, 1 - c, 0.0] for c in confidences]


def chosen(commit: Commit) -> list[int]:
    return commit.cells[0].nonzero().flatten().tolist()


def decide(name: str, view: View, **options: Any) -> list[int]:
    return chosen(make_decoder(name, options).choose(view))


# -- ranking the masked cells ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "order"),
    [("confidence", [1, 2, 0, 3]), ("margin", [2, 1, 3, 0]), ("entropy", [1, 0, 2, 3])],
)
def test_fixed_k_takes_the_best_scored_cells(score: str, order: list[int]) -> None:
    for k in range(1, 5):
        assert decide("fixed-k", see(BLOCK), k=k, score=score) == sorted(order[:k])
    assert decide("fixed-k", see(BLOCK, ids=[MASK, 0, MASK, MASK]), k=1, score=score) == [
        next(i for i in order if i != 1)
    ]


def test_fixed_k_at_random_follows_the_order_of_first_hitting() -> None:
    view = see(BLOCK)
    order = view.noise.order()[0].argsort(descending=True).tolist()
    assert decide("fixed-k", view, k=2, score="random") == sorted(order[:2])


def test_a_candidate_is_drawn_and_its_confidence_is_that_of_the_drawn_token() -> None:
    view = replace(see([[0.5, 0.5, 0.0]] * 64), temperature=torch.ones(1))
    commit = make_decoder("fixed-k", {"k": 64}).choose(view)
    assert set(commit.ids[0].tolist()) == {0, 1}
    skewed = replace(see([[0.9, 0.1, 0.0]] * 64), temperature=torch.ones(1))
    sure = make_decoder("threshold", {"tau": 0.5}).choose(skewed)
    assert bool((sure.ids[sure.cells] == 0).all())
    assert 40 < int(sure.cells.sum()) < 64


def test_threshold_takes_what_is_above_it_and_always_the_best() -> None:
    assert decide("threshold", see(BLOCK), tau=0.52) == [1, 2]
    assert decide("threshold", see(BLOCK), tau=0.9) == [1]
    assert decide("threshold", see(BLOCK), tau=0.18, score="margin") == [1, 2]


def test_factor_counts_cells_against_their_doubt() -> None:
    # (n + 1)(1 - c_n) for confidences sorted downwards: 2 x 0.05 = 0.1, 3 x 0.1 = 0.3, 4 x 0.3 =
    # 1.2, 5 x 0.6 = 3
    view = see(one_sided([0.7, 0.95, 0.6, 0.9]))
    view = see([[0.7, 0.3, 0.0], [0.95, 0.05, 0.0], [0.4, 0.3, 0.3], [0.9, 0.1, 0.0]])
    assert decide("factor", view, f=0.05) == [1]
    assert decide("factor", view, f=0.25) == [1]
    assert decide("factor", view, f=1.0) == [1, 3]
    assert decide("factor", view, f=1.3) == [0, 1, 3]
    assert decide("factor", view, f=3.1) == [0, 1, 2, 3]


@pytest.mark.parametrize("doubt", [0.24, 0.26])
def test_factor_breaks_where_the_greedy_joint_choice_does(doubt: float) -> None:
    """Three cells; the text 000 has mass 1 - 3 eps, each text with a single 1 has eps: every cell's
    confidence is 1 - eps, and 000 is the likeliest text exactly while 4 eps < 1."""
    distribution = {
        t: (1 - 3 * doubt, doubt)[sum(t)] for t in itertools.product((0, 1), repeat=3) if sum(t) < 2
    }
    confidence = sum(p for t, p in distribution.items() if t[0] == 0)
    assert confidence == pytest.approx(1 - doubt)
    likeliest = max(distribution, key=lambda t: distribution[t])
    filled = decide("factor", see(one_sided([confidence] * 3)), f=1.0)
    assert (filled == [0, 1, 2]) == (likeliest == (0, 0, 0))


def h(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p)


def test_entropy_bounded_sums_entropies_less_the_greatest() -> None:
    # by entropy: cells 1, 0, 2, 3; the bound of the first n: 0, H1, H1 + H0, H1 + H0 + H2
    bounds = [0.0, h(BLOCK[1]), h(BLOCK[1]) + h(BLOCK[0]), h(BLOCK[1]) + h(BLOCK[0]) + h(BLOCK[2])]
    order = [1, 0, 2, 3]
    for n, bound in enumerate(bounds, 1):
        assert decide("eb", see(BLOCK), gamma=bound + 1e-3) == sorted(order[:n])
    # by confidence: cells 1, 2, 0, 3; the greatest of the first three stands second
    third = h(BLOCK[1]) + h(BLOCK[0])
    assert decide("eb", see(BLOCK), gamma=third - 1e-3, score="confidence") == [1, 2]
    assert decide("eb", see(BLOCK), gamma=third + 1e-3, score="confidence") == [0, 1, 2]
    assert decide("eb", see(one_sided([1.0, 1.0, 1.0])), gamma=0.0) == [0]


def test_localleap_relaxes_near_an_anchor() -> None:
    view = see(one_sided([0.95, 0.8, 0.5, 0.8, 0.5, 0.6]))
    assert decide("localleap", view, radius=2) == [0, 1]
    assert decide("localleap", view, radius=3) == [0, 1, 3]
    assert decide("localleap", view, radius=0) == [0]
    assert decide("localleap", see(one_sided([0.85, 0.8, 0.5]))) == [0]


# -- keeping cells apart ---------------------------------------------------------------------------


def planned(name: str, cells: int, given: tuple[int, ...] = (), **options: Any) -> list[list[int]]:
    """The cells of each forward pass of a decoder that plans by place."""
    decoder, masked, out = make_decoder(name, options), torch.ones(1, cells, dtype=torch.bool), []
    masked[0, list(given)] = False
    while bool(masked.any()):
        now = decoder.plan(masked, see([[1.0, 0.0, 0.0]] * cells).noise)
        assert now is not None
        out.append(now[0].nonzero().flatten().tolist())
        masked = masked & ~now
    return out


def test_dilated_halves_the_distance_from_call_to_call() -> None:
    assert planned("dilated", 8, stride=4) == [[0, 4], [2, 6], [1, 3, 5, 7]]
    assert planned("dilated", 8, stride=8) == [[0], [4], [2, 6], [1, 3, 5, 7]]
    assert planned("dilated", 6, stride=3) == [[0, 3], [1, 2, 4, 5]]
    assert planned("dilated", 8, given=(0, 1, 4), stride=4) == [[2, 6], [3, 5, 7]]
    assert planned("dilated", 5, stride=1) == [[0, 1, 2, 3, 4]]


def test_interleaved_writes_its_strands_side_by_side() -> None:
    assert planned("interleaved", 8, gap=4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert planned("interleaved", 8, gap=3) == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert planned("interleaved", 8, given=(0, 1), gap=4) == [[4], [5], [2, 6], [3, 7]]


def test_spaced_takes_the_best_that_are_apart() -> None:
    view = see(one_sided([0.6, 0.9, 0.85, 0.7, 0.8, 0.75]))
    assert decide("spaced", view, k=1) == [1]
    assert decide("spaced", view, k=2) == [1, 4]
    assert decide("spaced", view, k=6) == [1, 4]  # 3 is beside 4, and 5 too
    assert decide("spaced", view, k=6, gap=4) == [1, 5]
    assert decide("spaced", view, k=3, gap=1) == decide("fixed-k", view, k=3) == [1, 2, 4]


# -- what a distribution was before ----------------------------------------------------------------


def run(decoder: Decoder, passes: list[list[list[float]]]) -> list[list[int]]:
    """Cells of each decision of a block whose predictions are given pass by pass; filled cells keep
    token 0."""
    state: dict[str, Tensor] = {}
    ids, out = [MASK] * len(passes[0]), []
    for step, probs in enumerate(passes):
        commit = decoder.choose(see(probs, ids, state, step))
        state, cells = commit.extra, chosen(commit)
        ids = [int(commit.ids[0, i]) if i in cells else t for i, t in enumerate(ids)]
        out.append(cells)
    return out


def test_klass_waits_for_confident_cells_to_be_stable() -> None:
    still = one_sided([0.99, 0.95, 0.94, 0.93, 0.92, 0.6])
    assert run(make_decoder("klass"), [still] * 3) == [[0], [1], [2, 3, 4]]
    assert run(make_decoder("klass", {"history": 1}), [still] * 2) == [[0], [1, 2, 3, 4]]
    # KL((0.92, 0.08) || (0.97, 0.03)) = 0.92 ln(0.92 / 0.97) + 0.08 ln(0.08 / 0.03) = 0.0298: cell
    # 4 has moved
    moved = one_sided([0.99, 0.95, 0.94, 0.93, 0.97, 0.6])
    assert run(make_decoder("klass"), [moved, still, still]) == [[0], [1], [2, 3]]
    assert run(make_decoder("klass", {"history": 1, "kl": 0.031}), [moved, still])[1] == [
        1,
        2,
        3,
        4,
    ]
    assert run(make_decoder("klass", {"history": 1, "kl": 0.029}), [moved, still])[1] == [1, 2, 3]


def test_klass_measures_under_the_distribution_of_now() -> None:
    # KL(now || before) = 0.0298 and KL(before || now) = 0.0219 for now (0.92, 0.08), before (0.97,
    # 0.03)
    passes = [one_sided([0.99, 0.97]), one_sided([0.99, 0.92])]
    # the best cell, not a stable one
    assert run(make_decoder("klass", {"history": 1, "kl": 0.025}), passes)[1] == [1]
    passes = [one_sided([0.99, 0.97, 0.95]), one_sided([0.99, 0.92, 0.95])]
    assert run(make_decoder("klass", {"history": 1, "kl": 0.025}), passes)[1] == [2]
    assert run(make_decoder("klass", {"history": 1, "kl": 0.035}), passes)[1] == [1, 2]


def test_stability_weighting_damps_scores_by_the_divergence() -> None:
    # KL((0.5, 0.5) || (0.8, 0.2)) = 0.5 ln(0.25 / 0.16) = 0.223; 0.8 exp(-lam 0.223) < 0.7 for lam
    # > 0.598
    passes = [one_sided([0.9, 0.5, 0.7]), one_sided([0.9, 0.8, 0.7])]
    assert run(make_decoder("swd", {"lam": 0.58}), passes) == [[0], [1]]
    assert run(make_decoder("swd", {"lam": 0.62}), passes) == [[0], [2]]
    assert (
        run(make_decoder("swd", {"lam": 0.0}), passes)
        == run(make_decoder("fixed-k"), passes)
        == [[0], [1]]
    )
    assert run(make_decoder("swd", {"lam": 0.62, "tau": 0.65}), passes) == [[0, 2], [1]]


def test_credit_raises_what_has_long_been_best() -> None:
    first, second = one_sided([0.9, 0.6, 0.55]), one_sided([0.9, 0.6, 0.61])
    decoder = make_decoder("credit", {"tau": 0.8})
    state = decoder.choose(see(first)).extra
    credit = state["credit"][0]
    assert credit[1, 0].item() == pytest.approx(0.6**0.2)
    assert credit[1, 1].item() == 0
    again = decoder.choose(see(second, [0, MASK, MASK], state)).extra["credit"][0]
    assert again[1, 0].item() == pytest.approx(0.8 * 0.6**0.2 + 0.6**0.2)
    # a cell's confidence is sigmoid(logit + 0.7 ln(1 + C)) between its two tokens: 0.6 becomes 0.6
    # f / (0.6 f + 0.4), f = (1 + C)^0.7
    factor = (1 + 0.6**0.2) ** 0.7
    raised = 0.6 * factor / (0.6 * factor + 0.4)
    for tau, cells in ((raised - 1e-3, [0, 1]), (raised + 1e-3, [0])):
        assert decide("credit", see(one_sided([0.9, 0.6, 0.55])), tau=tau) == cells


# -- other signals ---------------------------------------------------------------------------------


def test_attention_order_goes_by_the_attention_a_cell_receives() -> None:
    attention = torch.tensor(
        [[[0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.4, 0.1], [0.1, 0.1, 0.6, 0.2], [0.2, 0.2, 0.5, 0.1]]]
    )
    # columns sum to 0.4, 1.0, 1.8, 0.8; their mean is 1
    view = see(one_sided([0.95, 0.95, 0.6, 0.95]), attention=attention)
    assert decide("attention", view, conf=1.0) == [2]
    assert decide("attention", view) == [1, 2]
    # the mean of the masked: 0.733
    left = see(one_sided([0.95, 0.95, 0.6, 0.95]), ids=[MASK, MASK, 0, MASK], attention=attention)
    assert decide("attention", left) == [1, 3]
    assert decide("attention", left, conf=1.0) == [1]


def test_adablock_ends_at_the_surest_delimiter() -> None:
    # token 2 ends; cells 1 and 3 want it
    probs = [[0.5, 0.2, 0.3], [0.2, 0.1, 0.7], [0.6, 0.2, 0.2], [0.1, 0.3, 0.6]]
    decoder = make_decoder("adablock", {"delimiters": (2,), "tau_end": 0.65, "tau": 0.55})
    first = decoder.choose(see(probs))
    assert chosen(first) == [1]
    assert not bool(first.end_block)
    second = decoder.choose(see(probs, [MASK, 2, MASK, MASK], first.extra, 1))
    assert chosen(second) == [0]
    assert bool(second.end_block)
    late = make_decoder("adablock", {"delimiters": (2,), "tau_end": 0.75, "tau": 0.55}).choose(
        see(probs)
    )
    assert chosen(late) == [1, 2, 3]
    assert not bool(late.end_block)


# -- taking back and rewriting ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "eta", "sigma"), [("cap", 0.3, 0.3), ("cap", 0.9, 0.5), ("rescale", 0.6, 0.3)]
)
def test_remdm_reopens_and_releases_at_the_posterior_rates(
    kind: str, eta: float, sigma: float
) -> None:
    # step 2 of 4: alpha_t 0.5, alpha_s 0.75; sigma <= (1 - 0.75) / 0.5 = 0.5; release (0.75 - (1 -
    # sigma) 0.5) / 0.5
    n = 40_000
    view = see([[1.0, 0.0, 0.0]] * n, [MASK, 0] * (n // 2), step=2, everywhere=True)
    commit = make_decoder("remdm", {"steps": 4, "eta": eta, "kind": kind}).choose(view)
    assert commit.reopen is not None
    release = (0.75 - (1 - sigma) * 0.5) / 0.5
    error = 5 * math.sqrt(0.25 / (n / 2))
    assert commit.reopen[0].sum().item() / (n / 2) == pytest.approx(sigma, abs=error)
    assert commit.cells[0].sum().item() / (n / 2) == pytest.approx(release, abs=error)


def test_remdm_keeps_the_masked_share_and_the_law_of_tokens() -> None:
    n, steps = 20_000, 4
    decoder, state, ids = (
        make_decoder("remdm", {"steps": steps, "eta": 0.5, "kind": "rescale"}),
        {},
        [MASK] * n,
    )
    draw = torch.zeros(1, n, dtype=torch.long)
    for step in range(steps):
        view = see([[0.5, 0.3, 0.2]] * n, ids, state, step, everywhere=True)
        view = replace(view, temperature=torch.ones(1), noise=replace(view.noise, draw=draw))
        commit = decoder.choose(view)
        assert commit.reopen is not None
        state, draw = commit.extra, draw + commit.reopen.long()
        now = torch.where(commit.cells, commit.ids, view.ids).masked_fill(commit.reopen, MASK)
        share = (now == MASK).double().mean().item()
        assert share == pytest.approx(1 - (step + 1) / steps, abs=5 * math.sqrt(0.25 / n))
        ids = now[0].tolist()
    assert [ids.count(t) / n for t in range(3)] == pytest.approx(
        [0.5, 0.3, 0.2], abs=5 * math.sqrt(0.25 / n)
    )


def test_remdm_by_confidence_reopens_the_doubtful_and_as_many_in_the_mean() -> None:
    n = 40_000
    state = {"conf": torch.tensor([[0.0, 0.2, 0.0, 0.9] * (n // 4)])}
    view = see([[1.0, 0.0, 0.0]] * n, [MASK, 0] * (n // 2), state=state, step=2, everywhere=True)
    commit = make_decoder("remdm", {"steps": 4, "eta": 0.6, "kind": "conf"}).choose(view)
    assert commit.reopen is not None
    doubtful, sure = (commit.reopen[0, i::4].double().mean().item() for i in (1, 3))
    assert doubtful / sure == pytest.approx(math.exp(0.7), rel=0.1)
    assert (doubtful + sure) / 2 == pytest.approx(0.3, abs=0.02)


def test_wino_fills_boldly_and_masks_again_what_the_rest_does_not_support() -> None:
    decoder, ids = make_decoder("wino"), [0, 1, 0, MASK, MASK, MASK]
    view = see(one_sided([0.5] * 3 + [0.7, 0.65, 0.5]), ids)
    drafts = decoder.draft_canvases(view.masked, view.filled, view.ids, view.noise, {})
    assert drafts is not None
    left_out = [
        [True, False, False, True, True, True],
        [False, True, False, True, True, True],
        [False, False, True, True, True, True],
    ]
    assert drafts.masked[0].tolist() == left_out, (
        "each filled cell is left out of a canvas of its own"
    )
    assert [row.nonzero().flatten().tolist() for row in drafts.query_mask[0]] == [[0], [1], [2]]
    # of tokens 0, 1, 0: 0.3, 0.8, 0.95
    support = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.95, 0.05, 0.0]])
    logits = torch.cat((support.log(), torch.full((3, 1), float("-inf"))), 1)
    drafts = replace(
        view,
        masked=drafts.masked.flatten(1),
        query_mask=drafts.query_mask.flatten(1),
        ids=drafts.ids.flatten(1),
        logits=logits,
        raw=logits,
    )
    commit = decoder.choose(replace(view, drafts=drafts))
    assert commit.reopen is not None
    assert chosen(commit) == [3, 4], "one less than the two just filled, the worst first"
    assert commit.reopen[0].nonzero().flatten().tolist() == [0], (
        "one less than the two just filled, the worst first"
    )
    alone = replace(
        view,
        drafts=replace(drafts, temperature=torch.zeros(1)),
        logits=view.logits[:1].repeat(3, 1),
    )
    single = make_decoder("wino", {"tau_draft": 0.9}).choose(alone)
    assert single.reopen is not None, "every decision is a step forward"
    assert len(chosen(single)) == 1, "every decision is a step forward"
    assert not bool(single.reopen.any()), "every decision is a step forward"


def test_wino_caps_its_drafts() -> None:
    for cells, most in ((4, 4), (8, 5), (20, 14), (40, 20)):
        assert len(decide("wino", see(one_sided([0.7] * cells)))) == most


def test_edit_fills_rewrites_and_goes_on_until_nothing_changes() -> None:
    probs = [[0.92, 0.08, 0.0], [0.88, 0.12, 0.0], [0.97, 0.03, 0.0], [0.6, 0.4, 0.0]]
    decoder = make_decoder("edit")
    commit = decoder.choose(see(probs, [1, 1, MASK, MASK], everywhere=True))
    assert commit.overwrite is not None
    assert commit.hold is not None
    assert chosen(commit) == [2]
    assert commit.overwrite[0].tolist() == [True, False, False, False]
    assert commit.ids[0, 0] == 0
    assert not bool(commit.hold)
    last = decoder.choose(see(probs, [0, 1, 0, MASK], everywhere=True))
    assert chosen(last) == [3], "a full block is looked at again"
    assert bool(last.hold), "a full block is looked at again"
    settled = decoder.choose(see(probs, [0, 1, 0, 0], last.extra, everywhere=True))
    assert not bool(settled.hold)
    assert not bool(settled.overwrite.any())  # type: ignore[union-attr]


def test_edit_stops_after_its_passes() -> None:
    decoder, state, token, passes = make_decoder("edit", {"passes": 3}), {}, 1, 0
    while True:  # each pass wants the other token
        probs = [[0.95, 0.05, 0.0]] if token else [[0.05, 0.95, 0.0]]
        commit = decoder.choose(see(probs, [token], state, everywhere=True))
        state, token, passes = commit.extra, int(commit.ids[0, 0]), passes + 1
        if not bool(commit.hold):
            break
    assert passes == 3


def test_soft_fills_a_prefix_rewrites_and_mixes() -> None:
    probs = [
        [0.3, 0.7, 0.0],
        [0.95, 0.05, 0.0],
        [0.92, 0.08, 0.0],
        [0.5, 0.5, 0.0],
        [0.99, 0.01, 0.0],
    ]
    commit = make_decoder("soft").choose(see(probs, [0, MASK, MASK, MASK, MASK], everywhere=True))
    assert commit.overwrite is not None
    assert commit.soft is not None
    assert commit.hold is not None
    assert chosen(commit) == [1, 2], "the prefix ends at the first doubtful cell"
    assert commit.overwrite[0].tolist() == [True] + [False] * 4
    assert commit.ids[0, 0] == 1
    weight, ids = commit.soft.weight[0], commit.soft.ids[0]
    assert weight[:3, 0].tolist() == pytest.approx([0.7, 0.95, 0.92])
    assert ids[:3, 0].tolist() == [1, 0, 0]
    assert torch.allclose(weight.sum(1), torch.ones(5))
    assert ids[3:, 0].tolist() == [MASK, MASK]
    assert bool((ids[:, 1] == MASK).all())
    assert decide("soft", see(probs[3:], everywhere=True)) == [0], "at least the first masked cell"
    assert decide("soft", see(probs, everywhere=True), tau=0.0) == [0, 1, 2, 3, 4]


def test_soft_ends_a_block_that_is_sure_or_still() -> None:
    sure, unsure = one_sided([0.95, 0.92]), one_sided([0.95, 0.6])
    decoder = make_decoder("soft", {"tau": 0.0})
    assert not bool(decoder.choose(see(sure, everywhere=True)).hold)
    first = decoder.choose(see(unsure, everywhere=True))
    assert bool(first.hold)
    assert not bool(decoder.choose(see(unsure, [0, 0], first.extra, everywhere=True)).hold), (
        "nothing changed"
    )
    assert bool(decoder.choose(see(unsure, [0, 1], first.extra, everywhere=True)).hold), (
        "a cell changed"
    )


def test_left_to_right_and_first_hitting_name_their_cell_beforehand() -> None:
    view = see(BLOCK, [0, MASK, MASK, MASK])
    assert make_decoder("left-to-right").plan(view.masked, view.noise).tolist() == [
        [False, True, False, False]
    ]  # type: ignore[union-attr]
    turn = view.noise.order().masked_fill(~view.masked, -1)[0].argmax()
    planned = make_decoder("first-hitting").plan(view.masked, view.noise)
    assert planned is not None
    assert planned[0].nonzero().flatten().tolist() == [int(turn)]
