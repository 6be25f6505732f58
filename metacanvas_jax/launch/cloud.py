"""The points of a sweep on TPU slices: started side by side, watched and given back, by ``tpu_scripts/``."""

import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import SliceName
from metacanvas_jax.launch import jobs, sweeps
from metacanvas_jax.launch.sweeps import Point, history

TPU_SCRIPTS = ("create.sh", "setup.sh", "launch.sh")  # in this order, for every point
GKE_SCRIPTS = ("jobset.sh",)


@dataclass(frozen=True)
class Job:
    """A point on machines of its own: the variables of ``tpu_scripts/env.sh``, its slices, and its steps."""

    point: Point
    variables: Mapping[str, str]
    where: SliceName
    steps: int

    @property
    def name(self) -> str:
        """The name of the request."""
        return self.variables["NAME"]

    @property
    def workdir(self) -> Path:
        """The folder of the run."""
        return files.folder(self.variables["WORKDIR"])


def make_jobs(
    points: Sequence[Point],
    configs: Sequence[ConfigDict],
    sweep: str,
    workdir: str,
    environment: Mapping[str, str],
    extra: Sequence[str] = (),
) -> list[Job]:
    """One job per point on the slice that its config was planned for, or on that of TPU and TOPOLOGY.

    ``configs`` are the points' own, ``environment`` the variables of ``env.sh``, ``extra`` further arguments. Raises
    UserError for names that a cloud would refuse, and as ``jobs.chosen``.
    """
    found = []
    for point, config in zip(points, configs, strict=True):
        where, changes = jobs.chosen(config.hardware, environment)
        label = re.sub("[^a-z0-9-]", "-", f"{sweep}-{point.name}".lower()).strip("-")
        variables = {
            "NAME": label,
            "RUN": f"{sweep}/{point.name}",
            "CONFIG": point.config,
            "OVERRIDES": shlex.join(jobs.merged(changes, jobs.folders(environment, config), point.overrides, extra)),
            "WORKDIR": f"{workdir}/{point.name}",
            **{name: value for name, value in jobs.shell_variables(where).items() if name in SIZES},
            "CHECKED": "1",
        }
        jobs.check_names(variables)
        found.append(Job(point, variables, where, config.train.steps))
    return found


SIZES = ("TPU", "TOPOLOGY", "SLICES")


def shell(job: Job, scripts: Sequence[str]) -> str:
    """A job as one line of shell."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in job.variables.items())
    return f"(export {settings}; {' && '.join(f'tpu_scripts/{script}' for script in scripts)})"


def machines(found: Sequence[Job], environment: Mapping[str, str]) -> str:
    """The slices of jobs in words, with their place."""
    slices = jobs.described([job.where for job in found])
    return f"{slices} in {environment['ZONE']} ({environment['PROJECT']})"


def run_scripts(found: Sequence[Job], root: Path, scripts: Sequence[str], options: Sequence[str], what: str) -> None:
    """Runs the scripts of all jobs side by side, as requests wait for machines; one after another in a dry run.

    A job that fails does not stop the others; raises UserError naming each one with the script that failed.
    """

    def run_job(job: Job) -> str:
        for script in scripts:
            place = f"tpu_scripts/{script}"
            accepted = [option for option in options if option != "--yes" or script in ASKING]
            code = subprocess.run([str(root / place), *accepted], env=_environment(job), check=False).returncode
            if code:
                return f"{job.name} ({place})"
        return ""

    with ThreadPoolExecutor(1 if "--dry-run" in options else len(found)) as pool:
        failed = list(filter(None, pool.map(run_job, found)))
    if failed:
        raise UserError(f"{len(failed)} of {len(found)} jobs failed to {what}: {', '.join(failed)}")


ASKING = ("create.sh", "teardown.sh", "resume.sh", "jobset.sh")  # the scripts that create or delete machines


def status(found: Sequence[Job], root: Path, say: Callable[[str], None] = print) -> None:
    """Says one line per point: the state of its request, what its hosts run, how far it came, and its own error."""

    def ask(job: Job) -> str:
        call = [str(root / "tpu_scripts" / "status.sh")]
        result = subprocess.run(call, env=_environment(job), check=False, capture_output=True, text=True)
        lines = result.stdout.splitlines()
        state = lines[0].split()[-1] if lines else "unknown"
        hosts: dict[str, int] = {}
        for line in lines[1:]:
            doing = line.partition(" ")[2]
            hosts[doing] = hosts.get(doing, 0) + 1
        doing = ", ".join(f"{count} host{'s' * (count > 1)} {doing}" for doing, count in sorted(hosts.items()))
        return ": ".join(part for part in (state, doing) if part)

    with ThreadPoolExecutor(len(found)) as pool:
        answers = list(pool.map(ask, found))
    width = max(len(job.point.name) for job in found)
    for job, answer in zip(found, answers, strict=True):
        parts = [f"step {progress(job.workdir)} of {job.steps}", answer]
        if error := sweeps.read_error(job.workdir):
            parts.append(error)
        say(f"{job.point.name:{width}}  {'; '.join(parts)}")


def progress(workdir: Path) -> int:
    """The step of the newest checkpoint or of the last line of metrics; 0 for a run that was not begun."""
    saved = workdir / "checkpoints"
    steps = [int(path.name) for path in saved.iterdir() if path.name.isdigit()] if saved.exists() else []
    return int(max([0, *steps, *(row["step"] for row in history(workdir))]))


def finished(job: Job) -> bool:
    """Whether a run came to its last step."""
    return progress(job.workdir) >= job.steps


def _environment(job: Job) -> dict[str, str]:
    return jobs.environment() | dict(job.variables)
