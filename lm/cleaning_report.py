"""What a cleaning job came to: the manifest, examples of what went, totals, a figure, and the seal on all of it."""

import shutil
from pathlib import Path
from typing import Any

import orjson

from lm.cleaning import MADE_BY, Job, Tally, Tell
from lm.contamination import Index
from lm.files import listed, read_sealed, whole_file, write_json, write_sealed
from lm.tables import aligned

FORMAT = "clean-corpus-1"
NOT_REMOVED = ("read", "changed", "kept")
SUBMITTED = "submitted.json"  # the SLURM jobs that are to clean, until they have


def finish(job: Job, number: int, tell: Tell) -> None:
    """Write all but the parts, meta.json last, and remove what only the cleaning needed."""
    tally, parts = _totals(job)
    report = report_of(job, tally)
    names = sorted(parts)
    with whole_file(job.folder / "manifest.txt") as partial:
        partial.write_text("".join(f"{name}\n" for name in names))
    with whole_file(job.folder / "removed.jsonl") as partial, open(partial, "wb") as file:
        for row in report["removed"]:
            file.write(orjson.dumps(row) + b"\n")
            file.writelines(orjson.dumps({"reason": row["reason"], **it}) + b"\n" for it in tally.examples[row["reason"]])
    write_json(job.folder / "report.json", report)
    draw(job.folder / "removed.png", report)
    made = listed(job.folder, [job.folder / name for name in ("manifest.txt", "removed.jsonl", "report.json", "removed.png")])
    header = read_sealed(job.folder / "progress.json", MADE_BY, FORMAT)["header"]
    totals = {"documents": report["kept"]["documents"], "characters": report["kept"]["characters"]}
    write_sealed(job.folder / "meta.json", {"format": FORMAT, "header": header, **totals, "files": parts | made})
    tidy(job.folder)


def tidy(folder: Path) -> None:
    """Remove what only the cleaning needed."""
    shutil.rmtree(folder / "partial", ignore_errors=True)
    for name in ("progress.json", SUBMITTED):
        (folder / name).unlink(missing_ok=True)


def _totals(job: Job) -> tuple[Tally, dict[str, Any]]:
    """The tallies of all pieces as one, in their order; and size and SHA-256 of every part."""
    total, parts = Tally(job.examples), {}
    before = job.report("plan")["lines_before"]
    for stage in ("filter", "write"):
        for number in range(len(job.pieces)):
            report = job.report(stage, number)
            parts |= report.get("files", {})
            for what, (documents, characters) in report["counts"].items():
                found = total.counts.setdefault(what, [0, 0])
                found[0] += documents
                found[1] += characters
            for reason, examples in report["examples"].items():
                kept = total.examples.setdefault(reason, [])
                if stage == "filter":  # which did not know what stands before a piece in its file
                    examples = [it | {"line": it["line"] + before[number] if it["line"] else None} for it in examples]
                kept += examples[: job.examples - len(kept)]
    return total, parts


def report_of(job: Job, tally: Tally) -> dict[str, Any]:
    """{"documents", "characters"} of what was read, changed and kept, and of each reason, in the order of the steps."""
    counts = {what: {"documents": n, "characters": m} for what, (n, m) in tally.counts.items()}
    empty = {"documents": 0, "characters": 0}
    removed = [{"reason": reason, **count} for reason, count in counts.items() if reason not in NOT_REMOVED]
    removed.sort(key=lambda row: (_rank(row["reason"]), -row["documents"], row["reason"]))
    report = {what: counts.get(what, empty) for what in NOT_REMOVED}
    return report | {"removed": removed, "evaluation": Index(job.place("index")).sources}


def _rank(reason: str) -> int:
    """The place of a reason's step among the steps."""
    steps = ("no document", "empty", "language", "c4", "gopher", "exact duplicate", "near-duplicate", "contaminated")
    return steps.index(reason.split(":")[0])


def table(report: dict[str, Any]) -> str:
    """The report for a screen."""
    rows = [("", "documents", "share", "characters")]
    whole = max(report["read"]["documents"], 1)
    named = [("read", report["read"]), *((row["reason"], row) for row in report["removed"]), ("kept", report["kept"])]
    for name, count in named:
        share = f"{100 * count['documents'] / whole:.2f} %"
        rows.append((name, f"{count['documents']:,}", share, f"{count['characters']:,}"))
    lines = [aligned(rows), f"text changed in {report['changed']['documents']:,} of those that passed the filters"]
    for source in report["evaluation"]:
        lines.append(f"{source['name']}: {source['rows']:,} rows looked for, {source['too_short']:,} of them too short to be")
    return "\n".join(lines)


def draw(path: Path, report: dict[str, Any]) -> None:
    """A bar for each reason: documents and characters that went, in percent of what was read."""
    from lm.plots import figure  # takes a second

    rows = sorted(report["removed"], key=lambda row: -row["documents"])
    names = [row["reason"] for row in rows]
    with figure(path, width=9.0, height=0.32 * len(names) + 1.6) as (axes,):
        largest = 0.0
        for offset, unit in ((-0.2, "documents"), (0.2, "characters")):
            shares = [100 * row[unit] / max(report["read"][unit], 1) for row in rows]
            largest = max([largest, *shares])
            bars = axes.barh([position + offset for position in range(len(names))], shares, 0.38, label=unit)
            axes.bar_label(bars, [f"{share:.2g} %" for share in shares], padding=3, fontsize=7)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="% of what was read", xlim=(0, 1.12 * largest or 1))
        axes.invert_yaxis()
        axes.legend(loc="lower right")
        read, kept = report["read"], report["kept"]
        share = 100 * kept["characters"] / max(read["characters"], 1)
        axes.set_title(
            f"{kept['documents']:,} of {read['documents']:,} documents and {share:.3g} % of the text kept; what went:"
        )
