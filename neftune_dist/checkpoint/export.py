"""A checkpoint as a Hugging Face model directory, made on one machine without a GPU.

Tensors stream from the checkpoint into safetensors files; the peak of host memory is near the size
of one file. Their names and shapes are those of the base's own files (experts by their number), or
what `save_pretrained` would write where the base was a trainer's checkpoint. Adapters are merged
into the base weights, or written alone for PEFT. Around a wrapper's text model, its towers are
copied from the base's files as they are, whatever dtype the text model is written in.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from neftune_dist.checkpoint import choice, marked_folder, store
from neftune_dist.checkpoint.merged import ModelTensors, adapter_of, open_towers
from neftune_dist.checkpoint.run_files import (
    CHAT_TEMPLATE,
    check_architecture,
    check_sealed,
    files_within,
)
from neftune_dist.config import ModelConfig, UserError, read_json
from neftune_dist.engine.base import dtype_name
from neftune_dist.model import load
from neftune_dist.model.adapters import peft_name, peft_settings
from neftune_dist.model.multimodal import Wrapper, text_settings
from neftune_dist.model.stored_tensors import split
from neftune_dist.model.weights import WeightFiles
from neftune_dist.system import storage
from neftune_dist.system.checkpoint_names import MODEL_FOLDER
from neftune_dist.system.text import count_text

# Of --dtype, where it is not "original"; and those in which weights are written.
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WRITTEN = (*_NAMES.values(), "float64")
MARK = "neftune_export.json"  # in an export, which lists its files
_FILE_BYTES = 4 * 2**30


def export(
    run_dir: Path,
    output: Path | None = None,
    *,
    step: choice.StepChoice = None,
    dtype: str = "original",
    adapter: bool = False,
    before_writing: Callable[[], None] = lambda: None,
    log: Callable[[str], None] = print,
) -> Path:
    """Write the model of a run's checkpoint to `output`; return its path.

    Args:
        output: default RUN_DIR/export, or RUN_DIR/adapter. Replaced if it is an earlier export.
        step: of the checkpoint; None: the newest complete one; "best": of the lowest held-out loss.
        dtype: original (the base model's, of an adapter fp32), fp32, bf16 or fp16.
        adapter: write the trained adapter alone, as PEFT loads it.
        before_writing: called once nothing but damage could prevent the export.
        log: takes a line about what was written.

    Raises:
        UserError: no such checkpoint, a damaged one, frozen weights that are missing, or an
            `output` that cannot be written or holds files of others.
    """
    checkpoint = choice.choose(run_dir, step)
    state = checkpoint.trainer_state()
    check_sealed(run_dir)
    check_architecture(run_dir, state)
    adapted = adapter_of(state)
    if adapter and adapted.method == "none":
        raise UserError(f"{run_dir} trained no adapter: leave out --adapter.")
    output = output or run_dir / ("adapter" if adapter else "export")
    place = Path(os.path.realpath(output))  # a link's target
    _refuse_place(place, run_dir, state)
    marked_folder.refuse_other(place, MARK, thorough=False)
    before_writing()
    if flaw := checkpoint.first_flaw():  # which reads all of it
        raise store.damage_error(checkpoint, flaw)
    with storage.writing(str(output)), marked_folder.replaced(place, MARK) as folder:
        for file in files_within(run_dir / MODEL_FOLDER):
            shutil.copyfile(file, folder / file.name)
        chosen = _set_dtype(folder / "config.json", dtype)
        _add_earlier_names(folder)
        if adapter:
            (folder / "config.json").unlink()
            wrapper = _wrapper(run_dir) if "towers" in state["identity"] else None
            chosen = torch.float32 if dtype == "original" else chosen
            content = ModelTensors.trained(checkpoint.folder, state)
            _write_adapter(content, wrapper, state, folder, chosen)
        else:
            towers = open_towers(checkpoint.folder, state)
            _write_weights(ModelTensors.of(checkpoint.folder, state), towers, folder, chosen)
        (folder / "README.md").write_text(_card(state, folder))
    log(f"exported step {checkpoint.step} to {output} ({dtype_name(chosen)})")
    return output


def _refuse_place(place: Path, run_dir: Path, state: Mapping[str, Any]) -> None:
    """Raise `UserError` for a place that holds, or lies in, the run's files or its base model."""
    model = state["config"]["model"]
    kept = {"the run's directory": run_dir}
    with suppress(OSError):  # the working directory may have been removed
        kept["the working directory"] = Path.cwd()
    for what, name in (("base model", model["name_or_path"]), ("base weights", model["weights"])):
        if name:
            kept[f"the run's {what}"] = Path(os.path.expanduser(name))
    for what, path in kept.items():
        real = Path(os.path.realpath(path))
        if any(_same(place, path) for path in (real, *real.parents)):
            holds = "" if _same(place, real) else ", or holds it"
            raise UserError(f"--output={place} is {what}{holds}: choose another.")
    for name in ("checkpoints", MODEL_FOLDER):
        if place.is_relative_to(os.path.realpath(run_dir / name)):
            raise UserError(f"--output={place} is where the run keeps its {name}: choose another.")


def _same(one: Path, other: Path) -> bool:
    """Whether both exist and are the same folder."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def _set_dtype(path: Path, dtype: str) -> torch.dtype:
    config = read_json(path)
    text = text_settings(config)
    keys = ("dtype", "torch_dtype")
    stated = [part.get(key) for part in (config, text) for key in keys]
    name = _NAMES.get(dtype) or next(filter(None, stated), "float32")
    if name not in _WRITTEN:
        raise UserError(
            f"{path.name} of the base model has dtype={name}, in which no weights can be written: "
            "set --dtype."
        )
    config.update(dict.fromkeys(keys, name))
    text.update({key: name for key in keys if key in text})
    path.write_text(json.dumps(config, indent=2) + "\n")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def _add_earlier_names(folder: Path) -> None:
    """Say under the names of transformers 4, too, what version 5 has renamed: version 4 and other
    tools would silently rotate by their default frequencies, and not find the tokenizer's class."""
    path = folder / "config.json"
    config = read_json(path)
    text = text_settings(config)
    rope = text.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # not one for each type of layer
        moved = ("rope_theta", "partial_rotary_factor")
        earlier = {key: rope[key] for key in moved if key in rope}
        if rope.get("rope_type", "default") != "default":
            earlier["rope_scaling"] = {k: v for k, v in rope.items() if k not in moved}
        text.update({**earlier, **text})
        path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    if path.exists():
        settings = read_json(path)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            path.write_text(json.dumps(settings, indent=2) + "\n")


def _write_weights(
    content: ModelTensors, towers: WeightFiles | None, output: Path, dtype: torch.dtype
) -> None:
    """Write the model's tensors in `dtype`, and towers as they are in the base's files."""
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in content.shapes.items()}
    if towers is not None:
        size |= {name: tensor.nbytes for name, tensor in towers.others.items()}
    files = huggingface_hub.split_state_dict_into_shards_factory(
        size,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_FILE_BYTES,
    )
    weight_map = {}
    for file, names in files.filename_to_tensors.items():
        # Tied weights are stored once, as transformers does.
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            if towers is not None and name in towers.others:
                tensors[name] = towers.read_other(name)
                continue
            tensor = content.read(name)
            if name not in content.constants:
                tensor = _rounded(name, tensor, dtype)
            tensors |= split(tensor, content.layout[name])
        weight_map.update(dict.fromkeys(tensors, file))
        _save(tensors, output / file)
    if files.is_sharded:
        index = {"metadata": files.metadata, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in `dtype`. Raises `UserError` where that makes a number infinite."""
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and not torch.equal(rounded.isinf(), tensor.isinf()):
        raise UserError(f"{name} has values too large for fp16: set --dtype=bf16 or fp32.")
    return rounded


def _wrapper(run_dir: Path) -> Wrapper | None:
    """The wrapper of the text model that a run trained."""
    folder, config = run_dir / MODEL_FOLDER, ModelConfig()
    text_model = load.build(folder, config, packing=False)
    return Wrapper.around(text_model, load.load_model_config(folder, config))


def _write_adapter(
    trained: ModelTensors,
    wrapper: Wrapper | None,
    state: Mapping[str, Any],
    output: Path,
    dtype: torch.dtype,
) -> None:
    tensors, layers = {}, set()
    for name in trained.shapes:
        layer, saved = peft_name(wrapper.name(name) if wrapper else name)
        tensors[saved] = _rounded(name, trained.read(name), dtype)
        layers.add(layer)
    # Towers have layers of these names, too.
    targets = wrapper.pattern(layers) if wrapper else sorted(layers)
    _save(tensors, output / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": state["config"]["model"]["name_or_path"],
        "inference_mode": True,
        **peft_settings(adapter_of(state), targets),
    }
    (output / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # by the umask; safetensors lets the owner alone read its files
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # also for a full disk
        number = re.search(r"os error (\d+)", str(error))
        cause = (int(number[1]), os.strerror(int(number[1]))) if number else (str(error),)
        raise OSError(*cause) from error
    path.chmod(mode)


def _card(state: Mapping[str, Any], folder: Path) -> str:
    config = state["config"]
    prompts = f"data.template={config['data']['template']}"
    if config["data"]["template"] != "chat" and not (folder / CHAT_TEMPLATE).exists():
        prompts += ", for which there is no chat template here"
    elif config["data"].get("system_prompt") is not None:
        prompts += "; the chat template puts data.system_prompt in front"
    noise, train, optim = config["noise"], config["train"], config["optim"]
    adapter = adapter_of(state)
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
    is_wrapped = "towers" in state["identity"]
    if is_wrapped:
        trained += " of the text model; the towers are the base's"
    task = "image-text-to-text" if is_wrapped else "text-generation"
    ranks = count_text(state["world_size"], "rank")
    return f"""---
library_name: transformers
pipeline_tag: {task}
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
| compute | {config["model"]["dtype"]}, {config["engine"]["name"]}, {ranks} |
"""
