"""On a GPU: what the blocks compute by (attention, loss, kernels, compiling, float8) decides speed,
and nothing else beyond rounding.

One command: pytest tests/gpu
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neftune_dist.model.attention import varlen_attention
from neftune_dist.model.liger import liger_cross_entropy
from neftune_dist.model.loss import chunked_cross_entropy
from neftune_dist.model.varlen import VARLEN_OPERATOR
from tests.support import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENDS = [0, 300, 301, 812, 1000]


@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("blocks", [None, [0, 100, 200, 300, 310, 410, 700, 800, 980, 1000]])
def test_varlen_attention_agrees_with_the_cpu(
    blocks: list[int] | None, window: int, heads: tuple[int, int]
) -> None:
    """Values and gradients of bfloat16 inputs, against float32 on the CPU; of all queries, and of
    blocks of them, of which the last is filled up."""
    torch.manual_seed(0)
    num_queries = 500 if blocks else 1000
    given = [torch.randn(1000, n, 64).bfloat16() for n in (heads[0], heads[1], heads[1])]
    given[0] = given[0][:num_queries]
    grad = torch.randn(num_queries, heads[0], 64).bfloat16()
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        inputs = [tensor.to(device, dtype, copy=True).requires_grad_() for tensor in given]
        ends = torch.tensor(ENDS, dtype=torch.int32, device=device)
        out, _ = VARLEN_OPERATOR(*inputs, ends, 512, 0.125, window, None, blocks)
        found = torch.autograd.grad(out, inputs, grad.to(device, dtype))
        results.append([tensor.float().cpu() for tensor in (out.detach(), *found)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=0.02 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("dtype", "width", "atol"),
    [(torch.float32, 64, 1e-4), (torch.bfloat16, 100, 0.03), (torch.bfloat16, 512, 0.03)],
)
def test_attention_that_flash_attention_refuses_agrees_with_the_cpu(
    dtype: torch.dtype, width: int, atol: float
) -> None:
    """float32, heads that are no multiple of 8 (OpenLLaMA 3B's), and wide ones (Gemma 4's)."""
    torch.manual_seed(0)
    given = [torch.randn(1, 4, 1000, width).to(dtype) for _ in range(3)]
    outs = [
        varlen_attention(
            torch.nn.Module(),
            *(tensor.to(device, kind) for tensor in given),
            None,
            cu_seqlens=torch.tensor(ENDS, dtype=torch.int32, device=device),
            max_seqlen=512,
        )[0]
        .float()
        .cpu()
        for device, kind in (("cuda", dtype), ("cpu", torch.float32))
    ]
    torch.testing.assert_close(*outs, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["chunked", "liger"])
def test_the_loss_agrees_with_the_cpu(kind: str) -> None:
    if kind == "liger" and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("needs liger-kernel")
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 256).bfloat16(), (torch.randn(32000, 256) / 16).bfloat16()
    targets = torch.randint(32000, (700,))
    compute = liger_cross_entropy() if kind == "liger" else chunked_cross_entropy
    inputs = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    loss = compute(*inputs, None, targets.cuda())
    found = torch.autograd.grad(loss * 0.37, inputs)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    true = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    expected = torch.autograd.grad(true * 0.37, exact)
    assert loss.item() == pytest.approx(true.item(), rel=1e-3)
    for one, other in zip(found, expected, strict=True):
        assert float((one.cpu().double() - other).norm() / other.norm()) < 0.01


OPTIONS = {
    "plain loss": (["model.loss=plain"], 0.01),
    "full": (["model.activation_checkpointing=full"], 0.01),
    "selective": (["model.activation_checkpointing=selective"], 0.01),
    "flex": (["model.attention=flex"], 0.01),
    "compiled": (["model.compile=true"], 0.01),
    "compiled, selective": (
        ["model.compile=true", "model.activation_checkpointing=selective"],
        0.01,
    ),
    "liger": (["model.kernels=liger", "model.loss=liger"], 0.01),
    "offload": (["engine.offload=cpu"], 0.01),
    "an exchange for each micro-batch": (["engine.sync_every=micro_batch"], 0.01),
    "weights kept": (["engine.reshard_after_forward=false"], 0.01),
    "replicated": (["engine.name=replicated"], 0.01),
    "replicated, compiled, selective": (
        [
            "engine.name=replicated",
            "model.compile=true",
            "model.activation_checkpointing=selective",
        ],
        0.01,
    ),
    "float8 on one device": (["engine.name=replicated", "model.float8=tensorwise"], 0.02),
    "bf16 moments": (["optim.states=bf16"], 0.01),
    "8-bit moments": (["optim.states=8bit"], 0.02),
    "float8": (["model.float8=tensorwise"], 0.02),
    "float8 by rows": (["model.float8=rowwise", "model.compile=true"], 0.02),
}
NEEDS = {"liger": "liger_kernel", "float8": "torchao"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_model.make_config(tmp_path_factory.mktemp("options"), train={"max_steps": 8})
    path.write_text(path.read_text().replace('"fp32"', '"bf16"'))
    return path


def losses(config: Path, run_dir: Path, *words: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-m", "neftune_dist", "train", str(config), f"run_dir={run_dir}", *words],
        env=tiny_model.environment(
            CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        ),
        capture_output=True,
        text=True,
        timeout=tiny_model.DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [record["loss"] for record in tiny_model.steps(run_dir)]


@pytest.fixture(scope="module")
def expected(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(config, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_trains_the_same(
    name: str, config: Path, expected: list[float], tmp_path: Path
) -> None:
    words, tolerance = OPTIONS[name]
    for option, package in NEEDS.items():
        if name.startswith(option) and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    found = losses(config, tmp_path / "run", *words)
    assert found == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < 0.9 * expected[0]
