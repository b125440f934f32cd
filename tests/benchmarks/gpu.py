"""A 7B model on one GPU: speed and peak memory of a training step, part by part.

The model is Llama-2 7B's architecture with random weights, made where they lie; nothing is read or
written but a configuration. Documents are random tokens: of Alpaca's or ShareGPT-like lengths,
packed as in training, or one whole document a row, all of it supervised, as published figures have
it. Each part is a process of its own with a time limit, and its result one line of OUT/gpu.jsonl:
what is there already is not measured again, so the same command goes on where the last one ended.
A part that runs out of memory or fails is recorded as such. Beside a step's measured peak memory
stands what `neftune-dist plan` reckons for the same micro-batches.

usage: python tests/benchmarks/gpu.py [--out DIR] [--only WORD ...] [--seconds 560]
       python tests/benchmarks/gpu.py --tiny     every part on a tiny model, on a CPU as well
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from neftune_dist.config import Config, UserError, load_config
from neftune_dist.data.loader import Loader, StepBatch
from neftune_dist.data.schedule import make_schedule
from neftune_dist.distributed import World
from neftune_dist.engine.base import MASTER
from neftune_dist.engine.fsdp2 import FSDP2Engine
from neftune_dist.loop import token_layout
from neftune_dist.model import load
from neftune_dist.model.flops import model_size, peak_flops
from neftune_dist.noise.hook import NEFTune
from neftune_dist.noise.law import RankStream, TokenLayout
from neftune_dist.noise.op import add_noise
from neftune_dist.optim import MakeOptimizer

ROOT = Path(__file__).parents[2]
GIB = 2**30
# Tokens at these shares of the documents, the least and the most included. Alpaca's as Llama-2's
# tokenizer and the Alpaca prompt make them of 6,000 rows; ShareGPT's are assumed.
LENGTHS = {
    "alpaca": ([0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1], [44, 62, 84, 112, 157, 241, 362, 795]),
    "sharegpt": ([0, 0.25, 0.5, 0.75, 0.9, 1], [40, 300, 800, 1600, 2500, 4096]),
}
SUPERVISED = {"alpaca": 0.51, "sharegpt": 0.75, "whole": 1.0}
# Published for one H200, 7B, bf16, full recomputation, rows of 4096 (KempnerForge); tokens/s.
PUBLISHED = 10_471
TARGET, TARGET_FLOAT8 = 10_500, 1.25


@dataclass(frozen=True)
class Size:
    """Of the model; and how much is measured."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 8192
    unit: int = 1024  # of the tokens in a part's name
    steps: int = 3  # measured, after as many warm-ups as need be
    micro_batches: int = 4  # a step


TINY = Size(512, 64, 112, 2, 4, 512, unit=16, steps=1, micro_batches=2)


@dataclass(frozen=True)
class Part:
    """One measurement.

    what: step, noise, attention or loss. units: of tokens in a micro-batch, 1024 each.
    documents: whole, alpaca or sharegpt. words: of the configuration, beside `BASE`.
    """

    name: str
    what: str
    units: int
    documents: str = "whole"
    words: tuple[str, ...] = ()
    limit_seconds: int = 120


BASE = ("model.dtype=bf16", "noise.alpha=5", "data.packing=true", "optim.schedule=constant")
FULL, SELECTIVE = (
    ("model.activation_checkpointing=full",),
    ("model.activation_checkpointing=selective",),
)
COMPILE = ("model.compile=true",)


def step(name: str, units: int, *words: str, documents: str = "whole") -> Part:
    """A training step; compiling takes its time."""
    return Part(name, "step", units, documents, words, 180 if COMPILE[0] in words else 100)


