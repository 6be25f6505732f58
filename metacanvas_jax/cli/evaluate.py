"""``metacanvas evaluate``."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from metacanvas_jax import files
from metacanvas_jax.cli import options
from metacanvas_jax.errors import UserError

if TYPE_CHECKING:
    from metacanvas_jax.evaluate.contract import Asked
    from metacanvas_jax.evaluate.tree import Entry

EXAMPLE = """metacanvas evaluate --run runs/demo --guidance 1.5
         metacanvas evaluate --run runs/t2i --benchmark geneval --out results/geneval
         metacanvas evaluate --collect results"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", help="folder of a trained run")
    what.add_argument("--collect", metavar="FOLDER", help="print the scores of all trees below a folder as one table")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--evaluator", help="scenes, tasks, flow_loss or prompts (default: the first of the config)")
    kind.add_argument("--benchmark", help="draw the tree of a public benchmark (docs/evaluation.md)")
    parser.add_argument("--data", default="", help="prompts and media of the benchmark; a file of prompts")
    parser.add_argument("--out", help="JSON to write (RUN/scores.json); of a benchmark: the folder of its tree")
    parser.add_argument("--limit", type=int, help="the first so many prompts only")
    parser.add_argument("--seed", type=int, help="of the noise (default: the config's; of a benchmark: 0)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none (default: the config's)")
    parser.add_argument("--batch", type=int, help="results that each device draws at once (default: the config's)")
    parser.add_argument("--no-canvas", action="store_true", help="leave the canvas out")
    parser.add_argument("--base", action="store_true", help="the backbone as published, without MetaCanvas")
    parser.add_argument(
        "--judge",
        metavar="FOLDER|URL",
        help="then score edits and references by an MLLM: its folder, as transformers writes it, or the URL of an "
        "OpenAI-compatible server",
    )
    parser.add_argument("--judge-model", help="of a server: the name of its model (default: the only one that it has)")
    options.add_checkpoint(parser)
    options.add_verify(parser)
    options.add_mesh(parser)


def run(arguments: argparse.Namespace) -> None:
    """Draws what an evaluator or a benchmark asks for; prints the scores, or the command that computes them."""
    from metacanvas_jax.evaluate import evaluators
    from metacanvas_jax.evaluate.benchmarks import runner
    from metacanvas_jax.evaluate.contract import Asked

    if arguments.collect is not None:
        from metacanvas_jax.evaluate.collect import collect

        table = collect(files.folder(arguments.collect))
        if arguments.out is not None:
            files.write(files.folder(arguments.out), table)
        print(table, end="")
        return
    check(arguments)
    for option, name, known in (
        ("--evaluator", arguments.evaluator, evaluators.EVALUATORS),
        ("--benchmark", arguments.benchmark, runner.BENCHMARKS),
    ):
        if name is not None and name not in known:
            raise UserError(f"{option} is {name!r}, expected one of {', '.join(known)}")
    asked = Asked(
        guidance=arguments.guidance,
        canvas=not arguments.no_canvas,
        seed=arguments.seed,
        limit=arguments.limit,
        data=arguments.data,
        each=arguments.batch,
        base=arguments.base,
        progress=True,
    )
    options.keep_compiled()
    with options.connected(arguments) as writes:
        asked = dataclasses.replace(asked, progress=writes)
        if arguments.benchmark:
            _benchmark(arguments, asked, writes)
        else:
            _scores(arguments, asked, writes)


def _benchmark(arguments: argparse.Namespace, asked: "Asked", writes: bool) -> None:
    """Draws a tree. All that is wrong with its input is said before any weight is read."""
    from metacanvas_jax.evaluate.benchmarks import runner
    from metacanvas_jax.evaluate.published import published
    from metacanvas_jax.paint import placing, runs
    from metacanvas_jax.paint.painter import Painter

    setup = runs.setup_of(arguments.run)
    setup = published(setup) if arguments.base else setup
    asked = dataclasses.replace(asked, out=files.folder(arguments.out))
    entries = runner.prepare(arguments.benchmark, setup, asked)
    judges = _judges(arguments, entries, writes)
    painter = Painter(setup)
    shapes = list(dict.fromkeys(entry.bucket for entry in entries))
    needs = painter.needs(shapes, guidance=asked.guidance, canvas=asked.canvas)
    mesh = placing.mesh_for(setup, needs, chosen=options.mesh(arguments.mesh))
    where = {"verify": arguments.verify, "mesh": mesh, "needs": needs, "painter": painter}
    if arguments.base:
        trained = runs.assembled(setup, **where)
    else:
        trained = runs.load(arguments.run, step=arguments.checkpoint, **where)
    asked = dataclasses.replace(asked, step=trained.step)
    drawn = runner.draw(arguments.benchmark, painter, trained.params, asked)
    if writes:
        print(drawn.table())
    del trained  # its memory is the judge's
    if judges is not None:
        judges(asked.out)


