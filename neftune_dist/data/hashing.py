"""Hashes that do not depend on a library's version: the order of training depends on them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # the step from one state of SplitMix64 to the next


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), uint64 to uint64."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def digest_of(value: Any) -> str:
    """24 hexadecimal digits of the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]
