"""A bucket on the loopback address: gcp-storage-emulator, which speaks the JSON API of Google Cloud Storage.

Run as a process of its own: ``python bucket_server.py``, which prints its port. Added to the emulator: requests in
several threads, ranges that count from the end, 416 behind the end, the generation of what is sent, answers of a busy
bucket on demand, and counts.
``GET /counts`` gives what was sent since the last ``GET /forget``: ``[[object, bytes], ...]`` in order. ``GET
/fail?times=2&status=503&match=TEXT`` makes the next ``times`` requests whose address holds TEXT fail.
"""

import contextlib
import json
import logging
import sys
import threading
from functools import partial
from http import server
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage


class OneAtATime:
    """The emulator's storage, whose methods were written for one thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self._lock = storage, threading.RLock()

    def __getattr__(self, name):
        value = getattr(self._storage, name)
        if not callable(value):
            return value

        def called(*args, **kwargs):
            with self._lock:
                return value(*args, **kwargs)

        return called


class Bucket(server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        storage = Storage(use_memory_fs=True)
        storage._write_config_to_file = lambda: None  # it writes a list of all objects for each of them
        buckets.create_bucket("bucket", storage)
        self.storage = OneAtATime(storage)
        self.sent: list[tuple[str, int]] = []
        self.fails: list[tuple[str, int]] = []
        super().__init__(("127.0.0.1", 0), partial(Handler, self.storage))

    def handle_error(self, request, client_address) -> None:
        """Readers that have enough close the connection, which is no error."""


class Counted:
    def __init__(self, file, note) -> None:
        self._file, self._note, self.begun = file, note, False

    def write(self, data):
        for start in range(0, len(data), 1 << 16):  # what a reader that closes early leaves is not counted
            part = data[start : start + (1 << 16)]
            self._file.write(part)
            self._note(len(part) if self.begun else 0)
        return len(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


class Handler(emulator.RequestHandler):
    server: Bucket
    generation = ""  # of the object that is being sent; tensorstore asks for it

    def log_message(self, *_) -> None:
        pass

    def do_GET(self):
        address = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if address.path == "/counts":
            return self.say(200, json.dumps(self.server.sent))
        if address.path == "/forget":
            self.server.sent.clear()
            return self.say(200, "{}")
        if address.path == "/fail":
            self.server.fails += [(query.get("match", ""), int(query["status"]))] * int(query["times"])
            return self.say(200, "{}")
        name = unquote(address.path.rpartition("/o/")[2])
        if query.get("alt") == "media":
            if not self.has_range(name):
                return self.say(416, "{}")
            self.note(name)
            with contextlib.suppress(NotFound):
                self.generation = self.server.storage.get_file_obj("bucket", name)["generation"]
        return self.unless_busy(super().do_GET)

    def do_POST(self):
        self.unless_busy(super().do_POST)

    def do_PUT(self):
        self.unless_busy(super().do_PUT)

    def do_DELETE(self):
        self.unless_busy(super().do_DELETE)

    def unless_busy(self, answer) -> None:
        for match, status in self.server.fails:
            if match in unquote(self.path):
                self.server.fails.remove((match, status))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.say(status, json.dumps({"error": {"code": status, "message": "busy"}}))
                return
        answer()

    def has_range(self, name: str) -> bool:
        """Makes a range absolute; False where the object ends before it."""
        text = self.headers.get("Range", "").removeprefix("bytes=")
        if not text:
            return True
        try:
            size = int(self.server.storage.get_file_obj("bucket", name)["size"])
        except NotFound:
            return True
        start, _, end = text.partition("-")
        if not start:
            start, end = str(max(0, size - int(end))), ""
        del self.headers["Range"]
        self.headers["Range"] = f"bytes={start}-{end}"
        return int(start) < size

    def note(self, name: str) -> None:
        place = len(self.server.sent)
        self.server.sent.append((name, 0))

        def more(count: int) -> None:
            if place < len(self.server.sent):
                self.server.sent[place] = (name, self.server.sent[place][1] + count)

        self.wfile = Counted(self.wfile, more)

    def end_headers(self) -> None:
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
            self.generation = ""
        super().end_headers()
        if isinstance(self.wfile, Counted):
            self.wfile.begun = True

    def say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    bucket = Bucket()
    print(bucket.server_address[1], flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), bucket.shutdown()), daemon=True).start()  # ends with its parent
    bucket.serve_forever()
