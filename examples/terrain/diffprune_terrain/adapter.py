"""What pruning has to know about TerrainUNet, as a table."""

from diffusers import DDPMScheduler

from diffprune_plugin.adapters import Heads, ModelAdapter, Pairs, Port

SIGMA_MAX = 80
# Noise as strong as the model was trained for: sigma, which is sqrt(1 / alphas_cumprod - 1), goes to 82.
SCHEDULE = {"beta_end": 0.01742, "prediction_type": "sample"}
KEPT = DDPMScheduler(**SCHEDULE).alphas_cumprod


class TerrainAdapter(ModelAdapter):
    """Of a model that takes sample + sigma * noise, and sigma."""

    def tried_timesteps(self, config):
        """Sigmas; above 80 the norms only see noise of rounding."""
        return range(SIGMA_MAX + 1)

    def flat_inputs(self, *args, **named):
        """Examples as the package's generator gives them: noise, its sigma, a difficulty from 0 to 1."""
        inputs = super().flat_inputs(*args, **named)
        return {
            self.sample: SIGMA_MAX * inputs[self.sample],
            self.timestep: inputs[self.timestep] * 0 + SIGMA_MAX,
            "difficulty": inputs["difficulty"].sigmoid(),
        }

    def given(self, model, sample, timesteps, extra):
        """The inputs for a DDPM's noisy samples and its timesteps."""
        kept = KEPT.to(sample)[timesteps]
        noisy = sample / kept.sqrt()[:, None, None, None]
        return {self.sample: noisy, self.timestep: (1 / kept - 1).sqrt(), **extra}


TERRAIN_UNET = TerrainAdapter(
    model_class="TerrainUNet",
    module="diffprune_terrain",
    sample="noisy",
    timestep="sigma",
    inputs=(Port("noisy", "batch 1 height width"), Port("sigma", "batch"), Port("difficulty", "batch")),
    outputs=(Port("denoised", "batch 1 height width"),),
    keep=(),
    heads=(Heads("SelfAttention", "heads", ("query", "key", "value"), query="query"),),
    pairs=tuple(Pairs("Block", "embedding", 2 * parts, when=("parts", parts)) for parts in (1, 2, 3, 4)),
)
