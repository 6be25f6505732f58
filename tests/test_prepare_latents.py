"""Latents computed ahead: a step from them is the step that encodes, and none of another making are taken."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments_support import miniature
from tasks_support import Spy

from metacanvas_jax import precompute
from metacanvas_jax.config import networks
from metacanvas_jax.config.schema import OptimizerConfig
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import inputs, latents, sources
from metacanvas_jax.data.batch import given_latents
from metacanvas_jax.data.examples import frames_of_source
from metacanvas_jax.data.formats.shards import WriteConfig
from metacanvas_jax.data.inputs import Inputs
from metacanvas_jax.data.samples import LATENTS, SOURCE_FRAMES
from metacanvas_jax.data.shapes import batch_shapes
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.data.transforms import Clip
from metacanvas_jax.errors import UserError
from metacanvas_jax.paint.previews import samples_of
from metacanvas_jax.tasks import TASKS
from metacanvas_jax.train.objectives import painting
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.state import new_state
from metacanvas_jax.train.step import make_step
from metacanvas_jax.vae.kl.network import KL_F8C16
from metacanvas_jax.vae.patch_pca import network as patch_pca
from metacanvas_jax.weights import saved

pytestmark = pytest.mark.miniature
COUNT = 6


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Stage 3 in miniature and reconstruction: every task from records with latents, and an autoencoder on disk."""
    folder = tmp_path_factory.mktemp("latents")
    setup = miniature("video_stage3")
    pictures = np.random.default_rng(0).integers(0, 256, (40, 60, 60, 3), dtype=np.uint8)
    saved.save(folder / "vae", patch_pca.fit(pictures, setup.vae)[0], {})
    texts = [sample.prompt for section in setup.sources for sample in [open_source(section, world=setup.world)[0]]]
    save_tokenizer(train_tokenizer(texts), folder / "tokenizer")
    reconstruction = dataclasses.replace(setup.buckets[0], task="reconstruction")
    setup = dataclasses.replace(
        setup,
        vae_weights=str(folder / "vae"),
        mllm=dataclasses.replace(setup.mllm, tokenizer=str(folder / "tokenizer")),
        buckets=tuple(dataclasses.replace(b, batch=3) for b in (*setup.buckets, reconstruction)),
    )
    sections = []
    compute, computed = precompute.make_latents(setup, batch=4)
    for bucket in setup.buckets:
        kind = "scenes" if bucket.task == "reconstruction" else None
        drawn = SourceSection(kind or next(s.kind for s in setup.sources if s.task == bucket.task), task=bucket.task)
        drawn = dataclasses.replace(drawn, count=COUNT)
        clip = Clip(bucket.size, bucket.frames, bucket.fps if bucket.frames > 1 else None)
        out = folder / bucket.task
        quiet = WriteConfig(progress=False)
        sources.prepare(drawn, out, clip, quiet, setup.world, compute=compute, computed=computed)
        sections.append(SourceSection("records", str(out), bucket.task, latents=True))
    return dataclasses.replace(setup, sources=tuple(sections))


def encoding(setup):
    return dataclasses.replace(setup, sources=tuple(dataclasses.replace(s, latents=False) for s in setup.sources))


def only(setup, task):
    return dataclasses.replace(setup, buckets=tuple(b for b in setup.buckets if b.task == task))


class Linear(Spy):
    """A network of one parameter, so that a whole training step compiles in a second; it looks at all it is given."""

    def apply(self, variables, *inputs, method, **options):
        if method != "velocity":
            return super().apply(variables, *inputs, method=method, **options)
        latents, time, _, condition = inputs
        weight = variables["params"]["weight"]
        seen = sum(jnp.mean(x) for x in (*condition.reference, condition.channels))
        return latents * weight[None, None, None, None] + seen + jnp.mean(time)


def frozen_of(setup):
    return {"vae": saved.load(setup.vae_weights)[0]}


def both(setup, task):
    """A batch of pixels and the same batch of stored latents."""
    batches = []
    for changed in (encoding(setup), setup):
        stream = inputs.batches(only(changed, task))
        batches.append(next(stream))
        stream.close()
    return batches


