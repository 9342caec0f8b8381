"""Model folders: config.json and model.safetensors, read strictly and written whole.

In: a folder, a safetensors file, or the name of a packaged model. Out: a model and a report of what
was loaded. The names of tensors and config fields are those of the released checkpoints, so both
load the same way. The embedding and the head are two tensors (`vocab_embed.embedding`,
`output_layer.linear.weight`); nothing is tied. No pickle is ever opened here (`models.lightning`
converts them) and no code named by a config is run without `trust_code=True`. Knows nothing about
tokenizers, training or sampling."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core import manifest
from bdlm.core.errors import BdlmError, CheckpointError, UnsupportedError, nearest, shown
from bdlm.core.importing import import_object
from bdlm.core.paths import user_path
from bdlm.core.threads import survive_fork
from bdlm.models.dit import DiT, DiTConfig
from bdlm.models.hf import FAMILIES, load_hf
from bdlm.models.published_names import SCALARS, Config, fill_in_config, sort_out
from bdlm.models.safetensors_io import CONFIG, WEIGHTS, fill, one_line, read_config, read_folder
from bdlm.models.trust import refuse_code


@dataclass(frozen=True)
class LoadReport:
    """Report what a load did. `str(report)` is one paragraph for people.

    clip: the learned mask-probability interval (beta, omega), or None.
    set_aside: tensors of the file that are not weights.
    notes: what was filled in or corrected."""

    source: Path
    kind: str
    tensors: int
    parameters: int
    dtype: torch.dtype
    config: dict[str, Any]
    clip: tuple[float, float] | None = None
    set_aside: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [
            f"{self.kind}: {self.tensors} tensors, {self.parameters:,} parameters, {dtype}, every"
            f" one matched; from {self.source}"
        ]
        if self.clip:
            lines.append(f"learned noise interval: beta {self.clip[0]:g}, omega {self.clip[1]:g}")
        if self.set_aside:
            lines.append(f"not weights, set aside: {', '.join(self.set_aside)}")
        return "\n".join([*lines, *self.notes])


# -- where models are ------------------------------------------------------------------------------


def packaged() -> dict[str, Path]:
    """List the models inside this package: name -> folder."""
    root = Path(__file__).resolve().parent.parent / "pretrained"
    return (
        {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG).is_file()}
        if root.is_dir()
        else {}
    )


def resolve(name_or_path: str | Path) -> Path:
    """Return the folder or file of a model: an existing path, else a packaged name. Raises
    CheckpointError with the nearest names otherwise."""
    path = user_path(name_or_path, "model")
    if path.exists():
        return path
    known = packaged()
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    hint = nearest(str(name_or_path), known) if known else "; no models are packaged"
    raise CheckpointError(f"model '{name_or_path}' is neither a folder nor a packaged name{hint}")


# -- reading ---------------------------------------------------------------------------------------


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    trust_code: bool = False,
    vocabulary: int | None = None,
    verify: bool = True,
) -> tuple[Any, LoadReport]:
    """Load a denoiser in eval mode; returns it with the report of its load.

    source: a model folder, its .safetensors file, or a packaged name.
    dtype: default that of the stored weights.
    trust_code: allow a config that names its model as "package.module:Name" to import it.
    vocabulary: the number of token ids of the caller's tokenizer, mask included; a model with
    another number is refused.
    verify: compare the files with the manifest.json of the folder first (SHA-256, one to four
    seconds a GB); a folder without one loads with a note.
    Raises CheckpointError, in one line, for: a missing, damaged or changed file; a pickle; a tensor
    that is missing, unexpected, of another shape, not a float, NaN or infinite; a config without a
    needed field or one that names code. UnsupportedError for Apple's MPS."""
    survive_fork()
    if torch.device(device).type == "mps":
        raise UnsupportedError(
            "device 'mps' has no float64, which noise and losses are computed in; use device='cpu'"
        )
    path = resolve(source)
    notes = _verified(path, verify)
    if (
        path.is_dir()
        and (path / CONFIG).is_file()
        and read_config(path).get("model_type") in FAMILIES
    ):
        foreign, report = _load_foreign(path, device, dtype, trust_code, vocabulary)
        return foreign, replace(report, notes=(*report.notes, *notes))
    config, tensors = read_folder(path)
    refuse_code(config, path, trust_code)
    kind = algorithm(config)
    weights, aside, clip = sort_out(tensors, config)
    if "backbone" in config:
        build = import_object(
            f"{path}: backbone", config["backbone"], trusted=trust_code, error=CheckpointError
        )
        model: Any = build(config)
    else:
        if kind not in BACKBONES:
            raise CheckpointError(
                f"{path}: model_type is {shown(kind)}{nearest(kind, [*BACKBONES, *FAMILIES])}"
            )
        config, fixed = fill_in_config(config, weights, path)
        notes = (*fixed, *notes)
        with torch.device("meta"):
            model = BACKBONES[kind](config)
    fill(model, weights, path, dtype)
    _check_vocabulary(model, vocabulary, path)
    model.to(device).eval()
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    return model, LoadReport(
        path, kind, len(weights), count, parameters[0].dtype, dict(config), clip, aside, notes
    )


