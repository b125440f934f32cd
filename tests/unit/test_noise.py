"""Laws 1 and 2: how much noise, on which tokens, from which stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from neftune_dist import NEFTune
from neftune_dist.noise.law import RankStream, SampleStream, draw, expected_norm, key_words, scales
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise, add_noise_
from neftune_dist.noise.philox import philox4x32, to_draws
from tests.support.philox_vectors import VECTORS

LENGTHS = [1, 7, 40, 333, 1000]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert [int(w) for w in philox4x32((c0, c1, c2, c3), key)] == list(expected)


def test_uniform_is_symmetric_exact_and_inside_the_open_interval() -> None:
    words = torch.tensor([0, 255, 256, 1 << 31, (1 << 32) - 1])
    values = to_draws([words.clone() for _ in range(4)], "uniform")[..., 0]
    assert values.dtype == torch.float32
    assert values[0] == values[1] == -1 + 2.0**-24
    assert values[-1] == 1 - 2.0**-24
    others = [(1 << 32) - 1 - words for _ in range(4)]
    assert torch.equal(to_draws(others, "uniform")[..., 0], -values)


def test_gaussian_is_box_muller_of_the_words_and_finite_for_all() -> None:
    words = [0, (1 << 32) - 1, 1 << 30, 0x9E3779B9]
    found = to_draws([torch.tensor([word]) for word in words], "gaussian")[0].tolist()
    units = [(word + 0.5) / 2**32 for word in words]
    for i in (0, 2):
        radius, angle = math.sqrt(-2 / 3 * math.log(units[i])), 2 * math.pi * units[i + 1]
        expected = [radius * math.cos(angle), radius * math.sin(angle)]
        assert found[i : i + 2] == pytest.approx(expected, rel=1e-6)


def test_draws_are_uniform_and_uncorrelated() -> None:
    layout = TokenLayout.from_lengths(torch.tensor([2000]))
    pieces = [draw(RankStream(5, r, s, 0), layout, 512) for r, s in ((0, 0), (1, 0))]
    pieces.append(draw(RankStream(5, 0, 1, 0), layout, 512))
    pieces.append(draw(RankStream(5, 0, 0, 1), layout, 512))
    n = pieces[0].numel()
    for u in pieces:
        ordered = ((u.flatten().double() + 1) / 2).sort().values
        steps = torch.arange(1, n + 1, dtype=torch.float64) / n
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in 1,000 draws.
        assert float((ordered - steps).abs().max()) < 1.95 / math.sqrt(n)
        assert abs(float(u.mean())) < 4 * math.sqrt(1 / 3 / n)
        assert abs(float(u.square().mean()) - 1 / 3) < 4 * math.sqrt(4 / 45 / n)
    bound = 4.5 / 3 / math.sqrt(n)  # 4.5 standard deviations of a mean of products
    for i, a in enumerate(pieces):
        for b in pieces[:i]:
            assert abs(float((a * b).mean())) < bound
        assert abs(float((a[1:] * a[:-1]).mean())) < bound
        assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < bound


def test_no_two_draws_share_a_counter() -> None:
    """All counters of a small grid of everything that keys a draw, both streams: all different."""
    layout = TokenLayout.from_lengths(
        torch.tensor([3, 2]), documents=torch.tensor([0, 1]), epochs=torch.tensor([0, 1])
    )
    streams: list[RankStream | SampleStream] = [
        RankStream(0, rank, step, micro)
        for rank in (0, 1)
        for step in (0, 1)
        for micro in (0, 1, (1 << 15) - 1)
    ]
    seen = []
    for stream in [*streams, SampleStream(0)]:
        words = stream.words(layout)
        for block in (0, 1, 1 << 14, (1 << 15) - 1):
            seen += torch.stack([words[0], words[1] + block, words[2], words[3]], 1).tolist()
    assert len({tuple(counter) for counter in seen}) == len(seen)
    assert all(0 <= word < 1 << 32 for counter in seen for word in counter)


def test_the_counters_are_those_of_the_table() -> None:
    """Word by word: another order would draw another noise for every run of the past."""
    layout = TokenLayout.from_lengths(
        torch.tensor([1, 2]), documents=torch.tensor([70, 80]), epochs=torch.tensor([7, 8])
    )

    def words(stream: RankStream | SampleStream) -> list[list[int]]:
        return [word.tolist() for word in stream.words(layout)]

    micro_step_5 = 5 << 15
    assert words(RankStream(9, 3, 4, 5)) == [[0, 1, 2], [micro_step_5] * 3, [4] * 3, [3] * 3]
    assert words(SampleStream(9)) == [[0, 0, 1], [1 << 31] * 3, [70, 80, 80], [7, 8, 8]]


def test_all_bits_of_the_seed_are_the_key() -> None:
    assert key_words(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)
    layout = TokenLayout.from_lengths(torch.tensor([3]))
    one, other = (draw(RankStream(seed, 0, 0, 0), layout, 8) for seed in (5, 5 + (1 << 32)))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("row_length", [None, 512])
def test_noise_keeps_its_size_relative_to_a_scaled_embedding(row_length: int | None) -> None:
    layout = TokenLayout.from_lengths(torch.tensor([3, 4]))
    plain = scales(layout, 64, 5.0, row_length=row_length)
    assert torch.equal(scales(layout, 64, 5.0, embed_scale=8.0, row_length=row_length), 8 * plain)
    if row_length:
        expected = torch.tensor(5.0 / math.sqrt(512 * 64), dtype=torch.float32)
        assert torch.equal(plain, expected.expand(7))


def test_rows_that_do_not_lie_one_after_another_are_noised_in_place() -> None:
    """A view of some columns of each row, next to what must stay as it is."""
    x = torch.randn(3, 9, 8)
    whole, layout = x.clone(), TokenLayout.from_lengths(torch.tensor([5, 5, 5]))
    expected = x[:, 2:7].clone()
    add_noise(expected, layout, RankStream(0, 0, 0, 0), 5.0)
    add_noise(x[:, 2:7], layout, RankStream(0, 0, 0, 0), 5.0)
    assert torch.equal(x[:, 2:7], expected)
    assert torch.equal(x[:, :2], whole[:, :2]) and torch.equal(x[:, 7:], whole[:, 7:])


def test_a_token_without_noise_has_changed_by_nothing() -> None:
    """Also where it is infinite, of which the difference from itself is no number."""
    x = torch.full((1, 2, 8), math.inf)
    words = RankStream(0, 0, 0, 0).words(TokenLayout.from_lengths(torch.tensor([2])))
    x[0, 1] = 0.0
    squares = add_noise_(x, torch.tensor([0.0, 1.0]), *words, 0, "uniform")
    assert squares[0] == 0 and float(squares[1]) == pytest.approx(float(x[0, 1].square().sum()))
    assert bool((x[0, 0] == math.inf).all())


def test_a_sum_that_overflows_is_counted_as_large() -> None:
    """Half precision ends at 65504; what exceeds it becomes infinite."""
    x = torch.full((2, 4), 65504.0, dtype=torch.float16)
    layout = TokenLayout.from_lengths(torch.tensor([2]))
    squares = add_noise(x, layout, RankStream(0, 0, 0, 0), 1000.0)
    assert x.isinf().any() and float(squares[0]) > 1000.0**2


@pytest.mark.parametrize("hidden", [1 << 17, (1 << 17) + 1])
def test_hidden_size_beyond_the_counter_is_refused(hidden: int) -> None:
    x, layout = torch.zeros(1, 1, hidden), TokenLayout.from_lengths(torch.tensor([1]))
    if hidden > 1 << 17:
        with pytest.raises(ValueError, match=f"hidden size of {hidden} is beyond"):
            add_noise(x, layout, RankStream(0, 0, 0, 0), 5.0)
    else:
        add_noise(x, layout, RankStream(0, 0, 0, 0), 5.0)
        assert float(x.norm()) == pytest.approx(5 / 3**0.5, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [64, 250, 1024])
def test_each_document_gets_the_norm_of_the_law(dtype: torch.dtype, hidden: int) -> None:
    layout = TokenLayout.from_lengths(torch.tensor(LENGTHS))
    x = 0.02 * torch.randn(sum(LENGTHS), hidden)
    noisy = x.to(dtype, copy=True)
    squares = add_noise(noisy, layout, RankStream(0, 0, 0, 0), 5.0)
    added = noisy.double() - x.to(dtype).double()
    for i, piece in enumerate(added.split(LENGTHS)):
        # Relative deviation of a norm of n uniforms: sqrt(1 / 5 / n); and the dtype's rounding.
        bound = 4 * math.sqrt(1 / 5 / piece.numel()) + {4: 1e-6, 2: 2e-2}[dtype.itemsize]
        assert float(piece.norm()) == pytest.approx(expected_norm(5.0), rel=bound)
        assert float(squares[i].sqrt()) == pytest.approx(float(piece.norm()), rel=1e-4)


def test_noise_is_added_in_float32_and_rounded_once() -> None:
    layout = TokenLayout.from_lengths(torch.tensor([50]))
    stream = RankStream(3, 0, 0, 0)
    x = torch.randn(50, 64).to(torch.bfloat16)
    noise = draw(stream, layout, 64) * (5.0 / math.sqrt(50 * 64))
    expected = (x.float() + noise).to(torch.bfloat16)
    add_noise(x, layout, stream, 5.0)
    assert torch.equal(x, expected)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and mask of five documents of LENGTHS, each alone in its row."""
    longest = max(LENGTHS)
    ids = torch.randint(0, 100, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        piece = slice(0, length) if side == "right" else slice(longest - length, longest)
        mask[row, piece] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", [True, False])
def test_layouts_say_the_same_of_padded_and_packed(side: str, positions: bool) -> None:
    ids, mask = padded(side)
    documents, epochs = torch.arange(10, 15), torch.arange(5)
    packed = TokenLayout.from_lengths(torch.tensor(LENGTHS), documents=documents, epochs=epochs)
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1) if positions else None
    rows = TokenLayout.from_arguments(ids, mask, position_ids, documents=documents, epochs=epochs)
    real = mask.flatten().bool()
    assert int(rows.length[~real].sum()) == 0
    for name in ("length", "position", "segment", "document", "epoch"):
        assert torch.equal(getattr(rows, name)[real], getattr(packed, name)), name
    flat_ids = torch.zeros(1, sum(LENGTHS), dtype=torch.int64)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    for arguments in (
        {"position_ids": packed.position[None]},
        {"cu_seq_lens": boundaries.int()},
        {"position_ids": packed.position[None], "attention_mask": torch.ones_like(flat_ids)},
    ):
        again = TokenLayout.from_arguments(
            flat_ids, documents=documents, epochs=epochs, **arguments
        )
        for name in ("length", "position", "segment", "document", "epoch"):
            assert torch.equal(getattr(again, name), getattr(packed, name)), name


