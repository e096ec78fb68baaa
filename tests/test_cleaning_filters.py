"""What is done to one document: it is normalised, judged and signed."""

import json
import re
from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lm.cleaning import Signer, Steps, exact_key, judge
from lm.document_kernels import code_points, kinds, repeated_gram_characters, split_words, tokens, top_gram_characters
from lm.language import languages
from lm.minhash import MinHash, chance, shingles, word_hashes
from lm.quality import c4, gopher
from lm.text_normal import normalise

# 65 words that break no rule.
PROSE = (
    "The harbour of the old town lies below a hill that fishermen climb every morning, to see whether boats have come back "
    "with their nets. Children run beside them and ask what was caught, but nobody answers before the first basket stands on "
    "the stones. Later, when all is weighed, merchants from inland buy whatever they want, and then quiet returns for another "
    "long afternoon."
)


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@example("schÃ¶n â€œquotedâ€\x9d")
@example("a\r\nb\u2028c\x0cd\x85e")
@example("e\u0301\ufeff\x00\x1b[31m\u0085\x9f")
@example("&amp;lt;")
@settings(max_examples=400, deadline=None)
def test_normalising_again_changes_nothing(text):
    once = normalise(text)
    assert normalise(once) == once
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]", once)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schÃ¶n", "schön"),
        ("dâ€™accord", "d\u2019accord"),
        ("cafe\u0301", "café"),
        ("ﬁne", "fine"),
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne"),
        ("nul\x00 bell\x07 bom\ufeff tab\t", "nul bell bom tab\t"),
        ("\u201ccurly\u201d &amp; \uff26", "\u201ccurly\u201d &amp; \uff26"),
    ],
)
def test_normalise_repairs_and_leaves_the_rest(text, expected):
    assert normalise(text) == expected


def test_words_are_lower_case_and_without_punctuation():
    def words(text):
        spans = split_words(code_points(text), kinds())[1].tolist()
        return [text[begin:end] for begin, end in spans]

    assert words("Don't stop—the re\u00adstart, v2.0 of naïve\u0301 日本 _x_") == [
        "Don't",
        "stop",
        "the",
        "re\u00adstart",
        "v2",
        "0",
        "of",
        "naïve\u0301",
        "日本",
        "x",
    ]
    assert (word_hashes("Don\u2019t RE-START\u00adED it") == word_hashes("dont re started,it")).all()
    assert len(set(word_hashes("a b ab ba aa").tolist())) == 5
    assert not len(word_hashes(" --- ...\n"))


@given(st.text(st.sampled_from("ab '.\n\u0301\u00a0"), max_size=60))
@settings(deadline=None)
def test_tokens_are_what_python_splits_by_spaces(text):
    hashes, lengths, num_alpha = tokens(code_points(text), kinds())
    words = text.split()
    assert lengths.tolist() == list(map(len, words))
    assert num_alpha == sum(any(map(str.isalpha, word)) for word in words)
    assert len(set(hashes.tolist())) == len(set(words))


def test_kinds_are_those_of_python():
    points = range(0, 0x11000)
    assert [bool(kinds()[p] & 4) for p in points] == [chr(p).isspace() for p in points]
    assert [bool(kinds()[p] & 8) for p in points] == [chr(p).isalpha() for p in points]


def gram_fractions(text, n):
    hashes, lengths, _ = tokens(code_points(text), kinds())
    return int(top_gram_characters(hashes, lengths, n)), int(repeated_gram_characters(hashes, lengths, n))


def test_characters_in_n_grams_by_hand():
    text = "aa b aa b aa b cc"
    assert gram_fractions(text, 2) == (3 * len("aa b"), 2 * len("aab"))  # the third and fifth word begin a repeated one
    assert gram_fractions(text, 3) == (2 * len("aa b aa"), len("aabaa"))
    assert gram_fractions("one two", 3) == (0, 0)
    assert gram_fractions("a b c b a", 2) == (len("a b"), 0)  # of those that are equally common the first


