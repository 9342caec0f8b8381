"""The inference form of the native backbone: fewer and larger operations per forward pass, the same
function.

In: a `DiT` that is not conditioned on time. Out: a `Denoiser` over the same cache. The constant
adaLN vectors are multiplied into norms and matrices, residual additions into the products; all
rows' real cells go through the products together (`models.ragged_batching`); the last layer after
its attention, and the head, run on the queried cells alone. Passes that the ragged form does not
support (attention output, overwritten slots) are run by the model itself, on the same cache.

The weights are read when the form is made, into as much memory again (a large head once more in 8
bits when draws first need it, see `models.int8_head`). Call `for_inference` again after more
training."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdlm.core.errors import ConfigError
from bdlm.core.threads import fork_safe_lock
from bdlm.core.types import Denoiser, ModelSpec, Out, Soft, Step
from bdlm.models.attention import rotary_table
from bdlm.models.cache import KVCache
from bdlm.models.dit import Block, DiT
from bdlm.models.int8_head import Int8Head, is_worthwhile
from bdlm.models.ragged_batching import LayerView, RaggedBatch, make_ragged_batch

# cells of a pass up to which GELU is faster in one operation, and the product after it from the
# transposed layout
FEW = 8
SLOPE, CUBE = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form
_int8_lock = fork_safe_lock()  # threads that start together make the 8-bit head once
# a compiled part may return memory that its next run overwrites
_compiled_lock = fork_safe_lock()


@dataclass(frozen=True)
class InferenceLayer:
    """Hold one layer with its modulation multiplied in. Matrices are stored as the products read
    them, which is twice as fast for few cells.

    down_few: the last matrix again, unscaled and transposed, for passes of few cells."""

    norm1: tuple[Tensor, Tensor | None]
    qkv: Tensor
    out: Tensor
    norm2: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    down_few: Tensor

    @classmethod
    def of(cls, block: Block, c: Tensor | None) -> InferenceLayer:
        mod = block.modulation(c)
        flat = [] if mod is None else [m.flatten() for m in mod]
        one = torch.ones(1, dtype=block.attn_out.weight.dtype, device=block.attn_out.weight.device)
        gate1, gate2 = (flat[2], flat[5]) if flat else (one, one)
        up, _, down = block.mlp
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        last = down.weight * gate2[:, None]
        return cls(
            block.norm1.modulated(*flat[:2]),
            block.attn_qkv.weight.T.contiguous(),
            (block.attn_out.weight.T * gate1).contiguous(),
            block.norm2.modulated(*flat[3:5]),
            (up.weight.T.contiguous(), up.bias),
            ((last.T * 0.5).contiguous(), down.bias * gate2),  # half, because of `_twice_gelu`
            last.T,
        )


def attention_inputs(
    x: Tensor, layer: InferenceLayer, rotation: tuple[Tensor, Tensor], heads: int
) -> Tensor:
    """Return rotated queries and keys, and values, of cells x [T, d]: [T, 3, H, D]."""
    qkv = (F.layer_norm(x, x.shape[-1:], *layer.norm1) @ layer.qkv).view(len(x), 3, heads, -1)
    _rotate(qkv[:, :2], rotation)
    return qkv


def after_attention(x: Tensor, mixed: Tensor, layer: InferenceLayer, slope: Tensor) -> Tensor:
    """Run a layer after its attention: cells x and the heads' output, [T, d]. slope: SLOPE as a
    tensor."""
    x = torch.addmm(x, mixed, layer.out)
    h = torch.addmm(layer.up[1], F.layer_norm(x, x.shape[-1:], *layer.norm2), layer.up[0])
    x.add_(layer.down[1])
    if len(x) <= FEW:
        return torch.addmm(x, F.gelu(h, approximate="tanh"), layer.down_few)
    return torch.addmm(x, _twice_gelu(h, slope), layer.down[0])


def _twice_gelu(x: Tensor, slope: Tensor) -> Tensor:
    """Return twice the tanh form of GELU: x (1 + tanh(SLOPE (x + CUBE x^3))), in four operations;
    for many cells faster than torch's one. The factor one half is in the next matrix."""
    inner = torch.addcmul(slope, x, x, value=SLOPE * CUBE).mul_(x)
    return torch.addcmul(x, x, inner.tanh_())


def _compiled(part: Any, device: torch.device) -> Any:
    """Compile a part of a layer by torch.compile: a graph for each number of cells, shared by all
    layers; CUDA graphs on CUDA."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(
        part, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
    )


class _PerThread(threading.local):
    """Keep the layout of a thread's last pass without a cache. A copy or a pickle starts empty."""

    layout: _CallLayout | None = None

    def __reduce__(self) -> tuple[type[_PerThread], tuple[()]]:
        return _PerThread, ()


