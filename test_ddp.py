"""Tests of several processes under torchrun: two gloo ranks on the CPU beside one process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn as nn

import ltsd

HERE = pathlib.Path(__file__).parent
TINY = "--data synthetic --ir 3 --train-limit 60 --test-limit 20 --steps 2 --teacher-epochs 2 --epochs 3"
TINY = (TINY + " --batch-size 16 --teacher-batch-size 64 --device cpu").split()

# Runs `main`, with small evaluations that both ranks have a part in; leaves its process id beside itself; checks that
# the ranks end a training with the same network, that no forward copies rank 0's statistics, and that rank 1 leaves
# no file but AutoAttack's state. MODE fixed: no batch statistics; lame: rank 1 has no data.
DRIVER = """
import os, pathlib, sys
import torch
import ltsd

rank, mode, train = int(os.environ["RANK"]), os.environ["MODE"], ltsd.train
pathlib.Path(__file__).with_name(f"pid{rank}").write_text(str(os.getpid()))

def checked(*args):
    model = train(*args)
    first, *others = ltsd.gather(dict(model.state_dict()))
    assert len(others) == 1
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)
    return model

class DDP(torch.nn.parallel.DistributedDataParallel):
    def forward(self, *args, **kwargs):
        assert not self.will_sync_module_buffers()
        return super().forward(*args, **kwargs)

def lame(cfg):
    raise ltsd.UserError("nothing to load")

def replace(source, target, real=os.replace):
    assert rank == 0 or pathlib.Path(target).name == "aa1.pt"
    real(source, target)

os.replace, ltsd.train, torch.nn.parallel.DistributedDataParallel = replace, checked, DDP
ltsd.evaluate.__kwdefaults__["batch_size"] = 6
ltsd.autoattack.__kwdefaults__ |= dict(iterations=4, queries=20, targets=2)
if mode == "fixed":
    ltsd.Net.train = lambda self, mode=True: torch.nn.Module.train(self, False)
    ltsd.reat_tail_loss = lambda features, *rest: 0 * features.sum()
if mode == "lame" and rank == 1:
    ltsd.load_data = lame
