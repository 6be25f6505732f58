"""Turning sources into array_record shards: exact, resumable, by several processes, with a manifest."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from faults_support import fill_disk
from PIL import Image
from sources_support import encoded, pairs, picture, write_rows, write_tar

from metacanvas_jax import precompute
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import sources
from metacanvas_jax.data.formats import manifest, shards
from metacanvas_jax.data.formats.shards import WriteConfig
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError

QUIET = WriteConfig(per_shard=3, progress=False)


class Numbered(Guarded):
    """Samples of every task by turns; ``bad`` ones cannot be read, ``stop`` is where somebody pulls the plug."""

    def __init__(self, count, bad=(), stop=None, max_skips=0):
        super().__init__(max_skips)
        self.count, self.bad, self.stop = count, bad, stop

    def __len__(self):
        return self.count

    def __repr__(self):
        return "Numbered"

    def read(self, index):
        if index == self.stop:
            raise KeyboardInterrupt
        if index in self.bad:
            raise ValueError("it is bad")
        noise = np.random.default_rng(index).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
        edit = Sample(f"edit {index}", noise[:1], "image_editing", source=noise[1:2], name=f"n{index}")
        shown = Sample(
            f"show {index}",
            noise,
            "reference_to_video",
            references=(noise[0], noise[1, :4]),
            fps=12.5,
            metadata='{"a": 1}',
            scene='{"b": 2}',
            arrays={"latents": np.full((1, 2, 2, 4), index, np.float32)},
        )
        return (edit, shown)[index % 2]


def _same(a, b):
    for field in dataclasses.fields(Sample):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype
        elif field.name == "references":
            assert len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y, strict=True))
        elif field.name == "arrays":
            assert set(x) == set(y) and all(np.array_equal(x[k], y[k]) for k in x)
        else:
            assert x == y


def _records(folder):
    return sources.Records(folder)


def test_prepare_keeps_every_part_of_every_sample(tmp_path):
    source = Numbered(7)
    folder = shards.write(tmp_path / "set", {"kind": "numbered"}, source, QUIET)
    records = _records(folder)
    assert len(records) == 7 and len(list(folder.glob("*array_record*"))) == 3
    for i in range(7):
        expected = source[i]
        if len(expected.target) > 1:  # read as a causal video: 4k + 1 frames
            expected = dataclasses.replace(expected, target=expected.target[:1], task="reference_to_video")
            with pytest.raises(UserError, match="needs a video"):
                records[i]
            found = open_source(SourceSection("records", str(folder), "reference_to_video"), Clip(frames=3))[i]
            _same(found, source[i])
        else:
            _same(records[i], expected)
    assert shards.write(tmp_path / "set", {"kind": "numbered"}, source, QUIET) == folder
    with pytest.raises(UserError, match=r"another dataset \(it differs in kind\)"):
        shards.write(tmp_path / "set", {"kind": "other"}, source, QUIET)


def test_prepare_goes_on_after_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "set", {"kind": "n"}, Numbered(9, stop=7), QUIET)
    partial = tmp_path / ".set.partial"
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    first = partial / "samples-train.array_record-00000-of-00003"
    before = first.stat().st_mtime_ns, first.stat().st_ino
    with pytest.raises(UserError, match=r"unfinished preparation of something else \(it differs in kind\)"):
        shards.write(tmp_path / "set", {"kind": "m"}, Numbered(9), QUIET)
    source = Numbered(9, stop=2)  # the finished shards are not read again
    source.read = lambda index: Numbered(9).read(index) if index > 5 else pytest.fail(f"read {index}")
    folder = shards.write(tmp_path / "set", {"kind": "n"}, source, QUIET)
    kept = folder / first.name
    assert (kept.stat().st_mtime_ns, kept.stat().st_ino) == before
    whole = shards.write(tmp_path / "whole", {"kind": "n"}, Numbered(9), QUIET)
    for path in whole.glob("*array_record*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert json.loads((folder / "manifest.json").read_text()) == json.loads((whole / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_prepare_by_three_processes_is_prepare_by_one(tmp_path):
    whole = shards.write(tmp_path / "whole", {}, Numbered(10), QUIET)
    config = [dataclasses.replace(QUIET, process_index=i, process_count=3) for i in range(3)]
    assert shards.write(tmp_path / "set", {}, Numbered(10), config[2]) is None
    assert shards.write(tmp_path / "set", {}, Numbered(10), config[0]) is None
    assert not (tmp_path / "set").exists()
    folder = shards.write(tmp_path / "set", {}, Numbered(10), config[1])
    assert shards.write(tmp_path / "set", {}, Numbered(10), config[0]) == folder
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    with pytest.raises(UserError, match="process 3 of 3"):
        dataclasses.replace(QUIET, process_index=3, process_count=3)


def test_prepare_leaves_bad_records_out_up_to_the_limit(tmp_path):
    folder = shards.write(tmp_path / "set", {}, Numbered(8, bad=(1, 3, 4, 5), max_skips=4), QUIET)
    assert len(_records(folder)) == 4
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["count"], manifest["skipped"]) == (4, 4)
    assert [shard["count"] for shard in manifest["shards"]] == [2, 0, 2]
    assert manifest["shards"][0]["skipped"] == ["record 1"]
    with pytest.raises(UserError, match=r"Numbered: record 4 is corrupt \(it is bad\); 3 corrupt so far, 2 allowed"):
        shards.write(tmp_path / "strict", {}, Numbered(8, bad=(1, 3, 4), max_skips=2), QUIET)
    assert not (tmp_path / "strict").exists()
    # Every process is within the limit, all together are not.
    config = [dataclasses.replace(QUIET, process_index=i, process_count=2) for i in range(2)]
    assert shards.write(tmp_path / "two", {}, Numbered(6, bad=(1, 4), max_skips=1), config[0]) is None
    with pytest.raises(UserError, match=r"2 records are corrupt, 1 allowed; the first is record 1"):
        shards.write(tmp_path / "two", {}, Numbered(6, bad=(1, 4), max_skips=1), config[1])


def test_prepare_manifest_finds_a_changed_shard(tmp_path):
    folder = shards.write(tmp_path / "set", {}, Numbered(4), QUIET)
    assert manifest.verify(folder)["count"] == 4
    shard = next(iter(sorted(folder.glob("*array_record*"))))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name}: the shard is not what the manifest says"):
        manifest.verify(folder)
    shard.unlink()
    with pytest.raises(UserError, match="the shard is missing"):
        manifest.verify(folder)
    with pytest.raises(UserError, match="no manifest"):
        manifest.verify(tmp_path)


def test_prepare_turns_each_layout_into_the_same_records(tmp_path):
    write_tar(tmp_path / "a.tar", pairs(4))
    rows = [{"target": f"{n}.png", "prompt": f"caption {n}"} for n in range(4)]
    folder = write_rows(tmp_path / "rows", rows)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(number))
    for kind, path in (("webdataset", tmp_path / "a.tar"), ("jsonl", folder)):
        out = tmp_path / f"out-{kind}"
        sources.prepare(SourceSection(kind=kind, path=str(path)), out, Clip(size=(6, 8)), QUIET)
        found = open_source(SourceSection(kind="records", path=str(out)))
        for number in range(4):
            assert found[number].prompt == f"caption {number}"
            np.testing.assert_array_equal(found[number].target, picture(number, (6, 8))[None])
        with pytest.raises(UserError, match="differs in clip"):
            sources.prepare(SourceSection(kind=kind, path=str(path)), out, Clip(size=(4, 4)), QUIET)


class Full(Numbered):
    """The disk is full as soon as something is read."""

    def read(self, index):
        fill_disk(True)
        return super().read(index)


def test_prepare_on_a_full_disk_is_one_line_and_goes_on_when_there_is_room(tmp_path):
    try:
        with pytest.raises(UserError, match=r"cannot write .*array_record.*\.tmp: ") as said:
            shards.write(tmp_path / "out", {"a": 1}, Full(4), QUIET)
    finally:
        fill_disk(False)
    assert "\n" not in str(said.value) and not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(_records(shards.write(tmp_path / "out", {"a": 1}, Numbered(4), QUIET))) == 4


def test_prepare_as_jpeg_is_smaller_and_close(tmp_path):
    """A picture with noise, as a photograph has it, and one of which a JPEG keeps every value."""
    slopes = 60 + 0.3 * np.add.outer(np.arange(240), np.arange(320))[..., None] + np.array([0, 10, -20])
    noise = np.random.default_rng(0).normal(0, 4, (240, 320, 3))
    photograph = np.clip(slopes + noise, 0, 255).astype(np.uint8)
    folder = write_rows(tmp_path / "rows", [{"target": f"{name}.png", "prompt": name} for name in ("photo", "flat")])
    Image.fromarray(photograph).save(folder / "photo.png")
    (folder / "flat.png").write_bytes(encoded(77))
    section = SourceSection(kind="jsonl", path=str(folder))
    sizes, errors = {}, {}
    for quality in (None, 95, 30):
        out = sources.prepare(section, tmp_path / f"{quality}", config=dataclasses.replace(QUIET, jpeg=quality))
        found, flat = (_records(out)[i] for i in range(2))
        sizes[quality] = sum(shard["bytes"] for shard in manifest.verify(out)["shards"])
        errors[quality] = np.abs(found.target[0].astype(int) - photograph).max()
        np.testing.assert_allclose(flat.target, 77, atol=0 if quality is None else 1)
    assert sizes[95] < 0.9 * sizes[None]  # records lie in blocks of 64 KiB
    assert errors[None] == 0 < errors[95] <= 20 and errors[95] < errors[30]


@pytest.mark.miniature
def test_prepare_stores_the_latents_of_target_source_and_references(tmp_path):
    from miniature_support import arguments
    from miniature_support import config as small

    from metacanvas_jax.config import networks, read
    from metacanvas_jax.vae.patch_pca import network as patch_pca
    from metacanvas_jax.weights import saved

    setup = read.experiment(small(tmp_path, "canvas"))
    pictures = np.random.default_rng(0).integers(0, 256, (40, 60, 60, 3), dtype=np.uint8)
    saved.save(tmp_path / "vae", patch_pca.fit(pictures, setup.vae)[0], {})
    compute, identity = precompute.make_latents(setup, batch=2)
    assert set(identity) == {"autoencoder", "dtype"} and identity["autoencoder"]["vae.patch"] == 15
    section = SourceSection(kind="animations", task="reference_to_video", count=3)
    out = sources.prepare(
        section, tmp_path / "out", Clip(frames=5), QUIET, setup.world, compute=compute, computed=identity
    )
    records = open_source(dataclasses.replace(section, path=str(out)), Clip(frames=5))
    vae = networks.autoencoder(setup)
    params = saved.load(tmp_path / "vae")[0]
    for i in range(3):
        sample = records[i]
        signed = jnp.asarray(sample.target[None], jnp.float32) / 127.5 - 1.0
        expected = vae.apply({"params": params}, signed, method="encode")[0]
        np.testing.assert_allclose(sample.arrays["latents"], expected, atol=1e-4)
        assert sample.arrays["reference_latents"].shape == (len(sample.references), *expected.shape[1:])
    with pytest.raises(UserError, match="samples of one shape"):
        compute([records[0], dataclasses.replace(records[1], target=np.zeros((1, 48, 48, 3), np.uint8))])
    name, overrides = arguments(tmp_path, "canvas", 2)
    command = ["prepare", "--source", "edits", "--task", "image_editing", "--out", str(tmp_path / "cli")]
    latents = ["--count", "2", "--latents", "--latents-dtype", "float16"]
    assert main([*command, *latents, "--config", name, *overrides]) == 0
    arrays = open_source(SourceSection("records", str(tmp_path / "cli"), "image_editing"))[1].arrays
    assert {name: (x.dtype, x.shape) for name, x in arrays.items()} == dict.fromkeys(
        ("latents", "source_latents"), (np.float16, (1, 4, 4, 64))
    )


def test_prepare_on_the_command_line(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [*pairs(4), ("bad.png", b"x"), ("bad.txt", b"x")])
    command = ["prepare", "--source", "webdataset", "--path", str(tmp_path / "*.tar"), "--out", str(tmp_path / "out")]
    assert main([*command, "--size", "6x8"]) == 2
    assert "a.tar/bad is corrupt" in capsys.readouterr().err
    shutil.rmtree(tmp_path / ".out.partial")
    assert main([*command, "--size", "6x8", "--max-skips", "1", "--per-shard", "2", "--process", "1/2"]) == 0
    assert "process 1 of 2 is done" in capsys.readouterr().out
    assert main([*command, "--size", "6x8", "--max-skips", "1", "--per-shard", "2", "--process", "0/2"]) == 0
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 0
    assert "4 samples in 3 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name --config FILE, or --source KIND"),
        (["--source", "zip"], "--source zip: expected one of records"),
        (["--source", "jsonl", "--path", "x"], "needs --out"),
        (["--source", "jsonl", "--path", "x", "--out", "y", "--size", "6"], "--size 6: expected ROWSxCOLUMNS"),
        (["--source", "jsonl", "--path", "x", "--out", "y", "--process", "1"], "--process 1: expected I/N"),
        (["--source", "jsonl", "--path", "x", "--out", "y", "--column", "a"], "--column a: expected PART=NAME"),
        (["--source", "jsonl", "--path", "x", "--out", "y", "--latents"], "--latents needs --config"),
        (["--source", "jsonl", "--path", "x", "--out", "y", "--fps", "-1"], "fps must lie in"),
        (["--source", "jsonl", "--path", "nowhere", "--out", "y"], "nowhere: no rows of media"),
        (["--source", "jsonl", "--out", "y"], "needs a path"),
    ],
)
def test_prepare_refuses_bad_arguments_in_one_line(arguments, message, capsys):
    assert main(["prepare", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
