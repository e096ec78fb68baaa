"""Architectures by name as one table: shapes that were published, what was published of their training, their configs."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, NamedTuple

from torch import nn
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from lm.psann import PsannConfig


@dataclass(frozen=True)
class Preset:
    """The shape of a model that is yet to be trained, with the batch and peak learning rate that were published for it."""

    hidden: int
    layers: int
    heads: int
    _: KW_ONLY
    positions: int = 2048
    batch: int | None = None  # rows of `positions` tokens in a step
    lr: float | None = None

    vocab_multiple: ClassVar[int] = 64  # the embedding has the next multiple of this many rows, which GPUs multiply faster

    def config(self) -> PreTrainedConfig:
        """The transformers configuration of this shape; vocabulary and special tokens are the builder's to set."""
        raise NotImplementedError

    def initialise(self, model: PreTrainedModel) -> None:
        """Draw the weights anew where transformers draws them otherwise than the model's authors did."""


@dataclass(frozen=True)
class NeoX(Preset):
    """GPT-NeoX as in Pythia: parallel residual, GELU, untied, no dropout, intermediate size 4 x hidden."""

    rotary: float = 0.25  # share of each head's dimensions that turn with the position

    def config(self) -> PreTrainedConfig:
        config = GPTNeoXConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
        )
        config.rope_parameters["partial_rotary_factor"] = self.rotary
        return config


@dataclass(frozen=True)
class Olmo(Preset):
    """A rung of DataDecide's ladder as a stock Llama: RMSNorm, SwiGLU of 4 x hidden, rotary positions, no biases, untied."""

    parameters: int  # as published: all but the input embedding
    nominal: float  # the size in its name
    steps: int  # as published, for 100 tokens per parameter
    tokens: float  # as published, rounded

    vocab_multiple: ClassVar[int] = 128

    def config(self) -> PreTrainedConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            bos_token_id=None,
            eos_token_id=None,
        )

    def initialise(self, model: PreTrainedModel) -> None:
        """Draw every matrix from a normal distribution with deviation .02, cut off at three deviations."""
        for parameter in model.parameters():
            if parameter.ndim > 1:  # norms stay at one
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.06, b=0.06)

    @property
    def scaled_from(self) -> float:
        """The N of DataDecide's formulas: the exact count up to 90M, the size in the name above (their scripts/ladder.py)."""
        return self.parameters if self.nominal <= 90e6 else self.nominal


@dataclass(frozen=True)
class GPT(Preset):
    """GPT-2's class: norms before, learned positions, GELU, tied; dropout in embedding, attention and residual."""

    dropout: float = 0.0
    batch_tokens: int | None = None  # where tokens in a step were published rather than rows

    def config(self) -> PreTrainedConfig:
        return GPT2Config(
            n_embd=self.hidden,
            n_layer=self.layers,
            n_head=self.heads,
            n_positions=self.positions,
            embd_pdrop=self.dropout,
            attn_pdrop=self.dropout,
            resid_pdrop=self.dropout,
            bos_token_id=None,
            eos_token_id=None,
        )


@dataclass(frozen=True)
class Psann(Preset):
    """PSANN-LM (`lm.psann`): Llama's attention and norms, an MLP of 4 x hidden with biases, untied, no dropout."""

    base: str = "respsann"  # "transformer" is the control: GELU in place of damped sines, nothing else changed

    def config(self) -> PreTrainedConfig:
        return PsannConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
            base=self.base,
        )


