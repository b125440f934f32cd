"""Text models train as the multimodal wrapper around them, which is exported whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neftune_dist.checkpoint import store
from neftune_dist.checkpoint.export import export
from neftune_dist.config import load_config
from neftune_dist.evaluation.target import open_target
from neftune_dist.model.families import WRAPPERS
from tests.support import reference_loop, tiny_model
from tests.support.reference_loop import TOLERANCE
from tests.support.wrappers import logits, make_wrapper

STEPS = 4
SETTINGS = {"qwen3_5": ["data.packing=false"]}  # recurrent layers
IDS = torch.randint(5, 600, (2, 24), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Expected:
    """A configuration, and what the plain loop makes of the whole wrapper on text."""

    kind: str
    config: Path
    words: list[str]
    records: list[dict[str, Any]]
    logits: torch.Tensor

    @property
    def base(self) -> Path:
        return self.config.parent / "model"


def make_config(kind: str, folder: Path, num_further: int = 40) -> Path:
    return tiny_model.make_config(
        folder,
        make=partial(make_wrapper, model_type=kind, num_further=num_further),
        train={"max_steps": STEPS, "global_batch_size": 3},
        # Without it Adam makes a step of full size of the rounding error of a gradient near 0.
        optim={"epsilon": 1e-3},
        checkpoint={"every_steps": 2},
    )


def load_wrapper(folder: Path, kind: str) -> Any:
    """By the class that config.json names, with every parameter from the files and none left."""
    assert transformers.AutoConfig.from_pretrained(folder).architectures == [WRAPPERS[kind]]
    model, info = getattr(transformers, WRAPPERS[kind]).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module", params=["gemma3", "mistral3", "qwen2_5_vl", "qwen3_5"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    kind = request.param
    config = make_config(kind, tmp_path_factory.mktemp(kind))
    model = load_wrapper(config.parent / "model", kind)  # no gradient reaches its towers
    words = SETTINGS.get(kind, [])
    records = reference_loop.train(model, load_config(config, words))
    return Expected(kind, config, words, records, logits(model, IDS))


def assert_as_expected(records: list[dict[str, Any]], expected: Expected) -> None:
    assert len(records) == STEPS
    for one, other in zip(records, expected.records, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=TOLERANCE), (one["step"], key)


def towers(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a wrapper's files outside its text model."""
    tensors = load_file(folder / "model.safetensors")
    text = ("language_model", "lm_head", "model.layers.", "model.embed_tokens.", "model.norm.")
    return {n: t for n, t in tensors.items() if not any(part in n for part in text)}


def assert_exported_whole(run_dir: Path, expected: Expected, output: Path) -> None:
    export(run_dir, output, log=lambda _: None)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (output, expected.base))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    kept = towers(expected.base)
    assert kept and all(torch.equal(ours[name], tensor) for name, tensor in kept.items())
    assert all(not torch.equal(ours[n], theirs[n]) for n in ours.keys() - kept.keys())
    found = logits(load_wrapper(output, expected.kind), IDS)
    torch.testing.assert_close(found, expected.logits, atol=1e-5, rtol=1e-4)
    processor = "preprocessor_config.json"
    assert (output / processor).read_bytes() == (expected.base / processor).read_bytes()
    assert (
        json.loads((output / "config.json").read_text())["vision_config"]
        == json.loads((expected.base / "config.json").read_text())["vision_config"]
    )


def without_its_end(run_dir: Path, copy: Path) -> Path:
    """A copy of a run that stopped at its half."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    return copy


def test_wrapper_trains_on_two_ranks_and_continues_under_another_engine(
    expected: Expected, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    for engine in ("deepspeed", "fsdp2"):
        run_dir = without_its_end(whole, tmp_path / engine) if whole.exists() else whole
        words = [f"engine.name={engine}", *expected.words]
        assert_as_expected(tiny_model.train(expected.config, run_dir, *words, ranks=2), expected)
        assert_exported_whole(run_dir, expected, tmp_path / f"{engine}_export")


def test_wrapper_trains_padded_and_resumes_bitwise(expected: Expected, tmp_path: Path) -> None:
    whole, words = tmp_path / "whole", ["engine.name=fsdp2", "data.packing=false"]
    assert_as_expected(tiny_model.train(expected.config, whole, *words), expected)
    if expected.kind != "qwen3_5":
        return
    resumed = without_its_end(whole, tmp_path / "resumed")
    tiny_model.train(expected.config, resumed, *words)
    runs = (resumed, whole)
    one, other = (tiny_model.untimed(tiny_model.steps(run)) for run in runs)
    assert one == other
    one, other = (tiny_model.checkpoint_tensors(store.find_all(run)[0].folder) for run in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA, in bf16 beside towers that are stored in float32."""
    folder = tmp_path_factory.mktemp("adapted")
    config = make_config("mistral3", folder)
    words = ["engine.name=replicated", "adapter.method=lora", "optim.learning_rate=1e-2"]
    tiny_model.train(config, folder / "run", *words)
    return folder / "run"


