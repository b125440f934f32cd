"""The noise law: which token gets how much noise, from which counter.

    x' = x + alpha / sqrt(L d) * u,   u ~ U(-1, 1) per token and channel
    (NEFTune, arXiv 2310.05914, section 2 and algorithm 1)

L is the number of real tokens of the token's own document, d the hidden size. So a document's
noise has an expected L2 norm of `alpha / sqrt(3)` for every L and d. `TokenLayout` says what a
batch's tokens are; `TokenLayout.from_arguments` reads it off the arguments of a forward pass.
Refuses layouts that contradict themselves (`ValueError`).

Counter of a channel block of four (words of Philox4x32-10; the key is the 64-bit seed):

    stream   word 0               word 1                        word 2        word 3
    rank     token in the batch   block + micro-step 2^15       step          data-parallel rank
    sample   token in its doc.    block + 2^31                  document      epoch

A block is below 2^15 (hidden size below 2^17), a micro-step below 2^15, all else below 2^32: no two
draws of a run share a counter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neftune_dist.noise.philox import philox4x32, uniform

_BLOCK_BITS = 15
_SAMPLE_STREAM = 1 << 31
MAX_MICRO_STEPS = 1 << 15
_CHUNK_TOKENS = 1024  # noise is drawn for so many tokens at a time: bounds the extra memory


@dataclass(frozen=True)
class TokenLayout:
    """What each token of one forward pass is. All tensors int64, shape (num_tokens,), row by row.

    length: real tokens of the token's document; 0 marks padding.
    position: of the token among the real tokens of its document.
    segment: document's index within the batch, below num_tokens; padding's is not read.
    document, epoch: the document's identity over the whole run, for the `sample` stream.
    """

    length: Tensor
    position: Tensor
    segment: Tensor
    document: Tensor | None = None
    epoch: Tensor | None = None

    @staticmethod
    def from_lengths(
        lengths: Tensor, *, documents: Tensor | None = None, epochs: Tensor | None = None
    ) -> TokenLayout:
        """The layout of documents that follow each other without padding.

        Args:
            lengths: int64 (num_documents,), each at least 1.
            documents, epochs: int64 (num_documents,), for the `sample` stream.
        """
        segment = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        starts = torch.cumsum(lengths, 0) - lengths
        position = torch.arange(len(segment), device=lengths.device) - starts[segment]
        return TokenLayout(
            length=lengths[segment],
            position=position,
            segment=segment,
            document=None if documents is None else documents[segment],
            epoch=None if epochs is None else epochs[segment],
        )

    @staticmethod
    def from_arguments(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        documents: Tensor | None = None,
        epochs: Tensor | None = None,
    ) -> TokenLayout:
        """The layout that the arguments of a causal LM's forward pass describe.

        A row of `input_ids` (batch, sequence) is one document, less the tokens whose
        `attention_mask` is 0, on whichever side. Without zeros in the mask a row may be several
        packed documents: by `cu_seq_lens` (num_documents + 1,), over the flattened tokens, or where
        `position_ids` fall back. Nothing here waits for the device.

        Args:
            documents, epochs: (num_documents,), in order of appearance.

        Raises:
            ValueError: shapes that do not fit.
        """
        batch, sequence = input_ids.shape
        device = input_ids.device
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, "
                    f"input_ids {tuple(input_ids.shape)}: NEFTune needs the mask of the tokens."
                )
            real = attention_mask != 0
        # The first real token of a row opens a document, wherever the padding stands.
        starts = real & (real.cumsum(1) == 1)
        if cu_seq_lens is not None:
            marks = torch.zeros(batch * sequence + 1, dtype=torch.bool, device=device)
            marks[cu_seq_lens.to(device=device, dtype=torch.int64)] = True
            starts = starts | (marks[:-1].view(batch, sequence) & real)
        elif position_ids is not None and position_ids.dim() == 2:
            # Positions rise within a document, so one that does not exceed that of the real token
            # before it opens the next. Pads' own positions are arbitrary and are passed over.
            positions = position_ids.expand(batch, sequence)
            index = torch.arange(sequence, device=device).expand(batch, sequence)
            last_real = torch.where(real, index, -1).cummax(1).values
            before = torch.gather(positions, 1, last_real[:, :-1].clamp_min(0))
            opens = (positions[:, 1:] <= before) & (last_real[:, :-1] >= 0)
            starts[:, 1:] |= opens & real[:, 1:]
        real, starts = real.flatten(), starts.flatten()
        segment = (starts.cumsum(0) - 1).clamp_min(0)
        count = torch.zeros_like(segment).index_add_(0, segment, real.to(torch.int64))
        ordinal = real.cumsum(0)  # from 1, over the real tokens of the batch
        preceding = count.cumsum(0) - count  # real tokens of the documents before
        return TokenLayout(
            length=torch.where(real, count[segment], 0),
            position=torch.where(real, ordinal - 1 - preceding[segment], 0),
            segment=segment,
            document=None if documents is None else documents.to(device)[segment],
            epoch=None if epochs is None else epochs.to(device)[segment],
        )


@dataclass(frozen=True)
class RankStream:
    """Noise keyed by where and when: (seed, rank, step, micro-step, token, channel)."""

    seed: int
    rank: int
    step: int
    micro_step: int

    def counters(self, layout: TokenLayout, tokens: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counter's words for these tokens, each (num_tokens,); word 1 lacks the block."""
        if not 0 <= self.micro_step < MAX_MICRO_STEPS:
            raise ValueError(f"micro_step={self.micro_step} is beyond the noise stream's 2^15.")
        token = torch.arange(tokens.start, tokens.stop, device=layout.length.device)

        def constant(value: int) -> Tensor:
            return torch.full_like(token, value)

        return (
            token,
            constant(self.micro_step << _BLOCK_BITS),
            constant(self.step),
            constant(self.rank),
        )


