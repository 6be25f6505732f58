"""One run on TPU slices: what the scripts in ``tpu_scripts/`` need to know of it, as variables of a shell.

The slice is the one that the config was planned for, unless the user names another. A config that was planned for that
slice too brings its mesh and the values that it needs there. Words of commands are quoted for the shells of the hosts.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metacanvas_jax.errors import UserError
from metacanvas_jax.hardware import BOOT_DISK, SliceName, slice_name

NAME = re.compile("[a-z]([a-z0-9-]{0,60}[a-z0-9])?")
RUN = re.compile(r"[A-Za-z0-9_][\w.=+-]*(/[A-Za-z0-9_][\w.=+-]*)*")
FOLDERS = {"WEIGHTS": "weights", "DATA": "data", "RUNS": "runs"}
"""Variables of ``env.sh`` to the keys of ``config.paths`` that they set."""


def defaults(root: Path) -> dict[str, str]:
    """All variables as ``tpu_scripts/env.sh`` leaves them, given those of this process."""
    command = ["bash", "-c", f"set -a; . {shlex.quote(str(root / 'tpu_scripts' / 'env.sh'))}; env -0"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in found.split("\0") if "=" in line)


def chosen(hardware: Sequence[Mapping[str, Any]], environment: Mapping[str, str]) -> tuple[SliceName, list[str]]:
    """The slice of a run, and the arguments that its config needs there.

    ``hardware`` are the rows of the config. TPU, TOPOLOGY and SLICES of the environment choose another slice.

    Raises:
        UserError: only one of TPU and TOPOLOGY is set, none is and the config was planned for no slice, or there is no
            such slice.
    """
    tpu, topology = environment.get("TPU", ""), environment.get("TOPOLOGY", "")
    if bool(tpu) != bool(topology):
        raise UserError(f"TPU is {tpu!r} and TOPOLOGY {topology!r}: set both, or none to take the config's own slice")
    if not tpu and not hardware:
        raise UserError("the config was planned for no slice: set TPU and TOPOLOGY, such as TPU=v6e TOPOLOGY=2x2")
    found = slice_name(f"{tpu}:{topology}" if tpu else hardware[0]["topology"], key="TPU:TOPOLOGY")
    count = environment.get("SLICES", "") or str(found.slices)
    if not count.isdigit() or not int(count):
        raise UserError(f"SLICES is {count!r}, expected a number of slices")
    found = SliceName(found.chip, found.size, int(count))
    found.machine  # noqa: B018  raises for a size that is not offered
    rows = [row for row in hardware if row["topology"].partition("*")[0] == f"{found.chip.name}:{found.size}"]
    return found, arguments(rows[0]) if rows else []


def arguments(row: Mapping[str, Any]) -> list[str]:
    """What a row of ``hardware`` changes in its config, as arguments."""
    axes = dict.fromkeys(("data", "fsdp", "context", "tensor"), "1")
    axes |= dict(part.split("=") for part in row["mesh"].split(",") if part)
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in axes.items()] if row["mesh"] else []
    return [*mesh, *row["overrides"]]


def merged(*groups: Sequence[str]) -> list[str]:
    """Arguments of several groups; of two that set the same value the later one stays."""
    latest: dict[str, str] = {}
    for argument in (word for group in groups for word in group):
        key = argument.partition("=")[0]
        latest.pop(key, None)
        latest[key] = argument
    return list(latest.values())


def words(text: str, key: str) -> list[str]:
    """The words of a variable, split as a shell does. Raises UserError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key} is {text!r}: {error}") from error


def folders(environment: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """``config.paths`` of a run, from the variables of ``env.sh``."""
    known = config.get("paths", {})
    return [f"--config.paths.{key}={environment[name]}" for name, key in FOLDERS.items() if key in known]


def command(environment: Mapping[str, str], where: SliceName, changes: Sequence[str], extra: Sequence[str]) -> str:
    """`metacanvas train` of a run as every host gets it, quoted for its shell."""
    run = ["metacanvas", "train", "--config", environment["CONFIG"], "--workdir", environment["WORKDIR"]]
    return shlex.join([*run, *changes, *extra, "--processes", str(where.hosts)])


def check_names(environment: Mapping[str, str]) -> None:
    """Raises UserError for names that a cloud, or the shell of a host, would not take as they are."""
    if not environment.get("CONFIG"):  # after which the run is named, unless RUN is set
        raise UserError("CONFIG is not set: name a config, such as CONFIG=configs/t2i_scratch.py")
    for key, pattern, expected in (
        ("NAME", NAME, "lower-case letters, digits and hyphens, a letter first, at most 62"),
        ("RUN", RUN, "letters, digits and _ . = + -, parts separated by /"),
    ):
        if not pattern.fullmatch(environment.get(key, "")):
            raise UserError(f"{key} is {environment.get(key, '')!r}, expected {expected}")


def shell_variables(where: SliceName) -> dict[str, str]:
    """A slice as the scripts read it."""
    return {
        "TPU": where.chip.name,
        "TOPOLOGY": where.size,
        "SLICES": str(where.slices),
        "HOSTS": str(where.hosts // where.slices),
        "HOST_CHIPS": str(where.machine.chips),
        "HOST_MEMORY": str(where.machine.memory),
        "HOST_DISK": str(BOOT_DISK),
        "MACHINE": where.machine.name,
        "TYPE": where.accelerator,
        "RUNTIME": where.offer.runtime,
        "NODE": where.offer.node,
        "ZONES": " ".join(where.offer.zones),
        "MACHINES": described([where]),
    }


def described(slices: Sequence[SliceName]) -> str:
    """Slices in words, equal ones together: "2 slices of v6e-64 (8x8)"."""
    kinds: dict[str, int] = {}
    for where in slices:
        kind = f"{where.accelerator} ({where.size})"
        kinds[kind] = kinds.get(kind, 0) + where.slices
    return ", ".join(f"{count} slice{'s' * (count > 1)} of {kind}" for kind, count in kinds.items())


def assignments(variables: Mapping[str, str]) -> str:
    """Variables as lines that a shell evaluates."""
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())


def environment() -> dict[str, str]:
    """The variables of this process."""
    return dict(os.environ)
