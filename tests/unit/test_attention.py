"""Packed documents compute what they compute alone, or the model is refused."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model import flash, varlen
from neftune_dist.model.attention import (
    VARLEN,
    implementation,
    packed_arguments,
    varlen_attention,
)
from neftune_dist.model.families import (
    PACKING_FAMILIES,
    check_lengths,
    check_model,
    longest_document,
)
from neftune_dist.model.load import build
from neftune_dist.model.varlen import VARLEN_OPERATOR
from tests.support.families import family

LENGTHS = (7, 1, 12)  # longer and shorter than the sliding windows, which are 5


def make(config: Any, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    ).eval()


def tokens(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (1, sum(LENGTHS)), generator=generator).split(LENGTHS, 1)


def alone(model: Any, document: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=document, use_cache=False).logits
    return logits


def ends(lengths: tuple[int, ...]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def packed(model: Any, documents: tuple[Tensor, ...]) -> Tensor:
    lengths = tuple(d.shape[1] for d in documents)
    logits: Tensor = model(
        input_ids=torch.cat(documents, 1),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        **packed_arguments(model, ends(lengths), max(lengths)),
        use_cache=False,
    ).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(PACKING_FAMILIES))
def test_packed_document_is_as_alone(model_type: str) -> None:
    documents = tokens()
    model = make(family(model_type), "eager")  # sdpa knows no sinks
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.normal_()
    expected = torch.cat([alone(model, d) for d in documents], 1)
    merged = alone(model, torch.cat(documents, 1))
    assert (merged - expected).abs().max() > 0.1  # the weights are such that a leak would show
    # Made as for a run: a model whose attention is its own takes the name, and computes as before.
    trained = make(model.config, VARLEN)
    trained.load_state_dict(model.state_dict())
    check_model(trained, packing=True)
    torch.testing.assert_close(packed(trained, documents), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "qwen2", "olmo3", "phi3"])
def test_the_sliding_window_limits_attention(model_type: str) -> None:
    document = tokens()[2]
    narrow, wide = (
        packed(make(family(model_type, sliding_window=window), VARLEN), (document,))
        for window in (5, 12)
    )
    assert torch.equal(narrow[:, :5], wide[:, :5])
    assert (narrow - wide)[:, 5:].abs().max() > 0.1


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "gpt2", "gpt_oss", "deepseek_v3", "qwen2_moe"]
)
def test_gradients_are_the_sum_of_those_alone(model_type: str) -> None:
    documents = tokens()
    model = make(family(model_type), "eager")
    for document in documents:
        alone(model, document).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(VARLEN)
    packed(model, documents).square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        # A sink's is the sum over all tokens of numbers of both signs.
        bound = 2e-5 if "sinks" in name else 1e-5
        torch.testing.assert_close(parameter.grad, expected[name], atol=bound * scale, rtol=0)
        assert "sinks" not in name or scale > 0.1


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_activation_checkpointing_changes_nothing(model_type: str) -> None:
    model = make(family(model_type), VARLEN).train()
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            # transformers 5.17 has it under its older name only.
            newer = hasattr(model, "activation_checkpointing_enable")
            name = "activation" if newer else "gradient"
            getattr(model, f"{name}_checkpointing_enable")()
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        handle = model.get_decoder().layers[0] if model_type != "gpt2" else model.transformer.h[0]
        attention = next(m for name, m in handle.named_children() if "attn" in name)
        with attention.register_forward_hook(count):
            logits = packed(model, tokens())
            logits.square().sum().backward()
        assert calls == 1 + checkpointed
        results.append([logits.detach(), *[p.grad for p in model.parameters()]])
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def folder_of(config: Any, path: Path) -> Path:
    config.save_pretrained(path)
    return path


# Silently wrong if they were let through: recurrence, convolution, ALiBi, chunks,
# dynamic masks; or no way down for the lengths.
@pytest.mark.parametrize(
    "model_type",
    ["bloom", "doge", "falcon", "lfm2", "llama4_text", "mamba",
     "mpt", "nemotron", "olmo_hybrid", "recurrent_gemma", "stablelm"],
)  # fmt: skip
def test_other_families_are_refused(model_type: str, tmp_path: Path) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = transformers.AutoConfig.for_model(model_type)
    with pytest.raises(UserError, match=r"data\.packing=false"):
        build(folder_of(config, tmp_path), ModelConfig(), packing=True)


def test_a_subclass_of_a_family_is_refused_packing() -> None:
    class Own(transformers.LlamaForCausalLM):
        pass

    with pytest.raises(UserError, match=r"data\.packing=false"):
        check_model(Own(family("llama")), packing=True)


def test_capped_logits_are_refused_or_computed(tmp_path: Path) -> None:
    folder = folder_of(family("gemma2"), tmp_path)
    with pytest.raises(UserError, match=r"data\.packing=false model\.attention=eager"):
        build(folder, ModelConfig(), packing=True)
    with pytest.raises(UserError, match=r"model\.attention=eager"):
        build(folder, ModelConfig(attention="sdpa"), packing=False)
    for attention in ("eager", "auto"):
        model = build(folder, ModelConfig(attention=attention), packing=False)
        assert attention_name(model) == "eager"
    uncapped = folder_of(family("gemma3_text", attn_logit_softcapping=30.0), tmp_path)
    with pytest.raises(UserError, match="caps"):
        build(uncapped, ModelConfig(), packing=True)
    with pytest.raises(UserError, match="caps"):
        build(uncapped, ModelConfig(attention="sdpa"), packing=False)
    # transformers would compute it by sdpa, without the cap.
    assert attention_name(build(uncapped, ModelConfig(), packing=False)) == "eager"


@pytest.mark.parametrize("model_type", ["bert", "roberta", "rembert", "paligemma", "bart"])
def test_models_that_see_later_tokens_are_refused(model_type: str, tmp_path: Path) -> None:
    folder = folder_of(transformers.AutoConfig.for_model(model_type), tmp_path)
    with pytest.raises(UserError, match=r"not trained here: .*(later|several models|encoder)"):
        build(folder, ModelConfig(attention="eager"), packing=False)


def test_a_missing_attention_is_named(tmp_path: Path) -> None:
    folder = folder_of(family("gptj"), tmp_path)
    with pytest.raises(UserError, match=r"model\.attention=eager"):
        build(folder, ModelConfig(attention="sdpa"), packing=False)
    for attention in ("eager", "auto"):
        model = build(folder, ModelConfig(attention=attention), packing=False)
        assert attention_name(model) == "eager"


def test_bidirectional_settings_are_refused(tmp_path: Path) -> None:
    folder = folder_of(family("gemma3_text", use_bidirectional_attention=True), tmp_path)
    with pytest.raises(UserError, match=r"not trained here: .*self_attn is not causal"):
        build(folder, ModelConfig(), packing=True)


@pytest.mark.parametrize(
    ("what", "given"),
    [
        ("no documents", {"cu_seqlens": None}),
        ("mask", {"attention_mask": torch.zeros(1, 1, 3, 3)}),
        ("caps", {"softcap": 30.0}),
    ],
)
def test_attention_refuses_what_it_does_not_do(what: str, given: dict[str, Any]) -> None:
    x = torch.zeros(1, 2, 3, 4)
    call: dict[str, Any] = {"attention_mask": None, "cu_seqlens": ends((2, 1)), **given}
    with pytest.raises(RuntimeError, match=what):
        varlen_attention(torch.nn.Module(), x, x, x, **call)


def test_attention_refuses_bidirectional_modules() -> None:
    x = torch.zeros(1, 2, 3, 4)
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="later"):
        varlen_attention(module, x, x, x, None, cu_seqlens=ends((2, 1)))


def test_attention_refuses_lengths_that_do_not_add_up() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError):
        varlen_attention(torch.nn.Module(), x, x, x, None, cu_seqlens=ends((2, 2)))


@pytest.mark.parametrize("window", [None, 5])
def test_packed_attention_drops_and_keeps_the_mean(window: int | None) -> None:
    """Values of 1 are attended to 1; with dropout to 0 up to 2, and to 1 on average."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 40, 20, 8), torch.randn(1, 40, 20, 8)
    out, _ = varlen_attention(
        torch.nn.Module(),
        query,
        key,
        torch.ones_like(key),
        None,
        cu_seqlens=ends(LENGTHS),
        max_seqlen=12,
        sliding_window=window,
        dropout=0.5,
    )
    sums = out[0, :, :, 0]  # (num_tokens, num_heads)
    assert set(sums[0].unique().tolist()) == {0.0, 2.0}  # the first token sees itself alone
    # A sum of dropped weights has a variance of the weights' squares, 1 at the most.
    assert float(sums.mean()) == pytest.approx(1, abs=5 / math.sqrt(sums.numel()))


