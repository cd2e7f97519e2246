"""`fastkd predict`: overlays of valid images; for each other image a message with its name, and the rest continues."""

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from PIL import Image

from fastkd.cli import main
from fastkd.train import predict as module
from fastkd.train.data.images import upright
from tests.train import tiny
from tests.train.test_datasets import DAMAGE


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return tiny.save_network(tmp_path_factory.mktemp("run") / "best.pt", tiny.config("run"))


def predict(network, *paths, out, options=()):
    return main(["predict", network, *map(str, paths), "--out", str(out), "--device", "cpu", *options])


def test_overlays(network, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (70, 50), (120, 60, 30)).save(tmp_path / "in" / "a.JPG")
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / "folder.png").mkdir()
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        suffix = "jpeg" if mode == "CMYK" else "png"
        Image.new(mode, (33, 65)).save(tmp_path / f"{mode}.{suffix}")
    files = sorted(p for p in tmp_path.iterdir() if p.is_file())
    assert predict(network, tmp_path / "in", *files, out=tmp_path / "seen") == 0
    assert "6 images in" in capsys.readouterr().out
    assert Image.open(tmp_path / "seen" / "a.png").size == (70, 50)
    assert Image.open(tmp_path / "seen" / "CMYK.png").size == (33, 65)
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == sorted(["a.png", *(f"{p.stem}.png" for p in files)])
    assert (
        predict(network, tmp_path / "in", out=tmp_path / "clear", options=["--alpha", "0", "--size", "64", "96"]) == 0
    )
    with Image.open(tmp_path / "in" / "a.JPG") as image, Image.open(tmp_path / "clear" / "a.png") as seen:
        assert np.array_equal(np.array(image), np.array(seen))


@pytest.mark.promise("data-roots")
def test_bad_images_are_named_and_the_rest_goes_on(network, tmp_path, capsys):
    sound = tmp_path / "z.png"
    Image.new("RGB", (40, 40)).save(sound)
    for name, damage in DAMAGE.items():
        (tmp_path / f"{name}.png").write_bytes(damage(sound.read_bytes()))
    Image.new("I;16", (40, 40)).save(tmp_path / "sixteen.png")
    assert predict(network, tmp_path, out=tmp_path / "out") == 1
    told = capsys.readouterr()
    assert f"1 images in {tmp_path / 'out'}, {len(DAMAGE) + 1} failed" in told.out
    for name in [*DAMAGE, "sixteen"]:
        assert f"{tmp_path / name}.png" in told.err
    assert "has mode I;16" in told.err
    assert "too large" in told.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["z.png"]


@pytest.mark.promise("data-roots")
def test_an_image_that_needs_too_much_memory(network, tmp_path, monkeypatch, capsys):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    scores = module.predict_scores

    def hungry(*args):
        monkeypatch.setattr(module, "predict_scores", scores)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "predict_scores", hungry)
    assert predict(network, tmp_path, out=tmp_path / "out") == 1
    assert (
        f"{tmp_path / 'a.png'} (40x40) needs more memory than there is; give a smaller --size"
        in capsys.readouterr().err
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.png"]


def test_wrong_words(network, tmp_path, capsys):
    image = tmp_path / "a.png"
    Image.new("RGB", (40, 40)).save(image)
    for words, says in (
        ([tmp_path / "absent.png"], "no image or folder"),
        ([image, image], "two of the images"),
        ([image, "--out", tmp_path], "would be overwritten"),
    ):
        assert main(["predict", network, *map(str, words)]) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", network, str(image), "--alpha", "2"])
    assert "must be a number 0 to 1, got '2'" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert predict(network, tmp_path / "empty", out=tmp_path) == 1
    assert "holds no image" in capsys.readouterr().err


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as photo:
        assert upright(photo).size == (20, 40)
        photo.info["exif"] = b"Exif\x00\x00damaged"
        photo._exif = None
        assert upright(photo).size == (40, 20)
