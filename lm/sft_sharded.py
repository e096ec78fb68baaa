"""A model that FSDP2 shards over GPUs, saved and restored as the whole model that every other part of the repository knows."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedModel

from lm.checkpoint import load_checkpoint
from lm.optim import group_of, moments_of, put_moments


class Whole:
    """Model and optimizer in one piece, in the memory of the main process; the others have none.

    Args:
        model: before it is sharded.
        make_optimizer: makes the optimizer of a model.
    """

    def __init__(self, model: PreTrainedModel, make_optimizer: Any, accelerator: Accelerator):
        self.main = accelerator.is_main_process
        self.model = copy.deepcopy(model).cpu() if self.main else None
        self.optimizer = make_optimizer(self.model) if self.main else None

    def gather(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the whole what the sharded ones are; every process must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_model_state_dict(model, options=options), {}
        if optimizer.state:  # asked before the first step, torch makes a step of zeros, which Adam would count for ever
            moments = get_optimizer_state_dict(model, optimizer, options=options).get("state", {})
        if self.main:
            self.model.load_state_dict(weights)
            groups, parameters = group_of(self.optimizer), dict(self.model.named_parameters())
            for name, own in moments.items():
                put_moments(self.optimizer, groups[parameters[name]], parameters[name], own)

    def restore_moments(self, path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give the sharded optimizer the moments of a checkpoint of step 1 or later; every process must call it."""
        whole: dict[str, Any] = {}
        if self.main:
            load_checkpoint(path, self.model, self.optimizer)
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            named = [[names[own] for own in group["params"]] for group in self.optimizer.param_groups]
            # What else a group holds is of the sharded one: the learning rate is that of the step already.
            groups = [{**group, "params": own} for group, own in zip(optimizer.param_groups, named, strict=True)]
            whole = {"state": {name: moments_of(self.optimizer, p) for p, name in names.items()}, "param_groups": groups}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(model, optimizer, whole, options=options)
