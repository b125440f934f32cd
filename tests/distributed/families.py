"""Every causal language model of transformers and every wrapper whose text model is trained, tiny:
trained exactly, or refused by one sentence.

usage: python -m tests.distributed.families RESULTS [--engines fsdp2 zero-3 ...] [--types T ...]
       python -m tests.distributed.families OTHER --packed     those that pack, packed: another file
                                     [--engines compiled]      in two minutes a family, compiled
       python -m tests.distributed.families RESULTS --render FILE

Each model has random weights, is trained three steps with noise by `train` and compared with
`support.reference_loop`: losses and gradients' norms to 1e-5, logits of its `export` to 1e-4, and
the export's tensors with those that transformers saves. Every part of it is a process with a time
limit: a crash or a hang is a row of the table. RESULTS has one JSON line a family and engine; what
it holds already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from neftune_dist.model.families import PACKING_FAMILIES, WRAPPERS
from neftune_dist.model.load import stored_buffers
from tests.support import reference_loop, tiny_model
from tests.support.shrunk import model_types, shrunk

ENGINES = {
    "replicated": (1, ["engine.name=replicated"]),
    "fsdp2": (2, ["engine.name=fsdp2"]),
    "zero-3": (2, ["engine.name=deepspeed", "engine.zero_stage=3"]),
    "compiled": (1, ["engine.name=fsdp2", "model.compile=true"]),
}
LOSS_BOUND, LOGITS_BOUND = 1e-5, 1e-4
_SECONDS = 90  # of one process
# From the best to the worst.
_WORST = ("exact", "rounding", "refused", "not built", "not causal", "differs", "crashed", "hung")
SECTIONS: dict[str, dict[str, Any]] = {
    # A large epsilon: where a gradient is rounding alone, Adam would step by its sign.
    "optim": {"learning_rate": 1e-2, "epsilon": 1e-3, "warmup_steps": 0, "weight_decay": 0.1},
    "data": {"num_held_out": 0, "max_length": 64},
    "train": {"global_batch_size": 6, "micro_batch_tokens": 192, "max_steps": 3},
}


@dataclass(frozen=True)
class Result:
    """What became of a family under an engine.

    Attributes:
        outcome: `exact`; `rounding`, where the difference is at most twice that of the plain loop
            from itself in float64 (an ill-conditioned tiny model); `differs`; `not causal`
            (trained all the same); `refused`; `crashed`; `hung`; `not built`, where transformers
            itself cannot make or run the tiny model.
        sentence: of a refusal or a crash.
        difference: the greatest relative one of losses and gradients' norms.
        logits: the greatest one of the export's logits, relative to the largest logit.
        names: tensors that transformers saves and the export lacks (-), the other way round (+),
            or whose content differs (!).
    """

    model_type: str
    model_class: str
    engine: str
    outcome: str
    sentence: str = ""
    difference: float | None = None
    logits: float | None = None
    names: str = ""


@dataclass(frozen=True)
class Make:
    """Save the tiny model, beside the tokenizer that is there."""

    model_type: str
    folder: Path

    def __call__(self) -> None:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        config = shrunk(self.model_type)
        config.save_pretrained(self.folder)
        if self.model_type in WRAPPERS:
            model = getattr(transformers, WRAPPERS[self.model_type])(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() < 2:  # norms of exactly 1, biases of 0 would hide mistakes
                    parameter.add_(0.05 * torch.randn_like(parameter))
            for name, buffer in stored_buffers(model):  # routers' biases of 0 would, too
                if "bias" in name and buffer.is_floating_point():
                    buffer.add_(0.05 * torch.rand_like(buffer))
        model.save_pretrained(self.folder)
        if model.config.model_type != self.model_type:  # of the text model inside a wrapper
            shrunk(self.model_type).save_pretrained(self.folder)


@dataclass(frozen=True)
class Reference:
    """Train by the plain loop; keep its records, its logits and its tensors."""

    config: Path
    dtype: torch.dtype = torch.float32

    def __call__(self) -> None:
        warnings.simplefilter("ignore")
        config = reference_loop.load_config(self.config)
        name = config.model.name_or_path
        model = _load(name, self.dtype)
        records = reference_loop.train(model, config)
        folder = _reference(self.config, self.dtype)
        folder.mkdir()
        logits = _logits(model)
        torch.save(logits, folder / "logits.pt")
        if not torch.allclose(_logits(model, last=7)[:, :-1], logits[:, :-1], atol=1e-5):
            (folder / "not_causal").touch()
        model.save_pretrained(folder / "saved")
        (folder / "records.json").write_text(json.dumps(records))


@dataclass(frozen=True)
class Compare:
    """The export's logits and tensors against those of `Reference`."""

    folder: Path
    export: Path

    def __call__(self) -> None:
        warnings.simplefilter("ignore")
        exported = _load(self.export)
        expected, found = torch.load(self.folder / "logits.pt"), _logits(exported)
        difference = _relative(found, expected)
        saved, own = _tensors(self.folder / "saved"), _tensors(self.export)
        lacking = [f"-{name}" for name in saved if name not in own]
        further = [f"+{name}" for name in own if name not in saved]
        other = [
            f"!{name}"
            for name in saved
            if name in own and not torch.allclose(saved[name], own[name], rtol=1e-3, atol=1e-4)
        ]
        names = " ".join([*lacking[:2], *further[:2], *other[:2]])
        (self.export / "compared.json").write_text(json.dumps([difference, names]))


