"""Augmentation: image and mask stay aligned, factors and crops have the documented distribution, a seed fixes the
crop."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")

import torch.nn.functional as F  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import tv_tensors  # noqa: E402

from fastkd.train.data import StreetScenes, eval_transform, train_transform  # noqa: E402
from fastkd.train.data.transforms import RandomScaleCrop  # noqa: E402

SMALL = (64, 128)

# An image that shows its own label must still match the label afterwards

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
        # Edges in the image are blended, so only pixels whose neighbours have the same label are compared.
        near = mask.float()[None]
        inside = (F.max_pool2d(near, 3, 1, 1) == -F.max_pool2d(-near, 3, 1, 1))[0]
        assert torch.equal(distance.argmin(-1)[inside & valid], mask.long()[inside & valid])
        assert (image[:, inside & ~valid] == 127).all()
    assert padded > 0 if crop == (96, 128) else True


def factors(draws, **options):
    """The factors of a transform, derived from the size of the window it cut."""
    transform = RandomScaleCrop((60, 60), **options)
    label = tv_tensors.Mask(torch.zeros(400, 400, dtype=torch.uint8))
    return [60 / transform.make_params([label])["window"][2] for _ in range(draws)]


def test_scale_is_uniform_in_its_range():
    drawn = torch.tensor(factors(2000, scale=(0.5, 2.0)))
    assert 0.5 <= drawn.min() < 0.52
    assert 1.95 < drawn.max() <= 2.01
    assert abs(drawn.mean() - 1.25) < 0.03
    assert abs((drawn < 1.0).float().mean() - 1 / 3) < 0.04


def test_scale_steps():
    drawn = {round(f, 1) for f in factors(800, scale=(0.5, 2.0), step=0.1)}
    assert drawn == {round(0.5 + k / 10, 1) for k in range(16)}
    counts = torch.tensor([round(60 / f) for f in factors(1600, scale=(0.5, 2.0), step=0.1)]).bincount()
    counts = counts[counts > 0]
    assert len(counts) == 16
    assert counts.min() > 60  # 100 expected of each


def test_window_is_that_of_the_resized_picture():
    """Cropping before the resize gives the crop of the resized picture, except for the rows at the border."""
    ramp = torch.linspace(0, 255, 200).round().to(torch.uint8).expand(3, 100, 200)
    pair = tv_tensors.Image(ramp), tv_tensors.Mask(torch.zeros(100, 200, dtype=torch.uint8))
    for seed in range(5):
        torch.manual_seed(seed)
        transform = RandomScaleCrop((40, 40), scale=(0.8, 1.9))
        params = transform.make_params(list(pair))
        _, left, _, width = params["window"]
        image = transform.transform(pair[0], params)
        assert image.shape == (3, 40, 40)
        expected = 255 / 199 * (left + (torch.arange(40) + 0.5) * width / 40 - 0.5)
        assert (image[0, 20].float() - expected)[1:-1].abs().max() < 1.5


def test_a_small_picture_keeps_its_proportions_and_is_padded():
    label = torch.zeros(30, 60, dtype=torch.uint8)
    pair = tv_tensors.Image(torch.full((3, 30, 60), 9, dtype=torch.uint8)), tv_tensors.Mask(label)
    image, mask = train_transform(100, scale=(1.5, 1.5))(*pair)
    assert image.shape == (3, 100, 100)
    inside = mask != 255
    assert int(inside.sum()) == 45 * 90
    assert (inside.any(1).sum(), inside.any(0).sum()) == (45, 90)
    assert (image[:, inside] == 9).all()
    assert (image[:, ~inside] == 127).all()


def test_cap_on_one_class():
    """Left half one class, right half two, half of it ignored: a window with nearly a single class is drawn again."""
    label = torch.zeros(64, 256, dtype=torch.uint8)
    label[:, 128:] = 1
    label[:32, 160:] = 2
    pair = tv_tensors.Image(torch.zeros(3, 64, 256, dtype=torch.uint8)), tv_tensors.Mask(label)

    def most(cat_max_ratio):
        transform = train_transform(64, scale=(1.0, 1.0), flip=0.0, cat_max_ratio=cat_max_ratio)
        return torch.tensor([int(transform(*pair)[1].flatten().bincount().max()) / 64**2 for _ in range(200)])

    assert (most(1.0) > 0.75).float().mean() > 0.3
    assert (most(0.75) > 0.75).float().mean() < 0.02  # all ten draws failed
    everything = tv_tensors.Mask(torch.full((64, 256), 255, dtype=torch.uint8))
    assert train_transform(64, cat_max_ratio=0.75)(pair[0], everything)[1].unique().tolist() == [255]


def test_cap_does_not_count_ignored_pixels():
    label = torch.full((32, 32), 255, dtype=torch.uint8)
    label[0, :3], label[0, 3] = 0, 1
    assert RandomScaleCrop((32, 32), cat_max_ratio=0.75)._mixed(label)
    assert not RandomScaleCrop((32, 32), cat_max_ratio=0.74)._mixed(label)


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
        ({"crop": 8, "scale_step": 2.0}, "scale_step"),
        ({"crop": 8, "cat_max_ratio": 0.0}, "cat_max_ratio"),
        ({"crop": 8, "jitter": 1.0}, "jitter"),
    ],
)
def test_bad_transform_options(options, words):
    with pytest.raises(ValueError, match=words):
        train_transform(**options)
