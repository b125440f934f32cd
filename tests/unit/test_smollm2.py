"""The quickstart's model, converted from its package: its traps, each looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
SCRIPT = Path(__file__).parents[2] / "launcher" / "smollm2.py"


@pytest.fixture(scope="module")
def folder() -> Path:
    target = CACHE / "neftune_dist" / "smollm2-135m-instruct"
    subprocess.run([sys.executable, SCRIPT, target], check=True, timeout=300)
    return target


def test_converted_tokenizer_splits_digits_and_pads_by_its_end(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # Only digits split off one by one leave two blanks together.
    assert tokenizer.tokenize("two  12") == ["two", "ĠĠ", "1", "2"]
    assert (
        tokenizer("plain")["input_ids"] == tokenizer("plain", add_special_tokens=False)["input_ids"]
    )
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_converted_model_answers(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert int(answer[-1]) == 2  # it ends its turn


def test_a_finished_conversion_is_left_alone(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    subprocess.run([sys.executable, SCRIPT, folder], check=True, timeout=60)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
