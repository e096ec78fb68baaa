"""Measure a language model on what it never trained on: `context` on papers, `search` on questions of graph search.

    python evaluate_model.py context runs/K4_seed0                           # a run of train.py, its final model
    python evaluate_model.py context EleutherAI/pythia-70m-deduped --data_dir preprocessed_arxiv --sequence_length 256 \
        --output_dir evaluation/pythia-70m                                   # any causal language model
    python evaluate_model.py search S/pptrain                                # a run of pptrain.py or pretrain.py
    python evaluate_model.py search EleutherAI/pythia-160m --data_dir S/data/nl_splits/mis384_look64_seed12345 \
        --output_dir evaluation/pythia-160m

`context` makes two measurements on one split, for each category:
- the loss at each position of random windows. The windows are a function of (data, category, --seed), the same for
  every model, so that two models can be compared window by window;
- the loss of every token of the papers except each paper's first, once, in consecutive windows of `sequence_length`
  tokens (the context starts anew in each); perplexity is exp of its mean. "overall" counts all tokens alike.
Standard errors are between papers: tokens and windows of one paper are not independent (lm/measure.py).

`search` lets the model go on from each prompt with its most likely tokens. The first word is its answer, right if it is any of
the valid ones; accuracy by lookahead stands beside that of choosing a child of the current vertex at random.

Reads   RUN/run.json, RUN/{final,best,checkpoints/step_*}/ or any model; the folder written by fetch_arxiv.py (`context`) or
        build_data_splits.py (`search`)
Writes  RUN/evaluation/CHECKPOINT_SPLIT.json (results), .npz (the loss of every window), .png (loss against context)
        RUN/evaluation/CHECKPOINT_search_SPLIT.json (results), .jsonl (every answer), .png (accuracy by lookahead)
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast

from lm.args import below, check
from lm.commands import run_command
from lm.evaluation import Evaluation, position_record, read_evaluation, score_record, write_evaluation
from lm.files import sha256
from lm.generation import greedy
from lm.measure import bin_centres, binned, context_bins, document_losses, mean_and_se, window_losses
from lm.models import load_model
from lm.papers import Papers, read_papers
from lm.plots import Curve, accuracy_figure, context_loss_figure
from lm.questions import Exam, read_questions, set_exam
from lm.search_evaluation import UNKNOWN, read_search, score, search_record, write_search
from lm.tokenizer import fingerprint, load_tokenizer
from lm.trained import check_model, find_config, find_model, step_of
from random_window_dataset import RandomWindowDataset


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every measurement takes."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder that transformers loads, or a hub name."""
    checkpoint: str = "final"
    """Of a run: final, best, latest, or step_00000200."""
    split: str = "test"
    """What to measure on: of papers train, validation or test; of questions eval, test or mixin."""
    micro_batch: int = 64
    """Windows or questions in one forward pass, at most."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision; parameters stay float32."""
    force_cpu: bool = False
    """Leave a GPU alone."""
    output_dir: Path | None = None
    """Where results go; default RUN/evaluation, needed for a model that is not a run."""
    overwrite: bool = False
    """Measure again what has been measured with the same arguments on the same weights."""

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() and not self.force_cpu else "cpu"


@dataclass(frozen=True, kw_only=True)
class Context(Measurement):
    """Measure loss against context length, and test perplexity, per category."""

    data_dir: Path | None = None
    """Folder written by fetch_arxiv.py; default: the one that the run trained on."""
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
    allow_other_tokenizer: bool = False
    """Only warn if the model's tokenizer is not known to be the one that made the data."""


@dataclass(frozen=True, kw_only=True)
class Search(Measurement):
    """Measure how often a model answers questions of graph search right, by lookahead."""

    data_dir: Path | None = None
    """Folder written by build_data_splits.py; default: the one of the run."""
    max_examples: int | None = None
    """Questions, the first of the split; default: all."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or a hub name; default: the one beside the model, or the run's."""


MEASURED = ("split", "categories", "sequence_length", "num_windows", "max_test_papers", "seed", "precision")
"""The arguments that results of `context` depend on, besides the weights and the data."""


