"""Convolutions of 3 x 3 x 3 (stride 1, padding 1) by Winograd's F(2, 3), for training on a CPU without AVX512.

27 / 8 times fewer multiplications than torch's (Lavin & Gray 2015, arXiv 1509.09308), equal up to rounding (3e-6 of the
largest value). On an AMD EPYC (AVX2) the two-level network of ``brain-t1`` trains twice as fast with it. The transforms
are C++, compiled by g++ for this machine at the first import. ``run.py`` starts a script with it.
"""

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_med3d.models.convolution import SmallConv3d

_G = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
G = torch.einsum("ai,bj,ck->abcijk", _G, _G, _G).reshape(64, 27).contiguous()
"""Transform of kernels, 27 values to 64."""

LANES = 16
"""Channels that the C++ transforms take at a time."""

WORTH_IT = 64 * 64
"""Products of input and output channels from which this is faster than torch."""

FAST = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
"""What -ffast-math allows the compiler, but for what it does to the process: it turns subnormal numbers off."""


def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        target = os.path.join(folder, "libtransforms.so")
        source = str(Path(__file__).with_name("winograd.cpp"))
        command = ["g++", "-O3", "-march=native", *FAST, "-shared", "-fPIC", source, "-o", target]
        subprocess.run(command, check=True)
        return ctypes.CDLL(target)


_LIBRARY = _library()


def _call(name: str, *arguments: Tensor | int) -> None:
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
    getattr(_LIBRARY, name)(*pointers)


class Winograd(torch.autograd.Function):
    """Convolution of float32 (B, C, X, Y, Z), all sides even, with (K, C, 3, 3, 3) and a bias (K,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (batch, c, *sides), k = x.shape, len(weight)
        x = x.permute(0, 2, 3, 4, 1).contiguous()
        tiles = x.new_empty(64, x[..., 0].numel() // 8, c)
        _call("input_transform", x, tiles, batch, *sides, c)
        kernels = (G @ weight.permute(2, 3, 4, 1, 0).reshape(27, c * k)).view(64, c, k)
        y = x.new_empty(batch, *sides, k)
        _call("output_transform", torch.bmm(tiles, kernels), bias, y, batch, *sides, k)
        ctx.save_for_backward(tiles, kernels)
        ctx.sizes = (batch, *sides)
        return y.permute(0, 4, 1, 2, 3)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        tiles, kernels = ctx.saved_tensors
        _, c, k = kernels.shape
        gradient = gradient.permute(0, 2, 3, 4, 1).contiguous()
        outputs = gradient.new_empty(64, tiles.shape[1], k)
        _call("output_transform_t", gradient, outputs, *ctx.sizes, k)
        of_weight = (G.T @ torch.bmm(tiles.transpose(1, 2), outputs).view(64, c * k)).view(3, 3, 3, c, k)
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = gradient.new_zeros(*ctx.sizes, c)
            _call("input_transform_t", torch.bmm(outputs, kernels.transpose(1, 2)), of_input, *ctx.sizes, c)
            of_input = of_input.permute(0, 4, 1, 2, 3)
        return of_input, of_weight.permute(4, 3, 0, 1, 2), gradient.sum((0, 1, 2, 3))


def _fits(layer: nn.Conv3d, x: Tensor) -> bool:
    usual = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    return (
        usual == ((3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
        and layer.bias is not None
        and layer.in_channels % LANES == layer.out_channels % LANES == 0
        and layer.in_channels * layer.out_channels >= WORTH_IT
        and x.dtype == torch.float32
        and all(side % 2 == 0 for side in x.shape[2:])
    )


def install() -> None:
    """Make every fitting ``nn.Conv3d`` on a CPU use it from now on; the others get channels-last inputs."""
    original = nn.Conv3d._conv_forward

    def forward(self: nn.Conv3d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if type(self) not in (nn.Conv3d, SmallConv3d) or x.device.type != "cpu":
            return original(self, x, weight, bias)
        if _fits(self, x):
            return Winograd.apply(x, weight, bias)
        return original(self, x.contiguous(memory_format=torch.channels_last_3d), weight, bias)

    nn.Conv3d._conv_forward = SmallConv3d._conv_forward = forward
