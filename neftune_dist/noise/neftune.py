"""`NEFTune(alpha).attach(model)`: the noise on any causal LM's input embedding, in any loop.

This module has the settings and their checks; `handle` has the forward hooks.
"""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from neftune_dist.noise.handle import NEFTuneHandle, check_alpha, counter_word
from neftune_dist.noise.law import NORMS


class NEFTune:
    """NEFTune's noise, exact under padding, packing, data parallelism and resume.

    Args:
        alpha: strength; the paper's best are 5, 10 and 15. 0: no noise, no hooks.
        seed: key of the generator, below 2^63. torch's own generators are neither read nor moved.
        stream: `rank`: every data-parallel rank draws its own noise, by step and micro-step.
            `sample`: the noise belongs to the document, on any rank and in any layout; say which
            documents a batch holds by `NEFTuneHandle.describe`.
        rank: data-parallel rank, the same on ranks that hold slices or copies of one batch (tensor
            or sequence parallelism); None: that of torch.distributed, else RANK, else 0.
        distribution: `uniform`, the paper's. `gaussian`, of the same variance. `symmetric`
            (SymNoise, arXiv 2312.01523): -1 or 1, so a norm of alpha; pass every batch forward
            twice, under `NEFTuneHandle.sign` 1 and -1.
        slices: process group of the ranks that hold the slices of this rank's sequences, equally
            long: a document's norm is then that of all of it, counted by the rank that has its
            first token. A collective of the group in every noised forward; describe every batch to
            the handle (`TokenLayout.take`).
        length: `document`: the law. `padded`: L is the length of the padded or packed row, and
            padding is noised as well, as by the widely copied hook, for comparison.

    Example::

        with NEFTune(5.0, seed=0).attach(model) as noise:
            for noise.step, batch in enumerate(batches):
                model(**batch).loss.backward()
    """

    def __init__(
        self,
        alpha: float,
        *,
        seed: int = 0,
        stream: str = "rank",
        rank: int | None = None,
        distribution: str = "uniform",
        length: str = "document",
        slices: ProcessGroup | None = None,
    ) -> None:
        check_alpha(alpha)
        for name, value, known in (
            ("stream", stream, ("rank", "sample")),
            ("distribution", distribution, tuple(NORMS)),
            ("length", length, ("document", "padded")),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known: {' or '.join(known)}.")
        if stream == "sample" and length == "padded":
            raise ValueError(
                "length='padded' noises the padding too, which belongs to no document: it goes "
                "with stream='rank'."
            )
        if slices is not None and length == "padded":
            raise ValueError(
                "length='padded' takes the length of the row, and slices hold parts of it: it goes "
                "with slices=None."
            )
        if slices is not None and stream == "rank" and rank is None:
            raise ValueError(
                "slices= needs rank=, the data-parallel rank: one for all ranks of that group."
            )
        self.seed = counter_word("seed", seed, 63)
        self.rank = None if rank is None else counter_word("rank", rank)
        self.alpha, self.stream = alpha, stream
        self.distribution, self.length, self.slices = distribution, length, slices

    def attach(self, model: nn.Module) -> NEFTuneHandle:
        """Put the noise on `model`, a transformers causal LM or a wrapper of one.

        Raises:
            ValueError: the model has no input embedding, or noise already, or the law does not
                cover it.
        """
        return NEFTuneHandle(self, model)
