"""`NEFTuneCallback`: the exact noise in transformers' `Trainer`, and so in TRL's `SFTTrainer`.

It replaces the trainer's own `neftune_noise_alpha`: lengths are the documents' own, padded or
packed; every data-parallel rank draws its own noise; a resumed run continues the noise of the
uninterrupted one. Settings under which the noise would be wrong are refused (`ValueError`).
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from neftune_dist.noise.handle import NEFTuneHandle
from neftune_dist.noise.law import expected_norm
from neftune_dist.noise.neftune import NEFTune
from neftune_dist.optim.schedule import Schedule

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from neftune_dist.compat.trainer import call_first
except ImportError:  # transformers imports PEFT where it is installed, and PEFT accelerate
    if find_spec("accelerate") is not None:
        raise
    TrainerCallback = object  # the constructor below says that accelerate is missing


class NEFTuneCallback(TrainerCallback):
    """A callback that puts the noise on when training begins, and takes it off when it ends.

    Args:
        alpha, distribution, length: as for `NEFTune`; `symmetric` needs every batch twice, which
            the trainer does not do.
        seed: None: the trainer's `seed`.
        schedule, warmup_steps, final_fraction: of alpha over the run, as `noise.schedule`,
            `noise.warmup_steps` and `noise.final_fraction`.

    The trainer's logs get `alpha`, `noise_norm` (mean over this rank's documents since the last log
    of the L2 norm of their noise) and `noise_law` (what it should be: alpha / sqrt(3) over them).

    Example::

        trainer = SFTTrainer(model, args, train_dataset=rows, callbacks=[NEFTuneCallback(5.0)])
        trainer.train()
    """

    def __init__(
        self,
        alpha: float,
        *,
        seed: int | None = None,
        distribution: str = "uniform",
        length: str = "document",
        schedule: str = "constant",
        warmup_steps: int = 0,
        final_fraction: float = 0.0,
    ) -> None:
        if find_spec("accelerate") is None:
            raise ImportError(
                "NEFTuneCallback needs accelerate, as transformers' Trainer does: "
                "pip install 'neftune-dist[trl]'."
            )
        if distribution == "symmetric":
            raise ValueError(
                "distribution='symmetric' needs every batch passed forward twice, which "
                "transformers' Trainer does not do."
            )
        if schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule={schedule!r} is not known: constant, linear or cosine.")
        if not isinstance(warmup_steps, int) or warmup_steps < 0:  # the trainer's may be a share
            raise ValueError(f"warmup_steps={warmup_steps} is not a number of steps, from 0.")
        if not 0 <= final_fraction <= 1:
            raise ValueError(f"final_fraction={final_fraction} is out of range: from 0 to 1.")
        if schedule == "constant" and final_fraction:
            raise ValueError("final_fraction has no effect with schedule='constant'.")
        NEFTune(alpha, seed=seed or 0, distribution=distribution, length=length)  # checks them
        self.alpha, self.seed = alpha, seed
        self.distribution, self.length = distribution, length
        self.schedule = Schedule(alpha, schedule, warmup_steps, final_fraction)
        self.handle: NEFTuneHandle | None = None
        self._alphas: list[float] = []  # of the steps since the last log

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a trainer whose settings contradict the noise."""
        if getattr(args, "neftune_noise_alpha", None) is not None:
            raise ValueError(
                f"neftune_noise_alpha={args.neftune_noise_alpha} is set as well: leave it out, or "
                "the trainer adds its own noise to NEFTuneCallback's."
            )
        if getattr(args, "packing", False) and args.packing_strategy == "wrapped":
            raise ValueError(
                "packing_strategy='wrapped' cuts documents and keeps no trace of where they begin: "
                "use packing_strategy='bfd'."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process trains on {args.n_gpu} GPUs, for which the trainer copies the model "
                "for every pass, and the noise's hooks with it: start one process a GPU (torchrun)."
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the noise to the model."""
        self.on_init_end(args, state, control)  # a callback may be added late
        self._remove()  # where an exception ended the training before
        call_first(self)
        model = kwargs["model"]
        if any(hasattr(part, "neftune_noise_alpha") for part in model.modules()):
            raise ValueError(
                "transformers' own NEFTune noise is still on this model, from a training with "
                "neftune_noise_alpha that an exception ended: load the model again."
            )
        self.handle = NEFTune(
            self.alpha,
            seed=args.seed if self.seed is None else self.seed,
            rank=_data_parallel_rank(args),
            distribution=self.distribution,
            length=self.length,
        ).attach(model)
        padding_token = _padding_token(kwargs.get("train_dataloader"))
        if padding_token is not None:
            self.handle.padding_token = padding_token
        if state.is_world_process_zero:
            print(
                f"NEFTuneCallback: in training, every document gets {self.distribution} noise of "
                f"norm {expected_norm(self.alpha, self.distribution):.4f} (alpha {self.alpha:g}, "
                f"schedule {self.schedule.shape}, L of the {self.length}, seed "
                f"{self.handle.neftune.seed}); evaluation and generation get none.",
                flush=True,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the noise's step and strength."""
        assert self.handle is not None
        self.handle.step = state.global_step
        self.handle.alpha = self.schedule.value(state.global_step, max(state.max_steps, 1))
        self._alphas.append(self.handle.alpha)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the noise's figures to the log entry that has the training loss."""
        logs = kwargs.get("logs") or {}
        if self.handle is None or "loss" not in logs:
            return
        added = self._since_last_log(state)
        logs.update(added)
        state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the noise off; first check the steps since the last log."""
        if self.handle is not None and self._alphas:
            self._since_last_log(state)
        self._remove()

    def _since_last_log(self, state: TrainerState) -> dict[str, float]:
        """The log's figures for the steps since the last log; warns if no forward got noise."""
        assert self.handle is not None
        norm_sum, num_documents = (float(value) for value in self.handle.take_noise_norms())
        expected = [expected_norm(alpha, self.distribution) for alpha in self._alphas]
        if any(self._alphas) and not num_documents:
            warnings.warn(
                f"NEFTuneCallback: no forward pass up to step {state.global_step} got noise: "
                "the model was not in training mode.",
                stacklevel=2,
            )
        self._alphas.clear()
        return {
            "alpha": self.handle.alpha,
            "noise_norm": norm_sum / num_documents if num_documents else 0.0,
            "noise_law": sum(expected) / max(1, len(expected)),
        }

    def __enter__(self) -> NEFTuneCallback:
        return self

    def __exit__(self, *_: object) -> None:
        """`with NEFTuneCallback(5.0) as callback:` around `trainer.train()` takes the noise off
        even where that raises."""
        self._remove()

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self._alphas.clear()


def _padding_token(dataloader: Any) -> int | None:
    """The padding token of TRL's collator, which may be within one that drops unused columns."""
    collator = getattr(dataloader, "collate_fn", None)
    collator = getattr(collator, "data_collator", collator)
    token = getattr(collator, "pad_token_id", None)
    return token if isinstance(token, int) else None


def _data_parallel_rank(args: TrainingArguments) -> int:
    from accelerate.state import AcceleratorState  # optional: the Trainer's own dependency

    deepspeed = getattr(args.deepspeed_plugin, "deepspeed_config", {})
    if deepspeed.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise ValueError(
            "DeepSpeed's tensor parallelism (tensor_parallel.autotp_size) may cut the embedding up "
            "by channels: NEFTuneCallback cannot give it its noise."
        )
    parallelism = getattr(AcceleratorState(), "parallelism_config", None)
    if parallelism is None:
        return int(args.process_index)
    if parallelism.cp_size > 1 or getattr(parallelism, "sp_size", 1) > 1:
        raise ValueError(
            "Context or sequence parallelism cuts documents up, and the trainer's batches do not "
            "say how long they are: NEFTuneCallback cannot give them their noise."
        )
    return int(args.process_index // parallelism.tp_size)  # tensor-parallel peers: neighbours
