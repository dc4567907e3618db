from __future__ import annotations

import os
import re

import onnxruntime
import pytest

from diffprune_plugin.errors import BadInput, HardwareUnproved
from diffprune_plugin.export import proofs as placement
from diffprune_plugin.export import providers
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.proofs import (
    Placement,
    Proof,
    assignment_proof,
    best_provider,
    binding_proof,
    device_proof,
    profile_proof,
    prove,
)
from diffprune_plugin.export.provider_table import PROVIDERS
from diffprune_plugin.export.providers import (
    check_distribution,
    check_dtype,
    known_provider,
    open_session,
    provider_options,
)

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PLUGIN = "CudaPluginExecutionProvider"


@pytest.fixture
def inputs(models):
    dims = fixed_dims(models.pruned_onnx, batch=1)
    return example_feeds(models.pruned_onnx, dims), dims


def test_the_cpu_is_proved_by_all_five(models, inputs):
    found, bound = prove(models.pruned_onnx, "cpu", *inputs)
    assert found.proved
    assert [proof.name for proof in found.proofs] == ["device", "session", "assignment", "profile", "binding"]
    bound.run()


def test_the_best_provider_without_a_gpu_is_the_cpu_and_says_why_no_better_one(models, inputs):
    found = best_provider(models.pruned_onnx, *inputs, "fp32")
    assert found.provider == "cpu"
    assert set(found.refused) == {"tensorrt", "cuda", "openvino"}
    assert re.search("was built with|no tensor can be put there", found.refused["cuda"]), "by either wheel"


def test_no_provider_of_the_cpu_wheel_computes_fp16(models, inputs):
    with pytest.raises(HardwareUnproved, match="cpu: computes fp16 in fp32"):
        best_provider(models.pruned_onnx, *inputs, "fp16")
    with pytest.raises(BadInput, match="no fp16 figure can come from it"):
        check_dtype("cpu", "fp16")


def test_cuda_on_the_cpu_wheel_is_refused_with_what_to_install(models, inputs):
    with pytest.raises(HardwareUnproved, match=r"cuda is not proved: device: .* pip install 'onnxruntime-gpu") as error:
        prove(models.pruned_onnx, "cuda", *inputs)
    assert error.value.exit_code == 3


