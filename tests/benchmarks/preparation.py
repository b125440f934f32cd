"""Rows a second that become documents, by 1 to all processes.

    python -m tests.benchmarks.preparation

Rows of an instruction and an answer of 60 words, byte tokens; with the CPU seconds of the process
that reads and writes, and of those that it starts.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from pathlib import Path

_NUM_ROWS = 60_000
_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def main() -> None:
    # The processes that are started import this module, but not what their work does not need.
    from transformers import AutoTokenizer

    from neftune_dist.config import DataConfig
    from neftune_dist.data.dataset import prepare
    from tests.support import golden_model

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = AutoTokenizer.from_pretrained(golden_model.make(root / "model"))
        with (root / "rows.jsonl").open("w") as file:
            for i in range(_NUM_ROWS):
                row = {"instruction": f"Count to {i}.", "output": f"{i} and more " * 20}
                file.write(json.dumps(row) + "\n")
        print(
            f"{'processes':>9} {'rows':>8} {'seconds':>8} {'rows/s':>8} {'CPU, here':>9} "
            f"{'others':>11}"
        )
        number = 1
        while number <= max(2, len(os.sched_getaffinity(0))):
            config = DataConfig(
                source=str(root / "rows.jsonl"),
                template="alpaca",
                cache_dir=str(root / str(number)),
                num_workers=number,
            )
            began, used = time.perf_counter(), [_cpu_seconds(who) for who in _WHO]
            prepare(config, tokenizer)
            seconds = time.perf_counter() - began
            usage = [_cpu_seconds(who) - at for who, at in zip(_WHO, used, strict=True)]
            print(
                f"{number:9} {_NUM_ROWS:8,} {seconds:8.1f} {_NUM_ROWS / seconds:8,.0f} "
                f"{usage[0]:9.1f} {usage[1]:11.1f}",
                flush=True,
            )
            number *= 2


def _cpu_seconds(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
