"""Causal language models by name: built-in presets (random weights, no network), folders and hub names.

PSANN-LM is as much at home as transformers' own architectures: `lm.psann`, which `lm.presets` imports, registers its classes.
"""

import hashlib
import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lm.parts import in_parts, read_parts, weights_of
from lm.presets import PRESETS, Preset

OWN_CODE = "pass another; a model's own code (auto_map) is never run"
logging.disable_progress_bar()  # transformers draws one for every model that it reads or writes, over ours


def _config(name: str) -> PreTrainedConfig:
    if name in PRESETS:
        return PRESETS[name].config()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        close = get_close_matches(name.lower(), PRESETS)
        among = f"did you mean {' or '.join(close)}?" if close else f"presets: {', '.join(PRESETS)}"
        raise FileNotFoundError(
            f"--model {name} is no preset ({among}), no folder with a config.json, and not on the hub as it can"
            f" be reached from here ({_gist(error)}): pass one of these"
        ) from None
    except Exception as error:  # of many kinds, KeyError and validation errors of its own too
        raise ValueError(f"--model {name} has a config.json that is no good ({_gist(error)}): {OWN_CODE}") from None


def is_rotary(config: PreTrainedConfig) -> bool:
    """Whether positions are rotations of one frequency table (Su et al., arXiv 2104.09864), without scaling to a length."""
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "default"


def ensure_positions(config: PreTrainedConfig, min_positions: int, name: str) -> None:
    """Make the configuration of a model that is yet to be trained one for contexts of `min_positions` tokens.

    Plain rotary positions are computed, not looked up, so any number will do; where there is a table it must be long enough.

    Raises: ValueError, calling the model `name`, if it is not.
    """
    positions = getattr(config, "max_position_embeddings", None)  # some, like BLOOM, have no limit
    if positions is not None and positions < min_positions and is_rotary(config):
        config.max_position_embeddings = min_positions
    elif positions is not None and positions < min_positions:
        raise ValueError(
            f"{name} has {positions} positions, {min_positions} are needed: train on a shorter context, or choose another model"
        )


def _set_dropout(config: PreTrainedConfig, dropout: float, name: str) -> None:
    """Give every dropout of the configuration this probability, but those of classifiers that no language model has."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} is a probability in [0, 1): for a fifth pass 0.2")
    fields = [
        key
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop")) and not key.startswith(("classifier", "summary"))
        if value is None or type(value) in (int, float)
    ]
    if dropout and not fields:
        raise ValueError(f"{name} ({type(config).__name__}) has no dropout, {dropout} is asked: pass 0, or another model")
    for key in fields:
        setattr(config, key, dropout)


def build_model(
    name: str, vocab_size: int, min_positions: int, token_ids: dict[str, int | None] | None = None, dropout: float | None = None
) -> PreTrainedModel:
    """A model of this architecture with random float32 weights and embeddings for `vocab_size` ids, all of which train.

    Parameters are float32 whatever the config says: Pythia's says float16, in which Adam's eps of 1e-8 is zero, so that
    the first update of a row that was never seen divides zero by zero. Draws from torch's global generator.

    Args:
        name: a preset, a folder with a config.json, or a hub name (only its config is used).
        vocab_size: ids; embedding and head have the next multiple of 64 rows, those of OLMo's presets of 128.
        min_positions: tokens in the longest context that it will see (see `ensure_positions`; presets have as many as asked).
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer in use, for the saved config.
        dropout: probability in place of the config's own, in all places where the architecture has dropout.
    Raises: FileNotFoundError if there is no such architecture; ValueError if it is made for shorter contexts, has no dropout
        or cannot have this vocabulary, or if its logits depend on later tokens.
    """
    config, preset = _config(name), PRESETS.get(name)
    if preset is not None:  # a shape that is yet to be trained, with positions to choose
        config.max_position_embeddings = max(preset.positions, min_positions)
    ensure_positions(config, min_positions, f"--model {name}")
    multiple = (preset or Preset).vocab_multiple
    config.vocab_size = -(-vocab_size // multiple) * multiple
    for key, value in (token_ids or {}).items():
        setattr(config, key, value)
    if dropout is not None:
        _set_dropout(config, dropout, f"--model {name}")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if preset is not None:
        preset.initialise(model)
    _check_vocabulary(model, vocab_size, f"--model {name}")
    if model.device.type != "meta":
        _check_causal(model, min(min_positions, 8), f"--model {name}")
    return _train_all_rows(model)


def _check_vocabulary(model: PreTrainedModel, vocab_size: int, name: str) -> None:
    """Raise ValueError unless the model reads and predicts `vocab_size` ids, the same ones."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = [0 if layer is None else len(layer.weight) for layer in (embedding, head)]
    if rows[0] != rows[1] or rows[0] < vocab_size:
        raise ValueError(
            f"{name} has an embedding of {rows[0]} rows and a head of {rows[1]}, {vocab_size} or more of both are needed:"
            " choose another model"
        )


