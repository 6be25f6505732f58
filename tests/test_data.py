"""Data sets on disk, the pipeline over them, and the tokenizers."""

import dataclasses
import itertools
import json
import sys
import threading

import grain
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from metacanvas_jax.data.formats import drawn as worlds
from metacanvas_jax.data.formats import records as dataset
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline, stack_pixels
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.errors import UserError
from metacanvas_jax.worlds import openmoji, scenes
from metacanvas_jax.worlds.scenes import SceneWorld

WORLD = SceneWorld()
COUNT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return dataset.prepare(tmp_path_factory.mktemp("data") / "scenes", WORLD, COUNT, seed=7, progress=False)


# ---- Writing and reading ----


@pytest.mark.miniature
def test_records_are_the_scenes_exactly(folder):
    records = Records(folder)
    assert len(records) == COUNT
    expected = {}
    for index in range(COUNT):
        scene = scenes.training_scene(WORLD, 7, index)
        expected[scene.to_json()] = scene
    for i in range(COUNT):
        sample = records[i]
        scene = expected.pop(sample.scene)
        assert dataset.scene_of(sample) == scene
        assert sample.prompt == scene.prompt
        assert json.loads(sample.metadata) == scene.metadata
        np.testing.assert_array_equal(sample.image, scenes.draw(WORLD, scene))
    assert not expected


@pytest.mark.miniature
def test_tensorflow_is_never_imported(folder):
    Records(folder)[0]
    assert "tensorflow" not in sys.modules


@pytest.mark.miniature
def test_preparing_again_changes_nothing_and_another_set_is_refused(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert dataset.prepare(folder, WORLD, COUNT, seed=7, progress=False) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UserError, match=r"another dataset \(it differs in seed\)"):
        dataset.prepare(folder, WORLD, COUNT, seed=8, progress=False)
    with pytest.raises(UserError, match="differs in world"):
        dataset.prepare(folder, dataclasses.replace(WORLD, max_count=3), COUNT, seed=7, progress=False)


