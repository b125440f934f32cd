"""The Triton kernels as machine code for three generations of GPUs: registers suffice, no rounding
is left out, and memory is moved 16 bytes at a time."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from neftune_dist.noise import kernel as noise_kernel
from neftune_dist.optim import kernel as optim_kernel
from tests.support.compiled import MachineCode, compile_kernel

CAPABILITIES = [80, 90, 100]
THREADS = 32


def compile_noise(
    dtype: str, distribution: str, capability: int, size: int = 4096, **changed: str
) -> tuple[MachineCode, int]:
    """The code for an activation of a hidden size, contiguous unless arguments are changed, and the
    bytes of it that a thread works on."""
    itemsize = 4 if dtype == "fp32" else 2
    channels, num_warps = noise_kernel._tile(size, itemsize, distribution)
    words = {f"word{i}": "*i64!" for i in range(4)} | {f"stride{i}": "i32" for i in (1, 2, 3)}
    arguments = {
        "x": f"*{dtype}!",
        "scale": "*fp32!",
        **words,
        "squares": "*fp32!",
        "hidden_size": "i32!",
        "key0": "i32",
        "key1": "i32",
        "row_stride": "i32!",
        "column_stride": "i32!",
        **changed,
    }
    constants: dict[str, Any] = {
        "columns": 1,
        "channel_stride": 1,
        "stride0": 1,
        "DISTRIBUTION": noise_kernel._DISTRIBUTIONS[distribution],
        "CHANNELS": channels,
        "IS_CUT": size % channels != 0,
        "WIDE": itemsize == 2,
    }
    constants = {name: value for name, value in constants.items() if name not in changed}
    code = compile_kernel(noise_kernel._add_noise, arguments, constants, capability, num_warps)
    return code, channels * itemsize // (THREADS * num_warps)


@pytest.mark.parametrize(
    ("dtype", "distribution", "capability"),
    [
        *(
            ("bf16", name, capability)
            for name in ("uniform", "gaussian")
            for capability in CAPABILITIES
        ),
        ("bf16", "symmetric", 90),
        ("fp32", "uniform", 90),
        ("fp32", "gaussian", 90),
    ],
)
def test_noise_kernel_spills_nothing_and_moves_each_byte_once(
    dtype: str, distribution: str, capability: int
) -> None:
    """An activation's bytes go once each way; besides, a token has a factor and four counter words,
    and its norm. The registers leave room for a quarter of a multiprocessor's threads at least."""
    code, thread_bytes = compile_noise(dtype, distribution, capability)
    assert code.spilled_bytes == 0
    assert code.count(r"\bfma\.\w+\.f(?:32|16|16x2)\b") == 0
    assert code.loads[16] >= thread_bytes // 16
    assert code.stores == {16: thread_bytes // 16, 4: 1}
    assert code.registers <= 128
    if distribution != "gaussian":  # whose logarithm has a table
        assert code.loads == {16: thread_bytes // 16, 8: 4, 4: 1}


def test_noise_kernel_of_any_strides_spills_nothing() -> None:
    """Whatever the strides and the hidden size, it fits into registers."""
    strided, _ = compile_noise("bf16", "uniform", 90, channel_stride="i32", columns="i32")
    cut, _ = compile_noise("bf16", "uniform", 90, 250, hidden_size="i32", row_stride="i64")
    for code in (strided, cut):
        assert code.spilled_bytes == 0


NUMBERS = ["decay", "beta1", "rest1", "beta2", "rest2", "correction", "epsilon", "step_size"]
MOMENTS = {
    "8bit": {
        "exp_avg": "*u8!",
        "exp_avg_scales": "*fp32!",
        "exp_avg_sq": "*u8!",
        "exp_avg_sq_scales": "*fp32!",
    },
    "bf16": {"exp_avg": "*i16!", "exp_avg_sq": "*i16!"},
    "fp32": {"exp_avg": "*fp32!", "exp_avg_sq": "*fp32!"},
}
BITS = {"8bit": 8, "bf16": 16, "fp32": 32}


def compile_update(states: str, capability: int, **changed: str) -> tuple[MachineCode, int]:
    """The code of an update, and the elements that a thread updates."""
    arguments = {
        "values": "*fp32!",
        "grads": "*fp32!",
        "grad_scale": "*fp32!",
        "numel": "i32!",
        "lead": "i32!",
        "key0": "i32",
        "key1": "i32",
        **dict.fromkeys(NUMBERS, "fp32"),
        **MOMENTS[states],
        **changed,
    }
    bits, warps = BITS[states], optim_kernel._WARPS
    rows = optim_kernel._ROWS[bits]
    constants: dict[str, Any] = {"BITS": bits, "ROWS": rows}
    if states != "8bit":
        constants |= {"exp_avg_scales": None, "exp_avg_sq_scales": None}
    if arguments["grad_scale"] == "constexpr":
        constants["grad_scale"] = None
    code = compile_kernel(optim_kernel._update, arguments, constants, capability, warps)
    return code, 256 * rows // (THREADS * warps)


@pytest.mark.parametrize(
    ("states", "capability"),
    [
        *((states, capability) for states in ("8bit", "bf16") for capability in CAPABILITIES),
        ("fp32", 90),
    ],
)
def test_update_kernel_spills_nothing_and_moves_wide_words(states: str, capability: int) -> None:
    """Parameter and gradient 16 bytes at a time, moments at least 4 elements at a time; division
    and square root rounded correctly, denormal numbers kept."""
    code, elements = compile_update(states, capability)
    assert code.spilled_bytes == 0
    assert code.count(r"\bfma\.") == code.count(r"\.ftz\b") == code.count(r"\.approx\b") == 0
    assert code.count(r"\bsqrt\.rn\.f32\b") == elements
    assert code.count(r"\bdiv\.full\b") == 0
    assert code.registers <= 128
    moment_bytes = {"8bit": 1, "bf16": 2, "fp32": 4}[states]
    if states == "fp32":
        vectors = elements * (4 + 4 + 2 * moment_bytes) // 16
        assert code.loads == {16: vectors, 4: 1}  # and what gradients are divided by
    else:
        assert code.loads[16] == elements * (4 + 4) // 16
        assert code.loads[elements * moment_bytes] == 2
        assert code.stores[16] == elements * 4 // 16
        assert code.stores[elements * moment_bytes] == 2


@pytest.mark.parametrize("states", MOMENTS)
def test_update_kernel_that_begins_anywhere_spills_nothing(states: str) -> None:
    """At odd addresses, beyond 2^31 elements, of gradients that nothing divides."""
    odd = {"values": "*fp32", "grads": "*fp32", "numel": "i64", "grad_scale": "constexpr"}
    code, _ = compile_update(states, 90, **odd, **({"lead": "i32"} if states == "8bit" else {}))
    assert code.spilled_bytes == 0
