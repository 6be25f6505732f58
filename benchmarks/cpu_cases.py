"""The cases of ``cpu_vs_torch.py``: one block of each diffusion transformer, one decode of each autoencoder."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass
class Case:
    """The same work twice: ``torch_module`` is what ``torch.compile`` is given, both calls return the same arrays."""

    torch_module: Any
    run_torch: Callable[[Any], list[Any]]
    run_ours: Callable[[], list[Any]]


def randomize(model: Any) -> Any:
    """Every parameter random, norms, biases and modulation tables too."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias") or "table" in name:
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1 or "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def random(*shape: int, seed: int = 0) -> Any:
    import numpy as np

    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sana_block() -> Case:
    """Half of SANA 1.6B's width, 32 x 32 tokens, 300 caption tokens."""
    import jax.numpy as jnp
    import torch
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    from metacanvas_jax.dit.blocks import LinearBlock
    from metacanvas_jax.dit.sana.network import sana_1600m
    from metacanvas_jax.dit.sana.table import table

    config, side, length = sana_1600m(heads=35, cross_heads=10, layers=1), 32, 300
    width = config.width
    block = SanaTransformerBlock(
        width,
        config.heads,
        config.head_width,
        num_cross_attention_heads=config.cross_heads,
        cross_attention_head_dim=width // config.cross_heads,
        cross_attention_dim=width,
        attention_bias=False,
        mlp_ratio=config.mlp_ratio,
    )
    ours = LinearBlock(config.heads, config.hidden, config.dtype, config.cross_heads)
    caption, chunks = random(1, length, width, seed=1), random(1, 6, width, seed=2)
    caption_torch, chunks_torch = torch.from_numpy(caption), torch.from_numpy(chunks.reshape(1, -1))

    def call_torch(module, x):
        return module(x, encoder_hidden_states=caption_torch, timestep=chunks_torch, height=side, width=side)

    def call_ours(params, x):
        grid = x.reshape(1, side, side, width)
        out, _ = ours.apply({"params": params}, grid, jnp.asarray(chunks), jnp.asarray(caption))
        return out.reshape(x.shape)

    x = random(1, side * side, width)
    return block_case(block, call_torch, call_ours, (table(config), "transformer_blocks.{i}.", "blocks/"), x)


def flux_block(kind: str) -> Case:
    """A quarter of FLUX.1's width, 512 text tokens, 32 x 32 image tokens."""
    import jax.numpy as jnp
    import torch
    from diffusers.models.transformers import transformer_flux

    from metacanvas_jax.dit.flux.network import DoubleBlock, SingleBlock, flux_dev, joint_rotation
    from metacanvas_jax.dit.flux.table import table

    config, length, side = flux_dev(heads=6, layers_double=1, layers_single=1), 512, 32
    double = kind == "double"
    torch_class = transformer_flux.FluxTransformerBlock if double else transformer_flux.FluxSingleTransformerBlock
    vector, rotation = random(1, config.width, seed=2), joint_rotation(config, length, ((side, side),))
    vector_torch, rotary = torch.from_numpy(vector), tuple(interleaved(table)[0] for table in rotation)

    def call_torch(module, x):
        return torch.cat(module(x[:, length:], x[:, :length], vector_torch, rotary), dim=1)

    def call_ours(params, x):
        inputs = (jnp.asarray(vector), *rotation, None)
        if not double:
            return SingleBlock(config).apply({"params": params}, x, *inputs)[0]
        streams, _ = DoubleBlock(config).apply({"params": params}, (x[:, :length], x[:, length:]), *inputs)
        return jnp.concatenate(streams, axis=1)

    name = "transformer_blocks.{i}." if double else "single_transformer_blocks.{i}."
    block, x = torch_class(config.width, config.heads, config.head_width), random(1, length + side**2, config.width)
    return block_case(block, call_torch, call_ours, (table(config), name, f"{kind}/"), x)


