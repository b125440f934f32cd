"""Values out of range, contradictions, and settings that would have no effect."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.paths import user_path
from neftune_dist.config.sections import (
    ACCEPTABLE_CHANGES,
    BUILTIN_SOURCE,
    CHOICES,
    PATHS,
    RANGES,
    TEMPLATES,
    TYPES,
    AdapterConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EngineConfig,
    JudgeConfig,
    LoggingConfig,
    NoiseConfig,
    listed,
)

_URL = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[\w./~%+-]*)?", re.ASCII)
# Upper case alone, in short parts, so that no key passes for a name.
_VARIABLE = re.compile(r"(?!\d)[A-Z0-9]{0,16}(_[A-Z0-9]{0,16}){0,8}", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check(config: Config) -> None:
    """Refuse values out of range and settings that contradict each other or have no effect."""
    variable = config.judge.key_variable
    if variable and not _VARIABLE.fullmatch(variable):
        raise UserError(  # without the value, which may be the key itself
            "judge.key_variable is no name of an environment variable, such as OPENAI_API_KEY: "
            "give the name, in upper case, and put the key into that variable."
        )
    for key, value in _values(config):
        known = re.sub(r"\[\d+\]", "[]", key)
        if known in CHOICES and value not in CHOICES[known]:
            allowed = ", ".join(str(c) for c in CHOICES[known] if c is not None)
            raise UserError(f"{key}={brief(value)} is not known; allowed: {allowed}.")
        if known in RANGES and value is not None:
            least, greatest, ends = RANGES[known]
            above = value >= least if ends[0] == "[" else value > least
            below = value <= greatest if ends[1] == "]" else value < greatest
            if not (above and below):  # written so that NaN is refused
                allowed = f"{'at least' if ends[0] == '[' else 'above'} {least}"
                if math.isfinite(greatest):
                    allowed += f" and {'at most' if ends[1] == ']' else 'below'} {greatest}"
                raise UserError(f"{key}={value} is out of range: it must be {allowed}.")
        if value == "" and key != "model.name_or_path":
            raise UserError(f"{key} is empty.")
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            raise UserError(f"{key}={value!a} holds characters that are no plain text.")
        if known in PATHS and value:
            user_path(value, key)
    for word in listed(config.evaluate.tasks):
        user_path(word.rpartition("=")[2] or word, "evaluate.tasks")
    _check_contradictions(config)


def _values(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; data.mixture[0].weight in a list."""
    for name, value in vars(section).items():
        if is_dataclass(value):
            yield from _values(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from _values(item, f"{prefix}{name}[{i}].")
        else:
            yield prefix + name, value


def _check_contradictions(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    if not model.name_or_path:
        raise UserError(
            "model.name_or_path is not set: give a Hugging Face model directory or a hub id."
        )
    slices = config.engine.sequence_parallel
    if data.max_length > train.micro_batch_tokens * slices:
        shared = f" on each of {slices} ranks (engine.sequence_parallel)" if slices > 1 else ""
        raise UserError(
            f"data.max_length={data.max_length} does not fit into "
            f"train.micro_batch_tokens={train.micro_batch_tokens}{shared}: a document is in one "
            "micro-batch, so raise the second or lower the first."
        )
    if slices > 1 and not (data.packing and model.attention in ("auto", "varlen")):
        raise UserError(
            f"engine.sequence_parallel={slices} goes with data.packing=true and "
            "model.attention=varlen (or auto)."
        )
    if slices > 1 and config.noise.length == "padded":
        raise UserError("noise.length=padded goes with engine.sequence_parallel=1.")
    if data.packing and model.attention in ("sdpa", "eager"):
        raise UserError(
            f"model.attention={model.attention} goes with data.packing=false; packed documents "
            "are kept apart by model.attention=varlen (or auto)."
        )
    if not data.packing and model.attention in ("varlen", "flex"):
        raise UserError(
            f"model.attention={model.attention} goes with data.packing=true; padded rows use sdpa "
            "or eager."
        )
    if train.max_steps is not None and train.num_epochs is not None:
        raise UserError("train.max_steps and train.num_epochs are both set: give one of them.")
    _check_engine(config)
    if model.float8 != "none" and (model.dtype != "bf16" or config.engine.name == "deepspeed"):
        raise UserError(
            f"model.float8={model.float8} goes with model.dtype=bf16 and engine.name=fsdp2 or "
            "single."
        )
    if model.float8 == "tensorwise" and config.engine.offload != "none":
        raise UserError(
            f"model.float8=tensorwise does not go with engine.offload={config.engine.offload}: the "
            "scales of its weights are reduced between GPUs; use model.float8=rowwise."
        )
    _check_adapter(config)
    _check_data(data)
    _check_template(data)
    _check_checkpoint(config.checkpoint)
    _check_evaluation(config)
    if not (config.logging.wandb or config.logging.mlflow):
        for key in ("project", "name"):
            if getattr(config.logging, key) != getattr(LoggingConfig(), key):
                raise UserError(
                    f"logging.{key} has no effect without logging.wandb or logging.mlflow."
                )
    if config.optim.schedule == "constant" and config.optim.final_fraction:
        raise UserError("optim.final_fraction has no effect with optim.schedule=constant.")
    _check_noise(config.noise)


# What each engine reads, beside its name.
_ENGINE_KEYS = {
    "fsdp2": ("num_replicas", "reshard_after_forward", "sequence_parallel", "offload"),
    "deepspeed": ("zero_stage", "sequence_parallel", "offload"),
    "single": (),
}


def _check_engine(config: Config) -> None:
    engine = config.engine
    for key, usual in vars(EngineConfig()).items():
        unread = key != "name" and key not in _ENGINE_KEYS[engine.name]
        if unread and getattr(engine, key) != usual:
            raise UserError(
                f"engine.{key} has no effect with engine.name={engine.name}: leave it out."
            )


def _check_adapter(config: Config) -> None:
    adapter = config.adapter
    if adapter.method == "none":
        for name, usual in vars(AdapterConfig()).items():
            if getattr(adapter, name) != usual:
                raise UserError(
                    f"adapter.{name} has no effect with adapter.method=none: set adapter.method."
                )
    elif config.model.float8 != "none":
        raise UserError(
            f"model.float8={config.model.float8} goes with adapter.method=none: frozen weights "
            "have no float8 of their own."
        )
    if adapter.method != "none" and config.model.add_tokens:
        raise UserError(
            "model.add_tokens goes with adapter.method=none: an adapter leaves the embedding of "
            "new tokens as it begins."
        )
    if adapter.method == "dora" and adapter.base == "nf4":
        raise UserError(
            "adapter.method=dora goes with adapter.base=plain: it needs the frozen matrices "
            "themselves in every step."
        )


def _check_data(data: DataConfig) -> None:
    if data.mixture:
        for key in ("source", "split", "revision", "format"):
            default = getattr(DataConfig, key)
            if getattr(data, key) != default:
                raise UserError(
                    f"data.{key}={getattr(data, key)} has no effect with data.mixture, whose "
                    f"entries have their own: leave it out, or at data.{key}={default or 'null'}."
                )
    for key, each in data.sources.items():
        if each.source == BUILTIN_SOURCE and each.format not in ("auto", "alpaca"):
            form = key.replace(".source", ".format")
            raise UserError(f"{form}={each.format} does not fit {key}=builtin: use auto.")
    ways = ("num_held_out", "held_out_fraction", "held_out_source")
    given = [f"data.{way}={getattr(data, way)}" for way in ways if getattr(data, way)]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say what is held out: give one of them.")
    for key in ("held_out_split", "held_out_revision"):
        if data.held_out is None and getattr(data, key) != getattr(DataConfig, key):
            raise UserError(f"data.{key} has no effect without data.held_out_source: leave it out.")


def _check_template(data: DataConfig) -> None:
    if data.template not in TEMPLATES and not data.template.endswith(".jinja"):
        raise UserError(
            f"data.template={brief(data.template)} is not known; allowed: {', '.join(TEMPLATES)}, "
            "or the path of a .jinja file."
        )
    if data.template == "alpaca" and data.system_prompt is not None:
        raise UserError(
            "data.system_prompt has no effect with data.template=alpaca, whose own first sentence "
            "stands in its place: leave it out."
        )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    every, for_good = checkpoint.every_steps, checkpoint.keep_every_steps
    if for_good and not checkpoint.keep:
        raise UserError("checkpoint.keep_every_steps has no effect with checkpoint.keep=0.")
    if for_good and (not every or for_good % every):
        raise UserError(
            f"checkpoint.keep_every_steps={for_good} must be a multiple of checkpoint.every_steps="
            f"{every}: no checkpoint is made at its steps."
        )
    if checkpoint.resume == "never" and checkpoint.accept_changes:
        raise UserError("checkpoint.accept_changes has no effect with checkpoint.resume=never.")
    for key in checkpoint.accepted:
        if key not in TYPES:
            raise UserError(f"checkpoint.accept_changes: unknown key {key}.")
        if not key.startswith(ACCEPTABLE_CHANGES):
            raise UserError(
                f"checkpoint.accept_changes: {key} cannot change within a run; those that can: "
                f"{', '.join(f'{each}*' for each in ACCEPTABLE_CHANGES)}."
            )


def _check_evaluation(config: Config) -> None:
    evaluate, judge = config.evaluate, config.judge
    for key in ("every_steps", "max_documents"):
        if getattr(evaluate, key) and not config.data.holds_out:
            raise UserError(
                f"evaluate.{key} has no effect without held-out documents: set data.num_held_out."
            )
    if evaluate.max_task_items and not evaluate.tasks:
        raise UserError("evaluate.max_task_items has no effect without evaluate.tasks.")
    if judge.annotator and (judge.url or judge.model):
        raise UserError(
            f"judge.annotator={brief(judge.annotator)} of the alpaca_eval package names its own "
            "endpoint and model: leave out judge.url and judge.model."
        )
    if bool(judge.url) != bool(judge.model):
        raise UserError("judge.url and judge.model go together: give both or none.")
    if not judge.url and not judge.annotator:
        for name, usual in vars(JudgeConfig()).items():
            if getattr(judge, name) != usual:
                raise UserError(f"judge.{name} has no effect without judge.url or judge.annotator.")
    if judge.annotator:
        for name in ("key_variable", "max_answer_tokens", "max_retries", "timeout_seconds"):
            if getattr(judge, name) != getattr(JudgeConfig(), name):
                raise UserError(
                    f"judge.{name} has no effect with judge.annotator: alpaca_eval has its own."
                )
    if judge.url and not _URL.fullmatch(judge.url):
        raise UserError(
            f"judge.url={brief(judge.url)} is no address of an endpoint, such as "
            "https://api.openai.com/v1 (without a name, a password or a query)."
        )
    if judge.max_dollars and not (
        judge.dollars_per_million_input or judge.dollars_per_million_output
    ):
        raise UserError(
            "judge.max_dollars needs prices: set judge.dollars_per_million_input and "
            "judge.dollars_per_million_output."
        )


def _check_noise(noise: NoiseConfig) -> None:
    if noise.alpha == 0 and noise.seed is not None:
        raise UserError("noise.seed has no effect with noise.alpha=0: leave it out.")
    if noise.schedule == "constant" and noise.final_fraction:
        raise UserError("noise.final_fraction has no effect with noise.schedule=constant.")
    if noise.length == "padded" and noise.stream == "sample":
        raise UserError(
            "noise.length=padded noises the padding too, which belongs to no document: it goes "
            "with noise.stream=rank."
        )
