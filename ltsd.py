"""Long-Tailed Adversarial Training with Self-Distillation (ICLR 2025) in one file.

Adversarial training on long-tailed data leaves the rare classes defenceless. The paper's remedy, reproduced here: an
adversarially trained *self-teacher* is fitted on a class-balanced resample D_B of the long-tailed set D; the student,
trained adversarially on all of D with balanced softmax, distils from it. Section 3 is the method; `_ltsd` its loss.

    python ltsd.py --data synthetic                        # the whole pipeline on made-up images, on a CPU
    python ltsd.py --data cifar100 --ir 10 --stage all     # a row of the paper's Table 2: teacher, student, evaluation
    python ltsd.py --data cifar10 --method all             # Table 1: every method, one table
    python ltsd.py --data folder --data-dir DIR --ir 50    # your images: DIR/train/CLASS/*, DIR/test/CLASS/*
    python ltsd.py --stage report 'runs/*'                 # a table of what there is
    torchrun --nproc-per-node 4 ltsd.py ...                # any of them on four GPUs of this machine

Sections: 1 setup, 2 config, 3 the method, 4 step and attack, 5 training, 6 data, 7 models, 8 autoattack, 9 evaluation,
10 runs and report, 11 theory, 12 bench, 13 command line. Images are float32 in [0,1], NCHW, channels_last; labels are
int64; eps and step_size are fractions in the functions and 255ths on the command line. Importing changes nothing.
"""

# 1  Setup =============================================================================================================
import os

if __name__ == "__main__":
    # Threads that spin while they wait make a run ten times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import copy
import ctypes
import functools
import glob
import importlib
import io
import itertools
import json
import math
import pathlib
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections import OrderedDict
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
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the reference step takes over
    triton = None
try:
    import fcntl
except ImportError:  # Windows: no lock on run folders there
    fcntl = None

EVAL_BATCH = 500  # images scored at once
AUGMENT_GROUPS = 512  # independent draws of an augmentation policy in an epoch
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


class UserError(ValueError):
    """A mistake the user can mend: `main` prints its one line and returns 2."""


@contextlib.contextmanager
def blaming(what, kinds=Exception):
    """Inside, errors of these kinds become the UserError `what`, which says how to mend it."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({type(error).__name__}: {said})") from error


def derive_seed(seed, *words):
    """A 32-bit seed from the run's seed and a purpose, so that no two purposes share a random stream."""
    return zlib.crc32(repr((seed, *words)).encode())


# Several processes, each a "rank" of a group that torchrun started: only `main` changes these two, so that an import
# into somebody's distributed program gives the functions of one process.
RANK, WORLD = 0, 1


def show_progress(text=""):
    """Rewrite a terminal's progress line; without text, wipe it. In a pipe: nothing."""
    if sys.stderr.isatty() and not RANK:
        print(f"{text:<79}", end="\r", file=sys.stderr, flush=True)


def gather(value) -> list:
    """The value (CPU tensor, number, string, list, None) of every rank, in their order, after waiting for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def average_over_ranks(tensors):
    """Replace tensors of one dtype by their mean over the ranks, in one collective; nothing to do for one process."""
    if WORLD > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors]) / WORLD
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors)])


# 2  Config ============================================================================================================
def _flag(default, help, choices="", **meta):
    """A Config field. choices: words; meta: low, high (inclusive bounds), pattern; many: takes a comma list;
    identity=False: does not make a run another run; group: the heading in --help from here on."""
    return field(default=default, metadata=dict(meta, help=help, choices=choices.split()))


@dataclass(frozen=True)
class Config:
    """Every setting of a run, one field per flag. What is None here `resolve` fills from COMMON, DATASETS or, with
    --official, the method's row; a field that stands in none of them needs its default here."""

    # fmt: off
    data: str = _flag("cifar100", "data set", group="what")
    data_dir: str = _flag("data", "folder that holds, or will hold, the data", identity=False)
    image_size: int = _flag(None, "side of the images of --data folder (32)", low=16, high=512)
    ir: float = _flag(None, "imbalance n_max/n_min (10; cifar10 50, synthetic 20, folder as it is)", low=1, many=True)
    method: str = _flag("ltsd", "training method, or 'all'", many=True)
    arch: str = _flag(None, "network (resnet18; tinyimagenet preactresnet18, synthetic resnet8)")
    stage: str = _flag("all", "what to do", "all teacher distill train eval report theory bench", identity=False)
    aug: str = _flag("none", "RandAugment(2, 8) or AutoAugment before crop and flip", "none ra aua", many=True)
    alpha: float = _flag(None, "distillation weight after its ramp (40; synthetic 10)", group="method", many=True)
    tau: float = _flag(1.0, "strength of the class prior in balanced softmax, b_c = tau ln n_c")
    gamma: float = _flag(None, "D_B: floor(gamma n_min) images a class (IR/2, at least 1)", low=1e-6, many=True)
    beta: float = _flag(None, "weight of the KL term of trades, mart and robal (6)")
    kd: str = _flag("igdm", "distillation: indirect gradients, or KL of teacher to student at x'", "igdm kl")
    reat_tail: str = _flag("official", "reat's tail term: as released or as intended", "official intended")
    teacher: str = _flag(None, "checkpoint to use as the teacher (copied into the run)", identity=False)
    teacher_method: str = _flag("pgd-at", "teacher's method", "pgd-at at-bsl robal reat", many=True)
    teacher_data: str = _flag("balanced", "what the teacher sees: D_B, or all of D", "balanced full")
    official: bool = _flag(False, "the method's own published optimiser settings, if any for the data")
    epochs: int = _flag(None, "student epochs (100; synthetic 10)", group="optimiser", low=1)
    teacher_epochs: int = _flag(None, "teacher epochs (30, on all of D as --epochs; synthetic 6)", low=1)
    batch_size: int = _flag(None, "student batch size (128; synthetic 32)", low=1)
    teacher_batch_size: int = _flag(None, "teacher batch size (32, on all of D as --batch-size)", low=1)
    lr: float = _flag(None, "first learning rate of SGD (0.1)")
    milestones: str = _flag(None, "rising shares of the epochs, after each of which the rate drops tenfold (0.75,0.9)",
                            pattern=r"(0?\.\d+|1)(,(0?\.\d+|1))*")
    weight_decay: float = _flag(None, "weight decay (5e-4)")
    momentum: float = _flag(0.9, "momentum", high=1)
    eps: float = _flag(8.0, "L-inf radius of the training attack, in 255ths", group="threat", high=255)
    step_size: float = _flag(2.0, "step of the training attack, in 255ths", high=255)
    steps: int = _flag(10, "steps of the training attack")
    eval_eps: float = _flag(None, "L-inf radius of the evaluation, in 255ths (--eps)", high=255, identity=False)
    eval_step_size: float = _flag(2.0, "step of the evaluation's PGD, in 255ths", high=255, identity=False)
    eval_steps: int = _flag(20, "steps of the evaluation's PGD", identity=False)
    attacks: str = _flag(None, "what to evaluate, a comma list of clean, pgd, aa (all; synthetic clean,pgd)",
                         pattern="(clean|pgd|aa)(,(clean|pgd|aa))*", identity=False)
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N", group="machine", identity=False)
    amp: str = _flag("auto", "precision of the convolutions; auto: the fastest here", "auto bf16 off")
    compile: str = _flag("auto", "compile networks, on CUDA replay attacks as graphs; auto: on CUDA", "auto on off")
    seed: int = _flag(0, "seed of the weights, of D_B and of every other draw", group="run", many=True)
    out: str = _flag(None, "run folder (runs/NAME; with comma lists the parent of the run folders)", identity=False)
    overwrite: bool = _flag(False, "start afresh in a folder that holds a run", identity=False)
    checkpoint: str = _flag(None, "with --stage eval: score this file, not the run's own", identity=False)
    train_limit: int = _flag(None, "about this many training images, before the long-tail draw", low=1)
    test_limit: int = _flag(None, "about this many test images", low=1)
    examples: int = _flag(None, "evaluated images to save, clean and attacked, as a PNG grid", low=1, identity=False)
    figures: str = _flag(None, "folder for figures of the table or the theory (needs matplotlib)", identity=False)
    runs: tuple = _flag((), "run folders for --stage report, globs too (the run that these flags name)", identity=False)
    # fmt: on


# fmt: off
COMMON = dict(arch="resnet18", alpha=40.0, epochs=100, batch_size=128, teacher_epochs=30, teacher_batch_size=32,
              lr=0.1, beta=6.0, weight_decay=5e-4, milestones="0.75,0.9", attacks="clean,pgd,aa")
SMALL = dict(arch="resnet8", alpha=10.0, epochs=10, teacher_epochs=6, batch_size=32, attacks="clean,pgd")
DATASETS = {  # classes, image side, classes in the tail group, defaults of its own; `load_data` has the loaders
    "cifar10":      (10, 32, 1, dict(ir=50.0)),
    "cifar100":     (100, 32, 10, dict(ir=10.0)),
    "tinyimagenet": (200, 64, 20, dict(ir=10.0, arch="preactresnet18")),
    "folder":       (None, 32, None, {}),
    "synthetic":    (10, 32, 1, dict(ir=20.0, **SMALL)),
}
# fmt: on


# 3  The method ========================================================================================================
def balanced_indices(labels, per_class, seed) -> np.ndarray:
    """Draw the paper's D_B (section 4.2): exactly per_class positions of every class, each position floor or ceil times
    equally often. labels: int array [N] with classes 0..C-1; per_class: int >= 1. Large classes are thinned without
    replacement; small ones repeated whole, the remainder drawn without replacement. Returns int64 [C*per_class].
    ValueError for per_class < 1 or an empty class."""
    labels, rng, chosen = np.asarray(labels), np.random.default_rng(seed), []
    if per_class < 1 or per_class != int(per_class):
        raise ValueError(f"per_class {per_class}: must be a whole number of at least 1")
    for c in range(int(labels.max(initial=-1)) + 1):
        members = np.flatnonzero(labels == c)
        if not len(members):
            raise ValueError(f"class {c} has no image to resample")
        whole, rest = divmod(int(per_class), len(members))
        chosen += [np.tile(members, whole), rng.choice(members, rest, replace=False)]
    return np.concatenate(chosen or [np.empty(0, np.int64)])


def teacher_task(cfg, data):
    """The self-teacher's (Config, Data): the same training with settings of its own on D_B, drawn once per run with
    floor(gamma n_min) images of every class; on all of D where cfg.teacher_data is 'full' (Figure 5's other ones). The
    same at every call: a run's time estimate and the evaluation ask again."""
    cfg = replace(cfg, method=cfg.teacher_method, epochs=cfg.teacher_epochs, batch_size=cfg.teacher_batch_size)
    if cfg.teacher_data == "full":
        return cfg, data
    ratio = data.counts[0] / data.counts[-1] if cfg.ir is None else cfg.ir
    gamma = max(1.0, ratio / 2) if cfg.gamma is None else cfg.gamma
    per_class = max(1, math.floor(gamma * min(data.counts)))
    drawn = torch.from_numpy(balanced_indices(data.train_labels.cpu(), per_class, derive_seed(cfg.seed, "balanced")))
    images, labels = data.train_images[drawn], data.train_labels[drawn]
    return cfg, replace(data, train_images=images, train_labels=labels, counts=[per_class] * len(data.counts))


def _float32(*tensors):
    """Half precision as float32, the rest as it is: class priors and 1e-12 need the range."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _class_counts(counts, classes, like):
    """Training images per class as a tensor like `like`; ValueError for another number of them than classes."""
    counts = torch.as_tensor(counts).to(like)
    if list(counts.shape) != [classes]:
        raise ValueError(f"counts has shape {list(counts.shape)}: want one count for each of {classes} classes")
    return counts


def balanced_softmax_loss(logits, y, counts, tau=1.0) -> torch.Tensor:
    """Mean of -log softmax(z + b)[y] with b_c = tau ln n_c (eq. 1; Ren et al. 2020). logits: float [N,C]; y: int64 [N];
    counts: training images per class, C values >= 1. Uniform counts or tau 0 give plain cross-entropy. Returns a
    scalar; ValueError for counts of another length."""
    (logits,) = _float32(logits)
    return F.cross_entropy(logits + tau * _class_counts(counts, logits.shape[1], logits).log(), y)


def distillation_loss(student, teacher) -> torch.Tensor:
    """Mean KL(softmax(teacher) || softmax(student)); float logits [N,C], the teacher's detached."""
    student, teacher = _float32(student, teacher.detach())
    target = F.log_softmax(teacher, 1)
    return F.kl_div(F.log_softmax(student, 1), target, reduction="batchmean", log_target=True)


def igdm_loss(student_plus, student_minus, teacher_plus, teacher_minus) -> torch.Tensor:
    """Indirect gradient distillation: mean KL(softmax(T+ - T-) || softmax(S+ - S-)) (Lee et al. 2023). Arguments: float
    logits [N,C] of student and teacher at x+d (plus) and x-d (minus), d = x'-x: differences of logits stand for input
    gradients. The teacher's are detached; temperature 1. Returns a scalar >= 0."""
    plus, minus, *teacher = _float32(student_plus, student_minus, teacher_plus, teacher_minus)
    return distillation_loss(plus - minus, teacher[0] - teacher[1])


def trades_loss(logits, logits_adv, y, beta=6.0) -> torch.Tensor:
    """Mean CE(z(x), y) + beta * mean KL(p(x) || p(x')) (TRADES, Zhang et al. 2019); both sides carry gradient. logits,
    logits_adv: float [N,C] at x and x'; y: int64 [N]. beta 0 is cross-entropy. Returns a scalar."""
    logits, logits_adv = _float32(logits, logits_adv)
    clean, adv = F.log_softmax(logits, 1), F.log_softmax(logits_adv, 1)
    return F.cross_entropy(logits, y) + beta * F.kl_div(adv, clean, reduction="batchmean", log_target=True)


def mart_loss(logits, logits_adv, y, beta=6.0) -> torch.Tensor:
    """MART (Wang et al. 2020): boosted cross-entropy at x' plus a KL weighted by how unsure the network is of x,
    mean[CE(z(x'), y) - ln(1.0001 - p_k(x') + 1e-12)] + beta * mean[KL(p(x) || p(x')) * (1.0000001 - p_y(x))]. k: the
    most probable class of x' but y; the KL takes ln(p(x') + 1e-12). Arguments as in trades_loss."""
    logits, logits_adv = _float32(logits, logits_adv)
    clean, adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
    rival = adv.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(logits_adv, y) - (1.0001 - rival + 1e-12).log().mean()
    divergence = F.kl_div((adv + 1e-12).log(), clean, reduction="none").sum(1)
    return boosted + beta * (divergence * (1.0000001 - clean.gather(1, y[:, None])[:, 0])).mean()


def robal_loss(scores, scores_adv, y, counts, *, scale, margin, tau_b, tau_m, beta) -> torch.Tensor:
    """RoBal (Wu et al. 2021): CE of scale*(s(x') - m_y 1_y) + tau_b ln(n/N) plus beta * mean KL(p(x) || p(x')). scores,
    scores_adv: cosine scores [N,C] at x and x'; m_c = margin + tau_m/scale * ln(n_c/n_min), larger for frequent
    classes. The KL's softmaxes are of the unscaled scores, with ln(p(x') + 1e-12) and no detaching."""
    scores, scores_adv = _float32(scores, scores_adv)
    counts = _class_counts(counts, scores.shape[1], scores)
    margins = margin + tau_m / scale * (counts / counts.min()).log()
    shifted = scores_adv - margins * F.one_hot(y, len(counts))
    fit = F.cross_entropy(scale * shifted + tau_b * (counts / counts.sum()).log(), y)
    return fit + beta * F.kl_div((F.softmax(scores_adv, 1) + 1e-12).log(), F.softmax(scores, 1), reduction="batchmean")


def reat_class_weights(counts, predicted) -> torch.Tensor:
    """REAT's weights in its attack: w_c ~ 1 / (E_c + 1e-5), E_c = (1 - b^a)/(1 - b), b = (n_c - 1)/n_c, sum C. counts:
    training images n_c >= 1 [C]; predicted: a_c [C], how often the network predicted the class at x' in the epoch
    before. float64 inside, since 1 - b^a cancels. Returns float32 [C] (effective numbers, Cui et al. 2019)."""
    n, a = (torch.as_tensor(t).double() for t in (counts, predicted))
    b = (n - 1) / n
    weights = 1 / ((1 - b**a) * n + 1e-5)
    return (weights * len(n) / weights.sum()).float()


