"""Long-Tailed Adversarial Training with Self-Distillation (ICLR 2025) in one file.

Adversarial training on long-tailed data leaves the rare classes defenceless. The paper's remedy,
reproduced here: an adversarially trained *self-teacher* is fitted on a class-balanced resample D_B
of the long-tailed set D; the student, trained adversarially on all of D with balanced softmax,
distils from it. Section 3 is the method, `_ltsd` its loss.

    python ltsd.py --data synthetic                      # the whole pipeline, on made-up images
    python ltsd.py --data cifar100 --ir 10 --stage all   # a row of Table 2, all of its stages
    python ltsd.py --data cifar10 --method all           # Table 1: every method, one table
    python ltsd.py --data folder --data-dir DIR --ir 50  # DIR/train/CLASS/*, DIR/test/CLASS/*
    python ltsd.py --stage report 'runs/*'               # a table of what there is
    torchrun --nproc-per-node 4 ltsd.py ...              # any of them on four GPUs of this machine

Sections: 1 setup, 2 config, 3 the method, 4 step and attack, 5 training, 6 data, 7 models,
8 autoattack, 9 evaluation, 10 runs and report, 11 theory, 12 bench, 13 command line. Images are
float32 in [0,1], NCHW, channels_last; labels are int64; eps and step_size are fractions in the
functions and 255ths on the command line. Importing changes nothing.
"""

# 1  Setup =========================================================================================
import os

if __name__ == "__main__":
    # Threads that spin while they wait make a run ten times slower beside any other program.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import copy
import ctypes
import glob
import io
import itertools
import json
import math
import re
import struct
import sys
import time
import warnings
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
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
AMP_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}

# Several processes, each a "rank" of a group that torchrun started: only `main` changes these two,
# so that in somebody's distributed program the imported functions act as one process.
RANK, WORLD = 0, 1


class UserError(Exception):
    """A mistake the user can mend: `main` prints its one line and returns 2."""


def first_line(error):
    """What an error says in its first line, without what torch says before the reason."""
    reason = getattr(error, "strerror", None) or str(error)
    reason = re.split("WeightsUnpickler error:|state_dict for Net:", reason)[-1]
    return reason.strip().partition("\n")[0][:60] or "no reason given"


@contextmanager
def blaming(what, kinds):
    """Inside, errors of these kinds become the UserError `what`, which says how to mend it."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the file
        raise
    except kinds as error:
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)})") from error


def floats(text) -> list:
    """The numbers of a comma list."""
    return list(map(float, text.split(",")))


def say(text, end="\n", file=None):
    """Print text: on rank 0 to stdout, or to `file`. What the screen cannot take ends no run."""
    stream = file or sys.stdout
    if stream is None or (RANK and file is None):  # None: closed by the shell
        return
    try:
        encoding = stream.encoding or "utf-8"
        stream.write((text + end).encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # a closed pipe, a lost terminal, a full disk
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show_progress(text=""):
    """Rewrite a terminal's progress line; without text, wipe it. In a pipe: nothing."""
    if RANK == 0 and sys.stderr is not None and sys.stderr.isatty():
        say(f"{text:<79}", end="\r", file=sys.stderr)


def derive_seed(*words):
    """A 32-bit seed from the run's seed and a purpose: no two purposes share a random stream."""
    return zlib.crc32(repr(words).encode())


def random_stream(device, *words):
    """The generator of a purpose, on a device; words as in derive_seed."""
    return torch.Generator(device).manual_seed(derive_seed(*words))


def gather(value) -> list:
    """The value (CPU tensor, number, string, list, None) of every rank, after waiting for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def average_over_ranks(tensors):
    """Replace tensors of one dtype by their mean over the ranks, in one collective."""
    if WORLD == 1 or not tensors:
        return
    flat = torch._utils._flatten_dense_tensors(tensors) / WORLD
    dist.all_reduce(flat)
    torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))


# 2  Config ========================================================================================
def _flag(default, help, choices="", low=0):
    """A flag with its help; choices: words that it can have; low: the least a number can be."""
    return field(default=default, metadata=dict(help=help, choices=choices.split(), low=low))


_count = partial(_flag, low=1)


# The defaults are the paper's; a data set and --official have some of their own. Once `resolve` has
# filled in the defaults, None means that the run does not use a setting; for ir and gamma with
# --data folder, that they follow from the data.
# fmt: off
@dataclass(frozen=True)
class Settings:
    """What makes a run: another value of any of these is another run, in a folder of its own. All
    but milestones and official take a comma list, which makes a run for each value."""

    data: str = _flag("cifar100", "data set")
    image_size: int = _flag(32, "side of the images of --data folder", low=16)
    ir: float = _flag(10.0, "n_max/n_min; cifar10 50, synthetic 20, folder as it is", low=1)
    method: str = _flag("ltsd", "training method, or 'all'")
    arch: str = _flag("resnet18", "network; tinyimagenet preactresnet18, synthetic resnet8")
    aug: str = _flag("none", "RandAugment or AutoAugment before crop and flip", "none ra aua")
    alpha: float = _flag(40.0, "distillation weight after its ramp; synthetic 10")
    tau: float = _flag(1.0, "strength of the class prior, b_c = tau ln n_c")
    gamma: float = _flag(None, "D_B: floor(gamma n_min) images a class (max(1, IR/2))", low=1e-6)
    beta: float = _flag(6.0, "weight of the KL term of trades, mart and robal")
    kd: str = _flag("igdm", "distil indirect gradients, or KL at x'", "igdm kl")
    teacher_method: str = _flag("pgd-at", "teacher's method", "pgd-at at-bsl robal reat")
    teacher_data: str = _flag("balanced", "what the teacher sees: D_B or D", "balanced full")
    official: bool = _flag(False, "the method's own published optimiser settings")
    epochs: int = _count(100, "student epochs; synthetic 10")
    teacher_epochs: int = _count(30, "teacher epochs; on D --epochs; synthetic 6")
    batch_size: int = _count(128, "student batch size; synthetic 32")
    teacher_batch_size: int = _count(32, "teacher batch size; on D --batch-size")
    lr: float = _flag(0.1, "first learning rate of SGD")
    milestones: str = _flag("0.75,0.9", "shares of the epochs after which the rate drops")
    weight_decay: float = _flag(5e-4, "weight decay")
    momentum: float = _flag(0.9, "momentum")
    eps: float = _flag(8.0, "L-inf radius of the training attack, in 255ths")
    step_size: float = _flag(2.0, "step of the training attack, in 255ths")
    steps: int = _flag(10, "steps of the training attack")
    train_limit: int = _count(None, "about this many training images, before the long tail")
    test_limit: int = _count(None, "about this many test images")
    seed: int = _flag(0, "seed of the weights, of D_B and of every other draw")
    role: str = "student"  # no flag; 'teacher': trained on D_B (on all of D it is a 'student')


@dataclass(frozen=True)
class Config(Settings):
    """A run's Settings, and what may change whenever the same run is started again."""

    stage: str = _flag("all", "what to do", "all teacher distill train eval report theory bench")
    data_dir: str = _flag("data", "folder that holds, or will hold, the data")
    teacher: str = _flag(None, "checkpoint to use as the teacher (copied into the run)")
    eval_eps: float = _flag(None, "L-inf radius of the evaluation, in 255ths (--eps)")
    eval_step_size: float = _flag(2.0, "step of the evaluation's PGD, in 255ths")
    eval_steps: int = _flag(20, "steps of the evaluation's PGD")
    attacks: str = _flag("clean,pgd,aa", "comma list of clean, pgd, aa; synthetic clean,pgd")
    device: str = _flag("auto", "auto, cpu, cuda or cuda:N")
    amp: str = _flag("auto", "precision of the convolutions", "auto bf16 fp16 off")
    compile: str = _flag("auto", "compile, on CUDA as graphs; auto: on CUDA", "auto on off")
    out: str = _flag("runs", "folder that holds the run folders")
    checkpoint: str = _flag(None, "with --stage eval: score this file, not the run's own")
    mean: str = _flag(None, "with --checkpoint or --teacher: the network gets (x - mean) / std")
    std: str = _flag(None, "see --mean; three numbers each, as in 0.49,0.48,0.45")
    examples: int = _count(None, "evaluated images to save, clean and attacked, as a PNG")
    figures: str = _flag(None, "folder for figures of the table or the theory")
    runs: tuple = ()  # no flag: run folders for --stage report (else those that the flags name)

    @property
    def row(self):
        """The method's row of METHODS."""
        return METHODS[self.method]


DATASETS = {  # defaults of their own
    "cifar10":      dict(ir=50.0),
    "cifar100":     {},
    "tinyimagenet": dict(arch="preactresnet18"),
    "folder":       dict(ir=None),
    "synthetic":    dict(ir=20.0, arch="resnet8", alpha=10.0, epochs=10, batch_size=32,
                         teacher_epochs=6, attacks="clean,pgd"),
}
# fmt: on


# 3  The method ====================================================================================
def balanced_indices(labels, per_class, seed) -> np.ndarray:
    """The paper's D_B (section 4.2): exactly per_class positions of every class. Each
    image of a class of n is repeated floor(per_class/n) times; the remainder is drawn without
    replacement. labels: int [N], classes 0..C-1; per_class: whole number >= 1. Returns int64
    [C*per_class]. ValueError for another per_class or an empty class."""
    if per_class < 1 or per_class % 1:
        raise ValueError(f"per_class {per_class}: must be a whole number of at least 1")
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    chosen = []
    for c in range(labels.max() + 1):
        members = np.flatnonzero(labels == c)
        if len(members) == 0:
            raise ValueError(f"class {c} has no image to resample")
        whole, rest = divmod(int(per_class), len(members))
        chosen += [np.tile(members, whole), rng.choice(members, rest, replace=False)]
    return np.concatenate(chosen)


def balanced_data(cfg, data):
    """D_B as Data: floor(gamma n_min) images of every class of D, at least one, drawn once a run.
    gamma is half the imbalance ratio, at least 1, where the Config has none."""
    smallest = min(data.counts)
    gamma = cfg.gamma or max(1.0, max(data.counts) / smallest / 2)
    per_class = max(1, math.floor(gamma * smallest + 1e-9))  # 15/11 of 11 are 15
    drawn = balanced_indices(data.train_labels.cpu(), per_class, derive_seed(cfg.seed, "balanced"))
    return replace(
        data, train_images=data.train_images[drawn], train_labels=data.train_labels[drawn]
    )


def _float32(tensor):
    """Half precision as float32, the rest as it is: class priors and 1e-12 need the range."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _class_counts(counts, logits):
    """Training images per class like the logits; ValueError for another number of classes."""
    counts = torch.as_tensor(counts).to(logits)
    if counts.shape != logits.shape[1:]:
        raise ValueError(
            f"counts has shape {list(counts.shape)}: "
            f"want one count for each of {logits.shape[1]} classes"
        )
    return counts


def balanced_softmax_loss(logits, y, counts, tau=1.0) -> Tensor:
    """Mean of -log softmax(z + b)[y] with b_c = tau ln n_c (eq. 1; Ren et al. 2020). logits: float
    [N,C]; y: int64 [N]; counts: training images per class, C values >= 1. Uniform counts or tau 0
    give plain cross-entropy. Returns a scalar; ValueError for counts of another length."""
    logits = _float32(logits)
    prior = tau * _class_counts(counts, logits).log()
    return F.cross_entropy(logits + prior, y)


def _kl(p, q):
    """Mean KL(softmax(p) || softmax(q)); float logits [N,C], both carry gradient."""
    log_p = F.log_softmax(_float32(p), 1)
    log_q = F.log_softmax(_float32(q), 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def distillation_loss(student, teacher) -> Tensor:
    """Mean KL(softmax(teacher) || softmax(student)); float logits [N,C], the teacher's detached."""
    return _kl(teacher.detach(), student)


def igdm_loss(student_plus, student_minus, teacher_plus, teacher_minus) -> Tensor:
    """Indirect gradient distillation (Lee et al. 2023): mean KL(softmax(T+ - T-) || softmax(S+ -
    S-)). Float logits [N,C] of student and teacher at x+d (plus) and x-d (minus), d = x'-x; the
    teacher's are detached. Returns a scalar >= 0."""
    student = _float32(student_plus) - _float32(student_minus)
    teacher = _float32(teacher_plus) - _float32(teacher_minus)
    return distillation_loss(student, teacher)


def trades_loss(logits, logits_adv, y, beta=6.0) -> Tensor:
    """Mean CE(z(x), y) + beta * mean KL(p(x) || p(x')) (TRADES, Zhang et al. 2019). logits,
    logits_adv: float [N,C] at x and x', both with gradient; y: int64 [N]. Returns a scalar."""
    logits = _float32(logits)
    return F.cross_entropy(logits, y) + beta * _kl(logits, logits_adv)


def of_class(values, y):
    """values[i, y[i]] of every row i."""
    return values.gather(1, y[:, None]).flatten()


def mart_loss(logits, logits_adv, y, beta=6.0) -> Tensor:
    """MART (Wang et al. 2020): mean[CE(z(x'), y) - ln(1.0001 - p_k(x') + 1e-12)] + beta *
    mean[KL(p(x) || p(x')) * (1.0000001 - p_y(x))], k the most probable class of x' but y; the KL
    takes ln(p(x') + 1e-12). Arguments as in trades_loss."""
    logits_adv = _float32(logits_adv)
    clean = F.log_softmax(_float32(logits), 1)
    adv = F.softmax(logits_adv, 1)
    rival = adv.scatter(1, y[:, None], 0.0).amax(1)
    boosted = F.cross_entropy(logits_adv, y) - (1.0001 - rival + 1e-12).log().mean()
    divergence = F.kl_div((adv + 1e-12).log(), clean, reduction="none", log_target=True).sum(1)
    unsure = 1.0000001 - of_class(clean, y).exp()
    return boosted + beta * (divergence * unsure).mean()


def robal_loss(scores, scores_adv, y, counts, *, scale, margin, tau_b, tau_m, beta) -> Tensor:
    """RoBal (Wu et al. 2021): CE of scale*(s(x') - m_y 1_y) + tau_b ln(n/N) plus beta * mean
    KL(p(x) || p(x')), m_c = margin + tau_m/scale * ln(n_c/n_min). scores, scores_adv: cosine scores
    [N,C] at x and x'; the KL's softmaxes are of these, unscaled, with ln(p(x') + 1e-12)."""
    scores = _float32(scores)
    scores_adv = _float32(scores_adv)
    counts = _class_counts(counts, scores)
    margins = margin + tau_m / scale * (counts / counts.min()).log()
    shifted = scores_adv - margins * F.one_hot(y, len(counts))
    prior = tau_b * (counts / counts.sum()).log()
    log_adv = (F.softmax(scores_adv, 1) + 1e-12).log()
    divergence = F.kl_div(log_adv, F.softmax(scores, 1), reduction="batchmean")
    return F.cross_entropy(scale * shifted + prior, y) + beta * divergence


def reat_class_weights(counts, predicted) -> Tensor:
    """REAT's weights in its attack, by effective numbers (Cui et al. 2019): w_c ~ 1 / (E_c + 1e-5),
    sum C, E_c = (1 - b^a)/(1 - b), b = (n_c - 1)/n_c. counts: training images n_c >= 1 [C];
    predicted: a_c [C], how often the network predicted the class at x' in the epoch before. float64
    inside, since 1 - b^a cancels. Returns float32 [C]."""
    n = torch.as_tensor(counts).double()
    a = torch.as_tensor(predicted).double()
    b = (n - 1) / n
    weights = 1 / ((1 - b**a) * n + 1e-5)
    return (weights * len(n) / weights.sum()).float()


