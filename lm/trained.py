"""Trained models by name: a checkpoint of a run, a folder or a hub name, and whether it fits the data."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from lm.args import check
from lm.checkpoint import Checkpoints, damage
from lm.files import read_json
from lm.papers import Papers
from lm.tokenizer import fingerprint, load_tokenizer


def find_model(name: str, checkpoint: str) -> tuple[str, str, dict | None]:
    """What to load, the checkpoint's name ("model" if it is no run's), and the run's run.json.

    Args: name: a run folder, a model folder or a hub name; checkpoint: of a run: final, best, latest, step_00000200.

    Raises: FileNotFoundError naming the checkpoints that there are; ValueError if the one asked for is damaged.
    """
    run = Path(name)
    if not (run / "run.json").is_file():
        return name, "model", None
    steps = Checkpoints(run / "checkpoints", keep=1)
    found = {path.name: path for path in [run / "final", run / "best", *steps.paths()] if path.is_dir()}
    path = steps.newest_good() if checkpoint == "latest" else found.get(checkpoint)
    if path is None:
        present = f"it has {', '.join(found)}" if found else "it has none: run its trainer, or let it finish"
        raise FileNotFoundError(f"no checkpoint {checkpoint} in {run}, {present}")
    if fault := damage(path):
        raise ValueError(f"{path} is damaged ({fault}): pass another --checkpoint ({', '.join(found)})")
    return str(path), path.name, read_json(run / "run.json", "train.py")


def find_tokenizer(source: str, own: dict) -> str | None:
    """The tokenizer beside a model, or else that of the data which the arguments of its run name."""
    if not Path(source).is_dir() or (Path(source) / "tokenizer.json").is_file():
        return source
    data = own.get("c4_dir") or (own["data_dir"] if "sequence_length" in own else None)
    return own.get("tokenizer") or (str(Path(data) / "tokenizer") if data else None)


def step_of(folder: Path) -> int | None:
    """Optimizer steps behind a run's checkpoint."""
    for name in ("state.json", "about.json"):
        if (folder / name).is_file():
            return read_json(folder / name, "train.py").get("step")
    return None


def find_config(source: str) -> PreTrainedConfig:
    """The configuration of a model. Raises: FileNotFoundError if there is no model."""
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {source}, here or on the hub as it can be reached from here ({str(error).splitlines()[0]}):"
            " pass a run folder, a model folder or a hub name"
        ) from None


def check_model(
    source: str, run: dict | None, papers: Papers, sequence_length: int, allow_other_tokenizer: bool = False
) -> None:
    """Refuse a model that does not fit the data or the windows, before its weights are loaded.

    Raises: FileNotFoundError if there is no model; ValueError, all faults together.
    """
    config = find_config(source)
    faults, vocab_size = [], papers.meta["vocab_size"]
    if config.vocab_size < vocab_size:
        faults.append(
            f"{source} has a vocabulary of {config.vocab_size}, {papers.folder} needs {vocab_size}:"
            " evaluate it on data of its own tokenizer (fetch_arxiv.py --tokenizer)"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        faults.append(f"{source} has {positions} positions, --sequence_length is {sequence_length}: lower it")
    if other := other_tokenizer(source, run, papers):
        if not allow_other_tokenizer:
            faults.append(f"{other}: tokenise with it (fetch_arxiv.py --tokenizer), or pass --allow_other_tokenizer")
        else:
            print(f"warning: {other}: the numbers mean something only if both give the same ids", flush=True)
    check(faults)


def other_tokenizer(source: str, run: dict | None, papers: Papers) -> str | None:
    """What speaks against the model reading the ids of this data, if anything does."""
    # The checkpoints of single steps hold no tokenizer: a run's model has the one of the data that it was trained on.
    trained_on = Path(run["args"]["data_dir"]) / "tokenizer" if run else Path(source)
    own = source if not Path(source).is_dir() or (Path(source) / "tokenizer.json").is_file() else trained_on
    try:
        if fingerprint(load_tokenizer(own)) == papers.meta["tokenizer"]["fingerprint"]:
            return None
    except (OSError, ValueError) as error:
        return f"the tokenizer of {source} cannot be read ({str(error).splitlines()[0]})"
    return f"the tokenizer of {source} is not the one of {papers.folder} ({papers.meta['tokenizer']['name']})"
