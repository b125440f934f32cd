"""What is exported is the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from neftune_dist.checkpoint import store
from neftune_dist.checkpoint.export import export
from neftune_dist.checkpoint.run_files import keep_small_files, keep_template
from neftune_dist.config import EvaluateConfig, load_config
from neftune_dist.evaluation.target import open_target
from neftune_dist.evaluation.tasks import read_words, run_tasks
from neftune_dist.model.load import DTYPES
from tests.support import tiny_model


@pytest.fixture(scope="module", params=["fsdp2", "deepspeed"])
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_model.make_config(folder, checkpoint={"every_steps": 4}, train={"max_steps": 8})
    tiny_model.train(config, folder / "run", f"engine.name={request.param}", ranks=2)
    return folder / "run"


def test_export_has_the_trained_logits(run_dir: Path, tmp_path: Path) -> None:
    output = export(run_dir, tmp_path / "export", log=lambda _: None)
    exported = transformers.AutoModelForCausalLM.from_pretrained(output).eval()
    base = load_config(run_dir / "config.yaml").model.name_or_path
    trained = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    start = trained.model.embed_tokens.weight.detach().clone()
    tensors = tiny_model.checkpoint_tensors(store.find_all(run_dir)[0].folder)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            parameter.copy_(tensors[f"master/{name}"].view_as(parameter))
        ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
        assert torch.equal(exported(ids).logits, trained(ids).logits)
        for dtype in ("fp32", "bf16"):
            target = open_target(run_dir, settings=[f"model.dtype={dtype}"])
            same = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=DTYPES[dtype])
            assert torch.equal(target.model(ids).logits, same.eval()(ids).logits)
            assert target.model.dtype == DTYPES[dtype]
            assert (target.step, target.alpha) == (8, 5.0)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    assert not torch.equal(start, exported.model.embed_tokens.weight)


def test_export_is_complete_with_model_card(run_dir: Path, tmp_path: Path) -> None:
    done = tiny_model.run_forked(
        "export", run_dir, "--output", tmp_path / "e", "--dtype", "bf16", "--step", 4
    )
    assert done.returncode == 0, done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert model.dtype == torch.bfloat16
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"  # of transformers 5, and of 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    stored = load_file(tmp_path / "e" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "e")
    assert tokenizer.chat_template == tiny_model.TEMPLATE
    card = (tmp_path / "e" / "README.md").read_text()
    assert "alpha 5.0" in card
    assert "4 of 10 documents" in card


def test_damaged_checkpoint_is_not_exported(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    newest = store.find_all(copy)[0].folder
    shard = newest / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = sorted(path.name for path in copy.iterdir())
    done = tiny_model.run_forked("export", copy)
    assert done.returncode == 2
    assert done.stderr == (
        f"neftune-dist: The checkpoint {newest} is damaged: __1_0.distcp is not what was written. "
        "Choose another with --step.\n"
    )
    assert sorted(path.name for path in copy.iterdir()) == before
    other = tiny_model.run_forked("export", copy, "--step", 4)
    assert other.returncode == 0, other.stderr
    assert "exported step 4" in other.stdout


def test_mistakes_exit_2(run_dir: Path, tmp_path: Path) -> None:
    for words, needle in (
        (["export", tmp_path], "no complete checkpoint"),
        (["export", run_dir, "--step", "5"], "it has: 8, 4"),
    ):
        done = tiny_model.run_forked(*words)
        assert done.returncode == 2
        assert needle in done.stderr
        assert "Traceback" not in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    done = tiny_model.run_forked("export", run_dir, "--output", tmp_path / "mine")
    assert done.returncode == 2
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_export_keeps_the_run_s_prompts(tmp_path: Path) -> None:
    """Not those of the model that it began with."""
    config = tiny_model.make_config(tmp_path, train={"max_steps": 1})
    own = tmp_path / "model" / "tokenizer_config.json"
    own.write_text(json.dumps({**json.loads(own.read_text()), "chat_template": "of old"}))
    words = ["data.template=vicuna", "data.system_prompt=Be brief."]
    tiny_model.train(config, tmp_path / "run", *words)
    output = export(tmp_path / "run", log=lambda _: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())
    asked = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "Be brief. USER: Why? ASSISTANT:"
    card = (output / "README.md").read_text()
    assert "| prompts | data.template=vicuna; the chat template puts data.system_prompt in" in card


def test_unwritable_template_leaves_no_chat_template(tmp_path: Path) -> None:
    folder = tiny_model.make_model(tmp_path / "base")
    kept = [
        "LICENSE",
        "NOTICE",
        "USE_POLICY.md",
        "bpe.codes",
        "processor_config.json",
        "source.spm",
    ]
    for name in kept:
        (folder / name).write_text(name)
    keep_small_files(folder, tmp_path)
    assert [(tmp_path / "model" / name).read_text() for name in kept] == kept
    keep_template(None, tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == tiny_model.TEMPLATE
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template is None


def test_new_tokens_are_trained_saved_and_exported(tmp_path: Path) -> None:
    """With a chat template that uses them, the same under one rank and two."""
    config = tiny_model.make_config(tmp_path, train={"max_steps": 3})
    model = tmp_path / "model"
    template = (model / "chat_template.jinja").read_text()
    template = template.replace("m['role'] }}|>", "m['role']|replace('assistant', 'bot') }}|>")
    (model / "chat_template.jinja").write_text(template.replace("<|assistant|>", "<|bot|>"))
    words = ["model.add_tokens=<|bot|>,<|end|>,<|a|>,<|b|>"]
    one = tiny_model.train(config, tmp_path / "one", *words)
    two = tiny_model.train(config, tmp_path / "two", *words, "engine.name=deepspeed", ranks=2)
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two], rel=1e-5)
    output = export(tmp_path / "one", log=lambda _: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    exported = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert exported.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|bot|>") == tokenizer.vocab_size
    done = tiny_model.run_forked("evaluate", tmp_path / "one", "evaluate.max_instructions=1")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "one/evaluations/step_00000003/summary.json").read_text())
    last = json.loads((tmp_path / "one/evaluations.jsonl").read_text().splitlines()[-1])
    assert told["losses"]["held_out_loss"] == pytest.approx(last["held_out_loss"], rel=1e-6)


def test_export_behaves_as_the_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    choices = [
        {"query": f"Question: {i} + 1?", "choices": [f"{i}", f"{i + 1}"], "gold": 1}
        for i in range(10)
    ]
    spoken = [{"context": f"Count from {i} to", "continuation": f"{i + 1}"} for i in range(5)]
    for name, rows in (("sums", choices), ("counts", spoken)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ",".join(f"{name}={tmp_path / name}.jsonl" for name in ("sums", "counts"))
    exported = export(run_dir, tmp_path / "export", log=lambda _: None)
    base = load_config(run_dir / "config.yaml").model.name_or_path
    alone: Any = SimpleNamespace(rank=0, size=1, is_first=True, log=print)
    found = []
    for folder in (run_dir, exported, base):
        target = open_target(folder, settings=["model.dtype=fp32"])
        read = read_words(words)
        results = tmp_path / f"results_{len(found)}"
        results.mkdir()
        asked = EvaluateConfig(batch_size=4)
        found.append(run_tasks(target.model, target.tokenizer, read, asked, alone, results))
    assert found[0] == found[1]
    exported_and_base = (found[i]["counts"]["others"]["perplexity"] for i in (0, 2))
    assert len(set(exported_and_base)) == 2
