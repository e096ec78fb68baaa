"""Text that a model writes while it is trained, so that people can read how it gets on."""

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from lm.characters import prepare_text
from lm.fsdp import device_of
from lm.precision import autocast


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The ids of a prompt; of an empty one the EOS that stands before every document."""
    ids = tokenizer(prepare_text(tokenizer, prompt), add_special_tokens=False).input_ids if prompt else []
    return ids or [tokenizer.eos_token_id]


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: list[int], num_tokens: int, seed: int, precision: str
) -> str:
    """`num_tokens` tokens drawn from the model's own distribution after `prompt`, as text; the same for the same seed.

    Ids that the tokenizer has not (of a padded vocabulary) are never drawn, and the text goes on after an EOS. Leaves the model
    in the mode it was in; seeds torch's global generators.
    """
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=num_tokens,
        pad_token_id=0,
        eos_token_id=None,
        suppress_tokens=beyond or None,
        remove_invalid_values=True,  # a model that has diverged writes something, and its run goes on
    )
    was_training, own = model.training, model.generation_config
    device = device_of(model)
    ids = torch.tensor([prompt], device=device)
    torch.manual_seed(seed)
    model.eval()
    model.generation_config = config
    try:
        with autocast(device, precision):
            found = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.train(was_training)
        model.generation_config = own
    return tokenizer.decode(found[0, len(prompt) :])
