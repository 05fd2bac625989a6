"""Tests of ltsd.py, on a CPU: `python -m pytest -q test_ltsd.py`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: waiting threads must not spin

import copy
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import pathlib
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

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import v2

import ltsd

# fmt: off
EVERY_FLAG = dict(
    data="folder", data_dir="d", image_size=64, ir=3.0, method="mart", arch="wrn34-10", stage="eval", aug="ra",
    alpha=2.0, tau=0.5, gamma=3.0, beta=5.0, kd="kl", reat_tail="intended", teacher="t.pt", teacher_method="robal",
    teacher_data="full", official=True, epochs=7, teacher_epochs=6, batch_size=5, teacher_batch_size=4, lr=0.3,
    milestones="0.5,1", weight_decay=0.2, momentum=0.8, eps=4.0, step_size=1.0, steps=3, eval_eps=2.0,
    eval_step_size=0.5, eval_steps=9, attacks="pgd,aa", device="cpu", amp="bf16", compile="on", seed=8, out="o",
    overwrite=True, checkpoint="c.pt", train_limit=11, test_limit=12, examples=13, figures="f", runs=("r1", "r2"))
PAPERS = dict(
    epochs=100, teacher_epochs=30, batch_size=128, teacher_batch_size=32, lr=0.1, weight_decay=5e-4, momentum=0.9,
    eps=8, step_size=2, steps=10, eval_eps=8, eval_step_size=2, eval_steps=20, attacks="clean,pgd,aa", tau=1, alpha=40,
    method="ltsd", teacher_method="pgd-at", teacher_data="balanced", kd="igdm", aug="none", official=False, beta=6,
    arch="resnet18", milestones="0.75,0.9", image_size=32, seed=0, stage="all", train_limit=None, data_dir="data")
DATA_DEFAULTS = [
    ("synthetic", dict(ir=20, arch="resnet8", alpha=10, epochs=10, teacher_epochs=6, batch_size=32,
                       attacks="clean,pgd")), ("cifar10", dict(ir=50)), ("cifar100", dict(ir=10)),
    ("folder", dict(ir=None)), ("tinyimagenet", dict(ir=10, arch="preactresnet18", image_size=64))]
MISTAKES = [  # arguments, then what the line must name
    ("--data imagenet", "--data", "'imagenet'", "synthetic"), ("--method frob", "--method", "'frob'", "at-bsl"),
    ("--method ltsd,", "--method", "''"), ("--epochs 1.5", "--epochs", "'1.5'"), ("--seed 0,x", "--seed", "'x'"),
    ("--seed", "--seed", "expected"), ("--ir 0.5", "--ir", "'0.5'"), ("--eps nan", "--eps", "nan", "255"),
    ("--alpha 1,inf", "--alpha", "inf"), ("--out=", "--out", "''"), ("--milestones 75", "--milestones", "'75'"),
    ("--epoch 1", "--epoch"), ("--official --method natural", "--official", "natural"), ("--eps 300", "'300'", "255"),
    ("--official --method ltsd,trades --data tinyimagenet", "--official", "trades", "tinyimagenet"),
    ("--image-size 64", "--image-size 64", "folder"), ("--stage eval --overwrite", "--overwrite", "eval"),
    ("--checkpoint x.pt", "--checkpoint x.pt", "--stage eval"), ("runs/a", "runs/a", "--stage report"),
    ("--device tpu", "--device tpu", "cuda:N"), ("--device cuda:99", "--device cuda:99"),
    ("--data synthetic --ir 1000", "1000", "class"), ("--stage report nowhere", "nowhere", "--stage eval"),
    ("--data folder --data-dir none", "--data-dir none", "/CLASS"), ("--data synthetic --stage eval", "teacher.pt")]
class Touches:
    def __reduce__(self):  # unpickled by a careless loader, it makes the file that tells
        return pathlib.Path.touch, (pathlib.Path("ran"),)
GIVEN, NO_FILE = "theirs.pt", "theirs.pt is no checkpoint"
ODD_FILES = {  # what is done with the good files, given a good state_dict, and what the line must name
    "other classes": (lambda w: os.rename("test/b", "test/c"), "--data-dir .", "same"),
    "no test": (lambda w: os.rename("test", "x"), "test/CLASS"), "missing": (lambda w: None, NO_FILE),
    "no image": (lambda w: os.rename("train/b/0.png", "x"), "classes b"),
    "one class": (lambda w: [os.rename(part + "/b", part + "_b") for part in ("train", "test")], "two"),
    "odd image": (lambda w: pathlib.Path("train/a/x.png").write_text("hello"), "train/a/x.png", "remove or replace"),
    "half an image": (lambda w: os.truncate("test/a/1.png", 300), "test/a/1.png"),
    "half a file": (lambda w: (torch.save(w, GIVEN), os.truncate(GIVEN, 90_000)), NO_FILE),
    "code": (lambda w: torch.save({"state_dict": w, "x": Touches()}, GIVEN), NO_FILE),
    "a list": (lambda w: torch.save(list(w), GIVEN), "theirs.pt holds no"),
    "3 classes": (lambda w: torch.save(w | {"linear.weight": torch.ones(3, 64)}, GIVEN), "--arch", "linear.weight"),
    "nan": (lambda w: torch.save(w | {"linear.bias": torch.full((2,), math.nan)}, GIVEN), "theirs.pt", "NaN")}
TOTALS = [(5000, 10, 50, 13996), (5000, 10, 100, 12406), (5000, 10, 10, 20431), (500, 100, 10, 19573),
          (500, 100, 50, 12608), (500, 100, 20, 15907), (500, 100, 5, 24856), (500, 200, 10, 39072)]
LT = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]  # CIFAR-10-LT at IR 50
TEACHERS = [  # (flags, counts, images a class of D_B): the paper's sizes first
    ("--data cifar10", LT, 2500), ("--data cifar100", ltsd.long_tail_counts(500, 100, 10), 250),
    ("--data cifar10 --gamma 1.496", LT, 149), ("--data cifar10 --gamma 0.001", LT, 1),
    ("--data cifar10 --ir 1", [50] * 10, 50), ("--data folder", [90, 40, 10], 45),  # IR/2 of its own counts
    ("--teacher-data full --teacher-method reat", [90, 40, 10], None)]
NETS = [("resnet18", 10, 11_173_962), ("wrn34-10", 10, 46_160_474), ("preactresnet18", 200, 11_269_640),
        ("resnet8", 10, 78_042)]
WRAPPINGS = {
    "bare": lambda w: w, "both prefixes": lambda w: {"module._orig_mod." + k: v for k, v in w.items()},
    "state_dict, module.": lambda w: {"state_dict": {"module." + k: v for k, v in w.items()}, "epoch": 7},
    "net, _orig_mod.": lambda w: {"net": {"_orig_mod." + k: v for k, v in w.items()}, "acc": 90.1},
    "model, sub_block1": lambda w: {"model": w | {"sub_block1.layer.0.conv1.weight": torch.zeros(3)}, "epoch": 3},
    "no num_batches_tracked": lambda w: {k: v for k, v in w.items() if "num_batches" not in k}}
ALL, FOUR = list(ltsd.METHODS), ["robal", "reat", "at-bsl", "ltsd"]
C10, C100, WRN = dict(data=["cifar10"], ir=[50]), dict(data=["cifar100"], ir=[10]), dict(arch=["wrn34-10"])
OURS, FULL = C100 | dict(method=["ltsd"]), dict(teacher_data=["full"], teacher_epochs=[100], teacher_batch_size=[128])
ARTEFACTS = {  # what the runs of each command vary; all else must be the paper's
    "Table 1": C10 | dict(method=ALL), "Table 2": C100 | dict(method=ALL), "Table 7": C10 | WRN | dict(method=ALL),
    "Table 8": C100 | WRN | dict(method=ALL), "Table 4": C100 | dict(method=FOUR, aug=["ra", "aua"]),
    "Table 3": dict(data=["tinyimagenet"], ir=[10], arch=["preactresnet18"], method=ALL, image_size=[64]),
    "Table 5": C100 | dict(method=FOUR, ir=[5, 20, 50]), "Table 6": C100 | dict(method=FOUR),
    "Table 9": C100 | dict(method=[m for m in ALL if m not in ("ltsd", "natural")], epochs=[130]),
    "Table 10": OURS | dict(seed=[0, 1, 2, 3, 4]), "Figures 1, 8": "report", "Figure 2": "theory",
    "Figure 4": C10 | dict(method=["natural", "pgd-at"], ir=[1, 5, 10, 50, 100], eval_eps=[2], attacks=["clean,pgd"]),
    "Figure 5": OURS | FULL | dict(teacher_method=FOUR[:3]),
    "Figures 6, 7: alpha": OURS | dict(alpha=[10, 20, 40, 80]),
    "Figures 6, 7: gamma": OURS | dict(gamma=[2, 5, 10, 20])}
README = (pathlib.Path(ltsd.__file__).parent / "README.md").read_text(encoding="utf-8")
# fmt: on


def configs_of(*argv):
    return ltsd.expand(ltsd.parse_args([*map(str, argv), "--device", "cpu"]))


def test_every_setting_has_the_papers_default_a_flag_that_sets_it_and_a_place_in_the_help(capsys):
    assert {f.name for f in dataclasses.fields(ltsd.Config)} == set(EVERY_FLAG)
    assert not [k for k, value in EVERY_FLAG.items() if value == getattr(ltsd.Config(), k)]
    flags = {name: "--" + name.replace("_", "-") for name in EVERY_FLAG if name != "runs"}
    given = [[flag] if EVERY_FLAG[k] is True else [flag, str(EVERY_FLAG[k])] for k, flag in flags.items()]
    assert ltsd.parse_args(["r1", "r2", *itertools.chain(*given)]) == ltsd.Config(**EVERY_FLAG)
    assert ltsd.parse_args([]) == ltsd.Config()
    with pytest.raises(SystemExit, match="0"):
        ltsd.main(["--help"])
    text = capsys.readouterr().out
    assert re.findall(r"^(\w+):$", text, re.M)[-7:] == "what method optimiser threat machine run examples".split()
    assert not [shown for shown in [*flags.values(), "RUN"] if not re.search(rf"^  {shown}\b(?!-)", text, re.M)]
    examples = re.findall(r"^ +python ltsd\.py (.*?) +#", text, re.M)
    assert len(examples) == 5 and all(configs_of(*shlex.split(line)) for line in examples)
    for data, own in DATA_DEFAULTS:
        (cfg,) = configs_of("--data", data)
        assert {k: getattr(cfg, k) for k in PAPERS | own} == PAPERS | own, data


def test_comma_lists_make_the_product_each_in_its_folder(monkeypatch):
    monkeypatch.setitem(ltsd.METHODS, "mine", ltsd.METHODS["at-bsl"])  # a row added from outside counts, too
    made = configs_of(*"--ir 5,10 --seed 0,1,0,2 --method mine,at-bsl --aug none,ra --out o".split())
    got = [(c.ir, c.method, c.aug, c.seed) for c in made]
    assert sorted(got) == sorted(itertools.product((5, 10), ("mine", "at-bsl"), ("none", "ra"), (0, 1, 2)))
    assert len({c.out for c in made}) == 24 and {pathlib.Path(c.out).parent.name for c in made} == {"o"}
    assert all(len(configs_of(flag, "1,2")) == 2 for flag in ("--alpha", "--gamma"))
    assert ltsd.parse_args(["--method", "all"]).method == tuple(ltsd.METHODS)
    assert [c.out for c in configs_of("--out", "o")] == ["o"]


def one_line(capsys, *said):
    """stderr has one line since it was last read, which holds all of `said`."""
    err = capsys.readouterr().err
    assert err.startswith("ltsd: ") and err.count("\n") == 1 and all(words in err for words in said), err


def refusal(capsys, argv, *said):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning would be more lines
        assert ltsd.main(["--device", "cpu", *map(str, argv)]) == 2
    one_line(capsys, "ltsd: error: ", *said)


@pytest.mark.parametrize("args, said", [(m[0], m[1:]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, shlex.split(args), *said)


def picture_folder(root, counts, test="test", size=16):
    """root with noise images root/train/CLASS/i.png, as many as `counts` says, and two of each class to test."""
    rng = np.random.default_rng(0)
    for name, part in itertools.product(counts, ("train", test)):
        (root / part / name).mkdir(parents=True)
        for i in range(counts[name] if part == "train" else 2):
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_folder_or_checkpoint_that_cannot_be_used_is_one_line_and_runs_no_code(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(picture_folder(tmp_path, {"a": 3, "b": 1}))
    ODD_FILES[name][0](ltsd.build_model("resnet8", 2).state_dict())
    argv = "--data folder --data-dir . --image-size 16 --arch resnet8 --method at-bsl --stage eval --out o".split()
    refusal(capsys, [*argv, "--checkpoint", GIVEN], *ODD_FILES[name][1:])
    assert not os.path.exists("ran") and not os.path.exists("o/results.json")


@pytest.fixture
def untouched():
    """Inside the test no global generator moves."""
    before = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    yield
    assert before == (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist())


def test_long_tailed_sets_have_the_published_sizes_and_the_lineages_images(untouched):
    for n_max, classes, ir, total in TOTALS:
        counts = ltsd.long_tail_counts(n_max, classes, ir)
        assert (sum(counts), len(counts), counts[0], counts[-1]) == (total, classes, n_max, n_max // ir)
    assert ltsd.long_tail_counts(5000, 10, 50) == LT
    for bad in ((10, 3, 0.5), (10, 3, 11), (10, 0, 1), (10, 3, math.nan)):
        with pytest.raises(ValueError, match=f"{bad[1]} classes, imbalance ratio {bad[2]}"):
            ltsd.long_tail_counts(*bad)
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 30))
    counts, want, theirs = [30, 17, 9, 2], [], np.random.RandomState(0)
    for c, n in enumerate(counts):
        members = [i for i, label in enumerate(labels) if label == c]
        theirs.shuffle(members)
        want += members[:n]
    got = ltsd.long_tail_indices(torch.from_numpy(labels), counts)
    assert got.dtype == np.int64 and got.tolist() == want
    with pytest.raises(ValueError, match="class 3 has 30 images, 31"):
        ltsd.long_tail_indices(labels, [1, 1, 1, 31])


@pytest.mark.parametrize("flags, counts, per_class", TEACHERS, ids=[row[0] for row in TEACHERS])
def test_the_teacher_trains_30_epochs_on_a_balanced_draw(flags, counts, per_class, untouched):
    ((cfg,), labels) = configs_of(*flags.split()), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    data = ltsd.Data(torch.arange(len(labels)), labels, None, None, [], counts)  # an image holds its position
    task, drawn = ltsd.teacher_task(cfg, data)
    if per_class is None:  # all of D, as a student would train on it
        assert drawn is data and (task.method, task.epochs, task.batch_size) == ("reat", 100, 128)
        return
    for bad in (([0, 1], 0), ([0, 1], 1.5), ([0, 2], 1)):
        with pytest.raises(ValueError, match="per_class|class 1"):
            ltsd.balanced_indices(*bad, seed=0)
    assert (task.method, task.epochs, task.batch_size) == ("pgd-at", 30, 32)
    assert drawn.counts == torch.bincount(drawn.train_labels).tolist() == [per_class] * len(counts)
    assert torch.equal(labels[drawn.train_images], drawn.train_labels)
    times = torch.bincount(drawn.train_images, minlength=len(labels))  # floor or ceil of an equal share
    assert ((times - per_class / torch.tensor(counts)[labels].double()).abs() < 1).all()
    seeds = [ltsd.teacher_task(dataclasses.replace(cfg, seed=s), data)[1].train_images for s in (0, 1)]
    assert torch.equal(seeds[0], drawn.train_images) and (cfg.ir == 1 or not torch.equal(*seeds))


def law_p(ours, theirs):
    """p-value of the chi-square test that two Counters are draws of one law; rare outcomes are one cell."""
    totals, cells = [sum(ours.values()), sum(theirs.values())], defaultdict(lambda: [0, 0])
    for key in {*ours, *theirs}:
        pair = ours[key], theirs[key]
        cell = cells[key if min(sum(pair) * t / sum(totals) for t in totals) >= 5 else None]
        cell[0], cell[1] = cell[0] + pair[0], cell[1] + pair[1]
    chi2 = sum((a * totals[1] - b * totals[0]) ** 2 / (a + b) for a, b in cells.values()) / math.prod(totals)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(chi2 / 2)).item()


def test_crop_and_flip_are_uniform_over_all_that_torchvision_could_give():
    image = torch.arange(1, 91, dtype=torch.uint8).view(3, 5, 6)  # no two pixels are equal: an output tells its draw
    padded, outcomes = F.pad(image, (4, 4, 4, 4)), {}
    for top, left in itertools.product(range(9), range(9)):
        crop = padded[:, top : top + 5, left : left + 6]
        outcomes |= {crop.numpy().tobytes(): (top, left, 0), crop.flip(2).numpy().tobytes(): (top, left, 1)}
    given = ltsd.augment(image.expand(16200, 3, 5, 6), "none", torch.Generator().manual_seed(3))
    drawn = [outcomes[one.numpy().tobytes()] for one in given]
    exact = {outcome: 10**7 for outcome in outcomes.values()}  # so many that it is the law itself
    assert len(exact) == 162 and law_p(Counter(drawn), Counter(exact)) > 0.01
    pairs = Counter((a[2], b[2]) for a, b in itertools.pairwise(drawn[::2]))
    assert law_p(pairs, Counter(dict.fromkeys(itertools.product((0, 1), (0, 1)), 10**7))) > 0.01


def traits(image):
    """What an output shows of the policy's draw: its colours, which a crop of this image keeps, and its blank area."""
    colours = image.flatten(1).numpy().astype(np.int64).T @ (1, 256, 65536)
    return np.unique(colours).tobytes(), (colours == 0).sum() // 4


