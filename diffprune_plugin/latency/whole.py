"""The whole model's latency: its exported file against the dense model's, in turns, on a provider that is proved."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.config.latency import LatencyConfig
from diffprune_plugin.export.benchmark import DENSE, NOISE, measure
from diffprune_plugin.export.convert import IMAGE, to_onnx
from diffprune_plugin.export.providers import check_distribution, gpu, known_provider, versions
from diffprune_plugin.latency.pieces import random_weights
from diffprune_plugin.latency.timing import clock_of, processor
from diffprune_plugin.planning.plan import TIMED_WITHIN

OPENED = 4, 12  # times that each session is made anew, more where that was too noisy: two of one file differ by 3 %


@dataclass(frozen=True)
class Measured:
    """One measurement: the share of the dense model's latency with its 95 % interval, the interval of the dense model
    against itself, and the dense model's milliseconds (median).
    """

    share: tuple[float, float, float]
    noise: tuple[float, float]
    dense_ms: float

    @property
    def noisy(self) -> bool:
        """Whether the dense model against itself is as uncertain as what is to be told apart."""
        return (self.noise[1] - self.noise[0]) / 2 > TIMED_WITHIN


class Whole(Protocol):
    """Measures models, given on the meta device, against one dense model."""

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def __call__(self, bare: nn.Module) -> Measured: ...


class WholeFiles:
    """Measures by exporting both with random weights; the dense model's file is kept in ``folder``."""

    def __init__(self, dense: nn.Module, adapter: ModelAdapter, config: LatencyConfig, folder: Path) -> None:
        self.adapter, self.config, self.folder = adapter, config, folder
        self.provider = known_provider(config.spec)
        self.dense = self.written(dense, "dense")

    @property
    def facts(self) -> dict[str, Any]:
        """What it is measured on, in the words of a plan's `Latency`."""
        clock = clock_of(self.provider, self.config.threads)[0]
        return {**context(self.config), "clock": clock, "fuse": self.config.fuse}

    def __call__(self, bare: nn.Module) -> Measured:
        pruned = self.written(bare, "pruned")
        for opened in OPENED:
            measured = self.measured(pruned, opened)
            if not measured.noisy:
                break
        return measured

    def measured(self, pruned: Path, opened: int) -> Measured:
        """The file of a pruned model against the dense one's, each session made so many times."""
        config = self.config
        found = measure(
            pruned,
            self.dense,
            provider=config.spec,
            batches=(config.batch,),
            axes={} if config.size is None else dict.fromkeys(IMAGE, config.size),
            threads=config.threads,
            memory=False,
            clock=clock_of(self.provider, config.threads)[1],
            opened=opened,
        )
        ratios = {ratio.name: ratio for ratio in found.ratios}
        speedup, noise = ratios["dense / pruned"], ratios[NOISE]
        share = (1 / speedup.median, 1 / speedup.high, 1 / speedup.low)
        return Measured(share, (noise.low, noise.high), next(row.p50 for row in found.rows if row.model == DENSE))

    def written(self, bare: nn.Module, name: str) -> Path:
        path, dtype = self.folder / f"{name}.onnx", self.config.dtype
        fuse = self.config.provider if self.config.fuse else ""
        dynamic = ("batch",) if self.config.size is None else ("batch", *IMAGE)  # sessions fix them to their sizes
        given: dict[str, Any] = {"dynamic": dynamic, "dtype": dtype, "fuse": fuse, "adapter": self.adapter}
        to_onnx(random_weights(bare), path, overwrite=True, **given)
        return path


def context(config: LatencyConfig) -> dict[str, Any]:
    """What a time depends on: settings, device and versions."""
    wanted = known_provider(config.spec)
    device = ", ".join(gpu().split(", ")[:2]) if wanted.is_gpu else processor()
    settings = {key: getattr(config, key) for key in ("dtype", "batch", "size", "threads")}
    return {"provider": config.spec, **settings, "device": device, "versions": versions(check_distribution())}


@contextlib.contextmanager
def whole_files(dense: nn.Module, adapter: ModelAdapter, config: LatencyConfig) -> Iterator[WholeFiles]:
    """`WholeFiles` in a folder that goes at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield WholeFiles(dense, adapter, config, Path(folder))
