"""Long-Tailed Adversarial Training with Self-Distillation (ICLR 2025) in one file.

Adversarial training on long-tailed data leaves the rare classes defenceless. The paper's remedy, reproduced
here: an adversarially trained *self-teacher* is fitted on a class-balanced resample D_B of the long-tailed
set D; the student, trained adversarially on D with balanced softmax, distils from it (section 7, ``_ltsd``).

    python ltsd.py --data synthetic                        # the whole pipeline, two minutes on two CPU cores
    python ltsd.py --data cifar100 --ir 10 --stage all     # the paper's Table 2: teacher, student, evaluation
    python ltsd.py --data folder --data-dir DIR --ir 50    # your images: DIR/train/CLASS/*, DIR/test/CLASS/*

Sections: 1 setup, 2 config, 3 data, 4 models, 5 step, 6 attack, 7 methods, 8 training, 10 evaluation, 11
report, 14 main. Images are float32 in [0,1], NCHW, channels_last; labels int64; eps and step_size are
fractions in the functions and 255ths on the command line. Importing has no side effects: import what you
need.
"""

# ==========================================================================================================
# 1  Setup
# ==========================================================================================================

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import calculate_md5, download_url

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: the reference step takes over
    HAS_TRITON = False

SYNC_EVERY = 50  # training steps between two reads of device-side values
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


class UserError(Exception):
    """A mistake the user can mend: ``main`` prints its one line and returns 2."""


def derive_seed(seed, *words):
    """A 63-bit seed from the run's seed and a purpose, so that no two purposes share a random stream."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def ieee_float32():
    """Switch TF32 off inside: a verdict must not depend on a ten-bit mantissa."""
    conv, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = conv, matmul


# ==========================================================================================================
# 2  Config
# ==========================================================================================================


def _flag(default, help, *, low=None, high=None, choices=None, many=False, identity=True):
    """A Config field: default, help, inclusive bounds; many: takes a comma list; identity: names the run."""
    meta = dict(help=help, low=low, high=high, choices=choices, many=many, identity=identity)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """Every setting of a run, one field per flag; None stands for the data set's or the method's own
    default."""

    # fmt: off
    data: str = _flag("cifar100", "data set",
                      choices=("cifar10", "cifar100", "tinyimagenet", "folder", "synthetic"))
    data_dir: str = _flag("data", "folder that holds, or will hold, the data", identity=False)
    image_size: int = _flag(None, "side of the images of --data folder (32)", low=8, high=512)
    ir: float = _flag(None, "imbalance ratio n_max/n_min (cifar10 50, cifar100 and tinyimagenet 10, "
                      "synthetic 20, folder: the natural counts)", low=1, many=True)
    method: str = _flag("ltsd", "training method, or 'all'", many=True)
    arch: str = _flag(None, "network (resnet18; tinyimagenet preactresnet18, synthetic resnet8)",
                      choices=("resnet18", "preactresnet18", "wrn34-10", "resnet8"))
    stage: str = _flag("all", "what to do; 'train' is another name of 'distill'", identity=False,
                       choices=("all", "teacher", "distill", "train", "eval", "report"))
    alpha: float = _flag(None, "final weight of the distillation term, reached by a linear ramp (40; "
                         "synthetic 10)", low=0, many=True)
    tau: float = _flag(1.0, "strength of the class prior in balanced softmax, b_c = tau ln n_c", low=0)
    gamma: float = _flag(None, "D_B has floor(gamma n_min) images a class (IR/2, at least 1)", low=0,
                         many=True)
    epochs: int = _flag(None, "student epochs (100; synthetic 12)", low=1)
    teacher_epochs: int = _flag(None, "teacher epochs (30; synthetic 8)", low=1)
    batch_size: int = _flag(None, "student batch size (128; synthetic 64)", low=1)
    teacher_batch_size: int = _flag(32, "teacher batch size", low=1)
    lr: float = _flag(0.1, "first learning rate of SGD; a tenth after 75 %, a hundredth after 90 %", low=0)
    weight_decay: float = _flag(5e-4, "weight decay", low=0)
    momentum: float = _flag(0.9, "momentum", low=0, high=1)
    eps: float = _flag(8.0, "L-inf radius of the training attack, in 255ths", low=0, high=255)
    step_size: float = _flag(2.0, "step of the training attack, in 255ths", low=0, high=255)
    steps: int = _flag(10, "steps of the training attack", low=0)
    eval_eps: float = _flag(None, "L-inf radius of the evaluation, in 255ths (= --eps)", low=0, high=255,
                            identity=False)
    eval_step_size: float = _flag(2.0, "step of the evaluation's PGD, in 255ths", low=0, high=255,
                                  identity=False)
    eval_steps: int = _flag(20, "steps of the evaluation's PGD", low=0, identity=False)
    attacks: str = _flag(None, "what to evaluate (clean,pgd)", identity=False)
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N", identity=False)
    amp: str = _flag("auto", "precision of the convolutions; auto: bf16 where the hardware has it, fp16 on "
                     "older GPUs, else off", choices=("auto", "bf16", "fp16", "off"))
    seed: int = _flag(0, "seed of the weights, of D_B and of every other draw", low=0, many=True)
    out: str = _flag(None, "run folder (runs/NAME; with comma lists the parent of the run folders)",
                     identity=False)
    overwrite: bool = _flag(False, "start afresh in a folder that holds a run", identity=False)
    checkpoint: str = _flag(None, "with --stage eval: score this file, not the run's own", identity=False)
    train_limit: int = _flag(None, "about this many training images, before the long-tail draw", low=1)
    test_limit: int = _flag(None, "about this many test images", low=1)
    debug: bool = _flag(False, "show tracebacks", identity=False)
    # fmt: on


# What is fixed about a data set: classes, image side, classes in the tail group, its own defaults.
# fmt: off
COMMON = dict(arch="resnet18", alpha=40.0, epochs=100, teacher_epochs=30, batch_size=128, attacks="clean,pgd")
SMALL = dict(arch="resnet8", alpha=10.0, epochs=12, teacher_epochs=8, batch_size=64)
DATASETS = {
    "cifar10":      (10, 32, 1, dict(ir=50.0)),
    "cifar100":     (100, 32, 10, dict(ir=10.0)),
    "tinyimagenet": (200, 64, 20, dict(ir=10.0, arch="preactresnet18")),
    "folder":       (None, 32, None, {}),
    "synthetic":    (10, 32, 1, dict(ir=20.0, **SMALL)),
}
# fmt: on


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage too; one line is enough
        raise UserError(message)


def _parse_value(f, text):
    """One flag's text -> its value, or a tuple of values where the flag takes a comma list."""
    many, values = f.metadata["many"], []
    for part in METHODS if f.name == "method" and text == "all" else text.split(",") if many else [text]:
        try:
            values.append(f.type(part.strip()))
        except ValueError:
            raise UserError(
                f"--{_dashed(f.name)} {part!r}: expected a value of type {f.type.__name__}"
            ) from None
    return values[0] if len(values) == 1 else tuple(values)


def _dashed(name):
    return name.replace("_", "-")


