"""Weights out of other trainers' checkpoints equal what those trainers held, range by range."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor

from neftune_dist.checkpoint import flat
from neftune_dist.config import ModelConfig, UserError
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.model import foreign, load
from neftune_dist.model.weights import WeightFiles
from tests.support import tiny_model


@dataclass(frozen=True)
class Train:
    """In every rank: train one step, so that the masters are no bf16 values, and save as DeepSpeed
    does."""

    folder: Path

    def __call__(self) -> None:
        import deepspeed

        # Two minutes of compiling, for inference alone.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo")
        for stage in (1, 2, 3):
            path = self.folder / "model"
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            decayed = [p for p in model.parameters() if p.dim() > 1]
            others = [p for p in model.parameters() if p.dim() < 2]
            groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(groups),
                config={
                    "train_micro_batch_size_per_gpu": 1,
                    "bf16": {"enabled": True},
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                },
            )
            ids = torch.arange(20)[None]
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
            engine.save_checkpoint(f"{self.folder}/zero_{stage}")
        torch.distributed.barrier()
        os._exit(0)  # threads of DeepSpeed's and gloo's may crash an interpreter that ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("foreign")
    tiny_model.make_model(made / "model")
    return made


def open_weights(folder: Path, weights: Path) -> tuple[WeightFiles, dict[str, tuple[int, ...]]]:
    model = load.build(folder / "model", ModelConfig(str(folder / "model")), packing=True)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return WeightFiles(weights, load.parameter_aliases(model), shapes, model), shapes


def assert_ranges(weights: WeightFiles, shapes: dict[str, tuple[int, ...]], expected: dict) -> None:
    for name, shape in shapes.items():
        whole: Tensor = expected[name].flatten()
        numel = torch.Size(shape).numel()
        for start, stop in ((0, numel), (numel // 3, numel // 2 + 1), (numel - 1, numel)):
            assert torch.equal(weights.read(name, start, stop), whole[start:stop]), name


@pytest.fixture(scope="module")
def zero_checkpoints(folder: Path) -> Path:
    """Folder of one checkpoint of each stage, by 2 ranks."""
    done = tiny_model.call_forked(Train(folder), ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_checkpoint_is_read_as_deepspeed_consolidates_it(
    stage: int, zero_checkpoints: Path, folder: Path
) -> None:
    """Against DeepSpeed's own consolidation."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    saved = zero_checkpoints / f"zero_{stage}"
    expected = get_fp32_state_dict_from_zero_checkpoint(str(saved))
    before = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert not torch.equal(expected["model.norm.weight"], before["model.norm.weight"])
    for place in (saved, next(saved.glob("global_step*"))):
        weights, shapes = open_weights(folder, place)
        assert_ranges(weights, shapes, expected)
    next(saved.glob("global_step*/*rank_1*optim_states.pt")).unlink()
    with pytest.raises(UserError, match="1 of 2 partitions"):
        open_weights(folder, saved)


