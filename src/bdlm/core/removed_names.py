"""Names that were removed, and what each is called now.

In: a name that does not exist, and the names that do. Out: the new name, or None. `errors.nearest`
asks here first, so that every message about an unknown name answers a removed one in the same way:
Python arguments and attributes, fields of recipes and plans, options of the command line. A name
may have meant several things; the new name is the first one that exists where the old one was
used."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REMOVED: dict[str, tuple[str, ...]] = {
    # classes and functions
    "Generated": ("RequestOutput",),
    "Params": ("SamplingParams",),
    "POLICIES": ("DECODERS",),
    "Policy": ("Decoder",),
    "PolicyError": ("DecoderError",),
    "Result": ("RequestOutput",),
    "make_params": ("sampling_params",),
    "make_policy": ("make_decoder",),
    # what a request asks for
    "allowed": ("allowed_token_ids",),
    "forbidden": ("banned_token_ids",),
    "given": ("known_tokens",),
    "guidance": ("guidance_scale",),
    "ignore_stop": ("ignore_eos",),
    "negative": ("negative_prompt_ids",),
    "over": ("infill_mode",),
    "params": ("sampling_params",),
    "policy": ("decoder",),
    "policies": ("decoders",),
    "processors": ("logits_processor",),
    "logits_processors": ("logits_processor",),
    "stop_tokens": ("stop_token_ids",),
    "window": ("context_window",),
    # what a finished text says
    "engine_calls": ("engine_steps",),
    "ids": ("token_ids",),
    "model_calls": ("forward_passes",),
    "tokens_per_call": ("tokens_per_forward",),
    "tried": ("num_draft_canvases",),
    # the engine
    "memory": ("max_cache_bytes",),
    "queue": ("max_waiting",),
    "rows": ("max_num_seqs",),
    # records of the model contract
    "appends": ("append_only",),
    "at": ("query_mask",),
    "full": ("full_attention",),
    "leading": ("num_queries",),
    "rough": ("logit_bounds",),
    "want": ("outputs",),
    # training and likelihood
    "batch_rows": ("batch_size",),
    "law": ("distribution",),
    "laws": ("distributions",),
    "single": ("mask_single_token_blocks",),
}

_OF_GENERATION = {
    "calling": "engine.model_runner",
    "canvas": "engine.block_state",
    "deciding": "engine.decode_step",
    "finishing": "engine.retirement",
    "joining": "engine.scheduler",
    "keys": "sampling.noise",
    "logits": "sampling.sampler",
    "guidance": "sampling.guidance",
    "owed": "engine.token_buffer",
    "params": "sampling_params",
    "policies": "decoders",
    "policies.base": "decoders.base",
    "policies.exact": "decoders.exact",
    "policies.learned": "decoders.learned",
    "policies.modified": "decoders.modifiers",
    "policies.revising": "decoders.revising",
    "policies.scored": "decoders.confidence",
    "policies.spaced": "decoders.spacing",
    "policies.trying": "decoders.speculative",
    "requests": "engine.request",
    "reuse": "full_sequence.approximate_cache",
    "seats": "engine.slots",
    "shaping": "engine.logits_processors",
    "stopping": "engine.stopping",
    "stream": "engine.streaming",
    "texts": "engine.token_buffer",
    "trials": "engine.draft_canvases",
    "whole": "full_sequence.engine",
}
MODULES: dict[str, str] = {
    "bdlm.core.calls": "bdlm.core.forward",
    "bdlm.core.fused": "bdlm.core.fused_cross_entropy",
    "bdlm.core.kinds": "bdlm.core.validation",
    "bdlm.core.slots": "bdlm.core.cache_slots",
    "bdlm.experiments.measures": "bdlm.experiments.measurements",
    "bdlm.experiments.numbers": "bdlm.experiments.run_statistics",
    "bdlm.experiments.pictures": "bdlm.experiments.figures",
    "bdlm.harness.decoders": "bdlm.harness.sweeps",
    "bdlm.harness.measures": "bdlm.harness.frontier_statistics",
    "bdlm.likelihood.report": "bdlm.likelihood.score",
    "bdlm.likelihood.text": "bdlm.likelihood.text_statistics",
    "bdlm.models.checkpoints": "bdlm.models.model_folder",
    "bdlm.models.folded": "bdlm.models.inference",
    "bdlm.models.lean": "bdlm.models.fused_mlp",
    "bdlm.models.packing": "bdlm.models.ragged_batching",
    "bdlm.models.reuse": "bdlm.models.layer_reuse",
    "bdlm.models.screen": "bdlm.models.int8_head",
    "bdlm.models.split": "bdlm.models.chunked_attention",
    "bdlm.models.tensors": "bdlm.models.safetensors_io",
    "bdlm.training.devices": "bdlm.training.accelerator",
    "bdlm.training.report": "bdlm.training.run_log",
    **{f"bdlm.generation.{a}": f"bdlm.generation.{b}" for a, b in _OF_GENERATION.items()},
}


def successor(name: str, known: Collection[str]) -> str | None:
    """The new name of a removed one, spelled as in `known`; None if it was not removed, or its new
    name does not exist here.

    name: as the user wrote it: `policy`, `--batch-rows`, `noise.law`."""
    section, dot, last = name.lstrip("-").replace("-", "_").rpartition(".")
    spelled = {each.lstrip("-").replace("-", "_"): each for each in known}
    for new in REMOVED.get(last, ()):
        if f"{section}{dot}{new}" in spelled:
            return spelled[f"{section}{dot}{new}"]
    return None


class RemovedModules:
    """Finder at the end of `sys.meta_path` that answers imports of modules that were renamed."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, or ModuleNotFoundError with the new name."""
        if name in MODULES:
            raise ModuleNotFoundError(f"'{name}' is now called '{MODULES[name]}'", name=name)
        return None


def answer_imports() -> None:
    """Let imports of renamed modules name the new one."""
    if RemovedModules not in sys.meta_path:
        sys.meta_path.append(RemovedModules)
