"""Tests of ltsd.py, on a CPU: `python -m pytest -q test_ltsd.py`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: waiting threads must not spin

import argparse
import contextlib
import copy
import errno
import hashlib
import importlib.util
import io
import itertools
import json
import math
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

import ltsd


def configs_of(*argv):
    """What a command line asks for, on a CPU."""
    return ltsd.parse_args(["--device", "cpu", *map(str, argv)])


def config_of(*argv):
    (cfg,) = configs_of(*argv)
    return cfg


def one_line(capsys, *said):
    """stderr has one line since it was last read, which holds all of `said`; returns it."""
    err = capsys.readouterr().err
    assert err.startswith("ltsd: ") and err.count("\n") == 1, err
    for words in said:
        assert words in err
    return err


def refusal(capsys, argv, *said):
    """The command line is refused in one line that holds all of `said`; returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning would be more lines
        assert ltsd.main(["--device", "cpu", *map(str, argv)]) == 2
    return one_line(capsys, "error: ", *said)


def load(*argv):
    return ltsd.load_data(*configs_of(*argv))


def save_noise(path, size=16, seed=0):
    """A picture of random pixels; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def picture_folder(root, counts, test="test", size=16):
    """root with noise images root/train/CLASS/i.png, as many as `counts` says, and two of each
    class to test."""
    seeds = itertools.count()
    for name, count in counts.items():
        for i in range(count):
            save_noise(root / "train" / name / f"{i}.png", size, next(seeds))
        for i in range(2):
            save_noise(root / test / name / f"{i}.png", size, next(seeds))
    return root


def lived_in(model):
    """Batch norms as after a training: a net that leaves one out or swaps two computes something
    else."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1.5)
            nn.init.uniform_(module.running_mean, -1, 1.5)
    return model.eval()


def global_randomness():
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.fixture
def untouched():
    """Inside the test no global generator moves."""
    before = global_randomness()
    yield
    assert global_randomness() == before


# 6  Data ==========================================================================================
@pytest.mark.parametrize(
    "n_max, classes, ir, total",
    [
        (5000, 10, 50, 13996),
        (5000, 10, 100, 12406),
        (5000, 10, 10, 20431),
        (500, 100, 10, 19573),
        (500, 100, 50, 12608),
        (500, 100, 20, 15907),
        (500, 100, 5, 24856),
        (500, 200, 10, 39072),
    ],
)
def test_long_tailed_sets_have_the_published_sizes(n_max, classes, ir, total):
    counts = ltsd.long_tail_counts(n_max, classes, ir)
    assert (len(counts), counts[0], counts[-1]) == (classes, n_max, n_max // ir)
    assert sum(counts) == total


def test_cifar10_at_ratio_50_has_the_published_counts():
    published = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    assert ltsd.long_tail_counts(5000, 10, 50) == published


@pytest.mark.parametrize(
    "n_max, classes, ir", [(10, 3, 0.5), (10, 3, 11), (10, 0, 1), (10, 3, math.nan)]
)
def test_a_profile_that_cannot_be_is_refused(n_max, classes, ir):
    with pytest.raises(ValueError, match=f"{classes} classes, imbalance ratio {ir}"):
        ltsd.long_tail_counts(n_max, classes, ir)


def test_the_long_tailed_subset_is_the_lineages(untouched):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 30))
    counts = [30, 17, 9, 2]
    want = []
    theirs = np.random.RandomState(0)
    for c, count in enumerate(counts):
        members = [i for i, label in enumerate(labels) if label == c]
        theirs.shuffle(members)
        want += members[:count]
    got = ltsd.long_tail_indices(torch.from_numpy(labels), counts)
    assert got.dtype == np.int64
    assert got.tolist() == want
    with pytest.raises(ValueError, match="class 3 has 30 images, 31"):
        ltsd.long_tail_indices(labels, [1, 1, 1, 31])


def law_p(ours, theirs):
    """p-value of the chi-square test that two Counters are draws of one law; rare outcomes are one
    cell."""
    our_total = sum(ours.values())
    their_total = sum(theirs.values())
    smaller_share = min(our_total, their_total) / (our_total + their_total)
    cells = defaultdict(lambda: [0, 0])
    for outcome in {*ours, *theirs}:
        expected = (ours[outcome] + theirs[outcome]) * smaller_share
        cell = cells[outcome if expected >= 5 else "rare"]
        cell[0] += ours[outcome]
        cell[1] += theirs[outcome]
    chi2 = 0
    for a, b in cells.values():
        chi2 += (a * their_total - b * our_total) ** 2 / (a + b) / (our_total * their_total)
    degrees = torch.tensor((len(cells) - 1) / 2)
    return torch.special.gammaincc(degrees, torch.tensor(chi2 / 2)).item()


def test_crop_and_flip_are_uniform_over_all_that_torchvision_could_give():
    # no two pixels are equal: an output tells its draw
    image = torch.arange(1, 91, dtype=torch.uint8).view(3, 5, 6)
    padded = F.pad(image, (4, 4, 4, 4))
    outcomes = {}
    for top, left in itertools.product(range(9), range(9)):
        crop = padded[:, top : top + 5, left : left + 6]
        outcomes[crop.numpy().tobytes()] = (top, left, 0)
        outcomes[crop.flip(2).numpy().tobytes()] = (top, left, 1)
    batch = image.expand(16200, 3, 5, 6)
    given = ltsd.augment(batch, "none", torch.Generator().manual_seed(3))
    drawn = [outcomes[one.numpy().tobytes()] for one in given]
    many = 10**7  # so many that it is the law itself
    assert len(outcomes) == 162
    assert law_p(Counter(drawn), Counter(dict.fromkeys(outcomes.values(), many))) > 0.01
    neighbours = Counter((a[2], b[2]) for a, b in itertools.pairwise(drawn[::2]))
    independent = dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], many)
    assert law_p(neighbours, Counter(independent)) > 0.01


def colours_and_blank(image):
    """What an output shows of the policy's draw: its colours, which a crop of this image keeps, and
    its blank area."""
    colours = image.flatten(1).numpy().astype(np.int64).T @ (1, 256, 65536)
    return np.unique(colours).tobytes(), (colours == 0).sum() // 4


@pytest.mark.parametrize("policy", ["ra", "aua"])
def test_every_image_has_torchvisions_law_and_its_own_draw(policy):
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(20, 236, (3, 2, 2), generator=generator, dtype=torch.uint8).repeat(
        1, 8, 8
    )
    batch = image.expand(512, 3, 16, 16)
    ours = []
    for _ in range(12):  # epochs of one batch
        ours += map(colours_and_blank, ltsd.augment(batch, policy, generator))
    first = v2.RandAugment(2, 8)
    if policy == "aua":
        first = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    transform = v2.Compose([first, v2.RandomCrop(16, padding=4), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = [colours_and_blank(transform(image)) for _ in range(6_000)]
    our_colours, our_blanks = zip(*ours)
    their_colours, their_blanks = zip(*theirs)
    assert law_p(Counter(ours), Counter(theirs)) > 0.01
    assert law_p(Counter(our_colours), Counter(their_colours)) > 0.01
    assert law_p(Counter(our_blanks), Counter(their_blanks)) > 0.01
    chance = sum((count / 6_000) ** 2 for count in Counter(their_colours).values())
    for lag in (1, 7, 128, 256):  # images of one batch agree no more often than strangers
        agree = np.mean([a == b for a, b in zip(our_colours, our_colours[lag:])])
        assert abs(agree - chance) < 5 * math.sqrt(chance / len(ours)), lag


@pytest.mark.parametrize("policy", ["none", "ra", "aua"])
def test_augment_draws_from_its_generator_alone(policy, untouched):
    generator = torch.Generator()
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 3, 17, 12), np.uint8))
    kept = images.clone()
    first = ltsd.augment(images, policy, generator.manual_seed(6))
    other = ltsd.augment(images, policy, generator.manual_seed(7))
    next_epoch = ltsd.augment(images, policy, generator)
    strided = images.to(memory_format=torch.channels_last)
    again = ltsd.augment(strided, policy, generator.manual_seed(6))
    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(other, next_epoch)
    assert torch.equal(images, kept)
    assert len(ltsd.augment(images[:0], policy, generator)) == 0


def test_augment_refuses_odd_input():
    images = torch.zeros(2, 3, 17, 12, dtype=torch.uint8)
    generator = torch.Generator()
    with pytest.raises(ValueError, match="'randaugment'"):
        ltsd.augment(images, "randaugment", generator)
    with pytest.raises(ValueError, match="float32"):
        ltsd.augment(images / 255, "none", generator)
    with pytest.raises(ValueError, match="17"):
        ltsd.augment(images[0], "none", generator)


@pytest.fixture(params=["CIFAR10", "CIFAR100"])
def small_cifar(request, tmp_path, monkeypatch):
    """(dataset class, images, labels, flags, accept) of a small archive in the published format,
    put into place by hand; accept() takes its md5s for the published ones."""
    cls = getattr(torchvision.datasets, request.param)
    classes = int(request.param[5:])
    rng = np.random.default_rng(0)
    labels = np.arange(2 * classes) % classes
    names = [f"class {i}" for i in range(classes)]
    files = {cls.meta["filename"]: pickle.dumps({cls.meta["key"]: names})}
    images = []
    for member, _ in cls.train_list + cls.test_list:
        pixels = rng.integers(0, 256, (2 * classes, 3072), np.uint8)  # planes, row by row
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        content = {"data": pixels, "coarse_labels": [0] * 2 * classes}
        content["labels" if classes == 10 else "fine_labels"] = labels.tolist()
        files[member] = pickle.dumps(content)
    with tarfile.open(tmp_path / cls.filename, "w:gz") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(f"{cls.base_folder}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

    def accept():
        md5 = {member: hashlib.md5(content).hexdigest() for member, content in files.items()}
        archive = (tmp_path / cls.filename).read_bytes()
        monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive).hexdigest())
        monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5[cls.meta["filename"]]})
        monkeypatch.setattr(cls, "train_list", [[m, md5[m]] for m, _ in cls.train_list])
        monkeypatch.setattr(cls, "test_list", [[m, md5[m]] for m, _ in cls.test_list])

    monkeypatch.setattr(cls, "url", "file:///nowhere/" + cls.filename)
    flags = ["--data", request.param.lower(), "--data-dir", tmp_path, "--out", tmp_path / "o"]
    return cls, images, labels, flags, accept


