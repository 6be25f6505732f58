"""A user's folder: recognised by what is in it, put into a config, and refused in one line where it does not serve."""

import dataclasses
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sources_support import encoded, pairs, write_rows, write_tar

from configs import base
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.load import ROOT, load_config, read_config, shared, write_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import own
from metacanvas_jax.data.examples import PaintExamples
from metacanvas_jax.data.inputs import opened
from metacanvas_jax.data.sources import prepare
from metacanvas_jax.data.tokenizer import fitted_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate import grid
from metacanvas_jax.evaluate.contract import Asked
from metacanvas_jax.evaluate.flow_loss import FlowLoss
from metacanvas_jax.evaluate.held_out import held_out
from metacanvas_jax.launch import own_data
from metacanvas_jax.launch import prepare as preparing
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train.metrics import read_scores

MINIATURE = "configs/t2i_scratch.py:miniature"


def loose(folder, count, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in pairs(count, start):
        (folder / name).write_bytes(data)
    return folder


def rows(count):
    return [{"file_name": f"{number}.png", "text": f"caption {number}"} for number in range(count)]


def pictures(folder, count, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(number, **options))
    return folder


def as_jsonl(folder):
    write_rows(pictures(folder, 3), rows(3))


def as_csv(folder):
    pictures(folder, 3)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.png,caption {n}\n" for n in range(3)))


def as_tars(folder):
    folder.mkdir()
    write_tar(folder / "0.tar", pairs(2))
    write_tar(folder / "1.tar", pairs(1, 2))


def as_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    folder.mkdir()
    images = [{"bytes": encoded(number), "path": None} for number in range(3)]
    pyarrow.write_table(pa.table({"image": images, "text": [f"caption {n}" for n in range(3)]}), folder / "a.parquet")


def as_records(folder):
    source = loose(folder.parent / "source", 3)
    prepare(SourceSection("files", str(source)), folder, Clip((12, 12)))


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("files", lambda folder: loose(folder / "deep" / "er", 3)),
        ("jsonl", as_jsonl),
        ("csv", as_csv),
        ("webdataset", as_tars),
        ("parquet", as_parquet),
        ("records", as_records),
    ],
)
def test_each_layout_is_recognised_by_its_files_and_opens(tmp_path, kind, write):
    folder = tmp_path / "mine"
    write(folder)
    (folder / ".DS_Store").write_bytes(b"x")
    found = own.look(folder)
    assert (found.kind, found.path, found.lonely) == (kind, str(folder), 0)
    seen = own.looked(SourceSection(found.kind, found.path))
    assert seen.count == 3 and len(seen.sizes) == 3


def test_a_set_is_found_below_the_folder_and_by_a_file_or_a_pattern(tmp_path, monkeypatch):
    as_jsonl(tmp_path / "mine" / "train")
    monkeypatch.chdir(tmp_path)
    assert own.look("mine") == own.Own("jsonl", f"{tmp_path}/mine/train")
    file = "mine/train/metadata.jsonl"
    assert own.look(file) == own.Own("jsonl", f"{tmp_path}/{file}")
    write_tar(tmp_path / "a-0.tar", pairs(1))
    write_tar(tmp_path / "b-0.tar", pairs(1, 1))
    assert own.look("a-*.tar") == own.Own("webdataset", f"{tmp_path}/a-*.tar")
    assert own.looked(SourceSection("webdataset", f"{tmp_path}/a-*.tar")).count == 1


def test_what_cannot_be_used_is_one_line_that_says_what_was_seen(tmp_path):
    for name in ("a.jpg", "b.JPG", "c.docx"):
        (tmp_path / name).write_bytes(encoded(1))
    with pytest.raises(UserError, match=r"3 files \(2 \.jpg, 1 \.docx\), 2 of them a picture without a text") as caught:
        own.look(tmp_path)
    assert "expected captioned pictures" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such folder; expected captioned"):
        own.look(tmp_path / "none")
    with pytest.raises(UserError, match="is empty text; expected captioned"):
        own.look("")
    with pytest.raises(UserError, match="no file; expected"):
        (tmp_path / "empty").mkdir()
        own.look(tmp_path / "empty")
    with pytest.raises(UserError, match=r"1 files \(1 \.docx\); expected"):
        own.look(tmp_path / "c.docx")


