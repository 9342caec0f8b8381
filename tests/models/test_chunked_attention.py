"""Split attention as one operation computes what projection, rotation and attention under the dense
mask do, and their gradients."""

import copy
import random

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.forward import train_logits
from bdlm.core.objectives import total_nats
from bdlm.core.visibility import Cells, Plan, Segment, chunked_plan, join, sees
from bdlm.models import chunked_attention
from bdlm.models.attention import PlanCache, attend, make_plan, rotary_table, rotate
from bdlm.models.chunked_attention import attend_chunked, complex_rotation
from bdlm.models.dit import DiT
from tests.contracts.builders import tiny_dit
from tests.core.test_forward import gradients, noised_for

ROWS, LENGTH, SIZE, HEADS, WIDTH = 2, 12, 4, 2, 8


def two_streams(documents: bool, length: int = LENGTH, size: int = SIZE) -> Cells:
    """Noisy cells, then clean ones; with documents the rows differ, so each has a mask of its
    own."""
    layout = make_layout(Contiguous(size), length).expand(ROWS)
    doc = (torch.arange(LENGTH) >= torch.tensor([[5], [8]])).long() if documents else layout.doc
    noisy = Cells(layout.rank, layout.group, layout.limit, doc)
    return join(noisy, Cells(layout.rank, torch.full_like(layout.group, -1), layout.limit, doc))


def inputs(dtype: torch.dtype = torch.float64, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, dtype=dtype, generator=draw).requires_grad_()
    return make(ROWS, 2 * length, WIDTH), make(3 * WIDTH, WIDTH)


