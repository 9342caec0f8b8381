"""The plain form of the published algorithm: the baseline of every speed and memory figure.

The network, the training loss and the sampler follow the paper (arXiv 2503.09573, Sec. 3.2, Alg. 2,
App. B.6, C.5) in straightforward PyTorch. Training uses a dense boolean 2L x 2L attention mask, and
computes the head and the log-softmax of every noisy cell; the loss gathers from them. The head
skips the clean half, which the loss never reads, so that the baseline needs no more time or memory
than the authors' own code. Sampling keeps a cache of unrotated queries, keys and values, rotates
all of it in every forward pass, and spends a forward pass of its own to store a finished block.

The weights have the published names, so both sides run on the same weights. The golden test checks
the function. Nothing here is shared with the library: it is what the library is compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEVER = -1e6  # the published log-probability of the impossible


class Norm(nn.Module):
    """LayerNorm in float32, weight only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), (x.shape[-1],)) * self.weight


class Embedding(nn.Module):
    """Token ids [R, N] -> states [R, N, d]."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab, width))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding[ids]


class SigmaMap(nn.Module):
    """Noise level [R] -> conditioning [R, c]."""

    def __init__(self, cond: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, sigma: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angle = sigma[:, None].float() * frequency
        return F.silu(self.mlp(torch.cat((angle.cos(), angle.sin()), -1)))


def rotary_table(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0..length-1, [length, 1, D]: broadcast over [R, length, H,
    D]."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(length)[:, None].float() * frequency
    angle = torch.cat((angle, angle), -1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * table[0] + torch.cat((-second, first), -1) * table[1]


class Block(nn.Module):
    """One layer. With a cache, the queries of the cached cells attend again and their results are
    thrown away, as published."""

    def __init__(self, width: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Linear(cond, 6 * width)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)
        # unrotated q, k, v of the committed cells, [R, capacity, 3d]
        self.cache: Tensor | None = None
        self.cached = 0

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        halves: int,
        store: bool,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(
            6, -1
        )
        rows, cells, width = x.shape
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1)
        if self.cache is not None:
            if store:
                self.cache[:, self.cached : self.cached + cells] = qkv
            qkv = torch.cat((self.cache[:, : self.cached], qkv), 1).clone()
            self.cached += cells if store else 0
        q, k, v = qkv.view(rows, -1, 3, self.heads, width // self.heads).unbind(2)
        # both halves have positions 0..L-1
        table = tuple(t.repeat(halves, 1, 1) for t in table)
        q, k = rotate(q, table), rotate(k, table)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
        )
        mixed = mixed.transpose(1, 2).reshape(rows, -1, width)[:, -cells:]
        x = x + gate1 * self.attn_out(mixed)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class OutputLayer(nn.Module):
    """Final norm, modulation and the linear head: states [R, N, d] -> logits [R, N, V]."""

    def __init__(self, width: int, cond: int, vocab: int) -> None:
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, vocab)
        self.adaLN_modulation = nn.Linear(cond, 2 * width)
        for layer in (self.linear, self.adaLN_modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class PlainDiT(nn.Module):
    """The network: `forward` on both halves for training, `denoise` with the cache for sampling."""

    def __init__(
        self,
        vocab_size: int,
        hidden_dim: int,
        n_blocks: int,
        n_heads: int,
        cond_dim: int,
        model_length: int,
        block_size: int,
    ) -> None:
        super().__init__()
        self.vocab_size, self.block_size, self.length = vocab_size, block_size, model_length
        self.backbone = nn.Module()
        self.backbone.vocab_embed = Embedding(vocab_size, hidden_dim)
        self.backbone.sigma_map = SigmaMap(cond_dim)
        self.backbone.blocks = nn.ModuleList(
            Block(hidden_dim, n_heads, cond_dim) for _ in range(n_blocks)
        )
        self.backbone.output_layer = OutputLayer(hidden_dim, cond_dim, vocab_size)
        self.mask = two_stream_mask(model_length, block_size)
        self.table = rotary_table(model_length, hidden_dim // n_heads)

    def _run(
        self,
        ids: Tensor,
        table: tuple[Tensor, Tensor],
        mask: Tensor | None,
        halves: int = 1,
        store: bool = False,
    ) -> Tensor:
        """Logits of the first of `halves` equal parts of the cells."""
        backbone = self.backbone
        # sigma is 0: BD3-LM is not conditioned on time
        c = backbone.sigma_map(torch.zeros(ids.shape[0]))
        x = backbone.vocab_embed(ids)
        for block in backbone.blocks:
            x = block(x, c, table, mask, halves, store)
        return backbone.output_layer(x[:, : ids.shape[1] // halves], c)

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Logits of the noisy half, [R, L, V]."""
        return self._run(torch.cat((noisy, clean), 1), self.table, self.mask, halves=2)

    def new_cache(self, rows: int, capacity: int) -> None:
        """Allocate unrotated q, k, v of `capacity` cells a row, and compute their rotations."""
        for block in self.backbone.blocks:
            width = block.attn_out.in_features
            block.cache, block.cached = torch.zeros(rows, capacity, 3 * width), 0
        head_dim = width // block.heads
        self.table = rotary_table(capacity, head_dim)

    def denoise(self, ids: Tensor, store: bool = False) -> Tensor:
        """Logits of the active block [R, L', V] given the cache; `store` commits the block."""
        end = self.backbone.blocks[0].cached + ids.shape[1]
        return self._run(ids, (self.table[0][:end], self.table[1][:end]), None, store=store)


