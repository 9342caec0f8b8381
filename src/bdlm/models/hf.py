"""Wraps a transformers causal language model of a known family as a denoiser, through its own
forward.

In: a `Step`. Out: an `Out`. The model gets visibility as a boolean 4-D attention mask, and
positions as explicit position ids; its keys and values are in transformers' own cache. With
`autoregressive` it is the causal model that it was; else it is a block denoiser, and its weights
have to be adapted first. The dense mask grows with the square of the cells. Knows nothing about
noise, losses or sampling."""

from __future__ import annotations

import copy
import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdlm.core import manifest
from bdlm.core.errors import CheckpointError, ConfigError
from bdlm.core.threads import fork_safe_lock
from bdlm.core.types import ModelSpec, Out, Step
from bdlm.core.visibility import Cells, additive_mask, join, sees
from bdlm.models.hf_cache import HFCache, cache_keyword
from bdlm.models.hf_conventions import (
    FAMILIES,
    Conventions,
    check_family,
    conventions_of,
    spec_of,
)
from bdlm.models.hf_folder import read_model
from bdlm.models.soft import mixed_rows

__all__ = ["FAMILIES", "Conventions", "HFCache", "HFDenoiser", "load_hf", "reorder"]

# threads make the eager copy once
_LOCK = fork_safe_lock()


