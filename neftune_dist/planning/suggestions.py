"""The change that makes a run fit: tried by rehearsing again, what costs least first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

from neftune_dist.config import Config, UserError, check
from neftune_dist.planning.memory import Peak

# What a change must save to be kept.
_LEAST_SAVING = 0.01
_MOST_RANKS = 1024
_RANKS = "--world-size"

Changes = dict[str, str | int | bool]


def find_remedy(
    config: Config,
    world_size: int,
    peak: Peak,
    room: float,
    rehearse: Callable[[Config, int], Peak],
    needed: Callable[[Peak], float],
    log: Callable[[str], None],
) -> str | None:
    """The words to append to the command line, or None where nothing that is tried is enough.

    Args:
        peak: of the run as it is. room: the device's, in bytes.
        rehearse: the peak of a configuration on so many ranks. needed: the room that a peak takes.
    """
    changes: Changes = {}

    def attempt(more: Changes) -> Peak | None:
        """The peak with these changes, or None where they contradict a setting."""
        try:
            changed = _changed(config, more)
            found = rehearse(changed, int(more.get(_RANKS, world_size)))
        except UserError:
            return None
        log(f"tried {_words(more)}: {needed(found) / 2**30:.1f} GiB")
        return found

    tried: set[str] = set()
    while True:
        now = _changed(config, changes)
        ranks = int(changes.get(_RANKS, world_size))
        step = next(
            (s for s in _ladder(now, ranks, peak, room, needed) if _words(s) not in tried), None
        )
        if step is None:
            return None
        tried.add(_words(step))
        found = attempt({**changes, **step})
        if found is None or found.num_bytes > (1 - _LEAST_SAVING) * peak.num_bytes:
            continue
        changes, peak = {**changes, **step}, found
        if needed(peak) <= room:
            break
    for key in list(changes)[:-1]:  # is an earlier one needed still?
        less = {k: v for k, v in changes.items() if k != key}
        found = attempt(less)
        if found is not None and needed(found) <= room:
            changes = less
    return _words(changes)


def _ladder(
    config: Config, ranks: int, peak: Peak, room: float, needed: Callable[[Peak], float]
) -> Iterator[Changes]:
    """What may be tried next, in order of cost. Where what is kept between micro-batches has no
    room, no change of the batch helps: then that comes first."""
    state = sum(peak.parts[kind] for kind in ("weights", "gradients", "optimizer"))
    lower_state = list(_lower_state(config, ranks, peak, room, needed))
    lower_batch = list(_lower_batch(config, peak, room, needed))
    yield from [*lower_state, *lower_batch] if state > room else [*lower_batch, *lower_state]


def _lower_batch(
    config: Config, peak: Peak, room: float, needed: Callable[[Peak], float]
) -> Iterator[Changes]:
    if config.model.loss == "plain":
        yield {"model.loss": "chunked"}
    if config.model.activation_checkpointing == "none":
        yield {"model.activation_checkpointing": "selective"}
    if config.model.activation_checkpointing != "full":
        yield {"model.activation_checkpointing": "full"}
    if config.engine.reshard_after_forward is False:
        yield {"engine.reshard_after_forward": True}
    batch = peak.parts["activations"] + peak.parts["logits"]
    halvings = _halvings(batch, needed(peak) - room)
    fewest, tokens = config.data.max_length, config.train.micro_batch_tokens
    while halvings is not None and tokens >> halvings >= fewest:
        yield {"train.micro_batch_tokens": tokens >> halvings}
        halvings += 1


def _lower_state(
    config: Config, ranks: int, peak: Peak, room: float, needed: Callable[[Peak], float]
) -> Iterator[Changes]:
    if config.engine.name == "deepspeed" and config.engine.zero_stage in (1, 2):
        yield {"engine.zero_stage": 3}
    if (config.engine.num_replicas or 1) > 1:
        yield {"engine.num_replicas": 1}
    if config.optim.states != "8bit":
        yield {"optim.states": "8bit"}
    if config.engine.offload == "none":
        yield {"engine.offload": "cpu"}
    state = sum(peak.parts[kind] for kind in ("weights", "gradients", "optimizer"))
    halvings = _halvings(state, needed(peak) - room)
    while halvings is not None and ranks << halvings <= _MOST_RANKS:
        yield {_RANKS: ranks << halvings}
        halvings += 1


def _halvings(amount: float, excess: float) -> int | None:
    """How often `amount` must be halved at least to save `excess`; None: it cannot."""
    if amount <= excess:
        return None
    return max(1, math.ceil(math.log2(amount / (amount - excess))))


def _changed(config: Config, changes: Changes) -> Config:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if key != _RANKS:
            setattr(getattr(changed, section), name, value)
    check(changed)
    return changed


def _words(changes: Changes) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in changes.items()
    )
