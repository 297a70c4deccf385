"""One real iteration of Diffusion2GAN at the size of Stable Diffusion 1.5, with random weights: does it run, and in how
much memory?

    python benchmarks/full_size.py --stage 1 [--lora 64] [--state 8bit] [--precision bf16]
    python benchmarks/full_size.py --stage 2 [--lora 64] [--state 8bit] --out benchmarks/results/full_size.json

Recipe `d2g_sd_cfg3` (its variants `ode` and `gan`) at 16 x 16 latents and batch 1: student, critic, optimiser, average,
E-LatentLPIPS and R1 as they are. Teacher, text and LatentLPIPS are random, and the teacher's network, which only
previews call, is let go once the student (and the critic) has been made of it; a LoRA keeps it as its base. Seconds are
those of a machine that may have other work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from d2o.condition import Text
from d2o.data.pair_settings import PairSettings
from d2o.data.prompt_files import open_prompts
from d2o.diffusion.schedules import DiscreteSchedule
from d2o.evaluation.protocol import hardware
from d2o.interop import torchvision_compat
from d2o.interop.safetensors_io import save_file
from d2o.methods.base import Setup
from d2o.networks.latent_vgg import TunedVGG
from d2o.recipes.load import load_recipe
from d2o.spaces.base import LatentSpace, SpaceNumbers
from d2o.students.base import checkpoint_meta
from d2o.teachers.base import Spec
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.published_configs import SD15_UNET
from d2o.teachers.stable_diffusion import StableDiffusionTeacher
from d2o.teachers.text import TextEncoders
from d2o.training.loop import Trainer
from d2o.training.strategy import return_freed_memory

SIDE = 16
NO_MIX = "{latent: 0.0, text: 0.0, noise: 0.0}"  # it exchanges rows, and there is one


def random_teacher() -> StableDiffusionTeacher:
    torchvision_compat.ensure()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(SD15_UNET)
    unet = unet.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            if p.ndim > 1:
                p.uniform_(-0.02, 0.02, generator=generator)
    text = TextEncoders("random", [], lambda prompt: Text(torch.randn(1, 77, 768, generator=generator), None))
    space = LatentSpace("random", SpaceNumbers(4, 0.18215), lambda: None)
    spec = Spec("random", (4, SIDE, SIDE), condition="text", solver="ddim", steps=1)
    return StableDiffusionTeacher(unet, space, text, DiscreteSchedule.scaled_linear(), spec)


def random_distance(path: Path) -> None:
    torch.manual_seed(0)
    network = TunedVGG(4)
    space = {"name": "random", "revision": None, "sha256": None}
    save_file(path, network.state_dict(), checkpoint_meta("latent_lpips", network.config, None, space=space))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--lora", type=int, default=0, help="rank of the student's adapters; 0: all weights")
    parser.add_argument("--state", choices=("fp32", "8bit"), default="8bit", help="optim.state")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, help="add the numbers to this file")
    given = parser.parse_args()
    return_freed_memory()
    numbers = measure(given)
    print(json.dumps(numbers, indent=1))
    if given.out is not None:
        key = ", ".join(f"{name} {value}" for name, value in vars(given).items() if name != "out")
        before = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps({**before, key: numbers}, indent=1, sort_keys=True) + "\n")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "prompts.txt").write_text("a photo of a dog\n")
        random_distance(folder / "distance.safetensors")
        changes = [
            *("batch=1", "micro_batch=1", "preview=null", "channels_last=false"),
            f"precision={given.precision}",
            f"optim.state={given.state}",
            f"prompts={folder / 'prompts.txt'}",
            f"pairs.prompts={folder / 'prompts.txt'}",
            f"diffusion2gan.distance.weights={folder / 'distance.safetensors'}",
            *([f"student.lora={given.lora}"] if given.lora else []),
            *([f"optim_critic.state={given.state}", f"diffusion2gan.mix={NO_MIX}"] if given.stage == 2 else []),
        ]
        recipe = load_recipe("d2g_sd_cfg3:" + ("ode" if given.stage == 1 else "gan"), changes)
        teacher = random_teacher()
        settings = PairSettings("random", n=1, solver="ddim", steps=1, prompts=str(folder / "prompts.txt"))
        with torch.no_grad():
            pairs = make_pairs(
                settings,
                folder / "pairs",
                compute=Compute(1),
                teacher=teacher,
                prompts=open_prompts(folder / "prompts.txt"),
                lent=True,
            )
        setup = Setup(
            recipe.options, teacher=teacher, student=recipe.student, batch=1, pairs=pairs, device=torch.device("cpu")
        )
        trainer = Trainer(recipe, setup, folder / "run", say=print)
        if not given.lora:
            for p in teacher.network.parameters():
                p.data = torch.empty(0)
        made_of = peak()
        first = {name: next(iter(player.parameters.values())) for name, player in trainer.players.items()}
        before = {name: p.detach().clone() for name, p in first.items()}
        begun = time.perf_counter()
        trainer.iterate()
        seconds = time.perf_counter() - begun
        scalars = {key: round(value, 6) for key, value in trainer.journal.scalars.rows()[-1].items()}
        trainer.batches.close()
        for name, player in trainer.players.items():
            assert all(p.isfinite().all() for p in player.parameters.values()), name
            assert not torch.equal(before[name], first[name]), f"{name} has not moved"
        trained = {name: sum(p.numel() for p in player.parameters.values()) for name, player in trainer.players.items()}
        numbers = {"trained": trained, "seconds": round(seconds, 1), "peak_GB": peak(), "peak_GB_before": made_of}
        numbers |= {"hardware": hardware(), "date": datetime.date.today().isoformat()}
        return numbers | scalars


def peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


if __name__ == "__main__":
    main()
