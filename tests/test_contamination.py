"""Evaluation rows in documents."""

import json

import pytest

from lm.contamination import Evaluation, Index, chosen_tasks, gram_lengths, write_index
from lm.corpus import find_files
from lm.text_normal import normalise

LONG = "a small brown dog carries the heavy basket of red apples across an old stone bridge before noon"  # 18 words
EIGHT = "seven wise owls never sing before winter nights"
SEVEN = "only six grey cats ever sleep outside"
CLEAN = "nobody in the whole village remembered when the mill had last been turning, and the water ran idle through its wheel"


def index_of(folder, *texts):
    (folder / "eval.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = find_files([str(folder / "eval.jsonl")])
    write_index(Evaluation(files=tuple(files)), folder / "index")
    return Index(folder / "index")


def test_rows_are_found_within_longer_text_whatever_case_and_punctuation(tmp_path):
    index = index_of(tmp_path, CLEAN.upper() + " so it goes", LONG, EIGHT, SEVEN)
    name = str(tmp_path / "eval.jsonl")
    shout = "It is said: " + LONG.replace(" ", ", ").title() + "! " + PADDING
    assert index.find(PADDING + shout) == {
        "in": name,
        "row": 1,
        "words": ", ".join(LONG.split()[:13]),
    }
    assert index.find(PADDING + EIGHT + PADDING) == {"in": name, "row": 2, "words": EIGHT}
    assert index.find(PADDING + SEVEN + PADDING) is None  # too common to be looked for
    assert index.sources == [{"name": name, "first": 0, "rows": 4, "too_short": 1}]


PADDING = " All of this is about something else entirely and was written long ago by other hands. "


@pytest.mark.parametrize(("words", "found"), [(13, True), (12, False)])
def test_thirteen_words_in_a_row_are_needed(words, found, tmp_path):
    index = index_of(tmp_path, LONG)
    for start in range(len(LONG.split()) - words + 1):
        part = " ".join(LONG.split()[start : start + words])
        assert (index.find(f"xyz {part} zyx") is not None) == found


@pytest.mark.parametrize(
    "written", ["the caf\u00e9 is open", "the cafe\u0301 is open", "the cafÃ© is open", "the oﬃce is open"]
)
def test_a_row_is_found_as_it_stands_and_as_documents_are_normalised(written, tmp_path):
    row = f"the {written} every day but on Mondays from eight in the morning until late at night"
    index = index_of(tmp_path, row)
    for text in (row, normalise(row)):
        assert index.find(PADDING + text + PADDING) is not None


def test_each_line_of_a_text_file_is_a_row(tmp_path):
    (tmp_path / "questions.txt").write_text(f"{EIGHT}\n{LONG}\n{SEVEN}\n")
    write_index(Evaluation(files=tuple(find_files([str(tmp_path / "questions.txt")]))), tmp_path / "index")
    index = Index(tmp_path / "index")
    assert index.sources[0]["rows"] == 3
    assert index.find(PADDING + EIGHT + PADDING)["row"] == 0


def test_clean_text_passes(tmp_path):
    index = index_of(tmp_path, LONG, EIGHT)
    assert index.find(CLEAN) is None
    assert index.find("") is None
    assert index.find(" ".join(reversed(LONG.split()))) is None


@pytest.mark.parametrize(("num_words", "length"), [(0, 0), (7, 0), (8, 8), (12, 12), (13, 13), (500, 13)])
def test_how_many_words_are_looked_for(num_words, length):
    assert gram_lengths(num_words) == length


def test_no_evaluation_set_finds_nothing(tmp_path):
    write_index(Evaluation(), tmp_path / "index")
    assert Index(tmp_path / "index").find(LONG) is None


def test_an_evaluation_set_without_rows_is_refused(tmp_path):
    (tmp_path / "eval.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="eval.jsonl has no row, one at least is needed"):
        write_index(Evaluation(files=tuple(find_files([str(tmp_path / "eval.jsonl")]))), tmp_path / "index")


def test_tasks_are_found_as_lm_eval_words_them_and_as_they_are(samples, tmp_path):
    """WinoGrande's sentences have a gap, which only the worded ones fill; LAMBADA's rows are read as they are."""
    rows = tmp_path / "rows"
    for task in ("winogrande", "hellaswag", "sciq"):
        (rows / task).mkdir(parents=True)
        lines = (samples / f"tasks/{task}/validation.jsonl").read_text().splitlines(keepends=True)[:50]
        (rows / task / "validation.jsonl").write_text("".join(lines))
    (rows / "lambada_openai").mkdir()
    (rows / "lambada_openai/test.jsonl").write_text(json.dumps({"text": LONG}) + "\n")
    tasks = chosen_tasks("winogrande, hellaswag,sciq,lambada,lambada_openai")
    evaluation = Evaluation(tasks=tasks, rows=rows)
    assert evaluation.faults() == []
    write_index(evaluation, tmp_path / "index")
    index = Index(tmp_path / "index")
    found = {source["name"]: source["rows"] for source in index.sources}
    assert found == {"winogrande": 50, "hellaswag": 50, "sciq": 50, "lambada_openai": 1}
    row = json.loads((rows / "winogrande/validation.jsonl").read_text().splitlines()[3])
    for option in ("option1", "option2"):
        filled = row["sentence"].replace("_", row[option])
        found = index.find(PADDING + filled + PADDING)
        assert (found["in"], found["row"]) == ("winogrande", 3)
    *_, last = (rows / "winogrande/validation.jsonl").read_text().splitlines()
    found = index.find(PADDING + json.loads(last)["sentence"].replace("_", json.loads(last)["option2"]) + PADDING)
    assert (found["in"], found["row"]) == ("winogrande", 49)
    row = json.loads((rows / "sciq/validation.jsonl").read_text().splitlines()[7])
    assert index.find(PADDING + row["question"] + PADDING)["in"] == "sciq"
    assert index.find(PADDING + row["support"] + PADDING)["row"] == 7
    assert index.find(LONG)["in"] == "lambada_openai"
    assert index.find(PADDING * 3) is None


def test_unknown_tasks_and_missing_rows_are_named_together(tmp_path):
    faults = Evaluation(tasks=("hellaswagg", "piqa", "wikitext"), rows=tmp_path).faults()
    assert len(faults) == 3
    assert "--eval_decontaminate 'hellaswagg' is no task (did you mean hellaswag?)" in faults[0]
    assert f"no {tmp_path}/piqa/*.jsonl: run fetch_samples.py --parts tasks" in faults[1]
    assert f"no {tmp_path}/wikitext/*.jsonl: put its rows there as JSON Lines (EleutherAI/wikitext_document_level)" in faults[2]
