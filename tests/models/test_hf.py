"""transformers models as denoisers: the causal map gives the model's own forward, and the cached
passes the two-stream one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.cache_slots import FREE
from bdlm.core.errors import BdlmError, CheckpointError, ConfigError, UnsupportedError
from bdlm.core.forward import advance, extend, layout_at, predict, train_logits
from bdlm.core.types import CLEAN, NOWHERE, Canvas, NoisedBatch, Soft, Step

transformers = pytest.importorskip("transformers")

from bdlm.models.hf import Conventions, HFDenoiser, load_hf  # noqa: E402
from bdlm.models.hf_conventions import FAMILIES, REFUSED, check_family  # noqa: E402
from bdlm.models.model_folder import load  # noqa: E402
from tests.models.tiny_hf import MASK, VOCAB, tiny, tiny_config  # noqa: E402

LENGTH, BLOCK, ROWS = 16, 4, 3
TOLERANCE = 1e-5


BLOCKS = [
    {"mask_id": MASK, "block_size": BLOCK},
    {"mask_id": MASK, "block_size": BLOCK, "shift": True},
    {"mask_id": MASK, "block_size": BLOCK, "context": "causal"},
    {"mask_id": MASK, "block_size": BLOCK, "shift": True, "context": "causal"},
]
IDS = ["plain", "shift", "causal", "shift-causal"]


def noised(model: HFDenoiser, first_free: int = 1) -> NoisedBatch:
    """Random text with random noise; cells before `first_free` stay clean."""
    draw = torch.Generator().manual_seed(1)
    clean = torch.randint(VOCAB - 1, (ROWS, LENGTH), generator=draw)
    masked = torch.rand(ROWS, LENGTH, generator=draw) < 0.6
    masked[:, :first_free] = False
    noisy = torch.where(masked, MASK, clean)
    layout = make_layout(Contiguous(model.spec.block_size), LENGTH, context=model.spec.context)
    ones = torch.ones(ROWS, LENGTH)
    return NoisedBatch(clean, noisy, masked, ones, ones, masked, layout)


def window(batch: NoisedBatch, model: HFDenoiser, start: int, stop: int) -> Canvas:
    """The cells [start, stop) as the block being written."""
    layout = layout_at(
        Contiguous(model.spec.block_size),
        torch.arange(start, stop).expand(ROWS, -1),
        context=model.spec.context,
    )
    previous = batch.clean[:, start - 1] if start else None
    return Canvas(batch.noisy[:, start:stop], batch.masked[:, start:stop], layout, previous)


def answers(batch: NoisedBatch, logits: Tensor | None, start: int, stop: int) -> Tensor:
    """The part of `train_logits` that belongs to the masked cells of [start, stop)."""
    assert logits is not None
    inside = torch.zeros_like(batch.masked)
    inside[:, start:stop] = True
    return logits[inside[batch.masked]]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_causal_map_is_the_models_own_forward(family: str) -> None:
    model = tiny(family, autoregressive=True)
    batch = noised(model)
    everything = torch.ones_like(batch.masked)
    everything[:, 0] = False
    ours = train_logits(model, batch, query_mask=everything).logits
    own = model.model(batch.clean).logits[:, :-1]
    assert ours is not None
    torch.testing.assert_close(ours.view(ROWS, LENGTH - 1, VOCAB), own, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_autoregression_through_the_cache_is_the_models_own_forward(family: str) -> None:
    model = tiny(family, autoregressive=True)
    batch = noised(model)
    own = model.model(batch.clean).logits
    cache = model.new_cache(ROWS, LENGTH)
    extend(model, batch.clean[:, :3], window(batch, model, 0, 3).layout, cache)
    for i in range(3, LENGTH):
        canvas = window(batch, model, i, i + 1)
        every = torch.ones(ROWS, 1, dtype=torch.bool)
        if i % 2:
            logits = predict(model, canvas, cache, query_mask=every).logits
            extend(model, batch.clean[:, i : i + 1], canvas.layout, cache)
        else:
            following = window(batch, model, i + 1, i + 2)
            torch.testing.assert_close(
                predict(model, canvas, cache, query_mask=every).logits,
                own[:, i - 1],
                atol=TOLERANCE,
                rtol=0,
            )
            if i + 1 == LENGTH:
                break
            logits = advance(
                model, batch.clean[:, i : i + 1], canvas.layout, following, cache, query_mask=every
            ).logits
            cache.slots.drop(slice(None), i)  # take the step back; the odd turn makes it again
            extend(model, batch.clean[:, i : i + 1], canvas.layout, cache)
            torch.testing.assert_close(logits, own[:, i], atol=TOLERANCE, rtol=0)
            continue
        torch.testing.assert_close(logits, own[:, i - 1], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own", BLOCKS, ids=IDS)
def test_the_cached_passes_equal_the_two_stream_pass(family: str, own: dict[str, Any]) -> None:
    model = tiny(family, **own)
    batch = noised(model)
    full = train_logits(model, batch).logits
    cache = model.new_cache(ROWS, LENGTH)
    start = BLOCK
    extend(model, batch.clean[:, :BLOCK], window(batch, model, 0, BLOCK).layout, cache)
    while start < LENGTH:
        canvas = window(batch, model, start, start + BLOCK)
        before_pass = cache.nbytes, cache.slots.used
        for _ in range(2):  # twice: a prediction leaves the cache as it was
            logits = predict(model, canvas, cache).logits
            torch.testing.assert_close(
                logits, answers(batch, full, start, start + BLOCK), atol=TOLERANCE, rtol=0
            )
        assert (cache.nbytes, cache.slots.used) == before_pass
        if start + BLOCK < LENGTH:
            following = window(batch, model, start + BLOCK, start + 2 * BLOCK)
            logits = advance(
                model, batch.clean[:, start : start + BLOCK], canvas.layout, following, cache
            ).logits
            torch.testing.assert_close(
                logits,
                answers(batch, full, start + BLOCK, start + 2 * BLOCK),
                atol=TOLERANCE,
                rtol=0,
            )
        start += BLOCK


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_rows_of_different_lengths_do_not_disturb_each_other(family: str) -> None:
    model = tiny(family, mask_id=MASK, block_size=BLOCK)
    batch = noised(model)
    full = train_logits(model, batch).logits
    map, cache = Contiguous(BLOCK), model.new_cache(ROWS, LENGTH)
    lengths = torch.tensor([4, 12, 8])
    position = torch.arange(12).expand(ROWS, -1)
    extend(model, batch.clean[:, :12], layout_at(map, position, position < lengths[:, None]), cache)
    assert cache.slots.length.tolist() == [4, 12, 8]
    place = lengths[:, None] + torch.arange(BLOCK)
    canvas = Canvas(
        batch.noisy.gather(1, place), batch.masked.gather(1, place), layout_at(map, place)
    )
    expected = torch.cat(
        [
            answers(batch.rows(slice(r, r + 1)), _of_row(batch, full, r), n, n + BLOCK)
            for r, n in enumerate([4, 12, 8])
        ]
    )
    torch.testing.assert_close(
        predict(model, canvas, cache).logits, expected, atol=TOLERANCE, rtol=0
    )
    real = torch.tensor([True, False, True])[:, None].expand(-1, BLOCK)  # the full row waits
    done = layout_at(map, place, real)
    nearly = torch.where(real, place + BLOCK, place)
    following = Canvas(
        batch.noisy.gather(1, nearly), batch.masked.gather(1, nearly), layout_at(map, nearly)
    )
    logits = advance(model, batch.clean.gather(1, place), done, following, cache).logits
    starts = [8, 12, 12]
    expected = torch.cat(
        [
            answers(batch.rows(slice(r, r + 1)), _of_row(batch, full, r), n, n + BLOCK)
            for r, n in enumerate(starts)
        ]
    )
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def _of_row(batch: NoisedBatch, logits: Tensor | None, row: int) -> Tensor:
    assert logits is not None
    return logits[batch.masked.nonzero()[:, 0] == row]


@torch.no_grad()
def test_a_slot_can_be_overwritten() -> None:
    model = tiny("llama", mask_id=MASK, block_size=BLOCK)
    batch = noised(model)
    wrong = batch.clean.clone()
    wrong[:, 5] = (wrong[:, 5] + 1) % MASK
    cache, expected = model.new_cache(ROWS, LENGTH), model.new_cache(ROWS, LENGTH)
    for tokens, layout in ((wrong, cache), (batch.clean, expected)):
        extend(model, tokens[:, :4], window(batch, model, 0, 4).layout, layout)
        extend(model, tokens[:, 4:8], window(batch, model, 4, 8).layout, layout)
    canvas = window(batch, model, 8, 12)
    assert not torch.allclose(
        predict(model, canvas, cache).logits, predict(model, canvas, expected).logits, atol=1e-3
    )
    layout = window(batch, model, 4, 8).layout
    clean = {
        "ids": batch.clean[:, 4:8],
        "position": layout.position,
        "rank": layout.rank,
        "group": torch.full_like(layout.rank, CLEAN),
    }
    slots = torch.arange(4, 8).expand(ROWS, -1)
    model.step(Step(**clean, limit=layout.limit, doc=layout.doc, write=slots, num_queries=0), cache)
    assert cache.slots.used == 8
    torch.testing.assert_close(
        predict(model, canvas, cache).logits,
        predict(model, canvas, expected).logits,
        atol=TOLERANCE,
        rtol=0,
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_hidden_attention_and_soft_inputs(family: str) -> None:
    model = tiny(family, mask_id=MASK, block_size=BLOCK)
    batch = noised(model)
    cache = model.new_cache(ROWS, LENGTH)
    extend(model, batch.clean[:, :4], window(batch, model, 0, 4).layout, cache)
    canvas = window(batch, model, 4, 8)
    out = predict(model, canvas, cache, outputs=frozenset({"logits", "hidden", "attention"}))
    plain = predict(model, canvas, cache).logits
    assert out.hidden is not None
    assert out.attention is not None
    torch.testing.assert_close(model.head(out.hidden), out.logits)
    torch.testing.assert_close(out.logits, plain, atol=TOLERANCE, rtol=0)
    assert out.attention.shape == (ROWS, BLOCK, BLOCK), "the rest of it lies on the cache"
    assert bool((out.attention.sum(-1) < 1).all()), "the rest of it lies on the cache"
    one_hot = Soft(
        canvas.ids[..., None].repeat(1, 1, 2),
        torch.tensor([0.25, 0.75]).expand(ROWS, BLOCK, 2),
        keep_norm=True,
    )
    torch.testing.assert_close(
        predict(model, canvas.with_(soft=one_hot), cache).logits, plain, atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
def test_written_cells_may_stand_anywhere_in_a_call() -> None:
    model = tiny("qwen3", mask_id=MASK, block_size=BLOCK)
    batch = noised(model)
    cache, again = model.new_cache(ROWS, LENGTH), model.new_cache(ROWS, LENGTH)
    layout = window(batch, model, 0, 4).layout
    clean = {
        "ids": batch.clean[:, :4],
        "position": layout.position,
        "rank": layout.rank,
        "group": torch.full_like(layout.rank, CLEAN),
    }
    write = torch.tensor([2, NOWHERE, 0, 1]).expand(ROWS, -1)
    step = Step(
        **clean,
        limit=layout.limit,
        doc=layout.doc,
        write=write,
        outputs=frozenset({"logits", "attention"}),
    )
    out = model.step(step, cache)
    straight = model.step(replace(step, write=None))
    torch.testing.assert_close(out.logits, straight.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(out.attention, straight.attention, atol=TOLERANCE, rtol=0)
    assert cache.slots.position[:, :3].tolist() == [[2, 3, 0]] * ROWS
    model.step(replace(step, write=torch.tensor([0, NOWHERE, 1, 2]).expand(ROWS, -1)), again)
    canvas = window(batch, model, 4, 8)
    torch.testing.assert_close(
        predict(model, canvas, cache).logits,
        predict(model, canvas, again).logits,
        atol=TOLERANCE,
        rtol=0,
    )
    with pytest.raises(ConfigError, match="holds 16 cells"):
        model.step(
            replace(step, write=torch.tensor([16, NOWHERE, NOWHERE, NOWHERE]).expand(ROWS, -1)),
            cache,
        )


@torch.no_grad()
def test_a_call_that_raises_between_two_layers_leaves_what_the_cache_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama", mask_id=MASK, block_size=BLOCK)
    batch, cache = noised(model), model.new_cache(ROWS, LENGTH)
    extend(model, batch.clean[:, :BLOCK], window(batch, model, 0, BLOCK).layout, cache)
    canvas, before_pass = window(batch, model, BLOCK, 2 * BLOCK), cache.nbytes
    expected = predict(model, canvas, cache).logits
    with monkeypatch.context() as broken:
        broken.setattr(model.model.model.layers[1], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict(model, canvas, cache)
    assert cache.nbytes > before_pass  # the first layer's keys of the pass
    torch.testing.assert_close(
        predict(model, canvas, cache).logits, expected, atol=TOLERANCE, rtol=0
    )
    assert cache.nbytes == before_pass


@torch.no_grad()
def test_dropping_the_first_slots_equals_a_cache_that_hides_them() -> None:
    model = tiny("llama", mask_id=MASK, block_size=BLOCK)
    batch = noised(model)
    dropped, hidden = model.new_cache(ROWS, LENGTH), model.new_cache(ROWS, LENGTH)
    for cache in (dropped, hidden):
        for start in (0, 4):
            extend(
                model,
                batch.clean[:, start : start + 4],
                window(batch, model, start, start + 4).layout,
                cache,
            )
    dropped.drop_first(4, torch.ones(ROWS, dtype=torch.bool))
    hidden.slots.doc[:, :4] = FREE
    canvas = window(batch, model, 8, 12)
    torch.testing.assert_close(
        predict(model, canvas, dropped).logits,
        predict(model, canvas, hidden).logits,
        atol=TOLERANCE,
        rtol=0,
    )
    assert dropped.slots.used == 4
    assert 2 * dropped.nbytes == hidden.nbytes


def test_gradients_reach_every_weight() -> None:
    model = tiny("qwen3", mask_id=MASK, block_size=BLOCK).train()
    batch = noised(model)
    logits = train_logits(model, batch).logits
    assert logits is not None
    torch.nn.functional.cross_entropy(logits, batch.clean[batch.masked]).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


# -- folders and refusals --------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_keeps_model_and_conventions(family: str, tmp_path: Path) -> None:
    model = tiny(family, mask_id=MASK, block_size=2, shift=True, first_token=0)
    again = load_hf(model.save(tmp_path / "m"))
    assert again.spec == model.spec
    assert again.conventions == model.conventions
    batch = noised(model)
    assert torch.equal(train_logits(again, batch).logits, train_logits(model, batch).logits)
    with pytest.raises(CheckpointError, match="already holds"):
        model.save(tmp_path / "m")
    found, report = load(tmp_path / "m")
    assert found.spec == model.spec
    assert report.kind == family
    assert not report.notes
    with pytest.raises(CheckpointError, match="the tokenizer 9"):
        load(tmp_path / "m", vocabulary=9)
    assert load_hf(tmp_path / "m", Conventions(autoregressive=True)).spec.noise == "none"


def test_partial_and_broken_folders_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny("llama", autoregressive=True).save(tmp_path / "m")
    full = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors, words in [
        ({n: v for n, v in full.items() if n != name}, f"{name} is missing"),
        ({**full, "model.layers.1.extra": torch.ones(2)}, "extra is unexpected"),
        ({**full, name: torch.full_like(full[name], float("nan"))}, "NaN"),
        ({**full, name: torch.ones(3)}, f"{name}.*mismatched"),
    ]:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=words):
            load_hf(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_hf(folder)


@pytest.mark.parametrize("kind", [k for k in REFUSED if k in transformers.CONFIG_MAPPING])
def test_other_families_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=kind):
        check_family(transformers.CONFIG_MAPPING[kind]())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "sliding",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "dynamic",
        ),
    ],
)
def test_what_a_mask_cannot_express_is_refused_in_allowed_families_too(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        check_family(tiny_config(family, **changes))


def test_conventions_that_do_not_fit_are_refused() -> None:
    for own, words in [
        ({}, "mask_id"),
        ({"mask_id": 2, "context": "all"}, "context"),
        ({"mask_id": 2, "block_size": 0}, "block_size"),
    ]:
        with pytest.raises(BdlmError, match=words):
            Conventions(**own)
    with pytest.raises(ConfigError, match="23 embeddings"):
        tiny("llama", mask_id=VOCAB)
