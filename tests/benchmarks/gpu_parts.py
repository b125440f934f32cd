"""What `gpu.py` measures: training steps, a peer's, and their pieces, each part on an empty GPU.

Nothing here touches a GPU when it is imported: `gpu.py` imports it once and forks a process a part.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from neftune_dist.config import Config, UserError, load_config
from neftune_dist.data.loader import BatchLayout, Loader, MicroBatch, StepBatch
from neftune_dist.data.sampler import make_sampler
from neftune_dist.distributed.world import World
from neftune_dist.engine import make_engine
from neftune_dist.engine.base import MASTER
from neftune_dist.model import load
from neftune_dist.model.flops import model_size, peak_flops
from neftune_dist.noise.law import RankStream, scalar, scales
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.neftune import NEFTune
from neftune_dist.noise.op import add_noise, add_noise_
from neftune_dist.optim.adamw import MakeOptimizer
from neftune_dist.training.noise import token_layout

GIB = 2**30
# Tokens at these shares of the documents, the least and the most included. Alpaca's as Llama-2's
# tokenizer and the Alpaca prompt make them of 6,000 rows; ShareGPT's are assumed.
LENGTHS = {
    "alpaca": ([0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1], [44, 62, 84, 112, 157, 241, 362, 795]),
    "sharegpt": ([0, 0.25, 0.5, 0.75, 0.9, 1], [40, 300, 800, 1600, 2500, 4096]),
}
SUPERVISED = {"alpaca": 0.51, "sharegpt": 0.75, "whole": 1.0}
_NUM_BUFFERS = 6  # of the noise's activations, 64 MiB each: together larger than the GPU's cache


@dataclass(frozen=True)
class Size:
    """The model, by default Llama-2 7B's architecture; and how much is measured."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    max_position_embeddings: int = 8192
    unit: int = 1024  # tokens in one of a part's units
    steps: int = 3  # measured, after two of warm-up
    micro_batches: int = 4  # a step

    @property
    def model(self) -> dict[str, int]:
        """The arguments of a model's configuration."""
        measured = ("unit", "steps", "micro_batches")
        return {name: value for name, value in asdict(self).items() if name not in measured}


# By what the float32 masters, moments and gradients of a full fine-tune take.
SEVEN_B = Size()
THREE_B = Size(
    hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24
)
TINY = Size(512, 64, 112, 2, 4, 512, unit=16, steps=1, micro_batches=2)


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        what: step, peer, save, noise, attention or loss.
        units: of tokens in a micro-batch, 1024 each.
        documents: whole, alpaca or sharegpt.
        words: of the configuration, beside `BASE`.
    """

    name: str
    what: str
    units: int
    documents: str = "whole"
    words: tuple[str, ...] = ()
    limit_seconds: int = 120


BASE = (
    "model.dtype=bf16",
    "noise.alpha=5",
    "data.packing=true",
    "optim.schedule=constant",
    "engine.name=fsdp2",
)


class RandomDocuments:
    """Random tokens, of given lengths, the last share of each supervised; as `data.Documents`."""

    def __init__(self, lengths: np.ndarray, supervised: float, vocabulary: int) -> None:
        self.lengths = lengths
        self.num_supervised = np.clip((lengths * supervised).astype(np.int64), 1, lengths - 1)
        self._vocabulary = vocabulary

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, each (num_tokens,), one document after another."""
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
    transformers.LlamaConfig(tie_word_embeddings=False, **size.model).save_pretrained(folder)
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
    sampler = make_sampler(config.train, len(lengths), "random")
    loader = Loader(documents, sampler, BatchLayout(config, 0, 1, quadratic_tokens=1e5))
    return config, documents, loader


