"""The bucket of a test session: an emulator in a process of its own, and what clients must know to find it."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

CLIENTS = {
    "STORAGE_EMULATOR_HOST": "http://{}",  # gcsfs
    "TENSORSTORE_GCS_HTTP_URL": "http://{}",  # tensorstore, with which Orbax writes
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": "http://{}",  # the C++ client in array_record
    "NO_GCE_CHECK": "true",
}


@dataclasses.dataclass
class Bucket:
    """The address of the emulator, and ``url``, the place of one test in its bucket."""

    address: str
    url: str

    def counts(self) -> list[tuple[str, int]]:
        """(object, bytes sent) of every read since `forget`; objects are named from the bucket's root."""
        return [tuple(pair) for pair in self._ask("counts")]

    def read(self, part: str) -> int:
        """Bytes sent of the objects whose name holds ``part`` since `forget`."""
        return sum(count for name, count in self.counts() if part in name)

    def forget(self) -> None:
        self._ask("forget")

    def fail(self, match: str, times: int, status: int = 503) -> None:
        """Lets the next requests that concern objects of this name fail."""
        self._ask(f"fail?times={times}&status={status}&match={match}")

    def _ask(self, what: str):
        with urllib.request.urlopen(f"http://{self.address}/{what}", timeout=10) as answer:
            return json.load(answer)


def why_not() -> str:
    """Why there can be no bucket here; "" where there can."""
    missing = [name for name in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else ""


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Starts the emulator; gives its host and port, and sets the environment of this process and its children.

    Raises RuntimeError where it does not start.
    """
    script = Path(__file__).with_name("bucket_server.py")
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        port = process.stdout.readline().decode().strip()
        if not port:
            raise RuntimeError(f"the emulator ended with {process.wait()}")
        address = f"127.0.0.1:{port}"
        os.environ |= {name: value.format(address) for name, value in CLIENTS.items()}
        try:
            yield address
        finally:
            process.stdin.close()


def golden(place: Path) -> Path:
    """Tiny runs, their exports, an MLLM and a tokenizer, unpacked on this machine."""
    with tarfile.open(Path(__file__).parent / "golden" / "folders_0.1.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place


def stored(address: str, golden: Path, *backbones: str) -> Bucket:
    """The part of some backbones (SANA) of the same folders in the bucket; configs of runs there name the bucket's."""
    from metacanvas_jax import files

    backbones = backbones or ("sana",)
    place = Bucket(address, f"gs://bucket/{'-'.join(golden.parts[-2:])}")
    for name in files.listing(golden, deep=True):
        if name.startswith((*backbones, "qwen", "tokenizer")):
            data = (golden / name).read_bytes()
            if name.endswith("/run/config.json"):
                tree = json.loads(data)
                tree["mllm"] |= {key: f"{place.url}/{tree['mllm'][key]}" for key in ("weights", "tokenizer")}
                data = json.dumps(tree).encode()
            files.write(files.folder(f"{place.url}/{name}"), data)
    return place
