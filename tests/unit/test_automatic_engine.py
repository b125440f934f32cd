"""`engine.name=auto`: what it takes a whole model to need, and what it chooses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from neftune_dist.config import UserError, load_config
from neftune_dist.distributed.world import World
from neftune_dist.engine.automatic import choose_engine
from neftune_dist.engine.base import MASTER
from neftune_dist.engine.replicated import ReplicatedEngine
from neftune_dist.model import load
from neftune_dist.optim.adamw import MakeOptimizer
from neftune_dist.planning.batches import fullest
from neftune_dist.planning.report import GIB, plan, read
from tests.support import tiny_model

LORA = ("adapter.method=lora", "adapter.rank=8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.make_tokenizer(folder)
    return tiny_model.make_model(folder, intermediate=128)


@pytest.fixture
def world() -> Iterator[World]:
    alone = World()
    yield alone
    alone.close()


def words_of(model: Path, *words: str) -> list[str]:
    return [f"model.name_or_path={model}", "model.dtype=fp32", *words]


def needed_bytes(model: Path, *words: str) -> float:
    """The device's memory at which the choice changes, times the share that state may take."""
    config = load_config("quickstart", words_of(model, *words))
    given, low, high = read(config, with_data=False), 0.0, 2.0**40
    while high - low > 1:
        middle = (low + high) / 2
        fits = choose_engine(config, given.model, middle, 2)[0].engine.name == "replicated"
        low, high = (low, middle) if fits else (middle, high)
    return 0.6 * high


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.dtype=bf16",),
        ("model.dtype=bf16", "optim.states=bf16"),
        ("optim.states=8bit",),
        ("model.dtype=bf16", *LORA),
        ("model.dtype=bf16", *LORA, "adapter.base=nf4"),
    ],
)
def test_state_of_a_whole_model_is_what_the_engine_keeps(
    words: tuple[str, ...], model: Path, world: World
) -> None:
    config = load_config("quickstart", words_of(model, *words, "engine.name=replicated"))
    built = load.build(model, config.model, config.data.packing, config.adapter)
    engine = ReplicatedEngine(config, world)
    engine.setup(built, MakeOptimizer(config.optim))
    engine.after_load(0)
    batch = fullest(config)[0]
    engine.backward(engine.forward(batch), last_micro_batch=True)
    kept = [*built.parameters(), *engine.masters, *(m.grad for m in engine.masters)]
    sizes = {t.data_ptr(): t.nbytes for t in kept if t is not None}
    moments = sum(s.tensor.nbytes for s in engine.flat_state() if s.kind != MASTER)
    # Blocks of 8-bit moments that small parameters do not fill are left out.
    assert needed_bytes(model, *words) == pytest.approx(sum(sizes.values()) + moments, rel=0.005)


@pytest.mark.parametrize(
    "word",
    [
        "engine.offload=cpu",
        "engine.num_replicas=2",
        "engine.reshard_after_forward=false",
        "engine.sync_every=step",
    ],
)
def test_settings_of_sharding_choose_it(word: str, model: Path) -> None:
    config = load_config("quickstart", words_of(model, word))
    chosen, lines = choose_engine(config, read(config, with_data=False).model, 2.0**40, 1)
    assert chosen.engine.name == "fsdp2"
    assert lines[0] == f"engine.name=auto: fsdp2, because {word.partition('=')[0]} is set"


@pytest.mark.parametrize("word", ["run_dir=r", "engine.offload=cpu", "engine.num_replicas=2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fsdp2_exchanges_once_a_step_where_all_it_keeps_then_fits(
    dtype: str, word: str, tmp_path: Path
) -> None:
    """What it takes that to need is what a simulated step keeps beside activations."""
    tiny_model.make_tokenizer(tmp_path)
    folder = tiny_model.make_model(tmp_path, intermediate=2048)
    words = words_of(folder, f"model.dtype={dtype}", "engine.name=fsdp2", word)
    words += ["train.micro_batch_tokens=32", "data.max_length=32"]
    given = read(load_config("quickstart", words), with_data=False)
    once = load_config("quickstart", [*words, "engine.sync_every=step"])
    parts = given.peak(once, 8).parts
    kept = sum(size for kind, size in parts.items() if kind not in ("activations", "logits"))

    def chosen(device_bytes: float, *more: str) -> tuple[str, list[str]]:
        config = load_config("quickstart", [*words, *more])
        decided, lines = choose_engine(config, given.model, device_bytes, 8)
        return decided.engine.sync_every, lines

    value, lines = chosen(kept / 0.5 * 1.05)
    assert value == "step" and "at most 50% of" in lines[0]
    value, lines = chosen(kept / 0.5 * 0.95)
    assert value == "micro_batch" and "more than 50% of" in lines[0]
    assert chosen(2.0**40, "engine.reshard_after_forward=true") == (
        "micro_batch",
        ["engine.sync_every=auto: micro_batch, because engine.reshard_after_forward is set"],
    )


def test_plan_says_which_and_why(model: Path) -> None:
    def told(*words: str, gpu: str | None = None, ranks: int = 2) -> str:
        lines: list[str] = []
        config = load_config("quickstart", words_of(model, *words))
        plan(config, ranks, with_data=False, gpu=gpu, log=lines.append)
        return "\n".join(line for line in lines if "engine" in line)

    assert re.fullmatch(
        r"engine\.name=auto: replicated, as weights, gradients and moments of the whole model take "
        r"[\d.]+ MiB, at most 60% of a rank's 80\.0 GiB",
        told(),
    )
    assert "of a rank's 139.0 GiB" in told(gpu="H200")
    assert "at most 83% of" in told(ranks=1)
    assert told("engine.offload=cpu").startswith(
        "engine.name=auto: fsdp2, because engine.offload is set"
    )
    assert told("engine.name=fsdp2").startswith("engine.sync_every=auto: step, as all weights")
    assert told("engine.name=deepspeed") == told("engine.name=replicated") == ""


def test_a_replica_that_does_not_fit_is_sharded(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train.micro_batch_tokens=128", "data.max_length=128", "optim.states=8bit")
    sizes = {}
    for name in ("fsdp2", "replicated"):
        checkpointing = "model.activation_checkpointing=full"
        shared = words_of(model, *words, checkpointing, f"engine.name={name}")
        config = load_config("quickstart", shared)
        sizes[name] = read(config, with_data=False).peak(config, 8).num_bytes
    assert sizes["fsdp2"] < sizes["replicated"]
    between = (sum(sizes.values()) / 2 * 1.05 + 2 * GIB) / GIB  # with the margins of plan
    monkeypatch.setattr("neftune_dist.planning.report.known_gpus", lambda: {"H200": between})
    with pytest.raises(UserError, match=r"append engine\.name=fsdp2\."):
        plan(config, 8, with_data=False, gpu="H200", log=lambda _: None)