def _check_causal(model: PreTrainedModel, length: int, name: str) -> None:
    """Raise ValueError if another last token changes a logit before it: transformers builds BERT as a causal model too."""
    ids = torch.arange(length).repeat(2, 1) % model.config.vocab_size
    ids[1, -1] += 1 if ids[1, -1] == 0 else -1
    with torch.no_grad():
        logits = model.eval()(ids.to(model.device)).logits
    model.train()
    *before, last = (logits[0] - logits[1]).abs().amax(-1).tolist()
    if max(before, default=0.0) > 1e-5 * last:  # experts and other batches are rounded differently: 1e-7 was seen
        raise ValueError(f"{name} ({type(model).__name__}) predicts tokens that it has seen: choose a causal language model")


def _train_all_rows(model: PreTrainedModel) -> PreTrainedModel:
    """Let the padding token's row learn like any other: where documents end with that token, it is no padding.

    Llama's class, among others, never gives a gradient to that row of its input embedding.
    """
    if hasattr(embedding := model.get_input_embeddings(), "padding_idx"):
        embedding.padding_idx = None
    return model


def load_model(name: str | Path, dropout: float | None = None) -> PreTrainedModel:
    """A trained model in float32, from a folder (a run's checkpoint, say) or the hub; no code of its own is run.

    Args: dropout: as in `build_model`, for a model that is trained on.

    Raises: FileNotFoundError if there is none with safetensors; ValueError if the weights do not fill the architecture, or as
        `build_model` does.
    """
    options = {}
    if dropout is not None:
        options["config"] = _config(str(name))
        _set_dropout(options["config"], dropout, str(name))
    if in_parts(Path(name)):
        return _train_all_rows(_from_parts(Path(name), options.get("config") or _config(str(name))))
    return _train_all_rows(_load(name, **options)[0])


def _from_parts(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a checkpoint that several processes wrote their parts of (lm/parts.py), whole."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    read_parts(folder, weights_of(model))
    return model.eval()  # as transformers loads one


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Put the weights of a checkpoint into `model`, bit for bit.

    Raises: as `load_model` does; ValueError, naming a tensor, too if there are others than those of `model`, or one is not of
        the same shape and float32.
    """
    loaded, unexpected = _load(folder)  # transformers renames weights on disk, and knows how to undo it
    if unexpected:
        raise ValueError(f"{folder} has the weights {', '.join(unexpected[:5])}, which the model has not: pass another")
    for file in sorted(folder.glob("*model*.safetensors")):
        with safe_open(file, "pt") as opened:
            dtypes = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - it is no dict
        if other := sorted(name for name, dtype in dtypes.items() if dtype in ("F64", "F16", "BF16")):
            raise ValueError(f"{file} has {other[0]} in {dtypes[other[0]]}, F32 is needed: pass another")
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise ValueError(f"{folder} is not of this model ({' '.join(str(error).split())!s:.300}): pass another") from None


def _load(name: str | Path, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights that it has no use for."""
    safe = {"trust_remote_code": False, "use_safetensors": True}  # a pickle is never opened, code never run, and nobody asked
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **safe, **options
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no model at {name}, neither as a folder nor on the hub as it can be reached from here"
            f" ({_gist(error)}): pass a folder with config.json and model.safetensors, or a hub name"
        ) from None
    except Exception as error:  # of many kinds, KeyError and validation errors of its own too
        raise ValueError(f"{name} cannot be loaded ({_gist(error)}): {OWN_CODE}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} lacks the weights {', '.join(missing[:5])}: it is damaged, or not a causal language model")
    if wrong := [f"{key} {tuple(found)}, not {tuple(needed)}" for key, found, needed in sorted(report["mismatched_keys"])]:
        raise ValueError(f"{name} has weights not as its config.json says ({'; '.join(wrong[:3])}): it is damaged")
    return model, sorted(report["unexpected_keys"])


def _gist(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or repr(error)


def architecture(model: PreTrainedModel) -> str:
    """A SHA-256 that two models share when the same configuration built them, whatever name or folder it came from."""
    config = model.config.to_dict()
    about = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def num_parameters(model: torch.nn.Module) -> int:
    """How many numbers the model holds, embeddings included, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def non_embedding_parameters(model: PreTrainedModel) -> int:
    """How many numbers the model holds but for its input embedding: DataDecide's count, which has the head, tied or not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return num_parameters(model) - (0 if embedding.weight is head.weight else embedding.weight.numel())


def on_paper(name: str, vocab_size: int, min_positions: int = 1, dropout: float | None = None) -> PreTrainedModel:
    """The model that `build_model` would give, without memory for its weights, to be counted."""
    with torch.device("meta"):
        return build_model(name, vocab_size, min_positions, dropout=dropout)
