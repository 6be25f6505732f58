"""Drawing gives the networks the same arrays as training, for every part of a sample that both have."""

import dataclasses

import numpy as np
import pytest
from tasks_support import VOCABULARY, bucket, sample

from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import inputs
from metacanvas_jax.data.pipeline import PipelineConfig, pipeline
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.paint.sampling import Painted
from metacanvas_jax.tasks import RECONSTRUCT, TASKS

NEAR = 6.0  # frames a second of a row that says otherwise than its bucket


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A DiT with a text encoder of its own, whose tokenizer has no token for the beginning, beside an MLLM."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([*VOCABULARY, "paint it"]), folder)
    options = [f"--config.{section}.tokenizer={folder}" for section in ("mllm", "text")]
    options += ["--config.text.instruction=True", "--config.text.length=8", "--config.mllm.language.vocab=2048"]
    return experiment(load_config("configs/connector_ablation.py:full.miniature", options))


@pytest.fixture
def drawn(setup, monkeypatch):
    """``drawn(samples, bucket)``: the batch that a painter is given, and the empty one for guidance."""

    def read(samples, shape):
        def paint(params, batch, empty, key):
            read.seen = batch, empty
            return Painted(np.zeros((len(batch["tokens"]), shape.frames, *shape.size, 3), np.float32), None)

        painter = Painter(setup)
        monkeypatch.setattr(painter, "_compiled", lambda *_: paint)
        monkeypatch.setattr(painter, "_check", lambda *_: None)  # it asks for no parameters
        painter.paint({}, samples, shape, seed=0)
        batch, empty = read.seen
        return {k: v for k, v in batch.items() if hasattr(v, "shape")}, batch.get("media", ()), empty

    return read


def trained(setup, samples, shape):
    """The batch of a training step."""
    examples = (
        inputs.Inputs(setup).examples(shape) if hasattr(inputs, "Inputs") else inputs.paint_examples(setup, shape)
    )
    batch = examples.collate([examples(one, np.random.default_rng(0)) for one in samples])
    return {k: v for k, v in batch.items() if hasattr(v, "shape")}, batch.get("media", ())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("prompt", ["a cat and a dog", ""])
def test_drawing_reads_what_training_reads(setup, drawn, task, prompt):
    # The row has another rate than the bucket, and the words of the two prompts of a batch differ.
    samples = [
        dataclasses.replace(sample(task, 0), prompt=prompt, fps=NEAR),
        dataclasses.replace(sample(task, 1), fps=NEAR),
    ]
    samples = [dataclasses.replace(one, references=one.references[:2]) for one in samples]
    here, media, _ = drawn(samples, bucket(task))
    there, expected = trained(setup, samples, bucket(task))
    if not prompt:  # what a user asks for has the instruction, what training left without words has not
        assert here["text_mask"][0].sum() > there["text_mask"][0].sum()
        for name in ("text_tokens", "text_mask"):
            here[name], there[name] = here[name][1:], there[name][1:]
    for name, array in here.items():
        if name == "pixels":  # of an unknown target, the first frame
            array, there[name] = array[:, :1], there[name][:, :1]
        np.testing.assert_array_equal(array, there[name], name)
    assert {"tokens", "positions", "mask", "text_tokens", "text_mask"} <= here.keys()
    assert [one.grid for one in media] == [one.grid for one in expected]
    for one, other in zip(media, expected, strict=True):
        np.testing.assert_array_equal(one.patches, other.patches)
        np.testing.assert_array_equal(one.slots, other.slots)


def test_guidance_leads_away_from_what_training_reads_without_words(setup, drawn):
    for task in ("text_to_image", "reconstruction", "image_editing"):
        one = sample(task)
        _, _, empty = drawn([one], bucket(task))
        there, _ = trained(setup, [dataclasses.replace(one, prompt="")], bucket(task))
        np.testing.assert_array_equal(empty.tokens, there["tokens"])
        np.testing.assert_array_equal(empty.text.tokens, there["text_tokens"])
        np.testing.assert_array_equal(empty.text.mask, there["text_mask"])
        assert empty.text.mask.any(axis=1).all()


def test_drawing_cuts_a_long_prompt_as_training_does_and_says_so(setup, drawn, caplog):
    long = dataclasses.replace(sample("text_to_image"), prompt="a cat and a dog " * 40)
    shape = bucket("text_to_image", length=32)
    here, _, _ = drawn([long], shape)
    np.testing.assert_array_equal(here["tokens"], trained(setup, [long], shape)[0]["tokens"])
    assert "loses its last words, the bucket's length is 32" in caplog.text


def test_a_reconstruction_has_its_own_prompt_before_captions_are_dropped(setup):
    scenes = tuple(SourceSection("scenes", task=task, count=8) for task in ("reconstruction", "text_to_image"))
    setup = dataclasses.replace(setup, sources=scenes)
    (again,), (new,) = (inputs.sources_of(setup, bucket(section.task)) for section in scenes)
    assert len(again.records) == len(new.records) == 8
    assert again.records[0].prompt == RECONSTRUCT != new.records[0].prompt
    batches = pipeline([again], PipelineConfig(1, caption_dropout=0.5), lambda samples: samples[0].prompt)
    assert {next(stream) for stream in [iter(batches)] for _ in range(20)} == {"", RECONSTRUCT}
