"""models/convolution.py: small convolutions by oneDNN are torch's convolutions."""

import torch
from torch import nn

from diffusers_med3d.models.convolution import SmallConv3d, quicken_small_convolutions


def test_a_small_convolution_and_its_gradients_are_torchs():
    torch.manual_seed(0)
    plain = nn.Conv3d(6, 5, 3, padding=1)
    network = nn.Sequential(nn.Conv3d(6, 5, 3, padding=1))
    network[0].load_state_dict(plain.state_dict())
    quicken_small_convolutions(network)
    assert type(network[0]) is SmallConv3d
    x = torch.randn(1, 6, 4, 4, 4, requires_grad=True)
    results = []
    for layer in (plain, network[0]):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight, layer.bias))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_strided_and_grouped_convolutions_stay_torchs():
    network = nn.ModuleList([nn.Conv3d(4, 4, 3, stride=2), nn.Conv3d(4, 4, 3, groups=2)])
    quicken_small_convolutions(network)
    assert all(type(layer) is nn.Conv3d for layer in network)


def test_autocast_still_computes_in_bfloat16():
    network = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1))
    quicken_small_convolutions(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(torch.randn(1, 4, 4, 4, 4)).dtype == torch.bfloat16
