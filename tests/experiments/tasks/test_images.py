"""Images, models and subsets, against torchvision and slow loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare

from experiments.harness.runs.facts import image_set, models_of
from experiments.harness.tasks.augment import by_policy, crop_and_flip, cut_out
from experiments.harness.tasks.image_models import MODELS, build, pixel_statistics
from experiments.harness.tasks.images import image_task, normalised, with_wrong_labels
from experiments.harness.tasks.storage import DataError
from experiments.harness.tasks.task import subsets
from experiments.harness.work.execute import check
from tests.specs import BASE

SPEC = replace(BASE, epochs=1, batch_size=16)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()


def test_normalised_as_torchvision_does_it():
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
    )
    x = images(3)
    torch.testing.assert_close(normalised(x), transform(x.permute(0, 3, 1, 2)))
    assert normalised(x).is_contiguous(memory_format=torch.channels_last)


def test_every_crop_is_a_window_of_the_padded_image_or_of_its_mirror_image():
    x = images(40)
    cropped = crop_and_flip(x, torch.Generator().manual_seed(1))
    padded = F.pad(x, (0, 0, 4, 4, 4, 4))
    matches = []
    for image, result in zip(padded, cropped, strict=True):
        for mirrored in (False, True):
            for top in range(9):
                for left in range(9):
                    window = image[top : top + 32, left : left + 32]
                    if torch.equal(window.flip(1) if mirrored else window, result):
                        matches.append((mirrored, top, left))
    assert len(matches) == 40
    assert {mirrored for mirrored, _, _ in matches} == {False, True}
    assert len({top for _, top, _ in matches}) > 5
    assert len({left for _, _, left in matches}) > 5


AUGMENTATIONS = {
    "crop": crop_and_flip,
    "cutout": lambda x, generator: cut_out(x, 12, generator),
    "autoaugment": lambda x, generator: by_policy(x, "crop-flip-autoaugment", generator),
    "randaugment": lambda x, generator: by_policy(x, "crop-flip-randaugment", generator),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_depends_only_on_its_generator(name):
    x, augment = images(8), AUGMENTATIONS[name]
    first = augment(x, torch.Generator().manual_seed(1))
    drawn = torch.random.get_rng_state()
    torch.rand(5)
    assert torch.equal(augment(x, torch.Generator().manual_seed(1)), first)
    assert not torch.equal(augment(x, torch.Generator().manual_seed(2)), first)
    torch.random.set_rng_state(drawn)
    augment(x, torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), drawn), "dropout's draws would shift"
    assert first.dtype == torch.uint8
    assert first.shape == x.shape


def test_a_square_is_cut_out_around_any_pixel():
    x = images(400).clamp(max=100)  # no pixel has the fill colour of the squares
    cut = cut_out(x, 8, torch.Generator().manual_seed(1))
    changed = (cut != x).all(-1)
    assert ((cut != x).any(-1) == changed).all()
    assert {tuple(pixel.tolist()) for pixel in cut[changed]} == {(125, 123, 114)}
    sizes = set()
    for gone in changed:
        rows, columns = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
        sizes.add((len(rows), len(columns)))
        assert gone.sum() == len(rows) * len(columns), "not a rectangle"
        assert (rows.diff() == 1).all()
        assert (columns.diff() == 1).all()
    assert max(sizes) == (8, 8)
    assert min(min(size) for size in sizes) == 4, "centres are in the image, so at least half of each square is inside"


@pytest.mark.parametrize(
    ("name", "transform"), [("crop-flip-autoaugment", "AutoAugment"), ("crop-flip-randaugment", "RandAugment")]
)
def test_policies_are_torchvisions(name, transform):
    from torchvision.transforms import v2

    x = images(6)
    augmented = by_policy(x, name, torch.Generator().manual_seed(5))
    stock = v2.RandAugment() if transform == "RandAugment" else v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(5))))
    expected = torch.stack([stock(image) for image in x.permute(0, 3, 1, 2)])
    assert torch.equal(augmented.permute(0, 3, 1, 2), expected)
    assert len({tuple(image.flatten().tolist()) for image in augmented}) == 6


def test_loader_processes_and_the_first_batch_change_no_pixel():
    spec = replace(SPEC, train_examples=64, test_examples=10, augmentation="crop-flip-autoaugment", cutout=8)
    alone, together = image_task(spec, loaders=0), image_task(spec, loaders=2)
    expected = list(alone.batches(1, 0))
    assert len(expected) == 4
    assert not torch.equal(expected[0][0], next(alone.batches(2, 0))[0])
    plain = image_task(replace(spec, augmentation="none", cutout=0))
    assert not torch.equal(expected[0][0], next(plain.batches(1, 0))[0])
    for actual, same in ((list(together.batches(1, 0)), expected), (list(together.batches(1, 2)), expected[2:])):
        for (x, y), (same_x, same_y) in zip(actual, same, strict=True):
            assert torch.equal(x, same_x)
            assert torch.equal(y, same_y)


def test_held_out_images_are_never_trained_on():
    train, holdout = subsets(replace(SPEC, train_examples=1024, holdout_examples=5000), 50_000)
    assert len(train) == 1024
    assert len(holdout) == 5000
    assert not set(train) & set(holdout)
    everything, held_out = subsets(replace(SPEC, holdout_examples=5000), 50_000)
    assert len(everything) == 45_000
    assert sorted([*everything, *held_out]) == list(range(50_000))
    assert np.array_equal(held_out, holdout)


def test_the_subset_does_not_depend_on_seed_or_method_or_on_holding_out():
    plain, _ = subsets(replace(SPEC, train_examples=1024), 50_000)
    other, _ = subsets(replace(SPEC, train_examples=1024, seed=3, rho=0.1, holdout_examples=5000), 50_000)
    assert np.array_equal(plain, other)


def test_specs_and_models_know_the_same_names():
    assert set(MODELS) == set(models_of("cifar10"))


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("linear", 10, 30_730),
        ("resnet20", 10, 272_474),  # 0.27 M, He et al. 2016, table 6
        ("resnet18", 10, 11_173_962),  # 11.2 M, torchvision's with a smaller stem and 10 classes
        ("resnet50", 10, 23_520_842),
        ("wrn-16-4", 10, 2_748_890),
        ("wrn-28-10", 10, 36_479_194),  # 36.5 M, Zagoruyko and Komodakis 2016, table 4
        ("vit-small", 10, 6_268_810),  # 6.3 M, omihub777/ViT-CIFAR
        ("vit-tiny", 10, 5_362_762),
    ],
)
def test_sizes_of_the_models(name, classes, parameters):
    with torch.device("meta"):
        model = build(name, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_with_groupnorm_micro_batches_make_no_difference_and_the_network_has_the_same_size():
    torch.manual_seed(0)
    model, other = build("resnet8-groupnorm", 10).double(), build("resnet8", 10).double()
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in other.parameters())
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    parts = [model(part) for part in images.tensor_split(4)]
    torch.testing.assert_close(torch.cat(parts), model(images))


def test_a_folder_from_timm_is_loaded_with_its_weights(tmp_path):
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(3)
    small = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "global_pool": "avg", "class_token": False}
    given = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, **small)
    save_for_hf(
        given, tmp_path, model_config={**given.pretrained_cfg, "num_classes": 7}, model_args={**small, "img_size": 64}
    )
    model = build(str(tmp_path), 10, 32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert pixel_statistics(model, image_set("cifar10")) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    weights = {k: v for k, v in given.state_dict().items() if not k.startswith("head") and k != "pos_embed"}
    assert len(weights) > 20
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    spec = replace(SPEC, model=str(tmp_path), image_size=64, train_examples=32, test_examples=10)
    task = image_task(spec)
    assert torch.equal(task.model.state_dict()["pos_embed"], given.state_dict()["pos_embed"]), "made for this size"
    x, _ = task.sample("train", 2)
    assert x.shape == (2, 3, 64, 64)
    with pytest.raises(DataError, match="has no timm model"):
        check(replace(spec, model=str(tmp_path / "nothing")))
    for path in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        path.unlink()
    with pytest.raises(DataError, match="timm could not load"):
        check(spec)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6])
def test_the_share_of_wrong_labels_is_exact_and_wrong_classes_are_equally_likely(share):
    labels = np.arange(10_000) % 10
    noisy = with_wrong_labels(labels, share, 10)
    wrong = noisy != labels
    assert wrong.sum() == round(share * len(labels))
    assert (labels == np.arange(10_000) % 10).all(), "the given labels are unchanged"
    if share:
        shifts = np.bincount((noisy - labels)[wrong] % 10, minlength=10)
        assert shifts[0] == 0
        assert chisquare(shifts[1:]).pvalue > 0.001
        per_class = np.bincount(labels[wrong], minlength=10)
        assert chisquare(per_class).pvalue > 0.001
        less = with_wrong_labels(labels, share / 2, 10)
        changed = less != labels
        assert (noisy[changed] == less[changed]).all(), "labels wrong at a smaller share are equally wrong at a larger"


def test_only_training_labels_are_wrong():
    noisy = replace(SPEC, train_examples=64, label_noise=0.5, holdout_examples=100)
    clean = replace(noisy, label_noise=0.0)
    (x, y), (same_x, right) = (image_task(spec).sample("train", 64) for spec in (noisy, clean))
    assert torch.equal(x, same_x)
    assert (y != right).sum() == 32
    assert torch.equal(image_task(noisy).sample("holdout", 100)[1], image_task(clean).sample("holdout", 100)[1])


@pytest.mark.parametrize("name", ["linear", "resnet8", "resnet8-groupnorm", "resnet20", "wrn-10-1", "vit-micro"])
def test_models_classify_images(name):
    torch.manual_seed(0)
    assert build(name, 100)(torch.randn(2, 3, 32, 32)).shape == (2, 100)