def _verified(path: Path, verify: bool) -> tuple[str, ...]:
    """Check the files against the folder's manifest; returns a note if nothing was compared."""
    if not verify:
        return ("the files were not compared with their checksums, as asked",)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name == WEIGHTS) and manifest.verify(folder):
        return ()
    return (
        f"no {manifest.MANIFEST} with the weights: damage that keeps the format is not detected",
    )


def _check_vocabulary(model: Any, vocabulary: int | None, path: Path) -> None:
    if vocabulary is not None and model.spec.vocab_size != vocabulary:
        raise CheckpointError(
            f"{path}: the model has {model.spec.vocab_size} token ids, the tokenizer {vocabulary}"
            " (mask included); use the tokenizer that it was trained with"
        )


def _load_foreign(
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    trust_code: bool,
    vocabulary: int | None,
) -> tuple[Any, LoadReport]:
    """Load a transformers causal LM (`models.hf`) from its own kind of folder."""
    config = read_config(path)
    refuse_code(config, path, trust_code)
    model = load_hf(path, dtype=dtype)
    _check_vocabulary(model, vocabulary, path)
    model.to(device)
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    note = "taken as autoregressive: its config has no conventions of a block denoiser"
    notes = () if "bdlm" in config else (note,)
    return model, LoadReport(
        path,
        str(config["model_type"]),
        len(parameters),
        count,
        parameters[0].dtype,
        config,
        notes=notes,
    )


# -- writing ---------------------------------------------------------------------------------------


def save(
    model: Any,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write config.json, model.safetensors and manifest.json, each under a temporary name, flushed
    to the disk and renamed.

    model: a native model, or any module with a `config.to_dict()`.
    extra: more entries of config.json; sampling_eps_min and sampling_eps_max also go into the
    tensor file, as published.
    overwrite: replace a model that is in the folder; without it that is a CheckpointError.
    weights: other values for the model's tensors (an average of them), by the names of its
    state_dict.
    Returns the folder."""
    from safetensors.torch import save_file

    folder, extra = Path(folder), dict(extra or {})
    if not overwrite and ((folder / CONFIG).exists() or (folder / WEIGHTS).exists()):
        raise CheckpointError(
            f"{folder}: already holds a model; choose another folder or pass overwrite"
        )
    config = {**describe(model), **extra}
    tensors = _state(model, weights)
    for name in SCALARS:
        if extra.get(name) is not None:
            tensors[name] = torch.tensor(float(extra[name]))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.{uuid.uuid4().hex[:8]}" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, str(temporary[WEIGHTS]), metadata={"format": "pt", "config": text})
        temporary[CONFIG].write_text(text, "utf-8")
        for file in temporary.values():
            _flush(file)
        # a manifest must never describe other files, even if this fails half way
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
        for name, file in temporary.items():
            os.replace(file, folder / name)
        manifest.record(folder)
        _flush(folder)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    return folder


def describe(model: Any) -> dict[str, Any]:
    """Return the config.json of a model: our fields, and the published ones that other readers
    expect."""
    config: dict[str, Any] = model.config.to_dict()
    if isinstance(model, DiT):
        algo = model.config.algo
        config |= {
            "model_type": "bd3lm",
            "architectures": ["BD3LM"],
            "cross_attn": algo == "bd3lm",
            "adaln": model.config.adaln,
        }
        config |= {"causal": algo == "ar", "time_conditioning": algo == "sedd"}
    return config


def _state(model: Any, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the tensors to write, on the CPU, each in memory of its own. Raises CheckpointError
    unless they are exactly the model's."""
    own = {_saved_name(n): v for n, v in model.state_dict().items()}
    source = own if weights is None else {_saved_name(n): v for n, v in weights.items()}
    if {n: v.shape for n, v in source.items()} != {n: v.shape for n, v in own.items()}:
        raise CheckpointError(
            "the weights to save are not those of the model: names or shapes differ"
        )
    for name, value in source.items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"tensor {name} has NaN or infinite values; it was not saved")
    return {n: v.detach().to("cpu", copy=True).contiguous() for n, v in source.items()}


