"""A sample of the enumeration of families, one of each kind of quirk; all: `families.md`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed.families import Make, run_family
from tests.support import tiny_model

KINDS = {
    "gemma2": "replicated",  # attention by eager alone
    "xlm-roberta": "replicated",  # positions that do not begin at 0
    "afmoe": "fsdp2",  # a parameter that is frozen
    "falcon_h1": "fsdp2",  # buffers that another module writes, scaled logits
    "big_bird": "zero-3",  # a parameter without a gradient
    "marian": "fsdp2",  # attention to an encoder that is not there
    "rwkv": "zero-3",  # buffers that are made by the parameters' shapes
    "recurrent_gemma": "zero-3",  # a buffer in bf16
    "openai-gpt": "zero-3",  # blocks that have no name, and give lists
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("model_type", KINDS)
def test_family_trains_as_the_plain_loop_or_is_refused(model_type: str, tokenizer: Path) -> None:
    [result] = run_family(model_type, [KINDS[model_type]], tokenizer)
    assert (result.outcome, result.names) == ("exact", ""), result


def test_wrapper_is_refused_by_what_it_is(tokenizer: Path) -> None:
    [result] = run_family("emu3", ["replicated"], tokenizer)
    assert result.outcome == "refused" and "text_config, vq_config" in result.sentence


def test_constants_are_carried_from_the_base_to_the_export(tmp_path: Path) -> None:
    """Buffers of the base's files: in their own dtype and to the bit, after a resume too; not those
    of a base that has changed since."""
    config = tiny_model.make_config(
        tmp_path, data={"packing": False}, train={"max_steps": 3}, checkpoint={"every_steps": 1}
    )
    model = tmp_path / "model"
    assert tiny_model.call_forked(Make("apertus", model)).returncode == 0
    file = model / "model.safetensors"
    base = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    beta = "model.layers.0.mlp.act_fn.beta"
    base[beta] = torch.tensor(0.123456789)  # in bfloat16 it would be another
    save_file(base, file, metadata={"format": "pt"})
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "dtype": "bfloat16"}))

    words = ["engine.name=replicated"]
    whole = tiny_model.train(config, tmp_path / "whole", *words)
    tiny_model.train(config, tmp_path / "parts", *words, "train.max_steps=2")
    parts = tiny_model.train(config, tmp_path / "parts", *words)
    assert tiny_model.untimed(parts) == tiny_model.untimed(whole)

    export = tmp_path / "export"
    done = tiny_model.run_forked("export", tmp_path / "parts", "--output", export)
    assert done.returncode == 0, done.stderr
    exported = load_file(export / "model.safetensors")
    assert exported.keys() == base.keys()
    assert exported[beta].dtype == torch.float32 and torch.equal(exported[beta], base[beta])
    weight = "model.layers.0.mlp.up_proj.weight"
    assert exported[weight].dtype == torch.bfloat16
    assert not torch.equal(exported[weight], base[weight])

    save_file({**base, beta: base[beta] + 1}, file, metadata={"format": "pt"})
    done = tiny_model.run_forked("export", tmp_path / "parts", "--output", export)
    assert done.returncode == 2 and "other weights" in done.stderr
