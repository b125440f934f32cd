"""A 7B model on one GPU: speed and peak memory of a training step, part by part.

The model is Llama-2 7B's architecture with random weights, made where they lie (where the GPU has
less memory than its float32 moments take: one of 3B); nothing is read or written but a
configuration. Documents are random tokens: of Alpaca's or ShareGPT-like lengths, packed as in
training, or one whole document a row, all of it supervised, as published figures have it. Each part
is a process with a time limit, forked from one that has imported everything, and its result one
line of OUT/gpu.jsonl: what is there already is not measured again, so the same command goes on
where the last one ended. A part that runs out of memory or fails is recorded as such. Beside a
step's measured peak memory stands what `neftune-dist plan` estimates for the same micro-batches.

usage: python tests/benchmarks/gpu.py [--out DIR] [--only WORD ...] [--seconds 560]
       python tests/benchmarks/gpu.py --tiny     every part on a tiny model, on a CPU as well
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.utils._triton  # noqa: E402


def gpu_of_driver() -> tuple[str, float]:
    """Name and GiB of the first GPU, without starting CUDA; this machine's kind and 0 without."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        name, mib = lines.splitlines()[0].split(",")
        return name.strip(), float(mib) / 1024
    return platform.machine(), 0.0


# Packages ask while they are imported whether there is a GPU and Triton. CUDA is not to answer, or
# no forked process could use it.
GPU, GPU_GIB = gpu_of_driver()
_ASKED = {
    (torch.cuda, "is_available"): lambda: GPU_GIB > 0,
    (torch.cuda, "device_count"): lambda: int(GPU_GIB > 0),
    (torch.utils._triton, "has_triton"): lambda: GPU_GIB > 0,
}
_USUAL = {where: getattr(*where) for where in _ASKED}
if __name__ == "__main__":
    for (module, name), answer in _ASKED.items():
        setattr(module, name, answer)

from tests.benchmarks.gpu_parts import (  # noqa: E402
    SEVEN_B,
    THREE_B,
    TINY,
    Part,
    Size,
    body,
    planned_gib,
)

# Published for one H200, 7B, bf16, full recomputation, rows of 4096 (KempnerForge); tokens/s.
PUBLISHED = 10_471
TARGET, TARGET_FLOAT8, TARGET_PEER = 10_500, 1.2, 3.0
# Of a 7B model with float32 masters, moments and gradients.
_LEAST_MEMORY_7B_GIB = 110

FULL, SELECTIVE = (
    ("model.activation_checkpointing=full",),
    ("model.activation_checkpointing=selective",),
)
COMPILE = ("model.compile=true",)
SINGLE, FLOAT8 = "engine.name=replicated", "model.float8=tensorwise"


def step(name: str, units: int, *words: str, documents: str = "whole") -> Part:
    """A training step; compiling takes its time."""
    return Part(name, "step", units, documents, words, 180 if COMPILE[0] in words else 100)


