"""FLOPs against counts made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from neftune_dist.model.flops import ModelSize, measured_flops, model_size, peak_flops
from tests.support.families import family
from tests.support.published import published


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


LLAMA_2_7B = transformers.LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    tie_word_embeddings=False,
)


def test_tiny_llamas_count_is_that_by_hand() -> None:
    size = model_size(on_meta(family("llama", tie_word_embeddings=False)))
    queries, keys_values, mlp = 32 * 32 + 32 * 32, 2 * 32 * 16, 3 * 32 * 48
    layer = queries + keys_values + mlp
    assert size.num_matrix_parameters == 2 * layer + 97 * 32
    assert size.num_parameters == 2 * (layer + 2 * 32) + 32 + 2 * 97 * 32
    assert (size.num_layers, size.attention_width) == (2, 4 * 8)
    # Documents of 3 and 5 tokens: 8 tokens, squares 34.
    weights = 6 * 8 * size.num_matrix_parameters
    scores_and_values = 2 * 2 * 32 * 34 / 2  # causal half of two products
    assert size.training_flops(8, 34) == weights + 3 * 2 * scores_and_values


def test_llama_2_7bs_count_is_the_published_one() -> None:
    size = model_size(on_meta(LLAMA_2_7B))
    assert size.num_parameters == 6_738_415_616
    assert size.num_matrix_parameters == 6_738_415_616 - 32000 * 4096 - 65 * 4096
    # A sequence of 4096: 6 N a token, and 6 * 32 * 4096 * 4096 of attention a token.
    per_token = size.training_flops(4096, 4096**2) / 4096
    assert per_token == pytest.approx(6 * 6.607e9 + 3.22e9, rel=1e-3)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "opt", "gpt_neox", "gemma3_text", "phi3", "qwen3", "cohere",
     "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_the_count_is_what_torch_counts(model_type: str, tied: bool) -> None:
    config = family(model_type, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):  # whose grouped products are not counted
        model.set_experts_implementation("eager")
    length = 16
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    size = model_size(model)
    # The forward is a third; eager attention computes the upper triangle too.
    expected = size.training_flops(length, 2 * length**2) / 3
    rotary = counter.get_total_flops() - expected  # frequencies times positions, by matmul
    assert 0 <= rotary < 0.01 * expected


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("allenai/OLMoE-1B-7B-0924", 6.92, 1.28),
        ("Qwen/Qwen3-30B-A3B", 30.5, 3.35),
        ("mistralai/Mixtral-8x7B-v0.1", 46.7, 12.9),
    ],
)
def test_experts_count_as_far_as_a_token_chooses_them(
    name: str, billions: float, active: float
) -> None:
    size = model_size(on_meta(published(name)))
    assert size.num_parameters == pytest.approx(billions * 1e9, rel=2e-3)
    assert size.num_trained == size.num_parameters
    assert size.six_n_flops(1) == pytest.approx(6 * active * 1e9, rel=2e-3)
    idle = size.num_parameters - size.six_n_flops(1) / 6
    assert size.num_matrix_parameters < size.num_parameters - idle < size.num_parameters
    assert f"{size.six_n_flops(1) / 6e6:.1f} M of them active" in size.in_words()


def test_embeddings_are_not_multiplied() -> None:
    wide, narrow = (model_size(on_meta(family("gpt2", n_positions=n))) for n in (512, 64))
    assert wide.num_matrix_parameters == narrow.num_matrix_parameters
    tied, untied = (
        model_size(on_meta(family("llama", tie_word_embeddings=t))) for t in (True, False)
    )
    assert tied.num_matrix_parameters == untied.num_matrix_parameters
    assert untied.num_parameters - tied.num_parameters == 97 * 32


def test_quadratic_tokens_is_where_attention_costs_as_much() -> None:
    size = ModelSize(0, 6400, 0, 6400, num_layers=2, attention_width=32)
    length = int(size.quadratic_tokens)
    assert length == 100
    assert size.training_flops(length, length**2) == 2 * size.training_flops(length, 0)


@pytest.mark.parametrize(
    ("device", "dtype", "rate"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        # Names that hold another's.
        ("NVIDIA A10G", "bf16", None),
        ("NVIDIA RTX A1000 Laptop GPU", "bf16", None),
        ("NVIDIA H20", "bf16", None),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA H100 PCIe", "fp32", 51e12),
    ],
)
def test_peak_flops_are_those_of_the_device_and_dtype(
    device: str, dtype: str, rate: float | None
) -> None:
    assert peak_flops(device, dtype) == rate


def test_a_cpus_rate_is_that_of_a_matrix_product() -> None:
    rate = measured_flops("fp32")
    assert 1e6 < rate < 1e15 and measured_flops("fp32") == rate
