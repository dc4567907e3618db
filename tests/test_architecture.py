"""Where things live: imports point down, few modules at the top, files that fit one idea, no pickle."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("diffprune_plugin", "adapters", "export", "benchmarks")
LONGEST = 350  # lines of a file


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def test_imports_point_down(site: Path, call: Any, tmp_path: Path) -> None:
    """In the wheel: the folders adapters/ and export/ are rooms only there."""
    assert "Contracts: 1 kept, 0 broken." in call("lint-imports", *config(), cwd=tmp_path, PYTHONPATH=site)


@pytest.mark.parametrize("late", [False, True])
def test_an_import_that_points_up_is_found(late: bool, site: Path, call: Any, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    file = tmp_path / "site" / "diffprune_plugin" / "graph" / "costs.py"
    planted = "def late():\n    import diffprune_plugin.workflow\n" if late else "import diffprune_plugin.workflow\n"
    file.write_text(file.read_text() + planted)
    with pytest.raises(AssertionError, match=r"diffprune_plugin.graph.costs -> diffprune_plugin.workflow"):
        call("lint-imports", *config(), cwd=tmp_path, PYTHONPATH=tmp_path / "site")


def config() -> tuple[str, ...]:
    return "--no-cache", "--config", str(ROOT / "pyproject.toml")


def test_few_modules_lie_at_the_top_and_none_bears_the_name_of_a_public_function() -> None:
    import diffprune_plugin

    top = {path.stem for path in (ROOT / "diffprune_plugin").iterdir() if path.suffix == ".py"}
    rooms = {path.name for path in (ROOT / "diffprune_plugin").iterdir() if path.is_dir()}
    assert len(top) <= 8
    assert not (top | rooms) & set(diffprune_plugin.__all__)


def test_no_file_is_too_long_for_one_idea() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_nothing_writes_or_reads_a_pickle() -> None:
    for path in sources():
        text = path.read_text()
        for word in ("import pickle", "torch.save(", "torch.load(", "weights_only=False", "allow_pickle=True"):
            assert word not in text, f"{path}: {word}"


# Where these words are not names of a model's inputs: a heading, a prediction_type, a key of data files, and the roles
# by which an exported file says what its inputs are called. And one error that calls a component as people do.
WORDS = {
    "diffprune_plugin/plugins.py": {"unet"},
    "diffprune_plugin/evaluation/report.py": {"timestep"},
    "diffprune_plugin/diffusion/schedulers.py": {"sample"},
    "diffprune_plugin/data/tensors.py": {"sample"},
    "export/components.py": {"sample"},  # autoencoders' own
    "export/convert.py": {"sample", "timestep"},
    "export/feeds.py": {"sample", "timestep"},
    "export/fusion.py": {"unet"},  # ONNX Runtime's type of model
    "export/ort_pipeline.py": {"sample"},
    "export/ort_unet.py": {"sample", "timestep"},
    "export/pipeline.py": {"timestep"},
}


def test_the_core_names_no_input_of_a_unet_and_no_component() -> None:
    found: dict[str, set[str]] = {}
    for path in (p for folder in ("diffprune_plugin", "export") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            constant = isinstance(node, ast.Constant) and node.value in ("sample", "timestep", "unet")
            word = node.value if constant else node.attr if isinstance(node, ast.Attribute) else ""
            if (constant or word == "unet") and "renamed" not in path.parts:
                found.setdefault(str(path.relative_to(ROOT)), set()).add(str(word))
    assert found == WORDS


def test_no_two_modules_of_the_tests_bear_one_name() -> None:
    """They are imported by their names alone: of two, the second would not be collected, or be the first."""
    names = [path.stem for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
