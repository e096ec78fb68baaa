"""Talk to a chat model in the terminal, or through a pipe, a message on each line.

    python chat.py runs/tiny_chat                                   # /help lists what else can be typed
    python chat.py runs/tiny_chat --prompt "What is a whale?"       # one reply, then the end
    printf 'Hello!\nHow are you?\n' | python chat.py runs/tiny_chat --temperature 0

The model sees the newest turns that fit into its context, and the system message. Ctrl-C stops a reply, Ctrl-D ends.

Reads   a run of sft.py, a model folder or a hub name, with a chat template; standard input
Writes  replies to standard output; remarks to standard error
"""

import contextlib
import os
import sys
from dataclasses import dataclass

import torch
import tyro
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lm.args import below, check, not_positive, outside_0_to_1, parse
from lm.chat_format import ChatFormat
from lm.conversations import Message, any_of, text_fault
from lm.models import load_model
from lm.replies import context_of, fit, generation_config, reply
from lm.tokenizer import load_tokenizer
from lm.trained import find_config, find_model

HELP = """/reset         forget the conversation
/system TEXT   forget it, and begin with this system message; without TEXT with none
/quit          end (or Ctrl-D)
/help          this
Ctrl-C stops a reply."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """A conversation with a model."""

    model: tyro.conf.Positional[str]
    """A run of sft.py (its final model), a folder that transformers loads, or a hub name."""
    prompt: str | None = None
    """One message: its reply is printed, and that is all."""
    system: str | None = None
    """The system message, if any."""
    temperature: float = 0.7
    """What the logits are divided by; 0 takes the most likely token always."""
    top_p: float = 0.9
    """Draw from the most likely tokens that have this probability together; 1 for all."""
    top_k: int = 0
    """Draw from so many of the most likely tokens; 0 for all."""
    max_new_tokens: int = 256
    """Tokens of a reply at most."""
    seed: int = 0
    """Decides what is drawn."""
    force_cpu: bool = False
    """Do not use a GPU even if there is one."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(self, 1, "max_new_tokens") + below(self, 0, "top_k", "seed")
        if self.seed >= 2**63:
            found.append(f"--seed {self.seed}: less than 2**63 is needed")
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            found.append(f"--temperature {self.temperature}: 0, or a number from 0.01 to 100, is needed")
        return found + outside_0_to_1(self, "top_p") + not_positive(self, "top_p")


class Printer(BaseStreamer):
    """Prints a reply while it is written, a letter as soon as all its bytes are there, and keeps it."""

    def __init__(self, chat: ChatFormat):
        self.tokenizer, self.text = chat.tokenizer, ""
        self._ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """The ids that `generate` gives: the prompt, then each new one."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        if not (text := self._decoded()).endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """Nothing more comes."""
        self._show(self._decoded())
        print(flush=True)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self._ids or [], skip_special_tokens=True)

    def _show(self, text: str) -> None:
        new, self.text = text[len(self.text) :], text  # before it is printed: Ctrl-C may come between
        print(new, end="", flush=True)


class Talk:
    """A conversation, and the model that it is with.

    Raises: ValueError if the model cannot chat.
    """

    def __init__(self, args: Args):
        check(args.faults())
        source, _, _ = find_model(args.model, "final")
        find_config(source)  # a wrong name is one of a model, not of a tokenizer
        self.args, self.chat = args, ChatFormat(load_tokenizer(source), source)
        self.token = any_of(self.chat.control.values())
        device = "cuda" if torch.cuda.is_available() and not args.force_cpu else "cpu"
        self.model: PreTrainedModel = load_model(source).to(device).eval()
        self.room = context_of(self.model) - args.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens}: {source} has {context_of(self.model)} positions for the message and"
                " its reply: lower it"
            )
        self.config = generation_config(self.model, self.chat, args.max_new_tokens, args.temperature, args.top_p, args.top_k)
        self.messages: list[Message] = []
        self.begin(args.system)
        torch.manual_seed(args.seed)

    def begin(self, system: str | None) -> None:
        """Forget everything but this system message. Raises: ValueError if it cannot be one."""
        self.messages = [self._message("system", system)] if system else []

    def answer(self, text: str) -> str:
        """Print the reply to a message, and remember both; Ctrl-C ends the reply where it is.

        Raises: ValueError if the message cannot be one or is too long; then it is as if it had not been.
        """
        kept, ids = fit(self.chat, [*self.messages, self._message("user", text)], self.room)
        printer = Printer(self.chat)
        try:
            reply(self.model, self.chat, ids, self.config, "fp32", printer)
        except KeyboardInterrupt:
            printer.end()
        # A control token that the model has spelled out, piece by piece, would be one in the next prompt.
        content = printer.text
        while self.token.search(content):  # one that is taken out may leave another
            content = self.token.sub("", content)
        self.messages = [*kept, {"role": "assistant", "content": content}]
        return printer.text

    def _message(self, role: str, content: str) -> Message:
        if fault := text_fault(content, self.token):
            raise ValueError(f"the {role} message {fault}: write another")
        return {"role": role, "content": content}


def obey(talk: Talk, line: str) -> bool:
    """Do what a line asks for; False if that is to end. Raises: ValueError if it cannot be done."""
    command, _, rest = line.strip().partition(" ")
    if command == "/quit":
        return False
    if command == "/help":
        print(HELP)
    elif command == "/reset":
        talk.begin(next((m["content"] for m in talk.messages[:1] if m["role"] == "system"), None))
    elif command == "/system":
        talk.begin(rest.strip())
    elif command.startswith("/"):
        raise ValueError(f"no command {command}: /help lists them")
    elif line.strip():
        talk.answer(line.strip())
    return True


def converse(talk: Talk) -> int:
    """Answer line after line until there is none; 1 if a line of a pipe was refused, else 0."""
    refused = False
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are then a fault of their line alone
    asked = "> " if sys.stdin.isatty() else ""
    if asked:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lets a line be edited
        print(f"{talk.args.model}: {HELP}", file=sys.stderr)
    while True:
        try:
            if not obey(talk, input(asked)):
                break
        except EOFError:
            break
        except KeyboardInterrupt:  # while nothing was being answered
            print("\n(Ctrl-D or /quit ends)", file=sys.stderr)
        except ValueError as error:
            print(error, file=sys.stderr)
            refused = True
    return int(refused and not asked)


def main(args: Args) -> int:
    """Answer --prompt, or whatever is typed; returns the exit code."""
    talk = Talk(args)
    if args.prompt is None:
        return converse(talk)
    talk.answer(args.prompt)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse(Args)))
    except BrokenPipeError:  # whoever reads has had enough
        os._exit(0)
