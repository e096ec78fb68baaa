"""How fast is clean_corpus.py beside datatrove's MinHash and datasketch, and what does it find of what was planted?

    pip install datasketch==2.0.0 lingua-language-detector==2.1.1
    python -m benchmarks.cleaning          # wants samples/ (fetch_samples.py); makes an environment for datatrove in .cache

Speed: on real documents (those of benchmarks/packing.py, in eight files) whole commands are timed, start-up and all, in turns:
all our steps; our MinHash alone; datatrove 0.10.1's MinHash in its four stages, in as many processes; datasketch 2.0.0's
MinHash and LSH, in its one process. All have word 5-grams, 112 hash functions, 14 bands of 8. datatrove's own words need spaCy,
so it is given a splitter into words like ours, which is faster; its hash function breaks with the xxhash 4 that other packages
bring, so it has an environment of its own.

Finding: among abstracts are planted exact copies, copies with 1, 2.5, 5 and 10 % of the words changed, rows of HellaSwag within
other text, texts in other languages (the chatterbot-corpus wheel) and junk. Printed are the share of each that went, and why;
what went of the abstracts themselves; and the true Jaccard similarity of what was taken for near-duplicates.

Language: py3langid, as it is and as we run it, against lingua, on texts of known languages.
"""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import venv
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.packing import texts
from lm.files import read_json, read_jsonl, sha256

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "cleaning"
DOCUMENTS, FILES, ROUNDS = 20_000, 8, 3
PROCESSES = len(os.sched_getaffinity(0))
PLANTED = 300  # of each kind
CHATTERBOT = ("chatterbot-corpus==1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")

DATATROVE = """
import re, sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.word_tokenizers import WordTokenizer

class Words(WordTokenizer):
    def word_tokenize(self, text): return re.findall(r"\\w+", text)
    def sent_tokenize(self, text): return [text]
    def span_tokenize(self, text): return [(0, len(text))]

if __name__ == "__main__":
    corpus, out, processes = sys.argv[1:]
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    def read(): return JsonlReader(corpus, glob_pattern="*.jsonl")
    def run(tasks, *steps):
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=int(processes), logging_dir=f"{out}/logs{len(logs)}").run()
        logs.append(tasks)
    logs = []
    run(8, read(), MinhashDedupSignature(f"{out}/signatures", config, language=Words()))
    run(14, MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config))
    run(1, MinhashDedupCluster(f"{out}/buckets", f"{out}/ids", config=config))
    run(8, read(), MinhashDedupFilter(f"{out}/ids"), JsonlWriter(f"{out}/clean"))
"""
DATASKETCH = """
import json, re, sys
from pathlib import Path
from datasketch import MinHash, MinHashLSH

corpus, out = sys.argv[1:]
lsh = MinHashLSH(num_perm=112, params=(14, 8))
with open(f"{out}/clean.jsonl", "w") as file:
    number = 0
    for path in sorted(Path(corpus).glob("*.jsonl")):
        for line in open(path):
            words = re.findall(r"\\w+", json.loads(line)["text"].lower())
            minhash = MinHash(num_perm=112)
            minhash.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(len(words) - 4, 1))])
            if not lsh.query(minhash):
                file.write(line)
            lsh.insert(str(number), minhash)
            number += 1
"""


def write(path: Path, rows: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows), encoding="utf-8")


def make_corpus() -> Path:
    """A folder of JSON Lines."""
    folder = CACHE / "corpus"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = list(itertools.islice(texts(), DOCUMENTS))
    for number in range(FILES):
        write(folder / f"{number}.jsonl", rows[number::FILES])
    return folder


def ours(corpus: Path, out: Path, *options: str) -> list[str]:
    """Our command; so few documents would be one piece, and one process would do all of it."""
    pieces = "import lm.documents as d; d.FILES_IN_A_PIECE = 1; import clean_corpus as c; c.main(c.parse(c.Args))"
    return [sys.executable, "-c", pieces, "--documents", str(corpus), f"--output_dir={out}/clean", *options]


def datatrove_python() -> str:
    """An interpreter that has datatrove as it can run its MinHash."""
    folder = CACHE / "datatrove"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        packages = ("datatrove==0.10.1", "xxhash<4", "regex", "orjson")
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "done").touch()
    return str(folder / "bin/python")


