"""Data sets in folders: each layout, every kind of broken tree or file, and the real CamVid if available."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

from torch.utils.data import DataLoader  # noqa: E402
from torchvision import tv_tensors  # noqa: E402

from fastkd.train.data import DataError, build_dataset, layouts  # noqa: E402
from fastkd.train.data.folders import read_classes  # noqa: E402
from fastkd.train.data.images import open_photo  # noqa: E402
from fastkd.train.data.layouts import CITYSCAPES_IDS  # noqa: E402
from tests.train.trees import SIZE, TREES, picture, save, stripes  # noqa: E402

CLASSES = {"cityscapes": 19, "camvid": 11, "voc": 21, "ade20k": 150, "folders": 3}


@pytest.fixture
def tree(tmp_path):
    """name -> root of a valid data set of that name."""

    def make(name):
        TREES[name](tmp_path / name)
        return tmp_path / name

    return make


def build(name, root, split="train", **options):
    return build_dataset(name, root=root, split=split, **options)


@pytest.mark.parametrize("name", TREES)
def test_items(name, tree):
    root = tree(name)
    for split, count in (("train", 3), ("val", 1 if name == "voc" else 2)):
        dataset = build(name, root, split)
        assert len(dataset) == count
        assert len(set(dataset.classes)) == CLASSES[name]
        assert dataset.palette.shape == (CLASSES[name], 3)
        image, mask = dataset[0]
        assert type(image) is tv_tensors.Image
        assert image.shape == (3, *SIZE)
        assert image.dtype == torch.uint8
        assert type(mask) is tv_tensors.Mask
        assert mask.shape == SIZE
        assert mask.dtype == torch.uint8
        assert mask.unique().tolist() == [*range(CLASSES[name]), 255]
        assert len({path for path, _ in dataset.items}) == count


# From cityscapesScripts' table: raw id 7 is road (0), 11 building (2), 24 person (11), 33 bicycle (18).
@pytest.mark.parametrize(("raw", "number"), [(7, 0), (8, 1), (11, 2), (17, 5), (23, 10), (24, 11), (26, 13), (33, 18)])
def test_cityscapes_ids(raw, number, tree):
    dataset = build("cityscapes", tree("cityscapes"))
    save(np.full(SIZE, raw, np.uint8), dataset.items[0][1])
    assert (dataset[0][1] == number).all()


def test_cityscapes_ids_and_train_ids_agree(tree):
    root = tree("cityscapes")
    ids, train_ids = build("cityscapes", root), build("cityscapes", root, labels="labelTrainIds")
    raw = stripes([*CITYSCAPES_IDS, 0, 5, 30])
    save(raw, ids.items[0][1])
    save(ids[0][1].numpy(), train_ids.items[0][1])
    assert torch.equal(ids[0][1], train_ids[0][1])
    assert dict(zip(ids.classes, ids.palette.tolist(), strict=True))["car"] == [0, 0, 142]
    with pytest.raises(ValueError, match="'labelIds' or 'labelTrainIds'"):
        build("cityscapes", root, labels="color")


def test_wrong_kind_of_cityscapes_labels_names_the_option(tree):
    root = tree("cityscapes")
    for path in root.rglob("*_labelIds.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"has no label .*labelIds\.png.*--data\.options\.labels labelTrainIds"):
        build("cityscapes", root)


def test_ade20k_shift(tree):
    dataset = build("ade20k", tree("ade20k"))
    save(stripes([0, 1, 150]), dataset.items[0][1])
    assert dataset[0][1].unique().tolist() == [0, 149, 255]
    assert (dataset.classes[0], dataset.classes[149]) == ("wall", "flag")


def test_camvid_void_and_palette_labels(tree):
    dataset = build("camvid", tree("camvid"))
    label = np.full(SIZE, 11, np.uint8)
    label[0] = 255  # void in other tools' files
    label[1] = 3
    save(label, dataset.items[0][1], palette=True)
    with Image.open(dataset.items[0][1]) as stored:
        assert stored.mode == "P"
    assert dataset[0][1].unique().tolist() == [3, 255]


def test_voc_lists(tree):
    root = tree("voc")
    names = [path.stem for path, _ in build("voc", root).items]
    assert names == ["2007_000001", "2008_000002", "2008_000003"]
    plain = build("voc", root / "VOCdevkit", aug=False)  # the root may also be a subfolder
    assert [path.stem for path, _ in plain.items] == ["2007_000001"]
    assert plain.items[0][1].parent.name == "SegmentationClass"
    inside = root / "VOCdevkit" / "VOC2012"
    pairs = "/JPEGImages/2008_000002.jpg /SegmentationClassAug/2008_000002.png\n\n"
    (inside / "train_aug.txt").write_text(pairs)
    (inside / "ImageSets" / "Segmentation" / "trainaug.txt").unlink()
    assert [label.parent.name for _, label in build("voc", inside).items] == ["SegmentationClassAug"]
    assert len(build("voc", inside, list="train_aug.txt", split="val")) == 1
    (inside / "train_aug.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no list .*trainaug\.txt.*--data\.options\.aug false"):
        build("voc", inside)


@pytest.mark.promise("data-roots")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("../../../../etc/passwd", "leaves the data set"),
        ("/etc/passwd", "leaves the data set"),
        ("/etc/passwd.jpg /etc/passwd.png", "has no label"),  # such paths are taken relative to the root
        ("../secret.jpg JPEGImages/a.png", "leaves the data set"),
        ("JPEGImages/../../x.jpg SegmentationClassAug/a.png", "leaves the data set"),
        ("a b c", "expected a name, or the paths"),
        ("2007_000001 1", "expected a name, or the paths"),
        ("", "lists no images"),
    ],
)
def test_lists_stay_inside_the_root(line, says, tree):
    path = tree("voc") / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=says) as error:
        build("voc", path.parents[2])
    assert str(path.parents[2]) in str(error.value)


def test_a_list_that_is_no_text(tree):
    path = tree("voc") / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match=r"val\.txt cannot be read as text"):
        build("voc", path.parents[2], "val")


def test_folders_with_other_names(tree, tmp_path):
    root = tree("folders")
    dataset = build("folders", root)
    assert dataset.classes == ("road", "traffic light", "thing")
    assert dataset.palette.tolist() == [[128, 64, 128], [128, 0, 0], [1, 2, 3]]  # VOC's colour for number 1
    other = tmp_path / "other"
    save(np.zeros((*SIZE, 3), np.uint8), other / "a.png")
    save(stripes([0, 1, 2, 3]), other / "gt" / "a_label.png")
    (other / "names").write_text("x\ny\nz\n")
    options = {"images": ".", "labels": "gt", "label_suffix": "_label.png", "classes": "names", "first": 1, "ignore": 0}
    beside = build("folders", other, **options)  # label folders below the images are not read as images
    assert [(image.name, label.name) for image, label in beside.items] == [("a.png", "a_label.png")]
    (other / "in").mkdir()
    (other / "a.png").rename(other / "in" / "a.png")
    assert build("folders", other, **options | {"images": "in"})[0][1].unique().tolist() == [0, 1, 2, 255]


def test_camvid_in_colours(tree):
    root = tree("camvid")
    with pytest.raises(ValueError, match="'numbers' or 'colours'"):
        build("camvid", root, labels="rgb")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train_labels.*32 original classes"):
        build("camvid", root, labels="colours")
    label = np.zeros((*SIZE, 3), np.uint8)  # void
    colours = {
        "road": [(128, 64, 128), (128, 0, 192)],
        "car": [(64, 128, 192), (192, 64, 128)],
        "sky": [(128, 128, 128)],
    }
    for row, colour in enumerate([colour for several in colours.values() for colour in several], 1):
        label[row] = colour
    for path in (root / "train").iterdir():
        save(label, root / "train_labels" / f"{path.stem}_L.png")
    dataset = build("camvid", root, labels="colours")
    found = dataset[0][1][: 1 + 5, 0].tolist()
    assert found == [255, *[dataset.classes.index(name) for name, several in colours.items() for _ in several]]
    label[7, 3] = (1, 2, 3)
    save(label, dataset.items[1][1])
    with pytest.raises(DataError, match=r"_L\.png has the colour \(1, 2, 3\) at row 7, column 3.*compressed"):
        dataset[1]
    save(label[..., 0], dataset.items[1][1])
    with pytest.raises(DataError, match="expected colours"):
        dataset[1]
    (root / "train_labels").rename(root / "elsewhere")
    (root / "trainannot").rename(root / "train_labels")
    with pytest.raises(FileNotFoundError, match=r"--data\.options\.labels colours"):
        build("camvid", root)


def test_camvid_colours_belong_to_classes():
    """All 32, including the eleven classes' own colours if the tutorial kept them."""
    colours = layouts._camvid_colours()
    names, palette = read_classes(layouts.CLASSES / "camvid.txt")
    assert len(colours) == 32
    assert set(colours.values()) == {*range(11), 255}
    own = {name: colours.get(tuple(colour)) for name, colour in zip(names, palette.tolist(), strict=True)}
    assert own == {name: None if name == "pavement" else number for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no class"),
        ("a\nb\na\n", "line 3 of .* repeats the class 'a'"),
        ("a 1 2 300\n", "line 1 of .* has the colour"),
        ("\n".join(map(str, range(300))), "more than 255 classes"),
        (b"\xff\xfe", "cannot be read as text"),
        (None, "no class file"),
    ],
)
def test_class_files(text, says, tree):
    path = tree("folders") / "classes.txt"
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((DataError, FileNotFoundError), match=says) as error:
        build("folders", path.parent)
    assert str(path) in str(error.value)


