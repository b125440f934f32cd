"""Law 1 on every kind of model: with NEFTune it is the model fed with its noised embeddings.

The reference passes `inputs_embeds`: the embedding's own output plus the law's noise, drawn here by
`law.draw`. Losses and all gradients are equal to the bit, so the noise is the law's, is added once,
after the lookup and before anything else, and the gradient passes through it unchanged.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neftune_dist import NEFTune
from neftune_dist.noise.law import RankStream, draw, expected_norm
from neftune_dist.noise.layout import TokenLayout
from tests.support.families import family

ALPHA = 5.0
FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "opt",
    "gpt2",
    "gpt_neox",
    "phi",
    "phi3",
]
SCALED = ("gemma", "gemma2", "gemma3_text")  # by sqrt(hidden_size), inside the embedding
IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 7:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
Gradients = dict[str, Tensor]


def make(model_type: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = family(model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def law(hidden: int, *, alpha: float = ALPHA, micro_step: int = 0, mask: Tensor = MASK) -> Tensor:
    """The noise of step 0, (rows, columns, hidden)."""
    layout = TokenLayout.from_arguments(mask, attention_mask=mask)
    length = mask.sum(1, keepdim=True).expand(mask.shape)
    scale = torch.where(mask > 0, alpha / torch.sqrt(length.double() * hidden), 0.0).float()
    draws = draw(RankStream(0, 0, 0, micro_step), layout, hidden).view(*mask.shape, hidden)
    return draws * scale[..., None]


def gradients(model: nn.Module, loss: Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: Any, **inputs: Any) -> Tensor:
    return model(attention_mask=MASK, labels=LABELS, use_cache=False, **inputs).loss


def checkpointed(loss: Callable[[], Tensor]) -> Tensor:
    return checkpoint(loss, use_reentrant=False)


def by_hand(model: Any, noise: Tensor) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the model fed with noised embeddings."""
    loss = loss_of(model, inputs_embeds=model.get_input_embeddings()(IDS) + noise)
    return loss.detach(), gradients(model, loss)


