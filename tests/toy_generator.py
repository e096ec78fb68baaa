"""A generator with the interface of NaturalLanguageGraphGenerator: its answer is soon learned, its prompt tells its stage."""

import random
from dataclasses import dataclass


@dataclass
class Example:
    input_text: str
    output_texts: list[str]


class ToyGenerator:
    def __init__(self, max_input_size, seed=None, debug=False):
        self.random = random.Random(seed)

    def generate_batch(self, task, batch_size, reserved_inputs=(), alpha=1.0, max_lookahead=5):
        stage = round(alpha * max_lookahead)
        words = " ".join(self.random.choice(("red", "green", "blue", "black", "white")) for _ in range(2 * stage))
        return [Example(f"At {stage} of {max_lookahead} we see {words}. Number {self.random.random()} is", ["so"])]
