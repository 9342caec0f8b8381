"""Any transformers causal language model of a known family as a denoiser, by its own forward: no
model code is copied.

In: a `Step`. Out: an `Out`. The model is told who may see whom by a boolean 4-D attention mask, and
where each cell stands by explicit position ids; its keys and values live in transformers' own
cache. With `autoregressive` it is the causal model that it was; else a block denoiser, whose
weights have to be adapted first. The dense mask grows with the square of the cells.

A family is allowed once its cached and two-stream passes were shown equal
(tests/models/test_hf.py); others are refused by name. Knows nothing about noise, losses or
sampling."""

from __future__ import annotations

import copy
import inspect
import itertools
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdlm.core import manifest
from bdlm.core.cache_slots import CacheSlots
from bdlm.core.errors import CheckpointError, ConfigError, UnsupportedError, shown
from bdlm.core.threads import lock
from bdlm.core.types import NOWHERE, ModelSpec, Out, Step
from bdlm.core.validation import validate_fields
from bdlm.core.visibility import Cells, additive, join, sees
from bdlm.models.hf_folder import read_model
from bdlm.models.soft import mixed_rows

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
REFUSED = {
    "baichuan": "ALiBi biases, which read the distance of cells from their order",
    "bloom": "ALiBi biases, which read the distance of cells from their order",
    "mpt": "ALiBi biases, which read the distance of cells from their order",
    "falcon": "ALiBi biases in some of its models",
    "gemma2": "soft caps and sliding layers",
    "gemma3_text": "sliding layers",
    "gemma3": "sliding layers",
    "gpt_oss": "sliding layers and attention sinks",
    "cohere2": "sliding layers",
    "olmo3": "sliding layers",
    "phi3": "sliding layers and rotary scaling by length",
    "mamba": "recurrent layers",
    "mamba2": "recurrent layers",
    "falcon_h1": "recurrent layers",
    "jamba": "recurrent layers",
    "qwen3_next": "recurrent layers",
    "recurrent_gemma": "recurrent layers",
    "rwkv": "recurrent layers",
}


# transformers' loading and its logging settings are the process's; an eager copy is made once
_LOCK = lock()


@dataclass(frozen=True)
class Conventions:
    """What a transformers config does not say about a denoiser; kept in it as `bdlm`.

    mask_id: the mask token, or NOWHERE (-1) for a plain autoregressive model. shift: logits at i-1
    predict i (adapted AR models).
    context: whether clean cells see their whole block. first_token, stop_token, other_stop_tokens:
    as in `ModelSpec`."""

    autoregressive: bool = False
    mask_id: int = NOWHERE
    block_size: int = 4
    shift: bool = False
    context: str = "block"
    first_token: int | None = None
    stop_token: int | None = None
    other_stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.context not in ("block", "causal"):
            raise ConfigError(f"context is '{self.context}'; use block or causal")
        if not self.autoregressive and self.mask_id < 0:
            raise ConfigError(
                "a block denoiser needs mask_id; pass the id of its mask token, or"
                " autoregressive=True for a causal model"
            )
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}; use 1 or more")


