"""One model over all processes (FSDP2, torch's fully_shard): each holds its rows of every parameter, gradient and moment.

A block's parameters are whole only while it computes. The forward pass is then a common act of all processes, also in an
evaluation: each must make as many of them as the others.
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from transformers import PreTrainedModel


def shard(model: PreTrainedModel, accelerator: Accelerator, compute: torch.dtype, cpu_offload: bool) -> None:
    """Divide the model, which is the same on every process, among them: block by block, and what is outside of blocks together.

    Args:
        compute: in which parameters travel and multiply; what is kept of them, and gradients as they are summed, are float32.
        cpu_offload: what is kept, with gradients and moments, lies in CPU memory, and the optimizer computes there.
    Raises: ValueError for a parameter without dimensions.
    """
    if scalars := [name for name, parameter in model.named_parameters() if not parameter.ndim]:
        raise ValueError(f"--fsdp cannot divide {scalars[0]}, which has no dimension: make it a vector of one number")
    policies = {
        "mesh": _mesh(accelerator),
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy(),
    }
    for block in blocks(model):
        fully_shard(block, **policies)
    fully_shard(model, **policies)


def blocks(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that are gathered, and recomputed under gradient checkpointing, one at a time."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether each process has a part of the model alone."""
    return isinstance(model, FSDPModule)


def reshard(model: torch.nn.Module) -> None:
    """Give back what a forward pass left whole, as it leaves the root after an evaluation, so that parameters can be read."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a divided tensor; another one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a divided tensor, on every process, which all must ask for; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(part: torch.Tensor, tensor: torch.Tensor, shape: torch.Size | None = None, mesh: DeviceMesh | None = None) -> DTensor:
    """A divided tensor of this part: rows as those of `tensor`, of its shape or another one with as many rows."""
    shape = tensor.shape if shape is None else shape
    about = TensorMeta(shape, torch.empty(shape, device="meta").stride(), part.dtype)
    spec = DTensorSpec(tensor.device_mesh if mesh is None else mesh, tensor.placements, tensor_meta=about)
    return DTensor(part, spec, requires_grad=False)  # from_local would move it to the mesh's device: with offload, another one


def assign(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite a tensor, divided or not, with a value that is whole on every process."""
    if isinstance(tensor, DTensor):
        of_all = DTensor.from_local(value, tensor.device_mesh, [Replicate()], run_check=False)
        value = of_all.redistribute(placements=tensor.placements).to_local()
    local(tensor).copy_(value)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model computes: with --cpu_offload its parameters lie elsewhere."""
    parameter = next(model.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def _mesh(accelerator: Accelerator) -> DeviceMesh:
    if not dist.is_initialized():  # a single process, which accelerate makes no group for
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
