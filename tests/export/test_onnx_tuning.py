"""`--tune`: every sensible combination, the best of each model, what failed; engines built outside the timed window."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from diffprune_plugin.errors import BadInput, HardwareUnproved
from diffprune_plugin.export import provider_table, providers, tables, tuning, workflow
from diffprune_plugin.export.benchmark import Latency, Row, measure
from diffprune_plugin.export.options import BenchOptions
from diffprune_plugin.export.proofs import Placement
from diffprune_plugin.export.providers import known_provider, of_file
from diffprune_plugin.export.tuning import Tried, best, check_tune, combinations, tune

PLAYED = {"takes": ("a", "b"), "tuned": {"a": ("0", "1"), "b": ("x", "y")}}


@pytest.fixture
def tunable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a provider with two options, which it is opened without."""
    monkeypatch.setitem(provider_table.PROVIDERS, "cpu", replace(provider_table.CPU, **PLAYED))
    monkeypatch.setattr(providers, "provider_options", lambda wanted, threads, halves=False: {})


def test_all_combinations_of_what_is_not_given() -> None:
    assert len(combinations("cuda")) == 8
    some = combinations("cuda:prefer_nhwc=1,use_tf32=1")
    assert len(some) == 4
    assert all(each.startswith("cuda:prefer_nhwc=1,use_tf32=1,enable_cuda_graph=") for each in some)
    assert len(combinations("tensorrt")) == 4


@pytest.mark.parametrize(("spec", "told"), [(None, "no --provider"), ("cpu", "cpu has no options to try")])
def test_a_provider_without_options_to_try_is_refused(spec, told) -> None:
    with pytest.raises(BadInput, match=rf"--tune: {told}; give --provider tensorrt, cuda, openvino"):
        check_tune(spec)


def test_each_model_has_its_best_and_a_combination_that_is_not_proved_is_no_candidate(monkeypatch) -> None:
    times = {"False": (10.0, 7.0), "True": (8.0, 9.0)}

    def measured(pruned: Any, dense: Any, provider: str, **_: Any) -> Latency:
        graph = known_provider(provider).options["trt_cuda_graph_enable"]
        if provider.endswith("=5"):
            raise HardwareUnproved("partly on CUDA")
        rows = [
            Row(provider, n, 1, 9, ms, ms, ms, ms, 3) for n, ms in zip(("dense", "pruned"), times[graph], strict=True)
        ]
        built = {f"{n}, batch 1": Placement(provider, build_seconds=30.0) for n in ("dense", "pruned")}
        return Latency(provider, "fp16", 1, 10, rows, placements=built)

    monkeypatch.setattr(tuning, "measure", measured)
    tried = tune(Path("p.onnx"), Path("d.onnx"), "tensorrt", 1, 1)
    assert [each.why for each in tried] == ["", "partly on CUDA"] * 2
    assert best(tried, "dense") == "tensorrt:trt_cuda_graph_enable=1,trt_builder_optimization_level=3"
    assert best(tried, "pruned") == "tensorrt:trt_cuda_graph_enable=0,trt_builder_optimization_level=3"
    assert tried[0].build_seconds == {"dense": 30.0, "pruned": 30.0}
    table = tables.tuned_table(Latency("tensorrt", "fp16", 1, 10, tuned=tuning.as_rows(tried)))
    assert list(table.columns[1].cells) == ["10.00", "-", "8.000 *", "-"]
    with pytest.raises(BadInput, match="--tune: no combination works; the first: cuda: why"):
        best([Tried("cuda", why="why")], "dense")


def test_dense_and_pruned_run_with_options_of_their_own(models, tunable) -> None:
    found = measure(
        models.pruned_onnx,
        models.dense_onnx,
        provider="cpu:a=1",
        dense_provider="cpu:a=0",
        rounds=5,
        memory=False,
        clock=iter(range(10**6)).__next__,
    )
    assert {(row.model, row.runtime) for row in found.rows} == {
        ("dense", "cpu:a=0"),
        ("again", "cpu:a=0"),
        ("pruned", "cpu:a=1"),
    }
    assert found.placements["dense, batch 1"].provider == "cpu:a=0"
    assert all(0 < placement.build_seconds < 600 for placement in found.placements.values())


@pytest.mark.slow
def test_the_whole_of_it(models, tunable) -> None:
    options = BenchOptions(provider="cpu", tune=True, rounds=5)
    found = workflow.time_files(models.pruned_onnx, models.dense_onnx, options)
    assert [each["provider"] for each in found.tuned] == combinations("cpu")
    assert found.provider in combinations("cpu")
    assert len(tables.tables(found)) == 3


def test_an_engine_is_kept_in_a_folder_of_its_files_own_and_timings_of_kernels_are_shared(tmp_path: Path) -> None:
    words = f"trt_engine_cache_enable=1,trt_engine_cache_path={tmp_path},trt_timing_cache_path={tmp_path}"
    wanted = known_provider(f"tensorrt:{words}")
    folders = []
    for name in ("one", "another"):
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], name, [], [])), tmp_path / name)
        given = of_file(wanted, 1, tmp_path / name)
        assert given["trt_timing_cache_path"] == str(tmp_path)
        folders.append(given["trt_engine_cache_path"])
    assert len({*folders, str(tmp_path)}) == 3
    assert all(Path(folder).parent == tmp_path for folder in folders)


def test_a_session_is_opened_with_that_folder(models, monkeypatch, tmp_path: Path) -> None:
    """A fake at the boundary: TensorRT is not there."""
    opened: list[Any] = []
    session = SimpleNamespace(get_providers=lambda: ["TensorrtExecutionProvider"])
    ort = providers.need("onnxruntime")
    monkeypatch.setattr(providers, "built_in", lambda wanted: list(wanted.names))
    monkeypatch.setattr(providers, "prepare", lambda wanted: None)
    monkeypatch.setattr(ort, "InferenceSession", lambda *a, providers, **k: opened.append(providers) or session)
    spec = f"tensorrt:trt_engine_cache_enable=1,trt_engine_cache_path={tmp_path}"
    assert providers.open_session(models.pruned_onnx, spec) is session
    ((name, given),) = opened[0]
    assert name == "TensorrtExecutionProvider"
    assert given["trt_engine_cache_path"].startswith(f"{tmp_path}/")
