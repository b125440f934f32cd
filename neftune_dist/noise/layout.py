"""The layout of a forward pass: which document a token belongs to, where, and how long that is.

`TokenLayout.from_arguments` derives it from the arguments of a forward pass, padded or packed;
`TokenLayout.from_lengths` from the lengths of documents. Layouts that contradict themselves are
refused (`ValueError`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import assert_async


@dataclass(frozen=True)
class TokenLayout:
    """The documents that the tokens of one forward pass belong to. All tensors are int64,
    (num_tokens,), row by row.

    Attributes:
        token: index of the token in the data-parallel rank's batch.
        length: real tokens of the token's document; 0 marks padding.
        position: of the token among the real tokens of its document.
        segment: the document's index within the batch, below num_tokens; not read for padding.
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
        """The layout of some of the tokens: a rank's slice of the sequence, under sequence or
        context parallelism. Lengths, positions and the noise stay those of the whole sequence.

        Args:
            tokens: int64 (num_taken,), indices into this layout.
        """
        return self._map(lambda value: value[tokens])

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on another device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def without_padding(self, is_padding: Tensor) -> TokenLayout:
        """The same layout with padding tokens at a row's end counted as padding. TRL appends them
        to packed documents (`pad_to_multiple_of`), all at position 0: they look like documents.

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
            lengths: int64 (num_documents,), at least 1.
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

        A row is one document, without the tokens whose `attention_mask` is 0, on whichever side. A
        row may also hold several packed documents: then they begin at the entries of
        `cu_seq_lens`, where `seq_idx` or the mask's own values change, or where `position_ids` do
        not rise. On a GPU nothing here waits for the device.

        Args:
            input_ids: (batch, sequence).
            attention_mask: (batch, sequence); 0 marks padding.
            position_ids: (batch, sequence), or (4, batch, sequence) with the text's first.
            cu_seq_lens: (num_documents + 1,), cumulative lengths over the flattened tokens.
            seq_idx: (batch, sequence), the document's number.
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

    @staticmethod
    def from_call(given: Mapping[str, Any], padding_token: int | None) -> TokenLayout:
        """The layout of a call of a causal LM, by the names of transformers' arguments.

        Args:
            padding_token: fills rows of packed documents without a mask; None: nothing does.

        Raises:
            ValueError: the call has no `input_ids`, or as `from_arguments`.
        """
        input_ids = given.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "NEFTune adds its noise after the embedding lookup in the model's forward: call it "
                "with input_ids; if it names them otherwise, describe the batch to the handle."
            )
        cu_seq_lens = given.get("cu_seq_lens_q")
        layout = TokenLayout.from_arguments(
            input_ids,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            cu_seq_lens=given.get("cu_seqlens") if cu_seq_lens is None else cu_seq_lens,
            seq_idx=given.get("seq_idx"),
        )
        if given.get("attention_mask") is None and padding_token is not None:
            layout = layout.without_padding(input_ids == padding_token)
        return layout


def _document_starts(
    real: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens: Tensor | None,
    seq_idx: Tensor | None,
) -> Tensor:
    """Whether a token is the first real one of its document: bool (batch, sequence)."""
    batch, sequence = real.shape
    # The first real token of a row begins one, wherever the padding stands.
    starts = real & (real.cumsum(1) == 1)
    index = torch.arange(sequence, device=real.device).expand(batch, sequence)
    last_real = torch.where(real, index, -1).cummax(1).values[:, :-1]
    inside = real[:, 1:] & (last_real >= 0)  # a real token stands before it in the row

    def before(values: Tensor) -> Tensor:
        """The value at the last real token before each token but a row's first: (batch,
        sequence - 1). Values at padding are arbitrary, so they are not looked at."""
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
    """Whether positions are the text's: (batch, sequence), or the first of four, where images have
    three coordinates more. (Three alone are an image's.)"""
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
