"""What trackers are told, through doubles of the clients that most machines do not have."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from neftune_dist.config import LoggingConfig, UserError, load_config
from neftune_dist.training.trackers import GROUPS, Trackers, check_stores

FACTS = {"config": {"noise": {"alpha": 5.0}}, "environment": {"torch": "2"}}
RECORD = {"step": 4, "loss": 1.5, "mfu": None, "num_tokens": 7}


class Wandb:
    """As much of the client as is used; it remembers what it was told."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.fails_at = fails_at

    def init(self, **settings: Any) -> Any:
        self.begun.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "abc",
            define_metric=lambda name, step_metric: None,
            log=self.log,
            finish=self.finish,
        )

    def log(self, values: dict[str, Any]) -> None:
        if values["step"] == self.fails_at:
            raise ConnectionError("gone")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


class Mlflow:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def set_tracking_uri(self, uri: str) -> None:
        self.told.append(("store", uri))

    def set_experiment(self, name: str) -> None:
        self.told.append(("experiment", name))

    def start_run(self, run_id: str | None, run_name: str) -> Any:
        self.told.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "xyz"))

    def log_params(self, params: dict[str, str]) -> None:
        self.told.append(("params", params))

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.told.append(("metrics", values, step))

    def end_run(self, status: str) -> None:
        self.told.append(("end", status))


def settings(**words: Any) -> LoggingConfig:
    return LoggingConfig(tensorboard=False, **words)


