"""Muon as pytorch-optimizer has it, in float32 on a CPU.

The library has no argument for that. What is overridden is inside it, so pyproject.toml admits only the version that
was tested.
"""

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.muon.base import zero_power_via_newton_schulz_5


class Muon(pytorch_optimizer.Muon):
    """Muon (Jordan et al. 2024) whose Newton-Schulz iterations run in float32 where the weights are on a CPU.

    The library runs them in bfloat16 everywhere; a CPU without bfloat16 instructions emulates those products, which
    takes longer than the whole training step around them.
    """

    @staticmethod
    def _orthogonalize(group: dict, updates: list[torch.Tensor]) -> list[torch.Tensor]:
        if updates[0].device.type != "cpu":
            return pytorch_optimizer.Muon._orthogonalize(group, updates)
        settings = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        return [zero_power_via_newton_schulz_5(update.flatten(1), **settings) for update in updates]