def reat_tail_loss(features, y, counts) -> Tensor:
    """REAT's tail term (Li et al. 2023) as its released code computes it: the mean over the batch's
    samples i of the tail third of the classes, 0 without any, of mean_j(s_ij (u_yi + u_yj)) *
    mean_j KL(softmax f_i || softmax f_j) / d, with s = -1 within a class and +1 between, u_c =
    sqrt(N/n_c), f_i detached. (The paper weights each pair by itself.) features: float [B,d]; y:
    int64 [B]; counts: [C]. Returns a scalar."""
    features = _float32(features)
    counts = torch.as_tensor(counts).to(features)
    log_p = F.log_softmax(features, 1)
    anchor = log_p.detach()
    negative_entropy = (anchor.exp() * anchor).sum(1, keepdim=True)
    divergence = negative_entropy - anchor.exp() @ log_p.T  # [i,j] = KL(i || j)
    divergence = divergence.mean(1, keepdim=True) / features.shape[1]
    sign = 1 - 2 * (y[:, None] == y)
    u = (counts.sum() / counts).sqrt()[y]
    per_anchor = (sign * (u[:, None] + u) * divergence).mean(1)
    is_tail = y > 2 * (len(counts) // 3)
    return (per_anchor * is_tail).sum() / is_tail.sum().clamp_min(1)


@contextmanager
def awp_perturbation(model, loss_fn, gamma):
    """AWP (Wu et al. 2020): inside, every trainable w of two or more dimensions is w + v, v = gamma
    |w| g/|g|, g the gradient of loss_fn() at w; afterwards v is subtracted again. v is 0 for a w
    with a g that is not finite, since NaN could not be subtracted. gamma 0 does nothing at all. The
    ascent's own forward leaves the model's buffers as they were."""
    if gamma == 0:
        yield
        return
    weights = [w for w in model.parameters() if w.dim() > 1 and w.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        gradients = torch.autograd.grad(loss_fn(), weights, materialize_grads=True)
    finally:
        for buffer, before in buffers:
            buffer.copy_(before)
    average_over_ranks(gradients)
    steps = []
    with torch.no_grad():
        for w, g in zip(weights, gradients):
            step = g * (gamma * w.norm() / (g.norm() + 1e-20))
            steps.append(step.nan_to_num_(0, 0, 0))
        torch._foreach_add_(weights, steps)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(weights, steps)


@dataclass
class Batch:
    """What an outer loss may look at. student(x) -> logits, with_features=True: (logits, features);
    teacher(x) -> logits, no gradient; a method's own setting is a Config field, cfg.NAME."""

    student: Callable
    x: Tensor
    x_adv: Tensor
    y: Tensor
    counts: Tensor  # training images per class
    cfg: Config
    alpha: float | Tensor = 0.0  # the epoch's weight of the distillation; a tensor in a graph
    teacher: Callable | None = None


# The outer losses, one for each row of METHODS: Batch -> (scalar, logits at x'). On CUDA they are
# captured as a graph, so no .item() and no `if` on tensors; AWP calls them twice.
def _pgd_at(batch):
    logits = batch.student(batch.x_adv)
    return F.cross_entropy(logits, batch.y), logits


def _at_bsl(batch):
    logits = batch.student(batch.x_adv)
    return balanced_softmax_loss(logits, batch.y, batch.counts, batch.cfg.tau), logits


def _ltsd(batch):
    """The paper: balanced softmax at x' plus alpha times the distillation from the self-teacher,
    for which it cites IGDM (Lee et al. 2023)."""
    fit, logits = _at_bsl(batch)
    if batch.cfg.kd == "kl":
        distillation = distillation_loss(logits, batch.teacher(batch.x_adv))
    else:
        minus = 2 * batch.x - batch.x_adv  # x - d, not clipped, as in IGDM's code
        student_minus = batch.student(minus)
        teacher_plus, teacher_minus = batch.teacher(torch.cat([batch.x_adv, minus])).chunk(2)
        distillation = igdm_loss(logits, student_minus, teacher_plus, teacher_minus)
    return fit + batch.alpha * distillation, logits


def _reat(batch):
    logits, features = batch.student(batch.x_adv, with_features=True)
    fit = balanced_softmax_loss(logits, batch.y, batch.counts, batch.cfg.tau)
    return fit + reat_tail_loss(features, batch.y, batch.counts), logits


def _clean_and_adversarial(loss, batch):
    """TRADES, MART and RoBal look at x as well as at x'."""
    logits = batch.student(batch.x)
    logits_adv = batch.student(batch.x_adv)
    return loss(logits, logits_adv, batch.y, beta=batch.cfg.beta), logits_adv


def _robal(batch):
    # RoBal-R's published constants: its CIFAR-10 row up to 10 classes, its CIFAR-100 row beyond
    constants = dict(margin=0.1, tau_b=1.5, tau_m=0.3)
    if len(batch.counts) > 10:
        constants = dict(margin=0.3, tau_b=0, tau_m=0)
    loss = partial(robal_loss, counts=batch.counts, scale=10.0, **constants)
    return _clean_and_adversarial(loss, batch)


# What training attacks ascend: (logits at x', y, aux) -> a mean over the images. aux, a tensor or
# None, comes from the row's `aux`, once per batch.
def cross_entropy_objective(logits, y, aux=None):
    """Mean cross-entropy, PGD's (Madry et al. 2018). aux: class weights [C], REAT's: in eval mode
    they only scale an image's gradient, and the sign steps are those of plain cross-entropy."""
    return F.cross_entropy(logits, y, weight=aux)


def kl_objective(logits, y, aux):
    """Mean KL(p(x) || p(x')), what TRADES' attack ascends; aux: the logits at x, [N,C]."""
    return _kl(aux, logits)


def _clean_logits(frozen, x, counts, predicted):
    return frozen(x)


def _reat_weights(frozen, x, counts, predicted):
    # An image of a class that was never predicted weighs so much that in float16 the gradients of
    # the others become zero. Without weights the steps are the same.
    if frozen.dtype == torch.float16:
        return None
    return reat_class_weights(counts, predicted)


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    loss: Callable  # Batch -> (scalar, logits at x')
    objective: Callable | None = cross_entropy_objective  # of the training attack; None: x' = x
    init: str = "gauss"  # where the attack starts
    # (frozen, x, counts, predicted) -> the objective's third argument
    aux: Callable = lambda *_: None
    uses: tuple = ("alpha", "tau", "beta", "kd")  # which of these settings the loss reads
    head: str = "linear"
    awp: float = 0.0  # gamma of the weight perturbation around the step
    teacher: bool = False  # needs the self-teacher
    # may the attack be bf16 or fp16? Not where the objective is flat at x
    low_precision: bool = True
    official: dict = field(default_factory=dict)  # the method's own published settings ...
    official_data: tuple = ()  # ... and the data sets they were published for


# Published settings: robust_overfitting's (pgd-at), the methods' own; RoBal's with a step decay.
CIFAR = ("cifar10", "cifar100")
ALL_THREE = (*CIFAR, "tinyimagenet")
# fmt: off
PGD_AT = Method(_pgd_at, init="uniform", uses=(), official_data=CIFAR,
                official=dict(epochs=200, milestones="0.5,0.75"))
METHODS = {  # a row may be added from outside, as the README shows
    "natural": Method(_pgd_at, objective=None, uses=()),
    "pgd-at": PGD_AT,
    "trades": Method(
        partial(_clean_and_adversarial, trades_loss), kl_objective, aux=_clean_logits,
        low_precision=False,  # near x rounding drowns its gradient: bf16 is 6 % weaker
        uses=("beta",),
        official=dict(epochs=76, milestones="0.974", weight_decay=2e-4), official_data=("cifar10",),
    ),
    "mart": Method(
        partial(_clean_and_adversarial, mart_loss), uses=("beta",), official_data=("cifar10",),
        official=dict(
            epochs=120, milestones=".617,.742,.825", lr=0.01, weight_decay=3.5e-3, beta=5.0,
        ),
    ),
    "awp": replace(PGD_AT, awp=0.01),
    "robal": Method(
        _robal, uses=("beta",), head="cosine", official_data=CIFAR,
        official=dict(epochs=80, milestones="0.75,0.9375", batch_size=64, weight_decay=2e-4),
    ),
    "reat": Method(
        _reat, init="uniform", aux=_reat_weights, uses=("tau",),
        official=dict(epochs=80, milestones="0.75,0.9375"), official_data=CIFAR,
    ),
    "at-bsl": Method(
        _at_bsl, uses=("tau",),
        official=dict(milestones="0.74,0.89,0.99"), official_data=ALL_THREE,
    ),
    "ltsd": Method(_ltsd, uses=("alpha", "tau", "kd"), teacher=True, official_data=ALL_THREE),
}
# fmt: on


# 4  Step and attack ===============================================================================
# One step: x_adv <- clip to [0,1] of clip to [x-eps, x+eps] of (x_adv + step_size * sign(grad))
def pgd_step_reference(x_adv, grad, x, step_size, eps) -> Tensor:
    """One L-inf PGD step in plain PyTorch: the truth that the kernel equals bit for bit. x_adv, x:
    float32 in [0,1], any shape; grad: that shape, any float dtype; step_size, eps: fractions of the
    pixel range. sign(0) and sign(NaN) are 0. Returns a new tensor."""
    sign = (grad > 0).to(x.dtype) - (grad < 0).to(x.dtype)
    moved = x_adv + step_size * sign
    projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return projected.clamp(0, 1)


if triton:

    @triton.jit
    def _pgd_step_kernel(
        adv_ptr,  # [n] float32, overwritten
        grad_ptr,  # [n] any float type
        x_ptr,  # [n] float32
        low_ptr,  # [n] any float type, overwritten; adv_ptr itself where no copy is wanted
        n,
        step_size,
        eps,
        BLOCK: tl.constexpr,
    ):
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x_adv = tl.load(adv_ptr + offsets, mask=mask)
        grad = tl.load(grad_ptr + offsets, mask=mask).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask)
        sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
        moved = x_adv + step_size * sign
        projected = tl.minimum(tl.maximum(moved, x - eps), x + eps)
        result = tl.minimum(tl.maximum(projected, 0.0), 1.0)
        tl.store(adv_ptr + offsets, result, mask=mask)
        tl.store(low_ptr + offsets, result.to(low_ptr.dtype.element_ty), mask=mask)


STEP_BLOCK = 1024  # 4 warps of 32 threads take 8 values each: two 16-byte float32 loads, one 16-bit


def pgd_step(x_adv, grad, x, step_size, eps, out_low=None) -> Tensor:
    """One L-inf PGD step in place on x_adv; also writes the copy that the next low-precision
    forward reads. x_adv, x: float32; grad: float32, bfloat16 or float16; out_low: None or one of
    those types; all of one shape, device and memory layout without gaps, of any size. A fused
    Triton kernel on CUDA where Triton works, and on any device when TRITON_INTERPRET=1; else the
    reference. Returns x_adv. ValueError on a mismatch."""
    low = x_adv if out_low is None else out_low
    # the kernel walks memory: another layout would silently pair the wrong pixels
    strides = torch.empty_like(x, device="meta").stride()  # x's own, unless x has gaps
    want = f"{list(x.shape)} {strides} {x.device}"
    for name, tensor in dict(x=x, x_adv=x_adv, grad=grad, out_low=low).items():
        got = f"{list(tensor.shape)} {tensor.stride()} {tensor.device}"
        dtypes = [torch.float32]
        if name in ("grad", "out_low"):
            dtypes = AMP_DTYPE.values()
        if got != want or tensor.dtype not in dtypes:
            raise ValueError(
                f"{name} is {tensor.dtype} {got}: "
                f"want float32 {want} (grad, out_low: or bf16, fp16)"
            )
    if triton and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        n = x.numel()
        with torch.cuda.device_of(x):
            kernel = _pgd_step_kernel[(triton.cdiv(n, STEP_BLOCK),)]
            kernel(x_adv, grad, x, low, n, step_size, eps, STEP_BLOCK)
    else:
        with torch.no_grad():
            x_adv.copy_(pgd_step_reference(x_adv, grad, x, step_size, eps))
            low.copy_(x_adv)
    return x_adv


class FrozenCopy(nn.Module):
    """What an attack needs of a Net and no more: eval mode, no parameter gradients, convolutions in
    `dtype`, each with the batch norm of its output folded in, float32 head. Images in [0,1] of any
    float dtype -> float32 logits. It follows its source when `refresh` is called, in place, so that
    compiled code and captured graphs, which `speed_up` adds for given batch sizes, see the new
    weights. Batches of any other size run as they are. `overflows` counts the gradients of training
    attacks that float16 could not hold."""

    def __init__(self, model, dtype=torch.float32):
        super().__init__()
        self.net = copy.deepcopy(model).eval().requires_grad_(False)
        self.dtype = dtype
        self.compiled = {}  # {batch size: compiled net}
        self.graphs = None
        self.overflows = next(model.parameters()).new_zeros(())
        self.source = model.state_dict(keep_vars=True)
        self.folded = {}  # {name of a convolution: name of the batch norm of its output alone}
        self.norm_eps = []  # of these batch norms
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Conv2d):  # its parent, which gives it a bias, came before
                module.to(dtype)
            prefix = f"{name}.".lstrip(".")
            for conv, norm in getattr(module, "folds", ()):
                # a shortcut may be empty, a block from outside may have another norm or a bias
                needed = {f"{prefix}{norm}.bias", f"{prefix}{norm}.running_var"}
                if needed <= self.source.keys() and f"{prefix}{conv}.bias" not in self.source:
                    self.folded[prefix + conv] = prefix + norm
                    self.norm_eps.append(module.get_submodule(norm).eps)
                    # room for the shift, which refresh writes there
                    module.get_submodule(conv).bias = module.get_submodule(norm).bias
                    module.set_submodule(norm, nn.Identity())
        self.targets = {}  # {dtype: {name: tensor}}: copying a mix would be slow
        for name, target in self.net.state_dict(keep_vars=True).items():
            self.targets.setdefault(target.dtype, {})[name] = target
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Take over the source's present weights and running statistics: w' = w s, b' = beta - mean
        s, with s = weight / sqrt(var + eps), for all layers in a few multi-tensor operations."""

        def of_norms(kind):
            return [self.source[f"{norm}.{kind}"] for norm in self.folded.values()]

        values = dict(self.source)
        if self.folded:  # not so in a network whose blocks have no `folds`
            variances = torch._foreach_add(of_norms("running_var"), self.norm_eps)
            scales = torch._foreach_div(of_norms("weight"), torch._foreach_sqrt(variances))
            means = torch._foreach_mul(of_norms("running_mean"), scales)
            shifts = torch._foreach_sub(of_norms("bias"), means)
            for conv, scale, shift in zip(self.folded, scales, shifts):
                values[f"{conv}.weight"] = values[f"{conv}.weight"] * scale.view(-1, 1, 1, 1)
                values[f"{conv}.bias"] = shift
        for targets in self.targets.values():
            torch._foreach_copy_(list(targets.values()), [values[name] for name in targets])

    def speed_up(self, *sizes):
        """Compile the forward for batches of these sizes; on CUDA also capture whole attacks."""
        self.compiled = dict.fromkeys(sizes, torch.compile(self.net, dynamic=False))
        if self.overflows.is_cuda:
            self.graphs = {}
        return self

    def forward(self, x):
        net = self.compiled.get(len(x), self.net)
        return net(x.to(self.dtype, memory_format=torch.channels_last))  # one layout, one graph


def capture_cuda_graph(function, inputs):
    """Warm up and capture function(*inputs) as a CUDA graph -> (what replays it, its result)."""
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # also sets the stream back where capturing fails
        for _ in range(3):
            function(*inputs)
        # thread_local: NCCL's own thread may call CUDA meanwhile
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = function(*inputs)
    return graph.replay, result


def attack_distance(wanted, got):
    """The share of the pixels of two attacks' images that differ, in percent."""
    return 100 * (got[0] != wanted[0]).float().mean()


def call_graphed(graphs, key, function, inputs, distance, updates):
    """function(*inputs), a tuple of tensors, valid until the next call, by a CUDA graph. The dict
    `graphs` keeps one for each key and each shape of the inputs. A graph is captured at its first
    call, on ones, so that a value frozen into it is found. updates() gives the tensors that the
    function changes in place. The first replay is compared with the function itself by
    distance(wanted, got), in units of what is tolerated: each is a list of the results, then of how
    much each tensor of updates() changed. Where a GPU's kernels are not reproducible, last bits
    that differ become 15 % of the pixels in ten sign steps; so twice the distance of two plain
    calls is tolerated, too (wrong labels would be 60 %). RuntimeError beyond that."""
    key = (key, *[tensor.shape for tensor in inputs])
    if key in graphs:
        return graphs[key](*inputs)
    updated = updates()
    before = [tensor.clone() for tensor in updated]
    buffers = [torch.ones_like(tensor) for tensor in inputs]
    replay, result = capture_cuda_graph(function, buffers)

    def replayed(*inputs):
        torch._foreach_copy_(buffers, inputs)
        replay()
        return result

    outcomes = []
    for run in (function, function, replayed):
        torch._foreach_copy_(updated, before)
        outcome = [tensor.clone() for tensor in run(*inputs)]
        outcome += torch._foreach_sub(updated, before)
        outcomes.append(outcome)
    wanted, again, got = outcomes
    if not distance(wanted, got) <= 1 + 2 * distance(wanted, again):
        raise RuntimeError("a CUDA graph differs from what it was captured from")
    graphs[key] = replayed
    return result


@contextmanager
def eval_mode(model):
    """Put a module into eval mode inside, and every submodule back into its mode afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        yield model.eval()
    finally:
        for module in training:
            module.training = True


def check_images(x, y, dtypes=(torch.float32,)):
    """ValueError unless x is NCHW of one of `dtypes`, floats in [0,1], and y int64 [N] beside it;
    also under torch.inference_mode."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks need gradients: call them outside torch.inference_mode()")
    given = f"{type(x)}, {type(y)}"
    fits = torch.is_tensor(x) and torch.is_tensor(y)
    if fits:
        labels = f"{y.dtype}, {list(y.shape)}, {y.device}"
        given = f"{x.dtype}, {list(x.shape)}, {x.device}, {labels}"
        wanted = f"torch.int64, {list(x.shape[:1])}, {x.device}"
        fits = x.ndim == 4 and x.dtype in dtypes and labels == wanted
    if not fits:
        raise ValueError(f"want images {dtypes[0]} [N,C,H,W] and labels int64 [N]; got {given}")
    if x.is_floating_point() and not torch.equal(x, x.clamp(0, 1)):  # NaN equals nothing
        raise ValueError(
            f"x spans [{x.min():g}, {x.max():g}]: images must lie in [0,1]; divide by 255?"
        )