def test_wandb_run_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run goes on under the same identity, and counts its own steps."""
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 3):
        trackers = Trackers(tmp_path, settings(wandb=True, name="mine"), FACTS, first_step)
        trackers.record(RECORD)
        trackers.close(failed=first_step == 0)
    assert [run["id"] for run in wandb.begun] == [None, "abc"]
    assert wandb.begun[0]["config"] == FACTS
    assert (wandb.begun[0]["project"], wandb.begun[0]["name"]) == ("neftune_dist", "mine")
    assert wandb.logged == [{"loss/loss": 1.5, "tokens/num_tokens": 7.0, "step": 4}] * 2
    assert wandb.ended == [1, 0]


def test_mlflow_run_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    for first_step in (0, 3):
        trackers = Trackers(run, settings(mlflow=True), FACTS, first_step)
        trackers.record({**RECORD, "held_out_loss": 2.5})
        trackers.close(failed=first_step == 0)
    values = {
        "loss/loss": 1.5,
        "tokens/held_out_num_tokens": 7.0,
        "loss/held_out_loss": 2.5,
    }
    store = ("store", (run / "mlflow").as_uri())
    assert mlflow.told == [
        store,
        ("experiment", "neftune_dist"),
        ("start", None, "run"),
        ("params", {"config.noise.alpha": "5.0", "environment.torch": "2"}),
        ("metrics", values, 4),
        ("end", "FAILED"),
        store,
        ("experiment", "neftune_dist"),
        ("start", "xyz", "run"),
        ("metrics", values, 4),
        ("end", "FINISHED"),
    ]


def test_failing_tracker_is_dropped_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = Wandb(fails_at=4)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers = Trackers(tmp_path, settings(wandb=True), FACTS, 0)
    for step in (3, 4, 5):
        trackers.record({**RECORD, "step": step})
    trackers.close()
    assert [row["step"] for row in wandb.logged] == [3]
    assert capsys.readouterr().err == ("warning: wandb has failed and gets no more numbers: gone\n")


def test_tracker_that_cannot_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"logging.wandb=true needs the package wandb"):
        Trackers(tmp_path, settings(wandb=True), FACTS, 0)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: 1 / 0))
    with pytest.raises(UserError, match="it cannot begin a run: division by zero"):
        Trackers(tmp_path, settings(wandb=True), FACTS, 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://taken")

    def set_experiment(_: str) -> None:
        raise ConnectionError("the port answers as another server")

    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(set_experiment=set_experiment))
    with pytest.raises(UserError, match=r"logging\.mlflow=true: it cannot begin a run: the port"):
        Trackers(tmp_path, settings(mlflow=True), FACTS, 0)


def test_store_that_does_not_answer_is_refused_after_one_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str | None] = []

    def search_experiments(max_results: int) -> None:
        tries.append(os.environ.get(variable))
        raise ConnectionError("the port answers as another server")

    variable = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://taken")
    monkeypatch.setitem(
        sys.modules, "mlflow", SimpleNamespace(search_experiments=search_experiments)
    )
    for given in (None, "4"):
        if given:
            monkeypatch.setenv(variable, given)
        with pytest.raises(UserError, match=r"logging\.mlflow=true: the store http://taken does"):
            check_stores(tmp_path, settings(mlflow=True))
        assert os.environ.get(variable) == given
    assert tries == ["1", "1"]
    check_stores(tmp_path, settings())
    assert len(tries) == 2


def test_wandb_without_a_key_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def login(verify: bool) -> None:
        assert verify
        raise ValueError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="wandb=true: its server does not answer: No API key"):
        check_stores(tmp_path, settings(wandb=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_stores(tmp_path, settings(wandb=True))


def test_real_wandb_goes_on_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 3):
        trackers = Trackers(tmp_path, settings(wandb=True), FACTS, first_step)
        trackers.record({**RECORD, "step": first_step + 1})
        trackers.close()
    kept = (tmp_path / "wandb_id.txt").read_text()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{kept}"))) >= 1


def test_real_mlflow_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    check_stores(tmp_path, settings(mlflow=True))
    for first_step in (0, 3):
        trackers = Trackers(tmp_path, settings(mlflow=True), FACTS, first_step)
        trackers.record({**RECORD, "step": first_step + 1})
        trackers.close(failed=first_step == 0)
    client = MlflowClient((tmp_path / "mlflow").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "neftune_dist"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["config.noise.alpha"] == "5.0"
    losses = client.get_metric_history(run.info.run_id, "loss/loss")
    assert [(loss.step, loss.value) for loss in losses] == [(1, 1.5), (4, 1.5)]


@pytest.mark.parametrize("store", ["http://127.0.0.1:9", "file:///proc/none", "nonsense://x"])
def test_real_mlflow_refuses_a_store_in_one_sentence(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(UserError, match=f"the store {store} does not answer") as raised:
        check_stores(tmp_path, settings(mlflow=True))
    assert "\n" not in str(raised.value)


def test_tensorboard_names_the_run_groups_its_figures_and_compares_its_settings(
    tmp_path: Path,
) -> None:
    facts = {"config": {"noise": {"alpha": 5.0}, "optim": {"learning_rate": 1e-4}}}
    for name in ("alpha-0", "alpha-5"):
        trackers = Trackers(tmp_path / name, LoggingConfig(), facts, 0)
        trackers.record({**RECORD, "noise_norm": 2.9, "memory_gib": 1.0, "step_seconds": 2.0})
        trackers.record({"step": 4, "held_out_loss": 2.5, "num_documents": 8})
        trackers.close()
        [run] = (tmp_path / name / "tensorboard").iterdir()
        assert run.name == name
        events = EventAccumulator(str(run)).Reload()
        assert set(events.Tags()["scalars"]) == {
            "loss/loss",
            "loss/held_out_loss",
            "noise/noise_norm",
            "memory/memory_gib",
            "speed/step_seconds",
            "tokens/num_tokens",
            "tokens/held_out_num_documents",
        }
        summary = events.SummaryMetadata("_hparams_/session_start_info")
        start = plugin_data_pb2.HParamsPluginData.FromString(summary.plugin_data.content)
        compared = start.session_start_info.hparams
        assert compared["noise.alpha"].number_value == 5.0
        assert compared["optim.learning_rate"].number_value == 1e-4


@pytest.mark.parametrize("word", ["logging.project=x", "logging.name=x"])
def test_name_without_a_tracker_is_refused(word: str) -> None:
    with pytest.raises(UserError, match="has no effect without logging"):
        load_config(None, ["model.name_or_path=m", word])
    load_config(None, ["model.name_or_path=m", word, "logging.mlflow=true"])


def test_loss_is_the_first_group_by_name() -> None:
    """TensorBoard and W&B sort groups by name."""
    assert min(GROUPS) == "loss" == min([*GROUPS, "samples", "other"])


def test_a_tensorboard_without_its_folder_is_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes in a thread, whose traceback Python would print; those of others are printed."""
    printed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    trackers = Trackers(tmp_path, LoggingConfig(), FACTS, 0)
    (tmp_path / "tensorboard").rename(tmp_path / "aside")
    for step in range(3):
        trackers.record({**RECORD, "step": step})
    trackers.close()
    said = capfd.readouterr().err
    assert said.count("warning: tensorboard has failed") == 1 == len(said.splitlines())
    assert printed == []
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert [arguments.exc_type for arguments in printed] == [ZeroDivisionError]
