"""What a run directory holds in checkpoints, told in a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from neftune_dist.checkpoint import flat, store
from neftune_dist.config import UserError

_HEADS = ("step", "size", "age", "state", "saved by", "continues")


def listing(run_dir: Path, *, verify: bool) -> list[str]:
    """Lines for the verb `checkpoints`, oldest first.

    Args:
        verify: read every file and compare its checksum, too.

    Raises:
        UserError: no run directory.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} holds no checkpoints.")
    rows = sorted([*_complete(run_dir, verify), *_others(run_dir)])
    if not rows:
        return [f"{run_dir} holds no checkpoints yet."]
    table = [_HEADS, *(row[1] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEADS))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _complete(run_dir: Path, verify: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    for each in store.find_all(run_dir):
        try:
            flaw = each.first_flaw() if verify else None
            state = each.trainer_state()
        except UserError:
            if not each.folder.is_dir():
                continue  # a run that goes on has removed it
            fate = "damaged: trainer_state.json is not what was written"
            size, age = _size(each.num_bytes()), _age(each.folder)
            yield each.folder.name, (str(each.step), size, age, fate, "", "nothing")
            continue
        fate = f"damaged: {flaw} is not what was written" if flaw else "complete"
        if verify and not flaw and (flaw := _unreadable(each)):
            fate = f"damaged: {flaw}"
        engine = state["config"]["engine"]
        stage = f" stage {engine['zero_stage'] or 3}" if engine["name"] == "deepspeed" else ""
        left = state["num_steps"] - each.step
        yield (
            each.folder.name,
            (
                str(each.step),
                _size(each.num_bytes()),
                _age(each.folder),
                f"{fate}, verified" if verify and not flaw else fate,
                f"{engine['name']}{stage}, {state['world_size']} ranks",
                "nothing"
                if flaw
                else f"{left} steps to {state['num_steps']}, on any engine and number of ranks",
            ),
        )


def _unreadable(checkpoint: store.Checkpoint) -> str | None:
    """Why the description of the tensors cannot be used, whatever the manifest says of its bytes:
    whoever changes the one can change the other."""
    try:
        flat.Reader(checkpoint.folder, alone=True)
    except UserError as error:
        return str(error)
    return None


def _others(run_dir: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    damaged = [(folder, f"damaged: {flaw}") for folder, flaw in store.damaged_folders(run_dir)]
    left = [
        (folder, "unfinished; the next save sweeps it away") for folder in store.leftovers(run_dir)
    ]
    odd = [(path, f"passed over: {why}") for path, why in store.odd_entries(run_dir)]
    shown = {each.folder for each in store.find_all(run_dir)}
    for folder, fate in [*damaged, *left, *(each for each in odd if each[0] not in shown)]:
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        number = folder.name.partition(".")[0].removeprefix("step_").lstrip("0") or "0"
        yield folder.name, (number, _size(held), _age(folder), fate, "", "nothing")


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1024 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.1f} {unit}"


def _age(folder: Path) -> str:
    seconds = max(0.0, time.time() - folder.lstat().st_mtime)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
