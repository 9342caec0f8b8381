"""The account of what a model will see: its figures are those of the windows, and the borders
show."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from bdlm.core.errors import BdlmWarning
from bdlm.data.inspect import inspect, spelt
from bdlm.data.packing import Packing, pack, prepare
from bdlm.data.tokenizers import ByteTokenizer, train_bpe

TEXTS = ["abcdef", "gh", "ijkl"]


def test_figures() -> None:
    tokenizer = ByteTokenizer()
    found = inspect(pack(TEXTS, tokenizer, Packing(4, document_mask=True)), tokenizer, shown=9)
    assert (
        found.documents,
        found.shortest_document,
        found.median_document,
        found.longest_document,
    ) == (3, 3, 5, 7)
    assert (found.tokens, found.bytes, found.bytes_per_token) == (15, 12, 0.8)
    assert (found.vocabulary_used, found.vocab_size) == (13, 258)
    assert (found.windows, found.length, found.padding_cells, found.padding_share) == (
        4,
        4,
        1,
        1 / 16,
    )
    assert found.documents_per_window == (1 + 2 + 2 + 1) / 4
    assert found.packing["document_mask"] is True


def test_borders_and_special_tokens_show() -> None:
    tokenizer = ByteTokenizer()
    found = inspect(pack(TEXTS, tokenizer, Packing(4, document_mask=True)), tokenizer, shown=9)
    shown = [[(p.doc, p.cells, p.text) for p in window] for window in found.shown]
    assert shown == [
        [(0, 4, "abcd")],
        [(0, 3, "ef<|end|>"), (1, 1, "g")],
        [(0, 2, "h<|end|>"), (1, 2, "ij")],
        [(0, 3, "kl<|end|>"), (-1, 1, "")],
    ]
    without = inspect(pack(TEXTS, tokenizer, Packing(6, window_special=True)), tokenizer, shown=1)
    assert [p.text for p in without.shown[0]] == ["<|end|>abcd<|end|>"]


def test_specials_are_spelt_out_one_by_one() -> None:
    tokenizer = train_bpe(["hello hello"] * 5, 262)
    hello = tokenizer.encode("hello")
    assert (
        spelt([tokenizer.eos_id or 0, *hello, tokenizer.mask_id, tokenizer.mask_id], tokenizer)
        == "<|end|>hello<|mask|><|mask|>"
    )


def test_odd_names_and_reasons_are_printed_as_they_are(tmp_path: Path) -> None:
    from rich.console import Console

    for name in ("a[", "c["):
        (tmp_path / name).mkdir()
    (tmp_path / "a[/b].txt").write_text("some text")
    (tmp_path / "c[/b].png").write_text("no text")
    (tmp_path / "d\udcff.png").write_text("no text")
    with pytest.warns(BdlmWarning, match=r"c\[/b\]\.png"):
        found = inspect(prepare(str(tmp_path), ByteTokenizer(), Packing(8)), ByteTokenizer())
    console = Console(width=300, record=True, file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    console.print(found)
    text = console.export_text()
    for part in (
        "c[/b].png: its ending '.png' is not known",
        "d\\udcff.png",
        "files left out / hidden",
    ):
        assert part in text


def test_it_prints_and_turns_into_json() -> None:
    from rich.console import Console

    tokenizer = ByteTokenizer()
    found = inspect(pack(["[bold]not markup[/bold]"], tokenizer, Packing(32)), tokenizer)
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == 24
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(found)
    text = console.export_text()
    for part in (
        "bytes per token",
        "0.958",
        "[bold]not markup[/bold]<|end|>",
        "padding",
        "document_eos",
    ):
        assert part in text
