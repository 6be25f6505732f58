"""Plans every full-size config on its TPU slices and two jobs that others measured; writes docs/performance.md.

    python benchmarks/plan_all.py [--only TEXT] [--out docs/performance.md]

Compilations are remembered (``metacanvas_jax/plan/compile.py``), so a second run takes what changed. Needs the [tpu]
extra; no TPU.
"""

# ruff: noqa: E402 (the environment comes before jax)
import argparse
import dataclasses
import sys
from pathlib import Path

from metacanvas_jax.plan.environment import prepare_environment

prepare_environment()

import jax
import jax.numpy as jnp

from metacanvas_jax import build
from metacanvas_jax.cli.options import load_config
from metacanvas_jax.diffusion.flow import TimeConfig, flow_loss, sample_time
from metacanvas_jax.dit.flux import Flux, flux_dev
from metacanvas_jax.dit.wan import Wan, wan2_1_t2v_14b
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.planning import choose, parse_mesh
from metacanvas_jax.plan.programs import Program, device_bytes
from metacanvas_jax.plan.report import ASSUMPTIONS, Report, table
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import GIB, find_slice
from metacanvas_jax.train.optimizer import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import abstract_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.types import Condition


@dataclasses.dataclass(frozen=True)
class Job:
    """A config on a slice; ``mesh`` and ``bucket`` as on the command line."""

    config: str
    topology: str
    mesh: str | None = None
    bucket: str | None = None
    overrides: tuple[str, ...] = ()
    sampling: bool = True


JOBS = (
    Job("configs/t2i_scratch.py", "v5e:4x4"),
    Job("configs/t2i_scratch.py", "v6e:4x4"),
    Job("configs/t2i_lora.py", "v5e:4x4"),
    Job("configs/t2i_lora.py", "v6e:4x4"),
    Job("configs/image_editing.py", "v5p:4x4x4"),
    Job("configs/image_editing.py", "v6e:8x8"),
    Job("configs/video_stage1.py", "v5p:4x4x8"),
    Job("configs/video_stage1.py", "v6e:16x16"),
    Job("configs/video_stage2.py", "v5p:4x4x8"),
    Job("configs/video_stage2.py", "v6e:16x16"),
    Job("configs/video_stage3.py", "v5p:4x4x8"),
    Job("configs/video_stage3.py", "v6e:16x16"),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A job whose step time others published, and what is assumed about it."""

    name: str
    seconds: float
    source: str
    assumptions: str


WAN = Measured(
    "Wan2.1-14B text-to-video, 720x1280, 81 frames, batch 1, on v5p-8 (4 chips)",
    36.0,
    "MaxDiffusion README",
    "all weights trained in float32 with AdamW, bfloat16 compute, block inputs kept and blocks recomputed, latents and "
    "text states given, tokens split over the 4 chips",
)
FLUX = Measured(
    "FLUX.1-dev text-to-image, 1024x1024, batch 8, on v5p-8 (4 chips)",
    1.769,
    "MaxDiffusion README",
    "all weights trained, bfloat16 compute, blocks recomputed, latents and text states given, parameters split over "
    "the 4 chips",
)


def wan_program(mesh: jax.sharding.Mesh) -> Program:
    """Full training of Wan2.1-14B on 75,600 tokens of one sample."""
    config = wan2_1_t2v_14b(dtype="bfloat16", remat="full")
    inputs = {"latents": ((1, 21, 90, 160, 16), jnp.float32), "context": ((1, 512, 4096), jnp.bfloat16)}
    return dit_program("train Wan2.1-14B", Wan(config), inputs, mesh)


def flux_program(mesh: jax.sharding.Mesh) -> Program:
    """Full training of FLUX.1-dev on 4,096 image and 512 text tokens of 8 samples."""
    config = flux_dev(dtype="bfloat16", remat="full")
    inputs = {
        "latents": ((8, 1, 128, 128, 16), jnp.float32),
        "context": ((8, 512, 4096), jnp.bfloat16),
        "pooled": ((8, 768), jnp.float32),
        "guidance": ((8,), jnp.float32),
    }
    return dit_program("train FLUX.1-dev", Flux(config), inputs, mesh)


def dit_program(name: str, network, inputs: dict, mesh: jax.sharding.Mesh) -> Program:
    """A train step of a DiT alone."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-5))
    batch = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in inputs.items()}

    def loss(trainable, frozen, batch, key):
        noise_key, time_key = jax.random.split(key)
        latents = batch["latents"]
        condition = Condition(**{key: value for key, value in batch.items() if key != "latents"})
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        time = sample_time(time_key, latents.shape[:1], TimeConfig())
        velocity = lambda z, t: network.apply({"params": trainable}, z, t, condition)  # noqa: E731
        return flow_loss(velocity, latents, noise, time), {}

    def init(key, batch):
        condition = Condition(**{key: value for key, value in batch.items() if key != "latents"})
        return network.init(key, batch["latents"], jnp.ones(batch["latents"].shape[:1]), condition)["params"]

    boxed = jax.eval_shape(init, jax.random.key(0), batch)
    params = programs.placed(boxed, programs.shardings(boxed, mesh))
    state = abstract_state(params, optimizer, mesh)
    batch = jax.tree.map(lambda x: programs.spread(x.shape, x.dtype, mesh), batch)
    step = make_step(
        lambda frozen, batch, key: batch, loss, optimizer, state_shardings=jax.tree.map(lambda x: x.sharding, state)
    )
    held = {
        "trainable": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "batch": device_bytes(batch),
    }
    samples = inputs["latents"][0][0]
    return Program(name, step, (state, {}, batch, programs.abstract_key(mesh)), held, samples, mesh, programs.RULES)


