"""One screen of a run: how far, how fast, how it learns, what went wrong. Imports no torch."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from neftune_dist.config import UserError, read_json
from neftune_dist.distributed import outcome
from neftune_dist.system.checkpoint_names import newest_step
from neftune_dist.system.records import EVALUATIONS, SAMPLES, STEPS, is_finite, read_records
from neftune_dist.system.text import duration_text, printable

_CURVE_ROWS = 8
_SPEED_STEPS = 50  # over which speed and time left are averaged
_LOG_BYTES = 2**20  # read at a log's end for the last warning
_LARGE = 1e6  # from here on a number is shown by its first digits
_CLEAR = "\x1b[2J\x1b[H"
# A cell of the curve is split into eight by the block characters.
_BLOCKS = " ▁▂▃▄▅▆▇█"


def watch(run_dir: Path, every_seconds: float, once: bool) -> None:
    """Print a run's screen, again and again in a terminal, until Ctrl-C.

    Args:
        every_seconds: between two screens.
        once: print one screen; so it is without a terminal.

    Raises:
        UserError: no run directory, or no longer.
    """
    once = once or not sys.stdout.isatty()
    with suppress(KeyboardInterrupt):
        while True:
            if not (run_dir / STEPS).exists() and not (run_dir / "logs").is_dir():
                raise UserError(
                    f"{run_dir} is no run directory: it holds neither {STEPS} nor logs/."
                )
            width = shutil.get_terminal_size().columns
            lines = screen_lines(run_dir, time.time(), width)
            if once:
                print("\n".join(lines), flush=True)
                return
            print(_CLEAR + "\n".join(line[:width] for line in lines), flush=True)
            time.sleep(every_seconds)


def screen_lines(run_dir: Path, now: float, width: int = 80) -> Iterator[str]:
    """The lines of a run's screen at a time, in seconds since 1970."""
    records = read_records(run_dir / STEPS, ("loss", "step_seconds", "num_tokens"))
    steps, evaluations = records.rows, read_records(run_dir / EVALUATIONS).rows
    num_steps = _num_steps(run_dir)
    yield f"{run_dir.resolve()}  {datetime.fromtimestamp(now):%Y-%m-%d %H:%M:%S}"
    if not steps:
        yield "no step is recorded yet"
    else:
        yield from _step_lines(run_dir, steps, evaluations, num_steps, now)
        yield from _curve([row["loss"] for row in steps], width)
    if records.num_lost:
        yield f"damaged lines of {STEPS}, left out: {records.num_lost}"
    if samples := read_records(run_dir / SAMPLES).rows:
        last = samples[-1]
        said = " ".join(f"{last.get('instruction')} -> {last.get('output')}".split())
        yield f"sample of step {last['step']}: {printable(said)}"
    yield from _attempt_lines(run_dir)
    if warning := _last_warning(run_dir):
        yield f"last warning: {warning}"


def _step_lines(
    run_dir: Path,
    steps: Sequence[dict[str, Any]],
    evaluations: Sequence[dict[str, Any]],
    num_steps: int | None,
    now: float,
) -> Iterator[str]:
    last, recent = steps[-1], steps[-_SPEED_STEPS:]
    step, tokens = last["step"], sum(row["num_tokens"] or 0 for row in recent)
    seconds = sum(row["step_seconds"] or 0.0 for row in recent) / len(recent)
    progress = f"step {step}"
    if num_steps and num_steps >= step:  # less: the run was made longer, and has not saved since
        left = duration_text((num_steps - step) * seconds)
        progress += f" of {num_steps} ({step / num_steps:.0%}); {left} left"
    age = duration_text(max(0.0, now - (run_dir / STEPS).stat().st_mtime))
    yield f"{progress}; recorded {age} ago; newest checkpoint: {newest_step(run_dir)}"
    held_out = [row for row in evaluations if is_finite(row.get("held_out_loss"))]
    line = f"loss {_shown(last['loss'])}"
    if held_out:
        best = min(held_out, key=lambda row: row["held_out_loss"])
        line += (
            f"; held out {_shown(held_out[-1]['held_out_loss'])} (step {held_out[-1]['step']}), "
            f"best {_shown(best['held_out_loss'])} (step {best['step']})"
        )
    yield line

    def shown(key: str, form: str = ".4f") -> str:
        return _shown(last.get(key), form)

    speed = f"{tokens / (seconds * len(recent)):,.0f}" if seconds else "?"
    yield (
        f"{speed} tokens/s, {seconds:.2f} s a step, world size {shown('world_size', '.0f')}, "
        f"MFU {shown('mfu', '.1%')}, memory {shown('memory_gib', '.1f')} GiB, "
        f"padding {shown('padding_fraction', '.3f')}"
    )
    yield (
        f"noise norm {shown('noise_norm')}, by the law {shown('noise_law')}; "
        f"gradient norm {shown('grad_norm', '.3f')}; "
        f"learning rate {shown('learning_rate', '.3g')}; "
        f"skipped steps: {shown('num_skipped_steps', '.0f')}"
    )


def _curve(losses: Sequence[float | None], width: int) -> Iterator[str]:
    """The loss over the steps as block characters, a mean of neighbouring steps a column."""
    found = [loss for loss in losses if loss is not None]
    columns = min(len(found), max(10, width - 10))
    if columns < 2:
        return
    means = []
    for i in range(columns):
        part = found[i * len(found) // columns : (i + 1) * len(found) // columns]
        means.append(math.fsum(loss / len(part) for loss in part))  # a sum may be infinite
    low, high = min(means), max(means)
    eighths = [round((mean - low) / ((high - low) or 1) * 8 * _CURVE_ROWS) for mean in means]
    for row in reversed(range(_CURVE_ROWS)):
        label = {_CURVE_ROWS - 1: _shown(high), 0: _shown(low)}.get(row, "").rjust(8)
        cells = (_BLOCKS[min(8, max(0, value - 8 * row))] for value in eighths)
        yield f"{label} {''.join(cells)}".rstrip()


def _attempt_lines(run_dir: Path) -> Iterator[str]:
    past = outcome.outcomes(run_dir)
    first = max(0, len(past) - 5)
    for number, attempt in enumerate(past[first:], first + 1):
        error = f": {attempt.error}" if attempt.error else ""
        at = f" at step {attempt.step}" if attempt.step else ""
        going_on = number == len(past) and not attempt.when  # no end is recorded
        kind = "under way, unless its launcher was killed" if going_on else attempt.kind
        yield f"attempt {number} of {len(past)}: {kind}{at}{error}"


def _last_warning(run_dir: Path) -> str:
    """The last line with a warning in the newest log of rank 0; "" where there is none."""
    for folder in reversed(outcome.folders(run_dir)):
        log = folder / "console.log"
        if not log.is_file():
            continue
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        for line in reversed(lines):
            if "warning:" in line:
                return printable(line.strip())
    return ""


def _num_steps(run_dir: Path) -> int | None:
    """The run's length, from its newest checkpoint; None before there is one."""
    folder = run_dir / "checkpoints" / f"step_{newest_step(run_dir):08d}"
    try:
        return int(read_json(folder / "trainer_state.json", {"num_steps": int})["num_steps"])
    except UserError:  # there is none yet, or it is damaged
        return None


def _shown(value: Any, form: str = ".4f") -> str:
    """A number of a record; "?" for anything else, which a damaged or a foreign file may hold."""
    if not is_finite(value):
        return "?"
    return format(value, form if abs(value) < _LARGE else ".3g")
