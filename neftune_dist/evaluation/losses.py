"""Losses of single documents, held-out or training, with the noise off or on.

Token losses are summed for each document, in packed batches too, so that two models can be compared
document by document; a set's loss is the mean over its supervised tokens. Batches do not depend on
the number of ranks, so neither do the figures.

Noise is drawn as the run's configuration says, from a stream that training never uses: epoch
2^32 - 1, data-parallel rank 2^32 - 1, and the batch's number as the step. Dropout stays off, so
that noise is the only difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import Config
from neftune_dist.data.documents import Documents
from neftune_dist.data.loader import MicroBatch, collate
from neftune_dist.data.packing import assign_documents
from neftune_dist.distributed.world import World
from neftune_dist.model.attention import attention_of, implementation
from neftune_dist.model.families import check_lengths, check_model
from neftune_dist.model.loss import resolve_loss, token_losses
from neftune_dist.training.noise import configured_noise, noise_signs, token_layout

_NEVER = (1 << 32) - 1  # no training reaches this epoch, or has so many ranks
_QUADRATIC_TOKENS = 1e9  # of `assign_documents`: work is balanced by tokens
_PROGRESS_SECONDS = 5.0


Items = list[list[float]]  # of each document the sum of its token losses, and how many they are


def mean_loss(items: Items) -> float:
    """Mean loss over all supervised tokens."""
    return math.fsum(total for total, _ in items) / sum(number for _, number in items)


def document_losses(
    model: Any,
    documents: Documents,
    indices: np.ndarray,
    config: Config,
    world: World,
    *,
    noisy: bool = False,
) -> Items:
    """Losses of some documents, in order: a collective of all ranks, of which the first logs
    progress.

    Args:
        model: of a `EvaluationTarget`.
        documents: held-out or training documents.
        indices: int64 (num_chosen,), of the documents.
        config: of the run: packing, batch size, attention, noise.
        world: the ranks, which share the batches.
        noisy: with `config.noise` at its full `alpha`, whatever its schedule.

    Raises:
        UserError: the model does not keep packed documents apart, or takes none so long.
    """
    if not len(indices):
        return []
    packing = config.data.packing
    with world.agree():
        check_model(model, packing)
        lengths = documents.lengths[indices]
        check_lengths(model.config, int(lengths.max()))
        # One rank takes whole what several share in training.
        tokens = config.train.micro_batch_tokens * config.engine.sequence_parallel
        rounds = assign_documents(lengths, 1, tokens, packing, _QUADRATIC_TOKENS)
    sums, logged = np.zeros(len(indices)), time.monotonic()
    padded = attention_name(model)
    attention = implementation(config.model.attention, True) if packing else padded
    with attention_of(model, attention), _forward(model, config, noisy) as forward:
        for i in range(world.rank, len(rounds), world.size):
            places = np.array(rounds[i][0], dtype=np.int64)
            chosen = indices[places]
            epochs = np.full_like(chosen, _NEVER)
            batch = collate(documents, chosen, epochs, packing).to(world.device)
            losses = forward(i, batch).double().cpu()
            parts = losses.split(documents.num_supervised[chosen].tolist())
            sums[places] = [float(part.sum()) for part in parts]
            if time.monotonic() - logged > _PROGRESS_SECONDS:
                logged = time.monotonic()
                noise = "on" if noisy else "off"
                world.log(f"losses, noise {noise}: {i + 1} of {len(rounds)} batches")
    with world.agree():  # ranks differ in time by what a collective would not wait for
        pass
    total = np.sum(world.gather(sums.tolist()), axis=0)  # of each document one rank has a sum
    numbers = documents.num_supervised[indices].tolist()
    return [list(item) for item in zip(total.tolist(), numbers, strict=True)]


_Forward = Callable[[int, MicroBatch], Tensor]  # number of the batch; float32 (num_supervised,)


@contextmanager
def _forward(model: Any, config: Config, noisy: bool) -> Iterator[_Forward]:
    kind = resolve_loss("auto", model)
    noise = config.noise
    if not (noisy and noise.alpha):
        with torch.no_grad():
            yield lambda _, batch: token_losses(model, batch, kind, "none")
        return
    # Noise that covers padding belongs to no document.
    stream = "rank" if noise.length == "padded" else "sample"
    neftune = configured_noise(config, _NEVER, stream=stream)
    with neftune.attach(model) as handle, torch.enable_grad():

        def noised(number: int, batch: MicroBatch) -> Tensor:
            handle.step = number
            losses = []
            for handle.sign in noise_signs(noise):
                handle.describe(token_layout(batch))
                losses.append(token_losses(model, batch, kind, "none").detach())
            if handle.num_fired != len(losses):
                raise RuntimeError("The noise was not added: the model bypasses its embedding.")
            return torch.stack(losses).mean(0)

        # What the noise's hooks look at; the layers below stay in evaluation mode.
        model.training = True
        try:
            yield noised
        finally:
            model.training = False