def assert_equal(model: nn.Module, loss: Tensor, expected: tuple[Tensor, Gradients]) -> None:
    """Losses and gradients, bit for bit."""
    found = gradients(model, loss)
    assert torch.equal(loss, expected[0])
    assert found.keys() == expected[1].keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[1][name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_fed_with_noised_embeddings(model_type: str, tied: bool) -> None:
    model = make(model_type, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings()
    assert (model.get_output_embeddings().weight is embedding.weight) == tied
    # d is the size of what the lookup gives: OPT projects it to another.
    d = embedding.weight.shape[1]
    assert (d == model.config.hidden_size) == (model_type != "opt")
    alpha = ALPHA * (math.sqrt(d) if model_type in SCALED else 1.0)
    clean = by_hand(model, torch.zeros(()))
    expected = [by_hand(model, law(d, alpha=alpha, micro_step=i)) for i in range(2)]
    with NEFTune(ALPHA).attach(model) as noise:
        for i in range(2):
            assert_equal(model, loss_of(model, input_ids=IDS), expected[i])
            assert noise.num_fired == i + 1
        norm_sum, number = noise.take_noise_norms()
    assert int(number) == 4
    bound = 5 * math.sqrt(1 / 5 / (7 * d))
    assert float(norm_sum / number) == pytest.approx(expected_norm(ALPHA), rel=bound)
    assert_equal(model, loss_of(model, input_ids=IDS), clean)
    assert len({float(loss) for loss, _ in (clean, *expected)}) == 3


class NormedEmbedding(nn.Embedding):
    """As Inkling's: it normalises what it looks up."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.embed_norm = nn.RMSNorm(width)

    def forward(self, input: Tensor) -> Tensor:
        return self.embed_norm(super().forward(input))


def test_an_embedding_that_normalises_is_refused() -> None:
    """Behind its norm the embedding has another size than that which the noise is made for."""
    model = make()
    model.set_input_embeddings(NormedEmbedding(97, 32))
    before = hooks(model)
    with pytest.raises(ValueError, match="NormedEmbedding normalises what it looks up"):
        NEFTune(ALPHA).attach(model)
    assert hooks(model) == before
    NEFTune(0.0).attach(model).remove()  # without noise there is nothing to refuse


def test_a_norm_after_the_embedding_takes_the_noise_for_a_part_of_it() -> None:
    """Bloom's: the noise is added to what was looked up, in front of the norm."""
    model = make("bloom", hidden_dropout=0.0, attention_dropout=0.0)
    expected = by_hand(model, law(32))
    with NEFTune(ALPHA).attach(model):
        assert_equal(model, loss_of(model, input_ids=IDS), expected)


def test_a_lookup_outside_the_models_forward_raises() -> None:
    """By a loop that calls the inner model, or passes embeddings: their documents are unknown."""
    model = make()
    with NEFTune(ALPHA).attach(model):
        for call in (
            lambda: model.model(input_ids=IDS, attention_mask=MASK),
            lambda: loss_of(model, inputs_embeds=model.get_input_embeddings()(IDS)),
        ):
            with pytest.raises(RuntimeError, match="outside the forward of the LlamaForCausalLM"):
                call()
            assert_equal(model.eval(), loss_of(model, input_ids=IDS), by_hand(model, law(32) * 0))
            with torch.no_grad():
                model.train().model(input_ids=IDS)
    expected = by_hand(model, law(32))
    with NEFTune(ALPHA).attach(model.model) as noise:
        hidden = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
        assert noise.num_fired == 1
    loss = model.loss_function(model.lm_head(hidden), LABELS, vocab_size=model.config.vocab_size)
    assert_equal(model, loss, expected)


def test_resized_embedding_keeps_its_noise() -> None:
    """transformers resizes the embedding in place: the noise stays on."""
    for before in (True, False):
        model = make()
        if before:
            model.resize_token_embeddings(120, mean_resizing=False)
        with NEFTune(ALPHA).attach(model) as noise:
            if not before:
                model.resize_token_embeddings(120, mean_resizing=False)
            loss = loss_of(model, input_ids=IDS)
            assert noise.num_fired == 1
        assert model.get_input_embeddings().num_embeddings == 120
        assert_equal(model, loss, by_hand(model, law(32)))


def test_an_embedding_replaced_afterwards_raises() -> None:
    model = make()
    with NEFTune(ALPHA).attach(model):
        model.set_input_embeddings(nn.Embedding(120, 32))
        with pytest.raises(RuntimeError, match="Attach it after resizing the embedding"):
            loss_of(model, input_ids=IDS)


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]},
}


