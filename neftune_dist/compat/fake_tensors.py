"""Private parts of PyTorch for tensors without content. Checked against 2.11.0 and 2.13.0.

Apart from `compat.torch`, as only `neftune-dist plan` pays for their import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

__all__ = [
    "CHUNK_CAT",
    "DataDependentOutputException",
    "FakeStore",
    "FakeTensorMode",
    "TorchDispatchMode",
    "is_traceable_wrapper_subclass",
    "resizing_seen",
    "tree_leaves",
    "within_shape_inference",
]

# By this operator FSDP2 copies gradients into the buffer that it reduces.
CHUNK_CAT = torch.ops.aten._chunk_cat.out


@contextmanager
def resizing_seen(seen: Callable[[torch.UntypedStorage, int], None]) -> Iterator[None]:
    """Call `seen(storage, num_bytes)` whenever a storage is resized, which no operator shows.

    FSDP2 frees and refills the memory of gathered weights in this way.
    """
    usual = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
        result = usual(storage, num_bytes)
        seen(storage, num_bytes)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = usual  # type: ignore[method-assign]


@contextmanager
def within_shape_inference(enter: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a context whenever DTensor works out the shape of a result, on whole fake tensors: no
    device ever holds them."""
    usual = ShardingPropagator._propagate_tensor_meta_non_cached

    def infer(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return usual(*args, **kwargs)

    ShardingPropagator._propagate_tensor_meta_non_cached = infer  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardingPropagator._propagate_tensor_meta_non_cached = usual  # type: ignore[method-assign]
