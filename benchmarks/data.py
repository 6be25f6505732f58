"""How fast the data side is: scenes drawn, data sets written, batches read, pictures judged.

    python benchmarks/data.py [--count 2000] [--batch 64] [--threads 0 1 2] [--need 435]

Everything runs in this process on synthetic OpenMoji scenes of 60 x 60 pixels in a temporary folder. ``--need`` is the
samples/s of the training step that the loader must keep up with (batch 64 at 0.147 s per step: 435); the program ends
with exit code 1 where reading from memory does not.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np

from metacanvas_jax.data import dataset, scenes
from metacanvas_jax.data.dataset import Records
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline, stack_pixels
from metacanvas_jax.data.questions import sample_texts
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.eval.judge import Judge


def per_second(label: str, count: int, run: Callable[[], object]) -> float:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{label:44} {count / wall:9.0f}/s   {count / cpu:9.0f} per CPU second", flush=True)
    return count / wall


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="pictures in the data set")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--need", type=float, default=435.0, help="samples/s of the training step")
    options = parser.parse_args()

    world = scenes.SceneWorld()
    judge = Judge(world)  # draws the sprites, once
    tokenizer = train_tokenizer(sample_texts(world))
    made = [scenes.training_scene(world, 1, i) for i in range(200)]
    pictures = [scenes.draw(world, scene) for scene in made]
    per_second("scenes sampled", 200, lambda: [scenes.training_scene(world, 2, i) for i in range(200)])
    per_second("pictures drawn", 200, lambda: [scenes.draw(world, scene) for scene in made])
    per_second("pictures judged", 200, lambda: judge.verdicts(pictures, [scene.metadata for scene in made]))

    def collate(samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        texts = tokenizer([sample.prompt for sample in samples], padding="max_length", max_length=32)
        return {"pixels": stack_pixels(samples), "tokens": np.asarray(texts["input_ids"], np.int32)}

    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place) / "scenes"
        write = lambda: dataset.prepare(folder, world, options.count, seed=0, progress=False)  # noqa: E731
        per_second("records written", options.count, write)
        steps = max(1, options.count // options.batch)
        fastest = 0.0
        for in_memory, threads in itertools.product((False, True), options.threads):
            records = Records(folder, in_memory=in_memory)
            batches = iter(pipeline([Source(records)], PipelineConfig(options.batch, threads=threads), collate))
            for _ in range(steps + 1 if in_memory else 2):
                next(batches)
            label = f"batches read, {'in memory' if in_memory else 'from disk'}, {threads} threads (pictures)"
            rate = per_second(label, steps * options.batch, lambda b=batches: [next(b) for _ in range(steps)])
            fastest = max(fastest, rate if in_memory else 0.0)
    enough = fastest >= options.need
    print(f"fastest from memory: {fastest:.0f} pictures/s, needed {options.need:.0f}: {'PASS' if enough else 'FAIL'}")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
