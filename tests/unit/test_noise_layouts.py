"""Law 1 and 2 in every layout: a document's noise is the same however its tokens are laid out.

Here on the operator and on the least of models, an embedding of zeros, whose output is the noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.tensor.experimental import context_parallel
from transformers.integrations.neftune import neftune_post_forward_hook
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from neftune_dist import NEFTune
from neftune_dist.noise.law import (
    NORMS,
    SIGNS,
    RankStream,
    SampleStream,
    draw,
    expected_norm,
)
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise

ALPHA = 5.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOST_TOKENS = 8192


def random_lengths(seed: int, num_tokens: int) -> list[int]:
    """Lengths from 1 to 8192, both of them if they fit, as many of each magnitude, in any order."""
    chosen = random.Random(seed)
    lengths = [1, min(MOST_TOKENS, num_tokens // 2)]
    while sum(lengths) < num_tokens:
        lengths.append(int(2 ** chosen.uniform(0, math.log2(lengths[1] + 1))))
    chosen.shuffle(lengths)
    return lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden", "num_tokens"), [(64, 40_000), (250, 20_000), (256, 2 * MOST_TOKENS), (8192, 600)]
)
def test_a_documents_norm_is_that_of_the_law(
    hidden: int, num_tokens: int, dtype: torch.dtype
) -> None:
    """Within 5 standard deviations of a norm of n uniforms, sqrt(1 / 5 / n); and where the dtype is
    narrow, its rounding."""
    lengths = random_lengths(hidden, num_tokens)
    x = torch.zeros(sum(lengths), hidden, dtype=dtype)
    layout = TokenLayout.from_lengths(torch.tensor(lengths))
    squares = add_noise(x, layout, RankStream(0, 0, 0, 0), ALPHA)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for i, (length, noise) in enumerate(zip(lengths, x.split(lengths), strict=True)):
        norm = float(noise.double().norm())
        bound = 5 * math.sqrt(1 / 5 / (length * hidden)) + rounding
        assert norm == pytest.approx(ALPHA / math.sqrt(3), rel=bound), length
        assert float(squares[i].sqrt()) == pytest.approx(norm, rel=1e-5)


# A batch is drawn as numbers (rows, columns): 1 and up, the token's document; 0, padding.
def one_a_row(lengths: list[int], left: bool) -> Tensor:
    rows = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for i, length in enumerate(lengths):
        rows[i, -length:] = i + 1
        if not left:
            rows[i] = rows[i].roll(length)
    return rows


def one_row(lengths: list[int]) -> Tensor:
    return torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))[None]


def rows_with_padding(lengths: list[int], left: bool) -> Tensor:
    """Several documents a row, and padding at its end or beginning."""
    packed = [one_row(lengths[i : i + 3])[0] + i for i in range(0, len(lengths), 3)]
    side = "left" if left else "right"
    return nn.utils.rnn.pad_sequence(packed, batch_first=True, padding_side=side)


def rows_with_holes(lengths: list[int]) -> Tensor:
    """One row, with padding within and between documents."""
    chosen, numbers = random.Random(0), []
    for i, length in enumerate(lengths):
        cut = chosen.randint(0, length)
        numbers += [i + 1] * cut + [0] * chosen.randint(0, 4)
        numbers += [i + 1] * (length - cut) + [0] * chosen.randint(0, 4)
    return torch.tensor(numbers)[None]


def tokens_of(batch: Tensor) -> list[Tensor]:
    """Of each document: the flat indices of its tokens."""
    flat = batch.flatten()
    return [(flat == i + 1).nonzero().flatten() for i in range(int(flat.max()))]


def positions(batch: Tensor) -> Tensor:
    """Of each token within its document; at padding, whatever."""
    within = torch.randint(3000, (batch.numel(),), generator=torch.Generator().manual_seed(0))
    for tokens in tokens_of(batch):
        within[tokens] = torch.arange(len(tokens))
    return within.view(batch.shape)


def cumulative(batch: Tensor, padding_leads: bool) -> Tensor:
    """Cumulative lengths over all tokens: padding counts to the document after it, or before."""
    every = tokens_of(batch)
    if padding_leads:
        inner = [int(tokens[-1]) + 1 for tokens in every[:-1]]
    else:
        inner = [int(tokens[0]) for tokens in every[1:]]
    return torch.tensor([0, *inner, batch.numel()])


def mask(batch: Tensor) -> Tensor:
    return (batch > 0).long()


LENGTHS = random_lengths(1, 2000)
HIDDEN = {torch.float32: 64, torch.bfloat16: 250, torch.float16: 128}
PADDED = {"right padded": one_a_row(LENGTHS, False), "left padded": one_a_row(LENGTHS, True)}
PACKED = {"packed": one_row(LENGTHS)}
BOTH = {
    "packed, right padded": rows_with_padding(LENGTHS, False),
    "packed, left padded": rows_with_padding(LENGTHS, True),
    "packed, with holes": rows_with_holes(LENGTHS),
}
ARGUMENTS: dict[str, tuple[dict[str, Tensor], Callable[[Tensor], dict[str, Tensor]]]] = {
    "mask": (PADDED, lambda b: {"attention_mask": mask(b)}),
    "bool mask": (PADDED, lambda b: {"attention_mask": b > 0}),
    "mask, positions": (
        PADDED | BOTH,
        lambda b: {"attention_mask": mask(b), "position_ids": positions(b)},
    ),
    "positions": (PACKED, lambda b: {"position_ids": positions(b)}),
    "positions, ones": (
        PACKED,
        lambda b: {"position_ids": positions(b), "attention_mask": torch.ones_like(b)},
    ),
    "text and image positions": (
        PACKED,
        lambda b: {"position_ids": positions(b).expand(4, *b.shape)},
    ),
    "cumulative lengths": (PACKED, lambda b: {"cu_seq_lens": cumulative(b, False).int()}),
    "mask, cumulative lengths": (
        PADDED | BOTH,
        lambda b: {"attention_mask": mask(b), "cu_seq_lens": cumulative(b, False)},
    ),
    "mask, cumulative lengths, padding first": (
        PADDED | BOTH,
        lambda b: {"attention_mask": mask(b), "cu_seq_lens": cumulative(b, True)},
    ),
    "sequence numbers": (PACKED, lambda b: {"seq_idx": b.int() - 1}),
    "mask, sequence numbers": (
        PADDED | BOTH,
        lambda b: {"attention_mask": mask(b), "seq_idx": b - 1},
    ),
    "numbers in the mask": (PADDED | PACKED | BOTH, lambda b: {"attention_mask": b}),
}
STREAM = SampleStream(7)
DOCUMENTS = (1 << 32) - 1 - 7 * torch.arange(len(LENGTHS))
EPOCHS = torch.arange(len(LENGTHS)) % 3


def embeddings(dtype: torch.dtype) -> list[Tensor]:
    """(length, hidden) of each document."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, HIDDEN[dtype], generator=generator).to(dtype) for n in LENGTHS]