def test_cifar_is_read_from_the_published_archive(small_cifar):
    cls, images, labels, flags, accept = small_cifar
    accept()
    data = load(*flags, "--ir", 2)
    classes = len(data.classes)
    assert data.classes == [f"class {i}" for i in range(classes)]
    assert data.counts == ltsd.long_tail_counts(2 * len(cls.train_list), classes, 2)
    assert data.tail == list(range(classes - classes // 10, classes))
    assert torch.equal(data.test_images, images[-1])
    assert data.test_labels.tolist() == labels.tolist()
    chosen = ltsd.long_tail_indices(np.tile(labels, len(images) - 1), data.counts)
    assert torch.equal(data.train_images, torch.cat(images[:-1])[chosen])
    assert data.train_labels.tolist() == (chosen % classes).tolist()


def test_a_cifar_archive_with_other_bytes_is_refused(small_cifar, capsys):
    cls, _, _, flags, _ = small_cifar
    said = refusal(capsys, flags)
    assert f"could not fetch {cls.filename}" in said
    assert "by hand" in said


TINY = "tiny-imagenet-200"


WNIDS = [f"n{2 * i:03}" for i in range(200)]


VALIDATED = ["n020", "n002", "n398"]  # the classes of the validation images


@pytest.fixture(scope="session")
def tiny_archive(tmp_path_factory):
    """A small zip in the published format: an image a class, those of the last class grey."""
    path = tmp_path_factory.mktemp("tiny") / f"{TINY}.zip"
    rng = np.random.default_rng(0)
    contents = {}
    with zipfile.ZipFile(path, "w") as archive:
        for wnid in reversed(WNIDS):
            shape = (64, 64) if wnid == "n398" else (64, 64, 3)
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(file, "PNG")
            contents[wnid] = file.getvalue()
            archive.writestr(f"{TINY}/train/{wnid}/images/{wnid}_0.JPEG", contents[wnid])
            archive.writestr(
                f"{TINY}/train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n"
            )
        lines = ""
        for i, wnid in enumerate(VALIDATED):
            archive.writestr(f"{TINY}/val/images/val_{i}.JPEG", contents[wnid])
            lines += f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n"
        archive.writestr(f"{TINY}/val/val_annotations.txt", lines)
    return path, contents


@pytest.fixture
def small_tiny(tiny_archive, tmp_path, monkeypatch):
    """The flags for a data folder that holds the small zip, taken for the published one."""
    shutil.copy(tiny_archive[0], tmp_path)
    md5 = hashlib.md5(tiny_archive[0].read_bytes()).hexdigest()
    monkeypatch.setattr(ltsd, "TINY_URL", f"file:///nowhere/{TINY}.zip")
    monkeypatch.setattr(ltsd, "TINY_MD5", md5)
    return ["--data", "tinyimagenet", "--data-dir", tmp_path, "--ir", 1]


def test_tinyimagenet_is_read_from_the_published_archive(small_tiny, tiny_archive):
    data = load(*small_tiny)
    assert data.classes == WNIDS
    assert data.tail == list(range(180, 200))
    assert data.counts == [1] * 200
    assert data.test_labels.tolist() == [10, 1, 199]
    assert data.train_images.shape == (200, 3, 64, 64)
    contents = tiny_archive[1]
    for wnid, image in (("n014", data.train_images[7]), ("n398", data.test_images[2])):
        pixels = np.array(Image.open(io.BytesIO(contents[wnid])).convert("RGB"))
        assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_tinyimagenet_zip_with_other_bytes_is_refused(small_tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ltsd, "TINY_MD5", "0" * 32)
    said = refusal(capsys, [*small_tiny, "--out", tmp_path / "o"])
    assert f"{TINY}.zip" in said
    assert "by hand" in said


def test_tinyimagenet_says_how_many_images_are_missing(small_tiny, capsys):
    load(*small_tiny)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "lacks 109797 of 110000 images" in said
    assert "delete this folder" in said


@pytest.mark.parametrize("lost", ["val", "val/val_annotations.txt"])
def test_a_tinyimagenet_without_labels_is_unpacked_again(lost, small_tiny, tmp_path):
    whole = load(*small_tiny)
    (tmp_path / TINY / lost).rename(tmp_path / "lost")
    again = load(*small_tiny)
    assert torch.equal(again.train_images, whole.train_images)
    assert torch.equal(again.test_images, whole.test_images)


def test_a_tinyimagenet_that_lacks_a_class_is_to_be_deleted(small_tiny, tmp_path, capsys):
    load(*small_tiny)
    (tmp_path / TINY / "train/n398").rename(tmp_path / "lost")
    said = refusal(capsys, [*small_tiny, "--out", tmp_path / "o"])
    assert "n398" in said
    assert "delete this folder" in said


def test_a_tinyimagenet_folder_that_cannot_be_used_is_to_be_deleted(small_tiny, tmp_path, capsys):
    load(*small_tiny)
    (tmp_path / TINY / "val/val_annotations.txt").write_text("val_0.JPEG n999")
    said = refusal(capsys, [*small_tiny, "--out", tmp_path / "o"])
    assert "n999" in said
    assert "delete this folder" in said


@pytest.mark.parametrize("name", ["train/n002/images/n002_0.JPEG", "val/images/val_1.JPEG"])
def test_a_missing_image_or_dangling_link_is_named(name, small_tiny, tmp_path, capsys):
    load(*small_tiny)
    path = tmp_path / TINY / name
    path.unlink()
    path.symlink_to("nowhere.JPEG")
    said = refusal(capsys, [*small_tiny, "--out", tmp_path / "o"])
    assert f"{path} is gone" in said


def test_classes_of_a_folder_are_ordered_by_count_and_then_by_name(tmp_path):
    counts = {"ant": 4, "bee": 9, "cat": 6, "dog": 9}
    root = picture_folder(tmp_path / "Bilder é", counts, test="val", size=32)
    data = load("--data", "folder", "--data-dir", root)
    assert (data.classes, data.counts, data.tail) == (
        ["bee", "dog", "cat", "ant"],
        [9, 9, 6, 4],
        [3],
    )
    assert data.train_images.shape == (28, 3, 32, 32)
    assert data.test_labels.tolist() == [3, 3, 0, 0, 2, 2, 1, 1]
    bee = torch.from_numpy(np.array(Image.open(root / "train/bee/4.png"))).permute(2, 0, 1)
    same = (data.train_images == bee).flatten(1).all(1)
    assert data.train_labels[same].tolist() == [0]


def test_limits_take_a_share_of_every_class_before_the_long_tail(tmp_path):
    root = picture_folder(tmp_path, {"ant": 6, "bee": 9, "cat": 6, "dog": 9})
    flags = ["--data", "folder", "--data-dir", root]
    assert load(*flags, "--ir", 3).counts == [9, 6, 4, 3]
    assert (
        load(*flags, "--ir", 1).counts == [6] * 4
    )  # the largest profile that every class can fill
    few = load(*flags, "--train-limit", 15, "--test-limit", 1)
    assert few.counts == [4, 4, 3, 3]
    assert few.test_labels.tolist() == [2, 0, 3, 1]  # at least one of each
    assert load(*flags, "--train-limit", 15, "--ir", 3).counts == [4, 2, 1, 1]


def test_a_ratio_that_the_classes_cannot_have_is_refused(tmp_path, capsys):
    flags = ["--data", "synthetic", "--out", tmp_path / "o"]
    said = refusal(capsys, [*flags, "--ir", 1000])
    assert "--ir 1000" in said
    assert "160 images" in said


def test_decoded_images_are_kept(tmp_path, monkeypatch):
    root = picture_folder(tmp_path, {"a": 3, "b": 2})
    first = ltsd.load_folder(root, 16)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", lambda *arguments: pytest.fail("decoded again"))
        again = ltsd.load_folder(root, 16)
    assert torch.equal(again.train_images, first.train_images)
    assert again.classes == first.classes


def test_an_image_written_again_is_seen_even_with_its_times_kept(tmp_path):
    path = picture_folder(tmp_path, {"a": 3, "b": 2}) / "train/a/0.bmp"
    save_noise(path, seed=1)
    ltsd.load_folder(tmp_path, 16)
    before = path.stat()
    save_noise(path, seed=2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    image = ltsd.load_folder(tmp_path, 16).train_images[0]
    assert np.array_equal(image.permute(1, 2, 0), np.array(Image.open(path)))


def test_a_broken_cache_and_a_removed_image_are_seen(tmp_path):
    root = picture_folder(tmp_path, {"a": 3, "b": 2})
    ltsd.load_folder(root, 16)
    (cache,) = root.glob(".ltsd*")
    cache.write_bytes(b"broken")
    assert len(ltsd.load_folder(root, 16).test_labels) == 4
    torch.save(dict(of="another version"), cache)
    assert len(ltsd.load_folder(root, 16).test_labels) == 4
    (root / "test/b/0.png").unlink()
    assert len(ltsd.load_folder(root, 16).test_labels) == 3


def decoded(root, image, name, **options):
    """An image as --data folder gives it: uint8 [32,32,3]."""
    picture_folder(root, {"a": 1, "b": 1}, size=32)
    (root / "train/a/0.png").unlink()
    image.save(root / "train/a" / name, **options)
    return ltsd.load_folder(root, 32).train_images[0].permute(1, 2, 0).numpy()


def test_the_centre_square_is_kept(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 36:84] = 77
    assert (decoded(tmp_path, Image.fromarray(wide), "wide.png") == 77).all()


@pytest.mark.parametrize("mode, name, value", [("L", "grey.png", 90), ("CMYK", "print.jpg", 255)])
def test_grey_and_print_images_become_rgb(mode, name, value, tmp_path):
    image = Image.new(mode, (32, 32), 90 if mode == "L" else 0)
    assert (decoded(tmp_path, image, name) == value).all()


@pytest.mark.parametrize("dtype, name", [("<u2", "x.png"), ("<u2", "x.tif"), (">u2", "x.tif")])
def test_16_bit_grey_is_scaled(dtype, name, tmp_path):
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    data = ramp.astype(dtype).tobytes()
    mode = "I;16B" if dtype == ">u2" else "I;16"
    pixels = decoded(tmp_path, Image.frombytes(mode, (32, 32), data), name)
    assert pixels.mean() == 127.5
    assert np.unique(pixels).tolist() == list(range(256))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_images_are_refused_by_name(dtype, tmp_path):
    image = Image.fromarray(np.ones((32, 32), dtype))
    with pytest.raises(ltsd.UserError, match="x.tif is of Pillow's mode"):
        decoded(tmp_path, image, "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode, tmp_path):
    image = Image.new("LA", (32, 32), (0, 0)).convert(mode if mode != "P" else "LA")
    image.paste((100, 255) if mode != "RGBA" else (100, 100, 100, 255), (0, 0, 32, 16))
    if mode == "P":
        image = image.convert("RGBA").quantize(4)
    pixels = decoded(tmp_path, image, "x.png")
    assert (pixels[:16] == 100).all()
    assert (pixels[16:] == 255).all()


def test_a_photograph_is_turned_upright(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a quarter to the right
    pixels = decoded(tmp_path, Image.fromarray(noise), "x.png", exif=exif)
    assert np.array_equal(pixels, np.rot90(noise, -1))


def test_what_begins_with_a_dot_is_no_data(tmp_path, capsys):
    root = picture_folder(tmp_path / ".data", {"a": 2, "b": 1})
    for part in ("train", "test"):
        save_noise(root / part / ".ipynb_checkpoints" / "a-checkpoint.png")
        save_noise(root / part / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
        save_noise(root / part / "a" / ".hidden.png")
        (root / part / "b" / ".DS_Store").write_text("")
    data = ltsd.load_folder(root, 16)
    assert data.classes == ["a", "b"]
    assert (len(data.train_labels), len(data.test_labels)) == (3, 4)
    assert capsys.readouterr().out == ""


def test_files_of_types_that_are_not_read_are_counted(tmp_path, capsys):
    root = picture_folder(tmp_path, {"a": 2, "b": 1})
    for name in ("train/a/x.gif", "train/b/x.avif", "test/a/x"):
        (root / name).write_text("")
    assert len(ltsd.load_folder(root, 16).train_labels) == 3
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "3 files" in said


def test_a_test_folder_without_classes_gives_way_to_val(tmp_path):
    root = picture_folder(tmp_path, {"a": 2, "b": 1}, test="val")
    save_noise(root / "test" / "images" / "0.png")
    assert ltsd.load_folder(root, 16).test_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "moved, said",
    [
        ([("test/b", "test/c")], ["--data-dir .", "same classes"]),
        ([("test", "x")], ["test/CLASS"]),
        ([("train/b/0.png", "x")], ["unlike: ['b']"]),
        ([("train/b/0.png", "train/b/0.gif"), ("test/b", "y")], ["unlike: ['b']"]),
        ([("train/b", "x"), ("test/b", "y")], ["two or more"]),
    ],
    ids=["other classes", "no test", "no image", "none in both", "one class"],
)
def test_a_folder_of_another_layout_is_refused_in_one_line(
    moved, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(picture_folder(tmp_path, {"a": 3, "b": 1}))
    for source, target in moved:
        os.rename(source, target)
    line = refusal(capsys, ["--data", "folder", "--data-dir", "."])
    for words in said:
        assert words in line


def test_a_file_that_is_no_image_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(picture_folder(tmp_path, {"a": 3, "b": 1}))
    Path("train/a/x.png").write_text("hello")
    line = refusal(capsys, ["--data", "folder", "--data-dir", "."])
    assert "train/a/x.png" in line
    assert "remove or replace" in line
    os.remove("train/a/x.png")
    os.truncate("test/a/1.png", 300)
    assert "test/a/1.png" in refusal(capsys, ["--data", "folder", "--data-dir", "."])


def test_synthetic_images_are_always_the_same(untouched):
    data = ltsd.make_synthetic(train_per_class=4, test_per_class=2, size=16)
    again = ltsd.make_synthetic(train_per_class=4, test_per_class=2, size=16)
    assert data.train_images.shape == (40, 3, 16, 16)
    assert data.train_labels.tolist() == [i // 4 for i in range(40)]
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images[:20], data.test_images)


# 7  Models ========================================================================================
def public_forward(arch, weights, x):
    """(logits, the names read): the public code's network from a state_dict, written from its
    description."""
    read = set()

    def conv(x, name, stride=1):
        read.add(f"{name}.weight")
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def norm(x, name):
        names = [f"{name}.{kind}" for kind in ("running_mean", "running_var", "weight", "bias")]
        read.update(names)
        return F.batch_norm(x, *(weights[name] for name in names))

    def basic_block(x, at, stride, projects):
        out = F.relu(norm(conv(x, at + "conv1", stride), at + "bn1"))
        out = norm(conv(out, at + "conv2"), at + "bn2")
        if projects:
            x = norm(conv(x, at + "shortcut.0", stride), at + "shortcut.1")
        return F.relu(out + x)

    def preact_block(x, at, stride, projects):
        out = F.relu(norm(x, at + "bn1"))
        if projects:
            x = conv(out, at + ("convShortcut" if wide else "shortcut.0"), stride)
        out = F.relu(norm(conv(out, at + "conv1", stride), at + "bn2"))
        return x + conv(out, at + "conv2")

    wide = arch == "wrn34-10"
    basic = arch in ("resnet18", "resnet8")
    stages, blocks = {"wrn34-10": (3, 5), "resnet8": (3, 1)}.get(arch, (4, 2))
    x = conv(x, "conv1")
    if basic:
        x = F.relu(norm(x, "bn1"))
    for stage, block in itertools.product(range(1, stages + 1), range(blocks)):
        at = f"block{stage}.layer.{block}." if wide else f"layer{stage}.{block}."
        stride = 2 if stage > 1 and block == 0 else 1
        projects = block == 0 and (stage > 1 or wide)
        x = (basic_block if basic else preact_block)(x, at, stride, projects)
    if not basic:
        x = F.relu(norm(x, "bn1" if wide else "bn"))
    head = "fc" if wide else "linear"
    read.update((f"{head}.weight", f"{head}.bias"))
    return F.linear(x.mean((2, 3)), weights[f"{head}.weight"], weights[f"{head}.bias"]), read


@pytest.mark.parametrize(
    "arch, classes, side, parameters",
    [
        ("resnet18", 10, 32, 11_173_962),
        ("wrn34-10", 10, 32, 46_160_474),
        ("preactresnet18", 200, 64, 11_269_640),
        ("resnet8", 10, 32, 78_042),
    ],
)
def test_networks_are_the_public_ones_by_name_size_and_logits(arch, classes, side, parameters):
    torch.manual_seed(0)
    model = lived_in(ltsd.build_model(arch, classes))
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        want, read = public_forward(arch, model.state_dict(), x)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {name for name in model.state_dict() if "num_batches" not in name} == read
    assert logits.shape == (2, classes)
    assert features.shape == (2, model[-1].in_features)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * want.std().item())


@pytest.mark.parametrize("classes, head", [(10, "linear"), (10, "cosine")])
def test_the_head_is_float32_under_bf16_convolutions(classes, head):
    torch.manual_seed(0)
    model = lived_in(ltsd.build_model("resnet8", classes, head))
    x = torch.rand(64, 3, 32, 32)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    for low in (mixed, ltsd.FrozenCopy(model, torch.bfloat16)(x)):
        assert low.dtype == torch.float32
        assert not torch.equal(low, exact)
        assert (low != low.bfloat16()).float().mean() > 0.9  # no bf16 numbers in a float32 tensor


@pytest.mark.parametrize("classes, offset", [(10, 1 / 32), (11, 1 / 16)])
def test_robals_head_has_its_formula(classes, offset):
    torch.manual_seed(0)
    model = lived_in(ltsd.build_model("resnet8", classes, "cosine"))
    logits, features = model(torch.rand(8, 3, 32, 32), with_features=True)
    weight = model[-1].weight
    features = features / features.norm(dim=1, keepdim=True)
    want = features @ (weight / (weight.norm(dim=1, keepdim=True) + offset)).T
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [("vgg", 10), ("resnet8", 1), ("resnet8", 10, "mlp")],
    ids=["arch", "classes", "head"],
)
def test_an_unknown_network_is_refused(arguments):
    with pytest.raises(ValueError, match=f"{arguments[-1]}.*resnet18"):
        ltsd.build_model(*arguments)


MEAN = (0.4914, 0.4822, 0.4465)


STD = (0.2471, 0.2435, 0.2616)


@pytest.mark.parametrize("arch", ["resnet8", "preactresnet18"])
def test_a_network_for_normalised_inputs_takes_images_as_they_are(arch):
    torch.manual_seed(0)
    theirs = lived_in(ltsd.build_model(arch, 10))
    ours = ltsd.build_model(arch, 10).eval()
    ours.load_state_dict(theirs.state_dict())
    ours.normalize = ltsd.Normalize(MEAN, STD)
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        want = theirs(v2.functional.normalize(x, MEAN, STD))
        torch.testing.assert_close(ours(x), want, rtol=1e-5, atol=1e-5)
        frozen = ltsd.FrozenCopy(ours)(x)
        low = ltsd.FrozenCopy(ours, torch.bfloat16)(x)
    torch.testing.assert_close(frozen, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(low, want, rtol=0.1, atol=0.1)


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "key, prefix, epoch",
    [
        (None, "", None),
        (None, "module._orig_mod.", None),
        ("state_dict", "module.", 7),
        ("net", "_orig_mod.", None),
        ("model", "", 3),
    ],
)
def test_public_checkpoints_load_however_they_are_wrapped(key, prefix, epoch, tmp_path):
    model = lived_in(ltsd.build_model("resnet8", 10))
    saved = prefixed(model.state_dict(), prefix)
    if key is not None:
        saved = {key: saved, "acc": 90.1}
    if epoch is not None:
        saved["epoch"] = epoch
    torch.save(saved, tmp_path / "w.pt")
    fresh = ltsd.build_model("resnet8", 10)
    assert ltsd.load_weights(fresh, tmp_path / "w.pt") == epoch
    assert ltsd.weights_crc32(fresh) == ltsd.weights_crc32(model)


def test_names_that_public_checkpoints_lack_or_add_are_no_matter(tmp_path):
    model = lived_in(ltsd.build_model("resnet8", 10))
    saved = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    saved["sub_block1.layer.0.conv1.weight"] = torch.zeros(3)  # unused, in public WRNs
    torch.save(saved, tmp_path / "w.pt")
    fresh = ltsd.build_model("resnet8", 10).eval()
    ltsd.load_weights(fresh, tmp_path / "w.pt")
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_outputs_are_matched_by_the_names_of_the_classes(head, tmp_path, capsys):
    model = ltsd.build_model("resnet8", 3, head).eval()
    content = {"state_dict": model.state_dict(), "classes": ["ant", "bee", "cat"]}
    torch.save(content, tmp_path / "w.pt")
    fresh = ltsd.build_model("resnet8", 3, head).eval()
    ltsd.load_weights(fresh, tmp_path / "w.pt", ["cat", "ant", "bee"])
    x = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(fresh(x), model(x)[:, [2, 0, 1]])
    assert capsys.readouterr().out == ""
    with pytest.raises(ltsd.UserError, match="other classes.*cat.*dog"):
        ltsd.load_weights(fresh, tmp_path / "w.pt", ["ant", "bee", "dog"])
    torch.save(content | dict(classes=["ant", 2, 3]), tmp_path / "w.pt")
    with pytest.raises(ltsd.UserError, match="other classes.*2.*3"):
        ltsd.load_weights(fresh, tmp_path / "w.pt", ["ant", "bee", "cat"])


def test_a_checkpoint_without_names_is_read_in_alphabetical_order(tmp_path, capsys):
    model = ltsd.build_model("resnet8", 3).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    fresh = ltsd.build_model("resnet8", 3).eval()
    x = torch.rand(5, 3, 32, 32)
    ltsd.load_weights(fresh, tmp_path / "w.pt", ["ant", "bee", "cat"])
    assert torch.equal(fresh(x), model(x))
    assert capsys.readouterr().out == ""
    ltsd.load_weights(fresh, tmp_path / "w.pt", ["bee", "cat", "ant"])
    torch.testing.assert_close(fresh(x), model(x)[:, [1, 2, 0]])
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "alphabetical" in said


@pytest.mark.parametrize(
    "value",
    [np.float64(81.5), np.float16(0.5), np.int64(3), np.bool_(True), np.str_("x"), np.arange(3)],
    ids=repr,
)
def test_numpys_values_in_a_checkpoint_are_read(value, tmp_path):
    torch.save({"acc": value}, tmp_path / "w.pt")
    read = ltsd.read_checkpoint(tmp_path / "w.pt")["acc"]
    assert np.array_equal(read, value)
    assert read.dtype == value.dtype


class Touches:
    def __reduce__(self):  # unpickled by a careless loader, it makes the file that tells
        return Path.touch, (Path("ran"),)


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Touches()}, "w.pt")
    with pytest.raises(ltsd.UserError, match="w.pt cannot be read"):
        ltsd.read_checkpoint("w.pt")
    assert not os.path.exists("ran")


def test_the_reason_why_a_checkpoint_is_refused_can_be_read(tmp_path):
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    with pytest.raises(ltsd.UserError, match=r"argparse\.Namespace") as refused:
        ltsd.read_checkpoint(tmp_path / "w.pt")
    assert str(refused.value).isprintable()


def test_too_little_memory_does_not_blame_the_checkpoint(monkeypatch):
    def exhausted(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    with pytest.raises(MemoryError):
        ltsd.read_checkpoint("w.pt")


@pytest.mark.parametrize("wrapper", [nn.Sequential, nn.DataParallel])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_called_one(wrapper, zipped, tmp_path):
    module = wrapper(nn.Conv2d(3, 3, 3))
    torch.save({"net": module}, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ltsd.UserError, match=r"pickled module.*state_dict\(\)"):
        ltsd.read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [None, b"", b"hello world", b"\x80\x02}q", "half"])
def test_a_missing_or_damaged_checkpoint_is_refused(content, tmp_path):
    path = tmp_path / "w.pt"
    if content == "half":
        torch.save(ltsd.build_model("resnet8", 10).state_dict(), path)
        os.truncate(path, 90_000)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ltsd.UserError, match="w.pt cannot be read"):
        ltsd.read_checkpoint(path)


@pytest.mark.parametrize(
    "name, tensor, said",
    [
        ("linear.weight", torch.ones(3, 64), "--arch.*linear.weight"),
        ("linear.bias", torch.full((10,), math.nan), "NaN"),
        ("linear.bias", "text", "holds no state_dict"),
    ],
    ids=["other shape", "nan", "no tensor"],
)
def test_weights_that_cannot_be_used_are_refused(name, tensor, said, tmp_path):
    model = ltsd.build_model("resnet8", 10)
    torch.save(model.state_dict() | {name: tensor}, tmp_path / "w.pt")
    with pytest.raises(ltsd.UserError, match=f"w.pt.*{said}"):
        ltsd.load_weights(model, tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[torch.ones(3)], {"lr": 0.1}, {"net": 3}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ltsd.UserError, match="w.pt holds no state_dict"):
        ltsd.load_weights(ltsd.build_model("resnet8", 10), tmp_path / "w.pt")


HALF_TYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="session")
def trained():
    """(network, images, labels): PGD-AT on small synthetic images, until it has learned."""
    data = ltsd.make_synthetic(120, 6, size=16)
    images = data.train_images / 255
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ltsd.build_model("resnet8", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    threat = dict(eps=8 / 255, step_size=2 / 255, steps=3, generator=generator)
    for rate in (0.1, 0.1, 0.1, 0.01):
        optimizer.param_groups[0]["lr"] = rate
        for rows in torch.randperm(len(images), generator=generator).split(64):
            labels = data.train_labels[rows]
            x_adv = ltsd.pgd_attack(model, images[rows], labels, **threat)
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x_adv), labels).backward()
            optimizer.step()
    return model.eval(), data.test_images / 255, data.test_labels


