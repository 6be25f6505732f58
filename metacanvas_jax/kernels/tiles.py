"""Tile sizes of the attention kernels: data, per TPU generation, head width and direction.

``tiles.json`` beside this file is written by ``python -m metacanvas_jax.kernels.search``; the lint test checks that
every entry fits the chip. A head width that is not listed uses the entry of the next listed one.
"""

import dataclasses
import functools
import pathlib

import jax

from metacanvas_jax import files
from metacanvas_jax.hardware import CHIPS, MIB, TPUS, chip_of

FILE = pathlib.Path(__file__).with_name("tiles.json")
LANES = 128
# The overhead of one block, given as a number of extra rows or columns of scores that would take the same time. By the
# schedule it is about 1 % of a block of 1024. The rest is the start of a grid step, which the schedule does not show.
BORDER = 48

# The share of a core's vector memory that a kernel may ask for; the rest is the compiler's.
USABLE = 0.875


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Block and tile sizes of one pass over queries and keys.

    A grid step works on ``block_q`` queries and ``block_k`` keys. They are cut into tiles of ``tile_q x tile_k``
    scores. While the next tiles are computed, ``depth`` tiles wait for their second product (see docs/kernels.md). A
    block size need not divide the sequence: the last block is masked.

    Raises ValueError if a tile does not divide its block or is no multiple of 128, or if depth is below 0.
    """

    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    depth: int

    def __post_init__(self):
        for block, tile in ((self.block_q, self.tile_q), (self.block_k, self.tile_k)):
            if tile % LANES or tile < LANES or block % tile:
                raise ValueError(f"{self}: tiles are multiples of {LANES} and divide their blocks")
        if self.depth < 0:
            raise ValueError(f"{self}: depth is at least 0")

    def fit(self, n: int, m: int) -> "Tiles":
        """These tiles with blocks shortened for ``n`` queries and ``m`` keys, so that the last block is well filled."""
        block_q, tile_q = _shrink(self.block_q, self.tile_q, n)
        block_k, tile_k = _shrink(self.block_k, self.tile_k, m)
        return Tiles(block_q, block_k, tile_q, tile_k, self.depth)


def _shrink(block: int, tile: int, length: int) -> tuple[int, int]:
    if length <= tile:
        tile = -(-length // LANES) * LANES
        return tile, tile

    def cost(size: int) -> int:
        return -(-length // size) * (size + BORDER)

    return min(range(block, 0, -tile), key=cost), tile


def _halve(block: int, tile: int) -> tuple[int, int]:
    if block > tile:
        return max(tile, block // 2 // tile * tile), tile
    tile = max(LANES, tile // 2 // LANES * LANES)
    return tile, tile


def forward_vmem(tiles: Tiles, width: int, itemsize: int = 2) -> int:
    """Bytes of VMEM that the forward kernel needs: blocks (double-buffered), accumulators, tiles in flight."""
    width = -(-width // LANES) * LANES
    blocks = 2 * itemsize * width * (2 * tiles.block_q + 2 * tiles.block_k)
    return blocks + 4 * tiles.block_q * (width + 32) + _in_flight(tiles, 1) + 2 * MIB


def backward_vmem(tiles: Tiles, width: int, queries: int, itemsize: int = 2) -> int:
    """Bytes of VMEM that the backward kernel needs if it keeps the gradient of ``queries`` queries on the chip."""
    width = -(-width // LANES) * LANES
    blocks = 2 * itemsize * width * (3 * tiles.block_q + 2 * tiles.block_k) + 2 * 4 * width * 2 * tiles.block_k
    resident = 4 * width * (queries + 2 * tiles.block_k)
    return blocks + resident + _in_flight(tiles, 2) + 2 * MIB


def _in_flight(tiles: Tiles, arrays: int) -> int:
    return arrays * (tiles.depth + 2) * 6 * tiles.tile_q * tiles.tile_k


def usable(generation: str) -> int:
    """Bytes of vector memory that a kernel may ask for."""
    return int(USABLE * CHIPS[generation].vmem)


def chunk_queries(tiles: Tiles, width: int, n: int, generation: str, itemsize: int = 2) -> int:
    """The number of queries (whole blocks) whose float32 gradient fits on the chip in the backward kernel."""
    blocks = -(-n // tiles.block_q)
    room = usable(generation) - backward_vmem(tiles, width, 0, itemsize)
    most = max(1, int(room // (4 * -(-width // LANES) * LANES * tiles.block_q)))
    chunks = -(-blocks // most)
    return -(-blocks // chunks) * tiles.block_q


def generation_of(kind: str | None = None) -> str:
    """The TPU generation of a device kind; by default of the device for which code is being traced.

    An unknown TPU is treated as the newest known generation. Without a TPU (interpret mode, lowering without a mesh)
    the result is v5p.
    """
    kind = device_kind() if kind is None else kind
    chip = chip_of(kind)
    if chip is not None and chip.name in TPUS:
        return chip.name
    return TPUS[-1] if kind.startswith("TPU") else "v5p"


def device_kind() -> str:
    """Kind of the devices for which the program is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if device is not None:
        return device.device_kind
    return jax.devices()[0].device_kind


@functools.cache
def table(path: pathlib.Path = FILE) -> dict[str, dict[str, dict[int, Tiles]]]:
    """direction ("forward", "backward") -> generation -> head width -> Tiles."""
    raw = files.read_json(path)
    return {
        direction: {
            generation: {int(width): Tiles(**entry["tiles"]) for width, entry in widths.items()}
            for generation, widths in generations.items()
        }
        for direction, generations in raw.items()
    }


def tiles_for(direction: str, generation: str, width: int) -> Tiles:
    """The entry of the smallest listed head width that is at least ``width``, else the largest one's, made to fit."""
    entries = table()[direction][generation]
    fitting = [listed for listed in entries if listed >= width]
    tiles = entries[min(fitting) if fitting else max(entries)]
    need = forward_vmem if direction == "forward" else lambda t, w: backward_vmem(t, w, t.block_q)
    while need(tiles, width) > usable(generation) and max(tiles.block_q, tiles.block_k) > LANES:
        block_q, tile_q = _halve(tiles.block_q, tiles.tile_q)
        block_k, tile_k = _halve(tiles.block_k, tiles.tile_k)
        tiles = Tiles(block_q, block_k, tile_q, tile_k, tiles.depth)
    return tiles
