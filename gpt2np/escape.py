"""Text that comes from files, as it may be shown: without power over a terminal, or over a reader's eye.

A name in a model file is anybody's text. Control characters in it move the cursor, recolour, or retitle a
terminal (ECMA-48, and xterm's OSC); bidirectional controls make text read in another order than it stands in
(https://trojansource.codes); XML 1.0 has no room for most of them.
"""

from __future__ import annotations

import re

# C0, DEL and C1 controls, line and paragraph separators, bidirectional and invisible format characters, halves of
# surrogate pairs, tags. Joiners (U+200C, U+200D) stay: scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def escaped(text: str, keep: str = "") -> str:
    r"""The text with every unsafe character written as JSON writes it: ``\u001b`` for ESC.

    Inside of JSON the result means the same as before.

    Parameters
    ----------
    text : str
    keep : str
        Characters that may stay, where the text is laid out with them: a newline, a tab.
    """

    def write(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))

    return _UNSAFE.sub(write, text)
