"""The results of a ladder are read as they were written: runs of ours, and tables in the published format.

data/published_results.csv has the columns, seeds' names and text of metrics of allenai/DataDecide-eval-results; its values are
made up: at 4M the second seed ended early, and the recipes rank the other way round than at 1B.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from lm.comparable import Result, Run, compared_steps, merge_subjects
from lm.decisions import decision_table
from lm.ladder_results import read_results
from lm.results_table import parse_metrics
from lm.task_results import write_tasks

PUBLISHED = Path(__file__).parent / "data/published_results.csv"
RECIPES = ("C4", "Dolma1.7", "FineWeb-Edu")
LEFT_OUT = ["4M is compared at step 5725, left out without a checkpoint near it: seed small aux 2 of 3 recipes"]


def write_run(folder: Path, accuracy: float, losses: dict[str, float], step: int = 100, **measured: object) -> Path:
    """What a finished run of pretrain.py with 1,000 parameters and 64 tokens a step leaves, evaluated."""
    (folder / "final").mkdir(parents=True)
    run = {"script": "pretrain.py", "args": {"mixin_percent": 0.0}, "derived": {"non_embedding_parameters": 1000}}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "final/about.json").write_text(json.dumps({"step": step, "tokens": 64 * step}))
    measures = {"primary_metric": accuracy, "correct_prob_per_char": accuracy / 2}
    task = {"measures": {name: {"value": value, "se": None} for name, value in measures.items()}}
    about = {"measured": {"limit": None, "weights": str(folder)} | measured}
    write_tasks(folder / "evaluation/final_tasks.json", about | {"tasks": {"piqa": task}}, [])
    for name, loss in losses.items():
        (folder / f"evaluation/final_text_{name}.json").write_text(json.dumps({"loss": loss, "perplexity": 2.0}))
    return folder


def result(recipe: str, task: str, **measures: float) -> Result:
    return Result(recipe=recipe, size="4M", seed="s", step=1, tokens=1.0, compute=1.0, task=task, measures=measures)


def test_runs_of_a_ladder_are_read_whole(tmp_path):
    folder = write_run(tmp_path / "c4/1M/seed3", 0.5, {"wiki": 4.25})
    (folder / "results.json").write_text(json.dumps({"validation": {"loss": 9.0}, "test": {"loss": 4.5, "perplexity": 90.0}}))
    of_run = {"recipe": "c4", "size": "1M", "seed": "seed3", "step": 100, "tokens": 6400.0, "compute": 6.0 * 1000 * 6400}
    said = []
    assert read_results(tmp_path, say=said.append) == [
        Result(**of_run, task="piqa", measures={"primary_metric": 0.5, "correct_prob_per_char": 0.25}),
        Result(**of_run, task="perplexity: wiki", measures={"loss": 4.25}),
        Result(**of_run, task="perplexity: test", measures={"loss": 4.5}),
    ]
    assert said == []


def test_runs_without_an_evaluation_are_left_out_by_name(tmp_path):
    write_run(tmp_path / "a/1M/seed0", 0.5, {})
    unfinished, unmeasured = (write_run(tmp_path / name / "1M/seed0", 0.5, {}) for name in "bc")
    (unfinished / "final/about.json").unlink()
    (unfinished / "final").rmdir()
    (unmeasured / "evaluation/final_tasks.json").unlink()
    said = []
    assert [found.recipe for found in read_results(tmp_path, say=said.append)] == ["a"]
    assert said == [f"{unfinished} is not finished: left out", f"{unmeasured} is not evaluated: left out"]


@pytest.mark.parametrize(("name", "values"), [("effective_batch", (8, 16)), ("test_documents", ("x", "y"))])
def test_runs_of_a_size_that_were_trained_or_tested_differently_are_refused(name, values, tmp_path):
    for recipe, value in zip("ab", values, strict=True):
        folder = write_run(tmp_path / recipe / "1M/seed0", 0.5, {})
        if name == "test_documents":
            (folder / "results.json").write_text(json.dumps({"test": {"loss": 4.5, "documents": value}}))
        else:
            run = json.loads((folder / "run.json").read_text())
            run["args"][name] = value
            (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=rf"--{name}.* differs, {values[0]} in .*a/1M/seed0; {values[1]} in .*b/1M/seed0"):
        read_results(tmp_path)


def test_results_with_examples_are_read_where_there_are_no_plain_ones(tmp_path):
    folder = write_run(tmp_path / "c4/1M/seed3", 0.5, {}) / "evaluation"
    plain, shot, chat = (folder / f"final_tasks{name}.json" for name in ("", "_5shot", "_5shot_chat"))
    for path, accuracy in {shot: 0.25, chat: 0.75}.items():
        task = {"measures": {"primary_metric": {"value": accuracy, "se": None}}}
        write_tasks(path, {"measured": {"limit": None}, "tasks": {"piqa": task}}, [])
    assert [found.measures["primary_metric"] for found in read_results(tmp_path)] == [0.5]
    plain.unlink()
    with pytest.raises(ValueError, match=r"seed3 has final_tasks_5shot.json, final_tasks_5shot_chat.json, one is needed: move"):
        read_results(tmp_path)
    chat.unlink()
    assert [found.measures["primary_metric"] for found in read_results(tmp_path)] == [0.25]


def test_runs_that_were_evaluated_in_different_ways_are_refused(tmp_path):
    write_run(tmp_path / "a/1M/seed0", 0.5, {}, limit=10)
    write_run(tmp_path / "b/1M/seed0", 0.5, {})
    expected = (
        f"final_tasks.json: limit differs, 10 in {tmp_path}/a/1M/seed0; None in {tmp_path}/b/1M/seed0:"
        " train and evaluate all runs with the same arguments"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        read_results(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "folder of parts"])
def test_the_published_table_is_read_alike_in_every_format(tmp_path, kind):
    table = pa.csv.read_csv(PUBLISHED)
    path = {"csv": PUBLISHED, "folder of parts": tmp_path}.get(kind, tmp_path / f"table.{kind}")
    if kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    elif kind == "folder of parts":
        for number, start in enumerate((0, 20)):
            pa.parquet.write_table(table.slice(start, 20 + 5 * number), tmp_path / f"train-{number}.parquet")
    said = []
    found = read_results(path, say=said.append)
    assert said == LEFT_OUT
    runs = [("4M", "default", 5725, 3.752e8, 8.43e15)]
    runs += [("1B", seed, 69369, 1e11, 7.06e20) for seed in ("default", "large aux 2")]
    expected = [(recipe, *run, task) for run in runs for recipe in RECIPES for task in ("arc_easy", "mmlu")]
    of_key = {(r.recipe, r.size, r.seed, r.step, r.tokens, r.compute, r.task): r.measures for r in found}
    assert sorted(of_key) == sorted(expected)
    assert len(found) == 18
    accuracies = dict.fromkeys(("primary_metric", "acc_raw", "acc_per_char"), 0.605)
    probabilities = {"correct_prob_per_char": 0.3, "margin_per_char": -0.05, "total_prob_per_char": 0.5}
    assert of_key["FineWeb-Edu", *runs[2], "arc_easy"] == accuracies | probabilities  # its NaN and None are left out
    accuracies = dict.fromkeys(accuracies, pytest.approx(0.62))  # the mean of .615 and .625
    probabilities |= {"correct_prob_per_char": pytest.approx(0.315), "norm_correct_prob_per_char": 0.25}
    assert of_key["FineWeb-Edu", *runs[2], "mmlu"] == accuracies | probabilities


def test_the_common_step_is_the_last_of_all_seeds():
    said = []
    found = read_results(PUBLISHED, "common", said.append)
    assert Counter((r.size, r.seed, r.step) for r in found) == {
        ("4M", "default", 1250): 6,
        ("4M", "small aux 2", 1250): 6,
        ("1B", "default", 69369): 6,
        ("1B", "large aux 2", 69369): 6,
    }
    assert said == ["4M is compared at step 1250, some runs have results up to step 5725, others have not"]


def test_the_published_table_decides():
    rows = decision_table(read_results(PUBLISHED, say=lambda line: None), "1B", ["primary_metric", "correct_prob_per_char"])
    assert [(row["task"], row["measure"], row["decision_accuracy"], row["num_pairs"]) for row in rows] == [
        (task, measure, right, 3)
        for task in ("average of 2 tasks", "arc_easy", "mmlu")
        for measure, right in (("primary_metric", 0.0), ("correct_prob_per_char", 1.0))
    ]


def test_a_bad_row_is_named(tmp_path):
    lines = PUBLISHED.read_text().splitlines(keepends=True)
    lines[10] = lines[10].replace("{'primary_metric'", "{'primary_metric")  # row 10, a 4M model at its last step
    lines[12] = lines[12].replace('"{', "\"__import__('os').abort() or {")
    lines[14] = lines[13]
    path = tmp_path / "table.csv"
    path.write_text("".join(lines))
    with pytest.raises(ValueError, match="mend or remove that row") as error:
        read_results(path)
    found = str(error.value).splitlines()
    assert [line.split(" has metrics")[0] for line in found[:2]] == [f"{path} row 10", f"{path} row 12"]
    assert [line.endswith("a dict of measures is needed: mend or remove that row") for line in found[:2]] == [True, True]
    once_more = "is arc_easy of Dolma1.7, 4M, default at step 5725 once more: mend or remove that row"
    assert found[2:] == [f"{path} row 14 {once_more}"]


def test_a_row_without_a_step_is_named(tmp_path):
    lines = PUBLISHED.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace(",1250,", ",,")
    path = tmp_path / "table.csv"
    path.write_text("".join(lines))
    expected = f"{path} row 3 has data, params, seed, step ('C4', '4M', 'default', ''), three names and a number are needed"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}: mend or remove that row$"):
        read_results(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "params,data,task\n4M,C4,piqa\n", "t.csv after row 0 cannot be read"),
        ("t.jsonl", '{"params": "4M"}\n', "no column data, seed, step"),
        ("t.parquet", "PAR1 no more", "t.parquet after row 0 cannot be read"),
        ("t.xlsx", "", "ends in '.xlsx', one of .parquet, .csv, .jsonl is needed"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_results(tmp_path / name)


def test_no_results_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass the folder of a ladder"):
        read_results(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no table"):
        read_results(tmp_path)


def test_metrics_are_read_as_text_and_never_run():
    assert parse_metrics("{'a': 1, 'b': nan, 'c': -inf, 'd': None, 'e': True, 'f': 'nan', 'g': [nan], 'h': -2.5e-3}") == {
        "a": 1.0,
        "h": -0.0025,
    }
    assert parse_metrics('{"a": 1, "b": NaN, "c": null, "d": true}') == {"a": 1.0}
    for text in ("dict(a=1)", "{'a': 1 + open('x')}", "[1]", "", None, "{" * 10_000):
        with pytest.raises(ValueError, match="a dict of measures is needed"):
            parse_metrics(text)


def test_a_checkpoint_within_five_percent_of_its_sizes_step_counts():
    cells = [(Run("a", "1M", "0"), step) for step in (500, 980, 1000)]
    cells += [(Run("a", "1M", "1"), 955), (Run("a", "1M", "2"), 940), (Run("b", "1M", "0"), 990)]
    said = []
    assert compared_steps(cells, "last", said.append) == {
        Run("a", "1M", "0"): 980,
        Run("a", "1M", "1"): 955,
        Run("b", "1M", "0"): 990,
    }
    assert said == ["1M is compared at step 990, left out without a checkpoint near it: seed 2 of 1 recipes"]


def test_subjects_of_mmlu_count_as_one_task_where_all_were_measured():
    parts = [result("a", "mmlu_x", acc=0.5, margin=0.25), result("a", "mmlu_y", acc=1.0), result("b", "mmlu_x", acc=0.5)]
    assert merge_subjects([*parts, result("b", "piqa", acc=0.5)]) == [
        result("b", "piqa", acc=0.5),
        result("a", "mmlu", acc=0.75),
    ]
    assert merge_subjects([*parts, result("a", "mmlu", acc=0.7)]) == [result("a", "mmlu", acc=0.7)]
