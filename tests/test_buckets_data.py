"""Data sets in a bucket: every layout reads there what it reads on this machine, by ranges, and is written there."""

import errno
import json

import numpy as np
import pytest
from sources_support import encoded, opened, pairs, picture, write_rows, write_tar

from metacanvas_jax import files, retries
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import latents
from metacanvas_jax.data.formats import manifest
from metacanvas_jax.data.formats.shards import WriteConfig
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.sources import prepare
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.mllm.context_cache import ContextCache
from metacanvas_jax.types import Context, KeyValues, MllmInputs

COUNT = 6
QUIET = WriteConfig(per_shard=3, progress=False)


def upload(near, url):
    for name in files.listing(near, deep=True):
        files.upload(near / name, f"{url}/{name}")
    return url


def tars(folder):
    write_tar(folder / "a.tar", pairs(4))
    write_tar(folder / "b.tar", pairs(2, start=4))
    return ""


def rows(folder):
    write_rows(folder, [{"target": f"media/{n}.png", "prompt": f"caption {n}"} for n in range(COUNT)])
    (folder / "media").mkdir()
    for number in range(COUNT):
        (folder / "media" / f"{number}.png").write_bytes(encoded(number))
    return ""


def table(folder):
    rows(folder)
    (folder / "metadata.jsonl").unlink()
    lines = ["target,prompt", *(f"media/{number}.png,caption {number}" for number in range(COUNT))]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return ""


def loose(folder):
    for name, data in pairs(COUNT):
        (folder / "deep").mkdir(exist_ok=True)
        (folder / "deep" / name).write_bytes(data)
    return ""


def parquet(folder):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    columns = {
        "image": [encoded(number) for number in range(COUNT)],
        "prompt": [f"caption {n}" for n in range(COUNT)],
        "other": [np.random.default_rng(n).bytes(1 << 20) for n in range(COUNT)],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "x.parquet", row_group_size=2, compression="none")
    return ""


def records(folder):
    rows(folder)
    prepare(SourceSection(kind="jsonl", path=str(folder)), folder / "made", Clip(), QUIET)
    return "made"


