"""Exported runs in PyTorch: the same latents as here, files that other libraries read, and never half a folder."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import export_support as support
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_support import CHANNELS, LENGTH, save_run, trained_leaves
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
from metacanvas_jax.exchange.import_run import import_run, read_exported
from metacanvas_jax.mllm.media import read_image
from metacanvas_jax.mllm.qwen2_5_vl import table as qwen2_5_vl
from metacanvas_jax.mllm.qwen2_5_vl.network import MllmConfig
from metacanvas_jax.tasks import clean_first_levels, replace_first_frame
from metacanvas_jax.train import store
from metacanvas_jax.train.checkpoints import check_workdir
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.train.parameters import param_shapes, start_weights
from metacanvas_jax.trees import flat, nested, partition
from metacanvas_jax.types import Given as Conditions
from metacanvas_jax.weights import hf_import, saved
from metacanvas_jax.weights.hf_import import load_params
from metacanvas_jax.weights.table import under

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
pytest.importorskip("peft", reason="needs the [torch] extra")

TABLES = {"sana": sana.table, "flux": flux.table, "wan": wan.table}
GRIDS = {"sana": (1, 4, 6), "flux": (1, 4, 8), "wan": (3, 4, 6)}
PROMPTS = ["a red cat", "a blue house, painted"]
QUIET = Options(progress=False)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a random MLLM and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    support.save_qwen(folder)
    return folder


@pytest.fixture(scope="module")
def exported(qwen, tmp_path_factory):
    """``exported(backbone)``: config, trained leaves, the run, its export, and the base transformer."""
    made = {}

    def make(backbone):
        if backbone not in made:
            folder = tmp_path_factory.mktemp(backbone)
            config = support.config(qwen, backbone)
            leaves = trained_leaves(config)
            save_run(folder / "run", config, leaves)
            export_run(folder / "run", folder / "out", QUIET)
            made[backbone] = (
                config,
                leaves,
                folder / "run",
                folder / "out",
                support.save_transformer(backbone, folder / "base"),
            )
        return made[backbone]

    return make


def picture():
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (60, 84, 3), np.uint8))


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


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


def is_mllm_adapter(path):
    return path.startswith("mllm/") and "_lora/" in path


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


@pytest.mark.parametrize("backbone", ["sana", "flux", "wan"])
def test_import_of_an_exported_run_is_bit_exact(exported, backbone):
    config, leaves, _, folder, _ = exported(backbone)
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    back = flat(read_exported(folder, setup, trainable))
    assert back.keys() == leaves.keys()
    for path, value in leaves.items():
        assert np.asarray(back[path]).tobytes() == value.tobytes(), path


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


def test_exported_transformer_loads_in_diffusers_without_a_missing_key(exported):
    from diffusers import SanaTransformer2DModel

    _, _, _, folder, _ = exported("sana")
    _, info = SanaTransformer2DModel.from_pretrained(folder / "transformer", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


# peft asks transformers for an attribute that it renames.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_exported_adapters_of_the_mllm_load_in_peft_and_do_what_ours_do(exported, qwen):
    from peft import PeftModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    from metacanvas_jax.torch_export.lora import Adapters, read_peft

    _, leaves, _, folder, _ = exported("sana")
    tokens = torch.arange(20, 30)[None]
    positions = torch.arange(10).expand(3, 1, 10)
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen / "qwen", dtype=torch.float32).eval()
    adapters = Adapters(ours, *read_peft(folder / "mllm_lora"))
    count = sum(is_mllm_adapter(path) and path.endswith("/a") for path in leaves) * support.LANGUAGE.layers
    assert len(adapters.layers) == count
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen / "qwen", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, folder / "mllm_lora").eval()  # a warning is an error here
    with torch.no_grad():
        run = lambda model: model(input_ids=tokens, position_ids=positions).logits  # noqa: E731
        with_adapters, adapted = run(ours), run(theirs)
        with adapters.switched(False), theirs.disable_adapter():
            plain, bare = run(ours), run(theirs)
    torch.testing.assert_close(adapted, with_adapters, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(bare, plain, atol=0, rtol=0)
    assert (adapted - bare).abs().max() > 1e-2


def test_exported_adapters_of_the_transformer_load_in_diffusers_and_do_what_ours_do(exported, caplog):
    from diffusers import SanaTransformer2DModel

    from metacanvas_jax.torch_export.lora import Adapters, read_diffusers

    _, leaves, _, folder, _ = exported("sana")
    ours, theirs = (SanaTransformer2DModel.from_pretrained(folder / "transformer").eval() for _ in range(2))
    adapters = Adapters(ours, *read_diffusers(folder / "transformer_lora"))
    count = sum(path.startswith("dit/") and path.endswith("_lora/a") for path in leaves) * support.DITS["sana"].layers
    assert len(adapters.layers) == count == 20
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        theirs.load_lora_adapter(folder / "transformer_lora", weight_name="pytorch_lora_weights.safetensors")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not caplog.records, caplog.text
    call = {
        "hidden_states": torch.from_numpy(draw(1, CHANNELS, 3, 4, seed=1)),
        "encoder_hidden_states": torch.from_numpy(draw(1, 5, 16, seed=2)),
        "timestep": torch.tensor([700.0]),
    }
    with torch.no_grad():
        with_adapters, adapted = ours(**call).sample, theirs(**call).sample
        with adapters.switched(False):
            plain = ours(**call).sample
    torch.testing.assert_close(adapted, with_adapters, atol=1e-5, rtol=1e-5)
    assert (adapted - plain).abs().max() > 1e-2


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


def snapshot(folder):
    return sorted(path.name for path in folder.iterdir())


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
    with pytest.raises(UserError, match="needs a base that is not part of it: pass transformer=FOLDER"):
        MetaCanvasPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match=r"nowhere has no config\.json"):
        MetaCanvasPipeline.from_pretrained(folder, transformer=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metacanvas\.json in it"):
        MetaCanvasPipeline.from_pretrained(tmp_path)


def test_an_imported_export_is_a_run_with_the_same_parameters(exported, tmp_path):
    config, leaves, _, folder, _ = exported("sana")
    import_run(folder, tmp_path / "run")
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    with store.Store(tmp_path / "run" / "checkpoints", writable=False) as checkpoints:
        assert checkpoints.steps() == [7]
        for ema in (False, True):
            back = flat(checkpoints.restore_params(trainable, ema=ema))
            for path, value in leaves.items():
                assert np.asarray(back[path]).tobytes() == value.tobytes(), path
    check_workdir(make_job(setup), fit_config(setup), tmp_path / "run")  # training would go on from it


def test_a_run_starts_with_what_another_trained(exported):
    config, leaves, run, _, _ = exported("sana")
    config = config.copy_and_resolve_references()
    config.start = str(run)
    setup = read.experiment(config)
    begun = flat(start_weights(setup, param_shapes(setup)))
    for path, value in leaves.items():
        assert np.asarray(begun[path]).tobytes() == value.tobytes(), path
    config.canvas.rows += 1
    setup = read.experiment(config)
    with pytest.raises(UserError, match=rf"{run}, the config's 'start': canvas/\S+ has shape \(1, .*\) there and"):
        start_weights(setup, param_shapes(setup))


def test_weights_are_read_once_and_only_those_that_a_run_needs(exported, monkeypatch):
    config, leaves, run, _, base = exported("flux")
    config = config.copy_and_resolve_references()
    config.start, config.dit_weights = str(run), str(base)
    setup = read.experiment(config)
    seen = []
    restore, load = store.Store.restore_params, hf_import.load_params

    def counted_restore(self, abstract, *, only, **options):
        seen.extend(only)
        return restore(self, abstract, only=only, **options)

    def counted_load(source, table, abstract, **options):
        part = "dit" if source == base else "mllm"
        seen.extend(f"{part}/{entry.path}" for entry in table)
        return load(source, table, abstract, **options)

    monkeypatch.setattr(store.Store, "restore_params", counted_restore)
    monkeypatch.setattr(hf_import, "load_params", counted_load)
    parts = {part: tree for part, tree in param_shapes(setup).items() if part in ("mllm", "dit")}
    frozen = flat(partition(param_shapes(setup), setup.train.rules)[1])
    begun = flat(start_weights(setup, param_shapes(setup)))
    assert len(seen) == len(set(seen)), "nothing is read twice"
    assert {path.partition("/")[0] for path in begun.keys() - leaves.keys()} == set(parts)
    seen.clear()
    continued = flat(start_weights(setup, nested(frozen)))  # the rest comes from the run's own checkpoint
    unpublished = {path for path in frozen if path.startswith("vae/")}
    assert set(continued) == frozen.keys() - unpublished
    assert len(seen) == len(continued)
    for path, value in continued.items():
        np.testing.assert_array_equal(value, begun[path], path)


def test_state_dicts_of_a_connector_are_read_and_pickles_are_not(exported, tmp_path):
    from safetensors.torch import load_file

    from metacanvas_jax.exchange.import_run import read_connector

    config, leaves, _, folder, _ = exported("wan")
    setup = read.experiment(config)
    trainable, _ = partition(param_shapes(setup), setup.train.rules)
    state = load_file(folder / "connector" / "model.safetensors")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "connector.pt")
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for source in (tmp_path / "connector.pt", tmp_path / "dcp"):
        back = flat(read_connector(source, setup, trainable))
        assert back.keys() == {path for path in leaves if not path.startswith(("mllm/", "dit/blocks"))}
        for path, value in back.items():
            assert np.asarray(value).tobytes() == leaves[path].tobytes(), path

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({"canvas.tokens": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="only tensors are read"):
        read_connector(tmp_path / "bomb.pt", setup, trainable)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="more than the places of tensors"):
        read_connector(tmp_path / "dcp", setup, trainable)
    assert not (tmp_path / "exploded").exists()
    state["canvas.tokens"] = state["canvas.tokens"][:1]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(UserError, match=r"canvas\.tokens has shape \[1, 2, 3, 32\], expected \[2, 2, 3, 32\]"):
        read_connector(tmp_path / "short.pt", setup, trainable)


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
    assert found.stdout == "[3, 4, 1, 1]\n", found.stderr


def test_a_transformer_of_diffusers_is_imported_as_parameters_of_ours(exported, tmp_path):
    from metacanvas_jax.cli.main import main

    _, leaves, _, folder, _ = exported("sana")
    assert main(["import", "--from", str(folder / "transformer"), "--to", str(tmp_path / "params")]) == 0
    params, info = saved.load(tmp_path / "params")
    expected = {path: value for path, value in leaves.items() if path.startswith("dit/") and "_lora/" not in path}
    assert {f"dit/{path}" for path in flat(params)} == expected.keys()
    for path, value in flat(params).items():
        assert value.tobytes() == expected[f"dit/{path}"].tobytes(), path
    assert info["meta"]["model"] == "SanaConfig"
