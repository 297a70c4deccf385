import pytest
import torch

from d2o.errors import UserError
from d2o.export.loaded import load_exportable
from d2o.export.parity import compare


@pytest.fixture(scope="module")
def source(folder):
    return load_exportable(folder / "student.safetensors")


def test_the_largest_difference_of_all_samples_counts(source):
    def run(inputs):
        found = source.call(*inputs)
        if len(found) == 6:
            found[4, 0, 1, 2] += 0.25
        return found

    parity = compare(source, run, 6, 0.5, "fake")
    assert parity.difference == pytest.approx(0.25, rel=1e-5)
    assert parity.batch_sizes == (1, 6)
    assert "2.5e-01" in str(parity)
    assert "fake" in str(parity)
    with pytest.raises(
        UserError, match=r"differs from the network by 2\.50e-01 at batch size 6: above the tolerance 0\.1"
    ):
        compare(source, run, 6, 0.1, "fake")


def test_nan_is_never_within_tolerance(source):
    with pytest.raises(UserError, match="by nan"):
        compare(source, lambda inputs: source.call(*inputs) * torch.nan, 2, 1e9, "fake")


def test_another_shape_and_a_runtime_that_fails_are_told(source):
    with pytest.raises(UserError, match=r"gives \(1, 1, 8, 7\), the network \(1, 1, 8, 8\)"):
        compare(source, lambda inputs: source.call(*inputs)[..., 1:], 2, 1.0, "fake")

    def run(inputs):
        raise RuntimeError("bad node\nmore")

    with pytest.raises(UserError, match=r"does not run at batch size 1, so it is not kept: bad node$"):
        compare(source, run, 2, 1.0, "fake")