LAYOUTS = {"webdataset": tars, "jsonl": rows, "csv": table, "files": loose, "parquet": parquet, "records": records}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_reads_in_a_bucket_what_it_reads_here(kind, bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    part = LAYOUTS[kind](tmp_path / "set")
    url = f"{upload(tmp_path / 'set', f'{bucket.url}/set')}/{part}".rstrip("/")
    near, far = opened(kind, tmp_path / "set" / part), opened(kind, url)
    assert len(far) == len(near) == COUNT and url.partition("://")[2].split("/")[0] in repr(far)
    for index in range(COUNT):
        here, there = near[index], far[index]
        assert here.prompt == there.prompt
        assert near.key(index) == far.key(index), "a validation share chooses the same samples"
        np.testing.assert_array_equal(here.target, there.target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"], "no folder gs: of this machine"
    with pytest.raises(UserError, match=f"{bucket.url}/none"):
        opened(kind, f"{bucket.url}/none")


def test_tars_are_read_by_ranges_through_an_index_that_is_made_once(bucket, tmp_path):
    large = np.random.default_rng(0).bytes(1 << 20)
    write_tar(tmp_path / "a.tar", [*pairs(3), ("000009.npy", large), *pairs(2, start=3)])
    upload(tmp_path, f"{bucket.url}/set")
    columns = {"columns": (("prompt", "txt"), ("target", "png")), "max_skips": 1}
    assert len(opened("webdataset", f"{bucket.url}/set/*.tar", **columns)) == 6
    assert files.folder(f"{bucket.url}/set/a.tar.index.json").exists()
    bucket.forget()
    source = opened("webdataset", f"{bucket.url}/set", **columns)
    assert bucket.read("a.tar") == bucket.read("a.tar.index.json"), "the index tells where samples lie"
    np.testing.assert_array_equal(source[1].target[0], picture(1))
    assert bucket.read("a.tar") - bucket.read("a.tar.index.json") == len(encoded(1)) + len(b"caption 1")
    write_tar(tmp_path / "a.tar", pairs(2))
    upload(tmp_path, f"{bucket.url}/set")
    assert len(opened("webdataset", f"{bucket.url}/set/a.tar")) == 2, "a shard that was replaced gets a new index"


def test_of_a_parquet_file_the_columns_and_groups_that_are_asked_for_are_read(bucket, tmp_path):
    parquet(tmp_path)
    upload(tmp_path, f"{bucket.url}/set")
    source = opened("parquet", f"{bucket.url}/set/*.parquet")
    bucket.forget()
    assert source[0].prompt == "caption 0"
    assert 0 < bucket.read("x.parquet") < 1 << 21, "not the 6 MB of another column"


def test_paths_of_rows_in_a_bucket_may_not_leave_their_folder(bucket):
    files.write(files.folder(f"{bucket.url}/outside.png"), encoded(1))
    for name, message in (
        ("../outside.png", "points outside"),
        (f"{bucket.url}/outside.png", "points outside"),
        ("none.png", "is missing"),
    ):
        text = json.dumps({"target": name, "prompt": "x"}) + "\n"
        files.write(files.folder(f"{bucket.url}/set/metadata.jsonl"), text)
        with pytest.raises(UserError, match=message):
            opened("jsonl", f"{bucket.url}/set")[0]


class Interrupted(Exception):
    pass


def test_shards_are_written_to_a_bucket_and_an_interrupted_writing_goes_on(bucket, tmp_path, monkeypatch, capsys):
    rows(tmp_path)
    section = SourceSection(kind="jsonl", path=upload(tmp_path, f"{bucket.url}/set"))
    out = f"{bucket.url}/made"
    upload_file, asked = files.upload, []

    def broken(near, path):
        asked.append(str(path))
        if len(asked) == 2:
            raise Interrupted
        upload_file(near, path)

    monkeypatch.setattr(files, "upload", broken)
    with pytest.raises(Interrupted):
        prepare(section, out, Clip(), QUIET)
    with pytest.raises(UserError, match="no dataset there"):
        opened("records", out)
    with pytest.raises(UserError, match="unfinished preparation of something else"):
        prepare(section, out, Clip((6, 8)), QUIET)
    monkeypatch.setattr(files, "upload", lambda near, path: (asked.append(str(path)), upload_file(near, path)))
    assert str(prepare(section, out, Clip(), QUIET)) == out
    assert len([path for path in asked if "00000-of-00002" in path]) == 1, "the first shard was there"
    names = set(files.listing(out))
    assert names == {
        *("dataset_info.json", "features.json", "manifest.json", "recipe.json"),
        *(f"samples-train.array_record-0000{k}-of-00002" for k in range(2)),
    }
    assert str(prepare(section, out, Clip(), QUIET)) == out, "the same again changes nothing"
    assert main(["prepare", "--verify", out]) == 0 and "6 samples in 2 shards" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds another dataset"):
        prepare(section, out, Clip((6, 8)), QUIET)
    with pytest.raises(UserError, match="exists and is no dataset"):
        prepare(section, f"{bucket.url}/set", Clip(), QUIET)
    shard = files.folder(f"{out}/samples-train.array_record-00001-of-00002")
    files.write(shard, files.read_bytes(f"{out}/samples-train.array_record-00000-of-00002"))
    with pytest.raises(UserError, match="another shard of the dataset"):
        opened("records", out)
    assert main(["prepare", "--verify", out]) == 2


def test_several_processes_write_one_folder_of_a_bucket(bucket, tmp_path):
    rows(tmp_path)
    section, out = SourceSection(kind="jsonl", path=str(tmp_path)), f"{bucket.url}/made"
    parts = [WriteConfig(per_shard=2, progress=False, process_index=index, process_count=2) for index in (0, 1)]
    assert prepare(section, out, Clip(), parts[0]) is None
    assert str(prepare(section, out, Clip(), parts[1])) == out
    assert sorted(sample.prompt for sample in map(opened("records", out).read, range(COUNT))) == [
        f"caption {number}" for number in range(COUNT)
    ]


def test_first_frames_alone_are_refused_where_a_run_in_a_bucket_needs_them_all(bucket, tmp_path):
    frames = [f"{number}.png" for number in range(5)]
    write_rows(tmp_path, [{"target": frames, "prompt": "x", "fps": 8}])
    for number, name in enumerate(frames):
        (tmp_path / name).write_bytes(encoded(number))
    section = SourceSection(kind="jsonl", path=str(tmp_path), task="text_to_video")
    config = WriteConfig(progress=False, first_frame=True)
    prepare(section, f"{bucket.url}/made", Clip(frames=5), config)
    assert manifest.read_recipe(f"{bucket.url}/made")["frames"] == "first"
    with pytest.raises(UserError, match="first frame of each target only"):
        latents.check_whole(SourceSection(kind="records", path=f"{bucket.url}/made", task="text_to_video"))


class Shaky(Guarded):
    """Three records; the first reads of the second one fail with what ``errors`` holds."""

    def __init__(self, errors, max_skips=0):
        super().__init__(max_skips)
        self.errors = list(errors)

    def __len__(self):
        return 3

    def __repr__(self):
        return "Shaky()"

    def read(self, index):
        if index == 1 and self.errors:
            raise self.errors.pop()
        return Sample(f"caption {index}", picture(index)[None])


AWAY = (OSError(errno.EIO, "Input/output error"), ConnectionResetError("reset"), TimeoutError("slow"))


@pytest.mark.parametrize("error", AWAY, ids=repr)
def test_storage_that_is_away_for_a_moment_is_no_bad_record(error, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)
    source = Shaky([error] * 3)
    assert source[1].prompt == "caption 1" and source.skipped == 0
    source = Shaky([error] * 100, max_skips=2)
    with pytest.raises(Unreachable, match=r"Shaky\(\), record 1: no answer in 6 tries"):
        source[1]
    assert source.skipped == 0
    source.errors.clear()
    assert source[1].prompt == "caption 1", "nothing of it is remembered"


@pytest.mark.parametrize("error", [OSError("image file is truncated"), FileNotFoundError(2, "none")], ids=repr)
def test_what_cannot_be_decoded_or_is_not_there_is_a_bad_record(error):
    source = Shaky([error], max_skips=1)
    assert source[1].prompt == "caption 2" and source.skipped == 1


def test_a_busy_bucket_is_asked_again_for_a_sample(bucket, tmp_path):
    tars(tmp_path)
    source = opened("webdataset", upload(tmp_path, f"{bucket.url}/set"))
    bucket.fail("a.tar", times=2)
    np.testing.assert_array_equal(source[2].target[0], picture(2))
    assert source.skipped == 0


def contexts(rng, count=3, length=4):
    """A context of a batch, and inputs that would give it."""
    mask = np.arange(length) < rng.integers(2, length + 1, count)[:, None]
    tokens = rng.integers(0, 9, (count, length)).astype(np.int32) + 10 * np.arange(count, dtype=np.int32)[:, None]
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, count, length))
    values = [np.where(mask[..., None], rng.normal(size=(count, length, 5)), 0).astype(np.float32) for _ in range(3)]
    cache = KeyValues(*(x[None, :, :, None] for x in values[1:]))
    context = Context(hidden=values[0], mask=mask, cache=cache, next_position=np.arange(count, dtype=np.int32))
    return context, MllmInputs(tokens, positions, mask, ())


