"""What `evaluate_model.py search` measures: greedy answers as a plain loop finds them, and what is right among them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_runs import TOY, build, train, write_run, write_split
from text import byte_level_bpe
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from evaluate_model import main
from lm.generation import TOKENS_IN_A_PASS, greedy, passes
from lm.graph_text import parse_prompt
from lm.models import build_model
from lm.questions import first_word, question
from lm.search_evaluation import read_search, score, search_record, wilson_interval
from lm.tokenizer import encode_documents

TOKENIZER = byte_level_bpe()
LENGTHS = (3, 40, 17, 17, 1, 64, 8)
# aba has three children; obo and its child lead to the goal, so does ibi, and ubu does not
FACTS = "If Amy is aba, then Amy is obo. Everyone that is aba is ibi. If a person is aba, they are ubu."
FACTS += " If Amy is obo, then they are eke. If someone is ibi, then they are eke. Everyone that is eke is goo."
QUESTION = "Suppose we have the following facts: {} Given that Amy is {}, and we want to prove Amy is goo.\n\nProof:{} Amy is"


def rotary(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build_model("neox-64x2", 300, 512)
    return wilder(model)


def with_table(positions: int = 512) -> PreTrainedModel:
    torch.manual_seed(1)
    return wilder(GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=positions, n_embd=32, n_layer=1, n_head=2)))


def wilder(model: PreTrainedModel) -> PreTrainedModel:
    """With larger weights, so that what comes next depends on what was before, and no two tokens are as likely."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 20
    return model.eval()


def slow_greedy(model: PreTrainedModel, prompt: np.ndarray, new_tokens: int, end_id: int | None) -> list[int]:
    """One prompt, one whole forward pass for each token."""
    ids = prompt.astype(np.int64).tolist()
    with torch.no_grad():
        for _ in range(new_tokens):
            following = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if following == end_id:
                break
            ids.append(following)
    return ids[len(prompt) :]


def continuations(model: PreTrainedModel, prompts: list[np.ndarray], new_tokens: int, end_id: int | None, micro_batch: int):
    found = {}
    for numbers, rows in greedy(model, prompts, new_tokens, end_id, micro_batch):
        found |= {number: row.tolist() for number, row in zip(numbers, rows, strict=True)}
    return [found[number] for number in range(len(prompts))]


def some_prompts() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(2, 300, length).astype(np.uint16) for length in LENGTHS]


def evaluate(*command: object) -> None:
    main([str(word) for word in ("search", *command, "--force_cpu")])


def results(run: Path, name: str = "final_search_test") -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (run / "evaluation" / f"{name}.jsonl").read_text().splitlines()]
    return read_search(run / "evaluation" / f"{name}.json"), rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, data, tokenizer_dir) -> Path:
    return write_run(tmp_path / "run", data, rotary(), tokenizer_dir)


@pytest.mark.parametrize("make", [rotary, with_table])
@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_greedy_answers_equal_those_of_a_plain_loop(make, micro_batch):
    model, prompts = make(), some_prompts()
    expected = [slow_greedy(model, prompt, 6, None) for prompt in prompts]
    assert continuations(model, prompts, 6, None, micro_batch) == expected
    assert len({tuple(ids) for ids in expected}) > 4, "they differ"
    assert max(len(set(ids)) for ids in expected) > 1, "and do not repeat one token"


def test_an_answer_ends_before_the_end_of_sequence():
    """Where one ends, the others of its pass go on."""
    model, prompts = rotary(), some_prompts()
    endless = [slow_greedy(model, prompt, 6, None) for prompt in prompts]
    end_id = endless[1][3]
    expected = [slow_greedy(model, prompt, 6, end_id) for prompt in prompts]
    assert continuations(model, prompts, 6, end_id, 64) == expected
    assert [len(ids) for ids in expected] != [6] * len(LENGTHS)
    assert max(map(len, expected)) == 6


def test_what_the_model_wants_of_generation_does_not_count():
    prompts = some_prompts()
    expected = continuations(rotary(), prompts, 6, None, 64)
    model = rotary()
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_length=4)
    assert continuations(model, prompts, 6, None, 64) == expected


def test_passes_hold_every_prompt_once_longest_first_and_not_too_many_tokens():
    lengths = np.random.default_rng(0).integers(1, 3000, 200).tolist()
    made = passes(lengths, 8, 16)
    flat = [number for numbers in made for number in numbers]
    assert sorted(flat) == list(range(200))
    assert [lengths[number] for number in flat] == sorted(lengths, reverse=True)
    assert all(len(numbers) <= 16 and len(numbers) * (lengths[numbers[0]] + 8) <= TOKENS_IN_A_PASS for numbers in made)
    assert max(len(numbers) for numbers in made) == 16
    assert passes([2**20, 5], 8, 16) == [[0], [1]], "one prompt that is longer than a pass has one to itself"