# What matters most comes first.
PARTS = (
    step("4096 full", 4, *FULL),
    step("4096 selective compile", 4, *SELECTIVE, *COMPILE),
    step("4096 selective compile single", 4, *SELECTIVE, *COMPILE, SINGLE),
    step("4096 selective compile single float8", 4, *SELECTIVE, *COMPILE, SINGLE, FLOAT8),
    Part("noise", "noise", 8),
    step(
        "alpaca 4096 selective compile single", 4, *SELECTIVE, *COMPILE, SINGLE, documents="alpaca"
    ),
    step("4096 selective compile float8", 4, *SELECTIVE, *COMPILE, FLOAT8),
    step("alpaca 4096 selective compile", 4, *SELECTIVE, *COMPILE, documents="alpaca"),
    Part("alpaca peer: transformers", "peer", 4, "alpaca", FULL),
    step("8192 selective compile", 8, *SELECTIVE, *COMPILE),
    step("8192 full compile", 8, *FULL, *COMPILE),
    step("4096 full zero3", 4, *FULL, "engine.name=deepspeed"),
    Part("save", "save", 4),
    step("4096 none compile", 4, *COMPILE),
    step("4096 selective", 4, *SELECTIVE),
    Part("loss", "loss", 4),
    Part("attention alpaca", "attention", 8, "alpaca"),
    Part("attention whole", "attention", 8),
    step(
        "alpaca 4096 selective compile single float8",
        4,
        *SELECTIVE,
        *COMPILE,
        SINGLE,
        FLOAT8,
        documents="alpaca",
    ),
    step("sharegpt 4096 selective compile", 4, *SELECTIVE, *COMPILE, documents="sharegpt"),
    step("8192 full compile single", 8, *FULL, *COMPILE, SINGLE),
    step(
        "sharegpt 4096 selective compile single",
        4,
        *SELECTIVE,
        *COMPILE,
        SINGLE,
        documents="sharegpt",
    ),
    step("16384 full compile", 16, *FULL, *COMPILE),
    step("4096 full 8bit", 4, *FULL, "optim.states=8bit"),
    step("4096 full compile", 4, *FULL, *COMPILE),
    step("2048 selective compile", 2, *SELECTIVE, *COMPILE),
    step("4096 selective liger", 4, *SELECTIVE, "model.kernels=liger"),
    step("4096 selective compile float8 rowwise", 4, *SELECTIVE, *COMPILE, "model.float8=rowwise"),
    step("4096 none", 4),
    step("alpaca 4096 selective flex", 4, *SELECTIVE, "model.attention=flex", documents="alpaca"),
    step("4096 full liger loss", 4, *FULL, "model.loss=liger"),
    step("4096 full plain loss", 4, *FULL, "model.loss=plain"),
    step("8192 full", 8, *FULL),
    step("2048 none", 2),
    step("4096 no reshard", 4, *SELECTIVE, *COMPILE, "engine.reshard_after_forward=false"),
)


def _into(path: Path, work: Callable[[], dict[str, Any]]) -> int:
    """Fork a process, head of a group of its own, that writes what `work` gives; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.setsid()
        for (module, name), usual in _USUAL.items():
            setattr(module, name, usual)
        result = work()
        path.write_text(json.dumps(result))
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)  # a copy of the parent has nothing of the parent's to clean up


def _on_a_fresh_gpu(part: Part, size: Size, profile: Path | None, result: Path) -> dict[str, Any]:
    """The part's result; where this copy of the parent cannot use the GPU, that of a new program,
    which takes seconds more."""
    if torch.cuda._is_in_bad_fork():
        words = [sys.executable, *sys.argv, "--part", part.name, "--result", str(result)]
        words += ["--small"] if size.num_hidden_layers == 1 else []
        os.execv(sys.executable, words)
    return body(part, size, profile)


def _ended(pid: int, deadline: float) -> bool:
    """Whether the process has ended by the deadline; it and its group are killed then."""
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        if not ended:
            time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
    return ended


def profile_path(part: Part, args: argparse.Namespace) -> Path | None:
    """Where the part's time by kernel is to go, if it is asked for."""
    if part.name not in (args.profile or ()):
        return None
    return Path(args.out, f"{part.name.replace(' ', '_')}.txt")


