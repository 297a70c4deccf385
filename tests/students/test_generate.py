"""Sampling to files: image i is the network's answer to seed + i, and the bytes do not depend on how the work went."""

import math
import os
import shutil
import signal

import pytest
import torch

from d2o.data.archive import archive_for, check_free
from d2o.data.images import open_images, to_uint8
from d2o.data.prompts import Prompts
from d2o.diffusion.noise import noise_and_labels, noise_for_seeds
from d2o.diffusion.solvers import Solver
from d2o.errors import UserError
from d2o.networks import processor
from d2o.runtime import StopFlag, Stopped
from d2o.students import output_parts
from d2o.students.base import Student, load_student
from d2o.students.generate import SampleSettings, first_images, make_samples
from d2o.students.samplers import student_sampler, teacher_sampler
from d2o.teachers.base import Teacher
from tests.helpers import tiny_student, tiny_teacher
from tests.workers import files, finish, start, wait_for

SUFFIXES = ["", ".zip", ".tar", ".npz"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "s.safetensors"
    tiny_student(path)
    return path


@pytest.fixture
def build(student, tmp_path):
    """build("x.zip", n=..., seed=..., labels=..., how={...}) -> path: 20 images of the tiny student in parts of 8, one
    thread."""

    def run(name="x.zip", how=None, sampler=None, **settings):
        sampler = sampler or student_sampler(load_student(student))
        make_samples(
            sampler,
            tmp_path / name,
            SampleSettings(**{"n": 20, **settings}),
            **{"batch": 4, "threads": 1, "chunk": 8, **(how or {})},
        )
        return tmp_path / name

    return run


def arguments(student, out):
    return ["sample", student, "--n", 20, "--out", out, "--batch", 4, "--chunk", 8, "--threads", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def reference(student, tmp_path_factory):
    """suffix -> the bytes made in one go."""
    folder = tmp_path_factory.mktemp("reference")
    for suffix in SUFFIXES:
        sampler = student_sampler(load_student(student))
        make_samples(sampler, folder / f"x{suffix}", SampleSettings(20), batch=4, threads=1, chunk=8)
    return files(folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_image_is_what_the_student_makes_of_its_seed(build, student, suffix):
    found = open_images(build(f"x{suffix}", seed=50))
    noise, labels = noise_and_labels(range(50, 70), (1, 8, 8), 10)
    network = load_student(student)
    x = network.decode(network(noise, labels))
    assert torch.equal(found.labels, labels)
    assert (
        found.images(range(20)).int() - to_uint8(x).int()
    ).abs().max() <= 1  # another batch size may round to the neighbour


def test_a_teacher_samples_from_the_same_noise(build):
    teacher = tiny_teacher()
    out = build(sampler=teacher_sampler(teacher, Solver("heun", 3)), seed=7)
    noise, labels = noise_and_labels(range(7, 27), (1, 8, 8), 10)
    expected = to_uint8(teacher.decode(teacher.sample(noise, labels, "heun", 3)))
    found = open_images(out)
    assert (found.images(range(20)).int() - expected.int()).abs().max() <= 1 and torch.equal(found.labels, labels)


def test_the_record_says_what_made_the_images(build, student):
    record = check_free(archive_for(build(seed=3, labels="balanced")))
    assert record["settings"] == {"n": 20, "seed": 3, "labels": "balanced"}
    assert record["source"]["kind"] == "student" and record["source"]["checkpoint"]["teacher"]["name"] == "tiny"
    assert record["source"]["sha256"] == load_student(student).fingerprint
    assert record["compute"]["batch"] == 4 and "chunk" not in record["compute"]
    record = check_free(archive_for(build("t.tar", sampler=teacher_sampler(tiny_teacher(), Solver("euler", 2), 3.0))))
    source = {name: record["source"][name] for name in ("kind", "solver", "steps", "cfg", "nfe", "forwards", "licence")}
    assert source == {
        "kind": "teacher",
        "solver": "euler",
        "steps": 2,
        "cfg": 3.0,
        "nfe": 2,
        "forwards": 4,
        "licence": "CC0-1.0",
    }


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("chunk", [1, 10, 1000])
def test_bytes_do_not_depend_on_the_parts(build, reference, tmp_path, suffix, chunk):
    build(f"x{suffix}", {"chunk": chunk})
    assert files(tmp_path) == {
        name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")
    }


KILLS = [(".zip", "replace", k) for k in (3, 5, 8, 9)] + [
    (".npz", "record", 2),
    ("", "compute", 4),
    ("", "replace", 8),
    (".tar", "record", 1),
]


@pytest.mark.parametrize("suffix, die_in, die_at", KILLS)
def test_bytes_are_the_same_after_a_kill(student, reference, build, tmp_path, suffix, die_in, die_at):
    out = tmp_path / "work" / f"x{suffix}"
    assert finish(start(arguments(student, out), tmp_path / "log", die_in=die_in, die_at=die_at)) == -signal.SIGKILL
    assert not (out / "samples.json").exists() if not suffix else die_at == 9 or not out.exists()
    build(f"work/x{suffix}", {"batch": 5, "threads": 2, "chunk": 3})  # what was recorded holds, not these
    assert files(tmp_path / "work") == {
        name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")
    }


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_bytes_are_the_same_from_two_workers_one_of_them_killed(student, reference, tmp_path, suffix):
    out, parts = tmp_path / "work" / f"x{suffix}", tmp_path / "work" / f"x{suffix}.parts"
    first = start(arguments(student, out), tmp_path / "first", pause=0.1)
    wait_for(lambda: (parts / ".locks" / "part-00000.safetensors.lock").exists())
    second = start(arguments(student, out), tmp_path / "second", pause=0.05)
    wait_for(lambda: (parts / ".locks" / "part-00001.safetensors.lock").exists())
    first.kill()
    assert finish(second) == 0
    assert files(tmp_path / "work") == {
        name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")
    }


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_workers_that_start_and_end_together(student, reference, tmp_path, suffix):
    out = tmp_path / "work" / f"x{suffix}"
    workers = [start(arguments(student, out), tmp_path / f"log{i}", pause=0.01) for i in range(4)]
    assert [finish(worker) for worker in workers] == [0] * 4
    assert files(tmp_path / "work") == {
        name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")
    }


def test_others_may_begin_while_one_looks(tmp_path, monkeypatch):
    archive, parts = archive_for(tmp_path / "x"), output_parts.parts_of(tmp_path / "x")
    looked = output_parts.check_free

    def begun_meanwhile(archive):
        if not archive.out.exists():
            parts.open({"format": parts.kind, "version": 1, "record": {}, "parts": []})
            (archive.out / "00000").mkdir(parents=True)
            (archive.out / "00000" / "img00000000.png").write_bytes(b"")
        return looked(archive)

    monkeypatch.setattr(output_parts, "check_free", begun_meanwhile)
    assert output_parts.finished(archive, parts) is None
    shutil.rmtree(parts.path)
    with pytest.raises(UserError, match="holds no samples that d2o made"):
        output_parts.finished(archive, parts)


def test_a_stop_signal_keeps_the_parts_and_says_how_to_continue(student, reference, tmp_path):
    out = tmp_path / "work" / "x.zip"
    process = start(arguments(student, out), tmp_path / "log", pause=0.1)
    wait_for(lambda: (tmp_path / "work" / "x.zip.parts" / "part-00000.safetensors").exists())
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    said = (tmp_path / "log").read_text()
    assert "stopped with 8 of 20 images; run the same command again to continue" in said and "Traceback" not in said
    assert finish(start(arguments(student, out), tmp_path / "log")) == 0
    assert files(tmp_path / "work") == {"x.zip": reference["x.zip"]}


def test_a_stop_within_a_part_drops_it(build, tmp_path):
    flag = StopFlag()

    def progress(done, total, note):
        flag.received = signal.SIGTERM if done >= 12 else 0

    with pytest.raises(Stopped, match="stopped with 8 of 20 images") as stopped:
        build(how={"progress": progress, "stop": flag})
    assert stopped.value.exit_code == 143 and not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_finished_output_is_left_alone(build, tmp_path, suffix, monkeypatch):
    out = build(f"x{suffix}")
    before = {p: p.stat().st_mtime_ns for p in [out, *out.rglob("*")]}
    monkeypatch.setattr(Student, "forward", None)
    said = []
    build(f"x{suffix}", {"say": said.append, "batch": 7})
    assert said == [f"{out} holds all 20 images already; nothing to do"]
    assert {p: p.stat().st_mtime_ns for p in [out, *out.rglob("*")]} == before
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_leftover_parts_of_a_finished_output_go(build, student, tmp_path):
    out = build()
    data = out.read_bytes()
    out.unlink()
    assert finish(start(arguments(student, out), tmp_path / "log", die_in="record", die_at=3)) == -signal.SIGKILL
    out.write_bytes(data)  # as if killed between the last rename and the removal
    build()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "x.zip"]


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar"])
def test_other_settings_are_refused_by_name(build, suffix, student, tmp_path):
    out = build(f"x{suffix}")
    before = files(tmp_path)
    with pytest.raises(UserError) as error:
        build(f"x{suffix}", n=21, seed=1, labels="balanced")
    assert (
        error.value.message == f"{out} holds samples of other settings:\n  seed: 0 -> 1\n  labels: random -> balanced"
    )
    with pytest.raises(UserError, match="kind: student -> teacher"):
        build(f"x{suffix}", sampler=teacher_sampler(tiny_teacher()))
    tiny_student(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(UserError, match="sha256: "):
        build(f"x{suffix}", sampler=student_sampler(load_student(tmp_path / "other.safetensors")))
    assert {name: data for name, data in files(tmp_path).items() if name != "other.safetensors"} == before


def test_other_settings_for_unfinished_parts_are_refused(build, tmp_path):
    flag = StopFlag()
    flag.received = signal.SIGTERM
    with pytest.raises(Stopped):
        build(how={"stop": flag})
    with pytest.raises(UserError, match="seed: 0 -> 1") as error:
        build(seed=1)
    assert "remove" in error.value.hint and "x.zip.parts" in error.value.hint


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_foreign_is_overwritten(build, tmp_path, suffix):
    if suffix:
        (tmp_path / f"x{suffix}").write_text("foreign")
    else:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis.tex").write_text("foreign")
    with pytest.raises(UserError, match="it is left as it is"):
        build(f"x{suffix}")
    assert set(files(tmp_path).values()) == {b"foreign"} and len(files(tmp_path)) == 1
    (tmp_path / "y.zip.parts").mkdir()
    (tmp_path / "y.zip.parts" / "thesis.tex").write_text("foreign")
    with pytest.raises(UserError, match="holds files that are not of"):
        build("y.zip")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 0}, "n must be"),
        ({"seed": 2**32}, "seed"),
        ({"labels": "10"}, "out of range"),
        ({"name": "x.rar"}, "unknown output format '.rar'"),
        ({"how": {"batch": 0}}, "batch must"),
        ({"how": {"chunk": 0}}, "chunk must"),
        ({"how": {"threads": 0}}, "threads must"),
    ],
)
def test_bad_settings_create_nothing(build, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)
    assert not list(tmp_path.iterdir())