def adapted(model: Any, name: str) -> Any:
    """Under LoRA, whose matrices are random, so that they matter."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**ADAPTERS[name], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).train()


@pytest.mark.parametrize("name", ADAPTERS)
def test_lora_trains_under_the_same_noise(name: str) -> None:
    """The noise goes on what the embedding gives with its adapter; the base stays frozen."""
    model = adapted(make(), name)
    expected = by_hand(model, law(32))
    assert "base_model.model.lm_head.weight" not in expected[1]
    with NEFTune(ALPHA).attach(model) as noise:
        assert_equal(model, loss_of(model, input_ids=IDS), expected)
        assert noise.num_fired == 1


def test_arguments_by_position_are_read_through_peft() -> None:
    """Its wrapper for no task in particular passes on *args, which have no names there."""
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"])).train()
    with NEFTune(ALPHA).attach(model):
        logits = model(IDS, MASK, use_cache=False).logits
    with NEFTune(ALPHA).attach(model):
        assert torch.equal(logits, model(input_ids=IDS, attention_mask=MASK).logits)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapted_embedding_keeps_its_scale(name: str) -> None:
    model = adapted(make("gemma3_text"), name)
    embedding = model.get_input_embeddings()
    clean = embedding(IDS)
    with NEFTune(ALPHA).attach(model):
        seen: list[Tensor] = []
        reader = embedding.register_forward_hook(lambda *given: seen.append(given[2].detach()))
        loss_of(model, input_ids=IDS)
        reader.remove()
    scale = float(make("gemma3_text").model.embed_tokens.scalar_embed_scale)
    assert scale > 2
    torch.testing.assert_close(seen[0] - clean, scale * law(clean.shape[-1]), atol=1e-5, rtol=1e-4)


def test_adapters_put_on_afterwards_leave_the_noise_or_are_refused() -> None:
    """On the layers: the same noise. Around the embedding: the noise stays behind the base's
    lookup, which a second one may not join. On a copy of the embedding: it is told."""
    model = make()
    with NEFTune(ALPHA).attach(model) as noise:
        wrapped = adapted(model, "attention")
        loss = loss_of(wrapped, input_ids=IDS)
        assert noise.num_fired == 1
    assert_equal(wrapped, loss, by_hand(wrapped, law(32)))

    model = make()
    with NEFTune(ALPHA).attach(model) as noise:
        wrapped = adapted(model, "embedding")
        loss_of(wrapped, input_ids=IDS)
        assert noise.num_fired == 1
        with pytest.raises(ValueError, match="attached to this model already"):
            NEFTune(ALPHA).attach(wrapped)

    model = make()
    with NEFTune(ALPHA).attach(model):
        wrapped = adapted(model, "embedding saved")
        with pytest.raises(RuntimeError, match="The noise was not added"):
            loss_of(wrapped, input_ids=IDS)


def test_image_features_stay_clean_and_count_as_tokens() -> None:
    """L counts the image's placeholders too, as tokens of the document; the image's own features
    take their places after the noise, and stay clean."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=family("llama"), image_token_index=96
    )
    model = transformers.LlavaForConditionalGeneration(config).train()
    ids = torch.tensor([[1, 5, 96, 96, 96, 96, 7, 8, 9, 10]])  # four patches
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8), "labels": ids}
    layer, seen = model.model.language_model.layers[0], []
    watching = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(**inputs)
    with NEFTune(ALPHA).attach(model) as noise:
        loss = model(**inputs).loss
        watching.remove()
        expected = loss.detach(), gradients(model, loss)
        noise.step = 0
        # The model reads its ids off a copy of what it is given.
        assert_equal(model, checkpointed(lambda: model(**inputs).loss), expected)
        assert noise.num_fired == 1
    clean, noised = seen
    image = ids == 96
    assert torch.equal(noised[image], clean[image])
    added = law(32, mask=torch.ones_like(ids))
    assert torch.equal(noised[~image], (clean + added)[~image])


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["attach", "wrap"])
@pytest.mark.parametrize("wrapper", ["ddp", "compile"])
@pytest.mark.usefixtures("alone")
def test_wrapped_model_gets_the_noise_once(wrapper: str, first: str) -> None:
    """Attached to the wrapper or to what it wraps, before or after; not to both."""
    model = make()
    expected = by_hand(model, law(32))

    def wrap() -> nn.Module:
        if wrapper == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        return torch.compile(model, backend="eager")

    if first == "wrap":
        wrapped = wrap()
        noise = NEFTune(ALPHA).attach(wrapped)
    else:
        noise = NEFTune(ALPHA).attach(model)
        wrapped = wrap()
    with noise:
        assert_equal(model, loss_of(wrapped, input_ids=IDS), expected)
        assert noise.num_fired == 1
        for target in (model, wrapped):
            with pytest.raises(ValueError, match="attached to this model already"):
                NEFTune(ALPHA).attach(target)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_leave_the_embedding_and_its_noise_alone(use_reentrant: bool) -> None:
    """The layers are computed again, the embedding is not."""
    model, calls = make(), []
    expected = by_hand(model, law(32))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for part in (model.model.embed_tokens, model.model.layers[0].mlp):
        part.register_forward_pre_hook(lambda part, _: calls.append(type(part).__name__))
    with NEFTune(ALPHA).attach(model) as noise:
        assert_equal(model, loss_of(model, input_ids=IDS), expected)
        assert noise.num_fired == 1
    assert calls == ["Embedding", "LlamaMLP", "LlamaMLP"]


