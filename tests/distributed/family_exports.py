"""Exports of every trained family, loaded by other versions of transformers.

    python -m tests.distributed.family_exports make FOLDER [TYPE ...]
    python tests/distributed/family_exports.py load FOLDER     by each version, the making one first

`make` trains the tiny models of `families` for one step and exports them, beside their bases.
`load` reads both by the class that config.json names (PYTHONPATH chooses the version), and prints
each export of which tensors were missing or left over that were not so of its base, or whose logits
are not those of the version that came first. It needs nothing but torch and transformers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

BOUND = 1e-4  # of logits, relative to the largest


def make(folder: Path, types: list[str]) -> None:
    """Make what is not there yet."""
    from neftune_dist.model.families import WRAPPERS
    from tests.distributed.families import SECTIONS, Make
    from tests.support import tiny_model
    from tests.support.shrunk import model_types

    for model_type in types or sorted({*model_types(), *WRAPPERS}):
        if (folder / model_type).exists():
            continue
        with tempfile.TemporaryDirectory() as name:
            place = Path(name)
            tiny_model.make_tokenizer(place / "model")
            rows = str(tiny_model.make_rows(place / "rows.jsonl", 8))
            sections = {
                **SECTIONS,
                "model": {"name_or_path": str(place / "model"), "dtype": "fp32"},
                "data": {**SECTIONS["data"], "source": rows, "packing": False},
                "train": {**SECTIONS["train"], "max_steps": 1},
                "engine": {"name": "replicated"},
                "run_dir": str(place / "run"),
            }
            config = place / "config.yaml"
            config.write_text(json.dumps(sections))
            made = Make(model_type, place / "model")
            done = tiny_model.run_forked("train", config, before=made)
            if not done.returncode:
                done = tiny_model.run_forked("export", place / "run")
            if done.returncode:
                print(model_type, done.returncode, *done.stderr.splitlines()[-1:], flush=True)
                continue
            for part in (place / "model", place / "run" / "export"):
                shutil.copytree(part, folder / model_type / part.name)
            print(model_type, "made", flush=True)


def load(folder: Path) -> None:
    """Load all that were made."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts = {"the same": 0, "other": 0}
    for place in sorted(folder.iterdir()):
        wrong, note = _compare(place)
        counts["other" if wrong else "the same"] += 1
        if wrong or note:
            print(place.name, wrong, note, flush=True)
    print(f"transformers {transformers.__version__}: {counts}")


def _compare(place: Path) -> tuple[str, str]:
    """What is wrong with an export in this version, and whether the base is as wrong."""
    found: dict[str, tuple[torch.Tensor | None, set[str], str]] = {}
    for part in ("model", "export"):
        try:
            found[part] = (*_read(place / part), "")
        except Exception as error:  # whatever a version makes of a file
            found[part] = (None, set(), f"{type(error).__name__}: {error}".splitlines()[0][:200])
    differences = []
    for part, (logits, _, _) in found.items():
        first = place / f"{part}.pt"
        if logits is not None and not first.exists():
            torch.save(logits, first)
        expected = torch.load(first) if first.exists() else None
        if logits is None or expected is None:
            differences.append(float("nan"))
        else:
            differences.append(float((logits - expected).abs().max() / expected.abs().max()))
    (_, base_keys, base_error), (_, keys, error) = found["model"], found["export"]
    of_base, own = differences
    wrong = error or " ".join(sorted(keys - base_keys)[:4])
    if not wrong and not own < BOUND:
        wrong = f"logits differ by {own:.1e}"
    note = f"(base: {base_error or f'{of_base:.1e}'} {' '.join(sorted(base_keys)[:4])})"
    return wrong, note if wrong or base_error or base_keys else ""


def _read(folder: Path) -> tuple[torch.Tensor, set[str]]:
    """Logits, and the names of tensors that were missing, left over or of another shape."""
    named = json.loads((folder / "config.json").read_text()).get("architectures")
    kind: Any = getattr(transformers, named[0] if named else "AutoModelForCausalLM")
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    ids = torch.randint(5, 600, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    return logits, {f"{kind}:{key}" for kind, keys in info.items() for key in keys}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), sys.argv[3:])
    else:
        load(Path(sys.argv[2]))
