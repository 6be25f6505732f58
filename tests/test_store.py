import errno
import json
import re
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.errors import Unreachable, UserError
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import abstract_state, new_state
from metacanvas_jax.train.store import Store, describe
from metacanvas_jax.train.stream import lazy_params
from metacanvas_jax.trees import flat
from metacanvas_jax.weights.hashes import checksums, content_hash, files_hash
from metacanvas_jax.weights.saved import load, save

OPTIMIZER = make_optimizer(OptimizerConfig(1e-3))
META = describe({"model": {"width": 4, "grid": (2, 2)}, "seed": 0}, {"weights/mllm": "abc"})


def params(width=4):
    return {"canvas": {"tokens": jnp.arange(8.0 * width).reshape(8, width)}, "out": {"kernel": jnp.ones((width, 3))}}


def state(step=0, width=4, ema=True):
    fresh = new_state(params(width), OPTIMIZER, ema=ema)
    return fresh.replace(step=jnp.int32(step), params=jax.tree.map(lambda x: x + step, fresh.params))


def abstract(width=4, ema=True, tree=None):
    mesh = make_mesh(MeshConfig())
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    tree = params(width) if tree is None else tree
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if x.shape[0] == 8 else whole), tree
    )
    return abstract_state(shapes, OPTIMIZER, mesh, ema=ema)


