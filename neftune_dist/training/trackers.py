"""Trackers of a run's numbers: TensorBoard, Weights & Biases, MLflow.

A resumed run continues its record under the same identity, kept in the run directory. A missing
package, or a server that does not answer when the run begins, is refused with `UserError`. A
tracker that fails later is dropped with a warning: the run's own files hold every number.
"""

from __future__ import annotations

import os
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from neftune_dist.config import LoggingConfig, UserError, require
from neftune_dist.system.text import first_line

# Figures of one group stand together in a tracker: `loss/held_out_loss`. Trackers sort groups by
# name, and the loss is to come first.
GROUPS = {
    "loss": ("loss", "held_out_loss", "perplexity"),
    "noise": ("noise_norm", "noise_law"),
    "optim": ("learning_rate", "grad_norm", "num_skipped_steps"),
    "speed": (
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "mfu_6n",
        "data_wait_seconds",
        "num_compiled_graphs",
        "world_size",
    ),
    "memory": ("memory_gib",),
    "tokens": ("num_documents", "num_tokens", "num_supervised_tokens", "padding_fraction"),
}
# By which TensorBoard's HPARAMS compares runs, and the figures beside them.
_COMPARED = (
    "model.name_or_path",
    "data.source",
    "noise.alpha",
    "noise.distribution",
    "noise.length",
    "noise.stream",
    "optim.learning_rate",
    "train.global_batch_size",
    "train.seed",
    "engine.name",
)
_RESULTS = ("loss/loss", "loss/held_out_loss", "noise/noise_norm", "speed/tokens_per_second")