def test_adapters_are_merged_or_named_as_the_wrapper_names_its_layers(
    adapted: Path, tmp_path: Path
) -> None:
    base = adapted.parent / "model"
    output = export(adapted, tmp_path / "merged", log=lambda _: None)
    found = logits(load_wrapper(output, "mistral3"), IDS)
    plain = load_wrapper(base, "mistral3")
    assert not torch.allclose(found, logits(plain, IDS), atol=1e-3)
    alone = export(adapted, tmp_path / "adapter", adapter=True, log=lambda _: None)
    with_adapter = peft.PeftModel.from_pretrained(plain, alone)
    torch.testing.assert_close(logits(with_adapter, IDS), found, atol=1e-5, rtol=1e-4)
    assert not any("lora" in n and "vision" in n for n, _ in with_adapter.named_parameters())
    saved = load_file(alone / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(with_adapter)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_run_and_export_are_evaluated_alike(adapted: Path, tmp_path: Path) -> None:
    output = export(adapted, tmp_path / "merged", log=lambda _: None)
    expected = logits(load_wrapper(output, "mistral3"), IDS)
    for place in (adapted, output):
        words = [] if place == adapted else [f"data.source={adapted.parent / 'rows.jsonl'}"]
        target = open_target(place, settings=["model.dtype=fp32", *words])
        torch.testing.assert_close(logits(target.model, IDS), expected, atol=1e-5, rtol=1e-4)
    assert target.end_tokens == [1]


def test_new_tokens_are_exported_with_the_wrapper(tmp_path: Path) -> None:
    config = make_config("gemma3", tmp_path, num_further=0)
    run, words = tmp_path / "run", ["engine.name=replicated", "train.max_steps=2"]
    words += ["model.add_tokens=<|a|>,<|b|>"]
    done = tiny_model.run_forked("train", config, f"run_dir={run}", *words)
    assert done.returncode == 0 and "a wrapper's text model" in done.stdout, done.stderr
    output = export(run, tmp_path / "export", log=lambda _: None)
    model, tokenizer = load_wrapper(output, "gemma3"), transformers.AutoTokenizer
    assert len(tokenizer.from_pretrained(output)) == len(model.get_input_embeddings().weight)
    found = logits(open_target(run, settings=["model.dtype=fp32"]).model, IDS)
    torch.testing.assert_close(found, logits(model, IDS), atol=1e-5, rtol=1e-4)


def test_towers_keep_their_bytes_whatever_dtype_the_text_has(adapted: Path, tmp_path: Path) -> None:
    output = export(adapted, tmp_path / "half", dtype="bf16", log=lambda _: None)
    kept, exported = towers(adapted.parent / "model"), load_file(output / "model.safetensors")
    assert kept.keys() < exported.keys()
    for name, tensor in exported.items():
        assert tensor.dtype == (torch.float32 if name in kept else torch.bfloat16)
        assert name not in kept or torch.equal(tensor, kept[name])
    assert "the towers are the base's" in (output / "README.md").read_text()


def test_towers_that_have_changed_or_are_missing_exit_2(adapted: Path, tmp_path: Path) -> None:
    file = adapted.parent / "model" / "model.safetensors"
    original = load_file(file)
    name = next(iter(towers(file.parent)))
    asked = ("export", adapted, "--output", tmp_path / "export")
    again = ("train", adapted / "config.yaml", "train.max_steps=6")
    try:
        save_file({**original, name: original[name] + 1}, file, metadata={"format": "pt"})
        for words in (asked, again):
            done = tiny_model.run_forked(*words)
            assert done.returncode == 2 and "inside other towers" in done.stderr
        file.unlink()
        done = tiny_model.run_forked(*asked)
        assert done.returncode == 2
        assert "which an export copies, are missing" in done.stderr and "no weights" in done.stderr
    finally:
        save_file(original, file, metadata={"format": "pt"})