def network_with_history(arch="resnet8"):
    """A network as after a training, with variances so small that batch norm's eps counts."""
    torch.manual_seed(0)
    model = lived_in(ltsd.build_model(arch, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var[0] = 1e-3
    return model


def failing(*arguments):
    raise RuntimeError("failed inside")


# 3  The method ====================================================================================
LONG_TAIL = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]  # CIFAR-10 at imbalance ratio 50


@pytest.mark.parametrize("per_class", [2500, 149, 1])
@pytest.mark.parametrize("counts", [LONG_TAIL, [50] * 10, [90, 40, 10]])
def test_the_balanced_set_has_every_class_and_every_image_equally(counts, per_class, untouched):
    classes = len(counts)
    labels = np.repeat(np.arange(classes), counts)
    drawn = ltsd.balanced_indices(labels, per_class, seed=0)
    assert drawn.dtype == np.int64
    assert np.bincount(labels[drawn]).tolist() == [per_class] * classes
    times = np.bincount(drawn, minlength=len(labels))
    share = per_class / np.array(counts)
    assert (np.abs(times - share[labels]) < 1).all()  # floor or ceil of an equal share


def test_the_balanced_set_has_half_the_ratio_times_the_rarest_class():
    labels = torch.arange(2).repeat_interleave(torch.tensor([30, 11]))
    images = torch.zeros(41, 3, 1, 1, dtype=torch.uint8)
    data = ltsd.Data(images, labels, images, labels, ["a", "b"])
    assert ltsd.balanced_data(config_of("--data", "folder"), data).counts == [15, 15]


def test_the_balanced_set_follows_its_seed():
    labels = torch.arange(3).repeat_interleave(torch.tensor([90, 40, 10]))
    first = ltsd.balanced_indices(labels, 45, seed=0)
    again = ltsd.balanced_indices(labels, 45, seed=0)
    other = ltsd.balanced_indices(labels, 45, seed=1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def assert_no_balanced_set(labels, per_class, said):
    with pytest.raises(ValueError, match=said):
        ltsd.balanced_indices(labels, per_class, seed=0)


def test_an_impossible_balanced_set_is_refused():
    assert_no_balanced_set([0, 1], 0, "per_class 0")
    assert_no_balanced_set([0, 1], 1.5, "per_class 1.5")
    assert_no_balanced_set([0, 1], math.inf, "per_class inf")
    assert_no_balanced_set([0, 2], 1, "class 1")


# The losses again in NumPy, independent and slow: float64 logits [N,C], one value an image.
def slow_log_softmax(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def slow_kl(p, q, floor=0.0):
    """KL(softmax(p) || softmax(q)); floor is added to the probabilities of q."""
    log_q = np.log(np.exp(slow_log_softmax(q)) + floor)
    return (np.exp(slow_log_softmax(p)) * (slow_log_softmax(p) - log_q)).sum(1)


def slow_cross_entropy(z, y):
    return -slow_log_softmax(z)[np.arange(len(y)), y]


def slow_mart(logits, logits_adv, y, beta):
    probabilities = np.exp(slow_log_softmax(logits_adv))
    probabilities[np.arange(len(y)), y] = 0
    rival = probabilities.max(1)
    boosted = slow_cross_entropy(logits_adv, y) - np.log(1.0001 - rival + 1e-12)
    unsure = 1.0000001 - np.exp(-slow_cross_entropy(logits, y))
    return boosted + beta * slow_kl(logits, logits_adv, 1e-12) * unsure


def slow_robal(scores, scores_adv, y, counts, *, scale, margin, tau_b, tau_m, beta):
    prior = counts / counts.sum()
    logits = scale * scores_adv + tau_b * np.log(prior)
    margins = scale * margin + tau_m * np.log(counts / counts.min())
    logits[np.arange(len(y)), y] -= margins[y]
    divergence = slow_kl(scores, scores_adv, 1e-12)
    return slow_cross_entropy(logits, y) + beta * divergence


def slow_reat_tail(features, y, counts, anchors):
    """anchors: the features once more, as the side that carries no gradient."""
    u = np.sqrt(counts.sum() / counts)
    terms = []
    for anchor, label in zip(anchors, y):
        if label > 2 * (len(counts) // 3):
            repeated = np.tile(anchor, (len(y), 1))
            divergence = slow_kl(repeated, features).mean() / features.shape[1]
            sign = np.where(y == label, -1, 1)
            terms.append(divergence * (sign * (u[label] + u[y])).mean())
    return sum(terms) / max(1, len(terms))


@pytest.fixture(params=[(8, 10, 2.0), (1, 10, 2.0), (5, 10, 25.0), (6, 2, 1.0)])
def case(request):
    """Logits a, b, c, d, labels and counts: random, of one image, near certain, of two classes."""
    images, classes, spread = request.param
    rng = np.random.default_rng(images)
    case = SimpleNamespace()
    case.a, case.b, case.c, case.d = rng.normal(0, spread, (4, images, classes))
    case.labels = rng.integers(0, classes, images)
    case.y = torch.from_numpy(case.labels)
    case.counts = np.geomspace(500, 5, classes).round()
    return case


def assert_value(loss, arrays, want):
    """The loss is `want` in float64 and float32, and reads half precision as float32."""
    exact = [torch.from_numpy(array) for array in arrays]
    kept = copy.deepcopy(exact)
    single = [tensor.float() for tensor in exact]
    assert loss(*exact).item() == pytest.approx(want, rel=1e-9)
    assert loss(*single).item() == pytest.approx(want, rel=3e-4, abs=3e-4)
    for dtype in HALF_TYPES:
        halves = [tensor.to(dtype) for tensor in exact]
        rounded = [half.float() for half in halves]
        assert torch.equal(loss(*halves), loss(*rounded))
    assert all(map(torch.equal, exact, kept))  # nothing changed in place


def assert_gradient(loss, arrays, teacher=()):
    """Its gradient is right for `arrays`; there is none for the teacher's logits."""
    inputs = [torch.tensor(array, requires_grad=True) for array in arrays]
    fixed = [torch.tensor(array, requires_grad=True) for array in teacher]
    assert torch.autograd.gradcheck(loss, [*inputs, *map(torch.detach, fixed)])
    loss(*inputs, *fixed).backward()
    assert all(tensor.grad is None for tensor in fixed)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_balanced_softmax_by_its_formula(case, tau):
    def loss(logits):
        return ltsd.balanced_softmax_loss(logits, case.y, case.counts, tau)

    shifted = case.a + tau * np.log(case.counts)
    want = slow_cross_entropy(shifted, case.labels).mean()
    assert_value(loss, [case.a], want)
    assert_gradient(loss, [case.a])


def test_distillation_by_its_formula_without_gradient_for_the_teacher(case):
    want = slow_kl(case.b, case.a).mean()
    assert_value(ltsd.distillation_loss, [case.a, case.b], want)
    assert_gradient(ltsd.distillation_loss, [case.a], teacher=[case.b])


def test_igdm_by_its_formula_without_gradient_for_the_teacher(case):
    want = slow_kl(case.c - case.d, case.a - case.b).mean()
    assert_value(ltsd.igdm_loss, [case.a, case.b, case.c, case.d], want)
    assert_gradient(ltsd.igdm_loss, [case.a, case.b], teacher=[case.c, case.d])


def test_trades_by_its_formula_with_gradient_on_both_sides(case):
    def loss(logits, logits_adv):
        return ltsd.trades_loss(logits, logits_adv, case.y, beta=5.0)

    fit = slow_cross_entropy(case.a, case.labels).mean()
    divergence = slow_kl(case.a, case.b).mean()
    assert_value(loss, [case.a, case.b], fit + 5 * divergence)
    assert_gradient(loss, [case.a, case.b])


def test_mart_by_its_formula_with_gradient_on_both_sides(case):
    def loss(logits, logits_adv):
        return ltsd.mart_loss(logits, logits_adv, case.y, beta=5.0)

    want = slow_mart(case.a, case.b, case.labels, 5.0).mean()
    assert_value(loss, [case.a, case.b], want)
    assert_gradient(loss, [case.a, case.b])


def test_robal_by_its_formula_with_gradient_on_both_sides(case):
    settings = dict(scale=10.0, margin=0.1, tau_b=1.5, tau_m=0.3, beta=6.0)
    scores = [np.tanh(case.a), np.tanh(case.b)]  # cosines

    def loss(scores, scores_adv):
        return ltsd.robal_loss(scores, scores_adv, case.y, case.counts, **settings)

    want = slow_robal(scores[0], scores[1], case.labels, case.counts, **settings).mean()
    assert_value(loss, scores, want)
    assert_gradient(loss, scores)


def test_reats_tail_term_by_its_formula(case):
    def loss(features):
        return ltsd.reat_tail_loss(features, case.y, case.counts)

    want = slow_reat_tail(case.a, case.labels, case.counts, anchors=case.a)
    assert_value(loss, [case.a], want)


def test_reats_tail_term_has_the_gradient_of_its_live_side_only():
    """Finite differences with fixed anchors: gradcheck cannot know that one side is detached."""
    features = np.random.default_rng(0).normal(size=(5, 3))
    labels = np.array([0, 1, 2, 2, 3])
    counts = np.array([50.0, 20, 9, 5])
    live = torch.tensor(features, requires_grad=True)
    ltsd.reat_tail_loss(live, torch.from_numpy(labels), counts).backward()
    for row, column in np.ndindex(5, 3):
        nudge = np.zeros((5, 3))
        nudge[row, column] = 1e-5
        up = slow_reat_tail(features + nudge, labels, counts, anchors=features)
        down = slow_reat_tail(features - nudge, labels, counts, anchors=features)
        assert live.grad[row, column].item() == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_reats_weights_by_the_effective_numbers():
    counts = [500, 120, 7, 1]
    predicted = [300, 0, 41, 12]
    effective = []
    for n, a in zip(counts, predicted):
        effective.append(sum((1 - 1 / n) ** k for k in range(a)))  # (1 - b^a) / (1 - b)
    want = 1 / (np.array(effective) + 1e-5)
    got = ltsd.reat_class_weights(torch.tensor(counts), torch.tensor(predicted))
    assert got.dtype == torch.float32
    assert np.allclose(got, 4 * want / want.sum(), rtol=1e-6, atol=0)


def test_losses_become_cross_entropy_where_nothing_else_is_left(case):
    logits = torch.from_numpy(case.a)
    others = torch.from_numpy(case.b)
    uniform = [7] * len(case.counts)
    nothing = dict(scale=1.0, margin=0.0, tau_b=0.0, tau_m=0.0, beta=0.0)
    want = F.cross_entropy(logits, case.y)
    even = ltsd.balanced_softmax_loss(logits, case.y, uniform)
    torch.testing.assert_close(even, want)
    no_prior = ltsd.balanced_softmax_loss(logits, case.y, case.counts, tau=0.0)
    torch.testing.assert_close(no_prior, want)
    trades = ltsd.trades_loss(logits, others, case.y, beta=0.0)
    torch.testing.assert_close(trades, want)
    robal = ltsd.robal_loss(others, logits, case.y, case.counts, **nothing)
    torch.testing.assert_close(robal, want)


def test_what_agrees_with_its_teacher_has_no_distillation_loss(case):
    a = torch.from_numpy(case.a)
    b = torch.from_numpy(case.b)
    kl = ltsd.distillation_loss(a + 3, a)  # softmax does not see an offset
    igdm = ltsd.igdm_loss(a + 3, b, a, b)
    assert kl.item() == pytest.approx(0, abs=1e-12)
    assert igdm.item() == pytest.approx(0, abs=1e-12)


def test_reats_tail_term_is_0_without_a_tail():
    features = torch.randn(4, 5)
    heads = torch.tensor([0, 1, 0, 1])
    loss = ltsd.reat_tail_loss(features, heads, [9.0, 9.0, 5.0])
    assert loss.item() == 0


def test_reats_weights_are_1_where_all_classes_are_alike():
    weights = ltsd.reat_class_weights([20, 20, 20], [8, 8, 8])
    assert weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize("counts", [np.ones(1), np.ones(3), np.ones((1, 2))])
def test_counts_of_another_length_are_refused(counts):
    logits = torch.zeros(4, 2)
    y = torch.tensor([0, 1, 1, 0])
    settings = dict(scale=10.0, margin=0.1, tau_b=1.5, tau_m=0.3, beta=6.0)
    with pytest.raises(ValueError, match="one count for each of 2 classes"):
        ltsd.balanced_softmax_loss(logits, y, counts)
    with pytest.raises(ValueError, match="one count for each of 2 classes"):
        ltsd.robal_loss(logits, logits, y, counts, **settings)


@pytest.mark.parametrize("gap", [103.0, 104.0, 1000.0])
@pytest.mark.parametrize("certain", ["clean", "attacked"])
def test_marts_gradient_is_finite_for_a_certain_network(gap, certain):
    """From a gap of 104 on the least probability is 0 in float32."""
    logits = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.0, 0.4]])
    logits_adv = torch.tensor([[0.0, 0.4, 0.2], [0.1, 0.0, 0.3]])
    sure = logits if certain == "clean" else logits_adv
    sure[:, 1] = gap
    logits.requires_grad_()
    logits_adv.requires_grad_()
    loss = ltsd.mart_loss(logits, logits_adv, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits_adv.grad.isfinite().all()


@pytest.fixture
def awp_case():
    """A network with a frozen part, a loss of it, its state, and AWP's steps for gamma 0.01."""
    model = network_with_history().train()
    model.layer3.requires_grad_(False)
    x = torch.rand(8, 3, 16, 16)
    y = torch.arange(8)
    before = copy.deepcopy(model.state_dict())
    probe = copy.deepcopy(model)
    F.cross_entropy(probe(x), y).backward()
    steps = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    for name, weight in probe.named_parameters():
        if weight.dim() > 1 and weight.requires_grad:
            steps[name] = 0.01 * weight.detach().norm() * weight.grad / weight.grad.norm()

    def loss():
        return F.cross_entropy(model(x), y)

    return SimpleNamespace(model=model, loss=loss, before=before, steps=steps)


def assert_restored(case):
    """The state is as before, to the rounding of w + v - v."""
    epsilon = torch.finfo(torch.float32).eps
    for name, now in case.model.state_dict().items():
        before = case.before[name]
        rounding = epsilon * (before.abs() + 1.1 * case.steps[name].abs())
        assert ((now - before).abs() <= rounding).all(), name


def test_awp_perturbs_by_its_formula_and_restores_the_weights(awp_case):
    moving = [name for name, step in awp_case.steps.items() if step.any()]
    assert len(moving) == 7  # six convolutions and the head
    with ltsd.awp_perturbation(awp_case.model, awp_case.loss, 0.01):
        for name, now in awp_case.model.state_dict().items():
            want = awp_case.before[name] + awp_case.steps[name]
            torch.testing.assert_close(now, want, rtol=1e-4, atol=1e-6)
    assert_restored(awp_case)


def test_awp_restores_the_network_after_an_error(awp_case):
    with pytest.raises(RuntimeError, match="inside"):
        with ltsd.awp_perturbation(awp_case.model, awp_case.loss, 0.01):
            failing()
    assert_restored(awp_case)

    def failing_loss():
        failing(awp_case.loss())

    with pytest.raises(RuntimeError, match="inside"):
        with ltsd.awp_perturbation(awp_case.model, failing_loss, 0.01):
            pass
    assert_restored(awp_case)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_awp_leaves_weights_alone_whose_gradient_is_not_finite(awp_case, factor):
    def loss():
        return factor * awp_case.loss()

    with ltsd.awp_perturbation(awp_case.model, loss, 0.01):
        assert_restored(awp_case)


def test_awp_with_gamma_0_does_nothing(awp_case):
    with ltsd.awp_perturbation(awp_case.model, failing, 0.0):
        assert_restored(awp_case)


def make_batch(method, classes=10, **settings):
    """Six images with random neighbours, a student in training mode and a frozen teacher."""
    row = ltsd.METHODS[method]
    torch.manual_seed(1)
    student = ltsd.build_model("resnet8", classes, row.head).train()
    x = torch.rand(6, 3, 16, 16)
    noise = 0.1 * torch.randn(6, 3, 16, 16)
    x_adv = (x + noise).clamp(0, 1)
    y = torch.tensor([0, 3, 8, 9, 9, 1])
    counts = torch.linspace(90, 9, classes)
    cfg = ltsd.Config(method=method, beta=5.0, tau=0.7, **settings)
    teacher = ltsd.FrozenCopy(network_with_history())
    return ltsd.Batch(student, x, x_adv, y, counts, cfg, alpha=7.0, teacher=teacher)


def assert_row(method, batch, want):
    """The row's loss is `want`, has a gradient, and comes with the student's logits at x'."""
    loss, logits = ltsd.METHODS[method].loss(batch)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert loss.requires_grad
    assert torch.equal(logits, batch.student(batch.x_adv))


@pytest.mark.parametrize("method", ["natural", "pgd-at", "awp"])
def test_plain_rows_minimise_cross_entropy(method):
    batch = make_batch(method)
    assert_row(method, batch, F.cross_entropy(batch.student(batch.x_adv), batch.y))


@pytest.mark.parametrize("method, name", [("trades", "trades_loss"), ("mart", "mart_loss")])
def test_trades_and_mart_compare_clean_with_attacked_images(method, name):
    batch = make_batch(method)
    logits = batch.student(batch.x)
    logits_adv = batch.student(batch.x_adv)
    loss = getattr(ltsd, name)
    assert_row(method, batch, loss(logits, logits_adv, batch.y, 5.0))


@pytest.mark.parametrize("classes, margin, tau_b, tau_m", [(10, 0.1, 1.5, 0.3), (11, 0.3, 0, 0)])
def test_robal_has_its_published_constants(classes, margin, tau_b, tau_m):
    batch = make_batch("robal", classes)
    scores = batch.student(batch.x)
    scores_adv = batch.student(batch.x_adv)
    constants = dict(scale=10.0, margin=margin, tau_b=tau_b, tau_m=tau_m, beta=5.0)
    want = ltsd.robal_loss(scores, scores_adv, batch.y, batch.counts, **constants)
    assert_row("robal", batch, want)


def test_at_bsl_minimises_balanced_softmax():
    batch = make_batch("at-bsl")
    logits = batch.student(batch.x_adv)
    assert_row("at-bsl", batch, ltsd.balanced_softmax_loss(logits, batch.y, batch.counts, 0.7))


def test_reat_adds_its_tail_term_to_balanced_softmax():
    batch = make_batch("reat")
    logits, features = batch.student(batch.x_adv, with_features=True)
    balanced = ltsd.balanced_softmax_loss(logits, batch.y, batch.counts, 0.7)
    assert_row("reat", batch, balanced + ltsd.reat_tail_loss(features, batch.y, batch.counts))


def test_ltsd_distils_the_teachers_differences():
    batch = make_batch("ltsd")
    minus = 2 * batch.x - batch.x_adv  # x - d, not clipped
    plus = batch.student(batch.x_adv)
    balanced = ltsd.balanced_softmax_loss(plus, batch.y, batch.counts, 0.7)
    teacher_plus = batch.teacher(batch.x_adv)
    igdm = ltsd.igdm_loss(plus, batch.student(minus), teacher_plus, batch.teacher(minus))
    assert_row("ltsd", batch, balanced + 7 * igdm)


def test_ltsd_with_kd_kl_distils_the_teachers_logits():
    batch = make_batch("ltsd", kd="kl")
    logits = batch.student(batch.x_adv)
    balanced = ltsd.balanced_softmax_loss(logits, batch.y, batch.counts, 0.7)
    distillation = ltsd.distillation_loss(logits, batch.teacher(batch.x_adv))
    assert_row("ltsd", batch, balanced + 7 * distillation)


ROWS = [  # method, what its attack ascends, where it starts, AWP's gamma
    ("natural", None, "gauss", 0),
    ("pgd-at", "cross-entropy", "uniform", 0),
    ("trades", "kl", "gauss", 0),
    ("mart", "cross-entropy", "gauss", 0),
    ("awp", "cross-entropy", "uniform", 0.01),
    ("robal", "cross-entropy", "gauss", 0),
    ("reat", "weighted", "uniform", 0),
    ("at-bsl", "cross-entropy", "gauss", 0),
    ("ltsd", "cross-entropy", "gauss", 0),
]


@pytest.mark.parametrize("method, ascended, init, gamma", ROWS)
def test_a_row_of_methods_names_its_attack(method, ascended, init, gamma):
    row = ltsd.METHODS[method]
    assert row.init == init
    assert row.awp == gamma
    assert row.teacher == (method == "ltsd")  # only the paper's method needs one
    assert row.low_precision == (method != "trades")
    assert (row.objective is None) == (ascended is None)


def test_every_row_is_tested():
    assert list(ltsd.METHODS) == [row[0] for row in ROWS]


ATTACKING = [row[:2] for row in ROWS if row[1]]


@pytest.mark.parametrize("method, ascended", ATTACKING)
def test_an_attack_ascends_its_rows_objective(method, ascended):
    row = ltsd.METHODS[method]
    frozen = ltsd.FrozenCopy(network_with_history())
    x = torch.rand(6, 3, 16, 16)
    y = torch.tensor([0, 3, 8, 9, 9, 1])
    logits = 2 * torch.randn(6, 10)
    counts = torch.linspace(90, 9, 10)
    predicted = torch.arange(10)
    aux = row.aux(frozen, x, counts, predicted)
    losses = slow_cross_entropy(logits.double().numpy(), y.numpy())
    if ascended == "cross-entropy":
        want = losses.mean()
    elif ascended == "kl":
        clean = frozen(x).double().numpy()
        want = slow_kl(clean, logits.double().numpy()).mean()
    else:
        weights = ltsd.reat_class_weights(counts, predicted)[y]
        want = np.average(losses, weights=weights)
    assert row.objective(logits, y, aux).item() == pytest.approx(want, rel=1e-5)


# 4  Step and attack ===============================================================================
def assert_step(x_adv, gradient, x, want):
    """The reference's step of size 0.02 in the ball of size 0.03, which leaves its input alone."""
    before = torch.tensor([x_adv])
    got = ltsd.pgd_step_reference(before, torch.tensor([gradient]), torch.tensor([x]), 0.02, 0.03)
    assert got.item() == pytest.approx(want, abs=1e-7)
    assert torch.equal(before, torch.tensor([x_adv]))


def test_the_reference_step_by_hand():
    assert_step(0.50, 3.0, 0.50, want=0.52)
    assert_step(0.50, -1e-30, 0.50, want=0.48)
    assert_step(0.51, 0.0, 0.50, want=0.51)
    assert_step(0.51, math.nan, 0.50, want=0.51)
    assert_step(0.53, 1.0, 0.50, want=0.53)  # held by the ball
    assert_step(0.01, -1.0, 0.01, want=0.0)  # held by [0,1]
    assert_step(1.00, math.inf, 0.99, want=1.0)


@pytest.fixture
def interpreted(monkeypatch):
    """ltsd loaded once more, its kernel in Triton's interpreter, its reference out of reach."""
    if not ltsd.triton:
        pytest.skip("Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location("ltsd_interpreted", ltsd.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.pgd_step_reference = failing
    return module


def awkward_step(shape, layout, dtype):
    """x_adv in the ball, a gradient with NaN, 0 and infinity, x with many pixels at 0 and 1."""
    x = torch.rand(shape).contiguous(memory_format=layout)
    x[x < 0.1] = 0
    x[x > 0.9] = 1
    x_adv = x.clone()
    x_adv += (8 / 255) * (2 * torch.rand_like(x) - 1)
    x_adv.clamp_(0, 1)
    gradient = torch.randn_like(x).to(dtype)
    number = torch.arange(x.numel()).view(shape)
    gradient[number % 5 == 0] = math.nan
    gradient[number % 11 == 1] = 0
    gradient[number % 13 == 2] = math.inf
    return x_adv, gradient, x


SHAPES = [(1, 3, 5, 7), (3, 3, 32, 32), (2, 1, 1, 1), (0, 3, 8, 8)]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize("low_dtype", [None, torch.float32, *HALF_TYPES])
def test_the_kernel_equals_the_reference_bit_for_bit(interpreted, layout, dtype, low_dtype):
    for shape in SHAPES:
        x_adv, gradient, x = awkward_step(shape, layout, dtype)
        want = ltsd.pgd_step_reference(x_adv, gradient, x, 2 / 255, 8 / 255)
        low = None
        if low_dtype:
            low = torch.empty_like(x, dtype=low_dtype)
        got = interpreted.pgd_step(x_adv, gradient, x, 2 / 255, 8 / 255, low)
        assert got is x_adv
        assert torch.equal(got, want)
        if low_dtype == torch.bfloat16:  # hardware rounds, the interpreter truncates
            bits = want.contiguous().view(torch.int32) & -65536
            truncated = bits.view(torch.float32).bfloat16()
            assert torch.equal(low, want.bfloat16()) or torch.equal(low, truncated)
        elif low_dtype:
            assert torch.equal(low, want.to(low_dtype))


@pytest.mark.skipif(not ltsd.triton, reason="Triton is not installed")
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("low, cast", [("fp32", ""), ("bf16", "bf16"), ("fp16", "f16")])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_ahead_of_time_with_wide_loads(capability, low, cast):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = ltsd._pgd_step_kernel
    kinds = ["*fp32", f"*{low}", "*fp32", f"*{low}", "i32", "fp32", "fp32", "constexpr"]
    signature = dict(zip(kernel.arg_names, kinds, strict=True))
    constants = {(7,): ltsd.STEP_BLOCK}
    aligned = {(argument,): [["tt.divisibility", 16]] for argument in range(5)}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    ptx = compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert f".target sm_{capability}" in ptx
    # 16 bytes each: x_adv and x, two a thread
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
    if cast:
        assert f"cvt.rn.{cast}" in ptx  # to the nearest even number, as PyTorch rounds


def test_the_step_works_in_place_and_writes_its_low_precision_copy():
    x_adv, gradient, x = awkward_step((2, 3, 4, 4), torch.contiguous_format, torch.float32)
    want = ltsd.pgd_step_reference(x_adv, gradient, x, 0.1, 0.1)
    low = torch.empty_like(x, dtype=torch.bfloat16)
    got = ltsd.pgd_step(x_adv, gradient, x, 0.1, 0.1, low)
    assert got is x_adv
    assert torch.equal(x_adv, want)
    assert torch.equal(low, want.bfloat16())


PIXELS = torch.linspace(0, 1, 96).view(2, 3, 4, 4)


def assert_no_step(said, **odd):
    tensors = dict(x_adv=PIXELS.clone(), grad=PIXELS, x=PIXELS) | odd
    with pytest.raises(ValueError, match=said):
        ltsd.pgd_step(**tensors, step_size=0.1, eps=0.1)


def test_the_step_refuses_what_would_pair_wrong_pixels():
    turned = PIXELS.contiguous(memory_format=torch.channels_last)
    gaps = torch.zeros(2, 3, 8, 4)[:, :, ::2]
    assert_no_step("grad is", grad=turned)
    assert_no_step("x_adv is|x is", x=turned)
    assert_no_step("out_low is", out_low=turned.bfloat16())
    assert_no_step("grad is", grad=PIXELS[:1])
    assert_no_step("x is", x_adv=gaps, grad=gaps, x=gaps)
    assert_no_step("x_adv is", x_adv=PIXELS.double())
    assert_no_step("x is", x=PIXELS.half())
    assert_no_step("grad is", grad=PIXELS.long())


def assert_same_logits(frozen, model, x):
    with torch.no_grad():
        want = model.eval()(x)
        got = frozen(x)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    return want


@pytest.mark.parametrize("parent", [ltsd.BasicBlock, ltsd.PreActBlock, ltsd.WideBlock])
def test_a_block_derived_from_ours_makes_the_same_network(parent, monkeypatch):
    class Derived(parent):
        folds = ()

    networks = []
    for block in (parent, Derived):
        monkeypatch.setitem(ltsd.ARCHS, "own", (block, (1, 1), (8, 8, 16), "layer{}"))
        torch.manual_seed(0)
        networks.append(ltsd.build_model("own", 10).eval())
    assert networks[0].state_dict().keys() == networks[1].state_dict().keys()
    x = torch.rand(2, 3, 16, 16)
    for network in networks:  # of the derived ones no norm inside a block is folded
        torch.testing.assert_close(ltsd.FrozenCopy(network)(x), networks[0](x))


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.GroupNorm, 2),
        partial(nn.BatchNorm2d, affine=False),
        partial(nn.BatchNorm2d, eps=0.1),
    ],
)
def test_a_frozen_copy_equals_a_block_of_other_norms_and_biases(norm, monkeypatch):
    class Foreign(ltsd.BasicBlock):
        def __init__(self, cin, cout, stride):
            super().__init__(cin, cout, stride)
            self.bn1 = norm(cout)
            self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)

    monkeypatch.setitem(ltsd.ARCHS, "own", (Foreign, (1, 1), (8, 8, 16), "layer{}"))
    torch.manual_seed(0)
    model = ltsd.build_model("own", 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.01)
    assert_same_logits(ltsd.FrozenCopy(model), model, torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("arch", ltsd.ARCHS)
def test_a_frozen_copy_equals_its_source_and_follows_it_in_place(arch):
    model = network_with_history(arch)
    x = torch.rand(2, 3, 16, 16)
    before = copy.deepcopy(model.state_dict())
    frozen = ltsd.FrozenCopy(model)
    places = [tensor.data_ptr() for tensor in frozen.state_dict().values()]
    first = assert_same_logits(frozen, model, x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model.train()(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    frozen.refresh()
    second = assert_same_logits(frozen, model, x)
    assert (second - first).abs().max() > 0.01 * first.abs().max()
    assert [tensor.data_ptr() for tensor in frozen.state_dict().values()] == places
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_a_frozen_copy_computes_in_channels_last_whatever_it_is_given():
    """Compiled code is made for one layout: another one would compile again."""
    frozen = ltsd.FrozenCopy(network_with_history())
    x = torch.rand(2, 3, 16, 16)
    strides = []

    def note(module, inputs):
        strides.append(inputs[0].stride())

    first = next(module for module in frozen.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(note)
    logits = frozen(x)
    assert torch.equal(frozen(x.contiguous(memory_format=torch.channels_last)), logits)
    assert strides == [(768, 1, 48, 3)] * 2


class Linear(nn.Module):
    """Two classes, linear in the pixels of [N,1,4,4]: its best attack is known; no copying."""

    def __init__(self):
        super().__init__()
        weight = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight)

    def __deepcopy__(self, memo):
        raise AssertionError("a foreign module was copied")

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


THREAT = dict(eps=0.1, step_size=0.05, steps=3)


@pytest.mark.parametrize("init", ["uniform", "gauss", "none"])
def test_the_attack_reaches_the_optimum_of_a_linear_model(init):
    model = Linear()
    x = torch.rand(64, 1, 4, 4)
    y = torch.arange(64) % 2
    got = ltsd.pgd_attack(model, x, y, eps=0.07, step_size=0.02, steps=10, init=init)
    towards_1 = (model.weight[1] - model.weight[0]).sign().view(1, 4, 4)
    best = x + 0.07 * towards_1
    best[y == 1] = x[y == 1] - 0.07 * towards_1
    torch.testing.assert_close(got, best.clamp(0, 1), rtol=0, atol=1e-6)
    assert not got.requires_grad


@pytest.fixture
def foreign_module():
    """With modes, a frozen parameter and a gradient of its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5)
    )
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    return model


def everything_of(model):
    modes = [module.training for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [repr(parameter.grad) for parameter in model.parameters()]
    weights = [tensor.tolist() for tensor in model.state_dict().values()]
    return modes, trainable, gradients, weights


@pytest.mark.parametrize("objective", [None, failing])
def test_the_attack_leaves_module_and_images_as_they_were(foreign_module, objective, untouched):
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 5
    kept = x.clone()
    before = everything_of(foreign_module)
    outcome = contextlib.nullcontext()
    if objective:
        outcome = pytest.raises(RuntimeError, match="failed inside")
    settings = THREAT | dict(objective=objective, generator=torch.Generator())
    with outcome:
        ltsd.pgd_attack(foreign_module, x, y, **settings)
    assert everything_of(foreign_module) == before
    assert torch.equal(x, kept)


def test_an_own_network_in_training_is_attacked_as_its_frozen_copy_and_stays_as_it_was():
    model = network_with_history().train()
    before = everything_of(model)
    x = torch.rand(3, 3, 16, 16)
    y = torch.arange(3)
    got = ltsd.pgd_attack(model, x, y, init="none", **THREAT)
    want = ltsd.pgd_attack(ltsd.FrozenCopy(model), x, y, init="none", **THREAT)
    assert torch.equal(got, want)
    assert everything_of(model) == before


def test_the_attack_follows_its_generator(foreign_module):
    x = torch.rand(6, 3, 8, 8)
    y = torch.arange(6) % 5
    results = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        results.append(ltsd.pgd_attack(foreign_module, x, y, generator=generator, **THREAT))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def start_noise(init, x, eps=0.1):
    y = torch.zeros(len(x), dtype=torch.int64)
    settings = dict(eps=eps, step_size=0.0, steps=0, init=init)
    settings["generator"] = torch.Generator().manual_seed(3)
    return ltsd.pgd_attack(Linear(), x, y, **settings) - x


def test_the_start_noise_has_its_law():
    grey = torch.full((4000, 1, 4, 4), 0.5)
    uniform = start_noise("uniform", grey)
    assert abs(uniform.std() - 0.1 / math.sqrt(3)) < 1e-3
    assert abs(uniform.mean()) < 1e-3
    assert uniform.abs().max() <= 0.100001
    gauss = start_noise("gauss", grey)
    assert abs(gauss.std() - 1e-3) < 2e-5
    assert abs(gauss.mean()) < 2e-5
    assert not start_noise("none", grey).any()


def test_the_start_is_clipped_to_the_ball_and_to_the_images_range():
    grey = torch.full((4000, 1, 4, 4), 0.5)
    small_ball = start_noise("gauss", grey, eps=1e-3)
    assert small_ball.abs().max() <= 1.0001e-3
    white = torch.ones(9, 1, 4, 4)
    assert start_noise("uniform", white).max() == 0
    assert start_noise("uniform", 0 * white).min() == 0


IMAGES = torch.linspace(0, 1, 64).view(4, 1, 4, 4)


LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("change", [dict(eps=0, init="uniform"), dict(steps=0), dict(step_size=0)])
def test_an_attack_without_room_or_steps_returns_the_images(change):
    settings = THREAT | dict(init="none") | change
    got = ltsd.pgd_attack(Linear(), IMAGES, LABELS, **settings)
    assert torch.equal(got, IMAGES)


def test_a_view_with_gaps_is_attacked_like_a_dense_tensor():
    view = torch.rand(4, 1, 8, 8)[:, :, 2:6, 2:6]
    got = ltsd.pgd_attack(Linear(), view, LABELS, init="none", **THREAT)
    want = ltsd.pgd_attack(Linear(), view.contiguous(), LABELS, init="none", **THREAT)
    assert torch.equal(got, want)
    assert not torch.equal(got, view)


def test_no_images_are_attacked_without_an_error():
    got = ltsd.pgd_attack(Linear(), IMAGES[:0], LABELS[:0], **THREAT)
    assert got.shape == (0, 1, 4, 4)


def assert_no_attack(said, model=None, **change):
    arguments = dict(x=IMAGES, y=LABELS) | THREAT | change
    with pytest.raises(ValueError, match=said):
        ltsd.pgd_attack(model or Linear(), **arguments)


def test_the_attack_refuses_an_odd_threat():
    assert_no_attack("eps -1", eps=-1)
    assert_no_attack("divide by 255", eps=8)
    assert_no_attack("step_size nan", step_size=math.nan)
    assert_no_attack("steps -1", steps=-1)
    assert_no_attack("'normal'", init="normal")


def test_the_attack_refuses_odd_images_and_labels():
    assert_no_attack("str", x="cat")
    assert_no_attack(r"\[N,C,H,W\]", x=IMAGES.flatten(1))
    assert_no_attack("float64", x=IMAGES.double())
    assert_no_attack("divide by 255", x=IMAGES * 255)
    assert_no_attack("nan", x=IMAGES * math.nan)
    assert_no_attack("int", y=4)
    assert_no_attack(r"\[3\]", y=LABELS[:3])
    assert_no_attack("float32", y=LABELS.float())


class Wrapped(Linear):
    """Returns its logits as some published networks do."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        logits = super().forward(x)
        if self.kind == "tuple":
            return logits, x
        return {"logits": logits}


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_the_attack_refuses_a_model_that_returns_no_tensor(kind):
    assert_no_attack("logits", model=Wrapped(kind))


def test_the_attack_refuses_a_model_that_is_no_module():
    assert_no_attack("Module", model=Linear().forward)


def test_the_attack_refuses_inference_mode():
    with torch.inference_mode():
        assert_no_attack("inference")


class Normalise(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, x):
        if self.in_place:
            return x.sub_(0.5).mul_(4.0)
        return (x - 0.5) * 4.0


def test_a_model_that_works_in_place_leaves_the_images_and_the_attack_as_they_are():
    x = IMAGES.clone()
    pure = nn.Sequential(Normalise(in_place=False), Linear())
    hasty = nn.Sequential(Normalise(in_place=True), Linear())
    want = ltsd.pgd_attack(pure, x, LABELS, init="none", **THREAT)
    got = ltsd.pgd_attack(hasty, x, LABELS, init="none", **THREAT)
    assert torch.equal(got, want)
    assert torch.equal(x, IMAGES)


class ChannelSums(nn.Module):
    """A class for each channel. The gradient of a sum comes back as an expanded tensor."""

    def forward(self, x):
        return x.sum((2, 3))


def test_a_model_with_an_expanded_gradient_is_attacked():
    x = torch.rand(3, 3, 4, 4)
    got = ltsd.pgd_attack(ChannelSums(), x, torch.arange(3), eps=0.01, step_size=0.01, steps=2)
    want = x + 0.01
    for image in range(3):
        want[image, image] -= 0.02  # the channel of its own class goes down
    torch.testing.assert_close(got, want.clamp(0, 1), rtol=0, atol=1e-6)


COUNTS = torch.linspace(500, 50, 10)


def attack_and_score(net, model, row, x, y, aux):
    """Attack `net` as the row does: (objective reached, images still right), both of `model`."""
    threat = dict(eps=8 / 255, step_size=2 / 255, steps=10, init=row.init, objective=row.objective)
    own_aux = row.aux(net, x, COUNTS, COUNTS)
    generator = torch.Generator().manual_seed(0)
    attacked = ltsd.pgd_attack(net, x, y, aux=own_aux, generator=generator, **threat)
    logits = model(attacked)
    hits = (logits.argmax(1) == y).sum().item()
    return row.objective(logits, y, aux).item(), hits


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart", "reat"])  # the others attack alike
@torch.no_grad()
def test_the_fast_attack_is_as_strong_as_the_plain_one(trained, method):
    model, x, y = trained
    row = ltsd.METHODS[method]
    dtype = torch.float32
    if row.low_precision:
        dtype = torch.bfloat16
    plain = ltsd.ForeignNet(model)  # not folded, in float32
    fast = ltsd.FrozenCopy(model, dtype)
    aux = row.aux(plain, x, COUNTS, COUNTS)
    clean_hits = (model(x).argmax(1) == y).sum().item()
    plain_value, plain_hits = attack_and_score(plain, model, row, x, y, aux)
    fast_value, fast_hits = attack_and_score(fast, model, row, x, y, aux)
    assert clean_hits > 20  # of 60
    assert plain_hits < clean_hits - 4  # the attack has something to do
    assert fast_value >= 0.99 * plain_value
    assert abs(fast_hits - plain_hits) <= 1


def test_a_float16_attack_keeps_the_sign_of_tiny_gradients():
    """A confident image's gradient, here about 1e-10, is below float16's least number, 6e-8."""
    model = network_with_history()
    with torch.no_grad():
        model.linear.bias[0] = 12
    x = torch.rand(64, 3, 16, 16)
    y = torch.zeros(64, dtype=torch.int64)
    threat = dict(eps=0.1, step_size=0.05, steps=1, init="none")
    exact = ltsd.pgd_attack(ltsd.FrozenCopy(model), x, y, **threat)
    half = ltsd.pgd_attack(ltsd.FrozenCopy(model, torch.float16), x, y, **threat)
    assert (exact != x).all()
    assert (half == exact).float().mean() > 0.99


# 11  Theory =======================================================================================
def test_theorem1_by_hand():
    got = ltsd.theorem1(n=4, eta=1.0, eps=0.5, r=math.e**2)
    want = dict(
        b_nat=0.5,  # ln r / (2 sqrt(n) eta)
        b_rob=1.0,  # the same with eta - eps
        nat_std=0.066807201268858,  # Phi(0.5 - 2)
        nat_rob=0.308537538725987,  # Phi(0.5 - 1)
        rob_std=0.158655253931457,  # Phi(1 - 2)
        rob_rob=0.5,  # Phi(1 - 1)
    )
    assert got == pytest.approx(want)


def assert_no_theorem(n, eta, eps, r):
    with pytest.raises(ValueError, match=f"n {n}, eta {eta}, eps {eps}, r {r}"):
        ltsd.theorem1(n, eta, eps, r)


def test_theorem1_refuses_what_it_does_not_cover():
    assert_no_theorem(0, 1, 0.5, 2)
    assert_no_theorem(1.5, 1, 0.5, 2)
    assert_no_theorem(math.inf, 1, 0.5, 2)
    assert_no_theorem(2, 1, 0.5, 0.5)
    assert_no_theorem(2, 1, 0.5, math.inf)
    assert_no_theorem(2, 1, 0.5, math.nan)
    assert_no_theorem(2, 1, 1, 2)
    assert_no_theorem(2, 1, -0.1, 2)
    assert_no_theorem(2, math.nan, 0, 2)


@pytest.mark.parametrize("name, key", [("natural", "nat"), ("adversarial", "rob")])
def test_the_theory_table_has_theorem1s_errors(name, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ltsd.main(["--stage", "theory"]) == 0
    table = capsys.readouterr().out.replace(" ", "")
    for r in (1, 2, 5, 10, 20, 50):
        t = ltsd.theorem1(2, 1.0, 0.5, r)
        bias = f"{t['b_' + key]:.4f}"
        clean = f"{100 * t[key + '_std']:.2f}"
        attacked = f"{100 * t[key + '_rob']:.2f}"
        assert f"|{r}|{name}training|{bias}|{clean}|{attacked}|" in table


def test_figure_2_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert ltsd.main(["--stage", "theory", "--figures", "figures"]) == 0
    with Image.open(tmp_path / "figures" / "figure2.png") as figure:
        assert min(figure.size) > 200


def best_attack(model, x, y, eps):
    """The images in the ball that a Linear model likes least."""
    towards_1 = (model.weight[1] - model.weight[0]).sign().view(1, 4, 4)
    direction = torch.where(y == 0, 1, -1).view(-1, 1, 1, 1)
    return (x + eps * direction * towards_1).clamp(0, 1)


# 8  AutoAttack ====================================================================================
QUICK = dict(eps=12 / 255, iterations=8, queries=30, targets=3)


def blobs(count, seed=3):
    """Blurred class prototypes plus noise, [count, 3, 12, 12], and their labels."""
    fixed = torch.Generator().manual_seed(99)
    prototypes = torch.rand(10, 3, 3, 3, generator=fixed)
    prototypes = F.interpolate(prototypes, size=12, mode="bilinear") * 0.5 + 0.25
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=generator)
    noise = torch.randn(count, 3, 12, 12, generator=generator)
    return (prototypes[y] + 0.25 * noise).clamp(0, 1), y


@pytest.fixture(scope="session")
def foreign():
    """A small foreign network after 120 steps of adversarial training on blobs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 12, 3, 2, 1)
        second = nn.Conv2d(12, 24, 3, 2, 1)
        net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    x, y = blobs(2048, seed=1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    threat = dict(eps=8 / 255, step_size=5 / 255, steps=2, generator=generator)
    for step in range(120):
        rows = torch.arange(128) + 128 * (step % 16)
        x_adv = ltsd.pgd_attack(net, x[rows], y[rows], **threat)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y[rows]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def robust(net, x, y):
    return net(x).argmax(1) == y


# points, and by how many the official result itself differs from seed to seed
PARITY = [
    (["apgd-ce"], 256, 4),
    (["apgd-t"], 128, 1),
    (["fab-t"], 96, 1),
    (["square"], 128, 4),
    (list(ltsd.AUTOATTACK), 64, 1),
]


@pytest.mark.parametrize("attacks, count, apart", PARITY)
def test_autoattack_is_on_a_par_with_the_official_package(foreign, attacks, count, apart):
    package = pytest.importorskip("pyautoattack")
    x, y = blobs(count, seed=7)
    x_adv = ltsd.autoattack(foreign, x, y, eps=14 / 255, attacks=attacks, iterations=8, queries=400)
    official = package.AutoAttack(foreign, attacks=attacks, eps=14 / 255, version="custom", seed=0)
    official.apgd.n_restarts = 1
    official.fab.n_restarts = 1
    official.apgd.n_iter = 8
    official.apgd_targeted.n_iter = 8
    official.fab.n_iter = 8
    official.square.n_queries = 400
    x_official = official.run_standard_evaluation(x, y, batch_size=count)[0]
    ours = robust(foreign, x_adv, y).sum()
    theirs = robust(foreign, x_official, y).sum()
    assert abs(ours - theirs) <= apart
    assert 0.2 * count < theirs < 0.8 * count


def test_targeted_dlr_by_hand():
    logits = torch.tensor([[0.0, 3.0, 5.0, 1.0, 2.0]])
    y = torch.tensor([2])
    target = torch.tensor([1])
    want = pytest.approx((3 - 5) / (5 - (2 + 1) / 2))
    assert ltsd.targeted_dlr(logits, y, target).item() == want
    assert ltsd.targeted_dlr(7 * logits + 3, y, target).item() == want


def test_apgd_halves_its_step_and_returns_to_the_best_at_the_papers_checkpoints():
    """Of a loss that never rises the best image is the start."""
    seen = []

    def gradient(images, objective):
        seen.append(images)
        return torch.zeros(2, 1, 1, 1), torch.ones_like(images)

    x = torch.full((2, 3, 4, 4), 0.5)
    points = SimpleNamespace(x=x, eps=0.1, low=x - 0.1, high=x + 0.1, gradient=gradient)
    ltsd.apgd(points, torch.Generator(), iterations=100, objective=None)
    step_size = 0.2
    momentum = 1.0
    z = seen[0]
    previous = z
    for k in range(1, 101):
        aim = (z + step_size).clamp(0.4, 0.6)
        moved = z + momentum * (aim - z) + (1 - momentum) * (z - previous)
        previous = z
        z = moved.clamp(0.4, 0.6)
        torch.testing.assert_close(seen[k], z)
        momentum = 0.75
        if k in (22, 41, 57, 70, 80, 87, 93, 99):
            step_size /= 2
            z = seen[0]


def projection_by_bisection(t, w, gap):
    """The same by bisection on the length that every coordinate moves, cut at its room."""
    direction = -(w * gap[:, None]).sign()
    room = torch.where(direction > 0, 1 - t, t)
    low = torch.zeros(len(t), 1, dtype=t.dtype)
    high = torch.ones(len(t), 1, dtype=t.dtype)
    for _ in range(100):
        middle = (low + high) / 2
        reached = (w.abs() * torch.minimum(middle, room)).sum(1)
        short = (reached < gap.abs())[:, None]
        low = torch.where(short, middle, low)
        high = torch.where(short, high, middle)
    return direction * torch.minimum(high, room)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 1000.0])
def test_the_projection_equals_brute_force(scale):
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(40, 900, generator=generator, dtype=torch.float64).sigmoid()
    w = torch.randn(40, 900, generator=generator, dtype=torch.float64) ** 5  # heavy tails
    gap = torch.randn(40, generator=generator, dtype=torch.float64) * 30 * scale
    t[:10, :450] = 0  # no room downwards
    t[10:20, :450] = 1  # none upwards
    w[5:30:2, ::3] = 0
    w[3] = 0  # no direction
    gap[7] = 0  # nothing to do
    all_room = (w.abs() * torch.where(w > 0, t, 1 - t)).sum(1)
    gap[30:] = 0.9999 * all_room[30:]
    want = projection_by_bisection(t, w, gap)
    images = (t.view(40, 1, 30, 30), w.view(40, 1, 30, 30), gap.view(40, 1, 1, 1))
    got = ltsd.project_linf(*images).flatten(1)
    got_single = ltsd.project_linf(*[tensor.float() for tensor in images]).flatten(1)
    assert (got - want).abs().max() < 1e-12
    assert (got_single - want).abs().max() < 1e-4


class LinearPoints:
    """Points whose gap to the target is <w, image>. It keeps the images that it was asked about."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(64, 1, 4, 4, generator=generator, dtype=torch.float64)
        self.w = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
        self.x = x[self.gap(x)[:, 0, 0, 0] < 0]  # these are right
        self.with_gradient = []
        self.without = []

    def gap(self, images):
        return (images * self.w).sum((1, 2, 3), keepdim=True)

    def gradient(self, images, objective):
        self.with_gradient.append(images)
        return self.gap(images), self.w.expand_as(images)

    def margin(self, images):
        self.without.append(images)
        return -self.gap(images)


def test_a_fab_step_by_its_formula():
    points = LinearPoints()
    ltsd.fab(points, torch.Generator(), iterations=3)
    x = points.x
    w = points.w.expand_as(x)
    z = points.with_gradient[1]
    from_z = ltsd.project_linf(z, w, points.gap(z))
    from_x = ltsd.project_linf(x, w, points.gap(x))
    near = from_z.abs().amax((1, 2, 3), keepdim=True)
    far = from_x.abs().amax((1, 2, 3), keepdim=True)
    alpha = (near / (near + far)).clamp(max=0.1)
    want = (1 - alpha) * (z + 1.05 * from_z) + alpha * (x + 1.05 * from_x)
    want = want.clamp(0, 1)
    torch.testing.assert_close(points.without[1], want)
    crossed = points.gap(want) > 0
    assert crossed.any()
    want = torch.where(crossed, x + 0.9 * (want - x), want)
    torch.testing.assert_close(points.with_gradient[2], want)


EACH_AND_ALL = [[name] for name in ltsd.AUTOATTACK] + [list(ltsd.AUTOATTACK)]


@pytest.mark.parametrize("attacks", EACH_AND_ALL, ids="+".join)
def test_results_depend_neither_on_batch_size_nor_on_order(foreign, attacks, untouched):
    x, y = blobs(24)
    x = x.double()
    net = copy.deepcopy(foreign).double()
    options = dict(eps=14 / 255, attacks=attacks, iterations=10, queries=40)
    want = ltsd.autoattack(net, x, y, **options)
    assert want.dtype == torch.float64
    assert 0 < robust(net, want, y).sum() < 24
    for batch_size in (5, 16):
        got = ltsd.autoattack(net, x, y, batch_size=batch_size, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    turned = ltsd.autoattack(net, x.flip(0), y.flip(0), **options)
    torch.testing.assert_close(turned.flip(0), want, rtol=0, atol=1e-9)


def test_draws_follow_the_seed(foreign):
    x, y = blobs(24)
    results = []
    for seed in (0, 0, 1):
        results.append(ltsd.autoattack(foreign, x, y, attacks=["square"], seed=seed, **QUICK))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_compiled_network_gets_batches_of_few_sizes(foreign):
    x, y = blobs(40)
    x = x.double()
    net = copy.deepcopy(foreign).double()
    compiled = nn.Sequential(net)
    compiled.compiled = {32: net}
    sizes = set()
    compiled.register_forward_pre_hook(lambda module, given: sizes.add(len(given[0])))
    options = QUICK | dict(batch_size=32)
    want = ltsd.autoattack(net, x, y, **options)
    got = ltsd.autoattack(net, x, y, nets=(compiled, net), **options)
    assert sizes == {32, 16}
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_fooled_images_fool_when_scored_again_and_the_rest_are_unchanged(trained, untouched):
    net, x, y = trained
    x_adv = ltsd.autoattack(net, x, y, **QUICK)
    kept = robust(net, x_adv, y)
    assert 0 < kept.sum() < robust(net, x, y).sum()
    assert torch.equal(x_adv[kept], x[kept])
    assert (x_adv - x).abs().max() <= QUICK["eps"] + 1e-7
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_float64_images_of_a_float32_network_are_attacked(trained):
    net, x, y = trained
    x_adv = ltsd.autoattack(net, x.double(), y, **QUICK | dict(attacks=["apgd-ce"]))
    assert x_adv.dtype == torch.float64
    assert robust(net, x_adv.float(), y).sum() < robust(net, x, y).sum()


def test_the_log_has_a_line_for_each_attack_with_the_share_that_is_still_robust(foreign):
    x, y = blobs(40)
    lines = []
    x_adv = ltsd.autoattack(foreign, x, y, log=lines.append, **QUICK)
    assert [line.split()[0] for line in lines] == ["clean", *ltsd.AUTOATTACK]
    shares = [float(line.split(" %")[0].split()[-1]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(100 * robust(foreign, x, y).double().mean().item())
    assert shares[-1] == pytest.approx(100 * robust(foreign, x_adv, y).double().mean().item())


def test_an_attack_that_the_state_holds_is_not_made_again(foreign):
    x, y = blobs(40)
    calls = []
    counting = nn.Sequential(foreign)
    counting.register_forward_hook(lambda *arguments: calls.append(1))
    state = {}
    want = ltsd.autoattack(counting, x, y, state=state, **QUICK)
    assert list(state) == list(ltsd.AUTOATTACK)
    first_calls = len(calls)
    del state["square"]  # as if the first call had been stopped before its end
    resumed = ltsd.autoattack(counting, x, y, state=state, **QUICK)
    resumed_calls = len(calls) - first_calls
    again = ltsd.autoattack(counting, x, y, state=state, **QUICK)
    assert torch.equal(resumed, want)
    assert torch.equal(again, want)
    assert resumed_calls < 45 < first_calls  # Square asks 30 times
    assert len(calls) - first_calls - resumed_calls < 10


class RolledLogits(nn.Module):
    """Says another class than the network, so that every point that is right seems fooled."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).roll(1, 1)


def test_a_fast_network_that_claims_everything_decides_nothing(foreign):
    x, y = blobs(40)
    lying = RolledLogits(foreign)
    state = {}
    x_adv = ltsd.autoattack(foreign, x, y, nets=(lying, foreign), state=state, **QUICK)
    honest = ltsd.autoattack(foreign, x, y, **QUICK)
    fooled = robust(foreign, x, y) & ~robust(foreign, x_adv, y)
    assert sum(len(rows) for rows, _ in state.values()) == fooled.sum()
    assert torch.equal(x_adv[~fooled], x[~fooled])
    assert robust(foreign, x_adv, y).sum() > robust(foreign, honest, y).sum()


def test_a_fast_network_that_claims_nothing_decides_nothing():
    model = Linear()
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = x[model(x).argmax(1) == 0]
    y = torch.zeros(len(x), dtype=torch.int64)
    sure = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(sure[1].weight)
    sure[1].bias.data = torch.tensor([9.0, 0.0])  # class 0, whatever the image
    honest = ltsd.autoattack(model, x, y, **QUICK | dict(eps=0.2))
    x_adv = ltsd.autoattack(model, x, y, nets=(sure, model), **QUICK | dict(eps=0.2))
    assert robust(model, honest, y).sum() < len(x)
    assert torch.equal(x_adv, x)


@pytest.mark.parametrize("name", ltsd.AUTOATTACK)
def test_a_low_precision_copy_steers_to_the_same_verdicts(trained, name):
    model, x, y = trained
    exact = ltsd.FrozenCopy(model)
    options = QUICK | dict(eps=8 / 255, targets=9, attacks=[name])
    x_adv = ltsd.autoattack(exact, x, y, nets=(exact, exact), **options)
    want = robust(exact, x_adv, y)
    assert want.sum() < robust(exact, x, y).sum() - 4
    for dtype in (torch.float16, torch.bfloat16):
        fast = ltsd.FrozenCopy(model, dtype)
        x_adv = ltsd.autoattack(exact, x, y, nets=(fast, exact), **options)
        assert (robust(exact, x_adv, y) != want).sum() <= 1


def test_a_float16_gradient_keeps_the_sign_of_tiny_values():
    """A confident image's gradient, here about 1e-10, is below float16's least number, 6e-8."""
    torch.manual_seed(0)
    model = lived_in(ltsd.build_model("resnet8", 10))
    model.linear.bias.data[0] = 12
    x = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(64, dtype=torch.int64)

    def loss(logits):
        return F.cross_entropy(logits, y, reduction="none")

    want = ltsd.input_gradient(ltsd.FrozenCopy(model), x, loss)[2]
    got = ltsd.input_gradient(ltsd.FrozenCopy(model, torch.float16), x, loss)[2]
    assert 0 < want.abs().max() < 1e-6
    assert (got.sign() == want.sign()).float().mean() > 0.98


def test_where_float16_overflows_float32_attacks_with_a_warning(trained):
    model = copy.deepcopy(trained[0])
    x, y = trained[1], trained[2]
    exact = ltsd.FrozenCopy(model)
    fast = ltsd.FrozenCopy(model, torch.float16)
    assert ltsd.usable_nets((fast, exact), x, y) == (fast, exact)
    model.conv1.weight.data.mul_(1e9)  # beyond float16, harmless in float32
    exact.refresh()
    fast.refresh()
    with pytest.warns(UserWarning, match="overflows"):
        assert ltsd.usable_nets((fast, exact), x, y) == (exact, exact)


@pytest.mark.parametrize("offset", [0.0, 1000.0, 3000.0, 10000.0])
def test_an_offset_of_all_logits_changes_no_verdict(offset):
    model = Linear()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 1, 4, 4, generator=generator)
    y = model(x).argmax(1)
    shifted = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    shifted[1].weight.data = model.weight.data
    shifted[1].bias.data.fill_(offset)
    x_adv = ltsd.autoattack(shifted, x, y, **QUICK | dict(eps=0.1))
    want = robust(model, best_attack(model, x, y, 0.1), y)
    assert 10 < want.sum() < 190
    assert torch.equal(robust(model, x_adv, y), want)


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.01 * torch.randn_like(x)


class Rounded(nn.Module):
    """Its gradient is zero."""

    def forward(self, x):
        return (255 * x).round() / 255


class Backwards(nn.Module):
    """Its gradient points the wrong way."""

    def forward(self, logits):
        return 2 * logits.detach() - logits


ODD_MODELS = [
    (Noisy(), nn.Identity(), "randomised"),
    (nn.Identity(), nn.Softmax(1), "probabilities"),
    (Rounded(), nn.Identity(), "zero input gradient"),
    (nn.Identity(), Backwards(), "Square fooled"),
]


@pytest.mark.parametrize("first, last, said", ODD_MODELS, ids=[row[2] for row in ODD_MODELS])
def test_a_model_whose_result_would_mislead_is_warned_of(foreign, first, last, said):
    x, y = blobs(40)
    model = nn.Sequential(first, foreign, last)
    options = QUICK | dict(eps=20 / 255, attacks=["apgd-ce", "square"])
    with pytest.warns(UserWarning) as found:
        ltsd.autoattack(model, x, y, **options)
    assert any(said in str(warning.message) for warning in found)


def test_of_an_ordinary_model_there_is_no_warning(foreign):
    x, y = blobs(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ltsd.autoattack(foreign, x, y, **QUICK)


def test_images_that_cannot_be_fooled_come_back_unchanged(foreign):
    x, y = blobs(12)
    right = foreign(x).argmax(1)
    wrong = (right + 1) % 10
    assert ltsd.autoattack(foreign, x[:0], y[:0]).shape == (0, 3, 12, 12)
    assert torch.equal(ltsd.autoattack(foreign, x, wrong, **QUICK), x)
    assert torch.equal(ltsd.autoattack(foreign, x, right, **QUICK | dict(eps=0)), x)


def assert_no_autoattack(said, model=None, **change):
    x = torch.linspace(0, 1, 64).view(4, 1, 4, 4)
    arguments = dict(x=x, y=torch.zeros(4, dtype=torch.int64)) | QUICK | change
    with pytest.raises(ValueError, match=said):
        ltsd.autoattack(model or Linear(), **arguments)


def test_autoattack_refuses_odd_images_and_labels():
    x = torch.rand(4, 1, 4, 4)
    y = torch.zeros(4, dtype=torch.int64)
    assert_no_autoattack("divide by 255", x=x + 2)
    assert_no_autoattack("nan", x=x * math.nan)
    assert_no_autoattack("uint8", x=x.byte())
    assert_no_autoattack(r"\[N,C,H,W\]", x=x.flatten(1))
    assert_no_autoattack(r"\[3\]", y=y[:3])
    assert_no_autoattack("float32", y=y.float())
    assert_no_autoattack(r"\[2, 2\]", y=y + 2)
    assert_no_autoattack(r"\[-1, -1\]", y=y - 1)


def test_autoattack_refuses_an_odd_threat():
    assert_no_autoattack("eps 8", eps=8)
    assert_no_autoattack("eps nan", eps=math.nan)
    assert_no_autoattack("pgd", attacks=["pgd"])
    assert_no_autoattack("attacks square", attacks="square")
    assert_no_autoattack("counts >= 1", batch_size=0)
    assert_no_autoattack("counts >= 1", iterations=0)
    assert_no_autoattack("counts >= 1", queries=0)
    assert_no_autoattack("counts >= 1", targets=0)


def test_autoattack_refuses_what_returns_no_finite_logits():
    assert_no_autoattack("logits", model=Wrapped("tuple"))
    assert_no_autoattack("logits", model=Wrapped("dict"))
    assert_no_autoattack("Module", model=Linear().forward)
    broken = Linear()
    broken.weight.data[0] = math.nan
    assert_no_autoattack("finite", model=broken)


@pytest.mark.parametrize("own", [True, False])
def test_autoattack_refuses_inference_mode(own):
    model = Linear()
    x = torch.rand(4, 1, 4, 4)
    if own:
        model = ltsd.build_model("resnet8", 10)
        x = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        assert_no_autoattack("inference", model=model, x=x)


def test_a_model_that_works_in_place_leaves_the_images_and_autoattack_as_they_are(foreign):
    x, y = blobs(24)
    kept = x.clone()
    pure = nn.Sequential(Normalise(in_place=False), foreign)
    hasty = nn.Sequential(Normalise(in_place=True), foreign)
    want = ltsd.autoattack(pure, x, y, **QUICK)
    got = ltsd.autoattack(hasty, x, y, **QUICK)
    assert torch.equal(got, want)
    assert torch.equal(x, kept)
    assert not torch.equal(got, x)


@pytest.mark.parametrize("name", ltsd.AUTOATTACK)
def test_every_attack_takes_a_model_with_an_expanded_gradient(name):
    model = ChannelSums()
    x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    x_adv = ltsd.autoattack(model, x, y, eps=0.1, attacks=[name], iterations=10, queries=30)
    assert 0 < robust(model, x_adv, y).sum() < 40


@pytest.mark.parametrize("log", [None, failing])
def test_autoattack_leaves_module_images_and_precision_as_they_were(foreign_module, log, untouched):
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % 5
    kept = x.clone()
    before = everything_of(foreign_module)
    switch = torch.backends.cuda.matmul
    precisions = []
    foreign_module.register_forward_hook(lambda *_: precisions.append(switch.fp32_precision))
    usual = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        ltsd.autoattack(foreign_module, x, y, log=log, iterations=2, queries=2)
    except RuntimeError:
        assert log is failing
    after = switch.fp32_precision
    switch.fp32_precision = usual
    assert after == "tf32"
    assert set(precisions) == {"ieee"}
    assert everything_of(foreign_module) == before
    assert torch.equal(x, kept)


# 9  Evaluation ====================================================================================
U8 = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)


Y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


def always(*logits):
    """A network that says the same of every image of 4 x 4 pixels."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, len(logits)))
    nn.init.zeros_(net[2].weight)
    net[2].bias.data = torch.tensor(logits)
    return net


def test_evaluate_counts_what_is_right_overall_per_class_and_on_the_tail():
    figures = ltsd.evaluate(always(1.0, 0.0, 0.5), U8, Y, tail=[0, 2], attacks=["clean"])
    assert figures == dict(
        clean=62.5,
        class_clean=[100, 0, 0],
        tail_clean=pytest.approx(500 / 6),
    )


def test_evaluate_of_equal_classes_without_a_tail():
    figures = ltsd.evaluate(always(1.0, 0.0, 0.5), U8[4:6], Y[4:6], tail=[2], attacks=["pgd"])
    assert figures == dict(pgd=50, class_pgd=[100, 0], tail_pgd=None)


def test_nan_logits_are_never_right():
    figures = ltsd.evaluate(always(math.nan, 0.0, 0.0), U8, Y, attacks=["clean", "pgd"])
    assert figures["clean"] == 0
    assert figures["pgd"] == 0


def test_evaluates_pgd_reaches_the_optimum_of_a_linear_model():
    model = Linear()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, 1, 4, 4), generator=generator, dtype=torch.uint8)
    x = images / 255
    y = model(x).argmax(1)
    threat = dict(eps=0.07, step_size=0.02, steps=10)
    figures = ltsd.evaluate(model, images, y, batch_size=64, **threat)
    want = robust(model, best_attack(model, x, y, 0.07), y).double().mean().item()
    assert figures["clean"] == 100
    assert figures["pgd"] == 100 * want
    assert 0.1 < want < 0.9


def test_evaluates_aa_is_the_share_that_survives_autoattack(foreign, monkeypatch):
    budget = ltsd.autoattack.__kwdefaults__ | dict(iterations=4, queries=10, targets=2)
    monkeypatch.setattr(ltsd.autoattack, "__kwdefaults__", budget)
    x, y = blobs(40)
    images = (255 * x).byte()
    lines = []
    state = {}
    figures = ltsd.evaluate(foreign, images, y, attacks=["aa"], log=lines.append, state=state)
    x_adv = ltsd.autoattack(foreign, images / 255, y)
    assert figures["aa"] == pytest.approx(100 * robust(foreign, x_adv, y).double().mean().item())
    assert 0 < figures["aa"] < 100
    assert len(lines) == 5
    assert list(state) == list(ltsd.AUTOATTACK)


def test_evaluate_ascends_by_the_fast_and_decides_by_the_exact_network():
    model = Linear()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 1, 4, 4), generator=generator, dtype=torch.uint8)
    y = model(images / 255).argmax(1)
    opposite = Linear()
    opposite.weight.data *= -1  # all wrong, and it moves images to where the model is surer
    figures = ltsd.evaluate(model, images, y, eps=0.2, step_size=0.1, nets=(opposite, model))
    assert figures["clean"] == 100
    assert figures["pgd"] == 100
    assert ltsd.evaluate(model, images, y, eps=0.2, step_size=0.1)["pgd"] < 100


def assert_no_evaluation(said, images=U8, labels=Y, **change):
    with pytest.raises(ValueError, match=said):
        ltsd.evaluate(always(1.0, 0.0, 0.5), images, labels, **change)


def test_evaluate_refuses_odd_input():
    assert_no_evaluation("float32", images=U8.float())
    assert_no_evaluation("ndarray", images=U8.numpy())
    assert_no_evaluation(r"int64, \[3\]", labels=Y[:3])
    assert_no_evaluation("int32", labels=Y.int())
    assert_no_evaluation("images >= 1", images=U8[:0], labels=Y[:0])
    assert_no_evaluation("attacks 'pgd'", attacks="pgd")
    assert_no_evaluation("PGD", attacks=["PGD"])
    assert_no_evaluation("batch_size 0", batch_size=0)
    assert_no_evaluation("divide by 255", eps=8)


@pytest.mark.parametrize("own", [True, False])
def test_evaluate_repeats_itself_and_leaves_the_model_as_it_was(own, untouched):
    with torch.random.fork_rng(devices=[]):
        model = always(1.0, 0.0, 0.5)
        if own:
            model = ltsd.build_model("resnet8", 3)
    model.train()
    model[-1].eval()
    before = everything_of(model)
    first = ltsd.evaluate(model, U8, Y, steps=2, batch_size=5, seed=4)
    again = ltsd.evaluate(model, U8, Y, steps=2, batch_size=5, seed=4)
    assert first == again
    assert everything_of(model) == before


@pytest.mark.parametrize("classes, adjusted", [(10, False), (11, True)])
def test_robals_network_is_scored_with_its_post_hoc_head_beyond_10_classes(classes, adjusted):
    model = ltsd.build_model("resnet8", classes, "cosine").eval()
    counts = torch.linspace(90, 9, classes).int().tolist()
    x = torch.rand(4, 3, 16, 16)
    want = model(x)
    if adjusted:
        share = torch.tensor(counts) / sum(counts)
        want = 10 * want - 1.7 * share.log()
    exact = ltsd.scoring_nets(model, counts=counts)[1]
    torch.testing.assert_close(exact(x), want, rtol=1e-4, atol=1e-4)


def test_examples_are_a_grid_of_clean_and_attacked_images_with_a_line_in_the_log(trained, tmp_path):
    model, x, y = trained
    path = tmp_path / "examples.png"
    lines = []
    net = ltsd.FrozenCopy(model)
    threat = dict(eps=8 / 255, step_size=2 / 255, steps=2, seed=0)
    ltsd.save_examples(path, net, (255 * x).byte(), y, 8, lines.append, **threat)
    assert Image.open(path).size == (12 * 18 + 2, 2 * 18 + 2)
    lists = re.findall(r"\[(.*?)\]", lines[0])  # labels, predictions, predictions under attack
    assert [len(found.split(", ")) for found in lists] == [8, 8, 8]


ALL = list(ltsd.METHODS)


# Config and command line ==========================================================================
PAPERS = dict(
    data="cifar100", ir=10, method="ltsd", arch="resnet18", aug="none", epochs=100, batch_size=128,
    teacher_method="pgd-at", teacher_data="balanced", teacher_epochs=30, teacher_batch_size=32,
    lr=0.1, weight_decay=5e-4, momentum=0.9, milestones="0.75,0.9", eps=8, step_size=2, steps=10,
    alpha=40, tau=1, gamma=5, kd="igdm", eval_eps=8, eval_step_size=2, eval_steps=20,
    attacks="clean,pgd,aa", official=False, train_limit=None, test_limit=None, seed=0,
    stage="all", out="runs", role="student",
)  # fmt: skip


DATA_DEFAULTS = {
    "cifar10": dict(ir=50, gamma=25, arch="resnet18", image_size=None),
    "tinyimagenet": dict(ir=10, gamma=5, arch="preactresnet18"),
    "folder": dict(ir=None, gamma=None, arch="resnet18", image_size=32),
    "synthetic": dict(
        ir=20, gamma=10, arch="resnet8", alpha=10, epochs=10, batch_size=32, teacher_epochs=6,
        attacks="clean,pgd",
    ),
}  # fmt: skip


# a command line that sets a field to something else than its default
FLAGS = [
    ("--data folder", "data", "folder"), ("--data-dir d", "data_dir", "d"),
    ("--data folder --image-size 64", "image_size", 64), ("--ir 3", "ir", 3),
    ("--method mart", "method", "mart"), ("--arch wrn34-10", "arch", "wrn34-10"),
    ("--aug ra", "aug", "ra"), ("--alpha 2", "alpha", 2), ("--tau 0.5", "tau", 0.5),
    ("--gamma 3", "gamma", 3), ("--method trades --beta 5", "beta", 5), ("--kd kl", "kd", "kl"),
    ("--teacher-method robal", "teacher_method", "robal"), ("--lr 0.3", "lr", 0.3),
    ("--teacher-data full", "teacher_data", "full"), ("--epochs 7", "epochs", 7),
    ("--method at-bsl --official", "official", True), ("--teacher-epochs 6", "teacher_epochs", 6),
    ("--batch-size 5", "batch_size", 5), ("--teacher-batch-size 4", "teacher_batch_size", 4),
    ("--milestones 0.5,1", "milestones", "0.5,1"), ("--weight-decay 0.2", "weight_decay", 0.2),
    ("--momentum 0.8", "momentum", 0.8), ("--eps 4", "eps", 4), ("--step-size 1", "step_size", 1),
    ("--steps 3", "steps", 3), ("--train-limit 11", "train_limit", 11), ("--seed 8", "seed", 8),
    ("--test-limit 12", "test_limit", 12), ("--stage teacher", "stage", "teacher"),
    ("--teacher t.pt", "teacher", "t.pt"), ("--eval-eps 2", "eval_eps", 2),
    ("--eval-step-size 0.5", "eval_step_size", 0.5), ("--eval-steps 9", "eval_steps", 9),
    ("--attacks pgd,aa", "attacks", "pgd,aa"), ("--device cpu", "device", "cpu"),
    ("--amp bf16", "amp", "bf16"), ("--amp off", "amp", "off"), ("--compile on", "compile", "on"),
    ("--out o", "out", "o"), ("--stage eval --checkpoint c.pt", "checkpoint", "c.pt"),
    ("--examples 13", "examples", 13), ("--figures f", "figures", "f"),
    ("--teacher t.pt --mean 0,0,0 --std 1,1,1", "mean", "0,0,0"),
    ("--teacher t.pt --mean 0,0,0 --std 1,1,1", "std", "1,1,1"),
    ("--stage report r1 r2", "runs", ("r1", "r2")),
]  # fmt: skip


@pytest.mark.parametrize("words, name, value", FLAGS, ids=[row[1] for row in FLAGS])
def test_a_flag_sets_its_field(words, name, value):
    assert getattr(config_of(*words.split()), name) == value


def test_every_field_has_a_flag_but_the_role_of_a_run():
    names = {field.name for field in fields(ltsd.Config)}
    assert names - {"role"} == {name for _, name, _ in FLAGS}


def differences(cfg, want):
    """The values of `want` that a Config does not have, as {field: (its, wanted)}."""
    found = {}
    for name, value in want.items():
        if getattr(cfg, name) != value:
            found[name] = (getattr(cfg, name), value)
    return found


def test_without_flags_the_settings_are_the_papers():
    assert differences(config_of(), PAPERS) == {}


@pytest.mark.parametrize("data", DATA_DEFAULTS)
def test_a_data_set_brings_its_own_defaults_and_keeps_the_others(data):
    assert (
        differences(config_of("--data", data), PAPERS | DATA_DEFAULTS[data] | dict(data=data)) == {}
    )


def test_official_settings_are_published_ones_that_flags_override():
    words = "--official --method trades --data cifar10".split()
    published = dict(epochs=76, milestones="0.974", weight_decay=2e-4, lr=0.1, official=True)
    assert differences(config_of(*words), published) == {}
    assert config_of(*words, "--epochs", 5).epochs == 5
    # the paper's own method has no other settings: it is the same run
    assert config_of("--official") == config_of()


def test_help_lists_every_flag_and_its_examples_parse(capsys):
    with pytest.raises(SystemExit, match="0"):
        ltsd.main(["--help"])
    text = capsys.readouterr().out
    for field in fields(ltsd.Config):
        flag = "--" + field.name.replace("_", "-")
        if field.name not in ("role", "runs"):
            assert re.search(rf"^  {flag}\b(?!-)", text, re.M), flag
    examples = re.findall(r"^ +python ltsd\.py (.*?) +#", text, re.M)
    assert len(examples) == 5
    for line in examples:
        assert configs_of(*shlex.split(line))


def test_comma_lists_make_the_product_and_equal_ones_once():
    made = configs_of(*"--ir 5,10 --seed 0,1,0 --method natural,at-bsl --aug none,ra".split())
    got = {(cfg.ir, cfg.seed, cfg.method, cfg.aug) for cfg in made}
    assert len(made) == len(got) == 16
    assert {cfg.seed for cfg in made} == {0, 1}
    assert len({ltsd.run_path(cfg) for cfg in made}) == 16


def test_all_methods_include_one_added_from_outside(monkeypatch):
    monkeypatch.setitem(ltsd.METHODS, "mine", ltsd.METHODS["at-bsl"])
    assert [cfg.method for cfg in configs_of("--method", "all")] == [*ALL, "mine"]


def test_a_setting_that_a_method_ignores_makes_no_second_run():
    words = "--method ltsd,at-bsl --alpha 10,20 --gamma 1,2 --seed 0,1"
    configs = configs_of(*words.split())
    students = [cfg for cfg in configs if cfg.method == "ltsd"]
    assert (len(students), len(configs)) == (8, 10)
    assert len({ltsd.run_path(ltsd.teacher_config(cfg)) for cfg in students}) == 4


UNUSED = {
    "natural": "alpha tau beta kd eps step_size steps gamma teacher_method teacher_data "
    "teacher_epochs teacher_batch_size",
    "pgd-at": "alpha tau beta kd gamma teacher_epochs",
    "trades": "alpha tau kd gamma teacher_epochs",
    "reat": "alpha beta kd gamma teacher_epochs",
    "ltsd": "beta",
    "ltsd --teacher-data full": "beta gamma",
    "ltsd --teacher t.pt": "beta gamma teacher_data teacher_epochs teacher_batch_size",
}


def test_a_given_teacher_of_robal_knows_the_counts_that_its_head_needs():
    cfg = config_of("--teacher", "t.pt", "--teacher-method", "robal")
    its_cfg = ltsd.teacher_config(cfg)
    assert its_cfg.method == "robal"
    assert its_cfg.role == "student"  # whose counts are those of all of the data


@pytest.mark.parametrize("words", UNUSED)
def test_what_a_run_does_not_use_is_none(words):
    unused = UNUSED[words].split()
    cfg = config_of("--method", *words.split())
    assert differences(cfg, dict.fromkeys(unused)) == {}
    changed = ["--" + name.replace("_", "-") for name in unused if name in ("alpha", "tau", "beta")]
    for flag in changed:
        assert config_of("--method", *words.split(), flag, 3) == cfg


def test_the_teacher_of_a_run_is_pgd_at_on_the_balanced_set_with_settings_of_its_own():
    words = "--data cifar10 --alpha 5 --seed 2 --lr 0.2 --examples 3 --figures f"
    cfg = config_of(*words.split())
    want = dict(role="teacher", method="pgd-at", epochs=30, batch_size=32, gamma=25, alpha=None)
    assert differences(ltsd.teacher_config(cfg), want | dict(seed=2, lr=0.2, eps=8)) == {}


def test_a_teacher_on_all_of_the_data_is_the_run_of_the_baseline():
    words = ["--teacher-data", "full", "--teacher-method"]
    for method in ("at-bsl", "robal", "reat"):
        teacher = ltsd.teacher_config(config_of(*words, method))
        assert ltsd.run_path(teacher) == ltsd.run_path(config_of("--method", method))


OTHER_RUNS = """--ir 5;--method reat;--arch resnet8;--aug ra;--alpha 5;--tau 2;--gamma 2;--kd kl
    --teacher-method reat;--teacher-data full;--epochs 5;--teacher-epochs 5;--batch-size 5
    --teacher-batch-size 5;--lr 0.2;--milestones 0.5;--weight-decay 0;--momentum 0;--eps 5
    --step-size 5;--steps 5;--train-limit 500;--test-limit 500;--seed 5;--data cifar10"""


SAME_RUN = """--stage eval;--data-dir d;--eval-eps 5;--eval-step-size 5;--eval-steps 5
    --attacks pgd;--amp off;--amp bf16;--compile on;--examples 5;--figures f"""


def commands_in(text):
    return re.split(r";|\n *", text)


@pytest.mark.parametrize("words", commands_in(OTHER_RUNS))
def test_another_setting_is_another_run(words):
    assert ltsd.run_path(config_of(*words.split())) != ltsd.run_path(config_of())


@pytest.mark.parametrize("words", commands_in(SAME_RUN))
def test_what_may_differ_between_two_starts_is_the_same_run(words):
    assert ltsd.run_path(config_of(*words.split())) == ltsd.run_path(config_of())


def test_a_run_on_a_folder_of_images_belongs_to_the_folders_name(tmp_path):
    words = ["--data", "folder", "--data-dir"]
    places = [tmp_path / "a", tmp_path / "a" / ".." / "a", tmp_path / "b"]
    one, same, other = [ltsd.run_path(config_of(*words, place)) for place in places]
    assert one == same != other
    elsewhere = ltsd.run_path(config_of(*words, tmp_path / "disk" / "a"))
    assert elsewhere == one  # the same data on another machine
    assert one.name.startswith("folder-owncounts-ltsd-resnet18-seed0-")


# a command line, then what its one line names
MISTAKES = [
    ("--data imagenet", "--data", "'imagenet'", "synthetic"),
    ("--method frob", "--method", "'frob'", "at-bsl"), ("--method ltsd,", "--method", "''"),
    ("--epochs 1.5", "--epochs", "'1.5'"), ("--seed 0,x", "--seed", "'x'"),
    ("--seed", "--seed", "expected"), ("--ir 0.5", "--ir", "'0.5'", "1"),
    ("--eps nan", "--eps", "nan"), ("--alpha 1,inf", "--alpha", "inf"), ("--out=", "--out", "''"),
    ("--milestones 75", "--milestones", "'75'", "0.75,0.9"), ("--epoch 1", "--epoch"),
    ("--eps 300", "--eps", "300", "255"), ("--eval-eps 300", "--eval-eps", "300", "255"),
    ("--eps 0.031", "--eps 0.031", "255ths"), ("--step-size 0.007", "--step-size", "255ths"),
    ("--seed 0 1 2", "1", "lists take commas"), ("--amp fp16", "--amp fp16", "CUDA"),
    ("--official --method natural", "--official", "natural"),
    ("--official --method ltsd,trades --data tinyimagenet", "--official", "trades", "tinyimagenet"),
    ("--attacks pgd,fgsm", "--attacks", "fgsm"),
    ("--stage teacher --method trades", "--stage teacher", "trades"),
    ("--stage bench --method natural", "--stage bench", "ltsd"),
    ("--checkpoint x.pt", "--checkpoint x.pt", "--stage eval"),
    ("runs/a", "runs/a", "--stage report"), ("--overwrite", "--overwrite"),
    ("--device tpu", "--device tpu", "cpu"), ("--device cuda:99", "--device cuda:99"),
    ("--data synthetic --ir 1000", "--ir 1000", "classes"),
    ("--stage report nowhere", "nowhere", "--stage eval"),
    ("--data folder --data-dir none", "--data-dir none", "/CLASS"),
    ("--data synthetic --method at-bsl --stage eval", "best.pt", "train first"),
    ("--data synthetic --stage eval --checkpoint x.pt", "x.pt cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("row", MISTAKES, ids=[row[0] for row in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(row, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refusal(capsys, shlex.split(row[0]), *row[1:])
    assert len(line) <= 160


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config_of("--out=~/runs", "--data-dir=~/data", "--teacher=~/teacher.pt")
    assert [cfg.out, cfg.data_dir] == [str(tmp_path / "runs"), str(tmp_path / "data")]
    assert cfg.teacher == str(tmp_path / "teacher.pt")
    report = config_of("--stage", "report", "~/runs/a", "--figures=~/figures")
    assert report.runs == (str(tmp_path / "runs" / "a"),)
    assert report.figures == str(tmp_path / "figures")


@pytest.mark.parametrize("size", ["2", "two"])
def test_what_a_launcher_left_behind_is_one_line(size, capsys, monkeypatch):
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE=size).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refusal(capsys, ["--data", "synthetic"], size, "torchrun", "unset RANK")


def test_empty_words_of_a_launcher_mean_one_process(capsys, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert ltsd.main(["--stage", "theory", "--device", "cpu"]) == 0


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/full and pipes")
@pytest.mark.parametrize("screen", ["ascii", "a closed pipe", "a full disk", "none"])
def test_what_the_screen_cannot_take_ends_no_run(screen, monkeypatch):
    if screen == "ascii":
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    elif screen == "a closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        stream = open(writer, "w", encoding="utf-8")
    elif screen == "a full disk":
        stream = open("/dev/full", "w", encoding="utf-8")
    else:
        stream = None
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(2):
        ltsd.say("1.00 ± 0.10 of a folder \udcff")
    if screen == "ascii":
        assert stream.buffer.getvalue() == 2 * b"1.00 ? 0.10 of a folder ?\n"
    elif stream is not None:
        stream.close()  # as at the end of the process: nothing is left that cannot be written


@pytest.mark.parametrize(
    "capability, precision, compiled",
    [((6, 1), "off", False), ((7, 5), "fp16", True), ((8, 0), "bf16", True)],
)
@pytest.mark.parametrize("triton", ["installed", None])
def test_a_gpu_gets_what_it_is_fast_at(capability, precision, compiled, triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ltsd, "triton", triton)
    cfg = ltsd.resolve({})
    assert cfg.device == "cuda:0"
    assert cfg.amp == precision
    assert (cfg.compile != "off") == (compiled and triton is not None)
    asked = ltsd.resolve(dict(amp="off", compile="on"))
    assert asked.amp == "off"
    assert asked.compile == "on"


def test_too_little_memory_of_a_gpu_is_blamed_on_no_file():
    assert issubclass(torch.OutOfMemoryError, RuntimeError)  # as of weights that do not fit
    with pytest.raises(torch.OutOfMemoryError):
        with ltsd.blaming("state.pt does not fit", RuntimeError):
            raise torch.OutOfMemoryError("out of memory")


def test_too_little_memory_is_one_line_that_names_the_remedy(capsys, monkeypatch):
    def exhausted(cfg):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB\nof 8")

    monkeypatch.setattr(ltsd, "run_one", exhausted)
    refusal(capsys, ["--data", "synthetic"], "out of memory", "9 GiB", "smaller batches")


README = Path(ltsd.__file__).with_name("README.md").read_text(encoding="utf-8")


def commanded(line):
    """The Configs of a shell command that runs ltsd.py."""
    words = re.split(r"(?:^|[ /])ltsd\.py", line)[-1]
    return configs_of(*shlex.split(words, comments=True))


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"(?:python3?|torchrun)\b[^`\n]*[ /]ltsd\.py\b[^`\n]*", README)
    assert len(lines) >= 20
    for line in lines:
        assert "--help" in line or commanded(line)


FOUR = ["robal", "reat", "at-bsl", "ltsd"]


CIFAR10 = dict(data=["cifar10"], ir=[50])


FULL = dict(teacher_data=["full"], teacher_epochs=[100], teacher_batch_size=[128])


FIGURE = dict(figures=["figures"])


# what the runs of each command have that the command line without flags has not
ARTEFACTS = {
    "Table 1": CIFAR10 | dict(method=ALL, gamma=[25]),
    "Table 2": dict(method=ALL),
    "Table 3": dict(data=["tinyimagenet"], arch=["preactresnet18"], method=ALL),
    "Table 4": dict(method=FOUR, aug=["ra", "aua"]),
    "Table 5": dict(method=FOUR, ir=[5, 20, 50], gamma=[2.5, 10, 25]),
    "Table 6": dict(method=FOUR),
    "Table 7": CIFAR10 | dict(method=ALL, gamma=[25], arch=["wrn34-10"]),
    "Table 8": dict(method=ALL, arch=["wrn34-10"]),
    "Table 9": dict(method=[m for m in ALL if m not in ("ltsd", "natural")], epochs=[130]),
    "Table 10": dict(seed=[0, 1, 2, 3, 4]),
    "Figure 2": FIGURE | dict(stage=["theory"]),
    "Figure 4": FIGURE | dict(
        data=["cifar10"], ir=[1, 5, 10, 50, 100], method=["natural", "pgd-at"], eval_eps=[2],
        attacks=["clean,pgd"],
    ),
    "Figure 5": FIGURE | FULL | dict(teacher_method=["robal", "reat", "at-bsl"]),
    "Figures 6, 7: alpha": FIGURE | dict(alpha=[10, 20, 40, 80]),
    "Figures 6, 7: gamma": FIGURE | dict(gamma=[2, 5, 10, 20]),
}  # fmt: skip


def artefact(name):
    """The Configs of an artefact's command in the README's table."""
    (command,) = re.findall(rf"^\| {re.escape(name)} \| `(.*?)` \|", README, re.M)
    return commanded(command)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_the_command_of_each_artefact_has_the_papers_settings(name):
    usual = replace(config_of(), beta=6)  # ltsd has none
    found = {}
    for field in fields(ltsd.Config):
        values = {getattr(cfg, field.name) for cfg in artefact(name)} - {None}
        if values - {getattr(usual, field.name)}:
            found[field.name] = values
    assert found == {key: set(values) for key, values in ARTEFACTS[name].items()}


@pytest.mark.parametrize("name", ["Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 7"])
def test_the_papers_numbers_stand_beside_the_runs_of_its_tables(name):
    for cfg in artefact(name):
        assert cfg.method == "natural" or ltsd.paper_row(cfg, "best"), cfg.method


def test_the_report_of_figures_1_and_8_finds_the_runs_of_table_2_alone():
    (cfg,) = artefact("Figures 1, 8")
    (pattern,) = cfg.runs
    for name in ("Table 1", "Table 2", "Table 8"):
        for run in artefact(name):
            assert ltsd.run_path(run).match(pattern) == (name == "Table 2")


# A finder that prints what OMP_WAIT_POLICY is when torch is looked for.
SPY = f"""
import os, random, runpy, sys, warnings
class Spy:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Spy)
sys.path.insert(0, {os.path.dirname(ltsd.__file__)!r})
"""


IMPORTING = """
import numpy as np, torch, torchvision.transforms.v2
def state():
    return (dict(os.environ), torch.get_rng_state().tolist(), repr(np.random.get_state()),
            random.getstate(), torch.get_num_threads(), torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32, warnings.filters[:])
before = state()
import ltsd
assert state() == before
"""


AS_SCRIPT = f"""
sys.argv = ["x", "--eps=300"]
runpy.run_path({ltsd.__file__!r}, None, "__main__")
"""


def run_python(program, folder):
    variables = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", SPY + program]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_importing_changes_nothing(tmp_path):
    done = run_python(IMPORTING, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "None\n", "")


def test_as_a_script_threads_wait_passively_and_a_mistake_is_one_line(tmp_path):
    done = run_python(AS_SCRIPT, tmp_path)
    assert (done.returncode, done.stdout) == (2, "passive\n")
    assert done.stderr.count("\n") == 1 and "--eps 300" in done.stderr
    assert not list(tmp_path.iterdir())


# Training =========================================================================================
small_images = partial(ltsd.make_synthetic, 6, 1, size=16)


# 33 images in batches of 16, the last of them a single image
RUN = (
    "--data synthetic --ir 3 --steps 1 --eval-steps 2 --lr 0.02 --epochs 5 --batch-size 16 "
    "--teacher-epochs 2 --teacher-batch-size 8 --device cpu --amp off"
).split()


SHORT = "--epochs 2 --teacher-epochs 1 --attacks clean".split()


def launch(out, *words, stop=(None, 0)):
    """ltsd.main on RUN's settings and these; stop=(function, n): its n-th call is a Ctrl-C."""
    name, number = stop
    calls = []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltsd, "make_synthetic", small_images)
        if name:
            real = getattr(ltsd, name)
            patch.setattr(ltsd, name, counted)
        return ltsd.main([*RUN, "--out", str(out), *map(str, words)])


def run_in(out):
    """The one folder below --out with figures: a teacher's run has none."""
    (file,) = out.glob("*/results.json")
    return file.parent


def teacher_in(out):
    """The folder of the one teacher below --out."""
    (path,) = out.glob("*-teacher-*")
    return path


def spy(monkeypatch, name):
    """The list of a function's calls to come, each as (args, options)."""
    seen = []
    real = getattr(ltsd, name)

    def recorded(*args, **options):
        seen.append((args, options))
        return real(*args, **options)

    monkeypatch.setattr(ltsd, name, recorded)
    return seen


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def assert_same_weights(one, other):
    one = weights(one)
    other = weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def results(out):
    return json.loads((run_in(out) / "results.json").read_text())["evaluations"]


def assert_same_run(a, b):
    """The runs below two --out end with the same weights and figures."""
    assert results(a) == results(b)
    files = sorted(run_in(a).glob("*.pt"))
    assert len(files) >= 3  # best, last, state
    for file in files:
        if file.name != "state.pt":
            assert_same_weights(file, run_in(b) / file.name)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """--out with a finished run of the whole pipeline; not to be changed: copy it."""
    out = tmp_path_factory.mktemp("whole") / "runs"
    assert launch(out) == 0
    return out


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copy")


def test_the_learning_rate_drops_after_its_milestones():
    milestones = (0.75, 0.9)
    rates = {1: 0.1, 75: 0.1, 76: 0.01, 90: 0.01, 91: 0.001, 100: 0.001}
    for epoch, rate in rates.items():
        assert round(ltsd.lr_at(epoch, 100, 0.1, milestones), 9) == rate
    assert ltsd.lr_at(1, 1, 0.1, milestones) == 0.1  # one epoch is complete before any drop


def test_training_reseeds_no_generator_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", failing)  # it seeds all devices
    assert launch(tmp_path, *SHORT, "--method", "pgd-at", "--aug", "ra") == 0


@pytest.mark.parametrize(
    "milestones, epochs", [("0.75,0.9", [4, 5]), ("0.5", [3, 4, 5]), ("1", [5])]
)
def test_the_best_epoch_is_looked_for_after_the_first_drop_of_the_rate(
    milestones, epochs, tmp_path
):
    assert launch(tmp_path, "--method", "pgd-at", "--milestones", milestones) == 0
    log = (run_in(tmp_path) / "log.txt").read_text()
    found = re.findall(r"^student +(\d)/5 .* test clean .* pgd ", log, re.M)
    assert [int(epoch) for epoch in found] == epochs


@pytest.mark.parametrize("method, name", [("at-bsl", "pgd"), ("natural", "clean")])
def test_best_is_the_first_epoch_of_the_highest_score(method, name, tmp_path, monkeypatch):
    scores = iter([10.0, 30.0, 30.0, 20.0])

    def select(cfg, data, model):
        return {"clean": 0.0, "pgd": 0.0} | {name: next(scores)}

    monkeypatch.setattr(ltsd, "select", select)
    words = ["--method", method, "--milestones", "0.25", "--attacks", "clean"]
    assert launch(tmp_path, *words) == 0
    best, last = results(tmp_path)
    assert (best["epoch"], last["epoch"]) == (3, 5)


def test_training_says_how_long_it_takes(tmp_path, capsys):
    assert launch(tmp_path, *SHORT, "--method", "natural", "--batch-size", 4) == 0
    assert capsys.readouterr().out.count("student: this training takes about 0:") == 1


def hinge(batch):
    logits = batch.student(batch.x_adv)
    return F.multi_margin_loss(logits, batch.y) + batch.cfg.beta * logits.norm(), logits


RESUMED = [
    *ALL, "margin --beta 0.1", "reat --aug ra --batch-size 11", "ltsd --kd kl --aug aua",
    "ltsd --teacher-data full --teacher-method robal",
]  # fmt: skip


@pytest.mark.parametrize("words", RESUMED)
def test_a_stopped_run_ends_bit_identical(words, tmp_path, capsys, monkeypatch):
    """Every method, and one added from outside; also a set of whole batches (33 images of 11)."""
    monkeypatch.setitem(ltsd.METHODS, "margin", ltsd.Method(hinge, init="uniform"))
    words = [*SHORT, "--method", *words.split()]
    stopped = 3 if "ltsd" in words else 2  # its teacher's epoch comes first
    assert launch(tmp_path / "a", *words) == 0
    assert launch(tmp_path / "b", *words, stop=("augment", stopped)) == 130
    one_line(capsys, "stopped", "the same command goes on")
    assert launch(tmp_path / "b", *words) == 0
    assert "student: going on after epoch 1" in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b")
    log = (run_in(tmp_path / "b") / "log.txt").read_text()
    assert len(re.findall("^student +[12]/2", log, re.M)) == 2  # no epoch twice


def test_a_run_stopped_before_any_of_its_writes_ends_bit_identical(tmp_path):
    assert launch(tmp_path / "whole", *SHORT) == 0
    for number in range(1, 100):
        out = tmp_path / str(number)
        if launch(out, *SHORT, stop=("write_atomic", number)) == 0:
            break
        assert launch(out, *SHORT) == 0
        assert_same_run(tmp_path / "whole", out)
    assert number > 12


def environment(**more):
    """What a process needs to round as this one and to find the same ltsd.py."""
    threads = str(torch.get_num_threads())
    path = os.path.dirname(ltsd.__file__)
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path, **more}


# ltsd.py on small images, in a process of its own
PROGRAM = """
import sys, ltsd
ltsd.make_synthetic = ltsd.partial(ltsd.make_synthetic, 6, 1, size=16)
sys.exit(ltsd.main(sys.argv[1:]))
"""


def start(program, *words, **variables):
    command = [sys.executable, "-c", program, *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=environment(**variables), **pipes)


def epochs_in(out):
    """How many epochs the logs below --out tell of."""
    logs = "".join(path.read_text() for path in out.glob("*/log.txt"))
    return len(re.findall(r"^(?:teacher|student) +\d+/\d+ ", logs, re.M))


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_process_killed_again_and_again_ends_bit_identical(whole_run, tmp_path):
    """First by Ctrl-C, in one line, then by SIGKILL at any moment."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job's children ignore it
    dice = random.Random(1)
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        before = epochs_in(tmp_path)
        with start(PROGRAM, *RUN, "--out", tmp_path) as process:
            while epochs_in(tmp_path) <= before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.05))
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        if number == signal.SIGINT:
            assert process.returncode == 130
            assert (
                said.startswith("ltsd: stopped; the same command goes on") and said.count("\n") == 1
            )
        else:
            assert process.returncode == -signal.SIGKILL, said
    assert launch(tmp_path) == 0
    assert_same_run(whole_run, tmp_path)


@pytest.mark.skipif(ltsd.fcntl is None, reason="no locks here")
def test_a_second_process_waits_for_the_folder_and_says_so(copied_run):
    path = run_in(copied_run)
    log = (path / "log.txt").read_text()
    with ltsd.hold_folder(path):
        process = start(PROGRAM, *RUN, "--out", copied_run)
        said = process.stdout.readline()
        assert said == f"{path} is in use by another process: waiting for it to end\n"
        assert (path / "log.txt").read_text() == log
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "best (epoch 4)" in said


@pytest.mark.parametrize("name, number", [("state.pt", 2), ("best.pt", 1), ("results.json", 2)])
def test_a_full_disk_is_named_and_costs_no_saved_epoch(
    name, number, whole_run, tmp_path, capsys, monkeypatch
):
    replace = os.replace
    writes = []

    def full(source, target):
        writes.append(Path(target).name)
        if writes.count(name) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert launch(tmp_path) == 2
    one_line(capsys, "cannot write", name, "No space left on device", "--out")
    assert launch(tmp_path) == 0
    assert_same_run(whole_run, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_disk_that_is_full_for_the_log_is_named(tmp_path, capsys):
    folder = ltsd.run_path(config_of(*RUN, "--method", "at-bsl", "--out", tmp_path))
    folder.mkdir()
    (folder / "log.txt").symlink_to("/dev/full")
    assert launch(tmp_path, "--method", "at-bsl") == 2
    one_line(capsys, "cannot write", "log.txt", "No space left on device")


def test_divergence_is_named_and_what_was_saved_stays(whole_run, tmp_path, capsys, monkeypatch):
    row = ltsd.METHODS["ltsd"]
    losses = []

    def diverging(batch):
        loss, logits = row.loss(batch)
        losses.append(loss)
        if len(losses) == 8:  # the second of epoch 3's three
            loss = loss * math.nan
        return loss, logits

    with monkeypatch.context() as patch:
        patch.setitem(ltsd.METHODS, "ltsd", replace(row, loss=diverging))
        assert launch(tmp_path) == 2
    one_line(capsys, "the loss was not finite", "student, epoch 3", "--lr")
    assert launch(tmp_path) == 0
    assert_same_run(whole_run, tmp_path)


def assert_named(path, content, remedy, out, capsys):
    capsys.readouterr()
    path.write_bytes(content)
    assert launch(out) == 2
    one_line(capsys, str(path), remedy)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("state.pt", "remove it to train from the start"),
        ("results.json", "restore it, or remove the folder"),
        ("config.json", "restore it, or remove the folder"),
        ("best.pt", ""),
        ("teacher.pt", ""),
    ],
)
def test_a_damaged_file_is_named_in_one_line(name, remedy, copied_run, capsys):
    path = run_in(copied_run) / name
    half = path.read_bytes()[:300]
    if name in ("state.pt", "teacher.pt"):
        (path.parent / "last.pt").unlink()  # else there is nothing to train
    for content in (b"[1]", half):
        assert_named(path, content, remedy, copied_run, capsys)


def test_a_state_of_another_network_is_named(copied_run, tmp_path, capsys):
    assert launch(tmp_path / "b", *SHORT, "--method", "robal") == 0
    path = run_in(copied_run)
    (path / "last.pt").unlink()
    other = (run_in(tmp_path / "b") / "state.pt").read_bytes()
    assert_named(path / "state.pt", other, "remove it", copied_run, capsys)


# The fast path ====================================================================================
def graph_double(fault="", part=""):
    """What stands in for capture_cuda_graph: it replays by calling the function on the captured
    buffers. part: the attack or the step, whose graph has the fault."""
    captures = []

    def capture(function, buffers):
        its_fault = fault if part == ("step" if len(buffers) == 5 else "attack") else ""
        captures.append(len(buffers))
        replays = []
        captured = [buffer.clone() for buffer in buffers]
        result = [tensor.clone() for tensor in function(*buffers)]  # warming up: a step too many
        if its_fault == "raises in capture":
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay():
            replays.append(None)
            if its_fault == "raises at the second replay" and len(replays) == 2:
                raise RuntimeError("an illegal memory access")
            if its_fault != "updates nothing":
                inputs = captured if its_fault == "replays stale inputs" else buffers
                for tensor, new in zip(result, function(*inputs), strict=True):
                    tensor.copy_(new)

        return replay, result

    return capture, captures


def speed_up_on_cpu(frozen, *sizes):
    """The double of FrozenCopy.speed_up: graphs as on CUDA, no compiler."""
    frozen.compiled = dict.fromkeys(sizes, frozen.net)
    frozen.graphs = {}
    return frozen


def uncompiled(network, **options):
    """The double of torch.compile: another object that computes the same."""
    return partial(network)


def train_in(path, compile, method="at-bsl"):
    """Two epochs of three batches of 11; returns (the weights, the lines of the log)."""
    words = [*RUN, "--method", method, "--epochs", 2, "--batch-size", 11, "--attacks", "clean"]
    cfg = replace(config_of(*words), compile=compile)
    lines = []
    path.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltsd, "make_synthetic", small_images)
        data = ltsd.load_data(cfg)
    ltsd.with_fallback(ltsd.train, cfg, data, path, lines.append)
    return weights(path / "last.pt"), lines


@pytest.fixture(scope="session")
def plainly_trained(tmp_path_factory):
    """The weights of a training without compiler and graphs."""
    return train_in(tmp_path_factory.mktemp("plain") / "run", "off")[0]


def assert_close_weights(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """A function that puts a double of CUDA graphs in place."""
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(ltsd.FrozenCopy, "speed_up", speed_up_on_cpu)

    def put(*fault):
        capture, captures = graph_double(*fault)
        monkeypatch.setattr(ltsd, "capture_cuda_graph", capture)
        return captures

    return put


def test_captured_graphs_train_as_the_plain_steps(graphs_on_cpu, plainly_trained, tmp_path):
    captures = graphs_on_cpu()
    got, lines = train_in(tmp_path / "run", "auto")
    assert captures == [3, 5]  # attack and step, each once
    assert "uncompiled" not in "".join(lines)
    assert_close_weights(got, plainly_trained)


GRAPH_FAULTS = (
    "replays stale inputs", "updates nothing", "raises in capture", "raises at the second replay",
)  # fmt: skip


@pytest.mark.parametrize("part", ["attack", "step"])
@pytest.mark.parametrize("fault", GRAPH_FAULTS)
def test_a_graph_that_fails_is_found_out_and_costs_nothing(
    fault, part, graphs_on_cpu, plainly_trained, tmp_path
):
    graphs_on_cpu(fault, part)
    got, lines = train_in(tmp_path / "run", "auto")
    (line,) = [line for line in lines if "uncompiled" in line]
    assert "(RuntimeError: " in line
    assert_close_weights(got, plainly_trained)


@pytest.mark.parametrize("got, kept", [(7.0, True), (8.0, False)])
def test_a_graph_may_be_twice_as_far_off_as_two_plain_calls_are(got, kept, monkeypatch):
    plain = iter([0.0, 3.0])
    counter = torch.zeros(())
    result = [torch.tensor(got)]
    monkeypatch.setattr(ltsd, "capture_cuda_graph", lambda *arguments: (lambda: None, result))

    def function(x):
        return [torch.tensor(next(plain))]

    def distance(wanted, got):
        return abs(got[0] - wanted[0])

    graphs = {}
    outcome = pytest.raises(RuntimeError, match="differs")
    if kept:
        outcome = contextlib.nullcontext()
    with outcome:
        ltsd.call_graphed(graphs, "key", function, [counter], distance, lambda: [counter])
    assert len(graphs) == kept


class CannotBeCompiled(nn.Module):
    """A double of torch.compile, which fails when the compiled network is first called."""

    def __init__(self, network, **options):
        super().__init__()

    def forward(self, x):
        raise RuntimeError("no compiler")


def test_where_nothing_can_be_compiled_a_run_ends_as_without_the_compiler(
    whole_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", CannotBeCompiled)
    resolve = ltsd.resolve
    monkeypatch.setattr(ltsd, "resolve", lambda wanted: replace(resolve(wanted), compile="auto"))
    monkeypatch.setattr(ltsd, "EVAL_BATCH", 10)  # all images of the test set
    assert launch(tmp_path) == 0
    log = (run_in(tmp_path) / "log.txt").read_text()
    assert log.count("again, uncompiled") == 1 + 3  # the training, each checkpoint
    assert_same_run(whole_run, tmp_path)


def test_with_compile_on_a_graph_that_fails_ends_the_training(graphs_on_cpu, tmp_path):
    graphs_on_cpu("raises in capture", "step")
    with pytest.raises(ltsd.UserError, match="compiling fails here.*stream is capturing"):
        train_in(tmp_path / "run", "on")


def test_an_overflow_in_float32_is_not_tried_again():
    def overflowing(*arguments):
        raise OverflowError("int too large")

    with pytest.raises(OverflowError, match="int too large"):
        ltsd.with_fallback(overflowing, config_of("--amp", "off"), None, None, failing)


def test_an_epoch_that_overflows_float16_is_done_again_in_float32(tmp_path, monkeypatch):
    build = ltsd.build_model

    def huge(*args):
        model = build(*args)
        model.conv1.weight.data.mul_(1e9)  # until batch norm has seen it
        return model

    monkeypatch.setattr(ltsd, "build_model", huge)
    said = []
    cfg = config_of(*RUN, "--method", "pgd-at")
    monkeypatch.setattr(ltsd, "make_synthetic", small_images)
    data = ltsd.load_data(cfg)
    for amp in ("off", "fp16"):
        changed = replace(cfg, amp=amp)  # refused by the command line: a CPU is slow
        ltsd.with_fallback(ltsd.train, changed, data, tmp_path / amp, said.append)
    assert sum("overflows" in line for line in said) == 1
    assert_same_weights(tmp_path / "off" / "last.pt", tmp_path / "fp16" / "last.pt")


def test_a_captured_attack_reads_the_newest_inputs_and_weights(graphs_on_cpu):
    """Alike in shapes, the settings tell two graphs apart; an odd batch runs without one."""
    captures = graphs_on_cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ltsd.build_model("resnet8", 10)
    eager = ltsd.FrozenCopy(model)
    graphed = ltsd.FrozenCopy(model).speed_up(4)
    found = []
    for number, (steps, size) in enumerate([(1, 4), (1, 4), (2, 4), (1, 4), (1, 3)]):
        x = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        y = (torch.arange(size) + number) % 10
        attacked = []
        for net in (eager, graphed):
            noise = torch.Generator().manual_seed(number)
            threat = dict(eps=8 / 255, step_size=2 / 255, steps=steps, generator=noise)
            net.refresh()
            attacked.append(ltsd.pgd_attack(net, x, y, **threat))
        assert not torch.equal(attacked[0], x)
        found.append(attacked)
        model.conv1.weight.data.mul_(-1)
    for attacked in found:  # no later attack has overwritten it
        assert torch.equal(*attacked)
    assert captures == [3, 3]


def test_reats_weights_stay_away_where_float16_would_lose_gradients():
    frozen = ltsd.FrozenCopy(ltsd.build_model("resnet8", 3), torch.float16)
    counts = torch.tensor([9.0, 6.0, 3.0])
    assert ltsd.METHODS["reat"].aux(frozen, None, counts, counts) is None


@pytest.mark.skipif(ltsd.triton is None, reason="Triton is not installed")
def test_where_triton_builds_no_kernel_plain_pytorch_takes_the_step(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(ltsd, "triton", ltsd.triton)  # which is put back afterwards
    monkeypatch.setattr(ltsd, "_pgd_step_kernel", "no kernel")
    ltsd.try_kernel("cpu")
    assert "plain PyTorch takes the attack's step" in capsys.readouterr().out
    x = torch.full((2,), 0.5)
    assert ltsd.pgd_step(x.clone(), x, x, 0.25, 0.25).tolist() == [0.75, 0.75]


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_torch_compile_gives_the_attack_and_the_step_of_the_plain_path(monkeypatch):
    """On a network of one block, since compiling is what takes the time."""
    monkeypatch.setitem(ltsd.ARCHS, "tiny", (ltsd.BasicBlock, (1,), (8, 8), "layer{}"))
    words = (
        "--data synthetic --arch tiny --method at-bsl --batch-size 4 --steps 2 --amp off".split()
    )
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(4)
    found = []
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for compile in ("off", "on"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ltsd.build_model("tiny", 10)
        trainer = ltsd.Trainer(config_of(*words, "--compile", compile), model, [9] * 10)
        noise = torch.Generator().manual_seed(0)
        x_adv = trainer.attack(x, y, noise)
        loss, _ = trainer.step(x, x_adv, y, 0.0, 0.1)
        found.append((x_adv, loss, model.state_dict()))
    plain, compiled = found
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert (plain[0] != compiled[0]).float().mean() < 0.01
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-4, atol=1e-5)
    assert_close_weights(compiled[2], plain[2])


# Several processes ================================================================================
# Checks after each step that the weights agree, and that the gradient is the mean of the shares'.
RANK_PROGRAM = """
import copy, sys, torch, ltsd

outer_step, close = ltsd.outer_step, torch.testing.assert_close

def checked_step(row, batch, model, *others):
    nets = [copy.deepcopy(model).train() for _ in range(2)]
    result = outer_step(row, batch, model, *others)
    one, two = ltsd.gather(model.state_dict())
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
    shares = ltsd.gather((batch.x, batch.x_adv, batch.y))
    assert shares[0][0].shape == shares[1][0].shape and not torch.equal(shares[0][0], shares[1][0])
    for net, (x, x_adv, y) in zip(nets, shares):
        row.loss(ltsd.replace(batch, student=net, x=x, x_adv=x_adv, y=y))[0].backward()
    for p, a, b in zip(model.parameters(), *(net.parameters() for net in nets)):
        close(p.grad, (a.grad + b.grad) / 2, rtol=1e-5, atol=1e-6)
    for p, a, b in zip(model.buffers(), *(net.buffers() for net in nets)):
        close(p, (a + b) / 2 if p.is_floating_point() else a)
    return result

ltsd.outer_step = checked_step
ltsd.make_synthetic = ltsd.partial(ltsd.make_synthetic, 24, 2, size=16)
ltsd.evaluate.__kwdefaults__["batch_size"] = 6
ltsd.autoattack.__kwdefaults__ |= dict(iterations=3, queries=10, targets=2)
sys.exit(ltsd.main(sys.argv[1:]))
"""


def start_ranks(*words):
    """Two processes as torchrun starts them; returns their (exit code, stdout, stderr)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    ranks = []
    for rank in "01":
        ranks.append(start(RANK_PROGRAM, *words, RANK=rank, LOCAL_RANK=rank, **group))
    try:
        said = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, *streams) for rank, streams in zip(ranks, said)]


