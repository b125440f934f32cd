"""Every knob of a run: typed, with its unit, its default and what it may be.

Owns the configuration tree, its sources (defaults, then YAML, then `key=value` words) and the
checks that need nothing but the configuration itself. It imports no torch, so a login node can
validate a run. Unknown keys, wrong types and contradictions are refused with `UserError`.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

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


@dataclass
class ModelConfig:
    """The model to fine-tune and how its layers compute."""

    name_or_path: str = ""  # a Hugging Face directory, or a hub id
    revision: str | None = None  # branch, tag or commit, for a hub id
    dtype: str = "bf16"  # of the computation: bf16 | fp32; master weights are always fp32
    attention: str = "auto"  # auto | varlen (packed) | sdpa | eager (padded)
    activation_checkpointing: str = "none"  # none | full
    trust_remote_code: bool = False


@dataclass
class DataConfig:
    """Which documents, and how they become tokens."""

    source: str = BUILTIN_SOURCE  # builtin, a .json/.jsonl/.parquet file (.gz too), or a hub id
    split: str = "train"  # for a hub id
    revision: str | None = None  # for a hub id
    format: str = "auto"  # auto | alpaca | prompt_completion | messages
    template: str = "chat"  # chat (the tokenizer's own) | alpaca (the Alpaca prompt)
    supervise: str = "assistant"  # assistant (end of turn included) | all
    max_length: int = 512  # tokens of one document
    too_long: str = "truncate"  # truncate | drop
    packing: bool = True  # True: padding-free, documents isolated; False: one padded row each
    num_held_out: int = 0  # documents kept for evaluation (whole prompts: no leakage)
    max_bad_fraction: float = 0.01  # share of unreadable rows above which the run is refused
    cache_dir: str = "${oc.env:XDG_CACHE_HOME,${oc.env:HOME,/tmp}/.cache}/neftune_dist"


@dataclass
class NoiseConfig:
    """NEFTune: `alpha / sqrt(L d) * u`, u ~ U(-1, 1) (arXiv 2310.05914, section 2)."""

    alpha: float = 5.0  # 0 turns the noise off
    distribution: str = "uniform"
    length: str = "document"  # L: the document's own real tokens
    stream: str = "rank"  # rank: each rank draws its own | sample: the document decides
    seed: int | None = None  # None: train.seed


@dataclass
class EngineConfig:
    """Who shards the model."""

    name: str = "fsdp2"  # fsdp2 | deepspeed
    zero_stage: int | None = None  # deepspeed: 1 | 2 | 3 (default 3)
    num_replicas: int | None = None  # fsdp2: HSDP, copies of the sharded model (default 1)


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 5e-5
    schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_steps: int = 0
    final_fraction: float = 0.0  # of learning_rate, reached at the last step
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # 0: no clipping


@dataclass
class TrainConfig:
    """How long, and how much per step."""

    max_steps: int | None = None
    num_epochs: float | None = None  # default 3, where max_steps is not given
    global_batch_size: int = 128  # documents per step, over all ranks
    micro_batch_tokens: int = 8192  # most tokens (padding counted) of one forward on one rank
    seed: int = 0


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = 0  # 0: only at the end and on a signal
    keep: int = 2  # newest complete checkpoints kept; 0: all
    resume: str = "auto"  # auto (newest complete one in run_dir) | never | a checkpoint directory


@dataclass
class LoggingConfig:
    """What a step leaves behind."""

    tensorboard: bool = True
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
        return OmegaConf.to_yaml(OmegaConf.structured(self))


CHOICES: dict[str, tuple[Any, ...]] = {
    "model.dtype": ("bf16", "fp32"),
    "model.attention": ("auto", "varlen", "sdpa", "eager"),
    "model.activation_checkpointing": ("none", "full"),
    "data.format": ("auto", "alpaca", "prompt_completion", "messages"),
    "data.template": ("chat", "alpaca"),
    "data.supervise": ("assistant", "all"),
    "data.too_long": ("truncate", "drop"),
    "noise.distribution": ("uniform",),
    "noise.length": ("document",),
    "noise.stream": ("rank", "sample"),
    "engine.name": ("fsdp2", "deepspeed"),
    "engine.zero_stage": (None, 1, 2, 3),
    "optim.schedule": ("cosine", "linear", "constant"),
}

# key: (least, greatest, least is allowed)
RANGES: dict[str, tuple[float, float, bool]] = {
    "data.max_length": (2, 2**20, True),  # 2^20: the positions a noise counter is promised for
    "data.num_held_out": (0, math.inf, True),
    "data.max_bad_fraction": (0, 1, True),
    "noise.alpha": (0, 1000, True),
    "noise.seed": (0, 2**63 - 1, True),
    "engine.num_replicas": (1, 2**16, True),
    "optim.learning_rate": (0, 10, True),
    "optim.warmup_steps": (0, 2**32, True),
    "optim.final_fraction": (0, 1, True),
    "optim.beta1": (0, 1, True),
    "optim.beta2": (0, 1, True),
    "optim.epsilon": (0, 1, False),
    "optim.weight_decay": (0, 10, True),
    "optim.max_grad_norm": (0, math.inf, True),
    "train.max_steps": (1, 2**32 - 1, True),
    "train.num_epochs": (0, 2**20, False),
    "train.global_batch_size": (1, 2**24, True),
    "train.micro_batch_tokens": (2, 2**31 - 1, True),
    "train.seed": (0, 2**63 - 1, True),
    "checkpoint.every_steps": (0, 2**32, True),
    "checkpoint.keep": (0, 2**32, True),
    "evaluate.every_steps": (0, 2**32, True),
    "evaluate.max_documents": (0, math.inf, True),
}


def load_config(path: str | os.PathLike[str] | None, words: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file at `path`, then `key=value` words; checked.

    Raises `UserError` naming the key, the value and what is allowed.
    """
    config = OmegaConf.structured(Config)
    if path is not None:
        config = _merge(config, _read_yaml(Path(path)), str(path))
    for word in words:
        key, equals, _ = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is not of the form key=value, such as noise.alpha=5.")
        try:
            single = OmegaConf.from_dotlist([word])
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"'{word}' cannot be read: {_first_line(error)}.") from error
        config = _merge(config, single, f"'{word}'")
    try:
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration cannot be resolved: {_first_line(error)}.") from error
    assert isinstance(resolved, Config)
    check(resolved)
    return resolved


