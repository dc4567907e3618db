"""The form of a dialect: a table of facts about its keys, and the listing that results from a config."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from diffprune_plugin.config.documents import join, leaves
from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.planning.options import PATTERNS

Verdict = Literal["honoured", "approximated", "ignored", "refused"]
MOST = 1_000_000  # of what is counted: samples, epochs, channels
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 60


@dataclass(frozen=True)
class Kind:
    """Which values a key takes, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def ratio(value: Any) -> bool:
    return number(value) and 0 <= value < 1


ANY = Kind("anything", lambda value: value is not None)
NATIVE = Kind("what the native key takes", lambda value: True)  # checked by PruningConfig
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
RATIO = Kind("a number in [0, 1): 0.3 removes 30 % of the channels", ratio)
SHARE = Kind("a number in (0, 1]", lambda value: number(value) and 0 < value <= 1)
COUNT = Kind("a whole number from 1 to 1,000,000", lambda value: whole(value) and 1 <= value <= MOST)
WHOLE = Kind("a whole number from 0 to 1,000,000", lambda value: whole(value) and 0 <= value <= MOST)
SEED = Kind("a whole number from 0 to 2**63 - 1", lambda value: whole(value) and 0 <= value < 2**63)
TEXT = Kind("a word", lambda value: isinstance(value, str))
NAMES = Kind("a name or a list of names", lambda value: isinstance(value, str) or words(value))
RATIOS = Kind("ratios in [0, 1) by layer", lambda value: isinstance(value, Mapping) and all(map(ratio, value.values())))
CRITERION = Kind(
    "a criterion's name, or a mapping with a 'name'",
    lambda value: isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("name"), str)),
)


def one_of(*known: Any) -> Kind:
    return Kind(f"one of {', '.join(map(str, known))}", lambda value: isinstance(value, str) and value in known)


def nothing(_: Any) -> dict[str, Any]:
    return {}


def to(key: str) -> Callable[[Any], dict[str, Any]]:
    """The value itself under a native key."""
    return lambda value: {key: value}


ABSENT: Any = object()


@dataclass(frozen=True)
class Fact:
    """What becomes of a key.

    native: the native keys that a value gives. default: what the tool takes where the key is absent, if that matters
    here. instead_of: of the keys that name the same one here, and that one, at most one may be given. cases: another
    verdict and reason for certain values.
    """

    kind: Kind
    verdict: Verdict
    reason: str
    native: Callable[[Any], dict[str, Any]] = nothing
    default: Any = ABSENT
    instead_of: str = ""
    cases: tuple[tuple[Any, Verdict, str], ...] = ()

    def judge(self, value: Any) -> tuple[Verdict, str]:
        for case, verdict, reason in self.cases:
            if type(case) is type(value) and case == value:
                return verdict, reason
        return self.verdict, self.reason


@dataclass(frozen=True)
class Row:
    """One key of a config: its path and value, the verdict, why, what it is natively, and whether it was written."""

    key: str
    value: Any
    verdict: Verdict
    reason: str
    native: dict[str, Any]
    given: bool = True