def reat_tail_loss(features, y, counts, variant="official") -> torch.Tensor:
    """REAT's tail term (Li et al. 2023): for each sample i of the tail third of the classes, over all j of the batch,
    s_ij W_ij KL(softmax f_i || softmax f_j), s = -1 within a class and +1 between, W = u_yi + u_yj, u_c = sqrt(N/n_c),
    f_i detached; mean over j and anchors; 0 without a tail sample. features: float [B,d]; y: int64 [B]. 'intended' is
    that; 'official' what the released code computes: its criterion averages over B and d before the signs and weights
    come in, so that one number per anchor remains. ValueError for another variant."""
    if variant not in ("official", "intended"):
        raise ValueError(f"variant {variant!r}: want 'official' or 'intended'")
    (features,) = _float32(features)
    counts = torch.as_tensor(counts).to(features)
    log_p, u = F.log_softmax(features, 1), (counts.sum() / counts).sqrt()[y]
    target, is_tail = log_p.detach(), (y > 2 * (len(counts) // 3)).to(features.dtype)
    divergence = (target.exp() * target).sum(1)[:, None] - target.exp() @ log_p.T  # [i,j] = KL(i || j)
    weights = (1 - 2 * (y[:, None] == y[None]).to(features.dtype)) * (u[:, None] + u[None])
    if variant == "official":
        divergence = divergence.mean(1, keepdim=True) / features.shape[1]
    per_anchor = (weights * divergence).mean(1)
    return (per_anchor * is_tail).sum() / is_tail.sum().clamp_min(1)


@contextlib.contextmanager
def awp_perturbation(model, loss_fn, gamma):
    """AWP (Wu et al. 2020): inside, every weight tensor w with more than one dimension is w + v, with v = gamma |w|
    g/|g| and g the gradient of loss_fn() at w; afterwards v is subtracted again. gamma 0 does nothing at all. The
    ascent's own forward leaves the model's buffers as they were. Frozen and unused weights stay; v is 0 where g is not
    finite, since NaN could not be subtracted again."""
    if not gamma:
        yield
        return
    named = [(n, p) for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1 and p.requires_grad]
    buffers, kept = list(model.buffers()), [buffer.clone() for buffer in model.buffers()]
    try:
        gradients = torch.autograd.grad(loss_fn(), [p for _, p in named], allow_unused=True)
    finally:
        torch._foreach_copy_(buffers, kept)
    weights, gradients = zip(*[(p, g) for (_, p), g in zip(named, gradients) if g is not None])
    average_over_ranks(gradients)
    ratios = [gamma * w.detach().norm() / (g.norm() + 1e-20) for w, g in zip(weights, gradients)]
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
    """What an outer loss may look at. student(x) -> logits, with_features=True: (logits, features), in train mode;
    teacher(x) -> logits, no gradient; a method's own setting is a Config field, read as cfg.NAME."""

    student: Callable
    x: torch.Tensor
    x_adv: torch.Tensor
    y: torch.Tensor
    counts: torch.Tensor  # training images per class
    cfg: Config
    alpha: float | torch.Tensor = 0.0  # this epoch's weight of the distillation; a tensor in a captured step
    teacher: Callable | None = None


# The outer losses, one for each row of METHODS: Batch -> (scalar, logits at x'). On CUDA they are captured as a graph,
# so no .item() and no `if` on tensors; AWP calls them twice.
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


def _at_bsl(b):
    logits = b.student(b.x_adv)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau), logits


def _pgd_at(b):
    logits = b.student(b.x_adv)
    return F.cross_entropy(logits, b.y), logits


def _trades(b, loss=trades_loss):
    logits, logits_adv = b.student(b.x), b.student(b.x_adv)
    return loss(logits, logits_adv, b.y, b.cfg.beta), logits_adv


def _robal(b):
    # RoBal-R's published constants: its CIFAR-10 row up to 10 classes, its CIFAR-100 row beyond
    constants = dict(margin=0.1, tau_b=1.5, tau_m=0.3) if len(b.counts) <= 10 else dict(margin=0.3, tau_b=0, tau_m=0)
    scores, scores_adv = b.student(b.x), b.student(b.x_adv)
    return robal_loss(scores, scores_adv, b.y, b.counts, scale=10.0, beta=b.cfg.beta, **constants), scores_adv


def _reat(b):
    logits, features = b.student(b.x_adv, with_features=True)
    tail = reat_tail_loss(features, b.y, b.counts, b.cfg.reat_tail)
    return balanced_softmax_loss(logits, b.y, b.counts, b.cfg.tau) + tail, logits


# What training attacks ascend: (logits at x', y, aux) -> a mean over the images. aux, a tensor or None, comes from the
# row's `aux`, once per batch.
def cross_entropy_objective(logits, y, aux=None):
    """Mean cross-entropy, what PGD ascends (Madry et al. 2018); aux is not used."""
    return F.cross_entropy(logits, y)


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
    objective: Callable | None = cross_entropy_objective  # what the training attack ascends; None: x' = x
    init: str = "gauss"  # where the attack starts
    aux: Callable = lambda frozen, x, counts, predicted: None  # -> the objective's third argument
    head: str = "linear"
    awp: float = 0.0  # gamma of the weight perturbation around the step
    teacher: bool = False  # needs the self-teacher
    low_precision: bool = True  # may the attack's convolutions be bf16? Not where the objective is flat at x
    official: dict = field(default_factory=dict)  # the method's own published settings ...
    official_data: tuple = ()  # ... and the data sets they were published for


# A row may be added from outside, as the README shows.
# Published settings: robust_overfitting's (pgd-at), the methods' own; RoBal's with an ordinary step decay.
# fmt: off
LT, RICE = ("cifar10", "cifar100"), dict(epochs=200, milestones="0.5,0.75")
METHODS = {
    "natural": Method(_pgd_at, objective=None),
    "pgd-at":  Method(_pgd_at, init="uniform", official_data=LT, official=RICE),
    # in bf16 TRADES' attack loses 6 % of its strength: next to x its gradient is small against the rounding
    "trades":  Method(_trades, kl_objective, low_precision=False, official_data=("cifar10",),
                      aux=lambda frozen, x, counts, predicted: F.log_softmax(frozen(x), 1),
                      official=dict(epochs=76, milestones="0.974", weight_decay=2e-4)),
    "mart":    Method(functools.partial(_trades, loss=mart_loss), official_data=("cifar10",),
                      official=dict(epochs=120, lr=0.01, weight_decay=3.5e-3, beta=5.0, milestones=".617,.742,.825")),
    "awp":     Method(_pgd_at, init="uniform", awp=0.01, official_data=LT, official=RICE),
    "robal":   Method(_robal, head="cosine", official_data=LT,
                      official=dict(epochs=80, milestones="0.75,0.9375", batch_size=64, weight_decay=2e-4)),
    "reat":    Method(_reat, weighted_objective, "uniform", official_data=LT,
                      aux=lambda frozen, x, counts, predicted: reat_class_weights(counts, predicted),
                      official=dict(epochs=80, milestones="0.75,0.9375")),
    "at-bsl":  Method(_at_bsl, official_data=(*LT, "tinyimagenet"), official=dict(milestones="0.74,0.89,0.99")),
    "ltsd":    Method(_ltsd, teacher=True, official_data=(*LT, "tinyimagenet")),
}
# fmt: on


# 4  Step and attack ===================================================================================================
# One step: x_adv <- clip to [0,1] of clip to [x-eps, x+eps] of (x_adv + step_size * sign(grad))
def pgd_step_reference(x_adv, grad, x, step_size, eps) -> torch.Tensor:
    """One L-inf PGD step in plain PyTorch: the truth that the kernel equals bit for bit. x_adv, x: float32 in [0,1],
    any shape; grad: that shape, any float dtype; step_size, eps: fractions of the pixel range. sign(0) and sign(NaN)
    are 0. Returns a new tensor."""
    sign = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
    moved = x_adv + step_size * sign
    projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return projected.clamp(0, 1)


if triton:

    @triton.jit
    def _pgd_step_kernel(adv_ptr, grad_ptr, x_ptr, low_ptr, n, step_size, eps, LOW: tl.constexpr, BLOCK: tl.constexpr):
        # All [n]: x_adv float32, overwritten; grad any float type; x float32; low any float type, written if LOW
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x_adv = tl.load(adv_ptr + offsets, mask=mask)
        grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask)
        step_size = tl.cast(step_size, tl.float32)  # Inductor hands floats over as float64
        eps = tl.cast(eps, tl.float32)
        sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
        moved = x_adv + step_size * sign
        projected = tl.minimum(tl.maximum(moved, x - eps), x + eps)
        result = tl.minimum(tl.maximum(projected, 0.0), 1.0)
        tl.store(adv_ptr + offsets, result, mask=mask)
        if LOW:
            tl.store(low_ptr + offsets, result.to(low_ptr.dtype.element_ty), mask=mask)


STEP_BLOCK = 1024  # 4 warps of 32 threads take 8 values each: two 16-byte float32 loads, one 16-bit one


def pgd_step(x_adv, grad, x, step_size, eps, out_low=None) -> torch.Tensor:
    """One L-inf PGD step in place on x_adv; also writes the copy that the next low-precision forward reads. x_adv, x:
    float32; grad: float32, bfloat16 or float16; out_low: None or one of those types; all of one shape, device and
    memory layout (contiguous or channels_last), of any size. A fused Triton kernel on CUDA, and on any device when
    TRITON_INTERPRET=1; else the reference. Returns x_adv. ValueError on a mismatch: the kernel walks memory, so that
    another layout would silently pair the wrong pixels."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    for name, t in {"x": x, "x_adv": x_adv, "grad": grad, "out_low": grad if out_low is None else out_low}.items():
        layout, wanted = ((list(u.shape), u.stride(), str(u.device)) for u in (t, x))
        if layout != wanted or not dense or t.dtype not in ((torch.float32,) if name[0] == "x" else AMP_DTYPE.values()):
            want = f"{wanted} without gaps; x, x_adv float32, the others float32, bf16 or fp16"
            raise ValueError(f"{name} is {t.dtype}, shape, strides, device {layout}: want {want}")
    if triton and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
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


class FrozenCopy(nn.Module):
    """What an attack needs of a Net and no more: eval mode, no parameter gradients, convolutions in `dtype`, each with
    the batch norm of its output folded in, float32 head. Images in [0,1] of any float dtype -> float32 logits. It
    follows its source when `refresh` is called, in place, so that compiled code and captured graphs, which `speed_up`
    adds for given batch sizes, see the new weights. Batches of any other size run as they are."""

    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.net, self.dtype = copy.deepcopy(model).eval().requires_grad_(False), dtype
        self.compiled, self.sizes, self.graphs, self.capture = None, (), {}, None
        modules = dict(model.named_modules())
        pairs = ((name, *pair) for name, module in modules.items() for pair in getattr(module, "folds", ()))
        folds = {f"{name}.{norm}".lstrip("."): f"{name}.{conv}".lstrip(".") for name, conv, norm in pairs}
        folds = {norm: conv for norm, conv in folds.items() if norm in modules}  # a shortcut may be empty
        for norm, conv in folds.items():
            own = self.net.get_submodule(conv)
            own.bias = nn.Parameter(own.weight.new_zeros(own.out_channels), requires_grad=False)
            self.net.set_submodule(norm, nn.Identity())
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                module.to(dtype)
        # what `refresh` reads, and where it goes
        self.norms, self.convs = [modules[n] for n in folds], [modules[n] for n in folds.values()]
        own, rest = [self.net.get_submodule(n) for n in folds.values()], model.state_dict(keep_vars=True)
        rest = {k: v for k, v in rest.items() if k.rpartition(".")[0] not in {*folds, *folds.values()}}
        copies, self.rest = self.net.state_dict(keep_vars=True), list(rest.values())
        self.targets = [conv.weight for conv in own] + [conv.bias for conv in own] + [copies[k] for k in rest]
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Take over the source's present weights and running statistics: w' = w s, b' = beta - mean s, with s = weight
        / sqrt(var + eps), for all layers in a handful of multi-tensor operations."""
        scale = torch._foreach_add([n.running_var for n in self.norms], [n.eps for n in self.norms])
        torch._foreach_sqrt_(scale)
        scale = torch._foreach_div([norm.weight for norm in self.norms], scale)
        shift = torch._foreach_mul([norm.running_mean for norm in self.norms], scale)
        shift = torch._foreach_sub([norm.bias for norm in self.norms], shift)
        sources = [conv.weight * s.view(-1, 1, 1, 1) for conv, s in zip(self.convs, scale)] + list(shift) + self.rest
        for kind in {t.dtype for t in self.targets}:  # a mixed list would lose the fused path
            pairs = [(t, v) for t, v in zip(self.targets, sources, strict=True) if t.dtype == kind]
            torch._foreach_copy_(*map(list, zip(*pairs)))
        return self

    def speed_up(self, *sizes):
        """Compile the forward for batches of these sizes; on CUDA also capture whole attacks as graphs."""
        self.compiled, self.sizes = torch.compile(self.net, dynamic=False), sizes
        self.capture = capture_cuda_graph if self.targets[0].is_cuda else None
        return self

    def forward(self, x):
        net = self.compiled if len(x) in self.sizes else self.net
        return net(x.to(self.dtype, memory_format=torch.channels_last))  # another layout would be another graph


def capture_cuda_graph(fn, inputs):
    """Warm fn up and capture fn(*inputs) as a CUDA graph -> (what replays it, its result)."""
    with torch.cuda.device(inputs[0].device):
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


def replayed(graphs, key, fn, inputs, capture, changed=tuple):
    """fn(*inputs) as a CUDA graph, captured when first called: one for each key (settings) and shape, so that an
    evaluation does not push out the training's. changed(): the tensors that fn updates, which capturing leaves as they
    were. The result is valid until the next replay."""
    key = (key, *(t.shape for t in inputs))
    if key not in graphs:
        buffers, kept = [t.clone() for t in inputs], [(t, t.clone()) for t in changed()]
        graphs[key] = (buffers, *capture(fn, buffers))
        for tensor, before in kept:
            tensor.copy_(before)
    buffers, replay, result = graphs[key]
    torch._foreach_copy_(buffers, list(inputs))
    replay()
    return result


@contextlib.contextmanager
def eval_mode(model):
    """Put a module into eval mode inside, and every submodule back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


def check_images(x, y, dtypes=(torch.float32,)):
    """Raise ValueError unless x is NCHW in [0,1] of one of `dtypes` and y int64 [N] on the same device."""
    said = [f"{t.dtype} {list(t.shape)} on {t.device}" if torch.is_tensor(t) else str(type(t)) for t in (x, y)]
    fits = torch.is_tensor(x) and x.ndim == 4 and x.dtype in dtypes
    if not fits or said[1] != f"torch.int64 [{len(x)}] on {x.device}":
        raise ValueError(f"want x {dtypes[0]} [N,C,H,W], y int64 [N] on its device; got {said[0]}, {said[1]}")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):  # a NaN fails both
        raise ValueError(f"x spans [{x.min():g}, {x.max():g}]: images must lie in [0,1]; divide by 255?")


def pgd_attack(model, x, y, *, eps, step_size, steps, init="uniform", objective=None, aux=None, generator=None):
    """L-inf PGD (Madry et al. 2018): signed gradient ascent of `objective` inside the eps-ball and [0,1]. model: any
    nn.Module with inputs in [0,1], run in eval mode and left as it was (mode, buffers, gradients); a Net is replaced by
    its FrozenCopy, a FrozenCopy taken as it is. x: float32 [N,C,H,W] in [0,1]; y: int64 [N]; eps, step_size: fractions
    of the pixel range, in [0,1]; steps >= 0. init: 'uniform' U(-eps,eps), 'gauss' 0.001*N(0,1) as in TRADES, or 'none';
    the start is clipped to the ball and to [0,1]. objective(logits, y, aux) -> scalar, default mean cross-entropy.
    generator: of the start noise, on x's device. Returns the last iterate, detached. ValueError for other input."""
    if not (0 <= eps <= 1 and 0 <= step_size <= 1 and steps >= 0 and init in ("uniform", "gauss", "none")):
        given = f"eps {eps}, step_size {step_size}, steps {steps}, init {init!r}"
        raise ValueError(f"{given}: want eps, step_size in [0,1] (divide by 255?), init uniform, gauss or none")
    context = contextlib.nullcontext(model)  # a FrozenCopy, the training loop's way in: nothing to check or protect
    if not isinstance(model, FrozenCopy):
        check_images(x, y)
        context = eval_mode(FrozenCopy(model) if isinstance(model, Net) else model)
        x = x.clone(memory_format=torch.contiguous_format)  # a view with gaps becomes a dense tensor
    x, noise = x.detach(), torch.zeros_like(x)
    if init == "uniform":
        noise.uniform_(-eps, eps, generator=generator)
    elif init == "gauss":
        noise.normal_(0, 1e-3, generator=generator)
    start = pgd_step_reference(x + noise, torch.zeros_like(x), x, 0.0, eps)
    settings = (objective or cross_entropy_objective, eps, step_size, steps)
    inputs = [x, y, start] + ([] if aux is None else [aux])
    with context as forward:
        fn = functools.partial(_ascend, forward, *settings)
        if getattr(forward, "capture", None) and len(x) in forward.sizes:
            return replayed(forward.graphs, settings, fn, inputs, forward.capture)
        return fn(*inputs)


