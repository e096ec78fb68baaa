import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

from lm.models import PRESETS, build_model, load_model, num_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # EleutherAI's own counts, with the vocabulary padded to 50,304 (50,688 for none of these)
        ("pythia-14m", 14_067_712),
        ("pythia-31m", 30_494_720),
        ("pythia-70m", 70_426_624),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1b", 1_011_781_632),
        ("pythia-1.4b", 1_414_647_808),
    ],
)
def test_pythia_presets_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        assert num_parameters(build_model(name, 50_304, 2048)) == parameters


@pytest.mark.parametrize(
    ("name", "shape"), [("pythia-1b", (2048, 16, 8)), ("pythia-70m", (512, 6, 8)), ("pythia-410m", (1024, 24, 16))]
)
def test_presets_have_the_published_number_of_heads(name, shape):
    with torch.device("meta"):
        config = build_model(name, 50_304, 2048).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == shape


def test_parameters_are_float32_whatever_the_config_says(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    GPTNeoXConfig(**shape, vocab_size=50_304, dtype="float16").save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_config(GPTNeoXConfig.from_pretrained(tmp_path)).dtype == torch.float16, "the trap"
    model = build_model(str(tmp_path), 300, 100)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 300


def test_initial_weights_are_a_function_of_the_seed():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(build_model("neox-64x2", 300, 100).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", [name for name, shape in PRESETS.items() if shape.hidden <= 256])
def test_no_logit_depends_on_a_later_token(name):
    torch.manual_seed(0)
    model = build_model(name, 300, 32).eval()
    ids = torch.randint(300, (2, 32))
    other = ids.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 300
    with torch.no_grad():
        before, after = model(ids).logits, model(other).logits
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20], after[:, 20])


def test_rotary_positions_reach_as_far_as_they_must():
    short, long = (build_model("neox-64x2", 300, positions) for positions in (2048, 4096))
    assert (short.config.max_position_embeddings, long.config.max_position_embeddings) == (2048, 4096)
    long.load_state_dict(short.state_dict())
    ids = torch.randint(300, (1, 3000))
    with torch.no_grad():
        logits = long.eval()(ids).logits
        # position 2,999 is a position like any other: the same tokens, shifted by 1,000, look the same to each other
        shifted = long(ids[:, 1000:], position_ids=torch.arange(1000, 3000)[None]).logits
        plain = long(ids[:, 1000:]).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(shifted, plain, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_built_or_loaded_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--model nobody/nothing is no preset .neox-64x2, .*and not on the hub"):
        build_model("nobody/nothing", 300, 100)
    GPT2Config(n_positions=64, n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="--model .*gpt2 has 64 positions, 4096 are needed"):
        build_model(str(tmp_path / "gpt2"), 300, 4096)
    with pytest.raises(FileNotFoundError, match="no model at nobody/nothing"):
        load_model("nobody/nothing")
    model = build_model("neox-64x2", 300, 100)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks the weights gpt_neox.layers.1"):
        load_model(tmp_path)
