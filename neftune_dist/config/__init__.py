"""Every knob of a run, and where its value comes from: defaults, then YAML, then `key=value` words.

Owns the configuration, its sources and the checks that need nothing but the configuration itself.
Imports no torch, so a login node can validate a run. Unknown keys, wrong types and contradictions
are refused with `UserError`.
"""

from neftune_dist.config.checks import check, check_divides, check_world_size
from neftune_dist.config.config import ACCEPTABLE_CHANGES, KNOBS, Config, differences, settings_yaml
from neftune_dist.config.errors import UserError
from neftune_dist.config.evaluation_sections import (
    HELD_OUT,
    WHILE_TRAINING,
    EvaluateConfig,
    JudgeConfig,
)
from neftune_dist.config.json_files import Nullable, parse_json, read_json, with_checksum
from neftune_dist.config.loading import load_config
from neftune_dist.config.packages import check_evaluation_packages, check_packages, require
from neftune_dist.config.paths import read_text, user_path
from neftune_dist.config.reference import json_schema, reference
from neftune_dist.config.sections import (
    BUILTIN_SOURCE,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LoggingConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    split_list,
)
from neftune_dist.config.shipped import copy_batch_scripts, shipped_configs