@pytest.mark.parametrize("task", TASKS)
def test_prepare_gives_a_step_the_latents_that_it_would_encode(setup, task):
    pixels, stored = both(setup, task)
    assert pixels.keys() & LATENTS.keys() and not stored.keys() & LATENTS.keys()
    for name in pixels.keys() - LATENTS.keys():  # the MLLM reads the same samples
        jax.tree.map(np.testing.assert_array_equal, pixels[name], stored[name])
    shapes = batch_shapes(only(setup, task), only(setup, task).shapes[0])
    assert shapes.keys() == stored.keys() and all(shapes[n].shape == stored[n].shape for n in shapes if "latents" in n)
    prepare, _ = painting(Spy(), networks.autoencoder(setup), setup.time, channels=setup.given_channels)
    prepared = jax.jit(lambda batch: dataclasses.astuple(prepare(frozen_of(setup), batch, jax.random.key(0)))[1:3])
    expected, made = prepared(pixels), prepared(stored)
    assert np.abs(np.asarray(expected[0])).max() > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), expected, made)


def test_prepare_a_training_step_from_stored_latents_is_the_step_that_encodes(setup):
    pixels, stored = both(setup, "reference_to_video")
    halves = {name: x.astype(np.float16) if "latents" in name else x for name, x in stored.items()}
    prepare, loss = painting(Linear(), networks.autoencoder(setup), setup.time, channels=setup.given_channels)
    optimizer = make_optimizer(OptimizerConfig(1e-2))
    step, frozen, results = make_step(prepare, loss, optimizer), frozen_of(setup), []
    for batch in (pixels, stored, halves):  # the last as --latents-dtype float16 stores them
        state = new_state({"weight": jnp.zeros((16,), jnp.float32)}, optimizer)
        results.append(step(state, frozen, batch, jax.random.key(0)))
    (state, expected), (again, found), (_, rounded) = results
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
        np.testing.assert_allclose(rounded[name], expected[name], rtol=1e-3)
    assert float(rounded["loss"]) != float(found["loss"])
    np.testing.assert_allclose(again.params["weight"], state.params["weight"], atol=1e-6)
    assert np.abs(np.asarray(state.params["weight"])).min() > 1e-3


def test_prepare_latents_leaves_targets_undecoded_that_nobody_looks_at(setup):
    section = next(s for s in setup.sources if s.task == "video_editing")
    clip = Clip((60, 60), 5, 4.0)
    sample = open_source(section, clip)[0]
    whole = open_source(dataclasses.replace(section, latents=False), clip)[0]
    assert sample.target.shape == (1, 60, 60, 3) and whole.target.shape == (5, 60, 60, 3)
    np.testing.assert_array_equal(sample.target, whole.target[:1])
    np.testing.assert_array_equal(sample.source, whole.source)


VIDEOS = [name for name, task in TASKS.items() if task.makes == "video"]


@pytest.fixture(scope="module")
def cut(setup, tmp_path_factory):
    """The video tasks of the setup from folders without the frames that latents replace."""
    folder, sections = tmp_path_factory.mktemp("cut"), []
    compute, computed = precompute.make_latents(setup, batch=4)
    for bucket in (b for b in setup.buckets if b.task in VIDEOS):
        drawn, clip = SourceSection("animations", task=bucket.task, count=COUNT), Clip(bucket.size, 5, bucket.fps)
        quiet = WriteConfig(progress=False, first_frame=True, source_frames=frames_of_source(clip, 2.0))
        options = {"compute": compute, "computed": computed}
        sources.prepare(drawn, folder / bucket.task, clip, quiet, setup.world, **options)
        sections.append(SourceSection("records", str(folder / bucket.task), bucket.task, latents=True))
    return dataclasses.replace(setup, sources=tuple(sections))


