"""Configs: what is accepted, and the one line that says why something is not."""

import json
import sys

import pytest
from ml_collections import ConfigDict

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.dit.sana.network import SanaConfig
from metacanvas_jax.errors import UserError


@pytest.mark.parametrize("variant", ["canvas", "text", "mllm"])
def test_every_variant_of_the_miniature_becomes_an_experiment(variant):
    built = experiment(load_config(f"configs/miniature.py:{variant}", []))
    assert (built.canvas is not None) == (variant == "canvas")
    assert (built.dit is None) == (variant == "mllm")


def test_overrides_reach_the_dataclasses():
    config = load_config("configs/miniature.py", ["--config.dit.layers=7", "--config.canvas.keyframes=3"])
    built = experiment(config)
    assert isinstance(built.dit, SanaConfig)
    assert built.dit.layers == 7
    assert built.canvas.shape == (3, 4, 4)


def test_a_number_that_is_unset_can_be_set():
    assert experiment(load_config("configs/miniature.py", [])).train.keep_every is None
    config = load_config("configs/miniature.py", ["--config.train.keep_every=5"])
    assert experiment(config).train.keep_every == 5


@pytest.mark.parametrize("overrides", [[], ["--config.train.keep_every=3"]])
def test_config_survives_json(overrides):
    config = load_config("configs/miniature.py", overrides)
    again = ConfigDict(json.loads(config.to_json_best_effort()))
    assert experiment(again) == experiment(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.canvas.update({"rowz": 5}), "unknown key canvas.rowz; did you mean canvas.rows?"),
        (lambda c: c.update({"zzz": 1}), "unknown key zzz; known keys: name"),
        (lambda c: c.dit.update({"kind": "unet"}), "dit.kind is 'unet', expected one of 'sana', 'flux', 'wan'"),
        (lambda c: c.__delattr__("data"), "missing key data"),
        (lambda c: c.__setitem__("canvas", None), "'canvas' and 'canvas_connector' come together"),
        (lambda c: c.__setitem__("vae", None), "needs the section 'vae'"),
        (lambda c: c.__setitem__("objective", "dream"), "objective is 'dream', expected one of 'paint', 'understand'"),
        (lambda c: c.canvas.__setitem__("rows", 0), "canvas: a canvas needs at least one keyframe"),
        (lambda c: c.sampler.__setitem__("method", "ddim"), "sampler.method is 'ddim'"),
        (
            lambda c: c.optimizer.__setitem__("schedule", "step"),
            "optimizer.schedule is 'step', expected one of 'constant'",
        ),
        (lambda c: c.mllm.language.update({"rope_sections": (1, 2)}), "mllm.language.rope_sections has 2 entries"),
        (lambda c: c.train.__setitem__("batch", 2.5), "train.batch is 2.5 (float), expected int"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(change, message):
    config = load_config("configs/miniature.py", [])
    with config.ignore_type():
        change(config)
    with pytest.raises(UserError) as caught:
        experiment(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_files_import_those_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(tmp_path)])
    folder = tmp_path / "configs"
    (folder / "mine").mkdir(parents=True)
    (folder / "beside.py").write_text("WIDTH = 7\n")
    (folder / "mine" / "run.py").write_text(
        "from ml_collections import ConfigDict\nfrom configs import base, beside\n\n\n"
        "def get_config():\n    return ConfigDict({'width': beside.WIDTH, 'data': base.DATA})\n"
    )
    assert load_config(str(folder / "mine" / "run.py"), []).to_dict() == {"width": 7, "data": "data"}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        ("configs/nowhere.py", [], "no config file configs/nowhere.py"),
        ("configs/miniature.py:big", [], "has the variants canvas, text, mllm, not 'big'"),
        ("configs/miniature.py", ["--config.dit.layerz=1"], "layerz"),
        ("configs/miniature.py", ["--config.dit.layers=many"], "layers"),
    ],
)
def test_a_wrong_command_line_is_one_line(spec, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(spec, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
