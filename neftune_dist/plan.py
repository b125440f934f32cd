"""What a run will need, before any GPU is touched: model state per rank, disk, steps.

The figures are arithmetic on the real shapes: what the engines keep per parameter. Activations,
logits and collective buffers are not in them.
"""

from __future__ import annotations

from collections.abc import Callable

from neftune_dist.config import Config
from neftune_dist.data.corpus import prepare
from neftune_dist.data.schedule import make_schedule
from neftune_dist.model import load
from neftune_dist.model.flops import model_size

_FP32 = 4


def plan(config: Config, world_size: int, log: Callable[[str], None] = print) -> None:
    """Validate and resolve `config` and log its needs on `world_size` ranks."""
    folder = load.find(config.model)
    model = load.build(folder, config.model, config.data.packing)
    size = model_size(model)
    for line in config.to_yaml().splitlines():
        log(f"  {line}")
    log(f"model: {size.num_parameters / 1e6:.1f} M parameters, {size.num_layers} layers")
    state = state_bytes_per_rank(config, size.num_parameters, world_size)
    total = sum(state.values())
    parts = ", ".join(f"{name} {amount / 2**30:.2f}" for name, amount in state.items())
    log(f"memory: {total / 2**30:.2f} GiB of model state on each of {world_size} ranks: {parts}")
    log("memory: activations, logits and collective buffers come on top and are not counted here")
    log(f"disk: {size.num_parameters * 3 * _FP32 / 2**30:.2f} GiB a checkpoint")
    tokenizer = load.load_tokenizer(folder, config.model)
    corpus = prepare(config.data, tokenizer, log)
    schedule = make_schedule(config.train, len(corpus.train), corpus.fingerprint)
    for line in corpus.report.lines():
        log(line)
    tokens = corpus.report.num_tokens * schedule.total_documents / schedule.num_documents
    flops = size.training_flops(
        round(tokens),
        round(float((corpus.train.lengths**2).sum()) * schedule.total_documents)
        // schedule.num_documents,
    )
    log(f"steps: {schedule.num_steps} of {schedule.global_batch_size} documents")
    log(f"work: about {tokens:.3g} tokens, {flops:.3g} FLOPs")


def state_bytes_per_rank(config: Config, num_parameters: int, world_size: int) -> dict[str, float]:
    """Bytes a rank keeps between micro-batches: compute weights, float32 masters and moments, and
    float32 gradients, each whole or sharded as the engine does."""
    compute = 2 if config.model.dtype == "bf16" else _FP32
    n = float(num_parameters)
    if config.engine.name == "fsdp2":
        shards = world_size // (config.engine.num_replicas or 1)
        return {
            "weights": n * _FP32 / shards,
            "gradients": n * _FP32 / shards,
            "optimizer": n * 2 * _FP32 / shards,
        }
    stage = config.engine.zero_stage or 3
    return {
        "weights": n * compute / (world_size if stage == 3 else 1) + n * _FP32 / world_size,
        "gradients": n * _FP32 / (world_size if stage >= 2 else 1),
        "optimizer": n * 2 * _FP32 / world_size,
    }