def _saved_name(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- what can be built -----------------------------------------------------------------------------


def algorithm(config: Config) -> str:
    """Return which builder a config.json needs: our `algo`, else by the published model_type and
    flags."""
    if config.get("algo"):
        return str(config["algo"])
    kind = str(config.get("model_type"))
    if kind == "bd3lm" and config.get("causal"):
        return "ar"
    return "mdlm" if kind == "bd3lm" and config.get("cross_attn") is False else kind


def native(config: Config, algo: str) -> DiT:
    """Build the paper's transformer from a config.json, published or ours. Raises CheckpointError
    for sizes that do not fit or make no sense."""
    if bool(config.get("adaln", algo != "ar")) != (algo != "ar"):
        raise CheckpointError(
            f"config.json has adaln {shown(config['adaln'])} with {algo}; here only ar is without"
            " adaLN"
        )
    if bool(config.get("time_conditioning", algo == "sedd")) != (algo == "sedd"):
        raise CheckpointError(
            f"config.json has time_conditioning {shown(config['time_conditioning'])} with {algo};"
            " only sedd takes the time"
        )
    sizes = {
        f.name: config[f.name] for f in fields(DiTConfig) if f.name in config and f.name != "algo"
    }
    needed = {"vocab_size", "hidden_dim", "n_blocks", "n_heads", "model_length"} | (
        {"block_size"} if algo == "bd3lm" else set()
    )
    if absent := sorted(needed - sizes.keys()):
        raise CheckpointError(
            f"config.json lacks {', '.join(absent)}; copy it from where the weights come from"
        )
    for name, value in sizes.items():
        optional = name in ("first_token", "stop_token") and value is None
        if (
            name not in ("dropout", "context")
            and not optional
            and (isinstance(value, bool) or not isinstance(value, int))
        ):
            raise CheckpointError(
                f"config.json has {name} {shown(value)}; it must be a whole number"
            )
    _check_values(sizes)
    try:
        return DiT(DiTConfig(**sizes, algo=algo))  # type: ignore[arg-type]
    # sizes too large for torch
    except (BdlmError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(f"config.json: {one_line(error)[:300]}") from None


def _check_values(sizes: Config) -> None:
    """Raise CheckpointError for invalid values of fields other than sizes."""
    dropout = sizes.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(
            f"config.json has dropout {shown(dropout)}; it must be a number from 0 to below 1"
        )
    if sizes.get("context", "block") not in ("block", "causal"):
        raise CheckpointError(
            f"config.json has context {shown(sizes['context'])}; use 'block' or 'causal'"
        )
    for name in ("first_token", "stop_token"):
        token = sizes.get(name)
        if token is not None and not 0 <= token < sizes["vocab_size"]:
            raise CheckpointError(
                f"config.json has {name} {token}, outside the vocabulary of {sizes['vocab_size']}"
            )


BACKBONES: dict[str, Callable[[Config], Any]] = {
    "bd3lm": lambda config: native(config, "bd3lm"),
    "mdlm": lambda config: native(config, "mdlm"),
    "sedd": lambda config: native(config, "sedd"),
    "ar": lambda config: native(config, "ar"),
}
