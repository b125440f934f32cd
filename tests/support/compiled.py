"""Triton kernels compiled for GPUs that are not there, and what their machine code costs.

Triton's compiler and NVIDIA's assembler need no GPU. So what a kernel must not do (spill registers,
fuse a multiplication and an addition, load an element at a time) is known before it first runs.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class MachineCode:
    """What the assembler made of a kernel.

    Attributes:
        ptx: the assembly.
        registers: of a thread.
        spilled_bytes: stored to memory and loaded again, where registers ran out.
        loads, stores: how many instructions move so many bytes from and to global memory.
    """

    ptx: str
    registers: int
    spilled_bytes: int
    loads: Counter[int]
    stores: Counter[int]

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return len(re.findall(pattern, self.ptx))


def compile_kernel(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    capability: int,
    num_warps: int,
) -> MachineCode:
    """Compile a kernel as a launch would.

    Args:
        arguments: types by name, as Triton writes them (`*bf16`, `i32`); a `!` at the end says that
            16 divides the value, or the address.
        constants: what is known when it is compiled: `tl.constexpr` arguments, None, and integers
            that are 1.
        capability: 90 for Hopper.
    """
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr").rstrip("!") for name in names}
    aligned = [name for name, kind in arguments.items() if kind.endswith("!")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.compilation.always_compile = True  # what comes from the cache has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": num_warps, "enable_fp_fusion": False},
        )
    ptx = compiled.asm["ptx"]
    return MachineCode(
        ptx=ptx,
        registers=_sum(r"Used (\d+) registers", log.getvalue()),
        spilled_bytes=_sum(r"(\d+) bytes spill", log.getvalue()),
        loads=_widths("ld", ptx),
        stores=_widths("st", ptx),
    )


def _sum(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    assert found, text
    return sum(map(int, found))


def _widths(kind: str, ptx: str) -> Counter[int]:
    found = re.findall(rf"\b{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)
