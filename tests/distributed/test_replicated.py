"""The engine without shards trains what sharding engines train, and continues what they began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from neftune_dist.config import load_config
from neftune_dist.engine import fsdp2, gradient_sums
from tests.support import tiny_model

REPLICATED = "engine.name=replicated"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(
        tmp_path_factory.mktemp("replicated"),
        train={"max_steps": 6},
        checkpoint={"every_steps": 3, "keep": 0},
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("float32", []),
        ("bfloat16, many micro-batches", ["model.dtype=bf16", "train.micro_batch_tokens=96"]),
        ("full checkpointing", ["model.dtype=bf16", "model.activation_checkpointing=full"]),
        ("bf16 moments", ["optim.states=bf16"]),
        ("8-bit moments", ["optim.states=8bit", "model.dtype=bf16"]),
    ],
)
def test_replicated_trains_the_same_as_fsdp2(
    name: str, words: list[str], config: Path, tmp_path: Path
) -> None:
    """To the bit: the same sums in the same order and the same roundings."""
    ours = tiny_model.train(config, tmp_path / "replicated", REPLICATED, *words)
    theirs = tiny_model.train(config, tmp_path / "fsdp2", "engine.name=fsdp2", *words)
    assert tiny_model.untimed(ours) == tiny_model.untimed(theirs)
    one, other = (
        tiny_model.checkpoint_tensors(tmp_path / run / "checkpoints" / "step_00000006")
        for run in ("replicated", "fsdp2")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_float8_follows_fsdp2(recipe: str, config: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    words = ["model.dtype=bf16", f"model.float8={recipe}"]
    losses = [
        [
            r["loss"]
            for r in tiny_model.train(config, tmp_path / name, f"engine.name={name}", *words)
        ]
        for name in ("replicated", "fsdp2")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_replicated_resumes_bitwise_and_from_two_ranks(config: Path, tmp_path: Path) -> None:
    whole = tiny_model.train(config, tmp_path / "whole", REPLICATED)
    half = tmp_path / "whole" / "checkpoints" / "step_00000003"
    resumed = tiny_model.train(
        config, tmp_path / "resumed", REPLICATED, f"checkpoint.resume={half}"
    )
    assert tiny_model.untimed(resumed) == tiny_model.untimed(whole[3:])
    two_ranks = tiny_model.train(config, tmp_path / "two", "engine.name=deepspeed", ranks=2)
    half = tmp_path / "two" / "checkpoints" / "step_00000003"
    continued = tiny_model.train(
        config, tmp_path / "continued", REPLICATED, f"checkpoint.resume={half}"
    )
    for one, other in zip(continued, two_ranks[3:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_auto_is_replicated_where_the_model_is_small(config: Path, tmp_path: Path) -> None:
    """The choice is said and kept in the run's own configuration, whose verbs need it."""
    run_dir = tmp_path / "auto"
    words = [config, f"run_dir={run_dir}", "engine.name=auto", "train.max_steps=1"]
    said = tiny_model.run_forked("train", *words, ranks=2).stdout
    assert "engine.name=auto: replicated, as weights, gradients and moments" in said
    assert "engine: replicated, the whole model on each of 2 ranks" in said
    assert load_config(run_dir / "config.yaml").engine.name == "replicated"


