"""Every knob of a run: typed, with its unit, its default and what it may be.

Owns the configuration tree, its sources (defaults, then YAML, then `key=value` words) and the
checks that need nothing but the configuration itself. It imports no torch, so a login node can
validate a run. Unknown keys, wrong types and contradictions are refused with `UserError`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where, and what would be right.

    The command line prints the sentence, without a traceback, and exits with code 2.

    Attributes:
        shared: all ranks raised it together, so that rank 0 alone need say it.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


BUILTIN_SOURCE = "builtin"
TEMPLATES = ("chat", "alpaca", "vicuna", "llama2")  # or the path of a .jinja file
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def _cache_home() -> str:
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"


@dataclass
class ModelConfig:
    """The model to fine-tune and how its layers compute."""

    name_or_path: str = ""  # a Hugging Face directory, or a hub id
    weights: str | None = None  # from elsewhere: a folder of safetensors, a ZeRO checkpoint, a DCP
    revision: str | None = None  # branch, tag or commit, for a hub id
    add_tokens: str | None = None  # special ones that the tokenizer lacks: <|a|>,<|b|>
    dtype: str = "bf16"  # of the computation: bf16 | fp32; master weights are always fp32
    attention: str = "auto"  # auto | varlen | flex (packed) | sdpa | eager (padded)
    loss: str = "auto"  # auto | plain (all logits at once) | chunked | liger
    activation_checkpointing: str = "none"  # none | selective (matrix products kept) | full
    compile: bool = False  # each transformer block by torch.compile
    kernels: str = "torch"  # torch | liger: norms, rotary embedding and SwiGLU (GPU)
    float8: str = "none"  # none | tensorwise | rowwise: matrix products of the blocks (Hopper)
    trust_remote_code: bool = False


@dataclass
class AdapterConfig:
    """Small matrices trained in place of the weights, which stay frozen (PEFT)."""

    method: str = "none"  # none | lora | dora
    base: str = "plain"  # of frozen weights: plain (model.dtype) | nf4 (4 bits: QLoRA)
    rank: int = 16
    alpha: float = 32.0  # the adapter's output counts alpha / rank times
    scaling: str = "standard"  # standard | rslora: alpha / sqrt(rank)
    dropout: float = 0.0  # of the adapter's input
    targets: str = "all"  # all matrices of the blocks, or layers' names: q_proj,v_proj


@dataclass
class SourceConfig:
    """One source of a mixture."""

    source: str = ""  # as data.source
    split: str = "train"  # for a hub id
    revision: str | None = None  # for a hub id
    format: str = "auto"  # as data.format
    weight: float = 1.0  # times that a document occurs in an epoch; of 2.3, a hash chooses the 0.3
    max_documents: int = 0  # of it to train on, chosen by a hash; 0: all


@dataclass
class DataConfig:
    """Which documents, and how they become tokens."""

    # builtin; a .json, .jsonl, .csv or .tsv (.gz and .zst too), .parquet or .arrow file; a
    # directory or a glob of such; a hub id.
    source: str = BUILTIN_SOURCE
    split: str = "train"  # for a hub id
    revision: str | None = None  # for a hub id
    format: str = "auto"  # auto | alpaca | dolly | sharegpt | messages | prompt_completion | text
    mixture: list[SourceConfig] = field(default_factory=list)  # in place of data.source
    duplicates: str = "keep"  # keep | drop: conversations that are there already
    template: str = "chat"  # chat (the model's own) | alpaca | vicuna | llama2 | a .jinja file
    system_prompt: str | None = None  # put in front of conversations that have none
    supervise: str = "assistant"  # assistant (ends of turns included) | last (answer alone) | all
    max_length: int = 512  # tokens of one document
    too_long: str = "truncate"  # truncate | drop
    packing: bool = True  # True: padding-free, documents isolated; False: one padded row each
    num_held_out: int = 0  # documents kept for evaluation (whole prompts: no leakage)
    held_out_fraction: float = 0.0  # in place of a number
    held_out_source: str | None = None  # in place of both: files of their own
    max_bad_fraction: float = 0.01  # share of unreadable rows above which the run is refused
    cache_dir: str = field(default_factory=lambda: _cache_home() + "/neftune_dist")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """What is trained on, by the key of the setting that names it."""
        if self.mixture:
            return {f"data.mixture[{i}].source": each for i, each in enumerate(self.mixture)}
        return {
            "data.source": SourceConfig(self.source, self.split, self.revision, self.format),
        }

    @property
    def holds_out(self) -> bool:
        """Whether any documents are kept for evaluation."""
        return bool(self.num_held_out or self.held_out_fraction or self.held_out_source)


@dataclass
class NoiseConfig:
    """NEFTune: `alpha / sqrt(L d) * u`, u ~ U(-1, 1) (arXiv 2310.05914, section 2)."""

    alpha: float = 5.0  # 0 turns the noise off
    distribution: str = "uniform"  # uniform | gaussian (same variance) | symmetric (SymNoise)
    length: str = "document"  # L: the document's real tokens | padded: its row, as others have it
    stream: str = "rank"  # rank: each rank draws its own | sample: the document decides
    schedule: str = "constant"  # constant | linear | cosine, after the warm-up
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of alpha, where the last step's decay ends
    seed: int | None = None  # None: train.seed


@dataclass
class EngineConfig:
    """Who shards the model."""

    name: str = "fsdp2"  # fsdp2 | deepspeed
    zero_stage: int | None = None  # deepspeed: 1 | 2 | 3 (default 3)
    num_replicas: int | None = None  # fsdp2: HSDP, copies of the sharded model (default 1)
    reshard_after_forward: bool | None = None  # fsdp2: False keeps weights until the backward
    sequence_parallel: int = 1  # ranks that share a micro-batch, a slice of its tokens each
    offload: str = "none"  # none | cpu: masters and Adam moments in host memory


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of learning_rate, where the last step's decay ends
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # 0: no clipping
    states: str = "fp32"  # fp32 | bf16 (stochastically rounded) | 8bit: Adam's moments


@dataclass
class TrainConfig:
    """How long, and how much per step."""

    max_steps: int | None = None
    num_epochs: float | None = None  # default 3, where max_steps is not given
    global_batch_size: int = 128  # documents per step, over all ranks
    micro_batch_tokens: int = 8192  # most tokens (padding counted) of one forward on one rank
    max_skipped_steps: int = 3  # borne in a row, for want of a finite loss and gradient; then ends
    hang_minutes: float = 15.0  # what one part of a step (a forward pass, say) may last; then ends
    seed: int = 0


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = 0  # 0: only at the end and on a signal
    keep: int = 2  # newest complete checkpoints kept; 0: all
    keep_every_steps: int = 0  # those of every so many steps are kept for good; 0: none
    mode: str = "auto"  # async | sync | auto: async where host memory holds a copy of the state
    timeout_minutes: float = 120.0  # after which a save that goes nowhere has failed
    resume: str = "auto"  # auto (newest complete one in run_dir) | never | a checkpoint directory
    verify: bool = True  # before resuming, checksums of all files; sizes are looked at always
    accept_changes: str | None = None  # from the checkpoint's settings: optim.x,noise.y

    @property
    def accepted(self) -> tuple[str, ...]:
        """The keys that `accept_changes` lists."""
        return listed(self.accept_changes)


@dataclass
class LoggingConfig:
    """What a step leaves behind."""

    tensorboard: bool = True
    wandb: bool = False  # Weights & Biases
    mlflow: bool = False
    project: str = "neftune_dist"  # of wandb; mlflow's experiment
    name: str | None = None  # of the run there; None: the last part of run_dir
    progress: bool = True


@dataclass
class EvaluateConfig:
    """Held-out loss while training, noise off."""

    every_steps: int = 0  # 0: before the first and after the last step only
    max_documents: int = 0  # 0: all held-out documents


@dataclass
class Config:
    """The whole run."""

    run_dir: str = "runs/default"
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def noise_seed(self) -> int:
        """The key of the noise: `noise.seed`, or `train.seed` where that is not given."""
        return self.train.seed if self.noise.seed is None else self.noise.seed

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as stored in a checkpoint."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved configuration, loadable again by `load_config`."""
        return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(self))))