def run_job(job: Job) -> list[Report]:
    """Reports of a config on a slice: its dearest bucket and sampling."""
    experiment = build.experiment(load_config(job.config, list(job.overrides)))
    where = find_slice(job.topology)
    mesh = make_mesh(experiment.mesh if job.mesh is None else parse_mesh(job.mesh), where.devices)
    buckets = choose(experiment.shapes, job.bucket)
    made = [programs.train_program(experiment, mesh, bucket) for bucket in buckets]
    if job.sampling and not experiment.given_channels:
        made.append(programs.sample_program(experiment, mesh, buckets[0]))
    return [study(job.config, program, where, say) for program in made]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def page(reports: list[Report], truths: list[tuple[Measured, Report]]) -> str:
    """docs/performance.md."""
    lines = [
        "# Performance, as far as it can be known without a TPU",
        "",
        "Written by `make plan-all` (`benchmarks/plan_all.py`): every full-size config is compiled ahead of time for",
        "its TPU slices and reckoned from the compiled program. `metacanvas plan --config C --topology T` prints the",
        "same for one config.",
        "",
        *(f"- {note}." for note in ASSUMPTIONS),
        "",
        "## Configs",
        "",
        "| config | program | slice | mesh | samples | fits | peak GiB | s per step | MFU | FLOPs / written | canvas |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(report) for report in reports]
    if truths:
        lines += [
            "",
            "## Jobs that others measured",
            "",
            "| job | published | estimate | ratio | assumptions |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {truth.name} | {truth.seconds:.3f} s ({truth.source}) | {report.seconds:.3f} s | "
            f"{report.seconds / truth.seconds:.2f} | {truth.assumptions} |"
            for truth, report in truths
        ]
    lines += ["", "## In detail"]
    for report in [*reports, *(report for _, report in truths)]:
        name = f"{report.config}: {report.program}, {report.topology}"
        lines += ["", f"<details><summary>{name}</summary>", "", "```", table(report).rstrip(), "```", "", "</details>"]
    return "\n".join(lines) + "\n"


def row(report: Report) -> str:
    """One line of the table of configs."""
    mesh = " ".join(f"{axis} {size}" for axis, size in report.mesh.items() if size > 1) or "-"
    cells = [report.config, report.program, report.topology, mesh, str(report.samples)]
    cells += ["PASS" if report.passed else "FAIL", f"{report.needed / GIB:.1f} of {report.limit / GIB:.1f}"]
    if report.passed:
        canvas = report.canvas_share()
        cells += [f"{report.seconds:.3f}", f"{report.mfu:.1%}", f"{report.flops_ratio:.3f}"]
        cells.append(f"+{canvas:.2%} s, +{report.canvas_share('flops'):.2%} FLOPs" if canvas else "-")
    else:
        cells += ["-"] * 4
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose config and slice contain this text")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args()
    reports = []
    for job in JOBS:
        if arguments.only in f"{job.config} {job.topology}":
            reports += run_job(job)
            print(table(reports[-1]), flush=True)
    truths = []
    for truth, make, mesh in (
        (WAN, wan_program, MeshConfig(data=1, context=4)),
        (FLUX, flux_program, MeshConfig(data=1, fsdp=4)),
    ):
        if arguments.only in f"{truth.name} v5p:2x2x1":
            where = find_slice("v5p:2x2x1")
            truths.append((truth, study("truth check", make(make_mesh(mesh, where.devices)), where, say)))
            print(table(truths[-1][1]), flush=True)
    draft = arguments.out.with_suffix(".tmp")
    draft.write_text(page(reports, truths))
    draft.replace(arguments.out)


if __name__ == "__main__":
    main()
