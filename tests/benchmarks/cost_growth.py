"""How cost grows: with ranks, documents, and a document's length. See preparation.py, too.

    python -m tests.benchmarks.cost_growth [ranks|documents|lengths ...]

ranks: CPU milliseconds of one thread. `layout` assigns 4 documents a rank (lengths log-normal, mean
280, at most 1,024 tokens; micro-batches of 4,096), `reference` is the first implementation of it;
both run in the loader's thread while the step before is trained. `results` reads what a step's one
collective has gathered, in the main thread: a `RankResult` of each rank, and the comparison of
stragglers. Nothing is sent: ranks are simulated.

documents: a set without content on disk (sparse files), opened by one rank of 8; the most memory of
Python and numpy while it opens the set and makes a step of 128 documents, and the CPU milliseconds
of a step.

lengths: seconds of one document's forward and backward, all of it supervised, by a Llama of 2
layers (64 channels, 4 heads), and of its attention alone, which grows by the square.
"""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from neftune_dist.config import Config, TrainConfig
from neftune_dist.data.documents import Documents
from neftune_dist.data.loader import BatchLayout, Loader, collate
from neftune_dist.data.packing import assign_documents
from neftune_dist.data.sampler import make_sampler
from neftune_dist.distributed.straggler import Streaks, relative_speeds
from neftune_dist.distributed.world import World
from neftune_dist.model.attention import VARLEN
from neftune_dist.model.loss import token_losses
from neftune_dist.model.varlen import VARLEN_OPERATOR
from neftune_dist.training.metrics import RankResult
from tests.support import reference_packing
from tests.support.corpora import documents_of

QUADRATIC_TOKENS = 2e4


def milliseconds(work: Callable[[], Any], times: int = 3) -> float:
    """The least CPU time of this thread, of some calls."""
    found = []
    for _ in range(times):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return 1000 * min(found)


def ranks() -> None:
    print(f"{'ranks':>6} {'documents':>10} {'layout':>11} {'reference':>14} {'results, ms':>12}")
    for world_size in (1, 8, 64, 512, 4096):
        draws = np.random.default_rng(0).normal(5.3, 0.8, 4 * world_size)
        lengths = np.clip(np.exp(draws).astype(np.int64), 2, 1024)
        given = (lengths, world_size, 4096, True, QUADRATIC_TOKENS)
        layout = milliseconds(lambda: assign_documents(*given))  # noqa: B023
        reference = milliseconds(lambda: reference_packing.assign_documents(*given), 1)  # noqa: B023
        mine = RankResult(*(0.5,) * 3, False, False, *(0.5,) * 4)
        world: Any = World.__new__(World)
        world.gather = lambda row: [row] * world_size  # noqa: B023
        streaks = Streaks(world_size)

        def results() -> None:
            found = World.gather_fields(world, mine)  # noqa: B023
            speeds = relative_speeds([rank.probe_seconds for rank in found])
            streaks.lasting([speed < 0.5 for speed in speeds])  # noqa: B023

        print(
            f"{world_size:6,} {len(lengths):10,} {layout:11.1f} {reference:14.1f} "
            f"{milliseconds(results):12.1f}",
            flush=True,
        )


def documents() -> None:
    print(f"{'documents':>12} {'peak, MiB':>9} {'ms a step':>10}")
    for number in (10**5, 10**6, 10**7, 10**8):
        with tempfile.TemporaryDirectory() as folder:
            _sparse_set(Path(folder), number)
            tracemalloc.start()
            config = Config(train=TrainConfig(max_steps=10**5))
            sampler = make_sampler(config.train, number, "x")
            loader = Loader(
                Documents(Path(folder), "train"), sampler, BatchLayout(config, 0, 8, 2e4)
            )
            loader.step(99_000)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            took = milliseconds(lambda: loader.step(99_000), 10)  # noqa: B023
            print(f"{number:12,} {peak:9.1f} {took:10.2f}", flush=True)


def _sparse_set(folder: Path, number: int, length: int = 64) -> None:
    """Documents of `length` tokens in files of holes; offsets and lengths are written."""
    index = np.lib.format.open_memmap(folder / "train.npy", "w+", np.int64, (5, number))
    for first in range(0, number, 2**20):
        part = slice(first, first + 2**20)
        index[0, part] = np.arange(first, min(first + 2**20, number)) * length
        index[1, part] = length
        index[2, part] = length // 2
    index.flush()
    for name, size in (("input_ids.bin", 4), ("supervised.bin", 1)):
        with (folder / name).open("wb") as file:
            file.truncate(number * length * size)


def lengths() -> None:
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2**16,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=VARLEN)
    print(f"{'tokens':>7} {'seconds':>8} {'tokens/s':>9} {'attention, s':>13}")
    for length in (2**n for n in range(10, 17)):
        ids = np.random.default_rng(0).integers(0, 1000, length)
        documents = documents_of([(ids, np.ones(length, bool))])
        batch = collate(documents, np.zeros(1, np.int64), np.zeros(1), True)
        whole = seconds(lambda: token_losses(model, batch, "chunked").backward())  # noqa: B023
        heads = [torch.randn(length, n, 16, requires_grad=True) for n in (4, 2, 2)]
        ends = torch.tensor([0, length], dtype=torch.int32)
        attention = seconds(
            lambda: VARLEN_OPERATOR(*heads, ends, length, 0.25, 0)[0].sum().backward()  # noqa: B023
        )
        print(f"{length:7,} {whole:8.2f} {length / whole:9,.0f} {2 * attention:13.2f}", flush=True)


def seconds(work: Callable[[], Any]) -> float:
    """The least time of three calls; of the first alone where that takes a second or more."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 1:
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


PARTS = {"ranks": ranks, "documents": documents, "lengths": lengths}

if __name__ == "__main__":
    for word in sys.argv[1:] or PARTS:
        PARTS[word]()
        print()
