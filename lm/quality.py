"""Rules that tell prose from what only fills pages: Gopher's and C4's.

Gopher: Rae et al., "Scaling Language Models", arXiv 2112.11446, appendix A.1.1 (quality, repetition) and table A1. A word is
what stands between spaces, as there. The n-gram fractions are computed as datatrove's GopherRepetitionFilter does, which
FineWeb was made with (Penedo et al., arXiv 2406.17557), and agree with it. C4: Raffel et al., arXiv 1910.10683, section 2.2.
"""

import re
from collections.abc import Sequence

from lm.document_kernels import code_points, kinds, repeated_gram_characters, tokens, top_gram_characters

WORDS = (50, 100_000)
WORD_LENGTH = (3, 10)  # characters, the mean
SYMBOLS_PER_WORD = 0.1  # "#", or an ellipsis
BULLET_LINES, ELLIPSIS_LINES = 0.9, 0.3
ALPHABETIC_WORDS = 0.8
STOP_WORDS, LEAST_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with")), 2
DUPLICATE_PARTS, DUPLICATE_PART_CHARACTERS = 0.3, 0.2  # paragraphs, lines
TOP_GRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

C4_ENDS, C4_ELLIPSIS = (".", "?", "!", '"', "”"), ("...", "…")
C4_LEAST_WORDS, C4_LEAST_SENTENCES = 3, 5
C4_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE_END = re.compile(r"[.?!]+[\"'\u201d\u2019)\]]*(?=\s|$)")

Verdict = tuple[str, float] | None  # the rule that a text breaks, and the value that it has; None if it breaks none


def gopher(text: str) -> Verdict:
    """The first of Gopher's rules that a text breaks."""
    hashes, lengths, num_alpha = tokens(code_points(text), kinds())
    return _quality(text, len(lengths), int(lengths.sum()), num_alpha) or _repetition(text, hashes, lengths)


def _quality(text: str, num_words: int, num_characters: int, num_alpha: int) -> Verdict:
    if num_words < WORDS[0]:
        return "too few words", num_words
    if num_words > WORDS[1]:
        return "too many words", num_words
    lines = text.split("\n")
    bullets = sum(line.lstrip().startswith(("•", "-", "*")) for line in lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    for rule, value, low, high in (
        ("mean word length", num_characters / num_words, *WORD_LENGTH),
        ("hash signs per word", text.count("#") / num_words, 0, SYMBOLS_PER_WORD),
        ("ellipses per word", (text.count("...") + text.count("…")) / num_words, 0, SYMBOLS_PER_WORD),
        ("lines that begin with a bullet", bullets / len(lines), 0, BULLET_LINES),
        ("lines that end with an ellipsis", ellipses / len(lines), 0, ELLIPSIS_LINES),
        ("words with a letter", num_alpha / num_words, ALPHABETIC_WORDS, 1),
    ):
        if not low <= value <= high:
            return rule, value
    stop_words = len(STOP_WORDS.intersection(re.findall(r"\w+", text.lower())))
    return ("too few stop words", stop_words) if stop_words < LEAST_STOP_WORDS else None


def _repetition(text: str, hashes, lengths) -> Verdict:
    for name, parts in (("paragraphs", re.split(r"\n{2,}", text.strip())), ("lines", re.split(r"\n+", text))):
        count, characters = _repeated(parts)
        if (value := count / len(parts)) > DUPLICATE_PARTS:
            return f"repeated {name}", value
        if (value := characters / len(text)) > DUPLICATE_PART_CHARACTERS:
            return f"characters in repeated {name}", value
    for n, most in TOP_GRAMS.items():
        if (value := top_gram_characters(hashes, lengths, n) / len(text)) > most:
            return f"characters in the commonest {n}-gram", value
    for n, most in REPEATED_GRAMS.items():
        if (value := repeated_gram_characters(hashes, lengths, n) / len(text)) > most:
            return f"characters in repeated {n}-grams", value
    return None


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts have come before, and their characters."""
    seen, count, characters = set(), 0, 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count, characters


def c4(text: str) -> tuple[str, Verdict]:
    """The lines of a text that C4 keeps, and the rule that the text breaks as a whole.

    As in datatrove's C4QualityFilter, the least is 3 words in a line and 5 sentences in a text, and lines about cookies and
    terms of use go too. Not applied: the list of bad words.
    """
    lower = text.lower()
    if "lorem ipsum" in lower:
        return text, ("lorem ipsum", 1)
    if "{" in text:
        return text, ("a curly bracket", text.count("{"))
    kept = [line for line in map(str.strip, text.split("\n")) if _is_c4_line(line)]
    sentences = sum(max(len(_SENTENCE_END.findall(line)), 1) for line in kept)
    return "\n".join(kept), ("too few sentences", sentences) if sentences < C4_LEAST_SENTENCES else None


def _is_c4_line(line: str) -> bool:
    lower = line.lower()
    return (
        line.endswith(C4_ENDS)
        and not line.endswith(C4_ELLIPSIS)
        and len(line.split()) >= C4_LEAST_WORDS
        and "javascript" not in lower
        and not any(policy in lower for policy in C4_POLICIES)
    )
