"""The commands of a shell script, as far as flags are read from one: words, quotes, comments, continued lines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffprune_plugin.errors import BadInput

TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\r]|\\[ \t\r]*(?:\n|\Z))+)
    |(?P<comment>\#[^\n]*)
    |(?P<end>\n|&&|\|\|?|;|&(?!>))
    |(?P<redirect>[\d&]?[<>]+&?)
    |(?P<word>(?:[^ \t\r\n'"\\;&|<>]|\\(?![ \t\r]*(?:\n|\Z)).|'[^']*'|"(?:\\.|[^"\\])*")+)""",
    re.VERBOSE | re.DOTALL,
)
QUOTED = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)""", re.DOTALL)
FLAG = re.compile(r"--?[A-Za-z]")
SETTING = re.compile(r"[A-Za-z_]\w*=")
# What the first line of a script starts with, if it has neither "#!" nor flags.
PROGRAM = re.compile(
    r"(?:\w+=\S*\s+)*(?:python[\d.]*|accelerate|torchrun|deepspeed|srun|nohup|time|nice|env|exec|sudo|bash|sh|set|export|"
    r"unset|cd|mkdir|echo|source|module|conda|pip|ulimit|for|while|if)\s"
)


@dataclass(frozen=True)
class Command:
    """One command: the words up to the program in Python, its file's name, and the words behind it."""

    start: str
    program: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(word for word in (self.start, *self.words) if word)


def recognises(text: str) -> bool:
    """Whether a text is a script, or flags and nothing else: as its first line says that is no comment."""
    lines = (f"{line.strip()} " for line in text.splitlines() if line.strip() and not re.match(r"\s*#", line))
    first = next(lines, "")
    return text.startswith("#!") or bool(re.match("--[A-Za-z]", first) or PROGRAM.match(first))


def commands(text: str, where: str) -> list[Command]:
    """The commands of a script, or one that is flags alone; raises BadInput for a quotation that is left open.

    A line that starts with a flag goes on with the command of the line before, with a backslash there or without.
    """
    found: list[list[str]] = []
    place, end, aimed = 0, "first", False  # aimed: at the file of a redirection
    while place < len(text):
        token = TOKEN.match(text, place)
        if token is None:
            raise BadInput(f"{where}: no closing quotation; close what is open")
        place = token.end()
        if token["end"]:
            end = end or token["end"]
        elif token["redirect"] or (token["word"] and aimed):
            aimed = bool(token["redirect"])
        elif token["word"]:
            word = QUOTED.sub(unquoted, token["word"])
            goes_on = end == "\n" and (FLAG.match(word) or FLAG.match(found[-1][0]))
            if end and not goes_on:
                found.append([])
            found[-1].append(word)
            end = ""
    return [command_of(words) for words in found]


def unquoted(piece: re.Match[str]) -> str:
    """What a quoted piece of a word stands for."""
    if piece[2] is not None:
        return re.sub(r'\\(?:\n|([\\"$`]))', lambda escaped: escaped[1] or "", piece[2])
    return piece[1] if piece[1] is not None else str(piece[3])


def command_of(words: list[str]) -> Command:
    """A command from its words; without a program they are flags alone, or a command of the shell."""
    if FLAG.match(words[0]):
        return Command("", "", tuple(words))
    files = [i for i, word in enumerate(words) if word.endswith(".py")]
    modules = [i + 1 for i, word in enumerate(words[:-1]) if word == "-m"]
    for i in (files or modules)[:1]:
        name = words[i].replace("\\", "/").rpartition("/")[2] if files else words[i].rpartition(".")[2] + ".py"
        return Command(" ".join(words[: i + 1]), name, tuple(words[i + 1 :]))
    return Command(" ".join(words), "", ())
