"""Memory of decoding a long video with the Wan 2.2 autoencoder, by XLA's own analysis of the compiled program.

    python benchmarks/wan_vae_memory.py
    python benchmarks/wan_vae_memory.py --topology v5e:1x1     # needs libtpu, no TPU

Nothing is run and no weight exists: shapes alone are lowered and compiled. Exit code 1 if the peak is over the limit.
"""

import argparse
import dataclasses
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from metacanvas_jax.vae.wan.network import WAN22_VAE, WanVae

GIB = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=121)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--chunk", type=int, default=WAN22_VAE.chunk, help="latent frames at a time; 0: all at once")
    parser.add_argument("--dtype", default="bfloat16", help="of weights, activations and pixels")
    parser.add_argument("--topology", help="compile for a TPU of this name instead of the CPU")
    parser.add_argument("--limit", type=float, default=12.0, help="GiB")
    flags = parser.parse_args()

    network = WanVae(dataclasses.replace(WAN22_VAE, chunk=flags.chunk, dtype=flags.dtype))
    sharding = SingleDeviceSharding(device(flags.topology))
    latents = (1, 1 + flags.frames // network.temporal, flags.height // network.spatial, flags.width // network.spatial)
    latents = jax.ShapeDtypeStruct((*latents, network.channels), jnp.float32, sharding=sharding)
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1, network.spatial, network.spatial, 3)))
    params = {"params": {"decoder": nn.meta.unbox(params)["params"]["decoder"]}}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, flags.dtype, sharding=sharding), params)

    start = time.perf_counter()
    lowered = jax.jit(lambda p, z: network.apply(p, z, method="decode")).lower(params, latents)
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - start
    # XLA's own peak leaves the temporaries out on a CPU; the sum counts all of them, alive together or not.
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes

    size = f"{flags.frames} frames at {flags.height}x{flags.width}"
    print(f"decode of {size}, {flags.dtype}, {flags.chunk} latent frames at a time")
    print(f"compiled for {flags.topology or 'cpu'} in {seconds:.0f} s")
    for name in ("argument", "output", "temp"):
        print(f"{name:>10} {getattr(memory, f'{name}_size_in_bytes') / GIB:7.2f} GiB")
    passed = total < flags.limit * GIB
    print(f"{'peak':>10} {total / GIB:7.2f} GiB   limit {flags.limit:g} GiB: {'PASS' if passed else 'FAIL'}")
    return int(not passed)


def device(topology: str | None) -> jax.Device:
    """The CPU, or one device of a TPU that is not there."""
    if topology is None:
        return jax.devices("cpu")[0]
    return topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=[1, 1, 1]
    ).devices[0]


if __name__ == "__main__":
    sys.exit(main())