def _types(section: Any, prefix: str = "") -> dict[str, tuple[type, ...]]:
    types: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(section).items():
        of_items = [item for item in get_args(hint) if is_dataclass(item)]
        if is_dataclass(hint):
            types |= _types(hint, f"{prefix}{name}.")
        elif of_items:  # of a list: data.mixture[].weight
            types |= {prefix + name: (list,), **_types(of_items[0], f"{prefix}{name}[].")}
        else:
            types[prefix + name] = get_args(hint) or (hint,)
    return types


# What a resumed run may change where `checkpoint.accept_changes` says so.
ACCEPTABLE_CHANGES = ("optim.", "noise.", "model.dtype", "model.float8")

# Dotted key: its type, and NoneType where it may be null.
TYPES = _types(Config)

_FORMATS = ("auto", "alpaca", "dolly", "sharegpt", "messages", "prompt_completion", "text")
CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("bf16", "fp32"),
    "model.attention": ("auto", "varlen", "flex", "sdpa", "eager"),
    "model.loss": ("auto", "plain", "chunked", "liger"),
    "model.activation_checkpointing": ("none", "selective", "full"),
    "model.kernels": ("torch", "liger"),
    "model.float8": ("none", "tensorwise", "rowwise"),
    "adapter.method": ("none", "lora", "dora"),
    "adapter.base": ("plain", "nf4"),
    "adapter.scaling": ("standard", "rslora"),
    "data.format": _FORMATS,
    "data.mixture[].format": _FORMATS,
    "data.duplicates": ("keep", "drop"),
    "data.supervise": ("assistant", "last", "all"),
    "data.too_long": ("truncate", "drop"),
    "noise.distribution": ("uniform", "gaussian", "symmetric"),
    "noise.length": ("document", "padded"),
    "noise.stream": ("rank", "sample"),
    "noise.schedule": ("constant", "linear", "cosine"),
    "engine.name": ("fsdp2", "deepspeed"),
    "engine.zero_stage": (None, 1, 2, 3),
    "engine.offload": ("none", "cpu"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.states": ("fp32", "bf16", "8bit"),
    "checkpoint.mode": ("auto", "async", "sync"),
}