def test_contexts_are_kept_in_a_bucket(bucket, caplog):
    context, inputs = contexts(np.random.default_rng(0))
    cache = ContextCache(f"{bucket.url}/contexts", "me")
    calls = []

    def encode(_):
        calls.append(1)
        return context

    for _ in range(2):
        found = cache.read(inputs, encode)
        np.testing.assert_array_equal(found.hidden, context.hidden)
        np.testing.assert_array_equal(found.cache.keys, context.cache.keys)
    assert len(calls) == 1, "the second time they come from the bucket"
    stored = files.listing(f"{bucket.url}/contexts", deep=True)
    assert len(stored) == 3 and all(name.endswith(".kv.safetensors") for name in stored)
    one, other = (files.folder(f"{bucket.url}/contexts/{name}") for name in list(stored)[:2])
    files.write(one, files.read_bytes(other))
    cache.read(inputs, encode)
    assert len(calls) == 2 and "it is of another prompt" in caplog.text
    cache.read(inputs, encode)
    assert len(calls) == 2, "the damaged one was replaced"
    ContextCache(f"{bucket.url}/contexts", "another").read(inputs, encode)
    assert len(calls) == 3


@pytest.mark.parametrize("above", ["", "/@iconify-json", "/@iconify-json/noto"])
def test_sets_of_drawings_are_found_in_a_bucket_and_here_below_any_of_their_folders(above, bucket, tmp_path):
    home = tmp_path / "npm" / "@iconify-json" / "noto"
    home.mkdir(parents=True)
    (home / "icons.json").write_text(json.dumps({"icons": {"red-heart": {"body": "<path/>"}, "cat": {"body": ""}}}))
    (home / "info.json").write_text('{"name": "Noto"}')
    upload(tmp_path / "npm", f"{bucket.url}/npm")
    near, far = (opened("emoji_styles", f"{place}{above}") for place in (tmp_path / "npm", f"{bucket.url}/npm"))
    assert [far.name(index) for index in range(len(far))] == ["Noto/red heart", "Noto/cat"]
    assert [near.name(index) for index in range(len(near))] == ["Noto/red heart", "Noto/cat"]