def parse_args(argv=None) -> Config:
    """Read the command line (default ``sys.argv[1:]``) into a Config; UserError for what no run can have.

    A field given several comma-separated values holds a tuple; ``expand`` makes the product.
    """
    parser = _Parser("ltsd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        meta = f.metadata
        default = (
            ""
            if f.default in (None, False)
            else f" ({f.default:g})"
            if f.type is float
            else f" ({f.default})"
        )
        text = meta["help"] + ("; a comma list makes a run each" if meta["many"] else "") + default
        kind = dict(action="store_true") if f.type is bool else dict(metavar=f.type.__name__.upper())
        if meta["choices"]:
            kind = dict(metavar="{" + ",".join(meta["choices"]) + "}")
        elif f.name == "method":
            kind = dict(metavar="{" + ",".join(METHODS) + "}")
        parser.add_argument(
            "--" + _dashed(f.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **kind
        )
    given, by_name = vars(parser.parse_args(argv)), {f.name: f for f in fields(Config)}
    cfg = Config(**{k: v if v is True else _parse_value(by_name[k], v) for k, v in given.items()})
    for one in expand(cfg):
        validate(one)
    return cfg


def expand(cfg) -> list:
    """The scalar Configs that a Config with comma lists stands for: their product."""
    names = [f.name for f in fields(cfg) if isinstance(getattr(cfg, f.name), tuple)]
    products = itertools.product(*(getattr(cfg, name) for name in names))
    return [replace(cfg, **dict(zip(names, values, strict=True))) for values in products]


def validate(cfg) -> None:
    """Raise UserError, naming the flag and the remedy, for a value that no run can have."""
    for f in fields(cfg):
        value, meta, flag = getattr(cfg, f.name), f.metadata, "--" + _dashed(f.name)
        choices = METHODS if f.name == "method" else meta["choices"]
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(f"{flag} {value!r}: choose from {', '.join(choices)}")
        if f.type is float and not math.isfinite(value):
            raise UserError(f"{flag} {value}: must be a finite number")
        if meta["low"] is not None and value < meta["low"]:
            raise UserError(f"{flag} {value:g}: must be at least {meta['low']:g}")
        if meta["high"] is not None and value > meta["high"]:
            raise UserError(f"{flag} {value:g}: must be at most {meta['high']:g}")
    if cfg.attacks is not None and not set(cfg.attacks.split(",")) <= set(ATTACKS):
        raise UserError(f"--attacks {cfg.attacks!r}: a comma list of {', '.join(ATTACKS)}")
    if cfg.image_size and cfg.data != "folder":
        raise UserError(f"--image-size {cfg.image_size}: only --data folder can be resized; leave it out")
    if cfg.checkpoint and cfg.stage != "eval":
        raise UserError(f"--checkpoint {cfg.checkpoint}: goes with --stage eval only")


def resolve(cfg) -> Config:
    """Fill every None of a scalar Config with its default, and 'auto' with what this machine has."""
    _, size, _, defaults = DATASETS[cfg.data]
    filled = {**COMMON, "image_size": size, "eval_eps": cfg.eps, **defaults}
    cfg = replace(cfg, **{k: v for k, v in filled.items() if getattr(cfg, k) is None})
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; try --device cpu"
        )
    amp = best_precision(device) if cfg.amp == "auto" else cfg.amp
    return replace(cfg, device=name, amp=amp, stage="distill" if cfg.stage == "train" else cfg.stage)


def best_precision(device) -> str:
    """'bf16', 'fp16' or 'off': the precision in which this device multiplies faster than in float32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "off"


# ==========================================================================================================
# 3  Data
# ==========================================================================================================


@dataclass
class Data:
    """A training and a test set: uint8 NCHW images, int64 labels, class 0 the most frequent."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    counts: list = ()  # training images per class
    tail: list = ()  # the classes of the tail group

    def fingerprint(self):
        """A checksum of the training set: does a resumed run see the same data?"""
        return zlib.crc32(self.train_labels.numpy(), zlib.crc32(self.train_images.contiguous().numpy()))

    def to(self, device):
        """The same data with its four tensors on `device`."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def long_tail_counts(n_max, num_classes, ir) -> list:
    """Images per class of the exponential profile: int(n_max * ir**(-c/(C-1))), class 0 the head, C-1 the
    tail.

    n_max, num_classes: int >= 1; ir: imbalance ratio n_max/n_min >= 1 (1 keeps all). Truncated, not rounded,
    as in the LDAM generator that RoBal, REAT and AT-BSL share. ValueError where a class would be empty.
    """
    if not ir >= 1 or n_max < 1 or num_classes < 1:
        raise ValueError(
            f"imbalance ratio {ir}, n_max {n_max}, {num_classes} classes: each must be at least 1"
        )
    counts = [int(n_max * ir ** (-c / max(num_classes - 1, 1))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(
            f"imbalance ratio {ir:g} leaves class {counts.index(0)} empty: at most {n_max} is possible"
        )
    return counts


def long_tail_indices(labels, counts) -> np.ndarray:
    """Positions of the long-tailed subset, class by class: the very images that RoBal, REAT and AT-BSL use.

    labels: int array [N]; counts: images wanted per class. NumPy's legacy generator, seeded 0, shuffles each
    class's ascending positions in turn; the first n_c stay. Returns int64 [sum(counts)] and touches no global
    generator. ValueError where a class has too few images.
    """
    labels, rng, chosen = np.asarray(labels), np.random.RandomState(0), []
    for c, wanted in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if len(members) < wanted:
            raise ValueError(f"class {c} has {len(members)} images, {wanted} are wanted: lower n_max or ir")
        rng.shuffle(members)
        chosen.append(members[:wanted])
    return np.concatenate(chosen).astype(np.int64)


def balanced_indices(labels, per_class, seed) -> np.ndarray:
    """Draw the paper's D_B (section 4.2): exactly per_class positions of every class, each position floor or
    ceil times equally often.

    labels: int array [N] with classes 0..C-1; per_class: int >= 1. Large classes are thinned without
    replacement; small ones repeated whole, the remainder drawn without replacement. Returns int64
    [C*per_class]. ValueError for per_class < 1 or an empty class.
    """
    labels, rng, chosen = np.asarray(labels), np.random.default_rng(seed), [np.empty(0, np.int64)]
    if per_class < 1:
        raise ValueError(f"per_class {per_class}: must be at least 1")
    for c in range(labels.max() + 1 if len(labels) else 0):
        members = np.flatnonzero(labels == c)
        if not len(members):
            raise ValueError(f"class {c} has no image to resample")
        whole, rest = divmod(per_class, len(members))
        chosen += [np.tile(members, whole), rng.choice(members, rest, replace=False)]
    return np.concatenate(chosen)


CROP_PADDING = 4
AUGMENT_CHUNK = 8192  # images in flight: bounds the memory, not the result


def augment(images_u8, policy, generator) -> torch.Tensor:
    """Augment a whole epoch at once: a zero-pad-4 random crop, then a horizontal flip with p = 0.5.

    images_u8: uint8 [N,3,H,W] on any device, not changed; policy: 'none'; generator: a CPU torch.Generator,
    so that the draws do not depend on the device. Every image has the distribution of torchvision's
    RandomCrop(padding=4) and RandomHorizontalFlip. Returns a new tensor of the same shape; ValueError for an
    unknown policy, another dtype or shape, a generator that is not on the CPU.
    """
    shape, device = list(images_u8.shape), images_u8.device
    if images_u8.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        raise ValueError(f"images must be uint8 [N,3,H,W], got {images_u8.dtype} {shape}")
    if policy != "none" or generator.device.type != "cpu":
        raise ValueError(f"policy {policy!r}, generator on {generator.device}: want none, a CPU generator")
    n, out = shape[0], torch.empty(shape, dtype=torch.uint8, device=device)
    corner = torch.randint(2 * CROP_PADDING + 1, (2, n), generator=generator).to(device)
    flip = torch.randint(2, (n,), generator=generator).bool().to(device)
    for start in range(0, n, AUGMENT_CHUNK):
        part = slice(start, start + AUGMENT_CHUNK)
        out[part] = _crop_and_flip(images_u8[part], *corner[:, part], flip[part])
    return out


def _crop_and_flip(x, top, left, flip):
    """Zero-pad, cut image i at (top[i], left[i]), mirror it where flip[i]: two gathers on views."""
    windows = F.pad(x, (CROP_PADDING,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    cut = windows[torch.arange(len(x), device=x.device), :, top, left]  # [N,3,9,9,H,W] -> [N,3,H,W]
    column = torch.arange(x.shape[3], device=x.device)
    column = torch.where(flip[:, None], column.flip(0), column)  # [N,W]
    return cut.gather(3, column[:, None, None].expand_as(cut))


@contextlib.contextmanager
def _fetching(path, md5):
    """Around a download to `path`: refuse a damaged file that is there, tell in one line what cannot be
    had."""
    if md5 and path.exists() and calculate_md5(path) != md5:
        raise UserError(f"{path} does not have the published md5 {md5}: delete it and fetch it again")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (OSError, RuntimeError) as error:
        remedy = (
            f"put {path.name} into {path.parent} by hand, or use --data synthetic, which needs no download"
        )
        raise UserError(
            f"could not fetch {path.name} ({' '.join(str(error).split())[:200]}): {remedy}"
        ) from error


def load_cifar(name, data_dir, verify=True) -> Data:
    """CIFAR-10 or -100 as published (python pickles), fetched into data_dir when absent; verify: check
    md5s."""
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    if not verify:
        strip = {key: [[file, None] for file, _ in getattr(cls, key)] for key in ("train_list", "test_list")}
        cls = type(cls.__name__, (cls,), dict(strip, tgz_md5=None, meta={**cls.meta, "md5": None}))
    with _fetching(pathlib.Path(data_dir, cls.filename), cls.tgz_md5):
        parts = [cls(data_dir, train=train, download=True) for train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return Data(images[0], labels[0], images[1], labels[1], list(parts[0].classes))


TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def load_tinyimagenet(data_dir, verify=True) -> Data:
    """Tiny-ImageNet read straight from the official zip (nothing is unpacked); classes are the sorted wnids.

    The test set is the official validation set, labelled by val_annotations.txt. Decoded tensors are cached.
    """
    path, md5 = pathlib.Path(data_dir, "tiny-imagenet-200.zip"), TINY_MD5 if verify else None
    with _fetching(path, md5):
        download_url(TINY_URL, data_dir, path.name, md5)
    state = [path.stat().st_size, path.stat().st_mtime_ns]
    return _cached(path.parent, "tiny-imagenet-200", state, lambda: _decode_tiny(path))


def _decode_tiny(path):
    root = "tiny-imagenet-200/"
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith(IMG_EXTENSIONS))
            lines = [
                line.split("\t")
                for line in archive.read(root + "val/val_annotations.txt").decode().split("\n")
            ]
            wnid = {root + "val/images/" + line[0]: line[1] for line in lines if len(line) > 1}
            wnid |= {n: n.split("/")[2] for n in names if n.startswith(root + "train/")}
            classes = sorted({w for n, w in wnid.items() if n.startswith(root + "train/")})
            parts = [
                [n for n in names if n in wnid and n.startswith(root + part)] for part in ("train/", "val/")
            ]
            labels = [torch.tensor([classes.index(wnid[n]) for n in part]) for part in parts]
            images = [_decode_all([(n, archive.read(n)) for n in part], 64) for part in parts]
    except (zipfile.BadZipFile, KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is not the Tiny-ImageNet archive ({error}): delete it and fetch it again"
        ) from error
    return Data(images[0], labels[0], images[1], labels[1], classes)


def load_folder(data_dir, size) -> Data:
    """Images of data_dir/train/CLASS/ and data_dir/test/CLASS/ (or val/), in any format PIL reads.

    Shorter side to `size`, then a centre crop. Classes are ordered by training count, most frequent first,
    ties by name. Decoded tensors are cached beside the data, or in the user's cache folder where that is
    read-only; the cache is dropped when a file is added, removed or changed. UserError for a layout that
    cannot be trained.
    """
    root = pathlib.Path(data_dir)
    folders = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist: --data folder wants DIR/train/CLASS/* and DIR/test/CLASS/*"
            )
    names = [sorted(p.name for p in d.iterdir() if p.is_dir() and p.name[0] != ".") for d in folders]
    if names[0] != names[1]:
        odd = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:5])
        raise UserError(f"the class folders of {folders[0]} and {folders[1]} differ: {odd}")
    if len(names[0]) < 2:
        raise UserError(f"{folders[0]} has {len(names[0])} class folder(s): a classifier needs at least 2")
    index = {name: i for i, name in enumerate(names[0])}
    files = [make_dataset(str(d), index, IMG_EXTENSIONS, allow_empty=True) for d in folders]
    for folder, part in zip(folders, files, strict=True):
        empty = set(names[0]) - {names[0][label] for _, label in part}
        if empty:
            raise UserError(
                f"{folder / min(empty)} holds no image: add some, or remove the class from both folders"
            )
    order = np.argsort(-np.bincount([label for _, label in files[0]]), kind="stable")
    rank = np.argsort(order)

    def decode():
        images = [_decode_all([(name, None) for name, _ in part], size) for part in files]
        labels = [torch.tensor([int(rank[label]) for _, label in part]) for part in files]
        return Data(images[0], labels[0], images[1], labels[1], [names[0][i] for i in order])

    stats = [(name, os.stat(name)) for part in files for name, _ in part]
    return _cached(root, f"folder-{size}", [(n, s.st_size, s.st_mtime_ns) for n, s in stats], decode)


def _decode_all(sources, size):
    """Decode (name, bytes or None: open the name) pairs on a thread pool -> uint8 [N,3,size,size]."""
    out = np.empty((len(sources), size, size, 3), np.uint8)

    def decode(i):
        name, content = sources[i]
        try:
            with Image.open(name if content is None else io.BytesIO(content)) as image:
                if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
                image = image.convert("RGB")
                if image.size != (size, size):
                    scale = size / min(image.size)
                    image = image.resize(
                        [max(size, round(side * scale)) for side in image.size], Image.BILINEAR
                    )
                    left, top = ((side - size) // 2 for side in image.size)
                    image = image.crop((left, top, left + size, top + size))
                out[i] = np.asarray(image)
        except Exception as error:  # PIL raises many kinds; what the user needs is the file's name
            raise UserError(f"{name} is not a readable image ({error}): remove or replace it") from error

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(sources))))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _cached(folder, name, state, build):
    """`build()`, or its earlier result while `state` (a JSON-able description of the files) is unchanged."""
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "ltsd")
    tag = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
    places = [folder / f".ltsd-{name}.pt", user / f"{name}-{tag}.pt"]
    for path in places:
        with contextlib.suppress(Exception):  # a missing or broken cache is made again
            saved = torch.load(path, weights_only=True)
            if saved.pop("key") == key:
                return Data(**saved)
    data = build()
    for path in places:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, {"key": key, **{f.name: getattr(data, f.name) for f in fields(data)}})
            break
    return data


def make_synthetic(train_per_class=240, test_per_class=25, classes=10, size=32) -> Data:
    """Images made on the spot that behave like photographs under attack, the same on every machine.

    Each class has a coarse grating of its own wavelength and orientation, strong enough to survive eps 8/255
    but overlaid by those of other classes, and a fine one so faint that an attack can wipe it out, yet enough
    for a naturally trained network to decide by. Phases are random, so that a crop changes nothing.
    """
    rng = np.random.default_rng(2025)
    yy, xx = np.mgrid[0:size, 0:size].astype(np.float32)
    c = np.arange(classes)
    angles = np.pi * (c % 5 + 0.5) / 10  # within a quadrant: a flip must not turn one class into another
    coarse, fine = np.where(c < 5, 14.0, 7.5), np.where(c < 5, 3.0, 2.4)
    tint = np.abs(rng.normal(size=(classes, 3, 1, 1))).clip(0.3)
    tint /= tint.mean(1, keepdims=True)

    def gratings(labels, wavelengths, angles):
        angle, k = angles[labels][:, None, None], (2 * np.pi / wavelengths[labels])[:, None, None]
        phase = rng.uniform(0, 2 * np.pi, (len(labels), 1, 1))
        return np.sin(k * (xx * np.cos(angle) + yy * np.sin(angle)) + phase)[:, None]

    def draw(per_class):
        labels = np.repeat(c, per_class)
        images = 0.5 + 0.13 * gratings(labels, coarse, angles) * tint[labels]
        for _ in range(2):
            other, strength = (
                rng.integers(0, classes, len(labels)),
                rng.uniform(0, 0.13, (len(labels), 1, 1, 1)),
            )
            images = images + strength * gratings(other, coarse, angles) * tint[other]
        images = images + 5 / 255 * gratings(labels, fine, angles[::-1]) + rng.normal(0, 0.06, images.shape)
        return torch.from_numpy(np.rint(images.clip(0, 1) * 255).astype(np.uint8)), torch.from_numpy(labels)

    return Data(*draw(train_per_class), *draw(test_per_class), [f"grating {i}" for i in range(classes)])


def _limited(images, labels, limit):
    """About `limit` images: the same share of every class but at least one image, by a fixed seed."""
    if limit is None or limit >= len(labels):
        return images, labels
    members = [np.flatnonzero(labels.numpy() == c) for c in range(int(labels.max()) + 1)]
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(m)[: max(1, len(m) * limit // len(labels))] for m in members]
    index = torch.from_numpy(np.sort(np.concatenate(chosen)))
    return images[index], labels[index]


def load_data(cfg) -> Data:
    """The long-tailed training set and the test set of a resolved Config, as CPU tensors."""
    if cfg.data == "synthetic":
        data = make_synthetic()
    elif cfg.data == "folder":
        data = load_folder(cfg.data_dir, cfg.image_size)
    else:
        data = (
            load_tinyimagenet(cfg.data_dir)
            if cfg.data == "tinyimagenet"
            else load_cifar(cfg.data, cfg.data_dir)
        )
    data.train_images, data.train_labels = _limited(data.train_images, data.train_labels, cfg.train_limit)
    data.test_images, data.test_labels = _limited(data.test_images, data.test_labels, cfg.test_limit)
    available = np.bincount(data.train_labels)
    data.counts = available.tolist() if cfg.ir is None else _largest_profile(available, cfg.ir)
    chosen = torch.from_numpy(long_tail_indices(data.train_labels, data.counts))
    data.train_images, data.train_labels = data.train_images[chosen], data.train_labels[chosen]
    tail = DATASETS[cfg.data][2] or max(1, len(data.classes) // 10)
    data.tail = list(range(len(data.classes) - tail, len(data.classes)))
    return data


def _largest_profile(available, ir):
    """The long-tail counts with the largest n_max that every class can fill."""
    n_max = int(available[0])
    try:
        while np.any(long_tail_counts(n_max, len(available), ir) > available):
            n_max -= 1
        return long_tail_counts(n_max, len(available), ir)
    except ValueError as error:
        raise UserError(f"--ir {ir:g}: {error}") from None


# ==========================================================================================================
# 4  Models
# ==========================================================================================================
# Parameter names are those of the public CIFAR checkpoints. `folds` lists a module's pairs of a convolution
# and the batch norm of its output alone: section 6 folds those; other norms become a scale and a shift there.


def _conv(cin, cout, side, stride=1):
    return nn.Conv2d(cin, cout, side, stride, side // 2, bias=False)


class BasicBlock(nn.Module):
    """ResNet's block: conv-bn-relu-conv-bn plus a shortcut, then relu."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1, self.bn1 = _conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = _conv(cout, cout, 3), nn.BatchNorm2d(cout)
        same = stride == 1 and cin == cout
        self.shortcut = nn.Sequential(*([] if same else [_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout)]))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """The pre-activation block: bn-relu-conv-bn-relu-conv plus a shortcut.

    Where the shape changes, the shortcut is a bare 1x1 convolution of the activated input.
    """

    folds = (("conv1", "bn2"),)
    projection = "shortcut"

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv(cout, cout, 3)
        if stride != 1 or cin != cout:
            self.add_module(self.projection, self.make_projection(cin, cout, stride))

    def make_projection(self, cin, cout, stride):
        return nn.Sequential(_conv(cin, cout, 1, stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        project = getattr(self, self.projection, None)
        shortcut = x if project is None else project(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideBlock(PreActBlock):
    """WRN's block (dropout 0): a pre-activation block whose projection has another name."""

    projection = "convShortcut"

    def make_projection(self, cin, cout, stride):
        return _conv(cin, cout, 1, stride)


class CosineHead(nn.Module):
    """RoBal's classifier: scale * <f/|f|, w_c/(|w_c| + offset)> - prior_c, scale 1 and prior 0 while
    training."""

    def __init__(self, width, num_classes, offset):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-(width**-0.5), width**-0.5))
        self.offset, self.scale = offset, 1.0
        self.register_buffer("prior", torch.zeros(num_classes), persistent=False)

    def forward(self, features):
        weight = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.offset)
        return self.scale * F.normalize(features, dim=1) @ weight.T - self.prior