@pytest.mark.parametrize("task", VIDEOS)
def test_prepare_latents_without_the_frames_that_they_replace_is_the_same_batch(setup, cut, task):
    whole, first = (inputs.batches(only(which, task)) for which in (setup, cut))
    for _ in range(2):
        jax.tree.map(np.testing.assert_array_equal, next(whole), next(first))
    frames = []
    for which in (setup, cut):
        records = open_source(next(s for s in which.sources if s.task == task))
        rows = [records._parse(records._source[i]) for i in range(COUNT)]
        frames.append([(len(row["target"]), len(row["source"])) for row in rows])
    assert frames == (
        [[(5, 5)] * COUNT, [(1, 4)] * COUNT] if task == "video_editing" else [[(5, 0)] * COUNT, [(1, 0)] * COUNT]
    )
    with pytest.raises(UserError, match="the first frame of each target only: give this source latents=True, or"):
        inputs.batches(only(encoding(cut), task))
    (bucket,) = only(cut, task).shapes
    shown, full = (samples_of(Inputs(only(which, task)), bucket) for which in (cut, setup))
    assert [sample.prompt for sample in shown] == [sample.prompt for sample in full]
    for a, b in zip(shown, full, strict=True):
        np.testing.assert_array_equal(a.target, np.repeat(b.target[:1], 5, axis=0))


def test_prepare_latents_without_unread_frames_of_sources_draws_the_same_edit(setup, cut):
    edit, encoder = only(cut, "video_editing"), networks.autoencoder(setup)
    (bucket,) = edit.shapes
    given = []
    for which in (setup, cut):
        inputs_of = Inputs(only(which, "video_editing"))
        batch = inputs_of.examples(bucket, target=False).batch(samples_of(inputs_of, bucket))
        read = jax.jit(functools.partial(given_latents, encoder, frozen_of(setup)["vae"]))
        given.append((batch.pop("media"), read(batch["task"], batch).source))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *given)
    assert "source" not in batch and np.abs(given[0][1]).max() > 0.1


def test_prepare_latents_of_which_the_mllm_reads_other_frames_are_refused(cut):
    edit, message = (
        only(cut, "video_editing"),
        "only frames 0, 1, 2, 4 are stored, and this run's MLLM reads 0, 1, 2, 3;",
    )
    sample = open_source(next(s for s in edit.sources if s.task == "video_editing"))[0]
    examples = Inputs(edit).examples(edit.shapes[0], target=False)
    assert examples.media(sample)
    with pytest.raises(UserError, match=message):
        examples.media(dataclasses.replace(sample, arrays=sample.arrays | {SOURCE_FRAMES: np.asarray([0, 1, 2, 4])}))
    path, text = altered(cut, "video_editing", lambda recipe: recipe.update(source_frames=[0, 1, 2, 4]))
    with pytest.raises(UserError, match=f"{Path(path).parent}: of the source {message}"):
        inputs.batches(edit)
    Path(path).write_text(text)


def test_prepare_latents_takes_a_folder_that_holds_every_frame_as_it_is(setup):
    section = next(s for s in setup.sources if s.task == "text_to_video")
    before = {path.name: path.stat().st_mtime_ns for path in Path(section.path).iterdir()}
    compute, computed = precompute.make_latents(setup, batch=4)
    drawn, clip = SourceSection("animations", task="text_to_video", count=COUNT), Clip((60, 60), 5, 4.0)
    quiet = WriteConfig(progress=False, first_frame=True)
    again = sources.prepare(drawn, section.path, clip, quiet, setup.world, compute=compute, computed=computed)
    assert again == Path(section.path)
    assert {path.name: path.stat().st_mtime_ns for path in again.iterdir()} == before


