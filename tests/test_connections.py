"""README's table of what connects: every MLLM with every DiT of the registry, each pair built in miniature."""

import dataclasses
import re

import pytest
from experiments_support import takes_a_step

from configs import base, tiny
from metacanvas_jax import registry
from metacanvas_jax.config.load import ROOT, load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.tasks import Bucket

MLLMS, DITS = registry.family("mllm"), registry.family("dit")
PAIRS = [(mllm, dit) for mllm in MLLMS for dit in DITS]


def written() -> dict[tuple[str, str], str]:
    """README's table: the text of a cell by the kinds of its row and of its column."""
    section = (ROOT / "README.md").read_text().partition("\n## What connects\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", section, re.M)
    head, _, *rows = ([cell.strip() for cell in line.split("|")] for line in lines)
    kinds = [re.findall(r"`(\w+)`", name) for name in head]
    cells = {}
    for first, *texts in rows:
        (mllm,) = re.findall(r"`(\w+)`", first)
        cells |= {(mllm, *dit): text for dit, text in zip(kinds[1:], texts, strict=True)}
    return cells


def pair(mllm: str, dit: str, task: str = ""):
    """A canvas between two tiny networks, on a task or on that which asks most of the DiT; all but the MLLM trains."""
    record = DITS[dit]
    config = load_config("configs/t2i_scratch.py:canvas", [])
    with config.ignore_type():
        config.mllm.kind = mllm
        network = record.config(**record.tiny)
        config.dit = base.section(network, kind=dit, **record.settings)
        if dit != "sana":  # whose text encoder the config has
            config.text, config.context_connector = None, base.context_connector()
        if getattr(network, "guidance", False):
            config.dit_guidance = record.pipeline.dit_guidance
        module = registry.module(network)
        most = "text_to_video" if module.videos else "image_editing" if module.references else "text_to_image"
        frames = 5 if (task or most) == "text_to_video" else 1
        config.buckets = base.buckets(Bucket(task or most, (512, 512), frames=frames))
        setup = experiment(tiny.shrink(config, "miniature"))
    return dataclasses.replace(setup, vae_weights="")  # the fitted autoencoder is a file


def test_the_table_is_the_product_of_all_mllms_and_all_dits():
    assert sorted(written()) == sorted(PAIRS)


def test_a_cell_names_shipped_configs_of_its_own_two_networks():
    named = {}
    for kinds, cell in written().items():
        for config in re.findall(r"`([\w:]+)`", cell):
            file, colon, variant = config.partition(":")
            setup = load_config(f"configs/{file}.py{colon}{variant}", [])
            assert (setup.mllm.kind, setup.dit.kind) == kinds, config
            named.setdefault(kinds, []).append(file)
    assert {file for files in named.values() for file in files} == {
        *("t2i_scratch", "t2i_lora", "image_editing", "flux2_klein", "qwen_image_edit", "video_stage3"),
    }


@pytest.mark.parametrize(("mllm", "dit"), PAIRS)
def test_every_pair_is_an_experiment_with_a_canvas(mllm, dit):
    setup = pair(mllm, dit)
    assert (setup.mllm.kind, type(setup.dit)) == (mllm, DITS[dit].config)
    assert setup.canvas is not None and (setup.text is None) != (dit == "sana")


def test_one_step_of_a_pair_that_no_shipped_config_trains():
    """Further steps of pairs of the table are in the gate by their configs (test_configs.py)."""
    setup = pair("qwen3_vl", "wan", "text_to_image")
    takes_a_step(setup, setup.shapes[0])


@pytest.mark.slow  # a program to compile for each
@pytest.mark.parametrize(("mllm", "dit"), PAIRS)
def test_one_step_of_every_pair_on_its_hardest_task(mllm, dit):
    setup = pair(mllm, dit)
    takes_a_step(setup, setup.shapes[0])