def wan_block() -> Case:
    """A quarter of Wan2.2-5B's width, 5 frames of 15 x 20 tokens with a time each, 512 text tokens."""
    import jax.numpy as jnp
    import numpy as np
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    from metacanvas_jax.dit.wan.network import Block, wan2_2_ti2v_5b
    from metacanvas_jax.dit.wan.table import table
    from metacanvas_jax.nn.rope import grid_rotation

    config, grid, length = wan2_2_ti2v_5b(heads=6, mlp=3584, layers=1), (5, 15, 20), 512
    tokens = grid[1] * grid[2]
    rotation = grid_rotation([np.arange(size) for size in grid], config.rope_axes, config.theta)
    rotary = tuple(interleaved(table)[:, :, None] for table in rotation)
    text, chunks = random(1, length, config.width, seed=1), random(1, grid[0], 6, config.width, seed=2)
    text_torch, chunks_torch = torch.from_numpy(text), torch.from_numpy(chunks.repeat(tokens, axis=1))

    def call_torch(module, x):
        return module(x, text_torch, chunks_torch, rotary)

    def call_ours(params, x):
        return Block(config).apply({"params": params}, x, jnp.asarray(text), jnp.asarray(chunks), rotation, None)[0]

    block = WanTransformerBlock(config.width, config.mlp, config.heads, cross_attn_norm=True)
    x = random(1, grid[0] * tokens, config.width)
    return block_case(block, call_torch, call_ours, (table(config), "blocks.{i}.", "blocks/"), x)


def interleaved(table: Any) -> Any:
    """A rotary table ``[1 n e/2]`` in the form of diffusers: every value twice."""
    import numpy as np
    import torch

    return torch.from_numpy(np.repeat(np.array(table), 2, axis=-1))


def block_case(
    block: Any,
    call_torch: Callable[[Any, Any], Any],
    call_ours: Callable[[Any, Any], Any],
    source: tuple[Sequence[Any], str, str],
    x: Any,
) -> Case:
    """Forward and backward of one block: output, and gradients for all parameters and for the input ``x``.

    ``call_torch(block, x)`` and ``call_ours(params, x)`` return a tensor of the shape of ``x``; ``source`` is the
    weight table of the network and where in the published names and in the parameters its stack of blocks lies.
    """
    import jax
    import jax.numpy as jnp
    import torch

    params = jax.tree.map(jnp.asarray, block_params(*source, randomize(block)))
    cotangent = random(*x.shape, seed=99)
    x_torch, cotangent_torch = torch.from_numpy(x).requires_grad_(), torch.from_numpy(cotangent)
    x_ours, cotangent_ours = jnp.asarray(x), jnp.asarray(cotangent)

    def run_torch(module: Any) -> list[Any]:
        for parameter in (*block.parameters(), x_torch):
            parameter.grad = None
        out = call_torch(module, x_torch)
        out.backward(cotangent_torch)
        return [out.detach().numpy(), x_torch.grad.numpy()]

    @jax.jit
    def forward_and_backward(params, x, cotangent):
        out, back = jax.vjp(call_ours, params, x)
        return out, back(cotangent)

    def run_ours() -> list[Any]:
        out, (_, gradient) = jax.block_until_ready(forward_and_backward(params, x_ours, cotangent_ours))
        return [out, gradient]

    return Case(block, run_torch, run_ours)


def block_params(entries: Sequence[Any], name: str, path: str, block: Any) -> dict[str, Any]:
    """The parameters of one block, by the table of its network."""
    from flax.traverse_util import unflatten_dict

    state = block.state_dict()
    own = [entry for entry in entries if entry.path.startswith(path)]
    return unflatten_dict(
        {e.path[len(path) :]: e.transform.forward(state[e.name[len(name) :]].numpy()) for e in own}, sep="/"
    )


def kl_decode() -> Case:
    """FLUX's autoencoder at half the width, 256 px."""
    from diffusers import AutoencoderKL

    from metacanvas_jax.vae.kl.network import KL_F8C16, Kl
    from metacanvas_jax.vae.kl.table import table

    config = dataclasses.replace(KL_F8C16, channels=(64, 128, 256, 256))
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=config.channels,
        layers_per_block=config.blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    z = random(1, 1, 32, 32, config.latent_channels)
    return decode_case(model, Kl(config), table(config), z, z / config.scale + config.shift)


