"""The loss is the sum over supervised tokens, whatever the layout."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from neftune_dist.config import UserError
from neftune_dist.data.loader import MicroBatch, collate
from neftune_dist.model.attention import VARLEN, packed_arguments
from neftune_dist.model.loss import (
    chunked_cross_entropy,
    multiply_,
    resolve_loss,
    token_cross_entropies,
    token_losses,
)
from neftune_dist.model.projection import keeps_projection
from tests.support.corpora import documents_of
from tests.support.families import family
from tests.support.shrunk import shrunk

# Positional, tied, scaled or capped: each touches the hidden states or logits in its own way.
FAMILIES = ["llama", "mistral", "gpt2", "opt", "cohere", "granite", "gemma3_text"]


def make(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = family(model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and masks; learned: an answer, nothing, all but the first, two turns, the last alone."""
    random = np.random.default_rng(0)
    masks = [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0], [0, 1], [0, 1, 1, 0, 0, 1, 1, 0, 1, 1], [0, 0, 1]]
    return [(random.integers(3, 97, len(m)).astype(np.int32), np.array(m, np.uint8)) for m in masks]


def batch(packing: bool, indices: list[int] | None = None) -> MicroBatch:
    chosen = np.array(range(5) if indices is None else indices, np.int64)
    return collate(documents_of(documents()), chosen, np.zeros_like(chosen), packing)


