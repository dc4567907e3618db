"""Writes nncf.json beside it: what NNCF 2.14.1, the last kind that had filter pruning, does with the values below.

Run in an environment of its own, since this project uses NNCF 3:

    python -m venv old && old/bin/pip install nncf==2.14.1 torch==2.13.0 diffusers==0.42.1
    old/bin/python tests/golden/make_nncf.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import torch
from diffusers import UNet2DModel
from nncf import NNCFConfig
from nncf.common.pruning.schedulers import PRUNING_SCHEDULERS
from nncf.common.pruning.utils import get_rounded_pruned_element_number
from nncf.config.schemata import defaults
from nncf.torch import create_compressed_model
from nncf.torch.pruning.filter_pruning.functions import FILTER_IMPORTANCE_FUNCTIONS

warnings.simplefilter("ignore")  # SciPy's, where the solver of exponential_with_bias gives up

SCHEDULES = [  # schedule, pruning_init, pruning_target, pruning_steps, num_init_steps
    *(("baseline", *values) for values in ((0.0, 0.5, 1, 0), (0.3, 0.3, 100, 0), (0.1, 0.6, 5, 2))),
    *(
        ("exponential", *values)
        for values in ((0.0, 0.5, 100, 0), (0.1, 0.6, 5, 0), (0.1, 0.6, 5, 2), (0.2, 0.4, 1, 0))
    ),
    *(("exponential_with_bias", *values) for values in ((0.1, 0.6, 5, 0), (0.1, 0.6, 5, 2), (0.3, 0.5, 10, 0))),
    *(("exponential_with_bias", *values) for values in ((0.0, 0.5, 20, 0), (0.0, 0.5, 50, 0), (0.0, 0.5, 100, 0))),
]


def schedule(name: str, init: float, target: float, steps: int, warmup: int) -> dict[str, Any]:
    """The level that the real scheduler sets at each epoch."""
    levels: list[float] = []
    controller = SimpleNamespace(
        pruning_init=init, prune_flops=False, set_pruning_level=levels.append, freeze=lambda: None
    )
    params = {"pruning_target": target, "pruning_steps": steps, "num_init_steps": warmup}
    scheduler = PRUNING_SCHEDULERS.get(name)(controller, params)
    for _ in range(warmup + steps + 2):
        scheduler.epoch_step()
    return {"schedule": name, "pruning_init": init, **params, "levels": [float(level) for level in levels]}


ENTRIES: list[dict[str, Any]] = [  # is each, beside "algorithm", valid?
    {},
    {"pruning_init": 0.1, "params": {"schedule": "baseline", "pruning_target": 0.3, "filter_importance": "L1"}},
    {"ignored_scopes": "{re}conv.*", "target_scopes": ["a", "b"], "validate_scopes": False},
    {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 0}}},
    {"params": {"interlayer_ranking_type": "learned_ranking", "legr_params": {"generations": 4}}},
    {"params": {"pruning_target": 0.5, "pruning_flops_target": 0.5}},
    {"params": {"filter_importance": "L3"}},
    {"params": {"filter_importance": 2}},
    {"params": {"schedule": "multistep"}},
    {"params": {"pruning_target": "half"}},
    {"params": {"prune_first_conv": "yes"}},
    {"params": {"prunning_target": 0.5}},
    {"params": [0.5]},
    {"pruning_initial": 0.1},
    {"ignored_scopes": 3},
]


def valid(entry: dict[str, Any]) -> bool:
    """Whether NNCF's schema takes this entry of ``compression``."""
    content = {"input_info": {"sample_size": [1, 1, 16, 16]}, "compression": {"algorithm": "filter_pruning", **entry}}
    try:
        NNCFConfig.from_dict(content)
    except jsonschema.ValidationError:
        return False
    return True


def importance() -> dict[str, Any]:
    """Scores of the filters of one convolution by each of NNCF's functions."""
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 3, 3).mul(100).round()
    scores = {name: function(weight).tolist() for name, function in FILTER_IMPORTANCE_FUNCTIONS.items()}
    return {"weight": weight.tolist(), "scores": scores}


def node_names() -> list[str]:
    """NNCF's names of the convolutions and linear layers of a tiny UNet (the one in tests/tiny.py)."""
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    inputs = [{"sample_size": [1, 1, 16, 16], "keyword": "sample"}]
    inputs += [{"sample_size": [1], "type": "long", "keyword": "timestep"}]
    config = NNCFConfig.from_dict({"input_info": inputs, "compression": {"algorithm": "filter_pruning"}})
    _, model = create_compressed_model(unet.eval(), config, dump_graphs=False)
    nodes = model.nncf.get_original_graph().get_all_nodes()
    return sorted(node.node_name for node in nodes if node.node_type in ("conv2d", "linear"))


def main() -> None:
    rounding = [
        [count, level, count - get_rounded_pruned_element_number(count, level)]
        for count in (8, 16, 24, 48, 72, 320)
        for level in (0.1, 0.3, 0.5, 0.7)
    ]
    golden = {
        "schedules": [schedule(*case) for case in SCHEDULES],
        "defaults": {key: value for key, value in vars(defaults).items() if key.startswith("PRUN")},
        "entries": [{"entry": entry, "valid": valid(entry)} for entry in ENTRIES],
        "importance": importance(),
        "kept_of_count_at_level": rounding,
        "node_names": node_names(),
    }
    (Path(__file__).parent / "nncf.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
