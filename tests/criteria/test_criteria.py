"""Each criterion against a hand-written loop on a network small enough to follow."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from diffusers import DDPMScheduler
from tiny import make_unet
from torch import Tensor, nn

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.calibration.timesteps import above_threshold
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.graph.groups import trace_groups


class TwoLayers(nn.Module):
    """Two inputs, three hidden channels, one output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.first.weight.data = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 5.0]])
        self.second.weight.data = torch.tensor([[1.0, -1.0, 2.0]])
        self.first.weight.grad = torch.tensor([[1.0, 1.0], [0.5, 0.5], [2.0, -1.0]])
        self.second.weight.grad = torch.tensor([[2.0, 3.0, 0.0]])

    def forward(self, sample: Tensor) -> Tensor:
        return self.second(self.first(sample))


def hidden_group(network: nn.Module):
    graph = tp.DependencyGraph().build_dependency(network, torch.randn(1, 2))
    return graph.get_pruning_group(network.first, tp.prune_linear_out_channels, [0, 1, 2])


def test_the_taylor_score_is_the_sum_of_absolute_weight_times_gradient_over_coupled_weights() -> None:
    score = dp.importance("diff_taylor", normalizer=None)(hidden_group(TwoLayers()))
    assert score.tolist() == [3.0 + 2.0, 3.5 + 3.0, 5.0 + 0.0]


def test_the_squared_score_squares_each_product_before_the_sum() -> None:
    score = dp.importance("diff_taylor", preset="ddpm_exp", normalizer=None)(hidden_group(TwoLayers()))
    assert score.tolist() == [1 + 4 + 4, 2.25 + 4 + 9, 0 + 25 + 0]


def test_magnitude_ranks_the_larger_filter_higher() -> None:
    assert dp.importance("magnitude")(hidden_group(TwoLayers())).argsort().tolist() == [0, 1, 2]


def test_random_depends_on_the_seed_and_the_layer_only() -> None:
    group = hidden_group(TwoLayers())
    assert dp.importance("random", seed=1)(group).tolist() == dp.importance("random", seed=1)(group).tolist()
    assert dp.importance("random", seed=1)(group).tolist() != dp.importance("random", seed=2)(group).tolist()


def oracle_gradients(unet, scheduler, samples, draws_of, preset: str, threshold: float) -> dict[str, Tensor]:
    """The authors' loop, written out: one timestep a pass, stop below threshold times the largest loss so far."""
    unet.zero_grad()
    largest, stopped = 0.0, False
    for t in range(scheduler.config.num_train_timesteps):
        rows, noise = draws_of(t)
        clean = samples.sample(rows)
        timesteps = torch.full((len(rows),), t)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        loss = nn.functional.mse_loss(unet(noisy, timesteps).sample, noise)
        largest = max(largest, loss.item())
        stopped = loss.item() < threshold * largest
        if stopped and preset != "diffusers":
            break
        loss.backward()
        if stopped:
            break
    return {name: p.grad.clone() for name, p in unet.named_parameters()}


def falling_loss(unet):
    """Add an error to the prediction that shrinks from timestep to timestep."""

    def add_error(module, args, inputs, output):
        timesteps = args[1] if args else inputs["timestep"]
        error = 3 * 0.8 ** timesteps.view(-1, 1, 1, 1)
        return (output[0] + error,) if isinstance(output, tuple) else type(output)(output.sample + error)

    unet.register_forward_hook(add_error, with_kwargs=True)
    return unet


def oracle_score(group, gradients: dict[str, Tensor], weights: dict[str, Tensor], power: int) -> list[float]:
    """For each root channel, the sum over every coupled weight of |w g| ** power."""
    score = [0.0] * group.channels
    for member in group.members:
        name = f"{member.layer}.weight"
        if weights[name].ndim < 2:
            continue
        product = (weights[name] * gradients[name]).abs() ** power
        for channel, root in zip(member.channels, member.roots, strict=True):
            score[root] += (product[channel] if member.side == "out" else product[:, channel]).sum().item()
    return score


@pytest.mark.parametrize(("preset", "power"), [("ddpm_exp", 2), ("diffusers", 1), ("ldm", 1), ("paper", 1)])
def test_each_preset_equals_the_hand_written_loop(preset, power, images) -> None:
    """With the reference sampling, on a UNet whose loss falls with the timestep as a trained one's does."""
    unet, scheduler, samples = falling_loss(make_unet()), DDPMScheduler(num_train_timesteps=12), load_samples(images)
    batch, threshold = 4, 0.3
    options = {"threshold": threshold, "normalizer": None}
    if preset == "paper":
        options["sampling"] = "reference"
    criterion = dp.importance("diff_taylor", preset=preset, **options)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    add_noise = scheduler.add_noise
    scheduler.add_noise = lambda clean, noise, t: seen.append((clean, noise, t)) or add_noise(clean, noise, t)
    criterion.calibration = dp.calibrate(unet, scheduler, images, criterion.sweep, batch_size=batch, progress=False)
    scheduler.add_noise = add_noise
    assert 2 < len(seen) < 12, "the sweep has to end in between, or the presets could not be told apart"

    def draws_of(t: int) -> tuple[Tensor, Tensor]:
        clean, noise, timesteps = seen[min(t, len(seen) - 1)]
        assert t >= len(seen) or timesteps.tolist() == [t] * batch
        everything = samples.sample(torch.arange(len(samples)))
        rows = torch.stack([(everything == c).flatten(1).all(1).nonzero()[0, 0] for c in clean])
        return rows, noise

    gradients = oracle_gradients(unet, scheduler, samples, draws_of, preset, threshold)
    weights = {name: p.detach() for name, p in unet.named_parameters()}
    same_noise = torch.equal(seen[0][1], seen[1][1])
    assert same_noise == (preset != "ldm"), "one noise for all timesteps, except in the latent model's loop"
    for group in trace_groups(unet, UNET_2D):
        expected = torch.tensor(oracle_score(group, gradients, weights, power))
        torch.testing.assert_close(criterion(group.graph_group), expected, rtol=0, atol=1e-6 * expected.max().item())


