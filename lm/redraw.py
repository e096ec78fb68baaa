"""Whether the rows of a ledger are those of the data: a sample of them is drawn again, as the trainer drew them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lm.history import History
from lm.ledger import digests
from lm.ledger_rows import Faults, StageRows, TextRows
from lm.mixed_rows import MixedRows, row_ids
from lm.papers import read_papers
from lm.shards import Pack
from lm.splits import open_splits, read_splits
from lm.tokenizer import fingerprint, load_tokenizer

ENOUGH = 1000  # rows
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: its multiples modulo 2**64 are spread evenly
Draw = Callable[[int], dict[str, Any]]  # an example -> what the ledger must say of its row


class Sample:
    """All rows of a run, or 1,000 to 2,000 spread evenly over them, with what the ledger says of each."""

    def __init__(self) -> None:
        self.limit, self.rows = np.uint64(2**64 - 1), []

    def take(self, step: int, values: dict[str, Any]) -> None:
        """The rows of a step."""
        keys = values["example"].astype(np.uint64) * GOLDEN
        for row in np.flatnonzero(keys <= self.limit).tolist():
            self.rows.append((keys[row], f"step {step} row {row}", {name: column[row] for name, column in values.items()}))
        while len(self.rows) > 2 * ENOUGH:
            self.limit //= np.uint64(2)
            self.rows = [row for row in self.rows if row[0] <= self.limit]


def draw_again(history: History, sample: Sample, rows_of: Any, faults: Faults) -> dict[str, Any]:
    """Draw these rows again from seed and data, and add those that are others to the faults.

    Returns: how many were drawn, and if not all of them, why not.
    """
    found: dict[str, Any] = {"rows": 0, "why_no_more": None}
    make = {"train.py": _windows, "pptrain.py": _graphs, "pretrain.py": _texts}[history.trainer]
    try:
        if not history.state:
            raise ValueError("no good checkpoint says which data they are of")
        draw = make(history.args, history.state["identity"], rows_of)
        for _, where, said in sample.rows:
            made = draw(int(said["example"]))
            others = [f"{name} {_text(said[name])}, not {_text(made[name])}" for name in made if made[name] != said[name]]
            if others:
                faults.add("other row", f"{where} has {', '.join(others)}, which seed and data give")
            found["rows"] += 1
    except (OSError, ValueError, RuntimeError) as error:
        found["why_no_more"] = str(error).splitlines()[0]
    return found


def _text(value: Any) -> str:
    return f"{value:016x}" if isinstance(value, np.uint64) else str(value)


def _digest(inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.uint64]:
    return {"digest": digests([(inputs, targets)]).view(np.uint64)[0]}


def _refuse_others(identity: dict[str, Any], **now: Any) -> None:
    """Raises: ValueError if these are not what the run's checkpoints say."""
    if others := [name for name, value in now.items() if identity.get(name) != value]:
        raise ValueError(f"{' and '.join(others)} of the run were others than are there now")


def _hashes(files: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: about["sha256"] for name, about in files.items()}


def _windows(args: dict[str, Any], identity: dict[str, Any], _rows_of: Any) -> Draw:
    from random_window_dataset import RandomWindowDataset  # the samplers stand above lm

    papers = read_papers(args["data_dir"])
    found = _hashes(papers.meta["files"])
    _refuse_others(identity, data={name: found[name] for name in ("tokens.bin", "index.jsonl", "splits.json")})
    settings = {name: args[name] for name in ("sequence_length", "seed", "sampling", "category_weighting")}
    windows = RandomWindowDataset(papers, "train", target_categories=identity["categories"], **settings)

    def draw(example: int) -> dict[str, Any]:
        ids, paper, first_token = windows.draw(example, 1)
        return {"paper": papers.paper_ids[paper[0]], "first_token": first_token[0]} | _digest(ids[0, :-1], ids[0, 1:])

    return draw


def _graphs(args: dict[str, Any], identity: dict[str, Any], rows_of: StageRows) -> Draw:
    from synthetic import SyntheticExamples

    if args["generator"] is not None:
        raise ValueError(f"generator {args['generator']} is not the built-in one, and no code that a run names is run")
    splits, tokenizer = read_splits(args["data_dir"]), load_tokenizer(args["tokenizer"])
    _refuse_others(identity, data=_hashes(splits.meta["files"]), tokenizer=fingerprint(tokenizer))
    needed = {"reserved": splits.reserved, "tokenizer": tokenizer, "seq_len": args["seq_len"]}
    examples = SyntheticExamples(splits.task, args["seed"], **needed)

    def draw(example: int) -> dict[str, Any]:
        examples.stage = rows_of.stage_of(example)
        ids = examples.examples(example, 1).ids[0]
        return _digest(ids[:-1], ids[1:])

    return draw


def _texts(args: dict[str, Any], identity: dict[str, Any], rows_of: TextRows) -> Draw:
    pack, splits = Pack(args["c4_dir"]), open_splits(args["data_dir"]) if args["data_dir"] else None
    tokenizer, data = load_tokenizer(pack.folder / "tokenizer"), _hashes(splits.meta["files"]) if splits else {}
    _refuse_others(identity, pack=pack.identity, tokenizer=fingerprint(tokenizer), data=data)
    synthetic = splits.rows("mixin") if splits and args["mixin_percent"] else []
    choices = args["seed"], args["mixin_percent"], args["mixin_loss"], args.get("shuffle", False)
    mixed = MixedRows(pack, synthetic, tokenizer, *choices)

    def draw(example: int) -> dict[str, Any]:
        pass_blocks, (blocks, _) = rows_of.blocks.length, mixed.drawn(example + 1)
        if min(blocks, pass_blocks or blocks) > pack.num_blocks:
            raise ValueError(f"{pack.folder} has {pack.num_blocks} blocks, {blocks} were drawn")
        batch, columns = mixed.noted_rows(range(example, example + 1), pass_blocks)
        return {name: column[0] for name, column in columns.items()} | _digest(*next(iter(row_ids(batch))))

    return draw
