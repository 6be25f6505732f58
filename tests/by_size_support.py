"""Edits of several aspect ratios in loose files, and a small run whose source sorts them by size."""

import dataclasses
import json

from experiments_support import miniature
from sources_support import encoded

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import sorting
from metacanvas_jax.data.formats.shards import WriteConfig
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.tasks import Bucket

TASK = "image_editing"
SQUARE, WIDE, TALL, LONG = (24, 24), (12, 24), (24, 12), (12, 60)
SIZES = (SQUARE, WIDE, TALL, LONG)
PICTURES = {  # (rows, columns) as found, how many of them, the size that they belong to
    (30, 30): (5, SQUARE),
    (25, 28): (3, SQUARE),
    (20, 40): (6, WIDE),
    (50, 31): (4, TALL),
}
QUIET = WriteConfig(per_shard=4, progress=False)


def edits(folder, bad=0, pictures=PICTURES):
    """A JSONL folder of edits; prompt "3" is number 3, all of whose pixels are 3. Returns {prompt: nearest size}."""
    folder.mkdir()
    rows, nearest = [], {}
    for size, (count, near) in pictures.items():
        for _ in range(count):
            number = len(rows)
            for part in ("before", "after"):
                (folder / f"{number}.{part}.png").write_bytes(encoded(number, size=size))
            rows.append({"target": f"{number}.after.png", "source": f"{number}.before.png", "prompt": f"{number}"})
            nearest[f"{number}"] = near
    for number in range(bad):
        (folder / f"bad{number}.png").write_bytes(b"no picture")
        rows.insert(7, {"target": f"bad{number}.png", "source": "0.before.png", "prompt": "bad"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return nearest


def section(path, **changes):
    """The loose files as a source."""
    return SourceSection("jsonl", str(path), TASK, **changes)


def buckets(sizes=SIZES, **changes):
    """Image edits of some sizes."""
    return tuple(Bucket(TASK, size, length=64, batch=2, **changes) for size in sizes)


def sort(rows, out, sizes=SIZES, config=QUIET, **changes):
    """Sorts loose files."""
    return sorting.sort(section(rows, **changes), out, sorting.chosen(buckets(sizes), TASK), config)


def run(out, tokenizer=None, sizes=SIZES, **changes):
    """FLUX in miniature on a sorted source, with random weights."""
    setup = miniature(TASK, "ratios")
    if tokenizer is not None:
        words = [str(number) for number in range(10)]
        save_tokenizer(train_tokenizer(words * 4), tokenizer)
        setup = dataclasses.replace(setup, mllm=dataclasses.replace(setup.mllm, tokenizer=str(tokenizer)))
    source = SourceSection("records", str(out), TASK, by_size=True, **changes)
    return dataclasses.replace(setup, buckets=buckets(sizes), sources=(source,))
