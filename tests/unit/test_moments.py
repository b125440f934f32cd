"""Adam's moments in bfloat16 and in 8 bits: the update is AdamW's, what is kept is what it should
be, and neither depends on where an element lies."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from neftune_dist.checkpoint import flat
from neftune_dist.checkpoint.host_copy import HostCopy
from neftune_dist.config import OptimConfig
from neftune_dist.engine.base import FlatShard
from neftune_dist.optim import adamw_low_precision
from neftune_dist.optim.adamw import (
    MakeOptimizer,
    initialize_state,
    moments,
    precision_of,
    set_updates,
    state_bytes,
)
from neftune_dist.optim.param_slice import STATE_NAMES, ParamSlice
from neftune_dist.optim.quantized_state import BLOCK, QuantizedMoment
from neftune_dist.optim.rounding import draw_words, round_into
from tests.support import moment_updates

CPU = torch.device("cpu")
NUMEL = 5000  # no multiple of a block; quantised


def words(seed: int, update: int, name: str, first: int, n: int) -> Tensor:
    """`draw_words`, as numbers from 0 to 2^32 - 1 (n,)."""
    counter, out, spare = torch.arange(n, dtype=torch.int32), *torch.empty(2, n, dtype=torch.int32)
    return draw_words(seed, update, name, first, counter, out, spare).to(torch.int64) % 2**32


class Training:
    """A parameter `w` trained as shards that end at `cuts`, all in one flat tensor or in many."""

    def __init__(self, states: str, cuts: list[int], together: bool = False, seed: int = 3) -> None:
        draw = torch.Generator().manual_seed(0)
        whole = torch.randn(NUMEL, generator=draw)
        self.gradients = [torch.randn(NUMEL, generator=draw) * 1e-2 for _ in range(6)]
        ends = [0, *cuts, NUMEL]
        ranges = list(itertools.pairwise(ends))
        if together:  # one after another, and something else before them
            flat_one = torch.nn.Parameter(torch.cat([torch.ones(7), whole]))
            self.tensors = [flat_one] * len(ranges)
            self.parts = [slice(7 + a, 7 + b) for a, b in ranges]
        else:
            self.tensors = [torch.nn.Parameter(whole[a:b].clone()) for a, b in ranges]
            self.parts = [slice(0, b - a) for a, b in ranges]
        self.ranges = ranges
        self.param_slices = [
            ParamSlice(tensor, part, "w", a, NUMEL)
            for tensor, part, (a, _) in zip(self.tensors, self.parts, ranges, strict=True)
        ]
        config = OptimConfig(learning_rate=1e-2, weight_decay=0.1, states=states)
        distinct = list(dict.fromkeys(self.tensors))
        self.optimizer = MakeOptimizer(config, seed)([("w", t) for t in distinct], {"w": (50, 100)})
        initialize_state(self.optimizer, distinct, self.param_slices)

    def step(self, number: int) -> None:
        for tensor in self.tensors:
            tensor.grad = torch.zeros_like(tensor)
        for tensor, part, (a, b) in zip(self.tensors, self.parts, self.ranges, strict=True):
            assert tensor.grad is not None
            tensor.grad[part] = self.gradients[number][a:b]
        self.optimizer.step()

    def run(self, numbers: range = range(6)) -> Training:
        for number in numbers:
            self.step(number)
        return self

    def values(self) -> dict[str, Tensor]:
        """The whole parameter and its moments (NUMEL,)."""
        found = [t.detach()[p] for t, p in zip(self.tensors, self.parts, strict=True)]
        kept = [moments(self.optimizer, param_slice) for param_slice in self.param_slices]
        return {
            "w": torch.cat(found),
            **{k: torch.cat([state[k][:].float() for state in kept]) for k in STATE_NAMES},
        }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(("states", "bound"), [("bf16", 0.01), ("8bit", 0.1)])
def test_the_update_is_adamws(states: str, bound: float) -> None:
    """The first is made before anything is rounded; later ones err by the moments' precision.
    Measured, of the way that six steps go: 0.2 % and 3 %."""
    ours, theirs = Training(states, []), Training("fp32", [])
    start = ours.values()["w"]
    for training in (ours, theirs):
        training.step(0)
    torch.testing.assert_close(ours.values()["w"], theirs.values()["w"], rtol=1e-6, atol=1e-7)
    for training in (ours, theirs):
        training.run(range(1, 6))
    one, other = ours.values()["w"], theirs.values()["w"]
    assert float((one - other).norm() / (other - start).norm()) < bound
    assert not torch.equal(one, other)


def test_a_small_tensor_keeps_float32_where_others_have_8_bits() -> None:
    values, results = torch.linspace(-1, 1, 100), []
    for states in ("8bit", "fp32"):
        parameter = torch.nn.Parameter(values.clone())
        param_slice = ParamSlice(parameter, slice(0, 100), "norm", 0, 100)
        make = MakeOptimizer(OptimConfig(learning_rate=1e-2, states=states, weight_decay=0.1))
        optimizer = make([("norm", parameter)], {"norm": (10, 10)})
        initialize_state(optimizer, [parameter], [param_slice])
        for step in range(20):
            parameter.grad = torch.sin(values * (step + 1))
            optimizer.step()
        results.append([parameter.detach(), *moments(optimizer, param_slice).values()])
        assert precision_of(moments(optimizer, param_slice)["exp_avg"]) == "float32"
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("together", [False, True])
def test_shards_and_chunks_change_no_bit(
    states: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 8 bits they end where blocks do; elsewhere a block has two scales."""
    whole = Training(states, []).run().values()
    monkeypatch.setattr(adamw_low_precision, "_CHUNK", 2 * BLOCK)
    cuts = [1001, 1002, 3333] if states == "bf16" else [4 * BLOCK, 5 * BLOCK, 16 * BLOCK]
    parts = Training(states, cuts, together).run().values()
    assert torch.equal(parts["w"], whole["w"])
    assert equal(parts, whole)


