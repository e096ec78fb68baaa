"""Optimizers whose libraries do not know parameters that are divided among processes by rows (lm/fsdp.py)."""

import torch
from torch.distributed.tensor import DTensor

from lm.fsdp import assign, like, local

BLOCK = 256  # 8-bit elements that share a scale: the size that bitsandbytes' kernels have for optimizers
MIN_8BIT = 4096  # elements: the moments of smaller parameters stay in float32 (Dettmers et al., arXiv 2110.02861)


def fits_8bit(parameter: torch.Tensor) -> bool:
    """Whether rows of this parameter are whole blocks of 8-bit elements, so that any process can hold any of them."""
    return parameter.ndim == 2 and parameter.shape[1] % BLOCK == 0 and parameter.numel() >= MIN_8BIT


class AdamW8bitOfRows(torch.optim.Optimizer):
    """AdamW with both moments in 8 bits (Dettmers et al., arXiv 2110.02861) by bitsandbytes' kernel, on each process's rows.

    No block of elements that share a scale reaches over the end of a row. The moments are then the same however many
    processes there are, and the same numbers as bitsandbytes' own optimizer has for a matrix that is not divided.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        from bitsandbytes import functional  # only here: it takes seconds, and looks for a GPU's libraries

        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._update = functional.optimizer_update_8bit_blockwise
        self._codes = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter once."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_one(parameter, group)

    def _update_one(self, parameter: torch.Tensor, group: dict) -> None:
        rows, state = local(parameter), self.state[parameter]
        if not state:
            scales = torch.Size((parameter.shape[0], parameter.shape[1] // BLOCK))
            state["step"] = torch.tensor(0.0)
            for number in (1, 2):
                part = torch.zeros(len(rows), scales[1], device=rows.device)
                state[f"absmax{number}"] = like(part, parameter, scales) if isinstance(parameter, DTensor) else part
                state[f"state{number}"] = torch.zeros_like(parameter, dtype=torch.uint8)
        state["step"] += 1
        if not rows.numel():  # fewer rows than processes
            return
        self._codes = [codes.to(rows.device) for codes in self._codes]
        names = ("state1", "state2", "absmax1", "absmax2")
        first, second, first_scales, second_scales = (local(state[name]) for name in names)
        self._update(
            "adam",
            local(parameter.grad),
            rows,
            first,
            second,
            *group["betas"],
            0.0,  # of optimizers with a third beta
            0.0,  # and with a mixture of moments
            group["eps"],
            int(state["step"]),
            group["lr"],
            *self._codes,
            first_scales.view(-1),
            second_scales.view(-1),
            group["weight_decay"],
        )


class AdafactorOfRows(torch.optim.Adafactor):
    """torch's Adafactor, one parameter at a time gathered on every process; its small moments are whole on each.

    It needs sums over columns and over all of a parameter, so that no process could update its rows alone.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter once."""
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "beta2_decay", "eps", "d", "weight_decay")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gathered = torch.nn.Parameter(parameter.full_tensor())
                gathered.grad = parameter.grad.full_tensor()
                one = torch.optim.Adafactor([gathered], **options)
                if parameter in self.state:
                    one.state[gathered] = self.state[parameter]
                one.step()
                self.state[parameter] = one.state[gathered]
                assign(parameter, gathered.detach())
