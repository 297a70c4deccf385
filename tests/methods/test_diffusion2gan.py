"""Diffusion2GAN: an iteration against the paper's equations, on tiny networks, and through the loop."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from d2o.condition import Condition
from d2o.critics.unet import UNetCritic
from d2o.data.pair_settings import PairSettings
from d2o.data.pairs_section import PairsSection
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.export.exporter import export_checkpoint
from d2o.interop.safetensors_io import load_file, save_file
from d2o.losses.mismatch import mix_and_match
from d2o.methods.base import Batch, Draws, Setup, get_method
from d2o.methods.diffusion2gan import Diffusion2GAN, Diffusion2GANOptions
from d2o.metrics.nfe import Phase, total_nfe, training_nfe
from d2o.networks.full_precision import FullPrecisionConv2d
from d2o.recipes.load import load_recipe
from d2o.recipes.schema import Recipe
from d2o.runtime import StopFlag, Stopped
from d2o.students.base import Student, load_student, save_student
from d2o.teachers.compute import Compute
from d2o.teachers.generate import make_pairs
from d2o.teachers.in_edm import in_edm
from d2o.teachers.registry import load_teacher
from d2o.training import parts
from d2o.training.loop import Trainer
from d2o.training.raw_start import check_raw, fill_raw, wants_raw
from d2o.training.setup import prepare, provenance_of
from tests.helpers import tiny_network, tiny_student, tiny_teacher
from tests.methods import recording
from tests.teachers.families import tiny

CPU = torch.device("cpu")
STUDENT = SimpleNamespace(sigma=80.0, init="teacher", dropout=None)
MSE = {"kind": "mse"}


def made(teacher=None, student=STUDENT, start=None, **options) -> Diffusion2GAN:
    torch.manual_seed(0)
    given = Diffusion2GANOptions.model_validate({"distance": MSE, **options})
    setup = Setup(given, teacher=teacher or tiny_teacher(), student=student, start=start, device=CPU)
    method = get_method("diffusion2gan")(setup)
    if method.critic is not None:  # away from zero and from the teacher
        with torch.no_grad():
            for p in method.critic.parameters():
                p += 0.05 * torch.randn(p.shape)
    return method


def pairs(n: int = 4, channels: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(5)
    noise, target = (torch.randn(n, channels, 8, 8, generator=generator) for _ in range(2))
    return Batch(noise=noise, target=target, condition=Condition.of_labels(torch.arange(n) % 10))


class Loop(recording.Loop):
    """That loop, which also notes in which order networks are called, differentiated and updated."""

    def __init__(self, method, total: int = 4, size: int = 4):
        super().__init__(method, size, total=total)
        self.events: list[str] = []
        for name, network in self.networks.items():
            network.register_forward_hook(lambda *_, name=name: self.events.append(name))

    def backward(self, loss):
        self.events.append("backward")
        super().backward(loss)

    def update(self, name):
        self.events.append(f"update {name}")
        super().update(name)


def run(method, batch=None, iteration=1, **loop):
    recorder = Loop(method, **loop)
    return method.step(recorder, batch or pairs(), iteration), recorder


def test_stage_one_is_regression():
    method = made()
    scalars, loop = run(method)
    data, teacher = pairs(), tiny_teacher()
    x = teacher.denoise(80 * data.noise, 80.0, data.condition.labels)
    assert scalars.keys() == {"loss"}
    assert scalars["loss"].item() == pytest.approx((x - data.target).square().mean().item(), rel=1e-4)
    assert loop.events == ["student", "backward", "update student"]
    assert list(method.players()) == ["student"] and method.micro_multiple(method.options, 4) == 1


def softplus_means(maps, sign):
    """A loss at every place, averaged over a map's places, then over the maps, then over the samples."""
    return torch.stack([F.softplus(sign * m).flatten(1).mean(1) for m in maps]).mean().item()


