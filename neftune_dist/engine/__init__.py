"""Training over ranks, sharded or replicated: one contract, three engines."""

from neftune_dist.config import Config
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine


def make_engine(config: Config, world: World) -> Engine:
    """Return the engine that `engine.name` chooses, before its set-up.

    Args:
        config: whose engine is decided (see `automatic`).
        world: of the ranks.
    """
    assert config.engine.name != "auto"
    # Imported here: an engine that was not chosen need not be importable.
    if config.engine.name == "replicated":
        from neftune_dist.engine.replicated import ReplicatedEngine

        return ReplicatedEngine(config, world)
    if config.engine.name == "fsdp2":
        from neftune_dist.engine.fsdp2 import FSDP2Engine

        return FSDP2Engine(config, world)
    from neftune_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(config, world)
