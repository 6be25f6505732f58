"""What would make a step fit, or make it faster: the knobs of a config in order of gain, estimated without compiling.

What is held before a step (parameters, optimizer, average) is computed exactly, from shapes. Activations are estimated
from the peak of the program that was compiled.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from metacanvas_jax import registry
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import GIB, MIB
from metacanvas_jax.nn.stack import REMAT_CHOICES
from metacanvas_jax.parallel.mesh import AXES, MeshConfig, batch_shards, make_mesh
from metacanvas_jax.plan import parts, programs, units
from metacanvas_jax.plan.report import Report
from metacanvas_jax.plan.topology import Slice
from metacanvas_jax.tasks import Bucket

LEAST_S, LEAST_BYTES = 0.01, 0.01  # of a step and of a chip's memory: gains below these shares are not worth a line
WIDEST = 16  # of the context axis
HIDDEN = 4  # widths of a token that remat="hidden" keeps beside what "attention" does
PRODUCTS = 9  # outputs of the products of a block, in widths of a token: q, k, v, o, 4 hidden widths, the block's own


@dataclasses.dataclass(frozen=True)
class Knob:
    """What to type, what it saves (bytes on each device, or seconds of a step), and why."""

    flags: str
    saved: float
    why: str


@dataclasses.dataclass(frozen=True)
class Step:
    """A planned training step: its experiment, slice, mesh and bucket."""

    setup: Experiment
    where: Slice
    mesh: MeshConfig
    bucket: Bucket

    def held(self, **changes: Any) -> dict[str, float]:
        """Bytes per device that are there before the step, with some fields changed.

        Raises UserError for a mesh that does not fit the slice or the batch.
        """
        step = dataclasses.replace(self, **changes)
        return programs.train_program(step.setup, make_mesh(step.mesh, self.where.devices), self.bucket).held

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis."""
        return dict(make_mesh(self.mesh, self.where.devices).shape)

    @property
    def samples(self) -> int:
        """Samples of a microbatch in each part of the batch."""
        shards = batch_shards(make_mesh(self.mesh, self.where.devices))
        return max(1, self.bucket.batch // shards // self.setup.train.accumulate)

    @property
    def block_inputs(self) -> float:
        """Bytes per device of the inputs of all blocks of the DiT, in 16 bits: what ``remat="full"`` keeps."""
        dit = self.setup.dit
        grid, patch = latent_grid(self.setup, self.bucket), registry.module(dit).patch
        tokens = math.prod(side // cut for side, cut in zip(grid, patch, strict=True))
        layers = getattr(dit, "layers", 0) or dit.layers_double + dit.layers_single
        return 2.0 * self.samples * tokens / self.sizes["context"] * dit.width * layers


def advise(report: Report, step: Step) -> tuple[str, ...]:
    """Lines for the report: on a failure what saves memory, else what saves time, the largest gain first."""
    if report.passed:
        knobs = [knob for knob in _faster(report, step) if knob.saved > LEAST_S * report.seconds]
        ordered = sorted(knobs, key=lambda knob: -knob.saved)
        return tuple(f"up to {units.seconds(knob.saved)} less: {knob.flags}  ({knob.why})" for knob in ordered)
    knobs = [knob for knob in _smaller(report, step) if knob.saved > LEAST_BYTES * report.limit]
    ordered = sorted(knobs, key=lambda knob: -knob.saved)
    lines = [f"about {size(knob.saved)} less: {knob.flags}  ({knob.why})" for knob in ordered]
    return (*lines, *_together(report, ordered))


def size(count: float) -> str:
    """Bytes in a unit that a person reads."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / MIB:.2f} MiB"


def _together(report: Report, knobs: list[Knob]) -> Iterator[str]:
    """The fewest knobs whose savings make the step fit, or how many chips it takes beyond all of them."""
    over, chosen = report.needed - report.limit, []
    for knob in knobs:
        if over <= 0:
            break
        chosen.append(knob.flags)
        over -= knob.saved
    if over > 0:
        chips = math.ceil(report.devices * (report.limit + over) / report.limit)
        yield f"all of it leaves {size(over)} too much: --topology of a slice of at least {chips} such chips"
    elif len(chosen) > 1:
        yield f"fits, by this estimate, with: {' '.join(chosen)}"


def _smaller(report: Report, step: Step) -> Iterator[Knob]:
    """What takes less memory."""
    setup, train, sizes = step.setup, step.setup.train, step.sizes
    held = sum(value for name, value in report.memory.items() if name != "activations")
    activations, over = max(report.needed - held, 0.0), report.needed - report.limit
    gradients = report.memory.get("trainable", 0.0) if train.accumulate == 1 else 0.0  # their sum is held beside them
    factors = [k for k in range(2, step.samples + 1) if step.samples % k == 0]
    if factors:
        saving = {k: activations * (1 - 1 / k) - gradients for k in factors}
        k = next((k for k in factors if saving[k] >= over), factors[-1])
        why = f"activations of 1/{k} of the samples at a time"
        yield Knob(f"--config.train.accumulate={k * train.accumulate}", saving[k], why)
    elif sizes["fsdp"] % 2 == 0 and sizes["context"] < WIDEST:
        mesh = sizes | {"fsdp": sizes["fsdp"] // 2, "context": 2 * sizes["context"]}
        accumulate = 2 * train.accumulate
        flags = f"--mesh {_named(mesh)} --config.train.accumulate={accumulate}"
        yield Knob(flags, activations / 2 - gradients, "two devices share the tokens of a sample")
    yield from _remat(step, activations)
    if setup.mesh.whole:
        saved = held - _sum(step, setup=dataclasses.replace(setup, mesh=dataclasses.replace(setup.mesh, whole=())))
        yield Knob("--config.mesh.whole=()", saved, f"{', '.join(setup.mesh.whole)} in shards; gathered in every pass")
    if sizes["data"] > step.where.slices and sizes["data"] % step.where.slices == 0:
        mesh = sizes | {"data": step.where.slices, "fsdp": sizes["fsdp"] * sizes["data"] // step.where.slices}
        saved = held - _sum(step, mesh=dataclasses.replace(step.mesh, **mesh))
        yield Knob(f"--mesh {_named(mesh)}", saved, "parameters and optimizer in shards, not in copies")
    if train.frozen_dtype == "float32":
        why = "frozen weights in 16 bits; rounds them"
        yield Knob("--config.train.frozen_dtype=bfloat16", report.memory.get("frozen", 0.0) / 2, why)


def _remat(step: Step, activations: float) -> Iterator[Knob]:
    """More of the DiT computed again in the backward pass."""
    kept, remat = step.block_inputs, step.setup.dit.remat
    layers = getattr(step.setup.dit, "layers", 0) or step.setup.dit.layers_double + step.setup.dit.layers_single
    if remat == "full":
        yield Knob("--config.dit.remat=offload", min(kept, activations), "block inputs of the DiT on the host")
        return
    saved = {
        "none": activations - kept - 2 * activations / layers,
        "dots": min(PRODUCTS * kept, activations - kept),
        "hidden": min(kept * (1 + HIDDEN), activations - kept),
        "attention": min(kept, activations - kept),
    }
    if remat in saved:
        yield Knob("--config.dit.remat=full", saved[remat], "blocks of the DiT computed again in the backward pass")


def _faster(report: Report, step: Step) -> Iterator[Knob]:
    """What takes less time and fits into the memory that is left."""
    setup, room = step.setup, report.limit - report.needed
    exposed = {part.name: part.collectives for part in report.parts}
    lighter = {"dots": "none", "hidden": "dots", "attention": "hidden", "full": "attention", "offload": "full"}
    lighter["offload_attention"] = "attention"
    assert lighter.keys() < set(REMAT_CHOICES)
    if setup.dit.remat in lighter:
        why = f"less is computed again; tells within {size(room)} of room"
        yield Knob(f"--config.dit.remat={lighter[setup.dit.remat]}", report.recomputed, why)
    vae = sum(part.seconds for part in report.parts if part.name == parts.VAE)
    if vae and setup.sources:
        yield Knob("metacanvas prepare --latents", vae, "latents that are computed once, before the training")
    if "mllm" not in setup.mesh.whole and setup.uses_mllm:
        whole = (*setup.mesh.whole, "mllm")
        changed = dataclasses.replace(setup, mesh=dataclasses.replace(setup.mesh, whole=whole))
        more = _sum(step, setup=changed) - sum(v for name, v in report.memory.items() if name != "activations")
        saved = sum(exposed.get(name, 0.0) for name in ("MLLM prefix", parts.CANVAS_WRITE))
        if more < room:
            text = "(" + "".join(f"'{part}'," for part in whole) + ")"
            yield Knob(f'--config.mesh.whole="{text}"', saved, f"no gathers of the MLLM; {size(more)} more")
    accumulate, activations = setup.train.accumulate, report.memory.get("activations", 0.0)
    if accumulate % 2 == 0 and activations < room:
        why = f"parameters are gathered half as often; about {size(activations)} more"
        yield Knob(f"--config.train.accumulate={accumulate // 2}", sum(exposed.values()) / 2, why)
    yield Knob("--search 8", sum(exposed.values()), "another mesh: collectives that nothing hides")


def _sum(step: Step, **changes: Any) -> float:
    """What a changed step holds, in bytes per device; infinite where it cannot be."""
    try:
        return sum(step.held(**changes).values())
    except UserError:
        return math.inf


def _named(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] > 1)
