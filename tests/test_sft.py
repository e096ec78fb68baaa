"""Fine-tuning to chat: what is read, what is trained of it, and that no kill, signal or split of a batch changes the result."""

import gzip
import itertools
import json
import re
import signal
import time
from pathlib import Path

import launch
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from chats import TEMPLATE, base_model, chat_tokenizer
from launch import Launch
from safetensors.torch import load_file
from test_packing import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.chat_format import ChatFormat
from lm.conversations import find_conversations, held_out_beside, read_conversations
from lm.files import read_jsonl, sha256
from lm.models import load_model
from lm.parts import in_parts
from lm.runlog import records
from lm.sft_batches import IGNORED, Collator, order_of

launch.CONTEXT.set_forkserver_preload(["lm.sft_trainer", "transformers.models.gpt_neox.modeling_gpt_neox"])

SETTINGS = {
    "dirty": True,
    "seq_len": 96,
    "effective_batch": 8,
    "micro_batch": 4,
    "epochs": 1.5,
    "lr": 3e-3,
    "warmup_steps": 2,
    "checkpoint_interval_steps": 4,
    "dropout": 0.1,
}
STEPS = 12  # 64 conversations, 1.5 times, 8 in a step
CHECKPOINT = {
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
}
GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(scope="module")
def rows(samples):
    """Real conversations."""
    return [{"messages": row["messages"]} for row in read_jsonl(samples / "conversations/train.jsonl", "") if row["id"]]


@pytest.fixture(scope="module")
def chat(rows):
    return ChatFormat(chat_tokenizer(rows), "it")


@pytest.fixture(scope="module")
def world(tmp_path_factory, rows, chat):
    """A folder with a pretrained model of conversations, and data."""
    folder = tmp_path_factory.mktemp("sft")
    base_model(folder / "base", chat.tokenizer)
    fitting = [row for row in rows[:150] if chat.examples([row["messages"]], SETTINGS["seq_len"])[0]]
    write(folder / "train.jsonl", fitting[:64])
    write(folder / "validation.jsonl", fitting[64:76])
    return folder


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(world: Path, name: str, count: int = 1, before=None, **changes) -> Launch:
    options = SETTINGS | {"command": str(world / "base"), "data": world / "train.jsonl", "output_dir": world / name} | changes
    return Launch("sft.py", options, world / f"{name}.out", count, before)


def run(world: Path, name: str, count: int = 1, **changes) -> Launch:
    """Train to the end."""
    started = start(world, name, count, **changes)
    assert started.wait() == [0] * count, started.said()
    return started


def wait_for_step(world: Path, name: str, step: int, started: Launch) -> None:
    log, deadline = world / name / "logs/train.jsonl", time.monotonic() + 60
    while not log.exists() or f'{{"step": {step}, ' not in log.read_text():
        assert not started.ended(), started.said()
        assert time.monotonic() < deadline, started.said()
        time.sleep(0.002)


def outcome(folder: Path) -> dict:
    """All of a finished run that must not depend on how often it was interrupted."""
    files = [folder / "final/model.safetensors", *(folder / f"checkpoints/step_{STEPS:08d}").iterdir()]
    logs = {name: records(folder, name) for name in ("train", "eval", "samples")}
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in files} | logs


def digests(folder: Path) -> dict[Path, str]:
    """Of every file but that of the events, which grows."""
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file() and path.name != "events.jsonl"}


@pytest.fixture(scope="module")
def undisturbed(world):
    run(world, "undisturbed")
    return world / "undisturbed"


