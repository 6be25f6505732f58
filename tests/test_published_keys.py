"""Every key of a published config.json is read, refused by name, or known to change nothing; also of schedulers."""

import dataclasses
import inspect
import json
import math

import pytest
from test_import_published import FULL_SIZE, QWEN_7B

from metacanvas_jax import registry
from metacanvas_jax.diffusion.schedules import DynamicShift
from metacanvas_jax.dit.flux2.network import flux2_klein_4b
from metacanvas_jax.dit.qwen_image.network import qwen_image, qwen_image_edit_2511
from metacanvas_jax.errors import UserError
from metacanvas_jax.text.qwen3.network import qwen3_4b
from metacanvas_jax.vae.flux2.network import FLUX2_VAE
from metacanvas_jax.vae.wan.network import WAN21_VAE
from metacanvas_jax.weights.record import Sampling

QWEN = QWEN_7B | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "image_token_id": 151655,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
}
ROPE = QWEN["rope_scaling"]
VISION = QWEN["vision_config"]
GEMMA = {
    "architectures": ["Gemma2Model"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 256000,
}
SOLVER = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
DPM = SOLVER | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "variance_type": None,
}
UNIPC = SOLVER | {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "predict_x0": True,
    "shift_terminal": None,
    "sigma_max": None,
    "sigma_min": None,
    "solver_p": None,
    "solver_type": "bh2",
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}
EULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHEDULERS = {"dpm": DPM, "unipc": UNIPC, "euler": EULER}
IMAGE = {
    "_class_name": "QwenImageTransformer2DModel",
    "_diffusers_version": "0.34.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": False,
    "in_channels": 64,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 768,
}
KLEIN = {
    "_class_name": "Flux2Transformer2DModel",
    "_diffusers_version": "0.37.0.dev0",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
IMAGE_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "attn_scales": [],
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],
    "dropout": 0.0,
    "latents_mean": list(WAN21_VAE.latent_mean),
    "latents_std": list(WAN21_VAE.latent_std),
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "z_dim": 16,
}
KLEIN_VAE = {
    "_class_name": "AutoencoderKLFlux2",
    "act_fn": "silu",
    "batch_norm_eps": 0.0001,
    "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 32,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "patch_size": [2, 2],
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
NEWER = [
    (KLEIN_VAE, FLUX2_VAE),
    (IMAGE, qwen_image()),
    (IMAGE | {"zero_cond_t": True}, qwen_image_edit_2511()),
    (KLEIN, flux2_klein_4b()),
    (IMAGE_VAE, dataclasses.replace(WAN21_VAE, chunk=0)),
    (IMAGE_VAE | {"_class_name": "AutoencoderKLWan"}, dataclasses.replace(WAN21_VAE, chunk=0)),
]
QWEN3_TEXT = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FILES = (
    {
        values["_class_name"]: values
        for values in (*(values for values, _ in FULL_SIZE), IMAGE, KLEIN, IMAGE_VAE, KLEIN_VAE)
    }
    | {"qwen": QWEN, "gemma": GEMMA, "qwen3": QWEN3_TEXT}
    | SCHEDULERS
)


def read(name, values, folder):
    """What the project makes of a published file; None of a value removes its key."""
    if name in SCHEDULERS:
        (folder / "scheduler_config.json").write_text(json.dumps(values))
        return registry.published_sampling(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return registry.published_config(folder)


def resaved(**changes):
    """Qwen's file with the text in an object of its own, and the values of the text left beside it."""
    text = {key: value for key, value in QWEN.items() if key not in ("model_type", "vision_config")}
    return QWEN | {"text_config": text | {"sliding_window": None, "image_token_id": None} | changes}


REFUSED = [  # the file, a key, its value, what is said after the key and the value
    ("qwen", "rope_scaling", ROPE | {"type": "yarn", "factor": 4.0}, "type is 'yarn'; only 'default' or 'mrope' is"),
    ("qwen", "rope_scaling", ROPE | {"rope_type": "linear"}, "rope_scaling.rope_type is 'linear'; only"),
    ("qwen", "rope_scaling", ROPE | {"factor": 2.0}, "rope_scaling.factor is 2.0; this key is not known"),
    ("qwen", "rope_parameters", ROPE | {"rope_theta": 1e4}, "rope_scaling is .*; only None or"),
    ("qwen", "use_sliding_window", True, "use_sliding_window is True; only False or None is built"),
    ("qwen", "layer_types", ["sliding_attention"] * 28, "layer_types is .*only .'full_attention'"),
    ("qwen", "hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu' is built"),
    ("qwen", "head_dim", 64, "head_dim is 64; only 128 or None is built"),
    ("qwen", "attention_bias", True, "attention_bias is True; this key is not known here"),
    ("qwen", "quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}; this key is not known here"),
    ("qwen", "is_decoder", True, "is_decoder is True; only False is built"),
    (
        "qwen",
        "text_config",
        resaved(intermediate_size=999)["text_config"],
        "intermediate_size is 18944; only 999 or None is",
    ),
    ("qwen", "text_config", resaved(hidden_act="relu")["text_config"], "text_config.hidden_act is 'relu'; only"),
    ("qwen", "vision_config", VISION | {"tokens_per_second": 25}, "vision_config.tokens_per_second is 25; only 2 is"),
    ("qwen", "vision_config", VISION | {"hidden_act": "quick_gelu"}, "vision_config.hidden_act is 'quick_gelu'; only"),
    ("qwen", "vision_config", VISION | {"spatial_patch_size": 16}, "vision_config.spatial_patch_size is 16; only 14"),
    ("qwen", "vision_config", VISION | {"rope_parameters": {"rope_theta": 1e5}}, "rope_theta is 100000.0; only"),
    ("qwen", "vision_config", VISION | {"deepstack": [1]}, r"vision_config.deepstack is \[1\]; this key is not known"),
    ("gemma", "layer_types", ["full_attention"] * 26, "layer_types is .*; only .'sliding_attention', 'full"),
    ("gemma", "hidden_activation", "relu", "hidden_activation is 'relu'; only 'gelu_pytorch_tanh' is built"),
    ("gemma", "use_bidirectional_attention", True, "use_bidirectional_attention is True; only False or None"),
    ("gemma", "rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling.type is 'linear'; only 'default'"),
    ("gemma", "rope_parameters", {"rope_theta": 5e4}, "rope_theta is 10000.0; only 50000.0 is built"),
    ("gemma", "attention_bias", True, "attention_bias is True; only False is built"),
    ("gemma", "attn_logit_softcapping", None, "attn_logit_softcapping is None; only a number is built"),
    ("gemma", "sliding_window", None, "sliding_window is None; only a number is built"),
    ("gemma", "per_layer_config", {"0": {}}, "per_layer_config is .*; this key is not known here"),
    ("SanaTransformer2DModel", "cross_attention_head_dim", 56, "cross_attention_head_dim is 56; only 112 is built"),
    ("SanaTransformer2DModel", "qk_norm", "rms_norm", "qk_norm is 'rms_norm'; only None or 'rms_norm_across_heads'"),
    ("FluxTransformer2DModel", "out_channels", 32, "out_channels is 32; only 64 or None is built"),
    ("FluxTransformer2DModel", "mlp_ratio", 3.0, "mlp_ratio is 3.0; this key is not known here"),
    ("WanTransformer3DModel", "in_channels", 96, "in_channels is 96; only 48 is built"),
    ("WanTransformer3DModel", "image_dim", 1280, "image_dim is 1280; only None is built"),
    ("QwenImageTransformer2DModel", "guidance_embeds", True, "guidance_embeds is True; only False is built"),
    ("QwenImageTransformer2DModel", "use_layer3d_rope", True, "use_layer3d_rope is True; only False is built"),
    ("QwenImageTransformer2DModel", "use_additional_t_cond", True, "use_additional_t_cond is True; only False"),
    ("QwenImageTransformer2DModel", "out_channels", 32, "out_channels is 32; only 16 is built"),
    ("QwenImageTransformer2DModel", "axes_dims_rope", [16, 16, 16], "must be even and sum to head_width 128"),
    ("Flux2Transformer2DModel", "guidance_embeds", True, "guidance_embeds is True; only False is built"),
    ("AutoencoderKLFlux2", "patch_size", [1, 1], r"patch_size is \[1, 1\]; only"),
    ("qwen3", "attention_bias", True, "attention_bias is True; only False is built"),
    ("Flux2Transformer2DModel", "mlp_ratio", 2.5, "mlp_ratio is 2.5; only a whole number is built"),
    ("AutoencoderKLQwenImage", "input_channels", 4, "input_channels is 4; only 3 is built"),
    ("AutoencoderKLQwenImage", "attn_scales", [0.5], r"attn_scales is \[0.5\]; only \[\] is built"),
    ("AutoencoderDC", "upsample_block_type", "pixel_shuffle", "upsample_block_type is 'pixel_shuffle'; only 'interp"),
    ("AutoencoderDC", "mix_types", ["a"], "mix_types is .*; this key is not known here"),
    ("AutoencoderKL", "latents_mean", [0.0] * 16, "latents_mean is .*; only None is built"),
    ("AutoencoderKL", "down_block_types", ["AttnDownEncoderBlock2D"] * 4, "down_block_types is .*; only .'DownEnc"),
    ("AutoencoderKLWan", "z_dim", 16, "z_dim is 16; only 48 is built"),
    ("AutoencoderKLWan", "in_channels", 3, "in_channels is 3; only 12 is built"),
    ("AutoencoderKLWan", "patch_size", 4, "patch_size is 4; only 2 is built"),
    ("AutoencoderKLWan", "is_residual", False, "patch_size is 2; only None or 1 is built"),
    ("dpm", "solver_type", "heun", "solver_type is 'heun'; only 'midpoint' is built"),
    ("dpm", "algorithm_type", "sde-dpmsolver++", "algorithm_type is 'sde-dpmsolver..'; only 'dpmsolver..' is built"),
    ("dpm", "euler_at_final", True, "euler_at_final is True; only False"),
    ("dpm", "use_lu_lambdas", True, "use_lu_lambdas is True; only False"),
    ("dpm", "variance_type", "learned", "variance_type is 'learned'; only None"),
    ("unipc", "solver_type", "bh1", "solver_type is 'bh1'; only 'bh2' is built"),
    ("unipc", "disable_corrector", [0], r"disable_corrector is \[0\]; only \[\] is built"),
    ("unipc", "predict_x0", False, "predict_x0 is False; only True"),
    ("unipc", "solver_p", {}, "solver_p is {}; only None"),
    ("unipc", "shift_terminal", 0.1, "shift_terminal is 0.1; only None"),
    ("unipc", "sigma_min", 0.1, "sigma_min is 0.1; only None"),
    ("unipc", "sigma_max", 0.9, "sigma_max is 0.9; only None"),
    *(
        (name, "final_sigmas_type", "sigma_min", "final_sigmas_type is 'sigma_min'; only 'zero'")
        for name in ("dpm", "unipc")
    ),
    *((name, "lower_order_final", False, "lower_order_final is False; only True") for name in ("dpm", "unipc")),
    *((name, "thresholding", True, "thresholding is True; only False") for name in ("dpm", "unipc")),
    *((name, "use_dynamic_shifting", True, "use_dynamic_shifting is True; only False") for name in ("dpm", "unipc")),
    *((name, "solver_order", 3, "solver_order is 3; only 2") for name in ("dpm", "unipc")),
    *((name, "flow_shift", "high", "that can be built") for name in ("dpm", "unipc")),
    ("euler", "use_dynamic_shifting", False, "use_dynamic_shifting is off"),
    ("euler", "invert_sigmas", True, "invert_sigmas is True; only False"),
    ("euler", "stochastic_sampling", True, "stochastic_sampling is True; only False"),
    ("euler", "base_image_seq_len", 4096, "base_tokens 4096 must be below max_tokens 4096"),
    ("euler", "shift_terminal", 2.0, "terminal must be a noise level between 0 and 1"),
    *((name, "time_shift_type", "linear", "time_shift_type is 'linear'; only 'exponential'") for name in SCHEDULERS),
    *((name, "num_train_timesteps", 500, "num_train_timesteps is 500; only 1000 is built") for name in SCHEDULERS),
    *((name, "use_karras_sigmas", True, "use_karras_sigmas is True; only False") for name in SCHEDULERS),
    *((name, "use_exponential_sigmas", True, "use_exponential_sigmas is True; only False") for name in SCHEDULERS),
    *((name, "use_beta_sigmas", True, "use_beta_sigmas is True; only False") for name in SCHEDULERS),
    *((name, "a_new_key", 1, "a_new_key is 1; this key is not known here") for name in FILES),
]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"), REFUSED, ids=[f"{n}-{k}-{v}"[:60] for n, k, v, _ in REFUSED]
)
def test_a_key_that_is_not_built_is_refused_by_name(name, key, value, message, tmp_path):
    with pytest.raises(UserError, match=message) as said:
        read(name, FILES[name] | {key: value}, tmp_path)
    assert str(tmp_path) in str(said.value) and "\n" not in str(said.value)


PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2_5_VLProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "temporal_patch_size": 2,
}


