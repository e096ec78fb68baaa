"""Measure a language model on what it never trained on: papers, questions of graph search, benchmark tasks, files of text.

    python evaluate_model.py context runs/K4_seed0                           # a run of train.py, its final model
    python evaluate_model.py context EleutherAI/pythia-70m-deduped --data_dir preprocessed_arxiv --sequence_length 256 \
        --output_dir evaluation/pythia-70m                                   # any causal language model
    python evaluate_model.py search S/pptrain                                # a run of pptrain.py or pretrain.py
    python evaluate_model.py search EleutherAI/pythia-160m --data_dir S/data/nl_splits/mis384_look64_seed12345 \
        --output_dir evaluation/pythia-160m
    python evaluate_model.py tasks S/pretrain --rows samples/tasks           # lm-eval's tasks; without --rows from the hub
    python evaluate_model.py tasks RUN_chat --tasks hellaswag,piqa --num_fewshot 5 --apply_chat_template --fewshot_as_multiturn
    python evaluate_model.py text S/pretrain --documents samples/papers/test.json.gz

`context` makes two measurements on one split, for each category:
- the loss at each position of random windows. The windows are a function of (data, category, --seed), the same for
  every model, so that two models can be compared window by window;
- the loss of every token of the papers except each paper's first, once, in consecutive windows of `sequence_length`
  tokens (the context starts anew in each); perplexity is exp of its mean. "overall" counts all tokens alike.
Standard errors are between papers: tokens and windows of one paper are not independent (lm/measure.py).

`search` lets the model go on from each prompt with its most likely tokens. The first word is its answer, right if it is any of
the valid ones; accuracy by lookahead stands beside that of choosing a child of the current vertex at random.

`tasks` has lm-eval score the choices of multiple-choice questions and makes DataDecide's measures of their likelihoods
(lm/choice_measures.py): accuracies, of which each task has a primary one, and four that move earlier in training. MMLU is asked
like the others, for the text of the answer, and is the mean over its subjects. Questions can be put with answered examples, as
a chat, and after an instruction; results of each way have a name of their own. lambada_openai and wikitext measure how likely
a text is, and are never put as questions. Every score has its standard error and what chance would give: choosing at random,
of texts a model that finds all ids equally likely.

`text` measures the loss of every token but the first of files of text, documents joined by EOS as in pretraining.

Reads   RUN/run.json, RUN/{final,best,checkpoints/step_*}/ or any model; the folder written by fetch_arxiv.py (`context`) or
        build_data_splits.py (`search`); rows of tasks by fetch_samples.py (`tasks`); JSON Lines, Parquet or text (`text`)
Writes  RUN/evaluation/CHECKPOINT_SPLIT.json (results), .npz (the loss of every window), .png (loss against context)
        RUN/evaluation/CHECKPOINT_search_SPLIT.json (results), .jsonl (every answer), .png (accuracy by lookahead)
        RUN/evaluation/CHECKPOINT_tasks.json (results), .jsonl (the log-likelihoods of every choice);
            CHECKPOINT_tasks_5shot_chat_multiturn.json and the like for other ways to put questions
        RUN/evaluation/CHECKPOINT_text_NAME.json (results)
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast

from lm.args import below, check
from lm.commands import run_command
from lm.corpus import digest, find_files
from lm.evaluation import Evaluation, position_record, read_evaluation, score_record, score_table, write_evaluation
from lm.files import sha256
from lm.generation import greedy
from lm.measure import bin_centres, binned, context_bins, mean_and_se
from lm.models import load_model
from lm.paper_losses import all_window_losses, paper_totals, papers_to_score
from lm.papers import Papers, read_papers
from lm.plots import Curve, accuracy_figure, context_loss_figure
from lm.questions import Exam, read_questions, set_exam
from lm.search_evaluation import UNKNOWN, read_search, score, search_record, search_table, write_search
from lm.task_results import read_record, task_table, write_tasks
from lm.text_evaluation import read_text, text_loss, text_table, write_text
from lm.tokenizer import fingerprint, load_tokenizer
from lm.trained import check_model, find_config, find_model, find_tokenizer, step_of
from random_window_dataset import RandomWindowDataset

T = TypeVar("T", bound="OfText")
WEIGHTS = ("config.json", "model*.safetensors", "shard-*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every measurement takes."""

    model: tyro.conf.Positional[str]
    """A run folder, a folder that transformers loads, or a hub name."""
    checkpoint: str = "final"
    """Of a run: final, best, latest, or step_00000200."""
    micro_batch: int = 64
    """Windows, questions or prompts in one forward pass, at most."""
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
    split: str = "test"
    """What to measure on: train, validation or test."""
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
    split: str = "test"
    """What to measure on: eval, test or mixin."""
    max_examples: int | None = None
    """Questions, the first of the split; default: all."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or a hub name; default: the one beside the model, or the run's."""


