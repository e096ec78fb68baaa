"""The table of architectures: what was published of them, exactly, and what must hold for each."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    BloomConfig,
    GPTJConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    Qwen3Config,
)

from lm.models import build_model, non_embedding_parameters, num_parameters, on_paper
from lm.presets import GPT, PRESETS, NeoX, Olmo, Psann, datadecide_settings

OLMO = {name: preset for name, preset in PRESETS.items() if isinstance(preset, Olmo)}


def cut(name: str, monkeypatch) -> str:
    """The name of a preset of the same class and options as `name`, small enough to run in milliseconds."""
    preset = PRESETS[name]
    heads = min(preset.heads, 4)
    width = 32 if preset.hidden % 32 == 0 else preset.hidden // preset.heads
    monkeypatch.setitem(PRESETS, "cut", replace(preset, hidden=heads * width, heads=heads, layers=2))
    return "cut"


@pytest.mark.parametrize(
    ("name", "rows", "parameters"),
    [  # EleutherAI's own counts; the vocabulary is padded for 1, 2 and 4 GPUs that share a layer
        ("pythia-14m", 50_304, 14_067_712),
        ("pythia-31m", 50_304, 30_494_720),
        ("pythia-70m", 50_304, 70_426_624),
        ("pythia-160m", 50_304, 162_322_944),
        ("pythia-410m", 50_304, 405_334_016),
        ("pythia-1b", 50_304, 1_011_781_632),
        ("pythia-1.4b", 50_304, 1_414_647_808),
        ("pythia-2.8b", 50_304, 2_775_208_960),
        ("pythia-6.9b", 50_432, 6_857_302_016),
        ("pythia-12b", 50_688, 11_846_072_320),
    ],
)
def test_pythia_has_the_published_number_of_parameters(name, rows, parameters):
    assert num_parameters(on_paper(name, rows)) == parameters


@pytest.mark.parametrize(("name", "preset"), OLMO.items())
def test_olmo_has_the_published_number_of_parameters(name, preset):
    for vocab_size in (50_277, 50_280, 50_304):  # of GPT-NeoX's tokenizer, of Dolma's, of the embedding
        assert non_embedding_parameters(on_paper(name, vocab_size)) == preset.parameters
    d, layers = preset.hidden, preset.layers
    assert preset.parameters == 16 * d * d * layers + 50_304 * d + (2 * layers + 1) * d
    model = on_paper(name, 50_280)
    assert num_parameters(model) - preset.parameters == 50_304 * d, "untied"


@pytest.mark.parametrize(
    ("name", "parameters", "published"),
    [  # as many as the formula 12 layers d² + 13 layers d + (50,257 + 2,048) d + 2 d gives; the table has them rounded
        ("gpt3-125m", 125_226_240, 125e6),
        ("gpt3-350m", 355_871_744, 350e6),
        ("gpt3-760m", 760_300_032, 760e6),
        ("gpt3-1.3b", 1_315_723_264, 1.3e9),
        ("gpt3-2.7b", 2_651_553_280, 2.7e9),
        ("gpt3-6.7b", 6_658_404_352, 6.7e9),
        ("gpt3-13b", 12_853_386_240, 13e9),
        ("gpt3-175b", 174_604_259_328, 175e9),
    ],
)
def test_gpt3_has_about_the_published_number_of_parameters(name, parameters, published):
    d, layers = PRESETS[name].hidden, PRESETS[name].layers
    assert 12 * layers * d * d + 13 * layers * d + (50_257 + 2048) * d + 2 * d == parameters
    built = on_paper(name, 50_257)
    assert num_parameters(built) == non_embedding_parameters(built) == parameters + 47 * d, "50,304 rows: a multiple of 64"
    assert parameters == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(
    ("name", "shape"),
    [  # hidden, layers, heads, positions, batch
        ("pythia-1b", (2048, 16, 8, 2048, 1024)),
        ("pythia-70m", (512, 6, 8, 2048, 1024)),
        ("pythia-12b", (5120, 36, 40, 2048, 1024)),
        ("olmo-20m", (192, 16, 8, 2048, 64)),
        ("olmo-150m", (768, 12, 12, 2048, 192)),
        ("gpt-baby", (384, 6, 6, 256, 64)),
        ("gpt-mini-v0", (512, 8, 8, 256, 128)),
        ("gpt-mini-v1", (512, 8, 8, 256, 180)),
        ("gpt3-small", (768, 12, 12, 2048, 4)),
        ("gpt3-175b", (12_288, 96, 96, 2048, None)),
    ],
)
def test_presets_have_the_published_shape_and_batch(name, shape):
    config = on_paper(name, 75).config
    built = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.max_position_embeddings)
    assert (*built, PRESETS[name].batch) == shape


def test_the_classes_are_stock_and_set_as_published():
    olmo = on_paper("olmo-4m", 50_280)
    assert (type(olmo).__name__, olmo.config.intermediate_size, olmo.config.rms_norm_eps) == ("LlamaForCausalLM", 256, 1e-6)
    assert (olmo.config.rope_parameters["rope_theta"], olmo.config.tie_word_embeddings) == (10_000, False)
    assert not [name for name, _ in olmo.named_parameters() if name.endswith("bias") or "q_norm" in name]
    gpt = on_paper("gpt-baby", 75)
    assert type(gpt).__name__ == "GPT2LMHeadModel"
    assert gpt.get_input_embeddings().weight is gpt.get_output_embeddings().weight
    assert (gpt.config.embd_pdrop, gpt.config.attn_pdrop, gpt.config.resid_pdrop) == (0.2, 0.2, 0.2)
    assert (PRESETS["gpt3-125m"].dropout, PRESETS["gpt3-175b"].batch_tokens) == (0, 3_200_000)
    neox = on_paper("pythia-70m", 50_304).config
    assert (neox.rope_parameters["partial_rotary_factor"], neox.use_parallel_residual) == (0.25, True)


def test_olmo_begins_with_matrices_cut_off_at_three_deviations():
    torch.manual_seed(0)
    first = build_model("olmo-4m", 50_280, 16).state_dict()
    torch.manual_seed(0)
    for name, weight in build_model("olmo-4m", 50_280, 16).state_dict().items():
        assert torch.equal(weight, first[name]), "the seed decides"
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:  # the deviation that is left is .9866 of .02; the scatter of 4,096 draws is 1 %
            assert 0.05 < weight.abs().max() <= 0.06, name
            assert weight.std() == pytest.approx(0.01973, rel=0.05), name


@pytest.mark.parametrize(("name", "ids", "rows"), [("pythia-14m", 50_277, 50_304), ("gpt-baby", 64, 64), ("olmo-4m", 65, 128)])
def test_the_vocabulary_is_padded_to_what_gpus_multiply_fast(name, ids, rows):
    """Of GPT-NeoX's 50,277 ids to the 50,304 rows that the published Pythia models have."""
    model = on_paper(name, ids)
    assert (
        model.config.vocab_size == len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == rows
    )


