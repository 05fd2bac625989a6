"""Tests of ltsd.py, on a CPU: `python -m pytest -q test_ltsd.py`."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: waiting threads must not spin

import ast
import collections
import copy
import dataclasses
import errno
import functools
import hashlib
import inspect
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
import types
import warnings
import zipfile

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
    overwrite=True, checkpoint="c.pt", train_limit=11, test_limit=12, examples=13, figures="f", runs=("r1", "r2"),
)
PAPERS = dict(
    epochs=100, teacher_epochs=30, batch_size=128, teacher_batch_size=32, lr=0.1, weight_decay=5e-4, momentum=0.9,
    eps=8, step_size=2, steps=10, eval_eps=8, eval_step_size=2, eval_steps=20, attacks="clean,pgd,aa", tau=1, alpha=40,
    method="ltsd", teacher_method="pgd-at", teacher_data="balanced", kd="igdm", aug="none", official=False, beta=6,
    arch="resnet18", milestones="0.75,0.9", image_size=32, seed=0, stage="all", train_limit=None, data_dir="data",
)
DATA_DEFAULTS = [
    ("cifar10", dict(ir=50)), ("cifar100", dict(ir=10)), ("folder", dict(ir=None)),
    ("tinyimagenet", dict(ir=10, arch="preactresnet18", image_size=64)),
    ("synthetic", dict(ir=20, arch="resnet8", alpha=10, epochs=10, teacher_epochs=6, batch_size=32,
                       attacks="clean,pgd")),
]
MISTAKES = [  # arguments, then what the line must name
    ("--data imagenet", "--data", "'imagenet'", "synthetic"), ("--method frob", "--method", "'frob'", "at-bsl"),
    ("--method ltsd,", "--method", "''"), ("--arch resnet50", "--arch", "'resnet50'"), ("--amp in8", "--amp", "'in8'"),
    ("--stage dance", "--stage", "'dance'"), ("--teacher-method ltsd", "--teacher-method", "'ltsd'"),
    ("--epochs 1.5", "--epochs", "'1.5'"), ("--epochs 0", "--epochs", "'0'"), ("--seed 0,x", "--seed", "'x'"),
    ("--seed=-1", "--seed", "'-1'"), ("--seed", "--seed", "expected"), ("--batch-size 1e30", "--batch-size", "1e30"),
    ("--ir 0.5", "--ir", "'0.5'"), ("--eps nan", "--eps", "nan"), ("--eps 300", "--eps", "300", "255"),
    ("--alpha 1,inf", "--alpha", "inf"), ("--gamma 0", "--gamma", "'0'"), ("--out=", "--out", "''"),
    ("--milestones 75", "--milestones", "'75'"), ("--attacks pgd,fgsm", "--attacks", "'pgd,fgsm'"),
    ("--epoch 1", "--epoch"), ("--official --method natural", "--official", "natural"),
    ("--official --method ltsd,trades --data tinyimagenet", "--official", "trades", "tinyimagenet"),
    ("--image-size 64", "--image-size 64", "folder"), ("--stage eval --overwrite", "--overwrite", "eval"),
    ("--checkpoint x.pt", "--checkpoint x.pt", "--stage eval"), ("runs/a", "runs/a", "--stage report"),
    ("--device tpu", "--device tpu", "cuda:N"), ("--device cuda:99", "--device cuda:99"),
    ("--data synthetic --ir 1000", "1000", "class"), ("--stage report nowhere", "nowhere", "--stage eval"),
    ("--data folder --data-dir none", "--data-dir none", "/CLASS"), ("--data synthetic --stage eval", "teacher.pt"),
]
# fmt: on


def configs_of(*argv):
    return ltsd.expand(ltsd.parse_args([*map(str, argv), "--device", "cpu"]))


def test_every_setting_has_a_flag_that_sets_it():
    assert {f.name for f in dataclasses.fields(ltsd.Config)} == set(EVERY_FLAG)
    assert not [k for k, value in EVERY_FLAG.items() if value == getattr(ltsd.Config(), k)]
    argv = ["r1", "r2"]
    for name, value in EVERY_FLAG.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [] if name == "runs" else [flag, str(value)]
    assert ltsd.parse_args(argv) == ltsd.Config(**EVERY_FLAG)
    assert ltsd.parse_args([]) == ltsd.Config()


@pytest.mark.parametrize("data, own", DATA_DEFAULTS)
def test_the_defaults_are_the_papers(data, own):
    (cfg,) = configs_of("--data", data)
    assert {k: getattr(cfg, k) for k in PAPERS | own} == PAPERS | own


def test_comma_lists_make_the_product_each_in_its_folder(monkeypatch):
    monkeypatch.setitem(ltsd.METHODS, "mine", ltsd.METHODS["at-bsl"])  # a row added from outside counts, too
    made = configs_of(*"--ir 5,10 --seed 0,1,0,2 --method mine,at-bsl --aug none,ra --out o".split())
    got = [(c.ir, c.method, c.aug, c.seed) for c in made]
    assert sorted(got) == sorted(itertools.product((5, 10), ("mine", "at-bsl"), ("none", "ra"), (0, 1, 2)))
    assert len({c.out for c in made}) == 24 and {pathlib.Path(c.out).parent.name for c in made} == {"o"}
    for lists in ("--alpha 1,2", "--gamma 1,2", "--teacher-method pgd-at,reat"):
        assert len(configs_of(*lists.split())) == 2
    assert ltsd.parse_args(["--method", "all"]).method == tuple(ltsd.METHODS)
    assert [c.out for c in configs_of("--out", "o")] == ["o"]


def test_help_shows_the_groups_every_flag_and_four_commands_that_parse(capsys):
    with pytest.raises(SystemExit, match="0"):
        ltsd.main(["--help"])
    text = capsys.readouterr().out
    groups = ["what", "method", "optimiser", "threat", "machine", "run", "examples"]
    assert re.findall(r"^(\w+):$", text, re.M)[-7:] == groups
    for name in EVERY_FLAG:
        shown = "RUN" if name == "runs" else "--" + name.replace("_", "-")
        assert re.search(rf"^  {shown}\b(?!-)", text, re.M), shown
    for line in text.rstrip().split("\n")[-4:]:
        python, script, *argv = shlex.split(re.split(r"\s{2,}", line.strip())[0])
        assert (python, script) == ("python", "ltsd.py") and configs_of(*argv)


def refusal(capsys, argv, *said):
    """main ends with code 2 and one line on stderr that holds all of `said`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning would be more lines
        code = ltsd.main(["--device", "cpu", *map(str, argv)])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("ltsd: error: ") and err.count("\n") == 1 and len(err) < 600, err
    assert all(words in err for words in said), err


