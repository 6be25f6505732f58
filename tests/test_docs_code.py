"""The Python blocks of README and docs: run, or every call of them bound to the function that it names."""

import ast
import importlib.util
import inspect

import pytest
from docs_support import PAGES, ROOT, blocks

from configs import base
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.sources import SourceSection
from metacanvas_jax.launch import sweeps
from metacanvas_jax.tasks import Bucket

CODE = {str(block): block for page in PAGES for block in blocks(page) if block.language == "python"}
NUMBERED = {}
for block in CODE.values():
    NUMBERED[f"{block.page} {sum(name.startswith(block.page) for name in NUMBERED)}"] = block


def in_a_config(block):
    """Sets values of a config, which can be read afterwards."""
    config = load_config("configs/video_stage3.py", [])
    exec(block.text, {"config": config, "base": base, "SourceSection": SourceSection, "Bucket": Bucket})
    setup = experiment(config)
    assert len(setup.sources) == block.text.count("SourceSection(")
    return setup


def a_config(block, tmp_path):
    """A config file of the user's."""
    (tmp_path / "mine.py").write_text(block.text)
    setup = experiment(load_config(str(tmp_path / "mine.py"), []))
    assert len(setup.sources) == block.text.count("SourceSection(")


def alone(block):
    """Runs with the names that the page has introduced."""
    exec(block.text, {"SourceSection": SourceSection, "Bucket": Bucket, "base": base})


def a_sweep(block, tmp_path):
    """A sweep file whose points are configs."""
    (tmp_path / "some.py").write_text(block.text)
    points = sweeps.read(tmp_path / "some.py", "configs/connector_ablation.py")
    assert len(points) == 3
    for point in points:
        experiment(load_config(point.config, list(point.overrides)))


def bound(block, names):
    """Every call of a function or class of this project, or of a library, has arguments that it takes.

    Imports are made for real. ``names`` are those that the page has introduced: functions, or the classes of variables.
    """
    known, checked = dict(names), 0
    tree = ast.parse(block.text)
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), str(block), "exec"), known)
    variables = {name for name in names if name.islower() and inspect.isclass(names[name])}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        root = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        if not isinstance(root, ast.Name) or root.id not in known:
            continue
        function = eval(compile(ast.Expression(call.func), str(block), "eval"), known)
        method = root.id in variables
        if method and root is call.func:
            function = function.__call__
        unbound = method and not inspect.ismethod(function)
        arguments = [None] * (len(call.args) + unbound)
        inspect.signature(function).bind(*arguments, **{key.arg: None for key in call.keywords})
        checked += 1
    assert checked, f"{block}: no call was checked"


def mllm_names():
    from metacanvas_jax.mllm import canvas, context_cache, generation, media, prompt

    functions = (canvas.canvas_positions, generation.generate, media.read_image, media.read_video, media.sample_frames)
    found = {function.__name__: function for function in functions}
    found |= {cls.__name__: cls for cls in (prompt.Prompter, prompt.PromptConfig, media.MediaConfig)}
    return found | {
        "ContextCache": context_cache.ContextCache,
        "prompter": prompt.Prompter,
        "cache": context_cache.ContextCache,
    }


def export_names():
    from metacanvas_jax.torch_export import MetaCanvasPipeline

    return {"MetaCanvasPipeline": MetaCanvasPipeline, "pipeline": MetaCanvasPipeline}


def adapter_names():
    from diffusers import SanaTransformer2DModel

    return {"transformer": SanaTransformer2DModel}


def diffusers_names():
    from diffusers import SanaPipeline, SanaTransformer2DModel

    pipeline = type("Sana", (SanaPipeline,), {"transformer": SanaTransformer2DModel, "__init__": None})
    return {"pipeline": pipeline, "SanaPipeline": SanaPipeline}


TORCH = {
    "export.md 0": export_names,
    "export.md 1": export_names,
    "export.md 2": adapter_names,
    "quickstart_gpu.md 0": export_names,
    "quickstart_gpu.md 1": diffusers_names,
}
CONFIGS = ("tasks.md 0",)
FILES = ("data.md 0",)
ALONE = ("data.md 1", "data.md 2", "data.md 3")
SWEEPS = ("experiments.md 0",)
BOUND = ("library.md 0", *(f"mllm.md {number}" for number in range(5)))
ELSEWHERE = {"backbones.md 0": "test_import_published.py"}  # runs it on pipelines of tiny networks


def test_every_block_has_a_test():
    assert set(NUMBERED) == {*CONFIGS, *FILES, *ALONE, *SWEEPS, *BOUND, *TORCH, *ELSEWHERE}
    for page, test in ELSEWHERE.items():
        assert page.partition(" ")[0] in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_values_of_configs(name):
    in_a_config(NUMBERED[name])


@pytest.mark.parametrize("name", FILES)
def test_config_files(name, tmp_path):
    a_config(NUMBERED[name], tmp_path)


@pytest.mark.parametrize("name", ALONE)
def test_blocks_that_run_as_they_are(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    alone(NUMBERED[name])


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps(name, tmp_path):
    a_sweep(NUMBERED[name], tmp_path)


@pytest.mark.parametrize("name", BOUND)
def test_calls(name):
    bound(NUMBERED[name], mllm_names())


@pytest.mark.torch
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs the [torch] extra")
@pytest.mark.parametrize("name", TORCH)
def test_calls_in_pytorch(name):
    bound(NUMBERED[name], TORCH[name]())


def test_a_wrong_call_would_be_found():
    block = NUMBERED["mllm.md 1"]
    wrong = type(block)(block.page, block.line, "python", block.text.replace("tokens=144", "token=144"))
    with pytest.raises(TypeError):
        bound(wrong, mllm_names())
