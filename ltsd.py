"""Long-Tailed Adversarial Training with Self-Distillation (ICLR 2025) in one file.

Adversarial training on long-tailed data leaves the rare classes defenceless. The paper's remedy, reproduced
here: an adversarially trained *self-teacher* is fitted on a class-balanced resample D_B of the long-tailed
set D; the student, trained adversarially on D with balanced softmax, distils from it (section 7, ``_ltsd``).

    python ltsd.py --data synthetic                        # the whole pipeline, two minutes on two CPU cores
    python ltsd.py --data cifar100 --ir 10 --stage all     # the paper's Table 2: teacher, student, evaluation
    python ltsd.py --data folder --data-dir DIR --ir 50    # your images: DIR/train/CLASS/*, DIR/test/CLASS/*
    torchrun --nproc-per-node 4 ltsd.py ...                # any of them on four GPUs of this machine

Sections: 1 setup, 2 config, 3 data, 4 models, 5 step, 6 attack, 7 methods, 8 training, 9 autoattack, 10 evaluation,
11 report, 12 theory, 13 bench, 14 main. Images are float32 in [0,1], NCHW, channels_last; labels int64; eps and
step_size are fractions in the functions and 255ths on the command line. Importing has no side effects: import what
you need.
"""

# ==========================================================================================================
# 1  Setup
# ==========================================================================================================

import argparse
import contextlib
import copy
import ctypes
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.datasets.utils import calculate_md5, download_url
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # macOS, Windows: the reference step takes over
    HAS_TRITON = False

SYNC_EVERY = 50  # training steps between two reads of device-side values
CPU_CHUNK = 32  # images a gradient-free forward takes at once on a CPU: small enough to stay in its caches
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


class UserError(Exception):
    """A mistake the user can mend: ``main`` prints its one line and returns 2."""


class Stopped(BaseException):
    """A signal has ended the run: ``main`` prints its one line and returns 128 + the signal's number."""


class Signals:
    """What SIGINT, SIGTERM and SIGHUP do while ``main`` runs in the main thread: end the run at once; but while `wait`
    is set, the first one only leaves its number, for ``train`` to finish its step and save."""

    number, wait = None, False

    def install(self):
        """Handle them from now on, but for those that are ignored (nohup); returns the handlers to put back."""
        self.number, self.wait = None, False
        numbers = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
        numbers -= {n for n in numbers if signal.getsignal(n) in (None, signal.SIG_IGN)}
        with contextlib.suppress(ValueError):  # not in the main thread: signals are somebody else's
            return {n: signal.signal(n, self.arrive) for n in numbers}
        return {}

    def arrive(self, number, frame):
        at_once, self.number = self.number or not self.wait, number
        if at_once:
            self.here()

    def here(self, where=""):
        """The end of waiting: a run may end here, if a signal has arrived."""
        self.wait = False
        if self.number:
            raise Stopped(f"stopped by {signal.Signals(self.number).name}{where}; the same command goes on")


SIGNALS = Signals()


