"""The sections of a configuration: every setting with its type, default, limits and description."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from neftune_dist.config.knobs import choice, number, path

BUILTIN_SOURCE = "builtin"
TEMPLATES = ("chat", "alpaca", "vicuna", "llama2")  # or the path of a .jinja file
_FORMATS = ("auto", "alpaca", "dolly", "sharegpt", "messages", "prompt_completion", "text")
# Fields of rows that data.columns can name.
COLUMNS = (
    *("messages", "conversations", "text", "prompt", "completion", "instruction", "output"),
    *("response", "input", "context", "system", "tools", "reasoning"),
)
_MAX_SEED = 2**63 - 1


def _cache_dir() -> str:
    return (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/neftune_dist"


@dataclass
class ModelConfig:
    """The model to fine-tune and how its layers compute."""

    name_or_path: str = path("")
    """A Hugging Face model directory or a hub id; must be set."""
    weights: str | None = path(None)
    """Load the weights from this folder instead: safetensors, a ZeRO or a DCP checkpoint."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    add_tokens: str | None = None
    """Special tokens to add to the tokenizer, separated by commas: <|a|>,<|b|>."""
    dtype: str = choice("bf16", "fp32", "auto")
    """Precision of the computation; auto: bf16 where the device has instructions for it, else fp32.
    Master weights are always float32."""
    attention: str = choice("auto", "varlen", "flex", "sdpa", "eager")
    """Attention kernel: varlen or flex for packed documents, sdpa or eager for padded rows."""
    loss: str = choice("auto", "plain", "chunked", "liger")
    """Cross-entropy: plain holds all logits at once, chunked and liger (GPU) only a part."""
    activation_checkpointing: str = choice("none", "selective", "full")
    """Recompute blocks in the backward pass: full, or selective (all but matrix products)."""
    compile: bool = False
    """Compile each transformer block with torch.compile."""
    kernels: str = choice("torch", "liger")
    """liger: Liger's fused norms, rotary embedding and SwiGLU (GPU)."""
    float8: str = choice("none", "tensorwise", "rowwise")
    """Matrix products of the blocks in float8, scaled by tensor or by row (Hopper GPUs)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass
class AdapterConfig:
    """LoRA or DoRA (PEFT): small matrices that are trained beside the frozen weights."""

    method: str = choice("none", "lora", "dora")
    """LoRA or DoRA; none: full fine-tuning."""
    base: str = choice("plain", "nf4")
    """Storage of the frozen weights: plain is model.dtype, nf4 has 4 bits (QLoRA)."""
    rank: int = number(16, ge=1, le=2**16)
    """Rank of the adapter's matrices."""
    alpha: float = number(32.0, gt=0, le=2**16)
    """The adapter's output is multiplied by alpha / rank."""
    scaling: str = choice("standard", "rslora")
    """rslora: multiply by alpha / sqrt(rank) instead."""
    dropout: float = number(0.0, ge=0, lt=1)
    """Dropout of the adapter's input."""
    targets: str = "all"
    """Layers with an adapter: all (every matrix of the blocks), names such as q_proj,v_proj, or
    all_but_experts for models whose experts are stacked."""


