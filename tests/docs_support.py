"""The blocks of the pages, and the rules by which their command lines are checked.

A block with the word ``text`` after its fence is no command, one with ``python`` is code. Every other block is lines of
shell: each command of each line must have a rule, named by its first word.
"""

import argparse
import contextlib
import dataclasses
import io
import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

from cloud_support import BARE, SCRIPTS

from metacanvas_jax.cli.main import COMMANDS, main, make_parser
from metacanvas_jax.config.load import load_config
from metacanvas_jax.config.read import experiment
from metacanvas_jax.config.sources import Kind
from metacanvas_jax.evaluate.evaluators import EVALUATORS
from metacanvas_jax.hardware import gpu_name, slice_name
from metacanvas_jax.launch import sweeps
from metacanvas_jax.weights.repositories import REPOSITORIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPORTS = "performance.md"  # its blocks are what `make plan-all` printed
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_SPAN = re.compile(r"`(metacanvas [^`]+)`")
PLACEHOLDER = re.compile(r"[A-Z]{1,7}(\[:\w+\])?|mine\.py")  # such as DIR, FILE[:variant], or a file of the user's


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    found = [(match.start(), match[1], match[2]) for match in _FENCE.finditer(text)]
    return [Block(page.name, text[:start].count("\n") + 1, language, body) for start, language, body in found]


def spans(page: Path) -> list[str]:
    """What stands between backquotes in the text and begins with ``metacanvas``."""
    return [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", page.read_text()))]


def commands(block: Block) -> list[list[str]]:
    """The commands of a block of shell as words; settings of variables stand in front of them."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split, words = True, [[]]
        for word in lexer:
            if set(word) <= set("&;|"):
                words.append([])
            else:
                words[-1].append(word)
        found += [part for part in words if part]
    return found


def check_syntax(block: Block) -> None:
    """Raises AssertionError for what bash cannot read."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{block}: {done.stderr}"


def check(words: list[str]) -> None:
    """Checks one command by its rule. Raises AssertionError, UserError or SystemExit for what would fail."""
    settings = {}
    while "=" in words[0] and words[0].partition("=")[0].isidentifier():
        name, _, settings[name] = words[0].partition("=")[0], None, words[0].partition("=")[2]
        words = words[1:]
    first = words[0].removeprefix(".venv/bin/")
    if first.startswith("tpu_scripts/"):
        script(first, words[1:], settings)
        return
    assert first in RULES, f"no rule of tests/docs_support.py covers: {shlex.join(words)}"
    assert not settings or first in ("metacanvas", "bash"), f"variables before {first}"
    RULES[first](words[1:])


def metacanvas(words: list[str], *, complete: bool = True) -> None:
    """Every flag is known, and what a config, a sweep or a source says can be built. Without ``complete`` flags may
    lack."""
    if words[:1] in ([], ["--version"]):
        return
    assert words[0] in COMMANDS, f"metacanvas {words[0]}"
    parser = make_parser()
    if not complete:
        part(parser, words)
        return
    known, rest = parser.parse_known_args(words)
    overrides = [word for word in rest if word.startswith("--config.")]
    assert overrides == rest, f"unknown argument {rest[:1]}"
    assert not overrides or hasattr(known, "config")
    config = getattr(known, "config", None)
    if config and not PLACEHOLDER.fullmatch(config):
        load(config, overrides)
    if known.command == "plan" and known.topology and not PLACEHOLDER.fullmatch(known.topology):
        assert gpu_name(known.topology) or slice_name(known.topology, key="--topology").machine
    if known.command == "prepare" and known.source and not PLACEHOLDER.fullmatch(known.source):
        assert known.source in get_args(Kind)
    if known.command == "evaluate" and known.benchmark and not PLACEHOLDER.fullmatch(known.benchmark):
        assert known.benchmark in EVALUATORS
    if known.command == "sweep" and not PLACEHOLDER.fullmatch(str(known.sweep)):
        for point in sweeps.read(known.sweep, known.config):
            load(point.config, [*point.overrides, *overrides])
    if known.command == "fetch":
        fetch(words)


def part(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Of a part of a command: all of its flags are known, and its config loads."""
    (commands_of,) = (action for action in parser._actions if isinstance(action.choices, dict))
    known = commands_of.choices[words[0]]._option_string_actions
    flags = [word for word in words[1:] if word.startswith("--") and not word.startswith("--config.")]
    assert set(flags) <= set(known), f"metacanvas {words[0]} has no {set(flags) - set(known)}"
    config = words[words.index("--config") + 1] if "--config" in words else "FILE"
    if not PLACEHOLDER.fullmatch(config):
        load(config, [word for word in words if word.startswith("--config.")])


def load(config: str, overrides: list[str]) -> None:
    """A config with its overrides, as an experiment; of published folders, that they can be fetched."""
    file, _, variant = config.partition(":")
    if file == "configs/published.py":
        names = [folder.rpartition("/")[2] for folder in variant.split(",")]
        assert set(names) <= set(REPOSITORIES), names
    else:
        experiment(load_config(config, overrides))


def fetch(words: list[str]) -> None:
    """Runs it: offline, a dry run says what to bring."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([*words, "--dry-run"] if "--dry-run" not in words else words) == 0
    assert "hf download" in said.getvalue()


def script(name: str, words: list[str], settings: dict[str, str]) -> None:
    """Runs a script of tpu_scripts without a cloud: it prints what it would ask for."""
    environment = BARE | {"CHECKED": "0", "REVISION": "0123456789" * 4} | settings
    call = ["bash", str(SCRIPTS / Path(name).name), *words, "--dry-run"]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (done.stdout or "status" in name), done.stderr
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, timeout=60).returncode == 0


def make(words: list[str]) -> None:
    """Every target is one of the Makefile."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(words) <= targets, words


def pip(words: list[str]) -> None:
    """Every extra is one of the project."""
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^([\w-]+) = \[", project.partition("[project.optional-dependencies]")[2], re.M))
    named = re.findall(r"\[([\w,-]+)\]", " ".join(words))
    assert words[0] == "install" and {extra for group in named for extra in group.split(",")} <= extras


def gcloud(words: list[str]) -> None:
    """The groups of Google's command that the pages use; what follows them is read by nobody here."""
    known = ("auth login", "projects create", "config set", "services enable", "storage buckets", "storage cp")
    assert " ".join(words[:2]) in known, words


def python(words: list[str]) -> None:
    """A script of this project is there; those of others lie in their repositories."""
    assert not words[0].startswith("benchmarks/") or (ROOT / words[0]).is_file(), words[0]


def outside(words: list[str]) -> None:
    """Other people's programs, whose arguments are theirs."""
    assert words


RULES = {
    "metacanvas": metacanvas,
    "make": make,
    "pip": pip,
    "gcloud": gcloud,
    "python": python,
    "npm": outside,
    "git": outside,
    "cd": outside,
    "hf": outside,
    "tensorboard": outside,
} | dict.fromkeys(("bash", "sh", "cp", "tar", "zip", "tee", "vbench", "for", "do"), outside)
RULES["done"] = lambda words: None
