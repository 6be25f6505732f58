"""What the references keep in float32 stays float32, whatever dtype a run keeps its frozen parameters in."""

import dataclasses

import export_support as support
import jax
import jax.numpy as jnp
import pytest

from metacanvas_jax import registry
from metacanvas_jax.config import read
from metacanvas_jax.config.networks import keep_float32
from metacanvas_jax.exchange.reading import computed
from metacanvas_jax.paint import runs
from metacanvas_jax.parallel.mesh import MeshConfig, make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.plan.programs import abstract_params
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import param_shapes, read_folders
from metacanvas_jax.train.start import begin, shapes
from metacanvas_jax.trees import flat, partition, stays_float32

WIDE = {
    *("dit/time/fc1/kernel", "dit/time/fc1/bias", "dit/time/fc2/kernel", "dit/time/fc2/bias"),
    *("dit/table", "dit/blocks/table", "dit/blocks/cross_norm/scale", "dit/blocks/cross_norm/bias"),
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The config of a tiny run that freezes a published Wan in bfloat16, and its folder."""
    pytest.importorskip("diffusers", reason="needs the [torch] extra")
    folder = tmp_path_factory.mktemp("wan")
    support.save_qwen(folder)
    config = support.config(folder, "wan")
    config.dit_weights = str(support.save_transformer("wan", folder / "base"))
    config.dit.lora = None  # an adapter that is frozen needs weights
    config.train.frozen_dtype = "bfloat16"
    config.train.rules = ((r"canvas.*|context.*|dit/extra_in/.*|mllm/.*_lora/.*", "train"), (".*", "freeze"))
    return config, folder


def dtypes(tree):
    return {path: jnp.dtype(leaf.dtype).name for path, leaf in flat(tree).items()}


def only(found, expected):
    assert {path for path, dtype in found.items() if dtype == "float32"} == expected
    assert set(found.values()) == {"float32", "bfloat16"}


def test_reading_planning_beginning_and_painting_agree_on_what_stays_float32(wan):
    config, folder = wan
    setup = read.experiment(config)
    frozen = partition(param_shapes(setup), setup.train.rules)[1]
    only(dtypes(read_folders(setup, frozen)), WIDE)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    only(dtypes(abstract_params(setup, mesh)[1]), WIDE)

    leaves = support.trained_leaves(config)
    support.save_run(folder / "run", config, leaves)
    loaded = runs.load(folder / "run").params
    kept = dtypes(partition(loaded, setup.train.rules)[1])
    only(kept, WIDE)

    job, fit = make_job(setup), fit_config(setup)
    optimizer = make_optimizer(setup.optimizer)

    class Fresh:
        saved = None

    wanted = shapes(job, fit, optimizer, make_mesh(MeshConfig()), RULES)
    _, begun = begin(job, fit, optimizer, jax.random.key(0), wanted, Fresh())
    assert dtypes(begun) == kept


def test_an_export_lists_what_stayed_float32_and_rounds_the_rest(wan):
    torch = pytest.importorskip("torch", reason="needs the [torch] extra")
    from metacanvas_jax.torch_export import sides
    from metacanvas_jax.torch_export.load import Finder

    config, folder = wan
    listed = computed(read.experiment(config))
    assert listed["frozen_weights"] == "bfloat16" and listed["float32_weights"].keys() == {"transformer"}
    cls = sides.named("dit", "wan").model
    base, model = (cls.from_pretrained(folder / "base") for _ in range(2))
    finder = Finder(folder, {"computed": listed}, None, torch.float32, torch.device("cpu"))
    finder._as_frozen(model, "transformer")
    same = {name for (name, x), y in zip(model.named_parameters(), base.parameters(), strict=True) if torch.equal(x, y)}
    modules = set(cls._keep_in_fp32_modules)
    assert same == {name for name, _ in base.named_parameters() if modules & set(name.split("."))}
    assert len(same) == 4 + 1 + 3 * support.DITS["wan"].layers


@pytest.mark.torch
@pytest.mark.parametrize("name", [n.name for n in registry.NETWORKS if n.family in ("dit", "vae") and n.published])
def test_networks_keep_in_float32_what_diffusers_keeps(name):
    diffusers = pytest.importorskip("diffusers", reason="needs the [torch] extra")
    for network in registry.NETWORKS:
        if network.name == name and network.published and network.family in ("dit", "vae"):
            config = network.config(**network.tiny)
            modules = set(getattr(diffusers, network.published)._keep_in_fp32_modules or ())
            entries = network.table(config)
            theirs = {entry.path for entry in entries if modules & set(entry.name.split("."))}
            assert {entry.path for entry in entries if stays_float32(entry.path, network.keep_float32)} == theirs


def test_expressions_of_a_run_are_those_of_its_networks(wan):
    setup = read.experiment(wan[0])
    record = registry.of(setup.dit)
    assert keep_float32(setup) == tuple(f"dit/{regex}" for regex in record.keep_float32)
    understands = dataclasses.replace(setup, objective="understand", dit=None, vae=None)
    assert keep_float32(understands) == ()
