"""Options of a provider: passed through, recorded, refused by name; a captured graph that answers with old values."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import pytest
import typer

from diffprune_plugin.errors import BadInput, HardwareUnproved
from diffprune_plugin.export import proofs
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.options import BenchOptions, Options
from diffprune_plugin.export.proofs import Bound, prove, replay_proof
from diffprune_plugin.export.provider_table import NO_TF32, PROVIDERS
from diffprune_plugin.export.providers import (
    known_provider,
    open_session,
    opened_with,
    prepare,
    provider_options,
    spec_of,
    without_replay,
)
from diffprune_plugin.export.verdict import command
from diffprune_plugin.utils.command_options import with_options


def test_options_are_passed_through_beside_the_providers_own() -> None:
    spec = BenchOptions(
        provider="cuda", provider_options=("cudnn_conv_algo_search=HEURISTIC",), nhwc=True
    ).asked_provider
    assert spec == "cuda:cudnn_conv_algo_search=HEURISTIC,prefer_nhwc=1"
    assert provider_options(known_provider(spec), 1) == {
        "device_id": "0",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "prefer_nhwc": "1",
    }
    assert PROVIDERS["cuda"].options == {"device_id": "0"}


def test_tf32_is_switched_off_for_files_without_halves_alone_since_it_takes_their_tensor_cores(tmp_path) -> None:
    for dtype, given in ((np.float32, {"use_tf32": "0"}), (np.float16, {})):
        weight = onnx.numpy_helper.from_array(np.ones(2, dtype), "w")
        value = onnx.helper.make_tensor_value_info("x", weight.data_type, [2])
        out = onnx.helper.make_tensor_value_info("y", weight.data_type, [2])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g", [value], [out], [weight])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
        assert opened_with(known_provider("cuda"), 1, tmp_path / "m.onnx") == {"device_id": "0", **given}
        asked = opened_with(known_provider("cuda:use_tf32=1"), 1, tmp_path / "m.onnx")
        assert asked == {"device_id": "0", "use_tf32": "1"}


def test_tf32_is_taken_on_both_sides_or_on_none() -> None:
    assert known_provider("cuda").environment == {"NVIDIA_TF32_OVERRIDE": "0"}
    assert known_provider("cuda:use_tf32=1").environment == {}
    assert known_provider("cuda:use_tf32=True").environment == {}


def test_tf32_that_the_process_has_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_TF32, "0")
    with pytest.raises(BadInput, match="use_tf32=1: NVIDIA_TF32_OVERRIDE=0 takes TF32 back"):
        prepare(known_provider("cuda:use_tf32=1"))


@pytest.mark.parametrize("said", ["1", "True", "true"])
def test_switches_are_said_in_the_providers_own_words(said: str) -> None:
    """TensorRT's binding refuses 0 and 1; however a switch is said, its graph is proved."""
    for name, words in (("tensorrt", ("False", "True")), ("cuda", ("0", "1"))):
        option = PROVIDERS[name].graph_option
        row = known_provider(f"{name}:{option}={said}")
        assert row.options[option] == words[1]
        assert row.replays
        assert known_provider(f"{name}:{option}=0").options[option] == words[0]
        assert not known_provider(f"{name}:{option}=False").replays
    assert known_provider("openvino:disable_dynamic_shapes=1").options["disable_dynamic_shapes"] == "true"


