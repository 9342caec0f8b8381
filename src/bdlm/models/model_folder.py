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
from bdlm.models.safetensors_io import CONFIG, WEIGHTS, fill, one_line, read_config, read_folder
from bdlm.models.trust import refuse_code

SCALARS = ("sampling_eps_min", "sampling_eps_max")  # the learned clipped schedule [beta, omega]
# GPT-2's tokens and the mask; its <|endoftext|> opens and ends published texts
OWT_VOCAB, OWT_END = 50258, 50256

Config = Mapping[str, Any]


@dataclass(frozen=True)
class LoadReport:
    """What a load did. `str(report)` is one paragraph for people.

    clip: the learned mask-probability interval (beta, omega), or None. set_aside: tensors of the
    file that carry no weights.
    notes: whatever was filled in or put right."""

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


# -- where models lie ------------------------------------------------------------------------------


def packaged() -> dict[str, Path]:
    """The models inside this package: name -> folder."""
    root = Path(__file__).resolve().parent.parent / "pretrained"
    return (
        {p.name: p for p in sorted(root.iterdir()) if (p / CONFIG).is_file()}
        if root.is_dir()
        else {}
    )


def resolve(name_or_path: str | Path) -> Path:
    """The folder or file of a model: an existing path, else a packaged name. CheckpointError with
    the nearest names otherwise."""
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
    """A denoiser in eval mode and the report of its load.

    source: a model folder, its .safetensors file, or a packaged name. dtype: default that of the
    stored weights.
    vocabulary: the number of token ids that the caller's tokenizer has, mask included; another one
    in the model is refused.
    trust_code: allow a config that names its model as "package.module:Name" to import it.
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
    weights, aside, clip = _sorted_out(tensors, config)
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
        config, fixed = _settled(config, weights, path)
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
    """Check the files against the folder's manifest; a note where nothing was compared."""
    if not verify:
        return ("the files were not compared with their checksums, as asked",)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name == WEIGHTS) and manifest.verify(folder):
        return ()
    return (f"no {manifest.MANIFEST} beside the weights: damage that keeps the format goes unseen",)


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
    """A transformers causal LM (`models.hf`) from its own kind of folder."""
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


# -- names, conventions, strictness ----------------------------------------------------------------


def plain_name(name: str) -> str:
    """A tensor's published name: without the marks of torch.compile and DDP, with the `backbone.`
    prefix."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    return name if name.startswith("backbone.") or name in SCALARS else f"backbone.{name}"


def _sorted_out(
    tensors: Mapping[str, Tensor], config: Config
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[float, float] | None]:
    """Weights under their plain names, what is not a weight, and the learned interval."""
    if "backbone" in config:
        return dict(tensors), (), None
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = plain_name(name)
        if plain in weights:
            raise CheckpointError(
                f"tensor {plain} is in the checkpoint twice (once as {name}); keep one"
            )
        weights[plain] = value
    scalars = {name: _scalar(name, weights.pop(name)) for name in SCALARS if name in weights}
    aside = [*scalars]
    base = "backbone.rotary_emb.inv_freq"
    if base in weights:
        _check_rotary(weights.pop(base))
        aside.append(base)
    low, high = (_share(name, scalars.get(name, config.get(name))) for name in SCALARS)
    clip = None if low is None or high is None else (low, high)
    return weights, tuple(aside), clip


def _scalar(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise CheckpointError(f"tensor {name} has shape {list(value.shape)}; it must be one number")
    return float(value)


def _share(name: str, value: Any) -> float | None:
    """A mask probability of the config or the file, or None where there is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"{name} is {shown(value)}; it must be a number from 0 to 1")
    return float(value)


def _check_rotary(stored: Tensor) -> None:
    """The stored table must be that of base 10000, the only one this transformer has."""
    half = stored.numel()
    expected = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    if not torch.allclose(stored.flatten().double(), expected, rtol=1e-2):
        raise CheckpointError(
            "tensor backbone.rotary_emb.inv_freq is not that of base 10000; this model has other"
            " rotary positions"
        )


