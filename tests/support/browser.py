"""Pages that people open, in a headless browser: TensorBoard, MLflow's, and a study's report.

    python tests/support/browser.py FOLDER OUTPUT_DIR [--mlflow PYTHON]

FOLDER holds runs (each with `tensorboard/`, `mlflow/`), or a study with its report.html. Needs
`chromium` on the PATH; for MLflow a Python that has all of mlflow, as mlflow-skinny has no pages.
Writes a PNG a page, to be looked at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_SECONDS = 120
# TensorBoard's pages, by the plugin in the address.
PLUGINS = ("timeseries", "scalars", "text", "hparams")


def browse(address: str, *words: str, width: int = 1400, height: int = 1000) -> str:
    """Open a page, let its scripts run for ten seconds of their time; what the browser prints."""
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [
                BROWSER,
                *_OPTIONS,
                f"--user-data-dir={profile}",
                f"--window-size={width},{height}",
                "--virtual-time-budget=10000",
                *words,
                address,
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    return done.stdout


@contextmanager
def served(*command: str) -> Iterator[str]:
    """A server that takes --port and --host, while it answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true"},  # which recent versions ask for
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard over all runs below a folder."""
    with served(sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)) as address:
        time.sleep(5)  # it reads the runs meanwhile
        yield address


def main() -> int:
    """Take the pictures of all pages that the folder has."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mlflow", metavar="PYTHON")
    given = parser.parse_args()
    if BROWSER is None:
        print("chromium was not found on the PATH", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)

    def picture(address: str, name: str, width: int = 1400) -> None:
        path = given.output / f"{name}.png"
        browse(address, f"--screenshot={path}", width=width)
        print(path, flush=True)

    if any(given.folder.glob("**/tensorboard")):
        with tensorboard(given.folder) as address:
            for plugin in PLUGINS:
                picture(f"{address}/?darkMode=false#{plugin}", f"tensorboard_{plugin}")
    for store in sorted(given.folder.glob("**/mlflow"))[:1] if given.mlflow else []:
        command = (given.mlflow, "-m", "mlflow", "ui", "--backend-store-uri", store.as_uri())
        experiment, run = next(store.glob("*/*/metrics")).parts[-3:-1]
        with served(*command) as address:
            runs = f"{address}/#/experiments/{experiment}/runs"
            picture(runs, "mlflow_runs")
            picture(f"{runs}/{run}/model-metrics", "mlflow_metrics")
    for page in sorted(given.folder.glob("**/report.html")):
        for width in (480, 1400):
            picture(page.resolve().as_uri(), f"{page.parent.name}_report_{width}", width)
    return 0


if __name__ == "__main__":
    sys.exit(main())
