"""E-LatentLPIPS' transforms of latents: against what the official code made of the same draws, and what holds of any
draws."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from d2o.augment import latent
from d2o.augment.ada import numbers
from d2o.augment.latent import OPERATIONS, augment, augment_together, draws_for, draws_from_torch, operations
from d2o.errors import UserError

FILE = Path(__file__).parents[1] / "golden" / "elatentlpips" / "sd15.safetensors"
EXACT = ("brightness", "contrast", "saturation", "cutout", "c", "co")
SINGLE = ("flip", "rot90", "shift", "scale", "rotate", "aniso", "frac")
RESAMPLED = (*SINGLE, "b", "g", "bg", "bgc", "bgco", "bgo")


@pytest.fixture(scope="module")
def golden():
    return load_file(FILE)


def draws_of(golden, name):
    """Draws of the operation or set of that name."""
    found = {key.removeprefix(f"{name}."): value for key, value in golden.items() if key.startswith(f"{name}.")}
    return {key: value for key, value in found.items() if key.startswith(("u_", "n_"))}


def weighed(y):
    return (y.flatten() * torch.arange(y.numel(), dtype=torch.float64).cos().float()).sum()


def thin(y):
    """Every fourth row and column, which is what the file holds."""
    return y[..., ::4, ::4]


@pytest.mark.parametrize("name", EXACT)
def test_colour_and_cutout_are_the_official_ones(golden, name):
    draws, a = draws_of(golden, name), golden["a"].clone().requires_grad_()
    found = augment(a, name, draws)
    assert (thin(found) - golden[f"{name}.a"]).abs().max() < 1e-5
    if f"{name}.b" in golden:
        assert (thin(augment(golden["b"], name, draws)) - golden[f"{name}.b"]).abs().max() < 1e-5
    if f"{name}.grad" in golden:
        weighed(found).backward()
        assert (thin(a.grad) - golden[f"{name}.grad"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", RESAMPLED)
def test_resampling_is_the_official_one_away_from_the_borders(golden, name):
    """Near them it is not: the official code has zeros beyond a reflected margin."""
    draws, a = draws_of(golden, name), golden["a"].clone().requires_grad_()
    found = augment(a, name, draws)

    def agrees(ours, key, median):
        difference, expected = thin(ours).detach() - golden[key], golden[key]
        assert difference.abs().median() < median * expected.std()
        assert difference.norm() < 0.06 * expected.norm()

    coloured = "c" in name and name not in OPERATIONS  # contrast is about a mean, in which the borders are
    agrees(found, f"{name}.a", 1e-2 if coloured else 1e-4)
    if f"{name}.b" in golden:
        agrees(augment(golden["b"], name, draws), f"{name}.b", 1e-2)
    if f"{name}.grad" in golden:
        weighed(found).backward()
        agrees(a.grad, f"{name}.grad", 1e-2)


def test_kinds():
    assert operations("ogb") == ("flip", "rot90", "shift", "scale", "rotate", "aniso", "frac", "cutout")
    assert operations("bg+cutout") == operations("bgo") == operations("b+g+o")
    assert operations("co") == ("brightness", "contrast", "saturation", "cutout")
    assert operations("none") == operations("") == () and operations("scale+flip") == ("flip", "scale")
    with pytest.raises(UserError, match="did you mean 'cutout'"):
        operations("bg+cutuot")


@pytest.mark.parametrize("resample", ["sym6", "bilinear"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 16, 16, 24), (3, 1, 2, 2), (3, 4, 3, 64)])
def test_neutral_draws_do_nothing(shape, resample):
    x = torch.randn(shape)
    draws = {
        name: torch.full_like(v, 0.5 if name[0] == "u" else 0.0) for name, v in draws_from_torch("bgco", 3).items()
    }
    draws |= {"u_flip": torch.zeros(3), "u_rot90": torch.zeros(3), "u_cutout": torch.full((3, 2), 2.0)}  # beside it
    assert torch.allclose(augment(x, "bgco", draws, resample), x, atol=2e-4)
    assert augment(x, "bgco", {}) is x and augment(x, "none", draws) is x


def test_blits_are_exact_with_bilinear_sampling():
    x = torch.randn(4, 4, 8, 8)
    draws = {"u_flip": torch.tensor([0.0, 0.6, 0.4, 0.9]), "u_rot90": torch.tensor([0.3, 0.0, 0.6, 0.9])}
    expected = [x[0].rot90(1, (1, 2)), x[1].flip(2), x[2].rot90(2, (1, 2)), x[3].flip(2).rot90(3, (1, 2))]
    assert torch.allclose(augment(x, "b", draws, "bilinear"), torch.stack(expected), atol=1e-4)


def test_along_each_side_by_its_own_length():
    """A quarter of the sides' eighths to the right and down, and the cut-out rectangle around the middle."""
    x = torch.randn(1, 2, 16, 24)
    moved = augment(x, "shift", {"u_shift": torch.tensor([[1.0, 0.75]])}, "bilinear")
    assert torch.allclose(moved[..., 1:, 3:], x[..., :-1, :-3], atol=1e-5)
    cut = augment(x, "o", {"u_cutout": torch.tensor([[0.5, 0.25]])})
    expected = x.clone()
    expected[..., 0:8, 6:18] = 0
    assert torch.equal(cut, expected)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_sample_s_transform_depends_on_its_own_draws_alone(batch):
    torch.manual_seed(batch)
    x, y, draws = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8), draws_from_torch("bgco", batch)
    both = augment_together([x, y], "bgco", draws)
    for i in range(batch):
        own = {name: value[i : i + 1] for name, value in draws.items()}
        assert torch.allclose(both[0][i : i + 1], augment(x[i : i + 1], "bgco", own), atol=1e-5)
        assert torch.allclose(both[1][i : i + 1], augment(y[i : i + 1], "bgco", own), atol=1e-5)


