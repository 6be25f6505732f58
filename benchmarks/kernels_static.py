"""The kernels in static cycles, bytes and memory, beside the libraries', for every TPU generation, without a TPU.

    python benchmarks/kernels_static.py                                  # all of it: many hours on two quiet cores
    python benchmarks/kernels_static.py --generation v6e --part attention
    python benchmarks/kernels_static.py --table                          # from the rows at hand; compiles nothing

Attention: cycles of the main loop per 1024 queries x 1024 keys of one head of 128, share of the matrix units' peak that
this is, spills. A device with two cores (v4, v5p) counts one. Every row goes to `results/kernels_static.jsonl` as soon
as it is known; rows that are there already, of the same versions, are not compiled again. Libraries take a length that
their blocks divide, so they need no mask, and as much vector memory as ours. Linear attention and prologue: bytes that
the compiled program moves over those it must. Memory: peak of one forward and backward pass over 6 heads.

Tokamax is compared where it is installed. Only its kernel files are loaded, so that Python 3.11 suffices:

    pip install --no-deps --ignore-requires-python --target FOLDER tokamax==0.0.17     # then PYTHONPATH=FOLDER
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.hardware import MIB, TPUS
from metacanvas_jax.kernels.search import CANDIDATES, PAIRS, TOKENS
from metacanvas_jax.kernels.static_schedule import measure
from metacanvas_jax.kernels.tiles import FILE, Tiles, backward_vmem, forward_vmem, usable

CASES = "metacanvas_jax.kernels.cases:"
RESULTS = pathlib.Path(__file__).with_name("results") / "kernels_static.jsonl"
DIRECTIONS = ("forward", "backward")
# Floating-point operations of one core per cycle in its matrix units.
PEAK = {"v4": 4 * 128 * 128 * 2, "v5e": 4 * 128 * 128 * 2, "v5p": 4 * 128 * 128 * 2}
PEAK |= {"v6e": 2 * 256 * 256 * 2 * 2, "tpu7x": 2 * 256 * 256 * 2 * 2}
LIBRARIES = {"splash": "JAX splash", "tokamax": "Tokamax splash", "flash": "ours"}

# Queries and keys of a grid step, and keys of one product, of the libraries.
BLOCKS = ([1024, 1024, 512], [1024, 1024, 1024], [1536, 1536, 768], [2048, 2048, 256], [2048, 2048, 512])
BLOCKS += ([2048, 2048, 1024], [4096, 2048, 512], [2048, 4096, 512], [4096, 4096, 256], [4096, 4096, 512])
# Ways to call the libraries. Queries, keys and values lie with the channels (h) or the tokens (s) as the minor axis.
VARIANTS = {
    "splash": {"forward": ({}, {"layouts": "hsh"}), "backward": ({},)},
    "tokamax": {"forward": ({}, {"layouts": "hsh"}), "backward": ({"prescaled": False}, {"prescaled": True})},
}
# Tiles of ours beyond those of the search, up to the blocks of the libraries.
LARGER = {
    "forward": [Tiles(2048, 2048, 512, 256, 2), Tiles(2048, 4096, 512, 256, 2), Tiles(4096, 4096, 512, 256, 2)],
    "backward": [Tiles(2048, 2048, 256, 256, 2), Tiles(2048, 2048, 512, 512, 1), Tiles(2048, 4096, 256, 256, 2)],
}
Row = dict[str, Any]


def candidates(generation: str, direction: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(case, its options) of every call to compile, blocks from small to large."""
    for tiles in sorted({*CANDIDATES[direction], *LARGER[direction]}, key=dataclasses.astuple):
        yield "flash", {"tiles": dataclasses.asdict(tiles)}
    for blocks in BLOCKS:
        for case, variants in VARIANTS.items():
            for options in variants[direction]:
                yield case, {"tiles": blocks, **options}


