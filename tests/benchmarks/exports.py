"""An export in other tools: the same logits and the same greedy tokens?

    python tests/benchmarks/exports.py MODEL_DIR [--adapter DIR] [--with TOOL=PYTHON ...]

MODEL_DIR is what `neftune-dist export` wrote, ADAPTER what `export --adapter` wrote of the same
run. Each tool runs in a process, under this Python or the one given for it: that of a virtual
environment with another version (--with transformers=/tmp/old/bin/python, as often as wanted). Its
float32 logits for three conversations and its greedy tokens are compared with those of this
Python's transformers. A tool that is not installed is `not tried`. Exit code 1 where one failed or
differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS = ("What is 17 + 25?", "Name three rivers.", "Say hello in French, and why.")
NUM_TOKENS = 16
TOLERANCE = 2e-3  # of logits, in float32; greedy tokens must be equal


def main() -> int:
    """Run all tools and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument(
        "--with", dest="pythons", action="append", default=[], metavar="TOOL=PYTHON"
    )
    given = parser.parse_args()
    others = [word.partition("=")[::2] for word in given.pythons]
    runs = [(tool, sys.executable) for tool in TOOLS if tool not in dict(others)]
    runs += [(tool, python) for tool, python in others if tool in TOOLS]
    runs.sort(key=lambda run: list(TOOLS).index(run[0]))
    print("| tool | version | logits differ by | greedy tokens |\n|---|---|---:|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.npz"
        np.savez(reference, **_answers_of(_transformers_model(given.model), _prompts(given.model)))
        for tool, python in runs:
            row, is_right = _try(tool, python, given.model, given.adapter, reference)
            print(f"| {tool} | {row} |", flush=True)
            failed |= not is_right
    return int(failed)


def _try(
    tool: str, python: str, model: Path, adapter: Path | None, reference: Path
) -> tuple[str, bool]:
    """The cells of a tool's row, and whether it agrees or was not there to try."""
    words = [python, __file__, "--child", tool, str(model), str(adapter or ""), str(reference)]
    done = subprocess.run([*words], capture_output=True, text=True, timeout=1200)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1][:120]
        return f"? | failed: {reason} | |", False
    if "absent" in found:
        return f"| not tried: {found['absent']} | ", True
    differs = found["difference"]
    same = "the same" if found["same"] else "others"
    return (
        f"{found['version']} | {differs:.1e} | {same} |".removesuffix(" |"),
        found["same"] and differs < TOLERANCE,
    )


def child(tool: str, model: str, adapter: str, reference: str) -> None:
    """Compute with one tool and print how far it is from the reference, as JSON."""
    distribution, run = TOOLS[tool]
    try:
        number = version(distribution)
    except PackageNotFoundError:
        print(json.dumps({"absent": f"{distribution} is not installed"}))
        return
    if run is _peft and not adapter:
        print(json.dumps({"absent": "needs --adapter"}))
        return
    expected = dict(np.load(reference))
    found = run(Path(model), Path(adapter), expected)
    difference, same = 0.0, True
    for key, value in found.items():
        if key.startswith("tokens"):
            same &= bool(np.array_equal(value, expected[key]))
        else:
            difference = max(difference, float(np.abs(value - expected[key]).max()))
    print(json.dumps({"version": number, "difference": difference, "same": same}))


def _prompts(folder: Path) -> list[list[int]]:
    """The questions by the export's own chat template."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def _transformers_model(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()


def _answers_of(model: Any, prompts: list[list[int]]) -> dict[str, np.ndarray]:
    """Prompts, their logits and greedy tokens, one after another without a cache: no tool's own
    generation decides."""
    import torch

    found = {}
    for i, prompt in enumerate(prompts):
        ids = list(prompt)
        for step in range(NUM_TOKENS):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].float().numpy()
            if not step:
                found[f"logits{i}"] = logits
            ids.append(int(logits[-1].argmax()))
        found[f"tokens_prompt{i}"] = np.array(prompt)
        found[f"tokens{i}"] = np.array(ids[len(prompt) :])
    return found


def _transformers(folder: Path, _: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    return _answers_of(_transformers_model(folder), _prompts(folder))


def _peft(folder: Path, adapter: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The base model with the adapter, against the merged export."""
    import peft

    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).float().eval()
    return _answers_of(model, _prompts(folder))


