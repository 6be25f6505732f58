"""The checkpoints of a running training: a `Store` together with everything that is saved beside the state."""

import contextlib
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as safetensors_bytes

from metacanvas_jax import files
from metacanvas_jax.errors import Preempted, Unreachable, UserError
from metacanvas_jax.parallel.distributed import client
from metacanvas_jax.train.agreement import Meta, check_same
from metacanvas_jax.train.job import FitConfig, Job, fingerprint
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.spikes import Spikes
from metacanvas_jax.train.state import TrainState, new_state
from metacanvas_jax.train.store import Store, describe
from metacanvas_jax.types import Params
from metacanvas_jax.weights import identity
from metacanvas_jax.weights.hashes import paths


class Checkpoints:
    """Saves the state with the position in ``batches``, the recent losses (``spikes``) and the hooks that are owed.

    ``saved`` is the description of the newest checkpoint in ``workdir``, None in a new run. As a context manager it
    waits for the last writing and closes the store.

    Raises UserError if ``workdir`` holds checkpoints of another config or of other frozen weights.
    """

    def __init__(self, workdir: Path, job: Job, config: FitConfig, batches: grain.DatasetIterator):
        self._workdir, self._batches = workdir, batches
        self._meta = described(job, config)
        self.store = Store(
            workdir / "checkpoints",
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
        )
        self.saved = self.store.meta() if self.store.steps() else None
        if self.saved is not None:
            check_same(self.saved, self._meta, str(self.store.folder))
            self._meta["frozen"] = identity.kept(self.saved["frozen"], self._meta["frozen"])
        self.spikes = Spikes(config.spike, () if self.saved is None else self.saved["recent_losses"])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.store.close()
        elif client() is None or issubclass(kind, Preempted):  # else it may wait for a process that is gone
            with contextlib.suppress(UserError, Unreachable):  # it would hide the first error
                self.store.close()

    @property
    def owed(self) -> bool:
        """Whether the run was stopped before the hooks of its last step had run."""
        return self.saved is not None and self.saved["owed"]

    def restore(self, target: TrainState) -> TrainState:
        """The newest state, in the shardings of ``target``; the batches continue where they were."""
        return self.store.restore(target, self._batches, self._meta)

    def save(self, state: TrainState, *, owed: bool = False, score: float | None = None) -> None:
        """Saves in the background. ``owed`` says that the hooks of this step have still to run."""
        self.store.save(state, self._batches, self._described(owed), score=score)

    def keep(self, state: TrainState, step: int, position: dict[str, Any], batch: Any) -> str:
        """Saves what ``step`` failed on: the state before it and the batch of this process. Says where."""
        folder = self._workdir / "nonfinite"
        self._batches.set_state(position)
        with Store(folder, keep_last=1) as inspect:
            healthy = state.replace(finite=jnp.ones_like(state.finite))
            inspect.save(healthy, self._batches, self._described(owed=False))
        arrays = dict(zip(paths(batch), map(np.ascontiguousarray, jax.tree.leaves(batch)), strict=True))
        name = f"batch_of_step_{step}_process_{jax.process_index()}.safetensors"
        files.write(folder / name, safetensors_bytes(arrays))
        return f"the state before it and its batch's position are in {folder / str(step - 1)}, the batch in {name}"

    def _described(self, owed: bool) -> Meta:
        return self._meta | {"recent_losses": self.spikes.recent, "owed": owed}


def check_workdir(job: Job, config: FitConfig, workdir: str | Path) -> None:
    """Raises UserError if ``workdir`` holds checkpoints of another config, before anything is written there."""
    folder = files.folder(workdir) / "checkpoints"
    if folder.exists():
        with Store(folder, writable=False) as store:
            if store.steps():
                check_same(store.meta(), described(job, config), str(folder))


def save_imported(workdir: Path, job: Job, config: FitConfig, params: Params, step: int, source: str) -> None:
    """Writes the first checkpoint of an imported run: a fresh optimizer, and no position in the data."""
    state = new_state(params, make_optimizer(job.optimizer), ema=config.ema_decay is not None)
    meta = described(job, config) | {"imported": source, "recent_losses": [], "owed": False}
    with Store(workdir / "checkpoints") as store:
        store.save(state.replace(step=jnp.asarray(step, jnp.int32)), None, meta)


def described(job: Job, config: FitConfig) -> Meta:
    """What all checkpoints of a run say about it."""
    return describe(fingerprint(job, config), job.frozen, job.folders)
