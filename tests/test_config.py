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
    config = load_config("configs/miniature.py", ["--config.dit.layers=7", "--config.canvas.rows=3"])
    built = experiment(config)
    assert isinstance(built.dit, SanaConfig)
    assert built.dit.layers == 7
    assert built.canvas.shape == (1, 3, 4)


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
        (
            lambda c: c.dit.update({"kind": "unet"}),
            "dit.kind is 'unet', expected one of 'sana', 'flux', 'wan', 'qwen_image', 'flux2'",
        ),
        (lambda c: c.__delattr__("data"), "missing key data"),
        (lambda c: c.__setitem__("canvas", None), "'canvas' and 'canvas_connector' come together"),
        (lambda c: c.__setitem__("vae", None), "needs the section 'vae'"),
        (lambda c: c.__setitem__("objective", "dream"), "objective is 'dream', expected one of 'paint', 'understand'"),
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


MINI, T2I = "configs/miniature.py", "configs/t2i_scratch.py:canvas.miniature"
EDIT, VIDEO = "configs/image_editing.py:canvas.miniature", "configs/video_stage3.py:miniature"
NATIVE = "configs/qwen_image_edit.py:canvas.miniature"
TEXT, TEACH = "configs/t2i_scratch.py:text.miniature", "configs/miniature.py:mllm"


def changed(file, change):
    """A config with values by dotted key in place of its own."""
    config = load_config(file, [])
    with config.ignore_type():
        for key, value in change.items():
            config.update_from_flattened_dict({key: value})
    return config


