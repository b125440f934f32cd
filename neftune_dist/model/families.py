"""Which models are trained as they should be, whatever the layout; the others are refused at once.

That a family uses transformers' attention interface does not say that it keeps packed documents
apart (recurrent layers, attention sinks, chunks): the families that pack are a list, and a test
proves each entry.
"""

from __future__ import annotations

from typing import Any

from neftune_dist.compat.transformers import attention_name
from neftune_dist.config import UserError

# transformers' model_type of the families whose packed documents compute what they compute alone.
PACKING_FAMILIES = frozenset(
    {
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "granite",
        "helium",
        "hunyuan_v1_dense",
        "llama",
        "ministral",
        "mistral",
        "olmo",
        "olmo2",
        "olmo3",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)


def check_packable(hf_config: Any) -> None:
    """Raise `UserError` unless packed documents compute in the family what they compute alone."""
    if _caps_attention(hf_config):
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
    """Raise `UserError` if training this model would silently be something else."""
    name = type(model).__name__
    if packing:
        check_packable(model.config)
        if not type(model).__module__.startswith("transformers."):
            raise UserError(
                f"{name} is code of its own, which is not known to keep packed documents apart: "
                "set data.packing=false."
            )
    elif _caps_attention(model.config) and attention_name(model) != "eager":
        raise UserError(f"{name} caps its attention logits: set model.attention=eager.")
    causal = {m.is_causal for m in model.modules() if isinstance(m.__dict__.get("is_causal"), bool)}
    decoder = getattr(model.config, "is_decoder", True)
    if False in causal or (not causal and not decoder):
        raise UserError(
            f"{name} lets tokens see later ones, or other inputs than text: it is no plain causal "
            "language model."
        )
    saved = model.state_dict().keys()
    state = [buffer for buffer, _ in model.named_buffers() if buffer in saved]
    if state:
        raise UserError(
            f"{name} keeps state that is no parameter, which is neither trained nor checkpointed: "
            f"{', '.join(state[:3])}."
        )


def longest_document(hf_config: Any) -> int | None:
    """Most tokens of a document that the model computes as it should; None: any number.

    Past it there are no position embeddings, or the rotary frequencies change with the longest
    document of the batch, so that the layout would decide what a shorter one computes.
    """
    config = hf_config.get_text_config()
    last: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return last
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    limits = [
        kind.get("original_max_position_embeddings", last)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min((n for n in limits if n is not None), default=None)


def check_lengths(hf_config: Any, longest: int) -> None:
    """Raise `UserError` if a document of `longest` tokens is past `longest_document`."""
    limit = longest_document(hf_config)
    if limit is not None and longest > limit:
        raise UserError(
            f"The longest document has {longest} tokens, and the model takes {limit} at most: set "
            f"data.max_length={limit}."
        )


def _caps_attention(hf_config: Any) -> bool:
    return getattr(hf_config, "attn_logit_softcapping", None) is not None