def built(part: Part, size: Size, world: World) -> tuple[Config, Any, NEFTune, Any, Loader]:
    """The part's model under its engine, with random weights; configuration, engine, noise's
    handle, size and batches."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, loader = prepare_step(part, size, Path(folder))
        model = load.build(Path(folder), config.model, config.data.packing)
    sizes = model_size(model)
    noise: Any = NEFTune(config.noise.alpha).attach(model)
    engine = make_engine(config, world)
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
    engine.after_load(0)
    return config, engine, noise, sizes, loader


def measure_step(part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    """Seconds of a step: forward and backward of its micro-batches, clipping, update."""
    world = World()
    try:
        return _measure_step(world, part, size, profile)
    finally:
        world.close()


def _measure_step(world: World, part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    began = time.perf_counter()
    config, engine, noise, sizes, loader = built(part, size, world)
    on_gpu = world.device.type == "cuda"

    def batch_of(step: int) -> tuple[StepBatch, list[MicroBatch]]:
        batch = loader.step(step)
        return batch, [m.pinned() if on_gpu else m for m in batch.micro_batches]

    def run(batch: StepBatch, micro_batches: list[MicroBatch]) -> tuple[float, float]:
        began = time.perf_counter()
        noise.step, loss = batch.step, torch.zeros((), device=world.device)
        for i, micro_batch in enumerate(micro_batches):
            there = micro_batch.to(world.device)
            noise.describe(token_layout(there))
            share = engine.forward(there) / batch.num_supervised_tokens
            engine.backward(share, i == len(micro_batches) - 1)
            loss += share.detach()
        engine.step(1e-5)  # reads the norm, and so waits for the device
        return time.perf_counter() - began, float(loss)

    built_seconds = time.perf_counter() - began
    # Two warm-ups: the first compiles and finds its kernels, the second finds its memory.
    warm = [run(*batch_of(number)) for number in range(2)]
    batches = [batch_of(2 + number) for number in range(size.steps)]
    timed = [run(*batch)[0] for batch in batches]
    tokens, seconds = sum(batch.num_tokens for batch, _ in batches), sum(timed)
    squares = sum(batch.sum_squared_lengths for batch, _ in batches)
    result: dict[str, Any] = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / size.steps,
        "micro_batches": len(batches[0][1]),
        "parameters": sizes.num_parameters,
        "built_seconds": built_seconds,
        "step_seconds": timed,
        "warm_up_seconds": [seconds for seconds, _ in warm],
        "loss": warm[0][1],  # about ln(vocabulary): nothing is to be learned of random tokens
        "engine": engine.describe(),
    }
    if on_gpu:
        result["gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        peak = peak_flops(torch.cuda.get_device_name(), config.model.dtype)
        if peak:
            result["mfu"] = sizes.training_flops(tokens, squares) / seconds / peak
            result["mfu_6n"] = sizes.six_n_flops(tokens) / seconds / peak
    if profile:
        with torch.profiler.profile() as seen:
            run(*batches[-1])
        kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        profile.write_text(
            seen.key_averages().table(sort_by=kind, row_limit=60, max_name_column_width=110)
        )
    return result


def planned_gib(part: Part, size: Size) -> float:
    """The peak that `neftune-dist plan` estimates for the part's own micro-batches."""
    from neftune_dist.planning.simulate import simulate

    with tempfile.TemporaryDirectory() as folder:
        config, _, loader = prepare_step(part, size, Path(folder))
        batches = loader.step(0).micro_batches
        heaviest = sorted(batches, key=lambda b: b.input_ids.numel(), reverse=True)[:2]
        return simulate(config, Path(folder), 1, heaviest).num_bytes / GIB


