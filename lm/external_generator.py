"""Examples from a published generator's class, unmodified, in place of the built-in ones.

The class is made as `Class(max_input_size, seed=...)`, anew for every example, and asked
`generate_batch("search", batch_size=1, reserved_inputs=set(), alpha=..., max_lookahead=...)` for a list of one object with
`input_text` and `output_texts`. An empty list, or None, or no `output_texts` stands for an attempt that failed.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np

from lm import draws
from lm.graph_search import Task


def load_class(generator: str) -> type:
    """The class that "module:Class" names.

    Raises: ValueError if there is none, or it has no `generate_batch`.
    """
    module_name, _, class_name = generator.partition(":")
    if not module_name or not class_name:
        raise ValueError(f"--generator {generator} names no class, 'module:Class' is needed: add what is missing")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--generator {generator}: {module_name} does not import ({error}): put its folder on PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = ", ".join(name for name, value in vars(module).items() if isinstance(value, type)) or "none"
        raise ValueError(f"--generator {generator}: {module_name} has no class {class_name}: choose from {classes}")
    if not callable(getattr(found, "generate_batch", None)):
        raise ValueError(f"--generator {generator}: {class_name} has no method generate_batch: name the generator's class")
    return found


class Texts(NamedTuple):
    """Examples as texts, in the form that lm.graph_text.Written has too."""

    examples: list[tuple[str, list[str]]]

    def __len__(self) -> int:
        return len(self.examples)

    def prompts(self) -> list[str]:
        """The text of each example up to its answer."""
        return [prompt for prompt, _ in self.examples]

    def answers(self) -> list[list[str]]:
        """The right answers of each example, the one drawn as its label first."""
        return [answers for _, answers in self.examples]


class ExternalGenerator:
    """Examples of the class that "module:Class" names. Raises: ValueError as `load_class` does."""

    def __init__(self, generator: str, task: Task, seed: int, purpose: str):
        self._class = load_class(generator)
        self._task, self._seed, self._purpose = task, seed, purpose

    def draw(self, stage: int, attempt: int, indices: np.ndarray) -> tuple[np.ndarray, Texts]:
        """Those of the examples that this attempt gave: their indices, and their texts."""
        drawn = {index: self._draw_one(stage, attempt, index) for index in indices.tolist()}
        made = {index: example for index, example in drawn.items() if example}
        return np.array(list(made), dtype=np.int64), Texts(list(made.values()))

    def _draw_one(self, stage: int, attempt: int, index: int) -> tuple[str, list[str]] | None:
        draw = draws.integers(self._seed, f"external/{self._purpose}/{stage}/{attempt}", index, 1)[0]
        generator = self._class(self._task.max_input_size, seed=int(draw[0] >> np.uint64(33)))
        lookahead = self._task.max_lookahead
        batch = generator.generate_batch(
            "search", batch_size=1, reserved_inputs=set(), alpha=stage / lookahead, max_lookahead=lookahead
        )
        if not batch:
            return None
        prompt, outputs = (getattr(batch[0], name, None) for name in ("input_text", "output_texts"))
        if not outputs:
            return None
        self._check(prompt, outputs)
        words = [text.removeprefix(" ") for text in outputs]
        label = int(draw[1] % np.uint64(len(words)))
        return prompt, [words[label], *words[:label], *words[label + 1 :]]

    def _check(self, prompt: Any, outputs: Any) -> None:
        name = self._class.__name__
        if not isinstance(prompt, str):
            raise ValueError(f"{name} gave the input_text {prompt!r:.80}, a string is needed: mend the generator")
        if not isinstance(outputs, list | tuple) or not all(isinstance(text, str) and text.strip() for text in outputs):
            raise ValueError(f"{name} gave the output_texts {outputs!r:.80}, words are needed: mend the generator")
