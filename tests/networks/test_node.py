import math

import pytest
import torch
from torchdiffeq import odeint

from d2o.errors import UserError
from d2o.networks.build import count_parameters
from d2o.networks.node import NODEMapping

SHAPE = (1, 4, 4)
TIMES = [0.13, 0.5, 0.87, 1.0]


def mapping(seed=0, **more):
    torch.manual_seed(seed)
    return NODEMapping(SHAPE, 8, **more)


def close(a, b, rtol=1e-4):
    return (a - b).abs().max() <= rtol * b.abs().max()


def test_published_sizes():
    with torch.device("meta"):
        small, large = NODEMapping((3, 32, 32)), NODEMapping((3, 256, 256), r_layers=7)
        timed = NODEMapping((3, 32, 32), ode_time_input="concat")
    assert count_parameters(small.o) == 3072 * 512 + 512 and count_parameters(large.o) == 196608 * 512 + 512
    assert count_parameters(small.r) == 512 * 512 + 512 and count_parameters(large.r) == 7 * (512 * 512 + 512)
    assert count_parameters(timed.r) == 513 * 512 + 512


@pytest.mark.parametrize(
    "more", [{}, {"r_layers": 3}, {"ode_time_input": "concat"}, {"method": "dopri5", "rtol": 1e-7, "atol": 1e-7}]
)
def test_restarted_and_incremental_solves_agree(more):
    network, z = mapping(**more), torch.randn(5, *SHAPE)
    path = network.path(z, torch.tensor(TIMES))
    assert path.shape == (4, 5, 8)
    for h, t in zip(path, TIMES):
        assert close(network.at(z, t), h)
    h, last = network.start(z), 0.0
    for expected, t in zip(path, TIMES):
        h, last = network.continue_(h.detach(), last, t), t
        assert close(h, expected)
    assert torch.equal(network(z), network.at(z, 1.0))


@pytest.mark.parametrize("layers, step, rtol", [(1, 0.1, 1e-4), (7, 0.1, 3e-4), (7, 0.05, 1e-4)])
def test_how_well_they_agree_at_the_published_width(layers, step, rtol):
    """Leaky ReLUs have a kink, which makes the error of fourth-order steps fall with the square of the step only."""
    torch.manual_seed(0)
    network, z = NODEMapping((1, 8, 8), 512, layers, step=step), torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        for h, t in zip(network.path(z, TIMES), TIMES):
            assert ((network.at(z, t) - h).norm(dim=1) / h.norm(dim=1)).max() < rtol