class HFDenoiser(nn.Module):
    """Run a transformers causal LM as a `Denoiser`. Its parameters and their names are the wrapped
    model's, under `model.`.

    Any number of threads may call it at once, each with caches of its own."""

    def __init__(self, model: Any, conventions: Conventions) -> None:
        """Wrap a model and set its attention to SDPA.

        model: a transformers `...ForCausalLM` of a family in FAMILIES; UnsupportedError otherwise.
        """
        super().__init__()
        check_family(model.config)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        if conventions.mask_id >= vocabulary:
            raise ConfigError(
                f"mask_id is {conventions.mask_id}, the model has {vocabulary} embeddings; resize"
                " them or choose a free id"
            )
        model.set_attn_implementation("sdpa")
        self.model, self.conventions = model, conventions
        self._keyword = cache_keyword(model.base_model)
        self._spec = spec_of(model.config, vocabulary, conventions)
        # ids of the tensors, and the copy; in a tuple, so that torch does not register it
        self._eager_copy: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_eager_copy": ()}

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def fit_tokenizer(self, first_token: int | None, unused_ids: frozenset[int]) -> None:
        """Take over what only the tokenizer knows.

        first_token: the token that it puts before every text, or None; used if the conventions name
        none.
        unused_ids: rows of the embedding without a token."""
        first = self._spec.first_token if self._spec.first_token is not None else first_token
        self._spec = replace(self._spec, first_token=first, unused_ids=unused_ids)

    @property
    def head(self) -> Any:
        """Return the linear head, for losses that never build the logits."""
        return self.model.get_output_embeddings()

    def new_cache(self, rows: int, capacity: int) -> HFCache:
        return HFCache(
            self.model.config, rows, capacity, self.model.get_input_embeddings().weight.device
        )

    def forward(self, step: Step, cache: HFCache | None = None) -> Out:
        return self.step(step, cache)

    def step(self, step: Step, cache: HFCache | None = None) -> Out:
        order, written = _written_first(step)
        moved = step if order is None else reorder(step, order)
        hidden, attention = self._forward(moved, cache, written)
        if order is not None:
            back = order.argsort()
            hidden = hidden[:, back]
            attention = None if attention is None else attention[:, back][:, :, back]
        if step.num_queries is not None:
            hidden = hidden[:, : step.num_queries]
        if step.query_mask is not None:
            hidden = hidden[step.query_mask[:, : hidden.shape[1]]]
        logits = self.head(hidden) if "logits" in step.outputs else None
        return Out(logits, hidden if "hidden" in step.outputs else None, attention)

    def _forward(
        self, step: Step, cache: HFCache | None, written: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return final states [R, N, d] of all cells, and the attention among them if requested.
        The cache keeps only written cells."""
        query = Cells.of(step).one_row_if_equal()
        key, options = query, {}
        if cache is not None:
            cache.trim()
            if cache.slots.used:
                key = join(cache.slots.cells(step), query)
            if cache.slots.used or step.write is not None:
                options = {self._keyword: cache.storage}
        before = 0 if cache is None else cache.slots.used
        embeddings = self.model.get_input_embeddings()
        inputs = (
            embeddings(step.ids) if step.soft is None else mixed_rows(embeddings.weight, step.soft)
        )
        visible = sees(query, key)
        position = step.position.expand(step.shape)
        if "attention" not in step.outputs:
            out = self.model.base_model(
                inputs_embeds=inputs,
                attention_mask=visible[:, None],
                position_ids=position,
                use_cache=bool(options),
                **options,
            )
            attention = None
        else:
            out, attention = self._forward_with_attention(inputs, visible, position, options)
        if cache is not None and step.write is not None:
            cache.keep(step, before, written)
        elif cache is not None:
            cache.trim()
        return out.last_hidden_state, attention

    def _forward_with_attention(
        self, inputs: Tensor, visible: Tensor, position: Tensor, options: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """Run a pass that returns its attention: eager kernels, which take an additive mask."""
        mask = additive_mask(visible, inputs.dtype)
        out = self._eager_model().base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=position,
            use_cache=bool(options),
            output_attentions=True,
            **options,
        )
        cells = inputs.shape[1]
        return out, torch.stack([a.float().mean(1)[:, :, -cells:] for a in out.attentions]).mean(0)

    def _eager_model(self) -> Any:
        """Return the model with eager kernels: other modules over the same tensors, so that other
        threads keep their kernels."""
        with _LOCK:
            tensors = list(itertools.chain(self.model.parameters(), self.model.buffers()))
            now = list(map(id, tensors))
            if not self._eager_copy or self._eager_copy[0] != now:
                eager_copy = copy.deepcopy(self.model, {id(t): t for t in tensors})
                eager_copy.set_attn_implementation("eager")
                self._eager_copy = now, eager_copy
            eager_copy = self._eager_copy[1]
            if eager_copy.training != self.training:
                eager_copy.train(self.training)
            return eager_copy

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model as transformers does (safetensors), with our conventions in its
        config.json. Raises CheckpointError if the folder holds a model, unless `overwrite`."""
        folder = Path(folder)
        if (folder / "config.json").exists() and not overwrite:
            raise CheckpointError(
                f"{folder}: already holds a model; choose another folder or pass overwrite"
            )
        self.model.config.bdlm = asdict(self.conventions)
        (folder / manifest.MANIFEST).unlink(missing_ok=True)
        self.model.save_pretrained(folder)
        manifest.record(folder)
        return folder


def _written_first(step: Step) -> tuple[Tensor | None, int]:
    """Return an order of the cells with all written ones first (None: unchanged), and how many are
    written in any row."""
    if step.write is None:
        return None, 0
    kept = (step.write >= 0).any(0)
    count = int(kept.sum())
    if bool(kept[:count].all()):
        return None, count
    return torch.argsort((~kept).long(), stable=True), count


def reorder(step: Step, order: Tensor) -> Step:
    """Return the same cells in another order; `query_mask` and `num_queries` are dropped."""
    names = ("ids", "position", "rank", "group", "limit", "doc", "write", "time")
    fields = {n: v[:, order] for n in names if (v := getattr(step, n)) is not None}
    soft = (
        None
        if step.soft is None
        else replace(step.soft, ids=step.soft.ids[:, order], weight=step.soft.weight[:, order])
    )
    return replace(step, **fields, soft=soft, query_mask=None, num_queries=None)


def load_hf(
    folder: str | Path, conventions: Conventions | None = None, dtype: torch.dtype | None = None
) -> HFDenoiser:
    """Load a denoiser from a local transformers folder (safetensors), strictly: no tensor may be
    missing, unexpected or of another shape.

    conventions: default those kept in config.json by `HFDenoiser.save`; without any, the model is
    autoregressive.
    Raises CheckpointError in one line."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; give a folder that save_pretrained wrote"
        )
    model = read_model(folder, dtype, check_family)
    try:
        conventions = conventions or conventions_of(model)
        return HFDenoiser(model, conventions).eval()
    except ConfigError as error:  # of the folder's own config
        raise CheckpointError(f"{folder}: config.json: {error}") from None
