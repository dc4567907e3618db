"""Damaged data sets: each gives samples that are whole, or one line; never a traceback or a hang."""

from __future__ import annotations

import collections
import faulthandler
import os
import sys
import warnings

import torch
from damaged import damaged

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.errors import BadInput

COUNT = int(os.environ.get("MUTATIONS", "300"))


def outcome(source, resolution: int | None) -> str:
    """How the loading ends: ``refused``, or ``loaded`` if the samples can be taken and counted."""
    try:
        samples = load_samples(source, resolution)
    except BadInput as error:
        line = str(error).isprintable() and str(error).startswith(("data: ", "resolution: "))
        return "refused" if line else f"no line: {error}"
    rows = torch.arange(len(samples))
    assert torch.isfinite(samples.sample(rows)).all()
    assert len(samples.sha256) == 64
    assert all(len(values) == len(samples) for values in samples.inputs(rows).values())
    assert len(samples.captions) in (0, len(samples))
    return "loaded"


def test_a_damaged_data_set_is_refused_in_a_line_or_gives_whole_samples(tmp_path, capfd) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(COUNT):
        folder = tmp_path / str(seed)
        folder.mkdir()
        how, source = damaged(seed, folder)
        faulthandler.dump_traceback_later(60, exit=True)  # a hang ends the run and shows where
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of large images and broken EXIF
                found = outcome(source, (None, 4)[seed // 6 % 2])
        except Exception as error:
            raise AssertionError(f"seed {seed}: {how}") from error
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert found in ("refused", "loaded"), f"seed {seed}: {how}: {found}"
        counts[f"{how.split()[0]} {found}"] += 1
    print(dict(sorted(counts.items())), file=sys.stderr)
    refused = sum(count for name, count in counts.items() if name.endswith("refused"))
    assert COUNT / 3 < refused < COUNT * 0.95, counts  # or they are damaged too little, or too much
