"""The loss on files of text equals a slow computation from the documents, and what cannot be read is named."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from text import byte_level_bpe, documents

from evaluate_model import main
from lm.characters import character_tokenizer, simplify
from lm.corpus import find_files
from lm.models import build_model
from lm.text_evaluation import read_text, text_loss
from lm.tokenizer import encode_documents

TOKENIZER = byte_level_bpe()
SEQ_LEN = 24
TEXTS = [text[:150] for text in documents()[:9]]


def build(vocab_size: int):
    torch.manual_seed(0)
    model = build_model("neox-64x2", vocab_size, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 10
    return model.eval()


def slow_losses(model, ids: list[int]) -> list[float]:
    """Of every token but the first, one forward pass each; the context starts anew every SEQ_LEN tokens."""
    losses = []
    for t in range(1, len(ids)):
        start = (t - 1) // SEQ_LEN * SEQ_LEN
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:t]])).logits[0, -1].double()
        losses.append(-torch.log_softmax(logits, dim=0)[ids[t]].item())
    return losses


def write_dolma(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def stream(tokenizer, texts: list[str]) -> list[int]:
    return [token for ids in encode_documents(tokenizer, texts) for token in [*ids.tolist(), tokenizer.eos_token_id]]


def test_the_loss_equals_one_forward_pass_per_token(tmp_path):
    """Over two files, an empty document among them; in stretches of 16 windows, so that some meet within a document."""
    files = find_files([str(write_dolma(tmp_path / "a.json.gz", [*TEXTS[:5], " "]))])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[5:]))
    files += find_files([str(tmp_path / "b.jsonl")])
    model, told = build(300), []
    found = text_loss(model, TOKENIZER, files, SEQ_LEN, 2, done=told.append)
    losses = slow_losses(model, stream(TOKENIZER, TEXTS))
    assert len(losses) > 2 * 16 * SEQ_LEN
    assert len(losses) % SEQ_LEN
    loss, text = sum(losses) / len(losses), "".join(TEXTS)
    windows = [sum(losses[start : start + SEQ_LEN]) for start in range(0, len(losses), SEQ_LEN)]
    sizes = [min(SEQ_LEN, len(losses) - start) for start in range(0, len(losses), SEQ_LEN)]
    squares = sum((total - loss * size) ** 2 for total, size in zip(windows, sizes, strict=True))
    assert found == {
        "loss": pytest.approx(loss, rel=1e-5),
        "loss_se": pytest.approx(math.sqrt(len(windows) / (len(windows) - 1) * squares) / len(losses), rel=1e-4),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-4),
        "bits_per_byte": pytest.approx(sum(losses) / math.log(2) / len(text.encode()), rel=1e-5),
        "bits_per_char": pytest.approx(sum(losses) / math.log(2) / len(text), rel=1e-5),
        "num_tokens": len(losses),
        "num_documents": len(TEXTS),
        "num_bytes": len(text.encode()),
        "num_chars": len(text),
    }
    assert sum(told) == len(losses)


def test_text_is_prepared_as_a_character_tokenizer_asks(tmp_path):
    tokenizer, texts = character_tokenizer(), ["Où EST la gare? — Là-bas!", "Ça va.", "\N{GRINNING FACE}"]
    model = build(len(tokenizer))
    found = text_loss(model, tokenizer, find_files([str(write_dolma(tmp_path / "x.json.gz", texts))]), SEQ_LEN, 4)
    prepared = [simplify(text) for text in texts[:2]]  # nothing is left of the third
    losses = slow_losses(model, stream(tokenizer, prepared))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (found["num_documents"], found["num_chars"]) == (2, sum(map(len, prepared)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine"}\n{"txt": 1}\n', r"x\.jsonl line 2: without text, a document is needed"),
        ("\n", r"x\.jsonl: fewer than two tokens"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        text_loss(build(300), TOKENIZER, find_files([str(tmp_path / "x.jsonl")]), SEQ_LEN, 2)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model = build(300)
    model.gpt_neox.final_layer_norm.weight.data[3] = float("nan")
    with pytest.raises(RuntimeError, match="the loss is nan, a finite one is needed"):
        text_loss(model, TOKENIZER, find_files([str(write_dolma(tmp_path / "x.json.gz", TEXTS))]), SEQ_LEN, 2)


def test_the_command_writes_what_it_measures_once(tmp_path, capsys):
    build(300).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    documents = write_dolma(tmp_path / "validation.json.gz", TEXTS)
    command = ["text", tmp_path / "model", "--documents", documents, "--output_dir", tmp_path, "--seq_len", SEQ_LEN]
    main([str(word) for word in (*command, "--force_cpu")])
    record = read_text(tmp_path / "model_text_validation.json")
    expected = text_loss(build(300), TOKENIZER, find_files([str(documents)]), SEQ_LEN, 64)
    assert {name: record[name] for name in expected} == expected
    assert f"{expected['perplexity']:.2f}" in capsys.readouterr().out
    main([str(word) for word in (*command, "--force_cpu")])
    assert "has just this already" in capsys.readouterr().out
    write_dolma(documents, TEXTS[:-1])
    main([str(word) for word in (*command, "--force_cpu")])
    assert "is of other documents: replacing it" in capsys.readouterr().out


def test_a_context_longer_than_the_model_and_another_tokenizer_are_refused(tmp_path):
    build(300).save_pretrained(tmp_path / "model")
    documents = str(write_dolma(tmp_path / "x.json.gz", TEXTS))
    command = ["text", str(tmp_path / "model"), "--documents", documents]
    with pytest.raises(
        ValueError, match=r"no --tokenizer, and .*\n.*no --output_dir(.|\n)*has 2048 positions, --seq_len is 2049"
    ):
        main([*command, "--seq_len", "2049"])
    byte_level_bpe(330).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other has 330 ids, .*model a vocabulary of 320"):
        main([*command, "--tokenizer", str(tmp_path / "other"), "--output_dir", str(tmp_path)])
