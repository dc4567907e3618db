"""Plans on a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffprune_plugin.planning.plan import PLAN_FILE, GroupPlan, LayerSize, PruningPlan

LONG = "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out"  # as in SDXL
WIDER = "encoder.down_blocks.2.attentions.1.temporal_transformer_blocks.9.attn2.to_out.0.projection.linear"
NAMES = [f"{LONG}.{i}" for i in range(5)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a model with long names, one group of which stays for a long reason."""
    shape: dict[str, Any] = {"units": 320, "pairs": 1, "parts": 32, "step": 32, "requested": 96}
    groups = (
        GroupPlan(root=NAMES[0], layers=tuple(NAMES), removed=tuple(range(96)), **shape),
        GroupPlan(root=WIDER, layers=(WIDER,), removed=(), reason=f"it stays, as {LONG} has to, " * 3, **shape),
    )
    facts: dict[str, Any] = {"criterion": {"name": "random"}, "pruning_ratio": 0.3, "versions": {}}
    layers = {NAMES[0]: LayerSize(before=(320, 320), after=(320, 224))}
    sizes: dict[str, Any] = {"params": (100, 70), "macs": (100, 70)}
    plan = PruningPlan(model_class="UNet2DModel", architecture="", groups=groups, layers=layers, **sizes, **facts)
    (tmp_path / "config.json").write_text("{}")
    plan.write(tmp_path / PLAN_FILE)
    return tmp_path


def test_a_plan_fits_80_columns_and_every_layers_name_stands_whole_on_a_line(
    run: Any, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("inspect", directory)
    assert code == 0
    lines = out.splitlines()
    assert "              + 2 more" in lines
    assert all(any(name in line.split() for line in lines) for name in (*NAMES[:3], WIDER, LONG))
    assert "   320   224  " + NAMES[0] in out
    assert [line for line in lines if len(line) > 80] == [f"   320   320  {WIDER}"], "no width breaks a name"