@pytest.mark.parametrize("distribution", ["uniform", "symmetric"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["llama", "llama and its layers", "lora", "embedding frozen"])
def test_a_checkpointed_model_is_recomputed_under_its_own_noise(
    name: str, distribution: str
) -> None:
    """Forward and backward in turns: each recomputation repeats the last forward's noise, whatever
    the loop has set in between, and is not counted."""
    model = adapted(make(), "embedding") if name == "lora" else make()
    if name == "llama and its layers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "embedding frozen":
        model.get_input_embeddings().weight.requires_grad_(False)

    def train(checkpointing: bool) -> list[tuple[Tensor, Gradients]]:
        results = []
        with NEFTune(ALPHA, distribution=distribution).attach(model) as noise:
            for step in range(2):
                noise.step, noise.alpha = step, ALPHA - step
                for micro_step in range(2):
                    noise.sign = -1 if distribution == "symmetric" and micro_step else 1
                    # A tensor of its own each time: nothing may be known by its address.
                    ids = IDS.clone()
                    if checkpointing:
                        loss = checkpoint(loss_of, model, input_ids=ids, use_reentrant=False)
                    else:
                        loss = loss_of(model, input_ids=ids)
                    assert noise.num_fired == micro_step + 1
                    if micro_step == 1:
                        noise.step, noise.alpha = step + 1, 1.0  # as early as a loop could
                    results.append((loss.detach(), gradients(model, loss)))
            assert int(noise.take_noise_norms()[1]) == 2 * 2 * 2  # documents of four forwards
        return results

    losses = set()
    for (loss, found), (plain_loss, plain) in zip(train(True), train(False), strict=True):
        assert torch.equal(loss, plain_loss)
        assert found.keys() == plain.keys() and found
        assert all(torch.equal(gradient, plain[key]) for key, gradient in found.items())
        losses.add(float(loss))
    assert len(losses) == 4


class CheckpointedStem(nn.Module):
    """The embedding and the layer after it are computed again in the backward pass."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(97, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 97)
        self.use_reentrant = use_reentrant

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def stem(self, input_ids: Tensor) -> Tensor:
        return self.layer(self.embedding(input_ids)).tanh()

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.use_reentrant is None:
            hidden = self.stem(input_ids)
        else:
            hidden = checkpoint(self.stem, input_ids, use_reentrant=self.use_reentrant)
        return self.head(hidden).square().mean()


def test_a_checkpoint_around_the_embedding_and_the_next_layer() -> None:
    """Twice, so that the second one's noise differs from the first one's."""
    results = []
    for use_reentrant in (None, False):
        model = CheckpointedStem(use_reentrant)
        with NEFTune(ALPHA).attach(model) as noise:
            results += [gradients(model, model(IDS)), gradients(model, model(IDS))]
            assert noise.num_fired == 2
    for one, other in ((0, 2), (1, 3)):
        for name, gradient in results[one].items():
            assert torch.equal(gradient, results[other][name]), name
    assert not torch.equal(results[0]["layer.weight"], results[1]["layer.weight"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_around_the_embedding_raises() -> None:
    """Its forward has gradients off: nothing would be noised."""
    model = CheckpointedStem(use_reentrant=True)
    with (
        NEFTune(ALPHA).attach(model),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
    ):
        model(IDS)

    whole, anchor = make(), torch.ones((), requires_grad=True)
    with NEFTune(ALPHA).attach(whole) as noise:
        loss = checkpoint(
            lambda one: one * loss_of(whole, input_ids=IDS), anchor, use_reentrant=True
        )
        assert noise.num_fired == 0
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss.backward()


@pytest.mark.parametrize("same_ids", [True, False])
@pytest.mark.parametrize("backward_of", ["the sum", "the first", "one checkpoint"])
def test_recomputing_any_forward_but_the_last_raises(backward_of: str, same_ids: bool) -> None:
    """Its noise is not known any more; another's would give a wrong gradient."""
    model = make()
    others = IDS if same_ids else IDS.clone()

    def first() -> Tensor:
        return loss_of(model, input_ids=IDS)

    def second() -> Tensor:
        noise.sign = -1
        return loss_of(model, input_ids=others)

    with NEFTune(ALPHA, distribution="symmetric").attach(model) as noise:
        noise.sign = 1
        if backward_of == "one checkpoint":
            loss = checkpointed(lambda: first() + second())
        else:
            losses = checkpointed(first), checkpointed(second)
            loss = losses[0] + losses[1] if backward_of == "the sum" else losses[0]
        assert noise.num_fired == 2
        with pytest.raises(RuntimeError, match="one forward a backward"):
            loss.backward()
        checkpointed(first).backward()  # and goes on


CLEAN: dict[str, Callable[[], Any]] = {
    "eval": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", CLEAN)
def test_passes_that_do_not_train_are_clean(name: str) -> None:
    """Evaluation, and reference passes and generation of a model in train mode."""
    model = make().train(name != "eval")
    with torch.no_grad():
        clean = model(input_ids=IDS, attention_mask=MASK).logits
        tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    with NEFTune(ALPHA).attach(model) as noise:
        with CLEAN[name]():
            assert torch.equal(model(input_ids=IDS, attention_mask=MASK).logits, clean)
        again = model.generate(IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
        assert torch.equal(again, tokens)
        assert noise.num_fired == 0
        assert int(noise.take_noise_norms()[1]) == 0
        noised = model.train()(input_ids=IDS, attention_mask=MASK).logits
        assert not torch.equal(noised, clean) and noise.num_fired == 1


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_an_exception_takes_the_noise_off() -> None:
    model = make()
    expected = by_hand(model, torch.zeros(()))
    with pytest.raises(ZeroDivisionError), NEFTune(ALPHA).attach(model):
        loss_of(model, input_ids=IDS)
        assert hooks(model) == 4
        raise ZeroDivisionError
    assert hooks(model) == 0
    assert_equal(model, loss_of(model, input_ids=IDS), expected)
    removed = NEFTune(ALPHA).attach(model)
    removed.remove()
    removed.remove()
    with pytest.raises(ValueError, match="or removed: it has no hooks"):
        removed.alpha = ALPHA


@pytest.mark.parametrize("where", ["layers", "embed_tokens"])
def test_a_forward_that_failed_leaves_nothing_behind(where: str) -> None:
    """The next one is noised as if it had not been: a batch caught out of memory and tried again
    in parts."""
    model = make()
    expected = by_hand(model, law(32, micro_step=1 if where == "layers" else 0))
    with NEFTune(ALPHA).attach(model):
        part = model.model.layers[0] if where == "layers" else model.model.embed_tokens
        failing = part.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=IDS[:1], attention_mask=MASK[:1])
        failing.remove()
        with torch.no_grad():
            model(input_ids=IDS)
        assert_equal(model, loss_of(model, input_ids=IDS), expected)


def test_two_models_do_not_meet() -> None:
    """A model and its copy, each with its own handle, in turns."""
    model = make()
    with NEFTune(ALPHA).attach(model) as noise:
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in others:
            assert_equal(other, loss_of(other, input_ids=IDS), by_hand(make(), law(32)))
            # In the middle of the model's own forward.
            model.model.register_forward_pre_hook(lambda *_, m=other: m(input_ids=IDS) and None)
        assert noise.num_fired == 0
        assert_equal(model, loss_of(model, input_ids=IDS), by_hand(make(), law(32)))
        assert noise.num_fired == 1

    policy, reference = make(), make()
    with NEFTune(ALPHA).attach(policy) as noise, NEFTune(ALPHA, seed=1).attach(reference):
        loss_of(policy, input_ids=IDS)
        loss = loss_of(reference, input_ids=IDS)
        assert noise.num_fired == 1
    assert not torch.equal(loss, by_hand(make(), law(32))[0])
