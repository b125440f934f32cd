"""On a GPU: updates of low-precision moments leave the CPU's bits; the gradient's norm is right and
takes no memory to speak of.

One command: pytest tests/gpu/test_optim.py
"""

from __future__ import annotations

import pytest
import torch

from neftune_dist.optim.adamw import squared_norm
from tests.support import moment_updates
from tests.support.moment_updates import CASES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_bits_are_the_cpus(states: str, case: str) -> None:
    moment_updates.assert_same_bits(
        moment_updates.run(states, CASES[case], "cuda"), moment_updates.run(states, CASES[case])
    )


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_a_million_elements_have_the_cpus_bits(states: str) -> None:
    case = Case(1 << 21, 12345, 1_000_003, grad_scale=1.7)
    moment_updates.assert_same_bits(
        moment_updates.run(states, case, "cuda"), moment_updates.run(states, case)
    )


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_elements_past_2_31_are_updated(states: str) -> None:
    """The last of them, which lie past 2^31 in every tensor, are updated as they are on the CPU."""
    numel = (1 << 31) + 5000
    free, _ = torch.cuda.mem_get_info()
    if free < 13 * numel:
        pytest.skip(f"needs {13 * numel / 2**30:.0f} GiB of GPU memory")
    torch.cuda.empty_cache()
    first = (1 << 31) - 256  # a block's first
    grad, blocks, tails = moment_updates.gradients(numel - first, 0), -(-(numel - first) // 256), []
    for device, start in (("cuda", 0), ("cpu", first)):
        case = Case(numel, start, numel - start)
        zeros = torch.zeros(case.size, device=device)
        optimizer, parameter, param_slice = moment_updates.make(states, case, zeros)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[-len(grad) :] = grad.to(device)
        optimizer.step()
        last = {"parameter": parameter.detach()[-len(grad) :]}
        for name, kept in moment_updates.state(optimizer, param_slice).items():
            last[name] = kept[-blocks if states == "8bit" else -len(grad) :]
        tails.append({name: tensor.cpu() for name, tensor in last.items()})
    moment_updates.assert_same_bits(*tails)


def test_the_norm_is_float64s_and_takes_no_memory() -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(n, device="cuda", generator=draw) for n in (1, 1000, 0, 50_000_001)]
    tensors[1] *= 1e15
    tensors[3] *= 1e-3
    exact = sum(float(tensor.double().square().sum()) for tensor in tensors)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = float(squared_norm(tensors))
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert found == pytest.approx(exact, rel=1e-12)
