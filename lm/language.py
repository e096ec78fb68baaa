"""Which language a text is in, by py3langid's model (Lui & Baldwin, "langid.py", ACL 2012), with its loop compiled.

Chosen over lingua: see benchmarks/cleaning.py, which measures both on texts of known languages.
"""

from functools import cache

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from lm.document_kernels import language_scores

CHARACTERS = 1000  # of a text that are looked at


class Languages:
    """The model: naive Bayes over byte n-grams, which an automaton finds."""

    def __init__(self):
        model = LanguageIdentifier.from_model_file(MODEL_FILE)
        self.encode = model._encode
        self.names, self.name_of_class = np.unique(model.nb_classes, return_inverse=True)  # two have two scripts
        self.automaton = (np.asarray(model.tk_nextmove), np.asarray(model.tk_row, np.int64) << 8)
        self.automaton += (np.asarray(model.tk_output, np.int64), np.asarray(model.nb_ptc, np.float32))
        self.counts = np.zeros(len(model.nb_ptc), np.int64)
        self.prior = np.asarray(model.nb_pc, np.float64)

    def detect(self, text: str) -> tuple[str, float]:
        """The likeliest language of the beginning of a text (ISO 639 code) and its probability.

        As `classify` of py3langid with norm_probs has it: the log-likelihoods are divided by the root of the text's bytes. A
        text that has nothing to tell by is of all languages alike.
        """
        data = np.frombuffer(self.encode(text[:CHARACTERS]), np.uint8)
        scores, num_features = language_scores(data, *self.automaton, self.counts)
        scores = (scores + self.prior) / len(data) ** 0.5 if num_features else scores
        chances = np.bincount(self.name_of_class, np.exp(scores - scores.max()))
        best = int(chances.argmax())
        return str(self.names[best]), float(chances[best] / chances.sum())


@cache
def languages() -> Languages:
    """The model, loaded once in a process (about 0.5 s, 130 MB)."""
    return Languages()