class Net(nn.Module):
    """3x3 stem, stages of blocks, global average pool, head: images float [N,3,H,W] in [0,1] -> float32
    logits.

    stem: its channels; stages: (channels, blocks, stride) each; stage: their name; norms: names of the batch
    norm after the stem and of the one before the pool, or None; head: (name, module for a given width). Pool
    and head are float32 whatever the convolutions are: with bf16 logits many samples would get no gradient at
    all.
    """

    def __init__(self, block, stem, stages, stage, norms, head):
        super().__init__()
        self.conv1, self.stem_norm, self.last_norm, self.head_name = _conv(3, stem, 3), *norms, head[0]
        self.folds = (("conv1", self.stem_norm),) if self.stem_norm else ()
        if self.stem_norm:
            self.add_module(self.stem_norm, nn.BatchNorm2d(stem))
        width, body = stem, []
        for i, (channels, blocks, stride) in enumerate(stages, 1):
            made = [block(width if j == 0 else channels, channels, 1 if j else stride) for j in range(blocks)]
            body.append(nn.Sequential(*made))
            name, _, inner = stage.format(i).partition(".")
            self.add_module(name, nn.ModuleDict({inner: body[-1]}) if inner else body[-1])
            width = channels
        self.body = tuple(body)  # registered above, under the public names
        if self.last_norm:
            self.add_module(self.last_norm, nn.BatchNorm2d(width))
        self.add_module(self.head_name, head[1](width))

    @property
    def head(self):
        return getattr(self, self.head_name)

    def forward(self, x, with_features=False):
        """Logits [N,C], or with_features: (logits, pooled features [N,d]); all float32 (float64 for
        float64)."""
        out = self.conv1(x)
        if self.stem_norm:
            out = F.relu(getattr(self, self.stem_norm)(out))
        for stage in self.body:
            out = stage(out)
        if self.last_norm:
            out = F.relu(getattr(self, self.last_norm)(out))
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        features = out.mean((2, 3), dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(features)
        return (logits, features) if with_features else logits


def _stages(blocks, *widths):
    return [(width, blocks, 2 if i else 1) for i, width in enumerate(widths)]


# fmt: off
ARCHS = {  # block, stem, stages, name of a stage, names of the first and last batch norm, name of the head
    "resnet18":       (BasicBlock, 64, _stages(2, 64, 128, 256, 512), "layer{}", ("bn1", None), "linear"),
    "preactresnet18": (PreActBlock, 64, _stages(2, 64, 128, 256, 512), "layer{}", (None, "bn"), "linear"),
    "wrn34-10":       (WideBlock, 16, _stages(5, 160, 320, 640), "block{}.layer", (None, "bn1"), "fc"),
    "resnet8":        (BasicBlock, 16, _stages(1, 16, 32, 64), "layer{}", ("bn1", None), "linear"),
}
# fmt: on


def build_model(arch, num_classes, head="linear") -> nn.Module:
    """A freshly initialised Net of ARCHS, channels_last, no input normalisation inside.

    num_classes >= 2; head: 'linear' or 'cosine' (RoBal). Draws from torch's global generator: seed it, or
    wrap the call in torch.random.fork_rng. ValueError for an unknown name.
    """
    if arch not in ARCHS or head not in ("linear", "cosine") or num_classes < 2:
        raise ValueError(
            f"no {arch!r} with a {head!r} head and {num_classes} classes; arch: {', '.join(ARCHS)}"
        )
    *body, name = ARCHS[arch]
    offset = 1 / 32 if num_classes <= 10 else 1 / 16  # RoBal-R's two settings
    make = nn.Linear if head == "linear" else lambda width, classes: CosineHead(width, classes, offset)
    net = Net(*body, (name, lambda width: make(width, num_classes)))
    if arch.startswith("wrn"):  # as published; the others keep PyTorch's initialisation
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(
                    module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
                )
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    return net.to(memory_format=torch.channels_last)


# ==========================================================================================================
# 5  Step: x_adv <- clip to [0,1] of clip to [x-eps, x+eps] of (x_adv + step_size * sign(grad))
# ==========================================================================================================


def pgd_step_reference(x_adv, grad, x, step_size, eps) -> torch.Tensor:
    """One L-inf PGD step in plain PyTorch: the truth that the kernel equals bit for bit.

    x_adv, x: float32 in [0,1], any shape; grad: that shape, any float dtype; step_size, eps: fractions of the
    pixel range. sign(0) and sign(NaN) are 0. Returns a new tensor.
    """
    sign = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
    moved = x_adv + step_size * sign
    projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return projected.clamp(0, 1)


if HAS_TRITON:

    @triton.jit
    def _pgd_step_kernel(
        x_adv_ptr,  # float32 [n], read and overwritten
        grad_ptr,  # float32, bfloat16 or float16 [n]
        x_ptr,  # float32 [n]
        low_ptr,  # any float type [n], written only if HAS_LOW
        n,
        step_size,
        eps,
        HAS_LOW: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x_adv = tl.load(x_adv_ptr + offsets, mask=mask)
        grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask)
        step_size = tl.cast(step_size, tl.float32)  # Inductor hands floats over as float64
        eps = tl.cast(eps, tl.float32)
        sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
        moved = x_adv + step_size * sign
        projected = tl.minimum(tl.maximum(moved, x - eps), x + eps)
        result = tl.minimum(tl.maximum(projected, 0.0), 1.0)
        tl.store(x_adv_ptr + offsets, result, mask=mask)
        if HAS_LOW:
            tl.store(low_ptr + offsets, result.to(low_ptr.dtype.element_ty), mask=mask)


STEP_BLOCK = 1024  # 4 warps of 32 threads take 8 values each: two 16-byte float32 loads, one 16-bit one


def pgd_step(x_adv, grad, x, step_size, eps, out_low=None) -> torch.Tensor:
    """One L-inf PGD step in place on x_adv; also writes the copy that the next low-precision forward reads.

    x_adv, x: float32; grad: float32, bfloat16 or float16; out_low: None or one of those types; all of one
    shape, device and memory layout (contiguous or channels_last), of any size. A fused Triton kernel on CUDA,
    and on any device when TRITON_INTERPRET=1; else the reference. Returns x_adv. ValueError on a mismatch:
    the kernel walks memory, so that another layout would silently pair the wrong pixels.
    """
    tensors = {"x": x, "x_adv": x_adv, "grad": grad} | ({} if out_low is None else {"out_low": out_low})
    for name, t in tensors.items():
        if t.shape != x.shape or t.device != x.device or _dense_strides(t) != _dense_strides(x):
            ours, theirs = ((tuple(u.shape), u.stride(), str(u.device)) for u in (t, x))
            raise ValueError(f"{name} has shape, strides, device {ours}, x has {theirs}: they must be equal")
        if t.dtype not in AMP_DTYPE.values() or (name[0] == "x" and t.dtype != torch.float32):
            raise ValueError(
                f"{name} is {t.dtype}: x and x_adv must be float32, the others float32, bf16 or fp16"
            )
    if HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        n, low = x.numel(), x_adv if out_low is None else out_low
        if n:
            with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
                flags = dict(HAS_LOW=out_low is not None, BLOCK=STEP_BLOCK)
                _pgd_step_kernel[(triton.cdiv(n, STEP_BLOCK),)](
                    x_adv, grad, x, low, n, step_size, eps, **flags
                )
        return x_adv
    x_adv.copy_(pgd_step_reference(x_adv, grad, x, step_size, eps))
    if out_low is not None:
        out_low.copy_(x_adv)
    return x_adv


def _dense_strides(t):
    """The strides of the sides longer than 1; ValueError where elements overlap or leave gaps."""
    pairs = zip(t.stride(), t.shape, strict=True) if t.numel() else ()
    expected, sides = 1, [(stride, side) for stride, side in pairs if side > 1]
    for stride, side in sorted(sides):
        if stride != expected:
            raise ValueError(f"shape {tuple(t.shape)}, strides {t.stride()} is not dense: call .contiguous()")
        expected *= side
    return [stride for stride, _ in sides]


# ==========================================================================================================
# 6  Attack
# ==========================================================================================================


class ChannelAffine(nn.Module):
    """x * scale + shift per channel: what remains of a batch norm that no convolution can absorb."""

    def __init__(self, norm):
        super().__init__()
        self.register_buffer("scale", norm.weight.detach().clone().view(-1, 1, 1))
        self.register_buffer("shift", norm.bias.detach().clone().view(-1, 1, 1))

    def forward(self, x):
        return (x * self.scale + self.shift).to(x.dtype)


class FrozenCopy(nn.Module):
    """What an attack needs of a Net and no more: eval mode, no parameter gradients, batch norms folded away,
    convolutions in `dtype`, float32 head. Images in [0,1] of any float dtype -> float32 logits.

    It follows its source when ``refresh`` is called, in place, so that compiled code sees the new weights.
    """

    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.net, self.dtype = copy.deepcopy(model).eval().requires_grad_(False), dtype
        self.folded, self.affine, modules, norms = [], [], dict(model.named_modules()), set()
        for name, module in modules.items():
            for pair in getattr(module, "folds", ()):
                conv, norm = (f"{name}.{part}".lstrip(".") for part in pair)
                if norm in modules:
                    own = self.net.get_submodule(conv)
                    own.bias = nn.Parameter(own.weight.new_zeros(own.out_channels), requires_grad=False)
                    self._replace(norm, nn.Identity())
                    self.folded.append((own, modules[conv], modules[norm]))
                    norms |= {conv, norm}
        for name, module in modules.items():
            if isinstance(module, nn.BatchNorm2d) and name not in norms:
                self._replace(name, ChannelAffine(module))
                self.affine.append((self.net.get_submodule(name), module))
                norms.add(name)
        self.plain = [(n, p) for n, p in model.named_parameters() if n.rpartition(".")[0] not in norms]
        self.plain = [(self.net.get_parameter(n), p) for n, p in self.plain]
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        self.refresh()

    def _replace(self, name, module):
        parent, _, child = name.rpartition(".")
        setattr(self.net.get_submodule(parent), child, module)

    @torch.no_grad()
    def refresh(self):
        """Take over the source's present weights and running statistics: w' = w s, b' = beta - mean s, with
        s = weight / sqrt(var + eps), for all layers in a handful of multi-tensor operations."""
        norms = [norm for *_, norm in self.folded] + [norm for _, norm in self.affine]
        scale = torch._foreach_add([norm.running_var for norm in norms], norms[0].eps)
        torch._foreach_sqrt_(scale)
        scale = torch._foreach_div([norm.weight for norm in norms], scale)
        shift = torch._foreach_mul([norm.running_mean for norm in norms], scale)
        shift = torch._foreach_sub([norm.bias for norm in norms], shift)
        k = len(self.folded)
        weights = [
            conv.weight * s.view(-1, 1, 1, 1) for (_, conv, _), s in zip(self.folded, scale, strict=False)
        ]
        targets = [own.weight for own, *_ in self.folded] + [own.bias for own, *_ in self.folded]
        targets += [a.scale for a, _ in self.affine] + [a.shift for a, _ in self.affine]
        targets += [own for own, _ in self.plain]
        rest = [s.view(-1, 1, 1) for s in scale[k:] + shift[k:]] + [source for _, source in self.plain]
        torch._foreach_copy_(targets, weights + list(shift[:k]) + rest)
        return self

    def train(self, mode=True):
        """Stays in eval mode whatever its owner does."""
        return super().train(False)

    def forward(self, x):
        return self.net(x.to(self.dtype))


def cross_entropy_objective(logits, y, aux=None):
    """Mean cross-entropy, what PGD ascends (Madry et al. 2018); aux is not used."""
    return F.cross_entropy(logits, y)


@contextlib.contextmanager
def eval_mode(model):
    """Put a module into eval mode inside, and every submodule back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def check_images(x, y, dtypes=(torch.float32,)):
    """Raise ValueError unless x is NCHW in [0,1] of one of `dtypes` and y int64 [N] on the same device."""
    if not torch.is_tensor(x) or x.ndim != 4 or x.dtype not in dtypes:
        raise ValueError(
            f"x must be {dtypes[0]} NCHW, got {getattr(x, 'dtype', type(x))} {list(getattr(x, 'shape', []))}"
        )
    if not torch.is_tensor(y) or y.dtype != torch.int64 or y.shape != x.shape[:1] or y.device != x.device:
        said = f"{y.dtype} {list(y.shape)} on {y.device}" if torch.is_tensor(y) else type(y)
        raise ValueError(f"y must be int64 [{len(x)}] on {x.device}, got {said}")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):  # a NaN fails both
        raise ValueError(f"x spans [{x.min():g}, {x.max():g}]: images must lie in [0,1]; divide by 255?")


def pgd_attack(
    model, x, y, *, eps, step_size, steps, init="uniform", objective=None, aux=None, generator=None
) -> torch.Tensor:
    """L-inf PGD (Madry et al. 2018): signed gradient ascent of `objective` inside the eps-ball and [0,1].

    model: any nn.Module with inputs in [0,1], run in eval mode and left as it was (mode, buffers, gradients);
    a Net is replaced by its FrozenCopy, a FrozenCopy taken as it is. x: float32 [N,C,H,W] in [0,1]; y: int64
    [N]; eps, step_size >= 0: fractions of the pixel range; steps >= 0. init: 'uniform' U(-eps,eps), 'gauss'
    0.001*N(0,1) as in TRADES, or 'none'; the start is clipped to the ball and to [0,1]. objective(logits, y,
    aux) -> scalar, default mean cross-entropy. generator: of the start noise, on x's device. Returns the last
    iterate, detached. ValueError for input outside these ranges.
    """
    if not (eps >= 0 and step_size >= 0 and steps >= 0) or init not in ("uniform", "gauss", "none"):
        given = f"eps {eps}, step_size {step_size}, steps {steps}, init {init!r}"
        raise ValueError(f"{given}: want numbers >= 0 and one of uniform, gauss, none")
    objective = objective or cross_entropy_objective
    if isinstance(model, FrozenCopy):  # the training loop's way in: nothing to check, nothing to protect
        return _pgd(model, x, y, eps, step_size, steps, init, objective, aux, generator)
    check_images(x, y)
    with eval_mode(FrozenCopy(model) if isinstance(model, Net) else model) as forward:
        return _pgd(forward, x, y, eps, step_size, steps, init, objective, aux, generator)


def _pgd(forward, x, y, eps, step_size, steps, init, objective, aux, generator):
    """pgd_attack without its checks; forward: images in its own `dtype` (default float32) -> float32
    logits."""
    dtype, x = getattr(forward, "dtype", torch.float32), x.detach()
    noise = torch.zeros_like(x)
    if init != "none":
        noise.uniform_(-eps, eps, generator=generator) if init == "uniform" else noise.normal_(
            0, 1e-3, generator=generator
        )
    x_adv = pgd_step_reference(x + noise, torch.zeros_like(x), x, 0.0, eps)
    low = None if dtype == torch.float32 else x_adv.to(dtype)
    # fp16 flushes what is below 6e-8 to zero; only the sign matters, so attack a multiple of the objective
    scale = 2.0**10 * len(x) if dtype == torch.float16 else 1.0
    for _ in range(steps):
        leaf = (x_adv if low is None else low).detach().requires_grad_()
        with torch.enable_grad():
            value = objective(forward(leaf), y, aux) * scale
        (grad,) = torch.autograd.grad(value, leaf)
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        pgd_step(x_adv, grad, x, step_size, eps, low)
    return x_adv


# ==========================================================================================================
# 7  Methods
# ==========================================================================================================


def balanced_softmax_loss(logits, y, counts, tau=1.0) -> torch.Tensor:
    """Mean of -log softmax(z + b)[y] with b_c = tau ln n_c (eq. 1; Ren et al. 2020).

    logits: float [N,C]; y: int64 [N]; counts: training images per class, C values >= 1. Uniform counts or tau
    0 give plain cross-entropy. Returns a scalar; ValueError for counts of another length or below 1.
    """
    counts = torch.as_tensor(counts, dtype=logits.dtype, device=logits.device)
    if counts.shape != logits.shape[1:]:
        raise ValueError(f"{len(counts)} counts for {logits.shape[1]} classes")
    return F.cross_entropy(logits + tau * counts.log(), y)


def igdm_loss(student_plus, student_minus, teacher_plus, teacher_minus) -> torch.Tensor:
    """Indirect gradient distillation: mean KL(softmax(T+ - T-) || softmax(S+ - S-)) (Lee et al. 2023).

    Arguments: float logits [N,C] of student and teacher at x+d (plus) and x-d (minus), d = x'-x: differences
    of logits stand for input gradients. The teacher's are detached; temperature 1. Returns a scalar >= 0.
    """
    return distillation_loss(student_plus - student_minus, teacher_plus - teacher_minus)


def distillation_loss(student, teacher) -> torch.Tensor:
    """Mean KL(softmax(teacher) || softmax(student)); float logits [N,C], the teacher's detached."""
    target = F.log_softmax(teacher.detach(), 1)
    return F.kl_div(F.log_softmax(student, 1), target, reduction="batchmean", log_target=True)


@dataclass
class Batch:
    """What an outer loss may look at; `student` is in train mode, `teacher` maps images to logits, no
    gradient."""

    student: Callable
    x: torch.Tensor
    x_adv: torch.Tensor
    y: torch.Tensor
    counts: torch.Tensor
    cfg: Config
    alpha: float = 0.0  # this epoch's weight of the distillation
    teacher: Callable | None = None


def _pgd_at(b):
    logits = b.student(b.x_adv)
    return F.cross_entropy(logits, b.y), logits


def _at_bsl(b):
    logits = b.student(b.x_adv)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau), logits