def derive_seed(seed, *words):
    """A 63-bit seed from the run's seed and a purpose, so that no two purposes share a random stream."""
    digest = hashlib.sha256(repr((seed, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def ieee_float32():
    """Inside, no TF32: a verdict must not depend on a ten-bit mantissa. No cuDNN autotuning either, which AutoAttack's
    ever changing batch sizes would set off again and again."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        switches = [(t, "allow_tf32", t.allow_tf32, False) for t in (cudnn, cuda)]
    except RuntimeError:  # the importing program uses PyTorch's newer switches, which do not mix with these
        switches = [(t, "fp32_precision", t.fp32_precision, "ieee") for t in (cudnn.conv, cuda)]
    switches.append((cudnn, "benchmark", cudnn.benchmark, False))
    try:
        for switch, name, _, strict in switches:
            setattr(switch, name, strict)
        yield
    finally:
        for switch, name, before, _ in switches:
            setattr(switch, name, before)


# Several processes, each a "rank" of a group that torchrun started. Only ``main`` changes these three, so that whoever
# imports this file into a distributed program of their own gets the functions of one process.
RANK, WORLD, PATIENT = 0, 1, None


def join_group():
    """Under torchrun, form the process group and set RANK and WORLD; else do nothing.

    Training steps wait a minute for each other (torchrun itself ends all ranks when one dies); `gather` as long as it
    takes, since one rank's share of an evaluation may end much later than another's."""
    global RANK, WORLD, PATIENT
    if {"RANK", "LOCAL_RANK"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group(timeout=timedelta(seconds=60))  # NCCL for CUDA tensors, gloo for the CPU's
        PATIENT = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        RANK, WORLD = dist.get_rank(), dist.get_world_size()
        if RANK:
            warnings.simplefilter("ignore")  # rank 0 has said it


def leave_group():
    """Undo join_group."""
    global RANK, WORLD
    if WORLD > 1:
        dist.destroy_process_group()
        RANK, WORLD = 0, 1


def gather(value) -> list:
    """The value (CPU tensor, number, string, list, None) of every rank, in their order, after waiting for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value, group=PATIENT)
    return values


def share(n):
    """This rank's rows of a batch of n >= 1, as a slice, and what its mean over them weighs in the mean over ranks.

    A rank that would have none takes part with the first row, at weight 0. One process: (all, 1.0)."""
    rows = slice(RANK, n, WORLD) if n > RANK else slice(0, 1)
    return rows, len(range(RANK, n, WORLD)) * WORLD / n


# ==========================================================================================================
# 2  Config
# ==========================================================================================================


def _flag(default, help, *, low=None, high=None, choices=None, many=False, identity=True):
    """A Config field: default, help, inclusive bounds; many: takes a comma list; identity: names the run."""
    meta = dict(help=help, low=low, high=high, choices=choices, many=many, identity=identity)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """Every setting of a run, one field per flag; None stands for the data set's or the method's own default."""

    # fmt: off
    data: str = _flag("cifar100", "data set", choices=("cifar10", "cifar100", "tinyimagenet", "folder", "synthetic"))
    data_dir: str = _flag("data", "folder that holds, or will hold, the data", identity=False)
    image_size: int = _flag(None, "side of the images of --data folder (32)", low=16, high=512)
    ir: float = _flag(None, "imbalance n_max/n_min (10; cifar10 50, synthetic 20, folder as it is)", low=1, many=True)
    method: str = _flag("ltsd", "training method, or 'all'", many=True)
    arch: str = _flag(None, "network (resnet18; tinyimagenet preactresnet18, synthetic resnet8)",
                      choices=("resnet18", "preactresnet18", "wrn34-10", "resnet8"))
    stage: str = _flag("all", "what to do; 'train' is another name of 'distill'", identity=False,
                       choices=("all", "teacher", "distill", "train", "eval", "report", "theory", "bench"))
    aug: str = _flag("none", "RandAugment(2, 8) or AutoAugment's CIFAR-10 policy before crop and flip",
                     many=True, choices=("none", "ra", "aua"))
    official: bool = _flag(False, "the method's own published optimiser settings, if any for the data")
    kd: str = _flag("igdm", "distillation: igdm, or kl (of teacher to student at x')", choices=("igdm", "kl"))
    beta: float = _flag(None, "weight of the KL term of trades, mart and robal (6)", low=0)
    reat_tail: str = _flag("official", "reat's tail term: as released or as intended", choices=("official", "intended"))
    teacher: str = _flag(None, "checkpoint to use as the teacher (copied into the run)", identity=False)
    teacher_method: str = _flag("pgd-at", "teacher's method", many=True, choices=("pgd-at", "at-bsl", "robal", "reat"))
    teacher_data: str = _flag("balanced", "what the self-teacher sees: D_B, or all", choices=("balanced", "full"))
    alpha: float = _flag(None, "final distillation weight, after a linear ramp (40; synthetic 10)", low=0, many=True)
    tau: float = _flag(1.0, "strength of the class prior in balanced softmax, b_c = tau ln n_c", low=0)
    gamma: float = _flag(None, "D_B: floor(gamma n_min) images a class (IR/2, at least 1)", low=0, high=1e4, many=True)
    epochs: int = _flag(None, "student epochs (100; synthetic 12)", low=1)
    teacher_epochs: int = _flag(None, "teacher epochs (30, on all data as --epochs; synthetic 8)", low=1)
    batch_size: int = _flag(None, "student batch size (128; synthetic 64)", low=1)
    teacher_batch_size: int = _flag(None, "teacher batch size (32, on all data as --batch-size)", low=1)
    lr: float = _flag(None, "first learning rate of SGD (0.1)", low=0)
    milestones: str = _flag(None, "shares of the epochs after which the rate drops tenfold (0.75,0.9)")
    weight_decay: float = _flag(None, "weight decay (5e-4)", low=0)
    momentum: float = _flag(0.9, "momentum", low=0, high=1)
    eps: float = _flag(8.0, "L-inf radius of the training attack, in 255ths", low=0, high=255)
    step_size: float = _flag(2.0, "step of the training attack, in 255ths", low=0, high=255)
    steps: int = _flag(10, "steps of the training attack", low=0)
    eval_eps: float = _flag(None, "L-inf radius of the evaluation, in 255ths (--eps)", low=0, high=255, identity=False)
    eval_step_size: float = _flag(2.0, "step of the evaluation's PGD, in 255ths", low=0, high=255, identity=False)
    eval_steps: int = _flag(20, "steps of the evaluation's PGD", low=0, identity=False)
    attacks: str = _flag(None, "what to evaluate (clean,pgd,aa; synthetic clean,pgd)", identity=False)
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N", identity=False)
    amp: str = _flag("auto", "precision of the convolutions; auto: bf16 where it is fast, fp16 on older GPUs, else off",
                     choices=("auto", "bf16", "fp16", "off"))
    compile: str = _flag("auto", "compile networks, and on CUDA replay attacks as graphs; auto: on CUDA only",
                         choices=("auto", "on", "off"))
    deterministic: bool = _flag(False, "deterministic algorithms on CUDA too (slower; CPU runs always are)")
    sync_bn: bool = _flag(False, "under torchrun, batch statistics over all GPUs in the place of each its own")
    seed: int = _flag(0, "seed of the weights, of D_B and of every other draw", low=0, many=True)
    out: str = _flag(None, "run folder (runs/NAME; with comma lists the parent of the run folders)", identity=False)
    overwrite: bool = _flag(False, "start afresh in a folder that holds a run", identity=False)
    checkpoint: str = _flag(None, "with --stage eval: score this file, not the run's own", identity=False)
    train_limit: int = _flag(None, "about this many training images, before the long-tail draw", low=1)
    test_limit: int = _flag(None, "about this many test images", low=1)
    examples: int = _flag(None, "evaluated images to save, clean and attacked, as a PNG grid", low=1, identity=False)
    figures: str = _flag(None, "folder for figures of the table or the theory (needs matplotlib)", identity=False)
    debug: bool = _flag(False, "show tracebacks", identity=False)
    runs: str = _flag(None, "run folders for --stage report, globs too (the run these flags name)", identity=False)
    # fmt: on


# What is fixed about a data set: classes, image side, classes in the tail group, its own defaults.
# fmt: off
COMMON = dict(arch="resnet18", alpha=40.0, epochs=100, batch_size=128, lr=0.1, beta=6.0, weight_decay=5e-4,
              milestones="0.75,0.9", attacks="clean,pgd,aa")
SMALL = dict(arch="resnet8", alpha=10.0, epochs=12, teacher_epochs=8, batch_size=64, attacks="clean,pgd")
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
    values = {}  # in order and without repeats: one run folder can only hold one run
    for part in METHODS if f.name == "method" and text == "all" else text.split(",") if f.metadata["many"] else [text]:
        try:
            values[f.type(part.strip())] = None
        except ValueError:
            raise UserError(f"--{_dashed(f.name)} {part!r}: expected {f.type.__name__}") from None
    return tuple(values) if len(values) > 1 else next(iter(values))


def _dashed(name):
    return name.replace("_", "-")


def parse_args(argv=None) -> Config:
    """Read the command line (default ``sys.argv[1:]``) into a Config; UserError for what no run can have.

    A field given several comma-separated values holds a tuple; ``expand`` makes the product.
    """
    parser = _Parser("ltsd.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in fields(Config):
        choices = METHODS if f.name == "method" else f.metadata["choices"]
        shape = "{" + ",".join(choices) + "}" if choices else f.type.__name__.upper()
        kind = dict(metavar=shape, type=functools.partial(_parse_value, f))
        kind = dict(action="store_true") if f.type is bool else kind
        text = f.metadata["help"] + "; a comma list makes a run each" * f.metadata["many"]
        if f.default is not None and f.type is not bool:
            text += f" ({f.default:g})" if f.type is float else f" ({f.default})"
        if f.name == "runs":
            parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
        else:
            parser.add_argument("--" + _dashed(f.name), default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_intermixed_args(argv))
    cfg = Config(**given | {"runs": tuple(given.get("runs", ())) or None})
    for one in expand(cfg):
        validate(one)
    return cfg


def expand(cfg) -> list:
    """The scalar Configs that a Config with comma lists stands for: their product."""
    lists = {k: values for k, values in vars(cfg).items() if isinstance(values, tuple) and k != "runs"}
    return [replace(cfg, **dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]


def validate(cfg) -> None:
    """Raise UserError, naming the flag and the remedy, for a value that no run can have."""
    for f in fields(cfg):
        value, meta, flag = getattr(cfg, f.name), f.metadata, "--" + _dashed(f.name)
        choices = METHODS if f.name == "method" else meta["choices"]
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(f"{flag} {value!r}: choose from {', '.join(choices)}")
        if value == "":  # as a shell makes of an unset variable: not the same as leaving the flag out
            raise UserError(f"{flag} '': is empty; give it a value or leave it out")
        if f.type in (int, float) and not abs(value) < 2**63:  # NaN is not either
            raise UserError(f"{flag} {str(value)[:40]}: must be a finite number below 2**63")
        if meta["low"] is not None and value < meta["low"]:
            raise UserError(f"{flag} {value:g}: must be at least {meta['low']:g}")
        if meta["high"] is not None and value > meta["high"]:
            raise UserError(f"{flag} {value:g}: must be at most {meta['high']:g}")
    if cfg.attacks is not None and not set(cfg.attacks.split(",")) <= set(ATTACKS):
        raise UserError(f"--attacks {cfg.attacks!r}: a comma list of {', '.join(ATTACKS)}")
    try:
        shares = [float(share) for share in (cfg.milestones or "0.75").split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares) or shares != sorted(shares):
        raise UserError(f"--milestones {cfg.milestones!r}: want rising shares of the epochs, as in 0.75,0.9")
    if cfg.image_size and cfg.data != "folder":
        raise UserError(f"--image-size {cfg.image_size}: only --data folder can be resized; leave it out")
    if cfg.overwrite and (cfg.stage == "eval" or (cfg.stage in ("distill", "train") and METHODS[cfg.method].teacher)):
        raise UserError(f"--overwrite: would delete what --stage {cfg.stage} needs; use another stage, or leave it out")
    table = ("eval", "report", "all")
    uses = dict(checkpoint=("eval",), examples=("eval", "all"), figures=(*table, "theory"), runs=("report",))
    for name, stages in uses.items():
        if getattr(cfg, name) and cfg.stage not in stages:
            flag = f"--{name} {getattr(cfg, name)}" if name != "runs" else f"argument {cfg.runs[0]!r}"
            raise UserError(f"{flag}: goes with --stage {' or '.join(stages)} only")


def _filled(cfg, values):
    return replace(cfg, **{k: v for k, v in values.items() if getattr(cfg, k) is None})


def resolve(cfg) -> Config:
    """Fill every None of a scalar Config with its default, and 'auto' with what this machine has."""
    _, size, _, defaults = DATASETS[cfg.data]
    row = METHODS[cfg.method]
    if cfg.official and cfg.data not in row.official_data:
        known = ", ".join(row.official_data) or "no data set"
        raise UserError(f"--official: {cfg.method} has published settings for {known}, not for {cfg.data}")
    published = row.official if cfg.official else {}
    cfg = _filled(cfg, COMMON | dict(image_size=size, eval_eps=cfg.eps) | defaults | published)
    full = cfg.teacher_data == "full"  # Figure 5's other teachers see all data, for as long as a student
    epochs, batch_size = (cfg.epochs, cfg.batch_size) if full else (30, 32)
    cfg = _filled(cfg, dict(teacher_epochs=epochs, teacher_batch_size=batch_size))
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        gpus = {"cpu": math.inf, "cuda": torch.cuda.device_count()}[device.type]
    except (RuntimeError, KeyError):
        raise UserError(f"--device {name!r}: choose auto, cpu, cuda or cuda:N") from None
    if (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: PyTorch sees {gpus} CUDA devices; try cpu")
    amp = best_precision(device) if cfg.amp == "auto" else cfg.amp
    stage, compiled = "distill" if cfg.stage == "train" else cfg.stage, best_compile(cfg.compile, device)
    if cfg.sync_bn and stage in ("all", "teacher", "distill") and (WORLD == 1 or device.type != "cuda"):
        raise UserError("--sync-bn: needs several GPUs; start with torchrun --nproc-per-node N, or leave it out")
    return replace(cfg, device=name, amp=amp, stage=stage, compile=compiled)


@functools.lru_cache
def best_compile(choice, device) -> str:
    """'on' or 'off': 'auto' means on where the device is a GPU and a first tiny compilation succeeds."""
    if choice == "off" or (choice == "auto" and device.type == "cpu"):
        return "off"
    try:
        torch.compile(lambda t: t.sin() + 1)(torch.zeros(8, device=device))
        return "on"
    except Exception as error:  # no compiler, no Triton, an unsupported GPU ...
        reason = f"torch.compile does not work here ({type(error).__name__})"
        if choice == "on":
            raise UserError(f"--compile on: {reason}; install a C++ compiler, or use --compile off") from None
        warnings.warn(f"{reason}: going on without, more slowly", stacklevel=2)
        return "off"


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

    def fingerprints(self):
        """Checksums of the training and of the test set, on the CPU: does a run that goes on see the same data?"""
        parts = (self.train_images, self.train_labels), (self.test_images, self.test_labels)
        return [zlib.crc32(labels.numpy(), zlib.crc32(images.contiguous().numpy())) for images, labels in parts]

    def to(self, device):
        """The same data with its four tensors on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


def long_tail_counts(n_max, num_classes, ir) -> list:
    """Images per class of the exponential profile: int(n_max * ir**(-c/(C-1))), class 0 the head, C-1 the tail.

    n_max, num_classes: int >= 1; ir: imbalance ratio n_max/n_min >= 1 (1 keeps all). Truncated, not rounded, as in the
    LDAM generator that RoBal, REAT and AT-BSL share. ValueError where a class would be empty.
    """
    if not ir >= 1 or n_max < 1 or num_classes < 1:
        raise ValueError(f"imbalance ratio {ir}, n_max {n_max}, {num_classes} classes: all must be >= 1")
    counts = [int(n_max * ir ** (-c / max(num_classes - 1, 1))) for c in range(num_classes)]
    if counts[-1] < 1:
        raise ValueError(f"imbalance ratio {ir:g} leaves class {counts.index(0)} empty: at most {n_max}")
    return counts


def long_tail_indices(labels, counts) -> np.ndarray:
    """Positions of the long-tailed subset, class by class: the very images that RoBal, REAT and AT-BSL use.

    labels: int array [N]; counts: images wanted per class. NumPy's legacy generator, seeded 0, shuffles each class's
    ascending positions in turn; the first n_c stay. Returns int64 [sum(counts)] and touches no global generator.
    ValueError where a class has too few images.
    """
    labels, rng, chosen = np.asarray(labels), np.random.RandomState(0), [np.empty(0, np.int64)]
    for c, wanted in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if not 0 <= wanted <= len(members):
            raise ValueError(f"class {c} has {len(members)} images, {wanted} are wanted: lower n_max or ir")
        rng.shuffle(members)
        chosen.append(members[:wanted])
    return np.concatenate(chosen).astype(np.int64)


def balanced_indices(labels, per_class, seed) -> np.ndarray:
    """Draw the paper's D_B (section 4.2): exactly per_class positions of every class, each position floor or ceil times
    equally often.

    labels: int array [N] with classes 0..C-1; per_class: int >= 1. Large classes are thinned without replacement; small
    ones repeated whole, the remainder drawn without replacement. Returns int64 [C*per_class]. ValueError for per_class
    < 1, an empty class, labels that are no whole numbers >= 0.
    """
    labels, rng, chosen = np.asarray(labels), np.random.default_rng(seed), [np.empty(0, np.int64)]
    if per_class < 1 or per_class != int(per_class):
        raise ValueError(f"per_class {per_class}: must be a whole number of at least 1")
    if len(labels) and (labels.dtype.kind not in "iu" or labels.min() < 0):
        raise ValueError(f"labels are {labels.dtype}, the least {labels.min()}: want integers from 0")
    for c in range(int(labels.max()) + 1 if len(labels) else 0):
        members = np.flatnonzero(labels == c)
        if not len(members):
            raise ValueError(f"class {c} has no image to resample")
        whole, rest = divmod(int(per_class), len(members))
        chosen += [np.tile(members, whole), rng.choice(members, rest, replace=False)]
    return np.concatenate(chosen)


# The ops of RandAugment and AutoAugment with the arguments that torchvision's v2 classes give them; spelled
# out because those classes keep their tables private (the tests compare). name: (magnitude at the first and
# at the last level, function); a magnitude that grows from 0 gets a random sign.
# fmt: off
AUGMENT_OPS = {
    "Identity":     (0.0, 0.0, lambda x, m: x),
    "ShearX":       (0.0, 0.3, lambda x, m: _warp(x, slope=[m, 0.0])),
    "ShearY":       (0.0, 0.3, lambda x, m: _warp(x, slope=[0.0, m])),
    "TranslateX":   (0.0, 150 / 331, lambda x, m: _warp(x, shift=[int(m), 0])),   # of the width
    "TranslateY":   (0.0, 150 / 331, lambda x, m: _warp(x, shift=[0, int(m)])),   # of the height
    "Rotate":       (0.0, 30.0, lambda x, m: _warp(x, degrees=-m)),   # TF.rotate turns the other way
    "Brightness":   (0.0, 0.9, lambda x, m: TF.adjust_brightness(x, 1.0 + m)),
    "Color":        (0.0, 0.9, lambda x, m: TF.adjust_saturation(x, 1.0 + m)),
    "Contrast":     (0.0, 0.9, lambda x, m: TF.adjust_contrast(x, 1.0 + m)),
    "Sharpness":    (0.0, 0.9, lambda x, m: TF.adjust_sharpness(x, 1.0 + m)),
    "Posterize":    (8.0, 4.0, lambda x, m: TF.posterize(x, round(m))),
    "Solarize":     (1.0, 0.0, lambda x, m: TF.solarize(x, 255.0 * m)),
    "AutoContrast": (0.0, 0.0, lambda x, m: TF.autocontrast(x)),
    "Equalize":     (0.0, 0.0, lambda x, m: TF.equalize(x)),
    "Invert":       (0.0, 0.0, lambda x, m: TF.invert(x)),
}
# AutoAugment's CIFAR-10 policy: 25 pairs of "op probability level", level 0-9 (0 where the op has none).
AUTOAUGMENT_CIFAR10 = """
Invert .1 0 Contrast .2 6, Rotate .7 2 TranslateX .3 9, Sharpness .8 1 Sharpness .9 3, ShearY .5 8 TranslateY .7 9,
AutoContrast .5 0 Equalize .9 0, ShearY .2 7 Posterize .3 7, Color .4 3 Brightness .6 7, Sharpness .3 9 Brightness .7 9,
Equalize .6 0 Equalize .5 0, Contrast .6 7 Sharpness .6 5, Color .7 7 TranslateX .5 8, Equalize .3 0 AutoContrast .4 0,
TranslateY .4 3 Sharpness .2 6, Brightness .9 6 Color .2 8, Solarize .5 2 Invert .0 0, Equalize .2 0 AutoContrast .6 0,
Equalize .2 0 Equalize .6 0, Color .9 9 Equalize .6 0, AutoContrast .8 0 Solarize .2 8, Brightness .1 3 Color .7 0,
Solarize .4 5 AutoContrast .9 0, TranslateY .9 9 TranslateY .7 9, AutoContrast .9 0 Solarize .8 3,
Equalize .8 0 Invert .1 0, TranslateY .7 9 AutoContrast .9 0"""
# fmt: on
CROP_PADDING = 4
AUGMENT_CHUNK = 8192  # images in flight; bounds the memory (equalize takes 8 bytes a value), not the result


def _warp(x, degrees=0.0, shift=(0, 0), slope=(0.0, 0.0)):
    """Warp uint8 [N,3,H,W]: torchvision moves one image of pixel numbers on the CPU, a gather the rest.

    The pixels of TF.affine(x), but on any device and at any matmul precision, and faster than grid_sample."""
    numbers = torch.arange(1.0, x.shape[2] * x.shape[3] + 1).view(1, *x.shape[2:])  # 0 is left for "outside"
    shear, center = [math.degrees(math.atan(s)) for s in slope], [0, 0] if any(slope) else None
    source = TF.affine(numbers, degrees, list(shift), 1.0, shear, center=center).long().flatten().to(x.device)
    return F.pad(x.flatten(2), (1, 0)).gather(2, source.expand(len(x), 3, -1)).view_as(x)


def _draw_ops(policy, n, height, width, generator):
    """Draw two ops for n images: the list of (name, signed magnitude), and int64 [2, n] numbers into it."""
    if policy == "ra":  # RandAugment(num_ops=2, magnitude=8) has 31 levels; both ops are drawn from one list
        steps, levels = [[(name, 1.0, 8) for name in AUGMENT_OPS if name != "Invert"]] * 2, 31
        pick = torch.randint(len(steps[0]), (2, n), generator=generator)
    else:
        pairs = [pair.split() for pair in AUTOAUGMENT_CIFAR10.split(",")]
        steps, levels = [[(p[i], float(p[i + 1]), int(p[i + 2])) for p in pairs] for i in (0, 3)], 10
        pick = torch.randint(len(pairs), (n,), generator=generator).expand(2, n)
    chance, sign = torch.rand(2, n, generator=generator), torch.randint(2, (2, n), generator=generator)
    actions, codes = {("Identity", 0.0): 0}, []
    for step, row, u, s in zip(steps, pick, chance, sign, strict=True):
        table = []
        for name, _, level in step:
            first, last, _ = AUGMENT_OPS[name]
            last *= {"TranslateX": width, "TranslateY": height}.get(name, 1)
            m = torch.linspace(first, last, levels)[level].item()  # in float32 as theirs: a tie at 187
            both = (m, -m) if first < last else (m, m)
            table.append([actions.setdefault((name, v), len(actions)) for v in both])
        applied = u <= torch.tensor([probability for _, probability, _ in step])[row]
        codes.append(torch.where(applied, torch.tensor(table)[row, s], 0))
    return list(actions), torch.stack(codes)


def _apply_ops(x, codes, actions):
    """New uint8 [N,3,H,W], image i after actions[codes[i]]; sorted by code: a group is one slice."""
    order, counts = codes.argsort(), codes.bincount(minlength=len(actions)).tolist()
    grouped = x.index_select(0, order.to(x.device))
    for (name, magnitude), group in zip(actions, grouped.split(counts), strict=True):
        if len(group) and name != "Identity":
            group.copy_(AUGMENT_OPS[name][2](group, magnitude))
    return grouped.index_select(0, order.argsort().to(x.device))


def _crop_and_flip(x, top, left, flip):
    """Zero-pad, cut image i at (top[i], left[i]), mirror it where flip[i]: two gathers on views."""
    windows = F.pad(x, (CROP_PADDING,) * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    cut = windows[torch.arange(len(x), device=x.device), :, top, left]  # [N,3,9,9,H,W] -> [N,3,H,W]
    column = torch.arange(x.shape[3], device=x.device)
    column = torch.where(flip[:, None], column.flip(0), column)  # [N,W]
    return cut.gather(3, column[:, None, None].expand_as(cut))


def augment(images_u8, policy, generator) -> torch.Tensor:
    """Augment a whole epoch at once: the policy, then a zero-pad-4 random crop, then a flip with p = 0.5.

    images_u8: uint8 [N,3,H,W], any device, not changed. policy: "none", "ra" (RandAugment, two ops at magnitude 8) or
    "aua" (AutoAugment's CIFAR-10 policy). generator: a CPU torch.Generator, the only source of randomness; all draws
    are made first and on the CPU, so they do not depend on the device. Returns a new uint8 [N,3,H,W] on the same
    device. Every image has the distribution of torchvision v2's RandAugment or AutoAugment (nearest, black fill),
    RandomCrop(padding=4) and RandomHorizontalFlip on a tensor. Order and settings as in AT-BSL (datasets.py@23f433e).
    ValueError: unknown policy, other dtype or shape, a generator that is not on the CPU."""
    if policy not in ("none", "ra", "aua"):
        raise ValueError(f"policy is {policy!r}; choose none, ra or aua")
    shape, device = list(images_u8.shape), images_u8.device
    if images_u8.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3 or 0 in shape[2:]:
        raise ValueError(f"images must be uint8 [N,3,H,W], got {images_u8.dtype} {shape}")
    if generator.device.type != "cpu":
        raise ValueError(f"generator is on {generator.device}; pass a CPU one: torch.Generator()")
    n, out = shape[0], torch.empty(shape, dtype=torch.uint8, device=device)
    corner = torch.randint(2 * CROP_PADDING + 1, (2, n), generator=generator).to(device)
    flip = torch.randint(2, (n,), generator=generator).bool().to(device)
    actions, codes = [], torch.empty(0, n)
    if policy != "none":
        actions, codes = _draw_ops(policy, n, *shape[2:], generator)
    for start in range(0, n, AUGMENT_CHUNK):
        part = slice(start, start + AUGMENT_CHUNK)
        x = images_u8[part]
        for step in codes[:, part]:
            x = _apply_ops(x, step, actions)
        out[part] = _crop_and_flip(x, *corner[:, part], flip[part])
    return out


@contextlib.contextmanager
def _fetching(path, md5):
    """Around a download to `path`: refuse a damaged file that is there, tell in one line what cannot be had."""
    if md5 and path.is_file() and calculate_md5(path) != md5:
        raise UserError(f"{path} does not have the published md5 {md5}: delete it and fetch it again")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (OSError, RuntimeError) as error:
        remedy = f"put {path.name} into {path.parent} by hand, or use --data synthetic, made on the spot"
        raise UserError(f"could not fetch {path.name} ({str(error)[:200]}): {remedy}") from error


def load_cifar(name, data_dir, verify=True) -> Data:
    """CIFAR-10 or -100 as published (python pickles), fetched into data_dir when absent; verify: check md5s."""
    cls = getattr(torchvision.datasets, name.upper())
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
            train = {n: n.split("/")[2] for n in names if n.startswith(root + "train/")}
            classes = sorted(set(train.values()))
            lines = archive.read(root + "val/val_annotations.txt").decode().split("\n")
            pairs = [line.split("\t")[:2] for line in lines if "\t" in line]
            wnid = {f"{root}val/images/{file}": label for file, label in pairs}
            parts = [train, {n: wnid[n] for n in names if n in wnid}]
            labels = [torch.tensor([classes.index(label) for label in part.values()]) for part in parts]
            images = [_decode_all([(n, archive.read(n)) for n in part], 64) for part in parts]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not the Tiny-ImageNet archive ({error}): fetch it again") from error
    return Data(images[0], labels[0], images[1], labels[1], classes)


def load_folder(data_dir, size) -> Data:
    """Images of data_dir/train/CLASS/ and data_dir/test/CLASS/ (or val/): files named as torchvision's IMG_EXTENSIONS.

    The centre square of each, scaled to `size`; transparency and EXIF orientation are ignored, as by torchvision's
    ImageFolder; hidden files and folders are not read, links are followed. Classes are ordered by training count, most
    frequent first, ties by name. Decoded tensors are cached beside the data, or in the user's cache folder where that
    is read-only; the cache is dropped when a file is added, removed or changed. UserError for a layout that cannot be
    trained.
    """
    root = pathlib.Path(data_dir)
    folders = [root / "train", root / "test" if (root / "test").is_dir() else root / "val"]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: want DIR/train/CLASS/* and DIR/test/CLASS/*")
    names = [sorted(p.name for p in d.iterdir() if p.is_dir() and p.name[0] != ".") for d in folders]
    if names[0] != names[1]:
        odd = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:5])
        raise UserError(f"the class folders of {folders[0]} and {folders[1]} differ: {odd}")
    if len(names[0]) < 2:
        raise UserError(f"{folders[0]} has {len(names[0])} class folder(s): a classifier needs at least 2")
    index, parts = {name: i for i, name in enumerate(names[0])}, []
    for folder in map(str, folders):
        found = make_dataset(folder, index, IMG_EXTENSIONS, allow_empty=True)
        parts.append([(path, label) for path, label in found if os.sep + "." not in path[len(folder) :]])
        empty = index.keys() - {names[0][label] for _, label in parts[-1]}
        if empty:
            known, empty = " ".join(IMG_EXTENSIONS), os.path.join(folder, min(empty))
            raise UserError(f"{empty} holds no image ({known}): add some, or remove the class everywhere")
    order = np.argsort(-np.bincount([label for _, label in parts[0]]), kind="stable")
    rank = np.argsort(order)

    def decode():
        images = [_decode_all([(path, None) for path, _ in part], size) for part in parts]
        labels = [torch.from_numpy(rank[[label for _, label in part]]) for part in parts]
        return Data(images[0], labels[0], images[1], labels[1], [names[0][i] for i in order])

    stats = [(path, os.stat(path)) for part in parts for path, _ in part]
    return _cached(root, f"folder-{size}", [(path, s.st_size, s.st_mtime_ns) for path, s in stats], decode)


def _decode_all(sources, size):
    """Decode (name, bytes or None: open the name) pairs on a thread pool -> uint8 [N,3,size,size]."""
    out = np.empty((len(sources), size, size, 3), np.uint8)

    def decode(i):
        name, content = sources[i]
        try:
            with Image.open(name if content is None else io.BytesIO(content)) as image:
                if image.mode == "F":
                    raise ValueError("float pixels have no fixed range; save it with 8 or 16 bits")
                if image.mode.startswith("I"):  # 16-bit grey: keep the high byte
                    image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
                # fit cuts before it scales: a long strip does not fill the memory
                out[i] = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))
        except Exception as error:  # PIL raises many kinds; what the user needs is the file's name
            raise UserError(f"{name} is not a readable image ({error}): remove or replace it") from error

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # PIL's remarks on big or sloppily written files that it can read
        list(pool.map(decode, range(len(sources))))
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _cached(folder, name, state, build):
    """`build()`, or its earlier result while `state` (a JSON-able description of the files) is unchanged."""
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    tag, places = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12], [folder / f".ltsd-{name}.pt"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        places.append(user / "ltsd" / f"{name}-{tag}.pt")
    for path in places:
        with contextlib.suppress(Exception):  # a missing or broken cache is made again
            saved = torch.load(path, weights_only=True)
            if saved.pop("key") == key:
                return Data(**saved)
    data = build()
    for path in places:
        with contextlib.suppress(OSError, UserError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, {"key": key, **vars(data)}, unique=os.getpid())
            break
    return data


def make_synthetic(train_per_class=240, test_per_class=25, classes=10, size=32) -> Data:
    """Images made on the spot that behave like photographs under attack, the same on every machine.

    Each class has a coarse grating of its own wavelength and orientation, strong enough to survive eps 8/255 but
    overlaid by those of other classes, and a fine one so faint that an attack can wipe it out, yet enough for a
    naturally trained network to decide by. Phases are random, so that a crop changes nothing.
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
            other = rng.integers(0, classes, len(labels))
            strength = rng.uniform(0, 0.13, (len(labels), 1, 1, 1))
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
        tiny = cfg.data == "tinyimagenet"
        data = load_tinyimagenet(cfg.data_dir) if tiny else load_cifar(cfg.data, cfg.data_dir)
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
    try:
        for n_max in itertools.count(int(available[0]), -1):  # at 0 at the latest there is a ValueError
            counts = long_tail_counts(n_max, len(available), ir)
            if np.all(counts <= available):
                return counts
    except ValueError as error:
        raise UserError(f"--ir {ir:g}: {error}") from None


# ==========================================================================================================
# 4  Models
# ==========================================================================================================
# Parameter names are those of the public CIFAR checkpoints. `folds` lists a module's pairs of a convolution
# and the batch norm of its output alone: section 6 folds those; other norms become a scale and a shift there.


def _conv(cin, cout, side, stride=1):
    return nn.Conv2d(cin, cout, side, stride, side // 2, bias=False)


def _register(parent, path, module):
    """Give `parent` a submodule under the path "name" or "name.inner" of its parameters; returns the submodule."""
    name, _, inner = path.partition(".")
    parent.add_module(name, nn.ModuleDict({inner: module}) if inner else module)
    return module


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

    folds, projection = (("conv1", "bn2"),), "shortcut.0"

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv(cout, cout, 3)
        same = stride == 1 and cin == cout
        self.project = () if same else (_register(self, self.projection, _conv(cin, cout, 1, stride)),)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.project[0](out) if self.project else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class WideBlock(PreActBlock):
    """WRN's block (dropout 0): a pre-activation block whose projection has another name."""

    projection = "convShortcut"


class CosineHead(nn.Module):
    """RoBal's classifier: scale * <f/|f|, w_c/(|w_c| + offset)> - prior_c, scale 1 and prior 0 while training."""

    def __init__(self, width, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-(width**-0.5), width**-0.5))
        self.offset, self.scale = 1 / 32 if num_classes <= 10 else 1 / 16, 1.0  # RoBal-R's two settings
        self.register_buffer("prior", torch.zeros(num_classes), persistent=False)

    def forward(self, features):
        weight = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.offset)
        return self.scale * F.normalize(features, dim=1) @ weight.T - self.prior


class Net(nn.Module):
    """3x3 stem, stages of blocks, global average pool, head: images float [N,3,H,W] in [0,1] -> float32 logits.

    stem: its channels; blocks: of each stage; widths: channels of the stages, all but the first of which halve the
    image; stage: their name; norms: names of the batch norm after the stem and of the one before the pool, or None;
    head_name, head: name and class of the head. Pool and head are float32 whatever the convolutions are: with bf16
    logits many samples would get no gradient at all.
    """

    def __init__(self, block, stem, blocks, widths, stage, norms, head_name, head, num_classes):
        super().__init__()
        self.conv1, self.stem_norm, self.last_norm, self.head_name = _conv(3, stem, 3), *norms, head_name
        self.folds = (("conv1", self.stem_norm),) if self.stem_norm else ()
        if self.stem_norm:
            self.add_module(self.stem_norm, nn.BatchNorm2d(stem))
        self.body, width = (), stem  # the stages, which are registered under their public names
        for i, channels in enumerate(widths, 1):
            made = [block(channels if j else width, channels, 2 if i > 1 and j == 0 else 1) for j in range(blocks)]
            self.body += (_register(self, stage.format(i), nn.Sequential(*made)),)
            width = channels
        if self.last_norm:
            self.add_module(self.last_norm, nn.BatchNorm2d(width))
        self.add_module(head_name, head(width, num_classes))

    @property
    def head(self):
        return getattr(self, self.head_name)

    def forward(self, x, with_features=False):
        """Logits [N,C], or with_features: (logits, pooled features [N,d]); all float32 (float64 for float64)."""
        out = self.conv1(x)
        if self.stem_norm:
            out = F.relu(getattr(self, self.stem_norm)(out))
        for stage in self.body:
            out = stage(out)
        if self.last_norm:
            out = F.relu(getattr(self, self.last_norm)(out))
        features = out.mean((2, 3), dtype=torch.promote_types(out.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(features)
        return (logits, features) if with_features else logits


# fmt: off
ARCHS = {  # block, stem, blocks, widths, name of a stage, names of the first and last batch norm, name of the head
    "resnet18":       (BasicBlock, 64, 2, (64, 128, 256, 512), "layer{}", ("bn1", None), "linear"),
    "preactresnet18": (PreActBlock, 64, 2, (64, 128, 256, 512), "layer{}", (None, "bn"), "linear"),
    "wrn34-10":       (WideBlock, 16, 5, (160, 320, 640), "block{}.layer", (None, "bn1"), "fc"),
    "resnet8":        (BasicBlock, 16, 1, (16, 32, 64), "layer{}", ("bn1", None), "linear"),
}
# fmt: on


def build_model(arch, num_classes, head="linear") -> nn.Module:
    """A freshly initialised Net of ARCHS, channels_last, no input normalisation inside.

    num_classes >= 2; head: 'linear' or 'cosine' (RoBal). Draws from torch's global generator: seed it, or wrap the call
    in torch.random.fork_rng. ValueError for an unknown name.
    """
    if arch not in ARCHS or head not in ("linear", "cosine") or num_classes < 2:
        raise ValueError(f"no {arch!r} with {head!r} head, {num_classes} classes; arch: {', '.join(ARCHS)}")
    net = Net(*ARCHS[arch], nn.Linear if head == "linear" else CosineHead, num_classes)
    if arch.startswith("wrn"):  # as published; the others keep PyTorch's initialisation
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
    return net.to(memory_format=torch.channels_last)


# ==========================================================================================================
# 5  Step: x_adv <- clip to [0,1] of clip to [x-eps, x+eps] of (x_adv + step_size * sign(grad))
# ==========================================================================================================


def pgd_step_reference(x_adv, grad, x, step_size, eps) -> torch.Tensor:
    """One L-inf PGD step in plain PyTorch: the truth that the kernel equals bit for bit.

    x_adv, x: float32 in [0,1], any shape; grad: that shape, any float dtype; step_size, eps: fractions of the pixel
    range. sign(0) and sign(NaN) are 0. Returns a new tensor.
    """
    sign = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
    moved = x_adv + step_size * sign
    projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return projected.clamp(0, 1)


if HAS_TRITON:

    @triton.jit
    def _pgd_step_kernel(
        x_adv_ptr, grad_ptr, x_ptr, low_ptr, n, step_size, eps, HAS_LOW: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        # All [n]: x_adv float32, overwritten; grad float32, bfloat16 or float16; x float32; low any float type, written
        # only if HAS_LOW
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

    x_adv, x: float32; grad: float32, bfloat16 or float16; out_low: None or one of those types; all of one shape, device
    and memory layout (contiguous or channels_last), of any size. A fused Triton kernel on CUDA, and on any device when
    TRITON_INTERPRET=1; else the reference. Returns x_adv. ValueError on a mismatch: the kernel walks memory, so that
    another layout would silently pair the wrong pixels.
    """
    tensors = {"x": x, "x_adv": x_adv, "grad": grad} | ({} if out_low is None else {"out_low": out_low})
    for name, t in tensors.items():
        if t.shape != x.shape or t.device != x.device or _dense_strides(t) != _dense_strides(x):
            ours, theirs = ((tuple(u.shape), u.stride(), str(u.device)) for u in (t, x))
            raise ValueError(f"{name} has shape, strides, device {ours}, x has {theirs}: they must be equal")
        if t.dtype not in AMP_DTYPE.values() or (name[0] == "x" and t.dtype != torch.float32):
            raise ValueError(f"{name} is {t.dtype}: x and x_adv must be float32, others float32, bf16, fp16")
    if HAS_TRITON and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        n, low = x.numel(), x_adv if out_low is None else out_low
        if n:
            with torch.cuda.device_of(x):
                kernel = _pgd_step_kernel[(triton.cdiv(n, STEP_BLOCK),)]
                kernel(x_adv, grad, x, low, n, step_size, eps, out_low is not None, STEP_BLOCK)
        return x_adv
    with torch.no_grad():
        x_adv.copy_(pgd_step_reference(x_adv, grad, x, step_size, eps))
    if out_low is not None:
        out_low.copy_(x_adv)
    return x_adv


def _dense_strides(t):
    """The strides of the sides longer than 1; ValueError where elements overlap or leave gaps."""
    expected, sides = 1, [(stride, side) for stride, side in zip(t.stride(), t.shape) if side > 1 and t.numel()]
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

    It follows its source when ``refresh`` is called, in place, so that compiled code and captured graphs, which
    ``speed_up`` adds for given batch sizes, see the new weights.
    """

    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.net, self.dtype = copy.deepcopy(model).eval().requires_grad_(False), dtype
        self.compiled, self.sizes, self.runners, self.capture = None, (), {}, None
        self.still = torch.zeros((), dtype=torch.bool, device=next(model.parameters()).device)  # see _ascend
        modules = dict(model.named_modules())
        folded, alone = {}, {}  # batch norms: the convolution that absorbs each; what stands for each other one
        for name, module in modules.items():
            for pair in getattr(module, "folds", ()):
                conv, norm = (f"{name}.{part}".lstrip(".") for part in pair)
                if norm in modules:
                    own = self.net.get_submodule(conv)
                    own.bias = nn.Parameter(own.weight.new_zeros(own.out_channels), requires_grad=False)
                    self.net.set_submodule(norm, nn.Identity())
                    folded[norm] = conv
        for name, module in modules.items():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in folded:
                alone[name] = ChannelAffine(module)
                self.net.set_submodule(name, alone[name])
            elif isinstance(module, nn.Conv2d):
                self.net.get_submodule(name).to(dtype)
        taken = {*folded, *folded.values(), *alone}
        rest = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] not in taken}
        # what `refresh` reads, and where it goes
        self.convs, self.rest = [modules[conv] for conv in folded.values()], list(rest.values())
        self.norms = [modules[norm] for norm in (*folded, *alone)]
        own = [self.net.get_submodule(conv) for conv in folded.values()]
        self.targets = [conv.weight for conv in own] + [conv.bias for conv in own]
        self.targets += [affine.scale for affine in alone.values()] + [affine.shift for affine in alone.values()]
        self.targets += [self.net.get_parameter(name) for name in rest]
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Take over the source's present weights and running statistics: w' = w s, b' = beta - mean s, with s = weight
        / sqrt(var + eps), for all layers in a handful of multi-tensor operations."""
        scale = torch._foreach_add([norm.running_var for norm in self.norms], self.norms[0].eps)
        torch._foreach_sqrt_(scale)
        scale = torch._foreach_div([norm.weight for norm in self.norms], scale)
        shift = torch._foreach_mul([norm.running_mean for norm in self.norms], scale)
        shift = torch._foreach_sub([norm.bias for norm in self.norms], shift)
        k = len(self.convs)
        sources = [conv.weight * s.view(-1, 1, 1, 1) for conv, s in zip(self.convs, scale)] + list(shift[:k])
        sources += [s.view(-1, 1, 1) for s in (*scale[k:], *shift[k:])] + self.rest
        for kind in {t.dtype for t in self.targets}:  # a mixed list would lose the fused path
            pairs = [(t, v) for t, v in zip(self.targets, sources, strict=True) if t.dtype == kind]
            torch._foreach_copy_(*map(list, zip(*pairs)))
        return self

    def train(self, mode=True):
        """Stays in eval mode whatever its owner does."""
        return super().train(False)

    def speed_up(self, *sizes):
        """Compile the forward for batches of these sizes; on CUDA also capture whole attacks as graphs."""
        self.compiled, self.sizes = torch.compile(self.net, dynamic=False), sizes
        self.capture = capture_cuda_graph if self.still.is_cuda else None
        return self

    def runner(self, *settings):
        """What ascends with these settings (see _ascend): a GraphRunner where graphs are to be had."""
        fn = functools.partial(_ascend, self, *settings)
        return self.runners.setdefault(settings, GraphRunner(fn, self.capture)) if self.capture else fn

    def forward(self, x):
        net = self.compiled if len(x) in self.sizes else self.net
        if x.is_cpu and len(x) > CPU_CHUNK and not torch.is_grad_enabled():
            return torch.cat([net(part.to(self.dtype)) for part in x.split(CPU_CHUNK)])
        return net(x.to(self.dtype))


def capture_cuda_graph(fn, inputs):
    """Warm fn up and capture fn(*inputs) as a CUDA graph -> (what replays it, its result)."""
    device = inputs[0].device if inputs else torch.cuda.current_device()
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fn(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        # NCCL's own thread may call CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local" if WORLD > 1 else "global"):
            result = fn(*inputs)
    return graph.replay, result


class GraphRunner:
    """fn(*tensors) replayed on static buffers: one launch in the place of hundreds.

    The first call's shapes are captured, and those of a later call with more in its first tensor (a run may go on with
    an epoch's last, smaller batch); calls of these shapes copy their tensors into the buffers and replay, others go to
    fn itself. The result is valid until the next call. capture(fn, buffers) -> (replay, result).
    """

    def __init__(self, fn, capture):
        self.fn, self.capture, self.key, self.buffers = fn, capture, None, [torch.empty(0)]

    def __call__(self, *inputs):
        key = [(t.shape, t.dtype, t.stride()) for t in inputs]
        if inputs[0].numel() > self.buffers[0].numel():
            self.key, self.buffers = key, [t.clone() for t in inputs]
            self.replay, self.result = self.capture(self.fn, self.buffers)
        elif key != self.key:
            return self.fn(*inputs)
        torch._foreach_copy_(self.buffers, list(inputs))
        self.replay()
        return self.result


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
    if torch.is_inference_mode_enabled():
        raise ValueError("an attack needs gradients: call it outside torch.inference_mode()")
    if not torch.is_tensor(x) or x.ndim != 4 or x.dtype not in dtypes:
        said = f"{x.dtype} {list(x.shape)}" if torch.is_tensor(x) else type(x)
        raise ValueError(f"x must be {dtypes[0]} NCHW, got {said}")
    if not torch.is_tensor(y) or y.dtype != torch.int64 or y.shape != x.shape[:1] or y.device != x.device:
        said = f"{y.dtype} {list(y.shape)} on {y.device}" if torch.is_tensor(y) else type(y)
        raise ValueError(f"y must be int64 [{len(x)}] on {x.device}, got {said}")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):  # a NaN fails both
        raise ValueError(f"x spans [{x.min():g}, {x.max():g}]: images must lie in [0,1]; divide by 255?")


def pgd_attack(
    model, x, y, *, eps, step_size, steps, init="uniform", objective=None, aux=None, generator=None
) -> torch.Tensor:
    """L-inf PGD (Madry et al. 2018): signed gradient ascent of `objective` inside the eps-ball and [0,1].

    model: any nn.Module with inputs in [0,1], run in eval mode and left as it was (mode, buffers, gradients); a Net is
    replaced by its FrozenCopy, a FrozenCopy taken as it is. x: float32 [N,C,H,W] in [0,1]; y: int64 [N]; eps,
    step_size: fractions of the pixel range, in [0,1]; steps >= 0. init: 'uniform' U(-eps,eps), 'gauss' 0.001*N(0,1) as
    in TRADES, 'none', or the noise itself, a tensor like x; the start is clipped to the ball and to [0,1].
    objective(logits, y, aux) -> scalar, default mean cross-entropy. generator: of the start noise, on x's device.
    Returns the last iterate, detached. ValueError for input outside these ranges.
    """
    noise = init if torch.is_tensor(init) and init.shape == x.shape and init.dtype == torch.float32 else None
    known = noise is not None or (isinstance(init, str) and init in ("uniform", "gauss", "none"))
    if not (0 <= eps <= 1 and 0 <= step_size <= 1 and steps >= 0 and known):
        given = f"eps {eps}, step_size {step_size}, steps {steps}, init {init if isinstance(init, str) else type(init)}"
        raise ValueError(f"{given}: want eps, step_size in [0,1] (divide by 255?), init uniform, gauss, none or noise")
    context = contextlib.nullcontext(model)  # a FrozenCopy, the training loop's way in: nothing to check or protect
    if not isinstance(model, FrozenCopy):
        check_images(x, y)
        x = torch.empty_like(x).copy_(x)  # a view with gaps becomes a dense tensor
        context = eval_mode(FrozenCopy(model) if isinstance(model, Net) else model)
    x, noise = x.detach(), start_noise(x, init, eps, generator) if noise is None else noise
    start = pgd_step_reference(x + noise, torch.zeros_like(x), x, 0.0, eps)
    with context as forward:
        settings = (objective or cross_entropy_objective, eps, step_size, steps)
        frozen = isinstance(forward, FrozenCopy)
        ascend = forward.runner(*settings) if frozen else functools.partial(_ascend, forward, *settings)
        return ascend(x, y, start, *([] if aux is None else [aux]))


def start_noise(x, init, eps, generator):
    """pgd_attack's start noise for float32 images x, a tensor like it; init and generator as there."""
    noise = torch.zeros_like(x)
    if init == "uniform":
        return noise.uniform_(-eps, eps, generator=generator)
    return noise if init == "none" else noise.normal_(0, 1e-3, generator=generator)


def _ascend(forward, objective, eps, step_size, steps, x, y, start, aux=None):
    """The attack's steps from `start`; forward: images in its own `dtype` (default float32) -> float32 logits."""
    dtype, x_adv = getattr(forward, "dtype", torch.float32), start.clone()
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
    if isinstance(forward, FrozenCopy):  # has no pixel of the batch moved?
        forward.still.copy_((x_adv == start).all())
    return x_adv


# ==========================================================================================================
# 7  Methods
# ==========================================================================================================


def _checked(*tensors):
    """Logits or features of one shape [N,C] -> the same in float32 at least: 1e-12 and counts need its range."""
    if len({t.shape for t in tensors}) > 1 or tensors[0].ndim != 2:
        raise ValueError(f"want tensors of one shape [N,C], got {', '.join(str(list(t.shape)) for t in tensors)}")
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _class_counts(counts, like, classes):
    """Training images per class as a tensor [classes] like `like`; ValueError for another length or, where reading them
    costs no synchronisation, a count below 1."""
    counts = torch.as_tensor(counts)
    if list(counts.shape) != [classes] or not (counts.is_cuda or (counts >= 1).all()):
        said = f"{counts.tolist()}" if counts.numel() < 12 else f"shape {list(counts.shape)}"
        raise ValueError(f"counts {said}: want {classes} numbers of at least 1, a count for each class")
    return counts.to(like)


def balanced_softmax_loss(logits, y, counts, tau=1.0) -> torch.Tensor:
    """Mean of -log softmax(z + b)[y] with b_c = tau ln n_c (eq. 1; Ren et al. 2020).

    logits: float [N,C]; y: int64 [N]; counts: training images per class, C values >= 1. Uniform counts or tau 0 give
    plain cross-entropy. Returns a scalar; ValueError for counts of another length or below 1.
    """
    (logits,) = _checked(logits)
    return F.cross_entropy(logits + tau * _class_counts(counts, logits, logits.shape[1]).log(), y)


def igdm_loss(student_plus, student_minus, teacher_plus, teacher_minus) -> torch.Tensor:
    """Indirect gradient distillation: mean KL(softmax(T+ - T-) || softmax(S+ - S-)) (Lee et al. 2023).

    Arguments: float logits [N,C] of student and teacher at x+d (plus) and x-d (minus), d = x'-x: differences of logits
    stand for input gradients. The teacher's are detached; temperature 1. Returns a scalar >= 0; ValueError for unlike
    shapes.
    """
    _checked(student_plus, student_minus, teacher_plus, teacher_minus)
    return distillation_loss(student_plus - student_minus, teacher_plus - teacher_minus)


def distillation_loss(student, teacher) -> torch.Tensor:
    """Mean KL(softmax(teacher) || softmax(student)); float logits [N,C], the teacher's detached."""
    student, teacher = _checked(student, teacher)
    target = F.log_softmax(teacher.detach(), 1)
    return F.kl_div(F.log_softmax(student, 1), target, reduction="batchmean", log_target=True)


def trades_loss(logits, logits_adv, y, beta=6.0) -> torch.Tensor:
    """Mean CE(z(x), y) + beta * mean KL(p(x) || p(x')) (TRADES, Zhang et al. 2019); both sides carry gradient.

    logits, logits_adv: float [N,C] at x and x'; y: int64 [N]. beta 0 is cross-entropy. Returns a scalar; ValueError for
    unlike shapes.
    """
    logits, logits_adv = _checked(logits, logits_adv)
    clean, adv = F.log_softmax(logits, 1), F.log_softmax(logits_adv, 1)
    return F.cross_entropy(logits, y) + beta * F.kl_div(adv, clean, reduction="batchmean", log_target=True)


def mart_loss(logits, logits_adv, y, beta=6.0) -> torch.Tensor:
    """MART (Wang et al. 2020): boosted cross-entropy at x' plus a KL weighted by how unsure the network is of x,
    mean[CE(z(x'), y) - ln(1.0001 - p_k(x') + 1e-12)] + beta * mean[KL(p(x) || p(x')) * (1.0000001 - p_y(x))].

    k: the most probable class of x' but y; the KL takes ln(p(x') + 1e-12). Arguments as in trades_loss.
    """
    logits, logits_adv = _checked(logits, logits_adv)
    clean, adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
    rival = adv.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(logits_adv, y) - (1.0001 - rival + 1e-12).log().mean()
    divergence = F.kl_div((adv + 1e-12).log(), clean, reduction="none").sum(1)
    return boosted + beta * (divergence * (1.0000001 - clean.gather(1, y[:, None])[:, 0])).mean()


def robal_loss(scores, scores_adv, y, counts, *, scale, margin, tau_b, tau_m, beta) -> torch.Tensor:
    """RoBal (Wu et al. 2021): CE of scale*(s(x') - m_y 1_y) + tau_b ln(n/N) plus beta * mean KL(p(x) || p(x')).

    scores, scores_adv: cosine scores [N,C] at x and x'; m_c = margin + tau_m/scale * ln(n_c/n_min), larger for frequent
    classes. The KL's softmaxes are of the unscaled scores, with ln(p(x') + 1e-12) and no detaching.
    """
    scores, scores_adv = _checked(scores, scores_adv)
    counts = _class_counts(counts, scores, scores.shape[1])
    margins = margin + tau_m / scale * (counts / counts.min()).log()
    shifted = scores_adv - margins * F.one_hot(y, len(counts))
    fit = F.cross_entropy(scale * shifted + tau_b * (counts / counts.sum()).log(), y)
    floor = (F.softmax(scores_adv, 1) + 1e-12).log()
    return fit + beta * F.kl_div(floor, F.softmax(scores, 1), reduction="batchmean")


def reat_class_weights(counts, predicted) -> torch.Tensor:
    """REAT's weights in its attack: w_c ~ 1 / (E_c + 1e-5), E_c = (1 - b^a)/(1 - b), b = (n_c - 1)/n_c, sum C.

    counts: training images n_c >= 1; predicted: a_c, how often the network predicted the class at x' in the epoch
    before. float64 inside, since 1 - b^a cancels. Returns float32 [C] (effective numbers, Cui et al. 2019).
    """
    n, a = (torch.as_tensor(t).double() for t in (counts, predicted))
    if n.shape != a.shape:
        raise ValueError(f"{list(n.shape)} counts, {list(a.shape)} predicted: want one of each for each class")
    b = (n - 1) / n
    weights = 1 / ((1 - b**a) * n + 1e-5)
    return (weights * len(n) / weights.sum()).float()


def reat_tail_loss(features, y, counts, variant="official") -> torch.Tensor:
    """REAT's tail term (Li et al. 2023): for each sample i of the tail third of the classes, over all j of the batch,
    s_ij W_ij KL(softmax f_i || softmax f_j), s = -1 within a class and +1 between, W = u_yi + u_yj, u_c = sqrt(N/n_c),
    f_i detached; mean over j and anchors; 0 without a tail sample.

    features: float [B,d]; y: int64 [B]. 'intended' is that; 'official' what the released code computes: its criterion
    averages over B and d before the signs and weights come in, so that one number per anchor remains. ValueError for
    another variant or unlike sizes.
    """
    (features,), counts = _checked(features), torch.as_tensor(counts)
    if variant not in ("official", "intended") or y.shape != features.shape[:1]:
        raise ValueError(
            f"variant {variant!r}, y {list(y.shape)}: want 'official' or 'intended', a label a feature row"
        )
    counts = _class_counts(counts, features, len(counts))
    log_p, u = F.log_softmax(features, 1), (counts.sum() / counts).sqrt()[y]
    target, is_tail = log_p.detach(), (y > 2 * (len(counts) // 3)).to(features.dtype)
    with torch.autocast(features.device.type, enabled=False):  # a bf16 product would drown the difference
        divergence = (target.exp() * target).sum(1)[:, None] - target.exp() @ log_p.T  # [i,j] = KL(i || j)
    sign = 1 - 2 * (y[:, None] == y[None]).to(features.dtype)
    weighted = sign * (u[:, None] + u[None])
    if variant == "official":
        per_anchor = divergence.mean(1) / features.shape[1] * weighted.mean(1)
    else:
        per_anchor = (weighted * divergence).mean(1)
    return (per_anchor * is_tail).sum() / is_tail.sum().clamp_min(1)


@contextlib.contextmanager
def awp_perturbation(model, loss_fn, gamma):
    """AWP (Wu et al. 2020): inside, every weight tensor w with more than one dimension is w + v, with v = gamma |w|
    g/|g| and g the gradient of loss_fn() at w; afterwards v is subtracted again.

    gamma 0 does nothing at all. The ascent's own forward leaves the model's buffers as they were. Frozen and unused
    weights stay; v is 0 where g is not finite, since NaN could not be subtracted again. Under torchrun g is the sum
    over the ranks.
    """
    if not gamma:
        yield
        return
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and p.requires_grad]
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        gradients = torch.autograd.grad(loss_fn(), [p for _, p in named], allow_unused=True)
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
    weights = [p for (_, p), g in zip(named, gradients, strict=True) if g is not None]
    gradients = [g for g in gradients if g is not None]
    if WORLD > 1:
        gradients = [g.contiguous() for g in gradients]
        for g in gradients:
            dist.all_reduce(g)
    ratios = [gamma * w.detach().norm() / (g.norm() + 1e-20) for w, g in zip(weights, gradients, strict=True)]
    steps = [step.nan_to_num_(0, 0, 0) for step in torch._foreach_mul(gradients, ratios)]
    with torch.no_grad():
        torch._foreach_add_(weights, steps)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(weights, steps)


@dataclass
class Batch:
    """What an outer loss may look at; `student` is in train mode, `teacher` maps images to logits, no gradient."""

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


def _trades(b, loss=trades_loss):
    logits, logits_adv = b.student(b.x), b.student(b.x_adv)
    return loss(logits, logits_adv, b.y, b.cfg.beta), logits_adv


def _mart(b):
    return _trades(b, mart_loss)


def robal_constants(num_classes) -> dict:
    """RoBal-R's published constants: its CIFAR-10 row up to 10 classes, its CIFAR-100 row beyond."""
    few = dict(scale=10.0, margin=0.1, tau_b=1.5, tau_m=0.3)
    return few if num_classes <= 10 else dict(scale=10.0, margin=0.3, tau_b=0.0, tau_m=0.0)


def with_evaluation_head(model, counts, tau_p=1.7) -> nn.Module:
    """A copy of a RoBal network with its post-hoc head: 10 * scores - tau_p ln(n_c/N), beyond 10 classes only.

    Any other network is returned as it is.
    """
    if not isinstance(model.head, CosineHead) or len(counts) <= 10:
        return model
    model, counts = copy.deepcopy(model), torch.as_tensor(counts, dtype=torch.float32)
    model.head.scale = 10.0
    model.head.prior.copy_(tau_p * (counts / counts.sum()).log())
    return model


def _robal(b):
    scores, scores_adv = b.student(b.x), b.student(b.x_adv)
    return robal_loss(scores, scores_adv, b.y, b.counts, **robal_constants(len(b.counts)), beta=b.cfg.beta), scores_adv


def _reat(b):
    logits, features = b.student(b.x_adv, with_features=True)
    tail = reat_tail_loss(features, b.y, b.counts, b.cfg.reat_tail)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau) + tail, logits


def _at_bsl(b):
    logits = b.student(b.x_adv)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau), logits


def _ltsd(b):
    """The paper: balanced softmax at x' plus alpha times the distillation from the balanced self-teacher."""
    logits = b.student(b.x_adv)
    if b.cfg.kd == "kl":
        distillation = distillation_loss(logits, b.teacher(b.x_adv))
    else:
        minus = 2 * b.x - b.x_adv  # x - d, not clipped, as in IGDM's code
        teacher_plus, teacher_minus = b.teacher(torch.cat([b.x_adv, minus])).chunk(2)
        distillation = igdm_loss(logits, b.student(minus), teacher_plus, teacher_minus)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau) + b.alpha * distillation, logits


def kl_objective(logits, y, aux):
    """Mean KL(p(x) || p(x')), what TRADES' attack ascends; aux: log p(x), [N,C]."""
    return F.kl_div(F.log_softmax(logits, 1), aux, reduction="batchmean", log_target=True)


def weighted_objective(logits, y, aux):
    """Class-weighted cross-entropy, what REAT's attack ascends; aux: weights [C]. With eval-mode batch norm each
    image's gradient is only scaled, so that its sign steps are those of plain cross-entropy."""
    return F.cross_entropy(logits, y, weight=aux)


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    loss: Callable  # Batch -> (scalar, logits at x')
    objective: Callable | None  # what the training attack ascends; None: no attack, x' = x
    init: str  # where it starts
    forwards: int  # train-mode forwards of the loss, for the time estimate
    aux: Callable = lambda frozen, x, counts, predicted: None  # -> the objective's third argument
    head: str = "linear"
    awp: float = 0.0  # gamma of the weight perturbation around the step
    teacher: bool = False  # needs the self-teacher
    low_precision: bool = True  # may the attack's convolutions be bf16 or fp16?
    official: dict = field(default_factory=dict)  # the method's own published settings ...
    official_data: tuple = ()  # ... and the data sets they were published for


def _clean_log_p(frozen, x, counts, predicted):
    with torch.no_grad():
        return F.log_softmax(frozen(x), 1)


# Published settings: robust_overfitting (pgd-at), the methods' own repositories (others). RoBal with the step
# decay at 60 and 75 of its configuration files, not the compounding one that its released code runs.
# fmt: off
CE, LT = cross_entropy_objective, ("cifar10", "cifar100")
METHODS = {
    "natural": Method(_pgd_at, None, "none", 1),
    "pgd-at":  Method(_pgd_at, CE, "uniform", 1, official_data=LT, official=dict(epochs=200, milestones="0.5,0.75")),
    # in bf16 TRADES' attack loses 6 % of its strength: next to x its gradient is small against the rounding
    "trades":  Method(_trades, kl_objective, "gauss", 2, _clean_log_p, low_precision=False, official_data=("cifar10",),
                      official=dict(epochs=76, milestones=f"{74 / 76}", weight_decay=2e-4)),
    "mart":    Method(_mart, CE, "gauss", 2, official_data=("cifar10",),
                      official=dict(epochs=120, milestones=f"{74 / 120},{89 / 120},{99 / 120}", lr=0.01,
                                    weight_decay=3.5e-3, beta=5.0)),
    "awp":     Method(_pgd_at, CE, "uniform", 1, awp=0.01, official_data=LT,
                      official=dict(epochs=200, milestones="0.5,0.75")),
    "robal":   Method(_robal, CE, "gauss", 2, head="cosine", official_data=LT,
                      official=dict(epochs=80, milestones="0.75,0.9375", batch_size=64, weight_decay=2e-4)),
    "reat":    Method(_reat, weighted_objective, "uniform", 1, lambda frozen, x, *known: reat_class_weights(*known),
                      official_data=LT, official=dict(epochs=80, milestones="0.75,0.9375")),
    "at-bsl":  Method(_at_bsl, CE, "gauss", 1, official_data=(*LT, "tinyimagenet"),
                      official=dict(milestones="0.74,0.89,0.99")),
    "ltsd":    Method(_ltsd, CE, "gauss", 2, teacher=True, official_data=(*LT, "tinyimagenet")),
}
# fmt: on


# ==========================================================================================================
# 8  Training
# ==========================================================================================================


def lr_at(epoch, epochs, lr, milestones=(0.75, 0.9)) -> float:
    """The learning rate of an epoch (1 .. epochs): lr, a tenth of it after each milestone, a share of the epochs."""
    return lr * 0.1 ** sum(epoch > round(share * epochs, 6) for share in milestones)


def selection_starts(epochs):
    """The first epoch whose weights may become 'best': the choice is among the last ceil(epochs/4)."""
    return epochs - math.ceil(epochs / 4) + 1


def write_atomic(path, content, unique="", rank=0):
    """Write text, bytes, or what torch.save takes, so that readers and crashes see the old file or the new one. unique:
    what tells apart programs that may write the file at the same time; rank: which process of a group writes."""
    if rank != RANK:
        return
    path, content = pathlib.Path(path), content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{path.name}.tmp{unique}")  # always the same: what a killed process leaves is reused
    if not isinstance(content, bytes):
        data = io.BytesIO()
        torch.save(content, data)  # not to the file: torch would hide why a write has failed
        content = data.getbuffer()
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def unwritable(path, error):
    """The UserError for an OSError on writing."""
    remedy = "free some space and repeat the same command, what was saved before is whole; or try another --out"
    if isinstance(error, (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)):
        remedy = "check this path and the rights to it, or try another --out"
    return UserError(f"cannot write {path} ({error.strerror}): {remedy}")


def read_checkpoint(path):
    """A file of tensors and plain values; UserError where it is missing, damaged, foreign or holds code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle, beside our one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # torch and pickle raise many kinds on a damaged file
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or no checkpoint ({kind}): remove it or name another") from error


def load_weights(model, path):
    """Load a checkpoint, ours or one of TRADES, AT-BSL and kin, into a Net; returns its epoch or None.

    Accepts a bare state_dict or one under 'state_dict', 'model' or 'net', prefixes 'module.' and '_orig_mod.', and the
    unused 'sub_block1' of public WRNs. UserError where names or shapes do not fit, or weights are not finite.
    """
    saved = read_checkpoint(path)
    weights = saved if isinstance(saved, dict) else {None: None}
    inner = [weights[k] for k in ("state_dict", "model", "net") if isinstance(weights.get(k), dict)]
    weights = (inner or [weights])[0]
    if not all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items()):
        raise UserError(f"{path} holds no state_dict: want one, bare or under 'state_dict', 'model' or 'net'")
    weights = {k.replace("module.", "").replace("_orig_mod.", ""): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.startswith("sub_block1")}
    own = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked") or k in weights}
    wrong = sorted(own.keys() ^ weights.keys())
    both = [(k, v, weights[k]) for k, v in own.items() if k in weights]
    wrong += [k for k, a, b in both if a.shape != b.shape or a.is_floating_point() != b.is_floating_point()]
    if wrong:
        many = f"{len(wrong)} names or shapes differ, the first is {wrong[0]}"
        raise UserError(f"{path} does not fit the network ({many}): check --arch, --data and --method")
    if not all(v.isfinite().all() for v in weights.values()):
        raise UserError(f"{path} holds NaN or infinite weights, of a training that diverged: name another")
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
        passes = 3 * row.forwards * (2 if row.awp else 1) + (2 if row.teacher else 0)
        return passes + (3 * steps if row.objective else 0)


def to_float(images_u8):
    """uint8 NCHW -> float32 in [0,1], channels_last."""
    return images_u8.to(torch.float32, memory_format=torch.channels_last).div_(255)


def train(cfg, phase, data, run, teacher=None) -> nn.Module:
    """Train a Net as `phase` and `cfg` say, going on from the run's state.pt where that belongs to this phase.

    data: Data on the training device; run: Run; teacher: images -> logits. Saves state.pt after every epoch and best.pt
    at every new best; one process also in the middle of an epoch for a signal, and before an epoch that may become the
    best is evaluated. UserError when the loss is no longer finite or no attack moves; the last complete epoch stays.

    Under torchrun every rank takes its share of the very batches, augmentation and noise that one process would draw,
    and a step's gradient is the mean over the whole batch. What differs: without sync_bn batch statistics are a
    share's, and so are terms that are no mean over samples (the pairs and the normaliser of REAT's tail term).
    """
    row, device = METHODS[phase.method], data.train_images.device
    model, optimizer, scaler, streams, at = _start(cfg, phase, data, run, device)
    student, frozen, exact = _fast_versions(cfg, phase, model)
    counts = torch.tensor(phase.counts, dtype=torch.float32, device=device)
    predicted = at["predicted"].to(device)  # per class, in the epoch before; the counts in the first
    threat = dict(eps=cfg.eps / 255, step_size=cfg.step_size / 255, steps=cfg.steps, objective=row.objective)
    meant = all(threat.values())  # to move pixels, that is
    milestones = [float(share) for share in cfg.milestones.split(",")]
    steps = math.ceil(len(phase.indices) / phase.batch_size)

    def save(order, **changes):  # order: that stream as the epoch to go on with finds it
        saved = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        generators = dict(order=order, noise=streams["noise"].get_state())
        run.save_state(dict(at, phase=phase.name, generators=generators, indices=phase.indices, **saved) | changes)

    for epoch in range(at["epoch"] + 1, phase.epochs + 1):
        begun, selecting = streams["order"].get_state(), phase.select and epoch >= selection_starts(phase.epochs)
        watch, lr = Watch(device, phase, epoch, steps, at["middle"]), lr_at(epoch, phase.epochs, cfg.lr, milestones)
        first = watch.step  # not 0 where a signal has ended this epoch before
        for group in optimizer.param_groups:
            group["lr"] = lr
        order = phase.indices[torch.randperm(len(phase.indices), generator=streams["order"])].to(device)
        images = augment(data.train_images[order], cfg.aug, streams["order"])
        labels = data.train_labels[order]
        SIGNALS.wait = WORLD == 1 and first < steps
        for i in range(first, steps):
            part = slice(i * phase.batch_size, (i + 1) * phase.batch_size)
            whole = to_float(images[part])
            rows, weight = share(len(whole))
            x, y = whole[rows].contiguous(memory_format=torch.channels_last), labels[part][rows]
            frozen.refresh()
            aux, x_adv = row.aux(frozen, x, counts, predicted), x
            if row.objective:
                noise = start_noise(whole, row.init, threat["eps"], streams["noise"])[rows]
                x_adv = pgd_attack(frozen, x, y, aux=aux, init=noise, **threat)
            if i == first:
                gather(None)  # wait here for who compiles, captures or writes files, not a minute inside the step
            batch = Batch(student, x, x_adv, y, counts, cfg, cfg.alpha * epoch / phase.epochs, teacher)
            loss, logits = _outer_step(row, batch, model, optimizer, scaler, weight)
            seen = len(y) if weight else 0
            watch.add(i, loss, logits[:seen], y[:seen], frozen.still & meant)
            run.estimate(phase, i, len(whole))
            if WORLD == 1 and (SIGNALS.number or (selecting and i + 1 == steps)):  # selection must not cost the epoch
                save(begun, middle=watch.state())
                SIGNALS.here(f" after {phase.name}, epoch {epoch}, step {i + 1}")
        mean_loss, accuracy = watch.read()
        at["seconds"] += time.perf_counter() - watch.began
        at |= dict(epoch=epoch, predicted=sum(gather(watch.predicted.cpu())), middle={})
        predicted = watch.predicted = at["predicted"].to(device)
        line = f"{phase.name} {epoch:>4}/{phase.epochs:<4} lr {lr:<7.2g} loss {mean_loss:8.4f}"
        line += f"  train {accuracy:6.2f}  {at['seconds'] / epoch:7.1f} s/epoch"
        if selecting:
            line += _select(cfg, phase, data, run, model, epoch, at, (frozen, exact))
        at["dull"] += int(watch.at_chance())
        if at["dull"] == epoch == math.ceil(phase.epochs / 4) > 1:
            line += f"\nwarning: {phase.name} has only guessed up to epoch {epoch}, its first quarter: try a lower --lr"
        save(streams["order"].get_state(), row=line)
        run.log(line)  # a row in the log is an epoch on the disk
    run.set_seconds(phase.name, at["seconds"])
    SIGNALS.here()
    frozen.runners.clear()  # they point back at their network: let go of the graphs' memory now
    return model


def _fast_versions(cfg, phase, model):
    """(student, frozen, exact): the network as the outer loss calls it, its copy for the training attack, and its
    float32 copy. The model itself stays as it is: what is saved has no trace of the compiler."""
    frozen = FrozenCopy(model, AMP_DTYPE[cfg.amp] if METHODS[phase.method].low_precision else torch.float32)
    exact, student = FrozenCopy(model), model
    if cfg.compile == "on":
        student = model if cfg.sync_bn else torch.compile(model, dynamic=False)  # its collectives stay eager
        frozen.speed_up(len(range(RANK, phase.batch_size, WORLD)), EVAL_BATCH)
        exact.speed_up(EVAL_BATCH)
    if WORLD > 1:
        student = nn.parallel.DistributedDataParallel(student)
        student.broadcast_buffers = False  # a second forward would begin with rank 0's; average_buffers ends the step
    return student, frozen, exact


def _outer_step(row, batch, model, optimizer, scaler, weight=1.0):
    """The optimiser's step on a batch whose mean loss counts `weight`; returns (loss, logits at x'), detached."""
    amp = batch.cfg.amp
    outer = torch.autocast(batch.x.device.type, AMP_DTYPE[amp], enabled=amp != "off")(row.loss)
    model.train()
    ascent = weight * (128 if amp == "fp16" else 1)  # only the direction counts, and fp16 needs it larger
    with awp_perturbation(model, lambda: outer(batch)[0] * ascent, row.awp):
        loss, logits = outer(batch)
        optimizer.zero_grad()
        scaler.scale(loss * weight).backward()
        scaler.step(optimizer)
        scaler.update()
    average_buffers(model)
    return loss.detach(), logits.detach()


def average_buffers(model):
    """Under torchrun, give every rank the ranks' mean of the running statistics, so that all attack one network."""
    if WORLD > 1:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        flat = torch.cat([buffer.flatten() for buffer in buffers]) / WORLD
        dist.all_reduce(flat)
        parts = flat.split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers)])


