"""PSANN-LM: a causal language model whose MLPs are activated by damped sines with learned amplitude, frequency and damping.

The file needs nothing but torch and transformers: `save_pretrained` copies it beside the weights, and
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads them anywhere. Inside this repository the classes
are registered instead, and no code of a folder is run.

Shapes: B rows, T tokens, D hidden_size, F features of an activation, K taps of a filter over time.
"""

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

BASES = ("respsann", "transformer", "waveresnet", "sgrpsann", "geosparse")
SINE = ("amplitude", "frequency", "damping")


class PsannConfig(PreTrainedConfig):
    """The shape of a PSANN-LM. The bases share embedding, attention, norms, residual scales and initial weights.

        respsann     the MLP's activation is a damped sine (`SineParam`)
        transformer  the control: GELU in its place, nothing else changed
        waveresnet   respsann, and after each MLP a causal convolution over time (`Wave`)
        sgrpsann     respsann, and after each MLP a causal filter with a learned spectrum (`SpectralGate`)
        geosparse    respsann with sparse residual blocks on a grid of the MLP's features (`GeoSparseMLP`)

    Fields: the usual ones of transformers, and
        activation_amplitude, activation_frequency, activation_damping: where A, f and d of each feature begin; above 0.
        activation_amplitude_std, ...: deviation of a normal distribution about that, from which each feature draws its own.
        activation_learnable: those of amplitude, frequency and damping that train; the others are frozen parameters.
        conv_kernel, conv_dilation: taps of waveresnet's convolution, and tokens from one to the next.
        spectral_window: tokens that sgrpsann's filter reads, the current one included.
        sparse_neighbours, sparse_radius, sparse_depth, sparse_seed: inputs of each of geosparse's outputs, how far away on the
            grid they may be, number of blocks, and which inputs they are.
    """

    model_type = "psann"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50_257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 2048
    base: str = "respsann"
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    activation_amplitude: float = 1.0
    activation_frequency: float = 1.0
    activation_damping: float = 0.01
    activation_amplitude_std: float = 0.0
    activation_frequency_std: float = 0.0
    activation_damping_std: float = 0.0
    activation_learnable: tuple[str, ...] | list[str] = SINE
    conv_kernel: int = 3
    conv_dilation: int = 1
    spectral_window: int = 64
    sparse_neighbours: int = 8
    sparse_radius: int = 1
    sparse_depth: int = 1
    sparse_seed: int = 0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.activation_learnable = list(self.activation_learnable)
        super().__post_init__(**kwargs)
        # Named here and not by registering the models too: saved while sharded (FSDP2), those would name torch's own file.
        classes = {"AutoConfig": PsannConfig, "AutoModel": PsannModel, "AutoModelForCausalLM": PsannForCausalLM}
        self.auto_map = {auto: f"psann.{own.__name__}" for auto, own in classes.items()}
        if faults := self.faults():
            raise ValueError("; ".join(faults))

    def faults(self) -> list[str]:
        """What no model can be built with."""
        positive = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
        positive += [f"activation_{name}" for name in SINE] + ["conv_dilation", "sparse_neighbours", "sparse_depth"]
        found = [f"{name} {getattr(self, name)} must be above 0" for name in positive if not getattr(self, name) > 0]
        least = {f"activation_{name}_std": 0 for name in SINE} | {"sparse_radius": 0, "conv_kernel": 2, "spectral_window": 2}
        found += [
            f"{name} {getattr(self, name)} must be {low} or more"
            for name, low in least.items()
            if not getattr(self, name) >= low
        ]
        if self.base not in BASES:
            found.append(f"base {self.base!r} is unknown: choose among {', '.join(BASES)}")
        if unknown := sorted(set(self.activation_learnable) - set(SINE)):
            found.append(f"activation_learnable has {', '.join(unknown)}: choose among {', '.join(SINE)}")
        if self.num_attention_heads > 0 and self.hidden_size % (2 * self.num_attention_heads):
            found.append(
                f"hidden_size {self.hidden_size} is no multiple of 2 x {self.num_attention_heads} heads, which rotary positions"
                " need: change one of them"
            )
        if self.sparse_neighbours > (cells := (2 * max(self.sparse_radius, 0) + 1) ** 2):
            found.append(
                f"sparse_neighbours {self.sparse_neighbours} are more than the {cells} cells that sparse_radius"
                f" {self.sparse_radius} has: raise the one or lower the other"
            )
        return found

    @property
    def reach(self) -> int:
        """How many earlier tokens the filter over time reads; 0 if the base has none."""
        reaches = {"waveresnet": (self.conv_kernel - 1) * self.conv_dilation, "sgrpsann": self.spectral_window - 1}
        return reaches.get(self.base, 0)

    @property
    def layer_types(self) -> list[str]:
        """What generation keeps of each layer: keys and values, and of a hybrid one also what its filter reads."""
        return ["hybrid" if self.reach else "full_attention"] * self.num_hidden_layers


