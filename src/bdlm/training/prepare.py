"""What a run starts from and ends with: windows and tokenizer from the config's data, the model,
and the exported folder.

In: a `TrainConfig`. Out: `TrainingData` and a `DiT`; at the end a model folder. Knows nothing about
optimisers or checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import ConfigError, DataError, pick, shown
from bdlm.data.detokenizers import DETOKENIZERS
from bdlm.data.loader import Loader
from bdlm.data.packing import Packing, Windows, prepare
from bdlm.data.sources import documents, open_sources
from bdlm.data.tally import Tally
from bdlm.data.tokenizers import check_fits, load_tokenizer, train_bpe
from bdlm.models import model_folder
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.safetensors_io import CONFIG, read_config
from bdlm.training.config import TrainConfig
from bdlm.training.noising import scored_cells
from bdlm.training.validate import HeldOutWindows


@dataclass(frozen=True)
class TrainingData:
    """A tokenizer, the training windows, and the held-out windows or None."""

    tokenizer: Any
    windows: Windows
    held_out: HeldOutWindows | None

    def stream(self, config: TrainConfig, accelerator: Any) -> Any:
        """Make the endless stream of this process's share of the batches; its state can be saved
        and restored."""
        return Loader(
            self.windows,
            config.optim.batch_size,
            config.seed,
            processes=accelerator.num_processes,
            process=accelerator.process_index,
        )

    def describe(self) -> str:
        held = 0 if self.held_out is None else len(self.held_out.ids)
        return (
            f"{len(self.windows):,} training windows, {held:,} held out, vocabulary"
            f" {self.tokenizer.vocab_size:,}"
        )


def build_model(config: TrainConfig, tokenizer: Any, fresh: bool = True) -> DiT:
    """Build a transformer for the tokenizer: fresh from the seed, or warm-started from
    `model.init_from` (trained at any block size).

    fresh False: a checkpoint's weights follow, so `model.init_from` is not read (it may no longer
    exist). Raises ConfigError where the warm start has other sizes, CheckpointError where it cannot
    be read, DataError for another vocabulary."""
    m = config.model
    sizes = DiTConfig(
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        hidden_dim=m.hidden_dim,
        n_blocks=m.n_blocks,
        n_heads=m.n_heads,
        cond_dim=m.cond_dim,
        model_length=m.length,
        block_size=m.block_size,
        dropout=m.dropout,
        algo=m.algo,
        context=m.context,
        first_token=tokenizer.bos_id,
        stop_token=tokenizer.eos_id,
    )
    _check_memory(sizes)
    torch.manual_seed(config.seed)
    model = DiT(sizes)
    if m.init_from is not None and fresh:
        _warm_start(model, m.init_from, tokenizer)
    model.gradient_checkpointing = m.gradient_checkpointing
    if m.compile:
        model.compile_trunk()
    return model


def _check_memory(sizes: DiTConfig) -> None:
    """Raise ConfigError for a model whose weights alone exceed the machine's memory."""
    import psutil

    layer = 12 * sizes.hidden_dim**2 + 6 * sizes.hidden_dim * sizes.cond_dim
    weights = 2 * sizes.vocab_size * sizes.hidden_dim + sizes.n_blocks * layer
    have = psutil.virtual_memory().total
    if 4 * weights > have:
        raise ConfigError(
            f"the model would have about {weights:.3g} parameters, {4 * weights / 2**30:,.0f} GiB"
            f" of memory where this machine has {have / 2**30:,.0f}; use a smaller model.hidden_dim"
            f" ({sizes.hidden_dim}), model.n_blocks ({sizes.n_blocks}) or model.cond_dim"
            f" ({sizes.cond_dim})"
        )


def check_warm_start(config: TrainConfig) -> None:
    """Raise ConfigError or CheckpointError for an unsuitable `model.init_from`, before any work on
    the data."""
    source = config.model.init_from
    if source is None:
        return
    path = model_folder.resolve(source)
    if path.is_dir() and (path / CONFIG).is_file():
        values = read_config(path)
        kind = str(values.get("backbone") or model_folder.algorithm(values))
        if kind not in model_folder.BACKBONES:
            raise _not_ours(source, kind)


def _not_ours(source: str, kind: str) -> ConfigError:
    return ConfigError(
        f"model.init_from is '{source}', a model of kind {shown(kind)}; training starts from this"
        " package's own transformer: name a folder that `bdlm train` wrote"
    )