class HFCache:
    """transformers' `DynamicCache` with the slot table that our visibility needs: slot i is its key
    i."""

    def __init__(self, config: Any, rows: int, capacity: int, device: torch.device | str) -> None:
        from transformers import DynamicCache

        if capacity < 1:
            raise ConfigError(f"cache capacity is {capacity}; use at least 1 cell")
        self.storage: Any = DynamicCache(config=config)
        self.slots = CacheSlots(rows, capacity, device)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held now (it grows with the text)."""
        tensors = [t for layer in self._layers() for t in (layer.keys, layer.values)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _layers(self) -> list[Any]:
        return [layer for layer in self.storage.layers if layer.is_initialized]

    def trim(self) -> None:
        """Forget the keys behind the used slots: cells of a call that were not written, or slots
        freed since.

        Layer by layer: where a call raised half way, the first layers hold more than the others.
        """
        for layer in self._layers():
            beyond = layer.get_seq_length() - self.slots.used
            if beyond > 0:
                layer.crop(-beyond)  # negative: how many to remove

    def keep(self, step: Step, before: int, written: int) -> None:
        """After a call whose first `written` cells hold all that it writes: put those into their
        slots and forget the rest.

        before: keys that the cache held before the call.
        """
        assert step.write is not None
        target = step.write[:, :written]
        highest = int(target.max()) if written else NOWHERE
        if highest >= self.slots.capacity:
            raise ConfigError(f"the cache holds {self.slots.capacity} cells a row; allocate more")
        if not torch.equal(
            target, before + torch.arange(written, device=target.device).expand_as(target)
        ):
            self._scatter(target, before, max(before, highest + 1))
        self.slots.record(step)
        self.trim()

    def _scatter(self, target: Tensor, before: int, size: int) -> None:
        """Move new keys and values, which lie behind `before`, to slots that differ by row or were
        in use."""
        row, cell = (target >= 0).nonzero(as_tuple=True)
        slot = target[row, cell]
        for layer in self._layers():
            for name in ("keys", "values"):
                held = getattr(layer, name)
                new = held[row, :, before + cell]
                room = held.new_zeros(*held.shape[:2], max(0, size - before), held.shape[3])
                moved = torch.cat((held[:, :, :before], room), 2)
                moved[row, :, slot] = new
                setattr(layer, name, moved)

    def drop_first(self, count: int, rows: Tensor) -> None:
        """Forget the first `count` slots of the marked rows, bool [R] (sliding window; inexact from
        the first drop on)."""
        self.trim()
        for layer in self._layers():
            for name in ("keys", "values"):
                moved = getattr(layer, name).clone()
                moved[rows, :, : moved.shape[2] - count] = getattr(layer, name)[rows, :, count:]
                setattr(layer, name, moved)
        self.slots.shift(count, rows)
        self.trim()


class HFDenoiser(nn.Module):
    """A transformers causal LM under our contract. Its parameters and their names are the wrapped
    model's, under `model.`.

    Any number of threads may call it at once, each with caches of its own.
    """

    def __init__(self, model: Any, conventions: Conventions) -> None:
        """model: a transformers `...ForCausalLM` of a family in FAMILIES; UnsupportedError
        otherwise. Its attention is set to SDPA."""
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
        # of what tensors, and the model; in a tuple, so that it is not a part of this one
        self._eager: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_eager": ()}

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    def fit_tokenizer(self, first_token: int | None, unused_ids: frozenset[int]) -> None:
        """Take over what only the tokenizer knows.

        first_token: what it puts before every text, or None; used where the conventions name none.
        unused_ids: rows of the embedding without a token.
        """
        first = self._spec.first_token if self._spec.first_token is not None else first_token
        self._spec = replace(self._spec, first_token=first, unused_ids=unused_ids)

    @property
    def head(self) -> Any:
        """The linear head, for losses that never build the logits."""
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
        """Final states [R, N, d] of all cells, and the attention among them where wanted. The cache
        keeps only what is written."""
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
            out, attention = self._watched(inputs, visible, position, options)
        if cache is not None and step.write is not None:
            cache.keep(step, before, written)
        elif cache is not None:
            cache.trim()
        return out.last_hidden_state, attention

    def _watched(
        self, inputs: Tensor, visible: Tensor, position: Tensor, options: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """A pass that shows its attention: eager kernels, which want an additive mask."""
        mask = additive(visible, inputs.dtype)
        out = self._eager().base_model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=position,
            use_cache=bool(options),
            output_attentions=True,
            **options,
        )
        cells = inputs.shape[1]
        return out, torch.stack([a.float().mean(1)[:, :, -cells:] for a in out.attentions]).mean(0)

    def _eager(self) -> Any:
        """The model with eager kernels: other modules over the same tensors, so that calls of other
        threads keep the kernels they have."""
        with _LOCK:
            tensors = list(itertools.chain(self.model.parameters(), self.model.buffers()))
            now = list(map(id, tensors))
            if not self._eager or self._eager[0] != now:
                eager_copy = copy.deepcopy(self.model, {id(t): t for t in tensors})
                eager_copy.set_attn_implementation("eager")
                self._eager = now, eager_copy
            eager_copy = self._eager[1]
            if eager_copy.training != self.training:
                eager_copy.train(self.training)
            return eager_copy

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model as transformers does (safetensors), with our conventions in its
        config.json."""
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
    """An order of the cells with all written ones first (None: as they are), and how many are
    written in any row."""
    if step.write is None:
        return None, 0
    kept = (step.write >= 0).any(0)
    count = int(kept.sum())
    if bool(kept[:count].all()):
        return None, count
    return torch.argsort((~kept).long(), stable=True), count


