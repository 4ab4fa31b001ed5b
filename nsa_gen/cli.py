"""``nsa-gen``: parses, calls, prints. Every command imports what it needs when it runs, so that the light ones start at once.

Exit codes: 0 done; 1 the work was done and its answer is no (a check failed, tables differ), or it failed on the way; 2 the command line, a
spec, a target or a table named in it is wrong. Errors are one line on stderr; ``NSA_GEN_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import console, paths
from .cli_tables import Json, Kernels, table_app
from .errors import ConfigError, InputError, NSAError, SpecError, TableError, TargetError

if TYPE_CHECKING:
    from .device import Device

app = typer.Typer(
    name="nsa-gen",
    help="Generate, tune and check Triton kernels for Native Sparse Attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
spec_app = typer.Typer(no_args_is_help=True, help="The geometries kernels are made for.")
app.add_typer(spec_app, name="spec")
app.add_typer(table_app, name="table")

SpecArg = Annotated[str, typer.Argument(metavar="SPEC", help="A name (see: nsa-gen spec list) or a YAML file.")]
Target = Annotated[str | None, typer.Option("--target", "-t", help="Device slug (nvidia-h200) or arch (sm_80 … sm_120, gfx942).")]
KVDtype = Annotated[
    str | None, typer.Option("--kv-dtype", help="With --decode: what the cache stores, the spec's dtype (default) or float8_e4m3fn.")
]
PageSize = Annotated[int | None, typer.Option("--page-size", help="With --decode: rows a page (default 64).")]
NewTokens = Annotated[int | None, typer.Option("--tokens", help="With --decode: new tokens of a sequence a step (default 1).")]
Seqlens = Annotated[list[str] | None, typer.Option("--seqlen", "-n", help="Sequence lengths: 8192, 64k (again for more, or commas).")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit. ``argv`` defaults to the process's arguments."""
    debug = paths.debug()
    try:
        app(args=list(argv) if argv is not None else None, prog_name="nsa-gen")
    except NSAError as error:
        if debug:
            raise
        first, _, rest = str(error).strip().partition("\n")
        hint = " (NSA_GEN_DEBUG=1 shows more)" if rest else ""
        print(f"nsa-gen: error: {first}{hint}", file=sys.stderr)
        sys.exit(2 if isinstance(error, SpecError | ConfigError | TargetError | TableError | InputError) else 1)
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        extra = {"optuna": "tune", "matplotlib": "report"}.get(absent)
        if debug or extra is None:
            raise
        print(f"nsa-gen: error: this command needs {absent}: pip install 'nsa-gen[{extra}]'", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(value: bool) -> None:
    if value:
        from . import __version__

        print(f"nsa-gen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the lookup logs.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("nsa_gen").setLevel(logging.INFO if verbose else logging.ERROR)


def _device(target: str | None) -> Device:
    """The device named, or the GPU that is there."""
    from . import device

    return device.from_name(target) if target else device.current()


# --- spec ----------------------------------------------------------------------------------------------------------------------


@spec_app.command("list")
def spec_list(as_json: Json = False) -> None:
    """The shipped specs."""
    from . import spec

    found = [spec.load(name) for name in spec.names()]
    if as_json:
        return console.emit([s.to_dict() for s in found])
    rows = [
        (
            s.name, f"{s.heads.query}/{s.heads.kv}", f"{s.head_dim.qk}/{s.head_dim.v}",
            f"{s.compression.block}/{s.compression.stride} {s.compression.pooling}", f"{s.selection.count}x{s.selection.block}",
            s.window, s.dtype, s.description,
        )
        for s in found
    ]  # fmt: skip
    console.print_table(("name", "heads", "dim qk/v", "compression", "selection", "window", "dtype", "description"), rows)


@spec_app.command("show")
def spec_show(spec: SpecArg, as_json: Json = False) -> None:
    """One spec, whole; for a sweep, each spec it stands for."""
    import yaml

    from . import spec as specs

    found = specs.expand(spec) if Path(spec).suffix in (".yaml", ".yml") else [specs.load(spec)]
    data = [s.to_dict() for s in found]
    if as_json:
        return console.emit(data if len(data) > 1 else data[0])
    print(yaml.safe_dump_all(data, sort_keys=False), end="")


@spec_app.command("validate")
def spec_validate(files: Annotated[list[Path], typer.Argument(metavar="FILE...")], as_json: Json = False) -> None:
    """Check spec files; exit 1 if one is wrong, naming file, line and field."""
    from . import spec

    results = []
    for file in files:
        try:
            results.append({"file": str(file), "ok": True, "specs": [s.name for s in spec.expand(file)]})
        except SpecError as error:
            results.append({"file": str(file), "ok": False, "error": str(error), "line": error.line, "field": error.field})
    if as_json:
        console.emit(results)
    else:
        for result in results:
            print(f"{result['file']}: ok, {', '.join(result['specs'])}" if result["ok"] else result["error"])
    if not all(result["ok"] for result in results):
        raise typer.Exit(1)


@spec_app.command("schema")
def spec_schema() -> None:
    """The JSON Schema of spec files, for editors."""
    from . import spec

    console.emit(spec.json_schema())


# --- generate, verify, tune, bench ---------------------------------------------------------------------------------------------


@app.command()
def generate(
    spec: SpecArg,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write; its name is the package's name.")],
    target: Target = None,
    check: Annotated[bool, typer.Option("--check", help="Compile every kernel (no GPU needed); exit 1 if one does not fit.")] = False,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Processes that compile.")] = None,
    as_json: Json = False,
) -> None:
    """Write a package with the kernels of SPEC for one target. It needs only torch and triton."""
    from . import generate as generator
    from . import spec as specs

    package = generator.build(specs.load(spec), _device(target))
    generator.write(package, output)
    built = []
    if check:
        from . import precompile

        builds = package.builds()
        with console.progress(as_json) as bar:
            task = bar.add_task(f"compiling for {package.target.slug}", total=len(builds))
            for one in precompile.compile_many(builds, jobs):
                built.append(one)
                bar.advance(task)
    if as_json:
        kernels = {name: {"source": found.source, "reason": found.reason} for name, (_, found, _) in package.chosen.items()}
        checked = [one.as_dict() for one in built]
        console.emit({"directory": str(output), "target": package.target.slug, "kernels": kernels, "check": checked})
    else:
        print(f"{output}: {len(package.chosen)} kernels for {package.target.slug}, from " + _sources(package.chosen.values()))
        if built:
            _print_built(built, {(problem, found.config): name for name, (problem, found, _) in package.chosen.items()})
    if not all(one.fits for one in built):
        raise typer.Exit(1)


def _sources(chosen: Iterable[Any]) -> str:
    counts: dict[str, int] = {}
    for _, found, _ in chosen:
        counts[found.source] = counts.get(found.source, 0) + 1
    return ", ".join(f"{source} ({count})" for source, count in sorted(counts.items()))


def _print_built(built: Iterable[Any], names: dict[Any, str]) -> None:
    def verdict(one: Any) -> str:
        if one.error:
            return one.error
        return "fits" if one.fits else f"does not fit: {one.shared} > {one.limit} bytes of shared memory"

    rows = [
        (names.get((b.build.problem, b.build.config), b.build.problem.kernel), b.shared, b.registers, b.spills, verdict(b)) for b in built
    ]
    console.print_table(("kernel", "shared bytes", "registers", "spilled bytes", ""), sorted(rows, key=lambda row: row[0]))


@app.command()
def verify(
    spec: SpecArg,
    kernels: Kernels = None,
    seqlen: Seqlens = None,
    as_json: Json = False,
) -> None:
    """Run every kernel of SPEC on edge cases against the float64 reference; exit 1 if one is wrong."""
    from . import spec as specs
    from . import verify as verifier

    chosen, extra = specs.load(spec), console.lengths(seqlen)
    with console.progress(as_json) as bar:
        task = bar.add_task("verifying", total=None)

        def step(result: Any) -> None:
            bar.update(task, advance=1, description=f"{result.kernel}, {result.case}")

        report = verifier.run(chosen, kernels=console.split(kernels) or None, seqlens=extra, on_result=step)
    if as_json:
        console.emit(report.to_dict())
    else:
        report.print()
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def tune(
    spec: Annotated[list[str], typer.Argument(metavar="SPEC...")],
    kernels: Kernels = None,
    seqlen: Annotated[
        list[str] | None,
        typer.Option("--seqlen", "-n", help="Shapes: 8192, 64k, or BATCHxLENGTH, 32x64k (again for more, or commas)."),
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Candidates a study tries.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Wall-clock time for all of it: 90s, 5m, 2h.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the log of an earlier run.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of tables to write (default: your cache).")] = None,
    varlen: Annotated[bool, typer.Option("--varlen", help="Tune the kernels of cu_seqlens calls instead.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Tune the kernels of deterministic calls instead.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Tune the kernels that serve from a KV cache instead.")] = False,
    kv_dtype: KVDtype = None,
    page_size: PageSize = None,
    tokens: NewTokens = None,
    storage: Annotated[str | None, typer.Option("--storage", help="Optuna storage URL several machines share.")] = None,
    as_json: Json = False,
) -> None:
    """Search configs for the kernels of SPEC on this GPU and write the winners as table rows."""
    from . import spec as specs
    from . import tune as tuner

    options: dict[str, Any] = {
        "varlen": varlen, "deterministic": deterministic, "decode": decode, "kv_dtype": kv_dtype, "page_size": page_size, "tokens": tokens,
        "trials": trials, "budget_s": console.seconds(budget), "out": out, "storage": storage, "shapes": console.shapes(seqlen) or None,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    chosen = [specs.load(name) for name in spec]
    summary = tuner.run(chosen, kernels=console.kernel_names(kernels), resume=resume, progress=not as_json, **options)
    if as_json:
        console.emit(summary.to_dict())
    else:
        print(summary.to_markdown())


@app.command()
def bench(
    spec: SpecArg,
    seqlen: Annotated[
        list[str] | None,
        typer.Option("--seqlen", "-n", help="Lengths: 8192, 64k; with --decode BATCHxLENGTH, 32x64k (again for more, or commas)."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Interleaved rounds.")] = 10,
    training: Annotated[bool, typer.Option("--training", help="Forward and backward.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="A step of decoding from a KV cache.")] = False,
    kv_dtype: KVDtype = None,
    page_size: PageSize = None,
    tokens: NewTokens = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result as JSON to FILE (- for stdout).", metavar="FILE")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the result to FILE (.svg, .png, .pdf).", metavar="FILE")] = None,
) -> None:
    """Time SPEC, whole and by part, against full attention, in one interleaved run on this GPU: its forward, a training step, or a step of
    decoding."""
    from . import bench as benchmark
    from . import bench_report, config
    from . import spec as specs

    chosen, shapes = specs.load(spec), console.shapes(seqlen) or None
    if training and decode:
        raise InputError("--training and --decode: one of them")
    if not decode and (kv_dtype, page_size, tokens) != (None, None, None):
        raise InputError("--kv-dtype, --page-size and --tokens go with --decode")
    cached = config.cache_of(chosen, kv_dtype, page_size, tokens or 1) if decode else None
    with console.progress(str(json_file) == "-") as bar:
        task = bar.add_task("measuring", total=None)

        def step(description: str, done: int, total: int) -> None:
            bar.update(task, description=description, completed=done, total=total)

        result = benchmark.run(chosen, shapes, rounds=rounds, training=training, cached=cached, progress=step)
    if str(json_file) == "-":
        console.emit(result)
    else:
        console.print_table(*bench_report.rows(result), title=bench_report.title(result))
        if json_file:
            paths.write_atomic(json_file, json.dumps(result, indent=1, sort_keys=True) + "\n")
    if plot:
        bench_report.plot(result, plot)


# --- report, doctor, demo --------------------------------------------------------------------------------------------------------------


@app.command()
def report(
    where: Annotated[str | None, typer.Argument(metavar="[DEVICE|FOLDER]", help="Default: every shipped table.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write Markdown to FILE instead of stdout.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the speed-ups over the default to FILE.")] = None,
    as_json: Json = False,
) -> None:
    """What tuning gained over the defaults, from the tables: speed-up with its interval, row by row, as Markdown."""
    from . import tables

    found = tables.load(where)
    if plot:
        tables.plot(found, plot)
    if as_json:
        return console.emit(tables.gains(found))
    text = tables.markdown(found)
    if output:
        paths.write_atomic(output, text)
    else:
        print(text, end="")


@app.command()
def doctor(
    spec: Annotated[str, typer.Option("--spec", help="Explain how this spec's kernels are resolved.")] = "gqa16-d128",
    seqlen: Seqlens = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Versions, GPU, folders, and step by step which config each kernel would get and why; exit 1 if something must be mended."""
    from . import doctor as doctors

    found = doctors.examine(spec, (console.lengths(seqlen) or [65536])[0], target)
    if as_json:
        console.emit(found.to_dict())
    else:
        print(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def demo(
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", help="Processes that compile.")] = None,
    targets: Annotated[list[str] | None, typer.Option("--target", "-t", help="Targets to compile for (again for more).")] = None,
) -> None:
    """Render and compile every shipped spec, run a small forward against the reference, resolve it from the tables."""
    from . import demo as demonstration

    if not demonstration.run(console.split(targets) or None, jobs, console.progress):
        raise typer.Exit(1)
