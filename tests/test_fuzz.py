"""300 generated bad inputs over all commands: one line and exit code 2, or 0 where the input is acceptable.

`make test-faults` runs all, the gate a slice. A case is a generator of this file and a number, which seeds it.
"""

import importlib
import json
import random
import shutil
import signal
import tarfile
from pathlib import Path

import pytest
from fuzz_support import (
    GENERATORS,
    PLACES,
    VALUES,
    copied,
    damage,
    generator,
    harm,
    place,
    program,
    some_file,
)
from sources_support import encoded, pairs, write_rows, write_tar

from metacanvas_jax.cli.main import main

FOLDERS = Path(__file__).parent / "golden" / "folders_0.1.tar.xz"
SECONDS, GROWTH = 10, 1e9
BUSY = 6  # a machine that does other things as well takes so many times as long
CASES, QUICK = 300, 40  # all, and those of the gate


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    place = tmp_path_factory.mktemp("golden")
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(place, filter="data")
    for module in (
        "launch.training",
        "exchange.import_run",
        "exchange.export_run",
        "evaluate.evaluators",
        "plan.planning",
    ):
        importlib.import_module(f"metacanvas_jax.{module}")  # imports take seconds, which belong to no case
    return place


# ---- Configs and sweeps ----


@generator
def values_of_a_config(rng, folder):
    config = rng.choice(("miniature.py", "t2i_scratch.py:canvas.miniature", "video_stage3.py:miniature"))
    keys = (
        *("canvas.rows", "canvas.keyframes", "dit.layers", "dit.heads", "dit.patch", "dit.width", "mllm.buckets"),
        *("mllm.language.width", "mllm.language.layers", "mllm.tokenizer", "mllm.weights", "vae_weights", "seed"),
        *("train.steps", "train.batch", "train.frozen_dtype", "train.rules", "train.ema", "sampler.steps", "sampler"),
        *("data.count", "data.path", "world.size", "world.objects", "text.length", "optimizer.clip", "sources"),
        *("eval.batch", "mesh.fsdp", "buckets", "time.kind", "hardware", "dit", "mllm", "name", "dit_weights"),
    )
    override = f"--config.{rng.choice(keys)}={rng.choice(VALUES)}".replace("\n", " ")
    config = f"configs/{config}"
    return ["sample", "--config", config, override, "--config.mllm.tokenizer=none", "--prompt", "a cat"]


@generator
def config_files(rng, folder):
    (folder / "bad.py").write_text(program(rng))
    spec = rng.choice(("bad.py", "bad.py:variant", "bad.py:"))
    return [rng.choice(("train", "prepare", "plan", "demo")), "--config", spec]


@generator
def config_places(rng, folder):
    return [rng.choice(("train", "prepare", "plan")), "--config", place(rng, folder)]


@generator
def sweep_files(rng, folder):
    (folder / "bad.py").write_text(program(rng))
    return ["sweep", "--config", "configs/t2i_scratch.py:miniature", "--sweep", "bad.py", "--print"]


