"""What the noise costs: this package's operator against transformers' hook, on one activation.

Both add noise to the same fresh activation, 8,192 tokens x 4,096 channels, in a process of their
own, forwards alternating with those of no hook at all; the figures are medians. On a GPU the copy
bandwidth of the device is measured beside them. The first line names versions and device.

usage: python tests/benchmarks/noise.py [MODEL_DIR]     with a model: its share of a training step
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from neftune_dist import NEFTune
from neftune_dist.noise.law import RankStream
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise

TOKENS, HIDDEN, ROWS, REPEATS = 8192, 4096, 16, 15
KINDS = {"transformers": "transformers' hook", "neftune_dist": "neftune_dist"}


class Hooked(torch.nn.Module):
    """What transformers' hook reads off the embedding."""

    neftune_noise_alpha = 5.0


def peak_bytes(work: object, on_gpu: bool) -> int:
    """Most memory that calling `work` takes beyond what is held before and after."""
    assert callable(work)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    # Resident memory, read as often as Python gets to it while torch works without its lock.
    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(seen) - seen[0]


def seconds(work: object, on_gpu: bool) -> float:
    """Median time of a call."""
    assert callable(work)
    times = []
    for _ in range(REPEATS if on_gpu else 5):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(kind: str, dtype: torch.dtype) -> None:
    """Print seconds and extra bytes of one kind: the body of a process of its own."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    x = torch.zeros(ROWS, TOKENS // ROWS, HIDDEN, dtype=dtype, device=device)
    layout = TokenLayout.from_lengths(torch.full((ROWS,), TOKENS // ROWS)).to(device)
    module = Hooked().train()

    def work() -> Tensor:
        if kind == "transformers":
            return neftune_post_forward_hook(module, (), x)
        return add_noise(x, layout, RankStream(0, 0, 0, 0), 5.0)

    # The first call loads code, and compiles on a GPU. On the CPU of tokens too few to count.
    if on_gpu:
        work()
    else:
        add_noise(x[:, :4], TokenLayout.padding(4 * ROWS), RankStream(0, 0, 0, 0), 5.0)
        neftune_post_forward_hook(module, (), x[:, :4])
    extra = peak_bytes(work, on_gpu)
    print(seconds(work, on_gpu), extra)


def share_of_a_step(folder: str) -> None:
    """Print the noise's part of a forward, a backward and an update on 8 documents of 128."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, 1000, (8, 128), device=device)
    x = model.get_input_embeddings()(ids).detach()
    layout = TokenLayout.from_lengths(torch.full((8,), 128)).to(device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with NEFTune(5.0).attach(model):
        step()
        whole = seconds(step, on_gpu)
    part = seconds(lambda: add_noise(x, layout, RankStream(0, 0, 0, 0), 5.0), on_gpu)
    print(f"a training step on 1024 tokens {whole:.3f} s, noise {part:.5f} s: {part / whole:.3%}")


def main() -> None:
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{TOKENS} tokens x {HIDDEN}; the activation itself: 128 MiB in float32, 64 in bfloat16")
    for dtype in ("float32", "bfloat16"):
        figures = {}
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, __file__, kind, dtype], capture_output=True, text=True, check=True
            )
            taken, extra = done.stdout.split()
            figures[kind] = float(taken), int(extra)
            print(
                f"{dtype:9} {KINDS[kind]:19} {1e3 * float(taken):9.3f} ms, "
                f"extra memory {int(extra) / 2**20:7.1f} MiB"
            )
        theirs, ours = figures.values()
        print(
            f"{dtype:9} {'ratio':19} {theirs[0] / ours[0]:9.2f} times as fast, "
            f"{ours[1] / theirs[1]:.3f} of the extra memory"
        )
        if on_gpu:
            x = torch.zeros(TOKENS, HIDDEN, dtype=getattr(torch, dtype), device="cuda")
            y = torch.empty_like(x)
            copying = seconds(lambda x=x, y=y: y.copy_(x), True)
            print(f"{dtype:9} {'of copy bandwidth':19} {copying / ours[0]:9.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(sys.argv[1], getattr(torch, sys.argv[2]))
    else:
        main()
        if len(sys.argv) == 2:
            share_of_a_step(sys.argv[1])
