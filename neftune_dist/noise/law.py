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
draws of a run share a counter. Of the block's four words, word w makes the draw of channel
4 block + w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import assert_async
from neftune_dist.noise.philox import philox4x32, to_draws

# L2 norm of a document's noise over alpha, root mean square: sqrt(E[u^2]).
NORMS = {"uniform": 1 / math.sqrt(3), "gaussian": 1 / math.sqrt(3), "symmetric": 1.0}
MAX_MICRO_STEPS = 1 << 15
MAX_HIDDEN_SIZE = 1 << 17
_BLOCK_BITS = 15
_SAMPLE_STREAM = 1 << 31


@dataclass(frozen=True)
class TokenLayout:
    """What each token of one forward pass is. All tensors int64, shape (num_tokens,), row by row.

    token: index of the token in the data-parallel rank's batch.
    length: real tokens of the token's document; 0 marks padding.
    position: of the token among the real tokens of its document.
    segment: document's index within the batch, below num_tokens; padding's is not read.
    document, epoch: the document's identity over the whole run, for the `sample` stream.
    """

    token: Tensor
    length: Tensor
    position: Tensor
    segment: Tensor
    document: Tensor | None = None
    epoch: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward pass, padding included."""
        return self.length.shape[0]

    def take(self, tokens: Tensor) -> TokenLayout:
        """The layout of some tokens of this one: a rank's slice of the sequence, under sequence or
        context parallelism. Lengths, positions and the noise stay those of the whole.

        Args:
            tokens: int64 (num_taken,), indices into this layout.
        """
        return self._map(lambda value: value[tokens])

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def without_padding(self, is_padding: Tensor) -> TokenLayout:
        """The same less the documents of one token at a row's end that are of padding tokens: what
        TRL appends to packed documents (`pad_to_multiple_of`), each at position 0.

        Args:
            is_padding: bool (rows, columns), where the tokens are the padding token.
        """
        alone = (is_padding & (self.length == 1).view(is_padding.shape)).to(torch.int64)
        at_end = alone.flip(1).cumprod(1).flip(1).flatten() > 0
        return replace(self, length=torch.where(at_end, 0, self.length))

    def _map(self, change: Callable[[Tensor], Tensor]) -> TokenLayout:
        changed: dict[str, Any] = {
            name: None if value is None else change(value) for name, value in vars(self).items()
        }
        return TokenLayout(**changed)

    @staticmethod
    def padding(num_tokens: int, device: torch.device | None = None) -> TokenLayout:
        """The layout of tokens that are all padding."""
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        return TokenLayout(zeros, zeros, zeros, zeros, zeros, zeros)

    @staticmethod
    def from_lengths(
        lengths: Tensor, *, documents: Tensor | None = None, epochs: Tensor | None = None
    ) -> TokenLayout:
        """The layout of documents that follow each other without padding.

        Args:
            lengths: int64 (num_documents,), each at least 1.
            documents, epochs: int64 (num_documents,), for the `sample` stream.

        Raises:
            ValueError: a length below 1, or not as many documents or epochs as lengths.
        """
        if not bool((lengths >= 1).all()):
            raise ValueError(f"A document has {int(lengths.min())} tokens: it needs at least one.")
        _check_identities(documents, epochs, len(lengths))
        segment = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        starts = torch.cumsum(lengths, 0) - lengths
        token = torch.arange(len(segment), device=lengths.device)
        return TokenLayout(
            token=token,
            length=lengths[segment],
            position=token - starts[segment],
            segment=segment,
            document=None if documents is None else documents.to(lengths.device)[segment],
            epoch=None if epochs is None else epochs.to(lengths.device)[segment],
        )

    @staticmethod
    def from_arguments(
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens: Tensor | None = None,
        seq_idx: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        epochs: Tensor | None = None,
    ) -> TokenLayout:
        """The layout that the arguments of a causal LM's forward pass describe.

        A row of `input_ids` (batch, sequence) is one document, less the tokens whose
        `attention_mask` is 0, on whichever side. A row may be several packed documents: by
        `cu_seq_lens` (num_documents + 1,) over the flattened tokens, where `seq_idx`
        (batch, sequence) or the mask's own values change, or where `position_ids` fall back.
        On a GPU nothing here waits for the device.

        Args:
            documents, epochs: (num_documents,), in order of appearance.

        Raises:
            ValueError: shapes that do not fit, or boundaries that do not rise from 0 to the number
                of tokens.
        """
        batch, sequence = input_ids.shape
        device = input_ids.device
        for name, given in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
            # (Some models take a dictionary of masks, one for each kind of layer.)
            shape = getattr(given, "shape", None)
            if given is not None and shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {shape and tuple(shape)}, input_ids "
                    f"{tuple(input_ids.shape)}: NEFTune needs one value a token."
                )
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask != 0
        starts = _document_starts(real, attention_mask, position_ids, cu_seq_lens, seq_idx)
        real, starts = real.flatten(), starts.flatten()
        segment = (starts.cumsum(0) - 1).clamp_min(0)
        if not torch.compiler.is_compiling() and device.type == "cpu":
            _check_identities(documents, epochs, int(starts.sum()))
        count = torch.zeros_like(segment).index_add(0, segment, real.to(torch.int64))
        ordinal = real.cumsum(0)  # from 1, over the real tokens of the batch
        preceding = count.cumsum(0) - count  # real tokens of the documents before
        return TokenLayout(
            token=torch.arange(batch * sequence, device=device),
            length=torch.where(real, count[segment], 0),
            position=torch.where(real, ordinal - 1 - preceding[segment], 0),
            segment=segment,
            document=None if documents is None else documents.to(device)[segment],
            epoch=None if epochs is None else epochs.to(device)[segment],
        )


def _document_starts(
    real: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """Which real tokens open a document: bool (batch, sequence)."""
    batch, sequence = real.shape
    # The first real token of a row does, wherever the padding stands.
    starts = real & (real.cumsum(1) == 1)
    index = torch.arange(sequence, device=real.device).expand(batch, sequence)
    last_real = torch.where(real, index, -1).cummax(1).values[:, :-1]
    inside = real[:, 1:] & (last_real >= 0)  # a real token stands before it in the row

    def before(values: Tensor) -> Tensor:
        """Of each token but a row's first: the value at the last real token before it. (What
        stands at padding is arbitrary and is passed over.)"""
        return torch.gather(values, 1, last_real.clamp_min(0))

    def shifted(opens: Tensor) -> Tensor:
        return torch.nn.functional.pad(opens & inside, (1, 0))

    if cu_seq_lens is not None:
        boundaries = cu_seq_lens.to(device=real.device, dtype=torch.int64)
        _check_boundaries(boundaries, batch * sequence)
        marks = torch.zeros(batch * sequence + 1, dtype=torch.bool, device=real.device)
        number = marks.index_fill(0, boundaries, True)[:-1].cumsum(0).view(batch, sequence)
        starts = starts | shifted(number[:, 1:] != before(number))
    elif seq_idx is not None:
        starts = starts | shifted(seq_idx[:, 1:] != before(seq_idx))
    elif position_ids is not None and _is_text(position_ids):
        # Positions rise within a document: one that does not exceed the last opens the next.
        rows = position_ids[0] if position_ids.dim() == 3 else position_ids
        positions = rows.expand(batch, sequence)
        starts = starts | shifted(positions[:, 1:] <= before(positions))
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        # A mask of 0 and 1 changes nothing here; some packers number the documents in it.
        starts = starts | shifted(attention_mask[:, 1:] != before(attention_mask))
    return starts


def _is_text(position_ids: Tensor) -> bool:
    """(batch, sequence); or the text's first of four, where images have three coordinates more."""
    return position_ids.dim() == 2 or (position_ids.dim() == 3 and position_ids.shape[0] == 4)


