"""Trainers with `NEFTuneCallback`, one after the other, and what their models saw: CASE_RANK.pt."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from neftune_dist.noise.callback import NEFTuneCallback
from tests.support.noise_probe import Recorder

DEADLINE_SECONDS = 100
STEPS, ACCUMULATION = 4, 2
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "gradient_accumulation_steps": ACCUMULATION,
    "per_device_train_batch_size": 3,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
}
# Of very different lengths, one token among them.
LENGTHS = [1, 90, 2, 5, 40, 17, 3, 64]


def rows(number: int, first: int = 0) -> Dataset:
    """Documents of a few tokens to more than the maximum length."""
    texts = [
        " ".join(str(i + k) for k in range(1 + (37 * i) % 60)) for i in range(first, first + number)
    ]
    return Dataset.from_dict({"text": texts})


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def sft(folder: Path, name: str, callbacks: list[Any], **settings: Any) -> trl.SFTTrainer:
    """TRL's trainer on a fresh copy of the model, writing to FOLDER/NAME."""
    args = trl.SFTConfig(str(folder / name), max_length=96, **{**SETTINGS, **settings})
    if args.fsdp:  # accelerate shards on GPUs only; on CPUs it would take DDP and not say so
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    return trl.SFTTrainer(
        load(folder),
        args,
        train_dataset=rows(60),
        eval_dataset=rows(8, first=60) if args.eval_strategy != "no" else None,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=callbacks,
    )


def num_hooks(model: nn.Module) -> int:
    """Hooks that run in a forward pass of the model."""
    parts = list(model.modules())
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


class HooksBefore(transformers.TrainerCallback):
    """Counts the hooks when training begins. (Trainers put on some of their own before.)"""

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        self.number = num_hooks(kwargs["model"])


def train(build: Callable[[list[Any]], transformers.Trainer], **options: Any) -> dict[str, Any]:
    """Train to the end; what happened, for the tests to judge.

    Args:
        build: makes the trainer, and puts these callbacks before the others.
        options: to `Trainer.train`.
    """
    before, recorder = HooksBefore(), Recorder()
    trainer = build([before, recorder])
    trainer.train(**options)
    return {
        "forwards": [vars(forward) for forward in recorder.forwards],
        "hooks": (before.number, num_hooks(trainer.model)),
        "log": trainer.state.log_history,
        "parameter": type(next(trainer.model.parameters())).__name__,
    }


def padded(folder: Path, first: list[Any]) -> trl.SFTTrainer:
    return sft(
        folder,
        "padded",
        [*first, NEFTuneCallback(5.0)],
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=2,
    )


def packed(folder: Path, first: list[Any], **settings: Any) -> trl.SFTTrainer:
    noise = NEFTuneCallback(5.0, schedule="linear", warmup_steps=2, final_fraction=0.2)
    return sft(folder, "packed", [*first, noise], packing=True, packing_strategy="bfd", **settings)


def flattened(folder: Path, first: list[Any]) -> transformers.Trainer:
    """A plain Trainer, on adapters alone."""
    ids = [[5 + (i * k) % 500 for k in range(n)] for i, n in enumerate(LENGTHS * 6)]
    return transformers.Trainer(
        get_peft_model(load(folder), LoraConfig(target_modules=["q_proj"], r=2)),
        transformers.TrainingArguments(str(folder / "flattened"), **SETTINGS),
        data_collator=transformers.DataCollatorWithFlattening(
            return_flash_attn_kwargs=True, return_seq_idx=True
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[*first, NEFTuneCallback(5.0)],
    )


def run_train(folder: Path) -> dict[str, Any]:
    """Every kind of trainer and batch."""
    results: dict[str, Any] = {
        kind.__name__: train(partial(kind, folder)) for kind in (padded, packed, flattened)
    }
    plain = sft(folder, "plain", [], eval_strategy="steps")
    results["plain_eval_loss"] = plain.evaluate()["eval_loss"]
    AcceleratorState._reset_state()
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    results["sharded"] = train(partial(packed, folder, fsdp=True, fsdp_config=fsdp))
    return results


def run_resume(folder: Path) -> dict[str, Any]:
    """The second half of the padded run again, in a process that knows nothing of the first."""
    checkpoint = str(folder / "padded" / f"checkpoint-{STEPS // 2}")
    return {"resumed": train(partial(padded, folder), resume_from_checkpoint=checkpoint)}


@dataclass(frozen=True)
class Worker:
    """What a rank does.

    Attributes:
        case: `train`, or `resume` from the checkpoint that `train` left.
        folder: holds the tiny model.
    """

    case: str
    folder: Path

    def __call__(self) -> None:
        faulthandler.dump_traceback_later(DEADLINE_SECONDS, exit=True)  # a hang is a failure
        results = {"train": run_train, "resume": run_resume}[self.case](self.folder)
        torch.save(results, self.folder / f"{self.case}_{torch.distributed.get_rank()}.pt")
        torch.distributed.barrier()  # none leaves while another still talks to it
        torch.distributed.destroy_process_group()
