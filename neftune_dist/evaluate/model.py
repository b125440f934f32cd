"""A Hugging Face model directory evaluated in one process: held-out loss, answers, exact match."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from neftune_dist.config import BUILTIN_SOURCE, Config, UserError
from neftune_dist.data import builtin
from neftune_dist.data.corpus import Corpus, prepare
from neftune_dist.data.loader import evaluation_batches
from neftune_dist.data.template import Template
from neftune_dist.model.attention import implementation
from neftune_dist.model.load import load_model_config, load_tokenizer
from neftune_dist.model.loss import resolve_loss, token_loss_sum
from neftune_dist.model.support import check_model, check_packable

_GENERATION_ROWS = 32


@dataclass(frozen=True)
class Answer:
    """One held-out prompt, what was expected and what the model said."""

    prompt: str
    expected: str
    answer: str
    correct: bool | None  # None where the answers of the source cannot be checked


@dataclass(frozen=True)
class Evaluation:
    """held_out_loss: mean over supervised tokens. exact_match: share of answers, or None."""

    model: str
    held_out_loss: float
    num_documents: int
    exact_match: float | None
    answers: list[Answer]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate_model(
    folder: Path,
    config: Config,
    *,
    num_answers: int,
    max_new_tokens: int = 64,
    log: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate the model in `folder` on the held-out documents of `config`, noise off.

    Args:
        num_answers: held-out prompts to answer greedily, from the first on; 0: none.

    Raises:
        UserError: nothing is held out, or the model cannot be loaded.
    """
    tokenizer = load_tokenizer(folder, config.model)
    corpus = prepare(config.data, tokenizer, log)
    if not len(corpus.held_out):
        raise UserError("No documents are held out to evaluate on: set data.num_held_out.")
    transformers.utils.logging.disable_progress_bar()  # of the weights' loading: seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.data.packing:
        check_packable(load_model_config(folder, config.model))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            attn_implementation=implementation(config.model.attention, config.data.packing),
            dtype=torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"The model in {folder} cannot be loaded: {error}") from error
    check_model(model, config.data.packing)
    model = model.to(device).eval()
    loss = _loss(model, corpus, config, device)
    # Generation reads a padded batch.
    model.set_attn_implementation("eager" if config.model.attention == "eager" else "sdpa")
    answers = _answers(model, tokenizer, corpus, config, num_answers, max_new_tokens, device, log)
    checked = [a.correct for a in answers if a.correct is not None]
    return Evaluation(
        model=str(folder),
        held_out_loss=loss,
        num_documents=len(corpus.held_out),
        exact_match=sum(checked) / len(checked) if checked else None,
        answers=answers,
    )


@torch.no_grad()
def _loss(model: Any, corpus: Corpus, config: Config, device: torch.device) -> float:
    indices = np.arange(len(corpus.held_out))
    total = 0.0
    for batch in evaluation_batches(corpus.held_out, indices, config, 0, 1, 1e9):
        batch = batch.to(device)
        total += float(
            token_loss_sum(
                model,
                kind=resolve_loss("auto", model),
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                cu_seqlens=batch.cu_seqlens,
                longest=max(batch.document_lengths),
                positions=batch.positions,
                targets=batch.targets,
            )
        )
    return total / int(corpus.held_out.num_supervised.sum())


@torch.no_grad()
def _answers(
    model: Any,
    tokenizer: Any,
    corpus: Corpus,
    config: Config,
    num_answers: int,
    max_new_tokens: int,
    device: torch.device,
    log: Callable[[str], None],
) -> list[Answer]:
    template = Template(tokenizer, config.data)
    spoken = (each for each in corpus.held_out_conversations if each.turns)  # no plain text
    chosen = list(islice(spoken, num_answers))
    prompts = [template.prompt_ids(conversation) for conversation in chosen]
    end = tokenizer.eos_token_id
    sources = {each.source for each in config.data.sources.values()}
    checkable = sources == {BUILTIN_SOURCE} and not config.data.held_out_source
    answers: list[Answer] = []
    for first in range(0, len(chosen), _GENERATION_ROWS):
        rows = prompts[first : first + _GENERATION_ROWS]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), 0 if end is None else end)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):  # padded on the left, so that answers start together
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        out = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0 if end is None else end,
        )
        for conversation, row in zip(chosen[first:], out, strict=False):
            expected = next(turn.content for turn in conversation.turns if turn.role == "assistant")
            said = tokenizer.decode(row[width:], skip_special_tokens=True).strip()
            answers.append(
                Answer(
                    prompt=conversation.messages()[0]["content"],
                    expected=expected,
                    answer=said,
                    correct=builtin.exact_match(said, expected) if checkable else None,
                )
            )
        log(f"evaluate: {len(answers)} of {len(chosen)} answers")
    return answers
