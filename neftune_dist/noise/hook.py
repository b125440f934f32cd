"""`NEFTune(alpha).attach(model)`: the noise on any causal LM's input embedding, in any loop.

Owns the hooks it needs: around the model's forward, where the batch's layout is read off the
arguments, and behind the input embedding, where the noise is added in place to its fresh output.
They are put on before a model is sharded or wrapped, and need nothing of the engine. Only training
forwards get noise: in `eval()` mode and where gradients are off (`generate`, reference passes) the
hooks do nothing at all.

What moves on from forward to forward is held in tensors, so that `torch.compile` sees the hooks as
part of the model: no graph break, and no recompilation as steps go by.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from neftune_dist.compat.torch import is_view, move_forward_hook_last
from neftune_dist.distributed import environment
from neftune_dist.noise.embedding import (
    check_embedding,
    embedding_scale,
    innermost,
    input_embedding,
    local_activation,
    padding_token,
)
from neftune_dist.noise.law import MAX_MICRO_STEPS, NORMS, RankStream, SampleStream
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise, count_forward_
from neftune_dist.noise.recomputation import LastForward, is_recomputing

_MARK = "_neftune_handle"
# Handle's number: layout of the forward pass under way. Here and not in the handle, because
# torch.compile takes what it reaches through the embedding's hooks for parameters, whose shapes
# never change.
_UNDER_WAY: dict[int, TokenLayout] = {}
_numbers = itertools.count()


class NEFTune:
    """NEFTune's noise, exact under padding, packing, data parallelism and resume.

    Args:
        alpha: strength; the paper's best are 5, 10 and 15. 0: no noise, no hooks.
        seed: key of the generator, below 2^63. torch's own generators are neither read nor moved.
        stream: `rank`: each data-parallel rank draws its own noise, by step and micro-step.
            `sample`: the noise belongs to the document, on whatever rank or layout it lands; the
            batch's documents are then told by `NEFTuneHandle.describe`.
        rank: data-parallel rank, the same on ranks that hold slices or copies of one batch (tensor
            or sequence parallelism); None: that of torch.distributed, else RANK, else 0.
        distribution: `uniform`, the paper's. `gaussian`, of the same variance. `symmetric`
            (SymNoise, arXiv 2312.01523): -1 or 1, so a norm of alpha; every batch is to be passed
            forward twice in a row, the second time with the opposite noise.
        slices: process group of the ranks that hold the slices of this rank's sequences, equally
            long: a document's norm is then that of all of it, counted by the rank that has its
            first token. A collective of the group in every noised forward.
        length: `document`: the law. `padded`: L is the length of the padded or packed row, and
            padding is noised as well; what the widely copied hook does, for comparison.

    Example::

        with NEFTune(5.0, seed=0).attach(model) as noise:
            for noise.step, batch in enumerate(batches):
                model(**batch).loss.backward()
    """

    def __init__(
        self,
        alpha: float,
        *,
        seed: int = 0,
        stream: str = "rank",
        rank: int | None = None,
        distribution: str = "uniform",
        length: str = "document",
        slices: ProcessGroup | None = None,
    ) -> None:
        _check_alpha(alpha)
        for name, value, known in (
            ("stream", stream, ("rank", "sample")),
            ("distribution", distribution, tuple(NORMS)),
            ("length", length, ("document", "padded")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known: {' or '.join(known)}.")
        if stream == "sample" and length == "padded":
            raise ValueError(
                "length='padded' noises the padding too, which belongs to no document: it goes "
                "with stream='rank'."
            )
        if not 0 <= seed < 1 << 63:
            raise ValueError(f"seed={seed} is out of range: from 0 to 2^63 - 1.")
        if rank is not None and not 0 <= rank < 1 << 32:
            raise ValueError(f"rank={rank} is out of range: from 0 to 2^32 - 1.")
        self.alpha, self.seed, self.stream, self.rank = alpha, seed, stream, rank
        self.distribution, self.length, self.slices = distribution, length, slices

    def attach(self, model: nn.Module) -> NEFTuneHandle:
        """Put the noise on `model`, a transformers causal LM (or what wraps one).

        Raises:
            ValueError: no input embedding to be found, noise attached already, or a model that the
                law says nothing about.
        """
        return NEFTuneHandle(self, model)


class NEFTuneHandle:
    """The noise on one model. Leaving the `with` block, or `remove()`, takes it off."""

    def __init__(self, neftune: NEFTune, model: nn.Module) -> None:
        self.neftune = neftune
        model = innermost(model)
        embedding = input_embedding(model)
        if neftune.alpha:
            check_embedding(embedding)
        # (Not on the embedding alone: it may have been wrapped since, by PEFT for instance.)
        if any(getattr(module, _MARK, None) is not None for module in model.modules()):
            raise ValueError("NEFTune is attached to this model already: remove() it first.")
        self._model_name, self._embedding = type(model).__name__, embedding
        self._embed_scale = embedding_scale(embedding)
        parameters = inspect.signature(model.forward).parameters
        self._names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._tensor_parallel = getattr(model, "tp_size", None) not in (None, 1)
        # Where documents are packed without a mask, it fills the row behind the last one.
        self.padding_token: int | None = padding_token(model)
        self._rank = _data_parallel_rank() if neftune.rank is None else neftune.rank

        self._weight_is_shared = False
        self._number = next(_numbers)
        self._described: TokenLayout | None = None  # for the next forward
        self._last = LastForward()
        self._step = 0
        # The optimizer step, and the noised forwards since it was set.
        self._clock = torch.zeros(2, dtype=torch.int64)
        self._alpha = torch.tensor(neftune.alpha, dtype=torch.float64)
        # Of the documents noised since they were last taken: the sum of norms, and the number.
        self._norms = torch.zeros(2, dtype=torch.float64)

        setattr(embedding, _MARK, self)
        self._removers = []
        if neftune.alpha:
            behind_embedding = embedding.register_forward_hook(self._after_embedding)
            self._hook_id = behind_embedding.id
            self._removers = [
                behind_embedding,
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                model.register_forward_hook(self._after_model),
            ]
            if neftune.rank is None:
                self._removers.append(embedding.register_forward_pre_hook(self._before_embedding))

    @property
    def step(self) -> int:
        """The optimizer step your loop is at, for the `rank` stream. Setting it starts its
        micro-steps at 0; every training forward counts one up."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        if not 0 <= value < 1 << 32:
            raise ValueError(f"step={value} is out of range: from 0 to 2^32 - 1.")
        self._step = value
        self._clock[0].fill_(value)
        self._clock[1].fill_(0)

    @property
    def alpha(self) -> float:
        """The strength from the next forward on; set it to warm the noise up or let it decay."""
        return float(self._alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        _check_alpha(value)
        if value and not self._removers:
            raise ValueError("NEFTune was attached with alpha=0, which puts on no hooks.")
        self._alpha.fill_(value)

    @property
    def num_fired(self) -> int:
        """Training forwards that got noise since `step` was last set. Waits for the device."""
        return int(self._clock[1])

    def describe(self, layout: TokenLayout) -> None:
        """Say what the tokens of the next training forward are, where its arguments do not."""
        self._described = layout

    def take_noise_norms(self) -> tuple[Tensor, Tensor]:
        """Sum over documents of the L2 norm of the noise they got, and their number, since the
        last call: float64 scalars on the model's device (on CPU where nothing fired). Of a sliced
        sequence each slice adds its own norm, and the first the document."""
        norm_sum, num_documents = self._norms.clone().unbind()
        self._norms.zero_()
        return norm_sum, num_documents

    def remove(self) -> None:
        """Take the noise off; the model is as it was before."""
        for remover in self._removers:
            remover.remove()
        _UNDER_WAY.pop(self._number, None)
        if getattr(self._embedding, _MARK, None) is self:
            setattr(self._embedding, _MARK, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> NEFTuneHandle:
        """Of a copied model: a number of its own. Where the embedding alone was copied (PEFT's
        modules_to_save), the copy's hook then finds no forward pass under way, and that is told."""
        other = object.__new__(NEFTuneHandle)
        memo[id(self)] = other
        vars(other).update(copy.deepcopy(vars(self), memo), _number=next(_numbers))
        return other

    def __enter__(self) -> NEFTuneHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_recomputing():
            return
        described, self._described = self._described, None
        _UNDER_WAY.pop(self._number, None)
        if not (model.training and torch.is_grad_enabled()):
            return
        if not torch.compiler.is_compiling():
            # Last of the embedding's hooks: one that sums up a vocabulary-parallel embedding's
            # parts, or gathers its rows, must have run.
            move_forward_hook_last(self._embedding, self._hook_id)
            self._last.begin()
        if described is not None:
            _UNDER_WAY[self._number] = described
            return
        # (Lengths differ where the model has *args of its own; names beyond them are not read.)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        _UNDER_WAY[self._number] = TokenLayout.from_call(given, self.padding_token)

    def _before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """See how the weight is laid out where the lookup uses it: FSDP2, of which the embedding
        may be a unit, has gathered its shards by now; tensor parallelism keeps its own."""
        weight = getattr(module, "weight", None)
        self._weight_is_shared = isinstance(weight, DTensor) and weight.device_mesh.size() > 1

    def _after_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        layout = _UNDER_WAY.pop(self._number, None)
        if layout is None and not (module.training and is_recomputing()):
            return None  # not training, or a second lookup
        if not torch.compiler.is_compiling() and is_view(output):
            # Memory that is not the lookup's own; what tensor parallelism hands out is a view that
            # autograd lets nobody change in place.
            output = output.clone()
        if self.neftune.rank is None and (self._tensor_parallel or self._weight_is_shared):
            raise ValueError(
                "The model is tensor parallel: say NEFTune(rank=...), the data-parallel rank, "
                "which ranks that hold copies of one batch share."
            )
        # In place on the lookup's fresh output: the gradient passes through unchanged, because the
        # backward of a lookup reads its indices, never its output.
        x = local_activation(output.detach())
        if layout is None:
            last = self._last.recall()
            self._add(x, last.layout, last.alpha, last.step, last.micro_step)
            return output
        if layout.num_tokens != x.numel() // x.shape[-1]:
            raise ValueError(
                f"The batch was described with {layout.num_tokens} tokens, the embedding's output "
                f"has {x.numel() // x.shape[-1]}: for a slice of a sequence, describe the slice "
                "(TokenLayout.take)."
            )
        if self._clock.device != x.device:
            self._clock, self._alpha = self._clock.to(x.device), self._alpha.to(x.device)
            self._norms = self._norms.to(x.device)
        alpha = self._alpha.clone()
        step, count = count_forward_(self._clock).unbind()
        squares = self._add(x, layout, alpha, step, count)
        documents = (layout.length > 0) & (layout.position == 0)
        if self.neftune.slices is not None:
            torch.distributed.all_reduce(squares, group=self.neftune.slices)
            squares = torch.where(documents, squares[layout.segment], 0.0)
        self._norms.add_(torch.stack((squares.sqrt().sum(), documents.sum().to(torch.float64))))
        if not torch.compiler.is_compiling():
            self._last.keep(layout, alpha, step, count)
        return output

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _UNDER_WAY.pop(self._number, None) is not None:
            raise RuntimeError(
                f"The noise was not added: {self._model_name} did not call the embedding that its "
                "get_input_embeddings() named when NEFTune was attached, or called it with "
                "gradients off. Attach it after resizing the embedding and before compiling, and "
                "checkpoint activations with use_reentrant=False."
            )

    def _add(
        self, x: Tensor, layout: TokenLayout, alpha: Tensor, step: Tensor, count: Tensor
    ) -> Tensor:
        n = self.neftune
        if n.distribution == "symmetric":
            # Forwards come in pairs: the same draws, first added, then taken away.
            alpha, count = alpha * (1 - 2 * (count & 1)), count >> 1
        stream: RankStream | SampleStream
        if n.stream == "rank":
            # A loop that never sets the step runs on regardless.
            overflow = count // MAX_MICRO_STEPS
            stream = RankStream(n.seed, self._rank, step + overflow, count % MAX_MICRO_STEPS)
        else:
            stream = SampleStream(n.seed)
        return add_noise(
            x,
            layout,
            stream,
            alpha,
            distribution=n.distribution,
            embed_scale=self._embed_scale,
            row_length=x.shape[-2] if n.length == "padded" else None,
            num_segments=layout.num_tokens * (n.slices.size() if n.slices else 1),
        )


def _check_alpha(alpha: float) -> None:
    if not (0 <= alpha <= 1000 and math.isfinite(alpha)):
        raise ValueError(f"alpha={alpha} is out of range: from 0 to 1000.")


def _data_parallel_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return environment.number("RANK", 0)
