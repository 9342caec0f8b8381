"""Approximate caches: exact where they say they are, counted as they work, stale where they must
be, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bdlm.core.errors import BdlmError, ConfigError, UnsupportedError
from bdlm.generation.engine.engine import generate
from bdlm.generation.full_sequence.approximate_cache import (
    CACHES,
    Dual,
    Exact,
    Prefix,
    WindowInputs,
    make_cache,
)
from bdlm.generation.full_sequence.engine import Agreement, agreement, generate_full_sequence
from bdlm.generation.sampling_params import SamplingParams
from bdlm.models.attention import rotary_table
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.layer_reuse import PARTS, ByQuery, FullRefresh, WindowState, Work
from bdlm.models.toy import JointTable, toy_spec
from tests.contracts.builders import randomised, tiny_dit

EXACT_ENDS: list[tuple[str, dict[str, Any]]] = [
    ("none", {}),
    ("prefix", {"refresh": 1}),
    ("dual", {"refresh": 1}),
    ("dllm", {"prompt_every": 1, "every": 1}),
    ("dllm", {"prompt_every": 1, "every": 10**6, "rho": 1.0}),
    ("dare-kv", {"tau": 0.0, "every": 10**6}),
    ("dare-o", {"tau": 0.0, "every": 10**6}),
]
PROMPTS = ([1, 2, 3], [4, 5, 6, 7, 8], [2] * 7)
NEW = 12


def whole(algo: str = "mdlm") -> DiT:
    """A tiny full-sequence transformer in float64 whose cells depend on each other."""
    return randomised(tiny_dit(algo, length=40), std=0.3).double()  # type: ignore[return-value]


def params(**options: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=NEW, seed=3, **options)


@pytest.mark.parametrize("algo", ["mdlm", "sedd"])
@pytest.mark.parametrize(
    ("decoder", "options"),
    [
        ("first-hitting", {}),
        ("threshold", {"tau": 0.4}),
        ("klass", {"conf": 0.3, "kl": 2.0, "history": 1}),
        ("remdm", {"steps": 9, "eta": 0.5}),
    ],
)
def test_without_a_cache_and_in_one_block_it_is_the_engine(
    algo: str, decoder: str, options: dict[str, Any]
) -> None:
    model, own = (
        whole(algo),
        params(decoder=decoder, options=options, temperature=0.8, top_p=0.9, banned_token_ids=(3,)),
    )
    written = generate_full_sequence(model, PROMPTS, own, "none", block=NEW)
    oracle = generate(model, PROMPTS, own)
    assert [w.token_ids for w in written] == [r.token_ids for r in oracle]
    for own, theirs in zip(written, oracle, strict=True):
        assert own.log_probs == pytest.approx(theirs.log_probs, abs=1e-6)
        assert own.forward_passes == theirs.forward_passes


@pytest.mark.parametrize("algo", ["mdlm", "sedd"])
@pytest.mark.parametrize(("cache", "options"), EXACT_ENDS)
def test_the_exact_end_is_the_exact_decoder(algo: str, cache: str, options: dict[str, Any]) -> None:
    model = whole(algo)
    for prompt, own in zip(
        PROMPTS, (params(), params(decoder="threshold", options={"tau": 0.4})), strict=False
    ):
        found = agreement(
            model, [prompt], own.with_(max_new_tokens=11), cache, options=options, block=4
        )
        assert found.tokens == found.drawn == 1.0
        assert found.total_variation < 1e-12
        assert found.kl < 1e-12
        assert found.forward_passes == found.exact_forward_passes
        assert found.share == pytest.approx(1.0)


@pytest.mark.parametrize("cache", [c for c in CACHES if c != "none"])
def test_as_published_it_is_near_and_cheaper_but_not_exact(cache: str) -> None:
    found = agreement(whole(), PROMPTS, params(), cache, block=6)
    assert 0 < found.total_variation < 0.2
    assert found.kl > 0
    assert 0.7 < found.drawn <= 1
    assert found.share < 0.95


@pytest.mark.parametrize("cache", CACHES)
def test_a_text_does_not_depend_on_the_others(cache: str) -> None:
    model, own = whole(), [params().with_(seed=s) for s in (5, 6, 7)]
    together = generate_full_sequence(model, PROMPTS, own, cache, block=6)
    for i in (2, 0):
        assert (
            generate_full_sequence(model, [PROMPTS[i]], [own[i]], cache, block=6)[0].token_ids
            == together[i].token_ids
        )


# -- what is counted -------------------------------------------------------------------------------


def counted(cache: str, block: int, **options: Any) -> dict[str, float]:
    """Cells times layers of each part, per layer, of one text of 3 + 12 cells written one token a
    forward pass."""
    written = generate_full_sequence(
        whole(), [[1, 2, 3]], SamplingParams(max_new_tokens=12), cache, options=options, block=block
    )[0]
    layers = 2 if cache in ("dllm", "dare-kv", "dare-o") else 1
    assert written.work.full == 12 * 15 * layers
    assert written.forward_passes == 12
    return {part: written.work.counts[part] / layers for part in PARTS}


def test_work_of_the_prefix_cache_by_hand() -> None:
    # 3 blocks of 4: one full pass each, then 3 over the block and what follows it: 12, 8, 4
    # cells
    assert counted("prefix", 4) == dict.fromkeys(PARTS, 3 * 15 + 3 * (12 + 8 + 4))


def test_work_of_the_dual_cache_by_hand() -> None:
    assert counted("dual", 4) == dict.fromkeys(PARTS, 3 * (15 + 3 * 4))
    assert counted("dual", 4, refresh=2) == dict.fromkeys(PARTS, 3 * 2 * (15 + 4))


def test_work_of_the_adaptive_cache_by_hand() -> None:
    # passes 0, 4, 8 renew what is written, 0 and 6 the prompt; in the other nine, ceil(0.3 * 12)
    # = 4 cells in full and the values of all
    found = counted("dllm", 4, prompt_every=6, every=4, rho=0.3)
    full = 3 * 12 + 2 * 3 + 9 * 4
    assert found == {**dict.fromkeys(PARTS, full), "value": full + 9 * 8}


@pytest.mark.parametrize(
    ("cache", "kept"), [("dare-kv", ("key", "value")), ("dare-o", ("attention",))]
)
def test_work_of_dare_by_hand(cache: str, kept: tuple[str, ...]) -> None:
    # nothing turns by 2: besides the full passes (0, 5, 10), only the one cell that was
    # filled by the last forward pass; but the first of the two layers computes the attention of all
    found, few = counted(cache, 4, tau=2.0, every=5), 3 * 15 + 9
    assert found == {
        p: (few if cache == "dare-kv" else (few + 12 * 15) / 2) if p in kept else 12 * 15
        for p in PARTS
    }


def test_shares_are_weighted_by_multiply_adds() -> None:
    work = generate_full_sequence(
        whole(),
        [[1, 2, 3]],
        SamplingParams(max_new_tokens=12),
        "dare-kv",
        options={"tau": 2.0, "every": 5},
        block=4,
    )[0].work
    row, kept = 1 + 2 * 15 / 16, (3 * 15 + 9) / (12 * 15)
    assert work.share("key") == pytest.approx(kept)
    assert work.share("mlp") == 1.0
    assert work.share() == pytest.approx((1 + 2 * kept + row + 8) / (3 + row + 8))


# -- what is stale, and what is not ----------------------------------------------------------------


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference between two passes' logits, the mask token's left out."""
    return float((a - b)[:, :-1].abs().max())


