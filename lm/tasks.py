"""lm-eval's multiple-choice tasks on one of our models, in process, and the log-likelihood of every choice.

lm-eval 0.4.13 makes the prompts, its stock task files unchanged but for what TASKS says, and scores them. Online it fetches the
rows from the hub. From a folder of rows (fetch_samples.py) nothing else is read: TASK/validation.jsonl, of which few-shot
examples are drawn too (never the question itself), and mmlu/SUBJECT/{test,dev}.jsonl. Takes seconds to import.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm.args import check
from lm.files import read_jsonl, sha256
from lm.scorer import Scorer, quiet
from lm.task_results import over_subjects, summary

STOCK = Path(lm_eval.__file__).parent / "tasks"
MADE_BY = "fetch_samples.py --parts tasks"
FEWSHOT_SEED = 1234  # lm-eval's own default
UNCONDITIONAL = "Answer:"  # what OLMES conditions choices on instead of the question
CLOZE = {
    "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
}


@dataclass(frozen=True)
class Benchmark:
    """A task as DataDecide reads it: which file of lm-eval's it is, and by which accuracy it is compared."""

    file: str
    """Below lm_eval/tasks; {} is MMLU's subject."""
    primary: str
    """Magnusson et al., DataDecide, arXiv 2504.11393, as OLMES has it (Gu et al., arXiv 2406.08446)."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the file that are replaced."""


TASKS = {
    "arc_challenge": Benchmark("arc/arc_challenge.yaml", "acc_uncond"),
    "arc_easy": Benchmark("arc/arc_easy.yaml", "acc_per_char"),
    "boolq": Benchmark("super_glue/boolq/default.yaml", "acc_raw"),
    "commonsense_qa": Benchmark("commonsense_qa/default.yaml", "acc_uncond", CLOZE),  # the stock one asks for a letter
    "hellaswag": Benchmark("hellaswag/hellaswag.yaml", "acc_per_char"),
    "mmlu": Benchmark("mmlu/continuation/mmlu_{}.yaml", "acc_per_char"),
    "openbookqa": Benchmark("openbookqa/openbookqa.yaml", "acc_uncond"),
    "piqa": Benchmark("piqa/piqa.yaml", "acc_per_char"),
    "sciq": Benchmark("sciq/sciq.yaml", "acc_per_char"),  # not in DataDecide; the choice is ours
    "social_iqa": Benchmark("siqa/siqa.yaml", "acc_per_char"),
    "winogrande": Benchmark("winogrande/default.yaml", "acc_raw"),
}


@dataclass(frozen=True)
class Part:
    """A task, or one subject of MMLU."""

    task: str
    subject: str | None = None

    @property
    def name(self) -> str:
        return self.task if self.subject is None else f"{self.task}_{self.subject}"

    @property
    def stock(self) -> Path:
        return STOCK / TASKS[self.task].file.format(self.subject)

    def rows(self, folder: Path) -> dict[str, Path]:
        """The files of rows by split, the one to evaluate first."""
        if self.subject is None:
            return {"validation": folder / self.task / "validation.jsonl"}
        return {split: folder / self.task / self.subject / f"{split}.jsonl" for split in ("test", "dev")}


def parts_of(names: Sequence[str]) -> list[Part]:
    """The parts of tasks. Raises: ValueError for each name that is no task, with near matches and the list of all."""
    faults = []
    for name in names:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            faults.append(f"--tasks {name!r} is no task{meant}: choose from {','.join(TASKS)}")
    check(faults)
    found = []
    for name in dict.fromkeys(names):
        files = sorted(STOCK.glob(TASKS[name].file.format("*")))
        subjects = [file.stem.removeprefix("mmlu_") for file in files] if name == "mmlu" else [None]
        found += [Part(name, subject) for subject in subjects]
    return found


def rows_digest(parts: Sequence[Part], folder: Path) -> str:
    """One SHA-256 of all rows. Raises: FileNotFoundError naming the first file that is not there."""
    files = [path for part in parts for path in part.rows(folder).values()]
    if missing := [path for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"no {missing[0]} ({len(missing)} of {len(files)} files are missing): run {MADE_BY}, or leave out --rows to fetch"
            " the tasks from the hub"
        )
    return hashlib.sha256(json.dumps([sha256(path) for path in files]).encode()).hexdigest()


def load_task(part: Part, folder: Path | None) -> ConfigurableTask:
    """lm-eval's task with its prompts, on the rows of `folder`, or of the hub if that is None."""
    config = load_yaml(part.stock) | TASKS[part.task].changes
    config.pop("tag", None)
    if folder is not None:
        files = part.rows(folder)
        config["custom_dataset"] = lambda **_: {
            split: datasets.Dataset.from_list(read_jsonl(path, MADE_BY)) for split, path in files.items()
        }
        if part.subject is None:
            # As "test" too: only if they are of one split does lm-eval keep a question out of its own examples.
            config |= {"training_split": None, "validation_split": None}
            config |= {"test_split": "validation", "fewshot_split": "validation"}
    return ConfigurableTask(config=config)