def _start(cfg, phase, data, run, device):
    """Network, optimiser, loss scaler, random streams and where training stands, fresh or from state.pt."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(cfg.seed, phase.name, "weights"))
        model = build_model(cfg.arch, len(data.classes), METHODS[phase.method].head).to(device)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn else model
    # a skipped fp16 step would leave fused momentum unset; unfused, its scaler reads the device in every step
    fused = device.type == "cuda" and cfg.amp != "fp16"
    options = dict(momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=fused)
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, **options)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.amp == "fp16")
    places = {"order": "cpu", "noise": device}
    streams = {k: torch.Generator(v).manual_seed(derive_seed(cfg.seed, phase.name, k)) for k, v in places.items()}
    counts = torch.tensor(phase.counts, dtype=torch.float64)
    at = {"epoch": 0, "best": None, "seconds": 0.0, "predicted": counts}  # after the epochs that are complete
    at |= {"dull": 0, "row": "", "middle": {}}  # epochs at chance, last line of the log, a begun epoch's Watch
    state = run.load_state(phase.name)
    if state:
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            for name, generator in streams.items():
                generator.set_state(state["generators"][name])
            state["predicted"].expand_as(counts), state["indices"].expand_as(phase.indices)  # of the same shape?
            [s.get("momentum_buffer", p).expand_as(p) for p, s in optimizer.state.items()]
            phase.indices, at = state["indices"], {k: state[k] for k in at}
        except Exception as error:  # many kinds; a generator's is another kind of device
            said = f"{run.path / 'state.pt'} does not fit this run or device ({type(error).__name__})"
            raise UserError(f"{said}: go on where it was begun, or --overwrite it") from error
        if at["row"] not in (run.path / "log.txt").read_text(encoding="utf-8"):  # killed between the two
            run.log(at["row"])
        step = at["middle"].get("step", 0)
        run.log(f"{phase.name}: going on after epoch {at['epoch']} of {phase.epochs} and {step} steps")
    return model, optimizer, scaler, streams, at


def _select(cfg, phase, data, run, model, epoch, at, nets):
    """Evaluate on the test set and save a strictly better model as best.pt; returns the row's last columns."""
    rule = "pgd" if METHODS[phase.method].objective else "clean"
    scored = with_evaluation_head(model, phase.counts)
    nets = tuple(net.refresh() for net in nets) if scored is model else None
    threat = dict(eps=cfg.eps / 255, seed=cfg.seed, amp=cfg.amp, nets=nets)
    result = evaluate(scored, data.test_images, data.test_labels, tail=data.tail, **threat)
    better = at["best"] is None or result[rule] > at["best"]["score"]
    if better:
        at["best"] = {"epoch": epoch, "score": result[rule]}
        run.save_model("best", model, epoch)
    return f"  test clean {result['clean']:6.2f}  pgd {result['pgd']:6.2f}" + ("  *" if better else "")


