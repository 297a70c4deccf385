"""DD-GAN's process: its table of levels, the pair it trains on, and the posterior that it samples from."""

import pytest
import torch

from d2o.diffusion.ddgan import DDGANProcess

LEVELS = {1: [0.00657], 2: [0.28049, 0.00657], 3: [0.56460, 0.10576, 0.00657], 4: [0.72232, 0.28049, 0.05856, 0.00657]}


@pytest.mark.parametrize("steps", LEVELS)
def test_levels_are_the_published_ones(steps):
    process = DDGANProcess(steps)
    assert [round(v, 5) for v in process.A[1:].tolist()] == LEVELS[steps]
    assert (
        process.A.dtype == torch.float64
        and process.A[0] == pytest.approx(1, abs=1e-8)
        and process.S[0] == pytest.approx(1e-4, rel=1e-6)
    )
    assert torch.allclose(process.A**2 + process.S**2, torch.ones(steps + 1, dtype=torch.float64))
    assert torch.allclose(process.A[1:] / process.A[:-1], (1 - process.b[1:]).sqrt())


@pytest.mark.parametrize("steps", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_step_gives_the_prediction_itself(steps, dtype):
    process, (x0, x1, noise) = DDGANProcess(steps), torch.randn(3, 5, 2, 4, 4, dtype=dtype)
    assert torch.equal(process.posterior(x0, x1, torch.zeros(5, dtype=torch.int64), noise), x0)


def test_pairs_have_the_marginals_of_the_process():
    process, n = DDGANProcess(3), 200_000
    noise = torch.randn(2, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = torch.full((n, 1), 0.7, dtype=torch.float64)
    for step in range(3):
        t = torch.full((n,), step)
        x_t, x_next = process.pair(x0, t, *noise)
        for x, i in ((x_t, step), (x_next, step + 1)):
            assert x.mean().item() == pytest.approx(process.A[i].item() * 0.7, abs=0.01)
            assert x.std().item() == pytest.approx(process.S[i].item(), rel=0.01)
        assert (x_t * (x_next - process.a[step + 1] * x_t)).mean().item() == pytest.approx(
            0, abs=0.01
        )  # the step's noise is its own


@pytest.mark.parametrize("steps", [2, 4])
def test_the_posterior_of_the_truth_is_a_step_back(steps):
    process, n = DDGANProcess(steps), 200_000
    n1, n2, n3 = torch.randn(3, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x0 = torch.full((n, 1), -0.4, dtype=torch.float64)
    for step in range(1, steps):
        t = torch.full((n,), step)
        x_t, x_next = process.pair(x0, t, n1, n2)
        back = process.posterior(x0, x_next, t, n3)
        assert back.mean().item() == pytest.approx(x_t.mean().item(), abs=0.01) and back.std().item() == pytest.approx(
            x_t.std().item(), rel=0.01
        )
        assert (back * x_next).mean().item() == pytest.approx(
            (x_t * x_next).mean().item(), abs=0.01
        )  # jointly with x_{t+1}


def test_steps_may_differ_from_sample_to_sample_and_the_prediction_gets_gradients():
    process, t = DDGANProcess(4), torch.tensor([3, 0, 2, 1])
    x0, n1, n2 = torch.randn(3, 4, 1, 2, 2)
    x0.requires_grad_()
    together = process.pair(x0, t, n1, n2)
    back = process.posterior(x0, together[1], t, n1)
    for i in range(4):
        alone = process.pair(x0[i : i + 1], t[i : i + 1], n1[i : i + 1], n2[i : i + 1])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))
        assert torch.equal(process.posterior(x0[i : i + 1], alone[1], t[i : i + 1], n1[i : i + 1])[0], back[i])
    (gradient,) = torch.autograd.grad(process.posterior(x0, together[1].detach(), t, n1).sum(), x0)
    assert torch.allclose(gradient[:, 0, 0, 0], process.from_x0[t].float())