def datatrove_filters():
    """datatrove's own, with words as we split them."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherRepetitionFilter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):
        def word_tokenize(self, text):
            return text.split()

        def sent_tokenize(self, text):
            raise NotImplementedError

        span_tokenize = sent_tokenize

    step = GopherRepetitionFilter(language=Spaces())
    return lambda text: step.filter(Document(text=text, id="")) is True


def test_repetition_is_what_datatrove_finds(samples):
    """On real texts, and on such as break the rules."""
    theirs, texts = datatrove_filters(), []
    with open(samples / "pubmed/test.jsonl") as file:
        texts += [json.loads(line)["text"] for line in file][:300]
    generator = np.random.default_rng(0)
    words = PROSE.split()
    for length in range(2, 13):
        for times in range(2, 12):
            phrases = [words, *[words[:length]] * times]
            texts.append(" ".join(" ".join(phrases[i]) for i in generator.permutation(times + 1)))
            texts.append(
                " ".join(word for i in generator.integers(0, 65 - length, times) for word in words[i : i + length] * 4)
            )
    for length in (2, 3, 4):  # a phrase between words that come once
        for gap in range(2, 20):
            once = iter(f"{words[i % 65]}{i}" for i in range(1000))
            texts.append("to the " + " ".join(word for _ in range(12) for word in [*words[:length], *islice(once, gap)]))
    texts += [f"{PROSE}\n{line}\n\n{line}\n" * count for line in ("short", PROSE) for count in (1, 2)]
    rules = [gopher(text) for text in texts]
    judged = [i for i, rule in enumerate(rules) if rule is None or "gram" in rule[0] or "repeated" in rule[0]]
    assert len(judged) > 400
    assert [rules[i] is None for i in judged] == [theirs(texts[i]) for i in judged]
    assert sum(rules[i] is not None for i in judged) > 50


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (PROSE, None),
        (" ".join(PROSE.split()[:49]), ("too few words", 49)),
        ("a " * 100_001, ("too many words", 100_001)),
        ("it " * 60, ("mean word length", 2)),
        (" ".join(["incomprehensibly"] * 60), ("mean word length", 16)),
        (PROSE.replace(" ", " #", 7), ("hash signs per word", 7 / 65)),
        (PROSE.replace(" ", " ... ", 8), ("ellipses per word", 8 / 73)),
        (PROSE.replace(" ", "… ", 8), ("ellipses per word", 8 / 65)),
        ("\n".join(f"- {line}." for line in PROSE.split(",")), ("lines that begin with a bullet", 1)),
        (PROSE.replace(", ", "...\n", 3), ("lines that end with an ellipsis", 3 / 4)),
        (PROSE + " 12,5" * 20, ("words with a letter", 65 / 85)),
        (re.sub(r"\b(the|to|and|that|have|with|of|be)\b", "nor", PROSE, flags=re.IGNORECASE), ("too few stop words", 0)),
        ("\n".join([PROSE, "A line.", "A line.", "A line.", "A line."]), ("repeated lines", 3 / 5)),
        (f"{PROSE}\n\n{PROSE}", ("repeated paragraphs", 1 / 2)),
    ],
)
def test_gopher_rules_by_hand(text, broken):
    if broken is None:
        assert gopher(text) is None
    else:
        assert gopher(text) == (broken[0], pytest.approx(broken[1]))


def test_c4_keeps_sentences():
    good = [f"Line number {word} ends as a line does." for word in ("one", "two", "three", "four", "five")]
    bad = [
        "No end of a sentence",
        "Two words.",
        "It goes on...",
        "Please enable JavaScript here.",
        "Our privacy policy applies.",
    ]
    assert c4("\n".join(sum(zip(good, bad, strict=True), ()))) == ("\n".join(good), None)
    assert c4("\n".join(good[:4]))[1] == ("too few sentences", 4)
    assert c4("One is here. Two is here! Is three? " * 2)[1] is None
    assert c4("\n".join(good) + " {")[1] == ("a curly bracket", 1)
    assert c4("Lorem Ipsum dolor.")[1] == ("lorem ipsum", 1)


OTHER = {
    "de": "Die Fischer steigen jeden Morgen auf den Hügel und sehen nach, ob die Boote mit ihren Netzen zurückgekommen sind.",
    "fr": "Les pêcheurs montent chaque matin sur la colline pour voir si les bateaux sont revenus avec leurs filets pleins.",
    "ru": "Каждое утро рыбаки поднимаются на холм, чтобы посмотреть, вернулись ли лодки и полны ли сети рыбы.",
    "en": PROSE,
}


@pytest.mark.parametrize("language", OTHER)
def test_languages_are_those_of_py3langid(language):
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    theirs = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True).classify(OTHER[language])
    found, probability = languages().detect(OTHER[language])
    assert found == theirs[0] == language
    assert probability == pytest.approx(theirs[1], abs=1e-4)


def test_a_text_without_letters_is_of_no_language():
    assert languages().detect("12 34 -- 56")[1] < 0.5
    assert languages().detect("")[1] < 0.5


def jaccard(left, right):
    left, right = ({" ".join(words[i : i + 5]) for i in range(len(words) - 4)} for words in (left, right))
    return len(left & right) / len(left | right)


def test_signatures_agree_as_often_as_the_sets_of_n_grams_do():
    """The mean of many estimates is the Jaccard similarity, their spread what independent hash functions have."""
    generator = np.random.default_rng(0)
    minhash, errors, expected = MinHash(64, 8, 5), [], []
    for changes in (1, 3, 8, 20):
        for _ in range(25):
            words = [f"w{i}" for i in generator.integers(0, 10**9, 150)]
            other = list(words)
            for at in generator.choice(150, changes, replace=False):
                other[at] = "changed"
            similarity = jaccard(words, other)
            left, right = (minhash.signature(" ".join(text)) for text in (words, other))
            errors.append((left == right).mean() - similarity)
            expected.append(similarity * (1 - similarity) / 512)
    assert abs(np.mean(errors)) < 3 * np.sqrt(np.mean(expected) / len(errors))
    assert np.mean(np.square(errors)) == pytest.approx(np.mean(expected), rel=0.5)


def test_bands_are_equal_as_often_as_they_should():
    """s^r of the bands."""
    generator = np.random.default_rng(1)
    minhash, equal, expected = MinHash(50, 4, 1), [], []
    for _ in range(100):
        words = [f"w{i}" for i in generator.integers(0, 10**9, 100)]
        other = words[:90] + [f"x{i}" for i in generator.integers(0, 10**9, 10)]
        equal.append((minhash.keys(" ".join(words)) == minhash.keys(" ".join(other))).mean())
        expected.append((90 / len({*words, *other})) ** 4)
    assert np.mean(equal) == pytest.approx(np.mean(expected), abs=0.02)
    assert chance(0.8, 14, 8) == pytest.approx(0.9236, abs=1e-4)


def test_a_signature_is_the_least_of_each_hash_function():
    minhash = MinHash(3, 2, 2)
    hashes = shingles(word_hashes("one two three two"), 2)
    assert len(hashes) == 3
    functions = zip(minhash.factors.tolist(), minhash.offsets.tolist(), strict=True)
    table = [[(factor * x + offset) % 2**64 >> 32 for x in hashes.tolist()] for factor, offset in functions]
    assert minhash.signature("One; two three... TWO").tolist() == [min(row) for row in table]
    assert len(set(minhash.keys("one two three two").tolist())) == 3


def test_short_texts_have_one_shingle_and_those_without_words_none():
    minhash = MinHash(2, 2, 5)
    assert (minhash.keys("one two") == minhash.keys("One, two!")).all()
    assert (minhash.keys("one two") != minhash.keys("one two three")).all()
    assert minhash.keys("...") is None


def test_exact_copies_are_those_with_other_spaces():
    assert exact_key("a  b\n") == exact_key(" a b")
    assert exact_key("a b") != exact_key("a B")


ANYTHING = st.text(st.characters(codec="utf-8"), max_size=60)
LONG = st.lists(st.one_of(st.sampled_from(PROSE.split()), ANYTHING), max_size=80).map(" ".join)


@given(LONG | ANYTHING)
@settings(max_examples=200, deadline=None)
def test_no_text_is_too_strange(text):
    """Whatever it is, there is a verdict, and keys that are the same a second time."""
    cleaned, reason, _ = judge(text, Steps(language="", c4=True))
    assert reason is None or reason.split(":")[0] in ("empty", "c4", "gopher")
    gopher(cleaned)
    languages().detect(cleaned)
    signer = Signer(Steps())
    assert (signer.keys(cleaned) == signer.keys(cleaned)).all()
    assert len(signer.keys(cleaned)) == 15


def test_each_step_can_be_turned_off():
    off = Steps(unicode=False, language="", gopher=False)
    assert judge("schÃ¶n", off) == ("schÃ¶n", None, {})
    assert judge("schÃ¶n", Steps(language="", gopher=False)) == ("schön", None, {})
    assert judge("\ufeff\x00", Steps())[1] == "empty"
    assert judge(OTHER["de"], Steps())[1:] == ("language", {"language": "de", "probability": pytest.approx(1, abs=0.1)})
    assert judge("The cat sat on the mat and was glad of it.", Steps())[1:] == ("gopher: too few words", {"value": 11})
    assert judge(PROSE, Steps(c4=True))[1] == "c4: too few sentences"
    assert judge(PROSE, Steps()) == (PROSE, None, {})
