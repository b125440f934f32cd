"""The environment of all tests and of the processes that they start."""

from __future__ import annotations

import os

# Read when torch or a hub client is imported, so before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# By default every rank that compiles starts a pool of processes, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
