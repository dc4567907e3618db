"""The plugin manager: built-ins and installed packages, with who brought what."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import inspect
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pluggy

import diffprune_plugin.adapters as built_in_adapters
from diffprune_plugin import criteria as built_in_criteria
from diffprune_plugin import hookspecs
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, DiffPruneError, Interrupted, first_line, nearest
from diffprune_plugin.hookspecs import ENTRY_POINT_GROUP, Criterion, CriterionFactory

DENOISERS = ("transformer", "unet", "prior")  # where pipelines of diffusers keep what denoises
# Where torch.compile, and where DataParallel and its kin, keep the model that they wrap.
WRAPPED = ("_orig_mod", "module")
SLOW = 20.0  # seconds


@dataclass(frozen=True)
class Plugin:
    """One plugin as found: its package and version, the hooks it has, or why it could not be loaded."""

    name: str
    package: str
    version: str
    hooks: tuple[str, ...] = ()
    failure: str = ""


@dataclass
class Plugins:
    """A pluggy manager with the list of what it tried to load."""

    manager: pluggy.PluginManager
    found: list[Plugin] = field(default_factory=list)

    def register(self, module: Any, name: str, package: str, version: str) -> None:
        """Take a plugin in; a hook it misspells, or any failure, is recorded and keeps the plugin out."""
        if self.manager.has_plugin(name):
            other = next((plugin.package for plugin in self.found if plugin.name == name), "another package")
            failure = f"its entry point is named {name!r} as that of {other} is; give it a name of its own"
            self.found.append(Plugin(name, package, version, failure=failure))
            return
        with faults() as failures:
            self.manager.register(module, name=name)
            self.manager.check_pending()
        if failures:
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            self.found.append(Plugin(name, package, version, failure=failures[0]))
            return
        hooks = tuple(caller.name for caller in self.manager.get_hookcallers(module) or ())
        self.found.append(Plugin(name, package, version, hooks))


@contextlib.contextmanager
def faults(*passed: type[Exception]) -> Iterator[list[str]]:
    """What a plugin raises inside, sys.exit included, is in the list, and others go on; an interrupt passes."""
    failures: list[str] = []
    let: tuple[type[BaseException], ...] = (Interrupted, KeyboardInterrupt, *passed)
    try:
        yield failures
    except let:
        raise
    except BaseException as error:
        failures.append(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def named_if_slow(plugin: str) -> Iterator[None]:
    """Says on standard error which plugin is being loaded, if that takes more than SLOW seconds."""
    said = f"still loading plugin {plugin}; if it never ends, uninstall that package\n"
    timer = threading.Timer(SLOW, lambda: sys.stderr.write(said))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def plugin_manager(entry_points: bool = True) -> Plugins:
    """A fresh manager with the built-ins and, unless told otherwise, every installed package's plugins.

    A plugin that fails to load never takes the program down: it is in ``found`` with its failure.
    """
    # Late: NumPy takes half of the start of commands that read a file.
    from diffprune_plugin.criteria import timestep_weights as built_in_weights

    manager = pluggy.PluginManager("diffprune")
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager)
    version = importlib.metadata.version("diffprune-plugin")
    plugins.register(built_in_criteria, "criteria", "diffprune-plugin", version)
    plugins.register(built_in_weights, "timesteps", "diffprune-plugin", version)
    plugins.register(built_in_adapters, "adapters", "diffprune-plugin", version)
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP) if entry_points else ():
        package = point.dist.name if point.dist else point.value
        version = point.dist.version if point.dist else ""
        with faults() as failures, named_if_slow(f"{point.name} ({package} {version})"):
            module = point.load()
        if failures:
            plugins.found.append(Plugin(point.name, package, version, failure=failures[0]))
        else:
            plugins.register(module, point.name, package, version)
    return plugins


@dataclass(frozen=True)
class Registered:
    """A criterion's factory or an adapter, and the plugin that offers it."""

    value: Any
    plugin: str


def collect(plugins: Plugins, hook: str, name_of: Any = None) -> dict[str, Registered]:
    """What every plugin registers through one hook, by name; raises BadInput for a name that two plugins claim."""
    found: dict[str, Registered] = {}
    for implementation in getattr(plugins.manager.hook, hook).get_hookimpls():
        owner = implementation.plugin_name

        def register(*item: Any, owner: str = owner) -> None:
            name, value = item if name_of is None else (name_of(item[0]), item[0])
            if name in found:
                raise BadInput(f"{name!r} is offered by both {found[name].plugin} and {owner}; uninstall one")
            found[name] = Registered(value, owner)

        with faults(BadInput) as failures:
            implementation.function(register=register)
        for failure in failures:
            plugins.found = [replace(p, failure=failure) if p.name == owner else p for p in plugins.found]
    return found


