"""One word for one thing: no page holds a removed name, and no line of code exceeds 100 columns.

The glossary of `docs/notation.md` has the words in use. `bdlm.core.removed_names` answers a removed
name that users may still type; that file and its test are the only ones that may hold them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "tests", "docs", "benchmarks", "examples")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml")
MAY_HOLD_THEM = {"test_vocabulary.py", "removed_names.py", "test_removed_names.py"}

MOVED = "see docs/architecture.md"

GIVEN_UP = {
    r"[Pp]olic(y|ies)": "decoder",
    r"model_calls|[Mm]odel calls?\b": "forward_passes",
    r"tokens_per_call": "tokens_per_forward",
    r"engine_calls": "engine_steps",
    r"\bmake_params\b|\bParams\b": "sampling_params, SamplingParams",
    r"\b[Dd]esks?\b": "Scheduler",
    r"\b[Ss]eats?\b": "slot",
    r"\bBoard\b|\bboard\b(?!er)": "BlockState",
    r"\bTexts\(": "TokenBuffer",
    r"\b[Oo]wed\b": "deferred log-probabilities",
    r"\bblamed\b": "find_failing_requests",
    r"\bUndo\b": "CacheRollback",
    r"\btrial canvas": "draft canvas",
    r"\btwins?\b": "unconditional row",
    r"\bshadow\b": "unconditional row",
    r"(?<!Zipf's )(?<!Zipf’s )\b[Ll]aws?\b": "distribution",
    r"batch_rows|batch-rows": "batch_size",
    r"ignore_stop|(?<!other_)\bstop_tokens\b|--stop-tokens": "ignore_eos, stop_token_ids",
    r"[Ww]ays? out\b": "suggested fix",
    r"faults? of ours": "internal error",
    r"\bthe house\b|\bThe house\b|\broom of the\b": "architecture, module",
    r"models[./](lean|screen|split|folded|packing|tensors|checkpoints)\b": MOVED,
    r"generation[./](params|joining|finishing|seats|calling|texts|deciding)\b": MOVED,
    r"generation[./](trials|shaping|keys|whole)\b": MOVED,
    r"(?<!there )(?<!There )\bis no (?!longer|more|less|such|matter|need|reason|point)": "is not a",
}


def pages() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".md", ".yaml", ".ipynb"} and "data" not in path.parts[-3:-1]:
                yield path
    yield from (ROOT / name for name in PAGES)


@pytest.mark.parametrize("pattern", GIVEN_UP, ids=lambda pattern: GIVEN_UP[pattern])
def test_a_name_that_was_given_up_stands_nowhere(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}"
        for path in pages()
        if path.name not in MAY_HOLD_THEM
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"use {GIVEN_UP[pattern]!r}:\n" + "\n".join(found[:40])


def test_no_line_of_code_is_longer_than_100_columns() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in pages()
        if path.suffix == ".py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 100
    ]
    assert not long, "\n".join(long)
