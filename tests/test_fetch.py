"""`metacanvas fetch` against a hub on the loopback address: what a config needs, once, whole, and nothing else."""

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import hub_support
import huggingface_hub
import pytest
from hub_support import COMMIT, hub  # noqa: F401

from metacanvas_jax import files, registry
from metacanvas_jax.cli.main import COMMANDS, main
from metacanvas_jax.config import read
from metacanvas_jax.config.load import load_config
from metacanvas_jax.data.tokenizer import load_tokenizer
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import fetch
from metacanvas_jax.launch import hub as asked_hub
from metacanvas_jax.weights import published, repositories

SANA = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
PIPELINE = {
    "README.md": b"read me",
    "LICENSE.txt": b"terms",
    "model_index.json": b"{}",
    "safety_checker/config.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "transformer/config.json": b'{"a": 1}',
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"1" * 5000,
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors": b"2" * 3000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": b'{"weight_map": {}}',
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"h" * 4000,
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"v" * 2000,
    "vae/diffusion_pytorch_model.bin": b"p" * 2000,
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors": b"t" * 2000,
    "tokenizer/tokenizer.json": b'{"t": 1}',
    "tokenizer/tokenizer.model": b"spiece",
}
READ = {name for name in PIPELINE if "fp16" not in name and not name.endswith((".md", ".bin")) and "safety" not in name}
MLLM = {"config.json": b"{}", "model.safetensors": b"q" * 1000, "tokenizer.json": b"{}", "merges.txt": b"a b"}


@pytest.fixture
def served(hub, monkeypatch):  # noqa: F811
    """The hub with all that t2i_lora names, at the commit of the tests."""
    hub.add(SANA, PIPELINE)
    hub.add(QWEN, MLLM)
    for name, repository in repositories.REPOSITORIES.items():
        if repository.revision:
            changed = repositories.Repository(
                repository.name, COMMIT, repository.licence, repository.folders, repository.kind
            )
            monkeypatch.setitem(repositories.REPOSITORIES, name, changed)
    return hub


def asked(capsys, *words, code=0):
    assert main(["fetch", *words]) == code
    return capsys.readouterr()


def there(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_config_gets_what_its_parts_read_and_nothing_else(served, tmp_path, capsys):
    said = asked(capsys, "--config", "configs/t2i_lora.py", "--out", str(tmp_path), "--yes").out
    sana, qwen = there(tmp_path / SANA.split("/")[1]), there(tmp_path / QWEN.split("/")[1])
    assert sana.keys() == READ | {fetch.RECORD} and qwen.keys() == MLLM.keys() | {fetch.RECORD}
    assert all(sana[name] == PIPELINE[name] for name in READ)
    record = json.loads(sana[fetch.RECORD])
    assert (record["repository"], record["revision"]) == (SANA, COMMIT) and record["files"].keys() == READ
    assert f"{SANA} at {COMMIT} (NVIDIA's licence of the SANA weights; Gemma Terms of Use)" in said
    assert "for dit, vae, text, text.tokenizer" in said and "for mllm, mllm.tokenizer" in said
    size = sum(len(PIPELINE[name]) for name in READ) + sum(map(len, MLLM.values()))
    assert f"fetched {len(READ) + len(MLLM)} files, {size / 1000:.1f} kB" in said


def test_what_is_there_is_not_fetched_again_and_what_changed_is(served, tmp_path, capsys):
    words = ["--config", "configs/t2i_lora.py", "--out", str(tmp_path), "--yes"]
    asked(capsys, *words)
    sent = served.sent
    assert "all files are there" in asked(capsys, *words).out and served.sent == sent
    vae = tmp_path / SANA.split("/")[1] / "vae/diffusion_pytorch_model.safetensors"
    vae.unlink()
    assert "fetched 1 file, 2.0 kB" in asked(capsys, *words).out
    assert vae.read_bytes() == PIPELINE["vae/diffusion_pytorch_model.safetensors"] and served.sent == sent + 2000
    (tmp_path / SANA.split("/")[1] / fetch.RECORD).unlink()  # as if brought by hand: contents decide
    vae.write_bytes(b"x" * 2000)
    sent = served.sent
    assert "fetched 1 file, 2.0 kB" in asked(capsys, *words).out and served.sent == sent + 2000


def test_a_broken_connection_goes_on_where_it_stopped_and_a_stopped_command_with_its_file(served, tmp_path, capsys):
    shard = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    words = ["--repository", SANA.split("/")[1], "--out", str(tmp_path), "--yes"]
    served.cut[shard] = [0] * 6
    said = asked(capsys, *words, code=75).err
    assert f"{SANA}: {shard} did not arrive" in said and "start the same command again" in said
    served.cut[shard] = [2000]
    asked(capsys, *words)
    assert (tmp_path / SANA.split("/")[1] / shard).read_bytes() == PIPELINE[shard]
    assert served.sent == sum(len(PIPELINE[name]) for name in READ)  # every byte once


def test_a_file_that_arrives_damaged_is_removed_and_the_same_command_goes_on(served, tmp_path, capsys):
    served.damaged.add("vae/diffusion_pytorch_model.safetensors")
    words = ["--repository", SANA.split("/")[1], "--out", str(tmp_path), "--yes"]
    said = asked(capsys, *words, code=75).err
    assert "what arrived is not what" in said and "start the same command again" in said
    assert not (tmp_path / SANA.split("/")[1] / "vae/diffusion_pytorch_model.safetensors").exists()
    served.damaged.clear()
    assert "fetched 1 file" in asked(capsys, *words).out


def test_sizes_come_first_and_nothing_is_brought_unless_the_user_agrees(served, tmp_path, capsys):
    words = ["--config", "configs/t2i_lora.py", "--out", str(tmp_path)]
    dry = asked(capsys, *words, "--dry-run")
    assert "transformer/diffusion_pytorch_model-00001-of-00002.safetensors" in dry.out and "5.0 kB" in dry.out
    said = asked(capsys, *words, code=2)
    assert dry.out == said.out and "fetch 17 files, 13.1 kB" in said.err and "--yes agrees" in said.err
    assert served.sent == 0 and not list(tmp_path.iterdir())


def test_a_full_disk_is_said_before_anything_is_brought(served, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 9000}))
    said = asked(capsys, "--config", "configs/t2i_lora.py", "--out", str(tmp_path), "--yes", code=2).err
    assert "13.1 kB are needed, 9.0 kB are free" in said and served.sent == 0


