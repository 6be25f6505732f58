"""Lays the configs into the package when a wheel is built; everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLE = "metacanvas_jax/bundled"
"""Where `metacanvas_jax/config/load.py` looks for ``configs`` when there is no source tree."""


class BuildWithConfigs(build_py):
    """Copies ``configs`` below the package, so that installing it adds no package with so general a name."""

    def run(self) -> None:
        """Builds as always, then copies the config files."""
        super().run()
        if self.editable_mode:  # the source tree itself is used
            return
        for source in sorted(path for path in Path("configs").rglob("*") if path.suffix in (".py", ".json")):
            target = Path(self.build_lib) / BUNDLE / source
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
