"""What lm-eval's samples say of a model, question by question: the rows of NAME.jsonl (lm/task_results.py)."""

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from lm.scorer import Scorer

UNCONDITIONAL = "Answer:"  # what OLMES conditions choices on instead of the question


def choice_rows(
    name: dict[str, str], task: ConfigurableTask, samples: Sequence[dict], scorer: Scorer, made_by: str
) -> list[dict]:
    """A row for each question, without the unconditional log-likelihoods.

    Where the choices are contexts (WinoGrande), what is scored, and so its length, is the continuation that they share.

    Args: name: the keys that tell of which task the rows are.
    Raises: ValueError if rows are not those of the task; RuntimeError if a log-likelihood is not finite.
    """
    rows = []
    for sample in samples:
        here = f"{'_'.join(name.values())} document {sample['doc_id']}"
        choices = task.doc_to_choice(sample["doc"])
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
        scored = [task.doc_to_target(sample["doc"])] * len(choices) if task.multiple_input else choices
        if not isinstance(right, int) or not 0 <= right < len(choices) or not all(scored):
            raise ValueError(
                f"{here} has the choices {scored!r:.200}, of which {right!r:.40} is right, texts and the index of one are"
                f" needed: make the rows again with {made_by}"
            )
        keys = [tuple(arguments) for arguments in sample["arguments"]]
        rows.append(
            {
                **name,
                "doc_id": sample["doc_id"],
                "right": right,
                "log_likelihoods": _finite(here, [answer[0] for answer in sample["filtered_resps"]]),
                "num_chars": [len(text) for text in scored],
                "num_tokens": [scorer.num_tokens[key] for key in keys],
                "unconditional": None,
                "cut": any(key in scorer.cut for key in keys),
            }
        )
    return rows


def add_unconditional(
    rows: Sequence[dict], task: ConfigurableTask, samples: Sequence[dict], scorer: Scorer, as_chat: bool
) -> None:
    """Put log P(choice | "Answer:") into the rows, that text being a user's turn if the questions were; a choice that occurs
    more than once is scored once."""
    context, delimiter = UNCONDITIONAL, task.config.target_delimiter
    if as_chat:
        context, delimiter = scorer.apply_chat_template([{"role": "user", "content": UNCONDITIONAL}]), ""
    choices = [task.doc_to_choice(sample["doc"]) for sample in samples]
    unique = list(dict.fromkeys(choice for of_one in choices for choice in of_one))
    requests = [Instance("loglikelihood", {}, (context, f"{delimiter}{choice}"), 0) for choice in unique]
    answers = scorer.loglikelihood(requests)
    known = {choice: float(answer[0]) for choice, answer in zip(unique, answers, strict=True)}
    for row, of_one in zip(rows, choices, strict=True):
        row["unconditional"] = [known[choice] for choice in of_one]


def last_word_rows(name: dict[str, str], samples: Sequence[dict], scorer: Scorer) -> list[dict]:
    """A row for each text of LAMBADA, of whose last word the likelihood is measured. Raises: as `choice_rows` does."""
    rows = []
    for sample in samples:
        [key], [(log_likelihood, greedy)] = map(tuple, sample["arguments"]), sample["filtered_resps"]
        [log_likelihood] = _finite(f"{name['task']} document {sample['doc_id']}", [log_likelihood])
        facts = {"log_likelihood": log_likelihood, "greedy": bool(greedy), "num_tokens": scorer.num_tokens[key]}
        rows.append({**name, "doc_id": sample["doc_id"], **facts, "cut": key in scorer.cut})
    return rows


def document_rows(name: dict[str, str], samples: Sequence[dict], scorer: Scorer) -> list[dict]:
    """A row for each whole document, of which every token is scored, the context beginning anew where the model's ends.

    Words and bytes are counted as the task does, before its text is made readable again. Raises: as `choice_rows` does.
    """
    rows = []
    for sample in samples:
        [[text]] = sample["arguments"]
        [log_likelihood] = _finite(f"{name['task']} document {sample['doc_id']}", sample["filtered_resps"])
        counts = {"num_words": sample["word_perplexity"][1], "num_bytes": sample["byte_perplexity"][1]}
        facts = {"log_likelihood": log_likelihood, "num_tokens": len(scorer.tok_encode(text)), **counts}
        rows.append({**name, "doc_id": sample["doc_id"], **facts, "cut": False})
    return rows


def _finite(here: str, log_likelihoods: Sequence[Any]) -> list[float]:
    found = [float(log_likelihood) for log_likelihood in log_likelihoods]
    if not all(map(math.isfinite, found)):
        raise RuntimeError(
            f"{here} has the log-likelihoods {found}, finite ones are needed: the weights are damaged, or try --precision fp32"
        )
    return found