def gradient_scale(net, count=1):
    """What an objective, a mean over `count` images, is multiplied with before its gradient is taken: fp16 flushes to
    zero what is below 6e-8, as a confident image's gradient is."""
    return 2.0**10 * count if getattr(net, "dtype", None) == torch.float16 else 1.0


def _ascend(forward, objective, eps, step_size, steps, x, y, start, aux=None):
    """The attack's steps from `start`; forward: images in its own `dtype` (default float32) -> float32 logits."""
    dtype, x_adv = getattr(forward, "dtype", torch.float32), start.clone()
    low = None if dtype == torch.float32 else x_adv.to(dtype)
    scale = gradient_scale(forward, len(x))
    for _ in range(steps):
        leaf = (x_adv if low is None else low).detach().requires_grad_()
        with torch.enable_grad():
            value = objective(forward(leaf), y, aux) * scale
        (grad,) = torch.autograd.grad(value, leaf)
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        pgd_step(x_adv, grad, x, step_size, eps, low)
    return x_adv


# 5  Training ==========================================================================================================
def lr_at(epoch, epochs, lr, milestones=(0.75, 0.9)) -> float:
    """The learning rate of an epoch (1 .. epochs): lr, a tenth of it after each milestone, a share of the epochs."""
    return lr * 0.1 ** sum(epoch > round(share * epochs, 6) for share in milestones)


def outer_step(row, batch, model, optimizer):
    """The optimiser's step on a batch; returns (loss, logits at x'), detached. Under torchrun every rank steps with the
    mean gradient and goes on with the mean running statistics, so that all attack one network."""
    model.train()
    with awp_perturbation(model, lambda: row.loss(batch)[0], row.awp):
        loss, logits = row.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        average_over_ranks([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    average_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])
    return loss.detach(), logits.detach()


def training_nets(cfg, model):
    """(student, frozen): the network as the outer loss calls it, in autocast, and its copy for the training attack.
    Compiled for whole batches only. The model itself stays as it is: what is saved has no trace of the compiler."""
    size = cfg.batch_size // WORLD
    frozen = FrozenCopy(model, AMP_DTYPE[cfg.amp] if METHODS[cfg.method].low_precision else torch.float32)
    compiled = torch.compile(model, dynamic=False) if cfg.compile == "on" else model
    if cfg.compile == "on":
        frozen.speed_up(size)

    @torch.autocast(torch.device(cfg.device).type, AMP_DTYPE[cfg.amp], enabled=cfg.amp != "off")
    def student(x, **options):
        return (compiled if len(x) == size else model)(x, **options)

    return student, frozen


def training_step(cfg, model, student, counts, teacher, capture):
    """(optimizer, step): SGD, and a function (x, x_adv, y, alpha, lr) -> outer_step's result. With `capture`, in one
    process, it is a CUDA graph for whole batches: at batch 32 the host would need longer than the device."""
    options, graphs = dict(weight_decay=cfg.weight_decay, fused=counts.is_cuda), {}
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr, cfg.momentum, **options)
    if capture:  # momentum stays where the graph looks for it; zero is the same as none
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()})

    def changed():
        return [*model.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())]

    def eager(x, x_adv, y, alpha, lr):
        optimizer.param_groups[0].update(lr=lr, fused=x.is_cuda)  # a saved state may be another device's
        batch = Batch(student, x, x_adv, y, counts, cfg, alpha, teacher)
        return outer_step(METHODS[cfg.method], batch, model, optimizer)

    def step(x, x_adv, y, alpha, lr):
        if not capture or WORLD > 1 or len(x) != cfg.batch_size:
            return eager(x, x_adv, y, alpha, lr)
        inputs = x, x_adv, y, *(torch.full((), number, device=x.device) for number in (alpha, lr))
        return replayed(graphs, cfg.method, eager, inputs, capture, changed)

    return optimizer, step


def train(name, cfg, data, run, teacher=None) -> nn.Module:
    """Train a Net as cfg says on `data`, going on from the run's state.pt where that holds a training of this name.

    name: 'teacher' or 'student'; data: Data on the training device; run: Run; teacher: images -> logits. Saves state.pt
    as it goes, the student's best.pt whenever a better epoch is saved, and teacher.pt or last.pt at the end. Every
    epoch draws from generators of its own, so that a run that goes on needs no state of a generator. UserError when the
    loss is no longer finite; what was saved before stays.

    Under torchrun the ranks share batches as DistributedSampler would: equal shares, the last batch filled up from the
    epoch's first images. Batch statistics, and terms that pair the images of a batch (REAT's), are a share's own."""
    row, device = METHODS[cfg.method], data.train_images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(cfg.seed, name, "weights"))
        model = build_model(cfg.arch, len(data.classes), row.head).to(device)
    counts = torch.tensor(data.counts, dtype=torch.float32, device=device)
    # what is true after the last complete epoch; `predicted`: how often it predicted each class at x'
    at = {"epoch": 0, "seconds": 0.0, "score": -1.0, "best": None, "predicted": counts.double().cpu()}
    student, frozen = training_nets(cfg, model)
    optimizer, optimise = training_step(cfg, model, student, counts, teacher, frozen.capture)
    at = run.load_state(name, at, model, optimizer)
    nets = scoring_nets(model, cfg, data.counts) if name == "student" else ()
    threat = dict(eps=cfg.eps / 255, step_size=cfg.step_size / 255, steps=cfg.steps, objective=row.objective)
    milestones, saved, cost = [float(share) for share in cfg.milestones.split(",")], -math.inf, 0.0
    run.log(f"{name}: {cfg.method} on {len(data.train_labels)} images, {data.counts[0]} to {data.counts[-1]} a class")
    first = at["epoch"] + 1
    for epoch in range(first, cfg.epochs + 1):
        began, lr = time.perf_counter(), lr_at(epoch, cfg.epochs, cfg.lr, milestones)
        draws = torch.Generator().manual_seed(derive_seed(cfg.seed, name, epoch))
        noise = torch.Generator(device).manual_seed(derive_seed(cfg.seed, name, epoch, "noise", RANK))
        order = torch.randperm(len(data.train_labels), generator=draws)
        order = torch.cat([order, order[: -len(order) % WORLD]]).to(device)
        images, labels = augment(data.train_images[order], cfg.aug, draws), data.train_labels[order]
        sums, predicted = torch.zeros(2, device=device), torch.zeros_like(counts)  # of loss and hits; per class
        before, steps = at["predicted"].to(device), math.ceil(len(order) / cfg.batch_size)
        for step in range(1, steps + 1):
            share = slice((step - 1) * cfg.batch_size + RANK, step * cfg.batch_size, WORLD)
            x, y = to_float(images[share]), labels[share]
            frozen.refresh()
            aux, x_adv = torch.no_grad()(row.aux)(frozen, x, counts, before), x
            if row.objective:
                x_adv = pgd_attack(frozen, x, y, init=row.init, aux=aux, generator=noise, **threat)
            loss, logits = optimise(x, x_adv, y, cfg.alpha * epoch / cfg.epochs, lr)
            guess = logits.argmax(1)
            sums += torch.stack([loss * len(y), (guess == y).sum()])
            predicted.index_add_(0, guess, torch.ones_like(guess, dtype=predicted.dtype))
            seen = min(step * cfg.batch_size, len(order))
            # seldom: reading the device's sums waits for it
            if step % 50 == 0 or step == steps or (epoch == first and step in (1, 5)):
                total, hits = map(sum, zip(*gather(sums.tolist())))
                if not math.isfinite(total):  # a NaN stays in a sum
                    where = f"{name}, epoch {epoch}, up to step {step}"
                    raise UserError(f"the loss was not finite ({where}): try a lower --lr; what was saved stays")
                run.estimate(step, seen)
                rate = seen / (time.perf_counter() - began)
                eta = timedelta(seconds=round(((cfg.epochs - epoch + 1) * len(order) - seen) / rate))
                show_progress(f"{name} {epoch}/{cfg.epochs} loss {total / seen:.3f}  {rate:.0f} img/s  ETA {eta}")
        show_progress()
        at |= dict(epoch=epoch, seconds=at["seconds"] + time.perf_counter() - began)
        at["predicted"] = sum(gather(predicted.double().cpu()))
        line = f"{name} {epoch:>4}/{cfg.epochs:<4} lr {lr:<7.2g} loss {total / len(order):8.4f}  train"
        line += f" {100 * hits / len(order):6.2f}  {at['seconds'] / epoch:7.1f} s/epoch"
        if name == "student" and epoch > cfg.epochs - math.ceil(cfg.epochs / 4):
            line += select(cfg, data, model, epoch, at, nets)
        run.log(line)
        # after every epoch, but for not more than a fiftieth of the time
        if epoch == cfg.epochs or time.perf_counter() - saved > 50 * cost:
            began = time.perf_counter()
            run.save_state(name, at, model, optimizer)
            saved = time.perf_counter()
            cost = saved - began
    run.save_model("teacher" if name == "teacher" else "last", weights_of(model), cfg.epochs)
    run.save_results(name, at["seconds"])
    return model


def select(cfg, data, model, epoch, at, nets):
    """Evaluate on the test set and keep a strictly better model in at["best"]; returns the row's last columns."""
    rule = "pgd" if METHODS[cfg.method].objective else "clean"
    options = dict(tail=data.tail, eps=cfg.eps / 255, seed=cfg.seed, nets=[net.refresh() for net in nets])
    result = evaluate(model, data.test_images, data.test_labels, **options)
    better = result[rule] > at["score"]
    if better:
        at |= {"score": result[rule], "best": {"epoch": epoch, "weights": weights_of(model)}}
    return f"  test clean {result['clean']:6.2f}  pgd {result['pgd']:6.2f}" + ("  *" if better else "")


# 6  Data ==============================================================================================================
@dataclass
class Data:
    """A training and a test set: uint8 NCHW images, int64 labels, class 0 the most frequent: where classes differ in
    size the loader sorts them, as load_folder does."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    counts: list = ()  # training images per class
    tail: list = ()  # the classes of the tail group

    def crc32(self, part):
        """Checksum of the 'train' or the 'test' images and labels."""
        tensors = [getattr(self, f"{part}_{what}").cpu().contiguous().numpy() for what in ("images", "labels")]
        return f"{zlib.crc32(tensors[1], zlib.crc32(tensors[0])):08x}"

    def to(self, device):
        """The same data with its four tensors on `device`."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})


def to_float(images_u8):
    """uint8 NCHW -> float32 in [0,1], channels_last."""
    return images_u8.to(torch.float32, memory_format=torch.channels_last).div_(255)


def long_tail_counts(n_max, num_classes, ir) -> list:
    """Images per class of the exponential profile: int(n_max * ir**(-c/(C-1))), class 0 the head, C-1 the tail. n_max,
    num_classes: int >= 1; ir: imbalance ratio n_max/n_min >= 1 (1 keeps all). Truncated, not rounded, as in the LDAM
    generator that RoBal, REAT and AT-BSL share. ValueError where a class would be empty."""
    if not ir >= 1 or num_classes < 1 or n_max * ir**-1.0 < 1:
        raise ValueError(f"n_max {n_max}, {num_classes} classes, imbalance ratio {ir}: want ir >= 1 and no empty class")
    return [int(n_max * ir ** (-c / max(num_classes - 1, 1))) for c in range(num_classes)]


def long_tail_indices(labels, counts) -> np.ndarray:
    """Positions of the long-tailed subset, class by class: on CIFAR the very images of RoBal, REAT and AT-BSL. labels:
    int array [N]; counts: images wanted per class. NumPy's legacy generator, seeded 0, shuffles each class's ascending
    positions in turn; the first n_c stay. Returns int64 [sum(counts)] and touches no global generator. ValueError where
    a class has too few images."""
    labels, rng, chosen = np.asarray(labels), np.random.RandomState(0), [np.empty(0, np.int64)]
    for c, wanted in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if not 0 <= wanted <= len(members):
            raise ValueError(f"class {c} has {len(members)} images, {wanted} are wanted: lower n_max or ir")
        rng.shuffle(members)
        chosen.append(members[:wanted])
    return np.concatenate(chosen).astype(np.int64)


