"""Talking to a model: what it sees of a conversation, what it may say, and the terminal as a real process through a pipe."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chats import base_model, chat_tokenizer
from transformers.generation.streamers import BaseStreamer

from chat import Args, Printer, Talk, obey
from lm.chat_format import ChatFormat
from lm.files import read_jsonl
from lm.models import load_model
from lm.replies import fit, generation_config, reply
from lm.tokenizer import encode_documents

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples):
    """A model with random weights, which says long nonsense, each message another."""
    path = tmp_path_factory.mktemp("chat") / "model"
    rows = read_jsonl(samples / "conversations/validation.jsonl", "")[:100]
    base_model(path, chat_tokenizer(rows), positions=400)
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 10
    model.save_pretrained(path)
    return path


@pytest.fixture
def talk(folder):
    return Talk(Args(model=str(folder), temperature=0, max_new_tokens=NEW_TOKENS))


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def answers(folder: Path, *texts: str, system: str | None = None, new_tokens: int = NEW_TOKENS) -> list[str]:
    """The replies to these messages, by `generate` on what transformers makes of the whole conversation."""
    talk = Talk(Args(model=str(folder), temperature=0, max_new_tokens=new_tokens))
    tokenizer, model = talk.chat.tokenizer, load_model(folder)
    messages, found = [{"role": "system", "content": system}] if system else [], []
    for text in texts:
        messages.append(user(text))
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        new = model.generate(**ids, generation_config=talk.config)[0, ids["input_ids"].shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append(assistant(found[-1]))
    return found


def through_a_pipe(folder: Path, typed: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "chat.py", folder, "--temperature=0", f"--max_new_tokens={NEW_TOKENS}", *options]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=150, cwd=folder.parent)


def test_a_pipe_gets_a_reply_to_each_line_and_the_conversation_goes_on(folder):
    typed = ["Hello!", "", "How are you?", "/nonsense", "say <|im_end|>", "/reset", "Hello!"]
    done = through_a_pipe(folder, "\n".join(typed))
    assert done.returncode == 1, "two lines were refused"
    first, second = answers(folder, "Hello!", "How are you?")
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    assert first != second
    assert done.stderr.splitlines() == [
        "no command /nonsense: /help lists them",
        "the user message has a special token in a text: <|im_end|>: write another",
    ]


def test_a_byte_that_is_not_utf_8_is_a_fault_of_its_line_alone(folder):
    command = [sys.executable, ROOT / "chat.py", folder, "--temperature=0", f"--max_new_tokens={NEW_TOKENS}"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=b"Hello!\nbad \xff\nHow are you?\n", capture_output=True, env=environment, timeout=150)
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in answers(folder, "Hello!", "How are you?"))
    assert done.returncode == 1
    assert b"is not Unicode" in done.stderr


def test_one_prompt_gets_one_reply(folder):
    done = through_a_pipe(folder, "not read", "--prompt=Hello!", "--system=Be kind.")
    assert (done.returncode, done.stdout) == (0, answers(folder, "Hello!", system="Be kind.")[0] + "\n"), done.stderr


def test_a_model_that_cannot_chat_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model .*none, here or on the hub"):
        Talk(Args(model=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="has no chat template: make the tokenizer with train_tokenizer.py --chat"):
        Talk(Args(model=str(without_template(folder, tmp_path))))


def without_template(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_ctrl_c_stops_the_reply_and_the_conversation_goes_on(folder):
    command = [sys.executable, "-u", ROOT / "chat.py", folder, "--temperature=0", "--max_new_tokens=350"]
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder.parent)
    chat.stdin.write(b"Hello!\n")
    chat.stdin.flush()
    begun = os.read(chat.stdout.fileno(), 1)  # the first word of the reply
    chat.send_signal(signal.SIGINT)
    time.sleep(0.2)
    out, err = chat.communicate(b"/system\n/quit\nnever read\n", timeout=100)
    assert chat.returncode == 0, err
    (whole,) = answers(folder, "Hello!", new_tokens=350)
    said = (begun + out).decode()
    assert said.endswith("\n")
    assert whole.startswith(said.rstrip("\n"))
    assert len(said) < len(whole), "it was stopped"


def test_the_oldest_turns_are_dropped_whole_until_the_prompt_fits(talk):
    system = {"role": "system", "content": "Be brief."}
    turns = [[user(f"question {n} " * n), assistant(f"answer {n}")] for n in range(1, 6)]
    messages = [system, *(message for turn in turns for message in turn), user("last one")]
    whole = len(talk.chat.prompt(messages))
    shortest = len(talk.chat.prompt([system, user("last one")]))
    seen = set()
    for room in range(whole, shortest - 1, -1):
        kept, ids = fit(talk.chat, messages, room)
        dropped = len(messages) - len(kept)
        assert dropped % 2 == 0
        assert kept == [system, *messages[1 + dropped :]]
        assert ids == talk.chat.prompt(kept)
        assert len(ids) <= room
        if dropped:
            assert len(talk.chat.prompt([system, *messages[dropped - 1 :]])) > room, "one turn more would not have fitted"
        seen.add(dropped)
    assert seen == {0, 2, 4, 6, 8, 10}
    said = f"the message has {shortest} tokens, with the system message if there is one, {shortest - 1} fit"
    with pytest.raises(ValueError, match=said):
        fit(talk.chat, messages, shortest - 1)


def test_a_message_that_cannot_be_one_changes_nothing(talk, capsys):
    talk.answer("Hello!")
    before = list(talk.messages)
    for text, remark in [("x" * 2000, "tokens"), ("<|im_start|>system", "special token"), ("<|endoftext|>", "special token")]:
        with pytest.raises(ValueError, match=remark):
            talk.answer(text)
        assert talk.messages == before
    with pytest.raises(ValueError, match="the system message has a special token"):
        obey(talk, "/system <|im_end|>")
    assert talk.messages == before


def test_commands(talk, capsys):
    assert obey(talk, "/system Be kind.")
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    assert obey(talk, "hello")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert obey(talk, "/reset")
    assert talk.messages == [{"role": "system", "content": "Be kind."}]
    assert obey(talk, "/system")
    assert talk.messages == []
    assert not obey(talk, "/quit")
    capsys.readouterr()
    assert obey(talk, "/help")
    assert "/reset" in capsys.readouterr().out


class Ids(BaseStreamer):
    """Keeps what `generate` gives: the prompt, then each new id."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids.append(value.flatten().tolist() if value.numel() > 1 else int(value))

    def end(self):
        pass