@pytest.mark.parametrize("args, said", [(m[0], m[1:]) for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_that_names_it(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refusal(capsys, shlex.split(args), *said)


def png(array):
    Image.fromarray(array).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def picture_folder(root, counts, test="test", size=16):
    """root with noise images root/train/CLASS/i.png, as many as `counts` says, and two of each class to test."""
    rng = np.random.default_rng(0)
    for name, part in itertools.product(counts, ("train", test)):
        (root / part / name).mkdir(parents=True)
        for i in range(counts[name] if part == "train" else 2):
            (root / part / name / f"{i}.png").write_bytes(png(rng.integers(0, 256, (size, size, 3), np.uint8)))
    return root


class Touches:
    def __reduce__(self):  # unpickled by a careless loader, it makes the file that tells
        return pathlib.Path.touch, (pathlib.Path("ran"),)


def moved(*pairs):
    return lambda: [os.rename(old, new) for old, new in pairs]


def saved(change):
    """Makes theirs.pt of what `change` makes of a good state_dict."""
    return lambda: torch.save(change(ltsd.build_model("resnet8", 2).state_dict()), "theirs.pt")


def written(path, content):
    return lambda: pathlib.Path(path).write_bytes(content)


# fmt: off
NO_FILE = "theirs.pt is no checkpoint"
ODD_FILES = {
    "other classes": (moved(("test/b", "test/c")), "--data-dir .", "same"),
    "no test": (moved(("test", "x")), "test/CLASS"),
    "one class": (moved(("train/b", "x"), ("test/b", "y")), "two"),
    "no image": (moved(("train/b/0.png", "x")), "classes b"),
    "odd image": (written("train/a/x.png", b"hello"), "train/a/x.png", "remove or replace"),
    "half an image": (lambda: os.truncate("test/a/1.png", 300), "test/a/1.png"), "missing": (lambda: None, NO_FILE),
    "half a file": (lambda: (saved(dict)(), os.truncate("theirs.pt", 90_000)), NO_FILE),
    "text": (written("theirs.pt", b"hello"), NO_FILE),
    "pickle": (written("theirs.pt", pickle.dumps(Touches())), NO_FILE),
    "code": (saved(lambda w: {"state_dict": w, "x": Touches()}), NO_FILE),
    "a list": (saved(list), "theirs.pt holds no"),
    "other arch": (saved(lambda w: ltsd.build_model("preactresnet18", 2).state_dict()), "theirs.pt", "--arch"),
    "3 classes": (saved(lambda w: ltsd.build_model("resnet8", 3).state_dict()), "theirs.pt", "linear.weight"),
    "nan": (saved(lambda w: w | {"linear.bias": torch.full((2,), math.nan)}), "theirs.pt", "NaN"),
}
# fmt: on


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_folder_or_checkpoint_that_cannot_be_used_is_one_line_and_runs_no_code(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(picture_folder(tmp_path, {"a": 3, "b": 1}))
    change, *said = ODD_FILES[name]
    change()
    argv = "--data folder --data-dir . --image-size 16 --arch resnet8 --method at-bsl --stage eval --out o".split()
    refusal(capsys, [*argv, "--checkpoint", "theirs.pt"], *said)
    assert not os.path.exists("ran") and not os.path.exists("o/results.json")


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


TOTALS = [(5000, 10, 50, 13996), (5000, 10, 100, 12406), (5000, 10, 10, 20431), (500, 100, 10, 19573)]
TOTALS += [(500, 100, 50, 12608), (500, 100, 20, 15907), (500, 100, 5, 24856), (500, 200, 10, 39072)]


def test_long_tail_counts_are_the_published_ones():
    for n_max, classes, ir, total in TOTALS:  # BASELINES 1.1
        counts = ltsd.long_tail_counts(n_max, classes, ir)
        assert (sum(counts), len(counts), counts[0], counts[-1]) == (total, classes, n_max, n_max // ir)
    assert ltsd.long_tail_counts(5000, 10, 50) == [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
    for bad in ((10, 3, 0.5), (10, 3, 11), (0, 3, 1), (10, 0, 1), (10, 3, math.nan)):
        with pytest.raises(ValueError, match=f"ratio {bad[2]}|NaN"):
            ltsd.long_tail_counts(*bad)


@pytest.fixture
def untouched():
    """Inside the test no global generator moves."""
    states = [lambda: torch.get_rng_state().tolist(), lambda: repr(np.random.get_state()), random.getstate]
    before = [state() for state in states]
    yield
    assert before == [state() for state in states]


def test_the_long_tailed_subset_is_the_lineages(untouched):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 30))
    counts, want, theirs = [30, 17, 9, 2], [], np.random.RandomState(0)  # BASELINES 1.1
    for c, n in enumerate(counts):
        members = [i for i, label in enumerate(labels) if label == c]
        theirs.shuffle(members)
        want += members[:n]
    got = ltsd.long_tail_indices(torch.from_numpy(labels), counts)
    assert got.dtype == np.int64 and got.tolist() == want
    with pytest.raises(ValueError, match="class 3 has 30 images, 31"):
        ltsd.long_tail_indices(labels, [1, 1, 1, 31])


TEACHERS = [  # (flags, counts, images a class of D_B): the paper's sizes first
    ("--data cifar10", ltsd.long_tail_counts(5000, 10, 50), 2500),
    ("--data cifar100", ltsd.long_tail_counts(500, 100, 10), 250),
    ("--data cifar10 --gamma 1.496", ltsd.long_tail_counts(5000, 10, 50), 149),
    ("--data cifar10 --gamma 0.001", ltsd.long_tail_counts(5000, 10, 50), 1),
    ("--data cifar10 --ir 1", [50] * 10, 50),
    ("--data folder", [90, 40, 10], 45),  # IR/2 of its own counts
    ("--teacher-data full --teacher-method reat", [90, 40, 10], None),
]


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
    times = torch.bincount(drawn.train_images, minlength=len(labels))
    for c, n in enumerate(counts):
        assert {*times[labels == c].tolist()} <= {per_class // n, -(-per_class // n)}
    seeds = [ltsd.teacher_task(dataclasses.replace(cfg, seed=s), data)[1].train_images for s in (0, 1)]
    assert torch.equal(seeds[0], drawn.train_images) and (cfg.ir == 1 or not torch.equal(*seeds))


def law_p(ours, theirs):
    """p-value of the chi-square test that two Counters are draws of one law; rare outcomes are one cell."""
    totals, cells = [sum(ours.values()), sum(theirs.values())], collections.defaultdict(lambda: [0, 0])
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
    assert len(exact) == 162 and law_p(collections.Counter(drawn), collections.Counter(exact)) > 0.01
    pairs = collections.Counter((a[2], b[2]) for a, b in itertools.pairwise(drawn[::2]))
    assert law_p(pairs, collections.Counter(dict.fromkeys(itertools.product((0, 1), (0, 1)), 10**7))) > 0.01


def traits(image):
    """What an output shows of the policy's draw: its colours, which a crop of this image keeps, and its blank area."""
    colours = image.flatten(1).numpy().astype(np.int64).T @ (1, 256, 65536)
    return np.unique(colours).tobytes(), (colours == 0).sum() // 4


@pytest.mark.parametrize("policy", ["ra", "aua"])
def test_every_image_has_torchvisions_law_and_its_own_draw(policy):
    g = torch.Generator().manual_seed(5)
    image = torch.randint(20, 236, (3, 2, 2), generator=g, dtype=torch.uint8).repeat(1, 8, 8)
    ours = []
    for _ in range(12):  # epochs of a whole batch of one image
        ours += map(traits, ltsd.augment(image.expand(512, 3, 16, 16), policy, g))
    first = {"ra": v2.RandAugment(2, 8), "aua": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)}[policy]
    transform = v2.Compose([first, v2.RandomCrop(16, padding=4), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        theirs = [traits(transform(image)) for _ in range(6_000)]
    for seen in (lambda t: t, lambda t: t[0], lambda t: t[1]):
        assert law_p(collections.Counter(map(seen, ours)), collections.Counter(map(seen, theirs))) > 0.01
    colours = [t[0] for t in ours]
    chance = sum((k / len(theirs)) ** 2 for k in collections.Counter(t[0] for t in theirs).values())
    for lag in (1, 7, 128, 256):  # images of one batch agree no more often than strangers
        agree = np.mean([a == b for a, b in zip(colours, colours[lag:])])
        assert abs(agree - chance) < 5 * math.sqrt(chance / len(colours)), lag


@pytest.mark.parametrize("policy", ["none", "ra", "aua"])
def test_augment_draws_from_its_generator_alone(policy, untouched):
    g = torch.Generator()
    x = torch.randint(0, 256, (200, 3, 17, 12), generator=g, dtype=torch.uint8)
    kept, (a, b, c) = x.clone(), [ltsd.augment(x, policy, g.manual_seed(seed)) for seed in (6, 6, 7)]
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, kept)
    assert not torch.equal(c, ltsd.augment(x, policy, g))  # the next epoch is another one
    strided = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(a, ltsd.augment(strided, policy, g.manual_seed(6)))
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
    meta, labels = cls.meta["filename"], np.arange(2 * classes) % classes
    files = {meta: pickle.dumps({cls.meta["key"]: [f"class {i}" for i in range(classes)]})}
    for member, _ in cls.train_list + cls.test_list:
        pixels = rng.integers(0, 256, (2 * classes, 3072), np.uint8)  # red, green, blue planes, row by row
        images.append(torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        key = {"labels" if classes == 10 else "fine_labels": labels.tolist(), "coarse_labels": [0] * 2 * classes}
        files[member] = pickle.dumps({"data": pixels, **key})
    with tarfile.open(tmp_path / cls.filename, "w:gz") as tar:
        for member, content in files.items():
            info = tarfile.TarInfo(f"{cls.base_folder}/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    argv = ["--data", name.lower(), "--data-dir", tmp_path, "--out", tmp_path / "o"]
    monkeypatch.setattr(cls, "url", "file:///nowhere/" + cls.filename)
    refusal(capsys, argv, f"could not fetch {cls.filename}", f"{tmp_path} by hand")  # this is not the real archive
    md5 = {member: hashlib.md5(content).hexdigest() for member, content in files.items()}
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5((tmp_path / cls.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5[meta]})
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(cls, part, [[member, md5[member]] for member, _ in getattr(cls, part)])
    data = load(*argv, "--ir", 2)
    assert data.counts == ltsd.long_tail_counts(10 if classes == 10 else 2, classes, 2)
    assert data.classes[::9] == [f"class {i}" for i in range(0, classes, 9)]
    assert data.tail == list(range(classes - classes // 10, classes))
    assert torch.equal(data.test_images, images[-1]) and data.test_labels.tolist() == labels.tolist()
    chosen = ltsd.long_tail_indices(np.tile(labels, len(images) - 1), data.counts)
    assert torch.equal(data.train_images, torch.cat(images[:-1])[chosen])
    assert data.train_labels.tolist() == (chosen % classes).tolist()


def test_tinyimagenet_is_read_from_the_published_archive(tmp_path, monkeypatch, capsys):
    rng, top, pixels = np.random.default_rng(0), "tiny-imagenet-200/", {}
    wnids, val, archive = (
        [f"n{2 * i:03}" for i in range(200)],
        ["n020", "n002", "n398"],
        tmp_path / "tiny-imagenet-200.zip",
    )
    with zipfile.ZipFile(archive, "w") as z:
        for wnid in reversed(wnids):  # some images are grey
            pixels[wnid] = rng.integers(0, 256, (64, 64) if wnid == "n398" else (64, 64, 3), np.uint8)
            z.writestr(f"{top}train/{wnid}/images/{wnid}_0.JPEG", png(pixels[wnid]))
            z.writestr(f"{top}train/{wnid}/{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        for i, wnid in enumerate(val):
            z.writestr(f"{top}val/images/val_{i}.JPEG", png(pixels[wnid]))
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
        want = pixels[wnid] if pixels[wnid].ndim == 3 else pixels[wnid][:, :, None].repeat(3, 2)
        assert np.array_equal(image.permute(1, 2, 0), want)


def test_a_folders_classes_are_ordered_by_count_and_its_images_cut_to_the_centre(tmp_path):
    root = picture_folder(tmp_path / "Bilder é", {"ant": 3, "bee": 9, "cat": 6, "dog": 9}, test="val", size=32)
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 36:84] = 77  # about the middle that is kept
    Image.fromarray(wide).save(root / "train/ant/wide.png")
    Image.new("L", (32, 32), 90).save(root / "train/ant/grey.png")
    Image.new("CMYK", (16, 16)).save(root / "train/ant/print.jpg")
    (root / "train/ant/notes.txt").write_text("no image")
    argv = ["--data", "folder", "--data-dir", root]
    own = load(*argv)
    assert (own.classes, own.counts, own.tail) == (["bee", "dog", "ant", "cat"], [9, 9, 6, 6], [3])
    assert own.test_labels.tolist() == [2, 2, 0, 0, 3, 3, 1, 1] and own.train_images.shape == (30, 3, 32, 32)
    ants = own.train_images[own.train_labels == 2]
    assert {int(i[0, 0, 0]) for i in ants if (i == i[0, 0, 0]).all()} == {77, 90, 255}
    bee = torch.from_numpy(np.array(Image.open(root / "train/bee/4.png"))).permute(2, 0, 1)
    assert (own.train_images[own.train_labels == 0] == bee).flatten(1).all(1).sum() == 1
    assert load(*argv, "--ir", 3).counts == [9, 6, 4, 3]
    assert load(*argv, "--ir", 1).counts == [6] * 4  # the largest profile that every class can fill


def test_decoded_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    argv = ["--data", "folder", "--data-dir", picture_folder(tmp_path, {"a": 3, "b": 3}), "--image-size", 16]
    first, path = load(*argv), tmp_path / "train/a/0.png"
    with monkeypatch.context() as m:
        m.setattr(Image, "open", lambda *a: pytest.fail("decoded again"))
        assert torch.equal(load(*argv).train_images, first.train_images)
    later = path.stat().st_mtime_ns + 10**9
    Image.new("RGB", (16, 16)).save(path)
    os.utime(path, ns=(later, later))
    assert sum(not image.any() for image in load(*argv).train_images) == 1
    for cache in tmp_path.glob(".ltsd*"):
        cache.write_bytes(b"broken")
    (tmp_path / "test/b/0.png").unlink()
    assert len(load(*argv).test_labels) == 3


def test_limits_keep_a_share_of_every_class_before_the_long_tail_is_drawn(tmp_path):
    argv = ["--data", "folder", "--data-dir", picture_folder(tmp_path, {"a": 40, "b": 20, "c": 2})]
    data = load(*argv, "--train-limit", 31, "--test-limit", 1)
    assert data.counts == [20, 10, 1] and data.test_labels.tolist() == [0, 1, 2]
    assert load(*argv, "--train-limit", 31, "--ir", 10).counts == ltsd.long_tail_counts(19, 3, 10)


def public_forward(arch, w, x):
    """(logits, the names read): the public code's network `arch` from a state_dict, written from its description."""
    wide, post, read = arch == "wrn34-10", arch in ("resnet18", "resnet8"), set()
    stages, blocks = {"wrn34-10": (3, 5), "resnet8": (3, 1)}.get(arch, (4, 2))

    def get(name, *kinds):
        read.update(f"{name}.{kind}" for kind in kinds)
        return [w[f"{name}.{kind}"] for kind in kinds]

    def conv(x, name, stride=1):
        (weight,) = get(name, "weight")
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2)

    def norm(x, name):
        return F.batch_norm(x, *get(name, "running_mean", "running_var", "weight", "bias"))

    x = F.relu(norm(conv(x, "conv1"), "bn1")) if post else conv(x, "conv1")
    for stage, block in itertools.product(range(1, stages + 1), range(blocks)):
        at = f"block{stage}.layer.{block}." if wide else f"layer{stage}.{block}."
        stride, projects = 2 if stage > 1 and block == 0 else 1, block == 0 and (stage > 1 or wide)
        if post:
            out = norm(conv(F.relu(norm(conv(x, at + "conv1", stride), at + "bn1")), at + "conv2"), at + "bn2")
            x = norm(conv(x, at + "shortcut.0", stride), at + "shortcut.1") if projects else x
            x = F.relu(out + x)
        else:
            out = F.relu(norm(x, at + "bn1"))
            x = conv(out, at + ("convShortcut" if wide else "shortcut.0"), stride) if projects else x
            x = x + conv(F.relu(norm(conv(out, at + "conv1", stride), at + "bn2")), at + "conv2")
    x = x if post else F.relu(norm(x, "bn1" if wide else "bn"))
    return F.linear(x.mean((2, 3)), *get("fc" if wide else "linear", "weight", "bias")), read


def lived_in(model):
    """Batch norms as after a training: a net that leaves one out or swaps two computes something else."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t, low, high in (
                (m.weight, 0.5, 1.5),
                (m.bias, -1, 1),
                (m.running_mean, -1, 1),
                (m.running_var, 0.5, 2),
            ):
                nn.init.uniform_(t, low, high)
    return model.eval()


NETS = [("resnet18", 10, 11_173_962), ("wrn34-10", 10, 46_160_474), ("preactresnet18", 200, 11_269_640)]


@pytest.mark.parametrize("arch, classes, size", [*NETS, ("resnet8", 10, 78_042)])
def test_networks_are_the_public_ones_by_name_size_and_logits(arch, classes, size):
    torch.manual_seed(0)
    model, x = lived_in(ltsd.build_model(arch, classes)), torch.rand(2, 3, 64, 64 if classes == 200 else 32)
    with torch.no_grad():
        logits, features = model(x, with_features=True)
        want, read = public_forward(arch, model.state_dict(), x)
    assert sum(p.numel() for p in model.parameters()) == size and features.shape == (2, model[-1].in_features)
    assert {name for name in model.state_dict() if "num_batches" not in name} == read
    assert logits.shape == (2, classes)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4 * want.std().item())


WRAPPINGS = {
    "bare": lambda w: w,
    "state_dict, module.": lambda w: {"state_dict": {"module." + k: v for k, v in w.items()}, "epoch": 7},
    "net, _orig_mod.": lambda w: {"net": {"_orig_mod." + k: v for k, v in w.items()}, "acc": 90.1},
    "model, sub_block1": lambda w: {"model": w | {"sub_block1.layer.0.conv1.weight": torch.zeros(3)}, "epoch": 3},
    "both prefixes": lambda w: {"module._orig_mod." + k: v for k, v in w.items()},
    "no num_batches_tracked": lambda w: {k: v for k, v in w.items() if "num_batches" not in k},
}


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


ERRORS = [("nat_std", "b_nat", 0), ("nat_rob", "b_nat", 1), ("rob_std", "b_rob", 0), ("rob_rob", "b_rob", 1)]


@pytest.mark.parametrize("n, eta, eps, r", [(2, 1.0, 0.5, 5), (1, 0.7, 0.2, 10), (7, 0.4, 0.1, 3), (2, 1.0, 0.0, 50)])
def test_theorem1_agrees_with_sampling_and_no_other_bias_is_better(n, eta, eps, r):
    closed, draws, rng = ltsd.theorem1(n, eta, eps, r), 200_000, np.random.default_rng(1)
    tail, y = rng.normal(-eta, 1, (draws, n)), np.where(rng.random(draws) < r / (r + 1), 1, -1)
    for key, b, attacked in ERRORS:
        found = np.mean((tail + attacked * eps).sum(1) / math.sqrt(n) + closed[b] > 0)
        assert abs(found - closed[key]) < 4 * math.sqrt(closed[key] * (1 - closed[key]) / draws), key
    for b, reach in (("b_nat", 0.0), ("b_rob", eps)):
        score = (rng.normal(0, 1, (draws, n)) + (eta - reach) * y[:, None]).sum(1) / math.sqrt(n)  # attacked to its y
        here, *others = [np.mean((score + closed[b] + off > 0) != (y > 0)) for off in (0, -0.3, 0.3)]
        assert here < min(others), b


def test_theorem1_by_hand_and_what_it_refuses():
    t = ltsd.theorem1(4, 1.0, 0.5, math.e**2)  # b = ln r / (2 sqrt(n) eta) = 1/2, and with eta - eps: 1
    assert [t["b_nat"], t["b_rob"], t["rob_rob"]] == pytest.approx([0.5, 1, 0.5])
    assert [t["nat_std"], t["nat_rob"]] == pytest.approx([0.066807201268858, 0.308537538725987])
    odd = [(0, 1, 0.5, 2), (1.5, 1, 0.5, 2), (2, 1, 0.5, 0.5), (2, 1, 0.5, math.inf), (2, 1, 1, 2), (2, 1, -0.1, 2)]
    for args in [*odd, (2, 1, 0.5, math.nan), (2, -1, 0, 2), (2, math.nan, 0, 2)]:
        with pytest.raises(ValueError, match="n {}, eta {}, eps {}, r {}".format(*args)):
            ltsd.theorem1(*args)


def test_the_theory_stage_prints_theorem1_and_what_it_shows(capsys, monkeypatch):
    assert ltsd.main(["--stage", "theory"]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n") if line.startswith("|")][2:]
    for (ir, name, *numbers), key in zip(rows, ("nat", "rob") * 6, strict=True):
        t = ltsd.theorem1(2, 1.0, 0.5, int(ir))
        assert name.startswith({"nat": "natural", "rob": "adversarial"}[key])
        assert numbers == [f"{t['b_' + key]:.4f}", f"{100 * t[key + '_std']:.2f}", f"{100 * t[key + '_rob']:.2f}"]
    assert [row[0] for row in rows[::2]] == ["1", "2", "5", "10", "20", "50"]
    assert re.findall(r"(yes|NO)$", text, re.M) == ["yes", "yes"]
    honest = ltsd.theorem1
    monkeypatch.setattr(ltsd, "theorem1", lambda *a: honest(*a) | {"rob_rob": 0.1 - a[3] / 1e3})
    assert re.findall(r"(yes|NO)$", ltsd.theory(ratios=(2, 5)), re.M) == ["NO", "NO"]


def test_figure_2_shows_the_optimal_boundaries(tmp_path, monkeypatch):
    axes, drawn = pytest.importorskip("matplotlib.axes").Axes, []
    axline = axes.axline
    monkeypatch.setattr(
        axes, "axline", lambda self, *a, **k: (drawn.append((a[0], k["slope"])), axline(self, *a, **k))[1]
    )
    assert ltsd.main(["--stage", "theory", "--figures", str(tmp_path)]) == 0
    for (point, slope), (r, key) in zip(drawn, itertools.product((1, 2, 5), ("b_nat", "b_rob")), strict=True):
        at = -math.sqrt(2) * ltsd.theorem1(2, 1.0, 0.5, r)[key]  # where (x1 + x2) / sqrt(2) + b = 0
        assert sum(point) == pytest.approx(at, abs=1e-9) and slope == -1
    with Image.open(tmp_path / "figure2.png") as picture:
        assert min(picture.size) > 200 and np.asarray(picture).std() > 5


PUBLIC = """parse_args(argv) main(argv) long_tail_counts(n_max num_classes ir) long_tail_indices(labels counts)
balanced_indices(labels per_class seed) augment(images_u8 policy generator) build_model(arch num_classes head)
pgd_step(x_adv grad x step_size eps out_low) pgd_step_reference(x_adv grad x step_size eps) lr_at(epoch epochs lr)
pgd_attack(model x y eps step_size steps init objective aux generator) balanced_softmax_loss(logits y counts tau)
igdm_loss(student_plus student_minus teacher_plus teacher_minus) trades_loss(logits logits_adv y beta)
mart_loss(logits logits_adv y beta) robal_loss(scores scores_adv y counts scale margin tau_b tau_m beta)
reat_class_weights(counts predicted) reat_tail_loss(features y counts variant) theorem1(n eta eps r)
awp_perturbation(model loss_fn gamma) load_weights(model path) best_precision(device) FrozenCopy(model dtype)
autoattack(model x y eps attacks seed batch_size log iterations queries targets index state nets) Method(loss)
evaluate(model images_u8 labels tail attacks eps step_size steps seed batch_size nets log state) Config(data method)"""


def test_public_names_keep_their_arguments_and_say_what_they_are():
    for name, arguments in re.findall(r"(\w+)\((.*?)\)", PUBLIC):
        assert set(arguments.split()) <= set(inspect.signature(getattr(ltsd, name)).parameters), name
    assert set(ltsd.METHODS) == set("natural pgd-at trades mart awp robal reat at-bsl ltsd".split())
    tree = ast.parse(pathlib.Path(ltsd.__file__).read_text(encoding="utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"]
    assert len(public) > 60 and [n.name for n in public if not ast.get_docstring(n)] == []


README = pathlib.Path(ltsd.__file__).parent / "README.md"


def commanded(line):
    return configs_of(*shlex.split(re.split(r"(?:^|[ /])ltsd\.py", line)[-1], comments=True))


def test_every_command_of_the_readme_parses():
    lines = re.findall(r"(?:python3?|torchrun)\b[^`\n]*[ /]ltsd\.py\b[^`\n]*", README.read_text(encoding="utf-8"))
    assert len(lines) >= 20 and any("torchrun" in line for line in lines)
    for line in lines:
        assert "--help" in line or commanded(line), line


# fmt: off
ALL, FOUR = list(ltsd.METHODS), ["robal", "reat", "at-bsl", "ltsd"]
C10, C100, WRN = dict(data=["cifar10"], ir=[50]), dict(data=["cifar100"], ir=[10]), dict(arch=["wrn34-10"])
ARTEFACTS = {  # what the runs of each command vary; all else must be the paper's
    "Table 1": C10 | dict(method=ALL), "Table 2": C100 | dict(method=ALL), "Table 7": C10 | WRN | dict(method=ALL),
    "Table 8": C100 | WRN | dict(method=ALL), "Table 4": C100 | dict(method=FOUR, aug=["ra", "aua"]),
    "Table 3": dict(data=["tinyimagenet"], ir=[10], arch=["preactresnet18"], method=ALL, image_size=[64]),
    "Table 5": C100 | dict(method=FOUR, ir=[5, 20, 50]), "Table 6": C100 | dict(method=FOUR),
    "Table 9": C100 | dict(method=[m for m in ALL if m not in ("ltsd", "natural")], epochs=[130]),
    "Table 10": C100 | dict(method=["ltsd"], seed=[0, 1, 2, 3, 4]),
    "Figure 1": "report", "Figure 2": "theory", "Figure 8": "report",
    "Figure 4": dict(data=["cifar10"], method=["natural", "pgd-at"], ir=[1, 5, 10, 50, 100], eval_eps=[2],
                     attacks=["clean,pgd"]),
    "Figure 5": C100 | dict(method=["ltsd"], teacher_method=["pgd-at", "robal", "reat", "at-bsl"],
                            teacher_data=["full"], teacher_epochs=[100], teacher_batch_size=[128]),
    "Figure 6": C100 | dict(method=["ltsd"], alpha=[10, 20, 40, 80]),
    "Figure 7": C100 | dict(method=["ltsd"], gamma=[1, 2, 5, 10]),
}
# fmt: on


@pytest.mark.parametrize("name", ARTEFACTS)
def test_the_command_of_each_artefact_has_the_papers_settings(name):
    rows = re.findall(r"^\| ((?:Table|Figure) \d+) \| `(.*?)` \|", README.read_text(encoding="utf-8"), re.M)
    made, want = {row: commanded(line) for row, line in rows}, ARTEFACTS[name]
    assert all(cfg.figures for cfg in made[name]) == name.startswith("Figure")
    if isinstance(want, str):
        assert {cfg.stage for cfg in made[name]} == {want}
        for table in (
            ("Table 1", "Table 2", "Table 8") if want == "report" else ()
        ):  # it finds the runs of Table 2 alone
            found = {pathlib.PurePath(cfg.out).match(made[name][0].runs[0]) for cfg in made[table]}
            assert found == {table == "Table 2"}
        return
    for key, values in ({k: [value] for k, value in PAPERS.items()} | want).items():
        assert {getattr(cfg, key) for cfg in made[name]} == set(values), key
    assert len(made[name]) == math.prod(map(len, want.values()))
    if name in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Table 7", "Table 8"):
        assert all(ltsd.paper_row(cfg, "best") for cfg in made[name] if cfg.method != "natural")


# Step


@pytest.mark.parametrize(
    "x_adv, grad, x, want",
    [
        (0.50, 3.0, 0.50, 0.52),  # one step up
        (0.50, -1e-30, 0.50, 0.48),  # the size of the gradient does not matter
        (0.53, 1.0, 0.50, 0.53),  # held by the ball
        (0.01, -1.0, 0.01, 0.0),  # held by [0,1] ...
        (1.00, math.inf, 0.99, 1.0),
        (0.51, 0.0, 0.50, 0.51),  # no gradient, no step
        (0.51, math.nan, 0.50, 0.51),
    ],
)
def test_the_reference_step_by_hand(x_adv, grad, x, want):
    x_adv, grad, x = (torch.tensor([value]) for value in (x_adv, grad, x))
    assert ltsd.pgd_step_reference(x_adv, grad, x, 0.02, 0.03).item() == pytest.approx(want, abs=1e-7)


KERNEL = """
import itertools, torch, ltsd
def forbidden(*a):
    raise AssertionError("the reference ran, not the kernel")
reference, ltsd.pgd_step_reference = ltsd.pgd_step_reference, forbidden
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
    wide = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    signature, constants = dict(zip(kernel.arg_names, kinds, strict=True)), {(7,): True, (8,): ltsd.STEP_BLOCK}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=wide)
    ptx = compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    assert f".target sm_{arch}" in ptx
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4  # 16 bytes each: x_adv and x, two a thread
    assert re.search(r"st\.global\S*\.v4\.b32", ptx)
    assert low == "fp32" or f"cvt.rn.{low.replace('fp', 'f')}" in ptx  # to nearest even, as PyTorch rounds


def test_the_step_refuses_what_would_pair_wrong_pixels():
    x = torch.rand(2, 3, 4, 4)
    last, low = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x, dtype=torch.bfloat16)
    odd = [(x.clone(), last, x), (x.clone(), x, last), (x.double(), x, x), (x.clone(), x.long(), x)]
    odd += [(x.clone(), x[:1], x), (x[:, :, ::2],) * 3, (x.clone(), x, x.half()), (x.clone(), x, x, last.bfloat16())]
    for x_adv, grad, clean, *out_low in odd:
        with pytest.raises(ValueError, match="x_adv|grad|out_low|x has|x is"):
            ltsd.pgd_step(x_adv, grad, clean, 0.1, 0.1, *out_low)
    x_adv = x.clone()
    assert ltsd.pgd_step(x_adv, x, x, 0.1, 0.1, low) is x_adv and torch.equal(low, x_adv.bfloat16())


# Frozen copy


def net_with_history(arch="resnet8", classes=10):
    """A network whose norms have weights and statistics that a mistake in folding would not survive."""
    torch.manual_seed(0)
    model = ltsd.build_model(arch, classes)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5), m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("arch", ltsd.ARCHS)
def test_a_frozen_copy_equals_its_source_and_follows_it_in_place(arch):
    model, x = net_with_history(arch), torch.rand(2, 3, 16, 16)
    frozen, before = ltsd.FrozenCopy(model), ltsd.weights_of(model)
    pointers = [t.data_ptr() for t in frozen.state_dict().values()]
    with torch.no_grad():
        want = model.eval()(x)
        assert (frozen(x) - want).abs().max() <= 1e-4 * want.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    frozen.refresh()
    with torch.no_grad():
        after = model.eval()(x)
        assert (after - want).abs().max() > 0.01 * want.abs().max()
        assert (frozen(x) - after).abs().max() <= 1e-4 * after.abs().max()
    assert pointers == [t.data_ptr() for t in frozen.state_dict().values()]
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("dtype, least, most", [(torch.float32, 0, 1e-5), (torch.bfloat16, 1e-6, 0.05)])
def test_a_frozen_copy_gives_float32_logits_and_does_not_mind_the_layout(dtype, least, most):
    model, x, seen = net_with_history(), torch.rand(6, 3, 32, 32), []
    frozen = ltsd.FrozenCopy(model, dtype)
    frozen.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        got, same, want = frozen(x), frozen(x.contiguous(memory_format=torch.channels_last)), model.eval()(x)
    assert torch.equal(got, same) and got.dtype == torch.float32
    assert all(t.is_contiguous(memory_format=torch.channels_last) and t.dtype == dtype for t in seen) and len(seen) == 2
    assert least <= (got - want).abs().max() / want.abs().max() <= most


def test_only_the_batch_sizes_of_speed_up_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net, **_: lambda x: compiled.append(len(x)) or net(x))
    frozen = ltsd.FrozenCopy(net_with_history()).speed_up(4, 6)
    for n in (4, 5, 6, 1):
        frozen(torch.rand(n, 3, 8, 8))
    assert compiled == [4, 6]


def test_a_captured_attack_reads_the_newest_inputs_and_keeps_its_graph(monkeypatch):
    """A double stands in for CUDA graphs: it replays by calling again, but on the captured buffers only."""
    captured, replayed = [], []

    def capture(fn, buffers):
        captured.append(len(buffers[0]))
        result = fn(*buffers).clone()
        return lambda: (replayed.append(len(result)), result.copy_(fn(*buffers))), result

    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    model = net_with_history()
    eager, graphed = ltsd.FrozenCopy(model), ltsd.FrozenCopy(model).speed_up(4, 6)
    graphed.capture = capture
    training = dict(eps=8 / 255, step_size=2 / 255, steps=2, objective=ltsd.kl_objective)
    evaluation = dict(eps=4 / 255, step_size=2 / 255, steps=3)
    calls = [(training, 4), (training, 4), (evaluation, 4), (evaluation, 6), (training, 4), (training, 3)]
    for number, (threat, n) in enumerate(calls):
        x, y = torch.rand(n, 3, 16, 16), (torch.arange(n) + number) % 10
        aux = F.log_softmax(torch.randn(n, 10), 1) if "objective" in threat else None
        want, got = (
            ltsd.pgd_attack(net, x, y, aux=aux, generator=torch.Generator().manual_seed(number), **threat)
            for net in (eager, graphed)
        )
        assert torch.equal(got, want) and not torch.equal(got, x), number
        with torch.no_grad():  # the graph has to see refreshed weights too
            model.conv1.weight.mul_(-1)
        eager.refresh(), graphed.refresh()
    assert captured == [4, 4, 6] and replayed == [4, 4, 4, 6, 4]


# Attack


class Linear(nn.Module):
    """Logits linear in the pixels, for which the best perturbation is known; images [N,1,4,4]. No copy can be made."""

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


def net_with_dropout():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))


def failing(*arguments):
    raise RuntimeError("failed inside")


@pytest.mark.parametrize("attack", ["pgd", "autoattack"])
def test_attacks_leave_a_foreign_module_and_all_else_as_they_were(attack, monkeypatch):
    model, x, y = net_with_dropout(), torch.rand(6, 3, 8, 8), torch.arange(6) % 5
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
        generator = torch.Generator().manual_seed(3)
        threat = dict(eps=eps, step_size=0.0, steps=0, init=init, generator=generator)
        return ltsd.pgd_attack(Linear(), x, y[: len(x)], **threat) - x

    uniform, gauss = noise("uniform"), noise("gauss")
    assert abs(uniform.std() - 0.1 / math.sqrt(3)) < 1e-3 and abs(uniform.mean()) < 1e-3 and uniform.max() <= 0.100001
    assert abs(gauss.std() - 1e-3) < 2e-5 and abs(gauss.mean()) < 2e-5
    assert noise("gauss", eps=1e-3).abs().max() <= 1.0001e-3 and not noise("none").any()
    assert noise("uniform", torch.ones(9, 1, 4, 4)).max() == 0 == noise("uniform", 0 * x[:9]).min()


def test_degenerate_attacks():
    x, y, threat = torch.rand(4, 1, 8, 8), torch.zeros(4).long(), dict(eps=0.1, step_size=0.05, steps=2, init="none")
    view = x[:, :, 2:6, 2:6]
    dense = ltsd.pgd_attack(Linear(), view.contiguous(), y, **threat)
    assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat), dense) and not torch.equal(dense, view)
    for same in (dict(eps=0, init="uniform"), dict(steps=0), dict(step_size=0)):
        assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat | same), view)
    assert ltsd.pgd_attack(Linear(), dense[:0], y[:0], **threat).shape == (0, 1, 4, 4)