def window(ids: torch.Tensor, number: int, start: int = 6, stop: int = 9) -> WindowInputs:
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, start:stop] = True
    return WindowInputs(ids, at, None, 3, start, stop, number, number)


@pytest.mark.parametrize(
    ("cache", "before", "after"),
    [(Prefix(), False, True), (Dual(), False, False), (Exact(), True, True)],
)
def test_cells_outside_the_block_are_seen_as_they_were_at_its_first_call(
    cache: Prefix, before: bool, after: bool
) -> None:
    model, ids = whole(), torch.arange(12)[None] % 10
    with torch.inference_mode():
        for cell, seen in ((1, before), (10, after), (7, True)):
            session = cache.start(model, 12)
            first = session.predict(window(ids, 0))
            assert apart(session.predict(window(ids, 1)), first) < 1e-12
            other = ids.clone()
            other[0, cell] = 9
            moved = apart(session.predict(window(other, 2)), first)
            assert moved > 1e-6 if seen else moved < 1e-12, (
                f"cell {cell} moved the block by {moved}"
            )
            exact = Exact().start(model, 12).predict(window(other, 0))
            assert apart(cache.start(model, 12).predict(window(other, 0)), exact) < 1e-12


def test_dare_computes_a_changed_cell_and_keeps_the_rest() -> None:
    """With a threshold that nothing reaches, keys and values of all but the changed cell are those
    of the last full pass."""
    model, ids = whole(), torch.arange(12)[None] % 10
    other = ids.clone()
    other[0, 1] = 9
    with torch.inference_mode():
        session = make_cache("dare-kv", {"tau": 2.0}).start(model, 12)
        session.predict(window(ids, 0))
        layers: Any = session.memo.layers  # type: ignore[attr-defined]
        before = [(kept.keys.clone(), kept.values.clone()) for kept in layers]
        session.predict(window(other, 1))
        for (keys, values), kept in zip(before, layers, strict=True):
            moved = [
                ((a - b).abs().amax((0, 1, 3)) > 1e-9).nonzero().flatten().tolist()
                for a, b in ((keys, kept.keys), (values, kept.values))
            ]
            assert moved == [[1], [1]]


