"""Activation checkpointing around the input embedding: its recomputation gets the same noise again.

A recomputation is a forward inside a backward. It must repeat the last noised forward: autograd
does not say which forward is recomputed, so a recomputation of an earlier one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neftune_dist.compat.torch import backward_id, current_node_number, next_node_number
from neftune_dist.noise.layout import TokenLayout


@dataclass(frozen=True)
class NoisedForward:
    """The layout, strength and counters that a forward pass was noised with.

    Attributes:
        layout: of its tokens.
        alpha: float64 (), with the sign.
        step, micro_step: int64 ().
    """

    layout: TokenLayout
    alpha: Tensor
    step: Tensor
    micro_step: Tensor


class LastForward:
    """The last noised forward pass of a model."""

    def __init__(self) -> None:
        self._begun_at = 0  # autograd's number of the first node of the forward under way
        self._first_node = 0  # and of the last noised forward
        self._forward: NoisedForward | None = None
        self._recomputed_in = -1  # autograd's number of a backward
        self._is_under_way = False

    def begin(self) -> None:
        """Note where in autograd's order a forward pass begins."""
        self._begun_at, self._is_under_way = next_node_number(), False

    def keep(self, forward: NoisedForward) -> None:
        """Remember the forward pass that has begun as the last noised one."""
        self._first_node, self._forward = self._begun_at, forward
        self._is_under_way = True

    def end(self) -> None:
        """Note that the forward pass under way ends."""
        self._is_under_way = False

    def is_noised(self, num_tokens: int) -> bool:
        """Whether the forward pass under way has the noise of so many tokens."""
        forward = self._forward if self._is_under_way else None
        return forward is not None and forward.layout.num_tokens == num_tokens

    def recall(self) -> NoisedForward:
        """The forward pass that the backward under way recomputes.

        Raises:
            RuntimeError: it is not the last one, or two lie in one checkpoint.
        """
        last, backward = self._forward, backward_id()
        if (
            last is None
            or current_node_number() < self._first_node
            or backward == self._recomputed_in  # two forwards in one checkpoint
        ):
            raise RuntimeError(
                "Activation checkpointing recomputes the input embedding of a forward pass "
                "that was not the last noised one: checkpoint the layers alone, or use "
                "use_reentrant=False and one forward a backward."
            )
        self._recomputed_in = backward
        return last


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward. (Within a compiled graph never: there the part
    that is recomputed is given the same counters.)"""
    return not torch.compiler.is_compiling() and backward_id() != -1