ODD_ATTACKS = [
    (dict(eps=-1), "eps -1"),
    (dict(eps=8), "divide by 255"),
    (dict(step_size=math.nan), "step_size nan"),
    (dict(steps=-1), "steps -1"),
    (dict(init="normal"), "'normal'"),
    (dict(x="cat"), "str"),
    (dict(x=torch.rand(4, 16)), r"\[N,C,H,W\]"),
    (dict(x=torch.rand(4, 1, 4, 4).double()), "float64"),
    (dict(x=torch.rand(4, 1, 4, 4) * 255), "divide by 255"),
    (dict(x=torch.full((4, 1, 4, 4), math.nan)), "nan"),
    (dict(y=4), "int"),
    (dict(y=torch.zeros(3).long()), r"\[3\]"),
    (dict(y=torch.zeros(4)), "float32"),
]


@pytest.mark.parametrize("change, said", ODD_ATTACKS, ids=str)
def test_the_attack_refuses_odd_input(change, said):
    given = dict(x=torch.rand(4, 1, 4, 4), y=torch.zeros(4).long(), eps=0.1, step_size=0.1, steps=1) | change
    with pytest.raises(ValueError, match=said):
        ltsd.pgd_attack(Linear(), **given)


def test_an_fp16_attack_keeps_the_sign_of_tiny_gradients():
    """A confident image's gradient, here around 1e-10, is below fp16's least number; scaled, its sign survives."""
    model, x, y = net_with_history(), torch.rand(64, 3, 16, 16), torch.zeros(64).long()
    with torch.no_grad():
        model.linear.bias[0] = 12
    leaf, threat = x.clone().requires_grad_(), dict(eps=0.1, step_size=0.05, steps=1, init="none")
    F.cross_entropy(model.eval()(leaf), y).backward()
    assert leaf.grad.abs().max() < 6e-9 and leaf.grad.abs().median() < 1e-9
    fast, exact = (ltsd.pgd_attack(ltsd.FrozenCopy(model, d), x, y, **threat) for d in (torch.float16, torch.float32))
    assert (exact != x).all() and (fast == exact).float().mean() > 0.99


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


