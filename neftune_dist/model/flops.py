"""Floating-point operations of a training step, and the peak rates of GPUs.

Convention: 2 operations for a multiply-add; the backward counts twice the forward; recomputation
under activation checkpointing is not counted. Weights: 6 per token and matrix parameter, 4 where it
is frozen (the embedding lookup is free; the output projection counts for every token; of a layer's
experts, those that a token chooses). Attention: causal, over each document's own tokens: 6 * layers
* width * L^2 for a document of L tokens.

Beside it stands `6 N`: 6 per token and active parameter (4 where it is frozen), embedding and all,
and nothing for attention. It is what most others report, and the figure to compare with theirs.
"""

from __future__ import annotations

import functools
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neftune_dist.model.adapters import plain_name, plain_shapes
from neftune_dist.model.modules import own_parameters, stacks_experts

# By words of the device's name; the first row whose words are in the name counts. FLOP/s from the
# vendors' data sheets: bf16 on tensor cores, dense, and fp32 without tensor cores. GiB that a
# process can allocate, rounded down: less than the name says, for error correction and the driver.
_GPUS = {
    "B200": (2250e12, None, 178),
    "GB200": (2250e12, None, 184),
    "H200": (989e12, 67e12, 139),
    "GH200": (989e12, 67e12, 94),
    "H100 PCIe": (756e12, 51e12, 79),
    "H100 NVL": (835e12, 60e12, 93),
    "H100": (989e12, 67e12, 79),
    "A100 40GB": (312e12, 19.5e12, 39),
    "A100": (312e12, 19.5e12, 79),
    "L40S": (362e12, None, 44),
    "A10": (125e12, None, 22),
}


@dataclass(frozen=True)
class ModelSize:
    """The sizes that the cost of a model depends on.

    Attributes:
        num_parameters: all, tied ones once.
        num_matrix_parameters: those of matrices that multiply a token's activations.
        num_trained, num_trained_matrix: of these two, the trained ones.
        num_layers: transformer blocks.
        attention_width: num_heads * head_dim; 0 for a recurrent model.
        num_idle, num_trained_idle: parameters, and trained ones, of the experts that a token does
            not choose.
    """

    num_parameters: int
    num_matrix_parameters: int
    num_trained: int
    num_trained_matrix: int
    num_layers: int
    attention_width: int
    num_idle: int = 0
    num_trained_idle: int = 0

    def in_words(self) -> str:
        """The number of parameters, for people."""
        words, active = f"{self.num_parameters / 1e6:.1f} M parameters", self.num_parameters
        if self.num_idle:
            active -= self.num_idle
            words += f", {active / 1e6:.1f} M of them active for a token"
        if self.num_trained < self.num_parameters:
            words += f", {self.num_trained / 1e6:.1f} M of them trained"
        return words

    @property
    def quadratic_tokens(self) -> float:
        """The length at which a document's attention costs as much as its matrix products."""
        if not self.attention_width:
            return math.inf
        return self._per_token / (6.0 * self.num_layers * self.attention_width)

    @property
    def _per_token(self) -> float:
        return 4.0 * self.num_matrix_parameters + 2.0 * self.num_trained_matrix

    def training_flops(self, num_tokens: int, sum_squared_lengths: int) -> float:
        """Operations of forward and backward over documents of these lengths."""
        weights = self._per_token * num_tokens
        attention = 6.0 * self.num_layers * self.attention_width * sum_squared_lengths
        return weights + attention

    def six_n_flops(self, num_tokens: int) -> float:
        """6 N D: operations by the convention that ignores attention and counts the lookup."""
        active = self.num_parameters - self.num_idle
        trained = self.num_trained - self.num_trained_idle
        return (4.0 * active + 2.0 * trained) * num_tokens


def model_size(model: Any) -> ModelSize:
    """Sizes of a transformers causal LM (on the meta device, too), before it is sharded."""
    config = model.config.get_text_config()
    shapes = plain_shapes(model)
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    active = _active_shares(model)
    sizes = []  # of each parameter: elements, active ones, whether they multiply, whether trained
    for name, parameter in model.named_parameters():
        shape = shapes.get(plain_name(name), tuple(parameter.shape))  # in 4 bits it is another
        numel, (chosen, experts) = math.prod(shape), active.get(id(parameter), (1, 1))
        is_head = head is not None and parameter is head.weight
        dims = len(shape) - (experts > 1)  # experts' matrices and biases are stacked
        multiplies = is_head or (dims >= 2 and id(parameter) not in tables)
        sizes.append((numel, numel // experts * chosen, multiplies, parameter.requires_grad))
    return ModelSize(
        num_parameters=sum(n for n, *_ in sizes),
        num_matrix_parameters=sum(n for _, n, multiplies, _ in sizes if multiplies),
        num_trained=sum(n for n, _, _, trained in sizes if trained),
        num_trained_matrix=sum(n for _, n, multiplies, trained in sizes if multiplies and trained),
        num_layers=config.num_hidden_layers,
        attention_width=_attention_width(config),
        num_idle=sum(n - used for n, used, *_ in sizes),
        num_trained_idle=sum(n - used for n, used, _, trained in sizes if trained),
    )


def _active_shares(model: Any) -> dict[int, tuple[int, int]]:
    """The experts that a token chooses and those that there are, by the id of a parameter that
    stacks them. A router and its experts lie in one module."""
    shares: dict[int, tuple[int, int]] = {}
    part: Any
    for module in model.modules():
        inside = [module, *module.children()]
        chosen = [m.top_k for m in inside if isinstance(getattr(m, "top_k", None), int)]
        for part in filter(stacks_experts, inside if chosen else []):
            for _, parameter in own_parameters(part):
                if parameter.shape[0] == part.num_experts:
                    shares[id(parameter)] = (chosen[0], part.num_experts)
    return shares


def _attention_width(config: Any) -> int:
    """num_heads * head_dim, of layers that differ (Gemma 4's) the rounded mean."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return round(sum(map(_width_of, layers)) / len(layers))


def _width_of(config: Any) -> int:
    heads: int = getattr(config, "num_attention_heads", 0)
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return heads * head_dim


def peak_flops(device_name: str, dtype: str) -> float | None:
    """A GPU's data-sheet rate in FLOP/s; None where it is not known."""
    for words, (bf16, fp32, _) in _GPUS.items():
        if re.search(rf"\b{words}\b", device_name):
            return bf16 if dtype == "bf16" else fp32
    return None


@functools.cache
def measured_flops(dtype: str) -> float:
    """The rate in FLOP/s at which this process multiplies matrices on its CPU threads: the best of
    some products, measured once for 0.1 s."""
    n = 1024
    matrix = torch.ones(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    best, began = math.inf, time.perf_counter()
    while (start := time.perf_counter()) < began + 0.1 or best == math.inf:
        matrix @ matrix
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def known_gpus() -> dict[str, int]:
    """The GPUs that `peak_flops` knows, by name: the memory of one in GiB."""
    return {name: memory_gib for name, (_, _, memory_gib) in _GPUS.items()}