def measure(part: Part, size: Size, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run the part in a process, and the plan of it in another meanwhile."""
    began = time.monotonic()
    profile = profile_path(part, args)
    with tempfile.TemporaryDirectory() as folder:
        measured, planned = Path(folder, "measured"), Path(folder, "planned")
        child = _into(measured, lambda: _on_a_fresh_gpu(part, size, profile, measured))
        planner = 0
        if part.what == "step":
            planner = _into(planned, lambda: {"gib": planned_gib(part, size)})
        ended = _ended(child, began + limit)
        if planner:
            _ended(planner, began + limit if ended else 0.0)
        result: dict[str, Any] = {"status": "timed out", "error": f"after {limit:.0f} s"}
        if ended:
            result = {"status": "failed", "error": "the process ended without a result"}
        with suppress(OSError, ValueError):
            result = json.loads(measured.read_text())
        result = {"part": part.name, **asdict(part), **result}
        with suppress(OSError, ValueError):
            result["planned_gib"] = json.loads(planned.read_text())["gib"]
    return {**result, "size": asdict(size), "seconds": time.monotonic() - began}


def one_layer(size: Size) -> Size:
    """A model whose block compiles to what this size's does."""
    return replace(size, num_hidden_layers=1, steps=1, micro_batches=2)


def warm_caches(parts: Sequence[Part], size: Size, limit: float) -> None:
    """Compile the parts' blocks, all at the same time, on a model of one of them: torch's caches
    then spare the parts a minute each."""
    began = time.monotonic()
    small = one_layer(size)
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder, str(i)) for i in range(len(parts))]
        children = [
            _into(path, lambda part=part, path=path: _on_a_fresh_gpu(part, small, None, path))
            for path, part in zip(results, parts, strict=True)
        ]
        for part, child, path in zip(parts, children, results, strict=True):
            _ended(child, began + limit)
            result = {"status": "ended without a result"}
            with suppress(OSError, ValueError):
                result = json.loads(path.read_text())
            seconds = time.monotonic() - began
            print(f"warmed {part.name}: {result['status']}, {seconds:.0f} s", flush=True)
            print(result.get("traceback", ""), end="", flush=True)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Part's name: its result. A torn last line is as none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            result = json.loads(line)
            found[result["part"]] = result
    return found


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as lines, in the order of `PARTS`."""
    found = [results[part.name] for part in PARTS if part.name in results]
    head = f"{'step':40}{'tokens/s':>10}{'MFU':>7}{'6N':>7}{'GiB':>8}{'plan':>8}{'warm-up s':>11}"
    lines = [head]
    for result in (entry for entry in found if entry["what"] in ("step", "peer")):
        if result["status"] != "done":
            lines.append(f"{result['part']:40}  {result['status']}: {result['error'][:90]}")
            continue
        shares = "".join(f"{result[k]:7.1%}" if k in result else f"{'-':>7}" for k in _MFU)
        memory = "".join(f"{result[k]:8.1f}" if k in result else f"{'-':>8}" for k in _GIB)
        lines.append(
            f"{result['part']:40}{result['tokens_per_second']:10.0f}{shares}{memory}"
            f"{sum(result['warm_up_seconds']):11.1f}"
        )
    for result in (entry for entry in found if entry["what"] not in ("step", "peer")):
        if result["status"] != "done":
            lines.append(f"{result['part']}: {result['status']}: {result['error'][:90]}")
        if "standstill_seconds" in result:
            waits = ", ".join(f"{seconds:.2f}" for seconds in result["standstill_seconds"])
            lines.append(
                f"save: training stands still {waits} s for {result['copied_gib']:.1f} GiB, "
                f"pinned within {result['pinning_seconds']:.1f} s"
            )
        for name, figures in result.items():
            if isinstance(figures, dict) and "milliseconds" in figures:
                share = figures.get("share_of_copy_bandwidth")
                lines.append(
                    f"{result['part'] + ', ' + name:60}{figures['milliseconds']:10.3f} ms"
                    f"{figures['gib']:8.2f} GiB more"
                    + (f", {share:.2f} of the bandwidth of a copy" if share else "")
                )
            elif isinstance(figures, dict) and "error" in figures:
                lines.append(f"{result['part'] + ', ' + name:60}  {figures['error'][:90]}")
    return lines + _against_targets(results)


_MFU, _GIB = ("mfu", "mfu_6n"), ("gib", "planned_gib")


def _against_targets(results: dict[str, dict[str, Any]]) -> list[str]:
    speeds = {
        name: result["tokens_per_second"]
        for name, result in results.items()
        if result["status"] == "done" and "tokens_per_second" in result
    }
    lines = []
    whole = {n: s for n, s in speeds.items() if n[0].isdigit() and "float8" not in n}
    if whole:
        best = max(whole, key=lambda name: whole[name])
        lines.append(
            f"best in bf16, whole documents: {best}, {whole[best]:.0f} tokens/s; for 7B on one "
            f"H200 the target is {TARGET}, published {PUBLISHED}"
        )
    for name, speed in speeds.items():
        base = name.split(" float8")[0]
        if base != name and base in speeds:
            lines.append(f"{name}: {speed / speeds[base]:.2f} of {base}; target {TARGET_FLOAT8}")
    peers = {n: s for n, s in speeds.items() if "peer" in n}
    ours = max((s for n, s in speeds.items() if "alpaca" in n and n not in peers), default=0.0)
    for name, speed in peers.items():
        if ours:
            lines.append(f"{name}: ours is {ours / speed:.2f} times it; target {TARGET_PEER}")
    return lines


def versions() -> str:
    """Date, device, packages."""
    found = []
    for package in ("torch", "transformers", "triton", "torchao", "liger-kernel", "deepspeed"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return f"{time.strftime('%Y-%m-%d')}, {GPU}, {', '.join(found)}"


def warm_imports() -> None:
    """Import what the parts will, once for all of them. Nothing here may start CUDA."""
    for name in (
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "neftune_dist.engine.fsdp2",
        "neftune_dist.planning.simulate",
        "torchao.float8",
        "triton",
    ):
        with suppress(ImportError):
            import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = Path(os.environ.get("OUT", ROOT / "runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=default, help="folder of gpu.jsonl")
    parser.add_argument("--only", nargs="+", help="parts whose name has one of these words")
    parser.add_argument("--exactly", nargs="+", help="parts of these names, in this order")
    parser.add_argument(
        "--seconds", type=float, default=560, help="no part begins that may end later"
    )
    parser.add_argument("--again", action="store_true", help="parts without a figure once more")
    parser.add_argument("--profile", nargs="+", help="OUT/PART.txt of these: time by kernel")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try all this")
    parser.add_argument("--warm", nargs="+", help="only compile these parts, for later calls")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = SEVEN_B if GPU_GIB >= _LEAST_MEMORY_7B_GIB else THREE_B
    size = TINY if args.tiny else size
    named = {part.name: part for part in PARTS}
    if args.part:
        part, size = named[args.part], one_layer(size) if args.small else size
        for (module, name), usual in _USUAL.items():
            setattr(module, name, usual)
        args.result.write_text(json.dumps(body(part, size, profile_path(part, args))))
        return
    warm_imports()
    if args.warm:
        warm_caches([named[name] for name in args.warm], size, args.seconds)
        return
    path, began = args.out / "gpu.jsonl", time.monotonic()
    results = read_results(path)
    for part in [named[name] for name in args.exactly] if args.exactly else PARTS:
        known = results.get(part.name, {}).get("status")
        if known == "done" or (known and not args.again):
            continue
        if args.only and not any(word in part.name for word in args.only):
            continue
        left = args.seconds - (time.monotonic() - began)
        if left < part.limit_seconds / 4:
            print(f"{part.name}: not begun, {left:.0f} s are left", flush=True)
            continue
        results[part.name] = measure(part, size, args, min(left, part.limit_seconds))
        with path.open("a") as file:
            # On a line of its own, also after one that was cut short.
            file.write("\n" + json.dumps({**results[part.name], "made_with": versions()}))
        speed = results[part.name].get("tokens_per_second", 0.0)
        seconds = results[part.name].get("seconds", 0.0)
        status = results[part.name]["status"]
        print(f"{part.name}: {status}, {speed:.0f} tokens/s, {seconds:.0f} s", flush=True)
    print(versions(), f"command: {' '.join(sys.argv)}", *table(results), sep="\n")


if __name__ == "__main__":
    main()