@pytest.mark.parametrize("more", [{}, {"ode_time_input": "concat"}, {"method": "dopri5"}])
def test_without_r_nothing_moves(more):
    network, z = mapping(**more), torch.randn(3, *SHAPE)
    for p in network.r.parameters():
        p.data.zero_()
    assert torch.allclose(network.path(z, TIMES), network.start(z).expand(4, -1, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_exponential(method):
    """r(h) = h for positive h, so h(t) = h(0) exp(t)."""
    network = mapping(method=method)
    layer = network.r.layers[0]
    layer.weight.data.copy_(torch.eye(8) / (layer.gain * math.sqrt(2)))
    h = torch.rand(2, 8) + 0.1
    assert close(network.continue_(h, 0.0, 1.0), h * math.e, 1e-5)
    assert close(network.continue_(h, 0.25, 0.5), h * math.exp(0.25), 1e-5)


def test_steps_are_those_of_torchdiffeq_on_the_same_grid():
    network, z = mapping(ode_time_input="concat", r_layers=2), torch.randn(3, *SHAPE)
    calls = []
    network.r.register_forward_hook(lambda *_: calls.append(1))
    path = network.path(z, [0.25, 0.25, 0.55, 1.0])
    assert len(calls) == 4 * (3 + 0 + 3 + 5)  # 0.3 is three steps of 0.1, although 0.55 - 0.25 is a little more
    grid = torch.cat(
        [torch.linspace(a, b, n + 1)[1 if a else 0 :] for a, b, n in ((0.0, 0.25, 3), (0.25, 0.55, 3), (0.55, 1.0, 5))]
    )
    expected = odeint(lambda t, h: network.r(h, t), network.start(z), grid, method="rk4")
    assert torch.equal(path[0], path[1])
    for h, i in zip(path[1:], (3, 6, 11)):
        assert close(h, expected[i], 1e-5)
    adaptive = mapping(ode_time_input="concat", r_layers=2, method="dopri5").path(z, [0.25, 0.25, 0.55, 1.0])
    assert close(adaptive, path, 1e-3)


def test_fixed_steps_do_not_depend_on_the_batch():
    network, z = mapping(), torch.randn(5, *SHAPE)
    assert torch.allclose(network(z)[:2], network(z[:2]), atol=1e-6)


def test_time_zero_is_the_start():
    for method in ("rk4", "dopri5"):
        network, z = mapping(method=method), torch.randn(2, *SHAPE)
        assert torch.equal(network.at(z, 0.0), network.start(z))
        assert torch.equal(network.path(z, [0.0, 1.0])[0], network.start(z))


def test_noise_is_normalised_first():
    network, z = mapping(), torch.randn(2, *SHAPE)
    assert torch.allclose(network(z), network(10 * z), atol=1e-5)


def test_mlp_mapping():
    network, z = mapping(mapping="mlp_t", r_layers=2), torch.randn(3, *SHAPE)
    path = network.path(z, TIMES)
    assert path.shape == (4, 3, 8) and (path[0] - path[3]).abs().max() > 1e-2
    assert torch.equal(path[1], network.at(z, 0.5))
    with pytest.raises(UserError, match="no equation"):
        network.continue_(path[0], 0.1, 0.2)


@pytest.mark.long
def test_gradients_pass_through_the_steps():
    network = mapping().double()
    z = torch.randn(2, *SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: network.path(z, [0.3, 1.0]), (z,))
    assert torch.autograd.gradgradcheck(lambda z: network.at(z, 0.2).square(), (z,))
    network(z).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_truncation():
    network = mapping(w_avg_beta=0.5)
    network.track(torch.ones(4, 8))
    network.track(torch.ones(4, 8).requires_grad_() * 3)
    assert torch.allclose(network.w_avg, torch.full((8,), 1.75)) and not network.w_avg.requires_grad
    assert "w_avg" in network.state_dict()
    h = torch.randn(2, 8)
    assert torch.equal(network.truncate(h, 1.0), network.w_avg + (h - network.w_avg))
    assert torch.allclose(network.truncate(h, 0.0), network.w_avg.expand(2, -1))
    ws = h[:, None].repeat(1, 4, 1)
    cut = network.truncate(ws, 0.5, cutoff=1)
    assert torch.allclose(cut[:, 0], network.truncate(h, 0.5)) and torch.equal(cut[:, 1:], ws[:, 1:])
    with pytest.raises(UserError, match="all inputs"):
        network.truncate(h, 0.5, cutoff=1)


def test_says_how_it_was_built():
    network = mapping(r_layers=2, mapping="mlp_t", step=0.2)
    config = dict(network.config)
    assert config.pop("arch") == "node_mapping"
    again = NODEMapping(**config)
    again.load_state_dict(network.state_dict())
    z = torch.randn(2, *SHAPE)
    assert torch.equal(again(z), network(z))


def test_refuses_what_makes_no_sense():
    network, z = mapping(), torch.randn(2, *SHAPE)
    for times in ([0.5, 0.2], [-0.1], [], [math.nan]):
        with pytest.raises(UserError, match="rise from 0"):
            network.path(z, times)
    with pytest.raises(UserError, match=r"\[B, 1, 4, 4\]; this is \[2, 16\]"):
        network(z.flatten(1))
    for key, value in (("method", "rk45"), ("mapping", "mlp"), ("ode_time_input", "add")):
        with pytest.raises(UserError, match=rf"network\.{key}"):
            mapping(**{key: value})
    for bad in ({"r_layers": 0}, {"step": 0.0}):
        with pytest.raises(UserError, match="at least 1"):
            mapping(**bad)
