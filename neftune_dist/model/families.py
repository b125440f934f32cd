"""Families of models: a table of their quirks, and the checks that refuse what would train wrongly.

That a family uses transformers' attention interface does not say that it keeps packed documents
apart (recurrent layers, ALiBi, chunks): so the table lists the families that pack, and a
test proves every row.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import UserError


@dataclass(frozen=True)
class Family:
    """The quirks of a family of models. A row without any is a plain Llama.

    Attributes:
        packs: packed documents compute what they compute alone. A test proves it for every row.
        learned_positions: a table of `max_position_embeddings` rows ends the longest document.
            Rotary positions have no end, but for those of `longest_document`.
        embedding_scale: attribute of the embedding module that holds the factor which it multiplies
            its lookup by; the first that it has.
        logits: setting of config.json that changes the logits after their projection.
        attention_cap: setting of config.json that caps the logits of attention.
    """

    packs: bool = True
    learned_positions: bool = False
    embedding_scale: tuple[str, ...] = ()
    logits: str | None = None
    attention_cap: str | None = None


# By transformers' model_type. To add a family, add its name here, or a row below where it has
# quirks: the tests take it up by its name. A quirk that one row names is looked for in every model,
# of a family without a row as well.
_WITHOUT_QUIRKS = """
    afmoe apertus arcee axk1 cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone4
    flex_olmo flint glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_oss helium hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 jais2 jetmoe llama longcat_flash mimo_v2_flash minimax_m2 ministral
    ministral3 mistral mixtral olmo olmo2 olmo3 olmoe persimmon phi phi3 qwen2 qwen2_moe qwen3
    qwen3_moe seed_oss smollm3 starcoder2 youtu
"""
FAMILIES: dict[str, Family] = {
    **{name: Family() for name in _WITHOUT_QUIRKS.split()},
    "cohere": Family(logits="logit_scale"),
    "cohere2": Family(logits="logit_scale"),
    "gemma": Family(embedding_scale=("scalar_embed_scale", "embed_scale")),
    "gemma2": Family(
        packs=False,
        embedding_scale=("scalar_embed_scale", "embed_scale"),
        logits="final_logit_softcapping",
        attention_cap="attn_logit_softcapping",
    ),
    "gemma3_text": Family(
        embedding_scale=("scalar_embed_scale", "embed_scale"),
        logits="final_logit_softcapping",  # null in the published ones, as is the cap
        attention_cap="attn_logit_softcapping",
    ),
    "gpt2": Family(learned_positions=True),
    "gpt_bigcode": Family(learned_positions=True),
    "granite": Family(logits="logits_scaling"),
    "granite_swa": Family(logits="logits_scaling"),
    "granitemoe": Family(logits="logits_scaling"),
    "granitemoe_swa": Family(logits="logits_scaling"),
    "granitemoeshared": Family(logits="logits_scaling"),
    "nanochat": Family(logits="final_logit_softcapping"),
    "opt": Family(learned_positions=True),
}
PACKING_FAMILIES = frozenset(name for name, family in FAMILIES.items() if family.packs)
EMBEDDING_SCALES = tuple(
    dict.fromkeys(name for family in FAMILIES.values() for name in family.embedding_scale)
)
# Multimodal wrappers, by model_type. They compute text as their text model alone does. To add one,
# add its name: `tests/unit/test_multimodal.py` proves it.
_WRAPPERS = """
    aria cohere_compass deepseek_vl deepseek_vl_hybrid exaone4_5 fuyu gemma3 gemma3n gemma4
    gemma4_unified glmasr got_ocr2 idefics2 idefics3 internvl janus kimi_k25 lfm2_vl lfm3_vl
    lighton_ocr llama4 llava llava_next llava_next_video llava_onevision minicpmv4_6
    minimax_m3_vl mistral3 moss_transcribe_diarize ovis2 qianfan_ocr qwen2_5_vl qwen2_audio
    qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_vl qwen4_exp smolvlm video_llama_3 video_llava
    vipllava voxtral
"""
_CLASSES = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
WRAPPERS = {name: str(_CLASSES[name]) for name in _WRAPPERS.split() if name in _CLASSES}
# Those that change their logits as their text model does; others leave that out.
_CHANGE_LOGITS = ("gemma3n", "gemma4", "gemma4_unified")
# Types of text models that have no class for causal language models, and the type that computes the
# same: they differ by rotary positions along several axes, which are equal for text.
_SAME_ON_TEXT = {"qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# Settings by which a model without `is_decoder` says that its tokens see later ones (XLM, XLNet).
_BIDIRECTIONAL = (("causal", False), ("attn_type", "bi"))
# Configurations within a configuration that describe the blocks (MPT, DBRX), not another model.
_PARTS_OF_BLOCKS = ("attn_config", "ffn_config")
_OTHER = {
    "cpmant": "they put learned prompt tokens before every document, which the noise and the loss "
    "here do not count",
    "phimoe": "their routers draw at random in training, so that another layout trains another "
    "model",
    "prophetnet": "padding changes what their tokens attend to, so that the layout would change "
    "what is trained",
}
# Their positions begin after that of padding, `pad_token_id`.
_AFTER_PADDING = """
    camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
