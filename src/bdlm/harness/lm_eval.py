"""The EleutherAI evaluation harness over our models: what it asks of a language model, answered by `LM`.

In: the harness's requests (text pairs, texts, prompts). Out: log-likelihoods in nats, texts. Importing this registers the model "bdlm" with
the harness, in this process: its registry has no plug-in point for other packages, so `bdlm lm-eval` starts it. Needs the package lm-eval.
Knows nothing about tasks. The figures are bounds unless the method is exact: -bound is a log-likelihood that is too low, never too high.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import LM as Asked
from lm_eval.api.registry import register_model

from bdlm.api import LM, load
from bdlm.likelihood.bound import evaluate
from bdlm.likelihood.rows import Rows, continuations, sliding, stride_of

NEW_TOKENS = 256  # of a text whose task names no length


@register_model("bdlm")
class Harness(Asked):
    """pretrained: name or folder of a model. method, block_size, replicates, orders: of likelihoods, see `bdlm.likelihood.bound.evaluate`.
    policy: of texts, which are greedy (temperature 0) unless a task asks for samples. batch_size: rows of one forward. seed: of all noise.
    """

    def __init__(
        self,
        pretrained: str | LM = "shakespeare",
        method: str = "nelbo",
        block_size: int | None = None,
        replicates: int = 4,
        orders: int = 16,
        policy: str = "first-hitting",
        batch_size: int | str = 16,
        seed: int = 0,
        device: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.lm = pretrained if isinstance(pretrained, LM) else load(pretrained, device=device or "cpu")
        self.rows, self.policy, self.seed, self.block_size = int(batch_size), policy, seed, block_size
        self.how = {"method": method, "block_size": block_size, "replicates": replicates, "orders": orders, "seed": seed}

    @property
    def tokenizer_name(self) -> str:
        return self.lm.tokenizer.fingerprint()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy writing gives the continuation) of each request."""
        texts = [request.args for request in requests]
        pairs = [self._pair(context, continuation) for context, continuation in texts]
        nats = self._nats(continuations(pairs, self.lm.spec.max_length)) if pairs else []
        greedy = self._written([context for context, _ in texts], [len(ids) for _, ids in pairs])
        return [(-n, wrote == list(ids)) for n, wrote, (_, ids) in zip(nats, greedy, pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each text from its start; texts beyond the training length go through a sliding window."""
        documents = [self._opening() + self.lm.tokenizer.encode(request.args[0]) for request in requests]
        room, size = self.lm.spec.max_length, self.block_size or self.lm.spec.block_size
        return [-n for n in self._nats(sliding(documents, room, stride_of(room, size)))] if documents else []

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to its stop strings."""
        done: dict[int, str] = {}
        for options, group in _alike([request.args[1] for request in requests]):
            for part in _split(group, self.rows):
                made = self.lm.generate([requests[i].args[0] for i in part], policy=self.policy, seed=self.seed, **options)
                done |= dict(zip(part, (text.text for text in made), strict=True))
        return [done[i] for i in range(len(requests))]

    def _nats(self, rows: Rows) -> Sequence[float]:
        return evaluate(self.lm.model, rows, unit="document", batch_rows=self.rows, **self.how).unit_nats  # type: ignore[arg-type]

    def _opening(self) -> list[int]:
        """What stands before a text: the model's opening token, else the end of a text before it."""
        kinds = (self.lm.spec.first_token, self.lm.tokenizer.bos_id, self.lm.tokenizer.eos_id)
        return [token for token in kinds if token is not None][:1]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both. Spaces at the context's end go to the continuation, as tokens begin with them. The two are encoded together where
        that leaves the context's ids as they are, else (a token would reach over the cut) each by itself."""
        bare = context.rstrip(" ")
        rest, encode = context[len(bare) :] + continuation, self.lm.tokenizer.encode
        head = encode(bare) if bare else []
        whole = encode(bare + rest)
        return self._opening() + head, whole[len(head) :] if whole[: len(head)] == head and len(whole) > len(head) else encode(rest)

    def _written(self, contexts: Sequence[str], lengths: Sequence[int]) -> list[list[int]]:
        """What the model writes greedily after each context, so many tokens."""
        done: dict[int, list[int]] = {}
        for options, group in _alike([{"max_gen_toks": n} for n in lengths]):
            for part in _split(group, self.rows):
                made = self.lm.generate([contexts[i] for i in part], policy=self.policy, seed=self.seed, ignore_stop=True, **options)
                done |= dict(zip(part, (text.ids for text in made), strict=True))
        return [done[i] for i in range(len(contexts))]


def _alike(asked: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests that ask for the same, by number, with what that is in our words."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for number, wish in enumerate(asked):
        options = _options(wish)
        groups.setdefault(repr(sorted(options.items())), (options, []))[1].append(number)
    yield from groups.values()


def _options(wish: dict[str, Any]) -> dict[str, Any]:
    """Generation options of the harness in our words."""
    until = wish.get("until") or []
    temperature = float(wish.get("temperature") or 0.0) if wish.get("do_sample", "temperature" in wish) else 0.0
    options = {
        "max_new_tokens": int(wish.get("max_gen_toks") or wish.get("max_new_tokens") or NEW_TOKENS),
        "stop": (until,) if isinstance(until, str) else tuple(until),
        "temperature": temperature,
    }
    return options | {name: wish[name] for name in ("top_p", "top_k", "min_p") if name in wish}


def _split(numbers: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(numbers), size):
        yield numbers[first : first + size]
