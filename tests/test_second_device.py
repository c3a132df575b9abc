"""The second device refuses what CUDA refuses, and computes the rest as the CPU does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.second_device import second_device


def test_a_network_learns_there_as_on_the_cpu():
    here = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    there, images = copy.deepcopy(here), torch.randn(2, 3, 8, 8)
    here(images).square().sum().backward()
    with second_device() as device:
        there.to(device)(images.to(device)).square().sum().backward()
        for one, other in zip(here.parameters(), there.parameters()):
            assert other.device.type == device and torch.equal(one.grad, other.grad.cpu())
        for one, other in zip(here.buffers(), there.buffers()):
            assert torch.equal(one, other.cpu())


def test_tensors_of_two_devices_do_not_meet():
    with second_device() as device:
        there = torch.tensor([1.0, 2.0], device=device)
        assert (there + torch.tensor(1.0) + 1).tolist() == [3.0, 4.0], "a single number of the CPU may meet them"
        for meet in (torch.add, torch.maximum, lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.cat([a, b])):
            with pytest.raises(RuntimeError, match="same device"):
                meet(there, torch.ones(2))
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
