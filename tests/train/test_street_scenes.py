"""The generated data set, and building data sets by name."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

from torchvision import tv_tensors  # noqa: E402

from fastkd.train.data import StreetScenes, build_dataset  # noqa: E402

SMALL = (64, 128)


def test_item_format():
    dataset = StreetScenes("train", size=SMALL)
    image, mask = dataset[0]
    assert type(image) is tv_tensors.Image
    assert type(mask) is tv_tensors.Mask
    assert image.shape == (3, *SMALL)
    assert image.dtype == torch.uint8
    assert mask.shape == SMALL
    assert mask.dtype == torch.uint8
    assert len(dataset) == 2000
    assert len(StreetScenes("val")) == 200
    assert dataset.palette.shape == (len(dataset.classes), 3)
    assert dataset.palette.dtype == np.uint8
    assert len({tuple(c) for c in dataset.palette.tolist()}) == len(dataset.classes)


def test_items_are_bitwise_reproducible_in_any_order():
    one, two = StreetScenes("train", size=SMALL), StreetScenes("train", size=SMALL)
    first = [one[i] for i in (0, 1, 2)]
    for i in (2, 0, 1):
        image, mask = two[i]
        assert torch.equal(image, first[i][0])
        assert torch.equal(mask, first[i][1])


def test_items_splits_and_seeds_differ():
    pictures = [
        StreetScenes(split, size=SMALL, seed=seed)[i][0].numpy().tobytes()
        for split in ("train", "val")
        for seed in (0, 1)
        for i in range(4)
    ]
    assert len(set(pictures)) == len(pictures)


def test_length_does_not_change_an_item():
    assert torch.equal(StreetScenes("val", size=SMALL, length=3)[2][0], StreetScenes("val", size=SMALL)[2][0])


@pytest.fixture(scope="module")
def scenes():
    """40 scenes as (image (3, H, W), label (H, W))."""
    dataset = StreetScenes("train", size=SMALL)
    return [dataset.generate(i) for i in range(40)]


def test_every_class_occurs_and_no_other_label(scenes):
    shares = np.array([np.bincount(label.ravel(), minlength=256) for _, label in scenes])
    classes = len(StreetScenes.classes)
    assert shares[:, classes:255].sum() == 0
    seen = (shares > 0).sum(0)
    assert (seen[:classes] >= 6).all(), dict(zip(StreetScenes.classes, seen[:classes], strict=True))
    assert 0 < shares[:, 255].sum() < 0.1 * shares.sum()


def test_colour_alone_does_not_tell_the_class(scenes):
    """The best prediction from a pixel's colour (16 levels per channel) has low accuracy, even on the data that it
    is fitted to."""
    classes = len(StreetScenes.classes)
    table = np.zeros((16**3, classes), dtype=np.int64)
    for image, label in scenes:
        red, green, blue = (image >> 4).astype(int)
        valid = label != 255
        np.add.at(table, ((red * 256 + green * 16 + blue)[valid], label[valid]), 1)
    guess = np.eye(classes, dtype=bool)[table.argmax(1)]
    hits, guessed = (table * guess).sum(0), (guess * table.sum(1, keepdims=True)).sum(0)
    assert (hits / (table.sum(0) + guessed - hits)).mean() < 0.25


@pytest.mark.parametrize("size", [(16, 16), (33, 77), (160, 90), (1, 1), (64, 15)])
def test_any_size(size):
    if min(size) < 16:
        with pytest.raises(ValueError, match="at least 16"):
            StreetScenes("train", size=size)
        return
    dataset = StreetScenes("train", size=size)
    for i in range(8):
        image, mask = dataset[i]
        assert image.shape == (3, *size)
        assert mask.shape == size


def test_a_scene_keeps_its_layout_when_the_size_changes():
    """Twice the size shows the same scene: nearest-neighbour downsampling of its labels agrees almost everywhere."""
    small, large = StreetScenes("train", size=(64, 128)), StreetScenes("train", size=(128, 256))
    same = [np.mean(small.generate(i)[1] == large.generate(i)[1][::2, ::2]) for i in range(6)]
    assert min(same) > 0.85


def test_cache_gives_the_same_items_and_is_not_written_by_transforms():
    def spoil(image, mask):
        image.zero_()
        mask.zero_()
        return image, mask

    plain = StreetScenes("val", size=SMALL, length=2)
    cached = StreetScenes("val", size=SMALL, length=2, cache=True, transform=spoil)
    cached[0]
    assert len(cached.cache) == 1
    cached.transform = None
    assert torch.equal(cached[0][0], plain[0][0])
    assert torch.equal(cached[0][1], plain[0][1])
    assert cached[-1][0].shape == (3, *SMALL)
    with pytest.raises(IndexError):
        cached[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "train, val"),
        ({"split": "train", "size": (8, 8)}, "at least 16"),
        ({"split": "train", "seed": -1}, "seed"),
        ({"split": "train", "length": 0}, "length"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        StreetScenes(**options)


def test_build_dataset():
    dataset = build_dataset("street_scenes", split="val", size=SMALL, length=2)
    assert isinstance(dataset, StreetScenes)
    assert len(dataset) == 2
    with pytest.raises(ValueError, match=r"did you mean 'street_scenes'.*camvid, cityscapes"):
        build_dataset("street_scene", split="train")
    with pytest.raises(ValueError, match=r"no option 'sise'; did you mean 'size'"):
        build_dataset("street_scenes", split="train", sise=3)
    with pytest.raises(ValueError, match="leave root out"):
        build_dataset("street_scenes", split="train", root="/data")
    with pytest.raises(ValueError, match="needs root"):
        build_dataset("camvid", split="train")