def test_a_preset_has_more_positions_when_they_are_asked_for_and_never_fewer():
    for name, own in (("gpt-baby", 256), ("olmo-4m", 2048), ("neox-64x2", 2048)):
        with torch.device("meta"):
            positions = [build_model(name, 75, asked).config.max_position_embeddings for asked in (1, own, 5000)]
        assert positions == [own, own, 5000], name
    assert build_model("gpt-baby", 75, 300)(torch.arange(300)[None] % 75).logits.shape == (1, 300, 128)


def test_the_size_of_a_model_counts_a_tied_embedding_once_as_head():
    tied, untied = build_model("gpt-baby", 75, 16), build_model("olmo-4m", 75, 16)
    assert non_embedding_parameters(tied) == num_parameters(tied)
    assert non_embedding_parameters(untied) == num_parameters(untied) - 128 * 64


@pytest.mark.parametrize(("name", "preset"), OLMO.items())
def test_datadecide_formulas_give_the_published_settings(name, preset):
    lr, batch, warmup_steps, steps = datadecide_settings(preset.scaled_from)
    assert batch == preset.batch
    assert preset.steps - steps == (21 if name == "olmo-530m" else 11), "what nothing explains"
    assert warmup_steps == round(preset.scaled_from / (batch * 2048))
    if name == "olmo-1b":  # the table has the formula's value at the exact count
        assert (float(f"{lr:.1e}"), float(f"{datadecide_settings(preset.parameters).lr:.1e}")) == (2.2e-3, preset.lr)
    else:
        assert float(f"{lr:.1e}") == preset.lr
    tokens = preset.steps * preset.batch * 2048
    assert round(tokens / 1e9, 1) == preset.tokens / 1e9


def test_datadecide_formulas_at_other_sizes_lengths_and_budgets():
    assert datadecide_settings(108e6) == (0.0047, 160, 330, 32_958)
    assert datadecide_settings(108e6, seq_len=1024) == (0.0047, 320, 330, 32_958), "as many tokens in a step"
    assert datadecide_settings(108e6, tokens_per_parameter=20).steps == 6_591
    assert datadecide_settings(1e5).batch == 32, "never less"
    assert datadecide_settings(13.5e6).lr == pytest.approx(2 * 0.0047)


def assert_causal(model, vocab_size: int, positions: int = 32, tolerance: float = 0.0):
    """No logit may differ before the token that does, and the logit at that token must."""
    torch.manual_seed(1)
    model.eval()
    ids = torch.randint(vocab_size, (2, positions))
    for changed in (1, positions // 2, positions - 1):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % vocab_size
        with torch.no_grad():
            difference = (model(ids).logits - model(other).logits).abs().amax(-1)
        assert difference[:, :changed].max() <= tolerance
        assert difference[:, changed].min() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_no_logit_depends_on_a_later_token(name, monkeypatch):
    torch.manual_seed(0)
    model = build_model(cut(name, monkeypatch), 300, 32)
    kinds = {NeoX: "GPTNeoXForCausalLM", Olmo: "LlamaForCausalLM", GPT: "GPT2LMHeadModel", Psann: "PsannForCausalLM"}
    assert type(model).__name__ == kinds[type(PRESETS[name])]
    assert_causal(model, 300)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "pad_token_id": None}


@pytest.mark.parametrize(
    "config",
    [
        OlmoConfig(**SMALL),
        Olmo2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=8, num_key_value_heads=2),
        MistralConfig(**SMALL, num_key_value_heads=2),
        PhiConfig(**SMALL),
        OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
        BloomConfig(hidden_size=32, n_layer=2, n_head=4),
        GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
        AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_no_logit_of_another_architecture_depends_on_a_later_token(config, tmp_path):
    config.save_pretrained(tmp_path)
    torch.manual_seed(0)
    assert_causal(build_model(str(tmp_path), 300, 32), 300)
