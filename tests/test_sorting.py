"""`metacanvas prepare --by-bucket`: every sample in the folder of the nearest size, once, and what is said of it."""

import dataclasses
import math

import numpy as np
import pytest
from by_size_support import LONG, QUIET, SIZES, SQUARE, TALL, TASK, WIDE, buckets, edits, section, sort

from metacanvas_jax.cli.main import main
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import by_size, sorting
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.errors import UserError
from metacanvas_jax.sizes import nearest_size
from metacanvas_jax.tasks import SortKey

KONTEXT = ((1024, 1024), (832, 1248), (1248, 832), (672, 1568), (1568, 672))


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((500, 500), (1024, 1024)),
        ((500, 750), (832, 1248)),
        ((750, 500), (1248, 832)),
        ((1, 100), (672, 1568)),
        ((2000, 2449), (1024, 1024)),  # just below the geometric mean of 1 and 1.5
        ((2000, 2450), (832, 1248)),  # and just above it
    ],
)
def test_the_nearest_size_is_that_of_the_nearest_ratio_on_a_logarithmic_scale(sides, expected):
    assert nearest_size(sides, KONTEXT) == expected == nearest_size(sides, KONTEXT[::-1])
    logs = {size: abs(math.log(size[1] / size[0]) - math.log(sides[1] / sides[0])) for size in KONTEXT}
    assert min(logs, key=logs.__getitem__) == expected


def test_ties_are_decided_by_area_and_then_by_rows_whatever_the_order():
    for sizes in (((20, 10), (10, 20)), ((10, 20), (20, 10))):
        assert nearest_size((7, 7), sizes) == (10, 20)
    for sizes in (((8, 8), (16, 16), (64, 64)), ((64, 64), (16, 16), (8, 8))):
        assert [nearest_size((side, side), sizes) for side in (3, 12, 40, 999)] == [
            (8, 8),
            (16, 16),
            (64, 64),
            (64, 64),
        ]


def samples(out, size):
    return open_source(SourceSection("records", str(out / SortKey(size).name), TASK))


def test_each_sample_is_once_in_the_folder_of_the_nearest_size(tmp_path):
    nearest = edits(tmp_path / "rows", bad=2)
    out = sort(tmp_path / "rows", tmp_path / "out", max_skips=2)
    found = {}
    for size in (SQUARE, WIDE, TALL):
        there = samples(out, size)
        for sample in (there[i] for i in range(len(there))):
            assert sample.target.shape == sample.source.shape == (1, *size, 3)
            assert set(np.unique(sample.target)) == {int(sample.prompt)}
            assert sample.prompt not in found
            found[sample.prompt] = size
    assert found == nearest
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"24x24", "12x24", "24x12"}
    read = by_size.read(out)
    assert read.samples == {SortKey(SQUARE): 8, SortKey(WIDE): 6, SortKey(TALL): 4, SortKey(LONG): 0}
    assert sorted(name.rpartition("/")[2] for name in read.bad) == ["row 8", "row 9"]
    assert {path.name for path in out.iterdir() if path.is_file() and not path.name.startswith(".")} == {"sizes.json"}


def test_a_sorted_folder_is_left_as_it_is_and_another_is_refused(tmp_path):
    edits(tmp_path / "rows")
    out = sort(tmp_path / "rows", tmp_path / "out")
    before = (out / "sizes.json").stat().st_mtime_ns
    assert sort(tmp_path / "rows", out, sizes=SIZES[::-1]) == out
    assert (out / "sizes.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another sorted source \(it differs in sizes\); name another folder"):
        sort(tmp_path / "rows", out, sizes=SIZES[:2])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no sorted source"):
        sort(tmp_path / "rows", tmp_path / "other")


