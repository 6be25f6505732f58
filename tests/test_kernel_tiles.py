"""The table of tiles: every entry fits its chip and covers any length."""

import json

import pytest

from metacanvas_jax.hardware import TPUS
from metacanvas_jax.kernels import tiles as tiling
from metacanvas_jax.kernels.tiles import LANES, Tiles, tiles_for

ENTRIES = [
    (direction, generation, width, tiles)
    for direction, generations in tiling.table().items()
    for generation, widths in generations.items()
    for width, tiles in widths.items()
]


def test_both_directions_know_every_generation():
    assert {(direction, generation) for direction, generation, *_ in ENTRIES} == {
        (direction, generation) for direction in ("forward", "backward") for generation in TPUS
    }


@pytest.mark.parametrize(("direction", "generation", "width", "tiles"), ENTRIES)
def test_entry_fits_the_memory_of_its_chip_and_masks_what_it_does_not_divide(direction, generation, width, tiles):
    room = tiling.usable(generation)
    if direction == "forward":
        assert tiling.forward_vmem(tiles, width) <= room
    else:
        chunk = tiling.chunk_queries(tiles, width, 27280, generation)
        assert chunk % tiles.block_q == 0 and tiling.backward_vmem(tiles, width, chunk) <= room
    for length in (1, 300, 880, 1100, 27280):
        fitted = tiles.fit(length, length)
        for block, tile, most in (
            (fitted.block_q, fitted.tile_q, tiles.block_q),
            (fitted.block_k, fitted.tile_k, tiles.block_k),
        ):
            assert block % tile == 0 and block <= most
            covered = -(-length // block) * block
            assert covered - length < tile or covered <= 1.1 * length


def test_wide_heads_get_smaller_blocks_instead_of_too_much_memory():
    wide = tiles_for("forward", "v4", 2048)
    assert tiling.forward_vmem(wide, 2048) <= tiling.usable("v4")
    assert wide.block_q < tiles_for("forward", "v4", 128).block_q


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("generation", TPUS)
def test_wide_heads_keep_whole_tiles(direction, generation):
    for width in (256, 384, 512, 1024, 2048, 4096):
        tiles = tiles_for(direction, generation, width)  # a block that its tiles do not divide is refused
        assert tiles.fit(27280, 27280).block_q <= tiles.block_q


def test_tiles_that_do_not_divide_their_block_are_refused():
    for sizes in ((1024, 1024, 384, 256, 1), (1024, 1024, 64, 256, 1), (1024, 1024, 256, 256, -1)):
        with pytest.raises(ValueError, match=r"divide their blocks|depth"):
            Tiles(*sizes)


def test_file_is_what_the_search_writes():
    text = tiling.FILE.read_text()
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
    assert LANES == 128
