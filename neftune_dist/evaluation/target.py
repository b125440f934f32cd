"""What is evaluated: a run, one of its checkpoints, or any Hugging Face model, whole on one device.

A checkpoint is read tensor by tensor into the model, adapters merged: no export is needed, and the
host holds one tensor at a time. The model computes what the export of that checkpoint computes in
the same dtype. Refused with `UserError`: a name that is none of these, a damaged checkpoint,
weights that do not fill the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from neftune_dist.checkpoint import store
from neftune_dist.checkpoint.merged import Content
from neftune_dist.checkpoint.run_files import (
    MODEL_FOLDER,
    check_architecture,
    check_sealed,
    run_config,
)
from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import Config, ModelConfig, UserError, load_config, read_json, user_path
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import Conversation, Turn
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.model import load, locate
from neftune_dist.model.families import check_model
from neftune_dist.model.modules import replace_parameters
from neftune_dist.system.text import first_line

# Of another model than the configuration's own, these say nothing.
_OF_ITS_OWN_MODEL = ("model.revision=null", "model.weights=null", "model.add_tokens=null")


@dataclass(frozen=True)
class Subject:
    """A model to look at. What it is made of is loaded when it is first asked for.

    name: for people and result files. config: of its run, or as given. step, alpha: of the
    checkpoint, and the noise it was trained with; None of a model that is no run's.
    folder: the model's files, with or without weights. run_dir: of a run, else None.
    device: where it computes. part: (rank, number of ranks) that share the reading of checksums.
    """

    name: str
    config: Config
    folder: Path
    device: torch.device
    part: tuple[int, int]
    run_dir: Path | None = None
    checkpoint: store.Checkpoint | None = None
    step: int | None = None
    alpha: float | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load.load_tokenizer(self.folder, self._plain)

    @cached_property
    def template(self) -> ConversationTokenizer:
        """Renders conversations as `data` says. Raises `UserError` where there is no template."""
        return ConversationTokenizer(self.tokenizer, self.config.data)

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens at which an answer ends: by the model's files, and that which ends the answers it
        is taught (a base model with a chat template of its own knows no other)."""
        own = self.folder / "generation_config.json"
        if own.exists():
            found = read_json(own, {"eos_token_id?": int | list | None}).get("eos_token_id")
        else:
            found = load.load_model_config(self.folder, self._plain).eos_token_id
        ends = {*(found if isinstance(found, list) else [found]), self.tokenizer.eos_token_id}
        ends.add(
            _taught_end(
                ConversationTokenizer(self.tokenizer, replace(self.config.data, supervise="last"))
            )
        )
        return sorted(ends - {None})

    @cached_property
    def model(self) -> Any:
        """The Hugging Face causal LM on its device, in the dtype `model.dtype`: in evaluation mode,
        without gradients, its attention padded (sdpa or eager), its own sampling settings dropped.

        Raises:
            UserError: weights that are damaged, incomplete or of another model.
        """
        transformers.utils.logging.disable_progress_bar()  # of the weights' loading: seconds
        model = self._of_files() if self.checkpoint is None else self._of_checkpoint()
        check_model(model, packing=False)
        model.generation_config = transformers.GenerationConfig()
        return model.requires_grad_(False).eval()

    @cached_property
    def identity(self) -> str:
        """Another one for other weights, as far as the manifest of a checkpoint tells, or names,
        sizes and times of files."""
        if self.checkpoint is not None:
            files: Any = sorted(self.checkpoint.files().items())
        else:
            stats = [(each.name, each.stat()) for each in sorted(self.folder.iterdir())]
            files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:24]

    @property
    def _plain(self) -> ModelConfig:
        """How the model is built where nothing but its computation counts."""
        eager = self.config.model.attention == "eager"
        return ModelConfig(
            dtype=self.config.model.dtype,
            attention="eager" if eager else "sdpa",
            add_tokens=None if self.checkpoint else self.config.model.add_tokens,
            trust_remote_code=self.config.model.trust_remote_code,
        )

    def _of_checkpoint(self) -> Any:
        assert self.checkpoint is not None
        if flaw := self.checkpoint.first_flaw(*self.part):
            raise store.damage_error(self.checkpoint, flaw)
        dtype = load.DTYPES[self._plain.dtype]
        model = load.build(self.folder, self._plain, packing=False, dtype=dtype)
        content = Content.of(self.checkpoint.folder, self.checkpoint.trainer_state())
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if shapes != content.shapes:
            raise UserError(
                f"The checkpoint {self.checkpoint.folder} is of another model than {self.folder}."
            )
        _allocate(model, self.device)
        load.initialize_buffers(model, self.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(content.read(name))
        return model

    def _of_files(self) -> Any:
        try:
            model, told = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder,
                attn_implementation=self._plain.attention,
                dtype=load.DTYPES[self._plain.dtype],
                trust_remote_code=self._plain.trust_remote_code,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its parsers do
            raise UserError(
                f"The model in {self.folder} cannot be loaded: {first_line(error)}"
            ) from error
        if told["missing_keys"]:  # which transformers fills with random numbers
            raise UserError(
                f"The weights in {self.folder} lack {sorted(told['missing_keys'])[0]}: they are "
                "incomplete, or of another model."
            )
        return model.to(self.device)


def open_subject(
    name: str | Path,
    *,
    step: int | None = None,
    config_file: str | Path | None = None,
    settings: Sequence[str] = (),
    device: torch.device | None = None,
    part: tuple[int, int] = (0, 1),
) -> Subject:
    """The subject of that name: a run directory (its newest complete checkpoint, or that of
    `step`), a checkpoint (RUN_DIR/checkpoints/step_00000020), a model directory or a hub id.

    Args:
        config_file: of a model that is no run's, whose configuration is the run's own.
        settings: `key=value` words, which come last.
        device: default: the GPU where there is one. part: see `Subject`.

    Raises:
        UserError: there is none, or an argument has no effect on it.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = user_path(str(name), "SUBJECT")
    is_run, is_checkpoint = (path / "config.yaml").is_file(), path.parent.name == "checkpoints"
    if not is_run and not is_checkpoint:
        if step is not None:
            raise UserError(f"--step={step} has no effect: {name} is no run directory.")
        return _open_model(str(name), config_file, settings, device, part)
    if config_file is not None:
        raise UserError(
            f"--config={config_file} has no effect: {name} is of a run, whose config.yaml counts; "
            "key=value words change it."
        )
    if is_checkpoint and step is not None:
        raise UserError(f"--step={step} has no effect: {name} is a checkpoint itself.")
    run_dir = path if is_run else path.resolve().parents[1]
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{name} belongs to no run: {run_dir} has no config.yaml.")
    config = run_config(run_dir, settings)
    chosen = store.choose(run_dir, step) if is_run else store.open_checkpoint(path)
    state = chosen.trainer_state()
    check_architecture(run_dir, state)
    return Subject(
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


@contextmanager
def attention_of(model: Any, implementation: str) -> Iterator[None]:
    """Meanwhile the model has that attention, by transformers' name."""
    usual = attention_name(model)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _open_model(
    name: str,
    config_file: str | Path | None,
    settings: Sequence[str],
    device: torch.device,
    part: tuple[int, int],
) -> Subject:
    path = user_path(name, "SUBJECT")
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(
            f"{name} is nothing to evaluate: neither a run directory (config.yaml), nor a "
            "checkpoint (RUN_DIR/checkpoints/step_00000020), nor a model directory (config.json)."
        )
    if config_file is not None:
        check_sealed(Path(config_file).parent)  # a run's own, perhaps
    words = [f"model.name_or_path={name}", *_OF_ITS_OWN_MODEL, *settings]
    config = load_config(config_file, words)
    folder = locate.find(config.model)
    shown = path.resolve().name if path.exists() else name.replace("/", "-")
    return Subject(name=shown, config=config, folder=folder, device=device, part=part)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device memory without content; tied weights stay one."""
    replace_parameters(model, lambda p: nn.Parameter(torch.empty_like(p, device=device)))


def _taught_end(template: ConversationTokenizer) -> int | None:
    """The special token that ends an answer in this template, if one does."""
    probe = Conversation((Turn("user", "Say yes."), Turn("assistant", "Yes.")))
    try:
        [document] = template.encode([template.render(probe)])
    except BadRow as error:
        raise UserError(f"data.template cannot be used: {error}.") from error
    last = int(document.input_ids[np.flatnonzero(document.supervised)[-1]])
    known = template.tokenizer.added_tokens_decoder
    return last if last in known and known[last].special else None
