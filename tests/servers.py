"""Servers that tests start for themselves, each a process of its own on a free port of 127.0.0.1, ended by its own id."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at port {port}: {log.read_text()}")


def end(process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> None:
    process.send_signal(how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Postgres:
    """`open` needs no password, `guarded` has the password `s3cret`; both own what they make in the database `test`."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    def end(self) -> None:
        end(self.process, signal.SIGINT)  # without waiting for its clients

    def uri(self, user: str = "open") -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/test"


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of Debian's in a folder of its own; it refuses to run as root, so root starts it as another user."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's programs are not in /usr/lib/postgresql: apt-get install postgresql")
    binaries = found[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="heliostat-pg-"))
    user: str | None = None
    if os.geteuid() == 0:
        known = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in known else "nobody"
        shutil.chown(folder, user)
    run: Callable[[list[str]], object] = lambda command: subprocess.run(  # noqa: E731
        command, user=user, cwd=folder, check=True, capture_output=True, env={"LC_ALL": "C", "PATH": os.environ["PATH"]}
    )
    process = None
    try:
        run([str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "open", "-A", "trust", "-E", "UTF8", "--no-sync"])
        rules = "host all guarded 127.0.0.1/32 scram-sha-256\nhost all open 127.0.0.1/32 trust\nlocal all open trust\n"
        (folder / "data" / "pg_hba.conf").write_text(rules)
        port, log = free_port(), folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    str(binaries / "postgres"),
                    "-D",
                    str(folder / "data"),
                    "-p",
                    str(port),
                    "-k",
                    str(folder),
                    "-h",
                    "127.0.0.1",
                    "-F",
                ],
                user=user,
                cwd=folder,
                stdout=output,
                stderr=output,
            )
        wait_for(port, process, log)
        psql = [str(binaries / "psql"), "-h", str(folder), "-p", str(port), "-U", "open", "-q", "-v", "ON_ERROR_STOP=1", "-d"]
        for _ in range(100):  # it listens a moment before it takes statements
            with contextlib.suppress(subprocess.CalledProcessError):
                run([*psql, "postgres", "-c", "SELECT 1"])
                break
            time.sleep(0.1)
        run([*psql, "postgres", "-c", "CREATE DATABASE test"])
        run([*psql, "test", "-c", "CREATE ROLE guarded LOGIN SUPERUSER PASSWORD 's3cret'"])
        yield Postgres(port, folder, process)
    finally:
        if process is not None:
            end(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class S3:
    """moto's server, which takes any credentials unless it was started with users."""

    port: int
    process: subprocess.Popen[bytes]

    def uri(self, path: str, **query: str) -> str:
        settings = {"endpoint_override": f"127.0.0.1:{self.port}", "scheme": "http", "region": "us-east-1", **query}
        return f"s3://{path}?{urllib.parse.urlencode(settings)}"

    def end(self) -> None:
        end(self.process, signal.SIGKILL)


@contextlib.contextmanager
def s3(folder: Path, *, unchecked: int | None = None) -> Iterator[S3]:
    """Start a server; after `unchecked` requests it looks at who asks."""
    program = Path(sys.executable).parents[1] / "s3" / "bin" / "moto_server"
    if not program.exists():
        pytest.skip(f"{program} is not there: make servers installs it")
    port, log = free_port(), folder / "s3.log"
    environment = {**os.environ, **({} if unchecked is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(unchecked)})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(program), "-H", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output, env=environment
        )
    try:
        wait_for(port, process, log)
        yield S3(port, process)
    finally:
        end(process)


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Hands bytes on to a port and back; once `left` bytes of answers are through, every connection is cut."""

    daemon_threads = True

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handing)
        self.target, self.left = target, 1 << 40

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handing(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.target)) as upstream, contextlib.suppress(OSError):
            while True:
                for ready in select.select([self.request, upstream], [], [])[0]:
                    content = ready.recv(16384)
                    if ready is upstream:
                        self.server.left -= len(content)
                    if not content or self.server.left <= 0:
                        return
                    (self.request if ready is upstream else upstream).sendall(content)


@contextlib.contextmanager
def cutting_proxy(target: int) -> Iterator[CuttingProxy]:
    with CuttingProxy(target) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