@pytest.mark.miniature
def test_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no dataset"):
        dataset.prepare(tmp_path, WORLD, 4, seed=0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.miniature
def test_interrupted_writing_goes_on_and_shows_no_half_written_folder(tmp_path, monkeypatch):
    real = worlds.draw
    calls = []

    def failing(world, scene):
        calls.append(scene)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(world, scene)

    monkeypatch.setattr(worlds, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        dataset.prepare(tmp_path / "set", WORLD, 8, seed=0, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".set.partial"]
    monkeypatch.undo()
    assert len(Records(dataset.prepare(tmp_path / "set", WORLD, 8, seed=0, progress=False))) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.miniature
def test_missing_packages_leave_no_folder(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(openmoji.importlib, "import_module", absent)
    openmoji.sprites.cache_clear()
    openmoji.layers.cache_clear()
    with pytest.raises(UserError, match=r"\[miniature\]"):
        dataset.prepare(tmp_path / "set", WORLD, 8, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_missing_dataset_names_folder_and_command(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no dataset there; make it with `metacanvas prepare"):
        Records(tmp_path / "nowhere")


def _copy(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return next(to.glob("*array_record*"))


@pytest.mark.miniature
def test_corrupt_record_is_named_after_the_allowed_skips(folder, tmp_path):
    shard = _copy(folder, tmp_path / "set")
    content = bytearray(shard.read_bytes())
    content[200:240] = bytes(40)
    shard.write_bytes(content)
    good = Records(folder)
    bad = [i for i in range(COUNT) if _fails(tmp_path / "set", i)]
    assert len(bad) == 1
    with pytest.raises(UserError, match=rf"record {bad[0]} is corrupt \(.*1 corrupt so far, 0 allowed"):
        Records(tmp_path / "set")[bad[0]]
    lenient = Records(tmp_path / "set", max_skips=1)
    assert lenient[bad[0]].scene == good[(bad[0] + 1) % COUNT].scene


def _fails(folder, index):
    try:
        Records(folder)[index]
    except UserError:
        return True
    return False


@pytest.mark.miniature
def test_missing_and_truncated_shards_are_noticed_when_opening(folder, tmp_path):
    shard = _copy(folder, tmp_path / "set")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be opened"):
        Records(tmp_path / "set")
    shard.unlink()
    with pytest.raises(UserError, match=r"array_record.* is missing"):
        Records(tmp_path / "set")


@pytest.mark.miniature
def test_captioned_pictures(tmp_path):
    records = Records(dataset.prepare_pictures(tmp_path / "pictures", 60, 12, progress=False))
    names = {caption: code for code, caption in openmoji.picture_names()}
    for i in range(12):
        sample = records[i]
        np.testing.assert_array_equal(sample.image, openmoji.picture(names[sample.prompt], 60))
    with pytest.raises(UserError, match="there are"):
        dataset.prepare_pictures(tmp_path / "many", 60, 10**6)
    with pytest.raises(ValueError, match="has no scene"):
        dataset.scene_of(records[0])


# ---- The pipeline ----


class Numbered:
    """Samples that know their number; ``name`` tells sources apart."""

    def __init__(self, count, name="s"):
        self.count, self.name = count, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return Sample(f"{self.name}{index}", np.full((1, 4, 4, 3), index, np.uint8))


def _numbers(samples):
    return np.asarray([sample.image[0, 0, 0] for sample in samples])


FIFTY = (Source(Numbered(50)),)


def _stream(config, collate=_numbers, sources=FIFTY, **kwargs):
    return iter(pipeline(sources, config, collate, **kwargs))


def _take(iterator, count):
    return [next(iterator) for _ in range(count)]


def _all(batches):
    return list(itertools.chain.from_iterable(batches))


def test_every_epoch_holds_every_sample_once_in_a_new_order():
    seen = np.concatenate(_take(_stream(PipelineConfig(10, seed=1)), 10))
    first, second = seen[:50], seen[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second) and list(first) != sorted(first)
    again = np.concatenate(_take(_stream(PipelineConfig(10, seed=1, threads=0)), 10))
    np.testing.assert_array_equal(seen, again)
    other = np.concatenate(_take(_stream(PipelineConfig(10, seed=2)), 5))
    assert list(other) != list(first)


class Together(Numbered):
    """Samples of which none is read before ``count`` of them are being read."""

    def __init__(self, count):
        super().__init__(48)
        self.barrier = threading.Barrier(count, timeout=20)

    def __getitem__(self, index):
        self.barrier.wait()
        return super().__getitem__(index)


def test_samples_of_one_batch_are_read_at_the_same_time_and_stay_in_their_order():
    config = PipelineConfig(12, seed=3, caption_dropout=0.3, threads=4, prefetch=1)
    kwargs = {"format": lambda sample, rng: (sample.prompt, rng.random()), "collate": list}
    found = _take(_stream(config, sources=[Source(Together(4))], **kwargs), 6)
    config = PipelineConfig(12, seed=3, caption_dropout=0.3, threads=0)
    assert found == _take(_stream(config, sources=[Source(Numbered(48))], **kwargs), 6)


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 0), (1, 3), (3, 0), (3, 1), (8, 5)])
def test_a_position_goes_on_with_any_number_of_threads_and_batches_ahead(threads, prefetch):
    whole = _take(_stream(PipelineConfig(12, seed=3)), 9)
    iterator = _stream(PipelineConfig(12, seed=3, threads=threads, prefetch=prefetch))
    first = _take(iterator, 4)
    again = _stream(PipelineConfig(12, seed=3))
    again.set_state(iterator.get_state())
    np.testing.assert_array_equal([*first, *_take(again, 5)], whole)


def test_global_batch_is_the_same_for_any_number_of_hosts():
    def draws(samples):
        return [(sample.prompt, number) for sample, number in samples]

    config = PipelineConfig(12, seed=3, caption_dropout=0.3)
    kwargs = {"collate": draws, "format": lambda sample, rng: (sample, rng.random())}
    whole = _take(_stream(config, **kwargs), 6)
    hosts = [_take(_stream(config, **kwargs, process_index=i, process_count=3), 6) for i in range(3)]
    for step, batch in enumerate(whole):
        assert [len(host[step]) for host in hosts] == [4, 4, 4]
        assert _all(host[step] for host in hosts) == batch
    with pytest.raises(UserError, match="12 does not divide over 5 hosts"):
        _stream(config, process_count=5)


def test_captions_are_dropped_independently_at_the_given_rate():
    def empty(samples):
        return [(sample.prompt == "", int(sample.image[0, 0, 0])) for sample in samples]

    pairs = _all(_take(_stream(PipelineConfig(100, caption_dropout=0.25), empty), 40))
    assert np.mean([dropped for dropped, _ in pairs]) == pytest.approx(0.25, abs=0.03)
    for number in range(5):
        assert {dropped for dropped, n in pairs if n == number} == {True, False}
    kept = _all(_take(_stream(PipelineConfig(100, caption_dropout=0.0), empty), 2))
    assert not any(dropped for dropped, _ in kept)


def test_sources_are_mixed_by_weight():
    sources = [Source(Numbered(50, "a"), 3), Source(Numbered(7, "b"), 1), Source(Numbered(5, "c"), 0)]
    config = PipelineConfig(40, caption_dropout=0.0)
    names = _all(_take(_stream(config, lambda samples: [s.prompt[0] for s in samples], sources), 10))
    assert names.count("a") == 300 and names.count("b") == 100
    with pytest.raises(UserError, match="no data source has a weight"):
        _stream(config, sources=[Source(Numbered(5), 0)])
    with pytest.raises(UserError, match="is empty"):
        _stream(config, sources=[Source(Numbered(0))])
    with pytest.raises(UserError, match="must not be negative"):
        _stream(config, sources=[Source(Numbered(5), -1)])


def _prompts(samples):
    return np.asarray([[len(sample.prompt), sample.image[0, 0, 0]] for sample in samples])


def test_resuming_with_orbax_gives_the_next_batches(tmp_path):
    sources = (Source(Numbered(50), 2), Source(Numbered(20, "other"), 1))
    config = PipelineConfig(8, seed=5, caption_dropout=0.3)
    uninterrupted = _take(_stream(config, _prompts, sources), 12)
    iterator = _stream(config, _prompts, sources)
    _take(iterator, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = {"w": jnp.arange(3.0, dtype=jnp.float32)}
        save = grain.checkpoint.CheckpointSave(iterator)
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=save))
        manager.wait_until_finished()
        restored = grain.checkpoint.CheckpointRestore(_stream(config, _prompts, sources))
        resumed = manager.restore(7, args=ocp.args.Composite(data=restored))["data"]
    np.testing.assert_array_equal(_take(resumed, 5), uninterrupted[7:])


@pytest.mark.miniature
def test_batches_of_scenes_are_uint8_videos_of_one_frame(folder):
    for in_memory in (False, True):
        records = Records(folder, in_memory=in_memory)
        batch = next(_stream(PipelineConfig(8), stack_pixels, [Source(records)]))
        assert batch.shape == (8, 1, 60, 60, 3) and batch.dtype == np.uint8
    with pytest.raises(ValueError, match="differ in size"):
        stack_pixels([Sample("", np.zeros((1, 4, 4, 3), np.uint8)), Sample("", np.zeros((1, 5, 4, 3), np.uint8))])


@pytest.mark.parametrize("changes", [{"batch": 0}, {"caption_dropout": 1.5}, {"threads": -1}, {"prefetch": -1}])
def test_impossible_pipelines_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        PipelineConfig(**{"batch": 4, **changes})
