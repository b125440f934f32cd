"""An export's settings are read alike by transformers 5 and under version 4's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from neftune_dist.checkpoint import export
from neftune_dist.config import UserError

ROTATIONS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 2e4, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "partial": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotation_has_the_names_of_transformers_4(kind: str, tmp_path: Path) -> None:
    rope = ROTATIONS[kind]
    maker = transformers.PhiConfig if kind == "partial" else transformers.LlamaConfig
    maker(rope_parameters=dict(rope)).save_pretrained(tmp_path)
    before = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    export._add_earlier_names(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == rope["rope_theta"]
    assert written.get("partial_rotary_factor") == rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling["rope_type"] == "default":
        assert "rope_scaling" not in written
    else:
        assert written["rope_scaling"] == scaling


def test_rotations_by_layer_stay_as_they_are(tmp_path: Path) -> None:
    transformers.Gemma3TextConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    export._add_earlier_names(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_settings_of_transformers_4_stay_as_they_are(tmp_path: Path) -> None:
    config = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    export._add_earlier_names(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert "LlamaTokenizer" in (tmp_path / "tokenizer_config.json").read_text()


def test_tokenizer_has_a_class_that_transformers_4_knows(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    assert json.loads(path.read_text())["tokenizer_class"] == "TokenizersBackend"
    export._add_earlier_names(tmp_path)
    assert json.loads(path.read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Two  12s, ünd <s>more</s>."
    assert read(text).input_ids == tiny_tokenizer(text).input_ids
    assert read.eos_token == tiny_tokenizer.eos_token


def test_numbers_too_large_for_fp16_are_refused() -> None:
    values = torch.tensor([1.0, -7e4])
    with pytest.raises(UserError, match=r"up_proj has values too large for fp16: set --dtype=bf16"):
        export._rounded("up_proj", values, torch.float16)
    assert export._rounded("up_proj", values, torch.bfloat16).isfinite().all()
    infinite = torch.tensor([float("inf"), 1.0])  # as it was trained
    assert export._rounded("up_proj", infinite, torch.float16).tolist() == infinite.tolist()
