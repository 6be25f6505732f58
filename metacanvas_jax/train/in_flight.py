"""Steps that are on their way: started by the host, perhaps not yet finished by the devices."""

import collections
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.watch import WAITS, Watch
from metacanvas_jax.train.checkpoints import Checkpoints
from metacanvas_jax.train.job import FitConfig
from metacanvas_jax.train.log import Log
from metacanvas_jax.train.optimizer import learning_rate
from metacanvas_jax.train.state import TrainState


class NonFiniteError(UserError):
    """Loss or gradient were not finite. The message names the step and where the state before it lies."""


class Started(NamedTuple):
    """One step: what it returned, its batch, the batch's position in the data, and its FLOPs."""

    number: int
    metrics: dict[str, Array]
    position: dict[str, Any]
    batch: Any
    flops: float


class InFlight:
    """A queue of started steps. Their metrics are read, in order, only when they leave it.

    The host thus prepares the next batches while the devices compute. ``parts`` is how many processes have different
    samples; ``skips`` counts the batches that were skipped because their loss or gradient was not finite.
    """

    def __init__(
        self,
        config: FitConfig,
        optimizer: OptimizerConfig,
        checkpoints: Checkpoints,
        log: Log,
        watch: Watch,
        *,
        parts: int,
        skips: int,
    ):
        self._config, self._checkpoints, self._log, self._watch = config, checkpoints, log, watch
        self._parts, self._skips = parts, skips
        self._learning_rate = jax.jit(lambda step: learning_rate(optimizer, step))
        self._steps: collections.deque[Started] = collections.deque()

    def add(self, step: Started) -> None:
        """A step has been started."""
        self._steps.append(step)

    def settle(self, state: TrainState, ahead: int = 0) -> None:
        """Waits until at most ``ahead`` steps are unfinished, and logs those that have finished.

        Raises:
            NonFiniteError: a step was not finite and no more may be skipped. ``state`` is then still the state before
                that step, as the steps after it change nothing, and it is saved with the batch.
        """
        while len(self._steps) > ahead:
            step = self._steps.popleft()
            self._watch.at(step.number, WAITS)
            self._judge(step, state)
            self._log.tick(jax.tree.leaves(step.batch)[0].shape[0] * self._parts, step.flops)
            if self._config.due(step.number).log:
                metrics = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
                self._log.progress(step.number, metrics, float(self._learning_rate(step.number - 1 - self._skips)))

    def _judge(self, step: Started, state: TrainState) -> None:
        """Stops at a loss that is not finite; reports a skipped batch and an unusual loss."""
        now, most = step.number, self._config.max_skips
        loss, norm = float(step.metrics["loss"]), float(step.metrics["grad_norm"])
        if float(step.metrics["finite"]) == 0.0:
            raise NonFiniteError(
                f"step {now}: loss {loss}, gradient norm {norm}, after {self._skips} batches skipped "
                f"(max_skips {most}); {self._checkpoints.keep(state, now, step.position, step.batch)}"
            )
        if float(step.metrics["skipped"]) > self._skips:
            self._skips += 1
            self._log.note(f"step {now}: loss {loss}, gradient norm {norm}: batch skipped, {self._skips} of {most}")
            self._log.write(now, {"loss": loss, "grad_norm": norm, "skipped": self._skips})
        elif (usual := self._checkpoints.spikes.usual(loss)) is not None:
            self._log.note(f"step {now}: loss {loss:.4g}, far above the usual {usual:.4g}; gradient norm {norm:.4g}")
            self._log.write(now, {"spike": loss, "spike_above": usual, "spike_grad_norm": norm})