def refused(file, change, message):
    with pytest.raises(UserError) as caught:
        experiment(changed(file, change))
    assert str(caught.value).startswith(f"config: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MINI, {"dit.dtype": "bf16"}, "dit.dtype is 'bf16', expected one of 'float32', 'bfloat16'"),
        (MINI, {"mllm.language.dtype": "float16"}, "mllm.language.dtype is 'float16', expected one of"),
        (T2I, {"text.encoder.dtype": "bf16"}, "text.encoder.dtype is 'bf16', expected one of"),
        (MINI, {"train.frozen_dtype": "int7"}, "train.frozen_dtype is 'int7', expected one of"),
        (MINI, {"dit.remat": "some"}, "dit.remat is 'some', expected one of 'none', 'dots'"),
        (MINI, {"mllm.language.remat": "some"}, "mllm.language.remat is 'some', expected one of"),
        (MINI, {"mllm.vision.remat": "some"}, "mllm.vision.remat is 'some', expected one of"),
        (MINI, {"dit.qk_norm": "rms"}, "dit.qk_norm is 'rms', expected one of 'across_heads'"),
        (EDIT, {"dit.pooled": "clip"}, "dit.pooled is 'clip', expected one of 'given', 'zeros', 'learned'"),
        (MINI, {"canvas_connector.fuse": "late"}, "canvas_connector.fuse is 'late', expected one of"),
        (MINI, {"context_connector.activation": "relu"}, "context_connector.activation is 'relu', expected one"),
        (MINI, {"canvas.dims": 4}, "canvas.dims is 4, expected one of 1, 2, 3"),
        (MINI, {"time.kind": "normal"}, "time.kind is 'normal', expected one of 'uniform', 'logit_normal'"),
        (MINI, {"optimizer.schedule": "step"}, "optimizer.schedule is 'step', expected one of 'constant'"),
        (MINI, {"mllm.kind": "clip"}, "mllm.kind is 'clip', expected one of '"),
        (T2I, {"text.kind": "clip"}, "text.kind is 'clip', expected one of '"),
        (MINI, {"sampler.schedule": "steep"}, "sampler: schedule is 'steep', expected one of 'linear'"),
        (MINI, {"mesh.across_slices": "tensor"}, "mesh.across_slices is 'tensor', expected one of 'data', 'fsdp'"),
        (MINI, {"mesh.whole": ("dit",)}, "mesh.whole[0] is 'dit', expected one of 'mllm', 'vae', 'text'"),
        (
            MINI,
            {"train.rules": ((".*", "thaw"),)},
            "train.rules[0][1] is 'thaw', expected one of 'train', 'freeze'",
        ),
    ],
)
def test_a_word_that_is_none_of_the_choices_is_refused(file, change, message):
    refused(file, change, message)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MINI, {"dit.heads": 0}, "dit.heads is 0, expected at least 1"),
        (MINI, {"dit.layers": 0}, "dit.layers is 0, expected at least 1"),
        (MINI, {"dit.patch": 0}, "dit.patch is 0, expected at least 1"),
        (VIDEO, {"dit.patch": (1, 0, 2)}, "dit.patch[1] is 0, expected at least 1"),
        (MINI, {"mllm.language.heads": 0}, "mllm.language.heads is 0, expected at least 1"),
        (MINI, {"mllm.vision.patch": 0}, "mllm.vision.patch is 0, expected at least 1"),
        (MINI, {"vae.patch": 0}, "vae.patch is 0, expected at least 1"),
        (MINI, {"canvas.rows": 0}, "canvas.rows is 0, expected at least 1"),
        (T2I, {"text.length": 0}, "text.length is 0, expected at least 1"),
        (T2I, {"text.encoder.kv_heads": 0}, "text.encoder.kv_heads is 0, expected at least 1"),
        (MINI, {"seed": -1}, "seed is -1, expected at least 0"),
        (MINI, {"train.batch": True}, "train.batch is True (bool), expected int"),
        (MINI, {"train.accumulate": 0}, "train.accumulate is 0, expected at least 1"),
        (MINI, {"sampler.guidance": float("nan")}, "sampler.guidance is nan, expected a finite number"),
        (MINI, {"sampler.shift": 0.0}, "sampler: the shift of a schedule must be positive"),
        (MINI, {"data.caption_dropout": 1.5}, "data: caption_dropout is 1.5, expected a share between 0 and 1"),
        (MINI, {"data.canvas_dropout": -0.1}, "data: canvas_dropout is -0.1, expected a share between 0 and 1"),
        (MINI, {"mllm.buckets": ()}, "mllm.buckets is empty"),
        (MINI, {"mllm.video_fps": 0.0}, "mllm.video_fps is 0.0, expected a positive number"),
        (MINI, {"dit.mlp_ratio": 0.0}, "dit.mlp_ratio is 0.0, expected a positive number"),
        (MINI, {"mllm.image_pixels": (9, 4)}, "mllm.image_pixels is (9, 4), expected the least and the most pixels"),
        (MINI, {"mllm.video_pixels": (9, 4)}, "mllm.video_pixels is (9, 4), expected the least and the most pixels"),
        (MINI, {"canvas.rows": 1_000_000}, "canvas.rows is 1000000, expected at most 1024"),
        (MINI, {"canvas.rows": 1000, "canvas.columns": 1000}, "canvas: a canvas of 1000000 tokens, at most 65536"),
        (MINI, {"dit.layers": 10**9}, "dit.layers is 1000000000, expected at most 1024"),
        (MINI, {"mllm.language.head_width": 10**6}, "mllm.language.head_width is 1000000, expected at most"),
        (MINI, {"mllm.buckets": (64, 10**9)}, "mllm.buckets[1] is 1000000000, expected at most"),
        (MINI, {"sampler.steps": 10**9}, "sampler.steps is 1000000000, expected at most 10000"),
        (MINI, {"train.steps": 10**12}, "train.steps is 1000000000000, expected at most 2147483647"),
        (MINI, {"seed": 2**32}, "seed is 4294967296, expected at most 4294967295"),
        (MINI, {"hardware": ({"topology": "v9:4x4"},)}, "hardware[0]: topology 'v9:4x4' is no name of a TPU slice"),
    ],
)
def test_a_number_out_of_range_is_refused(file, change, message):
    refused(file, change, message)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (MINI, {"canvas_connector.width": 64}, "canvas_connector.width is 64, but dit.width is 128"),
        (MINI, {"context_connector.out_width": 64}, "context_connector.out_width is 64, but dit.context_width is"),
        (
            T2I,
            {"canvas_connector.fuse": "before_patchify", "canvas_connector.latent_channels": 7},
            "canvas_connector.latent_channels is 7, but dit.latent_channels is 32",
        ),
        (
            MINI,
            {"context_connector.in_width": 64},
            "context_connector.in_width is 64, expected 128, like mllm.lang",
        ),
        (
            MINI,
            {"mllm.vision.out_width": 64},
            "mllm.vision.out_width is 64, expected 128, like mllm.language.width",
        ),
        (
            MINI,
            {"dit.latent_channels": 32},
            "dit.latent_channels is 32, expected 64, like the channels of the auto",
        ),
        (
            NATIVE,
            {"dit.context_width": 32},
            "dit.context_width is 32, expected 64, like mllm.language.width (context_connector.kind is identity)",
        ),
        (T2I, {"text.encoder.width": 32}, "dit.context_width is 64, expected 32, like text.encoder.width"),
        (EDIT, {"dit_guidance": None}, "dit_guidance is None, but this DiT reads a guidance scale"),
        (EDIT, {"dit.guidance": False}, "dit_guidance is 1.0, but this DiT reads no guidance scale"),
        (MINI, {"dit_guidance": 3.5}, "dit_guidance is 3.5, but this DiT reads no guidance scale"),
        (EDIT, {"dit.pooled": "given"}, "dit.pooled is 'given', but no run computes a pooled text vector"),
        (MINI, {"train.rules": ((".*", "train"),)}, "train.rules: '.*' trains mllm/"),
        (
            MINI,
            {"train.rules": (("(mllm|dit)/language.*", "train"), (".*", "freeze"))},
            "train.rules: '(mllm|dit)/",
        ),
        (
            TEXT,
            {"train.rules": (("text/.*|dit/.*", "train"), (".*", "freeze"))},
            "train.rules: 'text/.*|dit/.*' trains",
        ),
        (MINI, {"train.rules": (("(", "train"),)}, "train.rules[0]: '(' is not a regular expression"),
        (MINI, {"optimizer.clip": 0.0}, "optimizer.clip is 0.0, expected a positive norm or None"),
        (MINI, {"optimizer.decay_rule": "["}, "optimizer.decay_rule: '[' is not a regular expression"),
        (MINI, {"train.accumulate": 3}, "train.accumulate 3 does not divide the batch of 40 samples"),
        (TEACH, {"train.accumulate": 2}, "train.accumulate is 2, expected 1 with facts 0.3: this loss"),
        (TEACH, {"train.accumulate": 2, "recall": 4}, "train.accumulate is 2, expected 1 with recall 4: this loss"),
        (T2I, {"sources": ()}, None),
        (
            T2I,
            {"sources": ({"kind": "edits", "task": "image_editing"},)},
            "no source has the task 'text_to_image'",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(file, change, message):
    if message is None:
        experiment(changed(file, change))
    else:
        refused(file, change, message)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (EDIT, {"sampler.shift": 3.0}, "sampler.shift has no effect: this schedule derives its"),
        (EDIT, {"sampler.dynamic.max_shift": 0.9}, "sampler.dynamic has no effect: sampler.schedule is not 'dynamic'"),
        (TEXT, {"mllm.image_label": "Picture {}: "}, "mllm.image_label has no effect: no canvas, queries or context"),
        (NATIVE, {"context_connector.dropout": 0.2}, "context_connector.dropout has no effect: context_connector.kind"),
        (MINI, {"canvas.keyframes": 3}, "canvas.keyframes has no effect: this DiT makes images only"),
        (MINI, {"canvas.dims": 1, "canvas.rope": False}, "canvas.dims has no effect: canvas.rope is False"),
        (TEXT, {"mllm.context_cache": "somewhere"}, "mllm.context_cache has no effect: no canvas, queries or context"),
        (TEXT, {"mllm.language.lora": {"rank": 4, "alpha": 4.0}}, "mllm.language.lora has no effect: adapters act on"),
        (T2I, {"data.picture_weight": 0.5}, "data.picture_weight has no effect: samples come from the sources"),
        (MINI, {"data.pictures_path": "there"}, "data.pictures_path has no effect: data.picture_weight is 0"),
        (MINI, {"canvas_connector.latent_channels": 64}, "canvas_connector.latent_channels has no effect"),
        (MINI, {"context_connector.hidden": 64}, "context_connector.expansion has no effect"),
        (VIDEO, {"time.mean": 1.0}, "time.mean has no effect: time.kind is 'uniform'"),
        (
            T2I,
            {"optimizer.total_steps": 9},
            "optimizer.total_steps has no effect: optimizer.schedule is 'constant'",
        ),
        (T2I, {"optimizer.final_fraction": 0.1}, "optimizer.final_fraction has no effect"),
        (T2I, {"optimizer.warmup_steps": 0}, "optimizer.warmup_from has no effect: there is no warm-up"),
        (
            T2I,
            {"train.keep_best": 1, "train.evaluate_every": 0},
            "train.keep_best has no effect: train.evaluate_every is 0",
        ),
        (MINI, {"recall": 4}, "recall has no effect: it belongs to objective 'understand'"),
        (TEACH, {"mllm.weights": "somewhere"}, "mllm.weights has no effect: objective 'understand' trains the MLLM"),
        (TEACH, {"canvas": {"rows": 1, "columns": 1}}, "canvas has no effect: objective 'understand' trains"),
        (MINI, {"facts": 0.3}, "facts has no effect: it belongs to objective 'understand'"),
        (TEACH, {"recall_within": 24}, "recall_within has no effect: recall is 0"),
        (TEACH, {"data.canvas_dropout": 0.1}, "data.canvas_dropout has no effect: objective 'understand' trains"),
        (TEXT, {"data.canvas_dropout": 0.1}, "data.canvas_dropout has no effect: there is no canvas"),
        (TEXT, {"mllm.vision": None}, "mllm.image_tokens has no effect: no mllm.vision"),
        (
            T2I,
            {"sources": ({"kind": "scenes", "split": "test"},)},
            "sources[0]: split has no effect on a source of",
        ),
        (
            T2I,
            {"sources": ({"kind": "scenes", "cache": "here"},)},
            "sources[0]: cache has no effect on a source of",
        ),
        (
            T2I,
            {"sources": ({"kind": "scenes", "columns": (("prompt", "text"),)},)},
            "sources[0]: columns have no effect on a source of kind 'scenes'",
        ),
    ],
)
def test_a_value_without_an_effect_is_refused(file, change, message):
    refused(file, change, message)