def _reference(config: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Where `Reference` keeps what it finds."""
    return config.parent / str(dtype).removeprefix("torch.")


def _load(name: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, or the wrapper that config.json names."""
    kind = WRAPPERS.get(transformers.AutoConfig.from_pretrained(name).model_type)
    made = getattr(transformers, kind) if kind else transformers.AutoModelForCausalLM
    return made.from_pretrained(name, dtype=dtype, attn_implementation="eager")


def _logits(model: Any, last: int = 5) -> torch.Tensor:
    ids = torch.randint(5, 600, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[0, -1] = last
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The greatest difference, relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def run_family(
    model_type: str, engines: Sequence[str], tokenizer: Path, packing: bool = False
) -> Iterable[Result]:
    """Train one family under engines; the reference is made once, when it is needed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        for file in tokenizer.iterdir():
            (model / file.name).write_bytes(file.read_bytes())
        problem = _call(Make(model_type, model))
        if not (model / "config.json").exists():
            assert problem is not None
            yield Result(model_type, "", "", "not built", problem[1])
            return
        kind = WRAPPERS.get(model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        config = folder / "config.yaml"
        sections = {
            "model": {"name_or_path": str(model), "dtype": "fp32"},
            "noise": {"alpha": 5.0, "stream": "sample"},
            "logging": {"progress": False},
            **SECTIONS,
        }
        sections["data"] |= {
            "source": str(tiny_model.make_rows(folder / "rows.jsonl", 24)),
            "cache_dir": str(folder / "cache"),
            "packing": packing,
        }
        config.write_text(json.dumps(sections))
        for engine in engines:
            yield _run_engine(model_type, kind, engine, config)


def _run_engine(model_type: str, kind: str, engine: str, config: Path) -> Result:
    folder = config.parent
    run, export = folder / engine, folder / f"{engine}_export"
    ranks, words = ENGINES[engine]
    problem = _verb("train", config, f"run_dir={run}", *words, ranks=ranks)
    if problem and problem[0] == "refused":
        return Result(model_type, kind, engine, *problem)
    plain = _reference(config)
    if not (plain / "records.json").exists():
        without = _call(Reference(config))
        if without:
            return Result(model_type, kind, engine, "not built", f"plain loop: {without[1]}")
    if problem:
        return Result(model_type, kind, engine, *problem)
    expected = json.loads((plain / "records.json").read_text())
    difference = _difference(tiny_model.steps(run), expected)
    problem = _verb("export", run, "--output", export) or _call(Compare(plain, export))
    if problem:
        return Result(model_type, kind, engine, problem[0], f"export: {problem[1]}", difference)
    logits, names = json.loads((export / "compared.json").read_text())
    outcome = "exact"
    if difference >= LOSS_BOUND or logits >= LOGITS_BOUND:
        own_difference, own_logits = _rounding(config, expected)
        # Ours and the plain loop's in float32 are each that far from the exact ones.
        is_rounding = difference <= 2 * own_difference and logits <= 2 * own_logits
        outcome = "rounding" if is_rounding else "differs"
    if (plain / "not_causal").exists():
        outcome = "not causal"
    return Result(model_type, kind, engine, outcome, "", difference, logits, names)


def _difference(records: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """The greatest relative difference of losses and gradients' norms."""
    return max(
        abs(one[key] / other[key] - 1) if one[key] is not None else math.inf
        for one, other in zip(records, expected, strict=True)
        for key in ("loss", "grad_norm")
    )


def _rounding(config: Path, expected: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """What the plain loop, of records and logits, differs by from itself in float64."""
    exact = _reference(config, torch.float64)
    if not exact.exists() and _call(Reference(config, torch.float64)):
        return 0.0, 0.0
    logits = [torch.load(folder / "logits.pt") for folder in (_reference(config), exact)]
    return (
        _difference(expected, json.loads((exact / "records.json").read_text())),
        _relative(*logits),
    )


def _verb(*words: object, ranks: int = 1) -> tuple[str, str] | None:
    return _problem(tiny_model.Forked(*words, ranks=ranks, seconds=_SECONDS))


def _call(function: Any) -> tuple[str, str] | None:
    return _problem(tiny_model.Forked(before=function, seconds=_SECONDS))


def _problem(started: tiny_model.Forked) -> tuple[str, str] | None:
    """None after exit code 0, else outcome and sentence."""
    try:
        done = started.wait(grace_seconds=5)
    except AssertionError:
        return "hung", f"no end within {_SECONDS} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {done.returncode}, no message"
    if done.returncode == 0:
        return None
    if done.returncode == 2 and "Traceback" not in done.stderr:
        said = [line for line in lines if line.startswith("neftune-dist")]
        return "refused", " | ".join(said or [last]).removeprefix("neftune-dist: ")
    return "crashed", next((ln for ln in reversed(lines) if "Error" in ln), last)[:300]


def render(results: Sequence[Result]) -> str:
    """The table, in Markdown."""
    of_type: dict[str, list[Result]] = {}
    for result in results:
        of_type.setdefault(result.model_type, []).append(result)
    counts = Counter(_summary(found)[0] for found in of_type.values())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        "# Every causal language model of transformers, and trained wrappers, tiny",
        "",
        "`python -m tests.distributed.families RESULTS`, then the same with `--render`",
        f"({date.today().isoformat()}, {versions}, CPU); the suite runs a sample",
        "([test_families.py](test_families.py)). Padded, noise on, three steps, against the",
        "plain loop: `replicated` on one rank, `fsdp2` and `zero-3` on two. Differences are the",
        "greatest of all engines, relative: of loss and gradient's norm, of the export's logits.",
        "",
        *(f"- {outcome}: {number}" for outcome, number in counts.most_common()),
        "",
        "`exact`: to 1e-5 and 1e-4. `rounding`: above that, at most twice the difference of the",
        "plain loop in float32 from itself in float64. `differs`: more than that. `not built`:",
        "transformers makes or runs no such tiny model itself. Gemma 3n (which needs timm): the",
        "plain loop decays tables of its towers, which are frozen here.",
        "",
        "| type | class | result | loss, norm | logits | |",
        "|---|---|---|---:|---:|---|",
    ]
    for model_type in sorted(of_type):
        found = of_type[model_type]
        outcome, note = _summary(found)
        worst = [
            max((v for r in found if (v := getattr(r, key)) is not None), default=None)
            for key in ("difference", "logits")
        ]
        figures = " | ".join("" if value is None else f"{value:.1e}" for value in worst)
        lines.append(f"| {model_type} | {found[0].model_class} | {outcome} | {figures} | {note} |")
    return "\n".join(lines) + "\n"


def _summary(found: Sequence[Result]) -> tuple[str, str]:
    """A family's outcome under the engines together, and what there is to say."""
    outcomes = [result.outcome for result in found]
    worst = max(outcomes, key=_WORST.index)
    notes = {re.sub(r"/tmp/\S+", "DIR", r.sentence or r.names) for r in found} - {""}
    only = [r.engine for r in found if r.outcome == worst]
    note = "; ".join(sorted(notes)).replace("|", "\\|").strip()
    return worst, (f"{', '.join(only)}: {note}" if note and len(only) < len(found) else note)


def main() -> None:
    """Run what is asked for and not yet in RESULTS; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES)[:3], choices=ENGINES)
    parser.add_argument("--types", nargs="+")
    parser.add_argument("--packed", action="store_true", help="documents packed, own RESULTS")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no family after them")
    parser.add_argument("--again", nargs="*", default=[], help="outcomes to run again")
    parser.add_argument("--render", type=Path, help="write the table of RESULTS")
    options = parser.parse_args()
    if options.render:
        options.render.write_text(render(read(options.results)))
        return
    began = time.monotonic()
    found = read(options.results)
    with tempfile.TemporaryDirectory() as name:
        tiny_model.make_tokenizer(Path(name))
        every = PACKING_FAMILIES if options.packed else {*model_types(), *WRAPPERS}
        for model_type in options.types or sorted(every):
            known = {r.engine: r for r in found if r.model_type == model_type}
            wanted = [
                engine
                for engine in options.engines
                if not any(
                    r.outcome not in options.again for e, r in known.items() if e in (engine, "")
                )
            ]
            if not wanted or time.monotonic() - began > options.seconds:
                continue
            for result in run_family(model_type, wanted, Path(name), options.packed):
                print(*(str(v) for v in asdict(result).values() if v not in ("", None)), flush=True)
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Result]:
    """The results so far, the newest of each family and engine."""
    if not path.exists():
        return []
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return list({(r.model_type, r.engine): r for r in results}.values())


if __name__ == "__main__":
    main()