PRESETS: dict[str, Preset] = {
    # For two CPU cores.
    "neox-64x2": NeoX(64, 2, 4),
    "neox-128x2": NeoX(128, 2, 4),
    "neox-128x6": NeoX(128, 6, 4, rotary=1.0),  # a quarter of so small a head would be 8 dimensions
    # Pythia: Biderman et al., arXiv 2304.01373, table 1, and the published config.json of each. The two smallest came later.
    "pythia-14m": NeoX(128, 6, 4, batch=1024),
    "pythia-31m": NeoX(256, 6, 8, batch=1024),
    "pythia-70m": NeoX(512, 6, 8, batch=1024, lr=1e-3),
    "pythia-160m": NeoX(768, 12, 12, batch=1024, lr=6e-4),
    "pythia-410m": NeoX(1024, 24, 16, batch=1024, lr=3e-4),
    "pythia-1b": NeoX(2048, 16, 8, batch=1024, lr=3e-4),
    "pythia-1.4b": NeoX(2048, 24, 16, batch=1024, lr=2e-4),
    "pythia-2.8b": NeoX(2560, 32, 32, batch=1024, lr=1.6e-4),
    "pythia-6.9b": NeoX(4096, 32, 32, batch=1024, lr=1.2e-4),
    "pythia-12b": NeoX(5120, 36, 40, batch=1024, lr=1.2e-4),
    # DataDecide: Magnusson et al., arXiv 2504.11393, table of model sizes; seq_len 2048, vocabulary 50,280 in 50,304 rows.
    "olmo-4m": Olmo(64, 8, 8, batch=32, lr=1.4e-2, parameters=3_744_832, nominal=4e6, steps=5_725, tokens=0.4e9),
    "olmo-6m": Olmo(96, 8, 8, batch=32, lr=1.2e-2, parameters=6_010_464, nominal=6e6, steps=9_182, tokens=0.6e9),
    "olmo-8m": Olmo(128, 8, 8, batch=32, lr=1.1e-2, parameters=8_538_240, nominal=8e6, steps=13_039, tokens=0.9e9),
    "olmo-10m": Olmo(144, 8, 8, batch=32, lr=1.0e-2, parameters=9_900_432, nominal=10e6, steps=15_117, tokens=1e9),
    "olmo-14m": Olmo(192, 8, 8, batch=32, lr=9.2e-3, parameters=14_380_224, nominal=14e6, steps=21_953, tokens=1.4e9),
    "olmo-16m": Olmo(208, 8, 8, batch=32, lr=8.9e-3, parameters=16_004_560, nominal=16e6, steps=24_432, tokens=1.6e9),
    "olmo-20m": Olmo(192, 16, 8, batch=64, lr=8.4e-3, parameters=19_101_888, nominal=20e6, steps=14_584, tokens=1.9e9),
    "olmo-60m": Olmo(384, 16, 12, batch=96, lr=5.8e-3, parameters=57_078_144, nominal=60e6, steps=29_042, tokens=5.7e9),
    "olmo-90m": Olmo(528, 16, 12, batch=160, lr=4.9e-3, parameters=97_946_640, nominal=90e6, steps=29_901, tokens=9.8e9),
    "olmo-150m": Olmo(768, 12, 12, batch=192, lr=4.2e-3, parameters=151_898_880, nominal=150e6, steps=38_157, tokens=15e9),
    "olmo-300m": Olmo(1024, 16, 16, batch=320, lr=3.3e-3, parameters=319_980_544, nominal=300e6, steps=45_787, tokens=30e9),
    "olmo-530m": Olmo(1344, 16, 16, batch=448, lr=2.8e-3, parameters=530_074_944, nominal=530e6, steps=57_786, tokens=53e9),
    "olmo-750m": Olmo(1536, 16, 16, batch=576, lr=2.5e-3, parameters=681_297_408, nominal=750e6, steps=63_589, tokens=75e9),
    "olmo-1b": Olmo(2048, 16, 16, batch=704, lr=2.1e-3, parameters=1_176_832_000, nominal=1e9, steps=69_369, tokens=100e9),
    # The gpt-shakespeare journal (github.com/jeremyadamsfisher/shakespeare_transformer, v0.0.19), on characters but gpt3-small,
    # whose batch was 2 at first.
    "gpt-baby": GPT(384, 6, 6, positions=256, dropout=0.2, batch=64),
    "gpt-mini-v0": GPT(512, 8, 8, positions=256, dropout=0.2, batch=128),
    "gpt-mini-v1": GPT(512, 8, 8, positions=256, dropout=0.2, batch=180),
    "gpt3-small": GPT(768, 12, 12, dropout=0.2, batch=4),
    "gpt3-small-char": GPT(768, 12, 12, dropout=0.2, batch=4),
    # GPT-3: Brown et al., arXiv 2005.14165, table 2.1. Attention is dense here; theirs is banded in every other layer.
    "gpt3-125m": GPT(768, 12, 12, lr=6e-4, batch_tokens=500_000),
    "gpt3-350m": GPT(1024, 24, 16, lr=3e-4, batch_tokens=500_000),
    "gpt3-760m": GPT(1536, 24, 16, lr=2.5e-4, batch_tokens=500_000),
    "gpt3-1.3b": GPT(2048, 24, 16, lr=2e-4, batch_tokens=1_000_000),  # the table's 24 heads of 128 are not 2048
    "gpt3-2.7b": GPT(2560, 32, 32, lr=1.6e-4, batch_tokens=1_000_000),
    "gpt3-6.7b": GPT(4096, 32, 32, lr=1.2e-4, batch_tokens=2_000_000),
    "gpt3-13b": GPT(5120, 40, 40, lr=1e-4, batch_tokens=2_000_000),  # the table's 5140 is no multiple of its 40 heads of 128
    "gpt3-175b": GPT(12_288, 96, 96, lr=6e-5, batch_tokens=3_200_000),
    # PSANN-LM: tiny for two CPU cores, 13m with 16,384 tokens of vocabulary, the larger ones with about 50,000.
    "psann-tiny": Psann(128, 4, 4),
    "psann-tiny-transformer": Psann(128, 4, 4, base="transformer"),
    "psann-tiny-waveresnet": Psann(128, 4, 4, base="waveresnet"),
    "psann-tiny-sgrpsann": Psann(128, 4, 4, base="sgrpsann"),
    "psann-tiny-geosparse": Psann(128, 4, 4, base="geosparse"),
    "psann-13m": Psann(256, 6, 4, positions=1024),
    "psann-13m-transformer": Psann(256, 6, 4, positions=1024, base="transformer"),
    "psann-125m": Psann(768, 12, 12),
    "psann-125m-transformer": Psann(768, 12, 12, base="transformer"),
    "psann-300m": Psann(1024, 16, 16),
    "psann-1b": Psann(2048, 16, 16),
    "psann-3b": Psann(3072, 24, 24),
}


class Settings(NamedTuple):
    """How long and how fast to train a model of some size."""

    lr: float  # peak
    batch: int  # rows
    warmup_steps: int
    steps: int


def datadecide_settings(num_parameters: float, seq_len: int = 2048, tokens_per_parameter: float = 100) -> Settings:
    """The learning rate, batch, warmup and length that DataDecide's ladder gives a model of `num_parameters`.

    From scripts/ladder.py of github.com/allenai/OLMo, after Porian et al., arXiv 2406.19146: the batch is a multiple of 32
    rows that holds about as many tokens whatever `seq_len`, and the warmup lasts as many tokens as there are parameters.
    The published runs are 11 steps longer than this (530M: 21), which nothing explains.
    """
    scale = num_parameters / 108e6
    batch = 32 * max(1, round(160 * scale ** (2 / 3) * 2048 / seq_len / 32))
    tokens = batch * seq_len
    steps = int(tokens_per_parameter * num_parameters / tokens)
    return Settings(0.0047 * scale ** (-1 / 3), batch, round(num_parameters / tokens), steps)
