from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from diffusers import UNet2DModel
from PIL import Image
from rich.console import Console

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export import benchmark, measure, tables, to_onnx
from diffprune_plugin.export.benchmark import (
    EAGER,
    NOISE,
    Latency,
    Ratio,
    Row,
    check_comparable,
    check_gates,
    gate,
    interleaved,
    interval,
    ratios,
    settled,
    warmed,
)
from diffprune_plugin.export.feeds import fixed_dims
from diffprune_plugin.export.memory import peak_memory


@pytest.fixture(scope="module")
def latency(models) -> Latency:
    return measure(models.pruned_onnx, models.dense_onnx, batches=(1, 2), rounds=8)


def test_every_batch_has_rows_a_ratio_and_a_noise_floor(latency):
    assert latency.provider == "cpu"
    assert [(row.model, row.batch) for row in latency.rows] == [
        (model, batch) for batch in (1, 2) for model in ("dense", "pruned", "again")
    ]
    assert [ratio.name for ratio in latency.ratios] == ["dense / pruned", "A/A: the same model twice"] * 2
    assert len(latency.placements) == 6
    assert all(placement.proved for placement in latency.placements.values())
    assert all(row.memory and row.memory > 1e6 for row in latency.rows if row.model != "again")


def test_the_peak_holds_the_weights_of_a_file_at_least(tmp_path):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(64, 128),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    to_onnx(unet, tmp_path / "m.onnx")
    bytes_of_weights = 4 * sum(parameter.numel() for parameter in unet.parameters())
    dims = fixed_dims(tmp_path / "m.onnx", batch=1)
    assert bytes_of_weights > 5e6
    assert bytes_of_weights < (peak_memory(tmp_path / "m.onnx", "cpu", dims, 1) or 0) < 10 * bytes_of_weights


def test_the_macs_ratio_is_that_of_the_plan(latency, models):
    plan = json.loads((models.pruned / "unet" / "pruning_plan.json").read_text())
    assert latency.ratios[0].macs_ratio == pytest.approx(plan["macs"][0] / plan["macs"][1])
    assert latency.ratios[0].realised == pytest.approx(latency.ratios[0].median / latency.ratios[0].macs_ratio)


def test_the_report_is_json_markdown_and_a_plot(latency, tmp_path):
    content = json.loads(json.dumps(latency.as_dict()))
    assert (content["threads"], content["spinning"]) == (1, False)
    text = tables.markdown(latency)
    assert "| dense / pruned | 1 |" in text
    assert "1 thread, spinning off" in text
    assert "round_to would leave 32" in text
    tables.plot(latency, tmp_path / "latency.png")
    assert Image.open(tmp_path / "latency.png").width > 500
    assert [table.row_count for table in tables.tables(latency)] == [6, 4]


