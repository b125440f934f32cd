"""The Triton kernel adds the CPU's bits: held to `law.draw` under Triton's interpreter.

Triton chooses between compiling and interpreting once, when it is imported: the kernel runs in a
process of its own, so that no other test meets the interpreter. Tensors go there and back in shared
memory, as torch sends them, so what the kernel writes is seen here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from neftune_dist.noise.law import RankStream, SampleStream, draw, scales
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise_
from neftune_dist.noise.philox import philox4x32, philox4x32_
from tests.support.interpreter import DEADLINE_SECONDS
from tests.support.philox_vectors import VECTORS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernel = pytest.importorskip("neftune_dist.noise.kernel")

DISTRIBUTIONS = ["uniform", "gaussian", "symmetric"]
ROWS, COLUMNS = 2, 8
# Documents, and padding between them, of the ROWS x COLUMNS tokens.
PIECES = [(True, 1), (True, 4), (False, 2), (True, 6), (False, 3)]
# Every word at its largest, and a seed of 63 bits.
LAST = (1 << 32) - 1
STREAMS: list[RankStream | SampleStream] = [
    RankStream(5, 0, 1, 2),
    RankStream((1 << 63) - 1, LAST, LAST, (1 << 15) - 1),
    SampleStream((1 << 31) + 7),
]
# What a kernel that computes x + 0 would change: a negative zero, NaN with a payload, signalling.
ODD_BITS = {
    torch.float32: [0x80000000, 0x7FC12345, 0x7F812345, 0xFF800000],
    torch.float16: [0x8000, 0x7E12, 0x7C12, 0xFC00],
    torch.bfloat16: [0x8000, 0x7FC5, 0x7F85, 0xFF80],
}
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Operator:
    """add(x, scale, words, seed, distribution) -> squares; and how it rounds float32 to a dtype."""

    add: Callable[..., Tensor]
    rounded: Callable[[Tensor, torch.dtype], Tensor]


@pytest.fixture(params=["kernel", "cpu"])
def operator(request: pytest.FixtureRequest, interpreter: ProcessPoolExecutor) -> Operator:
    """Once as the interpreted kernel, and once as the CPU has it."""
    if request.param == "cpu":
        return Operator(_on_cpu, lambda wide, dtype: wide.to(dtype))
    return Operator(
        lambda *arguments: interpreter.submit(_launch, *arguments).result(DEADLINE_SECONDS),
        lambda wide, dtype: _truncated(wide) if dtype == torch.bfloat16 else wide.to(dtype),
    )


def _on_cpu(
    x: Tensor, scale: Tensor, words: Sequence[Tensor], seed: int, distribution: str
) -> Tensor:
    return add_noise_(x, scale, *words, seed, distribution)


def _launch(*arguments: Any) -> Tensor:
    """In the other process."""
    return kernel.launch(*arguments)


def _truncated(wide: Tensor) -> Tensor:
    """float32 to bfloat16 as Triton's interpreter has it: it drops the low bits, where a GPU rounds
    to nearest even."""
    return (wide.view(torch.int32) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


@triton.jit
def _philox(counters, key0, key1, words, NUMBER: tl.constexpr):
    index = tl.arange(0, NUMBER)
    c0 = tl.load(counters + index).to(tl.uint32)
    c1 = tl.load(counters + NUMBER + index).to(tl.uint32)
    c2 = tl.load(counters + 2 * NUMBER + index).to(tl.uint32)
    c3 = tl.load(counters + 3 * NUMBER + index).to(tl.uint32)
    w0, w1, w2, w3 = kernel.philox(c0, c1, c2, c3, key0.to(tl.uint32), key1.to(tl.uint32))
    tl.store(words + index, w0.to(tl.int64))
    tl.store(words + NUMBER + index, w1.to(tl.int64))
    tl.store(words + 2 * NUMBER + index, w2.to(tl.int64))
    tl.store(words + 3 * NUMBER + index, w3.to(tl.int64))


def philox_of_kernel(counters: Tensor, key: tuple[int, int]) -> Tensor:
    """In the other process: the words of counters int64 (4, number), a power of 2."""
    words = torch.empty_like(counters)
    _philox[(1,)](counters, *key, words, NUMBER=counters.shape[1])
    return words


def test_the_interpreter_stays_in_its_process(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(os.getenv, "TRITON_INTERPRET").result(DEADLINE_SECONDS) == "1"
    assert "TRITON_INTERPRET" not in os.environ
    assert isinstance(_philox, triton.runtime.JITFunction)


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_three_generators_are_one(
    counter: tuple[int, ...],
    key: tuple[int, int],
    expected: tuple[int, ...],
    interpreter: ProcessPoolExecutor,
) -> None:
    """The kernel's Philox, the plain one and the one in place: the published words, and on other
    counters each other's."""
    counters = torch.randint(1 << 32, (4, 64), generator=torch.Generator().manual_seed(0))
    counters[:, 0] = torch.tensor(counter)
    words = interpreter.submit(philox_of_kernel, counters, key).result(DEADLINE_SECONDS)
    assert words[:, 0].tolist() == list(expected)
    c0, c1, c2, c3 = counters.unbind()
    assert torch.equal(torch.stack(philox4x32((c0, c1, c2, c3), key)), words)
    assert torch.equal(
        torch.stack(philox4x32_([c0, c1, c2, c3, *torch.empty(2, *c0.shape).long()], key)), words
    )


