"""Peak memory of one model, measured in a process of its own: ``python -m diffprune_plugin.export.memory FILE ...``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffprune_plugin.export.feeds import example_feeds
from diffprune_plugin.export.proofs import Bound
from diffprune_plugin.export.providers import known_provider, open_session
from diffprune_plugin.utils.optional import need

Inputs = dict[str, tuple[list[int], str]]


def peak_memory(path: Path, provider: str, dims: Mapping[str, int], threads: int) -> int | None:
    """Bytes that opening the model and two runs take at most, beyond the bare runtime; None where it cannot be told."""
    if known_provider(provider).is_gpu:
        return None  # a GPU's memory is not a process's
    inputs = {name: (value.shape, value.dtype.str) for name, value in example_feeds(path, dims).items()}
    words = str(path.resolve()), provider, json.dumps(dict(dims)), str(threads), json.dumps(inputs)
    command = [sys.executable, "-m", __name__, *words]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = child.stdout.splitlines()
    return int(lines[-1]) if child.returncode == 0 and lines and lines[-1].isdigit() else None


def high_water() -> int:
    """The process's own peak in bytes. VmHWM, since ru_maxrss is inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def measure(path: Path, provider: str, dims: dict[str, int], threads: int, inputs: Inputs) -> int:
    """``inputs``: shape and dtype by name; to make them from the file would raise the peak before the count."""
    feeds = {name: np.zeros(shape, dtype) for name, (shape, dtype) in inputs.items()}
    need("onnxruntime")  # loaded before the count, not as the model's
    before = high_water()
    bound = Bound(open_session(path, provider, free_dims=dims, threads=threads), feeds, known_provider(provider).memory)
    bound.run()
    return high_water() - before


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", sys.argv[4])
    print(measure(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]), json.loads(sys.argv[5])))