def naive(model: Any) -> Tensor:
    """Document by document, token by token."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, supervised in documents():
        logits = model(torch.from_numpy(ids).long()[None]).logits[0].double()
        for position in range(1, len(ids)):
            if supervised[position]:
                total = total - F.log_softmax(logits[position - 1], 0)[int(ids[position])]
    return total


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ["auto", "plain"])
def test_packed_is_padded_is_naive(
    model_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neftune_dist.model.loss.CHUNK_BYTES", 4 * 97 * 5)  # 12 targets: 3 chunks
    model = make(model_type)
    expected = naive(model)
    expected_gradients = gradients(model, expected)
    atol = 1e-5 * max(float(g.abs().max()) for g in expected_gradients.values())
    for packing in (True, False):
        model.set_attn_implementation(VARLEN if packing else "sdpa")
        loss = token_losses(model, batch(packing), resolve_loss(kind, model))
        assert loss.dtype == torch.float32
        assert loss.shape == ()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for name, gradient in gradients(model, loss).items():
            torch.testing.assert_close(gradient, expected_gradients[name], atol=atol, rtol=0)
        losses = token_losses(model, batch(packing), resolve_loss(kind, model), "none")
        assert losses.shape == (12,)
        parts = [float(part.sum()) for part in losses.split([4, 0, 1, 6, 1])]
        alone = [
            token_losses(model, batch(packing, [i]), resolve_loss(kind, model)).item()
            for i in range(5)
        ]
        assert parts == pytest.approx(alone, rel=1e-6)


def test_capped_logits_are_capped() -> None:
    model = make("gemma2", final_logit_softcapping=2.0)
    model.set_attn_implementation("eager")
    loss = token_losses(model, batch(packing=False), resolve_loss("auto", model))
    assert loss.item() == pytest.approx(naive(model).item(), rel=1e-6)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("indices", [[], [1]])
@pytest.mark.parametrize("kind", ["plain", "chunked"])
def test_nothing_to_learn_is_exactly_zero(
    model_type: str, packing: bool, indices: list[int], kind: str
) -> None:
    model = make(model_type)
    model.set_attn_implementation(VARLEN if packing else "sdpa")
    loss = token_losses(model, batch(packing, indices), kind)
    assert loss.item() == 0.0
    # Zeros, not None: every parameter takes part in the collectives of the backward.
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("packing", [True, False])
def test_logits_are_computed_for_supervised_positions_only(packing: bool) -> None:
    model = make("llama")
    model.set_attn_implementation(VARLEN if packing else "sdpa")
    rows = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.numel() // 97))
    model.zero_grad()
    work = batch(packing)
    token_losses(model, work, "plain").backward()
    assert rows == [len(work.targets)] == [12]
    # And the model is left as it was: its next forward gives every logit.
    model.set_attn_implementation("sdpa")
    assert model(work.input_ids).logits.shape == (*work.input_ids.shape, 97)


def test_the_sum_is_float32_under_bfloat16() -> None:
    model = make("llama").to(torch.bfloat16)
    model.set_attn_implementation(VARLEN)
    work = batch(packing=True)
    loss = token_losses(model, work, "chunked")
    assert loss.dtype == torch.float32
    logits = model(
        input_ids=work.input_ids,
        position_ids=work.position_ids,
        **packed_arguments(model, cast(Tensor, work.cu_seqlens), max(work.document_lengths)),
    ).logits[0, work.positions]
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.double(), work.targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_targets_are_the_tokens_that_follow() -> None:
    for packing in (True, False):
        work = batch(packing)
        flat = work.input_ids.flatten()
        assert torch.equal(flat[work.positions + 1], work.targets)


@pytest.mark.parametrize("num_targets", [0, 1, 5, 6, 23])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_add_up(num_targets: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neftune_dist.model.loss.CHUNK_BYTES", 4 * 31 * 6 + 3)
    torch.manual_seed(0)
    hidden = torch.randn(num_targets, 8, dtype=torch.float64)
    weight = torch.randn(31, 8, dtype=torch.float64)
    bias = torch.randn(31, dtype=torch.float64) if biased else None
    targets = torch.randint(31, (num_targets,))
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    for tensor in given:
        tensor.requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")
    single = [tensor.detach().float().requires_grad_() for tensor in given]
    loss = chunked_cross_entropy(single[0], single[1], single[2] if biased else None, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    factor = 0.37  # as the step's number of supervised tokens gives one
    for found, true in zip(
        torch.autograd.grad(loss * factor, single),
        torch.autograd.grad(expected * factor, given),
        strict=True,
    ):
        torch.testing.assert_close(found, true.float(), atol=1e-6, rtol=1e-5)


def test_chunks_in_bfloat16_are_no_worse_than_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64, over as many chunks as would show if sums were rounded between them."""
    monkeypatch.setattr("neftune_dist.model.loss.CHUNK_BYTES", 4 * 64 * 4)
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    targets = torch.randint(64, (512,))
    true = weight.double().requires_grad_()
    F.cross_entropy(hidden.double() @ true.T, targets, reduction="sum").backward()
    errors = []
    for compute in (
        lambda w: chunked_cross_entropy(hidden, w, None, targets),
        lambda w: F.cross_entropy((hidden @ w.T).float(), targets, reduction="sum"),
    ):
        given = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(compute(given), given)
        errors.append(float((gradient.double() - true.grad).norm() / true.grad.norm()))
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize("model_type", ["llama", "cohere", "granite"])
@pytest.mark.parametrize("kind", ["auto", "plain"])
def test_the_factor_of_a_loss_is_not_rounded_to_bfloat16(model_type: str, kind: str) -> None:
    """The projection's gradient has the norm under 1 / N that it has under a power of two, which
    bfloat16 has exactly, but for that ratio."""
    model = make(model_type, vocab_size=5000).bfloat16()
    kind = resolve_loss(kind, model)
    random = np.random.default_rng(0)
    rows = [(random.integers(3, 5000, 40), np.arange(40) > 0) for _ in range(4)]
    many = documents_of([(ids.astype(np.int32), mask.astype(np.uint8)) for ids, mask in rows])
    work = collate(many, np.arange(4), np.zeros(4, np.int64), packing=False)
    weight = model.get_output_embeddings().weight

    def norm(number: int) -> float:
        loss = token_losses(model, work, kind) / number
        (gradient,) = torch.autograd.grad(loss, weight)
        return float(gradient.double().norm()) * number

    for number in (237, 350, 199):
        assert norm(number) / norm(256) == pytest.approx(1, abs=3e-4)


