"""The full-size configs and the slices they are made for: what ``make plan-all`` and the slow tests compile."""

import dataclasses
from collections.abc import Callable, Iterator

from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.schema import Experiment
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.plan import programs
from metacanvas_jax.plan.planning import choose, parse_mesh
from metacanvas_jax.plan.report import Report
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice


@dataclasses.dataclass(frozen=True)
class Job:
    """A config on a slice; ``mesh`` (None: the config's), ``bucket`` and ``overrides`` as on the command line.

    ``pixels`` says that the step encodes what it reads, instead of reading stored latents.
    """

    config: str
    topology: str
    mesh: str | None = None
    bucket: str | None = None
    overrides: tuple[str, ...] = ()
    pixels: bool = False

    @property
    def title(self) -> str:
        """The config, and what is changed in it."""
        return " ".join((self.config, *self.overrides, *(("from pixels",) if self.pixels else ())))

    def experiment(self) -> Experiment:
        """The experiment, its data not looked at."""
        setup = read.experiment(load_config(self.config, list(self.overrides)))
        return setup if self.pixels else programs.with_latents(setup)


# On v6e a video does not fit one chip's memory: four neighbours share its tokens. Slices of 48 rows, a multiple of 16,
# for groups of 64: the sums of gradients become reduce-scatters.
VIDEOS_ON_V6E = "data=4,fsdp=16,context=4"

# Where a chip's memory is too small for the whole MLLM, for what its passes leave, or for 20 samples.
SLICED = ("--config.mesh.whole=()",)
RECOMPUTED = ("--config.mllm.language.remat=full",)
IN_PARTS = ("--config.train.accumulate=2",)

JOBS = (
    Job("configs/t2i_scratch.py", "v5e:4x4", overrides=SLICED + IN_PARTS),
    Job("configs/t2i_scratch.py", "v5e:4x4", overrides=SLICED + IN_PARTS, pixels=True),
    Job("configs/t2i_scratch.py", "v6e:4x4"),
    Job("configs/t2i_lora.py", "v5e:4x4", overrides=SLICED + IN_PARTS),
    Job("configs/t2i_lora.py", "v6e:4x4"),
    Job("configs/image_editing.py", "v5p:4x4x4"),
    Job("configs/image_editing.py", "v6e:8x8", overrides=("--config.dit.remat=full", *RECOMPUTED)),
    Job("configs/video_stage1.py", "v5p:4x4x8"),
    Job("configs/video_stage1.py", "v6e:16x16"),
    Job("configs/video_stage2.py", "v5p:4x4x8"),
    Job("configs/video_stage2.py", "v6e:16x16", VIDEOS_ON_V6E),
    Job("configs/video_stage3.py", "v5p:4x4x8"),
    Job("configs/video_stage3.py", "v6e:16x16", VIDEOS_ON_V6E, overrides=SLICED + RECOMPUTED),
)


def run_job(job: Job, say: Callable[[str], None] = lambda line: None, *, sampling: bool = False) -> Iterator[Report]:
    """Reports of the training step on the bucket asked for (by default the dearest) and of sampling, as they come."""
    experiment = job.experiment()
    where = find_slice(job.topology)
    mesh = make_mesh(experiment.mesh if job.mesh is None else parse_mesh(job.mesh), where.devices)
    buckets = choose(experiment.shapes, job.bucket)
    for bucket in buckets:
        yield study(job.title, programs.train_program(experiment, mesh, bucket), where, say)
    if sampling:
        yield study(job.title, programs.sample_program(experiment, mesh, buckets[0]), where, say)
