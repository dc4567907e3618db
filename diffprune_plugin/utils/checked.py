"""Values that people set: frozen, checked when made; a mistake is one line with the key, the value and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from diffprune_plugin.errors import BadInput, nearest

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch takes
TOLD = 5  # of the wrong values of one config, a list of thousands among them
LOW, HIGH = {"minimum": "[", "exclusiveMinimum": "("}, {"maximum": "]", "exclusiveMaximum": ")"}
OUTSIDE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


class Checked(BaseModel):
    """A frozen set of values; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str = "config", places: Mapping[str, str] | None = None) -> Self:
        """The values of a mapping; raises BadInput with the place, the value and the remedy for what is wrong.

        ``where`` they are from, but for the keys in ``places``, each with its own.
        """
        places = places or {}
        for key in values:
            if key not in cls.model_fields:
                place, known = places.get(key, where), ", ".join(cls.model_fields)
                raise BadInput(f"{place}: unknown key {key!r}{nearest(str(key), cls.model_fields)}; known: {known}")
        try:
            return cls(**values)
        except ValidationError as error:
            wrong = error.errors()
            lines: dict[str, list[str]] = {}
            for item in wrong[:TOLD]:
                key = str(item["loc"][0]) if item["loc"] else ""
                lines.setdefault(places.get(key, where), []).append(explain(item, cls))
            told = [f"{place}: {'; '.join(of)}" for place, of in lines.items()]
            more = [f"and {len(wrong) - TOLD} more"] if len(wrong) > TOLD else []
            raise BadInput("; ".join(told + more)) from None


def nested(kind: type[Checked], key: str) -> Callable[[Any], Any]:
    """For pydantic's BeforeValidator: a mapping as the values that a key holds; mistakes are told with the key."""

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        try:
            return kind.make(value, key)
        except BadInput as error:
            raise ValueError(str(error)) from None

    return read


def explain(error: Any, kind: type[BaseModel]) -> str:
    """One pydantic error as key, value and what is expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; add '{key}: ...'" + (" or give --model" if key == "model" else "")
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    stated = facts(kind.model_json_schema()["properties"][error["loc"][0]])
    if error["type"] in OUTSIDE:
        return f"{key}: {error['input']} is outside {interval(stated)}"
    if error["type"] == "literal_error" and "enum" in stated:
        quoted = (
            "; in quotes: YAML reads a bare no, off, yes or on otherwise" if isinstance(error["input"], bool) else ""
        )
        return f"{key}: {error['input']!r} is none of {', '.join(stated['enum'])}{quoted}"
    if error["type"] == "tuple_type":
        example = f", as in [{error['input']!r}]" if isinstance(error["input"], str) else ""
        return f"{key}: {error['input']!r}: input should be a list{example}, or the key left out"
    within = (
        f" in {interval(stated)}"
        if re.search("number|integer", message) and LOW.keys() & stated and HIGH.keys() & stated
        else ""
    )
    return f"{key}: {error['input']!r}: {message[0].lower()}{message[1:]}{within}"


def facts(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What a field's JSON schema says of one value, be that all of it, an alternative to null or inside a mapping."""
    return {key: value for part in parts(schema) for key, value in part.items()}


def parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all that are nested in it."""
    if isinstance(schema, Mapping):
        yield schema
    for inner in schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ():
        yield from parts(inner)


def interval(stated: Mapping[str, Any]) -> str:
    """The range of a number, as in [0, 1), by the words of JSON schema."""
    low, high = (next(key for key in ends if key in stated) for ends in (LOW, HIGH))
    return f"{LOW[low]}{plain(stated[low])}, {plain(stated[high])}{HIGH[high]}"


def plain(bound: float) -> float:
    """A whole number without its .0, which some versions of pydantic give it."""
    return int(bound) if bound == int(bound) else bound
