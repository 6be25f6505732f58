"""Files in a bucket, through an emulator of its protocol: the operations that everything else is made of."""

import errno
import io

import pytest

from metacanvas_jax import files, retries
from metacanvas_jax.errors import Unreachable, UserError


def test_a_file_is_written_found_read_in_parts_and_removed(bucket, tmp_path):
    data = bytes(range(256)) * 4096
    files.write(files.folder(f"{bucket.url}/deep/a.bin"), data)
    files.write(files.folder(f"{bucket.url}/b.txt"), "text")
    assert files.listing(bucket.url) == {"b.txt": 4}
    assert files.listing(bucket.url, deep=True) == {"b.txt": 4, "deep/a.bin": len(data)}
    assert files.listing(f"{bucket.url}/nothing") == {} and files.listing(tmp_path / "nothing") == {}
    assert [str(path) for path in files.matching(f"{bucket.url}/*/*.bin")] == [f"{bucket.url}/deep/a.bin"]
    bucket.forget()
    assert files.read_range(f"{bucket.url}/deep/a.bin", 1000, 600) == data[1000:1600]
    assert files.read_ranges(f"{bucket.url}/deep/a.bin", [(0, 3), (len(data) - 2, 9), (len(data), 4), (5, 0)]) == [
        *(data[:3], data[-2:], b"", b"")
    ]
    assert bucket.read("a.bin") == 600 + 3 + 2, "ranges, not objects"
    with files.stream(f"{bucket.url}/deep/a.bin") as file:
        file.seek(-4, io.SEEK_END)
        assert file.read() == data[-4:]
    assert files.read_text(f"{bucket.url}/b.txt") == "text"
    before = files.stamp(f"{bucket.url}/b.txt")
    files.write(files.folder(f"{bucket.url}/b.txt"), "txet")
    assert files.stamp(f"{bucket.url}/b.txt")[0] == 4 and files.stamp(f"{bucket.url}/b.txt") != before
    files.remove(f"{bucket.url}/deep")
    assert files.listing(bucket.url, deep=True) == {"b.txt": 4}
    files.remove(f"{bucket.url}/deep")
    with pytest.raises(FileNotFoundError):
        files.read_range(f"{bucket.url}/deep/a.bin", 0, 1)


def test_a_folder_is_copied_for_libraries_that_know_no_bucket(bucket, tmp_path):
    (tmp_path / "x").write_text("1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "y").write_text("2")
    for name in files.listing(tmp_path, deep=True):
        files.upload(tmp_path / name, f"{bucket.url}/{name}")
    with files.local_copy(bucket.url) as near:
        assert files.listing(near, deep=True) == {"sub/y": 1, "x": 1} and (near / "sub" / "y").read_text() == "2"
    assert not near.exists()
    with files.local_copy(bucket.url, "x", "z") as near:
        assert files.listing(near, deep=True) == {"x": 1}
    with files.local_copy(tmp_path) as near:
        assert near == tmp_path


def test_what_another_process_wrote_is_seen_at_once(bucket):
    import tensorstore

    assert not files.folder(f"{bucket.url}/late").exists() and files.listing(bucket.url) == {}
    store = tensorstore.KvStore.open(f"{bucket.url}/").result()
    store.write("late", b"abc").result()  # a client that shares nothing with gcsfs
    assert files.folder(f"{bucket.url}/late").exists() and files.listing(bucket.url) == {"late": 3}
    assert [path.name for path in files.folder(bucket.url).iterdir()] == ["late"]


def test_a_busy_bucket_is_asked_again_and_one_that_stays_away_is_no_damage(bucket, monkeypatch):
    files.write(files.folder(f"{bucket.url}/some"), "text")
    calls = []

    def busy():
        calls.append(1)
        if len(calls) < 4:
            raise OSError(errno.EIO, "Input/output error")
        return "at last"

    waits = []
    assert retries.retried(busy, "some/file", wait=waits.append) == "at last"
    assert len(waits) == 3 and waits[0] < waits[2]
    calls.clear()
    with pytest.raises(Unreachable, match=r"some/file: no answer in 2 tries .*Input/output error"):
        retries.retried(busy, "some/file", attempts=2, wait=waits.append)
    bucket.fail("some", times=2)
    assert files.read_bytes(f"{bucket.url}/some") == b"text"


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (ConnectionResetError(), True),
        (TimeoutError("slow"), True),
        (FileNotFoundError(errno.ENOENT, "none"), False),
        (PermissionError(errno.EACCES, "no"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (OSError("image file is truncated"), False),  # a decoder's
        (ValueError("bad"), False),
        (UserError("bad"), False),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_errors_that_pass(error, passing):
    assert retries.passes(error) is passing


@pytest.mark.parametrize(("code", "passing"), [(503, True), ("429", True), (401, True), (404, False), (400, False)])
def test_answers_of_a_bucket_that_pass(code, passing):
    gcsfs = pytest.importorskip("gcsfs.retry")
    assert retries.passes(gcsfs.HttpError({"code": code, "message": "x"})) is passing


def test_paths_are_joined_as_a_user_means_them():
    assert files.join("gs://b/w", "qwen/3b") == "gs://b/w/qwen/3b"
    assert files.join("/data/", "laion") == "/data/laion"
    assert files.join("gs://b/w", "gs://c/x") == "gs://c/x"
    assert files.join("gs://b/w", "/here") == "/here"
    assert files.join("", "x") == "x" and files.join("gs://b", "") == ""
    assert files.absolute("gs://b/x") == "gs://b/x"
    assert str(files.folder("file:///tmp/x")) == "/tmp/x" and files.is_local("file:///tmp/x")


def test_a_scheme_that_nothing_here_reads_names_those_that_do():
    with pytest.raises(UserError, match="memory://x: expected a folder, or one of gs://"):
        files.folder("memory://x")


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    files._checked.cache_clear()

    def missing(name):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"gs://b/x: Please install gcsfs .*pip install 'metacanvas_jax\[gcs\]'"):
        files.read_bytes("gs://b/x")
    files._checked.cache_clear()
