"""Layout is not semantics: random settings, trained in random layouts.

    python -m tests.distributed.random_layouts SEED MINUTES

A case draws a family, what is trained and how, and two layouts. One replicated rank trains four
steps; the first layout must do the same, and the second, which continues from its checkpoint of
step 2. One line a case: what differs, by over 1e-5 of a loss or 3e-5 of a gradient's norm, or why
it was refused. Cases are the same for the same seed.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import tiny_model

STEPS, HALF = 4, 2
# None with ReLU: one sum that rounds to the other side of 0 changes a gradient by 1e-4.
FAMILIES = "llama qwen2 qwen3 gemma3_text gpt_neox phi3 olmoe gpt_oss cohere granite mistral"
EXPERTS = ("olmoe", "gpt_oss")
SCALED_LOGITS = ("cohere", "granite")  # of which the chunked loss knows nothing
BOUNDS = {"loss": 1e-5, "grad_norm": 3e-5, "noise_norm": 1e-5, "learning_rate": 0.0}
BOUNDS |= {"num_tokens": 0.0, "num_supervised_tokens": 0.0}
MEANINGS: dict[str, Sequence[Any]] = {
    "noise.alpha": (0, 5, 15),
    "noise.distribution": ("uniform", "gaussian", "symmetric"),
    "noise.schedule": ("constant", "linear", "cosine"),
    "noise.warmup_steps": (0, 2),
    "data.supervise": ("assistant", "last", "all"),
    "data.max_length": (40, 96),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.max_grad_norm": (0, 0.1, 1),
    "optim.weight_decay": (0, 0.1),
    "optim.warmup_steps": (0, 1, 3),
    "train.global_batch_size": (1, 3, 10, 17),
    "train.seed": (0, 5),
}
ADAPTERS = {
    "none": [],
    "lora": ["adapter.method=lora"],
    "rslora": ["adapter.method=lora", "adapter.scaling=rslora"],
    "dora": ["adapter.method=dora"],
}


@dataclass(frozen=True)
class Layout:
    """A number of ranks, and the settings of a layout."""

    ranks: int
    words: list[str]

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {' '.join(self.words)}"


def random_meaning(draw: random.Random, family: str) -> list[str]:
    """Settings of what is trained."""
    words = [f"{key}={draw.choice(values)}" for key, values in MEANINGS.items()]
    adapter = draw.choice(["none", *ADAPTERS])
    if adapter != "none":
        words += [*ADAPTERS[adapter], "adapter.rank=4", "adapter.alpha=8"]
        words += ["adapter.targets=all_but_experts"] * (family in EXPERTS)
    return [*words, "data.max_cut_fraction=1", f"checkpoint.every_steps={HALF}"]


def random_layout(draw: random.Random, family: str) -> Layout:
    """A layout that the family supports."""
    ranks, engine = (
        draw.choice((1, 2, 2, 3, 4)),
        draw.choice(("replicated", "fsdp2", "fsdp2", 1, 2, 3)),
    )
    name = engine if isinstance(engine, str) else "deepspeed"
    words = [f"engine.name={name}"]
    if name == "deepspeed":
        words.append(f"engine.zero_stage={engine}")
    if name == "fsdp2":
        kept = "sync_every=step", "sync_every=micro_batch", "reshard_after_forward=false"
        words.append(f"engine.{draw.choice(kept)}")
        words += ["engine.num_replicas=2"] * (ranks == 4 and draw.random() < 0.5)
    words += ["engine.offload=cpu"] * (name != "replicated" and draw.random() < 0.25)
    shared = ranks > 1 and draw.random() < 0.3
    if shared:
        words.append(f"engine.sequence_parallel={draw.choice((2, 4)) if ranks == 4 else ranks}")
    elif draw.random() < 0.3:
        attention = draw.choice(("auto", "sdpa", "eager"))
        words += ["data.packing=false", f"model.attention={attention}"]
    losses = ("auto", "plain") if family in SCALED_LOGITS else ("auto", "plain", "chunked")
    recomputed = draw.choice(("none", "none", "selective", "full"))
    words += [
        f"train.micro_batch_tokens={draw.choice((96, 128, 256, 1000))}",
        f"model.loss={draw.choice(losses)}",
        f"model.activation_checkpointing={recomputed}",
    ]
    return Layout(ranks, words)


class Case:
    """One family's model, rows and folder, and the settings of what is trained."""

    def __init__(self, folder: Path, config: Path, words: list[str]) -> None:
        self.folder, self.config, self.words = folder, config, words

    def train(self, name: str, layout: Layout) -> str:
        """Train into a folder; return why it was refused or failed."""
        words = [*self.words, *layout.words, f"run_dir={self.folder / name}"]
        done = tiny_model.run_forked("train", self.config, *words, ranks=layout.ranks)
        return f"exit code {done.returncode}: {done.stderr[-600:]}" if done.returncode else ""

    def records(self, name: str) -> list[dict[str, Any]]:
        """Records of the steps, the last with the held-out loss."""
        found = tiny_model.steps(self.folder / name)
        lines = (self.folder / name / "evaluations.jsonl").read_text().splitlines()
        return [*found[:-1], {**found[-1], "held_out_loss": json.loads(lines[-1])["held_out_loss"]}]

    def continue_from(self, name: str, other: str) -> None:
        """Give a run the checkpoint of another's step `HALF`."""
        half = Path("checkpoints") / f"step_{HALF:08d}"
        shutil.copytree(self.folder / other / half, self.folder / name / half)


def differences(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """What differs by more than its bound."""
    bad = [] if len(found) == len(expected) else [f"{len(found)} steps"]
    for one, other in zip(found, expected, strict=False):
        for key, bound in {**BOUNDS, "held_out_loss": 1e-5}.items():
            a, b = one.get(key), other.get(key)
            if a != b and (a is None or b is None or abs(a - b) > bound * abs(b)):
                bad.append(f"step {other['step']} {key} {a} for {b}")
    return bad


def outcome(case: Case, first: Layout, second: Layout) -> str:
    """What the two layouts did, in words."""
    plain = Layout(1, ["engine.name=replicated"])
    for name, layout, kept in (("plain", plain, 0), ("first", first, 0), ("second", second, HALF)):
        if kept:
            case.continue_from(name, "first")
        if why := case.train(name, layout):
            return f"{name}: {layout}: {why}"
        if bad := differences(case.records(name), case.records("plain")[kept:]):
            return f"DIFFERS {name}: {layout}: {'; '.join(bad[:4])}"
    return f"same: {first}; then {second}"


def main() -> None:
    seed, end = int(sys.argv[1]), time.monotonic() + 60 * float(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        number, configs = 0, {}
        while time.monotonic() < end:
            number += 1
            draw = random.Random(f"{seed} {number}")
            family = draw.choice(FAMILIES.split())
            if family not in configs:
                folder = Path(name, family)
                folder.mkdir()
                configs[family] = tiny_model.make_config(
                    folder,
                    make=lambda place, family=family: tiny_model.make_family(place, family),
                    train={"max_steps": STEPS},
                )
            words = random_meaning(draw, family)
            case = Case(Path(name, "case"), configs[family], words)
            layouts = random_layout(draw, family), random_layout(draw, family)
            print(f"{number} {family} {' '.join(words)}\n    {outcome(case, *layouts)}", flush=True)
            shutil.rmtree(case.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