@pytest.mark.parametrize("policy", ["ra", "aua"])
def test_every_image_has_torchvisions_law_and_its_own_draw(policy):
    g = torch.Generator().manual_seed(5)
    image = torch.randint(20, 236, (3, 2, 2), generator=g, dtype=torch.uint8).repeat(1, 8, 8)
    batch = image.expand(512, 3, 16, 16)
    ours = [traits(one) for _ in range(12) for one in ltsd.augment(batch, policy, g)]  # 12 epochs of one batch
    first = {"ra": v2.RandAugment(2, 8), "aua": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)}[policy]
    transform = v2.Compose([first, v2.RandomCrop(16, padding=4), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = [traits(transform(image)) for _ in range(6_000)]
    for seen in (lambda t: t, lambda t: t[0], lambda t: t[1]):
        assert law_p(Counter(map(seen, ours)), Counter(map(seen, theirs))) > 0.01
    colours, chance = [t[0] for t in ours], sum((k / 6_000) ** 2 for k in Counter(t[0] for t in theirs).values())
    for lag in (1, 7, 128, 256):  # images of one batch agree no more often than strangers
        agree = np.mean([a == b for a, b in zip(colours, colours[lag:])])
        assert abs(agree - chance) < 5 * math.sqrt(chance / len(colours)), lag


@pytest.mark.parametrize("policy", ["none", "ra", "aua"])
def test_augment_draws_from_its_generator_alone(policy, untouched):
    g, x = torch.Generator(), torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 3, 17, 12), np.uint8))
    kept, (a, b, c) = x.clone(), [ltsd.augment(x, policy, g.manual_seed(seed)) for seed in (6, 6, 7)]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, kept)
    assert not torch.equal(c, ltsd.augment(x, policy, g))  # the next epoch is another one
    assert torch.equal(a, ltsd.augment(x.to(memory_format=torch.channels_last), policy, g.manual_seed(6)))
    assert (a.shape, a.dtype) == (x.shape, torch.uint8) and len(ltsd.augment(x[:0], policy, g)) == 0
    for images, name, said in ((x, "randaugment", "'randaugment'"), (x / 255, policy, "float32"), (x[0], policy, "17")):
        with pytest.raises(ValueError, match=said):
            ltsd.augment(images, name, g)


def load(*argv):
    return ltsd.load_data(*configs_of(*argv))


