"""Exports of every shipped config: bit-exact there and back in miniature, exact names and shapes at full size."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from metacanvas_jax import registry
from metacanvas_jax.config import read
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange import parts as layout
from metacanvas_jax.exchange.export_run import Options, connector_config, write_weights
from metacanvas_jax.exchange.import_run import read_exported
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.weights import lora
from metacanvas_jax.weights.table import published_shapes

FILES = [path.stem for path in sorted((Path(__file__).parents[1] / "configs").glob("*.py"))]
VARIANTS = {name: getattr(importlib.import_module(f"configs.{name}"), "VARIANTS", ()) for name in FILES}
GATE = {
    "image_editing:canvas",
    "miniature:mllm",
    "t2i_lora:mllm_lora",
    "t2i_scratch:metaquery",
    "video_stage3:keyframes_3",
}
CASES = [
    pytest.param(name, variant, marks=() if f"{name}:{variant}" in GATE else pytest.mark.slow)
    for name, variants in VARIANTS.items()
    for variant in variants
]
FULL = {
    "t2i_lora:mllm_lora": {"connector", "mllm_lora", "transformer_lora"},
    "image_editing:canvas": {"connector", "mllm_lora", "transformer_partial"},
    "video_stage3:keyframes_3": {"connector", "mllm_lora", "transformer"},
}


def experiment(name, variant):
    return read.experiment(importlib.import_module(f"configs.{name}").get_config(variant))


@pytest.mark.parametrize("name, variant", CASES)
def test_export_of_every_config_comes_back_bit_for_bit(name, variant, tmp_path):
    setup = experiment(name, variant if name == "miniature" else f"{variant}.miniature")
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    rng = np.random.default_rng(0)
    leaves = {path: rng.standard_normal(x.shape, np.float32) for path, x in flat(trainable).items()}
    found = layout.parts(setup, list(leaves))
    frozen = {path: np.zeros(x.shape, np.float32) for path, x in flat(param_shapes(setup)).items()}
    for part in found:
        write_weights(tmp_path, part, frozen | leaves, setup, Options(shard_bytes=1e5, progress=False))
    back = flat(read_exported(tmp_path, setup, trainable))
    assert back.keys() == leaves.keys()
    for path, value in leaves.items():
        assert np.asarray(back[path]).tobytes() == value.tobytes(), path


@pytest.mark.torch
@pytest.mark.parametrize("case", FULL)
def test_exported_names_and_shapes_at_full_size_are_those_of_the_torch_networks(case):
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, WanTransformer3DModel
    from qwen_torch_support import build as build_qwen

    from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
    from metacanvas_jax.torch_export.connector import Connector

    setup = experiment(*case.split(":"))
    abstract = param_shapes(setup)
    trainable, _ = partition(abstract, setup.train.rules)
    found = layout.parts(setup, list(flat(trainable)))
    assert {part.folder for part in found} == FULL[case]
    classes = {"sana": SanaTransformer2DModel, "flux": FluxTransformer2DModel, "wan": WanTransformer3DModel}
    network = registry.of(setup.dit)
    with torch.device("meta"):
        transformer = classes[network.name].from_config(network.write(setup.dit))
        connector = Connector(connector_config(setup))
        qwen = build_qwen(MllmConfig(setup.mllm.language, setup.mllm.vision))
    for part in found:
        leaves = flat(abstract)
        shapes = published_shapes(part.table, nested({path: leaves[path] for path in part.paths}))
        if part.folder == "connector":
            assert shapes == {name: tuple(tensor.shape) for name, tensor in connector.state_dict().items()}
        elif part.folder in ("transformer", "transformer_partial"):
            names = {name: tuple(tensor.shape) for name, tensor in transformer.named_parameters()}
            assert shapes == {name: names[name] for name in shapes}
            assert part.folder == "transformer_partial" or shapes.keys() == names.keys()
        else:
            prefix, net = (lora.PEFT, qwen) if part.folder == "mllm_lora" else (lora.DIFFUSERS, transformer)
            check_adapters(shapes, prefix, dict(net.named_parameters()))


def check_adapters(shapes, prefix, weights):
    """Every adapter has two matrices that multiply to the shape of the layer it is for."""
    layers = {name.removeprefix(prefix).partition(".lora_")[0] for name in shapes}
    assert len(shapes) == 2 * len(layers)
    for layer in layers:
        a, b = (shapes[f"{prefix}{layer}.lora_{z}.weight"] for z in "AB")
        assert a[0] == b[1]
        assert (b[0], *a[1:]) == tuple(weights[f"{layer}.weight"].shape), layer


def test_a_trained_parameter_without_a_place_in_an_export_is_named():
    setup = experiment("miniature", "text")
    with pytest.raises(UserError, match="trains vae/basis, and an export has no place for it"):
        layout.parts(setup, ["dit/out/kernel", "vae/basis"])


def test_checksums_on_the_host_are_those_of_the_store():
    from metacanvas_jax.train import store
    from metacanvas_jax.train.stream import checksum

    values = np.random.default_rng(0).standard_normal((3, 5, 7), np.float32)
    for x in (values, values.astype(jax.numpy.bfloat16), (10 * values).astype(np.int32)):
        assert checksum(x) == store.checksums({"x": x})["x"]
