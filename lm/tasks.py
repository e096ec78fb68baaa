"""lm-eval's tasks on one of our models, in process: the log-likelihood of every choice of a question, and of texts.

lm-eval 0.4.13 makes the prompts, its stock task files unchanged but for what TASKS says, and scores them. Online it fetches the
rows from the hub. From a folder of rows (fetch_samples.py) nothing else is read: TASK/validation.jsonl, of which few-shot
examples are drawn too (never the question itself), mmlu/SUBJECT/{test,dev}.jsonl, and of texts TASK/test.jsonl.

After a chat template lm-eval scores the end of the assistant's line with the answer, since it takes white space that a prompt
ends with to what follows: the same for all choices of a question, and in "num_tokens". Takes seconds to import.
"""

import difflib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from lm.files import read_jsonl, sha256
from lm.prompting import Prompting
from lm.scorer import Scorer, quiet
from lm.task_results import choice_summary, over_subjects
from lm.task_rows import add_unconditional, choice_rows, document_rows, last_word_rows
from lm.text_measures import text_summary

STOCK = Path(lm_eval.__file__).parent / "tasks"
MADE_BY = "fetch_samples.py --parts tasks"
FEWSHOT_SEED = 1234  # lm-eval's own default
LM_EVALS = ("acc", "acc_norm", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")  # kept beside ours
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
TEXTS = {
    "lambada_openai": Benchmark("lambada/lambada_openai.yaml", "acc"),
    "wikitext": Benchmark("wikitext/wikitext.yaml", "word_perplexity"),
}
"""Texts whose likelihood is measured: they are no questions, and come without examples, template or instruction."""
ALL_TASKS = TASKS | TEXTS


@dataclass(frozen=True)
class Part:
    """A task, or one subject of MMLU."""

    task: str
    subject: str | None = None

    @property
    def benchmark(self) -> Benchmark:
        return ALL_TASKS[self.task]

    @property
    def is_text(self) -> bool:
        return self.task in TEXTS

    @property
    def name(self) -> str:
        return self.task if self.subject is None else f"{self.task}_{self.subject}"

    @property
    def stock(self) -> Path:
        return STOCK / self.benchmark.file.format(self.subject)

    def rows(self, folder: Path) -> dict[str, Path]:
        """The files of rows by split, the one to evaluate first, the one with the examples last."""
        if self.subject is None:
            split = "test" if self.is_text else "validation"
            return {split: folder / self.task / f"{split}.jsonl"}
        return {split: folder / self.task / self.subject / f"{split}.jsonl" for split in ("test", "dev")}


def name_faults(names: Sequence[str]) -> list[str]:
    """A line for each name that is no task, with near matches and the list of all."""
    faults = []
    for name in names:
        if name not in ALL_TASKS:
            near = difflib.get_close_matches(name, ALL_TASKS, n=3, cutoff=0.5)
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            faults.append(f"--tasks {name!r} is no task{meant}: choose from {','.join(ALL_TASKS)}")
    return faults


def parts_of(names: Sequence[str]) -> list[Part]:
    """The parts of tasks."""
    found = []
    for name in dict.fromkeys(names):
        files = sorted(STOCK.glob(ALL_TASKS[name].file.format("*")))
        subjects = [file.stem.removeprefix("mmlu_") for file in files] if name == "mmlu" else [None]
        found += [Part(name, subject) for subject in subjects]
    return found


def rows_digest(parts: Sequence[Part], folder: Path) -> str:
    """One SHA-256 of all rows. Raises: FileNotFoundError naming the first file that is not there, or has no row."""
    files = [path for part in parts for path in part.rows(folder).values()]
    if missing := [path for path in files if not path.is_file() or not path.stat().st_size]:
        hub = "leave out --rows to fetch the tasks from the hub"
        remedy = f"run {MADE_BY}, or {hub}" if missing[0].parent.name != "wikitext" else f"no package has these rows, {hub}"
        raise FileNotFoundError(f"no {missing[0]} ({len(missing)} of {len(files)} files are missing or empty): {remedy}")
    return hashlib.sha256(json.dumps([sha256(path) for path in files]).encode()).hexdigest()


def example_faults(parts: Sequence[Part], folder: Path, num_fewshot: int) -> list[str]:
    """A line for each task whose rows are too few for so many examples beside the question."""
    faults = []
    for part in parts:
        if num_fewshot and not part.is_text:
            *_, file = part.rows(folder).values()
            others = file.read_bytes().count(b"\n") - (part.subject is None)
            if others < num_fewshot:
                faults.append(f"--num_fewshot {num_fewshot}, and {file} has {others} rows for it: pass fewer")
    return faults


def load_task(part: Part, folder: Path | None) -> ConfigurableTask:
    """lm-eval's task with its prompts, on the rows of `folder`, or of the hub if that is None."""
    config = load_yaml(part.stock) | part.benchmark.changes
    config.pop("tag", None)
    if folder is not None:
        files = part.rows(folder)
        config["custom_dataset"] = lambda **_: {
            split: datasets.Dataset.from_list(read_jsonl(path, MADE_BY)) for split, path in files.items()
        }
        if part.is_text:
            config |= {"training_split": None, "validation_split": None}
        elif part.subject is None:
            # As "test" too: only if they are of one split does lm-eval keep a question out of its own examples.
            config |= {"training_split": None, "validation_split": None}
            config |= {"test_split": "validation", "fewshot_split": "validation"}
    return ConfigurableTask(config=config)


def measure_tasks(
    scorer: Scorer, parts: Sequence[Part], folder: Path | None, prompting: Prompting, limit: int | None
) -> tuple[dict[str, dict], list[dict]]:
    """{task: its summary} and a row for each question, as lm/task_results.py describes them.

    Raises: RuntimeError if a log-likelihood is not finite; ValueError if rows are not those of the task.
    """
    summaries, rows = {}, []
    with quiet():
        tasks = {part: load_task(part, folder) for part in parts}
        results, samples = _evaluate(scorer, tasks, prompting, limit)
        for part, task in tasks.items():
            own = _rows_of(part, task, samples[task.task_name], scorer, prompting)
            lm_evals = {name: results[task.task_name].get(f"{name},none") for name in LM_EVALS}
            if part.is_text:
                found = text_summary(own, part.benchmark.primary, len(scorer.tokenizer))
            else:
                found = choice_summary(own, part.benchmark.primary)
            found |= {"split": task.config.test_split or task.config.validation_split}
            found |= {"lm_eval": {name: value for name, value in lm_evals.items() if value is not None}}
            summaries.setdefault(part.task, {})[part.subject] = found
            rows += own
    merged = {name: of[None] if None in of else over_subjects(of) for name, of in summaries.items()}
    return {name: {"primary": ALL_TASKS[name].primary, **found} for name, found in merged.items()}, rows


def _evaluate(
    scorer: Scorer, tasks: dict[Part, ConfigurableTask], prompting: Prompting, limit: int | None
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """lm-eval's results and samples of each task; texts are never put as questions."""
    results, samples = {}, {}
    for is_text, how in ((False, prompting), (True, Prompting())):
        named = {task.task_name: task for part, task in tasks.items() if part.is_text == is_text}
        for task in named.values():
            task.set_config("num_fewshot", how.num_fewshot)
            task.set_fewshot_seed(FEWSHOT_SEED)
        if named:
            # Not simple_evaluate, which is this and seconds of asking pip and the compiler for their versions.
            found = lm_eval.evaluate(scorer, {"tasks": named}, limit=limit, bootstrap_iters=0, **how.options())
            results |= found["results"]
            samples |= found["samples"]
    return results, samples


def _rows_of(part: Part, task: ConfigurableTask, samples: Sequence[dict], scorer: Scorer, prompting: Prompting) -> list[dict]:
    name = {"task": part.task} if part.subject is None else {"task": part.task, "subject": part.subject}
    if part.is_text:
        return (document_rows if task.OUTPUT_TYPE == "loglikelihood_rolling" else last_word_rows)(name, samples, scorer)
    rows = choice_rows(name, task, samples, scorer, MADE_BY)
    if part.benchmark.primary == "acc_uncond":
        add_unconditional(rows, task, samples, scorer, prompting.apply_chat_template)
    return rows


def versions() -> dict[str, str]:
    """Of what decides prompts and scores."""
    return {name: version(name) for name in ("lm_eval", "transformers", "torch")}