def test_stage_two_is_its_equations():
    """The critic first, by samples of its own; then the student, by new ones: 5 network evaluations of a sample."""
    method = made(lambda_gan=0.25, lambda_distance=2.0, mix={"latent": 0.3, "text": 0.3, "noise": 0.3})
    scalars, loop = run(method)
    assert loop.events == [
        "student",
        "critic",
        "critic",
        "backward",
        "update critic",
        "student",
        "critic",
        "backward",
        "update student",
    ]
    data, critic = pairs(), method.critic
    z, real, labels = data.noise, data.target, data.condition.labels
    with torch.no_grad():
        x = tiny_teacher().denoise(80 * z, 80.0, labels)
        fake = mix_and_match(real, z, labels, x, Draws(1003, 0, 4, 4, CPU), method.options.mix.fractions)
        assert set(fake.kind.tolist()) - {0}, "nothing is mismatched here"
        d_fake = critic(fake.x, fake.z, fake.condition)
        expected = softplus_means(critic(real, z, labels), -1) + softplus_means(d_fake, 1)
        gan = softplus_means(critic(x, z, labels), -1)
    assert scalars["loss_critic"].item() == pytest.approx(expected, rel=1e-4)
    assert scalars["loss_gan"].item() == pytest.approx(gan, rel=1e-4)
    mse = (x - real).square().mean().item()
    assert loop.losses[1] == pytest.approx(2.0 * mse + 0.25 * gan, rel=1e-4)


def test_the_order_may_be_the_other_one():
    _, loop = run(made(lambda_gan=0.25, order="generator_first"))
    assert [event for event in loop.events if event.startswith("update")] == ["update student", "update critic"]


@pytest.mark.parametrize("order", ["critic_first", "generator_first"])
def test_one_sample_may_serve_both_steps(order):
    """4 network evaluations of a sample, and the same losses and gradients, as the student has not moved between."""
    same = {"lambda_gan": 0.25, "order": order, "mix": {"latent": 0.3, "text": 0.3, "noise": 0.3}}
    (fresh, first), (reused, loop) = (run(made(**same, passes=passes), size=2) for passes in ("fresh", "reuse"))
    calls = [[event for event in found.events if event in ("student", "critic")] for found in (first, loop)]
    assert [len(found) / 2 for found in calls] == [5, 4] and loop.events.count("student") == 2
    assert all(torch.equal(fresh[key], value) for key, value in reused.items()), reused
    for name, gradient in first.gradients.items():
        assert torch.allclose(loop.gradients[name], gradient, rtol=1e-4, atol=1e-7), name
    options = Diffusion2GANOptions.model_validate({"lambda_gan": 0.25, "passes": "reuse"})
    assert Phase(Diffusion2GAN.phase(options), 256, 10_000).nfe == 4 * 256 * 10_000
    assert Phase(Diffusion2GAN.phase(options), 256, 10_000, calls=4).nfe == 7 * 256 * 10_000


def test_the_critic_s_time_may_be_random(sdxl):
    """Of each row its own, the same for its real and its fake sample and for R1; drawn anew in the student's step."""
    for method, batch, low, high in (
        (made(lambda_gan=0.25, critic={"t": "random"}), pairs(), 0.002, 80.0),
        (made(sdxl, SD, lambda_gan=0.25, critic={"t": "random"}, r1={"gamma": 0.0}), texts(), 0, 999),
    ):
        seen = []
        method.critic.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[3]))
        run(method, batch, iteration=0)
        r1 = bool(method.options.r1.gamma)
        assert len(seen) == 3 + r1 and torch.equal(seen[0], seen[1]) and len(set(seen[0].tolist())) == 4
        assert not torch.equal(seen[0], seen[-1]) and all(low <= t <= high for ts in seen for t in ts.tolist())
        assert not r1 or torch.equal(seen[2], seen[0][:1])
        assert method.critic.t is None
    for t in (999.0, None):
        assert made(lambda_gan=0.25, critic={"t": t}).critic.t == t


