"""Optional packages: which settings need them, and what to install."""

from __future__ import annotations

from importlib.util import find_spec

from neftune_dist.config.config import Config
from neftune_dist.config.errors import UserError


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
