"""Where the time of a step goes: `train.profile_steps`.

The first process profiles some steps once memory and kernels have settled, and writes a trace for
a viewer (chrome://tracing, Perfetto) and a table by kind of operator. On a GPU the time is that of
the kernels which an operator starts, on a CPU that of the operator itself, callees apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from neftune_dist.distributed.world import World
from neftune_dist.system.text import first_line

_WARM_UP_STEPS = 2  # the second still touches memory for the first time
_FOLDER = "profile"
_LISTED = 25  # operators in the table
# Kinds by the names of their operators; the first match counts.
_KINDS = {
    "matrix products": r"aten::(_scaled_)?(mm|bmm|addmm|baddbmm|linear|matmul)$|mkldnn.*linear",
    "attention": r"neftune_dist::.*attention|aten::_.*attention|flex_attention",
    "collectives": r"c10d::|gloo:|nccl:|record_param_comms|_c10d_functional::|DeepSpeed",
    "waits of the host": r"aten::(item|_local_scalar_dense)$|cuda(Stream|Device|Event)Synchronize",
    "copies and casts": r"aten::(_to_copy|to|copy_|cat|_foreach_copy_|contiguous|clone|stack|split"
    r"|index_select|index|pin_memory)|fsdp::",
    "noise": r"neftune_dist::.*noise",
}


class StepProfiler:
    """Profiles the steps after the second of this process; does nothing where `num_steps` is 0.

    Args:
        run_dir: gets the folder `profile`.
        num_steps: to profile, on rank 0.
        world: of the run.
    """

    def __init__(self, run_dir: Path, num_steps: int, world: World) -> None:
        self._folder, self._log = run_dir / _FOLDER, world.log
        self._num_steps = num_steps if world.is_first else 0
        self._on_gpu = world.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities) if self._num_steps else None
        self._num_before = 0  # steps of this process before the first that is profiled
        self._profiled: list[int] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step, which counts from 1."""
        if self._profile is None or self._num_before < _WARM_UP_STEPS:
            self._num_before += 1
            yield
            return
        if not self._profiled:
            self._profile.start()
        yield
        self._profiled.append(number)
        if len(self._profiled) == self._num_steps:
            self.close()

    def close(self) -> None:
        """Write what was profiled; a second call does nothing."""
        running, self._profile = self._profile, None
        if running is None:
            return
        if not self._profiled:
            self._log(
                "warning: train.profile_steps: nothing was profiled, because only steps after the "
                f"first {_WARM_UP_STEPS} are"
            )
            return
        running.stop()
        self._write(running)

    def _write(self, profiled: profile) -> None:
        first, last = self._profiled[0], self._profiled[-1]
        name = f"steps_{first:08}_{last:08}"
        rows = self._rows(profiled)
        lines = _table(rows, len(self._profiled))
        try:
            self._folder.mkdir(exist_ok=True)
            profiled.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            (self._folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        except (OSError, RuntimeError) as error:  # the run is worth more than its profile
            self._log(f"warning: {self._folder} cannot be written: {first_line(error)}")
            return
        kinds = lines[: len({kind for kind, _, _, _ in rows}) + 1]
        self._log(f"profile: steps {first} to {last} of rank 0, in {self._folder}/{name}.*")
        for line in kinds:
            self._log(f"  {line}")

    def _rows(self, profiled: profile) -> list[tuple[str, str, int, float]]:
        """Kind, name, number of calls and seconds of every operator, the longest first."""
        rows = []
        for event in profiled.key_averages():
            # Kernels are counted with the operators that start them.
            if event.device_type != DeviceType.CPU:
                continue
            spent = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            if spent > 0:
                rows.append((_kind(event.key), event.key, event.count, spent / 1e6))
        return sorted(rows, key=lambda row: -row[3])


def _kind(name: str) -> str:
    return next((kind for kind, names in _KINDS.items() if re.search(names, name)), "the rest")


def _table(rows: list[tuple[str, str, int, float]], num_steps: int) -> list[str]:
    """Lines by kind, then by operator."""
    total = sum(row[3] for row in rows) or 1.0
    by_kind = defaultdict[str, float](float)
    for kind, _, _, seconds in rows:
        by_kind[kind] += seconds
    lines = [f"{'kind':24}{'ms a step':>12}{'share':>9}"]
    for kind, seconds in sorted(by_kind.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:24}{1e3 * seconds / num_steps:12.2f}{seconds / total:9.1%}")
    lines += ["", f"{'operator':60}{'calls a step':>13}{'ms a step':>12}{'share':>9}"]
    for _, name, count, seconds in rows[:_LISTED]:
        milliseconds = 1e3 * seconds / num_steps
        lines.append(
            f"{name[:58]:60}{count / num_steps:13.1f}{milliseconds:12.2f}{seconds / total:9.1%}"
        )
    return lines
