"""The trees of the benchmarks, from a few lines of their own files: names and contents."""

import csv
import io
import json

import numpy as np
import pytest
from evaluate_support import parquet, png, videos_of
from experiments_support import miniature
from PIL import Image

from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import edits, runner, texts, vbench
from metacanvas_jax.evaluate.contract import Asked

RNG = np.random.default_rng(0)


def shape_of(data):
    return np.asarray(Image.open(io.BytesIO(data))).shape


def drawn(entry):
    """The files of an entry whose results are noise."""
    shape = (entry.bucket.frames, *entry.bucket.size, 3)
    made = entry.files([RNG.integers(0, 256, shape, np.uint8) for _ in entry.numbers])
    assert set(made) == set(entry.paths)
    return made


def tree_of(name, setup, data, tmp_path, **asked):
    return runner.prepare(name, setup, Asked(data=str(data), out=tmp_path / "out", **asked))


def gedit_rows():
    picture = {"bytes": png(40, 80), "path": "a.png"}
    common = {"input_image": picture, "input_image_raw": picture, "Intersection_exist": True}
    return [
        {
            "task_type": "color_alter",
            "key": key,
            "instruction": "make it red",
            "instruction_language": language,
            **common,
        }
        for key, language in (("k1", "en"), ("k1", "cn"), ("k2", "en"))
    ]


def test_gedit_puts_the_source_beside_each_edit(tmp_path):
    parquet(tmp_path / "train-0.parquet", gedit_rows())
    entries = tree_of("gedit", miniature("image_editing"), tmp_path, tmp_path)
    stem = "fullset/color_alter/en/k1"
    assert entries[0].paths == (f"{stem}_SRCIMG.png", f"{stem}.png")
    assert [entry.paths[1].split("/")[2] for entry in entries] == ["en", "cn", "en"]
    files, sample = drawn(entries[0]), entries[0].sample()
    assert shape_of(files[f"{stem}_SRCIMG.png"]) == (40, 80, 3)
    rows, columns, _ = shape_of(files[f"{stem}.png"])
    assert columns / rows == pytest.approx(2, rel=0.05)
    assert sample.prompt == "make it red" and sample.source.shape == (1, *entries[0].bucket.size, 3)


def test_gedit_scores_are_means_of_groups_of_roots(tmp_path):
    for group, rows in {"a": [(4, 9, "en"), (0, 5, "en"), (10, 10, "cn")], "b": [(9, 9, "en")]}.items():
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(("sementics_score", "quality_score", "instruction_language"))
        table.writerows(rows)
        (tmp_path / f"model_{group}_all_vie_score.csv").write_text(text.getvalue())
    assert edits.gedit_scores(tmp_path)["G_O"] == pytest.approx((3 + 9) / 2)


