"""Real rows of benchmark tasks, read rightly: against slow computations, lm-eval's own accuracies, and models made to know."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks.wikitext import preprocess_wikitext
from text import byte_level_bpe, documents
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluate_model import main
from lm.characters import character_tokenizer, simplify
from lm.choice_measures import mean_measures
from lm.models import build_model
from lm.prompting import Prompting
from lm.scorer import Scorer
from lm.task_results import choices_of, read_record, read_tasks
from lm.tasks import STOCK, TASKS, TEXTS, measure_tasks, parts_of
from lm.tokenizer import encode_documents, special_ids
from train_tokenizer import train

ROOT = Path(__file__).parents[1]
TOKENIZER = byte_level_bpe()
CHAT = train(iter(documents()), 300, True)  # with a chat template
PADDED = 320  # rows of the embedding, of which the tokenizer knows 300


def build(vocab_size: int = PADDED, positions: int = 2048) -> PreTrainedModel:
    """Random weights large enough that what comes next depends on what was before."""
    torch.manual_seed(0)
    model = build_model("neox-64x2", vocab_size, positions)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 10
    return model.eval()


MODEL = build()


def scorer(max_length: int = 2048, micro_batch: int = 7, model: PreTrainedModel = MODEL, tokenizer=TOKENIZER) -> Scorer:
    return Scorer(model, tokenizer, max_length, micro_batch, "fp32", tqdm(disable=True))


def slow_log_likelihood(context: list[int], continuation: list[int], max_length: int) -> float:
    """One forward pass for each token over the tokens before it."""
    ids, total = [*context, *continuation], 0.0
    for t in range(len(context), len(ids)):
        with torch.no_grad():
            logits = MODEL(torch.tensor([ids[max(0, t - max_length) : t]])).logits[0, -1].double()
        total += torch.log_softmax(logits, dim=0)[ids[t]].item()
    return total


def ids_of(text: str) -> list[int]:
    return encode_documents(TOKENIZER, [text])[0].tolist()


PAIRS = [("Question: which?\nAnswer:", f" the {choice}") for choice in ("statement", "module", "object", "value")]
PAIRS += [("A", " module is"), ("Sarah was better than Maria so Sarah", " won.")]


def test_scores_equal_one_forward_pass_per_token():
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in PAIRS]
    found = scorer().loglikelihood(asked)
    expected = [slow_log_likelihood(ids_of(context), ids_of(continuation), 2048) for context, continuation in PAIRS]
    np.testing.assert_allclose([log_likelihood for log_likelihood, _ in found], expected, rtol=1e-5)


def test_an_empty_context_is_the_end_of_a_document():
    [(found, _)] = scorer().loglikelihood([Instance("loglikelihood", {}, ("", " module"), 0)])
    assert found == pytest.approx(slow_log_likelihood([TOKENIZER.eos_token_id], ids_of(" module"), 2048), rel=1e-5)


def test_context_and_continuation_are_encoded_as_one_text():
    """ " of" is two ids here, " " and "of" would be three; the white space is scored with what follows it."""
    pairs = [("So it is ", "of the"), ("So it is", " of the"), ("The value\n", "of")]
    found = [value for value, _ in scorer().loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])]
    together = [ids_of("So it is"), ids_of(" of the")]
    apart = [ids_of("So it is "), ids_of("of the")]
    assert together[0] + together[1] == ids_of("So it is of the") != apart[0] + apart[1]
    assert found[:2] == pytest.approx([slow_log_likelihood(*together, 2048)] * 2, rel=1e-5)
    assert found[0] != pytest.approx(slow_log_likelihood(*apart, 2048), rel=1e-3)
    assert found[2] == pytest.approx(slow_log_likelihood(ids_of("The value"), ids_of("\nof"), 2048), rel=1e-5)


def test_a_prompt_longer_than_the_model_loses_its_beginning_and_is_noted():
    context, continuation = PAIRS[0]
    short, room = scorer(max_length=len(ids_of(continuation)) + 3), len(ids_of(continuation)) + 3
    [(found, _)] = short.loglikelihood([Instance("loglikelihood", {}, PAIRS[0], 0)])
    ids = [*ids_of(context), *ids_of(continuation)][-room - 1 :]
    split = len(ids) - len(ids_of(continuation))
    assert found == pytest.approx(slow_log_likelihood(ids[:split], ids[split:], 2048), rel=1e-5)
    assert short.cut == {PAIRS[0]}


def test_choices_longer_than_the_model_are_scored_token_by_token():
    """In parts of four tokens, with 8 tokens of context at most."""
    short, context = ("So:", " it"), ids_of("So:")
    long = [("So:", f" the value of the {word} is the object that was imported") for word in ("module", "statement")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in (long[0], short, long[1])]
    found = scorer(max_length=8).loglikelihood(asked)
    expected = []
    for _, continuation in (long[0], short, long[1]):
        ids, total = [*context, *ids_of(continuation)], 0.0
        assert len(ids) - len(context) > 8 or continuation == " it"
        for start in range(len(context), len(ids), 4):
            part = ids[start : start + 4]
            seen = ids[max(0, start + len(part) - 9) : start]
            total += slow_log_likelihood(seen, part, 2048)
        expected.append(total)
    np.testing.assert_allclose([log_likelihood for log_likelihood, _ in found], expected, rtol=1e-5)


def test_texts_are_prepared_as_the_tokenizer_asks():
    tokenizer = character_tokenizer()
    mine = scorer(model=build(len(tokenizer)), tokenizer=tokenizer)
    context, continuation = "Déjà vu; Answer:", " Ça VA — oui"
    mine.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)])
    assert mine.num_tokens == {(context, continuation): len(simplify(continuation))}
    assert tokenizer.decode(mine.tok_encode(continuation)) == " ca va -- oui"


def lettered(row: dict) -> str:
    """The choice with the letter of the answer."""
    return row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]


# Whether this prompt and continuation tell the right answer of a row as it lies in its file, from the texts alone.
RIGHT = {
    "arc_challenge": lambda row, _, said: said == lettered(row),
    "boolq": lambda row, _, said: said == ("yes" if row["label"] else "no"),
    "hellaswag": lambda row, _, said: plain(said) == plain(row["endings"][int(row["label"])]),
    "mmlu": lambda row, _, said: said == row["choices"][row["answer"]],
    "piqa": lambda row, _, said: said == (row["sol2"] if row["label"] else row["sol1"]),
    "sciq": lambda row, _, said: said == row["correct_answer"],
    "social_iqa": lambda row, _, said: said == row["answer" + "ABC"[int(row["label"]) - 1]],
    "winogrande": lambda row, prompt, said: prompt.endswith(row["option" + row["answer"]]) and row["sentence"].endswith(said),
}
RIGHT |= dict.fromkeys(("arc_easy", "commonsense_qa", "openbookqa"), RIGHT["arc_challenge"])
CHANCE = {"boolq": 1 / 2, "piqa": 1 / 2, "winogrande": 1 / 2, "social_iqa": 1 / 3, "commonsense_qa": 1 / 5}


def plain(text: str) -> str:
    """Without the marks that HellaSwag's texts have from WikiHow."""
    return re.sub(r"\[.*?\]|\W", "", text)


