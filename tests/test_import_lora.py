"""Adapters that others trained, as a run: diffusers' own format and the community's, other ranks and scales."""

import export_support as support
import numpy as np
import pytest
from ml_collections import ConfigDict

from metacanvas_jax import registry
from metacanvas_jax.cli.main import main
from metacanvas_jax.config.read import experiment
from metacanvas_jax.paint import runs
from metacanvas_jax.trees import flat
from metacanvas_jax.weights import lora

pytest_plugins = "exported_support"
pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")

WAN = {"q": "q", "k": "k", "v": "v", "out": "o"}  # names of the original network, of its self-attention
RANK, ALPHA = 1, 3.0


def written(config: ConfigDict, folder):
    """A config as the file that `--config` takes."""
    path = folder / "config.py"
    path.write_text(
        "import json\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    return path


def community(path, width, blocks=2, rank=RANK):
    """A file in the names of Wan's original network; returns what each layer adds to its kernel, torch [out, in]."""
    from safetensors.torch import save_file

    rng, tensors, added = np.random.default_rng(0), {}, {}
    for block in range(blocks):
        for ours, theirs in WAN.items():
            down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, width), (width, rank)))
            name = f"diffusion_model.blocks.{block}.self_attn.{theirs}"
            tensors |= {f"{name}.lora_down.weight": torch.tensor(down), f"{name}.lora_up.weight": torch.tensor(up)}
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
            added[ours, block] = up @ down * (ALPHA / rank)
    save_file(tensors, path)
    return added


@pytest.fixture
def wan(qwen, tmp_path):
    """The config of a tiny Wan with adapters, and its file."""
    config = support.config(qwen, "wan")
    return config, written(config, tmp_path)


def adapters_of(run):
    """The parameters of a run's adapters of the DiT, by path."""
    return {
        path: np.asarray(x)
        for path, x in flat(runs.load(run).params).items()
        if path.startswith("dit/") and "_lora/" in path
    }


def test_import_takes_adapters_of_the_community(wan, tmp_path):
    config, file = wan
    width = support.DITS["wan"].width
    expected = community(tmp_path / "style.safetensors", width)
    to = tmp_path / "run"
    assert main(["import", "--from", str(tmp_path / "style.safetensors"), "--to", str(to), "--config", str(file)]) == 0
    found, setup = adapters_of(to), experiment(config)
    scale = setup.dit.lora.alpha / setup.dit.lora.rank
    table = {e.path: e for e in lora.table(registry.of(setup.dit).table(setup.dit), setup.dit.lora, lora.DIFFUSERS)}
    for (layer, block), product in expected.items():
        a, b = (f"blocks/self/{layer}_lora/{z}" for z in "ab")
        down, up = (table[path].transform.backward(found[f"dit/{path}"][block]) for path in (a, b))
        np.testing.assert_allclose(up @ down * scale, product, atol=1e-5, rtol=1e-5)
    others = [path for path in found if "/self/" not in path]
    assert others and all(found[path].any() == path.endswith("/a") for path in others)


@pytest.mark.parametrize("backbone", ["sana", "flux", "wan"])
def test_import_takes_the_adapters_of_an_export(exported, backbone, tmp_path):
    config, leaves, _, folder, _ = exported(backbone)
    to, file = tmp_path / "run", written(config, tmp_path)
    assert main(["import", "--from", str(folder / "transformer_lora"), "--to", str(to), "--config", str(file)]) == 0
    expected = {path: value for path, value in leaves.items() if path.startswith("dit/") and "_lora/" in path}
    found = adapters_of(to)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_import_refuses_adapters_that_do_not_fit(wan, tmp_path, capsys):
    config, _ = wan
    width = support.DITS["wan"].width

    def refused(file, config, message):
        to = tmp_path / "none"
        assert main(["import", "--from", str(file), "--to", str(to), "--config", str(written(config, tmp_path))]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
        assert not to.exists()

    community(tmp_path / "large.safetensors", width, rank=5)
    refused(tmp_path / "large.safetensors", config, "has rank 5, dit.lora.rank is 2; set it to at least 5")
    community(tmp_path / "deep.safetensors", width, blocks=3)
    refused(tmp_path / "deep.safetensors", config, "blocks.2.attn1.to_k.lora_A.weight is no layer that dit.lora of")
    community(tmp_path / "wide.safetensors", width + 2)
    refused(tmp_path / "wide.safetensors", config, f"expected those of a layer [{width}]")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "wide.safetensors").read_bytes()[:99])
    refused(tmp_path / "torn.safetensors", config, "torn.safetensors: diffusers reads no adapters of wan from it")
    plain = config.copy_and_resolve_references()
    plain.dit.lora = None
    refused(tmp_path / "large.safetensors", plain, "dit.lora of tiny_wan is empty")