def noised_alone(dtype: torch.dtype) -> Tensor:
    """(num_tokens, hidden): every document by itself, from the reference."""
    pieces = []
    for i, x in enumerate(embeddings(dtype)):
        layout = TokenLayout.from_lengths(
            torch.tensor([len(x)]), documents=DOCUMENTS[i : i + 1], epochs=EPOCHS[i : i + 1]
        )
        scale = torch.tensor(ALPHA / math.sqrt(x.numel()), dtype=torch.float32)
        pieces.append((x.float() + draw(STREAM, layout, x.shape[1]) * scale).to(dtype))
    return torch.cat(pieces)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_layout_is_the_documents_alone(name: str, dtype: torch.dtype) -> None:
    """Bit for bit under the sample stream; and padding keeps its bits."""
    expected = noised_alone(dtype)
    batches, arguments = ARGUMENTS[name]
    for batch in batches.values():
        layout = TokenLayout.from_arguments(
            torch.zeros_like(batch), documents=DOCUMENTS, epochs=EPOCHS, **arguments(batch)
        )
        real = batch.flatten() > 0
        x = torch.full((batch.numel(), HIDDEN[dtype]), -0.0, dtype=dtype)
        x[~real, 0] = math.inf
        untouched = x[~real].clone()
        x[real] = torch.cat(embeddings(dtype))
        add_noise(x.view(*batch.shape, -1), layout, STREAM, ALPHA)
        assert torch.equal(x[real], expected)
        assert torch.equal(x[~real], untouched)
        assert torch.equal(x[~real].signbit(), untouched.signbit())