def test_of_several_sets_one_is_to_be_named(tmp_path):
    for name in ("test", "train"):
        as_jsonl(tmp_path / name)
    with pytest.raises(UserError, match=r"2 sets of samples, test \(jsonl\), train \(jsonl\): name one of them"):
        own.look(tmp_path)
    (tmp_path / "hub").mkdir()
    for name in ("train-0", "test-0"):
        (tmp_path / "hub" / f"{name}.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"the splits test, train; name the files of one"):
        own.look(tmp_path / "hub")


def test_the_shape_says_how_much_is_cropped_and_what_is_enlarged():
    seen = own.Looked(9, ((100, 200), (100, 200), (100, 100)))
    assert seen.lost((50, 50)) == 0.5 and seen.lost((50, 100)) == 0.0
    assert seen.smaller((100, 100)) == 0 and seen.smaller((100, 101)) == 1


def used(tmp_path, folder, config=MINIATURE, overrides=()):
    config = load_config(config, list(overrides))
    notes = own_data.use(config, str(folder), tmp_path / "run", overrides)
    return config, experiment(config), notes


def test_the_sources_of_a_config_become_the_folder_with_a_share_for_validation(tmp_path):
    folder = loose(tmp_path / "mine", 40)
    (folder / "alone.png").write_bytes(encoded(1))
    (folder / "readme.txt").write_text("no picture")
    config, setup, notes = used(tmp_path, folder)
    (source,) = setup.sources
    assert (source.kind, source.path, source.task) == ("files", str(folder), "text_to_image")
    assert (source.validation, source.in_memory, source.max_skips) == (0.05, True, 2 + 3)
    assert setup.eval.evaluators == ("flow_loss",)
    assert "40 samples of the layout 'files' (2 without a text or without a picture are left out)" in notes["found"]
    assert "scaled until they cover 60 x 60, then cropped about the centre" in notes["shape"]
    assert "half lose 25% of their area or more, 30 are smaller and enlarged" in notes["shape"]
    (data,) = opened(setup)
    assert data.held_out > 0 and data.count + data.held_out == 42
    write_config(config, tmp_path / "run")
    assert read_config(tmp_path / "run").sources[0]["path"] == str(folder)


def test_what_a_miniature_makes_lies_in_its_run_unless_it_is_named(tmp_path):
    folder = loose(tmp_path / "mine", 4)
    _, setup, _ = used(tmp_path, folder)
    prepared = tmp_path / "run" / "prepared"
    assert setup.vae_weights == str(prepared / "vae")
    assert setup.mllm.tokenizer == setup.text.tokenizer == str(prepared / "tokenizer")
    _, setup, _ = used(tmp_path, folder, overrides=["--config.vae_weights=mine", "--config.mllm.tokenizer=words"])
    assert (setup.vae_weights, setup.mllm.tokenizer) == ("mine", "words")
    large, _, _ = used(tmp_path, folder, config="configs/t2i_lora.py")
    assert large.vae_weights == "weights/Sana_1600M_512px_diffusers/vae"
    assert large.mllm.tokenizer == large.mllm.weights == "weights/Qwen2.5-VL-7B-Instruct"
    world, setup, _ = used(tmp_path, folder, config="configs/miniature.py:canvas")
    assert setup.eval.evaluators == ("flow_loss",) and world.mllm.tokenizer.endswith("miniature/mllm/tokenizer")


def test_a_bad_sample_is_named_once_while_a_miniature_makes_what_it_needs(tmp_path, caplog):
    folder, rng = loose(tmp_path / "mine", 40), np.random.default_rng(0)
    for path in folder.glob("*.png"):  # noise, as an autoencoder is made of these pictures
        Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)).save(path)
    damaged = sorted(folder.glob("*.png"))[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    _, setup, _ = used(tmp_path, folder)
    assert len(preparing.prepare(setup)) == 2
    assert len([line for line in caplog.messages if "is corrupt" in line]) == 1


def test_held_out_samples_are_drawn_beside_their_targets_with_and_without_canvas(tmp_path):
    _, setup, _ = used(tmp_path, loose(tmp_path / "mine", 40))
    held = {int(record.name) for record in held_out(setup, setup.shapes[0])}
    assert 1 <= len(held) <= 8

    def paint(params, samples, bucket, *, seed, guidance, canvas):
        assert (seed, guidance) == (setup.eval.seed, 3.0)
        return SimpleNamespace(pixels=np.full((len(samples), 1, *bucket.size, 3), 222 if canvas else 111, np.uint8))

    inputs = SimpleNamespace(examples=lambda bucket: PaintExamples(None, bucket))
    painter = SimpleNamespace(setup=setup, inputs=inputs, paint=paint)

    def areas(asked):
        (sheet,) = grid.sheets(painter, {}, asked).values()
        return {value: int((sheet == value).all(axis=-1).sum()) / 180**2 for value in (*held, 222, 111)}

    assert areas(Asked(guidance=3.0)) == {**dict.fromkeys(held, 1.0), 222: len(held), 111: len(held)}
    alone = areas(Asked(guidance=3.0, canvas=False, limit=1))
    assert alone[111] == 1.0 and alone[222] == 0.0 and sum(alone[value] for value in held) == 1.0


def test_a_validation_loss_is_read_as_scores_of_the_run(tmp_path):
    losses = {"text_to_image": {0.1: 1.0, 0.9: 2.0}, "image_editing": {0.1: 3.0, 0.9: 4.0}}
    FlowLoss(losses, None, {"text_to_image": 2, "image_editing": 2}).save(tmp_path / "scores.json")
    means = {"text_to_image": 1.5, "image_editing": 3.5}
    assert read_scores(tmp_path) == {"validation loss": {"overall": 2.5, "categories": means}}
    FlowLoss(losses, losses, {}).save(tmp_path / "scores.json")
    assert list(read_scores(tmp_path)) == ["validation loss", "validation loss, no canvas"]
    (tmp_path / "scores.json").write_text('{"canvas": {"text_to_image": {"0.1": "low"}}, "bare": null, "samples": {}}')
    with pytest.raises(UserError, match="canvas holds no losses"):
        read_scores(tmp_path)


def test_edits_need_what_is_edited(tmp_path):
    folder = pictures(tmp_path / "edits", 4)
    edits = [{"source": f"{n}.png", "target": f"{n + 1}.png", "prompt": f"add {n}"} for n in range(3)]
    write_rows(folder, edits)
    _, setup, _ = used(tmp_path, folder, config="configs/image_editing.py:miniature")
    assert [source.task for source in setup.sources] == ["image_editing"]
    assert opened(setup)[0].sources[0].records[0].source is not None
    write_rows(folder, rows(3))
    expected = r"no sample for the task image_editing among those looked at \(row 1: missing key 'source'"
    with pytest.raises(UserError, match=expected):
        used(tmp_path, folder, config="configs/image_editing.py:miniature")


def test_data_that_would_have_no_effect_is_refused(tmp_path):
    folder = loose(tmp_path / "mine", 2)
    with pytest.raises(UserError, match="teaches an MLLM with drawings"):
        used(tmp_path, folder, config="configs/miniature.py:mllm")
    with pytest.raises(UserError, match=r"--config\.sources\[0\]\.validation has no effect with --data"):
        used(tmp_path, folder, overrides=["--config.sources[0].validation=0.2"])


def test_the_tokenizer_of_own_captions_reads_any_text():
    captions = ["a bicycle leans on a wall", "a bicycle in the rain"] * 20
    tokenizer = fitted_tokenizer(captions, 300)
    assert len(tokenizer) <= 300
    assert len(tokenizer.encode("a bicycle")) < len(tokenizer.encode("a zeppelin"))
    assert tokenizer.decode(tokenizer.encode("ein Fahrrad, 自転車")) == "ein Fahrrad, 自転車"
    with pytest.raises(UserError, match="bytes and special tokens are 264"):
        fitted_tokenizer(captions, 263)


def test_a_run_finds_its_files_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(MINIATURE, ["--config.sources[0].kind=files", "--config.sources[0].path=mine"])
    write_config(config, tmp_path / "run")
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["sources"][0]["path"] == f"{tmp_path}/mine"
    assert values["mllm"]["tokenizer"] == f"{tmp_path}/runs/tiny/tokenizer"
    assert values["start"] == "" and values["eval"]["data"] == ""
    found = read_config(tmp_path / "run")
    assert experiment(found).sources[0].kind == "files"
    assert shared(found)["sources"][0]["path"] == "mine"
    monkeypatch.chdir("/")
    assert shared(found)["vae_weights"] == f"{tmp_path}/runs/tiny/vae_12".lstrip("/")


def test_the_first_block_of_the_page_about_data_is_a_config(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(blocks[0])
    setup = experiment(load_config(f"{tmp_path}/mine.py:text", ["--config.sources[1].path=/elsewhere"]))
    assert [(source.kind, source.weight, source.path) for source in setup.sources] == [
        ("webdataset", 3.0, "/data/blip3o/*.tar"),
        ("files", 1.0, "/elsewhere"),
    ]
    assert setup.name == "t2i_scratch_text" and setup.sources[1].validation == 0.05
    for block in blocks[1:]:
        exec(block, {"SourceSection": SourceSection, "Bucket": Bucket, "base": base})


def test_a_folder_of_nothing_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "a.heic").write_bytes(b"x")
    run = tmp_path / "run"
    assert main(["train", "--config", MINIATURE, "--data", str(tmp_path), "--workdir", str(run)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "1 files (1 .heic)" in said and not run.exists()


def test_pictures_are_looked_at_evenly_and_bad_ones_are_no_obstacle(tmp_path):
    folder = loose(tmp_path, 100)
    (folder / "000000.png").write_bytes(b"damaged")
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(buffer, "PNG")
    (folder / "000099.png").write_bytes(buffer.getvalue())
    seen = own.looked(SourceSection("files", str(folder)))
    assert len(seen.sizes) == own.LOOKED - 1 and seen.sizes[-1] == (30, 20)
    assert dataclasses.replace(seen, sizes=seen.sizes[-1:]).lost((30, 20)) == 0.0


def test_a_saved_config_names_places_from_the_root_and_leaves_words_alone(tmp_path):
    config = load_config("configs/miniature.py:canvas", ["--config.start=runs/before"])
    write_config(config, tmp_path)
    saved = read_config(tmp_path)
    assert saved.start == str(Path.cwd() / "runs/before") and saved.data.path == str(Path.cwd() / "runs/miniature/data")
    assert saved.canvas.start == config.canvas.start == " A B C D E F G H I J K L M N O P"
