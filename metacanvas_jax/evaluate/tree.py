"""Draws many prompts into a tree of files, on all devices and processes, and goes on where it was stopped.

The results of one shape are cut into groups, in the order of the entries: what is there already changes no group. A
group is drawn whole, and of its entries those are written of which a file is missing. So a result always has the same
place in the same batch, and its bytes depend neither on the devices and processes nor on where the drawing was stopped
(``paint/one_shape.py`` says for which parameters). Each file is written at once: a tree never holds half a file.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from metacanvas_jax.paint.one_shape import Numbers, OneShape, Pending
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

    ``each`` results are a group, which a device draws at once; ``options`` are those of ``Painter.program``. All
    processes call it together and return when all files are written. Raises NonFinitePixels, and UserError for media
    that cannot be read and files that cannot be written.
    """
    check(entries, out)
    todo = missing(entries, out)
    results = sum(len(entry.numbers) for entry in todo)
    chief = jax.process_index() == 0
    if progress and chief:
        print(
            f"{len(entries) - len(todo)} of {len(entries)} entries are there; {results} results are drawn", flush=True
        )
    awaited = {entry.paths[0] for entry in todo}
    shapes: dict[Bucket, list[Entry]] = {}
    for entry in entries:
        shapes.setdefault(entry.bucket, []).append(entry)
    with tqdm(total=results, desc="drawing", disable=not (progress and chief)) as bar, _writer(out) as write:
        for bucket, some in shapes.items():
            work = chains(groups(some, each), awaited)
            if work:
                drawing = OneShape(painter, params, bucket, each=each, seed=seed, **options)
                _draw_shape(drawing, work, awaited, Spread.of(params), write, bar)
    distributed.barrier("end of the drawing", 3600)
    return results


def groups(entries: Sequence[Entry], each: int) -> list[list[Row]]:
    """The results of all entries in their order, ``each`` at a time; the last group may be smaller."""
    rows = [Row(entry, number) for entry in entries for number in entry.numbers]
    return [rows[start : start + each] for start in range(0, len(rows), each)]


def chains(groups: Sequence[list[Row]], awaited: Collection[str]) -> list[list[list[Row]]]:
    """The groups with a result of an awaited entry. Those that share such an entry are one chain: one process draws it.

    ``awaited`` are the first paths of entries.
    """
    made: list[list[list[Row]]] = []
    for group in groups:
        wanted = [row for row in group if row.entry.paths[0] in awaited]
        if not wanted:
            continue
        if made and wanted[0] is group[0] and made[-1][-1][-1].entry is wanted[0].entry:
            made[-1].append(group)
        else:
            made.append([group])
    return made


def _draw_shape(
    drawing: OneShape,
    work: list[list[list[Row]]],
    awaited: Collection[str],
    spread: Spread,
    write: Callable[[Entry, list[Frames]], None],
    bar: tqdm,
) -> None:
    """Draws chains of groups of one shape; each process draws every so many of them."""
    part, parts = spread.part()
    shares = [[group for chain in work[p::parts] for group in chain] for p in range(parts)]
    steps = -(-max(map(len, shares)) // drawing.slots)
    collected: dict[str, list[Frames]] = collections.defaultdict(list)
    pending: collections.deque[tuple[Pending, list[list[Row]]]] = collections.deque()

    def wanted(row: Row) -> bool:
        return row.entry.paths[0] in awaited

    def settle() -> None:
        batch, mine = pending.popleft()
        drawn = drawing.fetch(batch, [len(group) for group in mine])
        for row, pixels in zip(itertools.chain(*mine), itertools.chain(*drawn), strict=True):
            if not wanted(row):
                continue
            collected[row.entry.paths[0]].append(pixels)
            if row.number == row.entry.numbers[-1]:
                results = collected.pop(row.entry.paths[0])
                if spread.writes:
                    write(row.entry, results)

    def read(row: Row) -> tuple[Sample, Numbers]:
        return row.entry.sample(), (number_of(row.entry.name), row.number)

    with ThreadPoolExecutor(THREADS) as readers:
        for step in range(steps):
            batches = [share[step * drawing.slots : (step + 1) * drawing.slots] for share in shares]
            mine = batches[part]
            shown = mine if mine or not drawing.together else work[0][:1]
            pending.append((drawing.start([list(readers.map(read, group)) for group in shown]), mine))
            if len(pending) > 1:
                settle()
            bar.update(sum(wanted(row) for batch in batches for group in batch for row in group))
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
