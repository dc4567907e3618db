"""The command ``diffprune-export``, and ``bench`` for ``diffprune``. Nothing heavy is imported for --help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from diffprune_plugin.utils.entry_point import run_app

if TYPE_CHECKING:
    from diffprune_plugin.export.benchmark import Latency

app = typer.Typer(name="diffprune-export", add_completion=False, pretty_exceptions_enable=False)
console = Console()

Provider = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, tensorrt or openvino; all five proofs must hold. Default: the best proved."),
]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes to time, for example 1,4.")]
Threads = Annotated[int, typer.Option(help="CPU threads; spinning is off.", min=1)]
Rounds = Annotated[int | None, typer.Option(help="Shuffled rounds (30; 100 on a GPU).", min=5)]
MaxLatency = Annotated[float | None, typer.Option(help="Fail (exit code 1) if the pruned model's median is above.")]
MinSpeedup = Annotated[float | None, typer.Option(help="Fail (exit code 1) if the interval's lower end is below.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Json = Annotated[Path | None, typer.Option(help="Where the result goes as JSON.")]
Markdown = Annotated[Path | None, typer.Option(help="Write the latency tables as Markdown.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the latency as PNG.")]


@app.command(
    epilog="Example: diffprune-export model.onnx --model pruned --baseline dense --min-speedup 1.3. "
    "Exit codes: 0 all of it held, 1 a check failed, 2 bad input, 3 the provider cannot be proved."
)
def export(
    output: Annotated[Path, typer.Argument(help="The ONNX file to write, ending in .onnx.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Pipeline or UNet directory. Default: the last of pruned, diffprune-demo/pruned."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Dense model to compare with. Default: the same architecture, random weights.")
    ] = None,
    opset: Annotated[int, typer.Option(help="ONNX opset; 20 runs fastest.")] = 20,
    dynamic: Annotated[str, typer.Option(help="Axes left open: batch,height,width,sequence.")] = "batch",
    dtype: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32",
    overwrite: Overwrite = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Leave the numerics unproved; the verdict says so.")
    ] = False,
    no_bench: Annotated[bool, typer.Option("--no-bench", help="Leave the latency out.")] = False,
    steps: Annotated[int, typer.Option(help="DDIM steps compared, if the model has a scheduler.", min=1)] = 10,
    provider: Provider = None,
    batch: Batches = "1",
    threads: Threads = 1,
    rounds: Rounds = None,
    torch: Annotated[bool, typer.Option("--torch", help="Time PyTorch eager beside it.")] = False,
    max_latency_ms: MaxLatency = None,
    min_speedup: MinSpeedup = None,
    check_placement: Annotated[
        str | None, typer.Option(metavar="cuda", help="List nodes without a CUDA kernel; needs no GPU.")
    ] = None,
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Write a UNet as ONNX, prove its numerics against PyTorch, and time it against the dense model."""
    from diffprune_plugin.export.workflow import Options, check_results, default_model, parse_numbers, run

    check_results(json, markdown, plot, overwrite)
    options = Options(
        opset=opset,
        dynamic=tuple(word for word in dynamic.split(",") if word),
        dtype=dtype,
        overwrite=overwrite,
        verify=not no_verify,
        latency=not no_bench,
        steps=steps,
        baseline=baseline,
        provider=provider,
        batches=parse_numbers(batch, "--batch"),
        threads=threads,
        rounds=rounds,
        torch=torch,
        max_latency_ms=max_latency_ms,
        min_speedup=min_speedup,
        check_placement=check_placement,
        verdict=json,
    )
    if model is None:
        model = default_model()
        say(f"model: {model} (no --model given)")
    run(model, output, options, say, lambda latency: show(latency, markdown, plot))
    say(f"passed; load it with: from diffprune_plugin.export import ORTUNet; ORTUNet({str(output)!r})")


def bench(
    dense: Annotated[Path, typer.Argument(help="ONNX file of the dense model.")],
    pruned: Annotated[Path, typer.Argument(help="ONNX file of the pruned model.")],
    provider: Provider = None,
    batch: Batches = "1",
    threads: Threads = 1,
    rounds: Rounds = None,
    max_latency_ms: MaxLatency = None,
    min_speedup: MinSpeedup = None,
    overwrite: Overwrite = False,
    json: Json = None,
    markdown: Markdown = None,
    plot: Plot = None,
) -> None:
    """Time two ONNX files against each other, interleaved, on a provider that is proved."""
    import json as json_module

    from diffprune_plugin.export.benchmark import check_gates, gate, measure
    from diffprune_plugin.export.workflow import check_results, memory_errors, parse_numbers
    from diffprune_plugin.utils.files import write_text

    check_results(json, markdown, plot, overwrite)
    check_gates(max_latency_ms, min_speedup)
    batches = parse_numbers(batch, "--batch")
    with memory_errors():
        result = measure(pruned, dense, provider=provider, batches=batches, threads=threads, rounds=rounds)
    if json:
        write_text(json, json_module.dumps(result.as_dict(), indent=1) + "\n")
    show(result, markdown, plot)
    gate(result, max_latency_ms, min_speedup)


def show(result: Latency, markdown: Path | None, plot: Path | None) -> None:
    """The tables on the terminal, and in the files asked for."""
    from diffprune_plugin.export import tables
    from diffprune_plugin.utils.files import write_text

    for table in tables.tables(result):
        console.print(table)
    for line in tables.lint(result):
        say(line)
    if markdown:
        write_text(markdown, tables.markdown(result))
    if plot:
        tables.plot(result, plot)


def say(line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run diffprune-export; an error made for the user ends in one line and its exit code."""
    run_app(app, arguments)


if __name__ == "__main__":
    main()
