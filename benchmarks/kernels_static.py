"""The kernels in static cycles, bytes and memory, beside the libraries', for every TPU generation, without a TPU.

    python benchmarks/kernels_static.py                                  # all of it: an hour on two quiet cores
    python benchmarks/kernels_static.py --generation v6e --part attention

Attention: cycles of the main loop per 1024 queries x 1024 keys of one head of 128, at 24 heads x 27,280 tokens (whole:
those of all blocks, tails counted as blocks), share of the matrix units' peak that this is, spills. A device with two
cores (v4, v5p) counts one. Libraries take 27,648 tokens (their blocks must divide the length) and the best of the
blocks listed. Linear attention and prologue: bytes that the compiled program moves over those it must. Memory: peak of
one forward and backward pass over 6 heads. Tokamax is compared where it is installed
(`pip install --no-deps tokamax==0.0.12`).
"""

import argparse
import dataclasses
import importlib.util
import math

from metacanvas_jax.hardware import MIB, TPUS
from metacanvas_jax.kernels.search import PAIRS, TOKENS
from metacanvas_jax.kernels.static_schedule import measure
from metacanvas_jax.kernels.tiles import tiles_for

CASES = "metacanvas_jax.kernels.cases:"
HEADS = 24
LIBRARY_BLOCKS = ([1024, 1024, 512], [1024, 1024, 1024], [1536, 1536, 768])
# Floating-point operations of one core per cycle in its matrix units.
PEAK = {"v4": 4 * 128 * 128 * 2, "v5e": 4 * 128 * 128 * 2, "v5p": 4 * 128 * 128 * 2}
PEAK |= {"v6e": 2 * 256 * 256 * 2 * 2, "tpu7x": 2 * 256 * 256 * 2 * 2}
NAMES = {"flash": "flash_attention", "splash": "splash_mha", "tokamax": "splash_mha"}


def attention(generation: str) -> None:
    for direction in ("forward", "backward"):
        backward = direction == "backward"
        ideal = PAIRS * 128 * (10 if backward else 4) / PEAK[generation]
        rows = [("ours", "flash", {"tiles": dataclasses.asdict(tiles_for(direction, generation, 128))})]
        rows += [("jax splash", "splash", {"tiles": blocks}) for blocks in LIBRARY_BLOCKS]
        if importlib.util.find_spec("tokamax"):
            rows += [("tokamax splash", "tokamax", {"tiles": blocks}) for blocks in LIBRARY_BLOCKS]
        for name, case, options in rows:
            tiles = options["tiles"]
            found = measure(f"{CASES}{case}", generation, tokens=TOKENS, backward=backward, **options)
            shape = list(tiles.values()) if isinstance(tiles, dict) else tiles
            if found.error:
                print(f"{generation:5}{direction:10}{name:16}{shape!s:28}{found.error[:120]}", flush=True)
                continue
            kernel = f"{NAMES[case]}_{direction}" if case == "flash" else ("dkv" if backward else "fwd")
            region = found.main(kernel)
            cycles = region.cycles * PAIRS / (shape[0] * shape[1])
            whole = HEADS * region.cycles * math.ceil(TOKENS / shape[0]) * math.ceil(TOKENS / shape[1])
            units = "  ".join(f"{unit} {use:.0%}" for unit, use in region.units.items() if use >= 0.1)
            print(
                f"{generation:5}{direction:10}{name:16}{shape!s:28}{cycles:8.0f} cycles {ideal / cycles:5.0%} of peak "
                f"{whole / 1e6:8.0f} M whole {region.spills:6d} spills   {units}",
                flush=True,
            )


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
    for name, case in (("ours", "flash"), ("jax splash", "splash"), ("tokamax splash", "tokamax")):
        if case == "tokamax" and not importlib.util.find_spec("tokamax"):
            continue
        options = {} if case == "flash" else {"tiles": LIBRARY_BLOCKS[0]}
        found = measure(f"{CASES}{case}", generation, tokens=TOKENS, heads=6, backward=True, **options)
        result = found.error[:120] or f"{found.peak_bytes / 2**30:.3f} GiB"
        print(f"{generation:5}memory of forward and backward, 6 heads: {name:16}{result}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"attention": attention, "traffic": traffic, "memory": memory}
    parser.add_argument("--generation", choices=TPUS, action="append")
    parser.add_argument("--part", choices=tuple(parts), action="append")
    chosen = parser.parse_args()
    for part in chosen.part or parts:
        for generation in chosen.generation or TPUS:
            parts[part](generation)


if __name__ == "__main__":
    main()