@dataclass(frozen=True, kw_only=True)
class OfText(Measurement):
    """What the measurements on text of any kind take."""

    seq_len: int | None = None
    """Longest context, in tokens; default: the run's, or else what the model has positions for."""
    tokenizer: str | None = None
    """A folder with tokenizer.json, or a hub name; default: the one beside the model, or the run's."""


@dataclass(frozen=True, kw_only=True)
class Tasks(OfText):
    """Measure accuracy and likelihoods on multiple-choice tasks, as DataDecide does, and how likely texts are."""

    tasks: str = "arc_challenge,arc_easy,boolq,hellaswag,mmlu,openbookqa,piqa,sciq,winogrande"
    """Names with commas between; also commonsense_qa, social_iqa, and the texts lambada_openai and wikitext."""
    rows: Path | None = None
    """Folder of the tasks' rows, TASK/validation.jsonl (fetch_samples.py; all but wikitext's), from which few-shot examples are
    drawn too; no network is touched then. Default: lm-eval fetches them from the hub, and evaluates on the test split where
    there is one."""
    num_fewshot: int = 0
    """Answered examples before each question."""
    apply_chat_template: bool = False
    """Put each question as a user's turn, by the chat template of the tokenizer, and score choices as the assistant's."""
    fewshot_as_multiturn: bool = False
    """With a chat template: each example is a turn of the user and one of the assistant, not all part of the question."""
    system_instruction: str | None = None
    """What stands before everything, with a chat template as the system's turn."""
    limit: int | None = None
    """Questions of each task, or subject of MMLU, the first; default: all."""
    micro_batch: int = 32
    """Prompts in one forward pass, at most; fewer where their logits would pass 1 GiB."""


@dataclass(frozen=True, kw_only=True)
class Text(OfText):
    """Measure loss, perplexity and bits per byte on files of text."""

    documents: tuple[str, ...]
    """Files, folders or patterns of JSON Lines, Parquet or text, as build_pretrain.py takes them."""
    text_column: str = "text"
    """Key or column of the text."""
    name: str | None = None
    """What the results are called; default: the first file's name up to its first dot."""


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
    files = [path for name in WEIGHTS for path in Path(source).glob(name)]
    commit = None if files else AutoConfig.from_pretrained(source, trust_remote_code=False)._commit_hash
    return _digest({path.name: sha256(path) for path in files} or commit)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def measure(args: Context, model: torch.nn.Module, papers: Papers, samplers: dict[str, RandomWindowDataset]) -> Evaluation:
    """Both measurements on every category."""
    chosen = {name: papers_to_score(papers, args.split, name, args.max_test_papers, args.seed) for name in samplers}
    num_tokens = sum(args.num_windows * args.sequence_length + int((papers.lengths[c] - 1).sum()) for c in chosen.values())
    categories, losses, paper_of, totals, at_once = {}, {}, {}, [], 8 * args.micro_batch
    with progress(num_tokens) as bar:
        for name, sampler in samplers.items():
            bar.set_description(name, refresh=False)
            windows = (
                sampler.windows(start, min(at_once, args.num_windows - start)) for start in range(0, args.num_windows, at_once)
            )
            losses[name] = all_window_losses(model, windows, args.micro_batch, args.precision, name, bar.update)
            paper_of[name], _ = sampler.locate(0, args.num_windows)
            totals.append(
                paper_totals(model, papers, chosen[name], args.sequence_length, args.micro_batch, args.precision, bar.update)
            )
            categories[name] = position_record(losses[name], paper_of[name]) | score_record(totals[-1])
    record = {"categories": categories, "overall": score_record(np.concatenate(totals))}
    return Evaluation(record=record, losses=losses, papers=paper_of)


