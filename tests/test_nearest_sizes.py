"""The published sizes as data, and what is drawn from a source picture by a run that was trained in several sizes."""

import ast
import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from by_size_support import LONG, SQUARE, TALL, TASK, WIDE, run
from experiments_support import build, miniature
from PIL import Image

from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.dit.flux.sizes import KONTEXT_SIZES
from metacanvas_jax.dit.qwen_image.sizes import EDIT_SIZES
from metacanvas_jax.evaluate.benchmarks import base
from metacanvas_jax.exchange.reading import reading
from metacanvas_jax.paint.requests import Request, sample_of
from metacanvas_jax.sizes import fitting_size, nearest_size
from metacanvas_jax.tasks import Bucket


def published(path, kind, name):
    """A definition of a module of diffusers, without importing it."""
    found = importlib.util.find_spec("diffusers")
    if found is None:
        pytest.skip("diffusers is not installed")
    tree = ast.parse((Path(found.origin).parent / "pipelines" / path).read_text())
    named = [node for node in tree.body if isinstance(node, kind) and name in ast.dump(node)]
    scope = {"math": math}
    exec(compile(ast.Module(named[:1], []), path, "exec"), scope)
    return scope[name]


def test_the_sizes_of_kontext_are_the_published_ones():
    sizes = published("flux/pipeline_flux_kontext.py", ast.Assign, "PREFERRED_KONTEXT_RESOLUTIONS")
    assert set(KONTEXT_SIZES) == set(sizes) and len(KONTEXT_SIZES) == len(sizes) == 17
    assert {size[::-1] for size in KONTEXT_SIZES} == set(KONTEXT_SIZES)


def test_the_sizes_of_qwen_image_edit_follow_from_the_published_rule():
    rule = published("qwenimage/pipeline_qwenimage_edit_plus.py", ast.FunctionDef, "calculate_dimensions")
    ratios = [1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16]
    assert [rule(1024 * 1024, ratio)[::-1] for ratio in ratios] == list(EDIT_SIZES)
    assert [fitting_size((1, ratio), 1024 * 1024, 32) for ratio in ratios] == list(EDIT_SIZES)


@pytest.mark.parametrize(
    ("file", "sizes", "wide", "cells"),
    [
        ("image_editing", KONTEXT_SIZES, (672, 1568), (21, 49)),
        ("qwen_image_edit", EDIT_SIZES, (768, 1376), (24, 43)),
    ],
)
def test_the_canvas_of_a_variant_follows_every_size(file, sizes, wide, cells):
    setup = build(file, "ratios")
    assert setup.sizes_of(TASK) == sizes and sizes[0] == (1024, 1024)
    shapes = {bucket.size: setup.canvas.shape_for(latent_grid(setup, bucket)) for bucket in setup.shapes}
    assert shapes[1024, 1024] == (1, 32, 32) and shapes[wide] == (1, *cells)
    for size, (_, rows, columns) in shapes.items():
        assert abs(rows - size[0] / 32) <= 0.5 and abs(columns - size[1] / 32) <= 0.5
    small = miniature(file, "ratios")
    grids = {bucket.size: small.canvas.shape_for(latent_grid(small, bucket)) for bucket in small.shapes}
    assert grids == {(60, 60): (1, 5, 5), (48, 72): (1, 4, 6), (72, 48): (1, 6, 4)}


def picture(rows, columns):
    return np.zeros((rows, columns, 3), np.uint8)


@pytest.fixture(scope="module")
def by_size():
    """Sources are not opened when a run draws."""
    return run("nowhere")


@pytest.fixture(scope="module")
def plain(by_size):
    """The same run before its source was sorted."""
    return dataclasses.replace(by_size, sources=(SourceSection("records", "nowhere", TASK),))


SOURCES = {(20, 41): WIDE, (41, 20): TALL, (30, 31): SQUARE, (100, 900): LONG}


@pytest.mark.parametrize("sides", SOURCES)
def test_an_edit_has_the_nearest_size_of_the_training_where_it_was_sorted(by_size, plain, sides):
    request = Request("make it blue", image=picture(*sides), edit=True)
    sample, shape = sample_of(by_size, request)
    assert shape.size == SOURCES[sides] and sample.source.shape[1:3] == SOURCES[sides]
    assert sample_of(plain, request)[1].size == fitting_size(sides, 24 * 24, 12)
    for setup in (by_size, plain):
        assert sample_of(setup, dataclasses.replace(request, size=(36, 48)))[1].size == (36, 48)
    assert base.edit_size(by_size, TASK, sides) == SOURCES[sides]


def test_an_edit_has_the_prompt_length_of_the_bucket_of_its_size(by_size):
    lengths = {SQUARE: 64, WIDE: 65, TALL: 66, LONG: 67}
    buckets = tuple(dataclasses.replace(one, length=lengths[one.size]) for one in by_size.buckets)
    setup = dataclasses.replace(by_size, buckets=buckets)
    for sides, size in SOURCES.items():
        assert sample_of(setup, Request("x", image=picture(*sides), edit=True))[1].length == lengths[size]
    assert sample_of(setup, Request("x", image=picture(9, 9), edit=True, size=WIDE))[1].length == lengths[WIDE]


def test_a_video_that_begins_with_a_picture_has_its_nearest_size():
    setup = miniature("video_stage3")
    task = "image_to_video"
    buckets = tuple(Bucket(task, size, frames=5, fps=4.0, length=160) for size in ((60, 60), (48, 72)))
    source = SourceSection("records", "nowhere", task, by_size=True)
    wide = Request("it moves", image=picture(40, 60))
    sorted_ = dataclasses.replace(setup, buckets=buckets, sources=(source,))
    assert sample_of(sorted_, wide)[1].size == (48, 72)
    assert sample_of(dataclasses.replace(sorted_, sources=()), wide)[1].size == (60, 60)


@pytest.mark.torch
def test_an_export_paints_in_the_same_sizes(by_size, plain):
    rules = pytest.importorskip("metacanvas_jax.torch_export.reading")
    vae = {"vae": {"spatial": 6, "temporal": 1}}
    read = {setup: rules.Rules({"reading": reading(setup), **vae}, (1, 2, 2)) for setup in (by_size, plain)}
    assert "by_size" not in reading(plain)
    for sides in SOURCES:
        source = Image.fromarray(picture(*sides))
        for setup, found in read.items():
            expected = sample_of(setup, Request("x", image=picture(*sides), edit=True))[1]
            assert found.shape(TASK, source=source).size == expected.size
            assert found.shape(TASK, source=source, height=36, width=48).size == (36, 48)
        assert read[by_size].shape(TASK).size == SQUARE
        assert nearest_size(sides, by_size.sizes_of(TASK)) == read[by_size].shape(TASK, source=source).size
