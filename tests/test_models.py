"""Building and loading causal language models by name."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, Gemma3Config, GPT2Config, GPTNeoXConfig, MambaConfig

from lm.models import build_model, load_model


def test_parameters_are_float32_whatever_the_config_says(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    GPTNeoXConfig(**shape, vocab_size=50_304, dtype="float16").save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_config(GPTNeoXConfig.from_pretrained(tmp_path)).dtype == torch.float16, "the trap"
    model = build_model(str(tmp_path), 300, 100)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 320


def test_initial_weights_are_a_function_of_the_seed():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(build_model("neox-64x2", 300, 100).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(**shape).save_pretrained(tmp_path / "encoder")  # which AutoModelForCausalLM builds, with a warning
    with pytest.raises(ValueError, match=r"encoder .BertLMHeadModel. predicts tokens that it has seen"):
        build_model(str(tmp_path / "encoder"), 300, 100)
    BertConfig(**shape, is_decoder=True).save_pretrained(tmp_path / "decoder")
    assert build_model(str(tmp_path / "decoder"), 300, 100).training


def test_a_vocabulary_that_does_not_reach_embedding_and_head_is_refused(tmp_path):
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 70}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    Gemma3Config(text_config=text, vision_config=vision).save_pretrained(tmp_path)  # which has it one level deeper
    with torch.device("meta"), pytest.raises(ValueError, match="embedding of 70 rows and a head of 70, 300 or more of both"):
        build_model(str(tmp_path), 300, 64)


def test_dropout_replaces_that_of_the_config_everywhere(tmp_path):
    model = build_model("gpt-baby", 75, 16, dropout=0.5)
    assert (model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop) == (0.5, 0.5, 0.5)
    assert model.config.summary_first_dropout == 0.1, "of a class that is not built"
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    neox = build_model("neox-64x2", 300, 16, dropout=0.25).config
    assert (neox.attention_dropout, neox.hidden_dropout, neox.classifier_dropout) == (0.25, 0.25, 0.1)
    assert build_model("gpt-baby", 75, 16).config.attn_pdrop == 0.2
    assert build_model("gpt-baby", 75, 16, dropout=0.0).config.attn_pdrop == 0


@pytest.mark.parametrize("name", ["neox-64x2", "olmo-4m", "gpt-baby"])
def test_dropout_drops_in_training_and_not_in_evaluation(name):
    model, ids = build_model(name, 300, 16, dropout=0.2), torch.arange(16)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        model.eval()
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_loaded_model_trains_on_with_the_dropout_asked_for(tmp_path):
    trained = build_model("gpt-baby", 75, 16, dropout=0.0)
    trained.save_pretrained(tmp_path)
    model = load_model(tmp_path, dropout=0.5)
    assert (model.config.embd_pdrop, model.config.attn_pdrop, model.config.resid_pdrop) == (0.5, 0.5, 0.5)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.5}
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in trained.state_dict().items())
    assert load_model(tmp_path).config.resid_pdrop == 0


def test_dropout_that_cannot_be_is_refused(tmp_path):
    MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"--model .* .MambaConfig. has no dropout, 0.1 is asked: pass 0, or another model"):
        build_model(str(tmp_path), 300, 16, dropout=0.1)
    build_model(str(tmp_path), 300, 16, dropout=0.0)
    for dropout in (-0.1, 1.0, 20.0, float("nan")):
        with pytest.raises(ValueError, match=f"dropout {dropout} is a probability in .0, 1.: for a fifth pass 0.2"):
            build_model("gpt-baby", 75, 16, dropout=dropout)


def test_the_row_of_the_padding_token_learns_like_any_other(tmp_path):
    built = build_model("olmo-4m", 300, 16, {"eos_token_id": 7, "pad_token_id": 7})
    built.save_pretrained(tmp_path)
    for model in (built, load_model(tmp_path)):
        assert model.config.pad_token_id == 7
        ids = torch.tensor([[5, 7, 9, 7, 11]])
        model(ids, labels=ids).loss.backward()
        rows = model.get_input_embeddings().weight.grad.abs().sum(1)
        assert rows[[5, 7, 9]].gt(0).all(), "the end of a document is a token to learn from"


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
    with pytest.raises(
        FileNotFoundError, match=r"--model nobody/nothing is no preset .presets: neox-64x2, .*and not on the hub"
    ):
        build_model("nobody/nothing", 300, 100)
    with pytest.raises(FileNotFoundError, match=r"--model GPT_Mini_v0 is no preset .did you mean gpt-mini-v0 or gpt-mini-v1"):
        build_model("GPT_Mini_v0", 300, 100)
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
