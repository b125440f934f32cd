"""What the blocks compute by decides speed and memory, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.data.loader import MicroBatch, collate
from neftune_dist.model import optimizations
from neftune_dist.model.attention import FLEX, VARLEN, varlen_attention
from neftune_dist.model.load import build
from neftune_dist.model.loss import token_losses
from neftune_dist.model.optimizations import (
    blocks,
    check_compiled,
    configure,
    drops,
    num_compiled_graphs,
)
from neftune_dist.model.projection import keeps_projection
from neftune_dist.model.varlen import VARLEN_OPERATOR
from neftune_dist.training.startup_report import dropout_lines
from tests.support.corpora import documents_of
from tests.support.families import family


def make(
    model_type: str = "llama",
    attention: str = VARLEN,
    family_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    torch.manual_seed(0)
    config = family(model_type, **(family_settings or {}))
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).train()
    configure(model, ModelConfig(name_or_path="-", **settings))
    return model


def batches() -> list[MicroBatch]:
    """Of every size: many documents, one, none, and all lengths different."""
    random = np.random.default_rng(0)
    documents = documents_of(
        [(random.integers(3, 97, n), np.arange(n) > n // 2) for n in random.integers(2, 40, 40)]
    )
    chosen = ([0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [], [10], list(range(20, 40)))
    return [collate(documents, np.array(ids, np.int64), np.zeros(len(ids)), True) for ids in chosen]


def train(model: Any, work: list[MicroBatch]) -> list[list[Tensor]]:
    results = []
    for batch in work:
        model.zero_grad()
        loss = token_losses(model, batch, "chunked")
        loss.backward()
        results.append([loss.detach(), *[p.grad.clone() for p in model.parameters()]])
    return results


class Operators(TorchDispatchMode):
    """Counts what is called below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt2", "opt", "olmoe"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_changes_nothing(model_type: str, mode: str) -> None:
    assert_recomputing_changes_nothing(model_type, mode, {})


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.3},
    "llama": {"attention_dropout": 0.3},
    "mixtral": {"router_jitter_noise": 0.3},  # experts are chosen by noise, too
    "opt": {"dropout": 0.3},  # by a function, no module
}


@pytest.mark.parametrize("model_type", DROPOUT)
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_drops_the_same_activations(model_type: str, mode: str) -> None:
    assert drops(model := make(model_type, family_settings=DROPOUT[model_type]))
    assert "another layout" in dropout_lines(model)[0]
    assert not drops(make(model_type)) and dropout_lines(make(model_type)) == []
    assert_recomputing_changes_nothing(model_type, mode, DROPOUT[model_type])


def assert_recomputing_changes_nothing(
    model_type: str, mode: str, dropout: dict[str, float]
) -> None:
    work = batches()[:2]
    plain = make(model_type, family_settings=dropout)
    torch.manual_seed(1)
    expected = train(plain, work)
    model = make(model_type, activation_checkpointing=mode, family_settings=dropout)
    torch.manual_seed(1)
    for one, other in zip(expected, train(model, work), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_selective_computes_no_product_twice() -> None:
    """And no attention; what lies between them, it does. Full computes all of it twice."""
    calls = {}
    for mode in ("none", "selective", "full"):
        model, counted = make(activation_checkpointing=mode), Operators()
        loss = token_losses(model, batches()[0], "chunked")
        with counted:
            loss.backward()
        calls[mode] = counted.calls
    products = {mode: calls[mode][torch.ops.aten.mm.default] for mode in calls}
    assert products["selective"] == products["none"]
    # The last product of a block need not be made again: nothing after it wants its input.
    assert products["full"] == products["none"] + 6 * 2
    assert [calls[mode].get(VARLEN_OPERATOR, 0) for mode in calls] == [0, 0, 2]
    silu = torch.ops.aten.silu.default
    assert [calls[mode].get(silu, 0) for mode in calls] == [0, 2, 2]


def test_selective_computes_no_product_of_experts_twice() -> None:
    calls = {}
    for mode in ("none", "selective", "full"):
        model, counted = make("olmoe", activation_checkpointing=mode), Operators()
        loss = token_losses(model, batches()[0], "chunked")
        with counted:
            loss.backward()
        calls[mode] = counted.calls[torch.ops.aten._grouped_mm.default]
    assert calls["selective"] == calls["none"] < calls["full"]


def test_compiled_blocks_take_every_length_with_one_graph() -> None:
    work = batches()
    expected = train(make(), work)
    found = train(make(compile=True), work)
    assert num_compiled_graphs() == 1
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(a.abs().max()))


def test_blocks_that_all_differ_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the scale of their attention; torch's own limit is 8."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 12}
    model = make("gpt2", compile=True, family_settings=settings)
    found = train(model, batches()[:2])
    assert num_compiled_graphs() == 12
    for one, other in zip(
        train(make("gpt2", family_settings=settings), batches()[:2]), found, strict=True
    ):
        torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=0)


def test_too_many_graphs_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(optimizations, "limit_recompiles", lambda _: None)
    settings = {"scale_attn_by_inverse_layer_idx": True, "num_hidden_layers": 12}
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 8}
    with torch._dynamo.config.patch(**limits, fail_on_recompile_limit_hit=True):  # type: ignore[attr-defined]
        torch.compiler.reset()
        with pytest.raises(UserError, match=r"another graph.*TORCH_LOGS.*model\.compile=false"):
            train(make("gpt2", compile=True, family_settings=settings), batches()[:1])


