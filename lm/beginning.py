"""What a run begins with: random weights, or a trained model, which stays the same however often the run goes on."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm.checkpoint import Checkpoints, damage, read_fields
from lm.files import sha256
from lm.models import ensure_positions, load_model
from lm.recovery import choose_checkpoint
from lm.run import main_decides
from lm.tokenizer import fingerprint, load_tokenizer
from lm.trained import step_of

REMEDY = "pass another --pptrain_checkpoint, or none for random weights"


@dataclass(frozen=True)
class Beginning:
    """A model to begin with; its weights alone, moments start anew."""

    path: str | None = None  # of its folder; None: random weights
    sha256: str | None = None  # of its weights
    load_from: Path | None = None  # the same folder, or the checkpoint that the run has come to since


def choose_beginning(args, tokenizer: PreTrainedTokenizerFast, pack: Path, accelerator: Accelerator) -> Beginning:
    """What the run begins with, or began with; the same on every process, though pptrain.py may be going on.

    Raises: as `find_beginning` and `check_same_tokenizer` do.
    """

    def choose() -> Beginning:
        checkpoint = choose_checkpoint(Checkpoints(Path(args.output_dir) / "checkpoints", keep=1), args.resume_from)
        found = find_beginning(args.pptrain_checkpoint, Path(args.scratch_dir) / "pptrain", checkpoint)
        if found.load_from not in (None, checkpoint):
            check_same_tokenizer(found.load_from, tokenizer, pack)
        return found

    return main_decides(accelerator, choose)


def find_beginning(asked: str, pptrain: Path, checkpoint: Path | None) -> Beginning:
    """What `--pptrain_checkpoint` stands for.

    Args:
        asked: "none", "latest" (of the run in `pptrain`), a run folder (the latest of it) or a model folder.
        checkpoint: of this run, if it goes on. What it began with is kept, though that run may have gone on too and may have
            removed it, unless another folder is asked for.

    Raises: FileNotFoundError if there is no such model; ValueError if it is damaged.
    """
    if checkpoint is not None:
        state = read_fields(checkpoint / "state.json", {"pptrain_checkpoint": str | None, "identity": dict})
        if (began := state["pptrain_checkpoint"]) and _stands_for(asked, Path(began)):
            if not isinstance(sha := state["identity"].get("initial_weights"), str):
                what = f"{checkpoint}/state.json has initial_weights {sha!r:.80} in its identity, a SHA-256 is needed"
                raise ValueError(f"{what}: pass another checkpoint")
            return Beginning(began, sha, checkpoint)
    if asked == "none":
        return Beginning()
    path = newest_model(pptrain) if asked == "latest" else _named(Path(asked))
    if path is None:
        what = f"no checkpoint in {pptrain if asked == 'latest' else asked}: run pptrain.py, or {REMEDY}"
        raise FileNotFoundError(what)
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"no {path}/model.safetensors: save the model in one file, or {REMEDY}")
    return Beginning(str(path.resolve()), sha256(path / "model.safetensors"), path)


def _stands_for(asked: str, began: Path) -> bool:
    """Whether `asked` is this model, or the run whose latest it was."""
    return asked == "latest" or Path(asked).resolve() in (began, began.parent, began.parent.parent)


def _named(path: Path) -> Path | None:
    if (path / "run.json").is_file():
        return newest_model(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"no model in {path}: {REMEDY}")
    if (path / "manifest.json").is_file() and (fault := damage(path)):
        raise ValueError(f"{path} is damaged ({fault}): {REMEDY}")
    return path


def newest_model(run: Path) -> Path | None:
    """The final model of a run, or a later checkpoint if there is one; says which damaged ones it passes over, and why."""
    final, step = run / "final", Checkpoints(run / "checkpoints", keep=1).newest_good()
    good = [] if step is None else [step]
    if final.is_dir() and (fault := damage(final)):
        print(f"warning: {final} is damaged ({fault}): passing over it", flush=True)
    elif final.is_dir():
        good.insert(0, final)  # of two of the same step it is the one with a tokenizer
    return max(good, key=step_of, default=None)


def check_same_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, pack: Path) -> None:
    """Raise ValueError unless the model in `folder` reads the ids of the tokenizer that made `pack`."""
    needed = {"tokenizer": fingerprint(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if (folder / "tokenizer.json").is_file():
        own = load_tokenizer(folder)
        found = {"tokenizer": fingerprint(own), "eos_token_id": own.eos_token_id}
    elif (folder / "state.json").is_file():  # the checkpoints of single steps hold no tokenizer, but know which it is
        found = read_fields(folder / "state.json", {"identity": dict})["identity"]
    else:
        raise ValueError(f"{folder} has no tokenizer.json, its tokenizer must be known: put it there, or {REMEDY}")
    if differing := [f"{key} {found.get(key)}, not {value}" for key, value in needed.items() if found.get(key) != value]:
        raise ValueError(
            f"the tokenizer of {folder} is not that of {pack} ({'; '.join(differing)}): pack with the tokenizer of the model"
            f" (build_pretrain.py --tokenizer), or {REMEDY}"
        )


def load_beginning(path: Path, vocab_size: int, min_positions: int, dropout: float | None = None) -> PreTrainedModel:
    """The model in `path`, ready to train on contexts of `min_positions` tokens; `dropout` as in `lm.models.build_model`.

    Raises: FileNotFoundError or ValueError as `lm.models.load_model` does; ValueError if it has fewer embeddings than
        `vocab_size`, or a table with fewer positions.
    """
    model = load_model(path, dropout)
    if (rows := len(model.get_input_embeddings().weight)) < vocab_size:
        raise ValueError(f"{path} has a vocabulary of {rows}, {vocab_size} are needed: {REMEDY}")
    ensure_positions(model.config, min_positions, str(path))
    return model.train()  # transformers loads models for evaluation, without dropout