@dataclass(frozen=True)
class SampleStream:
    """Noise keyed by what: (seed, epoch, document, position, channel), wherever it lands."""

    seed: int

    def counters(self, layout: TokenLayout, tokens: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counter's words for these tokens, each (num_tokens,); word 1 lacks the block."""
        if layout.document is None or layout.epoch is None:
            raise ValueError(
                "noise.stream=sample needs the document ids of the batch: describe the batch to "
                "the handle (`handle.describe`), or use stream='rank'."
            )
        position = layout.position[tokens]
        stream = torch.full_like(position, _SAMPLE_STREAM)
        return position, stream, layout.document[tokens], layout.epoch[tokens]


def draw(
    stream: RankStream | SampleStream, layout: TokenLayout, tokens: slice, hidden_size: int
) -> Tensor:
    """u ~ U(-1, 1), float32 (num_tokens, hidden_size): a pure function of its arguments."""
    num_blocks = -(-hidden_size // 4)
    if num_blocks > 1 << _BLOCK_BITS:
        raise ValueError(f"A hidden size of {hidden_size} is beyond the noise stream's 2^17.")
    c0, c1, c2, c3 = (word[:, None] for word in stream.counters(layout, tokens))
    block = torch.arange(num_blocks, device=c0.device)[None]
    key = (stream.seed & 0xFFFFFFFF, (stream.seed >> 32) & 0xFFFFFFFF)
    words = philox4x32((c0, c1 + block, c2, c3), key)
    # Channel 4 b + w is word w of block b.
    return uniform(torch.stack(words, dim=-1).flatten(1)[:, :hidden_size])


@torch.no_grad()
def add_noise_(
    x: Tensor,
    layout: TokenLayout,
    stream: RankStream | SampleStream,
    alpha: float,
    embed_scale: float = 1.0,
) -> Tensor:
    """Add the law's noise to embeddings in place; say how much was added.

    Computed and added in float32, rounded once to x's dtype. Padding is left as it is, bit for bit.

    Args:
        x: (num_tokens, hidden_size), any floating dtype.
        embed_scale: factor that the embedding module has applied to its lookup already, so that
            the noise keeps its size relative to the embedding (Gemma 3).

    Returns:
        float32 (num_tokens,): at index i the squared L2 norm of what document i of the batch
        received, over embed_scale; 0 beyond the number of documents.
    """
    num_tokens, hidden_size = x.shape
    squares = torch.zeros(num_tokens, dtype=torch.float32, device=x.device)
    for start in range(0, num_tokens, _CHUNK_TOKENS):
        tokens = slice(start, min(start + _CHUNK_TOKENS, num_tokens))
        length = layout.length[tokens]
        scale = alpha * embed_scale / torch.sqrt(length.to(torch.float64) * hidden_size)
        noise = draw(stream, layout, tokens, hidden_size).mul_(scale.to(torch.float32)[:, None])
        before = x[tokens].to(torch.float32)
        after = (before + noise).to(x.dtype)
        after = torch.where((length > 0)[:, None], after, x[tokens])
        added = (after.to(torch.float32) - before).square_().sum(1)
        squares.index_add_(0, layout.segment[tokens], added)
        x[tokens] = after
    return squares / embed_scale**2


def expected_norm(alpha: float) -> float:
    """Root mean square of a document's noise norm under the law: alpha / sqrt(3)."""
    return alpha / math.sqrt(3)
