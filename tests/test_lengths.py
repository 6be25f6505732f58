"""Buckets that differ in the length of prompts alone: where samples go, what a run reads of them, what it draws in."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_size_support import QUIET
from evaluate_support import params
from experiments_support import FAST, build, miniature
from sources_support import encoded

from configs import base
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.check import check
from metacanvas_jax.config.identity import identity
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.networks import network
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.data import by_size, inputs, lengths, sorting
from metacanvas_jax.data.batch import mllm_inputs
from metacanvas_jax.data.examples import PaintExamples
from metacanvas_jax.data.samples import Sample
from metacanvas_jax.data.sources import open_source
from metacanvas_jax.data.tokenizer import save_tokenizer, train_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.evaluate.held_out import held_out
from metacanvas_jax.exchange.reading import reading
from metacanvas_jax.launch import training
from metacanvas_jax.mllm.canvas import write_canvas
from metacanvas_jax.paint import runs
from metacanvas_jax.paint.painter import Painter
from metacanvas_jax.paint.previews import samples_of
from metacanvas_jax.paint.requests import Request, sample_of
from metacanvas_jax.plan.planning import choose
from metacanvas_jax.tasks import Bucket, SortKey
from metacanvas_jax.train.agreement import check_same
from metacanvas_jax.train.job import fed_shapes, fingerprint, fit_config, make_job
from metacanvas_jax.train.store import describe
from metacanvas_jax.trees import flat

TASK = "text_to_image"
SQUARE, WIDE = (60, 60), (48, 72)
SHORT, LONG = 16, 24  # tokens
KEYS = SortKey(SQUARE, SHORT), SortKey(SQUARE, LONG), SortKey(WIDE)
BUCKETS = (
    Bucket(TASK, SQUARE, length=LONG, batch=8, by_length=True),
    Bucket(TASK, WIDE, length=LONG, batch=8),
    Bucket(TASK, SQUARE, length=SHORT, batch=8, by_length=True),
)
ROWS = [  # sides of the picture, tokens of the whole prompt, where it belongs
    *((SQUARE, tokens, KEYS[0]) for tokens in (5, 9, SHORT - 1, SHORT, SHORT)),
    *((SQUARE, tokens, KEYS[1]) for tokens in (SHORT + 1, LONG)),
    (SQUARE, LONG + 9, KEYS[1]),  # fits nowhere: the longest, which cuts it
    *((WIDE, tokens, KEYS[2]) for tokens in (7, 20, LONG)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """``rows``, and ``out``, in which they are sorted; row n has pixels n. ``tokenizer`` has a token for every word."""
    place = tmp_path_factory.mktemp("lengths")
    save_tokenizer(train_tokenizer(["red"]), place / "tokenizer")
    around = inputs.prompter(run(place)).texts([""])[0].tokens.size
    (place / "rows").mkdir()
    rows = []
    for number, (sides, tokens, _) in enumerate(ROWS):
        (place / "rows" / f"{number}.png").write_bytes(encoded(number, size=sides))
        rows.append({"target": f"{number}.png", "prompt": " ".join(["red"] * (tokens - around))})
    (place / "rows" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sort(place, place / "out")
    return place


def run(place, buckets=BUCKETS, out="out", **changes):
    """SANA in miniature on a sorted source, with random weights."""
    setup = miniature("t2i_scratch", "lengths")
    mllm = dataclasses.replace(setup.mllm, tokenizer=str(place / "tokenizer"))
    text = dataclasses.replace(setup.text, tokenizer=str(place / "tokenizer"))
    source = SourceSection("records", str(place / out), TASK, by_size=True, **changes)
    return dataclasses.replace(setup, mllm=mllm, text=text, buckets=buckets, sources=(source,))


def sort(place, out, buckets=BUCKETS, setup=None):
    setup = run(place) if setup is None else setup
    measured = lengths.Lengths(inputs.prompter(setup), buckets, setup.mllm.video_fps)
    source = SourceSection("jsonl", str(place / "rows"), TASK)
    return sorting.sort(source, out, sorting.chosen(buckets, TASK), QUIET, lengths=measured)


@pytest.fixture(scope="module")
def setup(place):
    return run(place)


def test_each_sample_is_once_in_the_folder_of_the_shortest_length_that_its_prompt_fits(place, setup):
    found = {}
    for key in KEYS:
        source = open_source(SourceSection("records", str(place / "out" / key.name), TASK))
        for sample in (source[i] for i in range(len(source))):
            number = int(sample.target.flat[0])
            assert number not in found and sample.target.shape == (1, *key.size, 3)
            found[number] = key
    assert found == {number: key for number, (_, _, key) in enumerate(ROWS)}
    folders = {path.name for path in (place / "out").iterdir() if path.is_dir()}
    assert folders == {"60x60-16", "60x60-24", "48x72"}
    assert by_size.read(place / "out").samples == {KEYS[0]: 5, KEYS[1]: 3, KEYS[2]: 3}


def test_one_length_of_a_size_is_sorted_as_ever(place, tmp_path):
    plain = tuple(dataclasses.replace(one, by_length=False) for one in BUCKETS[:2])
    out = sort(place, tmp_path / "out", plain)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"60x60", "48x72"}
    recipe = json.loads((out / "sizes.json").read_text())["recipe"]
    assert recipe["sizes"] == [[48, 72], [60, 60]] and not {"lengths", "prompts"} & recipe.keys()
    with pytest.raises(
        UserError, match=r"no folder 60x60-24, which the bucket of 60 x 60 pixels and 24 tokens reads; "
    ):
        inputs.opened(run(place, out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"another sorted source \(it differs in sizes, lengths, prompts\)"):
        sort(place, out)


def test_media_count_as_training_pads_them(place):
    setup, words, rng = miniature("video_stage3"), "red red", np.random.default_rng(0)
    mllm = dataclasses.replace(setup.mllm, tokenizer=str(place / "tokenizer"))
    prompter = inputs.prompter(dataclasses.replace(setup, mllm=mllm))
    for bucket in setup.shapes:
        bucket = dataclasses.replace(bucket, by_length=True, length=400)
        video = rng.integers(0, 256, (bucket.frames, *bucket.size, 3), np.uint8)
        references = tuple(video[:1]) * bucket.references
        sample = Sample(words, video, task=bucket.task, source=video, references=references)
        read = PaintExamples(prompter, bucket, video_fps=setup.mllm.video_fps)(sample)
        assert lengths.Lengths(prompter, [bucket], setup.mllm.video_fps).of(words, bucket.size) == read["mask"].sum()


def test_a_bucket_is_drawn_as_often_as_it_has_samples_and_steps_resume_without_a_prompt_cut(place, setup, caplog):
    names = [one.name for one in inputs.opened(setup)]
    assert names == ["text_to_image 1x60x60, 24 tokens", "text_to_image 1x48x72", "text_to_image 1x60x60, 16 tokens"]
    assert list(fed_shapes(setup)) == names
    weights = {bucket.key: bucket.weight for bucket in by_size.buckets(setup)}
    assert weights == pytest.approx({KEYS[0]: 3 * 5 / 11, KEYS[1]: 3 * 3 / 11, KEYS[2]: 3 * 3 / 11})
    short = dataclasses.replace(setup, buckets=BUCKETS[2:])
    drawn = [numbers(next(inputs.batches(short))) for _ in range(3)]
    assert {n for _, some in drawn for n in some} == set(range(5)) and "loses its last words" not in caplog.text

    stream = inputs.batches(setup)
    drawn = [numbers(next(stream)) for _ in range(20)]
    assert {shape for shape, _ in drawn} == {(SQUARE, SHORT), (SQUARE, LONG), (WIDE, LONG)}
    again = inputs.batches(setup)
    assert [numbers(next(again)) for _ in range(7)] == drawn[:7]
    resumed = inputs.batches(setup)
    resumed.set_state(json.loads(json.dumps(again.get_state())))
    assert [numbers(next(resumed)) for _ in range(13)] == drawn[7:]


def numbers(batch):
    """Size and length of a batch, and the numbers of its samples."""
    return (batch["pixels"].shape[2:4], batch["tokens"].shape[1]), batch["pixels"][:, 0, 0, 0, 0].tolist()


def test_what_is_drawn_has_the_longest_length_and_samples_of_all(place, setup):
    whole = dataclasses.replace(BUCKETS[0], by_length=False, weight=2.0)
    assert setup.drawn == (whole, BUCKETS[1]) and setup.sizes_of(TASK) == (SQUARE, WIDE)
    assert sample_of(setup, Request("red"))[1].length == LONG
    assert [shape["length"] for shape in reading(setup)["shapes"]] == [LONG, LONG]
    assert Painter(setup).inputs.examples(setup.drawn[0]).bucket.length == LONG
    (shown,) = by_size.looked_at(setup)
    assert dataclasses.replace(shown, weight=2.0) == whole and shown.weight == pytest.approx(3 * 8 / 11)
    assert [int(sample.target.flat[0]) for sample in samples_of(inputs.Inputs(setup), shown)] == [0, 1, 2, 3]
    kept = run(place, validation=0.2)
    records = held_out(kept, by_size.looked_at(kept)[0])
    held = {int(records[i].target.flat[0]) for i in range(len(records))}
    assert held & set(range(5)) and held & {5, 6, 7} and held <= set(range(8))
    assert [key.name for key in by_size.read(place / "out").read_by([shown.key])] == ["60x60-16", "60x60-24"]
    assert [one.count for one in inputs.opened(run(place, (whole, BUCKETS[1])))] == [8, 3]


def test_the_plan_is_that_of_the_longest_prompts():
    assert choose((BUCKETS[2], BUCKETS[0]), None) == choose((BUCKETS[0], BUCKETS[2]), None) == [BUCKETS[0]]


def test_older_checkpoints_agree_and_the_buckets_of_a_run_must_stay(place, setup, tmp_path):
    assert all("by_length" not in bucket for bucket in identity(build("image_editing", "ratios"))["buckets"])
    assert [bucket.get("by_length") for bucket in identity(setup)["buckets"]] == [True, None, True]
    saved = json.loads(json.dumps(description(setup)))
    check_same(saved, description(run(place)), "run")
    other = (*BUCKETS[:2], dataclasses.replace(BUCKETS[2], length=SHORT + 1))
    sort(place, tmp_path / "out", other)
    with pytest.raises(UserError, match=r"sizes\.json of sources\[0\] was \[.*'60x60-16: 5 samples.*'60x60-17: 6 samp"):
        check_same(saved, description(run(place, out=tmp_path / "out")), "run")


def description(setup):
    return describe(fingerprint(make_job(setup), fit_config(setup)))


def test_a_run_whose_prompts_have_other_lengths_is_refused(place, setup, tmp_path):
    mllm = dataclasses.replace(setup.mllm, system="Paint.")
    with pytest.raises(UserError, match=r"out: its prompts of 60x60 were sorted with \d+ tokens around the words, and"):
        inputs.opened(dataclasses.replace(setup, mllm=mllm))
    save_tokenizer(train_tokenizer(["red", "car"]), tmp_path / "other")
    mllm = dataclasses.replace(setup.mllm, tokenizer=str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"sorted by the tokens of another tokenizer than .*other; sort the samples for"
    ):
        inputs.opened(dataclasses.replace(setup, mllm=mllm))
    sort(place, tmp_path / "out", setup=dataclasses.replace(setup, mllm=dataclasses.replace(setup.mllm, system="Go")))
    inputs.opened(
        dataclasses.replace(setup, sources=run(place, out=tmp_path / "out").sources)
    )  # prompts are shorter now, and fit


def test_configs_that_contradict_themselves_are_refused(place, setup):
    twice = (*BUCKETS, dataclasses.replace(BUCKETS[0], by_length=False))
    with pytest.raises(UserError, match="two buckets of text_to_image have 60 x 60 pixels; with by_size each needs a"):
        check(dataclasses.replace(setup, buckets=twice))
    with pytest.raises(UserError, match="two buckets of text_to_image have 60 x 60 pixels and 24 tokens; with by_size"):
        check(dataclasses.replace(setup, buckets=(*BUCKETS, BUCKETS[0])))
    with pytest.raises(
        UserError, match=r"buckets\[0\]\.by_length is True, but prompts of data/x are not sorted by len"
    ):
        check(dataclasses.replace(setup, sources=(SourceSection("records", "data/x", TASK),)))
    text = build("t2i_scratch", "text.miniature")
    with pytest.raises(UserError, match=r"buckets\[0\]\.by_length has no effect: no canvas, queries or context"):
        check(dataclasses.replace(text, buckets=(dataclasses.replace(text.shapes[0], by_length=True),)))
    with pytest.raises(ValueError, match="need lengths"):
        source = SourceSection("jsonl", str(place / "rows"))
        sorting.sort(source, place / "never", sorting.chosen(BUCKETS, TASK), QUIET)
    check(setup)


def test_the_shipped_variants_are_sorted_by_length_and_else_the_same():
    for file, first in (("t2i_scratch", "canvas"), ("t2i_lora", "dit_lora")):
        one, several = build(file, first), build(file, "lengths")
        assert several.drawn == one.shapes and [bucket.length for bucket in several.shapes] == [96, 160, 256]
        same = {"name": one.name, "buckets": one.buckets, "sources": one.sources}
        assert dataclasses.replace(several, **same) == one
        small = miniature(file, "lengths")
        assert [bucket.length for bucket in small.shapes] == [96, 160] and small.drawn == miniature(file, first).shapes


def test_a_prompt_has_the_same_states_in_a_bucket_of_either_length(setup):
    bare = dataclasses.replace(setup, text=None)
    weights = {"params": {name: jax.tree.map(jnp.asarray, params(setup)[name]) for name in ("mllm", "canvas")}}
    sample = Sample("red red red red", np.zeros((1, *SQUARE, 3), np.uint8))

    def written(model, batch):
        context = model.read(mllm_inputs(batch))
        return context.hidden, write_canvas(model.mllm, model.canvas(), context, model.canvas.config)

    def states(batch):
        return network(bare).apply(weights, batch, method=written)

    read = []
    for bucket in (BUCKETS[2], BUCKETS[0]):
        batch = inputs.Inputs(bare).examples(bucket).batch([sample])
        batch.pop("pixels"), batch.pop("task")
        hidden, canvas = jax.jit(states).lower(batch).compile(compiler_options=FAST)(batch)
        assert hidden.shape[1] == bucket.length
        read.append((hidden[batch["mask"]], canvas))
    for short, long in zip(*(jax.tree.leaves(one) for one in read), strict=True):
        assert jnp.abs(short).max() > 0.01
        np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-6)


def test_sorting_on_the_command_line_writes_a_folder_per_length(place, tmp_path, capsys):
    config = config_file(tmp_path)
    command = ["prepare", "--source", "jsonl", "--path", str(place / "rows"), "--by-bucket", "--config", config]
    command += ["--out", str(tmp_path / "out"), f"--config.mllm.tokenizer={place / 'tokenizer'}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "11 samples in 3 of 4 buckets\n" in said and "no sample belongs to 60x60-40, which get no folder" in said
    for line in ("60x60-16           6\n", "60x60-24           4\n", "60x60-33           1\n"):
        assert line in said
    assert main(["prepare", "--verify", str(tmp_path / "out")]) == 0
    assert "11 samples, all as written: 60x60-16 (6), 60x60-24 (4), 60x60-33 (1)" in capsys.readouterr().out


def config_file(folder):
    path = folder / "mine.py"
    path.write_text(
        "from configs import base, t2i_scratch\nfrom metacanvas_jax.tasks import Bucket\n\n\n"
        "def get_config(variant=''):\n"
        "    config = t2i_scratch.get_config('lengths.miniature')\n"
        "    config.buckets = base.lengths(Bucket('text_to_image', (60, 60)), (16, 24, 33, 40))\n"
        "    return config\n"
    )
    return str(path)


@pytest.mark.slow
def test_a_miniature_trains_on_both_lengths_and_continues_to_the_same_bits(place, tmp_path):
    def train(folder, steps):
        config = load_config(config_file(tmp_path), [])
        with config.ignore_type():
            config.mllm.tokenizer = config.text.tokenizer = str(place / "tokenizer")
            config.vae_weights = ""
            config.buckets = base.buckets(BUCKETS[0], BUCKETS[2])
            config.sources = base.sources(SourceSection("records", str(place / "out"), TASK, by_size=True))
            config.train.update({"steps": steps, "checkpoint_every": 2, "preview_every": 0, "evaluate_every": 0})
        return training.train(config, folder, progress=False)

    stream = inputs.batches(train(tmp_path / "whole", 4))
    assert [stream.bucket(step) for step in (2, 3)] == [BUCKETS[0].name, BUCKETS[2].name]
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 4)
    whole, parts = (flat(runs.load(tmp_path / name).params) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for path in whole:
        np.testing.assert_array_equal(np.asarray(whole[path]), np.asarray(parts[path]), err_msg=path)
