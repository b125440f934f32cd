"""The noise that a document really gets: transformers' NEFTune hook against this package's.

Both are put on the same embedding and see the same tokens; the figure is the L2 norm of what a
document's embeddings changed by, over the paper's expected value alpha / sqrt(3).

usage: python tests/benchmarks/noise_against_transformers.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from neftune_dist import NEFTune
from neftune_dist.noise.law import expected_norm

ALPHA, HIDDEN = 5.0, 1024


def make_model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    ).train()


def embedded(model: transformers.LlamaForCausalLM, **inputs: Tensor) -> Tensor:
    """What the first layer receives, (batch, sequence, hidden)."""
    seen: list[Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).clone()),
        with_kwargs=True,
    )
    model(**inputs)  # with gradients on: a pass without is no training pass, and gets no noise here
    hook.remove()
    return seen[0].detach()


def with_transformers(model: transformers.LlamaForCausalLM, rank: int, **inputs: Tensor) -> Tensor:
    # transformers' Trainer seeds every rank alike before it trains.
    transformers.set_seed(42)
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = ALPHA
    handle = embedding.register_forward_hook(neftune_post_forward_hook)
    try:
        return embedded(model, **inputs)
    finally:
        handle.remove()


def with_this(model: transformers.LlamaForCausalLM, rank: int, **inputs: Tensor) -> Tensor:
    with NEFTune(ALPHA, seed=42, rank=rank).attach(model):
        return embedded(model, **inputs)


def main() -> None:
    model = make_model()
    law = expected_norm(ALPHA)
    ids = torch.randint(0, 1000, (2, 512))
    mask = torch.zeros_like(ids)
    mask[0, :20] = mask[1, :] = 1
    packed = torch.randint(0, 1000, (1, 1024))
    positions = torch.arange(128).repeat(8)[None]

    def padded_document(add: Callable[..., Tensor]) -> Tensor:
        clean = embedded(model.eval(), input_ids=ids, attention_mask=mask)
        return (add(model.train(), 0, input_ids=ids, attention_mask=mask) - clean)[0]

    def packed_documents(add: Callable[..., Tensor], rank: int = 0) -> Tensor:
        clean = embedded(model.eval(), input_ids=packed, position_ids=positions)
        return add(model.train(), rank, input_ids=packed, position_ids=positions) - clean

    print(f"{'':52}{'transformers':>14}{'neftune_dist':>14}")
    for text, figure in (
        (
            "20 tokens padded to 512: norm / law",
            lambda add: float(padded_document(add)[:20].norm()) / law,
        ),
        (
            "the 492 padding tokens: norm / law",
            lambda add: float(padded_document(add)[20:].norm()) / law,
        ),
        (
            "8 documents of 128 packed: norm of the first / law",
            lambda add: float(packed_documents(add)[0, :128].norm()) / law,
        ),
        (
            "share of equal draws on ranks 0 and 1",
            lambda add: float(
                (packed_documents(add, 0) == packed_documents(add, 1)).float().mean()
            ),
        ),
    ):
        print(f"{text:52}{figure(with_transformers):14.3f}{figure(with_this):14.3f}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, alpha {ALPHA}")


if __name__ == "__main__":
    main()
