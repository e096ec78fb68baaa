"""Conversations as token ids by the tokenizer's chat template, and which of them are the assistant's."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lm.conversations import Message

TOGETHER = 256  # conversations that are encoded at once
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
REMEDY = "make the tokenizer with train_tokenizer.py --chat, and pretrain with it"
Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Example:
    """One conversation as ids, ending with a reply."""

    ids: np.ndarray  # int32 (T,)
    trained: np.ndarray  # bool (T,): a token that the assistant writes, the one that ends its turn too


class ChatFormat:
    """A tokenizer with a chat template whose {% generation %} blocks end with a special token.

    Text and template are encoded apart wherever a reply begins or ends, so that the prompt of a reply has the ids here that it
    has when the model is asked for it: no token lies half in the prompt.

    Raises: ValueError if the tokenizer has no such template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str):
        self.tokenizer = tokenizer
        if not isinstance(tokenizer.chat_template, str):
            raise ValueError(f"the tokenizer of {name} has no chat template: {REMEDY}")
        self.control = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids, spans = next(self._encoded([PROBE]))
        if len(spans) != 1 or int(ids[spans[0][1] - 1]) not in self.control:
            raise ValueError(
                f"the chat template of {name} does not end a reply with a special token inside {{% generation %}}, by which"
                f" the model could learn where to stop: {REMEDY}"
            )
        self.stop_id = int(ids[spans[0][1] - 1])

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a reply: that of the template, and the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return [self.stop_id] if eos in (None, self.stop_id) else [self.stop_id, eos]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the assistant's next turn begins."""
        pieces, _ = self._pieces(list(messages), add_generation_prompt=True)
        return [id_ for ids in self._ids(pieces) for id_ in ids]

    def examples(self, conversations: Sequence[Sequence[Message]], seq_len: int) -> tuple[list[Example], Counter[str]]:
        """Each conversation up to its last reply that ends within `seq_len` tokens, and what was cut or left out.

        Whole turns are dropped, so that no reply is cut. A conversation whose first reply ends later is left out.
        """
        found, counts = [], Counter(shortened=0, left_out=0, turns_cut=0)
        for ids, spans in self._encoded(conversations):
            fitting = [span for span in spans if span[1] <= seq_len]
            counts["turns_cut"] += len(spans) - len(fitting)
            counts["left_out"] += not fitting
            counts["shortened"] += 0 < len(fitting) < len(spans)
            if fitting:
                trained = np.zeros(fitting[-1][1], dtype=bool)
                for start, stop in fitting:
                    trained[start:stop] = True
                found.append(Example(ids[: len(trained)], trained))
        return found, counts

    def _encoded(self, conversations: Sequence[Sequence[Message]]) -> Iterator[tuple[np.ndarray, Spans]]:
        """The ids of each conversation, and the spans of them that are replies."""
        for start in range(0, len(conversations), TOGETHER):
            made = [self._pieces(list(messages)) for messages in conversations[start : start + TOGETHER]]
            encoded = iter(self._ids([piece for pieces, _ in made for piece in pieces]))
            for pieces, is_reply in made:
                parts = [next(encoded) for _ in pieces]
                ends = np.cumsum([len(ids) for ids in parts])
                spans = [(int(e) - len(ids), int(e)) for ids, e, own in zip(parts, ends, is_reply, strict=True) if own]
                yield np.concatenate([np.array(ids, dtype=np.int32) for ids in parts]), spans

    def _pieces(self, messages: list[Message], add_generation_prompt: bool = False) -> tuple[list[str], list[bool]]:
        """The text of a conversation cut where replies begin and end, and which of the pieces are replies."""
        (text,), (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map,
        )
        cuts = [0, *(end for span in spans for end in span), len(text)]
        pieces = [text[start:stop] for start, stop in pairwise(cuts)]
        return pieces, [number % 2 == 1 for number in range(len(pieces))]

    def _ids(self, pieces: list[str]) -> list[list[int]]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(pieces, add_special_tokens=False)]
