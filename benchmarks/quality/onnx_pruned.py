"""What the structured pruning of onnxsim takes from an exported file: the embedded model's, and a published one.

    pip install --no-deps onnxsim==0.8.1 adaptive-terrain-diffusion==0.4.2
    python benchmarks/bench.py onnx-pruned

It works on the graph alone: a channel may go where one layer makes it and one takes it, with nothing but activations
and known norms between.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime
import typer
from shared.embedded import dense
from shared.results import publish, some_shares, table

from diffprune_plugin.export import to_onnx

TERRAIN = "weights/terrain_consistency_unet_difficulty100.onnx"


def models(folder: Path) -> Iterator[tuple[str, Path]]:
    to_onnx(dense().unet, folder / "digits.onnx")
    yield "embedded digits", folder / "digits.onnx"
    yield "adaptive-terrain-diffusion", Path(str(files("terrain_diffusion") / TERRAIN))


def weights(model: onnx.ModelProto) -> int:
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if len(tensor.dims) > 1)


def output(model: onnx.ModelProto) -> np.ndarray:
    """Of normally distributed images, at timestep 500, or sigma and difficulty 0.5."""
    session, generator = onnxruntime.InferenceSession(model.SerializeToString()), np.random.default_rng(0)
    feeds = {}
    for port in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in port.shape]
        values = generator.standard_normal(shape) if len(shape) > 1 else np.full(shape, 0.5)
        feeds[port.name] = np.full(shape, 500) if port.type == "tensor(int64)" else values.astype(np.float32)
    found: np.ndarray = session.run(None, feeds)[0]
    return found


def main(ratios: Annotated[str, typer.Option(**some_shares("pruning ratios"))] = "0.3,0.5") -> None:
    """Print the table."""
    import onnxsim

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in models(Path(folder)):
            whole = onnx.load(file)
            expected = output(whole)
            for ratio in map(float, ratios.split(",")):
                small = onnxsim.apply_structured_pruning(whole, sparsity=ratio)
                error = float(np.square(output(small) - expected).mean() / np.square(expected).mean())
                rows.append([name, str(ratio), f"{1 - weights(small) / weights(whole):.1%}", f"{error:.2g}"])
    head = ["file", "sparsity asked for", "weights that went", "error of the output, as a share of its mean square"]
    publish("onnx_pruned", table(head, rows))
