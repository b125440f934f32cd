#!/usr/bin/env python3
"""Submits a training run to Slurm, after every check that a login node can make.

    ./launcher/submit.py CONFIG --nodes N --gpus-per-node G --time HH:MM:SS [...] [key=value ...]

A login node's own Python is often old: the syntax of this file is that of Python 3.6, and it goes
on under the Python of .venv/ where the one that reads it lacks a package.
"""

# ruff: noqa: E402 (an old Python must learn of it before it imports what it does not have)

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
NEEDED = ("omegaconf", "huggingface_hub", "safetensors", "pyarrow", "numpy", "psutil")
if sys.version_info < (3, 11) or not all(find_spec(name) for name in NEEDED):
    if PYTHON.exists() and Path(sys.executable) != PYTHON:
        os.execv(str(PYTHON), [str(PYTHON), *sys.argv])
    packages = ", ".join(NEEDED)
    print("submit: needs Python >= 3.11 with " + packages + ", as a run does.", file=sys.stderr)
    sys.exit(2)
sys.path.insert(0, str(ROOT))

from neftune_dist.cli import main

if __name__ == "__main__":
    sys.argv[:1] = ["neftune-dist", "submit"]
    main()
