"""Measure a language model on the papers of each category: loss at every context length, and test perplexity.

    python evaluate_model.py runs/K4_seed0                                   # a run of train.py, its final model
    python evaluate_model.py EleutherAI/pythia-70m-deduped --data_dir preprocessed_arxiv --sequence_length 256 \
        --output_dir evaluation/pythia-70m                                   # any causal language model

Two measurements on one split, for each category:
- the loss at each position of random windows. The windows are a function of (data, category, --seed), the same for
  every model, so that two models can be compared window by window;
- the loss of every token of the papers except each paper's first, once, in consecutive windows of `sequence_length`
  tokens (the context starts anew in each); perplexity is exp of its mean. "overall" counts all tokens alike.
Standard errors are between papers: tokens and windows of one paper are not independent (lm/measure.py).

Reads   RUN/run.json, RUN/{final,best,checkpoints/step_*}/ or any model; the folder written by fetch_arxiv.py
Writes  RUN/evaluation/CHECKPOINT_SPLIT.json (results), .npz (the loss of every window), .png (loss against context)
"""

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig

from lm.args import check, parse
from lm.evaluation import Evaluation, position_record, read_evaluation, score_record, write_evaluation
from lm.files import sha256
from lm.measure import bin_centres, binned, context_bins, document_losses, mean_and_se, window_losses
from lm.models import load_model
from lm.papers import Papers, read_papers
from lm.plots import Curve, context_loss_figure
from lm.trained import check_model, find_model, step_of
from random_window_dataset import RandomWindowDataset


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure loss against context length, and test perplexity, per category."""

    model: tyro.conf.Positional[str]
    """A run folder of train.py, a folder that transformers loads, or a hub name."""
    checkpoint: str = "final"
    """Of a run: final, best, latest, or step_00000200."""
    data_dir: Path | None = None
    """Folder written by fetch_arxiv.py; default: the one that the run trained on."""
    split: str = "test"
    """Papers to measure on: train, validation or test."""
    categories: tuple[str, ...] = ()
    """Names, or `all` of the data, or `trained` (the run's); default: trained for a run, all for another model."""
    sequence_length: int | None = None
    """Targets in a window, and longest context, in tokens; default: the run's."""
    num_windows: int = 1024
    """Random windows per category."""
    max_test_papers: int | None = None
    """Papers per category for the perplexity, drawn with --seed; default: all."""
    seed: int = 0
    """Chooses the windows (and papers)."""
    micro_batch: int = 64
    """Windows in one forward pass, at most."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision; parameters stay float32."""
    force_cpu: bool = False
    """Leave a GPU alone."""
    allow_other_tokenizer: bool = False
    """Only warn if the model's tokenizer is not known to be the one that made the data."""
    output_dir: Path | None = None
    """Where results go; default RUN/evaluation, needed for a model that is not a run."""
    overwrite: bool = False
    """Measure again what has been measured with the same arguments on the same weights."""


MEASURED = ("split", "categories", "sequence_length", "num_windows", "max_test_papers", "seed", "precision")
"""The arguments that results depend on, besides the weights and the data."""


def complete(args: Args, run: dict | None) -> Args:
    """The arguments with the run's own values where none were given.

    Raises: ValueError, all faults together.
    """
    own = run["args"] if run else {}
    data_dir = args.data_dir or own.get("data_dir")
    sequence_length = args.sequence_length if args.sequence_length is not None else own.get("sequence_length")
    output_dir = args.output_dir or (Path(args.model) / "evaluation" if run else None)
    categories = args.categories or ("trained" if run else "all",)
    needed = {"data_dir": data_dir, "sequence_length": sequence_length, "output_dir": output_dir}
    faults = [f"no --{name}, and {args.model} is no run to take it from: pass it" for name in needed if not needed[name]]
    for name in ("sequence_length", "num_windows", "max_test_papers", "micro_batch"):
        if (value := getattr(args, name)) is not None and value < 1:
            faults.append(f"--{name} {value} is below 1: pass a positive number")
    if "trained" in categories and not run:
        faults.append(f"--categories trained, but {args.model} is no run: pass all, or names")
    if len(categories) > 1 and {"all", "trained"} & set(categories):
        faults.append(f"--categories {' '.join(categories)} mixes names with all or trained: pass the one or the other")
    check(faults)
    if categories == ("trained",):
        categories = run["derived"]["categories"]
    return replace(
        args,
        data_dir=Path(data_dir),
        sequence_length=sequence_length,
        output_dir=Path(output_dir),
        categories=tuple(categories),
    )


def measured(args: Args, source: str, papers: Papers) -> dict[str, Any]:
    """All that the results depend on, as JSON has it: arguments, weights, data."""
    files = [path for name in ("config.json", "model*.safetensors", "pytorch_model*.bin") for path in Path(source).glob(name)]
    weights = {path.name: sha256(path) for path in files} or AutoConfig.from_pretrained(source)._commit_hash
    return {name: getattr(args, name) for name in MEASURED} | {
        "categories": list(args.categories),
        "weights": _digest(weights),
        "data": _digest(papers.meta["files"]),
        "tokenizer": papers.meta["tokenizer"]["fingerprint"],
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def papers_to_score(args: Args, papers: Papers, category: str) -> np.ndarray:
    """The papers of one category in the split with at least one target, at most --max_test_papers of them."""
    split = papers.splits[args.split]
    mine = split[(papers.categories[split] == papers.category_names.index(category)) & (papers.lengths[split] > 1)]
    if args.max_test_papers is None or len(mine) <= args.max_test_papers:
        return mine
    return np.sort(np.random.default_rng(args.seed).choice(mine, args.max_test_papers, replace=False))


def measure(args: Args, model: torch.nn.Module, papers: Papers, samplers: dict[str, RandomWindowDataset]) -> Evaluation:
    """Both measurements on every category."""
    chosen = {name: papers_to_score(args, papers, name) for name in samplers}
    num_tokens = sum(args.num_windows * args.sequence_length + int((papers.lengths[c] - 1).sum()) for c in chosen.values())
    categories, losses, paper_of, totals = {}, {}, {}, []
    with progress(num_tokens) as bar:
        for name, sampler in samplers.items():
            bar.set_description(name, refresh=False)
            losses[name] = random_window_losses(args, model, sampler, bar)
            paper_of[name], _ = sampler.locate(0, args.num_windows)
            totals.append(paper_totals(args, model, papers, chosen[name], bar))
            categories[name] = position_record(losses[name], paper_of[name]) | score_record(totals[-1])
    record = {"categories": categories, "overall": score_record(np.concatenate(totals))}
    return Evaluation(record=record, losses=losses, papers=paper_of)


def progress(num_tokens: int) -> tqdm:
    """A bar on a terminal; a line every half minute in a log."""
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=num_tokens, unit="tok", unit_scale=True, mininterval=every, maxinterval=every)


def random_window_losses(args: Args, model: torch.nn.Module, sampler: RandomWindowDataset, bar: tqdm) -> np.ndarray:
    """(num_windows, sequence_length) nats."""
    parts = []
    for start in range(0, args.num_windows, 8 * args.micro_batch):
        windows = sampler.windows(start, min(8 * args.micro_batch, args.num_windows - start))
        parts.append(window_losses(model, windows, args.micro_batch, args.precision))
        bar.update(parts[-1].size)
    losses = np.concatenate(parts)
    if not np.isfinite(losses).all():
        window, position = np.argwhere(~np.isfinite(losses))[0]
        raise RuntimeError(
            f"{', '.join(sampler.categories)}: the loss of window {window} at position {position} is"
            f" {losses[window, position]}, finite ones are needed: the weights are damaged, or try --precision fp32"
        )
    return losses


def paper_totals(args: Args, model: torch.nn.Module, papers: Papers, chosen: np.ndarray, bar: tqdm) -> np.ndarray:
    """(papers, 2): the summed loss of each paper, in nats, and its number of targets."""
    texts = [papers.tokens[papers.offsets[paper] :][: papers.lengths[paper]] for paper in chosen]
    for paper, text in zip(chosen, texts, strict=True):
        if text.max() >= papers.meta["vocab_size"]:
            raise ValueError(
                f"paper {papers.paper_ids[paper]} has id {text.max()}, outside the vocabulary of {papers.meta['vocab_size']}:"
                f" {papers.folder} is damaged, make it again with fetch_arxiv.py"
            )
    totals = []
    for total in document_losses(model, texts, args.sequence_length, args.micro_batch, args.precision):
        totals.append(total)
        bar.update(total[1])
    return np.array(totals)


def draw(path: Path, evaluation: Evaluation, title: str) -> None:
    """Loss against context length, a line for each category, positions averaged in bins that widen with the context."""
    curves = []
    for name, losses in evaluation.losses.items():
        bins = context_bins(losses.shape[1])
        mean, se = mean_and_se(binned(losses.astype(np.float64), bins), evaluation.papers[name])
        curves.append(Curve(label=name, x=bin_centres(bins), mean=mean, se=se))
    context_loss_figure(path, curves, title)


def table(record: dict) -> str:
    """Loss and perplexity of each category and overall, for the screen."""
    rows = [("category", "loss (nats/token)", "perplexity", "papers", "tokens")]
    for name, row in [*record["categories"].items(), ("overall", record["overall"])]:
        se = "" if row["loss_se"] is None else f" ± {row['loss_se']:.4f}"
        perplexity, papers, tokens = f"{row['perplexity']:.2f}", f"{row['num_papers']:,}", f"{row['num_tokens']:,}"
        rows.append((name, f"{row['loss']:.4f}{se}", perplexity, papers, tokens))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def main(args: Args) -> None:
    """Measure, write the results, and print a table."""
    source, checkpoint, run = find_model(args.model, args.checkpoint)
    args = complete(args, run)
    papers = read_papers(args.data_dir)
    if args.categories == ("all",):
        args = replace(args, categories=tuple(papers.category_names))
    check_model(source, run, papers, args.sequence_length, args.allow_other_tokenizer)
    samplers = {
        name: RandomWindowDataset(papers, args.split, args.sequence_length, [name], args.seed) for name in args.categories
    }
    path = args.output_dir / f"{checkpoint}_{args.split}.json"
    depends_on = measured(args, source, papers)
    if path.is_file() and not args.overwrite:
        there = read_evaluation(path).record
        if there["measured"] == depends_on:
            print(f"{path} has just this already (--overwrite measures again)\n{table(there)}")
            return
        changed = [name for name in depends_on if there["measured"].get(name) != depends_on[name]]
        print(f"{path} is of other {', '.join(changed)}: replacing it", flush=True)

    model = load_model(source).to("cuda" if torch.cuda.is_available() and not args.force_cpu else "cpu")
    evaluation = measure(args, model, papers, samplers)
    about = {"model": args.model, "checkpoint": checkpoint, "step": step_of(Path(source)), "measured": depends_on}
    evaluation.record.update(about)
    title = f"Loss against context length: {Path(args.model).name}, {checkpoint}, {args.split} papers"
    draw(path.with_suffix(".png"), evaluation, title)
    write_evaluation(path, evaluation)  # last: with it the evaluation counts as done
    print(table(evaluation.record))
    if args.max_test_papers is not None:
        print(f"perplexity on at most {args.max_test_papers} papers per category (--max_test_papers)")
    print(f"results: {path}, figure: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(parse(Args))
