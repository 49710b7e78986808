"""The commands: each loads a Spec or finds a Run, opens a session, calls one function and prints the result.

Everything heavy is imported inside the commands, so that `--help` and a mistake in a Spec answer at once.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from app.endings import exits
from pipelines.errors import RequirementError, SpecError

cli = typer.Typer(
    help="From Parquet or CSV to a served model on one Ray cluster: one YAML file, the Spec, says how.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
runs = typer.Typer(help="List, show and compare runs.", rich_markup_mode=None)
cli.add_typer(runs, name="runs")
cache = typer.Typer(help="List and prune the prepared data of a store.", no_args_is_help=True, rich_markup_mode=None)
cli.add_typer(cache, name="cache")

Specs = Annotated[list[str], typer.Argument(metavar="SPEC...", help="YAML files; later ones win.")]
NewSpecs = Annotated[list[str] | None, typer.Argument(metavar="SPEC...", help="YAML files; later ones win.")]
Resume = Annotated[str | None, typer.Option(metavar="RUN", help="Go on with an interrupted run instead.", show_default=False)]
Reference = Annotated[str, typer.Argument(metavar="RUN", help="An id, a path or URI, NAME@latest or NAME@best.")]
Address = Annotated[
    str | None, typer.Option(help="The Ray to join; default: RAY_ADDRESS, else a private local one.", show_default=False)
]
Store = Annotated[
    str | None, typer.Option(help="Path or URI of the run store; default: the Spec's, else runs.", show_default=False)
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a value of the Spec.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result, and only it, as one JSON object.", show_default=False)]


def main() -> None:
    """Run the command line."""
    cli()


def command(name: str, group: typer.Typer = cli, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose errors end as exit codes."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def ending(*args: Any, **kwargs: Any) -> None:
            with exits(name):
                function(*args, **kwargs)

        group.command(name, **settings)(ending)
        return function

    return register


@command("run")
def run_spec(
    specs: NewSpecs = None,
    resume: Resume = None,
    tuned: Annotated[bool, typer.Option("--tune", help="Search for better hyperparameters first.", show_default=False)] = False,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Prepare, train and evaluate: from data to a scored run."""
    if tuned:
        _tune(specs, resume, address, store, sets, as_json)
        return
    from app.opening import free_slots, open_ray, open_store, open_work
    from app.output import output, print_run

    begun, spec, origins = open_work(specs, resume, store, sets)
    from pipelines.train import run

    with output(as_json) as out, open_ray(address), origins.blaming():
        try:
            print_run(run(spec, resume=begun, progress=out.progress, free_slots=free_slots), out)
        except RequirementError:
            print_run(open_store(spec.store).find(begun.path if begun else f"{spec.name}@latest"), out)
            raise


@command("prepare")
def prepare_spec(specs: Specs, address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False) -> None:
    """Read, split, fit the preprocessor and write the prepared data."""
    from app.opening import open_ray, open_spec
    from app.output import output, print_prepared

    spec, origins = open_spec(specs, store, sets or [])
    from pipelines.prepare import prepare

    with output(as_json) as out, open_ray(address), origins.blaming():
        print_prepared(prepare(spec, progress=out.progress), out)


@command("plan")
def plan_spec(specs: Specs, address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False) -> None:
    """Say what a run would read, need and reuse, from footers alone; exit code 2 when it cannot work."""
    from app.machines import machines
    from app.opening import open_spec
    from app.output import output, print_plan

    spec, origins = open_spec(specs, store, sets or [])
    from pipelines.plan import plan

    with output(as_json) as out, machines(address) as found, origins.blaming():
        made, searched = plan(spec, found, progress=out.progress), None
        if spec.tune is not None:
            from tune.plan import plan_search

            searched = plan_search(spec, found, made)
            made.problems.extend(searched.problems)
        print_plan(made, out, searched)
        made.refuse()


