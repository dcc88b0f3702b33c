"""Text from data, such as names of queries and teachers, and numbers, as messages, tables and plots show them."""

from __future__ import annotations

import math
import unicodedata

# Scripts that join letters need these two; every other character of format can turn a terminal's text around or hide it.
_JOINERS = "\u200c\u200d"


def printable(text: object) -> str:
    r"""Text from data as a terminal may show it: control characters, bidirectional ones among them, as escapes.

    >>> printable("a\x1b[2Jb\tc \u202eevil é")
    'a\\x1b[2Jb\\tc \\u202eevil é'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS:
        return character.encode("unicode_escape").decode()
    return character


def percent(share: float | None) -> str:
    """A share in a table: 12%, <1%, or – where there is none."""
    if share is None or math.isnan(share):
        return "–"
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def decimal(value: float | None, places: int = 3) -> str:
    """A number in a table: three decimals or so, ∞, or – where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return "∞" if value == math.inf else f"{value:.{places}f}" if abs(value) < 1000 else f"{value:.4g}"


def short(name: str, most: int) -> str:
    """A name in a plot: printable, and cut where it is long."""
    name = printable(name)
    return name if len(name) <= most else name[: most - 1] + "…"
