"""Reads safetensors and fills a model with them, all or nothing.

In: a model folder or one .safetensors file. Out: its config and tensors as stored; a model with
every tensor replaced. A missing, unexpected, misshapen or non-finite tensor is an error that names
it: a partial load gives fluent nonsense. No pickle is opened. Knows nothing about the meaning of
the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bdlm.core.errors import CheckpointError
from bdlm.core.jsonfiles import parse_json, read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# types of weights and safetensors' names of them; types of eight bits need scales, which are not
# supported
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read config.json and all tensors of a model folder or of one .safetensors file, as stored.
    Raises CheckpointError; refuses pickles."""
    if path.is_file() and path.suffix in PICKLES:
        raise CheckpointError(_pickle_message(path))
    folder = path if path.is_dir() else path.parent
    files = weight_files(path)
    config = read_config(folder, files[0])
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(file))
    return config, tensors


def read_config(folder: Path, weights: Path | None = None) -> dict[str, Any]:
    """Read config.json of a folder, or the copy that `save` keeps in the weights' header for a
    single file."""
    file = folder / CONFIG
    if file.is_file():
        return read_json(file)
    text = _metadata(weights).get("config") if weights else None
    if text is None:
        raise CheckpointError(f"{folder}: has no {CONFIG}; give the folder that `save` wrote")
    return parse_json(text, f"config in the header of {weights}")


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, as stored, into memory of their own."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            names = list(handle.keys())  # the handle is not a mapping
            return {name: handle.get_tensor(name).clone() for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


class Stored(NamedTuple):
    """Hold what a safetensors header says of a tensor: its type by safetensors' name, and its
    shape."""

    dtype: str
    shape: list[int]


def read_headers(path: Path) -> dict[str, Stored]:
    """Read type and shape of every tensor of a model folder or of one .safetensors file, by name.

    No tensor is read. Raises CheckpointError for a damaged or missing file."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for file in weight_files(path):
        try:
            with safe_open(str(file), "pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (not a mapping)
                    part = handle.get_slice(name)
                    found[name] = Stored(part.get_dtype(), part.get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, error) from None
    return found


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{file}: damaged or not a safetensors file ({one_line(error)}); copy it again or take an"
        " earlier one"
    )


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a model: the given one, model.safetensors, or the shards of an
    index."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: is not a .safetensors file; give a model folder or its {WEIGHTS}"
            )
        return [path]
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        placed = read_json(path / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise CheckpointError(f"{path / INDEX}: has no weight_map of tensor names to files")
        shards = sorted(set(placed.values()))
        for shard in shards:
            if Path(shard).name != shard or not (path / shard).is_file():
                raise CheckpointError(
                    f"{path}: the index names '{shard}', which is not in the folder"
                )
        return [path / shard for shard in shards]
    pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(_pickle_message(pickles[0]))
    raise CheckpointError(f"{path}: has no {WEIGHTS}; give a model folder or its .safetensors file")


def _pickle_message(path: Path) -> str:
    return (
        f"{path}: is a pickle, which can run code when opened; convert it once with"
        " bdlm.models.lightning.convert_lightning(path, folder), which reads tensors only"
        " (weights_only), and load that folder"
    )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def check_dtype(name: str, dtype: torch.dtype | str, source: str | Path) -> None:
    """Raise CheckpointError unless weights of this type (or safetensors' name of it) are plain
    floats."""
    if dtype not in FLOATS and dtype not in FLOATS.values():
        known = ", ".join(str(each).removeprefix("torch.") for each in FLOATS)
        own = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{source}: tensor {name} is {own}; weights must be {known}")


def fill(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path = "checkpoint",
    dtype: torch.dtype | None = None,
) -> None:
    """Put every tensor into a model of exactly these names and shapes (which may be on the meta
    device).

    dtype: default the stored one, float32 if the tensors differ. Raises CheckpointError with the
    name of the first wrong tensor."""
    expected = model.state_dict()
    missing, unexpected = (
        sorted(expected.keys() - weights.keys()),
        sorted(weights.keys() - expected.keys()),
    )
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        extra = f"; it has {unexpected[0]} instead" if unexpected else ""
        raise CheckpointError(
            f"{source}: tensor {missing[0]}{more} is missing{extra}; nothing was loaded: give all"
            " files of one model"
        )
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{source}: tensor {unexpected[0]}{more} is unexpected; does config.json belong to"
            " these weights?"
        )
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            shapes = f"{list(value.shape)}, config.json asks for {list(expected[name].shape)}"
            raise CheckpointError(f"{source}: tensor {name} has shape {shapes}")
        check_dtype(name, value.dtype, source)
        if not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{source}: tensor {name} has NaN or infinite values; take an earlier checkpoint"
            )
    stored = {v.dtype for v in weights.values()}
    dtype = dtype or (stored.pop() if len(stored) == 1 else torch.float32)
    model.load_state_dict({n: v.to(dtype) for n, v in weights.items()}, strict=True, assign=True)