def test_a_silent_cpu_session_is_caught_though_every_earlier_answer_lied(models, inputs, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(placement, "device_proof", lambda wanted: Proof("device", True, "a tensor was put on cuda"))
    with pytest.raises(
        HardwareUnproved, match=r"asked for CUDAExecutionProvider, the session has CPU.*silent fallback"
    ):
        open_session(models.pruned_onnx, "cuda")
    with pytest.raises(HardwareUnproved, match=r"cuda is not proved: session: .*silent fallback"):
        prove(models.pruned_onnx, "cuda", *inputs)


@pytest.mark.parametrize(
    ("provider", "trouble", "raised"),
    [
        ("cuda", "no kernel image is available for execution on the device", HardwareUnproved),
        ("cuda", "CUDA out of memory", HardwareUnproved),
        ("cpu", "Failed to allocate memory", RuntimeError),
    ],
)
def test_a_session_that_opens_and_does_not_run_proves_nothing(models, inputs, monkeypatch, provider, trouble, raised):
    """As on a GPU whose kernels were not built, or that others have filled; the CPU's memory is another matter."""

    def fails(*_: object) -> None:
        raise RuntimeError(trouble)

    session = open_session(models.pruned_onnx)
    monkeypatch.setattr(placement, "device_proof", lambda wanted: Proof("device", True, ""))
    monkeypatch.setattr(placement, "session_proof", lambda *_: (session, Proof("session", True, "")))
    monkeypatch.setattr(placement, "assignment_proof", lambda *_: Proof("assignment", True, ""))
    monkeypatch.setattr(placement, "Bound", fails)
    with pytest.raises(raised, match=trouble):
        prove(models.pruned_onnx, provider, *inputs)


def test_being_built_in_proves_nothing_where_no_tensor_can_be_put_there(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    proof = device_proof(known_provider("cuda"))
    assert not proof.held
    assert "no tensor can be put there" in proof.seen


def test_one_node_on_the_cpu_makes_it_partial():
    cuda = known_provider("cuda")
    proof = assignment_proof(cuda, [(CUDA, "Conv a"), (CPU, "Unique uniq"), (CUDA, "Add b")])
    assert not proof.held
    assert proof.seen.endswith("(PARTIAL: 1 elsewhere, e.g. Unique uniq)")
    assert assignment_proof(cuda, [(CUDA, "Conv a")]).held
    assert not assignment_proof(cuda, []).held


def kernel(provider: str, operator: str) -> dict[str, object]:
    return {"cat": "Node", "name": "n_kernel_time", "args": {"provider": provider, "op_name": operator}}


def test_a_profile_with_a_cpu_kernel_or_a_copy_is_no_proof():
    cuda = known_provider("cuda")
    assert profile_proof(cuda, [kernel(CUDA, "Conv")]).held
    assert not profile_proof(cuda, [kernel(CUDA, "Conv"), kernel(CPU, "Gather")]).held
    copied = profile_proof(cuda, [kernel(CUDA, "Conv"), kernel(CUDA, "MemcpyToHost")])
    assert not copied.held
    assert "1 copies between memories" in copied.seen
    assert not profile_proof(cuda, [{"cat": "Session", "name": "model_run"}]).held


class Played:
    """A session as a runtime with the plug-in would give it."""

    def get_providers(self) -> list[str]:
        return [PLUGIN, CPU]


def test_the_plug_in_is_the_same_provider_by_a_second_name(models, monkeypatch):
    """In the list of what is built in, in the session, in the assignment and in the profile."""
    cuda, asked = known_provider("cuda"), []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PLUGIN, CPU])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *_, providers, **__: asked.append(providers[0][0]) or Played()
    )
    assert "was built with" not in device_proof(cuda).seen
    open_session(models.pruned_onnx, "cuda", all_nodes=True)
    assert asked == [PLUGIN]
    assert assignment_proof(cuda, [(PLUGIN, "Conv a"), (CUDA, "Add b")]).held
    assert not assignment_proof(cuda, [(PLUGIN, "Conv a"), (CPU, "Add b")]).held
    assert profile_proof(cuda, [kernel(PLUGIN, "Conv")]).held


def test_a_provider_is_opened_with_what_its_row_says():
    assert provider_options(known_provider("openvino"), 2) == {"device_type": "CPU", "num_of_threads": "2"}
    assert provider_options(known_provider("cuda"), 2) == {"device_id": "0", "use_tf32": "0"}
    assert [(p.rounds, p.warm_up, p.is_gpu) for p in PROVIDERS.values()] == [(100, 10, True)] * 2 + [(30, 3, False)] * 2


def test_what_a_row_needs_is_set_and_loaded_before_the_provider(monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("libraries"), raising=False)
    monkeypatch.setattr(providers.importlib, "import_module", loaded.append)
    monkeypatch.setattr(providers, "need", lambda name: onnxruntime)
    providers.prepare(known_provider("cpu"))
    assert loaded == []
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    providers.prepare(known_provider("tensorrt"))
    assert loaded == ["libraries", "tensorrt"]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"


def test_outputs_left_in_main_memory_are_no_proof():
    assert binding_proof("cuda", {"cuda"}).held
    assert not binding_proof("cuda", {"cuda", "cpu"}).held


def test_four_proofs_are_not_five():
    assert not Placement("cuda", [Proof(name, True, "") for name in "abcd"]).proved


def test_two_distributions_are_an_error_that_says_how_to_mend_it():
    assert check_distribution(["onnxruntime", "numpy", "onnxruntime-extensions"]) == "onnxruntime"
    with pytest.raises(BadInput, match=r"2 onnxruntime distributions .* pip uninstall -y onnxruntime onnxruntime-gpu"):
        check_distribution(["onnxruntime_gpu", "onnxruntime"])


def test_an_unknown_provider_gets_the_nearest_known_one():
    with pytest.raises(BadInput, match="--provider 'cdua'; did you mean 'cuda'"):
        known_provider("cdua")
