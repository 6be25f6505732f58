"""Painters of the shipped experiments in miniature with random parameters, as evaluators get them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from experiments_support import miniature

from metacanvas_jax.data.decoding import encode_png
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.worlds.questions import sample_texts


def painter(folder, file: str, variant: str = "", **changes) -> Painter:
    """One whose tokenizer lies in ``folder``; ``changes`` are sections of the experiment, or values of ``eval``."""
    place = folder / "tokenizer"
    setup = miniature(file, variant)
    if not place.exists():
        save_tokenizer(train_tokenizer(sample_texts(setup.world)), place)
    text = None if setup.text is None else dataclasses.replace(setup.text, tokenizer=str(place))
    values = {
        "mllm": dataclasses.replace(setup.mllm, tokenizer=str(place)),
        "text": text,
        "sampler": dataclasses.replace(setup.sampler, steps=2),
        "eval": dataclasses.replace(setup.eval, samples=4, batch=4),
    }
    return Painter(dataclasses.replace(setup, **values | changes))


@functools.cache
def params(setup):
    """Random numbers, also where a run starts with zeros: the canvas then changes what is drawn."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.05 * rng.normal(size=x.shape).astype(x.dtype), param_shapes(setup))


def read_tree(folder) -> dict[str, bytes]:
    """The contents of all files below a folder by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def videos_of(task: str):
    """The miniature of the videos, of one task alone."""
    setup = miniature("video_stage3")
    return dataclasses.replace(setup, buckets=tuple(bucket for bucket in setup.buckets if bucket.task == task))


def png(rows: int, columns: int) -> bytes:
    """A picture of noise."""
    return encode_png(np.random.default_rng(rows * columns).integers(0, 256, (rows, columns, 3), np.uint8))


def parquet(path, rows) -> None:
    """A table of such rows."""
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
