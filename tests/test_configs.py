"""Every experiment of the paper is a config: it builds, trains what the paper trains, takes a step in miniature."""

import dataclasses
import importlib
import re

import jax
import numpy as np
import pytest
from experiments_support import FILES, build, miniature, shapes_of_a_step, takes_a_step, variants

from metacanvas_jax.config.load import ROOT, load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import sweeps
from metacanvas_jax.plan import document
from metacanvas_jax.plan.shipped import jobs, recommended
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, parameter_count, partition

ALL = [(file, variant) for file in FILES for variant in variants(file)]
# What trains, as the first parts of the parameters' paths.
TRAINED = {
    ("t2i_scratch", "canvas"): "canvas canvas_connector dit",
    ("t2i_scratch", "canvas_only"): "canvas canvas_connector dit",
    ("t2i_scratch", "text"): "dit",
    ("t2i_scratch", "metaquery"): "context_connector dit queries",
    ("t2i_scratch", "text_metaquery"): "context_connector dit queries",
    ("t2i_lora", "dit_lora"): "canvas canvas_connector dit/blocks",
    ("t2i_lora", "mllm_lora"): "canvas canvas_connector dit/blocks mllm/language",
    ("t2i_lora", "qwen3_vl_4b"): "canvas canvas_connector dit/blocks",
    ("image_editing", "canvas"): "canvas canvas_connector context_connector dit/double dit/pool mllm/language",
    ("image_editing", "no_canvas"): "context_connector dit/double dit/pool",
    ("image_editing", "ratios"): "canvas canvas_connector context_connector dit/double dit/pool mllm/language",
    ("qwen_image_edit", "canvas"): "canvas canvas_connector dit/blocks mllm/language",
    ("qwen_image_edit", "no_canvas"): "dit/blocks",
    ("qwen_image_edit", "ratios"): "canvas canvas_connector dit/blocks mllm/language",
    ("qwen_image_edit", "connector"): "canvas canvas_connector context_connector dit/blocks mllm/language",
    ("flux2_klein", "canvas"): "canvas canvas_connector context_connector dit/double dit/single mllm/language",
    ("flux2_klein", "no_canvas"): "context_connector dit/double dit/single",
    ("flux2_klein", "qwen3_vl_4b"): "canvas canvas_connector context_connector dit/double dit/single mllm/language",
    ("flux2_klein", "text_to_image"): "canvas canvas_connector context_connector dit/double dit/single mllm/language",
    ("video_stage1", "full"): "context_connector",
    ("video_stage2", "full"): "context_connector dit/blocks",
    ("video_stage3", "keyframes_3"): "canvas canvas_connector context_connector dit mllm/language",
    ("video_stage3", "keyframes_0"): "context_connector dit",
}
# And parameters that every one of them matches, below those parts.
WITHIN = {
    "t2i_lora": r"dit/.*_lora/[ab]|mllm/.*_lora/[ab]|canvas.*",
    "image_editing": r"dit/double/image/.*|dit/pool/.*|mllm/.*_lora/[ab]|c.*",
    "qwen_image_edit": r"dit/.*_lora/[ab]|mllm/.*_lora/[ab]|c.*",
    "flux2_klein": r"dit/.*_lora/[ab]|mllm/.*_lora/[ab]|c.*",
    "video_stage2": r"dit/blocks/cross/.*|context_connector/.*",
    "video_stage3": r"mllm/.*_lora/[ab]|dit/.*|c.*",
}


def sides(setup):
    return partition(param_shapes(setup), setup.train.rules)


@pytest.mark.parametrize("file", FILES)
def test_every_variant_builds_large_and_small_under_a_name_of_its_own(file):
    names = set()
    for variant in variants(file):
        for words in (variant, f"{variant}.miniature", f"{variant}.emoji"):
            setup = build(file, words)
            names.add(setup.name)
            assert {bucket.task for bucket in setup.shapes} == {source.task for source in setup.sources}
            assert np.isclose(sum(bucket.weight for bucket in setup.shapes), 1.0)
            large = setup.dit.dtype == "bfloat16" and setup.dit.remat != "none"
            assert large == (words == variant)
    assert len(names) == 3 * len(variants(file))


@pytest.mark.parametrize("asked", ["miniture", "canvas.text", "miniature.miniature", "emoji.miniature", "canvas."])
def test_a_wrong_variant_is_one_line_with_the_right_ones(asked):
    with pytest.raises(UserError, match="has the variants canvas, canvas_only") as caught:
        load_config(f"configs/t2i_scratch.py:{asked}", [])
    assert "\n" not in str(caught.value)


