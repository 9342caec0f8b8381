"""The enumerable language: true conditionals against brute force, and what perfect and ignorant
models score."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdlm.core.types import ModelSpec
from bdlm.experiments.language import Language, States, language, scores
from bdlm.models.toy import Inconsistent, JointTable

WORLD = Language.random(letters=5, length=4, states=2, choices=3, exponent=1.0, seed=3)


def test_strings_are_those_of_an_automaton_with_zipf_weights() -> None:
    assert len(WORLD.strings) == 3**4 == len(WORLD.strings.unique(dim=0))
    weights = WORLD.probability.sort(descending=True).values
    torch.testing.assert_close(weights[0] / weights, torch.arange(1, 82, dtype=torch.float64))
    assert float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("block", (1, 2, 4))
@pytest.mark.parametrize("place", range(4))
def test_true_conditionals_by_brute_force(block: int, place: int) -> None:
    states = States.of(WORLD, place, block)
    end = (place // block + 1) * block
    known = [j for j in range(end) if j != place]
    for g in (0, len(states.ids) // 2, len(states.ids) - 1):
        mass = torch.zeros(5, dtype=torch.float64)
        for string, p in zip(WORLD.strings, WORLD.probability, strict=True):
            if all(string[j] == states.ids[g, j] for j in known):
                mass[string[place]] += p
        torch.testing.assert_close(states.truth[g], mass / mass.sum())
        assert float(states.weight[g]) == pytest.approx(float(mass.sum()))
    assert float(states.weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("block", (2, 4))
def test_the_law_itself_has_all_its_mass_on_the_support_and_no_error(block: int) -> None:
    joint = torch.full((5, 5, 5, 5), float("-inf"), dtype=torch.float64)
    joint[tuple(WORLD.strings.T)] = WORLD.probability.log()
    spec = ModelSpec(vocab_size=6, mask_id=5, block_size=block, max_length=4)
    mass, error = scores(
        JointTable(joint, spec), [States.of(WORLD, p, block) for p in range(4)], block
    )
    assert mass == pytest.approx(1.0, abs=1e-9)
    assert error == pytest.approx(0.0, abs=1e-9)


def test_a_uniform_model_gives_each_letter_a_fifth() -> None:
    spec = ModelSpec(vocab_size=6, mask_id=5, block_size=4, max_length=4)
    states = [States.of(WORLD, p, 4) for p in range(4)]
    mass, error = scores(Inconsistent(replace(spec), spread=0.0), states, 4)
    expected = sum(float((s.weight * (s.truth > 0).sum(1)).sum()) for s in states) / 4 / 5
    assert mass == pytest.approx(expected)
    assert error > 0


def test_training_learns_the_support() -> None:
    found = language(
        block_size=3,
        seed=1,
        steps=120,
        every=20,
        letters=4,
        length=3,
        states=2,
        choices=2,
        hidden_dim=16,
        layers=1,
        lr=5e-3,
    )
    curve = found["curve"]
    assert [c["step"] for c in curve] == list(range(0, 121, 20))
    assert curve[-1]["support"] > max(0.9, curve[0]["support"] + 0.2)
    assert found == language(
        block_size=3,
        seed=1,
        steps=120,
        every=20,
        letters=4,
        length=3,
        states=2,
        choices=2,
        hidden_dim=16,
        layers=1,
        lr=5e-3,
    )
