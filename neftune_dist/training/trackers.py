"""Trackers of a run's numbers: TensorBoard, Weights & Biases, MLflow.

A resumed run continues its record under the same identity, kept in the run directory. A missing
package, or a server that does not answer when the run begins, is refused with `UserError`. A
tracker that fails later is dropped with a warning: the run's own files hold every number.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from neftune_dist.config import LoggingConfig, UserError, require
from neftune_dist.system.text import first_line


class Tracker(Protocol):
    """Takes a run's numbers."""

    def record(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by name, after a step."""

    def close(self, failed: bool) -> None:
        """End the record, of a run that failed or finished."""


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
                first = first_line(error)
                if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
                    first = f"MLFLOW_TRACKING_URI is not set ({first})"
                raise UserError(f"logging.{name}=true: it cannot begin a run: {first}") from error

    def record(self, prefix: str, record: Mapping[str, Any]) -> None:
        """Record the numbers of a record, which has a `step`, as `prefix/name`."""
        values = {
            f"{prefix}/{key}": float(value)
            for key, value in record.items()
            if key != "step" and isinstance(value, (int, float))
        }
        for name in list(self._running):
            self._try(name, lambda tracker: tracker.record(values, record["step"]))

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


class _TensorBoard:
    def __init__(self, run_dir: Path, facts: Mapping[str, Any], first_step: int) -> None:
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        if not first_step:
            lines = [f"    {key}: {value}" for key, value in _flat(facts).items()]
            self._writer.add_text("run", "\n".join(lines))

    def record(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


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
        for prefix in ("train", "evaluate"):
            self._run.define_metric(f"{prefix}/*", step_metric="step")

    def record(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    def __init__(self, run_dir: Path, config: LoggingConfig, facts: Mapping[str, Any]) -> None:
        import mlflow

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