def quick_autoattack(monkeypatch):
    budget = ltsd.autoattack.__kwdefaults__ | dict(iterations=3, queries=10, targets=2)
    monkeypatch.setattr(ltsd.autoattack, "__kwdefaults__", budget)


def figures(record):
    """A record of results.json without the machine."""
    return {key: value for key, value in record.items() if key != "evaluated_on"}


def test_two_ranks_step_with_the_mean_gradient_and_evaluate_as_one_process(
    tmp_path, capsys, monkeypatch
):
    words = [*RUN, *"--epochs 4 --eps 1 --batch-size 32 --lr 0.1 --teacher-batch-size 32".split()]
    words += ["--attacks", "clean,pgd,aa", "--eval-eps", 2, "--out", tmp_path]
    (code, said, errors), (other_code, nothing, other_errors) = start_ranks(*words)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "best (epoch" in said and not nothing
    two = results(tmp_path)
    assert two[0]["evaluated_on"]["processes"] == 2
    assert not list(tmp_path.glob("*/aa*.pt"))
    (run_in(tmp_path) / "results.json").write_text("{}")
    monkeypatch.setitem(ltsd.evaluate.__kwdefaults__, "batch_size", 6)
    quick_autoattack(monkeypatch)
    monkeypatch.setattr(ltsd, "make_synthetic", partial(ltsd.make_synthetic, 24, 2, size=16))
    assert ltsd.main([*map(str, words), "--stage", "eval"]) == 0
    assert "going on with 1 processes, begun with 2" in capsys.readouterr().out
    one = results(tmp_path)
    assert [figures(record) for record in one] == [figures(record) for record in two]
    assert 0 < one[-1]["aa"] < one[-1]["clean"]