def complete(args: Context, run: dict | None) -> Context:
    """The arguments with the values of the run of train.py where none were given.

    Raises: ValueError, all faults together.
    """
    own = run["args"] if run and "K" in run["args"] else {}
    data_dir = args.data_dir or own.get("data_dir")
    sequence_length = args.sequence_length if args.sequence_length is not None else own.get("sequence_length")
    output_dir = args.output_dir or (Path(args.model) / "evaluation" if run else None)
    categories = args.categories or ("trained" if own else "all",)
    needed = {"data_dir": data_dir, "sequence_length": sequence_length, "output_dir": output_dir}
    found = f"{args.model} is no run of train.py"
    faults = [f"no --{name}, and {found} to take it from: pass it" for name, value in needed.items() if not value]
    faults += below(args, 1, "sequence_length", "num_windows", "max_test_papers", "micro_batch")
    if "trained" in categories and not own:
        faults.append(f"--categories trained, but {found}: pass all, or names")
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


def measured(args: Context, source: str, papers: Papers) -> dict[str, Any]:
    """All that the results depend on, as JSON has it: arguments, weights, data."""
    return {name: getattr(args, name) for name in MEASURED} | {
        "categories": list(args.categories),
        "weights": weights_digest(source),
        "data": _digest(papers.meta["files"]),
        "tokenizer": papers.meta["tokenizer"]["fingerprint"],
    }


def weights_digest(source: str) -> str:
    """One SHA-256 for all files of a model, or for the commit of a hub repository."""
    files = [path for name in ("config.json", "model*.safetensors", "pytorch_model*.bin") for path in Path(source).glob(name)]
    commit = None if files else AutoConfig.from_pretrained(source, trust_remote_code=False)._commit_hash
    return _digest({path.name: sha256(path) for path in files} or commit)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def papers_to_score(args: Context, papers: Papers, category: str) -> np.ndarray:
    """The papers of one category in the split with at least one target, at most --max_test_papers of them."""
    split = papers.splits[args.split]
    mine = split[(papers.categories[split] == papers.category_names.index(category)) & (papers.lengths[split] > 1)]
    if args.max_test_papers is None or len(mine) <= args.max_test_papers:
        return mine
    return np.sort(np.random.default_rng(args.seed).choice(mine, args.max_test_papers, replace=False))


def measure(args: Context, model: torch.nn.Module, papers: Papers, samplers: dict[str, RandomWindowDataset]) -> Evaluation:
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


def random_window_losses(args: Context, model: torch.nn.Module, sampler: RandomWindowDataset, bar: tqdm) -> np.ndarray:
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


def paper_totals(args: Context, model: torch.nn.Module, papers: Papers, chosen: np.ndarray, bar: tqdm) -> np.ndarray:
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
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines, with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def is_there(path: Path, overwrite: bool, depends_on: dict, read: Callable[[Path], dict], table: Callable[[dict], str]) -> bool:
    """Whether `path` holds the results of just this already, which are then printed; says what else they are of."""
    if overwrite or not path.is_file():
        return False
    there = read(path)
    if there["measured"] == depends_on:
        print(f"{path} has just this already (--overwrite measures again)\n{table(there)}")
        return True
    changed = [name for name in depends_on if there["measured"].get(name) != depends_on[name]]
    print(f"{path} is of other {', '.join(changed)}: replacing it", flush=True)
    return False


def about(args: Measurement, source: str, checkpoint: str, depends_on: dict) -> dict[str, Any]:
    """What results say of where they are from."""
    return {"model": args.model, "checkpoint": checkpoint, "step": step_of(Path(source)), "measured": depends_on}


def context(args: Context) -> None:
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
    if is_there(path, args.overwrite, depends_on, lambda path: read_evaluation(path).record, table):
        return

    evaluation = measure(args, load_model(source).to(args.device), papers, samplers)
    evaluation.record.update(about(args, source, checkpoint, depends_on))
    title = f"Loss against context length: {Path(args.model).name}, {checkpoint}, {args.split} papers"
    draw(path.with_suffix(".png"), evaluation, title)
    write_evaluation(path, evaluation)  # last: with it the evaluation counts as done
    print(table(evaluation.record))
    if args.max_test_papers is not None:
        print(f"perplexity on at most {args.max_test_papers} papers per category (--max_test_papers)")
    print(f"results: {path}, figure: {path.with_suffix('.png')}")


