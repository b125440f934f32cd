"""No rank ever holds the whole model in host memory, and a CPU's freed memory is used again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from neftune_dist.config import Config, ModelConfig
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import MASTER
from neftune_dist.engine.fsdp2 import FSDP2Engine
from neftune_dist.model import load
from neftune_dist.model.weights import WeightFiles
from neftune_dist.optim.adamw import MakeOptimizer
from tests.support import tiny_model

MIB = 2**20
# Measured: 3 MiB above the shards, of a model of 294 MiB.
MOST_OVERHEAD_MIB = 10.0


def anonymous_mib() -> float:
    """This process's own memory; pages of memory-mapped files, which the kernel may drop, are not
    in it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / MIB


class Peak(threading.Thread):
    """Highest `anonymous_mib` until `stop` is called, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()
        self.mib = self.start_mib = anonymous_mib()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(1e-3):
            self.mib = max(self.mib, anonymous_mib())

    def stop(self) -> float:
        """MiB above the start."""
        self._stopped.set()
        self.join()
        return max(self.mib, anonymous_mib()) - self.start_mib


def worker(folder: Path) -> None:
    """Build and load as `train` does; what it took, on standard output."""
    world = World()
    peak = Peak()
    model = load.build(folder, ModelConfig(str(folder), dtype="fp32"), packing=True)
    aliases = load.parameter_aliases(model)
    config = Config()
    config.model.dtype = "fp32"
    engine = FSDP2Engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    assert [name for name, _ in engine.named] == list(aliases)
    files = WeightFiles(folder, aliases, engine.shapes, model)
    shards = engine.flat_state()
    for shard in shards:
        if shard.kind == MASTER:
            shard.tensor.copy_(
                files.read(shard.name, shard.start, shard.start + shard.tensor.numel())
            )
    engine.after_load(0)
    highest = peak.stop()
    kept = {
        kind: sum(s.tensor.nbytes for s in shards if (s.kind == MASTER) == (kind == "weights"))
        for kind in ("weights", "moments")
    }
    report = {
        "rank": world.rank,
        "whole_mib": 4 * sum(p.numel() for p in model.parameters()) / MIB,
        "weights_mib": kept["weights"] / MIB,
        "moments_mib": kept["moments"] / MIB,
        "peak_mib": highest,
    }
    print(json.dumps(report), flush=True)
    world.close()


def test_loading_needs_little_more_than_the_shards(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    done = tiny_model.call_forked(partial(worker, tmp_path), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(*reports, sep="\n")
    assert sorted(report["rank"] for report in reports) == [0, 1]
    for report in reports:
        whole, weights = report["whole_mib"], report["weights_mib"]
        assert 280 < whole < 320
        assert 0.45 * whole < weights < 0.55 * whole
        kept = weights + report["moments_mib"]
        assert report["peak_mib"] - kept < MOST_OVERHEAD_MIB, report


# What a freed tensor of 400 MiB leaves of the process's growth, in MiB; faults of 20 pieces of
# 24 MiB, of which those of two earlier rounds were freed; and the growth by all of these. The
# pieces come from malloc, as tensors do, but with nothing between them that keeps the memory by
# chance.
FAULTS = """
import ctypes, resource, torch
from neftune_dist.distributed.world import World
from tests.distributed.test_memory import anonymous_mib

World()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 24 * 2**20
begin = anonymous_mib()
large = torch.ones(100 * 2**20)
assert anonymous_mib() - begin > 390
del large
left = anonymous_mib() - begin
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [libc.malloc(size) for _ in range(20)]
    for piece in pieces:
        libc.memset(piece, 1, size)
    for piece in pieces:
        libc.free(piece)
print(left, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, anonymous_mib() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_freed_memory_is_not_faulted_in_again_but_that_of_large_tensors_is_given_back() -> None:
    """In pages of 4 KiB the 480 MiB are 122,880 faults; in huge ones of 2 MiB, 240."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=tiny_model.environment(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=tiny_model.DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    left_mib, faults, growth_mib = map(float, done.stdout.split())
    assert left_mib < 10
    assert faults < 100
    assert growth_mib < 500
