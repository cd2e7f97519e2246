"""CamVid: the layout, every way a file can be wrong, and the real data where it is at hand (FASTKD_CAMVID)."""

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from torchvision import tv_tensors  # noqa: E402

from fastkd.train.data import CamVid, DataError, build_dataset  # noqa: E402

NAMES = ("a", "b")


@pytest.fixture
def root(tmp_path):
    """A sound data set of two images: label 0 to 11 in stripes."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        for name in NAMES:
            Image.fromarray(np.full((24, 36, 3), 90, np.uint8)).save(tmp_path / split / f"{name}.png")
            label = np.broadcast_to(np.arange(36) // 3, (24, 36)).astype(np.uint8)
            Image.fromarray(label).save(tmp_path / f"{split}annot" / f"{name}.png")
    return tmp_path


def test_items(root):
    dataset = CamVid(root, "train")
    assert len(dataset) == 2
    assert len(dataset.classes) == 11
    assert dataset.palette.shape == (11, 3)
    image, mask = dataset[0]
    assert type(image) is tv_tensors.Image
    assert image.shape == (3, 24, 36)
    assert image.dtype == torch.uint8
    assert type(mask) is tv_tensors.Mask
    assert mask.shape == (24, 36)
    assert mask.unique().tolist() == [*range(11), 255]
    assert (mask[:, 33:] == 255).all()


def test_jpeg_palette_labels_and_transform(root):
    (root / "train" / "a.png").unlink()
    Image.fromarray(np.zeros((24, 36, 3), np.uint8)).save(root / "train" / "a.JPG")
    path = root / "trainannot" / "a.png"
    with Image.open(path) as label:
        indexed = label.convert("L")
    indexed.putpalette([0, 0, 0] * 256)
    assert indexed.mode == "P"
    indexed.save(path)
    dataset = build_dataset("camvid", root=root, split="train", transform=lambda image, mask: (image + 1, mask))
    image, mask = dataset[0]
    assert int(image.max()) == 1
    assert mask.unique().tolist() == [*range(11), 255]


def test_missing_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CamVid(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"test.*SegNet"):
        CamVid(root, "test")
    for path in (root / "valannot").iterdir():
        path.unlink()
    (root / "valannot").rmdir()
    with pytest.raises(FileNotFoundError, match="valannot"):
        CamVid(root, "val")


def test_no_images(root):
    for path in (root / "train").iterdir():
        path.unlink()
    (root / "train" / "readme.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no png or jpg images in .*train"):
        CamVid(root, "train")


def test_unknown_split(root):
    with pytest.raises(ValueError, match="train, val, test"):
        CamVid(root, "training")


def test_image_without_label(root):
    (root / "trainannot" / "b.png").unlink()
    with pytest.raises(DataError, match=r"train.b\.png has no label .*trainannot.b\.png"):
        CamVid(root, "train")


def test_label_that_vanished(root):
    dataset = CamVid(root, "train")
    (root / "trainannot" / "b.png").unlink()
    with pytest.raises(DataError, match=r"trainannot.b\.png is gone"):
        dataset[1]


@pytest.mark.parametrize("folder", ["train", "trainannot"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_file(root, folder, damage):
    path = root / folder / "b.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"<html>not found</html>"}[damage])
    dataset = CamVid(root, "train")
    dataset[0]
    with pytest.raises(DataError, match=rf"{folder}.b\.png cannot be read .*replace"):
        dataset[1]


def test_truncated_jpeg(root):
    (root / "train" / "b.png").unlink()
    path = root / "train" / "b.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 36, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"b\.jpg cannot be read"):
        CamVid(root, "train")[1]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_wrong_image_mode(root, mode):
    Image.new(mode, (36, 24)).save(root / "train" / "a.png")
    with pytest.raises(DataError, match=rf"a\.png has mode {mode}, expected RGB"):
        CamVid(root, "train")[0]


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1"])
def test_wrong_label_mode(root, mode):
    Image.new(mode, (36, 24)).save(root / "trainannot" / "a.png")
    with pytest.raises(DataError, match=r"trainannot.a\.png has mode .*, expected L or P; convert"):
        CamVid(root, "train")[0]


def test_label_out_of_range(root):
    label = np.zeros((24, 36), np.uint8)
    label[5, 7] = 12
    label[6, 8] = 255  # void as others write it
    Image.fromarray(label).save(root / "trainannot" / "a.png")
    with pytest.raises(DataError, match=r"trainannot.a\.png holds the value 12 at row 5, column 7"):
        CamVid(root, "train")[0]


def test_sizes_differ(root):
    Image.new("L", (36, 20)).save(root / "trainannot" / "a.png")
    with pytest.raises(DataError, match=r"a\.png is 36x24 but its label .*a\.png is 36x20"):
        CamVid(root, "train")[0]


def real_root():
    places = [os.environ.get("FASTKD_CAMVID"), Path(__file__).parents[3] / "shared" / "data" / "camvid"]
    return next((Path(p) for p in places if p and Path(p).is_dir()), None)


@pytest.mark.skipif(real_root() is None, reason="CamVid is not here: set FASTKD_CAMVID to its folder")
def test_real_camvid():
    train, val = CamVid(real_root(), "train"), CamVid(real_root(), "val")
    assert (len(train), len(val)) == (367, 101)
    assert not {p.name for p, _ in train.items} & {p.name for p, _ in val.items}
    seen = set()
    for dataset in (train, val):
        for index in range(0, len(dataset), 40):
            image, mask = dataset[index]
            assert image.shape == (3, 360, 480)
            assert mask.shape == (360, 480)
            seen |= set(mask.unique().tolist())
    assert seen == {*range(11), 255}