@pytest.mark.parametrize("file", [MINI, "configs/connector_ablation.py:before_patchify", EDIT])
def test_widths_of_connectors_follow_from_the_networks(file):
    config = load_config(file, [])
    built = experiment(config)
    derived = {
        "canvas_connector.width": built.dit.width,
        "context_connector.out_width": built.dit.context_width,
        "canvas_connector.latent_channels": built.dit.latent_channels,
    }
    if built.canvas_connector.fuse == "after_patchify":
        assert built.canvas_connector.latent_channels is None
        del derived["canvas_connector.latent_channels"]
    if built.context_connector is None:
        del derived["context_connector.out_width"]
    for key, size in derived.items():
        section, name = key.split(".")
        assert config[section].get(name) is None
        assert getattr(getattr(built, section), name) == size
    assert experiment(changed(file, derived)) == built  # as older versions wrote them


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", r"get_config\(\) returns NoneType, expected a ConfigDict"),
        ("return {'a': 1}", r"get_config\(\) returns dict, expected a ConfigDict"),
        ("x = 1\n    raise TypeError('a\\nb')", r"bad\.py, line 3: TypeError: a$"),
        ("raise KeyError('width')", r"bad\.py, line 2: KeyError: 'width'"),
        ("raise OSError(2, 'gone')", r"bad\.py, line 2: FileNotFoundError: .*gone"),
        ("raise ValueError", r"bad\.py, line 2: ValueError: ValueError"),
        ("import sys; sys.exit(3)", r"bad\.py, line 2: SystemExit: 3"),
        ("return get_config()", r"bad\.py, line 2: RecursionError"),
        ("x = (", r"bad\.py, line 2: .*never closed"),
    ],
)
def test_a_config_file_that_fails_is_one_line_with_its_place(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config(str(tmp_path / "bad.py"), [])
    assert str(caught.value).startswith(f"{tmp_path}/bad.py") and "\n" not in str(caught.value)


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
        ("configs/miniature.py:big", [], "has the variants canvas, text, base, mllm, not 'big'"),
        ("configs/miniature.py", ["--config.dit.layerz=1"], "layerz"),
        ("configs/miniature.py", ["--config.dit.layers=many"], "layers"),
    ],
)
def test_a_wrong_command_line_is_one_line(spec, overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(spec, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
