"""Every row of the table of families says what transformers' model of that family does.

That rows which pack do so is proven in `test_attention.py`, row by row.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from neftune_dist.config import UserError
from neftune_dist.model.families import (
    FAMILIES,
    changed_logits,
    check_config,
    check_model,
    context_length,
    longest_document,
)
from neftune_dist.model.optimizations import blocks
from neftune_dist.noise.embedding import embedding_scale
from tests.support.families import family
from tests.support.shrunk import shrunk

# Not from the table: a row that lost its quirk must fail.
LOGITS = {"logit_scale", "logits_scaling", "final_logit_softcapping"}
CAPS = {"attn_logit_softcapping"}
SCALES = ("scalar_embed_scale", "embed_scale")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_row_says_what_the_family_does(model_type: str) -> None:
    row, config = FAMILIES[model_type], family(model_type)
    assert {name for name in LOGITS if hasattr(config, name)} == {row.logits} - {None}
    assert {name for name in CAPS if hasattr(config, name)} == {row.attention_cap} - {None}
    assert context_length(config) == 64
    assert longest_document(config) == (64 if row.learned_positions else None)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings()
    assert tuple(name for name in SCALES if hasattr(embedding, name)) == row.embedding_scale
    expected = config.hidden_size**0.5 if row.embedding_scale else 1.0
    assert embedding_scale(embedding) == pytest.approx(expected)


def test_a_quirk_that_one_row_names_is_looked_for_in_every_model() -> None:
    for name in LOGITS:
        config = SimpleNamespace(model_type="new", **{name: 2.0})
        config.get_text_config = lambda config=config: config
        assert changed_logits(config) == name
    assert changed_logits(family("llama")) is None
    scaled = torch.nn.Embedding(3, 4)
    assert embedding_scale(scaled) == 1.0
    scaled.embed_scale = 3.0
    assert embedding_scale(scaled) == 3.0
    scaled.scalar_embed_scale = 2.0  # the number; the other one is rounded to the weight's dtype
    assert embedding_scale(scaled) == 2.0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("glm4v", "several models in one (text_config, vision_config)"),
        ("paligemma", "several models in one (text_config, vision_config)"),
        ("moshi", "several models in one (audio_encoder_config, depth_decoder_config)"),
        ("t5", "an encoder and a decoder"),
        ("bart", "an encoder and a decoder"),
        ("vit", "transformers has no causal language model of that type"),
        ("xlnet", "attend to later ones (attn_type=bi)"),
        ("xlm", "attend to later ones (causal=False)"),
        ("cpmant", "prompt tokens"),
        ("deepseek_v32", "sparse attention (index_topk)"),
        ("phimoe", "routers draw at random"),
    ],
)
def test_other_kinds_of_models_are_refused_by_what_they_are(model_type: str, reason: str) -> None:
    with pytest.raises(
        UserError, match=f"of type {model_type} are not trained here: .*{re.escape(reason)}"
    ):
        check_config(transformers.AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["bart", "whisper", "bigbird_pegasus"])
def test_decoders_without_their_encoder_are_not_refused(model_type: str) -> None:
    config = shrunk(model_type)
    config.is_decoder, config.is_encoder_decoder = True, False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    check_model(model, packing=False)


@pytest.mark.parametrize("model_type", ["llama", "mpt", "dbrx", "mamba", "rwkv", "gemma3_text"])
def test_plain_language_models_are_not_refused(model_type: str) -> None:
    check_config(transformers.AutoConfig.for_model(model_type))


@pytest.mark.parametrize(
    "model_type",
    ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xmod"],
)
def test_positions_that_begin_after_padding_end_earlier(model_type: str) -> None:
    config = shrunk(model_type)
    longest = longest_document(config)
    assert longest == config.max_position_embeddings - config.pad_token_id - 1
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        model(input_ids=torch.full((1, longest + 1), 7))


def test_blocks_left_out_at_random_are_refused() -> None:
    config = shrunk("biogpt")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    check_model(model, packing=False)
    model.biogpt.layerdrop = 0.1
    with pytest.raises(UserError, match=r"layerdrop=0\.1"):
        check_model(model, packing=False)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("biogpt", "BioGptDecoderLayer"),  # it names no blocks
        ("openai-gpt", "Block"),
        ("ctrl", "EncoderLayer"),
        ("mamba", "MambaBlock"),  # it names a part of them, too
        ("bert", "BertLayer"),  # it names the embeddings, too
    ],
)
def test_blocks_are_the_members_of_a_list(model_type: str, expected: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shrunk(model_type))
    assert [type(block).__name__ for block in blocks(model)] == [expected, expected]


def test_loss_that_balances_experts_is_refused() -> None:
    check_config(family("olmoe"))
    with pytest.raises(UserError, match="output_router_logits"):
        check_config(family("olmoe", output_router_logits=True))
