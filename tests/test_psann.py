"""PSANN-LM: the damped sine, what each base may read, caches, packed rows, and the folder that is saved."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lm import psann
from lm.models import architecture, build_model, load_model, load_weights, num_parameters, on_paper
from lm.packing import sees_only_itself
from lm.psann import BASES, PsannConfig, PsannForCausalLM, SineParam, SparseLinear, SpectralGate

V = 50
MIXING = ("waveresnet", "sgrpsann")
LONG = 150  # tokens, more than twice the window of 64 that sgrpsann reads


def make(base: str = "respsann", **fields) -> PsannForCausalLM:
    """A small model in which nothing is as it was at the beginning: no filter is the identity, no bias is 0."""
    shape = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = PsannForCausalLM(PsannConfig(**shape | {"base": base} | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (2.0 if "response_raw" in name else 0.1))
    return model


def sine(features: int = 4, **fields) -> SineParam:
    config = PsannConfig(**{f"activation_{name}": value for name, value in fields.items()})
    module = SineParam(features, config)
    module.initialise(config)
    return module


def chain(z, amplitude, frequency, damping):
    return amplitude * torch.exp(-damping * z.abs()) * torch.sin(frequency * z)


def some_ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- the activation


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("shape", [(3,), (2, 5, 3)])
def test_gradients_of_the_damped_sine_are_those_of_finite_differences(shape, scale):
    torch.manual_seed(0)
    z = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
    values = [torch.tensor(v, dtype=torch.float64).requires_grad_() for v in ([1, 0.5, 2], [1, 2.25, 0.1], [0.01, 0.1, 1])]
    assert torch.autograd.gradcheck(psann._DampedSine.apply, (z, *values), atol=1e-5)


def test_the_damped_sine_and_its_gradients_are_those_of_its_formula():
    module = sine(6, frequency=2.25, frequency_std=0.25)
    torch.manual_seed(0)
    z = (5 * torch.randn(4, 7, 6)).requires_grad_()
    weights = torch.randn(4, 7, 6)
    results = []
    for y in (module(z), chain(z, *module.values())):
        results.append([y, *torch.autograd.grad((y * weights).sum(), [z, *module.parameters()])])
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


def test_second_derivatives_are_refused_rather_than_wrong():
    z = torch.ones(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(sine()(z).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (gradient + z**2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_damped_sine_saves_its_input_alone_and_rounds_once(dtype):
    module, torch_seed = sine(8, frequency=2.25), torch.manual_seed(0)
    z = (20 * torch.randn(16, 8, generator=torch_seed)).to(dtype).requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = module(z)
    assert [tuple(t.shape) for t in kept.values() if t.numel() > 8] == [(16, 8)]
    exact = chain(z.double(), *(value.double() for value in module.values()))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
    y.float().sum().backward()
    assert z.grad.dtype == dtype
    assert module.amplitude_raw.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("raw", [-1e4, -50.0, 50.0, 200.0])
def test_amplitude_frequency_and_damping_stay_positive_and_gradients_finite_whatever_an_update_does(raw, dtype):
    module = sine(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(raw)
    assert all((value > 0).all() for value in module.values())
    z = torch.tensor([[0.0, 1e-7, -3.0], [torch.finfo(torch.float16).max, -6e4, 700]]).to(dtype).requires_grad_()
    y = module(z)
    y.float().sum().backward()
    assert all(t.isfinite().all() for t in (y, z.grad, *(parameter.grad for parameter in module.parameters())))


def test_amplitude_frequency_and_damping_begin_where_the_configuration_says():
    values = sine(5, amplitude=0.7, frequency=2.25, damping=0.001).values()
    for value, expected in zip(values, (0.7, 2.25, 0.001), strict=True):
        torch.testing.assert_close(value, torch.full((5,), expected), rtol=1e-5, atol=2e-6)
    torch.manual_seed(0)
    amplitude, frequency, damping = sine(4000, frequency=2.25, frequency_std=0.25, damping_std=0.1).values()
    assert (frequency.mean().item(), frequency.std().item()) == pytest.approx((2.25, 0.25), rel=0.03)
    assert amplitude.unique().numel() == 1
    assert damping.min() > 0.99e-4, "a hundredth of .01, for what would be negative"


def test_what_is_not_learnable_has_no_gradient_and_no_update():
    model = make(activation_learnable=["frequency"])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(some_ids(2, 9), labels=some_ids(2, 9)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = name.endswith(("amplitude_raw", "damping_raw"))
        assert torch.equal(parameter, before[name]) == frozen, name
        assert parameter.requires_grad != frozen, name


# ---- the bases


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("training", [True, False])
def test_no_logit_sees_a_later_token(base, training):
    model = make(base).train(training)
    ids = some_ids(2, LONG)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        for place in (1, 63, 64, 65, LONG - 2, LONG - 1):
            other = ids.clone()
            other[:, place] = (other[:, place] + 1) % V
            difference = (model(other, use_cache=False).logits - before).abs().amax(-1)
            assert difference[:, :place].max() == 0, place
            assert difference[:, place:].min() > 0, place


def by_the_formulas(model: PsannForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one row, written down plainly, with a rotation of complex numbers for positions."""

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.weight

    x, times = model.model.embed_tokens.weight[ids], torch.arange(len(ids), dtype=torch.float64)
    angles = times[:, None] * 10_000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turns = torch.polar(torch.ones_like(angles), angles)
    later = torch.ones(len(ids), len(ids)).triu(1).bool()
    for block in model.model.layers:
        attention, mlp, h = block.self_attn, block.mlp, norm(x, block.input_norm)
        read = []
        for start in range(0, 32, 8):  # 4 heads of 8
            q, k, v = (h @ of.weight[start : start + 8].T for of in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = (torch.complex(of[:, :4], of[:, 4:]) * turns for of in (q, k))
            scores = (q @ k.conj().T).real / 8**0.5
            read.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(read, -1) @ attention.o_proj.weight.T
        z = norm(x, block.mlp_norm) @ mlp.up_proj.weight.T + mlp.up_proj.bias
        active = chain(z, *mlp.activation.values()) if isinstance(mlp.activation, SineParam) else F.gelu(z)
        x = x + block.alpha * (active @ mlp.down_proj.weight.T + mlp.down_proj.bias)
    return norm(x, model.model.norm) @ model.lm_head.weight.T


@pytest.mark.parametrize("base", ["respsann", "transformer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_formulas(base, attention):
    model, ids = make(base).double(), some_ids(1, 20)
    model.set_attn_implementation(attention)
    torch.testing.assert_close(model(ids).logits[0], by_the_formulas(model, ids[0]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("base", MIXING)
@pytest.mark.parametrize("dilation", [1, 3])
def test_a_filter_over_time_reads_exactly_as_far_back_as_it_says(base, dilation):
    model = make(base, conv_dilation=dilation, num_hidden_layers=1)
    reach = model.config.reach
    assert reach == {"waveresnet": 2 * dilation, "sgrpsann": 63}[base]
    mixer, time = model.model.layers[0].mixer, psann.Time(None)
    x = torch.randn(1, LONG, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, time, None)[0, 100].sum(), x)
    read = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
    step = dilation if base == "waveresnet" else 1
    assert read == list(range(100 - reach, 101, step))


def test_the_spectral_gate_has_the_response_of_its_parameters():
    gate = make("sgrpsann").model.layers[0].mixer
    assert isinstance(gate, SpectralGate)
    impulse = gate.taps()[:, 0].flip(-1) / gate.mix[:, 0]  # by how many tokens ago
    response = torch.fft.rfft(impulse)
    torch.testing.assert_close(response.real, torch.sigmoid(gate.response_raw[:, 0]))
    assert response.imag.abs().max() < 1e-5
    fresh = SpectralGate(PsannConfig(hidden_size=8, num_attention_heads=2, base="sgrpsann"), 0)
    with torch.no_grad():
        fresh.response_raw.zero_()
        fresh.mix.fill_(1)
    expected = torch.zeros(8, 1, 64)
    expected[..., -1] = 0.5
    torch.testing.assert_close(fresh.taps(), expected)


def test_a_sparse_layer_is_the_sum_over_the_cells_that_each_feature_reads():
    layer = make("geosparse", sparse_radius=2, sparse_neighbours=5).model.layers[1].mlp.blocks[0].second
    assert isinstance(layer, SparseLinear)
    assert layer.grid == (6, 8)
    assert layer.cells.shape == (48, 5)
    x, expected = torch.randn(3, 48), torch.empty(3, 48)
    for feature in range(48):
        row, column, total = feature // 8, feature % 8, layer.bias[feature]
        cells = layer.cells[feature].tolist()
        assert len(set(cells)) == 5
        for weight, cell in zip(layer.weight[feature], cells, strict=True):
            read = min(max(row + cell // 5 - 2, 0), 5) * 8 + min(max(column + cell % 5 - 2, 0), 7)
            total = total + weight * x[:, read]
        expected[:, feature] = total
    torch.testing.assert_close(layer(x), expected)


def test_a_sparse_layer_keeps_one_copy_of_its_input():
    layer = make("geosparse", intermediate_size=1024, sparse_radius=2, sparse_neighbours=20).model.layers[0].mlp.blocks[0].first
    kept = {}
    x = torch.randn(64, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        layer(x)
    grid = 64 * 36 * 36  # 32 x 32, with a border of 2
    assert sum(t.untyped_storage().nbytes() // t.itemsize for t in kept.values()) < grid + 3 * 25 * 1024


def test_which_features_a_sparse_layer_reads_is_a_function_of_the_configuration():
    tables = [block.mlp.blocks[0] for block in make("geosparse").model.layers]
    cells = [layer.cells for pair in tables for layer in (pair.first, pair.second)]
    assert cells[0][:1].tolist() == [[0, 3, 5, 1, 7, 6, 2, 4]], "written down, so that no version of anything changes it"
    torch.manual_seed(5)
    again = [block.mlp.blocks[0].second.cells for block in make("geosparse").model.layers]
    assert torch.equal(cells[1], again[0])
    assert torch.equal(cells[3], again[1])
    assert len({tuple(table.flatten().tolist()) for table in cells}) == 4
    other = make("geosparse", sparse_seed=1).model.layers[0].mlp.blocks[0].first.cells
    assert not torch.equal(cells[0], other)
    counts = torch.bincount(psann._hash(torch.arange(90_000)) % 9, minlength=9)
    assert counts.min() > 9_700, "10,000 are expected, with a deviation of 94"


def test_the_control_differs_in_the_activation_alone():
    models = {}
    for base in ("respsann", "transformer"):
        torch.manual_seed(0)
        models[base] = build_model("psann-tiny" + ("" if base == "respsann" else "-transformer"), V, 16)
    sines = {name: p for name, p in models["respsann"].named_parameters() if "_raw" in name}
    rest = {name: p for name, p in models["respsann"].named_parameters() if "_raw" not in name}
    assert sum(p.numel() for p in sines.values()) == 3 * 512 * 4
    control = dict(models["transformer"].named_parameters())
    assert control.keys() == rest.keys()
    assert all(torch.equal(control[name], p) for name, p in rest.items())
    x = torch.randn(2, 3, 512)
    for block in models["transformer"].model.layers:
        assert torch.equal(block.mlp.activation(x), F.gelu(x))


@pytest.mark.parametrize("base", BASES)
def test_every_parameter_begins_as_said(base):
    torch.manual_seed(0)
    model = build_model("psann-tiny" if base == "respsann" else f"psann-tiny-{base}", 300, 16)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "alpha", "mix")):
            assert p.eq(1).all(), name
        elif name.endswith("response_raw") or (name.endswith("bias") and "blocks" not in name):
            assert p.eq(0).all(), name
        elif name == "model.embed_tokens.weight":
            assert p.std().item() == pytest.approx(0.02, rel=0.05)
        elif name.endswith("_raw"):
            assert p.unique().numel() == 1, name
        elif ".blocks." in name or name.endswith("conv.weight"):  # of 8 or 3 inputs each
            bound = (8 if ".blocks." in name else 3) ** -0.5
            assert 0.9 * bound < p.abs().max() <= bound, name
        else:  # Glorot and Bengio's bound
            bound = (6 / sum(p.shape)) ** 0.5
            assert 0.99 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.02), name


def parameters_of(base: str, d: int, layers: int, vocab: int) -> int:
    """Written down from the description of each base."""
    mlp = 4 * d
    block = 4 * d * d + 2 * d * mlp + mlp + d + 2 * d + 1
    block += {
        "respsann": 3 * mlp,
        "transformer": 0,
        "waveresnet": 3 * mlp + d + 3 * d + 3 * d + d * d + d,
        "sgrpsann": 3 * mlp + d + 33 * d + d,
        "geosparse": mlp + 2 * (8 * mlp + mlp) + 3 * mlp + 1,
    }[base]
    return layers * block + 2 * vocab * d + d


@pytest.mark.parametrize(
    ("name", "base", "shape", "vocab", "count"),
    [
        ("psann-tiny", "respsann", (128, 4), 4096, 1_844_868),
        ("psann-tiny-transformer", "transformer", (128, 4), 4096, 1_838_724),
        ("psann-tiny-waveresnet", "waveresnet", (128, 4), 4096, 1_914_500),
        ("psann-tiny-sgrpsann", "sgrpsann", (128, 4), 4096, 1_862_788),
        ("psann-tiny-geosparse", "geosparse", (128, 4), 4096, 1_883_784),
        ("psann-13m", "respsann", (256, 6), 16_384, 13_136_646),
        ("psann-13m-transformer", "transformer", (256, 6), 16_384, 13_118_214),
        ("psann-125m", "respsann", (768, 12), 50_304, 162_377_484),
        ("psann-125m-transformer", "transformer", (768, 12), 50_304, 162_266_892),
        ("psann-300m", "respsann", (1024, 16), 50_304, 304_661_520),
        ("psann-1b", "respsann", (2048, 16), 50_304, 1_011_976_208),
        ("psann-3b", "respsann", (3072, 24), 50_304, 3_028_380_696),
    ],
)
def test_presets_have_exactly_as_many_parameters_as_their_shape_says(name, base, shape, vocab, count):
    assert num_parameters(on_paper(name, vocab)) == parameters_of(base, *shape, vocab) == count


@pytest.mark.parametrize("base", BASES)
def test_a_model_on_paper_has_the_parameters_of_the_real_one(base):
    name = "psann-tiny" if base == "respsann" else f"psann-tiny-{base}"
    shapes = [{key: t.shape for key, t in build(name, 300).state_dict().items()} for build in (on_paper, build_real)]
    assert shapes[0] == shapes[1]


def build_real(name: str, vocab_size: int) -> PsannForCausalLM:
    return build_model(name, vocab_size, 16)


def test_faults_of_a_configuration_are_said_together():
    with pytest.raises(ValueError, match="num_hidden_layers") as error:
        PsannConfig(
            base="resnet",
            hidden_size=30,
            num_attention_heads=3,
            activation_damping=0.0,
            activation_frequency_std=-1.0,
            activation_learnable=["freq"],
            conv_kernel=1,
            sparse_neighbours=10,
            num_hidden_layers=0,
        )
    assert str(error.value).split("; ") == [
        "num_hidden_layers 0 must be above 0",
        "activation_damping 0.0 must be above 0",
        "activation_frequency_std -1.0 must be 0 or more",
        "conv_kernel 1 must be 2 or more",
        "base 'resnet' is unknown: choose among respsann, transformer, waveresnet, sgrpsann, geosparse",
        "activation_learnable has freq: choose among amplitude, frequency, damping",
        "sparse_neighbours 10 are more than the 9 cells that sparse_radius 1 has: raise the one or lower the other",
    ]
    with pytest.raises(ValueError, match="hidden_size 30 is no multiple of 2 x 4 heads, which rotary positions need"):
        PsannConfig(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="^sparse_radius -1 must be 0 or more; sparse_neighbours 8 are more than the 1 cells"):
        PsannConfig(sparse_radius=-1)


# ---- training


@pytest.mark.parametrize("base", BASES)
def test_every_base_learns_a_batch_by_heart(base):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = PsannForCausalLM(PsannConfig(**shape, base=base))
    ids = some_ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(base, reentrant):
    model, ids = make(base), some_ids(2, 80)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


@pytest.mark.parametrize("base", BASES)
def test_autocast_to_bfloat16_is_finite_and_near(base):
    model, ids = make(base), some_ids(2, 80)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # "cannot dispatch to fused implementation"
        low = model(ids, labels=ids)
    assert low.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert (low.logits.float() - exact.logits).abs().max() < 0.15 * exact.logits.std()
    low.loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_compiled_without_a_break_it_gives_the_same_loss_and_gradients(base):
    torch._dynamo.reset()
    model, ids = make(base, num_hidden_layers=1), some_ids(2, 70)
    losses, gradients = [], []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        losses.append(run(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, compiled)


def test_the_loss_is_the_mean_over_targets_and_outputs_are_those_of_transformers_models():
    model, ids = make(), some_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    model.set_attn_implementation("eager")
    out = model(ids, labels=labels, output_hidden_states=True, output_attentions=True)
    targets = labels[:, 1:].flatten()
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets))
    summed = model(ids, labels=labels, num_items_in_batch=5).loss
    torch.testing.assert_close(summed, out.loss * targets.ne(-100).sum() / 5)
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 9, 32)] * 3
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 9, 9)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 9))
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, out.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, out.logits[:, -2:], atol=1e-5, rtol=1e-5)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(embedded, out.logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds, one of them"):
        model()


# ---- packed rows, padding, caches


@pytest.mark.parametrize("base", BASES)
def test_packed_examples_see_only_themselves(base):
    model = make(base).eval()
    assert sees_only_itself(model)
    lengths = [[70, 3, 1, 1, 45], [120]]
    examples = [[some_ids(1, length, seed=length) for length in row] for row in lengths]
    positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    for row, position in zip(examples, positions, strict=True):
        ids, seed = torch.cat(row, dim=1), torch.cat([*row[1:], row[0]], dim=1)
        with torch.no_grad():  # beside another row, so that examples end at other places there
            both = torch.stack([position, torch.arange(120)])
            together = model(torch.cat([ids, seed]), position_ids=both).logits[0]
            alone = torch.cat([model(example, use_cache=False).logits[0] for example in row])
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


def test_attention_is_told_the_positions_by_which_flash_attention_unpacks_rows():
    told = []

    def probe(module, *tensors, **options):
        told.append(options["position_ids"])
        return sdpa_attention_forward(module, *tensors, **options)

    AttentionInterface.register("probe", probe)
    model, positions = make(), torch.arange(10).repeat(2)[None]
    model.set_attn_implementation("probe")
    model(some_ids(1, 20), position_ids=positions)
    assert len(told) == 2
    assert all(torch.equal(each, positions) for each in told)


@pytest.mark.parametrize("base", BASES)
def test_one_row_of_positions_serves_a_batch(base):
    model, ids = make(base).eval(), some_ids(3, 20)
    positions = torch.arange(10).repeat(2)[None]
    with torch.no_grad():
        one = model(ids, position_ids=positions, use_cache=False).logits
        each = model(ids, position_ids=positions.expand(3, -1), use_cache=False).logits
    assert torch.equal(one, each)


@pytest.mark.parametrize("base", BASES)
def test_padding_changes_no_logit(base):
    model, ids = make(base).eval(), some_ids(3, LONG)
    mask = torch.ones_like(ids)
    mask[0, :30], mask[1, :1], mask[2, 100:] = 0, 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
        for row in range(3):
            own = mask[row].bool()
            alone = model(ids[row : row + 1, own]).logits[0]
            torch.testing.assert_close(padded[row, own], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_logits_are_those_without_a_cache_at_every_step_and_in_chunks(base, padded):
    model, ids = make(base).eval(), some_ids(2, LONG)
    mask = torch.ones_like(ids)
    mask[0, : 7 * padded] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        for ends in (range(1, LONG + 1), (5, 70, 71, 72, 140, LONG), (LONG - 1, LONG)):
            cache, start, steps = DynamicCache(config=model.config), 0, []
            for end in ends:
                now = slice(start, end)
                options = {"position_ids": positions[:, now], "past_key_values": cache}
                steps.append(model(ids[:, now], attention_mask=mask[:, :end], **options).logits)
                start = end
            difference = (torch.cat(steps, dim=1) - whole).abs().amax(-1)
            assert difference[mask.bool()].max() < 2e-5


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("length", [5, 70])
def test_generation_of_every_kind_is_that_without_a_cache(base, length):
    model, ids = make(base).eval(), some_ids(2, length)
    model.lm_head.weight.data[7:] = 0  # of few words, so that some are repeated
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)

    def write(ids, **options):
        options |= {"attention_mask": options.get("attention_mask", torch.ones_like(ids)), "max_new_tokens": 12}
        return model.generate(ids, **options, do_sample=False, pad_token_id=0).tolist()

    assert write(ids) == expected.tolist()
    assert write(ids, cache_implementation="static") == expected.tolist()
    assert write(ids, prefill_chunk_size=4) == expected.tolist()
    assert write(ids[:1], prompt_lookup_num_tokens=3) == expected[:1].tolist(), "some guesses are taken back"
    assert write(ids, num_beams=3) == write(ids, num_beams=3, use_cache=False), "beams change places"
    left = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.ones_like(left)
    mask[:, :3] = 0
    assert [row[3:] for row in write(left, attention_mask=mask)] == expected.tolist()


@pytest.mark.parametrize("base", MIXING)
def test_a_cache_or_mask_that_a_filter_over_time_cannot_use_is_refused(base):
    model, ids = make(base), some_ids(1, 6)
    with pytest.raises(ValueError, match=r"no place for what the filters .* read: make it with DynamicCache.config=model.conf"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions, .* pass one of 2 for padding, and position_ids"):
        model(ids, attention_mask=torch.zeros(1, 1, 6, 6))


# ---- folders and processes


@pytest.mark.parametrize("base", BASES)
def test_a_saved_model_is_loaded_bit_for_bit(base, tmp_path):
    name = "psann-tiny" if base == "respsann" else f"psann-tiny-{base}"
    torch.manual_seed(0)
    model, ids = build_model(name, V, 16).eval(), some_ids(1, 80)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        torch.manual_seed(1)
        loaded = load_model(tmp_path).eval()
        assert type(loaded) is PsannForCausalLM
        assert architecture(loaded) == architecture(model)
        assert torch.equal(loaded(ids).logits, expected)
        state = loaded.state_dict()
        assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])] == []
        fresh = build_model(name, V, 16).eval()
        load_weights(tmp_path, fresh)
        assert torch.equal(fresh(ids).logits, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "psann.py",
    ]
    assert (tmp_path / "psann.py").read_bytes() == Path(psann.__file__).read_bytes()