def test_logits_that_are_no_numbers_are_refused():
    model = rotary()
    model.gpt_neox.final_layer_norm.weight.data[3] = float("nan")
    with pytest.raises(RuntimeError, match="logits that are NaN"):
        continuations(model, some_prompts(), 6, None, 64)


@pytest.mark.parametrize(
    ("continuation", "word"),
    [(" obar", "obar"), (" obar. Amy is eke", "obar"), ("obar, or", "obar"), (" obar\nx", "obar"), ("", ""), (" . obar", "")],
)
def test_the_first_word_is_the_answer(continuation, word):
    assert first_word(continuation) == word


def test_any_valid_answer_is_right_letter_by_letter():
    asked = [question(0, "?", ["obo", "ibi"])] * 5
    rows = score(asked, [" obo", " ibi.", " ubu", " OBO", " obonger"])
    assert [row["right"] for row in rows] == [True, True, False, False, False]
    assert rows[1] == {"index": 0, "lookahead": None, "answer": "ibi", "right": True}


def test_chance_is_the_share_of_children_that_are_valid():
    """By trying every child: those from which the goal can be reached."""
    chances = []
    for prompt, answers in [
        (QUESTION.format(FACTS, "aba", " Amy is aba."), ["ibi", "obo"]),
        (QUESTION.format(FACTS, "aba", " Amy is aba. Amy is obo."), ["eke"]),
        (QUESTION.format(FACTS + " Everyone that is obo is nun.", "obo", " Amy is obo."), ["eke"]),
    ]:
        parsed = parse_prompt(prompt)

        def leads(word, edges=parsed.edges, goal=parsed.goal):
            return word == goal or any(leads(to) for origin, to in edges if origin == word)

        children = [to for origin, to in parsed.edges if origin == parsed.path[-1]]
        assert sorted(filter(leads, children)) == answers
        chances.append(question(0, prompt, answers).chance)
        assert chances[-1] == sum(map(leads, children)) / len(children)
    assert chances == [2 / 3, 1.0, 1 / 2]


def test_each_lookahead_has_its_accuracy_error_and_chance():
    easy = question(0, QUESTION.format(FACTS, "aba", " Amy is aba. Amy is obo."), ["eke"])
    hard = question(1, QUESTION.format(FACTS, "aba", " Amy is aba."), ["ibi", "obo"])
    asked = [easy, hard, hard, hard, hard]
    record = search_record(asked, score(asked, [" eke", " obo", " ubu", " ubu", " aba"]))
    assert list(record["lookaheads"]) == [str(easy.lookahead), str(hard.lookahead)] == ["0", "1"]
    assert record["lookaheads"]["1"] == {
        "count": 4,
        "accuracy": 0.25,
        "accuracy_se": pytest.approx((0.25 * 0.75 / 4) ** 0.5),
        "interval_95": wilson_interval(0.25, 4),
        "chance": pytest.approx(2 / 3),
    }
    assert record["overall"]["accuracy"] == 2 / 5
    assert record["overall"]["chance"] == pytest.approx((1 + 4 * 2 / 3) / 5)
    unknown = search_record([easy, question(2, "Tell me", ["eke"])], score([easy, easy], [" eke", " eke"]))
    assert list(unknown["lookaheads"]) == ["0", "unknown"]
    assert unknown["lookaheads"]["unknown"]["chance"] is unknown["overall"]["chance"] is None
    assert unknown["overall"]["accuracy"] == 1.0