def reorder(step: Step, order: Tensor) -> Step:
    """The same cells in another order; `at` and `leading` are left out."""
    names = ("ids", "position", "rank", "group", "limit", "doc", "write", "time")
    fields = {n: v[:, order] for n in names if (v := getattr(step, n)) is not None}
    soft = (
        None
        if step.soft is None
        else replace(step.soft, ids=step.soft.ids[:, order], weight=step.soft.weight[:, order])
    )
    return replace(step, **fields, soft=soft, query_mask=None, num_queries=None)


def spec_of(config: Any, vocabulary: int, own: Conventions) -> ModelSpec:
    """The conventions that core reads. Raises ConfigError for values outside their range."""
    length = config.max_position_embeddings
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"max_position_embeddings is {shown(length)}; it must be 1 or more")
    for name in ("first_token", "stop_token"):
        token = getattr(own, name)
        if token is not None and not 0 <= token < vocabulary:
            raise ConfigError(f"{name} is {token}, outside the vocabulary of {vocabulary}")
    return ModelSpec(
        vocab_size=vocabulary,
        mask_id=own.mask_id,
        block_size=1 if own.autoregressive else own.block_size,
        max_length=length,
        noise="none" if own.autoregressive else "mask",
        shift=own.autoregressive or own.shift,
        context="causal" if own.autoregressive else own.context,  # type: ignore[arg-type]
        streams=1 if own.autoregressive else 2,
        first_token=own.first_token,
        stop_token=own.stop_token,
        other_stop_tokens=own.other_stop_tokens,
        supports=frozenset({"cache", "hidden", "attention", "soft", "overwrite"}),
    )


def cache_keyword(base: Any) -> str:
    """The name that this version of transformers gives the cache argument."""
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def check_family(config: Any) -> None:
    """Raise UnsupportedError unless a mask, positions and a cache are all that this model's
    attention depends on."""
    kind = config.model_type
    if kind not in FAMILIES:
        reason = f" (it has {REFUSED[kind]})" if kind in REFUSED else ""
        raise UnsupportedError(
            f"transformers model_type '{kind}' is not supported{reason}; supported:"
            f" {', '.join(FAMILIES)}"
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention"}:
        raise UnsupportedError(
            f"this '{kind}' model has layers of type"
            f" {', '.join(sorted(layers - {'full_attention'}))}; only full attention is supported"
        )
    if getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    ):
        raise UnsupportedError(
            f"this '{kind}' model has a sliding window of {config.sliding_window}; only full"
            " attention is supported"
        )
    for name in (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "alibi",
        "scale_attn_by_inverse_layer_idx",
    ):
        if getattr(config, name, None):
            raise UnsupportedError(f"this '{kind}' model has {name}; it is not supported")
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"this '{kind}' model has rotary positions of type {rotary['rope_type']}, which change"
            " with the length of a call"
        )


def load_hf(
    folder: str | Path, conventions: Conventions | None = None, dtype: torch.dtype | None = None
) -> HFDenoiser:
    """A denoiser from a local transformers folder (safetensors), strictly: no tensor may be
    missing, left over or of another shape.

    conventions: default those kept in config.json by `HFDenoiser.save`; without any, the model is
    taken as autoregressive."""
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


def conventions_of(model: Any) -> Conventions:
    """What a loaded model's config says about denoising; without any word, it is autoregressive.

    The tokens that end its texts are those at which transformers' `generate` stops.
    """
    stored = getattr(model.config, "bdlm", None)
    if stored is None:
        ends = _token_ids(model.generation_config.eos_token_id) or _token_ids(
            model.config.eos_token_id
        )
        rows = model.get_input_embeddings().weight.shape[0]
        ends = [token for token in ends if 0 <= token < rows]
        return Conventions(
            True, stop_token=ends[0] if ends else None, other_stop_tokens=tuple(ends[1:])
        )
    known = [f.name for f in fields(Conventions)]
    if not isinstance(stored, dict) or (wrong := sorted(stored.keys() - set(known))):
        raise ConfigError(
            f"bdlm is {shown(stored)}; it may hold {', '.join(known)}"
            + (f", not {wrong[0]}" if isinstance(stored, dict) else "")
        )
    return Conventions(**stored)


def _token_ids(value: Any) -> list[int]:
    """One id, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)
