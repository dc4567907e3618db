"""Names of before, until nobody asks for them here."""

from diffprune_plugin.pruning.directory import (
    COMPENSATION_FILE,
    CONFIG_FILE,
    WEIGHTS,
    component_in,
    model_folder,
    progress_directory,
    read_json,
    read_plan,
)
from diffprune_plugin.pruning.loading import getattr_or_bad, load, load_model, load_pipeline, model_of
from diffprune_plugin.pruning.pruned_class import (
    PREFIX,
    PrunedModelMixin,
    as_pruned_,
    check_architecture,
    model_class_named,
    one_device,
    pruned_class,
    pruned_class_named,
    read_pruned,
    read_weights,
    resize_,
)
from diffprune_plugin.pruning.saving import files_below, save

# ruff: noqa: F401