# key: (least, greatest), and whether each of them is itself allowed, as "[]" or "()"
RANGES: dict[str, tuple[float, float, str]] = {
    "adapter.rank": (1, 2**16, "[]"),
    "adapter.alpha": (0, 2**16, "(]"),
    "adapter.dropout": (0, 1, "[)"),
    "data.max_length": (2, 2**20, "[]"),  # 2^20: the positions a noise counter is promised for
    "data.mixture[].weight": (0, 1000, "(]"),
    "data.mixture[].max_documents": (0, math.inf, "[)"),
    "data.num_held_out": (0, math.inf, "[)"),
    "data.held_out_fraction": (0, 1, "[)"),
    "data.max_bad_fraction": (0, 1, "[]"),
    "noise.alpha": (0, 1000, "[]"),
    "noise.seed": (0, 2**63 - 1, "[]"),
    "noise.warmup_steps": (0, 2**32, "[]"),
    "noise.final_fraction": (0, 1, "[]"),
    "engine.num_replicas": (1, 2**16, "[]"),
    "engine.sequence_parallel": (1, 2**16, "[]"),
    "optim.learning_rate": (0, 10, "[]"),
    "optim.warmup_steps": (0, 2**32, "[]"),
    "optim.final_fraction": (0, 1, "[]"),
    "optim.beta1": (0, 1, "[)"),
    "optim.beta2": (0, 1, "[)"),
    "optim.epsilon": (0, 1, "(]"),
    "optim.weight_decay": (0, 10, "[]"),
    "optim.max_grad_norm": (0, math.inf, "[)"),
    "train.max_steps": (1, 2**32 - 1, "[]"),
    "train.num_epochs": (0, 2**20, "(]"),
    "train.global_batch_size": (1, 2**24, "[]"),
    "train.micro_batch_tokens": (2, 2**31 - 1, "[]"),
    "train.max_skipped_steps": (0, 2**32, "[]"),
    "train.hang_minutes": (0, 2**20, "(]"),
    "train.seed": (0, 2**63 - 1, "[]"),
    "checkpoint.every_steps": (0, 2**32, "[]"),
    "checkpoint.keep": (0, 2**32, "[]"),
    "checkpoint.keep_every_steps": (0, 2**32, "[]"),
    "checkpoint.timeout_minutes": (0, 2**20, "(]"),
    "evaluate.every_steps": (0, 2**32, "[]"),
    "evaluate.max_documents": (0, math.inf, "[)"),
}


