"""Real rows of benchmark tasks, read rightly: against slow computations, lm-eval's own accuracies, and models made to know."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from text import byte_level_bpe
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluate_model import main
from lm.characters import character_tokenizer, simplify
from lm.choice_measures import mean_measures
from lm.models import build_model
from lm.scorer import Scorer
from lm.task_results import choices_of, read_record, read_tasks
from lm.tasks import TASKS, measure_tasks, parts_of
from lm.tokenizer import encode_documents

TOKENIZER = byte_level_bpe()
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

    def __init__(self, knows=None):
        super().__init__()
        self.knows, self.cut, self.num_tokens, self.asked = knows, set(), {}, []

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
    for path in [path for task in TASKS for part in some(task) for path in part.rows(samples / "tasks").values()]:
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
    found, items = measure_tasks(Rigged(RIGHT[task]), some(task), rows, 0, 20)
    measured = values(found, task)
    assert {name: value for name, value in measured.items() if name.startswith(("acc", "primary")) and value != 1} == {}
    assert len({item["right"] for item in items}) > 1 or task == "sciq"  # whose right answer is always the last
    assert measured["correct_prob"] == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_knows_nothing_is_at_chance(rows, task):
    found, items = measure_tasks(Rigged(), some(task), rows, 0, 40)
    measured, first = values(found, task), np.mean([item["right"] == 0 for item in items])
    chance = CHANCE.get(task, 1 / 4)
    assert found[task]["chance"] == pytest.approx(chance, abs=0.01 if task.startswith("arc") else 1e-12)
    assert measured["norm_correct_prob"] == pytest.approx(found[task]["chance"])
    assert measured["acc_raw"] == pytest.approx(first)  # the first of equals is chosen


def test_few_shot_examples_are_others_than_the_question(rows):
    for task in ("arc_easy", "winogrande", "hellaswag"):
        rigged = Rigged()
        measure_tasks(rigged, parts_of([task]), rows, 59, 5)
        for request in rigged.asked:
            text = {"arc_easy": "question", "winogrande": "sentence", "hellaswag": "query"}[task]
            words = request.doc[text].split("_")[-1] if task == "winogrande" else request.doc[text]
            assert "".join(request.args).count(words) == 1, task


def test_accuracies_equal_those_of_lm_eval(rows):
    """On the same samples: acc and acc_norm, which divides by characters, where it has them."""
    found, _ = measure_tasks(scorer(), [part for task in TASKS if task != "boolq" for part in some(task)[:1]], rows, 1, 15)
    compared = []
    for task, results in found.items():
        part = next(iter(results["subjects"].values())) if task == "mmlu" else results
        for theirs, ours in (("acc", "acc_raw"), ("acc_norm", "acc_per_char")):
            if theirs in part["lm_eval"]:
                compared.append((task, theirs, part["lm_eval"][theirs], part["measures"][ours]["value"]))
    assert len(compared) == 17
    assert [row for row in compared if row[2] != pytest.approx(row[3])] == []


def test_unconditional_scores_are_given_answer_alone(rows):
    _, items = measure_tasks(scorer(), parts_of(["openbookqa"]), rows, 0, 2)
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
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq", "--num_fewshot", 1)
    assert "is of other num_fewshot: replacing it" in capsys.readouterr().out


def test_changed_items_are_not_taken_for_those_measured(model_folder, rows, tmp_path):
    evaluate(model_folder, rows, tmp_path, "--tasks", "sciq")
    items = tmp_path / "model_tasks.jsonl"
    items.write_text(items.read_text().replace('"right": 3', '"right": 0', 1))
    with pytest.raises(ValueError, match=r"model_tasks\.jsonl is not the file model_tasks\.json was written with"):
        read_tasks(tmp_path / "model_tasks.json")


def test_an_unknown_task_is_refused_with_what_may_be_meant(tmp_path):
    message = r"'hellaswags' is no task \(did you mean hellaswag\?\): choose from arc_challenge,(.|\n)*'xyz' is no task: choose"
    with pytest.raises(ValueError, match=message):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "hellaswags,piqa,xyz")


def test_missing_rows_are_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*piqa/validation\.jsonl \(2 of 2 files are missing\): run fetch_samples"):
        evaluate(Path("no/such/model"), tmp_path, tmp_path, "--tasks", "piqa,sciq")


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
        measure_tasks(Broken(), parts_of(["sciq"]), rows, 0, 2)


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
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert (done.returncode, "NETWORK" in done.stdout + done.stderr) == (0, False), done.stderr[-2000:]
    assert done.stdout.startswith("task ")  # nothing of lm-eval's before our table
