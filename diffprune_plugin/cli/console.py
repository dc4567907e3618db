"""Where the commands print to."""

from __future__ import annotations

from rich.console import Console

console = Console()


def say(line: str, end: str = "\n") -> None:
    """A line as it is: names that users chose are no markup, and no width breaks them."""
    console.print(line, end=end, markup=False, soft_wrap=True)