class Tracker(Protocol):
    """Takes a run's numbers."""

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by name, after a step."""

    def close(self, failed: bool) -> None:
        """End the record, of a run that failed or finished."""


def check_stores(run_dir: Path, config: LoggingConfig) -> None:
    """Refuse a server that does not answer or lacks a key, and a store that cannot be written,
    before anything is read. Raises `UserError`."""
    for name, ask in (("wandb", _ask_wandb), ("mlflow", _ask_mlflow)):
        if not getattr(config, name):
            continue
        try:
            ask(run_dir)
        except Exception as error:  # of whatever its client and its server raise
            where = "its server"
            if name == "mlflow":
                where = f"the store {os.environ.get('MLFLOW_TRACKING_URI') or run_dir / 'mlflow'}"
            raise UserError(
                f"logging.{name}=true: {where} does not answer: {first_line(error)}"
            ) from error


def _ask_wandb(run_dir: Path) -> None:
    import wandb

    if os.environ.get("WANDB_MODE", "online") == "online":
        wandb.login(verify=True)


def _ask_mlflow(run_dir: Path) -> None:
    # By itself the client tries for minutes, which is right for a run under way.
    variable = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    given = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        _mlflow(run_dir).search_experiments(max_results=1)
    finally:
        os.environ.pop(variable)
        if given is not None:
            os.environ[variable] = given


class Trackers:
    """The trackers that `logging` asks for.

    Args:
        run_dir: where their files and identities lie.
        config: which trackers, and how they name the run.
        facts: configuration and environment, as nested dicts; recorded with the run.
        first_step: the last step made so far; earlier records of later steps are dropped.
    """

    def __init__(
        self, run_dir: Path, config: LoggingConfig, facts: Mapping[str, Any], first_step: int
    ) -> None:
        self._running: dict[str, Tracker] = {}
        if config.tensorboard:
            self._running["tensorboard"] = _TensorBoard(run_dir, facts, first_step)
        for name, kind in (("wandb", _WandB), ("mlflow", _MLflow)):
            if not getattr(config, name):
                continue
            require(name, f"logging.{name}=true", "neftune-dist[trackers]")
            try:
                self._running[name] = kind(run_dir, config, facts)
            except Exception as error:  # of whatever its client and its server raise
                raise UserError(
                    f"logging.{name}=true: it cannot begin a run: {first_line(error)}"
                ) from error

    def record(self, record: Mapping[str, Any]) -> None:
        """Record the numbers of a step or of an evaluation, which has a `step`, as `group/name`."""
        held_out = "held_out_loss" in record
        values = {
            figure_name(key, held_out): float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        }
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.record(values, record["step"]))

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the answers to sample prompts, as text: in TensorBoard alone."""
        tracker = self._running.get("tensorboard")
        if isinstance(tracker, _TensorBoard):
            self._try("tensorboard", lambda _: tracker.samples(rows))

    def close(self, failed: bool = False) -> None:
        """Flush and close all trackers."""
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.close(failed))
        self._running.clear()

    def _try(self, name: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(self._running[name])
        except Exception as error:  # training does not depend on a server
            del self._running[name]
            print(f"warning: {name} has failed and gets no more numbers: {error}", file=sys.stderr)


def figure_name(key: str, held_out: bool = False) -> str:
    """The name of a figure in a tracker: its group, and its key in the run's records. The counts of
    an evaluation are told apart from a step's."""
    group = next((name for name, keys in GROUPS.items() if key in keys), "other")
    return f"{group}/{'held_out_' if held_out and group == 'tokens' else ''}{key}"


class _TensorBoard:
    """TensorBoard calls a run by its folder, which is therefore called as the run's directory."""

    def __init__(self, run_dir: Path, facts: Mapping[str, Any], first_step: int) -> None:
        folder = run_dir / "tensorboard" / run_dir.resolve().name
        before = set(threading.enumerate())
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        _print_nothing(set(threading.enumerate()) - before)
        if not first_step:
            flat = _flat(facts)
            lines = [f"    {key}: {value}" for key, value in flat.items()]
            self._writer.add_text("run", "\n".join(lines))
            compared = {key: flat.get(f"config.{key}") for key in _COMPARED}
            known = {key: value for key, value in compared.items() if value is not None}
            assert self._writer.file_writer is not None
            for summary in hparams(known, dict.fromkeys(_RESULTS, 0.0)):
                self._writer.file_writer.add_summary(summary)

    def record(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            # Indented, so that TensorBoard shows the text as it is and reads no Markdown in it.
            texts = (textwrap.indent(str(row[key]), "    ") for key in ("instruction", "output"))
            text = "\n\nanswer:\n\n".join(texts)
            self._writer.add_text(f"samples/{row['index'] + 1}", text, row["step"])

    def close(self, failed: bool) -> None:
        self._writer.close()


def _print_nothing(threads: set[threading.Thread]) -> None:
    """Have no exception printed that ends one of these threads: TensorBoard raises it again at the
    next record, where it becomes a warning."""
    usual = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if arguments.thread not in threads:
            usual(arguments)

    threading.excepthook = hook


class _WandB:
    """The step is logged as a metric: W&B's internal count could not go back on a resume."""

    def __init__(self, run_dir: Path, config: LoggingConfig, facts: Mapping[str, Any]) -> None:
        import wandb

        kept = run_dir / "wandb_id.txt"
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.resolve().name,
            id=kept.read_text().strip() if kept.exists() else None,
            resume="allow",
            dir=str(run_dir),
            config=dict(facts),
        )
        kept.write_text(self._run.id)
        for group in GROUPS:
            self._run.define_metric(f"{group}/*", step_metric="step")

    def record(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _mlflow(run_dir: Path) -> Any:
    """MLflow's client with its store: MLFLOW_TRACKING_URI, or files in the run's directory."""
    # Recent versions ask for a store of files to be allowed.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri((run_dir / "mlflow").resolve().as_uri())
    return mlflow


class _MLflow:
    def __init__(self, run_dir: Path, config: LoggingConfig, facts: Mapping[str, Any]) -> None:
        mlflow = _mlflow(run_dir)
        kept = run_dir / "mlflow_id.txt"
        mlflow.set_experiment(config.project)
        run = mlflow.start_run(
            run_id=kept.read_text().strip() if kept.exists() else None,
            run_name=config.name or run_dir.resolve().name,
        )
        if not kept.exists():
            # MLflow's parameters cannot change: a resumed run writes none. At most 500 characters.
            mlflow.log_params({key: str(value)[:500] for key, value in _flat(facts).items()})
            kept.write_text(run.info.run_id)
        self._mlflow = mlflow

    def record(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