class NormedHead(nn.Module):
    """The projection of Baichuan 2: no plain matrix."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, F.normalize(self.weight))


@pytest.mark.parametrize("head", ["plain", "subclass", "normed"])
def test_the_factor_of_a_loss_reaches_the_gradients_of_any_head(head: str) -> None:
    """A step's loss is divided by its supervised tokens after the micro-batch has computed it."""
    model = make("llama")
    if head == "subclass":
        model.lm_head.__class__ = type("OwnLinear", (nn.Linear,), {})
    if head == "normed":
        model.lm_head = NormedHead(model.lm_head.weight)
    expected = gradients(model, naive(model) / 256)
    found = gradients(model, token_losses(model, batch(False), resolve_loss("auto", model)) / 256)
    atol = 1e-5 * max(float(g.abs().max()) for g in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=atol, rtol=0)


def test_multiplied_in_float32_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neftune_dist.model.loss._SCALED_ELEMENTS", 7)
    factor = torch.tensor(1 / 237)
    for shape in ((), (5,), (9, 3), (2, 16), (0, 4)):
        given = torch.randn(shape).bfloat16() if shape else torch.randn(1).bfloat16()
        expected = (given.float() * factor).bfloat16()
        transposed = given.t().contiguous().t()  # as the gradient of a projection is laid out
        assert torch.equal(multiply_(transposed, factor), expected)


def test_evaluated_losses_are_float32_under_bfloat16() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(500, (64,))
    found = token_cross_entropies(hidden, weight, None, targets)
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_nothing_is_differentiated_under_no_grad() -> None:
    weight = torch.randn(31, 8, requires_grad=True)
    with torch.no_grad():
        loss = chunked_cross_entropy(torch.randn(5, 8), weight, None, torch.arange(5))
    assert not loss.requires_grad


def test_no_logits_are_left_over() -> None:
    model = make("llama")
    model.set_attn_implementation(VARLEN)
    sizes = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    token_losses(model, batch(packing=True), "chunked").backward()
    assert sizes == [1]
    # And the model is left as it was: its next forward gives every logit.
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("model_type", ["cohere", "granite"])
def test_scaled_logits_are_not_lost(model_type: str) -> None:
    model = make(model_type)
    assert resolve_loss("auto", model) == "plain"
    with pytest.raises(UserError, match=r"changes its logits.*model.loss=plain"):
        resolve_loss("chunked", model)
    model.set_attn_implementation(VARLEN)
    with pytest.raises(UserError, match=r"changes its logits.*model.loss=plain"):
        token_losses(model, batch(packing=True), "chunked")
    assert resolve_loss("auto", make("llama")) == "chunked"


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("llama", True),
        ("gpt2", True),
        ("opt", True),  # a projection lies between its hidden states and its head
        ("falcon_h1", False),  # by a setting that no row of the table names
        ("nanochat", False),
        ("xlstm", False),  # output_logit_soft_cap
    ],
)
def test_changed_logits_are_found_by_running(model_type: str, kept: bool) -> None:
    """On the meta device, under whatever name the setting goes."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shrunk(model_type))
    assert keeps_projection(model) is kept
    assert resolve_loss("auto", model) == ("chunked" if kept else "plain")


def test_logits_changed_in_place_are_found() -> None:
    model = make("llama")
    usual = model.lm_head.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = type(model).forward(model, *args, **kwargs)
        found.logits.mul_(0.5)
        return found

    model.forward = forward
    assert keeps_projection(model) is False
    assert model.lm_head.forward == usual


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1.0), (torch.bfloat16, 1.5)])
def test_a_chunk_of_logits_has_one_memory(
    dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak over one chunk's float32 logits; in bfloat16 they lie beside the projection's output,
    then beside what goes into the gradients' products."""
    rows, vocabulary = 32, 40_000
    chunk = 4 * rows * vocabulary
    monkeypatch.setattr("neftune_dist.model.loss.CHUNK_BYTES", chunk)
    hidden = torch.randn(3 * rows, 2, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 2, dtype=dtype, requires_grad=True)
    targets = torch.arange(3 * rows)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        chunked_cross_entropy(hidden, weight, None, targets)
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    print(dtype, peak / chunk)
    assert most <= peak / chunk < most + 0.3  # the gradient of the weight is 0.06 in float32