def stream():
    return iter(grain.MapDataset.range(50).seed(1).shuffle().batch(4).to_iter_dataset(grain.ReadOptions(num_threads=1)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 to 7, of which the last two and the multiples of three are kept; data at 7 batches."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    batches = stream()
    with Store(folder, keep_last=2, keep_every=3) as store:
        for step in range(1, 8):
            next(batches)
            store.save(state(step), batches, META)
    return folder


def test_keeps_the_newest_and_every_third(saved):
    with Store(saved, writable=False) as store:
        assert store.steps() == [3, 6, 7]


def test_restores_everything_to_its_sharding_and_the_data_to_its_place(saved):
    batches, fresh = stream(), stream()
    with Store(saved, writable=False) as store:
        restored = store.restore(abstract(), batches, META)
    jax.tree.map(np.testing.assert_array_equal, restored, state(7))
    assert restored.params["canvas"]["tokens"].sharding.spec == jax.P("data")
    assert restored.opt_state[1].nu["canvas"]["tokens"].sharding.spec == jax.P("data")
    for _ in range(7):
        next(fresh)
    np.testing.assert_array_equal(next(batches), next(fresh))


def test_an_imported_checkpoint_starts_the_data_at_their_beginning(tmp_path):
    batches, fresh = stream(), stream()
    with Store(tmp_path) as store:
        store.save(state(7), None, META | {"imported": "exports/run"})
        store.wait()
        assert store.restore(abstract(), batches, META).step == 7
    np.testing.assert_array_equal(next(batches), next(fresh))


def test_a_checkpoint_without_the_place_in_its_data_is_an_error(tmp_path):
    with Store(tmp_path) as store:
        store.save(state(7), None, META)
        store.wait()
        with pytest.raises(UserError, match=f"checkpoint {tmp_path}/7 cannot be read"):
            store.restore(abstract(), stream(), META)


def test_restores_an_older_step_and_parameters_alone(saved):
    with Store(saved, writable=False) as store:
        older = store.restore_params(abstract().params, step=3)
        average = store.restore_params(abstract().params, ema=True)
        assert store.meta(3)["config"]["model"] == {"width": 4, "grid": [2, 2]}
    np.testing.assert_array_equal(older["out"]["kernel"], np.full((4, 3), 4.0))
    np.testing.assert_array_equal(average["out"]["kernel"], np.ones((4, 3)))


def older_than_checksums(file, *without):
    """Makes the description of a checkpoint one of before the position in the data had a checksum."""
    meta = json.loads(file.read_text())
    gone = ("sealed", "checksum", "data", *without)
    file.write_text(json.dumps({key: meta[key] for key in meta if key not in gone}))


def test_a_checkpoint_from_before_there_were_checksums_of_positions_loads(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    older_than_checksums(folder / "7" / "meta" / "metadata")
    batches, fresh = stream(), stream()
    with Store(folder, writable=False) as store:
        assert store.restore(abstract(), batches, META).step == 7
    for _ in range(7):
        next(fresh)
    np.testing.assert_array_equal(next(batches), next(fresh))


@pytest.mark.parametrize(
    ("item", "old", "new", "message"),
    [
        ("data", r"\d+(?=\D*$)", lambda match: str(int(match[0]) + 1), "7 is damaged: the position in the data, in"),
        ("meta", '"seed": 0', '"seed": 1', "7/meta is damaged: it is not what was written"),
        ("meta", '"sealed"', '"seale_"', "7/meta is damaged"),
        ("meta", '"checksum"', '"checksun"', "7/meta is damaged"),
        ("meta", '"checksums"', '"checksumz"', "7/meta is damaged"),
        ("meta", '"data"', '"date"', "7/meta is damaged"),
    ],
)
def test_a_changed_character_of_position_or_description_is_noticed(saved, tmp_path, item, old, new, message):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    file = folder / "7" / item / "metadata"
    text = file.read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    file.write_text(changed)
    with Store(folder, writable=False) as store, pytest.raises(UserError, match=message):
        store.restore(abstract(), stream(), META)


@pytest.mark.parametrize("damage", ["no commit", "half written"])
def test_incomplete_checkpoints_are_passed_over(saved, tmp_path, damage):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    if damage == "no commit":
        shutil.copytree(folder / "7", folder / "8.orbax-checkpoint-tmp")
    else:
        shutil.copytree(folder / "7" / "params", folder / "8.orbax-checkpoint-tmp-12" / "params.orbax-checkpoint-tmp")
    with Store(folder, writable=False) as store:
        assert store.steps() == [3, 6, 7]


def test_state_may_be_donated_while_the_write_is_going_on(tmp_path):
    change = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 if x.ndim else x, state), donate_argnums=0)
    big = {"canvas": {"tokens": jnp.arange(2.0**22).reshape(8, -1)}, "out": {"kernel": jnp.ones((4, 3))}}
    current = new_state(big, OPTIMIZER)
    with Store(tmp_path / "checkpoints") as store:
        store.save(current, None, META)
        current = change(current)
        jax.block_until_ready(current)
    with Store(tmp_path / "checkpoints", writable=False) as store:
        restored = store.restore(abstract(tree=big, ema=False), None, META)
    np.testing.assert_array_equal(restored.params["canvas"]["tokens"], big["canvas"]["tokens"])


@pytest.mark.parametrize(
    ("config", "frozen", "message"),
    [
        (
            {"model": {"width": 8, "grid": (2, 2)}, "lr": 1},
            {"weights/mllm": "abc"},
            "is of another config: lr was 'absent', is 1; model.width was 4, is 8; seed was 0, is 'absent'",
        ),
        (
            {"model": {"width": 4, "grid": (2, 2)}, "seed": 0},
            {"weights/mllm": "abd"},
            "7 was trained beside other frozen weights: those of weights/mllm in weights/mllm are not the same",
        ),
    ],
)
def test_checkpoint_of_another_run_is_refused(saved, config, frozen, message):
    with Store(saved, writable=False) as store, pytest.raises(UserError, match=re.escape(message)):
        store.restore(abstract(), stream(), describe(config, frozen))


def test_frozen_weights_may_move(saved):
    moved = describe(META["config"], {"elsewhere/mllm": "abc"})
    with Store(saved, writable=False) as store:
        assert int(store.restore(abstract(), None, moved).step) == 7


def test_positions_that_differ_between_processes_need_the_same_number_of_them(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    older_than_checksums(folder / "7" / "meta" / "metadata")
    file = folder / "7" / "data" / "metadata"
    position = json.loads(file.read_text())["positions"]
    assert len(position) == 1, "one process has one position"
    file.write_text(json.dumps({"positions": position * 4}))
    message = "7: its 4 processes were at different places in the data, which 1 cannot take up; start 4 processes"
    with Store(folder, writable=False) as store, pytest.raises(UserError, match=message):
        store.restore(abstract(), stream(), META)


def test_keeps_the_best_beside_the_newest(tmp_path):
    scores = {1: 0.2, 2: 0.9, 3: None, 4: 0.8, 5: float("nan"), 6: 0.1, 7: None}
    for steps in (range(1, 4), range(4, 8)):  # scores are read back from disk
        with Store(tmp_path / "checkpoints", keep_last=1, keep_best=2) as store:
            for step in steps:
                store.save(state(step), None, META, score=scores[step])
    with Store(tmp_path / "checkpoints", writable=False) as store:
        assert store.steps() == [2, 4, 7]
        assert store.best() == 2
    file = tmp_path / "checkpoints" / "4" / "metrics" / "metrics"
    file.write_text(file.read_text().replace("0.8", "0.95"))
    with Store(tmp_path / "checkpoints", writable=False) as store, pytest.raises(UserError, match=r"4/metrics is dam"):
        store.best()
    with pytest.raises(UserError, match=r"4/metrics is damaged: it holds .*0\.95.*, the score was 0\.8"):
        Store(tmp_path / "checkpoints", keep_best=2)
    older_than_checksums(tmp_path / "checkpoints" / "4" / "meta" / "metadata", "score")
    with Store(tmp_path / "checkpoints", writable=False) as store:
        assert store.best() == 4, "descriptions of version 0.1 hold no score"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (params(6), "7, params: parameter canvas/tokens has shape (8, 4) there, the model's is (8, 6)"),
        (
            {"canvas": params()["canvas"]},
            "7, params: parameter out/kernel (4, 3) of the checkpoint is not in the model",
        ),
        (params() | {"lora": {"a": jnp.ones((2,))}}, "7, params: parameter lora/a (2,) is not in the checkpoint"),
    ],
)
def test_parameters_that_do_not_fit_are_named(saved, tree, message):
    with Store(saved, writable=False) as store, pytest.raises(UserError, match=re.escape(message)):
        store.restore(abstract(tree=tree), None, META)