def test_wilson_intervals():
    """Of Brown, Cai and DasGupta, Statistical Science 16 (2001), by their formula, and its closed form at the edge."""
    assert wilson_interval(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    z2 = 1.959964**2
    assert wilson_interval(0.0, 10) == pytest.approx([0.0, z2 / (10 + z2)])
    assert wilson_interval(1.0, 10) == pytest.approx([10 / (10 + z2), 1.0])


def test_results_equal_a_slow_computation_from_the_files(run, data, capsys):
    evaluate(run)
    record, rows = results(run)
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    model, end_id = rotary(), TOKENIZER.eos_token_id
    expected = []
    for line in lines:
        (prompt,) = encode_documents(TOKENIZER, [line["input_text"]])
        expected.append(first_word(TOKENIZER.decode(slow_greedy(model, prompt, record["max_new_tokens"], end_id))))
    assert [row["answer"] for row in rows] == expected
    assert [row["index"] for row in rows] == list(range(40))
    assert len(set(expected)) > 5
    assert sum(group["count"] for group in record["lookaheads"].values()) == record["overall"]["count"] == 40
    for name, group in record["lookaheads"].items():
        right = [row["right"] for row in rows if row["lookahead"] == int(name)]
        assert (group["count"], group["accuracy"]) == (len(right), np.mean(right))
    assert (record["model"], record["checkpoint"], record["step"], record["num_too_long"]) == (str(run), "final", 50, 0)
    assert (run / "evaluation/final_search_test.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out.splitlines()
    assert said[-2].split()[:2] == ["overall", f"{record['overall']['accuracy']:.4f}"]
    assert said[-1].startswith(f"results: {run}/evaluation/final_search_test.json")


def test_a_model_that_has_learned_answers_right(tmp_path, tokenizer_dir):
    """Data of another generator, whose only answer is soon learned; its questions have no lookahead that we know."""
    toy = build(tmp_path, generator=TOY, test_size=10)
    run = train(tmp_path / "run", toy, tokenizer_dir, generator=TOY)
    evaluate(run, "--max_examples", 7)
    record, rows = results(run)
    assert rows == [{"index": index, "lookahead": None, "answer": "so", "right": True} for index in range(7)]
    assert list(record["lookaheads"]) == ["unknown"]
    assert (record["overall"]["accuracy"], record["overall"]["chance"]) == (1.0, None)


def test_a_step_checkpoint_is_evaluated_by_name_and_as_latest(run):
    for name in ("step_00000040", "latest"):
        evaluate(run, "--checkpoint", name, "--max_examples", 3, "--overwrite")
        assert results(run, "step_00000040_search_test")[0]["step"] == 40


def test_the_same_evaluation_is_not_repeated_unless_asked(run, capsys, monkeypatch):
    evaluate(run, "--max_examples", 3)
    path = run / "evaluation/final_search_test.json"
    before = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr("evaluate_model.load_model", lambda _: pytest.fail("the model was loaded"))
        evaluate(run, "--max_examples", 3)
    assert "has just this already" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    evaluate(run, "--max_examples", 3, "--overwrite")
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize("change", ["max_examples", "weights", "precision"])
def test_an_evaluation_of_something_else_is_replaced(run, data, tokenizer_dir, capsys, change):
    evaluate(run, "--max_examples", 3)
    if change == "weights":
        write_run(run, data, rotary(seed=1), tokenizer_dir)
    evaluate(
        run, "--max_examples", 4 if change == "max_examples" else 3, "--precision", "bf16" if change == "precision" else "fp32"
    )
    assert f"is of other {change}: replacing it" in capsys.readouterr().out


def test_answers_that_were_changed_are_not_taken_for_those_measured(run):
    evaluate(run, "--max_examples", 3)
    answers = run / "evaluation/final_search_test.jsonl"
    answers.write_text(answers.read_text().replace("false", "true"))
    with pytest.raises(ValueError, match=r"final_search_test\.jsonl is not the file final_search_test\.json was written with"):
        read_search(run / "evaluation/final_search_test.json")


def token_lengths(data: Path) -> list[tuple[int, int]]:
    """Of each row of the test split: the tokens of its prompt, and of its longest answer with the end."""
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]

    def count(text: str) -> int:
        return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])

    return [(count(line["input_text"]), 1 + max(count(f" {word}") for word in line["output_texts"])) for line in lines]


