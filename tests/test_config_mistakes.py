"""Mistakes on a command line and in config files: one line that says what is wrong and what was meant; exit code 2."""

import pytest

from metacanvas_jax.cli.main import main
from metacanvas_jax.config.load import load_config
from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import training
from metacanvas_jax.parallel.mesh import MeshConfig, mesh_sizes

MINIATURE = "configs/t2i_scratch.py:miniature"
TYPED = {
    "width": ("--config.dit.width=65", r"unknown key dit.width; did you mean dit.head_width\?"),
    "section": ("--config.trian.steps=3", r"unknown key trian; did you mean train\?"),
    "key": ("--config.train.stepz=3", r"unknown key train.stepz; did you mean train.steps\?"),
    "key in a row": (
        "--config.buckets[0].sise=(60,60)",
        r"unknown key buckets\[0\].sise; did you mean .*\.size\?",
    ),
    "number of a row": ("--config.buckets[7].size=(60,60)", r"no buckets\[7\]: there are 1, numbered from 0"),
    "below a value": ("--config.train.steps.more=3", "unknown key train.steps.more; known keys: none"),
    "no number": ("--config.train.steps=three", "train.steps=three"),
    "no value": ("--config.train.steps", "Missing value for flag --config.train.steps"),
}


@pytest.mark.parametrize("kind", TYPED)
def test_a_mistyped_override_is_one_line_without_escapes(kind):
    override, expected = TYPED[kind]
    with pytest.raises(UserError, match=expected) as caught:
        load_config(MINIATURE, [override])
    text = str(caught.value)
    assert text.startswith(f"config {MINIATURE}: ") and "\n" not in text and "\\" not in text


FILES = {
    "division": ("def get_config():\n    return 1 / 0\n", r"FILE, line 2: ZeroDivisionError: division by zero"),
    "syntax": ("def get_config(:\n", "FILE, line 1: invalid syntax"),
    "nothing": ("x = 1\n", "config FILE: the file has no attribute 'get_config'"),
    "another": ("def get_config():\n    return 3\n", r"FILE: get_config\(\) returns int, expected a ConfigDict"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_mistake_in_a_config_file_has_its_line(kind, tmp_path):
    text, expected = FILES[kind]
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(UserError, match=expected.replace("FILE", str(file))):
        load_config(str(file), ["--config.x=1"] if kind == "division" else [])


def test_a_config_file_that_is_not_there_names_the_one_that_was_meant():
    with pytest.raises(UserError, match=r"no config file .*; did you mean configs/t2i_scratch\.py\?"):
        load_config("configs/t2i_scrtch.py", [])
    with pytest.raises(UserError, match=r"no config file nothing/at_all$"):
        load_config("nothing/at_all", [])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("dit.layers=0", "dit.layers is 0, expected at least 1"),
        ("mllm.language.layers=0", "mllm.language.layers is 0, expected at least 1"),
        ("mllm.language.width=63", "width 63 is not a multiple of heads 2"),
        ("canvas_connector.width=63", "canvas_connector.width is 63, but dit.width is 64"),
        ("train.steps=0", "train.steps is 0, expected at least 1"),
        ("train.accumulate=3", "train.accumulate 3 does not divide the batch of 8 samples"),
        ("dit.remat=ful", "dit.remat is 'ful', expected one of 'none', 'dots'"),
        ("sampler.method=eulr", "sampler.method is 'eulr', expected one of 'euler'"),
        ("sources[0].kind=foldr", r"sources\[0\].kind is 'foldr', expected one of 'records'"),
        ('train.rules=(("(","train"),)', r"train.rules\[0\]: '\(' is not a regular expression"),
    ],
)
def test_a_value_that_cannot_be_is_one_line_with_code_2(override, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "fit", None)  # nothing trains
    call = ["train", "--config", MINIATURE, "--workdir", str(tmp_path / "run"), f"--config.{override}"]
    assert main(call) == 2
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(UserError, match=expected):
        raise UserError(line)
    assert line.startswith("metacanvas train: config")
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_divide_the_devices_is_named_as_it_was_written():
    with pytest.raises(UserError, match="mesh fsdp 3 does not divide 4 devices"):
        mesh_sizes(MeshConfig(fsdp=3), 4)
