"""The Wan video autoencoders; the first frame of a video stands alone.

Wan 2.1 makes 16 channels of 4 frames of 8x8 pixels. Wan 2.2 makes 48 channels of 4 frames of 16x16 pixels: it folds 2x2
pixels into channels before its first convolution and adds the resampled input of each stage to its output.

A short clip is coded at once; a long one in chunks of latent frames under a scan, with the same result and bounded
memory (see ``blocks.py``).

Sources: Wan-Video/Wan2.1 ``wan/modules/vae.py`` and Wan-Video/Wan2.2 ``wan/modules/vae2_2.py``; diffusers
``AutoencoderKLWan``, and ``AutoencoderKLQwenImage``, which is Wan 2.1's network under another name.
"""

import dataclasses
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from metacanvas_jax.nn.layers import Dense, Dtype
from metacanvas_jax.parallel.activations import constrain
from metacanvas_jax.vae.base import Autoencoder
from metacanvas_jax.vae.wan.blocks import VIDEO, ChannelNorm, Middle, Past, Stage, conv3d, remember


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Shape of the network.

    ``multipliers`` are the widths of the stages from the shallowest, in units of ``encoder_width`` and
    ``decoder_width``; ``halve_time`` says which down steps of the encoder halve the frames too. An encoder stage has
    ``blocks`` residual blocks, a decoder stage one more. The transformer's latents are ``(mean - latent_mean) /
    latent_std``, by channel. Squares of ``folded`` pixels a side are folded into channels before the first convolution.
    With ``shortcuts`` each stage adds its resampled input to its output; without them an up step of the decoder halves
    the channels.

    ``chunk`` is how many latent frames are coded at a time; the finest stages of the decoder then take one frame of
    pixels at a time. 0 codes a whole clip at once.
    """

    encoder_width: int
    decoder_width: int
    multipliers: tuple[int, ...]
    blocks: int
    halve_time: tuple[bool, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    folded: int = 2
    shortcuts: bool = True
    chunk: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if len(self.halve_time) != len(self.multipliers) - 1:
            raise ValueError(
                f"WanVaeConfig: {len(self.multipliers)} stages have {len(self.multipliers) - 1} steps between them; "
                f"halve_time lists {len(self.halve_time)}"
            )
        if not any(self.halve_time):
            raise ValueError(f"WanVaeConfig: one step must halve the frames: {self.halve_time}")
        if len(self.latent_mean) != len(self.latent_std) or not all(std > 0 for std in self.latent_std):
            raise ValueError(
                f"WanVaeConfig: latent_mean ({len(self.latent_mean)} values) and latent_std ({len(self.latent_std)} "
                "values, all > 0) must list the same channels"
            )
        wide, steps = self.multipliers, [8 if time else 4 for time in self.halve_time]  # positions folded into one
        encoder = zip((1, *wide), wide, (*steps, 1), strict=False)
        decoder = zip(wide[:0:-1], (wide[-1], *wide[:0:-1]), steps[::-1], strict=False)
        if self.shortcuts and (any(f * i % o for i, o, f in encoder) or any(f * o % i for o, i, f in decoder)):
            raise ValueError(f"WanVaeConfig: multipliers {wide} do not divide by each other across steps {steps}")
        if not self.shortcuts and any(self.decoder_width * multiplier % 2 for multiplier in wide[1:]):
            raise ValueError(f"WanVaeConfig: up steps halve decoder_width {self.decoder_width} times {wide[1:]}")
        if self.blocks < 1 or self.chunk < 0:
            raise ValueError(f"WanVaeConfig: blocks {self.blocks} must be >= 1 and chunk {self.chunk} >= 0")

    @property
    def spatial(self) -> int:
        """Pixels per latent along rows and columns."""
        return self.folded * 2 ** len(self.halve_time)

    @property
    def temporal(self) -> int:
        """Frames per latent frame after the first one."""
        return 2 ** sum(self.halve_time)

    @property
    def latent_channels(self) -> int:
        """Latent channels."""
        return len(self.latent_mean)


# fmt: off
WAN22_VAE = WanVaeConfig(
    encoder_width=160,
    decoder_width=256,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    halve_time=(False, True, True),
    latent_mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    latent_std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
    chunk=1,
)
"""The autoencoder of Wan2.2-TI2V-5B: 704,688,668 parameters."""

WAN21_VAE = WanVaeConfig(
    encoder_width=96,
    decoder_width=96,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    halve_time=(False, True, True),
    latent_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latent_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    folded=1,
    shortcuts=False,
    chunk=1,
)
"""The autoencoder of Wan2.1 and of image models that took it over: 126,892,531 parameters."""
# fmt: on


def patchify(video: Float[Array, "b t h w c"], patch: int) -> Float[Array, "b t H W i"]:
    """Folds pixels into channels in the order (colour, column, row)."""
    return einops.rearrange(video, "b t (h r) (w s) c -> b t h w (c s r)", r=patch, s=patch)


def unpatchify(x: Float[Array, "b t H W i"], patch: int) -> Float[Array, "b t h w c"]:
    """The reverse of ``patchify``."""
    return einops.rearrange(x, "b t h w (c s r) -> b t (h r) (w s) c", r=patch, s=patch)


def in_chunks(
    network: nn.Module, run: Callable[..., tuple[Array, Past]], x: Float[Array, "b t h w i"], past: Past, size: int
) -> tuple[Float[Array, "b T H W o"], Past]:
    """``run(network, x, past)`` on ``size`` frames at a time, under a scan.

    The clip's first frame, which may have another shape than the others, and the remainder of a division by ``size``
    make a first chunk of their own.
    """
    count = (x.shape[1] - (0 if past else 1)) // size
    head, parts = x.shape[1] - count * size, []
    if head:
        y, past = run(network, x[:, :head], past)
        parts.append(y)
    if count:
        chunks = einops.rearrange(x[:, head:], "b (n t) h w c -> n b t h w c", n=count)
        scan = nn.scan(
            lambda module, past, chunk: run(module, chunk, past)[::-1],
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        past, y = scan(network, past, chunks)
        parts.append(einops.rearrange(y, "n b t h w c -> b (n t) h w c"))
    return jnp.concatenate(parts, axis=1), past


class Encoder(nn.Module):
    """A chunk of pixels to the mean of the posterior, in the network's own scale."""

    config: WanVaeConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w 3"], past: Past) -> tuple[Float[Array, "b T H W c"], Past]:
        """``1 + temporal * k`` frames of the first chunk become ``1 + k``, ``temporal * k`` of a later one ``k``."""
        config, dtype, now = self.config, self.config.dtype, {}
        x, now["conv_in"] = remember(patchify(x.astype(dtype), config.folded), past.get("conv_in"), 2)
        x = conv3d(config.encoder_width, dtype, name="conv_in")(x)
        for i, multiplier in enumerate(config.multipliers):
            inner, width, name = i < len(config.halve_time), config.encoder_width * multiplier, f"stages_{i}"
            time = inner and config.halve_time[i]
            run = Stage(width, config.blocks, "down" if inner else "none", time, config.shortcuts, dtype, name=name)
            x, now[name] = run(x, past.get(name, {}))
        x, now["middle"] = Middle(dtype, name="middle")(x, past.get("middle", {}))
        x = jax.nn.silu(ChannelNorm(name="norm_out")(x))
        x, now["conv_out"] = remember(x, past.get("conv_out"), 2)
        x = conv3d(2 * config.latent_channels, dtype, axes=("embed", None), name="conv_out")(x)
        moments = Dense(2 * config.latent_channels, (None, None), dtype, name="project")(x)
        return moments[..., : config.latent_channels], now


