"""The command ``diffprune-export``, and ``bench`` for ``diffprune``. Nothing heavy is imported for --help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from diffprune_plugin.export.options import BenchOptions, Options, check_results
from diffprune_plugin.utils.command_options import with_options, with_paths
from diffprune_plugin.utils.entry_point import run_app

if TYPE_CHECKING:
    from diffprune_plugin.export.benchmark import Latency

app = typer.Typer(name="diffprune-export", add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command(
    epilog="Example: diffprune-export model.onnx --model pruned --baseline dense --min-speedup 1.3. "
    "Exit codes: 0 all of it held, 1 a check failed, 2 bad input, 3 the provider cannot be proved."
)
@with_paths
@with_options(Options)
def export(
    output: Annotated[
        Path, typer.Argument(help="The ONNX file to write, ending in .onnx; or a directory: the whole pipeline.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Pipeline or model directory. Default: the last of pruned, diffprune-demo/pruned."),
    ] = None,
    *,
    options: Options,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a model as ONNX, prove its numerics against PyTorch, and time it against the dense model."""
    from diffprune_plugin.export.integrity import manifest_path
    from diffprune_plugin.export.pipeline_workflow import run_pipeline
    from diffprune_plugin.export.workflow import default_model, run
    from diffprune_plugin.utils.html_report import check_report

    whole, shown = is_directory(output), list["Latency"]()
    files = {} if whole else {"the export": output, "its manifest": manifest_path(output)}
    check_results(options, files, output if whole else None)
    if options.report:
        check_report(options.report, options.overwrite)
    if model is None:
        model = default_model()
        say(f"model: {model} (no --model given)")
    (run_pipeline if whole else run)(model, output, options, say, lambda latency: show(latency, options, shown))
    client = "ORTPipeline" if whole else "ORTUNet"
    say(f"passed; load it with: from diffprune_plugin.export import {client}; {client}({str(output)!r})")


def is_directory(output: Path) -> bool:
    """Whether an output is meant as a directory: it has no ending, or none that files have."""
    return not output.suffix[1:].isalpha()


@with_options(BenchOptions)
def bench(
    dense: Annotated[Path, typer.Argument(help="ONNX file of the dense model.")],
    pruned: Annotated[Path, typer.Argument(help="ONNX file of the pruned model.")],
    *,
    options: BenchOptions,
) -> None:
    """Time two ONNX files against each other, interleaved, on a provider that is proved."""
    from diffprune_plugin.export.benchmark import check_gates, gate
    from diffprune_plugin.export.verdict import memory_errors, write_json
    from diffprune_plugin.export.workflow import time_files

    check_results(options, {"the dense file": dense} | ({} if pruned == dense else {"the pruned file": pruned}))
    check_gates(options.max_latency_ms, options.min_speedup)
    with memory_errors():
        result = time_files(pruned, dense, options)
    show(result, options)
    if options.verdict:
        write_json(options.verdict, result.as_dict())
    gate(result, options.max_latency_ms, options.min_speedup)


def show(result: Latency, options: BenchOptions, before: list[Latency] | None = None) -> None:
    """The tables on the terminal, and in the files asked for; ``before``: what was shown already, which these keep."""
    from diffprune_plugin.export import tables
    from diffprune_plugin.utils.files import write_text

    for table in tables.tables(result):
        console.print(table)
    for line in tables.lint(result):
        say(line)
    results = [] if before is None else before
    results.append(result)
    if options.markdown:
        write_text(options.markdown, tables.markdown(*results))
    if options.plot:
        tables.plot(results, options.plot)


def say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run diffprune-export; an error made for the user ends in one line and its exit code."""
    run_app(app, arguments)


if __name__ == "__main__":
    main()