def _warm_start(model: DiT, source: str, tokenizer: Any) -> None:
    """Copy the weights of another model. Block size, window length and dropout may differ, since no
    weight depends on them."""
    other, report = model_folder.load(source)
    if not isinstance(other, DiT):
        raise _not_ours(source, report.kind)
    check_fits(tokenizer, other.spec.vocab_size, other.spec.mask_id)
    for name in ("algo", "hidden_dim", "n_blocks", "n_heads", "cond_dim"):
        there, here = getattr(other.config, name), getattr(model.config, name)
        if there != here and not (name == "algo" and {there, here} <= {"bd3lm", "mdlm"}):
            raise ConfigError(
                f"model.{name} is {here} but model.init_from '{source}' has {there}; set"
                f" model.{name}={there}"
            )
    model.load_state_dict(
        {name: value.float() for name, value in other.state_dict().items()}, strict=True
    )


def export(
    model: DiT,
    weights: Mapping[str, Tensor],
    tokenizer: Any,
    config: TrainConfig,
    facts: dict[str, Any],
    folder: Path,
) -> str:
    """Write the model folder (config.json, model.safetensors, tokenizer, training.json) atomically,
    and load it back.

    weights: the averaged ones, by name. facts: values that training.json holds besides the config.
    Returns the load report in one line."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model_folder.save(model, part, weights=weights)
    tokenizer.save(part)
    text = json.dumps({**facts, "config": config.to_dict()}, indent=1) + "\n"
    (part / "training.json").write_text(text, encoding="utf-8")
    _, report = model_folder.load(part, vocabulary=tokenizer.vocab_size)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(part, folder)
    shutil.rmtree(old, ignore_errors=True)
    return str(report).splitlines()[0].replace(str(part), str(folder))


def prepare_data(
    config: TrainConfig, folder: Path, accelerator: Any, resumed: bool = False
) -> TrainingData:
    """Make tokenizer and windows from the data that the config names. The main process works first;
    the others find its tokenizer and cache.

    resumed: the run has a checkpoint, so the tokenizer in its folder is used.

    Raises DataError for data that is missing, empty, not UTF-8 or too short, ConfigError for
    options that do not fit."""
    d = config.data
    packing = Packing(
        config.model.length, d.document_eos, d.document_bos, d.window_special, d.document_mask
    )
    with accelerator.main_process_first():
        own = folder / "tokenizer"
        tokenizer = (
            load_tokenizer(own)
            if resumed or not accelerator.is_main_process
            else make_tokenizer(config, own)
        )
        options: dict[str, Any] = {
            "field": d.field,
            "split": d.split,
            "detokenizer": d.detokenizer,
            "cache": d.cache,
            "bad_records": d.bad_records,
        }
        train = prepare(list(d.train), tokenizer, packing, limit=d.limit, **options)
        if d.valid:
            valid = prepare(list(d.valid), tokenizer, packing, limit=None, **options)
            held_out = held_out_windows(valid, tokenizer, config.valid.rows)
            return TrainingData(tokenizer, train, held_out)
    kept = min(len(train) - 1, max(1, round(d.held_out * len(train))))
    if kept < 1:
        raise DataError(
            f"{', '.join(d.train)} makes one window of {config.model.length} tokens; give more"
            " text, or a smaller model.length"
        )
    first = len(train) - kept
    return TrainingData(
        tokenizer,
        train.part(0, first),
        held_out_windows(train.part(first, len(train)), tokenizer, config.valid.rows),
    )


def make_tokenizer(config: TrainConfig, folder: Path) -> Any:
    """Make the config's tokenizer and save it in the run's folder; it replaces one that a run which
    never started may have left."""
    d = config.data
    if d.tokenizer == "bpe":
        clean = pick("detokenizer", d.detokenizer, DETOKENIZERS)
        texts = documents(
            open_sources(list(d.train), d.field, d.split), d.limit, Tally(d.bad_records)
        )
        tokenizer: Any = train_bpe((clean(text) for text in texts), d.vocab_size)
    else:
        tokenizer = load_tokenizer(d.tokenizer)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)
    return tokenizer


def held_out_windows(windows: Windows, tokenizer: Any, rows: int) -> HeldOutWindows:
    """Take at most `rows` windows, evenly spread over all, and count the bytes of text that their
    scored tokens stand for."""
    count = min(rows, len(windows))
    index = torch.arange(count) * len(windows) // count
    ids, doc = windows.rows(index)
    scored = ids[scored_cells(doc)]
    lengths = tokenizer.byte_lengths(scored.tolist())
    return HeldOutWindows(ids, doc, sum(lengths) / max(len(lengths), 1) or None)
