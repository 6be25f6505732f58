"""Published folders: the config of what they hold, and what is said of folders of something else."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from published_support import (
    DC_AE,
    FLUX,
    GEMMA,
    KL,
    SANA,
    WAN,
    WAN_VAE,
    flux_pipeline,
    sana_pipeline,
    wan_pipeline,
)
from safetensors.numpy import load_file, save_file

from metacanvas_jax import registry
from metacanvas_jax.dit.flux.network import Flux, flux_kontext_dev
from metacanvas_jax.dit.sana.network import sana_1600m
from metacanvas_jax.dit.wan.network import wan2_2_ti2v_5b
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, qwen2_5_vl_3b, qwen2_5_vl_7b
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.types import Given, States
from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32
from metacanvas_jax.vae.kl.network import KL_F8C16, Kl
from metacanvas_jax.vae.wan.network import WAN22_VAE
from metacanvas_jax.weights import published
from metacanvas_jax.weights.record import Sampling

VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
QWEN_3B = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
    "vision_config": VISION | {"out_hidden_size": 2048},
}
QWEN_7B = QWEN_3B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vision_config": VISION | {"out_hidden_size": 3584},
}


def folder_of(values, folder):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("values", "preset"), [(QWEN_3B, qwen2_5_vl_3b), (QWEN_7B, qwen2_5_vl_7b)], ids=["3B", "7B"])
def test_import_reads_the_published_configs_of_qwen(tmp_path, values, preset):
    assert registry.published_config(folder_of(values, tmp_path)) == preset()
    # As transformers 5 saves it again: text and rotary parameters in objects of their own.
    keys = [key for key in values if key not in ("model_type", "vision_config", "tie_word_embeddings")]
    text = {key: values[key] for key in keys if not key.startswith("rope")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    outer = {key: value for key, value in values.items() if key not in keys}
    assert registry.published_config(folder_of(outer | {"text_config": text}, tmp_path)) == preset()


def test_a_config_may_decide_what_no_folder_publishes(tmp_path):
    folder_of(QWEN_3B, tmp_path)
    config = qwen2_5_vl_3b(lora=LoraConfig(rank=4, alpha=4.0), remat="full", dtype="bfloat16")
    registry.check_folder(tmp_path, config, "mllm")
    registry.check_folder(tmp_path, MllmConfig(config.language), "mllm")  # the tower may stay away
    with pytest.raises(UserError, match=r"language.vocab is 151936, the config's mllm.language.vocab is 152064"):
        registry.check_folder(tmp_path, qwen2_5_vl_7b(), "mllm")


ATTENTION = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
SCALES = [[], [], [], [5], [5], [5]]
FULL_SIZE = [
    (
        {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": 32,
            "out_channels": 32,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_layers": 20,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
            "attention_bias": False,
            "sample_size": 16,
            "patch_size": 1,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        sana_1600m(),
    ),
    (
        {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": 64,
            "out_channels": None,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": [16, 56, 56],
        },
        flux_kontext_dev(),
    ),
    (
        {
            "_class_name": "WanTransformer3DModel",
            "patch_size": [1, 2, 2],
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "in_channels": 48,
            "out_channels": 48,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 14336,
            "num_layers": 30,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 1024,
            "pos_embed_seq_len": None,
        },
        wan2_2_ti2v_5b(),
    ),
    (
        {
            "_class_name": "AutoencoderDC",
            "latent_channels": 32,
            "attention_head_dim": 32,
            "encoder_block_types": ATTENTION,
            "decoder_block_types": ATTENTION,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": SCALES,
            "decoder_qkv_multiscales": SCALES,
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.41407,
        },
        DC_AE_F32C32,
    ),
    (
        {
            "_class_name": "AutoencoderKL",
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "norm_num_groups": 32,
            "act_fn": "silu",
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        KL_F8C16,
    ),
    (
        {
            "_class_name": "AutoencoderKLWan",
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "dim_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_scales": [],
            "temperal_downsample": [False, True, True],
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "clip_output": False,
            "latents_mean": list(WAN22_VAE.latent_mean),
            "latents_std": list(WAN22_VAE.latent_std),
        },
        dataclasses.replace(WAN22_VAE, chunk=0),
    ),
]


@pytest.mark.parametrize(("values", "preset"), FULL_SIZE, ids=[values["_class_name"] for values, _ in FULL_SIZE])
def test_import_reads_the_published_configs_of_diffusers(tmp_path, values, preset):
    assert registry.published_config(folder_of(values, tmp_path)) == preset


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Tiny pipelines as diffusers saves them, by name."""
    pytest.importorskip("diffusers")
    folders = {}
    for make in (sana_pipeline, flux_pipeline, wan_pipeline):
        folders[make.__name__] = folder = tmp_path_factory.mktemp(make.__name__)
        make().save_pretrained(folder)
    return folders


