"""Changes that make a run fit: the cheapest first, each tried by simulating the step again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

from neftune_dist.config import Config, UserError, check
from neftune_dist.planning.memory import Peak

# A change must save this share of the peak to be kept.
_LEAST_SAVING = 0.01
_MOST_RANKS = 1024
_RANKS = "--world-size"

Changes = dict[str, str | int | bool]


def suggest_changes(
    config: Config,
    world_size: int,
    peak: Peak,
    room: float,
    simulate: Callable[[Config, int], Peak],
    needed: Callable[[Peak], float],
    log: Callable[[str], None],
) -> str | None:
    """Return `key=value` words that make the run fit, or None if nothing that is tried does.

    Args:
        peak: of the run as it is.
        room: bytes of the device.
        simulate: returns the peak of a configuration on a number of ranks.
        needed: returns the bytes that a peak takes.
    """
    changes: Changes = {}

    def attempt(more: Changes) -> Peak | None:
        """Return the peak with these changes, None if they contradict a setting."""
        try:
            changed = _changed(config, more)
            found = simulate(changed, int(more.get(_RANKS, world_size)))
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
    for key in list(changes)[:-1]:  # is an earlier change still needed?
        less = {k: v for k, v in changes.items() if k != key}
        found = attempt(less)
        if found is not None and needed(found) <= room:
            changes = less
    return _words(changes)


def _ladder(
    config: Config, ranks: int, peak: Peak, room: float, needed: Callable[[Peak], float]
) -> Iterator[Changes]:
    """Yield the changes to try next, in order of cost.

    If the state alone has no room, no change of the batch helps: changes of the state come first.
    """
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
    """Return how many times to halve `amount` to save `excess`; None: no number is enough."""
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
