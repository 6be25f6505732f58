"""The table of attention kernels: what is compiled, what is kept, and that docs/kernels.md shows what is kept."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernels_static  # noqa: E402

from metacanvas_jax.hardware import TPUS  # noqa: E402
from metacanvas_jax.kernels import cases  # noqa: E402
from metacanvas_jax.kernels.static_schedule import Measured, Region  # noqa: E402
from metacanvas_jax.kernels.tiles import Tiles  # noqa: E402

VERSIONS = {"jax": "1", "libtpu": "2", "tokamax": "3"}


def row(case, cycles, *, blocks=(1024, 1024, 512), spills=0, device="v6e", direction="forward"):
    asked = kernels_static.question(device, direction, case, {"tiles": list(blocks)}, VERSIONS)
    return asked | {"cycles": cycles, "spills": spills}


@pytest.mark.parametrize("direction", kernels_static.DIRECTIONS)
@pytest.mark.parametrize("generation", TPUS)
def test_all_three_are_searched_up_to_blocks_of_4096(generation, direction):
    asked = list(kernels_static.candidates(generation, direction))
    largest = {
        case: max(max(kernels_static.sizes(options)[:2]) for other, options in asked if other == case)
        for case in kernels_static.LIBRARIES
    }
    assert set(largest.values()) == {4096}
    for case, options in asked:
        if case == "flash":
            Tiles(**options["tiles"])  # refuses tiles that do not divide their blocks
        else:
            assert options["tiles"][1] % options["tiles"][2] == 0


def test_the_best_row_is_of_the_same_device_direction_and_library_and_has_compiled():
    rows = [
        row("splash", 3000),
        row("splash", 2900, spills=9, blocks=(2048, 2048, 512)),
        row("splash", 2900, spills=2, blocks=(4096, 4096, 512)),
        row("splash", 1, device="v5e"),
        row("splash", 2, direction="backward"),
        row("tokamax", 3),
        kernels_static.question("v6e", "forward", "splash", {"tiles": [4096, 4096, 256]}, VERSIONS) | {"error": "no"},
    ]
    assert kernels_static.best(rows, "v6e", "forward", "splash") == rows[2]
    assert kernels_static.best(rows, "v4", "forward", "splash") is None


def test_the_table_compares_the_tiles_in_use_with_the_better_library(monkeypatch):
    cycles = {"forward": 1651, "backward": 3759}
    tiles = dataclasses.asdict(Tiles(1536, 3072, 256, 256, 2))
    entries = {way: {"v6e": {"128": {"tiles": tiles, "cycles": n, "spills": 0}}} for way, n in cycles.items()}
    monkeypatch.setattr(kernels_static.files, "read_json", lambda _: entries)
    rows = [row("splash", 3300), row("tokamax", 2220, blocks=(4096, 4096, 512))]
    larger = {"tiles": dataclasses.asdict(Tiles(2048, 4096, 512, 256, 2))}
    rows.append(row("flash", 1600) | {"options": larger})
    rows.append(row("tokamax", 3700, direction="backward"))
    forward, backward = kernels_static.table(rows).splitlines()[2:]
    assert forward == (
        "| v6e forward | 3300 (31%), 1024 x 1024 | 2220 (46%), 4096 x 4096 | 1651 (62%), 1536 x 3072 "
        "| 1600 (64%), 2048 x 4096 | 1.34 x |"
    )
    assert backward.startswith("| v6e backward | not compiled | 3700 (")
    assert backward.endswith(" | 3759 (68%), 1536 x 3072 | 3759 (68%), 1536 x 3072 | 0.98 x |")


def test_a_result_is_written_at_once_and_not_compiled_again(tmp_path, monkeypatch):
    asked = []

    def measured(case, generation, **options):
        asked.append((case, options))
        if options["tiles"] == [4096, 4096, 512]:
            return Measured(error="scoped vmem exceeded")
        return Measured(regions=(Region("splash_mha_fwd", 9196, {"MXU": 0.89, "XLU": 0.01}, 3751),))

    monkeypatch.setattr(kernels_static, "measure", measured)
    path = tmp_path / "rows.jsonl"
    for blocks in ([2048, 2048, 512], [4096, 4096, 512], [2048, 2048, 512]):
        options = {"tiles": blocks}
        kernels_static.report(kernels_static.question("v6e", "forward", "splash", options, VERSIONS), path)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert len(asked) == 2
    assert first["cycles"] == 2299 and first["spills"] == 938 and first["units"] == {"MXU": 0.89}
    assert first["versions"] == {"jax": "1", "libtpu": "2"}
    assert second["error"] == "scoped vmem exceeded"
    newer = kernels_static.question("v6e", "forward", "splash", {"tiles": [2048, 2048, 512]}, VERSIONS | {"jax": "2"})
    kernels_static.report(newer, path)
    assert len(asked) == 3


def test_blocks_of_ours_that_do_not_fit_the_chip_are_kept_as_such(monkeypatch):
    monkeypatch.setattr(kernels_static, "measure", lambda *_, **__: pytest.fail("compiled"))
    tiles = {"tiles": dataclasses.asdict(Tiles(4096, 4096, 512, 256, 2))}
    found = kernels_static.answer(kernels_static.question("v4", "forward", "flash", tiles, VERSIONS))
    assert found["error"].startswith("needs ") and found["error"].endswith(" MiB of VMEM")


def test_a_part_of_a_main_loop_is_not_taken_for_all_of_it(monkeypatch):
    part = Measured(regions=(Region("splash_mha_fwd", 7430, {"MXU": 0.93}, 0),))  # 929 cycles, 110 % of peak
    monkeypatch.setattr(kernels_static, "measure", lambda *_, **__: part)
    found = kernels_static.answer(
        kernels_static.question("v6e", "forward", "splash", {"tiles": [2048, 4096, 512]}, VERSIONS)
    )
    assert found == {"error": "the compiler cut the main loop; its largest part has 7430 bundles"}


def test_lengths_of_libraries_are_whole_blocks():
    assert cases._whole_blocks(27280, [4096, 4096, 512]) == 28672
    assert cases._whole_blocks(27280, [2048, 1536, 512]) == 30720


def test_an_unknown_maximum_is_refused():
    with pytest.raises(ValueError, match="expected online, constant or head"):
        cases.tokamax(None, tokens=1024, tiles=[1024, 1024, 512], maximum="none")


def test_the_page_shows_the_rows_at_hand():
    assert kernels_static.table(kernels_static.read()) in (ROOT / "docs/kernels.md").read_text()
