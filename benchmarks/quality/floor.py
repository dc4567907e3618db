"""What a Frechet distance is at least: of some real images to the other real ones, by how many they are.

    python benchmarks/bench.py floor                    # digits
    python benchmarks/bench.py floor --model emoji      # after: make models

The distance is biased upwards, the more the fewer images: a model that draws as the data are has this one, not 0.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from shared.embedded import classifier, real_features
from shared.results import mean, one_of, publish, table
from shared.subject import SUBJECTS

from diffprune_plugin.evaluation.features import frechet_distance

COUNTS = (66, 96, 128, 192, 256)
DRAWS = 8


def main(model: Annotated[str, typer.Option(**one_of(("digits", "emoji")))] = "digits") -> None:
    """Take some of the real images away from the others, and measure."""
    of = SUBJECTS[model]
    features, rows = real_features(of), []
    orders = [torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    for count in COUNTS:
        found = [frechet_distance(features[order[count:]], features[order[:count]]) for order in orders]
        rows.append([str(count), mean(found, 1)])
    title = f"Of {len(features)} real images so many against the others; mean and standard error over {DRAWS} draws."
    publish(f"floor_{model}", [title, "", *table(["images", classifier(of).frechet], rows)])