def test_the_sample_stream_is_the_same_bits_in_every_layout() -> None:
    documents, epochs = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    stream, results = SampleStream(7), []
    packed = TokenLayout.from_lengths(torch.tensor(LENGTHS), documents=documents, epochs=epochs)
    x = torch.randn(sum(LENGTHS), 64)
    for side in ("right", "left"):
        ids, mask = padded(side)
        rows = torch.full((ids.numel(), 64), -0.0)
        real = mask.flatten().bool()
        rows[real] = x
        layout = TokenLayout.from_arguments(ids, mask, documents=documents, epochs=epochs)
        add_noise(rows, layout, stream, 5.0)
        assert torch.equal(torch.signbit(rows[~real]), torch.ones_like(rows[~real]).bool())
        assert not rows[~real].any()
        results.append(rows[real])
    add_noise(x, packed, stream, 5.0)
    results.append(x)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture
def model() -> Iterator[Any]:
    torch.manual_seed(0)
    yield transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def embedded(model: Any, **inputs: Tensor) -> Tensor:
    """What the first layer receives."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    model(**inputs)
    hook.remove()
    return seen[0].detach()


def test_off_in_eval_generate_and_after_the_block(model: Any) -> None:
    ids = torch.randint(0, 100, (2, 12))
    clean = embedded(model.train(), input_ids=ids)
    generator = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="in the loop"), NEFTune(5.0).attach(model) as noise:
        assert not torch.equal(embedded(model.train(), input_ids=ids), clean)
        assert torch.equal(embedded(model.eval(), input_ids=ids), clean)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert noise.num_fired == 1
        model.train()
        raise RuntimeError("in the loop")
    assert torch.equal(embedded(model, input_ids=ids), clean)
    assert torch.equal(torch.get_rng_state(), generator)
    NEFTune(5.0).attach(model).remove()  # may be attached again


def test_alpha_0_is_the_model_itself(model: Any) -> None:
    ids = torch.randint(0, 100, (2, 12))
    clean = embedded(model.train(), input_ids=ids)
    with NEFTune(0.0).attach(model) as noise:
        assert torch.equal(embedded(model, input_ids=ids), clean)
        assert not model._forward_pre_hooks
        assert float(noise.take_noise_norms()[1]) == 0


def test_the_gradient_passes_through_unchanged(model: Any) -> None:
    """d loss / d embedding row equals that of a model whose embedding output was noised by hand."""
    ids = torch.arange(12)[None]
    with NEFTune(5.0, seed=1).attach(model):
        noisy = embedded(model.train(), input_ids=ids)
        model.zero_grad()
    with NEFTune(5.0, seed=1).attach(model):
        model(input_ids=ids, labels=ids).loss.backward()
    by_hook = model.model.embed_tokens.weight.grad[:12].clone()
    leaf = noisy.clone().requires_grad_()
    model.zero_grad()
    model(inputs_embeds=leaf, labels=ids).loss.backward()
    assert leaf.grad is not None
    assert torch.allclose(by_hook, leaf.grad[0], rtol=0, atol=1e-7)


def test_steps_and_micro_steps_have_noise_of_their_own_and_repeat(model: Any) -> None:
    ids = torch.randint(0, 100, (1, 12))

    def noises() -> list[Tensor]:
        out = []
        with NEFTune(5.0, seed=2, rank=0).attach(model.train()) as noise:
            for noise.step in (0, 1):
                out += [embedded(model, input_ids=ids), embedded(model, input_ids=ids)]
        return out

    first, second = noises(), noises()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    with NEFTune(5.0, seed=2, rank=1).attach(model):
        assert not torch.equal(embedded(model, input_ids=ids), first[0])
    with NEFTune(5.0, seed=3, rank=0).attach(model):
        assert not torch.equal(embedded(model, input_ids=ids), first[0])


def test_a_loop_that_never_sets_the_step_runs_on(model: Any) -> None:
    """Past 2^15 forwards the step counts on: no noise comes back."""
    ids = torch.arange(12)[None]
    with NEFTune(5.0).attach(model) as noise:
        first = embedded(model, input_ids=ids)
        noise._clock[1].fill_(1 << 15)
        later = embedded(model, input_ids=ids)
        assert not torch.equal(later, first)
        noise.step = 1
        assert torch.equal(embedded(model, input_ids=ids), later)


def test_rank_defaults_to_the_launchers_variable(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no process group: the forward's, which the handle may be older than."""
    ids = torch.arange(12)[None]
    found = []
    for variable, given in (("1", {}), ("0", {"rank": 1}), ("0", {})):
        monkeypatch.delenv("RANK", raising=False)
        with NEFTune(5.0, **given).attach(model):
            monkeypatch.setenv("RANK", variable)
            found.append(embedded(model, input_ids=ids))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_an_embedding_scaled_inside_its_module_gets_noise_in_proportion() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        pad_token_id=0,
    )
    model = transformers.Gemma3ForCausalLM(config).train()
    ids = torch.randint(1, 100, (1, 500))
    clean = embedded(model, input_ids=ids)
    with NEFTune(5.0).attach(model) as noise:
        added = embedded(model, input_ids=ids) - clean
        assert float(noise.take_noise_norms()[0]) == pytest.approx(expected_norm(5.0), rel=0.01)
    scale = float(model.model.embed_tokens.scalar_embed_scale)
    assert scale == pytest.approx(8.0)
    assert float(added.norm()) == pytest.approx(scale * expected_norm(5.0), rel=0.01)