@pytest.mark.parametrize("file", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
        ("patch_size", 16),
        ("merge_size", 4),
        ("resample", 2),
        ("rescale_factor", 1.0),
        ("do_normalize", False),
    ],
)
def test_another_image_processor_is_refused_by_name(file, key, value, tmp_path):
    (tmp_path / file).write_text(json.dumps(PROCESSOR))
    expected = read("qwen", QWEN, tmp_path)
    (tmp_path / file).write_text(json.dumps({"image_mean": PROCESSOR["image_mean"]}))
    assert read("qwen", QWEN, tmp_path) == expected
    (tmp_path / file).write_text(json.dumps(PROCESSOR | {key: value}))
    with pytest.raises(UserError, match=f"{file}: {key} is .*; only .* is built here"):
        read("qwen", QWEN, tmp_path)


ABSENT = [  # keys without which the reference builds something else
    *(("dpm", "use_flow_sigmas"), ("unipc", "prediction_type"), ("euler", "use_dynamic_shifting")),
    *(
        ("AutoencoderKL", "use_quant_conv"),
        ("Flux2Transformer2DModel", "guidance_embeds"),
        ("AutoencoderKLWan", "patch_size"),
        ("AutoencoderDC", "upsample_block_type"),
    ),
]


@pytest.mark.parametrize(("name", "key"), ABSENT)
def test_an_absent_key_has_the_default_of_the_reference(name, key, tmp_path):
    with pytest.raises(UserError, match=key):
        read(name, {other: value for other, value in FILES[name].items() if other != key}, tmp_path)


