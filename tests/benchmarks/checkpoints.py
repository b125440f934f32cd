"""What saving costs: SmolLM2-135M on 2 ranks, asynchronous against synchronous in one run.

One process group trains nothing: it builds the engine and saves three times in each mode, with a
sleep between, then loads; another process exports. Memory is what a process holds of its own
(RssAnon), peak over before. The model is the quickstart's.

usage: python tests/benchmarks/checkpoints.py MODEL_DIR [fsdp2|deepspeed]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from neftune_dist.checkpoint import flat, store
from neftune_dist.checkpoint.export import export
from neftune_dist.checkpoint.run_files import keep_small_files
from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import CheckpointConfig, Config
from neftune_dist.distributed.world import World
from neftune_dist.model import load
from neftune_dist.optim.adamw import MakeOptimizer

SAVES = 3


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


class Peak:
    """Within the block: the most that this process holds above what it held at its start."""

    def __enter__(self) -> Peak:
        self.start = self.highest = anonymous_mib()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(2e-3):
            self.highest = max(self.highest, anonymous_mib())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.watcher.join()
        self.mib = self.highest - self.start


def worker(folder: Path, engine_name: str, run_dir: Path) -> None:
    """One rank's part; rank 0 prints the figures as JSON."""
    world = World()
    config = Config()
    config.model.name_or_path, config.model.dtype = str(folder), "fp32"
    model = load.build(folder, config.model, packing=True)
    if engine_name == "fsdp2":
        from neftune_dist.engine.fsdp2 import FSDP2Engine

        engine: Any = FSDP2Engine(config, world)
    else:
        from neftune_dist.engine.deepspeed import DeepSpeedEngine

        engine = DeepSpeedEngine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    for shard in engine.flat_state():
        shard.tensor.fill_(1.0)
    engine.after_load(0)
    state = {
        "shapes": {name: list(shape) for name, shape in engine.shapes.items()},
        "config": config.to_dict(),
        "progress": {"step": 0, "num_tokens": 0, "num_supervised_tokens": 0},
        "versions": {"neftune_dist": "benchmark"},
        "world_size": world.size,
    }
    figures: dict[str, Any] = {}
    for mode in ("sync", "async"):
        saver = Saver(run_dir / mode, CheckpointConfig(mode=mode, keep=1), world)
        waited, whole = [], []
        with Peak() as peak:
            for step in range(1, SAVES + 1):
                world.gather([0.0])
                began = time.perf_counter()
                saver.save(step, engine, state)
                waited.append(saver.seconds_waited)
                saver.wait()
                whole.append(time.perf_counter() - began)
        figures[mode] = {
            "stood_still_seconds": statistics.median(waited[1:]),
            "first_stood_still_seconds": waited[0],
            "published_after_seconds": statistics.median(whole),
            "peak_mib": peak.mib,
        }
    newest = store.find_all(run_dir / "async")[0]
    with Peak() as peak:
        began = time.perf_counter()
        flat.Reader(newest.folder).read(engine.flat_state())
        seconds = time.perf_counter() - began
    figures["load"] = {"seconds": seconds, "peak_mib": peak.mib}
    began = time.perf_counter()
    assert newest.first_flaw(world.rank, world.size) is None
    figures["verify"] = {"seconds": time.perf_counter() - began}
    parameters = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    figures["bytes"] = {
        "shards_mib": sum(s.tensor.nbytes for s in engine.flat_state()) / 2**20,
        "on_disk": newest.num_bytes(),
        "over_12_bytes_a_parameter": newest.num_bytes() / (12 * parameters),
    }
    if world.is_first:
        print(json.dumps(figures), flush=True)
    world.close()


def main() -> None:
    folder, engine = Path(sys.argv[1]), (sys.argv[2:] or ["fsdp2"])[0]
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words = [f"--nproc_per_node={2}", __file__, str(folder), engine, temporary]
        done = subprocess.run([*launcher, *words], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        figures = json.loads(done.stdout.splitlines()[-1])
        keep_small_files(folder, run_dir / "async")
        with Peak() as peak:
            began = time.perf_counter()
            export(run_dir / "async", log=lambda _: None)
            seconds = time.perf_counter() - began
        figures["export"] = {"seconds": seconds, "peak_mib": peak.mib}
    print(f"{engine}, 2 ranks, torch {torch.__version__}; memory and seconds of rank 0")
    for name, values in figures.items():
        shown = ", ".join(f"{k} {v:.3f}" for k, v in values.items())
        print(f"{name:8} {shown}")
    ratio = figures["async"]["stood_still_seconds"] / figures["sync"]["stood_still_seconds"]
    print(f"training stands still {ratio:.3f} of the synchronous time")


if __name__ == "__main__":
    if "RANK" in os.environ:
        worker(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    else:
        main()
