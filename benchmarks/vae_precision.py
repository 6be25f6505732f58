"""How far latents are from those of a float32 autoencoder, by the dtype of weights and of the computation.

    python benchmarks/vae_precision.py [--only wan] [--size 64] [--frames 9]

The autoencoders have their published sizes and random weights of a network at its start, and read noise blurred like
a picture. The error is the root mean square of the difference, relative to the deviation of the latents. A published
network has larger activations in places, so the numbers tell how roundings add up, not what a checkpoint loses.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax import registry
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.vae.dc_ae.network import DC_AE_F32C32
from metacanvas_jax.vae.kl.network import KL_F8C16
from metacanvas_jax.vae.wan.network import WAN22_VAE

CASES = {"wan": WAN22_VAE, "kl": KL_F8C16, "dc_ae": DC_AE_F32C32}
WAYS = (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=9, help="of the video autoencoder")
    args = parser.parse_args()
    print(f"{'network':8} {'weights':9} {'computes':9} error, % of the latents' deviation")
    for name in args.only.split(","):
        frames = args.frames if name == "wan" else 1
        video, params = picture(frames, args.size), random_params(CASES[name])
        expected = latents(CASES[name], params, video, "float32", "float32")
        for weights, dtype in WAYS:
            found = latents(CASES[name], params, video, weights, dtype)
            error = np.sqrt(np.mean((found - expected) ** 2)) / np.std(expected)
            print(f"{name:8} {weights:9} {dtype:9} {100 * error:.2f}", flush=True)


def picture(frames: int, size: int) -> jax.Array:
    """Noise whose neighbouring pixels are alike, in [-1, 1], ``[1 t h w 3]``."""
    noise = np.random.default_rng(0).standard_normal((1, frames, size // 8, size // 8, 3)).astype(np.float32)
    smooth = jax.image.resize(jnp.asarray(noise), (1, frames, size, size, 3), "cubic")
    return jnp.clip(smooth / 2, -1, 1)


def random_params(config: object) -> dict:
    """Random parameters by path, of the initial deviation; gains are not all one and biases not zero."""
    rng, leaves = np.random.default_rng(0), {}
    for path, leaf in flat(registry.abstract_params(config)).items():
        noise, name = rng.standard_normal(leaf.shape, np.float32), path.rpartition("/")[2]
        if name in ("scale", "gamma"):
            leaves[path] = 1 + 0.1 * noise
        elif leaf.ndim < 2:
            leaves[path] = 0.1 * noise
        else:
            leaves[path] = noise * np.float32(np.prod(leaf.shape[:-1])) ** -0.5
    return leaves


def latents(config: object, params: dict, video: jax.Array, weights: str, dtype: str) -> np.ndarray:
    """What the encoder makes of a video with weights rounded to one dtype, computing in another."""
    module = registry.module(dataclasses.replace(config, dtype=dtype))
    held = nested({path: jnp.asarray(leaf, weights) for path, leaf in params.items()})
    encode = jax.jit(lambda held, video: module.apply({"params": held}, video, method="encode"))
    return np.asarray(encode(held, video), np.float64)


if __name__ == "__main__":
    main()
