"""Training with few labels: selection of the labelled images, the inputs of each loss, and a run's messages."""

from fractions import Fraction

import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("segmentation_models_pytorch")

from fastkd.train.config import Config, check, labelled_share, unlabelled_size
from fastkd.train.data import StreetScenes, train_transform
from fastkd.train.data.unlabelled import Part, split
from fastkd.train.loader import StepSampler, train_loader
from fastkd.train.methods import METHODS, LossConfig, Objective, student_features, teacher_forward
from fastkd.train.models import Output, Student, build_model
from tests.train import tiny


def part(count=16, labelled=Fraction(1, 8), seed=0, unlabelled="rest"):
    return split(tiny.Patches(count), labelled=labelled, seed=seed, unlabelled=unlabelled)


def test_the_part_is_fixed_and_seeded():
    labelled, rest = part()
    assert (len(labelled), len(rest)) == (2, 14)
    assert sorted([*labelled.indices, *rest.indices]) == list(range(16))
    assert part()[0].indices == labelled.indices
    assert len({tuple(part(seed=seed)[0].indices) for seed in range(4)}) > 1
    assert (labelled.classes, labelled.ignore_index) == (tiny.Patches.classes, 255)
    assert len(part(labelled=Fraction(1, 1000))[0]) == 1
    whole, none = part(labelled=Fraction(1), unlabelled=None)
    assert isinstance(whole, tiny.Patches)
    assert none is None
    assert isinstance(part(unlabelled=None)[0], Part)


def test_a_folder_of_images(tmp_path):
    for name in ("b/2.png", "1.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("") if name.endswith("txt") else Image.new("L", (40, 30), 9).save(tmp_path / name)
    dataset = StreetScenes("train", size=(64, 64), length=4, transform=train_transform((32, 48), flip=0))
    labelled, images = split(dataset, labelled=Fraction(1), seed=0, unlabelled=str(tmp_path))
    assert labelled is dataset
    assert [path.name for path in images.source.files] == ["1.jpg", "2.png"]
    assert images[1].shape == (3, 32, 48)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images"):
        split(dataset, labelled=Fraction(1), seed=0, unlabelled=str(tmp_path / "empty"))


def test_labels_of_the_rest_are_never_read():
    class Blind(tiny.Patches):
        def __getitem__(self, index):
            raise AssertionError("the label of an unlabelled image was read")

        def image(self, index):
            return tiny.Patches.__getitem__(self, index)[0]

    _, rest = split(Blind(8), labelled=Fraction(1, 4), seed=0, unlabelled="rest")
    assert rest[0].shape == (3, *tiny.CROP)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"labelled": "1/0"}, "data.labelled is a share"),
        ({"labelled": 1.5}, "data.labelled must be .* above 0 and at most 1"),
        ({"labelled": "half"}, "got 'half'"),
        ({"labelled": "1/8", "unlabelled": "rest", "unlabelled_share": 1.0}, "above 0 and below 1"),
        ({"labelled": "1/8", "unlabelled": "rest", "unlabelled_share": 0.01}, "must leave room"),
    ],
)
def test_values_that_do_not_fit(data, words):
    config = Config(method="kd", teacher="t.pt")
    for name, value in data.items():
        setattr(config.data, name, value)
    with pytest.raises(ValueError, match=words):
        check(config)


def test_what_nothing_could_learn_from(tmp_path):
    config = Config()
    config.data.unlabelled = "rest"
    with pytest.raises(ValueError, match="method none has no loss"):
        check(config)
    with pytest.raises(ValueError, match="all 16 training images are labelled"):
        part(labelled=Fraction(1))
    with pytest.raises(FileNotFoundError, match="no folder"):
        part(unlabelled=str(tmp_path / "nowhere"))


def test_numbers_of_a_share():
    config = Config()
    config.data.labelled, config.data.unlabelled = 0.125, "rest"
    assert labelled_share(config.data) == Fraction(1, 8)
    assert unlabelled_size(config) == 4
    config.data.unlabelled = None
    assert unlabelled_size(config) == 0


def test_every_share_of_a_batch_has_as_many():
    options = {"unlabelled": 7, "unlabelled_size": 4}
    whole = list(StepSampler(3, 8, range(6), 0, **options))
    for batch in whole:
        assert [index < 3 for index, _ in batch] == [True] * 4 + [False] * 4
    assert {index for batch in whole for index, _ in batch} == set(range(10))
    numbers = [number for batch in whole for _, number in batch]
    assert sorted(numbers) == list(range(48))  # each sample has a separate index and hence seed
    assert list(StepSampler(3, 8, range(2, 6), 0, **options)) == whole[2:]
    shares = [list(StepSampler(3, 8, range(6), 0, rank, 2, 2, **options)) for rank in range(2)]
    for step, batch in enumerate(whole):
        pieces = [share[2 * step + part] for share in shares for part in range(2)]
        assert all(sum(index < 3 for index, _ in piece) == 1 and len(piece) == 2 for piece in pieces)
        assert sorted(key for piece in pieces for key in piece) == sorted(batch)
    with pytest.raises(ValueError, match="unlabelled share of a batch, 4 cannot be shared by 8"):
        StepSampler(3, 8, range(6), 0, 0, 8, **options)