# what is read


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (None, "has no messages: {'messages': None}"),
        ([], "has no messages: {'messages': []}"),
        (["hi"], "has a message that is no object: 'hi'"),
        (GOOD[:1], "has no reply: the assistant must speak"),
        ([{"role": "system", "content": "s"}], "has no reply: the assistant must speak"),
        (
            [*GOOD, {"role": "tool", "content": "x"}],
            "has an unknown role: 'tool', not one of system, user, assistant, in message 3",
        ),
        ([GOOD[0], {"role": "assistant", "content": " \n"}], "has an empty content: ' \\n' in message 2"),
        ([GOOD[0], {"role": "assistant", "content": None}], "has a content that is no string: None in message 2"),
        ([GOOD[0], {"role": "assistant"}], "has a content that is no string: None in message 2"),
        ([GOOD[0], *GOOD], "has two turns of one role in a row: user"),
        ([*GOOD, GOOD[1]], "has two turns of one role in a row: assistant"),
        (GOOD[1:], "begins with a reply: a user must speak first"),
        ([*GOOD, {"role": "system", "content": "s"}], "has a system message that is not the first: it may only stand there"),
        ([{"role": "user", "content": "x<|im_end|>"}, GOOD[1]], "has a special token in a text: <|im_end|> in message 1"),
        ([{"role": "user", "content": "\ud800"}, GOOD[1]], "is not JSON: ("),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_can_be_left_out(messages, fault, chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": GOOD}, {"messages": messages}, {"messages": GOOD}])
    files = find_conversations(str(path), "train")
    with pytest.raises(ValueError, match="1 rows of .*--skip_bad_rows") as error:
        read_conversations(files, chat.control.values(), False)
    assert f"{path} line 2 {fault}" in str(error.value)
    found = read_conversations(files, chat.control.values(), True)
    assert found.rows == [GOOD, GOOD]
    assert found.left_out == {fault.partition(":")[0]: 1}


def test_the_first_bad_rows_are_named_together_and_the_others_counted(chat, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": GOOD}, *[{"messages": GOOD[:1]}] * 30])
    with pytest.raises(ValueError, match="30 rows of") as error:
        read_conversations(find_conversations(str(path), "train"), chat.control.values(), False)
    lines = str(error.value).splitlines()
    assert [line.split()[2] for line in lines[1:21]] == [str(number) for number in range(2, 22)]
    assert lines[21:] == ["... and 10 more"]


def test_every_kind_of_file_gives_the_same_conversations(rows, chat, tmp_path):
    few = rows[:20]
    write(tmp_path / "plain.jsonl", few)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(few), tmp_path / "table.parquet")
    for name in ("plain.jsonl", "packed.jsonl.gz", "table.parquet"):
        found = read_conversations(find_conversations(str(tmp_path / name), "train"), chat.control.values(), False)
        assert found.rows == [row["messages"] for row in few]


def test_a_damaged_file_is_named(rows, chat, tmp_path):
    content = gzip.compress(write(tmp_path / "x.jsonl", rows[:20]).read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(content[:-200])
    with pytest.raises(ValueError, match="cut.jsonl.gz line .* damaged"):
        read_conversations(find_conversations(str(tmp_path / "cut.jsonl.gz"), "train"), chat.control.values(), False)


def test_a_folder_is_its_train_files_and_its_validation_file_is_held_out(tmp_path):
    for name in ("train.jsonl", "validation.jsonl", "meta.json", "README.md"):
        (tmp_path / name).touch()
    assert names(find_conversations(str(tmp_path), "train")) == ["train.jsonl"]
    assert names(held_out_beside(str(tmp_path))) == ["validation.jsonl"]
    assert names(held_out_beside(str(tmp_path / "train.jsonl"))) == ["validation.jsonl"]
    assert held_out_beside(str(tmp_path / "meta.json")) == []
    (tmp_path / "train.jsonl").rename(tmp_path / "training.jsonl")
    with pytest.raises(
        ValueError, match="has files of validation and none of train, which is needed: name them, or pass a file"
    ):
        find_conversations(str(tmp_path), "train")


def test_the_splits_of_a_folder_may_be_folders(tmp_path):
    for name in ("train/b.jsonl", "train/a.parquet", "validation/a.jsonl", "test/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(find_conversations(str(tmp_path), "train")) == ["a.parquet", "b.jsonl"]
    assert names(held_out_beside(str(tmp_path))) == ["a.jsonl"]


def names(files) -> list[str]:
    return [Path(file.name).name for file in files]


# what is trained of it


def mask_by_hand(chat: ChatFormat, ids: list[int]) -> list[bool]:
    """Between <|im_start|>assistant and the next <|im_end|>, which counts too: read off the tokens, one after another."""
    begin, end = chat.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    header, mask, at = chat.tokenizer("assistant\n", add_special_tokens=False).input_ids, [False] * len(ids), 0
    while at < len(ids):
        if ids[at] == begin and ids[at + 1 : at + 1 + len(header)] == header:
            at += 1 + len(header)
            while ids[at] != end:
                mask[at] = True
                at += 1
            mask[at] = True
        at += 1
    return mask


def test_what_is_trained_are_the_replies_and_their_ends_token_by_token(rows, chat):
    conversations = [row["messages"] for row in rows[:100]]
    conversations[0] = [{"role": "system", "content": "Be <brief>, assistant\n"}, *conversations[0]]
    examples, counts = chat.examples(conversations, 10**6)
    assert counts == {"shortened": 0, "left_out": 0, "turns_cut": 0}
    for example, messages in zip(examples, conversations, strict=True):
        made = chat.tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        ids = example.ids.tolist()
        assert ids == made["input_ids"][: len(ids)], "all but what follows the last reply"
        assert example.trained.tolist() == mask_by_hand(chat, ids) == [bool(x) for x in made["assistant_masks"][: len(ids)]]
        assert example.trained[-1]
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        written = chat.tokenizer.decode(example.ids[example.trained], clean_up_tokenization_spaces=False)
        assert written == "".join(f"{reply}<|im_end|>" for reply in replies)


@pytest.mark.parametrize("reply", ["\nb", "\n\n b", " b", "b\n"])
def test_a_reply_follows_the_prompt_that_the_model_is_asked_with_whatever_it_begins_with(reply, rows):
    tokenizer = chat_tokenizer(rows[:50])
    tokenizer.chat_template = TEMPLATE.replace(".strip()", "")
    chat = ChatFormat(tokenizer, "it")
    messages = [*GOOD, {"role": "user", "content": "c\n"}, {"role": "assistant", "content": reply}]
    ((example,), _) = chat.examples([messages], 1000)
    prompt = chat.prompt(messages[:-1])
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.trained[len(prompt) :].all()
    assert chat.tokenizer.decode(example.ids[len(prompt) :]) == f"{reply}<|im_end|>"


def test_a_long_conversation_loses_whole_turns_and_one_whose_first_reply_is_too_long_is_left_out(rows, chat):
    messages = rows[0]["messages"]
    ((whole,), _) = chat.examples([messages], 10**6)
    ends = [n + 1 for n in np.flatnonzero(whole.ids == chat.stop_id) if whole.trained[n]]
    for seq_len in range(1, len(whole.ids) + 1, 7):
        found, counts = chat.examples([messages], seq_len)
        fitting = [end for end in ends if end <= seq_len]
        lost = len(ends) - len(fitting)
        assert counts == {"shortened": bool(fitting) and bool(lost), "left_out": not fitting, "turns_cut": lost}
        assert [example.ids.tolist() for example in found] == [whole.ids[:end].tolist() for end in fitting[-1:]]
        assert [example.trained.tolist() for example in found] == [whole.trained[:end].tolist() for end in fitting[-1:]]


def test_a_tokenizer_that_cannot_chat_is_refused(rows):
    tokenizer = chat_tokenizer(rows[:50])
    end_outside = TEMPLATE.replace("+ '<|im_end|>' -}}{%- endgeneration -%}{{-", "-}}{%- endgeneration -%}{{- '<|im_end|>' +")
    unmarked = re.sub(r"\{%- (end)?generation -%\}", "", TEMPLATE)
    for template, remark in [(None, "has no chat template"), (end_outside, "does not end"), (unmarked, "does not end")]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"{remark}.*train_tokenizer.py --chat"):
            ChatFormat(tokenizer, "it")


# how conversations share rows


@pytest.mark.parametrize("reach", [None, 1.0, 100.0, 1e9])
@pytest.mark.parametrize("name", ["neox", "llama", "gpt2"])
def test_packed_loss_and_gradients_equal_those_of_each_conversation_alone(name, reach):
    model, generator = make(name), np.random.default_rng(0)
    rows = []
    for length in (40, 7, 12, 30, 5, 9):
        ids = generator.integers(50, size=length)
        rows.append({"input_ids": ids, "labels": np.where(generator.random(length) < 0.5, ids, IGNORED)})
    expected, count = 0.0, 0
    for row in rows:
        logits = model(torch.from_numpy(row["input_ids"])[None], use_cache=False).logits[0, :-1]
        labels = torch.from_numpy(row["labels"])[1:]
        expected, count = expected + F.cross_entropy(logits, labels, reduction="sum"), count + (labels != IGNORED).sum()
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = Collator(reach)(rows)
    assert batch["labels"][:, 1:].ne(IGNORED).sum() == batch["labels"].ne(IGNORED).sum() == count
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def test_every_conversation_comes_once_an_epoch_and_going_on_does_not_change_the_order():
    whole = order_of(0, 10, 0, 35)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist() != list(range(10))
    for first in range(35):
        assert order_of(0, 10, first, 35).tolist() == whole[first:].tolist()
    assert order_of(1, 10, 0, 35).tolist() != whole.tolist()


# real runs


def test_the_logged_loss_is_the_mean_over_the_assistants_tokens_of_the_step(world, undisturbed, chat):
    """Computed from the conversations one by one, before the first update; dropout makes it another than that of the log."""
    run(world, "plain", dropout=0.0, epochs=0.125, lr=1e-9)
    conversations = [row["messages"] for row in read_jsonl(world / "train.jsonl", "")]
    examples, _ = chat.examples(conversations, SETTINGS["seq_len"])
    model, total, count = load_model(world / "base"), 0.0, 0
    for number in order_of(0, 64, 0, 8):
        ids, trained = torch.from_numpy(examples[number].ids).long(), torch.from_numpy(examples[number].trained)[1:]
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
        total, count = total + losses[trained].sum().item(), count + trained.sum().item()
    (record,) = records(world / "plain", "train")
    assert record["loss"] == pytest.approx(total / count, rel=1e-6)
    assert record["assistant_tokens"] == count
    assert records(undisturbed, "train")[0]["assistant_tokens"] == count
    assert records(undisturbed, "train")[0]["loss"] != record["loss"]


def test_a_run_leaves_a_model_that_has_learned_and_transformers_loads(world, undisturbed):
    before, after = records(undisturbed, "eval")
    assert (before["step"], after["step"]) == (0, STEPS)
    assert after["loss"] < before["loss"] - 0.3
    results = json.loads((undisturbed / "results.json").read_text())
    assert (results["before"]["loss"], results["after"]["loss"]) == (before["loss"], after["loss"])
    samples = records(undisturbed, "samples")
    assert [sample["text"].count("assistant: ") for sample in samples] == [3, 3]
    final = undisturbed / "final"
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert model.config.use_cache
    made = tokenizer.apply_chat_template(GOOD[:1], add_generation_prompt=True, tokenize=False)
    assert made == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_run_killed_again_and_again_ends_bit_for_bit_as_if_it_had_not_been(world, undisturbed):
    for step in (2, 7, 12):
        started = start(world, "killed")
        wait_for_step(world, "killed", step, started)
        started.kill()
    run(world, "killed")
    assert outcome(world / "killed") == outcome(undisturbed)
    for folder in (world / "killed/checkpoints").iterdir():
        assert {file.name for file in folder.iterdir()} == CHECKPOINT, "and none of them is a pickle"


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint_and_code_75(count, world, undisturbed):
    name = f"stopped_{count}"
    started = start(world, name, count)
    wait_for_step(world, name, 2, started)
    started.send(signal.SIGTERM, process=count - 1)
    assert started.wait() == [75] * count, started.said()
    events = read_jsonl(world / name / "events.jsonl", "")
    assert [event["event"] for event in events] == ["started", "stopped"]
    assert events[-1]["signal"] == "SIGTERM"
    assert (world / name / f"checkpoints/step_{events[-1]['step']:08d}").is_dir()
    run(world, name, count)
    if count == 1:
        assert outcome(world / name) == outcome(undisturbed)
    else:
        assert [record["step"] for record in records(world / name, "train")] == list(range(1, STEPS + 1))


def test_splitting_a_batch_over_passes_and_processes_does_not_change_the_update(world):
    run(world, "whole", dropout=0.0, micro_batch=8)
    run(world, "split", dropout=0.0, micro_batch=1)
    run(world, "two", count=2, dropout=0.0, micro_batch=2)
    run(world, "auto", dropout=0.0, micro_batch="auto")
    assert json.loads((world / "auto/run.json").read_text())["derived"]["micro_batch"] == 8, "memory for all of a step is there"
    expected = {log: records(world / "whole", log) for log in ("train", "eval")}
    for name in ("split", "two", "auto"):
        found = {log: records(world / name, log) for log in expected}
        for key in ("step", "tokens", "assistant_tokens", "lr"):
            assert [record[key] for record in found["train"]] == [record[key] for record in expected["train"]]
        for log, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
            wanted = [record[key] for record in expected[log]]
            assert [record[key] for record in found[log]] == pytest.approx(wanted, rel=2e-4)


def test_a_damaged_checkpoint_is_passed_over(world, undisturbed):
    started = start(world, "damaged")
    wait_for_step(world, "damaged", 10, started)
    started.kill()
    newest = sorted((world / "damaged/checkpoints").glob("step_????????"))[-1] / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert f"{newest.parent} is damaged ({newest}" in run(world, "damaged").said()
    assert outcome(world / "damaged") == outcome(undisturbed)


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_begun_from_another_runs_checkpoint_is_finished_and_measured(step, world, undisturbed):
    """Its last one too."""
    steps = sorted(path.name for path in (undisturbed / "checkpoints").glob("step_????????"))
    source = undisturbed / "checkpoints" / (steps[-1] if step == 10 else steps[0])
    assert "finished" in run(world, f"from_{step}", resume_from=source).said()
    results = json.loads((world / f"from_{step}/results.json").read_text())
    assert results["after"] == json.loads((undisturbed / "results.json").read_text())["after"]


def test_what_is_held_out_does_not_train_and_a_folder_of_something_else_is_left(world, rows, tmp_path):
    data = write(tmp_path / "own.jsonl", rows[:20])
    for name, changes, said in (
        ("both", {"data": data, "eval_data": data}, "own.jsonl is both --data and held out"),
        ("one", {"data": write(tmp_path / "one.jsonl", rows[:1])}, "has 1 conversation, of which none is left to be held out"),
        ("other", {}, "is no run and holds meta.json, a folder of its own is needed"),
    ):
        if name == "other":
            (world / name).mkdir()
            write(world / name / "meta.json", rows[:1])
        started = start(world, name, **changes)
        assert started.wait() == [1]
        assert said in started.said()


def test_a_finished_run_is_left_as_it_is_and_another_in_its_folder_refused(world, undisturbed):
    before = digests(undisturbed)
    assert "was finished before" in run(world, "undisturbed").said()
    started = start(world, "undisturbed", lr=1e-3, seq_len=64)
    assert started.wait() == [1]
    assert "the run would not be the same (lr: saved 0.003, now 0.001; " in started.said()
    assert digests(undisturbed) == before


def test_losses_that_stay_non_finite_end_the_run_and_change_nothing_more(world):
    started = start(world, "diverged", lr=1e30, warmup_steps=0, checkpoint_interval_steps=1)
    assert started.wait() == [1]
    assert "steps 2 to 4 had no finite loss and gradient" in started.said()
    assert [record["loss"] is None for record in records(world / "diverged", "train")] == [False, True, True]
    found = sorted((world / "diverged/checkpoints").glob("step_????????"))
    assert len({sha256(path / "model.safetensors") for path in found if path.name > "step_00000000"}) == 1
    assert not (world / "diverged/final").exists()


def poison() -> None:
    """A loss that is NaN in one process, in its second micro-batch of step 6."""
    from accelerate import PartialState

    from lm.sft_trainer import ChatTrainer

    compute, seen = ChatTrainer.compute_loss, []

    def poisoned(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        seen.extend([self.step] if self.model.training else [])
        worst = PartialState().process_index == PartialState().num_processes - 1 and seen.count(5) == 2 and self.step == 5
        return loss * float("nan") if worst else loss

    ChatTrainer.compute_loss = poisoned


@pytest.mark.parametrize(("processes", "fsdp"), [(1, None), (2, None), (2, "full_shard")])
def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_any_and_the_run_goes_on(processes, fsdp, world):
    name = f"poisoned_{processes}_{fsdp}"
    options = {"micro_batch": 4 // processes, "fsdp": fsdp, "checkpoint_interval_steps": 1, "max_step_checkpoints": STEPS}
    started = start(world, name, processes, poison, **options)
    assert started.wait() == [0] * processes, started.said()
    moments = "shard-*" if fsdp else "optimizer.safetensors"
    before, after = ((world / name / f"checkpoints/step_{step:08d}") for step in (5, 6))
    for pattern in ("*.safetensors", moments):
        pairs = zip(sorted(before.glob(pattern)), sorted(after.glob(pattern)), strict=True)
        for first, second in pairs:
            first, second = load_file(first), load_file(second)
            assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [record["step"] for record in records(world / name, "train") if record["loss"] is None] == [6]
    assert len(records(world / name, "train")) == STEPS
    assert [(row["event"], row.get("step")) for row in read_jsonl(world / name / "events.jsonl", "")][1] == ("not_finite", 6)


def test_a_divided_run_is_that_of_one_process_and_any_layout_goes_on_from_it(world):
    options = {"dropout": 0.0, "micro_batch": 2, "max_step_checkpoints": 9}
    for processes, fsdp, stop_at in ((2, "full_shard", 3), (1, None, 6), (2, "full_shard", None)):
        started = start(world, "divided", processes, fsdp=fsdp, grad_checkpoint=stop_at is None, **options)
        if stop_at:
            wait_for_step(world, "divided", stop_at, started)
            started.send(signal.SIGUSR1)
        assert started.wait() == [75 if stop_at else 0] * processes, started.said()
    written = [in_parts(path) for path in sorted((world / "divided/checkpoints").glob("step_*"))]
    assert [layout for layout, _ in itertools.groupby(written)] == [True, False, True]
    run(world, "undivided", dropout=0.0)
    for name, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        expected = [record[key] for record in records(world / "undivided", name)]
        assert [record[key] for record in records(world / "divided", name)] == pytest.approx(expected, rel=2e-4)
    assert AutoModelForCausalLM.from_pretrained(world / "divided/final").num_parameters() > 0


def test_a_divided_run_that_is_killed_ends_bit_for_bit_as_if_it_had_not_been(world):
    options = {"fsdp": "full_shard", "micro_batch": 2, "checkpoint_interval_steps": 2, "optimizer": "adafactor"}
    run(world, "whole_way", 2, **options)
    started = start(world, "divided_killed", 2, **options)
    wait_for_step(world, "divided_killed", 5, started)
    started.send(signal.SIGKILL)
    started.wait()
    run(world, "divided_killed", 2, **options)
    found, expected = (outcome(world / name) for name in ("divided_killed", "whole_way"))
    for name in ("final/model.safetensors", "train", "eval", "samples"):  # a shard lists what it holds in any order
        assert found[name] == expected[name]


def test_bad_arguments_and_data_end_it_before_anything_is_written(world, tmp_path):
    bad = write(tmp_path / "bad.jsonl", [{"messages": GOOD[:1]}])
    for changes, remark in [
        ({"data": bad}, f"{bad} line 1 has no reply"),
        ({"effective_batch": 6}, "--effective_batch 6 is not a multiple of micro_batch x processes = 4 x 1"),
        ({"epochs": 0.01}, "0.01 epochs of 64 conversations are not one step of 8"),
        ({"seq_len": 4}, "none of the 64 train conversations has a reply that ends within --seq_len 4"),
        ({"command": str(tmp_path)}, f"no model {tmp_path}"),
        ({"output_dir": world / "base"}, "is no run and holds chat_template.jinja, a folder of its own is needed"),
    ]:
        started = start(world, "nothing", **changes)
        assert started.wait() == [1]
        assert remark in started.said()
    assert not (world / "nothing").exists()
