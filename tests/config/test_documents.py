"""Config files that are no configs: hostile, damaged, or another kind of file; each is one line, at once."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from diffprune_plugin.config.documents import parse_mapping, read_mapping
from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.reading import parse_json, read_json

BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '0'] * 10)}]\n" for i in range(12))
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 9))


def refusal(text: str, suffix: str = ".yaml") -> str:
    with pytest.raises(BadInput) as caught:
        parse_mapping(text, Path(f"c{suffix}"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", [BOMB, MERGES, "- a\n" * 30000], ids=["aliases", "merges", "items"])
def test_what_aliases_stand_for_counts_each_time(text) -> None:
    assert "holds more than 20,000 values" in refusal(text)


def test_an_alias_used_twice_is_what_it_stands_for() -> None:
    assert parse_mapping("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}", Path("c.yaml")) == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('!!int ""', "'' is no int"),
        ('!!float ""', "'' is no float"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("!!timestamp x", "'x' is a timestamp, which no key takes; put text in quotes"),
        ("2001-01-01", "'2001-01-01' is a timestamp"),
        ("!!binary aGk=", "is a binary"),
        ("!!set {a, b}", "line 1 is a set"),
        ("!!omap [b: 1]", "line 1 is a omap"),
        ("!!python/object/apply:os.system ['true']", "is a python/object/apply:os.system"),
        ("!!map []", "expected a mapping node"),
        ("010", "'010' is another number in YAML 1.1 than in 1.2; write it in base 10"),
        ("1:30", "'1:30' is another number"),
        ("9" * 5000, "a number has 5000 digits"),
        ("0x" + "f" * 5000, "a number has 5002 digits"),
        ("1" + ":1" * 5000, "a number has 10001 digits"),
        ("[" * 5000, "nested too deeply"),
        ("&x [*x]", "nested too deeply"),
        (r'"a\nb"', "holds a line break or another control character"),
        (r'"\e[31m"', "holds a line break or another control character"),
    ],
)
def test_a_yaml_value_that_is_no_plain_one_is_named(value, words) -> None:
    assert words in refusal(f"a: {value}")


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ("a = 1979-05-27", ".toml", "1979-05-27 is a date"),
        ("a = 0x" + "f" * 5000, ".toml", "a number has more than 100 digits"),
        ("a." * 30000 + "b = 1", ".toml", "nested too deeply"),
        ("# nothing\n", ".toml", "is empty"),
        ("", ".toml", "is empty"),
        ("{}", ".json", "is empty"),
        ('{"a": ' + "9" * 5000 + "}", ".json", "not valid json"),
        ('{"a":' * 100_000, ".json", "nested too deeply"),
        ('{"a": "\\ud800"}', ".json", "half a surrogate pair"),
        ("/*/" * 80_000, ".json", "not valid json"),
        ('"' + '\\"' * 80_000, ".json", "not valid json"),
        ('"\\' * 80_000, ".json", "not valid json"),
    ],
    ids=lambda value: value[:12],
)
def test_so_is_one_in_toml_and_json(text, suffix, words) -> None:
    assert words in refusal(text, suffix)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"a": 1}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "holds NUL bytes, as UTF-16 does; save it as UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "byte 7 is not UTF-8"),
        (b" " * (2**18 + 1), "has more than 262,144 bytes"),
    ],
    ids=["utf-16", "utf-16-le", "latin-1", "large"],
)
def test_a_file_that_is_no_utf_8_text_of_a_configs_size_is_named(data, words, tmp_path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes(data)
    with pytest.raises(BadInput) as caught:
        read_mapping(path)
    assert str(caught.value).startswith(f"{path}: cannot be read: ")
    assert words in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path) -> None:
    path = tmp_path / "c.json"
    path.write_bytes('{"a": "é"}'.encode("utf-8-sig"))
    assert read_mapping(path) == {"a": "é"}


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        places = {tmp_path: "a directory", tmp_path / "pipe": "a pipe", Path("/dev/zero"): "a device"}
        places |= {tmp_path / "socket": "a socket", tmp_path / "loop": "symbolic links", Path("a\0b"): "null byte"}
        for path, words in places.items():
            with pytest.raises(BadInput, match=f"cannot be read: .*{words}"):
                read_mapping(path)


def test_any_json_file_is_read_with_the_same_limits(tmp_path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(BadInput, match="not valid json: nested too deeply"):
        read_json(path)
    with pytest.raises(BadInput, match="x: not valid json: nested too deeply"):
        parse_json("[" * 101 + "]" * 101, "x")
    assert parse_json("[" * 100 + "]" * 100, "x")
