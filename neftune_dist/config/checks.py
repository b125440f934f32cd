"""Refusal of values out of range, of contradictions, and of settings that would have no effect.

What concerns one knob alone is declared with it; here stand the rules that join several.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from itertools import takewhile
from typing import Any

from neftune_dist.config.config import ACCEPTABLE_CHANGES, KNOBS, Config
from neftune_dist.config.errors import UserError, brief
from neftune_dist.config.evaluation_sections import HELD_OUT, JudgeConfig
from neftune_dist.config.paths import user_path
from neftune_dist.config.sections import (
    BUILTIN_SOURCE,
    COLUMNS,
    TEMPLATES,
    CheckpointConfig,
    DataConfig,
    split_list,
)

_URL = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?(/[\w./~%+-]*)?", re.ASCII)
# Upper case alone, in short parts, so that no key passes for a name.
_VARIABLE = re.compile(r"(?!\d)[A-Z0-9]{0,16}(_[A-Z0-9]{0,16}){0,8}", re.ASCII)
_FSDP2_KNOBS = (
    "num_replicas",
    "reshard_after_forward",
    "sync_every",
    "sequence_parallel",
    "offload",
)
# The settings of section `engine`, beside its name, that each engine reads.
_ENGINE_KNOBS = {
    "auto": _FSDP2_KNOBS,
    "fsdp2": _FSDP2_KNOBS,
    "deepspeed": ("zero_stage", "sequence_parallel", "offload"),
    "replicated": ("sequence_parallel",),
}


def check(config: Config, words: Sequence[str] = ()) -> None:
    """Refuse values out of range and settings that contradict each other or have no effect.

    Args:
        words: the keys given on the command line, in order.

    Raises:
        UserError: naming the key, the value and what is allowed.
    """
    variable = config.judge.key_variable
    if variable and not _VARIABLE.fullmatch(variable):
        raise UserError(  # without the value, which may be the key itself
            "judge.key_variable is not the name of an environment variable in upper case, such as "
            "OPENAI_API_KEY: give such a name, and put the key into that variable."
        )
    if not config.model.name_or_path:
        raise UserError(
            "model.name_or_path is not set: give a Hugging Face model directory or a hub id."
        )
    for key, value in _values(config):
        KNOBS[re.sub(r"\[\d+\]", "[]", key)].check(key, value)
    for word in split_list(config.evaluate.tasks):
        user_path(word.rpartition("=")[2] or word, "evaluate.tasks")
    _check_unused(config, words)
    _check_layout(config)
    _check_float8(config)
    _check_adapter(config)
    _check_data(config.data)
    _check_checkpoint(config.checkpoint)
    _check_judge(config.judge)


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


def _check_unused(config: Config, words: Sequence[str]) -> None:
    """Refuse settings that are given, but have no effect beside others."""
    for keys, reason in _unused(config, words):
        for key in keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            if value != KNOBS[key].default:
                raise UserError(f"{key}={brief(value)} has no effect {reason}: leave it out.")


def _unused(config: Config, words: Sequence[str]) -> Iterator[tuple[Iterable[str], str]]:
    """Keys of settings without effect, and the reason."""
    data, engine, judge = config.data, config.engine, config.judge
    keys = _keys("engine", but=("name", *_ENGINE_KNOBS[engine.name]))
    yield keys, f"with engine.name={engine.name}"
    if engine.sync_every == "step":
        yield ["engine.reshard_after_forward"], "with engine.sync_every=step"
    if config.adapter.method == "none":
        yield _keys("adapter"), "with adapter.method=none"
    if data.mixture:
        keys = [f"data.{name}" for name in ("source", "split", "revision", "format", "columns")]
        own = "(data.source=builtin undoes what an extended file sets)"
        yield keys, f"with data.mixture, whose entries have their own {own}"
    if data.held_out_source is None:
        keys = [f"data.held_out_{name}" for name in ("split", "revision", "columns")]
        yield keys, "without data.held_out_source"
    if data.template == "alpaca":
        yield ["data.system_prompt"], "with data.template=alpaca, which has its own first sentence"
    if config.noise.alpha == 0:
        # What a file says, or a word before alpha's, may be for other runs: a study varies alpha.
        later = list(takewhile(lambda word: word != "noise.alpha", reversed(words)))
        yield [word for word in later if word.startswith("noise.")], "with noise.alpha=0"
    for name, schedule in (("noise", config.noise.schedule), ("optim", config.optim.schedule)):
        if schedule == "constant":
            yield [f"{name}.final_fraction"], f"with {name}.schedule=constant"
    if not config.checkpoint.keep:
        yield ["checkpoint.keep_every_steps"], "with checkpoint.keep=0"
    if config.checkpoint.resume == "never":
        yield ["checkpoint.accept_changes"], "with checkpoint.resume=never"
    if not (config.logging.wandb or config.logging.mlflow):
        yield ["logging.project", "logging.name"], "without logging.wandb or logging.mlflow"
    if not data.holds_out:
        keys = ["evaluate.max_documents", "train.patience", "checkpoint.keep_best"]
        keys += [] if config.evaluate.sample_prompts else ["evaluate.every_steps"]
        yield keys, "without held-out documents (data.num_held_out)"
    elif not config.evaluate.every_steps:
        yield ["train.patience", "checkpoint.keep_best"], "without evaluate.every_steps"
    if not config.evaluate.instructions or (
        config.evaluate.instructions == HELD_OUT and not data.holds_out
    ):
        keys = [f"evaluate.{name}" for name in ("samples", "temperature", "max_instructions")]
        yield keys, "without evaluate.instructions=FILE or held-out documents"
    if not config.evaluate.temperature:
        reason = "with evaluate.temperature=0, whose greedy answers are all alike"
        yield ["evaluate.samples"], reason
    if not config.evaluate.every_steps:
        yield ["evaluate.sample_prompts"], "without evaluate.every_steps"
    if not config.evaluate.tasks:
        yield ["evaluate.max_task_items"], "without evaluate.tasks"
    if not judge.url and not judge.annotator:
        yield _keys("judge", but=("url", "model")), "without judge.url or judge.annotator"
    if judge.annotator:
        names = ("key_variable", "max_answer_tokens", "max_retries", "timeout_seconds")
        yield [f"judge.{name}" for name in names], "with judge.annotator: alpaca_eval has its own"


def _keys(section: str, but: Iterable[str] = ()) -> list[str]:
    return [key for key in KNOBS if key.startswith(f"{section}.") and key.split(".")[1] not in but]


def _check_layout(config: Config) -> None:
    """How documents are packed and shared over ranks, and the length of the run."""
    model, data, train, noise = config.model, config.data, config.train, config.noise
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
    if slices > 1 and noise.length == "padded":
        raise UserError("noise.length=padded goes with engine.sequence_parallel=1.")
    packs = {"auto": data.packing, "varlen": True, "flex": True}.get(model.attention, False)
    if packs != data.packing:
        raise UserError(
            f"model.attention={model.attention} goes with data.packing={str(packs).lower()}; "
            "varlen and flex keep packed documents apart, sdpa and eager take padded rows."
        )
    if noise.length == "padded" and noise.stream == "sample":
        raise UserError(
            "noise.length=padded adds noise to the padding too, which belongs to no document: it "
            "goes with noise.stream=rank."
        )
    if train.max_steps is not None and train.num_epochs is not None:
        raise UserError(
            f"train.max_steps={train.max_steps} and train.num_epochs={train.num_epochs} are both "
            "set: give one of them."
        )


def _check_float8(config: Config) -> None:
    model, engine = config.model, config.engine
    if model.float8 == "none":
        return
    if model.dtype != "bf16" or engine.name == "deepspeed":
        raise UserError(
            f"model.float8={model.float8} goes with model.dtype=bf16 and engine.name=fsdp2 or "
            "replicated."
        )
    if model.float8 == "tensorwise" and engine.offload != "none":
        raise UserError(
            f"model.float8=tensorwise does not go with engine.offload={engine.offload}: the "
            "scales of its weights are reduced between GPUs; use model.float8=rowwise."
        )
    if config.adapter.method != "none":
        raise UserError(
            f"model.float8={model.float8} goes with adapter.method=none: frozen weights are not "
            "converted to float8."
        )


def _check_adapter(config: Config) -> None:
    adapter = config.adapter
    if adapter.method != "none" and config.model.add_tokens:
        raise UserError(
            "model.add_tokens goes with adapter.method=none: an adapter does not train the "
            "embedding of new tokens."
        )
    if adapter.method == "dora" and adapter.base == "nf4":
        raise UserError(
            "adapter.method=dora goes with adapter.base=plain: it needs the frozen matrices "
            "themselves in every step."
        )


def _check_data(data: DataConfig) -> None:
    for key, entry in data.sources.items():
        if entry.source == BUILTIN_SOURCE and entry.format not in ("auto", "alpaca"):
            format_key = key.replace(".source", ".format")
            raise UserError(f"{format_key}={entry.format} does not fit {key}=builtin: use auto.")
        _check_columns(key.replace("source", "columns"), entry.columns)
    _check_columns("data.held_out_columns", data.held_out_columns or {})
    ways = ("num_held_out", "held_out_fraction", "held_out_source")
    given = [f"data.{way}={getattr(data, way)}" for way in ways if getattr(data, way)]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} all choose the held-out documents: give one of them."
        )
    if data.template not in TEMPLATES and not data.template.endswith(".jinja"):
        raise UserError(
            f"data.template={brief(data.template)} is not known; allowed: {', '.join(TEMPLATES)}, "
            "or the path of a .jinja file."
        )


def _check_columns(key: str, columns: dict[str, Any]) -> None:
    form = "{prompt: question, completion: data.0.text, system: {constant: Be brief.}}"
    for name, column in columns.items():
        if name not in COLUMNS:
            raise UserError(f"{key}: {brief(name)} is no field; known: {', '.join(COLUMNS)}.")
        text = column.get("constant") if isinstance(column, dict) and len(column) == 1 else column
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{key}: {name}={brief(column)} is neither a column nor a constant, such as {form}."
            )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    every, for_good = checkpoint.every_steps, checkpoint.keep_every_steps
    if for_good and (not every or for_good % every):
        raise UserError(
            f"checkpoint.keep_every_steps={for_good} must be a multiple of checkpoint.every_steps="
            f"{every}: those steps have no checkpoint."
        )
    for key in checkpoint.accepted:
        if key not in KNOBS:
            raise UserError(f"checkpoint.accept_changes: unknown key {brief(key)}.")
        if not key.startswith(ACCEPTABLE_CHANGES):
            raise UserError(
                f"checkpoint.accept_changes: {key} cannot change within a run; those that can: "
                f"{', '.join(f'{prefix}*' for prefix in ACCEPTABLE_CHANGES)}."
            )


def _check_judge(judge: JudgeConfig) -> None:
    if judge.annotator and (judge.url or judge.model):
        raise UserError(
            f"judge.annotator={brief(judge.annotator)} of the alpaca_eval package names its own "
            "endpoint and model: leave out judge.url and judge.model."
        )
    if bool(judge.url) != bool(judge.model):
        raise UserError("judge.url and judge.model go together: give both or none.")
    if judge.url and not _URL.fullmatch(judge.url):
        raise UserError(
            f"judge.url={brief(judge.url)} is not the address of an endpoint, such as "
            "https://api.openai.com/v1 (without a name, a password or a query)."
        )
    if judge.max_dollars and not (
        judge.dollars_per_million_input or judge.dollars_per_million_output
    ):
        raise UserError(
            f"judge.max_dollars={judge.max_dollars} needs prices: set "
            "judge.dollars_per_million_input and judge.dollars_per_million_output."
        )


def check_divides(key: str, count: int, world_size: int) -> None:
    """Raise `UserError` where groups of `count` ranks, the value of `key`, leave ranks over."""
    if world_size % count:
        raise UserError(f"{key}={count} does not divide the {world_size} processes of this run.")


def check_world_size(config: Config, world_size: int) -> None:
    """Raise `UserError` where the engine's groups do not divide the ranks."""
    for name in ("num_replicas", "sequence_parallel"):
        check_divides(f"engine.{name}", getattr(config.engine, name) or 1, world_size)