def test_a_tied_head_stays_tied(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(some_ids(1, 5)).logits, model(some_ids(1, 5)).logits)


ELSEWHERE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:]:
    options = {"trust_remote_code": True, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert "lm" not in sys.modules
    assert sys.modules[type(model).__module__].FOLDER == folder, "each has its own code"
    ids = torch.arange(80)[None] % 50
    with torch.no_grad():
        assert torch.equal(model(ids).logits, torch.load(folder + "/expected.pt")), folder
        model.generate(ids, max_new_tokens=3, do_sample=False)
        model.save_pretrained(folder + "/again")
        again = AutoModelForCausalLM.from_pretrained(folder + "/again", **options).eval()
        assert torch.equal(model(ids).logits, again(ids).logits), folder
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        assert all(bool(p.isfinite().all()) for p in fresh.parameters())
"""


def test_a_saved_folder_is_loaded_elsewhere_with_its_own_code(tmp_path):
    folders = []
    for base in BASES:
        folders.append(tmp_path / f"model-{base}")
        model = make(base).eval()
        model.save_pretrained(folders[-1])
        with (folders[-1] / "psann.py").open("a") as code:
            code.write(f'FOLDER = "{folders[-1]}"')
        with torch.no_grad():
            torch.save(model(torch.arange(80)[None] % V).logits, folders[-1] / "expected.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-c", ELSEWHERE, *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("base", BASES)
def test_sharded_by_blocks_it_gives_the_same_gradients_and_saves_its_own_code(base, tmp_path, one_process):
    ids, model, sharded = some_ids(2, 70), make(base), make(base)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in sharded.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for run in (model, sharded):
        run(ids, labels=ids, use_cache=False).loss.backward()
    for plain, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(shard.grad.full_tensor(), plain.grad)
    full = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}
    sharded.save_pretrained(tmp_path / "saved", state_dict=full)
    assert "psann.py" in os.listdir(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert config["architectures"] == ["PsannForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "psann.PsannConfig",
        "AutoModel": "psann.PsannModel",
        "AutoModelForCausalLM": "psann.PsannForCausalLM",
    }
    assert torch.equal(load_model(tmp_path / "saved").eval()(ids).logits, model.eval()(ids).logits)
