"""The noise law: which token gets how much noise, from which counter.

    x' = x + alpha / sqrt(L d) * u,   u ~ U(-1, 1) per token and channel
    (NEFTune, arXiv 2310.05914, section 2 and algorithm 1)

L is the number of real tokens of the token's own document, d the hidden size. So a document's
noise has an expected L2 norm of `alpha / sqrt(3)` for every L and d. `TokenLayout` holds L of every
token, and what else its draws depend on.

Counter of a channel block of four (words of Philox4x32-10; the key is the 64-bit seed):

    stream   word 0               word 1                        word 2        word 3
    rank     token in the batch   block + micro-step 2^15       step          data-parallel rank
    sample   token in its doc.    block + 2^31                  document      epoch

A block is below 2^15 (hidden size below 2^17), a micro-step below 2^15, all else below 2^32: no two
draws of a run share a counter. Of the block's four words, word w makes the draw of channel
4 block + w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.philox import philox4x32, to_draws

# By distribution: the L2 norm of a document's noise over alpha, root mean square: sqrt(E[u^2]).
NORMS = {"uniform": 1 / math.sqrt(3), "gaussian": 1 / math.sqrt(3), "symmetric": 1.0}
# By distribution: the signs under which every batch is passed forward.
SIGNS = {"uniform": (1,), "gaussian": (1,), "symmetric": (1, -1)}
MAX_MICRO_STEPS = 1 << 15
MAX_HIDDEN_SIZE = 1 << 17
_BLOCK_BITS = 15
_SAMPLE_STREAM = 1 << 31


@dataclass(frozen=True)
class RankStream:
    """Noise keyed by place and time: (seed, rank, step, micro-step, token, channel)."""

    seed: int
    rank: int
    step: int | Tensor
    micro_step: int | Tensor

    def words(self, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counters' four words by token, int64 (num_tokens,); word 1 without the block."""
        if isinstance(self.micro_step, int) and not 0 <= self.micro_step < MAX_MICRO_STEPS:
            raise ValueError(f"micro_step={self.micro_step} is beyond the noise stream's 2^15.")
        token = layout.token

        def same(value: int | Tensor) -> Tensor:
            # Stride 0: no memory.
            return scalar(value, torch.int64, token.device).expand(token.shape)

        return token, same(self.micro_step << _BLOCK_BITS), same(self.step), same(self.rank)


@dataclass(frozen=True)
class SampleStream:
    """Noise keyed by the document: (seed, epoch, document, position, channel), on any rank and in
    any layout."""

    seed: int

    def words(self, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counters' four words by token, int64 (num_tokens,); word 1 without the block."""
        if layout.document is None or layout.epoch is None:
            raise ValueError(
                "noise.stream=sample needs the document ids of the batch: describe the batch to "
                "the handle (`handle.describe`), or use stream='rank'."
            )
        stream = torch.full((), _SAMPLE_STREAM, dtype=torch.int64, device=layout.position.device)
        return layout.position, stream.expand(layout.num_tokens), layout.document, layout.epoch


def draw(
    stream: RankStream | SampleStream,
    layout: TokenLayout,
    hidden_size: int,
    distribution: str = "uniform",
) -> Tensor:
    """The draws u of the law, of mean 0, in plain torch: the reference for the operator.

    Args:
        distribution: `uniform` is U(-1, 1), the paper's; `gaussian` has the same variance, 1/3;
            `symmetric` is -1 or 1 (SymNoise, arXiv 2312.01523).

    Returns:
        float32 (num_tokens, hidden_size).
    """
    num_blocks = -(-hidden_size // 4)
    c0, c1, c2, c3 = (word[:, None] for word in stream.words(layout))
    block = torch.arange(num_blocks, device=c0.device)[None]
    words = philox4x32((c0, c1 + block, c2, c3), key_words(stream.seed))
    return to_draws(words, distribution).flatten(1)[:, :hidden_size]


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor () on `device`, filled in by a kernel: a copy from the host's memory
    would make the host wait for the GPU."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)


def key_words(seed: int) -> tuple[int, int]:
    """The generator's key: the seed's low and high 32 bits."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF


def scales(
    layout: TokenLayout,
    hidden_size: int,
    alpha: float | Tensor,
    *,
    embed_scale: float = 1.0,
    row_length: int | None = None,
) -> Tensor:
    """The factor of a token's draws, `alpha / sqrt(L d)`; 0 for padding.

    Args:
        alpha: of either sign; a tensor is float64 ().
        embed_scale: factor that the embedding module has applied to its lookup already, so that
            the noise keeps its size relative to the embedding (Gemma 3).
        row_length: L of every token, padding too: the widely copied hook's law.

    Returns:
        float32 (num_tokens,).
    """
    strength = scalar(alpha, torch.float64, layout.length.device)
    if row_length is not None:
        return (
            (strength * embed_scale / math.sqrt(row_length * hidden_size))
            .to(torch.float32)
            .expand(layout.num_tokens)
        )
    # In float64 and rounded once: the same bits on every device.
    size = torch.sqrt(layout.length.clamp_min(1).to(torch.float64) * hidden_size)
    return torch.where(layout.length > 0, strength * embed_scale / size, 0.0).to(torch.float32)


def expected_norm(alpha: float, distribution: str = "uniform") -> float:
    """Root mean square of a document's noise norm under the law: alpha / sqrt(3), for `symmetric`
    alpha."""
    return alpha * NORMS[distribution]
