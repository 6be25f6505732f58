"""Draws many prompts into a tree of files, on all devices and processes, and goes on where it was stopped.

An entry is drawn again unless all of its files are there, and each file is written at once: a tree never holds half a
file. What an entry becomes depends on the parameters, its own content, its name and the seed alone.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from tqdm import tqdm

from metacanvas_jax import files
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.paint.one_shape import OneShape, Pending
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.paint.spread import Spread
from metacanvas_jax.parallel import distributed
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.types import Params

Frames = UInt8[np.ndarray, "t h w 3"]

THREADS = 8  # that read media and write files
AHEAD = 2  # batches whose files may still be written while others are drawn


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is drawn and written together.

    ``name`` and each of ``numbers`` decide the noise of one result. ``sample`` reads its media. ``files`` turns the
    results, one per number, into the contents of ``paths``, which are relative to the tree.
    """

    name: str
    bucket: Bucket
    sample: Callable[[], Sample]
    files: Callable[[list[Frames]], Mapping[str, bytes]]
    paths: tuple[str, ...]
    numbers: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Row:
    """One result of an entry."""

    entry: Entry
    number: int


def number_of(name: str) -> int:
    """The number of a name in the noise: a hash, so that it does not depend on what else is drawn."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def check(entries: Sequence[Entry], out: Path) -> None:
    """Raises UserError for two entries of one path, names that are too long, and a tree that cannot be written."""
    seen: dict[str, str] = {}
    for entry in entries:
        for path in entry.paths:
            if path in seen:
                raise UserError(
                    f"{seen[path]} and {entry.name} are written to the same file, {path}: a key is there twice"
                )
            seen[path] = entry.name
            if len(path.rpartition("/")[2].encode()) > files.LONGEST_NAME:
                raise UserError(f"{entry.name}: the name of its file has more than {files.LONGEST_NAME} bytes")
    if seen:
        files.check_writable(out / next(iter(seen)))


def missing(entries: Sequence[Entry], out: Path) -> list[Entry]:
    """The entries of which a file is missing. All processes call it together and get the same."""
    with ThreadPoolExecutor(THREADS) as pool:
        there = list(pool.map(lambda entry: all((out / path).exists() for path in entry.paths), entries))
    if jax.process_count() > 1:  # a process may write to a disk of its own
        there = np.any(multihost_utils.process_allgather(np.asarray(there, bool)), axis=0).tolist()
    return [entry for entry, done in zip(entries, there, strict=True) if not done]


def draw(
    painter: Painter,
    params: Params,
    entries: Sequence[Entry],
    out: Path,
    *,
    each: int,
    seed: int,
    progress: bool = False,
    **options: Any,
) -> int:
    """Draws the entries that ``out`` misses; returns how many results that were.

    ``each`` results are drawn at once on every device; ``options`` are those of ``Painter.program``. All processes call
    it together and return when all files are written. Raises NonFinitePixels, and UserError for media that cannot be
    read and files that cannot be written.
    """
    check(entries, out)
    todo = missing(entries, out)
    results = sum(len(entry.numbers) for entry in todo)
    chief = jax.process_index() == 0
    if progress and chief:
        print(
            f"{len(entries) - len(todo)} of {len(entries)} entries are there; {results} results are drawn", flush=True
        )
    shapes: dict[Bucket, list[Entry]] = {}
    for entry in todo:
        shapes.setdefault(entry.bucket, []).append(entry)
    with tqdm(total=results, desc="drawing", disable=not (progress and chief)) as bar, _writer(out) as write:
        for bucket, group in shapes.items():
            drawing = OneShape(painter, params, bucket, each=each, seed=seed, **options)
            _draw_shape(drawing, group, Spread.of(params), write, bar)
    distributed.barrier("end of the drawing", 3600)
    return results


def _draw_shape(
    drawing: OneShape, group: list[Entry], spread: Spread, write: Callable[[Entry, list[Frames]], None], bar: tqdm
) -> None:
    """Draws entries of one shape; each process draws every so many of them, with all of their numbers."""
    part, parts = spread.part()
    rows = [[Row(entry, number) for entry in group[p::parts] for number in entry.numbers] for p in range(parts)]
    steps = -(-max(map(len, rows)) // drawing.size)
    collected: dict[str, list[Frames]] = collections.defaultdict(list)
    pending: collections.deque[tuple[Pending, list[Row]]] = collections.deque()

    def settle() -> None:
        batch, mine = pending.popleft()
        drawn = drawing.fetch(batch, len(mine)).pixels
        for row, pixels in zip(mine, drawn, strict=True):
            collected[row.entry.paths[0]].append(pixels)
            if row.number == row.entry.numbers[-1]:
                results = collected.pop(row.entry.paths[0])
                if spread.writes:
                    write(row.entry, results)

    with ThreadPoolExecutor(THREADS) as readers:
        for step in range(steps):
            batches = [some[step * drawing.size : (step + 1) * drawing.size] for some in rows]
            mine = batches[part]
            shown = mine or rows[0][:1]
            samples = list(readers.map(lambda row: row.entry.sample(), shown))
            numbers = [(number_of(row.entry.name), row.number) for row in shown]
            pending.append((drawing.start(samples, numbers), mine))
            if len(pending) > 1:
                settle()
            bar.update(sum(map(len, batches)))
        while pending:
            settle()


@contextlib.contextmanager
def _writer(out: Path) -> Iterator[Callable[[Entry, list[Frames]], None]]:
    """A function that writes the files of an entry beside what the caller does; errors are raised by a later call."""
    running: collections.deque[Future] = collections.deque()

    def one(entry: Entry, results: list[Frames]) -> None:
        made = entry.files(results)
        for path in entry.paths:
            files.write(out / path, made[path])

    def write(entry: Entry, results: list[Frames]) -> None:
        running.append(pool.submit(one, entry, results))
        while len(running) > AHEAD * THREADS:
            running.popleft().result()

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            yield write
            for future in running:
                future.result()
        except BaseException:
            for future in running:
                future.cancel()
            raise


def limited(entries: Sequence[Entry], prompts: int | None) -> list[Entry]:
    """The entries of the first so many names (None: all)."""
    names = dict.fromkeys(entry.name for entry in entries)
    kept = set(itertools.islice(names, prompts))
    return [entry for entry in entries if entry.name in kept]
