"""The tokenizer that a fast tokenizer wraps, apart from the tokens that it adds to a text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer


def bare(backend: Any, literal: bool = False) -> Any:
    """The tokenizer without a post-processor: special tokens are added by `tokenize`, and some
    post-processors strip spaces from the offsets, which would hide their speaker. It is shared
    between callers.

    Args:
        backend: the tokenizer, which is copied.
        literal: whether special tokens in a text are read as plain text.
    """
    return _parsed(backend.to_str(), literal)


# Parsing takes a tenth of a second to a second, by the vocabulary; a verb needs the same two often.
@lru_cache(maxsize=4)
def _parsed(text: str, literal: bool) -> Any:
    made: Any = Tokenizer.from_str(text)
    made.post_processor = None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = literal
    return made


def prefix_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: a letter, or a token's text where it knows
    no letter."""
    for text in ("a", *(tokenizer.decode([i]) for i in range(min(1000, len(tokenizer))))):
        probe = tokenizer(text, return_special_tokens_mask=True)
        if 0 in probe["special_tokens_mask"]:
            ids: list[int] = probe["input_ids"]
            return ids[: probe["special_tokens_mask"].index(0)]
    return []


def unknown_character(backend: Any, text: str) -> str:
    """The first character outside the vocabulary, for a tokenizer that drops such characters
    without a trace, which also shifts the offsets of all that follow; "" without one."""
    for token in backend.get_added_tokens_decoder().values():
        text = text.replace(token.content, "")
    normalised = backend.normalizer.normalize_str(text) if backend.normalizer else text
    splits = backend.pre_tokenizer is not None  # and drops white space itself
    known = backend.get_vocab()
    unknown = (c for c in normalised if c not in known and not (splits and c.isspace()))
    return next(unknown, "")


def drops_characters(backend: Any) -> bool:
    """Whether a character outside the vocabulary becomes no token: no unknown one, no bytes."""
    model, before = backend.model, (str(backend.pre_tokenizer), str(backend.normalizer))
    is_bpe = type(model).__name__ == "BPE"
    has_bytes = model.byte_fallback if is_bpe else False
    has_bytes = has_bytes or any("ByteLevel" in part for part in before)
    return is_bpe and model.unk_token is None and not has_bytes
