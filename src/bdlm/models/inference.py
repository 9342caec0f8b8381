"""The native backbone folded for inference: fewer and larger operations per call, the same
function.

In: a `DiT` that is not conditioned on time. Out: a `Denoiser` over the same cache. The constant
adaLN vectors are multiplied into norms and matrices, residual additions into the products; all
rows' real cells go through the products together (`models.ragged_batching`); the last layer after
its attention, and the head, run on the wanted cells alone. What the packed form does not cover
(attention output, overwritten slots) goes to the model itself, on the same cache.

The weights are read when it is made, into as much memory again (a large head once more in 8 bits
when draws first ask for it, see `models.int8_head`): fold again after training on."""

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
from bdlm.core.threads import lock
from bdlm.core.types import Denoiser, ModelSpec, Out, Soft, Step
from bdlm.models.attention import rotary_table
from bdlm.models.cache import KVCache
from bdlm.models.dit import Block, DiT
from bdlm.models.int8_head import Int8Head, worth_it
from bdlm.models.ragged_batching import Lane, Packing, pack

# cells of a call up to which GELU is quicker in one pass, and the product after it from the other
# layout
FEW = 8
SLOPE, CUBE = math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form
_making = lock()  # threads that start together make a large copy once
_replaying = lock()  # compiled parts may answer in memory that their next call writes over


@dataclass(frozen=True)
class Layer:
    """One layer with its modulation multiplied in. Matrices are stored as the products read them,
    which is twice as fast for few cells.

    down_few: the last matrix once more, whole and in the other layout, for calls of few cells.
    """

    norm1: tuple[Tensor, Tensor | None]
    qkv: Tensor
    out: Tensor
    norm2: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]
    down_few: Tensor

    @classmethod
    def of(cls, block: Block, c: Tensor | None) -> Layer:
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
            ((last.T * 0.5).contiguous(), down.bias * gate2),  # the half belongs to `_twice_gelu`
            last.T,
        )


def entering(x: Tensor, layer: Layer, rotation: tuple[Tensor, Tensor], heads: int) -> Tensor:
    """Rotated queries and keys, and values, of cells x [T, d]: [T, 3, H, D]."""
    qkv = (F.layer_norm(x, x.shape[-1:], *layer.norm1) @ layer.qkv).view(len(x), 3, heads, -1)
    _rotate(qkv[:, :2], rotation)
    return qkv


def leaving(x: Tensor, mixed: Tensor, layer: Layer, slope: Tensor) -> Tensor:
    """A layer after its attention: cells x and what their heads mixed, [T, d]. slope: SLOPE as a
    tensor."""
    x = torch.addmm(x, mixed, layer.out)
    h = torch.addmm(layer.up[1], F.layer_norm(x, x.shape[-1:], *layer.norm2), layer.up[0])
    x.add_(layer.down[1])
    if len(x) <= FEW:
        return torch.addmm(x, F.gelu(h, approximate="tanh"), layer.down_few)
    return torch.addmm(x, _twice_gelu(h, slope), layer.down[0])


def _twice_gelu(x: Tensor, slope: Tensor) -> Tensor:
    """Twice the tanh form of GELU: x (1 + tanh(SLOPE (x + CUBE x^3))), in four passes, for many
    cells quicker than torch's one. The half is in the next matrix."""
    inner = torch.addcmul(slope, x, x, value=SLOPE * CUBE).mul_(x)
    return torch.addcmul(x, x, inner.tanh_())


