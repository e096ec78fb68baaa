"""How questions are put to a model: with answered examples before them, as a chat, after an instruction.

These are lm-eval's own options. Without a chat template a question is plain text that the answer goes on from.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from lm.args import below

NEEDS_CHAT = "make the tokenizer with train_tokenizer.py --chat and train with it, or leave the option out"


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The options of lm-eval that decide what stands before an answer."""

    num_fewshot: int = 0
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None

    def faults(self) -> list[str]:
        """Options that cannot be, or that would have no effect."""
        found = below(self, 0, "num_fewshot")
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            found.append("--fewshot_as_multiturn without --apply_chat_template: turns need a template, pass both or neither")
        if self.fewshot_as_multiturn and not self.num_fewshot:
            found.append("--fewshot_as_multiturn without examples: pass --num_fewshot too, or leave it out")
        if self.system_instruction is not None and not self.system_instruction.strip():
            found.append("--system_instruction is empty: is a variable of the shell not set?")
        return found

    def template_faults(self, tokenizer: PreTrainedTokenizerFast, name: str) -> list[str]:
        """Why the tokenizer of that name cannot be used so: it has no chat template, or one that refuses such turns.

        lm-eval would leave a system message that a template refuses out, without a word.
        """
        if not self.apply_chat_template:
            return []
        if not tokenizer.chat_template:
            return [f"--apply_chat_template, and {name} has no chat template: {NEEDS_CHAT}"]
        turns = [{"role": "system", "content": self.system_instruction}] if self.system_instruction else []
        if self.fewshot_as_multiturn:
            turns += [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
        try:
            tokenizer.apply_chat_template([*turns, {"role": "user", "content": "1 + 2 ="}], tokenize=False)
        except Exception as error:  # a template may raise whatever it likes
            roles = ", ".join([*(turn["role"] for turn in turns), "user"])
            return [f"--apply_chat_template, and the template of {name} refuses the turns {roles} ({error}): {NEEDS_CHAT}"]
        return []

    def options(self) -> dict[str, Any]:
        """What lm_eval.evaluate is told; the number of examples is a task's."""
        names = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")
        return {name: getattr(self, name) for name in names}

    def identity(self, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """What results depend on, without the options that are not used."""
        found: dict[str, Any] = {"num_fewshot": self.num_fewshot}
        if self.apply_chat_template:
            found |= {"chat_template": _digest(str(tokenizer.chat_template))}
        return found | {name: value for name, value in self.options().items() if value}

    @property
    def suffix(self) -> str:
        """What the names of results end with, such as _5shot_chat; nothing for plain questions."""
        parts = [f"{self.num_fewshot}shot"] if self.num_fewshot else []
        parts += ["chat"] * self.apply_chat_template + ["multiturn"] * self.fewshot_as_multiturn
        if self.system_instruction is not None:
            parts.append(f"system-{_digest(self.system_instruction)[:8]}")
        return "".join(f"_{part}" for part in parts)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