def _scores(arguments: argparse.Namespace, asked: "Asked", writes: bool) -> None:
    """Scores a run, and writes the scores as JSON."""
    from metacanvas_jax.evaluate import evaluators, grid, prompts
    from metacanvas_jax.paint import placing, runs
    from metacanvas_jax.paint.painter import Painter
    from metacanvas_jax.report import pictures

    setup = runs.setup_of(arguments.run)
    name = arguments.evaluator or evaluators.names_of(setup)[0]
    draws, judges = name == "prompts", None  # prompts are drawn into a folder, which is the result
    if arguments.judge is not None and not draws:
        raise UserError("--judge scores a --benchmark or what --evaluator prompts draws")
    out = files.folder(arguments.out or files.join(arguments.run, "prompts" if draws else "scores.json"))
    if draws:
        asked = dataclasses.replace(asked, out=out)
        judges = _judges(arguments, prompts.entries(setup, prompts.lines_of(asked)), writes)
    else:
        files.check_writable(out)
    painter = Painter(setup)
    held = painter.held()
    mesh = placing.mesh_for(painter.setup, held, chosen=options.mesh(arguments.mesh))
    where = {"step": arguments.checkpoint, "mesh": mesh, "needs": held, "painter": painter}
    trained = runs.load(arguments.run, verify=arguments.verify, **where)
    asked = dataclasses.replace(asked, step=trained.step)
    result = evaluators.run(painter, trained.params, (name,), asked)[name]
    if writes and not draws:
        result.save(out)
    if writes:
        print(result.table())
    print(out)
    if name == "flow_loss":  # which draws nothing
        sheets = grid.sheets(painter, trained.params, asked)
        for task, sheet in sheets.items() if writes else ():
            place = out.parent / f"{out.stem}_{task}.png"
            files.write(place, pictures.png(sheet))
            print(place)
    del trained  # its memory is the judge's
    if judges is not None:
        judges(out)


def _judges(arguments: argparse.Namespace, entries: "Sequence[Entry]", writes: bool) -> Callable[[Path], None] | None:
    """What judges a tree of these entries and prints the scores; None without ``--judge``.

    Raises UserError, before anything is drawn, for a task without a judge, a folder that holds none, and a server that
    does not answer.
    """
    from metacanvas_jax.evaluate.benchmarks import runner
    from metacanvas_jax.evaluate.judging import local, vie
    from metacanvas_jax.evaluate.judging.server import ServerJudge

    if arguments.judge is None:
        return None
    vie.check(entries)
    remote = arguments.judge.startswith(("http://", "https://"))
    if not remote and arguments.judge_model is not None:
        raise UserError("--judge-model names a model of a server; this --judge is a folder")
    if not remote:
        local.check(arguments.judge)
    server = ServerJudge(arguments.judge, arguments.judge_model) if remote and writes else None

    def judged(out: Path) -> None:
        if remote and server is None:
            return  # the first process asks the server
        path = runner.scores_of(out) / "vie.json"
        found = vie.judge_tree(server or local.LocalJudge(arguments.judge), entries, out, path)
        if writes:
            print(f"{found.table()}\n{path}")

    return judged


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for numbers that make no sense, and options that would have no effect."""
    if arguments.guidance is not None and not math.isfinite(arguments.guidance):
        raise UserError(f"--guidance is {arguments.guidance}, expected a finite number")
    for name in ("limit", "batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    if arguments.seed is not None:
        options.check_seed(arguments.seed)
    if arguments.base and not arguments.benchmark:
        raise UserError("--base draws a --benchmark; without one it has no effect")
    if arguments.base and arguments.checkpoint is not None:
        raise UserError("--base draws without what the run trained; --checkpoint has no effect")
    if arguments.benchmark and arguments.out is None:
        raise UserError("--benchmark needs --out: the folder of its tree")
