"""Real conversations under real chat templates: rows trained, split and refused, with reasons.

    python -m tests.benchmarks.chat_templates SHAREGPT.json.gz ...

Takes the first 300 rows of each file and the templates that TRL ships, without its training
variants; prints the table of `neftune_dist/data/README.md`.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import trl
from transformers import AutoTokenizer

from neftune_dist.config import DataConfig
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import to_conversation
from neftune_dist.data.tokenize import ConversationTokenizer
from tests.support import tiny_model

FOLDER = Path(trl.__file__).parent / "chat_templates"
NUM_ROWS = 300


def survey(
    template: ConversationTokenizer, rows: list[dict[str, Any]]
) -> tuple[list[int], Counter[str]]:
    """Rows trained, how many of them are several documents, all documents; reasons of the rest."""
    trained = split = documents = 0
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            made = template.documents(to_conversation(row, "sharegpt"))
        except BadRow as error:
            reasons[re.sub(r"(such as|turn) \S+", r"\1 ...", str(error))] += 1
            continue
        trained += 1
        split += len(made) > 1
        documents += len(made)
    return [trained, split, documents], reasons


def main(paths: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tiny_model.make_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    contents = [gzip.decompress(Path(path).read_bytes()) for path in paths]
    files = [json.loads(content)[:NUM_ROWS] for content in contents]
    all_reasons: Counter[str] = Counter()
    for path in sorted(FOLDER.glob("*.jinja")):
        if path.stem.endswith("_training"):
            continue
        tokenizer.chat_template = path.read_text()
        template = ConversationTokenizer(tokenizer, DataConfig())
        cells = []
        for rows in files:
            counts, reasons = survey(template, rows)
            cells += [*map(str, counts), str(reasons.total())]
            for reason, number in reasons.items():
                all_reasons[reason] += number
        print(f"| {path.stem} | {' | '.join(cells)} |", flush=True)
    print()
    for reason, number in all_reasons.most_common():
        print(number, reason)


if __name__ == "__main__":
    main(sys.argv[1:])