def load_config(path: str | os.PathLike[str] | None, words: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at `path`, then `key=value` words; checked.

    A file may begin with `extends: OTHER.yaml`, a file beside it whose settings come first.

    Raises `UserError` naming the key, the value and what is allowed.
    """
    updates = [] if path is None else _read_files(Path(path))
    updates += [(f"'{word}'", _read_word(word)) for word in words]
    config = OmegaConf.structured(Config)
    for where, update in updates:
        _check_update(update, where)
        try:
            config = OmegaConf.merge(config, update)
        except OmegaConfBaseException as error:
            raise UserError(f"{where} cannot be read: {_reason(error)}.") from error
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be resolved: {_reason(error)}.") from error
    assert isinstance(resolved, Config)
    check(resolved)
    return resolved


def check(config: Config) -> None:
    """Refuse values out of range and settings that contradict each other or have no effect."""
    for key, value in _values(config):
        known = re.sub(r"\[\d+\]", "[]", key)
        if known in CHOICES and value not in CHOICES[known]:
            allowed = ", ".join(str(c) for c in CHOICES[known] if c is not None)
            raise UserError(f"{key}={_brief(value)} is not known; allowed: {allowed}.")
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
    if slices > 1 and model.compile:
        raise UserError(
            f"engine.sequence_parallel={slices} goes with model.compile=false: the exchanges "
            "between ranks are not known to compile with every other option."
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
    if config.engine.name == "fsdp2" and config.engine.zero_stage is not None:
        raise UserError("engine.zero_stage has no effect with engine.name=fsdp2: leave it out.")
    for key in ("num_replicas", "reshard_after_forward"):
        if config.engine.name == "deepspeed" and getattr(config.engine, key) is not None:
            raise UserError(f"engine.{key} has no effect with engine.name=deepspeed: leave it out.")
    if model.float8 != "none" and (model.dtype != "bf16" or config.engine.name != "fsdp2"):
        raise UserError(
            f"model.float8={model.float8} goes with model.dtype=bf16 and engine.name=fsdp2."
        )
    if model.float8 == "tensorwise" and config.engine.offload != "none":
        raise UserError(
            f"model.float8=tensorwise does not go with engine.offload={config.engine.offload}: the "
            "scales of its weights are reduced between GPUs; use model.float8=rowwise."
        )
    _check_adapter(config)
    _check_data(data)
    _check_template(data)
    for key in ("every_steps", "max_documents"):
        if getattr(config.evaluate, key) and not data.holds_out:
            raise UserError(
                f"evaluate.{key} has no effect without held-out documents: set data.num_held_out."
            )
    _check_checkpoint(config.checkpoint)
    if not (config.logging.wandb or config.logging.mlflow):
        for key in ("project", "name"):
            if getattr(config.logging, key) != getattr(LoggingConfig(), key):
                raise UserError(
                    f"logging.{key} has no effect without logging.wandb or logging.mlflow."
                )
    if config.optim.schedule == "constant" and config.optim.final_fraction:
        raise UserError("optim.final_fraction has no effect with optim.schedule=constant.")
    _check_noise(config.noise)


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


def _check_template(data: DataConfig) -> None:
    if data.template not in TEMPLATES and not data.template.endswith(".jinja"):
        raise UserError(
            f"data.template={_brief(data.template)} is not known; allowed: {', '.join(TEMPLATES)}, "
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


def scheduled(
    peak: float,
    schedule: str,
    warmup_steps: int,
    final_fraction: float,
    step: int,
    num_steps: int,
) -> float:
    """What a scheduled value (learning rate, alpha) is worth at step 0 <= step < num_steps: linear
    warm-up to `peak`, then the schedule's decay, which reaches `final_fraction` of it at the
    end."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (final_fraction + (1 - final_fraction) * left)


def differences(one: dict[str, Any], two: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations, as `Config.to_dict` gives them, differ."""
    keys: list[str] = []
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path} is not valid YAML{line}: {_reason(error)}.") from error
    except (OSError, ValueError) as error:  # no file, no UTF-8, no more than a bare word
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration file {path} cannot be read: {reason}.") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} must hold sections such as 'model:' and 'noise:'.")
    return OmegaConf.to_container(loaded, resolve=False)


def listed(words: str | None) -> tuple[str, ...]:
    """What a setting lists, separated by commas."""
    return tuple(word for each in (words or "").split(",") if (word := each.strip()))


def _read_files(path: Path, extended_by: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """A file's settings behind those of the file it extends; where each was found."""
    loaded = _read_yaml(path)
    extends = loaded.pop("extends", None)
    if extends is None:
        return [(str(path), loaded)]
    if not isinstance(extends, str) or not extends:
        raise UserError(f"{path}: extends={_brief(extends)} is no file's name.")
    parent, chain = path.parent / extends, (*extended_by, path)
    if parent.resolve() in [each.resolve() for each in chain]:
        raise UserError(f"{path}: extends={extends} comes back to a file that it extends.")
    return [*_read_files(parent, chain), (str(path), loaded)]


def _read_word(word: str) -> Any:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"'{word}' is not of the form key=value, such as noise.alpha=5.")
    if str in TYPES.get(key, ()) and text != "null":
        text = json.dumps(text, ensure_ascii=False)  # quoted: YAML reads run_dir=007 as 7
    try:
        update = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={text}"]), resolve=False)
        section, _, name = key.rpartition(".")
        if TYPES.get(key) == (list,) and isinstance(update, dict):
            items = update[section][name]
            update[section][name] = items and [_spaced(item) for item in items]
        return update
    except (YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise UserError(f"{word!a} cannot be read: {_reason(error)}.") from error


def _spaced(item: Any) -> Any:
    """An entry written without spaces, {source:a.json,weight:2}, in which YAML sees no values."""
    if not isinstance(item, dict):
        return item
    spaced: dict[Any, Any] = {}
    for key, value in item.items():
        name, colon, text = str(key).partition(":")
        spaced |= {name: OmegaConf.from_dotlist([f"x={text}"])["x"]} if colon else {key: value}
    return spaced


def _check_update(update: dict[Any, Any], where: str, prefix: str = "") -> None:
    """Refuse unknown keys and wrong types; what an interpolation gives is checked later."""
    for name, value in update.items():
        key = f"{prefix}{name}"
        if TYPES.get(key) == (list,):
            _check_list(key, value, where)
        elif key in TYPES and "." not in str(name):
            if not (isinstance(value, str) and "${" in value):
                _check_type(key, value, where)
        elif any(known.startswith(f"{key}.") for known in TYPES):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} is a section and takes keys below it.")
            _check_update(value, where, f"{key}.")
        else:
            raise UserError(f"{where}: unknown key {key}; {_hint(key, prefix)}")


def _check_list(key: str, items: Any, where: str) -> None:
    known = {each.removeprefix(f"{key}[].") for each in TYPES if each.startswith(f"{key}[].")}
    form = f"{key}=[{{source: a.json, weight: 2}}, {{source: b.json}}]"
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{where}: {key} is a list of entries, such as {form}.")
    for i, item in enumerate(items):
        for name, value in item.items():
            if name not in known:
                raise UserError(
                    f"{where}: unknown key {key}[{i}].{name}; known: {', '.join(sorted(known))}."
                )
            if not (isinstance(value, str) and "${" in value):
                _check_type(f"{key}[{i}].{name}", value, where)
        if not item.get("source"):
            raise UserError(f"{where}: {key}[{i}] names no source; write {form}.")


def _check_type(key: str, value: Any, where: str) -> None:
    types = TYPES[re.sub(r"\[\d+\]", "[]", key)]
    wanted = types[0]
    allowed = (*types, int) if wanted is float else types
    # By type(), because True is an instance of int; "???" is OmegaConf's word for no value.
    if type(value) not in allowed or value == "???":
        kinds = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
        kind = kinds[wanted] + (" or null" if NoneType in types else "")
        quotes = ": put it in quotes" if wanted is str and type(value) in (int, float, bool) else ""
        shown = "null" if value is None else _brief(value)
        raise UserError(f"{where}: {key}={shown} is not {kind}{quotes}.")


def _hint(key: str, prefix: str) -> str:
    if key in TYPES:
        section, _, name = key.rpartition(".")
        return f"write '{section}:' and, on the next line, indented, '{name}:'."
    sections = () if prefix else vars(Config())
    near = difflib.get_close_matches(key, [*TYPES, *sections], n=1)
    if near:
        return f"did you mean {near[0]}?"
    names = {each[len(prefix) :].split(".")[0] for each in TYPES if each.startswith(prefix)}
    return f"known: {', '.join(sorted(names))}."


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _escaped(value: Any) -> Any:
    """Nested dicts and lists whose text no interpolation is read from."""
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _reason(error: Exception) -> str:
    """One line, without the full stop."""
    text = str(getattr(error, "problem", None) or error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")
