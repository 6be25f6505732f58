"""Prints the run of the environment (env.sh) as variables of a shell: ``python job.py KIND [ARGUMENT...]``.

KIND is "train" for a script that starts the run. Its config is then read, and the arguments of `metacanvas train` are
checked, before a machine is touched. With CHECKED=1 whoever calls has done this (`metacanvas sweep --launch`).
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

from metacanvas_jax.errors import UserError
from metacanvas_jax.launch import jobs


def variables(kind: str, extra: list[str]) -> dict[str, str]:
    """The run of this process's environment."""
    environment = dict(os.environ)
    jobs.check_names(environment)
    overrides = jobs.words(environment.get("OVERRIDES", ""), "OVERRIDES")
    checked = environment.get("CHECKED") == "1"
    named = bool(environment.get("TPU")) and bool(environment.get("TOPOLOGY"))
    config = {"hardware": ()}
    if not checked and (kind == "train" or not named):
        config = read(environment["CONFIG"], overrides, extra)
    where, changes = jobs.chosen(config["hardware"], environment)
    if not checked:
        overrides = jobs.merged(changes, jobs.folders(environment, config), overrides)
    found = jobs.shell_variables(where)
    return found | {"TRAIN": jobs.command(environment, where, overrides, extra)} if kind == "train" else found


def read(config: str, overrides: list[str], extra: list[str]) -> Mapping[str, Any]:
    """The config of a run; raises UserError, or exits, for arguments that `metacanvas train` would refuse."""
    from metacanvas_jax.cli.main import make_parser
    from metacanvas_jax.config.load import load_config

    values = [word for word in (*overrides, *extra) if word.startswith("--config.")]
    rest = [word for word in (*overrides, *extra) if word not in values]
    _, unknown = make_parser().parse_known_args(["train", "--config", config, *rest])
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; config values are set with --config.KEY=VALUE")
    return load_config(config, values)


if __name__ == "__main__":
    try:
        print(jobs.assignments(variables(sys.argv[1], sys.argv[2:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        lacks = f"{sys.executable} reads the run and has {str(error)[0].lower()}{str(error)[1:]}"
        print(f"error: {lacks}; pip install -e . there, or set PYTHON", file=sys.stderr)
        sys.exit(2)
