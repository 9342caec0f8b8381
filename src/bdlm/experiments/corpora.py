"""The texts of experiments, by the folder that holds the published files.

In: a folder with WikiText-2 (`wikitext-2/{train,valid,test}.txt.gz`) and, for the zero-shot sets,
the others. Out: values for the placeholders of plans: {train}, {valid}, {test} (whole articles,
detokenised once as in the paper, as JSONL next to the runs) and {sets}. Knows nothing about tokens,
models or runs."""

from __future__ import annotations

import json
from pathlib import Path

from bdlm.core.errors import ConfigError, pick
from bdlm.data.detokenizers import DETOKENIZERS
from bdlm.data.files import write_atomically
from bdlm.data.sources import documents, open_sources


def places(needs: tuple[str, ...], data: str | None, work: Path) -> dict[str, str]:
    """Return values of the placeholders that a plan `needs`, for "wikitext" and "sets". Raises
    ConfigError without a folder, DataError for its content."""
    if needs and data is None:
        raise ConfigError(
            "this plan reads published texts; give their folder with --data (it holds"
            " wikitext-2/train.txt.gz and so on)"
        )
    for need in needs:
        pick("needs", need, dict.fromkeys(("wikitext", "sets")))
    found: dict[str, str] = {}
    if "wikitext" in needs:
        found |= {
            part: _articles(Path(str(data)), part, work / "data")
            for part in ("train", "valid", "test")
        }
    if "sets" in needs:
        found["sets"] = str(data)
    return found


def _articles(data: Path, part: str, folder: Path) -> str:
    """Write one part of WikiText-2 as JSONL, unless it exists. Returns its path."""
    made = folder / f"{part}.jsonl"
    if not made.is_file():
        source, clean = data / "wikitext-2" / f"{part}.txt.gz", DETOKENIZERS["wikitext"]
        found = [
            clean(article) for article in documents(open_sources([str(source)], "text", "article"))
        ]
        write_atomically(
            made,
            "".join(
                json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found
            ).encode(),
        )
    return str(made)