def _compiled(part: Any, device: torch.device) -> Any:
    """A part of a layer by torch.compile: a graph for each number of cells, which serves all
    layers; CUDA graphs where there is CUDA."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(
        part, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None
    )


class _PerThread(threading.local):
    """The layout of a thread's last call without a cache. Neither copied nor pickled with its
    model."""

    held: _Held | None = None

    def __reduce__(self) -> tuple[type[_PerThread], tuple[()]]:
        return _PerThread, ()


class InferenceDiT:
    """A `DiT` as a function of steps, for inference. compile: the parts of a layer around its
    attention by torch.compile.

    Any number of threads may call it at once, each with caches of its own: a layout is kept by its
    cache, or by its thread where there is no cache, and everything else is only ever replaced
    whole."""

    @torch.inference_mode()
    def __init__(self, model: DiT, compile: bool = False) -> None:
        assert not model.spec.time_conditioned, (
            "a time-conditioned model has no constant modulation"
        )
        self.model, backbone = model, model.backbone
        self.embedding = backbone.vocab_embed.embedding
        c = model.conditioning()
        self.layers = [Layer.of(block, c) for block in model.layers]
        head = backbone.output_layer
        self.final = head.norm_final.modulated(
            *(() if c is None else head.adaLN_modulation(c).flatten().chunk(2))
        )
        self.head = (head.linear.weight.T.contiguous(), head.linear.bias)
        own = model.spec
        direct = own.prediction == "tokens" and own.noise == "mask" and not own.shift
        screened = direct and worth_it(head.linear.weight, head.linear.bias)
        self._spec = replace(
            own,
            supports=own.supports
            | ({"ragged_batching", "logit_bounds"} if screened else {"ragged_batching"}),
        )
        self._screen: Int8Head | None = None
        self._slope = torch.tensor(SLOPE, dtype=self.embedding.dtype, device=self.embedding.device)
        self.compiled = compile
        made: Callable[[Any], Any] = (
            (lambda part: _compiled(part, self.device)) if compile else (lambda part: part)
        )
        self._entering, self._leaving = made(entering), made(leaving)
        self.heads, self.head_dim = model.config.n_heads, model.head_dim
        self._own = _PerThread()
        # for texts of usual length; `_rotation` makes more when a text needs it
        self._rotary = _rotary(min(model.config.model_length, 4096), self.head_dim, self.embedding)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def screen(self) -> Int8Head:
        """The head in 8 bits, made when it is first asked for."""
        with _making:
            if self._screen is None:
                linear = self.model.head
                self._screen = Int8Head(
                    linear.weight.detach(), linear.bias.detach(), self._spec.mask_id
                )
            return self._screen

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        return self.model.new_cache(rows, capacity)

    @torch.inference_mode()
    def step(self, step: Step, cache: KVCache | None = None) -> Out:
        """As `DiT.step`, for calls that keep `Step.appends` or `Step.full`; others are made by the
        model itself."""
        held = self._layout(step, cache)
        if held is None:
            return self._by_model(step, cache)
        if not self.compiled:
            return self._packed(step, cache, held)
        with _replaying:
            # what the last call's graphs gave is done with
            torch.compiler.cudagraph_mark_step_begin()
            return self._packed(step, cache, held)

    def _packed(self, step: Step, cache: KVCache | None, held: _Held) -> Out:
        """The call under a layout."""
        assert step.query_mask is not None
        wanted = held.packed(step.query_mask.flatten().nonzero()[:, 0])
        x = self._trunk(self._embed(step, held.packing.order), held, wanted)
        if cache is not None and step.write is not None:
            cache.slots.record(step)
        h = F.layer_norm(x, x.shape[-1:], *self.final)
        logits = torch.addmm(self.head[1], h, self.head[0]) if "logits" in step.outputs else None
        rough = self.screen(h) if "logit_bounds" in step.outputs else None
        return Out(logits, h if "hidden" in step.outputs else None, logit_bounds=rough)

    def _by_model(self, step: Step, cache: KVCache | None) -> Out:
        """The call made by the model itself."""
        if "logit_bounds" not in step.outputs:
            return self.model.step(step, cache)
        out = self.model.step(replace(step, outputs=step.outputs | {"hidden"}), cache)
        assert out.hidden is not None
        return replace(out, logit_bounds=self.screen(out.hidden))

    def _embed(self, step: Step, order: Tensor | None) -> Tensor:
        pick = (lambda t: t.flatten(0, 1)) if order is None else (lambda t: t.flatten(0, 1)[order])
        if step.soft is None:
            return F.embedding(pick(step.ids), self.embedding)
        soft = Soft(pick(step.soft.ids), pick(step.soft.weight), step.soft.keep_norm)
        return self.model.backbone.vocab_embed(pick(step.ids), soft)

    def _trunk(self, x: Tensor, held: _Held, wanted: Tensor) -> Tensor:
        """Packed cells [T, d] through the layers; the wanted ones [M, d] come out."""
        packing, last = held.packing, len(self.layers) - 1
        only_noisy = self.spec.noise != "none"
        for i, (layer, lane) in enumerate(zip(self.layers, held.lanes, strict=True)):
            qkv = self._entering(x, layer, held.rotation, self.heads)
            packing.store(lane, qkv[:, 1:])
            if i == last:
                if not len(wanted):
                    return x[:0]
                mixed = packing.attend(qkv[:, 0], lane, only_noisy)[wanted]
                x = x[wanted]
            else:
                mixed = packing.attend(qkv[:, 0], lane)
            x = self._leaving(x, mixed, layer, self._slope)
        return x

    # -- layout ------------------------------------------------------------------------------------

    def _layout(self, step: Step, cache: KVCache | None) -> _Held | None:
        """How this call is laid out: as the last one if nothing moved, None if the model itself
        must make it."""
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
        packing = pack(step, lengths, self.embedding.dtype)
        if cache is not None and packing.extent > cache.memory.shape[4]:
            cache.reserve(packing.open)
            if packing.extent > cache.memory.shape[4]:
                return None
        position = step.position.expand(step.shape).flatten()
        rotation = self._rotation(position if packing.order is None else position[packing.order])
        if cache is None:  # one layer's room serves them all
            room = self.embedding.new_zeros(2, 1, rows, self.heads, packing.extent, self.head_dim)
            memory = room.expand(-1, len(self.layers), -1, -1, -1, -1)
        else:
            memory = cache.memory
        held = _Held(step, cache, packing, rotation, packing.lanes(memory))
        if cache is None:
            self._own.held = held
        else:
            cache.layout = self, held
        return held

    def _last(self, cache: KVCache | None) -> _Held | None:
        """The layout of this thread's last call without a cache, or of the last call on this
        cache."""
        if cache is None:
            return self._own.held
        maker, held = cache.layout
        return held if maker is self else None

    def _rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of packed cells, [T, 1, 1, D] each."""
        last, table = int(position.max()), self._rotary
        if last >= table[0].shape[0]:
            table = self._rotary = _rotary(2 * last, self.head_dim, self.embedding)
        return table[0][position], table[1][position]


