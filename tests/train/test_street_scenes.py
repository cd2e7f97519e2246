"""The generated data set, the transforms, and the way data sets are built by name."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

import torch.nn.functional as F  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import tv_tensors  # noqa: E402

from fastkd.train.data import StreetScenes, build_dataset, eval_transform, train_transform  # noqa: E402

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
    """The best guess from a pixel's colour (16 steps a channel) stays far from right, even on the data it is fitted to."""
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
    """Twice the size is the same world: nearest down-sampling of its labels agrees almost everywhere."""
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
    cached.prefetch()
    assert len(cached.cache) == 2
    cached[0]
    cached.transform = None
    assert torch.equal(cached[0][0], plain[0][0])
    assert torch.equal(cached[0][1], plain[0][1])
    assert cached[-1][0].shape == (3, *SMALL)
    with pytest.raises(IndexError):
        cached[2]
    with pytest.raises(ValueError, match="cache=True"):
        plain.prefetch()


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
    with pytest.raises(ValueError, match="camvid, street_scenes"):
        build_dataset("cityscapes", split="train")
    with pytest.raises(ValueError, match=r"no option sise.*size"):
        build_dataset("street_scenes", split="train", sise=3)
    with pytest.raises(ValueError, match="leave root out"):
        build_dataset("street_scenes", split="train", root="/data")
    with pytest.raises(ValueError, match="needs root"):
        build_dataset("camvid", split="train")


# Transforms: an image painted with its own label must still agree with it afterwards.

COLOURS = torch.tensor([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)


def coded_pair(height=48, width=64):
    label = torch.zeros(height, width, dtype=torch.uint8)
    label[: height // 2, : width // 3] = 1
    label[height // 2 :, : width // 3] = 2
    label[: height // 3, width // 3 :] = 3
    label[height // 3 :, width // 2 :] = 4
    return tv_tensors.Image(COLOURS[label.long()].permute(2, 0, 1).contiguous()), tv_tensors.Mask(label)


@pytest.mark.parametrize("crop", [32, (40, 24), (96, 128)])
def test_image_and_mask_stay_aligned(crop):
    torch.manual_seed(0)
    transform = train_transform(crop)
    padded = 0
    for _ in range(12):
        image, mask = transform(*coded_pair())
        size = (crop, crop) if isinstance(crop, int) else crop
        assert image.shape == (3, *size)
        assert mask.shape == size
        assert type(image) is tv_tensors.Image
        assert type(mask) is tv_tensors.Mask
        valid = mask != 255
        padded += int((~valid).sum())
        distance = (image.long()[:, :, :, None] - COLOURS.long().T[:, None, None, :]).abs().sum(0)
        # Edges are blended in the image, so only pixels whose neighbours have the same label can be told.
        near = mask.float()[None]
        inside = (F.max_pool2d(near, 3, 1, 1) == -F.max_pool2d(-near, 3, 1, 1))[0]
        assert torch.equal(distance.argmin(-1)[inside & valid], mask.long()[inside & valid])
        assert (image[:, inside & ~valid] == 127).all()
    assert padded > 0 if crop == (96, 128) else True


def test_transform_is_reproducible_and_random():
    transform = train_transform(24, jitter=0.3)
    pair = coded_pair()

    def draw(seed):
        torch.manual_seed(seed)
        return [transform(*pair) for _ in range(3)]

    one, two, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=False))
    assert not all(torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_loader_generator_decides_the_augmentation():
    def batches(seed):
        dataset = StreetScenes("train", size=SMALL, length=4, transform=train_transform(32))
        loader = DataLoader(dataset, 2, shuffle=True, num_workers=1, generator=torch.Generator().manual_seed(seed))
        return [x for x, _ in loader]

    one, two, other = batches(1), batches(1), batches(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_eval_transform():
    image, mask = coded_pair()
    same_image, same_mask = eval_transform()(image, mask)
    assert torch.equal(same_image, image)
    assert torch.equal(same_mask, mask)
    image, mask = eval_transform((24, 32))(image, mask)
    assert image.shape == (3, 24, 32)
    assert mask.shape == (24, 32)
    assert set(mask.unique().tolist()) <= set(range(5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"crop": 0}, "crop"),
        ({"crop": (1, 2, 3)}, "crop"),
        ({"crop": 8, "flip": 2}, "flip"),
        ({"crop": 8, "scale": (2.0, 0.5)}, "scale"),
        ({"crop": 8, "jitter": 1.0}, "jitter"),
    ],
)
def test_bad_transform_options(options, words):
    with pytest.raises(ValueError, match=words):
        train_transform(**options)