@dataclass
class SourceConfig:
    """One source of a mixture."""

    source: str = path("")
    """As data.source; must be set."""
    split: str = "train"
    """Split of a hub id, or of a directory that has splits."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    format: str = choice(*_FORMATS)
    """As data.format."""
    columns: dict[str, Any] = field(default_factory=dict)
    """As data.columns."""
    weight: float = number(1.0, gt=0, le=1000)
    """Times a document occurs in an epoch; with 2.3, a hash chooses the 30 % that occur 3 times."""
    max_documents: int = number(0, ge=0)
    """Documents to train on, chosen by a hash; 0: all."""


@dataclass
class DataConfig:
    """Which documents to train on, and how they become tokens."""

    source: str = path(BUILTIN_SOURCE)
    """builtin; a .json, .jsonl, .csv, .tsv (also .gz, .zst), .parquet or .arrow file; a directory
    or a glob of such files; a hub id."""
    split: str = "train"
    """Split of a hub id, or of a directory that has splits."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    format: str = choice(*_FORMATS)
    """Format of the rows; auto recognises it by their fields."""
    columns: dict[str, Any] = field(default_factory=dict)
    """Columns under other names: {prompt: question, completion: data.0.text}; a text for every row:
    {system: {constant: Be brief.}}."""
    ignore_fields: str | None = None
    """Fields of rows, turns and calls to leave out, separated by commas; others must be known."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several sources, in place of data.source."""
    duplicates: str = choice("keep", "drop")
    """Conversations that occur more than once: drop keeps the first."""
    template: str = path("chat")
    """Prompt template: chat (the model's own), alpaca, vicuna, llama2 or a .jinja file."""
    system_prompt: str | None = None
    """System prompt of conversations that have none."""
    supervise: str = choice("assistant", "last", "all")
    """Tokens in the loss: assistant: all answers with their end tokens; last: the last answer; all:
    every token, the prompt's too."""
    split_conversations: str = choice("as_needed", "never")
    """Where the template renders an answer differently once turns follow: as_needed makes several
    documents of the row, never refuses it."""
    max_length: int = number(512, ge=2, le=2**20)
    """Most tokens of a document."""
    too_long: str = choice("truncate", "drop")
    """Longer documents: truncate or drop them."""
    max_cut_fraction: float = number(0.5, ge=0, le=1)
    """Refuse to train if a larger fraction of the documents is longer than data.max_length."""
    packing: bool = True
    """Pack documents into rows without padding, isolated from each other; false: padded rows."""
    num_held_out: int = number(0, ge=0)
    """Documents held out for evaluation; documents with the same prompt are held out together."""
    held_out_fraction: float = number(0.0, ge=0, lt=1)
    """Fraction of the documents held out, in place of data.num_held_out."""
    held_out_source: str | None = path(None)
    """A separate source of held-out documents, as data.source, in place of a number or fraction."""
    held_out_split: str = "train"
    """Split of data.held_out_source, for a hub id or a directory that has splits."""
    held_out_revision: str | None = None
    """Branch, tag or commit of data.held_out_source, for a hub id."""
    held_out_columns: dict[str, Any] | None = None
    """As data.columns, for data.held_out_source; null: data.columns."""
    max_bad_fraction: float = number(0.01, ge=0, le=1)
    """Refuse to train if a larger fraction of the rows cannot be read."""
    cache_dir: str = field(default_factory=_cache_dir, metadata={"is_path": True})
    """Folder for tokenised data."""
    num_workers: int = number(1, ge=0, le=1024)
    """Processes that tokenise more than 20,000 rows; 0: one for every core, at most 16."""

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The training sources, by the key of the setting that names each."""
        if self.mixture:
            return {f"data.mixture[{i}].source": entry for i, entry in enumerate(self.mixture)}
        return {
            "data.source": SourceConfig(
                self.source, self.split, self.revision, self.format, self.columns
            )
        }

    @property
    def held_out(self) -> SourceConfig | None:
        """The separate source of held-out documents; None where there is none."""
        if self.held_out_source is None:
            return None
        columns = self.columns if self.held_out_columns is None else self.held_out_columns
        return SourceConfig(
            self.held_out_source, self.held_out_split, self.held_out_revision, self.format, columns
        )

    @property
    def ignored(self) -> tuple[str, ...]:
        """The names that `ignore_fields` lists."""
        return split_list((self.ignore_fields or "").strip("[]"))

    @property
    def holds_out(self) -> bool:
        """Whether any documents are held out for evaluation."""
        return bool(self.num_held_out or self.held_out_fraction or self.held_out_source)


@dataclass
class NoiseConfig:
    """NEFTune: alpha / sqrt(L d) * u, u ~ U(-1, 1) (arXiv 2310.05914, section 2)."""

    alpha: float = number(5.0, ge=0, le=1000)
    """Scale of the noise; 0 turns it off."""
    distribution: str = choice("uniform", "gaussian", "symmetric")
    """Distribution of u: gaussian has the same variance, symmetric is SymNoise."""
    length: str = choice("document", "padded")
    """L: the document's real tokens; padded: the length of its row, as in other implementations."""
    stream: str = choice("rank", "sample")
    """rank: every rank draws its own noise; sample: a document gets the same noise for any number
    of ranks, engine and packing."""
    schedule: str = choice("constant", "linear", "cosine")
    """Decay of alpha after the warm-up."""
    warmup_steps: int = number(0, ge=0, le=2**32)
    """Steps over which alpha rises linearly."""
    final_fraction: float = number(0.0, ge=0, le=1)
    """Fraction of alpha left at the end of the decay."""
    seed: int | None = number(None, ge=0, le=_MAX_SEED)
    """Seed of the noise; null: train.seed."""


