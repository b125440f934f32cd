"""What the unit tests share: tokenizers, rows, a process for Triton."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from neftune_dist.config import DataConfig
from neftune_dist.model import pickles
from tests.support import made_data, tiny_model
from tests.support.interpreter import interpreting_process
from tests.support.shared_data import shared, smollm2_files

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher_variables_left() -> Iterator[None]:
    """An engine sets LOCAL_RANK; other libraries would then look for the ranks of a launcher."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session", params=["made", "real"])
def origin(request: pytest.FixtureRequest) -> str:
    """Where the rows and the Llama-2 tokenizer of a test come from: tests/support/made_data.py, or
    the files of others that are not in this repository."""
    if request.param == "real":
        shared("data")
    return str(request.param)


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made_data")


@pytest.fixture(scope="session")
def real_alpaca() -> Path:
    """15,130 rows of Alpaca, of which 9 have an empty output."""
    return shared("data/train/alpaca_union.json.gz")


@pytest.fixture(scope="session")
def alpaca(origin: str, made_folder: Path, request: pytest.FixtureRequest) -> Path:
    """Rows in Alpaca's layout, a few with an empty output."""
    if origin == "real":
        path: Path = request.getfixturevalue("real_alpaca")
        return path
    return made_data.write_gzip(made_folder / "alpaca.json.gz", made_data.alpaca_rows())


@pytest.fixture(scope="session")
def dolly(origin: str, made_folder: Path) -> Path:
    """Rows in Dolly's layout; of the real file 2,996."""
    if origin == "real":
        return shared("data/train/dolly_3k.json.gz")
    return made_data.write_gzip(made_folder / "dolly.json.gz", made_data.dolly_rows())


@pytest.fixture(scope="session")
def fastchat(origin: str, made_folder: Path) -> Path:
    """Conversations of several turns, in ShareGPT's layout; in the real file 500."""
    if origin == "real":
        return shared("data/train/fastchat_dummy_conversation.json.gz")
    return made_data.write_gzip(made_folder / "talks.json.gz", made_data.conversations())


@pytest.fixture(scope="session")
def toolcalls(origin: str, made_folder: Path) -> Path:
    """Conversations with tools, in ShareGPT's layout; in the real file 300."""
    if origin == "real":
        return shared("data/train/llamafactory_glaive_toolcall.json.gz")
    return made_data.write_gzip(made_folder / "tools.json.gz", made_data.tool_conversations())


@pytest.fixture(scope="session")
def alpaca_eval() -> Path:
    """805 answers of Alpaca-7B and of text_davinci_003, and GPT-4's judgements of them."""
    return shared("data/eval/alpaca_eval")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a model directory, converted once into the user's cache."""
    return smollm2_files()


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Any:
    """A byte-level BPE tokenizer with a ChatML template; its pad token is its end-of-turn token."""
    return AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def llama2(origin: str, made_folder: Path) -> Any:
    """The Llama-2 tokenizer, or a small one of its kind: sentencepiece's spaces, a beginning token,
    no chat template."""
    if origin == "real":
        return AutoTokenizer.from_pretrained(shared("tokenizers/llama2-32k"))
    made_data.sentencepiece_tokenizer(made_folder / "sentencepiece")
    return AutoTokenizer.from_pretrained(made_folder / "sentencepiece")


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level BPE of 600 tokens, saved under `name_or_path`; pad equals eos."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_model.make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets its kernels."""
    with interpreting_process() as pool:
        yield pool


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., DataConfig]:
    """Write rows as JSON lines; the settings to read them with, and a cache of the test's own."""

    def of(rows: list[Any], name: str = "rows.jsonl", **settings: Any) -> DataConfig:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"cache_dir": str(tmp_path / "cache"), **settings}
        return DataConfig(source=str(path), **settings)

    return of


@pytest.fixture
def metadata_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folder of every distributed checkpoint whose description is read, once a reading."""
    folders: list[Path] = []
    read = pickles.read_metadata

    def counted(path: Path) -> Any:
        folders.append(path.parent)
        return read(path)

    monkeypatch.setattr(pickles, "read_metadata", counted)
    return folders
