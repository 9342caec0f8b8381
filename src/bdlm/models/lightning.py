"""One-way conversion of the reference's Lightning checkpoints (.ckpt, a pickle) into model folders.

In: a .ckpt file. Out: a folder that `models.model_folder.load` reads. The file is opened with
torch's weights-only reader; classes that it names (its config's) are replaced by inert records, so
nothing of the file is ever run. The averaged weights, which the reference keeps as a list in
parameter order under `ema.shadow_params`, are taken where they are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdlm.core.errors import CheckpointError
from bdlm.models.model_folder import BACKBONES, LoadReport, load, plain_name, save
from bdlm.models.safetensors_io import fill, one_line


def convert_lightning(
    path: str | Path,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> LoadReport:
    """Write the model of a Lightning checkpoint as a model folder, load it strictly, and return
    that load's report.

    config: entries of config.json (algo, block_size, model_length, n_heads, mask_id, ...) that win
    over those in the checkpoint; needed where the checkpoint carries none. ema: take the averaged
    weights; without any in the file that is an error. Raises CheckpointError for a damaged file,
    one that names functions, weights that do not fit, or a size that nothing tells."""
    path = Path(path)
    content = _read(path)
    state = content.get("state_dict")
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: has no state_dict; is it a Lightning checkpoint?")
    weights = {
        plain_name(n): v
        for n, v in state.items()
        if isinstance(v, Tensor) and plain_name(n) != "backbone.rotary_emb.inv_freq"
    }
    weights = {
        n: v
        for n, v in weights.items()
        if n.startswith(
            ("backbone.vocab_", "backbone.sigma_", "backbone.blocks.", "backbone.output_")
        )
    }
    settings = {**_settings(content, weights, state), **(config or {})}
    model = BACKBONES[settings["algo"]](settings) if settings.get("algo") in BACKBONES else None
    if model is None:
        raise CheckpointError(
            f"{path}: does not say its algorithm; pass config={{'algo': 'bd3lm', ...}} (one of"
            f" {', '.join(BACKBONES)})"
        )
    fill(model, _averaged(content, weights, path) if ema else weights, path, torch.float32)
    clip = {
        n: float(state[n])
        for n in ("sampling_eps_min", "sampling_eps_max")
        if isinstance(state.get(n), Tensor)
    }
    save(model, folder, extra=clip, overwrite=overwrite)
    return load(folder)[1]


class _Inert:
    """Stands in for a class that a checkpoint names: keeps what the file says about the object and
    does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **_kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


@contextlib.contextmanager
def _inert_globals(path: Path) -> Iterator[None]:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    with torch.serialization.safe_globals([(type("Inert", (_Inert,), {}), name) for name in names]):
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        with _inert_globals(path):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as weights only ({one_line(error)[:300]})"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a Lightning checkpoint"
        )
    return dict(content)


def _plain(value: Any) -> Any:
    """Settings out of inert records: a node of the reference's config keeps its value in `_val`, a
    container in `_content`."""
    if isinstance(value, _Inert):
        state = getattr(value, "state", None)
        state = state if isinstance(state, Mapping) else getattr(value, "__dict__", {})
        return _plain(state["_content"]) if "_content" in state else _plain(state.get("_val"))
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _settings(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], state: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json's entries: sizes from the tensors, the rest from the hyper-parameters where the
    file has them."""
    stored = _plain(content.get("hyper_parameters", {}))
    stored = _part(stored, "config") or stored
    model, algo = _part(stored, "model"), _part(stored, "algo")
    embedding, sigma = (
        weights.get("backbone.vocab_embed.embedding"),
        weights.get("backbone.sigma_map.mlp.2.bias"),
    )
    if embedding is None:
        raise CheckpointError(
            "tensor backbone.vocab_embed.embedding is missing; only the reference's native backbone"
            " can be converted"
        )
    rotary = next((v for n, v in state.items() if n.endswith("rotary_emb.inv_freq")), None)
    heads = model.get("n_heads") or (
        embedding.shape[1] // (2 * rotary.numel()) if rotary is not None else None
    )
    blocks = {n.split(".")[2] for n in weights if n.startswith("backbone.blocks.")}
    found = {
        "algo": algo.get("name"),
        "vocab_size": embedding.shape[0],
        "mask_id": embedding.shape[0] - 1,
        "hidden_dim": embedding.shape[1],
        "n_blocks": len(blocks),
        "n_heads": heads,
        "cond_dim": None if sigma is None else sigma.shape[0],
        "model_length": model.get("length"),
        "block_size": stored.get("block_size") if isinstance(stored, dict) else None,
        "dropout": model.get("dropout"),
    }
    return {
        name: value
        for name, value in found.items()
        if (value is not None and not isinstance(value, str)) or name == "algo"
    }


def _part(settings: Any, name: str) -> dict[str, Any]:
    """A sub-tree of the settings, empty where there is none."""
    found = settings.get(name) if isinstance(settings, dict) else None
    return found if isinstance(found, dict) else {}


def _averaged(
    content: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """The EMA list laid onto the names, which the state dict holds in the same order."""
    average = content.get("ema")
    unconditional_row = average.get("shadow_params") if isinstance(average, Mapping) else None
    if not isinstance(unconditional_row, list):
        raise CheckpointError(
            f"{path}: has no averaged weights (ema.shadow_params); pass ema=False to take the raw"
            " ones"
        )
    if len(unconditional_row) != len(weights):
        raise CheckpointError(
            f"{path}: has {len(unconditional_row)} averaged tensors for {len(weights)} weights"
        )
    for (name, raw), value in zip(weights.items(), unconditional_row, strict=True):
        if raw.shape != value.shape:
            raise CheckpointError(
                f"{path}: the averaged tensor for {name} has shape {list(value.shape)}, the weight"
                f" {list(raw.shape)}"
            )
    return dict(zip(weights, unconditional_row, strict=True))