def test_a_rank_without_a_batch_takes_part_in_an_evaluation(monkeypatch):
    monkeypatch.setattr(ltsd, "RANK", 1)
    monkeypatch.setattr(ltsd, "WORLD", 2)
    monkeypatch.setattr(ltsd, "gather", lambda value: [torch.ones(8, dtype=torch.bool), value])
    budget = dict(attacks=("clean", "pgd", "aa"), steps=1)
    scores = ltsd.evaluate(ltsd.build_model("resnet8", 3), U8, Y, **budget)
    assert scores["clean"] == scores["pgd"] == scores["aa"] == 100


@pytest.mark.parametrize("flag", ["--batch-size", "--teacher-batch-size"])
def test_a_batch_that_two_ranks_cannot_share_is_refused(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltsd, "WORLD", 2)
    assert launch(tmp_path / "runs", flag, 15) == 2
    one_line(capsys, "batch size 15", "multiple of 2")
    assert not (tmp_path / "runs").exists()
    config_of("--stage", "eval", flag, 15)  # an evaluation has other batches


# Runs and results =================================================================================
def test_stages_run_one_by_one_as_at_once(whole_run, tmp_path):
    for stage in ("teacher", "train", "eval"):
        assert launch(tmp_path, "--stage", stage) == 0
    assert_same_run(whole_run, tmp_path)