def dc_ae_decode() -> Case:
    """SANA's autoencoder at half the width, 256 px."""
    from diffusers import AutoencoderDC

    from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32, DcAe
    from metacanvas_jax.vae.dc_ae.table import table

    config = dataclasses.replace(DC_AE_F32C32, channels=(64, 128, 256, 256, 512, 512))
    blocks = ("ResBlock",) * config.attention_from + ("EfficientViTBlock",) * (6 - config.attention_from)
    scales = ((),) * config.attention_from + ((config.window,),) * (6 - config.attention_from)
    model = AutoencoderDC(
        latent_channels=config.latent_channels,
        attention_head_dim=config.head_width,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=config.channels,
        decoder_block_out_channels=config.channels,
        encoder_layers_per_block=config.encoder_blocks,
        decoder_layers_per_block=config.decoder_blocks,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
    )
    z = random(1, 1, 8, 8, config.latent_channels)
    return decode_case(model, DcAe(config), table(config), z, z / config.scale)


def wan_vae_decode(chunk: int) -> Case:
    """Wan2.2's autoencoder at a quarter of the width, 9 frames of 128 x 160 px; chunk 0 is all frames at once."""
    import numpy as np
    from diffusers import AutoencoderKLWan

    from metacanvas_jax.vae.wan.network import WAN22_VAE, WanVae
    from metacanvas_jax.vae.wan.table import table

    config = dataclasses.replace(WAN22_VAE, encoder_width=40, decoder_width=64, chunk=chunk)
    model = AutoencoderKLWan(
        base_dim=config.encoder_width,
        decoder_base_dim=config.decoder_width,
        z_dim=config.latent_channels,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.blocks,
        temperal_downsample=list(config.halve_time),
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=config.temporal,
        scale_factor_spatial=config.spatial,
    )
    z = random(1, 3, 8, 10, config.latent_channels)
    raw = z * np.array(config.latent_std, np.float32) + np.array(config.latent_mean, np.float32)
    return decode_case(model, WanVae(config), table(config), z, raw)


def decode_case(model: Any, network: Any, entries: Sequence[Any], z: Any, raw: Any) -> Case:
    """One decode; ``z`` are latents as the transformer has them, ``raw`` as diffusers' ``decode`` takes them."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from metacanvas_jax.weights.hf_import import load_params

    video = jax.ShapeDtypeStruct((1, 1, network.spatial, network.spatial, 3), jnp.float32)
    abstract = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), video))["params"]
    with tempfile.TemporaryDirectory() as folder:
        randomize(model).save_pretrained(folder)
        params = load_params(folder, entries, abstract, progress=False)
    decode = jax.jit(lambda params, z: network.apply({"params": params}, z, method="decode"))
    z = jnp.asarray(z)
    raw = torch.from_numpy(np.ascontiguousarray(raw.transpose(0, 4, 1, 2, 3)))
    images = raw.shape[2] == 1 and network.temporal == 1
    raw = raw[:, :, 0] if images else raw

    # torch.compile is asked for the method itself: calling the module would encode as well.
    model.forward = model.decode

    def run_torch(module: Any) -> list[Any]:
        with torch.no_grad():
            pixels = module(raw).sample.numpy()
        return [pixels[:, :, None] if images else pixels]

    def run_ours() -> list[Any]:
        return [jax.block_until_ready(decode(params, z)).transpose(0, 4, 1, 2, 3)]

    return Case(model, run_torch, run_ours)


CASES: dict[str, Callable[[], Case]] = {
    "sana block": sana_block,
    "flux double block": functools.partial(flux_block, "double"),
    "flux single block": functools.partial(flux_block, "single"),
    "wan block": wan_block,
    "dc-ae decode": dc_ae_decode,
    "flux vae decode": kl_decode,
    "wan vae decode, at once": functools.partial(wan_vae_decode, 0),
    "wan vae decode, by frame": functools.partial(wan_vae_decode, 1),
}
