"""pruna: the algorithm ``diffprune``, for pipelines with a UNet that has an adapter.

Importing this file registers it; then ``smash(pipeline, SmashConfig({"diffprune": {"data": "train-images"}}))`` prunes;
criteria that need no gradients need no data. The smashed pipeline is saved by pruna as a diffusers directory, without a
pickle.
"""

from __future__ import annotations

from typing import Any

from ConfigSpace import CategoricalHyperparameter, UniformFloatHyperparameter
from pruna.algorithms.base.pruna_base import PrunaAlgorithmBase
from pruna.algorithms.base.registry import AlgorithmRegistry
from pruna.algorithms.base.tags import AlgorithmTag
from pruna.config.hyperparameters import UnconstrainedHyperparameter

from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.data.encoding import encode
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.planner import make_plan
from diffprune_plugin.plugins import criteria, denoiser_of, find_adapter, importance, plugin_manager
from diffprune_plugin.pruning.loading import model_of
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.sensitivity.linear import measure_sensitivity


class DiffPrune(PrunaAlgorithmBase):  # type: ignore[misc]
    """Remove channels of a pipeline's UNet; ``data`` (images) for criteria that calibrate."""

    algorithm_name = "diffprune"
    group_tags = (AlgorithmTag.PRUNER,)
    references = {"Paper": "https://arxiv.org/abs/2305.10924"}  # noqa: RUF012
    save_fn = None  # the pipeline's own
    tokenizer_required = processor_required = dataset_required = False
    runs_on = ("cpu", "cuda")

    def get_hyperparameters(self) -> list[Any]:
        """Criterion, ratio and data, as ConfigSpace has them."""
        return [
            CategoricalHyperparameter("importance", sorted(criteria(plugin_manager())), default_value="diff_taylor"),
            UniformFloatHyperparameter("pruning_ratio", 0.0, 0.99, default_value=0.3),
            UnconstrainedHyperparameter("data", default_value=None),
        ]

    def model_check_fn(self, model: Any) -> bool:
        """Whether this is a pipeline whose UNet has an adapter."""
        try:
            find_adapter(model_of(model))
        except BadInput:
            return False
        return True

    def _apply(self, model: Any, smash_config: Any) -> Any:
        denoiser, wanted = model_of(model), smash_config["importance"]
        criterion: Any = importance(wanted)
        sweep, by_outputs = getattr(criterion, "sweep", None), hasattr(criterion, "sensitivity")
        if sweep is not None or by_outputs:
            if smash_config["data"] is None:
                raise BadInput(f"diffprune_data is missing: {wanted} needs images; give a folder")
            given = denoiser, model.scheduler, encode(model, smash_config["data"])
            if sweep is not None:
                criterion.calibration = calibrate(*given, sweep, progress=False)
            if by_outputs:
                criterion.sensitivity = measure_sensitivity(*given, progress=False)
        ratio, description = smash_config["pruning_ratio"], {"name": wanted}
        remove_(denoiser, make_plan(denoiser, criterion, pruning_ratio=ratio, description=description))
        model.register_modules(**{denoiser_of(model)[0]: denoiser})  # its class is another now
        return model


AlgorithmRegistry.register_algorithm(DiffPrune())