def augment(images_u8, policy, generator) -> torch.Tensor:
    """Augment a whole epoch at once: the policy, then a zero-pad-4 random crop, then a flip with p = 0.5, as AT-BSL.
    images_u8: uint8 [N,3,H,W], any device, not changed. policy: 'none', 'ra' (torchvision's RandAugment(2, 8)) or 'aua'
    (its AutoAugment, CIFAR-10 policy). generator: a CPU torch.Generator, the only source of randomness. Returns a new
    uint8 [N,3,H,W] on the same device. Crop and flip are drawn for each image; the policy for each of AUGMENT_GROUPS
    groups, group k being images k, k + AUGMENT_GROUPS, ...: every image has torchvision's law, and two images of a
    batch of up to AUGMENT_GROUPS share no draw. ValueError: unknown policy, another dtype or shape."""
    transforms = {"none": None, "ra": v2.RandAugment(2, 8), "aua": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)}
    if policy not in transforms or images_u8.dtype != torch.uint8 or images_u8.ndim != 4:
        given = f"{policy!r}, images {images_u8.dtype} {list(images_u8.shape)}"
        raise ValueError(f"policy {given}: want one of {', '.join(transforms)}, and uint8 [N,3,H,W]")
    (n, _, height, width), device, pad = images_u8.shape, images_u8.device, 4
    if transforms[policy]:
        images_u8 = images_u8.clone()
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
            for k in range(min(n, AUGMENT_GROUPS)):
                images_u8[k::AUGMENT_GROUPS] = transforms[policy](images_u8[k::AUGMENT_GROUPS])
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator).to(device)
    flip = torch.randint(2, (n,), generator=generator).to(device).bool()
    windows = F.pad(images_u8, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # [N,3,9,9,H,W], a view
    cut = windows[torch.arange(n, device=device), :, top, left]  # [N,3,H,W]
    column = torch.arange(width, device=device)
    column = torch.where(flip[:, None], column.flip(0), column)  # [N,W]
    return cut.gather(3, column[:, None, None].expand_as(cut))


def load_data(cfg) -> Data:
    """The long-tailed training set and the test set of a resolved Config, as CPU tensors."""
    loaders = dict(synthetic=make_synthetic, tinyimagenet=functools.partial(load_tinyimagenet, cfg.data_dir))
    loaders["folder"] = functools.partial(load_folder, cfg.data_dir, cfg.image_size)
    data = loaders.get(cfg.data, functools.partial(load_cifar, cfg.data, cfg.data_dir))()
    data.train_images, data.train_labels = _limited(data.train_images, data.train_labels, cfg.train_limit)
    data.test_images, data.test_labels = _limited(data.test_images, data.test_labels, cfg.test_limit)
    available = np.bincount(data.train_labels)
    data.counts = available.tolist()
    if cfg.ir is not None:  # the largest profile that every class can fill
        sizes = (n for n in range(int(available[0]), 0, -1) if n * cfg.ir**-1.0 >= 1)
        profiles = (long_tail_counts(n_max, len(available), cfg.ir) for n_max in sizes)
        data.counts = next((counts for counts in profiles if np.all(counts <= available)), None)
        if not data.counts:
            raise UserError(f"--ir {cfg.ir:g}: the classes have {available.tolist()} images, too few for this ratio")
    chosen = torch.from_numpy(long_tail_indices(data.train_labels, data.counts))
    data.train_images, data.train_labels = data.train_images[chosen], data.train_labels[chosen]
    tail = DATASETS[cfg.data][2] or max(1, len(data.classes) // 10)
    data.tail = list(range(len(data.classes) - tail, len(data.classes)))
    return data


def _limited(images, labels, limit):
    """About `limit` images: the same share of every class but at least one image, by a fixed seed."""
    if limit is None or limit >= len(labels):
        return images, labels
    rng, members = np.random.default_rng(0), [np.flatnonzero(labels == c) for c in range(int(labels.max()) + 1)]
    index = np.sort(np.concatenate([rng.permutation(m)[: max(1, len(m) * limit // len(labels))] for m in members]))
    return images[index], labels[index]


def load_cifar(name, data_dir) -> Data:
    """'cifar10' or 'cifar100' as published, by torchvision: fetched into data_dir when absent, md5s checked."""
    cls = getattr(torchvision.datasets, name.upper())
    with blaming(f"could not fetch {cls.filename}: put it into {data_dir} by hand, or try --data synthetic"):
        parts = [cls(data_dir, train=train, download=True) for train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return Data(images[0], labels[0], images[1], labels[1], parts[0].classes)


TINY = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")  # and its md5


def load_tinyimagenet(data_dir) -> Data:
    """Tiny-ImageNet from the official zip, fetched and unpacked by torchvision when absent; classes are the sorted
    wnids. The test set is the official validation set, labelled by val_annotations.txt."""
    root = pathlib.Path(data_dir, "tiny-imagenet-200")
    with blaming(f"could not fetch or read {root}.zip: put it into {data_dir} by hand, or try --data synthetic"):
        if not (root / "val" / "val_annotations.txt").exists():
            download_and_extract_archive(TINY[0], data_dir, md5=TINY[1])
        train = torchvision.datasets.ImageFolder(root / "train")
        lines = [line.split() for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
        test = [(str(root / "val" / "images" / line[0]), train.class_to_idx[line[1]]) for line in lines]
    return _read_images(train.samples, test, train.classes, 64, root / ".ltsd.pt")


def load_folder(data_dir, size) -> Data:
    """Images of data_dir/train/CLASS/ and data_dir/test/CLASS/ (or val/), as torchvision's ImageFolder finds them.
    Classes are ordered by training count, most frequent first, ties by name. UserError for another layout."""
    root = pathlib.Path(data_dir)
    with blaming(f"--data-dir {data_dir}: want DIR/train/CLASS/* and DIR/test/CLASS/*", OSError):
        test = root / ("test" if (root / "test").is_dir() else "val")
        parts = [torchvision.datasets.ImageFolder(folder) for folder in (root / "train", test)]
    names = parts[0].classes
    if names != parts[1].classes or len(names) < 2:
        odd = sorted({*names} ^ {*parts[1].classes}) or names
        raise UserError(f"--data-dir {data_dir}: train and test need the same classes, two or more; unlike: {odd[:5]}")
    order = np.argsort(-np.bincount(parts[0].targets), kind="stable")
    new_label = np.argsort(order).tolist()
    samples = [[(path, new_label[label]) for path, label in part.samples] for part in parts]
    return _read_images(*samples, [names[i] for i in order], size, root / f".ltsd-{size}.pt")


def _read_images(train, test, classes, size, cache) -> Data:
    """Decode lists of (path, label): the centre square of each image, scaled to `size`. Decoded tensors are kept in the
    file `cache`, which is made again when an image is added, removed or changed."""
    with blaming(f"an image beside {cache} is gone: mend or remove its link, or unpack the data again", OSError):
        key = zlib.crc32(repr([(path, label, *os.stat(path)[6:9:2]) for path, label in train + test]).encode())
    with contextlib.suppress(Exception):  # a missing or broken cache is made again
        saved = torch.load(cache, weights_only=True)
        if saved.pop("key") == key:
            return Data(**saved)

    def decode(sample):
        with blaming(f"{sample[0]} is not a readable image: remove or replace it"), Image.open(sample[0]) as image:
            # fit cuts before it scales: a long strip does not fill the memory
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR))

    parts = []
    for samples in (train, test):
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(decode, samples)))
        parts += [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([c for _, c in samples])]
    data = Data(*parts, classes)
    with contextlib.suppress(UserError):  # data on a read-only drive: no cache
        write_atomic(cache, {"key": key, **vars(data)})
    return data


def make_synthetic(train_per_class=160, test_per_class=25, classes=10, size=32) -> Data:
    """Images made on the spot that behave like photographs under attack, the same on every machine. Each class has a
    coarse grating of its own wavelength and orientation, strong enough to survive eps 8/255 but overlaid by those of
    other classes, and a fine one so faint that an attack can wipe it out, yet enough for a naturally trained network to
    decide by. Phases are random, so that a crop changes nothing."""
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


# 7  Models ============================================================================================================
# Parameter names are those of the public CIFAR checkpoints. `folds` lists a module's pairs of a convolution and the
# batch norm of its output alone: a FrozenCopy folds those.
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
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).add_(self.shortcut(x))
        return F.relu(out, inplace=True)


class PreActBlock(nn.Module):
    """The pre-activation block: bn-relu-conv-bn-relu-conv plus a shortcut. Where the shape changes, the shortcut is a
    bare 1x1 convolution of the activated input."""

    folds, projection = (("conv1", "bn2"),), "shortcut"

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, cout, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), _conv(cout, cout, 3)
        self.projects = stride != 1 or cin != cout
        if self.projects:
            conv = _conv(cin, cout, 1, stride)
            self.add_module(self.projection, nn.Sequential(conv) if self.projection == "shortcut" else conv)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = getattr(self, self.projection)(out) if self.projects else x
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


class Net(nn.Sequential):
    """Stem, stages of blocks, global average pool, head: images float [N,3,H,W] in [0,1] -> float32 logits. Pool and
    head are float32 whatever the convolutions are: with bf16 logits many samples would get no gradient."""

    def forward(self, x, with_features=False):
        """Logits [N,C], or with_features: (logits, pooled features [N,d]); all float32 (float64 for float64)."""
        *body, head = self.children()
        for module in body:
            x = module(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # x.mean((2, 3)) with a gradient that stays channels_last
        features = pixels.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = head(features)
        return (logits, features) if with_features else logits


# fmt: off
ARCHS = {  # block, blocks of each stage, channels of stem and stages (all but the first halve the image), stage names
    "resnet18":       (BasicBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512), "layer{}"),
    "preactresnet18": (PreActBlock, (2, 2, 2, 2), (64, 64, 128, 256, 512), "layer{}"),
    "wrn34-10":       (WideBlock, (5, 5, 5), (16, 160, 320, 640), "block{}"),
    "resnet8":        (BasicBlock, (1, 1, 1), (16, 16, 32, 64), "layer{}"),
}
# fmt: on


def build_model(arch, num_classes, head="linear") -> nn.Module:
    """A freshly initialised Net of ARCHS, channels_last, no input normalisation inside. num_classes >= 2; head:
    'linear' or 'cosine' (RoBal). Draws from torch's global generator: seed it, or wrap the call in
    torch.random.fork_rng. ValueError for an unknown name."""
    if arch not in ARCHS or head not in ("linear", "cosine") or num_classes < 2:
        raise ValueError(f"no {arch!r} with {head!r} head, {num_classes} classes; arch: {', '.join(ARCHS)}")
    block, blocks, widths, stage = ARCHS[arch]
    parts, wide = {"conv1": _conv(3, widths[0], 3)}, block is WideBlock
    if block is BasicBlock:
        parts |= {"bn1": nn.BatchNorm2d(widths[0]), "relu": nn.ReLU(inplace=True)}
    for i, (depth, cin, cout) in enumerate(zip(blocks, widths, widths[1:]), 1):
        layers = nn.Sequential(*(block(cout if j else cin, cout, 2 if i > 1 and j == 0 else 1) for j in range(depth)))
        parts[stage.format(i)] = nn.Sequential(OrderedDict(layer=layers)) if wide else layers
    if block is not BasicBlock:
        parts |= {"bn1" if wide else "bn": nn.BatchNorm2d(widths[-1]), "relu": nn.ReLU()}
    parts["fc" if wide else "linear"] = (nn.Linear if head == "linear" else CosineHead)(widths[-1], num_classes)
    net = Net(OrderedDict(parts))
    net.folds = (("conv1", "bn1"),) if block is BasicBlock else ()
    for module in net.modules() if wide else ():  # as published; the others keep PyTorch's initialisation
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return net.to(memory_format=torch.channels_last)


def weights_of(model):
    """A CPU copy of a module's state_dict, as a plain dict."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def weights_crc32(model):
    """Checksum of all weights and statistics: the same for the same network, whatever file it came from."""
    return f"{zlib.crc32(b''.join(t.contiguous().numpy().tobytes() for t in weights_of(model).values())):08x}"


def read_checkpoint(path):
    """A file of tensors and plain values; UserError where it is missing, damaged, foreign or holds code."""
    with blaming(f"{path} is no checkpoint that can be read: train first, or name another"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle, beside our one line
        return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(model, path):
    """Load a checkpoint, ours or one of TRADES, AT-BSL and kin, into a Net; returns its epoch or None. Accepts a bare
    state_dict or one under 'state_dict', 'model' or 'net', prefixes 'module.' and '_orig_mod.', and the unused
    'sub_block1' of public WRNs. UserError where names or shapes do not fit, or weights are not finite."""
    saved = read_checkpoint(path)
    weights = next((saved[k] for k in ("state_dict", "model", "net") if isinstance(saved, dict) and k in saved), saved)
    if not isinstance(weights, dict) or not all(torch.is_tensor(v) for v in weights.values()):
        raise UserError(f"{path} holds no state_dict: want one, bare or under 'state_dict', 'model' or 'net'")
    weights = {str(k).replace("module.", "").replace("_orig_mod.", ""): v for k, v in weights.items()}
    weights = {k: v for k, v in weights.items() if not k.startswith("sub_block1")}
    if not all(v.isfinite().all() for v in weights.values()):
        raise UserError(f"{path} holds NaN or infinite weights, of a training that diverged: name another")
    with blaming(f"{path} does not fit the network: check --arch, --data and --method", RuntimeError):
        model.load_state_dict(weights)
    return saved.get("epoch") if isinstance(saved.get("epoch"), int) else None


# 8  AutoAttack ========================================================================================================
# Own code from the papers: arXiv 2003.01690 (APGD), 1907.02044 (FAB), 1912.00049 (Square); maximum norm only.
# An attack is a small class: the `net` that says whether an image fools, its `targets` (how often a point may be tried,
# at most classes - 1), the `evaluations` that end a lane, start(lane) and advance(lane) -> (scored images, bool: which
# of them fool). A lane is one job (point, target): row i of every tensor in the dict `lane`, with its own counter
# lane["step"][i]; make_lane gives key (of the random draws), step, x0, y, target, and start adds its own, among them
# "best", the most promising image. run_lanes() owns the batch; where `net` is not the exact network, it has every
# success confirmed by that one and gives a lane that fails a last look at its best. A lane that ends is refilled at
# once, so that the batch stays full until the jobs run out; then it shrinks. A fifth attack: append its name, whose
# place seeds its draws, and add it to `made` in autoattack().
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
FLOATS = (torch.float32, torch.float64)


# Every random draw is a hash of (seed, attack, point, target, iteration, number): it depends neither on the batch a
# point sits in nor on the device. int64 products wrap; masking off the sign's copies makes the shifts logical.
def hash64(z):
    """splitmix64's output function, element by element. int64 in, int64 out (all 64 bits used)."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def random_bits(key, count):
    """int64 [N] keys -> int64 [N, count] independent words."""
    # the number is splitmix64's increment
    return hash64(hash64(key)[:, None] + torch.arange(1, count + 1, device=key.device) * -0x61C8864680B583EB)


def image_like(rows, x):
    """[N] -> [N, 1, 1, 1] to broadcast against x, or [N] where x is [N]."""
    return rows.view(-1, *[1] * (x.dim() - 1))


def replace_rows(lane, rows, **new):
    """lane[name][i] = new[name][i], in new tensors, for the rows i that the bool [N] `rows` marks."""
    for name, value in new.items():
        lane[name] = torch.where(image_like(rows, value), value, lane[name])


def margin(logits, y):
    """z_y - max of the others, [N]."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return logits.gather(1, y[:, None])[:, 0] - others


def is_fooled(logits, y, near=0.0):
    """bool [N]: another class beats y, by more than the rounding that an image shows when its batch changes shape, so
    that the verdict survives re-scoring. NaN logits never count. near: claim what misses by this share of the largest
    logit, too, for another network to decide."""
    return margin(logits, y) < (near - 100 * torch.finfo(logits.dtype).eps) * logits.abs().amax(1)


def logit_gap(logits, lane):
    """z_target - z_y, [N]."""
    return (logits.gather(1, lane["target"][:, None]) - logits.gather(1, lane["y"][:, None]))[:, 0]


def targeted_dlr(logits, lane):
    """(z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), z_(i) the i-th largest: blind to shift and scale."""
    top = logits.topk(4, dim=1).values
    return logit_gap(logits, lane) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def input_gradient(net, x, objective):
    """(logits, objective per row, its gradient at x); parameters get none."""
    scale = gradient_scale(net)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)
        value = objective(logits)
        (gradient,) = torch.autograd.grad(value.sum() * scale, x)
    return logits.detach(), value.detach(), gradient.div_(scale)


class APGD:
    """Auto-PGD (2003.01690, Algorithm 1): momentum; at checkpoints the step may halve, from the best."""

    def __init__(self, net, eps, iterations, near, loss, targets=1):
        self.net, self.eps, self.near, self.loss = net, eps, near, loss
        self.targets, self.evaluations = targets, iterations + 1
        # Interval to the first checkpoint, by how much intervals shrink, the least one; in iterations.
        self.first, self.shrink, self.least = (max(int(p * iterations), 1) for p in (0.22, 0.03, 0.06))

    def start(self, lane):
        x0 = lane["x0"]
        noise = (random_bits(lane["key"], x0[0].numel()) >> 40 & 0xFFFFFF).to(x0.dtype) * 2**-23 - 1
        noise /= noise.abs().amax(1, keepdim=True) + 1e-12  # at least one pixel on the face of the ball
        z, row = (x0 + self.eps * noise.view(x0.shape)).clamp_(0, 1), x0.new_zeros(len(x0))
        lane |= {"low": (x0 - self.eps).clamp_(min=0), "high": (x0 + self.eps).clamp_(max=1), "halved": row == 0}
        lane |= {"z": z, "before": z, "best": z, "best_gradient": torch.zeros_like(x0), "loss_at_check": row}
        lane |= {"best_loss": row - math.inf, "last_loss": row + math.inf, "rises": row, "size": row + 2 * self.eps}
        lane["interval"] = lane["check"] = torch.full_like(lane["y"], self.first)

    def advance(self, lane):
        """Score lane["z"], then move it. -> (scored images, bool: which of them fool)."""
        z, step = lane["z"], lane["step"]
        logits, loss, gradient = input_gradient(self.net, z, lambda logits: self.loss(logits, lane))
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

        aim = here + image_like(lane["size"], z) * gradient.nan_to_num_(0, 0, 0).sign_()
        aim = aim.clamp_(lane["low"], lane["high"])
        pull = image_like(torch.where(step > 0, 0.75, 1.0).to(z.dtype), z)  # the first step has no momentum
        moved = here + pull * (aim - here) + (1 - pull) * (here - lane["before"])
        lane |= {"before": here, "z": moved.clamp_(lane["low"], lane["high"])}
        return z, is_fooled(logits, lane["y"], self.near)


def project_linf(t, w, gap):
    """Smallest d in the maximum norm with <w, d> = -gap and t + d in [0, 1]; else the corner closest to that. t, w [N,
    D]; gap [N]. Every coordinate moves by the same length, cut at the room it has. The length solves sum |w|
    min(length, room) = |gap|: concave and piecewise linear, so Newton from the left arrives exactly, after about four
    turns (sorting the breakpoints takes three times as long)."""
    need, weight = gap.abs(), w.abs()
    down = w * gap.sign()[:, None]  # > 0 where the coordinate has to fall
    room = torch.where(down > 0, t, 1 - t)
    full = weight * room
    length = need / weight.sum(1).clamp_min(1e-30)
    for _ in range(16):  # made-up heavy-tailed gradients took 14 at the most
        free = room.clone().gt_(length[:, None])  # 1.0 or 0.0: on a CPU a mask of bools is several times slower
        longer = (need - (full * (1 - free)).sum(1)) / (weight * free).sum(1).clamp_min(1e-30)
        length, shorter = torch.maximum(length, longer), length
        if length.is_cpu and torch.equal(length, shorter):  # a GPU would have to be waited for
            break
    return -down.sign() * torch.minimum(length[:, None], room)


class FAB:
    """Targeted FAB (1907.02044): step onto the linearised boundary to the target, drawn to the clean point. Two
    forwards and one backward an iteration: a crossing, in about nine of ten, moves the point, whose score cannot be
    used again. far: a faster network, by default `net`, for points more than NEAR eps from their clean ones: success
    is decided inside the ball, so always by `net`."""

    ALPHA_MAX, ETA, BETA, NEAR = 0.1, 1.05, 0.9, 1.5

    def __init__(self, net, eps, iterations, targets, far=None):
        self.net, self.eps, self.targets, self.evaluations, self.far = net, eps, targets, iterations, far or net

    def look(self, lane, z):
        """Logits of z: near rows by `net`, the others by `far`, in z's order; gradients pass."""
        near = (z - lane["x0"]).abs().flatten(1).amax(1) <= self.NEAR * self.eps
        logits = torch.cat([self.net(z[near]), self.far(z[~near])])
        return logits[(~near).int().argsort(stable=True).argsort()]

    def start(self, lane):
        lane |= {"z": lane["x0"], "best": lane["x0"], "margin": lane["x0"].new_full((len(lane["x0"]),), math.inf)}

    def advance(self, lane):
        """-> (scored images, bool: which of them fool)."""
        x0, z = lane["x0"], lane["z"]
        net = self.net if self.far is self.net else functools.partial(self.look, lane)
        _, gap, gradient = input_gradient(net, z, lambda logits: logit_gap(logits, lane))
        w = gradient.flatten(1).nan_to_num_(0, 0, 0)
        gap_at_x0 = gap + (w * (x0 - z).flatten(1)).sum(1)
        both = project_linf(torch.cat([z, x0]).flatten(1), w.repeat(2, 1), torch.cat([gap, gap_at_x0]))
        from_z, from_x0 = both.view(2, *z.shape)
        reach = both.abs().amax(1).clamp_min_(1e-8).view(2, -1)
        alpha = image_like((reach[0] / (reach[0] + reach[1])).clamp_(max=self.ALPHA_MAX), z)
        z = ((z + self.ETA * from_z) * (1 - alpha) + (x0 + self.ETA * from_x0) * alpha).clamp_(0, 1)
        logits, inside = net(z), (z - x0).abs().flatten(1).amax(1) <= self.eps
        crossed, value = is_fooled(logits, lane["y"]), margin(logits, lane["y"])
        replace_rows(lane, inside & (value < lane["margin"]), margin=value, best=z)
        lane["z"] = torch.where(image_like(crossed, z), x0 + self.BETA * (z - x0), z)
        return z, crossed & inside


class Square:
    """Square attack: random search over squares whose side follows a schedule; values only, no gradient. sieve: a
    faster network, by default `net`; where it finds an image no better than the best, `net` does not look at it."""

    HALVE_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)

    def __init__(self, net, eps, queries, sieve=None):
        self.net, self.eps, self.targets, self.evaluations, self.sieve = net, eps, 1, queries + 1, sieve or net

    def start(self, lane):
        x0 = lane["x0"]
        n, channels, height, width = x0.shape
        low, high = (x0 - self.eps).clamp_(min=0), (x0 + self.eps).clamp_(max=1)
        stripes = random_bits(lane["key"], channels * width).view(n, channels, 1, width) < 0
        lane |= {"low": low, "high": high, "z": torch.where(stripes, low, high), "best": x0}
        lane["margin"] = lane["sieved"] = x0.new_full((n,), math.inf)
        halvings = torch.bucketize(torch.arange(self.evaluations), torch.tensor(self.HALVE_AFTER)).to(x0.device)
        # the square's side at each step
        self.sides = (0.8 * height * width / 2 ** halvings.double()).sqrt().round().clamp(1, min(height, width)).long()

    def advance(self, lane):
        """-> (scored images, bool: which of them fool)."""
        z, y = lane["z"], lane["y"]
        logits = self.sieve(z)
        value = sieved = margin(logits, y)
        if self.sieve is not self.net:  # about one image in twenty passes; the others' NaN neither lead nor fool
            passed = sieved < lane["sieved"]
            exact = self.net(z[passed])
            logits = exact.new_full(logits.shape, math.nan).index_put_((passed,), exact)
            value = margin(logits, y)
        replace_rows(lane, value < lane["margin"], margin=value, sieved=sieved, best=z)
        lane["z"] = self.propose(lane)
        return z, is_fooled(logits, y)

    def propose(self, lane):
        """The best image with one square recoloured, each channel to one of its two bounds: from the stripes on, every
        pixel lies on a bound, where adding +-2 eps and projecting means just that."""
        _, channels, height, width = lane["best"].shape
        side = self.sides[lane["step"]]
        words = random_bits(lane["key"] + lane["step"] + 1, channels + 2)

        def inside(word, length):
            # Places 0 to length - side - 1, as in the official code: the last row and column stay out, though with all
            # places, as in the paper, Square is stronger. The word's upper half times their number, shifted, is one.
            first = ((((word >> 32) & 0xFFFFFFFF) * (length - side).clamp_(min=1)) >> 32)[:, None]
            place = torch.arange(length, device=word.device)
            return (place >= first) & (place < first + side[:, None])

        square = inside(words[:, 0], height)[:, None, :, None] & inside(words[:, 1], width)[:, None, None, :]
        colour = torch.where(words[:, 2:, None, None] < 0, lane["low"], lane["high"])
        return torch.where(square, colour, lane["best"])


def lane_count(wanted, batch_size, fixed):
    """How many lanes to run for `wanted` jobs: as many, up to batch_size; where a new shape is dear (fixed: on CUDA or
    compiled) the least of batch_size, its half, its quarter, ... (16 at the least) that holds them."""
    size = batch_size if fixed else min(wanted, batch_size)
    while fixed and size // 2 >= max(wanted, 16):
        size //= 2
    return size


def run_lanes(name, attack, exact, rows, make_lane, batch_size, fixed) -> dict:
    """Run an attack on rows: all against their first target, those still robust against the second, ... -> the fooled:
    {"rows": int64 [k], "images": [k,C,H,W] on the CPU, "seconds"}."""
    began, lane, found, images = time.monotonic(), {}, [np.empty(0, np.int64)], [torch.empty(0)]
    queue = np.stack([rows, np.zeros_like(rows)], 1)  # jobs to come: a row and which of its targets
    jobs = np.full((lane_count(len(queue), batch_size, fixed), 2), -1)  # what each lane is at; -1: it idles along
    while len(queue) or (jobs >= 0).any():
        size = lane_count(len(queue) + (jobs[:, 0] >= 0).sum(), batch_size, fixed)
        if size < len(jobs):
            keep = np.argsort(jobs[:, 0] < 0, kind="stable")[:size]  # the busy ones first
            jobs, keep = jobs[keep], torch.as_tensor(keep, device=lane["y"].device)
            lane = {key: tensor.index_select(0, keep) for key, tensor in lane.items()}
        idle = np.flatnonzero(jobs[:, 0] < 0)
        fresh, queue = np.split(queue, [len(idle)])
        if len(fresh):
            jobs[idle[: len(fresh)]] = fresh
            new = make_lane(*torch.from_numpy(fresh).unbind(1))
            attack.start(new)
            lane = lane or {key: tensor[:1].repeat_interleave(size, 0) for key, tensor in new.items()}
            slots = torch.as_tensor(idle[: len(fresh)], device=new["y"].device)
            for key, tensor in new.items():
                lane[key][slots] = tensor.to(lane[key].dtype)  # a loss has the logits' dtype
        scored, claims = attack.advance(lane)
        step = lane["step"] + 1
        lane["step"] = step.clamp(max=attack.evaluations - 1)  # of idle lanes
        # this waits for the device
        claims, used_up = torch.stack([claims, step >= attack.evaluations]).cpu().numpy() & (jobs[:, 0] >= 0)
        fooled = claims & (attack.net is exact)
        # another network that steers only claims; a lane that ends without success gets a last look, at its best point
        for looked_at, asked in ((scored, claims), (lane["best"], used_up)) if attack.net is not exact else ():
            slots = np.flatnonzero(asked & ~fooled)
            if len(slots):
                slots = torch.as_tensor(np.resize(slots, lane_count(len(slots), batch_size, fixed)), device=step.device)
                hits = slots[is_fooled(exact(looked_at[slots]), lane["y"][slots])]
                scored[hits] = looked_at[hits]
                fooled[hits.cpu().numpy()] = True
        if (fooled | used_up).any():
            found.append(jobs[fooled, 0])
            images.append(scored[torch.as_tensor(np.flatnonzero(fooled), device=step.device)].cpu())
            again = jobs[used_up & ~fooled & (jobs[:, 1] + 1 < attack.targets)] + (0, 1)
            queue, jobs[fooled | used_up] = np.concatenate([queue, again]), -1
            show_progress(f"{name}: {len(queue) + (jobs[:, 0] >= 0).sum()} of {len(rows)} still to attack")
    show_progress()
    found, images = torch.from_numpy(np.concatenate(found)), torch.cat(images[1:] or images)
    return {"rows": found, "images": images, "seconds": time.monotonic() - began}


def warn_of_odd_models(net, x, y, logits, gradients):
    """Warn of models for which the result would mislead; arguments: a first batch and its logits."""
    apart, zero = float((net(x) - logits).abs().max() / logits.abs().max().clamp_min(1e-12)), 0.0
    if gradients:
        slope = input_gradient(net, x, lambda logits: margin(logits, y))[2]
        zero = float((slope.flatten(1) == 0).all(1).double().mean())
    softmax = (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-4).all()
    said = {
        f"the same images twice give logits {apart:.1e} apart: a randomised model looks too robust": apart > 1e-4,
        "the outputs are probabilities: return logits, softmax's gradients vanish": softmax,
        f"{100 * zero:.0f} % of the images have a zero input gradient: APGD and FAB are blind there": zero > 0.1,
    }
    for text in (text for text, holds in said.items() if holds):
        warnings.warn(f"autoattack: {text}", stacklevel=3)


def autoattack(
    model, x, y, *, eps=8 / 255, attacks=AUTOATTACK, seed=0, batch_size=512, log=None,
    iterations=100, queries=5000, targets=9, index=None, state=None, nets=None,
) -> torch.Tensor:  # fmt: skip
    """AutoAttack standard in the maximum norm (Croce & Hein 2020): each attack runs on the points that survived those
    before it. model: nn.Module, [N,C,H,W] in [0,1] -> logits [N,classes]; run in eval mode and left as it was. x:
    float32 or float64; y: int64 [N]; same device. Returns x_adv like x: a fooled point carries its adversarial image,
    any other is unchanged. log: called with one line of text at a time. iterations: of APGD and FAB, per target. index:
    int64 [N], the points' numbers in the random draws (default 0 .. N-1). Draws, and on a CPU results, do not depend on
    batch_size. state: a mutable mapping; state[attack] is set when that attack has ended and used when the same call is
    made again (that it is the same is the caller's care). nets: (steer, exact), the forwards that move images and that
    decide, by default scoring_nets(model); a bfloat16 steer moves FAB only far from the ball and only preselects
    Square's images, as both live on small differences of logits. Fewer than 10 classes: as many targets as there are;
    fewer than 4: APGD-T climbs z_target - z_y, as DLR needs 4. ValueError for bad input."""
    check_images(x, y, FLOATS)
    if not 0 <= eps <= 1 or min(batch_size, iterations, queries, targets) < 1 or not set(attacks) <= set(AUTOATTACK):
        raise ValueError(f"eps {eps}, attacks {attacks}: want eps in [0,1], counts >= 1, attacks from {AUTOATTACK}")
    x, x_adv, log = x.detach(), x.detach().clone(), log or (lambda line: None)
    if not len(x):
        return x_adv
    (steer, exact), state = nets or scoring_nets(model), {} if state is None else state
    fixed = x.is_cuda or any(getattr(net, "sizes", ()) for net in (steer, exact))
    index = torch.arange(len(x)) if index is None else index.cpu()
    with eval_mode(exact), torch.no_grad(), ieee_float32():
        logits = torch.cat([exact(part) for part in x.split(batch_size)])
        classes = logits.shape[-1]
        if logits.shape != (len(y), classes) or logits.dtype not in FLOATS or not logits.isfinite().all():
            raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}: want finite float32 [{len(y)}, classes]")
        if not 0 <= y.min() <= y.max() < classes or classes < 2:
            raise ValueError(f"y spans [{y.min()}, {y.max()}]: want labels of {classes} classes, two at least")
        steer, exact = checked(steer, exact, x[:batch_size], y[:batch_size])
        warn_of_odd_models(exact, x[:batch_size], y[:batch_size], logits[:batch_size], set(attacks) != {"square"})
        # column 0 is y itself, then come its rivals in the order of the clean logits
        order = logits.scatter(1, y[:, None], math.inf).argsort(1, descending=True)
        robust = (logits.argmax(1) == y).cpu()
        log(f"clean     right {robust.sum()}, {100 * robust.double().mean():.2f} %")

        def make_lane(rows, nth):  # nth: which target
            key = hash64(hash64(hash64(hash64(number) + index[rows]) + nth))
            rows, nth, key = (t.to(y.device) for t in (rows, nth, key))
            target, step = order[rows, nth + 1], torch.zeros_like(rows)
            return {"key": key, "step": step, "x0": x[rows], "y": y[rows], "target": target}

        targets, climb = min(targets, classes - 1), targeted_dlr if classes >= 4 else logit_gap
        fine = exact if getattr(steer, "dtype", 0) == torch.bfloat16 else steer
        apgd = functools.partial(APGD, steer, eps, iterations, 0.0 if fine is steer else 2**-6)  # twice its grain
        made = {
            "apgd-ce": apgd(lambda z, lane: F.cross_entropy(z, lane["y"], reduction="none")),
            "apgd-t": apgd(climb, targets),
            "fab-t": FAB(fine, eps, iterations, targets, steer),
            "square": Square(fine, eps, queries, steer),
        }
        for name in attacks:
            if name not in state:
                number = torch.tensor(seed) + hash64(torch.tensor(1 + AUTOATTACK.index(name)))
                rows = robust.nonzero()[:, 0].numpy()
                state[name] = run_lanes(name, made[name], exact, rows, make_lane, batch_size, fixed)
            found = state[name]
            if len(found["rows"]):
                robust[found["rows"]] = False
                x_adv[found["rows"].to(x.device)] = found["images"].to(x.device)
            log(f"{name:9} robust {robust.sum()}, {100 * robust.double().mean():.2f} %, {found['seconds']:.1f} s")
        if "square" in attacks[1:] and len(state["square"]["rows"]) > max(1, 0.002 * len(x)):
            warnings.warn("autoattack: Square fooled what the gradient attacks missed: are they masked?", stacklevel=2)
    return x_adv


# 9  Evaluation ========================================================================================================
ATTACKS = ("clean", "pgd", "aa")


@contextlib.contextmanager
def ieee_float32():
    """Inside, no TF32: a verdict must not depend on ten bits."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        switches = [(t, "allow_tf32", t.allow_tf32, False) for t in (cudnn, cuda)]
    except RuntimeError:  # the importing program uses PyTorch's newer switches, which do not mix with these
        switches = [(t, "fp32_precision", t.fp32_precision, "ieee") for t in (cudnn.conv, cuda)]
    with contextlib.ExitStack() as afterwards:
        for switch, name, before, strict in switches:
            afterwards.callback(setattr, switch, name, before)
            setattr(switch, name, strict)
        yield


def scoring_nets(model, cfg=None, counts=()):
    """(steer, exact): what an evaluation's attacks move by, and what decides. A float32 Net as two copies: float16 on
    CUDA, where it is as fast as bfloat16 and eight times as fine, elsewhere of cfg's precision (default: the fastest of
    the device), and float32; with 'off' one copy twice, as any other module. RoBal's network gets its post-hoc head
    beyond 10 classes: 10 * scores - 1.7 ln(n_c/N), attacked as such."""
    if not isinstance(model, Net):
        return model, model
    weight = next(model.parameters())
    exact, amp = FrozenCopy(model, weight.dtype), cfg.amp if cfg else best_precision(weight.device)
    low = torch.float16 if weight.is_cuda else AMP_DTYPE[amp]
    nets = (exact if amp == "off" or weight.dtype != torch.float32 else FrozenCopy(model, low)), exact
    for net in set(nets):
        if isinstance(model[-1], CosineHead) and len(counts) > 10:
            net.net[-1].scale, shares = 10.0, torch.tensor(counts) / sum(counts)
            net.net[-1].prior.copy_(1.7 * shares.log())
        if cfg and cfg.compile == "on":
            net.speed_up(EVAL_BATCH)
    return nets


def checked(steer, exact, x, y):
    """(steer, exact), or with a warning exact twice where a first batch is beyond the range of steer's precision."""
    if steer is exact or input_gradient(steer, x, lambda logits: margin(logits, y))[2].isfinite().all():
        return steer, exact
    warnings.warn("this network overflows float16: its attacks move by float32", stacklevel=3)
    return exact, exact