def test_r1_is_of_the_first_sample_every_sixteen_iterations():
    method = made(lambda_gan=0.25, r1={"gamma": 0.5, "interval": 16})
    _, loop = run(method, iteration=32)
    assert loop.events.count("backward") == 3
    x = pairs().target[:1].requires_grad_(True)
    logits = method.critic(x, pairs().noise[:1], torch.tensor([0]))
    total = torch.stack([m.mean() for m in logits]).mean()
    square = torch.autograd.grad(total, x)[0].square().sum().item()
    assert loop.losses[1] == pytest.approx(0.5 / 2 * 16 * square, rel=1e-4) and square > 0
    assert run(method, iteration=33)[1].events.count("backward") == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lambda_gan": 0.25},
        {"lambda_gan": 1.0, "head_reduce": "sum", "r1": {"of": "xz", "half": False, "lazy_gain": False}},
    ],
)
def test_micro_batches_change_nothing(options):
    """With R1 and mix-and-match."""
    found = []
    for size in (4, 2):
        loop = run(made(**options), iteration=0, size=size)[1]
        found.append(loop.gradients)
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), name


SD = SimpleNamespace(sigma=14.6146, begins="x_T", init="teacher", dropout=None)


def texts(n: int = 4) -> Batch:
    batch = pairs(n, 4)
    batch.condition = Condition.of_prompts(["a", "b c", "a", ""][:n])
    return batch


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.mark.parametrize("shared", [True, False])
def test_noise_ahead_of_the_critic(shared, sdxl):
    """The critic sees alpha_t x + sigma_t eps, and is told t; the student's step is shown the same kind."""
    method = made(
        sdxl,
        SD,
        lambda_gan=1.0,
        noise={"enable": True, "t_range": (100, 900), "shared": shared},
        mix={"latent": 0.0, "text": 0.0, "noise": 0.0},
        r1={"gamma": 0.0},
    )
    seen = []
    method.critic.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach(), args[3])))
    run(method, texts(), iteration=0)
    assert len(seen) == 3 and all(100 <= step <= 900 for _, t in seen for step in t.tolist())
    with torch.no_grad():
        clean = [method.student(texts().noise, texts().condition), texts().target]
    eps = []
    for x, (shown, t) in zip(clean, seen, strict=False):
        bar = method.schedule.alphas_cumprod[t][:, None, None, None]
        eps.append(((shown - bar.sqrt() * x) / (1 - bar).sqrt()).float())
    assert torch.equal(seen[0][1], seen[1][1]) == shared and torch.allclose(*eps, atol=1e-3) == shared


@pytest.mark.long
def test_r1_goes_through_cross_attention(sdxl):
    method = made(sdxl, SD, lambda_gan=1.0)
    scalars, loop = run(method, texts(), iteration=0)
    assert loop.events.count("backward") == 3 and loop.losses[1] > 0
    assert all(bool(value.isfinite()) for value in (*scalars.values(), *loop.gradients["critic"]))


def test_what_does_not_go_together_is_refused(sdxl):
    for options, message in (
        ({"lambda_gan": 1.0, "noise": {"enable": True}}, "discrete schedule"),
        ({"lambda_gan": 1.0, "critic": {"z": "none"}}, "not told z"),
        ({"lambda_distance": 0.0}, "nothing is learned"),
        ({"distance": {"kind": "e_latent_lpips"}}, "compares latents, and teacher 'tiny' makes images"),
        ({"distance": {"kind": "perceptual"}}, "distance.extractor"),
        ({"lambda_gan": 1.0, "passes": "reuse", "real_data": {"share": 0.5}}, "passes: with real_data"),
    ):
        with pytest.raises(UserError, match=message):
            made(**options)
    with pytest.raises(UserError, match="critic.t: random is for clean samples"):
        made(sdxl, SD, lambda_gan=1.0, noise={"enable": True}, critic={"t": "random"})
    with pytest.raises(UserError, match=r"(?s)called at sigma 80, .*student.sigma: 14.6146, the highest"):
        made(sdxl)
    with pytest.raises(UserError, match="is no range of"):
        made(sdxl, SD, lambda_gan=1.0, noise={"enable": True, "t_range": (0, 1000)})