def test_an_evaluation_scores_what_is_there(tmp_path):
    assert launch(tmp_path, "--stage", "teacher") == 0
    assert launch(tmp_path, "--stage", "eval") == 0
    assert [record["checkpoint"] for record in results(tmp_path)] == ["teacher"]


def test_what_is_done_is_not_done_again(copied_run, capsys, monkeypatch):
    trained = spy(monkeypatch, "train")
    evaluated = spy(monkeypatch, "evaluate")
    capsys.readouterr()
    assert launch(copied_run) == 0
    assert (trained, evaluated) == ([], [])
    assert "best (epoch 4)" in capsys.readouterr().out


def test_every_checkpoint_of_a_run_names_its_classes(whole_run):
    for name in ("teacher", "best", "last", "state"):
        content = ltsd.read_checkpoint(run_in(whole_run) / f"{name}.pt")
        assert content["classes"] == [f"grating {i}" for i in range(10)]


def test_a_runs_folder_holds_all_that_it_needs(whole_run):
    names = {path.name for path in run_in(whole_run).iterdir()}
    models = {"teacher.pt", "best.pt", "last.pt", "state.pt"}
    assert names == models | {"config.json", "log.txt", "results.json", "report.md"}
    config = json.loads((run_in(whole_run) / "config.json").read_text())
    assert config["classes"]["counts"] == [6, 5, 4, 4, 3, 3, 2, 2, 2, 2]
    assert config["classes"]["tail"] == [9]
    assert config["environment"]["torch"] == torch.__version__


