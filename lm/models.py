"""Causal language models by name: built-in presets (random weights, no network), folders and hub names."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

OWN_CODE = "pass another; a model's own code (auto_map) is never run"
logging.disable_progress_bar()  # transformers draws one for every model that it reads or writes, over ours


@dataclass(frozen=True)
class NeoX:
    """The shape of a GPT-NeoX model; all else is as in Pythia (parallel residual, GELU, untied, no dropout)."""

    hidden: int
    layers: int
    heads: int
    positions: int = 2048
    rotary: float = 0.25  # share of each head's dimensions that turn with the position


# Pythia: Biderman et al., arXiv 2304.01373, table 1, and the published config.json of each (intermediate = 4 x hidden).
PRESETS = {
    "neox-64x2": NeoX(64, 2, 4),  # for two CPU cores
    "neox-128x2": NeoX(128, 2, 4),
    "neox-128x6": NeoX(128, 6, 4, rotary=1.0),  # a quarter of so small a head would be 8 dimensions
    "pythia-14m": NeoX(128, 6, 4),
    "pythia-31m": NeoX(256, 6, 8),
    "pythia-70m": NeoX(512, 6, 8),
    "pythia-160m": NeoX(768, 12, 12),
    "pythia-410m": NeoX(1024, 24, 16),
    "pythia-1b": NeoX(2048, 16, 8),
    "pythia-1.4b": NeoX(2048, 24, 16),
}


def _config(name: str):
    shape = PRESETS.get(name)
    if shape is not None:
        config = GPTNeoXConfig(
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=4 * shape.hidden,
            max_position_embeddings=shape.positions,
        )
        config.rope_parameters["partial_rotary_factor"] = shape.rotary
        return config
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"--model {name} is no preset ({', '.join(PRESETS)}), no folder with a config.json, and not on the hub as it can"
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


def build_model(
    name: str, vocab_size: int, min_positions: int, token_ids: dict[str, int | None] | None = None
) -> PreTrainedModel:
    """A model of this architecture with random float32 weights and an embedding of exactly `vocab_size` rows.

    Parameters are float32 whatever the config says: Pythia's says float16, in which Adam's eps of 1e-8 is zero, so that
    the first update of a row that was never seen divides zero by zero. Draws from torch's global generator.

    Args:
        name: a preset, a folder with a config.json, or a hub name (only its config is used).
        min_positions: tokens in the longest context that it will see (see `ensure_positions`).
        token_ids: bos_token_id, eos_token_id and pad_token_id of the tokenizer in use, for the saved config.
    Raises: FileNotFoundError if there is no such architecture; ValueError if it is made for shorter contexts.
    """
    config = _config(name)
    ensure_positions(config, min_positions, f"--model {name}")
    config.vocab_size = vocab_size
    for key, value in (token_ids or {}).items():
        setattr(config, key, value)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def load_model(name: str | Path) -> PreTrainedModel:
    """A trained model in float32, from a folder (a run's checkpoint, say) or the hub; no code of its own is run.

    Raises: FileNotFoundError if there is none with safetensors; ValueError if the weights do not fill the architecture.
    """
    return _load(name)[0]


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


def _load(name: str | Path) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of weights that it has no use for."""
    safe = {"trust_remote_code": False, "use_safetensors": True}  # a pickle is never opened, code never run, and nobody asked
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **safe
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
