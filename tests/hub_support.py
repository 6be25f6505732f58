"""A Hugging Face hub on the loopback address: lists repositories, and serves files with ranges, like the real one."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import pytest
from huggingface_hub.utils import close_session

COMMIT = "0123456789abcdef" * 2 + "01234567"
LARGE = 100  # bytes from which a file is in Git LFS


class Hub:
    """The repositories (name to files), and what was asked for so far.

    ``damaged`` names files that arrive with other bytes, ``cut`` files whose
    connections end after so many bytes, one after another.
    ``gated`` repositories are listed and not served.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.sent = 0
        self.gated: set[str] = set()
        self.damaged: set[str] = set()
        self.cut: dict[str, list[int]] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                del arguments

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def add(self, name, files):
        self.repositories[name] = files

    def answer(self, request):
        path = urlsplit(request.path).path.lstrip("/")
        self.asked.append(f"{request.command} {path}")
        words = path.split("/")
        api = words[0] == "api"
        words = words[1:] if api else words
        words = words[1:] if words[0] in ("models", "datasets") else words
        if len(words) < 4:
            return self.refuse(request, 404, "EntryNotFound")
        name, verb, rest = "/".join(words[:2]), words[2], words[3:]
        files = self.repositories.get(name)
        if files is None:
            return self.refuse(request, 404, "RepoNotFound")
        if rest[0] not in (COMMIT, "main"):
            return self.refuse(request, 404, "RevisionNotFound")
        if api and verb == "revision":
            return self.json(request, {"id": name, "sha": COMMIT, "siblings": []})
        if api and verb == "tree":
            assert parse_qs(urlsplit(request.path).query)["recursive"] == ["true"]
            return self.json(request, [self.entry(file, data) for file, data in files.items()])
        if name in self.gated:
            return self.refuse(request, 403, "GatedRepo")
        return self.serve(request, "/".join(rest[1:]), files["/".join(rest[1:])])

    def entry(self, file, data):
        entry = {"type": "file", "path": file, "size": len(data), "oid": blob_id(data)}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def serve(self, request, file, data):
        tag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else blob_id(data)
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        body = data[start:]
        if file in self.damaged:
            body = bytes(byte ^ 1 for byte in body)
        request.send_response(206 if start else 200)
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cut.get(file):
            body = body[: self.cut[file].pop(0)]
            request.close_connection = True
        request.wfile.write(body)
        self.sent += len(body)

    def json(self, request, value):
        body = json.dumps(value).encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body if request.command == "GET" else b"")

    def refuse(self, request, status, code):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def at(monkeypatch, url):
    """Lets this process ask the hub at an address, although it was started offline."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 500)  # what is lost of a broken connection
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries


@pytest.fixture
def hub(monkeypatch):
    served = Hub()
    at(monkeypatch, served.url)
    close_session()
    yield served
    close_session()
    served.close()