@dataclass
class Listing:
    """A config in the native form, and a row for every key of what it was."""

    dialect: str
    where: str
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def add(
        self,
        key: str,
        value: Any,
        verdict: Verdict,
        reason: str,
        native: Mapping[str, Any] | None = None,
        given: bool = True,
    ) -> None:
        """A row, in the place of the key's earlier one."""
        self.rows[key] = Row(key, value, verdict, reason, {}, given)
        self.give(key, native or {})

    def give(self, key: str, native: Mapping[str, Any]) -> None:
        """What a listed key is natively; it joins what is there: lists grow, mappings too."""
        self.rows[key] = replace(self.rows[key], native=dict(native))
        for name, new in native.items():
            old = self.values.get(name)
            if isinstance(old, dict) and isinstance(new, dict):
                self.values[name] = old | new
            elif isinstance(old, list) and isinstance(new, list):
                self.values[name] = old + new
            else:
                self.values[name] = new

    def amend(self, key: str, verdict: Verdict, reason: str) -> None:
        """Another verdict on a key that was listed."""
        if self.rows[key].verdict != "refused":
            self.rows[key] = replace(self.rows[key], verdict=verdict, reason=reason)

    def refuse(self, key: str, value: Any, reason: str) -> None:
        self.rows[key] = Row(key, value, "refused", reason, {})

    def list_all(self, key: str, value: Any, verdict: Verdict, reason: str) -> None:
        """One verdict on everything below a key."""
        for path, leaf in leaves(value, key).items():
            self.add(path, leaf, verdict, reason)

    def take(
        self, table: Mapping[str, Fact], content: Mapping[Any, Any], path: str = "", elsewhere: Collection[str] = ()
    ) -> dict[str, Any]:
        """A row for each key of the content and for each default of the table; returns the values in force.

        ``elsewhere``: keys that the config gives in another place too.
        """
        found: dict[str, Any] = {}
        names = dict.fromkeys(elsewhere, "the same in another place")
        for key, value in content.items():
            where = join(path, str(key))
            if key not in table:
                self.refuse(where, value, f"unknown key{nearest(str(key), table)}; known: {', '.join(table)}")
                continue
            fact = table[key]
            same = fact.instead_of or key
            if value is None and fact.kind is not NATIVE:
                self.add(where, value, "honoured", "as if it were absent")
            elif not fact.kind.fits(value):
                self.refuse(where, value, f"is not {fact.kind.words}")
            elif same in names:
                self.refuse(where, value, f"is given beside {names[same]}; keep one of them")
            else:
                names[same], found[key] = key, value
                self.take_one(where, value, fact)
        for key, fact in table.items():
            where = join(path, key)
            refused = where in self.rows and self.rows[where].verdict == "refused"
            if fact.default is not ABSENT and (fact.instead_of or key) not in names and not refused:
                found[key] = fact.default
                self.take_one(where, fact.default, fact, given=key in content)
        return found

    def take_one(self, where: str, value: Any, fact: Fact, given: bool = True) -> None:
        verdict, reason = fact.judge(value)
        if verdict == "refused":
            self.refuse(where, value, reason)
        elif verdict == "ignored":
            self.list_all(where, value, verdict, reason)
        else:
            self.add(where, value, verdict, reason, fact.native(value), given)

    def take_criterion(
        self, key: str, value: Any, own: Mapping[str, tuple[Verdict, str, dict[str, Any]]], known: Collection[str]
    ) -> None:
        """The row of a criterion: one of the dialect's own names, or a registered one, with options or without."""
        given = self.rows[key].given
        options = {} if isinstance(value, str) else {name: option for name, option in value.items() if name != "name"}
        name = value if isinstance(value, str) else value["name"]
        if name in own:
            verdict, reason, native = own[name]
            if verdict == "refused":
                self.refuse(key, value, reason)
                return
            self.add(key, value, verdict, reason, {"importance": native | options}, given)
        elif name in known:
            self.add(key, value, "honoured", "a registered criterion", {"importance": {"name": name, **options}}, given)
        else:
            names = [*own, *known]
            self.refuse(key, value, f"unknown importance{nearest(name, names)}; known: {', '.join(names)}")

    def check(self) -> None:
        """Raises BadInput for the first key that is refused, with how many more are."""
        refused = [row for row in self.rows.values() if row.verdict == "refused"]
        if refused:
            row, more = refused[0], len(refused) - 1
            rest = f" (and {more} more; diffprune config lists them)" if more else ""
            raise BadInput(f"{self.where}: {row.key}: {SHORT.repr(row.value)}: {row.reason}{rest}")

    def located(self, error: BadInput) -> BadInput:
        """An error about a pattern, with the file and the key that the pattern stands in."""
        for row in self.rows.values() if error.key in PATTERNS else ():
            if error.value in row.native.get(error.key, ()):
                return BadInput(f"{self.where}: {row.key}: {error}", key=row.key, value=error.value)
        return error

    def as_dict(self) -> dict[str, Any]:
        """The listing for JSON."""
        rows = [
            {"key": row.key, "value": row.value, "given": row.given, "verdict": row.verdict}
            | {"native": row.native, "reason": row.reason}
            for row in self.rows.values()
        ]
        return {"dialect": self.dialect, "native": self.values, "keys": rows}

    def summary(self) -> str:
        """In one line how many of the written keys met which verdict."""
        counts = Counter(row.verdict for row in self.rows.values() if row.given)
        return f"{self.where}: {self.dialect}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())

    def table(self) -> Table:
        """The listing for a terminal."""
        table = Table("key", "verdict", "becomes", title=escape(self.summary()), show_lines=True)
        for row in self.rows.values():
            value = SHORT.repr(row.value) + ("" if row.given else " (default)")
            native = [f"{key}: {new}" for key, new in row.native.items()]
            table.add_row(*map(escape, (f"{row.key}\n{value}", row.verdict, "\n".join([*native, row.reason]))))
        return table