ATTACKED = {}  # rows that attack alike are attacked once
for name, row in ltsd.METHODS.items():
    ATTACKED.setdefault((row.objective, row.init, row.low_precision), []).append(name)


@pytest.mark.parametrize("methods", [names for key, names in ATTACKED.items() if key[0]], ids=" ".join)
def test_the_fast_attack_is_as_strong_as_the_plain_one(trained, methods):
    (model, x, y), row, counts = trained, ltsd.METHODS[methods[0]], torch.linspace(500, 50, 10)
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


# Losses: an independent float64 evaluation of each


def log_p(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(p, q, floor=0.0):
    return (np.exp(log_p(p)) * (log_p(p) - np.log(np.exp(log_p(q)) + floor))).sum(1)


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y]


def slow_balanced_softmax(logits, y, counts, tau):
    return ce(logits + tau * np.log(counts), y).mean()


def slow_kd(student, teacher):
    return kl(teacher, student).mean()


def slow_igdm(student_plus, student_minus, teacher_plus, teacher_minus):
    return slow_kd(student_plus - student_minus, teacher_plus - teacher_minus)


def slow_trades(logits, logits_adv, y, beta):
    return ce(logits, y).mean() + beta * kl(logits, logits_adv).mean()


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


LOSSES = {
    "balanced_softmax": ltsd.balanced_softmax_loss, "kd": ltsd.distillation_loss, "igdm": ltsd.igdm_loss,
    "trades": ltsd.trades_loss, "mart": ltsd.mart_loss, "robal": ltsd.robal_loss,
    "reat_weights": ltsd.reat_class_weights, "reat_tail": ltsd.reat_tail_loss,
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
    got = LOSSES[name](*(given[:4] if named else given), **named)
    assert all(torch.equal(v, k) for v, k in zip(given, kept) if torch.is_tensor(v))  # nothing changed in place
    return got


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_its_independent_evaluation(name):
    for arguments in [arguments for other, arguments in loss_cases() if other == name]:
        want, got = globals()["slow_" + name](*arguments), call(name, arguments)
        assert np.allclose(got.numpy(), want, rtol=1e-9 if got.dtype == torch.float64 else 1e-6)
        assert np.allclose(call(name, arguments, torch.float32).numpy(), want, rtol=3e-4, atol=3e-4)


LN2, LN3 = math.log(2), math.log(3)
HAND = [
    ("balanced_softmax", ([[0.0, 0.0]], [1], [3, 1], 1.0), 2 * LN2),  # p = (3/4, 1/4)
    ("balanced_softmax", ([[LN2, LN3], [LN2, LN3]], [0, 1], [4, 1], 1.0), 0.8088683576),
    ("kd", ([[0.0, 0], [1, 2]], [[LN3, 0.0], [1, 2]]), 0.0654060180),  # (3/4 ln(3/2) + 1/4 ln(1/2)) / 2
    ("igdm", ([[LN2 + LN3, 0]], [[LN2, 0.0]], [[1.0, LN2]], [[1.0, LN2]]), 0.1438410362),
    ("trades", ([[LN2, 0.0, 0.0]], [[0.0, 0.0, LN2]], [0], 6.0), 2.5 * LN2),  # KL((1/2,1/4,1/4), (1/4,1/4,1/2))
    ("mart", ([[LN2, 0.0, 0.0]], [[0.0, 0.0, LN2]], [0], 4.0), 2.4258152213),
    ("robal", ([[0.0, 0.0]], [[LN2, 0.0]], [0], [3.0, 1], 3.0, LN2 / 3, 1.0, 1.0, 6.0), 0.5764926583),
    ("robal", ([[0.0, 0.0]], [[LN2, 0.0]], [1], [3.0, 1], 3.0, LN2 / 3, 1.0, 1.0, 6.0), 4.2451694051),
    ("reat_weights", ([4, 2], [2, 1]), [0.7272747107, 1.2727252893]),  # 1 / 1.75 and 1 / 1
    ("reat_weights", ([2, 1], [2, 0]), [0.0000133332, 1.9999866668]),
    ("reat_tail", ([[0.0, 0], [LN2, 0]], [1, 0], [16, 9], "official"), -0.0030672666),
    ("reat_tail", ([[0.0, 0], [LN2, 0], [LN2, 0]], [1, 1, 0], [16, 9], "intended"), -0.0355524733),
]


@pytest.mark.parametrize("name, arguments, want", HAND, ids=str)
def test_a_loss_equals_values_worked_by_hand(name, arguments, want):
    assert call(name, arguments).tolist() == pytest.approx(want, abs=1e-7 if name == "reat_weights" else 6e-11)


@pytest.mark.parametrize("name, differentiable", [("trades", 2), ("mart", 2), ("robal", 2), ("igdm", 2), ("kd", 1)])
def test_a_loss_passes_gradcheck(name, differentiable):
    """Also says what has gradient: both sides of TRADES' and MART's KL, never a teacher."""
    arguments = next(arguments for other, arguments in loss_cases() if other == name)
    tensors = [torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in arguments]
    inputs = [t.requires_grad_() for t in tensors if torch.is_tensor(t) and t.ndim == 2]
    named = dict(zip(ROBAL, tensors[4:])) if name == "robal" else {}
    rest = tensors[differentiable : 4 if named else None]
    assert torch.autograd.gradcheck(lambda *ts: LOSSES[name](*ts, *rest, **named), inputs[:differentiable])
    gradients = torch.autograd.grad(
        LOSSES[name](*inputs, *tensors[len(inputs) : 4], **named), inputs, allow_unused=True
    )
    assert [g is not None for g in gradients] == [i < differentiable for i in range(len(inputs))]


@pytest.mark.parametrize("variant", ["official", "intended"])
def test_reats_tail_term_has_the_gradient_of_its_live_side_only(variant):
    """Finite differences with fixed anchors: gradcheck cannot know that one side is detached."""
    rng = np.random.default_rng(0)
    f, y, counts = rng.normal(size=(5, 3)), np.array([0, 1, 2, 2, 3]), np.array([50.0, 20, 9, 5])
    live = torch.tensor(f, requires_grad=True)
    ltsd.reat_tail_loss(live, torch.tensor(y), counts, variant).backward()
    for i, j in itertools.product(range(5), range(3)):
        nudge = np.zeros_like(f)
        nudge[i, j] = 1e-5
        up, down = (slow_reat_tail(f + side * nudge, y, counts, variant, f) for side in (1, -1))
        assert live.grad[i, j].item() == pytest.approx((up - down) / 2e-5, abs=1e-8)


def test_degenerate_losses_are_cross_entropy():
    z, other, y = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 3, 0, 1])
    plain, counts = dict(scale=1.0, margin=0.0, tau_b=0.0, tau_m=0.0, beta=0.0), [5, 3, 2, 1]
    for got in (
        ltsd.balanced_softmax_loss(z, y, [7, 7, 7, 7]), ltsd.balanced_softmax_loss(z, y, counts, tau=0),
        ltsd.trades_loss(z, other, y, beta=0), ltsd.robal_loss(other, z, y, counts, **plain),
        ltsd.weighted_objective(z, y, torch.ones(4).double()),
    ):  # fmt: skip
        assert torch.allclose(got, F.cross_entropy(z, y))
    assert ltsd.reat_tail_loss(z, torch.zeros(6).long(), counts) == 0 == ltsd.igdm_loss(z, other, z, other)


def test_losses_in_half_precision_are_those_of_float32():
    z, y, counts = torch.tensor([[30.0, 0.0, 1.0], [0.5, 2.0, -1.0]]), torch.tensor([2, 1]), [70_000, 5, 1]
    constants = (10.0, 0.1, 1.5, 0.3, 6.0)
    rows = dict(balanced_softmax=(y, counts, 1.0), reat_tail=(y, counts, "official"), trades=(z, y, 6.0))
    rows |= dict(mart=(z, y, 6.0), robal=(z, y, counts, *constants), igdm=(0 * z, z.flip(0), z), kd=(z.flip(0),))
    for (name, rest), low in itertools.product(rows.items(), (torch.float16, torch.bfloat16)):
        arguments = [v.to(low) if torch.is_tensor(v) and v.is_floating_point() else v for v in (z, *rest)]
        wide = [v.float() if torch.is_tensor(v) and v.is_floating_point() else v for v in arguments]
        named = dict(zip(ROBAL, constants)) if name == "robal" else {}
        got, want = (LOSSES[name](*(v[:4] if named else v), **named) for v in (arguments, wide))
        assert got == want and got.dtype == torch.float32, name


