"""What `auto` chooses by: the processor's units and the size of the network."""

import pytest
import torch
from torch import nn

from d2o.networks import processor
from d2o.networks.processor import arrange, bf16_unit, chosen_precision, explain_precision, prefers_channels_last

CPU = torch.device("cpu")
FLAGS = "processor\t: 0\nflags\t\t: fpu sse {}\nbugs\t: none\n"


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """cpu(amx=..., avx512=...): a processor as torch's probes find it; cpu(flags="..."): as Linux lists it, under a
    torch without probes."""

    def make(amx=False, avx512=False, flags=None):
        for name, found in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx512)):
            if flags is None:
                monkeypatch.setattr(torch.cpu, name, lambda found=found: found, raising=False)
            else:
                monkeypatch.delattr(torch.cpu, name, raising=False)
        (tmp_path / "cpuinfo").write_text(FLAGS.format(flags or ""))
        monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")

    return make


@pytest.mark.parametrize(
    "how, unit",
    [
        ({}, None),
        ({"amx": True, "avx512": True}, "AMX"),
        ({"avx512": True}, "AVX512-BF16"),
        ({"flags": "avx2"}, None),
        ({"flags": "avx512_bf16"}, "AVX512-BF16"),
        ({"flags": "avx512_bf16 amx_tile amx_bf16"}, "AMX"),
    ],
)
def test_bf16_is_chosen_where_the_processor_computes_in_it(cpu, how, unit):
    cpu(**how)
    assert bf16_unit(CPU) == unit
    assert chosen_precision("auto", CPU) == ("bf16" if unit else "fp32") and chosen_precision("fp16", CPU) == "fp16"
    assert (unit or "nothing here") in explain_precision("bf16", CPU)


def test_a_choice_that_another_machine_made_is_said_to_be_one(cpu):
    cpu()
    assert explain_precision("bf16", CPU) == "precision bf16 (auto: as it was begun; nothing here computes in bf16)"


def test_a_device_without_known_units_stays_with_fp32():
    assert chosen_precision("auto", torch.device("meta")) == "fp32"


def test_wide_convolutional_networks_on_a_cpu_are_put_in_channels_last_order(monkeypatch):
    def network():
        return nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(4, 4))

    monkeypatch.setattr(processor, "WIDE", 1000)
    assert not prefers_channels_last(network(), CPU) and not arrange(small := network(), "cpu")
    assert not small[0].weight.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(processor, "WIDE", 500)
    assert prefers_channels_last(network(), CPU) and arrange(wide := network(), "cpu")
    assert wide[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not prefers_channels_last(nn.Linear(100, 100), CPU) and not prefers_channels_last(
        network(), torch.device("meta")
    )
    assert not prefers_channels_last(print, CPU)  # a teacher's network may be any callable
