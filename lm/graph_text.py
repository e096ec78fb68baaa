"""Graph-search examples in natural language: a person who is one adjective becomes others by given rules.

    written = write(draw_graphs(task, seed=0, stage=16, indices=np.arange(512)))
    written.texts()[0]   # ("Suppose we have the following facts: If Amy is ...", ["obar", "lomki"])

`parse_prompt` reads such a prompt back, whoever wrote it.
"""

import functools
import hashlib
import json
import re
from itertools import pairwise, product
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
from faker.providers.person.en_US import Provider

from lm import text_kernels
from lm.graph_search import Graphs, Task, draw_graphs
from lm.text_kernels import FROM, NAME, STOP, TO

NAMES: dict[str, float] = dict(Provider.first_names)  # with the weights by which Faker draws them
PATTERNS = ("CV", "VC", "CVC", "CVV", "CCV", "VCV", "VCC")  # of a syllable; an adjective has two
LETTERS = {"V": "aeiou", "C": "".join(sorted(set(ascii_lowercase) - set("aeiou")))}
SENTENCES = (
    " If {name} is {a}, then {name} is {b}.",
    " If {name} is {a}, then they are {b}.",
    " If a person is {a}, they are {b}.",
    " Everyone that is {a} is {b}.",
    " If someone is {a}, then they are {b}.",
)
OPENING = "Suppose we have the following facts:"
QUESTION = " Given that {name} is {a}, and we want to prove {name} is {b}.\n\nProof: {name} is {a}. {name} is"
ANSWER = " {b}"
END = ""  # the piece after the answer: no text, but the end-of-sequence token


def fingerprint() -> str:
    """A SHA-256 that two installations share when the same draws give the same texts on both.

    It covers the words, the templates, and a sample of examples, so that a change of how graphs are drawn changes it too.
    """
    parts = [list(NAMES.items()), PATTERNS, LETTERS, SENTENCES, OPENING, QUESTION, ANSWER]
    task, indices = Task(max_input_size=96, max_lookahead=16), np.arange(16)
    written = [write(draw_graphs(task, 0, stage, indices, "fingerprint")) for stage in (1, 8, 16)]
    parts += [(batch.prompts(), batch.answers()) for batch in written]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prompt_digest(prompt: str | bytes) -> bytes:
    """16 bytes that stand for a prompt in a set of reserved ones (BLAKE2b)."""
    return hashlib.blake2b(prompt.encode() if isinstance(prompt, str) else prompt, digest_size=16).digest()


def _recipes() -> tuple[list[str], np.ndarray]:
    """The fixed pieces, and every template as numbers of pieces and NAME, FROM, TO, a row each, filled up with STOP.

    A name or adjective takes the space before it, as in tokenizers that join a space to the word after it.
    """
    slots = {" {name}": NAME, " {a}": FROM, " {b}": TO}
    pieces: dict[str, int] = {}
    rows = []
    for template in (*SENTENCES, OPENING, QUESTION, ANSWER):
        parts = [part for part in re.split(r"( \{\w+\})", template) if part]
        rows.append([slots[part] if part in slots else pieces.setdefault(part, len(pieces)) for part in parts])
    rows[-1].append(pieces.setdefault(END, len(pieces)))
    width = max(map(len, rows)) + 1
    return list(pieces), np.array([row + [STOP] * (width - len(row)) for row in rows], dtype=np.int64)


def _syllables() -> tuple[np.ndarray, np.ndarray]:
    """All syllables, the bytes of each as an integer, and where those of each pattern begin."""
    of_pattern = [["".join(letters) for letters in product(*(LETTERS[kind] for kind in pattern))] for pattern in PATTERNS]
    packed = [int.from_bytes(syllable.encode(), "little") for syllables in of_pattern for syllable in syllables]
    return np.array(packed, dtype=np.uint64), np.cumsum([0, *map(len, of_pattern)])


