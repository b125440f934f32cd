"""On a GPU: the same noise bits as on the CPU, and the same training to rounding.

One command: pytest tests/gpu
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from neftune_dist.noise.law import RankStream, TokenLayout, add_noise_, draw
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_the_same_bits(dtype: torch.dtype) -> None:
    lengths = torch.tensor([3, 500, 41])
    stream = RankStream(1, 2, 3, 4)
    results = []
    for device in ("cpu", "cuda"):
        layout = TokenLayout.from_lengths(lengths.to(device))
        x = torch.zeros(544, 768, dtype=dtype, device=device)
        add_noise_(x, layout, stream, 5.0)
        results.append(x.cpu())
        results.append(draw(stream, layout, slice(0, 544), 768).cpu())
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_training_agrees_with_the_cpu(engine: str, tmp_path: Path) -> None:
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    config = tiny.make_config(tmp_path, train={"max_steps": 5})
    words = [config, f"engine.name={engine}"]
    done = tiny.run("train", *words, f"run_dir={tmp_path / 'gpu'}", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    expected = tiny.train(config, tmp_path / "cpu")
    for one, other in zip(tiny.steps(tmp_path / "gpu"), expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=1e-6)
