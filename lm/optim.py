"""Optimizers by name, their parameter groups, and what they remember of each parameter, in one place."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor

from lm.fsdp import is_sharded, local
from lm.sharded_optim import BLOCK, MIN_8BIT, AdafactorOfRows, AdamW8bitOfRows, fits_8bit

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "muon", "sgd"]
Decay = Literal["matrices", "all"]
Moments = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype by name


def make_optimizer(
    name: OptimizerName,
    model: torch.nn.Module,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: Decay = "matrices",
) -> torch.optim.Optimizer:
    """An optimizer with each parameter of `model` in one group; with a learning rate of 0 it changes no weight.

        adamw      Loshchilov and Hutter, arXiv 1711.05101; torch's fused kernel
        adamw8bit  AdamW whose moments are kept in 8 bits (Dettmers et al., arXiv 2110.02861); bitsandbytes
        adafactor  no first moment, second moments of rows and columns (Shazeer and Stern, arXiv 1804.04235); torch's update
                   number t moves a parameter by min(lr, 1 / sqrt(t)) of its root mean square (at least .001): lr is relative
        muon       orthogonalised momentum of .95 (Jordan et al., kellerjordan.github.io/posts/muon) for the matrices between
                   embeddings and head, with updates as large as AdamW's, so that its lr fits (Liu et al., arXiv 2502.16982);
                   AdamW for all others
        sgd        with momentum betas[0], and weight decay as a part of the gradient

    Args:
        betas, eps: of AdamW; the others have their own where nothing is said.
        decay: what weight decay is for: matrices and embeddings, not biases and norms; or all, as in OLMo.
    Raises: RuntimeError if there is no bitsandbytes for adamw8bit.
    """
    groups = parameter_groups(name, model, weight_decay, decay)
    if name == "adamw8bit" and not is_sharded(model):
        return _bitsandbytes().AdamW8bit(groups, lr=lr, betas=betas, eps=eps, min_8bit_size=MIN_8BIT)
    if name == "adamw8bit":
        _bitsandbytes()
        return WithAdamW(groups, lambda own: AdamW8bitOfRows(own, lr, betas, eps), lr, betas, eps)
    if name == "adafactor":
        return (AdafactorOfRows if is_sharded(model) else torch.optim.Adafactor)(groups, lr=lr)
    if name == "muon":
        return WithAdamW(groups, lambda own: torch.optim.Muon(own, lr=lr, adjust_lr_fn="match_rms_adamw"), lr, betas, eps)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=betas[0])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim  # only here: it takes seconds, and looks for a GPU's libraries
    except ImportError as error:
        raise RuntimeError(
            f"no bitsandbytes ({error!s:.200}), --optimizer adamw8bit needs it: pip install bitsandbytes, or pass --optimizer"
            " adamw"
        ) from None
    return optim


def parameter_groups(name: OptimizerName, model: torch.nn.Module, weight_decay: float, decay: Decay) -> list[dict[str, Any]]:
    """Each parameter in one group, which says by which rule it is updated ("rule") and its weight decay."""
    parameters = list(model.parameters())
    rules = dict.fromkeys(parameters, name)
    if name == "muon":
        outside = _embeddings(model)
        rules = {p: "muon" if p.ndim == 2 and p not in outside else "adamw" for p in parameters}
    if name == "adamw8bit" and is_sharded(model):
        rules = {p: "adamw8bit_rows" if fits_8bit(p) else "adamw" for p in parameters}
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    for p in parameters:
        key = rules[p], weight_decay if p.ndim >= 2 or decay == "all" else 0.0
        groups.setdefault(key, []).append(p)
    return [{"params": own, "weight_decay": share, "rule": rule} for (rule, share), own in groups.items()]


def _embeddings(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """The weights of every table (tokens, positions) and of the head, tied or not."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {parameter for module in tables + ends if module is not None for parameter in module.parameters()}


class WithAdamW(torch.optim.Optimizer):
    """An optimizer for the parameters of its rule, torch's AdamW for the others: one list of groups, one state."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        adamw, others = ([g for g in groups if (g["rule"] == "adamw") == is_adamw] for is_adamw in (True, False))
        self._parts = [make(others)] if others else []
        self._parts += [torch.optim.AdamW(adamw, lr=lr, betas=betas, eps=eps, fused=True)] if adamw else []
        super().__init__([group for part in self._parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each parameter once by its rule."""
        for part in self._parts:  # pointed to at each step, as loading a state replaces groups and state
            is_adamw = isinstance(part, torch.optim.AdamW)
            part.param_groups = [g for g in self.param_groups if (g["rule"] == "adamw") == is_adamw]
            part.state = self.state
            part.step()


def set_beta1(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the first beta, or the momentum, of every parameter group."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (value, *group["betas"][1:])
        elif "momentum" in group:
            group["momentum"] = value


def group_of(optimizer: torch.optim.Optimizer) -> dict[torch.nn.Parameter, dict[str, Any]]:
    """The group of each parameter."""
    return {parameter: group for group in optimizer.param_groups for parameter in group["params"]}


def moments_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """What the optimizer remembers of a parameter; nothing if it was never updated."""
    return {moment: torch.as_tensor(value) for moment, value in optimizer.state.get(parameter, {}).items()}


def needed_moments(group: dict[str, Any], parameter: torch.nn.Parameter) -> Moments:
    """The name, shape and dtype of all that an optimizer of `make_optimizer` remembers of a float32 parameter of this group."""
    shape, rule = tuple(parameter.shape), group["rule"]
    like, count = (shape, torch.float32), ((), torch.float32)
    if rule in ("muon", "sgd"):
        return {"momentum_buffer": like}
    if rule == "adafactor" and parameter.ndim < 2:
        return {"step": count, "variance": like}
    if rule == "adafactor":
        row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        return {"step": count, "row_var": (row, torch.float32), "col_var": (column, torch.float32)}
    if rule == "adamw8bit_rows":
        scales = ((shape[0], shape[1] // BLOCK), torch.float32)
        codes = (shape, torch.uint8)
        return {"step": count, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}
    if rule == "adamw8bit" and parameter.numel() < MIN_8BIT:
        return {"step": ((), torch.int64), "state1": like, "state2": like}
    if rule == "adamw8bit":
        codes, values = (shape, torch.uint8), ((256,), torch.float32)  # of each of the 256 codes
        scales = ((-(-parameter.numel() // BLOCK),), torch.float32)
        first = {"state1": codes, "qmap1": values, "absmax1": scales}
        return {"step": ((), torch.int64)} | first | {"state2": codes, "qmap2": values, "absmax2": scales}
    return {"step": count, "exp_avg": like, "exp_avg_sq": like}


def put_moments(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: torch.nn.Parameter, moments: dict[str, torch.Tensor]
) -> None:
    """Give the optimizer back what `moments_of` said of a parameter, each on the device where it is needed."""
    device, kept = local(parameter).device, (name for name in moments if name != "step")
    state = {name: moments[name] if isinstance(moments[name], DTensor) else moments[name].to(device) for name in kept}
    if "step" in moments:
        step = moments["step"]
        if group["rule"] == "adamw8bit":
            state["step"] = int(step)
        else:  # counted on the device by fused and capturable ones
            state["step"] = step.to(device) if group.get("fused") or group.get("capturable") else step
    optimizer.state[parameter] = state
