"""Names and shapes of published checkpoints, at full size and in both key layouts."""

import dataclasses

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from qwen_support import TINY, abstract_params
from safetensors.numpy import save_file

from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig, qwen2_5_vl_3b, qwen2_5_vl_7b
from metacanvas_jax.mllm.qwen2_5_vl.table import table
from metacanvas_jax.nn.lora import LoraConfig
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import count, published_shapes

support = pytest.importorskip("qwen_torch_support")
pytestmark = pytest.mark.torch
SIZES = {"3b": (qwen2_5_vl_3b, 3_754_622_976), "7b": (qwen2_5_vl_7b, 8_292_166_656)}


def in_memory_names(entries):
    """Published name to the name of the module in memory."""
    return {e.names(layer)[0]: e.names(layer)[-1] for e in entries for layer in e.tensors}


@pytest.mark.parametrize("size", SIZES)
def test_qwen_full_size_manifest_is_the_published_one(size):
    make, parameters = SIZES[size]
    config = make()
    with support.torch.device("meta"):
        model = support.build(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    abstract = abstract_params(config)
    shapes = published_shapes(table(config), abstract)
    names = in_memory_names(table(config))
    assert {names[name]: shape for name, shape in shapes.items()} == expected
    assert count(abstract) == parameters


def test_qwen_lora_adds_adapters_of_the_chosen_rank_and_nothing_else():
    bare = flatten_dict(abstract_params(qwen2_5_vl_3b()), sep="/")
    full = flatten_dict(
        abstract_params(qwen2_5_vl_3b(lora=LoraConfig(rank=64, alpha=64.0, targets=("q", "v")))), sep="/"
    )
    added = {path: leaf.shape for path, leaf in full.items() if path not in bare}
    assert {path: full[path].shape for path in bare} == {path: leaf.shape for path, leaf in bare.items()}
    assert added == {
        "language/layers/q_lora/a": (36, 2048, 64),
        "language/layers/q_lora/b": (36, 64, 2048),
        "language/layers/v_lora/a": (36, 2048, 64),
        "language/layers/v_lora/b": (36, 64, 256),
    }


def test_qwen_tied_checkpoint_and_both_key_layouts_hold_the_same_parameters(tmp_path):
    config = MllmConfig(dataclasses.replace(TINY.language, tied=True), TINY.vision)
    model = support.reference_model(tied=True)
    model.save_pretrained(tmp_path / "hub")
    memory = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    (tmp_path / "memory").mkdir()
    save_file(memory, tmp_path / "memory" / "model.safetensors")
    assert any(name.startswith("model.language_model.") for name in memory) and "lm_head.weight" not in memory
    trees = [
        load_params(tmp_path / name, table(config), abstract_params(config), progress=False)
        for name in ("hub", "memory")
    ]
    flat = [flatten_dict(tree, sep="/") for tree in trees]
    assert flat[0].keys() == flat[1].keys() and "language/head/kernel" not in flat[0]
    for path in flat[0]:
        np.testing.assert_array_equal(flat[0][path], flat[1][path])
