"""Words of a page: commands as a shell takes them, and counts."""

import shlex


def command(*words: str) -> str:
    """Return words as one would type them in a shell."""
    return " ".join(shlex.quote(word) for word in words)


def plural(count: int, name: str) -> str:
    """Return "1 step", "2 steps"."""
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"
