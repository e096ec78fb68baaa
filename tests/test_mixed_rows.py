"""lm/mixed_rows.py and its loss: what every sample of a run is, and what it counts."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packs import SEQ_LEN, write_pack
from text import byte_level_bpe

from lm.loss import MEASURED, means, mixed_loss, packed_loss
from lm.mixed_rows import CHUNK, WORTH_LOADING, MixedRows, text_rows
from lm.models import build_model
from lm.packing import pack as pack_examples
from lm.shards import Pack

TOKENIZER = byte_level_bpe()
T = SEQ_LEN
EXAMPLES = [{"input_text": f"{'so ' * n}number {n} is", "output_texts": [f"answer{n}", "other"]} for n in range(7)]


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return Pack(write_pack(tmp_path_factory.mktemp("pack") / "pack", TOKENIZER))


@pytest.fixture
def mixed(pack):
    return MixedRows(pack, EXAMPLES, TOKENIZER, seed=0, share=0.25)


def expected_ids(number):
    """Prompt, label and EOS of an example, tokenised here."""
    text = f"{EXAMPLES[number]['input_text']} {EXAMPLES[number]['output_texts'][0]}"
    return [*TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids, TOKENIZER.eos_token_id]


def only(mixed, samples, kind):
    return [source[1] for source in mixed.sources(samples) if source[0] == kind]


def test_what_a_sample_is_depends_on_seed_and_index_and_not_on_what_was_asked_for(pack, mixed):
    whole = mixed.is_synthetic(range(60))
    for start in range(0, 50, 7):
        for length in (0, 1, 2, 5, 7):
            part = mixed.is_synthetic(range(start, start + length))
            assert np.array_equal(part, whole[start : start + length]), (start, length)
    other = MixedRows(pack, EXAMPLES, TOKENIZER, seed=1, share=0.25)
    assert not np.array_equal(other.is_synthetic(range(60)), whole)


def test_samples_are_these_forever(mixed):
    assert np.flatnonzero(mixed.is_synthetic(range(24))).tolist() == [3, 8, 9, 10, 14, 20, 22]
    assert [source[1] for source in mixed.sources(range(24)) if source[0] == "mixin"] == [0, 5, 4, 2, 1, 3, 6]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 1.0])
def test_the_share_of_synthetic_samples_is_the_one_asked_for(pack, share):
    count = 200_000
    _, synthetic = MixedRows(pack, EXAMPLES, TOKENIZER, seed=3, share=share).drawn(count)
    assert abs(synthetic - share * count) <= 5 * np.sqrt(share * (1 - share) * count)


def test_what_was_drawn_before_a_sample_is_counted_alike_by_an_old_and_a_new_object(pack, mixed):
    flags = mixed.is_synthetic(range(3 * CHUNK))
    asked = [2 * CHUNK + 5, 0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK]
    counts = [(n - int(flags[:n].sum()), int(flags[:n].sum())) for n in asked]
    assert [mixed.drawn(n) for n in asked] == counts
    assert [MixedRows(pack, EXAMPLES, TOKENIZER, seed=0, share=0.25).drawn(n) for n in asked] == counts


def test_rows_are_the_same_however_they_are_asked_for(mixed):
    whole = mixed.rows(range(30))
    parts = [mixed.rows(range(start, start + 5)) for start in range(0, 30, 5)]
    assert {len(part) for part in parts} == {3, 6}, "some without a synthetic row"
    text = {"weights": torch.ones(5, T), "answer": torch.zeros(5, T, dtype=torch.bool)}
    assert torch.equal(whole.pop("trained"), whole["weights"].flatten().nonzero().flatten())
    for name, rows in whole.items():
        assert torch.equal(torch.cat([(text | part)[name] for part in parts]), rows), name


def test_every_block_comes_once_and_in_order_with_each_of_its_tokens(pack, mixed):
    samples = range(200)
    blocks = only(mixed, samples, "c4")
    assert blocks == list(range(mixed.drawn(200)[0]))
    batch = mixed.rows(samples)
    text = ~batch["synthetic"]
    assert batch["synthetic"].tolist() == mixed.is_synthetic(samples).tolist()
    assert np.array_equal(batch["input_ids"][text], pack.blocks(blocks)[:, :-1])
    assert np.array_equal(batch["targets"][text], pack.blocks(blocks)[:, 1:])
    assert (batch["weights"][text] == 1).all()
    assert not batch["answer"][text].any()
    assert [source[2] for source in mixed.sources(samples) if source[0] == "c4"] == [pack.where(block) for block in blocks]


def test_synthetic_examples_come_each_once_in_a_pass_and_in_another_order_in_the_next(mixed):
    numbers = only(mixed, range(200), "mixin")
    passes = [numbers[start : start + 7] for start in range(0, len(numbers) - 7, 7)]
    assert len(passes) > 4
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


@pytest.mark.parametrize("loss", ["answer_only", "weighted"])
def test_a_synthetic_row_is_prompt_label_and_end_padded_and_weighs_as_much_as_a_row_of_text(pack, loss):
    mixed = MixedRows(pack, EXAMPLES, TOKENIZER, seed=0, share=1.0, loss=loss)
    batch, numbers = mixed.rows(range(14)), only(mixed, range(14), "mixin")
    assert batch["synthetic"].all()
    assert batch["input_ids"].shape == batch["weights"].shape == (14, T)
    for row, number in enumerate(numbers):
        ids = expected_ids(number)
        count, answer = len(ids) - 1, len(TOKENIZER.tokenize(f" answer{number}")) + 1
        assert batch["input_ids"][row, :count].tolist() == ids[:-1]
        assert batch["targets"][row, :count].tolist() == ids[1:]
        assert batch["answer"][row].nonzero().flatten().tolist() == list(range(count - answer, count))
        weights = torch.zeros(T)
        if loss == "answer_only":
            weights[count - answer : count] = T / answer
        else:
            weights[:count] = T / (2 * count)
            weights[count - answer : count] += T / (2 * answer)
        torch.testing.assert_close(batch["weights"][row], weights)


def test_after_a_pass_blocks_come_in_a_new_order_whatever_the_pack_has_grown_to(mixed):
    blocks = [source[1] for source in mixed.sources(range(300), pass_blocks=30) if source[0] == "c4"]
    passes = [blocks[start : start + 30] for start in range(0, len(blocks) - 30, 30)]
    assert passes[0] == list(range(30))
    assert all(sorted(one) == list(range(30)) for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes) > 5
    rows = mixed.rows(range(250, 300), pass_blocks=30)
    last = [source[1] for source in mixed.sources(range(250, 300), pass_blocks=30) if source[0] == "c4"]
    assert np.array_equal(rows["targets"][~rows["synthetic"]], mixed.pack.blocks(last)[:, 1:])


@pytest.mark.parametrize("loss", ["answer_only", "weighted"])
def test_the_loss_of_mixed_rows_is_that_of_each_row_alone_and_unpadded(pack, loss):
    """The gradient too: so padding has no effect."""
    mixed = MixedRows(pack, EXAMPLES, TOKENIZER, seed=0, share=0.5, loss=loss)
    samples = range(8)
    torch.manual_seed(0)
    model = build_model("neox-64x2", 300, T)
    expected, nats, tokens = 0.0, {"c4": 0.0, "mixin": 0.0}, {"c4": 0, "mixin": 0}
    for source in mixed.sources(samples):
        ids = torch.tensor(expected_ids(source[1]) if source[0] == "mixin" else pack.blocks([source[1]])[0].tolist())
        losses = F.cross_entropy(model(ids[None, :-1], use_cache=False).logits[0], ids[1:], reduction="none")
        answer = losses[-len(TOKENIZER.tokenize(f" answer{source[1]}")) - 1 :]
        trained = answer if (source[0], loss) == ("mixin", "answer_only") else losses
        mean = (losses.mean() + answer.mean()) / 2 if (source[0], loss) == ("mixin", "weighted") else trained.mean()
        expected = expected + mean / len(samples)
        nats[source[0]] += trained.sum().item()
        tokens[source[0]] += len(trained)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    total, finite, measured = mixed_loss(model, mixed.rows(samples))
    (total / (len(samples) * T)).backward()
    assert finite
    assert (total / (len(samples) * T)).item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-6, rtol=1e-4)
    found = dict(zip(MEASURED, measured.tolist(), strict=True))
    counts = {
        "c4_targets": tokens["c4"],
        "synthetic_targets": tokens["mixin"],
        "synthetic_rows": len(only(mixed, samples, "mixin")),
    }
    assert {name: found[name] for name in counts} == counts
    assert (found["c4_nats"], found["synthetic_nats"]) == pytest.approx((nats["c4"], nats["mixin"]), rel=1e-5)
    assert found["synthetic_right"] == 0, "an untrained model"


def test_an_answer_is_right_only_if_all_its_tokens_and_the_end_are(pack):
    """Rows whose targets the model itself chose are right; with any one token of an answer changed, that row is not."""
    mixed = MixedRows(pack, EXAMPLES, TOKENIZER, seed=0, share=0.5)
    model, batch = build_model("neox-64x2", 300, T), mixed.rows(range(16))
    with torch.no_grad():
        chosen = model(batch["input_ids"], use_cache=False).logits.argmax(dim=-1)
        batch["targets"] = torch.where(batch["answer"], chosen, (chosen + 1) % 300)  # what is not the answer does not count

        def right():
            return mixed_loss(model, batch)[2][MEASURED.index("synthetic_right")].item()

        rows = int(batch["synthetic"].sum())
        assert right() == rows > 2
        row = int(batch["synthetic"].nonzero()[0])
        for position in batch["answer"][row].nonzero().flatten().tolist():
            kept = batch["targets"][row, position].item()
            batch["targets"][row, position] = (kept + 1) % 300
            assert right() == rows - 1
            batch["targets"][row, position] = kept


def test_means_are_of_what_there_was():
    sums = dict(zip(MEASURED, (12.0, 4.0, 9.0, 3.0, 1.0, 2.0), strict=True))
    assert means(sums) == {"loss_c4": 3.0, "loss_synthetic": 3.0, "synthetic_acc": 0.5}
    assert means(dict.fromkeys(MEASURED, 0.0)) == {"loss_c4": None, "loss_synthetic": None, "synthetic_acc": None}


@pytest.mark.parametrize("name", ["mixed_loss", "packed_loss"])
def test_losses_are_summed_in_float32_under_autocast(pack, name):
    """A matrix product would give the sum as bfloat16, which has three digits."""
    model = build_model("neox-64x2", 300, T)
    blocks = pack.blocks([0, 1]).astype(np.int64)
    packed = pack_examples(list(blocks), [5, 5], "weighted", None)
    batch, loss = (text_rows(blocks), mixed_loss) if name == "mixed_loss" else (packed, packed_loss)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        total = loss(model, batch)[0]
        logits = model(batch["input_ids"], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none")
    weights = batch.get("weights", torch.ones(batch["targets"].shape))
    assert total.item() == pytest.approx((losses * weights.flatten()).sum().item(), rel=1e-5)


@pytest.mark.parametrize("worth_loading", [0, WORTH_LOADING])  # by the faster encoder, and by Hugging Face's
def test_examples_that_do_not_fit_into_a_row_are_refused_naming_the_longest(worth_loading, pack, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.mixed_rows.WORTH_LOADING", worth_loading)
    alone, file = SimpleNamespace(process_index=0, num_processes=1), tmp_path / "mixin.jsonl"
    words = TOKENIZER.tokenize(" so" * 50)
    exactly = {
        "input_text": " so" * 50 + " number" * ((T - len(words)) // len(TOKENIZER.tokenize(" number"))),
        "output_texts": [],
    }
    room = T + 1 - len(TOKENIZER.tokenize(exactly["input_text"])) - 1  # for the answer, before its EOS

    def check(examples):
        MixedRows(pack, examples, TOKENIZER, seed=0, share=0.5).check_synthetic(file, alone)

    def example(answer_tokens):
        answer = "q" * (answer_tokens - 1)  # no merges of q in this tokenizer, and the space is a token of its own
        assert len(TOKENIZER.tokenize(f" {answer}")) == answer_tokens
        return exactly | {"output_texts": [answer, "q" * 500]}

    check([*EXAMPLES, example(room)])
    message = (
        f"2 of the 9 rows of {file} do not fit into --seq_len {T} (line 8 has {T + 3} tokens): pack longer blocks, or build"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)} smaller examples$"):
        check([*EXAMPLES, example(room + 2), example(room + 1)])
    with pytest.raises(ValueError, match=r"mixin.jsonl is empty, examples are needed: .* or pass --mixin_percent 0"):
        check([])
