"""torch.compile sees the hooks as part of the model: no break, compiled once, with eager's bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from neftune_dist import NEFTune
from neftune_dist.noise.law import RankStream, expected_norm, scales
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise_, count_forward_

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            use_cache=False,
        )
    ).train()


class Small(nn.Module):
    """An embedding, a layer and a head: a Llama takes seconds to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(97, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 97)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.head(self.layer(self.embedding(input_ids)).tanh())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of one test is met by the next."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def logits_of(model: Any, ids: Tensor, **arguments: Tensor) -> Tensor:
    output = model(input_ids=ids, **arguments)
    return output if isinstance(output, Tensor) else output.logits


def loss_of(model: Any, ids: Tensor, **arguments: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(model, ids, **arguments).flatten(0, 1), ids.flatten())


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def assert_equal(model: nn.Module, loss: Tensor, plain: nn.Module, wanted: Tensor) -> None:
    """Losses and gradients, bit for bit."""
    assert torch.equal(loss, wanted)
    for one, other in zip(gradients(model, loss), gradients(plain, wanted), strict=True):
        assert torch.equal(one, other)


Batch = tuple[dict[str, Tensor], TokenLayout | None]
BatchOf = Callable[[torch.Generator, int, int], Batch]


def padded(generator: torch.Generator, rows: int, columns: int) -> Batch:
    lengths = torch.randint(1, columns + 1, (rows, 1), generator=generator)
    mask = (torch.arange(columns) < lengths).long()
    return {"attention_mask": mask}, None


