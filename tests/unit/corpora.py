"""Small sources and what came of them, for the tests of the corpus and of its cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neftune_dist.config import DataConfig
from neftune_dist.data.corpus import Documents


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
