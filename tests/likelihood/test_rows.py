"""What is scored: every form of windows alike, tails, given cells, whole documents, sliding
windows, units, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdlm.core.blockmap import Contiguous
from bdlm.core.errors import ConfigError, DataError
from bdlm.core.types import NOWHERE
from bdlm.data.loader import batches
from bdlm.data.packing import Packing, Windows, pack
from bdlm.data.tokenizers import ByteTokenizer
from bdlm.likelihood.bound import evaluate
from bdlm.likelihood.rows import (
    ENOUGH,
    Rows,
    arranged,
    continuations,
    rows_of,
    sliding,
    stride_of,
    whole_documents,
)
from bdlm.models.toy import Inconsistent, toy_spec

METHODS = ("nelbo-exact", "exact", "k-orders", "nelbo")


def world(block_size: int = 4) -> Inconsistent:
    """Conditionals that depend on everything a cell sees: any cell too many in view changes the
    figure."""
    return Inconsistent(toy_spec(block_size, 16))


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(seed))


def packed(
    document_mask: bool = False,
    documents: tuple[str, ...] = ("a short one", "and a longer document", "end"),
) -> Windows:
    return pack(documents, ByteTokenizer(), Packing(8, True, False, False, document_mask))


# -- forms -----------------------------------------------------------------------------------------


def test_every_form_of_windows_is_the_same() -> None:
    windows = packed()
    ids, doc = windows.rows(torch.arange(len(windows)))
    forms = {
        "windows": windows,
        "batches": batches(windows, 2),
        "pair": (ids, doc),
        "mapping": {"ids": ids, "doc": doc},
        "single windows": [windows[i] for i in range(len(windows))],
    }
    expected = rows_of(windows)
    for name, form in forms.items():
        found = rows_of(form)
        real = expected.doc != NOWHERE
        assert torch.equal(found.doc, expected.doc), name
        assert torch.equal(found.scored, expected.scored), name
        assert torch.equal(found.ids[real], expected.ids[real]), name


def test_a_tensor_is_rows_of_one_document_each() -> None:
    rows = rows_of(torch.stack([text(6), text(6, 1)]))
    assert rows.tokens == 10
    assert not bool(rows.scored[:, 0].any())
    assert rows_of([text(4), text(6)]).tokens == 8, "shorter windows are padded"


@pytest.mark.parametrize("form", [3.5, "a text", {"x": 1}])
def test_what_holds_no_windows_is_refused(form: object) -> None:
    with pytest.raises(DataError, match="give packed windows or a tensor"):
        rows_of(form)
    with pytest.raises(DataError, match="shape"):
        rows_of((torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)))


# -- tails and given cells -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_one_tail_convention_for_all_methods(method: str) -> None:
    """A window that ends inside a block scores the same alone, padded, and padded with other ids:
    the last block is a shorter one."""
    ids, doc = text(10)[None], torch.zeros(1, 10, dtype=torch.long)
    long = torch.nn.functional.pad(doc, (0, 6), value=NOWHERE)
    found = [
        evaluate(world(), source, method=method, seed=3)
        for source in (
            ids,
            (torch.nn.functional.pad(ids, (0, 6)), long),
            (torch.nn.functional.pad(ids, (0, 6), value=2), long),
        )
    ]
    assert found[0].tokens == 9
    for other in found[1:]:
        assert other.nats_per_token == pytest.approx(found[0].nats_per_token, abs=1e-12)
        assert other.tokens == 9


@pytest.mark.parametrize("method", METHODS)
def test_padding_of_a_neighbour_changes_nothing(method: str) -> None:
    """Rows of other lengths in one batch: each row's nats are those it has alone (its noise is
    keyed by its number)."""
    one, two = text(10), text(16, 1)
    together = evaluate(world(), [one, two], method=method, positions=16, unit="window")
    alone = evaluate(world(), [one], method=method)
    other = evaluate(world(), [one, two], method=method, batch_size=1)
    assert together.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-12)
    if method in ("nelbo-exact", "exact"):
        last = evaluate(world(), [two], method=method)
        assert together.nats_per_token * 24 == pytest.approx(
            alone.nats_per_token * 9 + last.nats_per_token * 15, abs=1e-9
        )


def test_masked_documents_score_as_if_alone() -> None:
    ids, doc = text(12)[None], torch.tensor([[0] * 5 + [1] * 7])
    both = evaluate(world(), (ids, doc), method="exact")
    first, second = (
        evaluate(world(), ids[:, part], method="exact") for part in (slice(0, 5), slice(5, 12))
    )
    assert both.tokens == 4 + 6
    assert both.nats_per_token * 10 == pytest.approx(
        first.nats_per_token * 4 + second.nats_per_token * 6, abs=1e-10
    )


def split_at(ids: Tensor, given: int) -> Rows:
    """One text of which the first `known_tokens` cells are given."""
    rows = rows_of(ids[None])
    scored = torch.arange(len(ids))[None] >= max(given, 1)
    return Rows(rows.ids, rows.doc, scored, rows.unit, rows.start)


@pytest.mark.parametrize("method", ["nelbo-exact", "exact"])
def test_chain_rule_holds_at_block_borders(method: str) -> None:
    """-log p(text) = -log p(head) - log p(tail | head) where the head ends with a block; inside a
    block it need not hold."""
    ids = text(12)
    nats = lambda rows: (
        (report := evaluate(world(), rows, method=method)).nats_per_token * report.tokens
    )
    whole = nats(ids[None])
    for border in (4, 8):
        assert nats(ids[None, :border]) + nats(split_at(ids, border)) == pytest.approx(
            whole, abs=1e-10
        )
    assert abs(nats(ids[None, :6]) + nats(split_at(ids, 6)) - whole) > 1e-3


def test_a_prompt_inside_a_block_is_a_law_over_its_continuations() -> None:
    """The likelihoods of all ways to fill a block from given cells sum to one."""
    head = text(6)
    total = 0.0
    for code in range(9):
        ids = torch.cat((head, torch.tensor([code // 3, code % 3])))
        report = evaluate(world(), split_at(ids, 6), method="exact")
        total += float(torch.tensor(-report.nats_per_token * 2, dtype=torch.float64).exp())
    assert total == pytest.approx(1, abs=1e-12)


# -- documents -------------------------------------------------------------------------------------


def test_whole_documents_score_as_each_alone() -> None:
    documents = [text(n, n).tolist() for n in (3, 16, 9)]
    rows = whole_documents(documents)
    assert (rows.tokens, rows.units, len(rows)) == (2 + 15 + 8, 3, 3)
    together = evaluate(world(), rows, method="exact")
    alone = [evaluate(world(), torch.tensor([d]), method="exact") for d in documents]
    assert together.nats_per_token * 25 == pytest.approx(
        sum(a.nats_per_token * a.tokens for a in alone), abs=1e-10
    )
    assert whole_documents(documents, max_length=4).tokens == 2 + 3 + 3
    assert whole_documents(documents, first_token=1).tokens == 3 + 16 + 9, (
        "behind an opening token every token is scored"
    )


@pytest.mark.parametrize(("window", "stride"), [(8, 7), (8, 4), (8, 3), (16, 1), (5, 2)])
def test_a_sliding_window_scores_every_token_once_with_context(window: int, stride: int) -> None:
    documents = [text(n, n).tolist() for n in (2, 7, 16, 23)]
    rows = sliding(documents, window, stride)
    assert rows.tokens == sum(len(d) - 1 for d in documents)
    place, cell = (
        rows.start[:, None] + torch.arange(rows.length),
        torch.arange(rows.length).expand_as(rows.ids),
    )
    for number, document in enumerate(documents):
        here = rows.scored & (rows.unit == number)
        assert place[here].tolist() == list(range(1, len(document)))
        assert rows.ids[here].tolist() == document[1:]
        assert bool((cell[here] >= torch.minimum(place[here], torch.tensor(window - stride))).all())


def test_a_window_as_long_as_the_document_is_the_whole_document() -> None:
    documents = [text(n, n).tolist() for n in (5, 16)]
    for stride in (4, 15):
        one, other = (
            evaluate(world(), rows, method="exact")
            for rows in (sliding(documents, 16, stride), whole_documents(documents))
        )
        assert one.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-12)


def test_views_of_packed_data() -> None:
    windows = packed()
    assert arranged(windows, "packed") is windows
    whole, slid = arranged(windows, "documents"), arranged(windows, "sliding", 4)
    assert isinstance(whole, Rows)
    assert isinstance(slid, Rows)
    assert whole.units == slid.units == 3
    assert whole.tokens == slid.tokens == windows.tokens - 3
    assert slid.length == 8
    assert whole.length == len("and a longer document") + 1
    opened = arranged(windows, "documents", first_token=256)
    assert isinstance(opened, Rows)
    assert opened.tokens == windows.tokens
    with pytest.raises(ConfigError, match="did you mean 'sliding'"):
        arranged(windows, "slding")


def test_documents_cut_at_a_place_score_the_same_cells_in_both_views() -> None:
    windows = packed(documents=("a document that is longer than a few windows", "short"))
    whole, slid = (
        arranged(windows, view, first_token=256, most=20) for view in ("documents", "sliding")
    )
    assert isinstance(whole, Rows)
    assert isinstance(slid, Rows)
    assert whole.length == 20, "the opening token counts as a cell and is given"
    assert whole.tokens == slid.tokens == 19 + 6, "the opening token counts as a cell and is given"
    for view, most in (("packed", 20), ("sliding", 1)):
        with pytest.raises(ConfigError, match=f"document_tokens is {most}"):
            arranged(windows, view, most=most)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8)])
def test_windows_that_cannot_slide_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        sliding([[0, 1, 2]], window, stride)


# -- how much, and over what -----------------------------------------------------------------------


def test_max_tokens_keeps_leading_rows() -> None:
    ids = torch.stack([text(6, i) for i in range(5)])
    assert rows_of(ids, max_tokens=11).tokens == 15
    assert rows_of(ids, max_tokens=10).tokens == 10 == rows_of(iter(ids), 10).tokens
    assert rows_of(ids, max_tokens=10_000).tokens == 25
    assert rows_of(rows_of(ids), max_tokens=1).tokens == 5
    doc = torch.arange(6).expand(5, 6) // 2  # three documents a window: three scored cells
    assert (
        rows_of(((i[None], d[None]) for i, d in zip(ids, doc, strict=True)), max_tokens=7).tokens
        == 9
    )
    with pytest.raises(ConfigError, match="max_tokens"):
        rows_of(ids, max_tokens=0)


def test_units_are_documents_where_there_are_enough() -> None:
    few, many = packed(), packed(documents=("some text", "more text") * (ENOUGH // 2))
    assert (rows_of(few).kind, rows_of(few).units) == ("window", len(few))
    found = rows_of(many)
    assert (found.kind, found.units) == (
        "document",
        ENOUGH,
    ), "documents are known across windows, masked or not"
    assert rows_of(few, unit="document").units == 3
    assert rows_of(many, unit="window").units == len(many)
    with pytest.raises(ConfigError, match="did you mean 'document'"):
        rows_of(few, unit="documents")


def test_documents_that_go_on_in_the_next_window_stay_one_unit() -> None:
    rows = rows_of(packed(document_mask=True), unit="document")
    lengths = [len("a short one") + 1, len("and a longer document") + 1, len("end") + 1]
    cells = [int((rows.unit[rows.doc != NOWHERE] == n).sum()) for n in range(3)]
    starts = [0, lengths[0], sum(lengths[:2])]
    assert sum(cells) == sum(lengths)
    flat, place = (
        rows.unit[rows.scored],
        (torch.arange(rows.ids.numel()).view_as(rows.ids))[rows.scored],
    )
    assert flat.tolist() == [sum(int(p) >= s for s in starts) - 1 for p in place]


# -- refusals --------------------------------------------------------------------------------------


def test_too_short_texts_name_the_fix() -> None:
    with pytest.raises(DataError, match=r"document 1 has fewer than two tokens .* first_token"):
        whole_documents([[0, 1], [2]])
    with pytest.raises(DataError, match="fewer than two tokens"):
        sliding([[]], 8, 4)
    with pytest.raises(DataError, match="every document is shorter than two tokens"):
        rows_of(torch.zeros(3, 1, dtype=torch.long))
    for nothing in ([], whole_documents):
        with pytest.raises(DataError, match="no text to score"):
            rows_of([]) if nothing == [] else whole_documents([])


def test_another_tokenizers_tokens_are_refused() -> None:
    with pytest.raises(DataError, match=r"token id 7 .* vocabulary of 4; use the tokenizer"):
        evaluate(world(), torch.tensor([[0, 7, 1]]))
    with pytest.raises(DataError, match="token id -1"):
        evaluate(world(), torch.tensor([[0, -1, 1]]))
    with pytest.raises(DataError, match="mask token"):
        evaluate(world(), torch.tensor([[0, 3, 1]]))


def test_layouts_are_shared_where_rows_agree() -> None:
    assert rows_of(torch.stack([text(6), text(6, 1)])).layout(Contiguous(2)).rank.shape[0] == 1
    assert rows_of([text(4), text(6)]).layout(Contiguous(2)).rank.shape[0] == 2


# -- continuations ---------------------------------------------------------------------------------


def test_continuations_are_scored_given_their_contexts() -> None:
    """Where contexts end with a block: -log p(continuation | context) = -log p(both) + log
    p(context); cut on the left to fit."""
    long, short = text(12).tolist(), text(7, 1).tolist()
    pairs = [(long[:8], long[8:]), (short[:4], short[4:])]
    report = evaluate(world(), continuations(pairs), method="exact", unit="document")
    assert report.unit_tokens == (4, 3)
    nats = lambda ids: (
        (r := evaluate(world(), torch.tensor([ids]), method="exact")).nats_per_token * r.tokens
    )
    expected = [nats(long) - nats(long[:8]), nats(short) - nats(short[:4])]
    assert list(report.unit_nats) == pytest.approx(expected, abs=1e-10)
    cut = evaluate(world(), continuations(pairs, max_length=8), method="exact", unit="document")
    assert cut.unit_nats[1] == pytest.approx(expected[1], abs=1e-10)
    assert cut.unit_nats[0] == pytest.approx(nats(long[4:]) - nats(long[4:8]), abs=1e-10)


def test_continuations_that_cannot_be_scored_are_named() -> None:
    assert continuations([([], [0, 1])]).tokens == 1
    with pytest.raises(DataError, match="nothing of pair 1"):
        continuations([([0], [1]), ([], [1])])
    with pytest.raises(DataError, match="pair 0 has 5 tokens, too many for windows of 5"):
        continuations([([0], [1] * 5)], max_length=5)
    with pytest.raises(DataError, match="no pair"):
        continuations([])


@pytest.mark.parametrize(
    ("window", "size", "kept"),
    [(256, 8, 128), (20, 8, 8), (16, 16, 8), (6, 4, 3), (7, 2, 2), (2, 1, 1)],
)
def test_a_window_keeps_about_half_and_whole_blocks(window: int, size: int, kept: int) -> None:
    assert window - stride_of(window, size) == kept
    sliding([text(50).tolist()], window, stride_of(window, size))


@pytest.mark.parametrize("method", ["nelbo", "k-orders"])
def test_keyed_windows_have_noise_of_their_own(method: str) -> None:
    """A window's figure is the same alone, in any place and batch; of another key it is another."""
    pairs = [
        ([0, 1, 2], [1, 0, 2, 1, 1]),
        ([1], [2, 0, 1]),
        ([0, 1, 2], [1, 0, 2, 1, 1]),
        ([2, 2, 0, 1], [0, 0, 1, 2, 1, 0]),
    ]
    keys = torch.tensor([-5, 2**40, -5, 7])
    how = {"method": method, "replicates": 2, "orders": 2, "unit": "document"}
    alone = [
        evaluate(world(), continuations([pair]), keys=keys[i : i + 1], **how).unit_nats[0]
        for i, pair in enumerate(pairs)
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        for rows in (1, 3):
            found = evaluate(
                world(),
                continuations([pairs[i] for i in order]),
                keys=keys[order],
                batch_size=rows,
                **how,
            )
            assert found.unit_nats == pytest.approx([alone[i] for i in order], abs=1e-6)
    assert (
        alone[0]
        == alone[2]
        != evaluate(world(), continuations(pairs[:1]), keys=keys[3:], **how).unit_nats[0]
    )
    with pytest.raises(
        ConfigError, match=r"keys has the shape \(3,\); give one for each of the 4 windows"
    ):
        evaluate(world(), continuations(pairs), keys=keys[:3], **how)
