"""Adam's moments in float32, bfloat16 and 8 bits: what the same fine-tuning comes to with each.

The same documents, noise and learning rates, one process, FSDP2; a run each, one after the other.
Losses are token means: of the last ten steps (noise on), and of held-out documents (noise off).
Before that, what an update of 30 million elements costs: medians of rounds in turn.

usage: python tests/benchmarks/optimizers.py MODEL_DIR DATA [key=value ...]
DATA: rows, as `data.source` takes them. The words after it change settings of every run.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neftune_dist.config import CHOICES, ModelConfig, OptimConfig
from neftune_dist.model import load
from neftune_dist.optim import MakeOptimizer, Piece, initialize_state, state_bytes

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
NUMEL, ROUNDS = 30_000_000, 8


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


def update_nanoseconds() -> dict[str, float]:
    """Of one update, for each element."""
    optimizers = {}
    for states in CHOICES["optim.states"]:
        parameter = torch.nn.Parameter(torch.randn(NUMEL) * 0.02)
        parameter.grad = torch.randn(NUMEL) * 1e-3
        make = MakeOptimizer(OptimConfig(states=states))
        optimizers[states] = make([("w", parameter)], {"w": (NUMEL // 1000, 1000)})
        piece = Piece(parameter, slice(0, NUMEL), "w", 0, NUMEL)
        initialize_state(optimizers[states], [parameter], [piece])
    seconds: dict[str, list[float]] = {states: [] for states in optimizers}
    for _ in range(ROUNDS):
        for states, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            seconds[states].append(time.perf_counter() - began)
    return {name: statistics.median(each) / NUMEL * 1e9 for name, each in seconds.items()}


def main(model_dir: str, data: str, *words: str) -> None:
    chosen = [f"model.name_or_path={model_dir}", f"data.source={data}", *words]
    print(f"torch {torch.__version__}, {platform.machine()}, {' '.join([*WORDS, *words])}")
    costs = update_nanoseconds()
    shown = ", ".join(f"{name} {ns:.1f}" for name, ns in costs.items())
    print(f"an update takes, in nanoseconds an element, {torch.get_num_threads()} threads: {shown}")
    print("| moments | bytes a parameter | training loss | held-out loss | largest step gap |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        runs: dict[str, Run] = {}
        for states in CHOICES["optim.states"]:
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
        print("seconds: " + ", ".join(f"{name} {each.seconds:.0f}" for name, each in runs.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