class _DampedSine(torch.autograd.Function):
    """A exp(-d |z|) sin(f z) in the dtype of A, f and d; saves z alone, where a chain of operations saves six tensors."""

    @staticmethod
    def forward(ctx, z, amplitude, frequency, damping):
        ctx.save_for_backward(z, amplitude, frequency, damping)
        wide = z.to(amplitude.dtype)
        decay = wide.abs().mul_(-damping).exp_()
        return decay.mul_((wide * frequency).sin_()).mul_(amplitude).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, amplitude, frequency, damping = ctx.saved_tensors
        wide, shape = z.to(amplitude.dtype), amplitude.shape
        of_amplitude = wide.abs().mul_(-damping).exp_().mul_(grad)
        cosine = (wide * frequency).cos_().mul_(of_amplitude)
        of_amplitude.mul_((wide * frequency).sin_())
        of_frequency = (cosine * wide).sum_to_size(shape) * amplitude
        of_damping = (of_amplitude * wide.abs()).sum_to_size(shape) * -amplitude
        of_z = cosine.mul_(frequency).sub_(wide.sign().mul_(of_amplitude).mul_(damping)).mul_(amplitude)
        return of_z.to(z.dtype), of_amplitude.sum_to_size(shape), of_frequency, of_damping


class SineParam(nn.Module):
    """y = A exp(-d |z|) sin(f z) with A, f, d > 0 of each feature: softplus of a raw parameter, and 1e-6 more for f.

    All is computed in float32 whatever z is. For z from N(0, 1) and f of 2.25 a chain in bfloat16 errs by .0028 (root mean
    square), this by .0010, which is the rounding of its result; that z itself was rounded costs .0026. What is frozen is a
    parameter without gradient and no buffer, as accelerate's FSDP2 shards no state but parameters; optimizers skip it.
    """

    def __init__(self, features: int, config: PsannConfig):
        super().__init__()
        for name in SINE:
            raw = nn.Parameter(torch.empty(features), requires_grad=name in config.activation_learnable)
            self.register_parameter(f"{name}_raw", raw)

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, f and d, float32 (F,); the smallest normal number is added where softplus would underflow to 0."""
        raws = (getattr(self, f"{name}_raw") for name in SINE)
        dtype = torch.promote_types(self.amplitude_raw.dtype, torch.float32)
        amplitude, frequency, damping = (F.softplus(raw.to(dtype)) for raw in raws)
        tiny = torch.finfo(dtype).tiny
        return amplitude + tiny, frequency + 1e-6, damping + tiny

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return _DampedSine.apply(z, *self.values())

    @torch.no_grad()
    def initialise(self, config: PsannConfig) -> None:
        """Let A, f and d begin where the configuration says; what it spreads below a hundredth of its mean is put there."""
        for name in SINE:
            raw = getattr(self, f"{name}_raw")
            mean, std = getattr(config, f"activation_{name}"), getattr(config, f"activation_{name}_std")
            values = torch.full_like(raw, mean, dtype=torch.float32)
            if std:
                values = torch.normal(values, std).clamp_(min=0.01 * mean)
            init.copy_(raw, values + torch.log(-torch.expm1(-values)))  # the inverse of softplus


class RMSNorm(nn.RMSNorm):
    """torch's, whose fused kernel needs a weight of the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_activation(features: int, config: PsannConfig) -> nn.Module:
    return nn.GELU() if config.base == "transformer" else SineParam(features, config)


