"""Exported runs in PyTorch: the same latents as here, files that other libraries read, and never half a folder."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_support import CHANNELS, LENGTH, QUIET, draw, is_mllm_adapter, save_run, snapshot
from ml_collections import ConfigDict
from PIL import Image
from vae_support import FAST_COMPILE

from metacanvas_jax.config import networks, read
from metacanvas_jax.config.load import write_config
from metacanvas_jax.data.inputs import prompter
from metacanvas_jax.data.transforms import fit_image
from metacanvas_jax.diffusion.guidance import classifier_free, pair
from metacanvas_jax.diffusion.samplers import sample
from metacanvas_jax.dit.flux import table as flux
from metacanvas_jax.dit.sana import table as sana
from metacanvas_jax.dit.wan import table as wan
from metacanvas_jax.errors import UserError
from metacanvas_jax.exchange import export_run as module
from metacanvas_jax.exchange.export_run import Options, export_run
from metacanvas_jax.mllm.media import read_image
from metacanvas_jax.mllm.qwen2_5_vl import table as qwen2_5_vl
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.tasks import clean_first_levels, replace_first_frame
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Given as Conditions
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import under

pytest_plugins = "exported_support"
pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("peft", reason="needs the [torch] extra")

TABLES = {"sana": sana.table, "flux": flux.table, "wan": wan.table}
GRIDS = {"sana": (1, 4, 6), "flux": (1, 4, 8), "wan": (3, 4, 6)}
PROMPTS = ["a red cat", "a blue house, painted"]


def picture():
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 84, 3), np.uint8))


def whole(config, leaves, base, backbone):
    """All parameters: what trained, and the frozen networks as imported from their folders."""
    setup = read.experiment(config)
    frozen = flat(partition(param_shapes(setup), setup.train.rules)[1])
    params = dict(leaves)
    mllm = MllmConfig(setup.mllm.language, setup.mllm.vision)
    for source, table in (
        (config.mllm.weights, under(qwen2_5_vl.table(mllm), "mllm/")),
        (base, under(TABLES[backbone](setup.dit), "dit/")),
    ):
        kept = [entry for entry in table if entry.path in frozen]
        if kept:
            structs = nested({entry.path: frozen[entry.path] for entry in kept})
            skip = [name for e in table if e.path not in frozen for i in e.tensors for name in e.names(i)]
            params |= flat(load_params(source, kept, structs, ignore=skip, progress=False))
    return nested(params)


def jax_latents(config, params, backbone, noise, given, image):
    """``latents(params, canvas)``: what this project's own sampler paints."""
    setup = read.experiment(config)
    model, prompts = networks.network(setup), prompter(setup)
    size = tuple(6 * side for side in noise.shape[2:4])
    media = [] if image is None else [read_image(fit_image(image, size), prompts.config.media)]
    inputs, empty = (
        jax.tree.map(jnp.asarray, prompts.batch([prompts([*media, text]) for text in texts], length=LENGTH))
        for texts in (PROMPTS, ["", ""])
    )
    schedule = setup.sampler.make(int(np.prod(noise.shape[1:4])) // int(np.prod(model.dit.patch)))

    def plan(params, inputs):
        context = model.apply({"params": params}, inputs, method="read")
        return model.apply({"params": params}, context, method="plan")

    def follow(params, plan, empty):
        variables, conditions = {"params": params}, Conditions()
        if backbone == "flux":
            conditions = Conditions(reference=(given,))
        if backbone == "wan":
            marked = jnp.concatenate([given, jnp.ones_like(given[..., :1])], axis=-1)
            rest = jnp.zeros((2, noise.shape[1] - 1, *noise.shape[2:4], CHANNELS + 1))
            conditions = Conditions(channels=jnp.concatenate([marked, rest], axis=1))

        def velocity(z, time):
            if backbone == "wan":
                z, time = replace_first_frame(z, given), clean_first_levels(time, z.shape[1])
            return model.apply(variables, z, time, plan, conditions, method="velocity")

        if setup.sampler.guidance != 1.0:
            both = pair(plan, empty)
            velocity = classifier_free(
                lambda z, time: model.apply(variables, z, time, both, method="velocity"), setup.sampler.guidance
            )
        latents = sample(velocity, noise, schedule, setup.sampler.method)
        return replace_first_frame(latents, given) if backbone == "wan" else latents

    plan, follow = (jax.jit(function, compiler_options=FAST_COMPILE) for function in (plan, follow))

    def paint(params, canvas):
        plans = [plan(params, inputs), plan(params, empty)]
        return follow(params, *(p if canvas else p.replace(canvas=None) for p in plans))

    return paint


@pytest.mark.parametrize("backbone", ["sana", "flux", "wan"])
def test_exported_run_paints_the_same_latents_in_torch(exported, backbone):
    from metacanvas_jax.dit.torch_side import Given
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    config, leaves, _, folder, base = exported(backbone)
    noise = draw(2, *GRIDS[backbone], CHANNELS, seed=1)
    image = None if backbone == "sana" else picture()
    sides = {"flux": (1, 2, 6), "wan": (1, *GRIDS["wan"][1:]), "sana": (1, 1, 1)}[backbone]
    given = draw(2, *sides, CHANNELS, seed=2)
    params = whole(config, leaves, base, backbone)
    silent = nested({path: 0 * x if is_mllm_adapter(path) else x for path, x in flat(params).items()})
    paint = jax_latents(config, params, backbone, jnp.asarray(noise), jnp.asarray(given), image)

    transformer = None if backbone == "sana" else base
    pipeline = MetaCanvasPipeline.from_pretrained(folder, transformer=transformer)
    first = torch.from_numpy(given).movedim(-1, 1)
    read = {"sana": Given(), "flux": Given(source=first), "wan": Given(first=first)}[backbone]
    found = {}
    for canvas in (True, False):
        for gate, ours in (("canvas", params), ("nowhere", silent)):
            pipeline.mllm.gate = gate
            theirs = pipeline(
                PROMPTS,
                image,
                canvas=canvas,
                latents=torch.from_numpy(noise).movedim(-1, 1),
                given=read,
                output="latent",
            )
            found[canvas, gate] = theirs.movedim(1, -1).numpy()
            np.testing.assert_allclose(found[canvas, gate], paint(ours, canvas), atol=1e-4, err_msg=(canvas, gate))
    assert np.abs(found[True, "canvas"] - found[False, "canvas"]).max() > 1e-2, "the canvas changes nothing"
    assert np.abs(found[True, "canvas"] - found[True, "nowhere"]).max() > 1e-3, "the adapters change nothing"


def test_exported_raw_parameters_in_bfloat16_and_shards(exported, tmp_path):
    from safetensors.torch import load_file

    _, leaves, run, _, _ = exported("sana")
    export_run(run, tmp_path / "out", Options(dtype="bfloat16", ema=False, shard_bytes=3e4, progress=False))
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors = {}
    for name in set(index["weight_map"].values()):
        tensors |= load_file(folder / name)
    assert len(set(index["weight_map"].values())) > 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    expected = torch.from_numpy(2 * leaves["dit/out/kernel"]).T.to(torch.bfloat16)
    assert torch.equal(tensors["proj_out.weight"], expected)
    about = json.loads((tmp_path / "out" / "metacanvas.json").read_text())
    assert (about["step"], about["ema"], about["dtype"]) == (7, False, "bfloat16")


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "null": lambda data: b"null",
    "an empty object": lambda data: b"{}",
    "nested": lambda data: b'{"a":' * 100_000,
    "another type": lambda data: re.sub(rb": (\d+|null|\{|\[)", b': "x", "y": \\1', data, count=9),
}


