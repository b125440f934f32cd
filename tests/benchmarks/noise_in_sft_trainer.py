"""The noise that documents get in TRL's SFTTrainer: its own `neftune_noise_alpha` against
`NEFTuneCallback`, on a few hundred rows of Alpaca, two ranks, padded and packed.

Norms are the L2 norm of what was added to a document's embeddings, over the paper's expected value
alpha / sqrt(3). Padding: that of the noise on a row's padding, mean over the rows that have
any. Shared draws:
noised tokens of rank 1 whose draws rank 0 has too, in the same optimizer step and in the whole run.

usage: python -m torch.distributed.run --standalone --nproc_per_node 2 \
    -m tests.benchmarks.noise_in_sft_trainer
"""

from __future__ import annotations

import gzip
import json
import math
import tempfile
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
import trl
from torch import Tensor

from neftune_dist.noise.callback import NEFTuneCallback
from tests.support.noise_probe import Forward, Recorder
from tests.support.shared_data import SHARED

ROWS, TOKENIZER = SHARED / "data/train/alpaca_union.json.gz", SHARED / "tokenizers/llama2-32k"
ALPHA, NUM_ROWS, MAX_LENGTH, HIDDEN, VOCAB = 5.0, 400, 1024, 128, 1024
LAW = ALPHA / math.sqrt(3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"per_device_train_batch_size": 8},
    "packed": {
        "packing": True,
        "packing_strategy": "bfd",
        "per_device_train_batch_size": 2,
    },
}


def read_rows(tokenizer: Any) -> datasets.Dataset:
    with gzip.open(ROWS, "rt") as file:
        rows = json.load(file)[:NUM_ROWS]
    text = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}</s>"
    ids = tokenizer([text.format(**row) for row in rows])["input_ids"]
    # Folded, because only lengths matter here and a loss over 32,000 words takes minutes.
    return datasets.Dataset.from_dict({"input_ids": [[i % VOCAB for i in row] for row in ids]})


def make_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def train(folder: str, layout: str, *, own: bool) -> list[Forward]:
    """One epoch with the trainer's own noise or this package's; this rank's forward passes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token  # id 2, in the folded vocabulary as well
    args = trl.SFTConfig(
        folder,
        max_length=MAX_LENGTH,
        num_train_epochs=1,
        neftune_noise_alpha=ALPHA if own else None,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **LAYOUTS[layout],
    )
    recorder = Recorder()
    trainer = trl.SFTTrainer(
        make_model(),
        args,
        train_dataset=read_rows(tokenizer),
        processing_class=tokenizer,
        callbacks=[recorder] if own else [recorder, NEFTuneCallback(ALPHA)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return recorder.forwards


def padding_norms(forward: Forward) -> Tensor:
    """Norm of the noise on the padding of each row that has any."""
    is_padding = forward.document < 0
    squares = forward.noise.double().square().sum(-1).where(is_padding, 0)
    return squares.sum(1).sqrt()[is_padding.any(1)]


def keys_by_step(forwards: list[Forward]) -> dict[int, Tensor]:
    return {forward.step: forward.keys for forward in forwards}


def describe(forwards: list[Forward], keys: list[dict[int, Tensor]]) -> str:
    """A line of the table, of both ranks' forward passes and draws."""
    norms = torch.cat([forward.norms() for forward in forwards]) / LAW
    worst = norms[(norms.log()).abs().argmax()]
    padding = torch.cat([padding_norms(forward) for forward in forwards]) / LAW
    first, second = keys
    same = torch.cat([torch.isin(second[step], first[step]) for step in second])
    run = torch.isin(*(torch.cat([*keys.values()]) for keys in (second, first)))
    figures = (norms.mean(), worst, padding.mean(), same.double().mean(), run.double().mean())
    cells = ["-" if figure.isnan() else f"{float(figure):.3f}" for figure in figures]
    return "".join(f"{cell:>14}" for cell in [*cells, len(norms)])


def main() -> None:
    for path in (ROWS, TOKENIZER):
        if not path.exists():
            raise SystemExit(f"{path} is missing: name the data's folder in NEFTUNE_DIST_TEST_DATA")
    datasets.disable_progress_bars()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for layout in LAYOUTS:
            for own in (True, False):
                forwards = train(folder, layout, own=own)
                seen: list[Any] = [None, None]
                dist.all_gather_object(seen, forwards)
                keys = [keys_by_step(batches) for batches in seen]
                name = "neftune_noise_alpha" if own else "NEFTuneCallback"
                lines.append(f"{layout}, {name:22}{describe([*seen[0], *seen[1]], keys)}")
    if dist.get_rank() == 0:
        heads = ["norm: mean", "norm: worst", "padding", "shared: step", "shared: run", "documents"]
        print(f"{'':30}" + "".join(f"{head:>14}" for head in heads))
        print(*lines, sep="\n")
        print(
            f"trl {trl.__version__}, transformers {transformers.__version__}, "
            f"torch {torch.__version__}, alpha {ALPHA:g}, hidden size {HIDDEN}"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
