"""Causal language models by name: built-in presets (random weights, no network), folders and hub names."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

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
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"--model {name} is no preset ({', '.join(PRESETS)}), no folder with a config.json, and not on the hub as it can"
            f" be reached from here ({str(error).splitlines()[0]}): pass one of these"
        ) from None


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
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_model(name: str | Path) -> PreTrainedModel:
    """A trained model in float32, from a folder (a run's checkpoint, say) or the hub.

    Raises: FileNotFoundError if there is none; ValueError if the weights do not fill the architecture.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"no model at {name}, neither as a folder nor on the hub as it can be reached from here"
            f" ({str(error).splitlines()[0]}): pass a folder with config.json and model.safetensors, or a hub name"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{name} lacks the weights {', '.join(missing[:5])}: it is damaged, or not a causal language model")
    return model


def architecture(model: PreTrainedModel) -> str:
    """A SHA-256 that two models share when the same configuration built them, whatever name or folder it came from."""
    config = model.config.to_dict()
    about = {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def num_parameters(model: torch.nn.Module) -> int:
    """How many numbers the model holds, embeddings included, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
