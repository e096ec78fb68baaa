"""lm/pubmed.py: abstracts of the samples, every one of one category, the same on every machine."""

import gzip
import json
import zipfile
from collections import Counter

import pytest

from lm import pubmed
from lm.files import read_json, read_jsonl, sha256
from lm.pubmed import categories_of, write_pubmed
from lm.sample_rows import split_of
from lm.sources import SPLITS

# The whole result. A change of the rules changes these, and every number that was measured on the samples.
PUBMED_SHA256 = {
    "train.jsonl": "3b8e64524f5a59fef2f30ad251fdb0cb7f8de33b19d56fda64a08568c792f966",
    "validation.jsonl": "5dc74ae802d4cffb9c70f56900154a28515efac4a3698372f5759038af246387",
    "test.jsonl": "35fcbb4dab9ba9c92f368d23dc9596d544b35c49ba80d25aa9c77fdd2cfd5344",
}
DOCUMENTS = {
    "cardiovascular": (607, 72, 64),
    "chemistry": (2284, 276, 279),
    "engineering": (630, 91, 87),
    "environment": (915, 116, 116),
    "immunology": (672, 85, 92),
    "microbiology": (1131, 138, 142),
    "neuroscience": (989, 110, 143),
    "oncology": (1058, 142, 147),
    "pharmacology": (977, 105, 118),
    "psychology": (911, 122, 116),
    "surgery": (1215, 155, 174),
}


def test_abstracts_are_the_same_on_every_machine(samples):
    assert {name: sha256(samples / "pubmed" / name) for name in PUBMED_SHA256} == PUBMED_SHA256


def test_eleven_categories_with_these_numbers_of_documents(samples):
    meta = read_json(samples / "pubmed/meta.json", "fetch_samples.py")
    assert meta["counts"] == {name: dict(zip(SPLITS, counts, strict=True)) for name, counts in DOCUMENTS.items()}
    assert meta["files"] == PUBMED_SHA256
    assert sum(meta["left_out"].values()) + sum(map(sum, DOCUMENTS.values())) == 50_788, "every article is accounted for"


def test_rows_are_unique_text_of_one_category_in_the_split_of_their_pmid(samples):
    counts, pmids, texts = Counter(), [], []
    for split in SPLITS:
        for line in (samples / f"pubmed/{split}.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            assert list(row) == ["text", "label", "id"]
            assert len(row["text"]) >= 200
            assert row["text"] == " ".join(row["text"].split())
            assert split_of(row["id"]) == split
            counts[row["label"], split] += 1
            pmids.append(row["id"])
            texts.append(row["text"])
    assert counts == {(name, split): count for name, row in DOCUMENTS.items() for split, count in zip(SPLITS, row, strict=True)}
    assert len(set(pmids)) == len(pmids)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("journal", "categories"),
    [
        ("Journal of bacteriology", ["microbiology"]),
        ("Psychopharmacology", ["pharmacology"]),
        ("Journal of neurosurgery", ["surgery"]),
        ("Antimicrobial agents and chemotherapy", ["microbiology"]),
        ("Journal of medicinal chemistry", ["chemistry"]),
        ("The Journal of experimental zoology", []),  # no "mental" inside a word
        ("PloS one", []),
        ("Infection and immunity", ["immunology", "microbiology"]),
        ("Aging : journal of the Society of Surgery", []),  # behind the colon stands a society
        ("Aging (Society of Surgery)", []),
        ("Environmental pollution (Barking, Essex : 1987)", ["environment"]),
        ("Cortex; a journal devoted to the study of the nervous system and behavior", ["neuroscience"]),
    ],
)
def test_category_is_that_of_words_in_the_journals_title(journal, categories):
    assert categories_of(journal) == categories


ARTICLE = """<PubmedArticle><MedlineCitation><PMID Version="1">{pmid}</PMID><Article>
<Journal><Title>{journal}</Title></Journal><ArticleTitle>x</ArticleTitle>{abstract}
<Language>{language}</Language></Article></MedlineCitation></PubmedArticle>"""


def test_every_rule_leaves_out_what_it_names_and_nothing_else(tmp_path, monkeypatch):
    words = " ".join(f"word{number}" for number in range(40))
    abstract = f"<Abstract><AbstractText>{words}</AbstractText></Abstract>"
    rows = [
        {"pmid": "1"},
        {"pmid": "1", "abstract": abstract.replace("word7", "other")},
        {"pmid": "2"},
        {"pmid": "3", "language": "ger"},
        {"pmid": "4", "language": "eng</Language><Language>fre"},
        {"pmid": "5", "abstract": ""},
        {"pmid": "6", "abstract": "<Abstract><AbstractText>Not available.</AbstractText></Abstract>"},
        {"pmid": "7", "journal": "Nature"},
        {"pmid": "8", "journal": "Cancer surgery"},
        {
            "pmid": "9",
            "abstract": '<Abstract><AbstractText Label="AIM">CO<sub>2</sub> &lt;5\n  µm,</AbstractText>'
            f"<AbstractText>{words}.</AbstractText><CopyrightInformation>©</CopyrightInformation></Abstract>",
        },
    ]
    defaults = {"journal": "Cancer", "language": "eng", "abstract": abstract}
    xml = "".join(ARTICLE.format(**defaults | row) for row in rows)
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr("a.xml.gz", gzip.compress(f"<PubmedArticleSet>{xml}</PubmedArticleSet>".encode()))
    monkeypatch.setattr(pubmed, "MEMBERS", ("a.xml.gz",))
    facts = write_pubmed(tmp_path / "wheel", tmp_path)
    written = [row for split in SPLITS for row in read_jsonl(tmp_path / f"{split}.jsonl", "fetch_samples.py")]
    assert sorted(written, key=lambda row: row["id"]) == [
        {"text": words, "label": "oncology", "id": "1"},
        {"text": f"CO2 <5 µm, {words}.", "label": "oncology", "id": "9"},
    ]
    assert facts["left_out"] == {
        "repeated": 2,
        "not English": 2,
        "no abstract of 200 characters": 2,
        "no category": 1,
        "several categories": 1,
    }
    assert sum(facts["counts"]["oncology"].values()) == 2
