"""Text from data, such as names of queries and teachers, as messages and terminals may show it."""

from __future__ import annotations

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