def test_tensorrt_is_told_of_halves_where_a_file_has_some() -> None:
    assert provider_options(known_provider("tensorrt"), 1, halves=True) == {"trt_fp16_enable": "True"}
    assert provider_options(known_provider("tensorrt"), 1) == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"provider": "cpu", "provider_options": ("prefer_nhwc=1",)}, "CPUExecutionProvider: it takes none"),
        ({"provider": "cuda", "provider_options": ("prefer_nhwcc=1",)}, "did you mean 'prefer_nhwc'"),
        ({"provider": "cuda", "provider_options": ("prefer_nhwc",)}, "give KEY=VALUE"),
        ({"provider": "cuda", "provider_options": ("prefer_nhwc=0",), "nhwc": True}, "given as 0 and as 1"),
        ({"provider": "cuda", "provider_options": ("device_id=1",)}, "device_id=1"),
        ({"provider": "cuda", "provider_options": ("use_tf32=yes",)}, r"use_tf32=yes: .*neither off \(0\) nor on"),
        (
            {"provider": "openvino", "cuda_graph": True},
            "--cuda-graph: openvino has no option for it",
        ),
        ({"provider": "tensorrt", "nhwc": True}, "--nhwc: tensorrt has no option for it; cuda has"),
        ({"nhwc": True}, "give --provider too"),
    ],
)
def test_what_a_provider_does_not_take_is_refused_by_name(options: dict, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        BenchOptions(**options).asked_provider  # noqa: B018


def test_a_graph_is_captured_for_the_timing_alone() -> None:
    spec = spec_of("cuda", ["prefer_nhwc=1"], cuda_graph=True)
    assert known_provider(spec).replays
    assert without_replay(spec) == "cuda:prefer_nhwc=1"
    assert not known_provider(without_replay(spec)).replays
    assert known_provider(spec_of("tensorrt", cuda_graph=True)).replays


@pytest.fixture
def opened(models):
    dims = fixed_dims(models.pruned_onnx, batch=1)
    feeds = example_feeds(models.pruned_onnx, dims)
    return [Bound(open_session(models.pruned_onnx, "cpu", free_dims=dims), feeds, "cpu") for _ in range(2)], feeds


class Stale(Bound):
    """As a graph that was captured with other addresses: it goes on with what it saw first."""

    def put(self, feeds) -> None:
        pass


def test_a_replay_that_reads_old_buffers_is_no_proof(opened) -> None:
    (bound, plain), feeds = opened
    first = bound.answer()
    assert replay_proof(bound, plain, feeds).held
    assert all(np.array_equal(a, b) for a, b in zip(first, bound.answer(), strict=True))
    bound.__class__ = Stale
    found = replay_proof(bound, plain, feeds)
    assert (found.held, found.name) == (False, "binding")
    assert "old values" in found.seen


def test_a_stale_replay_is_refused_before_anything_is_timed(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU plays a provider that captures graphs: its bound session is the stale one, the plain one is not."""
    dims = fixed_dims(models.pruned_onnx, batch=1)
    feeds = example_feeds(models.pruned_onnx, dims)
    monkeypatch.setattr(type(PROVIDERS["cpu"]), "replays", property(lambda self: True))
    assert prove(models.pruned_onnx, "cpu", feeds, dims)[0].proved
    made = iter((Stale, Bound))
    monkeypatch.setattr(proofs, "Bound", lambda *given: next(made)(*given))
    with pytest.raises(HardwareUnproved, match="binding: a replay answers other inputs with old values"):
        prove(models.pruned_onnx, "cpu", feeds, dims)


def test_the_command_in_a_verdict_gives_the_same_export_again() -> None:
    options = Options(
        provider="cuda",
        provider_options=("cudnn_conv_algo_search=HEURISTIC", "fuse_conv_bias=1"),
        cuda_graph=True,
        nhwc=True,
        batches=(1, 4),
        dtype="fp16",
        min_speedup=1.5,
        verify=False,
        plot=Path("latency.png"),
    )
    told = shlex.split(command(Path("pruned"), Path("m.onnx"), options))
    seen: dict = {}

    @with_options(Options)
    def export(output: Annotated[str, typer.Argument()], options: Options, model: str = "") -> None:
        seen.update(output=output, model=model, options=options)

    app = typer.Typer()
    app.command()(export)
    app(told[1:], standalone_mode=False)
    assert seen == {"output": "m.onnx", "model": "pruned", "options": replace(options, plot=None)}