PARTS = {
    "sana_pipeline": {"transformer": SANA, "vae": DC_AE, "text_encoder": GEMMA},
    "flux_pipeline": {"transformer": FLUX, "vae": KL},
    "wan_pipeline": {"transformer": WAN, "vae": WAN_VAE},
}
SAMPLING = {
    "sana_pipeline": Sampling("sana_dpm", "dpmpp_2m", 3.0),
    "flux_pipeline": Sampling("dynamic", "euler", 1.0),
    "wan_pipeline": Sampling("wan_unipc", "unipc", 5.0),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", PARTS)
def test_import_reads_what_diffusers_saves(pipelines, name):
    for part, config in PARTS[name].items():
        assert registry.published_config(published.subfolder(pipelines[name], part)) == config
        assert registry.published_config(pipelines[name] / part) == config
    assert registry.published_sampling(pipelines[name]) == SAMPLING[name]


@functools.cache
def abstract(network):
    video = jax.ShapeDtypeStruct((1, 1, network.spatial, network.spatial, 3), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), video))["params"]


def load_kl(folder, config=KL):
    return registry.of(config).load(folder, config, abstract(Kl(config)), "vae", progress=False)


@pytest.mark.torch
def test_import_of_a_published_autoencoder_has_its_weights(pipelines):
    folder = pipelines["flux_pipeline"] / "vae"
    published_bias = load_file(folder / "diffusion_pytorch_model.safetensors")["decoder.conv_out.bias"]
    np.testing.assert_array_equal(load_kl(folder)["decoder"]["conv_out"]["bias"], published_bias)


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def with_nan(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, file)


BAD = {
    "another model": (
        lambda folder: edit_config(folder, _class_name="SanaTransformer2DModel"),
        "the model is SanaTransformer2DModel, expected AutoencoderKL",
    ),
    "another size": (
        lambda folder: edit_config(folder, layers_per_block=2),
        "blocks is 2, the config's vae.blocks is 1",
    ),
    "another variant": (
        lambda folder: edit_config(folder, use_quant_conv=True),
        "use_quant_conv is True; only False is built here",
    ),
    "a size missing": (lambda folder: edit_config(folder, latent_channels=None), "latent_channels is missing"),
    "a size that is no size": (
        lambda folder: edit_config(folder, block_out_channels=["8", "16"]),
        "not a AutoencoderKL that can be built",
    ),
    "a huge size": (
        lambda folder: edit_config(folder, latent_channels=10**6),
        "latent_channels is 1000000, at most 131072 is allowed",
    ),
    "a size beyond any network": (
        lambda folder: edit_config(folder, layers_per_block=10**12),
        "layers_per_block is 1000000000000, at most 16777216 is allowed",
    ),
    "a negative size": (lambda folder: edit_config(folder, latent_channels=-4), "latent_channels -4 must be >= 1"),
    "JSON nested too deep": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "nested too deep"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no such file; expected a model folder"),
    "NaN": (with_nan, "decoder.conv_in.weight holds NaN or infinity"),
}


@pytest.mark.torch
def test_the_page_says_how_to_load_a_network_by_itself(pipelines, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page.split("### A network by itself")[1], re.DOTALL)[:1]
    (tmp_path / "Sana_1600M_512px_diffusers").symlink_to(pipelines["sana_pipeline"])
    monkeypatch.chdir(tmp_path)
    exec(code, found := {})
    assert found["config"] == SANA
    shapes = jax.tree.map(lambda x: x.shape, found["abstract"])
    assert jax.tree.map(lambda x: x.shape, found["params"]) == shapes
    assert found["velocity"].shape == found["arguments"][0].shape and np.isfinite(found["velocity"]).all()


@pytest.mark.torch
@pytest.mark.parametrize("case", BAD)
def test_import_of_a_bad_folder_is_one_line_that_names_it(pipelines, tmp_path, case, monkeypatch):
    folder = tmp_path / "vae"
    shutil.copytree(pipelines["flux_pipeline"] / "vae", folder)
    break_it, message = BAD[case]
    break_it(folder)
    if case != "NaN":  # said before any weight is looked at
        monkeypatch.setattr(published.hf_import, "load_params", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message) as said:
        load_kl(folder)
    assert str(folder) in str(said.value) and "\n" not in str(said.value)


@pytest.mark.torch
def test_a_pipeline_without_a_part_is_named(pipelines, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines["flux_pipeline"], folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="without the subfolder vae; it has scheduler, transformer"):
        published.subfolder(folder, "vae")
    with pytest.raises(UserError, match="no such folder"):
        published.subfolder(tmp_path / "nowhere", "vae")


@pytest.mark.torch
def test_parameters_that_nobody_publishes_are_left_out(pipelines):
    config = dataclasses.replace(FLUX, pooled="learned")
    latents = jax.ShapeDtypeStruct((1, 1, 4, 4, config.latent_channels), jnp.float32)
    time = jax.ShapeDtypeStruct((1,), jnp.float32)
    text = States(jax.ShapeDtypeStruct((1, 2, config.context_width), jnp.float32))
    arguments = (latents, time, text, Given(guidance=time))
    shapes = nn.meta.unbox(jax.eval_shape(Flux(config).init, jax.random.key(0), *arguments))["params"]
    loaded = registry.of(config).load(pipelines["flux_pipeline"] / "transformer", config, shapes, "dit", progress=False)
    assert set(shapes) - set(loaded) == {"pool"}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "the scheduler is PNDMScheduler, expected DPMSolverMultistepScheduler or"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas is False; only True is built here"),
    ],
)
def test_schedulers_of_other_kinds_are_refused(pipelines, tmp_path, changes, message):
    file = tmp_path / "scheduler_config.json"
    values = json.loads((pipelines["wan_pipeline"] / "scheduler" / file.name).read_text())
    file.write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message):
        registry.published_sampling(tmp_path)