def test_positions_of_images_say_nothing_of_documents() -> None:
    """Three coordinates, which fall back within a document."""
    ids = torch.zeros(2, 12, dtype=torch.int64)
    positions = (torch.arange(12) % 5).expand(3, 2, 12)
    layout = TokenLayout.from_arguments(ids, position_ids=positions)
    assert layout.length.unique().tolist() == [12]


def test_a_mask_says_what_is_padding_whatever_the_token() -> None:
    """A last document of the padding token alone, which the mask numbers, is none of TRL's."""
    ids, numbers = torch.tensor([[5, 6, 7, 2]]), torch.tensor([[1, 1, 1, 2]])
    for name, token, last in (
        ("attention_mask", 2, 1),
        ("seq_idx", 2, 0),
        ("seq_idx", None, 1),
    ):
        layout = TokenLayout.from_call({"input_ids": ids, name: numbers}, padding_token=token)
        assert layout.length.tolist() == [3, 3, 3, last]


def contiguous(columns: int) -> list[Tensor]:
    """Three slices of a sequence, the last one shorter."""
    return list(torch.arange(columns).split(columns * 2 // 5))


def zig_zag(columns: int) -> list[Tensor]:
    """Context parallelism's slices: of four pieces, the first and the last, and the inner two."""
    pieces = torch.arange(columns).tensor_split(4)
    return [torch.cat((pieces[0], pieces[3])), torch.cat((pieces[1], pieces[2]))]


@pytest.mark.parametrize("slices", [contiguous, zig_zag])
@pytest.mark.parametrize("name", PADDED | PACKED | BOTH)
@pytest.mark.parametrize("stream", [STREAM, RankStream(7, 3, 2, 1)])
def test_slices_of_a_sequence_are_noised_as_the_whole(
    slices: Callable[[int], list[Tensor]], name: str, stream: SampleStream | RankStream
) -> None:
    """What the ranks of a sequence-parallel group add together is what one alone adds, to the bit;
    so are the norms that they add up."""
    batch = (PADDED | PACKED | BOTH)[name]
    rows, columns = batch.shape
    whole = TokenLayout.from_arguments(
        torch.zeros_like(batch), attention_mask=batch, documents=DOCUMENTS, epochs=EPOCHS
    )
    expected = torch.randn(rows, columns, 64, generator=torch.Generator().manual_seed(0))
    x = expected.clone()
    squares = add_noise(expected, whole, stream, ALPHA)
    total = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for chosen in slices(columns):
        tokens = torch.arange(rows * columns).view(rows, columns)[:, chosen].flatten()
        piece = x[:, chosen]
        total += add_noise(piece, whole.take(tokens), stream, ALPHA)[: len(LENGTHS)]
        x[:, chosen] = piece
    assert torch.equal(x, expected)
    assert torch.allclose(total, squares[: len(LENGTHS)], rtol=1e-12, atol=0)


class Lookup(nn.Module):
    """The least that NEFTune attaches to. Its embeddings are 0: it gives the noise alone."""

    def __init__(self, hidden: int = 64, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, hidden, dtype=dtype)
        nn.init.zeros_(self.embedding.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.embedding(input_ids)


IDS = torch.zeros(2, 12, dtype=torch.int64)


@pytest.fixture
def model() -> Iterator[Lookup]:
    yield Lookup()


@pytest.mark.parametrize("names", ["mask", "positions", "cu_seq_lens_q", "cu_seqlens", "seq_idx"])
def test_the_hook_reads_every_layout_off_the_arguments(names: str, model: Lookup) -> None:
    """By the names that transformers and its packers call them."""
    batch = PADDED["left padded"] if names == "mask" else PACKED["packed"]
    arguments = {
        "mask": {"attention_mask": mask(batch)},
        "positions": {"position_ids": positions(batch)},
        "cu_seq_lens_q": {"cu_seq_lens_q": cumulative(batch, False)},
        "cu_seqlens": {"cu_seqlens": cumulative(batch, False)},
        "seq_idx": {"seq_idx": batch},
    }[names]
    with NEFTune(ALPHA).attach(model) as noise:
        added = model(input_ids=torch.zeros_like(batch), **arguments).detach()
        norm_sum, number = noise.take_noise_norms()
    norms = [float(added[batch == i + 1].norm()) for i in range(len(LENGTHS))]
    for norm, length in zip(norms, LENGTHS, strict=True):
        assert norm == pytest.approx(expected_norm(ALPHA), rel=5 * math.sqrt(1 / 5 / (length * 64)))
    assert int(number) == len(LENGTHS)
    assert float(norm_sum) == pytest.approx(sum(norms), rel=1e-5)
    assert not added[batch == 0].any()


@pytest.mark.parametrize("multiple", [None, 8, 64])
@pytest.mark.parametrize("lengths", [(5, 9, 3), (7, 1), (16,), (1, 1, 6)])
def test_tokens_that_trl_appends_to_packed_documents_are_padding(
    multiple: int | None, lengths: tuple[int, ...], model: Lookup
) -> None:
    """Its collator gives padding tokens positions of 0, and boundaries: each looks like a document.
    They stay untouched, bit for bit, and are not counted."""
    collate = DataCollatorForLanguageModeling(
        pad_token_id=2, padding_free=True, pad_to_multiple_of=multiple
    )
    ids = [[*range(3, 3 + n - 1), 2] for n in lengths]  # the end of a turn is the padding
    batch = collate([{"input_ids": tokens} for tokens in ids])
    del batch["labels"]
    number, total = len(lengths), batch["input_ids"].numel()
    assert total == sum(lengths) or (multiple and total % multiple == 0)
    clean = model.embedding(batch["input_ids"])
    for names in (batch.keys(), {"input_ids", "position_ids"}):
        with NEFTune(5.0).attach(model) as noise:
            noise.padding_token = 2
            found = model(**{name: batch[name] for name in names})
            _, counted = noise.take_noise_norms()
        changed = (found != clean).any(-1)[0].tolist()
        # A last document of the padding token alone cannot be told from padding.
        alone = [i for i, tokens in enumerate(ids) if tokens == [2]]
        assert int(counted) == number - (number - 1 in alone)
        assert changed[: sum(lengths)] == [True] * (sum(lengths) - (number - 1 in alone)) + [
            False
        ] * (number - 1 in alone)
        assert not any(changed[sum(lengths) :])


def test_length_padded_is_the_widely_copied_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document of 20 tokens in a row of 512 gets sqrt(20 / 512) of the law, and padding gets the
    same noise: transformers' own hook, were its draws ours."""
    model, ids = Lookup(), torch.zeros(3, 512, dtype=torch.int64)
    real = (torch.arange(512) < torch.tensor([[20], [512], [100]])).long()
    with NEFTune(ALPHA, length="padded").attach(model) as noise:
        added = model(input_ids=ids, attention_mask=real).detach()
        norm_sum, number = noise.take_noise_norms()
    law = expected_norm(ALPHA)
    of_documents = [float(added[i][real[i] > 0].norm()) for i in range(3)]
    for norm, length in zip(of_documents, (20, 512, 100), strict=True):
        bound = 5 * math.sqrt(1 / 5 / (length * 64))
        assert norm == pytest.approx(law * math.sqrt(length / 512), rel=bound)
    for row in added:
        assert float(row.norm()) == pytest.approx(law, rel=5 * math.sqrt(1 / 5 / (512 * 64)))
    assert int(number) == 3
    assert float(norm_sum) == pytest.approx(sum(of_documents), rel=1e-5)

    layout = TokenLayout.from_arguments(ids)
    draws = draw(RankStream(0, 0, 0, 0), layout, 64).view(3, 512, 64)
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.copy_(draws * high))
    model.embedding.neftune_noise_alpha = ALPHA
    theirs = neftune_post_forward_hook(model.embedding, (ids,), torch.zeros(3, 512, 64))
    assert torch.allclose(added, theirs, rtol=1e-6, atol=0)


def noises(model: Lookup, number: int, **settings: Any) -> list[Tensor]:
    """Of so many forward passes in a row."""
    with NEFTune(ALPHA, **settings).attach(model) as noise:
        found = [model(input_ids=IDS).detach() for _ in range(number)]
        assert noise.num_fired == number
    return found


@pytest.mark.parametrize("stream", ["rank", "sample"])
def test_symmetric_forwards_come_in_opposite_pairs(stream: str, model: Lookup) -> None:
    """Every entry is alpha / sqrt(L d) or minus that: each document's norm is alpha."""
    found = []
    with NEFTune(ALPHA, distribution="symmetric", stream=stream).attach(model) as noise:
        for batch in (0, 1):
            for noise.sign in (1, -1):
                if stream == "sample":
                    noise.describe(documents([12, 12], documents=[batch, 7], epochs=[0, batch]))
                found.append(model(input_ids=IDS).detach())
                assert noise.alpha == ALPHA
        assert noise.num_fired == 4
    first, second, third, fourth = found
    assert torch.equal(first, -second) and torch.equal(third, -fourth)
    assert not torch.equal(first, third) and not torch.equal(first, fourth)
    size = torch.tensor(ALPHA / math.sqrt(12 * 64), dtype=torch.float32)
    assert torch.equal(first.abs(), size.expand(first.shape))
    assert float(first[0].norm()) == pytest.approx(ALPHA, rel=1e-6)
    assert abs(float(first.sign().mean())) < 5 / math.sqrt(first.numel())
    assert expected_norm(ALPHA, "symmetric") == ALPHA


def test_the_sign_goes_with_the_draws_of_its_micro_step(model: Lookup) -> None:
    """Batch i of a step has the draws of micro-step i in both of its passes, as in every run of
    the past; the sign starts again with a step, and a change of strength keeps it."""
    with NEFTune(ALPHA, distribution="symmetric").attach(model) as noise:
        for step in (0, 1):
            noise.step = step
            for micro_step in (0, 1, 2):
                for sign in (1, -1):
                    noise.sign, noise.alpha = sign, ALPHA / (1 + step)
                    layout = TokenLayout.from_arguments(IDS)
                    u = draw(RankStream(0, 0, step, micro_step), layout, 64, "symmetric")
                    expected = sign * noise.alpha / math.sqrt(12 * 64) * u
                    found = model(input_ids=IDS).detach()
                    assert torch.allclose(found.flatten(0, 1), expected, rtol=1e-6, atol=0)
            assert noise.num_fired == 6


def test_gaussian_noise_has_the_variance_of_the_uniform() -> None:
    """1 / 3, a normal distribution's fourth moment, and draws beyond the uniform's 1."""
    layout = TokenLayout.from_lengths(torch.tensor([2000]))
    u = draw(RankStream(0, 0, 0, 0), layout, 512, "gaussian").double()
    n = u.numel()
    assert abs(float(u.mean())) < 5 * math.sqrt(1 / 3 / n)
    assert float(u.square().mean()) == pytest.approx(1 / 3, rel=5 * math.sqrt(2 / n))
    # The variance of a standard normal's fourth power is 96.
    assert float((3 * u.square()).square().mean()) == pytest.approx(
        3, rel=5 * math.sqrt(96 / 9 / n)
    )
    beyond = math.erfc(math.sqrt(3 / 2))  # P(|u| > 1), at a standard deviation of 1 / sqrt(3)
    assert float((u.abs() > 1).double().mean()) == pytest.approx(beyond, rel=0.02)


@pytest.mark.parametrize("distribution", NORMS)
def test_expected_norm_is_that_of_the_draws(distribution: str) -> None:
    layout = TokenLayout.from_lengths(torch.tensor([500]))
    u = draw(RankStream(0, 0, 0, 0), layout, 512, distribution).double()
    assert float(u.square().mean().sqrt()) == pytest.approx(NORMS[distribution], rel=0.01)
    assert {abs(sign) for sign in SIGNS[distribution]} == {1}


def test_alpha_may_change_from_forward_to_forward(model: Lookup) -> None:
    with NEFTune(ALPHA).attach(model) as noise:

        def at(alpha: float) -> Tensor:
            noise.step, noise.alpha = 3, alpha
            assert noise.alpha == alpha
            return model(input_ids=IDS).detach()

        full, half, none = at(ALPHA), at(ALPHA / 2), at(0.0)
        assert torch.equal(half, full / 2)
        assert full.all() and not none.any()
        noise.take_noise_norms()
        at(ALPHA / 2)
        norm_sum, number = noise.take_noise_norms()
        assert float(norm_sum / number) == pytest.approx(
            expected_norm(ALPHA / 2), rel=5 * math.sqrt(1 / 5 / (12 * 64))
        )


def test_alpha_0_by_schedule_is_no_noise() -> None:
    """Every bit of every embedding stays, -0.0 and infinity as well, and no norm is counted."""
    model = Lookup()
    nn.init.normal_(model.embedding.weight)
    with torch.no_grad():
        model.embedding.weight[0] = -0.0
        model.embedding.weight[1] = math.inf
    ids = torch.arange(24).view(2, 12)
    clean = model(input_ids=ids).detach()
    for settings in ({}, {"distribution": "symmetric"}, {"length": "padded"}):
        with NEFTune(ALPHA, **settings).attach(model) as noise:
            noise.alpha, noise.sign = 0.0, 1
            same = model(input_ids=ids).detach()
            assert torch.equal(same.view(torch.int32), clean.view(torch.int32))
            assert noise.num_fired == 1
            assert float(noise.take_noise_norms()[0]) == 0


def attached(**settings: Any) -> Callable[..., Tensor]:
    """A model with noise on."""
    model = Lookup()
    NEFTune(ALPHA, **settings).attach(model)
    return model


def documents(lengths: list[int], **identities: list[int]) -> TokenLayout:
    given = {name: torch.tensor(values) for name, values in identities.items()}
    return TokenLayout.from_lengths(torch.tensor(lengths), **given)


def set_step(step: float) -> None:
    NEFTune(ALPHA).attach(Lookup()).step = step  # type: ignore[assignment]


def set_sign(sign: int) -> None:
    NEFTune(ALPHA).attach(Lookup()).sign = sign


def set_alpha(alpha: float, initial: float = ALPHA) -> None:
    NEFTune(initial).attach(Lookup()).alpha = alpha


def enter_twice() -> None:
    with NEFTune(ALPHA).attach(Lookup()) as noise:
        pass
    with noise:
        pass


def attach_twice() -> None:
    model = Lookup()
    NEFTune(ALPHA).attach(model)
    NEFTune(ALPHA).attach(model)


def encoder_decoder() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def describe_too_few() -> None:
    model = Lookup()
    NEFTune(ALPHA).attach(model).describe(documents([5]))
    model(input_ids=IDS)


ONES = torch.ones_like(IDS)
GROUP: Any = SimpleNamespace(size=lambda: 2)
BAD: dict[str, tuple[str, Callable[[], Any]]] = {
    "alpha negative": ("alpha=-1.0 is out of range", lambda: NEFTune(-1.0)),
    "alpha NaN": ("alpha=nan is out of range", lambda: NEFTune(math.nan)),
    "alpha infinite": ("alpha=inf is out of range", lambda: NEFTune(math.inf)),
    "alpha absurd": ("alpha=1001 is out of range: a number from 0 to 1000", lambda: NEFTune(1001)),
    "alpha in quotes": ("alpha='5' is out of range", lambda: NEFTune("5")),  # type: ignore[arg-type]
    "alpha None": ("alpha=None is out of range", lambda: NEFTune(None)),  # type: ignore[arg-type]
    "alpha set negative": ("alpha=-0.5 is out of range", lambda: set_alpha(-0.5)),
    "alpha set NaN": ("alpha=nan is out of range", lambda: set_alpha(math.nan)),
    "alpha set without hooks": ("attached with alpha=0", lambda: set_alpha(5.0, initial=0.0)),
    "sign": ("sign=0 is not known: 1 or -1", lambda: set_sign(0)),
    "no sign of SymNoise": (
        "pass every batch forward twice",
        lambda: attached(distribution="symmetric")(input_ids=IDS),
    ),
    "seed": ("seed=9223372036854775808 is out of range", lambda: NEFTune(5.0, seed=1 << 63)),
    "rank": ("rank=-1 is out of range", lambda: NEFTune(5.0, rank=-1)),
    "stream": ("stream='token' is not known: rank or sample", lambda: NEFTune(5.0, stream="token")),
    "distribution": ("distribution='normal'", lambda: NEFTune(5.0, distribution="normal")),
    "length": ("length='packed' is not known", lambda: NEFTune(5.0, length="packed")),
    "padding has no document": (
        "goes with stream='rank'",
        lambda: NEFTune(5.0, stream="sample", length="padded"),
    ),
    "slices of a padded row": (
        "goes with slices=None",
        lambda: NEFTune(5.0, slices=GROUP, length="padded"),
    ),
    "slices without a rank": ("slices= needs rank=", lambda: NEFTune(5.0, slices=GROUP)),
    "slices that are not described": (
        "describe the slice of every batch",
        lambda: attached(slices=GROUP, rank=0)(input_ids=IDS),
    ),
    "step negative": ("step=-1 is out of range", lambda: set_step(-1)),
    "step that is no whole number": ("step=1.5 is out of range: a whole", lambda: set_step(1.5)),
    "seed that is none": ("seed=0.5 is out of range: a whole", lambda: NEFTune(5.0, seed=0.5)),  # type: ignore[arg-type]
    "step too large": ("step=4294967296 is out of range", lambda: set_step(1 << 32)),
    "micro-step too large": (
        "micro_step=32768",
        lambda: add_noise(torch.zeros(5, 64), documents([5]), RankStream(0, 0, 0, 1 << 15), 5.0),
    ),
    "hidden size too large": (
        "hidden size of 131076",
        lambda: add_noise(torch.zeros(1, 131076), documents([1]), RankStream(0, 0, 0, 0), 5.0),
    ),
    "mask of another shape": (
        r"attention_mask has shape \(2, 11\), input_ids \(2, 12\)",
        lambda: attached()(input_ids=IDS, attention_mask=ONES[:, 1:]),
    ),
    "mask of four dimensions": (
        r"attention_mask has shape \(2, 1, 12, 12\)",
        lambda: attached()(input_ids=IDS, attention_mask=torch.ones(2, 1, 12, 12)),
    ),
    "a mask for each kind of layer": (
        "attention_mask has shape None",
        lambda: attached()(input_ids=IDS, attention_mask={"full_attention": ONES}),
    ),
    "sequence numbers of another shape": (
        r"seq_idx has shape \(24,\)",
        lambda: attached()(input_ids=IDS, seq_idx=torch.zeros(24)),
    ),
    "cumulative lengths too short": (
        "must rise from 0 .* Given 24 tokens and",
        lambda: attached()(input_ids=IDS, cu_seqlens=torch.tensor([0, 12, 23])),
    ),
    "cumulative lengths too long": (
        "must rise from 0 .* Given 24 tokens and",
        lambda: attached()(input_ids=IDS, cu_seqlens=torch.tensor([0, 12, 25])),
    ),
    "cumulative lengths not from 0": (
        "must rise from 0 .* Given 24 tokens and",
        lambda: attached()(input_ids=IDS, cu_seqlens=torch.tensor([1, 12, 24])),
    ),
    "cumulative lengths with an empty document": (
        "a document of length 0 is none",
        lambda: attached()(input_ids=IDS, cu_seqlens=torch.tensor([0, 12, 12, 24])),
    ),
    "a document of length 0": ("A document has 0 tokens", lambda: documents([3, 0, 4])),
    "a document of negative length": ("A document has -2 tokens", lambda: documents([3, -2])),
    "too few document ids": (
        r"holds 2 documents, and documents has shape \(3,\)",
        lambda: documents([3, 4], documents=[1, 2, 3], epochs=[0, 0]),
    ),
    "too many epochs": (
        r"holds 2 documents, and epochs has shape \(1,\)",
        lambda: TokenLayout.from_arguments(
            IDS, documents=torch.tensor([0, 1]), epochs=torch.tensor([0])
        ),
    ),
    "a document id too large": (
        "A number in documents is out of range",
        lambda: documents([3, 4], documents=[1, 1 << 32], epochs=[0, 0]),
    ),
    "a negative epoch": (
        "A number in epochs is out of range",
        lambda: documents([3, 4], documents=[1, 2], epochs=[0, -1]),
    ),
    "no document ids": (
        "needs the document ids",
        lambda: attached(stream="sample")(input_ids=IDS),
    ),
    "described as another batch": ("described with 5 tokens", describe_too_few),
    "embeddings passed by the caller": (
        "call it with input_ids; if it names them otherwise, describe",
        lambda: attached()(input_ids=None, inputs_embeds=torch.zeros(2, 12, 64)),
    ),
    "no embedding": (
        "Linear has no get_input_embeddings",
        lambda: NEFTune(5.0).attach(nn.Linear(2, 2)),
    ),
    "attached twice": ("attached to this model already: remove", attach_twice),
    "entered twice": ("was removed: attach NEFTune to the model again", enter_twice),
    "an encoder and a decoder": (
        "T5ForConditionalGeneration is an encoder and a decoder",
        lambda: NEFTune(5.0).attach(encoder_decoder()),
    ),
    "copies of the model": (
        r"start one process a GPU \(torchrun\)",
        lambda: NEFTune(5.0).attach(nn.DataParallel(Lookup())),
    ),
    "copies of the model, made later": (
        r"start one process a GPU \(torchrun\)",
        lambda: attached()._replicate_for_data_parallel()(input_ids=IDS),  # type: ignore[attr-defined]
    ),
}


def test_a_batch_that_is_looked_up_twice_in_one_forward_is_refused() -> None:
    """As where a wrapper calls its model twice (R-Drop): the second pass would get no noise. Some
    tokens of it may be looked up again, and each pass of the inner model has noise."""

    class Twice(Lookup):
        again = slice(None)

        def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
            first: Tensor = self.embedding(input_ids)
            return first.sum() + self.embedding(input_ids[:, self.again]).sum()

    model = Twice()
    with NEFTune(ALPHA).attach(model) as noise:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="looked the batch up twice in one forward"):
                model(input_ids=IDS)
        model.again = slice(3)
        model(input_ids=IDS)
        model.again = slice(None)
        with torch.no_grad():
            model(input_ids=IDS)
        model.eval()(input_ids=IDS)
        assert noise.num_fired == 3


def test_a_batch_cut_up_by_context_parallel_must_be_described() -> None:
    store, model = torch.distributed.HashStore(), attached()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        ids = torch.zeros(2, 12, dtype=torch.int64)
        refused = pytest.raises(ValueError, match="context_parallel has cut the batch up")
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]), refused:
            model(input_ids=ids)
        model(input_ids=ids)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_one_sentence(name: str) -> None:
    message, act = BAD[name]
    with pytest.raises(ValueError, match=message) as raised:
        act()
    text = str(raised.value)
    assert "\n" not in text and text.endswith(".")