def test_labelled_samples_are_those_of_a_smaller_batch():
    """The labelled pass does not depend on the unlabelled images."""
    alone = [index for batch in StepSampler(5, 4, range(9), 3) for index, _ in batch]
    beside = StepSampler(5, 6, range(9), 3, unlabelled=4, unlabelled_size=2)
    assert [index for batch in beside for index, _ in batch if index < 5] == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(workers):
    labelled, rest = part()
    loader = train_loader(
        labelled, batch_size=6, steps=range(2), seed=1, workers=workers, unlabelled=rest, unlabelled_size=4
    )
    for images, labels in loader:
        assert images.shape == (6, 3, *tiny.CROP)
        assert labels.shape == (2, *tiny.CROP)


@pytest.fixture(scope="module")
def networks():
    """A student and a teacher with auxiliary heads, their outputs for four images, and labels with ignored pixels."""
    torch.manual_seed(0)
    features = {"low": "encoder[-2]", "decoder": "decoder"}
    pair = []
    for width in (32, 64):
        config = tiny.config("x", aux=True, width=width)
        config.model.features = features
        pair.append(build_model(config.model, 3).eval().double())
    images = torch.randint(0, 256, (4, 3, *tiny.CROP), dtype=torch.uint8)
    labels = torch.stack([tiny.DATASETS[0][index][1] for index in (1, 2, 4, 5)])
    return *pair, images.double() / 255, labels


def losses(networks, method, config, labels, step, images=slice(None)):
    """The objective's terms and their gradients at the student's outputs, for some of the images."""
    student, teacher, pictures, _ = networks
    torch.manual_seed(1)  # for the adapters
    trained = Student(student, student_features(method, config, student, teacher)).double()
    objective = Objective(method, config, total_steps=10, student=student, teacher=teacher)
    with torch.no_grad():
        out = trained(pictures[images])
        target = teacher_forward(teacher, pictures[images])
    out = Output(
        out.logits.requires_grad_(),
        {k: v.detach().requires_grad_() for k, v in out.features.items()},
        out.aux.requires_grad_(),
    )
    return out, objective(out, target, labels, step)


@pytest.mark.parametrize(
    ("method", "step", "preset"),
    [*((m, 0, "paper") for m in METHODS), ("rdd", 5, "paper"), ("rdd", 0, "official"), ("rdd", 5, "official")],
)
def test_tasks_see_labelled_images_and_distillation_sees_all(networks, method, step, preset):
    """Two of four images have labels. Each task term and its gradient equal those of these two images; other terms
    use all images."""
    config = LossConfig()
    config.rdd.preset, config.rdd.select = preset, "or"  # for untrained networks every pixel is hard
    config.rdd.tfe_steps = 2
    config.rdd.weight = 0.7
    labels = networks[3]
    out, terms = losses(networks, method, config, labels[:2], step)
    alone, few = losses(networks, method, config, labels[:2], step, slice(2))
    _, all_ = losses(networks, method, config, labels, step)
    distilled = {"rdd": "rdd_kd"}.get(method, method)
    tasks = ["rdd_task"] if method == "rdd" else ["task", "aux"]
    assert set(terms.parts) == {*tasks, distilled}
    for name in tasks:
        torch.testing.assert_close(terms.parts[name], few.parts[name])
        assert not torch.isclose(terms.parts[name], all_.parts[name])
        where = "aux" if name == "aux" else "logits"
        grads = [
            torch.autograd.grad(t.parts[name], getattr(o, where), retain_graph=True)[0]
            for o, t in ((out, terms), (alone, few))
        ]
        torch.testing.assert_close(grads[0][:2], grads[1])
        assert not grads[0][2:].any()
    expected = few if method == "ifvd" else all_  # IFVD compares pixels with their class prototype, which needs labels
    torch.testing.assert_close(terms.parts[distilled], expected.parts[distilled])
    torch.testing.assert_close(terms.total, torch.stack(list(terms.parts.values())).sum())


def test_a_run_says_what_it_saw(teacher, tmp_path):
    config = tiny.config(tmp_path / "kd", method="kd+nfd", teacher=teacher)
    config.data.labelled, config.data.unlabelled, config.data.unlabelled_share = "1/4", "rest", 0.75
    result = tiny.run(config)
    assert result["images"] == {
        "labelled": {"images": 2, "crops": 2},
        "unlabelled": {"images": 6, "crops": 6},
    }
    page = (tmp_path / "kd" / "report.html").read_text()
    assert "2 labelled + 6 unlabelled images, 2 + 6 crops" in page
    assert "2 + 6" in page