SAME = [  # other ways to say what is built
    ("qwen", resaved()),
    ("qwen", QWEN | {"rope_scaling": ROPE | {"type": "default", "rope_type": "default"}}),
    ("qwen", QWEN | {"vision_config": VISION | {"spatial_patch_size": 14, "model_type": "qwen2_5_vl"}}),
    ("qwen", QWEN | {"layer_types": ["full_attention"] * 28, "pruned_heads": {}, "top_k": 50, "id2label": {"0": "a"}}),
    ("gemma", GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 13, "sliding_window_size": 4096}),
    ("gemma", GEMMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "_name_or_path": "x"}),
    ("SanaTransformer2DModel", FILES["SanaTransformer2DModel"] | {"out_channels": None, "dropout": 0.1}),
    ("FluxTransformer2DModel", FILES["FluxTransformer2DModel"] | {"out_channels": 64}),
    ("WanTransformer3DModel", FILES["WanTransformer3DModel"] | {"out_channels": None}),
    ("AutoencoderKL", FILES["AutoencoderKL"] | {"force_upcast": False, "sample_size": 512, "latents_std": None}),
    ("AutoencoderKLWan", FILES["AutoencoderKLWan"] | {"scale_factor_spatial": 16}),
    ("dpm", DPM | {"beta_end": 0.1, "timestep_spacing": "trailing", "sample_max_value": 2.0}),
    ("euler", EULER | {"shift": 1.0, "shift_terminal": None}),
    ("euler", EULER | {"shift_terminal": 0}),
]


