"""Laws 1 and 2 over real processes: the noise is that of one process, however the model is split.

Tensor parallel: added once, after the sum over the vocabulary's shards, the same on every peer.
Sequence parallel: each slice its part of the whole. Sharded by either engine, under
`noise.stream=sample`: to each document of each step what `law.draw` says, in every training run.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers.distributed import DistributedConfig

from neftune_dist import NEFTune
from neftune_dist.config import load_config
from neftune_dist.data.dataset import prepare
from neftune_dist.data.sampler import make_sampler
from neftune_dist.noise.handle import NEFTuneHandle
from neftune_dist.noise.law import SampleStream, draw
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.recomputation import NoisedForward
from tests.support import tiny_model
from tests.support.families import family
from tests.support.ranks import on_ranks

ALPHA = 5.0
HIDDEN = 32
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0


class Small(nn.Module):
    """An embedding, and a loss of it that knows no parallelism."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(96, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        self.embedded = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
        return self.layer(self.embedded).tanh().square().mean()


def observe(model: Any, **inputs: Tensor) -> dict[str, Tensor]:
    """The embeddings, the loss and the embedding's gradient of one training pass, each whole."""
    model.zero_grad()
    loss = model(**inputs)
    loss.backward()
    gradient = model.embedding.weight.grad
    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    embedded = model.embedded.detach().clone()
    return {"embedded": embedded, "loss": loss.detach(), "gradient": whole.clone()}


BATCH = {"input_ids": IDS, "attention_mask": MASK}
WAYS = {
    "vocabulary": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    "vocabulary, a distributed tensor out": RowwiseParallel(
        input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=False
    ),
    "channels": ColwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
}
ORDERS = ["before", "after"]


def split(way: Any, mesh: Any, order: str, **settings: Any) -> tuple[Small, NEFTuneHandle]:
    """A model whose embedding is split, with noise put on before or after."""
    model = Small()
    if order == "before":
        noise = NEFTune(ALPHA, **settings).attach(model)
    parallelize_module(model, mesh, {"embedding": way})
    if order == "after":
        noise = NEFTune(ALPHA, **settings).attach(model)
    return model, noise


def refusal(act: Callable[[], Any]) -> str:
    """What the `ValueError` says."""
    with pytest.raises(ValueError) as raised:
        act()
    return str(raised.value)


