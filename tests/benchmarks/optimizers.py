"""Adam's moments in float32, bfloat16 and 8 bits: what an update costs, and what training comes to.

An update: medians of rounds, of a matrix of 256 Mi elements on a GPU, of 30 million on a CPU. The
bytes that it moves are counted, not measured: what each element's parameter, gradient and moments
take to read and to write, as torch's fused AdamW and this project's kernels do it. Each figure is
one line of OUT/optimizers.jsonl, appended at once, and its share of the bandwidth of a copy of the
same size is what there is to compare. The gradient's norm is timed as well.

Training: the same documents, noise and learning rates, one process, FSDP2; a run each, one after
the other. Losses are token means: of the last ten steps (noise on), and of held-out documents
(noise off).

usage: python tests/benchmarks/optimizers.py [--out DIR]
       python tests/benchmarks/optimizers.py [--out DIR] MODEL_DIR DATA [key=value ...]
DATA: rows, as `data.source` takes them. The words after it change settings of every run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neftune_dist.config import KNOBS, ModelConfig, OptimConfig
from neftune_dist.model import load
from neftune_dist.optim.adamw import MakeOptimizer, initialize_state, squared_norm, state_bytes
from neftune_dist.optim.param_slice import ParamSlice

WORDS = [
    "model.dtype=fp32",
    "data.template=alpaca",
    "data.max_length=256",
    "data.num_held_out=32",
    "train.max_steps=40",
    "train.global_batch_size=16",
    "train.micro_batch_tokens=2048",
    "optim.learning_rate=5e-5",
    "optim.warmup_steps=4",
    "logging.tensorboard=false",
]
LAST_STEPS = 10
GPU_NUMEL, CPU_NUMEL, ROUNDS = 1 << 28, 30_000_000, 8
# Bytes that an update moves for an element: the parameter both ways, the gradient, the moments both
# ways. Where the norm is clipped, torch's fused AdamW writes the gradient, too.
UPDATE_BYTES = {"fp32": 28.0, "bf16": 20.0, "8bit": 16 + 4 * 4 / 256}


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    losses: list[float]
    held_out: list[float]  # before the first step and after the last one
    seconds: float


def run(states: str, folder: Path, words: list[str]) -> Run:
    """Train with moments of that precision."""
    run_dir = folder / states
    began = time.perf_counter()
    (folder / "config.yaml").write_text("{}")
    command = [sys.executable, "-m", "neftune_dist", "train", str(folder / "config.yaml")]
    chosen = [*WORDS, *words, f"optim.states={states}", f"run_dir={run_dir}"]
    subprocess.run([*command, *chosen], check=True, stdout=sys.stderr)
    seconds = time.perf_counter() - began

    def records(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]

    return Run(
        [record["loss"] for record in records("metrics.jsonl")],
        [record["held_out_loss"] for record in records("evaluations.jsonl")],
        seconds,
    )


def bytes_a_parameter(states: str, model_dir: str) -> float:
    """Of both moments, over the model's parameters."""
    model = load.build(Path(model_dir), ModelConfig(model_dir, dtype="fp32"), packing=True)
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(state_bytes(OptimConfig(states=states), size) for size in sizes) / sum(sizes)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of some rounds, after two that warm up."""
    found = []
    for _ in range(ROUNDS + 2):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            work()
            ended.record()
            ended.synchronize()
            found.append(began.elapsed_time(ended) / 1e3)
        else:
            began_seconds = time.perf_counter()
            work()
            found.append(time.perf_counter() - began_seconds)
    return statistics.median(found[2:])


def measure_updates(device: torch.device, numel: int, out: Path) -> None:
    """A copy, the gradient's norm, and an update by each kind of moments."""
    parameter = torch.nn.Parameter(torch.randn(numel, device=device) * 0.02)
    grad = torch.randn(numel, device=device) * 1e-3
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "numel": numel,
    }
    bandwidth = 0.0

    def report(what: str, taken: float, num_bytes: float) -> None:
        nonlocal bandwidth
        rate = num_bytes * numel / taken
        bandwidth = bandwidth or rate  # the copy's is the first
        line = {
            "what": what,
            "milliseconds": round(taken * 1e3, 4),
            "nanoseconds_per_element": taken / numel * 1e9,
            "bytes_per_element": num_bytes,
            "gb_per_second": round(rate / 1e9, 1),
            "share_of_copy": round(rate / bandwidth, 3),
            **about,
        }
        print(json.dumps(line), flush=True)
        with (out / "optimizers.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    report("copy", seconds(lambda: parameter.detach().copy_(grad), device), 8)
    report("gradient norm", seconds(lambda: squared_norm([grad]), device), 4)
    for states in KNOBS["optim.states"].choices:
        for clipped in (False, True):
            parameter.grad = grad.clone() if clipped else grad  # may be written
            make = MakeOptimizer(OptimConfig(states=states))
            optimizer = make([("w", parameter)], {"w": (numel // 1000, 1000)})
            param_slice = ParamSlice(parameter, slice(0, numel), "w", 0, numel)
            initialize_state(optimizer, [parameter], [param_slice])
            if clipped:
                optimizer.grad_scale = torch.ones((), device=device)
            writes_grad = 4 * (clipped and states == "fp32")
            report(
                f"{states} update" + ", clipped" * clipped,
                seconds(optimizer.step, device),
                UPDATE_BYTES[states] + writes_grad,
            )
            del optimizer


def compare_training(model_dir: str, data: str, words: list[str]) -> None:
    """A table of runs with each kind of moments."""
    chosen = [f"model.name_or_path={model_dir}", f"data.source={data}", *words]
    print(f"torch {torch.__version__}, {platform.machine()}, {' '.join([*WORDS, *words])}")
    print("| moments | bytes a parameter | training loss | held-out loss | largest step gap |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        runs: dict[str, Run] = {}
        for states in KNOBS["optim.states"].choices:
            runs[states] = run(states, Path(temporary), chosen)
            mine, reference = runs[states], runs["fp32"]
            last = mine.losses[-LAST_STEPS:]
            gap = max(abs(a / b - 1) for a, b in zip(mine.losses, reference.losses, strict=True))
            print(
                f"| {states} | {bytes_a_parameter(states, model_dir):.2f} "
                f"| {sum(last) / len(last):.5f} | {mine.held_out[-1]:.5f} | {gap:.1e} |",
                flush=True,
            )
        print(f"held out before training: {runs['fp32'].held_out[0]:.5f}")
        print("seconds: " + ", ".join(f"{name} {run.seconds:.0f}" for name, run in runs.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of optimizers.jsonl")
    parser.add_argument("words", nargs="*", metavar="MODEL_DIR DATA [key=value ...]")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    measure_updates(
        torch.device("cuda" if on_gpu else "cpu"), GPU_NUMEL if on_gpu else CPU_NUMEL, arguments.out
    )
    if arguments.words:
        model_dir, data, *words = arguments.words
        compare_training(model_dir, data, words)


if __name__ == "__main__":
    main()
