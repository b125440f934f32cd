"""`model.dtype=auto` is decided once for a run: by the device, or as its checkpoint was made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from neftune_dist.model import precision
from neftune_dist.system import processor
from tests.support import tiny_model

AUTO = "model.dtype=auto"


def recorded(run_dir: Path) -> str:
    dtype: str = OmegaConf.load(run_dir / "config.yaml").model.dtype
    return dtype


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_auto_is_decided_by_the_device_and_kept_by_a_resume(engine: str, tmp_path: Path) -> None:
    fast = precision.fast_dtype(torch.device("cpu"))
    other = "fp32" if fast == "bf16" else "bf16"
    words = [f"engine.name={engine}"]
    config = tiny_model.make_config(
        tmp_path, train={"max_steps": 4}, checkpoint={"every_steps": 2, "keep": 0}
    )
    named = {
        dtype: tiny_model.train(config, tmp_path / dtype, f"model.dtype={dtype}", *words, ranks=2)
        for dtype in (fast, other)
    }
    chosen = tiny_model.train(config, tmp_path / "auto", AUTO, *words, ranks=2)
    assert tiny_model.untimed(chosen) == tiny_model.untimed(named[fast])
    assert recorded(tmp_path / "auto") == fast

    # As on a machine that would choose the other precision.
    half = tmp_path / other / "checkpoints" / "step_00000002"
    words.append(f"checkpoint.resume={half}")
    resumed = tiny_model.train(config, tmp_path / "resumed", AUTO, *words, ranks=2)
    assert tiny_model.untimed(resumed) == tiny_model.untimed(named[other][2:])
    assert recorded(tmp_path / "resumed") == other


@pytest.mark.parametrize(
    ("listed", "dtype"),
    [
        ("flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16\n", "bf16"),
        ("flags\t\t: fpu sse4_2 avx2 avx512f\nbugs\t\t: bf16\n", "fp32"),
        ("Features\t: fp asimd bf16 i8mm\n", "bf16"),
        ("Features\t: fp asimd\n", "fp32"),
        (None, "fp32"),
    ],
)
def test_processor_without_bf16_instructions_computes_float32(
    listed: str | None, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if listed is not None:
        file.write_text(listed)
    monkeypatch.setattr(processor, "_CPU_INFO", file)
    assert precision.fast_dtype(torch.device("cpu")) == dtype
