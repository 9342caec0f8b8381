"""`bdlm generate --live` shows a block being written with any decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdlm import cli
from bdlm.api import load
from bdlm.commands.live import MASKED
from bdlm.generation.decoders import DECODERS
from bdlm.generation.decoders.learned import Indicator, save_indicator


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_live_shows_masked_and_written_cells(
    name: str,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then writes as to a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    words = [
        "generate",
        "--model",
        str(tiny_model),
        "--prompt",
        "the ",
        "--max-new-tokens",
        "12",
        "--decoder",
        name,
        "--live",
    ]
    if name == "remdm":
        words += ["--option", "steps=6"]
    if name == "adablock":
        words += ["--option", "delimiters=[10, 46]"]
    if name == "ni":
        spec = load(tiny_model).spec
        save_indicator(Indicator(32, spec.vocab_size), tmp_path / "indicator")
        words += ["--option", f"indicator={tmp_path / 'indicator'}"]
    code, out = cli.run(words), capsys.readouterr()
    assert code == 0, out.err
    assert "12 tokens in" in out.err
    frames = out.out.split("the ")
    assert len(frames) > 3, "the page is drawn anew at every call"
    assert MASKED in out.out
    assert MASKED not in frames[-1].split("\n")[0]
