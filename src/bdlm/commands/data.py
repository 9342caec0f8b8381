"""`bdlm data inspect`: show what a model will see of a text. `bdlm data shakespeare`: write the
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
    """Show data as a model will see it, or write the Shakespeare corpus (training, validation and
    held-out JSONL files)."""

    what: Positional[Literal["inspect", "shakespeare"]]
    """inspect prints counts and the first windows; shakespeare writes the corpus to --out."""
    data: tuple[str, ...] = ()
    """Files (text, JSONL, JSON, CSV, TSV, Parquet; also .gz, .xz, .bz2, .zst), folders, globs, or
    datasets as hf:name[:config][:split][:field]."""
    tokenizer: str = "bytes"
    """Tokenizer: bytes, a folder with a tokenizer, a model folder, or a Hugging Face name."""
    length: Size = 256
    """Tokens of a window, 1 to 2^24."""
    field: str = "text"
    """Where the text is: a key of JSON records (meta.body if nested), or a column of a CSV or TSV
    file (a name or number; 2+3 joins two)."""
    split: str = "file"
    """Where a text file is cut into documents: file (nowhere), line, paragraph, article (of
    WikiText), or any other separator, given as text."""
    detokenizer: str = "none"
    """Detokenizer of the corpus, as in the paper: wikitext, ptb, lm1b, lambada or
    scientific_papers; none changes nothing."""
    document_mask: bool = False
    """Keep documents of one window from seeing each other."""
    window_special: bool = False
    """Begin and end every window with special tokens."""
    shown: Annotated[int, AtLeast(0)] = 2
    """Number of windows to print, 0 or more."""
    limit: Count | None = None
    """Read only this many documents, 1 or more; default all."""
    bad_records: float = 0.01
    """How many broken records (null, empty or not readable) may be left out, 0 or more: a share of
    all records if below 1, else their number."""
    out: str = "data/shakespeare"
    """Folder that the Shakespeare corpus is written to."""
    json: bool = False
    """Print the counts and windows, or the corpus's files, as JSON."""


def run(options: Options) -> None:
    """Inspect data or write the corpus, as `what` says."""
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
