"""The dense model beside a pruned one: whether it is that, its ONNX file, and what its own error in halves allows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export.convert import dense_twin, model_in, to_onnx
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.verify import Tolerance, summary, verify_onnx
from diffprune_plugin.pruning.loading import bare
from diffprune_plugin.pruning.pruned_class import check_dense
from diffprune_plugin.utils.files import scratch

WORSE = 2  # times the dense file's error that a pruned file's may be
MOST = 0.1  # that may be allowed so, of the largest output: a file that gives zeros errs by 1


def check_baseline(model: Path, options: Options) -> None:
    """Raises BadInput for a baseline that is not the model's dense one, that nothing is compared with, or that is
    missing."""
    given = options.baseline
    if given is None:
        if options.min_speedup is not None and not hasattr(bare(model), "pruning_plan"):
            raise BadInput(f"--min-speedup: {model} does not say what it was pruned from; give --baseline")
        return
    if not given.is_dir():
        raise BadInput(f"--baseline {given}: no such directory; give a pipeline or model directory")
    if not options.latency and not judged_by_dense(options):
        raise BadInput("--baseline: an fp32 file is timed beside it, which --no-bench leaves out; give one of them")
    check_dense(bare(given), bare(model), f"--baseline {given}")


def judged_by_dense(options: Options) -> bool:
    """Whether the dense model's own error says what is allowed: it has weights of its own, in half precision."""
    return options.dtype != "fp32" and options.verify and options.baseline is not None


def allowed(
    model: Path, output: Path, options: Options, provider: str, size: tuple[int, int] | None = None
) -> tuple[Tolerance | None, dict[str, float]]:
    """Twice the largest error of the dense model's file against its own PyTorch in fp32, and how that was found; None
    where the provider's own tolerance holds.

    Raises CheckFailed where the dense model's file gives nothing finite, or errs by too much itself.
    """
    if not judged_by_dense(options):
        return None, {}
    with dense_file(model, output, options) as dense:
        result = verify_onnx(
            dense or output,
            options.baseline or model,
            provider=provider,
            threads=options.threads,
            tolerance=Tolerance(1e30, 0.0),
            size=size,
        )
    if not result.passed:
        told = f"--baseline {options.baseline}: its {options.dtype} file gives no numbers"
        raise CheckFailed(f"{told}: {summary(result)}")
    error = max(case.relative for case in result.cases)
    if WORSE * error > MOST:
        told = f"--baseline {options.baseline}: its own {options.dtype} file is off by {error:.1e} of the output"
        raise CheckFailed(f"{told}, so that nothing could be told by it; keep layers in fp32 (--keep-fp32)")
    return Tolerance(WORSE * error, 0.0), {"relative": error, "allowed": WORSE * error}


@contextlib.contextmanager
def dense_file(model: Path, output: Path, options: Options) -> Iterator[Path | None]:
    """The dense model's ONNX file for as long as it is timed.

    Without --baseline it is the architecture that the pruned model came from, with random weights: they make no
    difference to latency. None for a model that is not pruned.
    """
    dense: Any = options.baseline or dense_twin(model_in(model))
    if dense is None:
        yield None
        return
    # Beside the file: what a killed run leaves there, the next one removes.
    with scratch(output.with_name(f"{output.stem}-dense.onnx")) as path:
        to_onnx(dense, path, **options.of_file())
        del dense
        gc.collect()  # the exporter's program holds the weights in cycles
        yield path
