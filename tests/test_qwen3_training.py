"""MetaCanvas with Qwen3-VL: a training step in miniature, and the canvas after the context."""

import dataclasses

import export_support
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments_support import FAST, miniature, shapes_of_a_step
from qwen3_support import LANGUAGE, VISION, medium, prompter
from test_configs import takes_a_step

from configs import base
from metacanvas_jax import registry
from metacanvas_jax.config import read, schema
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.canvas import CanvasConfig, canvas_positions
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig, Qwen3VL
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.trees import flat, nested

CANVAS = CanvasConfig(keyframes=2, rows=2, columns=3)
WITH_LORA = MllmConfig(dataclasses.replace(LANGUAGE, lora=LoraConfig(rank=3, alpha=1.5)), VISION)


def random_params(config):
    leaves = export_support.random_leaves(registry.abstract_params(config))
    return nested({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def test_qwen3_canvas_written_after_encode_equals_the_joint_pass():
    """The adapters act on the canvas only, and the features of media are added to the context only."""
    params = random_params(WITH_LORA)
    prompts = [prompter()(["A red cat"]), prompter()([medium((2, 4, 4), video=True), "so"])]
    inputs = jax.tree.map(jnp.asarray, prompter().batch(prompts, length=64))
    canvas = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, LANGUAGE.width)), jnp.float32)

    def both(module, inputs, canvas):
        context = module.encode(inputs)
        positions = canvas_positions(context.next_position, CANVAS.shape, CANVAS, frames_apart=module.frames_apart)
        return (context.hidden, module.write(canvas, positions, context)), module.joint(inputs, canvas, positions)

    run = jax.jit(lambda params: Qwen3VL(WITH_LORA).apply({"params": params}, inputs, canvas, method=both))
    (read, written), (expected_read, expected) = run.lower(params).compile(compiler_options=FAST)(params)
    real = np.asarray(inputs.mask)
    for got, wanted in ((read[real], expected_read[real]), (written, expected)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    still = {path: leaf if "_lora/" not in path else 0 * leaf for path, leaf in flat(params).items()}
    (same, _), (_, other) = run(nested(still))
    np.testing.assert_allclose(same[real], read[real], rtol=0, atol=1e-5 * np.abs(read).max())
    assert np.abs(other - written).max() > 0.01 * np.abs(written).max()


def test_qwen3_plans_for_sana_and_takes_a_training_step():
    setup = miniature("t2i_lora", "qwen3_vl_4b")
    assert setup.mllm.kind == "qwen3_vl" and setup.mllm.system is None
    takes_a_step(setup, setup.shapes[0])


def test_qwen3_reads_the_videos_of_a_training_step():
    config = load_config("configs/video_stage3.py:miniature", [])
    record = registry.family("mllm")["qwen3_vl"]
    section = schema.MllmSection(**record.tiny, tokenizer=config.mllm.tokenizer, buckets=(160,), kind="qwen3_vl")
    with config.ignore_type():
        config.mllm = base.section(section, system=None, image_tokens=9)
        config.train.rules = (("(mllm|vae)/.*", "freeze"), (".*", "train"))
    config.canvas.spacing = CanvasConfig.spacing
    setup = dataclasses.replace(read.experiment(config), vae_weights="")
    (bucket,) = (b for b in setup.shapes if b.task == "video_editing")
    _, _, metrics = shapes_of_a_step(setup, bucket)
    assert metrics["loss"].shape == ()
    config.canvas.spacing = 5.0
    with pytest.raises(UserError, match=r"canvas.spacing has no effect: each keyframe is a block of its own"):
        read.experiment(config)