# The student of Stable Diffusion --------------------------------------------------------------------------------------


def test_the_student_is_equation_7(sdxl, tmp_path):
    """(z - sigma_T eps(z, c, T)) / alpha_T with z as it is; the file says so, and older files stay as they were."""
    method = made(sdxl, SD)
    student, z, c = method.student, texts().noise, sdxl.embed(texts().condition)
    seen = []
    student.network.net.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    x = student(z, c)
    assert torch.allclose(seen[0][0], z, atol=1e-6) and set(seen[0][1].tolist()) == {999.0}
    with torch.no_grad():
        eps = student.network.call(z, torch.full((4,), 999.0), c)
    assert torch.allclose(x, (z - 0.9976672298 * eps) / 0.0682649142, atol=1e-4)
    assert student.record == {"kind": "denoiser", "sigma": pytest.approx(14.614641), "begins": "x_T"}
    again = Student.from_record(student.network, student.spec, student.record)
    assert torch.equal(again(z, c), x)
    older = Student.from_record(student.network, student.spec, {"kind": "denoiser", "sigma": 14.614641})
    assert older.factor == older.sigma and "begins" not in older.record
    with pytest.raises(UserError, match="discrete schedule"):
        Student(tiny_network(), student.spec, 80.0, "x_T")


@pytest.mark.long
@pytest.mark.parametrize(("name", "sigma"), [("ddpm", 30.0), ("tiny-sd", 14.6146), ("tiny-sd", 13.12)])
def test_the_export_begins_with_z(name, sigma, tmp_path):
    """Exactly; Stable Diffusion's pipeline puts its own `steps_offset` in the place of another one."""
    teacher = load_teacher(name) if name == "tiny-sd" else tiny(name, tmp_path)
    student = Student(in_edm(teacher).network, in_edm(teacher).spec, sigma, "x_T")
    save_student(
        tmp_path / "s.safetensors",
        student.eval(),
        recipe={},
        teacher={"name": "tiny", "sha256": "0" * 64, "licence": "MIT"},
        metrics={},
        provenance=[],
    )
    assert load_student(tmp_path / "s.safetensors").begins == "x_T"
    done = export_checkpoint(tmp_path / "s.safetensors", "diffusers", tmp_path / "out", dtype="fp32")
    assert done.parity.difference < 1e-4 and "DDIMScheduler" in done.card.read_text()


def test_the_head_stays_in_full_precision(sdxl):
    """bfloat16's rounding of eps is multiplied by 14.6."""
    z, c = texts().noise, sdxl.embed(texts().condition)
    students = []
    for fp32_head in (True, False):
        student = made(sdxl, SD, fp32_head=fp32_head).student
        assert (type(student.network.net.conv_out) is FullPrecisionConv2d) == fp32_head
        found = []
        student.network.net.conv_out.register_forward_hook(lambda module, args, out, found=found: found.append(out))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            student(z, c)
        assert found[0].dtype == (torch.float32 if fp32_head else torch.bfloat16)
        students.append(student)
    assert type(sdxl.edm_view().net.conv_out) is torch.nn.Conv2d
    assert students[0].state_dict().keys() == students[1].state_dict().keys()


# Through the loop -----------------------------------------------------------------------------------------------------


