"""Where a study's figures come from, as its runs recorded it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from neftune_dist.study.grid import plain
from neftune_dist.study.results import Run, alphas_of, seeds_of
from neftune_dist.system.records import STEPS


def provenance(runs: Sequence[Run]) -> dict[str, str]:
    """What was run on what, by topic; all values where runs differ."""
    config = runs[0].config
    data, optim, noise = config.data, config.optim, config.noise
    versions = [run.state.get("versions", {}) for run in runs]
    others = ("neftune_dist", "commit")
    packages = [n for n, v in versions[0].items() if n not in others and v != "None"]
    dates = sorted((run.folder / STEPS).stat().st_mtime for run in runs)
    days = dict.fromkeys(
        f"{datetime.fromtimestamp(d, UTC):%Y-%m-%d}" for d in dates[:1] + dates[-1:]
    )
    sources = ", ".join(shown_name(entry.source) for entry in data.sources.values())
    fingerprint = _all(run.state.get("identity", {}).get("dataset") for run in runs)
    num_ranks = _all(run.state.get("world_size") for run in runs)
    answers = [run.settings.get("answers", {}) for run in runs]
    keys = [key for key in answers[0] if key.startswith("evaluate.")]
    return {
        "made": f"{' to '.join(days)} (UTC)",
        "code": f"neftune_dist {_all(of.get('neftune_dist') for of in versions)}, commit "
        f"{_all(of.get('commit') for of in versions)}",
        "versions": "; ".join(f"{n} {_all(of.get(n) for of in versions)}" for n in packages),
        "device": f"{_all(run.state.get('device') for run in runs)}; ranks: {num_ranks}; "
        f"{config.engine.name}, {config.model.dtype}",
        "model": shown_name(config.model.name_or_path),
        "data": f"{sources}; fingerprint {fingerprint}; documents of at most {data.max_length} "
        "tokens",
        "batch": f"{config.train.global_batch_size} documents a step",
        "steps": str(len(runs[0].steps)),
        "learning rate": f"{optim.learning_rate:g}, {optim.schedule}, {optim.warmup_steps} steps "
        f"of warm-up; weight decay {optim.weight_decay:g}",
        "alpha": f"{', '.join(map(plain, alphas_of(runs)))}; {noise.distribution} noise, "
        f"{noise.stream} stream",
        "seeds": ", ".join(map(str, seeds_of(runs))),
        "answers": "; ".join(
            f"{key.split('.')[1].replace('_', ' ')} {_all(of.get(key) for of in answers)}"
            for key in keys
        ),
    }


def shown_name(name: str) -> str:
    """A hub id as it is, a path's last part: folders of one machine mean nothing on another."""
    return Path(name).name if Path(name).is_absolute() else name


def _all(values: Iterable[object]) -> str:
    """The different values there are, in words."""
    found = dict.fromkeys(str(value) for value in values if value not in (None, ""))
    return " and ".join(found) or "not recorded"