class Watch:
    """An epoch's loss, accuracy and predictions, kept on the device and read every SYNC_EVERY steps."""

    def __init__(self, device, phase, epoch, steps, middle):
        # loss, correct, seen, first bad step + 1, attacks that moved nothing; then how often each class is predicted
        now = dict(step=0, seconds=0.0, total=torch.zeros(5), predicted=torch.zeros(len(phase.counts))) | middle
        self.total, self.predicted = (now[k].to(device, torch.float64) * (RANK == 0) for k in ("total", "predicted"))
        self.phase, self.epoch, self.steps, self.step = phase, epoch, steps, now["step"]
        self.began = time.perf_counter() - now["seconds"]

    def state(self):
        """What an epoch that ends here goes on from, once it is known that all is well."""
        self.read()
        spent = time.perf_counter() - self.began
        return dict(step=self.step, total=self.total.cpu(), predicted=self.predicted.cpu(), seconds=spent)

    def add(self, step, loss, logits, y, still):
        self.step = step + 1
        first_bad = (~torch.isfinite(loss) & (self.total[3] == 0)) * (step + 1.0)
        guess, seen = logits.argmax(1), torch.full_like(loss, len(y))
        self.predicted.index_add_(0, guess, torch.ones_like(guess, dtype=torch.float64))
        self.total += torch.stack([loss * seen, (guess == y).sum(), seen, first_bad, still])
        if (step + 1) % SYNC_EVERY == 0:
            loss, _ = self.read()
            if sys.stderr.isatty() and not RANK:
                spent = time.perf_counter() - self.began
                ahead = (self.phase.epochs - self.epoch + 1) * self.steps
                eta, rate = hms(spent / (step + 1) * (ahead - step - 1)), (step + 1) * len(y) * WORLD / spent
                line = f"{self.phase.name} {self.epoch}/{self.phase.epochs} loss {loss:.3f}  {rate:.0f} img/s"
                print(f"{line + '  ETA ' + eta:<79}", end="\r", file=sys.stderr, flush=True)

    def read(self):
        """(mean loss, accuracy in percent) of all ranks so far; UserError if a loss was not finite, no attack moved."""
        *sums, bad, still = zip(*gather(self.total.tolist()), strict=True)
        loss, correct, seen = map(sum, sums)
        # a signal may come after a step or two, of very sure images: too few to tell
        stuck = self.step >= min(SYNC_EVERY, self.steps) and sum(still) == self.step * WORLD
        if any(bad) or stuck:
            what = "the loss was not finite" if any(bad) else "the attack's gradient was zero for every image"
            where = f"{self.phase.name}, epoch {self.epoch}, step {min(filter(None, bad), default=self.step):.0f}"
            raise UserError(f"{what} ({where}); the epoch before is saved: try a lower --lr")
        return loss / max(seen, 1), 100 * correct / max(seen, 1)

    def at_chance(self):
        """Is the accuracy within two standard errors of guesses that know nothing of the image, or worse? On a long
        tail that may be far above 1/C: always the head class is right as often as the head class is there. No where
        the images are too few to tell."""
        guesses, counts = self.predicted.tolist(), self.phase.counts
        chance = sum(g * n for g, n in zip(guesses, counts)) / (sum(guesses) * sum(counts))
        limit = chance + 2 * math.sqrt(chance * (1 - chance) / sum(guesses))
        return self.read()[1] / 100 <= limit < 2 * chance