def _ltsd(b):
    """The paper: balanced softmax at x' plus alpha times the distillation from the balanced self-teacher."""
    minus = 2 * b.x - b.x_adv  # x - d, not clipped, as in IGDM's code
    logits, logits_minus = b.student(b.x_adv), b.student(minus)
    teacher_plus, teacher_minus = b.teacher(torch.cat([b.x_adv, minus])).chunk(2)
    distillation = igdm_loss(logits, logits_minus, teacher_plus, teacher_minus)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau) + b.alpha * distillation, logits


@dataclass(frozen=True)
class Method:
    """A row of the comparison: outer loss (Batch -> scalar, logits at x'), what the attack ascends and where
    it starts, how many train-mode forwards the loss takes, whether it needs the self-teacher."""

    loss: Callable
    objective: Callable | None  # None: no attack, x' = x
    init: str
    forwards: int
    teacher: bool = False


# fmt: off
METHODS = {
    "natural": Method(_pgd_at, None,                    "none",    1),
    "pgd-at":  Method(_pgd_at, cross_entropy_objective, "uniform", 1),
    "at-bsl":  Method(_at_bsl, cross_entropy_objective, "gauss",   1),
    "ltsd":    Method(_ltsd,   cross_entropy_objective, "gauss",   2, teacher=True),
}
# fmt: on


