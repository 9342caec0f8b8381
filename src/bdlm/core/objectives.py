"""Objectives: from a model and a noised batch to loss terms in nats.

In: a `Denoiser` and a `NoisedBatch`. Out: float32 [R, L] terms whose sum over the scored count is
the bound per token (nats).
`ModelSpec` chooses: masked cross-entropy for block diffusion under any block map and for MDLM,
next-token cross-entropy for autoregressive models, score entropy for SEDD. Knows nothing about
schedules (the weights are in the batch), optimisers or data.
Source: arXiv 2503.09573, App. B.3 (SUBS), Eq. 8; arXiv 2310.16834 (SEDD)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bdlm.core.corruption import Blocks
from bdlm.core.errors import ConfigError, UnsupportedError
from bdlm.core.forward import train_logits
from bdlm.core.fused_cross_entropy import linear_cross_entropy, weighted_linear_cross_entropy
from bdlm.core.types import Denoiser, NoisedBatch

# mask probability above which a score model's noise level is held, so that sigma stays finite
HELD = 1 - 1e-3


def log_probs(logits: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities over real tokens: the mask is forbidden (SUBS a). [..., V] -> float32
    (float64 kept) [..., V].

    Carry-over (SUBS b) needs no arithmetic: unmasked cells are never scored or drawn.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if 0 <= mask_id < logits.shape[-1]:
        forbidden = torch.arange(logits.shape[-1], device=logits.device) == mask_id
        logits = logits.masked_fill(forbidden, float("-inf"))
    return logits.log_softmax(-1)


def token_nll(model: Denoiser, noised: NoisedBatch, query_mask: Tensor | None = None) -> Tensor:
    """-log p of the true token at noised cells, nats, float32 [M] in row-major order of `at`
    (default `noised.masked`).

    Raises UnsupportedError for models that predict scores or remove uniform noise, ConfigError
    where a model that looks one cell to the left is asked for the first cell of a text."""
    query_mask = noised.masked if query_mask is None else query_mask
    _check_scorable(model, noised, query_mask)
    target, head = noised.clean[query_mask], linear_head(model)
    if head is not None:
        return linear_cross_entropy(
            _hidden(model, noised, query_mask),
            head.weight,
            head.bias,
            target,
            forbid=_forbidden(model),
        )
    logits = train_logits(model, noised, query_mask).logits
    assert logits is not None
    return -log_probs(logits, model.spec.mask_id).gather(-1, target[:, None])[:, 0]


def total_nats(model: Denoiser, noised: NoisedBatch, denominator: Tensor | float = 1.0) -> Tensor:
    """Sum of the terms of `objective` over a denominator, a scalar: the fast form for training,
    differentiable once.

    Where the model has a linear head, its gradient is formed with the loss and neither logits nor
    their softmax outlive a chunk."""
    return total_and_losses(model, noised, denominator)[0]


def total_and_losses(
    model: Denoiser, noised: NoisedBatch, denominator: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """`total_nats`, and the loss of each masked cell before its weight, nats, [M] in row-major
    order, detached."""
    head = linear_head(model)
    if head is None or model.spec.prediction != "tokens":
        terms = objective(model, noised)
        return (
            terms.sum() / denominator,
            terms.detach()[noised.masked] / noised.weight[noised.masked],
        )
    _check_objective(model)
    _check_scorable(model, noised, noised.masked)
    hidden, target = _hidden(model, noised, noised.masked), noised.clean[noised.masked]
    factor = noised.weight[noised.masked] / denominator
    return weighted_linear_cross_entropy(
        hidden, head.weight, head.bias, target, factor, forbid=_forbidden(model)
    )


def linear_head(model: Denoiser) -> nn.Linear | None:
    """The head that reads `Out.hidden`, for models that show it."""
    head = getattr(model, "head", None)
    return head if isinstance(head, nn.Linear) else None


def _hidden(model: Denoiser, noised: NoisedBatch, query_mask: Tensor) -> Tensor:
    hidden = train_logits(model, noised, query_mask, frozenset({"hidden"})).hidden
    assert hidden is not None
    return hidden


def _forbidden(model: Denoiser) -> int | None:
    head = linear_head(model)
    assert head is not None
    return model.spec.mask_id if 0 <= model.spec.mask_id < head.out_features else None


def _check_scorable(model: Denoiser, noised: NoisedBatch, query_mask: Tensor) -> None:
    spec = model.spec
    if spec.prediction != "tokens":
        raise UnsupportedError(
            f"a model with prediction '{spec.prediction}' has no token likelihood; use its own"
            " objective"
        )
    if spec.noise == "none" or spec.shift:
        _refuse_first_cells(noised, query_mask)


def _refuse_first_cells(noised: NoisedBatch, query_mask: Tensor) -> None:
    """A cell without a left neighbour in its document cannot be predicted from it."""
    doc = noised.layout.doc.expand_as(query_mask)
    first = torch.ones_like(query_mask)
    first[:, 1:] = doc[:, 1:] != doc[:, :-1]
    if bool((first & query_mask).any()):
        raise ConfigError(
            "a shifted or autoregressive model cannot score the first cell of a text; leave first"
            " cells given"
        )


def score_entropy(log_score: Tensor, target: Tensor, mask_prob: Tensor, mask_id: int) -> Tensor:
    """SEDD's loss of masked cells per unit of total noise sigma, nats: sum_y s_y - r log s_x0 + r
    (log r - 1), r = (1 - p) / p.

    log_score: [M, V]. target: int64 [M]. mask_prob: [M] in (0, 1). Returns float32 (float64 kept)
    [M], never below 0.
    Source: arXiv 2310.16834 (Lou et al. 2024), absorbing noise."""
    score = log_score if log_score.dtype == torch.float64 else log_score.float()
    r = _ratio(mask_prob).to(score.dtype)
    real = torch.arange(score.shape[-1], device=score.device) != mask_id
    positive = (score.exp() * real).sum(-1)
    return positive - r * score.gather(-1, target[:, None])[:, 0] + r * (r.log() - 1)


def _ratio(mask_prob: Tensor) -> Tensor:
    """r = 1 / (e^sigma - 1) = (1 - p) / p, float64, with p held below 1."""
    p = mask_prob.double().clamp(max=HELD)
    return (1 - p) / p


def _score_terms(model: Denoiser, noised: NoisedBatch) -> Tensor:
    """Weighted score entropy at masked cells, [M]. The batch's weight p'/p equals sigma' r."""
    logits = train_logits(model, noised).logits
    assert logits is not None
    time, weight = noised.time[noised.masked], noised.weight[noised.masked]
    entropy = score_entropy(logits, noised.clean[noised.masked], time, model.spec.mask_id)
    return entropy * (weight / _ratio(time)).to(entropy.dtype)


