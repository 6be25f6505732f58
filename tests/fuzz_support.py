"""Damage to files, values and places where something is wrong, all from a seeded generator of random numbers."""

import json
import math
import os
import shutil
from pathlib import Path

VALUES = (
    *(None, True, -1, 0, 7, 10**6, 10**12, 10**30, -(2**63), 0.5, -0.0, 1e-320, 1e308, math.inf, math.nan),
    *(
        "",
        "x",
        "x" * 5000,
        "\n",
        "☃",
        "../..",
        "int7",
        "gs://nowhere/x",
        "{}",
        [],
        {},
        [[]],
        [1] * 99,
        {"a": {"b": []}},
    ),
)


PLACES = (
    *("nowhere", "x" * 300, "x/" * 2500 + "x", "file/below", "folder", "pipe", "dangling", "/dev/full", "/dev/zero"),
    *("foo://bar", "http://localhost/x", "", "a[b]{c}*?", "\udcff"),
)


GENERATORS = []


def generator(function):
    """Registers ``function(rng, folder) -> arguments`` of a command that runs in the folder."""
    GENERATORS.append(function)
    return function


def copied(folder, name):
    """A part of the golden folders, to be damaged."""
    return Path(shutil.copytree(folder / "golden" / name, folder / "copy", dirs_exist_ok=True))


def damage(rng, path):
    """Makes a file something else than it was."""
    data = path.read_bytes()
    at = rng.randrange(max(len(data), 1))
    path.unlink()
    kinds = {
        "cut": lambda: path.write_bytes(data[:at]),
        "flip": lambda: path.write_bytes(data[:at] + bytes([data[at] ^ (1 + rng.randrange(255))]) + data[at + 1 :]),
        "empty": lambda: path.write_bytes(b""),
        "noise": lambda: path.write_bytes(rng.randbytes(100)),
        "zeros": lambda: path.write_bytes(bytes(len(data))),
        "list": lambda: path.write_text("[1, 2]"),
        "null": lambda: path.write_text("null"),
        "deep": lambda: path.write_text("[" * 100_000),
        "deep objects": lambda: path.write_text('{"a":' * 100_000),
        "digits": lambda: path.write_text('{"a": ' + "9" * 5000 + "}"),
        "latin": lambda: path.write_bytes('{"é": 1}'.encode("latin-1")),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "missing": lambda: None,
    }
    kinds[rng.choice(list(kinds))]()


def leaves(tree, at=()):
    """The places of all values in a JSON tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from leaves(value, (*at, key))


def change(rng, path):
    """Puts another value somewhere into a JSON file."""
    tree = json.loads(path.read_text())
    *above, key = rng.choice(list(leaves(tree)))
    inner = tree
    for step in above:
        inner = inner[step]
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(VALUES)
    path.write_text(json.dumps(tree))


def harm(rng, path):
    """One of the two."""
    change(rng, path) if path.suffix == ".json" and rng.random() < 0.7 else damage(rng, path)


def some_file(rng, folder, pattern="*"):
    return rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def place(rng, folder):
    """A place where something is wrong."""
    (folder / "file").write_text("x")
    (folder / "folder").mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to("nowhere")
    return rng.choice(PLACES)


def program(rng):
    """A Python file in which something is wrong."""
    name, words = rng.choice((("get_config", ""), ("get_config", "words"), ("sweep", "add")))
    body = rng.choice(
        (
            *("return None", "return 3", "return {}", "return []", "1 / 0", "raise KeyError", "raise SystemExit(3)"),
            *(
                "raise ValueError",
                "raise TypeError('a\\nb')",
                f"return {name}({words})",
                "import nowhere",
                "x",
                "x = (",
            ),
            *("import os; os.stat('nowhere')", "add()", "add(3)", "add('a', 3)", "add('../a')", "add('a', b=object())"),
            *(
                "from ml_collections import ConfigDict; return ConfigDict()",
                "raise OSError(2, 'x')",
                "\0",
                "assert False",
            ),
            *("from ml_collections import ConfigDict; return ConfigDict({'name': 3, 'seed': None})", "pass"),
        )
    )
    return rng.choice((f"def {name}({words}):\n    {body}\n", f"{body}\n", "def get_config(\n", "# é\n", ""))
