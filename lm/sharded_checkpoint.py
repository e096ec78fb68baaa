"""Checkpoints of a model that is divided among processes (lm/fsdp.py), each of which writes its part, beside the training.

RUN/checkpoints/step_00000200/
    config.json, state.json, manifest.json   as in lm/checkpoint.py; the main process writes them
    shard-00001-*.safetensors, ...           one for each process: its rows of weights ("model.norm.weight") and of moments
                                             ("model.norm.weight/exp_avg")

RUN/final is whole, and the same as without FSDP. All processes must see the folder.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lm.checkpoint import Checkpoints, load_checkpoint, write_folder
from lm.files import write_json
from lm.fsdp import assign, is_sharded, like, local, reshard
from lm.models import load_weights
from lm.optim import group_of, moments_of, needed_moments, put_moments
from lm.parts import Shapes, in_parts, read_parts, see_all, shapes_in, weights_of, write_parts


class ShardedCheckpoints(Checkpoints):
    """As `Checkpoints`, but every process calls `save` and `save_model`, and writes.

    While a checkpoint is written the processes speak through a group of their own: in that of the training, messages of two
    threads would mix.
    """

    def __init__(self, folder: Path, keep: int, main: bool):
        super().__init__(folder, keep, main)
        self._group = dist.new_group(backend="gloo")
        self._mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()))  # of the copies

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy this process's part now, write it in the background. Waits only if two writes are not done yet."""
        reshard(model)
        tensors = weights_of(model) | {
            f"{name}/{moment}": value
            for name, parameter in model.named_parameters()
            for moment, value in moments_of(optimizer, parameter).items()
        }

        def publish(copies: dict[str, torch.Tensor]) -> None:
            parts = {name: self._divided(copies[name], tensors[name]) for name in sorted(tensors)}  # in which they are written
            path, begun = self.folder / f"step_{step:08d}", False

            def write(folder: Path) -> None:
                nonlocal begun
                begun = True
                self._agree(True)
                write_parts(folder, parts, self._group)
                if self.main:
                    see_all(folder, parts)
                    model.config.save_pretrained(folder)
                    write_json(folder / "state.json", {"step": step} | state)

            if not self.main:
                self._agree(True)
                write_parts(path.with_name(f".{path.name}.partial"), parts, self._group)
                return
            try:
                self.set_aside_if_damaged(path)
                write_folder(path, write)
            finally:
                if not begun:
                    self._agree(False)
            self.prune()

        self._copy_and(publish, {name: local(tensor) for name, tensor in tensors.items()})

    def save_model(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict) -> None:
        """Gather the model in the main process's memory, and write it there as `Checkpoints.save_model` does."""
        reshard(model)
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if self.main:
            with torch.device("meta"):  # the class that this one was before it was divided, for its config and code
                undivided = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
            undivided.generation_config = model.generation_config
            undivided.state_dict = lambda: weights
            super().save_model(path, undivided, tokenizer, about)

    def _divided(self, copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return like(copy, tensor, mesh=self._mesh) if isinstance(tensor, DTensor) else copy

    def _agree(self, ready: bool) -> None:
        """Raise OSError unless all processes are ready to write."""
        flag = torch.tensor(int(ready))
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._group)
        if ready and not flag:
            raise OSError("the main process could not begin a checkpoint: its message says why")


def load_any(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back, bit for bit, whichever kind of checkpoint and of model these are, and however many
    processes wrote it; but adamw8bit's moments are laid out otherwise with FSDP than without. Every process calls this.

    Raises: ValueError, naming folder and tensor, if they are not those of this model and optimizer.
    """
    if not (is_sharded(model) or in_parts(path)):
        load_checkpoint(path, model, optimizer)
        return
    reshard(model)
    there, weights = shapes_in(path), weights_of(model)
    parameters, groups = dict(model.named_parameters()), group_of(optimizer)
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name in sorted({name.rpartition("/")[0] for name in there if "/" in name} & parameters.keys()):
        parameter = parameters[name]
        for moment, (shape, dtype) in needed_moments(groups[parameter], parameter).items():
            moments.setdefault(name, {})[moment] = _empty(parameter, groups[parameter]["rule"], shape, dtype)
    wanted = {f"{name}/{moment}": value for name, own in moments.items() for moment, value in own.items()}
    if in_parts(path):
        wanted |= weights
    else:  # transformers knows what it calls weights on the disk
        there = {name: about for name, about in there.items() if "/" in name}
        _load_weights(path, model, weights)
    needed = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in wanted.items()}
    if faults := _unfit(there, needed):
        raise ValueError(
            f"{path} does not fit model and optimizer ({'; '.join(faults[:3])}): pass another checkpoint (with"
            " adamw8bit, one that was written with --fsdp if that is given, and without if not)"
        )
    read_parts(path, wanted)
    optimizer.state.clear()
    for name, own in moments.items():
        put_moments(optimizer, groups[parameters[name]], parameters[name], own)


def _load_weights(path: Path, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Divide the weights of a checkpoint that one process wrote."""
    undivided = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    load_weights(path, undivided)
    values = undivided.state_dict()
    for name, tensor in weights.items():
        assign(tensor, values[name])


def _unfit(there: Shapes, needed: Shapes) -> list[str]:
    """What speaks against the tensors that are there, the first of each kind."""
    other = [name for name in sorted(there.keys() & needed.keys()) if there[name] != needed[name]]
    faults = [f"{name} is not there" for name in sorted(needed.keys() - there.keys())[:1]]
    faults += [f"{name} is of something else" for name in sorted(there.keys() - needed.keys())[:1]]
    return faults + [f"{name} is {_said(there[name])}, {_said(needed[name])} is needed" for name in other[:1]]


def _said(shape_and_dtype: tuple[tuple[int, ...], torch.dtype]) -> str:
    return " of ".join(map(str, shape_and_dtype))


def _empty(parameter: torch.Tensor, rule: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to read a moment into, divided where the optimizer has it so: row for row as the parameter is."""
    if not isinstance(parameter, DTensor) or not shape or rule == "adafactor":
        return torch.zeros(shape, dtype=dtype)
    part = parameter.to_local()
    return like(torch.zeros((len(part), *shape[1:]), dtype=dtype, device=part.device), parameter, torch.Size(shape))
