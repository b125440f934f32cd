"""The model to evaluate: of a run, of one of its checkpoints, or of Hugging Face, on one device.

Weights are read tensor by tensor into the model, as a run reads them, so the host holds one at a
time; of a checkpoint no export is needed: adapters are merged, and the model computes what the
checkpoint's export computes in the same dtype. Refused with `UserError`: a name that is none of
these, a damaged checkpoint, weights that do not fill the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from neftune_dist.checkpoint import choice, store
from neftune_dist.checkpoint.merged import ModelTensors
from neftune_dist.checkpoint.run_files import check_architecture, check_sealed, run_config
from neftune_dist.config import (
    WHILE_TRAINING,
    Config,
    ModelConfig,
    UserError,
    load_config,
    user_path,
)
from neftune_dist.config.errors import brief
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.model import load, locate
from neftune_dist.model.generation import Generator, end_tokens
from neftune_dist.model.modules import replace_parameters
from neftune_dist.model.precision import fast_dtype, with_dtype
from neftune_dist.system.checkpoint_names import MODEL_FOLDER

# Keys that describe the configuration's own model, not the one to evaluate.
_KEYS_OF_THE_RUNS_MODEL = ("model.revision=null", "model.weights=null", "model.add_tokens=null")
# Settings and sections that have an effect: on a chat; on an evaluation in addition; on models that
# were not trained here; on losses of training documents.
_READ_BY_CHAT = (
    *("data", "model.dtype", "model.attention", "model.trust_remote_code"),
    *("evaluate.max_new_tokens", "evaluate.repetition_penalty"),
)
_READ_BY_EVALUATION = ("evaluate", "judge", "train.micro_batch_tokens", "engine.sequence_parallel")
_READ_WITHOUT_RUN = ("model.add_tokens", "model.revision")
_NOISE = ("noise", "train.seed")
_Read = Callable[[str], Tensor]  # the whole parameter or stored buffer of that name


@dataclass(frozen=True)
class EvaluationTarget:
    """A model to evaluate; tokenizer, template and weights are loaded on first use.

    Attributes:
        name: for logs and result files.
        config: of its run, or as given.
        folder: the model's files, with or without weights.
        device: where it computes.
        part: (rank, number of ranks) that share the verification of checksums.
        run_dir: None for a model that belongs to no run, as are the three that follow.
        checkpoint: of the run.
        step: of the checkpoint.
        alpha: that the checkpoint was trained with.
    """

    name: str
    config: Config
    folder: Path
    device: torch.device
    part: tuple[int, int]
    run_dir: Path | None = None
    checkpoint: store.Checkpoint | None = None
    step: choice.StepChoice = None
    alpha: float | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load.load_tokenizer(self.folder, self._plain)

    @cached_property
    def template(self) -> ConversationTokenizer:
        """The renderer of conversations, as `data` says. Raises `UserError` without a template."""
        return ConversationTokenizer(self.tokenizer, self.config.data)

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end an answer."""
        hf_config = load.trained_model_config(self.folder, self._plain)
        return end_tokens(self.folder, hf_config, self.template.end_of_turn[0])

    @cached_property
    def model(self) -> Any:
        """The Hugging Face causal LM on its device, in the dtype `model.dtype`: in evaluation mode,
        without gradients, its attention padded (sdpa or eager), its own settings of generation
        dropped but for the end tokens, which lm-eval reads there.

        Raises:
            UserError: weights that are damaged, incomplete or of another model.
        """
        dtype = load.DTYPES[self._plain.dtype]
        model = load.build(self.folder, self._plain, packing=False, dtype=dtype)
        read = self._of_files(model) if self.checkpoint is None else self._of_checkpoint(model)
        replace_parameters(model, lambda p: nn.Parameter(torch.empty_like(p, device=self.device)))
        load.initialize_buffers(model, self.device)
        with torch.no_grad():
            for name, held in [*model.named_parameters(), *load.stored_buffers(model)]:
                held.copy_(read(name))
        ends = end_tokens(self.folder, model.config, ())
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends or None)
        return model.requires_grad_(False).eval()

    @property
    def generator(self) -> Generator:
        """The model as it answers."""
        return Generator(
            self.model, self.tokenizer, self.end_tokens, self.config.evaluate, self.device
        )

    @cached_property
    def identity(self) -> str:
        """A digest that differs for other weights: of the checkpoint's manifest, or of the files'
        names, sizes and times."""
        if self.checkpoint is not None:
            files: Any = sorted(self.checkpoint.files().items())
        else:
            present = (path for path in sorted(self.folder.iterdir()) if path.exists())
            stats = [(path.name, path.stat()) for path in present]
            files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:24]

    @property
    def _plain(self) -> ModelConfig:
        """Model settings for evaluation: dtype, attention and tokens, no training options."""
        eager = self.config.model.attention == "eager"
        return ModelConfig(
            dtype=self.config.model.dtype,
            attention="eager" if eager else "auto",
            add_tokens=None if self.checkpoint else self.config.model.add_tokens,
            trust_remote_code=self.config.model.trust_remote_code,
        )

    def _of_checkpoint(self, model: Any) -> _Read:
        assert self.checkpoint is not None
        if flaw := self.checkpoint.first_flaw(*self.part):
            raise store.damage_error(self.checkpoint, flaw)
        content = ModelTensors.of(self.checkpoint.folder, self.checkpoint.trainer_state())
        if load.stored_shapes(model) != content.shapes:
            raise UserError(
                f"The checkpoint {self.checkpoint.folder} is of another model than {self.folder}."
            )
        return content.read

    def _of_files(self, model: Any) -> _Read:
        weights = load.open_weights(model, self.folder, self._plain, seed=0)
        shapes = load.stored_shapes(model)
        return lambda name: weights.read(name, 0, math.prod(shapes[name])).view(shapes[name])


