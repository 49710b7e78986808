"""How does a command open what it was given: a Spec, a Run, a Ray?"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from app.session import Session, open_session, store_path
from app.spec import Origins, Spec, parse_spec, read_spec
from pipelines.errors import RequirementError, SpecError, UserError

if TYPE_CHECKING:
    from pipelines.runs import Run, RunStore

STORE = "runs"


def open_spec(paths: Sequence[str], store: str | None, sets: Sequence[str]) -> tuple[Spec, Origins]:
    """Read a Spec; its store becomes the place that it means here."""
    spec, origins = read_spec(paths, sets)
    return spec.replace({"store": store_path(store or spec.store)}), origins


def open_store(store: str | None) -> RunStore:
    """Open the run store that a command without a Spec means."""
    from pipelines.runs import RunStore

    return RunStore.at(store_path(store or STORE))


def open_run(reference: str, store: str | None, sets: Sequence[str] = ()) -> tuple[Run, Spec, Origins]:
    """Find a complete Run and read its resolved Spec, changed by `sets`."""
    run = open_store(store).find(reference)
    text = run.folder.read_bytes("spec.yaml").decode()
    return run, *parse_spec([(f"{run.path}/spec.yaml", text)], sets)


def open_interrupted(reference: str, store: str | None, *, search: bool = False) -> tuple[Run, Spec, Origins]:
    """Find a Run, or a search, that is not complete and read its resolved Spec, which stays as it is."""
    from pipelines.runs import BEGUN, SEARCH

    run = open_store(store).interrupted(reference, SEARCH if search else BEGUN)
    name = "search.yaml" if search else "spec.yaml"
    text = run.folder.read_bytes(name).decode()
    return run, *parse_spec([(f"{run.path}/{name}", text)])


def open_work(
    paths: Sequence[str] | None, resume: str | None, store: str | None, sets: Sequence[str] | None, *, search: bool = False
) -> tuple[Run | None, Spec, Origins]:
    """Open what `run`, `train` and `tune` work on: a Spec, or an interrupted run."""
    if resume is None:
        if not paths:
            raise SpecError("no Spec was given; name at least one YAML file, or an interrupted run with --resume RUN")
        return None, *open_spec(paths, store, sets or [])
    if paths or sets:
        raise SpecError("--resume goes on with the run's own Spec; leave out SPEC and --set")
    return open_interrupted(resume, store, search=search)


def no_spec(what: str, sets: Sequence[str] | None) -> None:
    """Refuse --set where there is nothing that it could change."""
    if sets:
        raise SpecError(f"--set changes a Spec, and `{what}` reads none; leave it out")


def joins(address: str | None) -> bool:
    """Whether `open_ray` joins a Ray that outlives the command, rather than start one of its own."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") != "local"


@contextlib.contextmanager
def open_ray(address: str | None, *, serve_port: int | None = None, host: str = "127.0.0.1") -> Iterator[Session]:
    """Join or start a Ray; a fault of ours that leaves it says where Ray's logs are."""
    with open_session(address, serve_port=serve_port, host=host) as session:
        try:
            yield session
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, (UserError, RequirementError)):
                error.add_note(f"Ray's logs: {session.log_dir}")
            raise


def free_slots() -> float:
    """Return how many CPU slots are free; raises `ClusterError`, naming who holds them, when there is none."""
    from app import slots

    found = slots.free_slots()
    found.for_workers()
    return found.free
