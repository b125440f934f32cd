"""The hooks that add the noise to a model, and the handle that a training loop steers them by.

The hooks stand around the model's forward, where they read the batch's layout off the arguments,
and after the input embedding, where they add the noise in place to its fresh output. They are put
on before a model is sharded or wrapped, and need nothing of the engine. Only training forwards get
noise: in `eval()` mode and where gradients are off (`generate`, reference passes) they do nothing.

What changes from forward to forward is held in tensors, so that `torch.compile` sees the hooks as
part of the model: no graph break, and no recompilation as steps go by.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from neftune_dist.compat.torch import is_context_parallel, is_view, move_forward_hook_last
from neftune_dist.distributed import environment
from neftune_dist.noise.embedding import (
    check_embedding,
    embedding_scale,
    innermost,
    input_embedding,
    local_activation,
    padding_token,
)
from neftune_dist.noise.law import MAX_MICRO_STEPS, RankStream, SampleStream
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise, count_forward_
from neftune_dist.noise.recomputation import LastForward, NoisedForward, is_recomputing

if TYPE_CHECKING:
    from neftune_dist.noise.neftune import NEFTune

_MARK = "_neftune_handle"
# Layout of the forward pass under way, by the handle's number; None: it gets no noise, or has it. A
# global, not an attribute of the handle: torch.compile reaches the handle through the embedding's
# hooks and would treat the tensors it finds there as parameters, whose shapes never change.
_UNDER_WAY: dict[int, TokenLayout | None] = {}
_numbers = itertools.count()


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
        # (A wrapper of PEFT's may pass on *args.)
        self._names = next(filter(None, map(_positional_names, model.modules())), [])
        self._tensor_parallel = getattr(model, "tp_size", None) not in (None, 1)
        # Where documents are packed without a mask, it fills the row after the last one.
        self.padding_token: int | None = padding_token(model)
        self._rank = _data_parallel_rank() if neftune.rank is None else neftune.rank
        self._needs_rank = neftune.rank is None and neftune.stream == "rank"
        self._weight_is_shared = False
        self._number = next(_numbers)
        self._described: TokenLayout | None = None  # for the next forward
        self._last = LastForward()
        self._step = 0
        # The optimizer step; since it was set: micro-steps, and noised forwards.
        self._clock = torch.zeros(3, dtype=torch.int64)
        self._strength, self._sign = neftune.alpha, 1
        self._needs_sign = neftune.distribution == "symmetric"
        self._alpha = torch.tensor(neftune.alpha, dtype=torch.float64)  # strength times sign
        # Since `take_noise_norms` was last called: the sum of the documents' norms, their number.
        self._norms = torch.zeros(2, dtype=torch.float64)

        setattr(embedding, _MARK, self)
        self._removers = []
        if neftune.alpha:
            after_embedding = embedding.register_forward_hook(self._after_embedding)
            self._hook_id = after_embedding.id
            self._removers = [
                after_embedding,
                model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                model.register_forward_hook(self._after_model),
            ]
            if self._needs_rank:
                self._removers.append(embedding.register_forward_pre_hook(self._before_embedding))

    @property
    def step(self) -> int:
        """The optimizer step of your loop, for the `rank` stream. Setting it starts micro-steps at
        0; every training forward counts one up."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = counter_word("step", value)
        self._clock[0].fill_(self._step)
        self._clock[1:].fill_(0)

    @property
    def alpha(self) -> float:
        """The strength from the next forward on; set it to warm the noise up or let it decay."""
        return self._strength

    @alpha.setter
    def alpha(self, value: float) -> None:
        check_alpha(value)
        if value and not self._removers:
            raise ValueError("NEFTune was attached with alpha=0, or removed: it has no hooks.")
        self._strength = value
        self._alpha.fill_(value * self._sign)

    @property
    def sign(self) -> int:
        """The sign of the noise from the next forward on, 1 or -1. Changing it from 1 to -1 goes
        back one micro-step: the next forward gets the opposite of the last one's noise."""
        return self._sign

    @sign.setter
    def sign(self, value: int) -> None:
        if value not in (1, -1):
            raise ValueError(f"sign={value} is not known: 1 or -1.")
        self._needs_sign = False
        if value != self._sign:
            self._sign = value
            self._alpha.neg_()
            if value == -1:
                self._clock[1].sub_(1).clamp_min_(0)

    @property
    def num_fired(self) -> int:
        """Training forwards that got noise since `step` was last set. Waits for the device."""
        return int(self._clock[2])

    def describe(self, layout: TokenLayout) -> None:
        """Set the layout of the next training forward, instead of reading it off its arguments."""
        self._described = layout

    def take_noise_norms(self) -> tuple[Tensor, Tensor]:
        """Sum over documents of the L2 norm of their noise, and their number, since the last call.

        Returns:
            Two float64 scalars on the model's device (on CPU where nothing fired). A document in
            slices counts, with the norm of all of it, on the rank that has its first token.
        """
        norm_sum, num_documents = self._norms.clone().unbind()
        self._norms.zero_()
        return norm_sum, num_documents

    def remove(self) -> None:
        """Take the noise off; the model is as it was before."""
        while self._removers:
            self._removers.pop().remove()
        _UNDER_WAY.pop(self._number, None)
        if getattr(self._embedding, _MARK, None) is self:
            setattr(self._embedding, _MARK, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The handle of a model that was copied or pickled, under another number. Where the
        embedding alone was copied (PEFT's modules_to_save), the copy's hook finds no forward pass
        under way, which is an error."""
        vars(self).update(state, _number=next(_numbers))

    def __enter__(self) -> NEFTuneHandle:
        if self.neftune.alpha and not self._removers:
            raise ValueError("This noise was removed: attach NEFTune to the model again.")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if is_recomputing():
            return
        _UNDER_WAY[self._number] = None
        if not (model.training and torch.is_grad_enabled()):
            return
        described, self._described = self._described, None
        if self._needs_sign:
            raise ValueError(
                "distribution='symmetric' adds noise and its opposite: pass every batch forward "
                "twice, after `sign = 1` and after `sign = -1` on the handle."
            )
        if not torch.compiler.is_compiling():
            innermost(model)  # refuses a copy
            # After all other hooks of the embedding: under vocabulary parallelism one of them sums
            # the partial embeddings, or gathers the rows, and the noise is added to the result.
            move_forward_hook_last(self._embedding, self._hook_id)
            self._last.begin()
            if self._needs_rank:  # the process group may be younger than the handle
                self._rank = _data_parallel_rank()
        if described is not None:
            _UNDER_WAY[self._number] = described
            return
        if self.neftune.slices is not None:
            raise ValueError(
                "A slice's arguments do not say how long its documents are: describe the slice of "
                "every batch to the handle (TokenLayout.take)."
            )
        if not torch.compiler.is_compiling() and is_context_parallel():
            raise ValueError(
                "context_parallel has cut the batch up, and a slice does not say how long its "
                "documents are: set NEFTune(slices=..., rank=...) and describe every batch's slice "
                "to the handle (TokenLayout.take)."
            )
        # (Lengths differ where the model has *args of its own; names beyond them are not read.)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        _UNDER_WAY[self._number] = TokenLayout.from_call(given, self.padding_token)

    def _before_embedding(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note whether the lookup uses a sharded weight: FSDP2, of which the embedding may be a
        unit, has gathered its shards by now; tensor parallelism keeps them."""
        weight = getattr(module, "weight", None)
        self._weight_is_shared = isinstance(weight, DTensor) and weight.device_mesh.size() > 1

    def _after_embedding(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        layout = _UNDER_WAY.get(self._number)
        recomputing = is_recomputing()
        if not recomputing and module.training and self._number not in _UNDER_WAY:
            raise RuntimeError(
                "The noise was not added: the embedding was looked up outside the forward of the "
                f"{self._model_name} that NEFTune was attached to. Call that model with input_ids; "
                "or attach NEFTune to the part that is called (model.model), after adapters."
            )
        if layout is None and not (module.training and recomputing):
            # Not training, or a second lookup: of some tokens it may be, but not of the batch.
            if module.training and self._last.is_noised(output.numel() // output.shape[-1]):
                raise RuntimeError(
                    f"{self._model_name} looked the batch up twice in one forward, and the noise "
                    "was added to the first lookup alone: attach NEFTune to the part that is "
                    "called for each (such as its language model)."
                )
            return None
        if not torch.compiler.is_compiling() and is_view(output):
            # Tensor parallelism returns a view that autograd does not let anybody change in place.
            output = output.clone()
        if self._needs_rank and (self._tensor_parallel or self._weight_is_shared):
            raise ValueError(
                "The model is tensor parallel: set NEFTune(rank=...) to the data-parallel rank, "
                "which ranks that hold copies of one batch share."
            )
        # In place on the lookup's fresh output: the gradient passes through unchanged, because the
        # backward of a lookup reads its indices, never its output.
        x = local_activation(output.detach())
        if layout is None:
            self._add(x, self._last.recall())
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
        _UNDER_WAY[self._number] = None
        alpha = self._alpha.clone()
        step, micro_step, _ = count_forward_(self._clock).unbind()
        forward = NoisedForward(layout, alpha, step, micro_step)
        squares = self._add(x, forward)
        documents = (layout.length > 0) & (layout.position == 0)
        if self.neftune.slices is not None:
            torch.distributed.all_reduce(squares, group=self.neftune.slices)
            squares = torch.where(documents, squares[layout.segment], 0.0)
        self._norms.add_(torch.stack((squares.sqrt().sum(), documents.sum().to(torch.float64))))
        if not torch.compiler.is_compiling():
            self._last.keep(forward)
        return output

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._last.end()
        if _UNDER_WAY.pop(self._number, None) is not None:
            raise RuntimeError(
                f"The noise was not added: {self._model_name} did not call the embedding that its "
                "get_input_embeddings() named when NEFTune was attached, or called it with "
                "gradients off. Attach it after resizing the embedding and before compiling, and "
                "checkpoint activations with use_reentrant=False."
            )

    def _add(self, x: Tensor, forward: NoisedForward) -> Tensor:
        """Add a forward's noise to the embeddings x; return `add_noise`'s squared norms."""
        n, layout = self.neftune, forward.layout
        stream: RankStream | SampleStream
        if n.stream == "rank":
            # In a loop that never sets the step, micro-steps past the limit count as steps.
            overflow = forward.micro_step // MAX_MICRO_STEPS
            within = forward.micro_step % MAX_MICRO_STEPS
            stream = RankStream(n.seed, self._rank, forward.step + overflow, within)
        else:
            stream = SampleStream(n.seed)
        return add_noise(
            x,
            layout,
            stream,
            forward.alpha,
            distribution=n.distribution,
            embed_scale=self._embed_scale,
            row_length=x.shape[-2] if n.length == "padded" else None,
            num_segments=layout.num_tokens * (n.slices.size() if n.slices else 1),
        )


def check_alpha(alpha: float) -> None:
    """Raise `ValueError` where the strength is out of range, or NaN."""
    if isinstance(alpha, str | None) or not 0 <= alpha <= 1000:
        raise ValueError(f"alpha={alpha!r} is out of range: a number from 0 to 1000.")


def counter_word(name: str, value: SupportsIndex, bits: int = 32) -> int:
    """A whole number of any type as an int. Raises `ValueError` for others, and out of range."""
    whole = operator.index(value) if hasattr(value, "__index__") else -1
    if not 0 <= whole < 1 << bits:
        raise ValueError(f"{name}={value} is out of range: a whole number from 0 to 2^{bits} - 1.")
    return whole


def _positional_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _data_parallel_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return environment.number("RANK", 0)
