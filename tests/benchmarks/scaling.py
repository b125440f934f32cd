"""Two ranks against one, and the engines against FSDP2, on a CPU: one thread a rank.

All contenders train on the same documents with the same global batch, through the real command
under torchrun, one after the other, round by round. The first steps are a warm-up and not counted.

usage: python tests/benchmarks/scaling.py MODEL_DIR DATA [--rounds 3] [--engines fsdp2 ...] [...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from runs import common_arguments, environment_line, median_ratio, settings, show, spread, train

LIMIT_SECONDS = 900


ENGINES = {
    "fsdp2": ["engine.name=fsdp2"],
    "fsdp2-micro-batch": ["engine.name=fsdp2", "engine.sync_every=micro_batch"],
    "replicated": ["engine.name=replicated"],
    **{f"zero{n}": ["engine.name=deepspeed", f"engine.zero_stage={n}"] for n in (1, 2, 3)},
}


def measure(args: argparse.Namespace, engine: str, ranks: int, seed: int) -> dict[str, Any]:
    """One run: tokens a second, peak memory of the rank that has most, the last loss."""
    words = [*settings(args, seed), *ENGINES[engine]]
    records, done = train(words, ranks=ranks, threads=1, limit_seconds=LIMIT_SECONDS)
    counted = records[args.warm_up :]
    return {
        "speed": sum(r["num_tokens"] for r in counted) / sum(r["step_seconds"] for r in counted),
        "gib": records[-1]["memory_gib"],
        "loss": records[-1]["loss"],
        "others": done.others,
        "load": done.load,
    }


def main() -> None:
    parser = common_arguments((__doc__ or "").split("\n\n")[0])
    usual = ["fsdp2", "replicated", "zero3"]
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=usual)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(f"{environment_line(['neftune-dist', 'torch', 'deepspeed'])}, 1 thread a rank")
    print(f"command: {' '.join(sys.argv)}", flush=True)
    contenders = [(engine, ranks) for ranks in args.ranks for engine in args.engines]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {contender: [] for contender in contenders}
    for round_ in range(args.rounds):
        for engine, ranks in contenders:
            result = measure(args, engine, ranks, round_)
            found[engine, ranks].append(result)
            print(
                f"round {round_ + 1}, {engine}, {ranks} ranks: {result['speed']:.1f} tokens/s, "
                f"{result['gib']:.2f} GiB, last loss {result['loss']:.6f}; load before "
                f"{result['load']:.2f}, other processes {result['others']:.0%} of the cores",
                flush=True,
            )
    speeds = {contender: [r["speed"] for r in found[contender]] for contender in contenders}
    rows, first = {}, args.engines[0]
    for engine, ranks in contenders:
        own = speeds[engine, ranks]
        alone = speeds.get((engine, args.ranks[0]), own)
        rows[f"{engine}, {ranks} ranks"] = (
            spread(own),
            f"{statistics.median([r['gib'] for r in found[engine, ranks]]):.2f}",
            median_ratio(own, alone) if ranks != args.ranks[0] else "",
            median_ratio(own, speeds[first, ranks]) if engine != first else "",
        )
    show(
        rows,
        ["tokens/s (least, most)", "peak GiB", f"over {args.ranks[0]} ranks", f"over {first}"],
    )


if __name__ == "__main__":
    main()
