"""A zip's directory is held against its end: an entry whose lengths are wrong swallows those after it, and zipfile says
nothing."""

import zipfile

import numpy as np
import pytest

from d2o.data.images import open_images
from d2o.errors import UserError
from d2o.interop.npz import read_npz
from d2o.interop.zips import zip_members


def swallow(path):
    """The first entry's comment is said to be as long as it can be."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2")
    data[at + 32 : at + 34] = b"\xff\xff"
    path.write_bytes(data)


def test_members_that_are_swallowed_are_missed(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{f"a{i}": np.arange(i + 1) for i in range(5)})
    with zipfile.ZipFile(path) as archive:
        assert [info.filename for info in zip_members(archive)] == [f"a{i}.npy" for i in range(5)]
    swallow(path)
    with (
        zipfile.ZipFile(path) as archive,
        pytest.raises(zipfile.BadZipFile, match="5 members, and its directory lists 1"),
    ):
        zip_members(archive)
    with pytest.raises(ValueError, match="directory lists 1"):
        read_npz(path, lambda name: True)


def test_an_image_set_without_some_of_its_images_is_refused(tmp_path):
    from PIL import Image

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(3):
            Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "image.png")
            archive.write(tmp_path / "image.png", f"{i}.png")
    assert len(open_images(tmp_path / "x.zip")) == 3
    swallow(tmp_path / "x.zip")
    with pytest.raises(UserError, match=r"x\.zip is not a readable zip: its end says that it has 3 members"):
        open_images(tmp_path / "x.zip")


@pytest.mark.long
def test_more_members_than_16_bits_count(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(66_000):
            archive.writestr(zipfile.ZipInfo(str(i)), b"")
    with zipfile.ZipFile(tmp_path / "many.zip") as archive:
        assert len(zip_members(archive)) == 66_000


def test_a_member_without_a_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.png"), b"x")
        archive.infolist()[0].filename = ""
    with pytest.raises(UserError, match=r"x\.zip is not a readable zip: a member has no name"):
        open_images(tmp_path / "x.zip")