class Attention(nn.Module):
    """Causal attention with rotary positions on whole heads (halves rotated, as in Llama), without biases."""

    is_causal = True
    num_key_value_groups = 1  # what transformers' attention functions ask for

    def __init__(self, config: PsannConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        heads = (*x.shape[:-1], -1, self.head_dim)
        queries, keys, values = (of(x).view(heads).transpose(1, 2) for of in (self.q_proj, self.k_proj, self.v_proj))
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, weights = attend(self, queries, keys, values, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.o_proj(mixed.reshape(x.shape).contiguous()), weights


class Time(NamedTuple):
    """What a filter over time must know of its rows.

    padding: (B, T), 0 at tokens that are padding; None if there are none.
    places: (B, T) int64, where each token goes so that `reach` empty places are before each of the examples that are packed
        into a row; None where none are packed.
    length: places of a row, those of all of its tokens and the empty ones.
    """

    padding: torch.Tensor | None
    places: torch.Tensor | None = None
    length: int = 0


class CausalFilter(nn.Module):
    """A depthwise convolution over time that reads the current token and earlier ones of the same example alone.

    Before the first token there are zeros. With a cache, the inputs that later tokens will read are kept in it.
    """

    def __init__(self, layer_idx: int, dilation: int = 1):
        super().__init__()
        self.layer_idx, self.dilation = layer_idx, dilation

    def forward(self, x_BTD: torch.Tensor, taps_D1K: torch.Tensor, time: Time, past: Cache | None) -> torch.Tensor:
        """Tap K - 1 is the current token's, as torch.nn.Conv1d has it."""
        if time.padding is not None:
            x_BTD = x_BTD * time.padding[..., None].to(x_BTD.dtype)
        x_BDT, (num_features, _, num_taps) = x_BTD.transpose(1, 2), taps_D1K.shape
        reach, length = (num_taps - 1) * self.dilation, time.length or x_BDT.shape[-1]
        if past is not None:
            x_BDT = past.update_conv_state(x_BDT, self.layer_idx, conv_kernel_size=reach)
        places = None if time.places is None else time.places[:, None].expand_as(x_BDT)
        if places is not None:
            x_BDT = x_BDT.new_zeros(*x_BDT.shape[:2], length).scatter(2, places, x_BDT)
        x_BDT = F.pad(x_BDT, (reach + length - x_BDT.shape[-1], 0))  # cuts what is older, too
        x_BDT = F.conv1d(x_BDT, taps_D1K.to(x_BDT.dtype), groups=num_features, dilation=self.dilation)
        return (x_BDT if places is None else x_BDT.gather(2, places)).transpose(1, 2)


class Wave(nn.Module):
    """x += Linear(SineParam(convolution over time(norm(x)))), after the wave block of github.com/Nickm1128/psann.

    That one pads both ends of the row, so that each token sees the next; here the convolution is causal.
    """

    def __init__(self, config: PsannConfig, layer_idx: int):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, config.conv_kernel, groups=config.hidden_size, bias=False)
        self.filter = CausalFilter(layer_idx, config.conv_dilation)
        self.activation = SineParam(config.hidden_size, config)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_BTD: torch.Tensor, time: Time, past: Cache | None) -> torch.Tensor:
        filtered = self.filter(self.norm(x_BTD), self.conv.weight, time, past)
        return x_BTD + self.out_proj(self.activation(filtered))


