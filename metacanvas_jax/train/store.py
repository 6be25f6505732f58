"""Checkpoints of a training, written by Orbax.

A checkpoint holds the trainable parameters, their moving average, the optimizer, the position in the data, and a JSON
with the config and the identity of the frozen weights. The frozen weights themselves are never copied. Nothing here
reads or writes pickle.
"""

import importlib.metadata
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as managers

from metacanvas_jax import seals
from metacanvas_jax.errors import Unreachable, UserError, first_line
from metacanvas_jax.parallel.distributed import gather
from metacanvas_jax.retries import passes
from metacanvas_jax.train.agreement import Meta, check_same
from metacanvas_jax.train.state import TrainState
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.types import Params
from metacanvas_jax.weights.hashes import checksums
from metacanvas_jax.weights.saved import check_shapes

GROUP_BYTES = 1 << 31  # of the parameters that are read at once, on all devices together
PACKAGES = ("metacanvas_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


def describe(
    config: Mapping[str, Any], frozen: Mapping[str, str] | None = None, folders: Mapping[str, str] | None = None
) -> Meta:
    """The description of a checkpoint, to which `Store.save` adds checksums.

    ``config`` is everything that must be the same in a run that continues from it (nested, JSON-able). ``frozen`` maps
    each part of the model that has weights to their identity (`weights/identity.py`), ``folders`` to where they lie,
    which may change.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    meta = {
        "config": dict(config),
        "frozen": dict(frozen or {}),
        "folders": dict(folders or {}),
        "versions": versions,
    }
    return json.loads(json.dumps(meta))  # tuples become lists now, not on the way through a file


class Store:
    """The checkpoints of one run, one folder per step; local or any path that etils.epath knows (``gs://``).

    Only complete checkpoints are listed or restored: Orbax commits a folder last. The ``keep_last`` newest ones are
    kept, those at multiples of ``keep_every``, and the ``keep_best`` with the highest scores. A store that is not
    ``writable`` changes nothing on disk.

    Raises UserError, from any method, when the folder cannot be written: no space, no permission, no such place.
    Raises Unreachable when the storage does not answer: then the same run, started again, goes on.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        keep_best: int = 0,
        writable: bool = True,
    ):
        self.folder = epath.Path(os.fspath(folder))
        if not writable and not self.folder.exists():
            raise UserError(f"no checkpoint: folder {self.folder} does not exist")
        if not self.folder.is_absolute() and "://" not in str(self.folder):
            self.folder = epath.Path(Path(self.folder).absolute())
        keep = [managers.LatestN(keep_last)]
        if keep_every is not None:
            keep.append(managers.EveryNSteps(keep_every))
        if keep_best:
            keep.append(managers.BestN(get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False))
        self._writable = writable
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "ema": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                    "metrics": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    create=writable,
                    save_root_metadata=False,
                    cleanup_tmp_directories=writable,
                    best_fn=_score if keep_best or not writable else None,
                    preservation_policy=managers.AnyPreservationPolicy(keep),
                ),
            )
        if keep_best and writable:
            self.check_scores()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step with the highest score among the complete checkpoints; None if none was scored."""
        self.check_scores()
        scored = self._manager.best_step()
        return scored if scored is not None and self._manager.metrics(scored) is not None else None

    def check_scores(self) -> None:
        """Compares the scores by which checkpoints are kept with those that their sealed descriptions hold.

        Raises UserError, naming the file, for one that is not what was written. Checkpoints from before descriptions
        held scores are taken as they are.
        """
        for step in self.steps():
            meta = self.meta(step)
            with self._reading(step):
                found = self._manager.metrics(step)
            if "score" in meta and (found and found.get("score")) != meta["score"]:
                where = self.folder / str(step) / "metrics"
                raise UserError(f"{where} is damaged: it holds {found}, the score was {meta['score']}")

    def save(
        self, state: TrainState, batches: grain.DatasetIterator | None, meta: Meta, *, score: float | None = None
    ) -> None:
        """Saves under the state's own step, in the background; the state may be donated at once afterwards.

        A step that has a checkpoint is not written again, as it would be the same state. Errors of the writing are
        raised by ``check``, the next ``save``, ``wait`` or ``close``.
        """
        if not self._writable:
            raise ValueError(f"{self.folder} was not opened for writing")
        step = int(state.step)
        if step in self.steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave(_rest(state)),
        }
        meta = meta | {"checksums": checksums(state)}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if batches is not None:
            data = {"positions": _positions(batches)}
            items["data"] = ocp.args.JsonSave(data)
            meta["data"] = seals.json_hash(data)
        metrics = None if score is None or not math.isfinite(score) else {"score": float(score)}
        items["meta"] = ocp.args.JsonSave(seals.sealed(meta | {"score": metrics and metrics["score"]}))
        with self._writing():
            # Force, because Orbax skips a step that is not newer than the last one.
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def meta(self, step: int | None = None) -> Meta:
        """The JSON of a checkpoint (the newest one by default). Raises UserError if it is damaged."""
        step = self.step_of(step)
        with self._reading(step):
            values = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        meta, where = seals.opened(values, self.folder / str(step) / "meta"), self.folder / str(step)
        if missing := {"config", "frozen", "checksums"} - meta.keys():
            raise UserError(f"checkpoint {where} is damaged: there is no {min(missing)!r} in {where / 'meta'}")
        return meta

    def restore(
        self,
        abstract: TrainState,
        batches: grain.DatasetIterator | None,
        meta: Meta,
        step: int | None = None,
    ) -> TrainState:
        """The whole state, in the shardings of ``abstract``; sets ``batches`` to their position.

        An imported checkpoint has no position in the data: ``batches`` then stay at their beginning.

        Raises:
            UserError: no complete checkpoint; one of another config or of other frozen weights; other parameters or
                shapes; a position in the data that only another number of processes can take up; files that cannot be
                read.
        """
        step = self.step_of(step)
        where = self.folder / str(step)
        saved = self.meta(step)
        check_same(saved, meta, str(where))
        trees: dict[str, Any] = {"params": abstract.params, "optimizer": _rest(abstract)}
        if abstract.ema is not None:
            trees["ema"] = abstract.ema
        args: dict[str, Any] = self._arguments(step, trees)
        positioned = batches is not None and "imported" not in saved
        if positioned:
            args["data"] = ocp.args.JsonRestore()
        with self._reading(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        rest = restored["optimizer"]
        ema = restored["ema"] if abstract.ema is not None else None
        state = TrainState(rest["step"], restored["params"], rest["opt_state"], ema, rest["finite"], rest["skipped"])
        _check_sums(saved["checksums"], checksums(state), str(where))
        if positioned:
            data = restored["data"]
            if "data" in saved and seals.json_hash(data) != saved["data"]:
                raise UserError(
                    f"checkpoint {where} is damaged: the position in the data, in {where / 'data'}, is not the one "
                    "that was saved"
                )
            batches.set_state(_position(data["positions"], str(where)))
        return state

    def restore_params(
        self, abstract: Params, *, ema: bool = False, step: int | None = None, only: Collection[str] | None = None
    ) -> Params:
        """The trainable parameters alone, or their moving average, for sampling and export.

        ``abstract`` are all of them. With ``only``, no others than the parameters of these paths are read and returned.
        They lie as ``abstract`` says, or on this process's first device where it says nothing, whatever devices saved
        them. They are read, compared and cast to its dtypes some at a time, so that what a checkpoint holds in float32
        is never in memory as a whole.

        Raises:
            UserError: as ``restore``, and if the run kept no moving average.
        """
        step = self.step_of(step)
        name, every = "ema" if ema else "params", flat(abstract)
        self._arguments(step, {name: abstract})
        wanted = {path: leaf for path, leaf in every.items() if only is None or path in only}
        here, sums = SingleDeviceSharding(jax.local_devices()[0]), self.meta(step)["checksums"]
        params: dict[str, jax.Array] = {}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            for group in groups(wanted, GROUP_BYTES):
                items: dict[str, Any] = dict.fromkeys(every, ocp.PLACEHOLDER)
                args: dict[str, Any] = dict.fromkeys(every, ocp.RestoreArgs())
                for path, leaf in group.items():
                    place = getattr(leaf, "sharding", None) or here
                    # As they were saved; checksums are those of float32.
                    saved = "float32" if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
                    items[path] = jax.ShapeDtypeStruct(leaf.shape, saved, sharding=place)
                    args[path] = ocp.ArrayRestoreArgs(sharding=place, global_shape=leaf.shape)
                restore = ocp.args.PyTreeRestore(item=nested(items), restore_args=nested(args))
                with self._reading(step):
                    found = flat(reader.restore(self.folder / str(step) / name, args=restore))
                found = {path: found[path] for path in group}
                _check_sums(sums, checksums({name: nested(found)}), str(self.folder / str(step)))
                params |= {path: found[path].astype(leaf.dtype) for path, leaf in group.items()}
        return nested(params)

    def check(self) -> None:
        """Raises UserError if the writing in the background has failed; costs nothing otherwise."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until the last save is complete."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then frees the writer's threads."""
        with self._writing():
            self._manager.close()

    def step_of(self, step: int | None) -> int:
        """The step itself, of None the newest. Raises UserError where it has no complete checkpoint."""
        steps = self.steps()
        if not steps:
            raise UserError(f"no complete checkpoint in {self.folder}")
        if step is not None and step not in steps:
            raise UserError(f"no complete checkpoint of step {step} in {self.folder}, only of {steps}")
        return steps[-1] if step is None else step

    def _arguments(self, step: int, trees: dict[str, Any]) -> dict[str, ocp.args.StandardRestore]:
        with self._reading(step):
            saved = dict(self._manager.item_metadata(step).items())
        for name, tree in trees.items():
            if saved.get(name) is None:
                raise UserError(f"checkpoint {self.folder / str(step)} holds no {name}")
            check_shapes(saved[name].tree, tree, f"{self.folder / str(step)}, {name}")
        return {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (UserError, Unreachable):
            raise
        except Exception as error:  # OSError from Python, ValueError and others from tensorstore
            raise _kind(error)(f"checkpoint cannot be written to {self.folder}: {first_line(error, 300)}") from error

    def _reading(self, step: int) -> AbstractContextManager[None]:
        return reading(self.folder / str(step))


@contextmanager
def reading(folder: os.PathLike) -> Iterator[None]:
    """Errors of reading a checkpoint as Unreachable where the storage does not answer, else as UserError."""
    try:
        yield
    except (UserError, Unreachable):
        raise
    except Exception as error:  # Orbax raises many types, and for a damaged array Exception itself
        raise _kind(error)(f"checkpoint {os.fspath(folder)} cannot be read: {first_line(error, 300)}") from error


def groups(leaves: Mapping[str, Any], most: int) -> Iterator[dict[str, Any]]:
    """The leaves, in their order, in groups of up to ``most`` bytes of float32, or of one that is larger."""
    group, size = {}, 0
    for path, leaf in leaves.items():
        nbytes = math.prod(leaf.shape) * 4
        if group and size + nbytes > most:
            yield group
            group, size = {}, 0
        group[path], size = leaf, size + nbytes
    if group:
        yield group


def _check_sums(saved: Mapping[str, int], now: Mapping[str, int], where: str) -> None:
    damaged = [name for name, value in now.items() if saved.get(name) != value]
    if damaged:
        raise UserError(f"checkpoint {where} is damaged: the values of {damaged[0]} are not those that were saved")


def _kind(error: BaseException) -> type[UserError | Unreachable]:
    """What an error of the storage means: nothing about the files if it, or what caused it, passes by itself."""
    cause: BaseException | None = error
    while cause is not None:
        if passes(cause):
            return Unreachable
        cause = cause.__cause__
    return UserError


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "finite": state.finite, "skipped": state.skipped}


def _score(metrics: Mapping[str, float]) -> float:
    return metrics["score"]


def _positions(batches: grain.DatasetIterator) -> list[Any]:
    """The positions of the processes in the data: one entry if all are the same, as for the streams of the pipeline."""
    texts = gather(json.dumps(batches.get_state(), sort_keys=True))
    return [json.loads(text) for text in (texts[:1] if len(set(texts)) == 1 else texts)]


def _position(positions: list[Any], where: str) -> Any:
    """This process's position in the data."""
    if len(positions) == 1:
        return positions[0]
    if len(positions) == jax.process_count():
        return positions[jax.process_index()]
    raise UserError(
        f"checkpoint {where}: its {len(positions)} processes were at different places in the data, which "
        f"{jax.process_count()} cannot take up; start {len(positions)} processes, or a new run from its parameters"
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
