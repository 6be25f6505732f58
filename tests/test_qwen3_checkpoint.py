"""Qwen3-VL's published folders: every key of config.json, names and shapes at full size, both key layouts."""

import dataclasses
import json

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from qwen3_support import LANGUAGE, TINY, VISION, build, reference_model
from safetensors.numpy import save_file

from metacanvas_jax import registry
from metacanvas_jax.errors import UserError
from metacanvas_jax.mllm.qwen3_vl.network import MllmConfig, qwen3_vl_2b, qwen3_vl_4b, qwen3_vl_8b
from metacanvas_jax.mllm.qwen3_vl.table import table
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import count, published_shapes

# As transformers 4.57 publishes them.
ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
TEXT_4B = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": ROPE,
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 151936,
}
VISION_4B = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2560,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": TEXT_4B,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": VISION_4B,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}


def sized(text, vision, tied=True):
    values = {"text_config": TEXT_4B | text | {"tie_word_embeddings": tied}, "vision_config": VISION_4B | vision}
    return QWEN3_4B | values | {"tie_word_embeddings": tied}


LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
FILES = {
    "2B": (
        sized(
            {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
            {"out_hidden_size": 2048},
        ),
        qwen3_vl_2b,
        2_127_532_032,
    ),
    "4B": (QWEN3_4B, qwen3_vl_4b, 4_437_815_808),
    "8B": (
        sized({"hidden_size": 4096, "intermediate_size": 12288}, LARGE | {"out_hidden_size": 4096}, tied=False),
        qwen3_vl_8b,
        8_767_123_696,
    ),
}


def read(values, folder):
    (folder / "config.json").write_text(json.dumps(values))
    return registry.published_config(folder, "mllm")


@pytest.mark.parametrize("size", FILES)
def test_qwen3_published_configs_are_the_presets(size, tmp_path):
    values, preset, _ = FILES[size]
    assert read(values, tmp_path) == preset()
    # As transformers 5 writes it: rotary parameters with their base in one object.
    text = {key: value for key, value in values["text_config"].items() if not key.startswith("rope")}
    text["rope_parameters"] = ROPE | {"rope_theta": 5000000}
    assert read(values | {"text_config": text}, tmp_path) == preset()
    name, terms = registry.of(preset()).licence(preset())
    assert (name, terms) == (f"Qwen3-VL-{size}-Instruct", "Apache-2.0")


def test_qwen3_folder_fits_a_config_with_adapters_and_no_other_size(tmp_path):
    read(QWEN3_4B, tmp_path)
    config = qwen3_vl_4b(lora=LoraConfig(rank=4, alpha=4.0), remat="full", dtype="bfloat16")
    registry.check_folder(tmp_path, config, "mllm")
    registry.check_folder(tmp_path, MllmConfig(config.language), "mllm")  # its vision tower may be left out
    with pytest.raises(UserError, match=r"language.width is 2560, the config's mllm.language.width is 2048"):
        registry.check_folder(tmp_path, qwen3_vl_2b(), "mllm")


WRONG = [
    ({"text_config": TEXT_4B | {"attention_bias": True}}, "text_config.attention_bias is True; only False is built"),
    ({"text_config": TEXT_4B | {"hidden_act": "gelu"}}, "text_config.hidden_act is 'gelu'; only 'silu' is built"),
    ({"text_config": TEXT_4B | {"num_experts": 128}}, "text_config.num_experts is 128; this key is not known here"),
    (
        {"text_config": TEXT_4B | {"rope_scaling": ROPE | {"mrope_interleaved": False}}},
        "mrope_interleaved is False; only True or None is built",
    ),
    ({"text_config": TEXT_4B | {"rope_scaling": ROPE | {"rope_type": "yarn"}}}, "rope_type is 'yarn'; only 'default'"),
    ({"vision_config": VISION_4B | {"num_position_embeddings": 2300}}, "is 2300; only a square number is built"),
    ({"vision_config": VISION_4B | {"hidden_act": "silu"}}, "hidden_act is 'silu'; only 'gelu_pytorch_tanh' is"),
    ({"vision_config": VISION_4B | {"window_size": 112}}, "vision_config.window_size is 112; this key is not known"),
    ({"vision_config": VISION_4B | {"deepstack_visual_indexes": [5, 30]}}, "must ascend and lie below depth 24"),
    ({"vision_config": VISION_4B | {"out_hidden_size": 2048}}, "out_width 2048 is not the language width 2560"),
    ({"model_type": "qwen3_vl_moe"}, "the model is qwen3_vl_moe, expected"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_qwen3_values_that_are_not_built_are_refused_by_name(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(QWEN3_4B | change, tmp_path)


def test_qwen3_towers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"deepstack_layers \(2, 0\) must ascend"):
        dataclasses.replace(VISION, deepstack_layers=(2, 0))
    with pytest.raises(ValueError, match="are more than the language model's 1 layers"):
        MllmConfig(dataclasses.replace(LANGUAGE, layers=1), VISION)


@pytest.mark.torch
@pytest.mark.parametrize("size", FILES)
def test_qwen3_full_size_manifest_is_the_published_one(size):
    torch = pytest.importorskip("torch")
    _, make, parameters = FILES[size]
    config = make()
    with torch.device("meta"):
        model = build(config)
    abstract = registry.abstract_params(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert published_shapes(table(config), abstract) == expected
    assert count(abstract) == parameters


@pytest.mark.torch
def test_qwen3_every_key_that_the_reference_writes_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    for size, (values, preset, _) in FILES.items():
        written = transformers.Qwen3VLConfig(**values)
        for diff in (False, True):
            assert read(json.loads(written.to_json_string(use_diff=diff)), tmp_path) == preset(), size


@pytest.mark.torch
def test_qwen3_tied_checkpoint_and_both_key_layouts_hold_the_same_parameters(tmp_path):
    config = MllmConfig(dataclasses.replace(LANGUAGE, tied=True), VISION)
    model = pytest.importorskip("torch") and reference_model(tied=True)
    model.save_pretrained(tmp_path / "saved")
    memory = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    old = {name.replace("language_model.", "").replace("model.visual.", "visual."): x for name, x in memory.items()}
    assert "visual.pos_embed.weight" in old and "model.norm.weight" in old and "lm_head.weight" not in old
    trees = []
    for name, tensors in (("memory", memory), ("old", old), ("saved", None)):
        if tensors is not None:
            (tmp_path / name).mkdir()
            save_file(tensors, tmp_path / name / "model.safetensors")
        read_back = load_params(tmp_path / name, table(config), registry.abstract_params(config), progress=False)
        trees.append(flatten_dict(read_back, sep="/"))
    for tree in trees[1:]:
        assert tree.keys() == trees[0].keys() and "language/head/kernel" not in tree
        for path in tree:
            np.testing.assert_array_equal(tree[path], trees[0][path])


@pytest.mark.torch
def test_qwen3_exported_folder_is_read_by_transformers(tmp_path):
    """Weights and config that are written here, to the bit."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3VLForConditionalGeneration

    from metacanvas_jax.weights.hf_export import save_params

    model = reference_model()
    model.save_pretrained(tmp_path / "theirs")
    params = load_params(tmp_path / "theirs", table(TINY), registry.abstract_params(TINY), progress=False)
    save_params(params, table(TINY), tmp_path / "ours", progress=False)
    written = registry.of(TINY).write(TINY, dict.fromkeys(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), 0) | VIEWS)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    back, about = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    for (name, one), (_, other) in zip(model.named_parameters(), back.named_parameters(), strict=True):
        assert torch.equal(one, other), name


VIEWS = {"<|vision_start|>": 3, "<|vision_end|>": 4, "<|image_pad|>": 5, "<|video_pad|>": 6}