def test_a_data_set_comes_with_data_alone_at_the_newest_commit_which_is_written_down(served, tmp_path, capsys):
    served.add("BLIP3o/BLIP3o-60k", {"a.tar": b"a" * 300, "b.tar": b"b" * 300, "prompts.txt": b"p"})
    words = ["--config", "configs/t2i_scratch.py", "--out", str(tmp_path), "--yes"]
    asked(capsys, *words[:-1], "--dry-run", "--config.mllm.weights=", "--config.mllm.tokenizer=")
    assert not any("BLIP3o" in line for line in served.asked)
    served.add("Qwen/Qwen2.5-VL-3B-Instruct", MLLM)
    asked(capsys, *words, "--data")
    folder = tmp_path / "BLIP3o-60k"
    assert there(folder).keys() == {"a.tar", "b.tar", fetch.RECORD}
    assert json.loads((folder / fetch.RECORD).read_text())["revision"] == COMMIT
    assert not (tmp_path / SANA.split("/")[1] / "transformer").exists()  # trained from scratch


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--revision", f"Sana_1600M_512px_diffusers={'f' * 40}"], f"{SANA} has no revision {'f' * 40}"),
        (["--revision", "Sana"], "expected NAME=COMMIT, with a NAME of Sana_1600M_512px_diffusers"),
        (["--config.seed=3"], "go with --config"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(served, tmp_path, capsys, words, message):
    said = asked(capsys, "--repository", SANA.split("/")[1], "--out", str(tmp_path), *words, code=2).err
    assert message in said and len(said.splitlines()) == 1


def test_gated_missing_and_unknown_repositories_say_what_to_do(served, tmp_path, capsys):
    served.add("black-forest-labs/FLUX.1-Kontext-dev", {"transformer/config.json": b"{}", "vae/config.json": b"{}"})
    served.gated.add("black-forest-labs/FLUX.1-Kontext-dev")
    words = ["--out", str(tmp_path), "--yes"]
    said = asked(capsys, "--repository", "FLUX.1-Kontext-dev", *words, code=2).err
    assert "accept its terms at" in said and "`hf auth login`" in said
    said = asked(capsys, "--repository", "Wan2.2-TI2V-5B-Diffusers", *words, code=2).err
    assert "Wan-AI/Wan2.2-TI2V-5B-Diffusers: not at" in said
    said = asked(capsys, "--repository", "other", *words, code=2).err
    assert "expected one of Qwen2.5-VL-3B-Instruct" in said


def test_without_the_hub_it_says_what_to_bring_and_where_to_put_it(served, monkeypatch, capsys):
    hub_support.at(monkeypatch, "http://127.0.0.1:9")  # nobody answers there
    words = ["--config", "configs/t2i_lora.py", "--out", "gs://mine/weights"]
    said = asked(capsys, *words, code=2)
    assert "http://127.0.0.1:9/Qwen/Qwen2.5-VL-7B-Instruct cannot be reached" in said.err
    assert len(said.err.splitlines()) == 1
    assert f"{SANA} at {COMMIT}" in said.out and "into gs://mine/weights/Sana_1600M_512px_diffusers" in said.out
    with asked_hub._asked("Qwen/Qwen2.5-VL-7B-Instruct", "main"):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    assert capsys.readouterr().err == ""
    first = next(line for line in said.out.splitlines() if f"hf download {SANA} --revision {COMMIT}" in line)
    assert "--include 'transformer/*'" in first and "--include model_index.json" in first.replace("'model_", "model_")
    assert first.endswith("&& gcloud storage cp -r Sana_1600M_512px_diffusers gs://mine/weights/")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert asked(capsys, *words, "--dry-run").out == said.out
    assert "HF_HUB_OFFLINE is set" in asked(capsys, *words, code=2).err


def test_a_bucket_gets_the_same_files_and_keeps_what_is_there(served, bucket, capsys):
    words = ["--repository", "Qwen2.5-VL-7B-Instruct", "--out", f"{bucket.url}/weights", "--yes"]
    asked(capsys, *words)
    there = {name: files.read_bytes(f"{bucket.url}/weights/Qwen2.5-VL-7B-Instruct/{name}") for name in MLLM}
    assert there == MLLM
    assert "all files are there" in asked(capsys, *words).out


def test_only_this_command_asks_the_hub(served, tmp_path, monkeypatch):
    """In a process of its own, where nothing of the hub's library was imported before the command."""
    environment = os.environ | {"HF_ENDPOINT": served.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.getcwd()}
    environment.pop("HF_HUB_OFFLINE")
    served.add("Wan-AI/Wan2.2-TI2V-5B-Diffusers", {"transformer/config.json": b"{}"})
    words = ["--repository", "Wan2.2-TI2V-5B-Diffusers", "--out", str(tmp_path), "--yes"]
    call = [sys.executable, "-m", "metacanvas_jax", "fetch", *words, "--revision", "Wan2.2-TI2V-5B-Diffusers=main"]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert "fetched 1 file, 2 B" in result.stdout and result.returncode == 0, result.stderr
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert main(["report", "--run", "nothing"]) == 2 and os.environ["HF_HUB_OFFLINE"] == "1"


def test_every_folder_of_a_shipped_config_has_a_repository_with_a_pinned_commit():
    names = (*("qwen_image_edit", "t2i_scratch", "t2i_lora", "connector_ablation"), "image_editing", "video_stage1")
    for name in (*names, "video_stage2", "video_stage3"):
        for variant in importlib.import_module(f"configs.{name}").VARIANTS:
            setup = read.experiment(load_config(f"configs/{name}.py:{variant}", []))
            wanted, unknown = fetch.of_config(setup)
            assert wanted and [place for place in unknown if not place.startswith("start: ")] == [], variant
            assert all(one.repository.revision for one in wanted), variant


MISSING = {  # what is named, and the rest of the command that brings it
    QWEN: "Qwen2.5-VL-7B-Instruct --out Qwen",
    SANA: "Sana_1600M_512px_diffusers --out Efficient-Large-Model",
    "gs://mine/weights/Qwen3-VL-8B-Instruct": "Qwen3-VL-8B-Instruct --out gs://mine/weights",
    "Qwen-Image": "Qwen-Image --out .",
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_folder_of_a_known_repository_says_the_command_that_brings_it(name, monkeypatch, tmp_path, bucket):
    monkeypatch.chdir(tmp_path)
    folder = name.replace("gs://mine", bucket.url)
    how = rf"; `metacanvas fetch --repository {MISSING[name].replace('gs://mine', bucket.url)}` brings it$"
    for read_it in (lambda: published.subfolder(folder, "vae"), lambda: registry.published_config(folder)):
        with pytest.raises(UserError, match=how):
            read_it()
    with pytest.raises(UserError, match=how):
        load_tokenizer(folder)
    words = how.split("`")[1].split()[1:]
    (wanted,) = fetch.of_names([words[2]], words[4])
    assert files.absolute(wanted.place) == files.absolute(folder), "the command brings it to where it is looked for"


def test_a_pipeline_without_a_part_and_a_folder_of_nobody_s_say_what_to_do(tmp_path):
    pipeline = tmp_path / "Qwen-Image"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    how = f"without the subfolder vae; it has none; `metacanvas fetch --repository Qwen-Image --out {tmp_path}` brings"
    with pytest.raises(UserError, match=how):
        published.subfolder(pipeline, "vae")
    with pytest.raises(UserError, match=r"no such folder; `metacanvas fetch` brings published ones$"):
        published.subfolder("me/mine", "")


def test_the_page_has_the_table_of_repositories():
    page = (Path(__file__).parents[1] / "docs/fetch.md").read_text()
    for repository in repositories.REPOSITORIES.values():
        folders = ", ".join(f"`{folder}`" for folder in repository.folders)
        revision = f"`{repository.revision[:12]}`" if repository.revision else "newest"
        assert f"| `{repository.name}` | {revision} | {folders} | {repository.licence} |" in page
    assert "fetch" in COMMANDS