def hms(seconds):
    """Seconds for people: '45 s', '12 min', '3 h 05 min', '2 d 4 h'."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 120:
        return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


# ==========================================================================================================
# 9  AutoAttack
# ==========================================================================================================
# Own code from the papers: arXiv 2003.01690 (APGD), 1907.02044 (FAB), 1912.00049 (Square); maximum norm only.
# An attack is a small class with start(lane), advance(lane) and the number of `evaluations` that end a lane;
# run_lanes() owns the batch. A lane is one job (point, target): row i of every tensor in the dict `lane`, with
# its own counter lane["step"][i]. A lane that ends is refilled at once, so the batch stays full until the jobs
# run out; then it shrinks.

AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
FLOATS = (torch.float32, torch.float64)


# Every random draw is a hash of (seed, attack, point, target, iteration, number): it depends neither on the
# batch a point sits in nor on the device. int64 products wrap; masking off the sign's copies makes the shifts
# logical.
def hash64(z):
    """splitmix64's output function, element by element. int64 in, int64 out (all 64 bits used)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def random_bits(key, count):
    """int64 [N] keys -> int64 [N, count] independent words."""
    counter = torch.arange(1, count + 1, device=key.device) * -0x61C8864680B583EB  # splitmix64's increment
    return hash64(hash64(key)[:, None] + counter)


def random_below(words, bound):
    """Integers in [0, bound): the upper 32 bits times the bound, shifted; exact on every device."""
    return (((words >> 32) & 0xFFFFFFFF) * bound) >> 32


def image_like(rows, x):
    """[N] -> [N, 1, 1, 1] to broadcast against x, or [N] where x is [N]."""
    return rows.view(-1, *[1] * (x.dim() - 1))


def replace_rows(lane, rows, **new):
    """lane[name][i] = new[name][i], in new tensors, for the rows i that the bool [N] `rows` marks."""
    for name, value in new.items():
        lane[name] = torch.where(image_like(rows, value), value, lane[name])


def is_fooled(logits, y):
    """bool [N]: another class beats y, by more than the rounding that an image shows when its batch changes shape, so
    that the verdict survives re-scoring. NaN logits never count."""
    slack = 100 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)
    return margin(logits, y) < -slack


def margin(logits, y):
    """z_y - max of the others, [N]."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return logits.gather(1, y[:, None])[:, 0] - others


def logit_gap(logits, lane):
    """z_target - z_y, [N]."""
    return (logits.gather(1, lane["target"][:, None]) - logits.gather(1, lane["y"][:, None]))[:, 0]


def _cross_entropy_rows(logits, lane):
    return F.cross_entropy(logits, lane["y"], reduction="none")


def targeted_dlr(logits, lane):
    """(z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), z_(i) the i-th largest: blind to shift and scale."""
    top = logits.topk(4, dim=1).values
    return logit_gap(logits, lane) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def input_gradient(net, x, objective):
    """(logits, objective per row, its gradient at x); parameters get none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)
        value = objective(logits)
        if not value.requires_grad:
            raise ValueError("the output has no gradient at the input; run attacks=('square',) only")
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return logits.detach(), value.detach(), gradient


class APGD:
    """Auto-PGD (2003.01690, Algorithm 1): momentum; at checkpoints the step may halve, from the best."""

    def __init__(self, nets, eps, iterations, loss, targets=1):
        self.ascend, self.exact = nets
        self.eps, self.loss, self.targets, self.evaluations = eps, loss, targets, iterations + 1
        # Interval to the first checkpoint, by how much intervals shrink, the least one; in iterations.
        self.first, self.shrink, self.least = (max(int(p * iterations), 1) for p in (0.22, 0.03, 0.06))

    def start(self, lane):
        x0 = lane["x0"]
        noise = (random_bits(lane["key"], x0[0].numel()) >> 40 & 0xFFFFFF).to(x0.dtype) * 2**-23 - 1
        noise /= noise.abs().amax(1, keepdim=True) + 1e-12  # at least one pixel on the face of the ball
        z, row = (x0 + self.eps * noise.view(x0.shape)).clamp_(0, 1), x0.new_zeros(len(x0))
        lane |= {"low": (x0 - self.eps).clamp_(min=0), "high": (x0 + self.eps).clamp_(max=1)}
        lane |= {"z": z, "before": z, "best": z, "best_gradient": torch.zeros_like(x0)}
        lane |= {"best_loss": row - math.inf, "last_loss": row + math.inf, "loss_at_check": row}
        lane |= {"rises": row, "size": row + 2 * self.eps, "halved": row == 0}
        lane["interval"] = lane["check"] = torch.full_like(lane["y"], self.first)

    def advance(self, lane):
        """Score lane["z"], then move it. -> (scored images, bool: which of them fool)."""
        z, step = lane["z"], lane["step"]
        logits, loss, gradient = input_gradient(self.ascend, z, lambda logits: self.loss(logits, lane))
        replace_rows(lane, loss > lane["best_loss"], best_loss=loss, best=z, best_gradient=gradient)
        lane["rises"], lane["last_loss"] = lane["rises"] + (loss > lane["last_loss"]), loss

        # Halve where too few steps rose, or the best loss stood still since a checkpoint that did not halve.
        checked = step == lane["check"]
        stuck = ~lane["halved"] & (lane["loss_at_check"] >= lane["best_loss"])
        halve = checked & ((lane["rises"] <= 0.75 * lane["interval"]) | stuck)
        interval = (lane["interval"] - self.shrink).clamp_(min=self.least)
        replace_rows(lane, checked, halved=halve, loss_at_check=lane["best_loss"], rises=torch.zeros_like(loss))
        replace_rows(lane, checked, interval=interval, check=step + interval)
        replace_rows(lane, halve, size=lane["size"] / 2)
        here = torch.where(image_like(halve, z), lane["best"], z)
        gradient = torch.where(image_like(halve, z), lane["best_gradient"], gradient)

        aim = here + image_like(lane["size"], z) * gradient.sign_()
        aim = aim.clamp_(lane["low"], lane["high"])
        pull = image_like(torch.where(step > 0, 0.75, 1.0).to(z.dtype), z)  # the first step has no momentum
        moved = here + pull * (aim - here) + (1 - pull) * (here - lane["before"])
        lane |= {"before": here, "z": moved.clamp_(lane["low"], lane["high"])}
        return z, is_fooled(logits, lane["y"])


def project_linf(t, w, gap):
    """Smallest d in the maximum norm with <w, d> = -gap and t + d in [0, 1]; else the corner closest to that.

    t, w [N, D]; gap [N]. Every coordinate moves by the same length, cut at the room it has. The length solves sum |w|
    min(length, room) = |gap|: concave and piecewise linear, so Newton from the left arrives exactly, after about four
    steps (sorting the breakpoints takes three times as long)."""
    need, weight = gap.abs(), w.abs()
    down = w * gap.sign()[:, None]  # > 0 where the coordinate has to fall
    room = torch.where(down > 0, t, 1 - t)
    full = weight * room
    length = need / weight.sum(1).clamp_min(1e-30)
    while True:
        free = room > length[:, None]
        longer = need - full.masked_fill(free, 0).sum(1)
        longer /= weight.masked_fill(~free, 0).sum(1).clamp_min(1e-30)
        if not (longer > length).any():
            return -down.sign() * torch.minimum(length[:, None], room)
        length = torch.maximum(length, longer)


class FAB:
    """Targeted FAB (1907.02044): step onto the linearised boundary to the target, drawn to the clean point.

    Two forwards and one backward an iteration. Merging the verdict with the next gradient does not pay: after a success
    (nine iterations in ten) the backward step moves the point, which needs its own forward."""

    ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9

    def __init__(self, nets, eps, iterations, targets):
        self.ascend = self.exact = nets[1]
        self.eps, self.targets, self.evaluations = eps, targets, iterations

    def start(self, lane):
        lane["z"] = lane["x0"]

    def advance(self, lane):
        """As APGD's."""
        x0, z = lane["x0"], lane["z"]
        _, gap, gradient = input_gradient(self.exact, z, lambda logits: logit_gap(logits, lane))
        w = gradient.flatten(1)
        gap_at_x0 = gap + (w * (x0 - z).flatten(1)).sum(1)
        both = project_linf(torch.cat([z, x0]).flatten(1), w.repeat(2, 1), torch.cat([gap, gap_at_x0]))
        from_z, from_x0 = both.view(2, *z.shape)
        reach = both.abs().amax(1).clamp_min_(1e-8).view(2, -1)
        alpha = image_like((reach[0] / (reach[0] + reach[1])).clamp_(max=self.ALPHA_MAX), z)
        z = ((z + self.ETA * from_z) * (1 - alpha) + (x0 + self.ETA * from_x0) * alpha).clamp_(0, 1)
        crossed = is_fooled(self.exact(z), lane["y"])
        lane["z"] = torch.where(image_like(crossed, z), x0 + self.BETA * (z - x0), z)
        return z, crossed & ((z - x0).abs().flatten(1).amax(1) <= self.eps)


class Square:
    """Square attack: random search over squares whose side follows a schedule; values only, no gradient."""

    P_INIT = 0.8
    HALVE_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    def __init__(self, nets, eps, queries):
        self.ascend = self.exact = nets[1]
        self.eps, self.targets, self.evaluations = eps, 1, queries + 1

    def start(self, lane):
        x0 = lane["x0"]
        n, channels, height, width = x0.shape
        low, high = (x0 - self.eps).clamp_(min=0), (x0 + self.eps).clamp_(max=1)
        stripes = random_bits(lane["key"], channels * width).view(n, channels, 1, width) < 0
        lane |= {"low": low, "high": high, "z": torch.where(stripes, low, high)}
        lane |= {"best": x0, "margin": x0.new_full((n,), math.inf)}
        halvings = torch.bucketize(torch.arange(self.evaluations), torch.tensor(self.HALVE_AFTER))
        sides = (self.P_INIT * height * width / 2 ** halvings.double()).sqrt().round()  # at each step
        self.sides = sides.clamp(1, min(height, width)).long().to(x0.device)

    def advance(self, lane):
        """As APGD's."""
        z = lane["z"]
        logits = self.exact(z)
        value = margin(logits, lane["y"])
        replace_rows(lane, value < lane["margin"], margin=value, best=z)
        lane["z"] = self.propose(lane)
        return z, is_fooled(logits, lane["y"])

    def propose(self, lane):
        """The best image with one square recoloured, each channel to one of its two bounds: from the stripes on, every
        pixel lies on a bound, where adding +-2 eps and projecting means just that."""
        _, channels, height, width = lane["best"].shape
        side = self.sides[lane["step"]]
        words = random_bits(lane["key"] + lane["step"] + 1, channels + 2)

        def inside(word, length):
            # Places 0 to length - side - 1, as in the official code: the last row and column stay out.
            # With all places (the paper's) Square is stronger, by 14 points on 12x12 images.
            first = random_below(word, (length - side).clamp_(min=1))[:, None]
            place = torch.arange(length, device=word.device)
            return (place >= first) & (place < first + side[:, None])

        square = inside(words[:, 0], height)[:, None, :, None] & inside(words[:, 1], width)[:, None, None, :]
        colour = torch.where(words[:, 2:, None, None] < 0, lane["low"], lane["high"])
        return torch.where(square, colour, lane["best"])


def confirm(attack, lane, scored, claims, used_up):
    """-> bool [lanes], which are fooled: a low-precision ascent only claims, `exact` decides. A lane ending without
    success gets one more exact look, at its best point, which then replaces `scored`."""
    fooled = np.zeros_like(claims)
    for images, asked in ((scored, claims), (lane["best"], used_up)):
        slots = torch.as_tensor(np.flatnonzero(asked & ~fooled), device=scored.device)
        if len(slots):
            hits = slots[is_fooled(attack.exact(images[slots]), lane["y"][slots])]
            scored[hits] = images[hits]
            fooled[hits.cpu().numpy()] = True
    return fooled


def run_lanes(attack, rows, make_lane, batch_size, progress):
    """Run an attack on rows: all against their first target, those still robust against the second, ... Yields (row
    numbers, adversarial images) as they are found. progress: called with the share of the work that is left."""
    queue = deque((row, 0) for row in rows)
    jobs, lane, tick = [], {}, 0  # jobs[i] of lane i: row, rank of its target, first tick
    total = left = len(queue) * attack.targets * attack.evaluations  # lane iterations still to do, at most
    while queue or jobs:
        fresh = [queue.popleft() for _ in range(min(len(queue), batch_size - len(jobs)))]
        if fresh:
            new = make_lane(fresh)
            attack.start(new)
            lane = {name: torch.cat([lane[name], new[name]]) for name in new} if jobs else new
            jobs += [(row, rank, tick) for row, rank in fresh]
        left, tick = left - len(jobs), tick + 1
        scored, claims = attack.advance(lane)
        lane["step"] = lane["step"] + 1
        # this waits for the device
        claims, used_up = torch.stack([claims, lane["step"] >= attack.evaluations]).cpu().numpy()
        fooled = claims if attack.ascend is attack.exact else confirm(attack, lane, scored, claims, used_up)
        ended = fooled | used_up
        if fooled.any():
            hits = list(itertools.compress(jobs, fooled))
            left -= sum((attack.targets - rank) * attack.evaluations - tick + first for _, rank, first in hits)
            yield [row for row, _, _ in hits], scored[torch.as_tensor(fooled, device=scored.device)]
        if ended.any():
            survivors = itertools.compress(jobs, ended & ~fooled)
            queue.extend((row, rank + 1) for row, rank, _ in survivors if rank + 1 < attack.targets)
            jobs = list(itertools.compress(jobs, ~ended))
            keep = torch.as_tensor(np.flatnonzero(~ended), device=scored.device)
            lane = {name: tensor.index_select(0, keep) for name, tensor in lane.items()}
        progress(left / total)


class Points:
    """What the attacks share: images, labels, the ranking of the clean logits, who is still robust."""

    def __init__(self, net, x, y, batch_size, index, gradients):
        self.x, self.y, self.batch_size = x, y, batch_size
        self.index = torch.arange(len(x)) if index is None else index.cpu()
        logits = _in_batches(net, x, batch_size)
        shape, self.classes = list(logits.shape), logits.shape[-1]
        if shape != [len(y), self.classes] or self.classes < 2 or logits.dtype not in FLOATS:
            raise ValueError(f"logits are {logits.dtype} {shape}: want float32 [{len(y)}, 2 or more classes]")
        if not logits.isfinite().all() or not 0 <= y.min() <= y.max() < self.classes:
            span = f"y spans [{y.min()}, {y.max()}], finite logits: {bool(logits.isfinite().all())}"
            raise ValueError(f"{span}: want labels below {self.classes} and no NaN among the clean logits")
        part = slice(batch_size)
        self.randomised = _warn_of_odd_models(net, x[part], y[part], logits[part], gradients)
        # column 0 is y itself, then come its rivals in the order of the clean logits
        self.order = logits.scatter(1, y[:, None], math.inf).argsort(1, descending=True)
        self.robust = (logits.argmax(1) == y).cpu()

    def lane(self, jobs, number):
        """The lanes of jobs [(row, target's rank), ...]; number: what seeds this attack's draws."""
        rows, ranks = torch.tensor(jobs).unbind(1)
        key = hash64(hash64(hash64(hash64(number) + self.index[rows]) + ranks))
        rows, ranks, key = (t.to(self.y.device) for t in (rows, ranks, key))
        lane = {"key": key, "step": torch.zeros_like(rows), "x0": self.x[rows], "y": self.y[rows]}
        return lane | {"target": self.order[rows, ranks + 1]}


def _in_batches(net, x, batch_size):
    return torch.cat([net(part) for part in x.split(batch_size)])


def _warn_of_odd_models(net, x, y, logits, gradients):
    """Warn of models for which the result would mislead; arguments: the first batch. -> is it randomised?"""
    apart, zero = float((net(x) - logits).abs().max() / logits.abs().max().clamp_min(1e-12)), 0
    if gradients:
        slope = input_gradient(net, x, lambda logits: margin(logits, y))[2]
        zero = int((slope.flatten(1) == 0).all(1).sum())
    softmax = bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all())
    complaints = {
        f"the same images twice give logits {apart:.1e} apart: the model is randomised and will look too "
        "robust; make it deterministic, or average several forwards inside it": apart > 1e-4,
        "the outputs are nonnegative and sum to 1: return logits, not softmax probabilities, whose gradients "
        "vanish on confident points": softmax,
        f"{zero} of {len(x)} images have an exactly zero input gradient (gradient masking): APGD and FAB are "
        "blind there; remove the masking, or add an attack made for this defence": zero > 0.1 * len(x),
    }
    for complaint, holds in complaints.items():
        if holds:
            warnings.warn(f"autoattack: {complaint}", stacklevel=4)
    return apart > 1e-4


def _make_attack(name, nets, eps, budget, classes, log):
    """The attack by its name; fewer classes, fewer targets."""
    iterations, queries, targets = budget
    targets = min(targets, classes - 1)
    if name == "apgd-ce":
        return APGD(nets, eps, iterations, _cross_entropy_rows)
    if name == "apgd-t":
        if classes < 4:
            log(f"apgd-t    targeted DLR needs 4 classes, not {classes}: it climbs z_target - z_y instead")
        return APGD(nets, eps, iterations, targeted_dlr if classes >= 4 else logit_gap, targets)
    return FAB(nets, eps, iterations, targets) if name == "fab-t" else Square(nets, eps, queries)


def _run_attack(name, attack, points, number):
    """Attack the rows still robust. -> the fooled: {"rows" int64 [k], "images" [k,C,H,W], "seconds"}."""
    began = shown = time.monotonic()

    def progress(left):
        nonlocal shown
        now = time.monotonic()
        if sys.stderr.isatty() and not RANK and (now - shown > 0.5 or not left):
            shown, eta = now, hms((now - began) * left / (1 - left))
            text = f"{name} {100 - 100 * left:.0f} %  ETA {eta}" if left else ""
            print(f"{text:<79}", end="\r", file=sys.stderr, flush=True)

    todo, lane = points.robust.nonzero()[:, 0].tolist(), functools.partial(points.lane, number=number)
    found = list(run_lanes(attack, todo, lane, points.batch_size, progress))
    rows = torch.tensor([row for rows, _ in found for row in rows], dtype=torch.int64)
    images = torch.cat([points.x[:0], *(images for _, images in found)]).cpu()
    return {"rows": rows, "images": images, "seconds": time.monotonic() - began}