def test_fewer_classes_than_label_values(tree):
    root = tree("folders")
    (root / "classes.txt").write_text("road\nthing\n")
    with pytest.raises(DataError, match=r"value 2 at row 0.*expected 0 to 1 for the 2 classes and 255 for ignored"):
        build("folders", root)[0]


def test_label_255_against_another_ignore(tree):
    root = tree("folders")
    with pytest.raises(DataError, match=r"value 255 .*expected 0 to 2 for the 3 classes and nothing for ignored"):
        build("folders", root, ignore=None)[0]
    with pytest.raises(DataError, match=r"0 is both ignored and the class 'road'.*--data\.options\.first"):
        build("folders", root, ignore=0)


def test_unknown_names_suggest_close_ones(tree):
    with pytest.raises(ValueError, match="did you mean 'cityscapes'"):
        build("cityscape", "x")
    with pytest.raises(ValueError, match=r"no option 'lable_suffix'; did you mean 'label_suffix'"):
        build("folders", "x", lable_suffix="x")
    with pytest.raises(ValueError, match="train, val, test"):
        build("camvid", "x", "training")
    with pytest.raises(ValueError, match="train and val, got 'test'"):
        build("ade20k", "x", "test")


@pytest.mark.parametrize("name", TREES)
def test_wrong_root(name, tree, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere; expected ROOT/.*Set --data\.root"):
        build(name, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*empty.*; expected ROOT/.*Set --data\.root"):
        build(name, tmp_path / "empty")


def test_missing_labels_folder_and_no_images(tree):
    root = tree("camvid")
    with pytest.raises(FileNotFoundError, match=r"test.*SegNet"):
        build("camvid", root, "test")
    (root / "valannot").rename(root / "annotations")
    with pytest.raises(FileNotFoundError, match=r"no folder .*valannot"):
        build("camvid", root, "val")
    for path in (root / "train").iterdir():
        path.unlink()
    (root / "train" / "readme.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no images \(\*\.png.*in .*train"):
        build("camvid", root)


def test_image_without_label_and_label_that_vanished(tree):
    root = tree("camvid")
    dataset = build("camvid", root)
    label = dataset.items[1][1]
    label.unlink()
    with pytest.raises(DataError, match=rf"camvid: there is no file {label}"):
        dataset[1]
    with pytest.raises(DataError, match=rf"{dataset.items[1][0]} has no label {label}"):
        build("camvid", root)


def png_header(width, height):
    """A few bytes that declare a picture of any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 9) + b"IDAT"


DAMAGE = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "text": lambda whole: b"<html>not found</html>",
    "bomb": lambda whole: png_header(100_000, 100_000),
    "warned about": lambda whole: png_header(10_000, 10_000),  # between one and two times Pillow's limit
    "another format": lambda whole: b"P6\n64 48\n255\n" + bytes(64 * 48 * 3),  # valid, but not a supported format
    "postscript": lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
}


@pytest.mark.promise("data-roots")
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file(damage, which, tree):
    dataset = build("camvid", tree("camvid"))
    path = dataset.items[1][which]
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    dataset[0]
    says = "is too large" if damage in ("bomb", "warned about") else r"cannot be read .*replace"
    with pytest.raises(DataError, match=rf"camvid: {path} {says}"):
        dataset[1]


def test_a_loader_process_reports_one_sentence(tree):
    dataset = build("camvid", tree("camvid"))
    dataset.items[0][0].write_bytes(b"")
    with pytest.raises(DataError) as error:
        next(iter(DataLoader(dataset, num_workers=1)))
    assert str(error.value).startswith(f"camvid: {dataset.items[0][0]} cannot be read")
    assert "\n" not in str(error.value)


def test_truncated_jpeg(tree):
    dataset = build("ade20k", tree("ade20k"))
    path = dataset.items[1][0]
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"{path} cannot be read"):
        dataset[1]


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1"])
def test_images_of_other_modes(mode, tree):
    """Training supports the same modes as prediction."""
    dataset = build("camvid", tree("camvid"))
    suffix = "jpg" if mode == "CMYK" else "png"
    picture = Image.new("RGB", SIZE[::-1], (255, 255, 255)).convert(mode)
    picture.save(dataset.items[0][0], format="JPEG" if suffix == "jpg" else "PNG")
    assert (dataset[0][0] == 255).all()


def test_wrong_image_mode(tree):
    dataset = build("camvid", tree("camvid"))
    Image.new("I;16", SIZE[::-1]).save(dataset.items[0][0], format="PNG")
    with pytest.raises(DataError, match=rf"{dataset.items[0][0]} has mode I;16, expected RGB or .*; convert"):
        dataset[0]


def test_grey_images_are_read(tree):
    """ADE20K contains a few."""
    dataset = build("ade20k", tree("ade20k"))
    Image.new("L", SIZE[::-1], 90).save(dataset.items[0][0])
    assert (dataset[0][0] == 90).all()
    assert dataset[0][0].shape == (3, *SIZE)


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1"])
def test_wrong_label_mode(mode, tree):
    dataset = build("camvid", tree("camvid"))
    Image.new(mode, SIZE[::-1]).save(dataset.items[0][1])
    with pytest.raises(DataError, match=rf"{dataset.items[0][1]} has mode .*, expected L or P; convert"):
        dataset[0]


def test_label_out_of_range(tree):
    dataset = build("camvid", tree("camvid"))
    label = np.zeros(SIZE, np.uint8)
    label[5, 7] = 12
    save(label, dataset.items[0][1])
    with pytest.raises(
        DataError, match=rf"{dataset.items[0][1]} holds the value 12 at row 5, column 7; expected 0 to 10"
    ):
        dataset[0]


def test_sizes_differ(tree):
    dataset = build("camvid", tree("camvid"))
    Image.new("L", (SIZE[1], 20)).save(dataset.items[0][1])
    with pytest.raises(DataError, match=r"is 64x48 but its label .* is 64x20"):
        dataset[0]


# Files from other tools


def linked(root, split="train"):
    """The folder of the images and that of the labels."""
    return root / "images" / split, root / "labels" / split


def test_folders_that_are_links_are_followed(tree, tmp_path):
    root = tree("folders")
    count = len(build("folders", root))
    for folder, elsewhere in zip(linked(root), ("far images", "far labels"), strict=True):
        (folder / "town 0").rename(tmp_path / elsewhere)
        (folder / "town 0").symlink_to(tmp_path / elsewhere)
    (linked(root)[0] / "round").symlink_to(linked(root)[0])  # a cyclic link must not recurse forever
    assert len(build("folders", root)) == count


@pytest.mark.parametrize("name", ["lost.jpg", "lost folder"])
def test_a_link_to_nothing_is_named(name, tree):
    root = tree("folders")
    link = linked(root)[0] / name
    link.symlink_to(root / "gone")
    with pytest.raises(DataError, match=rf"{link} is a link to {root / 'gone'}, which is not there"):
        build("folders", root)


def test_hidden_names_are_no_data(tree):
    root = tree("folders")
    items = build("folders", root).items
    image = items[0][0]
    for hidden in (f"._{image.name}", ".DS_Store.jpg", ".ipynb_checkpoints/1-checkpoint.jpg"):
        path = image.parent / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    assert build("folders", root).items == items


@pytest.mark.parametrize("by", ["name", "link"])
def test_an_image_is_never_its_own_label(by, tmp_path):
    save(np.zeros(SIZE, np.uint8), tmp_path / "in" / "a.png")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    if by == "link":
        (tmp_path / "gt").symlink_to(tmp_path / "in")
    with pytest.raises(DataError, match=r"a\.png would be its own label; .*--data\.options\.labels"):
        build("folders", tmp_path, images="in", labels="in" if by == "name" else "gt")
    save(np.zeros((*SIZE, 3), np.uint8), tmp_path / "in" / "a.jpg")  # photos and masks in one folder
    beside = build("folders", tmp_path, images="in", labels="in")
    assert [image.name for image, _ in beside.items] == ["a.jpg"]


def test_endings_of_images_can_be_given(tmp_path):
    for name in ("a_rgb.png", "a_depth.png"):
        save(np.zeros((*SIZE, 3), np.uint8), tmp_path / "in" / name)
    save(np.zeros(SIZE, np.uint8), tmp_path / "gt" / "a.png")
    (tmp_path / "classes.txt").write_text("x\n")
    for endings in ("_rgb.png", ["_rgb.png", "_RGB.jpg"]):
        dataset = build("folders", tmp_path, images="in", labels="gt", image_suffixes=endings)
        assert [image.name for image, _ in dataset.items] == ["a_rgb.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_seen_as_its_camera_says(orientation, tmp_path):
    """EXIF orientation is applied in training and prediction; a mask next to the photo is not rotated."""
    upright = picture(1)
    exif = Image.Exif()
    exif[274] = orientation
    turns = [np.array, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1)]
    turns += [lambda x: np.rot90(x), lambda x: np.rot90(x, 2).swapaxes(0, 1), lambda x: np.rot90(x, 3)]
    (tmp_path / "in").mkdir()
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation - 1](upright)))
    stored.save(tmp_path / "in" / "a.png", exif=exif)
    save(stripes([0, 1]), tmp_path / "gt" / "a.png")
    (tmp_path / "classes.txt").write_text("x\ny\n")
    image, _ = build("folders", tmp_path, images="in", labels="gt")[0]
    assert np.array_equal(image.permute(1, 2, 0), upright)
    assert np.array_equal(open_photo(tmp_path / "in" / "a.png"), upright)


def test_a_size_that_differs_by_a_quarter_turn_says_so(tree):
    dataset = build("camvid", tree("camvid"))
    Image.new("L", SIZE).save(dataset.items[0][1])
    with pytest.raises(DataError, match="turned by its EXIF orientation"):
        dataset[0]


@pytest.mark.parametrize("name", TREES)
def test_255_is_ignored_wherever_it_occurs(name, tree):
    dataset = build(name, tree(name))
    label = np.array(Image.open(dataset.items[0][1]))
    label[:3] = 255
    save(label, dataset.items[0][1])
    assert (dataset[0][1][:3] == 255).all()


def test_255_is_ignored_beside_another_ignored_value(tree):
    root = tree("folders")
    (root / "two.txt").write_text("a\nb\n")
    dataset = build("folders", root, ignore=2, classes="two.txt")
    assert dataset[0][1].unique().tolist() == [0, 1, 255]


def test_values_of_masks_can_be_mapped(tree):
    root = tree("folders")
    (root / "classes.txt").write_text("ground\nthing\n")
    save(stripes([0, 255]), build("folders", root, values={0: 0, 1: 1, 2: 1}).items[0][1])
    for values in ({0: 0, 255: 1}, {"0": 0, "255": 1}):  # from YAML and from a saved configuration
        assert build("folders", root, values=values)[0][1].unique().tolist() == [0, 1]
    assert build("folders", root, values={0: 255, 255: 1})[0][1].unique().tolist() == [1, 255]
    for values, says in (
        ({0: 0, 255: 2}, "label value 255 is mapped to the class 2; expected values 0 to 255 and classes 0 to 1"),
        ({300: 1}, "label value 300 is mapped"),
        ({"a": 1}, "values maps label values to classes"),
        ([0, 1], "values maps label values to classes"),
    ):
        with pytest.raises(DataError, match=says):
            build("folders", root, values=values)
    with pytest.raises(DataError, match="leave out first, which is 1"):
        build("folders", root, values={0: 0}, first=1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("\ufeffground\nroad\n", ("ground", "road")),
        ("name,r,g,b\nground,1,2,3\nroad,4,5,6\n", ("ground", "road")),
        ("name, r, g, b\r\nground, 1, 2, 3\r\nroad, 4, 5, 6\r\n", ("ground", "road")),
        ("Class;Red;Green;Blue\nground;1;2;3\nroad;4;5;6\n", ("ground", "road")),
        ("\ufeffname\tr\tg\tb\nground\t1\t2\t3\nroad\t4\t5\t6\n", ("ground", "road")),
        ("road, route 66\nwall, wooden\n", ("road, route 66", "wall, wooden")),
    ],
)
def test_class_files_of_others(text, names, tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text(text, encoding="utf-8")
    found, palette = read_classes(path)
    assert found == names
    if "1" in text:
        assert palette.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_table_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("id,name,colour\n0,road,7\n1,car,8\n")
    with pytest.raises(
        DataError, match=r"line 1 of .* is the header of a table, 'id,name,colour'; expected a class a line"
    ):
        read_classes(path)


def test_lists_may_begin_with_a_byte_order_mark(tree):
    path = tree("voc") / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert len(build("voc", path.parents[2], "val")) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"first": 256}, "data.options.first must be a whole number 0 to 255, got 256"),
        ({"first": "a"}, "data.options.first must be a whole number 0 to 255, got 'a'"),
        ({"ignore": -1}, "a label of -1 as 255"),
        ({"labels": 3}, "data.options.labels must be a text, got 3"),
    ],
)
def test_options_have_ranges(options, says, tree):
    with pytest.raises(ValueError, match=says):
        build("folders", tree("folders"), **options)


def test_a_large_photo_can_be_allowed(tree, monkeypatch):
    dataset = build("camvid", tree("camvid"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"is too large .*set FASTKD_MAX_IMAGE_PIXELS=3072 in the environment"):
        dataset[0]
    monkeypatch.setenv("FASTKD_MAX_IMAGE_PIXELS", "3072")
    dataset[0]
    monkeypatch.setenv("FASTKD_MAX_IMAGE_PIXELS", "all")
    with pytest.raises(ValueError, match="must be a number of pixels, got 'all'"):
        dataset[0]


def real_root():
    places = [os.environ.get("FASTKD_CAMVID"), Path(__file__).parents[3] / "shared" / "data" / "camvid"]
    return next((Path(p) for p in places if p and Path(p).is_dir()), None)


@pytest.mark.skipif(real_root() is None, reason="CamVid is not here: set FASTKD_CAMVID to its folder")
def test_real_camvid():
    train, val = build("camvid", real_root()), build("camvid", real_root(), "val")
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
