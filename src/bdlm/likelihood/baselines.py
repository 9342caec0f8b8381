"""Baselines for a model: an n-gram model with Kneser-Ney smoothing over the same tokens, and the
compressor xz.

In: streams of token ids, or bytes. Out: nats per token, bits per byte. Knows nothing about neural
models."""

from __future__ import annotations

import lzma
from dataclasses import dataclass

import torch
from torch import Tensor

from bdlm.core.errors import DataError
from bdlm.core.validation import Count, validated

UNSEEN = -1


@dataclass(frozen=True)
class NgramTable:
    """The n-grams of one order: G n-grams, C contexts (the n-grams of the order below).

    keys: int64 [G], sorted, context index * vocabulary + token. count: float64 [G], how often it
    was seen (highest order) or after how many different tokens (lower orders). total: float64 [C],
    sum of counts. spare: float64 [C], mass taken by the discounts. discounted: float64 [G], count
    less its discount."""

    keys: Tensor
    count: Tensor
    discounted: Tensor
    total: Tensor
    spare: Tensor

    def find(self, context: Tensor, token: Tensor, vocab_size: int) -> Tensor:
        """Find the index of the n-grams (context, token); UNSEEN (-1) where there is none. int64,
        as `token`."""
        key = context * vocab_size + token
        index = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        return torch.where((context != UNSEEN) & (self.keys[index] == key), index, UNSEEN)


@dataclass(frozen=True)
class KneserNey:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1999): three discounts an order,
    uniform at the bottom.

    p(w | h) = max(c(hw) - D(c(hw)), 0) / c(h) + spare(h) / c(h) * p(w | h without its first token)
    """

    vocab_size: int
    orders: tuple[NgramTable, ...]

    @classmethod
    @validated()
    def fit(cls, stream: Tensor, vocab_size: int, order: Count = 5) -> KneserNey:
        """Count the n-grams of a stream of ids, int64 [T]. Raises ConfigError or DataError for
        unusable input."""
        if stream.dim() != 1 or len(stream) <= order:
            raise DataError(
                f"the n-gram model has {stream.numel()} training tokens; give more than its order"
                f" ({order})"
            )
        if int(stream.min()) < 0 or int(stream.max()) >= vocab_size:
            raise DataError(
                f"token id {int(stream.max())} is outside the vocabulary of {vocab_size}; use the"
                " model's own tokenizer"
            )
        keys = []
        index = []
        last = torch.zeros(len(stream) + 1, dtype=torch.long)
        for k in range(1, order + 1):
            unique, last = torch.unique(
                last[:-1] * vocab_size + stream[k - 1 :], return_inverse=True
            )
            keys.append(unique)
            index.append(last)
        orders = [
            _order(keys[k], _counts(index, k), 1 if k == 0 else len(keys[k - 1]), vocab_size)
            for k in range(order)
        ]
        return cls(vocab_size, tuple(orders))

    def nats(self, stream: Tensor) -> Tensor:
        """Compute -log p of each token given the previous ones in the stream (at most order - 1),
        float64 [T]."""
        if len(stream) == 0:
            raise DataError("there is no text to score; give at least one token")
        contexts = [torch.zeros(len(stream), dtype=torch.long)]
        for table in self.orders[:-1]:
            found = table.find(contexts[-1], stream, self.vocab_size)
            contexts.append(torch.cat((torch.tensor([UNSEEN]), found[:-1])))
        return -self._probability(contexts, stream).log()

    def distribution(self, context: list[int]) -> Tensor:
        """Compute p(. | context), float64 [V]."""
        tokens = torch.arange(self.vocab_size)
        contexts = [torch.zeros_like(tokens)]
        for k in range(1, len(self.orders)):
            index = torch.tensor([0 if k <= len(context) else UNSEEN])
            for table, token in zip(self.orders[:k], context[len(context) - k :]):
                index = table.find(index, torch.tensor([token]), self.vocab_size)
            contexts.append(index.expand_as(tokens))
        return self._probability(contexts, tokens)

    def _probability(self, contexts: list[Tensor], token: Tensor) -> Tensor:
        """Compute p of each token. contexts[k]: index of the k tokens before each token among the
        n-grams of order k (0 for none), or UNSEEN."""
        p = torch.full(token.shape, 1.0 / self.vocab_size, dtype=torch.float64)
        for table, context in zip(self.orders, contexts):
            gram = table.find(context, token, self.vocab_size)
            own = torch.where(gram == UNSEEN, 0.0, table.discounted[gram.clamp(min=0)])
            total, spare = table.total[context.clamp(min=0)], table.spare[context.clamp(min=0)]
            p = torch.where(
                (context == UNSEEN) | (total == 0), p, (own + spare * p) / total.clamp(min=1)
            )
        return p


def _counts(index: list[Tensor], k: int) -> Tensor:
    """Count the n-grams of order k + 1: occurrences at the top order, else the number of different
    tokens before it."""
    size = int(index[k].max()) + 1
    if k + 1 == len(index):
        return torch.bincount(index[k], minlength=size).double()
    longer, first = torch.unique(index[k + 1], return_inverse=True)
    at = torch.empty_like(longer)
    at[first] = torch.arange(len(first))
    return torch.bincount(index[k][1:][at], minlength=size).double()


def _order(keys: Tensor, count: Tensor, contexts: int, vocab_size: int) -> NgramTable:
    context = torch.div(keys, vocab_size, rounding_mode="floor")
    cut = torch.minimum(_discounts(count)[count.clamp(max=3).long()], count)
    total, spare = (
        torch.zeros(contexts, dtype=torch.float64).index_add_(0, context, x) for x in (count, cut)
    )
    return NgramTable(keys, count, count - cut, total, spare)


def _discounts(count: Tensor) -> Tensor:
    """Estimate the discounts of counts 0, 1, 2 and 3 or more, float64 [4]. Where a small text gives
    no positive estimate, half the count is taken: a discount of zero would make unseen tokens
    impossible."""
    n = [float((count == k).sum()) for k in range(5)]
    cut = [0.0, 0.5, 1.0, 1.5]
    if n[1] and n[2]:
        y = n[1] / (n[1] + 2 * n[2])
        for k in (1, 2, 3):
            if n[k] and n[k + 1]:
                estimate = k - (k + 1) * y * n[k + 1] / n[k]
                cut[k] = estimate if estimate > 0 else cut[k]
    return torch.tensor(cut, dtype=torch.float64)


@dataclass(frozen=True)
class CompressedSize:
    """Bits per byte of a text under `xz -9e`. alone: the text by itself. after_training: what the
    text adds to a file that begins with the training text; this is the fair comparison for a model
    that has seen that text."""

    alone: float
    after_training: float | None
    bytes: int


def xz(text: bytes, training: bytes | None = None) -> CompressedSize:
    """Compress with preset 9 | extreme (a dictionary of 64 MiB). `alone` includes the container
    overhead of about 60 bytes."""
    if not text:
        raise DataError("there is no text to compress; give a file that is not empty")
    bits = 8 / len(text)
    more = None if training is None else (_xz_size(training + text) - _xz_size(training)) * bits
    return CompressedSize(_xz_size(text) * bits, more, len(text))


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