def test_bad_teacher_settings():
    teacher = tiny_teacher()
    for solver, message in (
        (Solver("rk4"), "unknown solver"),
        (Solver("heun", 0), "steps must be"),
        (Solver("sde", 4), "is deterministic"),
        (Solver("heun", 4, spacing="leading"), "takes Karras' steps"),
    ):
        with pytest.raises(UserError, match=message):
            teacher_sampler(teacher, solver)
    with pytest.raises(UserError, match="takes no prompts"):
        teacher_sampler(teacher, prompts=Prompts.from_list(["a seven"]))


def test_one_image(build):
    found = open_images(build("one.zip", n=1))
    assert len(found) == 1 and torch.equal(found.images([0]), open_images(build("two.npz", n=1)).images([0]))


def test_label_modes(build):
    assert open_images(build("b.zip", labels="balanced")).labels.tolist() == [*range(10)] * 2
    assert open_images(build("c.tar", labels="3,1")).labels.tolist() == [3, 1] * 10


def test_values_that_are_not_finite_are_refused_with_their_seed(build, student):
    sampler = student_sampler(load_student(student))

    def broken(noise, labels):
        x = sampler.call(noise, labels).clone()
        x[noise[:, 0, 0, 0] == noise_for_seeds([113], (1, 8, 8))[0, 0, 0, 0]] = math.nan
        return x

    with pytest.raises(UserError, match="not finite for seed 113"):
        build(sampler=type(sampler)(broken, sampler.spec, sampler.device, sampler.record), seed=100)


