"""Our Inception against pytorch-fid's and torch-fidelity's with the same random weights, and against TensorFlow's
graph."""

import pytest
import torch

from d2o.interop.torchvision_compat import ensure
from d2o.networks.inception import Inception, from_tensorflow_names
from tests.evaluation.inception_graph import Graph

ensure()
import pytorch_fid.inception  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402


def images(count, seed):
    return torch.rand(count, 3, 299, 299, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def graph():
    """TensorFlow's graph, what it was run on, and what it gave."""
    made, x = Graph(), images(2, 0)
    return made, x, made(x)


@pytest.fixture(scope="module")
def network(graph):
    network = Inception().eval()
    found = network.load_state_dict(from_tensorflow_names(graph[0].tensors), strict=False)
    assert not found.unexpected_keys and all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    return network


def test_size():
    with torch.device("meta"):
        network = Inception()
    assert sum(p.numel() for p in network.parameters()) == 23_850_960 and len(network.state_dict()) == 566


@pytest.mark.long
def test_computes_what_tensorflows_graph_does(graph, network):
    _, x, (pool, conv, logits) = graph
    with torch.inference_mode():
        found = network(x, ("logits", "spatial", "features"))
    assert list(found) == ["logits", "spatial", "features"] and found["spatial"].shape == (2, 2023)
    assert pool.mean() > 0.1 and pool.std(0).max() > 0.01  # not vanished: the images can be told apart
    torch.testing.assert_close(found["features"], pool, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["spatial"].reshape(2, 17, 17, 7), conv[..., :7], rtol=1e-4, atol=1e-4)


def test_goes_no_deeper_than_needed():
    with torch.device("meta"):
        network = Inception().eval()
        network.Mixed_6e = None
        assert list(network(torch.empty(1, 3, 299, 299), ("spatial",))) == ["spatial"]


@pytest.mark.long
def test_equals_pytorch_fid_and_torch_fidelity(network, monkeypatch, tmp_path):
    generator = torch.Generator().manual_seed(1)
    # The graph has no scale in its normalisations, but pytorch-fid's file does.
    state = {
        name: torch.rand(len(tensor), generator=generator) + 0.5 if name.endswith("bn.weight") else tensor
        for name, tensor in network.state_dict().items()
    }
    ours = Inception().eval()
    ours.load_state_dict(state)
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    levels = torch.randint(0, 256, (1, 3, 299, 299), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    x = (levels.float() - 128) / 128
    fidelity = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(tmp_path / "inception.pth"))
    with torch.inference_mode():
        found = ours(x, ("features", "logits"))
        features, logits = fidelity(levels)
        assert (found["features"] - theirs(x)[0].flatten(1)).abs().max() <= 1e-5
        assert (found["features"] - features).abs().max() <= 1e-5 and (found["logits"] - logits).abs().max() <= 1e-5
