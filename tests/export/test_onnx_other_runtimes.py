"""The proofs in environments of their own: a GPU runtime without a GPU, and a second provider on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path

import onnxruntime
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def environment(folder: Path, *packages: str) -> Path:
    """The python of a fresh environment with these packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "onnx", *packages], check=True)
    return python


def outcome(python: Path, script: str, *arguments: str) -> dict[str, object]:
    """What a script prints as JSON, run with this checkout and nothing else of ours."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-c", PRELUDE + script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=python.parent)
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout.splitlines()[-1]))


PRELUDE = """
import json, sys
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper
from diffprune_plugin.errors import DiffPruneError
from diffprune_plugin.export import proofs as placement
from diffprune_plugin.export.feeds import example_feeds, fixed_dims

def caught(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except DiffPruneError as error:
        return [error.exit_code, str(error)]
    return [0, ""]

path = sys.argv[1]
dims = fixed_dims(path, batch=1)
feeds = example_feeds(path, dims)
found = {"providers": ort.get_available_providers(), "torch": "torch" in sys.modules}
"""

GPU = """
wanted = placement.PROVIDERS["cuda"]
found["device"] = [placement.device_proof(wanted).held, placement.device_proof(wanted).seen]
found["silent"] = caught(placement.open_session, path, "cuda")
found["strict"] = caught(placement.open_session, path, "cuda", all_nodes=True)
found["prove"] = caught(placement.prove, path, "cuda", feeds, dims)
placement.device_proof = lambda wanted: placement.Proof("device", True, "believed")
found["session"] = caught(placement.prove, path, "cuda", feeds, dims)
found["best"] = placement.best_provider(path, feeds, dims, "fp32").provider
print(json.dumps(found))
"""

OPENVINO = """
found["unet"] = placement.prove(path, "openvino", feeds, dims)[0].as_dict()
found["best"] = placement.best_provider(path, feeds, dims, "fp32").provider
outputs = [placement.open_session(path, name, free_dims=dims).run(None, feeds)[0] for name in ("openvino", "cpu")]
found["error"] = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [8])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])
nodes = [helper.make_node("Relu", ["x"], ["r"], "relu"), helper.make_node("Unique", ["r"], ["y"], "uniq")]
graph = helper.make_graph(nodes, "mixed", [x], [y])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "mixed.onnx")
found["mixed"] = caught(placement.prove, "mixed.onnx", "openvino", {"x": np.ones(8, np.float32)}, {})
print(json.dumps(found))
"""


def test_the_gpu_runtime_without_a_gpu_is_refused_at_every_layer(models, tmp_path):
    python = environment(tmp_path / "gpu", f"onnxruntime-gpu=={onnxruntime.__version__}")
    found = outcome(python, GPU, str(models.pruned_onnx))
    assert "CUDAExecutionProvider" in found["providers"], "the list says how it was built, and proves nothing"
    assert not found["torch"]
    assert found["device"][0] is False
    assert found["silent"][0] == 3
    assert "silent fallback" in found["silent"][1]
    assert found["strict"][0] == 3
    assert found["prove"][0] == 3
    assert "cuda is not proved: device" in found["prove"][1]
    assert "cuda is not proved: session" in found["session"][1]
    assert found["best"] == "cpu"

    both = [python, "-m", "pip", "install", "--quiet", f"onnxruntime=={onnxruntime.__version__}"]
    subprocess.run(both, check=True)
    script = "import json; print(json.dumps({'both': caught(placement.check_distribution)}))"
    code, message = outcome(python, script, str(models.pruned_onnx))["both"]
    assert code == 2
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in message


def test_openvino_on_the_cpu_is_proved_and_a_graph_it_takes_in_part_is_refused(models, tmp_path):
    python = environment(tmp_path / "openvino", "onnxruntime-openvino", "openvino")
    found = outcome(python, OPENVINO, str(models.pruned_onnx))
    assert "OpenVINOExecutionProvider" in found["providers"]
    assert found["unet"]["proved"] is True
    assert found["best"] == "openvino"
    assert found["error"] < 1e-5
    code, message = found["mixed"]
    assert code == 3
    assert "openvino is not proved: session" in message
    assert "PARTIAL: 1 elsewhere, e.g. Unique uniq" in message