def table(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return rotary_table(torch.arange(LENGTH).repeat(2)[None], WIDTH // HEADS, dtype)


def dense(x: Tensor, weight: Tensor, cells: Cells, count: int) -> Tensor:
    """Compute attention by a softmax over the full mask."""
    return masked(x, weight, sees(cells, cells), count)


def masked(
    x: Tensor,
    weight: Tensor,
    visible: Tensor,
    count: int,
    places: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    places = places or table(x.dtype)
    q, k, v = (x @ weight.T).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, places), rotate(k, places)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible[:, None], float("-inf"))
    return (scores.softmax(-1) @ v)[:, :, :count].transpose(1, 2).flatten(2)


def plan_of(cells: Cells, chunk: int, num_queries: int) -> Plan:
    return chunked_plan(cells, cells, torch.float64, chunk, (LENGTH,)).truncated(num_queries)


CASES = pytest.mark.parametrize(
    ("chunk", "num_queries", "documents"),
    [(64, 24, False), (5, 24, False), (5, 12, False), (5, 24, True)],
    ids=["whole", "chunks", "noisy alone", "documents"],
)


@CASES
def test_it_is_the_dense_form(chunk: int, num_queries: int, documents: bool) -> None:
    (x, weight), cells = inputs(), two_streams(documents)
    ours = attend_chunked(
        x, weight, complex_rotation(table()), plan_of(cells, chunk, num_queries), HEADS
    )
    reference = dense(x, weight, cells, num_queries)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-13)
    slope = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), slope),
        torch.autograd.grad(reference, (x, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_any_runs_of_keys_will_do(seed: int) -> None:
    """Runs that overlap, begin alike or leave cells to nobody: outputs and gradients are those of
    the mask that they make."""
    (x, weight), pick = inputs(), random.Random(seed)
    segments, visible = [], torch.zeros(1, 2 * LENGTH, 2 * LENGTH, dtype=torch.bool)
    for start in range(0, 2 * LENGTH, 6):
        edges = [
            pick.choice((0, 4)),
            *sorted(pick.sample(range(5, 22), 2 * pick.choice((0, 1, 2)) + 1)),
        ]
        runs = tuple(zip(edges[::2], edges[1::2], strict=True))
        segments.append(Segment(start, start + 6, runs, None))
        for a, b in runs:
            visible[:, start : start + 6, a:b] = True
    ours = attend_chunked(x, weight, complex_rotation(table()), Plan(tuple(segments)), HEADS)
    reference = masked(x, weight, visible, 2 * LENGTH)
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-13)
    slope = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), slope),
        torch.autograd.grad(reference, (x, weight), slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_streams_of_many_chunks() -> None:
    """Long enough that a noisy chunk's own keys and the clean ones before it are two runs."""
    cells = two_streams(documents=False, length=96, size=16)
    plan = chunked_plan(cells, cells, torch.float64, 32, (96,))
    assert [len(s.runs) for s in plan.segments] == [2, 2, 1, 1, 1, 1]
    (x, weight), places = (
        inputs(length=96),
        rotary_table(torch.arange(96).repeat(2)[None], WIDTH // HEADS, torch.float64),
    )
    ours, reference = (
        attend_chunked(x, weight, complex_rotation(places), plan, HEADS),
        masked(x, weight, sees(cells, cells), 192, places),
    )
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-13)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (ours, reference)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@CASES
def test_its_gradient_is_the_finite_difference(
    chunk: int, num_queries: int, documents: bool
) -> None:
    plan = plan_of(two_streams(documents), chunk, num_queries)
    assert torch.autograd.gradcheck(
        lambda x, w: attend_chunked(x, w, complex_rotation(table()), plan, HEADS),
        inputs(),
        fast_mode=True,
    )


def test_bfloat16_takes_products_instead() -> None:
    """Under autocast: bfloat16 within, float32 gradients outside, near the float32 form to
    bfloat16's rounding."""
    (x, weight), cells = inputs(torch.float32), two_streams(documents=False)
    weight.data *= 0.3  # scores of a few units, as in a model
    plan = chunked_plan(cells, cells, torch.bfloat16, 5, (LENGTH,))
    with torch.autocast("cpu", torch.bfloat16):
        ours = attend_chunked(x, weight, complex_rotation(table(torch.bfloat16)), plan, HEADS)
    assert ours.dtype == torch.bfloat16
    reference = dense(x, weight, cells, 2 * LENGTH)
    torch.testing.assert_close(
        ours.float(), reference, rtol=0, atol=0.02 * float(reference.detach().abs().max())
    )
    got, reference = (
        torch.autograd.grad(y.float().square().sum(), (x, weight)) for y in (ours, reference)
    )
    for a, b in zip(got, reference, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.04 * float(b.abs().max()))


def test_a_model_trains_alike_with_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of other devices, attention call by attention call, gives the loss and the gradients
    of this one."""
    model: DiT = tiny_dit("bd3lm", 4).double()
    noised = noised_for(model, 4)
    with_split = total_nats(model, noised)
    ours = gradients(model, with_split)
    monkeypatch.setattr(chunked_attention, "supported", lambda _: False)
    without = total_nats(model, noised)
    torch.testing.assert_close(with_split, without, rtol=1e-12, atol=0)
    for a, b in zip(ours, gradients(model, without), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * float(b.abs().max() + 1))


def test_the_last_clean_block_is_left_out_since_nobody_sees_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: DiT = tiny_dit("bd3lm", 4)
    noised, seen = noised_for(model, 4), []
    monkeypatch.setattr(
        model,
        "step",
        lambda step, cache=None: seen.append(step.shape[1]) or DiT.step(model, step, cache),
    )
    train_logits(model, noised)
    assert seen == [16 + 12]


def test_attention_joins_the_heads() -> None:
    q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert attend(q, q, q, None).shape == (2, 5, 12)


def test_a_plan_is_kept_until_the_windows_are_laid_out_differently() -> None:
    last, cells = PlanCache(), two_streams(documents=True)
    make = lambda cells, dtype=torch.float32, breaks=(): last.make(cells, dtype, breaks, flex=False)
    first = make(cells)
    assert make(copy.deepcopy(cells)) is first
    assert make(cells, torch.float64) is not first
    assert make(cells, breaks=(LENGTH,)) is not first
    cells.doc[0, 0] = 7  # in place: what was kept must not follow
    moved, new = make(cells), make_plan(cells, cells, torch.float32)
    assert not torch.equal(moved.segments[0].mask, first.segments[0].mask)
    assert torch.equal(moved.segments[0].mask, new.segments[0].mask)
    assert copy.deepcopy(last)._last is None
    with torch.inference_mode():
        inside = make(cells)
    assert inside is not moved
    assert not make(cells).segments[0].mask.is_inference()