# ==========================================================================================================
# 8  Training
# ==========================================================================================================


def lr_at(epoch, epochs, lr) -> float:
    """The learning rate of an epoch (1 .. epochs): lr, a tenth after 75 % of the epochs, a hundredth after 90
    %."""
    return lr * 0.1 ** ((epoch > 0.75 * epochs) + (epoch > 0.9 * epochs))


def selection_starts(epochs):
    """The first epoch whose weights may become 'best': the choice is among the last ceil(epochs/4)."""
    return epochs - math.ceil(epochs / 4) + 1


def write_atomic(path, content):
    """Write text, or anything torch.save takes, so that readers and crashes see the old file or the new
    one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path):
    """A file of tensors and plain values; UserError where it is missing, damaged, foreign or holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch and pickle raise many kinds on a damaged file
        raise UserError(
            f"{path} is damaged or no checkpoint ({type(error).__name__}): remove it, or name another"
        ) from error


def load_weights(model, path):
    """Load a checkpoint, ours or one of TRADES, AT-BSL and kin, into a Net; returns its epoch or None.

    Accepts a bare state_dict or one under 'state_dict', 'model' or 'net', prefixes 'module.' and
    '_orig_mod.', and the unused 'sub_block1' of public WRNs. UserError where names or shapes do not fit.
    """
    saved = weights = read_checkpoint(path)
    if isinstance(saved, dict):
        weights = next(
            (saved[k] for k in ("state_dict", "model", "net") if isinstance(saved.get(k), dict)), saved
        )
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise UserError(
            f"{path} holds no state_dict: expected one, bare or under 'state_dict', 'model' or 'net'"
        )
    weights = {k.replace("module.", "").replace("_orig_mod.", ""): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.startswith("sub_block1")}
    own = {
        k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked") or k in weights
    }
    wrong = sorted(own.keys() ^ weights.keys()) + [
        k for k in own if k in weights and weights[k].shape != own[k].shape
    ]
    if wrong:
        many = f"{len(wrong)} names or shapes differ, the first is {wrong[0]}"
        raise UserError(f"{path} does not fit the network ({many}): check --arch, --data and --method")
    model.load_state_dict(weights, strict=False)
    return saved.get("epoch") if isinstance(saved.get("epoch"), int) else None


@dataclass
class Phase:
    """One training of a run: the teacher's or the student's."""

    name: str  # "teacher" or "student"
    method: str
    epochs: int
    batch_size: int
    indices: torch.Tensor  # int64 positions in the long-tailed set
    counts: list
    select: bool  # keep the best epoch

    def cost(self, steps):
        """Forward passes for one image (a backward counts as two): the unit of the time estimate."""
        row = METHODS[self.method]
        return (3 * steps if row.objective else 0) + 3 * row.forwards + (2 if row.teacher else 0)


def to_float(images_u8):
    """uint8 NCHW -> float32 in [0,1], channels_last."""
    return images_u8.to(torch.float32, memory_format=torch.channels_last).div_(255)