def _check_boundaries(boundaries: Tensor, num_tokens: int) -> None:
    rises = (boundaries[1:] > boundaries[:-1]).all()
    fits = rises & (boundaries[0] == 0) & (boundaries[-1] == num_tokens)
    # (Without the numbers: a compiled graph would be one for this number of tokens.)
    message = (
        "Cumulative lengths must rise from 0 to the number of tokens; a document of length 0 is "
        "none."
    )
    if torch.compiler.is_compiling() or boundaries.device.type != "cpu":
        assert_async(fits, message)
    elif not bool(fits):
        raise ValueError(f"{message} Given {num_tokens} tokens and {boundaries.tolist()[:8]}.")


def _check_identities(documents: Tensor | None, epochs: Tensor | None, number: int) -> None:
    for name, given in (("documents", documents), ("epochs", epochs)):
        if given is not None and given.shape != (number,):
            raise ValueError(
                f"The batch holds {number} documents, and {name} has shape {tuple(given.shape)}."
            )
        if given is not None and not bool(((given >= 0) & (given < 1 << 32)).all()):
            raise ValueError(f"A number in {name} is out of range: from 0 to 2^32 - 1.")


@dataclass(frozen=True)
class RankStream:
    """Noise keyed by where and when: (seed, rank, step, micro-step, token, channel)."""

    seed: int
    rank: int
    step: int | Tensor
    micro_step: int | Tensor

    def words(self, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counter's words of each token, int64 (num_tokens,); word 1 lacks the block."""
        if isinstance(self.micro_step, int) and not 0 <= self.micro_step < MAX_MICRO_STEPS:
            raise ValueError(f"micro_step={self.micro_step} is beyond the noise stream's 2^15.")
        token = layout.token

        def same(value: int | Tensor) -> Tensor:
            # Stride 0: no memory.
            return scalar(value, torch.int64, token.device).expand(token.shape)

        return token, same(self.micro_step << _BLOCK_BITS), same(self.step), same(self.rank)


@dataclass(frozen=True)
class SampleStream:
    """Noise keyed by what: (seed, epoch, document, position, channel), wherever it lands."""

    seed: int

    def words(self, layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The counter's words of each token, int64 (num_tokens,); word 1 lacks the block."""
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
    """u of the law, float32 (num_tokens, hidden_size), of mean 0: the reference that the operator
    is held to, in plain torch.

    uniform: U(-1, 1), the paper's. gaussian: of the same variance, 1/3. symmetric: -1 or 1
    (SymNoise, arXiv 2312.01523).
    """
    num_blocks = -(-hidden_size // 4)
    c0, c1, c2, c3 = (word[:, None] for word in stream.words(layout))
    block = torch.arange(num_blocks, device=c0.device)[None]
    words = philox4x32((c0, c1 + block, c2, c3), key_words(stream.seed))
    return to_draws(words, distribution).flatten(1)[:, :hidden_size]


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor () on `device`, filled in by a kernel: to copy it from the host's memory
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
    """What a token's draws are multiplied by, float32 (num_tokens,): `alpha / sqrt(L d)`; 0 where
    nothing is to be added.

    Args:
        alpha: of either sign; a tensor is float64, shape ().
        embed_scale: factor that the embedding module has applied to its lookup already, so that
            the noise keeps its size relative to the embedding (Gemma 3).
        row_length: L of every token, padding too: the widely copied hook's law.
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
