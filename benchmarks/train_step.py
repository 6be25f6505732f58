"""The train step with the frozen prefix run once, against the naive joint pass; and the loader against the step's need.

    python benchmarks/train_step.py [--rounds 10] [--config.mllm.buckets='(64,)' ...]

Both steps are of configs/miniature.py on random weights and made data, in one process, timed in turns; figures are
medians. Needs the [miniature] extra.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.networks import autoencoder, network
from metacanvas_jax.config.read import experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.inputs import batches
from metacanvas_jax.diffusion.flow import flow_loss, sample_time
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.mllm.canvas import canvas_positions
from metacanvas_jax.train import objectives, parameters
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.trees import merge, partition


def joint_loss(model, vae, time_config):
    """The same loss with context and canvas in one pass through the MLLM, inside the gradient."""

    def planned(model, inputs):
        shape, config = model.canvas.config.shape, model.canvas.config
        tokens = rearrange(model.canvas(), "k y x d -> 1 (k y x) d").repeat(inputs.tokens.shape[0], axis=0)
        context = model.read(inputs)
        positions = canvas_positions(context.next_position, shape, config)
        hidden, written = model.mllm.joint(inputs, tokens, positions)
        plan = model.plan(context.replace(hidden=hidden))
        k, y, x = shape
        written = rearrange(written, "b (k y x) d -> b k y x d", k=k, y=y, x=x)
        return plan.replace(canvas=model.canvas_connector.read(written))

    def prepare(frozen, batch, key):
        del key
        pixels = objectives.to_signed(batch["pixels"])
        return batch, vae.apply({"params": frozen["vae"]}, pixels, method="encode")

    def loss(trainable, frozen, prepared, key):
        batch, latents = prepared
        variables = {"params": merge(trainable, {k: v for k, v in frozen.items() if k != "vae"})}
        time_key, noise_key, _ = jax.random.split(key, 3)
        plan = model.apply(variables, mllm_inputs(batch), method=planned)
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        level = sample_time(time_key, latents.shape[:1], time_config)
        velocity = lambda z, t: model.apply(variables, z, t, plan, method="velocity")  # noqa: E731
        return flow_loss(velocity, latents, noise, level), {}

    return prepare, loss


def timed(step, state, frozen, batch):
    start = time.perf_counter()
    state, metrics = step(state, frozen, batch, jax.random.key(1))
    jax.block_until_ready(metrics)
    return time.perf_counter() - start, state, float(metrics["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        places = [f"--config.data.path={place}/data", f"--config.mllm.tokenizer={place}/tokenizer"]
        places += ["--config.mllm.weights=", f"--config.vae_weights={place}/vae", "--config.data.count=2000"]
        setup = experiment(load_config("configs/miniature.py:canvas", [*places, *overrides]))
        prepare(setup)
        measure(setup, options.rounds)


def measure(setup, rounds: int) -> None:
    model, vae = network(setup), autoencoder(setup)
    params = nn.meta.unbox(jax.jit(lambda key: parameters.initial(setup, key))(jax.random.key(0)))
    params |= parameters.read_folders(setup, params)
    trainable, frozen = partition(params, setup.train.rules)
    optimizer = make_optimizer(setup.optimizer)
    stream = batches(setup)
    batch = jax.tree.map(jnp.asarray, next(stream))
    variants = {
        "prefix once": objectives.painting(model, vae, setup.time),
        "joint": joint_loss(model, vae, setup.time),
    }
    steps = {name: make_step(*pair, optimizer) for name, pair in variants.items()}
    states = {name: new_state(trainable, optimizer) for name in steps}
    seconds, losses = {name: [] for name in steps}, {}
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            taken, states[name], loss = timed(step, states[name], frozen, batch)
            if round_ == 0:
                losses[name] = loss
            else:
                seconds[name].append(taken)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    start = time.perf_counter()
    for _ in range(20):
        next(stream)
    loader = (time.perf_counter() - start) / 20
    size = setup.train.batch
    device = jax.devices()[0]
    print(f"device {device.device_kind}, {Path(__file__).name}, batch {size}, losses of the first step {losses}")
    print(f"step, prefix once   {median['prefix once'] * 1e3:8.1f} ms")
    print(f"step, joint         {median['joint'] * 1e3:8.1f} ms   = {median['joint'] / median['prefix once']:.2f} x")
    print(
        f"loader alone        {size / loader:8.0f} pictures/s = {median['prefix once'] / loader:.1f} x the step's need"
    )


if __name__ == "__main__":
    main()
