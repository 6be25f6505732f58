"""What a run is, in one block of text when it starts, and as ``summary.json`` in its folder."""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from metacanvas_jax import files
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.inputs import Opened
from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, trains

FILE = "summary.json"
PACKAGES = ("metacanvas_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")


@dataclasses.dataclass(frozen=True)
class Summary:
    """``parameters`` are (trained, frozen) by part of the model, ``data`` the samples of every bucket.

    ``held_out`` are those that a bucket's sources keep for validation; ``notes`` are further lines by their first word.
    """

    name: str
    parameters: dict[str, tuple[int, int]]
    data: dict[str, int]
    steps: int
    batch: int
    devices: str
    mesh: dict[str, int]
    host: str
    versions: dict[str, str]
    held_out: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Number of parameters that train."""
        return sum(trained for trained, _ in self.parameters.values())

    @property
    def frozen(self) -> int:
        """Number of parameters that are frozen."""
        return sum(frozen for _, frozen in self.parameters.values())

    def text(self) -> str:
        """The block, one fact a line."""
        parts = [
            f"{part} {count(trained)} trained" + (f" + {count(frozen)} frozen" if frozen else "")
            if trained
            else f"{part} {count(frozen)} frozen"
            for part, (trained, frozen) in self.parameters.items()
        ]
        epochs = self.steps * self.batch / max(1, sum(self.data.values()))
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        held = {name: f", {count:,} held out for validation" for name, count in self.held_out.items() if count}
        data = [f"{name}: {number:,} samples to train on{held.get(name, '')}" for name, number in self.data.items()]
        lines = {
            "run": self.name,
            "parameters": f"{count(self.trained)} trained, {count(self.frozen)} frozen ({', '.join(parts)})",
            "devices": f"{self.devices} (mesh: {mesh})",
            "data": "; ".join(data),
            **self.notes,
            "steps": f"{self.steps:,} steps of {self.batch} samples, {epochs:.3g} passes over the data",
        }
        return "\n".join(f"{name:<11} {text}" for name, text in lines.items())

    def save(self, run: Path) -> None:
        """Writes the file into a run's folder."""
        files.write(run / FILE, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def summary(setup: Experiment, data: Sequence[Opened], notes: Mapping[str, str] | None = None) -> Summary:
    """Of an experiment and its open sources, on the devices of this job. Computes no parameter."""
    parameters: dict[str, tuple[int, int]] = {}
    for path, leaf in flat(param_shapes(setup)).items():
        part = "mllm" if setup.objective == "understand" else path.split("/")[0]
        trained, frozen = parameters.get(part, (0, 0))
        size = leaf.size
        here = trains(path, setup.train.rules)
        parameters[part] = (trained + size * here, frozen + size * (not here))
    devices, processes = jax.devices(), jax.process_count()
    return Summary(
        name=setup.name,
        parameters=dict(sorted(parameters.items(), key=lambda item: -sum(item[1]))),
        data={one.name: one.count for one in data},
        steps=setup.train.steps,
        batch=setup.train.batch,
        devices=f"{len(devices)} x {devices[0].device_kind} in {processes} process{'es' * (processes > 1)}",
        mesh=dict(make_mesh(setup.mesh).shape),
        host=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        held_out={one.name: one.held_out for one in data},
        notes=dict(notes or {}),
    )


def read(run: Path) -> Summary | None:
    """The summary of a run; None where there is none. Raises UserError for a file that is damaged."""
    path = run / FILE
    if not path.exists():
        return None
    values: dict[str, Any] = files.read_json(path)
    try:
        return Summary(**values)
    except TypeError as error:
        raise UserError(f"{path}: no summary of a run ({error})") from error


def count(number: int) -> str:
    """A number of parameters in a short form: 812, 24.6 k, 1.25 M, 8.29 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return str(number)
