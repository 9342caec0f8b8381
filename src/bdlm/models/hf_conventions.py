"""What a transformers config says, and does not say, about a model as a denoiser.

In: a transformers config. Out: `Conventions`, a `ModelSpec`, or an error for a family that is not
supported. A family is added once its cached and two-stream passes are shown equal
(tests/models/test_hf.py). Knows nothing about forward passes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from bdlm.core.errors import ConfigError, UnsupportedError, shown
from bdlm.core.types import NOWHERE, ModelSpec
from bdlm.core.validation import Count, coerce, validate_fields

LEARNED_POSITIONS = ("gpt2",)  # families that look positions up in a table of fixed length
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


@dataclass(frozen=True)
class Conventions:
    """State what a transformers config does not say about a denoiser; kept in it as `bdlm`.

    mask_id: the mask token, or NOWHERE (-1) for a plain autoregressive model.
    shift: logits at i-1 predict i (adapted AR models).
    context: whether clean cells see their whole block.
    first_token, stop_token, other_stop_tokens: as in `ModelSpec`.
    Raises ConfigError for values out of range."""

    autoregressive: bool = False
    mask_id: int = NOWHERE
    block_size: Count = 4
    shift: bool = False
    context: Literal["block", "causal"] = "block"
    first_token: int | None = None
    stop_token: int | None = None
    other_stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        validate_fields(self)
        if not self.autoregressive and self.mask_id < 0:
            raise ConfigError(
                "a block denoiser needs mask_id; pass the id of its mask token, or"
                " autoregressive=True for a causal model"
            )


def spec_of(config: Any, vocabulary: int, own: Conventions) -> ModelSpec:
    """Return the conventions that core reads. Raises ConfigError for values out of range."""
    name = "max_position_embeddings"
    length = coerce(name, config.max_position_embeddings, Count)
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
        context="causal" if own.autoregressive else own.context,
        streams=1 if own.autoregressive else 2,
        first_token=own.first_token,
        stop_token=own.stop_token,
        other_stop_tokens=own.other_stop_tokens,
        supports=frozenset({"cache", "hidden", "attention", "soft", "overwrite"}),
        max_position=length if config.model_type in LEARNED_POSITIONS else None,
    )


def check_family(config: Any) -> None:
    """Raise UnsupportedError unless this model's attention depends only on a mask, positions and a
    cache."""
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


def conventions_of(model: Any) -> Conventions:
    """Read from a loaded model's config how it denoises; without such an entry it is
    autoregressive.

    The tokens that end its texts are those at which transformers' `generate` stops."""
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
    """Return one id, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)