def test_imgedit_names_edits_by_their_keys(tmp_path):
    (tmp_path / "animal").mkdir()
    (tmp_path / "animal" / "1.png").write_bytes(png(30, 20))
    rows = {"82": {"id": "animal/1.png", "prompt": "make it blue", "edit_type": "alter"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(rows))
    (entry,) = tree_of("imgedit", miniature("image_editing"), tmp_path, tmp_path)
    assert list(drawn(entry)) == ["82.png"]


def test_vbench_names_videos_by_prompt_and_number(tmp_path):
    pytest.importorskip("av")
    rows = [
        {"prompt_en": "a cat runs", "dimension": ["color"]},
        {"prompt_en": "a still lake", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a cat runs", "dimension": ["scene"]},
    ]
    (tmp_path / "VBench_full_info.json").write_text(json.dumps(rows))
    entries = tree_of("vbench", videos_of("text_to_video"), tmp_path, tmp_path)
    assert [entry.paths[0] for entry in entries[:5]] == [f"a cat runs-{i}.mp4" for i in range(5)]
    assert len(entries) == 5 + 25 and entries[-1].paths == ("a still lake-24.mp4",)
    assert entries[0].name == entries[1].name and [entry.numbers for entry in entries[:2]] == [(0,), (1,)]
    assert drawn(entries[0])["a cat runs-0.mp4"][4:8] == b"ftyp"
    assert len(tree_of("vbench", videos_of("text_to_video"), tmp_path, tmp_path, limit=1)) == 5


def test_vbench_i2v_takes_the_images_of_the_nearest_ratio(tmp_path):
    images = tmp_path / "data" / "crop" / "1-1"
    images.mkdir(parents=True)
    (images / "a lake.png").write_bytes(png(60, 60))
    rows = [{"prompt_en": "a lake", "dimension": ["i2v_background"], "image_name": "a lake.png"}]
    (tmp_path / "vbench2_i2v_full_info.json").write_text(json.dumps(rows))
    entries = tree_of("vbench_i2v", videos_of("image_to_video"), tmp_path, tmp_path)
    assert [entry.paths[0] for entry in entries] == [f"a lake-{i}.mp4" for i in range(5)]
    assert entries[0].sample().target[0].std() > 1


def test_vbench_reads_what_the_final_script_prints(tmp_path):
    (tmp_path / "final.txt").write_text("+--|--+\n|   quality score|0.9|\n|  total score|0.8713|\n+--|--+\n")
    assert vbench.scores(tmp_path) == pytest.approx({"total score": 87.13, "quality score": 90.0})


def test_omnicontext_draws_a_square_of_1024_from_references(tmp_path):
    picture = {"bytes": png(30, 30), "path": "a.png"}
    row = {"key": "k", "task_type": "single_object", "instruction": "a cat", "input_images": [picture, picture]}
    parquet(tmp_path / "train-0.parquet", [row])
    (entry,) = tree_of("omnicontext", videos_of("reference_to_video"), tmp_path, tmp_path)
    assert entry.bucket.references == 2 and len(entry.sample().references) == 2
    assert shape_of(drawn(entry)["fullset/single_object/k.png"]) == (1024, 1024, 3)


def test_dpg_tiles_four_pictures(tmp_path):
    for name in ("10", "partiprompts2"):
        (tmp_path / f"{name}.txt").write_text("a long prompt\n")
    entries = tree_of("dpg", miniature("t2i_scratch"), tmp_path, tmp_path)
    assert [entry.paths for entry in entries] == [("10.png",), ("partiprompts2.png",)]
    results = [np.full((1, 60, 60, 3), 60 * i, np.uint8) for i in range(4)]
    pixels = np.asarray(Image.open(io.BytesIO(entries[0].files(results)["10.png"])))
    assert pixels.shape == (120, 120, 3)
    assert [pixels[y, x, 0] for y in (0, 119) for x in (0, 119)] == [0, 60, 120, 180]


def test_wise_names_pictures_by_their_numbers(tmp_path):
    for number, stem in enumerate(texts.WISE_FILES, 1):
        (tmp_path / f"{stem}.json").write_text(json.dumps([{"prompt_id": number, "Prompt": "a flower of May"}]))
    entries = tree_of("wise", miniature("t2i_scratch"), tmp_path, tmp_path)
    assert [entry.paths for entry in entries] == [("1.png",), ("2.png",), ("3.png",)]


def test_a_run_of_another_task_is_refused(tmp_path):
    parquet(tmp_path / "train-0.parquet", gedit_rows())
    with pytest.raises(UserError, match=r"one of image_editing, which the run does not draw"):
        tree_of("gedit", miniature("t2i_scratch"), tmp_path, tmp_path)


def test_collect_puts_scores_beside_the_paper(tmp_path, capsys):
    from metacanvas_jax.cli.main import main

    for name in ("a", "b"):
        about = {"benchmark": "geneval", "run": "t2i", "step": 7, "canvas": name == "a", "base": False}
        (tmp_path / f"{name}.recipe.json").write_text(json.dumps(about))
    (tmp_path / "a.scores").mkdir()
    (tmp_path / "a.scores" / "results.jsonl").write_text(json.dumps({"tag": "colors", "correct": True}) + "\n")
    assert main(["evaluate", "--collect", str(tmp_path), "--out", str(tmp_path / "table.md")]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "table.md").read_text()
    assert "| GenEval | a | t2i | 7 | with canvas | 100.00 (overall; colors 100.00) |" in table
    assert "| GenEval | b | t2i | 7 | without canvas | not scored yet |" in table
    assert "| GenEval | | paper | | Table 3, MetaCanvas | 68.02 |" in table
    (tmp_path / "a.scores" / "results.jsonl").write_text("{}\n")
    assert main(["evaluate", "--collect", str(tmp_path)]) == 2
    assert "'tag' is None" in capsys.readouterr().err
