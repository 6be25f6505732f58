"""Every weight table: complete at full size, undone exactly, and cut where its network is sharded."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from metacanvas_jax.dit.flux import table as flux
from metacanvas_jax.dit.flux.network import Flux, flux_kontext_dev
from metacanvas_jax.dit.flux2 import table as flux2_table
from metacanvas_jax.dit.flux2.network import Flux2, flux2_klein_4b
from metacanvas_jax.dit.qwen_image import table as qwen_image_table
from metacanvas_jax.dit.qwen_image.network import QwenImage, qwen_image
from metacanvas_jax.dit.sana import table as sana
from metacanvas_jax.dit.sana.network import Sana, sana_1_5_1600m, sana_1600m
from metacanvas_jax.dit.wan import table as wan
from metacanvas_jax.dit.wan.network import Wan, wan2_2_ti2v_5b
from metacanvas_jax.mllm.qwen2_5_vl import table as qwen2_5_vl
from metacanvas_jax.mllm.qwen2_5_vl.network import Qwen25VL, qwen2_5_vl_3b, qwen2_5_vl_7b
from metacanvas_jax.mllm.qwen3_vl import table as qwen3_vl
from metacanvas_jax.mllm.qwen3_vl.network import Qwen3VL, qwen3_vl_4b, qwen3_vl_8b
from metacanvas_jax.mllm.vision_language import example
from metacanvas_jax.parallel.rules import placed, shardings
from metacanvas_jax.text.gemma2 import table as gemma2
from metacanvas_jax.text.gemma2.network import Gemma2, Gemma2Config
from metacanvas_jax.types import Given, States, Text
from metacanvas_jax.vae.dc_ae import table as dc_ae
from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32, DcAe
from metacanvas_jax.vae.flux2 import table as flux2_vae
from metacanvas_jax.vae.flux2.network import FLUX2_VAE, Flux2Vae
from metacanvas_jax.vae.kl import table as kl
from metacanvas_jax.vae.kl.network import KL_F8C16, Kl
from metacanvas_jax.vae.wan import table as wan_vae
from metacanvas_jax.vae.wan.network import WAN21_VAE, WAN22_VAE, WanVae
from metacanvas_jax.weights import hf_import
from metacanvas_jax.weights.hf_export import save_params
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.safetensors_io import Checkpoint
from metacanvas_jax.weights.table import count, published_shapes


@dataclasses.dataclass(frozen=True)
class Case:
    network: Callable[[Any], nn.Module]
    table: Callable[[Any], list]
    inputs: Callable[[Any], tuple]
    config: Any
    parameters: int  # of the published network (reference counts on torch's meta device)
    small: Any  # the same kind of network, in miniature


def dit_inputs(config):
    latents = jax.ShapeDtypeStruct((1, 1, 4, 4, config.latent_channels), jnp.float32)
    text, given = States(jax.ShapeDtypeStruct((1, 3, config.context_width), jnp.float32)), Given()
    if hasattr(config, "pooled_width"):
        pooled = jax.ShapeDtypeStruct((1, config.pooled_width), jnp.float32)
        given = Given(pooled=pooled, guidance=jax.ShapeDtypeStruct((1,), jnp.float32))
    return latents, jax.ShapeDtypeStruct((1,), jnp.float32), text, given


def text_inputs(config):
    return (Text(jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1, 3), jnp.bool_)),)


def vae_inputs(config):
    return (jax.ShapeDtypeStruct((1, 1, config.spatial, config.spatial, 3), jnp.float32),)


def small_qwen(config):
    sizes = {"vocab": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "rope_sections": (2, 1, 1)}
    language = dataclasses.replace(config.language, **sizes)
    sizes = {"depth": 2, "width": 32, "heads": 2, "mlp": 24, "out_width": 32, "full_attention_layers": (1,)}
    return dataclasses.replace(config, language=language, vision=dataclasses.replace(config.vision, **sizes))


def small_qwen3(config):
    sizes = {"vocab": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "rope_sections": (2, 1, 1)}
    language = dataclasses.replace(config.language, **sizes, head_width=8)
    sizes = {"depth": 3, "width": 32, "heads": 2, "mlp": 24, "out_width": 32, "deepstack_layers": (0, 2)}
    vision = dataclasses.replace(config.vision, **sizes, position_side=4)
    return dataclasses.replace(config, language=language, vision=vision)


SMALL_SANA = {"latent_channels": 8, "heads": 4, "head_width": 8, "cross_heads": 2, "layers": 2, "context_width": 24}
SMALL_FLUX = {"latent_channels": 4, "layers_double": 2, "layers_single": 2, "heads": 2, "head_width": 16}
SMALL_FLUX |= {"context_width": 24, "pooled_width": 8, "rope_axes": (4, 6, 6)}
SMALL_FLUX2 = {"latent_channels": 4, "layers_double": 2, "layers_single": 2, "heads": 2, "head_width": 16}
SMALL_FLUX2 |= {"context_width": 24, "rope_axes": (4, 4, 4, 4)}
SMALL_WAN = {
    "latent_channels": 8,
    "heads": 2,
    "head_width": 16,
    "mlp": 48,
    "layers": 2,
    "context_width": 24,
    "freq": 32,
}
SMALL_QWEN_IMAGE = {"latent_channels": 4, "layers": 2, "heads": 2, "head_width": 16, "context_width": 24}
SMALL_QWEN_IMAGE |= {"rope_axes": (4, 6, 6)}
SMALL_GEMMA2 = {"vocab": 64, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 8, "mlp": 48}
SMALL_DC_AE = {"channels": (8, 16, 16), "encoder_blocks": (1, 2, 1), "decoder_blocks": (2, 1, 2), "attention_from": 1}
SMALL_DC_AE |= {"latent_channels": 4, "head_width": 8}
SMALL_WAN_VAE = {"encoder_width": 8, "decoder_width": 16, "multipliers": (1, 2, 2), "blocks": 1}
SMALL_WAN_VAE |= {"halve_time": (False, True)}

CASES = {
    "qwen2.5-vl-3b": Case(
        Qwen25VL, qwen2_5_vl.table, example, qwen2_5_vl_3b(), 3_754_622_976, small_qwen(qwen2_5_vl_3b())
    ),
    "qwen2.5-vl-7b": Case(
        Qwen25VL, qwen2_5_vl.table, example, qwen2_5_vl_7b(), 8_292_166_656, small_qwen(qwen2_5_vl_7b())
    ),
    "qwen3-vl-4b": Case(Qwen3VL, qwen3_vl.table, example, qwen3_vl_4b(), 4_437_815_808, small_qwen3(qwen3_vl_4b())),
    "qwen3-vl-8b": Case(Qwen3VL, qwen3_vl.table, example, qwen3_vl_8b(), 8_767_123_696, small_qwen3(qwen3_vl_8b())),
    "sana-1.6b": Case(Sana, sana.table, dit_inputs, sana_1600m(), 1_604_462_752, sana_1_5_1600m(**SMALL_SANA)),
    "flux-kontext": Case(
        Flux, flux.table, dit_inputs, flux_kontext_dev(), 11_901_408_320, flux_kontext_dev(**SMALL_FLUX)
    ),
    "qwen-image": Case(
        QwenImage, qwen_image_table.table, dit_inputs, qwen_image(), 20_430_401_088, qwen_image(**SMALL_QWEN_IMAGE)
    ),
    "flux2-klein": Case(
        Flux2, flux2_table.table, dit_inputs, flux2_klein_4b(), 3_875_544_576, flux2_klein_4b(**SMALL_FLUX2)
    ),
    "wan2.2-5b": Case(Wan, wan.table, dit_inputs, wan2_2_ti2v_5b(), 4_999_787_712, wan2_2_ti2v_5b(**SMALL_WAN)),
    "gemma2-2b": Case(Gemma2, gemma2.table, text_inputs, Gemma2Config(), 2_614_341_888, Gemma2Config(**SMALL_GEMMA2)),
    "dc-ae": Case(
        DcAe, dc_ae.table, vae_inputs, DC_AE_F32C32, 312_250_275, dataclasses.replace(DC_AE_F32C32, **SMALL_DC_AE)
    ),
    "flux-vae": Case(
        Kl, kl.table, vae_inputs, KL_F8C16, 83_819_683, dataclasses.replace(KL_F8C16, channels=(8, 16), groups=4)
    ),
    "flux2-vae": Case(
        Flux2Vae,
        flux2_vae.table,
        vae_inputs,
        FLUX2_VAE,
        84_046_371,
        dataclasses.replace(FLUX2_VAE, channels=(8, 16), decoder_channels=(16, 8), groups=4),
    ),
    "wan2.2-vae": Case(
        WanVae, wan_vae.table, vae_inputs, WAN22_VAE, 704_688_668, dataclasses.replace(WAN22_VAE, **SMALL_WAN_VAE)
    ),
    "wan2.1-vae": Case(
        WanVae, wan_vae.table, vae_inputs, WAN21_VAE, 126_892_531, dataclasses.replace(WAN21_VAE, **SMALL_WAN_VAE)
    ),
}


def abstract(case, config):
    """Shapes of all parameters, with the shardings that the rules give them on a mesh of 4 x 2 devices."""
    boxed = jax.eval_shape(case.network(config).init, jax.random.key(0), *case.inputs(config))["params"]
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 4, 1, 2), ("data", "fsdp", "context", "tensor"))
    return placed(boxed, shardings(boxed, mesh))


@pytest.fixture(scope="module", params=CASES)
def full(request):
    case = CASES[request.param]
    return case, abstract(case, case.config)


def test_full_size_table_covers_every_parameter_once(full):
    case, structs = full
    shapes = published_shapes(case.table(case.config), structs)
    assert count(structs) == case.parameters
    assert sum(map(math.prod, shapes.values())) == case.parameters


def test_at_full_size_a_process_reads_little_more_than_its_devices_hold(full):
    """Of one device's share, without reading: a transform without a window costs its whole tensor."""
    case, structs = full
    targets = flatten_dict(structs, sep="/")
    read = held = 0
    for entry in case.table(case.config):
        struct = targets[entry.path]
        shard = struct.sharding.shard_shape(struct.shape)
        own = shard[1:] if entry.layers else shard
        pieces = hf_import._pieces(entry.transform, tuple((0, size) for size in own), 2)
        whole = math.prod(struct.shape) // (entry.layers or 1)
        reads = [hf_import._size(window[0]) if window else whole for _, window in pieces]
        read += (entry.layers or 1) * (whole if whole in reads else sum(reads))
        held += math.prod(shard)
    assert held <= read <= 1.25 * held


@pytest.mark.parametrize("name", CASES)
def test_import_of_an_export_is_bit_exact_on_every_device(name, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_import, "BLOCK_BYTES", 512)
    case = CASES[name]
    table, structs = case.table(case.small), abstract(case, case.small)
    flat = flatten_dict(structs, sep="/")
    params = {
        path: np.random.default_rng(i).integers(0, 2**32, struct.shape, np.uint32).view(np.float32)
        for i, (path, struct) in enumerate(flat.items())
    }
    save_params(unflatten_dict(params, sep="/"), table, tmp_path / "out", max_shard_bytes=1e5)
    assert {n: t.shape for n, t in Checkpoint(tmp_path / "out").tensors.items()} == published_shapes(table, structs)
    # Random bits hold NaN, too. That the devices hold the right slices is checked by reading them back.
    loaded = flatten_dict(load_params(tmp_path / "out", table, structs, check_finite=False), sep="/")
    assert any(not value.sharding.is_fully_replicated for value in loaded.values())
    for path, value in loaded.items():
        for shard in value.addressable_shards:
            assert np.asarray(shard.data).tobytes() == params[path][shard.index].tobytes(), path