def commands(corpus: Path, out: Path) -> dict[str, list[str]]:
    """What is compared."""
    off = ("--no_unicode", "--language=", "--no_gopher", "--no_exact")
    return {
        "clean_corpus": ours(corpus, out, f"--num_workers={PROCESSES}"),
        "its MinHash": ours(corpus, out, f"--num_workers={PROCESSES}", *off),
        "datatrove": [datatrove_python(), str(CACHE / "minhash_pipeline.py"), str(corpus), str(out), str(PROCESSES)],
        "its MinHash, 1 process": ours(corpus, out, "--num_workers=1", *off),
        "datasketch": [sys.executable, "-c", DATASKETCH, str(corpus), str(out)],
    }


def num_kept(out: Path) -> int:
    """Documents that are left."""
    if (out / "clean/report.json").exists():
        return read_json(out / "clean/report.json", "")["kept"]["documents"]
    if (out / "clean.jsonl").exists():
        return (out / "clean.jsonl").read_bytes().count(b"\n")
    return sum(gzip.decompress(path.read_bytes()).count(b"\n") for path in out.glob("clean/*.gz"))


def measure_speed() -> dict[str, Any]:
    """Documents per second of each command, and the ratios."""
    corpus, out, seconds, kept = make_corpus(), CACHE / "out", {}, {}
    (CACHE / "minhash_pipeline.py").write_text(DATATROVE)
    for round_number in range(ROUNDS):
        for name, command in commands(corpus, out).items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            kept[name] = num_kept(out)
            print(f"round {round_number}: {name}: {seconds[name][-1]:.1f} s, {kept[name]:,} kept", flush=True)
    rates = {name: DOCUMENTS / statistics.median(times) for name, times in seconds.items()}
    print(f"\n{DOCUMENTS:,} documents, {PROCESSES} processes\n{'':<24}{'documents/s':>12}{'kept':>10}")
    for name, rate in rates.items():
        print(f"{name:<24}{rate:>12,.0f}{kept[name]:>10,}")
    for mine, theirs in (("its MinHash", "datatrove"), ("clean_corpus", "datatrove"), ("its MinHash, 1 process", "datasketch")):
        print(f"{mine} is {rates[mine] / rates[theirs]:.1f} times as fast as {theirs}")
    return {"seconds": seconds, "kept": kept}


def other_languages() -> dict[str, list[str]]:
    """Texts of some 300 characters out of dialogues, by language."""
    package, digest = CHATTERBOT
    if not (found := list(CACHE.glob("chatterbot*.whl"))):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(CACHE), package], check=True)
        found = list(CACHE.glob("chatterbot*.whl"))
    assert sha256(found[0]) == digest, f"{found[0]} is not the pinned one"
    texts = {}
    with zipfile.ZipFile(found[0]) as members:
        for name in sorted(members.namelist()):
            parts = name.split("/")
            if not name.endswith(".yml") or parts[2] in ("english", "hinglish", "swedish"):  # the last is half English
                continue
            lines = [line.lstrip("- ") for line in members.read(name).decode().splitlines() if line.lstrip().startswith("- ")]
            texts.setdefault(parts[2], []).extend(lines)
    joined = {language: " ".join(lines) for language, lines in texts.items()}
    return {name: [text[i : i + 300] for i in range(0, min(len(text) - 300, 6000), 300)] for name, text in joined.items()}