def evaluate(
    model, images_u8, labels, *, tail=(), attacks=("clean", "pgd"), eps=8 / 255, step_size=2 / 255, steps=20,
    seed=0, batch_size=EVAL_BATCH, nets=None, log=None, state=None,
) -> dict:  # fmt: skip
    """Accuracy on test images in percent: overall, per class, on the tail classes. images_u8: uint8 [N,3,H,W]; labels:
    int64 [N], same device; tail: class indices. 'clean' is plain accuracy; 'pgd' the accuracy at the last iterate of
    PGD (uniform start clipped to [0,1], one restart, no early exit); 'aa' the accuracy under AutoAttack standard, to
    which log and state go. nets: (steer, exact), the forwards that ascend and that decide, by default
    scoring_nets(model); verdicts are IEEE float32. Noise depends on the seed and on a batch's or point's number only;
    under torchrun each rank takes whole batches, and all return the same. Returns clean, tail_clean, class_clean
    (a list) and the like, with balanced_* (mean of the class accuracies) where classes differ in size; tail_* is None
    where no image is of the tail. No global generator is touched and the model is left as it was. ValueError for no
    images, or another dtype or shape."""
    given = [f"{t.dtype} {list(t.shape)}" if torch.is_tensor(t) else str(type(t)) for t in (images_u8, labels)]
    if not given[0].startswith("torch.uint8 [") or given[1] != f"torch.int64 [{len(images_u8)}]" or not len(images_u8):
        raise ValueError(f"got images {given[0]}, labels {given[1]}: want uint8 [N,3,H,W] and int64 [N], N > 0")
    if isinstance(attacks, str) or not set(attacks) <= set(ATTACKS) or batch_size < 1:
        raise ValueError(f"attacks {attacks!r}, batch_size {batch_size}: want a sequence from {ATTACKS}, at least 1")
    steer, exact = checked(*(nets or scoring_nets(model)), to_float(images_u8[:batch_size]), labels[:batch_size])
    correct = {name: torch.zeros(len(labels), dtype=torch.bool, device=labels.device) for name in attacks}
    if "aa" in attacks:
        mine = torch.arange(len(labels), device=labels.device)
        mine = mine[mine // batch_size % WORLD == RANK]
        options = dict(eps=eps, seed=seed, batch_size=batch_size, log=log, state=state, nets=(steer, exact), index=mine)
        adversarial = to_float(images_u8)
        adversarial[mine] = autoattack(exact, to_float(images_u8[mine]), labels[mine], **options)
    with eval_mode(exact), torch.no_grad():
        for i in range(RANK, math.ceil(len(labels) / batch_size), WORLD):
            part = slice(i * batch_size, (i + 1) * batch_size)
            x, y = to_float(images_u8[part]), labels[part]
            generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "evaluation", i))
            for name in attacks:
                x_adv = adversarial[part] if name == "aa" else x
                with ieee_float32():
                    if name == "pgd":
                        x_adv = pgd_attack(steer, x, y, eps=eps, step_size=step_size, steps=steps, generator=generator)
                    logits = exact(x_adv)
                correct[name][part] = (logits.argmax(1) == y) & ~logits.isnan().any(1)  # NaN is never right
    counts, result = np.bincount(labels.cpu()), {}
    tail = [c for c in tail if c < len(counts) and counts[c]]
    for name, flags in correct.items():
        hits = np.bincount(labels.cpu(), torch.stack(gather(flags.cpu())).any(0))
        per_class = 100 * hits / counts.clip(1)
        result |= {name: float(100 * hits.sum() / counts.sum()), f"class_{name}": per_class.round(4).tolist()}
        result[f"tail_{name}"] = float(100 * hits[tail].sum() / counts[tail].sum()) if tail else None
        if len({*counts}) > 1:
            result[f"balanced_{name}"] = float(per_class[counts > 0].mean())
    return result


