"""What the benchmarks share: results that survive an interruption, jobs on both cores, tables of means and errors."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats

from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.progress import progress_bar

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "figures.md")  # that show tables
# Without these glibc hands large blocks back at once, and every tensor costs page faults: 15 % of a training step.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


Seeds = Annotated[int, typer.Option(min=1)]
Workers = Annotated[int, typer.Option(min=1, help="processes, of one thread each")]


def one_of(names: Iterable[str]) -> dict[str, Any]:
    """Of an option of typer: which words it takes, and that no other is taken."""

    def checked(value: str | None) -> str | None:
        if value is not None and value not in names:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(names)}")
        return value

    return {"help": " or ".join(names), "callback": checked}


def some_of(names: Iterable[str], separator: str = ",", needed: Iterable[str] = ()) -> dict[str, Any]:
    """Of an option of typer: words with a separator between them, each of which is known and the needed among them."""

    def checked(value: str) -> str:
        words = value.split(separator)
        for word in words:
            if word not in names:
                raise typer.BadParameter(f"{word!r} is none of {f'{separator} '.join(names)}")
        if missing := [name for name in needed if name not in words]:
            raise typer.BadParameter(f"{missing[0]} is compared with: add it to {value}")
        return value

    return {"help": f"separated by {separator!r}, of: {f'{separator} '.join(names)}", "callback": checked}


def some_shares(what: str) -> dict[str, Any]:
    """Of an option of typer: shares of a whole, separated by commas; none where the option may be empty."""

    def checked(value: str) -> str:
        for word in value.split(",") if value else []:
            try:
                inside = 0 < float(word) < 1
            except ValueError:
                inside = False
            if not inside:
                raise typer.BadParameter(f"{word!r} is no number above 0 and below 1")
        return value

    return {"help": f"{what}, separated by commas", "callback": checked}


@cache
def processes(count: int) -> ProcessPoolExecutor:
    """Workers of one thread each, kept: to import what they need takes each of them ten seconds."""
    os.environ.update({name: value for name, value in MALLOC.items() if name not in os.environ})
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), begin)


def begin() -> None:
    """What a worker does first: it keeps to one thread, and ends with the program that it works for."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class Store:
    """Results by key in one JSON file; what is there is not computed again. Those of other facts are forgotten."""

    def __init__(self, name: str, facts: Any) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.path = RESULTS / f"{name}.json"
        stored = json.loads(self.path.read_text()) if self.path.exists() else {}
        facts = json.loads(json.dumps(facts))
        self.values: dict[str, Any] = stored["values"] if stored.get("facts") == facts else {}
        self.facts = facts

    def put(self, key: str, value: Any) -> None:
        self.values[key] = value
        write_text(self.path, json.dumps({"facts": self.facts, "values": self.values}, indent=1) + "\n")

    def fill(self, jobs: Mapping[str, Callable[[], Any]], workers: int) -> None:
        """Compute what is missing, in processes of one thread each; every result is stored as soon as it is there.

        Jobs are picklable (functools.partial of a function at the top of a module). The first that fails ends it all.
        """
        missing = {key: job for key, job in jobs.items() if key not in self.values}
        if not missing:
            return
        pool = processes(workers)
        with progress_bar(True) as bar:
            task = bar.add_task(self.path.stem, total=len(missing))
            futures = {pool.submit(job): key for key, job in missing.items()}
            try:
                for future in as_completed(futures):
                    self.put(futures[future], future.result())
                    bar.advance(task)
                    bar.console.print(f"{futures[future]}: {self.values[futures[future]]}", highlight=False)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def mean(values: Sequence[float], digits: int = 4) -> str:
    """Mean and, of more than one value, its standard error."""
    error = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{error}"


def over(seeds: int) -> str:
    """What the figures of a table are."""
    return "One seed" if seeds == 1 else f"Mean and standard error over {seeds} seeds"


def paired_p(values: Sequence[float], others: Sequence[float]) -> float:
    """Two-sided p of a paired t-test; nan for fewer than two pairs or none that differs."""
    if len(values) < 2 or list(values) == list(others):
        return math.nan
    return float(stats.ttest_rel(values, others).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p of so many tests at once: of the i-th lowest of m, from 0, m - i times it, and none below one that is lower.

    Holm, Scandinavian Journal of Statistics 6 (1979). What is nan is no test.
    """
    order = sorted((i for i, p in enumerate(values) if not math.isnan(p)), key=values.__getitem__)
    found, highest = list(values), 0.0
    for rank, i in enumerate(order):
        highest = found[i] = max(highest, min(1.0, (len(order) - rank) * values[i]))
    return found


def p_text(p: float) -> str:
    """As it stands in a table; nothing for nan."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def with_results(text: str) -> str:
    """A document with what lies between its marks `<!-- benchmarks/results/NAME.md -->` and `<!-- end -->` renewed, if
    there is such a file."""

    def renewed(block: re.Match[str]) -> str:
        file = RESULTS / block[2]
        return f"{block[1]}\n{file.read_text().strip()}\n{block[3]}" if file.exists() else block[0]

    return re.sub(r"(<!-- benchmarks/results/(\w+\.md) -->)\n(?:.*?\n)??(<!-- end -->)", renewed, text, flags=re.DOTALL)


def publish(name: str, lines: Sequence[str]) -> None:
    """Print Markdown, keep it beside the results and renew it in the documents that show it."""
    text = "\n".join(lines) + "\n"
    write_text(RESULTS / f"{name}.md", text)
    for document in DOCUMENTS:
        write_text(document, with_results(document.read_text()))
    print(text)
