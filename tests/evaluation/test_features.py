"""Feature networks and the distances measured in their features."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from diffprune_plugin import demo
from diffprune_plugin.data.arrays import load_npz
from diffprune_plugin.errors import BadInput, CheckFailed, MissingExtra
from diffprune_plugin.evaluation.features import Features, frechet_distance, kernel_distance, load_features

CLASSIFIER = Path(__file__).parents[2] / "benchmarks" / "making" / "digits_classifier.onnx"


def write_network(
    path: Path, shape: tuple[Any, ...] = ("n", 1, "h", "w"), kind: int = TensorProto.FLOAT, op: str = "ReduceMean"
) -> Path:
    """The mean of each row of each image: (batch, channels, h, w) -> (batch, channels, h), flattened to two axes."""
    reduce = op == "ReduceMean"
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
        helper.make_node(op, ["x", "axis"] if reduce else ["x"], ["y"], **({"keepdims": 0} if reduce else {})),
        helper.make_node("Flatten" if reduce else "Identity", ["y"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "rows",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [helper.make_tensor("axis", TensorProto.INT64, [1], [3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def pixels(count: int = 6, channels: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(("kind", "scale"), [(TensorProto.FLOAT, 255), (TensorProto.UINT8, 1)])
def test_a_float_network_gets_pixels_up_to_1_and_an_integer_one_up_to_255(
    tmp_path: Path, kind: int, scale: int
) -> None:
    features = load_features(write_network(tmp_path / "rows.onnx", kind=kind))
    expected = pixels().double().mean(3)[:, 0] / scale
    torch.testing.assert_close(features.of(pixels(), batch_size=4), expected, rtol=1e-5, atol=1e-6)


def test_a_network_is_told_from_another_whose_weights_lie_beside_it(tmp_path: Path) -> None:
    found = []
    for number in range(2):
        weights = helper.make_tensor(
            "w", TensorProto.FLOAT, [64, 300], np.full(19200, number, np.float32).tobytes(), True
        )
        nodes = [helper.make_node("Flatten", ["image"], ["x"]), helper.make_node("MatMul", ["x", "w"], ["out"])]
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("image", ("n", 1, 8, 8)), ("out", None))
        ]
        graph = helper.make_graph(nodes, "one", ends[:1], ends[1:], [weights])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = tmp_path / str(number) / "net.onnx"
        path.parent.mkdir()
        onnx.save(model, path, save_as_external_data=True, location="net.onnx.data")
        found.append(load_features(path))
    assert (tmp_path / "0/net.onnx").read_bytes() == (tmp_path / "1/net.onnx").read_bytes()
    assert found[0].sha256 != found[1].sha256


def test_grey_images_become_rgb_for_a_network_of_three_channels(tmp_path: Path) -> None:
    features = load_features(write_network(tmp_path / "rows.onnx", ("n", 3, "h", "w"))).of(pixels(), 6)
    assert torch.equal(features[:, :8], features[:, 16:])


def test_only_inceptions_features_are_called_fid(tmp_path: Path) -> None:
    for name in ("rows", "FID", "inception"):
        features = load_features(write_network(tmp_path / f"{name}.onnx"))
        assert (features.frechet, features.kernel) == (f"FD ({name})", f"KD ({name})")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 1, "h", "w"), "leave the batch open"),
        (("n", 1, 16, 16), "takes .* the images are"),
        (("n", 4, "h", "w"), "takes .* the images are"),
    ],
)
def test_a_network_that_does_not_take_the_images_is_one_line(tmp_path: Path, shape: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        load_features(write_network(tmp_path / "rows.onnx", shape)).of(pixels(), 6)


def test_an_input_of_another_type_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not one uint8 or float32"):
        load_features(write_network(tmp_path / "rows.onnx", kind=TensorProto.DOUBLE))


def test_an_output_that_is_not_one_row_an_image_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"6 images give an output \(6, 1, 8, 8\)"):
        load_features(write_network(tmp_path / "rows.onnx", op="Relu")).of(pixels(), 6)


def test_features_that_are_not_finite_fail_the_check() -> None:
    broken = Features("FD (x)", "KD (x)", "", torch.nn.Sequential(torch.nn.Flatten(), Divide()))
    with pytest.raises(CheckFailed, match="not finite"):
        broken.of(pixels(), 6)


class Divide(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() / 0


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.pt2", "net.pkl", "net"])
def test_a_file_that_may_hold_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(BadInput, match="never opened"):
        load_features(tmp_path / name)


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_features(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="no ONNX file that can run"):
        load_features(tmp_path / "bad.onnx")


def test_inception_without_torch_fidelity_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(MissingExtra, match=r"diffprune-plugin\[fid\]"):
        load_features(tmp_path / "w.safetensors")


def gaussian(count: int, shift: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1 + shift, (count, 3)))


def test_the_frechet_distance_is_the_equation() -> None:
    real, drawn = gaussian(50, 0.0, 0), gaussian(40, 0.5, 1)
    a, b = np.cov(real.T), np.cov(drawn.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    by_hand = ((real.mean(0) - drawn.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * cross
    assert frechet_distance(real, drawn) == pytest.approx(float(by_hand), rel=1e-6)


def test_the_kernel_distance_is_the_unbiased_equation_averaged_over_subsets() -> None:
    real, drawn = gaussian(60, 0.0, 0), gaussian(60, 0.5, 1)
    total = 0.0
    for i in range(60):
        for j in range(60):
            same = (real[i] @ real[j] / 3 + 1) ** 3 + (drawn[i] @ drawn[j] / 3 + 1) ** 3
            total += float(same) / (60 * 59) if i != j else 0.0
            total -= 2 * float((real[i] @ drawn[j] / 3 + 1) ** 3) / 60**2
    mean, deviation = kernel_distance(real, drawn, seed=0)
    assert abs(mean - total) < 4 * deviation / 10, "100 subsets: ten times less than one subset's deviation"
    assert kernel_distance(real, drawn, seed=0) == (mean, deviation)
    assert abs(kernel_distance(real, gaussian(60, 0.0, 2), seed=0)[0]) < mean / 4


def test_of_fewer_than_fifty_images_there_is_no_kernel_distance() -> None:
    fifty = gaussian(50, 0.0, 0)
    assert kernel_distance(fifty, fifty, seed=0)[1] > 0
    for real, drawn in ((fifty, fifty[1:]), (fifty[1:], fifty)):
        with pytest.raises(BadInput, match="49 images in a set; it needs at least 50"):
            kernel_distance(real, drawn, seed=0)


def test_from_fifty_images_on_mirrored_digits_are_farther_than_chance_puts_digits() -> None:
    """Where the 50 comes from: over 20 draws, what mirroring does is about three times the spread of chance."""
    digits = load_npz(demo.HELD_OUT_IMAGES).values.permute(0, 3, 1, 2)
    network = load_features(CLASSIFIER)
    upright, mirrored = network.of(digits, 100), network.of(digits.flip(3), 100)
    chance, difference = [], []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(digits))
        one, other = order[:50], order[50:100]
        chance.append(kernel_distance(upright[one], upright[other], seed)[0])
        difference.append(kernel_distance(upright[one], mirrored[other], seed)[0])
    assert 2 < np.mean(difference) / np.std(chance) < 5
    assert abs(np.mean(chance)) < np.std(chance) / 2, "unbiased"


def test_inceptions_own_weights_make_it_fid(tmp_path: Path) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    features = load_features(tmp_path / "weights.safetensors")
    assert (features.frechet, features.kernel) == ("FID", "KID")
    assert features.of(pixels(2), 2).shape == (2, 2048)
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="not the weights of FID's Inception"):
        load_features(tmp_path / "other.safetensors")
