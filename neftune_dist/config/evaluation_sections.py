"""The sections of a configuration that evaluations read, beside those of `sections`."""

from __future__ import annotations

from dataclasses import dataclass

from neftune_dist.config.knobs import number, path

HELD_OUT = "held_out"  # as evaluate.instructions
# Settings of `evaluate` that `train` alone reads.
WHILE_TRAINING = ("every_steps", "sample_prompts")


@dataclass
class EvaluateConfig:
    """Held-out loss during training, and the measurements of `neftune-dist evaluate`."""

    every_steps: int = number(0, ge=0, le=2**32)
    """Steps between evaluations; 0: only before the first step and after the last."""
    max_documents: int = number(0, ge=0)
    """Held-out documents to evaluate, chosen by a hash; 0: all."""
    train_documents: int = number(0, ge=0)
    """Training documents, chosen by a hash, for the loss with and without noise."""
    instructions: str | None = path(HELD_OUT)
    """Instructions to answer: held_out, or a file in AlpacaEval's format; null: none."""
    max_instructions: int = number(200, ge=0)
    """Instructions to answer: of held_out chosen by a hash, of a file the first; 0: all."""
    max_new_tokens: int = number(512, ge=1, le=2**20)
    """Most tokens of an answer."""
    repetition_penalty: float = number(1.2, gt=0, le=100)
    """Repetition penalty of answers, as in the paper, except on end tokens; 1: none."""
    samples: int = number(1, ge=1, le=2**16)
    """Answers to each instruction, drawn at evaluate.temperature; figures are means over them."""
    temperature: float = number(0.0, ge=0, le=100)
    """Temperature of the answers of `evaluate`; 0: greedy decoding."""
    batch_size: int = number(32, ge=1, le=2**16)
    """Prompts that a rank answers at once."""
    sample_prompts: str | None = path(None)
    """Prompts to answer while training, every evaluate.every_steps: a .txt file with one a line, or
    a file as evaluate.instructions; null: none."""
    tasks: str | None = None
    """Tasks of lm-eval, with a file of items where one is given: mmlu,arc_easy=arc.jsonl.gz."""
    max_task_items: int = number(0, ge=0)
    """First items of each task to use; 0: all."""


@dataclass
class JudgeConfig:
    """The model that compares two answers, for `evaluate` and `study`."""

    url: str | None = None
    """OpenAI-compatible endpoint: https://api.openai.com/v1."""
    model: str | None = None
    """Name of the model at the endpoint."""
    annotator: str | None = None
    """An annotator of the alpaca_eval package, in place of judge.url and judge.model."""
    reference: str | None = path(None)
    """File of answers to compare with, in AlpacaEval's format."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the API key, which is never written; null: send no key."""
    max_answer_tokens: int = number(64, ge=1, le=2**20)
    """Most tokens of a verdict; a model that reasons first needs more."""
    dollars_per_million_input: float = number(0.0, ge=0)
    """Price of a million input tokens."""
    dollars_per_million_output: float = number(0.0, ge=0)
    """Price of a million output tokens."""
    max_dollars: float = number(0.0, ge=0)
    """Refuse to begin if the estimated cost is higher; 0: no limit."""
    max_requests: int = number(10_000, ge=1)
    """Refuse to begin if more requests are needed; stop when retries exceed it."""
    num_parallel: int = number(4, ge=1, le=1024)
    """Requests in flight at once."""
    max_retries: int = number(5, ge=0, le=100)
    """Retries of a request that failed or was rate-limited."""
    timeout_seconds: float = number(120.0, gt=0, le=2**20)
    """Timeout of a request."""