@dataclass
class EngineConfig:
    """How the model is distributed over the ranks."""

    name: str = choice("auto", "fsdp2", "deepspeed", "replicated")
    """FSDP2, DeepSpeed ZeRO, or replicated: every rank holds the whole model, which is the fastest
    where it fits. auto: replicated where weights, gradients and moments take at most 60 % of a
    device (83 % of a single one), else fsdp2."""
    zero_stage: int | None = choice(None, 1, 2, 3)
    """ZeRO stage of deepspeed; null: 3."""
    num_replicas: int | None = number(None, ge=1, le=2**16)
    """Copies of the sharded model under fsdp2 (HSDP); null: 1."""
    reshard_after_forward: bool | None = None
    """fsdp2: false keeps gathered weights until the backward pass; null: true."""
    sync_every: str = choice("auto", "micro_batch", "step")
    """fsdp2: gather weights and reduce gradients for every micro-batch, or once a step, which keeps
    both whole meanwhile (in bf16 6 bytes a parameter). auto: step where these and the shards take
    at most half of a device."""
    sequence_parallel: int = number(1, ge=1, le=2**16)
    """Ranks that share a micro-batch, each with a slice of its tokens; any number, also more than
    the model has heads."""
    offload: str = choice("none", "cpu")
    """cpu: keep master weights and Adam moments in host memory."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    learning_rate: float = number(5e-5, ge=0, le=10)
    """Peak learning rate."""
    schedule: str = choice("cosine", "linear", "constant")
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = number(0, ge=0, le=2**32)
    """Steps over which the learning rate rises linearly."""
    final_fraction: float = number(0.0, ge=0, le=1)
    """Fraction of the learning rate left at the end of the decay."""
    beta1: float = number(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = number(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    epsilon: float = number(1e-8, gt=0, le=1)
    """Added to the denominator of the update."""
    weight_decay: float = number(0.0, ge=0, le=10)
    """Decoupled weight decay, of matrices only, not of stacked biases."""
    max_grad_norm: float = number(1.0, ge=0)
    """Clip the gradient's global norm to this; 0: no clipping."""
    states: str = choice("fp32", "bf16", "8bit")
    """Storage of Adam's moments; bf16 is rounded stochastically."""


@dataclass
class TrainConfig:
    """Length of the run and size of a step."""

    max_steps: int | None = number(None, ge=1, lt=2**32)  # the step's word of a noise counter
    """Steps to train."""
    num_epochs: float | None = number(None, gt=0, le=2**20)
    """Epochs to train, rounded to whole steps; null: 3, unless train.max_steps is set."""
    global_batch_size: int = number(128, ge=1, le=2**24)
    """Documents per step over all ranks; an epoch's last step has the rest."""
    micro_batch_tokens: int = number(8192, ge=2, lt=2**31)
    """Most tokens, padding included, of one forward pass on one rank."""
    patience: int = number(0, ge=0, le=2**32)
    """End the run after this many evaluations in a row without a better held-out loss; 0: never."""
    max_skipped_steps: int = number(3, ge=0, le=2**32)
    """Consecutive steps with a non-finite loss or gradient to skip before the run stops."""
    profile_steps: int = number(0, ge=0, le=100)
    """Steps to profile, after the second: a trace and a table in run_dir/profile; 0: none."""
    hang_minutes: float = number(15.0, gt=0, le=2**20)
    """Stop the run if one phase of a step, such as a forward pass, takes longer."""
    seed: int = number(0, ge=0, le=_MAX_SEED)
    """Seed of the data order, of dropout and of new weights."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    every_steps: int = number(0, ge=0, le=2**32)
    """Steps between checkpoints; 0: only at the end and when the run is stopped."""
    keep: int = number(2, ge=0, le=2**32)
    """Newest complete checkpoints to keep; 0: all."""
    keep_every_steps: int = number(0, ge=0, le=2**32)
    """Never delete checkpoints whose step is a multiple of this; 0: no exception."""
    keep_best: bool = False
    """Save after an evaluation with the lowest held-out loss so far, and keep that checkpoint."""
    mode: str = choice("auto", "async", "sync")
    """async trains while it writes; auto: async if host memory holds a copy of the state."""
    timeout_minutes: float = number(120.0, gt=0, le=2**20)
    """Fail a save that makes no progress for this long."""
    resume: str = path("auto")
    """auto: the newest complete checkpoint in run_dir; never; or a checkpoint directory."""
    verify: bool = True
    """Compare the checksums of all files before resuming; their sizes are always compared."""
    accept_changes: str | None = None
    """Settings that may differ from the checkpoint's: optim.learning_rate,noise.alpha."""

    @property
    def accepted(self) -> tuple[str, ...]:
        """The keys that `accept_changes` lists."""
        return split_list(self.accept_changes)


@dataclass
class LoggingConfig:
    """Where each step's figures go, besides metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard files below run_dir/tensorboard."""
    wandb: bool = False
    """Log to Weights & Biases."""
    mlflow: bool = False
    """Log to MLflow at MLFLOW_TRACKING_URI, or without it to files in run_dir/mlflow."""
    project: str = "neftune_dist"
    """Project of wandb, experiment of mlflow."""
    name: str | None = None
    """Name of the run in wandb and mlflow; null: the last part of run_dir."""
    progress: bool = True
    """Show progress: a bar in a terminal, else plain lines."""


def split_list(words: str | None) -> tuple[str, ...]:
    """The words of a setting that separates them by commas."""
    return tuple(word for part in (words or "").split(",") if (word := part.strip()))