def complete_search(args: Search, source: str, run: dict | None) -> Search:
    """The arguments with the values of the run of pptrain.py or pretrain.py where none were given.

    Raises: ValueError, all faults together.
    """
    own = run["args"] if run and {"curr_threshold", "mixin_percent"} & run["args"].keys() else {}
    beside = source if not Path(source).is_dir() or (Path(source) / "tokenizer.json").is_file() else None
    data_dir = args.data_dir or own.get("data_dir")
    packed_with = Path(own["c4_dir"]) / "tokenizer" if "c4_dir" in own else None
    tokenizer = args.tokenizer or beside or own.get("tokenizer") or packed_with
    output_dir = args.output_dir or (Path(args.model) / "evaluation" if run else None)
    needed = {"data_dir": data_dir, "tokenizer": tokenizer, "output_dir": output_dir}
    found = f"{args.model} is no run of pptrain.py or pretrain.py to take it from"
    faults = [f"no --{name}, and {found}: pass it" for name, value in needed.items() if not value]
    check(faults + below(args, 1, "max_examples", "micro_batch"))
    return replace(args, data_dir=Path(data_dir), tokenizer=str(tokenizer), output_dir=Path(output_dir))


def answer(args: Search, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, exam: Exam) -> list[str]:
    """The text with which the model goes on from each prompt."""
    texts = [""] * len(exam.prompts)
    with progress(sum(map(len, exam.prompts))) as bar:
        for numbers, continuations in greedy(
            model, exam.prompts, exam.new_tokens, tokenizer.eos_token_id, args.micro_batch, args.precision
        ):
            for number, ids in zip(numbers, continuations, strict=True):
                texts[number] = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                bar.update(len(exam.prompts[number]))
    return texts


def draw_search(path: Path, record: dict, title: str) -> None:
    """Accuracy and chance by lookahead; questions of unknown lookahead stand to the right of all others."""
    groups = record["lookaheads"]
    known = [int(name) for name in groups if name != UNKNOWN]
    x = [int(name) if name != UNKNOWN else max(known, default=-1) + 1 for name in groups]
    values = {key: [row[key] for row in groups.values()] for key in ("accuracy", "interval_95", "chance")}
    accuracy_figure(path, x, values["accuracy"], values["interval_95"], values["chance"], len(known), title)


def search_table(record: dict) -> str:
    """Accuracy beside chance for each lookahead and overall, for the screen."""
    rows = [("lookahead", "accuracy", "95 % interval", "chance", "questions")]
    for name, row in [*record["lookaheads"].items(), ("overall", record["overall"])]:
        chance = "-" if row["chance"] is None else f"{row['chance']:.4f}"
        accuracy, (low, high) = f"{row['accuracy']:.4f} ± {row['accuracy_se']:.4f}", row["interval_95"]
        rows.append((name, accuracy, f"{low:.4f} - {high:.4f}", chance, f"{row['count']:,}"))
    left_out = f"\n{record['num_too_long']:,} questions were left out: they are longer than the model takes"
    return aligned(rows) + (left_out if record["num_too_long"] else "")


def search(args: Search) -> None:
    """Ask, write the results, and print a table."""
    source, checkpoint, run = find_model(args.model, args.checkpoint)
    args = complete_search(args, source, run)
    questions, data = read_questions(args.data_dir, args.split, args.max_examples)
    config, tokenizer = find_config(source), load_tokenizer(args.tokenizer)
    seq_len = run["args"].get("seq_len") or run["derived"].get("seq_len") if run else None
    depends_on = {name: getattr(args, name) for name in ("split", "max_examples", "precision")} | {"seq_len": seq_len}
    depends_on |= {"weights": weights_digest(source), "data": data, "tokenizer": fingerprint(tokenizer)}
    path = args.output_dir / f"{checkpoint}_search_{args.split}.json"
    if is_there(path, args.overwrite, depends_on, read_search, search_table):
        return

    exam = set_exam(questions, tokenizer, config, seq_len)
    rows = score(exam.questions, answer(args, load_model(source).to(args.device), tokenizer, exam))
    record = search_record(exam.questions, rows) | {"num_too_long": exam.num_too_long, "max_new_tokens": exam.new_tokens}
    record |= about(args, source, checkpoint, depends_on)
    draw_search(path.with_suffix(".png"), record, f"Generated answers: {Path(args.model).name}, {checkpoint}, {args.split}")
    write_search(path, record, rows)  # last: with it the evaluation counts as done
    print(search_table(record))
    print(f"results: {path}, every answer: {path.with_suffix('.jsonl')}, figure: {path.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> None:
    """Measure what the first argument names."""
    run_command({"context": (Context, context), "search": (Search, search)}, argv)


if __name__ == "__main__":
    main()