class _OnGPU(Tensor):
    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize(("width", "given"), [(96, 96), (100, 104), (256, 256), (512, None)])
def test_flash_attention_gets_heads_that_it_takes(
    width: int, given: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU. Wider ones (Gemma 4's) are attended document by document."""
    seen: list[int | None] = []

    def operator(query: Tensor, *_: Any) -> tuple[Tensor, None]:
        seen.append(query.shape[-1])
        return query, None

    def one_by_one(query: Tensor, *_: Any) -> Tensor:
        seen.append(None)
        return query.transpose(1, 2)

    monkeypatch.setattr("neftune_dist.model.attention.VARLEN_OPERATOR", operator)
    monkeypatch.setattr("neftune_dist.model.attention.by_document", one_by_one)
    x = torch.zeros(1, 2, 6, width, dtype=torch.bfloat16).as_subclass(_OnGPU)
    out, _ = varlen_attention(torch.nn.Module(), x, x, x, None, cu_seqlens=ends((6,)))
    assert seen == [given] and out.shape == (1, 6, 2, width)


def test_heads_of_any_width_are_attended_alike() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 10)
    out, _ = varlen_attention(torch.nn.Module(), query, key, value, None, cu_seqlens=ends((6,)))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_the_longest_document_is_rounded_up_to_a_power_of_two() -> None:
    model = make(family("llama"), VARLEN)
    for longest, expected in ((1, 1), (2, 2), (3, 4), (8, 8), (9, 16)):
        assert packed_arguments(model, ends((longest,)), longest)["max_seqlen"] == expected


def test_a_window_counts_the_token_itself() -> None:
    """FlashAttention counts the tokens before it, and those after."""
    assert flash._window_sizes(5) == {"window_size_left": 4, "window_size_right": 0}
    assert set(flash._window_sizes(0).values()) == {None}


def test_auto_attention_follows_the_packing() -> None:
    assert implementation("auto", packing=True) == VARLEN
    assert implementation("auto", packing=False) == "sdpa"
    assert implementation("varlen", packing=True) == VARLEN
    assert implementation("eager", packing=False) == "eager"


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


LONGROPE = {
    **rope("longrope", short_factor=[1.0] * 4, long_factor=[3.0] * 4),
    "original_max_position_embeddings": 12,
}


TWO_ROPES = {
    "rope_parameters": {
        kind: {
            **rope("longrope", short_factor=[1.0] * 4, long_factor=[3.0] * 4)["rope_parameters"],
            "original_max_position_embeddings": length,
        }
        for kind, length in (("full_attention", 48), ("sliding_attention", 24))
    }
}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (family("gpt2"), 64),
        (family("opt"), 64),
        (family("llama"), None),
        (family("llama", **rope("yarn", factor=4.0)), None),
        (family("llama", **rope("dynamic", factor=2.0)), 64),
        (family("phi3", **LONGROPE), 12),
        (family("gemma3_text"), None),
        (family("gemma3_text", **TWO_ROPES), 24),
    ],
)
def test_document_beyond_the_position_limit_is_refused(config: Any, limit: int | None) -> None:
    assert longest_document(config) == limit
    check_lengths(config, limit or 10**6)
    if limit:
        with pytest.raises(UserError, match=f"data.max_length={limit}"):
            check_lengths(config, limit + 1)