def test_average_that_was_not_kept_is_an_error(tmp_path):
    with Store(tmp_path / "checkpoints") as store:
        store.save(state(1, ema=False), None, META)
        store.wait()
        with pytest.raises(UserError, match="checkpoints/1 holds no ema"):
            store.restore_params(abstract().params, ema=True)


def test_folder_without_checkpoint_is_named_and_not_created(tmp_path):
    missing = tmp_path / "run" / "checkpoints"
    with pytest.raises(UserError, match=f"no checkpoint: folder {missing} does not exist"):
        Store(missing, writable=False)
    assert not missing.exists()
    with (
        Store(tmp_path, writable=False) as store,
        pytest.raises(UserError, match=f"no complete checkpoint in {tmp_path}"),
    ):
        store.restore(abstract(), None, META)
    with Store(tmp_path, writable=False) as store, pytest.raises(UserError, match="no complete checkpoint"):
        store.meta()


def test_unknown_step_and_damaged_files_are_named(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    with (
        Store(folder, writable=False) as store,
        pytest.raises(UserError, match=r"of step 5 in .*, only of \[3, 6, 7\]"),
    ):
        store.restore_params(abstract().params, step=5)
    for path in (folder / "7" / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with Store(folder, writable=False) as store, pytest.raises(UserError, match="checkpoints/7 cannot be read"):
        store.restore(abstract(), None, META)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("UNAVAILABLE: HTTP response code 503 while writing"), Unreachable),
        (OSError(errno.ETIMEDOUT, "timed out"), Unreachable),
        (OSError(errno.ENOSPC, "no space left"), UserError),
        (ValueError("DATA_LOSS: checksum"), UserError),
    ],
)
def test_storage_that_does_not_answer_is_told_from_bad_storage(saved, monkeypatch, error, kind):
    def fails(*_, **__):
        raise RuntimeError("in Orbax") from error

    with Store(saved, writable=False) as store:
        leaf = next(iter(flat(lazy_params(store, abstract().params)).values()))
        monkeypatch.setattr(store._manager, "restore", fails)
        monkeypatch.setattr(ocp.Checkpointer, "restore", fails)
        with pytest.raises(kind, match="cannot be read: in Orbax"):
            store.meta()
        with pytest.raises(kind, match="/params cannot be read: in Orbax"):
            leaf[...]


