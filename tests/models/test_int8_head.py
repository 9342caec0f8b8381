"""A head in 8 bits never says less than a logit is, draws by it are those of the float logits, and
texts are the same with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core import randomness
from bdlm.core.errors import BdlmError, DecoderError
from bdlm.core.types import Commit
from bdlm.generation.decoders import DECODERS, Decoder, View, make_decoder
from bdlm.generation.decoders.exact import FirstHitting
from bdlm.generation.engine import model_runner
from bdlm.generation.engine.engine import Engine, generate
from bdlm.generation.sampling import logits_filters
from bdlm.generation.sampling import sampler as draws
from bdlm.generation.sampling.noise import CellNoise
from bdlm.generation.sampling_params import RequestOutput, SamplingParams
from bdlm.models import int8_head as screen_module
from bdlm.models.inference import InferenceDiT, fold
from bdlm.models.int8_head import Int8Head
from tests.contracts.builders import randomised, tiny_dit

VOCAB, WIDTH, CELLS = 20_011, 64, 24
DRAWING = [name for name, decoder in DECODERS.items() if decoder.only_draws]


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 8-bit products are not exact and quick, plain ones stand in, so that all the rest is
    tested."""
    if not screen_module.quick_products():
        monkeypatch.setattr(
            torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int(), raising=False
        )
        monkeypatch.setattr(screen_module, "quick_products", lambda: True)


@pytest.mark.skipif(
    not screen_module.quick_products(), reason="this processor has no exact 8-bit products (VNNI)"
)
def test_products_of_8_bits_are_exact() -> None:
    draw = torch.Generator().manual_seed(0)
    for a, b in (((3, 64), (64, 1000)), ((1, 256), (256, 50))):
        left, right = (
            torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8) for shape in (a, b)
        )
        right[:, 0], left[0] = 127, 127
        assert torch.equal(torch._int_mm(left, right).long(), left.long() @ right.long())


