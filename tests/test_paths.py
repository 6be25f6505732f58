"""``config.paths``: one value moves all relative paths of weights, of data or of runs."""

import pytest

from metacanvas_jax.config import load, paths, read
from metacanvas_jax.config.identity import identity
from metacanvas_jax.errors import UserError

GS = ["--config.paths.weights=gs://b/weights", "--config.paths.data=gs://b/data", "--config.paths.runs=gs://b/runs"]


def built(flags, config="configs/video_stage2.py"):
    return read.experiment(load.load_config(config, flags))


def places(setup):
    """Every path that a config names."""
    found = [setup.mllm.weights, setup.mllm.tokenizer, setup.dit_weights, setup.vae_weights, setup.start]
    found += [source.path for source in setup.sources]
    if setup.text is not None:
        found += [setup.text.weights, setup.text.tokenizer]
    return found


def test_one_value_moves_every_path_of_its_kind():
    pytest.importorskip("gcsfs")
    for config in ("configs/video_stage2.py", "configs/t2i_lora.py", "configs/image_editing.py"):
        before, after = built([], config), built(GS, config)
        assert places(after) == [path and f"gs://b/{path}" for path in places(before)]
        assert identity(after) == identity(before), "a run that continues may lie elsewhere"
    assert built(GS).start == "gs://b/runs/video_stage1"
    assert built(GS[:1]).dit_weights.startswith("gs://b/weights/") and built(GS[:1]).sources[0].path == "data/images"


def test_absolute_paths_and_urls_stay_and_other_relative_ones_lie_below():
    own = ["--config.mllm.weights=/disk/qwen", "--config.vae_weights=gs://other/vae", "--config.dit_weights=mine/dit"]
    setup = built([*GS, *own, "--config.mllm.context_cache=contexts"])
    assert (setup.mllm.weights, setup.vae_weights) == ("/disk/qwen", "gs://other/vae")
    assert setup.dit_weights == "gs://b/weights/mine/dit" and setup.mllm.context_cache == "gs://b/data/contexts"
    local = built(["--config.paths.weights=/disk/weights", "--config.start="])
    assert local.mllm.weights.startswith("/disk/weights/Qwen") and local.start == ""
    setup = built([*GS, "--config.eval.data=prompts"])
    assert setup.eval.data == "gs://b/data/prompts"


def test_the_folder_of_a_run_moves_with_the_runs():
    pytest.importorskip("gcsfs")
    config = load.load_config("configs/video_stage2.py", GS)
    assert str(paths.workdir(config, None, "video_stage2")) == "gs://b/runs/video_stage2"
    assert str(paths.workdir(config, "mine", "video_stage2")) == "gs://b/runs/mine"
    assert str(paths.workdir(config, "/disk/run", "x")) == "/disk/run"
    config = load.load_config("configs/video_stage2.py", [])
    assert str(paths.workdir(config, None, "video_stage2")) == "runs/video_stage2"
    assert str(paths.workdir(config, "mine", "x")) == "mine"


def test_a_run_keeps_its_paths_which_may_be_changed_by_hand(tmp_path):
    load.write_config(load.load_config("configs/video_stage2.py", GS), tmp_path)
    file = tmp_path / "config.json"
    assert read.experiment(load.read_config(tmp_path)) == built(GS)
    file.write_text(file.read_text().replace("gs://b/weights", "/disk/weights"))
    assert read.experiment(load.read_config(tmp_path)).dit_weights.startswith("/disk/weights/")
    old = load.read_config(tmp_path).to_dict()
    del old["paths"]
    assert read.experiment(load.ConfigDict(old)).start == "runs/video_stage1", "configs of older runs have none"


def test_a_value_that_is_no_path_is_named():
    values = load.load_config("configs/video_stage2.py", []).to_dict()
    with pytest.raises(UserError, match="paths is 3"):
        read.experiment(load.ConfigDict(values | {"paths": 3}))
    with pytest.raises(UserError, match=r"unknown key paths\.weight; did you mean paths\.weights"):
        read.experiment(load.ConfigDict(values | {"paths": {"weight": "x"}}))
