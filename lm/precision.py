"""The arithmetic of a forward and backward pass by name (`lm.args.Precision`); what is kept is float32 whatever it is."""

import torch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Inside, matrices multiply in this precision; with fp32 and tf32 it does nothing."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