class _Held:
    """A layout and what it was made from. The step's tensors are kept, so that "the same tensors"
    means the same numbers.

    cache: the one that keeps it; it is not kept in turn, so that both go when the text is written.
    """

    def __init__(
        self,
        step: Step,
        cache: KVCache | None,
        packing: Packing,
        rotation: tuple[Tensor, Tensor],
        lanes: list[Lane],
    ) -> None:
        self.step, self.version = step, 0 if cache is None else cache.slots.version
        self.memory = None if cache is None else cache.memory
        self.packing, self.rotation, self.lanes = packing, rotation, lanes
        self.inverse: Tensor | None = None
        if packing.order is not None:
            self.inverse = torch.zeros(step.ids.numel(), dtype=torch.long, device=step.ids.device)
            self.inverse[packing.order] = torch.arange(len(packing.order), device=step.ids.device)

    def fits(self, step: Step, cache: KVCache | None) -> bool:
        """Whether a later call of its thread, or on its cache, is laid out alike.

        It is where the tensors are the same, nothing is written, and the cache is as it was.
        """
        if step.write is not None or self.step.write is not None:
            return False
        same = all(
            getattr(step, n) is getattr(self.step, n)
            for n in ("position", "rank", "group", "limit", "doc")
        )
        return same and (
            cache is None or (cache.slots.version == self.version and cache.memory is self.memory)
        )

    def packed(self, cells: Tensor) -> Tensor:
        """Packed index of cells of the flattened rectangle."""
        return cells if self.inverse is None else self.inverse[cells]


def _rotary(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary table [length, 1, 1, D]; the sines carry the sign of the rotate-half form."""
    cos, sin = rotary_table(torch.arange(length, device=like.device)[None], head_dim, like.dtype)
    sign = torch.ones(head_dim, dtype=like.dtype, device=like.device)
    sign[: head_dim // 2] = -1
    return cos[0, 0, :, None, None], sin[0, 0, :, None, None] * sign


def _rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> None:
    """Rotate-half form of [T, 2, H, D], in place: the halves trade places under signed sines."""
    half = x.shape[-1] // 2
    other = torch.cat((x[..., half:], x[..., :half]), -1)
    x.mul_(table[0]).addcmul_(other, table[1])


def weights_of(model: Denoiser) -> int:
    """How many weights a model has, folded or not."""
    whole = model.model if isinstance(model, InferenceDiT) else model
    return sum(p.numel() for p in whole.parameters()) if isinstance(whole, nn.Module) else 0


def fold(model: Denoiser, compile: bool = False) -> Denoiser:
    """The inference form of a model: folded if it is native and its modulation is constant, else
    the model itself.

    compile: by torch.compile where it is folded; ConfigError where it is not.
    """
    if isinstance(model, DiT) and not model.spec.time_conditioned:
        return InferenceDiT(model, compile)
    if compile and not (isinstance(model, InferenceDiT) and model.compiled):
        raise ConfigError(
            "compile is True, but only native models without time conditioning are compiled for"
            " writing; leave it out"
        )
    return model