def packed(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """(lengths, positions) of as many documents as there are rows, in one."""
    cuts = torch.randperm(rows * columns - 1, generator=generator)[: rows - 1] + 1
    edges = torch.cat((torch.tensor([0]), cuts.sort().values, torch.tensor([rows * columns])))
    lengths = edges.diff()
    return lengths, TokenLayout.from_lengths(lengths).position[None]


def by_positions(generator: torch.Generator, rows: int, columns: int) -> Batch:
    return {"position_ids": packed(generator, rows, columns)[1]}, None


def by_cumulative_lengths(generator: torch.Generator, rows: int, columns: int) -> Batch:
    lengths, positions = packed(generator, rows, columns)
    boundaries = F.pad(lengths.cumsum(0), (1, 0))
    return {"position_ids": positions, "cu_seq_lens_q": boundaries.int()}, None


def described(generator: torch.Generator, rows: int, columns: int) -> Batch:
    """Packed, and the documents told by name: the `sample` stream."""
    lengths, positions = packed(generator, rows, columns)
    documents = torch.randint(1 << 32, (rows,), generator=generator)
    layout = TokenLayout.from_lengths(lengths, documents=documents, epochs=documents)
    return {"position_ids": positions}, layout


CASES: dict[str, tuple[Callable[[], nn.Module], BatchOf, dict[str, Any]]] = {
    "llama, padded": (llama, padded, {}),
    "symmetric, padded": (Small, padded, {"distribution": "symmetric"}),
    "gaussian, positions": (Small, by_positions, {"distribution": "gaussian"}),
    "cumulative lengths": (Small, by_cumulative_lengths, {}),
    "L of the row, cumulative lengths": (Small, by_cumulative_lengths, {"length": "padded"}),
    "stream of the sample, described": (Small, described, {"stream": "sample"}),
}


@pytest.mark.parametrize("name", CASES)
def test_compiled_training_is_eager_training(name: str) -> None:
    """Over steps and micro-steps with other batches, lengths and alphas: losses, gradients, norms
    and counts to the bit, compiled once."""
    make, batch_of, settings = CASES[name]
    generator = torch.Generator().manual_seed(0)
    plain, model = make(), make()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    losses = set()
    with (
        NEFTune(5.0, **settings).attach(plain) as expected,
        NEFTune(5.0, **settings).attach(model) as noise,
    ):
        for step in range(3):
            noise.step = expected.step = step
            noise.alpha = expected.alpha = 5.0 - step
            for micro_step in range(2):
                if settings.get("distribution") == "symmetric":
                    noise.sign = expected.sign = (1, -1)[micro_step]
                rows, columns = 3 + step, 20 + 4 * step + 3 * micro_step
                arguments, layout = batch_of(generator, rows, columns)
                shape = (rows, columns) if batch_of is padded else (1, rows * columns)
                ids = torch.randint(97, shape, generator=generator)
                if layout is not None:
                    noise.describe(layout), expected.describe(layout)
                anew = step == micro_step == 0
                with torch._dynamo.config.patch(error_on_recompile=not anew):
                    loss = loss_of(compiled, ids, **arguments)
                assert_equal(model, loss, plain, loss_of(plain, ids, **arguments))
                losses.add(float(loss.detach()))
            assert noise.num_fired == expected.num_fired == 2
            norm_sum, number = noise.take_noise_norms()
            assert torch.equal(norm_sum, expected.take_noise_norms()[0])
            assert int(number) == 2 * rows
            if settings.get("length") != "padded":
                law = expected_norm(noise.alpha, settings.get("distribution", "uniform"))
                assert float(norm_sum / number) == pytest.approx(law, rel=0.1)
    assert len(losses) == 6
    assert not counters["graph_break"]
    # The layout is read off the arguments in a frame of its own, before the model's.
    assert counters["stats"]["unique_graphs"] == (1 if batch_of is described else 2)


def test_passes_that_do_not_train_are_clean() -> None:
    """Evaluation and reference passes are graphs of their own, without noise; training is taken up
    again where it was; and a model out of its noise is what it was."""
    model, clean = Small(), Small()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    ids = torch.arange(24).view(2, 12)
    with NEFTune(5.0).attach(model) as noise:
        assert not torch.equal(logits_of(compiled, ids), logits_of(clean, ids))
        for training in (False, True):
            model.train(training)
            with torch.no_grad():
                assert torch.equal(logits_of(compiled, ids), logits_of(clean, ids))
        assert torch.equal(logits_of(compiled.eval(), ids), logits_of(clean, ids))
        assert noise.num_fired == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert not torch.equal(logits_of(compiled.train(), ids), logits_of(clean, ids))
        assert noise.num_fired == 2
    assert torch.equal(logits_of(compiled, ids), logits_of(clean, ids))
    assert not counters["graph_break"]


def test_lengths_alone_recompile_nothing() -> None:
    """Packed rows of one shape, as most trainers make them: other documents, other numbers of
    them, the same static graph."""
    model = Small()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    ids = torch.arange(60)[None]
    with NEFTune(5.0).attach(model) as noise:
        for i, lengths in enumerate(([60], [1, 59], [20, 20, 20], [7] * 8 + [4])):
            positions = TokenLayout.from_lengths(torch.tensor(lengths)).position[None]
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                compiled(input_ids=ids, position_ids=positions)
            norm_sum, number = noise.take_noise_norms()
            assert int(number) == len(lengths)
            assert float(norm_sum / number) == pytest.approx(expected_norm(5.0), rel=0.2)
    assert not counters["graph_break"]


def test_inductors_model_trains_as_eagers() -> None:
    """The default backend, whose own kernels may round otherwise than eager's."""
    plain, model = Small(), Small()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with NEFTune(5.0).attach(plain) as expected, NEFTune(5.0).attach(model) as noise:
        for i, columns in enumerate((20, 31)):
            ids = torch.randint(97, (3, columns), generator=torch.Generator().manual_seed(i))
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                loss = loss_of(compiled, ids)
            wanted = loss_of(plain, ids)
            assert torch.allclose(loss, wanted, rtol=1e-6)
            for one, other in zip(gradients(model, loss), gradients(plain, wanted), strict=True):
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
            assert noise.num_fired == i + 1
        assert torch.equal(noise.take_noise_norms()[0], expected.take_noise_norms()[0])
    assert not counters["graph_break"]


def test_hooks_put_on_a_compiled_model_too_late_raise() -> None:
    """Its graph knows nothing of them."""
    model, ids = Small(), torch.arange(24).view(2, 12)
    model.compile(fullgraph=True, backend="eager")
    model(input_ids=ids)
    with (
        NEFTune(5.0).attach(model),
        pytest.raises(RuntimeError, match="before compiling"),
    ):
        model(input_ids=ids)


class Outer(nn.Module):
    """A model around the one that holds the embedding, as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Small()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.model(input_ids)


def test_compiled_part_of_a_model_gets_the_same_noise() -> None:
    """The hook outside hands the layout on to the one within the graph."""
    plain, model = Outer(), Outer()
    model.model.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    with NEFTune(5.0).attach(plain), NEFTune(5.0).attach(model) as noise:
        for i, columns in enumerate((20, 31, 12)):
            ids = torch.randint(97, (3, columns), generator=torch.Generator().manual_seed(i))
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                loss = loss_of(model, ids)
            assert_equal(model, loss, plain, loss_of(plain, ids))
            assert noise.num_fired == i + 1


def test_a_checkpoint_around_a_compiled_model_raises() -> None:
    """Its graph cannot know that it is computed again, and would count that as another forward."""
    model, ids = Small(), torch.arange(24).view(2, 12)
    compiled = torch.compile(model, backend="aot_eager")
    with NEFTune(5.0).attach(model):
        loss = checkpoint(loss_of, compiled, ids, use_reentrant=False)
        with pytest.raises(RuntimeError, match="checkpoint the layers alone"):
            loss.backward()


class CheckpointedLayer(Small):
    """The layer after the embedding is computed again in the backward pass."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = checkpoint(self.layer, self.embedding(input_ids), use_reentrant=False)
        return self.head(hidden.tanh())


def test_checkpointed_layers_of_a_compiled_model_get_the_same_noise() -> None:
    plain, model, ids = Small(), CheckpointedLayer(), torch.arange(24).view(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with NEFTune(5.0).attach(plain), NEFTune(5.0).attach(model) as noise:
        for i in range(2):
            assert_equal(model, loss_of(compiled, ids), plain, loss_of(plain, ids))
            assert noise.num_fired == i + 1


def test_malformed_lengths_stop_a_compiled_model() -> None:
    model, ids = Small(), torch.arange(24)[None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with NEFTune(5.0).attach(model):
        compiled(input_ids=ids, cu_seqlens=torch.tensor([0, 12, 24]))
        for boundaries in ([0, 12, 23], [0, 12, 25], [0, 30, 24], [1, 12, 24]):
            with pytest.raises(RuntimeError, match="Cumulative lengths must rise from 0"):
                compiled(input_ids=ids, cu_seqlens=torch.tensor(boundaries))


@pytest.mark.parametrize("distribution", ["uniform", "gaussian", "symmetric"])
def test_the_operators_pass_torchs_opcheck(distribution: str) -> None:
    """What they change, their shapes under tracing and their schema are what is declared."""
    layout = TokenLayout.from_lengths(torch.tensor([3, 5]))
    words = RankStream(0, 0, 0, 0).words(layout)
    for x in (torch.randn(2, 4, 10), torch.randn(4, 2, 10).transpose(0, 1).bfloat16()):
        torch.library.opcheck(add_noise_, (x, scales(layout, 10, 5.0), *words, 0, distribution))
    torch.library.opcheck(count_forward_, (torch.tensor([3, 4, 5]),))
