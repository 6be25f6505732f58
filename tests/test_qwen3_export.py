"""An export with Qwen3-VL in PyTorch against ``metacanvas edit`` on the same run: the same noise, the same pixels."""

import dataclasses

import export_support
import pytest
from qwen3_support import LANGUAGE, MEDIA, TINY, VISION, build
from qwen_support import tokenizer

from configs import base
from metacanvas_jax.config import schema
from metacanvas_jax.data.tokenizer import save_tokenizer
from metacanvas_jax.exchange.export_run import Options, export_run
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.paint import runs
from metacanvas_jax.tasks import Bucket

pytestmark = pytest.mark.torch
pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("av", reason="needs the [media] extra")

from test_export_parity import Case, compare, media, quick  # noqa: E402, F401
from torch_support import randomize  # noqa: E402


def test_qwen3_export_paints_what_the_command_line_paints(media, tmp_path, monkeypatch):  # noqa: F811
    """An edited video with two keyframes: time-stamped blocks, deep features, adapters and canvas in PyTorch."""
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    randomize(build(TINY)).save_pretrained(tmp_path / "qwen3")
    save_tokenizer(tokenizer(), tmp_path / "tokenizer")
    buckets = base.buckets(Bucket("video_editing", (36, 24), frames=9, fps=6.0, length=96))
    config = export_support.config(tmp_path, "wan", buckets=buckets)
    language = dataclasses.replace(LANGUAGE, lora=LoraConfig(rank=3, alpha=1.5))
    weights, words = str(tmp_path / "qwen3"), str(tmp_path / "tokenizer")
    section = schema.MllmSection(language, VISION, weights, words, (96,), system=None, kind="qwen3_vl")
    with config.ignore_type():
        config.mllm = base.section(section, image_tokens=4)
    config.vae_weights = str(export_support.save_patch_pca(tmp_path / "pca"))
    config.dit_weights = str(export_support.save_transformer("wan", tmp_path / "transformer"))
    export_support.save_run(tmp_path / "run", config, export_support.trained_leaves(config))
    export_run(tmp_path / "run", tmp_path / "out", Options(progress=False))
    pair = runs.load(tmp_path / "run"), MetaCanvasPipeline.from_pretrained(tmp_path / "out")
    assert pair[1].index["mllm"]["kind"] == "qwen3_vl" and pair[1].index["prompt"]["media"]["timestamps"]
    assert tuple(pair[1].index["prompt"]["media"]["mean"]) == MEDIA.mean
    compare(Case("wan", "video"), lambda backbone: pair, media, monkeypatch)
