"""Unicode text as it was meant: mojibake repaired, control characters gone, one form (NFC) for what looks the same."""

import re
import unicodedata

import ftfy

# What is right as it is stays: curly quotes, full-width forms, and &amp;, which may be meant in a text about HTML.
CONFIG = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_character_width=False, normalization="NFC", explain=False
)
ROUNDS = 10  # a repair may uncover what another one repairs
_DOUBTFUL = re.compile(r"[^\t\n\x20-\x7e]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ufeff]")


def normalise(text: str) -> str:
    """The text repaired, in NFC, without control characters but tab and line feed; done again it changes nothing.

    Line breaks of all kinds become line feeds. A text that ten rounds have not settled stays as the last one left it.
    """
    text = text.replace("\r\n", "\n")
    for _ in range(ROUNDS if _DOUBTFUL.search(text) else 0):
        before, text = text, "\n".join(_repaired(line) if _DOUBTFUL.search(line) else line for line in text.split("\n"))
        if text == before:
            break
    return text


def _repaired(line: str) -> str:
    """One line, or several if it has other breaks; ftfy too looks at each line alone, but takes its time for plain ones."""
    return unicodedata.normalize("NFC", _CONTROLS.sub("", ftfy.fix_text(line.replace("\f", "\n"), CONFIG)))
