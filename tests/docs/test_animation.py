"""The picture of the README is a recording: a well-formed SVG, made from what a model wrote."""

from __future__ import annotations

import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import bdlm
from bdlm.commands.arguments import parse
from bdlm.commands.generate import Options
from docs.animation.record import COMMAND, OPTIONS, PROMPT, Frame, draw, record

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "animation" / "live.svg"
SVG = "{http://www.w3.org/2000/svg}"


def test_a_recording_is_what_the_model_wrote(tiny_model: Path) -> None:
    lm = bdlm.load(tiny_model)
    frames = record(lm, "the cat", max_new_tokens=12, seed=3)
    assert frames[-1].text == lm.generate("the cat", max_new_tokens=12, seed=3).text
    drafts = [frame for frame in frames if frame.cells]
    assert sum(cell.new for frame in drafts for cell in frame.cells) >= 12
    assert "12 tokens in" in frames[-1].summary


def test_frames_follow_each_other_and_the_text_stays() -> None:
    frames = [Frame("", ()), Frame("one\ntwo"), Frame("one\ntwo", (), "3 tokens")]
    root = ET.fromstring(draw("p: ", frames, ("bdlm generate",)))
    shown = [text.text for text in root.iter(f"{SVG}text")]
    assert shown == ["$ bdlm generate", "p: ", "one", "two", "3 tokens"]
    still = [group for group in root.iter(f"{SVG}g") if group.get("visibility") == "visible"]
    assert len(still) == 2


def test_the_committed_picture_is_small_and_well_formed() -> None:
    assert PICTURE.stat().st_size < 200_000
    root = ET.parse(PICTURE).getroot()
    assert root.tag == f"{SVG}svg"
    assert len(list(root.iter(f"{SVG}animate"))) > 20
    text = "".join(part.text or "" for part in root.iter(f"{SVG}text"))
    assert all(line.strip() in text for line in COMMAND)


def test_the_command_in_the_picture_is_the_recorded_run() -> None:
    line = "".join(part.removesuffix("\\") for part in COMMAND)
    words = shlex.split(line.replace("$'", "'"))
    options = parse(Options, words[2:], "bdlm generate")
    assert options.prompt.replace("\\n", "\n") == PROMPT
    asked = {
        "max_new_tokens": options.max_new_tokens,
        "decoder": options.decoder,
        "temperature": options.temperature,
    }
    asked |= {
        "top_p": options.top_p,
        "seed": options.seed,
        "gap": int(options.option[0].removeprefix("gap=")),
    }
    assert asked == OPTIONS
    assert options.live
