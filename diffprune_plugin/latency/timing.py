"""A piece's time on its runtime, against a fixed yardstick that runs in turn with it: clocks that drift cancel."""

from __future__ import annotations

import contextlib
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffprune_plugin.export.benchmark import DENSE, PRUNED, Clock, interleaved, medians
from diffprune_plugin.export.graphs import quiet
from diffprune_plugin.export.precision import DTYPES
from diffprune_plugin.export.proofs import Bound
from diffprune_plugin.export.provider_table import Provider
from diffprune_plugin.export.providers import known_provider, open_session
from diffprune_plugin.latency.pieces import Piece, filled

OPSET = 20  # as the whole model's
ROUNDS, MOST = 10, 30  # of a piece: more while its interval is wide
YARD = (1, 64, 32, 32)  # what the yardstick's convolution gets


def clock_of(provider: Provider, threads: int) -> tuple[Literal["wall", "thread"], Clock]:
    """What tells a provider's time, by name.

    Where it computes on the calling thread alone: that thread's own time, which is the wall's on a machine that has
    nothing else to do; on a busy one the wall tells mostly of the others.
    """
    if provider.fallback and threads == 1:
        return "thread", time.thread_time
    return "wall", time.perf_counter


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class PieceTimer:
    """Times pieces on one provider, in units of the yardstick; raises HardwareUnproved where it does not open."""

    def __init__(self, provider: str, dtype: str, threads: int) -> None:
        self.provider, self.dtype, self.threads = known_provider(provider), dtype, threads
        self.name = provider
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yard = nn.Conv2d(YARD[1], YARD[1], 3, padding=1).to(DTYPES[dtype]).eval()
            nothing = nn.Identity()
            self.yardstick = self.opened(yard, (torch.randn(YARD).to(DTYPES[dtype]),))
            self.call = self.against_yardstick(self.opened(nothing, (torch.zeros(1),)))

    def __call__(self, piece: Piece) -> float:
        """The piece's time less that of calling anything at all, as a multiple of the yardstick's."""
        return max(self.against_yardstick(self.opened(*filled(piece, DTYPES[self.dtype]))) - self.call, 0.0)

    def against_yardstick(self, bound: Bound) -> float:
        runs = {DENSE: self.yardstick.run, PRUNED: bound.run}
        clock = clock_of(self.provider, self.threads)[1]
        times, _ = interleaved(runs, ROUNDS, MOST, None, self.provider.warm_up, clock)
        pairs = zip(medians(times[DENSE]), medians(times[PRUNED]), strict=True)
        return statistics.median(taken / yard for yard, taken in pairs)

    def opened(self, module: nn.Module, tensors: tuple[Tensor, ...]) -> Bound:
        """A session of the module alone, its inputs bound where the provider computes."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "piece.onnx"
            small_onnx(module, tensors, path)
            session = open_session(path, self.name, threads=self.threads, all_nodes=True)
        given = {f"input_{place}": tensor.numpy() for place, tensor in enumerate(tensors)}
        feeds: dict[str, Any] = {value.name: given[value.name] for value in session.get_inputs()}
        return Bound(session, feeds, self.provider.memory)


def small_onnx(module: nn.Module, tensors: tuple[Tensor, ...], path: Path) -> None:
    """A module as an ONNX file with all sizes fixed.

    By torch's older exporter, which takes a tenth of a second where the one of `to_onnx` takes three; ONNX Runtime runs
    the files of both equally fast.
    """
    with quiet():
        torch.onnx.export(
            module,
            tensors,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=[f"input_{place}" for place in range(len(tensors))],
        )