def save_examples(path, net, images_u8, labels, count, log, *, eps, step_size, steps, seed=0):
    """Write a PNG grid of `count` images spread over the set: clean, after PGD, ten times the difference; to the log
    each label and what `net` (a module or FrozenCopy) says to both."""
    index = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    x, y = to_float(images_u8[index]), labels[index]
    generator = torch.Generator(x.device).manual_seed(derive_seed(seed, "examples"))
    x_adv = pgd_attack(net, x, y, eps=eps, step_size=step_size, steps=steps, generator=generator)
    triples = torch.stack([x, x_adv, (0.5 + 10 * (x_adv - x)).clamp(0, 1)], 1).flatten(0, 1)
    with writing(path), eval_mode(net), torch.no_grad():
        torchvision.utils.save_image(triples.cpu(), path, nrow=12)
        said = zip(y.tolist(), net(x).argmax(1).tolist(), net(x_adv).argmax(1).tolist())
    log(f"{path} (label: clean > attacked prediction) " + ", ".join("{}: {} > {}".format(*row) for row in said))


# 10  Runs and report ==================================================================================================
def writing(path):
    """Around a write: one line for what cannot be written."""
    remedy = "check path, rights and free space, or try another --out; saved files are whole"
    return blaming(f"cannot write {path}: {remedy}", OSError)


def write_atomic(path, content, rank=0):
    """Write text, or what torch.save takes, so that readers and crashes see the old file or the new one. Of several
    ranks only this one writes."""
    if RANK != rank:
        return
    path, data = pathlib.Path(path), io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        torch.save(content, data)  # not to the file: torch would hide why a write has failed
    temporary = path.with_name(path.name + ".tmp")  # always the same: what a killed process leaves is reused
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_json(path) -> dict:
    """What a JSON file of ours holds, {} where there is none; UserError where it is damaged."""
    with blaming(f"{path} is damaged: restore it, or start afresh with --overwrite"):
        return dict(json.loads(path.read_text())) if path.exists() else {}


class Run:
    """A run's folder, locked as long as this object's log is open; aa.pt is there while AutoAttack is under way.
    Opening it compares settings and training images with those it was begun with: UserError where they differ."""

    FILES = ("config.json", "state.pt", "teacher.pt", "best.pt", "last.pt", "results.json", "report.md")

    def __init__(self, cfg, data, argv=()):
        self.cfg, self.data, self.path = cfg, data, pathlib.Path(cfg.out)
        self.clock = None  # when the training steps to estimate from began
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.file = open(os.devnull if RANK else self.path / "log.txt", "a", encoding="utf-8", errors="replace")
        if not RANK:
            self._claim()
        gather(None)  # no rank looks into the folder before it is ours
        self.environment = environment(cfg)
        self.log(f"run {self.path}: " + ", ".join(f"{k} {v}" for k, v in self.environment.items()))
        print("argv", *argv, file=self.file, flush=True)

    def _claim(self):
        """Lock the folder, empty it for --overwrite, write config.json or compare with the one that is there."""
        busy = f"{self.path} is in use by another process: wait for it, or choose another --out"
        with contextlib.suppress(OSError), blaming(busy, BlockingIOError):  # suppressed: a drive without locks
            fcntl and fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self.cfg.overwrite:
            for old in (*map(self.path.joinpath, self.FILES), *self.path.glob("aa*.pt")):
                old.unlink(missing_ok=True)
            self.file.truncate(0)
        path, mine = self.path / "config.json", identity(self.cfg) | {"images": self.data.crc32("train")}
        theirs = read_json(path).get("identity", mine)
        odd = [f"{k} {theirs.get(k)} there, {mine[k]} here" for k in mine if theirs.get(k) != mine[k]]
        if odd:
            raise UserError(f"{self.path} holds another run ({', '.join(odd)}): choose another --out, or --overwrite")
        write_atomic(path, json.dumps({"identity": mine, "config": asdict(self.cfg)}, indent=1) + "\n")

    def log(self, line):
        """One line to log.txt and to the screen."""
        with writing(self.path / "log.txt"):
            print(line, file=self.file, flush=True)
        if not RANK:
            print(line, flush=True)

    def save_model(self, name, weights, epoch):
        write_atomic(self.path / f"{name}.pt", dict(state_dict=weights, epoch=epoch, arch=self.cfg.arch))

    def save_state(self, name, at, *parts):
        """state.pt: the training's name, what is true after its last complete epoch, network and optimiser; then
        best.pt from it, so that the two never disagree."""
        write_atomic(self.path / "state.pt", dict(name=name, at=at, parts=[part.state_dict() for part in parts]))
        if at["best"]:
            self.save_model("best", **at["best"])

    def load_state(self, name, at, *parts):
        """Fill the parts from state.pt and return its `at`; the given `at` where there is none of this training."""
        path = self.path / "state.pt"
        with blaming(f"{path} does not fit this run: start afresh with --overwrite"):
            state = read_checkpoint(path) if path.exists() else {}
            if state.get("name") == name:
                for part, saved in zip(parts, state["parts"], strict=True):
                    part.load_state_dict(saved)
                at = {key: state["at"][key] for key in at}
                self.log(f"{name}: going on after epoch {at['epoch']}")
        if at["best"]:
            self.save_model("best", **at["best"])
        return at

    def estimate(self, step, seen):
        """From steps 2 to 5 of the first training, say once how long a run takes. AutoAttack: 2,400 passes a point, as
        its attacks, of 303, 2,727, 3,600 and 5,001, get 46, 22, 19 and 19 % of the points (Table 2)."""
        if step == 1 and self.clock != ():
            self.clock = time.perf_counter(), seen
        elif step == 5 and self.clock:
            image, self.clock = (time.perf_counter() - self.clock[0]) / (seen - self.clock[1]), ()
            cfg, needed, tests = self.cfg, METHODS[self.cfg.method].teacher, len(self.data.test_labels)
            teacher, its_data = teacher_task(cfg, self.data) if needed else (cfg, self.data)
            passes = math.ceil(cfg.epochs / 4) * 62, 2 * (3 * cfg.eval_steps + 2 + 2400 * ("aa" in cfg.attacks))
            parts = {"teacher": teacher.epochs * len(its_data.train_labels) * needed}
            parts["student"] = cfg.epochs * len(self.data.train_labels)
            parts |= {part: tests * n / (3 * cfg.steps + 8) for part, n in zip(("selection", "evaluation"), passes)}
            took = {part: timedelta(seconds=round(n * image)) for part, n in parts.items()}
            each = ", ".join(f"{part} {time}" for part, time in took.items())
            self.log(f"a whole run takes about {sum(took.values(), timedelta())} on this device ({each})")

    def save_results(self, part="", seconds=0.0, **changes):
        """Change results.json and add to the seconds of a part of the run."""
        path = self.path / "results.json"
        known = read_json(path)
        spent = known.get("seconds", {})
        changes["seconds"] = {**spent, part: round(spent.get(part, 0) + seconds, 3)}
        write_atomic(path, json.dumps({**known, **changes}, indent=1) + "\n")
        gather(None)


def environment(cfg):
    """What the figures of a run depend on: device and versions."""
    name = f"cpu, {torch.get_num_threads()} threads"
    with contextlib.suppress(OSError, AttributeError):
        name += ", " + re.search("model name.*: (.*)", pathlib.Path("/proc/cpuinfo").read_text()).group(1)
    if cfg.device.startswith("cuda"):
        name = f"{torch.cuda.get_device_name(cfg.device)}, CUDA {torch.version.cuda}"
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, np, triton) if m}
    return {"device": f"{WORLD} x {name}", **versions, "python": sys.version.split()[0], "system": sys.platform}


def identity(cfg):
    """The settings that make a run what it is: another value needs another folder."""
    return {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.metadata.get("identity", True)}


def run_name(cfg):
    """A folder name: the settings people vary, then a checksum of all (and of the place of a folder's data)."""
    place = str(pathlib.Path(cfg.data_dir).resolve()) if cfg.data == "folder" else ""
    digest = zlib.crc32(json.dumps([identity(cfg), place]).encode())
    ratio = "owncounts" if cfg.ir is None else f"ir{cfg.ir:g}"
    return f"{cfg.data}-{ratio}-{cfg.method}-{cfg.arch}-seed{cfg.seed}-{digest:08x}"


class SavedState(dict):
    """AutoAttack's state on disk: what an interrupted evaluation of the same `key` goes on from."""

    def __init__(self, path, key):
        self.path, self.key, saved = path, key, read_checkpoint(path) if path.exists() else {}
        super().__init__(saved["state"] if saved.get("key") == key else {})

    def __setitem__(self, name, found):
        super().__setitem__(name, found)
        write_atomic(self.path, {"key": self.key, "state": dict(self)}, RANK)


def evaluation_key(cfg, name):
    """A checkpoint's key in results.json: its name, plus any other threat than eps and 20 steps of 2."""
    threat = (cfg.eval_eps, cfg.eval_steps, cfg.eval_step_size)
    return name if threat == (cfg.eps, 20, 2.0) else name + ", eps {:g} in {} steps of {:g}".format(*threat)


def load_net(cfg, data, path):
    """(model, epoch, (steer, exact)) of a checkpoint file of this Config's method, on its device."""
    model = build_model(cfg.arch, len(data.classes), METHODS[cfg.method].head)
    epoch = load_weights(model, path)
    return model, epoch, scoring_nets(model.to(cfg.device), cfg, data.counts)


def evaluate_run(cfg, data, run):
    """Evaluate teacher, best and last, or --checkpoint, under this Config's threat, as far as results.json lacks it. An
    entry belongs to weights, threat and test images; best and last are evaluated once where they are the same."""
    threat = dict(eps=cfg.eval_eps / 255, step_size=cfg.eval_step_size / 255, steps=cfg.eval_steps, seed=cfg.seed)
    test, aa_path = {"images": len(data.test_labels), "crc32": data.crc32("test")}, run.path / f"aa{RANK or ''}.pt"
    about = {"counts": data.counts, "classes": data.classes, "tail_classes": data.tail, "test": test}
    names = ["teacher"] * METHODS[cfg.method].teacher + ["best", "last"]
    for name in [cfg.checkpoint] if cfg.checkpoint else names:
        began, key = time.perf_counter(), evaluation_key(cfg, name)
        path = pathlib.Path(name if cfg.checkpoint else run.path / f"{name}.pt")
        model, epoch, nets = load_net(*(teacher_task(cfg, data) if name == "teacher" else (cfg, data)), path)
        if cfg.examples and not RANK:
            grid = run.path / f"examples-{path.stem}.png"
            save_examples(grid, nets[1], data.test_images, data.test_labels, cfg.examples, run.log, **threat)
        results, crc32 = gather(read_json(run.path / "results.json"))[0], weights_crc32(model)
        known, entry = results.get("checkpoints", {}) if results.get("data") == about else {}, {}
        for twin in (evaluation_key(cfg, "best"), key):
            entry |= known[twin] if known.get(twin, {}).get("crc32") == crc32 else {}
        attacks = cfg.attacks.replace("aa", "") if name == "teacher" else cfg.attacks  # Table 6 has none
        wanted = [attack for attack in ATTACKS if attack in attacks.split(",") and attack not in entry]
        entry = {**entry, "epoch": epoch, "crc32": crc32}
        if wanted:
            state = SavedState(aa_path, f"{key} {crc32} {test['crc32']} {cfg.amp} {RANK}/{WORLD}")
            run.log(f"evaluating {name}: {', '.join(wanted)}" + f" (of AutoAttack 1 share of {WORLD})" * (WORLD > 1))
            options = dict(threat, tail=data.tail, attacks=wanted, nets=nets, log=run.log, state=state)
            entry |= evaluate(model, data.test_images, data.test_labels, **options)
        if known.get(key) != entry:
            about_run = dict(config=asdict(cfg), environment=run.environment, data=about)
            run.save_results("evaluation", time.perf_counter() - began, **about_run, checkpoints={**known, key: entry})
        if "aa" in wanted:
            aa_path.unlink(missing_ok=True)


# The paper's tables: number, data, IR, arch, method (teacher: PGD-AT on D_B); clean PGD-20 AA T-clean T-PGD of the
# best, then the last epoch. A dash: not given, or lost in its text.
# fmt: off
PAPER = """1 cifar10 50 resnet18 pgd-at 52.71 29.30 27.57 12.7 1.0 56.39 26.98 25.81 20.8 2.2
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
8 cifar100 10 wrn34-10 ltsd 50.55 23.43 20.16 38.4 19.5 50.87 22.21 19.44 42.5 18.4"""
# fmt: on
NAMES = ("teacher", "best", "last")
COLUMNS = dict(clean="clean", pgd="PGD-20", aa="AA", tail_clean="T-clean", tail_pgd="T-PGD", tail_aa="T-AA")
# What the paper leaves open, or what cannot matter to its numbers: any value may stand beside them.
FREE = ("seed", "amp", "compile", "alpha", "tau", "kd", "reat_tail")


