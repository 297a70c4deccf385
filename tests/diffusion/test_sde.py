import pytest
import torch
from torchdiffeq import odeint

from d2o.diffusion.sde import VE, VP, SubVP, get_process, perturb
from d2o.errors import UserError

PROCESSES = [VP(), VP(0.5, 5.0), SubVP(), SubVP(0.2, 12.0), VE(), VE(0.02, 100.0)]
TIMES = torch.tensor([0.0, 0.01, 0.1, 0.3, 0.6, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_marginals_solve_the_moment_equations(process):
    """d alpha = f alpha dt and d sigma^2 = (2 f sigma^2 + g^2) dt, whatever the closed forms say."""

    def slope(t, moments):
        drift, diffusion = process.drift(t), process.diffusion(t)
        return torch.stack([drift * moments[0], 2 * drift * moments[1] + diffusion**2])

    moments = odeint(
        slope, torch.tensor([1.0, 0.0], dtype=torch.float64), TIMES, rtol=1e-10, atol=1e-14, method="dopri5"
    )
    assert process.alpha(TIMES).tolist() == pytest.approx(moments[:, 0].tolist(), rel=1e-6)
    assert (process.sigma(TIMES) ** 2).tolist() == pytest.approx(moments[:, 1].tolist(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("process", [VP(), SubVP(), VE()], ids=str)
def test_marginals_are_those_of_simulated_paths(process):
    paths, steps, x_0 = 20_000, 500, 1.5
    generator = torch.Generator().manual_seed(0)
    x, seen = torch.full((paths,), x_0), {}
    middle = (torch.arange(steps) + 0.5) / steps
    drifts, diffusions = process.drift(middle).tolist(), process.diffusion(middle).tolist()
    for i in range(steps):
        x = x + x * (drifts[i] / steps) + torch.randn(paths, generator=generator) * (diffusions[i] / steps**0.5)
        seen[i + 1] = (x.mean().item(), x.std().item()) if (i + 1) % 125 == 0 else None
    for i in (125, 250, 375, 500):
        t = torch.tensor(i / steps)
        mean, std = seen[i]
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        assert mean == pytest.approx(alpha * x_0, abs=4 * sigma / paths**0.5 + 0.01 * alpha)
        assert std == pytest.approx(sigma, rel=0.025)  # 4 / sqrt(2 paths), and the steps' width


def test_known_values():
    one = torch.ones((), dtype=torch.float64)
    assert float(VP().alpha(one)) == pytest.approx(0.0065716, rel=1e-5) and float(VP().sigma(one)) == pytest.approx(
        0.9999784, abs=1e-7
    )
    assert float(SubVP().sigma(one)) == pytest.approx(0.9999784**2, abs=2e-7) and float(SubVP().alpha(one)) == float(
        VP().alpha(one)
    )
    assert float(VE().sigma(one)) == pytest.approx(50, rel=1e-6) and float(VE(0.01, 50).sigma(0 * one)) == 0
    times = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for process in (VP(), VP(0.5, 5.0)):
        assert torch.allclose(process.alpha(times) ** 2 + process.sigma(times) ** 2, torch.ones_like(times), atol=1e-14)
        assert (SubVP(process.beta_min, process.beta_max).sigma(times) < process.sigma(times)).all()
    assert torch.equal(VE().alpha(times), torch.ones_like(times)) and torch.equal(
        VE().drift(times), torch.zeros_like(times)
    )


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_float32_keeps_its_digits_near_the_data(process):
    t = torch.tensor([1e-5, 1e-4, 1e-3])
    assert process.sigma(t).tolist() == pytest.approx(process.sigma(t.double()).tolist(), rel=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 8, 8)])
def test_perturb_gives_every_sample_its_own_time(shape):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    t = torch.tensor([0.0, 0.2, 0.7, 1.0])
    for process in (VP(), SubVP(), VE()):
        x_t = perturb(process, x, t, noise)
        assert x_t.shape == shape and x_t.dtype == torch.float32
        assert torch.equal(x_t[0], x[0])
        for i in range(4):
            assert torch.allclose(x_t[i], process.alpha(t[i]) * x[i] + process.sigma(t[i]) * noise[i])


def test_processes_by_name():
    assert get_process("vp") == VP() and get_process("ve", sigma_max=80.0) == VE(sigma_max=80.0)
    assert get_process("subvp", beta_min=0.2) == SubVP(0.2) and isinstance(get_process("subvp"), SubVP)
    with pytest.raises(UserError, match="unknown forward process 'vpp': did you mean 'vp'") as caught:
        get_process("vpp")
    assert "subvp, ve, vp" in caught.value.hint
    with pytest.raises(UserError, match="unknown option of the forward process ve 'beta_min'") as caught:
        get_process("ve", beta_min=0.1)
    assert "sigma_max, sigma_min" in caught.value.hint
