"""Every row of the table of wrappers computes text as the text model inside it does."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

from neftune_dist.config import ModelConfig, UserError
from neftune_dist.model import load
from neftune_dist.model.families import WRAPPERS, check_config
from neftune_dist.model.modules import replace_parameters
from tests.support.shrunk import shrunk
from tests.support.wrappers import logits, tiny_wrapper


def build(folder: Path) -> Any:
    return load.build(folder, ModelConfig(str(folder)), packing=False)


@torch.no_grad()
def read_text_model(folder: Path) -> tuple[Any, Any]:
    """The text model with the files' content, and the towers."""
    model, config = build(folder), ModelConfig(str(folder))
    weights = load.open_weights(model, folder, config, 0)
    towers = load.open_towers(model, folder, config)
    shapes = load.stored_shapes(model)
    replace_parameters(model, lambda p: torch.nn.Parameter(torch.empty_like(p, device="cpu")))
    load.initialize_buffers(model, torch.device("cpu"))
    for name, held in [*model.named_parameters(), *load.stored_buffers(model)]:
        held.copy_(weights.read(name, 0, math.prod(shapes[name])).view(shapes[name]))
    return model, towers


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_text_model_computes_text_as_its_wrapper(model_type: str, tmp_path: Path) -> None:
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip("this version of transformers does not know it")
    if model_type == "gemma3n":
        pytest.importorskip("timm", reason="builds its tower")
    wrapper = tiny_wrapper(model_type)
    wrapper.save_pretrained(tmp_path)
    model, towers = read_text_model(tmp_path)
    ids = torch.randint(5, 600, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model, ids), logits(wrapper, ids), atol=1e-6, rtol=1e-5)

    files = load_file(tmp_path / "model.safetensors")
    text = {n for n, p in model.named_parameters()} | {n for n, _ in load.stored_buffers(model)}
    assert sum(math.prod(files[n].shape) for n in files.keys() - towers.others.keys()) == sum(
        p.numel() for n, p in model.state_dict().items() if n in text
    )
    assert towers.others and all(
        torch.equal(towers.read_other(name), files[name]) for name in towers.others
    )
    assert not any("language_model" in name or "lm_head" in name for name in towers.others)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: shrunk("gemma3"), None),
        (lambda: named("gemma3", "Gemma3ForSequenceClassification"), "class Gemma3ForSequence"),
        (lambda: with_text("llava", "granite"), "leaves out logits_scaling"),
        (lambda: shrunk("gemma4"), None),  # caps logits as its text model does
        (lambda: with_text("llava", "bart"), "are an encoder and a decoder"),
        (lambda: with_text("llava", "phi"), None),
        (
            lambda: shrunk("paligemma"),
            "(text_config, vision_config). The text model is trained of those of type aria, ",
        ),
    ],
)
def test_other_wrappers_are_refused_by_their_configuration(config: Any, reason: str | None) -> None:
    if reason is None:
        check_config(config())
        return
    with pytest.raises(UserError, match=re.escape(reason)):
        check_config(config())


def named(model_type: str, name: str) -> Any:
    config = shrunk(model_type)
    config.architectures = [name]
    return config


def with_text(model_type: str, text: str) -> Any:
    config = shrunk(model_type)
    config.text_config = shrunk(text)
    return config


def test_text_model_with_parameters_that_its_wrapper_lacks_is_refused(tmp_path: Path) -> None:
    with_text("llava", "phi").save_pretrained(tmp_path)  # a bias in its projection
    model, config = build(tmp_path), ModelConfig(str(tmp_path))
    with pytest.raises(UserError, match=r"lacks lm_head\.bias of its text model"):
        load.open_weights(model, tmp_path, config, 0)


def test_trainer_s_checkpoint_is_refused(tmp_path: Path) -> None:
    wrapper = tiny_wrapper("gemma3")
    wrapper.config.save_pretrained(tmp_path)
    dcp.save(wrapper.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    model, config = build(tmp_path), ModelConfig(str(tmp_path), weights=str(tmp_path / "dcp"))
    with pytest.raises(UserError, match="holds more than the text model"):
        load.open_weights(model, tmp_path, config, 0)


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_decide_where_wrapper_and_text_model_tie_otherwise(
    is_tied: bool, tmp_path: Path
) -> None:
    """As transformers does: Mistral Small 3 ties by its class's default, and stores both."""
    wrapper = tiny_wrapper("mistral3")
    assert (wrapper.config.tie_word_embeddings, wrapper.config.text_config.tie_word_embeddings) == (
        True,
        False,
    )
    if not is_tied:
        wrapper.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(wrapper.lm_head.weight))
    wrapper.save_pretrained(tmp_path)
    model, _ = read_text_model(tmp_path)
    ids = torch.arange(5, 25)[None]
    loaded = transformers.Mistral3ForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(model, ids), logits(loaded, ids), atol=1e-6, rtol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


def test_copy_of_a_tied_embedding_is_no_tower(tmp_path: Path) -> None:
    tiny_wrapper("gemma3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    files = load_file(path)
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    save_file({**files, head: files[embedding].clone()}, path, metadata={"format": "pt"})
    _, towers = read_text_model(tmp_path)
    assert not {embedding, head} & towers.others.keys()
    assert [t.name for t in towers.layout["model.embed_tokens.weight"]] == [embedding]
    save_file({**files, head: files[embedding] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="differ, but the model's configuration ties them"):
        read_text_model(tmp_path)


def test_a_changed_tower_changes_the_digest(tmp_path: Path) -> None:
    tiny_wrapper("gemma3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    _, before = read_text_model(tmp_path)
    digests = [before.digest_others(), before.digest()]
    assert before.digest_others((0, 2)) ^ before.digest_others((1, 2)) == digests[0]
    files = load_file(path)
    files["multi_modal_projector.mm_soft_emb_norm.weight"][3] += 1e-3
    save_file(files, path, metadata={"format": "pt"})
    _, after = read_text_model(tmp_path)
    assert after.digest_others() != digests[0] and after.digest() == digests[1]
