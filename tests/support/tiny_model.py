"""A tiny model, tokenizer and rows, made on the spot; and runs of the command line on them."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from neftune_dist.data import builtin
from tests.support.families import family

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# What a step's record holds that is no property of the training.
TIMINGS = (
    "step_seconds",
    "data_wait_seconds",
    "tokens_per_second",
    "mfu",
    "mfu_6n",
    "memory_gib",
    "num_compiled_graphs",
)
DEADLINE_SECONDS = 240
# What ranks import by the time they train. A module that another version lacks is passed over.
_IMPORTED = (
    "neftune_dist.training.train",
    "neftune_dist.engine.fsdp2",
    "neftune_dist.engine.deepspeed",
    "neftune_dist.evaluation.evaluate",
    "neftune_dist.cli",
    "peft",
    "tensorboard.plugins.hparams.api_pb2",
    "torch.utils.tensorboard",
    "torch._inductor.compile_fx",  # DeepSpeed compiles an optimizer that is never used
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE of about 600 tokens with a chat template; pad equals eos."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [row["instruction"] + row["output"] for row in builtin.rows()[:500]],
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, *, tied: bool = True, seed: int = 0, intermediate: int = 112) -> Path:
    """A two-layer Llama with grouped queries, saved in float32 with its tokenizer."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 3,  # odd, so that shards are uneven
        hidden_size=64,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_family(folder: Path, model_type: str, **settings: Any) -> Path:
    """A tiny model of a family (`families.family`), saved in float32 with its tokenizer."""
    size = len(make_tokenizer(folder)) + 3
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    config = family(model_type, vocab_size=size, max_position_embeddings=256, **ends, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def make_rows(path: Path, number: int = 80) -> Path:
    """Rows of very different length, so that layouts differ."""
    rows = [
        {
            "instruction": f"Count from {i} upwards.",
            "input": "",
            "output": " ".join(str(i + k) for k in range(1 + (7 * i) % 23)),
        }
        for i in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(
    folder: Path, *, make: Callable[[Path], Path] | None = None, **sections: dict[str, Any]
) -> Path:
    """A model, rows and a configuration file in `folder`; the sections override its own.

    Args:
        make: of the model, in the folder that it is given.
    """
    model = (make or make_model)(folder / "model")
    base: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model), "dtype": "fp32"},
        "data": {
            "source": str(make_rows(folder / "rows.jsonl")),
            "max_length": 96,
            "num_held_out": 8,
            "cache_dir": str(folder / "cache"),
        },
        "noise": {"alpha": 5.0, "stream": "sample"},
        "engine": {"name": "fsdp2"},
        "optim": {"learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.01},
        "train": {"global_batch_size": 10, "micro_batch_tokens": 256, "max_steps": 10},
        "logging": {"progress": False},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    path = folder / "config.yaml"
    path.write_text(json.dumps(base))
    return path


def command(verb: str, *words: object, ranks: int = 1) -> list[str]:
    """The command line of a verb, under torchrun for several ranks."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else []
    )
    return [sys.executable, *launcher, "-m", "neftune_dist", verb, *map(str, words)]


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, no GPU, no hub."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def run(
    verb: str, *words: object, ranks: int = 1, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end through its real launcher, with further environment variables; a hang
    is a failure."""
    return subprocess.run(
        command(verb, *words, ranks=ranks),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


class Forked:
    """A verb in processes forked from one that has imported everything: seconds less than a start.

    Attributes:
        ranks: the processes; they meet as under torchrun.
    """

    def __init__(
        self,
        *words: object,
        ranks: int = 1,
        before: Callable[[], None] | None = None,
        seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """Start the ranks.

        Args:
            words: the verb and its words; without a verb, ranks do nothing after `before`.
            before: called in each rank first; it must pickle.
            seconds: after them `until` and `wait` fail.
        """
        self._words = [str(word) for word in words]
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err")]
        self._deadline = time.monotonic() + seconds
        self.ranks: list[multiprocessing.context.ForkServerProcess] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(ranks):
            own = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            variables = {key: str(value) for key, value in own.items()} if ranks > 1 else {}
            process = forkserver().Process(
                target=_rank, args=(variables, self._words, *self._files, before)
            )
            process.start()
            self.ranks.append(process)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; that a rank ends before it, or a hang, is a failure."""
        while not condition():
            assert time.monotonic() < self._deadline, "the run did not get so far"
            assert all(rank.is_alive() for rank in self.ranks), "the run ended by itself"
            time.sleep(0.005)

    def kill(self) -> None:
        """End all ranks at once, as a node that dies does."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank, as a launcher passes it on."""
        for rank in self.ranks:
            assert rank.pid is not None
            os.kill(rank.pid, number)

    def wait(self, grace_seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Wait for the end; a hang is a failure.

        Like a launcher, it ends all ranks when the first one fails; unlike torchrun, it gives that
        rank's own exit code.

        Args:
            grace_seconds: given to the other ranks to end by themselves when one has failed.
        """
        code = 0
        while any(rank.is_alive() for rank in self.ranks):
            failed = [rank.exitcode for rank in self.ranks if rank.exitcode]
            if failed or time.monotonic() > self._deadline:
                code = code or (failed[0] if failed else -1)
                for rank in self.ranks:
                    rank.join(0.2)
                    rank.terminate()
                    rank.join(grace_seconds)
                    rank.kill()
            time.sleep(0.01)
        code = code or next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
        assert code != -1, "the ranks hang"
        with self._folder:
            out, err = (file.read_text() for file in self._files)
        return subprocess.CompletedProcess(self._words, code, out, err)


def run_forked(
    verb: str,
    *words: object,
    ranks: int = 1,
    before: Callable[[], None] | None = None,
    grace_seconds: float = 30,
) -> subprocess.CompletedProcess[str]:
    """As `run`, in forked processes; see `Forked`."""
    return Forked(verb, *words, ranks=ranks, before=before).wait(grace_seconds)


def call_forked(function: Callable[[], None], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Call a function, which must pickle, in forked processes; see `Forked`."""
    return Forked(ranks=ranks, before=function).wait()


@cache
def forkserver() -> multiprocessing.context.ForkServerContext:
    """The process that has imported everything, as a context of `multiprocessing`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, "tests.support.freeze"])
    with unittest.mock.patch.dict(os.environ, environment()):
        multiprocessing.forkserver.ensure_running()
    return context


def _rank(
    variables: dict[str, str],
    words: list[str],
    out: Path,
    err: Path,
    before: Callable[[], None] | None = None,
) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.update(variables)
    import torch._inductor.config

    from neftune_dist.cli import main

    # Headers of vector instructions take g++ a second for every kernel, and in-process tests of
    # compiled models have them.
    torch._inductor.config.cpp.simdlen = 0
    if before is not None:
        before()
    if words:
        main(words)


def train(config: Path, run_dir: Path, *words: str, ranks: int = 1) -> list[dict[str, Any]]:
    """Train to the end; the steps' records."""
    done = run_forked("train", config, f"run_dir={run_dir}", *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return steps(run_dir)


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl so far, whole lines only."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


def untimed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records less what no two runs share."""
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat, read without a process group."""
    from neftune_dist.checkpoint import flat
    from neftune_dist.engine.base import FlatShard

    shards, reader = [], flat.Reader(folder, alone=True)
    for key, numel in reader.tensors.items():
        kind, _, name = key.partition("/")
        shards.append(FlatShard(kind, name, 0, torch.empty(numel), numel))
    reader.read(shards)
    return {shard.key: shard.tensor for shard in shards}