def recipe(stage: int, **more) -> Recipe:
    options = {"distance": MSE, **({"lambda_gan": 0.25, "r1": {"interval": 2}} if stage == 2 else {})}
    return Recipe.from_dict(
        {
            "name": f"stage{stage}",
            "method": "diffusion2gan",
            "teacher": "tiny",
            "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "decays": {"*conv*": 1e-5}},
            "batch": 4,
            "images": 12,
            "log_every": 1,
            "ema": {"decay": 0.5, "start": 4},
            "diffusion2gan": options,
            **more,
        }
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    settings = PairSettings("tiny", n=8, shard_size=8, solver="euler", steps=2)
    return make_pairs(settings, tmp_path_factory.mktemp("d2g") / "pairs", compute=Compute(8), teacher=tiny_teacher())


def train(given: Recipe, folder, store, start=None, stop_after: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    setup = Setup(
        given.options,
        teacher=tiny_teacher(),
        student=given.student,
        batch=given.batch,
        pairs=store,
        start=None if start is None else load_student(start),
    )
    trainer, stop = Trainer(given, setup, folder), StopFlag()
    trainer.resume()

    def progress(images: int, text: str) -> None:
        if stop_after and trainer.iteration >= stop_after:
            stop.received = 2

    try:
        trainer.run(progress, stop)
    except Stopped:
        assert stop_after


@pytest.mark.long
def test_stage_two_from_stage_one_and_a_resumed_run_has_the_same_bytes(store, tmp_path):
    train(recipe(1), tmp_path / "one", store)
    train(recipe(2), tmp_path / "two", store, tmp_path / "one")
    train(recipe(2), tmp_path / "parts", store, tmp_path / "one", stop_after=2)
    train(recipe(2), tmp_path / "parts", store, tmp_path / "one")
    whole, parts = (tmp_path / name / "checkpoints" / "last.safetensors" for name in ("two", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    first, second = load_student(tmp_path / "one"), load_student(tmp_path / "two")
    far = tiny_student(seed=4)
    z, labels = pairs().noise, torch.arange(4)
    near = (second(z, labels) - first(z, labels)).abs().mean()
    assert 0 < near < (far(z, labels) - first(z, labels)).abs().mean()


def test_stage_two_may_begin_with_the_raw_weights_of_stage_one(store, tmp_path):
    """Which are in the state of its run, not in its checkpoints; what is neither there is said before anything."""
    train(recipe(1), tmp_path / "one", store)
    last = tmp_path / "one" / "checkpoints" / "last.safetensors"
    state = load_file(tmp_path / "one" / "checkpoints" / "state.safetensors")[0]
    raw = recipe(2, diffusion2gan={"lambda_gan": 0.25, "distance": MSE, "start": "raw"})
    for start in (tmp_path / "one", last):
        check_raw(raw, start)
        student = load_student(start)
        average = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        fill_raw(student, start)
        for name, tensor in student.state_dict().items():
            assert torch.equal(tensor, state[f"network/student/{name}"])
        assert any(not torch.equal(tensor, average[name]) for name, tensor in student.state_dict().items())
    assert wants_raw(raw) and not wants_raw(recipe(2))
    check_raw(recipe(2), None)
    with pytest.raises(UserError, match="there is none"):
        check_raw(raw, None)
    shutil.copy(last, tmp_path / "alone.safetensors")
    with pytest.raises(UserError, match=r"alone.safetensors has no state.safetensors beside it"):
        check_raw(raw, tmp_path / "alone.safetensors")
    other = Student(tiny_network(model_channels=32), tiny_teacher().spec)
    with pytest.raises(UserError, match="is another one than"):
        fill_raw(other, tmp_path / "one")


def test_the_raw_weights_of_a_sharded_run_are_in_its_parts(store, tmp_path):
    train(recipe(1), tmp_path / "one", store)
    checkpoints = tmp_path / "one" / "checkpoints"
    tensors, record = load_file(checkpoints / "state.safetensors")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        written = parts.write(checkpoints, tensors, None)
    finally:
        torch.distributed.destroy_process_group()
    save_file(checkpoints / "state.safetensors", {}, {**record, "parts": written})
    student = load_student(tmp_path / "one")
    fill_raw(student, tmp_path / "one")
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, tensors[f"network/student/{name}"])


def test_finetune_takes_the_raw_weights(store, tmp_path):
    """`prepare` does, which all commands go through."""
    train(recipe(1), tmp_path / "one", store)
    teacher = tiny_teacher(tmp_path / "teacher.safetensors")
    setups = []
    for start in ("ema", "raw"):
        given = recipe(2, diffusion2gan={"lambda_gan": 0.25, "distance": MSE, "start": start})
        given = given.model_copy(
            update={"teacher": str(tmp_path / "teacher.safetensors"), "pairs": four_pairs(tmp_path)}
        )
        setups.append(prepare(given, CPU, tmp_path / "one", print, lambda *_: None, StopFlag()))
    state = load_file(tmp_path / "one" / "checkpoints" / "state.safetensors")[0]
    found = [setup.start.state_dict() for setup in setups]
    assert all(torch.equal(tensor, state[f"network/student/{name}"]) for name, tensor in found[1].items())
    assert setups[0].start.fingerprint == load_student(tmp_path / "one").fingerprint != setups[1].start.fingerprint
    assert provenance_of(setups[1])[-1] != provenance_of(setups[0])[-1] and teacher.spec.name == "tiny"


def four_pairs(folder) -> PairsSection:
    return PairsSection(path=str(folder / "pairs"), n=4, solver="euler", steps=1, shard_size=4)


def test_stage_two_begins_with_the_average_of_stage_one(store):
    start = tiny_student(seed=4)
    method = made(lambda_gan=0.25, start=start)
    assert torch.equal(method.student(pairs().noise, torch.arange(4)), start(pairs().noise, torch.arange(4)))
    before, critic = tiny_network().state_dict(), UNetCritic.of(tiny_network()).network.state_dict()
    assert all(torch.equal(before[key], value) for key, value in critic.items())  # the critic is the teacher's


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "millions"),
    [
        (("d2g_cifar10:1m",), 76.8),
        (("d2g_sd_cfg3:ode", "d2g_sd_cfg3:gan"), 51.2),
        (("d2g_sd_cfg8:ode", "d2g_sd_cfg8:gan"), 153.6),
        (("d2g_sdxl_cfg7:ode", "d2g_sdxl_cfg7:gan"), 97.28),
    ],
)
def test_the_recipes_take_the_printed_number_of_network_evaluations(names, millions):
    """Table A1, exactly."""
    phases = []
    for name in names:
        one = load_recipe(name)
        phases.append(Phase(Diffusion2GAN.phase(one.options), one.batch, -(-one.images // one.batch)))
    assert training_nfe(phases) == round(millions * 1e6)


def test_table_2_goes_on_with_the_distance_of_the_model_that_it_starts_from():
    start = load_recipe("d2g_sd_cfg3:elatentlpips_b2048").options.distance
    assert (start.kind, start.augment, start.vanilla) == ("e_latent_lpips", "bg+cutout", "none")
    for name in ("d", "z", "r1", "multiscale", "mixmatch"):
        assert load_recipe(f"d2g_sd_cfg3:{name}").options.distance == start, name
    for name in ("ode", "gan", "gan_w0", "gan_w1"):  # Table A1's
        assert load_recipe(f"d2g_sd_cfg3:{name}").options.distance.vanilla == "sum", name


@pytest.mark.parametrize(
    ("pairs_", "millions"),
    [("50k", 78.55), ("100k", 80.3), ("200k", 83.8), ("500k", 94.3), ("1m", 111.8)],
)
def test_table_6_counts_the_pairs_too(pairs_, millions):
    one = load_recipe(f"d2g_cifar10:{pairs_}")
    phase = Phase("regression", one.batch, one.images // one.batch)
    solver = Solver(one.pairs.solver, one.pairs.steps)
    assert total_nfe([phase], one.pairs.n, solver.nfe) == round(millions * 1e6)