def in_tensor_parallel(_: Path) -> dict[str, Any]:
    """Two ranks: the embedding in each way; and its output cut along the sequence."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    results: dict[str, Any] = {}
    for order in ORDERS:
        for name, way in WAYS.items():
            model, noise = split(way, mesh, order, rank=0)
            found = [observe(model, **BATCH) for _ in range(2)]
            results[f"{name}, {order}"] = found, noise.num_fired
            model, _ = split(way, mesh, order)
            results[f"{name}, {order}, no rank"] = refusal(lambda m=model: m(**BATCH))

    sliced = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    model, noise = split(sliced, mesh, "before", rank=0)
    results["a slice that nobody described"] = refusal(lambda: model(**BATCH))
    noise.step = 0
    columns = torch.arange(IDS.numel()).view(IDS.shape).chunk(2, dim=1)[rank]
    noise.describe(TokenLayout.from_arguments(**BATCH).take(columns.flatten()))
    model(**BATCH)
    results["slice"] = model.embedded.detach(), noise.take_noise_norms()
    return results


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(in_tensor_parallel, 2, tmp_path_factory.mktemp("tensor_parallel"))


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Tensor]]:
    """Two passes in one process."""
    model = Small()
    with NEFTune(ALPHA, rank=0).attach(model):
        return [observe(model, **BATCH) for _ in range(2)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_a_split_embedding_is_noised_once_and_alike(
    way: str,
    order: str,
    tensor_parallel: list[dict[str, Any]],
    alone: list[dict[str, Tensor]],
) -> None:
    """Both peers have the bits of a single process, in the forward pass and in the gradient."""
    for results in tensor_parallel:
        found, fired = results[f"{way}, {order}"]
        assert fired == 2
        for one, other in zip(found, alone, strict=True):
            for name, value in one.items():
                assert torch.equal(value, other[name]), name
    assert not torch.equal(alone[0]["embedded"], alone[1]["embedded"])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
def test_tensor_parallelism_needs_the_data_parallel_rank(
    way: str, order: str, tensor_parallel: list[dict[str, Any]]
) -> None:
    """Peers told apart by their global rank would noise one batch twice."""
    for results in tensor_parallel:
        assert "set NEFTune(rank=...)" in results[f"{way}, {order}, no rank"]


def test_slices_of_the_sequence_are_noised_as_the_whole(
    tensor_parallel: list[dict[str, Any]], alone: list[dict[str, Tensor]]
) -> None:
    """Described as what they are, they are the slices of the whole; else refused."""
    for results in tensor_parallel:
        assert "describe the slice" in results["a slice that nobody described"]
    pieces, norms = zip(*(results["slice"] for results in tensor_parallel), strict=True)
    assert torch.equal(torch.cat(pieces, 1), alone[0]["embedded"])
    # The first slice holds both documents' beginnings, and each slice adds its own part's norm.
    assert [int(number) for _, number in norms] == [2, 0]
    clean = Small().embedding(IDS).detach()
    for rank, piece in enumerate(pieces):
        of_rows = (piece - clean.chunk(2, dim=1)[rank]).double().flatten(1).norm(dim=1)
        assert float(norms[rank][0]) == pytest.approx(float(of_rows.sum()), rel=1e-4)


def under_fsdp2(_: Path) -> dict[str, Any]:
    """Two ranks: the embedding an FSDP2 unit of its own, put on before or after; and one whose
    weight tensor parallelism has split before."""
    data = init_device_mesh("cpu", (2,))
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    results: dict[str, Any] = {}
    for order in ORDERS:
        model = Small()
        if order == "after":
            fully_shard(model.embedding, mesh=data)
            fully_shard(model, mesh=data)
        noise = NEFTune(ALPHA).attach(model)
        if order == "before":
            fully_shard(model.embedding, mesh=data)
            fully_shard(model, mesh=data)
        model(**BATCH)
        results[order] = model.embedded.detach().clone(), noise.num_fired
    model = Small()
    parallelize_module(model, both["tensor"], {"embedding": WAYS["vocabulary"]})
    fully_shard(model.embedding, mesh=both["data"])
    fully_shard(model, mesh=both["data"])
    NEFTune(ALPHA).attach(model)
    results["tensor parallel"] = refusal(lambda: model(**BATCH))
    return results


def test_embedding_that_is_an_fsdp2_unit_is_noised_once(tmp_path: Path) -> None:
    """Each rank has its own noise, by its own rank: FSDP2's shards are no tensor parallelism."""
    for rank, results in enumerate(on_ranks(under_fsdp2, 2, tmp_path)):
        model = Small()
        with NEFTune(ALPHA, rank=rank).attach(model):
            expected = observe(model, **BATCH)["embedded"]
        for order in ORDERS:
            found, fired = results[order]
            assert fired == 1 and torch.equal(found, expected)
        assert "set NEFTune(rank=...)" in results["tensor parallel"]


def on_a_mesh(_: Path) -> Tensor:
    """Four ranks: two batches' worth of data-parallel ranks, of two tensor-parallel peers each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, _ = split(WAYS["vocabulary"], mesh["tensor"], "before", rank=mesh.get_local_rank(0))
    model(input_ids=torch.zeros(1, 512, dtype=torch.int64))
    return (model.embedded - Small().embedding.weight[0]).detach()


def test_peers_share_their_noise_and_data_parallel_ranks_do_not(tmp_path: Path) -> None:
    """On a mesh of 2 x 2, all ranks reading the same tokens."""
    noise = on_ranks(on_a_mesh, 4, tmp_path)
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    n = noise[0].numel()
    for drawn in (noise[0], noise[2]):
        assert float(drawn.norm()) == pytest.approx(
            ALPHA / math.sqrt(3), rel=5 * math.sqrt(1 / 5 / n)
        )
    correlation = torch.corrcoef(torch.stack((noise[0].flatten(), noise[2].flatten())))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(n)


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(family("llama", vocab_size=96)).train()


def loss_of(model: Any) -> Tensor:
    return model(**BATCH, labels=IDS, use_cache=False).loss


def by_transformers(folder: Path) -> dict[str, Any]:
    """Two ranks: a Llama that transformers itself splits while it loads it."""
    plan = DistributedConfig(tp_size=2, tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=plan
    ).train()
    weight = model.get_input_embeddings().weight
    noise = NEFTune(ALPHA).attach(model)
    results = {
        "rows": weight.to_local().shape[0],
        "no rank": refusal(lambda: loss_of(model)),
        "clean": loss_of(model.eval()).detach(),
    }
    noise.remove()
    model.train()
    with NEFTune(ALPHA, rank=0).attach(model) as noise:
        seen: list[Tensor] = []
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args: seen.append(args[0].detach().clone())
        )
        loss = loss_of(model)
        loss.backward()
        results |= {"embedded": seen[0], "loss": loss.detach(), "fired": noise.num_fired}
    return results


def test_transformers_own_tensor_parallelism_is_noised_once(tmp_path: Path) -> None:
    """The embeddings are a single process's to the bit; the loss, whose sums are split, nearly."""
    model = llama()
    model.save_pretrained(tmp_path / "model")
    clean = loss_of(model.eval()).detach()
    seen: list[Tensor] = []
    model.train().model.layers[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone())
    )
    with NEFTune(ALPHA, rank=0).attach(model):
        loss = loss_of(model).detach()
    assert abs(float(loss - clean)) > 1e-3
    for results in on_ranks(by_transformers, 2, tmp_path):
        assert results["rows"] == 48
        assert "set NEFTune(rank=...)" in results["no rank"]
        assert results["fired"] == 1
        assert torch.equal(results["embedded"], seen[0])
        assert torch.allclose(results["clean"], clean, rtol=1e-5)
        assert torch.allclose(results["loss"], loss, rtol=1e-5)