_FIXED, _RECIPES = _recipes()
_SYLLABLES, _PATTERN_OFFSETS = _syllables()
_CUMULATIVE = np.cumsum(list(NAMES.values())) / sum(NAMES.values())
_CUMULATIVE[-1] = 1.0
FIXED_PIECES = (*_FIXED, *(f" {name}" for name in NAMES))  # the pieces of a text that are no adjectives


class Pieces(NamedTuple):
    """Pieces of texts, as bytes or as ids: piece p is data[offsets[p] : offsets[p + 1]]."""

    data: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, pieces: list[np.ndarray]) -> "Pieces":
        """Lay arrays end to end."""
        return cls(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)]))

    def followed_by(self, more: "Pieces") -> "Pieces":
        """These pieces, then those."""
        return Pieces(np.concatenate([self.data, more.data]), np.concatenate([self.offsets, len(self.data) + more.offsets[1:]]))


_FIXED_BYTES = Pieces.of([np.frombuffer(piece.encode("ascii"), dtype=np.uint8) for piece in FIXED_PIECES])


class Written(NamedTuple):
    """The wording of a batch of graphs, as numbers of pieces: the fixed ones, then the adjectives of all vertices."""

    graphs: Graphs
    adjectives: Pieces  # each with the space before it, as bytes
    numbers: np.ndarray  # of the pieces of all examples: prompt, answer, END
    offsets: np.ndarray  # where those of each example begin, and the end

    def __len__(self) -> int:
        return len(self.graphs.lookahead)

    def join(self, fixed: Pieces, adjectives: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """All examples end to end in the given form of the pieces, and where each begins."""
        return text_kernels.join(*fixed.followed_by(adjectives), self.numbers, self.offsets)

    @property
    def answer_pieces(self) -> np.ndarray:
        """The number, among the adjectives, of each example's answer."""
        return self.graphs.vertex_offsets[:-1] + self.graphs.label

    def prompts(self) -> list[str]:
        """The text of each example up to its answer."""
        data, offsets = self.join(_FIXED_BYTES, self.adjectives)
        text = data.tobytes().decode("ascii")
        answer = self.answer_pieces
        ends = offsets[1:] - (self.adjectives.offsets[answer + 1] - self.adjectives.offsets[answer])
        return [text[begin:end] for begin, end in zip(offsets[:-1].tolist(), ends.tolist(), strict=True)]

    def answers(self) -> list[list[str]]:
        """The adjectives of each example's right answers, the one drawn as its label first."""
        words = self.adjectives.data.tobytes().decode("ascii").split()
        first, offsets, answers = (
            values.tolist() for values in (self.graphs.vertex_offsets, self.graphs.answer_offsets, self.graphs.answers)
        )
        return [[words[first[i] + vertex] for vertex in answers[begin:end]] for i, (begin, end) in enumerate(pairwise(offsets))]


def write(graphs: Graphs) -> Written:
    """Draw the words of these graphs, each example from its own generator (which this moves on), and lay them out."""
    names, templates, words = text_kernels.draw_words(
        graphs.states,
        graphs.edge_offsets,
        graphs.vertex_offsets,
        _CUMULATIVE,
        len(SENTENCES),
        _SYLLABLES,
        _PATTERN_OFFSETS,
    )
    numbers, offsets = text_kernels.lay_out(
        _RECIPES,
        graphs.edges,
        graphs.edge_offsets,
        graphs.vertex_offsets,
        graphs.goal,
        graphs.label,
        names,
        templates,
        len(_FIXED),
        len(FIXED_PIECES),
    )
    return Written(graphs, Pieces(*text_kernels.spell(words)), numbers, offsets)


class Parsed(NamedTuple):
    """What a prompt says; vertices are adjectives. `path` runs from the start to the current vertex."""

    name: str
    edges: list[tuple[str, str]]
    start: str
    goal: str
    path: list[str]


_PROMPT = re.compile(
    re.escape(OPENING) + r"(?P<facts>.*) Given that (?P<name>\S+) is (?P<start>\w+), and we want to prove (?P=name) is "
    r"(?P<goal>\w+)\.\n\nProof:(?P<path>(?: (?P=name) is \w+\.)+) (?P=name) is"
)


@functools.cache
def _sentence(name: str) -> re.Pattern:
    """One sentence about `name`: the two adjectives are in the groups of whichever template it is."""
    templates = [re.escape(template).replace(r"\{name\}", re.escape(name)) for template in SENTENCES]
    return re.compile("|".join(re.sub(r"\\\{[ab]\\\}", r"(\\w+)", template) for template in templates))


def parse_prompt(text: str) -> Parsed:
    """Read a prompt back: the inverse of writing one, also when its proof has gone some steps already.

    Raises: ValueError if `text` is no such prompt, saying which part is not.
    """
    found = _PROMPT.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r:.80} is no prompt, '{OPENING} ... Proof: NAME is WORD. NAME is' is needed: check its source")
    name, facts = found["name"], found["facts"]
    edges, end = [], 0
    for sentence in _sentence(name).finditer(facts):
        if sentence.start() != end:
            break
        edges.append(tuple(word for word in sentence.groups() if word))
        end = sentence.end()
    if end != len(facts):
        raise ValueError(f"{facts[end:]!r:.80} is no fact about {name}, as in '{SENTENCES[-1]}': check the prompt's source")
    path = re.findall(r" is (\w+)\.", found["path"])
    if path[0] != found["start"] or any(step not in edges for step in pairwise(path)):
        raise ValueError(f"the proof {found['path']!r:.80} does not follow the facts from {found['start']}: check its source")
    return Parsed(name, edges, found["start"], found["goal"], path)


