"""How does a command run as a Ray job? The folder travels, the logs stream back, and the command's own exit code returns."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from app.address import TIMEOUT_S, check_reachable, locate, one_line, refused_token
from app.environment import has_token, set_environment, surroundings_kept, unless_set
from app.upload import upload
from pipelines.errors import ClusterError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_S = 0.2
INTERRUPTED = 130


def submit(command: Sequence[str], *, address: str | None = None, working_dir: str = ".") -> int:
    """Run `python -m app COMMAND` as a job and return the command's own exit code; Ctrl-C stops the job.

    `address`, or RAY_API_SERVER_ADDRESS or RAY_ADDRESS, is a dashboard (http://HOST:8265), HOST:PORT of a Ray, or auto. The
    job's output goes to stdout; with --json among the words its result alone does, and the rest to stderr.
    """
    wanted = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not wanted:
        raise ClusterError("submit needs a Ray that is already there: --address http://HOST:8265, its dashboard, or RAY_ADDRESS")
    with surroundings_kept():
        sent = upload(Path(working_dir))
        if sent.left_out:
            _say(sent.note)
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would prefer them to the address that it is given
            os.environ.pop(name, None)
        mode = {"RAY_AUTH_MODE": "token"} if has_token() else {}
        set_environment(unless_set(mode), loopback=wanted.startswith(("127.", "localhost:")))
        url = _dashboard(wanted)
        entrypoint = shlex.join(["python", "-m", "app", *command])
        with _explained(url):
            client = _client(url)
            job = client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": str(sent.folder), "excludes": sent.excludes}
            )
        _say(f"job {job} at {url}: {entrypoint}")
        try:
            asyncio.run(_stream(client, job, json_only="--json" in command))
            return _exit_code(_wait(client, job))
        except KeyboardInterrupt:
            client.stop_job(job)
            _wait(client, job)
            _say(f"interrupted: job {job} is stopped; what it completed is in its store, and the same command starts again")
            return INTERRUPTED


def _dashboard(address: str) -> str:
    """Return the URL of the dashboard that an address means."""
    if address.startswith("ray://"):
        raise ClusterError(f"{address} is for Ray Client, which is not supported; expected the dashboard: http://HOST:8265")
    if address.startswith(("http://", "https://")):
        parts = urlsplit(address)
        try:
            with socket.create_connection(
                (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), TIMEOUT_S
            ):
                return address.rstrip("/")
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no dashboard of a Ray can be reached at {address} ({error}); expected http://HOST:8265"
            ) from error
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray._raylet import GcsClient

    location = locate(address)
    check_reachable(location)
    found = GcsClient(address=location).internal_kv_get(DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD)
    if found is None:
        raise ClusterError(f"the Ray at {location} has no dashboard, which takes the jobs; start one with: ray start --head")
    return f"http://{found.decode()}"


def _client(url: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(url)


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a job into a sentence."""
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(refused_token(f"the Ray at {url}")) from error
    except (ConnectionError, RuntimeError, ValueError, RequestException) as error:
        raise ClusterError(f"the dashboard at {url} does not take the job: {one_line(error)}") from error


async def _stream(client: JobSubmissionClient, job: str, *, json_only: bool) -> None:
    """Print the job's output while it runs."""
    import aiohttp

    shown = 0
    rest = ""
    try:
        async for text in client.tail_job_logs(job):
            shown += len(text)
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                _print(line, json_only)
    except (RuntimeError, aiohttp.ClientError):
        _say(f"the connection is lost, job {job} goes on; what it writes follows when it ends")
        _wait(client, job)
        for line in (rest + client.get_job_logs(job)[shown:]).splitlines():
            _print(line, json_only)
    else:
        if rest:
            _print(rest, json_only)


def _print(line: str, json_only: bool) -> None:
    """A job's stdout and stderr come as one: with --json its result is the line that is a JSON object."""
    is_result = False
    if json_only and line.startswith("{"):
        with suppress(ValueError):
            is_result = isinstance(json.loads(line), dict)
    print(line, file=sys.stderr if json_only and not is_result else sys.stdout, flush=True)


def _wait(client: JobSubmissionClient, job: str) -> JobDetails:
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(POLL_S)
    return details


def _exit_code(details: JobDetails) -> int:
    from ray.job_submission import JobStatus

    if details.status == JobStatus.STOPPED:
        _say(f"job {details.submission_id} was stopped")
        return INTERRUPTED
    code = details.driver_exit_code
    if code is None:
        raise ClusterError(f"job {details.submission_id} did not start: {one_line(details.message)}")
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell counts it


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
