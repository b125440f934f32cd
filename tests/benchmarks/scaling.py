"""Two ranks against one, and ZeRO-3 against FSDP2, on a CPU: one thread a rank.

All contenders train on the same documents with the same global batch, through the real command
under torchrun, one after the other, round by round. The first steps are a warm-up and not counted.

usage: python tests/benchmarks/scaling.py MODEL_DIR DATA [--rounds 3] [--stages 3] [...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from runs import common_arguments, environment_line, median_ratio, settings, show, spread, train

LIMIT_SECONDS = 900


def engine_words(engine: str) -> list[str]:
    """`fsdp2`, or `zero3` and its like, as settings."""
    if engine == "fsdp2":
        return ["engine.name=fsdp2"]
    return ["engine.name=deepspeed", f"engine.zero_stage={engine.removeprefix('zero')}"]


def measure(args: argparse.Namespace, engine: str, ranks: int, seed: int) -> dict[str, Any]:
    """One run: tokens a second, peak memory of the rank that has most, the last loss."""
    words = [*settings(args, seed), *engine_words(engine)]
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
    parser.add_argument("--stages", type=int, nargs="+", default=[3], help="of ZeRO: 1, 2, 3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    print(f"{environment_line(['neftune-dist', 'torch', 'deepspeed'])}, 1 thread a rank, float32")
    print(f"command: {' '.join(sys.argv)}", flush=True)
    engines = ["fsdp2", *(f"zero{stage}" for stage in args.stages)]
    contenders = [(engine, ranks) for ranks in args.ranks for engine in engines]
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
    rows = {}
    for engine, ranks in contenders:
        own = speeds[engine, ranks]
        alone = speeds.get((engine, args.ranks[0]), own)
        rows[f"{engine}, {ranks} ranks"] = (
            spread(own),
            f"{statistics.median([r['gib'] for r in found[engine, ranks]]):.2f}",
            median_ratio(own, alone) if ranks != args.ranks[0] else "",
            median_ratio(own, speeds["fsdp2", ranks]) if engine != "fsdp2" else "",
        )
    show(
        rows,
        ["tokens/s (least, most)", "peak GiB", f"over {args.ranks[0]} ranks", "over fsdp2"],
    )


if __name__ == "__main__":
    main()
