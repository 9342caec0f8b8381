"""The EleutherAI evaluation harness on `LM`: answers to its requests.

In: the harness's requests (text pairs, texts, prompts). Out: log-likelihoods in nats, texts.
Importing this module registers the model "bdlm" with the harness in this process: its registry has
no plug-in point for other packages, so `bdlm lm-eval` starts it. Needs the package lm-eval. The
noise of an answer is a hash of its request, so position, neighbours and batch size do not change
it. Knows nothing about tasks. The values are bounds unless the method is exact: -bound is a
log-likelihood that is too low, never too high."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from lm_eval.api.model import LM as HarnessModel
from lm_eval.api.registry import register_model

from bdlm.api import LM, RequestOutput, load
from bdlm.core.errors import ConfigError, nearest, shown
from bdlm.core.types import NOWHERE, ModelSpec
from bdlm.generation.sampling_params import SamplingParams, sampling_params
from bdlm.likelihood.bound import device_of, evaluate
from bdlm.likelihood.rows import Rows, continuations, sliding, stride_of

NEW_TOKENS = 256  # length of a text whose task sets none
MOST_ROWS = 64  # of one forward pass with batch_size auto
LOGITS = 2**30  # bytes of logits of one forward pass on the CPU with batch_size auto

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a context and of its continuation
Job = tuple[tuple[int, ...], SamplingParams]  # ids of a prompt and the parameters of its text


@register_model("bdlm")
class Harness(HarnessModel):
    """The harness's model interface over `LM`.

    pretrained: name or folder of a model. method, block_size, replicates, orders: of likelihoods,
    see `bdlm.likelihood.bound.evaluate`. decoder: of texts, which are greedy (temperature 0) unless
    a task requests samples. batch_size: rows of one forward pass, or "auto": as many as the memory
    for logits holds, max_batch_size at most. seed: of all noise. Raises ConfigError for what does
    not exist or fit."""

    def __init__(
        self,
        pretrained: str | LM = "shakespeare",
        method: str = "nelbo",
        block_size: int | None = None,
        replicates: int = 4,
        orders: int = 16,
        decoder: str = "first-hitting",
        batch_size: int | str = 16,
        max_batch_size: int | str | None = None,
        seed: int = 0,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        known = signature(Harness).parameters.keys() - {"unknown"}
        for name in unknown:
            raise ConfigError(f"the model 'bdlm' has no argument '{name}'{nearest(name, known)}")
        self.lm = (
            pretrained if isinstance(pretrained, LM) else load(pretrained, device=device or "cpu")
        )
        self.rows = rows_of_batch(batch_size, max_batch_size, self.lm)
        self.decoder = decoder
        self.seed = seed
        self.block_size = block_size
        self.how = {
            "method": method,
            "block_size": block_size,
            "replicates": replicates,
            "orders": orders,
            "seed": seed,
        }

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer.fingerprint()

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log p(continuation | context), whether greedy decoding gives the continuation) of
        each request; (0, True) for no continuation."""
        pairs = [self._pair(*request.args) for request in requests]
        unique = sorted(
            {pair for pair in pairs if pair[1]}, key=lambda pair: len(pair[0]) + len(pair[1])
        )
        jobs = [
            (context, self._params({"max_gen_toks": len(rest)}, context, ignore_eos=True))
            for context, rest in unique
        ]
        nats = self._nats(continuations(unique, self.lm.spec.max_length)) if unique else []
        greedy = [
            tuple(text.token_ids) == rest
            for text, (_, rest) in zip(self._written(jobs), unique, strict=True)
        ]
        found = {pair: (-n, same) for pair, n, same in zip(unique, nats, greedy, strict=True)}
        return [found.get(pair, (0.0, True)) for pair in pairs]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of each text from its start, 0 for an empty one; texts beyond the training
        length go through a sliding window."""
        documents = [
            tuple(self._opening() + self.lm.tokenizer.encode(request.args[0]))
            for request in requests
        ]
        unique = sorted({ids for ids in documents if len(ids) > 1}, key=len)
        room, size = self.lm.spec.max_length, self.block_size or self.lm.spec.block_size
        nats = self._nats(sliding(unique, room, stride_of(room, size))) if unique else []
        found = {ids: -n for ids, n in zip(unique, nats, strict=True)}
        return [found.get(ids, 0.0) for ids in documents]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate the text that follows each prompt, up to its stop strings. A sample that is
        requested several times is drawn again each time."""
        jobs, seen = [], Counter[str]()
        for prompt, gen_kwargs in (request.args for request in requests):
            ids = self._prompt(prompt)
            params = self._params(gen_kwargs, ids)
            if params.temperature > 0:
                again = f"{prompt!r} {sorted(gen_kwargs.items(), key=str)}"
                params = self._params(gen_kwargs, ids, seen[again])
                seen[again] += 1
            jobs.append((ids[-room_before(self.lm.spec, params.max_new_tokens) :], params))
        return [text.text for text in self._written(jobs)]

    def _nats(self, rows: Rows) -> Sequence[float]:
        keys = torch.tensor(
            [
                _hash(row[doc != NOWHERE].tolist())
                for row, doc in zip(rows.ids, rows.doc, strict=True)
            ]
        )
        how: dict[str, Any] = self.how | {"unit": "document", "batch_size": self.rows, "keys": keys}
        return evaluate(self.lm.model, rows, **how).unit_nats

    def _opening(self) -> list[int]:
        """Return what precedes a text: the model's opening token, else the end token of an earlier
        text."""
        kinds = (self.lm.spec.first_token, self.lm.tokenizer.bos_id, self.lm.tokenizer.eos_id)
        return [token for token in kinds if token is not None][:1]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Encode both, with the context cut on the left where the two do not fit the window. Spaces
        at the context's end move to the continuation, as tokens begin with them. The two are
        encoded together where that leaves the context's ids unchanged, otherwise (a token would
        span the cut) each by itself. Without anything before it, a continuation's first token is
        context."""
        if not continuation:
            return (), ()
        bare = context.rstrip(" ")
        rest, encode = context[len(bare) :] + continuation, self.lm.tokenizer.encode
        head = encode(bare) if bare else []
        whole = encode(bare + rest)
        before = self._opening() + head
        after = (
            whole[len(head) :]
            if whole[: len(head)] == head and len(whole) > len(head)
            else encode(rest)
        )
        if not before:
            before, after = after[:1], after[1:]
        return tuple(before[-max(self.lm.spec.max_length - len(after), 1) :]), tuple(after)

    def _prompt(self, text: str) -> tuple[int, ...]:
        first = self.lm.spec.first_token
        return (*([] if first is None else [first]), *self.lm.tokenizer.encode(text))

    def _params(
        self, gen_kwargs: dict[str, Any], ids: Sequence[int], again: int = 0, **more: Any
    ) -> SamplingParams:
        """Make the parameters of a request, with a seed that is a hash of everything it requests.
        again: how often it was requested before."""
        options = _options(gen_kwargs) | more
        seed = _hash([self.seed, again, *ids, repr(sorted(options.items()))])
        return sampling_params(decoder=self.decoder, seed=seed, **options)

    def _written(self, jobs: Sequence[Job]) -> list[RequestOutput]:
        """Generate the text of each job; equal jobs run once."""
        keys = [(ids, params.seed) for ids, params in jobs]
        unique = dict(
            sorted(zip(keys, jobs, strict=True), key=lambda each: each[1][1].max_new_tokens)
        )
        done: dict[Any, RequestOutput] = {}
        for part in _split(list(unique), self.rows):
            texts = self.lm.generate_from_ids(
                [unique[key][0] for key in part], [unique[key][1] for key in part]
            )
            done |= dict(zip(part, texts, strict=True))
        return [done[key] for key in keys]


def rows_of_batch(size: int | str, most: int | str | None, lm: LM) -> int:
    """Choose the rows of one forward pass. size: a number, or "auto" ("auto:N" is the same). most:
    limit of "auto". Raises ConfigError for anything else."""
    numbers = [str(value).strip() for value in (size, MOST_ROWS if most is None else most)]
    automatic = numbers[0].partition(":")[0] == "auto"
    for name, number in zip(("batch_size", "max_batch_size"), numbers, strict=True):
        if not (number.isdecimal() and int(number) >= 1) and not (
            automatic and name == "batch_size"
        ):
            raise ConfigError(
                f"{name} is {shown(size if name == 'batch_size' else most)}; use 1 or more rows, or"
                " 'auto' for batch_size"
            )
    if not automatic:
        return int(numbers[0])
    device, spec = device_of(lm.model), lm.spec
    room = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else LOGITS
    return max(1, min(int(numbers[1]), room // (4 * spec.max_length * spec.vocab_size)))


def room_before(spec: ModelSpec, new: int) -> int:
    """Compute how many tokens of a prompt are kept before `new` tokens: what then fits the window,
    or half of a window that slides.

    Raises ConfigError where nothing is left."""
    slides = (spec.streams == 2 or spec.noise == "none") and "cache" in spec.supports
    room = max(spec.max_length - new, spec.max_length // 2 if slides else 0)
    if room < 1:
        raise ConfigError(
            f"max_gen_toks is {new}, but the model's window has {spec.max_length} cells; use"
            f" {spec.max_length - 1} or less"
        )
    return room


def _hash(parts: Sequence[Any]) -> int:
    """Hash a list to a signed number of 64 bits."""
    return int.from_bytes(
        hashlib.blake2b(repr(list(parts)).encode(), digest_size=8).digest(), "little", signed=True
    )


def _options(gen_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Translate the harness's generation options into this package's."""
    until = gen_kwargs.get("until") or []
    temperature = (
        float(gen_kwargs.get("temperature") or 0.0)
        if gen_kwargs.get("do_sample", "temperature" in gen_kwargs)
        else 0.0
    )
    options = {
        "max_new_tokens": int(
            gen_kwargs.get("max_gen_toks") or gen_kwargs.get("max_new_tokens") or NEW_TOKENS
        ),
        "stop": tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        "temperature": temperature,
    }
    return options | {
        name: gen_kwargs[name] for name in ("top_p", "top_k", "min_p") if name in gen_kwargs
    }


def _split(items: list[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