def test_running_the_head_compiles_nothing() -> None:
    """On its way to the head OPT runs its blocks, packed and without documents: torch.compile fails
    there, and would pass over the blocks from then on."""
    model = make("opt", compile=True)
    frames = torch._dynamo.utils.counters["frames"]  # type: ignore[attr-defined]
    before = dict(frames)
    keeps_projection(model)
    assert dict(frames) == before


def test_reason_for_a_split_block_is_reported_once() -> None:
    def split(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 2 if x.sum() > 0 else x

    reported: set[str] = set()
    make(compile=True)  # from here on it counts
    torch.compile(split, backend="eager")(torch.ones(1))
    first, second = check_compiled(reported)
    assert "in pieces, with less gain: Call to `torch._dynamo.graph_break()` (" in first
    assert "in pieces, with less gain: Data-dependent branching (" in second
    assert check_compiled(reported) == []
    make(compile=True)  # another training in this process
    with pytest.raises(UserError, match="has compiled nothing"):
        check_compiled(set())
    torch.compile(split, backend="eager")(torch.ones(1))
    assert len(check_compiled(set())) == 2


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="CXX=no-such-compiler is not found"):
        make(compile=True)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"g\+\+ is not found"):
        make(compile=True)
    make()


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [0, 5])
def test_the_operator_passes_opcheck_and_gradcheck(window: int, has_sinks: bool) -> None:
    """Schema, fake implementation, autograd: `opcheck`; and its gradient, in float64."""
    torch.manual_seed(0)
    query = torch.randn(12, 2, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(12, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True) if has_sinks else None
    ends = torch.tensor([0, 3, 4, 12], dtype=torch.int32)
    arguments = (query, key, value, ends, 8, 0.3, window, sinks)
    torch.library.opcheck(VARLEN_OPERATOR, arguments)
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: VARLEN_OPERATOR(q, k, v, ends, 8, 0.3, window, s)[0],
        (query, key, value, sinks),
    )


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_attention_with_negligible_dropout_is_the_operators(
    window: int | None, has_sinks: bool
) -> None:
    """The way with dropout, which drops almost never here, agrees with the operator."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    arguments = (torch.nn.Module(), query, key, value, None)
    settings: dict[str, Any] = {
        "cu_seqlens": torch.tensor([0, 3, 4, 12], dtype=torch.int32),
        "max_seqlen": 8,
        "sliding_window": window,
        "s_aux": torch.randn(4) if has_sinks else None,
    }
    plain, _ = varlen_attention(*arguments, **settings)
    dropped, _ = varlen_attention(*arguments, dropout=1e-9, **settings)
    torch.testing.assert_close(plain, dropped)


@torch.no_grad()  # FlexAttention has no backward on a CPU
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "phi"])
def test_flex_is_varlen(model_type: str) -> None:
    for batch in batches():
        losses = [
            token_losses(make(model_type, attention).eval(), batch, "chunked")
            for attention in (VARLEN, FLEX)
        ]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_flex_refuses_sliding_windows() -> None:
    with pytest.raises(RuntimeError, match=r"sliding window.*use varlen"):
        token_losses(make("mistral", FLEX), batches()[0], "plain")


@pytest.mark.parametrize(
    ("model_type", "settings", "part"),
    [
        ("llama", {}, None),
        ("gpt2", {"resid_pdrop": 0.1}, None),
        ("mistral", {}, "a sliding window"),
        ("gpt_oss", {}, "a sliding window and attention sinks"),
        ("llama", {"attention_dropout": 0.1}, "dropout"),
        ("opt", {"attention_dropout": 0.1}, "dropout"),
        ("gpt2", {"attn_pdrop": 0.1}, "dropout"),
    ],
)
def test_flex_is_refused_before_a_step(
    model_type: str, settings: dict[str, float], part: str | None, tmp_path: Path
) -> None:
    family(model_type, **settings).save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path), attention="flex")
    if part is None:
        build(tmp_path, config, packing=True)
        return
    with pytest.raises(UserError, match=rf"attn of the model has {part}, .*attention=varlen"):
        build(tmp_path, config, packing=True)


def test_liger_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model\.kernels=liger needs a GPU"):
        make(kernels="liger")


def test_liger_replaces_norms_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a model without memory: the kernels themselves need a GPU (tests/gpu)."""
    # Before a GPU is pretended: packages that it imports look for one as they load.
    pytest.importorskip("liger_kernel.transformers.monkey_patch")
    pytest.importorskip("bitsandbytes")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # it changes the module, too
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = make(kernels="liger")
    block: Any = blocks(model)[0]
    for module in (block.mlp, block.input_layernorm, block.post_attention_layernorm):
        assert "Liger" in module.forward.__qualname__
    assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
    assert "Liger" not in type(model).forward.__qualname__  # the loss stays ours


def test_float8_is_for_the_products_of_the_blocks() -> None:
    pytest.importorskip("torchao")
    for recipe in ("tensorwise", "rowwise"):
        model = make(float8=recipe)
        names = {type(module).__name__ for block in blocks(model) for module in block.modules()}
        assert "Float8Linear" in names
        assert "Linear" not in names
        assert type(model.lm_head) is torch.nn.Linear


def test_models_without_blocks_are_refused() -> None:
    model = make()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(UserError, match="names no repeated blocks"):
        configure(model, ModelConfig(compile=True))
