"""The samplers' distributions against distributions enumerated from tables of probabilities
(chi-square, false alarm 1e-6 each)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from bdlm.core.schedules import SCHEDULES, schedule_of
from bdlm.generation.engine.engine import generate
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.toy import JointTable, toy_spec
from tests.generation.worlds import (
    FALSE_ALARM,
    conditional,
    counted,
    grid_distribution,
    hitting_distribution,
    p_value,
    text_distribution,
)

SAMPLES = 4_000


def texts(model, prompt, params, rows=SAMPLES):
    return [
        [*prompt, *r.token_ids] for r in generate(model, [prompt] * rows, params, max_num_seqs=500)
    ]


WORLDS = {
    "blocks": toy_spec(2),
    "one_block": replace(toy_spec(4), streams=1),
    "causal_context": replace(toy_spec(2), context="causal"),
    "score": replace(toy_spec(4), prediction="log_score", time_conditioned=True, streams=1),
    "autoregressive": replace(toy_spec(1), noise="none", shift=True, context="causal", streams=1),
}


@pytest.mark.parametrize("name", WORLDS)
def test_first_hitting_samples_the_joint_distribution(name):
    table = JointTable.random(WORLDS[name], seed=3)
    distribution = text_distribution(table, [1])
    counts, probs = counted(texts(table, [1], SamplingParams(max_new_tokens=3)), distribution)
    assert p_value(counts, probs) > FALSE_ALARM


def test_first_hitting_samples_the_law_of_a_shifted_model():
    """Its logits stand one cell to the left: a block's first cell is predicted by the committed
    token before it, which sees no block."""
    table = JointTable.random(replace(toy_spec(2), shift=True), seed=3)

    def seen(known, place):
        return conditional(table, {i: t for i, t in known.items() if i < place or place % 2}, place)

    distribution = hitting_distribution([1], [[0, 1], [2, 3]], seen)
    counts, probs = counted(texts(table, [1], SamplingParams(max_new_tokens=3)), distribution)
    assert p_value(counts, probs) > FALSE_ALARM
    assert p_value(counts, counted([], text_distribution(table, [1]))[1]) < FALSE_ALARM


def test_the_enumerated_law_of_random_orders_is_the_joint_law_where_conditionals_agree():
    table = JointTable.random(toy_spec(2), seed=3)
    distribution, exact = (
        hitting_distribution(
            [1], [[0, 1], [2, 3]], lambda known, place: conditional(table, known, place)
        ),
        text_distribution(table, [1]),
    )
    assert all(abs(distribution[t] - exact[t]) < 1e-12 for t in exact)


def test_the_chi_square_test_rejects_a_wrong_distribution():
    table, other = JointTable.random(toy_spec(2), seed=3), JointTable.random(toy_spec(2), seed=4)
    counts, probs = counted(
        texts(table, [1], SamplingParams(max_new_tokens=3)), text_distribution(other, [1])
    )
    assert p_value(counts, probs) < FALSE_ALARM


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [*((name, 2) for name in SCHEDULES), ("linear", 1), ("linear", 4), ("cosine", 4)],
)
def test_ancestral_samples_the_enumerated_law_of_its_steps(schedule, steps):
    table = JointTable.random(toy_spec(2), seed=5)
    p = schedule_of(schedule).mask_prob(1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
    distribution = grid_distribution(table, [2], [[0, 1], [2, 3]], (p[:-1] - p[1:]).tolist())
    params = SamplingParams(
        max_new_tokens=3, decoder="ancestral", options={"steps": steps, "schedule": schedule}
    )
    counts, probs = counted(texts(table, [2], params), distribution)
    assert p_value(counts, probs) > FALSE_ALARM


def test_the_law_of_ancestral_steps_tends_to_the_joint_distribution():
    table = JointTable.random(toy_spec(2), seed=5)
    exact, distance = text_distribution(table, [2]), []
    for steps in (1, 2, 4, 8):
        distribution = grid_distribution(table, [2], [[0, 1], [2, 3]], [1 / steps] * steps)
        distance.append(sum(abs(distribution[t] - exact[t]) for t in exact) / 2)
    assert all(a > b for a, b in itertools.pairwise(distance))
    assert distance[-1] < distance[0] / 4


def test_many_ancestral_steps_write_the_first_hitting_text():
    table = JointTable.random(toy_spec(2), seed=5)
    slow = SamplingParams(max_new_tokens=3, decoder="ancestral", options={"steps": 10**9})
    assert texts(table, [2], slow, 500) == texts(table, [2], SamplingParams(max_new_tokens=3), 500)


def test_greedy_takes_the_likeliest_token_of_each_cell():
    table = JointTable.random(toy_spec(1), seed=6)
    text = [0]
    for _ in range(3):
        p = (
            table.log_joint[tuple(text)].exp().flatten(1)
            if len(text) < 3
            else table.log_joint[tuple(text)].exp()[:, None]
        )
        text.append(int(p.sum(1).argmax()))
    assert texts(table, [0], SamplingParams(max_new_tokens=3, temperature=0.0), 1) == [text]


def test_temperature_and_nucleus_reshape_the_distribution():
    table = JointTable.random(toy_spec(1), seed=6)
    p = table.log_joint.exp().sum((2, 3))[0]
    p = p / p.sum()
    warm = (p.log() / 0.5).softmax(0)
    counts, probs = counted(
        texts(table, [0], SamplingParams(max_new_tokens=1, temperature=0.5)),
        {(0, t): float(warm[t]) for t in range(3)},
    )
    assert p_value(counts, probs) > FALSE_ALARM
    order = p.argsort(descending=True)
    share = float(p[order[0]]) + 1e-3
    kept = {(0, int(t)): float(p[t] / p[order[:2]].sum()) for t in order[:2]}
    counts, probs = counted(texts(table, [0], SamplingParams(max_new_tokens=1, top_p=share)), kept)
    assert p_value(counts, probs) > FALSE_ALARM
    only = texts(
        table, [0], SamplingParams(max_new_tokens=1, top_p=share, nucleus="reference"), 200
    )
    assert {t[1] for t in only} == {int(order[0])}


def test_log_probs_are_those_of_the_table():
    table = JointTable.random(toy_spec(1), seed=6)
    for result in generate(table, [[1]] * 20, SamplingParams(max_new_tokens=3)):
        total = float(
            table.log_joint[(1, *result.token_ids)] - table.log_joint[1].logsumexp((0, 1, 2))
        )
        assert abs(sum(result.log_probs) - total) < 1e-5
