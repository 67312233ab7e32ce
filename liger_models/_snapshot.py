"""A model as it was: put back after it was looked at, or when changing it failed."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """What tells other models apart: a hash of the shapes and of some of the weights."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        found.update(f"{tuple(parameter.shape)} {parameter.flatten()[:8].tolist()}".encode())
    return found.hexdigest()[:16]


class _Snapshot:
    """Class, attributes, parameters, buffers, children and hooks of every module; random numbers, too.

    Parameters are remembered, not copied: nothing here writes into one. Buffers are copied, for some rotary embeddings
    write their frequencies anew in every forward pass.
    """

    def __init__(self, model: nn.Module):
        self.modules = []
        for module in model.modules():
            attributes = dict(vars(module))
            # Parameters, buffers, children and hooks lie in dicts that others hold on to.
            inside = [(x, dict(x)) for x in attributes.values() if type(x) in (dict, OrderedDict)]
            self.modules.append((module, type(module), attributes, inside))
        buffers = (x for x in model.buffers() if x.is_floating_point() and not x.is_meta)
        self.buffers = [(x, x.clone()) for x in buffers]
        self.random = torch.get_rng_state()
        devices = {x.device for x in model.parameters() if x.device.type == "cuda"}
        self.random_on = {device: torch.cuda.get_rng_state(device) for device in devices}

    @torch.no_grad()
    def put_back(self) -> None:
        for module, kind, attributes, inside in self.modules:
            if type(module) is not kind:
                module.__class__ = kind
            for held, before in ((vars(module), attributes), *inside):
                held.clear()
                held.update(before)
        for buffer, value in self.buffers:
            buffer.copy_(value)
        torch.set_rng_state(self.random)
        for device, state in self.random_on.items():
            torch.cuda.set_rng_state(state, device)


@contextmanager
def whole_or_not(model: nn.Module):
    """Whatever stops a change of the model, an interrupt too, undoes it."""
    before = _Snapshot(model)
    try:
        yield
    except BaseException:
        before.put_back()
        raise


@contextmanager
def looked_at(model: nn.Module):
    """The model in evaluation, and afterwards as it was, whatever its passes have left in it."""
    before = _Snapshot(model)
    try:
        for module in model.modules():
            module.training = False
        yield
    finally:
        before.put_back()
