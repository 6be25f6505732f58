"""Every file and every name of the package that docs, configs and scripts mention exists."""

import importlib.util
import re
from pathlib import Path

import pytest

from metacanvas_jax.evaluate.benchmarks.runner import BENCHMARKS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "metacanvas_jax"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "configs").rglob("*.py")) + sorted(p for p in (ROOT / "tpu_scripts").iterdir() if p.is_file())
FOLDERS = (ROOT, PACKAGE, *(ROOT / name for name in ("configs", "configs/sweeps", "tests", "tpu_scripts")))
KNOWN = {"sweep.md", "mine.py", "configs/NAME.py"} | {
    path.name for path in PACKAGE.rglob("*.py")
}  # written, placeholders
OFFICIAL = {"vbench2_beta_i2v/download_data.sh", "eval_qwen.sh"}
"""Scripts of benchmarks' own repositories, beside those in the commands that the project prints."""
FILE = re.compile(r"(?<![\w/.$*])((?:\.\./)?\w[\w-]*(?:/[\w-]+)*\.(?:py|md|sh))(?![\w/*-])")
IMPORT = re.compile(r"from (metacanvas_jax[\w.]*) import ([\w, ]+)")
DOTTED = re.compile(r"\bmetacanvas_jax(?:\.\w+)+\b(?!\.py|/)")


def exists(name: str) -> bool:
    """Whether a dotted name is a module of the package, or an attribute of one; the PyTorch side only with torch."""
    module, *rest = name.split(".")
    if rest[:1] == ["torch_export"] and importlib.util.find_spec("torch") is None:
        return (PACKAGE / "torch_export").is_dir()
    path = PACKAGE
    while rest and ((path / rest[0]).is_dir() or (path / f"{rest[0]}.py").exists()):
        path = path / rest[0]
        module = f"{module}.{rest.pop(0)}"
    found = importlib.import_module(module)
    return not rest or hasattr(found, rest[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_mentions_exists(page):
    text = page.read_text().replace("metacanvas_jax.tar", "").replace("metacanvas_jax.git", "")
    near = (page.parent, *FOLDERS)
    files = [name for name in FILE.findall(text) if not any((folder / name).exists() for folder in near)]
    names = DOTTED.findall(text)
    names += [f"{module}.{name.strip()}" for module, found in IMPORT.findall(text) for name in found.split(",")]
    printed = (one.command(Path("/out"), "/data", Path("/scores")) for one in BENCHMARKS.values())
    assert not set(files) - KNOWN - OFFICIAL - set(FILE.findall(" ".join(printed)))
    assert not [name for name in names if not exists(name)]
