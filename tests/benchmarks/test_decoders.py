"""The benchmark of decoders beside `generate` runs and prints a row for each decoder and batch; no
time is asserted."""

from __future__ import annotations

import json

import pytest

from bdlm.api import load
from bdlm.models.dit import DiT
from benchmarks import decoders
from benchmarks.train import fill


def test_the_llama_has_the_sizes_of_the_model() -> None:
    lm = load("shakespeare")
    case = decoders.llama_of(lm.model, 16, 8)
    config = lm.model.config
    assert (case.hidden, case.layers, case.heads, case.vocab) == (
        config.hidden_dim,
        config.n_blocks,
        config.n_heads,
        lm.spec.vocab_size,
    )
    assert (case.against, case.batch, case.new) == ("llama", 16, 8)


@pytest.mark.slow
def test_a_short_run_prints_a_row_for_each_decoder_and_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decoders, "BATCHES", (1, 2))
    rows = decoders.main(rounds=1, new=15, json=True)
    assert json.loads(capsys.readouterr().out) == rows
    assert [row["batch"] for row in rows] == [1] * 6 + [2] * 6
    assert all(row["ratio_tokens_per_second"] > 0 for row in rows)
    calls = {row["decoder"]: row["tokens_per_forward"] for row in rows}
    assert calls["first-hitting"] <= 1 < calls["interleaved gap 4"] < calls["dilated stride 4"]


def test_decoders_by_place_do_not_depend_on_what_the_model_says() -> None:
    """So their calls on random weights are those on trained ones."""
    lm, calls = load("shakespeare"), []
    for model in (lm.model, random_like(lm.model)):
        calls.append(
            [decoders.write(model, decoder, 2, 31, seed=5)[1] for decoder in decoders.by_place(8)]
        )
    assert calls[0] == calls[1]


def random_like(model: DiT) -> DiT:
    other = DiT(model.config)
    fill(other)
    return other.eval()