def measure_peer(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """transformers' own `Trainer` with its NEFTune hook on the same documents, padded: float32
    weights under bf16 autocast, fused AdamW, activations recomputed, else its own defaults."""
    rows_a_forward = 16
    with tempfile.TemporaryDirectory() as folder:
        config, documents, loader = prepare_step(part, size, Path(folder))
        with device():
            model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(tie_word_embeddings=False, **size.model)
            )
        # As many whole forwards as the documents of a step make.
        accumulate = max(1, config.train.global_batch_size // rows_a_forward)
        steps, warm = size.steps, 1
        indices = np.concatenate([loader.sampler.documents(s)[0] for s in range(steps + warm)])
        rows = []
        for index in indices[: rows_a_forward * accumulate * (steps + warm)]:
            ids, supervised = documents.gather(np.array([index]))
            rows.append((torch.from_numpy(ids).long(), torch.from_numpy(supervised).bool()))

        def collate(chosen: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([ids for ids, _ in chosen], batch_first=True)
            mask = pad([torch.ones_like(ids) for ids, _ in chosen], batch_first=True)
            learned = [torch.where(supervised, ids, -100) for ids, supervised in chosen]
            labels = pad(learned, batch_first=True, padding_value=-100)
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}

        ends: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                ends.append(time.perf_counter())

        class InOrder(transformers.Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return torch.utils.data.SequentialSampler(rows)

        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps + warm,
            per_device_train_batch_size=rows_a_forward,
            gradient_accumulation_steps=accumulate,
            bf16=True,
            optim="adamw_torch_fused",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            neftune_noise_alpha=5.0,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        InOrder(
            model, arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
        ).train()
    per_step = rows_a_forward * accumulate
    counted = rows[per_step * warm : per_step * (warm + steps)]
    tokens = sum(len(ids) for ids, _ in counted)
    forwards = [counted[i : i + rows_a_forward] for i in range(0, len(counted), rows_a_forward)]
    padded = sum(len(f) * max(len(ids) for ids, _ in f) for f in forwards)
    seconds = ends[-1] - ends[warm - 1]
    result = {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / steps,
        "padding_fraction": 1 - tokens / padded,
        "micro_batches": accumulate,
        "step_seconds": np.diff(ends).tolist(),
        "warm_up_seconds": [],
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if torch.cuda.is_available():
        result["gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return result


def measure_save(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """How long it takes to pin the memory for a copy of the state, beside training, and how long
    training then stands still for each copy."""
    from neftune_dist.checkpoint.host_copy import HostCopy

    world = World()
    try:
        _, engine, *_ = built(part, size, world)
        shards, seconds = engine.flat_state(), []
        began = time.perf_counter()
        copy = HostCopy(shards, world.device)
        # A system may limit locked memory.
        is_pinned = bool(copy._pinning) and all(piece.result() for piece in copy._pinning)
        pinning = time.perf_counter() - began
        for _ in range(3):
            began = time.perf_counter()
            copy.copy(shards)
            seconds.append(time.perf_counter() - began)
        return {
            "copied_gib": sum(shard.tensor.nbytes for shard in shards) / GIB,
            "is_pinned": is_pinned,
            "pinning_seconds": pinning,
            "standstill_seconds": seconds,
        }
    finally:
        world.close()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(median milliseconds of a call, GiB it takes beyond what is there before; 0 on a CPU)."""
    on_gpu = device().type == "cuda"
    for _ in range(3 if on_gpu else 1):
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


def variants(works: Iterable[tuple[str, Callable[[], object]]], calls: int = 1) -> dict[str, Any]:
    """Milliseconds of one of the `calls` that a work makes, and GiB; of one that is not available
    here, why."""
    found: dict[str, Any] = {}
    for name, work in works:
        try:
            milliseconds, gib = timed(work)
            found[name] = {"milliseconds": milliseconds / calls, "gib": gib}
        except (UserError, ImportError, NotImplementedError, torch.OutOfMemoryError) as error:
            found[name] = {"error": first_line(error)}
    return found


def measure_noise(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """The noise as kernel, as operator and whole, against transformers' hook and a plain copy: on
    bf16 activations of random numbers, several in turn, together larger than the GPU's cache."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    tokens, where = part.units * size.unit, device()
    shape = (1, tokens, size.hidden_size)
    xs = [torch.randn(shape, dtype=torch.bfloat16, device=where) for _ in range(_NUM_BUFFERS)]
    others, hooked = [torch.empty_like(x) for x in xs], torch.nn.Module().train()
    hooked.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    lengths = torch.full((16,), tokens // 16)
    layout = TokenLayout.from_lengths(lengths).to(where)
    step, micro_step = (scalar(value, torch.int64, where) for value in (3, 1))
    stream = RankStream(7, 0, step, micro_step)
    scale, words = scales(layout, size.hidden_size, 5.0), stream.words(layout)

    def over(work: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return lambda: [work(x, y) for x, y in zip(xs, others, strict=True)]

    works = [
        (f"operator, {kind}", over(lambda x, _, k=kind: add_noise_(x, scale, *words, 7, k)))
        for kind in ("uniform", "symmetric", "gaussian")
    ]
    if where.type == "cuda":
        from neftune_dist.noise.kernel import launch

        kernel = over(lambda x, _: launch(x, scale, words, 7, "uniform"))
        works.insert(0, ("kernel, uniform", kernel))
    works += [
        ("whole: scales, counters, operator, norms", over(_whole_noise(layout, stream))),
        ("transformers' hook", over(lambda x, _: neftune_post_forward_hook(hooked, (), x))),
        ("copy", over(lambda x, y: y.copy_(x))),
    ]
    found = variants(works, calls=_NUM_BUFFERS)
    copy = found["copy"]["milliseconds"]
    for timing in found.values():
        timing["share_of_copy_bandwidth"] = copy / timing["milliseconds"]
    return found


def _whole_noise(layout: TokenLayout, stream: RankStream) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, _: add_noise(x, layout, stream, 5.0)


def measure_attention(part: Part, size: Size, _: Path | None) -> dict[str, Any]:
    """Forward and backward of one layer's attention over packed documents, bf16."""
    from neftune_dist.model import attention, flash

    tokens = part.units * size.unit
    lengths = document_lengths(part.documents, tokens, size.unit, 4096)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens, side="right"))]
    total = int(lengths.sum())
    shape = (1, total, size.num_attention_heads, size.hidden_size // size.num_attention_heads)
    # As a model makes them: tokens outside, heads inside.
    qkv = [
        torch.randn(shape, dtype=torch.bfloat16, device=device(), requires_grad=True)
        for _ in range(3)
    ]
    cu = torch.tensor(np.append(0, np.cumsum(lengths)), dtype=torch.int32, device=device())
    layer = torch.nn.Module()

    def heads() -> list[Tensor]:
        return [tensor.transpose(1, 2) for tensor in qkv]

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    def arguments(implementation: str) -> dict[str, Any]:
        config = SimpleNamespace(_attn_implementation=implementation)
        model = SimpleNamespace(config=config)
        return attention.packed_arguments(model, cu, int(lengths.max()))

    def operator() -> None:
        given = arguments(attention.VARLEN)
        backward(attention.varlen_attention(layer, *heads(), None, **given)[0])

    def by_document() -> None:
        pieces = zip(*(tensor.split(lengths.tolist(), dim=2) for tensor in heads()), strict=True)
        outs = [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
        backward(torch.cat(outs, dim=2))

    def flexible() -> None:
        given = arguments(attention.FLEX)
        backward(attention.flex_attention(layer, *heads(), None, **given)[0])

    kernel = flash.varlen_kernel(device(), "bf16", windowed=False)
    works: list[tuple[str, Callable[[], object]]] = [
        (kernel, operator),
        ("sdpa, document by document", by_document),
    ]
    if device().type == "cuda":  # on a CPU it has no backward
        works.append(("flex, its mask included", flexible))
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
    "peer": measure_peer,
    "save": measure_save,
    "noise": measure_noise,
    "attention": measure_attention,
    "loss": measure_loss,
}


def first_line(error: BaseException) -> str:
    """What an error says, briefly."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def body(part: Part, size: Size, profile: Path | None) -> dict[str, Any]:
    """The part's result, or what became of it."""
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
