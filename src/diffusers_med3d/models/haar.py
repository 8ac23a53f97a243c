"""Start an autoencoder as a truncated Haar wavelet transform instead of at random.

A deep stack of strided convolutions learns the large modes of an image quickly and fine detail last, because detail has
little variance (Saxe et al. 2014, arXiv 1312.6120). Here the linear path through the residual network (first
convolution, shortcuts, down- and upsampling) computes the coarsest Haar coefficients and their inverse, and the
residual branches start at zero, so training starts from a sharp linear code and learns what is missing. A channel that
is constant dominates the statistics of the last GroupNorms, which would otherwise erase absolute intensity.
"""

import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

from .autoencoder import AutoencoderKL3D

CONSTANT = 10.0
"""Value of the constant channel in front of the last GroupNorm of encoder and decoder."""


def haar_filter(band: tuple[int, int, int]) -> Tensor:
    """Signs (2, 2, 2) of a 3D Haar band: +1 everywhere for (0, 0, 0), alternating along the axes whose bit is 1."""
    signs = [torch.tensor([1.0, -1.0 if bit else 1.0]) for bit in band]
    return torch.einsum("i,j,k->ijk", *signs)


def _coarsest(orders: list[int], keep: int) -> list[tuple[int, tuple[int, int, int]]]:
    """The ``keep`` coarsest (channel, band) pairs of a further split of channels with the given detail orders."""
    bands = [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    pairs = [(channel, band) for channel in range(len(orders)) for band in bands]
    return sorted(pairs, key=lambda pair: 2 * orders[pair[0]] + sum(pair[1]))[:keep]


@torch.no_grad()
def haar_init_(autoencoder: AutoencoderKL3D) -> AutoencoderKL3D:
    """Overwrite the initial weights in place; weights that the transform does not need stay random.

    Raises:
        ValueError: attention, nearest-neighbour upsampling or several norm groups, with which this does not work.
    """
    config = autoencoder.config
    attention = any(config.attention_levels) or config.with_encoder_nonlocal_attn or config.with_decoder_nonlocal_attn
    if attention or not config.use_convtranspose or config.norm_num_groups != 1:
        raise ValueError(
            "haar_init_ needs an autoencoder without attention, with use_convtranspose=True and norm_num_groups=1, got "
            f"attention {attention}, use_convtranspose {config.use_convtranspose}, groups {config.norm_num_groups}."
        )
    channels, latents = list(config.channels), config.latent_channels
    for module in autoencoder.modules():
        if isinstance(module, AEKLResBlock):
            _zero(module.conv2.conv)

    # Encoder: split level by level, keeping what the next level has room for
    splits, orders = [], [0] * config.in_channels
    carried = config.in_channels
    blocks = iter(autoencoder.encoder.blocks)
    _identity(next(blocks).conv, carried)
    for level, width in enumerate(channels):
        for block in (next(blocks) for _ in range(_blocks_at(config.num_res_blocks, level))):
            _pass_through(block, carried, constant=level == len(channels) - 1)
        if level == len(channels) - 1:
            break
        last = level == len(channels) - 2
        split = _coarsest(orders, min(8 * carried, width, latents if last else width))
        down = next(blocks).conv.conv
        _clear_rows(down, len(split))
        for row, (channel, band) in enumerate(split):
            down.weight[row, channel, :2, :2, :2] = haar_filter(band) / 8
        splits.append(split)
        orders = [2 * orders[channel] + sum(band) for channel, band in split]
        carried = len(split)
    next(blocks)  # GroupNorm
    mean, std = _constant_statistics(channels[-1])
    scales = torch.tensor([2.0 if order == 0 else 8.0 for order in orders])  # about unit variance
    head = next(blocks).conv
    _identity(head, carried, std * scales, mean * scales)
    _identity(autoencoder.quant_conv_mu.conv, carried)
    _zero(autoencoder.quant_conv_log_sigma.conv)
    autoencoder.quant_conv_log_sigma.conv.bias.fill_(-8.0)

    # Decoder: the inverse
    _identity(autoencoder.post_quant_conv.conv, carried)
    blocks = iter(autoencoder.decoder.blocks)
    _identity(next(blocks).conv, carried, 1 / scales)
    for level in reversed(range(len(channels))):
        for block in (next(blocks) for _ in range(_blocks_at(config.num_res_blocks, level))):
            _pass_through(block, carried, constant=level == 0)
        if level == 0:
            break
        split = splits[level - 1]
        carried = len(splits[level - 2]) if level > 1 else config.in_channels
        up = next(blocks).deconv
        up.weight[:, :carried] = 0
        up.bias[:carried] = 0
        for row, (channel, band) in enumerate(split):
            up.weight[row, channel] = haar_filter(band)
    next(blocks)  # GroupNorm
    mean, std = _constant_statistics(channels[0])
    _identity(next(blocks).conv, carried, torch.full((carried,), std), torch.full((carried,), mean))
    return autoencoder


def _blocks_at(num_res_blocks: int | list[int], level: int) -> int:
    return num_res_blocks if isinstance(num_res_blocks, int) else num_res_blocks[level]


def _zero(convolution: nn.Conv3d) -> None:
    for parameter in convolution.parameters():
        parameter.zero_()


def _clear_rows(convolution: nn.Conv3d, rows: int) -> None:
    for parameter in convolution.parameters():
        parameter[:rows] = 0


def _identity(convolution: nn.Conv3d, rows: int, scales: Tensor | None = None, biases: Tensor | None = None) -> None:
    """The first ``rows`` outputs become scale x the input of the same index + bias."""
    _clear_rows(convolution, rows)
    centre = convolution.kernel_size[0] // 2
    for row in range(rows):
        convolution.weight[row, row, centre, centre, centre] = 1.0 if scales is None else scales[row]
    if biases is not None:
        convolution.get_parameter("bias")[:rows] = biases


def _pass_through(block: AEKLResBlock, carried: int, constant: bool) -> None:
    """Make a shortcut hand on the carried channels, and if asked fill its last output with the constant."""
    if isinstance(block.nin_shortcut, nn.Identity):
        return
    shortcut = block.nin_shortcut.conv
    _identity(shortcut, carried)
    if constant and carried < shortcut.out_channels:
        shortcut.weight[-1] = 0
        shortcut.bias[-1] = CONSTANT


def _constant_statistics(channels: int) -> tuple[float, float]:
    """Mean and standard deviation over ``channels`` channels of which one is the constant and the others are small."""
    mean = CONSTANT / channels
    return mean, (CONSTANT**2 / channels - mean**2) ** 0.5