def progress(total: int | None, unit: str = "tok") -> tqdm:
    """A bar on a terminal; a line every half minute in a log."""
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, unit=unit, unit_scale=True, mininterval=every, maxinterval=every)


def draw(path: Path, evaluation: Evaluation, title: str) -> None:
    """Loss against context length, a line for each category, positions averaged in bins that widen with the context."""
    curves = []
    for name, losses in evaluation.losses.items():
        bins = context_bins(losses.shape[1])
        mean, se = mean_and_se(binned(losses.astype(np.float64), bins), evaluation.papers[name])
        curves.append(Curve(label=name, x=bin_centres(bins), mean=mean, se=se))
    context_loss_figure(path, curves, title)


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
    if is_there(path, args.overwrite, depends_on, lambda path: read_evaluation(path).record, score_table):
        return

    evaluation = measure(args, load_model(source).to(args.device), papers, samplers)
    evaluation.record.update(about(args, source, checkpoint, depends_on))
    title = f"Loss against context length: {Path(args.model).name}, {checkpoint}, {args.split} papers"
    draw(path.with_suffix(".png"), evaluation, title)
    write_evaluation(path, evaluation)  # last: with it the evaluation counts as done
    print(score_table(evaluation.record))
    if args.max_test_papers is not None:
        print(f"perplexity on at most {args.max_test_papers} papers per category (--max_test_papers)")
    print(f"results: {path}, figure: {path.with_suffix('.png')}")


def complete_search(args: Search, source: str, run: dict | None) -> Search:
    """The arguments with the values of the run of pptrain.py or pretrain.py where none were given.

    Raises: ValueError, all faults together.
    """
    own = run["args"] if run and {"curr_threshold", "mixin_percent"} & run["args"].keys() else {}
    data_dir = args.data_dir or own.get("data_dir")
    tokenizer = args.tokenizer or find_tokenizer(source, own)
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


def search(args: Search) -> None:
    """Ask, write the results, and print a table."""
    source, checkpoint, run = find_model(args.model, args.checkpoint)
    args = complete_search(args, source, run)
    questions, data = read_questions(args.data_dir, args.split, args.max_examples)
    config, tokenizer = find_config(source), load_tokenizer(args.tokenizer)
    seq_len = seq_len_of(run)
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


def complete_text(args: T, source: str, run: dict | None, *counts: str) -> T:
    """The arguments of `tasks` or `text` with context length, tokenizer and folder where none were given.

    Args: counts: the names of arguments of which 1 is the least.
    Raises: ValueError, all faults together.
    """
    own = run["args"] if run else {}
    positions = getattr(find_config(source), "max_position_embeddings", None)
    seq_len = args.seq_len if args.seq_len is not None else seq_len_of(run) or positions
    tokenizer = args.tokenizer or find_tokenizer(source, own)
    output_dir = args.output_dir or (Path(args.model) / "evaluation" if run else None)
    needed = {"seq_len": seq_len, "tokenizer": tokenizer, "output_dir": output_dir}
    faults = [f"no --{name}, and {args.model} does not say it: pass it" for name, value in needed.items() if value is None]
    faults += below(args, 1, "seq_len", "micro_batch", *counts)
    if seq_len is not None and positions is not None and seq_len > positions:
        faults.append(f"{source} has {positions} positions, --seq_len is {seq_len}: lower it")
    check(faults)
    return replace(args, seq_len=seq_len, tokenizer=tokenizer, output_dir=Path(output_dir))


def seq_len_of(run: dict | None) -> int | None:
    """The longest context, in tokens, that a run of any trainer trains on."""
    args, derived = (run["args"], run.get("derived", {})) if run else ({}, {})
    return args.get("seq_len") or derived.get("seq_len") or args.get("sequence_length")


