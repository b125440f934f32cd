"""The noise that a document receives, against its length, as a picture: this package, and
transformers' hook on padded and on packed rows. Every point is measured on an embedding.

usage: python tests/benchmarks/plot_noise.py OUTPUT.png
"""

from __future__ import annotations

import sys

import torch
import transformers
from matplotlib import pyplot
from noise_against_transformers import ALPHA, embedded, make_model, with_this, with_transformers

from neftune_dist.noise.law import expected_norm

ROW = 1024  # tokens, padded or packed
LENGTHS = (8, 16, 32, 64, 128, 256, 512)


def main(output: str) -> None:
    model = make_model()
    norms: dict[str, list[float]] = {}
    for length in LENGTHS:
        ids = torch.randint(0, 1000, (1, ROW))
        mask = (torch.arange(ROW) < length).long()[None]
        positions = (torch.arange(ROW) % length)[None]
        layouts = {"padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}
        for layout, inputs in layouts.items():
            clean = embedded(model.eval(), input_ids=ids, **inputs)
            for name, add in (("transformers' hook", with_transformers), ("this", with_this)):
                noised = add(model.train(), 0, input_ids=ids, **inputs)
                norm = float((noised - clean)[0, :length].norm())
                norms.setdefault(f"{name}, {layout}", []).append(norm)
    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(expected_norm(ALPHA), color="black", linewidth=1, linestyle=":", label="the paper")
    marks = {"this, padded": "o", "this, packed": "x", "padded": "s", "packed": "^"}
    for name, values in norms.items():
        mark = marks.get(name) or marks[name.split(", ")[1]]
        label = name.replace("this", "neftune_dist")
        axes.plot(LENGTHS, values, marker=mark, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_xlabel(f"tokens of the document (rows of {ROW:,})")
    axes.set_ylabel("L2 norm of its noise")
    axes.set_title(f"alpha {ALPHA:g}; transformers {transformers.__version__}", fontsize=10)
    axes.set_ylim(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1])
