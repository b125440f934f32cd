"""Live tensor memory, operator by operator, and what it is for.

`Memory` follows every storage that is made, resized or freed while it is active; it is meant to lie
over a `FakeTensorMode`, whose tensors have shapes and lifetimes but no content. What a storage is
for is often known only later (a reduced gradient is a buffer of the engine until it becomes one),
so a history is kept, and the peak is looked for at the end. Not seen: workspaces inside operators,
but for those known here, and what lies outside torch's allocator.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.fake_tensors import (
    CHUNK_CAT,
    DataDependentOutputException,
    FakeTensorMode,
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    resizing_seen,
    tree_leaves,
)

_SET_UP = "set-up"
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "collectives")

# What the innermost of these files on the stack says of a new storage. "": it is the model's own;
# "nothing": shapes that DTensor works out, which no device ever holds.
_ORIGINS = {
    "/torch/distributed/tensor/_sharding_prop.py": "nothing",
    "/torch/distributed/tensor/_op_schema.py": "nothing",
    "/torch/distributed/fsdp/": "collectives",
    "/deepspeed/runtime/zero/linear.py": "",  # ZeRO-3's matrix products
    "/deepspeed/runtime/zero/": "collectives",
    "/neftune_dist/model/loss.py": "logits",
    "/torch/nn/modules/module.py": "",
    "/torch/autograd/graph.py": "",
}
_aten = torch.ops.aten
# By these an engine takes over the gradients that a backward leaves.
_TAKES_OVER = {_aten.copy_.default, _aten.cat.default, _aten.cat.out, CHUNK_CAT}
# These make a copy of their input inside, where no dispatch shows it.
_COPIES_INSIDE = {_aten.logsumexp.default}


@dataclass(eq=False)
class _Storage:
    """One storage: its bytes now, and what it is for as far as is known.

    share: of its bytes that count, where the rehearsed world is smaller than the real one.
    """

    nbytes: int
    kind: str
    on_host: bool = False
    share: float = 1.0
    reference: Any = None  # weak; kept so that its callback is called


@dataclass(frozen=True)
class Peak:
    """The moment at which a device holds most.

    parts: bytes by kind, in the order of KINDS. moment: what went on. host_bytes: the most that
    lies in host memory at any moment.
    """

    parts: Mapping[str, int]
    moment: str
    host_bytes: int

    @property
    def num_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


class Memory(TorchDispatchMode):
    """The history of all storages while it is active.

    Attributes:
        phase: what goes on now, in words; set it as the step goes on.
        default: kind of a new storage of which nothing else says what it is for.
        vocabulary: rows of the output embedding; what is so wide is logits.
    """

    def __init__(self, fake_mode: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.phase, self.default, self.vocabulary = _SET_UP, "weights", vocabulary
        self._fake_mode = fake_mode
        self._live: dict[int, _Storage] = {}
        self._history: list[tuple[str, _Storage, int]] = []  # phase, storage, bytes more
        self._origin_of: dict[str, str | None] = {}

    def __enter__(self) -> Memory:
        self._resizing = resizing_seen(self._resized)
        self._resizing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.__exit__(*error)

    def _resized(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        if id(storage) in self._live:
            self._change(self._live[id(storage)], num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass(each) for each in tree_leaves((args, kwargs))):
            return NotImplemented  # it comes again, with the tensors that it is made of
        if func is _aten.equal.default:
            return True
        try:
            out = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            # The host reads a value. Nothing has one; 0 is the norm, the flag, that goes on.
            return args[0].dtype.is_floating_point and 0.0
        if self.default == "activations" and func in _TAKES_OVER and self._origin():
            for tensor in _tensors(args):
                self._rename(tensor, "activations", "gradients")
        if func in _COPIES_INSIDE:
            self._copy_inside(args[0])
        self.see(*_tensors(out))
        return out

    def see(self, *tensors: Tensor) -> None:
        """Begin to follow storages."""
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._live.get(key)
        if known is not None:
            if storage.nbytes() != known.nbytes:
                self._change(known, storage.nbytes())
            return
        kind = self._origin() or self.default
        if kind == "nothing":
            return
        if self.default == "activations" and tensor.dim() > 1:
            if tensor.shape[-1] == self.vocabulary:
                kind = "logits"
            elif kind == "logits" and tensor.shape[0] == self.vocabulary:
                kind = "gradients"  # of the projection, computed together with the loss
        made = self._live[key] = _Storage(0, kind)
        made.reference = weakref.ref(storage, lambda _: self._change(self._live.pop(key), 0))
        self._change(made, storage.nbytes())

    def name(self, where: Any, kind: str, on_host: bool = False, share: float = 1.0) -> None:
        """Say what the tensors in nested dicts and lists, which are followed, are for."""
        for tensor in _tensors(where):
            storage = self._live.get(id(tensor.untyped_storage()))
            if storage is not None:
                storage.kind, storage.on_host, storage.share = kind, on_host, share

    def peak(self) -> Peak:
        """The device's, over all that has happened since set-up. (What set-up takes for a moment,
        DeepSpeed takes on the host where the device has no room.)"""
        now = most = host = most_host = 0.0
        at = -1
        for i, (phase, storage, more) in enumerate(self._history):
            if storage.on_host:
                host += more * storage.share
                most_host = max(most_host, host)
                continue
            now += more * storage.share
            if now > most and phase != _SET_UP:
                most, at = now, i
        parts = dict.fromkeys(KINDS, 0.0)
        for _, storage, more in self._history[: at + 1]:
            if not storage.on_host:
                parts[storage.kind] += more * storage.share
        rounded = {kind: round(amount) for kind, amount in parts.items()}
        return Peak(rounded, self._history[at][0], round(most_host))

    def _copy_inside(self, like: Tensor) -> None:
        known = self._live.get(id(like.untyped_storage()))
        passing = _Storage(0, known.kind if known else self.default)
        self._change(passing, like.nbytes)
        self._change(passing, 0)

    def _change(self, storage: _Storage, nbytes: int) -> None:
        self._history.append((self.phase, storage, nbytes - storage.nbytes))
        storage.nbytes = nbytes

    def _rename(self, tensor: Tensor, old: str, new: str) -> None:
        storage = self._live.get(id(tensor.untyped_storage()))
        if storage is not None and storage.kind == old:
            storage.kind = new

    def _origin(self) -> str:
        """What the stack says of what is made now."""
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file not in self._origin_of:
                self._origin_of[file] = next(
                    (kind for part, kind in _ORIGINS.items() if part in file), None
                )
            origin = self._origin_of[file]
            if origin is not None:
                return origin
            frame = frame.f_back  # type: ignore[assignment]
        return ""


def _tensors(where: Any) -> Iterator[Tensor]:
    """Plain tensors in nested dicts and lists; of a DTensor and its like, what it is made of."""
    for leaf in tree_leaves(where):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _tensors([getattr(leaf, name) for name in names])
        elif isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, list):  # of a class of its own, which tree_leaves does not look into
            yield from _tensors(list(leaf))