def test_norms_are_taken_once(model: Any) -> None:
    ids = torch.randint(0, 100, (2, 12))
    with NEFTune(5.0).attach(model) as noise:
        model(input_ids=ids)
        assert int(noise.take_noise_norms()[1]) == 2
        assert [float(norm) for norm in noise.take_noise_norms()] == [0.0, 0.0]


def test_a_description_holds_for_one_forward(model: Any) -> None:
    with NEFTune(5.0).attach(model) as noise:
        noise.describe(TokenLayout.from_lengths(torch.tensor([3, 4])))
        for num_tokens, num_documents in ((7, 2), (5, 1)):
            ids = torch.zeros(1, num_tokens, dtype=torch.int64)
            with torch.no_grad():  # which gets no noise, so it is not the forward described
                model(input_ids=ids)
            model(input_ids=ids)
            assert int(noise.take_noise_norms()[1]) == num_documents


def test_a_slice_counts_documents_by_their_number_in_the_whole_sequence(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second half of eight documents of one token has the numbers 4 to 7, above its tokens'."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    group: Any = SimpleNamespace(size=lambda: 2)
    layout = TokenLayout.from_lengths(torch.ones(8, dtype=torch.int64))
    with NEFTune(5.0, slices=group, rank=0).attach(model) as noise:
        noise.describe(layout.take(torch.arange(4, 8)))
        model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
        norm_sum, number = noise.take_noise_norms()
    assert int(number) == 4
    assert float(norm_sum) == pytest.approx(4 * expected_norm(5.0), rel=0.2)


def test_tensor_parallel_ranks_share_a_documents_noise_without_a_rank(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(model), "tp_size", 2)
    one, ids = torch.tensor([3]), torch.zeros(1, 3, dtype=torch.int64)
    with NEFTune(5.0, stream="sample").attach(model) as noise:
        noise.describe(TokenLayout.from_lengths(one, documents=one, epochs=one))
        model(input_ids=ids)
        assert noise.num_fired == 1
    with NEFTune(5.0).attach(model), pytest.raises(ValueError, match=r"set NEFTune\(rank="):
        model(input_ids=ids)


def test_wrong_settings_and_inputs_raise(model: Any) -> None:
    for alpha in (-1.0, math.nan, math.inf, 1e6):
        with pytest.raises(ValueError, match="alpha"):
            NEFTune(alpha)
    with pytest.raises(ValueError, match="stream"):
        NEFTune(5.0, stream="document")
    with pytest.raises(ValueError, match="seed"):
        NEFTune(5.0, seed=-1)
    with pytest.raises(ValueError, match="get_input_embeddings"):
        NEFTune(5.0).attach(torch.nn.Linear(2, 2))
    ids = torch.randint(0, 100, (2, 12))
    with NEFTune(5.0).attach(model.train()):
        with pytest.raises(ValueError, match="already"):
            NEFTune(5.0).attach(model)
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=ids, attention_mask=torch.ones(2, 1, 12, 12))
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 64))
    with NEFTune(5.0, stream="sample").attach(model) as noise:
        with pytest.raises(ValueError, match="document ids"):
            model(input_ids=ids)
        noise.describe(TokenLayout.from_lengths(torch.tensor([5])))
        with pytest.raises(ValueError, match="5 tokens"):
            model(input_ids=ids)