@command("train")
def train_spec(
    specs: NewSpecs = None,
    resume: Resume = None,
    source: Annotated[
        str | None,
        typer.Option("--follow", metavar="SOURCE", help="Learn from files as they arrive, until Ctrl-C.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="With --follow: end when no file is left.", show_default=False)] = False,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Prepare and train, without the test metrics."""
    from app.opening import free_slots, open_ray, open_work
    from app.output import output, print_run

    begun, spec, origins = open_work(specs, resume, store, sets)
    source = source or (begun.begun().follow if begun else None)
    if once and source is None:
        raise SpecError("--once goes with --follow SOURCE; leave it out")
    if source is not None:
        from pipelines.follow import follow

        with output(as_json) as out, origins.blaming():
            print_run(follow(spec, source, resume=begun, once=once, progress=out.progress), out)
        return
    from pipelines.train import train

    with output(as_json) as out, open_ray(address), origins.blaming():
        print_run(train(spec, resume=begun, progress=out.progress, free_slots=free_slots), out)


@command("tune")
def tune_spec(
    specs: NewSpecs = None,
    resume: Resume = None,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Search for better hyperparameters, then train and evaluate the best: many trials, one run."""
    _tune(specs, resume, address, store, sets, as_json)


@command("evaluate")
def evaluate_run(
    reference: Reference,
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Other data: all its rows count.", show_default=False)
    ] = None,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Score a run on its own valid and test rows, or on other data."""
    from app.opening import open_ray, open_run
    from app.output import output, print_evaluation

    run, spec, origins = open_run(reference, store, sets or [])
    from pipelines.artifact import Artifact
    from pipelines.evaluate import check_requirements, evaluate, require

    task = Artifact.load(run.artifact, model=False).task
    with origins.blaming():
        check_requirements(spec, task)
    with output(as_json) as out, open_ray(address), origins.blaming():
        found = evaluate(run, spec, source=data, progress=out.progress)
        print_evaluation(run, found, out)
        if data is None:
            require(spec, task, found.metrics)


@command("predict")
def predict_source(
    reference: Reference,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="File, folder, glob or URI.")],
    to: Annotated[str, typer.Option("--out", metavar="DIR", help="A new folder, or a URI of one.", show_default=False)],
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Copy a column of the source.", show_default=False)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also write what each column contributes to each answer.", show_default=False)
    ] = False,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Answer every row of a source, as Parquet files in source order."""
    from app.opening import open_ray, open_run
    from app.output import output, print_predictions

    run, spec, origins = open_run(reference, store, sets or [])
    from pipelines.predict import predict

    with output(as_json) as out, open_ray(address), origins.blaming():
        found = predict(str(run.artifact), source, to, keep=keep or [], explain=explain, data=spec.data, progress=out.progress)
        print_predictions(run, found, out)


@command("serve")
def serve_runs(
    references: Annotated[
        list[str] | None, typer.Argument(metavar="RUN...", help="Ids, paths, NAME@latest or NAME@best.")
    ] = None,
    port: Annotated[int, typer.Option(help="Of a server that is started; one that runs keeps its own.")] = 8000,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be reached from other machines.")] = "127.0.0.1",
    detach: Annotated[bool, typer.Option("--detach", help="Leave it running; needs --address.", show_default=False)] = False,
    status: Annotated[bool, typer.Option("--status", help="Show what is served.", show_default=False)] = False,
    stop: Annotated[str | None, typer.Option(metavar="NAME", help="Take a model down.", show_default=False)] = None,
    rollback: Annotated[
        str | None, typer.Option(metavar="NAME", help="Put back what a model was served with before.", show_default=False)
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Accept the tokens as they are now, without a restart.", show_default=False)
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Swap to a run that breaks what clients rely on.", show_default=False)
    ] = False,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Serve runs over HTTP; says when ready and stays until Ctrl-C.

    A run of a name that is served already takes over from it: no request fails, and the command ends.
    """
    if sum([bool(references), status, stop is not None, rollback is not None, tokens]) != 1:
        raise typer.BadParameter("give runs to serve, or --status, --stop NAME, --rollback NAME or --tokens")
    from app import serving
    from app.output import output

    with output(as_json) as out:
        if status:
            serving.show_status(out, address=address)
        elif stop is not None:
            serving.stop_model(stop, out, address=address)
        elif rollback is not None:
            serving.roll_back(rollback, out, address=address)
        elif tokens:
            serving.rotate_tokens(out, address=address)
        else:
            where = serving.Where(address, host, port, detach, force)
            serving.serve(references or [], out, where, store=store, sets=sets or [])


@runs.callback(invoke_without_command=True)
def list_runs(
    context: typer.Context, address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False
) -> None:
    """List, show and compare runs."""
    if context.invoked_subcommand is None:
        with exits("runs"):
            _look("list", [], store, sets, as_json)
    elif address or store or sets or as_json:
        raise typer.BadParameter(f"put options behind '{context.invoked_subcommand}'")


@command("list", runs)
def list_all(address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False) -> None:
    """List the complete runs, oldest first; the same as `heliostat runs`."""
    _look("list", [], store, sets, as_json)


@command("show", runs)
def show_run(
    reference: Reference, address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Show one run: its record and where its files are."""
    _look("show", [reference], store, sets, as_json)


@command("diff", runs)
def diff_runs(
    first: Reference, second: Reference, address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Compare two runs: Spec, data and metrics side by side."""
    _look("diff", [first, second], store, sets, as_json)


@command("list", cache)
def list_cache(address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False) -> None:
    """List the prepared data: which Spec, how many rows, how large, when."""
    from app.opening import STORE, no_spec
    from app.output import output, print_cache
    from app.session import store_path

    no_spec("cache list", sets)
    from pipelines.cache import entries

    with output(as_json) as out:
        print_cache(list(entries(store_path(store or STORE))), out)


@command("prune", cache)
def prune_cache(
    days: Annotated[
        float | None, typer.Option(min=0, help="Also what was prepared longer ago than this.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.", show_default=False)] = False,
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Delete what killed runs left, and prepared data where asked for.

    Complete runs do not need it; one that trains right now does.
    """
    from app.opening import STORE, no_spec
    from app.output import output, print_pruned
    from app.session import store_path

    no_spec("cache prune", sets)
    from pipelines.cache import prune

    with output(as_json) as out:
        print_pruned(prune(store_path(store or STORE), days=days, everything=everything), out)


@command("submit")
def submit_command(
    words: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The command, as it would stand behind `heliostat`.")
    ],
    address: Address = None,
    store: Store = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Run a command as a Ray job on --address.

    The logs stream here, and the exit code is the command's own.
    """
    from app.submit import submit

    common = [*(["--store", store] if store else []), *(word for one in sets or [] for word in ("--set", one))]
    sys.exit(submit([*words, *common, *(["--json"] if as_json else [])], address=address))


@command("demo")
def show_demo(address: Address = None, store: Store = None, sets: Sets = None, as_json: Json = False) -> None:
    """The flights example, from Parquet to a served prediction."""
    from app.demo import demo
    from app.output import output

    with output(as_json) as out:
        demo(out, address=address, store=store, sets=sets or [])


def _tune(
    specs: list[str] | None, resume: str | None, address: str | None, store: str | None, sets: list[str] | None, as_json: bool
) -> None:
    from app.opening import free_slots, open_ray, open_store, open_work
    from app.output import output, print_run

    begun, spec, origins = open_work(specs, resume, store, sets, search=True)
    from tune.search import check, search

    with origins.blaming():
        check(spec)
    with output(as_json) as out, open_ray(address), origins.blaming():
        try:
            print_run(search(spec, resume=begun, progress=out.progress, free_slots=free_slots), out)
        except RequirementError:
            print_run(open_store(spec.store).find(begun.path if begun else f"{spec.name}@latest"), out)
            raise


def _look(what: str, references: list[str], store: str | None, sets: list[str] | None, as_json: bool) -> None:
    from app import compare, output
    from app.opening import no_spec, open_store

    no_spec(f"runs {what}", sets)
    with output.output(as_json) as out:
        found = open_store(store)
        chosen = [found.find(reference) for reference in references]
        match chosen:
            case []:
                output.print_list(found.list(), out)
            case [run]:
                output.print_run(run, out, importance=run.importance)
            case [first, second]:
                compare.print_differences(first, second, out)
