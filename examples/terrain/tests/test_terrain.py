"""The terrain example: its table, its reading of the published file, and what the file's own client makes of ours."""

import importlib.util

import numpy as np
import pytest
import torch
from torch.nn import functional

from diffprune_plugin.testing.adapters import check_adapter, check_enough

pytest.importorskip("diffprune_terrain")

from diffprune_terrain import TerrainUNet
from diffprune_terrain.adapter import KEPT, TERRAIN_UNET
from diffprune_terrain.unet import normed

published = pytest.mark.skipif(
    importlib.util.find_spec("terrain_diffusion") is None, reason="needs adaptive-terrain-diffusion"
)
TINY = {"sample_size": 8, "blocks": 1, "groups": 4, "head": 4}


def tiny(**config):
    torch.manual_seed(0)
    return TerrainUNet(**TINY | {"block_out_channels": (4, 8), "attention_levels": (1,)} | config).eval()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_norm_in_parts_is_a_group_norm_of_channels_in_another_order(parts):
    x, order = torch.randn(2, 8, 5, 5), torch.arange(8).reshape(-1, parts).T.flatten()
    expected = functional.group_norm(x, 8 // parts)[:, order]
    torch.testing.assert_close(normed(x[:, order], parts), expected)
    if parts > 1:  # the order matters
        assert not torch.allclose(normed(x, parts), functional.group_norm(x, 8 // parts), atol=0.1)


def test_the_table_holds_all_that_the_unet_needs():
    check_enough(TERRAIN_UNET, tiny())


@pytest.mark.slow
def test_the_table_holds_no_more_than_that():
    check_adapter(TERRAIN_UNET, tiny(), tiny(block_out_channels=(12, 16)))


def test_a_ddpms_noisy_samples_become_those_of_the_consistency_model():
    sample, noise, timestep = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8), torch.tensor([700])
    kept = KEPT[700]
    given = TERRAIN_UNET.given(None, kept.sqrt() * sample + (1 - kept).sqrt() * noise, timestep, {})
    torch.testing.assert_close(given["noisy"], sample + given["sigma"] * noise)
    assert (1 / KEPT[-1] - 1).sqrt().item() == pytest.approx(80, rel=0.03)


@pytest.fixture(scope="module")
def file():
    from diffprune_terrain.read import published

    return published()


@published
@pytest.mark.slow
def test_the_published_file_is_read_to_the_same_outputs(file):
    import onnxruntime
    from diffprune_terrain.read import read

    session, generator = onnxruntime.InferenceSession(file), np.random.default_rng(0)
    unet = read(file)
    for sigma in (80.0, 1.0, 0.05):
        noisy = sigma * generator.standard_normal((2, 1, 128, 128), dtype=np.float32)
        feeds = {"noisy": noisy, "sigma": np.full(2, sigma, np.float32), "difficulty": np.float32([0.1, 0.9])}
        (expected,) = session.run(None, feeds)
        with torch.no_grad():
            found = unet(**{name: torch.from_numpy(value) for name, value in feeds.items()}).sample
        assert np.abs(found.numpy() - expected).max() < 1e-5


@published
@pytest.mark.slow
def test_the_package_draws_with_the_exported_file_as_with_its_own(file, tmp_path):
    from diffprune_terrain.read import read
    from terrain_diffusion import TerrainGenerator

    from diffprune_plugin.export import to_onnx

    to_onnx(read(file), tmp_path / "model.onnx")
    drawn = [
        TerrainGenerator(path, device="cpu").generate(2, difficulty=50, seed=0)
        for path in (None, tmp_path / "model.onnx")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-3  # metres, of 22