class Rigged(LM):
    """Finds likely what `knows` says is right, or everything alike."""

    tokenizer_name = "CHAT"

    def __init__(self, knows=None):
        super().__init__()
        self.knows, self.cut, self.num_tokens, self.asked = knows, set(), {}, []
        self.apply_chat_template = scorer(tokenizer=CHAT).apply_chat_template

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        self.asked += requests
        self.num_tokens |= {request.args: 3 for request in requests}
        return [(self._score(request), False) for request in requests]

    def _score(self, request) -> float:
        is_right = (
            bool(request.doc) and self.knows and self.knows(request.doc, request.args[0], request.args[1].removeprefix(" "))
        )
        return 0.0 if is_right else -10.0

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


@pytest.fixture(scope="module")
def rows(samples, tmp_path_factory) -> Path:
    """The first 60 rows of each task, and of five subjects of MMLU."""
    folder = tmp_path_factory.mktemp("rows")
    for path in [
        path for task in (*TASKS, "lambada_openai") for part in some(task) for path in part.rows(samples / "tasks").values()
    ]:
        copy = folder / path.relative_to(samples / "tasks")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    return folder


def some(task: str) -> list:
    parts = parts_of([task])
    return parts[:5] if task == "mmlu" else parts


def values(found: dict, task: str) -> dict[str, float]:
    return {name: entry["value"] for name, entry in found[task]["measures"].items()}


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_the_answers_is_right_always(rows, task):
    found, items = measure_tasks(Rigged(RIGHT[task]), some(task), rows, Prompting(), 20)
    measured = values(found, task)
    assert {name: value for name, value in measured.items() if name.startswith(("acc", "primary")) and value != 1} == {}
    assert len({item["right"] for item in items}) > 1 or task == "sciq"  # whose right answer is always the last
    assert measured["correct_prob"] == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_nothing_is_at_chance(rows, task):
    found, items = measure_tasks(Rigged(), some(task), rows, Prompting(), 40)
    measured, first = values(found, task), np.mean([item["right"] == 0 for item in items])
    chance = CHANCE.get(task, 1 / 4)
    assert found[task]["chance"] == pytest.approx(chance, abs=0.01 if task.startswith("arc") else 1e-12)
    assert measured["norm_correct_prob"] == pytest.approx(found[task]["chance"])
    assert measured["acc_raw"] == pytest.approx(first)  # the first of equals is chosen