class Decoder(nn.Module):
    """A chunk of latents, in the network's own scale, to pixels. Stage 0 is the deepest."""

    config: WanVaeConfig

    def setup(self) -> None:
        """All layers."""
        config, dtype = self.config, self.config.dtype
        widths = [config.decoder_width * multiplier for multiplier in reversed(config.multipliers)]
        steps = [("up", time) for time in reversed(config.halve_time)] + [("none", False)]
        self.project = Dense(config.latent_channels, (None, None), dtype)
        self.conv_in = conv3d(widths[0], dtype)
        self.middle = Middle(dtype)
        self.stages = [
            Stage(width, config.blocks + 1, step, time, config.shortcuts and step == "up", dtype)
            for width, (step, time) in zip(widths, steps, strict=True)
        ]
        self.norm_out = ChannelNorm()
        self.conv_out = conv3d(3 * config.folded**2, dtype, axes=("embed", None))

    def __call__(self, x: Float[Array, "b T H W c"], past: Past) -> tuple[Float[Array, "b t h w 3"], Past]:
        """``1 + k`` frames of the first chunk become ``1 + temporal * k``, ``k`` of a later one ``temporal * k``."""
        x, coarse = self.coarse(x, past.get("coarse", {}))
        size = 1 if self.config.chunk else x.shape[1]
        x, fine = in_chunks(self, Decoder.fine, x, past.get("fine", {}), size)
        return x, {"coarse": coarse, "fine": fine}

    def coarse(self, x: Float[Array, "b T H W c"], past: Past) -> tuple[Float[Array, "b t h w d"], Past]:
        """Up to the last stage that doubles the frames."""
        now = {}
        x, now["conv_in"] = remember(self.project(x), past.get("conv_in"), 2)
        x, now["middle"] = self.middle(self.conv_in(x), past.get("middle", {}))
        for i in range(self._frames_final):
            x, now[f"stages_{i}"] = self.stages[i](x, past.get(f"stages_{i}", {}))
        return x, now

    def fine(self, x: Float[Array, "b t H W d"], past: Past) -> tuple[Float[Array, "b t h w 3"], Past]:
        """From there to pixels. The largest activations are here; the frames may be split in any way."""
        now = {}
        for i in range(self._frames_final, len(self.stages)):
            x, now[f"stages_{i}"] = self.stages[i](x, past.get(f"stages_{i}", {}))
        x, now["conv_out"] = remember(jax.nn.silu(self.norm_out(x)), past.get("conv_out"), 2)
        return jnp.clip(unpatchify(self.conv_out(x), self.config.folded), -1, 1), now

    @property
    def _frames_final(self) -> int:
        """The first stage that sees all frames of the video."""
        return len(self.config.halve_time) - self.config.halve_time.index(True)


