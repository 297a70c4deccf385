import pytest
import torch

from d2o.diffusion.noise import StepNoise, noise_and_labels, noise_for_seeds


def test_a_samples_noise_depends_on_its_seed_alone():
    whole, labels = noise_and_labels(range(20), (3, 4, 4), 10)
    assert whole.shape == (20, 3, 4, 4) and whole.dtype == torch.float32
    for seed in (0, 7, 19):
        alone, label = noise_and_labels([seed], (3, 4, 4), 10)
        assert torch.equal(alone[0], whole[seed]) and label[0] == labels[seed]
    backwards, labels_backwards = noise_and_labels(reversed(range(20)), (3, 4, 4), 10)
    assert torch.equal(backwards.flip(0), whole) and torch.equal(labels_backwards.flip(0), labels)
    assert len({float(x.sum()) for x in whole}) == 20


def test_the_global_generator_neither_matters_nor_moves():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = noise_for_seeds([5], (2, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(noise_for_seeds([5], (2, 2)), first)


def test_edm_order_noise_first_then_label():
    noise, labels = noise_and_labels([123, 4], (1, 8, 8), 1000)
    for i, seed in enumerate([123, 4]):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(noise[i], torch.randn(1, 8, 8, generator=generator))
        assert labels[i] == torch.randint(1000, (), generator=generator)


def test_classes_do_not_change_the_noise():
    seeds = range(6)
    unlabelled, zeros = noise_and_labels(seeds, (1, 5, 5), 0)
    assert torch.equal(unlabelled, noise_and_labels(seeds, (1, 5, 5), 10)[0])
    assert torch.equal(unlabelled, noise_for_seeds(seeds, (1, 5, 5)))
    assert zeros.dtype == torch.int64 and not zeros.any()


def test_seeds_count_modulo_2_to_the_32():
    assert torch.equal(noise_for_seeds([2**32 + 3, -1], (4,)), noise_for_seeds([3, 2**32 - 1], (4,)))


def test_noise_is_standard_normal_and_labels_uniform():
    noise, labels = noise_and_labels(range(4000), (1, 4, 4), 10)
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.01  # about four standard errors
    counts = labels.bincount(minlength=10)
    assert len(counts) == 10 and labels.min() == 0
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_no_seeds_no_noise():
    noise, labels = noise_and_labels([], (1, 4, 4), 10)
    assert noise.shape == (0, 1, 4, 4) and labels.shape == (0,)


@pytest.mark.parametrize("classes", [0, 10])
def test_steps_noise_goes_on_where_the_start_noise_ended(classes):
    """EDM's order in every sample's generator: float32 noise, the label if there are classes, then float64 noise for
    each step."""
    seeds, shape = [7, 0, 2**32 + 5], (1, 3, 5)
    steps = StepNoise(seeds, shape, classes)
    draws = [steps() for _ in range(3)]
    noise, labels = noise_and_labels(seeds, shape, classes)
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed % 2**32)
        assert torch.equal(noise[i], torch.randn(shape, generator=generator))
        if classes:
            assert labels[i] == torch.randint(classes, (), generator=generator)
        for draw in draws:
            assert draw.dtype == torch.float64 and torch.equal(
                draw[i], torch.randn(shape, generator=generator, dtype=torch.float64)
            )


def test_steps_noise_depends_on_the_seed_alone_and_is_fresh():
    together = StepNoise(range(400), (2, 8), 10)
    alone = StepNoise([123], (2, 8), 10)
    first, second = together(), together()
    assert torch.equal(alone()[0], first[123]) and torch.equal(alone()[0], second[123])
    start = noise_for_seeds(range(400), (2, 8)).double()
    for a, b in ((first, second), (first, start), (second, start)):
        assert abs((a * b).mean()) < 0.05  # four standard errors
    assert abs(first.mean()) < 0.05 and abs(first.std() - 1) < 0.04
    assert StepNoise([], (2, 8))().shape == (0, 2, 8)