@pytest.mark.parametrize("name, classes", [("CIFAR10", 10), ("CIFAR100", 100)])
def test_cifar_is_read_from_the_published_archive(name, classes, tmp_path, monkeypatch, capsys):
    """A small archive in the published format, put into place by hand; its md5s stand in for the published ones."""
    rng, cls, images = np.random.default_rng(0), getattr(torchvision.datasets, name), []
    archive, meta, labels = tmp_path / cls.filename, cls.meta["filename"], np.arange(2 * classes) % classes
    files = {meta: pickle.dumps({cls.meta["key"]: [f"class {i}" for i in range(classes)]})}
    for member, _ in cls.train_list + cls.test_list:
        pixels = rng.integers(0, 256, (2 * classes, 3072), np.uint8)  # red, green, blue planes, row by row
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        key = {"labels" if classes == 10 else "fine_labels": labels.tolist(), "coarse_labels": [0] * 2 * classes}
        files[member] = pickle.dumps({"data": pixels, **key})
    with tarfile.open(archive, "w:gz") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(f"{cls.base_folder}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    argv = ["--data", name.lower(), "--data-dir", tmp_path, "--out", tmp_path / "o"]
    monkeypatch.setattr(cls, "url", "file:///nowhere/" + cls.filename)
    refusal(capsys, argv, f"could not fetch {cls.filename}", f"{tmp_path} by hand")  # this is not the real archive
    md5 = {m: hashlib.md5(b).hexdigest() for m, b in [*files.items(), ("archive", archive.read_bytes())]}
    lists = {part: [[m, md5[m]] for m, _ in getattr(cls, part)] for part in ("train_list", "test_list")}
    for attribute, value in dict(lists, tgz_md5=md5["archive"], meta=cls.meta | {"md5": md5[meta]}).items():
        monkeypatch.setattr(cls, attribute, value)
    data = load(*argv, "--ir", 2)
    assert data.counts == ltsd.long_tail_counts(2 * len(cls.train_list), classes, 2)
    assert data.classes[::9] == [f"class {i}" for i in range(0, classes, 9)]
    assert data.tail == list(range(classes - classes // 10, classes))
    assert torch.equal(data.test_images, images[-1]) and data.test_labels.tolist() == labels.tolist()
    chosen = ltsd.long_tail_indices(np.tile(labels, len(images) - 1), data.counts)
    assert torch.equal(data.train_images, torch.cat(images[:-1])[chosen])
    assert data.train_labels.tolist() == (chosen % classes).tolist()


def test_a_folder_is_ordered_by_count_cut_to_the_centre_limited_and_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = picture_folder(tmp_path / "Bilder é", {"ant": 3, "bee": 9, "cat": 6, "dog": 9}, test="val", size=32)
    wide, argv = np.zeros((40, 120, 3), np.uint8), ["--data", "folder", "--data-dir", root]
    wide[:, 36:84] = 77  # about the middle that is kept
    Image.fromarray(wide).save(root / "train/ant/wide.png")
    Image.new("L", (32, 32), 90).save(root / "train/ant/grey.png")
    Image.new("CMYK", (16, 16)).save(root / "train/ant/print.jpg")
    (root / "train/ant/notes.txt").write_text("no image")
    own, bee = load(*argv), torch.from_numpy(np.array(Image.open(root / "train/bee/4.png"))).permute(2, 0, 1)
    assert (own.classes, own.counts, own.tail) == (["bee", "dog", "ant", "cat"], [9, 9, 6, 6], [3])
    assert own.test_labels.tolist() == [2, 2, 0, 0, 3, 3, 1, 1] and own.train_images.shape == (30, 3, 32, 32)
    ants = own.train_images[own.train_labels == 2]
    assert {int(i[0, 0, 0]) for i in ants if (i == i[0, 0, 0]).all()} == {77, 90, 255}
    assert (own.train_images[own.train_labels == 0] == bee).flatten(1).all(1).sum() == 1
    with monkeypatch.context() as m:
        m.setattr(Image, "open", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load(*argv).train_images, own.train_images)
        assert load(*argv, "--ir", 3).counts == [9, 6, 4, 3]
        assert load(*argv, "--ir", 1).counts == [6] * 4  # the largest profile that every class can fill
        few = load(*argv, "--train-limit", 15, "--test-limit", 1)  # a share of every class, but at least one
        assert few.counts == [4, 4, 3, 3] and few.test_labels.tolist() == [2, 0, 3, 1]
        assert load(*argv, "--train-limit", 15, "--ir", 3).counts == [4, 2, 1, 1]  # limited before the long tail
    path = root / "train/cat/0.png"
    later = path.stat().st_mtime_ns + 10**9
    Image.new("RGB", (32, 32)).save(path)
    os.utime(path, ns=(later, later))
    assert sum(not image.any() for image in load(*argv).train_images) == 1
    (cache,) = root.glob(".ltsd*")
    cache.write_bytes(b"broken")
    (root / "val/bee/0.png").unlink()
    assert len(load(*argv).test_labels) == 7


def public_forward(arch, w, x):
    """(logits, the names read): the public code's network `arch` from a state_dict, written from its description."""
    wide, post, read = arch == "wrn34-10", arch in ("resnet18", "resnet8"), set()
    stages, blocks = {"wrn34-10": (3, 5), "resnet8": (3, 1)}.get(arch, (4, 2))

    def layer(x, name, stride=1, kinds=("weight",)):
        read.update(f"{name}.{kind}" for kind in kinds)
        values = [w[f"{name}.{kind}"] for kind in kinds]
        if len(kinds) == 1:
            return F.conv2d(x, *values, None, stride, values[0].shape[-1] // 2)
        return F.linear(x, *values) if len(kinds) == 2 else F.batch_norm(x, *values)

    norm = functools.partial(layer, kinds=("running_mean", "running_var", "weight", "bias"))
    x = F.relu(norm(layer(x, "conv1"), "bn1")) if post else layer(x, "conv1")
    for stage, block in itertools.product(range(1, stages + 1), range(blocks)):
        at = f"block{stage}.layer.{block}." if wide else f"layer{stage}.{block}."
        stride, projects = 2 if stage > 1 and block == 0 else 1, block == 0 and (stage > 1 or wide)
        if post:
            out = norm(layer(F.relu(norm(layer(x, at + "conv1", stride), at + "bn1")), at + "conv2"), at + "bn2")
            x = norm(layer(x, at + "shortcut.0", stride), at + "shortcut.1") if projects else x
            x = F.relu(out + x)
        else:
            out = F.relu(norm(x, at + "bn1"))
            x = layer(out, at + ("convShortcut" if wide else "shortcut.0"), stride) if projects else x
            x = x + layer(F.relu(norm(layer(out, at + "conv1", stride), at + "bn2")), at + "conv2")
    x = x if post else F.relu(norm(x, "bn1" if wide else "bn"))
    return layer(x.mean((2, 3)), "fc" if wide else "linear", kinds=("weight", "bias")), read


def lived_in(model):
    """Batch norms as after a training: a net that leaves one out or swaps two computes something else."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for name, low in dict(weight=0.5, running_var=0.5, bias=-1, running_mean=-1).items():
                torch.nn.init.uniform_(getattr(m, name), low, 1.5)
    return model.eval()


@pytest.mark.parametrize("arch, classes, size", NETS)
def test_networks_are_the_public_ones_by_name_size_and_logits(arch, classes, size):
    torch.manual_seed(0)
    model, x = lived_in(ltsd.build_model(arch, classes)), torch.rand(2, 3, 64, 64 if classes == 200 else 32)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        want, read = public_forward(arch, model.state_dict(), x)
    assert sum(p.numel() for p in model.parameters()) == size and features.shape == (2, model[-1].in_features)
    assert {k for k in model.state_dict() if "num_batches" not in k} == read and logits.shape == (2, classes)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * want.std().item())


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_public_checkpoints_load_however_they_are_wrapped(wrapping, tmp_path):
    model, fresh = lived_in(ltsd.build_model("resnet8", 10)), ltsd.build_model("resnet8", 10).eval()
    saved = WRAPPINGS[wrapping](ltsd.weights_of(model))
    torch.save(saved, tmp_path / "w.pt")
    assert ltsd.load_weights(fresh, tmp_path / "w.pt") == saved.get("epoch")
    for name, tensor in ltsd.weights_of(fresh).items():
        assert torch.equal(tensor, model.state_dict()[name]) or "num_batches" in name, name


@pytest.mark.parametrize("classes, head", [(10, "linear"), (10, "cosine"), (11, "cosine")])
def test_the_head_is_float32_under_bf16_convolutions_and_robals_by_its_formula(classes, head):
    model, x = lived_in(ltsd.build_model("resnet8", classes, head)), torch.rand(64, 3, 32, 32)
    frozen, (logits, f) = ltsd.FrozenCopy(model, torch.bfloat16), model(x, with_features=True)
    if head == "cosine":  # s_c = <f/|f|, w_c/(|w_c| + 1/32)>, 1/16 beyond 10 classes
        w, f = model[-1].weight, f / f.norm(dim=1, keepdim=True)
        want = f @ (w / (w.norm(dim=1, keepdim=True) + (1 / 32 if classes == 10 else 1 / 16))).T
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    for low in (mixed, frozen(x)):
        assert low.dtype == torch.float32 and not torch.equal(low, logits)
        assert (low != low.bfloat16()).float().mean() > 0.9  # no bf16 numbers in a float32 tensor
    for bad in (("vgg", 10), ("resnet8", 1), ("resnet8", 10, "mlp")):
        with pytest.raises(ValueError, match=str(bad[-1])):
            ltsd.build_model(*bad)


def test_theorem1_by_hand_what_it_refuses_and_its_table_and_figure(capsys, tmp_path):
    t = ltsd.theorem1(4, 1.0, 0.5, math.e**2)  # b = ln r / (2 sqrt(n) eta) = 1/2, and with eta - eps: 1
    want = dict(b_nat=0.5, b_rob=1, nat_std=0.066807201268858, nat_rob=0.308537538725987, rob_std=0.158655253931457)
    assert t == pytest.approx(want | {"rob_rob": 0.5})
    odd = [(0, 1, 0.5, 2), (1.5, 1, 0.5, 2), (2, 1, 0.5, 0.5), (2, 1, 0.5, math.inf), (2, 1, 1, 2), (2, 1, -0.1, 2)]
    for args in [*odd, (2, 1, 0.5, math.nan), (2, math.nan, 0, 2)]:
        with pytest.raises(ValueError, match="n {}, eta {}, eps {}, r {}".format(*args)):
            ltsd.theorem1(*args)
    assert ltsd.main(["--stage", "theory"]) == 0
    table = [line.replace(" ", "") for line in capsys.readouterr().out.split("\n")]
    for r, (name, k) in itertools.product((1, 2, 5, 10, 20, 50), (("natural", "nat"), ("adversarial", "rob"))):
        t = ltsd.theorem1(2, 1.0, 0.5, r)
        row = f"|{r}|{name}training|{t['b_' + k]:.4f}|{100 * t[k + '_std']:.2f}|{100 * t[k + '_rob']:.2f}|"
        assert row in table
    pytest.importorskip("matplotlib")
    assert ltsd.main(["--stage", "theory", "--figures", str(tmp_path)]) == 0
    assert min(Image.open(tmp_path / "figure2.png").size) > 200


def commanded(line):
    return configs_of(*shlex.split(re.split(r"(?:^|[ /])ltsd\.py", line)[-1], comments=True))


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"(?:python3?|torchrun)\b[^`\n]*[ /]ltsd\.py\b[^`\n]*", README)
    assert len(lines) >= 20 and any("torchrun" in line for line in lines)
    assert all("--help" in line or commanded(line) for line in lines)


@pytest.mark.parametrize("name", ARTEFACTS)
def test_the_command_of_each_artefact_has_the_papers_settings(name):
    rows = re.findall(r"^\| ((?:Table|Figure)s? \d[^|]*) \| `(.*?)` \|", README, re.M)
    made, want = {row: commanded(line) for row, line in rows}, ARTEFACTS[name]
    assert all(cfg.figures for cfg in made[name]) == name.startswith("Figure")
    if isinstance(want, str):
        assert {cfg.stage for cfg in made[name]} == {want}
        for table in ("Table 1", "Table 2", "Table 8"):  # a report finds the runs of Table 2 alone
            found = {any(pathlib.PurePath(cfg.out).match(g) for g in made[name][0].runs) for cfg in made[table]}
            assert found == {table == "Table 2" and want == "report"}
        return
    for key, values in ({k: [value] for k, value in PAPERS.items()} | want).items():
        assert {getattr(cfg, key) for cfg in made[name]} == set(values), key
    assert len(made[name]) == math.prod(map(len, want.values()))
    if name in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 7", "Table 8"):
        assert all(ltsd.paper_row(cfg, "best") for cfg in made[name] if cfg.method != "natural")


def test_tinyimagenet_is_read_from_the_published_archive(tmp_path, monkeypatch, capsys):
    rng, top, pixels, files = np.random.default_rng(0), "tiny-imagenet-200/", {}, {}
    wnids, val = [f"n{2 * i:03}" for i in range(200)], ["n020", "n002", "n398"]
    archive = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as z:
        for wnid in reversed(wnids):  # some images are grey
            pixels[wnid] = rng.integers(0, 256, (64, 64) if wnid == "n398" else (64, 64, 3), np.uint8)
            Image.fromarray(pixels[wnid]).save(png := io.BytesIO(), "PNG")
            files[wnid] = png.getvalue()
            z.writestr(f"{top}train/{wnid}/images/{wnid}_0.JPEG", files[wnid])
            z.writestr(f"{top}train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i, wnid in enumerate(val):
            z.writestr(f"{top}val/images/val_{i}.JPEG", files[wnid])
        lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n" for i, wnid in enumerate(val)]
        z.writestr(top + "val/val_annotations.txt", "".join(lines))
    argv = ["--data", "tinyimagenet", "--data-dir", tmp_path, "--ir", 1]
    monkeypatch.setattr(ltsd, "TINY", ("file:///nowhere/" + archive.name, ltsd.TINY[1]))
    refusal(capsys, [*argv, "--out", tmp_path / "o"], archive.name, f"{tmp_path} by hand")
    monkeypatch.setattr(ltsd, "TINY", (ltsd.TINY[0], hashlib.md5(archive.read_bytes()).hexdigest()))
    data = load(*argv)
    assert data.classes == wnids and data.tail == list(range(180, 200)) and data.counts == [1] * 200
    assert data.test_labels.tolist() == [10, 1, 199] and data.train_images.shape == (200, 3, 64, 64)
    for wnid, image in (("n014", data.train_images[7]), ("n020", data.test_images[0]), ("n398", data.test_images[2])):
        assert np.array_equal(image, np.broadcast_to(pixels[wnid].T, (3, 64, 64)).swapaxes(1, 2))


# fmt: off
SPY = f"""import os, random, runpy, sys, warnings
class Spy:
    def find_spec(name, path=None, target=None):
        if name == "torch": print(os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Spy)
sys.path.insert(0, {os.path.dirname(ltsd.__file__)!r})
"""
STATE = """(dict(os.environ), torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate(),
    torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32,
    warnings.filters[:])"""
SCRIPT = f"runpy.run_path({ltsd.__file__!r}, None, '__main__')"
PROCESSES = [  # a program, its exit code, what OMP_WAIT_POLICY was when torch was imported, what stderr says
    (f"import numpy as np, torch, torchvision.transforms.v2\na = {STATE}\nimport ltsd\nassert a == {STATE}",
     0, "None", ""),
    (f"sys.argv = ['x', '--eps=300']\n{SCRIPT}", 2, "passive", "300"),
    (f"sys.argv = ['x', '--data=folder', '--data-dir=no', '--device=cpu']\n{SCRIPT}", 2, "passive", "--data-dir no"),
]
# fmt: on


@pytest.mark.parametrize("program, code, waits, said", PROCESSES, ids=["import", "--eps", "--data-dir"])
def test_as_a_script_threads_wait_passively_and_importing_changes_nothing(program, code, waits, said, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", SPY + program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, waits) and not list(tmp_path.iterdir()), done.stderr
    assert done.stderr.count("\n") == (1 if code else 0) and said in done.stderr


def test_the_reference_step_by_hand():
    for *numbers, want in [  # x_adv, gradient, x
        (0.50, 3.0, 0.50, 0.52), (0.50, -1e-30, 0.50, 0.48), (0.51, 0.0, 0.50, 0.51), (0.51, math.nan, 0.50, 0.51),
        (0.53, 1.0, 0.50, 0.53), (0.01, -1.0, 0.01, 0.0), (1.00, math.inf, 0.99, 1.0),  # held by the ball, by [0,1]
    ]:  # fmt: skip
        got = ltsd.pgd_step_reference(*(torch.tensor([number]) for number in numbers), 0.02, 0.03)
        assert got.item() == pytest.approx(want, abs=1e-7), numbers


KERNEL = """
import itertools, torch, ltsd
reference, ltsd.pgd_step_reference = ltsd.pgd_step_reference, None  # what is compared is the kernel
torch.manual_seed(0)
layouts = (torch.contiguous_format, torch.channels_last)
shapes = ((1, 3, 5, 7), (3, 3, 32, 32), (2, 1, 1, 1), (0, 3, 8, 8))
types, count = (torch.float32, torch.bfloat16, torch.float16), 0
for shape, layout, dtype, low_type in itertools.product(shapes, layouts, types, (None, *types)):
    x, start, grad = (make(shape).contiguous(memory_format=layout) for make in (torch.rand, torch.rand, torch.randn))
    grad, flat = grad.to(dtype), torch.arange(x.numel()).view(x.shape)
    grad[flat % 5 == 0], grad[flat % 11 == 1], grad[flat % 13 == 2] = float("nan"), 0.0, float("inf")
    x[x < 0.1], x[x > 0.9] = 0, 1
    adv = start.copy_(reference(x + 8 / 255 * (2 * start - 1), torch.zeros_like(x), x, 0.0, 8 / 255))
    expected = reference(adv, grad, x, 2 / 255, 8 / 255)
    low = None if low_type is None else torch.empty_like(x, dtype=low_type)
    assert ltsd.pgd_step(adv, grad, x, 2 / 255, 8 / 255, low) is adv
    assert torch.equal(adv, expected), (shape, layout, dtype)
    if low is not None:  # to bf16 the interpreter truncates, hardware rounds
        cut = (expected.contiguous().view(torch.int32) & -65536).view(torch.float32).to(low_type)
        assert torch.equal(low, expected.to(low_type)) or (low_type == types[1] and torch.equal(low, cut)), low_type
    count += 1
print(count, "kernel cases equal")
"""


@pytest.mark.skipif(not ltsd.triton, reason="Triton is not installed")
def test_the_kernel_equals_the_reference_bit_for_bit(tmp_path):
    path = os.pathsep.join([str(pathlib.Path(ltsd.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", KERNEL], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "96 kernel cases equal" in run.stdout, run.stderr


@pytest.mark.skipif(not ltsd.triton or "TRITON_INTERPRET" in os.environ, reason="needs Triton's compiler")
@pytest.mark.parametrize("arch, low", [*itertools.product((80, 90), ("fp32", "bf16", "fp16"))])
def test_the_kernel_compiles_ahead_of_time_with_wide_loads(arch, low):
    from triton import JITFunction, compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = next(value for value in vars(ltsd).values() if isinstance(value, JITFunction))
    kinds = ["*fp32", f"*{low}", "*fp32", f"*{low}", "i32", "fp32", "fp32", "constexpr", "constexpr"]
    constants, wide = {(7,): True, (8,): ltsd.STEP_BLOCK}, {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), constexprs=constants, attrs=wide)
    ptx = compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    assert f".target sm_{arch}" in ptx
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4  # 16 bytes each: x_adv and x, two a thread
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
    assert low == "fp32" or f"cvt.rn.{low.replace('fp', 'f')}" in ptx  # to nearest even, as PyTorch rounds


def test_the_step_refuses_what_would_pair_wrong_pixels():
    x = torch.rand(2, 3, 4, 4)
    last, low = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x, dtype=torch.bfloat16)
    for x_adv, grad, clean, *out_low in [
        (x.clone(), last, x), (x.clone(), x, last), (x.double(), x, x), (x.clone(), x.long(), x), (x.clone(), x[:1], x),
        (x[:, :, ::2],) * 3, (x.clone(), x, x.half()), (x.clone(), x, x, last.bfloat16()),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="x_adv|grad|out_low|x has|x is"):
            ltsd.pgd_step(x_adv, grad, clean, 0.1, 0.1, *out_low)
    assert ltsd.pgd_step(adv := x.clone(), x, x, 0.1, 0.1, low) is adv and torch.equal(low, adv.bfloat16())


def net_with_history(arch="resnet8"):
    torch.manual_seed(0)
    return lived_in(ltsd.build_model(arch, 10))


@pytest.mark.parametrize("arch", ltsd.ARCHS)
def test_a_frozen_copy_equals_its_source_and_follows_it_in_place(arch):
    """And makes its input channels_last itself, whatever the caller's layout."""
    model, x, seen = net_with_history(arch), torch.rand(2, 3, 16, 16), []
    frozen, before = ltsd.FrozenCopy(model), ltsd.weights_of(model)
    frozen.net.register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()))
    pointers, optimizer = [t.data_ptr() for t in frozen.state_dict().values()], torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        want, got, same = model.eval()(x), frozen(x), frozen(x.contiguous(memory_format=torch.channels_last))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max() and torch.equal(got, same)
    assert seen == [(768, 1, 48, 3)] * 2 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    F.cross_entropy(model.train()(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    frozen.refresh()
    with torch.no_grad():
        after = model.eval()(x)
        assert (after - want).abs().max() > 0.01 * want.abs().max()
        assert (frozen(x) - after).abs().max() <= 1e-4 * after.abs().max()
    assert pointers == [t.data_ptr() for t in frozen.state_dict().values()]
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_captured_attack_reads_the_newest_inputs_and_keeps_its_graph(monkeypatch):
    """A double stands in for CUDA graphs: it replays by calling again, but on the captured buffers only."""
    captured, replayed, compiled, model = [], [], [], net_with_history()

    def capture(fn, buffers):
        captured.append(len(buffers[0]))
        result = fn(*buffers).clone()
        return lambda: (replayed.append(len(result)), result.copy_(fn(*buffers))), result

    monkeypatch.setattr(torch, "compile", lambda net, **_: lambda x: compiled.append(len(x)) or net(x))
    eager, graphed = ltsd.FrozenCopy(model), ltsd.FrozenCopy(model).speed_up(4, 6)
    graphed.capture, training = capture, dict(eps=8 / 255, step_size=2 / 255, steps=2, objective=ltsd.kl_objective)
    evaluation = training | dict(steps=3)  # alike in shapes: the settings have to tell the graphs apart
    calls = [(training, 4), (training, 4), (evaluation, 4), (evaluation, 6), (training, 4), (training, 3)]
    for number, (threat, n) in enumerate(calls):
        x, y = torch.rand(n, 3, 16, 16), (torch.arange(n) + number) % 10
        aux = F.log_softmax(torch.randn(n, 10), 1)
        draws = [torch.Generator().manual_seed(number) for _ in "ab"]
        attacks = (functools.partial(ltsd.pgd_attack, net, generator=g) for net, g in zip((eager, graphed), draws))
        want, got = (attack(x, y, aux=aux, **threat) for attack in attacks)
        assert torch.equal(got, want) and not torch.equal(got, x), number
        model.conv1.weight.data.mul_(-1)  # the graph has to see refreshed weights too
        eager.refresh(), graphed.refresh()
    assert captured == [4, 4, 6] and replayed == [4, 4, 4, 6, 4] and set(compiled) == {4, 6}


def test_a_captured_optimiser_step_trains_as_the_plain_one(tmp_path, monkeypatch):
    captured, parts = [], lambda result: result if isinstance(result, tuple) else (result,)

    def capture(fn, buffers):
        captured.append(len(buffers))
        result = fn(*buffers)  # warming up: a step too many
        return lambda: [old.copy_(new) for old, new in zip(parts(result), parts(fn(*buffers)))], result

    def speed_up(net, *sizes):
        net.compiled, net.sizes, net.capture = net.net, sizes, capture
        return net

    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    monkeypatch.setattr(ltsd.FrozenCopy, "speed_up", speed_up)
    for compiled in ("off", "on"):
        words = ["--epochs", "3", "--attacks", "clean", "--compile", compiled]
        assert launch(tmp_path / compiled, *words, stop=("augment", 4)) == 130  # and go on: with saved momentum
        assert launch(tmp_path / compiled, *words) == 0
    assert captured == [3, 5] * 3  # attack and step: of the teacher, of the student, of the student gone on
    for name in ("teacher", "last"):
        for key, want in weights(tmp_path / "off" / f"{name}.pt").items():
            torch.testing.assert_close(weights(tmp_path / "on" / f"{name}.pt")[key], want, rtol=1e-3, atol=1e-4)


class Linear(nn.Module):  # in the pixels of [N,1,4,4]: the best perturbation is known; no copy can be made
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))

    def __deepcopy__(self, memo):
        raise AssertionError("a foreign module was copied")

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("init", ["uniform", "gauss", "none"])
def test_the_attack_reaches_the_optimum_of_a_linear_model(init):
    model, x, y, eps = Linear(), torch.rand(64, 1, 4, 4), torch.arange(64) % 2, 0.07
    got = ltsd.pgd_attack(model, x, y, eps=eps, step_size=0.02, steps=10, init=init)
    away = (model.weight[1] - model.weight[0]).view(1, 4, 4) * torch.where(y == 0, 1, -1).view(-1, 1, 1, 1)
    assert torch.allclose(got, (x + eps * away.sign()).clamp(0, 1), atol=1e-6) and not got.requires_grad


def failing(*arguments):
    raise RuntimeError("failed inside")


@pytest.mark.parametrize("attack", ["pgd", "autoattack"])
def test_attacks_leave_a_foreign_module_and_all_else_as_they_were(attack):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    model[1].eval(), model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    weights, x0, noise = ltsd.weights_of(model), x.clone(), torch.get_rng_state()

    def run(objective=None):
        if attack == "autoattack":
            return ltsd.autoattack(model, x, y, iterations=2, queries=2, log=objective)
        generator, threat = torch.Generator().manual_seed(1), dict(eps=0.1, step_size=0.05, steps=3)
        return ltsd.pgd_attack(model, x, y, generator=generator, objective=objective, **threat)

    assert torch.equal(run(), run()) and torch.equal(x, x0)
    with pytest.raises(RuntimeError, match="failed inside"):
        run(failing)
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, False, True]
    assert (model[4].weight.grad == 1).all() and torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_the_start_noise_has_its_law_and_is_clipped():
    x, y = torch.full((4000, 1, 4, 4), 0.5), torch.zeros(4000, dtype=torch.int64)

    def noise(init, x=x, eps=0.1):
        threat = dict(eps=eps, step_size=0.0, steps=0, init=init, generator=torch.Generator().manual_seed(3))
        return ltsd.pgd_attack(Linear(), x, y[: len(x)], **threat) - x

    uniform, gauss = noise("uniform"), noise("gauss")
    assert abs(uniform.std() - 0.1 / math.sqrt(3)) < 1e-3 and abs(uniform.mean()) < 1e-3 and uniform.max() <= 0.100001
    assert abs(gauss.std() - 1e-3) < 2e-5 and abs(gauss.mean()) < 2e-5
    assert noise("gauss", eps=1e-3).abs().max() <= 1.0001e-3 and not noise("none").any()
    assert noise("uniform", torch.ones(9, 1, 4, 4)).max() == 0 == noise("uniform", 0 * x[:9]).min()


def test_degenerate_attacks(foreign):
    x, y, threat = torch.rand(4, 1, 8, 8), torch.zeros(4).long(), dict(eps=0.1, step_size=0.05, steps=2, init="none")
    view = x[:, :, 2:6, 2:6]
    dense = ltsd.pgd_attack(Linear(), view.contiguous(), y, **threat)
    assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat), dense) and not torch.equal(dense, view)
    for same in (dict(eps=0, init="uniform"), dict(steps=0), dict(step_size=0)):
        assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat | same), view)
    assert ltsd.pgd_attack(Linear(), dense[:0], y[:0], **threat).shape == (0, 1, 4, 4)
    x, right = blobs(12)[0], foreign(blobs(12)[0]).argmax(1)
    assert ltsd.autoattack(foreign, x[:0], right[:0]).shape == (0, 3, 12, 12)
    assert torch.equal(ltsd.autoattack(foreign, x, (right + 1) % 10, **QUICK), x)  # all wrong
    assert torch.equal(ltsd.autoattack(foreign, x, right, **QUICK | dict(eps=0)), x)  # all robust


