"""What tells frozen weights from others: every tensor, wherever they lie; and records of version 0.1."""

import shutil

import export_support as support
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from metacanvas_jax import files
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange.export_run import export_run
from metacanvas_jax.paint import runs
from metacanvas_jax.tasks import Bucket
from metacanvas_jax.train.agreement import check_same
from metacanvas_jax.train.store import describe
from metacanvas_jax.weights import identity, saved
from metacanvas_jax.weights.hashes import content_hash, whole_hash
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.sources import Source

COUNT = 100


class Network:
    subfolder = "transformer"


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return {f"layer{i}/w": rng.normal(size=(3, 5)).astype(np.float32) for i in range(COUNT)} | {
        "large": rng.normal(size=(1 << 15,)).astype(np.float32)
    }


@pytest.fixture
def published(tmp_path):
    """Weights in two shards, as transformers publishes them."""
    return publish(tmp_path / "published", tensors())


def publish(folder, values):
    folder.mkdir()
    save_file(values, folder / "model.safetensors")
    return folder


@pytest.fixture
def ours(tmp_path):
    saved.save(tmp_path / "ours", tensors(), {})
    return tmp_path / "ours"


def of(folder):
    return Source("mllm.weights", folder, Network(), None)


def change(file, name, index=0, value=0.0):
    values = load_file(file)
    values[name] = values[name].copy()
    values[name].reshape(-1)[index] = value
    save_file(values, file)


@pytest.mark.parametrize("name", [f"layer{i}/w" for i in (0, 1, 37, 98, 99)] + ["large"])
def test_a_changed_value_of_any_tensor_is_other_weights(published, ours, name):
    before = of(published).identity(), of(ours).identity()
    assert identity.differing({"mllm": before[0]}, {"mllm": of(published).identity()}, {}) == []
    change(published / "model.safetensors", name)
    assert identity.differing({"mllm": before[0]}, {"mllm": of(published).identity()}, {}) == ["mllm"]
    change(ours / "params.safetensors", name)
    for reading in (of(ours).identity, of(ours).sampled, lambda: of(ours).load({})):
        with pytest.raises(UserError, match=r"params\.safetensors \(mllm\.weights\) is damaged"):
            reading()


def test_what_no_sample_touches_is_found_by_reading_whole(published, ours):
    whole, sampled = of(published).identity(whole=True), of(published).identity()
    of(ours).identity(whole=True)
    at = (1 << 15) // 6  # between the first two places of the large tensor
    change(published / "model.safetensors", "large", at)
    change(ours / "params.safetensors", "large", at)
    assert identity.same(sampled, of(published).identity())
    assert identity.same(whole, of(published).identity())
    assert not identity.same(whole, of(published).identity(whole=True))
    of(ours).identity()
    with pytest.raises(UserError, match="is damaged"):
        of(ours).identity(whole=True)


