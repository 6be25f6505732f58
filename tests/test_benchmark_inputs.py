"""What each benchmark says about files that are not its own: one line, before a weight is read or a file written."""

import dataclasses
import functools
import json

import pytest
from evaluate_support import parquet, png, videos_of
from experiments_support import miniature

from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.benchmarks import runner, texts
from metacanvas_jax.evaluate.contract import Asked

PICTURE = {"bytes": png(20, 30), "path": "a.png"}
NO_PICTURE = {"bytes": b"no picture", "path": "a.png"}
EMPTY = {"bytes": None, "path": ""}


@dataclasses.dataclass
class Data:
    """The files of a benchmark, from a few lines: rows of its tables by file, and pictures and texts by path."""

    rows: dict
    files: dict[str, bytes]

    def write(self, folder):
        for name, rows in self.rows.items():
            if name.endswith(".parquet"):
                parquet(folder / name, rows)
            elif name.endswith(".jsonl"):
                (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                (folder / name).write_text(json.dumps(rows))
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def geneval():
    rows = [{"tag": "colors", "prompt": f"a photo of a {colour} cat"} for colour in ("red", "blue")]
    return Data({"evaluation_metadata.jsonl": rows}, {})


def gedit():
    words = {"task_type": "color_alter", "instruction": "make it red", "instruction_language": "en"}
    rows = [{**words, "key": key, "input_image": PICTURE, "input_image_raw": PICTURE} for key in ("k1", "k2")]
    return Data({"train-0.parquet": rows}, {})


def imgedit():
    rows = {key: {"id": f"animal/{key}.png", "prompt": "make it blue", "edit_type": "alter"} for key in ("1", "2")}
    return Data({"basic_edit.json": rows}, {f"Benchmark/animal/{key}.png": png(30, 20) for key in ("1", "2")})


def vbench():
    rows = [{"prompt_en": prompt, "dimension": ["color"]} for prompt in ("a cat runs", "a still lake")]
    return Data({"VBench_full_info.json": rows}, {})


def vbench_i2v():
    row = {"prompt_en": "a lake", "dimension": ["i2v_background"], "image_name": "a lake.png"}
    moved = {**row, "prompt_en": "a lake, camera pans left"}
    return Data({"vbench2_i2v_full_info.json": [row, moved]}, {"data/crop/1-1/a lake.png": png(60, 60)})


def omnicontext():
    words = {"task_type": "single_object", "instruction": "a cat"}
    return Data({"train-0.parquet": [{**words, "key": key, "input_images": [PICTURE]} for key in ("k1", "k2")]}, {})


def dpg():
    return Data({}, {"10.txt": b"a long prompt\n", "partiprompts2.txt": b"another\n"})


def wise():
    rows = {name: [{"prompt_id": place, "Prompt": "a flower"}] for place, name in enumerate(texts.WISE_FILES, 1)}
    return Data({f"{name}.json": found for name, found in rows.items()}, {})


MAKE = {f.__name__: f for f in (geneval, gedit, imgedit, vbench, vbench_i2v, omnicontext, dpg, wise)}


@functools.cache
def setup_of(name):
    """A run that draws the task of a benchmark."""
    task = {"vbench": "text_to_video", "vbench_i2v": "image_to_video", "omnicontext": "reference_to_video"}.get(name)
    if task is not None:
        return videos_of(task)
    return miniature("image_editing" if name in ("gedit", "imgedit") else "t2i_scratch")


def prepared(name, folder, out):
    return runner.prepare(name, setup_of(name), Asked(data=str(folder), out=out))


def refused(name, folder, out, message):
    with pytest.raises(UserError, match=message) as error:
        prepared(name, folder, out)
    assert "\n" not in str(error.value)
    assert not out.exists() and not runner.recipe_of(out).exists()


def test_every_benchmark_is_here():
    assert MAKE.keys() == runner.BENCHMARKS.keys()


def first(**values):
    """A change of the first row of the only table."""

    def change(data):
        (rows,) = data.rows.values()
        row = rows[next(iter(rows))] if isinstance(rows, dict) else rows[0]
        row.update(values)

    return change


def without(key):
    """A change that leaves a column, or the key of every row, out."""

    def change(data):
        for rows in data.rows.values():
            for row in rows.values() if isinstance(rows, dict) else rows:
                del row[key]

    return change


def lost(path):
    """A change that leaves out a file."""
    return lambda data: data.files.pop(path)


def put(path, content):
    """A change of what a file holds."""

    def change(data):
        data.rows.pop(path, None)
        data.files[path] = content

    return change


BAD = {
    "geneval": {
        "no file": (lambda data: data.rows.clear(), r"no evaluation_metadata\.jsonl there"),
        "columns": (without("prompt"), "line 1: 'prompt' is None, expected a text"),
        "no JSON": (put("evaluation_metadata.jsonl", b"{"), "line 1: not valid JSON"),
        "other JSON": (put("evaluation_metadata.jsonl", b"[]"), "line 1: expected a JSON object, found list"),
        "no UTF-8": (put("evaluation_metadata.jsonl", b"\xff\xfe{}"), "evaluation_metadata.jsonl: .*UTF-8"),
        "empty": (put("evaluation_metadata.jsonl", b""), "no prompts there"),
    },
    "gedit": {
        "no file": (lambda data: data.rows.clear(), "no parquet files there"),
        "missing image": (first(input_image_raw=EMPTY), "no picture in the column 'input_image_raw'"),
        "bad image": (first(input_image_raw=NO_PICTURE), "row 0 of group 0: no readable picture"),
        "twice": (first(key="k2"), "a key is there twice"),
        "columns": (without("instruction"), "no column 'instruction'; it has "),
        "no name": (first(key="../x"), "cannot be the name of a file"),
        "no parquet": (put("train-0.parquet", b"PAR1"), "no readable parquet file"),
    },
    "imgedit": {
        "no file": (lambda data: data.rows.clear(), r"no basic_edit\.json there"),
        "missing image": (lost("Benchmark/animal/2.png"), r"basic_edit\.json, 2: no image animal/2\.png"),
        "bad image": (put("Benchmark/animal/1.png", b"no"), r"1\.png: no readable picture"),
        "twice": (put("basic_edit.json", b'{"1": {}, "1": {}}'), "the key '1' is there twice"),
        "columns": (without("prompt"), r"basic_edit\.json, 1: 'prompt' is None, expected a text"),
        "no name": (put("basic_edit.json", b'{"a/b": {"id": "animal/1.png", "prompt": "x"}}'), "'a/b' cannot be"),
        "other JSON": (put("basic_edit.json", b"[]"), "expected a JSON object, found list"),
    },
    "vbench": {
        "no file": (lambda data: data.rows.clear(), r"no VBench_full_info\.json there"),
        "columns": (without("dimension"), "entry 0: expected an object with a list 'dimension'"),
        "other columns": (without("prompt_en"), "entry 0: 'prompt_en' is None, expected a text"),
        "no name": (first(prompt_en="a/b"), "'a/b' cannot be the name of a file"),
        "long name": (first(prompt_en="long " * 60), "the name of its file has more than"),
        "no JSON": (put("VBench_full_info.json", b"["), "not valid JSON"),
    },
    "vbench_i2v": {
        "no file": (lambda data: data.rows.clear(), r"no vbench2_i2v_full_info\.json there"),
        "missing image": (lost("data/crop/1-1/a lake.png"), r"a lake\.png: no such image, which the prompt"),
        "bad image": (put("data/crop/1-1/a lake.png", b"no"), r"a lake\.png: no readable picture"),
        "twice": (
            lambda data: data.rows["vbench2_i2v_full_info.json"][1].update(prompt_en="a lake", image_name="b.png"),
            "entry 1: the prompt 'a lake' is there twice, with different images",
        ),
        "columns": (without("dimension"), "entry 0: expected an object with a list 'dimension'"),
    },
    "omnicontext": {
        "no file": (lambda data: data.rows.clear(), "no parquet files there"),
        "missing image": (first(input_images=[PICTURE, EMPTY]), "no picture in the column 'input_images'"),
        "no images": (first(input_images=[]), "input_images is empty"),
        "bad image": (first(input_images=[PICTURE, NO_PICTURE]), "row 0 of group 0: no readable picture"),
        "twice": (first(key="k2"), "a key is there twice"),
        "columns": (without("task_type"), "no column 'task_type'; it has "),
    },
    "dpg": {
        "no file": (lambda data: data.files.clear(), "no prompts there"),
        "no prompt": (put("10.txt", b" \n"), r"10\.txt: no prompt there"),
        "no UTF-8": (put("10.txt", b"\xff\xfe"), r"10\.txt: .*UTF-8"),
    },
    "wise": {
        "no file": (lambda data: data.rows.popitem(), r"no natural_science_verified\.json or natural_science\.json"),
        "twice": (lambda data: data.rows["natural_science.json"][0].update(prompt_id=1), "a key is there twice"),
        "columns": (without("Prompt"), "entry 0: 'Prompt' is None, expected a text"),
        "no number": (without("prompt_id"), "entry 0: expected an object with a whole number 'prompt_id'"),
        "truth value": (
            lambda data: data.rows["natural_science.json"][0].update(prompt_id=True),
            "entry 0: expected an object with a whole number 'prompt_id'",
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MAKE)
def test_its_own_files_are_read_and_a_tree_that_cannot_be_written_is_one_line(name, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    MAKE[name]().write(data)
    assert prepared(name, data, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*: .*file is no folder") as error:
        prepared(name, data, tmp_path / "file" / "out")
    assert "\n" not in str(error.value)
    if runner.BENCHMARKS[name].needs_data:
        with pytest.raises(UserError, match=f"the benchmark {name} needs --data"):
            runner.prepare(name, setup_of(name), Asked(out=tmp_path / "out"))


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BAD.items() for case in cases])
def test_files_that_are_not_its_own_are_one_line(name, case, tmp_path):
    change, message = BAD[name][case]
    made, folder = MAKE[name](), tmp_path / "data"
    change(made)
    folder.mkdir()
    made.write(folder)
    refused(name, folder, tmp_path / "out", message)