"""
# Padding on the left changes what they compute: their positions count it, or their state holds it.
_NEVER_PADDED_LEFT = """
    bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart recurrent_gemma
    reformer rwkv trocr whisper
"""
_EAGER = ("gemma3n_text",)  # by sdpa, padding makes its gradient NaN
_LOGITS = sorted({family.logits for family in FAMILIES.values() if family.logits})
_CAPS = sorted({family.attention_cap for family in FAMILIES.values() if family.attention_cap})


def changed_logits(hf_config: Any) -> str | None:
    """The setting by which the model changes its logits after their projection, or None."""
    config = hf_config.get_text_config()
    return next((name for name in _LOGITS if getattr(config, name, None) is not None), None)


def caps_attention(hf_config: Any) -> bool:
    """Whether the model caps the logits of its attention, which only eager attention does."""
    return any(getattr(hf_config, name, None) is not None for name in _CAPS)


def needs_eager(hf_config: Any) -> bool:
    """Whether only eager attention computes a padded model as its documents one by one."""
    return caps_attention(hf_config) or hf_config.model_type in _EAGER


def context_length(hf_config: Any) -> int | None:
    """Tokens that the model's positions were made for, or None where config.json says nothing."""
    length = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return length if length and length > 0 else None  # XLNet's -1: without end


def text_config(hf_config: Any) -> Any:
    """The configuration of a wrapper's text model, for a class for causal language models."""
    text = copy.deepcopy(hf_config.get_text_config())
    if text.model_type not in _SAME_ON_TEXT:
        return text
    settings = text.to_dict()
    settings["model_type"] = _SAME_ON_TEXT[text.model_type]
    settings["tie_word_embeddings"] = hf_config.tie_word_embeddings
    for name in [name for name in settings["rope_parameters"] if name.startswith("mrope")]:
        del settings["rope_parameters"][name]
    return transformers.AutoConfig.for_model(**settings)


def check_config(hf_config: Any) -> None:
    """Raise `UserError` where config.json describes another kind of model than is trained here."""
    if hf_config.model_type in WRAPPERS:
        _check_wrapper(hf_config)
        hf_config = text_config(hf_config)
    if reason := _why_other(hf_config):
        raise UserError(f"Models of type {hf_config.model_type} are not trained here: {reason}.")
    if getattr(hf_config, "num_hidden_layers", 1) == 0:
        raise UserError("config.json describes a model without layers (num_hidden_layers=0).")
    if getattr(hf_config, "output_router_logits", False):
        raise UserError(
            "config.json asks for a loss that balances the experts (output_router_logits), which "
            "depends on how documents are laid out: it is not computed here; set "
            "output_router_logits to false there."
        )


def _check_wrapper(hf_config: Any) -> None:
    """Raise `UserError` where text is computed otherwise than by the text model alone."""
    kind = hf_config.model_type
    expected = WRAPPERS[kind]
    named = (hf_config.architectures or [expected])[0]
    if named != expected:
        raise UserError(
            f"config.json names the class {named}: of the wrappers of type {kind}, {expected} "
            "alone is known to compute text as the text model inside it."
        )
    setting = changed_logits(hf_config)
    if setting and kind not in _CHANGE_LOGITS:
        raise UserError(
            f"{expected} leaves out {setting}, by which its text model "
            f"({hf_config.get_text_config().model_type}) changes its logits: trained alone, that "
            "would be another model."
        )