class SpectralGate(nn.Module):
    """x += mix * filter(norm(x)): of each channel a causal filter of K taps with a learned response, and a learned size.

    The response R[k] = sigmoid(raw[k]) at the frequencies k = 0 ... K/2 of a window of K tokens is real, and .5 at first. The
    taps are its inverse Fourier transform h, tap n for the token n earlier, so that at these frequencies the filter's response
    is R exactly. (R of one half is h = .5, 0, 0, ...: the current token alone.) The gate of github.com/Nickm1128/psann instead
    transforms the last K tokens of a row, gates them and transforms them back, so that each of them sees the later ones.
    """

    def __init__(self, config: PsannConfig, layer_idx: int):
        super().__init__()
        self.window = config.spectral_window
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.response_raw = nn.Parameter(torch.empty(config.hidden_size, 1, self.window // 2 + 1))
        self.mix = nn.Parameter(torch.empty(config.hidden_size, 1, 1))
        self.filter = CausalFilter(layer_idx)

    def taps(self) -> torch.Tensor:
        """(D, 1, K), the current token's last."""
        dtype = torch.promote_types(self.mix.dtype, torch.float32)
        response = torch.sigmoid(self.response_raw.to(dtype))
        return self.mix * torch.fft.irfft(response, n=self.window).flip(-1)

    def forward(self, x_BTD: torch.Tensor, time: Time, past: Cache | None) -> torch.Tensor:
        return x_BTD + self.filter(self.norm(x_BTD), self.taps(), time, past)


class MLP(nn.Module):
    def __init__(self, config: PsannConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = make_activation(config.intermediate_size, config)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD):
        return self.down_proj(self.activation(self.up_proj(x_BTD)))


class SparseLinear(nn.Module):
    """Each of the features of an H x W grid is a weighted sum of some of its neighbours, plus a bias.

    Which ones is a function of the configuration alone: `neighbours` cells of the window of (2 radius + 1)^2 around a feature,
    none twice, in the order of a hash. Where the window leaves the grid the nearest feature counts in a cell's place.
    """

    def __init__(self, config: PsannConfig, table: int):
        super().__init__()
        self.features, self.radius, self.seed = config.intermediate_size, config.sparse_radius, (config.sparse_seed, table)
        rows = math.isqrt(self.features)
        while self.features % rows:
            rows -= 1
        self.grid = rows, self.features // rows  # as square as can be
        self.weight = nn.Parameter(torch.empty(self.features, config.sparse_neighbours))
        self.bias = nn.Parameter(torch.empty(self.features))
        self.register_buffer("cells", self.choose(), persistent=False)  # drawn again, like rotary frequencies, when loaded

    def choose(self) -> torch.Tensor:
        """The cells of the window that each feature reads: (features, neighbours) int64."""
        num_cells = (2 * self.radius + 1) ** 2
        key = torch.zeros(1, dtype=torch.int64)
        for part in (*self.seed, torch.arange(self.features)[:, None], torch.arange(num_cells)):
            key = _hash(key + part)
        return key.argsort(dim=-1, stable=True)[:, : self.weight.shape[1]].contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A pass for each cell of the window: one copy of x is kept for the gradients, and they need no atomic additions."""
        side, (rows, columns) = 2 * self.radius + 1, self.grid
        weights = self.weight.new_zeros(self.features, side**2).scatter(1, self.cells, self.weight)
        weights = weights.t().reshape(side**2, rows, columns)
        x_RC = x.reshape(*x.shape[:-1], rows, columns)
        x_RC = torch.cat([x_RC[..., :1, :]] * self.radius + [x_RC] + [x_RC[..., -1:, :]] * self.radius, dim=-2)
        x_RC = torch.cat([x_RC[..., :1]] * self.radius + [x_RC] + [x_RC[..., -1:]] * self.radius, dim=-1)
        total = self.bias.view(rows, columns)
        for cell, weight in enumerate(weights):
            row, column = divmod(cell, side)
            total = total + weight * x_RC[..., row : row + rows, column : column + columns]
        return total.reshape(x.shape).to(x.dtype)


def _hash(key: torch.Tensor) -> torch.Tensor:
    """32 bits that look random, of 32 bits (lowbias32 of Wellons, nullprogram.com/blog/2018/07/31)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        key = key & 0xFFFFFFFF
        key = (key ^ (key >> shift)) * factor
    return key & 0xFFFFFFFF


class GeoSparseBlock(nn.Module):
    """h += alpha * sparse(activation(sparse(norm(h)))) on the features of an MLP."""

    def __init__(self, config: PsannConfig, number: int):
        super().__init__()
        self.norm = RMSNorm(config.intermediate_size, config.rms_norm_eps)
        self.first, self.second = (SparseLinear(config, 2 * number + side) for side in range(2))
        self.activation = make_activation(config.intermediate_size, config)
        self.alpha = nn.Parameter(torch.empty(1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.alpha * self.second(self.activation(self.first(self.norm(h))))


class GeoSparseMLP(nn.Module):
    """Dense layers to and from the features, and between them residual blocks on their grid in place of an activation."""

    def __init__(self, config: PsannConfig, layer_idx: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        numbers = range(layer_idx * config.sparse_depth, (layer_idx + 1) * config.sparse_depth)
        self.blocks = nn.Sequential(*(GeoSparseBlock(config, number) for number in numbers))
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.blocks(self.up_proj(x_BTD)))


class PsannBlock(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += alpha MLP(norm(x)); then what the base adds over time."""

    def __init__(self, config: PsannConfig, layer_idx: int):
        super().__init__()
        self.input_norm, self.mlp_norm = (RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
        self.self_attn = Attention(config, layer_idx)
        self.mlp = GeoSparseMLP(config, layer_idx) if config.base == "geosparse" else MLP(config)
        self.alpha = nn.Parameter(torch.empty(1))  # FSDP2 does not shard numbers without a dimension
        mixers = {"waveresnet": Wave, "sgrpsann": SpectralGate}
        self.mixer = mixers[config.base](config, layer_idx) if config.base in mixers else None

    def forward(self, x_BTD, position_embeddings, time=None, past_key_values=None, **kwargs):
        x = x_BTD
        x = x + self.self_attn(self.input_norm(x), position_embeddings, past_key_values=past_key_values, **kwargs)[0]
        x = x + self.alpha * self.mlp(self.mlp_norm(x))
        return x if self.mixer is None else self.mixer(x, time, past_key_values)


class PsannPreTrainedModel(PreTrainedModel):
    config: PsannConfig
    config_class = PsannConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("PsannBlock",)
    _skip_keys_device_placement = ("past_key_values",)
    _can_compile_fullgraph = True  # but for packed rows, whose number of examples the filters over time must know
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict] = {"hidden_states": PsannBlock, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier-uniform matrices (Glorot and Bengio, 2010), embeddings from N(0, .02), biases 0, norms and alphas 1."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SineParam):
            module.initialise(self.config)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # torch's own
        elif isinstance(module, SparseLinear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = module.weight.shape[1] ** -0.5
            init.uniform_(module.bias, -bound, bound)
            init.copy_(module.cells, module.choose())
        elif isinstance(module, SpectralGate):
            init.zeros_(module.response_raw)
            init.ones_(module.mix)
        elif isinstance(module, (PsannBlock, GeoSparseBlock)):
            init.ones_(module.alpha)
        else:
            super()._init_weights(module)


class PsannModel(PsannPreTrainedModel):
    def __init__(self, config: PsannConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PsannBlock(config, number) for number in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, one of them")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        segments = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            segments = find_packed_sequence_indices(position_ids.expand(x.shape[0], -1))
        if use_cache and past_key_values is None and segments is None:  # with a cache, attention would mix packed examples
            past_key_values = DynamicCache(config=self.config)
        time = self._time(attention_mask, segments, past_key_values, x.shape[1])
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        if isinstance(mask := attention_mask, dict):  # made by `generate` for compiled models
            mask = mask["full_attention"]
        else:
            mask = create_causal_mask(self.config, x, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(x, position_ids)
        for block in self.layers:
            x = block(
                x,
                position_embeddings=position_embeddings,
                time=time,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)

    def _time(self, attention_mask, segments, past, length: int) -> Time | None:
        """What filters over time must know of `length` tokens; segments: (B, T), the number of each packed example."""
        if not self.config.reach:
            return None
        if isinstance(attention_mask, dict):  # a cache of fixed size, see forward
            return Time(attention_mask["linear_attention"])
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions, from which base {self.config.base} cannot know what its"
                " filter over time may read: pass one of 2 for padding, and position_ids for packed rows"
            )
        if past is not None and past.layer_class_to_replicate is not None:
            raise ValueError(
                f"past_key_values has no place for what the filters of base {self.config.base} read: make it with"
                " DynamicCache(config=model.config)"
            )
        if segments is None:
            return Time(None if attention_mask is None else attention_mask[:, -length:])
        places = torch.arange(length, device=segments.device) + self.config.reach * segments
        return Time(None, places, int(places.max()) + 1)


class PsannForCausalLM(PsannPreTrainedModel, GenerationMixin):
    _tied_weights_keys: ClassVar[dict] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PsannConfig):
        super().__init__(config)
        self.model = PsannModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


PsannConfig.register_for_auto_class()  # so that save_pretrained copies this file
if __name__ == "lm.psann":  # a copy beside weights must not take the place of this module, nor of another copy
    AutoConfig.register("psann", PsannConfig)
    AutoModel.register(PsannConfig, PsannModel)
    AutoModelForCausalLM.register(PsannConfig, PsannForCausalLM)
