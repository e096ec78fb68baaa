"""How much memory the forward and backward pass of a micro-batch take, known without computing them.

The pass is made with torch's fake tensors, which have shapes, types and devices, and no numbers: the model's own code, the real
loss and autograd make and drop what they would, and the most that is there at one time is the answer. What a kernel takes for
itself while it works, and what an allocator loses between tensors, is not seen.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, masking_utils

from lm.loss import token_losses


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in here, each until nothing holds its storage any more.

    Args: own: tensors that were there before, which do not count.
    """

    def __init__(self, own: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in own), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:  # else it is a view
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def make_pass(model: torch.nn.Module, ids_BS: torch.Tensor, packed: bool) -> None:
    """A forward and backward pass.

    Args: packed: whether rows hold several documents, each with its own positions (lm/packing.py), which needs a mask.
    """
    inputs, more = ids_BS[:, :-1], {}
    if packed:
        places = torch.arange(inputs.shape[1], device=ids_BS.device)
        more["position_ids"] = (places % max(1, len(places) // 2)).expand_as(inputs)
    token_losses(model, ids_BS[:, 1:], input_ids=inputs, **more).total.backward()


def peak_of_pass(model: torch.nn.Module, ids_BS: torch.Tensor, accumulates: bool, packed: bool = False) -> int:
    """Bytes that a pass needs at most at one time beside parameters, gradients and rows.

    Args: accumulates: whether there are gradients before it. If not, they come to be while activations are given back, and what
        counts is by how much the most that is there exceeds them.
    """
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None
    gradients = [parameter.grad for parameter in parameters if accumulates]
    with Live([*parameters, *gradients, *model.buffers(), ids_BS]) as live, _seen_as(packed):
        make_pass(model, ids_BS, packed)
    made = 0 if accumulates else sum(parameter.nbytes for parameter in parameters)
    return max(0, live.peak - made)


@contextmanager
def _seen_as(packed: bool) -> Iterator[None]:
    """transformers cannot look into fake rows, takes all of them for packed ones, and would make their mask."""
    clean = masking_utils.find_packed_sequence_indices
    if not packed:
        masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = clean


def make_model(
    config: PreTrainedConfig, device: torch.device, weights: torch.dtype, compute: torch.dtype, grad_checkpoint: bool
) -> PreTrainedModel:
    """A model to try passes with.

    Args: weights: type of its parameters; of another type than `compute`, they are cast in the forward pass (autocast).
    """
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=False).train()
    if compute != weights:
        model.forward = torch.autocast(device.type, compute)(model.forward)  # as accelerate does
    if grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class OnPaper:
    """A model without numbers (arguments as of `make_model`), made once to try several sizes."""

    def __init__(self, *arguments: Any):
        with FakeTensorMode() as self._fake:
            self._model = make_model(*arguments)

    def peak(self, micro_batch: int, seq_len: int, accumulates: bool, packed: bool) -> int:
        """As `peak_of_pass`, of so many rows of so many targets."""
        with self._fake:
            device = next(self._model.parameters()).device
            ids = torch.zeros(micro_batch, seq_len + 1, dtype=torch.int64, device=device)
            return peak_of_pass(self._model, ids, accumulates, packed)