@pytest.mark.parametrize("case", ["an odd start", "a start within a block"])
@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_chunks_of_a_slice_that_starts_within_a_block_change_no_bit(
    states: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = moment_updates.run(states, moment_updates.CASES[case])
    monkeypatch.setattr(adamw_low_precision, "_CHUNK", 2 * BLOCK)
    moment_updates.assert_same_bits(moment_updates.run(states, moment_updates.CASES[case]), whole)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
@pytest.mark.parametrize("cuts", [[], [777, 4000]])
def test_through_a_checkpoint_training_goes_on_to_the_bit(
    states: str, cuts: list[int], tmp_path: Path
) -> None:
    through = Training(states, cuts).run().values()
    first, second = Training(states, cuts).run(range(3)), Training(states, cuts)

    def shards(training: Training) -> list[FlatShard]:
        return [
            FlatShard(kind, "w", param_slice.start, moment, NUMEL)
            for param_slice in training.param_slices
            for kind, moment in moments(training.optimizer, param_slice).items()
        ]

    flat.write(tmp_path, shards(first))
    flat.Reader(tmp_path, alone=True).read(shards(second))
    for ours, theirs in zip(second.tensors, first.tensors, strict=True):
        ours.data.copy_(theirs.data)
    set_updates(second.optimizer, 3)
    assert equal(second.run(range(3, 6)).values(), through)


@pytest.mark.parametrize("states", ["bf16", "8bit"])
def test_a_skipped_update_changes_nothing(states: str) -> None:
    training = Training(states, []).run(range(2))
    before = training.values()
    training.optimizer.found_inf = torch.ones(())
    training.step(2)
    assert equal(training.values(), before)
    training.optimizer.found_inf = torch.zeros(())
    expected = Training(states, []).run(range(3)).values()
    training.step(2)
    assert equal(training.values(), expected)


def test_the_seed_decides_and_torchs_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    runs = [Training("bf16", [], seed=seed).run().values() for seed in (3, 3, 4)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("states", ["fp32", "bf16", "8bit"])
def test_state_bytes_are_what_the_moments_take(states: str) -> None:
    training = Training(states, [])
    kept = moments(training.optimizer, training.param_slices[0]).values()
    padding = 2 * (-NUMEL % BLOCK) if states == "8bit" else 0  # the last block is kept whole
    assert sum(moment.nbytes for moment in kept) == padding + state_bytes(
        OptimConfig(states=states), NUMEL
    )
    assert state_bytes(OptimConfig(states="8bit"), 100) == 800


# Rounding to bfloat16.


def rounded(values: Tensor, update: int) -> Tensor:
    out, n = torch.empty(len(values), dtype=torch.bfloat16), len(values)
    bits = words(0, update, "w", 0, n).to(torch.int32)
    round_into(out, values, bits, update % 2, torch.empty(n, dtype=torch.int32))
    return out.float()


def test_rounding_is_right_on_average_and_never_further_than_the_next() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    lower = (values.view(torch.int32) & -0x10000).view(torch.float32)
    upper = (((values.view(torch.int32) >> 16) + 1) << 16).view(torch.float32)
    total, number = torch.zeros(1000, dtype=torch.float64), 2000
    for update in range(number):
        result = rounded(values, update)
        assert bool(((result == lower) | (result == upper)).all())
        total += result
    width = (upper - lower).double()
    # A mean of 2000 draws between neighbours: standard deviation at most 0.5 / sqrt(2000) widths.
    errors = (total / number - values) / width
    assert float(errors.abs().max()) < 5 * 0.5 / math.sqrt(number)
    assert abs(float(errors.mean())) < 5 * 0.5 / math.sqrt(number * 1000)


def test_a_half_of_a_word_is_the_carry() -> None:
    """The low half of a word decides for the first moment, the high half for the second."""
    words, out = torch.tensor([0xFFFF], dtype=torch.int32), torch.empty(1, dtype=torch.bfloat16)
    between = torch.tensor([0x3F800001], dtype=torch.int32).view(torch.float32)  # above 1.0
    found = []
    for half in (0, 1):
        round_into(out, between, words, half, torch.empty(1, dtype=torch.int32))
        found.append(float(out))
    assert found == [1.0078125, 1.0]


def test_the_two_moments_are_rounded_by_two_halves_of_a_word() -> None:
    """Of one value, which both moments have under a gradient of 1 and equal betas."""
    parameter = torch.nn.Parameter(torch.zeros(NUMEL))
    param_slice = ParamSlice(parameter, slice(0, NUMEL), "w", 0, NUMEL)
    make = MakeOptimizer(OptimConfig(states="bf16", beta1=0.9, beta2=0.9))
    optimizer = make([("w", parameter)], {"w": (50, 100)})
    initialize_state(optimizer, [parameter], [param_slice])
    parameter.grad = torch.ones(NUMEL)
    optimizer.step()
    first, second = (moment[:].float() for moment in moments(optimizer, param_slice).values())
    assert set(first.tolist()) == set(second.tolist()) and len(set(first.tolist())) == 2
    # Independent halves differ where one is rounded up and the other down: 2 p (1 - p) of them.
    up = float((first == first.max()).double().mean())
    expected = 2 * up * (1 - up)
    differing = float((first != second).double().mean())
    assert abs(differing - expected) < 5 * math.sqrt(expected / NUMEL)


def test_rounding_keeps_values_that_bfloat16_holds() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-120, math.inf, -math.inf, 3e38])
    exact = exact.bfloat16().float()
    for update in range(50):
        result = rounded(exact, update)
        assert torch.equal(result.view(torch.int32), exact.view(torch.int32))
    assert bool(rounded(torch.tensor([math.nan]), 0).isnan())


