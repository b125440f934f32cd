"""LoRA, DoRA and QLoRA train the same under every engine as a plain PEFT model in one process.

The reference is the plain loop over PEFT's model, the frozen matrices of QLoRA replaced by what
their 4 bits stand for.
"""

from __future__ import annotations

import functools
import json
import operator
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from neftune_dist.config import UserError, load_config
from neftune_dist.evaluation.target import open_target
from neftune_dist.model import load, nf4
from neftune_dist.model.adapters import peft_name
from neftune_dist.model.weights import WeightFiles
from tests.support import reference_loop, tiny_model

STEPS = 6
ZERO_3 = ["engine.name=deepspeed"]
ZERO_1 = ["engine.name=deepspeed", "engine.zero_stage=1"]
METHODS = {
    "lora": ["adapter.method=lora"],
    "qlora": ["adapter.method=lora", "adapter.base=nf4"],
    "dora": ["adapter.method=dora", "adapter.targets=q_proj,v_proj,down_proj"],
    "rslora": ["adapter.method=lora", "adapter.scaling=rslora", "adapter.alpha=8"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    path = tiny_model.make_config(
        folder,
        # Its gradients are not near zero, where the first update of Adam is their sign: the plain
        # loop in float32 is within 2e-7 of float64 (with seed 0, and NF4, within 1.5e-5).
        train={"max_steps": STEPS, "seed": 1},
        optim={"learning_rate": 1e-2},
        checkpoint={"every_steps": 3, "keep": 0},
    )
    shutil.rmtree(folder / "model")
    tiny_model.make_model(folder / "model", intermediate=128)  # blocks of 64
    return path


def peft_model(config_path: Path, method: str) -> Any:
    """Plain PEFT, with the frozen matrices and the first adapters of a run."""
    config = load_config(config_path, METHODS[method])
    folder = Path(config.model.name_or_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if config.adapter.base == "nf4":
        for name, matrix in model.model.layers.named_parameters():
            if matrix.dim() == 2:
                rows = nf4.unpack(nf4.pack(matrix.detach()), matrix.shape[1], torch.float32)
                assert 0.03 < float((rows - matrix).norm() / matrix.norm()) < 0.15, name
                matrix.data.copy_(rows)
    adapter = config.adapter
    wanted = "all-linear" if adapter.targets == "all" else adapter.targets.split(",")
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=wanted,
            use_rslora=adapter.scaling == "rslora",
            use_dora=adapter.method == "dora",
            task_type="CAUSAL_LM",
        ),
    )
    ours = load.build(folder, config.model, True, adapter)
    first = load.open_weights(ours, folder, config.model, config.train.seed)
    theirs = dict(model.named_parameters())
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert {f"base_model.model.{n}" for n in trained} == {
        n for n, p in theirs.items() if p.requires_grad
    }
    for name, parameter in trained.items():
        held = theirs[f"base_model.model.{name}"]
        begun = first.read(name, 0, parameter.numel()).view(parameter.shape)
        if "lora_A" in name:
            held.data.copy_(begun)
        else:  # PEFT begins with the same zeros and lengths
            torch.testing.assert_close(begun, held.detach())
    return model


def reference(config_path: Path, method: str) -> tuple[list[dict[str, float]], Any]:
    """Records of the plain loop, and the model that it has trained."""
    model = peft_model(config_path, method)
    records = reference_loop.train(model, load_config(config_path, METHODS[method]))
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]  # it moves
    return records, model.eval()


