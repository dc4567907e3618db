"""The settings of sampling and evaluating: one place says defaults, bounds and help, and the commands read it."""

from __future__ import annotations

from typing import Any

import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.settings import Drawing, SamplingSettings
from diffprune_plugin.utils.command_options import asked_by


@pytest.mark.parametrize(("command", "kind"), [("sample", SamplingSettings), ("evaluate", Drawing)])
def test_a_command_has_an_option_for_each_setting_with_its_default_bounds_and_help(
    run: Any, command: str, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    lines = [line.split("│")[1] for line in run(command, "--help")[1].splitlines() if "│ " in line]
    for each in asked_by(kind):
        line = next(line for line in lines if f"{each.flag} " in line)
        assert each.info.help in line
        assert each.default is None or f"[default: {each.default}]" in line
        assert each.info.min is None or f"[{each.info.min}<=x<={each.info.max}]" in line


@pytest.mark.parametrize("kind", [SamplingSettings, Drawing])
def test_every_number_is_kept_between_bounds_and_told_by_its_option(kind: Any) -> None:
    numbers = [each for each in asked_by(kind) if each.info.min is not None]
    assert {each.field.name for each in numbers} >= {"count", "seed", "steps", "batch_size", "guidance_scale"}
    for each in numbers:
        name, least, most = each.field.name, each.info.min, each.info.max
        assert {getattr(kind(**{name: value}), name) for value in (least, most)} == {least, most}
        for value in (least - 1, 10 * most, float("nan"), float("inf"), True, "3"):
            with pytest.raises(BadInput, match=f"^{each.flag} {value}: not a"):
                kind(**{name: value})


def test_numbers_that_count_are_whole() -> None:
    with pytest.raises(BadInput, match=r"--count 2\.5: not a whole number >= 1 and <= 100000"):
        SamplingSettings(count=2.5)  # type: ignore[arg-type]
    assert SamplingSettings(guidance_scale=2).guidance_scale == 2


def test_the_command_refuses_what_the_settings_do(run: Any, dense_dir: Any, tmp_path: Any) -> None:
    for words in (["--count", 10**9], ["--steps", 0], ["--batch-size", 10**9], ["--guidance-scale", "inf"]):
        assert run("sample", dense_dir, "-o", tmp_path / "grid.png", *words)[0] == 2
    assert not (tmp_path / "grid.png").exists()