DESCRIPTIONS = ("metacanvas.json", "connector/config.json", "mllm_lora/adapter_config.json", "transformer/config.json")
WEIGHTS = ("connector/model.safetensors", "mllm_lora/adapter_model.safetensors")
WEIGHTS += ("transformer_lora/pytorch_lora_weights.safetensors",)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(DESCRIPTIONS, ("cut", "an empty object", "another type")),
        *itertools.product(WEIGHTS, ("cut", "empty")),
        *(("metacanvas.json", "nested"), ("connector/config.json", "null"), ("tokenizer/tokenizer.json", "cut")),
    ],
)
def test_a_damaged_export_is_one_line_in_torch(exported, tmp_path, name, damage):
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    _, _, _, folder, _ = exported("sana")
    shutil.copytree(folder, tmp_path / "out")
    data = DAMAGES[damage]((folder / name).read_bytes())
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        MetaCanvasPipeline.from_pretrained(tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value) and "\n" not in str(caught.value)


def test_an_imported_base_is_named_and_not_exported_again(exported, qwen, tmp_path):
    from metacanvas_jax.exchange.import_model import import_model

    config, leaves, _, _, _ = exported("sana")
    config = config.copy_and_resolve_references()
    config.mllm.weights = str(import_model(qwen / "qwen", tmp_path / "imported"))
    save_run(tmp_path / "run", config, leaves)
    out = export_run(tmp_path / "run", tmp_path / "out", QUIET)
    index = json.loads((out / "metacanvas.json").read_text())
    assert (index["mllm"]["folder"], index["mllm"]["base"]) == (None, str(qwen / "qwen"))
    assert not (out / "mllm").exists()
    assert "Apache-2.0" in (out / "README.md").read_text()