def test_a_full_disk_is_one_line_and_the_output_goes_on_later(build, reference, monkeypatch, tmp_path):
    real, calls = os.replace, 0

    def full(*paths):
        nonlocal calls
        calls += 1
        if calls == 8:  # manifest, three parts and their records, then the joined file
            raise OSError(28, "No space left on device")
        return real(*paths)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*x.zip: the disk is full"):
        build()
    monkeypatch.setattr(os, "replace", real)
    assert build().read_bytes() == reference["x.zip"]


def test_the_first_images_again_are_those_of_the_file(build, student):
    sampler = student_sampler(load_student(student))
    out = build(n=20)
    images, labels = first_images(sampler, check_free(archive_for(out)), 11)
    found = open_images(out)
    assert torch.equal(images, found.images(range(11))) and torch.equal(labels, found.labels[:11])
    assert len(first_images(sampler, check_free(archive_for(out)), 64)[0]) == 20


def test_a_teacher_is_not_asked_for_gradients(build, monkeypatch):
    seen = []
    real = Teacher.denoise
    monkeypatch.setattr(
        Teacher, "denoise", lambda self, *a: seen.append(torch.is_inference_mode_enabled()) or real(self, *a)
    )
    build(sampler=teacher_sampler(tiny_teacher(), Solver("euler", 1)))
    assert seen and all(seen)


