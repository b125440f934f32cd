"""Optional packages: which settings need them, and what to install."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from neftune_dist.config.config import Config
from neftune_dist.config.errors import UserError

_OWN = Path(__file__).parents[1]  # the folder of this package


@contextmanager
def imports_reported() -> Iterator[None]:
    """Make it a mistake of the user's where another project's package is installed and cannot be
    imported: it is damaged, or another package lacks what it needs.

    Raises:
        UserError: an import failed; it names the line.
    """
    try:
        yield
    except ImportError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if _OWN in Path(frame.filename).parents]
        if not own or (error.name or "").startswith(_OWN.name):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"`{own[-1].line}` fails: {reason}. Install that package again, in a version that fits "
            "the others, or leave out the setting that needs it."
        ) from error


def require(package: str, setting: str, install: str) -> None:
    """Refuse a setting whose package is missing.

    Args:
        package: as it is imported.
        setting: what needs it, as messages show it.
        install: what pip installs: `deepspeed`, or an extra such as `neftune-dist[adapters]`.

    Raises:
        UserError: it is not installed.
    """
    try:
        is_missing = find_spec(package) is None
    except ValueError:  # it is imported already, and was not found by a finder
        is_missing = False
    if is_missing:
        raise UserError(f"{setting} needs the package {package}: pip install '{install}'.")


def check_packages(config: Config) -> None:
    """Refuse settings whose packages are missing, before a run begins. Raises `UserError`."""
    model, adapter, logging = config.model, config.adapter, config.logging
    if config.engine.name == "deepspeed":
        require("deepspeed", "engine.name=deepspeed", "deepspeed")
    if adapter.method != "none":
        require("peft", f"adapter.method={adapter.method}", "neftune-dist[adapters]")
    if adapter.base == "nf4":
        require("bitsandbytes", "adapter.base=nf4", "neftune-dist[adapters]")
    if model.float8 != "none":
        require("torchao", f"model.float8={model.float8}", "neftune-dist[float8]")
    for name in ("kernels", "loss"):
        if getattr(model, name) == "liger":
            require("liger_kernel", f"model.{name}=liger", "neftune-dist[kernels]")
    for name in ("wandb", "mlflow"):
        if getattr(logging, name):
            require(name, f"logging.{name}=true", "neftune-dist[trackers]")


def check_evaluation_packages(config: Config) -> None:
    """Refuse evaluations whose packages are missing, before the first of them. Raises
    `UserError`."""
    evaluate, judge = config.evaluate, config.judge
    if evaluate.instructions:
        for package in ("sacrebleu", "rouge_score"):
            setting = f"evaluate.instructions={evaluate.instructions}"
            require(package, setting, "neftune-dist[evaluation]")
    if evaluate.tasks:
        require("lm_eval", f"evaluate.tasks={evaluate.tasks}", "neftune-dist[tasks]")
    if judge.annotator:
        require("alpaca_eval", f"judge.annotator={judge.annotator}", "neftune-dist[alpaca-eval]")