def test_few_shot_examples_are_others_than_the_question(rows):
    for task in ("arc_easy", "winogrande", "hellaswag"):
        rigged = Rigged()
        measure_tasks(rigged, parts_of([task]), rows, Prompting(num_fewshot=59), 5)
        for request in rigged.asked:
            text = {"arc_easy": "question", "winogrande": "sentence", "hellaswag": "query"}[task]
            words = request.doc[text].split("_")[-1] if task == "winogrande" else request.doc[text]
            assert "".join(request.args).count(words) == 1, task


def asked_of(rows: Path, task: str, prompting: Prompting, limit: int = 5) -> list:
    """What a model is asked."""
    rigged = Rigged()
    measure_tasks(rigged, parts_of([task]), rows, prompting, limit)
    return rigged.asked


def test_with_a_template_questions_are_a_user_s_and_choices_the_assistant_s(rows):
    """In one turn with the examples, or each example in turns of its own; the question is never its own example."""
    how = Prompting(num_fewshot=2, apply_chat_template=True, system_instruction="Be right.")
    begin = "<|im_start|>system\nBe right.<|im_end|>\n<|im_start|>user\n"
    for request in asked_of(rows, "arc_easy", how):
        prompt, choice = request.args
        assert prompt.startswith(f"{begin}Question: ")
        assert prompt.endswith(f"\n\nQuestion: {request.doc['question']}\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
        assert (prompt.count("<|im_start|>"), prompt.count("Question: "), prompt.count("\nAnswer: ")) == (3, 3, 2)
        assert choice in request.doc["choices"]["text"]
    for task, field in {"arc_easy": "question", "hellaswag": "query", "piqa": "goal"}.items():
        for request in asked_of(rows, task, replace(how, fewshot_as_multiturn=True)):
            turns = re.findall(r"<\|im_start\|>(.*?)\n(.*?)<\|im_end\|>\n", request.args[0], flags=re.DOTALL)
            assert [role for role, _ in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
            assert request.doc[field] in turns[-1][1]
            assert not any(request.doc[field] in text for _, text in turns[:-1])
            assert request.args[0].endswith("<|im_start|>assistant\n")


def test_without_a_template_an_instruction_stands_before_the_question(rows):
    request = asked_of(rows, "sciq", Prompting(system_instruction="Be right."))[0]
    assert request.args[0] == f"Be right.{request.doc['support']}\nQuestion: {request.doc['question']}\nAnswer:".lstrip()


def test_the_unconditional_score_is_of_the_same_continuation_as_that_of_a_chat(rows):
    _, items = measure_tasks(scorer(tokenizer=CHAT), parts_of(["openbookqa"]), rows, Prompting(apply_chat_template=True), 2)
    row = json.loads((rows / "openbookqa/validation.jsonl").read_text().splitlines()[1])
    for context, found in (("Answer:", "unconditional"), (row["question_stem"], "log_likelihoods")):
        prompt = CHAT(f"<|im_start|>user\n{context}<|im_end|>\n<|im_start|>assistant").input_ids
        expected = [slow_log_likelihood(prompt, CHAT(f"\n{text}").input_ids, 2048) for text in row["choices"]["text"]]
        np.testing.assert_allclose(items[1][found], expected, rtol=1e-5)
    assert items[1]["num_tokens"] == [len(CHAT(f"\n{text}").input_ids) for text in row["choices"]["text"]]


PAGES = [
    {"page": " = The tower = \n\n It was built in 1 @,@ 889 , and it has 3 floors . \n"},
    {"page": " = The river = \n\n It is long ; it is said to be 4 @.@ 5 km wide . \n" * 3},
    {"page": "x"},
]


@pytest.fixture(scope="module")
def pages(rows) -> Path:
    """Rows as those of EleutherAI/wikitext_document_level, which no package has."""
    (rows / "wikitext").mkdir()
    (rows / "wikitext/test.jsonl").write_text("".join(json.dumps(page) + "\n" for page in PAGES))
    return rows


def test_wikitext_is_every_token_of_each_page_by_words_and_bytes_before_it_is_made_readable(pages):
    """With windows of 16 tokens, each after the last of the window before, the first after the end of a document."""
    mine = scorer(max_length=16)
    found, items = measure_tasks(mine, parts_of(["wikitext"]), pages, Prompting(), None)
    texts = [preprocess_wikitext.wikitext_detokenizer(page) for page in PAGES]
    likelihoods = []
    for text in texts:
        ids = [TOKENIZER.eos_token_id, *ids_of(text)]
        windows = [ids[start : start + 17] for start in range(0, len(ids) - 1, 16)]
        if len(windows) > 1:  # the last one has all the context it can have
            windows[-1] = [*ids[-17 : -len(windows[-1]) + 1], *windows[-1][1:]]
        begins, new = [1] * len(windows), len(ids[1:]) - 16 * (len(windows) - 1)
        begins[-1] = len(windows[-1]) - new
        likelihoods.append(
            sum(slow_log_likelihood(window[:at], window[at:], 2048) for window, at in zip(windows, begins, strict=True))
        )
    np.testing.assert_allclose([item["log_likelihood"] for item in items], likelihoods, rtol=1e-5)
    words = [len(re.split(r"\s+", page["page"])) for page in PAGES]
    sizes, tokens = [len(page["page"].encode()) for page in PAGES], [len(ids_of(text)) for text in texts]
    assert [[item[name] for item in items] for name in ("num_words", "num_bytes", "num_tokens")] == [words, sizes, tokens]
    total, measures = -sum(likelihoods), found["wikitext"]["measures"]
    expected = {"word_perplexity": np.exp(total / sum(words)), "byte_perplexity": np.exp(total / sum(sizes))}
    expected |= {"bits_per_byte": total / sum(sizes) / np.log(2), "loss": total / sum(tokens)}
    assert {name: entry["value"] for name, entry in measures.items()} == pytest.approx(expected, rel=1e-5)
    assert {name: measures[name]["value"] for name in list(expected)[:3]} == pytest.approx(found["wikitext"]["lm_eval"])
    chance = sum(tokens) * np.log(300)
    expected = {"word_perplexity": np.exp(chance / sum(words)), "byte_perplexity": np.exp(chance / sum(sizes))}
    expected |= {"bits_per_byte": chance / sum(sizes) / np.log(2), "loss": np.log(300)}
    assert {name: entry["chance"] for name, entry in measures.items()} == pytest.approx(expected)


def test_lambada_is_the_last_word(rows):
    found, items = measure_tasks(scorer(), parts_of(["lambada_openai"]), rows, Prompting(), 8)
    texts = [json.loads(line)["text"] for line in (rows / "lambada_openai/test.jsonl").read_text().splitlines()[:8]]
    for text, item in zip(texts, items, strict=True):
        context, word = text.rsplit(" ", 1)
        assert item["log_likelihood"] == pytest.approx(slow_log_likelihood(ids_of(context), ids_of(f" {word}"), 2048), rel=1e-5)
        assert (item["num_tokens"], item["greedy"]) == (len(ids_of(f" {word}")), False)
    measures, likelihoods = found["lambada_openai"]["measures"], np.array([item["log_likelihood"] for item in items])
    assert measures["perplexity"]["value"] == pytest.approx(np.exp(-likelihoods.mean()))
    assert measures["perplexity"]["se"] == pytest.approx(np.exp(-likelihoods.mean()) * likelihoods.std(ddof=1) / np.sqrt(8))
    lengths = np.array([item["num_tokens"] for item in items])
    assert measures["perplexity"]["chance"] == pytest.approx(np.exp(lengths.mean() * np.log(300)))
    assert measures["acc"] == {"value": 0.0, "se": 0.0, "chance": pytest.approx(np.mean(300.0**-lengths))}
    assert found["lambada_openai"]["lm_eval"] == pytest.approx({"acc": 0.0, "perplexity": measures["perplexity"]["value"]})


def test_a_model_that_knows_the_last_words_is_right(rows):
    class Knows(Rigged):
        tokenizer = TOKENIZER

        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return [(score, score == 0.0) for score, _ in super().loglikelihood(requests)]

    found, _ = measure_tasks(
        Knows(lambda row, prompt, said: row["text"] == f"{prompt} {said}"), parts_of(["lambada_openai"]), rows, Prompting(), 8
    )
    assert {name: entry["value"] for name, entry in found["lambada_openai"]["measures"].items()} == {
        "primary_metric": 1.0,
        "acc": 1.0,
        "perplexity": 1.0,
    }


def test_texts_never_get_a_template_and_the_output_says_so(chat_folder, pages, tmp_path, capsys):
    tasks = ("--tasks", "lambada_openai,wikitext,sciq")
    evaluate(chat_folder, pages, tmp_path, *tasks)
    assert "the text alone" not in capsys.readouterr().out
    evaluate(chat_folder, pages, tmp_path, *tasks, "--num_fewshot", 1, "--apply_chat_template")
    said = capsys.readouterr().out
    assert "\nlambada_openai, wikitext: the text alone, without examples, chat template or instruction\n" in said
    plain, chat = (read_record(tmp_path / f"model_tasks{name}.json")["tasks"] for name in ("", "_1shot_chat"))
    assert plain["wikitext"] == chat["wikitext"]
    assert plain["lambada_openai"] == chat["lambada_openai"]
    assert plain["sciq"]["measures"] != chat["sciq"]["measures"]


def test_every_score_is_shown_with_its_error_and_its_chance(chat_folder, pages, tmp_path, capsys):
    evaluate(chat_folder, pages, tmp_path, "--tasks", "lambada_openai,wikitext,sciq,winogrande")
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[:-1]]
    tasks = read_record(tmp_path / "model_tasks.json")["tasks"]

    def told(entry):
        return f"{entry['value']:.4f} ± {entry['se']:.4f}"

    shown = ("primary_metric", "acc_raw", "acc_per_char", "norm_correct_prob_per_char")
    assert lines[0] == ["task", "primary", "value", "chance", *shown[1:], "items"]
    for line, (task, chance) in zip(lines[1:3], {"sciq": "0.2500", "winogrande": "0.5000"}.items(), strict=True):
        entries = [told(tasks[task]["measures"][name]) for name in shown]
        assert line == [task, tasks[task]["primary"], entries[0], chance, *entries[1:], "6"]
    assert lines[3] == ["text", "score", "value", "chance", "items"]
    assert [line[:2] for line in lines[4:]] == [
        *(["lambada_openai", name] for name in ("acc", "perplexity")),
        *(["wikitext", name] for name in ("word_perplexity", "byte_perplexity", "bits_per_byte", "loss")),
    ]
    entry = tasks["wikitext"]["measures"]["bits_per_byte"]
    assert lines[8][2:] == [told(entry), f"{entry['chance']:,.4g}", "3"]


def test_accuracies_equal_those_of_lm_eval(rows):
    """On the same samples: acc and acc_norm, which divides by characters, where it has them."""
    found, _ = measure_tasks(
        scorer(), [part for task in TASKS if task != "boolq" for part in some(task)[:1]], rows, Prompting(num_fewshot=1), 15
    )
    compared = []
    for task, results in found.items():
        part = next(iter(results["subjects"].values())) if task == "mmlu" else results
        for theirs, ours in (("acc", "acc_raw"), ("acc_norm", "acc_per_char")):
            if theirs in part["lm_eval"]:
                compared.append((task, theirs, part["lm_eval"][theirs], part["measures"][ours]["value"]))
    assert len(compared) == 17
    assert [row for row in compared if row[2] != pytest.approx(row[3])] == []


def test_unconditional_scores_are_given_answer_alone(rows):
    _, items = measure_tasks(scorer(), parts_of(["openbookqa"]), rows, Prompting(), 2)
    row = json.loads((rows / "openbookqa" / "validation.jsonl").read_text().splitlines()[1])
    expected = [slow_log_likelihood(ids_of("Answer:"), ids_of(f" {text}"), 2048) for text in row["choices"]["text"]]
    np.testing.assert_allclose(items[1]["unconditional"], expected, rtol=1e-5)
    given = [slow_log_likelihood(ids_of(row["question_stem"]), ids_of(f" {text}"), 2048) for text in row["choices"]["text"]]
    np.testing.assert_allclose(items[1]["log_likelihoods"], given, rtol=1e-5)
    assert items[1]["num_chars"] == [len(text) for text in row["choices"]["text"]]
    assert items[1]["num_tokens"] == [len(ids_of(f" {text}")) for text in row["choices"]["text"]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    MODEL.save_pretrained(folder)
    CHAT.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def psann_folder(tmp_path_factory) -> Path:
    """A chat model of a class that transformers does not have."""
    folder = tmp_path_factory.mktemp("psann")
    torch.manual_seed(0)
    build_model("psann-tiny", len(CHAT), 2048, special_ids(CHAT)).save_pretrained(folder)
    CHAT.save_pretrained(folder)
    return folder


def evaluate(folder: Path, rows: Path, out: Path, *command: object) -> None:
    words = ("tasks", folder, "--rows", rows, "--output_dir", out, "--limit", 6, "--force_cpu", *command)
    main([str(word) for word in words])


def test_results_can_be_computed_again_from_what_is_written(model_folder, rows, tmp_path, capsys):
    evaluate(model_folder, rows, tmp_path, "--tasks", "winogrande,arc_challenge", "--seq_len", 40)
    record = read_record(tmp_path / "model_tasks.json")
    items = [json.loads(line) for line in (tmp_path / "model_tasks.jsonl").read_text().splitlines()]
    for task, primary in {"winogrande": "acc_raw", "arc_challenge": "acc_uncond"}.items():
        mine, found = [item for item in items if item["task"] == task], record["tasks"][task]
        assert mean_measures([choices_of(item) for item in mine], primary) == found["measures"]
        assert (found["num_items"], found["num_cut"]) == (6, sum(item["cut"] for item in mine))
        lengths = [len(set(item["num_chars"])) for item in mine]
        assert (max(lengths) == 1) == (task == "winogrande")  # whose choices share what is scored
        assert read_tasks(tmp_path / "model_tasks.json")[task]["primary_metric"] == found["measures"][primary]["value"]
    shown = capsys.readouterr().out
    assert record["tasks"]["arc_challenge"]["num_cut"] > 0
    assert "questions are longer than the 40 tokens that the model takes" in shown


def test_what_has_been_measured_is_said_and_not_measured_again(model_folder, rows, tmp_path, capsys):
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq")
    before = (tmp_path / "model_tasks.json").stat().st_mtime_ns
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq")
    assert "has just this already" in capsys.readouterr().out
    assert (tmp_path / "model_tasks.json").stat().st_mtime_ns == before
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq,piqa")
    assert "is of other tasks, rows: replacing it" in capsys.readouterr().out


def test_changed_items_are_not_taken_for_those_measured(model_folder, rows, tmp_path):
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq")
    items = tmp_path / "model_tasks.jsonl"
    items.write_text(items.read_text().replace('"right": 3', '"right": 0', 1))
    with pytest.raises(ValueError, match=r"model_tasks\.jsonl is not the file model_tasks\.json was written with"):
        read_tasks(tmp_path / "model_tasks.json")


def test_results_of_each_way_to_ask_have_their_own_name(chat_folder, rows, tmp_path, capsys):
    sciq = ("--tasks", "sciq", "--limit", 2)
    names = {
        "model_tasks.json": [],
        "model_tasks_2shot.json": ["--num_fewshot", 2],
        "model_tasks_chat.json": ["--apply_chat_template"],
    }
    names["model_tasks_2shot_chat_multiturn_system-c0285941.json"] = [
        *("--num_fewshot", 2, "--apply_chat_template", "--fewshot_as_multiturn", "--system_instruction", "Be right."),
    ]
    for more in names.values():
        evaluate(chat_folder, rows, tmp_path, *sciq, *more)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == sorted(names)
    capsys.readouterr()
    for more in names.values():
        evaluate(chat_folder, rows, tmp_path, *sciq, *more)
        assert "has just this already" in capsys.readouterr().out
    measured = [read_record(tmp_path / name)["measured"] for name in names]
    assert measured[0].keys() == {
        *("tasks", "rows", "versions", "num_fewshot", "limit", "seq_len", "precision", "weights", "tokenizer")
    }, "as before there were such options: what was measured then is not measured again"
    assert measured[3] == measured[1] | {name: measured[3][name] for name in ("chat_template", "apply_chat_template")} | {
        "fewshot_as_multiturn": True, "system_instruction": "Be right."
    }  # fmt: skip
    (chat_folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    try:
        evaluate(chat_folder, rows, tmp_path, *sciq, "--apply_chat_template")
        assert "is of other chat_template: replacing it" in capsys.readouterr().out
    finally:
        CHAT.save_pretrained(chat_folder)


def test_options_that_cannot_work_are_refused_before_a_model_is_looked_for(tmp_path):
    options = ("--num_fewshot", -1, "--fewshot_as_multiturn", "--system_instruction", " ")
    with pytest.raises(ValueError, match="num_fewshot") as caught:
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "piqa,winograd", *options)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "--tasks 'winograd' is no task (did you mean winogrande?)",
        "--num_fewshot -1",
        "--fewshot_as_multiturn without --apply_chat_template",
        "--system_instruction is empty",
    ]
    options = ("--apply_chat_template", "--fewshot_as_multiturn")
    with pytest.raises(ValueError, match="^--fewshot_as_multiturn without examples: pass --num_fewshot too, or leave it out$"):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "piqa", *options)