def versions() -> dict[str, str]:
    """Versions of what a schedule depends on; a package that is not installed is left out."""
    found = {}
    for name in ("jax", "libtpu", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sizes(options: dict[str, Any]) -> list[int]:
    """Sizes of the blocks: first queries, then keys of a grid step."""
    tiles = options["tiles"]
    return list(tiles.values()) if isinstance(tiles, dict) else tiles


def question(generation: str, direction: str, case: str, options: dict[str, Any], of: dict[str, str]) -> Row:
    """A row without its result: the call to compile and the versions that its schedule depends on."""
    needed = {name: version for name, version in of.items() if name != "tokamax" or case == "tokamax"}
    return {"device": generation, "direction": direction, "case": case, "options": options, "versions": needed}


def answer(row: Row) -> Row:
    """The result of a row: cycles and spills per ``PAIRS``, bundles of the main loop, units in use; or an error."""
    generation, case, options, backward = row["device"], row["case"], row["options"], row["direction"] == "backward"
    if case == "flash":
        tiles = Tiles(**options["tiles"])
        need = backward_vmem(tiles, 128, tiles.block_q) if backward else forward_vmem(tiles, 128)
        if need > usable(generation):
            return {"error": f"needs {need / MIB:.1f} MiB of VMEM"}
    room = usable(generation)
    found = measure(f"{CASES}{case}", generation, vmem=room, tokens=TOKENS, backward=backward, **options)
    if found.error:
        return {"error": found.error}
    region = found.main(f"flash_attention_{row['direction']}" if case == "flash" else "dkv" if backward else "fwd")
    steps = PAIRS / (sizes(options)[0] * sizes(options)[1])
    cycles, spills = round(region.cycles * steps), round(region.spills * steps)
    if share(row | {"cycles": cycles}) > 1:
        # The compiler cuts the code of some large blocks, and the region with the most products is only a part of it.
        return {"error": f"the compiler cut the main loop; its largest part has {region.cycles} bundles"}
    units = {unit: round(use, 2) for unit, use in region.units.items() if use >= 0.1}
    return {"cycles": cycles, "spills": spills, "bundles": region.cycles, "units": units}


def read(path: pathlib.Path = RESULTS) -> list[Row]:
    """The rows at hand; none without a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(row: Row, path: pathlib.Path = RESULTS) -> None:
    """Writes one more row at once."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def share(row: Row) -> float:
    """The share of the matrix units' peak: products of the published formula (2 forward, 5 backward) over cycles."""
    operations = PAIRS * 128 * (10 if row["direction"] == "backward" else 4)
    return operations / PEAK[row["device"]] / row["cycles"]


def best(rows: Iterable[Row], device: str, direction: str, case: str) -> Row | None:
    """The row with the fewest cycles, then the fewest spills, of one case; None if none compiled."""
    wanted = (device, direction, case)
    usable_rows = [r for r in rows if (r["device"], r["direction"], r["case"]) == wanted and "cycles" in r]
    return min(usable_rows, key=lambda r: (r["cycles"], r["spills"]), default=None)


def shipped(device: str, direction: str) -> Row:
    """Our row with the tiles that a call gets: the entry of ``tiles.json``, which the search wrote."""
    entry = files.read_json(FILE)[direction][device]["128"]
    row = question(device, direction, "flash", {"tiles": entry["tiles"]}, {})
    return row | {"cycles": entry["cycles"], "spills": entry["spills"]}


def cell(row: Row | None) -> str:
    """Cycles, share of peak and blocks of a row."""
    if row is None:
        return "not compiled"
    blocks = " x ".join(str(x) for x in sizes(row["options"])[:2])
    return f"{row['cycles']} ({share(row):.0%}), {blocks}"


def table(rows: list[Row]) -> str:
    """The table of docs/kernels.md: the best row of each library beside ours, and the ratio to the better one."""
    lines = ["| | JAX splash | Tokamax splash | ours | ours, best searched | fewer cycles than the best library |"]
    lines.append("|---|---|---|---|---|---|")
    for device in TPUS:
        for direction in DIRECTIONS:
            others = [best(rows, device, direction, case) for case in ("splash", "tokamax")]
            known = [row["cycles"] for row in others if row]
            if not known:
                continue
            ours = shipped(device, direction)
            searched = best([*rows, ours], device, direction, "flash")
            cells = [cell(row) for row in (*others, ours, searched)]
            ratio = f"{min(known) / ours['cycles']:.2f} x"
            lines.append(f"| {device.removeprefix('tpu')} {direction} | " + " | ".join([*cells, ratio]) + " |")
    return "\n".join(lines)


def attention(generation: str) -> None:
    of = versions()
    for direction in DIRECTIONS:
        for case, options in candidates(generation, direction):
            if case != "tokamax" or "tokamax" in of:
                report(question(generation, direction, case, options, of))


def report(row: Row, path: pathlib.Path = RESULTS) -> None:
    """Compiles one call, writes its row at once and prints it; does nothing if the row is at hand."""
    if row in [{key: old[key] for key in row} for old in read(path)]:
        return
    row = row | answer(row)
    add(row, path)
    result = row.get("error", "")[:120] or f"{row['cycles']} cycles {share(row):.0%} of peak {row['spills']} spills"
    print(f"{row['device']:6}{row['direction']:9}{LIBRARIES[row['case']]:15}{row['options']}: {result}", flush=True)


def traffic(generation: str) -> None:
    tokens = 27280
    arrays = {"linear": 31 * 880 * 96 * 32 * 2, "prologue": 2 * tokens * 24 * 128 * 2}
    counts = {("linear", False): 4, ("linear", True): 7, ("prologue", False): 2, ("prologue", True): 3}
    for case in ("linear", "prologue"):
        for backward in (False, True):
            least = counts[case, backward] * arrays[case]
            for kernel in (True, False):
                found = measure(f"{CASES}{case}", generation, kernel=kernel, backward=backward)
                result = (
                    found.error[:120] or f"{found.moved_bytes / least:5.2f} x the least bytes ({least / MIB:.0f} MiB)"
                )
                direction = "backward" if backward else "forward"
                print(f"{generation:5}{case:12}{direction:10}{'kernel' if kernel else 'XLA':8}{result}", flush=True)


def memory(generation: str) -> None:
    for case, name in LIBRARIES.items():
        if case == "tokamax" and "tokamax" not in versions():
            continue
        options = {} if case == "flash" else {"tiles": BLOCKS[0]}
        found = measure(f"{CASES}{case}", generation, tokens=TOKENS, heads=6, backward=True, **options)
        result = found.error[:120] or f"{found.peak_bytes / 2**30:.3f} GiB"
        print(f"{generation:5}memory of forward and backward, 6 heads: {name:16}{result}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"attention": attention, "traffic": traffic, "memory": memory}
    parser.add_argument("--generation", choices=TPUS, action="append")
    parser.add_argument("--part", choices=tuple(parts), action="append")
    parser.add_argument("--table", action="store_true", help="print the table of docs/kernels.md and stop")
    chosen = parser.parse_args()
    if chosen.table:
        print(table(read()))
        return
    for part in chosen.part or parts:
        for generation in chosen.generation or TPUS:
            parts[part](generation)


if __name__ == "__main__":
    main()
