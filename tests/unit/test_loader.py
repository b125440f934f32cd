"""Micro-batches against what a plain loop over the documents gives; the loader against itself."""

from __future__ import annotations

import itertools
import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neftune_dist.config import Config, DataConfig, ModelConfig, TrainConfig
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.documents import Documents
from neftune_dist.data.loader import BatchLayout, Loader, MicroBatch, collate, evaluation_batches
from neftune_dist.data.sampler import make_sampler
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.training.loop import dropout_seed
from neftune_dist.training.noise import token_layout

QUADRATIC_TOKENS = 2e4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Dataset:
    cache = tmp_path_factory.mktemp("cache")
    return prepare(DataConfig(num_held_out=30, max_length=64, cache_dir=str(cache)), tiny_tokenizer)


def loader(
    dataset: Dataset, *, packing: bool = True, rank: int = 0, world_size: int = 1, **train: Any
) -> Loader:
    train = {"global_batch_size": 24, "micro_batch_tokens": 256, "max_steps": 200, **train}
    config = Config(data=DataConfig(packing=packing), train=TrainConfig(**train))
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    return Loader(dataset.train, sampler, BatchLayout(config, rank, world_size, QUADRATIC_TOKENS))


def same(one: Any, two: Any) -> bool:
    """Whether two batches are equal in every field, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, f), getattr(two, f)) for f in one.__dataclass_fields__)
    return bool(one == two)


def naive(documents: Documents, indices: list[int]) -> list[tuple[int, int, int]]:
    """(document, position that predicts, target) of every learned token, one by one."""
    found = []
    for index in indices:
        ids, supervised = documents[index]
        for t in range(len(ids)):
            if supervised[t]:
                found.append((index, t - 1, int(ids[t])))
    return found


def read_back(batch: MicroBatch) -> list[tuple[int, int, int]]:
    """The same, from the tensors: whose token stands at each position, and where in it."""
    owners = []
    if batch.attention_mask is None:
        for index, length in zip(batch.documents.tolist(), batch.lengths.tolist(), strict=True):
            owners += [index] * length
    else:
        rows = batch.attention_mask[: len(batch.documents)]
        for index, row in zip(batch.documents.tolist(), rows, strict=True):
            owners += [index if real else -1 for real in row.tolist()]
    places = batch.position_ids.flatten().tolist()
    return [
        (owners[position], places[position], target)
        for position, target in zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    ]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("indices", [[0], [5, 3, 9, 4], list(range(40))])
def test_collate_against_a_plain_loop(dataset: Dataset, packing: bool, indices: list[int]) -> None:
    batch = collate(dataset.train, np.array(indices), np.full(len(indices), 2), packing)
    lengths = [int(dataset.train.lengths[i]) for i in indices]
    width = sum(lengths) if packing else max(lengths)
    assert (
        batch.input_ids.shape == batch.position_ids.shape == (1 if packing else len(indices), width)
    )
    assert (batch.attention_mask is None) == packing
    rows = (
        batch.input_ids[0].split(lengths)
        if packing
        else [row[:length] for row, length in zip(batch.input_ids, lengths, strict=True)]
    )
    places = (
        batch.position_ids[0].split(lengths)
        if packing
        else [row[:length] for row, length in zip(batch.position_ids, lengths, strict=True)]
    )
    for index, row, place in zip(indices, rows, places, strict=True):
        assert row.tolist() == dataset.train[index][0].tolist()
        assert place.tolist() == list(range(len(row)))
    if batch.attention_mask is not None:
        assert batch.attention_mask.sum(1).tolist() == lengths
        assert (batch.attention_mask.diff(dim=1) <= 0).all()  # padded on the right
        assert batch.input_ids[batch.attention_mask == 0].eq(0).all()
    assert read_back(batch) == naive(dataset.train, indices)
    assert batch.lengths.tolist() == list(batch.document_lengths) == lengths
    if batch.cu_seqlens is not None:
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert (batch.cu_seqlens is not None) == packing
    assert batch.documents.tolist() == indices
    assert batch.epochs.tolist() == [2] * len(indices)
    for tensor in (batch.input_ids, batch.position_ids, batch.positions, batch.targets):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("packing", [True, False])
def test_packed_and_padded_learn_the_same(dataset: Dataset, packing: bool) -> None:
    indices = np.arange(40)
    batch = collate(dataset.train, indices, np.zeros(40, np.int64), packing)
    flat = batch.input_ids.flatten()
    # The token after the one that predicts is the target, and never a document's first.
    assert torch.equal(flat[batch.positions + 1], batch.targets)
    assert (batch.position_ids.flatten()[batch.positions + 1] > 0).all()
    assert len(batch.targets) == dataset.train.num_supervised[indices].sum()


@pytest.mark.parametrize("packing", [True, False])
def test_an_empty_micro_batch(dataset: Dataset, packing: bool) -> None:
    """Two tokens to run the model on, nothing to learn, no document to draw noise for."""
    none = np.zeros(0, np.int64)
    batch = collate(dataset.train, none, none, packing)
    assert batch.input_ids.tolist() == [[0, 0]]
    assert batch.position_ids.tolist() == [[0, 1]]
    assert batch.document_lengths == (2,)
    assert (batch.cu_seqlens is not None) == packing
    if batch.cu_seqlens is not None:
        assert batch.cu_seqlens.tolist() == [0, 2]
    for tensor in (batch.positions, batch.targets, batch.lengths, batch.documents, batch.epochs):
        assert tensor.shape == (0,) and tensor.dtype == torch.int64


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 3, 30])
def test_the_ranks_together_train_on_the_step(
    dataset: Dataset, packing: bool, world_size: int
) -> None:
    """Any layout trains on the sampler's documents, and all ranks report the same totals."""
    epoch, rest = divmod(len(dataset.train), 24)
    assert rest  # the last step of an epoch has fewer documents
    for step, number in ((0, 24), (epoch, rest), (epoch + 1, 24)):
        batches = [
            loader(dataset, packing=packing, rank=rank, world_size=world_size).step(step)
            for rank in range(world_size)
        ]
        indices, epochs = loader(dataset).sampler.documents(step)
        micro = [m for b in batches for m in b.micro_batches]
        seen = [
            (d, e)
            for m in micro
            for d, e in zip(m.documents.tolist(), m.epochs.tolist(), strict=True)
        ]
        assert sorted(seen) == sorted(zip(indices.tolist(), epochs.tolist(), strict=True))
        learned = [t for m in micro for t in read_back(m)]
        assert sorted(learned) == sorted(naive(dataset.train, indices.tolist()))
        assert {*epochs} == {step // (epoch + 1)}
        assert len({len(b.micro_batches) for b in batches}) == 1
        lengths = dataset.train.lengths[indices]
        for b in batches:
            assert b.num_documents == number
            assert b.num_tokens == lengths.sum()
            assert b.num_supervised_tokens == len(learned)
            assert b.num_computed_tokens == sum(m.input_ids.numel() for m in micro)
            assert b.sum_squared_lengths == sum(int(n) ** 2 for n in lengths)


def test_steps_are_step_by_step_and_resume_is_the_tail(dataset: Dataset) -> None:
    made = loader(dataset, max_steps=12, rank=1, world_size=2)
    whole = list(made.steps(0))
    assert [batch.step for batch in whole] == list(range(12))
    assert all(same(batch, made.step(step)) for step, batch in enumerate(whole))
    for first in (5, 11, 12):
        tail = list(loader(dataset, max_steps=12, rank=1, world_size=2).steps(first))
        assert same(tail, whole[first:])


def test_stopping_early_leaves_no_thread(dataset: Dataset) -> None:
    before = threading.active_count()
    steps = loader(dataset).steps(0)
    assert len(list(itertools.islice(steps, 3))) == 3
    steps.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_two_steps_are_prepared_ahead_and_no_more(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(dataset)
    prepared: queue.Queue[int] = queue.Queue()
    whole = made.step

    def step(number: int) -> Any:
        prepared.put(number)
        return whole(number)

    monkeypatch.setattr(made, "step", step)
    steps = made.steps(7)
    for number in range(7, 10):
        assert next(steps).step == number
        first = 7 if number == 7 else number + 2
        for expected in range(first, number + 3):
            assert prepared.get(timeout=30) == expected
    steps.close()  # type: ignore[attr-defined]
    assert prepared.empty()


def test_stopping_does_not_wait_for_steps_not_begun(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(dataset)
    whole, submit = made.step, ThreadPoolExecutor.submit
    begun, cancelled = threading.Event(), threading.Event()
    prepared = []

    def watched(pool: Any, task: Any, number: int) -> Future[Any]:
        future = submit(pool, task, number)
        if number == 2:
            future.add_done_callback(lambda _: cancelled.set())
        return future

    def step(number: int) -> Any:
        prepared.append(number)
        if number == 1:
            begun.set()
            assert cancelled.wait(30)  # step 2, which comes after this one
        return whole(number)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", watched)
    monkeypatch.setattr(made, "step", step)
    steps = made.steps(0)
    next(steps)
    assert begun.wait(30)
    steps.close()  # type: ignore[attr-defined]
    assert prepared == [0, 1]


def test_batches_for_a_gpu_are_pinned_by_the_thread(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors, and on the rank's own GPU, which a new thread is not on. (No GPU is needed.)"""
    threads: dict[str, torch.device] = {}
    pinned: set[int] = set()

    def set_device(device: torch.device) -> None:
        threads[threading.current_thread().name] = device

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert threads[threading.current_thread().name] == torch.device("cuda", 3)
        copy = tensor.clone()
        pinned.add(id(copy))
        return copy

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    made = loader(dataset, max_steps=3)
    plain = list(made.steps(0))
    assert not pinned and not threads
    made.layout = replace(made.layout, device=torch.device("cuda", 3))
    batches = list(made.steps(0))
    assert same(batches, plain)
    micro = [m for batch in batches for m in batch.micro_batches]
    held_out, indices = dataset.held_out, np.arange(len(dataset.held_out))
    layout = BatchLayout(Config(), 0, 1, QUADRATIC_TOKENS)
    on_gpu = replace(layout, device=torch.device("cuda", 3))
    evaluated = list(evaluation_batches(held_out, indices, on_gpu))
    assert same(evaluated, list(evaluation_batches(held_out, indices, layout)))
    micro += evaluated
    tensors = [t for m in micro for t in vars(m).values() if isinstance(t, torch.Tensor)]
    assert {id(t) for t in tensors} == pinned
    assert threading.current_thread().name not in threads


def test_an_error_while_preparing_reaches_the_loop(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(dataset)
    whole = made.step

    def step(number: int) -> Any:
        if number == 2:
            raise OSError("the disk is gone")
        return whole(number)

    monkeypatch.setattr(made, "step", step)
    steps = made.steps(0)
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 4])
def test_evaluation_takes_each_document_once(
    dataset: Dataset, packing: bool, world_size: int
) -> None:
    config = Config(data=DataConfig(packing=packing), train=TrainConfig(micro_batch_tokens=200))
    indices = np.arange(len(dataset.held_out))
    ranks = [
        list(evaluation_batches(dataset.held_out, indices, layout))
        for layout in (
            BatchLayout(config, r, world_size, QUADRATIC_TOKENS) for r in range(world_size)
        )
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [d for batches in ranks for batch in batches for d in batch.documents.tolist()]
    assert sorted(seen) == indices.tolist()
    assert all(batch.input_ids.numel() <= 200 for batches in ranks for batch in batches)


def test_a_batch_moves_whole(dataset: Dataset) -> None:
    batch = collate(dataset.train, np.arange(3), np.zeros(3, np.int64), False)
    moved = batch.to(torch.device("meta"))
    assert all(t.is_meta for t in vars(moved).values() if isinstance(t, torch.Tensor))
    assert moved.document_lengths == batch.document_lengths


def test_a_batch_that_is_there_is_not_copied(dataset: Dataset) -> None:
    batch = collate(dataset.train, np.arange(3), np.zeros(3, np.int64), True)
    there = batch.to(torch.device("cpu"))
    assert all(value is vars(there)[name] for name, value in vars(batch).items())


def test_the_noise_learns_the_layout_of_a_packed_batch(dataset: Dataset) -> None:
    """From what lies on the device, without asking the host."""
    batch = collate(dataset.train, np.array([4, 2, 9]), np.array([0, 1, 1]), True)
    expected = TokenLayout.from_lengths(
        batch.lengths, documents=batch.documents, epochs=batch.epochs
    )
    assert same(token_layout(batch), expected)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("slices", "multiple"), [(1, 16), (2, 1), (2, 16), (4, 16)])
@pytest.mark.parametrize("chosen", [[4, 2, 9], []])
def test_rows_are_filled_to_a_multiple(
    dataset: Dataset, packing: bool, slices: int, multiple: int, chosen: list[int]
) -> None:
    """What equal slices and float8's tiles need; the filling is padding, to noise and loss."""
    if slices > 1 and not packing:
        pytest.skip("padded rows are not sliced")
    indices = np.array(chosen, np.int64)
    epochs = np.zeros_like(indices)
    plain = collate(dataset.train, indices, epochs, packing)
    batch = collate(dataset.train, indices, epochs, packing, slices, multiple)
    assert batch.input_ids.shape[1] % (slices * multiple) == 0
    assert batch.input_ids.shape[1] - plain.input_ids.shape[1] < slices * max(multiple, 2)
    assert torch.equal(batch.targets, plain.targets)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.positions + 1], batch.targets)
    if packing:
        assert batch.cu_seqlens is not None
        ends = np.cumsum([0, *batch.document_lengths]).tolist()
        ends += [batch.input_ids.numel()] * bool(batch.tail)
        assert batch.cu_seqlens.tolist() == ends
        parts = [batch.slice(i, slices) for i in range(slices)] if slices > 1 else [batch]
        real = [token_layout(part).length > 0 for part in parts]
        assert int(torch.cat(real).sum()) == int(plain.lengths.sum())
        assert not torch.cat(real)[int(plain.lengths.sum()) :].any()
        assert len({len(group) for group in real}) == 1
    else:
        assert int((token_layout(batch).length > 0).sum()) == int(plain.lengths.sum())


@pytest.mark.parametrize("slices", [2, 3, 4])
@pytest.mark.parametrize("chosen", [[4, 2, 9, 0, 7], []])
def test_slices_supervise_the_whole_between_them(
    dataset: Dataset, slices: int, chosen: list[int]
) -> None:
    """Every position once, in the slice that holds its token, counted from the slice's start."""
    indices = np.array(chosen, np.int64)
    whole = collate(dataset.train, indices, np.zeros_like(indices), True, slices)
    size = whole.whole_tokens // slices
    assert size >= 2  # torch.compile would compile again for a dimension of size 1
    found = []
    for i in range(slices):
        part = whole.slice(i, slices)
        assert part.part == (i, slices) and part.input_ids.shape == (1, size)
        assert ((part.positions >= 0) & (part.positions < size)).all()
        found += zip((part.positions + i * size).tolist(), part.targets.tolist(), strict=True)
        for name in ("input_ids", "position_ids", "segment", "token_length"):
            own = getattr(whole, name).flatten()[i * size : (i + 1) * size]
            assert torch.equal(getattr(part, name).flatten(), own), name
    assert found == list(zip(whole.positions.tolist(), whole.targets.tolist(), strict=True))


def test_padding_at_the_end_of_slices_is_a_document_apart(dataset: Dataset) -> None:
    """Attention would mix it into the last document otherwise."""
    index = int(np.flatnonzero(dataset.train.lengths % 2)[0])
    length = int(dataset.train.lengths[index])
    batch = collate(dataset.train, np.array([index]), np.zeros(1, np.int64), True, slices=2)
    assert batch.tail == 1 and batch.whole_tokens == length + 1
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, length, length + 1]
    assert batch.document_lengths == (length,)
    assert batch.token_length.tolist() == [length] * length + [0]


