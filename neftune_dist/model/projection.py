"""Check, by running a model's head, whether its logits are the output embedding's result."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import storage_id, version
from neftune_dist.model.modules import forward_of
from neftune_dist.model.optimizations import without_compiling


def keeps_projection(model: Any) -> bool | None:
    """Whether the model returns as logits what its output embedding gives; None: not found out.

    The model's own code runs, but for that below its head: on hidden states of zeros, on the meta
    device as on any other, so for a model of any size.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if base is model:
        return None
    # Between the hidden states and a head there may be a projection (OPT's, ELECTRA's).
    for width in {head.in_features, getattr(model.config.get_text_config(), "hidden_size", None)}:
        with suppress(Exception):  # a model's code may fail in any way
            return _keeps_projection(model, head, base, width)
    return None


def _keeps_projection(model: Any, head: Any, base: Any, width: int) -> bool:
    given: list[tuple[Tensor, int]] = []

    def keep_result(_: Any, __: Any, output: Tensor) -> None:
        given.append((output, version(output)))

    where = {"device": head.weight.device}
    hidden = _BaseOutput([torch.zeros(1, 2, width, dtype=head.weight.dtype, **where)])
    ids = torch.zeros(1, 2, dtype=torch.int64, **where)
    as_hidden = forward_of(base, lambda *_, **__: hidden)
    kept = head.register_forward_hook(keep_result)
    with torch.no_grad(), as_hidden, kept, without_compiling():
        logits = model(input_ids=ids, use_cache=False).logits
    output, before = given[-1]
    # Scaled or capped it would lie in other memory, or have been changed in place.
    return storage_id(logits) == storage_id(output) and version(logits) == before


class _BaseOutput(tuple[Tensor]):
    """The result of a model without its head: hidden states, and None for all else."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None