def test_draws():
    n = 4000
    found = draws_for("bgco", *numbers(n, torch.Generator().manual_seed(0)))
    assert set(found) == {name for of in OPERATIONS.values() for name in of}
    for name, values in found.items():
        assert values.shape == ((n, 2) if name in latent.PAIRS else (n,))
        mean, std = (0.0, 1.0) if name[0] == "n" else (0.5, 12**-0.5)
        assert values.mean().item() == pytest.approx(mean, abs=0.06)
        assert values.std().item() == pytest.approx(std, rel=0.05)
    columns = torch.cat([value.reshape(n, -1).T for value in found.values()])
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.08  # each has numbers of its own
    alone = draws_for("c", *numbers(n, torch.Generator().manual_seed(0)))
    assert set(alone) == {"u_brightness", "u_contrast", "u_saturation"}
    assert all(torch.equal(alone[name], found[name]) for name in alone)


@pytest.mark.parametrize("resample", ["sym6", "bilinear"])
def test_gradients_of_first_and_second_order(resample):
    torch.manual_seed(0)
    draws = draws_from_torch("bgco", 1)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def change(x):
        return augment(x**2, "bgco", draws, resample) ** 2

    assert gradcheck(change, (x,), fast_mode=True) and gradgradcheck(change, (x,), fast_mode=True)


def test_half_precision_is_augmented_in_single():
    torch.manual_seed(0)
    x, draws = torch.randn(2, 4, 8, 8).to(torch.bfloat16), draws_from_torch("bgc", 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(x, "bgc", draws)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, augment(x.float(), "bgc", draws).to(torch.bfloat16))


def test_shapes_cost_nothing_on_the_meta_device():
    x = torch.empty(2, 4, 64, 64, device="meta")
    assert augment(x, "bgco", draws_from_torch("bgco", 2, "meta")).shape == x.shape


def test_what_does_not_fit_is_refused():
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(UserError, match="did you mean 'u_flip'"):
        augment(x, "b", {"u_flp": torch.zeros(2)})
    with pytest.raises(UserError, match=r"n_frac of 2 latents has shape \[2, 2\], not \[2\]"):
        augment(x, "g", {"n_frac": torch.zeros(2)})
    with pytest.raises(UserError, match="of one shape"):
        augment_together([x, x[:1]], "b", {})
    with pytest.raises(UserError, match=r"\[2, 4, 1, 8\]"):
        augment(x[:, :, :1], "b", {})
