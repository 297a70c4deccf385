"""Network evaluations as Diffusion2GAN's tables print them."""

import pytest

from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.metrics.nfe import Phase, total_nfe, training_nfe

K, M = 1_000, 1_000_000
CIFAR10 = [Phase("regression", 512, 150 * K)]
TABLE_A1 = {
    "cifar10": (CIFAR10, 76_800_000, "76.8"),
    "sd_cfg3": ([Phase("regression", 256, 150 * K), Phase("adversarial", 256, 10 * K)], 51_200_000, "51.2"),
    "sd_cfg8": ([Phase("regression", 2048, 50 * K), Phase("adversarial", 1024, 10 * K)], 153_600_000, "153.6"),
    "sdxl_cfg7": ([Phase("regression", 1024, 20 * K), Phase("adversarial", 512, 30 * K)], 97_280_000, "97.3"),
}
TABLE_6 = [(50 * K, 78_550_000), (100 * K, 80_300_000), (200 * K, 83_800_000), (500 * K, 94_300_000), (M, 111_800_000)]


@pytest.mark.parametrize("column", TABLE_A1)
def test_training_nfe_of_table_a1(column):
    phases, expected, printed = TABLE_A1[column]
    assert training_nfe(phases) == expected and f"{expected / M:.1f}" == printed


@pytest.mark.parametrize(("pairs", "expected"), TABLE_6)
def test_total_nfe_of_table_6(pairs, expected):
    assert total_nfe(CIFAR10, pairs, Solver("heun", 18).nfe) == expected


def test_pairs_nfe_of_table_a1():
    """A guided step counts once."""
    columns = [(3 * M, "ddim", 50, 150), (12 * M, "ddim", 50, 600), (8 * M, "ddim", 50, 400), (M, "heun", 18, 35)]
    for pairs, solver, steps, expected in columns:
        assert total_nfe([], pairs, Solver(solver, steps).nfe) == expected * M


def test_consistency_distillation_of_table_6():
    assert [Phase("consistency", 512, n * K).nfe for n in (150, 400)] == [307_200_000, 819_200_000]


def test_an_unknown_phase():
    with pytest.raises(UserError, match="phase of training"):
        Phase("gan", 1, 1)
