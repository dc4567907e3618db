"""The linear estimate: what the output loses with each channel, from backward passes of random probes.

A removed channel takes its values x_c from the inputs of the layers behind it. To first order the output y moves by
dy = -sum J x_c, and for v ~ N(0, 1) of y's shape E[(v . dy)^2] = |dy|^2: one backward pass of v . y gives it for every
channel at once, as the square of sum_positions (x_c - mean x_c) grad_c. The mean is left out, since in the compensation
the bias of the layer behind takes it over. The estimator is Hutchinson's (Communications in Statistics 18, 1989). What
a refit of the layers behind leaves of it: `redundancy`; what norms over fewer channels do to those that stay: `norms`.

Where dimensions of a head go, a query's d takes q_d k_d from the logits, which are linear in q: dy = -sum J q_d, of
which no refit takes anything over. Where whole heads go their logits go with them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.timesteps import share
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples, drawn_hash
from diffprune_plugin.diffusion.batches import SENSITIVITY, batch_of, draw
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.loss import noised
from diffprune_plugin.diffusion.schedulers import trained_for, training_scheduler
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.graph.groups import CoupledGroup, trace_groups
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.recovery.ridge import by_position
from diffprune_plugin.sensitivity.blocks import Branches, removable
from diffprune_plugin.sensitivity.norms import Norms
from diffprune_plugin.sensitivity.products import by_sample, of_logits, products
from diffprune_plugin.sensitivity.redundancy import Correlations, in_turn
from diffprune_plugin.sensitivity.sensitivity import ESTIMATE, Sensitivity
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.modes import frozen
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import load_tensors, save_tensors, weights_hash

SAMPLES, PROBES = 64, 8


def measure_sensitivity(
    model: nn.Module,
    scheduler: Any,
    images: Any,
    *,
    samples: int = SAMPLES,
    probes: int = PROBES,
    batch_size: int = 16,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 15.0,
    keep_progress: bool = False,
    progress: bool = True,
    adapter: ModelAdapter | None = None,
) -> Sensitivity:
    """The error of each unit's removal by ``probes`` backward passes over noisy samples at timesteps spread evenly.

    ``images``: whatever `load_samples` takes. With ``checkpoint`` (a directory) an interrupted call goes on and gives
    identical bits; what it stored is cleared at the end unless ``keep_progress``. Where torch.distributed is in use all
    processes have to make the same call, and share the passes. The model is left as it was.

    Raises BadInput for images that do not fit, CheckFailed for gradients that are not finite.
    """
    adapter = adapter or find_adapter(model)
    data, scheduler = fitting(load_samples(images), model, adapter, scheduler), training_scheduler(scheduler)
    if min(samples, probes, batch_size) < 1:
        raise BadInput(f"sensitivity: samples {samples}, probes {probes} and batch_size {batch_size} are at least 1")
    processes = Processes(next(model.parameters()).device)
    groups = trace_groups(model, adapter)
    noisy, blocks = Noisy(data, scheduler, samples, seed, adapter), Branches(model, removable(model, adapter))
    run = Run(model, adapter, groups, noisy, batch_size, seed, processes, blocks, Norms.of(model, groups))
    if checkpoint is not None:
        facts = [weights_hash(model), drawn_hash(data), trained_for(scheduler), samples, probes, batch_size, seed]
        facts += sorted(run.sums)
        run.resume(Path(checkpoint), facts, checkpoint_seconds)
    with frozen(model), progress_bar(progress and processes.is_first) as bar:
        processes.on_all(run.means)
        run.passes(probes, bar)
    found = run.result(probes)
    if keep_progress:
        run.save(now=True)
    else:
        run.forget()
    scores = {group.root: run.in_turn(group, found) for group in groups}
    alone = {group.root: run.alone(group, found) for group in groups}
    return Sensitivity(
        scores=listed(scores),
        alone=listed(alone),
        norms=listed({group.root: run.norms.errors(group, scores[group.root], found) for group in groups}),
        norms_alone=listed({group.root: run.norms.errors(group, alone[group.root], found, False) for group in groups}),
        blocks={name: float(found[name].sum()) for name in blocks.blocks},
        power=run.power(),
        estimate=ESTIMATE,
        unseen=tuple(group.root for group in groups if not run.varies(group)),
        samples=samples,
        probes=probes,
        seed=seed,
        weights=weights_hash(model),
        images=drawn_hash(data),
        scheduler=trained_for(scheduler),
    )


@dataclass(frozen=True)
class Noisy:
    """The samples to look at: ``count`` of them, image, timestep and noise by the seed and their index alone."""

    data: Samples
    scheduler: Any
    count: int
    seed: int
    adapter: ModelAdapter

    def batch(self, rows: Sequence[int], model: nn.Module) -> dict[str, Tensor]:
        """The model's inputs, by name, for these samples."""
        like = next(model.parameters())
        total = np.arange(int(self.scheduler.config.num_train_timesteps))
        dropout = self.data.dropout if self.data.null else 0.0
        draws = [draw(self.data, self.seed, SENSITIVITY, i, share(total, i, self.count), dropout) for i in rows]
        batch = batch_of(self.data, draws).to(like)
        noisy, _, times = noised(self.scheduler, batch.sample, batch.noise, batch.timesteps, self.adapter)
        return self.adapter.given(model, noisy.to(like), times, batch.extra)


