"""The checkpoint that a run resumes from: the newest sound one, of the same run.

A checkpoint of another architecture, tokenizer, dataset, frozen weights or incompatible setting is
refused with `UserError`, naming what differs. Changes that are allowed are reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint import store
from neftune_dist.config import ACCEPTABLE_CHANGES, Config, UserError, differences, user_path
from neftune_dist.distributed.world import World

# The settings of a run's length: a resumed run may change them, and reports it.
_LENGTH = ("train.max_steps", "train.num_epochs")
# Prefixes of settings that a resumed run may change: where and how it runs, how it reports.
_MAY_CHANGE = (
    "run_dir",
    "model.name_or_path",  # the architecture is compared instead
    "model.weights",  # read at the start of a run only
    "model.revision",
    "model.attention",
    "model.loss",
    "model.activation_checkpointing",
    "model.compile",
    "model.kernels",
    "model.trust_remote_code",
    "data.source",  # for this and the next two the content is compared instead
    "data.mixture",
    "data.held_out_source",
    "data.packing",
    "data.cache_dir",
    "data.num_workers",
    "data.max_bad_fraction",
    "engine.",
    *_LENGTH,
    "train.micro_batch_tokens",
    "train.patience",
    "train.max_skipped_steps",
    "train.hang_minutes",
    "train.profile_steps",
    "checkpoint.",
    "logging.",
    "evaluate.",
    "judge.",
)

_FIRST_ORDER = "sorted"  # of versions that recorded no order: documents sorted by a hash


def find(run_dir: Path, config: Config, world: World) -> store.Checkpoint | None:
    """Return the checkpoint to resume from; None: the run begins.

    Rank 0 looks, and all ranks use its result: nodes may see a change of a shared file system at
    different times.
    """
    found_by_first = "[]"
    with world.agree():
        if world.is_first:
            paths = [str(path) for path in _candidates(run_dir, config, world)]
            found_by_first = json.dumps(paths)
    candidates = json.loads(world.from_first(found_by_first))
    for path in candidates:
        with world.agree():
            found = store.open_checkpoint(
                Path(path), patient=not world.is_first, key="checkpoint.resume="
            )
            flaw = found.first_flaw(world.rank, world.size) if config.checkpoint.verify else None
        flaw = world.from_any(flaw)
        if not flaw:
            return found
        world.log(f"warning: {path} is damaged and is passed over: {flaw} is not what was written")
    if candidates:
        raise UserError(_no_sound_checkpoint(run_dir, config), shared=True)
    return None


def _candidates(run_dir: Path, config: Config, world: World) -> list[Path]:
    """The folders to resume from, in order of preference."""
    resume = config.checkpoint.resume
    found = [checkpoint.folder for checkpoint in store.find_all(run_dir)]
    if resume == "auto":
        damaged = store.damaged_folders(run_dir)
        for folder, flaw in damaged:
            world.log(f"warning: {folder} is damaged and is passed over: {flaw}")
        if damaged and not found:
            raise UserError(_no_sound_checkpoint(run_dir, config))
        return found
    if found:
        raise UserError(
            f"checkpoint.resume={resume}, but {run_dir} holds the checkpoint "
            f"{found[0].name}: set another run_dir, or checkpoint.resume=auto."
        )
    return [] if resume == "never" else [user_path(resume, "checkpoint.resume")]


def _no_sound_checkpoint(run_dir: Path, config: Config) -> str:
    if config.checkpoint.resume != "auto":
        return f"The checkpoint {config.checkpoint.resume} is damaged; it is not used."
    return (
        f"{run_dir} holds damaged checkpoints only: restore or remove them, or set another run_dir."
    )


def check_same_run(
    found: store.Checkpoint, state: Mapping[str, Any], identity: Mapping[str, Any], config: Config
) -> list[str]:
    """Refuse a checkpoint of another run; return a line for each allowed change.

    Args:
        state: the checkpoint's `trainer_state()`.
        identity: of this run, see `Inputs`.

    Raises:
        UserError: naming what differs.
    """
    auto = config.checkpoint.resume == "auto"
    way_out = "set another run_dir" if auto else "leave checkpoint.resume out"
    fix = f"{way_out}, or restore the configuration that made it."
    other = differing_fields(state["identity"]["architecture"], identity["architecture"])
    if other:
        raise UserError(
            f"The checkpoint {found.folder} is of another model than this run's, by its "
            f"{', '.join(other)}: {fix}"
        )
    # Settings unknown to the version that saved it had their default's effect.
    before, now = Config().to_dict(), config.to_dict()
    for key, value in state["config"].items():
        before[key] = {**before.get(key, {}), **value} if isinstance(value, dict) else value
    changed = [key for key in differences(before, now) if not key.startswith(_MAY_CHANGE)]
    template = config.data.template
    from_file = template.endswith(".jinja") and before["data"]["template"].endswith(".jinja")
    if from_file and "data.template" in changed:
        changed.remove("data.template")  # the files' content is compared below
    refused = [key for key in changed if key not in config.checkpoint.accepted]
    if refused:
        shown = ", ".join(
            f"{key} (then {_value(before, key)}, now {_value(now, key)})" for key in refused
        )
        can = [key for key in changed if key.startswith(ACCEPTABLE_CHANGES)]  # accepted ones, too
        accept = f"or accept with checkpoint.accept_changes={','.join(can)}, "
        accept = accept if {*can} & {*refused} else ""
        raise UserError(
            f"The checkpoint {found.folder} was made with other settings of {shown}: restore them, "
            f"{accept}or {way_out}."
        )
    place = config.model.weights or config.model.name_or_path
    ways = {
        "tokenizer": "made with another tokenizer",
        "dataset": "made with another dataset",
        "data": "made with other data, or by a version of neftune_dist that put the same data in "
        "another order",
        "base": f"trained beside other frozen weights than those of {place}",
        "towers": f"trained inside other towers than those of {place}",
    }
    if from_file:
        ways = {"template": f"made with another text in data.template={template}", **ways}
    order = state["identity"].get("order", _FIRST_ORDER)
    if order != identity["order"]:
        raise UserError(
            f"The checkpoint {found.folder} was made by a version of neftune_dist that takes the "
            f"documents in another order ({order}, now {identity['order']}): {way_out}, "
            "or resume with that version."
        )
    for key, way in ways.items():
        # Earlier versions recorded no template, and base is recorded with adapters only.
        default = identity.get(key) if key in ("template", "base") else None
        if state["identity"].get(key, default) != identity.get(key):
            raise UserError(f"The checkpoint {found.folder} was {way}: {fix}")
    return [
        f"{key} was {_value(before, key)}, is now {_value(now, key)}"
        for key in (*changed, *_LENGTH)
        if _value(before, key) != _value(now, key)
    ]


def differing_fields(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the fields in which two architectures differ; one that a version of transformers does
    not know does not count."""
    return [key for key in sorted(saved.keys() & now.keys()) if saved[key] != now[key]]


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return config[section][name] if section else config[name]
