"""The compiler of this machine that torch.compile and Triton call."""

from __future__ import annotations

import os
import shutil


def missing_compiler(on_gpu: bool) -> str:
    """Name the compiler that is not found, as "gcc or clang" or "CXX=mine"; "" where there is one.

    On a GPU it is Triton's, a C compiler, or what CC names; on a CPU Inductor's, g++ or what CXX
    names. Both take the variable for the name of a program, without options.
    """
    variable, usual = ("CC", ["gcc", "clang"]) if on_gpu else ("CXX", ["g++"])
    given = os.environ.get(variable)
    if any(map(shutil.which, usual if given is None else [given])):
        return ""
    return " or ".join(usual) if given is None else f"{variable}={given}"
