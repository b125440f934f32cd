"""Live tensor memory, operator by operator, split by what it is for.

`Memory` follows every storage that is made, resized or freed while it is active. It is used over a
`FakeTensorMode`, whose tensors have shapes and lifetimes but no content. What a storage is for is
said where it is made (`system.memory_tag`), or by its owner afterwards (`Memory.name`), or follows
from the operators that it comes to; as that is often known late, a history is kept and the peak is
found at the end. Not seen: workspaces inside operators, except the known ones, and what lies
outside torch's allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
    within_shape_inference,
)
from neftune_dist.compat.torch import GROUPED_PRODUCT
from neftune_dist.system.memory_tag import current_memory_tag

_SET_UP = "set-up"
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "collectives")

_aten = torch.ops.aten
# Engines hand their buffers to these operators. (Ulysses' exchange of activations is functional:
# `_c10d_functional`.)
_COLLECTIVE_OPERATORS = ("c10d", "fsdp")
# An engine's buffer, into which it copies the gradients that a backward leaves.
_BUFFERS = ("collectives", "gradients")
# These make a copy of their input inside, where no dispatch shows it.
_COPIES_INSIDE = {_aten.logsumexp.default}


@dataclass(eq=False)
class _Storage:
    """A storage that is followed.

    Attributes:
        nbytes: its size now.
        kind: one of `KINDS`, as far as is known.
        on_host: whether it lies in host memory.
        share: the part of its bytes that counts, where fewer ranks are simulated than run.
        reference: weak, to the storage; kept so that its callback is called.
    """

    nbytes: int
    kind: str
    on_host: bool = False
    share: float = 1.0
    reference: Any = None


@dataclass(frozen=True)
class Peak:
    """The moment at which a device holds most.

    Attributes:
        parts: bytes by kind, in the order of `KINDS`.
        moment: the phase of the step.
        host_bytes: the most that lies in host memory at any moment.
    """

    parts: Mapping[str, int]
    moment: str
    host_bytes: int

    @property
    def num_bytes(self) -> int:
        """The bytes of all kinds."""
        return sum(self.parts.values())


def _shaped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operator gives, without content."""
    if func is GROUPED_PRODUCT:  # torch infers its shape in bfloat16 alone, and runs it in others
        parts = (part.bfloat16() for part in args[:2])
        return func(*parts, *args[2:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


class Memory(TorchDispatchMode):
    """The history of all storages while it is active.

    Attributes:
        phase: the part of the step that runs now, in words; to be set by the caller.
        default: kind of a new storage without a tag; to be set by the caller.
        vocabulary: rows of the output embedding: a tensor of this width holds logits.
    """

    def __init__(self, fake_mode: FakeTensorMode, vocabulary: int) -> None:
        super().__init__()
        self.phase, self.default, self.vocabulary = _SET_UP, "collectives", vocabulary
        self._fake_mode = fake_mode
        self._live: dict[int, _Storage] = {}
        self._history: list[tuple[str, _Storage, int]] = []  # phase, storage, bytes more
        self._paused = False

    def __enter__(self) -> Memory:
        self._patches = ExitStack()
        self._patches.enter_context(resizing_seen(self._resized))
        self._patches.enter_context(within_shape_inference(self._pause))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _resized(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        if id(storage) in self._live:
            self._change(self._live[id(storage)], num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass, tree_leaves((args, kwargs)))):
            return NotImplemented  # it comes again, with the tensors that it is made of
        if func is _aten.equal.default:
            return True
        try:
            out = _shaped(func, args, kwargs or {})
        except DataDependentOutputException:
            # The host reads a value, a norm or a flag, which nothing has. With 0 the step goes on.
            return args[0].dtype.is_floating_point and 0.0
        if self.default == "activations":
            self._learn(func, args, kwargs or {})
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
        if self._paused:
            return
        kind = current_memory_tag() or self.default
        if self.default == "activations" and tensor.dim() > 1:
            if tensor.shape[-1] == self.vocabulary:
                kind = "logits"
            elif kind == "logits" and tensor.shape[0] == self.vocabulary:
                kind = "gradients"  # of the projection, computed together with the loss
        made = self._live[key] = _Storage(0, kind)
        made.reference = weakref.ref(storage, lambda _: self._change(self._live.pop(key), 0))
        self._change(made, storage.nbytes())

    def name(self, where: Any, kind: str, on_host: bool = False, share: float = 1.0) -> None:
        """Name what tensors are for; those that are not followed are passed over.

        Args:
            where: tensors in nested dicts and lists.
            kind: one of `KINDS`.
            on_host: whether they lie in host memory.
            share: the part of their bytes that counts.
        """
        for tensor in _tensors(where):
            if storage := self._find(tensor):
                storage.kind, storage.on_host, storage.share = kind, on_host, share

    def peak(self) -> Peak:
        """Return the device's peak since set-up.

        (What set-up needs for a moment, DeepSpeed takes on the host if the device has no room.)
        """
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

    def _learn(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Tell gradients and an engine's buffers from activations by the operators they come to."""
        if func is CHUNK_CAT or (func is _aten.copy_.default and self._kind(args[0]) in _BUFFERS):
            for tensor in _tensors(args):
                self._rename(tensor, "activations", "gradients")
        if func is CHUNK_CAT or func.namespace in _COLLECTIVE_OPERATORS:
            for tensor in _tensors((kwargs, args)):
                self._rename(tensor, "activations", "collectives")

    def _find(self, tensor: Tensor) -> _Storage | None:
        return self._live.get(id(tensor.untyped_storage()))

    def _kind(self, tensor: Tensor) -> str | None:
        storage = self._find(tensor)
        return storage.kind if storage else None

    def _copy_inside(self, like: Tensor) -> None:
        passing = _Storage(0, self._kind(like) or self.default)
        self._change(passing, like.nbytes)
        self._change(passing, 0)

    def _change(self, storage: _Storage, nbytes: int) -> None:
        self._history.append((self.phase, storage, nbytes - storage.nbytes))
        storage.nbytes = nbytes

    def _rename(self, tensor: Tensor, old: str, new: str) -> None:
        if (storage := self._find(tensor)) and storage.kind == old:
            storage.kind = new


def _tensors(where: Any) -> Iterator[Tensor]:
    """Yield plain tensors in nested dicts and lists; of a DTensor and its like, the parts."""
    for leaf in tree_leaves(where):
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            yield from _tensors([getattr(leaf, name) for name in names])
        elif isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, list):  # a subclass of list, which tree_leaves does not open
            yield from _tensors(list(leaf))
