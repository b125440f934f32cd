"""Changes that make a run fit: the cheapest first, each tried by simulating the step again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import Any

from neftune_dist.config import Config, UserError, check
from neftune_dist.planning.memory import Peak

# A change must save this share of the peak to be kept.
_LEAST_SAVING = 0.01
_MOST_RANKS = 1024
_RANKS = "--world-size"

Changes = dict[str, str | int | bool | None]
# What lowers the memory of the batch, and of the state: a setting, its new value, and the values
# from which that is a step down. The cheapest first.
_LOWER_BATCH = (
    ("model.loss", "chunked", ("plain",)),
    ("model.activation_checkpointing", "selective", ("none",)),
    ("engine.sync_every", "micro_batch", ("auto", "step")),
    ("engine.reshard_after_forward", True, (False,)),
    ("model.activation_checkpointing", "full", ("none", "selective")),
)
_LOWER_STATE = (
    ("engine.zero_stage", 3, (1, 2)),
    ("engine.name", "fsdp2", ("auto", "replicated")),
    ("engine.num_replicas", 1, range(2, _MOST_RANKS)),
    ("optim.states", "8bit", ("fp32", "bf16")),
    ("engine.offload", "cpu", ("none",)),
)


def suggest_changes(
    config: Config,
    world_size: int,
    peak: Peak,
    most_bytes: float,
    simulate: Callable[[Config, int], Peak],
    log: Callable[[str], None],
) -> str | None:
    """Return `key=value` words that make the run fit, or None if nothing that is tried does.

    Args:
        config: the run's.
        world_size: its ranks.
        peak: of the run as it is.
        most_bytes: the greatest peak that fits.
        simulate: returns the peak of a configuration on a number of ranks.
        log: called with a line for each change that is tried.
    """
    changes: Changes = {}

    def attempt(more: Changes) -> Peak | None:
        """Return the peak with these changes, None if they contradict a setting."""
        try:
            found = simulate(_changed(config, more), int(more.get(_RANKS) or world_size))
        except UserError:
            return None
        log(f"tried {_words(more)}: {found.num_bytes / 2**30:.1f} GiB at the peak")
        return found

    tried: set[str] = set()
    while peak.num_bytes > most_bytes:
        ranks = int(changes.get(_RANKS) or world_size)
        ladder = _ladder(_changed(config, changes), ranks, peak, most_bytes)
        step = next((s for s in ladder if _words(s) not in tried), None)
        if step is None:
            return None
        tried.add(_words(step))
        found = attempt({**changes, **step})
        if found is not None and found.num_bytes <= (1 - _LEAST_SAVING) * peak.num_bytes:
            changes, peak = {**changes, **step}, found
    for key in list(changes)[:-1]:  # is an earlier change still needed?
        less = {k: v for k, v in changes.items() if k != key}
        found = attempt(less)
        if found is not None and found.num_bytes <= most_bytes:
            changes = less
    return _words(changes)


def suggest_faster(
    config: Config, world_size: int, most_bytes: float, simulate: Callable[[Config, int], Peak]
) -> tuple[str, Peak] | None:
    """Return the change that spares most exchanges between the ranks of fsdp2 and fits, and its
    peak; None where no change does.

    Args:
        config: the run's, whose engine is decided.
        world_size: its ranks.
        most_bytes: the greatest peak that fits.
        simulate: returns the peak of a configuration on a number of ranks.
    """
    engine = config.engine
    if engine.name != "fsdp2" or world_size == (engine.num_replicas or 1):
        return None
    if engine.sync_every == "step":
        return None
    changes: list[Changes] = [{"engine.sync_every": "step", "engine.reshard_after_forward": None}]
    if engine.reshard_after_forward is not False:
        changes.append({"engine.reshard_after_forward": False})
    for change in changes:
        peak = simulate(_changed(config, change), world_size)
        if peak.num_bytes <= most_bytes:
            return _words(change), peak
    return None


def _ladder(config: Config, ranks: int, peak: Peak, most_bytes: float) -> list[Changes]:
    """Return the changes to try next, in order of cost.

    If the state alone does not fit, no change of the batch helps: changes of the state come first.
    """
    state = sum(peak.parts[kind] for kind in ("weights", "gradients", "optimizer"))
    batch = peak.parts["activations"] + peak.parts["logits"]
    excess, tokens = peak.num_bytes - most_bytes, config.train.micro_batch_tokens
    lower_batch = _steps(_LOWER_BATCH, config)
    for times in _halvings(batch, excess):
        if (tokens >> times) * config.engine.sequence_parallel >= config.data.max_length:
            lower_batch.append({"train.micro_batch_tokens": tokens >> times})
    lower_state = _steps(_LOWER_STATE, config)
    for times in _halvings(state, excess):
        if ranks << times <= _MOST_RANKS:
            lower_state.append({_RANKS: ranks << times})
    state_first = state > most_bytes
    return lower_state + lower_batch if state_first else lower_batch + lower_state


def _steps(table: Sequence[tuple[str, Any, Collection]], config: Config) -> list[Changes]:
    return [{key: new} for key, new, old in table if attrgetter(key)(config) in old]


def _halvings(amount: float, excess: float) -> range:
    """Return how many times `amount` may be halved so that `excess` is saved; empty: none is
    enough."""
    if amount <= excess:
        return range(0)
    return range(max(1, math.ceil(math.log2(amount / (amount - excess)))), 32)


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
        if value is not None  # a setting to leave out
    )
