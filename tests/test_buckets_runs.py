"""Runs, weights and exports in a bucket: what is read there is what the same folders hold on this machine."""

from pathlib import Path

import bucket_support
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from weights_support import TABLE, abstract, assert_params, mesh, published

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.config import load, read
from metacanvas_jax.config.weights import weight_folders
from metacanvas_jax.data.tokenizer import load_tokenizer, save_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.train import parameters, stream
from metacanvas_jax.train.store import Store
from metacanvas_jax.trees import flat, partition
from metacanvas_jax.weights import saved
from metacanvas_jax.weights.hf_export import new_folder, save_params
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.sources import Source
from metacanvas_jax.weights.table import SAME, Entry


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    return bucket_support.golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def stored(bucket_address, golden):
    return bucket_support.stored(bucket_address, golden)


def upload(near: Path, url: str) -> str:
    for name in files.listing(near, deep=True):
        files.upload(near / name, f"{url}/{name}")
    return url


def local_config(golden, run):
    """The config of a golden run with the folders of this machine."""
    config = load.read_config(golden / run)
    config.mllm.weights, config.mllm.tokenizer = str(golden / "qwen"), str(golden / "tokenizer")
    return config


def same_tensors(before, now) -> None:
    """Compares the safetensors below two folders, by file and name."""
    names = [name for name in files.listing(before, deep=True) if name.endswith(".safetensors")]
    assert names and names == [name for name in files.listing(now, deep=True) if name.endswith(".safetensors")]
    for name in names:
        one, other = (Checkpoint(f"{folder}/{name}") for folder in (before, now))
        assert one.tensors.keys() == other.tensors.keys()
        for tensor in one.tensors:
            np.testing.assert_array_equal(one.read(tensor), other.read(tensor), err_msg=f"{name}: {tensor}")


@pytest.mark.parametrize("shards", [1e9, 600])
def test_published_weights_are_read_by_ranges_each_byte_once(bucket, tmp_path, shards):
    save_file(published(), tmp_path / "model.safetensors")
    near = load_params(tmp_path / "model.safetensors", TABLE, abstract(None))
    written = save_params(near, TABLE, f"{bucket.url}/model", max_shard_bytes=shards, progress=False)
    assert (len(written) > 1) is (shards == 600) and all(str(path).startswith(bucket.url) for path in written)
    bucket.forget()
    checkpoint = Checkpoint(f"{bucket.url}/model")
    headers = bucket.read("model")
    assert_params(load_params(checkpoint, TABLE, abstract(None), progress=False), published())
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert bucket.read(".safetensors") - headers + (shards == 600) * bucket.read(".index") == pytest.approx(total, 0.3)


def test_a_device_that_holds_some_rows_fetches_these_alone(bucket, tmp_path):
    rows = np.arange(8 * 4096, dtype=np.float32).reshape(8 * 4, 1024)
    save_file({"w": rows}, tmp_path / "model.safetensors")
    upload(tmp_path, f"{bucket.url}/model")
    checkpoint = Checkpoint(f"{bucket.url}/model")
    bucket.forget()
    np.testing.assert_array_equal(checkpoint.read("w", ((4, 6), (0, 1024))), rows[4:6])
    assert bucket.read("model") == 2 * 1024 * 4
    struct = jax.ShapeDtypeStruct(rows.shape, np.float32, sharding=NamedSharding(mesh(), PartitionSpec("a", "b")))
    bucket.forget()
    params = load_params(Checkpoint(f"{bucket.url}/model"), [Entry("w", "w", SAME)], {"w": struct}, progress=False)
    np.testing.assert_array_equal(params["w"], rows)
    assert rows.nbytes <= sum(count for _, count in bucket.counts()) < rows.nbytes + (1 << 17), "no row twice"


def test_saved_parameters_in_a_bucket_have_the_identity_of_their_copy_here(bucket, tmp_path):
    values = {"a": np.arange(400_000, dtype=np.float32), "b": {"c": np.ones((3, 2), np.float16)}}
    assert saved.save(f"{bucket.url}/far", values, {"x": 1}) == saved.save(tmp_path / "near", values, {"x": 1})
    params, about = saved.load(f"{bucket.url}/far")
    assert about["meta"] == {"x": 1}
    np.testing.assert_array_equal(params["a"], values["a"])
    far, near = (Source("k", files.folder(place), None, None) for place in (f"{bucket.url}/far", tmp_path / "near"))
    assert far.saved and far.identity(whole=True) == near.identity(whole=True)
    bucket.forget()
    far.identity()
    assert bucket.read("params.safetensors") < 200_000, "a sample of the bytes, not all"


def test_a_tokenizer_is_read_from_a_bucket_and_written_to_it(stored, golden, bucket):
    near, far = load_tokenizer(golden / "tokenizer"), load_tokenizer(f"{stored.url}/tokenizer")
    text = "two red cats left of a blue car"
    assert far.encode(text) == near.encode(text) and len(far) == len(near)
    save_tokenizer(far, f"{bucket.url}/again")
    assert load_tokenizer(f"{bucket.url}/again").encode(text) == near.encode(text)
    with pytest.raises(UserError, match=rf"{bucket.url}/none: no tokenizer\.json"):
        load_tokenizer(f"{bucket.url}/none")


