"""The texts that experiments read: WikiText as whole articles, written once as JSONL beside the runs.

In: a folder with the published files. Out: `train.jsonl`, `valid.jsonl`, `test.jsonl`, one article a line, detokenised as the paper does.
Knows nothing about tokens, models or runs.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

from bdlm.core.errors import DataError
from bdlm.data.detokenizers import DETOKENIZERS

TITLE = re.compile(r"^ \n( = [^=\n][^\n]*[^=\n] = \n) \n", re.MULTILINE)  # alone on its line; sections have two or more signs a side


def articles(text: str) -> list[str]:
    """The articles of a WikiText file, each from its title on."""
    starts = [found.start(1) for found in TITLE.finditer(text)]
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def wikitext(source: Path, folder: Path) -> dict[str, str]:
    """Name of each part -> its JSONL under `folder`, made if it is not there yet.

    source: the folder of `train.txt.gz`, `valid.txt.gz`, `test.txt.gz` (WikiText-2, tokenised form). Raises DataError where one is missing.
    """
    clean, made = DETOKENIZERS["wikitext"], {}
    for part in ("train", "valid", "test"):
        made[part] = str(folder / f"{part}.jsonl")
        if Path(made[part]).is_file():
            continue
        path = source / f"{part}.txt.gz"
        if not path.is_file():
            raise DataError(f"{path} is not there; give the folder that holds WikiText-2's train, valid and test.txt.gz")
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{part}.part"
        with gzip.open(path, "rt", encoding="utf-8") as file, beside.open("w", encoding="utf-8") as out:
            for article in articles(file.read()):
                out.write(json.dumps({"text": clean(article)}, ensure_ascii=False) + "\n")
        os.replace(beside, made[part])
    return made
