"""Noise levels a sampler visits, and the noise levels the network is told, which are not always the same.

Each function but ``linear`` rebuilds the table of one published pipeline in the arithmetic of diffusers 0.42.1, so that
the tables are equal bit for bit. A schedule is made on the host, before anything is traced.
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


def _schedule(sigmas: np.ndarray, times: np.ndarray) -> Schedule:
    ended = np.append(sigmas, 0.0).astype(np.float32)
    return Schedule(tuple(map(float, ended)), tuple(map(float, times.astype(np.float32))))


def _check(steps: int, shift: float = 1.0) -> None:
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step; got {steps}")
    if shift <= 0:
        raise ValueError(f"the shift of a schedule must be positive (1 changes nothing); got {shift}")


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _whole_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Noise levels after the cut to whole timesteps of 1..1000, which two of the reference schedulers do."""
    return (sigmas * TRAIN_STEPS).astype(np.int64) / TRAIN_STEPS


def linear(steps: int, shift: float = 1.0) -> Schedule:
    """Evenly spaced from 1 to 0, then shifted. The network is told the exact level."""
    _check(steps, shift)
    sigmas = _shifted(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return _schedule(sigmas, sigmas)


def sana_dpm(steps: int, shift: float = 3.0) -> Schedule:
    """SANA's: DPMSolverMultistepScheduler with flow sigmas. The network is told whole timesteps."""
    _check(steps, shift)
    grid = 1.0 - np.linspace(1, 1 / TRAIN_STEPS, steps + 1)
    sigmas = np.flip(_shifted(grid, shift))[:-1]
    return _schedule(sigmas, _whole_timesteps(sigmas))


def wan_unipc(steps: int, shift: float = 5.0) -> Schedule:
    """Wan's: UniPCMultistepScheduler with flow sigmas. Starts 1e-6 below 1; the network is told whole timesteps."""
    _check(steps, shift)
    sigmas = _shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return _schedule(sigmas, _whole_timesteps(sigmas))


def flux_dynamic(
    steps: int,
    tokens: int,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Schedule:
    """FLUX's: FlowMatchEulerDiscreteScheduler with dynamic shifting by the number of *target* latent tokens.

    The shift is ``exp(mu)`` with ``mu`` linear in ``tokens``, from ``base_shift`` to ``max_shift``.
    """
    _check(steps)
    if tokens < 1:
        raise ValueError(f"a dynamic shift needs the number of latent tokens; got {tokens}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    shift = math.exp(tokens * slope + (base_shift - slope * base_tokens))
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = shift / (shift + (1 / grid - 1))
    times = (sigmas * np.float32(TRAIN_STEPS)) / np.float32(TRAIN_STEPS)  # the pipeline's way, rounded twice
    return _schedule(sigmas, times)