def test_the_numbers_of_the_paper():
    scratch, editing = build("t2i_scratch"), build("image_editing")
    one, two, three = build("video_stage1"), build("video_stage2"), build("video_stage3")
    rates = [setup.optimizer.learning_rate for setup in (scratch, editing, one, two, three)]
    assert rates == [1e-4, 1e-6, 1e-3, 2e-5, 1e-5]
    assert [setup.train.steps for setup in (scratch, editing, one, two, three)] == [
        20_000,
        90_000,
        100_000,
        15_000,
        10_000,
    ]
    optimizers = [setup.optimizer for setup in (scratch, editing, one, two, three)]
    warm = [(optimizer.warmup_steps, optimizer.warmup_from) for optimizer in optimizers]
    assert warm == [(300, 1e-5), (0, 0.0), (100, 0.0), (100, 0.0), (100, 0.0)]
    assert {(o.schedule, o.weight_decay, o.clip, o.b1, o.eps) for o in optimizers} == {
        ("constant", 0.0, 1.0, 0.9, 1e-8)
    }
    assert [optimizer.b2 for optimizer in optimizers] == [0.999, 0.99, 0.999, 0.999, 0.999]
    assert [(one.shapes[0].size, one.shapes[0].batch), (two.shapes[2].size, two.shapes[2].batch)] == [
        ((480, 832), 32 * 128),
        ((704, 1280), 3 * 128),
    ]
    assert [bucket.weight for bucket in (*one.shapes, *two.shapes)] == [0.8, 0.2, 0.16, 0.04, 0.8]
    assert {(b.frames, b.fps) for setup in (two, three) for b in setup.shapes if b.frames > 1} == {(121, 24.0)}
    assert {setup.mllm.image_tokens for setup in (editing, one, two, three)} == {144}
    assert [setup.canvas.shape for setup in (scratch, editing, three)] == [(1, 16, 16), (1, 32, 32), (3, 11, 20)]
    assert (scratch.train.batch, editing.train.batch) == (320, 64)
    shares = {bucket.task: (bucket.weight, bucket.batch // 128) for bucket in three.shapes}
    assert shares == {
        "text_to_image": (0.05, 16),
        "image_editing": (0.15, 16),
        "text_to_video": (0.15, 1),
        "image_to_video": (0.15, 1),
        "video_editing": (0.25, 1),
        "reference_to_video": (0.25, 1),
    }
    assert [build("video_stage3", f"keyframes_{k}").canvas.keyframes for k in (1, 3, 6, 11, 31)] == [1, 3, 6, 11, 31]
    assert (editing.mllm.language.lora.rank, editing.mllm.language.lora.dropout) == (64, 0.05)
    assert build("t2i_lora").dit.lora.rank == 32 and not build("t2i_lora", "no_rope").canvas.rope


@pytest.mark.parametrize("file", FILES)
def test_the_head_of_a_file_recommends_the_hardware_of_its_data(file):
    head = importlib.import_module(f"configs.{file}").__doc__
    for variant in variants(file):
        assert f"\nHardware:  {recommended(build(file, variant))}\n" in head
    assert build(file, f"{variant}.miniature").hardware == ()


FIRST = {job.name: job for job in reversed(jobs()) if ":" not in job.config}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_the_head_of_a_file_states_the_seconds_that_its_kept_plan_expects(name):
    head = importlib.import_module(f"configs.{name}").__doc__
    expected = document.kept(ROOT / "benchmarks" / "plans", document.name_of(FIRST[name]))[0].expected
    stated = re.search(r"\(expected: ([\d.]+) s a step", head)
    assert stated and stated[1] == f"{expected:.{2 if expected < 10 else 1}f}", f"{name}: {expected:.3f} s expected"


def test_the_page_of_experiments_names_all_of_the_paper_and_only_what_there_is():
    """Tables and figures with results or settings, every config file with its variants, every sweep."""
    page = (ROOT / "docs" / "experiments.md").read_text()
    first = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    tables, figures = (
        set(re.findall(r"\d+", " ".join(re.findall(rf"{kind} ([\d, ]+)", first)))) for kind in ("Table", "Fig.")
    )
    assert tables == {"3", "4", "5", "6", "7", "8", "9", "10", "13", "16"}
    assert figures == {"2", "3", "4", "5", "9", "10", "12", "16", "17"}
    named = re.findall(r"`(\w+)\.py:(\w+)`", page)
    assert named and all(variant in variants(file) for file, variant in named)
    assert set(FILES) <= set(re.findall(r"`(\w+)\.py", page))
    said = set(re.findall(r"[`:](\w+)`", page)) | {f"keyframes{number}" for number in re.findall(r"`(_\d+)`", page)}
    assert {variant for _, variant in ALL} - said <= {"full"}
    assert {path.stem for path in (ROOT / "configs" / "sweeps").glob("*.py")} <= set(re.findall(r"`(\w+)\.py`", page))


@pytest.mark.parametrize(("file", "variant"), TRAINED)
def test_what_trains_is_what_the_paper_trains(file, variant):
    trained = flat(sides(miniature(file, variant))[0])
    expected = TRAINED[file, variant].split()
    found = {next((part for part in expected if path == part or path.startswith(f"{part}/")), path) for path in trained}
    assert sorted(found) == expected
    if file in WITHIN:
        assert [path for path in trained if not re.fullmatch(WITHIN[file], path)] == []


@pytest.mark.parametrize(("file", "variant"), TRAINED)
def test_captions_are_dropped_where_sampling_uses_guidance_and_nowhere_else(file, variant):
    """The share is that of the large experiment, in its miniature too."""
    for spec in (f"configs/{file}.py:{variant}", f"configs/{file}.py:{variant}.miniature"):
        setup = experiment(load_config(spec, []))
        assert setup.data.caption_dropout == (0.0 if setup.sampler.guidance == 1.0 else 0.1)
        assert setup.data.canvas_dropout == 0.0


def test_a_step_has_the_shapes_of_its_batch():
    setup = miniature("video_stage3")
    buckets = [b for b in setup.shapes if b.task in ("image_to_video", "reference_to_video")]
    assert len(buckets) == 2
    for bucket in buckets:
        state, after, metrics = shapes_of_a_step(setup, bucket)
        assert jax.tree.map(lambda x: x.shape, after.params) == jax.tree.map(lambda x: x.shape, state.params)
        assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("file", "variant"),
    [("t2i_scratch", "text"), ("image_editing", "no_canvas"), ("qwen_image_edit", "canvas"), ("video_stage1", "full")],
)
def test_one_step_of_each_family(file, variant):
    setup = miniature(file, variant)
    takes_a_step(setup, setup.shapes[0])


@pytest.mark.slow  # a program to compile for each, 10 to 30 s
@pytest.mark.parametrize(("file", "variant"), ALL)
def test_one_step_of_every_config(file, variant):
    """Of every task for the first variant of a file, of the last task for the others."""
    setup = miniature(file, variant)
    for bucket in setup.shapes if variant == variants(file)[0] else setup.shapes[-1:]:
        takes_a_step(setup, bucket)


@pytest.mark.slow  # programs to compile
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("connector", "connector_ablation"),
        ("conditioning", "t2i_scratch"),
        ("adapters", "t2i_lora"),
        ("keyframes", "video_stage3"),
        ("positions", "t2i_lora"),
        ("learning_rate", "t2i_scratch"),
    ],
)
def test_one_step_of_every_point_of_every_sweep(name, config):
    """Points that differ in values of the optimizer, or not at all from a config's variant, share its program."""
    words = "text.miniature" if name == "learning_rate" else "miniature"
    for point in sweeps.read(ROOT / "configs" / "sweeps" / f"{name}.py", f"configs/{config}.py:{words}"):
        setup = dataclasses.replace(experiment(load_config(point.config, point.overrides)), vae_weights="")
        takes_a_step(setup, setup.shapes[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "variant", "trained", "frozen"),
    [
        ("t2i_scratch", "canvas", 1_773_414_688, 6_681_215_139),
        ("t2i_lora", "dit_lora", 209_344_128, 12_823_221_571),
        ("image_editing", "canvas", 3_809_855_488, 17_048_997_347),
        ("video_stage1", "full", 110_118_912, 13_996_643_036),
        ("video_stage3", "keyframes_3", 5_593_127_616, 8_996_855_324),
    ],
)
def test_parameters_at_full_size_without_a_file(file, variant, trained, frozen):
    found = [parameter_count(side) for side in sides(build(file, variant))]
    assert found == [trained, frozen]
