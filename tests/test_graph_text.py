import itertools
import re
from collections import Counter

import numpy as np
import pytest
from faker.providers.person.en_US import Provider
from text import byte_level_bpe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lm import graph_text
from lm.graph_search import Task, draw_graphs
from lm.graph_text import NAMES, Parsed, describe, fingerprint, parse_prompt, write
from lm.graph_tokens import Encoder, check_tokenizer
from lm.tokenizer import encode_documents, load_tokenizer

MIDDLE, LARGE = Task(96, 16), Task(384, 64)


@pytest.fixture(scope="module")
def written():
    """4,000 examples of the last stage."""
    return write(draw_graphs(MIDDLE, 0, 16, np.arange(4000)))


def read(prompt):
    """(name, [(template, from, to)], start, goal) of a prompt, by splitting it at fixed words."""
    opening = "Suppose we have the following facts: "
    assert prompt.startswith(opening)
    facts, question = prompt.removeprefix(opening).split(" Given that ")
    name, _, start, *_ = question.split()
    goal = question.split(f"prove {name} is ")[1].split(".")[0]
    start = start.removesuffix(",")
    tail = f"{name} is {start}, and we want to prove {name} is {goal}.\n\nProof: {name} is {start}. {name} is"
    assert question == tail
    rules = []
    for fact in facts.removesuffix(".").split(". "):
        words = fact.replace(",", "").split()
        if words[0] == "Everyone":
            _, _, _, source, _, target = words
            rules.append((f"Everyone that is {source} is {target}", source, target))
        else:
            source, target = words[words.index("is") + 1], words[-1]
            rules.append((fact, source, target))
    forms = {
        "If NAME is A, then NAME is B": 0,
        "If NAME is A, then they are B": 1,
        "If a person is A, they are B": 2,
        "Everyone that is A is B": 3,
        "If someone is A, then they are B": 4,
    }
    shape = [re.sub(f"{name}(?= is)", "NAME", rule.replace(f" {a}", " A").replace(f" {b}", " B")) for rule, a, b in rules]
    return name, [(forms[form], a, b) for form, (_, a, b) in zip(shape, rules, strict=True)], start, goal


def graph_words(written):
    """The adjectives of each example's vertices, cut from the bytes that the texts are made of."""
    words = written.adjectives.data.tobytes().decode().split()
    offsets = written.graphs.vertex_offsets
    return [words[begin:end] for begin, end in itertools.pairwise(offsets)]


def assert_shares(counts, shares):
    """Each count is within 5.5 standard errors of its share of the total."""
    total = sum(counts.values())
    for key, share in shares.items():
        assert abs(counts[key] - total * share) < 5.5 * (total * share * (1 - share)) ** 0.5 + 1, key
    assert sum(counts[key] for key in shares) == total


def test_the_first_example_is_this_one():
    """No law but a promise: runs can be repeated, and read by other versions, while it stays."""
    first = write(draw_graphs(Task(24, 4), 0, 4, np.arange(1)))
    assert first.prompts() == [
        "Suppose we have the following facts: If Whitney is utwge, then Whitney is muuyo. If someone is ucmude, then they are "
        "wyaqbe. If someone is wyaqbe, then they are sioumq. If someone is ucmude, then they are utwge. Given that Whitney is "
        "ucmude, and we want to prove Whitney is muuyo.\n\nProof: Whitney is ucmude. Whitney is"
    ]
    assert first.answers() == [["utwge"]]


def test_a_text_says_the_graphs_edges_in_their_order_and_asks_from_its_start_to_its_goal(written):
    graphs = written.graphs
    for i, (prompt, answers, words) in enumerate(zip(written.prompts(), written.answers(), graph_words(written), strict=True)):
        _, rules, start, goal = read(prompt)
        edges = graphs.edges[graphs.edge_offsets[i] : graphs.edge_offsets[i + 1]].tolist()
        assert [rule[1:] for rule in rules] == [(words[source], words[target]) for source, target in edges]
        assert (start, goal) == (words[0], words[graphs.goal[i]])
        right = graphs.answers[graphs.answer_offsets[i] : graphs.answer_offsets[i + 1]]
        assert answers == [words[vertex] for vertex in right]
        assert answers[0] == words[graphs.label[i]]
        assert len(set(words)) == len(words)


