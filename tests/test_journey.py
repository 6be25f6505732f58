"""The commands that docs/tpu.md lists for t2i_scratch, in their order and in miniature: from an empty bucket to
pictures that PyTorch draws. Between them are a kill, and other numbers of devices.
"""

import contextlib
import importlib.util
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from cloud_support import ROOT, cloud, script  # noqa: F401
from docs_support import blocks, commands
from PIL import Image

from metacanvas_jax import files
from metacanvas_jax.cli.main import main
from metacanvas_jax.train.metrics import read_metrics
from metacanvas_jax.train.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.faults]
CONFIG = "configs/t2i_scratch.py"
TINY = [
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=2",
    "--config.train.preview_every=0",
    "--config.train.evaluate_every=0",
    "--config.train.batch=8",
    "--config.mesh.fsdp=2",
]


@pytest.fixture
def listed(bucket):
    """The commands of the page by their first words, with this test's bucket and the miniature of the config."""
    (block,) = (block for block in blocks(ROOT / "docs" / "tpu.md") if "prepare --source webdataset" in block.text)
    text = block.text.replace("gs://my-bucket", bucket.url).replace("512x512", "60x60")
    found = {}
    for words in commands(type(block)(block.page, block.line, block.language, text)):
        program = next(word for word in words if "=" not in word)
        name = words[1] if program == "metacanvas" else program.rpartition("/")[2].removesuffix(".sh")
        found[name] = [f"{CONFIG}:miniature" if word == CONFIG and name != "fetch" else word for word in words]
    return found


def tars(place: str, count: int) -> None:
    """Two tars of pictures of one colour with captions, as BLIP3o-60k has them."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as archive:
            for number in range(shard, count, 2):
                picture = io.BytesIO()
                colour = rng.integers(0, 256, 3)
                noisy = np.clip(colour + rng.normal(0, 9, (70, 64, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(noisy).save(picture, "PNG")
                caption = "a picture of {} red, {} green, {} blue".format(*colour // 32)
                for ending, content in (("png", picture.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        files.write(files.folder(f"{place}/{shard:05d}.tar"), data.getvalue())


def run(words, devices):
    """Starts a command in a process of its own, on so many virtual devices."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "metacanvas_jax", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def saved_steps(place: str) -> list[int]:
    if not files.listing(f"{place}/checkpoints", deep=True):
        return []
    with Store(f"{place}/checkpoints", writable=False) as checkpoints:
        return checkpoints.steps()


def test_from_an_empty_bucket_to_pictures(listed, bucket, cloud, tmp_path, monkeypatch, capsys, faults):  # noqa: F811
    monkeypatch.chdir(ROOT)
    url, place = bucket.url, f"{bucket.url}/runs/t2i_scratch"

    assert main([*listed["fetch"][1:], "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct --revision 66285546" in said
    assert f"gcloud storage cp -r BLIP3o-60k {url}/data/" in said

    tars(f"{url}/data/BLIP3o-60k", 24)
    moved = [f"--config.paths.{kind}={url}/{kind}" for kind in ("weights", "data")]
    raw = ["--config.sources[0].kind=webdataset", "--config.sources[0].path=data/BLIP3o-60k/*.tar"]
    # In place of what is fetched: the tokenizer and the autoencoder of the miniature, made of the same pictures.
    assert main(["prepare", "--config", f"{CONFIG}:miniature", *moved, *raw]) == 0
    assert main(listed["prepare"][1:]) == 0
    there = files.listing(f"{url}/data", deep=True)
    assert {"BLIP3o-60k/00000.tar.index.json", "BLIP3o-60k/00001.tar.index.json"} < there.keys()
    assert files.read_json(f"{url}/data/blip3o-latents/recipe.json")
    capsys.readouterr()

    if importlib.util.find_spec("libtpu") is not None:
        monkeypatch.setenv("METACANVAS_PLAN_CACHE", str(tmp_path / "plan"))
        assert main([*listed["plan"][1:], "--topology", "v5e:2x2", "--config.train.batch=8"]) == 0
        assert "PASS" in capsys.readouterr().out
        assert files.listing(f"{url}/plans/t2i_scratch").keys() == {"plan.html", "plan.json"}

    fixed = cloud.environment | {"CONFIG": f"{CONFIG}:miniature", "RUN": "t2i_scratch", "BUCKET": url}
    fixed |= {"TPU": "v5e", "TOPOLOGY": "2x2"}
    script("create", "--yes", environment=fixed)
    script("setup", environment=fixed)
    launched = [*listed["launch"][2:], *TINY]
    assert "metacanvas_jax" in script("launch", "--dry-run", *launched, environment=fixed)
    script("launch", *launched, environment=fixed)
    arguments = cloud.fleet / "metacanvas" / "arguments"
    for _ in range(300):
        if arguments.exists():
            break
        time.sleep(0.1)
    train = arguments.read_text().split("\0")[:-1]
    assert train[:3] == ["train", "--config", f"{CONFIG}:miniature"] and place in train, shlex.join(train)
    assert f"--config.paths.data={url}/data" in train and "--config.sources[0].latents=True" in train

    with run([*train, "--config.train.steps=10000"], devices=4) as process:
        while process.poll() is None and not saved_steps(place):
            time.sleep(0.5)
        process.kill()
        output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    faults("kill -9 of a run in a bucket that goes on with another number of devices")
    last = saved_steps(place)[-1] + 2
    with run([*train, f"--config.train.steps={last}"], devices=2) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output[-3000:]
    assert [row["step"] for row in read_metrics(place)] == list(range(1, last + 1))
    assert saved_steps(place)[-1] == last

    assert main([*listed["sample"][1:], "--count", "1", "--steps", "2"]) == 0
    drawn = Image.open(io.BytesIO(files.read_bytes(f"{url}/drawn/cats.png")))
    assert drawn.size == (60, 60)
    assert main([*listed["evaluate"][1:], "--limit", "1"]) == 0
    assert files.read_json(f"{url}/results/geneval.recipe.json")["step"] == last
    assert "00000/samples/0000.png" in files.listing(f"{url}/results/geneval", deep=True)
    assert main(listed["export"][1:]) == 0

    source, target = listed["gcloud"][-2:]
    if importlib.util.find_spec("torch") is not None:
        for name in files.listing(source, deep=True):
            files.download(f"{source}/{name}", tmp_path / target / "t2i_scratch" / name)
        (lines, *_) = (block for block in blocks(ROOT / "docs" / "export.md") if block.language == "python")
        monkeypatch.chdir(tmp_path)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(lines.text.replace("exports/demo", f"{target}/t2i_scratch"), {})
        with Image.open(tmp_path / "picture.png") as painted:
            assert painted.size == (60, 60)
    assert not list(ROOT.glob("gs:*"))
