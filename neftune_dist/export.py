"""A checkpoint as a Hugging Face model directory, on one small machine: no process group, no GPU.

Tensors stream from the checkpoint into safetensors files; the peak of host memory is near one file.
What a run trained beside frozen weights is merged into them, or written alone, as PEFT has it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neftune_dist.checkpoint import flat, store
from neftune_dist.config import AdapterConfig, ModelConfig, UserError
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.model import load
from neftune_dist.model.adapters import merged, peft_name, peft_settings, quantized_names

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FILE_BYTES = 4 * 2**30
# Everything in a model directory that is not weights: configuration, tokenizer, code.
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
_CHAT_TEMPLATE = "chat_template.jinja"
MODEL_FOLDER = "model"  # in a run directory: those files, so that export needs nothing else


def keep_small_files(model_folder: Path, run_dir: Path) -> None:
    """Copy what an export needs beside the weights into the run directory."""
    target = run_dir / MODEL_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _SMALL:
        for file in model_folder.glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def keep_vocabulary(tokenizer: Any, num_rows: int, run_dir: Path) -> None:
    """Put a tokenizer with new tokens in the place of the model's own, and say how many rows its
    embedding has now."""
    target = run_dir / MODEL_FOLDER
    tokenizer.save_pretrained(target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": num_rows}, indent=2) + "\n")


def keep_template(source: str | None, run_dir: Path) -> None:
    """Put the chat template that a run trains with in the place of the model's own, which would
    now be another; None: it has none."""
    target = run_dir / MODEL_FOLDER
    own = target / "tokenizer_config.json"
    if own.exists():
        settings = json.loads(own.read_text())
        settings.pop("chat_template", None)
        own.write_text(json.dumps(settings, indent=2) + "\n")
    if source is None:
        (target / _CHAT_TEMPLATE).unlink(missing_ok=True)
    else:
        (target / _CHAT_TEMPLATE).write_text(source, encoding="utf-8")


def export(
    run_dir: Path,
    output: Path | None = None,
    *,
    step: int | None = None,
    dtype: str = "original",
    adapter: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Write the model of a run's checkpoint to `output` (default RUN_DIR/export); its path.

    Args:
        step: of the checkpoint; None: the newest complete one.
        dtype: original (the base model's), fp32, bf16 or fp16.
        adapter: write the trained adapter alone, as PEFT loads it (default RUN_DIR/adapter).

    Raises:
        UserError: no such checkpoint, a damaged one, frozen weights that are not where they were,
            or `output` cannot be written.
    """
    checkpoint = _choose(run_dir, step)
    if flaw := checkpoint.first_flaw():
        raise UserError(
            f"The checkpoint {checkpoint.folder} is damaged: {flaw} is not what was written. "
            "Choose another with --step."
        )
    state = checkpoint.trainer_state()
    adapted = AdapterConfig(**state["config"].get("adapter", {}))
    if adapter and adapted.method == "none":
        raise UserError(f"{run_dir} trained no adapter: leave out --adapter.")
    output = output or run_dir / ("adapter" if adapter else "export")
    partial = output.with_name(output.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted((run_dir / MODEL_FOLDER).iterdir()):
            shutil.copyfile(file, partial / file.name)
        chosen = _set_dtype(partial / "config.json", dtype)
        if adapter:
            (partial / "config.json").unlink()
            _write_adapter(checkpoint.folder, state, partial, adapted)
        else:
            _write_weights(_Content.of(checkpoint.folder, state, adapted), partial, chosen)
        (partial / "README.md").write_text(_card(state, partial))
        if output.exists():
            if not any((output / name).exists() for name in ("config.json", "adapter_config.json")):
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


@dataclass(frozen=True)
class _Content:
    """A model's tensors: their shapes by name, in order, and each of them whole, float."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @staticmethod
    def of(folder: Path, state: Mapping[str, Any], adapter: AdapterConfig) -> _Content:
        """Of a checkpoint, its adapters merged into the weights that they were trained beside."""
        shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        reader = flat.Reader(folder, alone=True)

        def trained(name: str) -> Tensor:
            return _read(reader, name, shapes[name])

        if adapter.method == "none":
            return _Content(shapes, trained)
        kept = ("name_or_path", "weights", "revision", "trust_remote_code")
        config = ModelConfig(**{key: state["config"]["model"][key] for key in kept})
        base, packing = load.find(config), state["config"]["data"]["packing"]
        plain = load.build(base, config, packing)
        files = load.open_weights(plain, base, config, seed=0)
        in_4_bits = quantized_names(load.build(base, config, packing, adapter))
        parts = {name: trained(name) for name in shapes}
        plain_shapes = {name: tuple(p.shape) for name, p in plain.named_parameters()}

        def merge(name: str) -> Tensor:
            shape = plain_shapes[name]
            weight = files.read(name, 0, math.prod(shape)).view(shape)
            return merged(name, weight, parts, adapter, name in in_4_bits)

        return _Content(plain_shapes, merge)


def _read(reader: flat.Reader, name: str, shape: tuple[int, ...]) -> Tensor:
    """A trained parameter, whole, float32."""
    numel = math.prod(shape)
    tensor = torch.empty(numel)
    reader.read([FlatShard(MASTER, name, 0, tensor, numel)])
    return tensor.view(shape)


def _write_weights(content: _Content, output: Path, dtype: torch.dtype) -> None:
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in content.shapes.items()}
    files: list[list[str]] = [[]]
    for name in content.shapes:
        if files[-1] and sum(size[n] for n in files[-1]) + size[name] > _FILE_BYTES:
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        # Tied weights are stored once, as transformers does.
        tensors = {name: content.read(name).to(dtype) for name in names}
        weight_map.update(dict.fromkeys(names, file))
        save_file(tensors, output / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_adapter(
    folder: Path, state: Mapping[str, Any], output: Path, adapter: AdapterConfig
) -> None:
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    reader, tensors, layers = flat.Reader(folder, alone=True), {}, set()
    for name, shape in shapes.items():
        layer, saved = peft_name(name)
        tensors[saved] = _read(reader, name, shape)
        layers.add(layer)
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": state["config"]["model"]["name_or_path"],
        "inference_mode": True,
        **peft_settings(adapter, sorted(layers)),
    }
    (output / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _card(state: Mapping[str, Any], folder: Path) -> str:
    config = state["config"]
    prompts = f"data.template={config['data']['template']}"
    if config["data"]["template"] != "chat" and not (folder / _CHAT_TEMPLATE).exists():
        prompts += ", for which there is no chat template here"
    elif config["data"].get("system_prompt") is not None:
        prompts += "; the chat template puts data.system_prompt in front"
    noise, train, optim = config["noise"], config["train"], config["optim"]
    adapter = AdapterConfig(**config.get("adapter", {}))
    trained = (
        "all weights"
        if adapter.method == "none"
        else f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g} ({adapter.scaling}), "
        f"on {adapter.targets} matrices, {adapter.base} weights"
    )
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
| trained | {trained} |
| prompts | {prompts} |
| steps | {progress["step"]} of {train["global_batch_size"]} documents |
| tokens | {progress["num_tokens"]}, {progress["num_supervised_tokens"]} of them supervised |
| longest document | {config["data"]["max_length"]} tokens |
| learning rate | {optim["learning_rate"]}, {optim["schedule"]}, warm-up {optim["warmup_steps"]} |
| compute | {config["model"]["dtype"]}, {config["engine"]["name"]}, {state["world_size"]} ranks |
"""