# What matters most comes first.
PARTS = (
    step("4096 full", 4, *FULL),
    step("4096 selective compile", 4, *SELECTIVE, *COMPILE),
    step("4096 selective compile float8", 4, *SELECTIVE, *COMPILE, "model.float8=tensorwise"),
    Part("noise", "noise", 8),
    step("4096 none compile", 4, *COMPILE),
    step("4096 selective", 4, *SELECTIVE),
    step("alpaca 4096 selective compile", 4, *SELECTIVE, *COMPILE, documents="alpaca"),
    Part("loss", "loss", 4),
    Part("attention alpaca", "attention", 8, "alpaca"),
    Part("attention whole", "attention", 8),
    step("8192 selective compile", 8, *SELECTIVE, *COMPILE),
    step("8192 full compile", 8, *FULL, *COMPILE),
    step("2048 selective compile", 2, *SELECTIVE, *COMPILE),
    step("4096 full compile", 4, *FULL, *COMPILE),
    step("4096 selective liger", 4, *SELECTIVE, "model.kernels=liger"),
    step("4096 selective compile float8 rowwise", 4, *SELECTIVE, *COMPILE, "model.float8=rowwise"),
    step("4096 none", 4),
    step("sharegpt 4096 selective compile", 4, *SELECTIVE, *COMPILE, documents="sharegpt"),
    step("alpaca 4096 selective flex", 4, *SELECTIVE, "model.attention=flex", documents="alpaca"),
    step("4096 full liger loss", 4, *FULL, "model.loss=liger"),
    step("4096 full plain loss", 4, *FULL, "model.loss=plain"),
    step("8192 full", 8, *FULL),
    step("2048 none", 2),
    step("4096 no reshard", 4, *SELECTIVE, *COMPILE, "engine.reshard_after_forward=false"),
)