@pytest.mark.parametrize(("name", "values"), SAME, ids=range(len(SAME)))
def test_other_words_for_what_is_built_are_read_as_the_same(name, values, tmp_path):
    assert read(name, values, tmp_path) == read(name, FILES[name], tmp_path)


@pytest.mark.parametrize(("values", "config"), NEWER, ids=range(len(NEWER)))
def test_a_published_file_makes_the_preset_of_its_network(values, config, tmp_path):
    assert read(values["_class_name"], values, tmp_path) == config


def test_the_published_file_of_a_text_encoder_makes_its_preset(tmp_path):
    assert read("qwen3", QWEN3_TEXT, tmp_path) == qwen3_4b()


def written(name):
    """The values of a file as the reference saves them again, every key that it has spelled out."""
    values = FILES[name]
    if name in ("qwen", "gemma", "qwen3"):
        classes = {"qwen": "Qwen2_5_VLConfig", "gemma": "Gemma2Config", "qwen3": "Qwen3Config"}
        config = getattr(pytest.importorskip("transformers"), classes[name])(**values)
        return [json.loads(config.to_json_string(use_diff=diff)) for diff in (False, True)]
    arguments = inspect.signature(getattr(pytest.importorskip("diffusers"), values["_class_name"])).parameters
    return [{key: argument.default for key, argument in arguments.items()} | values]


@pytest.mark.torch
@pytest.mark.parametrize("name", FILES)
def test_every_key_that_the_reference_writes_is_read(name, tmp_path):
    for values in written(name):
        assert read(name, values, tmp_path) == read(name, FILES[name], tmp_path)


def test_the_growth_of_a_dynamic_shift_is_read_from_the_folder(tmp_path):
    changed = {"base_shift": 0.4, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    assert read("euler", EULER, tmp_path) == Sampling("dynamic", "euler", 1.0, DynamicShift())
    assert read("euler", EULER | changed, tmp_path).dynamic == DynamicShift(0.4, 0.9, 256, 8192, 0.02)