def test_flipped_bit_in_the_values_is_noticed(tmp_path):
    noise = jax.random.normal(jax.random.key(0), (8, 4096))
    tree = {"canvas": {"tokens": noise}, "out": {"kernel": jnp.ones((4, 3))}}
    with Store(tmp_path / "checkpoints") as store:
        store.save(new_state(tree, OPTIMIZER), None, META)
    files = [path for path in (tmp_path / "checkpoints" / "0" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with Store(tmp_path / "checkpoints", writable=False) as store:
        for restore in (
            lambda: store.restore(abstract(tree=tree, ema=False), None, META),
            lambda: store.restore_params(abstract(tree=tree).params),
        ):
            with pytest.raises(UserError, match="is damaged: the values of params/canvas/tokens are not those"):
                restore()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_checksum_knows_every_bit_and_place(dtype):
    x = jnp.asarray(np.arange(24).reshape(2, 3, 4) % 5, dtype)
    plain = checksums({"x": x})
    split = jax.device_put(x, jax.NamedSharding(make_mesh(MeshConfig(data=2, fsdp=4)), jax.P("data", None, "fsdp")))
    assert checksums({"x": split}) == plain
    assert checksums({"x": x[::-1]}) != plain
    assert checksums({"x": x.at[1, 2, 3].set(1 - x[1, 2, 3] if dtype != "bool" else ~x[1, 2, 3])}) != plain


def test_saved_parameters_return_unchanged_in_every_dtype(tmp_path):
    tree = {
        "a": {"kernel": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones((3,), jnp.bfloat16) / 3},
        "index": jnp.int32(4),
    }
    digest = save(tmp_path / "mllm", tree, {"steps": 5})
    loaded, info = load(tmp_path / "mllm", tree)
    assert info == {"hash": digest, "meta": {"steps": 5}}
    assert digest == content_hash(tree) == content_hash(loaded)
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.device_get(tree))
    assert loaded["a"]["half"].dtype == jnp.bfloat16


def test_hash_knows_names_shapes_and_bits():
    base = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": base["a"]},
        {"a": base["a"].reshape(3, 2)},
        {"a": base["a"].astype(np.int32)},
        {"a": np.copysign(base["a"], -1).astype(np.float32)},
    ]
    assert len({content_hash(tree) for tree in [base, *others]}) == 5
    assert content_hash({"x": {"b": base["a"], "a": base["a"]}}) == content_hash(
        {"x": {"a": base["a"], "b": base["a"]}}
    )


def test_damaged_or_missing_saved_parameters_are_named(tmp_path):
    with pytest.raises(UserError, match="no saved parameters in"):
        load(tmp_path)
    tree = {"a": np.arange(6, dtype=np.float32)}
    save(tmp_path, tree)
    with pytest.raises(UserError, match=r"parameter a has shape \(6,\) there, the model's is \(7,\)"):
        load(tmp_path, {"a": np.zeros(7)})
    file = tmp_path / "params.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="are damaged: their hash is not the one"):
        load(tmp_path)
    file.write_bytes(data[:10])
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def test_hash_of_published_files(tmp_path):
    with pytest.raises(UserError, match="no safetensors file in"):
        files_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = files_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert files_hash(tmp_path) != first