def test_ranks_sum_gradients_as_fsdp2_does(config: Path, tmp_path: Path) -> None:
    """On two ranks, in many micro-batches; the first rank saves alone, and a resume goes on to the
    bit, under FSDP2 to rounding: the norm of a gradient is summed in another order."""
    words = ["train.micro_batch_tokens=96"]
    runs = {
        name: tiny_model.train(config, tmp_path / name, f"engine.name={name}", *words, ranks=2)
        for name in ("replicated", "fsdp2")
    }
    for one, other in zip(runs["replicated"], runs["fsdp2"], strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-6), (one["step"], key)
    half = tmp_path / "replicated" / "checkpoints" / "step_00000003"
    resume = f"checkpoint.resume={half}"
    resumed = tiny_model.train(config, tmp_path / "r", REPLICATED, *words, resume, ranks=2)
    assert tiny_model.untimed(resumed) == tiny_model.untimed(runs["replicated"][3:])
    continued = tiny_model.train(config, tmp_path / "f", *words, resume, ranks=3)
    for one, other in zip(continued, resumed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def _sums_of(rank: int, folder: str) -> None:
    """Parameters whose gradients one rank lacks, or all, or that come in another order."""
    gradient_sums._BUCKET_BYTES = 100
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    masters = [nn.Parameter(torch.zeros(n)) for n in (40, 3, 5, 30)]
    sums = gradient_sums.GradientSums(masters)
    for step in range(2):
        for is_last in (False, True):
            sums.is_last = is_last
            for index in (0, 3, 2) if rank else (3, 0):
                computed = torch.zeros_like(masters[index])
                computed.grad = torch.full_like(masters[index], 1 + rank + 10 * index + step)
                sums.add(index, computed)
                assert computed.grad is None
        sums.finish()
        expected = {0: 6 + 4 * step, 2: 2 * (22 + step), 3: 2 * (63 + 2 * step)}
        for index, master in enumerate(masters):
            if index not in expected:
                assert master.grad is None
            else:
                assert master.grad is not None and bool((master.grad == expected[index]).all())
    dist.destroy_process_group()
    Path(folder, f"done{rank}").touch()


def test_a_bucket_is_sent_without_waiting_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host's pageable memory would."""
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(torch, "tensor", None)
    masters = [nn.Parameter(torch.zeros(n)) for n in (2, 3)]
    sums = gradient_sums.GradientSums(masters)
    sums.is_last = True
    for index in (1, 0):
        computed = torch.zeros_like(masters[index])
        computed.grad = torch.ones_like(masters[index])
        sums.add(index, computed)
    assert [bucket.num_ranks.tolist() for bucket in sums._buckets] == [[1, 1]]


def test_parameters_without_a_gradient_hang_nothing(tmp_path: Path) -> None:
    process = tiny_model.forkserver().Process
    ranks = [process(target=_sums_of, args=(rank, str(tmp_path))) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("engine.offload=cpu", "engine.offload=cpu has no effect with"),
        ("engine.zero_stage=3", "engine.zero_stage=3 has no effect with"),
    ],
)
def test_replicated_refuses_offload_and_zero(
    word: str, sentence: str, config: Path, tmp_path: Path
) -> None:
    done = tiny_model.run_forked("train", config, f"run_dir={tmp_path / 'run'}", REPLICATED, word)
    assert done.returncode == 2
    assert sentence in done.stderr


def _sum_by_group() -> None:
    """Sums of single numbers that depend on the group, as those of NCCL may in their last bit; and
    after each step a comparison of the ranks' weights, and of the exchanges between replicas."""
    reduce, step = dist.all_reduce, fsdp2.FSDP2Engine.step
    between: list[int] = []

    def all_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        work = reduce(tensor, *args, group=group, **kwargs)
        if tensor.dim() == 0 and group is not None:
            tensor *= 1 + 1e-6 * dist.get_rank()
        elif group is not None:
            between.append(tensor.numel())
        return work

    def compared(engine: fsdp2.FSDP2Engine, learning_rate: float) -> float:
        norm = step(engine, learning_rate)
        of_ranks: list[Any] = [None] * engine.world.size
        mine = [shard.tensor.numpy().tobytes() for shard in engine.flat_state()]
        dist.all_gather_object(of_ranks, (norm, mine))
        assert all(of_rank == of_ranks[0] for of_rank in of_ranks)
        assert len(between) == 3  # two blocks and the rest
        between.clear()
        return norm

    fsdp2.dist.all_reduce, fsdp2.FSDP2Engine.step = all_reduce, compared  # type: ignore


def test_replicas_of_fsdp2_stay_one_model(config: Path, tmp_path: Path) -> None:
    """Whatever rounding a group's sums have: the factor of clipping is the same on all ranks. And
    they exchange gradients once a step."""
    words = ["engine.num_replicas=2", "optim.max_grad_norm=0.01", f"run_dir={tmp_path / 'run'}"]
    words += ["engine.sync_every=micro_batch", "train.micro_batch_tokens=96"]
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=_sum_by_group)
    assert done.returncode == 0, done.stdout + done.stderr