def test_the_second_moment_decays() -> None:
    """Without gradients, as 0.999 does: rounded to the nearest it would never change."""
    training = Training("bf16", []).run(range(1))
    before = training.values()["exp_avg_sq"]
    stuck = (before * 0.999).bfloat16().float()
    assert torch.equal(stuck, before)
    training.gradients[1].zero_()
    for _ in range(300):
        training.step(1)
    after = training.values()["exp_avg_sq"]
    assert float(after.double().sum() / before.double().sum()) == pytest.approx(
        0.999**300, rel=5e-3
    )


# The words.


def streams() -> list[Tensor]:
    n = 1 << 16
    return [
        words(0, 1, "a", 0, n),
        words(0, 2, "a", 0, n),
        words(1, 1, "a", 0, n),
        words(0, 1, "b", 0, n),
        words(0, 1, "a", n, n),
        words(0, 1, "a", 2**32, n),
        words(0, 1, "a", 2**31 - n // 2, n),
        words(2**63 - 1, 2**24, "model.layers.11.mlp.down_proj.weight", 10**9, n),
    ]


def test_words_are_those_of_every_run_before() -> None:
    """Other words would round a resumed run otherwise than before."""
    assert words(3, 7, "w", 2**32 + 5, 3).tolist() == [1549615531, 3864210239, 4040709487]


def test_words_are_even() -> None:
    """Chi-square of each of their bytes, alone and as pairs of neighbours."""
    for stream in streams():
        for shift in (0, 8, 16, 24):
            byte = (stream >> shift) & 255
            counts = byte.bincount(minlength=256).double()
            assert 150 < float(((counts - len(byte) / 256) ** 2).sum() / (len(byte) / 256)) < 380
            pairs = (byte[1:] >> 4) * 16 + (byte[:-1] >> 4)
            counts = pairs.bincount(minlength=256).double()
            mean = len(pairs) / 256
            assert 150 < float(((counts - mean) ** 2).sum() / mean) < 380


def test_words_are_unrelated_between_streams_halves_and_neighbours() -> None:
    """Correlations of 65536 draws: standard deviation 1 / 256."""
    found = streams()
    halves = [half.double() for word in found for half in (word & 0xFFFF, word >> 16)]
    table = torch.corrcoef(torch.stack(halves)) - torch.eye(len(halves))
    assert float(table.abs().max()) < 5 / 256
    for half in halves:
        for lag in (1, 2, 64, 576, 4096):
            pair = torch.stack([half[lag:], half[:-lag]])
            assert abs(float(torch.corrcoef(pair)[0, 1])) < 5.5 / 256
    for one, other in itertools.combinations(found, 2):
        # Two sets of 2^16 random words share one word in 2^16: one, on average.
        assert len(torch.cat([one.unique(), other.unique()]).unique()) > 2 * (1 << 16) - 30


def test_a_words_bits_follow_each_bit_of_the_position() -> None:
    n, base = 1 << 14, words(0, 1, "a", 0, 1 << 14)
    for bit in (0, 1, 7, 13, 20, 31):
        inside = base[torch.arange(n) ^ (1 << (bit % 14))]
        other = inside if bit < 14 else words(0, 1, "a", 1 << bit, n)
        changed = torch.stack([((base ^ other) >> i) & 1 for i in range(32)]).double().mean(1)
        assert float((changed - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(n)


def test_a_word_belongs_to_its_position() -> None:
    whole = words(0, 1, "a", 2**31 - 100, 1000)
    for first in (0, 1, 99, 500):
        assert torch.equal(words(0, 1, "a", 2**31 - 100 + first, 10), whole[first : first + 10])


# Quantized moments.


def hard(n: int) -> dict[str, Tensor]:
    """Values (n,) that could go wrong."""
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(n, generator=draw)
    spread = noise * torch.exp(6 * torch.randn(n, generator=draw))
    lone = torch.zeros(n)
    lone[::97] = -3.7
    halves = 1 + torch.arange(n) % 40 / 32  # on the codes and half-way between them
    return {
        "normal": noise,
        "spread": spread,
        "lone": lone,
        "zero": torch.zeros(n),
        "halves": halves * torch.where(noise > 0, 1.0, -1.0),
        "tiny": noise * 1e-30,
        "least": noise * 2.0**-46,
        "denormal": noise * 1e-42,
        "huge": noise * 1e37,
        "one negative": torch.cat([torch.full((n - 1,), 1e-3), torch.tensor([-1.0])]),
    }


def squares(values: Tensor) -> Tensor:
    return (values.double() ** 2).clamp(max=2.0**126).float()


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("start", [0, 100, 3 * BLOCK])
@pytest.mark.parametrize("kind", hard(1).keys())
def test_writing_values_that_were_read_gives_the_same_codes(
    kind: str, start: int, root: bool
) -> None:
    values = squares(hard(1000)[kind]) if root else hard(1000)[kind]
    first = QuantizedMoment(start, 1000, root, CPU)
    first.copy_(values)
    again = QuantizedMoment(start, 1000, root, CPU)
    again.copy_(first[:])
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.scales, again.scales)
    assert torch.equal(first[:].view(torch.int32), again[:].view(torch.int32))
    # In parts of any size, in any order, as another world size would read them.
    shuffled, random = QuantizedMoment(start, 1000, root, CPU), Random(start)
    cuts = [0, *sorted(random.sample(range(1, 1000), 12)), 1000]
    parts = list(itertools.pairwise(cuts))
    random.shuffle(parts)
    for a, b in parts:
        shuffled.write(a, values[a:b])
        assert torch.equal(first[a:b], first[:][a:b])
    assert torch.equal(first.codes, shuffled.codes)
    assert torch.equal(first.scales, shuffled.scales)


@pytest.mark.parametrize("root", [False, True])
def test_errors_are_half_a_code(root: bool) -> None:
    """Within 2^15 of the block's largest: a 16th of the value, signed; a 32nd of the root."""
    for values in hard(1024).values():
        values = values.clamp(-(2.0**60), 2.0**60)
        blocks = QuantizedMoment(0, 1024, root, CPU)
        blocks.copy_(squares(values) if root else values)
        read = blocks[:].double().sqrt() if root else blocks[:].double()
        exact = squares(values).double().sqrt() if root else values.double()
        scale = exact.abs().view(-1, BLOCK).amax(1).clamp_min(2.0**-46).repeat_interleave(BLOCK)
        bound = exact.abs() * (1 / 32 if root else 1 / 16) * 1.001 + scale * 2.0**-15
        assert bool(((read - exact).abs() <= bound).all())
        near = exact.abs() > scale * 2.0**-15
        error = (read - exact).abs()[near] / exact.abs()[near]
        assert float(error.max() if len(error) else 0) <= (1 / 32 if root else 1 / 16) * 1.001


def test_only_zero_is_a_second_moment_of_zero() -> None:
    """Else a first moment is divided by epsilon alone: a step a thousand times too long."""
    values = torch.full((BLOCK,), 1e-18)
    values[3], values[7] = 1.0, 0.0
    blocks = QuantizedMoment(0, BLOCK, True, CPU)
    blocks.copy_(values)
    assert [int(i) for i in (blocks[:] == 0).nonzero()] == [7]


def test_a_value_that_is_not_finite_spoils_its_block_only() -> None:
    values = torch.ones(2 * BLOCK)
    for bad in (math.inf, math.nan):
        values[1] = bad
        for root in (False, True):
            blocks = QuantizedMoment(0, 2 * BLOCK, root, CPU)
            blocks.copy_(values)
            assert bool(blocks[:].isfinite().all())
            assert torch.equal(blocks[BLOCK:], torch.ones(BLOCK))


def test_a_copy_on_the_host_is_the_same_and_of_the_same_size() -> None:
    """Tensors and blocks, one after the other in one mapping; a later copy replaces the first."""
    blocks, plain = QuantizedMoment(100, 1000, False, CPU), torch.randn(777)
    blocks.copy_(hard(1000)["spread"])
    shards = [
        FlatShard("master", "w", 3, plain[:50], 777),
        FlatShard("exp_avg", "w", 100, blocks, 5000),
        FlatShard("exp_avg_sq", "w", 3, plain[50:].to(torch.bfloat16), 777),
    ]
    copy = HostCopy(shards, CPU)
    for change in (0.0, 1.0):
        plain.add_(change)
        blocks.copy_(blocks[:] + change)
        found = [shard.tensor for shard in copy.copy(shards)]
        for one, shard in zip(found, shards, strict=True):
            assert torch.equal(one[:], shard.tensor[:])
            assert one.nbytes == shard.tensor.nbytes
            assert one.dtype == shard.tensor.dtype
    assert found[1].nbytes == 5 * (BLOCK + 4)
