"""A model that was trained on a ChatML set ends its answers, with the settings that a user has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.support import tiny_model
from tests.support.shared_data import shared, smollm2_files

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
ROWS = [{"instruction": f"Say {word}.", "output": f"It is {word}."} for word in WORDS]


def answers(folder: Path, model: Path, steps: int, learning_rate: float, **settings: str) -> Path:
    """Train on the rows, and answer their questions."""
    rows, template = folder / "rows.json", folder / "chatml.jinja"
    rows.write_text(json.dumps(ROWS))
    template.write_text(CHATML)
    config = folder / "config.yaml"
    sections = {
        "model": {"name_or_path": str(model), "dtype": "fp32", **settings},
        "data": {
            "source": str(rows),
            "template": str(template),
            "system_prompt": "You answer briefly.",
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"learning_rate": learning_rate, "schedule": "constant", "warmup_steps": 0},
        "train": {"global_batch_size": 8, "micro_batch_tokens": 512, "max_steps": steps},
        "evaluate": {"instructions": str(rows), "max_new_tokens": 24},
        "logging": {"progress": False},
    }
    config.write_text(json.dumps(sections))
    records = tiny_model.train(config, folder / "run")
    assert records[-1]["loss"] < records[0]["loss"]
    done = tiny_model.run_forked("evaluate", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    [file] = (folder / "run" / "evaluations").glob("*/answers.json")
    return file


def check(file: Path) -> None:
    said = json.loads(file.read_text())
    assert len(said) == len(ROWS)
    assert all(row["finished"] for row in said), [row["output"] for row in said]
    assert all(row["num_tokens"] > 0 for row in said)


def test_llama_with_added_tokens_ends_its_answers(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared("tokenizers/llama2-32k"))
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    file = answers(tmp_path, model, 60, 5e-3, add_tokens="<|im_start|>,<|im_end|>")
    check(file)
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ends = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert ends["eos_token_id"] == [2, made.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.timeout(400)
def test_smollm2_ends_its_answers(tmp_path: Path) -> None:
    check(answers(tmp_path, smollm2_files(), 6, 1e-4))
