"""A checkpoint as a Hugging Face model directory, on one small machine: no process group, no GPU.

Tensors stream from the checkpoint into safetensors files; the peak of host memory is near one file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from neftune_dist.checkpoint import flat, store
from neftune_dist.config import UserError
from neftune_dist.engine.base import MASTER, FlatShard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FILE_BYTES = 4 * 2**30
# Everything in a model directory that is not weights: configuration, tokenizer, code.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
MODEL_FOLDER = "model"  # in a run directory: those files, so that export needs nothing else


def keep_small_files(model_folder: Path, run_dir: Path) -> None:
    """Copy what an export needs beside the weights into the run directory."""
    target = run_dir / MODEL_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _SMALL:
        for file in model_folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def export(
    run_dir: Path,
    output: Path | None = None,
    *,
    step: int | None = None,
    dtype: str = "original",
    log: Callable[[str], None] = print,
) -> Path:
    """Write the model of a run's checkpoint to `output` (default RUN_DIR/export); its path.

    Args:
        step: of the checkpoint; None: the newest complete one.
        dtype: original (the base model's), fp32, bf16 or fp16.

    Raises:
        UserError: no such checkpoint, a damaged one, or `output` cannot be written.
    """
    checkpoint = _choose(run_dir, step)
    if flaw := checkpoint.first_flaw():
        raise UserError(
            f"The checkpoint {checkpoint.folder} is damaged: {flaw} is not what was written. "
            "Choose another with --step."
        )
    state = checkpoint.trainer_state()
    output = output or run_dir / "export"
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted((run_dir / MODEL_FOLDER).iterdir()):
            shutil.copyfile(file, partial / file.name)
        chosen = _set_dtype(partial / "config.json", dtype)
        _write_weights(checkpoint.folder, state, partial, chosen)
        (partial / "README.md").write_text(_card(state))
        if output.exists():
            if not (output / "config.json").exists():
                raise UserError(f"{output} exists and is no export: choose another --output.")
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"exported step {checkpoint.step} to {output} ({str(chosen).removeprefix('torch.')})")
    return output


def _choose(run_dir: Path, step: int | None) -> store.Checkpoint:
    found = store.find_all(run_dir)
    if not found:
        raise UserError(f"{run_dir} holds no complete checkpoint to export.")
    if step is None:
        return found[0]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(c.step) for c in found)
    raise UserError(f"{run_dir} has no complete checkpoint of step {step}; it has: {steps}.")


def _set_dtype(path: Path, dtype: str) -> torch.dtype:
    config = json.loads(path.read_text())
    if dtype == "original":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
        chosen = getattr(torch, name)
    else:
        chosen = DTYPES[dtype]
    config.pop("torch_dtype", None)
    config["dtype"] = str(chosen).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")
    assert isinstance(chosen, torch.dtype)
    return chosen


def _write_weights(
    folder: Path, state: Mapping[str, Any], output: Path, dtype: torch.dtype
) -> None:
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name in shapes:
        if files[-1] and sum(size[n] for n in files[-1]) + size[name] > _FILE_BYTES:
            files.append([])
        files[-1].append(name)
    reader = flat.Reader(folder, alone=True)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = {}
        for name in names:
            numel = math.prod(shapes[name])
            whole = FlatShard(MASTER, name, 0, torch.empty(numel), numel)
            reader.read([whole])
            tensors[name] = whole.tensor[:].to(dtype).view(shapes[name])
            weight_map[name] = file
        # Tied weights are stored once, as transformers does.
        save_file(tensors, output / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _card(state: Mapping[str, Any]) -> str:
    config = state["config"]
    noise, train, optim = config["noise"], config["train"], config["optim"]
    how = (
        f"NEFTune noise (arXiv 2310.05914), alpha {noise['alpha']} ({noise['schedule']}), "
        f"{noise['distribution']}, {noise['length']} length, {noise['stream']} stream"
        if noise["alpha"]
        else "no embedding noise"
    )
    progress = state["progress"]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# Fine-tuned model

Base model: `{config["model"]["name_or_path"]}`. Data: `{config["data"]["source"]}`.
Trained by neftune_dist {state["versions"]["neftune_dist"]} with {how}.

| | |
|---|---|
| steps | {progress["step"]} of {train["global_batch_size"]} documents |
| tokens | {progress["num_tokens"]}, {progress["num_supervised_tokens"]} of them supervised |
| longest document | {config["data"]["max_length"]} tokens |
| learning rate | {optim["learning_rate"]}, {optim["schedule"]}, warm-up {optim["warmup_steps"]} |
| compute | {config["model"]["dtype"]}, {config["engine"]["name"]}, {state["world_size"]} ranks |
"""