def test_a_template_that_is_not_there_or_takes_no_such_turns_is_said_before_the_model_is_loaded(
    model_folder, chat_folder, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr("evaluate_model.load_model", lambda _: pytest.fail("it is loaded"))
    sciq, chat = ("--tasks", "sciq"), "--apply_chat_template"
    with pytest.raises(
        ValueError, match=f"^{chat}, and {model_folder} has no chat template: make the tokenizer with train_tok"
    ):
        evaluate(model_folder, rows, tmp_path, *sciq, chat)
    (chat_folder / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system!') }}{% endif %}{{ messages[0]['content'] }}"
    )
    try:
        with pytest.raises(ValueError, match=r"refuses the turns system, user \(no system!\): make the tokenizer"):
            evaluate(chat_folder, rows, tmp_path, *sciq, chat, "--system_instruction", "Be right.")
    finally:
        CHAT.save_pretrained(chat_folder)


def test_more_examples_than_there_are_rows_are_refused(rows, tmp_path):
    message = (
        r"--num_fewshot 60, and .*sciq/validation.jsonl has 59 rows for it: pass fewer\n.*piqa/validation.jsonl has 59 rows"
    )
    with pytest.raises(ValueError, match=message):
        evaluate(Path("no/such/model"), rows, tmp_path, "--tasks", "sciq,piqa,lambada_openai", "--num_fewshot", 60)


STOCK_TASKS = {"hellaswag": "hellaswag/hellaswag", "winogrande": "winogrande/default", "arc_easy": "arc/arc_easy"}
STOCK_TASKS |= {"lambada_openai": "lambada/lambada_openai"}


def test_lm_eval_s_own_command_gives_the_same_scores(psann_folder, rows, tmp_path):
    """`lm_eval run --model hf --model_args pretrained=FOLDER` on the same rows, plain and as a chat of several turns.

    The class of the model comes out of its folder: nothing of this repository is imported there.
    """
    for task, stock in STOCK_TASKS.items():
        split = "test" if task in TEXTS else "validation"
        lines = [
            f"include: {STOCK}/{stock}.yaml",
            f"task: {task}_here",
            "tag: null",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {{{split}: {rows}/{task}/{split}.jsonl}}}}",
            "training_split: null",
            "validation_split: null",
            f"test_split: {split}",
            f"fewshot_split: {split}",
        ]
        (tmp_path / f"{task}.yaml").write_text("\n".join(lines))
    questions = ",".join(f"{task}_here" for task in STOCK_TASKS if task not in TEXTS)
    chat = ["--num_fewshot", "2", "--apply_chat_template", "--fewshot_as_multiturn", "--system_instruction", "Be right."]
    ways = {"": [",".join(f"{task}_here" for task in STOCK_TASKS)], "_2shot_chat_multiturn_system-c0285941": [questions, *chat]}
    shared = [
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={psann_folder},trust_remote_code=True",
        "--limit",
        "6",
    ]
    shared += ["--include_path", str(tmp_path), "--device", "cpu", "--log_samples", "--batch_size", "8"]
    commands = [[*shared, "--output_path", f"{tmp_path}/stock{name}", "--tasks", *options] for name, options in ways.items()]
    code = (  # all as it is, but the 14,000 files of its own tasks are not read, which takes most of its time
        "import json, sys; from functools import partialmethod; from lm_eval.__main__ import cli_evaluate\n"
        "from lm_eval.tasks import TaskManager as Manager\n"
        "Manager.__init__ = partialmethod(Manager.__init__, include_defaults=False)\n"
        "for sys.argv in json.loads(sys.argv[1]): cli_evaluate()"
    )
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, options in ways.items():
        tasks = ",".join(STOCK_TASKS) if not name else questions.replace("_here", "")
        evaluate(psann_folder, rows, tmp_path / "ours", "--tasks", tasks, *options[1:])
        record = read_record(tmp_path / f"ours/model_tasks{name}.json")
        items = [json.loads(line) for line in (tmp_path / f"ours/model_tasks{name}.jsonl").read_text().splitlines()]
        (results,) = (tmp_path / f"stock{name}").rglob("results_*.json")
        theirs = json.loads(results.read_text())["results"]
        for task in tasks.split(","):
            (file,) = results.parent.glob(f"samples_{task}_here_*.jsonl")
            samples = [json.loads(line) for line in file.read_text().splitlines()]
            mine = [item for item in items if item["task"] == task]
            found = [item.get("log_likelihoods") or [item["log_likelihood"]] for item in mine]
            expected = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{task}{name}")
            scores = record["tasks"][task]["lm_eval"]
            assert scores == pytest.approx({score: theirs[f"{task}_here"][f"{score},none"] for score in scores}, rel=1e-4)