def test_attacks_refuse_odd_input():
    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4).long()
    for change, said in [
        (dict(eps=-1), "eps -1"), (dict(eps=8), "divide by 255"), (dict(step_size=math.nan), "step_size nan"),
        (dict(steps=-1), "steps -1"), (dict(init="normal"), "'normal'"), (dict(x="cat"), "str"), (dict(y=4), "int"),
        (dict(x=x.flatten(1)), r"\[N,C,H,W\]"), (dict(x=x.double()), "float64"), (dict(x=x * 255), "divide by 255"),
        (dict(x=x * math.nan), "nan"), (dict(y=y[:3]), r"\[3\]"), (dict(y=torch.zeros(4)), "float32"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ltsd.pgd_attack(Linear(), **dict(x=x, y=y, eps=0.1, step_size=0.1, steps=1) | change)
    for change, said in [
        (dict(x=x + 2), "must lie in"), (dict(x=x.byte()), "uint8"), (dict(y=y + 2), r"\[2, 2\]"),
        (dict(y=y - 1), r"\[-1, -1\]"), (dict(eps=8), "eps in"), (dict(attacks=("pgd",)), "pgd"),
        (dict(batch_size=0), "counts >= 1"), (dict(iterations=0), "counts >= 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            ltsd.autoattack(Linear(), **dict(x=x, y=y) | change)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(network, images, labels): PGD-AT on small synthetic images, long enough to mean something."""
    out, data = tmp_path_factory.mktemp("trained") / "run", ltsd.make_synthetic(120, 6, size=16)
    line = "--data synthetic --ir 1 --epochs 4 --batch-size 64 --steps 3 --method pgd-at --stage train --device cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ltsd, "make_synthetic", lambda: dataclasses.replace(data))
        assert ltsd.main([*line.split(), "--test-limit", "10", "--out", str(out)]) == 0
    model = ltsd.build_model("resnet8", 10)
    ltsd.load_weights(model, out / "last.pt")
    return model.eval(), ltsd.to_float(data.test_images), data.test_labels


KINDS = {(row.objective, row.init, row.low_precision): name for name, row in ltsd.METHODS.items() if row.objective}
QUICK = dict(eps=12 / 255, iterations=8, queries=30)
# points, and by how many the official result itself differs from seed to seed
PARITY = [("apgd-ce", 256, 4), ("apgd-t", 128, 1), ("fab-t", 96, 1), ("square", 128, 4), ("all", 64, 1)]
ROWS = {
    "natural": (None, "gauss"), **dict.fromkeys(("pgd-at", "awp"), (ltsd.cross_entropy_objective, "uniform")),
    **dict.fromkeys(("mart", "robal", "at-bsl", "ltsd"), (ltsd.cross_entropy_objective, "gauss")),
    "trades": (ltsd.kl_objective, "gauss"), "reat": (ltsd.weighted_objective, "uniform"),
}  # fmt: skip


@pytest.mark.parametrize("method", KINDS.values())  # rows that attack alike are attacked once
def test_the_fast_attack_is_as_strong_as_the_plain_one(trained, method):
    (model, x, y), row, counts = trained, ltsd.METHODS[method], torch.linspace(500, 50, 10)
    x = x.contiguous()  # the same noise for both
    plain, reached, hits = nn.Sequential(model), {}, {}  # a foreign module: unfolded, float32
    fast = ltsd.FrozenCopy(model, torch.bfloat16 if row.low_precision else torch.float32)
    with torch.no_grad():
        exact, clean = row.aux(plain, x, counts, counts), int((model(x).argmax(1) == y).sum())
    for name, net in (("plain", plain), ("fast", fast)):
        start = dict(init=row.init, generator=torch.Generator().manual_seed(0), aux=row.aux(net, x, counts, counts))
        threat = dict(eps=8 / 255, step_size=2 / 255, steps=10, objective=row.objective)
        with torch.no_grad():
            logits = model(ltsd.pgd_attack(net, x, y, **threat, **start))
            reached[name], hits[name] = float(row.objective(logits, y, exact)), int((logits.argmax(1) == y).sum())
    assert clean > 20 and hits["plain"] < clean - 4  # of 60: the attack has something to do
    assert reached["fast"] >= 0.99 * reached["plain"] and abs(hits["fast"] - hits["plain"]) <= 1


def log_p(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(p, q, floor=0.0):
    return (np.exp(log_p(p)) * (log_p(p) - np.log(np.exp(log_p(q)) + floor))).sum(1)


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y]


def slow_mart(logits, logits_adv, y, beta):
    rival = [max(np.delete(p, c)) for p, c in zip(np.exp(log_p(logits_adv)), y)]
    boosted = ce(logits_adv, y) - np.log(1.0001 - np.array(rival) + 1e-12)
    return (boosted + beta * kl(logits, logits_adv, 1e-12) * (1.0000001 - np.exp(-ce(logits, y)))).mean()


def slow_robal(scores, scores_adv, y, counts, scale, margin, tau_b, tau_m, beta):
    z, n = scale * scores_adv + tau_b * np.log(counts / counts.sum()), counts[y]
    z[np.arange(len(y)), y] -= scale * margin + tau_m * np.log(n / counts.min())
    return ce(z, y).mean() + beta * kl(scores, scores_adv, 1e-12).mean()


def slow_reat_weights(counts, predicted):
    effective = [sum((1 - 1 / n) ** k for k in range(a)) for n, a in zip(counts, predicted)]  # (1 - b^a) / (1 - b)
    weights = 1 / (np.array(effective) + 1e-5)
    return weights * len(counts) / weights.sum()


def slow_reat_tail(features, y, counts, variant, anchors=None):
    """anchors (default: the features): the side that carries no gradient."""
    anchors, u = features if anchors is None else anchors, np.sqrt(counts.sum() / counts)
    tail, total = [i for i, c in enumerate(y) if c > 2 * (len(counts) // 3)], 0.0
    for i in tail:
        pairs = kl(np.repeat(anchors[i : i + 1], len(y), 0), features)
        signed = np.where(y == y[i], -1, 1) * (u[y[i]] + u[y])
        separate = pairs.mean() / features.shape[1] * signed.mean()
        total += (separate if variant == "official" else (pairs * signed).mean()) / len(tail)
    return total


LOSSES = {  # name: ltsd's, an independent one
    "kd": (ltsd.distillation_loss, lambda student, teacher: kl(teacher, student).mean()),
    "igdm": (ltsd.igdm_loss, lambda s_plus, s_minus, t_plus, t_minus: kl(t_plus - t_minus, s_plus - s_minus).mean()),
    "balanced_softmax": (ltsd.balanced_softmax_loss, lambda z, y, counts, tau: ce(z + tau * np.log(counts), y).mean()),
    "trades": (ltsd.trades_loss, lambda z, z_adv, y, beta: ce(z, y).mean() + beta * kl(z, z_adv).mean()),
    "mart": (ltsd.mart_loss, slow_mart), "robal": (ltsd.robal_loss, slow_robal),
    "reat_weights": (ltsd.reat_class_weights, slow_reat_weights), "reat_tail": (ltsd.reat_tail_loss, slow_reat_tail),
}  # fmt: skip
ROBAL = ("scale", "margin", "tau_b", "tau_m", "beta")


def loss_cases():
    """(name, arguments): random, one image, near-certain logits, two classes."""
    for seed, (rows, classes, spread) in enumerate([(8, 10, 2.0), (1, 10, 2.0), (5, 10, 25.0), (6, 2, 1.0)]):
        rng, counts = np.random.default_rng(seed), np.geomspace(500, 5, classes).round()
        a, b, c, d = rng.normal(0, spread, (4, rows, classes))
        y, predicted = rng.integers(0, classes, rows), rng.integers(0, 300, classes)
        yield from [("balanced_softmax", (a, y, counts, tau)) for tau in (0.5, 1.0)]
        yield from [("kd", (a, b)), ("igdm", (a, b, c, d)), ("trades", (a, b, y, 5.0)), ("mart", (a, b, y, 5.0))]
        yield ("robal", (np.tanh(a), np.tanh(b), y, counts, 10.0, 0.1, 1.5, 0.3, 6.0))
        yield from [("reat_tail", (d, y, counts, variant)) for variant in ("official", "intended")]
        yield ("reat_weights", (counts, predicted))


def call(name, arguments, dtype=torch.float64):
    given = [torch.as_tensor(np.asarray(v)) if isinstance(v, (np.ndarray, list)) else v for v in arguments]
    given = [v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for v in given]
    kept = copy.deepcopy(given)
    named = dict(zip(ROBAL, given[4:])) if name == "robal" else {}
    got = LOSSES[name][0](*(given[:4] if named else given), **named)
    assert all(torch.equal(v, k) for v, k in zip(given, kept) if torch.is_tensor(v))  # nothing changed in place
    return got


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_its_independent_evaluation(name):
    for arguments in [arguments for other, arguments in loss_cases() if other == name]:
        want, got = LOSSES[name][1](*arguments), call(name, arguments)
        assert np.allclose(got.numpy(), want, rtol=1e-9 if got.dtype == torch.float64 else 1e-6)
        assert np.allclose(call(name, arguments, torch.float32).numpy(), want, rtol=3e-4, atol=3e-4)
    place = {"balanced_softmax": 2, "robal": 3}.get(name)
    for odd in (np.ones(1), np.ones(3), np.ones((1, 2))) if place else ():
        with pytest.raises(ValueError, match="one count for each of 2 classes"):
            call(name, [*arguments[:place], odd, *arguments[place + 1 :]])


@pytest.mark.parametrize("name, differentiable", [("trades", 2), ("mart", 2), ("robal", 2), ("igdm", 2), ("kd", 1)])
def test_a_loss_passes_gradcheck(name, differentiable):
    """Also says what has gradient: both sides of TRADES' and MART's KL, never a teacher."""
    arguments = next(arguments for other, arguments in loss_cases() if other == name)
    tensors = [torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in arguments]
    inputs = [t.requires_grad_() for t in tensors if torch.is_tensor(t) and t.ndim == 2]
    named = dict(zip(ROBAL, tensors[4:])) if name == "robal" else {}
    rest, loss = tensors[differentiable : 4 if named else None], LOSSES[name][0]
    assert torch.autograd.gradcheck(lambda *ts: loss(*ts, *rest, **named), inputs[:differentiable])
    gradients = torch.autograd.grad(loss(*inputs, *tensors[len(inputs) : 4], **named), inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [i < differentiable for i in range(len(inputs))]


@pytest.mark.parametrize("variant", ["official", "intended"])
def test_reats_tail_term_has_the_gradient_of_its_live_side_only(variant):
    """Finite differences with fixed anchors: gradcheck cannot know that one side is detached."""
    f, y = np.random.default_rng(0).normal(size=(5, 3)), np.array([0, 1, 2, 2, 3])
    live, counts = torch.tensor(f, requires_grad=True), np.array([50.0, 20, 9, 5])
    ltsd.reat_tail_loss(live, torch.tensor(y), counts, variant).backward()
    for gradient, nudge in zip(live.grad.flatten().tolist(), 1e-5 * np.eye(15).reshape(15, 5, 3)):
        up, down = (slow_reat_tail(f + side * nudge, y, counts, variant, f) for side in (1, -1))
        assert gradient == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_awp_perturbs_by_its_formula_and_restores_the_weights():
    model, x, y = net_with_history().train(), torch.rand(8, 3, 16, 16), torch.arange(8)
    model.layer3.requires_grad_(False)
    before, probe = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    F.cross_entropy(probe(x), y).backward()
    steps = {k: torch.zeros_like(v) for k, v in before.items()}
    for name, p in probe.named_parameters():
        if p.dim() > 1 and p.requires_grad:
            steps[name] = 0.01 * p.detach().norm() * p.grad / p.grad.norm()
    assert sum(bool(v.any()) for v in steps.values()) == 7  # six convolutions, the head

    def restored():  # to the rounding of w + v - v
        now, ulp = model.state_dict(), torch.finfo(torch.float32).eps
        return all(((now[k] - v).abs() <= ulp * (v.abs() + 1.1 * steps[k].abs())).all() for k, v in before.items())

    with ltsd.awp_perturbation(model, lambda: F.cross_entropy(model(x), y), 0.01):
        for name, now in model.state_dict().items():
            assert torch.allclose(now, before[name] + steps[name], rtol=1e-4, atol=1e-6), name
    assert restored()
    for loss in (lambda: F.cross_entropy(model(x), y), lambda: failing(model(x))):
        with pytest.raises(RuntimeError, match="inside"), ltsd.awp_perturbation(model, loss, 0.01):
            failing()
        assert restored()
    odd = [(lambda bad=bad: bad * F.cross_entropy(model(x), y), 0.01) for bad in (math.nan, math.inf)]
    for loss, size in (*odd, (failing, 0.0)):
        with ltsd.awp_perturbation(model, loss, size):
            assert restored()


@pytest.mark.parametrize("method", ltsd.METHODS)
def test_a_row_of_methods_minimises_its_loss_and_names_its_attack(method):
    row = ltsd.METHODS[method]
    assert (row.objective, row.init) == ROWS[method] and row.teacher == (method == "ltsd")
    torch.manual_seed(1)
    model, teacher = ltsd.build_model("resnet8", 10, row.head).train(), ltsd.FrozenCopy(net_with_history())
    x, y = torch.rand(6, 3, 16, 16), torch.tensor([0, 3, 8, 9, 9, 1])
    cfg, counts = ltsd.Config(method=method, beta=5.0, tau=0.7), torch.linspace(90, 9, 10)
    batch = ltsd.Batch(model, x, (x + 0.1 * torch.randn_like(x)).clamp(0, 1), y, counts, cfg, 7.0, teacher)
    loss, logits = row.loss(batch)
    x_adv, (adv, features), minus = batch.x_adv, model(batch.x_adv, with_features=True), 2 * x - batch.x_adv
    plain, balanced, clean = F.cross_entropy(adv, y), ltsd.balanced_softmax_loss(adv, y, counts, 0.7), model(x)
    want = {
        "natural": plain, "pgd-at": plain, "awp": plain, "at-bsl": balanced,
        "trades": ltsd.trades_loss(clean, adv, y, 5.0), "mart": ltsd.mart_loss(clean, adv, y, 5.0),
        "robal": ltsd.robal_loss(clean, adv, y, counts, scale=10.0, margin=0.1, tau_b=1.5, tau_m=0.3, beta=5.0),
        "reat": balanced + ltsd.reat_tail_loss(features, y, counts),
        "ltsd": balanced + 7 * ltsd.igdm_loss(adv, model(minus), teacher(x_adv), teacher(minus)),
    }  # fmt: skip
    assert torch.allclose(loss, want[method], rtol=1e-5) and torch.equal(logits, adv) and loss.requires_grad
    if row.teacher:
        batch.cfg, want = dataclasses.replace(cfg, kd="kl"), balanced + 7 * ltsd.distillation_loss(adv, teacher(x_adv))
        assert torch.allclose(row.loss(batch)[0], want, rtol=1e-5)


def blobs(count, seed=3):
    """Blurred class prototypes plus noise, [count, 3, 12, 12], and their labels."""
    prototypes = torch.rand(10, 3, 3, 3, generator=torch.Generator().manual_seed(99))
    prototypes = F.interpolate(prototypes, size=12, mode="bilinear") * 0.5 + 0.25
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (count,), generator=g)
    return (prototypes[y] + 0.25 * torch.randn(count, 3, 12, 12, generator=g)).clamp(0, 1), y


@pytest.fixture(scope="session")
def foreign():
    """A small foreign network after 120 steps of adversarial training."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(216, 10))
    (x, y), optimizer = blobs(2048, seed=1), torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(120):
        rows = torch.arange(128) + 128 * (step % 16)
        x_adv = ltsd.pgd_attack(net, x[rows], y[rows], eps=8 / 255, step_size=5 / 255, steps=2)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y[rows]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def robust(net, x, y):
    return net(x).argmax(1) == y


@pytest.mark.parametrize("attack, points, apart", PARITY)
def test_autoattack_is_on_a_par_with_the_official_package_in_few_iterations(foreign, attack, points, apart):
    official, (x, y) = pytest.importorskip("pyautoattack"), blobs(points, seed=7)
    names = list(ltsd.AUTOATTACK) if attack == "all" else [attack]
    ours = ltsd.autoattack(foreign, x, y, eps=14 / 255, attacks=names, iterations=8, queries=400)
    theirs = official.AutoAttack(foreign, attacks=names, eps=14 / 255, version="custom", seed=0)
    theirs.apgd.n_restarts, theirs.fab.n_restarts, theirs.square.n_queries = 1, 1, 400
    theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = 8
    reference, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    ours, theirs = (int(robust(foreign, images, y).sum()) for images in (ours, reference))
    assert abs(ours - theirs) <= apart and 0.2 * points < theirs < 0.8 * points


def test_targeted_dlr_by_hand():
    logits, lane = torch.tensor([[0.0, 3.0, 5.0, 1.0, 2.0]]), dict(y=torch.tensor([2]), target=torch.tensor([1]))
    assert ltsd.targeted_dlr(logits, lane).item() == pytest.approx((3 - 5) / (5 - (2 + 1) / 2))


def test_apgd_halves_its_step_at_the_papers_checkpoints():
    attack = ltsd.APGD(always(1.0, 0.0).eval(), 0.1, 100, 0.0, lambda logits, lane: -ltsd.margin(logits, lane["y"]))
    zero, sizes = torch.zeros(1, dtype=torch.int64), []
    attack.start(lane := dict(key=zero, step=zero, y=zero, x0=torch.full((1, 3, 4, 4), 0.5)))
    for step in range(100):
        lane["step"] = zero + step
        attack.advance(lane)
        sizes.append(round(math.log2(0.2 / lane["size"].item()), 3))
    assert [sizes.index(halvings) for halvings in range(9)] == [0, 22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 1000.0])
def test_the_projection_equals_brute_force(scale):
    """Bisection on the length that every coordinate moves, cut at its room, in float64."""
    g = torch.Generator().manual_seed(1)
    t, w, gap = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((40, 900), (40, 900), (40,)))
    t, w, gap = t.sigmoid(), w**5, gap * 30 * scale  # heavy tails: more turns of Newton than a network ever takes
    t[:10, :450], t[10:20, :450], w[5:30:2, ::3], w[3], gap[7] = 0, 1, 0, 0, 0  # no room, no direction, nothing to do
    gap[30:] = 0.9999 * (w.abs() * torch.where(w > 0, t, 1 - t)).sum(1)[30:]  # nearly all of the room
    direction = -(w * gap[:, None]).sign()
    room, low, high = torch.where(direction > 0, 1 - t, t), torch.zeros(40, 1), torch.ones(40, 1)
    for _ in range(100):
        middle = (low.double() + high) / 2
        short = (w.abs() * torch.minimum(middle, room)).sum(1, keepdim=True) < gap.abs()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    want = direction * torch.minimum(high, room)
    assert (ltsd.project_linf(t, w, gap) - want).abs().max() < 1e-12
    assert (ltsd.project_linf(t.float(), w.float(), gap.float()) - want).abs().max() < 1e-4


@pytest.mark.parametrize("names", [("apgd-ce",), ("apgd-t",), ("fab-t",), ("square",), ltsd.AUTOATTACK], ids="+".join)
def test_results_depend_neither_on_the_batch_size_nor_on_the_order(foreign, names):
    (x, y), net, order = blobs(24), copy.deepcopy(foreign).double(), torch.arange(24).flip(0)
    options = dict(eps=14 / 255, attacks=names, iterations=10, queries=40)
    want = ltsd.autoattack(net, x.double(), y, **options)
    others = [ltsd.autoattack(net, x.double(), y, batch_size=size, **options) for size in (5, 16)]
    others.append(ltsd.autoattack(net, x.double()[order], y[order], index=order, **options)[order])
    net.sizes, seen = (1,), set()  # as a compiled copy has them: its lanes come in few sizes
    net.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    others.append(ltsd.autoattack(net, x.double(), y, batch_size=70, **options))
    assert seen <= {24, 35, 17} and want.dtype == torch.float64 and 0 < robust(net, want, y).sum() < 24
    assert all((other - want).abs().max() < 1e-9 for other in others)
    if names == ("square",):  # nothing but draws: they do depend on seed and index
        for change in (dict(seed=1), dict(index=order)):
            assert not torch.equal(ltsd.autoattack(net, x.double(), y, **options | change), want)


def test_fooled_images_fool_and_the_rest_are_unchanged(trained):
    net, x, y, lines, state = trained[0], trained[1][:40], trained[2][:40], [], {}
    x_adv = ltsd.autoattack(net, x, y, log=lines.append, state=state, **QUICK)
    kept = robust(net, x_adv, y)
    assert torch.equal(x_adv[kept], x[kept]) and 0 < kept.sum() < robust(net, x, y).sum()
    assert (x_adv - x).abs().max() <= QUICK["eps"] + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert ltsd.autoattack(net, x.double(), y, batch_size=16, **QUICK).dtype == torch.float64  # logits are float32
    assert [line.split()[0] for line in lines] == ["clean", *ltsd.AUTOATTACK]
    shares = [float(line.split(" %")[0].split()[-1]) for line in lines]
    assert shares == sorted(shares)[::-1] and shares[-1] == pytest.approx(100 * kept.double().mean().item(), abs=0.006)
    calls, counting = [], nn.Sequential(net)
    counting.register_forward_hook(lambda *_: calls.append(1))
    assert list(state) == list(ltsd.AUTOATTACK)  # a second call with the state attacks no more
    assert torch.equal(ltsd.autoattack(counting, x, y, state=state, **QUICK), x_adv) and len(calls) <= 4


def test_a_network_that_only_steers_decides_nothing(foreign):
    # lying: what is right is fooled, it claims, and climbs towards nothing
    (x, y), lying = blobs(40), lambda z: foreign(z).roll(1, 1)
    coarse, right = copy.deepcopy(foreign).bfloat16(), lambda images: robust(foreign, images, y)
    want = right(ltsd.autoattack(foreign, x, y, **QUICK))
    low = ltsd.autoattack(foreign, x, y, nets=(lambda z: coarse(z.bfloat16()).float(), foreign), **QUICK)
    assert (right(low) != want).sum() <= 1
    for lying.dtype in (torch.float32, torch.bfloat16):
        lied = ltsd.autoattack(foreign, x, y, nets=(lying, foreign), state=(state := {}), **QUICK)
        fooled = (right(x) & ~right(lied)).sum()
        assert sum(len(found["rows"]) for found in state.values()) == fooled < (right(x) & ~want).sum()


def test_every_lane_draws_its_own_noise_and_ends_with_an_exact_look_at_its_best_point(foreign, monkeypatch):
    (x, y), keys, said, start, fooled = blobs(40), [], [], ltsd.APGD.start, ltsd.is_fooled
    monkeypatch.setattr(ltsd.APGD, "start", lambda self, lane: keys.extend(lane["key"].tolist()) or start(self, lane))
    claims = lambda logits, y, near=0.0: fooled(logits, y, near) & (logits.data_ptr() != said[-1].data_ptr())  # noqa: E731
    monkeypatch.setattr(ltsd, "is_fooled", claims)  # what steers never claims
    for name in ltsd.AUTOATTACK:
        options = QUICK | dict(queries=300, nets=(lambda z: said.append(foreign(z)) or said[-1], foreign))
        assert not torch.equal(ltsd.autoattack(foreign, x, y, attacks=(name,), **options), x), name
    assert len({*keys}) == len(keys) > 100


def test_a_fab_step_by_its_formula():
    torch.manual_seed(0)
    (x0, noise), zero = torch.rand(2, 64, 1, 4, 4).double(), torch.zeros(64, dtype=torch.int64)
    attack, z, w = ltsd.FAB(model := Linear().double(), 0.3, 9, 1), (x0 + 0.2 * noise - 0.1).clamp(0, 1), model.weight
    w, lane = (w[1] - w[0]).detach().expand(64, 16), dict(x0=x0, y=zero, target=zero + 1)
    attack.start(lane)
    lane["z"], ends = z, [z.flatten(1), x0.flatten(1)]
    steps = [ltsd.project_linf(end, w, (end * w).sum(1)) for end in ends]
    near, far = (step.abs().amax(1, keepdim=True) for step in steps)
    alpha, (z, x0) = (near / (near + far)).clamp(max=0.1), (end + 1.05 * step for end, step in zip(ends, steps))
    want = ((1 - alpha) * z + alpha * x0).clamp(0, 1)
    back = torch.where((want * w).sum(1, keepdim=True) > 0, ends[1] + 0.9 * (want - ends[1]), want)
    assert torch.allclose(attack.advance(lane)[0].flatten(1), want) and not torch.equal(back, want)
    assert torch.allclose(lane["z"].flatten(1), back)


@pytest.mark.parametrize("name, dtype", [*itertools.product(ltsd.AUTOATTACK, [torch.float16, torch.bfloat16])])
def test_a_low_precision_copy_steers_to_the_same_verdicts(trained, name, dtype):
    model, x, y = trained
    exact, quick = ltsd.FrozenCopy(model), QUICK | dict(eps=8 / 255, attacks=(name,))
    steers = exact, ltsd.FrozenCopy(model, dtype)
    want, got = (robust(exact, ltsd.autoattack(exact, x, y, nets=(net, exact), **quick), y) for net in steers)
    assert (want != got).sum() <= 1 and want.sum() < robust(exact, x, y).sum() - 4


def test_fp16_attacks_keep_the_sign_of_tiny_gradients():
    """A confident image's gradient, here about 1e-10, is below fp16's least number, 6e-8."""
    model, x, y = net_with_history(), torch.rand(64, 3, 16, 16), torch.zeros(64).long()
    with torch.no_grad():
        model.linear.bias[0] = 12
    threat = dict(eps=0.1, step_size=0.05, steps=1, init="none")
    nets = [ltsd.FrozenCopy(model, dtype) for dtype in (torch.float32, torch.float16)]
    (exact, half), loss = (ltsd.pgd_attack(net, x, y, **threat) for net in nets), nn.CrossEntropyLoss(reduction="none")
    gradient, low = (ltsd.input_gradient(net, x, lambda logits: loss(logits, y))[2] for net in nets)
    assert gradient.abs().max() < 1e-6 and (exact != x).all() and (half == exact).float().mean() > 0.99
    assert (low.sign() == gradient.sign()).float().mean() > 0.98
    with torch.no_grad():
        model.conv1.weight.mul_(1e9)  # beyond float16, harmless in float32
    with pytest.warns(UserWarning, match="overflows"):
        assert ltsd.checked(nets[1].refresh(), nets[0].refresh(), x, y) == (nets[0], nets[0])


def test_the_bench_writes_its_schema(tmp_path, monkeypatch, capsys):
    real, core = ltsd.build_model, ltsd.bench_core  # what is timed, not how fast, is checked: a small network will do
    monkeypatch.setattr(ltsd, "build_model", lambda arch, *rest: real("resnet8", *rest))
    monkeypatch.setattr(ltsd, "make_synthetic", functools.partial(ltsd.make_synthetic, 8, 3))
    monkeypatch.setattr(ltsd, "bench_core", lambda cfg, batch, steps, rounds: core(cfg, batch // 16, steps, 1))
    assert ltsd.main(f"--stage bench --device cpu --amp off --out {tmp_path}".split()) == 0
    result, said = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert set(result) == {"header", "attack", "train_step", "kernel", "forward", "autoattack", "matmul_share"}
    assert list(result["autoattack"]) == list(ltsd.AUTOATTACK) and "lever plain" in said
    assert all(took["ours_s"] > 0 and "official_s" in took for took in result["autoattack"].values())
    assert result["header"]["amp"] == "off" and result["kernel"] == [] and result["matmul_share"] > 0
    for part, rows in itertools.product(("attack", "train_step"), (slice(0, 2), slice(2, 4))):
        plain, ours = result[part][rows]
        assert plain["lever"] == "plain" and plain["ratio"] == 1 and ours["batch"] == plain["batch"]
        assert ours["ratio"] == pytest.approx(ours["images_per_s"] / plain["images_per_s"])


# 33 images in batches of 16, the last of them a single image
RUN = "--data synthetic --ir 3 --train-limit 60 --test-limit 10 --steps 1 --eval-steps 2 --lr 0.02 --teacher-epochs 2"
RUN = f"{RUN} --epochs 5 --batch-size 16 --teacher-batch-size 8 --device cpu --amp off".split()
U8, Y = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


@functools.cache
def synthetic():
    return ltsd.make_synthetic()


def launch(out, *words, stop=("augment", 0)):
    """ltsd.main on RUN's settings and these; stop=(function, n): its n-th call is a Ctrl-C in its place."""
    real, calls = getattr(ltsd, stop[0]), []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == stop[1]:
            raise KeyboardInterrupt
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as m:
        images = synthetic()
        m.setattr(ltsd, "make_synthetic", lambda: ltsd.replace(images))
        m.setattr(ltsd, stop[0], failing)
        return ltsd.main([*RUN, "--out", str(out), *words])


def spy(m, name):
    """The list of a function's calls to come, each as (args, options)."""
    seen, real = [], getattr(ltsd, name)
    m.setattr(ltsd, name, lambda *args, **options: seen.append((args, options)) or real(*args, **options))
    return seen


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def results(out):
    return json.loads((out / "results.json").read_text())


def entries(out):
    """The figures of each checkpoint, without the threat in its key."""
    return {key.partition(",")[0]: entry for key, entry in results(out)["checkpoints"].items()}


def rows(out):
    """What of a run's epochs stands in its log, as in 'student 3/5 lr 0.02 loss 2.1 train 9.1'."""
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    return [" ".join(row.split()[:8]) for row in re.findall(r"^(?:teacher|student) +\d+/\d+ .*", log, re.M)]


def assert_same_run(a, b, *names):
    for name in names or ("teacher", "best", "last"):
        assert equal_weights(weights(a / f"{name}.pt"), weights(b / f"{name}.pt")), name
    one, two = results(a), results(b)
    for result in (one, two):
        del result["seconds"], result["config"]["out"], result["config"]["stage"]
    assert one == two and set(rows(a)) == set(rows(b))


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A finished run of the whole pipeline; not to be changed: copy it."""
    assert launch(out := tmp_path_factory.mktemp("whole") / "run") == 0
    return out


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copy")


RESUMED = [*ltsd.METHODS, "margin --beta 0.1", "reat --aug ra --batch-size 11 --reat-tail intended"]
RESUMED += ["ltsd --teacher-data full --teacher-method robal --kd kl"]


@pytest.mark.parametrize("method", RESUMED)
def test_a_stopped_run_ends_bit_identical(method, tmp_path, capsys, monkeypatch):
    """Every method, and one added from outside; also a set of whole batches (33 images, 3 of 11)."""
    hinge = nn.functional.multi_margin_loss
    own = ltsd.Method(lambda b: (hinge(z := b.student(b.x_adv), b.y) + b.cfg.beta * z.norm(), z), init="uniform")
    monkeypatch.setitem(ltsd.METHODS, "margin", own)
    words = f"--epochs 2 --teacher-epochs 1 --attacks clean --method {method}".split()
    epoch = 3 if "ltsd" in words else 2  # its teacher's comes first
    assert launch(tmp_path / "a", *words) == 0
    assert launch(tmp_path / "b", *words, stop=("augment", epoch)) == 130 and not (tmp_path / "b" / "last.pt").exists()
    one_line(capsys, "the same command goes on")
    assert launch(tmp_path / "b", *words) == 0 and "student: going on after epoch 1" in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b", "best", "last")
    assert len(rows(tmp_path / "b")) == epoch
    assert all(v.isfinite().all() for v in weights(tmp_path / "a" / "last.pt").values())
    assert f"| synthetic IR 3 resnet8 {method.split()[0]}" in (tmp_path / "b" / "report.md").read_text()


def fake_clock(m):
    """Each epoch takes a second and all else nothing; returns the list of the epochs and of the files written."""
    events, augment, move = [], ltsd.augment, os.replace
    m.setattr(time, "perf_counter", lambda: float(events.count("epoch")))
    m.setattr(ltsd, "augment", lambda *args: events.append("epoch") or augment(*args))
    m.setattr(os, "replace", lambda old, new: events.append(pathlib.Path(new).name) or move(old, new))
    return events


def test_a_kill_before_or_after_any_write_loses_no_saved_epoch(tmp_path, monkeypatch):
    """What a SIGKILL leaves is what lies in the folder at that moment: copied before each write and after the last."""
    out, left, again = tmp_path / "run", [], tmp_path / "again"
    words = "--batch-size 64 --teacher-batch-size 64 --teacher-epochs 1 --attacks clean".split()
    figures = functools.partial(dict.fromkeys, ("clean", "pgd"))  # fast, and of these weights only
    monkeypatch.setattr(ltsd, "evaluate", lambda model, *a, **kw: figures(int(ltsd.weights_crc32(model), 16) % 100))
    monkeypatch.setattr(os, "fsync", lambda file: None)
    with monkeypatch.context() as m:
        events, move = fake_clock(m), os.replace
        count, copy = functools.partial(events.count, "state.pt"), functools.partial(shutil.copytree, out)
        m.setattr(os, "replace", lambda *a: left.append((copy(tmp_path / f"{len(left)}"), count())) or move(*a))
        assert launch(out, *words) == 0
    assert events.count("epoch") == events.count("state.pt") == 6 and len(left) >= 15
    for folder, saved in left:
        if 1 < saved < 6:  # stopped before the first epoch that it goes on with
            shutil.copytree(folder, again)
            assert launch(again, *words, stop=("augment", 1)) == 130
            best = torch.load(again / "state.pt", weights_only=True)["at"]["best"]
            assert not best or equal_weights(best["weights"], weights(again / "best.pt"))
            shutil.rmtree(again)
        before = len(rows(folder))
        assert launch(folder, *words) == 0
        assert len(rows(folder)) - before == 6 - saved and not list(folder.glob("*.tmp"))
        assert_same_run(out, folder)


def environment(**more):
    threads = str(torch.get_num_threads())  # another number rounds otherwise
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": os.path.dirname(ltsd.__file__), **more}


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_process_killed_again_and_again_ends_bit_identical(whole_run, tmp_path, capsys):
    """First by Ctrl-C, in one line, while another process may not use its folder; then by SIGKILL at any moment."""
    out, dice, pipes = tmp_path / "run", random.Random(1), dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children would ignore it
    for number in (signal.SIGINT, *[signal.SIGKILL] * 3):
        command, before = [sys.executable, ltsd.__file__, *RUN, "--out", str(out)], len(rows(out))
        with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
            while len(rows(out)) <= before and process.poll() is None:
                time.sleep(0.002)
            try:
                if number == signal.SIGINT:
                    process.send_signal(signal.SIGSTOP)
                    log = (out / "log.txt").read_text()
                    assert launch(out) == launch(out, "--overwrite") == 2
                    assert "is in use by another process: wait for it" in capsys.readouterr().err
                    assert (out / "log.txt").read_text() == log
                time.sleep(dice.uniform(0, 0.15) * (number == signal.SIGKILL))
            finally:
                process.send_signal(number)
                process.send_signal(signal.SIGCONT)
            said = process.communicate(timeout=60)[1]
        if number == signal.SIGINT:
            assert said.startswith("ltsd: stopped; the same command goes on") and said.count("\n") == 1
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), said
    assert launch(out) == 0
    assert_same_run(whole_run, out)


def test_learning_rates():
    rates = {1: 0.1, 75: 0.1, 76: 0.01, 90: 0.01, 91: 0.001, 100: 0.001}
    assert {e: round(ltsd.lr_at(e, 100, 0.1), 9) for e in rates} == rates


def test_stages_run_alone_and_what_is_done_is_not_repeated(whole_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a"
    for stage in ("distill", "eval"):
        assert launch(out, "--stage", stage) == 2
        one_line(capsys, "teacher.pt")
    for stage in ("teacher", "train", "eval"):
        assert launch(out, "--stage", stage) == 0
    assert_same_run(whole_run, out)
    assert [row.split()[3] for row in rows(out)] == "0.02 0.0002 0.02 0.02 0.02 0.002 0.0002".split()
    monkeypatch.setattr(ltsd, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(ltsd, "evaluate", lambda *a, **kw: pytest.fail("evaluated again"))
    capsys.readouterr()
    assert launch(out) == 0 and "best (epoch" in capsys.readouterr().out
    for stage in ("eval", "distill"):
        assert launch(out, "--stage", stage, "--overwrite") == 2
        one_line(capsys, f"would delete what --stage {stage} needs")
    monkeypatch.undo()
    assert launch(out, "--overwrite", stop=("augment", 1)) == 130 and not (out / "last.pt").exists()


def test_another_configuration_or_other_images_in_the_same_folder_are_refused(copied_run, capsys, monkeypatch):
    assert launch(copied_run, "--seed", "1", "--lr", "0.5") == 2
    one_line(capsys, "(lr 0.02 there, 0.5 here, seed 0 there, 1 here)", "--overwrite")
    old = synthetic()
    other = ltsd.replace(old, train_images=old.train_images + (old.train_images < 255))
    monkeypatch.setattr(sys.modules[__name__], "synthetic", lambda: other)
    assert launch(copied_run) == 2
    one_line(capsys, "(images ", "--overwrite")


@pytest.mark.parametrize("name,number", [("state.pt", 5), ("best.pt", 1), ("results.json", 2), ("loss", 8)])
def test_a_full_disk_or_divergence_is_named_and_costs_no_epoch(name, number, whole_run, tmp_path, capsys, monkeypatch):
    """The eighth loss is the second of epoch 3's three."""
    out, row, losses = tmp_path / "a", ltsd.METHODS["ltsd"], []

    def loss(batch):
        losses.append(row.loss(batch))
        return losses[-1][0] * (math.nan if name == "loss" and len(losses) == number else 1), losses[-1][1]

    def full(source, target):
        if pathlib.Path(target).name == name and events.count(name) == number - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        move(source, target)

    with monkeypatch.context() as m:
        events, move = fake_clock(m), os.replace
        m.setattr(os, "replace", full)
        m.setitem(ltsd.METHODS, "ltsd", ltsd.replace(row, loss=loss))
        assert launch(out) == 2
    diverged = ("the loss was not finite", "epoch 3, up to step", "--lr")
    one_line(capsys, *diverged if name == "loss" else (f"cannot write {out / name}", "No space left on device"))
    before, saved = len(rows(out)), events.count("state.pt")
    assert launch(out) == 0
    assert_same_run(whole_run, out)
    assert len(rows(out)) - before == 7 - saved


@pytest.mark.parametrize("name", ["state.pt", "results.json", "config.json", "best.pt", "teacher.pt"])
def test_a_damaged_file_is_named_in_one_line(name, copied_run, tmp_path, capsys):
    path, damaged = copied_run / name, [b"[1]", (copied_run / name).read_bytes()[:300]]
    if name == "state.pt":  # whole, but of another network
        assert launch(tmp_path / "b", "--method", "robal", "--epochs", "1", "--stage", "distill") == 0
        damaged.append((tmp_path / "b" / name).read_bytes())
    if name in ("state.pt", "teacher.pt"):
        (copied_run / "last.pt").unlink()
    for content in damaged:
        capsys.readouterr()
        path.write_bytes(content)
        assert launch(copied_run) == 2
        one_line(capsys, str(path))


# Checks after each step that the weights agree, and that the gradient is the mean of the shares' own.
RANK_PROGRAM = """
import copy, sys, torch, ltsd

outer_step, close = ltsd.outer_step, torch.testing.assert_close

def checked_step(row, batch, model, *others):
    nets = [copy.deepcopy(model).train() for _ in range(2)]
    result = outer_step(row, batch, model, *others)
    one, two = ltsd.gather(ltsd.weights_of(model))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    (x, *_), (other_x, *_) = shares = ltsd.gather((batch.x, batch.x_adv, batch.y))
    assert x.shape == other_x.shape and not torch.equal(x, other_x)
    for net, (x, x_adv, y) in zip(nets, shares):
        row.loss(ltsd.replace(batch, student=net, x=x, x_adv=x_adv, y=y))[0].backward()
    for p, a, b in zip(model.parameters(), *(net.parameters() for net in nets)):
        close(p.grad, (a.grad + b.grad) / 2, rtol=1e-5, atol=1e-6)
    for p, a, b in zip(model.buffers(), *(net.buffers() for net in nets)):
        close(p, (a + b) / 2 if p.is_floating_point() else a)
    return result

ltsd.outer_step = checked_step
ltsd.evaluate.__kwdefaults__["batch_size"] = 6
ltsd.autoattack.__kwdefaults__ |= dict(iterations=3, queries=10, targets=2)
sys.exit(ltsd.main(sys.argv[1:]))
"""


def test_two_ranks_step_with_the_mean_gradient_and_evaluate_as_one_process(tmp_path, monkeypatch):
    out, words = tmp_path / "two", "--train-limit 240 --test-limit 20 --epochs 4 --eps 1 --batch-size 32 --lr 0.1"
    words = f"{words} --teacher-batch-size 32 --attacks clean,pgd,aa --eval-eps 12".split()
    with socket.create_server(("127.0.0.1", 0)) as free:
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    command = [sys.executable, "-c", RANK_PROGRAM, *RUN, *words, "--out", str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [subprocess.Popen(command, env=environment(**group, RANK=r, LOCAL_RANK=r), **pipes) for r in "01"]
    try:
        printed, errors = zip(*(rank.communicate(timeout=120) for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert "best (epoch" in printed[0] and not printed[1]
    assert results(out)["environment"]["device"].startswith("2 x cpu") and not list(out.glob("aa*.pt"))
    two = entries(out)
    (out / "results.json").unlink()
    monkeypatch.setitem(ltsd.evaluate.__kwdefaults__, "batch_size", 6)
    budget = ltsd.autoattack.__kwdefaults__ | dict(iterations=3, queries=10, targets=2)
    monkeypatch.setattr(ltsd.autoattack, "__kwdefaults__", budget)
    assert launch(out, *words, "--stage", "eval") == 0
    assert entries(out) == two and 0 < two["last"]["aa"] < two["last"]["clean"]


def test_what_several_ranks_cannot_do_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltsd, "WORLD", 2)
    for words in ("--batch-size 15", "--teacher-batch-size 7", "--stage report", "--stage bench", "--stage theory"):
        assert launch(tmp_path / "a", *words.split()) == 2 and not (tmp_path / "a").exists()
        one_line(capsys, f"{words}: {'works in one process' if 'stage' in words else 'must be a multiple of 2'}")


def always(*logits):
    """A network that says the same of every image of 4 x 4 pixels."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, len(logits))).train()
    nn.init.zeros_(net[2].weight)
    net[2].bias.data = torch.tensor(logits)
    return net


def test_evaluate_counts_right_refuses_odd_input_and_leaves_model_and_global_randomness_alone():
    net = always(1.0, 0.0, 0.5)
    got = ltsd.evaluate(net, U8, Y, tail=[0, 2], attacks=("clean",))
    assert got == dict(clean=62.5, class_clean=[100, 0, 0], tail_clean=500 / 6, balanced_clean=pytest.approx(100 / 3))
    even = ltsd.evaluate(net, U8[4:6], Y[4:6], tail=[2], attacks=("pgd",))
    assert even == dict(pgd=50.0, class_pgd=[100, 0], tail_pgd=None)  # no image of the tail; classes of equal size
    assert ltsd.evaluate(always(math.nan, 0.0, 0.0), U8, Y, attacks=("clean",))["clean"] == 0
    odd = [(U8.float(), Y, {}), (U8, Y[:3], {}), (U8[:0], Y[:0], {})]
    odd += [(U8, Y, more) for more in (dict(attacks="pgd"), dict(attacks=["PGD"]), dict(batch_size=0), dict(eps=8))]
    for images, labels, more in odd:
        with pytest.raises(ValueError, match="float32|int64 .3|N > 0|attacks .*, batch_size|divide by 255"):
            ltsd.evaluate(net, images, labels, **more)
    for net in (always(1.0, 0.0, 0.5), ltsd.build_model("resnet8", 3).train()):
        net[-1].eval()
        before, state = ltsd.weights_of(net), torch.get_rng_state()
        one, two = (ltsd.evaluate(net, U8, Y, steps=2, batch_size=5, seed=4) for _ in range(2))
        assert one == two and torch.equal(state, torch.get_rng_state()) and equal_weights(before, ltsd.weights_of(net))
        assert net.training and not net[-1].training and all(p.grad is None for p in net.parameters())


def test_an_entry_belongs_to_weights_test_images_and_threat(copied_run, monkeypatch):
    seen, first = spy(monkeypatch, "evaluate"), results(copied_run)
    shutil.copy(copied_run / "teacher.pt", copied_run / "last.pt")
    weak, usual = "--eval-eps 2 --eval-steps 20", "--eval-steps 20 --attacks clean"
    for words, evaluated in (("", 1), (weak, 4), (weak, 4), (usual, 7)):
        assert launch(copied_run, "--stage", "eval", *words.split()) == 0 and len(seen) == evaluated
    threats = [", eps 8 in 2 steps of 2", ", eps 2 in 20 steps of 2", ""]
    keys = [name + threat for threat in threats for name in ("teacher", "best", "last")]
    found = results(copied_run)["checkpoints"]
    assert list(found) == keys and found[keys[1]] == first["checkpoints"][keys[1]]
    assert found[keys[2]]["clean"] == found[keys[0]]["clean"]
    old = synthetic()
    other = ltsd.replace(old, test_images=old.test_images + (old.test_images < 255))
    monkeypatch.setattr(sys.modules[__name__], "synthetic", lambda: other)
    assert launch(copied_run, "--stage", "eval") == 0 and len(seen) == 10
    assert list(results(copied_run)["checkpoints"]) == keys[:3]
    assert results(copied_run)["data"]["test"]["crc32"] != first["data"]["test"]["crc32"]


def test_an_interrupted_autoattack_goes_on(copied_run, tmp_path, monkeypatch):
    """The teacher's row has no AutoAttack; best and last, here the same weights, are evaluated once."""
    shutil.copy(copied_run / "best.pt", copied_run / "last.pt")
    other, words = shutil.copytree(copied_run, tmp_path / "other"), ["--stage", "eval", "--attacks", "clean,pgd,aa"]
    budget = ltsd.autoattack.__kwdefaults__ | dict(iterations=3, queries=5, targets=2)
    monkeypatch.setattr(ltsd.autoattack, "__kwdefaults__", budget)
    ran, seen = spy(monkeypatch, "run_lanes"), spy(monkeypatch, "evaluate")
    assert launch(other, *words, stop=("run_lanes", 3)) == 130 and (other / "aa.pt").exists()
    assert launch(other, *words) == launch(copied_run, *words) == 0 and not (other / "aa.pt").exists()
    assert [args[0] for args, _ in ran] == [*ltsd.AUTOATTACK, *ltsd.AUTOATTACK]
    assert [options["attacks"] for _, options in seen] == [["aa"]] * 3
    figures, same = entries(other), entries(copied_run)
    assert figures == same and figures["best"] == figures["last"] and "aa" not in figures["teacher"]
    assert figures["best"]["aa"] <= figures["best"]["pgd"] and len(figures["best"]["class_aa"]) == 10


def test_a_foreign_checkpoint_is_scored(copied_run, tmp_path):
    path, net = tmp_path / "theirs.pt", ltsd.build_model("resnet8", 10)
    ltsd.load_weights(net, copied_run / "teacher.pt")
    torch.save({"net": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    data = ltsd.load_data(ltsd.resolve(ltsd.parse_args(RUN)))
    figures = ltsd.evaluate(net, data.test_images, data.test_labels, tail=[9])
    for out in (copied_run, tmp_path / "new"):  # a run's folder and a new one
        assert launch(out, "--stage", "eval", "--checkpoint", str(path), "--eval-steps", "20") == 0
        assert entries(out)[str(path)] == figures | {"epoch": None, "crc32": ltsd.weights_crc32(net)}


def fake_run(folder, *numbers, **settings):
    """A finished run's folder; numbers: clean, pgd, tail_clean, tail_pgd of best and last (epochs 99 and 100)."""
    cfg = ltsd.resolve(ltsd.Config(**dict(device="cpu", amp="off", compile="off") | settings))
    m = dict(zip(("clean", "pgd", "tail_clean", "tail_pgd"), numbers, strict=True))
    m |= {f"class_{k}": [m[k]] * 9 + [m[f"tail_{k}"]] for k in ("clean", "pgd")}
    data = dict(classes=list("abcdefghij"), tail_classes=[9])
    folder.mkdir()
    write_json(folder / "config.json", identity=ltsd.identity(cfg), config=ltsd.asdict(cfg))
    write_json(folder / "results.json", data=data, checkpoints=dict(best=m | dict(epoch=99), last=m | dict(epoch=100)))
    return folder


def write_json(path, **changes):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def report(capsys, tmp_path, *words):
    """(rows of cells, the other lines) of a report."""
    capsys.readouterr()
    assert ltsd.main(["--stage", "report", *map(str, words), "--out", str(tmp_path / "report")]) == 0
    lines = (tmp_path / "report" / "report.md").read_text().split("\n")
    assert "\n".join(lines).strip() in capsys.readouterr().out
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table, [line for line in lines if line and not line.startswith("|")]


def test_the_papers_numbers_stand_beside_the_papers_settings_only():
    def row(name="best", **settings):
        return ltsd.paper_row(ltsd.resolve(ltsd.Config(**dict(device="cpu", compile="off") | settings)), name)

    lines = [line.split() for line in ltsd.PAPER.strip().splitlines()]
    assert len({tuple(line[1:5]) for line in lines}) == len(lines) == 61
    for _, data, ir, arch, label, *numbers in lines:
        method, _, aug = label.replace("teacher", "ltsd").partition("+")
        for name, five in zip(["teacher"] if label == "teacher" else ["best", "last"], (numbers[:5], numbers[5:])):
            found = row(name, data=data, ir=float(ir), arch=arch, method=method, aug=aug or "none")
            assert list(found.values()) == [None if n == "-" else float(n) for n in five]
    assert row("last") == dict(clean=47.22, pgd=21.82, aa=18.53, tail_clean=37.9, tail_pgd=17.6)
    assert row(alpha=80.0, tau=2.0, seed=3, kd="kl", amp="off") == row()  # what the paper leaves open
    other = [dict(eps=2.0), dict(epochs=130), dict(train_limit=200), dict(gamma=1.0), dict(teacher_data="full")]
    other += [dict(eval_steps=10), dict(eval_eps=2.0), dict(ir=11.0), dict(milestones="0.5"), dict(data="synthetic")]
    for settings in (*other, dict(method="natural"), dict(teacher_epochs=3), dict(lr=0.2)):
        assert row(**settings) == {} == row("last", **settings)


def test_a_report_has_mean_and_deviation_over_seeds_and_the_papers_values_below(tmp_path, capsys):
    for seed, clean in enumerate((46.13, 46.57, 46.47, 46.59, 46.01)):  # Table 10, which gives 46.35 and 0.27
        fake_run(tmp_path / f"ltsd{seed}", clean, 20, 30, 10 + seed, seed=seed)
    fake_run(tmp_path / "one", 1, 2, 3, 4, method="trades", epochs=3)
    table, _ = report(capsys, tmp_path, tmp_path / "lts*", tmp_path / "one", tmp_path / "ltsd0")
    ours, one = (f"cifar100 IR 10 resnet18 {label}" for label in ("ltsd (5 runs)", "trades seed 0"))
    assert table[0] == ["setting", "checkpoint", "clean", "PGD-20", "T-clean", "T-PGD"]
    assert table[2] == [ours, "best (epoch 99)", "46.35 ± 0.27", "20.00 ± 0.00", "30.00 ± 0.00", "12.00 ± 1.58"]
    assert table[3] == ["", "paper", "46.13", "22.42", "38.90", "17.90"]
    assert table[4] == ["", "gap", "+0.22", "-2.42", "-8.90", "-5.90"]
    assert table[6][1:3] == ["paper", "47.22"] and table[7][1:3] == ["gap", "-0.87"]
    assert table[8:] == [[one, at, "1.00", "2.00", "3.00", "4.00"] for at in ("best (epoch 99)", "last (epoch 100)")]


def test_a_report_shows_an_unknown_method_and_another_threat_and_lists_what_it_cannot_show(tmp_path, capsys):
    good, magic, *broken = (fake_run(tmp_path / name, 50, 20, 30, 10) for name in "abcdefghi")
    config = json.loads((magic / "config.json").read_text())
    write_json(magic / "config.json", **{k: v | {"method": "magic"} for k, v in config.items()})
    weak = {"best, eps 2 in 10 steps of 2": {"pgd": 33.0, "epoch": 9}}
    for path, checkpoints in zip(broken, ({}, {"best": {"clean": "many"}}, weak)):
        write_json(path / "results.json", checkpoints=checkpoints)
    write_json(broken[3] / "config.json", config={"colour": 3})
    (broken[4] / "config.json").write_text("{")
    (broken[5] / "results.json").write_text("[]")
    (broken[6] / "results.json").unlink()
    paths = [*broken, tmp_path / "none*"]
    table, notes = report(capsys, tmp_path, good, magic, *paths)
    left = [line for line in notes if line.startswith("Left out: ")]
    assert len(left) == 8 and all(str(path) in line for path, line in zip(paths, left)) and table[2][2] == "50.00"
    assert [row[0] for row in table[8:]] == ["cifar100 IR 10 resnet18 magic seed 0"] * 2
    assert ltsd.main(["--stage", "report", *map(str, paths), "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, *map(str, paths))
    assert not (tmp_path / "o").exists()
    table, notes = report(capsys, tmp_path, broken[2], "--eval-eps", "2", "--eval-steps", "10")
    assert table[0][2] == "PGD-10" and [row[2] for row in table[2:]] == ["33.00"] and "eps 2/255" in notes[0]


def test_figures_show_the_means(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    for i, settings in enumerate([dict(alpha=10.0), dict(alpha=20.0), dict(gamma=2.0), dict(ir=50.0), {}]):
        fake_run(tmp_path / f"r{i}", 50 + i, 20, 30, 10, **settings)
    fake_run(tmp_path / "r5", 48, 21, 33, 11, alpha=10.0, seed=1)
    fake_run(tmp_path / "r6", 40, 15, 10, 5, method="at-bsl")
    drawn, real, words = {}, figure.Figure.savefig, [tmp_path / "r?", "--figures", tmp_path / "f"]
    monkeypatch.setattr(figure.Figure, "savefig", lambda f, at, **kw: drawn.update({at: f}) or real(f, at, **kw))
    report(capsys, tmp_path, *words)
    assert {*(tmp_path / "f").iterdir()} == {*map(pathlib.Path, drawn)}
    assert all(Image.open(path).size[0] > 500 for path in drawn)
    drawn = {pathlib.Path(p).stem: [[c.lines[0] for c in ax.containers] for ax in f.axes] for p, f in drawn.items()}
    at = {key: [[line.get_xydata().tolist() for line in ax] for ax in axes] for key, axes in drawn.items()}
    marks = [(*xy[0], line.get_marker()) for xy, line in zip(at["scatter"][0], drawn["scatter"][0])]
    hollow = [line.get_markerfacecolor() == "none" for line in drawn["scatter"][0]]
    other = next(kind for x, _, kind in marks if x == 40)
    ours = [(49, 20.5, "*"), (51, 20, "*"), (52, 20, "*"), (53, 20, "*"), (54, 20, "*"), (40, 15, other)]
    assert [mark for mark, empty in zip(marks, hollow) if not empty] == ours and other != "*"
    papers = {(46.13, 22.42, "*"), (45.38, 18.04, other), (38.09, 16.65, "*")}
    assert {mark for mark, empty in zip(marks, hollow) if empty} == papers
    assert at["classes"][0][0] == [[i, 20.5] for i in range(1, 10)] + [[10, 10.5]]
    assert at["ir"][0] == [[[10, 54], [50, 53]], [[10, 20], [50, 20]]]
    assert at["alpha"][0][0] == [[10, 49], [20, 51], [40, 54]] and at["alpha"][1][1] == [[10, 10.5], [20, 10], [40, 10]]
    assert at["scatter"][1][0] == [[31.5, 10.5]] and at["gamma"][0][0] == [[2, 52], [5, 54]]  # default gamma: IR/2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ltsd.main(["--stage", "report", *map(str, words), "--out", str(tmp_path)]) == 2
    one_line(capsys, "pip install matplotlib")


def test_a_given_teacher_is_copied_and_not_exchanged_nor_lost(whole_run, tmp_path, capsys):
    words, given = ["--epochs", "1", "--stage", "distill", "--teacher"], tmp_path / "a" / "teacher.pt"
    assert launch(tmp_path / "a", *words, str(whole_run / "teacher.pt")) == 0
    assert equal_weights(weights(whole_run / "teacher.pt"), weights(given))
    assert launch(tmp_path / "a", *words, str(whole_run / "last.pt")) == 2
    one_line(capsys, "has another teacher than")
    assert launch(tmp_path / "a", "--epochs", "1", "--overwrite", "--teacher", str(given)) == 0  # read, then emptied
    assert equal_weights(weights(whole_run / "teacher.pt"), weights(given))
