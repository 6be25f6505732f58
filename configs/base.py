"""Defaults of every experiment, once. Other configs start from ``get_config`` and change what differs.

Sizes of published networks come from the presets of the networks themselves.
"""

import dataclasses

from ml_collections import ConfigDict

from metacanvas_jax import build
from metacanvas_jax.data.scenes import SceneWorld
from metacanvas_jax.diffusion.flow import TimeConfig
from metacanvas_jax.train.optimizer import OptimizerConfig


def section(defaults, **changes) -> ConfigDict:
    """A dataclass as a section of a config, with every field in sight, and ``changes`` on top."""
    return ConfigDict(dataclasses.asdict(defaults) | changes)


def get_config() -> ConfigDict:
    """The common ground: AdamW as in the paper (section 3.1), rectified flow, EMA."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0
    config.objective = "paint"
    config.world = section(SceneWorld())
    config.data = section(build.DataSection(path=""))
    config.optimizer = section(OptimizerConfig(learning_rate=1e-4, warmup_steps=300, warmup_from=1e-5))
    config.train = section(build.TrainSection(steps=20_000, batch=320, rules=((".*", "train"),)))
    config.time = section(TimeConfig())
    config.sampler = section(build.SamplerSection())
    config.eval = section(build.EvalSection())
    return config
