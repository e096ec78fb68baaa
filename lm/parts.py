"""Tensors that several processes write into one folder, each its rows: safetensors, in torch's distributed checkpoint layout.

Read back into tensors that are divided among any number of processes, or not at all; nothing is pickled.
"""

import contextlib
import re
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def in_parts(folder: Path) -> bool:
    """Whether the tensors in this folder were written by `write_parts`."""
    return any(folder.glob("shard-*.safetensors"))


def write_parts(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Write what this process has of the tensors; all processes of `group` call this, and return when all is written.

    Raises: OSError on every process if one of them could not write.
    """
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writer.per_thread_copy_ahead = 0  # all is in CPU memory: no stream of the first GPU is needed to copy it
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise OSError(f"{folder}: {_why(error)}") from None


def see_all(folder: Path, tensors: dict[str, torch.Tensor], patience: float = 60.0) -> None:
    """Return when this process sees what all have written; what a network file system shows may be a minute old.

    Raises: OSError if it does not come to see that, as where each node has a disk of its own.
    """
    needed, deadline = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, time.monotonic() + patience
    while True:
        with contextlib.suppress(ValueError):
            if {name: shape for name, (shape, _) in shapes_in(folder).items()} == needed:
                return
        if time.monotonic() > deadline:
            raise OSError(f"{folder} has not what all processes wrote: put --output_dir where all of them see the same files")
        time.sleep(0.5)


def shapes_in(folder: Path) -> Shapes:
    """Shape and dtype of each tensor in the folder. Raises: ValueError if it cannot be read, or has gaps."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read ({error!s:.200}): pass another checkpoint") from None
    for name, about in found.items():
        if sum(chunk.sizes.numel() for chunk in about.chunks) != about.size.numel():
            raise ValueError(f"{folder} has not all parts of {name}: pass another checkpoint")
    return {name: (tuple(about.size), about.properties.dtype) for name, about in found.items()}


def read_parts(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill the tensors with what the folder has under their names; if they are divided, all processes call this.

    Raises: ValueError if something is missing, in part too, or of another shape.
    """
    shapes_in(folder)  # torch would leave what is not there as it was
    divided = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be for tensors that are whole
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not divided)
    except CheckpointException as error:
        raise ValueError(f"{folder} cannot be read ({_why(error)}): pass another checkpoint") from None


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers by name, a tied one once."""
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), (name, tensor.detach()))
    return dict(names.values())


def _why(error: CheckpointException) -> str:
    failures = [str(failure) for failure, _ in error.failures.values()]
    return re.sub(r"\s+", " ", failures[0] if failures else str(error))[:300]
