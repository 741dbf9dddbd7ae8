"""A run's state on disk: one safetensors file, replaced as a whole: a kill leaves the old or the new one.

Tensors are `weight:<parameter>` and `<moment>:<parameter>`; the step stands in the file's metadata. No pickle.
"""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.training.optimizer import Optimizers
from model.training.options import OptionError


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file beside its place, see it on the disk, then move it there."""
    temporary = file.with_suffix(".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    temporary.chmod(0o644)  # safetensors makes it readable for its owner alone
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(file)


def save(file: Path, step: int, network: nn.Module, optimizers: Optimizers) -> None:
    """Write parameters and optimiser moments after `step` steps."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        tensors[f"weight:{name}"] = parameter
        for moment, value in _owner(optimizers, parameter).state[parameter].items():
            tensors[f"{moment}:{name}"] = value
    save_tensors(file, tensors, {"step": str(step)})


def load(file: Path, network: nn.Module, optimizers: Optimizers) -> int:
    """Fill network and optimisers from a checkpoint; the number of steps done, 0 without a file. Raises OptionError."""
    if not file.exists():
        return 0
    parameters = dict(network.named_parameters())
    try:
        with safe_open(file, framework="pt") as handle, torch.no_grad():
            for key in handle.keys():  # noqa: SIM118  # no mapping
                kind, name = key.split(":", 1)
                parameter, value = parameters[name], handle.get_tensor(key)
                if kind == "weight":
                    parameter.copy_(value)
                else:
                    _owner(optimizers, parameter).state[parameter][kind] = value.to(parameter.device)
            return int(handle.metadata()["step"])
    except SafetensorError as error:
        raise OptionError(f"{file}: not a checkpoint: {error}") from error


def _owner(optimizers: Optimizers, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """The optimiser that trains a parameter."""
    return next(o for o in optimizers if any(p is parameter for g in o.param_groups for p in g["params"]))
