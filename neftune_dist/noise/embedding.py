"""A model's input embedding inside its wrappers, and the properties of it that the noise needs.

Raises `ValueError` for a model without an input embedding, and for an embedding that does more than
look up and scale.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from neftune_dist.compat.torch import compiled_module, is_replica
from neftune_dist.model.families import EMBEDDING_SCALES


def innermost(model: nn.Module) -> nn.Module:
    """The model without the wrappers that call it (torch.compile, DDP, DeepSpeed)."""
    if isinstance(model, nn.DataParallel) or is_replica(model):
        raise ValueError(
            "nn.DataParallel copies the model for every pass, and the noise's hooks with it: start "
            "one process a GPU (torchrun) instead."
        )
    inner = compiled_module(model)
    if inner is None and not hasattr(type(model), "get_input_embeddings"):
        inner = getattr(model, "module", None)
    return innermost(inner) if isinstance(inner, nn.Module) else model


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that looks up the tokens' embeddings."""
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder and a decoder: NEFTune is for causal models.")
    accessor = getattr(model, "get_input_embeddings", None)
    embedding = accessor() if accessor is not None else None
    if not isinstance(embedding, nn.Module):
        raise ValueError(
            f"{name} has no get_input_embeddings(): NEFTune cannot tell which layer embeds the "
            "tokens."
        )
    return embedding


def check_embedding(embedding: nn.Module) -> None:
    """Refuse an embedding module with a norm inside (Inkling's).

    A norm that follows the module (Bloom's) is fine: the noise is added before it, at its size
    relative to the embedding.
    """
    if any("norm" in type(module).__name__.lower() for module in embedding.modules()):
        raise ValueError(
            f"{type(embedding).__name__} normalises what it looks up: after it NEFTune's noise "
            "would have another size relative to the embedding than the paper's."
        )


def embedding_scale(embedding: nn.Module) -> float:
    """The factor that the embedding multiplies its lookup by; 1 for most families. PEFT wraps the
    module that has it."""
    modules = list(embedding.modules())
    held = (getattr(m, name) for m in modules for name in EMBEDDING_SCALES if hasattr(m, name))
    return float(next(held, 1.0))


def padding_token(model: nn.Module) -> int | None:
    """The model's `pad_token_id`, or None."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    token = getattr(text, "pad_token_id", None)
    return token if isinstance(token, int) else None


def local_activation(output: Tensor) -> Tensor:
    """This process's tensor of an embedding's output, which may be a DTensor.

    Raises:
        ValueError: the DTensor is sharded or a partial sum.
    """
    if not isinstance(output, DTensor):
        return output
    if not all(isinstance(placement, Replicate) for placement in output.placements):
        raise ValueError(
            f"The input embedding gives {output.placements}: NEFTune needs whole activations "
            "after it (output_layouts=Replicate())."
        )
    return output.to_local()