@pytest.mark.parametrize("counts", [[5, 3], [5, 3, 2, 1], [[5, 3, 2]]])
def test_counts_of_another_length_are_refused(counts):
    z, y, constants = torch.randn(2, 3), torch.tensor([0, 1]), dict(zip(ROBAL, (10.0, 0.1, 1.5, 0.3, 6.0)))
    for refused in (
        lambda: ltsd.balanced_softmax_loss(z, y, counts),
        lambda: ltsd.robal_loss(z, z, y, counts, **constants),
    ):
        with pytest.raises(ValueError, match="one count for each of 3 classes"):
            refused()


def test_reats_class_weights_do_not_move_a_sign_step():
    """Why REAT's attack is PGD: a positive factor per image leaves the signs of its gradient alone."""
    model, x, y = net_with_history(), torch.rand(8, 3, 16, 16), torch.arange(8)
    threat, weights = dict(eps=8 / 255, step_size=2 / 255, steps=2, init="none"), torch.linspace(0.1, 4, 10)
    weighted = ltsd.pgd_attack(model, x, y, objective=ltsd.weighted_objective, aux=weights, **threat)
    assert (weighted != ltsd.pgd_attack(model, x, y, **threat)).float().mean() < 1e-3
    assert (weighted != ltsd.pgd_attack(model, x, y.flip(0), **threat)).float().mean() > 0.1


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

    def loss():
        return F.cross_entropy(model(x), y)

    def restored():  # to the rounding of w + v - v
        now, ulp = model.state_dict(), torch.finfo(torch.float32).eps
        return all(((now[k] - v).abs() <= ulp * (v.abs() + 1.1 * steps[k].abs())).all() for k, v in before.items())

    with ltsd.awp_perturbation(model, loss, 0.01):
        for name, now in model.state_dict().items():
            assert torch.allclose(now, before[name] + steps[name], rtol=1e-4, atol=1e-6), name
    assert restored()
    with pytest.raises(RuntimeError, match="inside"), ltsd.awp_perturbation(model, loss, 0.01):
        failing()
    with pytest.raises(RuntimeError, match="inside"), ltsd.awp_perturbation(model, lambda: failing(model(x)), 0.01):
        pass
    for bad in (math.nan, math.inf):
        with ltsd.awp_perturbation(model, lambda bad=bad: loss() * bad, 0.01):
            assert restored()
    with ltsd.awp_perturbation(model, failing, 0.0):
        assert restored()


def expected_loss(b, net):
    """What each row of METHODS minimises, in terms of the public losses; net: its train-mode forward."""
    clean, adv, beta, tau = net(b.x), net(b.x_adv), b.cfg.beta, b.cfg.tau
    balanced, minus = ltsd.balanced_softmax_loss(adv, b.y, b.counts, tau), 2 * b.x - b.x_adv
    distilled = ltsd.igdm_loss(adv, net(minus), b.teacher(b.x_adv), b.teacher(minus))
    features = net(b.x_adv, with_features=True)[1]
    constants = dict(scale=10.0, margin=0.1, tau_b=1.5, tau_m=0.3, beta=beta)
    plain = F.cross_entropy(adv, b.y)
    return {
        "natural": plain, "pgd-at": plain, "awp": plain, "at-bsl": balanced, "ltsd": balanced + 7 * distilled,
        "trades": ltsd.trades_loss(clean, adv, b.y, beta), "mart": ltsd.mart_loss(clean, adv, b.y, beta),
        "robal": ltsd.robal_loss(clean, adv, b.y, b.counts, **constants),
        "reat": balanced + ltsd.reat_tail_loss(features, b.y, b.counts),
    }  # fmt: skip


CLEAN, UNIFORM, GAUSS = (
    (None, "gauss"),
    (ltsd.cross_entropy_objective, "uniform"),
    (ltsd.cross_entropy_objective, "gauss"),
)
ROWS = {
    "natural": CLEAN, "pgd-at": UNIFORM, "awp": UNIFORM, "mart": GAUSS, "robal": GAUSS, "at-bsl": GAUSS, "ltsd": GAUSS,
    "trades": (ltsd.kl_objective, "gauss"), "reat": (ltsd.weighted_objective, "uniform"),
}  # fmt: skip


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
    assert torch.allclose(loss, expected_loss(batch, model)[method], rtol=1e-5)
    assert torch.equal(logits, model(batch.x_adv)) and loss.requires_grad
    if row.teacher:
        batch.cfg = dataclasses.replace(cfg, kd="kl")
        want = ltsd.balanced_softmax_loss(logits, y, counts, 0.7) + 7 * ltsd.distillation_loss(
            logits, teacher(batch.x_adv)
        )
        assert torch.allclose(row.loss(batch)[0], want, rtol=1e-5)


@pytest.mark.parametrize(
    "method, data, epochs, batch, lr, decay, beta, drops",
    [
        ("pgd-at", "cifar100", 200, 128, 0.1, 5e-4, 6.0, (100, 150)),
        ("awp", "cifar10", 200, 128, 0.1, 5e-4, 6.0, (100, 150)),
        ("trades", "cifar10", 76, 128, 0.1, 2e-4, 6.0, (74,)),
        ("mart", "cifar10", 120, 128, 0.01, 3.5e-3, 5.0, (74, 89, 99)),
        ("robal", "cifar100", 80, 64, 0.1, 2e-4, 6.0, (60, 75)),
        ("reat", "cifar10", 80, 128, 0.1, 5e-4, 6.0, (60, 75)),
        ("at-bsl", "tinyimagenet", 100, 128, 0.1, 5e-4, 6.0, (74, 89, 99)),
        ("ltsd", "cifar100", 100, 128, 0.1, 5e-4, 6.0, (75, 90)),
    ],
)
def test_official_means_the_published_settings(method, data, epochs, batch, lr, decay, beta, drops):
    cfg = ltsd.resolve(ltsd.parse_args(["--method", method, "--data", data, "--official"]))
    assert (cfg.epochs, cfg.batch_size, cfg.lr, cfg.weight_decay, cfg.beta) == (epochs, batch, lr, decay, beta)
    shares = [float(share) for share in cfg.milestones.split(",")]
    rates = [ltsd.lr_at(epoch, epochs, lr, shares) for epoch in range(1, epochs + 1)]
    assert tuple(e for e in range(1, epochs) if rates[e] < 0.2 * rates[e - 1]) == drops
    assert rates[0] == lr and rates[-1] == pytest.approx(lr * 0.1 ** len(drops))


# AutoAttack

QUICK = dict(eps=12 / 255, iterations=8, queries=30)


def blobs(count, classes=10, seed=3):
    """Blurred class prototypes plus noise, [count, 3, 12, 12], and their labels."""
    prototypes = torch.rand(classes, 3, 3, 3, generator=torch.Generator().manual_seed(99))
    prototypes = F.interpolate(prototypes, size=12, mode="bilinear") * 0.5 + 0.25
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (count,), generator=g)
    return (prototypes[y] + 0.25 * torch.randn(count, 3, 12, 12, generator=g)).clamp(0, 1), y