def head(spread: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [V, d], bias [V] and states [M, d] whose logits have about this spread."""
    draw = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    weight, bias, hidden = (
        normal(VOCAB, WIDTH) * spread / WIDTH**0.5,
        normal(VOCAB) * 0.1,
        normal(CELLS, WIDTH),
    )
    if kind == "outliers":
        hidden[:, 5] *= 40
        weight[:, 9] *= 20
        weight[7] *= 100
    if kind == "zeros":
        weight[:50], hidden[0] = 0, 0
    if kind == "ends":  # every product of levels is as large as it can be
        weight, hidden = weight.sign() * spread / WIDTH**0.5, hidden.sign()
    return weight, bias, hidden


CASES = pytest.mark.parametrize("kind", ["normal", "outliers", "zeros", "ends"])
SPREADS = pytest.mark.parametrize("spread", [0.05, 3.0, 30.0])


@CASES
@SPREADS
def test_no_logit_is_greater_than_its_bound(spread: float, kind: str) -> None:
    weight, bias, hidden = head(spread, kind)
    rough, logits = (
        Int8Head(weight, bias, VOCAB - 1)(hidden),
        hidden.double() @ weight.double().T + bias,
    )
    over = logits - rough.upper
    assert float((over / (1 + logits.abs())).max()) <= 1e-6  # rounding of the bound itself
    if kind == "normal":
        assert float(-over.mean()) < 0.5 * spread, "a bound that says little is of no use"
    token = torch.arange(CELLS) * 800
    torch.testing.assert_close(
        rough.exact(torch.arange(CELLS), token).double(),
        logits[torch.arange(CELLS), token],
        rtol=1e-5,
        atol=1e-5,
    )


@CASES
@SPREADS
def test_a_draw_by_bounds_is_the_draw(spread: float, kind: str) -> None:
    weight, bias, hidden = head(spread, kind)
    place = torch.arange(CELLS)
    state = draws.token_state(place + 7, place, torch.zeros_like(place))
    logits = hidden.double() @ weight.double().T + bias
    logits[:, VOCAB - 1] = float("-inf")
    rough = Int8Head(weight, bias, VOCAB - 1)(hidden)
    logits_filters.forbid(rough.upper, VOCAB - 1)
    u = randomness.uniform_of(randomness.follow(state[:, None], torch.arange(VOCAB)))
    assert torch.equal(draws.draw_from_bounds(rough, state), (logits - (-u.log()).log()).argmax(-1))
    assert torch.equal(
        draws.draw_from_bounds(rough.select(place == 5), state[5:6]),
        draws.draw_from_bounds(rough, state)[5:6],
    )


def test_cells_that_are_not_numbers_do_not_change_their_neighbours() -> None:
    weight, bias, hidden = head(0.3, "normal")
    place = torch.arange(CELLS)
    state = draws.token_state(place, place, place)
    screen = Int8Head(weight, bias, VOCAB - 1)
    alone = draws.draw_from_bounds(screen(hidden), state)
    hidden[::2] = float("nan")
    assert torch.equal(draws.draw_from_bounds(screen(hidden), state)[1::2], alone[1::2])


def test_many_pairs_are_gathered_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, hidden = head(3.0, "normal")
    screen, token = Int8Head(weight, bias, VOCAB - 1), torch.arange(500)
    cell = token % CELLS
    whole = screen.exact(hidden, cell, token)
    monkeypatch.setattr(screen_module, "PIECE", 64)
    assert torch.equal(screen.exact(hidden, cell, token), whole)


def test_log_probs_leave_out_the_forbidden_token() -> None:
    weight, bias, hidden = head(3.0, "normal")
    token = torch.arange(CELLS) * 800
    logits = hidden @ weight.T + bias
    expected = logits_filters.log_prob(logits_filters.forbid(logits, VOCAB - 1), token)
    torch.testing.assert_close(
        Int8Head(weight, bias, VOCAB - 1).log_probs(hidden, token), expected, rtol=0, atol=1e-4
    )


# -- texts -----------------------------------------------------------------------------------------


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Small heads are screened too; how many cells each use of a screen was for."""
    monkeypatch.setattr(screen_module, "WORTH", 0)
    monkeypatch.setattr(model_runner, "FEW", 100)
    used: list[int] = []
    plain = Int8Head.__call__

    def noted(self: Int8Head, hidden: Tensor) -> Any:
        used.append(len(hidden))
        return plain(self, hidden)

    monkeypatch.setattr(Int8Head, "__call__", noted)
    return used


def model() -> Any:
    return randomised(tiny_dit("bd3lm", length=96), std=0.5)


def texts(
    monkeypatch: pytest.MonkeyPatch, screened: list[int], prompts: list[list[int]], params: Any
) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """With the screen and without."""
    with_it = generate(model(), prompts, params)
    assert screened, "no screen was used"
    count = len(screened)
    with monkeypatch.context() as without:
        without.setattr(screen_module, "WORTH", 1 << 60)
        plain = generate(model(), prompts, params)
    assert len(screened) == count
    return with_it, plain


@pytest.mark.parametrize("name", DRAWING)
def test_texts_and_their_log_probs_are_those_of_the_logits(
    name: str, monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2]]
    mine, theirs = texts(
        monkeypatch, screened, prompts, SamplingParams(max_new_tokens=37, decoder=name, seed=5)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert (a.token_ids, a.finish_reason, a.forward_passes) == (
            b.token_ids,
            b.finish_reason,
            b.forward_passes,
        )
        assert a.log_probs == pytest.approx(b.log_probs, abs=1e-4)
        assert len(a.log_probs) == len(a.token_ids)
        assert all(x < 0 for x in a.log_probs)


def test_temperature_and_bans_are_bounded_too(
    monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    plain = SamplingParams(max_new_tokens=24, seed=1)
    each = [
        plain,
        plain.with_(temperature=0.6),
        plain.with_(temperature=1.7, banned_token_ids=(1, 2, 3)),
        plain.with_(allowed_token_ids=(4, 5)),
    ]
    each.append(plain.with_(stop_token_ids=(3, 4, 5, 6), min_new_tokens=20))
    mine, theirs = texts(monkeypatch, screened, [[1, 2]] * len(each), each)
    assert [r.token_ids for r in mine] == [r.token_ids for r in theirs]
    assert [x for r in mine for x in r.log_probs] == pytest.approx(
        [x for r in theirs for x in r.log_probs], abs=1e-4
    )


def test_decoders_that_look_at_logits_and_parameters_that_change_them_get_them(
    screened: list[int],
) -> None:
    changed = (
        {"decoder": "threshold"},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 4},
        {"guidance_scale": 1.0, "negative_prompt_ids": (2,)},
    )
    for changes in changed:
        generate(model(), [[1, 2]], SamplingParams(max_new_tokens=8, **changes))
    engine = Engine(model(), 2, bitwise=True)
    engine.submit([1, 2], SamplingParams(max_new_tokens=8))
    list(engine.run())
    assert not screened


def test_what_is_owed_outlives_neighbours_that_come_and_go(
    monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    """Rows of different lengths in two slots, one cancelled, one under another decoder: everyone's
    log-probabilities are their own."""

    def run() -> dict[int, tuple[list[int], list[float]]]:
        engine = Engine(model(), 2, capacity=96)
        numbers = [
            engine.submit(
                [1 + i, 2], SamplingParams(max_new_tokens=9 + 8 * i, seed=i, ignore_eos=True)
            )
            for i in range(4)
        ]
        numbers.append(
            engine.submit(
                [3],
                SamplingParams(
                    max_new_tokens=12, seed=9, decoder="fixed-k", options={"k": 2}, ignore_eos=True
                ),
            )
        )
        found, calls = {}, 0
        while engine.busy:
            events = engine.step()
            calls += 1
            if calls == 25:
                events += engine.cancel(numbers[2])
            for event in events:
                if event.result is not None:
                    found[event.request] = event.result
        return {n: (r.token_ids, r.log_probs) for n, r in found.items()}

    mine = run()
    assert screened
    monkeypatch.setattr(screen_module, "WORTH", 1 << 60)
    theirs = run()
    assert mine.keys() == theirs.keys()
    assert len(mine) == 5
    for number in mine:
        assert mine[number][0] == theirs[number][0]
        assert mine[number][1] == pytest.approx(theirs[number][1], abs=1e-4)


@pytest.mark.parametrize(
    ("part", "used"), [("norm_final.weight", True), ("linear.bias", False)], ids=["state", "head"]
)
def test_what_is_not_a_number_ends_the_request(part: str, used: bool, screened: list[int]) -> None:
    """A state is found so after the screen; a head that is not finite is not screened at all."""
    broken = model()
    with torch.no_grad():
        broken.backbone.output_layer.get_parameter(part)[0] = float("nan")
    with pytest.raises(BdlmError, match="not numbers"):
        generate(broken, [[1, 2]], SamplingParams(max_new_tokens=8))
    assert bool(screened) == used


@dataclass(frozen=True)
class Liar(Decoder):
    """Says that it only draws, and leaves out a cell."""

    only_draws = True

    def choose(self, view: View) -> Commit:
        return Commit(
            view.query_mask & (view.query_mask.long().cumsum(1) == 1), view.drawn(view.query_mask)
        )


def test_a_decoder_that_does_not_keep_its_word_fails_alone(screened: list[int]) -> None:
    engine = Engine(model(), 2, capacity=96)
    number = {
        name: engine.submit([1, 2], SamplingParams(max_new_tokens=8, decoder=name))
        for name in (Liar(), "first-hitting")
    }
    results = {e.request: e for e in engine.run() if e.result is not None}
    assert screened
    assert isinstance(results[number[Liar()]].error, DecoderError)
    assert results[number["first-hitting"]].error is None


def test_another_choice_does_not_inherit_the_word() -> None:
    class Mine(FirstHitting):
        def choose(self, view: View) -> Commit:
            return super().choose(view)

    assert FirstHitting.only_draws
    assert not Mine.only_draws


@pytest.mark.parametrize("name", DRAWING)
def test_a_decoder_that_only_draws_looks_at_nothing_else(name: str) -> None:
    weight, bias, hidden = (t[:9] if i < 2 else t[:2] for i, t in enumerate(head(1.0, "normal")))
    row = lambda *values: torch.tensor([values])
    masked, keys = (
        row(True, False, True, False),
        CellNoise(torch.tensor([3]), row(0, 1, 2, 3), row(0, 0, 0, 0)),
    )
    view = View(
        masked,
        row(False, True, False, True),
        masked,
        row(8, 1, 8, 2),
        logits=None,
        raw=None,
        temperature=torch.ones(1),  # type: ignore[arg-type]
        step=torch.zeros(1),
        noise=keys,
        logit_bounds=Int8Head(weight, bias, 8)(hidden),
    )
    commit = make_decoder(name, {}).choose(view)
    assert torch.equal(commit.cells, masked)
    assert commit.reopen is None
    assert commit.overwrite is None


def test_a_screen_is_made_of_large_heads_only() -> None:
    assert "logit_bounds" not in fold(model()).spec.supports
    folded = fold(randomised(tiny_dit("bd3lm", length=16), std=0.5).double())
    assert isinstance(folded, InferenceDiT)
    assert "logit_bounds" not in folded.spec.supports