def open_target(
    name: str | Path,
    *,
    step: choice.StepChoice = None,
    config_file: str | Path | None = None,
    settings: Sequence[str] = (),
    device: torch.device | None = None,
    part: tuple[int, int] = (0, 1),
    is_measured: bool = True,
) -> EvaluationTarget:
    """Open the model of that name.

    Args:
        name: a run directory, a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory
            or a hub id.
        step: of the run's checkpoint; None: the newest complete one.
        config_file: for a model that belongs to no run; a run has its own.
        settings: `key=value` words, applied last.
        device: None: the GPU where there is one.
        part: see `EvaluationTarget`.
        is_measured: False: settings that measurements alone read are refused.

    Raises:
        UserError: there is none, or an argument has no effect on it.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = user_path(str(name), "TARGET")
    is_run, is_checkpoint = (path / "config.yaml").is_file(), path.parent.name == "checkpoints"
    if step is not None and not is_run:
        kind = "a checkpoint itself" if is_checkpoint else "no run directory"
        raise UserError(f"--step={step} has no effect: {name} is {kind}.")
    if not is_run and not is_checkpoint:
        found = _model_fields(str(name), path, config_file, settings, is_measured)
        found["config"] = with_dtype(found["config"], fast_dtype(device))
        return EvaluationTarget(**found, device=device, part=part)
    if config_file is not None:
        raise UserError(
            f"--config={config_file} has no effect: {name} is of a run, whose config.yaml counts; "
            "key=value words change it."
        )
    run_dir = path if is_run else path.resolve().parents[1]
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{name} belongs to no run: {run_dir} has no config.yaml.")
    config = with_dtype(run_config(run_dir, settings), fast_dtype(device))
    _check_read(config, settings, (), is_measured)
    chosen = choice.choose(run_dir, step) if is_run else store.open_checkpoint(path)
    state = chosen.trainer_state()
    check_architecture(run_dir, state)
    return EvaluationTarget(
        name=f"{run_dir.resolve().name}-step-{chosen.step}",
        config=config,
        folder=run_dir / MODEL_FOLDER,
        device=device,
        part=part,
        run_dir=run_dir,
        checkpoint=chosen,
        step=chosen.step,
        alpha=float(state["config"]["noise"]["alpha"]),
    )


def _check_read(
    config: Config, settings: Sequence[str], others: tuple[str, ...], is_measured: bool
) -> None:
    """Raise `UserError` for a `key=value` word that decides nothing once a model is trained."""
    measured = _READ_BY_EVALUATION + _NOISE if is_measured else ()
    read = _READ_BY_CHAT + others + measured
    for word in settings:
        key = word.partition("=")[0]
        if not _is_within(key, read) or key in (f"evaluate.{name}" for name in WHILE_TRAINING):
            raise UserError(
                f"{brief(word)} has no effect on a model that is trained: leave it out."
            )
        if _is_within(key, _NOISE) and not config.evaluate.train_documents:
            raise UserError(
                f"{brief(word)} has no effect: noise is added to training documents alone, of "
                "which evaluate.train_documents=0 measures none."
            )
        if _is_within(key, ["judge"]) and key != "judge.reference" and not config.judge.reference:
            raise UserError(f"{brief(word)} has no effect without judge.reference to compare with.")


def _is_within(key: str, names: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _model_fields(
    name: str,
    path: Path,
    config_file: str | Path | None,
    settings: Sequence[str],
    is_measured: bool,
) -> dict[str, Any]:
    """Name, configuration and folder of a model that belongs to no run."""
    if not (path / "config.json").is_file() and (path.exists() or locate.is_path(name)):
        neither = (
            "it is neither a run directory (config.yaml), nor a checkpoint "
            "(RUN_DIR/checkpoints/step_00000020), nor a model directory (config.json)"
        )
        raise UserError(f"{name} is no model: {neither if path.exists() else 'it does not exist'}.")
    if config_file is not None:
        check_sealed(Path(config_file).parent)  # a run's own, perhaps
    words = [f"model.name_or_path={name}", *_KEYS_OF_THE_RUNS_MODEL, *settings]
    config = load_config(config_file, words)
    _check_read(config, settings, _READ_WITHOUT_RUN, is_measured)
    shown = path.resolve().name if path.exists() else name.replace("/", "-")
    return {"name": shown, "config": config, "folder": locate.find(config.model)}
