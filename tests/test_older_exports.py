"""Exports that version 0.1 wrote still paint in PyTorch, and paint what the runs that they are of draw."""

import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metacanvas_jax import registry
from metacanvas_jax.config.networks import autoencoder
from metacanvas_jax.data.shapes import latent_grid
from metacanvas_jax.paint import requests, runs
from metacanvas_jax.paint.requests import Request
from metacanvas_jax.trees import flat, nested
from metacanvas_jax.weights.hf_export import save_params

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch", reason="needs the [torch] extra")
FOLDERS = Path(__file__).parent / "golden" / "folders_0.1.tar.xz"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("older")
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(place, filter="data")
    return place


def transformer(trained, folder):
    """The frozen transformer that a run was trained beside, as a folder of diffusers."""
    config = trained.setup.dit
    record, leaves = registry.of(config), flat(trained.params["dit"])
    table = record.table(config)
    kept = nested({entry.path: leaves[entry.path] for entry in table})
    save_params(kept, table, folder, stem="diffusion_pytorch_model", progress=False)
    (folder / "config.json").write_text(json.dumps(record.write(config)))
    return folder


@pytest.mark.parametrize("backbone", ["sana", "flux", "wan"])
def test_an_older_export_paints_in_torch_what_its_run_drew(folders, backbone, tmp_path, monkeypatch):
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    monkeypatch.chdir(folders)
    assert not {"reading", "computed"} & json.loads(Path(f"{backbone}/export/metacanvas.json").read_text()).keys()
    trained = runs.load(Path(f"{backbone}/run"))
    base = None if backbone == "sana" else transformer(trained, tmp_path / "base")
    pipeline = MetaCanvasPipeline.from_pretrained(f"{backbone}/export", transformer=base)
    vae = autoencoder(trained.setup)
    shape = (1, *latent_grid(trained.setup), vae.channels)
    noise = np.array(jax.random.normal(jax.random.fold_in(jax.random.key(3), 0), shape))
    monkeypatch.setattr(pipeline, "noise", lambda *_: torch.from_numpy(noise).movedim(-1, 1))
    latents = pipeline("a red cat", output="latent").movedim(1, -1).numpy()
    assert latents.shape == noise.shape
    pixels = vae.apply({"params": trained.params["vae"]}, jnp.asarray(latents), method="decode")
    painted = np.round((np.clip(np.asarray(pixels), -1, 1) + 1) * 127.5).astype(int)[0, 0]
    # The run draws what it drew then: tests/test_older_folders.py.
    sample, bucket = requests.sample_of(trained.setup, Request("a red cat"))
    drawn = trained.paint([sample], bucket, seed=3).pixels[0, 0].astype(int)
    assert painted.shape == drawn.shape and drawn.std() > 10
    assert np.abs(painted - drawn).max() <= 1
