"""What every denoiser promises, over all of `BUILDERS`: the cached pass computes the training pass,
and nobody sees what they must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bdlm.core import forward
from bdlm.core.types import NOWHERE, Cache, Canvas, Layout, NoisedBatch
from tests.contracts.builders import BUILDERS, Built

ROWS = 3


@pytest.fixture(params=BUILDERS)
def built(request: pytest.FixtureRequest) -> Built:
    torch.manual_seed(0)
    return BUILDERS[request.param]()


def windows(
    built: Built, rows: int = ROWS, doc: Tensor | None = None, seed: int = 0
) -> NoisedBatch:
    """Random windows, about two thirds of the cells masked, never a text's first one; every block
    has a masked cell."""
    spec, generator = built.model.spec, torch.Generator().manual_seed(seed)
    layout = built.layout(doc).expand(rows)
    shape = layout.doc.shape
    clean = torch.randint(0, spec.vocab_size - 1, shape, generator=generator)
    clean += (clean >= spec.mask_id).long()
    opening = layout.position == 0
    masked = (torch.rand(shape, generator=generator) < 0.67) & ~opening
    masked |= (
        layout.block != torch.cat((layout.block[:, 1:], torch.full((rows, 1), -9)), 1)
    ) & ~opening
    if spec.noise == "none":
        masked = ~opening
    held = (
        torch.randint(0, spec.vocab_size - 1, shape, generator=generator)
        if spec.noise == "uniform"
        else torch.full(shape, spec.mask_id)
    )
    time = (torch.rand((rows, 1), generator=generator) * 0.8 + 0.1).expand(shape)
    return NoisedBatch(
        clean, torch.where(masked, held, clean), masked, time, masked.float(), masked, layout
    )


@torch.no_grad()
def trained(built: Built, noised: NoisedBatch, at: Tensor | None = None) -> Tensor:
    """Logits of the training pass, written out: [R, L, V], 0 outside `at`."""
    at = noised.masked if at is None else at
    logits = forward.train_logits(built.model, noised, at).logits
    assert logits is not None
    assert logits.shape == (int(at.sum()), built.model.spec.vocab_size)
    out = torch.zeros(*at.shape, logits.shape[-1], dtype=logits.dtype)
    out[at] = logits
    return out


@dataclass(frozen=True)
class Piece:
    """One block of all rows: which cells, where they stand, as a canvas."""

    cells: Tensor
    where: Layout
    tokens: Tensor
    canvas: Canvas


def pieces(noised: NoisedBatch) -> list[Piece]:
    """The blocks in the order they are written (that of their ids), for layouts that all rows
    share."""
    found = []
    for b in noised.layout.block[0].unique().tolist():
        cells = (noised.layout.block[0] == b).nonzero().flatten()
        layout = Layout(
            *(getattr(noised.layout, name)[:, cells] for name in noised.layout.__dataclass_fields__)
        )
        canvas = Canvas(
            noised.noisy[:, cells], noised.masked[:, cells], layout, None, noised.time[:, cells]
        )
        found.append(Piece(cells, layout, noised.clean[:, cells], canvas))
    return found


def written(
    built: Built, noised: NoisedBatch, cache: Cache, together: bool = False
) -> Iterator[tuple[Piece, Tensor]]:
    """Blocks one after another with the cache: yields each block and the logits of its masked
    cells.

    Shifted models need a committed token before a block, so they take their first block as given.
    together: `advance`, else `extend` and then `predict`. One-stream denoisers have one block."""
    model, blocks = built.model, pieces(noised)
    given = 1 if model.spec.shift or model.spec.noise == "none" else 0
    for i in range(given, len(blocks)):
        piece, canvas = blocks[i], blocks[i].canvas
        if i:
            before = blocks[i - 1]
            canvas = canvas.with_(previous=before.tokens[:, -1])
            if together and i > given:
                out = forward.advance(model, before.tokens, before.where, canvas, cache)
            else:
                forward.extend(model, before.tokens, before.where, cache)
                out = forward.predict(model, canvas, cache)
        else:
            out = forward.predict(model, canvas, cache)
        assert out.logits is not None
        yield piece, out.logits


def near(built: Built, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=built.tolerance, rtol=0)


def test_spec_is_sound(built: Built) -> None:
    spec = built.model.spec
    assert 0 <= spec.mask_id < spec.vocab_size
    assert spec.block_size >= 1
    assert spec.max_length >= built.length
    assert spec.streams == 2 or spec.noise == "none" or spec.block_size >= built.length


@pytest.mark.parametrize("together", (False, True), ids=("extend", "advance"))
@torch.no_grad()
def test_cached_equals_training(built: Built, together: bool) -> None:
    noised = windows(built)
    reference = trained(built, noised)
    cache = built.model.new_cache(ROWS, built.length)
    seen = 0
    for piece, logits in written(built, noised, cache, together):
        near(built, logits, reference[:, piece.cells][piece.canvas.masked])
        seen += 1
    assert seen
    assert cache.nbytes > 0


@torch.no_grad()
def test_predicting_leaves_the_cache_alone(built: Built) -> None:
    noised = windows(built)
    cache = built.model.new_cache(ROWS, built.length)
    *_, last = written(built, noised, cache)
    piece, first = last
    length = cache.slots.length.clone()
    before = pieces(noised)[-2].tokens[:, -1] if len(pieces(noised)) > 1 else None
    again = forward.predict(built.model, piece.canvas.with_(previous=before), cache).logits
    assert bool((cache.slots.length == length).all())
    near(built, again, first)


@torch.no_grad()
def test_later_blocks_change_nothing_before(built: Built) -> None:
    noised = windows(built)
    blocks = pieces(noised)
    if len(blocks) < 2:
        pytest.skip("one block: nothing comes later")
    reference, other = trained(built, noised), windows(built, seed=1)
    for i, piece in enumerate(blocks[:-1]):
        later = torch.cat([p.cells for p in blocks[i + 1 :]])
        clean, noisy = noised.clean.clone(), noised.noisy.clone()
        clean[:, later], noisy[:, later] = other.clean[:, later], other.clean[:, later]
        near(
            built,
            trained(built, replace(noised, clean=clean, noisy=noisy))[:, piece.cells],
            reference[:, piece.cells],
        )
    # and what stands in a block's clean copy is hidden from its own noisy cells (and tells the
    # later ones something)
    if built.model.spec.noise != "none":
        piece, clean = blocks[-1], noised.clean.clone()
        clean[:, piece.cells] = other.clean[:, piece.cells]
        near(built, trained(built, replace(noised, clean=clean)), reference)


@torch.no_grad()
def test_earlier_blocks_are_seen(built: Built) -> None:
    noised = windows(built)
    blocks = pieces(noised)
    if len(blocks) < 2:
        pytest.skip("one block: nothing comes before")
    clean = noised.clean.clone()
    clean[:, blocks[0].cells] = (clean[:, blocks[0].cells] + 1) % (built.model.spec.vocab_size - 1)
    changed = (trained(built, replace(noised, clean=clean)) - trained(built, noised)).abs().amax(-1)
    last = blocks[-1]
    assert bool((changed[:, last.cells][last.canvas.masked] > 10 * built.tolerance).all())


@torch.no_grad()
def test_rows_do_not_touch(built: Built) -> None:
    noised = windows(built)
    reference = trained(built, noised)
    for r in range(ROWS):
        near(built, trained(built, noised.rows(slice(r, r + 1))), reference[r : r + 1])


@torch.no_grad()
def test_only_the_wanted_cells(built: Built) -> None:
    noised = windows(built)
    at = noised.masked & (torch.arange(built.length) % 3 != 1)
    near(built, trained(built, noised, at)[at], trained(built, noised)[at])
    none = torch.zeros_like(at)
    assert forward.train_logits(built.model, noised, none).logits.shape[0] == 0


@torch.no_grad()
def test_documents_do_not_see_each_other(built: Built) -> None:
    half = built.length // 2
    doc = torch.cat(
        (
            torch.full((ROWS, half), 4),
            torch.full((ROWS, built.length - half - 1), 7),
            torch.full((ROWS, 1), NOWHERE),
        ),
        1,
    )
    noised = windows(built, doc=doc)
    masked = noised.masked & (doc != NOWHERE)
    noised = replace(noised, masked=masked)
    reference, other = trained(built, noised), windows(built, doc=doc, seed=1)
    for changed in (doc == 4, doc == 7, doc == NOWHERE):
        clean, noisy = (
            torch.where(changed, getattr(other, n), getattr(noised, n)) for n in ("clean", "noisy")
        )
        result = trained(built, replace(noised, clean=clean, noisy=noisy), masked & ~changed)
        near(built, result[~changed], reference[~changed])
    alone = torch.full((ROWS, built.length - half - 1), 7)
    if alone.shape[1] < 2:
        return
    layout, cells = built.layout(alone).expand(ROWS), slice(half, built.length - 1)
    single = NoisedBatch(
        *(
            getattr(noised, n)[:, cells]
            for n in ("clean", "noisy", "masked", "time", "weight", "scored")
        ),
        layout=layout,
    )
    near(built, trained(built, single), reference[:, cells])


@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(built: Built) -> None:
    """Row 0 has all earlier blocks committed, row 1 the first one only; each predicts its own next
    block as it does alone."""
    spec = built.model.spec
    noised = windows(built, rows=2)
    blocks = pieces(noised)
    if len(blocks) < 3 or (spec.block_size > 1 and len({p.cells.numel() for p in blocks}) > 1):
        pytest.skip("needs three blocks of one size")
    cache = built.model.new_cache(2, built.length)
    for piece in blocks[:-1]:
        doc = piece.where.doc.clone()
        if piece is not blocks[0]:
            doc[1] = NOWHERE
        forward.extend(built.model, piece.tokens, replace(piece.where, doc=doc), cache)
    assert cache.slots.length.tolist() == [
        sum(len(p.cells) for p in blocks[:-1]),
        len(blocks[0].cells),
    ]
    mixed = [blocks[-1], blocks[1]]
    stack = lambda get: torch.stack([get(p)[r] for r, p in enumerate(mixed)])
    layout = Layout(
        *(
            stack(lambda p, n=name: getattr(p.where, n))
            for name in noised.layout.__dataclass_fields__
        )
    )
    previous = torch.stack([blocks[-2].tokens[0, -1], blocks[0].tokens[1, -1]])
    canvas = Canvas(
        stack(lambda p: p.canvas.ids),
        stack(lambda p: p.canvas.masked),
        layout,
        previous,
        stack(lambda p: p.canvas.time),
    )
    reference = trained(built, noised)
    expected = torch.cat([reference[r, p.cells][p.canvas.masked[r]] for r, p in enumerate(mixed)])
    near(built, forward.predict(built.model, canvas, cache).logits, expected)