def _audit(net, points, x_adv, eps):
    """Recompute from the returned images what the flags claim. -> a line of text, or RuntimeError."""
    x, y, robust = points.x, points.y, points.robust.to(points.x.device)
    moved = (x_adv - x).abs().flatten(1).amax(1)
    # in the batches of the clean pass: an unchanged image gets bit for bit the logits it had there
    again = _in_batches(net, x_adv, points.batch_size).argmax(1) == y
    faults = {
        "get another verdict when they are scored again": (again != robust) & (not points.randomised),
        "lie outside the eps-ball": ~(moved <= eps + 1e-6),
        "lie outside [0,1] or are NaN": ~((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1),
        "changed although they were not fooled": robust & (moved != 0),
    }
    for fault, rows in faults.items():
        # another batch size rounds differently: a flip in 500 is nobody's fault, and the re-scoring decides
        if rows.sum() > (max(1, 0.002 * len(x)) if fault.startswith("get another") else 0):
            raise RuntimeError(f"autoattack's audit: {int(rows.sum())} of {len(x)} returned images {fault}")
    span = f"range [{x_adv.min():g}, {x_adv.max():g}]  NaN {int(x_adv.isnan().sum())}"
    share = 100 * again.double().mean()
    return f"audit     |x_adv - x| <= {255 * moved.max():.4f}/255  {span}  scored again {share:.2f} %"


def autoattack(
    model, x, y, *, eps=8 / 255, attacks=AUTOATTACK, seed=0, batch_size=512, log=None,
    iterations=100, queries=5000, targets=9, index=None, state=None, nets=None,
) -> torch.Tensor:  # fmt: skip
    """AutoAttack standard in the maximum norm (Croce & Hein 2020): each attack runs on the points that survived those
    before it.

    model: nn.Module, [N,C,H,W] in [0,1] -> logits [N,classes]; run in eval mode and left as it was. x: float32 or
    float64; y: int64 [N]; same device. Returns x_adv like x: a fooled point carries its adversarial image, any other is
    unchanged. log: called with one line of text at a time. iterations: of APGD and FAB, per target. index: int64 [N],
    the points' numbers in the random draws (default 0 .. N-1): results do not depend on batch_size. state: a mutable
    mapping; state[attack] is set when that attack has ended and used when the same call is made again (same model and
    data: the caller's care). nets: (forward that steers APGD, forward that decides everything), by default the model
    twice, a Net as its FrozenCopy. Fewer than 10 classes: as many targets as there are; fewer than 4: APGD-T climbs
    z_target - z_y, as DLR needs 4. ValueError for bad input, RuntimeError when the final audit fails.
    """
    check_images(x, y, FLOATS)
    budget = (iterations, queries, targets)
    known = bool(attacks) and sorted(attacks) == sorted(set(attacks) & set(AUTOATTACK))
    if not 0 <= eps <= 1 or min(batch_size, *budget) < 1 or not known:
        given = f"eps {eps}, batch_size {batch_size}, iterations, queries, targets {budget}, attacks {attacks}"
        raise ValueError(f"{given}: want eps in [0,1], counts >= 1, each attack one of {AUTOATTACK}")
    if index is not None and (index.shape != y.shape or index.dtype != torch.int64):
        raise ValueError(f"index must be int64 [{len(x)}], got {index.dtype} {list(index.shape)}")
    x, x_adv, log = x.detach(), x.detach().clone(), log or (lambda line: None)
    if not len(x):
        return x_adv
    exact = FrozenCopy(model, next(model.parameters()).dtype) if isinstance(model, Net) else model
    nets, state = nets or (exact, exact), {} if state is None else state
    with eval_mode(exact), torch.no_grad(), ieee_float32():
        points = Points(nets[1], x, y, batch_size, index, set(attacks) != {"square"})
        robust = points.robust
        log(f"clean     points {int(robust.sum())}  accuracy {100 * robust.double().mean():.2f} %")
        for position, name in enumerate(attacks):
            settings = f"{len(x)} {eps} {seed} {budget} {attacks[: position + 1]}"
            if name not in state:
                attack = _make_attack(name, nets, eps, budget, points.classes, log)
                number = torch.tensor(seed) + hash64(torch.tensor(1 + AUTOATTACK.index(name)))
                state[name] = _run_attack(name, attack, points, number) | {"settings": settings}
            found = state[name]
            if found["settings"] != settings:
                raise ValueError(f"state[{name!r}] was made with {found['settings']} not {settings}: drop it")
            robust[found["rows"]] = False
            x_adv[found["rows"].to(x.device)] = found["images"].to(x.device)
            share = 100 * robust.double().mean()
            log(f"{name:9s} points {int(robust.sum())}  robust {share:.2f} %  {found['seconds']:.1f} s")
        late = len(state["square"]["rows"]) if "square" in attacks[1:] else 0
        if late > max(1, 0.002 * len(x)):
            text = f"autoattack: Square fooled {late} points that the gradient attacks missed: suspect "
            warnings.warn(text + "gradient masking; add an attack made for this defence", stacklevel=2)
        log(_audit(nets[1], points, x_adv, eps))
    return x_adv


# ==========================================================================================================
# 10  Evaluation
# ==========================================================================================================

ATTACKS = ("clean", "pgd", "aa")
EVAL_BATCH = 500


def evaluate(
    model, images_u8, labels, *, tail=(), attacks=("clean", "pgd"), eps=8 / 255, step_size=2 / 255, steps=20,
    seed=0, batch_size=EVAL_BATCH, amp="off", log=None, state=None, nets=None,
) -> dict:  # fmt: skip
    """Accuracy on test images in percent: overall, per class, on the tail classes.

    images_u8: uint8 [N,3,H,W]; labels: int64 [N], same device; tail: class indices. 'clean' is plain accuracy; 'pgd'
    the accuracy at the last iterate of PGD (uniform start clipped to [0,1], one restart, no early exit); 'aa' the
    accuracy under AutoAttack standard, to which log and state go. Verdicts are IEEE float32; PGD's and APGD's gradients
    come from a copy in `amp` precision ('off': float32). Noise depends on the seed and the batch's or the point's
    number only; under torchrun each rank takes whole batches, and all return the same. Returns clean, tail_clean,
    class_clean (a list) and the like, with balanced_* (mean of the class accuracies) where classes differ in size;
    tail_* is None where no image is of the tail. No global generator is touched and the model is left as it was.
    ValueError for no images, or another dtype or shape.
    """
    given = [f"{t.dtype} {list(t.shape)}" if torch.is_tensor(t) else str(type(t)) for t in (images_u8, labels)]
    if not given[0].startswith("torch.uint8") or images_u8.ndim != 4 or not len(images_u8):
        raise ValueError(f"images must be a uint8 tensor [N,3,H,W] with N > 0, got {given[0]}")
    if given[1] != f"torch.int64 [{len(images_u8)}]" or labels.min() < 0:
        raise ValueError(f"labels must be an int64 tensor [{len(images_u8)}] of classes from 0, got {given[1]}")
    if isinstance(attacks, str) or not set(attacks) <= set(ATTACKS):
        raise ValueError(f"attacks {attacks!r}: want a sequence from {ATTACKS}")
    if batch_size < 1 or amp not in AMP_DTYPE:
        raise ValueError(f"batch_size {batch_size}, amp {amp!r}: want at least 1, and one of {', '.join(AMP_DTYPE)}")
    fast, exact = nets or (model, model)
    if nets is None and isinstance(model, Net):
        exact = FrozenCopy(model)
        fast = exact if amp == "off" else FrozenCopy(model, AMP_DTYPE[amp])
    correct = {name: torch.zeros(len(labels), dtype=torch.bool, device=labels.device) for name in attacks}
    if "aa" in attacks:
        mine = torch.arange(len(labels), device=labels.device)
        mine = mine[mine // batch_size % WORLD == RANK]
        options = dict(eps=eps, seed=seed, batch_size=batch_size, log=log, state=state, nets=(fast, exact), index=mine)
        adversarial = to_float(images_u8)
        adversarial[mine] = autoattack(exact, to_float(images_u8[mine]), labels[mine], **options)
    with eval_mode(exact), torch.no_grad():
        for i in range(RANK, math.ceil(len(labels) / batch_size), WORLD):
            part = slice(i * batch_size, (i + 1) * batch_size)
            x, y = to_float(images_u8[part]), labels[part]
            generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "evaluation", i))
            for name in attacks:
                x_adv = adversarial[part] if name == "aa" else x
                if name == "pgd":
                    x_adv = pgd_attack(fast, x, y, eps=eps, step_size=step_size, steps=steps, generator=generator)
                with ieee_float32():
                    logits = exact(x_adv)
                correct[name][part] = (logits.argmax(1) == y) & ~logits.isnan().any(1)  # NaN is never right
    correct = {name: torch.stack(gather(flags.cpu())).any(0) for name, flags in correct.items()}
    parts = [_metrics(name, flags, labels, list(tail)) for name, flags in correct.items()]
    return {k: v for part in parts for k, v in part.items()}


def save_examples(path, net, images_u8, labels, count, log, *, eps, step_size, steps, seed=0):
    """Write a PNG grid, four triples a row, of `count` images spread over the set: clean, after PGD, and ten times the
    difference around grey. The log gets a caption: the label and what `net` (a module or FrozenCopy) says to both."""
    index = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    x, y = to_float(images_u8[index]), labels[index]
    generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "examples"))
    x_adv = pgd_attack(net, x, y, eps=eps, step_size=step_size, steps=steps, generator=generator)
    triples, content = torch.stack([x, x_adv, (0.5 + 10 * (x_adv - x)).clamp(0, 1)], 1), io.BytesIO()
    torchvision.utils.save_image(triples.flatten(0, 1).cpu(), content, format="png", nrow=12)
    write_atomic(path, content.getvalue())
    with eval_mode(net), torch.no_grad():
        said = zip(y.tolist(), *(net(images).argmax(1).tolist() for images in (x, x_adv)), strict=True)
    log(f"{path} (label: clean > attacked prediction) " + ", ".join("{}: {} > {}".format(*row) for row in said))


def _metrics(name, flags, labels, tail):
    """bool [N] flags of one attack -> its percentages in results.json."""
    labels, flags = labels.cpu().numpy(), flags.cpu().numpy()
    counts, hits = np.bincount(labels), np.bincount(labels, flags)
    per_class = 100 * hits / counts.clip(1)
    out = {name: float(100 * hits.sum() / counts.sum()), f"class_{name}": [round(v, 4) for v in per_class.tolist()]}
    tail = [c for c in tail if c < len(counts)]
    out[f"tail_{name}"] = float(100 * hits[tail].sum() / counts[tail].sum()) if counts[tail].any() else None
    if len(set(counts.tolist())) > 1:
        out[f"balanced_{name}"] = float(per_class[counts > 0].mean())
    return out


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
COLUMNS = dict(clean="clean", pgd="PGD-20", aa="AA", tail_clean="T-clean", tail_pgd="T-PGD", tail_aa="T-AA")


# What the paper leaves open, or what cannot matter to its numbers: any value may stand beside them.
FREE = ("seed", "amp", "compile", "deterministic", "sync_bn", "alpha", "tau", "kd", "reat_tail")


def paper_row(cfg, name):
    """The paper's numbers for a checkpoint ('teacher', 'best', 'last') of a resolved Config, or None where it has none
    for these settings."""
    names = ("data", "ir", "method", "arch", "aug", "official")
    usual = Config(**{k: getattr(cfg, k) for k in names}, device="cpu", amp="off", compile="off")
    usual, mine = identity(resolve(usual)), identity(cfg)
    if name not in ("teacher", "best", "last") or any(mine[k] != usual[k] for k in mine if k not in FREE):
        return None
    method = "teacher" if name == "teacher" else cfg.method
    method += "" if cfg.aug == "none" or name == "teacher" else f"+{cfg.aug}"
    key = [cfg.data, f"{cfg.ir or 0:g}", cfg.arch, method]
    for cells in (line.split() for line in PAPER.split("\n")):
        if cells[1:5] == key:
            numbers = [None if c == "-" else float(c) for c in cells[10 if name == "last" else 5 :][:5]]
            return dict(zip(list(COLUMNS)[:5], numbers, strict=True))
    return None


class Run:
    """A run's folder; aa.pt is there while AutoAttack is under way."""

    FILES = ("config.json", "state.pt", "teacher.pt", "best.pt", "last.pt", "results.json", "report.md")

    def __init__(self, cfg):
        self.cfg, self.path = cfg, pathlib.Path(cfg.out)
        self.plan, self._clock, self.fingerprint, self.tests = [], None, None, None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.file = open(os.devnull if RANK else self.path / "log.txt", "ab")  # closed, it lets go of the folder
            if not RANK:
                self._lock()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def begin(self, argv):
        """Claim the folder for this configuration and open its log."""
        if not RANK:
            self._claim()
        gather(None)  # no rank looks into the folder before it is ours
        self.environment = environment(self.cfg)
        self.log(f"run {self.path}, process {os.getpid()}")
        self.log("argv " + " ".join(map(str, argv)), quiet=True)
        self.log(", ".join(f"{k} {v}" for k, v in self.environment.items()))

    def _lock(self):
        """Keep other processes out by the system's lock on log.txt; only then may --overwrite empty the folder."""
        log = self.path / "log.txt"
        try:
            if sys.platform == "win32":
                import msvcrt

                os.lseek(self.file.fileno(), 1 << 30, os.SEEK_SET)  # one byte far behind the text, which stays readable
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # other errors: a drive without locks
            if isinstance(error, (BlockingIOError, PermissionError)):
                user = log.read_text("utf-8", "replace").rpartition(", process ")[2].split("\n")[0] or "?"
                holder = f"{self.path} is in use by process {user}"
                raise UserError(f"{holder}: wait for it, or choose another --out") from None
        for old in (*map(self.path.joinpath, self.FILES), *self.path.glob("aa*.pt")) if self.cfg.overwrite else ():
            old.unlink(missing_ok=True)
        self.file.truncate(0 if self.cfg.overwrite else log.read_bytes().rfind(b"\n") + 1)  # no torn last line

    def _claim(self):
        """Write config.json, or compare with the one that is there."""
        path, mine = self.path / "config.json", identity(self.cfg)
        if path.exists():
            try:
                theirs = dict(json.loads(path.read_text())["identity"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged: restore it, or start afresh with --overwrite") from None
            odd = [f"{k} {theirs.get(k)} there, {mine[k]} here" for k in mine if theirs.get(k) != mine[k]]
            if odd:
                said = f"another configuration ({', '.join(odd)})"
                raise UserError(f"{self.path} holds a run of {said}: choose another --out, or --overwrite it")
        write_atomic(path, json.dumps({"identity": mine, "config": asdict(self.cfg)}, indent=1) + "\n")

    def log(self, line, quiet=False):
        """One line to log.txt and, unless quiet, to the screen."""
        try:
            os.write(self.file.fileno(), f"{line}\n".encode(errors="replace"))
        except OSError as error:
            raise unwritable(self.path / "log.txt", error) from error
        if not quiet and not RANK:
            print(line, flush=True)

    def has(self, name):
        """Is there such a file? Of several ranks the first one's answer counts, so that all do the same."""
        return gather((self.path / f"{name}.pt").exists())[0]

    def save_model(self, name, model, epoch):
        content = dict(state_dict=model.state_dict(), epoch=epoch, arch=self.cfg.arch)
        write_atomic(self.path / f"{name}.pt", content)
        gather(None)  # now it is there for all ranks

    def save_state(self, state):
        write_atomic(self.path / "state.pt", dict(state, fingerprint=self.fingerprint))

    def load_state(self, phase):
        """The saved state of this phase's training, or None; UserError where the data have changed since."""
        if not self.has("state"):
            return None
        state = read_checkpoint(self.path / "state.pt")
        if not isinstance(state, dict) or not {"fingerprint", "phase", "epoch"} <= state.keys():
            raise UserError(f"{self.path / 'state.pt'} is no training state: start afresh with --overwrite")
        if state["fingerprint"] != self.fingerprint:
            raise UserError(f"the training images are not those {self.path} began with: use another --out")
        return state if state["phase"] == phase else None

    def results(self):
        """What results.json holds, {} before the first evaluation."""
        path = self.path / "results.json"
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
            return {name: dict(part) for name, part in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: delete it and use --stage eval") from None

    def save_results(self, **changes):
        write_atomic(self.path / "results.json", json.dumps({**self.results(), **changes}, indent=1) + "\n")
        gather(None)

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


def environment(cfg):
    """What the figures of a run depend on: device and versions."""
    name = f"cpu, {torch.get_num_threads()} threads"
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n")
        name += ", " + next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    if cfg.device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(cfg.device)}, CUDA {torch.version.cuda}"
    name = f"{WORLD} x {name}" if WORLD > 1 else name
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, np)}
    versions["triton"] = triton.__version__ if HAS_TRITON else None
    return {"device": name, **versions, "python": platform.python_version(), "system": platform.platform()}


def identity(cfg):
    """The settings that make a run what it is: another value needs another folder."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata["identity"]}


def run_name(cfg):
    """A folder name: the settings people vary, then a hash of all that count (and of the place of a folder's data)."""
    place = str(pathlib.Path(cfg.data_dir).resolve()) if cfg.data == "folder" else ""
    digest = hashlib.sha256(json.dumps([identity(cfg), place]).encode()).hexdigest()[:8]
    ratio = "owncounts" if cfg.ir is None else f"ir{cfg.ir:g}"
    return f"{cfg.data}-{ratio}-{cfg.method}-{cfg.arch}-seed{cfg.seed}-{digest}"


@dataclass
class Setting:
    """Runs that differ in nothing but the seed: a row of the table, a mark in the figures."""

    cfg: Config
    words: dict  # setting -> how the label says it
    runs: list  # {checkpoint: M} of each run

    def label(self, *without):
        return " ".join(word for key, word in self.words.items() if key not in without)

    def stat(self, name, column):
        """(mean, sample standard deviation, number of runs) of a checkpoint's column; None where no run has it."""
        values = [run[name][column] for run in self.runs if run.get(name, {}).get(column) is not None]
        return (np.mean(values), np.std(values, ddof=int(len(values) > 1)), len(values)) if values else None


def _but_the_seed(cfg):
    return {**identity(cfg), "seed": None, "data_dir": cfg.data_dir if cfg.data == "folder" else None}


def by_setting(runs) -> list:
    """Runs [(Config, results)] -> Settings in the order of their first run; labels name what sets them apart."""
    groups = {}
    for cfg, results in runs:
        own = _but_the_seed(cfg)
        groups.setdefault(json.dumps(own), []).append((cfg, results["checkpoints"]))
    owns, settings = [json.loads(key) for key in groups], []
    for own, members in zip(owns, groups.values(), strict=True):
        cfg = members[0][0]
        words = {"data": cfg.data, "ir": "own counts" if cfg.ir is None else f"IR {cfg.ir:g}", "arch": cfg.arch}
        words["method"] = cfg.method if cfg.aug == "none" else f"{cfg.method}+{cfg.aug}"
        rivals = [other for other in owns if all(other[k] == own[k] for k in (*words, "aug"))]
        said = {k: "default" if v is None else f"{v:g}" if isinstance(v, float) else v for k, v in own.items()}
        words |= {k: f"{_dashed(k)} {said[k]}" for k in own if any(other[k] != own[k] for other in rivals)}
        words["seed"] = f"seed {cfg.seed}" if len(members) == 1 else f"({len(members)} runs)"
        settings.append(Setting(cfg, words, [checkpoints for _, checkpoints in members]))
    return settings


def welch_t(a, b):
    """Welch's t statistic of two (mean, standard deviation, number), and its degrees of freedom (Welch-Satterthwaite);
    None where it is undefined: fewer than two runs, or no spread."""
    (mean_a, sd_a, n_a), (mean_b, sd_b, n_b) = a, b
    u, v = sd_a**2 / n_a, sd_b**2 / n_b
    if min(n_a, n_b) < 2 or u + v == 0:
        return None
    return (mean_a - mean_b) / math.sqrt(u + v), (u + v) ** 2 / (u**2 / (n_a - 1) + v**2 / (n_b - 1))


def markdown(rows):
    """Rows of cells, the first of them headings -> lines of an aligned table; two columns of text, then numbers."""
    rows = [rows[0], ["---", "---"] + ["---:"] * (len(rows[0]) - 2), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in padded]


def table(runs) -> str:
    """Runs [(Config, results)] as Markdown in the paper's layout: a line per checkpoint, mean and standard deviation
    over the seeds, below it the paper's values and the gap; then Welch's t of the first setting that has several runs
    against each other such setting."""
    settings = by_setting(runs)
    found = {c for s in settings for run in s.runs for m in run.values() for c in COLUMNS if m.get(c) is not None}
    shown = [c for c in COLUMNS if c in found]
    heads = [COLUMNS[c].replace("20", str(runs[0][0].eval_steps)) for c in shown]
    rows = [["setting", "checkpoint", *heads]]
    for s in settings:
        for name in dict.fromkeys(name for run in s.runs for name in run):
            stats, epochs = [s.stat(name, c) for c in shown], {run.get(name, {}).get("epoch") for run in s.runs}
            some = [f" (n={t[2]})" if t and t[2] < len(s.runs) else "" for t in stats]  # not all runs have it
            cells = [f"{t[0]:.2f}" + (f" ± {t[1]:.2f}" if t[2] > 1 else "") if t else "-" for t in stats]
            cells = [cell + n for cell, n in zip(cells, some, strict=True)]
            epoch = epochs.pop() if len(epochs) == 1 else None
            rows.append([s.label(), name + (f" (epoch {epoch})" if epoch else ""), *cells])
            if evaluation_key(s.cfg) == "checkpoints" and (paper := paper_row(s.cfg, name)):
                pairs = [(t, paper.get(c)) for c, t in zip(shown, stats, strict=True)]
                rows.append(["", "paper", *("-" if p is None else f"{p:.2f}" for _, p in pairs)])
                rows.append(["", "gap", *(f"{t[0] - p:+.2f}" if t and p is not None else "-" for t, p in pairs)])
    lines = markdown(rows)
    several = [s for s in settings if len(s.runs) > 1]
    if len(several) > 1:
        rows = [["Welch's t (degrees of freedom), best", "against", *heads]]
        for other in several[1:]:
            pairs = [(several[0].stat("best", c), other.stat("best", c)) for c in shown]
            tests = [welch_t(*pair) if all(pair) else None for pair in pairs]
            cells = [f"{t[0]:.2f} ({t[1]:.1f})" if t else "-" for t in tests]
            rows.append([several[0].label(), other.label(), *cells])
        lines += ["", *markdown(rows)]
    tails = {f"{len(r['data']['tail_classes'])} of {len(r['data']['classes'])} ({cfg.data})" for cfg, r in runs}
    threats = {f"{cfg.eval_eps:g}/255" for cfg, _ in runs}
    note = (
        f"In %; eps {', '.join(sorted(threats))}. T-: the rarest classes, {', '.join(sorted(tails))}. best: highest PGD"
    )
    note += " accuracy (natural: clean) in the last quarter of the epochs, chosen on the test set as the baselines do."
    return "\n".join([*lines, "", note])


def read_run(path, cfg):
    """(Config, results) of a run folder under the evaluation settings of `cfg`; UserError that says what it lacks."""
    name = "config.json"
    try:
        own = Config(**json.loads((path / name).read_text())["config"])
        threat = dict(eval_step_size=cfg.eval_step_size, eval_steps=cfg.eval_steps)
        threat["eval_eps"] = own.eps if cfg.eval_eps is None else cfg.eval_eps
        own = replace(own, stage="report", out=str(path), checkpoint=None, examples=None, **threat)
        validate(replace(own, image_size=None))  # filled in for every data set
        name = "results.json"
        results = json.loads((path / name).read_text())
        shown = evaluations(own, results)
        shown = {k: dict(m) for k, m in shown.items() if k.partition(",")[0] in ("teacher", "best", "last")}
        for m, column in itertools.product(shown.values(), COLUMNS):
            float(m.get(column) or 0)
        data = {k: list(results["data"][k]) for k in ("classes", "tail_classes")} if shown else None
    except FileNotFoundError:
        said = f"holds no such evaluation ({name} is missing)" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {said}: make one with --stage eval, or name runs as in --stage report 'runs/*'"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        kind = f"{type(error).__name__}: {error}"
        raise UserError(f"{path / name} is damaged ({kind}): restore it, or try --stage eval") from None
    if not shown:
        said = f"eps {own.eval_eps:g} in {own.eval_steps} steps of {own.eval_step_size:g}"
        raise UserError(f"{path} holds no such evaluation ({said}): make one with --stage eval")
    return own, {"checkpoints": shown, "data": data}


def write_report(runs, folder, figures=None, notes=()):
    """Print the table of runs [(Config, results)] and the notes, write both to folder/report.md, and draw."""
    if RANK:
        return
    text = "\n".join([table(runs), *notes])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "report.md", text + "\n")
    print(f"\n{text}\n\nreport {folder / 'report.md'}", flush=True)
    if figures:
        report_figures(by_setting(runs), figures)


