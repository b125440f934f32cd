"""Mixtures of experts train as in the plain loop, and are saved and exported as the base was."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.llama import modeling_llama

from neftune_dist.checkpoint import store
from neftune_dist.checkpoint.export import export
from neftune_dist.config import load_config
from tests.support import reference_loop, tiny_model
from tests.support.reference_loop import TOLERANCE

STEPS = 4
# More experts than a short document's tokens choose: in most micro-batches some have no token.
MANY = {"num_experts_per_tok": 1, "num_experts": 24, "norm_topk_prob": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "mixtral": {},
    "olmoe": MANY,
    "qwen3_moe": {},
}
LAYOUTS = {
    "replicated, padded": (1, ["engine.name=replicated", "data.packing=false"]),
    "fsdp2 x1": (1, []),
    "fsdp2 x2, padded, many micro-batches": (
        2,
        ["data.packing=false", "train.micro_batch_tokens=96"],
    ),
    # Stage 3 has a product with a bias of its own, which the recomputation must not add twice.
    "zero-3 x2, selective": (
        2,
        ["engine.name=deepspeed", "model.activation_checkpointing=selective"],
    ),
}


@dataclass(frozen=True)
class Expected:
    """A configuration, and what the plain loop makes of it."""

    config: Path
    records: list[dict[str, Any]]
    parameters: dict[str, torch.Tensor]
    logits: torch.Tensor


def make_config(kind: str, folder: Path) -> Path:
    return tiny_model.make_config(
        folder,
        make=partial(tiny_model.make_family, model_type=kind, **FAMILIES[kind]),
        train={"max_steps": STEPS, "global_batch_size": 3},
        # Without it Adam makes a step of full size of the rounding error of a gradient near 0.
        optim={"epsilon": 1e-4},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture(scope="module", params=FAMILIES)
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    kind = request.param
    config = make_config(kind, tmp_path_factory.mktemp(kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.parent / "model", dtype=torch.float32
    )
    records = reference_loop.train(model, load_config(config))
    return Expected(config, records, dict(model.named_parameters()), logits_of(model))


def logits_of(model: Any) -> torch.Tensor:
    """Of 48 tokens, many more than a window or than experts."""
    ids = torch.randint(5, 600, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def assert_exported_as_the_base(run_dir: Path, base: Path, output: Path) -> Any:
    """The tensors of the base's files by name and shape, and transformers reads them as trained.

    Returns:
        The model that it reads.
    """
    export(run_dir, output, log=lambda _: None)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, base))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    trained = tiny_model.checkpoint_tensors(store.find_all(run_dir)[0].folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.flatten(), trained[f"master/{name}"]), name
    return model


def assert_trained_as_expected(run_dir: Path, expected: Expected, *words: str, ranks: int) -> None:
    """Every parameter: those of experts without tokens decay, and move no more than that."""
    records = tiny_model.train(expected.config, run_dir, *words, ranks=ranks)
    assert len(records) == STEPS
    for one, other in zip(records, expected.records, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=TOLERANCE), (one["step"], key)
    tensors = tiny_model.checkpoint_tensors(store.find_all(run_dir)[0].folder)
    for key, parameter in expected.parameters.items():
        found = tensors[f"master/{key}"].view_as(parameter)
        torch.testing.assert_close(found, parameter.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_train_the_same(name: str, expected: Expected, tmp_path: Path) -> None:
    ranks, words = LAYOUTS[name]
    run_dir = tmp_path / "run"
    assert_trained_as_expected(run_dir, expected, *words, ranks=ranks)
    if ranks == 2:
        base = expected.config.parent / "model"
        exported = assert_exported_as_the_base(run_dir, base, tmp_path / "export")
        largest = float(expected.logits.abs().max())
        torch.testing.assert_close(
            logits_of(exported), expected.logits, atol=1e-5 * largest, rtol=0
        )


@pytest.mark.parametrize("expected", ["gpt_oss"], indirect=True)
def test_attention_sinks_are_dealt_to_ranks_as_heads_are(
    expected: Expected, tmp_path: Path
) -> None:
    words = ["engine.sequence_parallel=2"]
    assert_trained_as_expected(tmp_path / "run", expected, *words, ranks=2)


@pytest.mark.parametrize("kind", ["gpt_oss", "olmoe"])
def test_experts_resume_bitwise_and_under_another_engine(kind: str, tmp_path: Path) -> None:
    config = make_config(kind, tmp_path)
    words = ["checkpoint.every_steps=1"]
    whole = tmp_path / "whole"
    tiny_model.train(config, whole, *words, ranks=2)
    # The engine that continues, the run whose checkpoint it takes, and the step of that.
    for name, engine, begun, step in (
        ("fsdp2", "fsdp2", "whole", 2),
        ("zero-3", "deepspeed", "whole", 2),
        ("zero-3 then fsdp2", "fsdp2", "zero-3", 3),
    ):
        half = tmp_path / name
        shutil.copytree(tmp_path / begun, half)
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(half / "checkpoints" / f"step_{later:08d}")
        tiny_model.train(config, half, f"engine.name={engine}", *words, ranks=2)
        one, other = (tiny_model.untimed(tiny_model.steps(run)) for run in (half, whole))
        tensors = [
            tiny_model.checkpoint_tensors(store.find_all(run)[0].folder) for run in (half, whole)
        ]
        if name == "fsdp2":
            assert one == other
            assert all(torch.equal(t, tensors[1][key]) for key, t in tensors[0].items())
        assert len(one) == STEPS
        for mine, theirs in zip(one, other, strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        for key, tensor in tensors[0].items():
            torch.testing.assert_close(tensor, tensors[1][key], atol=1e-6, rtol=1e-4)
        assert_exported_as_the_base(half, tmp_path / "model", tmp_path / f"{name} export")


def test_adapters_leave_experts_as_they_are(tmp_path: Path) -> None:
    config, runs = make_config("olmoe", tmp_path), []
    words = ["adapter.method=lora", "adapter.targets=all_but_experts", "optim.epsilon=1e-8"]
    for engine in ("fsdp2", "deepspeed"):
        run_dir = tmp_path / engine
        runs.append(tiny_model.train(config, run_dir, f"engine.name={engine}", *words, ranks=2))
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
    output = export(tmp_path / "fsdp2", log=lambda _: None)
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (output, tmp_path / "model")
    )
    assert ours.keys() == theirs.keys()
    moved = {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    assert moved == {name for name in ours if "self_attn" in name and "norm" not in name}
    assert "on all_but_experts matrices" in (output / "README.md").read_text()
    for wrong, reason in (
        (["adapter.method=lora"], "set adapter.targets=all_but_experts"),
        ([*words, "adapter.base=nf4"], "are not quantised"),
    ):
        done = tiny_model.run_forked("train", config, f"run_dir={tmp_path / 'other'}", *wrong)
        assert done.returncode == 2
        assert reason in done.stderr


def _other_matrix_on_each_rank() -> None:
    """Patch Llama: of two matrices of one shape, each rank uses another."""
    name = "gate_proj" if os.environ["RANK"] == "0" else "up_proj"
    modeling_llama.LlamaMLP.forward = lambda self, x: self.down_proj(getattr(self, name)(x))


def test_gradients_of_some_ranks_alone_are_summed_by_name_or_refused(tmp_path: Path) -> None:
    """By their order, those of one matrix were added to those of the other."""
    config = tiny_model.make_config(tmp_path, data={"num_held_out": 0}, train={"max_steps": 2})
    runs = {}
    for engine in ("fsdp2", "deepspeed-2", "deepspeed-3", "replicated"):
        name, _, stage = engine.partition("-")
        words = [f"engine.name={name}", *([f"engine.zero_stage={stage}"] if stage else [])]
        run_dir = tmp_path / engine
        done = tiny_model.run_forked(
            "train",
            config,
            f"run_dir={run_dir}",
            *words,
            ranks=2,
            before=_other_matrix_on_each_rank,
        )
        if engine in ("fsdp2", "deepspeed-2"):
            assert done.returncode == 2, done.stderr
            assert "mlp.gate_proj.weight gets a gradient on 1 of 2 ranks" in done.stderr
            assert "Traceback" not in done.stderr and not store.find_all(run_dir)
        else:
            assert done.returncode == 0, done.stderr
            runs[name] = tiny_model.steps(run_dir)
    for one, other in zip(*runs.values(), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=TOLERANCE)


def _matrix_on_one_rank() -> None:
    """Patch Llama: one rank does without a matrix, so that the messages of ranks differ in size."""
    if os.environ["RANK"] == "1":
        modeling_llama.LlamaMLP.forward = lambda self, x: self.down_proj(self.up_proj(x))


def _other_matrix_in_turn() -> None:
    """Patch Llama: from the second micro-batch on, ranks use the two matrices in turn, so that by a
    step's end each has both."""
    calls, rank = itertools.count(), int(os.environ["RANK"])
    forward = modeling_llama.LlamaMLP.forward

    def in_turn(self: Any, x: torch.Tensor) -> torch.Tensor:
        number = next(calls) // 2  # of two layers
        if number == 0:
            return forward(self, x)
        return self.down_proj((self.gate_proj if (number + rank) % 2 else self.up_proj)(x))

    modeling_llama.LlamaMLP.forward = in_turn


@pytest.mark.parametrize("engine", ["engine.name=fsdp2", "engine.name=deepspeed"])
@pytest.mark.parametrize(
    ("before", "where"),
    [
        (_matrix_on_one_rank, "on 1 of 2 ranks"),
        (_other_matrix_in_turn, "in some micro-batches alone"),
    ],
)
def test_gradients_that_ranks_lack_are_refused_before_they_are_sent(
    before: Callable[[], None], where: str, engine: str, tmp_path: Path
) -> None:
    """What differs in size ended within gloo, by SIGABRT; what ranks lack in turn went unnoticed,
    and was added to another matrix."""
    config = tiny_model.make_config(tmp_path, data={"num_held_out": 0}, train={"max_steps": 2})
    words = [engine, "train.micro_batch_tokens=96", f"run_dir={tmp_path / 'run'}"]
    if "deepspeed" in engine:
        words.append("engine.zero_stage=1")
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=before)
    assert done.returncode == 2, done.stderr
    assert f"_proj.weight gets a gradient {where}" in done.stderr
    assert "Traceback" not in done.stderr and not store.find_all(tmp_path / "run")
