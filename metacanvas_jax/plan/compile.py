"""Ahead-of-time compilation for a named slice, cached on disk under a hash of the compiler's input."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metacanvas_jax.errors import UserError, first_line
from metacanvas_jax.hardware import GIB
from metacanvas_jax.parallel.ahead import uncached
from metacanvas_jax.parallel.flags import flags_for, installed_libtpu
from metacanvas_jax.plan import gpu
from metacanvas_jax.plan.programs import Program
from metacanvas_jax.plan.topology import Slice

SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
EXCEEDS = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
FORMAT = 1  # of a file in the cache


class DoesNotFit(UserError):
    """The program needs more memory than a chip has. ``needed`` and ``available`` are bytes per device."""

    def __init__(self, message: str, needed: float, available: float, largest: list[str]):
        super().__init__(message)
        self.needed, self.available, self.largest = needed, available, largest


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: its text, and the compiler's account of memory in bytes per device.

    ``peak`` on a TPU is the largest sum of arguments and live temporaries, without the gaps between buffers (which add
    up to a tenth); on a GPU it is the sum of what is held before the step, outputs and the one buffer of temporaries.
    ``seconds`` is the time of the compilation, 0 if it was cached.
    """

    text: str
    arguments: float
    outputs: float
    aliased: float
    peak: float
    host: float
    code: float
    seconds: float


def cache_folder() -> Path:
    """The folder of cached compilations: ``$METACANVAS_PLAN_CACHE``, or the user's cache folder."""
    given = os.environ.get("METACANVAS_PLAN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "metacanvas_jax" / "plan"


def compile_program(program: Program, where: Slice, *, options: Mapping[str, bool | str] | None = None) -> Compiled:
    """Compiles a program for a slice, or loads the compilation from the cache.

    Raises:
        DoesNotFit: the program needs more memory than a chip has.
        UserError: the compiler does not know an option.
    """
    if options is None:
        options = flags_for(where.chip.name) if where.chip.gpu is None else gpu.options(where.chip)
    lowered = program.lowered
    path = cache_folder() / f"{compilation_key(lowered, where, options)}.json.gz"
    if (known := _read(path)) is not None:
        return _result(program, where, known | {"seconds": 0.0})
    start = time.monotonic()
    try:
        with uncached():
            executable = lowered.compile(compiler_options=dict(options))
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            if "No such compile option" in str(error):
                raise UserError(f"{compiler(where)}: {first_line(error)}; see parallel/flags.py") from error
            raise
        record: dict[str, Any] = {"error": str(error)}
    else:
        memory = executable.memory_analysis()
        record = {
            "text": executable.as_text(),
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "peak": memory.peak_memory_in_bytes if where.chip.gpu is None else gpu.peak(memory),
            "host": memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
    record["seconds"] = time.monotonic() - start
    _write(path, record)
    return _result(program, where, record)


def compiler(where: Slice) -> str:
    """Name and version of the compiler for a chip."""
    return f"libtpu {installed_libtpu()}" if where.chip.gpu is None else f"jax_cuda12_pjrt {gpu.installed_plugin()}"


def _result(program: Program, where: Slice, record: dict[str, Any]) -> Compiled:
    if "error" in record:
        raise does_not_fit(record["error"], program.name, where)
    if where.chip.gpu is not None:
        # Weights that the program does not read are no arguments of it, but a training holds them.
        record |= {"peak": record["peak"] + max(sum(program.held.values()) - record["arguments"], 0.0)}
        if record["peak"] > where.limit:  # which the compiler accepts
            message = too_large(program.name, where.name, record["peak"], where.limit)
            raise DoesNotFit(message, record["peak"], where.limit, [])
    return Compiled(**{field.name: record[field.name] for field in dataclasses.fields(Compiled)})


def does_not_fit(message: str, name: str, where: Slice) -> DoesNotFit:
    """One line from the compiler's message, which has two formats, and the largest buffers."""
    available = where.limit
    needed = 0.0
    if match := USED.search(message) or EXCEEDS.search(message):
        needed, available = (float(match.group(i)) * SIZES[match.group(i + 1)] for i in (1, 3))
    largest = []
    for block in re.split(r"\n\s+\d+\. Size: ", message)[1:4]:
        size = block.split("\n", 1)[0].strip()
        shape = re.search(r"Shape: (\S+?)\{", block)
        scope = re.search(r'op_name="([^"]*)"', block)
        largest.append(f"{size} {shape.group(1) if shape else ''} {scope.group(1)[-80:] if scope else ''}".strip())
    text = too_large(name, where.name, needed, available)
    if largest:
        text += f" (largest buffers: {'; '.join(largest)})"
    return DoesNotFit(text, needed, available, largest)


def too_large(name: str, where: str, needed: float, available: float) -> str:
    """The line of a program that needs more memory than there is."""
    return (
        f"{name} does not fit {where}: it needs {needed / GIB:.2f} GiB of {available / GIB:.2f} GiB per device, "
        f"{(needed - available) / GIB:.2f} GiB too much"
    )


def compilation_key(lowered: Any, where: Slice, options: Mapping[str, bool | str]) -> str:
    """The cache key of a compilation: a hash of text, scopes, slice, options and the compiler's version.

    A report needs the scopes, and the plain text does not contain them. Names without a slash are calling functions.
    They are left out, so that the key does not depend on the caller.
    """
    names = set(re.findall(r'loc\("([^"]+)"\(', lowered.as_text(debug_info=True)))
    scopes = sorted(name for name in names if "/" in name)
    version = installed_libtpu() if where.chip.gpu is None else gpu.installed_plugin()
    parts = [lowered.as_text(), scopes, where.name, sorted(options.items()), version, FORMAT]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None  # incomplete or not ours: the program is compiled again and the file overwritten


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_bytes(gzip.compress(json.dumps(record).encode(), compresslevel=3))
    draft.replace(path)