def test_a_teacher_is_a_run_that_others_share_and_take_a_copy_of(tmp_path, monkeypatch):
    trained = spy(monkeypatch, "train")
    assert launch(tmp_path, *SHORT, "--alpha", "1,2") == 0
    assert launch(tmp_path, *SHORT, "--alpha", "3", "--kd", "kl") == 0
    roles = [arguments[0].role for arguments, _ in trained]
    assert roles == ["teacher", "student", "student", "student"]
    copies = list(tmp_path.glob("*-ltsd-*/teacher.pt"))
    assert len(copies) == 3
    for copied in copies:
        assert_same_weights(copied, teacher_in(tmp_path) / "last.pt")


def test_a_run_with_its_copy_of_the_teacher_needs_the_teachers_folder_no_more(copied_run):
    before = results(copied_run)
    shutil.rmtree(teacher_in(copied_run))
    (run_in(copied_run) / "last.pt").unlink()
    assert launch(copied_run) == 0
    assert results(copied_run) == before and not list(copied_run.glob("*-teacher-*"))


def test_a_teacher_on_all_of_the_data_is_trained_once_as_a_baseline(tmp_path, monkeypatch):
    words = "--epochs 1 --batch-size 8 --teacher-epochs 1 --attacks clean".split()
    assert launch(tmp_path, *words, "--method", "at-bsl") == 0
    baseline = run_in(tmp_path)
    trained = spy(monkeypatch, "train")
    teacher = ["--teacher-data", "full", "--teacher-method", "at-bsl"]
    assert launch(tmp_path, *words, *teacher) == 0
    assert [arguments[0].method for arguments, _ in trained] == ["ltsd"]
    (copied,) = tmp_path.glob("*-ltsd-*/teacher.pt")
    assert_same_weights(copied, baseline / "last.pt")


def test_a_given_teacher_is_copied_and_not_exchanged(whole_run, tmp_path, capsys):
    given = run_in(whole_run) / "teacher.pt"
    assert launch(tmp_path, *SHORT, "--teacher", given) == 0
    assert_same_weights(given, run_in(tmp_path) / "teacher.pt")
    assert not list(tmp_path.glob("*-teacher-*"))
    assert launch(tmp_path, *SHORT, "--teacher", run_in(whole_run) / "last.pt") == 2
    one_line(capsys, "teacher.pt differs from", "--out")


def brighten(monkeypatch, part):
    """From here on the small images of one part are a little brighter."""
    data = small_images()
    images = getattr(data, part)
    other = replace(data, **{part: images + (images < 255)})
    monkeypatch.setattr(sys.modules[__name__], "small_images", lambda: replace(other))


def test_other_training_images_are_refused(copied_run, capsys, monkeypatch):
    brighten(monkeypatch, "train_images")
    assert launch(copied_run) == 2
    one_line(capsys, "training images", "choose another --out")


def test_results_are_flat_records(whole_run):
    records = results(whole_run)
    assert [record["checkpoint"] for record in records] == ["teacher", "best", "last"]
    assert [record["epoch"] for record in records] == [2, 4, 5]
    what = {"checkpoint", "epoch", "weights", "test_images", "eps", "steps", "step_size"}
    kinds = ("", "tail_", "class_")
    scores = {kind + attack for kind in kinds for attack in ("clean", "pgd")}
    for record in records:
        assert record.keys() == what | scores | {"evaluated_on"}
        assert (record["eps"], record["steps"], record["step_size"]) == (8, 2, 2)
        assert record["clean"] == pytest.approx(np.mean(record["class_clean"]))
        assert record["tail_clean"] == record["class_clean"][9]
        assert record["evaluated_on"]["amp"] == "off"


def test_best_and_last_are_scored_once_where_they_are_one(copied_run, monkeypatch):
    path = run_in(copied_run)
    shutil.copy(path / "best.pt", path / "last.pt")
    (path / "results.json").unlink()
    evaluated = spy(monkeypatch, "evaluate")
    assert launch(copied_run, "--stage", "eval") == 0
    assert len(evaluated) == 2
    _, best, last = results(copied_run)
    assert last == best | dict(checkpoint="last")


# the teacher's row always has clean and PGD, as in Table 6
EVALUATIONS = [  # another start of the same run, and how many checkpoints it scores
    ("--eval-eps 2", 3), ("--eval-eps 2", 0), ("--eval-steps 3 --attacks clean", 3),
    ("--eval-steps 3", 2), ("--eval-step-size 1", 3), ("", 0),
]  # fmt: skip


def test_a_record_belongs_to_a_threat(copied_run, monkeypatch):
    before = results(copied_run)
    evaluated = spy(monkeypatch, "evaluate")
    for words, count in EVALUATIONS:
        del evaluated[:]
        assert launch(copied_run, "--stage", "eval", *words.split()) == 0
        assert len(evaluated) == count, words
    found = results(copied_run)
    assert len(found) == 12  # three checkpoints, four threats
    for record in before:
        assert record in found


def test_a_record_belongs_to_weights_and_test_images(copied_run, monkeypatch):
    path = run_in(copied_run)
    shutil.copy(path / "teacher.pt", path / "last.pt")
    assert launch(copied_run, "--stage", "eval") == 0
    teacher, _, last = results(copied_run)
    assert (last["weights"], last["clean"]) == (teacher["weights"], teacher["clean"])
    evaluated = spy(monkeypatch, "evaluate")
    brighten(monkeypatch, "test_images")
    assert launch(copied_run, "--stage", "eval") == 0
    assert len(evaluated) == 2  # the teacher is the last one, too


