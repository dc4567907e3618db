"""Same noise, same picture (the paper's Fig. 2): how like the dense model's images a small model's are, one by one.

    python benchmarks/bench.py consistency                          # digits, three seeds
    python benchmarks/bench.py consistency --model emoji            # after: make models
    python benchmarks/bench.py consistency --model captions         # a text-to-image pipeline, after: make models
    python benchmarks/bench.py consistency --ways "removed;compensated" --seeds 1

All ways leave 46 % of the MACs: removed by one ratio and nothing repaired, compensated, the budget allocated and
compensated, and that fine-tuned for a tenth of the dense model's steps with the dense model as teacher. Each seed
calibrates, trains and draws by itself: from other noise. Results are kept in benchmarks/results/consistency_MODEL.json;
interrupted, it goes on where it was, and other ways and seeds add to it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from shared.embedded import classifier, dense, dense_images, distance, drawn, losses, recognised, similarities, tuned
from shared.results import RESULTS, Seeds, Store, Workers, mean, one_of, over, publish, some_of, table
from shared.subject import SUBJECTS, Look, Subject, samples_of
from torch import Tensor

from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.pruning.loading import load_pipeline, model_of
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.images import image_grid, pil_images, save_image
from diffprune_plugin.utils.optional import need_pyplot
from quality.allocation import made
from quality.recover import FULL, RECIPES, TAUGHT

BUDGET = 0.46
REMOVED, COMPENSATED, ALLOCATED, TUNED = "removed", "compensated", "allocated", "allocated, fine-tuned"
WAYS: dict[str, tuple[str, bool]] = {  # its allocation, and whether it is compensated
    REMOVED: ("uniform", False),
    COMPENSATED: ("uniform", True),
    ALLOCATED: ("linear", True),
    TUNED: ("linear", True),
}
COLOURS = dict(zip(WAYS, ("tab:red", "tab:grey", "tab:blue", "tab:green"), strict=True))
LOOK = Look(held_out=500, repeats=2, count=96, steps=20)
SHOWN = 14  # images of a row of the picture
QUANTILES = (0.05, 0.5, 0.95)


def model(way: str, seed: int, of: Subject) -> Path:
    """Directory of the model of a row."""
    allocation, compensate = WAYS[way]
    start = made(allocation, BUDGET, seed, of, compensate)
    if way != TUNED:
        return start
    settings = {**RECIPES[TAUGHT], "teacher": str(of.model), "batch_size": FULL.batch_size, "steps": of.steps // 10}
    return tuned(f"consistency-{seed}", start, seed, of, **settings)


def measured(way: str, seed: int, of: Subject) -> dict[str, Any]:
    """Share of the MACs, the SSIM of each image, and what `judged` says."""
    output = model(way, seed, of)
    pipeline, plan = load_pipeline(output), read_plan(output)
    images, share = drawn(pipeline, LOOK, of, seed), plan.macs[1] / plan.macs[0]
    ssims = similarities(images, dense_images(LOOK, of, seed)).tolist()
    return {"macs": share, "ssims": ssims, **judged(pipeline, images, of)}


def judged(pipeline: Any, images: Tensor, of: Subject) -> dict[str, float]:
    """Held-out loss, Frechet distance of the images, and the share that are what was asked, of a model of classes."""
    found = {"loss": loss_of(pipeline, of), "distance": distance(images, of)}
    return found | ({"recognised": recognised(images, of)} if of.classes else {})


def whole(seed: int, of: Subject) -> dict[str, float]:
    """The dense model, drawing from the noise of a seed."""
    return judged(dense(of), dense_images(LOOK, of, seed), of)


def loss_of(pipeline: Any, of: Subject) -> float:
    """On as many held-out images as there are."""
    count = min(LOOK.held_out, len(samples_of(of.held_out)))
    return float(losses(model_of(pipeline), LOOK.repeats, count, of)[0].mean())


def runs_of(store: Store, way: str) -> list[dict[str, Any]]:
    """What was measured of a way, by seed."""
    return [run for key, run in store.values.items() if key.rpartition(" ")[0] == way]


def row(way: str, runs: list[dict[str, Any]]) -> list[str]:
    """Means over the seeds; quantiles over the images of each."""
    quantiles = [mean([float(np.quantile(run["ssims"], q)) for run in runs], 3) for q in QUANTILES]
    cells = [mean([float(np.mean(run["ssims"])) for run in runs], 3), *quantiles]
    return [
        *(way, str(len(runs)), mean([run["macs"] for run in runs], 3), mean([run["loss"] for run in runs], 4)),
        *(*cells, mean([run["distance"] for run in runs], 0)),
        *([mean([run["recognised"] for run in runs], 2)] if "recognised" in runs[0] else []),
    ]


def histogram(store: Store, path: Path) -> None:
    """Of the SSIM of all images, a line a way."""
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for way, colour in COLOURS.items():
        if runs := runs_of(store, way):
            values = np.concatenate([run["ssims"] for run in runs])
            axes.hist(values, np.linspace(-0.2, 1, 49), density=True, histtype="step", color=colour, label=way)
    axes.set(xlabel="SSIM of an image to the dense model's from the same noise", ylabel="density")
    axes.legend(loc="upper center")
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def picture(ways: list[str], of: Subject, path: Path) -> None:
    """Images of the first seed from the same noise, a row a way."""
    look = Look(count=SHOWN, steps=25)
    rows = {"dense": dense(of)} | {way: load_pipeline(model(way, 0, of)) for way in ways}
    images = {name: drawn(each, look, of).permute(0, 2, 3, 1).numpy() for name, each in rows.items()}
    save_image(image_grid({name: pil_images(each) for name, each in images.items()}), path)


def main(
    model: Annotated[str, typer.Option(**one_of(SUBJECTS))] = "digits",
    seeds: Seeds = 3,
    ways: Annotated[str, typer.Option(**some_of(WAYS, ";"))] = ";".join(WAYS),
    workers: Workers = 2,
) -> None:
    """Measure what is missing, then print the table and draw the pictures."""
    of, title, chosen = SUBJECTS[model], f"consistency_{model}", ways.split(";")
    store = Store(title, [str(of), str(LOOK), BUDGET, "a noise a seed"])
    store.fill({f"dense {seed}": partial(whole, seed, of) for seed in range(seeds)}, workers)
    for way in chosen:  # each makes what the next begins with
        store.fill({f"{way} {seed}": partial(measured, way, seed, of) for seed in range(seeds)}, workers)
    known = [way for way in WAYS if runs_of(store, way)]
    histogram(store, RESULTS / f"{title}_histogram.png")
    picture(known, of, RESULTS / f"{title}.png")
    of_dense = {key: [run[key] for run in runs_of(store, "dense")] for key in store.values["dense 0"]}
    intro = (
        f"{over(max(len(runs_of(store, way)) for way in known))} of calibration, training and noise; {LOOK.count} "
        f"images of {LOOK.steps} DDIM steps a seed, each compared with the dense model's from the same noise. "
        f"diff_taylor. Dense: loss {of_dense['loss'][0]:.4f}, FD {mean(of_dense['distance'], 0)}."
    )
    if TUNED in known:
        intro += f" Fine-tuned: {of.steps // 10} steps of batch {FULL.batch_size}, the dense model as teacher."
    head = ["way", "seeds", "MACs", "held-out loss", "SSIM", *(f"{q:.0%} quantile" for q in QUANTILES)]
    head.append(classifier(of).frechet)
    if of.classes:
        intro += (
            " As asked: the share that the classifier takes for what was asked; dense "
            f"{mean(of_dense['recognised'], 2)}."
        )
        head.append("as asked")
    publish(title, [intro, "", *table(head, [row(w, runs_of(store, w)) for w in known])])