@torch.no_grad()
def test_the_limit_of_longrope_is_where_the_layout_begins_to_matter() -> None:
    config = family("phi3", **LONGROPE)
    first, longer = tokens()[0], torch.cat([tokens()[2], tokens()[1]], 1)
    model = make(config)
    expected = alone(model, first)
    model.set_attn_implementation(VARLEN)
    within = packed(model, (first, tokens()[2]))[:, : first.shape[1]]
    torch.testing.assert_close(within, expected, atol=1e-5, rtol=0)
    past = packed(model, (first, longer))[:, : first.shape[1]]
    assert (past - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_learned_positions_reach_to_the_limit_and_no_further(model_type: str) -> None:
    config = family(model_type)
    model = make(config, VARLEN)
    limit = longest_document(config)
    assert limit
    document = torch.full((1, limit), 5)
    assert packed(model, (document, document)).isfinite().all()
    with pytest.raises(IndexError):
        packed(model, (torch.full((1, limit + 1), 5),))


@pytest.mark.parametrize("window", [0, 30])
def test_gradients_of_bfloat16_are_as_exact_as_it_is(window: int) -> None:
    """Of documents that the backward computes in float32, and of one that it does not."""
    lengths, generator = (50, 3, varlen._FLOAT32_LENGTH + 20), torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 64) for heads in (4, 2, 2, 4)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        *qkv, grad = [tensor.to(dtype).requires_grad_() for tensor in given]
        out, _ = VARLEN_OPERATOR(*qkv, ends(lengths), max(lengths), 0.125, window)
        return [one.double() for one in torch.autograd.grad(out, qkv, grad)]

    found, exact = gradients(torch.bfloat16), gradients(torch.float64)
    for one, other in zip(found, exact, strict=True):
        for a, b in zip(one.split(lengths), other.split(lengths), strict=True):
            assert float((a - b).norm() / b.norm()) < 0.01  # a bfloat16 is within 1/256


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kernel", ["CPU", "GPU"])
def test_blocks_of_queries_are_attended_as_in_the_whole(
    kernel: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, too, by a stand-in for FlashAttention, whose last query is that of the last key."""
    made = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    query, key, value, grad = (made(15, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4))
    cu_seqlens, blocks = ends((2, 7, 6)), [3, 6, 8, 11, 13, 15]
    settings = (cu_seqlens, (8, 0.3, window))
    whole = varlen.attend(varlen.CPU, (query, key, value), *settings, None)
    monkeypatch.setattr(flash, "flash_attention", ragged_attention)
    monkeypatch.setattr(flash, "flash_attention_backward", ragged_attention_backward)
    tried = varlen.FLASH if kernel == "GPU" else varlen.CPU

    def filled(tensor: Tensor) -> Tensor:
        """The blocks' rows, the last block filled up to 3."""
        return torch.cat([tensor[3:6], tensor[8:11], tensor[13:15], torch.zeros_like(tensor[:1])])

    rows = filled(query)
    out, lse = varlen.attend(tried, (rows, key, value), *settings, blocks)
    torch.testing.assert_close(out, filled(whole[0]))
    torch.testing.assert_close(lse.t(), filled(whole[1].t()))
    given = (filled(grad), rows, key, value, out, lse)
    found = varlen.gradients(tried, given, *settings, blocks)
    of_blocks = torch.zeros_like(grad)
    for first, end in ((3, 6), (8, 11), (13, 15)):
        of_blocks[first:end] = grad[first:end]
    given = (of_blocks, query, key, value, *whole)
    expected = varlen.gradients(varlen.CPU, given, *settings, None)
    for one, other in zip(found, (filled(expected[0]), *expected[1:]), strict=True):
        torch.testing.assert_close(one, other)


def ragged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
    *_: Any,
    scale: float,
    window_size_left: int | None,
    **__: Any,
) -> tuple[Tensor, Tensor]:
    outs, lses, rows = [], [], itertools.pairwise(cu_queries.tolist())
    for (start, end), (first, last) in zip(rows, itertools.pairwise(cu_keys.tolist()), strict=True):
        num_queries, num_keys = end - start, last - first
        assert num_queries <= max_queries and num_keys <= max_keys
        k, v = (tensor[first:last].repeat_interleave(2, 1) for tensor in (key, value))
        logits = torch.einsum("qhd,khd->hqk", query[start:end], k) * scale
        places = torch.arange(num_keys)
        distance = (torch.arange(num_queries) + num_keys - num_queries)[:, None] - places
        limit = num_keys if window_size_left is None else window_size_left
        logits = logits.masked_fill((distance < 0) | (distance > limit), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def ragged_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _out: Tensor,
    _lse: Tensor,
    *given: Any,
    scale: float,
    **settings: Any,
) -> tuple[Tensor, ...]:
    qkv = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out, _ = ragged_attention(*qkv, *given, scale=scale, **settings)
    return torch.autograd.grad(out, qkv, grad)


