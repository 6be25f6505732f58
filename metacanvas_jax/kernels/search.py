"""Chooses the tiles of the attention kernels by the compiler's static schedule, and writes ``tiles.json``.

    python -m metacanvas_jax.kernels.search                                   # all generations, both directions
    python -m metacanvas_jax.kernels.search --generation v6e --direction backward --candidate 512,1024,256,256,2

Every candidate is compiled for attention over 27,280 tokens, which takes tens of seconds on two cores. A candidate that
does not compile or does not fit the chip is left out. The winner has the fewest cycles per pair of query and key, and
among equals the fewest spilled registers. The present entry of ``tiles.json`` competes with its stored result.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable
from typing import Any

from metacanvas_jax import files
from metacanvas_jax.hardware import MIB, TPUS
from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.static_schedule import measure
from metacanvas_jax.kernels.tiles import FILE, Tiles

TOKENS = 27280
PAIRS = 2**20  # cycles are given per 1024 queries x 1024 keys of one head

CANDIDATES = {
    "forward": [
        Tiles(1024, 1024, 512, 256, 2),
        Tiles(1024, 1024, 1024, 256, 1),
        Tiles(1024, 1024, 512, 512, 1),
        Tiles(1536, 1536, 512, 256, 2),
        Tiles(1536, 3072, 512, 256, 2),
    ],
    "backward": [
        Tiles(512, 1024, 256, 256, 2),
        Tiles(512, 1024, 256, 512, 1),
        Tiles(1536, 1536, 256, 256, 2),
        Tiles(1536, 1536, 512, 512, 1),
        Tiles(1536, 3072, 256, 256, 2),
    ],
}


def entry(direction: str, generation: str, tiles: Tiles, width: int = 128) -> dict[str, Any]:
    """The result of one set of tiles: cycles per ``PAIRS``, share of the matrix units, spills; or an error."""
    if direction == "forward":
        need = tiling.forward_vmem(tiles, width)
    else:
        need = tiling.backward_vmem(tiles, width, tiles.block_q)
    if need > tiling.usable(generation):
        return {"tiles": dataclasses.asdict(tiles), "error": f"needs {need / MIB:.1f} MiB of VMEM"}
    found = measure(
        "metacanvas_jax.kernels.cases:flash",
        generation,
        tokens=TOKENS,
        width=width,
        backward=direction == "backward",
        tiles=dataclasses.asdict(tiles),
    )
    if found.error:
        return {"tiles": dataclasses.asdict(tiles), "error": found.error}
    region = found.main(f"flash_attention_{direction}")
    steps = PAIRS / (tiles.block_q * tiles.block_k)
    return {
        "tiles": dataclasses.asdict(tiles),
        "cycles": round(region.cycles * steps),
        "matrix_units": round(region.units["MXU"], 2),
        "spills": round(region.spills * steps),
    }


def best(entries: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry with the fewest cycles, then the fewest spills, among those that compiled."""
    usable = [x for x in entries if "cycles" in x]
    return min(usable, key=lambda x: (x["cycles"], x["spills"]), default=None)


def write(table: dict) -> None:
    """Replaces the file as a whole."""
    new = FILE.with_suffix(".new")
    new.write_text(json.dumps(table, indent=1) + "\n")
    new.rename(FILE)
    tiling.table.cache_clear()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", choices=TPUS, action="append")
    parser.add_argument("--direction", choices=tuple(CANDIDATES), action="append")
    parser.add_argument("--width", type=int, default=128, help="of a head, a multiple of 128")
    parser.add_argument(
        "--candidate", action="append", help="block_q,block_k,tile_q,tile_k,depth instead of the usual ones"
    )
    chosen = parser.parse_args(arguments)
    given = [Tiles(*(int(x) for x in text.split(","))) for text in chosen.candidate or ()]
    for direction in chosen.direction or CANDIDATES:
        for generation in chosen.generation or TPUS:
            table = files.read_json(FILE)
            held = table.setdefault(direction, {}).setdefault(generation, {})
            entries = [held[str(chosen.width)]] if str(chosen.width) in held else []
            for tiles in given or CANDIDATES[direction]:
                entries.append(entry(direction, generation, tiles, chosen.width))
                print(direction, generation, json.dumps(entries[-1]), flush=True)
            winner = best(entries)
            if winner is not None:
                held[str(chosen.width)] = winner
                write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
