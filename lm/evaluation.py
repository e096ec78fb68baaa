"""The evaluation of one checkpoint on disk: NAME.json says what was measured, NAME.npz holds the loss of every window.

The losses of single windows are kept because two models are compared on the same windows: most of what a loss varies
by is the text, and it drops out of the difference.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lm.files import read_json, sha256, whole_file, write_json
from lm.measure import mean_and_se, ratio_and_se
from lm.tables import aligned

FORMAT = "evaluation-1"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What evaluate_model.py context measured on one checkpoint; N windows a category, T targets a window."""

    record: dict
    """What NAME.json holds."""
    losses: dict[str, np.ndarray]
    """Category -> (N, T) nats, float32."""
    papers: dict[str, np.ndarray]
    """Category -> (N,) the paper of each window, as its index in the data's index.jsonl."""


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write `path` (NAME.json) and NAME.npz beside it; the JSON last, with the checksum of the other."""
    arrays = {f"{name}/losses": losses.astype(np.float32) for name, losses in evaluation.losses.items()}
    arrays |= {f"{name}/papers": papers for name, papers in evaluation.papers.items()}
    windows = path.with_suffix(".npz")
    with whole_file(windows) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
    record = {"format": FORMAT, **evaluation.record, "windows": {"file": windows.name, "sha256": sha256(windows)}}
    write_json(path, record)


def read_evaluation(path: Path) -> Evaluation:
    """Read what `write_evaluation` wrote.

    Raises: FileNotFoundError if there is none; ValueError if it is of another format, or the two files do not belong
        together, as after a kill between their writing.
    """
    record = read_json(path, "evaluate_model.py context")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not in format {FORMAT}: run evaluate_model.py context --overwrite")
    windows = path.with_name(record["windows"]["file"])
    if not windows.is_file() or sha256(windows) != record["windows"]["sha256"]:
        raise ValueError(f"{windows} is not the file {path.name} was written with: run evaluate_model.py context --overwrite")
    with np.load(windows) as arrays:
        return Evaluation(
            record=record,
            losses={name: arrays[f"{name}/losses"] for name in record["categories"]},
            papers={name: arrays[f"{name}/papers"] for name in record["categories"]},
        )


def position_record(losses: np.ndarray, papers: np.ndarray) -> dict:
    """The loss at each position, with standard errors (null if all windows are of one paper)."""
    mean, se = mean_and_se(losses, papers)
    return {"position_loss": mean.tolist(), "position_se": _known(se), "num_windows": len(losses)}


def score_record(totals: np.ndarray) -> dict:
    """Loss per token and perplexity of papers, from (papers, 2): summed loss and number of targets of each."""
    loss, se = ratio_and_se(totals[:, 0], totals[:, 1])
    return {
        "loss": float(loss),
        "loss_se": _known(se),
        "perplexity": float(np.exp(loss)),
        "num_papers": len(totals),
        "num_tokens": int(totals[:, 1].sum()),
    }


def _known(se: np.ndarray) -> list[float] | float | None:
    return None if np.isnan(se).any() else np.asarray(se).tolist()


def score_table(record: dict) -> str:
    """Loss and perplexity of each category and overall, for the screen."""
    rows = [("category", "loss (nats/token)", "perplexity", "papers", "tokens")]
    for name, row in [*record["categories"].items(), ("overall", record["overall"])]:
        se = "" if row["loss_se"] is None else f" ± {row['loss_se']:.4f}"
        perplexity, papers, tokens = f"{row['perplexity']:.2f}", f"{row['num_papers']:,}", f"{row['num_tokens']:,}"
        rows.append((name, f"{row['loss']:.4f}{se}", perplexity, papers, tokens))
    return aligned(rows)
