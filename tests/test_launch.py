"""Runs on TPU slices: chosen by the config, started for every point of a sweep, watched, resumed and given back."""

import json
import time

import pytest
import yaml
from cloud_support import ROOT, cloud, script  # noqa: F401

from metacanvas_jax.cli.main import main
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import cloud as slices
from metacanvas_jax.launch import jobs, sweeps

PLANNED = [
    {"topology": "v6e:4x4", "mesh": "", "overrides": ()},
    {"topology": "v5e:4x4*2", "mesh": "fsdp=8", "overrides": ("--config.mesh.whole=()",)},
]


def test_a_run_takes_the_slice_that_its_config_was_planned_for():
    where, changes = jobs.chosen(PLANNED, {})
    assert (str(where), changes) == ("16 TPU v6e chips (4x4)", [])
    where, changes = jobs.chosen(PLANNED, {"TPU": "v5e", "TOPOLOGY": "4x4", "SLICES": "1"})
    sizes = [f"--config.mesh.{axis}" for axis in ("data=1", "fsdp=8", "context=1", "tensor=1")]
    assert where.slices == 1 and changes == [*sizes, "--config.mesh.whole=()"]
    assert jobs.chosen(PLANNED, {"TPU": "v5p", "TOPOLOGY": "2x2x1"})[1] == []


@pytest.mark.parametrize(
    ("hardware", "environment", "message"),
    [
        ([], {}, "planned for no slice: set TPU and TOPOLOGY"),
        (PLANNED, {"TPU": "v6e"}, "set both, or none"),
        (PLANNED, {"TPU": "v6e", "TOPOLOGY": "4x5"}, "v6e:4x5 is not offered"),
        (PLANNED, {"SLICES": "two"}, "SLICES is 'two', expected a number"),
    ],
)
def test_a_slice_that_there_is_not_is_refused(hardware, environment, message):
    with pytest.raises(UserError, match=message):
        jobs.chosen(hardware, environment)


@pytest.mark.parametrize(
    "name",
    ["t2i_scratch", "t2i_lora", "connector_ablation", "image_editing", "video_stage1", "video_stage2", "video_stage3"],
)
def test_every_slice_of_a_shipped_config_is_offered_and_its_values_load(name):
    config = load_config(f"configs/{name}.py", [])
    for row in config.hardware:
        environment = dict(zip(("TPU", "TOPOLOGY"), row["topology"].split(":"), strict=True))
        where, changes = jobs.chosen(config.hardware, environment)
        assert where.hosts > 0
        load_config(f"configs/{name}.py", changes)


def test_of_two_arguments_that_set_one_value_the_later_stays():
    assert jobs.merged(["--config.a=1", "--config.b=2"], ["--config.a=3"]) == ["--config.b=2", "--config.a=3"]


def single(cloud, name, *arguments, **variables):  # noqa: F811
    fixed = {"CONFIG": "configs/t2i_scratch.py", "RUN": "t2i", "TPU": "v6e", "TOPOLOGY": "2x2", "CHECKED": "1"}
    return script(name, *arguments, environment=cloud.environment | fixed, **variables)