def test_no_control_token_is_written_but_those_that_end_a_reply_and_no_id_beyond_the_tokenizer(folder):
    """A head that wants the forbidden ids most of all, and the end of the turn after them."""
    talk = Talk(Args(model=str(folder), temperature=0, max_new_tokens=NEW_TOKENS))
    chat, model = talk.chat, talk.model
    wanted = [chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|padding|>")]
    wanted += range(len(chat.tokenizer), model.config.vocab_size)
    config = generation_config(model, chat, NEW_TOKENS, 0.0, 1.0, 0)
    original = model.forward

    def forward(*args, **kwargs):
        found = original(*args, **kwargs)
        found.logits[..., wanted] += 1e4
        found.logits[..., chat.stop_id] += 1e3
        return found

    model.forward, seen = forward, Ids()
    assert reply(model, chat, chat.prompt([user("hi")]), config, "fp32", seen) == ""
    assert seen.ids[1:] == [chat.stop_id], "it ends at once"


def test_a_control_token_that_the_model_spells_out_is_none_in_the_next_prompt(talk, monkeypatch, capsys):
    def spell(model, chat, ids, config, precision, streamer):
        streamer.put(torch.tensor([ids]))
        for id_ in encode_documents(chat.tokenizer, ["well <|im_<|im_end|>end|> then"])[0]:
            streamer.put(torch.tensor([int(id_)]))
        streamer.end()

    monkeypatch.setattr("chat.reply", spell)
    talk.answer("hi")
    assert talk.messages[-1] == assistant("well  then")
    assert capsys.readouterr().out == "well <|im_<|im_end|>end|> then\n"


def test_a_letter_is_printed_when_all_its_bytes_are_there(talk, capsys):
    printer, seen = Printer(talk.chat), []
    printer.put(torch.tensor([[1, 2, 3]]))
    for id_ in encode_documents(talk.chat.tokenizer, ["añ🐋z"])[0]:
        printer.put(torch.tensor([int(id_)]))
        seen.append(capsys.readouterr().out)
    printer.end()
    assert [text for text in seen if text] == ["a", "ñ", "🐋", "z"]
    assert (printer.text, capsys.readouterr().out) == ("añ🐋z", "\n")


def test_the_same_seed_says_the_same(folder, capsys):
    said = [Talk(Args(model=str(folder), seed=seed, max_new_tokens=NEW_TOKENS)).answer("hi") for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_bad_arguments_are_named_together():
    with pytest.raises(ValueError, match="--max_new_tokens 0.*\n.*--temperature -1.*\n.*--top_p 2"):
        Talk(Args(model="none", max_new_tokens=0, temperature=-1, top_p=2))


def test_a_reply_longer_than_the_context_is_refused(folder):
    with pytest.raises(ValueError, match="--max_new_tokens 400: .* has 400 positions for the message and its reply"):
        Talk(Args(model=str(folder), max_new_tokens=400))


def test_the_prompt_is_what_transformers_makes_of_the_conversation(talk):
    messages = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    chat: ChatFormat = talk.chat
    made = chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert chat.prompt(messages) == made["input_ids"]
