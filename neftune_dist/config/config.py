"""The whole configuration: its sections, every knob by its key, and how two of them differ."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import OmegaConf

from neftune_dist.config import evaluation_sections, sections
from neftune_dist.config.knobs import find_knobs, path


@dataclass
class Config:
    """A whole run."""

    run_dir: str = path("runs/default")
    """Folder for everything that the run writes."""
    model: sections.ModelConfig = field(default_factory=sections.ModelConfig)
    adapter: sections.AdapterConfig = field(default_factory=sections.AdapterConfig)
    data: sections.DataConfig = field(default_factory=sections.DataConfig)
    noise: sections.NoiseConfig = field(default_factory=sections.NoiseConfig)
    engine: sections.EngineConfig = field(default_factory=sections.EngineConfig)
    optim: sections.OptimConfig = field(default_factory=sections.OptimConfig)
    train: sections.TrainConfig = field(default_factory=sections.TrainConfig)
    checkpoint: sections.CheckpointConfig = field(default_factory=sections.CheckpointConfig)
    logging: sections.LoggingConfig = field(default_factory=sections.LoggingConfig)
    evaluate: evaluation_sections.EvaluateConfig = field(
        default_factory=evaluation_sections.EvaluateConfig
    )
    judge: evaluation_sections.JudgeConfig = field(default_factory=evaluation_sections.JudgeConfig)

    @property
    def noise_seed(self) -> int:
        """The key of the noise: `noise.seed`, or `train.seed` where that is not given."""
        return self.train.seed if self.noise.seed is None else self.noise.seed

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, as stored in a checkpoint."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved configuration, loadable again by `load_config`."""
        return settings_yaml(asdict(self))


def settings_yaml(values: dict[str, Any]) -> str:
    """Settings as YAML that `load_config` reads back alike."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(values)))


KNOBS = find_knobs(Config)

# Prefixes of the keys that a resumed run may change if `checkpoint.accept_changes` lists them.
ACCEPTABLE_CHANGES = ("optim.", "noise.", "model.dtype", "model.float8")


def differences(one: dict[str, Any], two: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two configurations, as `Config.to_dict` gives them, differ."""
    keys: list[str] = []
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(prefix + key)
    return keys


def _escaped(value: Any) -> Any:
    """Nested dicts and lists in whose text OmegaConf finds no interpolation."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
