"""Commands whose options are the fields of a dataclass: default, help and limits of each are said once, there; and
whose paths are looked at as they were written."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.written_paths import as_written

Command = Callable[..., None]
LARGEST_SEED = 2**63 - 1  # what torch takes


@dataclasses.dataclass(frozen=True)
class Asked:
    """One option: the field that it sets, its type there, and what typer is told of it."""

    field: dataclasses.Field[Any]
    kind: Any
    info: Any

    @property
    def default(self) -> Any:
        return self.field.default

    @property
    def flag(self) -> str:
        """What it is called on the command line."""
        named = self.info.default if isinstance(self.info.default, str) else self.field.name.replace("_", "-")
        return f"--{named.removeprefix('--')}"

    def parameter(self) -> inspect.Parameter:
        """As typer takes it: a tuple as text with commas; what is on by default as a flag that turns it off."""
        kind, default = self.kind, self.default
        if get_origin(kind) is tuple:
            kind, default = str, ",".join(map(str, default))
        told: Any = Annotated
        kept = False if default is True else default
        return inspect.Parameter(
            self.field.name, inspect.Parameter.KEYWORD_ONLY, default=kept, annotation=told[kind, self.info]
        )

    def value(self, given: Any) -> Any:
        """What the field gets; raises BadInput for a text that is no list of such values."""
        if self.default is True:
            return not given
        if get_origin(self.kind) is not tuple:
            return given
        return numbers(given, self.flag) if get_args(self.kind)[0] is int else tuple(filter(None, given.split(",")))

    def check(self, value: Any) -> None:
        """Raises BadInput, by the flag, for a number outside the option's limits; None is for what is not given."""
        least, most = self.info.min, self.info.max
        if least is None or most is None or (value is None and self.default is None):
            return
        whole = isinstance(least, int)
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise BadInput(f"{self.flag} {value}: not a {'whole ' * whole}number >= {least:g} and <= {most:g}")


def asked_by(kind: type[Any]) -> list[Asked]:
    """The fields of a dataclass that are Annotated with an option."""
    hints = get_type_hints(kind, include_extras=True)
    told = [field for field in dataclasses.fields(kind) if get_origin(hints[field.name]) is Annotated]
    return [Asked(field, *get_args(hints[field.name])) for field in told]


def check_limits(options: Any) -> None:
    """Raises BadInput for the first number outside its limits, for options that are made without the command line."""
    for option in asked_by(type(options)):
        option.check(getattr(options, option.field.name))


def with_options(kind: type[Any]) -> Callable[[Command], Command]:
    """Give a command, in the place of its argument ``options``, an option for each field that is Annotated with one."""
    asked = asked_by(kind)

    def decorate(command: Command) -> Command:
        def run(**given: Any) -> None:
            values = {option.field.name: option.value(given.pop(option.field.name)) for option in asked}
            command(**given, options=kind(**values))

        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            taken = [option.parameter() for option in asked] if parameter.name == "options" else [parameter]
            parameters += [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in taken]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def with_paths(command: Command) -> Command:
    """A command whose paths are looked at as they were written, before they are paths."""
    signature = inspect.signature(command, eval_str=True)

    def run(*args: Any, **given: Any) -> None:
        command(*args, **given)

    for parameter in signature.parameters.values():
        kind, *told = get_args(parameter.annotation) or (None,)
        if told and Path in (kind, *get_args(kind)):
            told[0].parser = path
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


def path(text: str) -> Path:
    try:
        return Path(as_written(str(text)))
    except ValueError as error:
        raise typer.BadParameter(f"{str(text)!r} {error}") from None


def numbers(text: str, flag: str) -> tuple[int, ...]:
    """``1,4`` as numbers; raises BadInput for anything else than whole numbers of at least 1."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise BadInput(f"{flag} {text!r}: give whole numbers of at least 1, for example {flag} 1,4")
    return found
