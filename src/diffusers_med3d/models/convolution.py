"""Convolutions of small inputs on a CPU: by oneDNN, where torch takes its slow loop."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """A 3D convolution of stride 1, by oneDNN for float32 on a CPU.

    torch 2.13 asks oneDNN only for two samples or more, or for batch x channels x X x Y above 20,480. Otherwise its own
    loop runs, which took 2.4 times as long for one sample of 64 channels at 16^3 (24.7 and 10.4 ms on an AVX2 core) and
    makes a copy of the input for every voxel of the kernel.
    """
    if use_onednn(x):
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1, 1), (1, 1, 1), 1)
    return F.conv3d(x, weight, bias, padding=padding)


def use_onednn(x: Tensor) -> bool:
    """Whether oneDNN takes this input; under autocast and in compiled code torch chooses."""
    return bool(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class SmallConv3d(nn.Conv3d):
    """``nn.Conv3d`` of stride 1 that computes with `convolve`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)  # see quicken_small_convolutions
        x, y, z = self.padding
        return convolve(input, weight, bias, (int(x), int(y), int(z)))


def quicken_small_convolutions(network: nn.Module) -> None:
    """Let the stride-1 convolutions of a network compute with `convolve`. Weights and their names stay."""
    for module in network.modules():
        plain = type(module) is nn.Conv3d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if plain and module.stride == module.dilation == (1, 1, 1) and module.groups == 1:
            module.__class__ = SmallConv3d
