"""A private Ray, as users get it, and joining one that runs. What starts a Ray of its own does so in another process."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import psutil
import pytest
import ray

from app.address import check_reachable
from app.ports import free_ports
from app.processes import ray_processes
from app.session import Session, open_session
from pipelines.errors import ClusterError
from tests.local.conftest import PATIENCE_S


def test_the_shared_session_is_private_and_answers_through_haproxy(session: Session) -> None:
    assert session.private and session.haproxy
    assert Path(session.log_dir, "raylet.out").exists()
    assert ray.cluster_resources()["CPU"] == 4


def test_every_process_of_ray_listens_on_this_machine_alone(session: Session) -> None:
    # HAProxy binds its metrics and statistics ports everywhere, which no setting changes; the README says so.
    excepted = {int(os.environ[f"RAY_SERVE_HAPROXY_{kind}_PORT"]) for kind in ("METRICS", "STATS")}
    listening = {
        connection.laddr
        for process in ray_processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port not in excepted
    }

    assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert listening


def test_no_process_is_started_that_a_private_ray_has_no_use_for(session: Session) -> None:
    commands = " ".join(word for process in ray_processes() for word in process.cmdline())

    assert "gcs_server" in commands and "raylet" in commands
    assert "monitor.py" not in commands and "dashboard.py" not in commands


def test_slots_name_their_holders(session: Session) -> None:
    @ray.remote(num_cpus=3.5)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    slots = session.slots()
    ray.kill(holder)

    [(name, held)] = slots.holders.items()
    assert slots.total == 4 and slots.free == 0.5 and held == 3.5
    assert name.startswith("actor test_slots_name_their_holders.<locals>.Holder of job ")
    with pytest.raises(ClusterError, match=r"no CPU slot is free: 4 in all, held by actor .*Holder of job .* \(3.5\)"):
        slots.for_workers()


def test_a_task_that_has_just_ended_holds_nothing(session: Session) -> None:
    @ray.remote(num_cpus=1)
    def work() -> None:
        pass

    for _ in range(20):
        ray.get([work.remote() for _ in range(4)])
        assert session.slots().free == 4 and session.slots().holders == {}


def test_a_session_inside_a_session_uses_the_same_ray_and_leaves_it_running(session: Session) -> None:
    with open_session() as inner:
        assert inner.address == session.address and not inner.private

    assert ray.is_initialized()


def test_a_second_process_joins_by_the_address(session: Session) -> None:
    script = """
        with open_session(sys.argv[1]) as session:
            print(json.dumps([session.private, session.haproxy, session.slots().total]))
        print(json.dumps([name for name in os.environ if os.environ[name] != before.get(name)]))
    """

    answer, changed = run(script, session.address).splitlines()

    assert json.loads(answer) == [False, True, 4.0]
    assert json.loads(changed) == []


def test_a_wrong_token_is_a_sentence(session: Session) -> None:
    script = """
        try:
            with open_session(sys.argv[1]):
                pass
        except ClusterError as error:
            print(error)
    """

    answer = run(script, session.address, RAY_AUTH_TOKEN="0123456789abcdef0123456789abcdef")

    assert answer.startswith(f"the Ray at {session.address} does not accept the token found here; put its own")


def test_another_version_of_ray_is_a_sentence(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    running = ray.__version__
    monkeypatch.setattr(ray, "__version__", "2.1.0")

    with pytest.raises(ClusterError, match=f"is {running}, here it is 2.1.0; install the same on both"):
        check_reachable(session.address)


@pytest.fixture
def other_server() -> Iterator[str]:
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_address_where_no_ray_is_is_a_sentence_at_once(other_server: str) -> None:
    with pytest.raises(ClusterError, match=rf"no Ray can be reached at {other_server} \(another program answers there\)"):
        check_reachable(other_server)
    with pytest.raises(ClusterError, match=r"no Ray can be reached at 127.0.0.1:1 \(connection refused\); expected HOST:PORT"):
        check_reachable("127.0.0.1:1")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is a dashboard, to which jobs are sent"),
        ("ray://127.0.0.1:10001", "ray://127.0.0.1:10001 is for Ray Client, which is not supported"),
        ("headnode", "'headnode' is not the address of a Ray; expected HOST:PORT"),
    ],
)
def test_other_kinds_of_addresses_are_sentences(address: str, sentence: str) -> None:
    answer = run(
        """
        try:
            with open_session(sys.argv[1]):
                pass
        except ClusterError as error:
            print(error)
        """,
        address,
    )

    assert answer.startswith(sentence)


def test_a_private_ray_is_quiet_and_leaves_nothing_even_after_an_error() -> None:
    script = """
        try:
            with open_session(slots=2, object_store_mb=100) as session:
                import ray.data
                import ray.serve
                rows = ray.data.range(100).map_batches(lambda batch: batch).count()
                folder = os.environ["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"]
                raise ValueError(rows)
        except ValueError as error:
            left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
            changed = [name for name in os.environ if os.environ[name] != before.get(name)]
            print(json.dumps([str(error), os.path.exists(folder), os.path.exists(session.log_dir), left, changed]))
    """

    assert json.loads(run(script)) == ["100", False, True, [], []]


@pytest.mark.parametrize("pressed_when", ["starting", "running"])
def test_ctrl_c_leaves_no_process(pressed_when: str) -> None:
    script = """
        try:
            print("starting", flush=True)
            with open_session(slots=2, object_store_mb=100):
                print("running", flush=True)
                import time
                time.sleep(60)
        except KeyboardInterrupt:
            left = [process.cmdline() for process in psutil.Process().children(recursive=True)]
            print(json.dumps(left))
    """
    process = start(script)
    assert process.stdout is not None
    while process.stdout.readline().strip() != pressed_when:
        assert process.poll() is None
    if pressed_when == "starting":
        wait_for_child(process.pid, "gcs_server")

    os.killpg(process.pid, signal.SIGINT)  # the whole group, as a terminal does
    output, errors = process.communicate(timeout=PATIENCE_S)

    assert json.loads(output.splitlines()[-1]) == []
    assert errors == ""


def test_nothing_of_a_served_models_handle_outlives_the_session() -> None:
    script = """
        with open_session(slots=2, object_store_mb=100, serve_port=int(sys.argv[1])):
            import threading
            import ray.serve
            from ray.serve._private.router import SingletonThreadRouter

            @ray.serve.deployment(ray_actor_options={"num_cpus": 0.1})
            class Echo:
                async def __call__(self, text):
                    return text

            handle = ray.serve.run(Echo.bind(), name="echo", route_prefix="/echo")
            before = threading.active_count()
            handle._init(_run_router_in_separate_loop=True)
            assert handle.remote("hello").result() == "hello"
            loop = SingletonThreadRouter._asyncio_loop
            assert loop.is_running() and threading.active_count() > before
        left = [thread.name for thread in threading.enumerate() if "_poll_wrapper" not in thread.name]
        print(json.dumps([loop.is_running(), left]))
    """

    answer = run(script, str(free_ports(1)))

    # Its loop would tell Serve of the load in ten seconds, and so start a new Ray.
    assert json.loads(answer.splitlines()[-1]) == [False, ["MainThread"]]


def test_two_sessions_serve_on_one_machine() -> None:
    script = """
        port, name = int(sys.argv[1]), sys.argv[2]
        with open_session(slots=2, object_store_mb=100, serve_port=port) as session:
            import ray.serve
            from ray.serve.config import HTTPOptions

            @ray.serve.deployment(ray_actor_options={"num_cpus": 0.1})
            class Named:
                async def __call__(self, request):
                    return name

            ray.serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
            ray.serve.run(Named.bind(), name="named")
            print("ready", flush=True)
            sys.stdin.readline()
    """
    port = free_ports(2)
    servers = [start(script, str(port), "first"), start(script, str(port + 1), "second")]
    try:
        for server in servers:
            assert server.stdout is not None and server.stdout.readline() == "ready\n"

        answers = [{ask(port + number) for _ in range(10)} for number in (0, 1)]

        assert answers == [{"first"}, {"second"}]
    finally:
        ended = [server.communicate("\n", timeout=PATIENCE_S) for server in servers]
    assert ended == [("", ""), ("", "")]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


HEAD = """
import json, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in its background
import psutil
before = dict(os.environ)
from app.session import open_session
from pipelines.errors import ClusterError
"""


def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run Python in another process, in a group of its own, without the variables of the session of these tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + textwrap.dedent(script), *arguments],
        env=clean | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(script: str, *arguments: str, **environment: str) -> str:
    output, errors = start(script, *arguments, **environment).communicate(timeout=PATIENCE_S)
    assert errors == ""
    return output


def wait_for_child(pid: int, name: str) -> None:
    while not any(child.name() == name for child in psutil.Process(pid).children()):
        time.sleep(0.01)


def ask(port: int) -> str:
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        return str(answer.read().decode())