def blob_net(classes=10):
    """A small foreign network after 120 steps of adversarial training."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU()]
    net = nn.Sequential(*convs, nn.Flatten(), nn.Linear(216, classes))
    (x, y), optimizer = blobs(2048, classes, 1), torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(120):
        rows = torch.arange(128) + 128 * (step % 16)
        x_adv = ltsd.pgd_attack(net, x[rows], y[rows], eps=8 / 255, step_size=5 / 255, steps=2)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y[rows]).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def foreign():
    return blob_net()


def robust(net, x, y):
    return net(x).argmax(1) == y


@pytest.mark.parametrize("attack", [*ltsd.AUTOATTACK, "all"])
def test_autoattack_is_on_a_par_with_the_official_package(foreign, attack):
    official = pytest.importorskip("pyautoattack")
    x, y = blobs(128 if attack == "square" else 40, seed=7)  # Square is cheap, and nothing but random draws
    names = list(ltsd.AUTOATTACK) if attack == "all" else [attack]
    ours = ltsd.autoattack(foreign, x, y, eps=14 / 255, attacks=names, queries=400)
    theirs = official.AutoAttack(foreign, attacks=names, eps=14 / 255, version="custom", seed=0)
    theirs.apgd.n_restarts = theirs.fab.n_restarts = 1
    theirs.square.n_queries = 400
    reference, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    ours, theirs = (int(robust(foreign, images, y).sum()) for images in (ours, reference))
    assert abs(ours - theirs) <= (4 if attack == "square" else 1) and 2 < theirs < len(y) - 2


def test_draws_are_splitmix64s_and_uniform():
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # its first three words from seed 0
    got = ltsd.hash64(torch.arange(1, 4) * -0x61C8864680B583EB)
    assert [word % 2**64 for word in got.tolist()] == known
    words = ltsd.random_bits(torch.arange(2000), 50)
    assert words.unique().numel() == words.numel()
    counts = torch.histc((words >> 40 & 0xFFFFFF).double(), 64, 0, 2**24)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 63 + 5 * math.sqrt(2 * 63)
    ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(64)])
    assert (ones - 0.5).abs().max() < 2.5 / math.sqrt(words.numel())


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 1000.0])
def test_the_projection_equals_brute_force(scale):
    """Bisection on the length that every coordinate moves, cut at its room, in float64."""
    g = torch.Generator().manual_seed(1)
    t, w, gap = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((40, 30), (40, 30), (40,)))
    t, w, gap = t.sigmoid(), w**3, gap * scale
    t[:10, :15], t[10:20, :15], w[5:30:2, ::3], w[3], gap[7] = 0, 1, 0, 0, 0  # no room, no direction, nothing to do
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
    assert want.dtype == torch.float64 and 0 < robust(net, want, y).sum() < 24
    assert all((other - want).abs().max() < 1e-9 for other in others)
    if names == ("square",):  # nothing but draws: they do depend on seed and index
        for change in (dict(seed=1), dict(index=order)):
            assert not torch.equal(ltsd.autoattack(net, x.double(), y, **options | change), want)


@pytest.mark.parametrize("which", ["foreign", "trained"])
def test_fooled_images_fool_and_the_rest_are_unchanged(which, request):
    net, x, y = (
        (request.getfixturevalue("foreign"), *blobs(40)) if which == "foreign" else request.getfixturevalue(which)
    )
    x, y, lines, state = x[:40], y[:40], [], {}
    x_adv = ltsd.autoattack(net, x, y, log=lines.append, state=state, **QUICK)
    kept, eps = robust(net, x_adv, y), QUICK["eps"]
    assert torch.equal(x_adv[kept], x[kept]) and 0 < kept.sum() < robust(net, x, y).sum()
    assert (x_adv - x).abs().max() <= eps + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert [line.split()[0] for line in lines] == ["clean", *ltsd.AUTOATTACK]
    shares = [float(line.split(" %")[0].split()[-1]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(100 * kept.double().mean().item(), abs=0.006)
    calls = []
    counting = nn.Sequential(net)
    counting.register_forward_hook(lambda *_: calls.append(1))
    assert list(state) == list(ltsd.AUTOATTACK)  # a second call with the state attacks no more
    assert torch.equal(ltsd.autoattack(counting, x, y, state=state, **QUICK), x_adv) and len(calls) <= 4


def test_a_network_that_only_steers_decides_nothing(foreign):
    (x, y), names = blobs(40), ("apgd-ce", "apgd-t")
    want = robust(foreign, ltsd.autoattack(foreign, x, y, attacks=names, **QUICK), y)
    coarse = copy.deepcopy(foreign).bfloat16()
    nets = (lambda z: coarse(z.bfloat16()).float(), foreign)
    low = ltsd.autoattack(foreign, x, y, attacks=names, nets=nets, **QUICK)
    assert (robust(foreign, low, y) != want).sum() <= 1
    state = {}
    lying = (lambda z: -foreign(z), foreign)  # claims that everything is fooled, and climbs the wrong way
    lied = ltsd.autoattack(foreign, x, y, attacks=names, nets=lying, state=state, **QUICK)
    counted = sum(len(found["rows"]) for found in state.values())
    assert counted == (robust(foreign, x, y) & ~robust(foreign, lied, y)).sum() < (robust(foreign, x, y) & ~want).sum()


def test_degenerate_sets_of_points(foreign):
    x, y = blobs(12)
    right = foreign(x).argmax(1)
    assert ltsd.autoattack(foreign, x[:0], y[:0]).shape == (0, 3, 12, 12)
    assert ltsd.autoattack(foreign, x[:1], right[:1], **QUICK).shape == (1, 3, 12, 12)
    assert torch.equal(ltsd.autoattack(foreign, x, (right + 1) % 10, **QUICK), x)  # all wrong
    assert torch.equal(ltsd.autoattack(foreign, x, right, **QUICK | dict(eps=0)), x)  # all robust


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_are_attacked_too(classes):
    net, (x, y) = blob_net(classes), blobs(32, classes)
    for name in ltsd.AUTOATTACK:
        got = ltsd.autoattack(net, x, y, eps=0.2, attacks=(name,), iterations=20, queries=100)
        assert robust(net, got, y).sum() < robust(net, x, y).sum() - 6, name


class Wrapped(nn.Module):
    def __init__(self, net, function):
        super().__init__()
        self.net, self.function = net, function

    def forward(self, x):
        return self.function(self.net, x)


WARN = {
    "randomised": (lambda net, x: net(x) + 0.5 * torch.randn(len(x), 10), ("apgd-ce",)),
    "softmax": (lambda net, x: net(x).softmax(1), ("apgd-ce",)),
    "zero input gradient": (lambda net, x: net(x + (x * 8).round() / 8 - x), ("apgd-ce",)),
    "Square fooled": (lambda net, x: net((x * 32).round() / 32 + 0 * x), ("apgd-ce", "square")),
}


@pytest.mark.parametrize("said", WARN)
def test_models_that_mislead_are_warned_of(foreign, said):
    (function, names), (x, y) = WARN[said], blobs(24)
    options = dict(eps=0.2, attacks=names, iterations=5, queries=100)
    with pytest.warns(UserWarning, match=said):
        ltsd.autoattack(Wrapped(foreign, function), x, y, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ltsd.autoattack(Wrapped(foreign, lambda net, x: net(x)), x, y, **options)


BAD = [
    (dict(x=torch.full((2, 3, 12, 12), 2.0)), "must lie in"),
    (dict(x=torch.zeros(2, 3, 12, 12, dtype=torch.uint8)), "uint8"),
    (dict(y=torch.tensor([0, 10])), r"\[0, 10\]"),
    (dict(y=torch.tensor([-1, 0])), r"\[-1, 0\]"),
    (dict(eps=8), "eps in"),
    (dict(attacks=("pgd",)), "pgd"),
    (dict(batch_size=0), "counts >= 1"),
    (dict(iterations=0), "counts >= 1"),
]


@pytest.mark.parametrize("change, said", BAD, ids=str)
def test_autoattack_refuses_odd_input(foreign, change, said):
    given = dict(x=torch.zeros(2, 3, 12, 12), y=torch.zeros(2, dtype=torch.int64)) | change
    with pytest.raises(ValueError, match=said):
        ltsd.autoattack(foreign, **given)


# Bench


@pytest.fixture
def small_bench(monkeypatch):
    """The real code on a small network: what is timed, not how fast, is checked here."""
    real, made = ltsd.build_model, []
    monkeypatch.setattr(ltsd, "build_model", lambda arch, *rest: made.append(real("resnet8", *rest)) or made[-1])
    return made


def test_the_bench_writes_its_schema(tmp_path, monkeypatch, capsys, small_bench):
    core = ltsd.bench_core
    monkeypatch.setattr(ltsd, "bench_core", lambda cfg, batch, steps, rounds: core(cfg, batch // 16, steps, 1))
    assert ltsd.main(["--stage", "bench", "--device", "cpu", "--amp", "off", "--out", str(tmp_path)]) == 0
    result, said = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert {"header", "attack", "train_step", "kernel", "matmul_share"} <= set(result) and "x plain" in said
    assert result["header"]["amp"] == "off" and result["kernel"] == [] and result["matmul_share"] > 0
    for part, rows in itertools.product(("attack", "train_step"), (slice(0, 2), slice(2, 4))):
        plain, ours = result[part][rows]
        assert plain["lever"] == "plain" and plain["ratio"] == 1 and ours["batch"] == plain["batch"]
        assert ours["ratio"] == pytest.approx(ours["images_per_s"] / plain["images_per_s"])


def test_the_benchs_step_is_the_very_step_of_training(monkeypatch, small_bench):
    """One step of 'all levers', then `train` from the same weights on the same images: the same weights again."""
    outer, attack, taken = ltsd.outer_step, ltsd.pgd_attack, []

    def spy(row, batch, model, *rest):
        before = ltsd.weights_of(model)
        result = outer(row, batch, model, *rest)
        taken.append((before, batch, ltsd.weights_of(model)))
        return result

    def timed(variants, *_):
        variants.get("all levers", int)()
        return dict.fromkeys(variants, 1.0)

    monkeypatch.setattr(ltsd, "outer_step", spy)
    monkeypatch.setattr(ltsd, "timed", timed)
    monkeypatch.setattr(ltsd, "pgd_attack", lambda *args, **kw: attack(*args, **kw | dict(init="none")))
    cfg = ltsd.resolve(ltsd.parse_args("--device cpu --amp off --epochs 1 --teacher-epochs 1 --batch-size 8".split()))
    ltsd.bench_core(cfg, 8, 2, 1)
    (before, batch, after), model = taken.pop(), ltsd.build_model("resnet8", 100)
    model.load_state_dict(before)
    monkeypatch.setattr(ltsd, "build_model", lambda *_: model)
    monkeypatch.setattr(ltsd, "augment", lambda images, *_: images)
    monkeypatch.setattr(ltsd, "to_float", lambda images: batch.x)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
    ignored = ("estimate", "log", "save_state", "save_model", "save_results")
    run = types.SimpleNamespace(load_state=lambda name, at, *_: at, **dict.fromkeys(ignored, lambda *_: None))
    images, counts = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), [int(n) for n in batch.counts]
    data = ltsd.Data(images, batch.y, images, batch.y, list(range(100)), counts)
    cfg = dataclasses.replace(cfg, steps=2, lr=0.01, weight_decay=0.0, milestones="1")
    trained = ltsd.weights_of(ltsd.train("teacher", cfg, data, run, batch.teacher))
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])
    assert all(torch.allclose(trained[k].float(), v.float(), rtol=1e-5, atol=1e-6) for k, v in after.items())


# Training and resume -----------------------------------------------------------------------------------------------

# 33 images in batches of 16, the last of them a single image
RUN = "--data synthetic --ir 3 --train-limit 60 --test-limit 10 --steps 1 --eval-steps 2 --lr 0.02 --teacher-epochs 2"
RUN = f"{RUN} --epochs 5 --batch-size 16 --teacher-batch-size 8 --device cpu --amp off".split()


@functools.cache
def synthetic():
    return ltsd.make_synthetic()


def launch(out, *words):
    """ltsd.main on RUN's settings and these, with the synthetic images made only once, without waiting for the disk."""
    with pytest.MonkeyPatch.context() as m:
        images = synthetic()
        m.setattr(ltsd, "make_synthetic", lambda: ltsd.replace(images))
        m.setattr(os, "fsync", lambda file: None)  # no test pulls the plug
        return ltsd.main([*RUN, "--out", str(out), *words])


def launch_until(name, number, out, *words, error=KeyboardInterrupt):
    """The same, but the `number`-th call of a function raises an error in its place."""
    with pytest.MonkeyPatch.context() as m:
        real, calls = getattr(ltsd, name), []

        def failing(*args, **options):
            calls.append(args)
            if len(calls) == number:
                raise error
            return real(*args, **options)

        m.setattr(ltsd, name, failing)
        return launch(out, *words)


def one_line(capsys, *said):
    err = capsys.readouterr().err
    assert err.startswith("ltsd: ") and err.count("\n") == 1 and all(text in err for text in said), err


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
    out = tmp_path_factory.mktemp("whole") / "run"
    assert launch(out) == 0
    return out


