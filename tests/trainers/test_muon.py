"""Muon against its equations in float64 and against torch's AdamW; its state survives saving."""

import pytest
import torch
from torch import nn

from diffusers_med3d.trainers import muon
from diffusers_med3d.trainers.muon import Muon, orthogonalized


def quintic(matrix: torch.Tensor) -> torch.Tensor:
    """Five iterations as Jordan et al. 2024 print them, in float64."""
    x = matrix.double()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def gradients(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(6, 108), (40, 8), (16, 16)])
def test_singular_values_come_near_one_as_the_quintic_says(shape, monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda on_gpu: False)  # as on a CPU without bfloat16
    (matrix,) = gradients(shape, 1)
    result = orthogonalized(matrix)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), quintic(matrix), atol=1e-5, rtol=0)
    assert torch.linalg.svdvals(result).max() < 1.3
    monkeypatch.setattr(muon, "bf16_is_fast", lambda on_gpu: True)
    half = orthogonalized(matrix)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), quintic(matrix), atol=0.05, rtol=0)


def test_steps_of_a_kernel_are_those_of_the_papers_equations(monkeypatch):
    monkeypatch.setattr(muon, "bf16_is_fast", lambda on_gpu: False)
    kernel = nn.Parameter(torch.ones(6, 4, 3, 3, 3))
    optimizer = Muon([kernel], [], lr=0.1, weight_decay=0.5, momentum=0.9)
    expected, momentum = torch.ones(6, 108, dtype=torch.float64), torch.zeros(6, 108, dtype=torch.float64)
    for gradient in gradients(kernel.shape, 3):
        kernel.grad = gradient.clone()
        optimizer.step()
        gradient = gradient.double().flatten(1)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = quintic(0.9 * momentum + 0.1 * gradient)
        expected = expected - 0.1 * 0.5 * expected - 0.1 * 0.2 * 108**0.5 * update
    torch.testing.assert_close(kernel.detach().double().flatten(1), expected, atol=1e-5, rtol=0)


def test_the_other_parameters_take_the_steps_of_torchs_adamw():
    ours, theirs = (nn.Parameter(torch.ones(7)) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}
    optimizers = [Muon([], [ours], **settings), torch.optim.AdamW([theirs], **settings)]
    for gradient in gradients((7,), 5):
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    def parts() -> tuple[nn.Parameter, nn.Parameter, Muon]:
        matrix, bias = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(5))
        return matrix, bias, Muon([matrix], [bias], lr=0.1, weight_decay=0.01)

    def train(matrix: nn.Parameter, bias: nn.Parameter, optimizer: Muon, steps: range) -> None:
        for step in steps:
            matrix.grad, bias.grad = gradients((5, 3), 6)[step], gradients((5,), 6)[step]
            optimizer.step()

    whole, first, second = parts(), parts(), parts()
    train(*whole, range(6))
    train(*first, range(3))
    torch.save(first[2].state_dict(), tmp_path / "optimizer.pt")
    with torch.no_grad():
        second[0].copy_(first[0])
        second[1].copy_(first[1])
    second[2].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(*second, range(3, 6))
    assert torch.equal(second[0], whole[0]) and torch.equal(second[1], whole[1])
    assert {name for state in second[2].state.values() for name in state} == {
        *("momentum_buffer", "exp_avg", "exp_avg_sq")
    }


def test_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match=r"works on matrices, got a parameter of shape \(4,\)"):
        Muon([nn.Parameter(torch.ones(4))], [], lr=0.1)