@pytest.mark.parametrize("prefix", ["", "model.", "state.app."])
def test_distributed_checkpoint_is_read_by_ranges(
    prefix: str, folder: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").to(torch.bfloat16)
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save({**state, "step": 3, "optim.norm": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    weights, shapes = open_weights(folder, tmp_path / "dcp")
    assert_ranges(weights, shapes, model.state_dict())


def test_the_description_of_a_distributed_checkpoint_is_read_once(
    folder: Path, tmp_path: Path, metadata_reads: list[Path]
) -> None:
    """However many ranges of however many tensors are read."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    dcp.save(model.state_dict(), checkpoint_id=tmp_path / "dcp")
    weights, shapes = open_weights(folder, tmp_path / "dcp")
    assert_ranges(weights, shapes, model.state_dict())
    assert metadata_reads == [tmp_path / "dcp"]


def test_what_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        open_weights(folder, tmp_path)
    torch.save({"code": subprocess.run}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(
        UserError, match=r"optim_states\.pt is no checkpoint of DeepSpeed's ZeRO layout"
    ):
        open_weights(folder, tmp_path)


def test_checkpoint_of_a_run_here_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match=r"export the run.*checkpoint\.resume"):
        foreign.open_weights(tmp_path)


def test_a_run_starts_from_them(folder: Path, tmp_path: Path) -> None:
    config = tiny_model.make_config(tmp_path, train={"max_steps": 1})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    model.save_pretrained(tmp_path / "halved")
    one = tiny_model.train(config, tmp_path / "a", f"model.weights={tmp_path / 'dcp'}", ranks=2)
    two = tiny_model.train(config, tmp_path / "b", f"model.weights={tmp_path / 'halved'}")
    plain = tiny_model.train(config, tmp_path / "c")
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)
    assert abs(one[0]["loss"] / plain[0]["loss"] - 1) > 1e-3


ODD = (None, True, -1, 2.5, "x", [], {}, [[]], [None], {"a": 1}, torch.ones(3), torch.ones(0))


def small_zero(stage: int) -> dict[str, dict]:
    """The files of a ZeRO checkpoint by one rank, made by hand: their content by name."""
    shapes = {"model.norm.weight": torch.Size([64]), "lm_head.weight": torch.Size([5, 64])}
    flat = torch.arange(64 + 5 * 64, dtype=torch.float32)
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    count = 1 if stage == 3 else [1]
    optimizer = {"optimizer_state_dict": {"partition_count": count, key: [flat]}}
    return {
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": optimizer,
        "zero_pp_rank_0_mp_rank_00_model_states.pt": {
            "param_shapes": [shapes],
            "shared_params": {},
        },
    }


@pytest.mark.parametrize("stage", [1, 3])
def test_garbage_in_a_zero_checkpoint_is_one_sentence(stage: int, tmp_path: Path) -> None:
    """Every field of both files in turn is odd or missing; then the files' bytes are."""

    def read(files: dict[str, dict]) -> dict[str, foreign.Source] | None:
        for name, content in files.items():
            torch.save(content, tmp_path / name)
        return foreign.open_weights(tmp_path)

    whole = small_zero(stage)
    weights = read(whole)
    assert weights and weights["norm.weight"].read_rows(0, 64).tolist() == list(range(64))
    refused = 0
    for name, path in [
        (name, path)
        for name, content in whole.items()
        for path in [(), *((a,) for a in content), *((a, b) for a in content for b in content[a])]
    ]:
        for odd in ("missing", *ODD):
            files = copy.deepcopy(whole)
            place: Any = files
            for step in (name, *path)[:-1]:
                place = place[step]
            last = (name, *path)[-1]
            if not isinstance(place, dict):
                continue
            if isinstance(odd, str) and odd == "missing" and path:
                del place[last]
            else:
                place[last] = odd
            try:
                found = read(files)
                assert found is not None
                if "norm.weight" in found:
                    assert found["norm.weight"].read_rows(0, 64).tolist() == list(range(64))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 50
    for name, content in whole.items():
        torch.save(content, tmp_path / name)
        stored = (tmp_path / name).read_bytes()
        for damaged in (b"", stored[: len(stored) // 2], b"x" * 500, stored[5:], b"PK\x03\x04"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(UserError):
                foreign.open_weights(tmp_path)
        (tmp_path / name).write_bytes(stored)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError):
        foreign.open_weights(tmp_path)


@pytest.mark.parametrize("change", ["a chunk less", "a chunk twice", "none", "a longer tensor"])
def test_description_that_does_not_cover_a_tensor_is_refused(change: str, tmp_path: Path) -> None:
    """DCP would load such a tensor in part, and leave the rest as memory without content."""
    whole = torch.arange(50.0)
    halves = [FlatShard(MASTER, "a", start, whole[start : start + 25], 50) for start in (0, 25)]
    flat.write(tmp_path, halves)
    description = pickle.loads((tmp_path / ".metadata").read_bytes())
    stored = description.state_dict_metadata["master/a"]
    match change:
        case "a chunk less":
            stored.chunks.pop()
        case "a chunk twice":
            stored.chunks.append(stored.chunks[0])
        case "none":
            stored.chunks.clear()
        case "a longer tensor":
            stored.size = torch.Size([51])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    for open_it in (foreign.open_weights, functools.partial(flat.Reader, alone=True)):
        with pytest.raises(UserError, match=r"elements of 'master/a'"):
            open_it(tmp_path)


def test_garbage_in_a_distributed_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    saved = tmp_path / "dcp"
    dcp.save({"norm.weight": torch.arange(64.0)}, checkpoint_id=saved)
    for name in (".metadata", "__0_0.distcp"):
        stored = (saved / name).read_bytes()
        for damaged in (b"", stored[: len(stored) // 2], b"x" * 500, pickle.dumps([1]), b"\x80"):
            (saved / name).write_bytes(damaged)
            with pytest.raises(UserError, match=str(saved)):
                weights = foreign.open_weights(saved)
                assert weights is not None
                weights["norm.weight"].read_rows(0, 64)
        (saved / name).write_bytes(stored)
