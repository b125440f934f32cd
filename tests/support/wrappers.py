"""Tiny multimodal wrappers: a text model among towers, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from neftune_dist.model.families import WRAPPERS
from tests.support.shrunk import shrunk
from tests.support.tiny_model import make_tokenizer


def tiny_wrapper(model_type: str, **text: Any) -> Any:
    """The whole model, in float32.

    Args:
        text: settings of its text model.
    """
    config = shrunk(model_type)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    if model_type == "qwen2_5_vl":
        config.tie_word_embeddings = True  # as the published 3B
    torch.manual_seed(0)
    model = getattr(transformers, WRAPPERS[model_type])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms of exactly 1, biases of 0 would hide mistakes
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_wrapper(folder: Path, model_type: str, num_further: int = 40) -> Path:
    """A tiny wrapper saved with a tokenizer, and with a processor's file.

    Args:
        num_further: rows of the embedding beyond the tokenizer's tokens.
    """
    size = len(make_tokenizer(folder)) + num_further
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    tiny_wrapper(model_type, vocab_size=size, **ends).save_pretrained(folder)
    if model_type == "qwen2_5_vl":
        _as_published(folder / "config.json")
    (folder / "preprocessor_config.json").write_text('{"image_size": 16}\n')
    return folder


def _as_published(path: Path) -> None:
    """Put the text model's settings beside the towers', under the names of Qwen2.5-VL's files."""
    config = json.loads(path.read_text())
    text = {k: v for k, v in config.pop("text_config").items() if k != "model_type"}
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope.pop("mrope_section")}
    text["rope_theta"] = rope["rope_theta"]
    path.write_text(json.dumps({**config, **text}))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of text, without gradients."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found