def paper_row(cfg, name) -> dict:
    """The paper's numbers {column: percent or None} for a checkpoint ('teacher', 'best', 'last') of a resolved Config
    under the standard threat; {} where it has none for these settings."""
    if cfg.method not in METHODS or name not in NAMES or evaluation_key(cfg, name) != name:
        return {}
    names = ("data", "ir", "method", "arch", "aug", "official")
    usual = Config(**{k: getattr(cfg, k) for k in names}, device="cpu", amp="off", compile="off")
    usual, mine = identity(resolve(usual)), identity(cfg)
    method = ("teacher" if name == "teacher" else cfg.method) + ("" if cfg.aug == "none" else f"+{cfg.aug}")
    key = [cfg.data, f"{cfg.ir or 0:g}", cfg.arch, method]
    rows = [cells for cells in map(str.split, PAPER.splitlines()) if cells[1:5] == key]
    if not rows or any(mine[k] != usual[k] for k in mine if k not in FREE):
        return {}
    return dict(zip(COLUMNS, [None if n == "-" else float(n) for n in rows[0][10 if name == "last" else 5 :][:5]]))


def read_run(path, cfg):
    """(Config, identity, {checkpoint: entry}, data) of a run folder under the evaluation settings of `cfg`; UserError
    that says what it lacks."""
    remedy = "make one with --stage eval, or name runs as in --stage report 'runs/*'"
    with blaming(f"{path} holds no such evaluation: {remedy}"):
        config, results = read_json(path / "config.json"), read_json(path / "results.json")
        own = Config(**config["config"])
        threat = dict(eval_step_size=cfg.eval_step_size, eval_steps=cfg.eval_steps)
        own = replace(own, eval_eps=own.eps if cfg.eval_eps is None else cfg.eval_eps, **threat)
        names, found = [cfg.checkpoint] if cfg.checkpoint else NAMES, results["checkpoints"]
        shown = {n: found[evaluation_key(own, n)] for n in names if evaluation_key(own, n) in found}
        [float(entry.get(column) or 0) for entry in shown.values() for column in COLUMNS]  # are they numbers?
        return own, config["identity"], shown or found[evaluation_key(own, "best")], results["data"]


@dataclass
class Setting:
    """Runs that differ in nothing but the seed: a row of the table, a mark in the figures."""

    cfg: Config
    own: dict  # identity but for the seed
    words: dict  # setting -> how the label says it
    runs: list  # {checkpoint: entry} of each run

    def label(self, *without):
        return " ".join(word for key, word in self.words.items() if key not in without)

    def stat(self, column, name="best"):
        """(mean, sample standard deviation, number of runs) of a checkpoint's column; None where no run has it."""
        values = [run[name][column] for run in self.runs if run.get(name, {}).get(column) is not None]
        return (np.mean(values), np.std(values, ddof=int(len(values) > 1)), len(values)) if values else None


def by_setting(runs) -> list:
    """What read_run returned -> Settings in the order of their first run; labels name what sets them apart."""
    settings = {}
    for cfg, own, shown, _ in runs:
        own = {**own, "seed": None}
        settings.setdefault(json.dumps(own), Setting(cfg, own, {}, [])).runs.append(shown)
    for s in settings.values():
        s.words = {"data": s.cfg.data, "ir": f"IR {s.cfg.ir or 0:g}".replace("IR 0", "own counts"), "arch": s.cfg.arch}
        s.words["method"] = s.cfg.method if s.cfg.aug == "none" else f"{s.cfg.method}+{s.cfg.aug}"
        rivals = [r.own for r in settings.values() if all(r.own[k] == s.own[k] for k in (*s.words, "aug"))]
        s.words |= {k: f"{k} {v}" for k, v in s.own.items() if any(own.get(k) != v for own in rivals)}
        s.words["seed"] = f"seed {s.cfg.seed}" if len(s.runs) == 1 else f"({len(s.runs)} runs)"
    return list(settings.values())


def markdown(rows):
    """Rows of cells, the first of them headings -> lines of an aligned table; two columns of text, then numbers."""
    rows = [rows[0], ["---", "---"] + ["---:"] * (len(rows[0]) - 2), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in padded]


def table(runs) -> str:
    """What read_run returned as Markdown in the paper's layout: a line per checkpoint, mean and standard deviation over
    the seeds, below it the paper's values and the gap."""
    columns = [c for c in COLUMNS if any(e.get(c) is not None for _, _, shown, _ in runs for e in shown.values())]
    rows = [["setting", "checkpoint", *(COLUMNS[c].replace("20", str(runs[0][0].eval_steps)) for c in columns)]]
    for s, name in itertools.product(by_setting(runs), dict.fromkeys([*NAMES, *runs[0][2]])):
        stats, epochs = [s.stat(c, name) for c in columns], {run[name]["epoch"] for run in s.runs if name in run}
        if not epochs:
            continue
        cells = [f"{t[0]:.2f}" + f" ± {t[1]:.2f}" * (t[2] > 1) if t else "-" for t in stats]
        cells = [c + (f" (n={t[2]})" if t and t[2] < len(s.runs) else "") for c, t in zip(cells, stats)]
        rows.append([s.label(), name + (f" (epoch {epochs.pop()})" if len(epochs) == 1 else ""), *cells])
        if paper := paper_row(s.cfg, name):
            pairs = [(t, paper.get(c)) for c, t in zip(columns, stats)]
            rows.append(["", "paper", *("-" if p is None else f"{p:.2f}" for _, p in pairs)])
            rows.append(["", "gap", *(f"{t[0] - p:+.2f}" if t and p is not None else "-" for t, p in pairs)])
    tails = {f"{len(data['tail_classes'])} of {len(data['classes'])} ({cfg.data})" for cfg, _, _, data in runs}
    threats = ", ".join(sorted({f"{cfg.eval_eps:g}/255" for cfg, *_ in runs}))
    note = f"In %; eps {threats}. T-: the rarest classes, {', '.join(sorted(tails))}. best: highest PGD accuracy"
    note += " (natural: clean) in the last quarter of the epochs, chosen on the test set, as AT-BSL does."
    return "\n".join([*markdown(rows), "", note])


def report(paths, cfg, folder):
    """One table over run folders, printed and written to folder/report.md, and the figures; broken ones are listed
    below it. Reads the folders only. UserError where none can be shown."""
    runs, notes = [], []
    for path in dict.fromkeys(paths):
        try:
            runs.append(read_run(path, cfg))
        except UserError as error:
            notes.append(f"\nLeft out: {error}.")
    if not runs:
        raise UserError(" ".join(notes))
    text = "\n".join([table(runs), *notes])
    write_atomic(folder / "report.md", text + "\n")
    if not RANK:
        print(f"\n{text}\n\nreport {folder / 'report.md'}", flush=True)
    if cfg.figures and not RANK:
        report_figures(by_setting(runs), cfg.figures)


def save_figure(folder, name, title, *draws):
    """Save folder/name: panels side by side, each drawn by a function of its axes, the first one's legend below."""
    from matplotlib.figure import Figure  # optional: run_stages has looked for it

    figure, path = Figure((4.5 * len(draws) + 1.5, 5), layout="constrained"), pathlib.Path(folder, name)
    figure.suptitle(title)
    for ax, draw in zip(figure.subplots(1, len(draws), squeeze=False)[0], draws):
        draw(ax)
    if figure.axes[0].get_legend_handles_labels()[1]:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    print(f"figure {path}", flush=True)


# Okabe and Ito's colours, told apart by the colour-blind, and as many markers; the last is ltsd's.
LOOKS = [*zip("#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #000000 #999999 #F0E442 #D55E00".split(), "osD^vPXh*")]


def plot(ax, i, s, xs, stats, **style):
    """Means with error bars (standard deviation over the seeds) in the look of the i-th Setting s."""
    means, spreads = zip(*((t[0], t[1]) if t else (math.nan, 0) for t in stats))
    color, marker = LOOKS[-1 if s.cfg.method == "ltsd" else i % (len(LOOKS) - 1)]
    look = dict(color=color, marker=marker, ms=14 if marker == "*" else 7, capsize=3)
    ax.errorbar(xs, means, spreads if any(spreads) else None, **look | style)


def report_figures(settings, folder):
    """Draw the best checkpoints of Settings into folder: scatter.png (the paper's Figures 1 and 5; hollow: its own
    points, where it has them), classes.png (8), and ir.png (4), alpha.png and gamma.png (6, 7) where that takes several
    values and all else is equal."""
    settings = [s for s in settings if s.stat("clean") and s.stat("pgd")]
    if not settings:
        raise UserError("--figures: no best checkpoint with clean and PGD accuracy to draw")
    robust = "aa" if all(s.stat("aa") for s in settings) else "pgd"
    shared = [k for k in ("data", "ir", "arch") if len({s.words[k] for s in settings}) == 1]
    title = ", ".join([*(settings[0].words[k] for k in shared), f"best epoch, eps {settings[0].cfg.eval_eps:g}/255"])

    def scatter(ax, a, b):
        for i, s in enumerate(settings):
            x, y, paper = s.stat(a), s.stat(b), paper_row(s.cfg, "best")
            if x and y:
                plot(ax, i, s, [x[0]], [y], xerr=x[1] or None, ls="none")
                ax.annotate(s.label(*shared, "seed"), (x[0], y[0]), (7, 5), textcoords="offset points", fontsize=9)
            if paper.get(a) and paper.get(b):
                plot(ax, i, s, [paper[a]], [(paper[b], 0)], ls="none", mfc="none", zorder=1)
        ax.set(xlabel=f"{COLUMNS[a]} accuracy (%)", ylabel=f"{COLUMNS[b]} accuracy (%)", xmargin=0.5)

    def classes(ax):
        for i, s in enumerate(settings):
            runs = [run["best"][f"class_{robust}"] for run in s.runs if f"class_{robust}" in run.get("best", {})]
            groups = np.array([[part.mean() for part in np.array_split(run, min(10, len(run)))] for run in runs])
            stats = [(column.mean(), column.std(ddof=int(len(runs) > 1))) for column in groups.T]
            plot(ax, i, s, range(1, len(stats) + 1), stats, label=s.label(*shared), ls=("-", "--", ":", "-.")[i % 4])
        ax.set(xlabel="group of classes, most to least frequent", ylabel=f"{COLUMNS[robust]} accuracy (%)")

    def sweep(ax, key, families, tail):
        for (i, family), column in itertools.product(enumerate(families), ("clean", "pgd")):
            (xs, members), name = zip(*family), COLUMNS[tail + column]
            style = dict(ls="-" if column == "pgd" else "--", label=f"{members[0].label(key, 'seed', *shared)}, {name}")
            plot(ax, i, members[0], xs, [s.stat(tail + column) for s in members], **style)
        ax.set(xlabel=key, ylabel=f"{tail}accuracy (%)".replace("_", " "), xscale="log" if key == "ir" else "linear")

    pairs = (("clean", robust), ("tail_clean", "tail_pgd"))
    save_figure(folder, "scatter.png", title, *(functools.partial(scatter, a=a, b=b) for a, b in pairs))
    save_figure(folder, "classes.png", title, classes)
    for key in ("ir", "alpha", "gamma"):
        families = {}
        for s in settings:
            x = max(1.0, s.cfg.ir / 2) if key == "gamma" and s.cfg.gamma is None and s.cfg.ir else getattr(s.cfg, key)
            families.setdefault(json.dumps({**s.own, key: None, "images": None}), []).append((x, s))
        families = [sorted(f, key=lambda p: p[0]) for f in families.values() if len(f) > 1 and None not in dict(f)]
        if families:
            draws = [functools.partial(sweep, key=key, families=families, tail=tail) for tail in ("", "tail_")]
            save_figure(folder, f"{key}.png", title, *draws)


# 11  Theory ===========================================================================================================
# Eq. (2): y = +1 (head) with probability r / (r + 1), else -1 (tail); x ~ N(eta * y, I) in n dimensions: eta places the
# two means, the standard deviation is 1. An error's key: classifier, then std (clean) or rob (attacked).
CLASSIFIERS = {"nat": "natural", "rob": "adversarial"}


def theorem1(n, eta, eps, r) -> dict:
    """Theorem 1 (eq. 4-5): tail errors of the optimal natural and the optimal robust linear classifier. n: dimension, a
    whole number >= 1. eta, eps: floats, 0 <= eps < eta; the attack moves a coordinate by at most eps. r: imbalance
    ratio >= 1. Returns a dict of floats: nat_std, nat_rob, rob_std, rob_rob in [0, 1], and the biases b_nat, b_rob (eq.
    11, 16), which belong to w = (1, ..., 1) / sqrt(n). ValueError outside these ranges."""
    if n != int(n) or n < 1 or not 1 <= r < math.inf or not 0 <= eps < eta < math.inf:
        raise ValueError(f"n {n}, eta {eta}, eps {eps}, r {r}: want whole n >= 1, 0 <= eps < eta and finite r >= 1")
    margins = {"std": math.sqrt(n) * eta, "rob": math.sqrt(n) * (eta - eps)}
    out = {"b_nat": math.log(r) / (2 * margins["std"]), "b_rob": math.log(r) / (2 * margins["rob"])}
    for key, (kind, margin) in itertools.product(CLASSIFIERS, margins.items()):
        out[f"{key}_{kind}"] = 0.5 * math.erfc((margin - out[f"b_{key}"]) / math.sqrt(2))  # Phi(b - margin)
    return out


def theory(n=2, eta=1.0, eps=0.5, ratios=(1, 2, 5, 10, 20, 50)) -> str:
    """Section 3 and appendix A as Markdown: tail errors in closed form by imbalance ratio; adversarial training leaves
    an attacked tail worse (Corollary 1). ValueError as in `theorem1`."""
    rows = [["IR", "training", "bias", "clean", "attacked"]]
    for r, (key, name) in itertools.product(ratios, CLASSIFIERS.items()):
        x = theorem1(n, eta, eps, r)
        errors = [f"{100 * x[f'{key}_{kind}']:.2f}" for kind in ("std", "rob")]
        rows.append([f"{r:g}", f"{name} training", f"{x[f'b_{key}']:.4f}", *errors])
    about = f"Tail errors of eq. (2) in %, bias at |w| = 1, in closed form: n {n}, eta {eta:g}, eps {eps:g}."
    return "\n".join([about, "", *markdown(rows)])


def theory_figures(folder, eta=1.0, eps=0.5, seed=0):
    """Draw the paper's Figure 2 (n = 2) as folder/figure2.png: 500 points of eq. (2) at IR 1, 2, 5 and the optimal
    boundaries x1 + x2 = -sqrt(2) b."""
    generator = torch.Generator().manual_seed(seed)

    def boundaries(ax, r):
        y = (torch.rand(500, generator=generator) < r / (r + 1)) * 2 - 1
        x = torch.randn(500, 2, generator=generator) + eta * y[:, None]
        for label, marker, name in ((1, ".", "head, y = +1"), (-1, "x", "tail, y = -1")):
            ax.scatter(*x[y == label].T.numpy(), marker=marker, color="0.6", label=name)
        for key, color, dash in (("nat", "#0072B2", "-"), ("rob", "#D55E00", "--")):  # at IR 1 both are one
            at = -math.sqrt(2) * theorem1(2, eta, eps, r)[f"b_{key}"]
            ax.axline((0, at), slope=-1, color=color, ls=dash, lw=3, label=f"{CLASSIFIERS[key]} training")
        ax.set(title=f"IR {r}", xlabel="$x_1$", ylabel="$x_2$", xlim=(-4, 4), ylim=(-4, 4), aspect="equal")

    save_figure(folder, "figure2.png", "Optimal classifiers", *(functools.partial(boundaries, r=r) for r in (1, 2, 5)))


# 12  Bench ============================================================================================================
# Plain is what a researcher writes after AT-BSL's script: eager, float32 NCHW, autograd.grad at x. Rounds of variants
# alternate, so that a drifting machine slows all alike; every number is a median.
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


