"""Every command line of README and docs is one that works: it is run without a cloud, or its parts are built."""

import os
import re
from pathlib import Path

import docs_support
import pytest
from docs_support import PAGES, REPORTS, Block, blocks, check, check_syntax, commands, metacanvas, spans

from metacanvas_jax.cli.main import make_parser
from metacanvas_jax.evaluate.benchmarks import runner
from metacanvas_jax.evaluate.benchmarks.runner import BENCHMARKS

SHELL = [block for page in PAGES if page.name != REPORTS for block in blocks(page) if block.language in ("", "sh")]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Commands are typed there; nobody but the user is asked for weights."""
    monkeypatch.chdir(docs_support.ROOT)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands(block):
    check_syntax(block)
    found = commands(block)
    assert found
    for words in found:
        check(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_have_known_flags_and_configs(page):
    for span in sorted(set(spans(page))):
        (words,) = commands(Block(page.name, 0, "", span))
        metacanvas(words[1:], complete=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_have_a_known_language(page):
    assert {block.language for block in blocks(page)} <= {"", "sh", "text", "python"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_section_of_a_benchmark_has_its_commands_and_the_figures_of_the_paper(name):
    """From the download to the official command, which is the one that the drawing prints."""
    page = docs_support.ROOT / "docs" / "evaluation.md"
    section = page.read_text().partition(f"\n### `{name}`\n")[2].partition("\n### ")[0]
    (block,) = (block for block in blocks(page) if section and block.text in section)
    (asked,) = (words for words in commands(block) if words[:2] == ["metacanvas", "evaluate"])
    known = make_parser().parse_args(asked[1:])
    assert known.benchmark == name and (known.data or not BENCHMARKS[name].needs_data)
    printed = runner.official(name, Path(known.out), known.data)
    assert printed in " ".join(block.text.replace("\\\n", " ").split())
    for value in BENCHMARKS[name].paper.values():
        assert re.search(rf"[^\d.]{value:g}[^\d]", section), f"the paper's {value:g}"


@pytest.mark.parametrize(
    "line",
    [
        "metacanvas trains --config configs/t2i_lora.py",
        "metacanvas train --config configs/t2i_lora.py --workdirs x",
        "metacanvas train --config configs/t2i_lora.py:lora --workdir x",
        "metacanvas train --config configs/t2i_lora.py --workdir x --config.train.stepz=3",
        "metacanvas plan --config configs/t2i_lora.py --topology v6e:3x3",
        "metacanvas sweep --config configs/t2i_lora.py --sweep configs/sweeps/none.py",
        "metacanvas prepare --source webdatasets --path x --out y",
        "metacanvas evaluate --run x --benchmark gene",
        "metacanvas sample --config configs/published.py:Sana --prompt x",
        "metacanvas fetch --repository Sana",
        "make tests",
        "pip install '.[gpu]'",
        "gcloud compute tpus delete x",
        "CONFIG=configs/t2i_lora.py:lora tpu_scripts/launch.sh",
        "unknown --help",
        "python benchmarks/none.py",
        "kubectl delete everything",
    ],
)
def test_a_wrong_line_would_be_found(line):
    (words,) = commands(Block("x", 0, "", line))
    with pytest.raises((AssertionError, ValueError, SystemExit)):
        check(words)


def test_a_wrong_flag_within_the_text_would_be_found():
    for line in ("train --workdirs DIR", "plan --config C --topologies T", "trains", "sample --config configs/none.py"):
        with pytest.raises((AssertionError, ValueError, SystemExit)):
            metacanvas(line.split(), complete=False)


def test_syntax_that_no_shell_reads_would_be_found():
    with pytest.raises(AssertionError):
        check_syntax(Block("x", 0, "", "metacanvas train --config.mesh.whole=()\n"))
