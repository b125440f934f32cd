"""Speed and memory of a training step on a CPU: this package against TRL's SFTTrainer.

All contenders train the same model on the same documents, tokenised once, with the same loss
(supervised tokens alone), global batch, optimizer and noise strength; padded steps hold the very
documents that this package's hold. Each runs in a process of its own, one after the other, round by
round, so that peak memory (VmHWM) is its own. The first steps of each are a warm-up, not counted.
A useful token is a document's real token. On a machine that does other work, too, look at tokens
per second of processor time, with --threads 1: threads that wait for each other use some up.

TRL runs twice in each layout: as it comes (8 rows a forward pass, or all of the step's where they
are fewer), and at its best: without recomputation of activations (gradient_checkpointing, which TRL
turns on and this package does not) and, padded, with the sampler that fills micro-batches by length
(batch_rebalance; its order is its own, so its documents are others), packed, one row a forward
pass. Packed rows are TRL's `bfd`. Both run compiled, too: `model.compile` against TRL's
`torch_compile` beside what it is at its best with.

usage: python tests/benchmarks/peers.py MODEL_DIR DATA [--rounds 3] [--alpha 5] [...]
       python tests/benchmarks/peers.py MODEL_DIR DATA --noise      what the noise costs of a step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from neftune_dist.config import Config, load_config
from neftune_dist.data.dataset import prepare
from neftune_dist.data.loader import BatchLayout, Loader, StepBatch
from neftune_dist.data.sampler import make_sampler
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import MASTER
from neftune_dist.model import load, locate
from neftune_dist.model.flops import ModelSize, model_size
from neftune_dist.noise.neftune import NEFTune
from neftune_dist.training.noise import token_layout
from runs import (
    common_arguments,
    environment_line,
    median_ratio,
    run,
    settings,
    show,
    spread,
    train,
)

OURS = {"neftune_dist": [], "neftune_dist, compiled": ["model.compile=true"]}
_AT_ITS_BEST = {"gradient_checkpointing": False}
_PADDED_BEST = {"train_sampling_strategy": "batch_rebalance", **_AT_ITS_BEST}
TRL: dict[str, dict[str, Any]] = {
    "TRL padded": {"train_sampling_strategy": "sequential"},
    "TRL padded, at its best": _PADDED_BEST,
    "TRL padded, compiled": {**_PADDED_BEST, "torch_compile": True},
    "TRL packed": {"packing": True},
    "TRL packed, at its best": {"packing": True, **_AT_ITS_BEST},
    "TRL packed, compiled": {"packing": True, **_AT_ITS_BEST, "torch_compile": True},
}
LIMIT_SECONDS = 900
_PAIRS = 12  # steps without noise and with it, in the noise part


def open_loader(config: Config) -> tuple[Any, ModelSize, Loader]:
    """The model on the meta device, its size, and the steps of the only rank."""
    folder = locate.find(config.model)
    model = load.build(folder, config.model, config.data.packing)
    dataset = prepare(config.data, load.load_tokenizer(folder, config.model), lambda _: None)
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    size = model_size(model)
    layout = BatchLayout(config, 0, 1, size.quadratic_tokens)
    return model, size, Loader(dataset.train, sampler, layout)


def ours(args: argparse.Namespace, contender: str, seed: int) -> dict[str, Any]:
    """One run of this package; seconds, tokens and padding of the counted steps."""
    words = [*settings(args, seed), *OURS[contender]]
    records, done = train(words, ranks=1, threads=args.threads, limit_seconds=LIMIT_SECONDS)
    counted = records[args.warm_up :]
    model, size, loader = open_loader(load_config(None, words))
    batches = [loader.step(record["step"] - 1) for record in counted]
    seconds = sum(record["step_seconds"] for record in counted)
    head = 6.0 * model.get_output_embeddings().weight.numel()

    def flops(batch: StepBatch) -> float:
        return size.training_flops(batch.num_tokens, batch.sum_squared_lengths)

    def flops_done(batch: StepBatch) -> float:  # the output projection of supervised tokens alone
        return flops(batch) - head * (batch.num_tokens - batch.num_supervised_tokens)

    return {
        "seconds": seconds,
        "processor_seconds": done.marks[-1] - done.marks[args.warm_up - 1],
        "tokens": sum(record["num_tokens"] for record in counted),
        "computed": sum(batch.num_computed_tokens for batch in batches),
        "documents": sum(record["num_documents"] for record in counted),
        "losses": [record["loss"] for record in records],
        "gib": records[-1]["memory_gib"],
        "flops": sum(map(flops, batches)) / seconds,
        "flops_done": sum(map(flops_done, batches)) / seconds,
        "others": done.others,
        "load": done.load,
    }


def theirs(args: argparse.Namespace, contender: str, seed: int) -> dict[str, Any]:
    """One run of TRL in a process of its own."""
    words = [*sys.argv, "--contender", contender, "--seed", seed]
    done = run(words, args.threads, LIMIT_SECONDS)
    measured: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return {**measured, "others": done.others, "load": done.load}


def train_with_trl(args: argparse.Namespace, contender: str, seed: int) -> dict[str, Any]:
    """The body of that process: train, and measure each step from inside."""
    import datasets
    import transformers
    import trl

    datasets.disable_progress_bars()
    packing = "packing" in TRL[contender]
    # A packed row takes documents from anywhere: enough of them, so that the last rows are full.
    num_steps = (8 if packing else 1) * (args.warm_up + args.steps)
    words = [*settings(args, seed), f"train.max_steps={num_steps}"]
    _, _, loader = open_loader(load_config(None, words))
    rows = []
    for step in range(num_steps):
        for i in loader.sampler.documents(step)[0]:
            ids, supervised = loader.documents[int(i)]
            labels = [
                int(t) if learned else -100 for t, learned in zip(ids, supervised, strict=True)
            ]
            rows.append({"input_ids": ids.tolist(), "labels": labels})
    tokens_per_document = sum(len(row["input_ids"]) for row in rows) / len(rows)
    rows_a_step = args.documents
    if packing:
        rows_a_step = max(1, round(args.documents * tokens_per_document / args.length))
    # One packed row is the fastest on a CPU: flattened rows attend across all of them.
    micro = (
        1
        if packing and not TRL[contender].get("gradient_checkpointing", True)
        else min(args.micro_batch, rows_a_step)
    )
    accumulation = rows_a_step // micro
    with tempfile.TemporaryDirectory() as folder:
        trainer_config = trl.SFTConfig(
            folder,
            max_length=args.length,
            max_steps=args.warm_up + args.steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            neftune_noise_alpha=args.alpha or None,
            use_cpu=True,
            bf16=args.dtype == "bf16",
            seed=seed,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **TRL[contender],
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        meter = _meter(transformers.TrainerCallback)
        trainer = trl.SFTTrainer(
            model,
            trainer_config,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
            callbacks=[meter],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        with model.register_forward_pre_hook(meter.see, with_kwargs=True):
            trainer.train()
        gib = _peak_gib()
        apart = keeps_apart(model, next(iter(trainer.get_train_dataloader())))
    counted = meter.steps[args.warm_up :]
    return {
        **{key: sum(step[key] for step in counted) for key in counted[0]},
        "losses": meter.losses,
        "gib": gib,
        "apart": apart,
    }


@torch.no_grad()
def keeps_apart(model: Any, batch: dict[str, Any]) -> bool | None:
    """Whether the last packed document computes the same whatever lies before it; None of padded
    rows."""
    if "position_ids" not in batch:
        return None
    model.eval()
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    last = int((batch["position_ids"][0] == 0).nonzero()[-1])
    before = model(**inputs, logits_to_keep=1).logits
    inputs["input_ids"] = batch["input_ids"].clone()
    inputs["input_ids"][:, :last] = 0
    after = model(**inputs, logits_to_keep=1).logits
    return bool(torch.allclose(before, after, rtol=1e-3, atol=1e-3))


def _meter(base: type) -> Any:
    """A callback that times TRL's steps and counts what goes into the model."""

    class Meter(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []
            self.losses: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.steps.append({"tokens": 0, "computed": 0, "documents": 0})
            self.began = time.perf_counter(), time.process_time()

        def see(self, _: Any, __: Any, inputs: dict[str, Any]) -> None:
            step, ids, mask = self.steps[-1], inputs["input_ids"], inputs.get("attention_mask")
            step["computed"] += ids.numel()
            step["tokens"] += ids.numel() if mask is None else int(mask.sum())
            starts = inputs.get("position_ids")
            step["documents"] += len(ids) if starts is None else int((starts == 0).sum())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps[-1]["seconds"] = time.perf_counter() - self.began[0]
            self.steps[-1]["processor_seconds"] = time.process_time() - self.began[1]

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    return Meter()


def _peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def matrix_rate(dtype: torch.dtype, size: int = 2048, repeats: int = 8) -> float:
    """The best rate of a matrix product, in FLOP/s."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def compare(args: argparse.Namespace) -> None:
    """All contenders, round by round, and the table."""
    contenders = [name for name in (*OURS, *TRL) if not args.only or name in args.only]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    rates = []
    for round_ in range(args.rounds):
        rates.append(matrix_rate(load.DTYPES[args.dtype]))
        for name in contenders:
            result = (ours if name in OURS else theirs)(args, name, round_)
            found[name].append(result)
            print(
                f"round {round_ + 1}, {name}: {result['tokens'] / result['seconds']:.1f} tokens/s, "
                f"{result['documents']:.0f} documents, {result['gib']:.2f} GiB, losses "
                f"{', '.join(f'{loss:.3f}' for loss in result['losses'])}; load before "
                f"{result['load']:.2f}, other processes {result['others']:.0%} of the cores"
                + {None: "", True: "; documents kept apart", False: "; documents see each other"}[
                    result.get("apart")
                ],
                flush=True,
            )
    speeds, frugal = (
        {name: [r["tokens"] / r[key] for r in found[name]] for name in contenders}
        for key in ("seconds", "processor_seconds")
    )
    rows = {}
    for name in contenders:
        computed, tokens = (sum(r[key] for r in found[name]) for key in ("computed", "tokens"))
        gibs = [r["gib"] for r in found[name]]
        ratios = ["", "", ""]
        own = next(own for own in OURS if own.endswith("compiled") == name.endswith("compiled"))
        if own in found and name not in OURS:
            ratios = [median_ratio(measured[own], measured[name]) for measured in (speeds, frugal)]
            ratios += [median_ratio([r["gib"] for r in found[own]], gibs)]
        rows[name] = (
            spread(speeds[name]),
            spread(frugal[name]),
            f"{1 - tokens / computed:.1%}",
            f"{statistics.median(gibs):.2f}",
            *ratios,
        )
    heads = ["tokens/s", "tokens/processor s", "padding", "peak GiB"]
    show(rows, [*heads, "ours / it, tokens/s", "per processor s", "peak GiB"])
    rate = max(rates)
    for name in [name for name in OURS if name in found]:
        for key, what in (
            ("flops_done", "computed: output projection of supervised tokens alone"),
            ("flops", "of the package's convention: output projection of every token"),
        ):
            done = statistics.median([r[key] for r in found[name]])
            print(
                f"{name}: {done / 1e9:.0f} GFLOP/s {what}: {done / rate:.0%} of the machine's "
                f"matrix product, {rate / 1e9:.0f} GFLOP/s"
            )


def noise_cost(args: argparse.Namespace) -> None:
    """Steps with and without noise in turn, on the same batch, in this process; and the operator's
    own time, which is too short a part of a step to show in the difference."""
    from neftune_dist.engine.fsdp2 import FSDP2Engine
    from neftune_dist.model.weights import WeightFiles, weights_folder
    from neftune_dist.optim.adamw import MakeOptimizer

    config = load_config(None, settings(args, 0))
    world = World()
    model, _, loader = open_loader(config)
    files = WeightFiles(
        weights_folder(config.model, args.model),
        load.parameter_aliases(model),
        {name: tuple(p.shape) for name, p in model.named_parameters()},
        model,
    )
    noise = NEFTune(args.alpha or 5.0).attach(model)
    seconds_of_noise = _time_embedding(model)
    engine = FSDP2Engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    with torch.no_grad():
        for shard in engine.flat_state():
            if shard.kind == MASTER:
                end = shard.start + shard.tensor.numel()
                shard.tensor.copy_(files.read(shard.name, shard.start, end))
    engine.after_load(0)
    batch = loader.step(0)

    def step(alpha: float, number: int) -> tuple[float, float]:
        seconds_of_noise.clear()
        noise.step, noise.alpha = number, alpha
        began = time.perf_counter()
        for i, micro_batch in enumerate(batch.micro_batches):
            noise.describe(token_layout(micro_batch))
            loss = engine.forward(micro_batch) / batch.num_supervised_tokens
            engine.backward(loss, i == len(batch.micro_batches) - 1)
        engine.step(0.0)
        return time.perf_counter() - began, sum(seconds_of_noise)

    step(noise.neftune.alpha, 0)
    ratios, shares = [], []
    for pair in range(_PAIRS):
        alphas = [0.0, noise.neftune.alpha]
        took = {a: step(a, pair + 1) for a in (alphas if pair % 2 else reversed(alphas))}
        ratios.append(took[alphas[1]][0] / took[0.0][0])
        shares.append(took[alphas[1]][1] / took[alphas[1]][0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"load average {os.getloadavg()[0]:.2f}; {_PAIRS} pairs of steps, the same batch in all")
    print(
        f"a step with noise over one without: median {middle:.4f}, quartiles {low:.4f} to "
        f"{high:.4f}"
    )
    print(f"embedding and noise: {statistics.median(shares):.3%} of a step with noise")
    world.close()


def _time_embedding(model: Any) -> list[float]:
    """Seconds of each call of the input embedding with its hooks, the noise among them."""
    took: list[float] = []
    embedding = model.get_input_embeddings()
    call = embedding._call_impl

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        took.append(time.perf_counter() - began)
        return result

    embedding._call_impl = timed
    return took


def main() -> None:
    parser = common_arguments((__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--micro-batch", type=int, default=8, help="TRL's padded rows a forward")
    parser.add_argument("--only", action="append", choices=[*OURS, *TRL], help="contenders")
    parser.add_argument("--noise", action="store_true", help="what the noise costs of a step")
    parser.add_argument("--contender", choices=list(TRL), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.contender:
        print(json.dumps(train_with_trl(args, args.contender, args.seed)))
        return
    packages = ["neftune-dist", "torch", "transformers", "trl"]
    print(
        f"{environment_line(packages)}, {args.threads} threads, {args.dtype}, alpha {args.alpha:g}"
    )
    print(f"command: {' '.join(sys.argv)}", flush=True)
    if args.noise:
        noise_cost(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