@generator
def logs_of_sweeps(rng, folder):
    (folder / "good.py").write_text("def sweep(add):\n    add('a')\n    add('b', 'text')\n")
    for name in ("a", "b"):
        run = folder / "runs" / name
        run.mkdir(parents=True)
        rows = [{"step": i, "loss": rng.choice((1.0, 0.5, None)), "steps_per_second": 2.0} for i in range(1, 9)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "lo')
        (run / "scores.json").write_text(
            json.dumps({"seen": {"overall": 0.5, "categories": {"one": 1.0, "two": None}}})
        )
    harm(rng, folder / "runs" / "a" / rng.choice(("metrics.jsonl", "scores.json")))
    config = "configs/t2i_scratch.py:miniature"
    return ["sweep", "--config", config, "--sweep", "good.py", "--workdir", "runs", "--collect"]


# ---- Runs, exports, published folders ----


@generator
def runs_that_are_exported(rng, folder):
    run = copied(folder, rng.choice(("sana/run", "flux/run", "wan/run")))
    (run / "scores.json").write_text(json.dumps({"seen": {"overall": 0.5}}))
    harm(rng, rng.choice((run / "config.json", run / "scores.json", some_file(rng, run))))
    return ["export", "--run", "copy", "--to", "out"]


@generator
def arguments_of_exports(rng, folder):
    copied(folder, "sana/run")
    options = (
        *(["--to", place(rng, folder)], ["--to", "out", "--dtype", rng.choice(("int7", "", "float64"))]),
        *(["--to", "out", "--step", rng.choice(("-1", "8", "x", "9" * 30))], ["--to", "out", "--run", "nowhere"]),
        ["--to", "out", "--shard-gb", rng.choice(("nan", "-1", "0", "inf", "1e-9", "1e308"))],
    )
    return ["export", "--run", "copy", *rng.choice(options)]


@generator
def exports_that_are_imported(rng, folder):
    export = copied(folder, rng.choice(("sana/export", "flux/export", "wan/export")))
    harm(rng, rng.choice((export / "metacanvas.json", export / "run_config.json", some_file(rng, export))))
    return ["import", "--from", "copy", "--to", "out"]


@generator
def models_that_are_imported(rng, folder):
    model = copied(folder, rng.choice(("qwen", "sana/export/transformer")))
    harm(rng, rng.choice((model / "config.json", model / "config.json", some_file(rng, model))))
    return ["import", "--from", "copy", "--to", "out"]


@generator
def places_that_are_imported(rng, folder):
    return ["import", "--from", place(rng, folder), "--to", "out"]


@generator
def runs_that_draw(rng, folder):
    run = copied(folder, rng.choice(("sana/run", "wan/run")))
    shutil.rmtree(run / "checkpoints" / "7" / rng.choice(("default", "state", "d")), ignore_errors=True)
    damage(rng, run / "checkpoints" / "7" / "commit_success.txt")
    if rng.random() < 0.7:
        harm(rng, run / "config.json")
    elif (run / "checkpoints").exists():
        shutil.rmtree(run / "checkpoints")
    return [rng.choice(("sample", "edit")), "--run", "copy", "--prompt", "a cat", "--out", "out.png"]


@generator
def tokenizers(rng, folder):
    harm(rng, some_file(rng, copied(folder, "tokenizer")))
    config = ["--config", "configs/miniature.py", "--config.mllm.tokenizer=copy"]
    return ["sample", *config, "--config.mllm.weights=none", "--prompt", "a cat", "--out", "out.png"]


# ---- Arguments of drawing ----


@generator
def arguments_of_drawings(rng, folder):
    copied(folder, "sana/run")
    number = str(rng.choice((-1, 0, 10**12, 10**30, "nan", "inf", "x", "", "1e400")))
    options = {
        "--count": number,
        "--seed": rng.choice(("-1", str(2**64), "x")),
        "--steps": rng.choice(("0", "-3", "x", "1.5")),
        "--guidance": rng.choice(("nan", "inf", "x", "-inf")),
        "--size": rng.choice(("0x0", "x", "1x", "99999999999x64", "100000x100000", "7x7", "-1x5", "64", "64x64x64")),
        "--frames": rng.choice(("0", "-1", "2", "5", "999999999")),
        "--fps": rng.choice(("0", "nan", "1e-320", "inf", "-1")),
        "--tile": rng.choice(("-1", "x")),
        "--image": place(rng, folder),
        "--out": rng.choice((*(name for name in PLACES if name), "out.jpg", "file/x.png", "x" * 300 + ".png")),
    }
    option = rng.choice(list(options))
    command = "edit" if option == "--image" else "sample"
    (folder / "copy" / "checkpoints" / "7" / "commit_success.txt").unlink()
    return [command, "--run", "copy", "--prompt", rng.choice(("a cat", "", "\udcff")), option, options[option]]


@generator
def media_that_are_edited(rng, folder):
    run = copied(folder, "wan/run")
    shutil.rmtree(run / "checkpoints")
    data = encoded(3)
    at = rng.randrange(len(data))
    (folder / "x.png").write_bytes(rng.choice((data[:at], data[:at] + b"\xff" + data[at + 1 :], b"", b"x" * 99)))
    option = rng.choice(("--image", "--video"))
    return ["edit", "--run", "copy", "--prompt", "a cat", option, "x.png"]


@generator
def arguments_of_other_commands(rng, folder):
    bad = place(rng, folder)
    config = ["--config", "configs/miniature.py"]
    return rng.choice(
        (
            ["evaluate", "--run", bad],
            ["evaluate", "--run", "nowhere", "--evaluator", rng.choice(("", "x" * 500))],
            ["train", *config, "--profile", rng.choice(("x", "3:1", ":", "9" * 30))],
            ["train", *config, "--workdir", rng.choice(("file/below", "x" * 300, "foo://bar"))],
            ["prepare", "--verify", bad],
            ["prepare", "--process", rng.choice(("x", "3/2", "-1/2")), *config, "--contexts"],
            ["prepare", *config, f"--config.data.path={rng.choice(('file/below', 'x' * 300))}"],
            ["plan", *config, "--topology", rng.choice(("", "v6e", "v6e:0x0", "v9:1x1", "v6e:99999x99999", "x" * 500))],
            ["plan", *config, "--mesh", rng.choice(("x", "data=0", "data=x", "data=999999"))],
            [rng.choice(("demo", "draw", "")), "--nonsense"],
        )
    )


# ---- Sources ----


@generator
def rows_of_media(rng, folder):
    (folder / "rows").mkdir()
    (folder / "rows" / "a.png").write_bytes(encoded(1))
    row = {"target": "a.png", "prompt": "a cat", "name": "x", "fps": 2, "source": "a.png", "references": ["a.png"]}
    for _ in range(2):
        row[rng.choice(list(row))] = rng.choice(VALUES)
    write_rows(folder / "rows", [row])
    if rng.random() < 0.3:
        damage(rng, folder / "rows" / rng.choice(("metadata.jsonl", "a.png")))
    task = rng.choice(("text_to_image", "image_editing", "reference_to_video"))
    return ["prepare", "--source", "jsonl", "--path", "rows", "--out", "out", "--task", task]


@generator
def archives(rng, folder):
    path = write_tar(folder / "a.tar", pairs(2))
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(1536)] = rng.randrange(256)
    path.write_bytes(data)
    if rng.random() < 0.3:
        damage(rng, path)
    return ["prepare", "--source", "webdataset", "--path", "a.tar", "--out", "out"]