@pytest.fixture(scope="module")
def references(config: Path) -> dict[str, tuple[list[dict[str, float]], Any]]:
    return {method: reference(config, method) for method in METHODS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    ("method", "ranks", "words"),
    [
        ("lora", 2, []),
        ("lora", 2, [*ZERO_1, "train.micro_batch_tokens=96"]),
        # On two ranks: test_adapter_is_resumed_exported_and_loaded.
        ("qlora", 3, [*ZERO_3, "train.micro_batch_tokens=96"]),
        ("qlora", 1, ["model.activation_checkpointing=full", "data.packing=false"]),
        ("qlora", 1, ["engine.name=replicated", "train.micro_batch_tokens=96"]),
        ("dora", 1, ["engine.name=replicated"]),
        ("dora", 2, ZERO_3),
        ("rslora", 2, ["engine.offload=cpu", "model.activation_checkpointing=selective"]),
    ],
)
def test_every_engine_trains_what_peft_trains(
    method: str, ranks: int, words: list[str], config: Path, references: Any, tmp_path: Path
) -> None:
    records = tiny_model.train(config, tmp_path / "run", *METHODS[method], *words, ranks=ranks)
    assert_as_peft(records, references[method][0])


def assert_as_peft(records: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    assert len(records) == len(expected)
    for one, other in zip(records, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=2e-6), (one["step"], key)
        assert one["noise_norm"] == pytest.approx(5 / 3**0.5, rel=0.01)


@pytest.mark.parametrize("method", ["qlora", "dora"])
def test_adapter_is_resumed_exported_and_loaded(
    method: str, config: Path, references: Any, tmp_path: Path
) -> None:
    """The same bits after a resume, under the other engine the same loss; merged, and loaded by
    PEFT, the model computes what the trained one did. Checkpoints hold what was trained alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    records = tiny_model.train(config, whole, *METHODS[method], ranks=2)
    assert_as_peft(records, references[method][0])
    shutil.copytree(whole, cut)
    for name in ("step_00000006", "latest"):
        path = cut / "checkpoints" / name
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
    (cut / "metrics.jsonl").write_text("")
    assert tiny_model.untimed(
        tiny_model.train(config, cut, *METHODS[method], ranks=2)
    ) == tiny_model.untimed(records[3:])
    saved = [
        tiny_model.checkpoint_tensors(run / "checkpoints/step_00000006") for run in (whole, cut)
    ]
    assert saved[0].keys() == saved[1].keys()
    assert all("lora_" in key for key in saved[0])
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0])

    other = tmp_path / "other"
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints/step_00000006")
    (other / "checkpoints/latest").unlink()
    continued = tiny_model.train(config, other, *METHODS[method], *ZERO_3, ranks=3)
    for one, two in zip(continued[-3:], records[3:], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)

    _, trained = references[method]
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        for words in ([], ["--adapter"]):
            done = tiny_model.run_forked("export", whole, *words)
            assert done.returncode == 0, done.stderr
        merged = transformers.AutoModelForCausalLM.from_pretrained(
            whole / "export", dtype=torch.float32
        )
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-3, atol=2e-3)
        without_export = open_target(whole).model
        assert torch.equal(without_export(input_ids=ids).logits, merged(input_ids=ids).logits)
        base = peft_model(config, method).unload()
        loaded = peft.PeftModel.from_pretrained(base, whole / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-3, atol=2e-3)
        plain = base(input_ids=ids).logits  # (PeftModel put its layers into it)
        assert torch.equal(plain, loaded(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["adapter.method=lora", "adapter.targets=q_proj,nothing"],
            "LlamaForCausalLM has no matrix nothing that takes an adapter",
        ),
        (["adapter.method=dora", "adapter.base=nf4"], "adapter.method=dora goes with"),
        (["adapter.rank=8"], "adapter.rank=8 has no effect with adapter.method=none"),
        (["adapter.method=lora", "adapter.rank=0"], "adapter.rank=0 is out of range"),
        (["adapter.method=lora", "model.float8=rowwise", "model.dtype=bf16"], "goes with adapter"),
    ],
)
def test_mistakes_exit_2(words: list[str], told: str, config: Path, tmp_path: Path) -> None:
    done = tiny_model.run_forked("train", config, f"run_dir={tmp_path / 'run'}", *words)
    assert done.returncode == 2
    assert told in done.stderr


def test_width_that_has_no_blocks_exits_2(tmp_path: Path) -> None:
    config = tiny_model.make_config(tmp_path)
    done = tiny_model.run_forked(
        "train", config, f"run_dir={tmp_path / 'run'}", "adapter.method=lora", "adapter.base=nf4"
    )
    assert done.returncode == 2
    assert "mlp.down_proj.weight have 112: set adapter.base=plain" in done.stderr


def test_adapter_is_exported_in_the_dtype_asked_for(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_model.train(config, run, *METHODS["lora"], "train.max_steps=1")
    for word, dtype in (("original", torch.float32), ("bf16", torch.bfloat16)):
        done = tiny_model.run_forked("export", run, "--adapter", "--dtype", word)
        assert f"({str(dtype).removeprefix('torch.')})" in done.stdout, done.stderr
        tensors = load_file(run / "adapter/adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_another_adapter_is_another_run(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny_model.train(config, run, *METHODS["lora"], "train.max_steps=1")
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run}", *METHODS["lora"], "adapter.rank=8"
    )
    assert done.returncode == 2
    assert "adapter.rank (then 16, now 8)" in done.stderr


def test_other_frozen_weights_are_noticed(config: Path, tmp_path: Path) -> None:
    """One bit of one of them, at resume, export and evaluation; the same weights in other files are
    the same."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(load_config(config).model.name_or_path, base)
    words = [*METHODS["qlora"], f"model.name_or_path={base}"]
    tiny_model.train(config, run, *words, "train.max_steps=1", ranks=2)
    before = open_target(run).model.state_dict()
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for shift in (1e-3, 0.0):
        changed = {**weights, name: weights[name].clone()}
        changed[name][-1, -1] += shift
        (base / "model.safetensors").unlink(missing_ok=True)
        if shift:
            save_file(changed, base / "model.safetensors", metadata={"format": "pt"})
        else:
            torch.save(changed, base / "pytorch_model.bin")
        resumed = tiny_model.run_forked(
            "train", config, f"run_dir={run}", *words, "train.max_steps=2", ranks=1
        )
        exported = tiny_model.run_forked("export", run)
        if shift:
            assert (resumed.returncode, exported.returncode) == (2, 2)
            assert f"beside other frozen weights than those of {base}" in resumed.stderr
            assert f"beside other weights than those now in {base}" in exported.stderr
            assert not (run / "export").exists()
            with pytest.raises(UserError, match="beside other weights than those now in"):
                open_target(run, step=1).model.state_dict()
        else:
            assert (resumed.returncode, exported.returncode) == (0, 0), resumed.stderr
            after = open_target(run, step=1).model.state_dict()
            assert all(torch.equal(after[key], value) for key, value in before.items())


def test_digest_of_weights_depends_on_every_tensor(config: Path) -> None:
    """That of all parts together, whatever their number; another one for any other bit or name."""
    settings = load_config(config).model
    folder = Path(settings.name_or_path)
    model = load.build(folder, settings, packing=True)
    files = load.open_weights(model, folder, settings, seed=0).files
    whole = files.digest()
    for count in (2, 3, 50):
        parts = [files.digest((index, count)) for index in range(count)]
        assert functools.reduce(operator.xor, parts) == whole
    read, seen, at = WeightFiles._read, {whole}, ("", 0)

    def bent(self: WeightFiles, source: str, start: int, stop: int) -> torch.Tensor:
        values = read(self, source, start, stop)
        if source == at[0] and start <= at[1] < stop:
            values = values.clone()
            values.view(torch.int32)[at[1] - start] ^= 1
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightFiles, "_read", bent)
        patch.setattr("neftune_dist.model.weights._DIGESTED_ELEMENTS", 100)
        for name, parameter in model.named_parameters():
            at = (name, parameter.numel() - 1)
            seen.add(files.digest())
    assert len(seen) == 1 + len(dict(model.named_parameters()))


def test_names_in_files_are_pefts() -> None:
    name = "model.layers.0.mlp.down_proj.lora_A.default.weight"
    assert peft_name(name) == (
        "down_proj",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
    )
    assert json.dumps(peft_name(name))  # plain text
