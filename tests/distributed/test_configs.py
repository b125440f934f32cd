"""Every shipped configuration is planned at its model's real widths, and trains, scaled down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from neftune_dist.config import load_config
from neftune_dist.planning.report import plan
from tests.support import tiny_model
from tests.support.families import family

CONFIGS = Path(__file__).parents[2] / "configs"
# Two layers stand for all.
REAL: dict[str, Any] = {
    "meta-llama/Llama-2-7b-hf": transformers.LlamaConfig(num_hidden_layers=2),
    "meta-llama/Llama-2-7b-chat-hf": transformers.LlamaConfig(num_hidden_layers=2),
    "huggyllama/llama-7b": transformers.LlamaConfig(num_hidden_layers=2),
    "meta-llama/Llama-2-13b-hf": transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=5120, intermediate_size=13824, num_attention_heads=40
    ),
    "meta-llama/Llama-2-70b-hf": transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ),
    "facebook/opt-6.7b": transformers.OPTConfig(
        num_hidden_layers=2,
        hidden_size=4096,
        ffn_dim=16384,
        num_attention_heads=32,
        word_embed_proj_dim=4096,
    ),
}
NAMES = sorted(
    path.stem
    for path in CONFIGS.glob("*.yaml")
    if path.stem not in ("base-7b", "quickstart", "debug")
)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_is_planned(name: str, tmp_path: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    REAL[config.model.name_or_path].save_pretrained(tmp_path)
    lines: list[str] = []
    plan(
        load_config(path, [f"model.name_or_path={tmp_path}"]),
        8,
        gpu="H100",
        with_data=False,
        log=lines.append,
    )
    assert any(line.startswith("  peak") for line in lines)
    assert any("H100" in line and "fits" in line for line in lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models by family, and rows of each format."""
    made = tmp_path_factory.mktemp("configs")
    tiny_model.make_model(made / "llama", intermediate=128)
    tokenizer = tiny_model.make_tokenizer(made / "opt")
    torch.manual_seed(0)
    config = family("opt", vocab_size=len(tokenizer), max_position_embeddings=512)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made / "opt")
    tiny_model.make_rows(made / "alpaca.jsonl", 24)
    turns = [("human", "Count."), ("gpt", "One, two."), ("human", "On."), ("gpt", "Three, four.")]
    (made / "sharegpt.jsonl").write_text(
        "".join(
            json.dumps(
                {"conversations": [{"from": who, "value": f"{said} {i}"} for who, said in turns]}
            )
            + "\n"
            for i in range(24)
        )
    )
    return made


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configuration_trains(name: str, folder: Path, tmp_path: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    model = "opt" if "opt" in config.model.name_or_path else "llama"
    # Compiled Llamas are test_parity's. Nothing is held out, so that one graph is compiled.
    compiled = config.model.compile and model == "opt"
    held_out = ["data.num_held_out=4"]
    if compiled:
        held_out = ["data.num_held_out=0", "evaluate.every_steps=0"]
    rows = "sharegpt" if config.data.format == "sharegpt" else "alpaca"
    records = tiny_model.train(
        path,
        tmp_path / "run",
        f"model.name_or_path={folder / model}",
        "model.dtype=fp32",
        f"model.compile={str(compiled).lower()}",
        f"data.source={folder / rows}.jsonl",
        f"data.cache_dir={folder / 'cache'}",
        "data.max_length=256",
        *held_out,
        "optim.warmup_steps=1",
        "train.num_epochs=null",
        "train.max_steps=2",
        "train.global_batch_size=4",
        "train.micro_batch_tokens=512",
        "logging.progress=false",
    )
    assert [record["step"] for record in records] == [1, 2]
    assert (records[0]["num_compiled_graphs"] > 0) is compiled
    assert records[0]["noise_norm"] == pytest.approx(config.noise.alpha / 3**0.5, rel=0.03)
