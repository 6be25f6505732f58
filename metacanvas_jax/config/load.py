"""Config files and the resolved configs of runs, as ConfigDicts. Imports no JAX: commands set its flags first."""

import json
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from metacanvas_jax import files
from metacanvas_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def load_config(spec: str, overrides: list[str]) -> ConfigDict:
    """Runs a config file and applies the overrides.

    Raises UserError for a missing file, an unknown variant, an unknown key or a value of another type.
    """
    name, _, variant = spec.partition(":")
    path = Path(name) if Path(name).exists() else ROOT / name
    if not path.is_file():
        raise UserError(f"no config file {name}")
    # Config files import each other as `configs`: those beside the file and those beside the package, which need not be
    # the same.
    beside = [folder for folder in path.resolve().parents if (folder / "configs").is_dir()][:1]
    sys.path[:0] = [str(folder) for folder in (*beside, ROOT) if str(folder) not in sys.path]
    values = flags.FlagValues()
    where = f"{path}:{variant}" if variant else str(path)
    argv = ["metacanvas", f"--config={where}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except UserError:
        raise
    except Exception as error:  # a config file is a program, which may raise anything
        lines = str(error.args[0] if error.args else error).strip().splitlines()
        # An error inside the file comes as a whole traceback, whose last line says what is wrong.
        text = lines[-1].partition(": ")[2] if "Traceback (most recent call last):" in lines else lines[0]
        raise UserError(f"config {spec}: {text}") from error
    config = values.config
    return config.unlock()


def write_config(config: ConfigDict, folder: Path) -> None:
    """The resolved config, as JSON, into a run's folder."""
    files.write(folder / "config.json", config.to_json_best_effort(indent=2) + "\n")


def read_config(run: Path) -> ConfigDict:
    """The resolved config of a run."""
    path = run / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is no run: it has no config.json (a run is the --workdir of `metacanvas train`)")
    try:
        return ConfigDict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