@pytest.mark.parametrize("layout", ["tokens outside", "heads outside"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_results_lie_as_a_compiled_block_is_promised(layout: str, heads: tuple[int, int]) -> None:
    """On a GPU, by torch's own rules of shapes: FlashAttention gives its results the strides of the
    query, which Phi and GPT-NeoX put together from parts, and so with the heads outside."""
    shapes = [(50, number, 64) for number in (heads[0], heads[1], heads[1])]
    empty = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    if layout == "heads outside":
        qkv = [empty(n, t, d).transpose(0, 1) for t, n, d in shapes]
    else:
        qkv = [empty(shape) for shape in shapes]
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    settings = (64, 0.125, 0)
    rest = (ends, settings, None)
    out = varlen.attend(varlen.FLASH, tuple(qkv), *rest)
    assert_laid_out_alike(out, VARLEN_OPERATOR(*qkv, ends, *settings))
    given = (empty(qkv[0].shape), *qkv, *out)
    promised = torch.ops.neftune_dist.varlen_attention_backward(*given, ends, *settings)
    assert_laid_out_alike(varlen.gradients(varlen.FLASH, given, *rest), promised)


def assert_laid_out_alike(found: Sequence[Tensor], promised: Sequence[Tensor]) -> None:
    for one, other in zip(found, promised, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize(
    ("capability", "windowed", "usable", "expected"),
    [
        ((9, 0), False, {"FA3", "FA4"}, "FA3"),
        ((9, 0), False, {"FA4"}, "FA4"),
        ((9, 0), True, {"FA4"}, "FA2"),
        ((10, 0), False, {"FA4"}, "FA4"),
        ((10, 0), False, set(), "FA2"),
        ((8, 0), False, {"FA3", "FA4"}, "FA2"),
    ],
)
@pytest.mark.parametrize("error", [ImportError, ValueError, RuntimeError])
def test_the_fastest_installed_kernel_is_chosen(
    capability: tuple[int, int],
    windowed: bool,
    usable: set[str],
    expected: str,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def activate(name: str) -> None:
        if name not in usable:
            raise error(f"{name} has no kernels")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    found = flash.varlen_kernel(torch.device("cuda"), "bf16", windowed)
    assert found == f"varlen ({expected})"