def test_an_interrupted_autoattack_goes_on(copied_run, tmp_path, monkeypatch):
    """The teacher has no AutoAttack; best and last, here the same weights, are attacked once."""
    path = run_in(copied_run)
    shutil.copy(path / "best.pt", path / "last.pt")
    other = shutil.copytree(copied_run, tmp_path / "other")
    words = ["--stage", "eval", "--attacks", "clean,pgd,aa"]
    quick_autoattack(monkeypatch)
    attacks = spy(monkeypatch, "run_attack")
    assert launch(other, *words, stop=("run_attack", 3)) == 130
    assert len(list(run_in(other).glob("aa*.pt"))) == 1
    assert launch(other, *words[:2], "--attacks", "clean") == 0  # which leaves it alone
    assert launch(other, *words) == 0
    assert [arguments[0] for arguments, _ in attacks] == list(ltsd.AUTOATTACK)
    assert launch(copied_run, *words) == 0
    assert results(other) == results(copied_run)
    assert not list(run_in(other).glob("aa*.pt"))
    teacher, best, last = results(other)
    assert "aa" not in teacher and last == best | dict(checkpoint="last")
    assert best["aa"] <= best["pgd"] and len(best["class_aa"]) == 10


def test_autoattack_begins_again_where_its_file_is_damaged(copied_run, monkeypatch):
    words = ["--stage", "eval", "--attacks", "aa"]
    quick_autoattack(monkeypatch)
    assert launch(copied_run, *words, stop=("run_attack", 2)) == 130
    (file,) = run_in(copied_run).glob("aa*.pt")
    file.write_bytes(b"half")
    assert launch(copied_run, *words) == 0
    assert not file.exists()


def test_a_foreign_checkpoint_is_scored_in_a_folder_of_its_own(whole_run, tmp_path):
    path = tmp_path / "theirs.pt"
    known = results(whole_run)[0]
    theirs = weights(run_in(whole_run) / "teacher.pt")
    torch.save({"net": {f"module.{name}": tensor for name, tensor in theirs.items()}}, path)
    words = ["--stage", "eval", "--method", "pgd-at", "--checkpoint", path]
    assert launch(tmp_path / "runs", *words) == 0
    (found,) = results(tmp_path / "runs")
    assert found == known | dict(checkpoint=str(path), epoch=None)
    assert f"| {path}" in (run_in(tmp_path / "runs") / "report.md").read_text()


def test_a_network_of_normalised_images_is_scored_with_mean_and_std(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltsd, "make_synthetic", small_images)
    path = tmp_path / "theirs.pt"
    mean, std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    torch.manual_seed(0)
    theirs = ltsd.build_model("resnet8", 10)
    torch.save(theirs.state_dict(), path)
    theirs.normalize = ltsd.Normalize(mean, std)
    given = ["--mean", "0.5,0.4,0.3", "--std", "0.1,0.2,0.3"]
    words = ["--stage", "eval", "--method", "pgd-at", "--checkpoint", path]
    assert launch(tmp_path / "runs", *words) == 0
    assert "near chance" in capsys.readouterr().out  # it has learned nothing
    assert launch(tmp_path / "runs", *words, *given) == 0  # another network: scored anew
    (found,) = results(tmp_path / "runs")
    data = ltsd.load_data(config_of(*RUN, "--method", "pgd-at"))
    options = dict(tail=[9], steps=2, batch_size=ltsd.EVAL_BATCH)
    want = ltsd.evaluate(theirs.eval(), data.test_images, data.test_labels, **options)
    assert {name: found[name] for name in want} == want
    for wrong in ("--mean 0.5,0.4,0.3", "--mean 0.5 --std 1,1,1", "--mean 0,0,0 --std 1,0,1"):
        assert launch(tmp_path / "other", *words, *wrong.split()) == 2
        one_line(capsys, "--mean", "--std", "three numbers")


def test_a_folder_of_images_goes_the_whole_way_and_shows_examples(tmp_path):
    place = picture_folder(tmp_path / "images", {"cat": 5, "dog": 9})
    words = ["--data", "folder", "--data-dir", place, "--ir", 3, "--image-size", 16]
    words += ["--arch", "resnet8", "--examples", 3]
    assert launch(tmp_path / "runs", *SHORT, *words) == 0
    path = run_in(tmp_path / "runs")
    assert json.loads((path / "config.json").read_text())["classes"]["names"] == ["dog", "cat"]
    assert "| folder IR 3 resnet8 ltsd seed 0 | best" in (path / "report.md").read_text()
    assert Image.open(path / "examples-best.png").size > (3 * 3 * 16, 16)


# Report and figures ===============================================================================
def test_the_papers_table_has_every_row_once():
    lines = [line.split() for line in ltsd.PAPER.splitlines()]
    assert len({tuple(line[1:5]) for line in lines}) == len(lines) == 61


@pytest.mark.parametrize(
    "line", ltsd.PAPER.splitlines(), ids=lambda line: "-".join(line.split()[:5])
)
def test_each_row_of_the_paper_is_found_by_its_settings(line):
    _, data, ir, arch, label, *numbers = line.split()
    method, _, aug = label.replace("teacher", "ltsd").partition("+")
    words = ["--data", data, "--ir", ir, "--arch", arch, "--method", method, "--aug", aug or "none"]
    cfg = config_of(*words)
    checkpoints = {"best": numbers[:5], "last": numbers[5:]}
    if label == "teacher":
        checkpoints = {"teacher": numbers[:5]}
    for name, cells in checkpoints.items():
        want = [float(cell) for cell in cells if cell != "-"]
        assert list(ltsd.paper_row(cfg, name).values()) == want


def test_the_paper_has_no_row_for_a_folder_with_its_own_counts():
    assert ltsd.paper_row(config_of("--data", "folder"), "best") == {}


def test_a_row_of_the_paper_has_its_columns():
    want = dict(clean=47.22, pgd=21.82, aa=18.53, tail_clean=37.9, tail_pgd=17.6)
    assert ltsd.paper_row(config_of(), "last") == want


def test_any_value_of_what_the_paper_leaves_open_has_its_numbers():
    cfg = config_of(*"--alpha 80 --tau 2 --seed 3 --kd kl --amp off".split())
    assert ltsd.paper_row(cfg, "best") == ltsd.paper_row(config_of(), "best") != {}


OTHER_SETTINGS = """--eps 2;--epochs 130;--train-limit 200;--gamma 1;--teacher-data full;--lr 0.2
    --eval-steps 10;--eval-eps 2;--eval-step-size 1;--ir 11;--milestones 0.5;--teacher-epochs 3
    --data synthetic;--method natural;--teacher t.pt"""


@pytest.mark.parametrize("words", commands_in(OTHER_SETTINGS))
def test_the_papers_numbers_stand_beside_its_own_settings_only(words):
    cfg = config_of(*words.split())
    assert ltsd.paper_row(cfg, "best") == ltsd.paper_row(cfg, "last") == {}


def write_json(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def fake_run(folder, numbers, *words):
    """A finished run's folder; numbers: clean, pgd, tail_clean, tail_pgd of best and last."""
    cfg = config_of("--amp", "off", *words)
    record = dict(zip(("clean", "pgd", "tail_clean", "tail_pgd"), numbers, strict=True))
    for name in ("clean", "pgd"):
        record[f"class_{name}"] = [record[name]] * 9 + [record[f"tail_{name}"]]
    record |= dict(eps=cfg.eval_eps, steps=cfg.eval_steps, step_size=cfg.eval_step_size)
    best = record | dict(checkpoint="best", epoch=99)
    last = record | dict(checkpoint="last", epoch=100, clean=numbers[0] + 1, pgd=numbers[1] - 1)
    folder.mkdir(parents=True)
    classes = dict(names=list("abcdefghij"), counts=[5] * 10, tail=[9])
    config = dict(config=asdict(cfg), images=f"those of {cfg.ir}", classes=classes)
    write_json(folder / "config.json", **config)
    write_json(folder / "results.json", evaluations=[best, last])
    return folder


def report(capsys, *words):
    """(rows of cells, the other lines) of a report on run folders, as it is printed and written."""
    capsys.readouterr()
    assert ltsd.main(["--device", "cpu", "--stage", "report", *map(str, words)]) == 0
    said = capsys.readouterr().out
    (file,) = re.findall(r"^report (.*)$", said, re.M)
    text = Path(file).read_text()
    assert text.partition("\n")[2].strip() in said
    lines = text.splitlines()
    rows = []
    for line in lines:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows, [line for line in lines if line and not line.startswith("|")]


def test_a_report_has_mean_and_deviation_over_seeds_and_the_papers_values_below(tmp_path, capsys):
    for seed, clean in enumerate((46.13, 46.57, 46.47, 46.59, 46.01)):  # Table 10: 46.35 and 0.27
        numbers = (clean, 20, 30, 10 + seed)
        fake_run(tmp_path / f"ltsd{seed}", numbers, "--seed", seed)
    fake_run(tmp_path / "one", (1, 2, 3, 4), "--method", "trades", "--epochs", 3)
    rows, _ = report(capsys, tmp_path / "lts*", tmp_path / "one", tmp_path / "ltsd0")
    ours = "cifar100 IR 10 resnet18 ltsd seed 0,1,2,3,4"
    one = "cifar100 IR 10 resnet18 trades seed 0"
    assert rows[0] == ["setting", "checkpoint", "clean", "PGD-20", "T-clean", "T-PGD"]
    means = ["46.35 ± 0.27", "20.00 ± 0.00", "30.00 ± 0.00", "12.00 ± 1.58"]
    assert rows[2] == [ours, "best (epoch 99)", *means]
    assert rows[3] == ["", "paper", "46.13", "22.42", "38.90", "17.90"]
    assert rows[4] == ["", "gap", "+0.22", "-2.42", "-8.90", "-5.90"]
    assert rows[5][1:3] == ["last (epoch 100)", "47.35 ± 0.27"]
    assert [row[1:3] for row in rows[6:8]] == [["paper", "47.22"], ["gap", "+0.13"]]
    assert rows[8] == [one, "best (epoch 99)", "1.00", "2.00", "3.00", "4.00"]
    assert rows[9] == [one, "last (epoch 100)", "2.00", "1.00", "3.00", "4.00"]


def test_runs_on_other_images_are_not_averaged(tmp_path, capsys):
    for name in ("a", "b"):
        folder = fake_run(tmp_path / name, (50, 20, 30, 10), "--data", "folder")
        write_json(folder / "config.json", images=name)
    rows, _ = report(capsys, tmp_path / "*")
    start = "folder own counts resnet18 ltsd images"
    names = [f"{start} a seed 0", f"{start} b seed 0"]
    assert list(dict.fromkeys(row[0] for row in rows[2:])) == names


def test_runs_scored_under_other_threats_are_not_averaged(tmp_path, capsys):
    fake_run(tmp_path / "a", (50, 36, 30, 10), "--seed", 0)
    fake_run(tmp_path / "b", (50, 60, 30, 10), "--seed", 1, "--eval-eps", 2)
    rows, _ = report(capsys, tmp_path / "*")
    start = "cifar100 IR 10 resnet18 ltsd eval_eps"
    names = [f"{start} 8.0 seed 0", f"{start} 2.0 seed 1"]
    assert list(dict.fromkeys(row[0] for row in rows[2:] if row[0])) == names


def test_a_report_shows_what_was_scored_whatever_a_later_start_asked_for(tmp_path, capsys):
    folder = fake_run(tmp_path / "a", (50, 36, 30, 10))
    config = json.loads((folder / "config.json").read_text())["config"]
    write_json(folder / "config.json", config=config | dict(eval_eps=2.0))
    rows, _ = report(capsys, folder)
    assert rows[2][2:4] == ["50.00", "36.00"]


def test_a_report_passes_over_evaluations_with_other_steps(tmp_path, capsys):
    folder = fake_run(tmp_path / "a", (50, 36, 30, 10))
    records = json.loads((folder / "results.json").read_text())["evaluations"]
    records.append(records[0] | dict(eps=2.0, steps=50, pgd=99.0))
    write_json(folder / "results.json", evaluations=records)
    rows, _ = report(capsys, folder)
    assert rows[2][2:4] == ["50.00", "36.00"]


def test_settings_that_differ_have_rows_of_their_own_that_say_how(tmp_path, capsys):
    fake_run(tmp_path / "a", (50, 20, 30, 10), "--alpha", 10)
    fake_run(tmp_path / "b", (50, 20, 30, 10), "--alpha", 20, "--aug", "ra")
    fake_run(tmp_path / "c", (50, 20, 30, 10), "--alpha", 20)
    rows, _ = report(capsys, tmp_path / "*")
    found = list(dict.fromkeys(row[0] for row in rows[2:] if row[0]))
    start = "cifar100 IR 10 resnet18"
    names = [f"{start} ltsd alpha 10.0 seed 0", f"{start} ltsd+ra seed 0"]
    assert found == [*names, f"{start} ltsd alpha 20.0 seed 0"]


def test_a_report_shows_a_method_that_is_not_known_here(tmp_path, capsys):
    path = fake_run(tmp_path / "a", (50, 20, 30, 10))
    config = json.loads((path / "config.json").read_text())["config"]
    write_json(path / "config.json", config=config | dict(method="magic"))
    rows, _ = report(capsys, path)
    assert [row[0] for row in rows[2:]] == ["cifar100 IR 10 resnet18 magic seed 0"] * 2


@pytest.fixture
def broken(tmp_path):
    """Folders that a report cannot show."""
    paths = [fake_run(tmp_path / f"broken{i}", (50, 20, 30, 10)) for i in range(7)]
    weak = dict(checkpoint="best", epoch=9, eps=2, steps=10, step_size=2, pgd=33.0)
    write_json(paths[0] / "results.json", evaluations=[])
    write_json(paths[1] / "results.json", evaluations=[{"clean": 3}])
    write_json(paths[2] / "results.json", evaluations=[weak])
    write_json(paths[3] / "config.json", config={"colour": 3})
    (paths[4] / "config.json").write_text("{")
    (paths[5] / "results.json").write_text("[]")
    (paths[6] / "results.json").unlink()
    return [*paths, tmp_path / "none*"]


def test_a_report_lists_what_it_cannot_show(broken, tmp_path, capsys):
    good = fake_run(tmp_path / "a", (50, 20, 30, 10))
    rows, notes = report(capsys, good, *broken)
    left = [line for line in notes if line.startswith("Left out: ")]
    assert len(left) == len(broken) == 8
    for path, line in zip(broken, left, strict=True):
        assert str(path) in line
    assert rows[2][2] == "50.00"


def test_a_report_on_nothing_that_can_be_shown_is_refused(broken, tmp_path, capsys):
    refusal(capsys, ["--stage", "report", *broken], *map(str, broken))
    assert not list(tmp_path.glob("report.md"))


def test_a_report_shows_the_threat_that_is_asked_for(broken, capsys):
    rows, notes = report(capsys, broken[2], "--eval-eps", 2, "--eval-steps", 10)
    assert rows[0][2] == "PGD-10" and [row[2] for row in rows[2:]] == ["33.00"]
    assert "eps 2/255" in "".join(notes)


def test_a_report_stands_beside_its_runs_and_leaves_a_users_file_alone(tmp_path, capsys):
    fake_run(tmp_path / "runs" / "a", (50, 20, 30, 10))
    words = ["--stage", "report", str(tmp_path / "runs" / "*")]
    for _ in range(2):
        assert ltsd.main(words) == 0
    file = tmp_path / "runs" / "report.md"
    assert "| 50.00 |" in file.read_text()
    file.write_text("my own notes")
    capsys.readouterr()
    assert ltsd.main(words) == 0
    assert file.read_text() == "my own notes"
    said = capsys.readouterr().out
    assert "| 50.00 |" in said and f"{file} is not ours and stays as it is" in said
    assert ltsd.main([*words[:2], str(tmp_path / "r*" / "*")]) == 0
    assert not (tmp_path / "r*").exists()


def test_runs_of_several_radii_are_reported_under_their_own(tmp_path):
    assert launch(tmp_path, *SHORT, "--method", "at-bsl", "--epochs", 1, "--eps", "4,8") == 0
    text = (tmp_path / "report.md").read_text()
    assert "eps 4/255, 8/255" in text and "Left out" not in text


def test_several_runs_of_a_command_end_with_one_report(copied_run, capsys):
    assert launch(copied_run, "--seed", "0,1", "--epochs", 1, "--teacher-epochs", 1) == 0
    text = (copied_run / "report.md").read_text()
    assert text.partition("\n")[2].strip() in capsys.readouterr().out
    assert "synthetic IR 3 resnet8 ltsd seed 0,1" in text
    assert len(re.findall(r"^\| synthetic .* ± ", text, re.M)) == 3


@pytest.fixture
def drawn(monkeypatch):
    """{name of a figure: the Figure} of what is saved from here on, as a real PNG."""
    figure = pytest.importorskip("matplotlib.figure")
    save = figure.Figure.savefig
    found = {}

    def saved(self, path, **options):
        found[Path(path).stem] = self
        save(self, path, **options)
        assert Image.open(path).size[0] > 500

    monkeypatch.setattr(figure.Figure, "savefig", saved)
    return found


def points(ax):
    """{(x, y): (colour, marker, hollow)} of an axis' lone marks."""
    found = {}
    for line in ax.lines:
        if line.get_marker() not in ("None", "_", "|") and len(line.get_xdata()) == 1:
            hollow = line.get_markerfacecolor() == "none"
            at = tuple(line.get_xydata()[0].round(6).tolist())
            found[at] = (line.get_color(), line.get_marker(), hollow)
    return found


def curves(ax):
    """The lines of an axis, as lists of [x, y]."""
    return [line.get_xydata().round(6).tolist() for line in ax.lines]


def test_the_scatter_tells_settings_apart_and_shows_last_teacher_and_paper(tmp_path, capsys, drawn):
    runs = tmp_path / "runs"
    fake_run(runs / "a", (50, 20, 30, 10), "--alpha", 10)
    fake_run(runs / "b", (48, 22, 33, 11), "--alpha", 10, "--seed", 1)
    path = fake_run(runs / "c", (52, 20, 30, 10), "--alpha", 20)
    records = json.loads((path / "results.json").read_text())["evaluations"]
    teacher = records[0] | dict(checkpoint="teacher", clean=41, pgd=17)
    write_json(path / "results.json", evaluations=[teacher, *records])
    report(capsys, runs / "*", "--figures", tmp_path / "figures")
    ax, tail = drawn["scatter"].axes
    marks = points(ax)
    one = marks[49, 21]
    other = marks[52, 20]
    assert one[0] != other[0] and one[1] != other[1]
    assert marks[46.13, 22.42][2] and not one[2] and not other[2]  # the paper's is hollow
    assert marks[41, 17] == (other[0], "x", False)
    lines = [line.get_xydata().tolist() for line in ax.lines]
    assert [[49, 21], [50, 20]] in lines and [[52, 20], [53, 19]] in lines  # best to last
    assert (31.5, 10.5) in points(tail)


def test_the_classes_figure_goes_from_the_most_to_the_least_frequent(tmp_path, capsys, drawn):
    fake_run(tmp_path / "runs" / "a", (50, 20, 30, 10))
    fake_run(tmp_path / "runs" / "b", (50, 21, 30, 11), "--seed", 1)
    report(capsys, tmp_path / "runs" / "*", "--figures", tmp_path)
    (curve,) = curves(drawn["classes"].axes[0])
    assert curve == [[i, 20.5] for i in range(1, 10)] + [[10, 10.5]]
    assert set(drawn) == {"scatter", "classes"}  # no setting takes several values


SWEEPS = [("alpha", 10, 20, 40), ("gamma", 2, 5, 10), ("ir", 5, 10, 50)]


@pytest.mark.parametrize("name, low, default, high", SWEEPS)
def test_a_setting_that_takes_several_values_has_a_figure(
    name, low, default, high, tmp_path, capsys, drawn
):
    values = sorted({low, default, high})
    for i, value in enumerate(values):
        fake_run(tmp_path / "runs" / f"{i}", (50 + i, 20, 30, 10 + i), f"--{name}", value)
    report(capsys, tmp_path / "runs" / "*", "--figures", tmp_path)
    assert set(drawn) == {"scatter", "classes", name}
    ax, tail = drawn[name].axes
    assert curves(ax)[0] == [[value, 50 + i] for i, value in enumerate(values)]
    assert curves(tail)[1] == [[value, 10 + i] for i, value in enumerate(values)]


def test_two_families_of_a_sweep_are_told_apart(tmp_path, capsys, drawn):
    for i, (alpha, kd) in enumerate([(10, "igdm"), (20, "igdm"), (10, "kl"), (20, "kl")]):
        numbers = (50 + i, 20, 30, 10)
        fake_run(tmp_path / "runs" / f"{i}", numbers, "--alpha", alpha, "--kd", kd)
    report(capsys, tmp_path / "runs" / "*", "--figures", tmp_path)
    clean = drawn["alpha"].axes[0].lines[::2]
    looks = {(line.get_color(), line.get_marker()) for line in clean}
    labels = {line.get_label() for line in clean}
    assert len(clean) == len(looks) == len(labels) == 2
    assert any("kd kl" in label for label in labels)


def test_figures_without_matplotlib_are_one_line_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert launch(tmp_path / "runs", "--figures", tmp_path) == 2
    one_line(capsys, "pip install matplotlib")
    assert not (tmp_path / "runs").exists()


# Bench ============================================================================================
def test_the_bench_writes_its_schema(tmp_path, monkeypatch, capsys):
    """What is timed, not how fast, is checked: small networks and few steps will do."""
    build_model = ltsd.build_model
    bench_core = ltsd.bench_core
    monkeypatch.setattr(ltsd, "build_model", lambda arch, *rest: build_model("resnet8", *rest))
    monkeypatch.setattr(ltsd, "bench_core", lambda cfg, batch, _: bench_core(cfg, batch // 16, 1))
    autoattack = ltsd.autoattack

    def short(*args, **options):
        return autoattack(*args, **options | dict(iterations=1, queries=2, targets=1))

    monkeypatch.setattr(ltsd, "autoattack", short)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)  # it would take a minute
    words = ["--stage", "bench", "--device", "cpu", "--amp", "off", "--out", str(tmp_path)]
    assert ltsd.main(words) == 0
    assert re.search(r"training step batch 8 +plain", capsys.readouterr().out)
    result = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert result["environment"]["amp"] == "off" and result["attack_steps"] == 2
    rows = result["rows"]
    assert [row["part"] for row in rows if row["variant"] == "ours"] == list(ltsd.AUTOATTACK)
    for part in ("attack", "training step"):
        for batch in (2, 8):
            plain, ours = [row for row in rows if (row["part"], row["batch"]) == (part, batch)]
            assert plain["variant"] == "plain" and plain["ratio"] == 1
            assert ours["ratio"] == pytest.approx(ours["images_per_s"] / plain["images_per_s"])


def test_the_bench_times_the_official_autoattack(monkeypatch):
    package = pytest.importorskip("pyautoattack")
    monkeypatch.setattr(package.AutoAttack, "run_standard_evaluation", lambda self, x, y: x)
    monkeypatch.setattr(ltsd, "autoattack", lambda *args, **options: None)
    rows = ltsd.bench_autoattack(config_of("--stage", "bench"))
    assert [row["variant"] for row in rows] == ["pyautoattack", "ours"] * 4
