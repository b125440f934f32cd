"""Small sources and what came of them, for the tests of the dataset and of its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig
from neftune_dist.data.documents import Documents


def numbered(number: int, prompts: int | None = None) -> list[dict[str, str]]:
    """Rows that differ, with so many different prompts."""
    return [
        {"instruction": f"Count to {i % (prompts or number)}.", "output": f"{i}, done."}
        for i in range(number)
    ]


def texts(documents: Documents, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(documents[i][0].tolist()) for i in range(len(documents))]


def entries(config: DataConfig) -> list[str]:
    """What the cache holds, but for lock files."""
    folder = Path(config.cache_dir) / "corpora"
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def documents_of(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Documents:
    """Documents of these input_ids and masks, without files."""
    documents = Documents.__new__(Documents)
    ids, masks = zip(*rows, strict=True)
    documents._ids = np.concatenate(ids).astype(np.int32)
    documents._supervised = np.concatenate(masks).astype(np.uint8)
    documents.lengths = np.array([len(tokens) for tokens in ids], np.int64)
    documents.starts = np.cumsum(documents.lengths) - documents.lengths
    documents.num_supervised = np.array([mask.sum() for mask in masks], np.int64)
    return documents