def two_stream_mask(length: int, block_size: int) -> Tensor:
    """Which cell attends to which over (noisy, clean), bool [2L, 2L] (App. B.6)."""
    index = torch.arange(2 * length)
    clean, block = index >= length, index % length // block_size
    cq, ck, bq, bk = clean[:, None], clean[None], block[:, None], block[None]
    own = (bq == bk) & (cq == ck)
    earlier = (bq > bk) & ~cq & ck
    context = (bq >= bk) & cq & ck
    return own | earlier | context


def subs(logits: Tensor, ids: Tensor, mask_id: int) -> Tensor:
    """Log-probabilities under SUBS: the mask token is impossible, an unmasked cell keeps its token
    (App. B.3)."""
    logits[..., mask_id] += NEVER
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    kept = ids != mask_id
    log_p[kept] = NEVER
    log_p[kept, ids[kept]] = 0.0
    return log_p


def training_loss(
    model: PlainDiT, noisy: Tensor, clean: Tensor, weight: Tensor, scored: Tensor
) -> Tensor:
    """Mean weighted loss in nats: log-probabilities of every noisy cell, from which those of the
    true tokens are gathered."""
    log_p = subs(model(noisy, clean), noisy, model.vocab_size - 1)
    picked = log_p.gather(-1, clean[..., None])[..., 0]
    return -(weight * picked).sum() / scored.sum()


def nucleus(p: Tensor, keep: float) -> Tensor:
    """The published nucleus: sort, drop every token beyond `keep` (the crossing one too) but never
    the first, renormalise."""
    ordered, index = p.sort(-1, descending=True)
    kept = ordered.cumsum(-1) <= keep
    kept[..., 0] = True
    cut = torch.zeros_like(p).scatter_(-1, index, ordered * kept)
    return cut / cut.sum(-1, keepdim=True)


def gumbel_argmax(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A sample of each distribution by 64-bit uniforms (App. C.5)."""
    u = torch.rand(p.shape, dtype=p.dtype, generator=generator)
    return (p / (1e-10 - (u + 1e-10).log())).argmax(-1)


@torch.no_grad()
def sample(
    model: PlainDiT, first: int, length: int, nucleus_p: float = 1.0, seed: int = 0
) -> Tensor:
    """First-hitting, block by block, batch 1: int64 [length], of which the first is `first`. One
    forward pass a token and one a stored block.

    Each forward pass computes a float64 softmax over the whole vocabulary for the whole block. A
    token is drawn for every cell, and one is kept."""
    size, mask_id = model.block_size, model.vocab_size - 1
    generator = torch.Generator().manual_seed(seed)
    model.new_cache(1, length)
    text = torch.empty(0, dtype=torch.long)
    while len(text) < length:
        block = torch.full((1, size), mask_id)
        if len(text) == 0:
            block[0, 0] = first
        while (block == mask_id).any():
            p = subs(model.denoise(block), block, mask_id).double().exp()
            p = nucleus(p, nucleus_p) if nucleus_p < 1 else p
            drawn = gumbel_argmax(p, generator)
            masked = (block[0] == mask_id).nonzero()[:, 0]
            cell = masked[torch.randint(len(masked), (1,), generator=generator)]
            block[0, cell] = drawn[0, cell]
        model.denoise(block, store=True)
        text = torch.cat((text, block[0]))
    return text
