"""Reads a transformers folder: its config, its sizes against its file, then its weights.

In: a folder of unknown origin. Out: a transformers causal model, or a CheckpointError in one line,
whatever the config says. Memory use follows the weights file, never the config: the model is built
without memory first (on the meta device) and compared with the safetensors headers. No code of the
folder is run and nothing is downloaded. Knows nothing about denoisers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bdlm.core.errors import BdlmError, CheckpointError, shown
from bdlm.core.threads import fork_safe_lock
from bdlm.models.safetensors_io import Stored, check_dtype, one_line, read_config, read_headers

LAYERS = ("num_hidden_layers", "n_layer")
_LOCK = fork_safe_lock()
UNUSED = ("num_labels", "id2label", "label2id", "problem_type", "auto_map")  # not used by an LM


def read_model(folder: Path, dtype: torch.dtype | None, check: Callable[[Any], None]) -> Any:
    """Return the transformers model of a folder in eval mode.

    dtype: default that of the stored weights.
    check: raises for a config that is not supported.
    Raises CheckpointError for anything that transformers cannot load, and for any tensor that is
    missing, unexpected, of another shape or type, NaN or infinite."""
    raw = read_config(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder}: holds an adapter; merge it into its model and save that")
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: quantized weights are not supported; use the original")
    stored = read_headers(folder)
    for name in LAYERS:
        layers = raw.get(name)
        if isinstance(layers, int) and layers > len(stored):
            raise CheckpointError(
                f"{folder}: config.json says {name} {layers}, but the file has only "
                f"{len(stored)} tensors; give the config.json of these weights"
            )
    try:
        with quiet():
            model, info = _read(folder, raw, stored, dtype, check)
    except BdlmError:
        raise
    except Exception as error:  # on a foreign config transformers may raise anything
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
        raise CheckpointError(f"{folder}: transformers cannot load it ({reason})") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for key in sorted(k if isinstance(k, str) else k[0] for k in info[kind]):
            raise CheckpointError(
                f"{folder}: tensor {key} is {kind.split('_')[0]}; nothing was loaded"
            )
    for name, value in model.state_dict().items():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{folder}: tensor {name} has NaN or infinite values")
    return model.eval()


def _read(
    folder: Path,
    raw: dict[str, Any],
    stored: dict[str, Stored],
    dtype: torch.dtype | None,
    check: Callable[[Any], None],
) -> tuple[Any, dict[str, Any]]:
    """Return the model, and transformers' report of the load."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    own = {name: value for name, value in raw.items() if name not in UNUSED}
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(own)
    check(config)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        _compare(kind(config), stored, folder)
    return kind.from_pretrained(
        folder,
        config=config,
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        local_files_only=True,
    )


def _compare(model: Any, stored: dict[str, Stored], folder: Path) -> None:
    """Raise CheckpointError for a model (on the meta device) that needs more than its file holds.

    Older files name tensors without the model's own prefix, so that names are compared by their
    ends."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, value in model.named_parameters():
        short = name.partition(".")[2]
        found = stored.get(name, stored.get(short))
        if found is None:
            if name not in tied:
                raise CheckpointError(f"{folder}: tensor {name} is missing; nothing was loaded")
            continue
        check_dtype(name, found.dtype, folder)
        if list(value.shape) != found.shape:
            raise CheckpointError(
                f"{folder}: tensor {name} is mismatched: it has shape {found.shape}, config.json"
                f" asks for {shown(list(value.shape))}; nothing was loaded"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load tables: errors are reported in one line.

    One load at a time: these settings and the warning filters belong to the whole process."""
    from transformers.utils import logging

    with _LOCK:
        before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated names in a foreign config
                yield
        finally:
            logging.set_verbosity(before)
            if bars:
                logging.enable_progress_bar()