class InferenceDiT:
    """Run a `DiT` for inference. compile: compile the parts of a layer around its attention by
    torch.compile.

    Any number of threads may call it at once, each with caches of its own: a layout is kept by its
    cache, or by its thread if there is no cache; everything else is replaced as a whole, never
    changed."""

    @torch.inference_mode()
    def __init__(self, model: DiT, compile: bool = False) -> None:
        assert not model.spec.time_conditioned, (
            "a time-conditioned model has no constant modulation"
        )
        self.model, backbone = model, model.backbone
        self.embedding = backbone.vocab_embed.embedding
        c = model.conditioning()
        self.layers = [InferenceLayer.of(block, c) for block in model.layers]
        head = backbone.output_layer
        self.final = head.norm_final.modulated(
            *(() if c is None else head.adaLN_modulation(c).flatten().chunk(2))
        )
        self.head = (head.linear.weight.T.contiguous(), head.linear.bias)
        own = model.spec
        direct = own.prediction == "tokens" and own.noise == "mask" and not own.shift
        has_bounds = direct and is_worthwhile(head.linear.weight, head.linear.bias)
        self._spec = replace(
            own,
            supports=own.supports
            | ({"ragged_batching", "logit_bounds"} if has_bounds else {"ragged_batching"}),
        )
        self._int8_head: Int8Head | None = None
        self._slope = torch.tensor(SLOPE, dtype=self.embedding.dtype, device=self.embedding.device)
        self.compiled = compile
        make: Callable[[Any], Any] = (
            (lambda part: _compiled(part, self.device)) if compile else (lambda part: part)
        )
        self._attention_inputs, self._after_attention = (
            make(attention_inputs),
            make(after_attention),
        )
        self.heads, self.head_dim = model.config.n_heads, model.head_dim
        self._own = _PerThread()
        # for texts of usual length; `_rotation` extends it for longer ones
        self._rotary = _rotary(min(model.config.model_length, 4096), self.head_dim, self.embedding)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def int8_head(self) -> Int8Head:
        """Return the head in 8 bits, made at the first use."""
        with _int8_lock:
            if self._int8_head is None:
                linear = self.model.head
                self._int8_head = Int8Head(
                    linear.weight.detach(), linear.bias.detach(), self._spec.mask_id
                )
            return self._int8_head

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return self.model.new_cache(rows, capacity)

    @torch.inference_mode()
    def step(self, step: Step, cache: KVCache | None = None) -> Out:
        """Run a pass as `DiT.step` does, if it promises `Step.append_only` or
        `Step.full_attention`; the model itself runs the others."""
        layout = self._layout(step, cache)
        if layout is None:
            return self._by_model(step, cache)
        if not self.compiled:
            return self._step_ragged(step, cache, layout)
        with _compiled_lock:
            # the results of the last run's graphs are no longer needed
            torch.compiler.cudagraph_mark_step_begin()
            return self._step_ragged(step, cache, layout)

    def _step_ragged(self, step: Step, cache: KVCache | None, layout: _CallLayout) -> Out:
        """Run the pass under a layout."""
        assert step.query_mask is not None
        query_index = layout.index_in_batch(step.query_mask.flatten().nonzero()[:, 0])
        x = self._trunk(self._embed(step, layout.batch.order), layout, query_index)
        if cache is not None and step.write is not None:
            cache.slots.record(step)
        h = F.layer_norm(x, x.shape[-1:], *self.final)
        logits = torch.addmm(self.head[1], h, self.head[0]) if "logits" in step.outputs else None
        bounds = self.int8_head(h) if "logit_bounds" in step.outputs else None
        return Out(logits, h if "hidden" in step.outputs else None, logit_bounds=bounds)

    def _by_model(self, step: Step, cache: KVCache | None) -> Out:
        """Run the pass by the model itself."""
        if "logit_bounds" not in step.outputs:
            return self.model.step(step, cache)
        out = self.model.step(replace(step, outputs=step.outputs | {"hidden"}), cache)
        assert out.hidden is not None
        return replace(out, logit_bounds=self.int8_head(out.hidden))

    def _embed(self, step: Step, order: Tensor | None) -> Tensor:
        pick = (lambda t: t.flatten(0, 1)) if order is None else (lambda t: t.flatten(0, 1)[order])
        if step.soft is None:
            return F.embedding(pick(step.ids), self.embedding)
        soft = Soft(pick(step.soft.ids), pick(step.soft.weight), step.soft.keep_norm)
        return self.model.backbone.vocab_embed(pick(step.ids), soft)

    def _trunk(self, x: Tensor, layout: _CallLayout, query_index: Tensor) -> Tensor:
        """Run the ragged batch [T, d] through the layers; returns the queried cells [M, d]."""
        batch, last = layout.batch, len(self.layers) - 1
        only_noisy = self.spec.noise != "none"
        for i, (layer, view) in enumerate(zip(self.layers, layout.layer_views, strict=True)):
            qkv = self._attention_inputs(x, layer, layout.rotation, self.heads)
            batch.store(view, qkv[:, 1:])
            if i == last:
                if not len(query_index):
                    return x[:0]
                mixed = batch.attend(qkv[:, 0], view, only_noisy)[query_index]
                x = x[query_index]
            else:
                mixed = batch.attend(qkv[:, 0], view)
            x = self._after_attention(x, mixed, layer, self._slope)
        return x

    # -- layout ------------------------------------------------------------------------------------

    def _layout(self, step: Step, cache: KVCache | None) -> _CallLayout | None:
        """Return the layout of this pass: the last one if it still fits, None if the model itself
        must run the pass."""
        promised = step.append_only or (step.full_attention and step.write is None)
        if not promised or step.query_mask is None or "attention" in step.outputs:
            return None
        last = self._last(cache)
        if last is not None and last.fits(step, cache):
            return last
        rows = step.shape[0]
        lengths = (
            torch.zeros(rows, dtype=torch.long, device=self.device)
            if cache is None
            else cache.slots.length
        )
        batch = make_ragged_batch(step, lengths, self.embedding.dtype)
        if cache is not None and batch.extent > cache.memory.shape[4]:
            cache.reserve(batch.open)
            if batch.extent > cache.memory.shape[4]:
                return None
        position = step.position.expand(step.shape).flatten()
        rotation = self._rotation(position if batch.order is None else position[batch.order])
        if cache is None:  # all layers share one layer's memory
            buffer = self.embedding.new_zeros(2, 1, rows, self.heads, batch.extent, self.head_dim)
            memory = buffer.expand(-1, len(self.layers), -1, -1, -1, -1)
        else:
            memory = cache.memory
        layout = _CallLayout(step, cache, batch, rotation, batch.layer_views(memory))
        if cache is None:
            self._own.layout = layout
        else:
            cache.last_layout = self, layout
        return layout

    def _last(self, cache: KVCache | None) -> _CallLayout | None:
        """Return the layout of this thread's last pass without a cache, or of the last pass on this
        cache."""
        if cache is None:
            return self._own.layout
        maker, layout = cache.last_layout
        return layout if maker is self else None

    def _rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and signed sines of the cells of a ragged batch, [T, 1, 1, D] each."""
        last, table = int(position.max()), self._rotary
        if last >= table[0].shape[0]:
            table = self._rotary = _rotary(2 * last, self.head_dim, self.embedding)
        return table[0][position], table[1][position]


class _CallLayout:
    """Hold a layout and what it was made from. The step's tensors are kept, so that "the same
    tensors" means the same numbers.

    cache: the one that keeps the layout; the layout holds no reference to it, so that both are
    freed with the text."""

    def __init__(
        self,
        step: Step,
        cache: KVCache | None,
        batch: RaggedBatch,
        rotation: tuple[Tensor, Tensor],
        layer_views: list[LayerView],
    ) -> None:
        self.step, self.version = step, 0 if cache is None else cache.slots.version
        self.memory = None if cache is None else cache.memory
        self.batch = batch
        self.rotation = rotation
        self.layer_views = layer_views
        self.inverse: Tensor | None = None
        if batch.order is not None:
            self.inverse = torch.zeros(step.ids.numel(), dtype=torch.long, device=step.ids.device)
            self.inverse[batch.order] = torch.arange(len(batch.order), device=step.ids.device)

    def fits(self, step: Step, cache: KVCache | None) -> bool:
        """Return whether a later pass of its thread, or on its cache, has the same layout: the
        tensors are the same, nothing is written, and the cache has not changed."""
        if step.write is not None or self.step.write is not None:
            return False
        same = all(
            getattr(step, n) is getattr(self.step, n)
            for n in ("position", "rank", "group", "limit", "doc")
        )
        return same and (
            cache is None or (cache.slots.version == self.version and cache.memory is self.memory)
        )

    def index_in_batch(self, cells: Tensor) -> Tensor:
        """Return the index in the ragged batch of cells of the flattened rectangle."""
        return cells if self.inverse is None else self.inverse[cells]


def _rotary(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a rotary table [length, 1, 1, D]; the sines carry the sign of the rotate-half form."""
    cos, sin = rotary_table(torch.arange(length, device=like.device)[None], head_dim, like.dtype)
    sign = torch.ones(head_dim, dtype=like.dtype, device=like.device)
    sign[: head_dim // 2] = -1
    return cos[0, 0, :, None, None], sin[0, 0, :, None, None] * sign


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> None:
    """Rotate [T, 2, H, D] in place, in the rotate-half form: the halves swap under signed sines."""
    half = x.shape[-1] // 2
    other = torch.cat((x[..., half:], x[..., :half]), -1)
    x.mul_(table[0]).addcmul_(other, table[1])


def num_weights(model: Denoiser) -> int:
    """Return how many weights a model has, in any form."""
    native = model.model if isinstance(model, InferenceDiT) else model
    return sum(p.numel() for p in native.parameters()) if isinstance(native, nn.Module) else 0


def for_inference(model: Denoiser, compile: bool = False) -> Denoiser:
    """Return the inference form of a model: `InferenceDiT` if it is native and its modulation is
    constant, else the model itself.

    compile: run it by torch.compile. Raises ConfigError for a model that has no inference form."""
    if isinstance(model, DiT) and not model.spec.time_conditioned:
        return InferenceDiT(model, compile)
    if compile and not (isinstance(model, InferenceDiT) and model.compiled):
        raise ConfigError(
            "compile is True, but only native models without time conditioning are compiled for"
            " writing; leave it out"
        )
    return model