def until(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened within 10 s")


def test_a_run_lives_from_its_request_to_the_end(cloud):  # noqa: F811
    """Every text for a host is run there by a shell; the training is a stub that ends with the code it is told."""
    single(cloud, "create", "--yes")
    single(cloud, "setup")
    home = cloud.fleet / "metacanvas"
    assert "no run" in single(cloud, "status")
    (cloud.fleet / "codes").write_text("2\n")
    odd = "--config.mesh.whole=() --config.name='two words; $HOME'"
    single(cloud, "launch", "--profile", "3:5", OVERRIDES=odd)
    until((home / "t2i.code").exists)
    words = (home / "arguments").read_text().split("\0")[:-1]
    assert words[:5] == ["train", "--config", "configs/t2i_scratch.py", "--workdir", "gs://mine/runs/t2i"]
    rest = ["--config.mesh.whole=()", "--config.name=two words; $HOME", "--profile", "3:5", "--processes", "1"]
    assert words[5:] == rest
    assert "metacanvas ended 2" in single(cloud, "status")
    assert "ended with code 2" in single(cloud, "resume", "--yes", code=2)
    (cloud.fleet / "codes").write_text("137\n0\n")
    single(cloud, "launch")
    until((home / "t2i.code").exists)
    single(cloud, "resume", "--yes", RESUME_WAIT="1")  # killed for want of memory: started again; then it is done
    assert (home / "t2i.code").read_text() == "0\n"
    (home / "t2i.code").unlink()
    assert "metacanvas lost" in single(cloud, "status")  # a machine that was started again forgets its processes
    single(cloud, "teardown", "--yes")
    assert cloud.verbs()[-1] == "delete"


TWO = "def sweep(add):\n    add('a_1', 'text')\n    add('b', **{'train.steps': 3})\n"


@pytest.fixture
def sweep(cloud, monkeypatch):  # noqa: F811
    """The call of a sweep of two points, in a process that sees the fake cloud."""
    for name, value in cloud.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("TPU", "TOPOLOGY", "SLICES", "CONFIG", "RUN", "WORKDIR", "RUNS"):
        monkeypatch.delenv(name, raising=False)
    (cloud.folder / "some.py").write_text(TWO)
    return ["sweep", "--config", "configs/t2i_scratch.py", "--sweep", str(cloud.folder / "some.py")]


def test_launching_asks_for_a_slice_per_point_and_starts_the_run_there(cloud, sweep):  # noqa: F811
    assert main([*sweep, "--launch", "--yes", "--config.seed=4", "--workdir", "gs://other/place"]) == 0
    assert {path.name for path in cloud.calls.iterdir()} == {"some-a-1", "some-b"}
    assert cloud.verbs("some-b") == ["create", "describe", "describe", "scp", "ssh", "ssh"]
    create, *_, last = cloud.asked("some-b")
    assert "--accelerator-type=v6e-16" in create and "--zone=us-east5-b" in create
    folders = " ".join(f"--config.paths.{name}=gs://mine/{name}" for name in ("weights", "data", "runs"))
    words = f"train --config configs/t2i_scratch.py --workdir gs://other/place/b {folders} --config.train.steps=3 "
    assert f"{words}--config.seed=4" in last[-1] and "--processes 4" in last[-1]
    assert "$HOME/some-b.log" in last[-1] and "$HOME/some-b.pid" in last[-1]  # no folder of a home is asked for
    assert "t2i_scratch.py:text --workdir gs://other/place/a_1" in (cloud.calls / "some-a-1").read_text()


def test_the_folder_of_runs_of_the_environment_holds_those_of_a_sweep(cloud, sweep):  # noqa: F811
    assert main([*sweep, "--launch", "--yes"]) == 0
    assert "--workdir gs://mine/runs/some/b " in cloud.asked("some-b")[-1][-1]


def test_nothing_is_launched_unless_the_user_agrees(cloud, sweep, capsys):  # noqa: F811
    assert main([*sweep, "--launch"]) == 2
    said = capsys.readouterr().err
    assert "create 2 slices of v6e-16 (4x4) in us-east5-b (mine)" in said and "--yes agrees" in said
    assert not list(cloud.calls.iterdir())


def test_a_job_that_fails_to_start_is_named_and_the_others_start(cloud, sweep, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("FAILS", "some-a-1 create")
    assert main([*sweep, "--launch", "--yes"]) == 2
    assert "metacanvas sweep: 1 of 2 jobs failed to start: some-a-1 (tpu_scripts/create.sh)" in capfd.readouterr().err
    assert cloud.verbs("some-a-1") == ["create"] and cloud.verbs("some-b")[-1] == "ssh"


def test_launching_on_gke_applies_a_jobset_per_point(cloud, sweep):  # noqa: F811
    assert main([*sweep, "--launch", "--gke", "--yes"]) == 0
    manifests = [yaml.safe_load((cloud.calls / f"jobset-some-{name}.yaml").read_text()) for name in ("a-1", "b")]
    assert [manifest["metadata"]["name"] for manifest in manifests] == ["some-a-1", "some-b"]
    assert "--workdir gs://mine/runs/some/a_1" in json.dumps(manifests[0])


@pytest.mark.parametrize("gke", [False, True])
def test_a_dry_run_of_a_launch_asks_nobody(cloud, sweep, capfd, gke):  # noqa: F811
    assert main([*sweep, "--launch", "--dry-run", *["--gke"] * gke]) == 0
    printed = capfd.readouterr().out
    assert not list(cloud.calls.iterdir())
    request = "kubectl apply" if gke else "gcloud compute tpus queued-resources create some-"
    assert printed.count(request) == 2 and "gs://mine/runs/some/b" in printed


@pytest.mark.parametrize("words", [["--print", "--gke"], ["--tpu", "--dry-run"], ["--collect", "--yes"]])
def test_options_of_a_launch_alone_are_refused(sweep, capsys, words):
    assert main([*sweep, *words]) == 2
    assert "goes with" in capsys.readouterr().err


def test_points_are_watched_and_those_that_are_done_give_their_slices_back(cloud, sweep, capsys):  # noqa: F811
    runs = cloud.folder / "runs"
    (runs / "b" / "checkpoints" / "3").mkdir(parents=True)
    (runs / "a_1").mkdir()
    (runs / "a_1" / "metrics.jsonl").write_text('{"step": 2, "loss": null}\n{"step": 3, "lo')
    (runs / "a_1" / sweeps.ERROR).write_text("mllm.weights: no such folder\n")
    (cloud.folder / "state-some-b").write_text("SUSPENDED\n")
    here = [*sweep, "--workdir", str(runs)]
    assert main([*here, "--status"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "a_1  step 2 of 20000; ACTIVE: 1 host no run; mllm.weights: no such folder"
    assert second == "b    step 3 of 3; SUSPENDED"
    assert main([*here, "--teardown"]) == 2
    said = capsys.readouterr()
    assert "a_1: not done, its slice stays" in said.out and "delete 1 slice of v6e-16" in said.err
    assert "delete" not in cloud.verbs("some-b")
    assert main([*here, "--teardown", "--yes"]) == 0
    assert "delete" in cloud.verbs("some-b") and "delete" not in cloud.verbs("some-a-1")


def test_a_point_on_a_slice_is_one_line_of_shell(sweep, capsys):
    assert main([*sweep, "--tpu"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("(export NAME=some-b RUN=some/b CONFIG=configs/t2i_scratch.py OVERRIDES=")
    assert line.endswith("tpu_scripts/create.sh && tpu_scripts/setup.sh && tpu_scripts/launch.sh)")


def test_a_name_that_a_cloud_would_refuse_is_refused_before_anything_is_asked(sweep, capsys, cloud):  # noqa: F811
    (cloud.folder / "some.py").write_text(f"def sweep(add):\n    add('{'x' * 80}')\n")
    assert main([*sweep, "--launch", "--yes"]) == 2
    assert "NAME is 'some-xxx" in capsys.readouterr().err and not list(cloud.calls.iterdir())


def test_scripts_that_ask_are_those_that_name_machines():
    """--yes is passed to these alone."""
    asking = {path.name for path in (ROOT / "tpu_scripts").glob("*.sh") if "\nconfirm " in path.read_text()}
    assert asking == set(slices.ASKING)