def stage_report(cfg):
    """One table over run folders, globs too, or else the runs that the flags name; broken and unfinished ones are
    listed below it. Reads the folders only; the table goes to --out, else for given folders into the current one."""
    if cfg.runs:
        globs = [[p for p in sorted(glob.glob(g)) if os.path.isdir(p)] or [g] for g in cfg.runs]
        folder, paths = pathlib.Path(cfg.out or "."), [pathlib.Path(path) for found in globs for path in found]
    else:
        folder, configs = run_configs(cfg)
        paths = [pathlib.Path(one.out) for one in configs]
    runs, left_out = [], []
    for path in dict.fromkeys(paths):
        try:
            runs.append(read_run(path, cfg))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError("; ".join(left_out))
    notes = [f"\nLeft out: {line}." for line in left_out]
    notes += [
        f"\nUnfinished: {own.out} lacks best or last." for own, r in runs if not {"best", "last"} <= {*r["checkpoints"]}
    ]
    write_report(runs, folder, cfg.figures, notes)


def new_figure(*size):
    """An empty matplotlib Figure of that many inches; the only place that imports matplotlib. UserError without it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--figures needs matplotlib: pip install matplotlib") from None
    return Figure(size, layout="constrained")


def save_figure(figure, folder, name, **legend):
    """Put the first panel's legend below, write folder/name as PNG and say so."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", **legend)
    path, content = pathlib.Path(folder, name), io.BytesIO()
    figure.savefig(content, dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())
    print(f"figure {path}", flush=True)


def report_figures(settings, folder):
    """Draw the best checkpoints of Settings into folder: scatter.png (the paper's Figures 1 and 5), classes.png (8),
    and ir.png (4), alpha.png and gamma.png (6, 7) where that takes several values and all else is equal. Error bars:
    standard deviation over the seeds. Told apart by markers and dashes, not by colour."""
    settings = [s for s in settings if s.stat("best", "clean") and s.stat("best", "pgd")]
    if not settings:
        raise UserError("--figures: no best checkpoint with clean and PGD accuracy to draw")
    robust = "aa" if all(s.stat("best", "aa") for s in settings) else "pgd"
    names = dict(COLUMNS, pgd=f"PGD-{settings[0].cfg.eval_steps}")
    shapes = zip("os^Dv*P<>X" * 2, ("-", "--", "-.", ":") * 5, strict=True)
    looks = [dict(marker=m, linestyle=d, color="k", ms=8, lw=1, capsize=3) for m, d in shapes]
    looks = [dict(look, mfc="w" if i < 10 else "0.6") for i, look in enumerate(looks)]

    def draw(ax, look, label, x, stats, **more):
        means, spreads = zip(*((t[0], t[1]) if t else (math.nan, 0) for t in stats), strict=True)
        ax.errorbar(x, means, spreads if any(spreads) else None, label=label, **{**look, **more})

    figure = new_figure(11, 5.5)
    for ax, (a, b) in zip(figure.subplots(1, 2), (("clean", robust), ("tail_clean", "tail_pgd")), strict=True):
        for s, look in zip(settings, itertools.cycle(looks)):
            if x := s.stat("best", a):
                draw(ax, look, s.label(), x[0], [s.stat("best", b)], xerr=x[1] or None, linestyle="none")
        ax.set(xlabel=f"{names[a]} accuracy (%)", ylabel=f"{names[b]} accuracy (%)")
    save_figure(figure, folder, "scatter.png", ncols=2)
    figure = new_figure(11, 5.5)
    ax = figure.subplots()
    for s, look in zip(settings, itertools.cycle(looks)):
        runs = [np.array(run["best"][f"class_{robust}"]) for run in s.runs if f"class_{robust}" in run.get("best", {})]
        groups = np.array([[part.mean() for part in np.array_split(run, min(10, len(run)))] for run in runs])
        stats = [(column.mean(), column.std(ddof=int(len(runs) > 1))) for column in groups.T]
        draw(ax, look, s.label(), range(1, len(stats) + 1), stats)
    ax.set(xlabel="group of classes, most to least frequent", ylabel=f"{names[robust]} accuracy (%)")
    ax.set_xticks(range(1, len(stats) + 1))
    save_figure(figure, folder, "classes.png", ncols=2)
    for key, name in (("ir", "imbalance ratio"), ("alpha", "alpha"), ("gamma", "gamma")):
        families = {}
        for s in settings:
            x = max(1.0, s.cfg.ir / 2) if key == "gamma" and s.cfg.gamma is None and s.cfg.ir else getattr(s.cfg, key)
            if x is not None:
                family = json.dumps({**_but_the_seed(s.cfg), key: None})
                families.setdefault(family, []).append((x, s))
        families = [sorted(f, key=lambda pair: pair[0]) for f in families.values() if len(f) > 1]
        if not families:
            continue
        figure = new_figure(11, 5.5)
        for ax, tail, who in zip(figure.subplots(1, 2), ("", "tail_"), ("overall", "tail classes"), strict=True):
            pairs = itertools.product(families, ("clean", "pgd"))
            for (family, column), look in zip(pairs, itertools.cycle(looks)):
                label = f"{family[0][1].label(key, 'seed')}, {names[column]}"
                draw(ax, look, label, [x for x, _ in family], [s.stat("best", tail + column) for _, s in family])
            ax.set(xlabel=name, ylabel=f"accuracy (%), {who}", xscale="log" if key == "ir" else "linear")
            ticks = sorted({x for family in families for x, _ in family})
            ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
            ax.minorticks_off()
        save_figure(figure, folder, f"{key}.png", ncols=2)


# ==========================================================================================================
# 12  Theory
# ==========================================================================================================
# Eq. (2): y = +1 (head) with probability r / (r + 1), else -1 (tail); x ~ N(eta * y, I) in n dimensions: eta
# places the two means, the standard deviation is 1. The keys below: classifier, then clean or attacked error.
TAIL_ERRORS = ("nat_std", "nat_rob", "rob_std", "rob_rob")


def theorem1(n, eta, eps, r):
    """Theorem 1 (eq. 4-5): tail errors of the optimal natural and the optimal robust linear classifier.

    n: dimension, a whole number >= 1. eta, eps: floats, 0 <= eps < eta; the attack moves a coordinate by at
    most eps. r: imbalance ratio >= 1. Returns a dict of floats: nat_std, nat_rob, rob_std, rob_rob in [0, 1],
    and the biases b_nat, b_rob (eq. 11, 16), which belong to w = (1, ..., 1) / sqrt(n). At eps = 0 or r = 1
    the two classifiers are one. ValueError outside these ranges."""
    if n != int(n) or n < 1:
        raise ValueError(f"n is {n}; the dimension must be a whole number of at least 1")
    if not 1 <= r < math.inf:
        raise ValueError(f"r is {r}; the imbalance ratio head / tail must be at least 1 and finite")
    if not 0 <= eps < eta < math.inf:
        raise ValueError(f"eps is {eps} and eta is {eta}; Theorem 1 needs 0 <= eps < eta")
    margins, out = {"std": math.sqrt(n) * eta, "rob": math.sqrt(n) * (eta - eps)}, {}
    for classifier, kind in (("nat", "std"), ("rob", "rob")):  # each is optimal for its own margin
        b = out[f"b_{classifier}"] = math.log(r) / (2 * margins[kind])
        for error, margin in margins.items():
            out[f"{classifier}_{error}"] = 0.5 * math.erfc((margin - b) / math.sqrt(2))  # Phi(b - margin)
    return out


def theory_sampled(n, eta, eps, r, samples, generator):
    """The four tail errors of `theorem1` by Monte Carlo: its classifiers on `samples` tail points of eq. (2).

    generator: CPU torch.Generator. The attack is exact, x + eps: w > 0 and y = -1. Returns a dict of floats;
    an error p has standard error sqrt(p (1 - p) / samples). ValueError as in `theorem1`."""
    optimal, out = theorem1(n, eta, eps, r), {}
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64) - eta
    for key in TAIL_ERRORS:
        attacked = x + (eps if key.endswith("rob") else 0.0)
        wrong = attacked.sum(1) / math.sqrt(n) + optimal[f"b_{key[:3]}"] > 0
        out[key] = wrong.double().mean().item()
    return out


def _linear_tail_errors(theta, eta, eps):
    """Clean and attacked tail error, float64 [2], of sign(w.x + b), theta = (w, b): exact for any w and b."""
    w, b = theta[:-1], theta[-1]
    clean = b - eta * w.sum()
    return torch.special.ndtr(torch.stack([clean, clean + eps * w.abs().sum()]) / w.norm())


def theory_trained(n, eta, eps, r, samples, generator):
    """The same by training: logistic regression on `samples` points of eq. (2), natural and adversarial.

    Newton's method, float64, full batch; the inner maximum is exact, x - eps * y * sign(w), and so are the
    errors of the trained (w, b). Theorem 1's classifiers minimise the population's logistic loss: eq. (2) has
    linear log-odds, 2 eta sum(x) + ln r, and the attack on w > 0 turns eta into eta - eps. So only sampling
    error is left; "se" is its standard error (delta method). Returns the keys of `theorem1`, biases divided
    by |w|, and "se", a dict of the four errors'. ValueError as in `theorem1`; RuntimeError if there is no
    finite minimum (a separable sample) or it has some w at 0 (eps too near eta)."""
    theorem1(n, eta, eps, r)  # for its checks
    y = (torch.rand(samples, 1, generator=generator, dtype=torch.float64) < r / (r + 1)) * 2.0 - 1
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64) + eta * y
    out = {"se": {}}
    for classifier, reach in (("nat", 0.0), ("rob", eps)):
        theta = torch.zeros(n + 1, dtype=torch.float64)
        for _ in range(50):
            signed = torch.cat([y * x - reach * theta[:-1].sign(), y], 1)  # y times attacked (x, 1)
            p = torch.sigmoid(-signed @ theta)  # probability of the wrong class
            hessian = (signed.T * (p * (1 - p))) @ signed
            step = torch.linalg.solve_ex(hessian, signed.T @ p)[0]
            theta = theta + step
            if step.norm() < 1e-9 * theta.norm():
                break
        else:
            raise RuntimeError(f"logistic regression on {samples} points did not converge; draw more samples")
        slope = torch.autograd.functional.jacobian(lambda t: _linear_tail_errors(t, eta, eps), theta)
        spread = (slope @ torch.linalg.inv(hessian) @ slope.T).diagonal().sqrt()  # [2]
        keys = (f"{classifier}_std", f"{classifier}_rob")
        out.update(zip(keys, _linear_tail_errors(theta, eta, eps).tolist(), strict=True))
        out["se"].update(zip(keys, spread.tolist(), strict=True))
        out[f"b_{classifier}"] = (theta[-1] / theta[:-1].norm()).item()
    return out


def theory(n=2, eta=1.0, eps=0.5, ratios=(1, 2, 5, 10, 50), samples=400_000, seed=0):
    """Section 3 and appendix A as Markdown: closed form, sampled, trained side by side, then what they show.

    Arguments as for `theory_trained`; ratios: imbalance ratios. Returns the table and three checks that end in yes or
    NO (Corollary 1 is strict for r > 1, eps > 0). Seconds on a CPU. Raises as `theory_trained`."""
    generator, ratios, runs, se = torch.Generator().manual_seed(seed), sorted(ratios), [], []
    rows = [["IR", "training", "bias", "trained", *("clean", "sampled", "trained"), "attacked", "sampled", "trained"]]
    for r in ratios:
        closed, args = theorem1(n, eta, eps, r), (n, eta, eps, r, samples, generator)
        sampled, trained = theory_sampled(*args), theory_trained(*args)
        runs.append([[source[k] for k in TAIL_ERRORS] for source in (closed, sampled, trained)])
        binomial = [math.sqrt(closed[k] * (1 - closed[k]) / samples) for k in TAIL_ERRORS]
        se.append([binomial, [trained["se"][k] for k in TAIL_ERRORS]])
        for name, key in (("natural", "nat"), ("adversarial", "rob")):
            biases = [f"{source['b_' + key]:.4f}" for source in (closed, trained)]
            errors = [100 * x[f"{key}_{kind}"] for kind in ("std", "rob") for x in (closed, sampled, trained)]
            rows.append([f"{r:g}", name, *biases, *(f"{error:.2f}" for error in errors)])
    error = torch.tensor(runs, dtype=torch.float64)  # [IR, (closed, sampled, trained), 4]
    worst = ((error[:, 1:] - error[:, :1]) / torch.tensor(se, dtype=torch.float64)).abs().max()
    gap, strict = error[..., 3] - error[..., 1], torch.tensor([r > 1 and eps > 0 for r in ratios])
    gaps = ", ".join(f"{100 * g:.2f} at IR {r:g}" for r, g in zip(ratios, gap[:, 0], strict=True))
    corollary = (gap[strict] > 0).all() and (gap[~strict, 0] == 0).all()
    checks = {
        "Every tail error grows with IR": (error.diff(dim=0) > 0).all(),
        f"Attacked tail worse after adversarial training (points: {gaps})": corollary,
        f"Sampled and trained agree with the closed form (farthest {worst:.1f} standard errors)": worst < 4,
    }
    about = f"Tail errors of eq. (2) in %, bias at |w| = 1; closed form (n {n}, eta {eta:g}, eps {eps:g}) first, then"
    about = f"{about} {samples:,} samples (seed {seed})."
    return "\n".join([about, "", *markdown(rows), "", *(f"- {k}: {'yes' if v else 'NO'}" for k, v in checks.items())])


