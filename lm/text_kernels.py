"""The compiled loops that word graphs and lay out texts and ids: see lm.graph_text for what they write."""

import numpy as np

from lm.xoshiro import below, compiled, random_bits

NAME, FROM, TO, STOP = -1, -2, -3, -4  # in a recipe: the name, an edge's source and target; other entries are fixed pieces

_uint64 = np.uint64


@compiled
def draw_words(states, edge_at, vertex_at, name_cumulative, num_templates, syllables, patterns):
    """A name for each example, a template for each edge and an adjective for each vertex, no two alike in an example.

    `syllables` holds the letters of each syllable as bytes of an integer, those of pattern p from patterns[p] on.
    Adjectives come back in the same form, uint64.
    """
    names = np.empty(len(states), np.int64)
    templates = np.empty(edge_at[-1], np.int64)
    words = np.empty(vertex_at[-1], np.uint64)
    for i in range(len(states)):
        state = states[i]
        uniform = np.float64(random_bits(state) >> _uint64(11)) * 2.0**-53
        names[i] = np.searchsorted(name_cumulative, uniform, side="right")
        for edge in range(edge_at[i], edge_at[i + 1]):
            templates[edge] = below(state, num_templates)
        at = vertex_at[i]
        while at < vertex_at[i + 1]:
            first = _draw_syllable(state, syllables, patterns)
            second = _draw_syllable(state, syllables, patterns)
            letters = _uint64(16) if first < _uint64(1 << 16) else _uint64(24)
            words[at] = first | (second << letters)
            known = False
            for other in range(vertex_at[i], at):
                known |= words[other] == words[at]
            at += not known
    return names, templates, words


@compiled
def _draw_syllable(state, syllables, patterns):
    pattern = below(state, len(patterns) - 1)
    return syllables[patterns[pattern] + below(state, patterns[pattern + 1] - patterns[pattern])]


@compiled
def spell(words):
    """The bytes of each word with a space before it, and where each begins (one more entry than words)."""
    data, starts = np.empty(9 * len(words), np.uint8), np.zeros(len(words) + 1, np.int64)
    end = 0
    for i in range(len(words)):
        left = words[i]
        data[end] = 32
        end += 1
        while left:
            data[end] = left & _uint64(255)
            left >>= _uint64(8)
            end += 1
        starts[i + 1] = end
    return data[:end].copy(), starts


@compiled
def lay_out(recipes, edges, edge_at, vertex_at, goals, labels, names, templates, first_name, first_word):
    """The numbers of the pieces that each example is made of, and where each example begins.

    A row of `recipes` is a template: first those of the edges, then the opening, the question and the answer.
    """
    opening = len(recipes) - 3
    numbers = np.empty((len(edges) + 3 * len(goals)) * recipes.shape[1], np.int64)
    starts = np.zeros(len(goals) + 1, np.int64)
    end = 0
    for i in range(len(goals)):
        name, word = first_name + names[i], first_word + vertex_at[i]
        end = _follow(recipes[opening], numbers, end, name, word, word)
        for edge in range(edge_at[i], edge_at[i + 1]):
            end = _follow(recipes[templates[edge]], numbers, end, name, word + edges[edge, 0], word + edges[edge, 1])
        end = _follow(recipes[opening + 1], numbers, end, name, word, word + goals[i])
        end = _follow(recipes[opening + 2], numbers, end, name, word, word + labels[i])
        starts[i + 1] = end
    return numbers[:end].copy(), starts


@compiled
def _follow(recipe, numbers, end, name, source, target):
    for entry in recipe:
        if entry == STOP:
            break
        if entry == NAME:
            entry = name
        elif entry == FROM:
            entry = source
        elif entry == TO:
            entry = target
        numbers[end] = entry
        end += 1
    return end


@compiled
def join(data, piece_at, numbers, starts):
    """The pieces of each example one after another, and where each example begins.

    Piece p is data[piece_at[p] : piece_at[p + 1]]; the result has the dtype of `data`.
    """
    joined_at = np.zeros(len(starts), np.int64)
    total = 0
    for i in range(len(starts) - 1):
        for number in numbers[starts[i] : starts[i + 1]]:
            total += piece_at[number + 1] - piece_at[number]
        joined_at[i + 1] = total
    joined = np.empty(total, data.dtype)
    end = 0
    for number in numbers:
        for at in range(piece_at[number], piece_at[number + 1]):
            joined[end] = data[at]
            end += 1
    return joined, joined_at
