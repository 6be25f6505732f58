"""Plans every full-size config on its TPU slices, and two jobs with published times; writes docs/performance.md.

    python benchmarks/plan_all.py [--only TEXT] [--sampling] [--page-only] [--out docs/performance.md]

Compilations are cached (``metacanvas_jax/plan/compile.py``), so a second run compiles only changes. The reports are
stored in ``benchmarks/plans``, and the page shows all of them: ``--only`` does not change the others. Needs the [tpu]
extra, but no TPU.
"""

# ruff: noqa: E402 (the environment comes before jax)
import argparse
import sys
from pathlib import Path

from metacanvas_jax.plan.environment import prepare_environment

prepare_environment()

from published_jobs import JOBS as PUBLISHED

from metacanvas_jax.errors import UserError
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.plan import document
from metacanvas_jax.plan.report import table
from metacanvas_jax.plan.shipped import jobs, run_job
from metacanvas_jax.plan.study import study
from metacanvas_jax.plan.topology import find_slice

PLANS = Path(__file__).parent / "plans"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="jobs whose 'config slice', then ' latents' or ' pixels', contains this"
    )
    parser.add_argument("--sampling", action="store_true", help="sampling as well")
    parser.add_argument("--page-only", action="store_true", help="compile nothing, write the page of what is kept")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    arguments = parser.parse_args()
    for job in () if arguments.page_only else jobs():
        if arguments.only in f"{job.config} {job.on.topology} {'pixels' if job.on.pixels else 'latents'}":
            name, reports = document.name_of(job), []
            others = [x for x in document.kept(PLANS, name) if x.program.startswith("sample")]
            try:
                for report in run_job(job, say, sampling=arguments.sampling):
                    reports.append(report)
                    document.keep(PLANS, name, [*reports, *([] if arguments.sampling else others)])
                    print(table(report), flush=True)
            except UserError as error:
                say(f"{job.title} on {job.on.topology}: {error}")
    for truth in () if arguments.page_only else PUBLISHED:
        if arguments.only in f"{truth.name} {truth.topology}":
            where = find_slice(truth.topology)
            report = study("published", truth.make(make_mesh(truth.mesh, where.devices)), where, say)
            document.keep(PLANS, document.name_of(truth), [report])
            print(table(report), flush=True)
    draft = arguments.out.with_suffix(".tmp")
    draft.write_text(document.page(PLANS, jobs(), PUBLISHED))
    draft.replace(arguments.out)


if __name__ == "__main__":
    main()