@pytest.mark.parametrize(("prompt_every", "computed"), [(9, [10]), (1, [0, 1, 2, 10])])
def test_the_adaptive_cache_computes_the_cells_whose_values_turned(
    prompt_every: int, computed: list[int]
) -> None:
    """Of the written cells, the one with another token; of the prompt, all when it is due. The
    layer's change of the others is kept."""
    model, ids = whole(), torch.arange(12)[None] % 10
    other = ids.clone()
    other[0, 10] = 9
    with torch.inference_mode():
        session = make_cache("dllm", {"prompt_every": prompt_every, "every": 9, "rho": 0.1}).start(
            model, 12
        )
        session.predict(window(ids, 0))
        first = session.memo.layers[0]  # type: ignore[attr-defined]
        before = first.change.clone()
        session.predict(window(other, 1))
        assert (
            (first.change - before).abs().amax((0, 2)) > 1e-12
        ).nonzero().flatten().tolist() == computed


def test_dare_measures_the_turn_since_the_last_refresh_and_not_since_the_last_call() -> None:
    model = whole()
    block, kept, cells, work = (
        model.layers[0],
        WindowState(model, 1).layers[0],
        torch.arange(1),
        Work(),
    )
    table = rotary_table(cells[None], model.head_dim, torch.float64)
    x, aside = torch.randn(
        2, 1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    with torch.inference_mode():
        FullRefresh()(block, x, None, table, kept, cells, work)
        first = kept.queries.clone()
        queries = [
            block.qkv(x + 0.1 * n * aside, None, table)[0].transpose(1, 2).flatten(2)[0]
            for n in range(3)
        ]
        once, twice = (1 - torch.cosine_similarity(queries[0], queries[n], dim=-1) for n in (1, 2))
        assert float(once) < float(twice), "two steps must turn the query further than one"
        rule = ByQuery(float(once + twice) / 2, False, torch.zeros(1, dtype=torch.bool))
        rule(block, x + 0.1 * aside, None, table, kept, cells, work)
        assert torch.equal(kept.queries, first)
        rule(block, x + 0.2 * aside, None, table, kept, cells, work)
        assert not torch.equal(kept.queries, first)
    assert [work.counts[part] for part in PARTS] == [3, 2, 2, 3, 3]


def test_dares_outputs_follow_what_is_written() -> None:
    """Were the first layer's attention kept too, no query would ever turn, and the threshold would
    mean nothing."""
    loose, strict = (
        agreement(
            whole(), PROMPTS[:1], params(), "dare-o", options={"tau": tau, "every": 99}, block=6
        )
        for tau in (0.3, 1e-4)
    )
    assert strict.parts["attention"] > loose.parts["attention"] > 0.5
    assert strict.total_variation < loose.total_variation


def test_where_keys_are_tokens_fast_dllms_caches_are_exact() -> None:
    """In a toy world a cell's key is its token, and tokens outside the block do not change while it
    is written."""
    table = JointTable.random(replace(toy_spec(6, 6), streams=1), places=6, seed=2)
    for cache in ("prefix", "dual"):
        found = agreement(
            table, [[1], [0, 2]], SamplingParams(max_new_tokens=4, seed=1), cache, block=2
        )
        assert found.tokens == 1.0
        assert found.total_variation < 1e-12
        assert found.share < 0.8


@pytest.mark.parametrize(
    ("cache", "options"), [("prefix", {}), ("dual", {}), ("dare-kv", {"tau": 2.0, "every": 10**6})]
)
def test_caches_of_keys_and_values_are_exact_with_one_layer(
    cache: str, options: dict[str, Any]
) -> None:
    """The first layer's keys and values of a cell depend on its token alone, so those of unchanged
    cells are never stale."""
    sizes = {"hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "cond_dim": 8}
    model = randomised(
        DiT(DiTConfig(11, 10, model_length=40, algo="mdlm", **sizes)), std=0.5
    ).double()
    found = agreement(model, PROMPTS, params(), cache, options=options, block=6)
    assert found.tokens == 1.0
    assert found.total_variation < 1e-12
    assert found.share < 0.95


# -- ends and refusals -----------------------------------------------------------------------------


def test_a_stop_token_ends_the_text_after_its_block() -> None:
    model = whole()
    full = generate_full_sequence(model, PROMPTS[:1], params(), "dual", block=6)[0]
    token = full.token_ids[7]
    place = full.token_ids.index(token)
    cut = generate_full_sequence(
        model, PROMPTS[:1], params(stop_token_ids=(token,)), "dual", block=6
    )[0]
    assert cut.token_ids == full.token_ids[:place]
    assert cut.finish_reason == "stop_token"
    assert cut.forward_passes == 6 * (place // 6 + 1) < full.forward_passes
    late = generate_full_sequence(
        model, PROMPTS[:1], params(stop_token_ids=(token,), min_new_tokens=NEW), "dual", block=6
    )[0]
    assert token not in late.token_ids
    assert len(late.token_ids) == NEW


class NoCalls:
    """A model of some kind that must not be called."""

    def __init__(self, model: Any) -> None:
        self.spec, self.new_cache = model.spec, model.new_cache

    def step(self, *_: Any) -> None:
        raise AssertionError("a call was made")


@pytest.mark.parametrize(
    ("model", "cache", "options", "more", "message"),
    [
        (lambda: tiny_dit("bd3lm"), "prefix", {}, {}, "full-sequence"),
        (lambda: tiny_dit("ar"), "dual", {}, {}, "full-sequence"),
        (
            lambda: JointTable.random(replace(toy_spec(40, 40), streams=1)),
            "dllm",
            {},
            {},
            "layer_reuse",
        ),
        (
            lambda: JointTable.random(replace(toy_spec(40, 40), streams=1)),
            "dare-o",
            {},
            {},
            "layer_reuse",
        ),
        (whole, "duel", {}, {}, "did you mean 'dual'"),
        (whole, "dual", {"refesh": 1}, {}, "did you mean 'refresh'"),
        (whole, "dual", {"refresh": -1}, {}, "refresh is -1"),
        (whole, "dllm", {"rho": 0.0}, {}, "rho"),
        (whole, "dllm", {"every": 0}, {}, "every"),
        (whole, "dare-kv", {"tau": -0.1}, {}, "tau"),
        (whole, "dual", {}, {"guidance_scale": 1.0}, "guidance_scale"),
        (whole, "dual", {}, {"stop": ("a",)}, "stop"),
        (whole, "dual", {}, {"decoder": "attention"}, "attention"),
        (whole, "dual", {}, {"decoder": "soft"}, "soft"),
        (whole, "dual", {}, {"decoder": "fixed-k", "options": {"k": 7}}, "more than the 6 cells"),
        (whole, "dual", {}, {"max_new_tokens": 400}, "room"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_call(
    model: Any, cache: str, options: Any, more: Any, message: str
) -> None:
    with pytest.raises(BdlmError, match=message) as error:
        generate_full_sequence(
            NoCalls(model()),
            [[1]],
            SamplingParams(**{"max_new_tokens": 8, **more}),
            cache,
            options=options,
            block=6,
        )  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError | UnsupportedError)


def test_numbers_of_an_agreement_are_finite_for_no_texts() -> None:
    assert agreement(whole(), [], params(), "dual") == Agreement(
        0.0, 0.0, 0.0, 0.0, 0.0, dict.fromkeys(PARTS, 0.0), 0.0, 0.0
    )
