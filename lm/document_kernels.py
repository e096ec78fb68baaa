"""The compiled loops over the characters and words of a document: hashes of words, n-grams, MinHash, repetition, look-ups.

Hashes are uint64. A table is a pair of uint64 arrays of one length, keys and values, with a value of 0 where nothing is.
"""

import sys
import unicodedata
from functools import cache

import numpy as np

from lm.xoshiro import compiled

WORD, DROPPED, SPACE, ALPHA = 1, 2, 4, 8  # what a character is, as bits

_uint64 = np.uint64


@cache
def kinds() -> np.ndarray:
    """What each character is: (1,114,112,) uint8. Takes a quarter of a second.

    WORD is what words are made of: letters, marks, numbers. DROPPED may stand within one without a trace: apostrophes, and the
    invisible characters of category Cf. SPACE and ALPHA are str.isspace and str.isalpha.
    """
    categories = np.array([unicodedata.category(chr(point)) for point in range(sys.maxunicode + 1)], "S2")
    first = categories.astype("S1")
    found = (WORD * np.isin(first, [b"L", b"M", b"N"]) + ALPHA * (first == b"L")).astype(np.uint8)
    found[categories == b"Cf"] = DROPPED
    for apostrophe in (0x27, 0x2019, 0x2BC):
        found[apostrophe] = DROPPED + found[apostrophe] // ALPHA * ALPHA
    found[[point for point in np.flatnonzero(np.isin(first, [b"Z", b"C"])).tolist() if chr(point).isspace()]] = SPACE
    return found


def code_points(text: str) -> np.ndarray:
    """The characters of a text as numbers, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@compiled
def mixed(value):
    """A bijection of uint64 that makes every bit depend on all (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> _uint64(30))) * _uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> _uint64(27))) * _uint64(0x94D049BB133111EB)
    return value ^ (value >> _uint64(31))


@compiled
def extended(gram, word):
    """The hash of a sequence of words from that of all but the last."""
    return mixed((gram ^ word) * _uint64(0x9E3779B97F4A7C15) + _uint64(1))


