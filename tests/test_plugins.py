"""Third parties: found by entry point, selectable by name, and never able to take the program down."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from types import SimpleNamespace

import pytest
from diffprune_example import GatedUNet
from diffusers import DDPMPipeline, DiffusionPipeline
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin import hookspecs, plugins
from diffprune_plugin.errors import BadInput, Interrupted
from diffprune_plugin.plugins import adapters, criteria, plugin_manager
from diffprune_plugin.pruning.directory import read_plan


def test_an_installed_packages_criterion_is_selectable_by_name_from_a_config(run, config_file, tmp_path) -> None:
    assert run("prune", config_file, "--set", "importance.name=fisher_example", "--set", "compensate=false")[0] == 0
    plan = read_plan(tmp_path / "pruned")
    assert plan.criterion["name"] == "fisher_example"
    assert run("prune", config_file, "--output", tmp_path / "other", "--set", "compensate=false")[0] == 0
    assert plan.removed_units() != read_plan(tmp_path / "other").removed_units()


def test_an_installed_packages_unet_goes_through_the_whole_workflow(run, config_file, scheduler, tmp_path) -> None:
    """A pipeline with a UNet class that diffusers does not have: pruned, compensated, saved, loaded, sampled from."""
    dense = dp.save(DDPMPipeline(GatedUNet(), scheduler), tmp_path / "gated")
    code, _, error = run("prune", config_file, "--model", dense)
    assert code == 0, error
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pruned")
    assert type(pipeline.unet).__name__ == "PrunedGatedUNet"
    assert isinstance(pipeline.unet, GatedUNet)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == read_plan(tmp_path / "pruned").params[1]
    assert run("sample", tmp_path / "pruned", "-o", tmp_path / "grid.png", "--count", 2, "--steps", 2)[0] == 0


def test_the_command_lists_each_plugin_with_its_package_version_and_offers(run) -> None:
    code, out, _ = run("plugins", "--json")
    rows = {row["plugin"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["example"]["package"] == "diffprune-example"
    assert rows["example"]["version"] == "0.3.0"
    assert rows["example"]["offers"] == ["criterion fisher_example", "adapter GatedUNet"]
    assert "adapter UNet2DModel" in rows["adapters"]["offers"]
    code, out, _ = run("plugins")
    assert code == 0
    assert "diff_taylor" in out
    shown = [line.strip() for line in out.splitlines()]
    assert all(offer in shown for row in rows.values() for offer in row["offers"]), "every name stands whole on a line"
    assert "example (diffprune-example 0.3.0)" in shown


def entry_point(name: str, load) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=name, dist=SimpleNamespace(name=f"pkg-{name}", version="1"), load=load)


def broken():
    raise ImportError("no module named parts")


def misspelt():
    @hookspecs.hookimpl
    def diffprune_register_criterions(register):
        pass

    return SimpleNamespace(diffprune_register_criterions=diffprune_register_criterions)


def test_a_plugin_that_fails_to_load_is_listed_with_why_and_the_rest_works(monkeypatch) -> None:
    points = [entry_point("broken", broken), entry_point("misspelt", misspelt)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    manager = plugin_manager()
    failures = {plugin.name: plugin.failure for plugin in manager.found if plugin.failure}
    assert failures["broken"] == "ImportError: no module named parts"
    assert "diffprune_register_criterions" in failures["misspelt"]
    assert "diff_taylor" in criteria(manager)
    assert "UNet2DModel" in adapters(manager)


def ending():
    sys.exit(0)


def test_a_plugin_that_ends_the_program_is_listed_and_an_interrupt_is_none(monkeypatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("ending", ending)])
    manager = plugin_manager()
    manager.register(SimpleNamespace(diffprune_register_criteria=hookspecs.hookimpl(ends_early)), "early", "early", "1")
    assert "diff_taylor" in criteria(manager)
    failures = {plugin.name: plugin.failure for plugin in manager.found if plugin.failure}
    assert failures == {"ending": "SystemExit: 0", "early": "SystemExit: 3"}
    for interrupt in (Interrupted, KeyboardInterrupt):

        def load(interrupt=interrupt):
            raise interrupt

        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group, load=load: [entry_point("busy", load)])
        with pytest.raises(interrupt):
            plugin_manager()


def ends_early(register):
    sys.exit(3)


def test_a_plugin_that_hangs_while_it_is_loaded_is_named(monkeypatch, capsys) -> None:
    said = ""

    def load():
        nonlocal said
        for _ in range(2000):
            said += capsys.readouterr().err
            if said:
                break
            time.sleep(0.01)
        return SimpleNamespace()

    monkeypatch.setattr(plugins, "SLOW", 0.01)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("hanging", load)])
    plugin_manager()
    assert said == "still loading plugin hanging (pkg-hanging 1); if it never ends, uninstall that package\n"


def test_a_criterion_that_ends_the_program_is_a_failed_check_that_names_it(run, config_file, tmp_path, monkeypatch):
    factory = {"name": "ending", "__name__": "third.party"}
    exec("import sys\ndef factory():\n    return lambda group: sys.exit(0)", factory)
    offer = hookspecs.hookimpl(lambda register: register("ending", factory["factory"]))
    plugin = SimpleNamespace(diffprune_register_criteria=offer)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry_point("third", lambda: plugin)])
    words = [w for each in ("importance=ending", "compensate=false", "timesteps=null") for w in ("--set", each)]
    code, out, err = run("prune", config_file, *words)
    assert (code, out) == (1, "")
    assert (
        err
        == "error: third.party ended the program, by sys.exit(0), before its work was done; mend it or do without it\n"
    )
    assert not (tmp_path / "pruned").exists()


def test_a_hook_that_raises_is_recorded_and_the_others_go_on() -> None:
    @hookspecs.hookimpl
    def diffprune_register_criteria(register):
        raise KeyError("parts")

    manager = plugin_manager(entry_points=False)
    manager.register(SimpleNamespace(diffprune_register_criteria=diffprune_register_criteria), "faulty", "faulty", "1")
    assert "diff_taylor" in criteria(manager)
    assert {p.name: p.failure for p in manager.found}["faulty"] == "KeyError: 'parts'"


def test_a_name_registered_twice_is_an_error_that_names_both_plugins() -> None:
    @hookspecs.hookimpl
    def diffprune_register_criteria(register):
        register("magnitude", lambda: None)

    manager = plugin_manager(entry_points=False)
    manager.register(SimpleNamespace(diffprune_register_criteria=diffprune_register_criteria), "rival", "rival", "1")
    with pytest.raises(BadInput, match=r"'magnitude' is offered by both (criteria and rival|rival and criteria)"):
        criteria(manager)


def test_a_plugin_named_as_another_stays_out_and_the_other_in() -> None:
    manager = plugin_manager(entry_points=False)
    before = set(criteria(manager))
    for name in ("criteria", "mine", "mine"):
        manager.register(SimpleNamespace(), name, f"package of {name}", "1")
    assert set(criteria(manager)) == before
    assert {p.name for p in manager.found if not p.failure} >= {"criteria", "mine"}
    assert [p.failure for p in manager.found if p.failure and p.name == "mine"] == [
        "its entry point is named 'mine' as that of package of mine is; give it a name of its own"
    ]


def test_an_unknown_criterion_lists_those_known_and_where_they_come_from() -> None:
    with pytest.raises(BadInput, match=r"unknown criterion 'magnitud'; did you mean 'magnitude'.*taylor \(criteria\)"):
        dp.importance("magnitud")
    with pytest.raises(BadInput, match="; magnitude has p"):
        dp.make_plan(make_unet(), dp.importance("magnitude", q=3))


def test_every_hook_is_documented() -> None:
    for name in ("diffprune_register_criteria", "diffprune_register_adapters"):
        assert "register" in (getattr(hookspecs, name).__doc__ or "")
