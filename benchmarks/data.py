"""How fast the data side is: scenes drawn, pictures judged, every task and every layout read.

    python benchmarks/data.py [--count 200] [--batch 16] [--threads 2] [--need 435]

Everything runs in this process on OpenMoji scenes of 60 x 60 pixels (videos: 9 frames) in a temporary folder.
``--need`` is the samples/s of the miniature's training step that the loader must keep up with (batch 64 at 0.147 s per
step: 435); the program ends with exit code 1 where reading from memory does not.
"""

import argparse
import dataclasses
import io
import itertools
import json
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import sources
from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.data.formats import records as dataset
from metacanvas_jax.data.formats.records import Records
from metacanvas_jax.data.formats.shards import WriteConfig
from metacanvas_jax.data.guard import Guarded
from metacanvas_jax.data.mixture import Source
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline, stack_pixels
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.tokenizer import train_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.data.video import encode_mp4
from metacanvas_jax.worlds import scenes
from metacanvas_jax.worlds.judge import Judge
from metacanvas_jax.worlds.questions import sample_texts

FRAMES = 9
DRAWN = {
    "text_to_image": "scenes",
    "reconstruction": "scenes",
    "image_editing": "edits",
    "text_to_video": "animations",
    "image_to_video": "animations",
    "video_editing": "animations",
    "reference_to_video": "animations",
}


def per_second(label: str, count: int, run: Callable[[], object]) -> float:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{label:52} {count / wall:9.0f}/s   {count / cpu:9.0f} per CPU second", flush=True)
    return count / wall


def read(label: str, source: Guarded, batch: int, threads: int) -> None:
    """Batches of a source through the pipeline, after two to warm up."""
    batches = iter(pipeline([Source(source)], PipelineConfig(batch, threads=threads), stacked))
    steps = max(1, min(len(source), 400) // batch)
    for _ in range(2):
        next(batches)
    per_second(label, steps * batch, lambda: [next(batches) for _ in range(steps)])
    batches.close()


def stacked(samples: Sequence[Sample]) -> np.ndarray:
    return np.stack([sample.target for sample in samples])


def layouts(folder: pathlib.Path, samples: Sequence[Sample]) -> dict[str, SourceSection]:
    """The same pictures (JPEG in tars, PNG else) and one video per four of them, in every layout."""
    import pyarrow
    import pyarrow.parquet

    def jpeg(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, sample in enumerate(samples):
            for name, data in ((f"{number}.jpg", jpeg(sample.image)), (f"{number}.txt", sample.prompt.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    (folder / "rows").mkdir()
    for number, sample in enumerate(samples):
        (folder / "rows" / f"{number}.png").write_bytes(encode_png(sample.image))
    rows = [json.dumps({"file_name": f"{i}.png", "text": sample.prompt}) for i, sample in enumerate(samples)]
    (folder / "rows" / "metadata.jsonl").write_text("\n".join(rows))
    images = [{"bytes": encode_png(sample.image), "path": None} for sample in samples]
    columns = {"image": images, "caption": [sample.prompt for sample in samples]}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=32)
    (folder / "clips").mkdir()
    for number in range(len(samples) // 4):
        frames = np.repeat(samples[number].target, 25, axis=0)
        (folder / "clips" / f"{number}.mp4").write_bytes(encode_mp4(frames, 24))
        (folder / "clips" / f"{number}.txt").write_text("a still")
    return {
        "webdataset, JPEG": SourceSection(kind="webdataset", path=str(folder / "a.tar")),
        "jsonl, PNG": SourceSection(kind="jsonl", path=str(folder / "rows")),
        "parquet, groups of 32, PNG": SourceSection(kind="parquet", path=str(folder / "a.parquet")),
        "files, MP4": SourceSection(kind="files", path=str(folder / "clips"), task="text_to_video"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="samples in every data set")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
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
        for in_memory, threads in itertools.product((False, True), sorted({0, options.threads})):
            records = Records(folder, in_memory=in_memory)
            batches = iter(pipeline([Source(records)], PipelineConfig(options.batch, threads=threads), collate))
            for _ in range(steps + 1 if in_memory else 2):
                next(batches)
            label = f"tokenised batches {'from memory' if in_memory else 'from disk'}, {threads} threads"
            rate = per_second(label, steps * options.batch, lambda b=batches: [next(b) for _ in range(steps)])
            fastest = max(fastest, rate if in_memory else 0.0)

        print("\ntask, drawn and then read from records:")
        samples: list[Sample] = []
        quiet = WriteConfig(per_shard=1024, progress=False)
        for task, kind in DRAWN.items():
            clip = Clip(frames=FRAMES, fps=8.0) if kind == "animations" else Clip()
            section = SourceSection(kind=kind, task=task, count=options.count)
            out = pathlib.Path(place) / task
            write = lambda s=section, o=out, c=clip: sources.prepare(s, o, c, quiet, world)  # noqa: E731
            per_second(f"{task}: written", options.count, write)
            source = open_source(dataclasses.replace(section, path=str(out)), clip)
            read(f"{task}: read", source, options.batch, options.threads)
            if task == "text_to_image":
                samples = [source[i] for i in range(len(source))]

        print("\nlayout:")
        for label, section in layouts(pathlib.Path(place), samples).items():
            clip = Clip((64, 64), FRAMES, 12.0) if section.task == "text_to_video" else Clip((64, 64))
            read(label, open_source(section, clip), options.batch, options.threads)
    enough = fastest >= options.need
    print(f"\nfastest from memory: {fastest:.0f} pictures/s, needed {options.need:.0f}: {'PASS' if enough else 'FAIL'}")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