@compiled
def split_words(points, kind_of):
    """The hash of each word, and where it begins and ends: runs of WORD characters, DROPPED ones left out (FNV-1a)."""
    hashes = np.empty(len(points) // 2 + 1, np.uint64)
    spans = np.empty((len(points) // 2 + 1, 2), np.int64)
    count, value, length = 0, _uint64(0xCBF29CE484222325), 0
    for at in range(len(points) + 1):
        kind = kind_of[points[at]] if at < len(points) else 0
        if kind & WORD:
            if length == 0:
                spans[count, 0] = at
            value = (value ^ _uint64(points[at])) * _uint64(0x100000001B3)
            length += 1
        elif length and not kind & DROPPED:
            hashes[count], spans[count, 1] = mixed(value), at
            count, value, length = count + 1, _uint64(0xCBF29CE484222325), 0
    return hashes[:count].copy(), spans[:count].copy()


@compiled
def grams(words, length):
    """The hash of each run of `length` words."""
    found = np.empty(max(len(words) - length + 1, 0), np.uint64)
    for at in range(len(found)):
        gram = _uint64(length)
        for word in words[at : at + length]:
            gram = extended(gram, word)
        found[at] = gram
    return found


@compiled
def minima(shingles, factors, offsets):
    """The MinHash signature: for each hash function, the high 32 bits of factor * shingle + offset, the least over shingles."""
    signature = np.full(len(factors), 0xFFFFFFFF, np.uint32)
    for shingle in shingles:
        for i in range(len(factors)):
            value = np.uint32((factors[i] * shingle + offsets[i]) >> _uint64(32))
            if value < signature[i]:
                signature[i] = value
    return signature


@compiled
def band_keys(signature, num_bands):
    """A hash of each band of the signature, which is cut into `num_bands` parts of the same length."""
    rows = len(signature) // num_bands
    keys = np.empty(num_bands, np.uint64)
    for band in range(num_bands):
        key = _uint64(0)
        for value in signature[band * rows : (band + 1) * rows]:
            key = extended(key, _uint64(value))
        keys[band] = key
    return keys


@compiled
def _slot(keys, values, key):
    """Where in the table the key is, or could be put."""
    slot = np.int64(((key & _uint64(0xFFFFFFFF)) * _uint64(len(keys))) >> _uint64(32))
    while values[slot] != 0 and keys[slot] != key:
        slot += 1
        if slot == len(keys):
            slot = 0
    return slot


@compiled
def put_first(keys, values, new_keys, new_values):
    """Put into the table what it does not have yet, one after the other; for each new key the value that it has then.

    There must be room: more slots (below 2**32) than keys. Values are not 0.
    """
    found = np.empty(len(new_keys), np.uint64)
    for i in range(len(new_keys)):
        slot = _slot(keys, values, new_keys[i])
        if values[slot] == 0:
            keys[slot], values[slot] = new_keys[i], new_values[i]
        found[i] = values[slot]
    return found


@compiled
def find_gram(words, lengths, keys, values):
    """(first word, number of words, value) of the first run of words that the table has, the shortest of its `lengths` there.

    Args: lengths: int64, ascending. Returns: (-1, 0, 0) if there is none.
    """
    for at in range(len(words)):
        which = 0
        for length in range(1, min(lengths[-1], len(words) - at) + 1):
            if length != lengths[which]:
                continue
            gram = _uint64(length)
            for word in words[at : at + length]:
                gram = extended(gram, word)
            slot = _slot(keys, values, gram)
            if values[slot] != 0:
                return at, length, values[slot]
            which += 1
            if which == len(lengths):
                break
    return -1, 0, _uint64(0)


@compiled
def tokens(points, kind_of):
    """What stands between spaces: the hash and the length of each, and how many have a letter."""
    hashes, lengths = np.empty(len(points) // 2 + 1, np.uint64), np.empty(len(points) // 2 + 1, np.int64)
    count, value, length, alpha, num_alpha = 0, _uint64(0xCBF29CE484222325), 0, False, 0
    for at in range(len(points) + 1):
        kind = kind_of[points[at]] if at < len(points) else SPACE
        if not kind & SPACE:
            value = (value ^ _uint64(points[at])) * _uint64(0x100000001B3)
            length, alpha = length + 1, alpha or kind & ALPHA != 0
        elif length:
            hashes[count], lengths[count] = mixed(value), length
            num_alpha += alpha
            count, value, length, alpha = count + 1, _uint64(0xCBF29CE484222325), 0, False
    return hashes[:count].copy(), lengths[:count].copy(), num_alpha


@compiled
def top_gram_characters(words, word_lengths, n):
    """Characters, spaces between words too, in all occurrences of the commonest n-gram; of several, of the first of them."""
    found = grams(words, n)
    keys, values = np.zeros(2 * len(found) + 1, np.uint64), np.zeros(2 * len(found) + 1, np.uint64)
    counts, slots = np.zeros(len(keys), np.int64), np.empty(len(found), np.int64)
    for i in range(len(found)):
        slots[i] = _slot(keys, values, found[i])
        keys[slots[i]], values[slots[i]] = found[i], _uint64(1)
        counts[slots[i]] += 1
    best, characters = 0, 0
    for i in range(len(found)):
        if counts[slots[i]] > best:
            best = counts[slots[i]]
            characters = best * (word_lengths[i : i + n].sum() + n - 1)
    return characters


@compiled
def repeated_gram_characters(words, word_lengths, n):
    """Characters of words in n-grams that have occurred before, none counted twice."""
    found = grams(words, n)
    keys, values = np.zeros(2 * len(found) + 1, np.uint64), np.zeros(2 * len(found) + 1, np.uint64)
    at, characters = 0, 0
    while at < len(found):
        slot = _slot(keys, values, found[at])
        if values[slot] != 0:
            characters += word_lengths[at : at + n].sum()
            at += n
        else:
            keys[slot], values[slot] = found[at], _uint64(1)
            at += 1
    return characters


@compiled
def language_scores(data, next_state, row_base, feature_of, weights, counts):
    """The sum over features of log(1 + how often an automaton comes to it in the bytes of a text) * its weights, float32.

    Args: counts: of each feature, int64, all 0 before and after.
    """
    met, num_met, state = np.empty(len(data), np.int64), 0, 0
    for byte in data:
        state = next_state[row_base[state] + byte]
        feature = feature_of[state]
        if feature >= 0:
            if counts[feature] == 0:
                met[num_met] = feature
                num_met += 1
            counts[feature] += 1
    scores = np.zeros(weights.shape[1], np.float32)
    for feature in met[:num_met]:
        factor, row = np.float32(np.log(1.0 + counts[feature])), weights[feature]
        for language in range(len(scores)):
            scores[language] += factor * row[language]
        counts[feature] = 0
    return scores, num_met