def _why_other(hf_config: Any) -> str | None:
    """The reason why this is no plain causal language model, or None."""
    parts = [
        name
        for name in getattr(hf_config, "sub_configs", {})
        if getattr(hf_config, name, None) is not None and name not in _PARTS_OF_BLOCKS
    ]
    if parts:
        found = f"config.json describes several models in one ({', '.join(sorted(parts))})"
        known = f". The text model is trained of those of type {', '.join(WRAPPERS)}"
        return found + (known if "text_config" in parts else "")
    if getattr(hf_config, "is_encoder_decoder", False):
        return "they are an encoder and a decoder, no causal language model"
    is_remote = "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {})
    if not is_remote and type(hf_config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of that type"
    for name, value in _BIDIRECTIONAL:
        if getattr(hf_config, name, None) == value:
            return f"tokens attend to later ones ({name}={value})"
    if "index_topk" in hf_config.to_dict():  # DeepSeek-V3.2 and its like, measured
        return (
            "by their sparse attention (index_topk) a token attends to others in a padded batch "
            "than in its document alone, so that the layout would change what is trained"
        )
    return _OTHER.get(hf_config.model_type)


def check_packable(hf_config: Any) -> None:
    """Raise `UserError` unless the model's packed documents compute what they compute alone."""
    if caps_attention(hf_config):
        raise UserError(
            f"The model ({hf_config.model_type}) caps its attention logits, which packed attention "
            "does not do: set data.packing=false model.attention=eager."
        )
    if hf_config.model_type not in PACKING_FAMILIES:
        raise UserError(
            f"Models of type {hf_config.model_type} are not known to keep packed documents apart: "
            f"set data.packing=false. Those that do: {', '.join(sorted(PACKING_FAMILIES))}."
        )


def check_model(model: Any, packing: bool) -> None:
    """Raise `UserError` where training would silently be that of another kind of model."""
    name = type(model).__name__
    if packing:
        check_packable(model.config)
        if not type(model).__module__.startswith("transformers."):
            raise UserError(
                f"{name} is code of its own, which is not known to keep packed documents apart: "
                "set data.packing=false."
            )
    elif needs_eager(model.config) and attention_name(model) != "eager":
        why = "caps its attention logits" if caps_attention(model.config) else "is padded"
        raise UserError(
            f"{name} {why}, rightly by eager attention alone: set model.attention=eager."
        )
    causal = {
        place: module.is_causal
        for place, module in model.named_modules()
        # A decoder masks later tokens itself, and without an encoder passes over attention to one.
        if isinstance(vars(module).get("is_causal"), bool) and not vars(module).get("is_decoder")
    }
    if other := [place for place, is_causal in causal.items() if not is_causal]:
        raise UserError(
            f"{name} is not trained here: its attention in {other[0]} is not causal by its own "
            "word (is_causal=False), so that a token may see later ones."
        )
    if not causal and not getattr(model.config, "is_decoder", True):
        raise UserError(
            f"{name} is not trained here: its tokens attend to later ones (is_decoder=False in "
            "config.json)."
        )
    dropped = [d for m in model.modules() if (d := vars(m).get("layerdrop"))]
    if dropped:
        raise UserError(
            f"{name} leaves out whole blocks at random, other ones on each rank "
            f"(layerdrop={dropped[0]}): set layerdrop to 0 in its config.json."
        )
    if getattr(model.config, "rescale_every", 0) > 0:
        raise UserError(
            f"{name} divides its weights while it is evaluated, and a checkpoint could hold them "
            "so: set rescale_every to 0 in its config.json."
        )
    saved = model.state_dict().keys()
    tables = [
        buffer
        for buffer, content in model.named_buffers()
        if buffer in saved and not content.is_floating_point()
    ]
    if tables:
        raise UserError(
            f"{name} keeps tables of integers beside its parameters, which are not read: "
            f"{', '.join(tables[:3])}."
        )


def longest_document(hf_config: Any) -> int | None:
    """The greatest number of tokens in a document that every layout computes alike; None: any.

    Past it there are no position embeddings, or the rotary frequencies change with the longest
    document of the batch, so that the layout would decide the result of a shorter one.
    """
    config, last = hf_config.get_text_config(), context_length(hf_config)
    rope = getattr(config, "rope_parameters", None)
    family = FAMILIES.get(config.model_type)
    if last:
        last -= first_position(config)
    if not rope or (family and family.learned_positions):
        return last
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    limits = [
        kind.get("original_max_position_embeddings", last)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((n for n in limits if n is not None), default=None)


def first_position(hf_config: Any) -> int:
    """The position of a document's first token."""
    is_later = hf_config.model_type in _AFTER_PADDING.split()
    return int(hf_config.pad_token_id) + 1 if is_later else 0


def answers_in_batches(hf_config: Any) -> bool:
    """Whether a prompt that is padded on the left is answered as it is alone."""
    is_own_code = not type(hf_config).__module__.startswith("transformers.")
    return not is_own_code and hf_config.model_type not in _NEVER_PADDED_LEFT.split()


def check_lengths(hf_config: Any, longest: int) -> None:
    """Raise `UserError` if a document of `longest` tokens is past `longest_document`."""
    limit = longest_document(hf_config)
    if limit is not None and longest > limit:
        raise UserError(
            f"The longest document has {longest} tokens, and the model takes {limit} at most: set "
            f"data.max_length={limit}."
        )