def pgd_attack(
    model, x, y, *, eps, step_size, steps, init="uniform", objective=None, aux=None, generator=None
) -> Tensor:
    """L-inf PGD (Madry et al. 2018): signed gradient ascent of `objective` inside the eps-ball and
    [0,1]. model: any nn.Module with inputs in [0,1], run in eval mode and left as it was (mode,
    buffers, gradients); a Net, in float32, is replaced by its FrozenCopy, a FrozenCopy taken as it
    is. x: float32 [N,C,H,W] in [0,1]; y: int64 [N]; eps, step_size: fractions of the pixel range,
    in [0,1]; steps >= 0. init: 'uniform' U(-eps,eps), 'gauss' 0.001*N(0,1) as in TRADES, or 'none';
    the start is clipped to the ball and to [0,1]. objective(logits, y, aux) -> scalar, default mean
    cross-entropy. generator: of the start noise, on x's device. Returns the last iterate, detached.
    ValueError for other input."""
    radii_fit = 0 <= eps <= 1 and 0 <= step_size <= 1 and steps >= 0
    if not radii_fit or init not in ("uniform", "gauss", "none"):
        raise ValueError(
            f"eps {eps}, step_size {step_size}, steps {steps}, init {init!r}: "
            "want [0,1] (divide by 255?), init uniform, gauss or none"
        )
    net = model
    if not isinstance(model, FrozenCopy):  # the training loop's is neither checked nor protected
        check_images(x, y)
        net = FrozenCopy(model) if isinstance(model, Net) else ForeignNet(model)
        x = x.clone(memory_format=torch.contiguous_format)  # a view with gaps becomes dense
        y = y.clone()  # it may come from inference mode
    x = x.detach()
    noise = torch.zeros_like(x)
    if init == "uniform":
        noise.uniform_(-eps, eps, generator=generator)
    elif init == "gauss":
        noise.normal_(0, 1e-3, generator=generator)
    start = pgd_step_reference(x + noise, noise, x, 0.0, eps)  # no step, only the clipping
    inputs = [x, y, start]
    if aux is not None:
        inputs.append(aux)
    settings = (objective or cross_entropy_objective, eps, step_size, steps)
    ascend = partial(_ascend, net, *settings)
    if net.graphs is not None and len(x) in net.compiled:
        result = call_graphed(  # what the capture adds to overflows is taken back
            net.graphs, settings, ascend, inputs, attack_distance, lambda: [net.overflows]
        )
        return result[0].clone()
    with eval_mode(net):
        return ascend(*inputs)[0]


class ForeignNet(nn.Module):
    """A module that is not ours as images -> logits, on copies of the images. ValueError for what
    is no module and for what returns something else."""

    dtype = torch.float32
    graphs = None

    def __init__(self, model):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model is {type(model)}: want an nn.Module")
        self.model = model

    def forward(self, x):
        logits = self.model(x.clone())  # it may work in place
        if not torch.is_tensor(logits) or logits.ndim != 2:
            raise ValueError(
                f"the model returned {type(logits)}: want logits, a tensor [N,classes]"
            )
        return logits


# What the objective of an image is multiplied with before its gradient is taken: fp16 flushes to
# zero what is below 6e-8, as a confident image's gradient is.
GRADIENT_SCALE = 1024.0


def _ascend(forward, objective, eps, step_size, steps, x, y, start, aux=None):
    """(last iterate,) of the attack's steps from `start`; forward: images of its own `dtype` ->
    float32 logits."""
    dtype = forward.dtype
    scale = GRADIENT_SCALE * len(x) if dtype == torch.float16 else 1.0  # the objective is a mean
    x_adv = start.clone()
    low = x_adv.to(dtype)  # x_adv itself where that is float32
    for _ in range(steps):
        leaf = low.detach().requires_grad_()
        with torch.enable_grad():
            value = objective(forward(leaf), y, aux) * scale
        (grad,) = torch.autograd.grad(value, leaf)
        if dtype == torch.float16:
            forward.overflows += ~grad.isfinite().all()
        if grad.stride() != x.stride():
            grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
        pgd_step(x_adv, grad, x, step_size, eps, low)
    return (x_adv,)


# 5  Training ======================================================================================
def lr_at(epoch, epochs, lr, milestones) -> float:
    """The learning rate of an epoch (1 .. epochs): lr, divided by ten after each milestone, which
    is a share of the epochs, but never before the second epoch."""
    drops = sum(epoch > max(1, round(share * epochs, 6)) for share in milestones)
    return lr * 0.1**drops


