"""Muon: momentum whose matrices are made orthogonal before they become steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base import bf16_is_fast

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b and c of the Newton-Schulz iteration (Jordan et al. 2024)."""
ITERATIONS = 5


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix (m, n) with all its singular values brought near 1.

    Five quintic Newton-Schulz iterations on X / ||X||_F (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):

        X <- a X + (b X X^T + c (X X^T)^2) X

    They run in bfloat16 where the device computes in it natively, else in float32: other CPUs emulate bfloat16, which
    takes longer than the whole training step around it.

    Returns:
        (m, n) in the dtype of the iterations, singular values from about 0.7 to 1.2.
    """
    a, b, c = COEFFICIENTS
    dtype = torch.bfloat16 if bf16_is_fast(on_gpu=matrix.device.type == "cuda") else torch.float32
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).to(dtype)  # X X^T is then the smaller of the two products
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the other parameters, in one optimizer.

    For a matrix W (out, in) with gradient G, learning rate lr and weight decay w (Jordan et al. 2024, the scale of the
    step from Liu et al. 2025, arXiv 2502.16982, equation 4):

        M <- m M + (1 - m) G
        O  = orthogonalized(m M + (1 - m) G)                          Nesterov momentum
        W <- W - lr w W - lr 0.2 sqrt(max(out, in)) O

    The scale makes a step as large as AdamW's (root mean square 0.2), so that both share one learning rate. A kernel
    (out, in, x, y, z) is the matrix (out, in x y z). AdamW is Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2.

    Args:
        matrices: parameters with at least two dimensions.
        others: parameters of AdamW: biases, norms, embeddings, first and last layers.
        lr, weight_decay: of both.
        momentum: m.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "use_muon": True, "momentum": momentum},
            {"params": list(others), "use_muon": False, "betas": betas, "eps": eps},
        ]
        for parameter in groups[0]["params"]:
            if parameter.ndim < 2:
                raise ValueError(f"Muon works on matrices, got a parameter of shape {tuple(parameter.shape)}.")
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay as they are.

        Args:
            closure: computes the loss and the gradients again, as in torch's optimizers.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._muon if group["use_muon"] else self._adamw)(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: nn.Parameter, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = orthogonalized(gradient.lerp(momentum, group["momentum"]).flatten(1))
        size = 0.2 * max(update.shape) ** 0.5
        parameter.add_(update.reshape(parameter.shape).to(parameter.dtype), alpha=-group["lr"] * size)

    def _adamw(self, parameter: nn.Parameter, gradient: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean_correction, square_correction = (1 - beta ** group["step"] for beta in group["betas"])
        mean = state["exp_avg"].lerp_(gradient, 1 - group["betas"][0])
        square = state["exp_avg_sq"].lerp_(gradient.square(), 1 - group["betas"][1])
        root = (square / square_correction).sqrt().add_(group["eps"])
        parameter.addcdiv_(mean, root, value=-group["lr"] / mean_correction)