def test_weights_may_move_be_renamed_and_be_cut_into_other_files(published, tmp_path):
    before = of(published).identity()
    shutil.copytree(published, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model.safetensors").rename(tmp_path / "elsewhere" / "other.safetensors")
    assert identity.same(before, of(tmp_path / "elsewhere").identity())


class Autoencoder:
    subfolder = "vae"


@pytest.fixture
def pipeline(tmp_path):
    """A DiT and an autoencoder in one folder, as diffusers publishes them."""
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    publish(folder / "transformer", tensors(1))
    publish(folder / "vae", tensors(2))
    return folder


def described(folder):
    """What a checkpoint says of a run whose DiT and autoencoder are in one folder."""
    named = {"dit": ("dit_weights", Network()), "vae": ("vae_weights", Autoencoder())}
    sources = {part: Source(key, files.folder(folder), network, None) for part, (key, network) in named.items()}
    frozen = {part: source.identity() for part, source in sources.items()}
    return describe({}, frozen, {part: str(source.folder) for part, source in sources.items()})


def test_parts_of_one_folder_keep_their_identities_and_may_move_together(pipeline, tmp_path):
    before = described(pipeline)
    assert before["frozen"]["dit"] != before["frozen"]["vae"]
    shutil.move(pipeline, tmp_path / "renamed")
    check_same(before, described(tmp_path / "renamed"), "run")


def test_parts_of_one_folder_keep_their_identities_in_a_bucket(pipeline, bucket):
    for name in files.listing(pipeline, deep=True):
        files.upload(pipeline / name, f"{bucket.url}/pipeline/{name}")
    check_same(described(pipeline), described(f"{bucket.url}/pipeline"), "run")
    check_same(described(f"{bucket.url}/pipeline"), described(pipeline), "run")


@pytest.mark.parametrize(("subfolder", "part"), [("transformer", "dit"), ("vae", "vae")])
def test_other_weights_in_the_same_folder_are_refused_by_the_name_of_their_part(pipeline, subfolder, part):
    before = described(pipeline)
    change(pipeline / subfolder / "model.safetensors", "layer50/w")
    with pytest.raises(UserError, match=rf"other frozen weights: those of {part} in {pipeline} are not the same"):
        check_same(before, described(pipeline), "run")


def test_parts_that_changed_places_are_refused(pipeline):
    before = described(pipeline)
    (pipeline / "vae").rename(pipeline / "other")
    (pipeline / "transformer").rename(pipeline / "vae")
    (pipeline / "other").rename(pipeline / "transformer")
    with pytest.raises(UserError, match="other frozen weights: those of dit"):
        check_same(before, described(pipeline), "run")


def test_saved_hashes_are_those_of_the_stored_file(ours):
    content = content_hash(load_file(ours / "params.safetensors"))
    assert whole_hash(identity.stored(Checkpoint(ours / "params.safetensors"))) == content
    assert saved.described(ours)["hash"] == content


def test_records_of_version_01_are_accepted_for_the_same_weights_only(published, ours, tmp_path):
    old = {"some/folder": identity.before(Checkpoint(published)), "ours": saved.described(ours)["hash"]}
    now = {"mllm": of(published).identity(), "vae": of(ours).identity()}
    folders = {"mllm": str(published), "vae": str(ours)}
    assert identity.differing(old, now, folders) == identity.missing(old, now) == []
    with_tokenizer = now | {"mllm.tokenizer": identity.record("abc", "", "")}
    assert identity.differing(old, with_tokenizer, folders) == []
    other = now | {"mllm": of(publish(tmp_path / "other", tensors(1))).identity()}
    assert identity.differing(old, other, folders) == ["mllm"]
    assert identity.missing(old, {"mllm": now["mllm"]}) == ["ours"]
    assert identity.differing({}, with_tokenizer, folders) == ["mllm", "vae"]
    # Parts of one folder, such as a pipeline of diffusers, shared one key.
    shared = {"dit": now["vae"], "mllm": now["mllm"]}
    one = {"pipeline": identity.before(Checkpoint(published))}
    assert identity.differing(one, shared, dict.fromkeys(shared, "moved")) == []


def test_a_hash_of_the_whole_stays_with_the_next_checkpoints(published):
    whole, sampled = of(published).identity(whole=True), of(published).identity()
    assert identity.kept({"mllm": whole}, {"mllm": sampled}) == {"mllm": whole}
    assert identity.kept({"x": "ab"}, {"mllm": sampled}) == {"mllm": sampled}
    assert identity.known({"a": whole, "b": "0", "c": "f" * 64}) == {"a": whole, "c": "f" * 64}


def test_a_saved_folder_of_version_01_has_no_sampled_hash_and_loads(ours):
    info = saved.described(ours)
    (ours / "params.json").write_text(f'{{"hash": "{info["hash"]}", "meta": {{}}}}')
    assert saved.load(ours)[1] == {"hash": info["hash"], "meta": {}}
    of(ours).identity(whole=True)
    (ours / "params.json").write_text((ours / "params.json").read_text().replace("hash", "hask"))
    with pytest.raises(UserError, match=r"params\.json is damaged"):
        of(ours).identity()


def test_a_run_is_neither_drawn_with_nor_exported_beside_other_frozen_weights(tmp_path):
    run = support.save_drawing_run(tmp_path, "sana", Bucket("text_to_image", (24, 36), length=64))
    values = load_file(tmp_path / "pca" / "params.safetensors")
    shutil.rmtree(tmp_path / "pca")
    saved.save(tmp_path / "pca", values | {"mean": values["mean"] + 1}, {})
    for use in (runs.load, lambda run: export_run(run, tmp_path / "out", support.QUIET)):
        with pytest.raises(UserError, match=rf"other frozen weights: those of vae in {tmp_path}/pca are not the same"):
            use(run)
    assert not (tmp_path / "out").exists()
