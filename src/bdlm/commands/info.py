"""`bdlm info`: show what a model is, or (`--mask`) draw which positions see which in training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from bdlm.commands.terminal import console
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.paths import user_path
from bdlm.core.validation import Between


@dataclass(frozen=True)
class Options:
    """Show what a model is, or draw its attention mask. Without options, list the packaged
    models."""

    model: str | None = None
    """A model folder, or the name of a packaged model."""
    mask: bool = False
    """Draw the attention mask of the training pass."""
    block_size: int | None = None
    """Block size of the drawing, 1 to --length; default the model's, or 4 without a model."""
    length: Annotated[int, Between(1, 128, said="use 1 to 128 cells for a drawing")] = 12
    """Tokens of the drawing in each copy of the text, 1 to 128."""
    out: str | None = None
    """Also write the drawing to this PNG file."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, cuda:N, or auto (cuda if there is one)."""
    json: bool = False
    """Print the facts, the drawing or the list as JSON."""


def run(options: Options) -> None:
    """Print the facts about a model, the drawing, or the list of packaged models."""
    if not options.mask and (options.out or options.block_size) is not None:
        raise ConfigError(
            "--out and --block-size belong to the drawing; add --mask, or leave them out"
        )
    spec = None
    if options.model is not None:
        from bdlm.api import load

        lm = load(options.model, device=options.device)
        spec = lm.spec
        if not options.mask:
            _show(lm, options.json)
            return
    if options.mask:
        _draw(options, spec)
        return
    from bdlm.models.model_folder import packaged

    found = {name: str(path) for name, path in packaged().items()}
    listing = "\n".join(f"  {name}" for name in found) or "  (none in this installation)"
    print(json.dumps({"packaged": found}) if options.json else f"packaged models:\n{listing}")


def _show(lm: Any, as_json: bool) -> None:
    facts = {
        "source": str(lm.path),
        "parameters": lm.parameters,
        "dtype": str(lm.dtype).removeprefix("torch."),
        **{k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(lm.spec).items()},
        "tokenizer": type(lm.tokenizer).__name__,
    }
    if as_json:
        print(json.dumps(facts))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")  # a path is wrapped, not cut
    for name, value in facts.items():
        shown = (
            f"{value:,}"
            if name == "parameters"
            else ", ".join(value)
            if isinstance(value, list)
            else str(value)
        )
        table.add_row(Text(name.replace("_", " "), style="bold"), shown)
    console().print(table)
    for note in lm.notes:
        print(note)


def pattern(
    length: int, block_size: int, streams: int, context: str
) -> tuple[list[list[bool]], list[str], int]:
    """Compute the attention mask of the training pass over a window.

    streams: 2 for a noisy copy, then a clean copy; 1 for a noisy copy alone (MDLM, SEDD); 0 for a
    clean copy alone (autoregressive). Returns the mask [queries][keys], the labels of the cells,
    and the index of the first clean cell."""
    import torch

    from bdlm.core.blockmap import Contiguous, make_layout
    from bdlm.core.types import CLEAN
    from bdlm.core.visibility import Cells, join, sees

    noisy = Cells.of(make_layout(Contiguous(block_size), length, context=context))
    clean = Cells(noisy.rank, torch.full_like(noisy.group, CLEAN), noisy.limit, noisy.doc)
    cells = join(noisy, clean) if streams == 2 else noisy if streams == 1 else clean
    marks = [f"~{i}" for i in range(length)] * (streams > 0) + [f"{i}" for i in range(length)] * (
        streams != 1
    )
    return sees(cells, cells)[0].tolist(), marks, length * (streams > 0)


def _draw(options: Options, spec: Any) -> None:
    from bdlm.commands.drawing import png, text

    length = options.length
    size = (
        options.block_size
        if options.block_size is not None
        else min(spec.block_size if spec else 4, length)
    )
    if not 1 <= size <= length:
        raise ConfigError(
            f"--block-size is {size}; use 1 to {length}, the cells of the drawing (--length)"
        )
    if spec is not None and spec.noise == "uniform":
        raise UnsupportedError(
            "the drawing shows the masks of block diffusion; a model of uniform noise has none"
        )
    streams = 2 if spec is None else 0 if spec.noise == "none" else spec.streams
    context = spec.context if spec else "block"
    visible, names, clean_from = pattern(length, size if streams != 1 else length, streams, context)
    facts = {"length": length, "block_size": size, "streams": streams, "context": context}
    share = sum(map(sum, visible)) / len(visible) ** 2
    if options.out is not None:
        caption = (
            f"Attention mask of the training pass over {length} tokens in blocks of {size}. Rows"
            " are queries, columns are keys. Orange: noisy cells of the same block. Blue: clean"
            " cells of earlier blocks, and for clean queries also of their own block."
        )
        png(
            visible,
            clean_from,
            f"Visibility, blocks of {size}",
            caption,
            user_path(options.out, "--out"),
        )
    if options.json:
        print(json.dumps({**facts, "visible_share": share, "visible": visible}))
        return
    print(text(visible, names, clean_from))
    print(
        f"{length} cells in blocks of {size}; ~i is cell i of the noisy copy, i of the clean copy;"
        f" {share:.0%} of all pairs are visible"
    )
    if options.out is not None:
        print(f"written to {options.out}")