def contents(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {path.relative_to(folder): path.read_bytes() for path in found}


def test_an_interruption_and_several_processes_make_the_same_folder(tmp_path, monkeypatch):
    edits(tmp_path / "rows")
    monkeypatch.setattr(sorting, "PART", 4)
    whole = contents(sort(tmp_path / "rows", tmp_path / "whole"))

    looked, nearest = [], sorting._nearest
    monkeypatch.setattr(sorting, "_nearest", lambda source, part, where: stopped(source, part, where))

    def stopped(source, part, where):
        if len(looked) == 2:
            raise KeyboardInterrupt
        looked.append(part[0])
        return nearest(source, part, where)

    with pytest.raises(KeyboardInterrupt):
        sort(tmp_path / "rows", tmp_path / "whole2")
    with pytest.raises(UserError, match=r"an unfinished sorting of something else \(it differs in sizes\)"):
        sort(tmp_path / "rows", tmp_path / "whole2", sizes=SIZES[:2])
    with pytest.raises(UserError, match=r"no sizes\.json there; a source with by_size"):
        by_size.read(tmp_path / "whole2")
    seen = []
    monkeypatch.setattr(sorting, "_nearest", lambda *rest: seen.append(rest[1][0]) or nearest(*rest))
    assert sort(tmp_path / "rows", tmp_path / "whole2") == tmp_path / "whole2"
    assert looked == [0, 4] and seen == [8, 12, 16]

    out = tmp_path / "shared"
    configs = [dataclasses.replace(QUIET, process_index=i, process_count=2) for i in range(2)]
    assert sort(tmp_path / "rows", out, config=configs[1]) is None
    assert not (out / "sizes.json").exists()
    assert sort(tmp_path / "rows", out, config=configs[0]) == out == sort(tmp_path / "rows", out, config=configs[1])
    assert contents(tmp_path / "whole2") == contents(out) == whole


def test_too_many_bad_records_stop_the_sorting_in_one_line(tmp_path):
    edits(tmp_path / "rows", bad=2)
    with pytest.raises(UserError, match=r"row 9 is corrupt \(no readable picture.*\); 2 corrupt so far, 1 allowed"):
        sort(tmp_path / "rows", tmp_path / "out", max_skips=1)
    (tmp_path / "rows" / "metadata.jsonl").write_text('{"target": "bad0.png", "source": "bad1.png", "prompt": "x"}\n')
    with pytest.raises(UserError, match="no readable record"):
        sort(tmp_path / "rows", tmp_path / "none", max_skips=9)


def test_what_is_computed_ahead_is_computed_for_one_size_at_a_time_and_kept_with_its_sample(tmp_path):
    edits(tmp_path / "rows")

    def compute(samples):
        (shape,) = {sample.target.shape for sample in samples}
        return [{"latents": np.full(shape[:3], int(sample.prompt), np.float32)} for sample in samples]

    chosen = sorting.chosen(buckets(), TASK)
    how = {"compute": compute, "computed": {"autoencoder": {"kind": "mine"}}}
    out = sorting.sort(section(tmp_path / "rows"), tmp_path / "out", chosen, QUIET, **how)
    for key, count in by_size.read(out).samples.items():
        for sample in (samples(out, key.size)[i] for i in range(count)):
            assert sample.arrays["latents"].shape == (1, *key.size)
            assert (sample.arrays["latents"] == int(sample.prompt)).all()
    with pytest.raises(UserError, match=r"another sorted source \(it differs in computed\)"):
        sort(tmp_path / "rows", out)


def config_file(folder, sizes=SIZES):
    """Image editing with buckets of some sizes."""
    path = folder / "mine.py"
    path.write_text(
        "from configs import base, image_editing\n"
        "from metacanvas_jax.tasks import Bucket\n\n\n"
        "def get_config(variant=''):\n"
        "    config = image_editing.get_config('miniature')\n"
        f"    config.buckets = base.ratios(Bucket('image_editing', (24, 24)), {tuple(sizes)})\n"
        "    return config\n"
    )
    return str(path)


def test_sorting_on_the_command_line_tells_what_became_of_every_sample(tmp_path, capsys):
    edits(tmp_path / "rows", bad=1)
    out, config = tmp_path / "out", config_file(tmp_path)
    command = ["prepare", "--source", "jsonl", "--path", str(tmp_path / "rows"), "--task", TASK, "--out", str(out)]
    command += ["--by-bucket", "--max-skips", "1"]
    assert main([*command, "--config", config]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 18 samples in 3 of 4 buckets\n" in said and said.count("\n") == 6
    for line in ("24x24           8\n", "12x24           6\n", "24x12           4\n"):
        assert line in said
    assert "no sample belongs to 12x60, which get no folder" in said
    assert "1 bad records were left out, their names are in sizes.json; the first is row 8" in said
    assert main(["prepare", "--verify", str(out)]) == 0
    assert "18 samples, all as written: 12x24 (6), 24x12 (4), 24x24 (8)" in capsys.readouterr().out
    shard = min((out / "12x24").glob("*array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert main(["prepare", "--verify", str(out)]) == 2
    assert "12x24" in capsys.readouterr().err


REFUSED = {
    "no config": ([], "--by-bucket needs --config"),
    "size": (["--size", "24x24"], "--size has no effect with --by-bucket"),
    "fps": (["--fps", "3"], "--fps has no effect with --by-bucket"),
    "task": (["--task", "text_to_video"], "the config has no bucket of this task, it has image_editing"),
    "one size twice": ([], "must have different sizes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sorting_refuses_bad_arguments_in_one_line(tmp_path, capsys, case):
    options, message = REFUSED[case]
    command = ["prepare", "--source", "jsonl", "--path", "rows", "--out", "out", "--task", TASK, "--by-bucket"]
    if case != "no config":
        command += ["--config", config_file(tmp_path, (SQUARE, SQUARE) if case == "one size twice" else SIZES)]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_others_complete_in_the_meantime_counts(tmp_path, monkeypatch):
    edits(tmp_path / "rows")
    prepare, seen = sorting.prepare, []

    def late(source, place, *rest, **how):
        """The wide samples are complete only after this process asked for them once."""
        seen.append(place.name)
        done = prepare(source, place, *rest, **how)
        return None if seen == ["12x24"] else done

    monkeypatch.setattr(sorting, "prepare", late)
    assert sort(tmp_path / "rows", tmp_path / "out") == tmp_path / "out"
    assert seen == ["12x24", "24x12", "24x24", "12x24"]
