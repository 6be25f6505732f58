"""The deep-compression autoencoder DC-AE: 32x32 pixels become 32 channels.

Source: arXiv 2410.10733; diffusers ``AutoencoderDC`` with strided-convolution down steps and interpolating up steps.
"""

import dataclasses
import itertools

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from metacanvas_jax.kernels.linear_attention import relu_linear_attention
from metacanvas_jax.nn.convolution import Conv
from metacanvas_jax.nn.layers import Dense, Dtype, ones_init, rms_norm, zeros_init
from metacanvas_jax.nn.mix_ffn import MixFFN, depthwise_conv
from metacanvas_jax.nn.precision import exact
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.vae.base import Autoencoder, per_frame

IMAGE = ("batch", "rows", "columns", None)
EPS = 1e-5
EXPAND = 4  # width of the feed-forward over that of the stage


@dataclasses.dataclass(frozen=True)
class DcAeConfig:
    """Shape of the network. Stages are listed from the shallowest; each has half the size of the one before.

    Stages below ``attention_from`` are made of residual convolutions, the others of linear attention and Mix-FFN.
    ``window`` is the size of the depthwise convolution that gives the attention its second scale. The latents of the
    transformer are ``scale`` times those of the network.
    """

    channels: tuple[int, ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    attention_from: int
    latent_channels: int
    head_width: int
    scale: float
    window: int = 5
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.encoder_blocks) == len(self.decoder_blocks) > 0:
            raise ValueError(
                f"DcAeConfig: channels {self.channels}, encoder_blocks {self.encoder_blocks} and decoder_blocks "
                f"{self.decoder_blocks} must list the same stages"
            )
        if min(self.encoder_blocks + self.decoder_blocks) < 1:
            raise ValueError(f"DcAeConfig: every stage needs a block: {self.encoder_blocks}, {self.decoder_blocks}")
        if any(width % self.head_width for width in self.channels[self.attention_from :]):
            raise ValueError(
                f"DcAeConfig: channels {self.channels} must be multiples of head_width {self.head_width} from stage "
                f"{self.attention_from} on"
            )
        if self.channels[-1] % self.latent_channels:
            raise ValueError(
                f"DcAeConfig: the last width {self.channels[-1]} must be a multiple of latent_channels "
                f"{self.latent_channels}"
            )
        if any(4 * width % deeper for width, deeper in itertools.pairwise(self.channels)):
            raise ValueError(f"DcAeConfig: each width must divide 4 times the one before it: {self.channels}")

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return 2 ** (len(self.channels) - 1)


DC_AE_F32C32 = DcAeConfig(
    channels=(128, 256, 512, 512, 1024, 1024),
    encoder_blocks=(2, 2, 2, 3, 3, 3),
    decoder_blocks=(3, 3, 3, 3, 3, 3),
    attention_from=3,
    latent_channels=32,
    head_width=32,
    scale=0.41407,
)
"""The published f32c32 network: 312,250,275 parameters."""


def mean_groups(x: Float[Array, "b h w i"], features: int) -> Float[Array, "b h w o"]:
    """Mean over groups of consecutive channels."""
    return jnp.mean(einops.rearrange(x, "b h w (o g) -> b h w o g", o=features), axis=-1)


def shrink(x: Float[Array, "b h w i"], features: int) -> Float[Array, "b H W o"]:
    """The shortcut of a down step: 2x2 pixels folded as (channel, row, column), then averaged in groups."""
    return mean_groups(einops.rearrange(x, "b (h r) (w s) c -> b h w (c r s)", r=2, s=2), features)


def grow(x: Float[Array, "b h w i"], features: int) -> Float[Array, "b H W o"]:
    """The shortcut of an up step: channels repeated, then unfolded as (channel, row, column)."""
    x = jnp.repeat(x, 4 * features // x.shape[-1], axis=-1)
    return einops.rearrange(x, "b h w (c r s) -> b (h r) (w s) c", r=2, s=2)


class Norm(nn.Module):
    """Root-mean-square norm over the channels, with gain and bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Keeps the dtype of the input."""
        scale = self.param("scale", nn.with_logical_partitioning(ones_init, (None,)), (x.shape[-1],))
        bias = self.param("bias", nn.with_logical_partitioning(zeros_init, (None,)), (x.shape[-1],))
        return rms_norm(x, scale, EPS) + bias.astype(x.dtype)[None, None, None]


class ConvBlock(nn.Module):
    """Residual block: convolution, SiLU, convolution, norm."""

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], _: None = None) -> tuple[Float[Array, "b h w c"], None]:
        """Keeps size and width. The second result is what ``nn.scan`` stacks: nothing."""
        width, dtype, axes = x.shape[-1], self.config.dtype, (None, "embed")
        y = jax.nn.silu(Conv(width, (3, 3), dtype, axes=axes, name="conv1")(x))
        y = Conv(width, (3, 3), dtype, axes=axes, use_bias=False, name="conv2")(y)
        return constrain(x + Norm(name="norm")(y), IMAGE), None


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over all positions, on the projections and on a blurred copy of them.

    The three projections are thirds of one fused axis, which is cut into heads of ``3 * head_width`` consecutive
    channels. In each head the query comes first, then the key, then the value: ``qkv_0`` is not the query.
    """

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Without residual."""
        config, dtype, width = self.config, self.config.dtype, x.shape[-1]
        thirds = [Dense(width, ("embed", "heads"), dtype, use_bias=False, name=f"qkv_{i}")(x) for i in range(3)]
        fused = jnp.concatenate(thirds, axis=-1)
        heads = jnp.concatenate([fused, Blur(config, name="blur")(fused)], axis=-1)
        heads = einops.rearrange(heads, "b h w (g e) -> b (h w) g e", e=3 * config.head_width)
        q, k, v = jnp.split(heads, 3, axis=-1)
        y = einops.rearrange(relu_linear_attention(q, k, v), "b (h w) g e -> b h w (g e)", h=x.shape[1])
        return Dense(width, ("heads", "embed"), dtype, use_bias=False, name="out")(y)


