"""Makes tests/fixtures/previous again. Run with the version whose files they are, from its checkout:

    cd BEFORE && PYTHONPATH=$PWD python THIS/tests/previous/make.py THIS/tests/fixtures/previous

Every file comes of that version's own commands; `expected.safetensors` is what its students made of the seeds 0 to 3.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from d2o.diffusion.noise import noise_and_labels
from d2o.interop.safetensors_io import save_file
from d2o.networks.edm_unet import EDMPrecond
from d2o.students.base import checkpoint_meta, load_student
from d2o.teachers.base import Spec
from d2o.teachers.registry import load_teacher

SHORT = "eval=null preview=null checkpoint.keep=0 threads=1 batch=4"
STYLE = (
    "network.h_dim=16 network.synthesis.base=64 network.synthesis.max_channels=8 spi_gan.critic.base=64 data.limit=64"
    " spi_gan.critic.max_channels=8 spi_gan.critic.mbstd_group=4 spi_gan.critic.time_dim=8 spi_gan.critic.cmap_dim=8"
)
DDGAN = (
    "network.nf=8 network.channel_mult=[1] network.attn_resolutions=[] network.nz=8 network.zdim=8"
    " dd_gan.steps=2 dd_gan.critic_width=8 dd_gan.critic_temb=8 data.limit=64 optim.lr=0.05"
)
TEACHER = "teacher=teacher.safetensors"
STUDENTS = {
    "style": ("spi_gan_digits", STYLE),
    "multistep": ("dd_gan_digits", DDGAN),
    "consistency": ("cd_digits", f"{TEACHER} data.limit=64"),
    "ctm": ("ctm_digits", f"{TEACHER} data.limit=64"),
}
"""Name -> recipe and changes; `denoiser` comes of the run folder."""
RUNS = {
    "ode": ("quickstart", f"{TEACHER} pairs.path=pairs pairs.n=12 pairs.solver=heun pairs.steps=3 optim.warmup=1"),
    "sid": ("sid_digits", TEACHER),
    "spi_gan": ("spi_gan_digits", f"{STYLE} optim_critic.schedule=constant"),
}
"""Run folders after 5 iterations, and the log and the student of one that went on to 10."""
SWEEP = f"{TEACHER} data.limit=64 images=8 optim.schedule=constant log_every=1"
"""Of a sweep whose recipe and method have other names now."""


def d2o(text: str, changes: str = "") -> None:
    sets = [word for change in changes.split() for word in ("--set", change)]
    subprocess.run([sys.executable, "-m", "d2o", *text.split(), *sets, "--device", "cpu"], check=True)


def teacher(path: Path) -> None:
    torch.manual_seed(0)
    shape = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    network = EDMPrecond("ddpmpp", 8, 1, 10, **shape)
    with torch.no_grad():  # the last convolutions start at 1e-5: give the untrained network something to say
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    spec = Spec("previous", (1, 8, 8), condition="label", classes=10, licence="CC0-1.0")
    save_file(path, network.state_dict(), checkpoint_meta("teacher", network.config, spec))


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    os.chdir(folder)  # so that no file names another by where it lay
    teacher(Path("teacher.safetensors"))
    made = "--threads 1 --batch 4"
    d2o(f"pairs --teacher teacher.safetensors -n 12 --steps 3 --shard-size 8 --out pairs {made}")
    Path("prompts.txt").write_text("a handwritten seven\nsomebody wrote the numeral two\n")
    d2o(f"pairs --teacher tiny-sd --cfg 3 --prompts prompts.txt -n 4 --steps 5 --out text_pairs {made}")
    d2o("pairs --teacher digits -n 256 --out digits_pairs --threads 1")
    for name, (recipe, sets) in STUDENTS.items():
        d2o(f"train {recipe} --out {name}", f"{SHORT} {sets} images=8")
        Path(f"{name}/checkpoints/last.safetensors").rename(f"{name}.safetensors")
        shutil.rmtree(name)
    short = f"{SHORT} optim.schedule=constant log_every=1"  # the rate is constant, so that a run may be made longer
    for name, (recipe, sets) in RUNS.items():
        d2o(f"train {recipe} --out whole", f"{short} {sets} images=40")
        Path("whole/metrics.jsonl").rename(f"whole_{name}.jsonl")
        Path("whole/checkpoints/last.safetensors").rename(f"whole_{name}.safetensors")
        shutil.rmtree("whole")
        d2o(f"train {recipe} --out run_{name}", f"{short} {sets} images=20")
        shutil.rmtree(f"run_{name}/tensorboard")
    d2o("train cd_i_digits --sweep N=6 --out sweep", f"{SHORT} {SWEEP}")
    shutil.rmtree("sweep/N=6/tensorboard")
    shutil.copy("run_ode/checkpoints/last.safetensors", "denoiser.safetensors")
    small = "--n 32 --batch 16 --name previous --no-teacher-distance --against real:digits/b"
    d2o(f"eval denoiser.safetensors {small} --json result.json")
    d2o("eval real:digits/a --save-stats statistics.npz")
    d2o("eval statistics.npz --against real:digits/b --json statistics.json")
    d2o("sample denoiser.safetensors --n 4 --out samples.zip --threads 1")
    for store in ("pairs", "text_pairs", "digits_pairs"):
        shutil.rmtree(f"{store}/timing")
    expected = {}
    for name in ("denoiser", *STUDENTS):
        student = load_student(f"{name}.safetensors")
        noise, labels = noise_and_labels(range(4), student.spec.shape, student.spec.classes)
        expected[name] = student(noise, labels if student.spec.classes else None)
    model = load_teacher("teacher.safetensors")
    noise, labels = noise_and_labels(range(4), model.spec.shape, model.spec.classes)
    expected["teacher"] = model.sample(noise, labels, "heun", 3)
    save_file(Path("expected.safetensors"), expected, {"what": "seeds 0 to 3"})


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