def pieces_layout() -> TokenLayout:
    """PIECES as a layout, with document ids and epochs up to the largest."""
    real = torch.tensor([real for real, length in PIECES for _ in range(length)])
    number = [i for i, (_, length) in enumerate(PIECES) for _ in range(length)]
    ids = torch.zeros(1, ROWS * COLUMNS, dtype=torch.int64)
    documents = torch.tensor([0, LAST, 12345])
    return TokenLayout.from_arguments(
        ids,
        attention_mask=torch.where(real, 1 + torch.tensor(number), 0)[None],
        documents=documents,
        epochs=documents.flip(0),
    )


def embeddings(dtype: torch.dtype, hidden: int) -> Tensor:
    """(ROWS, COLUMNS, hidden): of the size that embeddings have, and odd bits at the padding."""
    x = 0.1 * torch.randn(ROWS, COLUMNS, hidden, generator=torch.Generator().manual_seed(hidden))
    x = x.to(dtype)
    padding = (pieces_layout().length == 0).view(ROWS, COLUMNS)
    odd = torch.tensor(ODD_BITS[dtype]).to(INTEGERS[dtype])
    bits(x)[padding] = odd.repeat(-(-hidden // 4))[:hidden]
    return x


def bits(x: Tensor) -> Tensor:
    """x as integers: NaN equals itself, and -0.0 is not 0.0."""
    return x.view(INTEGERS[x.dtype])


def law_of(
    x: Tensor, stream: RankStream | SampleStream, distribution: str
) -> tuple[Tensor, Tensor]:
    """(x + noise in float32, where noise is due) from the reference, of x's shape."""
    layout, hidden = pieces_layout(), x.shape[-1]
    noise = draw(stream, layout, hidden, distribution) * scales(layout, hidden, 5.0)[:, None]
    due = (layout.length > 0).view(ROWS, COLUMNS, 1).expand(x.shape)
    return x.float() + noise.view(x.shape), due


def assert_same_bits(actual: Tensor, expected: Tensor, distribution: str) -> None:
    """Equal; but two libraries' logarithms may differ in their last bit, and so about one gaussian
    draw in 2^28."""
    apart = (bits(actual).to(torch.int64) - bits(expected).to(torch.int64)).abs()
    if distribution == "gaussian":
        assert int((apart > 0).sum()) <= 1 and int(apart.max()) <= 1
    else:
        assert not apart.any()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", list(ODD_BITS))
@pytest.mark.parametrize("hidden", [64, 250, 4100])
def test_bits_are_those_of_the_law(
    distribution: str, dtype: torch.dtype, hidden: int, operator: Operator
) -> None:
    """Whole blocks, a last one that is cut, and more blocks than a program holds at a time; padding
    keeps every bit; the squared norms are those of what was added."""
    layout = pieces_layout()
    for stream in STREAMS if (hidden, dtype) == (64, torch.float32) else STREAMS[1:2]:
        before = embeddings(dtype, hidden)
        wide, due = law_of(before, stream, distribution)
        expected = torch.where(due, operator.rounded(wide, dtype), before)
        x = before.clone()
        squares = operator.add(
            x, scales(layout, hidden, 5.0), stream.words(layout), stream.seed, distribution
        )
        assert_same_bits(x, expected, distribution)
        added = torch.where(due, expected.double() - before.double(), 0.0)
        exact = added.square().sum(-1).flatten()
        assert torch.allclose(squares.double(), exact, rtol=1e-6, atol=0)


# A storage, and its (ROWS, COLUMNS, 64) view.
VIEWS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "columns first": lambda: viewed(torch.randn(COLUMNS, ROWS, 64), lambda s: s.transpose(0, 1)),
    "channels first": lambda: viewed(torch.randn(64, ROWS, COLUMNS), lambda s: s.permute(1, 2, 0)),
    "rows of a wider batch": lambda: viewed(
        torch.randn(ROWS, COLUMNS + 3, 64), lambda s: s[:, 2 : COLUMNS + 2]
    ),
    "every other channel": lambda: viewed(
        torch.randn(ROWS, COLUMNS, 130), lambda s: s[..., 1:-1:2]
    ),
    "gaps everywhere": lambda: viewed(
        torch.randn(2 * ROWS, 3 * COLUMNS, 3 * 64), lambda s: s[1::2, ::3, 2::3]
    ),
}


def viewed(storage: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return storage, view(storage)


@pytest.mark.parametrize("name", VIEWS)
def test_any_strides_give_the_same_bits(name: str, operator: Operator) -> None:
    """The same bits wherever a channel lies, and what lies between is left alone."""
    torch.manual_seed(0)
    storage, x = VIEWS[name]()
    assert x.shape == (ROWS, COLUMNS, 64) and not x.is_contiguous()
    stream, layout = STREAMS[0], pieces_layout()
    wide, due = law_of(x, stream, "uniform")
    expected = storage.clone()
    expected.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(torch.where(due, wide, x))
    operator.add(x, scales(layout, 64, 5.0), stream.words(layout), stream.seed, "uniform")
    assert torch.equal(bits(storage), bits(expected))


def test_counters_and_scales_of_any_stride_give_the_same_bits(operator: Operator) -> None:
    """Counters two apart in memory, and one scale for all tokens: what an expanded tensor is."""
    stream, layout = STREAMS[2], pieces_layout()
    words = [torch.stack((word, word + 1), 1)[:, 0] for word in stream.words(layout)]
    x = torch.zeros(ROWS, COLUMNS, 64)
    operator.add(
        x, torch.tensor(0.1).expand(layout.num_tokens), tuple(words), stream.seed, "uniform"
    )
    assert torch.equal(x.flatten(0, 1), draw(stream, layout, 64) * torch.tensor(0.1))


def test_no_tokens_give_no_noise(operator: Operator) -> None:
    layout = TokenLayout.padding(0)
    words, scale = RankStream(0, 0, 0, 0).words(layout), scales(layout, 64, 5.0)
    for x in (torch.zeros(2, 0, 64), torch.zeros(0, 3, 64)):
        assert operator.add(x, scale, words, 0, "uniform").shape == (0,)


# Strides of a (2, 2, 64) view whose last element lies beyond 2^31.
FAR = {
    "rows": ((1 << 31) + 12345, 64, 1),
    "columns": (64, (1 << 31) + 12345, 1),
    "one long row": (1 << 31, 1 << 30, 1),
    "channels": (64, 1, 1 << 26),
}


def far_apart(name: str, add: Callable[..., Tensor]) -> Tensor:
    """What (2, 2, 64) zeros became that stand FAR apart. The gigabytes between are never touched,
    so never allocated."""
    stride = FAR[name]
    last = stride[0] + stride[1] + 63 * stride[2]
    assert last >= 1 << 31
    x = torch.empty(last + 1, dtype=torch.float16).as_strided((2, 2, 64), stride).zero_()
    layout, stream = TokenLayout.from_lengths(torch.tensor([3, 1])), RankStream(5, 0, 0, 0)
    add(x, scales(layout, 64, 5.0), stream.words(layout), stream.seed, "uniform")
    return x.clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("name", FAR)
def test_offsets_past_2_31_give_the_same_bits(name: str, interpreter: ProcessPoolExecutor) -> None:
    layout, stream = TokenLayout.from_lengths(torch.tensor([3, 1])), RankStream(5, 0, 0, 0)
    noise = draw(stream, layout, 64) * scales(layout, 64, 5.0)[:, None]
    expected = noise.to(torch.float16).view(2, 2, 64)
    assert torch.equal(far_apart(name, _on_cpu), expected)
    interpreted = interpreter.submit(far_apart, name, _launch).result(DEADLINE_SECONDS)
    assert torch.equal(interpreted, expected)
