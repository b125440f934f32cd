"""On a GPU: the same noise bits as on the CPU, and the same training to rounding.

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
import transformers

from neftune_dist import NEFTune
from neftune_dist.noise.law import RankStream, draw
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise
from tests.support import tiny_model

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", ["uniform", "symmetric", "gaussian"])
@pytest.mark.parametrize("hidden", [64, 250, 768, 4096, 5120])
def test_noise_has_the_same_bits(dtype: torch.dtype, distribution: str, hidden: int) -> None:
    lengths = torch.tensor([3, 500, 41])
    stream = RankStream((1 << 62) + 12345, 2, 3, 4)
    x = torch.randn(544, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        layout = TokenLayout.from_lengths(lengths).to(device)
        on_device = x.to(device, copy=True)
        squares = add_noise(on_device, layout, stream, 5.0, distribution=distribution)
        drawn = draw(stream, layout, hidden, distribution)
        results.append((on_device.cpu(), squares.cpu(), drawn.cpu()))
    for one, other in zip(*results, strict=True):
        if one.dtype == torch.float64:  # the norms' squares, whose sums differ in their order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
        elif distribution == "gaussian":  # logarithms differ in their last bit
            assert float((one != other).float().mean()) < 1e-4
        else:
            assert torch.equal(one, other)


def test_strides_and_padding_give_the_same_bits() -> None:
    """Rows that lie apart, and channels that do: what is not the tensor's stays as it was."""
    layout = TokenLayout.from_arguments(
        torch.zeros(6, 50), torch.arange(50)[None] < torch.arange(0, 60, 10)[:, None]
    ).to(torch.device("cuda"))
    stream = RankStream(1, 0, 0, 0)
    plain = torch.full((6, 50, 128), -0.0, device="cuda")
    add_noise(plain, layout, stream, 5.0)
    padding = layout.length.view(6, 50) == 0
    assert torch.signbit(plain[padding]).all() and not plain[padding].any()
    for storage, view in (
        ((6, 70, 256), lambda t: t[:, :50, ::2]),
        ((50, 6, 128), lambda t: t.transpose(0, 1)),
        ((6, 128, 50), lambda t: t.transpose(1, 2)),
    ):
        whole = torch.full(storage, -0.0, device="cuda")
        add_noise(view(whole), layout, stream, 5.0)
        assert torch.equal(view(whole), plain)
        assert int((whole != 0).sum()) == int((plain != 0).sum())


def test_offsets_past_2_to_the_31_give_the_same_bits() -> None:
    whole = torch.zeros((1 << 31) + (1 << 20), dtype=torch.bfloat16, device="cuda")
    far = whole[-(1 << 20) :].view(256, 4096)
    near = torch.zeros_like(far)
    rows = whole.as_strided((2, 256, 4096), ((1 << 31), 4096, 1))
    layout = TokenLayout.from_lengths(torch.tensor([256, 256])).to(torch.device("cuda"))
    add_noise(rows, layout, RankStream(1, 0, 0, 0), 5.0)
    both = torch.zeros(2, 256, 4096, dtype=torch.bfloat16, device="cuda")
    add_noise(both, layout, RankStream(1, 0, 0, 0), 5.0)
    near.copy_(both[1])
    assert torch.equal(far, near)


def test_a_compiled_model_trains_as_an_eager_one() -> None:
    config = transformers.LlamaConfig(
        vocab_size=500,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).cuda().train()
    with NEFTune(5.0, seed=1).attach(model) as noise:
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for step, (rows, columns) in enumerate([(3, 20), (4, 33), (2, 70)]):
            ids = torch.randint(0, 500, (rows, columns), device="cuda")
            mask = (torch.rand(rows, 1, device="cuda") * columns).long() >= torch.arange(
                columns, device="cuda"
            )
            losses = []
            for variant in (model, compiled):
                noise.step = step
                losses.append(variant(input_ids=ids, attention_mask=mask.long(), labels=ids).loss)
            assert noise.num_fired == 1
            assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-5)


def test_memory_comes_in_segments_that_grow() -> None:
    """`World` asks for them when torch is loaded already, and before the first allocation."""
    program = (
        "import torch; from neftune_dist.distributed.world import World; world = World();"
        "torch.ones(1, device=world.device);"
        "print(torch.cuda.memory._snapshot()['allocator_settings']['expandable_segments'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=tiny_model.environment(CUDA_VISIBLE_DEVICES="0"),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == ["True"], done.stdout + done.stderr


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed", "replicated"])
def test_training_agrees_with_the_cpu(engine: str, tmp_path: Path) -> None:
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    config = tiny_model.make_config(tmp_path, train={"max_steps": 5})
    words = [config, f"engine.name={engine}"]
    done = tiny_model.run("train", *words, f"run_dir={tmp_path / 'gpu'}", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    expected = tiny_model.train(config, tmp_path / "cpu")
    for one, other in zip(tiny_model.steps(tmp_path / "gpu"), expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["noise_norm"] == pytest.approx(other["noise_norm"], rel=1e-6)


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_launched_run_skips_what_is_not_finite(engine: str, tmp_path: Path) -> None:
    """launcher/torchrun.sh on the GPU, with a step whose loss is NaN."""
    if engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    config = tiny_model.make_config(tmp_path, train={"max_steps": 6}, checkpoint={"every_steps": 1})
    run_dir = tmp_path / "run"
    others = filter(None, [os.environ.get("PYTHONPATH")])
    path = os.pathsep.join([str(ROOT / "tests/slurm/faults"), str(ROOT), *others])
    done = subprocess.run(
        [
            str(ROOT / "launcher/torchrun.sh"),
            *map(str, (config, f"engine.name={engine}", f"run_dir={run_dir}", "checkpoint.keep=0")),
        ],
        env=tiny_model.environment(
            CUDA_VISIBLE_DEVICES="0", PYTHONPATH=path, FAULTS='{"nan_at": 3}'
        ),
        capture_output=True,
        text=True,
        timeout=tiny_model.DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = tiny_model.steps(run_dir)
    assert [record["num_skipped_steps"] for record in records] == [0, 0, 1, 1, 1, 1]
    assert [record["loss"] is None for record in records] == [False, False, True, *[False] * 3]
    before, after = (
        tiny_model.checkpoint_tensors(run_dir / "checkpoints" / f"step_{step:08d}")
        for step in (2, 3)
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