def criteria(plugins: Plugins) -> dict[str, Registered]:
    """Criterion factories by name."""
    return collect(plugins, "diffprune_register_criteria")


def adapters(plugins: Plugins) -> dict[str, Registered]:
    """Adapters by the name of the UNet class they describe."""
    return collect(plugins, "diffprune_register_adapters", lambda adapter: adapter.model_class)


def timestep_weights(plugins: Plugins) -> dict[str, Registered]:
    """Rules for the weights of timesteps by name."""
    return collect(plugins, "diffprune_register_timestep_weights")


def compensations(plugins: Plugins) -> dict[str, Registered]:
    """Ways to repair a pruned model by name."""
    return collect(plugins, "diffprune_register_compensations")


def compensation(name: str, plugins: Plugins | None = None) -> Registered:
    """The way of this name; raises BadInput, with the nearest name, for one that nobody registers."""
    return known_as(name, compensations(plugins or plugin_manager()), "compensate:")


def weights_of_timesteps(name: str, scheduler: Any, plugins: Plugins | None = None) -> Any:
    """The weight of each training timestep's loss, shape (timesteps,), by the name of a registered rule.

    Raises BadInput for an unknown name, or a rule that does not give one number >= 0 a timestep, not all of them 0.
    """
    import numpy as np

    from diffprune_plugin.criteria.timestep_weights import FLOW, alphas_of

    rule = weights_rule(name, plugins or plugin_manager())
    alphas, flow = alphas_of(scheduler), not hasattr(scheduler, "alphas_cumprod")
    with faults(DiffPruneError) as failures:
        weights = np.asarray(rule.value(alphas, FLOW if flow else scheduler.config.get("prediction_type", "epsilon")))
    where = f"importance: timestep_weights {name!r} of {rule.plugin}"
    if failures:
        raise BadInput(f"{where} fails: {failures[0]}; mend the plugin")
    if weights.shape != alphas.shape or weights.dtype.kind not in "fiu":
        raise BadInput(
            f"{where} gives {weights.shape} of {weights.dtype}, not {alphas.shape} real numbers; mend the plugin"
        )
    if not (np.isfinite(weights).all() and weights.min() >= 0 < weights.max()):
        raise BadInput(f"{where} gives numbers that are not finite, below 0, or all 0; mend the plugin")
    return np.ascontiguousarray(weights, dtype=np.float64)


def weights_rule(name: str, plugins: Plugins) -> Registered:
    """The rule of this name; raises BadInput, with the nearest name, for one that nobody registers."""
    return known_as(name, timestep_weights(plugins), "importance: timestep_weights")


def known_as(name: str, known: Mapping[str, Registered], where: str) -> Registered:
    """What is registered by this name; raises BadInput, with the nearest name, for one that nobody registers."""
    if name not in known:
        listing = ", ".join(sorted(known)) or "none"
        raise BadInput(f"{where} {name!r}{nearest(str(name), known)}; known: {listing}")
    return known[name]


def importance(name: str, *, calibration: Any = None, plugins: Plugins | None = None, **options: Any) -> Criterion:
    """A criterion by its registered name: a ready torch-pruning Importance.

    Raises BadInput for an unknown name, listing those known and where they come from, or for an unknown option.
    """
    plugins = plugins or plugin_manager()
    known = criteria(plugins)
    if name not in known:
        listing = ", ".join(f"{key} ({entry.plugin})" for key, entry in sorted(known.items()))
        raise BadInput(f"importance: unknown criterion {name!r}{nearest(str(name), known)}; known: {listing}")
    if calibration is not None:
        options["calibration"] = calibration
    factory: CriterionFactory = known[name].value
    check_options(name, factory, options)
    try:
        made = factory(**options)
    except DiffPruneError:
        raise
    except Exception as error:  # of a plugin
        plugin, given = known[name].plugin, sorted(options)
        raise BadInput(f"importance: {name} ({plugin}) cannot be made with {given}: {first_line(error)}") from error
    rule = getattr(getattr(made, "sweep", None), "timestep_weights", None)
    if rule is not None:
        weights_rule(rule, plugins)
    return made


