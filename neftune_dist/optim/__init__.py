"""AdamW, the precision of its moments, and the learning rate."""

from neftune_dist.optim.adamw import (
    STATE_NAMES,
    MakeOptimizer,
    divide_gradients,
    initialize_state,
    learning_rate,
    moments,
    precision_of,
    prepare_update,
    set_learning_rate,
    set_updates,
    skip_update_where,
    squared_norm,
    state_bytes,
)
from neftune_dist.optim.adamw_low_precision import Moment, ParamSlice, local
from neftune_dist.optim.quantized_state import QuantizedMoment

__all__ = [
    "STATE_NAMES",
    "MakeOptimizer",
    "Moment",
    "ParamSlice",
    "QuantizedMoment",
    "divide_gradients",
    "initialize_state",
    "learning_rate",
    "local",
    "moments",
    "precision_of",
    "prepare_update",
    "set_learning_rate",
    "set_updates",
    "skip_update_where",
    "squared_norm",
    "state_bytes",
]