@pytest.mark.parametrize("multiple_of_16", [False, True])
def test_slices_share_the_micro_batches_of_several_ranks_memory(
    dataset: Dataset, multiple_of_16: bool
) -> None:
    """A micro-batch holds the tokens of as many ranks as it has slices, and what they compute is
    counted over all of them, padding included."""
    longest = int(dataset.train.lengths.max())
    config = Config(
        train=TrainConfig(micro_batch_tokens=longest // 2 + 1, global_batch_size=24, max_steps=4),
        model=ModelConfig(float8="tensorwise" if multiple_of_16 else "none"),
    )
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    of_document = dataset.train.lengths[sampler.documents(0)[0]]
    assert of_document.max() > config.train.micro_batch_tokens
    steps = [
        Loader(
            dataset.train, sampler, BatchLayout(config, r, 2, QUADRATIC_TOKENS, part=(i, 2))
        ).step(0)
        for r in range(2)
        for i in range(2)
    ]
    batches = [batch for step in steps for batch in step.micro_batches]
    tokens = [batch.input_ids.numel() for batch in batches]
    assert any(batch.tail for batch in batches)
    assert {step.num_computed_tokens for step in steps} == {sum(tokens)}
    assert steps[0].num_computed_tokens > steps[0].num_tokens == of_document.sum()
    held_out, indices = dataset.held_out, np.arange(len(dataset.held_out))
    evaluated = [
        list(evaluation_batches(held_out, indices, layout))
        for layout in (BatchLayout(config, 0, 1, QUADRATIC_TOKENS, part=(i, 2)) for i in range(2))
    ]
    targets = sum(len(batch.targets) for part in evaluated for batch in part)
    assert targets == held_out.num_supervised.sum()


@pytest.mark.parametrize("packing", [True, False])
def test_float8_fills_the_batches_of_a_run(dataset: Dataset, packing: bool) -> None:
    config = Config(
        data=DataConfig(packing=packing),
        train=TrainConfig(micro_batch_tokens=208, global_batch_size=20, max_steps=2),
        model=ModelConfig(float8="tensorwise"),
    )
    sampler = make_sampler(config.train, len(dataset.train), dataset.content)
    layout = BatchLayout(config, 0, 1, QUADRATIC_TOKENS)
    loader = Loader(dataset.train, sampler, layout)
    batch = loader.step(0)
    computed = sum(micro_batch.input_ids.numel() for micro_batch in batch.micro_batches)
    assert computed == batch.num_computed_tokens
    indices = np.arange(len(dataset.held_out))
    held_out = evaluation_batches(dataset.held_out, indices, layout)
    assert all(
        micro_batch.input_ids.shape[1] % 16 == 0
        for micro_batch in [*batch.micro_batches, *held_out]
    )


def test_tokens_are_read_by_memory_map(dataset: Dataset, tmp_path: Path) -> None:
    assert isinstance(dataset.train[0][0], np.memmap)


@pytest.mark.parametrize("indices", [[], [3], [9, 0, 9, 4]])
def test_documents_are_gathered_in_order(dataset: Dataset, indices: list[int]) -> None:
    found = dataset.train.gather(np.array(indices, np.int64))
    for which, (tokens, dtype) in enumerate(zip(found, (np.int32, np.uint8), strict=True)):
        one_by_one = [dataset.train[i][which].tolist() for i in indices]
        assert tokens.dtype == dtype and type(tokens) is np.ndarray
        assert tokens.tolist() == list(itertools.chain(*one_by_one))


def test_dropout_draws_by_step_and_rank() -> None:
    seeds = [dropout_seed(s, t, r) for s in (0, 1) for t in (0, 1, 10) for r in (0, 1, 10)]
    assert len({*seeds}) == len(seeds) and all(0 <= seed < 1 << 63 for seed in seeds)
    assert dropout_seed(3, 4, 5) == dropout_seed(3, 4, 5)