def train(cfg, phase, data, run, teacher=None) -> nn.Module:
    """Train a Net as `phase` and `cfg` say, going on from the run's state.pt where that belongs to this
    phase.

    data: Data on the training device; run: Run; teacher: images -> logits. Saves state.pt after every epoch
    and best.pt at every new best. UserError when the loss is no longer finite; the last complete epoch stays
    saved.
    """
    row, device, dtype = METHODS[phase.method], data.train_images.device, AMP_DTYPE[cfg.amp]
    model, optimizer, scaler, streams, at = _start(cfg, phase, data, run, device)
    frozen, counts = FrozenCopy(model, dtype), torch.tensor(phase.counts, dtype=torch.float32, device=device)
    threat = dict(eps=cfg.eps / 255, step_size=cfg.step_size / 255, steps=cfg.steps, init=row.init)
    steps = math.ceil(len(phase.indices) / phase.batch_size)
    for epoch in range(at["epoch"] + 1, phase.epochs + 1):
        watch = Watch(device, phase, epoch, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(epoch, phase.epochs, cfg.lr)
        order = phase.indices[torch.randperm(len(phase.indices), generator=streams["order"])].to(device)
        images, labels = augment(data.train_images[order], "none", streams["order"]), data.train_labels[order]
        for i in range(steps):
            part = slice(i * phase.batch_size, (i + 1) * phase.batch_size)
            x, y = to_float(images[part]), labels[part]
            frozen.refresh()
            x_adv = x
            if row.objective:
                x_adv = pgd_attack(
                    frozen, x, y, objective=row.objective, generator=streams["noise"], **threat
                )
            alpha = cfg.alpha * epoch / phase.epochs
            batch = Batch(model.train(), x, x_adv, y, counts, cfg, alpha, teacher)
            with torch.autocast(device.type, dtype, enabled=cfg.amp != "off"):
                loss, logits = row.loss(batch)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            watch.add(i, loss.detach(), logits.detach(), y)
            run.estimate(phase, i, len(x))
        mean_loss, accuracy = watch.read()
        at["epoch"], at["seconds"] = epoch, at["seconds"] + time.perf_counter() - watch.began
        line = f"{phase.name} {epoch:>4}/{phase.epochs:<4} lr {lr_at(epoch, phase.epochs, cfg.lr):<7.2g}"
        line += f" loss {mean_loss:8.4f}  train {accuracy:6.2f}  {at['seconds'] / epoch:7.1f} s/epoch"
        line += _select(cfg, phase, data, run, model, epoch, at)
        saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        generators = {name: generator.get_state() for name, generator in streams.items()}
        run.save_state(dict(at, phase=phase.name, generators=generators, indices=phase.indices, **saved))
        run.log(line)  # a row in the log is an epoch on the disk
    run.set_seconds(phase.name, at["seconds"])
    return model


def _start(cfg, phase, data, run, device):
    """Network, optimiser, loss scaler, random streams and where training stands, fresh or from state.pt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(cfg.seed, phase.name, "weights"))
        model = build_model(cfg.arch, len(data.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, cfg.momentum, weight_decay=cfg.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    streams = {"order": torch.Generator(), "noise": torch.Generator(device)}
    for name, generator in streams.items():
        generator.manual_seed(derive_seed(cfg.seed, phase.name, name))
    at = {"epoch": 0, "best": None, "seconds": 0.0}
    state = run.load_state(phase.name)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        for name, generator in streams.items():
            generator.set_state(state["generators"][name])
        phase.indices, at = state["indices"], {k: state[k] for k in at}
        run.log(f"{phase.name}: going on after epoch {at['epoch']} of {phase.epochs}")
    return model, optimizer, scaler, streams, at


def _select(cfg, phase, data, run, model, epoch, at):
    """In the selection window: evaluate on the test set and save a strictly better model as best.pt."""
    if not phase.select or epoch < selection_starts(phase.epochs):
        return ""
    began, rule = time.perf_counter(), "pgd" if METHODS[phase.method].objective else "clean"
    threat = dict(eps=cfg.eps / 255, seed=cfg.seed, amp=cfg.amp, attacks=("clean", "pgd"))
    result = evaluate(model, data.test_images, data.test_labels, tail=data.tail, **threat)
    at["selection"] = at.get("selection", 0.0) + time.perf_counter() - began
    better = at["best"] is None or result[rule] > at["best"]["score"]
    if better:
        at["best"] = {"epoch": epoch, "score": result[rule]}
        run.save_model("best", model, epoch)
    return f"  test clean {result['clean']:6.2f}  pgd {result['pgd']:6.2f}" + ("  *" if better else "")


class Watch:
    """An epoch's loss and training accuracy, kept on the device and read every SYNC_EVERY steps."""

    def __init__(self, device, phase, epoch, steps):
        self.total = torch.zeros(
            4, dtype=torch.float64, device=device
        )  # loss, correct, seen, first bad step + 1
        self.phase, self.epoch, self.steps, self.began = phase, epoch, steps, time.perf_counter()

    def add(self, step, loss, logits, y):
        first_bad = (~torch.isfinite(loss) & (self.total[3] == 0)) * (step + 1.0)
        correct, seen = (logits.argmax(1) == y).sum(), torch.full_like(loss, len(y))
        self.total += torch.stack([loss * len(y), correct, seen, first_bad])
        if (step + 1) % SYNC_EVERY == 0:
            loss, _ = self.read()
            if sys.stderr.isatty():
                spent, ahead = (
                    time.perf_counter() - self.began,
                    (self.phase.epochs - self.epoch + 1) * self.steps,
                )
                eta, rate = hms(spent / (step + 1) * (ahead - step - 1)), (step + 1) * len(y) / spent
                line = (
                    f"{self.phase.name} {self.epoch}/{self.phase.epochs} loss {loss:.3f}  {rate:.0f} images/s"
                )
                print(f"{line + '  ETA ' + eta:<79}", end="\r", file=sys.stderr, flush=True)

    def read(self):
        """(mean loss, accuracy in percent) so far; UserError if a loss was NaN or infinite."""
        loss, correct, seen, bad = self.total.tolist()
        if bad:
            where = f"{self.phase.name}, epoch {self.epoch}, step {bad:.0f}"
            raise UserError(
                f"the loss was not finite ({where}); the last complete epoch is saved: try a lower --lr"
            )
        return loss / max(seen, 1), 100 * correct / max(seen, 1)


def hms(seconds):
    """Seconds for people: '45 s', '12 min', '3 h 05 min', '2 d 4 h'."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 120:
        return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


# ==========================================================================================================
# 10  Evaluation
# ==========================================================================================================

ATTACKS = ("clean", "pgd")


def evaluate(
    model, images_u8, labels, *, tail=(), attacks=ATTACKS, eps=8 / 255, step_size=2 / 255, steps=20, seed=0,
    batch_size=500, amp="off",
) -> dict:  # fmt: skip
    """Accuracy on test images in percent: overall, per class, on the tail classes.

    images_u8: uint8 [N,3,H,W]; labels: int64 [N], same device; tail: class indices. 'clean' is plain
    accuracy; 'pgd' the accuracy at the last iterate of PGD: uniform start clipped to [0,1], one restart, no
    early exit. Verdicts are IEEE float32; the attack's gradients come from a copy in `amp` precision ('off':
    float32). The start noise depends on the seed and the batch's number only. Returns clean, tail_clean,
    class_clean (a list) and the like, with balanced_* (mean of the class accuracies) where classes differ in
    size. No global generator is touched and the model is left as it was. ValueError for no images, or another
    dtype or shape.
    """
    if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or not 0 < len(images_u8) == len(labels):
        shape = f"{images_u8.dtype} {list(images_u8.shape)}, {len(labels)} labels"
        raise ValueError(f"images must be uint8 [N,3,H,W] with N > 0 labels, got {shape}")
    own = isinstance(model, Net)
    exact = FrozenCopy(model) if own else model
    fast = FrozenCopy(model, AMP_DTYPE[amp]) if own and amp != "off" else exact
    correct = {name: torch.zeros(len(labels), dtype=torch.bool, device=labels.device) for name in attacks}
    with eval_mode(exact), torch.no_grad():
        for i, start in enumerate(range(0, len(labels), batch_size)):
            part = slice(start, start + batch_size)
            x, y = to_float(images_u8[part]), labels[part]
            generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "evaluation", i))
            for name in attacks:
                x_adv = x
                if name == "pgd":
                    threat = dict(eps=eps, step_size=step_size, steps=steps, generator=generator)
                    x_adv = pgd_attack(fast, x, y, **threat)
                with ieee_float32():
                    correct[name][part] = exact(x_adv).argmax(1) == y
    return {
        k: v for name, flags in correct.items() for k, v in _metrics(name, flags, labels, list(tail)).items()
    }


def _metrics(name, flags, labels, tail):
    """bool [N] flags of one attack -> its percentages in results.json."""
    labels, flags = labels.cpu().numpy(), flags.cpu().numpy()
    counts, hits = np.bincount(labels), np.bincount(labels, flags)
    per_class = 100 * hits / counts.clip(1)
    out = {name: 100 * hits.sum() / counts.sum(), f"class_{name}": [round(float(v), 4) for v in per_class]}
    tail = [c for c in tail if c < len(counts)]
    out[f"tail_{name}"] = 100 * hits[tail].sum() / counts[tail].sum() if counts[tail].sum() else None
    if len(set(counts.tolist())) > 1:
        out[f"balanced_{name}"] = per_class[counts > 0].mean()
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in out.items()}


# ==========================================================================================================
# 11  Report
# ==========================================================================================================

# The paper's tables: number, data, IR, arch, method; clean PGD-20 AA T-clean T-PGD of the best, then the last
# epoch. A dash: not given, or lost in its text. 'teacher': PGD-AT on D_B (Table 6). '+ra', '+aua': Table 4.
# fmt: off
PAPER = """
1 cifar10 50 resnet18 pgd-at 52.71 29.30 27.57 12.7 1.0 56.39 26.98 25.81 20.8 2.2
1 cifar10 50 resnet18 trades 45.79 28.66 27.01 6.7 0.8 47.10 28.00 26.45 6.4 0.6
1 cifar10 50 resnet18 mart 44.03 29.36 27.59 5.0 0.5 47.33 28.08 26.55 10.9 1.0
1 cifar10 50 resnet18 awp 51.69 32.42 30.35 5.3 0.2 51.89 32.42 30.35 10.9 0.6
1 cifar10 50 resnet18 robal 70.54 35.33 28.83 70.4 33.1 72.80 28.04 25.00 67.7 15.9
1 cifar10 50 resnet18 reat 68.34 35.98 32.45 69.5 29.1 68.32 28.67 26.68 55.7 11.6
1 cifar10 50 resnet18 at-bsl 68.43 35.87 32.27 63.2 22.0 67.60 29.40 27.46 50.1 8.7
1 cifar10 50 resnet18 ltsd 70.81 38.85 34.32 73.8 36.9 71.74 37.80 33.74 74.7 36.2
2 cifar100 10 resnet18 pgd-at 42.73 17.31 15.44 20.4 - 43.09 15.07 14.05 22.4 6.7
2 cifar100 10 resnet18 trades 38.83 19.05 16.06 16.5 7.3 39.63 18.86 16.18 16.1 6.8
2 cifar100 10 resnet18 mart 38.57 19.90 17.10 16.6 - 40.31 17.07 15.21 19.5 7.2
2 cifar100 10 resnet18 awp 40.46 21.85 18.58 16.2 8.5 40.15 21.71 18.33 16.2 8.6
2 cifar100 10 resnet18 robal 44.27 19.67 16.78 18.4 8.0 46.46 16.28 14.73 23.3 6.7
2 cifar100 10 resnet18 reat 45.73 18.22 15.82 32.2 11.4 45.53 15.64 14.27 33.0 10.5
2 cifar100 10 resnet18 at-bsl 45.38 18.04 15.73 33.1 12.4 45.48 15.36 14.07 31.5 9.1
2 cifar100 10 resnet18 ltsd 46.13 22.42 18.73 38.9 17.9 47.22 21.82 18.53 37.9 17.6
3 tinyimagenet 10 preactresnet18 pgd-at 34.89 14.17 10.98 15.8 5.4 36.55 9.69 8.45 23.2 5.0
3 tinyimagenet 10 preactresnet18 trades 33.76 13.71 10.00 15.4 6.4 32.97 12.50 9.61 16.0 6.0
3 tinyimagenet 10 preactresnet18 mart 31.15 15.45 11.94 14.4 6.0 32.91 12.42 10.32 17.8 7.6
3 tinyimagenet 10 preactresnet18 awp 32.28 15.09 11.27 14.2 5.6 32.13 13.95 11.10 14.4 6.6
3 tinyimagenet 10 preactresnet18 robal 35.25 14.01 10.44 15.0 4.4 37.97 10.51 8.64 21.8 4.8
3 tinyimagenet 10 preactresnet18 reat 38.37 15.25 11.99 33.0 12.6 38.48 10.58 9.07 31.6 8.8
3 tinyimagenet 10 preactresnet18 at-bsl 38.38 15.39 11.85 30.8 13.0 38.41 10.25 8.90 32.4 7.0
3 tinyimagenet 10 preactresnet18 ltsd 38.44 17.02 12.57 36.6 16.0 49.37 14.09 11.15 33.8 12.6
4 cifar100 10 resnet18 ltsd+ra 48.78 23.58 19.30 34.9 17.2 50.98 22.43 18.80 38.2 16.9
4 cifar100 10 resnet18 ltsd+aua 50.14 24.60 20.08 36.4 18.0 50.46 24.32 20.28 37.6 18.5
4 cifar100 10 resnet18 at-bsl+ra 48.38 22.18 18.58 34.7 16.8 50.33 20.29 17.42 37.1 14.6
4 cifar100 10 resnet18 at-bsl+aua 47.30 22.78 18.66 34.2 16.4 50.57 21.98 18.45 36.8 16.3
4 cifar100 10 resnet18 reat+ra 46.94 21.71 18.02 33.3 14.9 50.41 20.33 17.46 36.6 14.7
4 cifar100 10 resnet18 reat+aua 47.86 23.09 19.43 34.0 16.7 50.56 22.20 18.60 36.5 16.5
4 cifar100 10 resnet18 robal+ra 44.64 20.11 17.02 15.8 7.7 47.62 18.63 16.05 19.2 7.4
4 cifar100 10 resnet18 robal+aua 45.87 20.24 17.05 17.4 6.7 47.42 19.32 16.30 18.2 7.4
5 cifar100 50 resnet18 robal 33.52 14.56 12.27 1.9 0.9 34.81 12.16 11.02 4.6 1.7
5 cifar100 50 resnet18 reat 26.62 13.73 10.64 9.2 4.1 36.51 12.28 11.15 19.1 4.4
5 cifar100 50 resnet18 at-bsl 30.06 13.80 10.91 10.3 4.2 36.46 12.07 11.21 17.8 4.4
5 cifar100 50 resnet18 ltsd 38.09 16.65 13.58 14.8 5.2 38.56 16.08 13.52 19.2 5.8
5 cifar100 20 resnet18 robal 40.08 16.91 14.28 12.1 5.4 41.28 13.96 12.70 15.5 5.1
5 cifar100 20 resnet18 reat 33.17 15.82 13.01 20.0 9.2 41.73 13.79 12.58 29.8 7.7
5 cifar100 20 resnet18 at-bsl 41.70 15.51 13.62 30.7 10.4 41.41 13.49 12.48 27.1 7.9
5 cifar100 20 resnet18 ltsd 42.54 19.66 16.36 33.2 13.3 42.64 19.24 15.97 32.5 13.7
5 cifar100 5 resnet18 robal 49.49 21.66 18.59 26.1 11.9 51.56 18.15 16.58 34.7 9.9
5 cifar100 5 resnet18 reat 49.48 21.95 18.98 39.3 18.3 49.76 18.19 16.65 40.7 14.1
5 cifar100 5 resnet18 at-bsl 49.75 21.53 18.65 42.3 18.2 49.41 18.12 16.56 40.0 13.7
5 cifar100 5 resnet18 ltsd 50.77 24.13 20.10 44.0 20.9 51.92 25.00 21.14 43.8 20.4
6 cifar100 10 resnet18 teacher 35.71 14.94 - 34.6 14.1 - - - - -
7 cifar10 50 wrn34-10 pgd-at 58.86 30.57 29.43 18.5 - 59.10 26.3 25.66 19.0 1.9
7 cifar10 50 wrn34-10 trades 51.93 30.45 29.20 4.5 0.3 55.36 27.62 26.99 19.2 2.9
7 cifar10 50 wrn34-10 mart 48.92 31.45 29.85 9.5 0.9 54.81 27.25 26.29 23.1 2.0
7 cifar10 50 wrn34-10 awp 51.69 32.42 30.35 5.3 0.2 51.89 29.19 27.45 10.9 0.6
7 cifar10 50 wrn34-10 robal 74.46 32.82 25.72 71.5 22.8 70.03 24.74 23.09 50.6 5.7
7 cifar10 50 wrn34-10 reat 73.16 33.45 28.71 66.4 20.8 64.11 25.90 25.00 31.7 3.6
7 cifar10 50 wrn34-10 at-bsl 73.23 35.08 32.26 66.4 18.9 66.23 26.87 25.98 40.6 4.3
7 cifar10 50 wrn34-10 ltsd 73.97 39.25 35.97 74.3 33.7 72.38 31.15 29.10 60.4 12.7
8 cifar100 10 wrn34-10 pgd-at 47.48 19.36 17.79 25.4 8.7 46.09 16.51 15.67 24.3 7.2
8 cifar100 10 wrn34-10 trades 42.67 20.89 18.42 18.3 6.9 43.99 18.53 17.51 19.9 7.4
8 cifar100 10 wrn34-10 mart 41.54 21.52 18.83 19.2 9.2 43.08 17.00 15.84 22.8 7.8
8 cifar100 10 wrn34-10 awp 45.53 23.23 19.92 20.4 7.9 47.05 21.97 19.21 23.1 8.8
8 cifar100 10 wrn34-10 robal 49.06 18.23 16.79 27.6 9.4 46.92 15.48 14.69 28.0 6.8
8 cifar100 10 wrn34-10 reat 49.06 20.00 18.08 34.4 12.2 47.65 16.95 15.60 33.6 9.8
8 cifar100 10 wrn34-10 at-bsl 50.05 18.96 17.10 38.3 13.3 47.95 16.40 15.31 32.2 9.5
8 cifar100 10 wrn34-10 ltsd 50.55 23.43 20.16 38.4 19.5 50.87 22.21 19.44 42.5 18.4
"""
# fmt: on
COLUMNS = {
    "clean": "clean",
    "pgd": "PGD-20",
    "aa": "AA",
    "tail_clean": "T-clean",
    "tail_pgd": "T-PGD",
    "tail_aa": "T-AA",
}


def paper_row(cfg, name):
    """The paper's numbers for a checkpoint ('teacher', 'best', 'last') of a resolved Config, or None."""
    method = "teacher" if name == "teacher" else cfg.method
    key = [cfg.data, f"{cfg.ir or 0:g}", cfg.arch, method]
    for cells in (line.split() for line in PAPER.split("\n")):
        if cells[1:5] == key and name in ("teacher", "best", "last"):
            numbers = [None if c == "-" else float(c) for c in cells[10 if name == "last" else 5 :][:5]]
            return dict(zip(("clean", "pgd", "aa", "tail_clean", "tail_pgd"), numbers, strict=True))
    return None


