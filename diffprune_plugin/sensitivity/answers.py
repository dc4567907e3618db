"""The questions of a search answered by all processes together, each once, whatever interrupts it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.data.samples import Samples, drawn_hash
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import trained_for, training_scheduler
from diffprune_plugin.errors import BadInput, CheckFailed, first_line
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.sensitivity.measured import Question, Search
from diffprune_plugin.sensitivity.trials import Base, Trials
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.out_of_memory import within_memory
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import weights_hash

KEPT = 4  # compensated models: those of a round's plans
REMEDY = "while plans are tried; say 'allocation: linear' or fewer 'sensitivity_samples', or use a machine with more"


def spend_measured(
    start: Callable[[], Search],
    model: nn.Module,
    scheduler: Any,
    images: Samples,
    processes: Processes,
    *,
    samples: int,
    seed: int = 0,
    progress_in: Path | None = None,
    progress: bool = True,
) -> PruningPlan | None:
    """The plan that a search ends with, on the first process, which alone calls ``start``; None on the others.

    All processes share the measuring. ``samples``: noisy ones that trials are fitted to. With ``progress_in`` (a
    directory) an interrupted call goes on and gives the same plan; what it holds stays there.

    Raises BadInput for progress that is damaged, CheckFailed for outputs that are not finite.
    """
    adapter = find_adapter(model)
    data, scheduler = fitting(images, model, adapter, scheduler), training_scheduler(scheduler)
    facts = [weights_hash(model), drawn_hash(data), trained_for(scheduler), samples, seed]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = None if progress_in is None else progress_in / f"allocation-{digest}.json"
    with within_memory(REMEDY):
        trials = processes.on_all(lambda: Trials.of(model, scheduler, data, adapter, samples, seed))
        answers = Answers(trials, processes, file)
        processes.on_first(answers.take_up)
        searching = processes.on_first(start)
        return converse(searching, answers, processes, progress)


def converse(searching: Any, answers: Answers, processes: Processes, progress: bool) -> PruningPlan | None:
    """The search asks, on the first process; all answer; until it has a plan."""
    given: list[float] | None = None
    with progress_bar(progress and processes.is_first) as bar:
        while True:
            asked, plan = processes.on_first(functools.partial(following, searching, given)) or (None, None)
            text = processes.shared(json.dumps(answers.request(asked)) if processes.is_first else "")
            if text == "null":
                return plan
            given = answers.to(text, bar)


def following(searching: Any, given: Any) -> tuple[Question | None, PruningPlan | None]:
    """The next question of a search, or the plan that it ends with."""
    try:
        return searching.send(given), None
    except StopIteration as end:
        return None, end.value


@dataclass
class Answers:
    """Errors that were measured, by key; those of an interrupted search are read again from ``file``."""

    trials: Trials
    processes: Processes
    file: Path | None
    known: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Base] = field(default_factory=dict)  # of the last questions

    def take_up(self) -> None:
        """What is stored; raises BadInput for a file that is damaged."""
        if self.file is None or not self.file.exists():
            return
        try:
            self.known = {str(key): float(value) for key, value in json.loads(self.file.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise BadInput(f"{self.file}: not the progress of an allocation: {first_line(error)}; remove it") from None

    def request(self, asked: Question | None) -> dict[str, Any] | None:
        """What all processes are told: the question, and the places of what is not known yet."""
        if asked is None:
            return None
        keys = asked.keys
        return asdict(asked) | {"open": [place for place, key in enumerate(keys) if key not in self.known]}

    def to(self, text: str, bar: Any) -> list[float]:
        """The answers, on the first process: first that of the plan, then one a change."""
        content = json.loads(text)
        places = content.pop("open")
        asked = Question(**{**content, "changes": [(root, units) for root, units in content["changes"]]})
        task = bar.add_task("allocation", total=len(places))
        for first in range(0, len(places), self.processes.count):
            some = places[first : first + self.processes.count]
            self.measure(asked, some)
            bar.update(task, advance=len(some))
        return [self.known[key] for key in asked.keys] if self.processes.is_first else []

    def measure(self, asked: Question, places: Sequence[int]) -> None:
        """Answer a place a process, and store what came out."""
        processes = self.processes
        mine = processes.on_all(lambda: [self.error(asked, place) for place in processes.part_of(places)])
        values = torch.tensor(mine, dtype=torch.float64, device=processes.device)
        everyone = processes.gather(values, len(places)).tolist()
        keys = asked.keys
        processes.on_first(lambda: self.add([keys[place] for place in places], everyone))

    def error(self, asked: Question, place: int) -> float:
        """Of the plan itself at place 0, else of a change; raises CheckFailed if it is not finite."""
        base = self.base(asked)
        found = self.trials.look.error(base.model) if place == 0 else self.trials.error(base, *asked.changes[place - 1])
        if not math.isfinite(found):
            raise CheckFailed("allocation: a pruned model's output is not finite; check the weights and the images")
        return found

    def base(self, asked: Question) -> Base:
        """The compensated model of the plan itself, made once."""
        key = asked.key()
        if key not in self.bases:
            self.bases = dict([*self.bases.items()][1 - KEPT :])
            self.bases[key] = self.trials.base(asked.removed, asked.heads)
        return self.bases[key]

    def add(self, keys: Sequence[str], values: Sequence[float]) -> None:
        self.known |= dict(zip(keys, values, strict=True))
        if self.file is not None:
            write_text(self.file, json.dumps(self.known) + "\n")