@pytest.fixture
def copied_run(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copy")


RESUMED = [
    *(f"--method {m}" for m in ltsd.METHODS),
    "--method reat --aug ra --batch-size 11 --reat-tail intended",
    "--teacher-data full --teacher-method robal --kd kl",
]


@pytest.mark.parametrize("words", RESUMED)
def test_a_stopped_run_ends_bit_identical(words, tmp_path, capsys):
    """Every method; also a set of whole batches (33 images, 3 of 11)."""
    words = [*words.split(), "--epochs", "2", "--teacher-epochs", "1", "--attacks", "clean"]
    epoch = 3 if "ltsd" in words or "kl" in words else 2  # its teacher's comes first
    assert launch(tmp_path / "a", *words) == 0
    assert launch_until("augment", epoch, tmp_path / "b", *words) == 130
    assert not (tmp_path / "b" / "last.pt").exists()
    one_line(capsys, "the same command goes on")
    assert launch(tmp_path / "b", *words) == 0
    assert "student: going on after epoch 1" in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b", "best", "last")
    assert len(rows(tmp_path / "b")) == epoch
    assert all(v.isfinite().all() for v in weights(tmp_path / "a" / "last.pt").values())


def fake_clock(m, write=0.0):
    """Each epoch takes a second, each write of a file `write`, all else nothing; returns the list of what happens."""
    now, events, augment, move = [0.0], [], ltsd.augment, os.replace

    def passes(seconds, event):
        now[0] += seconds
        events.append(event)

    m.setattr(time, "perf_counter", lambda: now[0])
    m.setattr(ltsd, "augment", lambda *args: passes(1, "epoch") or augment(*args))
    m.setattr(os, "replace", lambda old, new: passes(write, pathlib.Path(new).name) or move(old, new))
    return events


def test_a_kill_before_or_after_any_write_loses_no_saved_epoch(tmp_path, monkeypatch):
    """What a SIGKILL leaves is what lies in the folder at that moment: copied before each write and after the last."""
    out, left, again = tmp_path / "run", [], tmp_path / "again"
    words = "--batch-size 64 --teacher-batch-size 64 --teacher-epochs 1 --attacks clean".split()

    def evaluate(model, *args, **options):
        return dict.fromkeys(("clean", "pgd"), int(ltsd.weights_crc32(model), 16) % 100)  # fast, of these weights only

    monkeypatch.setattr(ltsd, "evaluate", evaluate)
    with monkeypatch.context() as m:
        events, move = fake_clock(m), os.replace

        def keep_and_replace(*names):
            left.append((shutil.copytree(out, tmp_path / f"{len(left)}"), events.count("state.pt")))
            move(*names)

        m.setattr(os, "replace", keep_and_replace)
        assert launch(out, *words) == 0
    assert events.count("epoch") == events.count("state.pt") == 6 and len(left) >= 15
    for folder, saved in left:
        if 1 < saved < 6:  # stopped before the first epoch that it goes on with
            shutil.copytree(folder, again)
            assert launch_until("augment", 1, again, *words) == 130
            best = torch.load(again / "state.pt", weights_only=True)["at"]["best"]
            assert not best or equal_weights(best["weights"], weights(again / "best.pt"))
            shutil.rmtree(again)
        before = len(rows(folder))
        assert launch(folder, *words) == 0
        assert len(rows(folder)) - before == 6 - saved
        assert_same_run(out, folder)
        assert not list(folder.glob("*.tmp"))


def test_saving_takes_a_fiftieth_of_the_time_at_most_but_the_end_is_saved(tmp_path, monkeypatch):
    """A write of 0.07 s may come 3.5 s after the last one: after epochs 1, 5 and 9 of 12, and at the end."""
    with monkeypatch.context() as m:
        events = fake_clock(m, write=0.07)
        words = "--method natural --epochs 12 --stage distill --batch-size 64"
        assert launch(tmp_path / "a", *words.split()) == 0
    assert [events[:i].count("epoch") for i, event in enumerate(events) if event == "state.pt"] == [1, 5, 9, 12]


# A process that has imported ltsd once and forks a run for every line [argv, file for stderr].
NURSERY = """
import json, os, signal, sys
import ltsd
images = ltsd.make_synthetic()
ltsd.make_synthetic = lambda: ltsd.replace(images)
for line in sys.stdin:
    argv, errors = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(ltsd.main(argv))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def environment(**more):
    threads = str(torch.get_num_threads())  # another number rounds otherwise
    path = str(pathlib.Path(ltsd.__file__).parent)
    return {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": path, **more}


@pytest.fixture(scope="session")
def nursery():
    """(start, end): start(out, stderr file) begins a real process and gives its id, end() its exit code."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    process = subprocess.Popen([sys.executable, "-c", NURSERY], **pipes)

    def start(out, errors):
        print(json.dumps([[*RUN, "--out", str(out)], str(errors)]), file=process.stdin, flush=True)
        return int(process.stdout.readline())

    yield start, lambda: int(process.stdout.readline())
    process.kill()
    process.wait()


def wait_for_rows(out, number):
    deadline = time.monotonic() + 60
    while len(rows(out)) < number and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(rows(out)) >= number


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


@posix
def test_a_process_killed_again_and_again_ends_bit_identical(nursery, whole_run, tmp_path):
    (start, end), out, dice, codes = nursery, tmp_path / "run", random.Random(1), []
    while not codes or (len(codes) < 5 and codes[-1]):
        pid = start(out, tmp_path / "err")
        wait_for_rows(out, len(rows(out)) + (not (out / "last.pt").exists()))
        time.sleep(dice.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        codes.append(end())
    assert codes[:3] == [-signal.SIGKILL] * 3
    assert launch(out) == 0
    assert_same_run(whole_run, out)


@posix
def test_one_process_a_folder_and_ctrl_c_ends_it_in_one_line(nursery, whole_run, tmp_path, capsys):
    (start, end), out = nursery, tmp_path / "run"
    pid = start(out, tmp_path / "err")
    wait_for_rows(out, 1)
    os.kill(pid, signal.SIGSTOP)
    before = (out / "log.txt").read_text()
    assert launch(out) == launch(out, "--overwrite") == 2
    assert "is in use by another process: wait for it" in capsys.readouterr().err
    assert (out / "log.txt").read_text() == before
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    assert end() == 130
    said = (tmp_path / "err").read_text()
    assert said.startswith("ltsd: stopped; the same command goes on") and said.count("\n") == 1
    assert launch(out) == 0
    assert_same_run(whole_run, out)


@pytest.mark.parametrize("lr,epoch", [("1e9", 1), ("0.02", 3)])
def test_divergence_ends_in_one_line_and_keeps_what_was_saved(lr, epoch, tmp_path, capsys, monkeypatch):
    words, row, calls = f"--method at-bsl --stage distill --lr {lr}".split(), ltsd.METHODS["at-bsl"], []

    def loss(batch):
        calls.append(batch)
        value, logits = row.loss(batch)
        return value * (math.nan if epoch == 3 and len(calls) == 8 else 1), logits  # the second of epoch 3's three

    with monkeypatch.context() as m:
        fake_clock(m)
        m.setitem(ltsd.METHODS, "at-bsl", ltsd.replace(row, loss=loss))
        assert launch(tmp_path / "a", *words) == 2
    one_line(capsys, "the loss was not finite", f"epoch {epoch}, up to step", "--lr")
    if epoch == 3:
        assert launch(tmp_path / "a", *words) == 0 and "going on after epoch 2" in capsys.readouterr().out
        assert launch(tmp_path / "b", *words) == 0
        assert equal_weights(*(weights(tmp_path / d / "last.pt") for d in "ab"))


def test_evaluation_does_not_change_weights(whole_run, tmp_path, monkeypatch):
    monkeypatch.setattr(ltsd, "evaluate", lambda *a, **kw: {"clean": torch.rand(()).item(), "pgd": 0.0})
    assert launch(tmp_path / "a", "--stage", "teacher") == launch(tmp_path / "a", "--stage", "distill") == 0
    assert equal_weights(weights(whole_run / "last.pt"), weights(tmp_path / "a" / "last.pt"))


def test_learning_rates(whole_run):
    rates = {1: 0.1, 75: 0.1, 76: 0.01, 90: 0.01, 91: 0.001, 100: 0.001}
    assert {e: round(ltsd.lr_at(e, 100, 0.1), 9) for e in rates} == rates
    assert [round(ltsd.lr_at(e, 120, 1.0, (74 / 120, 1)), 9) for e in (74, 75, 120)] == [1, 0.1, 0.1]
    used = [row.split()[3] for row in rows(whole_run)]
    assert used == ["0.02", "0.0002", "0.02", "0.02", "0.02", "0.002", "0.0002"]


def test_the_time_estimate_comes_early_and_counts_autoattack(tmp_path, capsys, monkeypatch):
    """A batch of 8 takes a second here. AutoAttack: 2,400 passes a test image, best and last; a training image: 11."""
    now, outer_step, told = [0.0], ltsd.outer_step, []
    for attacks in ("clean", "clean,aa"):
        with monkeypatch.context() as m:
            m.setattr(time, "perf_counter", lambda: now[0])
            m.setattr(ltsd, "outer_step", lambda *args: now.insert(0, now[0] + 1) or outer_step(*args))
            assert launch_until("augment", 2, tmp_path / attacks, "--gamma", "4", "--attacks", attacks) == 130
        lines = capsys.readouterr().out.split("\n")
        (said,) = [i for i, line in enumerate(lines) if " on this device (" in line]
        assert lines[said + 1].startswith("teacher    1/2")
        total, *parts = re.findall(r"(\d+):(\d+):(\d+)", lines[said])
        told.append(int(total[0]) * 3600 + int(total[1]) * 60 + int(total[2]))
        assert parts[0] == ("0", "00", str(2 * 80 // 8))  # the teacher
    assert abs(told[1] - told[0] - 2 * 10 * 2400 / 11 / 8) <= 1


def test_stages_run_alone_and_what_is_done_is_not_repeated(whole_run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a"
    for stage in ("distill", "eval"):
        assert launch(out, "--stage", stage) == 2
        one_line(capsys, "teacher.pt")
    for stage in ("teacher", "train", "eval"):
        assert launch(out, "--stage", stage) == 0
    assert_same_run(whole_run, out)
    monkeypatch.setattr(ltsd, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(ltsd, "evaluate", lambda *a, **kw: pytest.fail("evaluated again"))
    capsys.readouterr()
    assert launch(out) == 0 and "best (epoch" in capsys.readouterr().out
    for stage in ("eval", "distill"):
        assert launch(out, "--stage", stage, "--overwrite") == 2
        one_line(capsys, f"would delete what --stage {stage} needs")
    monkeypatch.undo()
    assert launch_until("augment", 1, out, "--overwrite") == 130 and not (out / "last.pt").exists()


def test_a_given_teacher_is_copied_and_not_exchanged(whole_run, tmp_path, capsys, monkeypatch):
    words = ["--epochs", "1", "--stage", "distill", "--kd", "kl", "--teacher"]
    seen, real = [], ltsd.distillation_loss
    monkeypatch.setattr(ltsd, "distillation_loss", lambda *args: seen.append(args) or real(*args))
    assert launch(tmp_path / "a", *words, str(whole_run / "teacher.pt")) == 0
    assert equal_weights(weights(whole_run / "teacher.pt"), weights(tmp_path / "a" / "teacher.pt"))
    assert len(seen) == 3 and seen[0][0].requires_grad and not seen[0][1].requires_grad  # --kd kl: no differences
    assert launch(tmp_path / "a", *words, str(whole_run / "teacher.pt")) == 0
    capsys.readouterr()
    for path, said in ((whole_run / "last.pt", "has another teacher than"), (tmp_path / "none.pt", "none.pt")):
        assert launch(tmp_path / "a", *words, str(path)) == 2
        one_line(capsys, said)


# Faults --------------------------------------------------------------------------------------------------------------


def test_another_configuration_or_other_images_in_the_same_folder_are_refused(copied_run, capsys, monkeypatch):
    assert launch(copied_run, "--seed", "1", "--lr", "0.5") == 2
    one_line(capsys, "(lr 0.02 there, 0.5 here, seed 0 there, 1 here)", "--overwrite")
    images = synthetic()
    monkeypatch.setattr(sys.modules[__name__], "synthetic", lambda: other)
    other = ltsd.replace(images, train_images=images.train_images + (images.train_images < 255))
    assert launch(copied_run) == 2
    one_line(capsys, "(images ", "--overwrite")
    with pytest.raises(ZeroDivisionError):  # an unexpected error shows its traceback
        launch_until("load_data", 1, copied_run, error=ZeroDivisionError)


@pytest.mark.parametrize("name,number", [("state.pt", 5), ("best.pt", 1), ("results.json", 2)])
def test_a_full_disk_is_named_and_costs_no_epoch(name, number, whole_run, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        events, move = fake_clock(m), os.replace

        def full(source, target):
            if pathlib.Path(target).name == name and events.count(name) == number - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            move(source, target)

        m.setattr(os, "replace", full)
        assert launch(tmp_path / "a") == 2
    one_line(capsys, f"cannot write {tmp_path / 'a' / name}", "No space left on device")
    before, saved = len(rows(tmp_path / "a")), events.count("state.pt")
    assert launch(tmp_path / "a") == 0
    assert_same_run(whole_run, tmp_path / "a")
    assert len(rows(tmp_path / "a")) - before == 7 - saved


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


# Several ranks -------------------------------------------------------------------------------------------------------

# Checks in each step that the gradient is the mean of the shares' own, after each training that the weights agree.
RANK_PROGRAM = """
import copy, os, sys
import torch
import ltsd

outer_step, train, gather, steps = ltsd.outer_step, ltsd.train, ltsd.gather, []

def checked_step(row, batch, model, *others):
    nets = [copy.deepcopy(model).train() for _ in range(2)]
    result = outer_step(row, batch, model, *others)
    steps.append(row)
    if len(steps) % 6 != 1:
        return result
    (x, *_), (other_x, *_) = shares = gather((batch.x, batch.x_adv, batch.y))
    assert x.shape == other_x.shape and not torch.equal(x, other_x)
    for net, (x, x_adv, y) in zip(nets, shares):
        row.loss(ltsd.replace(batch, student=net, x=x, x_adv=x_adv, y=y))[0].backward()
    for p, a, b in zip(model.parameters(), *(net.parameters() for net in nets)):
        torch.testing.assert_close(p.grad, (a.grad + b.grad) / 2, rtol=1e-5, atol=1e-6)
    for p, a, b in zip(model.buffers(), *(net.buffers() for net in nets)):
        torch.testing.assert_close(p, (a + b) / 2 if p.is_floating_point() else a)
    return result

def checked_train(*args):
    model = train(*args)
    one, two = gather(ltsd.weights_of(model))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    return model

ltsd.outer_step, ltsd.train = checked_step, checked_train
ltsd.evaluate.__kwdefaults__["batch_size"] = 6
ltsd.autoattack.__kwdefaults__ |= dict(iterations=3, queries=10, targets=2)
sys.exit(ltsd.main(sys.argv[1:]))
"""


def test_two_ranks_step_with_the_mean_gradient_and_evaluate_as_one_process(tmp_path, monkeypatch):
    out, words = tmp_path / "two", "--train-limit 240 --test-limit 20 --epochs 4 --eps 1 --batch-size 32 --lr 0.1"
    words = [*words.split(), *"--teacher-batch-size 32 --attacks clean,pgd,aa --eval-eps 12".split()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    command = [sys.executable, "-c", RANK_PROGRAM, *RUN, *words, "--out", str(out)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ranks = [environment(**group, RANK=rank, LOCAL_RANK=rank) for rank in "01"]
    ranks = [subprocess.Popen(command, env=env, **pipes) for env in ranks]
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
    for name, value in dict(iterations=3, queries=10, targets=2).items():
        monkeypatch.setitem(ltsd.autoattack.__kwdefaults__, name, value)
    assert launch(out, *words, "--stage", "eval") == 0
    assert entries(out) == two and 0 < two["last"]["aa"] < two["last"]["clean"]


def test_what_several_ranks_cannot_do_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ltsd, "WORLD", 2)
    said = {"--batch-size 15": "must be a multiple of 2", "--teacher-batch-size 7": "must be a multiple of 2"}
    for words, reason in (
        said | {f"--stage {s}": "works in one process" for s in ("report", "bench", "theory")}
    ).items():
        assert ltsd.main([*RUN, *words.split(), "--out", str(tmp_path / "a")]) == 2
        one_line(capsys, f"{words}: {reason}")
    assert not (tmp_path / "a").exists()


# Evaluation ----------------------------------------------------------------------------------------------------------


def always(*logits):
    """A network that says the same of every image of 4 x 4 pixels."""
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, len(logits))).train()
    nn.init.zeros_(net[2].weight)
    net[2].bias.data = torch.tensor(logits)
    return net


U8, Y = torch.zeros(8, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])


def test_accuracies_by_hand():
    net = always(1.0, 0.0, 0.5)
    got = ltsd.evaluate(net, U8, Y, tail=[0, 2], attacks=("clean",))
    assert got == dict(clean=62.5, class_clean=[100, 0, 0], tail_clean=500 / 6, balanced_clean=pytest.approx(100 / 3))
    even = ltsd.evaluate(net, U8[4:6], Y[4:6], tail=[2], attacks=("pgd",))
    assert even == dict(pgd=50.0, class_pgd=[100, 0], tail_pgd=None)  # no image of the tail; classes of equal size
    assert ltsd.evaluate(always(math.nan, 0.0, 0.0), U8, Y, attacks=("clean",))["clean"] == 0


def test_evaluate_refuses_odd_input():
    odd = [(U8.float(), Y, {}), (U8.numpy(), Y, {}), (U8, Y[:3], {}), (U8, Y.float(), {}), (U8[:0], Y[:0], {})]
    odd += [(U8, Y, more) for more in (dict(attacks="pgd"), dict(attacks=["PGD"]), dict(batch_size=0), dict(eps=8))]
    for images, labels, more in odd:
        with pytest.raises(ValueError, match="float32|ndarray|int64 .3|N > 0|attacks .*, batch_size|divide by 255"):
            ltsd.evaluate(always(0.0, 1.0, 0.0), images, labels, **more)


@pytest.mark.parametrize("make", [lambda: always(1.0, 0.0, 0.5), lambda: ltsd.build_model("resnet8", 3)])
def test_evaluate_leaves_model_and_global_randomness_alone(make):
    net = make().train()
    net[-1].eval()
    before, state = ltsd.weights_of(net), torch.get_rng_state()
    one, two = (ltsd.evaluate(net, U8, Y, steps=2, batch_size=5, seed=4) for _ in range(2))
    assert one == two and torch.equal(state, torch.get_rng_state()) and equal_weights(before, ltsd.weights_of(net))
    assert net.training and not net[-1].training and all(p.grad is None for p in net.parameters())


def count_evaluations(monkeypatch):
    seen, real = [], ltsd.evaluate
    monkeypatch.setattr(ltsd, "evaluate", lambda *a, **kw: seen.append(kw["attacks"]) or real(*a, **kw))
    return seen


def test_an_entry_belongs_to_weights_test_images_and_threat(copied_run, monkeypatch):
    seen, words, first = count_evaluations(monkeypatch), ["--stage", "eval"], results(copied_run)
    shutil.copy(copied_run / "teacher.pt", copied_run / "last.pt")
    assert launch(copied_run, *words) == 0 and len(seen) == 1
    assert entries(copied_run)["last"]["clean"] == entries(copied_run)["teacher"]["clean"]
    assert entries(copied_run)["best"] == first["checkpoints"]["best, eps 8 in 2 steps of 2"]
    weak = [*words, "--eval-eps", "2", "--eval-steps", "20"]
    assert launch(copied_run, *weak) == launch(copied_run, *weak) == 0 and len(seen) == 4
    usual = [*words, "--eval-steps", "20", "--attacks", "clean"]
    assert launch(copied_run, *usual) == 0 and len(seen) == 7
    threats = [", eps 8 in 2 steps of 2", ", eps 2 in 20 steps of 2", ""]
    keys = [name + threat for threat in threats for name in ("teacher", "best", "last")]
    assert list(results(copied_run)["checkpoints"]) == keys
    images = synthetic()
    other = ltsd.replace(images, test_images=images.test_images + (images.test_images < 255))
    monkeypatch.setattr(sys.modules[__name__], "synthetic", lambda: other)
    assert launch(copied_run, *words) == 0 and len(seen) == 10
    assert list(results(copied_run)["checkpoints"]) == keys[:3]
    assert results(copied_run)["data"]["test"]["crc32"] != first["data"]["test"]["crc32"]


def test_an_interrupted_autoattack_goes_on(copied_run, tmp_path, monkeypatch):
    """The teacher's row has no AutoAttack; best and last, here the same weights, are evaluated once."""
    shutil.copy(copied_run / "best.pt", copied_run / "last.pt")
    assert launch(copied_run, "--stage", "eval") == 0
    other, words = shutil.copytree(copied_run, tmp_path / "other"), ["--stage", "eval", "--attacks", "clean,pgd,aa"]
    ran, real = [], ltsd.run_lanes
    monkeypatch.setattr(ltsd, "run_lanes", lambda name, *args: ran.append(name) or real(name, *args))
    for name, value in dict(iterations=3, queries=5, targets=2).items():
        monkeypatch.setitem(ltsd.autoattack.__kwdefaults__, name, value)
    assert launch_until("run_lanes", 3, other, *words) == 130
    assert ran == list(ltsd.AUTOATTACK[:2]) and (other / "aa.pt").exists()
    ran.clear()
    seen = count_evaluations(monkeypatch)
    assert launch(other, *words) == launch(copied_run, *words) == 0
    assert ran == [*ltsd.AUTOATTACK[2:], *ltsd.AUTOATTACK] and seen == [["aa"], ["aa"]]
    assert not (other / "aa.pt").exists()
    figures, same = entries(other), entries(copied_run)
    assert figures == same and figures["best"] == figures["last"] and "aa" not in figures["teacher"]
    assert figures["best"]["aa"] <= figures["best"]["pgd"] and len(figures["best"]["class_aa"]) == 10


def test_a_foreign_checkpoint_is_scored(copied_run, tmp_path, capsys):
    """In a run's folder and in a new one."""
    path, net = tmp_path / "theirs.pt", ltsd.build_model("resnet8", 10)
    ltsd.load_weights(net, copied_run / "teacher.pt")
    torch.save({"net": {f"module.{k}": v for k, v in net.state_dict().items()}}, path)
    for out in (copied_run, tmp_path / "new"):
        assert launch(out, "--stage", "eval", "--checkpoint", str(path), "--eval-steps", "20") == 0
        data = ltsd.load_data(ltsd.resolve(ltsd.parse_args(RUN)))
        entry = results(out)["checkpoints"][str(path)]
        figures = ltsd.evaluate(net, data.test_images, data.test_labels, tail=[9])
        assert entry == figures | {"epoch": None, "crc32": ltsd.weights_crc32(net)}


def test_examples_are_a_grid_of_clean_attacked_and_difference(copied_run, capsys):
    assert launch(copied_run, "--stage", "eval", "--examples", "5") == 0
    data, index = ltsd.load_data(ltsd.resolve(ltsd.parse_args(RUN))), torch.linspace(0, 9, 5).long()
    (line,) = [line for line in capsys.readouterr().out.split("\n") if "examples-last.png" in line]
    assert re.findall(r"(\d+): \d+ > \d+", line) == [str(y) for y in data.test_labels[index].tolist()]
    for name in ("teacher", "best", "last"):
        grid = np.asarray(Image.open(copied_run / f"examples-{name}.png")).astype(int)
        assert grid.shape == (2 * 34 + 2, 12 * 34 + 2, 3)  # four triples a row, two pixels of padding
        tiles = [grid[2 + 34 * (i // 12) :][:32, 2 + 34 * (i % 12) :][:, :32] for i in range(15)]
        for x, adv, difference, i in zip(tiles[::3], tiles[1::3], tiles[2::3], index):
            assert np.array_equal(x, data.test_images[i].permute(1, 2, 0).numpy()) and 0 < abs(adv - x).max() <= 8
            assert abs(difference - (127.5 + 10 * (adv - x)).clip(0, 255)).max() <= 11


# Report --------------------------------------------------------------------------------------------------------------


def fake_run(folder, numbers, **settings):
    """A finished run's folder; numbers: clean, pgd, tail_clean, tail_pgd of best and last (epochs 99 and 100)."""
    cfg = ltsd.resolve(ltsd.Config(**dict(device="cpu", amp="off", compile="off") | settings))
    m = dict(zip(("clean", "pgd", "tail_clean", "tail_pgd"), numbers, strict=True))
    m |= {f"class_{k}": [m[k]] * 9 + [m[f"tail_{k}"]] for k in ("clean", "pgd")}
    checkpoints = {"best": m | dict(epoch=99), "last": m | dict(epoch=100)}
    data = dict(classes=list("abcdefghij"), tail_classes=[9])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"identity": ltsd.identity(cfg), "config": ltsd.asdict(cfg)}))
    (folder / "results.json").write_text(json.dumps({"data": data, "checkpoints": checkpoints}))
    return folder


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
    clean = (46.13, 46.57, 46.47, 46.59, 46.01)  # Table 10, which gives 46.35 and 0.27
    for seed, value in enumerate(clean):
        fake_run(tmp_path / f"ltsd{seed}", (value, 20, 30, 10 + seed), seed=seed)
    fake_run(tmp_path / "one", (1, 2, 3, 4), method="trades", epochs=3)
    table, _ = report(capsys, tmp_path, tmp_path / "lts*", tmp_path / "one", tmp_path / "ltsd0")
    label = "cifar100 IR 10 resnet18 ltsd (5 runs)"
    assert table[0] == ["setting", "checkpoint", "clean", "PGD-20", "T-clean", "T-PGD"]
    assert table[2] == [label, "best (epoch 99)", "46.35 ± 0.27", "20.00 ± 0.00", "30.00 ± 0.00", "12.00 ± 1.58"]
    assert table[3] == ["", "paper", "46.13", "22.42", "38.90", "17.90"]
    assert table[4] == ["", "gap", "+0.22", "-2.42", "-8.90", "-5.90"]
    assert table[5][:3] == [label, "last (epoch 100)", "46.35 ± 0.27"]
    one = "cifar100 IR 10 resnet18 trades seed 0"
    assert table[6][1:3] == ["paper", "47.22"] and table[7][1:3] == ["gap", "-0.87"]
    assert table[8:] == [
        [one, f"{at})", "1.00", "2.00", "3.00", "4.00"] for at in ("best (epoch 99", "last (epoch 100")
    ]


def test_a_report_lists_what_it_cannot_show(tmp_path, capsys):
    good = fake_run(tmp_path / "good", (50, 20, 30, 10))
    broken = {name: fake_run(tmp_path / name, (50, 20, 30, 10)) for name in "abcdefg"}
    (broken["a"] / "config.json").write_text("{")
    (broken["b"] / "results.json").unlink()
    change_json(broken["c"] / "results.json", checkpoints={})
    change_json(broken["d"] / "results.json", checkpoints={"best": {"clean": "many"}})
    change_json(broken["e"] / "config.json", config={"colour": 3})
    change_json(broken["f"] / "results.json", checkpoints={"best, eps 2 in 20 steps of 2": {"clean": 3.0}})
    (broken["g"] / "results.json").write_text("[]")
    paths = [*broken.values(), tmp_path / "none*"]
    table, notes = report(capsys, tmp_path, good, *paths)
    left = [line for line in notes if line.startswith("Left out: ")]
    assert len(left) == 8 and all(str(path) in line for path, line in zip(paths, left)) and table[2][2] == "50.00"
    assert ltsd.main(["--stage", "report", *map(str, paths), "--out", str(tmp_path / "o")]) == 2
    one_line(capsys, *map(str, paths))
    assert not (tmp_path / "o").exists()


def test_an_unknown_method_and_another_threat_stand_without_the_papers_row(tmp_path, capsys):
    run = fake_run(tmp_path / "a", (50, 20, 30, 10))
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(run, tmp_path / "b")
    change_json(tmp_path / "b" / "config.json", **{k: v | {"method": "magic"} for k, v in config.items()})
    table, _ = report(capsys, tmp_path, tmp_path / "b")
    assert [row[0] for row in table[2:]] == ["cifar100 IR 10 resnet18 magic seed 0"] * 2
    entry = json.loads((run / "results.json").read_text())["checkpoints"]["best"]
    change_json(run / "results.json", checkpoints={"best, eps 2 in 10 steps of 2": entry | {"pgd": 33.0}})
    table, notes = report(capsys, tmp_path, run, "--eval-eps", "2", "--eval-steps", "10")
    assert table[0][3] == "PGD-10" and [row[3] for row in table[2:]] == ["33.00"] and "eps 2/255" in notes[0]


def test_comma_lists_end_in_one_report(tmp_path):
    words = "--method natural,at-bsl --seed 0,1 --epochs 1 --attacks clean --stage all"
    assert launch(tmp_path, *words.split()) == 0
    lines = (tmp_path / "report.md").read_text().split("\n")
    best = [line.split("|")[1].strip() for line in lines if "best (epoch 1)" in line]
    assert best == [f"synthetic IR 3 resnet8 {m} (2 runs)" for m in ("natural", "at-bsl")]
    assert len(list(tmp_path.glob("*/last.pt"))) == len(list(tmp_path.glob("*/report.md"))) == 4


def test_figures_show_the_means(tmp_path, capsys, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    for i, settings in enumerate([dict(alpha=10.0), dict(alpha=20.0), dict(gamma=2.0), dict(ir=50.0), {}]):
        fake_run(tmp_path / f"r{i}", (50 + i, 20, 30, 10), **settings)
    fake_run(tmp_path / "r5", (48, 21, 33, 11), alpha=10.0, seed=1)
    fake_run(tmp_path / "r6", (40, 15, 10, 5), method="at-bsl")
    drawn, real, words = {}, figure.Figure.savefig, [tmp_path / "r?", "--figures", tmp_path / "f"]

    def savefig(self, path, **options):
        drawn[pathlib.Path(path).stem] = [[c.lines[0] for c in ax.containers] for ax in self.axes]
        real(self, path, **options)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    report(capsys, tmp_path, *words)
    assert {p.name: Image.open(p).size[0] > 500 for p in (tmp_path / "f").iterdir()} == {
        f"{k}.png": True for k in drawn
    }
    at = {key: [[line.get_xydata().tolist() for line in ax] for ax in drawn[key]] for key in drawn}
    hollow = [line.get_markerfacecolor() == "none" for line in drawn["scatter"][0]]
    points, kinds = [xy[0] for xy in at["scatter"][0]], [line.get_marker() for line in drawn["scatter"][0]]
    ours = [[49, 20.5], [51, 20], [52, 20], [53, 20], [54, 20], [40, 15]]
    assert [xy for xy, empty in zip(points, hollow) if not empty] == ours
    papers = {tuple(xy): kind for xy, kind, empty in zip(points, kinds, hollow) if empty}
    other = kinds[points.index([40, 15])]
    assert [kinds[points.index(xy)] for xy in ours[:5]] == ["*"] * 5 and other != "*"
    assert papers == {(46.13, 22.42): "*", (45.38, 18.04): other, (38.09, 16.65): "*"}
    assert at["scatter"][1][0] == [[31.5, 10.5]]
    assert at["classes"][0][0] == [[i, 20.5] for i in range(1, 10)] + [[10, 10.5]]
    assert at["ir"][0] == [[[10, 54], [50, 53]], [[10, 20], [50, 20]]]
    assert at["alpha"][0][0] == [[10, 49], [20, 51], [40, 54]] and at["alpha"][1][1] == [[10, 10.5], [20, 10], [40, 10]]
    assert at["gamma"][0][0] == [[2, 52], [5, 54]]  # gamma's default is IR/2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ltsd.main(["--stage", "report", *map(str, words), "--out", str(tmp_path)]) == 2
    one_line(capsys, "pip install matplotlib")


# Your own method -----------------------------------------------------------------------------------------------------


def test_a_method_added_from_outside_trains_goes_on_and_is_reported(tmp_path, monkeypatch):
    def margin(b):
        logits = b.student(b.x_adv)
        return nn.functional.multi_margin_loss(logits, b.y) + b.cfg.beta * logits.square().mean(), logits

    monkeypatch.setitem(ltsd.METHODS, "margin", ltsd.Method(margin, init="uniform"))
    words = ["--method", "margin", "--epochs", "2", "--beta", "0.1", "--attacks", "clean"]
    assert launch(tmp_path / "a", *words) == 0
    assert launch_until("augment", 2, tmp_path / "b", *words) == 130 and launch(tmp_path / "b", *words) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b", "best", "last")
    assert "synthetic IR 3 resnet8 margin seed 0" in (tmp_path / "b" / "report.md").read_text()
