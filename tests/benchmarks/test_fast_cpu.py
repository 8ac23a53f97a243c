"""benchmarks/fast_cpu: convolutions by Winograd's algorithm."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_winograds_convolution_and_its_gradients_are_torchs(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks" / "fast_cpu"), *sys.path])
    from winograd import Winograd

    x = torch.randn(2, 16, 6, 8, 4, requires_grad=True)
    weight, bias = torch.randn(32, 16, 3, 3, 3, requires_grad=True), torch.randn(32, requires_grad=True)
    gradient = torch.randn(2, 32, 6, 8, 4)
    results = []
    for y in (Winograd.apply(x, weight, bias), F.conv3d(x, weight, bias, padding=1)):
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), gradient)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