def _settled(
    config: Config, weights: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """The config with the published omissions filled in, and notes on each."""
    config, notes = dict(config), []
    held, wanted = (
        len({n.split(".")[2] for n in weights if n.startswith("backbone.blocks.")}),
        config.get("n_blocks"),
    )
    if isinstance(wanted, int) and wanted > held:  # before anything of that size is built
        raise CheckpointError(
            f"{path}: config.json says n_blocks {wanted}, the weights have {held}; give the"
            " config.json of these weights"
        )
    embedding, sigma = (
        weights.get("backbone.vocab_embed.embedding"),
        weights.get("backbone.sigma_map.mlp.2.bias"),
    )
    if embedding is not None and config.get("vocab_size") not in (None, embedding.shape[0]):
        differ = (
            f"config.json says vocab_size {shown(config['vocab_size'])}, the weights have"
            f" {embedding.shape[0]} rows"
        )
        raise CheckpointError(f"{path}: {differ}; give the config.json of these weights")
    if sigma is not None and config.get("cond_dim", 129) == 129 and sigma.shape[0] != 129:
        config["cond_dim"] = int(sigma.shape[0])
        notes.append(
            f"cond_dim taken from the weights: {config['cond_dim']} (the published default 129 is a"
            " slip)"
        )
    if isinstance(config.get("vocab_size"), int) and config.get("mask_id") is None:
        config["mask_id"] = config.get("mask_token_id", config["vocab_size"] - 1)
        notes.append(f"mask_id not in config.json: taken as {config['mask_id']}")
    if "first_token" not in config and config.get("vocab_size") == OWT_VOCAB:
        config["first_token"] = config["stop_token"] = OWT_END
        notes.append(
            f"first_token and stop_token not in config.json: taken as {OWT_END}, GPT-2's"
            " <|endoftext|>"
        )
    return config, notes


# -- writing ---------------------------------------------------------------------------------------


def save(
    model: Any,
    folder: str | Path,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write config.json, model.safetensors and manifest.json, each beside its place and renamed,
    flushed to the disk.

    model: a native model, or any module whose `config.to_dict()` describes it. extra: more entries
    of config.json; sampling_eps_min and sampling_eps_max also go into the tensor file, as
    published. weights: other values for the model's tensors (an average of them), by the names of
    its state_dict. A folder that already holds a model is refused unless `overwrite`. Returns the
    folder."""
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
    beside = {name: folder / f".{name}.{uuid.uuid4().hex[:8]}" for name in (WEIGHTS, CONFIG)}
    try:
        save_file(tensors, str(beside[WEIGHTS]), metadata={"format": "pt", "config": text})
        beside[CONFIG].write_text(text, "utf-8")
        for file in beside.values():
            _flush(file)
        # never one of other files, however this ends
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
        for name, file in beside.items():
            os.replace(file, folder / name)
        manifest.record(folder)
        _flush(folder)
    finally:
        for file in beside.values():
            file.unlink(missing_ok=True)
    return folder


def describe(model: Any) -> dict[str, Any]:
    """The config.json of a model: our fields, and the published ones that other readers look
    for."""
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
    """The tensors to write, on the CPU, each of its own memory; they must be exactly the
    model's."""
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
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- what can be built -----------------------------------------------------------------------------


def algorithm(config: Config) -> str:
    """Which builder a config.json asks for: our `algo`, else the published model_type and flags."""
    if config.get("algo"):
        return str(config["algo"])
    kind = str(config.get("model_type"))
    if kind == "bd3lm" and config.get("causal"):
        return "ar"
    return "mdlm" if kind == "bd3lm" and config.get("cross_attn") is False else kind


def native(config: Config, algo: str) -> DiT:
    """The paper's transformer from a config.json, published or ours. Raises CheckpointError for
    sizes that do not fit or have no sense."""
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
        return DiT(DiTConfig(**sizes, algo=algo))
    # sizes beyond what torch counts in
    except (BdlmError, RuntimeError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(f"config.json: {one_line(error)[:300]}") from None


def _check_values(sizes: Config) -> None:
    """Raise CheckpointError for fields beside the sizes whose value has no meaning."""
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