def altered(setup, task, change):
    """The setup with the recipe of one task's records changed."""
    section = next(s for s in setup.sources if s.task == task)
    path = f"{section.path}/recipe.json"
    with open(path) as file:
        text = file.read()
    recipe = json.loads(text)
    change(recipe)
    with open(path, "w") as file:
        json.dump(recipe, file)
    return path, text


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("text_to_image", lambda r: r.update(computed={}), "holds no latents: write them with `metacanvas prepare"),
        ("text_to_image", lambda r: r["computed"]["autoencoder"].update(weights="ab"), 'made with weights "ab", this'),
        (
            "text_to_image",
            lambda r: r["computed"]["autoencoder"].update({"vae.whitening": 0.25}),
            r"made with vae\.whitening 0\.25, this run has 0\.5",
        ),
        (
            "text_to_image",
            lambda r: r["computed"]["autoencoder"].update({"dtype of weights": "bfloat16"}),
            'made with dtype of weights "bfloat16", this run has "float32"',
        ),
        ("text_to_image", lambda r: r["clip"].update(size=[72, 60]), r"those of 72x60, 1 frames, the bucket has 60x60"),
        (
            "image_to_video",
            lambda r: r["clip"].update(fps=8.0),
            r"5 frames at 8/s, the bucket has 60x60, 5 frames at 4/s",
        ),
    ],
)
def test_prepare_latents_of_another_making_are_refused_in_one_line(setup, task, change, message):
    inputs.batches(only(setup, task)).close()
    path, text = altered(setup, task, change)
    try:
        with pytest.raises(UserError, match=message) as caught:
            inputs.batches(only(setup, task))
        assert "\n" not in str(caught.value)
    finally:
        with open(path, "w") as file:
            file.write(text)


def test_prepare_latents_are_exact_whatever_a_run_computes_in_and_serve_it(setup):
    narrow = dataclasses.replace(setup, train=dataclasses.replace(setup.train, frozen_dtype="bfloat16"))
    inputs.batches(only(narrow, "text_to_image")).close()  # what float32 made
    sample = open_source(next(s for s in encoding(setup).sources if s.task == "text_to_image"), Clip((60, 60)))[0]
    made = {}
    for which, options in (("wide", {}), ("narrow", {}), ("as it trains", {"exact": False})):
        compute, about = precompute.make_latents(setup if which == "wide" else narrow, 1, **options)
        made[which] = compute([sample])[0]["latents"], about["autoencoder"]["dtype of weights"]
    np.testing.assert_array_equal(made["narrow"][0], made["wide"][0])
    assert np.abs(made["as it trains"][0] - made["wide"][0]).max() > 0
    assert [dtype for _, dtype in made.values()] == ["float32", "float32", "bfloat16"]
    half = dataclasses.replace(setup, vae=dataclasses.replace(KL_F8C16, dtype="bfloat16"))
    assert latents.exact(half).vae == KL_F8C16


def test_prepare_latents_of_other_weights_are_refused(setup, tmp_path):
    other = np.random.default_rng(1).integers(0, 256, (40, 60, 60, 3), dtype=np.uint8)
    saved.save(tmp_path / "vae", patch_pca.fit(other, setup.vae)[0], {})
    with pytest.raises(UserError, match="its latents were made with weights"):
        inputs.batches(only(dataclasses.replace(setup, vae_weights=str(tmp_path / "vae")), "text_to_image"))
    with pytest.raises(UserError, match="vae_weights is empty"):
        precompute.make_latents(dataclasses.replace(setup, vae_weights=""), 4)


def test_prepare_latents_of_the_wrong_shape_or_missing_name_the_sample(setup):
    bucket = next(b for b in setup.shapes if b.task == "image_editing")
    sample = open_source(next(s for s in setup.sources if s.task == "image_editing"), Clip((60, 60)))[0]
    examples = Inputs(setup).examples(bucket, stored=True)
    rng = np.random.default_rng(0)
    for arrays, message in (
        ({"latents": sample.arrays["latents"]}, "source_latents is missing, expected"),
        (sample.arrays | {"latents": np.zeros((1, 9, 10, 16), np.float32)}, r"latents is \[1, 9, 10, 16\], expected"),
    ):
        with pytest.raises(UserError, match=message):
            examples(dataclasses.replace(sample, arrays=arrays), rng)


def test_prepare_latents_are_wanted_of_all_sources_of_a_task_or_of_none(setup):
    one = next(s for s in setup.sources if s.task == "text_to_image")
    mixed = dataclasses.replace(setup, sources=(one, dataclasses.replace(one, latents=False)))
    with pytest.raises(UserError, match="some have latents=True and some False"):
        latents.stored(mixed, mixed.shapes[0])
    with pytest.raises(
        ValueError, match="latents are in records of `metacanvas prepare`, not in a source of kind 'jso"
    ):
        SourceSection("jsonl", "x", latents=True)