def test_adjectives_are_two_syllables_of_the_seven_patterns(written):
    words = [word for words in graph_words(written) for word in words]
    assert len(words) > 80_000
    assert_shares(Counter(map(len, words)), {4: 4 / 49, 5: 20 / 49, 6: 25 / 49})
    kinds = Counter(re.sub("[aeiou]", "V", re.sub("[^aeiou]", "C", word)) for word in words)
    patterns = ("CV", "VC", "CVC", "CVV", "CCV", "VCV", "VCC")
    assert_shares(kinds, {k: n / 49 for k, n in Counter(one + two for one in patterns for two in patterns).items()})
    letters = Counter("".join(words))
    vowels, consonants = ({x: n for x, n in letters.items() if (x in "aeiou") == vowel} for vowel in (True, False))
    assert_shares(Counter(vowels), dict.fromkeys("aeiou", 1 / 5))
    assert_shares(Counter(consonants), dict.fromkeys("bcdfghjklmnpqrstvwxyz", 1 / 21))


def test_adjectives_of_an_example_are_unlike_each_other_even_when_few_are_left(monkeypatch):
    monkeypatch.setattr(graph_text, "_SYLLABLES", graph_text._SYLLABLES[:6])  # 36 words for up to 30 vertices
    monkeypatch.setattr(graph_text, "_PATTERN_OFFSETS", np.array([0, 6]))
    examples = graph_words(write(draw_graphs(MIDDLE, 0, 16, np.arange(500))))
    assert max(map(len, examples)) == 30
    assert all(len(set(words)) == len(words) for words in examples)


def test_names_are_drawn_as_faker_weights_them_and_templates_evenly():
    names, templates = Counter(), Counter()
    for first in range(0, 20_000, 5000):
        for prompt in write(draw_graphs(MIDDLE, 1, 3, np.arange(first, first + 5000))).prompts():
            name, rules, *_ = read(prompt)
            names[name] += 1
            templates.update(rule[0] for rule in rules)
    weights = Provider.first_names
    assert len(weights) == len(NAMES) == 690
    assert_shares(names, {name: weight / sum(weights.values()) for name, weight in weights.items()})
    assert_shares(templates, dict.fromkeys(range(5), 0.2))


def test_fingerprint_changes_with_names_weights_and_templates(monkeypatch):
    before = fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert fingerprint() == before
    for name, value in (("NAMES", NAMES | {"Aaron": 0.5}), ("SENTENCES", graph_text.SENTENCES[:4]), ("PATTERNS", ("CV",))):
        with monkeypatch.context() as patch:
            patch.setattr(graph_text, name, value)
            assert fingerprint() != before


def test_fingerprint_changes_with_the_graphs_that_are_drawn(monkeypatch):
    before, draw = fingerprint(), graph_text.draw_graphs
    monkeypatch.setattr(graph_text, "draw_graphs", lambda task, seed, *rest: draw(task, seed + 1, *rest))
    assert fingerprint() != before


def test_a_parsed_prompt_gives_back_what_was_written(written):
    for prompt in written.prompts()[:1000]:
        name, rules, start, goal = read(prompt)
        assert parse_prompt(prompt) == Parsed(name, [rule[1:] for rule in rules], start, goal, [start])


def test_prompts_with_a_longer_proof_are_read_too():
    facts = "If Amy is aba, then Amy is obo. Everyone that is obo is ulu. If someone is aba, then they are iki."
    opening = f"Suppose we have the following facts: {facts} Given that Amy is aba, and we want to prove Amy is ulu.\n\nProof:"
    edges = [("aba", "obo"), ("obo", "ulu"), ("aba", "iki")]
    prompt = f"{opening} Amy is aba. Amy is obo. Amy is"
    assert parse_prompt(prompt) == Parsed("Amy", edges, "aba", "ulu", ["aba", "obo"])
    assert describe(prompt, ["ulu"]) == (0, 1)
    assert describe(f"{opening} Amy is aba. Amy is", ["obo"]) == (1, 2)


def test_search_ends_where_branches_meet():
    edges = [("aba", "obo"), ("aba", "iki"), ("obo", "ulu"), ("iki", "ulu"), ("ulu", "eme")]
    facts = " ".join(f"Everyone that is {source} is {target}." for source, target in edges)
    question = "Given that Amy is aba, and we want to prove Amy is eme.\n\nProof: Amy is aba. Amy is"
    prompt = f"Suppose we have the following facts: {facts} {question}"
    assert describe(prompt, ["obo", "iki"]) == (1, 2), "both lead to ulu, one step on, so either will do"
    longer = prompt.replace("Everyone that is iki is ulu", "Everyone that is iki is ovo")
    assert describe(longer, ["obo"]) == (2, 2), "iki's branch ends two steps on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text[1:],
            "is no prompt, 'Suppose we have the following facts: ... Proof: NAME is WORD. NAME is' is needed",
        ),
        (lambda text: text + " ", "is no prompt"),
        (
            lambda text: text.replace("Everyone that", "Anyone who"),
            r"' Anyone who is obo is ulu\..*is no fact about Amy, as in",
        ),
        (lambda text: text.replace("If Amy", "If Bob"), "' If Bob is aba.* is no fact about Amy"),
        (lambda text: text.replace("Proof: Amy is aba", "Proof: Amy is obo"), "does not follow the facts from aba"),
        (lambda text: text.replace("Proof: Amy is aba.", "Proof: Amy is aba. Amy is ulu."), "does not follow the facts"),
    ],
)
def test_a_text_that_is_no_prompt_is_refused_naming_the_part(change, message):
    text = (
        "Suppose we have the following facts: If Amy is aba, then Amy is obo. Everyone that is obo is ulu. Given that Amy is "
        "aba, and we want to prove Amy is ulu.\n\nProof: Amy is aba. Amy is"
    )
    assert parse_prompt(text).path == ["aba"]
    with pytest.raises(ValueError, match=message):
        parse_prompt(change(text))


