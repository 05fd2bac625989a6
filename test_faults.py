"""What can happen to a run overnight: kills, signals, full disks, a second process, damaged files, dead networks."""

import contextlib
import errno
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

import ltsd
from test_ltsd import HERE, TINY, finished, make_folder, same_run  # noqa: F401

KILLS = int(os.environ.get("LTSD_KILLS", "5"))  # of every method; more by hand
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")

# A process that has imported ltsd once and forks a run for every line [argv, seconds an fsync takes, file size limit].
NURSERY = """
import json, os, resource, signal, sys, time
import ltsd
real, data = os.fsync, ltsd.make_synthetic()
ltsd.make_synthetic = lambda: data
for line in sys.stdin:
    argv, slow, limit, output = json.loads(line)
    pid = os.fork()
    if not pid:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.fsync = lambda fd: (time.sleep(slow), real(fd))
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(ltsd.main(argv))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    def __init__(self, folder):
        self.errors = folder / "stderr"
        command = [sys.executable, "-c", NURSERY]
        self.process = subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, argv, slow=0.0, limit=0):
        """Start a run in a process of its own; returns its pid."""
        print(json.dumps([argv, slow, limit, str(self.errors)]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def end(self):
        """(exit code, negative for a signal; stderr) of the run that was started."""
        return int(self.process.stdout.readline()), self.errors.read_text()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.process.kill()
    made.process.wait()


def until(condition, pid=None):
    """Poll until the condition holds; False if it did not within two minutes or the process has ended before."""
    for _ in range(240_000):
        if condition():
            return True
        time.sleep(0.0005)
    return False


def log_of(out):
    return (out / "log.txt").read_text() if (out / "log.txt").exists() else ""


def rows_of(out):
    return re.findall(r"^(?:teacher|student) +\d+/\d+", log_of(out), re.M)


# Kills -----------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("method", ["ltsd", "reat", "awp"])
def test_killed_again_and_again_a_run_ends_bit_identical(method, nursery, tmp_path):
    """SIGKILL within an epoch, while a checkpoint is being written and right after an epoch's row, in turn."""
    length = ["--teacher-epochs", "2", "--epochs", str(max(3, KILLS - 1)), "--aug", "ra"]
    args, dice = [*TINY, "--method", method, *length], random.Random(method)
    assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 0
    out, kinds, left_behind = tmp_path / "b", [], 0
    for number in range(KILLS):
        kind, seen = ("epoch", "write", "row")[number % 3], len(rows_of(out))
        last = len(rows_of(tmp_path / "a")) <= seen + 1
        begun = len(re.findall(" images, ", log_of(out)))
        pid = nursery.start([*args, "--out", str(out)], slow=0.2 if kind == "write" else 0.0)
        if kind == "row" and not last:
            assert until(lambda seen=seen: len(rows_of(out)) > seen)
        elif kind == "write":
            assert until(lambda: [p for p in out.glob("*.pt.tmp*") if p.stat().st_size])
        else:
            assert until(lambda begun=begun: len(re.findall(" images, ", log_of(out))) > begun)
            time.sleep(dice.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert nursery.end()[0] in ([-signal.SIGKILL, 0] if last else [-signal.SIGKILL])
        kinds.append(kind)
        left_behind += len(list(out.glob("*.tmp*")))
        assert len(list(out.glob("*.tmp*"))) <= 1
    assert left_behind and len(kinds) == KILLS
    assert ltsd.main([*args, "--out", str(out)]) == 0
    same_run(tmp_path / "a", out, *(["teacher"] if method == "ltsd" else []), "best", "last")
    assert not list(out.glob("*.tmp*")) and len(rows_of(out)) == len(set(rows_of(out)))


def test_a_row_that_a_kill_has_lost_or_torn_is_written_again(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dying(self, line, quiet=False, real=ltsd.Run.log):
        if line.startswith("student    2"):
            os.write(self.file.fileno(), line[:20].encode())
            raise Killed
        real(self, line, quiet)

    with monkeypatch.context() as m:
        m.setattr(ltsd.Run, "log", dying)
        with pytest.raises(Killed):
            ltsd.main([*TINY, "--out", str(tmp_path / "b")])
    assert ltsd.main([*TINY, "--out", str(tmp_path / "b")]) == 0
    same_run(finished, tmp_path / "b")


# Signals ---------------------------------------------------------------------------------


def signalling(monkeypatch, owner, name, calls, *numbers):
    """Let this process get the signals in the given calls of owner.name (counted from 1), after the call itself."""
    real, count = getattr(owner, name), [0]

    def noisy(*args, **kw):
        result = real(*args, **kw)
        count[0] += 1
        if count[0] in calls:
            for number in numbers:
                os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(owner, name, noisy)


@posix
@pytest.mark.parametrize("method,aug", [("ltsd", "none"), ("awp", "ra")])
def test_stopped_after_every_single_step_a_run_ends_bit_identical(method, aug, finished, tmp_path, capsys, monkeypatch):
    args, out, codes = [*TINY, "--method", method, "--aug", aug], tmp_path / "b", []
    one = finished if (method, aug) == ("ltsd", "none") else tmp_path / "a"
    assert ltsd.main([*args, "--out", str(one)]) == 0
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    capsys.readouterr()
    while not codes or codes[-1]:
        number = (signal.SIGTERM, signal.SIGINT)[len(codes) % 2]
        with monkeypatch.context() as m:
            signalling(m, ltsd.Watch, "add", [1], number)
            codes.append(ltsd.main([*args, "--out", str(out)]))
        err = capsys.readouterr().err
        if codes[-1]:
            assert codes[-1] == 128 + number and err.count("\n") == 1 and len(codes) < 30
            assert re.fullmatch(
                rf"ltsd: stopped by {number.name} after \w+, epoch \d, step \d; the same .* goes on\n", err
            )
    # a step a call: 2 teacher epochs of 1 step, 3 student epochs of 3 steps
    assert len(codes) == (12 if method == "ltsd" else 10) and not list(out.glob("*.tmp*"))
    same_run(one, out, *(["teacher"] if method == "ltsd" else []), "best", "last")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


OUTSIDE = [
    ("load_teacher", 1, "TERM"),
    ("evaluate", 1, "TERM"),  # of the epoch that may become the best
    ("evaluate", 3, "INT"),  # of the finished run
]


@posix
@pytest.mark.parametrize("name,call,which", OUTSIDE)
def test_outside_a_training_step_a_signal_ends_the_run_at_once(
    name, call, which, finished, tmp_path, capsys, monkeypatch
):
    number, out = getattr(signal, f"SIG{which}"), tmp_path / "b"
    with monkeypatch.context() as m:
        signalling(m, ltsd, name, [call], number)
        assert ltsd.main([*TINY, "--out", str(out)]) == 128 + number
    said = capsys.readouterr()
    assert said.err == f"ltsd: stopped by SIG{which}; the same command goes on\n"
    before = rows_of(out)
    if name == "evaluate":  # no trained step is lost, though the epoch was not finished
        state = torch.load(out / "state.pt", weights_only=True)
        assert (state["epoch"], state["middle"].get("step", 0)) == ((2, 3) if call == 1 else (3, 0))
    with monkeypatch.context() as m:
        signalling(m, ltsd.Watch, "add", range(1, 100), signal.SIGCONT)  # counts nothing, disturbs nothing
        assert ltsd.main([*TINY, "--out", str(out)]) == 0
    assert rows_of(out)[: len(before)] == before
    same_run(finished, out)


@posix
def test_a_second_signal_ends_the_run_within_the_step(finished, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as m:
        signalling(m, ltsd.Watch, "add", [4], signal.SIGINT, signal.SIGINT)
        assert ltsd.main([*TINY, "--out", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "ltsd: stopped by SIGINT; the same command goes on\n"
    state = torch.load(tmp_path / "b" / "state.pt", weights_only=True)
    assert state["phase"] == "teacher" and not state["middle"]  # nothing of the epoch that was under way
    assert ltsd.main([*TINY, "--out", str(tmp_path / "b")]) == 0
    same_run(finished, tmp_path / "b")


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_process_that_is_asked_to_end(number, finished, nursery, tmp_path):
    out, number = tmp_path / "b", getattr(signal, number)
    pid = nursery.start([*TINY, "--out", str(out)], slow=0.2)
    assert until(lambda: "student    1/3" in rows_of(out))
    os.kill(pid, number)
    code, err = nursery.end()
    assert code == 128 + number and re.fullmatch(rf"ltsd: stopped by {number.name}.*; the same command goes on\n", err)
    assert ltsd.main([*TINY, "--out", str(out)]) == 0
    same_run(finished, out)


@posix
def test_a_signal_stops_the_whole_list(tmp_path, monkeypatch):
    signalling(monkeypatch, ltsd.Watch, "add", [1], signal.SIGTERM)
    assert ltsd.main([*TINY, "--method", "at-bsl", "--seed", "0,1", "--out", str(tmp_path)]) == 143
    assert len(list(tmp_path.iterdir())) == 1


@posix
def test_ignored_signals_stay_ignored_and_other_threads_have_none(tmp_path, monkeypatch):
    args = [*TINY, "--method", "at-bsl", "--stage", "distill", "--epochs", "1"]
    signalling(monkeypatch, ltsd.Watch, "add", [1], signal.SIGHUP)
    kept = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 0
    finally:
        signal.signal(signal.SIGHUP, kept)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(ltsd.main([*args, "--out", str(tmp_path / "b")])))
    monkeypatch.undo()
    thread.start()
    thread.join()
    assert codes == [0]


# Full disks ------------------------------------------------------------------------------

FULL = [("state.pt", 4), ("best.pt", 1), ("results.json", 1), ("config.json", 1), ("log.txt", "student    2")]


@pytest.mark.parametrize("name,time_", FULL)
def test_a_full_disk_is_named_and_costs_no_epoch(name, time_, finished, tmp_path, capsys, monkeypatch):
    out, args, count = tmp_path / "b", [*TINY, "--out", str(tmp_path / "b")], [0]
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync, write = os.fsync, os.write

    def full_fsync(fd):
        count[0] += [p.name.startswith(name) for p in out.glob("*.tmp*")] == [True]
        if count[0] == time_:
            raise no_space
        fsync(fd)

    def full_write(fd, data):
        if data.startswith(str(time_).encode()):
            write(fd, data[:10])  # a part still fits
            raise no_space
        return write(fd, data)

    with monkeypatch.context() as m:
        m.setattr(os, "write", full_write) if name == "log.txt" else m.setattr(os, "fsync", full_fsync)
        assert ltsd.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"ltsd: error: cannot write {out / name} (No space left on device): free some space and repeat"
    )
    assert err.count("\n") == 1 and not list(out.glob("*.tmp*"))
    before = rows_of(out)
    assert ltsd.main(args) == 0 and rows_of(out)[: len(before)] == before
    same_run(finished, out)


@posix
def test_a_write_that_the_system_cuts_short_is_named(finished, nursery, tmp_path):
    """No mock: the kernel refuses what goes beyond a file size between those of a log and of a checkpoint."""
    out, args = tmp_path / "b", [*TINY, "--out", str(tmp_path / "b")]
    assert ltsd.main([*args, "--stage", "teacher"]) == 0
    shutil.copy(out / "state.pt", tmp_path / "state.pt")
    nursery.start(args, limit=100_000)
    code, err = nursery.end()
    assert code == 2 and err.count("\n") == 1 and f"cannot write {out / 'state.pt'} (File too large)" in err
    assert (out / "state.pt").read_bytes() == (tmp_path / "state.pt").read_bytes()
    assert ltsd.main(args) == 0
    same_run(finished, out)


# One process a folder --------------------------------------------------------------------


@posix
def test_a_second_process_in_the_same_folder_is_refused(finished, nursery, tmp_path, capsys):
    out, args = tmp_path / "b", [*TINY, "--out", str(tmp_path / "b")]
    pid = nursery.start(args, slow=0.3)
    assert until(lambda: rows_of(out))
    for more in ([], ["--overwrite"], ["--stage", "eval"]):
        assert ltsd.main([*args, *more]) == 2
        err = capsys.readouterr().err
        assert err == f"ltsd: error: {out} is in use by process {pid}: wait for it, or choose another --out\n"
    assert nursery.end() == (0, "")
    assert ltsd.main(args) == 0
    same_run(finished, out)


def test_a_folder_is_free_again_when_its_run_has_ended(finished, tmp_path, capsys, monkeypatch):
    out = tmp_path / "b"
    shutil.copytree(finished, out)
    args = [*TINY, "--out", str(out)]
    cfg = ltsd.resolve(ltsd.parse_args(args))
    holder = ltsd.Run(cfg)
    holder.begin([])
    assert ltsd.main(args) == 2 and f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert ltsd.main([*args, "--stage", "report"]) == 0  # reads only
    assert ltsd.main([*args, "--stage", "report", "--overwrite"]) == 0 and (out / "best.pt").exists()
    assert f"in use by process {os.getpid()}" not in capsys.readouterr().err
    assert ltsd.main(args) == 2 and f"in use by process {os.getpid()}:" in capsys.readouterr().err
    holder.file.close()
    assert ltsd.main(args) == ltsd.main(args) == 0
    monkeypatch.setattr(ltsd, "carry_out", lambda *a: 1 / 0)
    assert ltsd.main(args) == ltsd.main(args) == 1  # not 2, though the first has failed
    with pytest.raises(ZeroDivisionError) as caught:  # whose traceback keeps its frames alive
        ltsd.main([*args, "--debug"])
    monkeypatch.undo()
    assert caught and ltsd.main(args) == 0
    assert ltsd.main([*args, "--lr", "0.3"]) == 2 and ltsd.main(args) == 0


@posix
def test_drives_without_locks_and_windows(tmp_path, monkeypatch):
    import fcntl

    cfg, taken = ltsd.resolve(ltsd.parse_args([*TINY, "--out", str(tmp_path)])), []

    def refuse(*a):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as m:
        m.setattr(fcntl, "flock", refuse)
        ltsd.Run(cfg).file.close()

    def locking(fd, mode, size):
        if taken:
            raise PermissionError(errno.EACCES, "Permission denied")
        taken.append((os.lseek(fd, 0, os.SEEK_CUR), mode, size))

    with monkeypatch.context() as m:
        m.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
        m.setattr(sys, "platform", "win32")
        first = ltsd.Run(cfg)
        first.begin([])
        with pytest.raises(ltsd.UserError, match=f"in use by process {os.getpid()}:"):
            ltsd.Run(cfg)
    first.file.close()
    assert taken == [(1 << 30, 2, 1)] and log_of(tmp_path).count("\nargv") == 1


# Damaged files ---------------------------------------------------------------------------

EVAL = ["--stage", "eval"]
FILES = {  # name -> (files to remove before, further arguments)
    "state.pt": (["last.pt"], []),
    "teacher.pt": (["last.pt", "state.pt"], []),
    "best.pt": (["results.json"], EVAL),
    "last.pt": (["results.json"], EVAL),
    "aa.pt": (["results.json"], [*EVAL, "--attacks", "aa"]),
    "theirs.pt": (["results.json"], [*EVAL, "--checkpoint"]),
    "given.pt": (["teacher.pt", "last.pt"], ["--teacher"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(name, finished, tmp_path, capsys, recwarn):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    removed, more = FILES[name]
    more = [*more, str(tmp_path / "b" / name)] if more and more[-1].startswith("--") else more
    whole = (finished / "last.pt").read_bytes()
    torch.save({**torch.load(finished / "state.pt", weights_only=True), "x": Evil()}, tmp_path / "evil.pt")
    evil = (tmp_path / "evil.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", evil, pickle.dumps({"state_dict": Evil()})):
        shutil.copytree(finished, tmp_path / "b")
        for other in removed:
            (tmp_path / "b" / other).unlink()
        (tmp_path / "b" / name).write_bytes(content)
        assert ltsd.main([*TINY, *more, "--out", str(tmp_path / "b")]) == 2
        err = capsys.readouterr().err
        assert (
            err.count("\n") == 1 and not recwarn.list and f"{tmp_path / 'b' / name} is damaged or no checkpoint" in err
        )
        assert not (tmp_path / "executed").exists()
        assert (tmp_path / "b" / name).read_bytes() == content
        shutil.rmtree(tmp_path / "b")


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "executed",)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "d", {"a": 3, "b": 2})
    images = ltsd.load_folder(root, 32).train_images
    (cache,) = root.glob(".ltsd-*.pt")
    whole = cache.read_bytes()
    torch.save({**torch.load(cache, weights_only=True), "x": Evil()}, tmp_path / "evil.pt")
    for content in (whole[:500], b"", b"hello", (tmp_path / "evil.pt").read_bytes(), pickle.dumps(Evil())):
        cache.write_bytes(content)
        assert torch.equal(ltsd.load_folder(root, 32).train_images, images)
        assert len(torch.load(cache, weights_only=True)) > 5 and not (tmp_path / "executed").exists()

    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache.unlink()
    monkeypatch.setattr(os, "fsync", full)  # no room for a cache is no reason to stop
    assert torch.equal(ltsd.load_folder(root, 32).train_images, images) and not cache.exists()


def without(key):
    return lambda state: state.pop(key)


def other_momentum(state):
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2, 2)


STATES = {
    **{f"no {k}": without(k) for k in ("fingerprint", "phase", "epoch", "model", "optimizer", "scaler", "generators")},
    **{f"no {k}": without(k) for k in ("indices", "best", "seconds", "predicted", "dull", "row", "middle")},
    "other arch": lambda s: s.update(model=ltsd.build_model("preactresnet18", 10).state_dict()),
    "other classes": lambda s: s.update(model=ltsd.build_model("resnet8", 11).state_dict()),
    "other momentum": other_momentum,
    "other optimiser": lambda s: s["optimizer"]["param_groups"].append({"params": []}),
    "other counts": lambda s: s.update(predicted=torch.zeros(3)),
    "other indices": lambda s: s.update(indices=torch.zeros(3, dtype=torch.int64)),
    "other generator": lambda s: s["generators"].update(noise=torch.zeros(16, dtype=torch.uint8)),
}


def test_a_state_that_lacks_or_misfits_something_is_refused(finished, tmp_path, capsys):
    out = tmp_path / "b"
    shutil.copytree(finished, out)
    (out / "last.pt").unlink()
    for name, spoil in STATES.items():
        state = torch.load(finished / "state.pt", weights_only=True)
        spoil(state)
        torch.save(state, out / "state.pt")
        assert ltsd.main([*TINY, "--out", str(out)]) == 2, name
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and re.search(rf"{out / 'state.pt'} (is no training state|does not fit)", err), name
    shutil.copy(finished / "state.pt", out / "state.pt")
    assert ltsd.main([*TINY, "--out", str(out)]) == 0
    same_run(finished, out)


# Numbers ---------------------------------------------------------------------------------


def with_objective(monkeypatch, spoiled):
    """at-bsl whose attack's objective has no gradient in the training steps for which spoiled(step number) holds."""
    row, count = ltsd.METHODS["at-bsl"], [0]
    real_attack = ltsd.pgd_attack

    def attack(*a, objective=None, **kw):
        count[0] += objective is not None
        return real_attack(*a, objective=objective, **kw)

    def objective(logits, y, aux):
        return row.objective(logits, y, aux) * (0 if spoiled(count[0]) else 1)

    monkeypatch.setattr(ltsd, "pgd_attack", attack)
    monkeypatch.setitem(ltsd.METHODS, "at-bsl", ltsd.replace(row, objective=objective))


def test_an_attack_without_any_gradient_stops_the_run(tmp_path, capsys, monkeypatch):
    args = [*TINY, "--method", "at-bsl", "--stage", "distill"]
    with monkeypatch.context() as m:
        with_objective(m, lambda step: step > 3)
        assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "gradient was zero for every image (student, epoch 2, step 3)" in err
    assert torch.load(tmp_path / "a" / "state.pt", weights_only=True)["epoch"] == 1
    with monkeypatch.context() as m:  # after 50 steps it is noticed within an epoch
        with_objective(m, lambda step: True)
        assert ltsd.main([*args, "--ir", "1", "--batch-size", "1", "--out", str(tmp_path / "b")]) == 2
        assert "(student, epoch 1, step 50)" in capsys.readouterr().err
    with_objective(monkeypatch, lambda step: step % 3 == 1)  # single batches of very sure images are no fault
    assert ltsd.main([*args, "--out", str(tmp_path / "c")]) == 0


@pytest.mark.parametrize("harmless", ["--eps", "--steps", "--step-size"])
def test_an_attack_that_is_not_meant_to_move_is_no_fault(harmless, tmp_path):
    args = [*TINY, "--method", "at-bsl", "--epochs", "1", harmless, "0"]
    assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 0


def watch_of(correct, predicted, counts):
    phase = ltsd.Phase("student", "at-bsl", 4, 8, torch.arange(sum(counts)), counts, True)
    watch = ltsd.Watch("cpu", phase, 1, 1, {})
    watch.total += torch.tensor([0.0, correct, sum(predicted), 0, 0])
    watch.predicted += torch.tensor(predicted)
    watch.step = 1
    return watch


def test_chance_is_what_guesses_of_these_frequencies_would_hit():
    tail = [900, 80, 20]
    assert watch_of(900, [1000, 0, 0], tail).at_chance()  # always the head: 90 % right, and nothing learnt
    assert not watch_of(960, [920, 60, 20], tail).at_chance()
    even = [100, 100, 100]
    assert not watch_of(1, [2, 2, 2], [2, 2, 2]).at_chance()  # 6 images tell nothing
    assert watch_of(105, [100, 100, 100], even).at_chance() and watch_of(20, [100, 100, 100], even).at_chance()
    assert not watch_of(150, [100, 100, 100], even).at_chance()
    deviation = math.sqrt(300 * 1 / 3 * 2 / 3)
    for sigmas, verdict in ((1.9, True), (2.1, False)):
        assert watch_of(100 + sigmas * deviation, [100, 100, 100], even).at_chance() == verdict


def test_a_run_that_only_guesses_is_warned_once(tmp_path, capsys):
    args = [*TINY, "--method", "at-bsl", "--stage", "distill", "--epochs", "5", "--lr", "0"]
    args[args.index("--train-limit") + 1] = "400"
    assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 0
    (warned,) = (line for line in capsys.readouterr().out.split("\n") if "warning" in line)
    assert warned == "warning: student has only guessed up to epoch 2, its first quarter: try a lower --lr"
    assert re.search(r"^student +2/5 .*\nwarning: .*\nstudent +3/5", log_of(tmp_path / "a"), re.M)


def test_a_run_that_learns_is_not_warned(tmp_path, capsys):
    args = "--data synthetic --method at-bsl --epochs 2 --steps 2 --test-limit 20 --device cpu --stage distill".split()
    assert ltsd.main([*args, "--out", str(tmp_path / "a")]) == 0
    assert "warning" not in capsys.readouterr().out


def test_deterministic_gives_the_same_weights_twice(tmp_path):
    args = [*TINY, "--method", "reat", "--stage", "distill", "--epochs", "2", "--deterministic"]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        for name in ("a", "b"):
            assert ltsd.main([*args, "--out", str(tmp_path / name)]) == 0
            assert torch.are_deterministic_algorithms_enabled()
            torch.manual_seed(1)  # the weights hang on no global generator
            torch.rand(10)
        assert ltsd.main([*args, "--seed", "1", "--out", str(tmp_path / "c")]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        with contextlib.suppress(TypeError):
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    a, b, c = (torch.load(tmp_path / d / "last.pt", weights_only=True)["state_dict"] for d in "abc")
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])