def test_rows_longer_than_the_run_trained_on_are_left_out_and_counted(tmp_path, data, tokenizer_dir, capsys):
    totals = [prompt + answer for prompt, answer in token_lengths(data)]
    seq_len = sorted(totals)[len(totals) // 2]
    run = write_run(tmp_path / "run", data, rotary(), tokenizer_dir, seq_len=seq_len)
    evaluate(run)
    record, rows = results(run)
    assert [row["index"] for row in rows] == [index for index, total in enumerate(totals) if total <= seq_len]
    assert record["num_too_long"] == sum(total > seq_len for total in totals) > 5
    assert f"{record['num_too_long']} questions were left out" in capsys.readouterr().out


def test_rows_longer_than_a_table_of_positions_are_left_out_and_counted(tmp_path, data, tokenizer_dir):
    lengths = token_lengths(data)
    new_tokens = max(8, *(answer for _, answer in lengths))
    positions = sorted(prompt for prompt, _ in lengths)[20] + new_tokens - 1
    run = write_run(tmp_path / "run", data, with_table(positions), tokenizer_dir)
    evaluate(run)
    record, rows = results(run)
    assert [row["index"] for row in rows] == [
        index for index, (prompt, _) in enumerate(lengths) if prompt + new_tokens - 1 <= positions
    ]
    assert record["num_too_long"] == 40 - len(rows) > 10


def test_an_answer_of_many_tokens_may_be_given_whole_and_that_is_said(tmp_path, run, capsys):
    word = "qxzqxzqxzqxz"
    split = write_split(tmp_path / "long", [{"input_text": "Amy is", "output_texts": ["ab", word]}])
    needed = len(encode_documents(TOKENIZER, [f" {word}"])[0]) + 1
    assert needed > 9
    evaluate(run, "--data_dir", split)
    assert results(run)[0]["max_new_tokens"] == needed
    assert f"the longest valid answer has {needed - 1} tokens: the model goes on for {needed}" in capsys.readouterr().out


def test_any_causal_language_model_is_measured_with_its_own_tokenizer(tmp_path, data, tokenizer_dir):
    rotary().save_pretrained(tmp_path / "model")
    arguments = ("--data_dir", data, "--output_dir", tmp_path / "evaluation", "--max_examples", 3)
    with pytest.raises(ValueError, match=r"no --tokenizer, and .*model is no run of pptrain.py or .* to take it from"):
        evaluate(tmp_path / "model", *arguments)
    evaluate(tmp_path / "model", *arguments, "--tokenizer", tokenizer_dir)
    first = results(tmp_path, "model_search_test")
    TOKENIZER.save_pretrained(tmp_path / "model")
    evaluate(tmp_path / "model", *arguments, "--overwrite")
    assert results(tmp_path, "model_search_test") == first
    assert first[0]["step"] is None


def test_a_model_that_is_no_run_needs_its_settings(tmp_path):
    lines = [rf"no --{name}, and {tmp_path} is no run of pptrain.py or .*" for name in ("data_dir", "tokenizer", "output_dir")]
    with pytest.raises(ValueError, match="\n".join([*lines, r"--max_examples 0: at least 1"])):
        evaluate(tmp_path, "--max_examples", 0)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("--split", "train"), r"--split train is none of eval, test, mixin: pass one of these"),
        (("--data_dir", "nothing"), r"no nothing/meta.json: run build_data_splits.py"),
        (("--checkpoint", "best"), r"no checkpoint best in .*run, it has final, step_00000040"),
        (("--tokenizer", "nothing"), r"no folder nothing, and the hub gave no such tokenizer"),
        (("--micro_batch", 0), r"--micro_batch 0: at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(run, command, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(run, *command)
    assert not (run / "evaluation").exists()


def test_a_damaged_checkpoint_and_damaged_data_are_refused(tmp_path, run):
    rows = [{"input_text": "Amy is", "output_texts": ["ab"]}]
    split = write_split(tmp_path / "split", rows)
    text = (split / "test.jsonl").read_text()
    (split / "test.jsonl").write_text(text.replace("Amy", "Ann"))
    with pytest.raises(ValueError, match=r"test.jsonl has SHA-256"):
        evaluate(run, "--data_dir", split)
    with pytest.raises(ValueError, match=r"line 2 has the answer 'a b', one word is needed"):
        evaluate(run, "--data_dir", write_split(tmp_path / "two", [*rows, {"input_text": "x", "output_texts": ["c", "a b"]}]))
    with open(run / "final/model.safetensors", "r+b") as file:
        file.seek(500)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"final is damaged \(.*model.safetensors has SHA-256"):
        evaluate(run)


def test_a_model_that_is_too_small_for_the_questions_is_refused(tmp_path, data, tokenizer_dir):
    run = write_run(tmp_path / "short", data, rotary(), tokenizer_dir, seq_len=50)
    with pytest.raises(ValueError, match=r"all 40 prompts are too long \(\d+ tokens or more\) for --seq_len 50 of the run"):
        evaluate(run)
    run = write_run(tmp_path / "narrow", data, build_model("neox-64x2", 128, 512), tokenizer_dir)
    with pytest.raises(ValueError, match=r"the model has a vocabulary of 128, the tokenizer gives id \d+"):
        evaluate(run)


def test_no_model_is_said(tmp_path, data, tokenizer_dir):
    arguments = ("--data_dir", data, "--output_dir", tmp_path / "out", "--tokenizer", tokenizer_dir)
    with pytest.raises(FileNotFoundError, match="no model no/such, here or on the hub"):
        evaluate("no/such", *arguments)