class RandomDocuments:
    """Random tokens, of given lengths, the last share of each supervised; as `data.Documents`."""

    def __init__(self, lengths: np.ndarray, supervised: float, vocabulary: int) -> None:
        self.lengths = lengths
        self.num_supervised = np.clip((lengths * supervised).astype(np.int64), 1, lengths - 1)
        self._vocabulary = vocabulary

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, each (num_tokens,), one document behind another."""
        lengths = self.lengths[indices]
        ids = np.random.default_rng(int(indices[0])).integers(
            0, self._vocabulary, lengths.sum(), np.int32
        )
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
        return ids, (left <= np.repeat(self.num_supervised[indices], lengths)).astype(np.uint8)


def document_lengths(kind: str, tokens: int, unit: int, number: int) -> np.ndarray:
    """int64 (number,): of documents that fill micro-batches of `tokens`."""
    if kind == "whole":
        return np.full(number, tokens)
    shares, lengths = LENGTHS[kind]
    drawn = np.interp(np.random.default_rng(0).random(number), shares, lengths) * unit / 1024
    return np.clip(drawn.astype(np.int64), 4, tokens)


def prepare_step(part: Part, size: Size, folder: Path) -> tuple[Config, RandomDocuments, Loader]:
    """The part's configuration, its model's directory filled, and its batches."""
    tokens = part.units * size.unit
    model = {k: v for k, v in asdict(size).items() if k not in ("unit", "steps", "micro_batches")}
    transformers.LlamaConfig(tie_word_embeddings=False, **model).save_pretrained(folder)
    lengths = document_lengths(part.documents, tokens, size.unit, 4096)
    documents: Any = RandomDocuments(lengths, SUPERVISED[part.documents], size.vocab_size)
    # Packing leaves a few tokens of a micro-batch unused.
    fill = 1.0 if part.documents == "whole" else 0.97
    batch = max(1, int(size.micro_batches * tokens * fill / lengths.mean()))
    config = load_config(
        None,
        [
            f"model.name_or_path={folder}",
            f"data.max_length={int(lengths.max())}",
            f"train.micro_batch_tokens={tokens}",
            f"train.global_batch_size={batch}",
            f"train.max_steps={size.steps + 3}",
            *BASE,
            *part.words,
        ],
    )
    schedule = make_schedule(config.train, len(lengths), "random")
    loader = Loader(documents, schedule, config, 0, 1, quadratic_tokens=1e5)
    return config, documents, loader


def measure_step(part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    """Seconds of a step: forward and backward of its micro-batches, clipping, update."""
    world = World()
    try:
        return measure_step_of(world, part, size, profile)
    finally:
        world.close()


def measure_step_of(world: World, part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    """The same, within this world."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, loader = prepare_step(part, size, Path(folder))
        model = load.build(Path(folder), config.model, config.data.packing)
    sizes = model_size(model)
    noise = NEFTune(config.noise.alpha).attach(model)
    engine = FSDP2Engine(config, world)
    engine.setup(model, MakeOptimizer(config.optim))
    with torch.no_grad():
        for shard in engine.flat_state():
            if shard.kind == MASTER:
                assert isinstance(shard.tensor, Tensor)
                # Norms at 1, as a trained model's nearly are, and as torch makes them.
                if len(engine.shapes[shard.name]) == 1:
                    shard.tensor.fill_(1.0)
                else:
                    shard.tensor.normal_(std=0.02)
    engine.loaded(0)

    def run(batch: StepBatch) -> tuple[float, float]:
        began = time.perf_counter()
        noise.step, loss = batch.step, 0.0
        for i, micro_batch in enumerate(batch.micro_batches):
            there = micro_batch.to(world.device)
            noise.describe(token_layout(there))
            share = engine.forward(there) / batch.num_supervised_tokens
            engine.backward(share, i == len(batch.micro_batches) - 1)
            loss += share.detach()
        engine.step(1e-5)  # reads the norm, and so waits for the device
        return time.perf_counter() - began, float(loss)

    # Two warm-ups: the first compiles and finds its kernels, the second finds its memory.
    warm = [run(loader.step(number)) for number in range(2)]
    batches = [loader.step(2 + number) for number in range(size.steps)]
    timed = [run(batch)[0] for batch in batches]
    tokens, seconds = sum(batch.num_tokens for batch in batches), sum(timed)
    squares = sum(batch.sum_squared_lengths for batch in batches)
    result: dict[str, Any] = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / size.steps,
        "micro_batches": len(batches[0].micro_batches),
        "step_seconds": timed,
        "warm_up_seconds": [each for each, _ in warm],
        "loss": warm[0][1],  # about ln(vocabulary): nothing is to be learned of random tokens
        "engine": engine.describe(),
    }
    if world.device.type == "cuda":
        result["gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        peak = peak_flops(torch.cuda.get_device_name(), config.model.dtype)
        if peak:
            result["mfu"] = sizes.training_flops(tokens, squares) / seconds / peak
            result["mfu_6n"] = sizes.six_n_flops(tokens) / seconds / peak
    if profile:
        with torch.profiler.profile() as seen:
            run(batches[-1])
        sort = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        profile.write_text(seen.key_averages().table(sort_by=sort, row_limit=40))
    return result


def planned_gib(part: Part, size: Size) -> float:
    """The peak that `neftune-dist plan` reckons for the part's own micro-batches."""
    from neftune_dist.plan.rehearsal import rehearse

    with tempfile.TemporaryDirectory() as folder:
        config, _, loader = prepare_step(part, size, Path(folder))
        batches = loader.step(0).micro_batches
        heaviest = sorted(batches, key=lambda b: b.input_ids.numel(), reverse=True)[:2]
        return rehearse(config, Path(folder), 1, heaviest).num_bytes / GIB


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(median milliseconds of a call, GiB it takes beyond what is there before; 0 on a CPU)."""
    on_gpu = device().type == "cuda"
    for _ in range(2):
        work()
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    took = []
    for _ in range(10 if on_gpu else 1):
        if on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            took.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            work()
            took.append(1e3 * (time.perf_counter() - began))
    extra = (torch.cuda.max_memory_allocated() - before) / GIB if on_gpu else 0.0
    return statistics.median(took), extra


def variants(works: Iterable[tuple[str, Callable[[], object]]]) -> dict[str, Any]:
    """Milliseconds and GiB of each; of one that cannot be had here, why."""
    found: dict[str, Any] = {}
    for name, work in works:
        try:
            milliseconds, gib = timed(work)
            found[name] = {"milliseconds": milliseconds, "gib": gib}
        except (UserError, ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            found[name] = {"error": first_line(error)}
    return found


def measure_noise(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """The operator against transformers' hook and a plain copy, on one bf16 activation."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    tokens = part.units * size.unit
    x = torch.zeros(1, tokens, size.hidden_size, dtype=torch.bfloat16, device=device())
    y, hooked = torch.empty_like(x), torch.nn.Module().train()
    hooked.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    layouts = {
        name: TokenLayout.from_lengths(torch.tensor(lengths)).to(device())
        for name, lengths in (("one document", [tokens]), ("16 documents", [tokens // 16] * 16))
    }
    ours: list[tuple[str, Callable[[], object]]] = [
        (
            f"neftune_dist, {name}",
            lambda layout=layout: add_noise(x, layout, RankStream(0, 0, 0, 0), 5.0),
        )
        for name, layout in layouts.items()
    ]
    found = variants(
        [
            *ours,
            ("transformers' hook", lambda: neftune_post_forward_hook(hooked, (), x)),
            ("copy", lambda: y.copy_(x)),
        ]
    )
    copy = found["copy"]["milliseconds"]
    for each in found.values():
        each["share_of_copy_bandwidth"] = copy / each["milliseconds"]
    return found


def measure_attention(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """Forward and backward of one layer's attention over packed documents, bf16."""
    from neftune_dist.model import attention, varlen

    tokens = part.units * size.unit
    lengths = document_lengths(part.documents, tokens, size.unit, 4096)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))]
    total = int(lengths.sum())
    shape = (1, size.num_attention_heads, total, size.hidden_size // size.num_attention_heads)
    qkv = [
        torch.randn(shape, dtype=torch.bfloat16, device=device(), requires_grad=True)
        for _ in range(3)
    ]
    cu = torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32, device=device())
    layer = torch.nn.Module()

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    def arguments(implementation: str) -> dict[str, Any]:
        config = SimpleNamespace(_attn_implementation=implementation)
        model = SimpleNamespace(config=config)
        return attention.packed_arguments(model, cu, int(lengths.max()))

    def operator() -> None:
        given = arguments(attention.VARLEN)
        backward(attention.varlen_attention(layer, *qkv, None, **given)[0])

    def by_document() -> None:
        pieces = zip(*(each.split(lengths.tolist(), dim=2) for each in qkv), strict=True)
        outs = [F.scaled_dot_product_attention(*each, is_causal=True) for each in pieces]
        backward(torch.cat(outs, dim=2))

    def flexible() -> None:
        given = arguments(attention.FLEX)
        backward(attention.flex_attention(layer, *qkv, None, **given)[0])

    kernel = varlen.varlen_kernel(device(), "bf16")
    works: list[tuple[str, Callable[[], object]]] = [
        (kernel, operator),
        ("sdpa, document by document", by_document),
    ]
    if device().type == "cuda":  # on a CPU it has no backward
        works.append(("flex, its mask made anew", flexible))
    return variants(works)


def measure_loss(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """Forward and backward of the output projection and the cross-entropy, all tokens learned."""
    from neftune_dist.model import loss

    tokens = part.units * size.unit
    make = {"dtype": torch.bfloat16, "device": device(), "requires_grad": True}
    hidden = torch.randn(tokens, size.hidden_size, **make)  # type: ignore[arg-type]
    weight = torch.randn(size.vocab_size, size.hidden_size, **make)  # type: ignore[arg-type]
    targets = torch.randint(0, size.vocab_size, (tokens,), device=device())

    def plain(h: Tensor, w: Tensor, _bias: None, t: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), t, reduction="sum")

    def liger(h: Tensor, w: Tensor, _bias: None, t: Tensor) -> Tensor:
        if not torch.cuda.is_available():
            raise UserError("Liger's kernels need a GPU.")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        found: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t)
        return found

    def whole(loss_sum: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = (hidden, weight)
        return lambda: torch.autograd.grad(loss_sum(hidden, weight, None, targets), leaves)

    return variants(
        [
            ("plain", whole(plain)),
            ("chunked", whole(loss.chunked_cross_entropy)),
            ("liger", whole(liger)),
        ]
    )


MEASURE = {
    "step": measure_step,
    "noise": measure_noise,
    "attention": measure_attention,
    "loss": measure_loss,
}


def first_line(error: BaseException) -> str:
    """What an error says, briefly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def body(part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    """One part, in a process of its own: what it found, or what became of it."""
    try:
        return {"status": "done", **MEASURE[part.what](part, size, profile)}
    except torch.OutOfMemoryError as error:
        return {"status": "out of memory", "error": first_line(error)}
    except (UserError, NotImplementedError) as error:  # it is not for this device
        return {"status": "refused", "error": first_line(error)}
    except Exception as error:  # the other parts are to be measured all the same
        return {
            "status": "failed",
            "error": f"{type(error).__name__}: {first_line(error)}",
            "traceback": traceback.format_exc()[-3000:],
        }


@contextmanager
def started(part: Part, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """The part's process, killed when the block is left."""
    words = [sys.executable, __file__, "--part", part.name, "--out", str(args.out)]
    words += ["--tiny"] if args.tiny else []
    words += ["--profile"] if args.profile else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def measure(part: Part, size: Size, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """Run the part in a process of its own, and the plan of it meanwhile."""
    began = time.monotonic()
    with started(part, args) as process:
        planned = None
        if part.what == "step":
            with suppress(UserError):
                planned = planned_gib(part, size)
        left = limit - (time.monotonic() - began)
        try:
            out, err = process.communicate(timeout=max(1.0, left))
            result = json.loads(out.splitlines()[-1])
        except subprocess.TimeoutExpired:
            result = {"status": "timed out", "error": f"after {limit:.0f} s"}
        except (IndexError, ValueError):
            result = {"status": "failed", "error": err.strip()[-2000:]}
    result = {"part": part.name, **asdict(part), **result, "seconds": time.monotonic() - began}
    return {**result, "planned_gib": planned} if planned else result


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
    for result in (each for each in found if each["what"] == "step"):
        if result["status"] != "done":
            lines.append(f"{result['part']:40}  {result['status']}: {result['error'][:90]}")
            continue
        shares = "".join(f"{result[k]:7.1%}" if k in result else f"{'-':>7}" for k in _MFU)
        memory = "".join(f"{result[k]:8.1f}" if k in result else f"{'-':>8}" for k in _GIB)
        lines.append(
            f"{result['part']:40}{result['tokens_per_second']:10.0f}{shares}{memory}"
            f"{sum(result['warm_up_seconds']):11.1f}"
        )
    for result in (each for each in found if each["what"] != "step"):
        if result["status"] != "done":
            lines.append(f"{result['part']}: {result['status']}: {result['error'][:90]}")
        for name, each in result.items():
            if isinstance(each, dict) and "milliseconds" in each:
                share = each.get("share_of_copy_bandwidth")
                lines.append(
                    f"{result['part'] + ', ' + name:60}{each['milliseconds']:10.3f} ms"
                    f"{each['gib']:8.2f} GiB more"
                    + (f", {share:.2f} of the bandwidth of a copy" if share else "")
                )
            elif isinstance(each, dict):
                lines.append(f"{result['part'] + ', ' + name:60}  {each['error'][:90]}")
    return lines + _against_targets(results)


_MFU, _GIB = ("mfu", "mfu_6n"), ("gib", "planned_gib")


def _against_targets(results: dict[str, dict[str, Any]]) -> list[str]:
    speeds = {
        name: each["tokens_per_second"]
        for name, each in results.items()
        if each["status"] == "done" and "tokens_per_second" in each
    }
    whole = {n: s for n, s in speeds.items() if n.startswith("4096") and "float8" not in n}
    lines = []
    if whole:
        best = max(whole, key=lambda name: whole[name])
        lines.append(
            f"best at 4096 in bf16: {best}, {whole[best]:.0f} tokens/s; target {TARGET}, published "
            f"{PUBLISHED}"
        )
    for name, speed in speeds.items():
        base = name.split(" float8")[0]
        if base != name and base in speeds:
            lines.append(
                f"{name}: {speed / speeds[base]:.2f} of {base}; target {TARGET_FLOAT8} at least"
            )
    return lines


def versions() -> str:
    """Date, device, packages."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    found = []
    for package in ("torch", "transformers", "triton", "torchao", "liger-kernel"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return f"{time.strftime('%Y-%m-%d')}, {name}, {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = Path(os.environ.get("OUT", ROOT / "runs/benchmarks"))
    parser.add_argument("--out", type=Path, default=default, help="folder of gpu.jsonl")
    parser.add_argument("--only", nargs="+", help="parts whose name has one of these words")
    parser.add_argument(
        "--seconds", type=float, default=560, help="no part begins that may end later"
    )
    parser.add_argument("--again", action="store_true", help="parts without a figure once more")
    parser.add_argument("--profile", action="store_true", help="OUT/PART.txt: time by kernel")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try all this")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    size = TINY if args.tiny else Size()
    if args.part:
        part = next(each for each in PARTS if each.name == args.part)
        profile = args.out / f"{part.name.replace(' ', '_')}.txt" if args.profile else None
        print(json.dumps(body(part, size, profile)))
        return
    path, began = args.out / "gpu.jsonl", time.monotonic()
    results = read_results(path)
    for part in PARTS:
        known = results.get(part.name, {}).get("status")
        if known == "done" or (known and not args.again):
            continue
        if args.only and not any(word in part.name for word in args.only):
            continue
        left = args.seconds - (time.monotonic() - began)
        if left < part.limit_seconds / 3:
            print(f"{part.name}: not begun, {left:.0f} s are left", flush=True)
            continue
        results[part.name] = measure(part, size, args, min(left, part.limit_seconds))
        with path.open("a") as file:
            # On a line of its own, also after one that was cut short.
            file.write("\n" + json.dumps({**results[part.name], "made_with": versions()}))
        print(f"{part.name}: {results[part.name]['status']}", flush=True)
    print(versions(), f"command: {' '.join(sys.argv)}", *table(results), sep="\n")


if __name__ == "__main__":
    main()