def test_an_unknown_task_is_refused_with_what_may_be_meant(tmp_path):
    message = r"'hellaswags' is no task \(did you mean hellaswag\?\): choose from arc_challenge,(.|\n)*'xyz' is no task: choose"
    with pytest.raises(ValueError, match=message):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "hellaswags,piqa,xyz")


def test_missing_rows_are_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"piqa/validation\.jsonl \(2 of 2 files are missing or empty\): run fetch"):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "piqa,sciq")
    (tmp_path / "sciq").mkdir()
    (tmp_path / "sciq/validation.jsonl").touch()
    with pytest.raises(
        FileNotFoundError, match=r"no .*sciq/validation\.jsonl \(1 of 1 files are missing or empty\): run fetch"
    ):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "sciq")
    with pytest.raises(
        FileNotFoundError, match=r"wikitext/test\.jsonl .*: no package has these rows, leave out --rows to fetch"
    ):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "wikitext")


def test_rows_of_another_kind_are_named(model_folder, tmp_path):
    """BoolQ as its authors have it, with "answer" instead of "label"."""
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/validation.jsonl").write_text('{"question": "is it", "passage": "It is.", "answer": true}\n')
    with pytest.raises(ValueError, match=r"boolq document 0 has the choices \['no', 'yes'\], of which 'label' is right"):
        evaluate(model_folder, tmp_path, tmp_path / "out", "--tasks", "boolq")


