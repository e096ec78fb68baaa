"""What a chat model answers, and the part of a conversation that it can still see."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from lm.chat_format import ChatFormat
from lm.conversations import Message
from lm.precision import autocast

UNLIMITED = 2048  # tokens of context of a model that names no limit: so much its users can expect


def context_of(model: PreTrainedModel) -> int:
    """Tokens that the model can read and write together."""
    return getattr(model.config, "max_position_embeddings", None) or UNLIMITED


def fit(chat: ChatFormat, messages: Sequence[Message], room: int) -> tuple[list[Message], list[int]]:
    """The newest turns whose prompt has `room` tokens at most, with the system message if there is one, and their ids.

    What is dropped are whole turns from the oldest on, a question with its answer.
    Raises: ValueError if not even the last message fits.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for start in starts:
        kept = system + list(messages[start:])
        if len(ids := chat.prompt(kept)) <= room:
            return kept, ids
    raise ValueError(
        f"the message has {len(ids)} tokens, with the system message if there is one, {room} fit: write a shorter one, or lower"
        " --max_new_tokens"
    )


def generation_config(
    model: PreTrainedModel, chat: ChatFormat, max_new_tokens: int, temperature: float, top_p: float, top_k: int
) -> GenerationConfig:
    """Replies that end where the model ends its turn or the document; no other control token is ever written."""
    stop = chat.stop_ids
    never = [id_ for id_ in chat.control if id_ not in stop]
    never += range(len(chat.tokenizer), model.config.vocab_size)  # of a padded vocabulary
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
        suppress_tokens=never or None,
        **sampling,
    )


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompt: list[int],
    config: GenerationConfig,
    precision: str,
    streamer: BaseStreamer | None = None,
) -> str:
    """The assistant's next turn after a prompt, without the token that ends it. Draws from torch's global generators.

    Leaves the model in the mode that it was in.
    """
    was_training, own = model.training, model.generation_config
    ids = torch.tensor([prompt], device=model.device)
    model.eval()
    model.generation_config = config
    try:
        with autocast(model.device, precision):
            found = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer)
    finally:
        model.train(was_training)
        model.generation_config = own
    return chat.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