def test_the_default_sampling_sums_the_gradients_of_its_stratified_samples(images, scheduler) -> None:
    """Every sample that went backward, again, one at a time: same sum."""
    unet, samples = make_unet(), load_samples(images)
    criterion = dp.importance("diff_taylor", samples=6, curve_samples=2)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    add_noise = scheduler.add_noise
    scheduler.add_noise = lambda *a: (seen.append(a) if torch.is_grad_enabled() else None) or add_noise(*a)
    calibration = dp.calibrate(unet, scheduler, images, criterion.sweep, batch_size=4, timesteps=5, progress=False)
    scheduler.add_noise = add_noise
    kept = int(above_threshold(calibration.loss, 0.05).sum()) * 20
    unet.zero_grad()
    for clean, noise, timesteps in seen:
        for i in range(len(clean)):
            row = slice(i, i + 1)
            loss = noise_prediction_loss(unet, scheduler, clean[row], noise[row], timesteps[row], {})
            (loss.sum() * kept / 6).backward()
    assert sum(len(clean) for clean, _, _ in seen) == calibration.backward == 6
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(calibration.gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert len(samples) == 16


def test_the_presets_differ_where_the_authors_code_does() -> None:
    criteria = {name: dp.importance("diff_taylor", preset=name) for name in ("paper", "ddpm_exp", "diffusers", "ldm")}
    rows = {n: (c.sweep.sampling, c.sweep.threshold, c.sweep.include_last, c.round_to) for n, c in criteria.items()}
    assert rows == {
        "paper": ("stratified", 0.05, False, None),
        "ddpm_exp": ("reference", 0.05, False, None),
        "diffusers": ("reference", 0.05, True, None),
        "ldm": ("fresh", 0.1, False, 2),
    }


def test_taylor_keeps_all_timesteps_and_takes_no_threshold() -> None:
    assert dp.importance("taylor").sweep.threshold == 0
    with pytest.raises(BadInput, match="takes no threshold"):
        dp.importance("taylor", threshold=0.1)


@pytest.mark.parametrize("name", ["diff-pruning", "ours"])
def test_the_alias_names_are_the_same_criterion(name: str) -> None:
    assert dp.importance(name).sweep == dp.importance("diff_taylor").sweep


def test_norms_count_only_if_asked_for(unet, scheduler, images) -> None:
    calibration = dp.calibrate(unet, scheduler, images, Sweep(samples=8), timesteps=2, progress=False)
    group = next(g for g in trace_groups(unet, UNET_2D) if g.root == "mid_block.resnets.0.conv1")
    without, with_norms = (
        dp.importance("diff_taylor", norms=norms, normalizer=None, calibration=calibration)(group.graph_group)
        for norms in (False, True)
    )
    norm = unet.mid_block.resnets[0].norm2
    gradients = (calibration.gradients[f"mid_block.resnets.0.norm2.{key}"] for key in ("weight", "bias"))
    extra = sum((p.detach() * g).abs() for p, g in zip(norm.parameters(), gradients, strict=True))
    torch.testing.assert_close(with_norms - without, extra, rtol=1e-3, atol=1e-5)


def test_a_score_without_gradients_names_the_layer_and_the_remedy(unet) -> None:
    with pytest.raises(MissingGradients, match=r"weight has no gradient; pass importance\(\.\.\., calibration="):
        dp.make_plan(unet, "diff_taylor")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"threshold": 1.5}, "outside"),
        ({"thresold": 0.1}, "did you mean 'threshold'"),
        ({"sampling": "stratify"}, "did you mean 'stratified'"),
        ({"power": 3}, "neither 1"),
        ({"samples": 0}, r"outside \[1, "),
        ({"samples": 1.5}, "samples 1.5 is no int"),
        ({"threshold": "x"}, "threshold 'x' is no float"),
        ({"norms": "no"}, "norms 'no' is no bool"),
        ({"power": True}, "power True is no int"),
        ({"round_to": 0}, r"outside \[1, "),
        ({"preset": [1]}, "is none of paper"),
        ({"normalizer": "max"}, "neither 'mean'"),
        ({"micro_batch": 1}, "micro_batch 1 is for stratified sampling of absolute values or squares, and changes not"),
        ({"include_last": True}, "include_last True is for the authors' loop, and changes nothing here; leave it out"),
        ({"preset": "ddpm_exp", "samples": 128}, "samples 128 is for stratified sampling"),
        ({"sampling": "fresh", "curve_samples": 4}, "curve_samples 4 is for stratified sampling"),
    ],
)
def test_a_wrong_option_is_one_clear_line(options, words) -> None:
    with pytest.raises(BadInput, match=words):
        dp.importance("diff_taylor", **options)


def test_what_changes_nothing_is_refused_of_the_caller_alone() -> None:
    assert dp.importance("diff_taylor", preset="diffusers", sampling="stratified").sweep.sampling == "stratified"
    assert dp.importance("diff_taylor", micro_batch=8, include_last=False).sweep.micro_batch == 8
    assert dp.importance("fisher", sampling="reference").sweep.accumulate == "square"
    with pytest.raises(BadInput, match="samples 4 is for stratified sampling"):
        dp.importance("fisher", sampling="reference", samples=4)