def test_how_the_network_is_run_is_recorded_and_goes_on(build, student, monkeypatch):
    monkeypatch.setattr(processor, "bf16_unit", lambda device: "AMX")
    monkeypatch.setattr(processor, "WIDE", 1000)
    exact, said = build("exact.npz", how={"channels_last": False}), []
    half = build("half.npz", how={"precision": "auto", "say": said.append})
    compute = check_free(archive_for(half))["compute"]
    assert (compute["precision"], compute["channels_last"]) == ("bf16", True) and "precision" not in check_free(
        archive_for(exact)
    )["compute"]
    assert said == ["precision bf16 (auto: AMX computes in bf16)"]
    a, b = (open_images(path).images(range(20)).float() for path in (exact, half))
    assert 0 < (a - b).abs().max() < 16  # of 255: bf16 has 8 bits
    # A picture of it is made as the output was, also by a sampler that made none of it.
    images, _ = first_images(student_sampler(load_student(student)), check_free(archive_for(half)), 8)
    assert torch.equal(images, open_images(half).images(range(8)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_output_grows_to_the_bytes_of_one_made_at_once(build, tmp_path, suffix, monkeypatch):
    build(f"whole/x{suffix}", n=27)
    sizes = []
    forward = Student.forward
    monkeypatch.setattr(
        Student, "forward", lambda self, noise, *a: sizes.append(len(noise)) or forward(self, noise, *a)
    )
    said = []
    for n in (3, 18, 27):
        build(f"grown/x{suffix}", {"say": said.append, "batch": None if n > 3 else 4}, n=n)
    assert files(tmp_path / "grown") == files(tmp_path / "whole")
    assert sum(sizes) == 27 + 3 + 2 and any("grows to 18 images" in line for line in said)
    before = files(tmp_path / "grown")
    build(f"grown/x{suffix}", {"say": said.append}, n=9)
    assert (
        "holds 27 images already, and so the first 9; nothing to do" in said[-1] and files(tmp_path / "grown") == before
    )


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar"])
def test_what_is_damaged_is_not_taken_over(build, tmp_path, suffix):
    build(f"whole/x{suffix}", n=24)
    out = build(f"grown/x{suffix}", n=20)
    damaged = out / "00000" / "img00000003.png" if not suffix else out
    data = bytearray(damaged.read_bytes())
    at = data.index(b"IDAT", 0 if not suffix else len(data) // 4) + 6  # within pixels
    data[at] ^= 1
    damaged.write_bytes(bytes(data))
    build(f"grown/x{suffix}", n=24)
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


GROWING_KILLS = [
    ("", "compute", 1),
    ("", "record", 2),
    ("", "replace", 4),
    ("", "replace", 9),
    (".zip", "replace", 1),
    (".zip", "record", 1),
    (".tar", "replace", 5),
    (".npz", "replace", 6),
]


@pytest.mark.parametrize("suffix, die_in, die_at", GROWING_KILLS)
def test_a_kill_while_it_grows_leaves_what_was_there(student, reference, build, tmp_path, suffix, die_in, die_at):
    out = build(f"work/x{suffix}", n=7)
    before = files(tmp_path / "work")
    assert finish(start(arguments(student, out), tmp_path / "log", die_in=die_in, die_at=die_at)) == -signal.SIGKILL
    now = files(tmp_path / "work")
    if suffix:
        assert now[f"x{suffix}"] == before[f"x{suffix}"]
    elif (die_in, die_at) != ("replace", 9):  # amid the new images' names
        assert len(open_images(out)) == 7 and now["x/samples.json"] == before["x/samples.json"]
    build(f"work/x{suffix}")
    expected = {name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")}
    assert files(tmp_path / "work") == expected


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_workers_asked_for_different_numbers_make_the_largest(student, reference, tmp_path, suffix):
    out = tmp_path / "work" / f"x{suffix}"
    parts = out.with_name(out.name + ".parts")
    small = [str(word) if word != 20 else "9" for word in arguments(student, out)]
    first = start(small, tmp_path / "first", pause=0.1)
    wait_for(lambda: (parts / ".locks" / "part-00000.safetensors.lock").exists())
    workers = [start(arguments(student, out), tmp_path / "second"), start(small, tmp_path / "third")]
    assert [finish(worker) for worker in (first, *workers)] == [0, 0, 0]
    assert files(tmp_path / "work") == {
        name: data for name, data in reference.items() if name.startswith("x/" if not suffix else f"x{suffix}")
    }


def test_workers_of_several_threads_write_what_one_of_them_writes(student, tmp_path):
    """They take the threads that the first one recorded, also where they would have taken another number themselves."""

    def begin(out, threads, pause):
        words = ["--threads", threads] if threads else []
        return start(
            ["sample", student, "--n", 20, "--out", out, "--batch", 4, "--chunk", 8, *words],
            tmp_path / f"log{threads}",
            pause,
        )

    assert finish(begin(tmp_path / "one.zip", 2, 0.0)) == 0
    first = begin(tmp_path / "two.zip", 2, 0.2)
    wait_for((tmp_path / "two.zip.parts" / "manifest.json").exists)
    second = begin(tmp_path / "two.zip", 1, 0.0)
    assert (finish(first), finish(second)) == (0, 0)
    assert "was begun with threads 2" in (tmp_path / "log1").read_text().replace("\n", " ")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