def test_on_a_terminal_of_80_columns_every_name_and_number_is_whole():
    """With PyTorch beside it, long names, and numbers of any size."""
    times = ((0.12345, 0.2, 0.3), (98765.4, 98765.4, 99999.9), (1234.5, 1999.9, 1999.9), (12.345, 23.456, 99.999))
    named = [("openvino", "the first again"), (EAGER, "pruned"), ("tensorrt", "dense"), (EAGER, "dense")]
    models = ["again", "pruned", "dense", "dense"]
    rows = [
        Row(runtime, model, 128, 4000, *p, p[0], 10, 98765000000)
        for (runtime, _), model, p in zip(named, models, times, strict=True)
    ]
    names = ("dense / pruned", "eager dense / eager pruned", "eager pruned / pruned", NOISE)
    ratios = [Ratio(name, 128, 12.345, 10.234, 99.876, 2.3456) for name in names]
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    for table in tables.tables(Latency("tensorrt", "fp32", 1, 30, rows, ratios)):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in console.file.getvalue(), "cut"
    for words in (
        ["openvino", "the first again", "128", "0.123", "0.200", "0.300", "4000 (noisy)", "98765"],
        [EAGER, "pruned", "98765", "100000"],
        ["tensorrt", "dense", "1234", "2000"],
        [EAGER, "dense", "12.35", "23.46", "100.00"],
        *([name, "128", "12.35x", "[10.23, 99.88]", "2.346", "526%"] for name in names),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_a_win_is_claimed_only_where_the_interval_lies_above_1_and_above_the_noise():
    assert Ratio("a", 1, 1.2, 1.1, 1.3).win
    assert not Ratio("a", 1, 1.2, 0.9, 1.3).win
    assert not Ratio("a", 1, 1.2, 1.1, 1.3, floor=1.15).win


def test_the_interval_holds_the_median_of_the_per_round_ratios():
    slow = [2.0, 4.0, 2.2, 40.0, 2.0]
    fast = [1.0, 2.0, 1.0, 20.0, 1.0]
    median, low, high = interval([(slow, fast)])
    assert median == 2.0
    assert (low, high) == (2.0, 2.2)


def test_the_interval_knows_how_far_two_openings_of_the_same_sessions_differ():
    rounds = [1.0] * 20
    pairs = [([2.0] * 20, rounds), ([2.1] * 20, rounds), ([2.2] * 20, rounds)]
    assert interval(pairs) == pytest.approx((2.1, 2.0, 2.2))
    assert interval(pairs[1:2]) == pytest.approx((2.1, 2.1, 2.1)), "the rounds of one alone do not"


def test_noise_of_the_same_model_twice_is_the_floor_of_every_claim():
    times = {"dense": [2.0] * 5, "pruned": [1.0] * 5, "again": [1.6] * 5}
    found = ratios([times], 1, 4.0)
    assert [r.floor for r in found] == [1.25, 1.0]
    assert found[0].realised == 0.5


def test_every_round_has_every_model_in_shuffled_order():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times, warm_ups = interleaved(runs, 6, 6, None, 3)
    assert [len(rounds) for rounds in times.values()] == [6, 6, 6]
    repeats = len(times["a"][0])
    measured = calls[sum(warm_ups.values()) :]
    rounds = [measured[i : i + 3 * repeats : repeats] for i in range(0, len(measured), 3 * repeats)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_rounds_go_on_while_the_interval_is_wide_and_end_with_the_budget(monkeypatch):
    runs = dict.fromkeys(("dense", "pruned", "again"), lambda: None)
    monkeypatch.setattr(benchmark, "settled", lambda times: len(times["dense"]) >= 20)
    assert len(interleaved(runs, 10, 40, None, 3)[0]["dense"]) == 20
    monkeypatch.setattr(benchmark, "settled", lambda times: False)
    assert len(interleaved(runs, 10, 40, None, 3)[0]["dense"]) == 40
    assert len(interleaved(runs, 30, 40, 1e-9, 3)[0]["dense"]) == 10


def test_an_interval_within_one_percent_is_settled():
    assert settled({"dense": [[2.0]] * 9, "pruned": [[1.0]] * 9})
    assert not settled({"dense": [[2.0]] * 9, "pruned": [[1.0], [2.0], [3.0]] * 3})


def test_warming_up_goes_on_until_three_runs_agree(monkeypatch):
    seconds = iter([9.0, 5.0, 2.0, 1.02, 1.01, 1.0])
    monkeypatch.setattr(benchmark, "timed", lambda run, clock: next(seconds))
    assert len(warmed(lambda: None, 3)) == 6


def result(p50: float, low: float) -> Latency:
    row = Row("cpu", "pruned", 1, 30, p50, p50, p50, p50, 3)
    return Latency("cpu", "fp32", 1, 30, [row], [Ratio("dense / pruned", 1, 1.5, low, 1.6)])


def test_the_gates_fail_on_a_slow_median_and_on_a_low_end_below_the_speed_up():
    gate(result(9.0, 1.4), max_latency_ms=10, min_speedup=1.3)
    with pytest.raises(CheckFailed, match=r"--max-latency-ms 8: batch 1 takes 9.00 ms"):
        gate(result(9.0, 1.4), max_latency_ms=8)
    with pytest.raises(CheckFailed, match=r"--min-speedup 1.45: batch 1 is 1.50x \[1.40, 1.60\]"):
        gate(result(9.0, 1.4), min_speedup=1.45)
    with pytest.raises(BadInput, match="--min-speedup needs the dense model"):
        gate(Latency("cpu", "fp32", 1, 30), min_speedup=1.1)


@pytest.mark.parametrize("options", [{"batches": (0,)}, {"batches": ()}, {"threads": 0}, {"rounds": 1}])
def test_impossible_sizes_are_refused(models, options):
    with pytest.raises(BadInput, match="at least 1"):
        measure(models.pruned_onnx, **options)


def test_files_of_two_dtypes_have_no_ratio(models, mixed_onnx):
    with pytest.raises(BadInput, match=r"dtype differ: .*dense.onnx has fp32, .*mixed.onnx has fp16"):
        measure(mixed_onnx, models.dense_onnx)


def test_a_file_with_fused_operators_and_one_without_have_no_ratio():
    files = {"dense": Path("d.onnx"), "pruned": Path("p.onnx")}
    alike = {"dtype": "fp32", "opset": "20", "axes": "1"}
    assert check_comparable(files, {"dense": {**alike, "fused": "{}"}, "pruned": {**alike, "fused": "{}"}}) == "fp32"
    with pytest.raises(BadInput, match=r"--fuse: p\.onnx alone has fused operators"):
        check_comparable(files, {"dense": alike, "pruned": {**alike, "fused": "{}"}})


def test_files_of_two_opsets_have_no_ratio(models, tmp_path):
    to_onnx(models.dense, tmp_path / "old.onnx", opset=18)
    with pytest.raises(BadInput, match=r"opset differ: .*old.onnx has 18, .*pruned.onnx has 20"):
        measure(models.pruned_onnx, tmp_path / "old.onnx")


def test_pytorch_is_timed_on_the_device_of_the_provider(models):
    elsewhere = dp.load(models.pruned).to("meta")
    with pytest.raises(BadInput, match="eager pruned is on meta, cpu computes on cpu: not comparable"):
        measure(models.pruned_onnx, eager={"pruned": elsewhere})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_gate_that_all_or_none_would_pass_is_refused(value):
    for gates in ((value, None), (None, value)):
        with pytest.raises(BadInput, match="give a number above 0"):
            check_gates(*gates)


def test_an_fp16_file_gets_no_figure_from_the_cpu(mixed_onnx):
    with pytest.raises(BadInput, match="no fp16 figure can come from it"):
        measure(mixed_onnx, provider="cpu")