sys.exit(ltsd.main(sys.argv[1:]))
"""


@pytest.fixture
def driver(tmp_path):
    path = tmp_path / "driver.py"
    path.write_text(DRIVER)
    return path


def torchrun(script, args, mode=""):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "MODE": mode}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, args)], cwd=HERE, env=environment, **pipes)


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True


def test_two_ranks_take_the_steps_of_one_process(driver, tmp_path, monkeypatch):
    """One epoch in student batches of 5, shared 3 to 2, and teacher batches of 29 and 1: one rank has none. With batch
    norm in eval mode, and without REAT's tail term, only the order of float32 sums differs. The weights then agree
    to 1e-7; but where rounding decides the sign of a gradient a pixel moves otherwise, and weights by up to 1e-5 (seen
    over six seeds). Start noise of another row makes 1e-4 or more, a wrong gradient weight or AWP step 2e-3 or more.
    """
    args = "--data synthetic --ir 3 --train-limit 60 --test-limit 20 --epochs 1 --teacher-epochs 1 --milestones 1"
    args += " --batch-size 5 --teacher-batch-size 29 --lr 0.02 --steps 2 --step-size 0.5 --amp off --device cpu"
    args = f"{args} --method ltsd,awp,reat --attacks clean".split()
    process = torchrun(driver, [*args, "--out", tmp_path / "two"], "fixed")
    monkeypatch.setattr(ltsd.Net, "train", lambda self, mode=True: nn.Module.train(self, False))
    monkeypatch.setattr(ltsd, "reat_tail_loss", lambda features, *rest: 0 * features.sum())
    assert ltsd.main([*args, "--out", str(tmp_path / "one")]) == 0
    _, err = process.communicate()
    assert process.returncode == 0, err
    folders = sorted(p.name for p in (tmp_path / "one").iterdir() if p.is_dir())
    assert len(folders) == 3 and folders == sorted(p.name for p in (tmp_path / "two").iterdir() if p.is_dir())
    for folder in folders:
        pair = [tmp_path / n / folder for n in ("one", "two")]
        for name in ("teacher", "best", "last") if "-ltsd-" in folder else ("best", "last"):
            a, b = (torch.load(p / f"{name}.pt", weights_only=True)["state_dict"] for p in pair)
            assert list(a) == list(b)
            apart = {key: float((a[key] - b[key]).abs().max()) for key in a}
            assert max(apart.values()) < 5e-5, (folder, name, apart)
        a, b = (torch.load(p / "state.pt", weights_only=True) for p in pair)
        assert all(torch.equal(a["generators"][key], b["generators"][key]) for key in a["generators"])
        assert b["predicted"].sum() == 33 and (a["predicted"] - b["predicted"]).abs().sum() <= 2
        a, b = ([line.split() for line in (p / "log.txt").read_text().split("\n") if " lr " in line] for p in pair)
        assert len(a) == len(b) == (2 if "-ltsd-" in folder else 1)
        for mine, theirs in zip(a, b, strict=True):  # loss, accuracy: one image of 33 may tip over
            assert abs(float(mine[5]) - float(theirs[5])) < 2e-4 and abs(float(mine[7]) - float(theirs[7])) < 3.1


def test_a_killed_rank_ends_all_and_the_run_goes_on(driver, tmp_path, monkeypatch):
    """Only rank 0 writes and prints; what two ranks evaluate, AutoAttack included, one process finds too."""
    out, args = (
        tmp_path / "run",
        [*TINY, "--train-limit", "300", "--epochs", "4", "--eps", "3", "--attacks", "clean,pgd,aa"],
    )
    process, deadline = torchrun(driver, [*args, "--out", out]), time.monotonic() + 120
    while "student    1/4" not in (out / "log.txt").read_text() if (out / "log.txt").exists() else True:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(60) != 0 and all(map(gone, pids))

    process = torchrun(driver, [*args, "--out", out])
    printed, err = process.communicate()
    assert process.returncode == 0, err
    assert "RANK" not in err and "Warning" not in err
    log = (out / "log.txt").read_text()
    assert log.count("student: going on after epoch") == 1 and log.count("device 2 x cpu") == 2
    rows = [line.split()[1] for line in log.split("\n") if " lr " in line]
    assert rows == ["1/2", "2/2", *(f"{epoch}/4" for epoch in range(1, 5))]
    assert printed.count("student    4/4") == printed.count("audit") / 3 == 1
    names = {p.name for p in out.iterdir() if ".tmp" not in p.name}  # a killed process leaves its temporary file
    assert names == {*ltsd.Run.FILES, "log.txt", "report.md"}

    (out / "results.json").rename(tmp_path / "two.json")
    monkeypatch.setitem(ltsd.evaluate.__kwdefaults__, "batch_size", 6)
    for name, value in dict(iterations=4, queries=20, targets=2).items():
        monkeypatch.setitem(ltsd.autoattack.__kwdefaults__, name, value)
    assert ltsd.main([*args, "--out", str(out), "--stage", "eval"]) == 0
    one, two = (json.loads(p.read_text())["checkpoints"] for p in (out / "results.json", tmp_path / "two.json"))
    assert one == two and one["best"]["clean"] > one["best"]["aa"] > 0


def test_one_line_for_what_befalls_all_ranks(tmp_path):
    process = torchrun(HERE / "ltsd.py", [*TINY, "--sync-bn", "--out", tmp_path / "run"])
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and out == "" and not (tmp_path / "run").exists()
    said = [line for line in err.split("\n") if line.startswith("ltsd: error")]
    assert said == [
        "ltsd: error: --sync-bn: needs several GPUs; start with torchrun --nproc-per-node N, or leave it out"
    ]


def test_an_error_of_one_rank_is_told_and_ends_the_others(driver, tmp_path):
    process = torchrun(driver, [*TINY, "--out", tmp_path / "run"], "lame")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("ltsd: error: rank 1: nothing to load\n") == 1
    assert err.count("ltsd: error") == 1 and gone(int((tmp_path / "pid0").read_text()))


def test_settings_that_depend_on_the_number_of_processes(tmp_path, capsys, monkeypatch):
    assert ltsd.main([*TINY, "--sync-bn", "--out", str(tmp_path / "run")]) == 2
    assert "--sync-bn: needs several GPUs" in capsys.readouterr().err
    ltsd.resolve(ltsd.parse_args([*TINY, "--sync-bn", "--stage", "eval"]))  # one process may score what several made
    monkeypatch.setattr(ltsd, "WORLD", 2)
    for stage in ("bench", "report", "theory"):
        assert ltsd.main([*TINY, "--stage", stage]) == 2
        assert f"--stage {stage}: works in one process" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ltsd.UserError, match="--device cuda:1: PyTorch sees 0"):
        ltsd.resolve(ltsd.parse_args([*TINY, "--device", "cuda"]))


def test_shares_make_up_the_batch(monkeypatch):
    assert ltsd.share(5) == (slice(0, 5, 1), 1.0)
    monkeypatch.setattr(ltsd, "WORLD", 4)
    for n in range(1, 10):
        values, mean, seen = torch.rand(n, dtype=torch.float64), 0.0, []
        for rank in range(4):
            monkeypatch.setattr(ltsd, "RANK", rank)
            rows, weight = ltsd.share(n)
            assert len(values[rows])
            mean += weight * values[rows].mean() / 4
            seen += torch.arange(n)[rows].tolist() if weight else []
        assert sorted(seen) == list(range(n)) and abs(mean - values.mean()) < 1e-12


def test_synchronised_norms_are_folded_too():
    torch.manual_seed(0)
    model = ltsd.build_model("preactresnet18", 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    keys, x = list(model.state_dict()), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = ltsd.FrozenCopy(model)(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        frozen = ltsd.FrozenCopy(converted)
        assert list(converted.state_dict()) == keys and torch.equal(frozen(x), expected)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in frozen.net.modules())


def test_ranks_evaluate_the_batches_of_one_process(monkeypatch):
    """PGD's images and noise, AutoAttack's points and their numbers: two ranks together have those of one process."""
    torch.manual_seed(0)
    model, images = ltsd.build_model("resnet8", 10), torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    seen, real = [], ltsd.pgd_attack

    def pgd(net, x, y, **threat):
        seen.append(("pgd", y.tolist(), real(net, x, y, **threat).tolist()))
        return x

    def aa(net, x, y, *, index, **options):
        seen.extend(("aa", *row) for row in zip(index.tolist(), y.tolist(), x.tolist(), strict=True))
        return 0 * x  # all black: each of them gets the same verdict

    monkeypatch.setattr(ltsd, "pgd_attack", pgd)
    monkeypatch.setattr(ltsd, "autoattack", aa)
    with torch.no_grad():
        y = model.eval()(ltsd.to_float(images)).argmax(1)  # right by definition: clean 100 %

    def evaluate():
        seen.clear()
        result = ltsd.evaluate(model, images, y, attacks=("clean", "pgd", "aa"), batch_size=4, steps=1)
        return result, list(seen)

    whole, one = evaluate()
    flags, both = [], []
    monkeypatch.setattr(ltsd, "WORLD", 2)
    monkeypatch.setattr(ltsd, "gather", lambda mine: flags.append(mine) or [mine])
    for rank in (0, 1):
        monkeypatch.setattr(ltsd, "RANK", rank)
        result, part = evaluate()
        assert 0 < result["clean"] < whole["clean"] == 100 and 0 < len(part) < len(one)
        both += part
    assert sorted(both) == sorted(one)
    first = iter(flags[:3])  # of rank 0, as rank 1 would get them
    monkeypatch.setattr(ltsd, "gather", lambda mine: [next(first), mine])
    assert evaluate()[0] == whole
