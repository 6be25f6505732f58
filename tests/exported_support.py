"""Exports of tiny runs that several test files share."""

import export_support as support
import pytest
from export_support import QUIET, save_run, trained_leaves

from metacanvas_jax.exchange.export_run import export_run


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """A folder with a random MLLM and its tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    support.save_qwen(folder)
    return folder


@pytest.fixture(scope="session")
def exported(qwen, tmp_path_factory):
    """``exported(backbone)``: config, trained leaves, the run, its export, and the base transformer."""
    made = {}

    def make(backbone):
        if backbone not in made:
            folder = tmp_path_factory.mktemp(backbone)
            config = support.config(qwen, backbone)
            leaves = trained_leaves(config)
            save_run(folder / "run", config, leaves)
            export_run(folder / "run", folder / "out", QUIET)
            made[backbone] = (
                config,
                leaves,
                folder / "run",
                folder / "out",
                support.save_transformer(backbone, folder / "base"),
            )
        return made[backbone]

    return make
