"""Imports go down the list of packages in CONTRIBUTING.md, and what runs without JAX does not reach for it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metacanvas_jax"
# From the bottom to the top; a line's packages may import each other, and everything above them in this list.
ORDER = (
    ("errors", "hardware", "images", "limits", "sizes"),
    ("types", "retries", "files", "seals", "locks", "trees"),
    ("task_table", "tasks"),
    ("worlds",),
    ("report",),
    ("parallel", "nn", "kernels"),
    ("diffusion",),
    ("weights",),
    ("dit", "vae", "text", "mllm"),
    ("connectors",),
    ("metacanvas",),
    ("registry",),
    ("config",),
    ("data",),
    ("train",),
    ("paint",),
    ("precompute",),
    ("plan",),
    ("exchange",),
    ("evaluate",),
    ("launch",),
    ("miniature",),
    ("library", "cli"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
APART = ("torch_export", "torch_side")  # the PyTorch package: it imports no JAX, hence hardly anything of this project


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return found


def upward(source: str, target: str) -> bool:
    """Whether a module of the package ``source`` may not import one of ``target``."""
    return RANK[target] > RANK[source]


def test_every_package_has_its_place_in_the_order():
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {"__init__", *APART} == set(RANK)


def test_imports_go_down():
    wrong = []
    for path in modules():
        source = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if source in APART or path.stem in APART:
            continue
        for line, name in imported(path):
            if not name.startswith("metacanvas_jax."):
                continue
            parts = name.split(".")
            if parts[1] in APART or parts[-2] in APART:
                continue
            if upward(source, parts[1]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_order_forbids_something():
    assert upward("train", "cli") and upward("types", "dit")
    assert not upward("cli", "train") and not upward("nn", "kernels")


def test_the_chat_template_is_written_out_once():
    network = {"tokenizer.py", "published_folder.py"}  # the published vocabulary and its ids
    found = {path.name for path in modules() if "<|im_" in path.read_text() and "<|vision_start" in path.read_text()}
    assert found - network == {"template.py"}


def test_the_pytorch_package_imports_no_jax():
    allowed = {"metacanvas_jax.errors", "metacanvas_jax.images", "metacanvas_jax.torch_export"}
    allowed |= {"metacanvas_jax.files", "metacanvas_jax.sizes", "metacanvas_jax.mllm.template"}
    allowed |= {"metacanvas_jax.text.qwen3.prompts"}
    wrong = []
    for path in modules():
        if "torch_export" not in path.parts and path.stem != "torch_side":
            continue
        for line, name in imported(path):
            ours = (
                name.startswith("metacanvas_jax.") and not name.startswith(tuple(allowed)) and "torch_side" not in name
            )
            if ours or name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax"):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 400


NETWORKS = {  # what names each network in a text, and its folders
    "sana": (r"sana", ("dit/sana",)),
    "flux": (r"flux", ("dit/flux", "vae/flux2")),
    "wan": (r"\bwan(\d|vae)?\b", ("dit/wan", "vae/wan")),
    # Without what one class of diffusers calls another network's autoencoder.
    "qwen": (r"(?<!AutoencoderKL)qwen", ("mllm/qwen2_5_vl", "mllm/qwen3_vl", "dit/qwen_image", "text/qwen3")),
    "gemma": (r"gemma", ("text/gemma2",)),
    "dc_ae": (r"\bdc_?ae\b", ("vae/dc_ae",)),
    "patch_pca": (r"patch_?pca", ("vae/patch_pca",)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_known_in_its_folder_and_the_registry_only(network):
    pattern, folders = NETWORKS[network]
    named = re.compile(pattern, re.IGNORECASE)
    elsewhere = [
        str(path.relative_to(PACKAGE))
        for path in modules()
        if named.search(path.read_text()) and not str(path.relative_to(PACKAGE)).startswith((*folders, "registry.py"))
    ]
    assert not elsewhere