def check_options(name: str, factory: CriterionFactory, options: Mapping[str, Any]) -> None:
    """Raises BadInput for an option that the factory's signature does not have."""
    parameters = inspect.signature(factory).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # it checks them itself
    for key, value in options.items():
        if key not in parameters:
            have = ", ".join(parameters) or "no options"
            raise BadInput(
                f"importance: unknown option {key!r} ({value!r}){nearest(str(key), parameters)}; {name} has {have}"
            )


def with_calibration(criterion: Any, calibration: Any) -> Criterion:
    """A copy of a criterion that scores with a calibration; the caller's object stays as it was.

    Raises BadInput for a criterion that takes none, or a calibration that it did not ask for.
    """
    sweep = getattr(criterion, "sweep", None)
    if sweep is None:
        raise BadInput(f"calibration: {type(criterion).__name__} takes none; leave it out")
    criterion = copy.copy(criterion)
    criterion.calibration = calibration.matching({k: v for k, v in sweep.as_dict().items() if v is not None})
    return criterion  # type: ignore[no-any-return]


def find_adapter(model: Any, plugins: Plugins | None = None) -> ModelAdapter:
    """The adapter for a UNet, by its class or the nearest of its base classes.

    Raises BadInput if there is none, or for a wrapper or a pipeline, with the attribute that holds the model.
    """
    if hasattr(model, "components"):
        raise BadInput(f"{type(model).__name__} is a pipeline; give the model in it, its .{denoiser_of(model)[0]}")
    for name in WRAPPED:
        if hasattr(getattr(model, name, None), "named_modules"):
            raise BadInput(f"{type(model).__name__} wraps the model; give its .{name}, and wrap the result again")
    return adapter_for(type(model), plugins)


def adapter_for(unet_class: type, plugins: Plugins | None = None) -> ModelAdapter:
    """The adapter for a UNet class; raises BadInput if there is none."""
    known = adapters(plugins or plugin_manager())
    for class_name in class_names(unet_class):
        if class_name in known:
            adapter: ModelAdapter = known[class_name].value
            return adapter
        if class_name in built_in_adapters.REFUSED:
            raise BadInput(f"{class_name} cannot be pruned: {built_in_adapters.REFUSED[class_name]}")
    raise BadInput(no_adapter(unet_class.__name__, known))


def no_adapter(class_name: str, known: Iterable[str]) -> str:
    """That no adapter describes a class, and which classes have one."""
    return f"no adapter for {class_name}; have {', '.join(sorted(known))}; see docs/extending.md, 'A new model'"


def components(plugins: Plugins | None = None) -> tuple[str, ...]:
    """The attributes of pipelines that hold a model which some adapter describes."""
    return tuple(sorted({entry.value.component for entry in adapters(plugins or plugin_manager()).values()}))


def denoiser_of(pipeline: Any) -> tuple[str, Any]:
    """The component of a pipeline that denoises, by its name; raises BadInput for a pipeline without one."""
    from torch import nn

    names = components()
    for name in names:
        if isinstance(model := getattr(pipeline, name, None), nn.Module):
            return name, model
    kind, parts = type(pipeline).__name__, getattr(pipeline, "components", {})
    where = getattr(pipeline, "name_or_path", "") or kind
    raise no_denoiser(where, kind, {name: type(part).__name__ for name, part in parts.items()})


def no_denoiser(where: Any, kind: str, parts: Mapping[str, str]) -> BadInput:
    """The error for a pipeline that holds no model which an adapter describes; ``parts``: its classes by component."""
    denoiser, known = next((name for name in DENOISERS if name in parts), None), adapters(plugin_manager())
    if denoiser and parts[denoiser] not in known:
        name = parts[denoiser]
        refused = built_in_adapters.REFUSED.get(name)
        why = f"{name} cannot be pruned: {refused}" if refused else no_adapter(name, known)
        return BadInput(f"{where}: {kind} (it has {', '.join(parts)}); its {denoiser}: {why}")
    *others, last = ["UNet" if name == "unet" else name for name in components()]
    called = " or ".join([", ".join(others), last]) if others else last
    return BadInput(f"{where}: {kind} has no {called} (it has {', '.join(parts)})")


def class_names(cls: type) -> Iterable[str]:
    return (base.__name__ for base in cls.__mro__)
