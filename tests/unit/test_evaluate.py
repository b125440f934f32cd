"""What is evaluated, and that its losses are those of each document alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from neftune_dist.cli import main
from neftune_dist.config import Config, UserError, load_config
from neftune_dist.distributed.world import World
from neftune_dist.evaluation import evaluate
from neftune_dist.evaluation.losses import document_losses, mean_loss
from neftune_dist.evaluation.target import open_target
from neftune_dist.evaluation.win_rate import Judgement
from neftune_dist.noise.law import SampleStream, draw, scales
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.training.held_out import held_out_figures
from tests.support import tiny_model
from tests.support.corpora import documents_of

LENGTHS = [7, 3, 2, 10, 3, 31]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    made = World()
    yield made
    made.close()


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    masks = [random.integers(0, 2, length, np.uint8) for length in LENGTHS]
    for mask in masks:
        mask[0], mask[-1] = 0, 1
    return [(random.integers(3, 500, len(m)).astype(np.int32), m) for m in masks]


def alone(model: Any, ids: np.ndarray, mask: np.ndarray, noise: Tensor | None = None) -> float:
    """Sum of the losses of one document, by transformers itself."""
    tokens = torch.from_numpy(ids).long()[None]
    embeds = model.get_input_embeddings()(tokens)
    if noise is not None:
        embeds = embeds + noise
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits[0, :-1].double()
    losses = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return float(losses[torch.from_numpy(mask[1:]).bool()].sum())


def sums(found: list[list[float]]) -> list[float]:
    return [total for total, _ in found]


def settings(folder: Path, *words: str) -> Config:
    fixed = ["model.dtype=fp32", "train.micro_batch_tokens=32", "data.max_length=32"]
    return load_config(None, [*fixed, f"model.name_or_path={folder}", *words])


@pytest.mark.parametrize("packing", ["true", "false"])
def test_losses_are_those_of_each_document_alone(folder: Path, world: World, packing: str) -> None:
    config = settings(folder, f"data.packing={packing}")
    target = open_target(folder, settings=["model.dtype=fp32"])
    found = document_losses(target.model, documents_of(documents()), np.arange(6), config, world)
    expected = [alone(target.model, *document) for document in documents()]
    assert sums(found) == pytest.approx(expected, rel=1e-6)
    numbers = [int(mask.sum()) for _, mask in documents()]
    assert [number for _, number in found] == numbers
    mean = mean_loss(found)
    assert mean == pytest.approx(sum(expected) / sum(numbers), rel=1e-6)
    assert held_out_figures(mean, 6, 3)["perplexity"] == pytest.approx(np.exp(mean))
    assert target.model.config._attn_implementation == "sdpa"  # as generation needs it


def test_documents_that_ranks_share_in_training_are_evaluated_whole(
    folder: Path, world: World
) -> None:
    """Though they are longer than one rank's micro-batch."""
    config = settings(folder, "train.micro_batch_tokens=16", "engine.sequence_parallel=2")
    model = open_target(folder, settings=["model.dtype=fp32"]).model
    found = document_losses(model, documents_of(documents()), np.arange(6), config, world)
    expected = [alone(model, *document) for document in documents()]
    assert sums(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_losses_with_noise_are_those_of_the_law(folder: Path, world: World, packing: str) -> None:
    config = settings(folder, f"data.packing={packing}", "noise.alpha=15", "train.seed=3")
    model = open_target(folder, settings=["model.dtype=fp32"]).model
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5  # as of a model that is trained with dropout
    rows = documents_of(documents())
    found = document_losses(model, rows, np.arange(6), config, world, noisy=True)
    expected = []
    for i, (ids, mask) in enumerate(documents()):
        layout = TokenLayout.from_lengths(
            torch.tensor([len(ids)]), documents=torch.tensor([i]), epochs=torch.tensor([2**32 - 1])
        )
        noise = draw(SampleStream(3), layout, 64) * scales(layout, 64, 15.0)[:, None]
        expected.append(alone(model, ids, mask, noise))
    assert sums(found) == pytest.approx(expected, rel=1e-5)
    clean = document_losses(model, rows, np.arange(6), config, world)
    assert sums(clean) == pytest.approx(
        [alone(model, *document) for document in documents()], rel=1e-6
    )
    assert min(abs(a - b) for a, b in zip(sums(clean), sums(found), strict=True)) > 1e-4


@pytest.mark.parametrize("words", [["noise.length=padded"], ["noise.distribution=symmetric"]])
def test_noisy_losses_are_reproducible(folder: Path, world: World, words: list[str]) -> None:
    config = settings(folder, *words)
    model = open_target(folder, settings=["model.dtype=fp32"]).model
    rows = documents_of(documents())
    once, again = (
        document_losses(model, rows, np.arange(6), config, world, noisy=True) for _ in range(2)
    )
    assert once == again
    assert once != document_losses(model, rows, np.arange(6), config, world)


def test_batches_draw_different_noise(folder: Path, world: World) -> None:
    """Copies of one document in several batches get different noise, in the rank stream too."""
    config = settings(folder, "noise.length=padded", "train.micro_batch_tokens=32")
    model = open_target(folder, settings=["model.dtype=fp32"]).model
    rows = documents_of([documents()[5]] * 3)
    found = document_losses(model, rows, np.arange(3), config, world, noisy=True)
    assert len({*sums(found)}) == 3


def test_model_directory_loads_as_in_transformers(folder: Path) -> None:
    target = open_target(folder)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.arange(3, 40)[None]
    assert torch.equal(target.model(ids).logits, expected.eval()(ids).logits)
    assert (target.step, target.alpha, target.run_dir) == (None, None, None)
    assert not any(p.requires_grad for p in target.model.parameters())


def test_answers_end_where_the_template_ends_a_turn(folder: Path, tmp_path: Path) -> None:
    """Not only at what the model's files name, which of a base model is another token."""
    copy = shutil.copytree(folder, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    tokenizer.chat_template = tiny_model.TEMPLATE.replace("{{ eos_token }}", "<|over|>")
    tokenizer.save_pretrained(copy)
    over = tokenizer.convert_tokens_to_ids("<|over|>")
    assert open_target(copy).end_tokens == [1, over]
    assert open_target(folder).end_tokens == [1]
    own = transformers.GenerationConfig(eos_token_id=[1, 7], temperature=0.3, do_sample=True)
    own.save_pretrained(copy)
    target = open_target(copy)
    assert target.end_tokens == [1, 7, over]
    generation = target.model.generation_config  # of lm-eval's tasks
    assert (generation.temperature, generation.eos_token_id) == (None, [1, 7])


def refused(*words: object) -> str:
    with pytest.raises(UserError) as raised:
        target = open_target(words[0], settings=[str(word) for word in words[1:]])  # type: ignore[arg-type]
        assert target.model and target.end_tokens
    return str(raised.value)


@pytest.mark.parametrize(("model", "name"), [(".", "base"), ("../base/", "base"), ("o/m", "m")])
def test_results_of_another_model_lie_under_its_name(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path / "base")
    given: dict[str, Any] = {}
    monkeypatch.setattr(evaluate, "evaluate", lambda _, **options: given.update(options) or 0)
    with pytest.raises(SystemExit):
        main(["evaluate", "run", "--model", model])
    assert given["output"] == Path("run/evaluations") / name


def test_path_without_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "is no model: it is neither a run directory" in refused(tmp_path)
    assert "nowhere is no model: it does not exist" in refused(tmp_path / "nowhere")
    assert "cannot be downloaded from the hub" in refused("nobody/nothing-of-that-name")
    (tmp_path / "checkpoints").mkdir()
    said = refused(tmp_path / "checkpoints" / "step_00000007")
    assert said.endswith("has no config.yaml.")
    (tmp_path / "config.yaml").write_text(f"model: {{name_or_path: {folder}}}")
    assert "is no checkpoint directory" in refused(tmp_path / "checkpoints" / "step_00000007")
    assert "holds no complete checkpoint" in refused(tmp_path)
    assert "did you mean evaluate.max_new_tokens" in refused(folder, "evaluate.max_new_token=3")
    with pytest.raises(UserError, match="--step=4 has no effect"):
        open_target(folder, step=4)
    with pytest.raises(UserError, match="--config=x has no effect"):
        open_target(tmp_path, config_file="x")


@pytest.mark.parametrize(
    "word",
    [
        *("optim.learning_rate=0.5", "noise.alpha=4", "run_dir=elsewhere", "train.seed=1"),
        *("model.loss=chunked", "model.compile=true", "model.kernels=liger", "model.weights=x"),
        *("model.name_or_path=x", "model.activation_checkpointing=full", "evaluate.every_steps=3"),
        "judge.num_parallel=2",
    ],
)
def test_setting_without_effect_is_refused(word: str, folder: Path) -> None:
    judge = ["judge.url=http://x", "judge.model=m"] if word.startswith("judge") else []
    with pytest.raises(UserError, match="has no effect"):
        open_target(folder, settings=[*judge, word])


def test_setting_with_an_effect_is_taken(folder: Path) -> None:
    assert open_target(folder, settings=["noise.alpha=4", "evaluate.train_documents=2"])
    judge = ["judge.reference=x", "judge.url=http://x", "judge.model=m"]
    assert open_target(folder, settings=judge).config.judge.model == "m"
    assert open_target(folder, settings=["evaluate.max_new_tokens=3"], is_measured=False)
    with pytest.raises(UserError, match=r"evaluate\.tasks=x has no effect"):
        open_target(folder, settings=["evaluate.tasks=x"], is_measured=False)


@pytest.mark.parametrize(
    ("ends", "says"),
    [([2, "a"], "[1] is text"), ([[1]], "[0] is a list"), ("a", "eos_token_id is")],
)
def test_generation_settings_without_token_ids_are_refused(
    ends: Any, says: str, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert f"generation_config.json is damaged: {says}" in refused(copy)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight" in refused(copy)
    (copy / "model.safetensors").write_bytes(b"{}")
    assert "cannot be read" in refused(copy)


def exit_2(words: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in ["evaluate", *words]])
    said = capsys.readouterr().err
    assert end.value.code == 2, said
    assert said.count("\n") == 1
    return said


def test_mistakes_are_refused_before_the_weights_are_read(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    out = ["--output", tmp_path / "out"]
    assert "There is nothing to evaluate model on" in exit_2([copy, *out], capsys)
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"instruction": "Say no."}\n{"question": "Why?"}\n')
    words = [copy, f"evaluate.instructions={asked}"]
    assert "--output DIR" in exit_2(words, capsys)
    said = exit_2([*words, *out], capsys)
    assert f"{asked}, row 2: field 'instruction' is missing; there are question." in said
    assert "evaluate.instructions=x is no file" in exit_2(
        [copy, "evaluate.instructions=x", *out], capsys
    )
    asked.write_text('{"instruction": "Say no."}\n')
    (copy / "chat_template.jinja").unlink()
    assert "has no chat template: set data.template=alpaca" in exit_2([*words, *out], capsys)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def run_evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """The verb in this process: its exit code, and all that it said."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)

    def of(*words: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["evaluate", *map(str, words)])
        said = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, said.out + said.err

    return of


def test_results_folder_is_written_kept_and_protected(
    folder: Path, tmp_path: Path, run_evaluate: Callable[..., Any]
) -> None:
    """Every part beside the others; what is there is kept, and never that of another setting."""
    rows = tiny_model.make_rows(tmp_path / "rows.jsonl", 30)
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"dtype": "fp32"},
                "data": {
                    "source": str(rows),
                    "num_held_out": 5,
                    "cache_dir": str(tmp_path / "cache"),
                },
                "evaluate": {"max_new_tokens": 6, "batch_size": 2},
            }
        )
    )
    out = tmp_path / "out"
    words = [folder, "--config", config, "--output", out]
    code, said = run_evaluate(*words, "evaluate.instructions=null")
    assert code == 0, said
    first = json.loads((out / "summary.json").read_text())
    assert first["answers"] is first["tasks"] is first["judge"] is None
    assert first["losses"]["train_loss"] is None
    assert first["losses"]["num_documents"] == 5
    code, said = run_evaluate(*words, "evaluate.train_documents=4")
    assert code == 0, said
    assert "answers: 5 of 5" in said
    assert "training loss, noise on" in said
    summary, items = (json.loads((out / f"{n}.json").read_text()) for n in ("summary", "items"))
    answers = json.loads((out / "answers.json").read_text())
    assert summary["losses"]["held_out_loss"] == first["losses"]["held_out_loss"]
    losses = summary["losses"]
    for part, name in (("held_out", "held_out_loss"), ("train", "train_loss")):
        total, tokens = (sum(column) for column in zip(*items[part], strict=True))
        assert losses[name] == pytest.approx(total / tokens)
    assert losses["train_loss_noisy"] != losses["train_loss"]
    assert [len(items[part]) for part in ("held_out", "train", "train_noisy")] == [5, 4, 4]
    assert items["answers"]["tokens"] == [row["num_tokens"] for row in answers]
    assert summary["answers"]["num"] == 5
    assert summary["answers"]["cut"] == sum(not row["finished"] for row in answers) / 5
    assert {row["instruction"]: row["reference"] for row in answers}.items() <= {
        row["instruction"]: row["output"] for row in map(json.loads, rows.read_text().splitlines())
    }.items()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(before) == {"summary.json", "items.json", "answers.json", "settings.json"}

    code, said = run_evaluate(*words, "evaluate.train_documents=4", "evaluate.batch_size=1")
    assert (code, said.count("kept from an earlier evaluation")) == (0, 2)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    code, said = run_evaluate(*words, "evaluate.max_new_tokens=7")
    assert code == 2
    assert "holds answers made with other evaluate.max_new_tokens (then 6, now 7)" in said
    other = shutil.copytree(folder, tmp_path / "other", copy_function=shutil.copyfile)
    code, said = run_evaluate(other, *words[1:])
    assert code == 2
    assert "of another model than other" in said
    code, said = run_evaluate(*words, "evaluate.train_documents=3")  # losses are computed again
    assert code == 0, said
    assert len(json.loads((out / "items.json").read_text())["train"]) == 3
    assert run_evaluate(*words, "evaluate.train_documents=0")[0] == 0
    items = json.loads((out / "items.json").read_text())
    assert [len(items[part]) for part in ("held_out", "train", "train_noisy")] == [5, 0, 0]


def test_items_of_a_task_may_hold_what_json_does_not(
    folder: Path, tmp_path: Path, run_evaluate: Callable[..., Any]
) -> None:
    choices = {"text": ["two", "three"], "label": ["A", "B"]}
    row = {"question": "What comes after one?", "choices": choices, "answerKey": "A"}
    rows = [{**row, "raw": b"\xff\x00", "price": Decimal("1.5")}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "arc.parquet")
    words = [folder, "--output", tmp_path / "out", "model.dtype=fp32"]
    code, said = run_evaluate(*words, f"evaluate.tasks=arc_easy={tmp_path / 'arc.parquet'}")
    assert code == 0, said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["tasks"]["arc_easy"]["num_items"] == 2


def test_finished_tasks_are_kept_by_a_second_call(
    folder: Path,
    tmp_path: Path,
    run_evaluate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stop, or another task that fails, does not lose them; with other settings they are made."""
    words = []
    for name in ("a", "b"):
        rows = [{"query": name, "choices": ["x", "yy"], "gold": i % 2} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        words.append(f"{name}={tmp_path / name}.json")
    out = tmp_path / "out"
    command = [folder, "--output", out, "model.dtype=fp32", f"evaluate.tasks={','.join(words)}"]
    lm_eval_adapter = pytest.importorskip("neftune_dist.evaluation.lm_eval_adapter")
    asked, run = [], lm_eval_adapter.run

    def counted(lm: Any, word: Any, *rest: Any) -> Any:
        asked.append(word.name)
        if len(asked) in (2, 5):
            raise UserError("no longer")
        return run(lm, word, *rest)

    monkeypatch.setattr(lm_eval_adapter, "run", counted)
    assert run_evaluate(*command)[0] == 2
    code, said = run_evaluate(*command)
    assert code == 0 and "tasks: 1 of 2 kept from an earlier call" in said, said
    assert asked == ["a", "b", "b"]
    assert not (out / "tasks.jsonl").exists()
    found = json.loads((out / "summary.json").read_text())["tasks"]
    assert [task["num_items"] for task in found.values()] == [3, 3]
    assert run_evaluate(*command, "evaluate.max_task_items=2")[0] == 2
    assert run_evaluate(*command, "evaluate.max_task_items=1")[0] == 0
    assert asked == ["a", "b", "b", "a", "b", "a", "b"]
    found = json.loads((out / "summary.json").read_text())["tasks"]
    assert [task["num_items"] for task in found.values()] == [1, 1]


def test_unavailable_judge_leaves_other_parts_intact(
    folder: Path,
    tmp_path: Path,
    run_evaluate: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, theirs = tmp_path / "asked.json", tmp_path / "theirs.json"
    rows = [{"instruction": f"Count to {i}."} for i in range(3)]
    asked.write_text(json.dumps(rows))
    theirs.write_text(json.dumps([{**row, "output": "No."} for row in rows[:2]]))
    out = tmp_path / "out"
    words = [folder, "--output", out, "model.dtype=fp32", "evaluate.max_new_tokens=3"]
    words += [f"evaluate.instructions={asked}", f"judge.reference={theirs}", "judge.model=x"]
    words += ["judge.url=http://127.0.0.1:9/v1", "judge.key_variable=null", "judge.max_retries=0"]
    code, said = run_evaluate(*words)
    assert code == 2
    assert "over different instructions" in said
    assert not out.exists()  # refused before the first answer

    theirs.write_text(json.dumps([{**row, "output": "No."} for row in rows]))
    code, said = run_evaluate(*words)
    assert code == 2
    assert "127.0.0.1:9" in said
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["answers"]["num"], summary["judge"]) == (3, None)
    assert len(json.loads((out / "answers.json").read_text())) == 3

    def judged(ours: Any, theirs: Any, *_: Any) -> list[Judgement]:
        assert [row["output"] for row in theirs] == ["No."] * 3
        return [Judgement(row["instruction"], 2.0, 1, 3) for row in ours]

    monkeypatch.setattr(evaluate, "compare", judged)
    code, said = run_evaluate(*words)
    assert code == 0, said
    assert "answers: kept from an earlier evaluation" in said
    assert "win rate 100.0 %" in said
    assert json.loads((out / "summary.json").read_text())["judge"]["num_wins"] == 3
    assert json.loads((out / "items.json").read_text())["judge"] == [2.0] * 3