def read_tokenizer(name: str, source: str) -> PreTrainedTokenizerFast:
    """The tokenizer for a model, with an end of documents. Raises: ValueError if it is not the model's."""
    tokenizer, vocab_size = load_tokenizer(name), find_config(source).vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{name} has {len(tokenizer)} ids, {source} a vocabulary of {vocab_size}: pass the model's --tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{name} has no EOS token, documents end with it and prompts may begin with it: pass another --tokenizer"
        )
    return tokenizer


def tasks(args: Tasks) -> None:
    """Have the tasks scored, write measures and likelihoods, and print a table."""
    from lm.prompting import Prompting
    from lm.scorer import Scorer  # lm-eval takes seconds to import
    from lm.tasks import example_faults, measure_tasks, name_faults, parts_of, rows_digest, versions

    names = [name.strip() for name in args.tasks.split(",")]
    prompting = Prompting(**{field.name: getattr(args, field.name) for field in fields(Prompting)})
    check(name_faults(names) + prompting.faults())
    parts = parts_of(names)
    rows = None if args.rows is None else rows_digest(parts, args.rows)
    check([] if args.rows is None else example_faults(parts, args.rows, args.num_fewshot))
    source, checkpoint, run = find_model(args.model, args.checkpoint)
    args = complete_text(args, source, run, "limit")
    tokenizer = read_tokenizer(args.tokenizer, source)
    check(prompting.template_faults(tokenizer, args.tokenizer))
    depends_on = {"tasks": list(dict.fromkeys(part.task for part in parts)), "rows": rows, "versions": versions()}
    depends_on |= prompting.identity(tokenizer) | {name: getattr(args, name) for name in ("limit", "seq_len", "precision")}
    depends_on |= {"weights": weights_digest(source), "tokenizer": fingerprint(tokenizer)}
    path = args.output_dir / f"{checkpoint}_tasks{prompting.suffix}.json"
    if is_there(path, args.overwrite, depends_on, read_record, task_table):
        return

    model = load_model(source).to(args.device)
    with progress(0, " prompts") as bar:
        scorer = Scorer(model, tokenizer, args.seq_len, args.micro_batch, args.precision, bar)
        summaries, items = measure_tasks(scorer, parts, args.rows, prompting, args.limit)
    record = about(args, source, checkpoint, depends_on) | {"rows": str(args.rows or "hub"), "tasks": summaries}
    write_tasks(path, record, items)
    print(task_table(record))
    if args.rows is not None and args.num_fewshot:
        print("few-shot examples are from the rows that are evaluated too (of mmlu from dev), never the question itself")
    if prompting != Prompting() and (texts := [part.name for part in parts if part.is_text]):
        print(f"{', '.join(texts)}: the text alone, without examples, chat template or instruction")
    print(f"results: {path}, every choice: {path.with_suffix('.jsonl')}")


def text(args: Text) -> None:
    """Measure the loss on files, write it, and print a table."""
    files = find_files(args.documents)
    source, checkpoint, run = find_model(args.model, args.checkpoint)
    args = complete_text(args, source, run)
    tokenizer = read_tokenizer(args.tokenizer, source)
    name = args.name or Path(files[0].name).name.split(".")[0]
    depends_on = {"documents": digest(files), "text_column": args.text_column, "seq_len": args.seq_len}
    depends_on |= {"precision": args.precision, "weights": weights_digest(source), "tokenizer": fingerprint(tokenizer)}
    path = args.output_dir / f"{checkpoint}_text_{name}.json"
    if is_there(path, args.overwrite, depends_on, read_text, text_table):
        return

    model = load_model(source).to(args.device)
    with progress(None) as bar:
        found = text_loss(
            model, tokenizer, files, args.seq_len, args.micro_batch, args.precision, args.text_column, done=bar.update
        )
    record = about(args, source, checkpoint, depends_on) | {"documents": [file.name for file in files]} | found
    write_text(path, record)
    print(f"{text_table(record)}\nresults: {path}")


def main(argv: list[str] | None = None) -> None:
    """Measure what the first argument names."""
    commands = {"context": (Context, context), "search": (Search, search), "tasks": (Tasks, tasks), "text": (Text, text)}
    run_command(commands, argv)


if __name__ == "__main__":
    main()
