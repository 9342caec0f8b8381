"""The native transformer as a transformers model: `BD3LMConfig` and `BD3LM`, with save_pretrained,
from_pretrained, Auto classes.

In: token ids, as the released class is called. Out: logits, or a `MaskedLMOutput`. The tensors and
their names are those of `models.dit`, so a folder written by either side is read by the other;
`BD3LM` is a `DiT`, so it is a denoiser too. `register()` makes AutoConfig, AutoModel and
AutoModelForMaskedLM know it. Knows nothing about noise schedules or sampling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import MaskedLMOutput

from bdlm.core import manifest
from bdlm.core.blockmap import Contiguous, make_layout
from bdlm.core.errors import CheckpointError, UnsupportedError
from bdlm.core.objectives import log_probs
from bdlm.core.types import CLEAN, NOWHERE, Layout, Step
from bdlm.models.dit import DiT, DiTConfig, Embedding, Norm
from bdlm.models.model_folder import algorithm


class BD3LMConfig(PretrainedConfig):
    """config.json of a native model. Defaults are the published ones (the paper's OpenWebText
    models)."""

    model_type = "bd3lm"

    def __init__(
        self,
        vocab_size: int = 50258,
        mask_id: int | None = None,
        hidden_dim: int = 768,
        n_blocks: int = 12,
        n_heads: int = 12,
        cond_dim: int = 128,
        model_length: int = 1024,
        block_size: int = 1,
        dropout: float = 0.1,
        algo: str | None = None,
        context: str = "block",
        first_token: int | None = None,
        stop_token: int | None = None,
        **others: Any,
    ) -> None:
        """mask_id: default the last id. algo: default by the published flags cross_attn and causal.
        others: kept as they are."""
        self.vocab_size, self.mask_id = vocab_size, vocab_size - 1 if mask_id is None else mask_id
        self.hidden_dim, self.n_blocks, self.n_heads, self.cond_dim = (
            hidden_dim,
            n_blocks,
            n_heads,
            cond_dim,
        )
        self.model_length, self.block_size, self.dropout = model_length, block_size, dropout
        self.algo = algo or algorithm({**others, "model_type": "bd3lm"})
        self.context, self.first_token, self.stop_token = context, first_token, stop_token
        others = {
            "cross_attn": self.algo == "bd3lm",
            "causal": self.algo == "ar",
            "time_conditioning": self.algo == "sedd",
            **others,
        }
        self.adaln = self.algo != "ar"
        others.pop("adaln", None)
        super().__init__(**{"tie_word_embeddings": False, **others})

    def dit(self) -> DiTConfig:
        """The same sizes and conventions as the native transformer reads them; ConfigError where
        they do not fit."""
        return DiTConfig(**{name: getattr(self, name) for name in DiTConfig.__dataclass_fields__})


class BD3LM(DiT, PreTrainedModel):  # type: ignore[misc]
    """The paper's transformer under transformers' interface.

    `forward` is the published call; `step` and `new_cache` are the denoiser's, which generation
    uses."""

    config_class = BD3LMConfig
    config: BD3LMConfig  # type: ignore[assignment]
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers declares both as plain lists
    _keys_to_ignore_on_load_unexpected = [
        r"rotary_emb\.inv_freq$",
        r"^sampling_eps_(min|max)$",
    ]  # noqa: RUF012

    def __init__(self, config: BD3LMConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self._assemble(config.dit())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As transformers', but strict: a missing, unexpected or misshapen tensor is a
        CheckpointError, and pickles are not read."""
        told = options.pop("output_loading_info", False)
        options = {"use_safetensors": True, **options, "output_loading_info": True}
        model, info = cast(
            tuple["BD3LM", dict[str, Any]], super().from_pretrained(*args, **options)
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            for key in sorted(k if isinstance(k, str) else k[0] for k in info[kind]):
                raise CheckpointError(
                    f"{args[0]}: tensor {key} is {kind.split('_')[0]}; a partial load is refused"
                )
        return (model, info) if told else model

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> None:
        """As transformers', with checksums in `manifest.json` that `bdlm.load` verifies."""
        (Path(save_directory) / manifest.MANIFEST).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **options)
        if Path(save_directory).is_dir():
            manifest.record(Path(save_directory))

    def _init_weights(self, module: nn.Module) -> None:
        """The paper's initialisation: layers start as the identity and the first logits are
        uniform."""
        if isinstance(module, Embedding):
            nn.init.kaiming_uniform_(module.embedding, a=math.sqrt(5))
        elif isinstance(module, Norm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.output_layer.linear

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        sample_mode: bool | None = None,
        return_dict: bool | None = None,
        **_others: Any,
    ) -> Any:
        """Logits [R, L, V] of noised text, as the released class gives them (raw: the mask token is
        not yet forbidden).

        input_ids: block diffusion reads [R, 2L], the noisy copy and then the clean one, and answers
        for the noisy one. With
            `sample_mode` it reads [R, L], clean blocks and the one being written, each cell seeing
            its block and those before.
            Default: two copies when the width is 2 * config.model_length, else one. MDLM, SEDD and
            AR read [R, L].
        timesteps: [R] or [R, L], mask probability in [0, 1]; only SEDD reads it, the others take
        and ignore it as published.
        attention_mask: [R, L], 0 for padding. labels: [R, L], -100 not counted; the loss is the
        mean -log p of the labelled cells in
            nats with the mask token forbidden (its weight by noise level is the trainer's business:
            `bdlm.training`).
        return_dict: default `config.return_dict`; False gives the plain logits, or (loss, logits).
        """
        rows, width = input_ids.shape
        double = self.config.algo == "bd3lm" and not (
            width != 2 * self.config.model_length if sample_mode is None else sample_mode
        )
        if double and width % 2:
            raise UnsupportedError(
                f"input_ids has {width} columns; give the noisy and the clean copy side by side, or"
                " sample_mode=True"
            )
        length = width // 2 if double else width
        layout = self._layout(rows, length, attention_mask, input_ids.device)
        step = self._published_step(input_ids, layout, double, timesteps)
        logits = self.step(step).logits
        assert logits is not None
        loss = None
        if labels is not None:
            counted = labels != -100
            if self.config.algo == "ar":
                counted, labels = counted[:, 1:], labels[:, 1:]
            scores = log_probs(logits[:, : counted.shape[1]][counted], self.config.mask_id)
            loss = -scores.gather(-1, labels[counted][:, None]).mean()
        if self.config.return_dict if return_dict is None else return_dict:
            return MaskedLMOutput(loss=loss, logits=logits)
        return logits if loss is None else (loss, logits)

    def _layout(
        self, rows: int, length: int, attention_mask: Tensor | None, device: torch.device
    ) -> Layout:
        doc = None
        if attention_mask is not None:
            doc = torch.where(attention_mask[:, :length].bool(), 0, NOWHERE)
        layout = make_layout(
            Contiguous(self.spec.block_size),
            length,
            None if doc is None else doc.cpu(),
            context=self.spec.context,
        )
        return layout.to(device).expand(rows)

    def _published_step(
        self, ids: Tensor, layout: Layout, double: bool, timesteps: Tensor | None
    ) -> Step:
        one_stream = self.spec.streams == 1 and self.spec.noise != "none"
        group = layout.group if one_stream else torch.full_like(layout.group, CLEAN)
        if double:
            group = torch.cat((layout.group, group), 1)
        copies = 2 if double else 1
        position, rank, limit, doc = (
            x.repeat(1, copies) for x in (layout.position, layout.rank, layout.limit, layout.doc)
        )
        time = None
        if self.spec.time_conditioned:
            if timesteps is None:
                raise UnsupportedError(
                    "timesteps is missing; a SEDD model needs the mask probability of each row"
                )
            time = timesteps.reshape(ids.shape[0], -1).expand(-1, ids.shape[1])
        return Step(
            ids, position, rank, group, limit, doc, time=time, num_queries=layout.position.shape[1]
        )


def register() -> None:
    """Make transformers' Auto classes know "bd3lm". Safe to call more than once."""
    AutoConfig.register(BD3LMConfig.model_type, BD3LMConfig, exist_ok=True)
    AutoModel.register(BD3LMConfig, BD3LM, exist_ok=True)
    AutoModelForMaskedLM.register(BD3LMConfig, BD3LM, exist_ok=True)
