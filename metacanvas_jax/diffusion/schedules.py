"""The noise levels of a sampler's steps, and the noise levels given to the network, which can differ.

The schedules of published pipelines stand with their networks and are built from the functions here, in the arithmetic
of diffusers 0.42.1, so that the tables are equal bit for bit. A schedule is made on the host, before anything is
traced.
"""

import math
from dataclasses import dataclass

import numpy as np

TRAIN_STEPS = 1000  # of every published backbone; only the rounding of the reported times depends on it


@dataclass(frozen=True)
class Schedule:
    """``steps + 1`` falling noise levels that end at 0, and the ``steps`` levels reported to the network.

    Plain tuples of floats, so that a schedule is hashable and can be a static argument. Raises ValueError when the
    levels do not fall from at most 1 to exactly 0, or when the lengths do not fit.
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...]

    def __post_init__(self):
        if len(self.sigmas) != len(self.times) + 1 or not self.times:
            raise ValueError(
                f"a schedule of n >= 1 steps has n + 1 sigmas and n times; got {len(self.sigmas)} and {len(self.times)}"
            )
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not falling or self.sigmas[0] > 1 or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas must fall from at most 1 to exactly 0; got {self.sigmas}")

    @property
    def steps(self) -> int:
        """How often the network runs."""
        return len(self.times)

    def step_near(self, time: float) -> int:
        """The step whose network call happens closest to the noise level ``time``."""
        return int(np.argmin(np.abs(np.asarray(self.times) - time)))


def schedule(sigmas: np.ndarray, times: np.ndarray) -> Schedule:
    """A schedule from the levels without the final 0 and the levels that the network is given, both in float32."""
    ended = np.append(sigmas, 0.0).astype(np.float32)
    return Schedule(tuple(map(float, ended)), tuple(map(float, times.astype(np.float32))))


def check(steps: int, shift: float = 1.0) -> None:
    """Raises ValueError for no steps, or a shift that is not positive."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step; got {steps}")
    if shift <= 0:
        raise ValueError(f"the shift of a schedule must be positive (1 changes nothing); got {shift}")


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Noise levels moved towards 1 (``shift`` above 1) or towards 0."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def whole_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Noise levels cut to whole timesteps of 1..1000, as some of the reference schedulers do."""
    return (sigmas * TRAIN_STEPS).astype(np.int64) / TRAIN_STEPS


def linear(steps: int, shift: float = 1.0) -> Schedule:
    """Evenly spaced from 1 to 0, then shifted. The network gets the exact level."""
    check(steps, shift)
    sigmas = shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return schedule(sigmas, sigmas)


@dataclass(frozen=True)
class DynamicShift:
    """A shift that grows with the picture: ``exp(mu)``, with ``mu`` linear in the number of latent tokens.

    ``mu`` is ``base_shift`` at ``base_tokens`` and ``max_shift`` at ``max_tokens``, and goes on beyond both. With
    ``terminal`` the shifted levels are stretched, so that the last one above 0 is ``terminal``. The defaults are those
    of diffusers ``FlowMatchEulerDiscreteScheduler``. Raises ValueError for numbers that make no schedule.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    terminal: float | None = None

    def __post_init__(self):
        if self.base_tokens >= self.max_tokens:
            raise ValueError(f"base_tokens {self.base_tokens} must be below max_tokens {self.max_tokens}")
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise ValueError(f"terminal must be a noise level between 0 and 1, or None; got {self.terminal}")


def dynamic(steps: int, tokens: int, shift: DynamicShift) -> Schedule:
    """Levels of ``FlowMatchEulerDiscreteScheduler`` with dynamic shifting; ``tokens`` counts the *target's* only."""
    check(steps)
    if tokens < 1:
        raise ValueError(f"a dynamic shift needs the number of latent tokens; got {tokens}")
    if shift.terminal is not None and steps < 2:
        raise ValueError(f"a schedule that ends at {shift.terminal} needs at least two steps; got {steps}")
    slope = (shift.max_shift - shift.base_shift) / (shift.max_tokens - shift.base_tokens)
    factor = math.exp(tokens * slope + (shift.base_shift - slope * shift.base_tokens))
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = factor / (factor + (1 / grid - 1))
    if shift.terminal is not None:
        rest = 1 - sigmas
        sigmas = 1 - rest / (rest[-1] / (1 - shift.terminal))
    times = (sigmas * np.float32(TRAIN_STEPS)) / np.float32(TRAIN_STEPS)  # the pipeline's way, rounded twice
    return schedule(sigmas, times)