class WanVae(Autoencoder):
    """The autoencoder. ``config.chunk`` is how many latent frames are coded at a time."""

    config: WanVaeConfig

    @property
    def temporal(self) -> int:
        """Frames per latent frame after the first one."""
        return self.config.temporal

    def setup(self) -> None:
        """Encoder and decoder."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def to_latents(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b T H W c"]:
        """The mean of the posterior, normalised channel by channel."""
        video = constrain(video, VIDEO)
        size = self.temporal * (self.config.chunk or video.shape[1])
        mean, _ = in_chunks(self.encoder, Encoder.__call__, video, {}, size)
        return (mean.astype(jnp.float32) - self._vector(self.config.latent_mean)) / self._vector(self.config.latent_std)

    def to_pixels(self, latents: Float[Array, "b T H W c"]) -> Float[Array, "b t h w 3"]:
        """Pixels, clamped to [-1, 1]."""
        latents = constrain(latents.astype(jnp.float32), VIDEO)
        latents = latents * self._vector(self.config.latent_std) + self._vector(self.config.latent_mean)
        video, _ = in_chunks(self.decoder, Decoder.__call__, latents, {}, self.config.chunk or latents.shape[1])
        return video

    def _vector(self, values: tuple[float, ...]) -> Float[Array, "1 1 1 1 c"]:
        return jnp.asarray(np.asarray(values, np.float32))[None, None, None, None]
