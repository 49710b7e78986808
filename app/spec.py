"""What does the user want? Files, overlays and `--set` become one frozen, validated Spec."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path as File
from typing import Any

from pipelines.errors import SpecError, did_you_mean
from pipelines.explain import FieldError, Path, checked, shown
from pipelines.notation import assign, read_yaml, split_path
from serve.spec import ServeSpec
from tune.spec import SearchedSpec, axes


class Spec(SearchedSpec):
    """Everything a command needs to know; each package owns its section."""

    serve: ServeSpec = ServeSpec()
    """How a model is served over HTTP."""


def load_spec(paths: Sequence[str], sets: Sequence[str] = ()) -> Spec:
    """Read YAML files, merge them from left to right, apply `dotted.path=value` settings and validate the result."""
    return read_spec(paths, sets)[0]


def read_spec(paths: Sequence[str], sets: Sequence[str] = ()) -> tuple[Spec, Origins]:
    """Return the Spec as `load_spec` does, and who set what, to name the file in errors that are found later."""
    documents = [(path, _read(path)) for path in paths]
    return parse_spec(documents, sets)


def parse_spec(documents: Sequence[tuple[str, str]], sets: Sequence[str] = ()) -> tuple[Spec, Origins]:
    """Return the Spec that these (name, YAML text) documents and settings say, and who set what."""
    if not documents:
        raise SpecError("no Spec was given; name at least one YAML file")
    values: dict[str, Any] = {}
    origins = Origins(documents[0][0])
    for name, text in documents:
        _merge(values, _sections(read_yaml(text, name), name), name, origins)
    for setting in sets:
        path, value = _setting(setting)
        try:
            assign(values, path, value)
        except SpecError as error:
            raise SpecError(f"--set {setting}: {error}") from None
        origins.note(path, "--set")
    values.setdefault("name", _name_of(documents[0][0]))
    try:
        spec = checked(Spec, values)
        _check_space(spec)
    except FieldError as error:
        raise origins.blame(error) from None
    return spec, origins


class Origins:
    """Who set each value of a Spec: a file, or `--set`."""

    def __init__(self, default: str) -> None:
        self.default = default
        self.names: dict[Path, str] = {}

    def note(self, path: Path, name: str) -> None:
        """Remember that `name` set the value at `path` and all below it, later than all noted so far."""
        self.names = {known: by for known, by in self.names.items() if known[: len(path)] != path} | {path: name}

    def of(self, path: Path) -> str:
        """Return who had the last word on a value."""
        below = [by for known, by in self.names.items() if known[: len(path)] == path]
        if path and below:
            return below[-1]
        above = [known for known in self.names if path[: len(known)] == known]
        return self.names[max(above, key=len)] if above else self.default

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Name the file in a `SpecError` that is found while a verb works."""
        try:
            yield
        except SpecError as error:
            raise self.blame(error) from error

    def blame(self, error: SpecError) -> SpecError:
        """Put the file in front of an error whose message begins with the dotted path of a field."""
        start = re.match(r"[a-z_]+(\.\w+)*", str(error))
        path = error.path if isinstance(error, FieldError) else tuple(start[0].split(".")) if start else ()
        known = isinstance(error, FieldError) or (path[:1] and path[0] in Spec.model_fields)
        return SpecError(f"{self.of(path)}: {error}") if known else error


def _read(path: str) -> str:
    try:
        return File(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(File(path).name, _yaml_files(File(path).parent)) if _yaml_files(File(path).parent) else ""
        raise SpecError(f"{path}: there is no such file{near}") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 text (byte {error.start}); name a YAML file") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None


def _yaml_files(folder: File) -> list[str]:
    return [file.name for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern)]


def _sections(document: Any, name: str) -> dict[str, Any]:
    """The sections of one file; one that is left empty says nothing."""
    if document is None:
        raise SpecError(f"{name}: is empty; a Spec has at least data.source and task.target")
    if not isinstance(document, dict):
        raise SpecError(f"{name}: found {shown(document)}; expected a mapping of sections{did_you_mean('', Spec.model_fields)}")
    return {key: value for key, value in document.items() if value is not None}


def _merge(values: dict[str, Any], over: Mapping[str, Any], name: str, origins: Origins, above: Path = ()) -> None:
    """Lay one file over what was read before: mappings merge, all else is replaced."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value, name, origins, (*above, key))
        else:
            values[key] = copy.deepcopy(value)
            origins.note((*above, key), name)


def _setting(setting: str) -> tuple[tuple[str, ...], Any]:
    path, sign, value = setting.partition("=")
    if not sign or not path.strip():
        raise SpecError(f"--set '{setting}' is wrong: expected dotted.path=value, such as model.params.num_leaves=31")
    try:
        return split_path(path.strip()), read_yaml(value, "value")
    except SpecError as error:
        raise SpecError(f"--set {setting}: {error}") from None


def _name_of(path: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", File(path).stem)[:100].lstrip("-._") or "spec"


def _check_space(spec: Spec) -> None:
    """Check every knob of `tune.space` with the ends of its range, as a trial will set it."""
    untuned = spec.model_copy(update={"tune": None})
    for path, axis, opening in axes(spec.tune.space if spec.tune else {}):
        for value in axis.extremes:
            try:
                untuned.replace({**opening, path: value})
            except SpecError as error:
                raise FieldError.at(("tune", "space", path), f": a trial cannot have {shown(value)}: {error}") from None
