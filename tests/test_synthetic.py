import hashlib
import itertools
import json
import multiprocessing

import numpy as np
import pytest
from text import byte_level_bpe

from lm.external_generator import load_class
from lm.tokenizer import encode_documents
from synthetic import SyntheticExamples, Task, check_tokenizer, prompt_digest, share_too_long

TASK = Task(max_input_size=96, max_lookahead=16)

TOY = '''
from types import SimpleNamespace

class Toy:
    """Follows the published interface; the prompt tells what it was asked, and every third seed fails in some way."""

    def __init__(self, max_input_size, seed):
        self.size, self.seed, self.batches = max_input_size, seed, 0

    def generate_batch(self, kind, batch_size, reserved_inputs, alpha, max_lookahead):
        assert (kind, batch_size, reserved_inputs) == ("search", 1, set())
        self.batches += 1
        if self.seed % 3 == 0:
            return ([], None, [None], [SimpleNamespace(input_text="", output_texts=[])])[self.seed // 3 % 4]
        words = [f" {letter}ab" for letter in "xyz"]
        text = f"{self.size} {alpha} {max_lookahead} {self.batches} {self.seed} is"
        return [SimpleNamespace(input_text=text, output_texts=words)]

class NoMethod:
    pass

class Wrong(Toy):
    def generate_batch(self, *_, **__):
        return [SimpleNamespace(input_text=7, output_texts=["a"])]

class WrongWords(Toy):
    def generate_batch(self, *_, **__):
        return [SimpleNamespace(input_text="a", output_texts=["a", 3])]

class Nothing(Toy):
    def generate_batch(self, *_, **__):
        return []
'''


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The name of a module with the toy classes, importable here only."""
    (tmp_path / "toy_external.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    return "toy_external"


def prompts(**arguments):
    return [example["prompt"] for example in SyntheticExamples(TASK, **{"seed": 0, "stage": 16} | arguments).texts(0, 40)]


def digest_of_examples(start, count):
    """What `texts` gives, in a process of its own."""
    texts = SyntheticExamples(TASK, seed=5, stage=9).texts(start, count)
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def test_example_i_is_the_same_whatever_batch_it_comes_in(tokenizer):
    examples = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer)
    texts, tokenised = examples.texts(0, 400), examples.examples(0, 400)
    pieces = [(0, 1), (1, 126), (127, 2), (129, 271)]
    assert [example for start, count in pieces for example in examples.texts(start, count)] == texts
    in_pieces = [examples.examples(start, count) for start, count in pieces]
    assert [ids.tolist() for part in in_pieces for ids in part.ids] == [ids.tolist() for ids in tokenised.ids]
    assert np.array_equal(np.concatenate([part.answer_tokens for part in in_pieces]), tokenised.answer_tokens)
    assert [example["index"] for example in texts] == list(range(400))
    assert examples.texts(10**12, 1)[0]["index"] == 10**12
    assert examples.texts(3, 0) == examples.examples(3, 0).ids == []


def test_another_process_makes_the_same_examples():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest_of_examples, (1000, 50)) == digest_of_examples(1000, 50)


def test_another_seed_stage_or_purpose_gives_other_examples():
    drawn = [prompts(), prompts(seed=1), prompts(stage=15), prompts(purpose="validation")]
    assert [len(set(one) & set(two)) for one, two in itertools.combinations(drawn, 2)] == [0] * 6
    assert prompts() == drawn[0]


def test_ids_are_those_of_the_texts_with_the_end_of_sequence(tokenizer):
    examples = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer)
    texts, tokenised = examples.texts(50, 300), examples.examples(50, 300)
    whole = encode_documents(tokenizer, [example["prompt"] + example["answer"] for example in texts])
    assert [ids.tolist() for ids in tokenised.ids] == [[*ids.tolist(), tokenizer.eos_token_id] for ids in whole]
    answers = [
        tokenizer.decode(ids[-tokens:-1]) for ids, tokens in zip(tokenised.ids, tokenised.answer_tokens.tolist(), strict=True)
    ]
    assert answers == [example["answer"] for example in texts]
    assert tokenised.num_too_long == 0
    assert {ids.dtype.name for ids in tokenised.ids} == {"int32"}


def test_an_example_has_its_label_first_and_its_place_in_the_curriculum():
    for example in SyntheticExamples(TASK, seed=0, stage=4).texts(7, 20):
        assert set(example) == {"prompt", "answer", "output_texts", "alpha", "stage", "index"}
        assert example["answer"] == " " + example["output_texts"][0]
        assert (example["alpha"], example["stage"]) == (0.25, 4)


def test_reserved_prompts_never_come_out_and_the_other_examples_stay(tokenizer):
    examples = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer)
    before, chosen = examples.texts(0, 200), (3, 4, 130)
    reserved = frozenset(prompt_digest(before[i]["prompt"]) for i in chosen)
    careful = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer, reserved=reserved)
    after = careful.texts(0, 200)
    assert [i for i in range(200) if before[i] != after[i]] == list(chosen)
    assert not {prompt_digest(example["prompt"]) for example in after} & reserved
    ids = [row.tolist() for row in careful.examples(0, 200).ids]
    whole = encode_documents(tokenizer, [example["prompt"] + example["answer"] for example in after])
    assert ids == [[*row.tolist(), tokenizer.eos_token_id] for row in whole]
    twice = reserved | {prompt_digest(after[3]["prompt"])}
    again = SyntheticExamples(TASK, seed=0, stage=16, reserved=twice).texts(0, 200)
    assert [i for i in range(200) if after[i] != again[i]] == [3], "the second attempt may be reserved too"


def test_examples_longer_than_seq_len_are_drawn_anew_and_counted(tokenizer):
    free = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer)
    lengths = np.array([len(ids) for ids in free.examples(0, 300).ids])
    seq_len = int(np.sort(lengths)[150])
    limited = SyntheticExamples(TASK, seed=0, stage=16, tokenizer=tokenizer, seq_len=seq_len)
    tokenised = limited.examples(0, 300)
    assert max(len(ids) for ids in tokenised.ids) == seq_len
    one, two = free.texts(0, 300), limited.texts(0, 300)
    assert [i for i in range(300) if one[i] != two[i]] == np.flatnonzero(lengths > seq_len).tolist()
    assert tokenised.num_too_long > np.sum(lengths > seq_len), "some attempts are too long again"
    assert tokenised.num_too_long == sum(limited.examples(i, 1).num_too_long for i in range(300))
    assert [ids.tolist() for ids in tokenised.ids] == [limited.examples(i, 1).ids[0].tolist() for i in range(300)]
    assert share_too_long(TASK, 16, tokenizer, seq_len)[0] == pytest.approx(0.5, abs=0.1)


def test_share_too_long_counts_those_longer_and_gives_the_longest(tokenizer):
    lengths = [len(ids) for ids in SyntheticExamples(TASK, 0, 5, "lengths", tokenizer=tokenizer).examples(0, 100).ids]
    for seq_len in (sorted(lengths)[60], max(lengths), max(lengths) - 1):
        share = sum(length > seq_len for length in lengths) / 100
        assert share_too_long(TASK, 5, tokenizer, seq_len, sample=100) == (share, max(lengths))


def test_iteration_goes_on_from_current_index_with_the_stage_of_the_moment():
    examples = SyntheticExamples(TASK, seed=0)
    handed_out = list(itertools.islice(examples, 100))
    assert handed_out == examples.texts(0, 100)
    assert examples.current_index == 100
    rest = iter(examples)
    assert [next(rest)["index"] for _ in range(3)] == [100, 101, 102]
    examples.stage = 16
    assert examples.alpha == 1.0
    assert [next(rest) for _ in range(2)] == examples.texts(103, 2)
    examples.current_index = 7
    assert [next(rest) for _ in range(50)] == examples.texts(7, 50)
    assert examples.current_index == 57


def test_digest_of_a_prompt_is_16_bytes_of_blake2b():
    assert prompt_digest("Amy is") == prompt_digest(b"Amy is") == hashlib.blake2b(b"Amy is", digest_size=16).digest()


def test_all_faults_of_the_arguments_are_named_together(tokenizer):
    with pytest.raises(ValueError, match=r"(?s)--max_lookahead 0 is below 1.*\nseq_len 9 without a tokenizer, one is needed"):
        SyntheticExamples(Task(96, 0), seed=0, seq_len=9)
    with pytest.raises(ValueError, match="stage 17, but a task of max_lookahead 16 has 1 .. 16"):
        SyntheticExamples(TASK, seed=0, stage=17)
    examples = SyntheticExamples(TASK, seed=0)
    with pytest.raises(ValueError, match="stage 0, but a task of max_lookahead 16 has 1 .. 16"):
        examples.stage = 0
    assert examples.stage == 1
    with pytest.raises(ValueError, match=r"examples\(\) without a tokenizer, one is needed for ids"):
        examples.examples(0, 1)
    without_end = byte_level_bpe()
    without_end.eos_token = None
    for use in (check_tokenizer, lambda tokenizer: SyntheticExamples(TASK, seed=0, tokenizer=tokenizer)):
        with pytest.raises(ValueError, match="the tokenizer has no end-of-sequence token"):
            use(without_end)


def test_an_example_that_cannot_be_had_is_named_with_the_reasons(tokenizer, toy):
    examples = SyntheticExamples(TASK, seed=0, stage=3, tokenizer=tokenizer, seq_len=20)
    message = (
        r"no acceptable example 8 of stage 3 in 500 attempts: 0 draws of its batch gave nothing, 0 were reserved and 1000 "
        r"longer than --seq_len 20: raise --seq_len"
    )
    with pytest.raises(RuntimeError, match=message):
        examples.examples(8, 2)
    nothing = SyntheticExamples(TASK, seed=0, generator=f"{toy}:Nothing", tokenizer=tokenizer)
    for ask in (nothing.texts, nothing.examples):
        with pytest.raises(
            RuntimeError, match="no acceptable example 5 .* 1500 draws of its batch gave nothing, 0 were reserved"
        ):
            ask(5, 3)


def test_an_external_class_is_used_unmodified_with_a_new_instance_for_each_example(toy, tokenizer):
    examples = SyntheticExamples(TASK, seed=3, stage=4, generator=f"{toy}:Toy", tokenizer=tokenizer)
    texts = examples.texts(0, 600)
    seeds = [int(example["prompt"].split()[4]) for example in texts]
    assert all(seed % 3 for seed in seeds), "failed attempts are drawn anew"
    assert [example["prompt"] for example in texts] == [f"96 0.25 16 1 {seed} is" for seed in seeds]
    assert len(set(seeds)) == 600
    assert 2**30 < max(seeds) < 2**31
    assert [sorted(example["output_texts"]) for example in texts] == [["xab", "yab", "zab"]] * 600
    labels = [example["answer"] for example in texts]
    assert all(150 < labels.count(word) < 250 for word in (" xab", " yab", " zab"))
    assert [examples.texts(i, 1)[0] for i in range(590, 600)] == texts[590:]
    tokenised = examples.examples(0, 50)
    whole = encode_documents(tokenizer, [example["prompt"] + example["answer"] for example in texts[:50]])
    assert [ids.tolist() for ids in tokenised.ids] == [[*ids.tolist(), tokenizer.eos_token_id] for ids in whole]
    reserved = frozenset([prompt_digest(texts[9]["prompt"])])
    after = SyntheticExamples(TASK, seed=3, stage=4, generator=f"{toy}:Toy", reserved=reserved).texts(0, 600)
    assert [i for i in range(600) if texts[i] != after[i]] == [9]
    assert share_too_long(TASK, 4, tokenizer, 1, 10, f"{toy}:Toy")[0] == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy_external", "--generator toy_external names no class, 'module:Class' is needed"),
        (":Toy", "--generator :Toy names no class"),
        (
            "no_such_module:Toy",
            r"no_such_module does not import \(No module named 'no_such_module'\): put its folder on PYTHONPATH",
        ),
        ("toy_external:Missing", "toy_external has no class Missing: choose from SimpleNamespace, Toy, NoMethod"),
        ("toy_external:NoMethod", "NoMethod has no method generate_batch: name the generator's class"),
    ],
)
def test_a_generator_that_is_no_class_of_the_interface_is_refused(name, message, toy):
    with pytest.raises(ValueError, match=message):
        load_class(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wrong", "Wrong gave the input_text 7, a string is needed: mend the generator"),
        ("WrongWords", r"WrongWords gave the output_texts \['a', 3\], words are needed: mend the generator"),
    ],
)
def test_what_an_external_class_returns_is_checked(name, message, toy):
    with pytest.raises(ValueError, match=message):
        SyntheticExamples(TASK, seed=0, generator=f"{toy}:{name}").texts(0, 1)