class Run:
    """A run's folder: config.json, log.txt, state.pt, teacher.pt, best.pt, last.pt, results.json."""

    FILES = ("config.json", "log.txt", "state.pt", "teacher.pt", "best.pt", "last.pt", "results.json")

    def __init__(self, cfg, argv=()):
        self.cfg, self.path = cfg, pathlib.Path(cfg.out or pathlib.Path("runs", run_name(cfg)))
        self.plan, self._clock, self.fingerprint = [], None, None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            self._log = open(self.path / "log.txt", "a", encoding="utf-8")  # closed with the process
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path} ({error.strerror}): choose another --out"
            ) from error
        gpu = cfg.device.startswith("cuda") and torch.cuda.get_device_name(cfg.device)
        versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
        versions["triton"] = triton.__version__ if HAS_TRITON else None
        self.environment = {"device": gpu or f"cpu, {torch.get_num_threads()} threads", **versions}
        self.environment |= {"python": platform.python_version(), "system": platform.platform()}
        self.log(f"run {self.path}")
        self.log("argv " + " ".join(map(str, argv)), quiet=True)
        self.log(", ".join(f"{k} {v}" for k, v in self.environment.items()))

    def _claim(self):
        """Write config.json, or compare with the one that is there; --overwrite empties the folder first."""
        path, mine = self.path / "config.json", identity(self.cfg)
        if self.cfg.overwrite:
            for name in self.FILES:
                (self.path / name).unlink(missing_ok=True)
        if path.exists():
            try:
                theirs = json.loads(path.read_text())["identity"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged: restore it, or start afresh with --overwrite") from None
            odd = ", ".join(
                f"{k} {theirs.get(k)} there, {mine[k]} here" for k in mine if theirs.get(k) != mine[k]
            )
            if odd:
                remedy = "choose another --out, or start afresh with --overwrite"
                raise UserError(f"{self.path} holds a run of another configuration ({odd}): {remedy}")
        write_atomic(path, json.dumps({"identity": mine, "config": asdict(self.cfg)}, indent=1) + "\n")

    def log(self, line, quiet=False):
        """One line to log.txt and, unless quiet, to the screen."""
        if not quiet:
            print(line, flush=True)
        print(line, file=self._log, flush=True)

    def has(self, name):
        return (self.path / f"{name}.pt").exists()

    def save_model(self, name, model, epoch):
        write_atomic(
            self.path / f"{name}.pt", dict(state_dict=model.state_dict(), epoch=epoch, arch=self.cfg.arch)
        )

    def save_state(self, state):
        write_atomic(self.path / "state.pt", dict(state, fingerprint=self.fingerprint))

    def load_state(self, phase):
        """The saved state of this phase's training, or None; UserError where the data have changed since."""
        if not self.has("state"):
            return None
        state = read_checkpoint(self.path / "state.pt")
        if not isinstance(state, dict) or "fingerprint" not in state:
            raise UserError(f"{self.path / 'state.pt'} is no training state: start afresh with --overwrite")
        if state["fingerprint"] != self.fingerprint:
            raise UserError(
                f"the training images are not those {self.path} began with: use --overwrite or another --out"
            )
        return state if state["phase"] == phase else None

    def results(self):
        """What results.json holds, {} before the first evaluation."""
        path = self.path / "results.json"
        try:
            return json.loads(path.read_text()) if path.exists() else {}
        except ValueError:
            raise UserError(f"{path} is damaged: delete it and use --stage eval") from None

    def save_results(self, **changes):
        write_atomic(self.path / "results.json", json.dumps({**self.results(), **changes}, indent=1) + "\n")

    def set_seconds(self, name, seconds):
        self.save_results(seconds={**self.results().get("seconds", {}), name: round(seconds, 3)})

    def estimate(self, phase, step, images):
        """After the fifth step of a call, say once how long all that is planned takes on this device."""
        if self._clock is None and step == 1:  # step 0 warms up
            self._sync()
            self._clock, self._images = time.perf_counter(), -images
        if self._clock:
            self._images += images
        if self._clock and step == 4:
            self._sync()
            unit = (time.perf_counter() - self._clock) / (self._images * phase.cost(self.cfg.steps))
            each = ", ".join(f"{name} {hms(work * unit)}" for name, work in self.plan)
            self.log(f"about {hms(sum(work for _, work in self.plan) * unit)} in all on this device ({each})")
            self._clock = 0.0

    def _sync(self):
        if self.cfg.device.startswith("cuda"):
            torch.cuda.synchronize(self.cfg.device)


def identity(cfg):
    """The settings that make a run what it is: another value needs another folder."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["identity"]}


def run_name(cfg):
    """A folder name: the settings people vary, then a hash of all that count (and of the place of a folder's
    data)."""
    place = str(pathlib.Path(cfg.data_dir).resolve()) if cfg.data == "folder" else ""
    digest = hashlib.sha256(json.dumps([identity(cfg), place]).encode()).hexdigest()[:8]
    ratio = "natural" if cfg.ir is None else f"ir{cfg.ir:g}"
    return f"{cfg.data}-{ratio}-{cfg.method}-{cfg.arch}-seed{cfg.seed}-{digest}"


def table(runs) -> str:
    """Runs [(Config, results)] as text in the paper's layout: a line per checkpoint, the paper's numbers
    below it."""
    found = {
        c
        for _, results in runs
        for m in results["checkpoints"].values()
        for c in COLUMNS
        if m.get(c) is not None
    }
    shown, lines = [c for c in COLUMNS if c in found], []

    def line(label, cells):
        lines.append(f"{label:<48}" + "".join(f"{cell:>9}" for cell in cells))

    for cfg, results in runs:
        ratio = "natural counts" if cfg.ir is None else f"IR {cfg.ir:g}"
        line(f"{cfg.data} {ratio} {cfg.arch} {cfg.method} seed {cfg.seed}", [COLUMNS[c] for c in shown])
        for name, m in results["checkpoints"].items():
            epoch = f" (epoch {m['epoch']})" if m.get("epoch") else ""
            for label, row in ((f"  {name}{epoch}", m), ("    paper", paper_row(cfg, name))):
                if row:
                    line(label, ["-" if row.get(c) is None else f"{row[c]:.2f}" for c in shown])
    tail, epochs = len(runs[0][1]["data"]["tail_classes"]), math.ceil(runs[0][0].epochs / 4)
    lines.append(
        f"T-: the {tail} rarest of the classes. best: highest PGD-20 (natural: clean) of the last {epochs}"
    )
    lines.append("epochs, chosen on the test set as the paper's baselines do; last: the last epoch.")
    return "\n".join(lines)


# ==========================================================================================================
# 14  Main
# ==========================================================================================================


def teacher_phase(cfg, data):
    """PGD-AT on D_B, the balanced resample of the long-tailed set, drawn once per run."""
    ratio = data.counts[0] / data.counts[-1] if cfg.ir is None else cfg.ir
    gamma = max(1.0, ratio / 2) if cfg.gamma is None else cfg.gamma
    per_class = max(1, math.floor(gamma * min(data.counts)))
    indices = balanced_indices(data.train_labels.cpu(), per_class, derive_seed(cfg.seed, "balanced"))
    counts = [per_class] * len(data.counts)
    return Phase(
        "teacher",
        "pgd-at",
        cfg.teacher_epochs,
        cfg.teacher_batch_size,
        torch.from_numpy(indices),
        counts,
        False,
    )


def student_phase(cfg, data):
    """The method itself on the whole long-tailed set."""
    everything = torch.arange(len(data.train_labels))
    return Phase("student", cfg.method, cfg.epochs, cfg.batch_size, everything, data.counts, True)


def stage_teacher(cfg, run, data):
    """Fit the self-teacher; its last epoch becomes teacher.pt."""
    if run.has("teacher"):
        return
    phase = teacher_phase(cfg, data)
    run.log(
        f"teacher: {phase.method} on D_B, {phase.counts[0]} images of each of {len(phase.counts)} classes"
    )
    run.save_model("teacher", train(cfg, phase, data, run), phase.epochs)


def stage_distill(cfg, run, data):
    """Train the student or a baseline: best.pt on the way, last.pt at the end."""
    if run.has("last"):
        return
    phase, teacher = student_phase(cfg, data), None
    if METHODS[cfg.method].teacher:
        _need(run.path / "teacher.pt", "teacher")
        model = build_model(cfg.arch, len(data.classes))
        load_weights(model, run.path / "teacher.pt")
        teacher = torch.no_grad()(FrozenCopy(model.to(cfg.device), AMP_DTYPE[cfg.amp]))
    head, tail = data.counts[0], data.counts[-1]
    run.log(
        f"student: {cfg.method} on {len(phase.indices)} images, {head} (head) to {tail} (tail) of a class"
    )
    run.save_model("last", train(cfg, phase, data, run, teacher), phase.epochs)


def _need(path, stage):
    if not path.exists():
        raise UserError(f"{path} does not exist: make it with the same command and --stage {stage}")


def evaluation_key(cfg):
    """'checkpoints' for the run's own weights under the standard threat, else the key of their evaluation."""
    threat = (cfg.eval_eps, cfg.eval_step_size, cfg.eval_steps)
    standard = threat == (cfg.eps, 2.0, 20) and not cfg.checkpoint
    return "checkpoints" if standard else "eps {:g} step {:g} steps {}".format(*threat)


def evaluations(cfg, results):
    """{checkpoint: M} of results.json for this Config's evaluation settings."""
    key = evaluation_key(cfg)
    return results.get(key, {}) if key == "checkpoints" else results.get("evaluations", {}).get(key, {})


def stage_eval(cfg, run, data):
    """Evaluate teacher, best and last, or --checkpoint, unless results.json has it for this threat."""
    paths = {name: run.path / f"{name}.pt" for name in ("teacher", "best", "last")}
    if not METHODS[cfg.method].teacher:
        del paths["teacher"]
    for name, path in paths.items():
        if not cfg.checkpoint:
            _need(path, "teacher" if name == "teacher" else "distill")
    paths = {cfg.checkpoint: pathlib.Path(cfg.checkpoint)} if cfg.checkpoint else paths
    settings = dict(eps=cfg.eval_eps / 255, step_size=cfg.eval_step_size / 255, steps=cfg.eval_steps)
    settings |= dict(tail=data.tail, seed=cfg.seed, amp=cfg.amp)
    about = dict(counts=data.counts, classes=data.classes, tail_classes=data.tail, test=len(data.test_labels))
    for name, path in paths.items():
        began, model = time.perf_counter(), build_model(cfg.arch, len(data.classes))
        epoch, digest = load_weights(model, path), f"{zlib.crc32(path.read_bytes()):08x}"
        there = evaluations(cfg, run.results())
        entry = there.get(name, {})
        entry = entry if entry.get("crc32") == digest else {"epoch": epoch, "crc32": digest}
        missing = [a for a in ATTACKS if a in cfg.attacks.split(",") and a not in entry]
        if missing:
            model.to(cfg.device)
            entry |= evaluate(model, data.test_images, data.test_labels, attacks=missing, **settings)
        key, new = evaluation_key(cfg), {**there, name: entry}
        if key != "checkpoints":
            key, new = "evaluations", {**run.results().get("evaluations", {}), key: new}
        run.save_results(config=asdict(cfg), environment=run.environment, data=about, **{key: new})
        run.set_seconds(
            "eval", run.results().get("seconds", {}).get("eval", 0.0) + time.perf_counter() - began
        )


def stage_report(cfg, run):
    """Print the run's table; returns (cfg, results) with the evaluations that this Config asks for."""
    results = run.results()
    shown = evaluations(cfg, results)
    if cfg.checkpoint:
        shown = {name: m for name, m in shown.items() if name == cfg.checkpoint}
    if not shown:
        raise UserError(
            f"{run.path} holds no such evaluation: make one with the same command and --stage eval"
        )
    results = {**results, "checkpoints": shown}
    key = evaluation_key(cfg)
    run.log("\n" + (f"{key}\n" if key != "checkpoints" else "") + table([(cfg, results)]))
    return cfg, results


def work_ahead(cfg, run, data):
    """[(name, forward passes)] that this call still has to do: the plan behind the time estimate."""
    plan, tests = [], len(data.test_labels)
    wanted = ("teacher", "distill", "eval") if cfg.stage == "all" else (cfg.stage,)
    needs_teacher = METHODS[cfg.method].teacher
    for stage, phase in (("teacher", teacher_phase(cfg, data)), ("distill", student_phase(cfg, data))):
        done = run.has("teacher") or not needs_teacher if stage == "teacher" else run.has("last")
        if stage in wanted and not done:
            first = (run.load_state(phase.name) or {"epoch": 0})["epoch"]
            plan.append((phase.name, (phase.epochs - first) * len(phase.indices) * phase.cost(cfg.steps)))
            if phase.select:
                epochs = phase.epochs + 1 - max(first + 1, selection_starts(phase.epochs))
                plan.append(("selection", epochs * tests * (3 * 20 + 2)))
    if "eval" in wanted:
        plan.append(("evaluation", (2 + needs_teacher) * tests * (3 * cfg.eval_steps + 2)))
    return plan


def run_one(cfg, argv):
    """All that one scalar, resolved Config asks for; returns (cfg, results) where there is a table."""
    run = Run(cfg, argv)
    if cfg.stage == "report":
        return stage_report(cfg, run)
    data = load_data(cfg)
    run.fingerprint = data.fingerprint()
    data = data.to(cfg.device)
    run.plan = work_ahead(cfg, run, data)
    if cfg.stage == "teacher" or (cfg.stage == "all" and METHODS[cfg.method].teacher):
        stage_teacher(cfg, run, data)
    if cfg.stage in ("distill", "all"):
        stage_distill(cfg, run, data)
    if cfg.stage not in ("eval", "all"):
        return None
    stage_eval(cfg, run, data)
    return stage_report(cfg, run)


def main(argv=None) -> int:
    """The command line: one run per element of the comma lists' product. Returns the exit code: 0, 2 for an
    error of the user's (one line on stderr), 1 for one of ours."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        configs = [resolve(one) for one in expand(parse_args(argv))]
        if len(configs) > 1 and configs[0].out:
            configs = [replace(one, out=str(pathlib.Path(one.out, run_name(one)))) for one in configs]
        done = [run_one(one, argv) for one in configs]
        if len(done) > 1 and all(done):
            print("\n" + table(done), flush=True)
        return 0
    except Exception as error:
        if "--debug" in argv:
            raise
        ours = not isinstance(error, UserError)
        hint = f"{type(error).__name__}, unexpected; --debug shows where: " if ours else ""
        print(f"ltsd: error: {hint}{' '.join(str(error).split())}", file=sys.stderr)
        return 1 if ours else 2


if __name__ == "__main__":
    sys.exit(main())