class Blur(nn.Module):
    """The second scale: a depthwise convolution, then a linear map inside each run of ``head_width`` channels."""

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Keeps size and width; no biases."""
        width, size = self.config.head_width, self.config.window
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=())
        depth = self.param(
            "depth", nn.with_logical_partitioning(init, (None, None, "heads")), (size, size, x.shape[-1])
        )
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = (x.shape[-1] // width, width, width)
        point = self.param("point", nn.with_logical_partitioning(init, ("heads", None, None)), shape)
        y = depthwise_conv(x.astype(jnp.float32), depth.astype(jnp.float32)).astype(self.config.dtype)
        y = einops.rearrange(y, "b h w (g i) -> b h w g i", i=width)
        y = jnp.einsum("bhwgi,gio->bhwgo", y, point.astype(self.config.dtype), precision=exact(y))
        return einops.rearrange(y, "b h w g o -> b h w (g o)")


class AttentionBlock(nn.Module):
    """Multi-scale linear attention, then Mix-FFN, each followed by a norm and added to its input."""

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], _: None = None) -> tuple[Float[Array, "b h w c"], None]:
        """Keeps size and width. The second result is what ``nn.scan`` stacks: nothing."""
        x = x + Norm(name="attention_norm")(MultiscaleAttention(self.config, name="attention")(x))
        ffn = MixFFN(x.shape[-1], EXPAND * x.shape[-1], self.config.dtype, name="ffn")
        x = x + Norm(name="ffn_norm")(ffn(x))
        return constrain(x, IMAGE), None


def stage(config: DcAeConfig, number: int, blocks: int, name: str) -> nn.Module:
    """The blocks of one stage, scanned."""
    scanned = nn.scan(
        AttentionBlock if number >= config.attention_from else ConvBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=blocks,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(config, name=name)


class Encoder(nn.Module):
    """Pixels to latents."""

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b H W c"]:
        """Images in [-1, 1]; latents in the network's own scale."""
        config, dtype, axes = self.config, self.config.dtype, (None, "embed")
        x = Conv(config.channels[0], (3, 3), dtype, axes=axes, name="conv_in")(x)
        for i, blocks in enumerate(config.encoder_blocks):
            x, _ = stage(config, i, blocks, f"stages_{i}")(x)
            if i < len(config.channels) - 1:
                width = config.channels[i + 1]
                down = Conv(width, (3, 3), dtype, (2, 2), ((1, 1), (1, 1)), axes=axes, name=f"down_{i}")
                x = down(x) + shrink(x, width)
        y = Conv(config.latent_channels, (3, 3), dtype, axes=("embed", None), name="conv_out")(x)
        return y + mean_groups(x, config.latent_channels)


class Decoder(nn.Module):
    """Latents to pixels. Stages keep the encoder's numbers and run from the deepest; ``up_i`` leads to stage ``i``."""

    config: DcAeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w 3"]:
        """Latents in the network's own scale."""
        config, dtype, axes = self.config, self.config.dtype, (None, "embed")
        y = Conv(config.channels[-1], (3, 3), dtype, axes=axes, name="conv_in")(x)
        x = y + jnp.repeat(x.astype(y.dtype), config.channels[-1] // config.latent_channels, axis=-1)
        for i in reversed(range(len(config.channels))):
            if i < len(config.channels) - 1:
                width = config.channels[i]
                x = Conv(width, (3, 3), dtype, axes=axes, doubled=True, name=f"up_{i}")(x) + grow(x, width)
            x, _ = stage(config, i, config.decoder_blocks[i], f"stages_{i}")(x)
        x = jax.nn.relu(Norm(name="norm_out")(x))
        return Conv(3, (3, 3), dtype, axes=("embed", None), name="conv_out")(x)


class DcAe(Autoencoder):
    """The autoencoder; a video is coded frame by frame."""

    config: DcAeConfig

    def setup(self) -> None:
        """Encoder and decoder."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def to_latents(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t H W c"]:
        """Latents of the network times ``scale``."""
        return per_frame(self.encoder, video).astype(jnp.float32) * self.config.scale

    def to_pixels(self, latents: Float[Array, "b t H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels that are not clamped, as in the reference."""
        return per_frame(self.decoder, latents.astype(jnp.float32) / self.config.scale)