@generator
def places_of_sources(rng, folder):
    kind = rng.choice(
        ("records", "tfds", "webdataset", "jsonl", "files", "parquet", "emoji_styles", "emoji_clips", "x")
    )
    return ["prepare", "--source", kind, "--path", place(rng, folder), "--out", "out"]


@generator
def places_of_results(rng, folder):
    write_rows(folder / "rows", [{"target": "a.png", "prompt": "a cat"}])
    (folder / "rows" / "a.png").write_bytes(encoded(1))
    out = place(rng, folder) or "file"
    return ["prepare", "--source", "jsonl", "--path", "rows", "--out", out, *rng.choice(([], ["--size", "0x9"]))]


@generator
def drawings_of_emoji(rng, folder):
    bodies = (
        *('<image href="/etc/passwd" width="9" height="9"/>', '<use href="file:///etc/passwd#x"/>', "<g>" * 99),
        *("<g>" * 50_000, '<path style="fill:url(/etc/passwd)"/>', "<style>@import url(x)</style>", "&e;", "<path"),
        "".join(f'<g id="a{i}"><use href="#a{i + 1}"/><use href="#a{i + 1}"/></g>' for i in range(40)),
        '<g id="a"><use href="#a"/></g>',
    )
    icons = {"icons": {"cat": {"body": rng.choice(bodies)}}, "width": rng.choice((16, 16, *VALUES))}
    place = folder / "set" / "@iconify-json" / "some"
    place.mkdir(parents=True)
    (place / "icons.json").write_text(json.dumps(icons))
    (place / "info.json").write_text('{"name": "Some"}')
    if rng.random() < 0.3:
        harm(rng, place / rng.choice(("icons.json", "info.json")))
    return ["prepare", "--source", "emoji_styles", "--path", "set", "--out", "out", "--size", "32x32"]


@generator
def written_shards(rng, folder):
    write_rows(folder / "rows", [{"target": "a.png", "prompt": "a cat"}])
    (folder / "rows" / "a.png").write_bytes(encoded(1))
    assert main(["prepare", "--source", "jsonl", "--path", "rows", "--out", "set"]) == 0
    harm(rng, some_file(rng, folder / "set"))
    return rng.choice(
        (["prepare", "--verify", "set"], ["prepare", "--source", "records", "--path", "set", "--out", "out"])
    )


def cases():
    for number in range(CASES):
        function = GENERATORS[number % len(GENERATORS)]
        marks = [pytest.mark.slow] if number >= QUICK else []
        yield pytest.param(function, number, id=f"{function.__name__}-{number}", marks=marks)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "number"), list(cases()))
def test_bad_input_is_one_line_and_leaves_nothing(function, number, golden, tmp_path, monkeypatch, capfd, faults):
    pytest.importorskip("resvg_py")
    (tmp_path / "golden").symlink_to(golden)
    for name in ("sana", "flux", "wan", "qwen", "tokenizer"):
        (tmp_path / name).symlink_to(golden / name)
    monkeypatch.chdir(tmp_path)
    arguments = function(random.Random(number), tmp_path)
    grown = growth()
    capfd.readouterr()
    code = limited(arguments)
    errors = capfd.readouterr().err
    assert code in (0, 2), (code, arguments, errors)
    said = [line for line in errors.splitlines() if line.startswith(("metacanvas ", "metacanvas:"))]
    assert "Traceback" not in errors, errors
    if code == 2:
        assert len([line for line in said if "usage:" not in line]) == 1, (arguments, errors)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.png").exists(), "a result of bad input"
    left = [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".draft")]
    assert not left, (arguments, left)
    assert grown() < GROWTH, (arguments, grown())
    faults("generated bad input")


def growth():
    """A function that tells how many bytes this process has held at most since now, above what it holds now.

    ``ru_maxrss`` cannot tell: it keeps the largest size of the process's whole life, even of the program before it.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is now the present one

    def largest():
        (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return 1024 * int(line.split()[1])

    before = largest()
    return lambda: largest() - before


def test_growth_counts_from_now():
    held = bytearray(2**28)
    held[::4096] = b"x" * len(held[::4096])
    grown = growth()
    del held
    assert grown() < 2**24
    held = bytearray(2**29)
    held[::4096] = b"x" * len(held[::4096])
    assert 2**27 < grown() <= 2**29


def limited(arguments):
    """The exit code of a command, which may take ``SECONDS`` of both cores of a small machine."""

    def late(*_):
        raise TimeoutError(f"more than {SECONDS} s: {arguments}")

    before = {kind: signal.signal(kind, late) for kind in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)
    signal.alarm(BUSY * SECONDS)
    try:
        return main(arguments)
    except SystemExit as stop:  # of argparse
        return stop.code
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def test_every_command_is_fuzzed():
    assert len(GENERATORS) >= 20
