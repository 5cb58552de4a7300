"""An S3 server on loopback (moto's), with latency and failures on demand, that counts what it is asked for."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Bucket:
    """A running server with one bucket, "bucket"."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.latency, self.failing = 0.0, 0.0
        """Seconds before each answer, and the share of requests that fail."""
        self.asked: list[str] = []
        """Keys of GET requests that were answered."""
        self.brought: list[str] = []
        """Likewise of PUT requests."""
        self._random, self._counting = random.Random(0), threading.Lock()
        self.failed = 0

    def __call__(self, environment: dict[str, Any], start: Any) -> Any:
        time.sleep(self.latency)
        with self._counting:
            fails = self._random.random() < self.failing
            self.failed += fails
            if not fails and environment["REQUEST_METHOD"] in ("GET", "PUT"):
                kept = self.asked if environment["REQUEST_METHOD"] == "GET" else self.brought
                kept.append(re.sub(r"^/bucket/", "", environment["PATH_INFO"]))
        if fails:
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"]
        return self._app(environment, start)

    def put(self, folder: str | Path, name: str) -> str:
        """Copy a folder there; its URL."""
        import s3fs

        s3fs.S3FileSystem().put(str(folder), f"bucket/{name}", recursive=True)
        return f"s3://bucket/{name}"


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A server for this process and its children; none of its state outlives it."""
    import s3fs
    from werkzeug.serving import make_server

    bucket = Bucket()
    server = make_server("127.0.0.1", 0, bucket, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
    }
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        address = f"http://127.0.0.1:{server.port}/moto-api/reset"
        urllib.request.urlopen(urllib.request.Request(address, method="POST")).close()
        s3fs.S3FileSystem().mkdir("bucket")
        yield bucket
    finally:
        server.shutdown()
        s3fs.S3FileSystem.clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)