def _trl(folder: Path, _: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The model as TRL's trainer loads it, after a step at a learning rate of 0."""
    import datasets
    import trl

    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "Yes."}]}
        for q in QUESTIONS
    ]
    with tempfile.TemporaryDirectory() as output:
        settings = trl.SFTConfig(
            output_dir=output,
            max_steps=1,
            learning_rate=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        )
        trainer = trl.SFTTrainer(
            str(folder), settings, train_dataset=datasets.Dataset.from_list(rows)
        )
        trainer.train()
        return _answers_of(trainer.model.eval(), _prompts(folder))


def _lm_eval(folder: Path, _: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The log-likelihood of the reference's greedy tokens, and whether they are greedy to it."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    found = {}
    for i in range(len(QUESTIONS)):
        prompt, answer = (expected[f"{name}{i}"].tolist() for name in ("tokens_prompt", "tokens"))
        [(_, greedy)] = model._loglikelihood_tokens([(("", ""), prompt, answer)], disable_tqdm=True)
        found[f"tokens{i}"] = np.array(answer if greedy else [])
        [(one, _)] = model._loglikelihood_tokens(
            [(("", ""), prompt, answer[:1])], disable_tqdm=True
        )
        logits = expected[f"logits{i}"][-1].astype(np.float64)
        most = logits.max()
        by_reference = logits[answer[0]] - most - np.log(np.exp(logits - most).sum())
        # Of one token, as a difference of logits.
        found[f"logits{i}"] = expected[f"logits{i}"] + (one - by_reference)
    return found


def _ctranslate2(folder: Path, _: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """The model as CTranslate2's converter writes it, by its own generation."""
    import ctranslate2
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = {}
    with tempfile.TemporaryDirectory() as output:
        converter = ctranslate2.converters.TransformersConverter(str(folder))
        converter.convert(output, force=True)
        generator = ctranslate2.Generator(output, device="cpu", compute_type="float32")
        for i, prompt in enumerate(_prompts(folder)):
            tokens = tokenizer.convert_ids_to_tokens(prompt)
            logits = np.array(generator.forward_batch([tokens]))[0]
            found[f"logits{i}"] = logits[:, : expected[f"logits{i}"].shape[1]]
            [answer] = generator.generate_batch(
                [tokens],
                max_length=NUM_TOKENS,
                sampling_topk=1,
                return_end_token=True,
                include_prompt_in_result=False,
            )
            # The reference goes on after an end token.
            ids = answer.sequences_ids[0]
            found[f"tokens{i}"] = np.array([*ids, *expected[f"tokens{i}"][len(ids) :]])
    return found


def _gguf(folder: Path, _: Path, expected: dict[str, Any]) -> dict[str, np.ndarray]:
    """llama.cpp's converter, whose file transformers reads again."""
    import transformers

    with tempfile.TemporaryDirectory() as output:
        file = Path(output) / "model.gguf"
        words = [sys.executable, "-m", "convert_hf_to_gguf", str(folder), "--outtype", "f32"]
        subprocess.run([*words, "--outfile", str(file)], check=True, stdout=subprocess.DEVNULL)
        model = transformers.AutoModelForCausalLM.from_pretrained(output, gguf_file=file.name)
        return _answers_of(model.eval(), _prompts(folder))


# By name: the distribution whose version is shown, and what runs it.
TOOLS: dict[str, tuple[str, Callable[[Path, Path, dict[str, Any]], dict[str, np.ndarray]]]] = {
    "transformers": ("transformers", _transformers),
    "peft": ("peft", _peft),
    "trl": ("trl", _trl),
    "lm-eval": ("lm-eval", _lm_eval),
    "ctranslate2": ("ctranslate2", _ctranslate2),
    "convert_hf_to_gguf": ("convert-hf-to-gguf", _gguf),
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.exit(main())
