"""`bdlm data inspect`: what a model will see of a text; `bdlm data shakespeare`: write out the
plays as a corpus."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from bdlm.commands.terminal import console
from bdlm.core.errors import ConfigError
from bdlm.core.paths import user_path
from bdlm.core.validation import AtLeast, Count, Size


@dataclass(frozen=True)
class Options:
    """Look at data as a model will see it, or write the Shakespeare corpus (train, valid and
    held-out JSONL)."""

    what: Positional[Literal["inspect", "shakespeare"]]
    """inspect: counts and the first windows; shakespeare: write the corpus into --out."""
    data: tuple[str, ...] = ()
    """Files (text, JSONL, JSON, CSV, TSV, Parquet; also .gz, .xz, .zst), folders, globs, or
    hf:name[:config][:split][:field]."""
    tokenizer: str = "bytes"
    """bytes, a folder with a tokenizer, a model folder, or a Hugging Face name."""
    length: Size = 256
    """Cells of a window."""
    field: str = "text"
    """What holds the text: a field of records (meta.body: nested), or a column of a CSV or TSV file
    (its name or number; 2+3 joins two)."""
    split: str = "file"
    """How a text file falls into documents: file, line, paragraph, article (of WikiText), or any
    separator."""
    detokenizer: str = "none"
    """CacheRollback a corpus's tokenisation, as the paper does: ptb, lm1b, lambada, ..."""
    document_mask: bool = False
    """Documents of one window do not see each other."""
    window_special: bool = False
    """Open and close every window with special tokens."""
    shown: Annotated[int, AtLeast(0)] = 2
    """How many windows to write out."""
    limit: Count | None = None
    """Use the first documents only."""
    bad_records: float = 0.01
    """Records that may be null, broken or empty, and are left out: below 1 a share of all, else
    their number."""
    out: str = "data/shakespeare"
    """Where the Shakespeare corpus goes."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> None:
    """Do what the first word says."""
    if options.what == "shakespeare":
        from bdlm.data.shakespeare import write_corpus

        counts = write_corpus(user_path(options.out, "--out"))
        text = ", ".join(f"{name}.jsonl {count}" for name, count in counts.items())
        print(
            json.dumps({"folder": options.out, **counts})
            if options.json
            else f"scenes written to {options.out}: {text}"
        )
        return
    if not options.data:
        raise ConfigError(
            "bdlm data inspect needs --data; give text files, JSONL, folders, or hf:name"
        )
    from bdlm.data.inspect import inspect
    from bdlm.data.packing import Packing, prepare
    from bdlm.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    packing = Packing(
        options.length,
        tokenizer.eos_id is not None,
        False,
        options.window_special,
        options.document_mask,
    )
    windows = prepare(
        list(options.data),
        tokenizer,
        packing,
        field=options.field,
        split=options.split,
        detokenizer=options.detokenizer,
        limit=options.limit,
        bad_records=options.bad_records,
    )
    found = inspect(windows, tokenizer, options.shown)
    if options.json:
        print(json.dumps(found.to_dict()))
        return
    console().print(found)
