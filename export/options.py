"""What the commands are asked for: each option once, with its default, its help and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.fusion import check_fuse
from diffprune_plugin.export.provider_table import CPU, CUDA, PROVIDERS
from diffprune_plugin.export.providers import spec_of, without_replay
from diffprune_plugin.utils.files import check_file, check_picture
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.written_paths import check_different

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write it as one HTML file too, with its pictures inside."),
]
*OTHERS, LAST = reversed(PROVIDERS)


@dataclass(frozen=True)
class BenchOptions:
    """How latency is measured, what it has to be, and where it goes; the defaults are those of the commands."""

    provider: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(OTHERS)} or {LAST}; all five proofs must hold. Default: the best proved.",
        ),
    ] = None
    provider_options: Annotated[
        tuple[str, ...],
        typer.Option("--provider-option", metavar="KEY=VALUE,...", help="Passed to the provider, and recorded."),
    ] = ()
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Capture a CUDA graph, and time its replays.")] = (
        False
    )
    nhwc: Annotated[bool, typer.Option("--nhwc", help="Convolutions with channels last (CUDA).")] = False
    tune: Annotated[
        bool, typer.Option("--tune", help="Try the provider's options first; time each model with its best.")
    ] = False
    batches: Annotated[tuple[int, ...], typer.Option("--batch", help="Batch sizes to time, for example 1,4.")] = (1,)
    threads: Annotated[int, typer.Option(help="CPU threads; spinning is off.", min=1)] = 1
    rounds: Annotated[
        int | None, typer.Option(help=f"Shuffled rounds ({CPU.rounds}; {CUDA.rounds} on a GPU).", min=5)
    ] = None
    budget: float | None = None  # seconds of rounds for each batch size; not an option of the commands
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Fail (exit code 1) if the pruned model's median is above.")
    ] = None
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail (exit code 1) if the interval's lower end is below.")
    ] = None
    overwrite: Overwrite = False
    verdict: Annotated[Path | None, typer.Option("--json", help="Where the result goes as JSON.")] = None
    markdown: Annotated[Path | None, typer.Option(help="Write the latency tables as Markdown.")] = None
    plot: Annotated[Path | None, typer.Option(help="Draw the latency as PNG.")] = None

    @property
    def asked_provider(self) -> str | None:
        """The provider with its options, as `known_provider` reads it; None where the best is to be found.

        Raises BadInput for options without a provider, or that it does not take.
        """
        if self.provider is not None:
            return spec_of(self.provider, self.provider_options, self.cuda_graph, self.nhwc)
        if self.provider_options or self.cuda_graph or self.nhwc:
            raise BadInput("--provider-option, --cuda-graph and --nhwc are a provider's: give --provider too")
        return None

    @property
    def checking_provider(self) -> str:
        """What numerics are checked on (default: the CPU): in many shapes, which a captured graph does not take."""
        return without_replay(self.asked_provider or "cpu")


@dataclass(frozen=True)
class FileOptions:
    """What an ONNX file is made with: what ``to_onnx`` takes."""

    opset: Annotated[int, typer.Option(help="ONNX opset; 20 runs fastest.")] = 20
    dynamic: Annotated[tuple[str, ...], typer.Option(help="Axes left open: batch,height,width,sequence.")] = ("batch",)
    dtype: Annotated[str, typer.Option(help="fp32 or fp16.")] = "fp32"
    keep_fp32: Annotated[
        tuple[str, ...],
        typer.Option("--keep-fp32", metavar="PATTERN,...", help="Layers of an fp16 file that stay in fp32."),
    ] = ()
    fuse: Annotated[bool, typer.Option("--fuse", help="Fused operators of the provider's (cpu, cuda).")] = False
    timestep: Annotated[str, typer.Option(help="int64, or float32 to take those between whole ones.")] = "int64"

    def of_file(self) -> dict[str, Any]:
        """These alone, by name."""
        return {field.name: getattr(self, field.name) for field in fields(FileOptions)}


@dataclass(frozen=True)
class Options(FileOptions, BenchOptions):
    """How a model is exported and proved."""

    baseline: Annotated[
        Path | None, typer.Option(help="Dense model to compare with. Default: the same architecture, random weights.")
    ] = None
    verify: Annotated[bool, typer.Option("--no-verify", help="Leave the numerics unproved; the verdict says so.")] = (
        True
    )
    latency: Annotated[bool, typer.Option("--no-bench", help="Leave the latency out.")] = True
    steps: Annotated[int, typer.Option(help="DDIM steps compared, if the model has a scheduler.", min=1)] = 10
    torch: Annotated[bool, typer.Option("--torch", help="Time PyTorch eager beside it.")] = False
    report: Report = None
    drawn: tuple[int, ...] = (1, 2)  # batch sizes of a pipeline's images; not an option of the commands
    check_placement: Annotated[
        str | None, typer.Option(metavar="cuda", help="List nodes without a CUDA kernel; needs no GPU.")
    ] = None

    def of_file(self) -> dict[str, Any]:
        """With the provider that a file is fused for; raises BadInput where none is."""
        return super().of_file() | {"fuse": check_fuse(self.provider) if self.fuse else ""}


def check_results(options: BenchOptions, files: Mapping[str, Path], directory: Path | None = None) -> None:
    """Raises BadInput for a place that a result cannot be written to, or a plot that cannot be drawn.

    ``files``: others, by name, that a result must not replace; ``directory``: that it must not lie in.
    """
    for path in (options.verdict, options.markdown):
        if path:
            check_file(path, options.overwrite, "path")
    if options.plot:
        check_picture(options.plot, options.overwrite, "path")
        need("matplotlib")
    results = {"--json": options.verdict, "--markdown": options.markdown, "--plot": options.plot}
    check_different({**files, **results, "--report": getattr(options, "report", None)}, directory)