def measure_tasks(
    scorer: Scorer, parts: Sequence[Part], folder: Path | None, num_fewshot: int, limit: int | None
) -> tuple[dict[str, dict], list[dict]]:
    """{task: its summary} and a row for each question, as lm/task_results.py describes them.

    Raises: RuntimeError if a log-likelihood is not finite; ValueError if rows are not those of the task.
    """
    with quiet():
        tasks = {part: load_task(part, folder) for part in parts}
        for task in tasks.values():
            task.set_config("num_fewshot", num_fewshot)
            task.set_fewshot_seed(FEWSHOT_SEED)
        # Not simple_evaluate, which is this and seconds of asking pip and the compiler for their versions.
        named = {task.task_name: task for task in tasks.values()}
        results = lm_eval.evaluate(scorer, {"tasks": named}, limit=limit, bootstrap_iters=0)
        rows = {part: rows_of(part, task, results["samples"][task.task_name], scorer) for part, task in tasks.items()}
        for part in parts:
            if TASKS[part.task].primary == "acc_uncond":
                add_unconditional(rows[part], tasks[part], results["samples"][tasks[part].task_name], scorer)
    summaries = {}
    for part, task in tasks.items():
        lm_evals = {name: results["results"][task.task_name].get(f"{name},none") for name in ("acc", "acc_norm")}
        found = summary(rows[part], TASKS[part.task].primary)
        found |= {"split": task.config.test_split or task.config.validation_split}
        found |= {"lm_eval": {name: value for name, value in lm_evals.items() if value is not None}}
        summaries.setdefault(part.task, {})[part.subject] = found
    merged = {name: of[None] if None in of else over_subjects(of) for name, of in summaries.items()}
    return (
        {name: {"primary": TASKS[name].primary, **found} for name, found in merged.items()},
        [row for part in parts for row in rows[part]],
    )


def rows_of(part: Part, task: ConfigurableTask, samples: Sequence[dict], scorer: Scorer) -> list[dict]:
    """A row for each question, without the unconditional log-likelihoods.

    Where the choices are contexts (WinoGrande), what is scored, and so its length, is the continuation that they share.
    """
    rows = []
    for sample in samples:
        choices = task.doc_to_choice(sample["doc"])
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        scored = [task.doc_to_target(sample["doc"])] * len(choices) if task.multiple_input else choices
        if not isinstance(right, int) or not 0 <= right < len(choices) or not all(scored):
            raise ValueError(
                f"{part.name} document {sample['doc_id']} has the choices {scored!r:.200}, of which {right!r:.40} is right,"
                f" texts and the index of one are needed: make the rows again with {MADE_BY}"
            )
        log_likelihoods = [float(answer[0]) for answer in sample["filtered_resps"]]
        if not all(map(math.isfinite, log_likelihoods)):
            raise RuntimeError(
                f"{part.name} document {sample['doc_id']} has the log-likelihoods {log_likelihoods}, finite ones are needed:"
                " the weights are damaged, or try --precision fp32"
            )
        keys = [tuple(arguments) for arguments in sample["arguments"]]
        rows.append(
            {
                "task": part.task,
                **({} if part.subject is None else {"subject": part.subject}),
                "doc_id": sample["doc_id"],
                "right": right,
                "log_likelihoods": log_likelihoods,
                "num_chars": [len(text) for text in scored],
                "num_tokens": [scorer.num_tokens[key] for key in keys],
                "unconditional": None,
                "cut": any(key in scorer.cut for key in keys),
            }
        )
    return rows


def add_unconditional(rows: Sequence[dict], task: ConfigurableTask, samples: Sequence[dict], scorer: Scorer) -> None:
    """Put log P(choice | "Answer:") into the rows; a choice that occurs more than once is scored once."""
    choices = [task.doc_to_choice(sample["doc"]) for sample in samples]
    unique = list(dict.fromkeys(choice for of_one in choices for choice in of_one))
    delimiter = task.config.target_delimiter
    requests = [Instance("loglikelihood", {}, (UNCONDITIONAL, f"{delimiter}{choice}"), 0) for choice in unique]
    answers = scorer.loglikelihood(requests)
    known = {choice: float(answer[0]) for choice, answer in zip(unique, answers, strict=True)}
    for row, of_one in zip(rows, choices, strict=True):
        row["unconditional"] = [known[choice] for choice in of_one]


def versions() -> dict[str, str]:
    """Of what decides prompts and scores."""
    return {name: version(name) for name in ("lm_eval", "transformers", "torch")}