def outer_step(row, batch, model, optimizer):
    """The optimiser's step on a batch; returns (loss, logits at x'), detached. Under torchrun every
    rank steps with the mean gradient and goes on with the mean running statistics, so that all
    attack one network."""
    model.train()
    with awp_perturbation(model, lambda: row.loss(batch)[0], row.awp):
        loss, logits = row.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        average_over_ranks([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()
    average_over_ranks([buffer for buffer in model.buffers() if buffer.is_floating_point()])
    return loss.detach(), logits.detach()


class Trainer:
    """A network in training with what its steps need: the frozen copy that is attacked, the
    optimiser and, where it compiles, what speeds both up, for whole batches only. The model itself
    stays as it is: what is saved has no trace of the compiler."""

    def __init__(self, cfg, model, counts, teacher=None):
        """teacher: a FrozenCopy."""
        self.cfg = cfg
        self.model = model
        self.row = cfg.row
        self.counts = torch.tensor(counts, dtype=torch.float32, device=cfg.device)
        self.predicted = self.counts  # how often each was, in the last epoch; the first: its images
        self.whole_batch = cfg.batch_size // WORLD
        self.teacher = teacher
        dtype = AMP_DTYPE[cfg.amp] if self.row.low_precision else torch.float32
        self.frozen = FrozenCopy(model, dtype)
        self.optimizer = torch.optim.SGD(
            model.parameters(), momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )
        self.compiled = model
        if cfg.compile != "off":
            self.compiled = torch.compile(model, dynamic=False)
            self.frozen.speed_up(self.whole_batch)
            if teacher:  # it sees x', or x' and x - d in one batch
                teacher.speed_up(self.whole_batch, 2 * self.whole_batch)

    def updated_tensors(self):
        """What an optimiser's step changes in place."""
        momentum = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return list(self.model.state_dict().values()) + momentum

    def step_distance(self, wanted, got):
        """How far two steps' losses, or what they change, are apart, relative to rounding."""
        rounding = 1e-4 if self.cfg.amp == "off" else 2**-6

        def norm(tensors):  # of all their numbers together, without the batches counted
            return nn.utils.get_total_norm([t for t in tensors if t.is_floating_point()])

        errors = torch._foreach_sub(got, wanted)
        loss = norm(errors[:1]) / norm(wanted[:1])
        changes = norm(errors[2:]) / norm(wanted[2:])  # behind the logits
        return torch.maximum(loss, changes) / rounding

    def student(self, x, **options):
        """The network as the outer loss calls it: in autocast."""
        network = self.compiled if len(x) == self.whole_batch else self.model
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.cfg.amp == "bf16"):
            return network(x, **options)

    def attack(self, x, y, generator):
        """The training attack's x'."""
        if self.row.objective is None:
            return x
        self.frozen.refresh()
        return pgd_attack(
            self.frozen,
            x,
            y,
            eps=self.cfg.eps / 255,
            step_size=self.cfg.step_size / 255,
            steps=self.cfg.steps,
            init=self.row.init,
            objective=self.row.objective,
            aux=self.row.aux(self.frozen, x, self.counts, self.predicted),
            generator=generator,
        )

    def step(self, x, x_adv, y, alpha, lr):
        """The optimiser's step at x' -> (loss, logits at x'). By a graph where the attack has them:
        at batch 32 the host would need longer for it than the device."""
        graphs = self.frozen.graphs
        # a graph looks for the momentum at one place: before the first step, and with --momentum 0,
        # there is none
        if graphs is None or WORLD > 1 or not self.optimizer.state or len(x) != self.whole_batch:
            return self._eager_step(x, x_adv, y, alpha, lr)
        inputs = [x, x_adv, y, x.new_full((), alpha), x.new_full((), lr)]
        return call_graphed(
            graphs, "step", self._eager_step, inputs, self.step_distance, self.updated_tensors
        )

    def _eager_step(self, x, x_adv, y, alpha, lr):
        settings = self.optimizer.param_groups[0]
        settings["lr"] = lr
        settings["fused"] = x.is_cuda  # a saved state may be another device's
        batch = Batch(self.student, x, x_adv, y, self.counts, self.cfg, alpha, self.teacher)
        return outer_step(self.row, batch, self.model, self.optimizer)


def with_fallback(task, cfg, data, path, log, *more):
    """Do task(cfg, data, path, log, *more); where it fails it begins again, from what it has saved,
    with a plainer Config: in float32 where float16 overflows, uncompiled where compiled code or a
    graph fails. An error is raised where neither is to blame, and as a UserError under --compile on
    and in one of several processes."""
    while True:
        try:
            return task(cfg, data, path, log, *more)
        except OverflowError:
            if cfg.amp == "off":
                raise
            log("float16 overflows: again, by float32 from here on")
            cfg = replace(cfg, amp="off")
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if cfg.compile == "off":
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
            if cfg.compile == "on" or WORLD > 1:  # one rank alone cannot begin again
                raise UserError(f"compiling fails here, try --compile off ({reason})") from error
            log(f"again, uncompiled from here on ({reason})")
            cfg = replace(cfg, compile="off")


def train(cfg, data, path, log):
    """Train a Net as cfg says on `data`, from the folder's state.pt on where there is one.

    data: Data on the training device; path: the run's folder, with teacher.pt where the method
    needs one; log: called with a line of text. Writes state.pt as it goes, a student's best.pt when
    it is found, and last.pt at the end. Every epoch draws from generators of its own, so that a run
    that goes on needs no state of a generator. UserError when the loss is no longer finite.

    Under torchrun the ranks share batches as DistributedSampler would: equal shares, the last batch
    filled up from the epoch's first images. Batch statistics and REAT's pairs are a share's own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(cfg.seed, cfg.role, "weights"))
        model = build_model(cfg.arch, len(data.classes), cfg.row.head).to(cfg.device)
    teacher = None
    if cfg.row.teacher:
        # the fast one of its two nets; RoBal's with its post-hoc head
        _, _, (teacher, _) = load_net(teacher_config(cfg), data, path / "teacher.pt")
    trainer = Trainer(cfg, model, data.counts, teacher)
    # what is true after the last complete epoch; with the classes it is a checkpoint, too
    state = dict(epoch=0, best=-1.0, classes=data.classes)
    state |= load_state(path, trainer, log)
    log(
        f"{cfg.role}: {cfg.method} on {len(data.train_labels)} images, "
        f"{data.counts[0]} to {data.counts[-1]} a class"
    )
    milestones = floats(cfg.milestones)
    due = 0  # when to write state.pt
    for epoch in range(state["epoch"] + 1, cfg.epochs + 1):
        began = time.perf_counter()
        lr = lr_at(epoch, cfg.epochs, cfg.lr, milestones)
        loss, accuracy = train_epoch(trainer, data, epoch, lr, log)
        line = f"{cfg.role} {epoch:>4}/{cfg.epochs:<4} lr {lr:<7.2g} loss {loss:8.4f}"
        line += f"  train {accuracy:6.2f}  {time.perf_counter() - began:7.1f} s"
        if cfg.role == "student" and (lr < cfg.lr or epoch == cfg.epochs):
            scores = select(cfg, data, model)
            score = scores["pgd" if cfg.row.objective else "clean"]
            line += "  test " + "  ".join(f"{name} {scores[name]:6.2f}" for name in scores)
            if score > state["best"]:
                line += "  *"
                state["best"] = score
                save_model(path / "best.pt", cfg, data, model, epoch)
                due = 0  # now: state.pt knows of every best.pt
        log(line)
        if time.perf_counter() > due:
            state |= dict(
                epoch=epoch,
                model=model.state_dict(),
                optimizer=trainer.optimizer.state_dict(),
                predicted=trainer.predicted,
            )
            write_atomic(path / "state.pt", state)
            due = time.perf_counter() + 30
    save_model(path / "last.pt", cfg, data, model, cfg.epochs)
    gather(None)  # it is there before another rank asks for it


def train_epoch(trainer, data, epoch, lr, log):
    """One epoch -> (mean loss, training accuracy at x' in percent)."""
    cfg = trainer.cfg
    draws = random_stream("cpu", cfg.seed, cfg.role, epoch)
    noise = random_stream(cfg.device, cfg.seed, cfg.role, epoch, "noise", RANK)
    order = torch.randperm(len(data.train_labels), generator=draws)
    order = torch.cat([order, order[: -len(order) % WORLD]])
    images = augment(data.train_images[order], cfg.aug, draws)[RANK::WORLD]
    labels = data.train_labels[order[RANK::WORLD]]
    alpha = (cfg.alpha or 0.0) * epoch / cfg.epochs  # IGDM's linear ramp
    predicted = torch.zeros_like(trainer.counts)
    sums = torch.zeros(2, device=cfg.device)  # of the loss and of the hits
    parts = list(zip(images.split(trainer.whole_batch), labels.split(trainer.whole_batch)))
    where = f"{cfg.role}, epoch {epoch}/{cfg.epochs}"
    for step, (images_u8, y) in enumerate(parts, 1):
        x = to_float(images_u8)
        x_adv = trainer.attack(x, y, noise)
        loss, logits = trainer.step(x, x_adv, y, alpha, lr)
        guess = logits.argmax(1)
        sums += torch.stack([loss * len(y), (guess == y).sum()])
        predicted += F.one_hot(guess, len(predicted)).sum(0)
        if step == 1:  # which also compiles
            began = time.perf_counter()
        elif step % 50 == 0 or step == 5:  # seldom: reading waits for the device
            read_sums(trainer, sums, where)
            seconds = (time.perf_counter() - began) / (step - 1)
            left = len(parts) * (cfg.epochs - epoch + 1) - step
            time_left = timedelta(seconds=round(left * seconds))
            if epoch == 1 and step == 5:
                log(f"{cfg.role}: this training takes about {time_left} on this device")
            show_progress(f"{where}, step {step}/{len(parts)}: ETA {time_left}")
    show_progress()
    total, hits = read_sums(trainer, sums, where)
    trainer.predicted = sum(gather(predicted.cpu())).to(cfg.device)
    return total / len(order), 100 * hits / len(order)


def read_sums(trainer, sums, where):
    """Loss and hits summed over the ranks. UserError for a loss that is not finite; OverflowError
    where float16 may be to blame."""
    sums = torch.cat([sums, trainer.frozen.overflows.view(1)])
    total, hits, overflows = np.sum(gather(sums.tolist()), axis=0)
    if math.isfinite(total) and not overflows:  # a NaN stays in a sum
        return total, hits
    if torch.float16 in (trainer.frozen.dtype, getattr(trainer.teacher, "dtype", None)):
        raise OverflowError
    raise UserError(f"the loss was not finite ({where}): try a lower --lr; what was saved stays")


def select(cfg, data, model):
    """{attack: accuracy on the test set}, by which the best epoch is chosen."""
    attacks = ["clean", "pgd"] if cfg.row.objective else ["clean"]
    scores = evaluate(
        model,
        data.test_images,
        data.test_labels,
        attacks=attacks,
        eps=(cfg.eps or 0) / 255,
        seed=cfg.seed,
        # this takes seconds, compiling would take longer
        nets=scoring_nets(model, replace(cfg, compile="off"), data.counts),
    )
    return {name: scores[name] for name in attacks}


# 6  Data ==========================================================================================
UNREADABLE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


@dataclass
class Data:
    """A training and a test set: uint8 NCHW images, int64 labels, class 0 the most frequent: where
    classes differ in size the loader sorts them, as load_folder does."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: list  # names

    @property
    def counts(self) -> list:
        """Training images per class."""
        return self.train_labels.bincount().tolist()

    @property
    def tail(self) -> list:
        """The classes of the tail group: the rarest tenth, at least one."""
        classes = len(self.classes)
        return list(range(classes - max(1, classes // 10), classes))


def _crc32(*tensors):
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy(), checksum)
    return f"{checksum:08x}"


def to_float(images_u8):
    """uint8 NCHW -> float32 in [0,1], channels_last."""
    return images_u8.to(torch.float32, memory_format=torch.channels_last).div_(255)


def long_tail_counts(n_max, num_classes, ir) -> list:
    """Images per class of the exponential profile: int(n_max * ir**(-c/(C-1))), class 0 the head,
    C-1 the tail. n_max, num_classes: int >= 1; ir: imbalance ratio n_max/n_min >= 1 (1 keeps all).
    Truncated, not rounded, as in the LDAM generator that RoBal, REAT and AT-BSL share. ValueError
    where a class would be empty."""
    if not ir >= 1 or num_classes < 1 or n_max * ir**-1.0 < 1:
        raise ValueError(
            f"n_max {n_max}, {num_classes} classes, imbalance ratio {ir}: "
            "want ir >= 1 and no empty class"
        )
    last = max(num_classes - 1, 1)
    return [int(n_max * ir ** (-c / last)) for c in range(num_classes)]


def long_tail_indices(labels, counts) -> np.ndarray:
    """Positions of the long-tailed subset, class by class: on CIFAR the very images of RoBal, REAT
    and AT-BSL. labels: int array [N]; counts: images wanted per class. NumPy's legacy generator,
    seeded 0, shuffles each class's ascending positions in turn; the first n_c stay. Returns int64
    [sum(counts)] and touches no global generator. ValueError where a class has too few images."""
    labels = np.asarray(labels)
    rng = np.random.RandomState(0)
    chosen = []
    for c, wanted in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if not 0 <= wanted <= len(members):
            raise ValueError(f"class {c} has {len(members)} images, {wanted} wanted: lower n_max")
        rng.shuffle(members)
        chosen.append(members[:wanted])
    return np.concatenate(chosen)


AUGMENT_GROUPS = 512  # independent draws of an augmentation policy in an epoch
POLICIES = {
    "none": None,
    "ra": v2.RandAugment(2, 8),
    "aua": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}


def augment(images_u8, policy, generator) -> Tensor:
    """Augment a whole epoch at once: the policy, then a zero-pad-4 random crop, then a flip with p
    = 0.5, as AT-BSL. images_u8: uint8 [N,3,H,W], any device, not changed. policy: 'none', 'ra'
    (torchvision's RandAugment(2, 8)) or 'aua' (its AutoAugment, CIFAR-10 policy). generator: a CPU
    torch.Generator, the only source of randomness. Returns a new uint8 [N,3,H,W] on the same
    device. Crop and flip are drawn for each image; the policy for each of AUGMENT_GROUPS groups,
    group k being images k, k + AUGMENT_GROUPS, ...: every image has torchvision's law, and two
    images of a batch of up to AUGMENT_GROUPS share no draw. ValueError: unknown policy, another
    dtype or shape."""
    if policy not in POLICIES or images_u8.dtype != torch.uint8 or images_u8.ndim != 4:
        raise ValueError(
            f"policy {policy!r}, images {images_u8.dtype} {list(images_u8.shape)}: "
            "want none, ra or aua, and uint8 [N,3,H,W]"
        )
    n, _, height, width = images_u8.shape
    if policy != "none":
        images_u8 = images_u8.clone()
        seed = torch.randint(2**63 - 1, (), generator=generator)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(int(seed))
            for k in range(min(n, AUGMENT_GROUPS)):
                images_u8[k::AUGMENT_GROUPS] = POLICIES[policy](images_u8[k::AUGMENT_GROUPS])
    top, left = torch.randint(9, (2, n), generator=generator)  # of the 9 x 9 windows
    flip = torch.randint(2, (n,), generator=generator).bool()
    # of the padded images, [N,3,9,9,H,W], a view
    windows = F.pad(images_u8, [4] * 4).unfold(2, height, 1).unfold(3, width, 1)
    cut = windows[torch.arange(n), :, top, left]  # [N,3,H,W], a copy
    cut[flip] = cut[flip].flip(3)
    return cut


def load_data(cfg) -> Data:
    """The long-tailed training set and the test set of a resolved Config, on its device. The
    limits apply first; then each class is thinned to the largest profile of ratio cfg.ir that all
    classes can fill, and stays as it is where cfg.ir is None. UserError where there is none."""
    if cfg.data == "synthetic":
        data = make_synthetic()
    elif cfg.data == "folder":
        data = load_folder(cfg.data_dir, cfg.image_size)
    elif cfg.data == "tinyimagenet":
        data = load_tinyimagenet(cfg.data_dir)
    else:
        data = load_cifar(cfg.data, cfg.data_dir)
    train = _limited(data.train_labels, cfg.train_limit)
    labels = data.train_labels[train]
    counts = np.bincount(labels)
    if cfg.ir:
        counts = _largest_profile(counts, cfg.ir)
    train = train[long_tail_indices(labels, counts)]
    test = _limited(data.test_labels, cfg.test_limit)
    return Data(
        data.train_images[train].to(cfg.device),
        data.train_labels[train].to(cfg.device),
        data.test_images[test].to(cfg.device),
        data.test_labels[test].to(cfg.device),
        data.classes,
    )


def _largest_profile(available, ir):
    """The long-tail counts with the largest n_max that fit into `available` images per class."""
    n_max = available[0]
    while n_max * ir**-1.0 >= 1:
        counts = long_tail_counts(n_max, len(available), ir)
        if np.all(counts <= available):
            return counts
        n_max -= 1
    raise UserError(
        f"--ir {ir:g}: the classes have {available.max()} to {available.min()} images, "
        "too few for it: lower it"
    )


def _limited(labels, limit):
    """Positions of about `limit` labels: the same share of every class, but at least one of each,
    by a fixed seed and in their order; all of them where limit is None."""
    limit = limit or len(labels)
    rng = np.random.default_rng(0)
    chosen = []
    for c in range(labels.max() + 1):
        members = np.flatnonzero(labels == c)
        share = max(1, len(members) * limit // len(labels))
        chosen.append(rng.permutation(members)[:share])
    return np.sort(np.concatenate(chosen))


def _to_nchw(images):
    """uint8 array [N,H,W,3] -> tensor [N,3,H,W]"""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _fetching(name, data_dir):
    return blaming(
        f"could not fetch {name}: put it into {data_dir} by hand, or try --data synthetic",
        (OSError, RuntimeError),
    )


def load_cifar(name, data_dir) -> Data:
    """'cifar10' or 'cifar100' as published, by torchvision: fetched into data_dir when absent, md5s
    checked. UserError where it cannot be fetched."""
    cls = getattr(torchvision.datasets, name.upper())
    with _fetching(cls.filename, data_dir):
        train = cls(data_dir, train=True, download=True)
        test = cls(data_dir, train=False, download=True)
    return Data(
        _to_nchw(train.data),
        torch.tensor(train.targets),
        _to_nchw(test.data),
        torch.tensor(test.targets),
        train.classes,
    )


TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def load_tinyimagenet(data_dir) -> Data:
    """Tiny-ImageNet from the official zip, by torchvision, fetched and unpacked when absent.
    Classes are the sorted wnids; the test set is the official validation set, labelled by
    val_annotations.txt. A line says how many training images and labels of test images are missing;
    UserError where a test image is, or all training images of a class."""
    root = Path(data_dir, "tiny-imagenet-200")
    annotations = root / "val/val_annotations.txt"
    if not annotations.exists():
        with _fetching("tiny-imagenet-200.zip", data_dir):
            download_and_extract_archive(TINY_URL, data_dir, md5=TINY_MD5)
    train, _ = _pictures(root / "train")
    test = {}
    remedy = "delete this folder, and it is unpacked again"
    with blaming(f"{root} is incomplete: {remedy}", (OSError, LookupError, ValueError)):
        for line in annotations.read_text().splitlines():
            words = line.split()  # file name, wnid, a box
            test[f"{root}/val/images/{words[0]}"] = words[1]
        missing = 110_000 - len(train) - len(test)
        if missing > 0:
            say(f"{root} lacks {missing} of 110000 images: {remedy}")
        return _read_images(train, test, sorted(set(train.values())), 64, root / ".ltsd.pt")


def _pictures(root):
    """({path: class} of the images in root/CLASS/ and below, sorted; how many files of other types
    lie beside them). glob passes over what begins with a dot."""
    pictures = {}
    unread = 0
    for path in sorted(map(Path, glob.glob("*/**", root_dir=root, recursive=True))):
        if (root / path).is_dir():
            continue
        if torchvision.datasets.folder.is_image_file(path.name):
            pictures[str(root / path)] = path.parts[0]
        else:
            unread += 1
    return pictures, unread


def load_folder(data_dir, size) -> Data:
    """Images of data_dir/train/CLASS/ and data_dir/test/CLASS/ (val/ where test/ has none of the
    classes), scaled to `size` pixels. Classes are ordered by training count, most frequent first,
    ties by name. UserError for another layout."""
    root = Path(data_dir)
    train, unread = _pictures(root / "train")
    test, unread_tests = _pictures(root / "test")
    counts = Counter(train.values())
    if counts.keys().isdisjoint(test.values()):
        test, unread_tests = _pictures(root / "val")
    folders = {path.rstrip("/\\") for path in glob.glob("*/", root_dir=root / "train")}
    unlike = sorted((counts.keys() ^ test.values()) | (folders - counts.keys()))
    if unlike or len(counts) < 2:
        raise UserError(
            f"--data-dir {data_dir}: want DIR/train/CLASS/* and DIR/test/CLASS/*, the same classes "
            f"in both, two or more; unlike: {unlike[:3]}"
        )
    unread += unread_tests
    if unread:
        say(f"--data-dir {data_dir}: {unread} files beside the images are of types not read here")
    classes = sorted(counts, key=counts.get, reverse=True)
    return _read_images(train, test, classes, size, root / f".ltsd-{size}.pt")


def _read_images(train, test, classes, size, cache) -> Data:
    """Decode the images of two {path: class}. The tensors are kept in the file `cache`, which is
    made again when an image is added, removed or changed."""
    pictures = train | test
    stats = []
    for path in pictures:
        with blaming(f"{path} is gone: restore it, remove its link, or unpack it again", OSError):
            stat = os.stat(path)
        stats.append((stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    key = repr([pictures, stats])
    with suppress(UserError, LookupError, TypeError):  # a missing or broken cache is made again
        saved = read_checkpoint(cache)
        if saved["key"] == key:
            return Data(**saved["data"])
    with ThreadPoolExecutor() as pool:
        pixels = pool.map(_decode, pictures, itertools.repeat(size))
        images = _to_nchw(np.stack(list(pixels)))
    labels = torch.tensor([classes.index(name) for name in pictures.values()])
    n = len(train)
    data = Data(images[:n], labels[:n], images[n:], labels[n:], classes)
    with suppress(UserError):  # data on a read-only drive: no cache
        write_atomic(cache, dict(key=key, data=vars(data)))
    return data


def _decode(path, size):
    """The centre square of an image file, upright, on white where it is transparent, scaled: uint8
    [size,size,3]. UserError where it cannot be read."""
    with blaming(f"{path} is not a readable image: remove or replace it", UNREADABLE):
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F"):
            raise UserError(
                f"{path} is of Pillow's mode {image.mode}, of unknown range: "
                "save it with 8 bits, or as a 16-bit PNG"
            )
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        # fit cuts before it scales: a long strip does not fill the memory
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR)
    return np.asarray(square)


def make_synthetic(train_per_class=160, test_per_class=25, size=32) -> Data:
    """Ten classes of images that behave like photographs under attack, the same on every machine.
    Each class has a coarse grating of its own wavelength and orientation, strong enough to survive
    eps 8/255 but overlaid by those of other classes, and a fine one so faint that an attack can
    wipe it out, yet enough for a naturally trained network to decide by. Phases are random, so that
    a crop changes nothing."""
    rng = np.random.default_rng(2025)
    yy, xx = np.mgrid[:size, :size]
    c = np.arange(10)[:, None, None, None]  # the classes; [N,1,1,1] broadcasts over an image
    angles = np.pi * (c % 5 + 0.5) / 10  # within a quadrant: a flip must not change the class
    along = xx * np.cos(angles) + yy * np.sin(angles)
    coarse = math.tau / np.where(c < 5, 14.0, 7.5) * along  # phases; wavelengths in pixels
    fine = math.tau / np.where(c < 5, 3.0, 2.4) * along[::-1]  # in the direction of class 9 - c
    tint = abs(rng.normal(size=(10, 3, 1, 1))).clip(0.3)
    tint /= tint.mean(1, keepdims=True)

    def gratings(phases):  # [N,1,size,size] in [-1,1]
        shift = rng.uniform(0, math.tau, (len(phases), 1, 1, 1))
        return np.sin(phases + shift)

    def draw(per_class):  # images uint8 [N,3,size,size], labels
        labels = np.repeat(c, per_class)  # int64 [N]: repeat flattens
        images = 0.5 + 0.13 * gratings(coarse[labels]) * tint[labels]
        for _ in range(2):
            other = rng.integers(0, 10, labels.shape)
            strength = rng.uniform(0, 0.13, (len(labels), 1, 1, 1))
            images += strength * gratings(coarse[other]) * tint[other]
        images += 5 / 255 * gratings(fine[labels])
        images += rng.normal(0, 0.06, images.shape)
        pixels = torch.from_numpy(images.clip(0, 1) * 255).round().byte()
        return pixels, torch.from_numpy(labels)

    names = [f"grating {i}" for i in range(10)]
    return Data(*draw(train_per_class), *draw(test_per_class), names)


# 7  Models ========================================================================================
# Parameter names are those of the public CIFAR checkpoints. `folds` lists a module's pairs of a
# convolution and the batch norm of its output alone: a FrozenCopy folds those.
conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class BasicBlock(nn.Module):
    """ResNet's block: conv-bn-relu-conv-bn plus a shortcut, then relu."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = conv3x3(cin, cout, stride=stride)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = conv3x3(cout, cout)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(conv1x1(cin, cout, stride=stride), nn.BatchNorm2d(cout))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out)).add_(self.shortcut(x))
        return F.relu(out, inplace=True)


class PreActBlock(nn.Module):
    """The pre-activation block: bn-relu-conv-bn-relu-conv plus a shortcut. Where the shape changes,
    the shortcut is a bare 1x1 convolution of the activated input."""

    folds = (("conv1", "bn2"),)
    projection = "shortcut.0"  # name of that convolution

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = conv3x3(cin, cout, stride=stride)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = conv3x3(cout, cout)
        self.projects = stride != 1 or cin != cout
        if self.projects:
            self.shortcut = nn.Sequential()
            self.set_submodule(self.projection, conv1x1(cin, cout, stride=stride))

    def forward(self, x):
        out = F.relu(self.bn1(x))
        if self.projects:
            x = self.get_submodule(self.projection)(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + x


class WideBlock(PreActBlock):
    """WRN's block (dropout 0): a pre-activation block whose projection has another name."""

    projection = "convShortcut"


class CosineHead(nn.Linear):
    """RoBal's classifier: scale * <f/|f|, w_c/(|w_c| + offset)> - adjustment_c; while training,
    scale is 1 and adjustment 0."""

    scale = 1.0
    adjustment = 0.0

    def __init__(self, width, num_classes):
        super().__init__(width, num_classes, bias=False)
        self.offset = 1 / 32 if num_classes <= 10 else 1 / 16  # RoBal-R's two settings

    def forward(self, features):
        weight = self.weight / (self.weight.norm(dim=1, keepdim=True) + self.offset)
        return self.scale * F.normalize(features, dim=1) @ weight.T - self.adjustment

    def adjust(self, counts):
        """RoBal's post-hoc rule beyond 10 classes: 10 * scores - 1.7 ln(n_c/N)."""
        if len(counts) > 10:
            n = self.weight.new_tensor(counts)
            self.scale = 10.0
            self.adjustment = 1.7 * (n / n.sum()).log()


class Normalize(nn.Module):
    """(x - mean) / std of the three channels, for networks trained on such images."""

    def __init__(self, mean, std):
        super().__init__()
        if min(std) <= 0:
            raise ValueError("a std is not positive")
        self.register_buffer("mean_and_std", torch.tensor([mean, std]).view(2, 3, 1, 1))

    def forward(self, x):
        mean, std = self.mean_and_std
        return ((x - mean) / std).to(x.dtype)


class Net(nn.Sequential):
    """Stem, stages of blocks, global average pool, head: images float [N,3,H,W] in [0,1] -> float32
    logits. Pool and head are float32 whatever the convolutions are: with bf16 logits many samples
    would get no gradient."""

    def forward(self, x, with_features=False):
        """Logits [N,C], or with_features: (logits, pooled features [N,d]); all float32 (float64 for
        float64)."""
        *body, head = self.children()
        for module in body:
            x = module(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # its mean's gradient stays channels_last
        features = pixels.mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = head(features)
        return (logits, features) if with_features else logits


HEADS = {"linear": nn.Linear, "cosine": CosineHead}
# block: a class (unless it is BasicBlock or a subclass, a norm and a relu follow the last one);
# blocks of each stage; channels of the stem and of each stage; names of the stages
# fmt: off
SHAPE18 = (2, 2, 2, 2), (64, 64, 128, 256, 512), "layer{}"
ARCHS = {
    "resnet18":       (BasicBlock, *SHAPE18),
    "preactresnet18": (PreActBlock, *SHAPE18),
    "wrn34-10":       (WideBlock, (5, 5, 5), (16, 160, 320, 640), "block{}"),
    "resnet8":        (BasicBlock, (1, 1, 1), (16, 16, 32, 64), "layer{}"),
}
# fmt: on


def build_model(arch, num_classes, head="linear") -> nn.Module:
    """A freshly initialised Net of ARCHS, channels_last. num_classes >= 2; head: 'linear' or
    'cosine' (RoBal). Draws from torch's global generator: seed it, or wrap the call in
    torch.random.fork_rng. ValueError for an unknown name."""
    if arch not in ARCHS or head not in HEADS or num_classes < 2:
        raise ValueError(
            f"arch {arch!r}, head {head!r}, {num_classes} classes: "
            f"want one of {', '.join(ARCHS)}, linear or cosine, 2 or more"
        )
    block, blocks, widths, stage_name = ARCHS[arch]
    wide = issubclass(block, WideBlock)
    activates_last = issubclass(block, BasicBlock)
    width = widths[0]
    net = Net()
    net.normalize = nn.Identity()  # load_net puts a Normalize there, where one is needed
    net.conv1 = conv3x3(3, width)
    if activates_last:
        net.bn1 = nn.BatchNorm2d(width)
        net.relu = nn.ReLU(inplace=True)
        net.folds = (("conv1", "bn1"),)
    stride = 1
    for i, depth in enumerate(blocks, 1):
        stage = nn.Sequential()
        for _ in range(depth):
            stage.append(block(width, widths[i], stride))
            width = widths[i]
            stride = 1
        stride = 2  # of the next stage's first block
        if wide:
            stage = nn.Sequential(OrderedDict(layer=stage))
        net.add_module(stage_name.format(i), stage)
    if not activates_last:
        net.add_module("bn1" if wide else "bn", nn.BatchNorm2d(width))
        net.relu = nn.ReLU()
    net.add_module("fc" if wide else "linear", HEADS[head](width, num_classes))
    if wide:  # the public WRN's initialisation; the other networks keep PyTorch's
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if head == "linear":
            nn.init.zeros_(net.fc.bias)
    return net.to(memory_format=torch.channels_last)


def weights_crc32(model):
    """Checksum of all weights and statistics: the same for the same network, whatever its file."""
    return _crc32(*model.state_dict().values())


def _numpy_types():
    """What numpy's numbers and arrays are pickled as; the functions have had two homes."""
    allowed = [np.dtype, np.ndarray]
    allowed += [type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"]
    for value in (np.float64(0), np.zeros(1)):
        function = value.__reduce__()[0]
        for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
            allowed.append((function, f"{home}.{function.__name__}"))
    return allowed


def read_checkpoint(path):
    """A file of tensors, plain values and those of numpy; UserError where it is missing, damaged,
    foreign or holds code."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_types()):
            warnings.simplefilter("ignore")  # what torch thinks of a foreign pickle
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise any
        remedy = f"train first, or name another checkpoint ({first_line(error)})"
        with suppress(OSError):  # also of a file that is missing
            if b"torch.nn.modules" in Path(path).read_bytes():
                remedy = "it is a pickled module or DataParallel, save its state_dict() instead"
        raise UserError(f"{path} cannot be read: {remedy}") from error


def load_weights(model, path, classes=None):
    """Load a checkpoint, ours or one of TRADES, AT-BSL and kin, into a Net; returns its epoch or
    None. Accepts a bare state_dict or one under 'state_dict', 'model' or 'net', prefixes 'module.'
    and '_orig_mod.', and the unused 'sub_block1' of public WRNs. classes: names in the order that
    the outputs are wanted in; a checkpoint without names is taken to have them in alphabetical
    order. UserError where names or shapes do not fit, or weights are not finite."""
    content = weights = read_checkpoint(path)
    loaded = model.normalize.state_dict(prefix="normalize.")  # theirs do not know of it
    misses = f"{path} holds no state_dict: want one, bare or under 'state_dict', 'model' or 'net'"
    with blaming(misses, (AttributeError, TypeError)):
        for key in ("state_dict", "model", "net"):
            weights = weights.get(key, weights)
        for name, tensor in weights.items():
            name = re.sub(r"module\.|_orig_mod\.", "", name)
            if not tensor.isfinite().all():
                raise UserError(f"{path} holds NaN or infinity, of a training that diverged")
            if not name.startswith("sub_block1"):
                loaded[name] = tensor
    fits = f"{path} does not fit the network: check --arch, --data, --method, --mean"
    with blaming(fits, RuntimeError):
        model.load_state_dict(loaded)
    if classes:
        _sort_outputs(model, path, content.get("classes"), list(classes))
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) else None


@torch.no_grad()
def _sort_outputs(model, path, names, classes):
    """Put the head's rows into the order of `classes`; names: the list of theirs in the file."""
    if not isinstance(names, list):
        names = sorted(classes)
        if names != classes:
            say(f"{path} names no classes: its outputs are taken to be in alphabetical order")
    names = list(map(str, names))
    odd = sorted(set(names) ^ set(classes))
    if odd:
        raise UserError(f"{path} was trained on other classes than --data has: unlike {odd[:3]}")
    rows = [names.index(name) for name in classes]
    for parameter in model[-1].parameters():
        parameter.copy_(parameter[rows])


# 8  AutoAttack ====================================================================================
# Own code from the papers, in the maximum norm only. An attack is a function of the `points` that
# it attacks together; it looks at images through points.gradient and points.margin alone, which
# also judge them; what they give per point is [N,1,1,1]. A fifth attack: write the function and
# append it to `ATTACK_OF` below, where its place seeds its draws; if it has targets, its name ends
# in -t.
FLOATS = (torch.float32, torch.float64)


def margin(logits, y):
    """z_y - max of the others, [N]."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return of_class(logits, y) - others


def is_fooled(logits, y, slack, dtype):
    """bool [N]: the margin is below slack times the rounding by dtype of the logits' spread, which
    an offset does not change. A positive slack takes near misses as well, a negative one wants a
    clear win. NaN logits never count."""
    spread = logits.amax(1) - logits.amin(1)
    return margin(logits, y) < slack * torch.finfo(dtype).eps * spread


def cross_entropy_each(logits, y, target):
    """Per point; the target is not used."""
    return F.cross_entropy(logits, y, reduction="none")


def logit_gap(logits, y, target):
    """z_target - z_y, [N]."""
    return of_class(logits, target) - of_class(logits, y)


def targeted_dlr(logits, y, target):
    """(z_target - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), z_(i) the i-th largest: blind to shift and
    scale. Of fewer than 4 classes z_target - z_y."""
    gap = logit_gap(logits, y, target)
    if logits.shape[1] < 4:
        return gap
    top = logits.topk(4, dim=1).values
    return gap / (top[:, 0] - top[:, 2:].mean(1) + 1e-12)


def input_gradient(net, x, objective, *labels):
    """(logits, objective(logits, *labels) of each row, its gradient at x); parameters get none."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = net(x)
        values = objective(logits, *labels)
        scale = GRADIENT_SCALE if getattr(net, "dtype", None) == torch.float16 else 1.0
        (gradient,) = torch.autograd.grad(values.sum() * scale, x)
    return logits, values, gradient / scale


class AllFooled(Exception):
    """No point is left to attack."""


@dataclass
class Points:
    """The points that an attack attacks together. What it asks about images is answered by the fast
    network for the points not yet fooled. An image in the ball that seems to fool, or misses by no
    more than twice the fast network's rounding, is judged by the exact network: what fools is kept
    in `found`, and its point is left out from then on. AllFooled when none is left. `low` and
    `high` are the bounds of the images that the threat allows."""

    fast: nn.Module
    exact: nn.Module
    x: Tensor
    y: Tensor
    target: Tensor
    eps: float
    batch_size: int

    def __post_init__(self):
        self.low = (self.x - self.eps).clamp_min(0)
        self.high = (self.x + self.eps).clamp_max(1)
        self.found = self.x.clone()
        self.left = torch.ones_like(self.y, dtype=torch.bool)

    def gradient(self, images, objective):
        """(objective(logits, y, target), its gradient) at images [N,C,H,W]; zeros for the
        fooled."""
        rows = self._padded(self.left.nonzero().flatten())
        logits, values, slopes = input_gradient(
            self.fast, images[rows], objective, self.y[rows], self.target[rows]
        )
        self._judge(images, rows, logits)
        return self._whole(rows, values), self._whole(rows, slopes.nan_to_num(0, 0, 0))

    def margin(self, images):
        """z_y - max of the others at images; zeros for the fooled."""
        rows = self._padded(self.left.nonzero().flatten())
        logits = self.fast(images[rows])
        self._judge(images, rows, logits)
        return self._whole(rows, margin(logits, self.y[rows]))

    def _whole(self, rows, values):
        """Values of all points from those of rows, the others zero: [N,C,H,W], or [N,1,1,1] of a
        value per point."""
        shape = values.shape[1:] or (1, 1, 1)
        whole = values.new_zeros(len(self.y), *shape)
        whole[rows] = values.view(-1, *shape)
        return whole

    def _padded(self, rows):
        """Rows repeated to one of a few batch sizes, where a new shape is dear: on CUDA or
        compiled. The least of batch_size, its half, its quarter, ... that holds them, 16 or
        more."""
        if not self.y.is_cuda and not getattr(self.fast, "compiled", {}):
            return rows
        size = self.batch_size
        while size // 2 >= max(len(rows), 16):
            size //= 2
        return torch.cat([rows, rows[-1:].expand(size - len(rows))])

    def _judge(self, images, rows, logits):
        """Keep the images that fool, of these rows with these logits of the fast network; leave out
        their points."""
        dtype = getattr(self.fast, "dtype", torch.float32)
        claimed = is_fooled(logits, self.y[rows], 2, dtype)
        moved = largest(images[rows] - self.x[rows]).flatten()
        claimed = rows[claimed & (moved <= self.eps + 1e-6)]
        if len(claimed):
            asked = self._padded(claimed)
            logits = self.exact(images[asked])
            # by more than rounds off in a batch of another shape: it must fool when scored again
            fooled = asked[is_fooled(logits, self.y[asked], -100, logits.dtype)]
            self.found[fooled] = images[fooled]
            self.left[fooled] = False
        if not self.left.any():
            raise AllFooled


def apgd(points, generator, iterations, objective):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690, Algorithm 1): ascent with momentum; at
    checkpoints a point's step may halve, and then it goes on from its best image."""
    noise = 2 * torch.rand(points.x[0].shape, generator=generator, dtype=points.x.dtype) - 1
    noise = (noise / noise.abs().max()).to(points.x.device)  # a pixel on the face of the ball
    z = (points.x + points.eps * noise).clamp(0, 1)
    loss, gradient = points.gradient(z, objective)
    best, best_loss, best_gradient = z, loss, gradient
    previous = z
    step_size = torch.full_like(loss, 2 * points.eps)
    rises = torch.zeros_like(loss)
    loss_at_check = best_loss
    halved = torch.ones_like(loss, dtype=torch.bool)  # none counts as stuck at the first check
    interval = max(int(0.22 * iterations), 1)
    check = interval
    momentum = 1.0  # nothing goes before the first step
    for k in range(1, iterations + 1):
        aim = (z + step_size * gradient.sign()).clamp(points.low, points.high)
        moved = z + momentum * (aim - z) + (1 - momentum) * (z - previous)
        momentum = 0.75
        previous = z
        z = moved.clamp(points.low, points.high)
        last_loss = loss
        loss, gradient = points.gradient(z, objective)
        rises += loss > last_loss
        better = loss > best_loss
        best = torch.where(better, z, best)
        best_gradient = torch.where(better, gradient, best_gradient)
        best_loss = torch.where(better, loss, best_loss)
        if k == check:
            # too few steps rose, or the best stood still since a checkpoint that did not halve
            stuck = ~halved & (loss_at_check >= best_loss)
            halved = (rises <= 0.75 * interval) | stuck
            step_size = torch.where(halved, step_size / 2, step_size)
            z = torch.where(halved, best, z)
            gradient = torch.where(halved, best_gradient, gradient)
            loss_at_check = best_loss
            rises.zero_()
            interval = max(interval - max(int(0.03 * iterations), 1), int(0.06 * iterations), 1)
            check += interval


def total(images):
    """The sum of each image's values, [N,1,1,1]."""
    return images.sum((1, 2, 3), keepdim=True)


def largest(images):
    """The largest absolute value of each image, at least 1e-8, [N,1,1,1]."""
    return images.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-8)


def project_linf(t, w, gap):
    """Smallest d in the maximum norm with <w, d> = -gap and t + d in [0, 1]; else the corner
    closest to that. t, w [N,C,H,W]; gap [N,1,1,1]. Every coordinate moves by the same length, cut
    at the room it has. The length solves sum |w| min(length, room) = |gap|: concave and piecewise
    linear, so Newton from the left arrives exactly, after about four turns (sorting the breakpoints
    takes three times as long)."""
    need = gap.abs()
    weight = w.abs()
    down = w * gap.sign()  # > 0 where the coordinate has to fall
    room = torch.where(down > 0, t, 1 - t)
    full = weight * room
    length = need / total(weight).clamp_min(1e-30)
    for _ in range(16):  # made-up heavy-tailed gradients took 14 at the most
        free = room > length
        taken = total(full * ~free)
        longer = (need - taken) / total(weight * free).clamp_min(1e-30)
        if length.is_cpu and (longer <= length).all():  # a GPU would have to be waited for
            break
        length = torch.maximum(length, longer)
    return -down.sign() * torch.minimum(length, room)


def fab(points, generator, iterations):
    """Targeted FAB (Croce & Hein 2020, arXiv 1907.02044): step onto the linearised boundary to the
    target, drawn to the clean point; once across it, step back towards the clean point. It draws
    nothing from the generator. Theirs: alpha up to 0.1, overshoot 1.05, backward step 0.9."""
    x = points.x
    z = x
    for _ in range(iterations):
        gap, w = points.gradient(z, logit_gap)
        from_z = project_linf(z, w, gap)
        from_x = project_linf(x, w, gap + total(w * (x - z)))
        near = largest(from_z)
        far = largest(from_x)
        alpha = (near / (near + far)).clamp_max(0.1)
        z = ((1 - alpha) * (z + 1.05 * from_z) + alpha * (x + 1.05 * from_x)).clamp(0, 1)
        crossed = points.margin(z) < 0
        z = torch.where(crossed, x + 0.9 * (z - x), z)


def square(points, generator, queries):
    """Square attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search without
    gradients. Vertical stripes first; then one square of the best image takes new colours, each
    channel one of its two bounds."""
    channels, height, width = points.x.shape[1:]
    draw = partial(torch.randint, generator=generator)

    def low_or_high(*shape):
        coin = draw(2, shape).bool().to(points.x.device)
        return torch.where(coin, points.low, points.high)

    best = low_or_high(channels, 1, width)
    best_margin = points.margin(best)
    for query in range(1, queries):
        # its area starts at 0.8 of the image and is halved after these queries
        halvings = np.searchsorted((10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000), query)
        side = round(math.sqrt(0.8 * height * width / 2**halvings))
        side = min(max(side, 1), height, width)
        # up to length - side - 1, as in the official code, which leaves out the last row and column
        top = int(draw(max(height - side, 1), ()))
        left = int(draw(max(width - side, 1), ()))
        colour = low_or_high(channels, 1, 1)
        z = best.clone()
        window = (..., slice(top, top + side), slice(left, left + side))
        z[window] = colour[window]  # where all pixels lie on bounds: +-2 eps, then projected
        value = points.margin(z)
        better = value < best_margin
        best = torch.where(better, z, best)
        best_margin = torch.where(better, value, best_margin)


# An attack's function of (points, generator, number of steps).
ATTACK_OF = {
    "apgd-ce": partial(apgd, objective=cross_entropy_each),
    "apgd-t": partial(apgd, objective=targeted_dlr),
    "fab-t": fab,
    "square": square,
}
AUTOATTACK = tuple(ATTACK_OF)


def warn(text):
    """A UserWarning that names AutoAttack."""
    warnings.warn(f"autoattack: {text}", stacklevel=4)


def warn_of_odd_models(net, x, y, gradients):
    """Warn of models for which the result would mislead; x, y: a first batch."""
    logits = net(x)
    if (net(x) - logits).norm() > 1e-4 * logits.norm():
        warn("the same images twice give other logits: a randomised model")
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-4:
        warn("the outputs are probabilities: return logits, softmax's gradients vanish")
    if gradients:
        slopes = input_gradient(net, x, margin, y)[2]
        blind = (total(slopes.abs()) == 0).sum()
        if blind > 0.1 * len(x):
            warn(f"{blind} of {len(x)} images have a zero input gradient: APGD is blind")


def checked_logits(net, x, y, batch_size):
    """Logits of x; ValueError unless they are finite [N,classes] and y are labels of theirs."""
    logits = torch.cat([net(part) for part in x.split(batch_size)])
    classes = logits.shape[-1]
    fits = logits.shape == (len(y), classes) and logits.dtype in FLOATS and classes > 1
    if not fits or not logits.isfinite().all() or not 0 <= y.min() <= y.max() < classes:
        raise ValueError(
            f"logits are {logits.dtype} {list(logits.shape)}, y spans [{y.min()}, {y.max()}]: "
            f"want finite float32 [{len(y)}, classes], two classes or more, and labels of theirs"
        )
    return logits


def autoattack(
    model, x, y, *, eps=8 / 255, attacks=AUTOATTACK, seed=0, batch_size=512, log=None,
    iterations=100, queries=5000, targets=9, state=None, nets=None,
) -> Tensor:  # fmt: skip
    """AutoAttack standard in the maximum norm (Croce & Hein 2020): each attack runs on the points
    that survived those before it. model: nn.Module, [N,C,H,W] in [0,1] -> logits [N,classes]; run
    in eval mode and left as it was. x: float32 or float64; y: int64 [N]; same device. Returns x_adv
    like x: a fooled point carries its adversarial image, any other is unchanged. log: called with
    one line of text at a time. iterations: of APGD and FAB, per target. Draws are shared by all
    points, so that results depend neither on batch_size nor, on a CPU, on the order. state: a
    mutable mapping; state[attack] is set when that attack has ended and used when the same call is
    made again (that it is the same is the caller's care). nets: (fast, exact), the forwards that
    move images and that decide, by default scoring_nets(model). Fewer than 10 classes: as many
    targets as there are; fewer than 4: APGD-T climbs z_target - z_y, as DLR needs 4. ValueError for
    bad input."""
    check_images(x, y, FLOATS)
    counts_fit = min(batch_size, iterations, queries, targets) >= 1
    if not 0 <= eps <= 1 or not counts_fit or not set(attacks) <= set(AUTOATTACK):
        raise ValueError(
            f"eps {eps}, attacks {attacks}: "
            f"want eps in [0,1], counts >= 1, attacks from {AUTOATTACK}"
        )
    nets = nets or scoring_nets(model)
    state = {} if state is None else state
    log = log or (lambda line: None)
    x_adv = x.detach().clone()
    if len(x) == 0:
        return x_adv
    with judging(model):
        fast, exact = usable_nets(nets, x[:batch_size], y[:batch_size])
        logits = checked_logits(exact, x, y, batch_size)
        warn_of_odd_models(exact, x[:batch_size], y[:batch_size], set(attacks) != {"square"})
        # column 0 is y itself, then come its rivals in the order of the clean logits
        rivals = logits.scatter(1, y[:, None], math.inf).argsort(1, descending=True)
        robust = logits.argmax(1) == y
        log(f"clean     right {_share(robust)}")
        for name in attacks:
            if name not in state:
                steps = queries if name == "square" else iterations
                count = targets if name.endswith("-t") else 1
                state[name] = run_attack(
                    name, steps, rivals[:, 1 : count + 1], fast, exact, x, y, robust, eps, seed,
                    batch_size
                )  # fmt: skip
            rows, images = state[name]
            robust[rows] = False
            x_adv[rows] = images.to(x_adv)
            log(f"{name:9} robust {_share(robust)}")
            if name == "square" and name != attacks[0] and len(rows) > max(1, 0.002 * len(x)):
                warn("Square fooled what the gradient attacks missed: are they masked?")
    return x_adv


def _share(robust):
    return f"{robust.sum()}, {100 * robust.double().mean():.2f} %"


def run_attack(
    name, steps, targets, fast, exact, x, y, robust, eps, seed, batch_size
) -> tuple:  # fmt: skip
    """Run one attack on the robust points, target after target on what is still robust; targets:
    int64 [N, targets]. Returns the fooled: rows int64 [k], images [k,C,H,W], both on the CPU."""
    if name == "fab-t" and getattr(fast, "dtype", None) == torch.bfloat16:
        fast = exact  # its steps live on small differences of logits
    left = robust.clone()
    images = x.clone()
    for nth, target in enumerate(targets.T, 1):
        if not left.any():
            break
        for rows in left.nonzero().flatten().split(batch_size):
            show_progress(f"{name}, target {nth}: {left.sum()} points robust")
            points = Points(fast, exact, x[rows], y[rows], target[rows], eps, batch_size)
            draws = random_stream("cpu", seed, "autoattack", AUTOATTACK.index(name), nth)
            with suppress(AllFooled):
                ATTACK_OF[name](points, draws, steps)
            images[rows] = points.found
            left[rows] = points.left
    show_progress()
    rows = (robust & ~left).nonzero().flatten()
    return rows.cpu(), images[rows].cpu()


# 9  Evaluation ====================================================================================
ATTACKS = ("clean", "pgd", "aa")


@contextmanager
def judging(model):
    """Inside, eval mode, no gradients and no TF32: a verdict must not depend on ten bits."""
    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for switch in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
            stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
            switch.fp32_precision = "ieee"
        yield


def scoring_nets(model, cfg=None, counts=()):
    """(fast, exact): what an evaluation's attacks move by, and what decides. A float32 Net as two
    copies: float16 on CUDA, where it is as fast as bfloat16 and eight times as fine, elsewhere of
    cfg's precision (default: the fastest of the device), and float32. With 'off', or of any other
    module, both are one. With `counts`, training images per class, RoBal's network gets its
    post-hoc head beyond 10 classes: 10 * scores - 1.7 ln(n_c/N), attacked as such."""
    if not isinstance(model, Net):
        net = ForeignNet(model)
        return net, net
    weight = next(model.parameters())
    exact = FrozenCopy(model, weight.dtype)
    fast = exact
    amp = cfg.amp if cfg else best_precision(weight.device)
    if amp != "off" and weight.dtype == torch.float32:
        fast = FrozenCopy(model, torch.float16 if weight.is_cuda else AMP_DTYPE[amp])
    for net in {fast, exact}:
        head = net.net[-1]
        if isinstance(head, CosineHead):
            head.adjust(counts)
        if cfg and cfg.compile != "off":
            net.speed_up(EVAL_BATCH)
    return fast, exact


def usable_nets(nets, x, y):
    """(fast, exact), or with a warning exact twice where a batch overflows the fast one's
    float16."""
    fast, exact = nets
    if fast is exact or input_gradient(fast, x, margin, y)[2].isfinite().all():
        return nets
    warnings.warn("this network overflows float16: float32 attacks it", stacklevel=3)
    return exact, exact


def evaluate(
    model, images_u8, labels, *, tail=(), attacks=("clean", "pgd"), eps=8 / 255, step_size=2 / 255,
    steps=20, seed=0, batch_size=EVAL_BATCH, nets=None, log=None, state=None,
) -> dict:  # fmt: skip
    """Accuracy on test images in percent: overall, per class, on the tail classes. images_u8: uint8
    [N,3,H,W]; labels: int64 [N], same device; tail: class indices. 'clean' is plain accuracy; 'pgd'
    the accuracy at the last iterate of PGD (uniform start clipped to [0,1], one restart, no early
    exit); 'aa' the accuracy under AutoAttack standard, to which log and state go. nets: (fast,
    exact), the forwards that ascend and that decide, by default scoring_nets(model); verdicts are
    IEEE float32. Noise depends on the seed and on a batch's number only; under torchrun each rank
    takes whole batches, and all return the same. Returns clean, tail_clean, class_clean (a list, 0
    for a class without images) and the like; tail_* is None where no image is of the tail. No
    global generator is touched and the model is left as it was. ValueError for no images, or
    another dtype or shape."""
    check_images(images_u8, labels, (torch.uint8,))
    if not set(attacks) <= set(ATTACKS) or min(batch_size, len(labels)) < 1:
        raise ValueError(
            f"attacks {attacks!r}, batch_size {batch_size}, {len(labels)} images: "
            f"want a sequence from {ATTACKS}, batch_size >= 1, images >= 1"
        )
    fast, exact = usable_nets(
        nets or scoring_nets(model), to_float(images_u8[:batch_size]), labels[:batch_size]
    )
    parts = torch.arange(len(labels)).split(batch_size)[RANK::WORLD]
    result = {}
    for name in attacks:
        correct = torch.zeros_like(labels, dtype=torch.bool)
        inputs = (to_float(images_u8[part]) for part in parts)
        if name == "aa" and parts:
            mine = torch.cat(parts)
            inputs = autoattack(
                model,
                to_float(images_u8[mine]),
                labels[mine],
                eps=eps,
                seed=seed,
                batch_size=batch_size,
                nets=(fast, exact),
                log=log,
                state=state,
            ).split(batch_size)
        for part, x in zip(parts, inputs):
            y = labels[part]
            with judging(exact):
                if name == "pgd":
                    number = int(part[0]) // batch_size
                    noise = random_stream(x.device, seed, "evaluation", number)
                    x = pgd_attack(
                        fast, x, y, eps=eps, step_size=step_size, steps=steps, generator=noise
                    )
                logits = exact(x)
            correct[part] = (logits.argmax(1) == y) & ~logits.isnan().any(1)  # NaN is never right
        right = sum(gather(correct.cpu())).numpy()  # one rank scores an image, the others say 0
        result |= accuracies(name, right, labels.cpu().numpy(), tail)
    return result


def accuracies(name, right, labels, tail):
    """0 or 1 [N] -> {name, tail_name, class_name: percent}."""
    counts = np.bincount(labels)
    per_class = 100 * np.bincount(labels, right) / counts.clip(1)
    of_tail = right[np.isin(labels, list(tail))]
    return {
        name: 100 * int(right.sum()) / len(right),
        f"tail_{name}": 100 * int(of_tail.sum()) / len(of_tail) if len(of_tail) else None,
        f"class_{name}": per_class.round(4).tolist(),
    }


def save_examples(path, net, images_u8, labels, count, log, seed, **threat):
    """Write a PNG grid of `count` images spread over the set: clean, after PGD, ten times the
    difference; to the log their labels and what the net says to both. net: a FrozenCopy; threat:
    eps, step_size and steps."""
    index = torch.linspace(0, len(labels) - 1, min(count, len(labels))).long()
    x = to_float(images_u8[index])
    noise = random_stream(x.device, seed, "examples")
    x_adv = pgd_attack(net, x, labels[index], generator=noise, **threat)
    difference = 0.5 + 10 * (x_adv - x)  # saving clips it
    triples = torch.stack([x, x_adv, difference], 1).flatten(0, 1)
    with writing(path):
        torchvision.utils.save_image(triples, path, nrow=12)
    clean = net(x).argmax(1).tolist()
    attacked = net(x_adv).argmax(1).tolist()
    log(f"{path}: labels {labels[index].tolist()}, predicted {clean}, under attack {attacked}")


# 10  Runs and report ==============================================================================
# A run's folder: config.json, log.txt, teacher.pt, best.pt, last.pt, state.pt, results.json,
# report.md; aa-*.pt while AutoAttack is under way. One process at a time holds it.
@contextmanager
def writing(path):
    """Around a write: the folder of `path` is made; one line for what cannot be written."""
    with blaming(
        f"cannot write {path}: check path, rights and free space, or try another --out", OSError
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


def write_atomic(path, content, rank=0):
    """Write text, or what torch.save takes, so that readers and crashes see the old file or the new
    one. Of several ranks only this one writes."""
    if RANK != rank:
        return
    data = io.BytesIO()
    if isinstance(content, str):
        data.write(content.encode())
    else:
        torch.save(content, data)  # not to the file: torch would hide why a write has failed
    # always one name: what a killed process leaves is reused
    temporary = f"{path}.tmp"
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path, **content):
    """As write_atomic."""
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def read_json(path) -> dict:
    """What a JSON file of ours holds, {} where there is none; UserError where it is damaged."""
    if not path.exists():
        return {}
    with blaming(
        f"{path} is damaged: restore it, or remove the folder and start afresh",
        (OSError, ValueError, TypeError),
    ):
        return dict(json.loads(path.read_bytes()))


@contextmanager
def hold_folder(path):
    """Hold a run's folder; a second process waits here. Gives log(line): to log.txt and, on rank 0,
    to the screen."""
    log_path = path / "log.txt"
    with writing(log_path):
        # unbuffered: nothing is left to write when it is closed
        file = open(os.devnull if RANK else log_path, "ab", buffering=0)

    def log(line):
        with writing(log_path):
            file.write(f"{line}\n".encode(errors="replace"))
        say(line)

    with file:
        if RANK == 0 and fcntl:
            with suppress(OSError):  # a drive without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    say(f"{path} is in use by another process: waiting for it to end")
                    fcntl.flock(file, fcntl.LOCK_EX)
        gather(None)  # no rank looks into the folder before it is ours
        yield log


def identity(cfg) -> dict:
    """What makes a run the run it is: the Settings of its Config and, for a folder of images, the
    folder's name, which is the same on another machine."""
    own = {f.name: getattr(cfg, f.name) for f in fields(Settings)}
    if cfg.data == "folder":
        own["place"] = Path(cfg.data_dir).resolve().name
    return own


def run_path(cfg) -> Path:
    """A run's folder: below --out, named by what people vary and a checksum of its identity."""
    digest = zlib.crc32(json.dumps(identity(cfg)).encode())
    ratio = f"ir{cfg.ir:g}" if cfg.ir else "owncounts"
    method = "teacher" if cfg.role == "teacher" else cfg.method
    return Path(cfg.out, f"{cfg.data}-{ratio}-{method}-{cfg.arch}-seed{cfg.seed}-{digest:08x}")


def environment(cfg) -> dict:
    """What figures depend on beside the Settings: device, precision, processes, versions."""
    device = f"cpu ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
    if cfg.device != "cpu":
        device = f"{torch.cuda.get_device_name(cfg.device)}, CUDA {torch.version.cuda}"
    known = dict(device=device, processes=WORLD, amp=cfg.amp, compile=cfg.compile)
    for module in (torch, torchvision, np, triton):
        if module:
            known[module.__name__] = module.__version__
    return known


def open_run(cfg, data, path, log):
    """Write config.json, or compare with the one that is there: UserError where the training
    images differ. (Other Settings have another folder.)"""
    file = path / "config.json"
    known = read_json(file)
    images = _crc32(data.train_images, data.train_labels)
    if known.get("images", images) != images:
        raise UserError(f"{path} holds a run of other training images: choose another --out")
    machine = environment(cfg)
    log(f"run {path}: {machine}")
    before = known.get("environment", machine)["processes"]
    if before != WORLD:
        log(f"going on with {WORLD} processes, begun with {before}")
    classes = dict(names=data.classes, counts=data.counts, tail=data.tail)
    write_json(file, config=vars(cfg), images=images, environment=machine, classes=classes)


def save_model(path, cfg, data, model, epoch):
    """A checkpoint that load_weights reads: public parameter names, CPU tensors, and the names of
    the classes."""
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    content = dict(state_dict=weights, epoch=epoch, arch=cfg.arch, classes=data.classes)
    write_atomic(path, content)


def load_state(path, trainer, log) -> dict:
    """Fill network and optimiser from state.pt and return the rest of it; {} where there is
    none."""
    file = path / "state.pt"
    if not file.exists():
        return {}
    damaged = (UserError, KeyError, TypeError, ValueError, RuntimeError, AttributeError)
    with blaming(f"{file} does not fit this run: remove it to train from the start", damaged):
        state = read_checkpoint(file)
        trainer.model.load_state_dict(state.pop("model"))
        trainer.optimizer.load_state_dict(state.pop("optimizer"))
        trainer.predicted = state.pop("predicted").to(trainer.cfg.device)
        line = f"{trainer.cfg.role}: going on after epoch {state['epoch']}"
    log(line)
    return state


def load_net(cfg, data, path):
    """(model, epoch, (fast, exact)) of a checkpoint file of this Config's method, on its device.
    --mean and --std hold where cfg.checkpoint says that the network is not one of ours."""
    model = build_model(cfg.arch, len(data.classes), cfg.row.head)
    if cfg.checkpoint and (cfg.mean or cfg.std):
        wanted = f"--mean {cfg.mean} --std {cfg.std}: want both, three numbers each"
        with blaming(wanted, (ValueError, AttributeError, RuntimeError)):
            model.normalize = Normalize(floats(cfg.mean), floats(cfg.std))
    epoch = load_weights(model, path, data.classes)
    model.to(cfg.device)
    counts = data.counts
    if cfg.role == "teacher":  # trained on D_B: all classes have as many
        counts = [1] * len(counts)
    return model, epoch, scoring_nets(model, cfg, counts)


def threat_of(cfg, unit=1) -> dict:
    """The attack of an evaluation, in 255ths as its records name it, or by the unit."""
    return dict(eps=cfg.eval_eps / unit, step_size=cfg.eval_step_size / unit, steps=cfg.eval_steps)


def evaluate_run(cfg, data, path, log):
    """Evaluate teacher, best and last as far as they are there, or --checkpoint: what results.json
    lacks."""
    there = [name for name in CHECKPOINTS if (path / f"{name}.pt").exists()]
    # without any, the error is that there is no best.pt
    names = gather(there or ["best"])[0]  # a shared drive may tell ranks different things
    if cfg.checkpoint:
        names = [cfg.checkpoint]
    for name in names:
        its_cfg = teacher_config(cfg) if name == "teacher" else cfg
        file = Path(cfg.checkpoint or path / f"{name}.pt")
        with_fallback(evaluate_checkpoint, its_cfg, data, path, log, name, file)


def evaluate_checkpoint(cfg, data, path, log, name, file):
    """Score one checkpoint: a flat record of results.json, which belongs to weights, test images
    and threat. Best and last are scored once where they are one."""
    model, epoch, nets = load_net(cfg, data, file)
    threat = threat_of(cfg, 255) | {"seed": cfg.seed}
    images = data.test_images
    labels = data.test_labels
    if cfg.examples and RANK == 0:
        grid = path / f"examples-{file.stem}.png"
        save_examples(grid, nets[1], images, labels, cfg.examples, log, **threat)
    about = dict(weights=weights_crc32(model), test_images=_crc32(images, labels)) | threat_of(cfg)
    records = gather(read_json(path / "results.json"))[0].get("evaluations", [])
    record = dict(checkpoint=name, epoch=epoch) | about
    for other in records:  # by other attacks, or of best where this is last
        if about.items() <= other.items():
            record = other | record  # where both have a key, its own value stays
    wanted = [attack for attack in cfg.attacks.split(",") if attack not in record]
    # AutoAttack's state, for this very call alone
    saved = path / f"aa-{derive_seed(about, cfg.amp, RANK, WORLD):08x}.pt"
    if wanted:
        log(f"evaluating {name}: {', '.join(wanted)}")
        state = {}
        with suppress(UserError):  # none is there yet, or a damaged one
            state = read_checkpoint(saved)

        def log_and_save(line):  # AutoAttack has a line for each attack that has ended
            write_atomic(saved, state, rank=RANK)
            log(line)

        record |= evaluate(
            model,
            images,
            labels,
            attacks=wanted,
            tail=data.tail,
            nets=nets,
            state=state,
            log=log_and_save,
            **threat,
        )
        record["evaluated_on"] = environment(cfg)
        # one and a half times chance, in percent
        if cfg.checkpoint and record.get("clean", 100) <= 150 / len(data.classes):
            log(
                f"{name} is near chance: was it trained on normalised images (--mean, --std), "
                "another --image-size or order of classes?"
            )
    # what it replaces: this checkpoint under this threat, whatever its weights were
    same = threat_of(cfg) | {"checkpoint": name}
    kept = [other for other in records if not same.items() <= other.items()]
    write_json(path / "results.json", evaluations=kept + [record])
    gather(None)  # the record is there before another rank asks for it
    if "aa" in record:
        saved.unlink(missing_ok=True)


# fmt: off
# The paper's tables: number, data, IR, arch, method (teacher: PGD-AT on D_B); clean PGD-20 AA
# T-clean T-PGD of the best, then the last epoch. A dash: not given, or lost in its text.
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
CHECKPOINTS = ("teacher", "best", "last")
COLUMNS = dict(
    clean="clean", pgd="PGD-20", aa="AA", tail_clean="T-clean", tail_pgd="T-PGD", tail_aa="T-AA"
)
# What tells the paper's rows apart, and what it leaves open: there any value stands beside its row.
FREE = ("data", "ir", "method", "arch", "aug", "official", "seed", "alpha", "tau", "kd")


def paper_row(cfg, name) -> dict:
    """The paper's numbers {column: percent} for a checkpoint ('teacher', 'best', 'last') of
    a resolved Config under the standard threat; {} where it has none for these settings."""
    if cfg.method not in METHODS or name not in CHECKPOINTS:
        return {}
    usual = resolve({"device": "cpu"} | {key: getattr(cfg, key) for key in FREE})
    if identity(usual) != identity(cfg) or threat_of(usual) != threat_of(cfg):
        return {}
    method = "teacher" if name == "teacher" else cfg.method
    label = f"{method}+{cfg.aug}".removesuffix("+none")
    _, _, row = PAPER.partition(f" {cfg.data} {cfg.ir or 0:g} {cfg.arch} {label} ")
    first = 5 if name == "last" else 0  # the best epoch's numbers come first
    numbers = zip(COLUMNS, row.split()[first : first + 5])
    return {column: float(cell) for column, cell in numbers if cell != "-"}


class RunGroup:
    """Runs that differ in nothing but the seed: rows of the table, a mark in the figures."""

    def __init__(self, cfg, images, records):
        self.cfg = cfg
        # what runs of one group have in common
        self.own = identity(cfg) | dict(
            seed=None,
            images=images,
            eval_eps=cfg.eval_eps,
            test_images=records[-1].get("test_images"),
        )
        self.seeds = [cfg.seed]
        self.records = records  # of all its runs, from results.json
        ratio = f"IR {cfg.ir:g}" if cfg.ir else "own counts"
        method = f"{cfg.method}+{cfg.aug}".removesuffix("+none")
        self.words = dict(data=cfg.data, ir=ratio, arch=cfg.arch, method=method)
        self.details = {}  # what else tells it from the others with the same words

    def label(self, without=""):
        """Its name, but for what is said of one setting."""
        words = self.words | self.details
        words.pop(without, None)
        return " ".join(words.values())

    def values(self, column, checkpoint="best"):
        """The runs' values of a column, as far as they have it."""
        return [
            record[column]
            for record in self.records
            if record["checkpoint"] == checkpoint and record.get(column) is not None
        ]

    def means(self, columns, checkpoint="best"):
        """The mean of each column over the runs; NaN where none has it."""
        return [np.mean(self.values(column, checkpoint) or math.nan) for column in columns]


def read_run(path, cfg) -> RunGroup:
    """A folder's evaluations under the evaluation settings of cfg; where it has no eval_eps, under
    that of the last one. UserError where there are none."""
    remedy = "use --stage eval, or name runs as in --stage report 'runs/*'"
    damaged = (LookupError, TypeError, ValueError, AttributeError)
    with blaming(f"{path} holds no such evaluation: {remedy}", damaged):
        content = read_json(path / "config.json")
        wanted = dict(steps=cfg.eval_steps, step_size=cfg.eval_step_size)
        if cfg.eval_eps is not None:
            wanted["eps"] = cfg.eval_eps
        if cfg.checkpoint:
            wanted["checkpoint"] = cfg.checkpoint
        records = read_json(path / "results.json")["evaluations"]
        records = [record for record in records if wanted.items() <= record.items()]
        if not records:
            raise ValueError(wanted)
        eps = records[-1]["eps"]
        records = [record for record in records if record["eps"] == eps]
        threat = dict(eval_eps=eps, eval_steps=cfg.eval_steps, eval_step_size=cfg.eval_step_size)
        return RunGroup(Config(**content["config"] | threat), content["images"], records)


def group_runs(runs) -> list:
    """What read_run gives, runs that differ only in the seed made one, in the order of the first;
    labels name what sets them apart."""
    groups = []
    for run in runs:
        for group in groups:
            if group.own == run.own:
                group.seeds += run.seeds
                group.records += run.records
                break
        else:
            groups.append(run)
    for group in groups:
        for rival in groups:
            if rival.words == group.words:
                for key, value in group.own.items():
                    if rival.own[key] != value:
                        group.details[key] = f"{key} {value}"
    return groups


def markdown(heads, rows) -> str:
    """Headings and rows of cells -> an aligned table; two columns of text, then numbers."""
    numbers = len(heads) - 2
    rule = ["---", "---"] + ["---:"] * numbers
    rows = [heads, rule] + rows
    line = "|"
    for column, side in zip(zip(*rows), "<<" + ">" * numbers):
        width = max(map(len, column))
        line += f" {{:{side}{width}}} |"
    return "\n".join(line.format(*row) for row in rows)


def shown(number, style=".2f"):
    """A number as a cell of the table; a dash for NaN."""
    return "-" if math.isnan(number) else format(number, style)


def rows_of_group(group, checkpoint, columns):
    """The table's rows for a checkpoint of a RunGroup: ours, the paper's, the gap."""
    label = checkpoint
    epochs = sorted(set(group.values("epoch", checkpoint)))
    if epochs:
        label += f" (epoch {', '.join(map(str, epochs))})"
    name = f"{group.label()} seed {','.join(map(str, group.seeds))}"
    if checkpoint not in CHECKPOINTS:  # of --checkpoint, whose training is not known
        name = f"{group.cfg.data} {group.cfg.arch}"
    ours = [name, label]
    theirs = ["", "paper"]
    gaps = ["", "gap"]
    paper = paper_row(group.cfg, checkpoint)
    for column in columns:
        values = group.values(column, checkpoint)
        mean = np.mean(values or math.nan)
        cell = shown(mean)
        if len(values) > 1:
            cell += f" ± {np.std(values, ddof=1):.2f}"
        if 0 < len(values) < len(group.seeds):
            cell += f" (n={len(values)})"
        number = paper.get(column, math.nan)
        ours.append(cell)
        theirs.append(shown(number))
        gaps.append(shown(mean - number, "+.2f"))
    if paper:
        return [ours, theirs, gaps]
    return [ours]


def table(groups) -> str:
    """RunGroups as Markdown in the paper's layout: a line per checkpoint, mean and standard
    deviation over the seeds, below it the paper's values and the gap."""
    records = []
    for group in groups:
        records += group.records
    columns = [name for name in COLUMNS if any(r.get(name) is not None for r in records)]
    heads = ["setting", "checkpoint"]
    heads += [COLUMNS[name].replace("20", str(groups[0].cfg.eval_steps)) for name in columns]
    rows = []
    for group in groups:
        for checkpoint in dict.fromkeys(record["checkpoint"] for record in group.records):
            rows += rows_of_group(group, checkpoint, columns)
    threats = sorted({f"{record['eps']:g}/255" for record in records})
    caption = (
        f"In %; eps {', '.join(threats)}. T-: the rarest tenth of the classes, at least one. "
        "best: highest PGD accuracy (natural: clean) after the first drop of the learning rate, "
        "chosen on the test set."
    )
    return f"{markdown(heads, rows)}\n\n{caption}"


REPORT_MARK = "<!-- ltsd.py writes this file anew with every report -->"


def report(paths, cfg, folder) -> list:
    """One table over run folders, printed and written to folder/report.md; folders that cannot be
    shown are listed below it. Returns its RunGroups. UserError where none can be shown."""
    runs = []
    notes = []
    for path in dict.fromkeys(paths):
        try:
            runs.append(read_run(path, cfg))
        except UserError as error:
            notes.append(f"Left out: {error}.")
    if not runs:
        raise UserError(" ".join(notes))
    groups = group_runs(runs)
    text = "\n\n".join([table(groups)] + notes)
    say(f"\n{text}\n")
    file = folder / "report.md"
    if file.exists() and not file.read_text(errors="replace").startswith(REPORT_MARK):
        say(f"{file} is not ours and stays as it is")
    else:
        write_atomic(file, f"{REPORT_MARK}\n{text}\n")
        say(f"report {file}")
    return groups


def save_figure(folder, name, title, draw, panels):
    """Save folder/name: panels side by side, each by draw(its axes, what it shows), the first one's
    legend below."""
    from matplotlib.figure import Figure  # optional: run_stages has looked for it

    figure = Figure((4.5 * len(panels) + 1.5, 5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels):
        draw(ax, panel)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(panels)
    )
    path = Path(folder, name)
    with writing(path):
        figure.savefig(path, dpi=150)
    say(f"figure {path}")


def look(i):
    """Colour and marker of the i-th group: 90 of them differ."""
    marker = "*osD^vPhX"[i % 9]
    return f"C{i % 10}{marker}"


def draw_scatter(groups, ax, columns):
    """Best checkpoints; a thin line leads to the last one. x: the self-teacher. Hollow: the paper's
    own points. columns: what the two axes show."""
    for i, group in enumerate(groups):
        best = group.means(columns)
        last = group.means(columns, "last")
        paper = paper_row(group.cfg, "best")
        color = look(i)[:2]
        ax.plot(*best, look(i), label=group.label())
        ax.plot(*zip(best, last), color, lw=0.7)
        ax.plot(*group.means(columns, "teacher"), color + "x")
        theirs = [paper.get(column, math.nan) for column in columns]
        ax.plot(*theirs, look(i), mfc="none", zorder=1)
    ax.set_xlabel(f"{COLUMNS[columns[0]]} accuracy (%)")
    ax.set_ylabel(f"{COLUMNS[columns[1]]} accuracy (%)")


def draw_classes(groups, ax, column):
    """Accuracy of up to ten groups of classes, from the most to the least frequent."""
    for i, group in enumerate(groups):
        runs = group.values(f"class_{column}")
        if runs:
            classes = np.mean(runs, 0)
            parts = np.array_split(classes, min(10, len(classes)))
            means = [part.mean() for part in parts]
            ax.plot(range(1, len(means) + 1), means, look(i) + "-", label=group.label())
    ax.set_xlabel("group of classes, most to least frequent")
    ax.set_ylabel(f"{COLUMNS[column]} accuracy (%)")


def draw_sweep(families, key, ax, columns):
    """Accuracies by the value of one setting, for each family of otherwise equal RunGroups."""
    for i, family in enumerate(families):
        label = family[0].label(key)
        values = [group.own[key] for group in family]
        for column, dash in zip(columns, ("--", "-")):
            means = [group.means([column]) for group in family]
            ax.plot(values, means, look(i) + dash, label=f"{label}, {COLUMNS[column]}")
    ax.set_xlabel(key)
    ax.set_ylabel(f"{COLUMNS[columns[0]]} and {COLUMNS[columns[1]]} accuracy (%)")
    if key == "ir":
        ax.set_xscale("log")


def sweep_families(groups, key):
    """Lists of RunGroups that differ in `key` alone, by its value, where there are several."""
    families = {}
    for group in sorted(groups, key=lambda group: group.own[key] or 0):
        value = group.own[key]
        if value is None:
            continue
        rest = group.own | {key: None}
        if key == "ir":
            rest["images"] = None  # they follow the ratio, and so does the default gamma
            if rest["gamma"] == max(1.0, value / 2):
                rest["gamma"] = None
        families.setdefault(str(rest), []).append(group)
    return [family for family in families.values() if len(family) > 1]


def report_figures(groups, folder):
    """Draw the best checkpoints of RunGroups into folder: scatter.png (the paper's Figures 1 and
    5), classes.png (8), and ir.png (4), alpha.png and gamma.png (6, 7) where that setting takes
    several values and all else is equal."""
    robust = "aa" if all(group.values("aa") for group in groups) else "pgd"
    pairs = [("clean", robust), ("tail_clean", "tail_pgd")]
    radii = sorted({f"{group.cfg.eval_eps:g}/255" for group in groups})
    title = f"Best epoch, eps {', '.join(radii)}"
    note = "thin line: to the last epoch; x: the self-teacher; hollow: the paper's"
    save_figure(folder, "scatter.png", f"{title}\n{note}", partial(draw_scatter, groups), pairs)
    save_figure(folder, "classes.png", title, partial(draw_classes, groups), [robust])
    for key in ("ir", "alpha", "gamma"):
        families = sweep_families(groups, key)
        if families:
            save_figure(folder, f"{key}.png", title, partial(draw_sweep, families, key), pairs)


# 11  Theory =======================================================================================
# Eq. (2): y = +1 (head) with probability r / (r + 1), else -1 (tail); x ~ N(eta * y, I) in n
# dimensions: eta places the two means, the standard deviation is 1.
def theorem1(n, eta, eps, r) -> dict:
    """Theorem 1 (eq. 4-5): tail errors of the optimal natural and the optimal robust linear
    classifier. n: dimension, a whole number >= 1. eta, eps: floats, 0 <= eps < eta; the attack
    moves a coordinate by at most eps. r: imbalance ratio >= 1. Returns a dict of floats: nat_std,
    nat_rob, rob_std, rob_rob in [0, 1] (training, then std for clean and rob for attacked points),
    and the biases b_nat, b_rob (eq. 11, 16), which belong to w = (1, ..., 1) / sqrt(n). ValueError
    outside these ranges."""
    possible = n % 1 == 0 and n >= 1 and 1 <= r < math.inf and 0 <= eps < eta < math.inf
    if not possible:
        raise ValueError(
            f"n {n}, eta {eta}, eps {eps}, r {r}: "
            "want whole n >= 1, 0 <= eps < eta and finite r >= 1"
        )
    clean = math.sqrt(n) * eta
    attacked = math.sqrt(n) * (eta - eps)
    b_nat = math.log(r) / (2 * clean)
    b_rob = math.log(r) / (2 * attacked)
    return dict(
        b_nat=b_nat,
        b_rob=b_rob,
        nat_std=_normal_tail(clean - b_nat),
        nat_rob=_normal_tail(attacked - b_nat),
        rob_std=_normal_tail(clean - b_rob),
        rob_rob=_normal_tail(attacked - b_rob),
    )


def _normal_tail(x):
    """1 - Phi(x)"""
    return 0.5 * math.erfc(x / math.sqrt(2))


# The example of the table and the figure is n = 2, eta = 1, eps = 0.5.
TRAININGS = {"nat": "natural training", "rob": "adversarial training"}


def theory() -> str:
    """Section 3 and appendix A as Markdown: tail errors in closed form by imbalance ratio;
    adversarial training leaves an attacked tail worse (Corollary 1)."""
    heads = ["IR", "training", "bias", "clean", "attacked"]
    rows = []
    for r in (1, 2, 5, 10, 20, 50):
        result = theorem1(2, 1.0, 0.5, r)
        for key, name in TRAININGS.items():
            bias = f"{result['b_' + key]:.4f}"
            clean = f"{100 * result[key + '_std']:.2f}"
            attacked = f"{100 * result[key + '_rob']:.2f}"
            rows.append([str(r), name, bias, clean, attacked])
    caption = "Tail errors of eq. (2) in %, bias at |w| = 1, in closed form: n 2, eta 1, eps 0.5."
    return f"{caption}\n\n{markdown(heads, rows)}"


def draw_boundaries(ax, r):
    """500 points of eq. (2), each class with its share, and the optimal boundaries x1 + x2 =
    -sqrt(2) b."""
    x = np.random.default_rng(r).normal(size=(500, 2))
    heads = round(500 * r / (r + 1))
    ax.plot(*(x[:heads] + 1).T, ".", color="0.6", label="head, y = +1")
    ax.plot(*(x[heads:] - 1).T, "x", color="0.6", label="tail, y = -1")
    result = theorem1(2, 1.0, 0.5, r)
    for key, color, dash in (("nat", "#0072B2", "-"), ("rob", "#D55E00", "--")):
        at = (0, -math.sqrt(2) * result[f"b_{key}"])
        ax.axline(at, slope=-1, color=color, ls=dash, lw=3, label=TRAININGS[key])
    ax.set(title=f"IR {r}", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    ax.axis([-4, 4, -4, 4])


# 12  Bench ========================================================================================
# Plain is what a researcher writes after AT-BSL's script: eager, float32 NCHW, autograd.grad at x.
# (Its training step already has our teacher and, on CUDA, the fused optimiser.)
def compare(part, batch, variants, rounds):
    """Time {variant: function of `batch` images}; yields a row each, also to the screen: images a
    second, by the median, and how many times the first variant's that is. They take turns, so that
    a drifting machine slows all alike; the first round warms up."""
    seconds = defaultdict(list)
    for _ in range(rounds + 1):
        for name, function in variants.items():
            began = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    first = None
    for name in variants:
        speed = batch / np.median(seconds[name][1:])
        first = first or speed
        ratio = speed / first
        say(f"{part:13} batch {batch:<4} {name:26} {speed:12.1f} images/s  x {ratio:.2f}")
        yield dict(part=part, batch=batch, variant=name, images_per_s=speed, ratio=ratio)


def plain_attack(model, x, y, cfg):
    """AT-BSL's inner loop as it is usually written."""
    model.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(cfg.steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv = x_adv.detach() + cfg.step_size / 255 * grad.sign()
        x_adv = torch.clamp(x_adv, x - cfg.eps / 255, x + cfg.eps / 255).clamp(0, 1)
    return x_adv


def bench_core(cfg, batch, rounds):
    """The attack and the training step (the attack and the optimiser's step) at one batch size on
    ResNet-18 with 100 classes: plain, then our levers added in turn."""

    def training_step(trainer, attack, x):
        trainer.step(x, attack(), y, 40.0, 0.01)

    y = torch.arange(batch, device=cfg.device) % 100
    plain = replace(cfg, batch_size=batch, amp="off", compile="off")
    levers = {"plain": plain, "folded norms, fused step": plain}
    if cfg.amp != "off":
        levers[f"+ amp {cfg.amp}"] = replace(plain, amp=cfg.amp)
    if cfg.compile != "off":
        levers["+ torch.compile, CUDA graphs"] = replace(cfg, batch_size=batch)
    attacks = {}
    steps = {}
    for lever, its_cfg in levers.items():
        model = build_model("resnet18", 100).to(cfg.device)
        trainer = Trainer(its_cfg, model, [1] * 100, scoring_nets(model, its_cfg)[0])
        x = torch.rand(batch, 3, 32, 32, device=cfg.device).to(memory_format=torch.channels_last)
        attacks[lever] = partial(trainer.attack, x, y, None)
        if lever == "plain":
            model.to(memory_format=torch.contiguous_format)
            x = x.contiguous()
            attacks[lever] = partial(plain_attack, model, x, y, cfg)
        steps[lever] = partial(training_step, trainer, attacks[lever], x)
    yield from compare("attack", batch, attacks, rounds)
    yield from compare("training step", batch, steps, rounds)


def bench_kernel(batch):
    """A hundred steps on CUDA: plain operations, compiled ones, our kernel, each as a CUDA graph,
    so that launches cost nothing. A step moves 49,152 bytes an image."""
    x = torch.rand(batch, 3, 32, 32, device="cuda")
    arguments = (x.clone(), torch.randn_like(x).bfloat16(), x, 2 / 255, 8 / 255, x.bfloat16())

    def plain(x_adv, grad, x, step_size, eps, low):
        low.copy_(x_adv.copy_(pgd_step_reference(x_adv, grad, x, step_size, eps)))

    def hundred_times(step):
        for _ in range(100):
            step(*arguments)

    compiled = torch.compile(plain, dynamic=False)
    replays = {}
    for name, step in dict(plain=plain, compiled=compiled, kernel=pgd_step).items():
        replays[name], _ = capture_cuda_graph(hundred_times, (step,))
    return compare("100 steps", batch, replays, 5)


def bench_autoattack(cfg):
    """Each attack by pyautoattack, where that is installed, and by ours: 16 images, 5 iterations,
    100 queries, on an untrained resnet8's own guesses."""
    model = build_model("resnet8", 10).to(cfg.device, memory_format=torch.contiguous_format).eval()
    x = torch.rand(16, 3, 32, 32, device=cfg.device)
    y = model(x).argmax(1)
    eps = 0.25 / 255  # most points stay robust
    nets = scoring_nets(model, cfg)
    for name in AUTOATTACK:
        variants = {}
        with suppress(ImportError):
            from pyautoattack import AutoAttack

            official = AutoAttack(model, eps=eps, device=cfg.device)
            official.attacks_to_run = [name]
            for attack in (official.apgd, official.apgd_targeted, official.fab):
                attack.n_iter = 5
            official.square.n_queries = 100
            variants["pyautoattack"] = partial(official.run_standard_evaluation, x, y)
        variants["ours"] = partial(
            autoattack, model, x, y, eps=eps, attacks=[name], nets=nets, iterations=5, queries=100
        )
        yield from compare(name, len(x), variants, 1)


def stage_bench(cfg):
    """Measure the core against plain PyTorch on this machine, with attacks of 2 steps on a CPU: to
    the screen and to bench.json."""
    on_cuda = cfg.device != "cpu"
    cfg = replace(cfg, steps=10 if on_cuda else 2)
    rows = []
    for batch in (32, 128):
        rows += bench_core(cfg, batch, 5 if on_cuda else 128 // batch)
    if on_cuda and triton:
        for batch in (32, 128, 4096):
            rows += bench_kernel(batch)
    rows += bench_autoattack(cfg)
    path = Path(cfg.out, "bench/bench.json")
    write_json(path, environment=environment(cfg), attack_steps=cfg.steps, rows=rows)


# 13  Command line =================================================================================
METHOD_SETTINGS = set(Method.uses)  # by default a method uses all that there are
TEACHER_SETTINGS = {
    "gamma", "teacher_method", "teacher_data", "teacher_epochs", "teacher_batch_size",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage too; one line is enough
        raise UserError(message)


def _read(f, choices, text):
    """A flag's text -> the list of its values, each of them in `choices` if there are any; argparse
    puts the flag's name before what is wrong."""
    low = f.metadata["low"]
    wanted = f"{f.metadata['help']}: {f.type.__name__} from {low:g}"
    if f.type is str:
        wanted = ", ".join(choices) or f.metadata["help"]
    parts = [text]
    if f.name in Settings.__dataclass_fields__ and f.name != "milestones":
        parts = text.split(",")
    if f.name == "method" and text == "all":
        parts = METHODS
    values = []
    for part in parts:
        fits = False
        with suppress(ValueError):
            value = f.type(os.path.expanduser(part.strip()))
            if choices:
                fits = value in choices
            else:
                fits = value != "" if f.type is str else low <= value < math.inf
        if not fits:
            raise argparse.ArgumentTypeError(f"{part!r}: want {wanted}")
        values.append(value)
    return values


def make_parser():
    """Flags from the fields of Config; a flag that is not given leaves no trace, one that is given
    the list of its values."""
    paragraphs = __doc__.split("\n\n")
    parser = _Parser(
        "ltsd.py",
        "ltsd.py [options] [RUN ...]",
        paragraphs[0],
        epilog=f"examples:\n{paragraphs[2]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", type=os.path.expanduser, metavar="RUN")
    # of METHODS and ARCHS with rows added from outside
    names = {"method": METHODS, "arch": ARCHS, "data": DATASETS}
    for f in fields(Config):
        if not f.metadata:
            continue
        flag = f"--{f.name.replace('_', '-')}"
        help = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_const", const=[True], help=help)
            continue
        if f.default is not None:
            help += f" (default {f.default})"
        choices = names.get(f.name, f.metadata["choices"])
        words = ",".join(choices) or f.type.__name__.upper()
        parser.add_argument(flag, type=partial(_read, f, choices), metavar=words, help=help)
    return parser


def parse_args(argv=None) -> list:
    """Read the command line (default ``sys.argv[1:]``) into Configs, scalar, resolved and checked:
    one for each element of the product of its comma lists, equal ones once. UserError for what
    cannot be."""
    given = vars(make_parser().parse_intermixed_args(argv))
    given["runs"] = [tuple(given.get("runs", ()))]
    configs = []
    for values in itertools.product(*given.values()):
        chosen = dict(zip(given, values))
        check_settings(Config(**chosen))
        cfg = resolve(chosen)
        for size in (cfg.batch_size, cfg.teacher_batch_size or 0):
            if size % WORLD and cfg.stage != "eval":
                raise UserError(f"batch size {size}: want a multiple of {WORLD} processes")
        if cfg not in configs:
            configs.append(cfg)
    return configs


def check_settings(cfg):
    """UserError, with the flag and the remedy, for given settings that do not go together."""
    if cfg.official and cfg.data not in cfg.row.official_data:
        known = ", ".join(cfg.row.official_data) or "no data set"
        raise UserError(
            f"--official: {cfg.method} has published settings for {known}, not for {cfg.data}"
        )
    if cfg.stage == "teacher" and not cfg.row.teacher:
        raise UserError(f"--stage teacher: {cfg.method} has no teacher")
    if not re.fullmatch(r"(0?\.\d+|1)(,(0?\.\d+|1))*", cfg.milestones):
        raise UserError(
            f"--milestones {cfg.milestones!r}: want shares of the epochs, as in 0.75,0.9"
        )
    if not set(cfg.attacks.split(",")) <= set(ATTACKS):
        raise UserError(f"--attacks {cfg.attacks!r}: want a comma list of {', '.join(ATTACKS)}")
    for flag in ("eps", "step_size", "eval_eps", "eval_step_size"):
        value = getattr(cfg, flag)
        if value and not 0.1 <= value <= 255:
            raise UserError(
                f"--{flag.replace('_', '-')} {value:g}: want 255ths, 0 or from 0.1 to 255"
            )
    if (cfg.mean or cfg.std) and not cfg.checkpoint and not cfg.teacher:
        raise UserError("--mean, --std: go with --checkpoint or --teacher; our own need none")
    if cfg.checkpoint and cfg.stage != "eval":
        raise UserError(f"--checkpoint {cfg.checkpoint}: goes with --stage eval only")
    if cfg.stage == "bench" and cfg.method != "ltsd":
        raise UserError("--stage bench: measures ltsd alone; leave --method out")
    if cfg.runs and cfg.stage != "report":
        raise UserError(f"{cfg.runs[0]}: runs go with --stage report only; lists take commas")


def resolve(wanted) -> Config:
    """The Config of {field: value}. What is not given, or None, has the default of --official, of
    the data set or of its field; 'auto' becomes what this machine has, what the run does not use
    None. UserError for what this machine has not."""
    given = {key: value for key, value in wanted.items() if value is not None}
    cfg = Config(**given)
    values = vars(cfg) | DATASETS[cfg.data]
    if cfg.official:
        values |= cfg.row.official
    values |= given  # from these the next defaults follow
    if cfg.teacher_data == "full":  # Figure 5's other teachers see all of D, as long as a student
        values |= dict(teacher_epochs=values["epochs"], teacher_batch_size=values["batch_size"])
    if values["ir"]:
        values["gamma"] = max(1.0, values["ir"] / 2)
    if cfg.stage != "report":  # which shows runs under their own
        values["eval_eps"] = values["eps"]
    values |= given  # which stand above those, too
    values["official"] = bool(cfg.official and cfg.row.official)
    device = find_device(cfg.device)
    values["device"] = device
    precision = best_precision(torch.device(device))
    if cfg.amp == "auto":
        values["amp"] = precision
    # worth trying on CUDA with Triton, from Volta on
    if cfg.compile == "auto" and (device == "cpu" or not triton or precision == "off"):
        values["compile"] = "off"
    if cfg.amp == "fp16" and device == "cpu":
        raise UserError("--amp fp16: needs a CUDA device; on CPUs choose bf16 or off")
    return Config(**values | dict.fromkeys(unused_settings(cfg)))


def unused_settings(cfg) -> set:
    """Names of the Settings that make no difference to a run: they must not make it another one."""
    unused = METHOD_SETTINGS - set(cfg.row.uses)
    if cfg.data != "folder":
        unused |= {"image_size"}
    if not cfg.row.objective:
        unused |= {"eps", "step_size", "steps"}
    if not cfg.row.teacher:
        unused |= TEACHER_SETTINGS
    elif cfg.teacher:
        unused |= TEACHER_SETTINGS - {"teacher_method"}
    elif cfg.teacher_data == "full":
        unused |= {"gamma"}
    if cfg.role == "teacher":
        unused = (unused | {"test_limit"}) - {"gamma"}
    return unused


def find_device(name) -> str:
    """'cpu' or 'cuda:N' for a --device, under torchrun the rank's own; UserError for what
    PyTorch does not see."""
    known = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    if name == "auto":
        name = known[0]
    if name == "cuda":
        name = "cuda:0"
    if WORLD > 1 and name != "cpu":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name not in known:
        raise UserError(f"--device {name}: PyTorch sees {', '.join(known)} here; choose one")
    return name


def best_precision(device) -> str:
    """What this device multiplies faster than float32: 'bf16', 'fp16' (GPUs before Ampere, there
    for the attack alone) or 'off' (before Volta)."""
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        if generation >= 8:
            return "bf16"
        return "fp16" if generation >= 7 else "off"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)  # CPUs with AMX have it, too
    return "bf16" if supported() else "off"


def tune_process(cfg):
    """Process-wide settings of a run. On Linux CPUs malloc keeps what it has: a network's
    activations would else be given back and faulted in again in every step."""
    torch.backends.cudnn.benchmark = True
    if cfg.compile != "off":  # networks share one forward; by default 8 versions of it are kept
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
        # as in eager mode, where the head's backward is float32
        torch._functorch.config.backward_pass_autocast = "off"
    if cfg.device != "cpu":
        torch.cuda.set_device(cfg.device)
        try_kernel(cfg.device)
    elif sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            libc = ctypes.CDLL(None)
            # M_MMAP_THRESHOLD: no mapping below a GiB; an older glibc takes 32 MiB at the most
            libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: give nothing back


def try_kernel(device):
    """Do without Triton where it cannot build a kernel: it needs a C compiler and Python.h."""
    global triton
    x = torch.zeros(1, device=device)
    try:
        pgd_step(x, x, x, 0.0, 0.0)
    except Exception as error:
        triton = None
        say(f"Triton fails here, plain PyTorch takes the attack's step ({first_line(error)})")


def teacher_config(cfg) -> Config:
    """The run of the teacher that cfg asks for: PGD-AT on D_B, or a baseline on all of D;
    optimiser, attack and augmentation are the student's. Of a --teacher: the file as its
    checkpoint, for which --mean and --std hold."""
    its_own = dict.fromkeys(METHOD_SETTINGS)  # None: not given, so the default
    its_own |= dict(
        # on all of D it is the very run of that baseline; a file is taken to be of such a one
        role="teacher" if cfg.teacher_data == "balanced" else "student",
        stage="train",
        teacher=None,
        checkpoint=cfg.teacher,
        attacks="clean,pgd",  # as Table 6
        official=False,
        method=cfg.teacher_method,
        epochs=cfg.teacher_epochs,
        batch_size=cfg.teacher_batch_size,
    )
    return resolve(vars(cfg) | its_own)


def copy_teacher(cfg, data, path, log):
    """Put the teacher that cfg asks for into the run's folder as teacher.pt: that of --teacher, or
    the last epoch of a run of its own, which is trained now unless it is there. Every run below
    --out that asks for it shares it. UserError where teacher.pt is another than --teacher."""
    its_cfg = teacher_config(cfg)
    file = path / "teacher.pt"
    copied = all(gather(file.exists()))
    if cfg.teacher:
        source = cfg.teacher
    elif copied:
        return
    else:
        work_in_folder(its_cfg, data)
        source = run_path(its_cfg) / "last.pt"
    model, epoch, _ = load_net(its_cfg, data, source)
    if not copied:
        log(f"teacher: a copy of {source}, weights crc32 {weights_crc32(model)}")
        save_model(file, its_cfg, data, model, epoch)
        gather(None)  # it is there before another rank asks for it
    elif weights_crc32(model) != weights_crc32(load_net(its_cfg, data, file)[0]):
        raise UserError(f"{file} differs from {source}: choose another --out")


def run_one(cfg):
    """All that one Config asks for: its teacher, its training, its evaluation."""
    tune_process(cfg)
    cfg = resolve(vars(cfg))  # it is known now whether Triton works
    if RANK > 0:
        gather(None)  # rank 0 fetches and decodes for all
    data = load_data(cfg)
    if RANK == 0:
        gather(None)  # and the others read what it has kept
    work_in_folder(cfg, data)


def work_in_folder(cfg, data):
    """What the stage of a Config asks for, in the run's folder, as far as it is not done yet. data:
    D, from which a teacher's run draws its D_B."""
    if cfg.role == "teacher":
        data = balanced_data(cfg, data)
    path = run_path(cfg)
    with hold_folder(path) as log:
        open_run(cfg, data, path, log)
        if cfg.stage != "eval" and cfg.row.teacher:
            copy_teacher(cfg, data, path, log)
        if cfg.stage not in ("eval", "teacher") and not (path / "last.pt").exists():
            with_fallback(train, cfg, data, path, log)
        if cfg.stage in ("eval", "all"):
            evaluate_run(cfg, data, path, log)
            report([path], cfg, path)


def run_folders(patterns) -> list:
    """Folders that names and globs stand for; a teacher's own run is shown in those that use it."""
    folders = []
    for pattern in patterns:
        found = sorted(glob.glob(f"{pattern}/")) or [pattern]
        folders += [path for path in map(Path, found) if not path.match("*-*-teacher-*-seed*")]
    if not folders:
        raise UserError("name runs, as in --stage report 'runs/*'")
    return folders


def run_stages(configs):
    """What a command line asks for."""
    cfg = configs[0]
    if WORLD > 1 and cfg.stage in ("report", "theory", "bench"):
        raise UserError(f"--stage {cfg.stage}: works in one process; start it without torchrun")
    if cfg.figures:
        with blaming("--figures needs matplotlib: pip install matplotlib", ImportError):
            import matplotlib.figure  # noqa: F401 - said now, not after days
    if cfg.stage == "theory":
        say(theory())
        if cfg.figures:
            save_figure(
                cfg.figures, "figure2.png", "Optimal classifiers", draw_boundaries, [1, 2, 5]
            )
    elif cfg.stage == "bench":
        tune_process(cfg)
        stage_bench(resolve(vars(cfg)))
    else:
        if cfg.stage != "report":
            for one in configs:
                run_one(one)
            cfg = replace(cfg, eval_eps=None)  # each run's own
        folders = [run_path(one) for one in configs]
        if cfg.runs:
            folders = run_folders(cfg.runs)
        several = len(configs) > 1 or cfg.figures
        if cfg.stage == "report" or (several and cfg.stage in ("eval", "all")):
            groups = report(folders, cfg, folders[0].parent)
            if cfg.figures and RANK == 0:
                report_figures(groups, cfg.figures)


def join_group():
    """Become a rank of the group that torchrun started, if it did."""
    global RANK, WORLD
    size = os.environ.get("WORLD_SIZE", "")
    if {"RANK", "LOCAL_RANK"} <= os.environ.keys() and size not in ("", "1"):
        with blaming(
            f"cannot join {size} processes: use torchrun, or unset RANK, LOCAL_RANK, WORLD_SIZE",
            (ValueError, RuntimeError),
        ):
            backend = "gloo"
            device = None
            if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count():
                device = int(os.environ["LOCAL_RANK"])
                torch.cuda.set_device(device)
                backend = "cpu:gloo,cuda:nccl"
            # one rank's share of AutoAttack may end hours after another's
            dist.init_process_group(backend, timeout=timedelta(days=2), device_id=device)
        RANK = dist.get_rank()
        WORLD = dist.get_world_size()


def main(argv=None) -> int:
    """The command line. Returns the exit code: 0, 2 for an error of the user's (one line on
    stderr), 130 for Ctrl-C. Errors of ours are raised."""
    try:
        join_group()
        run_stages(parse_args(argv))
        if WORLD > 1:
            dist.destroy_process_group()
        return 0
    except KeyboardInterrupt:
        code = 130
        text = "stopped; the same command goes on after the last saved epoch"
    except UserError as error:
        code = 2
        text = f"error: {' '.join(str(error).split())}"
    except (MemoryError, torch.OutOfMemoryError) as error:
        code = 2
        text = (
            f"error: out of memory ({first_line(error)}): "
            "try smaller batches, a smaller --gamma or --train-limit"
        )
    rank = f"rank {RANK}: " if WORLD > 1 else ""
    say(f"ltsd: {rank}{text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