def theory_figures(folder, eta=1.0, eps=0.5, seed=0):
    """Draw the paper's Figures 2 and 3 (n = 2) into folder: figure2.png, 500 points of eq. (2) at IR 1, 2, 5 and the
    optimal boundaries x1 + x2 = -sqrt(2) b; figure3.png, tail accuracy against IR, lines in closed form, circles
    trained on 100,000 points. Told apart by dashes and markers. Raises as `theory_trained`; UserError without
    matplotlib."""
    generator = torch.Generator().manual_seed(seed)
    figure = new_figure(11, 4.4)
    for ax, r in zip(figure.subplots(1, 3, sharey=True), (1, 2, 5), strict=True):
        y = (torch.rand(500, generator=generator) < r / (r + 1)) * 2 - 1
        x = torch.randn(500, 2, generator=generator) + eta * y[:, None]
        for label, marker, grey, name in ((1, "o", "0.8", "head, y = +1"), (-1, "x", "0.3", "tail, y = -1")):
            ax.scatter(*x[y == label].T.numpy(), s=16, marker=marker, color=grey, label=name)
        for key, grey, dash, name in (("b_nat", "0.5", "-", "natural"), ("b_rob", "0", "--", "adversarial")):
            at = -math.sqrt(2) * theorem1(2, eta, eps, r)[key]  # at IR 1 both are one: black dashes on grey
            ax.plot([-5, 5], [at + 5, at - 5], dash, color=grey, linewidth=3, label=f"{name} training")
        ax.set(title=f"IR {r}", xlabel="$x_1$", ylabel="$x_2$", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
    save_figure(figure, folder, "figure2.png", ncols=4)
    figure = new_figure(6, 5)
    ax, ratios = figure.subplots(), (1, 2, 5, 10, 20, 50)
    trained = [theory_trained(2, eta, eps, r, 100_000, generator) for r in ratios]
    smooth = [50 ** (i / 40) for i in range(41)]
    names = [f"{a} training, {b}" for a in ("natural", "adversarial") for b in ("clean", "attacked")]
    for key, dash, name in zip(TAIL_ERRORS, ("-", "-.", "--", ":"), names, strict=True):
        ax.plot(smooth, [100 - 100 * theorem1(2, eta, eps, r)[key] for r in smooth], "k" + dash, label=name)
        ax.plot(ratios, [100 - 100 * t[key] for t in trained], "ko", mfc="white")
    ax.set(xscale="log", xlabel="imbalance ratio", ylabel="tail class accuracy (%)", ylim=(0, 100))
    ax.set_xticks(ratios, [str(r) for r in ratios])
    ax.minorticks_off()
    save_figure(figure, folder, "figure3.png", title="circles: trained", ncols=2)


# ==========================================================================================================
# 13  Bench
# ==========================================================================================================
# Plain is what a researcher writes after AT-BSL's script: eager, eval mode, autograd.grad at x, float32 NCHW,
# PyTorch's defaults. Rounds of all variants alternate and the first is dropped, so that a drifting machine
# slows all alike; every number is a median.


def timed(variants, rounds, device):
    """{name: function} -> {name: median seconds a call}, in `rounds` alternating rounds after a warm-up."""
    seconds = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, function in variants.items():
            began = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def plain_attack(model, x, y, eps, step_size, steps):
    """AT-BSL's inner loop as it is usually written."""
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv


def plain_step(model, teacher, optimizer, x, y, counts, threat):
    """One training step of the paper's method around plain_attack, eager and in float32."""
    x_adv = plain_attack(model, x, y, **threat)
    both = (x_adv, 2 * x - x_adv)
    model.train()
    students = [model(images) for images in both]
    with torch.no_grad():
        teachers = [teacher(images) for images in both]
    loss = balanced_softmax_loss(students[0], y, counts) + 40 * igdm_loss(*students, *teachers)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fast_step(cfg, model, student, frozen, teacher, optimizer, x, y, counts, threat):
    """The same step as `train` does it."""
    x_adv = pgd_attack(frozen.refresh(), x, y, init="gauss", **threat)
    batch = Batch(student, x, x_adv, y, counts, cfg, 40.0, teacher)
    scaler = torch.amp.GradScaler(x.device.type, enabled=cfg.amp == "fp16")
    _outer_step(METHODS["ltsd"], batch, model, optimizer, scaler)


def speeds(images, seconds):
    """{name: seconds for so many images} -> {name: its columns in bench.json}; the first name is the plain one."""
    plain = next(iter(seconds.values()))
    return {name: dict(images_per_s=images / s, ratio=plain / s) for name, s in seconds.items()}


def bench_core(cfg, device, batch, steps, rounds, levers):
    """{"attack": rows, "train_step": rows} at one batch size on ResNet-18 with 100 classes, levers added in turn."""
    torch.manual_seed(0)
    ours, teacher = (build_model("resnet18", 100).to(device) for _ in "ab")
    plain, plain_teacher = (copy.deepcopy(net).to(memory_format=torch.contiguous_format) for net in (ours, teacher))
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 100
    x_cl, on_cuda = x.contiguous(memory_format=torch.channels_last), device.type == "cuda"
    threat, dtype = dict(eps=8 / 255, step_size=2 / 255, steps=steps), AMP_DTYPE[cfg.amp]

    def attack(net, x=x_cl):
        return functools.partial(pgd_attack, net, x, y, init="gauss", **threat)

    variants = {"plain": functools.partial(plain_attack, plain, x, y, **threat)}
    if levers:
        frozen = copy.deepcopy(plain).requires_grad_(False)
        variants["no weight gradients"] = functools.partial(plain_attack, frozen, x, y, **threat)
        variants["+ folded norms, fused step"] = attack(FrozenCopy(plain), x)
        variants["+ channels_last"] = attack(FrozenCopy(ours))
    student, fast = ours, FrozenCopy(ours, dtype)
    if cfg.amp != "off":
        variants[f"+ {cfg.amp}"] = attack(fast)
    if cfg.compile == "on":
        student, graphs = torch.compile(ours, dynamic=False), FrozenCopy(ours, dtype).speed_up(batch)
        if on_cuda:
            compiled = FrozenCopy(ours, dtype).speed_up(batch)
            compiled.capture = None
            variants["+ torch.compile"] = attack(compiled)
        variants["+ CUDA graph" if on_cuda else "+ torch.compile"] = attack(graphs)
    attacks = timed(variants, rounds, device)
    if cfg.compile == "on" and min(attacks, key=attacks.get) != f"+ {cfg.amp}":
        fast = graphs
    teacher = torch.no_grad()(FrozenCopy(teacher, dtype))
    plain_sgd = torch.optim.SGD(plain.parameters(), 0.01, 0.9)
    sgd = torch.optim.SGD(ours.parameters(), 0.01, 0.9, fused=on_cuda and cfg.amp != "fp16")
    rest = (y, torch.tensor(long_tail_counts(500, 100, 10), device=device), threat)
    whole = {
        "plain": functools.partial(plain_step, plain, plain_teacher.eval(), plain_sgd, x, *rest),
        "all levers": functools.partial(fast_step, cfg, ours, student, fast, teacher, sgd, x_cl, *rest),
    }
    tables = {"attack": speeds(batch, attacks), "train_step": speeds(batch, timed(whole, rounds, device))}
    return {k: [dict(batch=batch, lever=lever, **row) for lever, row in v.items()] for k, v in tables.items()}


def _again(function, times):
    for _ in range(times):
        function()


def bench_kernel(device):
    """Rows of the step kernel on CUDA against plain operations, torch.compile and a device-to-device copy."""

    def plain(a, g, x):
        moved = pgd_step_reference(a, g, x, 2 / 255, 8 / 255)
        return moved, moved.bfloat16()

    rows, largest = [], min(1 << 30, torch.cuda.mem_get_info(device)[0] // 14)
    for images in (32, 128, largest // (4 * 3072)):
        x, repeat = torch.rand(images, 3, 32, 32, device=device), 200 if images < 1000 else 10
        grad, x_adv, low = torch.randn_like(x).bfloat16(), x.clone(), x.bfloat16()
        variants = {
            "kernel": functools.partial(pgd_step, x_adv, grad, x, 2 / 255, 8 / 255, low),
            "plain": functools.partial(plain, x_adv, grad, x),
            "torch.compile": functools.partial(torch.compile(plain, dynamic=False), x_adv, grad, x),
            "copy": functools.partial(x_adv.copy_, x),
        }
        # captured, as the attack has it
        graphs = {name: capture_cuda_graph(functools.partial(_again, f, repeat), [])[0] for name, f in variants.items()}
        for name, seconds in timed(graphs, 5, device).items():
            # a step reads 4+2+4 bytes a value and writes 4+2, a copy moves 4+4
            traffic, us = (8 if name == "copy" else 16) * x.numel(), 1e6 * seconds / repeat
            rows.append(dict(images=images, what=name, us=us, gb_per_s=traffic / us / 1e3))
    return rows


def bench_forward(device):
    """Images/s of the float32 forward in which FAB, Square and all verdicts are made, ResNet-18."""
    net = FrozenCopy(build_model("resnet18", 100).to(device))
    count = EVAL_BATCH if device.type == "cuda" else CPU_CHUNK
    x = torch.rand(count, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad(), ieee_float32():
        return count / timed({"forward": functools.partial(net, x)}, 3, device)["forward"]


def projected_minutes(rates, steps, forwards):
    """{part: minutes} of the paper's command on CIFAR-100 IR 10, teacher to AutoAttack, from what was measured.

    rates: images/s of {"attack", "train_step"} at batch {32, 128}, with attacks of `steps` steps; forwards: images/s in
    float32. A teacher's step counts as a student's, which takes a little longer. An attack step is a forward and an
    input gradient; FAB takes one and a forward more, three forwards' work. Points left for each attack of AutoAttack:
    46, 22, 19, 19 % (Table 2); its early successes are not counted."""
    # a training step takes 8 forwards, and 3 for each step of its attack: see Phase.cost
    step = {batch: rates["train_step", batch] * (8 + 3 * steps) / (8 + 3 * 10) for batch in (32, 128)}
    ascent, images = 1 / (rates["attack", 128] * steps), 10_000
    pgd, apgd = 21 * ascent, (0.46 + 9 * 0.22) * 101 * ascent
    exact = (9 * 100 * 3 + 5001) * 0.19 / forwards
    seconds = dict(teacher=30 * 25_000 / step[32], student=100 * 19_573 / step[128], selection=25 * images * pgd)
    return {name: s / 60 for name, s in (seconds | {"evaluation": 3 * images * (pgd + apgd + exact)}).items()}


def bench_rest(device):
    """AutoAttack's iterations against the plain loop's; augmentation against per-image transforms on PIL."""
    torch.manual_seed(0)
    model = build_model("resnet8", 10).to(device)
    images = make_synthetic(test_per_class=1).train_images[:1000]
    x, batch = to_float(images[:128].to(device)), images.to(device)
    # right by definition, and eps 0 keeps it so: all points use all iterations
    y = FrozenCopy(model)(x).argmax(1)
    plain = functools.partial(plain_attack, model, x, y, 0.0, 2 / 255, 101)
    ours = functools.partial(autoattack, model, x, y, eps=0.0, attacks=("apgd-ce",))
    result = {"autoattack": speeds(len(x), timed({"plain": plain, "ours": ours}, 2, device))["ours"], "augment": {}}
    pictures = [TF.to_pil_image(image) for image in images]
    after = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    first = {"none": [], "ra": [v2.RandAugment(2, 8)], "aua": [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)]}
    for policy, ops in first.items():
        ours = functools.partial(augment, batch, policy, torch.Generator())
        plain = functools.partial(lambda f: [f(picture) for picture in pictures], v2.Compose([*ops, *after]))
        result["augment"][policy] = speeds(len(images), timed({"plain": plain, "ours": ours}, 3, device))["ours"]
    return result


def peak_bytes(device):
    """The most memory in use so far: the GPU's, or this process's; 0 where the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def stage_bench(cfg):
    """Measure the core against plain PyTorch on this machine; print the tables and write bench.json."""
    device, began, say = torch.device(cfg.device), time.perf_counter(), functools.partial(print, flush=True)
    on_cuda, path = device.type == "cuda", pathlib.Path(cfg.out or "runs/bench", "bench.json")
    tune_process(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = dict(environment(cfg), amp=cfg.amp, compile=cfg.compile, attack_steps=10 if on_cuda else 2)
    say(", ".join(f"{k} {v}" for k, v in header.items()))
    result = {"header": header, "attack": [], "train_step": [], "kernel": []}
    line = "{:<12}batch {batch:<4} {lever:<28} {images_per_s:10.1f} images/s {ratio:7.2f} x plain"
    for batch, levers, rounds in ((32, True, 5 if on_cuda else 3), (128, on_cuda, 5 if on_cuda else 2)):
        for name, rows in bench_core(cfg, device, batch, header["attack_steps"], rounds, levers).items():
            result[name] += rows
            say("\n".join(line.format(name, **row) for row in rows))
    best = {(k, row["batch"]): row["images_per_s"] for k in ("attack", "train_step") for row in result[k]}  # the last
    minutes = projected_minutes(best, header["attack_steps"], bench_forward(device))
    result["projected_minutes"] = minutes | {"total": sum(minutes.values())}
    parts = ", ".join(f"{name} {hms(60 * m)}" for name, m in result["projected_minutes"].items())
    say(f"projected   the paper's command, CIFAR-100 IR 10 ResNet-18: {parts}")
    peak = peak_bytes(device)
    for row in bench_kernel(device) if on_cuda else ():
        result["kernel"].append(row)
        say("kernel      {images} images  {what:<14} {us:9.1f} us {gb_per_s:8.0f} GB/s".format(**row))
    result |= bench_rest(device)
    say(f"autoattack  APGD iterations {result['autoattack']['ratio']:.2f} x a plain PGD loop's, resnet8")
    for policy, row in result["augment"].items():
        say(f"augment     {policy:<5} {row['images_per_s']:.0f} images/s, {row['ratio']:.1f} x v2 on PIL")
    a, b = (torch.randn(2048, 2048, device=device, dtype=AMP_DTYPE[cfg.amp]) for _ in "ab")
    rate = 2 * 2048**3 / timed({"matmul": functools.partial(torch.matmul, a, b)}, 5, device)["matmul"]
    # a step: forward and input gradient, 0.556 G multiply-adds each
    flop, fastest = 4 * 556e6 * header["attack_steps"], max(row["images_per_s"] for row in result["attack"])
    result |= dict(peak_mib=peak / 2**20, flop_per_image=flop, matmul_share=fastest * flop / rate)
    result["seconds"] = time.perf_counter() - began
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    share = f"{100 * result['matmul_share']:.0f} % of this machine's {cfg.amp} matmul rate"
    say(f"peak {result['peak_mib']:.0f} MiB, {share}, {hms(result['seconds'])}; see {path}")


# ==========================================================================================================
# 14  Main
# ==========================================================================================================


def teacher_phase(cfg, data):
    """The self-teacher: by default PGD-AT on D_B, the balanced resample of the set, drawn once per run."""
    ratio = data.counts[0] / data.counts[-1] if cfg.ir is None else cfg.ir
    gamma = max(1.0, ratio / 2) if cfg.gamma is None else cfg.gamma
    per_class = max(1, math.floor(gamma * min(data.counts)))
    indices, counts = torch.arange(len(data.train_labels)), data.counts
    if cfg.teacher_data == "balanced":
        drawn = balanced_indices(data.train_labels.cpu(), per_class, derive_seed(cfg.seed, "balanced"))
        indices, counts = torch.from_numpy(drawn), [per_class] * len(data.counts)
    shape = (cfg.teacher_epochs, cfg.teacher_batch_size)
    return Phase("teacher", cfg.teacher_method, *shape, indices, counts, False)


def student_phase(cfg, data):
    """The method itself on the whole long-tailed set."""
    everything = torch.arange(len(data.train_labels))
    return Phase("student", cfg.method, cfg.epochs, cfg.batch_size, everything, data.counts, True)


def stage_teacher(cfg, run, data):
    """Fit the self-teacher; its last epoch becomes teacher.pt, unless --teacher names one to copy."""
    if cfg.teacher:
        given = build_model(cfg.arch, len(data.classes), METHODS[cfg.teacher_method].head)
        epoch = load_weights(given, cfg.teacher)
        if not run.has("teacher"):
            digest = hashlib.sha256(pathlib.Path(cfg.teacher).read_bytes()).hexdigest()
            run.log(f"teacher: a copy of {cfg.teacher}, sha256 {digest}")
            run.save_model("teacher", given, epoch)
            return
        here = copy.deepcopy(given)
        load_weights(here, run.path / "teacher.pt")
        if not all(torch.equal(a, b) for a, b in zip(given.parameters(), here.parameters(), strict=True)):
            raise UserError(
                f"{run.path} has another teacher than {cfg.teacher}: choose another --out, or --overwrite it"
            )
    elif not run.has("teacher"):
        _train_and_save(cfg, run, data, teacher_phase(cfg, data), "teacher")


def _train_and_save(cfg, run, data, phase, name, teacher=None):
    head, tail = phase.counts[0], phase.counts[-1]
    run.log(f"{phase.name}: {phase.method} on {len(phase.indices)} images, {head} to {tail} a class")
    run.save_model(name, train(cfg, phase, data, run, teacher), phase.epochs)


def load_teacher(cfg, run, data):
    """The run's frozen teacher: images -> logits, of its evaluation head where it has one."""
    _need(run.path / "teacher.pt", "teacher")
    model = build_model(cfg.arch, len(data.classes), METHODS[cfg.teacher_method].head)
    load_weights(model, run.path / "teacher.pt")
    model = with_evaluation_head(model, teacher_phase(cfg, data).counts)
    frozen = FrozenCopy(model.to(cfg.device), AMP_DTYPE[cfg.amp])
    if cfg.compile == "on":
        frozen.speed_up(len(range(RANK, cfg.batch_size, WORLD)) * (1 if cfg.kd == "kl" else 2))
    return torch.no_grad()(frozen)


def stage_distill(cfg, run, data):
    """Train the student or a baseline: best.pt on the way, last.pt at the end."""
    if not run.has("last"):
        teacher = load_teacher(cfg, run, data) if METHODS[cfg.method].teacher else None
        _train_and_save(cfg, run, data, student_phase(cfg, data), "last", teacher)


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


class SavedState(dict):
    """AutoAttack's state on disk: what an interrupted evaluation of the same weights and data goes on from."""

    def __init__(self, path, key):
        super().__init__()
        self.path, self.key = path, key
        if path.exists():
            saved = read_checkpoint(path)
            if isinstance(saved, dict) and saved.get("key") == key and isinstance(saved.get("state"), dict):
                super().update(saved["state"])

    def __setitem__(self, name, found):
        super().__setitem__(name, found)
        write_atomic(self.path, {"key": self.key, "state": dict(self)}, rank=RANK)


def stage_eval(cfg, run, data):
    """Evaluate teacher, best and last, or --checkpoint, unless results.json has it for this threat; then the table.
    Returns (cfg, results) with what this Config asks for as their checkpoints."""
    paths = {name: run.path / f"{name}.pt" for name in ("teacher", "best", "last")}
    if not METHODS[cfg.method].teacher:
        del paths["teacher"]
    for name, path in paths.items():
        if not cfg.checkpoint:
            # with last.pt there, --stage distill has nothing to do and makes no best.pt
            again = "all --overwrite" if run.has("last") else "distill"
            _need(path, "teacher" if name == "teacher" else again)
    paths = {cfg.checkpoint: pathlib.Path(cfg.checkpoint)} if cfg.checkpoint else paths
    if METHODS[cfg.method].head == "cosine" and len(data.classes) > 10:  # RoBal's table shows both its heads
        paths |= {f"{name}, head as trained": path for name, path in paths.items()}
    settings = dict(eps=cfg.eval_eps / 255, step_size=cfg.eval_step_size / 255, steps=cfg.eval_steps)
    settings |= dict(tail=data.tail, seed=cfg.seed, amp=cfg.amp)
    about = dict(counts=data.counts, classes=data.classes, tail_classes=data.tail, test=len(data.test_labels))
    for name, path in paths.items():
        began, method = time.perf_counter(), cfg.teacher_method if name == "teacher" else cfg.method
        model = build_model(cfg.arch, len(data.classes), METHODS[method].head)
        epoch, digest = load_weights(model, path), f"{zlib.crc32(path.read_bytes()):08x}-{run.tests:08x}"
        counts = teacher_phase(cfg, data).counts if name == "teacher" else data.counts
        model = (model if name.endswith("as trained") else with_evaluation_head(model, counts)).to(cfg.device)
        if cfg.examples:
            file = run.path / f"examples-{path.stem}{'-as-trained' * name.endswith('as trained')}.png"
            threat = {k: settings[k] for k in ("eps", "step_size", "steps", "seed")}
            save_examples(file, FrozenCopy(model), data.test_images, data.test_labels, cfg.examples, run.log, **threat)
        there = evaluations(cfg, run.results())
        entry = there.get(name, {})
        entry = entry if entry.get("crc32") == digest else {"epoch": epoch, "crc32": digest}
        missing = [a for a in ATTACKS if a in cfg.attacks.split(",") and a not in entry]
        if not missing:
            continue  # and leave aa.pt to the checkpoint it belongs to
        key = f"{name} {digest} {run.fingerprint} {len(data.test_labels)} {cfg.amp} {RANK}/{WORLD}"
        state = SavedState(run.path / f"aa{RANK or ''}.pt", key)
        whose = f" (AutoAttack reports rank 0's share, one of {WORLD})" if WORLD > 1 and "aa" in missing else ""
        run.log(f"evaluating {name}: {', '.join(missing)}{whose}")
        options = dict(settings, attacks=missing, log=run.log, state=state)
        exact = FrozenCopy(model)
        nets = (exact if cfg.amp == "off" else FrozenCopy(model, AMP_DTYPE[cfg.amp]), exact)
        for net in set(nets) if cfg.compile == "on" else ():
            net.speed_up(EVAL_BATCH)
        entry |= evaluate(model, data.test_images, data.test_labels, nets=nets, **options)
        nets[0].runners.clear()
        key, new = evaluation_key(cfg), {**there, name: entry}
        if key != "checkpoints":
            key, new = "evaluations", {**run.results().get("evaluations", {}), key: new}
        run.save_results(config=asdict(cfg), environment=run.environment, data=about, **{key: new})
        state.path.unlink(missing_ok=True)
        spent = run.results().get("seconds", {}).get("eval", 0.0)
        run.set_seconds("eval", spent + time.perf_counter() - began)
    shown = {name: m for name, m in evaluations(cfg, run.results()).items() if name in paths}
    done = cfg, {**run.results(), "checkpoints": shown}
    run.log("\n" + table([done]), quiet=True)
    write_report([done], run.path, cfg.figures)
    return done


def work_ahead(cfg, run, data):
    """[(name, forward passes)] that this call still has to do: the plan behind the time estimate."""
    plan, tests = [], len(data.test_labels)
    wanted = ("teacher", "distill", "eval") if cfg.stage == "all" else (cfg.stage,)
    needs_teacher = METHODS[cfg.method].teacher
    for stage, phase in (("teacher", teacher_phase(cfg, data)), ("distill", student_phase(cfg, data))):
        done = run.has("teacher") or not needs_teacher if stage == "teacher" else run.has("last")
        if stage in wanted and not done and not (stage == "teacher" and cfg.teacher):
            first = (run.load_state(phase.name) or {"epoch": 0})["epoch"]
            plan.append((phase.name, (phase.epochs - first) * len(phase.indices) * phase.cost(cfg.steps)))
            if phase.select:
                epochs = phase.epochs + 1 - max(first + 1, selection_starts(phase.epochs))
                plan.append(("selection", epochs * tests * (3 * 20 + 2)))
    if "eval" in wanted:
        name = "evaluation without AutoAttack" if "aa" in cfg.attacks.split(",") else "evaluation"
        plan.append((name, (2 + needs_teacher) * tests * (3 * cfg.eval_steps + 2)))
    return plan


def tune_process(cfg):
    """Process-wide settings of a run. On CPUs with glibc, let malloc keep what it has: a network's activations are
    otherwise given back to the kernel and faulted in again, page by page, in every single step."""
    torch.backends.cudnn.benchmark = not cfg.deterministic
    if cfg.compile == "on":  # all networks share one forward; PyTorch's default keeps 8 versions of a function
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
    if cfg.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(cfg.device).index or 0)
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if cfg.device == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no mapping of its own below a GiB
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: give nothing back


def run_configs(cfg):
    """(parent folder, [scalar, resolved Config with its folder as `out`]) for what a command line asks for."""
    configs, parent = [resolve(one) for one in expand(cfg)], pathlib.Path(cfg.out or "runs")
    if len(configs) > 1 or not cfg.out:
        configs = [replace(one, out=str(parent / run_name(one))) for one in configs]
    return parent if len(configs) > 1 else pathlib.Path(configs[0].out), configs


def stage_runs(cfg, argv):
    """One run per element of the comma lists' product, then the table of all of them."""
    parent, configs = run_configs(cfg)
    done = [run_one(replace(one, figures=None) if len(configs) > 1 else one, argv) for one in configs]
    if len(done) > 1 and all(done):
        write_report(done, parent, cfg.figures)


def run_one(cfg, argv):
    """All that one scalar, resolved Config asks for; returns (cfg, results) where there is a table."""
    run = Run(cfg)
    with run.file:
        run.begin(argv)
        return carry_out(cfg, run)


def carry_out(cfg, run):
    """What run_one does in the folder that it has opened."""
    tune_process(cfg)
    if RANK:
        gather(None)  # rank 0 comes first, to fetch and unpack for all
    data = load_data(cfg)
    if not RANK:
        gather(None)
    run.fingerprint, run.tests = data.fingerprints()
    data = data.to(cfg.device)
    run.plan = work_ahead(cfg, run, data)
    if cfg.stage == "teacher" or (METHODS[cfg.method].teacher and (cfg.stage == "all" or cfg.teacher)):
        stage_teacher(cfg, run, data)
    if cfg.stage in ("distill", "all"):
        stage_distill(cfg, run, data)
    return stage_eval(cfg, run, data) if cfg.stage in ("eval", "all") else None


def stage_theory(cfg):
    """Print section 3 and appendix A in numbers, write them to theory.md where --out names a folder, and draw."""
    ratios = cfg.ir if isinstance(cfg.ir, tuple) else (cfg.ir,) if cfg.ir else (1, 2, 5, 10, 50)
    text = theory(ratios=ratios, seed=expand(cfg)[0].seed)
    print(text, flush=True)
    if cfg.out:
        pathlib.Path(cfg.out).mkdir(parents=True, exist_ok=True)
        write_atomic(pathlib.Path(cfg.out, "theory.md"), f"{text}\n")
    if cfg.figures:
        theory_figures(cfg.figures)


def main(argv=None) -> int:
    """The command line: one run per element of the comma lists' product. Returns the exit code: 0, 2 for an error of
    the user's (one line on stderr), 1 for one of ours, 128 + the number of a signal that has ended it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    kept = SIGNALS.install()
    try:
        join_group()
        cfg = parse_args(argv)
        if WORLD > 1 and cfg.stage not in ("all", "teacher", "distill", "train", "eval"):
            raise UserError(f"--stage {cfg.stage}: works in one process; start it with python, not torchrun")
        if cfg.figures:
            new_figure(1, 1)  # say now, not after days, that matplotlib is missing
        if cfg.stage == "theory":
            stage_theory(cfg)
        elif cfg.stage == "report":
            stage_report(cfg)
        elif cfg.stage == "bench":
            stage_bench(resolve(expand(cfg)[0]))
        else:
            stage_runs(cfg, argv)
        leave_group()
        return 0
    except BrokenPipeError:  # who reads our output (`| head`) has gone: end as if the signal had ended us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor complain of it at exit
        return 141
    except Stopped as stopped:
        if not RANK:
            print(f"ltsd: {stopped}", file=sys.stderr)
        return 128 + SIGNALS.number
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            error = UserError(f"out of memory ({error}): try smaller batches, a smaller --gamma or --train-limit")
        elif isinstance(error, OSError) and error.filename:
            error = UserError(f"{error.filename}: {error.strerror}; check this path and the rights to it")
        ours = not isinstance(error, UserError)
        hint = f"{type(error).__name__}, unexpected; --debug shows where: " if ours else ""
        if RANK or (ours and WORLD > 1):  # another rank's to tell, if torchrun ends this one in its sleep
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
            hint = f"rank {RANK}: {hint}"
        print(f"ltsd: error: {hint}{' '.join(str(error).split())}", file=sys.stderr)
        return 1 if ours else 2
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    for name in ("stdout", "stderr"):  # closed, or in an encoding without a folder's letters: neither ends a run
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    sys.exit(main())