STEPS = 2
Digests = dict[str, str]


def digests(layout: TokenLayout, noise: Tensor, step: int) -> Digests:
    """Of the noise (num_tokens, hidden) on each document: its bits, by step, epoch and document."""
    found = {}
    assert layout.document is not None and layout.epoch is not None
    for number in layout.segment[layout.length > 0].unique().tolist():
        chosen = (layout.segment == number) & (layout.length > 0)
        name = f"{step}/{int(layout.epoch[chosen][0])}/{int(layout.document[chosen][0])}"
        assert name not in found
        found[name] = hashlib.sha256(noise[chosen].numpy().tobytes()).hexdigest()
    return found


def recording_rank(variables: dict[str, str], words: list[str], *files: Path) -> None:
    """One rank of a training run, which leaves the digests of its noise in RUN_DIR."""
    original, found = NEFTuneHandle._add, Digests()

    def add(handle: NEFTuneHandle, x: Tensor, forward: NoisedForward) -> Tensor:
        noise, before = torch.zeros(x.shape), x.to(torch.float32, copy=True)
        original(handle, noise, forward)
        squares = original(handle, x, forward)
        assert torch.equal(x, (before + noise).to(x.dtype))
        new = digests(forward.layout, noise.view(-1, x.shape[-1]), handle.step)
        assert not new.keys() & found.keys()
        found.update(new)
        return squares

    NEFTuneHandle._add = add
    try:
        tiny_model._rank(variables, words, *files)
    finally:
        run_dir = next(word.removeprefix("run_dir=") for word in words if "run_dir=" in word)
        path = Path(run_dir) / f"noise_{variables.get('RANK', 0)}.json"
        path.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample_stream")
    return tiny_model.make_config(folder, train={"max_steps": STEPS, "micro_batch_tokens": 160})


@pytest.fixture(scope="module")
def expected(config: Path) -> Digests:
    """From the sampler and `law.draw`, document by document."""
    settings = load_config(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model.name_or_path)
    dataset = prepare(settings.data, tokenizer)
    sampler = make_sampler(settings.train, len(dataset.train), dataset.content)
    found = Digests()
    for step in range(STEPS):
        for document, epoch in zip(*sampler.documents(step), strict=True):
            length = len(dataset.train[int(document)][0])
            layout = TokenLayout.from_lengths(
                torch.tensor([length]),
                documents=torch.tensor([int(document)]),
                epochs=torch.tensor([int(epoch)]),
            )
            scale = torch.tensor(ALPHA / math.sqrt(length * 64), dtype=torch.float32)
            noise = draw(SampleStream(settings.noise_seed), layout, 64) * scale
            found |= digests(layout, noise, step)
    assert len(found) == STEPS * settings.train.global_batch_size
    return found


RUNS = [
    (ranks, engine, packing)
    for ranks in (1, 2, 3, 4)
    for engine in ("engine.name=fsdp2", "engine.name=deepspeed")
    for packing in ("data.packing=true", "data.packing=false")
]


@pytest.mark.parametrize(("ranks", "engine", "packing"), RUNS)
def test_every_training_run_noises_a_document_alike(
    ranks: int,
    engine: str,
    packing: str,
    config: Path,
    expected: Digests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every document of every step once, on whichever rank, with the bits of the law; in bfloat16
    they are rounded once, where they are added."""
    monkeypatch.setattr(tiny_model, "_rank", recording_rank)
    dtype = f"model.dtype={'bf16' if ranks == 3 else 'fp32'}"
    records = tiny_model.train(config, tmp_path / "run", engine, packing, dtype, ranks=ranks)
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "run").glob("noise_*"))]
    assert len(found) == ranks
    assert max(Counter(name for one in found for name in one).values()) == 1
    assert {name: digest for one in found for name, digest in one.items()} == expected
    for record in records:
        assert record["noise_norm"] == pytest.approx(ALPHA / math.sqrt(3), rel=0.02)
