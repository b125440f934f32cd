"""Every knob of a run: typed, with its unit, its default and what it may be."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf

BUILTIN_SOURCE = "builtin"
TEMPLATES = ("chat", "alpaca", "vicuna", "llama2")  # or the path of a .jinja file


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
    held_out_source: str | None = None  # in place of both: one of their own, as data.source
    held_out_split: str = "train"  # for a hub id
    held_out_revision: str | None = None  # for a hub id
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
    def held_out(self) -> SourceConfig | None:
        """The source of held-out documents alone, if there is one."""
        if self.held_out_source is None:
            return None
        return SourceConfig(
            self.held_out_source, self.held_out_split, self.held_out_revision, self.format
        )

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

    name: str = "fsdp2"  # fsdp2 | deepspeed | single: one process, nothing sharded
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
    num_epochs: float | None = None  # default 3, where max_steps is not given; whole steps
    global_batch_size: int = 128  # documents per step, over all ranks; an epoch's last has the rest
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
    mlflow: bool = False  # where MLFLOW_TRACKING_URI says
    project: str = "neftune_dist"  # of wandb; mlflow's experiment
    name: str | None = None  # of the run there; None: the last part of run_dir
    progress: bool = True


@dataclass
class EvaluateConfig:
    """Held-out loss while training, noise off; and what `neftune-dist evaluate` measures."""

    every_steps: int = 0  # while training; 0: before the first and after the last step only
    max_documents: int = 0  # different held-out ones, chosen by a hash; 0: all
    train_documents: int = 0  # of the training set, chosen so: loss without and with noise
    # To be answered: held_out, or a file of such (AlpacaEval's); null: none.
    instructions: str | None = "held_out"
    max_instructions: int = 200  # held_out: chosen by a hash; of a file: the first; 0: all
    max_new_tokens: int = 512  # of an answer
    repetition_penalty: float = 1.2  # of greedy decoding, as in the paper; 1: none
    batch_size: int = 32  # prompts that a rank answers at once
    tasks: str | None = (
        None  # abilities kept: lm-eval's tasks, or files: mmlu,arc_easy=arc.jsonl.gz
    )
    max_task_items: int = 0  # of each task, the first; 0: all


@dataclass
class JudgeConfig:
    """Who compares two answers, for `evaluate` and `study`. The key itself is never written."""

    url: str | None = None  # of an OpenAI-compatible endpoint: https://api.openai.com/v1
    model: str | None = None  # its name there
    annotator: str | None = None  # in place of both, one of the alpaca_eval package
    reference: str | None = None  # file of answers to compare with, in AlpacaEval's form
    key_variable: str | None = "OPENAI_API_KEY"  # of the environment; null: no key is sent
    max_answer_tokens: int = 64  # a verdict is short; more for a model that reasons first
    dollars_per_million_input: float = 0.0  # tokens
    dollars_per_million_output: float = 0.0
    max_dollars: float = 0.0  # refused beforehand where the estimate is above; 0: no limit
    max_requests: int = 10_000  # likewise, and retries included while they are sent
    num_parallel: int = 4  # requests under way at once
    max_retries: int = 5  # of a request that failed or was put off
    timeout_seconds: float = 120.0  # of a request


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
    judge: JudgeConfig = field(default_factory=JudgeConfig)

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
    "engine.name": ("fsdp2", "deepspeed", "single"),
    "engine.zero_stage": (None, 1, 2, 3),
    "engine.offload": ("none", "cpu"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.states": ("fp32", "bf16", "8bit"),
    "checkpoint.mode": ("auto", "async", "sync"),
}

# Settings that name a place on this machine, or may: other words pass the same check.
PATHS = (
    "run_dir",
    "model.name_or_path",
    "model.weights",
    "data.source",
    "data.mixture[].source",
    "data.held_out_source",
    "data.template",
    "data.cache_dir",
    "checkpoint.resume",
    "evaluate.instructions",
    "judge.reference",
)

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
    "evaluate.train_documents": (0, math.inf, "[)"),
    "evaluate.max_instructions": (0, math.inf, "[)"),
    "evaluate.max_new_tokens": (1, 2**20, "[]"),
    "evaluate.repetition_penalty": (0, 100, "(]"),
    "evaluate.batch_size": (1, 2**16, "[]"),
    "evaluate.max_task_items": (0, math.inf, "[)"),
    "judge.dollars_per_million_input": (0, math.inf, "[)"),
    "judge.dollars_per_million_output": (0, math.inf, "[)"),
    "judge.max_dollars": (0, math.inf, "[)"),
    "judge.max_answer_tokens": (1, 2**20, "[]"),
    "judge.max_requests": (1, math.inf, "[)"),
    "judge.num_parallel": (1, 1024, "[]"),
    "judge.max_retries": (0, 100, "[]"),
    "judge.timeout_seconds": (0, 2**20, "(]"),
}


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


def listed(words: str | None) -> tuple[str, ...]:
    """What a setting lists, separated by commas."""
    return tuple(word for each in (words or "").split(",") if (word := each.strip()))


def _escaped(value: Any) -> Any:
    """Nested dicts and lists whose text no interpolation is read from."""
    if isinstance(value, dict):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
