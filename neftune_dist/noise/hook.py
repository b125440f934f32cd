"""`NEFTune(alpha).attach(model)`: the noise on any causal LM's input embedding, in any loop.

Owns the two hooks it needs: one before the model's forward, which reads the batch's layout off the
arguments, and one behind the input embedding, which adds the noise in place to its fresh output.
Both are put on before a model is sharded or wrapped, and need nothing of the engine.
Only training forwards get noise: in `eval()` mode the hooks do nothing at all.
"""

from __future__ import annotations

import inspect
import math
import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from neftune_dist.noise.law import (
    MAX_MICRO_STEPS,
    RankStream,
    SampleStream,
    TokenLayout,
    add_noise_,
)

_MARK = "_neftune_handle"


class NEFTune:
    """NEFTune's noise, exact under padding, packing, data parallelism and resume.

    Args:
        alpha: strength; the paper's best are 5, 10 and 15. 0: no noise, no hooks.
        seed: key of the generator, below 2^63. torch's own generators are neither read nor moved.
        stream: `rank`: each data-parallel rank draws its own noise, by step and micro-step.
            `sample`: the noise belongs to the document, on whatever rank or layout it lands; the
            batch's documents are then told by `NEFTuneHandle.describe`.
        rank: data-parallel rank; None: that of torch.distributed, else RANK, else 0.

    Example::

        with NEFTune(5.0, seed=0).attach(model) as noise:
            for noise.step, batch in enumerate(batches):
                model(**batch).loss.backward()
    """

    def __init__(
        self, alpha: float, *, seed: int = 0, stream: str = "rank", rank: int | None = None
    ) -> None:
        if not (0 <= alpha <= 1000 and math.isfinite(alpha)):
            raise ValueError(f"alpha={alpha} is out of range: from 0 to 1000.")
        if stream not in ("rank", "sample"):
            raise ValueError(f"stream={stream!r} is not known: 'rank' or 'sample'.")
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} is out of range: from 0 to 2^63 - 1.")
        self.alpha, self.seed, self.stream = alpha, seed, stream
        self.rank = _data_parallel_rank() if rank is None else rank

    def attach(self, model: nn.Module) -> NEFTuneHandle:
        """Put the noise on `model`, a transformers causal LM (or what wraps one).

        Raises:
            ValueError: no input embedding to be found, or noise attached already.
        """
        return NEFTuneHandle(self, model)


class NEFTuneHandle:
    """The noise on one model. Leaving the `with` block, or `remove()`, takes it off.

    Attributes:
        step: the optimizer step your loop is at, for the `rank` stream. Setting it starts its
            micro-steps at 0; every training forward counts one up.
        num_fired: training forwards that got noise.
    """

    def __init__(self, neftune: NEFTune, model: nn.Module) -> None:
        self.neftune = neftune
        self.num_fired = 0
        self._step, self._micro_step = 0, 0
        self._layout: TokenLayout | None = None  # of the forward under way
        self._described: TokenLayout | None = None  # for the next forward
        self._norm_sum = self._num_documents = torch.zeros((), dtype=torch.float64)
        embedding = _input_embedding(model)
        if getattr(embedding, _MARK, None) is not None:
            raise ValueError("NEFTune is attached to this model already: remove() it first.")
        self._embedding = embedding
        # transformers' scaled embeddings (Gemma 3) keep the factor under one of these names.
        scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
        self._embed_scale = float(scale)
        setattr(embedding, _MARK, self)
        self._signature = inspect.signature(model.forward)
        self._removers = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            embedding.register_forward_hook(self._after_embedding),
        ]
        if neftune.alpha == 0:
            for remover in self._removers:
                remover.remove()

    @property
    def step(self) -> int:
        """The optimizer step that the next training forward belongs to."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step, self._micro_step = value, 0

    def describe(self, layout: TokenLayout) -> None:
        """Say what the tokens of the next training forward are, where its arguments do not."""
        self._described = layout

    def take_noise_norms(self) -> tuple[Tensor, Tensor]:
        """Sum over documents of the L2 norm of the noise they got, and their number, since the
        last call: float64 scalars on the model's device (on CPU where nothing fired)."""
        taken = self._norm_sum, self._num_documents
        self._norm_sum = self._num_documents = torch.zeros((), dtype=torch.float64)
        return taken

    def remove(self) -> None:
        """Take the noise off; the model is as it was before."""
        for remover in self._removers:
            remover.remove()
        if getattr(self._embedding, _MARK, None) is self:
            setattr(self._embedding, _MARK, None)

    def __enter__(self) -> NEFTuneHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _advance(self) -> tuple[int, int]:
        now = self._step, self._micro_step
        self._micro_step += 1
        if self._micro_step == MAX_MICRO_STEPS:  # a loop that never sets step runs on regardless
            self._step, self._micro_step = self._step + 1, 0
        return now

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._layout = None
        if not model.training:
            return
        described, self._described = self._described, None
        if described is not None:
            self._layout = described
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        input_ids = given.get("input_ids")
        if input_ids is None:
            raise ValueError(
                "NEFTune adds its noise behind the embedding lookup: call the model with "
                "input_ids, or describe the batch to the handle."
            )
        self._layout = TokenLayout.from_arguments(
            input_ids,
            attention_mask=given.get("attention_mask"),
            position_ids=given.get("position_ids"),
            cu_seq_lens=given.get("cu_seq_lens_q"),
        )

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layout, self._layout = self._layout, None
        if layout is None or not module.training:
            return
        num_tokens = output.numel() // output.shape[-1]
        if len(layout.length) != num_tokens:
            raise ValueError(
                f"The batch was described with {len(layout.length)} tokens, the embedding's "
                f"output has {num_tokens}."
            )
        step, micro_step = self._advance()
        n = self.neftune
        stream: RankStream | SampleStream
        if n.stream == "rank":
            stream = RankStream(n.seed, n.rank, step, micro_step)
        else:
            stream = SampleStream(n.seed)
        # In place on the lookup's fresh output: the gradient passes through unchanged, because the
        # backward of a lookup reads its indices, never its output.
        x = output.detach().view(num_tokens, output.shape[-1])
        squares = add_noise_(x, layout, stream, n.alpha, self._embed_scale)
        norms = squares.to(torch.float64).sqrt()
        documents = (layout.length > 0) & (layout.position == 0)
        # A sum on the device: the host does not wait for it. (A CPU scalar adds to any device's.)
        self._norm_sum = norms.sum() + self._norm_sum
        self._num_documents = documents.sum().to(torch.float64) + self._num_documents
        self.num_fired += 1


def _input_embedding(model: nn.Module) -> nn.Module:
    accessor = getattr(model, "get_input_embeddings", None)
    if accessor is None:  # a wrapper such as DDP keeps the model in .module
        inner = getattr(model, "module", None)
        accessor = getattr(inner, "get_input_embeddings", None)
    embedding = accessor() if accessor is not None else None
    if not isinstance(embedding, nn.Module):
        raise ValueError(
            f"{type(model).__name__} has no get_input_embeddings(): NEFTune cannot tell which "
            "layer embeds the tokens."
        )
    return embedding


def _data_parallel_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))
