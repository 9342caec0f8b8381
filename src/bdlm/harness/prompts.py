"""The prompts of a comparison: a file of them, or the openings of the held-out scenes.

In: a name or a file. Out: strings, the same every time. Knows nothing about models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bdlm.core.errors import ConfigError, DataError
from bdlm.core.paths import user_path
from bdlm.data.shakespeare import HELD_OUT, plays, scenes
from bdlm.data.sources import decoded

SHAKESPEARE = "shakespeare"
FIELDS = ("prompt", "text")


def openings(source: str | Path | None = None) -> list[str]:
    """Return title, heading and first stage direction of each scene of the held-out plays, up to
    the first speech.

    source: as in `data.shakespeare.plays`. Raises DataError without the plays."""
    texts = plays(source)
    return [opening(scene) for title in HELD_OUT for scene in scenes(texts[title])]


def opening(scene: str) -> str:
    """Return the paragraphs of a scene before its first speech."""
    paragraphs = scene.split("\n\n")
    count = 2 if len(paragraphs) > 1 and paragraphs[1].startswith("[") else 1
    return "\n\n".join(paragraphs[:count]).rstrip("\n") + "\n\n"


def read_prompts(name: str | Path) -> list[str]:
    """Read prompts. name: "shakespeare" for `openings`; a JSONL file with a field `prompt` (or
    `text`); or a text file with a prompt on each line.

    Raises DataError for a file without any."""
    if str(name) == SHAKESPEARE:
        return openings()
    path = user_path(name, "prompts")
    if not path.is_file():
        raise DataError(
            f"prompts '{name}' is not a file; give a .jsonl or text file, or '{SHAKESPEARE}'"
        )
    lines = [line for line in decoded(path.read_bytes(), path).splitlines() if line.strip()]
    found = (
        [_record(path, number, line) for number, line in enumerate(lines, 1)]
        if path.suffix == ".jsonl"
        else lines
    )
    if not found:
        raise DataError(f"{path} holds no prompt; write one a line")
    return found


def _record(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise DataError(f"{path}: record {number} is not JSON; write one object a line") from None
    for field in FIELDS:
        if isinstance(record, dict) and isinstance(record.get(field), str):
            return str(record[field])
    raise DataError(
        f"{path}: record {number} has no string '{FIELDS[0]}'; write {{\"prompt\": ...}} on each"
        " line"
    )


def chosen(prompts: Sequence[str], count: int) -> list[str]:
    """Choose `count` prompts, evenly spread over all. Raises ConfigError if there are fewer."""
    if not 1 <= count <= len(prompts):
        raise ConfigError(
            f"{count} prompts are requested, there are {len(prompts)}; use fewer texts or more"
            " seeds"
        )
    return [prompts[i * len(prompts) // count] for i in range(count)]