def bench_core(cfg, batch, steps, rounds):
    """{"attack": rows, "train_step": rows} at one batch size on ResNet-18 with 100 classes, levers added in turn."""
    torch.manual_seed(0)
    device, cfg = torch.device(cfg.device), replace(cfg, method="ltsd", batch_size=batch)
    ours, teacher = (build_model("resnet18", 100).to(device) for _ in "ab")
    plain, plain_teacher = (copy.deepcopy(net).to(memory_format=torch.contiguous_format) for net in (ours, teacher))
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device) % 100
    x_cl, threat = x.contiguous(memory_format=torch.channels_last), dict(eps=8 / 255, step_size=2 / 255, steps=steps)
    counts = torch.tensor(long_tail_counts(500, 100, 10), dtype=torch.float32, device=device)
    student, frozen = training_nets(cfg, ours)
    attack = functools.partial(pgd_attack, x=x_cl, y=y, init="gauss", **threat)
    low_teacher = torch.no_grad()(scoring_nets(teacher, cfg)[0])
    _, our_step = training_step(cfg, ours, student, counts, low_teacher, frozen.capture)
    _, plain_step = training_step(cfg, plain, plain, counts, torch.no_grad()(plain_teacher.eval()), None)
    plainly = functools.partial(plain_attack, plain, x, y, **threat)
    levers = {"plain": plainly, "folded norms, fused step": functools.partial(attack, FrozenCopy(ours))}
    if cfg.amp != "off":
        levers[f"+ {cfg.amp}"] = functools.partial(attack, FrozenCopy(ours, frozen.dtype))
    if cfg.compile == "on":
        levers["+ torch.compile" + ", CUDA graph" * (frozen.capture is not None)] = functools.partial(attack, frozen)
    train_step = {"plain": lambda: plain_step(x, plainly(), y, 40.0, 0.01)}
    train_step["all levers"] = lambda: our_step(x_cl, attack(frozen.refresh()), y, 40.0, 0.01)
    result = {"attack": levers, "train_step": train_step}
    for part, functions in result.items():
        took = timed(functions, rounds, device)
        speeds = {name: dict(images_per_s=batch / s, ratio=took["plain"] / s) for name, s in took.items()}
        result[part] = [dict(batch=batch, lever=name, **speed) for name, speed in speeds.items()]
    return result


def bench_kernel(device):
    """Rows of the step kernel on CUDA against plain operations, torch.compile and a device-to-device copy, captured as
    graphs."""

    def plain(x_adv, grad, x, step_size, eps, low):
        low.copy_(x_adv.copy_(pgd_step_reference(x_adv, grad, x, step_size, eps)))

    rows, largest = [], min(1 << 30, torch.cuda.mem_get_info(device)[0] // 14) // (4 * 3072)
    functions = {"kernel": pgd_step, "plain": plain, "torch.compile": torch.compile(plain)}
    functions["copy"] = lambda x_adv, grad, x, *rest: x_adv.copy_(x)
    for images, (what, function) in itertools.product((32, 128, largest), functions.items()):
        x = torch.rand(images, 3, 32, 32, device=device)
        call = functools.partial(function, x.clone(), torch.randn_like(x).bfloat16(), x, 2 / 255, 8 / 255, x.bfloat16())
        us = 1e3 * triton.testing.do_bench_cudagraph(call, return_mode="median")
        traffic = 8 if what == "copy" else 16  # bytes a value: a step reads 4+2+4 and writes 4+2, a copy moves 4+4
        rows.append(dict(images=images, what=what, us=us, gb_per_s=traffic * x.numel() / us / 1e3))
    return rows


def bench_forward(device):
    """Rows of what verdicts cost on CUDA: a folded ResNet-18's float32 forward without TF32, in either layout, cuDNN's
    plans autotuned or not. It keeps a shape's first plan whatever the switch says; hence two batch sizes."""
    rows, model = [], build_model("resnet18", 100).to(device)
    for layout, tuned in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
        x = torch.rand(500 + tuned, 3, 32, 32, device=device).to(memory_format=layout)
        forward = functools.partial(FrozenCopy(model).net.to(memory_format=layout), x)
        torch.backends.cudnn.benchmark = tuned
        with torch.no_grad(), ieee_float32():
            seconds = timed({"forward": forward}, 5, device)["forward"]
        rows.append(dict(layout=str(layout)[6:], autotuned=tuned, images_per_s=len(x) / seconds))
    return rows


def bench_autoattack(cfg):
    """Rows of seconds for 64 images, 10 iterations and 500 queries, one call each, on a resnet8 after an epoch of
    PGD-AT on made-up images. Ours moves by the run's precision; official_s: pyautoattack, None where it is missing."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        argv = "--data synthetic --ir 1 --method pgd-at --epochs 1 --milestones 1 --stage train --compile off".split()
        (one,) = expand(parse_args([*argv, "--device", cfg.device, "--amp", cfg.amp, "--out", folder]))
        run_one(one, argv)
        data = load_data(one).to(cfg.device)
        model, _, nets = load_net(one, data, f"{folder}/last.pt")
    model.eval().to(memory_format=torch.contiguous_format)  # as the official package wants it
    pick, rows = torch.arange(64) * len(data.test_labels) // 64, []
    x, y = to_float(data.test_images[pick]).contiguous(), data.test_labels[pick]
    for name in AUTOATTACK:
        began = time.perf_counter()
        autoattack(model, x, y, attacks=(name,), iterations=10, queries=500, nets=nets)
        rows.append(dict(attack=name, ours_s=time.perf_counter() - began, official_s=None))
        with contextlib.suppress(ImportError):
            options = dict(attacks=[name], eps=8 / 255, version="custom", seed=0, device=cfg.device)
            official = importlib.import_module("pyautoattack").AutoAttack(model, **options)
            official.apgd.n_restarts, official.fab.n_restarts, official.square.n_queries = 1, 1, 500
            official.apgd.n_iter = official.apgd_targeted.n_iter = official.fab.n_iter = 10
            began = time.perf_counter()
            official.run_standard_evaluation(x, y, batch_size=len(x))
            rows[-1]["official_s"] = time.perf_counter() - began
    return rows


def stage_bench(cfg):
    """Measure the core against plain PyTorch on this machine; print the rows and write bench.json."""
    device, on_cuda = torch.device(cfg.device), cfg.device.startswith("cuda")
    path, steps = pathlib.Path(cfg.out or "runs/bench", "bench.json"), 10 if on_cuda else 2
    tune_process(cfg)

    def show(part, rows):
        for row in rows:
            cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            print(f"{part:<11}", ", ".join(cells), flush=True)
        return rows

    result = {"header": dict(environment(cfg), amp=cfg.amp, compile=cfg.compile, attack_steps=steps)}
    show("header", [result["header"]])
    for batch in (32, 128):
        for part, rows in bench_core(cfg, batch, steps, 5 if on_cuda else 128 // batch).items():
            result[part] = result.get(part, []) + show(part, rows)
    result["kernel"] = show("kernel", bench_kernel(device) if on_cuda else [])
    result["forward"] = show("forward", bench_forward(device) if on_cuda else [])
    result["autoattack"] = {row.pop("attack"): row for row in show("autoattack", bench_autoattack(cfg))}
    a, b = (torch.randn(2048, 2048, device=device, dtype=AMP_DTYPE[cfg.amp]) for _ in "ab")
    rate = 2 * 2048**3 / timed({"matmul": lambda: a @ b}, 5, device)["matmul"]
    # a step: forward and input gradient, 0.556 G multiply-adds each
    result["matmul_share"] = max(row["images_per_s"] for row in result["attack"]) * 4 * 556e6 * steps / rate
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    print(f"{100 * result['matmul_share']:.0f} % of the {cfg.amp} matmul rate; see {path}", flush=True)


# 13  Command line =====================================================================================================
class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage too; one line is enough
        raise UserError(message)


def choices_of(f):
    """The words that a field of Config can have, empty for any; rows that others add to METHODS or ARCHS count, too."""
    return {"method": METHODS, "arch": ARCHS, "data": DATASETS}.get(f.name, f.metadata["choices"])


def _value(f, text):
    """One flag's text -> its value, or a tuple of values where it takes a comma list; argparse names the flag."""
    meta, choices, values = f.metadata, choices_of(f), {}  # in order, without repeats: a run folder holds one run
    low, high = meta.get("low", 0), meta.get("high", 1e12)
    text = ",".join(METHODS) if (f.name, text) == ("method", "all") else text
    for part in text.split(",") if "many" in meta else [text]:
        try:
            value = f.type(part.strip())
            fits = re.fullmatch(meta.get("pattern", ".+"), value) if f.type is str else low <= value <= high
        except ValueError:
            fits = False
        if not fits or (choices and value not in choices):
            bounds = meta["help"] if f.type is str else f"{f.type.__name__} from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{part!r}: want {', '.join(choices) or bounds}")
        values[value] = None
    return tuple(values) if len(values) > 1 else value


def parse_args(argv=None) -> Config:
    """Read the command line (default ``sys.argv[1:]``) into a Config; UserError for a value that no flag can have. A
    field given several comma-separated values holds a tuple; `expand` makes the product."""
    examples = "examples:\n" + __doc__.split("\n\n")[2]
    parser_options = dict(epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = group = _Parser("ltsd.py", "ltsd.py [options] [RUN ...]", __doc__.split("\n\n")[0], **parser_options)
    for f in fields(Config):
        group = parser.add_argument_group(f.metadata["group"]) if "group" in f.metadata else group
        choices = choices_of(f)
        kind = dict(metavar="{" + ",".join(choices) + "}" if choices else f.type.__name__.upper())
        kind = dict(action="store_true") if f.type is bool else kind | dict(type=functools.partial(_value, f))
        kind["help"] = f.metadata["help"] + "; a comma list makes a run each" * ("many" in f.metadata)
        kind["help"] += f" ({f.default})" if f.default not in (None, False, ()) else ""
        if f.name == "runs":
            group.add_argument("runs", nargs="*", metavar="RUN", help=kind["help"])
        else:
            group.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_intermixed_args(argv))
    return Config(**given | {"runs": tuple(given.get("runs", ()))})


def expand(cfg) -> list:
    """The scalar, resolved Configs that a Config with comma lists stands for: their product, each with its folder."""
    lists = {k: values for k, values in vars(cfg).items() if isinstance(values, tuple) and k != "runs"}
    configs = [resolve(replace(cfg, **dict(zip(lists, values)))) for values in itertools.product(*lists.values())]
    if len(configs) > 1 or not cfg.out:
        configs = [replace(one, out=str(pathlib.Path(cfg.out or "runs", run_name(one)))) for one in configs]
    return configs


def resolve(cfg) -> Config:
    """Fill every None of a scalar Config with its default and 'auto' with what this machine has; UserError, with the
    flag and the remedy, for settings that do not go together."""
    row, (_, size, _, defaults) = METHODS[cfg.method], DATASETS[cfg.data]
    if cfg.official and cfg.data not in row.official_data:
        known = ", ".join(row.official_data) or "no data set"
        raise UserError(f"--official: {cfg.method} has published settings for {known}, not for {cfg.data}")
    if cfg.image_size not in (None, size) and cfg.data != "folder":
        raise UserError(f"--image-size {cfg.image_size}: only --data folder can be resized; leave it out")
    usual = COMMON | dict(image_size=size, eval_eps=cfg.eps) | defaults | (row.official if cfg.official else {})
    if cfg.teacher_data == "full":  # Figure 5's other teachers see all of D, for as long as a student
        usual |= {f"teacher_{key}": getattr(cfg, key) or usual[key] for key in ("epochs", "batch_size")}
    cfg = replace(cfg, **{k: v for k, v in usual.items() if getattr(cfg, k) is None})
    for flag in ("batch_size", "teacher_batch_size"):
        if getattr(cfg, flag) % WORLD:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: must be a multiple of {WORLD} processes")
    stage = "distill" if cfg.stage == "train" else cfg.stage
    if cfg.overwrite and (stage == "eval" or (stage == "distill" and row.teacher)):
        raise UserError(f"--overwrite: would delete what --stage {stage} needs; use another stage, or leave it out")
    uses = dict(checkpoint=("eval",), runs=("report",), examples=("eval", "all"))
    for name, stages in (uses | dict(figures=("eval", "report", "all", "theory"))).items():
        if getattr(cfg, name) and stage not in stages:
            raise UserError(f"--{name} {getattr(cfg, name)}: goes with --stage {' or '.join(stages)} only")
    name = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if WORLD > 1 and name.startswith("cuda") else name
    gpus = torch.cuda.device_count()
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name) or (name != "cpu" and int(name[5:] or 0) >= gpus):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N; PyTorch sees {gpus} CUDA devices")
    amp = best_precision(torch.device(name)) if cfg.amp == "auto" else cfg.amp
    compiled = {"auto": "off" if name == "cpu" else "on"}.get(cfg.compile, cfg.compile)
    return replace(cfg, device=name, amp=amp, stage=stage, compile=compiled)


def best_precision(device) -> str:
    """'bf16' where this device multiplies faster in it than in float32, else 'off'."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "off"


def tune_process(cfg):
    """Process-wide settings of a run. On Linux CPUs malloc keeps what it has: a network's activations would else be
    given back and faulted in again in every step."""
    torch.backends.cudnn.benchmark = True
    if cfg.compile == "on":  # all networks share one forward; PyTorch's default keeps 8 versions of a function
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
    if cfg.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(cfg.device).index or 0)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no mapping of its own below a GiB
            ctypes.CDLL(None).mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: give nothing back


def run_one(cfg, argv):
    """All that one scalar, resolved Config asks for: teacher, student, evaluation, in its folder."""
    tune_process(cfg)
    data = None if RANK else load_data(cfg)
    gather(None)  # rank 0 has fetched and decoded for all
    data = (data or load_data(cfg)).to(cfg.device)
    task = teacher_task(cfg, data) if METHODS[cfg.method].teacher or cfg.stage == "teacher" else None
    given, epoch, _ = load_net(*task, cfg.teacher) if task and cfg.teacher else (None, None, None)
    run = Run(cfg, data, argv)  # --overwrite may delete the teacher that was given
    path = run.path / "teacher.pt"
    with run.file:
        if given:
            if not all(gather(path.exists())):
                run.log(f"teacher: a copy of {cfg.teacher}, weights crc32 {weights_crc32(given)}")
                run.save_model("teacher", weights_of(given), epoch)
                gather(None)
            if weights_crc32(load_net(*task, path)[0]) != weights_crc32(given):
                raise UserError(f"{run.path} has another teacher than {cfg.teacher}: choose another --out")
        elif task and cfg.stage in ("teacher", "all") and not path.exists():
            train("teacher", *task, run)
        if cfg.stage in ("distill", "all") and not (run.path / "last.pt").exists():
            teacher = load_net(*task, path)[2][0] if task else None
            if teacher and cfg.compile == "on":
                teacher.speed_up(cfg.batch_size // WORLD * (1 if cfg.kd == "kl" else 2))
            train("student", cfg, data, run, teacher and torch.no_grad()(teacher))
        if cfg.stage in ("eval", "all"):
            evaluate_run(cfg, data, run)
            report([run.path], cfg, run.path)


def run_stages(cfg, argv):
    """What a command line asks for."""
    configs, parent = expand(cfg), pathlib.Path(cfg.out or "runs")
    several, stage = len(configs) > 1, configs[0].stage
    if WORLD > 1 and stage in ("report", "theory", "bench"):
        raise UserError(f"--stage {stage}: works in one process; start it with python, not torchrun")
    if cfg.figures:
        with blaming("--figures needs matplotlib: pip install matplotlib", ImportError):
            importlib.import_module("matplotlib.figure")  # what is missing is said now, not after days
    if stage == "theory":
        print(theory(), flush=True)
        if cfg.figures:
            theory_figures(cfg.figures)
    elif stage == "bench":
        stage_bench(replace(configs[0], out=cfg.out))
    elif cfg.runs:
        found = [path for g in cfg.runs for path in [p for p in sorted(glob.glob(g)) if os.path.isdir(p)] or [g]]
        report(map(pathlib.Path, found), cfg, pathlib.Path(cfg.out or "."))
    else:
        for one in configs if stage != "report" else ():
            run_one(replace(one, figures=None) if several else one, argv)
        if stage == "report" or (several and stage in ("eval", "all")):
            report([pathlib.Path(one.out) for one in configs], cfg, parent)


def main(argv=None) -> int:
    """The command line: one run per element of the comma lists' product. Returns the exit code: 0, 2 for an error of
    the user's (one line on stderr), 130 for Ctrl-C. Errors of ours are raised."""
    global RANK, WORLD
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if {"RANK", "LOCAL_RANK"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun
            # one rank's share of AutoAttack may end hours after another's; of a rank that dies torchrun takes notice
            dist.init_process_group(timeout=timedelta(days=2))
            RANK, WORLD = dist.get_rank(), dist.get_world_size()
        run_stages(parse_args(argv), argv)
        if WORLD > 1:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        code, said = 130, "stopped; the same command goes on after the last saved epoch"
    except UserError as error:
        code, said = 2, f"error: {' '.join(str(error).split())}"
    except (MemoryError, torch.OutOfMemoryError) as error:
        code, said = 2, f"error: out of memory ({error}): try smaller batches, a smaller --gamma or --train-limit"
    if not RANK:
        print(f"ltsd: {said}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
