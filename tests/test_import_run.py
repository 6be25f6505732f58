"""Runs made from exports, from the parameters of other runs and from state dicts of connectors."""

import os
import pickle

import numpy as np
import pytest

from metacanvas_jax.config import read
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange.import_run import import_run, read_exported
from metacanvas_jax.train import store
from metacanvas_jax.train.checkpoints import check_workdir
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.train.parameters import param_shapes, start_weights
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.weights import hf_import

pytest_plugins = "exported_support"
pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("peft", reason="needs the [torch] extra")


@pytest.mark.parametrize("backbone", ["sana", "flux", "wan", "qwen_image", "flux2"])
def test_import_of_an_exported_run_is_bit_exact(exported, backbone):
    config, leaves, _, folder, _ = exported(backbone)
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    back = flat(read_exported(folder, setup, trainable))
    assert back.keys() == leaves.keys()
    for path, value in leaves.items():
        assert np.asarray(back[path]).tobytes() == value.tobytes(), path


def test_an_imported_export_is_a_run_with_the_same_parameters(exported, tmp_path, monkeypatch):
    config, leaves, _, folder, _ = exported("sana")
    import_run(folder, tmp_path / "run")
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    with store.Store(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.steps() == [7]
        for ema in (False, True):
            back = flat(checkpoints.restore_params(trainable, ema=ema))
            for path, value in leaves.items():
                assert np.asarray(back[path]).tobytes() == value.tobytes(), path
    check_workdir(make_job(setup), fit_config(setup), tmp_path / "run")  # training would go on from it
    monkeypatch.setattr("metacanvas_jax.exchange.import_run.read_exported", None)  # the place comes before the reading
    with pytest.raises(UserError, match="not an empty folder; nothing was written"):
        import_run(folder, tmp_path / "run")


def test_a_run_starts_with_what_another_trained(exported):
    config, leaves, run, _, _ = exported("sana")
    config = config.copy_and_resolve_references()
    config.start = str(run)
    setup = read.experiment(config)
    begun = flat(start_weights(setup, param_shapes(setup)))
    for path, value in leaves.items():
        assert np.asarray(begun[path]).tobytes() == value.tobytes(), path
    config.canvas.rows += 1
    setup = read.experiment(config)
    with pytest.raises(UserError, match=rf"{run}, the config's 'start': canvas/\S+ has shape \(1, .*\) there and"):
        start_weights(setup, param_shapes(setup))


def test_weights_are_read_once_and_only_those_that_a_run_needs(exported, monkeypatch):
    config, leaves, run, _, base = exported("flux")
    config = config.copy_and_resolve_references()
    config.start, config.dit_weights = str(run), str(base)
    setup = read.experiment(config)
    seen = []
    restore, load = store.Store.restore_params, hf_import.load_params

    def counted_restore(self, abstract, *, only, **options):
        seen.extend(only)
        return restore(self, abstract, only=only, **options)

    def counted_load(source, table, abstract, **options):
        part = "dit" if source == base else "mllm"
        seen.extend(f"{part}/{entry.path}" for entry in table)
        return load(source, table, abstract, **options)

    monkeypatch.setattr(store.Store, "restore_params", counted_restore)
    monkeypatch.setattr(hf_import, "load_params", counted_load)
    parts = {part: tree for part, tree in param_shapes(setup).items() if part in ("mllm", "dit")}
    frozen = flat(partition(param_shapes(setup), setup.train.rules)[1])
    begun = flat(start_weights(setup, param_shapes(setup)))
    assert len(seen) == len(set(seen)), "nothing is read twice"
    assert {path.partition("/")[0] for path in begun.keys() - leaves.keys()} == set(parts)
    seen.clear()
    continued = flat(start_weights(setup, nested(frozen)))  # the rest comes from the run's own checkpoint
    unpublished = {path for path in frozen if path.startswith("vae/")}
    assert set(continued) == frozen.keys() - unpublished
    assert len(seen) == len(continued)
    for path, value in continued.items():
        np.testing.assert_array_equal(value, begun[path], path)


def test_state_dicts_of_a_connector_are_read_and_pickles_are_not(exported, tmp_path):
    from safetensors.torch import load_file

    from metacanvas_jax.exchange.import_run import read_connector

    config, leaves, _, folder, _ = exported("wan")
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    state = load_file(folder / "connector" / "model.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "connector.pt")
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for source in (tmp_path / "connector.pt", tmp_path / "dcp"):
        back = flat(read_connector(source, setup, trainable))
        assert back.keys() == {path for path in leaves if not path.startswith(("mllm/", "dit/blocks"))}
        for path, value in back.items():
            assert np.asarray(value).tobytes() == leaves[path].tobytes(), path

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"canvas.tokens": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="only tensors are read"):
        read_connector(tmp_path / "bomb.pt", setup, trainable)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="more than the places of tensors"):
        read_connector(tmp_path / "dcp", setup, trainable)
    assert not (tmp_path / "exploded").exists()
    state["canvas.tokens"] = state["canvas.tokens"][:1]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"canvas\.tokens has shape \[1, 2, 3, 32\], expected \[2, 2, 3, 32\]"):
        read_connector(tmp_path / "short.pt", setup, trainable)