def describe(prompt: str, answers: list[str]) -> tuple[int, int]:
    """The lookahead that a prompt asks for, and how many children its current vertex has, whoever wrote it.

    The lookahead is that of the answers on a shortest path to the goal, the largest if they differ.

    Raises: ValueError as `parse_prompt` does, or if no answer is a step that leads to the goal.
    """
    parsed = parse_prompt(prompt)
    children: dict[str, list[str]] = {}
    for source, target in parsed.edges:
        children.setdefault(source, []).append(target)
    nexts = children.get(parsed.path[-1], [])
    distances = {answer: _distance(children, answer, parsed.goal) for answer in answers if answer in nexts}
    reaching = [distance for distance in distances.values() if distance is not None]
    if not reaching:
        raise ValueError(f"none of the answers {answers} leads from {parsed.path[-1]} to {parsed.goal}: check their source")
    shortest = [answer for answer, distance in distances.items() if distance == min(reaching)]
    return max(_lookahead(children, nexts, answer, parsed.goal) for answer in shortest), len(nexts)


def _distance(children: dict[str, list[str]], source: str, goal: str) -> int | None:
    """How many edges the shortest path from `source` to `goal` has; None if there is no path."""
    seen, frontier, distance = {source}, {source}, 0
    while frontier and goal not in frontier:
        frontier = {child for vertex in frontier for child in children.get(vertex, ())} - seen
        seen |= frontier
        distance += 1
    return distance if frontier else None


def _lookahead(children: dict[str, list[str]], nexts: list[str], answer: str, goal: str) -> int:
    """How many steps on a search from `nexts` stands only on what `answer` leads to, or at the goal."""
    seen, right, wrong, lookahead = set(nexts), {answer}, set(nexts) - {answer}, 0
    while wrong:
        lookahead += 1
        if goal in right | wrong:
            break
        reached = {child for vertex in right for child in children.get(vertex, ())} - seen
        wrong = {child for vertex in wrong for child in children.get(vertex, ())} - seen - reached
        right = reached
        seen |= right | wrong
    return lookahead