def check(config: Config) -> None:
    """Refuse values out of range and settings that contradict each other or have no effect."""
    values = dict(_leaves(config))
    for key, value in values.items():
        if key in CHOICES and value not in CHOICES[key]:
            allowed = ", ".join(str(c) for c in CHOICES[key] if c is not None)
            raise UserError(f"{key}={value} is not known; allowed: {allowed}.")
        if key in RANGES and value is not None:
            least, greatest, inclusive = RANGES[key]
            above = value >= least if inclusive else value > least
            if not (above and value <= greatest):  # written so that NaN is refused
                bound = "from" if inclusive else "above"
                raise UserError(f"{key}={value} is out of range: {bound} {least} to {greatest}.")
    _check_contradictions(config)


def _check_contradictions(config: Config) -> None:
    model, data, train = config.model, config.data, config.train
    if not model.name_or_path:
        raise UserError(
            "model.name_or_path is not set: give a Hugging Face model directory or a hub id."
        )
    if data.max_length > train.micro_batch_tokens:
        raise UserError(
            f"data.max_length={data.max_length} does not fit into "
            f"train.micro_batch_tokens={train.micro_batch_tokens}: a document is never split, "
            "so raise the second or lower the first."
        )
    if data.packing and model.attention in ("sdpa", "eager"):
        raise UserError(
            f"model.attention={model.attention} goes with data.packing=false; packed documents "
            "are kept apart by model.attention=varlen (or auto)."
        )
    if not data.packing and model.attention == "varlen":
        raise UserError(
            "model.attention=varlen goes with data.packing=true; padded rows use sdpa or eager."
        )
    if train.max_steps is not None and train.num_epochs is not None:
        raise UserError("train.max_steps and train.num_epochs are both set: give one of them.")
    if config.engine.name == "fsdp2" and config.engine.zero_stage is not None:
        raise UserError("engine.zero_stage has no effect with engine.name=fsdp2: leave it out.")
    if config.engine.name == "deepspeed" and config.engine.num_replicas is not None:
        raise UserError(
            "engine.num_replicas has no effect with engine.name=deepspeed: leave it out."
        )
    if data.source == BUILTIN_SOURCE and data.format not in ("auto", "alpaca"):
        raise UserError(f"data.format={data.format} does not fit data.source=builtin: use auto.")
    if config.evaluate.every_steps and not data.num_held_out:
        raise UserError(
            "evaluate.every_steps has no effect without held-out documents: set data.num_held_out."
        )
    if config.optim.schedule == "constant" and config.optim.final_fraction:
        raise UserError("optim.final_fraction has no effect with optim.schedule=constant.")
    if config.noise.alpha == 0 and config.noise.seed is not None:
        raise UserError("noise.seed has no effect with noise.alpha=0: leave it out.")


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


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for each in fields(node):
        value = getattr(node, each.name)
        if is_dataclass(value):
            leaves += _leaves(value, f"{prefix}{each.name}.")
        else:
            leaves.append((prefix + each.name, value))
    return leaves


def _read_yaml(path: Path) -> Any:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"The configuration file {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The configuration file {path} cannot be read: {error}.") from error
    except (YAMLError, OmegaConfBaseException) as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path} is not valid YAML{line}: {_first_line(error)}.") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} must hold sections such as 'model:' and 'noise:'.")
    return loaded


def _merge(config: Any, update: Any, where: str) -> Any:
    _refuse_unknown(config, update, where)
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        value = OmegaConf.select(update, key) if key else None
        current = OmegaConf.select(config, key) if key else None
        wanted = f" such as {current}" if current is not None else ""
        raise UserError(
            f"{where}: {key}={value} has the wrong type; expected a value{wanted} "
            f"({_first_line(error)})."
        ) from error


def _refuse_unknown(config: Any, update: Any, where: str, prefix: str = "") -> None:
    for key in update:
        if key not in config:
            known = [str(k) for k in config]
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}."
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        inner = config[key]
        if OmegaConf.is_dict(inner):
            value = update[key]
            if not OmegaConf.is_dict(value):
                raise UserError(f"{where}: {prefix}{key} is a section and takes keys below it.")
            _refuse_unknown(inner, value, where, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no detail"