@dataclass
class Run:
    """One measurement under way; ``sums`` and ``done`` are all that a resumed one needs."""

    model: nn.Module
    adapter: ModelAdapter
    groups: Sequence[CoupledGroup]
    noisy: Noisy
    batch_size: int
    seed: int
    processes: Processes
    blocks: Branches
    norms: Norms
    sums: dict[str, Tensor] = field(default_factory=dict)
    centres: dict[str, Tensor] = field(default_factory=dict)
    done: int = 0
    correlations: Correlations = field(default_factory=Correlations)
    file: Path | None = None
    every: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)
    squares: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        units = dict.fromkeys(self.blocks.blocks, 1)
        for group in self.groups:
            names = [by_way_of(group.root, member.layer) for member in group.members if member.side == "in"]
            units |= dict.fromkeys([group.root, of_logits(group.root), *names], group.channels)
        self.sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
        self.sums |= self.norms.empty(self.noisy.count)
        self.layers = sorted({m.layer for group in self.groups for m in group.members if m.side == "in"})
        whole = self.adapter.head_layers(self.model, whole=True)
        self.queries = [name for name in self.adapter.queries(self.model) if name not in whole]

    def rows(self) -> list[range]:
        count, size = self.noisy.count, self.batch_size
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    @torch.no_grad()
    def means(self) -> None:
        """The mean of each channel that goes into a layer, over all samples and positions, and how those of a layer are
        correlated; and the output's power."""
        totals: dict[str, Tensor] = {}

        def total(name: str, given: Tensor, count: int) -> None:
            mean = by_sample(by_position(given), count).mean(1).double().sum(0)
            totals[name] = totals[name] + mean if name in totals else mean

        def correlate(name: str, given: Tensor, _: int) -> None:
            self.correlations.add(name, by_position(given) - self.centres[name].to(given))

        for rows in self.rows():
            with self.blocks.summing(), self.norms.noting():
                output = self.seen(rows, total)
            self.squares.append(float(output.double().square().mean()) * len(rows))
        self.centres = {name: (mean / self.noisy.count).float() for name, mean in totals.items()}
        self.blocks.averaged(self.noisy.count)
        for rows in self.rows():
            self.seen(rows, correlate)

    def seen(self, rows: range, look: Callable[[str, Tensor, int], None]) -> Tensor:
        """A forward pass of these samples that shows what goes into each layer, with its name and how many they are."""
        with contextlib.ExitStack() as hooks:
            for name in self.layers:

                def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    look(name, args[0], len(rows))

                hooks.callback(self.model.get_submodule(name).register_forward_pre_hook(hook).remove)
            return self.adapter.noise_in(self.model, self.noisy.batch(rows, self.model))

    def power(self) -> float:
        return sum(self.squares) / self.noisy.count

    def passes(self, probes: int, bar: Any) -> None:
        """A forward pass for each batch and a backward pass for each of its probes; processes share the batches."""
        jobs = self.rows()
        task = bar.add_task("sensitivity", total=len(jobs), completed=self.done)
        step = self.processes.count
        while self.done < len(jobs):
            mine = self.processes.part_of(jobs[self.done : self.done + step])
            self.processes.on_all(functools.partial(self.add_all, mine, probes))
            self.done = min(self.done + step, len(jobs))
            bar.update(task, completed=self.done)
            self.save(now=False)

    def add_all(self, jobs: Sequence[range], probes: int) -> None:
        for rows in jobs:
            self.add(rows, probes)

    def add(self, rows: range, probes: int) -> None:
        """One forward pass, and a backward pass of its graph for each probe: the squared sums for each unit."""
        with self.watched() as found, self.norms.watched() as of_norms:
            output = self.adapter.noise_in(self.model, self.noisy.batch(rows, self.model))
            values = output[0].numel()
            for probe in range(probes):
                noise = torch.stack([self.noise(row, probe, output.shape[1:]) for row in rows]).to(output)
                output.backward(noise, retain_graph=probe + 1 < probes)  # type: ignore[no-untyped-call]
                self.take(found, len(rows), values)
                found.clear()
                for norm, of in of_norms.items():
                    self.sums[norm][rows.start : rows.stop] += of / values
                of_norms.clear()

    def take(self, found: dict[str, Tensor], samples: int, values: int) -> None:
        """Add what one probe found for each layer, over the layers that a unit goes into."""
        for group in self.groups:
            moved = torch.zeros(samples, group.channels)
            for member in group.members:
                if member.side == "in" and member.layer in found:
                    at = torch.as_tensor(member.roots), torch.as_tensor(member.channels)
                    by_way = by_sample(found[member.layer], samples).sum(1)[:, at[1]]
                    moved.index_add_(1, at[0], by_way)
                    only = by_way.double().square().sum(0) / values
                    self.sums[by_way_of(group.root, member.layer)].index_add_(0, at[0], only)
            self.sums[group.root] += moved.double().square().sum(0) / values
            logits = self.logits(group, found, samples)
            self.sums[of_logits(group.root)] += logits.double().square().sum(0) / values
        for name in self.blocks.blocks:
            self.sums[name] += found[name].double().square().sum(0) / values

    def logits(self, group: CoupledGroup, found: dict[str, Tensor], samples: int) -> Tensor:
        """What one probe found for each of a group's channels as dimensions of queries, shape (samples, channels)."""
        moved = torch.zeros(samples, group.channels)
        for member in group.members:
            if member.side == "out" and (name := of_logits(member.layer)) in found:
                by_query = by_sample(found[name], samples).sum(1)
                moved.index_add_(1, torch.as_tensor(member.roots), by_query[:, torch.as_tensor(member.channels)])
        return moved

    def noise(self, row: int, probe: int, shape: Sequence[int]) -> Tensor:
        """v for one sample, by its number and the probe's alone."""
        source = np.random.default_rng([self.seed, SENSITIVITY, row, probe])
        return torch.from_numpy(source.standard_normal(tuple(shape), dtype=np.float32))

    @contextlib.contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """What is found in a backward inside, by layer and by block."""
        with products(self.model, self.centres, self.queries) as found, self.blocks.watched(found):
            yield found

    def result(self, probes: int) -> dict[str, Any]:
        """By root, by root and layer, and by block the mean over samples and probes; raises CheckFailed if not
        finite."""
        found = {}
        for name, sums in self.sums.items():
            total = self.processes.reduce(sums) / (self.noisy.count * probes)
            if not bool(torch.isfinite(total).all()):
                raise CheckFailed(f"sensitivity: {name} has a gradient that is not finite; check the weights")
            found[name] = total.numpy()
        return found

    def alone(self, group: CoupledGroup, found: dict[str, Any]) -> Any:
        """What each unit costs by itself, shape (units,)."""
        return folded(found[group.root] + found[of_logits(group.root)], group)

    def varies(self, group: CoupledGroup) -> bool:
        """Whether what comes from a group is not the same for all samples."""
        given = [member for member in group.members if member.side == "in"]
        return any(self.correlations.vary(m.layer, m.channels, self.centres[m.layer]) for m in given) or not given

    def in_turn(self, group: CoupledGroup, found: dict[str, Any]) -> Any:
        """What each unit adds when it goes in its turn and those that stay are refitted, shape (units,)."""
        names = {layer: by_way_of(group.root, layer) for layer in self.layers}
        squares = {layer: found[name] for layer, name in names.items() if name in found}
        values = in_turn(group, folded(found[group.root], group), squares, self.correlations)
        return values + folded(found[of_logits(group.root)], group)

    def resume(self, folder: Path, facts: list[Any], every: float) -> None:
        """Take up the progress stored in a folder, if it is of these facts, and store progress there."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.file, self.every = folder / f"sensitivity-{digest}.safetensors", every
        file = self.file
        tensors = self.processes.on_all(lambda: load_tensors(file)[0] if file.exists() else None)
        if tensors is not None:
            self.done = int(tensors.pop("done"))
            if self.processes.is_first:  # what is stored is the sum over processes
                self.sums = {name: tensor.clone() for name, tensor in tensors.items()}
        self.processes.check_same(self.done, file)

    def save(self, now: bool) -> None:
        """Store the progress if the last time is long enough ago; the first process writes."""
        if self.file is None or not self.processes.broadcast(now or time.monotonic() - self.saved_at >= self.every):
            return
        tensors = {root: self.processes.reduce(total) for root, total in self.sums.items()}
        tensors["done"] = torch.tensor(self.done)
        self.processes.on_first(lambda: self.write(tensors))
        self.saved_at = time.monotonic()

    def write(self, tensors: dict[str, Tensor]) -> None:
        assert self.file is not None
        with new_file(self.file) as temporary:
            save_tensors(tensors, temporary)

    def forget(self) -> None:
        if self.file is not None and self.processes.is_first:
            self.file.unlink(missing_ok=True)


def listed(values: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Arrays as tuples."""
    return {name: tuple(of.tolist()) for name, of in values.items()}


def by_way_of(root: str, layer: str) -> str:
    """The name of what is summed of a group through one layer that it goes into."""
    return f"{root} {layer}"


def folded(scores: Any, group: CoupledGroup) -> Any:
    """Scores of root channels summed over those that are paired: shape (units,)."""
    return scores.reshape(group.pairs, -1).sum(0)
