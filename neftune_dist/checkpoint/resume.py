"""What a run continues from: the newest sound checkpoint, and only one of the same run.

Refuses, with the fields that differ, a checkpoint of another architecture, tokenizer, dataset,
frozen weights or incompatible setting (`UserError`); tells what has changed and may.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neftune_dist.checkpoint import store
from neftune_dist.config import ACCEPTABLE_CHANGES, Config, UserError, differences, user_path
from neftune_dist.distributed.world import World

# What says how long a run is: a resumed run may change it, and says so.
_LENGTH = ("train.max_steps", "train.num_epochs")
# What a resumed run may change besides: where and how it runs, how long, how it reports.
_MAY_CHANGE = (
    "run_dir",
    "model.name_or_path",  # the architecture is compared instead
    "model.weights",  # what the run began with
    "model.revision",
    "model.attention",
    "model.loss",
    "model.activation_checkpointing",
    "model.compile",
    "model.kernels",
    "model.trust_remote_code",
    "data.source",  # its content is compared instead, and that of the next two
    "data.mixture",
    "data.held_out_source",
    "data.packing",
    "data.cache_dir",
    "data.max_bad_fraction",
    "engine.",
    *_LENGTH,
    "train.micro_batch_tokens",
    "train.max_skipped_steps",
    "train.hang_minutes",
    "checkpoint.",
    "logging.",
    "evaluate.",
    "judge.",
)


def find(run_dir: Path, config: Config, world: World) -> store.Checkpoint | None:
    """What to resume from. Rank 0 looks, and all take what it saw: nodes may see a shared file
    system a little apart in time."""
    told = "[]"
    with world.agree():
        if world.is_first:
            told = json.dumps([str(path) for path in _candidates(run_dir, config, world)])
    candidates = json.loads(world.from_first(told))
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
    """Where to resume from, the best first."""
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
    return f"{run_dir} holds damaged checkpoints only: mend or remove them, or set another run_dir."


def check_same_run(
    found: store.Checkpoint, state: Mapping[str, Any], identity: Mapping[str, Any], config: Config
) -> list[str]:
    """Refuse a checkpoint of another run; the settings that differ and may."""
    mend = "set another run_dir, or restore the configuration that made it."
    saved, now = state["identity"]["architecture"], identity["architecture"]
    # A newer transformers may know of fields that the other did not.
    other = [key for key in sorted(saved.keys() & now.keys()) if saved[key] != now[key]]
    if other:
        raise UserError(
            f"The checkpoint {found.folder} is of another model than this run's, by its "
            f"{', '.join(other)}: {mend}"
        )
    # Settings that were not known when it was saved had their default's effect.
    before = _merged(Config().to_dict(), state["config"])
    changed = [
        key for key in differences(before, config.to_dict()) if not key.startswith(_MAY_CHANGE)
    ]
    template = config.data.template
    from_file = template.endswith(".jinja") and before["data"]["template"].endswith(".jinja")
    if from_file and "data.template" in changed:
        changed.remove("data.template")  # their content is compared below
    refused = [key for key in changed if key not in config.checkpoint.accepted]
    if refused:
        shown = ", ".join(
            f"{key} (then {_value(before, key)}, now {_value(config.to_dict(), key)})"
            for key in refused
        )
        can = [key for key in refused if key.startswith(ACCEPTABLE_CHANGES)]
        accept = f"or accept with checkpoint.accept_changes={','.join(can)}, " if can else ""
        raise UserError(
            f"The checkpoint {found.folder} was made with other settings of {shown}: restore them, "
            f"{accept}or set another run_dir."
        )
    read = {"tokenizer": "another tokenizer", "dataset": "another dataset"}
    if from_file and "template" in state["identity"]:
        read = {"template": f"another text in data.template={template}", **read}
    for key, what in read.items():
        if state["identity"][key] != identity[key]:
            raise UserError(f"The checkpoint {found.folder} was made with {what}: {mend}")
    if state["identity"]["data"] != identity["data"]:
        raise UserError(
            f"The checkpoint {found.folder} was made with other data, or by a version of "
            f"neftune_dist that put the same data in another order: {mend}"
        )
    if state["identity"].get("base", identity.get("base")) != identity.get("base"):
        place = config.model.weights or config.model.name_or_path
        raise UserError(
            f"The checkpoint {found.folder} was trained beside other frozen weights than those of "
            f"{place}: {mend}"
        )
    return [
        f"{key} was {_value(before, key)}, is now {_value(config.to_dict(), key)}"
        for key in (*changed, *_LENGTH)
        if _value(before, key) != _value(config.to_dict(), key)
    ]


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            key: _merged(base[key], value) if isinstance(value, dict) and key in base else value
            for key, value in over.items()
        },
    }


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return config[section][name] if section else config[name]
