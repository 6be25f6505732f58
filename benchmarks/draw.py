"""What drawing the tree of a benchmark costs beside the steps of the sampler: words, plans, decoding, files.

    python benchmarks/draw.py [--batch 4] [--batches 6] [--rounds 5] [--config FILE:VARIANT] [--config.KEY=VALUE ...]

One process draws the first prompts of GenEval into a folder, as `metacanvas evaluate --benchmark geneval` does, and
follows the velocity of the same network for as many batches and steps, from plans that were made before. They take
turns: steps, drawing, steps, drawing, steps. Each drawing is compared with the mean of the steps before and after it:
a machine that is slow for a while slows both. Of a drawing counts the time from the last file of its first batch to
that of the last: compilation does not count. The overhead is the median of these ratios, and is given with their range,
by the clock and in seconds of this process's processors, which depend less on what else runs on the machine. Parameters
are random numbers. Without --config the network is configs/miniature.py:canvas with a wider and deeper SANA. Needs the
[miniature] extra.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.networks import network
from metacanvas_jax.config.read import experiment
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.evaluate import tree
from metacanvas_jax.evaluate.benchmarks import geneval
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.paint.program import how_to, recipe_of
from metacanvas_jax.paint.sampling import draw
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.types import NOTHING
from metacanvas_jax.worlds.questions import sample_texts

LARGER = (  # so that a step of four guided pictures takes at least 0.2 s on two cores
    "--config.dit.heads=24",
    "--config.dit.head_width=32",
    "--config.dit.cross_heads=24",
    "--config.dit.layers=8",
    "--config.canvas_connector.width=768",
    "--config.canvas.start=",
    "--config.sampler.steps=5",
    "--config.sampler.guidance=1.5",
)


def clocks() -> tuple[float, float]:
    """Seconds of the wall clock and of this process's processors."""
    return time.perf_counter(), time.process_time()


def between(first: tuple[float, float], last: tuple[float, float]) -> tuple[float, float]:
    return last[0] - first[0], last[1] - first[1]


def drawing(painter: Painter, params, entries, batch: int, batches: int) -> tuple[float, float]:
    """Seconds of all batches but the first, drawn into a new folder."""
    ends = []

    def watched(entry):
        def files(results):
            made = entry.files(results)
            ends.append(clocks())
            return made

        return dataclasses.replace(entry, files=files)

    with tempfile.TemporaryDirectory() as folder:
        made = tree.draw(painter, params, [watched(entry) for entry in entries], Path(folder), each=batch, seed=0)
        ends.append(clocks())  # all files are written
    assert made == len(entries) == batch * batches
    return between(sorted(ends)[batch - 1], sorted(ends)[-1])


def plain(painter: Painter, params, samples, bucket):
    """A function that follows the velocity of a batch from noise to latents, compiled, with its plans."""
    setup, model = painter.setup, network(painter.setup)
    how = how_to(setup, bucket)
    recipe = recipe_of(setup, how, model)
    examples = painter.inputs.examples(bucket, target=False)
    inputs = [mllm_inputs(examples.batch(samples, words=words)) for words in (True, False)]

    @jax.jit
    def plan(params, inputs):
        variables = {"params": {name: part for name, part in params.items() if name != "vae"}}
        return model.apply(variables, model.apply(variables, inputs, method="read"), method="plan")

    @jax.jit
    def steps(params, noise, planned, empty):
        variables = {"params": {name: part for name, part in params.items() if name != "vae"}}
        velocity = lambda z, t, guide: model.apply(variables, z, t, guide, NOTHING, method="velocity")  # noqa: E731
        return draw(velocity, planned, noise, recipe, empty=empty)

    planned, empty = (plan(params, one) for one in inputs)
    noise = jnp.asarray(
        np.random.default_rng(0).normal(size=(len(samples), *latent_grid(setup, bucket), setup.vae.channels)),
        jnp.float32,
    )

    def run(batches: int) -> tuple[float, float]:
        first = clocks()
        for _ in range(batches):
            jax.block_until_ready(steps(params, noise, planned, empty))
        return between(first, clocks())

    run(1)  # compiles
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", default="")
    options, overrides = parser.parse_known_args()
    if options.batch < 1 or options.batches < 2 or options.rounds < 1:
        parser.error("expected at least one result, two batches (the first is not counted) and one round")
    with tempfile.TemporaryDirectory() as place:
        ours = (f"--config.mllm.tokenizer={place}", "--config.mllm.weights=", "--config.vae_weights=", *LARGER)
        named = options.config or "configs/miniature.py:canvas"
        setup = experiment(load_config(named, [*(() if options.config else ours), *overrides]))
        if not options.config:
            save_tokenizer(train_tokenizer(sample_texts(setup.world)), Path(place))
        measure(Painter(setup), options.batch, options.batches, options.rounds)


def measure(painter: Painter, batch: int, batches: int, rounds: int) -> None:
    rng = np.random.default_rng(0)
    random = lambda x: jnp.asarray(0.02 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
    params = jax.tree.map(random, param_shapes(painter.setup))
    entries = geneval.entries(painter.setup, "")[: batch * batches]
    steps = plain(painter, params, [entry.sample() for entry in entries[:batch]], entries[0].bucket)
    plains, drawings = [steps(batches - 1)], []
    for _ in range(rounds):
        drawings.append(drawing(painter, params, entries, batch, batches))
        plains.append(steps(batches - 1))
    pictures, count = batch * (batches - 1), painter.setup.sampler.steps * (batches - 1)
    size = sum(x.size for x in jax.tree.leaves(params["dit"]))
    print(
        f"{jax.devices()[0].device_kind}, DiT of {size:,} parameters, batch {batch}, {rounds} rounds of {count} steps"
    )
    step, drawn = (statistics.median(clock for clock, _ in some) for some in (plains, drawings))
    print(f"plain steps  {pictures / step:7.2f} pictures/s, {step / count:.3f} s a step")
    print(f"drawn        {pictures / drawn:7.2f} pictures/s")
    for name, seen in (("clock", 0), ("processors", 1)):
        ratios = [
            2 * one[seen] / (before[seen] + after[seen])
            for one, before, after in zip(drawings, plains, plains[1:], strict=False)
        ]
        low, high = min(ratios) - 1, max(ratios) - 1
        print(f"overhead     {statistics.median(ratios) - 1:7.1%} by the {name} (from {low:.1%} to {high:.1%})")


if __name__ == "__main__":
    main()
