import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ltsd

# Step


def test_the_reference_step_by_hand():
    """Up; down, whatever the size; held by the ball; held by [0,1], twice; no step without a gradient, twice."""
    x_adv = torch.tensor([0.50, 0.50, 0.53, 0.01, 1.00, 0.51, 0.51])
    grad = torch.tensor([3.0, -1e-30, 1.0, -1.0, math.inf, 0.0, math.nan])
    x = torch.tensor([0.50, 0.50, 0.50, 0.01, 0.99, 0.50, 0.50])
    want = torch.tensor([0.52, 0.48, 0.53, 0.00, 1.00, 0.51, 0.51])
    assert (ltsd.pgd_step_reference(x_adv, grad, x, 0.02, 0.03) - want).abs().max() < 1e-7


KERNEL = """
import itertools, torch, ltsd
def forbidden(*a):
    raise AssertionError("the reference ran, not the kernel")
reference, ltsd.pgd_step_reference = ltsd.pgd_step_reference, forbidden
torch.manual_seed(0)
layouts = (torch.contiguous_format, torch.channels_last)
shapes, types, count = ((1, 3, 5, 7), (2, 3, 19, 21), (0, 3, 8, 8)), (torch.float32, torch.bfloat16, torch.float16), 0
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
    assert "72 kernel cases equal" in run.stdout, run.stderr


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
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4  # 16 bytes each: x_adv and x, two a thread
    assert re.search(r"st\.global\S*\.v4\.b32", ptx) and f".target sm_{arch}" in ptx
    assert low == "fp32" or f"cvt.rn.{low.replace('fp', 'f')}" in ptx  # to nearest even, as PyTorch rounds


def test_the_step_refuses_what_would_pair_wrong_pixels():
    x = torch.rand(2, 3, 4, 4)
    last, low, x_adv = x.contiguous(memory_format=torch.channels_last), torch.empty_like(x).bfloat16(), x.clone()
    odd = [(x.clone(), last, x), (x.clone(), x, last), (x.double(), x, x), (x.clone(), x.long(), x)]
    odd += [(x.clone(), x[:1], x), (x[:, :, ::2],) * 3, (x.clone(), x, x.half()), (x.clone(), x, x, last.bfloat16())]
    for *three, out_low in [(*tensors, None)[:4] for tensors in odd]:
        with pytest.raises(ValueError, match="x_adv|grad|out_low|x has|x is"):
            ltsd.pgd_step(*three, 0.1, 0.1, out_low)
    assert ltsd.pgd_step(x_adv, x, x, 0.1, 0.1, low) is x_adv and torch.equal(low, x_adv.bfloat16())


# Frozen copy


def net_with_history(arch="resnet8"):
    """A network whose norms have weights and statistics that a mistake in folding would not survive."""
    torch.manual_seed(0)
    model = ltsd.build_model(arch, 10)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.uniform_(0.5, 1.5), m.bias.data.normal_(0, 0.3)
            m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
    return model


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
        after, low = model.eval()(x), ltsd.FrozenCopy(model, torch.bfloat16)(x)
        assert (after - want).abs().max() > 0.01 * want.abs().max()
        assert (frozen(x) - after).abs().max() <= 1e-4 * after.abs().max()
    assert low.dtype == torch.float32 and 0 < (low - after).abs().max() <= 0.1 * after.abs().max()
    assert pointers == [t.data_ptr() for t in frozen.state_dict().values()]


def test_a_captured_attack_reads_the_newest_inputs_and_keeps_its_graph(monkeypatch):
    """A double stands in for CUDA graphs: it replays by calling again, but on the captured buffers only."""
    compiled, captured, replayed = set(), [], []

    def capture(fn, buffers):
        captured.append(len(buffers[0]))
        result = fn(*buffers).clone()
        return lambda: (replayed.append(len(result)), result.copy_(fn(*buffers))), result

    monkeypatch.setattr(torch, "compile", lambda net, **_: lambda x: compiled.add(len(x)) or net(x))
    model = net_with_history()
    eager, graphed = ltsd.FrozenCopy(model), ltsd.FrozenCopy(model).speed_up(4, 6)
    graphed.capture = capture
    training = dict(eps=8 / 255, step_size=2 / 255, steps=2, objective=ltsd.kl_objective)
    evaluation = training | dict(steps=3)
    calls = [(training, 4), (training, 4), (evaluation, 4), (evaluation, 6), (training, 4), (training, 3)]
    for number, (threat, n) in enumerate(calls):
        x, y = torch.rand(n, 3, 16, 16), (torch.arange(n) + number) % 10
        threat = threat | dict(aux=F.log_softmax(torch.randn(n, 10), 1))
        draws = [torch.Generator().manual_seed(number) for _ in "ab"]
        want, got = (ltsd.pgd_attack(net, x, y, generator=g, **threat) for net, g in zip((eager, graphed), draws))
        assert torch.equal(got, want) and not torch.equal(got, x), number
        with torch.no_grad():  # the graph has to see refreshed weights too
            model.conv1.weight.mul_(-1)
        eager.refresh(), graphed.refresh()
    assert captured == [4, 4, 6] and replayed == [4, 4, 4, 6, 4] and compiled == {4, 6}


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


def test_degenerate_attacks():
    x, y, threat = torch.rand(4, 1, 8, 8), torch.zeros(4).long(), dict(eps=0.1, step_size=0.05, steps=2, init="none")
    view = x[:, :, 2:6, 2:6]
    dense = ltsd.pgd_attack(Linear(), view.contiguous(), y, **threat)
    assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat), dense) and not torch.equal(dense, view)
    for same in (dict(eps=0, init="uniform"), dict(steps=0), dict(step_size=0)):
        assert torch.equal(ltsd.pgd_attack(Linear(), view, y, **threat | same), view)
    assert ltsd.pgd_attack(Linear(), dense[:0], y[:0], **threat).shape == (0, 1, 4, 4)


# fmt: off
ODD = {
    "pgd": [
        (dict(eps=-1), "eps -1"), (dict(eps=8), "divide by 255"), (dict(step_size=math.nan), "step_size nan"),
        (dict(steps=-1), "steps -1"), (dict(init="normal"), "'normal'"), (dict(x="cat"), "str"), (dict(y=4), "int"),
        (dict(x=torch.rand(4, 16)), "4, 16"), (dict(x=torch.rand(4, 1, 4, 4).double()), "float64"),
        (dict(x=torch.rand(4, 1, 4, 4) * 255), "divide by 255"), (dict(x=torch.full((4, 1, 4, 4), math.nan)), "nan"),
        (dict(y=torch.zeros(3).long()), r"\[3\]"), (dict(y=torch.zeros(4)), "float32"),
    ],
    "autoattack": [
        (dict(eps=8), "eps 8"), (dict(attacks=("pgd",)), "pgd"), (dict(batch_size=0), "counts >= 1"),
        (dict(iterations=0), "counts >= 1"), (dict(y=torch.tensor([0, 1, 2, 1])), r"\[0, 2\]"),
        (dict(y=torch.tensor([-1, 0, 0, 0])), r"\[-1, 0\]"), (dict(x=torch.full((4, 1, 4, 4), 2.0)), "must lie in"),
        (dict(x=torch.zeros(4, 1, 4, 4, dtype=torch.uint8)), "uint8"),
    ],
}
# fmt: on


@pytest.mark.parametrize("attack, number", [(attack, i) for attack, rows in ODD.items() for i in range(len(rows))])
def test_attacks_name_the_odd_input(attack, number):
    change, said = ODD[attack][number]
    given = dict(x=torch.rand(4, 1, 4, 4), y=torch.zeros(4).long(), eps=0.1) | change
    with pytest.raises(ValueError, match=said):
        if attack == "pgd":
            ltsd.pgd_attack(Linear(), **dict(step_size=0.1, steps=1) | given)
        else:
            ltsd.autoattack(Linear(), **given)


def test_an_fp16_attack_keeps_the_sign_of_tiny_gradients():
    """A confident image's gradient, here about 1e-10, is under fp16's least number, 6e-8; scaled, its sign stays."""
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
        assert ltsd.main([*line.split(), "--amp", "off", "--test-limit", "10", "--out", str(out)]) == 0
    model = ltsd.build_model("resnet8", 10)
    ltsd.load_weights(model, out / "last.pt")
    return model.eval(), ltsd.to_float(data.test_images), data.test_labels


@pytest.mark.parametrize("method", ["pgd-at", "trades", "mart", "reat"])  # the others attack as one of these
def test_the_fast_attack_is_as_strong_as_the_plain_one(trained, method):
    (model, x, y), row, counts = trained, ltsd.METHODS[method], torch.linspace(500, 50, 10)
    x = x.contiguous()  # noise is drawn in memory order: one layout, the same start for both
    plain, reached, hits = nn.Sequential(model), {}, {}  # a foreign module: unfolded, float32
    fast = ltsd.FrozenCopy(model, torch.bfloat16 if row.low_precision else torch.float32)
    with torch.no_grad():
        exact, clean = row.aux(plain, x, counts, counts), model(x)
    for name, net in (("plain", plain), ("fast", fast)):
        with torch.no_grad():
            aux, generator = row.aux(net, x, counts, counts), torch.Generator().manual_seed(0)
        threat = dict(eps=8 / 255, step_size=2 / 255, steps=10, objective=row.objective, init=row.init)
        x_adv = ltsd.pgd_attack(net, x, y, aux=aux, generator=generator, **threat)
        with torch.no_grad():
            logits = model(x_adv)
        reached[name], hits[name] = float(row.objective(logits, y, exact)), int((logits.argmax(1) == y).sum())
    assert (clean.argmax(1) == y).sum() > 20 and reached["plain"] > float(row.objective(clean, y, exact)) + 0.1
    assert reached["fast"] >= 0.99 * reached["plain"] and abs(hits["fast"] - hits["plain"]) <= 1


# Losses, each beside an independent float64 evaluation


def log_p(z):
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def kl(p, q, floor=0.0):
    return (np.exp(log_p(p)) * (log_p(p) - np.log(np.exp(log_p(q)) + floor))).sum(1)


def ce(z, y):
    return -log_p(z)[np.arange(len(y)), y]


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


def robal(scores, scores_adv, y, counts, *constants):
    named = dict(zip(("scale", "margin", "tau_b", "tau_m", "beta"), constants))
    return ltsd.robal_loss(scores, scores_adv, y, counts, **named)


# fmt: off
LOSSES = {
    "softmax": (ltsd.balanced_softmax_loss, lambda z, y, n, tau: ce(z + tau * np.log(n), y).mean()),
    "kd": (ltsd.distillation_loss, lambda s, t: kl(t, s).mean()),
    "igdm": (ltsd.igdm_loss, lambda s, s_minus, t, t_minus: kl(t - t_minus, s - s_minus).mean()),
    "trades": (ltsd.trades_loss, lambda z, z_adv, y, beta: (ce(z, y) + beta * kl(z, z_adv)).mean()),
    "mart": (ltsd.mart_loss, lambda z, z_adv, y, beta: np.mean(
        [ce(v, c) - np.log(1.0001 - np.delete(np.exp(log_p(v)), c).max() + 1e-12)
         + beta * kl(u, v, 1e-12) * (1.0000001 - np.exp(-ce(u, c)))
         for u, v, c in zip(z[:, None], z_adv[:, None], y[:, None])])),
    "robal": (robal, lambda s, s_adv, y, n, scale, margin, tau_b, tau_m, beta: (
        ce(scale * s_adv + tau_b * np.log(n / n.sum())
           - (scale * margin + tau_m * np.log(n / n.min())) * np.eye(len(n))[y], y)
        + beta * kl(s, s_adv, 1e-12)).mean()),
    "reat_tail": (ltsd.reat_tail_loss, slow_reat_tail),
    "reat_weights": (ltsd.reat_class_weights, lambda counts, predicted: (lambda w: w * len(w) / w.sum())(
        1 / (np.array([sum((1 - 1 / n) ** k for k in range(a)) for n, a in zip(counts, predicted)]) + 1e-5))),
}
# fmt: on


def loss_cases():
    cases = {name: [] for name in LOSSES}
    for seed, (rows, classes, spread) in enumerate([(8, 10, 2.0), (1, 10, 2.0), (5, 10, 25.0), (6, 2, 1.0)]):
        rng, counts = np.random.default_rng(seed), np.geomspace(90_000, 5, classes).astype(int)
        a, b, c, d = rng.normal(0, spread, (4, rows, classes))
        y, predicted = rng.integers(0, classes, rows), rng.integers(0, 300, classes)
        cases["softmax"] += [(a, y, counts, tau) for tau in (0.5, 1.0)]
        cases["kd"], cases["igdm"] = [*cases["kd"], (a, b)], [*cases["igdm"], (a, b, c, d)]
        for name in ("trades", "mart"):
            cases[name].append((a, b, y, 5.0))
        cases["robal"].append((np.tanh(a), np.tanh(b), y, counts, 10.0, 0.1, 1.5, 0.3, 6.0))
        cases["reat_tail"] += [(d, y, counts, variant) for variant in ("official", "intended")]
        cases["reat_weights"].append((counts, predicted))
    return cases


CASES = loss_cases()


def call(name, arguments, *dtypes):
    """The loss of float arguments that were cast to all these dtypes in turn; none may be changed in place."""
    given = [torch.as_tensor(np.asarray(v)) if isinstance(v, (np.ndarray, list)) else v for v in arguments]
    for dtype in dtypes:
        given = [v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for v in given]
    kept, got = copy.deepcopy(given), LOSSES[name][0](*given)
    assert all(torch.equal(v, k) for v, k in zip(given, kept) if torch.is_tensor(v))
    return got


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_its_independent_evaluation_and_is_float32_for_half_precision(name):
    for arguments in CASES[name]:
        want, got = LOSSES[name][1](*arguments), call(name, arguments)
        assert np.allclose(got.numpy(), want, rtol=1e-9 if got.dtype == torch.float64 else 1e-6)
        assert np.allclose(call(name, arguments, torch.float32).numpy(), want, rtol=3e-4, atol=3e-4)
        for half in (torch.float16, torch.bfloat16):
            assert torch.equal(call(name, arguments, half), call(name, arguments, half, torch.float32))


LN2, LN3 = math.log(2), math.log(3)
# fmt: off
HAND = [
    ("softmax", ([[0.0, 0.0]], [1], [3, 1], 1.0), 2 * LN2),  # p = (3/4, 1/4)
    ("softmax", ([[LN2, LN3], [LN2, LN3]], [0, 1], [4, 1], 1.0), 0.8088683576),
    ("kd", ([[0.0, 0], [1, 2]], [[LN3, 0.0], [1, 2]]), (0.75 * (LN3 - LN2) - 0.25 * LN2) / 2),
    ("igdm", ([[LN2 + LN3, 0]], [[LN2, 0.0]], [[1.0, LN2]], [[1.0, LN2]]), 0.1438410362),  # ln 2 - ln(3)/2
    ("trades", ([[LN2, 0.0, 0.0]], [[0.0, 0.0, LN2]], [0], 6.0), 2.5 * LN2),  # KL((1/2,1/4,1/4), (1/4,1/4,1/2))
    ("mart", ([[LN2, 0.0, 0.0]], [[0.0, 0.0, LN2]], [0], 4.0), 2.4258152213),
    ("robal", ([[0.0, 0.0]], [[LN2, 0.0]], [0], [3.0, 1], 3.0, LN2 / 3, 1.0, 1.0, 6.0), 0.5764926583),
    ("robal", ([[0.0, 0.0]], [[LN2, 0.0]], [1], [3.0, 1], 3.0, LN2 / 3, 1.0, 1.0, 6.0), 4.2451694051),
    ("reat_weights", ([4, 2], [2, 1]), [0.7272747107, 1.2727252893]),  # 1 / 1.75 and 1 / 1
    ("reat_weights", ([2, 1], [2, 0]), [0.0000133332, 1.9999866668]),
    ("reat_tail", ([[0.0, 0], [LN2, 0]], [1, 0], [16, 9], "official"), -0.0030672666),
    ("reat_tail", ([[0.0, 0], [LN2, 0], [LN2, 0]], [1, 1, 0], [16, 9], "intended"), -0.0355524733),
]
# fmt: on


@pytest.mark.parametrize("name, arguments, want", HAND, ids=str)
def test_a_loss_equals_values_worked_by_hand(name, arguments, want):
    assert call(name, arguments).tolist() == pytest.approx(want, abs=1e-7 if name == "reat_weights" else 6e-11)


@pytest.mark.parametrize("name, live", [("trades", 2), ("mart", 2), ("robal", 2), ("igdm", 2), ("kd", 1)])
def test_a_loss_passes_gradcheck(name, live):
    """Also says what has gradient: both sides of TRADES' and MART's KL, never a teacher."""
    given = [torch.as_tensor(v) if isinstance(v, np.ndarray) else v for v in CASES[name][0]]
    inputs = [t.requires_grad_() for t in given if torch.is_tensor(t) and t.is_floating_point()]
    assert torch.autograd.gradcheck(lambda *ts: LOSSES[name][0](*ts, *given[live:]), inputs[:live])
    gradients = torch.autograd.grad(LOSSES[name][0](*given), inputs, allow_unused=True)
    assert [g is not None for g in gradients] == [i < live for i in range(len(inputs))]


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


def test_degenerate_losses_are_cross_entropy_and_counts_of_another_length_refused():
    z, other, y, counts = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.arange(6) % 4, [5, 3, 2, 1]
    got = [ltsd.balanced_softmax_loss(z, y, [7, 7, 7, 7]), ltsd.balanced_softmax_loss(z, y, counts, tau=0)]
    got += [ltsd.trades_loss(z, other, y, beta=0), robal(other, z, y, counts, 1.0, 0.0, 0.0, 0.0, 0.0)]
    got += [ltsd.weighted_objective(z, y, torch.ones(4).double())]
    assert torch.allclose(torch.stack(got), F.cross_entropy(z, y))
    assert ltsd.reat_tail_loss(z, torch.zeros(6).long(), counts) == 0 == ltsd.igdm_loss(z, other, z, other)
    for odd, refused in itertools.product(([5, 3], [5, 3, 2, 1, 1], [counts]), (ltsd.balanced_softmax_loss, robal)):
        with pytest.raises(ValueError, match="one count for each of 4 classes"):
            refused(z, *[other] * (refused is robal), y, odd, *[1.0] * 5 * (refused is robal))


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
        for name, now in model.state_dict().items():  # also says that the buffers are as they were
            assert torch.allclose(now, before[name] + steps[name], rtol=1e-4, atol=1e-6), name
    assert restored()
    for objective in (loss, lambda: failing(model(x))):
        with pytest.raises(RuntimeError, match="inside"), ltsd.awp_perturbation(model, objective, 0.01):
            failing()
        assert restored()
    for objective, gamma in ((lambda: loss() * math.nan, 0.01), (lambda: loss() * math.inf, 0.01), (failing, 0.0)):
        with ltsd.awp_perturbation(model, objective, gamma):
            assert restored()


def expected_rows(b, net):
    """Objective, init and loss of every row of METHODS in terms of the public losses; net: its train-mode forward."""
    clean, adv, minus, plain = net(b.x), net(b.x_adv), 2 * b.x - b.x_adv, ltsd.cross_entropy_objective
    balanced, fit = ltsd.balanced_softmax_loss(adv, b.y, b.counts, b.cfg.tau), F.cross_entropy(adv, b.y)
    distilled = ltsd.igdm_loss(adv, net(minus), b.teacher(b.x_adv), b.teacher(minus))
    tail = ltsd.reat_tail_loss(net(b.x_adv, with_features=True)[1], b.y, b.counts)
    return {
        "natural": (None, "gauss", fit),
        "pgd-at": (plain, "uniform", fit),
        "trades": (ltsd.kl_objective, "gauss", ltsd.trades_loss(clean, adv, b.y, b.cfg.beta)),
        "mart": (plain, "gauss", ltsd.mart_loss(clean, adv, b.y, b.cfg.beta)),
        "awp": (plain, "uniform", fit),
        "robal": (plain, "gauss", robal(clean, adv, b.y, b.counts, 10.0, 0.1, 1.5, 0.3, b.cfg.beta)),
        "reat": (ltsd.weighted_objective, "uniform", balanced + tail),
        "at-bsl": (plain, "gauss", balanced),
        "ltsd": (plain, "gauss", balanced + b.alpha * distilled),
    }


@pytest.mark.parametrize("method", ltsd.METHODS)
def test_a_row_of_methods_minimises_its_loss_and_names_its_attack(method):
    row = ltsd.METHODS[method]
    torch.manual_seed(1)
    model, teacher = ltsd.build_model("resnet8", 10, row.head).train(), ltsd.FrozenCopy(net_with_history())
    x, y, counts = torch.rand(6, 3, 16, 16), torch.tensor([0, 3, 8, 9, 9, 1]), torch.linspace(90, 9, 10)
    x_adv, cfg = (x + 0.1 * torch.randn_like(x)).clamp(0, 1), ltsd.Config(method=method, beta=5.0, tau=0.7)
    batch = ltsd.Batch(model, x, x_adv, y, counts, cfg, 7.0, teacher)
    (loss, logits), (objective, init, want) = row.loss(batch), expected_rows(batch, model)[method]
    assert torch.allclose(loss, want, rtol=1e-5) and torch.equal(logits, model(x_adv)) and loss.requires_grad
    assert (row.objective, row.init, row.teacher) == (objective, init, method == "ltsd")
    assert row.low_precision == (method != "trades")
    if row.teacher:
        batch.cfg = dataclasses.replace(cfg, kd="kl")
        want = ltsd.balanced_softmax_loss(logits, y, counts, 0.7) + 7 * ltsd.distillation_loss(logits, teacher(x_adv))
        assert torch.allclose(row.loss(batch)[0], want, rtol=1e-5)


OFFICIAL = [
    ("pgd-at", "cifar100", 200, 128, 0.1, 5e-4, 6.0, (100, 150)),
    ("awp", "cifar10", 200, 128, 0.1, 5e-4, 6.0, (100, 150)),
    ("trades", "cifar10", 76, 128, 0.1, 2e-4, 6.0, (74,)),
    ("mart", "cifar10", 120, 128, 0.01, 3.5e-3, 5.0, (74, 89, 99)),
    ("robal", "cifar100", 80, 64, 0.1, 2e-4, 6.0, (60, 75)),
    ("reat", "cifar10", 80, 128, 0.1, 5e-4, 6.0, (60, 75)),
    ("at-bsl", "tinyimagenet", 100, 128, 0.1, 5e-4, 6.0, (74, 89, 99)),
    ("ltsd", "cifar100", 100, 128, 0.1, 5e-4, 6.0, (75, 90)),
]


@pytest.mark.parametrize("method, data, epochs, batch, lr, decay, beta, drops", OFFICIAL)
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


@functools.cache
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


def robust(net, x, y):
    return net(x).argmax(1) == y


PAR = [("apgd-ce", 256, 4), ("apgd-t", 128, 1), ("fab-t", 96, 1), ("square", 128, 4), ("all", 64, 1)]


@pytest.mark.parametrize("attack, points, apart", PAR)
def test_autoattack_is_on_a_par_with_the_official_package(attack, points, apart):
    """In few iterations, where a difference shows; apart: by how many points the official one differs among seeds."""
    foreign, official, (x, y) = blob_net(), pytest.importorskip("pyautoattack"), blobs(points, seed=7)
    names = list(ltsd.AUTOATTACK) if attack == "all" else [attack]
    ours = ltsd.autoattack(foreign, x, y, eps=14 / 255, attacks=names, iterations=8, queries=400)
    theirs = official.AutoAttack(foreign, attacks=names, eps=14 / 255, version="custom", seed=0)
    theirs.apgd.n_restarts = theirs.fab.n_restarts = 1
    theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = 8
    theirs.square.n_queries = 400
    reference, _ = theirs.run_standard_evaluation(x, y, batch_size=len(x))
    ours, theirs = (int(robust(foreign, images, y).sum()) for images in (ours, reference))
    assert abs(ours - theirs) <= apart and 0.2 * points < theirs < 0.8 * points


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
    room, low, high = torch.where(direction > 0, 1 - t, t), torch.zeros(40, 1).double(), torch.ones(40, 1).double()
    for _ in range(100):
        middle = (low + high) / 2
        short = (w.abs() * torch.minimum(middle, room)).sum(1, keepdim=True) < gap.abs()[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    want = direction * torch.minimum(high, room)
    assert (ltsd.project_linf(t, w, gap) - want).abs().max() < 1e-12
    assert (ltsd.project_linf(t.float(), w.float(), gap.float()) - want).abs().max() < 1e-4


@pytest.mark.parametrize("names", [("apgd-ce",), ("apgd-t",), ("fab-t",), ("square",), ltsd.AUTOATTACK], ids="+".join)
def test_results_depend_neither_on_the_batch_size_nor_on_the_order(names):
    (x, y), net, order = blobs(24), copy.deepcopy(blob_net()).double(), torch.arange(24).flip(0)
    x, options = x.double(), dict(eps=14 / 255, attacks=names, iterations=10, queries=40)
    want = ltsd.autoattack(net, x, y, **options)
    others = [ltsd.autoattack(net, x, y, batch_size=size, **options) for size in (5, 16)]
    others.append(ltsd.autoattack(net, x[order], y[order], index=order, **options)[order])
    assert want.dtype == torch.float64 and 0 < robust(net, want, y).sum() < 24
    assert all((other - want).abs().max() < 1e-9 for other in others)
    for change in (dict(seed=1), dict(index=order)) if names == ("square",) else ():  # nothing but draws
        assert not torch.equal(ltsd.autoattack(net, x, y, **options | change), want)


@pytest.mark.parametrize("which", ["foreign", "own"])
def test_fooled_images_fool_and_the_rest_are_unchanged(which, trained):
    net, x, y = (blob_net(), *blobs(40)) if which == "foreign" else trained
    lines, state, calls = [], {}, []
    x_adv = ltsd.autoattack(net, x, y, log=lines.append, state=state, **QUICK)
    kept = robust(net, x_adv, y)
    assert torch.equal(x_adv[kept], x[kept]) and 0 < kept.sum() < robust(net, x, y).sum()
    assert (x_adv - x).abs().max() <= QUICK["eps"] + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert [line.split()[0] for line in lines] == ["clean", *ltsd.AUTOATTACK]
    shares = [float(line.split(" %")[0].split()[-1]) for line in lines]
    assert shares == sorted(shares, reverse=True) and abs(shares[-1] - 100 * kept.double().mean()) < 0.006
    counting = nn.Sequential(net)
    counting.register_forward_hook(lambda *_: calls.append(1))
    assert list(state) == list(ltsd.AUTOATTACK)  # a second call with the state attacks no more
    assert torch.equal(ltsd.autoattack(counting, x, y, state=state, **QUICK), x_adv) and len(calls) <= 4


def test_a_network_that_only_steers_decides_nothing():
    foreign, (x, y), names, state = blob_net(), blobs(40), ("apgd-ce", "apgd-t"), {}
    want = robust(foreign, ltsd.autoattack(foreign, x, y, attacks=names, **QUICK), y)
    coarse = copy.deepcopy(foreign).bfloat16()
    nets = (lambda z: coarse(z.bfloat16()).float(), foreign)
    low = ltsd.autoattack(foreign, x, y, attacks=names, nets=nets, **QUICK)
    assert (robust(foreign, low, y) != want).sum() <= 1
    lying = (lambda z: -foreign(z), foreign)  # claims that everything is fooled, and climbs the wrong way
    lied = ltsd.autoattack(foreign, x, y, attacks=names, nets=lying, state=state, **QUICK)
    counted, clean = sum(len(found["rows"]) for found in state.values()), robust(foreign, x, y)
    assert counted == (clean & ~robust(foreign, lied, y)).sum() < (clean & ~want).sum()


def test_degenerate_sets_of_points():
    foreign, (x, y) = blob_net(), blobs(12)
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


WARN = {
    "randomised": lambda net, x: net(x) + 0.5 * torch.randn(len(x), 10),
    "softmax": lambda net, x: net(x).softmax(1),
    "zero input gradient": lambda net, x: net((x * 8).round() / 8),
    "Square fooled": lambda net, x: net((x * 32).round() / 32),
}


@pytest.mark.filterwarnings("ignore:autoattack")
@pytest.mark.parametrize("said", WARN)
def test_models_that_mislead_are_warned_of(said):
    (x, y), options = blobs(24), dict(eps=0.2, iterations=5, queries=100, attacks=("apgd-ce", "square"))
    net, wrapped = blob_net(), nn.Identity()
    wrapped.forward = lambda x: WARN[said](net, x)
    with pytest.warns(UserWarning, match=said):
        ltsd.autoattack(wrapped, x, y, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ltsd.autoattack(net, x, y, **options)


# Bench


def test_the_bench_writes_its_schema(tmp_path, monkeypatch, capsys):
    core = ltsd.bench_core
    monkeypatch.setitem(ltsd.ARCHS, "resnet18", ltsd.ARCHS["resnet8"])
    monkeypatch.setattr(ltsd, "bench_core", lambda cfg, batch, steps, rounds: core(cfg, batch // 16, steps, 1))
    assert ltsd.main(["--stage", "bench", "--device", "cpu", "--amp", "off", "--out", str(tmp_path)]) == 0
    result, said = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert {"header", "attack", "train_step", "kernel", "matmul_share"} <= set(result) and "x plain" in said
    assert result["header"]["amp"] == "off" and result["kernel"] == [] and result["matmul_share"] > 0
    for part, rows in itertools.product(("attack", "train_step"), (slice(0, 2), slice(2, 4))):
        plain, ours = result[part][rows]
        assert plain["lever"] == "plain" and plain["ratio"] == 1 and ours["batch"] == plain["batch"]
        assert ours["ratio"] == pytest.approx(ours["images_per_s"] / plain["images_per_s"])


def test_the_benchs_step_is_the_very_step_of_training(monkeypatch):
    """train's own optimiser step and nets, on images attacked with the newest weights: so says its second step."""
    outer, attack, taken = ltsd.outer_step, ltsd.pgd_attack, []

    def spy(row, batch, model, optimizer):
        taken.append((row, batch, copy.deepcopy(model)))
        return outer(row, batch, model, optimizer)

    def timed(variants, *_):
        return [variants.get("all levers", int)() for _ in "ab"] and dict.fromkeys(variants, 1.0)

    monkeypatch.setitem(ltsd.ARCHS, "resnet18", ltsd.ARCHS["resnet8"])
    monkeypatch.setattr(ltsd, "outer_step", spy)
    monkeypatch.setattr(ltsd, "timed", timed)
    monkeypatch.setattr(ltsd, "pgd_attack", lambda *args, **kw: attack(*args, **kw | dict(init="none")))
    ltsd.bench_core(ltsd.resolve(ltsd.parse_args(["--device", "cpu", "--amp", "off"])), 8, 2, 1)
    (_, _, first), (row, batch, second) = taken
    threat = dict(eps=8 / 255, step_size=2 / 255, steps=2, init="none")
    want, stale = (attack(ltsd.FrozenCopy(net), batch.x, batch.y, **threat) for net in (second, first))
    assert row is ltsd.METHODS["ltsd"] and batch.alpha == 40 and len(batch.teacher(batch.x)) == 8
    assert torch.equal(batch.x_adv, want) and not torch.equal(batch.x_adv, stale)