def test_an_export_says_in_which_dtype_the_run_computed_and_frozen_weights_are_rounded_to_theirs(exported, qwen):
    from metacanvas_jax.torch_export.load import Finder, read_index

    _, _, _, folder, _ = exported("flux")
    index = read_index(folder)
    assert set(index["computed"].values()) == {"float32"}
    assert {"transformer", "mllm", "frozen_weights"} <= index["computed"].keys()
    index["computed"]["frozen_weights"] = "bfloat16"
    mllm = Finder(folder, index, None, torch.float32, torch.device("cpu")).mllm(None)
    for parameter in mllm.net.parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, parameter.bfloat16().float(), atol=0, rtol=0)


def interrupt(*_):
    raise KeyboardInterrupt


def full_disk(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [(interrupt, KeyboardInterrupt, "^$"), (full_disk, UserError, "No space left on device; nothing was written")],
)
def test_an_interrupted_export_of_a_run_leaves_nothing(exported, tmp_path, monkeypatch, action, error, message):
    _, _, run, _, _ = exported("sana")
    monkeypatch.setattr(module, "model_card", action)  # the last thing but one that is written
    with pytest.raises(error, match=message):
        export_run(run, tmp_path / "out", QUIET)
    assert snapshot(tmp_path) == []


def test_export_refuses_what_it_cannot_do_and_says_why(exported, tmp_path):
    _, _, run, folder, _ = exported("sana")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="not an empty folder; nothing was written"):
        export_run(run, folder, QUIET)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match=r"no config\.json"):
        export_run(tmp_path / "nothing", tmp_path / "out", QUIET)
    with pytest.raises(UserError, match="no complete checkpoint of step 3"):
        export_run(run, tmp_path / "out", Options(step=3))
    with pytest.raises(UserError, match="dtype is 'int8'"):
        Options(dtype="int8")
    assert snapshot(tmp_path) == []


def test_export_refuses_a_checkpoint_of_another_config(exported, tmp_path):
    _, _, run, _, _ = exported("sana")
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["canvas"]["spacing"] = 3.0
    write_config(ConfigDict(config), tmp_path / "run")
    with pytest.raises(UserError, match=r"of another config: canvas\.spacing was 2\.0, is 3\.0"):
        export_run(tmp_path / "run", tmp_path / "out", QUIET)
    assert snapshot(tmp_path) == ["run"]


def test_a_missing_base_is_named(exported, tmp_path):
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    _, _, _, folder, _ = exported("flux")
    shutil.copytree(folder, tmp_path / "export")
    folder, index = tmp_path / "export", json.loads((folder / "metacanvas.json").read_text())
    index["transformer"] |= {"folder": None, "base": ""}  # as of a run on a published transformer
    (folder / "metacanvas.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="needs a base that is not part of it: pass transformer=FOLDER"):
        MetaCanvasPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=r"nowhere has no config\.json"):
        MetaCanvasPipeline.from_pretrained(folder, transformer=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metacanvas\.json in it"):
        MetaCanvasPipeline.from_pretrained(tmp_path)


def test_damaged_checkpoints_are_not_exported(exported, tmp_path):
    _, _, run, _, _ = exported("sana")
    shutil.copytree(run, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "7" / "ema").rglob("d/*"):
        blob = bytearray(file.read_bytes())
        blob[len(blob) // 2] ^= 0xFF
        file.write_bytes(bytes(blob))
    with pytest.raises(UserError, match="checkpoint"):
        export_run(tmp_path / "run", tmp_path / "out", QUIET)
    assert snapshot(tmp_path) == ["run"]


def test_the_torch_package_of_exports_and_every_torch_side_do_without_jax():
    code = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax"):
    sys.modules[name] = None  # to import it is an error
from metacanvas_jax.torch_export import MetaCanvasPipeline, sides
print([len(sides.every(family)) for family in ("dit", "vae", "text", "mllm")])
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout == "[4, 4, 1, 2]\n", found.stderr
