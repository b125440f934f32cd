"""Parameters whose tensors have other names, or other shapes, in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model import load
from neftune_dist.model.stored_tensors import from_record, saved_layout, split, to_record
from neftune_dist.model.weights import WeightFiles
from tests.support.families import family

EXPERTS = "model.layers.0.mlp.experts"
FAMILIES = (
    "aria_text",
    "ernie4_5_moe",
    "gpt_neox",
    "granitemoe",
    "jamba",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)


def save(model_type: str, folder: Path) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family(model_type), dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def opened(folder: Path) -> tuple[Any, Any]:
    model = load.build(folder, ModelConfig(str(folder)), packing=False)
    return model, load.open_weights(model, folder, ModelConfig(str(folder)), 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parameters_are_read_by_ranges_and_cut_into_the_same_tensors(
    model_type: str, tmp_path: Path
) -> None:
    saved = save(model_type, tmp_path)
    model, weights = opened(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    parameters = dict(saved.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    record = json.loads(json.dumps(to_record(weights.files.export_layout())))
    assert record, "nothing is stored under other names"
    layout, cut = from_record(record, shapes), {}
    for name, parameter in parameters.items():
        flat = parameter.detach().flatten()
        for start, stop in ((0, len(flat)), (len(flat) // 3, len(flat) // 2 + 1), (5, 5)):
            assert torch.equal(weights.read(name, start, stop), flat[start:stop]), name
        cut |= split(parameter.detach(), layout[name])
    assert cut.keys() == files.keys()
    assert all(torch.equal(cut[name], tensor) for name, tensor in files.items())
    assert saved_layout(model, shapes) == layout


def test_a_range_reads_only_the_tensors_that_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("olmoe", tmp_path)
    _, weights = opened(tmp_path)
    read, seen = WeightFiles._read, []

    def noted(self: Any, source: str, start: int, stop: int) -> torch.Tensor:
        seen.append((source.removeprefix(f"{EXPERTS}."), stop - start))
        return read(self, source, start, stop)

    monkeypatch.setattr(WeightFiles, "_read", noted)
    size = 48 * 32  # of a gate's matrix
    weights.read(f"{EXPERTS}.gate_up_proj", 3 * size - 10, 4 * size + 20)
    assert seen == [
        ("1.gate_proj.weight", 10),
        ("1.up_proj.weight", size),
        ("2.gate_proj.weight", 20),
    ]


def test_experts_that_are_stacked_in_the_files_stay_so(tmp_path: Path) -> None:
    saved = save("olmoe", tmp_path)
    save_file(dict(saved.state_dict()), tmp_path / "model.safetensors")
    _, weights = opened(tmp_path)
    name = f"{EXPERTS}.down_proj"
    expected = saved.get_parameter(name).detach().flatten()
    assert torch.equal(weights.read(name, 7, 4000), expected[7:4000])
    assert to_record(weights.files.export_layout()) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{EXPERTS}.3.up_proj.weight": None}, "do not make up the shape"),
        ({f"{EXPERTS}.4.down_proj.weight": None}, "do not make up the shape"),
        ({f"{EXPERTS}.2.down_proj.weight": (32, 47)}, "do not make up the shape"),
        ({f"{EXPERTS}.2.down_proj.weight": (31, 48)}, "do not make up the shape"),
        ({f"{EXPERTS}.{i}.down_proj.weight": None for i in range(5)}, "lack .*down_proj"),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, shape in change.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_trainer_s_checkpoint_is_exported_as_transformers_saves(tmp_path: Path) -> None:
    saved = save("olmoe", tmp_path)
    place = tmp_path / "dcp"
    dcp.save(saved.state_dict(), checkpoint_id=place)
    config = ModelConfig(str(tmp_path), weights=str(place))
    model = load.build(tmp_path, config, packing=False)
    weights = load.open_weights(model, tmp_path, config, 0)
    name = f"{EXPERTS}.gate_up_proj"
    expected = saved.get_parameter(name).detach().flatten()
    assert torch.equal(weights.read(name, 7, 4000), expected[7:4000])
    exported = [tensor for found in weights.files.export_layout().values() for tensor in found]
    files = load_file(tmp_path / "model.safetensors")
    assert dict(exported) == {name: tuple(tensor.shape) for name, tensor in files.items()}
