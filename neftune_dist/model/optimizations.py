"""How the transformer blocks compute: kernels, precision, activations kept for the backward.

None of it changes results beyond rounding. It is applied once, to a model on the meta device,
before sharding: so the engines' hooks stay outside of the compiled and recomputed functions.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from neftune_dist.compat.torch import (
    COMPUTE_BOUND_OPERATORS,
    GROUPED_PRODUCT,
    limit_recompiles,
    recompile_limit_as,
)
from neftune_dist.compat.transformers import block_class_names
from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model.float8 import use_float8
from neftune_dist.model.liger import use_liger_kernels
from neftune_dist.model.varlen import VARLEN_OPERATOR
from neftune_dist.system.compilers import missing_compiler

# Compute-bound operators: saved. The memory-bound ones between them are recomputed.
_KEPT_BY_SELECTIVE = {*COMPUTE_BOUND_OPERATORS, VARLEN_OPERATOR}
# What torch.compile treats as dynamic: the inputs of a block, whose lengths change from batch to
# batch, so that one graph serves all. With `dynamic=True` integers that a block holds would be
# dynamic, too, where FSDP2 shards it: the width of a head, in the indices of every kernel
# (torch 2.13; pytorch/pytorch#194795).
_DYNAMIC_SOURCES = r"L\['args'\],L\['kwargs'\]"
_BREAK_COUNTERS = ("graph_break", "unimplemented")  # of torch.compile


def blocks(model: Any) -> list[nn.Module]:
    """The repeated transformer blocks, in order: the units of sharding, recomputing, compiling.

    The members of a model's lists whose classes it names as blocks (it names parts of them, too,
    and embeddings); where it names none, of its largest list.
    """
    names = block_class_names(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    named = [block for members in lists for block in members if type(block).__name__ in names]
    if not named and lists:
        largest: nn.ModuleList = max(lists, key=_numel)
        named = list(largest)
    inner = {id(part) for block in named for part in block.modules() if part is not block}
    return [block for block in dict.fromkeys(named) if id(block) not in inner]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def configure(model: Any, config: ModelConfig) -> None:
    """Apply `model.kernels`, `float8`, `activation_checkpointing` and `compile`.

    Raises:
        UserError: the model, the machine or a missing package does not allow it.
    """
    if not blocks(model) and (config.compile or config.activation_checkpointing != "none"):
        raise UserError(
            f"{type(model).__name__} names no repeated blocks: model.activation_checkpointing and "
            "model.compile need them; set none and false."
        )
    # torch.compile would look for one at the first step.
    if config.compile and (missing := missing_compiler(torch.cuda.is_available())):
        raise UserError(
            f"model.compile=true needs a compiler, and {missing} is not found: install one, or set "
            "model.compile=false."
        )
    if config.kernels == "liger":
        use_liger_kernels(model)
    if config.float8 != "none":
        use_float8(model, config.float8, within=blocks(model))
    recomputation = _recomputation(model, config.activation_checkpointing)
    for block in blocks(model):
        forward = block.forward
        if config.activation_checkpointing != "none":
            forward = partial(checkpoint, forward, **recomputation)
        if config.compile:
            forward = _within_limit(torch.compile(_with_named_inputs(forward)))
        if forward is not block.forward:
            block.forward = forward  # type: ignore[method-assign]
    if config.compile:
        # They are the process's: those of another model say nothing of this one.
        torch.compiler.reset()
        _compile_counters().clear()
        known = torch.compiler.config.dynamic_sources
        if _DYNAMIC_SOURCES not in known:
            torch.compiler.config.dynamic_sources = f"{known},{_DYNAMIC_SOURCES}"
        # Beyond the limit torch would go on without compiling, silently.
        limit_recompiles(len(blocks(model)))


def _with_named_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `forward` so that its inputs have the names in `_DYNAMIC_SOURCES`."""

    def block(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return block


def _within_limit(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a compiled block so that too many graphs are a `UserError`."""

    def block(*args: Any, **kwargs: Any) -> Any:
        with recompile_limit_as(
            "model.compile=true: torch.compile has made another graph of this model's blocks "
            "again and again, up to its limit (TORCH_LOGS=recompiles says why): set "
            "model.compile=false."
        ):
            return compiled(*args, **kwargs)

    return block


def without_compiling() -> AbstractContextManager[Any]:
    """A context in which compiled blocks run as they are written. Where torch.compile fails in a
    forward that belongs to no step, it would not compile those of the steps either."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled: not worth a second's import
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def num_compiled_graphs() -> int:
    """The number of graphs that torch.compile has made in this process."""
    return int(_compile_counters()["stats"]["unique_graphs"])


def check_compiled(reported: set[str]) -> list[str]:
    """Return a line for every reason for which torch.compile has split a block into several graphs.

    Args:
        reported: the reasons of earlier calls; takes the new ones.

    Raises:
        UserError: nothing at all is compiled.
    """
    if not num_compiled_graphs():
        raise UserError(
            "model.compile=true has compiled nothing: torch.compile passes over this model's "
            "blocks (TORCH_LOGS=graph_breaks says why). Set model.compile=false.",
            shared=True,
        )
    counters = _compile_counters()
    reasons = {text.partition("\n")[0] for kind in _BREAK_COUNTERS for text in counters[kind]}
    found = reasons - reported
    reported |= found
    return [
        f"warning: model.compile: a block is compiled in pieces, with less gain: {reason} "
        "(TORCH_LOGS=graph_breaks says where)"
        for reason in sorted(found)
    ]


def _compile_counters() -> dict[str, Counter[str]]:
    """torch.compile's counters: of each kind, how often each message or event came."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not worth a second's import where unused
    return dynamo.counters if dynamo else defaultdict(Counter)


def _recomputation(model: nn.Module, mode: str) -> dict[str, Any]:
    """Arguments of torch's `checkpoint`."""
    # The state of torch's generators is fetched from the GPU only where something is drawn.
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": drops(model)}
    if mode == "selective":
        kept = list(kept_operators(model))
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    return settings


def kept_operators(model: nn.Module) -> set[Any]:
    """The operators whose results selective recomputation keeps: matrix products and attention. The
    others (norms, activations, rotations) take a few percent of the time for about half of the
    memory."""
    # transformers adds the bias of experts to their product in place: the kept one would have it.
    if any(getattr(module, "has_bias", False) for module in model.modules()):
        return _KEPT_BY_SELECTIVE - {GROUPED_PRODUCT}
    return _KEPT_BY_SELECTIVE


def drops(model: nn.Module) -> bool:
    """Whether the model has dropout, or noise in its routers, by modules or by functions, whose
    probabilities its modules hold under some name (OPT's `dropout`, Mixtral's `jitter_noise`).
    Then it draws from torch's generators."""
    return any(
        isinstance(value, float) and value > 0
        for module in model.modules()
        for name, value in vars(module).items()
        if "drop" in name
        or "jitter" in name
        or (name == "p" and "drop" in type(module).__name__.lower())
    )
