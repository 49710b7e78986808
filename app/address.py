"""Which Ray is meant by an address, and may this process join it?"""

from __future__ import annotations

from urllib.parse import urlsplit

from app.environment import has_token
from pipelines.errors import ClusterError

TIMEOUT_S = 15
EXPECTED = "expected HOST:PORT of a Ray (6379 if it was not told otherwise), or auto for the one on this machine"


def locate(address: str) -> str:
    """Return HOST:PORT of the Ray meant by --address or RAY_ADDRESS."""
    if address == "auto":
        return _on_this_machine()
    if address.startswith(("http://", "https://")):
        raise ClusterError(f"{address} is a dashboard, to which jobs are sent (heliostat submit -- COMMAND); {EXPECTED}")
    if address.startswith("ray://"):
        raise ClusterError(f"{address} is for Ray Client, which is not supported; {EXPECTED}")
    try:
        port = urlsplit(f"//{address}").port
    except ValueError:
        port = None
    if port is None:
        raise ClusterError(f"'{address}' is not the address of a Ray; {EXPECTED}")
    return address


def _on_this_machine() -> str:
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    if started := find_bootstrap_address(None):  # by the last `ray start`
        return str(started)
    found = sorted(str(one) for one in find_gcs_addresses())
    if not found:
        raise ClusterError("no Ray runs on this machine, and --address auto asks for one; start it: ray start --head")
    if len(found) > 1:
        raise ClusterError(f"several Rays run on this machine: {', '.join(found)}; name one of them with --address")
    return found[0]


def check_reachable(location: str) -> None:
    """Raise ClusterError unless a Ray of this version answers there and takes this process's token.

    `ray.init` itself would try again for minutes, with a line on stderr each second.
    """
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    try:
        with init_grpc_channel(location, options=[("grpc.enable_http_proxy", 0)]) as channel:
            reply = NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise ClusterError(refused_token(f"the Ray at {location}")) from error
        late = error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        said = f"no answer within {TIMEOUT_S} s" if late else _said(str(error.details()))
        raise ClusterError(f"no Ray can be reached at {location} ({said}); {EXPECTED}") from error
    if reply.ray_version != ray.__version__:
        raise ClusterError(
            f"the Ray at {location} is {reply.ray_version}, here it is {ray.__version__}; install the same on both"
        )


def refused_token(who: str) -> str:
    """Say that a Ray wants another token than this process has."""
    found = "does not accept the token found here" if has_token() else "asks for a token and there is none here"
    return f"{who} {found}; put its own (ray get-auth-token prints it on its head) into ~/.ray/auth_token, or RAY_AUTH_TOKEN"


def one_line(text: object) -> str:
    """Return the first line of what Ray says."""
    return (str(text).strip().splitlines() or [type(text).__name__])[0]


def _said(details: str) -> str:
    if "HTTP/2" in details or "http2" in details:
        return "another program answers there"
    return details.rpartition(": ")[2].lower()
