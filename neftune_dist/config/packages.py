"""Optional packages: which settings need them, and what to install."""

from __future__ import annotations

from importlib.util import find_spec
from operator import attrgetter

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


# Values of settings that need a package: what is imported, and what pip installs.
_NEEDED = (
    ("engine.name", ("deepspeed",), "deepspeed", "deepspeed"),
    ("adapter.method", ("lora", "dora"), "peft", "neftune-dist[adapters]"),
    ("adapter.base", ("nf4",), "bitsandbytes", "neftune-dist[adapters]"),
    ("model.float8", ("tensorwise", "rowwise"), "torchao", "neftune-dist[float8]"),
    ("model.kernels", ("liger",), "liger_kernel", "neftune-dist[kernels]"),
    ("model.loss", ("liger",), "liger_kernel", "neftune-dist[kernels]"),
    ("logging.wandb", (True,), "wandb", "neftune-dist[trackers]"),
    ("logging.mlflow", (True,), "mlflow", "neftune-dist[trackers]"),
)


def check_packages(config: Config) -> None:
    """Refuse settings whose packages are missing, before a run begins. Raises `UserError`."""
    for key, values, package, install in _NEEDED:
        if (value := attrgetter(key)(config)) in values:
            require(package, f"{key}={str(value).lower()}", install)


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
