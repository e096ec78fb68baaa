"""What evaluate_model.py writes of papers equals a slow computation from the files, and what does not fit is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from evaluate_model import main
from lm.checkpoint import Checkpoints
from lm.evaluation import read_evaluation
from lm.files import write_sealed
from lm.measure import mean_and_se
from lm.papers import read_papers
from lm.tokenizer import fingerprint
from random_window_dataset import RandomWindowDataset

T, V = 10, 40
LENGTHS = {"cs.A": [30, 11, 7, 1, 25], "cs.B": [40, 12, 21, 11], "cs.C": [5, 4]}  # test papers; those of cs.C are short


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write_store(folder: Path) -> Path:
    """A paper store as lm/papers.py describes it."""
    generator = np.random.default_rng(0)
    tokenizer = tokenizer_of(V)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows, offset = [], 0
    for category, lengths in LENGTHS.items():
        for length in lengths:
            paper_id = f"test_{len(rows)}"
            rows.append({"paper_id": paper_id, "category": category, "offset": offset, "length": length})
            offset += length
    generator.integers(0, V, offset).astype("<u2").tofile(folder / "tokens.bin")
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {"train": [], "validation": [], "test": [row["paper_id"] for row in rows]}
    (folder / "splits.json").write_text(json.dumps(splits))
    names = ["tokens.bin", "index.jsonl", "splits.json"]
    files = {
        name: {"size": len(data := (folder / name).read_bytes()), "sha256": hashlib.sha256(data).hexdigest()} for name in names
    }
    meta = {
        "format": "papers-2",
        "dtype": "uint16",
        "vocab_size": V,
        "tokenizer": {"name": "words", "fingerprint": fingerprint(tokenizer)},
        "source": {"dataset": "random"},
        "num_tokens": offset,
        "num_papers": len(rows),
        "categories": {name: {"papers": len(of), "tokens": sum(of)} for name, of in LENGTHS.items()},
        "left_out": {},
        "files": files,
    }
    write_sealed(folder / "meta.json", meta)
    return folder


def build(vocab_size: int = V, positions: int = 16, seed: int = 0) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return GPTNeoXForCausalLM(config)


def write_run(folder: Path, data: Path, model: GPTNeoXForCausalLM, tokenizer_size: int = V) -> Path:
    """A run folder as train.py leaves it: a checkpoint of step 40, and the model of step 50 as final."""
    args = {"data_dir": str(data), "sequence_length": T, "K": 2, "seed": 0}
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    checkpoints.save(40, build(seed=1), torch.optim.AdamW(model.parameters()), {})
    checkpoints.save_model(folder / "final", model, tokenizer_of(tokenizer_size), {"step": 50})
    checkpoints.wait()
    (folder / "run.json").write_text(json.dumps({"args": args, "derived": {"categories": ["cs.A", "cs.B"]}}))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return write_store(tmp_path / "data")


@pytest.fixture
def run(tmp_path, data) -> Path:
    return write_run(tmp_path / "run", data, build())


def evaluate(*command: object) -> None:
    main([str(word) for word in ("context", *command, "--num_windows", 20, "--micro_batch", 3, "--force_cpu")])


def slow_losses(model: torch.nn.Module, tokens: np.ndarray) -> list[float]:
    """-ln p of each token but the first given those before it, one forward pass each."""
    losses = []
    with torch.no_grad():
        for t in range(1, len(tokens)):
            logits = model(torch.tensor(tokens[None, :t].astype(np.int64))).logits[0, -1].double()
            losses.append(-torch.log_softmax(logits, dim=0)[int(tokens[t])].item())
    return losses


def slow_score(model: torch.nn.Module, data: Path, category: str) -> tuple[float, int]:
    """Summed loss and number of tokens over all test papers of a category, whose context starts anew every T tokens."""
    tokens, rows = np.fromfile(data / "tokens.bin", "<u2"), (data / "index.jsonl").read_text().splitlines()
    losses = []
    for row in map(json.loads, rows):
        paper = tokens[row["offset"] : row["offset"] + row["length"]]
        if row["category"] == category:
            for start in range(0, len(paper), T):
                losses += slow_losses(model, paper[start : start + T + 1])
    return sum(losses), len(losses)


def test_results_equal_a_slow_computation_from_the_files(run, data):
    evaluate(run)
    record = json.loads((run / "evaluation" / "final_test.json").read_text())
    model = build().eval()
    totals = {name: slow_score(model, data, name) for name in ("cs.A", "cs.B")}
    assert list(record["categories"]) == ["cs.A", "cs.B"]
    for name, (loss, num_tokens) in totals.items():
        row = record["categories"][name]
        assert row["num_tokens"] == num_tokens == sum(length - 1 for length in LENGTHS[name])
        assert row["num_papers"] == sum(length > 1 for length in LENGTHS[name])
        assert row["loss"] == pytest.approx(loss / num_tokens, abs=1e-5)
        assert row["perplexity"] == pytest.approx(np.exp(loss / num_tokens), rel=1e-5)
        sampler = RandomWindowDataset(read_papers(data), "test", T, [name], seed=0)
        expected = np.array([slow_losses(model, window) for window in sampler.windows(0, 20)])
        mean, se = mean_and_se(expected, sampler.locate(0, 20)[0])
        np.testing.assert_allclose(row["position_loss"], mean, atol=1e-5)
        np.testing.assert_allclose(row["position_se"], se, atol=1e-5)
        assert row["num_windows"] == 20
    loss, num_tokens = np.sum(list(totals.values()), axis=0)
    assert record["overall"]["perplexity"] == pytest.approx(np.exp(loss / num_tokens), rel=1e-5)
    assert record["overall"]["num_tokens"] == num_tokens
    assert (record["model"], record["checkpoint"], record["step"]) == (str(run), "final", 50)
    assert (run / "evaluation" / "final_test.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_checkpoint_is_evaluated_by_name_and_as_latest(run):
    for name in ("step_00000040", "latest"):
        evaluate(run, "--checkpoint", name, "--overwrite")
        assert read_evaluation(run / "evaluation" / "step_00000040_test.json").record["step"] == 40


def test_two_models_are_measured_on_the_same_windows(run, data, tmp_path):
    build(seed=5).save_pretrained(tmp_path / "other")
    tokenizer_of(V).save_pretrained(tmp_path / "other")
    arguments = ("--data_dir", data, "--sequence_length", T, "--output_dir", tmp_path / "out")
    evaluate(tmp_path / "other", *arguments, "--categories", "cs.B")
    evaluate(run)
    one, two = (read_evaluation(path) for path in (tmp_path / "out/model_test.json", run / "evaluation/final_test.json"))
    np.testing.assert_array_equal(one.papers["cs.B"], two.papers["cs.B"])
    sampler = RandomWindowDataset(read_papers(data), "test", T, ["cs.B"], seed=0)
    expected = [slow_losses(build(seed=5).eval(), window) for window in sampler.windows(0, 20)]
    np.testing.assert_allclose(one.losses["cs.B"], expected, atol=1e-5)
    assert np.abs(one.losses["cs.B"] - two.losses["cs.B"]).max() > 0.1
    assert one.record["step"] is None


def test_a_limit_on_papers_is_kept_and_said(run, capsys):
    evaluate(run, "--max_test_papers", 2)
    record = read_evaluation(run / "evaluation" / "final_test.json").record
    assert [row["num_papers"] for row in record["categories"].values()] == [2, 2]
    assert "at most 2 papers per category" in capsys.readouterr().out


def test_the_same_evaluation_is_not_repeated_unless_asked(run, capsys):
    results = run / "evaluation" / "final_test.json"
    evaluate(run)
    before = results.stat().st_mtime_ns
    evaluate(run)
    assert "has just this already" in capsys.readouterr().out
    assert results.stat().st_mtime_ns == before
    evaluate(run, "--overwrite")
    assert results.stat().st_mtime_ns > before


@pytest.mark.parametrize("change", ["seed", "weights"])
def test_an_evaluation_of_something_else_is_replaced(run, data, capsys, change):
    evaluate(run)
    if change == "weights":
        write_run(run, data, build(seed=3))
    evaluate(run, *(("--seed", 1) if change == "seed" else ()))
    assert f"is of other {change}: replacing it" in capsys.readouterr().out
    assert read_evaluation(run / "evaluation" / "final_test.json").record["measured"]["seed"] == (change == "seed")


def test_changed_windows_are_not_taken_for_those_measured(run):
    evaluate(run)
    windows = run / "evaluation" / "final_test.npz"
    windows.write_bytes(windows.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"final_test\.npz is not the file final_test\.json was written with"):
        read_evaluation(run / "evaluation" / "final_test.json")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("--checkpoint", "best"), r"no checkpoint best in .*run, it has final, step_00000040"),
        (("--categories", "cs.Z"), r"category 'cs.Z' is not in .*choose from cs.A, cs.B, cs.C"),
        (("--categories", "all"), r"no paper of cs.C in split 'test' has 11 tokens \(2 papers are shorter\)"),
        (("--split", "train"), r"no paper of cs.A in split 'train' has 11 tokens"),
        (("--split", "dev"), r"split 'dev' is not in .*choose from train, validation, test"),
        (("--sequence_length", 17), r"final has 16 positions, --sequence_length is 17"),
        (
            ("--sequence_length", 0, "--max_test_papers", -1),
            r"sequence_length 0: at least 1(.|\n)*max_test_papers -1: at least 1",
        ),
        (("--categories", "all", "cs.A"), r"--categories all cs.A mixes names with all or trained"),
    ],
)
def test_what_does_not_fit_is_refused(run, command, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(run, *command)
    assert not (run / "evaluation").exists()


def test_a_model_that_is_no_run_needs_its_settings(tmp_path):
    lines = [rf"no --{name}, and {tmp_path} is no run .*" for name in ("data_dir", "sequence_length", "output_dir")]
    lines.append(rf"--categories trained, but {tmp_path} is no run")
    with pytest.raises(ValueError, match="\n".join(lines)):
        evaluate(tmp_path, "--categories", "trained")


def test_a_run_of_another_trainer_needs_settings_too(tmp_path, run):
    (run / "run.json").write_text(json.dumps({"args": {"data_dir": "graphs", "curr_threshold": 0.98}}))
    lines = [
        rf"no --{name}, and {run} is no run of train.py to take it from: pass it" for name in ("data_dir", "sequence_length")
    ]
    with pytest.raises(ValueError, match="\n".join(lines)):
        evaluate(run)


def test_an_id_outside_the_vocabulary_is_named(run, data):
    """In a paper too short for a window, so that only the perplexity meets it."""
    tokens = np.fromfile(data / "tokens.bin", "<u2")
    tokens[30 + 11 + 3] = V
    tokens.tofile(data / "tokens.bin")
    with pytest.raises(ValueError, match=r"paper test_2 has id 40, outside the vocabulary of 40"):
        evaluate(run)


def test_a_small_vocabulary_and_another_tokenizer_are_both_named(tmp_path, data):
    run = write_run(tmp_path / "run", data, build(vocab_size=V - 1), tokenizer_size=V - 1)
    with pytest.raises(ValueError, match=r"vocabulary of 39, .*data needs 40(.|\n)*tokenizer of .* is not the one of"):
        evaluate(run)


def test_another_tokenizer_can_be_allowed(tmp_path, data, capsys):
    run = write_run(tmp_path / "run", data, build(), tokenizer_size=V - 1)
    with pytest.raises(ValueError, match="is not the one of"):
        evaluate(run)
    evaluate(run, "--allow_other_tokenizer")
    assert "warning: the tokenizer of" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_refused(run):
    with open(run / "final" / "model.safetensors", "r+b") as file:
        file.seek(500)
        file.write(b"\xff\xff")
    with pytest.raises(ValueError, match=r"final is damaged \(.*model.safetensors has SHA-256"):
        evaluate(run)


def test_losses_that_are_not_finite_are_refused(tmp_path, data):
    model = build()
    model.gpt_neox.final_layer_norm.weight.data[3] = float("nan")
    run = write_run(tmp_path / "run", data, model)
    with pytest.raises(RuntimeError, match=r"cs\.A: the loss of window 0 at position 0 is nan"):
        evaluate(run)
    assert not (run / "evaluation").exists()


def test_no_model_is_said(tmp_path, data):
    arguments = ("--data_dir", data, "--sequence_length", T, "--output_dir", tmp_path / "out", "--categories", "cs.A")
    with pytest.raises(FileNotFoundError, match="no model no/such, here or on the hub"):
        evaluate("no/such", *arguments)