def test_scores_that_are_not_finite_are_refused(rows):
    class Broken(Rigged):
        def _score(self, request) -> float:
            return float("nan")

    with pytest.raises(RuntimeError, match=r"sciq document 0 has the log-likelihoods \[nan, nan, nan, nan\]"):
        measure_tasks(Broken(), parts_of(["sciq"]), rows, Prompting(), 2)


def test_the_script_is_one_call_of_evaluate_model(chat_folder, rows, tmp_path):
    """From any folder, with paths of whoever calls."""
    (tmp_path / "rows").symlink_to(rows)
    command = ["bash", ROOT / "scripts/run_lm_eval_psann.sh", chat_folder, "--tasks", "hellaswag,piqa,winogrande"]
    command += ["--num_fewshot", "5", "--apply_chat_template", "--fewshot_as_multiturn", "--force_cpu"]
    command += ["--rows", "rows", "--output_dir", "out", "--limit", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "task",
        "hellaswag",
        "piqa",
        "winogrande",
        "few-shot",
        "results:",
    ]
    assert read_record(tmp_path / "out/model_tasks_5shot_chat_multiturn.json")["measured"]["num_fewshot"] == 5


def test_with_rows_no_network_is_touched(model_folder, rows, tmp_path):
    """Not asked for offline in any other way."""
    code = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): print('NETWORK', args[1:]); raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from evaluate_model import main; main(sys.argv[1:])"
    )
    words = ("tasks", model_folder, "--rows", rows, "--output_dir", tmp_path, "--limit", 1, "--tasks", "hellaswag,piqa")
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, "NETWORK" in done.stdout + done.stderr) == (0, False), done.stderr[-2000:]
    assert done.stdout.startswith("task ")  # nothing of lm-eval's before our table