@pytest.mark.parametrize(("task", "stage"), [(MIDDLE, 1), (MIDDLE, 9), (MIDDLE, 16), (LARGE, 64)])
def test_description_of_a_text_is_the_lookahead_and_the_children_drawn(task, stage):
    graphs = draw_graphs(task, 2, stage, np.arange(1000))
    texts = write(graphs)
    described = [describe(prompt, answers) for prompt, answers in zip(texts.prompts(), texts.answers(), strict=True)]
    assert described == list(zip(graphs.lookahead.tolist(), graphs.num_children.tolist(), strict=True))
    with pytest.raises(ValueError, match=r"none of the answers \['nothing'\] leads from \w+ to \w+"):
        describe(texts.prompts()[0], ["nothing"])


def whole_ids(tokenizer, written):
    """Each prompt with its answer, as one text, by the tokenizer; then the end of sequence."""
    texts = [f"{prompt} {answers[0]}" for prompt, answers in zip(written.prompts(), written.answers(), strict=True)]
    return [[*ids.tolist(), tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]


def assert_same_ids(tokenizer, encoder, written):
    ids, answer_tokens = encoder.encode(written)
    assert [row.tolist() for row in ids] == whole_ids(tokenizer, written)
    answers = encode_documents(tokenizer, [f" {answers[0]}" for answers in written.answers()])
    assert answer_tokens.tolist() == [len(answer) + 1 for answer in answers]
    assert ids[0].dtype == np.int32


@pytest.mark.parametrize("name", ["neox", "byte_level_bpe"])
def test_ids_from_pieces_are_the_tokenizers_own(name, neox_tokenizer_dir, written):
    tokenizer = load_tokenizer(neox_tokenizer_dir) if name == "neox" else byte_level_bpe()
    encoder = Encoder(tokenizer)
    assert encoder.by_pieces
    assert_same_ids(tokenizer, encoder, written)
    assert_same_ids(tokenizer, encoder, write(draw_graphs(MIDDLE, 0, 1, np.arange(2000))))
    assert_same_ids(tokenizer, encoder, write(draw_graphs(LARGE, 0, 64, np.arange(200))))


def across_spaces(*merges: tuple[str, str], eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """A byte-level BPE that does not split texts into words first, so that its merges reach across spaces ("Ġ")."""
    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


@pytest.mark.parametrize("merge", [(".", "Ġ"), ("a", "Ġ")])  # at the end of a sentence; between adjectives on their own
def test_a_tokenizer_that_joins_words_gets_whole_texts_and_says_so(merge, capsys):
    tokenizer = across_spaces(merge)
    encoder = Encoder(tokenizer)
    assert not encoder.by_pieces
    assert capsys.readouterr().out == (
        "the tokenizer joins tokens across words: examples are encoded as whole texts, which is slower\n"
    )
    assert_same_ids(tokenizer, encoder, write(draw_graphs(MIDDLE, 0, 16, np.arange(300))))


def test_whole_texts_are_encoded_when_adjectives_cannot_be_told_apart():
    tokenizer = byte_level_bpe()
    encoder = Encoder(tokenizer)
    encoder._begins_word[tokenizer.convert_tokens_to_ids("e")] = True
    assert_same_ids(tokenizer, encoder, write(draw_graphs(MIDDLE, 0, 16, np.arange(300))))


def test_tokenizers_that_cannot_tell_the_answer_from_the_prompt_are_refused():
    with pytest.raises(ValueError, match=r"splits the answer differently after a space: ' \w+' is \['Ġ', .* take a byte-level"):
        check_tokenizer(across_spaces(("s", "Ġ")))
    with pytest.raises(ValueError, match="the tokenizer has no end-of-sequence token, an answer needs one to end"):
        check_tokenizer(across_spaces(eos=None))
    check_tokenizer(across_spaces())
