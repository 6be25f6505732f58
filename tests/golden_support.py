"""Tiny runs of SANA, FLUX and Wan with random weights, as version 0.1 wrote them: what no test has to train."""

import tarfile
from pathlib import Path

FOLDERS = Path(__file__).parent / "golden" / "folders_0.1.tar.xz"
BACKBONES = ("sana", "flux", "wan")


def extracted(place: Path) -> Path:
    """The folders below ``place``, which is where commands on them are run: configs name weights relative to it."""
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(place, filter="data")
    return place