def planted(abstracts: list[str]) -> dict[str, list[str]]:
    """Documents of each kind, made of the first abstracts."""
    generator = random.Random(0)
    questions = read_jsonl(ROOT / "samples/tasks/hellaswag/validation.jsonl", "fetch_samples.py")[: 2 * PLANTED : 2]
    rows = [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in questions]
    junk = [" ".join(generator.choices(abstracts[i].split()[:6], k=120)) for i in range(PLANTED // 3)]
    junk += [re.sub(r"[aeiou]", "#", abstracts[i]) for i in range(PLANTED // 3)]
    junk += ["\n".join(f"- {word} ..." for word in abstracts[i].split()) for i in range(PLANTED // 3)]
    kinds = {"exact copies": abstracts[:PLANTED]}
    for percent in (1, 2.5, 5, 10):
        kinds[f"{percent} % of words changed"] = [changed(text, percent / 100, generator) for text in abstracts[:PLANTED]]
    kinds["evaluation rows"] = [f"{abstracts[-i][:400]} {row} {abstracts[-i - 1][:400]}" for i, row in enumerate(rows, 2)]
    kinds["other languages"] = [text for texts in other_languages().values() for text in texts]
    return kinds | {"junk": junk}


def changed(text: str, share: float, generator: random.Random) -> str:
    words = text.split()
    for at in generator.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = generator.choice(words)[::-1]
    return " ".join(words)


def grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 5]) for i in range(max(len(words) - 4, 1))}


def measure_finding() -> dict[str, Any]:
    """What went of each kind that was planted, and of the abstracts."""
    folder, out = CACHE / "planted", CACHE / "out"
    for path in (folder, out):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    with open(ROOT / "samples/pubmed/train.jsonl", encoding="utf-8") as file:
        abstracts = [text for text in (json.loads(line)["text"] for line in file) if len(text.split()) >= 100]
    kinds = {"abstracts": abstracts, **planted(abstracts)}
    for number, (name, rows) in enumerate(kinds.items()):
        write(folder / f"{number} {name.replace(' ', '_')}.jsonl", rows)
    options = ("--eval_decontaminate=hellaswag", "--rows=samples/tasks", "--examples=1000000")
    subprocess.run(ours(folder, out, *options), check=True, capture_output=True, cwd=ROOT)
    removed, similar = {}, []
    with open(out / "clean/removed.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "documents" in row:
                continue
            name = list(kinds)[int(Path(row["file"]).name.split()[0])]
            removed.setdefault(name, Counter())[row["reason"].split(":")[0]] += 1
            if row["reason"] == "near-duplicate":
                origin = list(kinds)[int(Path(row["duplicate_of"]["file"]).name.split()[0])]
                pair = [grams(kinds[name][row["line"] - 1]), grams(kinds[origin][row["duplicate_of"]["line"] - 1])]
                similar.append(len(pair[0] & pair[1]) / len(pair[0] | pair[1]))
    for name, rows in kinds.items():
        gone = removed.get(name, Counter())
        print(f"{name:<24}{gone.total():>6} of {len(rows):>6} went ({100 * gone.total() / len(rows):.1f} %): {dict(gone)}")
    print(
        f"true similarity of {len(similar)} near-duplicates: least {min(similar):.2f}, median {statistics.median(similar):.2f}"
    )
    return {"removed": removed, "least_similarity": min(similar)}


def measure_languages() -> dict[str, Any]:
    """English lost, other languages kept, and texts per second, of three detectors; a text is English from 0.65 on."""
    from lingua import LanguageDetectorBuilder
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    from lm.language import languages

    with open(ROOT / "samples/pubmed/test.jsonl", encoding="utf-8") as file:
        english = [json.loads(line)["text"][:300] for line in file][:400]
    other = [text for texts in other_languages().values() for text in texts]
    theirs = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    lingua = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models().build()

    def by_lingua(text: str) -> tuple[str, float]:
        best = lingua.compute_language_confidence_values(text)[0]
        return best.language.iso_code_639_1.name.lower(), best.value

    detectors: dict[str, Callable] = {"ours": languages().detect, "py3langid": theirs.classify, "lingua": by_lingua}
    results = {}
    for name, detect in detectors.items():
        detect(english[0])
        start = time.perf_counter()
        found = [detect(text) for text in [*english, *other]]
        rate = len(found) / (time.perf_counter() - start)
        is_english = [language == "en" and probability >= 0.65 for language, probability in found]
        lost, kept = len(english) - sum(is_english[: len(english)]), sum(is_english[len(english) :])
        print(f"{name:<12}{rate:>8,.0f} texts/s, English lost: {lost} of {len(english)}, others kept: {kept} of {len(other)}")
        results[name] = {"rate": rate, "lost": lost, "kept": kept}
    return results


def main() -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "cleaning", "processes": PROCESSES, "documents": DOCUMENTS}
    record |= {"finding": measure_finding(), "languages": measure_languages(), "speed": measure_speed()}
    with open(Path(__file__).with_name("results.jsonl"), "a") as file:
        file.write(json.dumps(record | {"timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main()