def objective(model: Denoiser, noised: NoisedBatch) -> Tensor:
    """Weighted loss terms in nats, float32 [R, L]; 0 where nothing is masked. Sum / scored is the
    bound per token.

    Raises UnsupportedError for a kind of model without an objective here.
    """
    _check_objective(model)
    if model.spec.prediction == "log_score":
        terms = _score_terms(model, noised)
    else:
        terms = token_nll(model, noised)
        terms = terms * noised.weight[noised.masked].to(terms.dtype)
    out = torch.zeros(noised.clean.shape, dtype=terms.dtype, device=terms.device)
    return out.masked_scatter(noised.masked, terms)


def _check_objective(model: Denoiser) -> None:
    if model.spec.noise == "uniform":
        raise UnsupportedError("no objective for noise 'uniform' yet; train with noise 'mask'")


@dataclass(frozen=True)
class Loss:
    """total: sum of terms in nats (differentiable). per_token: total / denominator. scored: number
    of scored cells."""

    total: Tensor
    per_token: Tensor
    scored: Tensor


def loss(nll: Tensor, noised: NoisedBatch, denominator: Tensor | float | None = None) -> Loss:
    """Sum the terms of `objective`, [R, L].

    denominator: what to divide by, default this batch's scored cells. With several processes or
    accumulation steps, give the *global* number of scored cells: losses are not averaged over
    ranks."""
    scored, total = noised.scored.sum(), nll.sum()
    return Loss(
        total, total / (scored.clamp(min=1) if denominator is None else denominator), scored
    )


def block_losses(nll: Tensor, noised: NoisedBatch) -> Tensor:
    """Mean term of each block, nats, [R, B], NaN for blocks without scored cells: what the search
    takes the variance of (Sec. 4.3, 5.2).

    nll: [R, L] of `objective`. The mean is over the block's scored cells, so ragged blocks count
    per cell too."""
    block = noised.layout.block.expand_as(noised.scored)
    shape = (nll.shape[0], int(block.max()) + 1)
    total = torch.zeros(shape, dtype=nll.dtype, device=nll.device).scatter_add_(
        1, block, nll.detach() * noised.scored
    )
    count = torch.zeros(shape, dtype=nll.dtype, device=nll.device).scatter_add_(
        1, block, noised.scored.to(nll.dtype)
    )
    return total / count


def count_losses(losses: Tensor, noised: NoisedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n, r, mean loss) of each block with masked cells: scored cells, masked ones, and the mean of
    `losses` over these, each [K].

    losses: [M] of `total_and_losses`.
    """
    blocks = Blocks.of(noised.layout, noised.scored)
    count = torch.zeros_like(blocks.size).scatter_add_(1, blocks.index, noised.masked.long())
    cells = torch.zeros(
        noised.masked.shape, dtype=losses.dtype, device=losses.device
    ).masked_scatter(noised.masked, losses)
    total = torch.zeros(count.shape, dtype=losses.dtype, device=losses.device).scatter_add_(
        1, blocks.index, cells
    )
    some = count > 0
    return blocks.size[some], count[some], total[some] / count[some]