def test_a_run_starts_with_what_one_in_a_bucket_trained(stored, golden):
    config = local_config(golden, "sana/run")
    config.start = str(golden / "sana" / "run")
    near = read.experiment(config)
    far = load.read_config(f"{stored.url}/sana/run")
    far.start = f"{stored.url}/sana/run"
    far = read.experiment(far)
    shapes = parameters.param_shapes(near)
    begun, expected = (flat(parameters.start_weights(setup, shapes)) for setup in (far, near))
    assert begun.keys() == expected.keys() and any(path.startswith("canvas") for path in begun)
    for path, value in expected.items():
        np.testing.assert_array_equal(begun[path], value, path)
    assert parameters.identities(far) == parameters.identities(near)
    assert all(source.folder.as_posix().startswith(stored.url) for source in weight_folders(far).values())


def test_an_export_and_an_import_from_a_bucket_into_it(stored, golden, bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--run", f"{stored.url}/sana/run", "--to", f"{bucket.url}/export"]) == 0
    assert capsys.readouterr().out.strip() == f"{bucket.url}/export"
    same_tensors(golden / "sana" / "export", files.folder(f"{bucket.url}/export"))
    assert main(["import", "--from", f"{bucket.url}/export", "--to", f"{bucket.url}/run"]) == 0
    setup = read.experiment(load.read_config(f"{bucket.url}/run"))
    trained = partition(parameters.param_shapes(setup), setup.train.rules)[0]
    back, before = (restored(run, trained) for run in (f"{bucket.url}/run", f"{stored.url}/sana/run"))
    assert back.keys() == before.keys()
    for path, value in before.items():
        np.testing.assert_array_equal(back[path], value, path)
    assert list(tmp_path.iterdir()) == [], "no folder gs: of this machine"


def restored(run, shapes):
    with Store(f"{run}/checkpoints", writable=False) as checkpoints:
        return flat(checkpoints.restore_params(shapes, ema=True))


def test_an_export_asks_a_bucket_a_few_times_not_for_every_parameter(stored, golden, bucket):
    setup = read.experiment(local_config(golden, "sana/run"))
    trained = partition(parameters.param_shapes(setup), setup.train.rules)[0]
    order = list(flat(trained))[::-1]
    expected = restored(f"{stored.url}/sana/run", trained)
    with Store(f"{stored.url}/sana/run/checkpoints", writable=False) as checkpoints:
        leaves = flat(stream.lazy_params(checkpoints, trained, ema=True, order=order))
        bucket.forget()
        for path in order:
            np.testing.assert_array_equal(leaves[path][...], expected[path], path)
    assert len(order) > 100 and len(bucket.counts()) <= 10


def test_a_published_model_is_imported_from_a_bucket_into_it(stored, golden, bucket, capsys):
    assert main(["import", "--from", f"{stored.url}/qwen", "--to", f"{bucket.url}/saved"]) == 0
    assert saved.described(f"{bucket.url}/saved")["meta"]["source"] == f"{stored.url}/qwen"
    config = local_config(golden, "sana/run")
    near = weight_folders(read.experiment(config))["mllm"]
    config.mllm.weights = f"{bucket.url}/saved"
    far = weight_folders(read.experiment(config))["mllm"]
    shapes = parameters.param_shapes(read.experiment(config))["mllm"]
    expected = flat(near.load(shapes, progress=False))
    found = flat(far.load(shapes, progress=False))
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], path)


def test_a_connector_is_read_from_a_state_dict_in_a_bucket(bucket, tmp_path):
    torch = pytest.importorskip("torch")
    from metacanvas_jax.exchange.import_run import read_state_dict

    torch.save({"model": {"module.x": torch.arange(3)}}, tmp_path / "connector.pt")
    files.upload(tmp_path / "connector.pt", f"{bucket.url}/connector.pt")
    np.testing.assert_array_equal(read_state_dict(files.folder(f"{bucket.url}/connector.pt"))["x"], [0, 1, 2])


def test_a_new_folder_in_a_bucket_is_there_when_it_is_complete(bucket):
    place = files.folder(f"{bucket.url}/new")
    with new_folder(place) as draft:
        (draft / "sub").mkdir()
        (draft / "index.json").write_text("{}")
        (draft / "sub" / "large").write_bytes(bytes(range(256)) * (6 << 12))
        assert files.is_local(draft) and files.listing(place, deep=True) == {}
    assert files.listing(place, deep=True) == {"index.json": 2, "sub/large": 6 << 20}
    assert files.read_range(place / "sub" / "large", (5 << 20) + 1, 4) == b"\1\2\3\4"
    with pytest.raises(UserError, match="is not an empty folder"), new_folder(place):
        pass
    for inside in (False, True):
        other = files.folder(f"{bucket.url}/other-{inside}")
        with pytest.raises(KeyError), new_folder(other, inside=inside) as draft:
            files.write(draft / "part", "x")
            raise KeyError("a fault in the middle")
        assert not other.exists()
    with pytest.raises(UserError, match="needs 1e\\+09 GB and the disk has"), new_folder(other, int(1e18)):
        pass


def test_the_file_that_says_a_folder_is_complete_is_uploaded_last(bucket, monkeypatch):
    order, upload = [], files.upload
    monkeypatch.setattr(files, "upload", lambda near, path: (order.append(Path(path).name), upload(near, path)))
    with new_folder(f"{bucket.url}/new") as draft:
        (draft / "a").mkdir()
        for name in ("README.md", "a.json", "a/z.json", "weights"):
            (draft / name).write_text("x")
    assert order == ["z.json", "README.md", "weights", "a.json"]
