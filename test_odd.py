"""Odd input: to be read as the end of test_ltsd.py."""

import ast
import hashlib
import itertools
import json
import os
import pathlib
import shlex
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import ltsd
from test_ltsd import make_folder, png, write_cifar

# Odd input -------------------------------------------------------------------------------
# Each row: what is odd, and what the one line on stderr must say. WRONG (section 2) has the plain mistakes.

FOLDER = "--data folder --image-size 16 --arch resnet8 --steps 1 --epochs 1 --teacher-epochs 1 --attacks clean,pgd"
FOLDER = (FOLDER + " --device cpu").split()


def refused(capsys, argv, *said):
    """main(argv) ends with code 2 and a single line on stderr that has all of `said`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a warning would be two more lines
        warnings.simplefilter("error", RuntimeWarning)  # PIL's of big images is one
        code = ltsd.main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("ltsd: error: ") and err.count("\n") == 1 and len(err) < 600, err
    assert all(words in err for words in said), err


HUGE = "9" * 400
ODD_ARGUMENTS = [
    ("--seed ''", "--seed '': expected int"),
    ("--seed", "--seed: expected one argument"),
    ("--seed --ir 3", "--seed: expected one argument"),
    ("--seed 1,,2", "--seed '': expected int"),
    ("--seed=-1", "--seed -1: must be at least 0"),
    ("--seed 0x10", "--seed '0x10': expected int"),
    (f"--seed {HUGE}", "must be a finite number below 2**63"),
    (f"--epochs=-{HUGE}", "must be a finite number below 2**63"),
    ("--batch-size 9223372036854775808", "--batch-size 9223372036854775808: must be a finite number below 2**63"),
    ("--batch-size 0", "--batch-size 0: must be at least 1"),
    ("--epochs 1.5", "--epochs '1.5': expected int"),
    ("--epochs 1e3", "--epochs '1e3': expected int"),
    ("--train-limit 0", "--train-limit 0: must be at least 1"),
    ("--test-limit 0", "--test-limit 0: must be at least 1"),
    ("--eval-steps -1", "--eval-steps -1: must be at least 0"),
    ("--ir ,", "--ir '': expected float"),
    ("--ir 10,", "--ir '': expected float"),
    ("--ir 1e400", "--ir inf: must be a finite number"),
    ("--ir=-0", "--ir -0: must be at least 1"),
    ("--ir ½", "--ir '½': expected float"),
    ("--ir '1 0'", "--ir '1 0': expected float"),
    ("--lr 1e30", "--lr 1e+30: must be a finite number"),
    ("--alpha 1,nan", "--alpha nan: must be a finite number"),
    ("--gamma 1e5", "--gamma 100000: must be at most 10000"),
    ("--gamma -1", "--gamma -1: must be at least 0"),
    ("--eval-eps 256", "--eval-eps 256: must be at most 255"),
    ("--method ltsd,", "--method '': choose from"),
    ("--method all,ltsd", "--method 'all': choose from"),
    ("--method LTSD", "--method 'LTSD': choose from"),
    ("--data ''", "--data '': choose from"),
    ("--data 'cifar10\ncifar100'", "--data 'cifar10\\ncifar100': choose from"),
    ("--device ''", "--device '': is empty"),
    ("--device mps", "--device 'mps': choose auto, cpu, cuda or cuda:N"),
    ("--device cuda:x", "--device 'cuda:x'"),
    ("--milestones ''", "--milestones '': is empty"),
    ("--milestones 0.9,0.75", "--milestones '0.9,0.75': want rising shares"),
    ("--milestones 75", "--milestones '75': want rising shares"),
    ("--milestones nan", "--milestones 'nan': want rising shares"),
    ("--attacks 'clean, pgd'", "--attacks 'clean, pgd': a comma list of clean, pgd, aa"),
    ("--attacks clean,,pgd", "--attacks 'clean,,pgd'"),
    ("--out ''", "--out '': is empty"),
    ("--data-dir ''", "--data-dir '': is empty"),
    ("--teacher ''", "--teacher '': is empty"),
    ("--stage eval --checkpoint ''", "--checkpoint '': is empty"),
    ("--checkpoint best.pt --stage distill", "--checkpoint best.pt: goes with --stage eval only"),
    ("--stage eval,report", "--stage 'eval,report': choose from"),
    ("--overwrite yes", "argument 'yes': goes with --stage report only"),
    ("--overwrite=1", "--overwrite"),
    ("--over", "unrecognized arguments: --over"),
    ("cifar10", "argument 'cifar10': goes with"),
    ("@args.txt", "argument '@args.txt': goes with"),
    ("'a\nb'", "argument 'a\\nb': goes with"),
    ("--teacher-method ltsd", "--teacher-method 'ltsd': choose from"),
    ("--official --method natural", "--official: natural has published settings for no data set"),
    ("--official --method ltsd,trades --data tinyimagenet", "--official: trades has published settings for cifar10"),
    ("--official --data folder", "not for folder"),
    ("--data folder --image-size 15", "--image-size 15: must be at least 16"),
    ("--data folder --image-size 513", "--image-size 513: must be at most 512"),
]


@pytest.mark.parametrize("args,said", ODD_ARGUMENTS, ids=[a[:40].replace("\n", " ") for a, _ in ODD_ARGUMENTS])
def test_odd_arguments(args, said, capsys, monkeypatch):
    monkeypatch.setattr(ltsd, "run_one", lambda *a: pytest.fail("let through"))
    refused(capsys, ["--device", "cpu", *shlex.split(args)], said)


RIGHT_ARGUMENTS = [
    ("--seed 3,3", dict(seed=3)),
    ("--ir 10,1e1,10.0", dict(ir=10.0)),
    ("--method ' at-bsl '", dict(method="at-bsl")),
    ("--seed 1 --seed 2", dict(seed=2)),
    ("--eps=-0 --steps 0 --eval-steps 0 --gamma 0 --lr 0", dict(eps=0, steps=0, eval_steps=0, gamma=0, lr=0)),
    ("--milestones 1", dict(milestones="1")),
    ("--attacks aa", dict(attacks="aa")),
    ("--device cpu:0", dict(device="cpu:0")),
    ("--seed 9223372036854775807", dict(seed=2**63 - 1)),
]


@pytest.mark.parametrize("args,want", RIGHT_ARGUMENTS, ids=[a for a, _ in RIGHT_ARGUMENTS])
def test_unusual_but_right_arguments(args, want, monkeypatch):
    seen = []
    monkeypatch.setattr(ltsd, "run_one", lambda cfg, argv: seen.append(cfg))
    assert ltsd.main(["--device", "cpu", *shlex.split(args)]) == 0 and len(seen) == 1
    assert {k: getattr(seen[0], k) for k in want} == want


def image(path, size=(32, 32), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def both(change):
    """The same change of train/ and test/."""
    return lambda root: [change(root / part) for part in ("train", "test")]


def cut_short(path):
    path.write_bytes(image(path).read_bytes()[:700])


def declared_huge(path):
    """A PNG whose header says 30000 x 30000."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b""))


ODD_FOLDERS = [
    ("no such folder", shutil.rmtree, "train does not exist: want DIR/train/CLASS/*"),
    ("a file", lambda r: (shutil.rmtree(r), r.write_text("")), "train does not exist: want DIR/train/CLASS/*"),
    ("train is a file", lambda r: (shutil.rmtree(r / "train"), (r / "train").write_text("")), "train does not exist"),
    ("only val", lambda r: (shutil.rmtree(r / "train"), (r / "test").rename(r / "val")), "train does not exist"),
    ("no test, no val", lambda r: shutil.rmtree(r / "test"), "val does not exist"),
    ("no classes", both(lambda d: [shutil.rmtree(p) for p in d.iterdir()]), "has 0 class folder(s)"),
    ("files for folders", both(lambda d: (shutil.rmtree(d), image(d / "1.png"))), "has 0 class folder(s)"),
    ("class is a file", both(lambda d: (shutil.rmtree(d / "b"), (d / "b").write_text(""))), "has 1 class folder(s)"),
    ("one class hidden", both(lambda d: (d / "b").rename(d / ".b")), "has 1 class folder(s)"),
    ("newline in a class", lambda r: (r / "train" / "b").rename(r / "train" / "b\nc"), "differ: b, b c"),
    ("link to nowhere as class", lambda r: (r / "test" / "c").symlink_to("none"), None),
    ("class in train only", lambda r: image(r / "train" / "z" / "1.png"), "differ: z"),
    ("class in test only", lambda r: image(r / "test" / "y" / "1.png"), "differ: y"),
    ("class of gifs", lambda r: [image(p.with_suffix(".gif")) and p.unlink() for p in (r / "train/b").iterdir()],
     "b holds no image (.jpg .jpeg .png"),
    ("class of hidden files", lambda r: [p.rename(p.parent / ("." + p.name)) for p in (r / "test/a").iterdir()],
     "test/a holds no image"),
    ("truncated jpeg", lambda r: cut_short(r / "train/a/cut.jpg"), "cut.jpg is not a readable image"),
    ("empty png", lambda r: (r / "train/a/void.png").write_bytes(b""), "void.png is not a readable image"),
    ("text", lambda r: (r / "train/a/note.png").write_text("a\nb\n"), "note.png is not a readable image"),
    ("huge header", lambda r: declared_huge(r / "train/a/bomb.png"), "bomb.png is not a readable image"),
    ("float pixels", lambda r: Image.new("F", (20, 20), 0.5).save(r / "train/a/f.tif"), "f.tif", "8 or 16 bits"),
    ("link to nowhere", lambda r: (r / "train/a/gone.png").symlink_to("none.png"), "gone.png: No such file", "check"),
    ("link to itself", lambda r: (r / "train/a/me.png").symlink_to("me.png"), "me.png: Too many levels of symbolic"),
]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="links, names and messages of POSIX")
@pytest.mark.parametrize("row", ODD_FOLDERS, ids=[row[0] for row in ODD_FOLDERS])
def test_odd_folders(row, tmp_path, capsys, monkeypatch):
    _, change, *said = row
    root = make_folder(tmp_path / "d", {"a": 2, "b": 2}, size=16)
    change(root)
    monkeypatch.setattr(ltsd, "stage_teacher", lambda *a: None)
    argv = [*FOLDER, "--stage", "teacher", "--data-dir", str(root), "--out", str(tmp_path / "o")]
    if said == [None]:
        assert ltsd.main(argv) == 0 and not capsys.readouterr().err
    else:
        refused(capsys, argv, *said)


def test_folders_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 2, "b": 2}, size=16)
    argv = [*FOLDER, "--stage", "teacher", "--data-dir", str(root), "--out", str(tmp_path / "o")]
    locked, real = root / "train" / "a" / "0.png", Image.open

    def guarded(name, *a, **kw):
        if str(name) == str(locked):
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, *a, **kw)

    with monkeypatch.context() as m:  # rights would not stop root
        m.setattr(Image, "open", guarded)
        refused(capsys, argv, "0.png is not a readable image", "Permission denied")
    with monkeypatch.context() as m:
        m.setattr(pathlib.Path, "iterdir", lambda self: os.scandir(f"{self}/none"))
        refused(capsys, argv, "train/none: No such file or directory; check this path")
    refused(capsys, [*argv, "--ir", "5", "--overwrite"], "--ir 5: imbalance ratio 5 leaves class 1 empty: at most 2")


def grey(value):
    return (value,) * 3


def odd_images():
    """name -> (image, the RGB colour to expect in the middle)."""
    deep = Image.fromarray(np.full((40, 50), 254 * 256 + 255, np.uint16))
    clear = Image.new("P", (20, 20), 1)
    clear.putpalette([0, 0, 0, 10, 200, 30])
    exif, half = Image.Exif(), Image.new("RGB", (30, 20), (250, 0, 0))
    exif[0x0112] = 6  # "turn by 90 degrees"
    half.paste((0, 0, 250), (0, 0, 30, 10))  # blue above red; turned, their border would be upright
    yield "one.png", Image.new("RGB", (1, 1), (9, 99, 199)), (9, 99, 199)
    yield "strip.png", Image.new("RGB", (1, 60_000), (9, 99, 199)), (9, 99, 199)
    yield "lying.png", Image.new("RGB", (300, 2), (9, 99, 199)), (9, 99, 199)
    yield "deep.png", deep, grey(254)
    yield "deep.tiff", deep, grey(254)
    yield "cmyk.jpg", Image.new("CMYK", (20, 20), (0, 0, 0, 255)), grey(0)
    yield "palette.png", clear, (10, 200, 30)
    yield "clear.png", Image.new("RGBA", (20, 20), (10, 200, 30, 0)), (10, 200, 30)
    yield "la.png", Image.new("LA", (20, 20), (70, 0)), grey(70)
    yield "bits.png", Image.new("1", (20, 20), 1), grey(255)
    yield "UPPER.PNG", Image.new("L", (20, 20), 70), grey(70)
    yield "Ü 猫.webp", Image.new("RGB", (20, 20), (0, 0, 0)), grey(0)
    yield "turned.jpg", half, None, dict(exif=exif)


def test_odd_images_are_read_right(tmp_path, monkeypatch):
    """Transparency and EXIF orientation are ignored; the middle of a strip is what counts."""
    root, colours = make_folder(tmp_path / "Bilder ü", {"猫 1": 1, "b": 30}, size=16), {}
    for name, picture, colour, *options in odd_images():
        options = dict(transparency=1) if name == "palette.png" else options[0] if options else {}
        picture.save(root / "train" / "猫 1" / name, **options)
        colours[name] = colour
    for name in ("notes.txt", ".DS_Store", "._one.png"):
        (root / "train" / "猫 1" / name).write_bytes(b"\x00\x05\x16\x07")
    (root / "train" / ".cache").mkdir()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # the strip is what PIL warns of as too big
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ltsd.load_folder(root, 16)
    assert data.classes == ["b", "猫 1"] and np.bincount(data.train_labels).tolist() == [30, 1 + len(colours)]
    images = dict(zip(sorted([*colours, "0.png"]), data.train_images[30:], strict=True))
    for name, colour in colours.items():
        if colour:
            assert (images[name].flatten(1).T.int() - torch.tensor(colour)).abs().max() <= 2 * name.endswith("jpg"), (
                name
            )
    top, bottom = images["turned.jpg"][:, :6].float().mean((1, 2)), images["turned.jpg"][:, 10:].float().mean((1, 2))
    assert top[2] > 200 and top[0] < 50 and bottom[0] > 200 and bottom[2] < 50


def test_the_centre_square_is_kept(tmp_path):
    root = make_folder(tmp_path / "d", {"a": 1, "b": 1}, size=16)
    pixels = np.zeros((64, 200, 3), np.uint8)
    pixels[:, 68:132] = np.arange(64, dtype=np.uint8)[:, None, None] * 4  # the square: grey levels by row
    Image.fromarray(pixels).save(root / "train" / "a" / "0.png")
    got = ltsd.load_folder(root, 64).train_images[0]
    assert torch.equal(got, torch.arange(0, 256, 4, dtype=torch.uint8)[None, :, None].expand(3, 64, 64))
    half = ltsd.load_folder(root, 32).train_images[0].int()  # a triangle filter over 4 rows, symmetric
    assert (half[0, 1:-1, 2:-2] - (torch.arange(1, 31) * 8 + 2)[:, None]).abs().max() <= 1


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_and_folders_that_cannot_be_written(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "d", {"a": 2, "b": 2}, size=16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = ltsd.load_folder(root, 16)
    assert not (tmp_path / "cache").exists()
    (root / "train" / "b").rename(tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / "0.png").rename(tmp_path / "0.png")
    (root / "train" / "a" / "0.png").symlink_to(tmp_path / "0.png")
    (root / ".ltsd-folder-16.pt").unlink()
    write, tried = ltsd.write_atomic, []

    def read_only(path, content, **kw):
        tried.append(path)
        if path.parent == root:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content, **kw)

    monkeypatch.setattr(ltsd, "write_atomic", read_only)
    linked = ltsd.load_folder(root, 16)
    assert torch.equal(linked.train_images, plain.train_images) and linked.classes == plain.classes
    assert len(tried) == 2 and len(list((tmp_path / "cache" / "ltsd").iterdir())) == 1
    monkeypatch.setattr(ltsd, "_decode_all", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(ltsd.load_folder(root, 16).train_images, plain.train_images)
    monkeypatch.undo()
    # neither there, nor in a home: without a cache
    monkeypatch.setattr(ltsd, "write_atomic", read_only)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", homeless)
    assert torch.equal(ltsd.load_folder(root, 16).train_images, plain.train_images) and len(tried) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "0.png"))  # a file
    assert torch.equal(ltsd.load_folder(root, 16).train_images, plain.train_images)


TINY_ROOT = "tiny-imagenet-200/"
TINY_TRAIN = {f"{TINY_ROOT}train/n{c}/images/n{c}_{i}.JPEG": c for c in (1, 2) for i in (0, 1)}
TINY_VAL = {f"{TINY_ROOT}val/images/val_{i}.JPEG": i for i in (1, 2)}
TINY_ROWS = {f"{TINY_ROOT}val/val_annotations.txt": "val_1.JPEG\tn1\t0\nval_2.JPEG\tn2\t0\n"}


def tiny_zip(path, *parts):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in itertools.chain.from_iterable(part.items() for part in parts):
            grey_image = isinstance(content, int) and png(np.full((64, 64), content, np.uint8))
            archive.writestr(name, grey_image or content)
    return path


def damaged(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content) or content)


def encrypt(content):
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        where = content.find(mark)
        while where >= 0:
            content[where + at] |= 1
            where = content.find(mark, where + 1)


def flip(content):
    content[content.find(b"IDAT") + 8] ^= 255


GOOD = (TINY_TRAIN, TINY_VAL, TINY_ROWS)
NOT_TINY = "tiny-imagenet-200.zip is not the Tiny-ImageNet archive"
ODD_ZIPS = [
    ("empty file", lambda p: p.write_bytes(b""), NOT_TINY, "fetch it again"),
    ("empty zip", tiny_zip, NOT_TINY, "val_annotations.txt"),
    ("no annotations", lambda p: tiny_zip(p, TINY_TRAIN, TINY_VAL), NOT_TINY, "val_annotations.txt"),
    ("binary annotations", lambda p: tiny_zip(p, *GOOD[:2], dict.fromkeys(TINY_ROWS, b"\xff\t\x80")), NOT_TINY),
    ("unknown class", lambda p: tiny_zip(p, *GOOD[:2], dict.fromkeys(TINY_ROWS, "val_1.JPEG\tn3")), NOT_TINY, "n3"),
    ("no training images", lambda p: tiny_zip(p, *GOOD[1:]), NOT_TINY),
    ("no image", lambda p: tiny_zip(p, *GOOD, {TINY_ROOT + "train/n1/images/x.JPEG": "?"}), "x.JPEG is not a readable"),
    ("truncated", lambda p: damaged(tiny_zip(p, *GOOD), lambda c: c[:-300]), NOT_TINY),
    ("flipped bits", lambda p: damaged(tiny_zip(p, *GOOD), flip), NOT_TINY, "CRC-32"),
    ("encrypted", lambda p: damaged(tiny_zip(p, *GOOD), encrypt), NOT_TINY, "encrypted"),
    ("a folder", lambda p: p.mkdir(), "could not fetch tiny-imagenet-200.zip", "by hand"),
    ("missing", lambda p: None, "could not fetch tiny-imagenet-200.zip", "no network here", "--data synthetic"),
]


def no_network(*a, **kw):
    raise OSError("no network here")


@pytest.mark.parametrize("row", ODD_ZIPS, ids=[row[0] for row in ODD_ZIPS])
def test_odd_tinyimagenet_archives(row, tmp_path, capsys, monkeypatch):
    _, make, *said = row
    make(tmp_path / "tiny-imagenet-200.zip")
    monkeypatch.setattr(ltsd, "TINY_MD5", None)  # these have none
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    argv = ["--data", "tinyimagenet", "--data-dir", tmp_path, "--out", tmp_path / "o", "--device", "cpu"]
    refused(capsys, argv, *said)


def test_names_that_climb_out_of_an_archive_are_not_unpacked(tmp_path):
    home = tmp_path / "deep" / "data"
    home.mkdir(parents=True)
    names = ["../evil.png", "/evil.png", f"{TINY_ROOT}train/../../../evil.JPEG", f"{TINY_ROOT}evil.png"]
    tiny_zip(home / "tiny-imagenet-200.zip", *GOOD, dict.fromkeys(names[:2] + names[3:], 3))
    data = ltsd.load_tinyimagenet(home, verify=False)
    assert data.classes == ["n1", "n2"] and data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.train_images.flatten(1).max(1).values.tolist() == [1, 1, 2, 2] and data.test_labels.tolist() == [0, 1]
    assert {p.name for p in home.iterdir()} == {"tiny-imagenet-200.zip", ".ltsd-tiny-imagenet-200.pt"}
    assert not list(tmp_path.rglob("evil*")) and not pathlib.Path("/evil.png").exists()


ODD_CIFAR = [
    ("truncated", lambda p: p.write_bytes(p.read_bytes()[:-2000]), "does not have the published md5"),
    ("empty", lambda p: p.write_bytes(b""), "does not have the published md5"),
    ("a folder", lambda p: (p.unlink(), p.mkdir()), "could not fetch cifar-10-python.tar.gz"),
    ("missing", lambda p: p.unlink(), "could not fetch cifar-10-python.tar.gz", "no network here", "by hand"),
    ("data folder is a file", lambda p: (shutil.rmtree(p.parent), p.parent.write_text("")), "could not fetch", "File"),
]


@pytest.mark.parametrize("row", ODD_CIFAR, ids=[row[0] for row in ODD_CIFAR])
def test_odd_cifar_archives(row, tmp_path, capsys, monkeypatch):
    _, change, *said = row
    (tmp_path / "data").mkdir()
    archive, md5, _ = write_cifar(tmp_path / "data", "cifar10")
    cls = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cls, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    change(archive)
    argv = ["--data", "cifar10", "--data-dir", tmp_path / "data", "--out", tmp_path / "o", "--device", "cpu"]
    refused(capsys, argv, *said)


def scaled(factor):
    return lambda weights: {k: v * factor if v.is_floating_point() else v for k, v in weights.items()}


def recast(dtype):
    return lambda weights: {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}


NO_DICT, NO_FIT = "holds no state_dict: want one", "does not fit the network ("
ODD_CHECKPOINTS = [  # the public loader's table of damaged files (section 4) by way of the command line, and more
    ("a folder", None, "is damaged or no checkpoint", "remove it or name another"),
    ("a tensor", lambda w: torch.zeros(3), NO_DICT),
    ("None", lambda w: None, NO_DICT),
    ("numbered tensors", lambda w: dict(enumerate(w.values())), NO_DICT),
    ("state_dict None", lambda w: dict(state_dict=None, model=3), NO_DICT),
    ("empty", lambda w: {}, NO_FIT),
    ("other arch", lambda w: ltsd.build_model("preactresnet18", 2).state_dict(), NO_FIT, "check --arch"),
    ("other classes", lambda w: ltsd.build_model("resnet8", 3).state_dict(), NO_FIT, "linear.weight", "--data"),
    ("other head", lambda w: ltsd.build_model("resnet8", 2, "cosine").state_dict(), NO_FIT, "linear.bias", "--method"),
    ("integers", recast(torch.int8), NO_FIT, "conv1.weight"),
    ("complex", recast(torch.complex64), NO_FIT, "conv1.weight"),
    ("NaN", scaled(float("nan")), "holds NaN or infinite weights"),
    ("infinite", scaled(float("inf")), "holds NaN or infinite weights"),
]


@pytest.mark.parametrize("flag", ["--checkpoint", "--teacher"])
@pytest.mark.parametrize("row", ODD_CHECKPOINTS, ids=[row[0] for row in ODD_CHECKPOINTS])
def test_odd_checkpoints(row, flag, tmp_path, capsys):
    _, make, *said = row
    root, path = make_folder(tmp_path / "d", {"a": 2, "b": 2}, size=16), tmp_path / "theirs.pt"
    torch.save(make(ltsd.build_model("resnet8", 2).state_dict()), path) if make else path.mkdir()
    stage = "eval" if flag == "--checkpoint" else "teacher"
    argv = [*FOLDER, "--data-dir", root, "--out", tmp_path / "o", "--stage", stage, flag, path]
    refused(capsys, argv, "theirs.pt", *said)
    assert not (tmp_path / "o" / "teacher.pt").exists() and not (tmp_path / "o" / "results.json").exists()


def test_half_precision_weights_load(tmp_path):
    model, path = ltsd.build_model("resnet8", 2), tmp_path / "half.pt"
    torch.save(recast(torch.float16)(model.state_dict()), path)
    fresh = ltsd.build_model("resnet8", 2)
    ltsd.load_weights(fresh, path)
    assert fresh.conv1.weight.dtype == torch.float32 and torch.equal(fresh.conv1.weight, model.conv1.weight.half())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run of the smallest kind: its folder, and the command without --out."""
    base = tmp_path_factory.mktemp("small")
    root = make_folder(base / "d", {"a": 4, "b": 2}, size=16)
    argv = [*FOLDER, "--method", "natural", "--data-dir", str(root)]
    assert ltsd.main([*argv, "--out", str(base / "run")]) == 0
    return base / "run", argv


def rewritten(name, change):
    def rewrite(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return rewrite


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def as_folder(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


CONFIG, RESULTS = ("config.json is damaged", "--overwrite"), ("results.json is damaged", "use --stage eval")
NO_WRITE = ("cannot write", "Is a directory", "check this path", "try another --out")
ODD_RUNS = [
    *((f"config {kind}", replaced("config.json", text), "", CONFIG) for kind, text in (
        ("empty", b""), ("text", b"hello\nworld"), ("binary", b"\xff\xfe"), ("list", b"[1]"), ("null", b"null"),
        ("without identity", b"{}"), ("with an odd identity", b'{"identity": [1]}'))),
    ("config of another version", rewritten("config.json", lambda c: c["identity"].pop("lr")), "",
     ("another configuration (lr None there, 0.1 here)", "--overwrite")),
    ("config a folder", as_folder("config.json"), "", ("config.json: Is a directory", "check")),
    *((f"results {kind}", replaced("results.json", text), "--stage report", RESULTS) for kind, text in (
        ("empty", b""), ("text", b"hello\nworld"), ("binary", b"\xff\xfe"), ("list", b"[1]"), ("null", b"null"),
        ("of lists", b'{"checkpoints": [1]}'))),
    ("results a folder", as_folder("results.json"), "", RESULTS),
    ("results without data", rewritten("results.json", lambda r: r.pop("data")), "--stage report",
     ("holds no such evaluation", "--stage eval")),
    ("results {}", replaced("results.json", b"{}"), "--stage report", ("holds no such evaluation", "--stage eval")),
    ("results gone", lambda f: (f / "results.json").unlink(), "--stage report", ("holds no such evaluation",)),
    ("evaluated otherwise", lambda f: None, "--stage report --eval-eps 3", ("holds no such evaluation",)),
    ("log a folder", as_folder("log.txt"), "", NO_WRITE),
    ("state a folder", as_folder("state.pt"), "--overwrite", NO_WRITE),
    ("best gone", lambda f: (f / "best.pt").unlink(), "", ("best.pt does not exist", "--stage all --overwrite")),
    ("last gone", lambda f: (f / "last.pt").unlink(), "--stage eval", ("last.pt does not", "--stage distill")),
    ("folder is a file", lambda f: (shutil.rmtree(f), f.write_text("")), "", ("cannot write", "File exists): check")),
    ("bench into a file", lambda f: (shutil.rmtree(f), f.write_text("")), "--stage bench", ("run: File exists",)),
    ("under a file", lambda f: (shutil.rmtree(f.parent), f.parent.write_text("")), "", ("Not a directory",)),
    ("link to nowhere", lambda f: (shutil.rmtree(f), f.symlink_to("none")), "", ("cannot write", "check this path",)),
]  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="messages of POSIX")
@pytest.mark.parametrize("row", ODD_RUNS, ids=[row[0] for row in ODD_RUNS])
def test_odd_run_folders(row, small_run, tmp_path, capsys, monkeypatch):
    _, change, flags, said = row
    folder = tmp_path / "parent" / "run"
    shutil.copytree(small_run[0], folder)
    monkeypatch.setattr(ltsd, "train", lambda *a: pytest.fail("trained"))
    change(folder)
    refused(capsys, [*small_run[1], "--out", folder, *flags.split()], *said)


def test_unusual_but_right_run_folders(small_run, tmp_path, capsys):
    finished, argv = small_run
    rows = json.loads((finished / "results.json").read_text())["checkpoints"]
    for i, change in enumerate(
        [
            lambda f: (f / "config.json").unlink(),
            rewritten("config.json", lambda c: c["identity"].update(later=1)),
            replaced("results.json", b"{}"),
            lambda f: (f / "state.pt").unlink(),
            lambda f: (f / "last.pt").unlink(),
        ]
    ):
        folder = tmp_path / f"R\u00fcn {i} \u732b\nx"
        shutil.copytree(finished, folder)
        change(folder)
        assert ltsd.main([*argv, "--out", str(folder)]) == 0 and not capsys.readouterr().err
        assert json.loads((folder / "results.json").read_text())["checkpoints"] == rows


def test_out_of_memory_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    errors = MemoryError("Unable to allocate"), torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB")
    for error in (*errors, RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(ltsd, "load_data", lambda cfg, error=error: (_ for _ in ()).throw(error))
        refused(capsys, [*FOLDER, "--out", tmp_path], "out of memory (", "try smaller batches")
    monkeypatch.setattr(ltsd, "load_data", lambda cfg: [][0])  # a mistake of ours stays one
    assert ltsd.main([*FOLDER, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "ltsd: error: IndexError, unexpected; --debug shows where: list index out of range\n"
    )
    with pytest.raises(IndexError):
        ltsd.main([*FOLDER, "--out", str(tmp_path), "--debug"])


HERE = pathlib.Path(__file__).parent
PLAIN = {
    "TRITON_INTERPRET": "1",
    "LC_ALL": "C",
    "PYTHONCOERCECLOCALE": "0",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
}
QUICK = "--data synthetic --ir 1 --train-limit 60 --test-limit 10 --steps 1 --epochs 1 --batch-size 1 --attacks clean"
QUICK += " --device cpu"
ODD_PLACES = [  # shell, with $L the command up to the method; the environment; exit code, words of stdout
    ("no UTF-8 anywhere", "$P $L --method pgd-at --out $'L\\xe4ufe/猫 \\xff'", PLAIN, 0, "best (epoch"),
    ("all closed", "$P $L --method natural --out run >&- 2>&-", {}, 0, ""),
    ("reader has gone", "set -o pipefail; $P $L --method natural --out run | head -n 1", {}, 141, "run run"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="bash, and names that are no text")
@pytest.mark.parametrize("name,line,env,code,said", ODD_PLACES, ids=[row[0] for row in ODD_PLACES])
def test_odd_places(name, line, env, code, said, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "PYTHONPATH", "PYTHONUNBUFFERED")} | env
    environment |= {"P": sys.executable, "L": f"{HERE / 'ltsd.py'} {QUICK}"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == code and done.stderr == b"", done
    assert said in done.stdout.decode() and (said or not done.stdout)
    assert code or len(list(tmp_path.rglob("results.json"))) == 1


def test_nothing_depends_on_asserts():
    """So that `python -O` runs the same program."""
    tree = ast.parse((HERE / "ltsd.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert) or vars(node).get("id") == "__debug__"]


def sane(folder, classes):
    """The run's rows, after a check that all their numbers are percentages and all weights finite."""
    rows = json.loads((folder / "results.json").read_text())["checkpoints"]
    for name, row in rows.items():
        assert len(row["class_clean"]) == classes
        numbers = [v for k, v in row.items() if k not in ("epoch", "crc32")]
        numbers = np.concatenate([np.atleast_1d(v) for v in numbers]).astype(float)
        assert np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers <= 100).all()
        weights = torch.load(folder / f"{name}.pt", weights_only=True)["state_dict"]
        assert all(v.isfinite().all() for v in weights.values())
    return rows


@pytest.mark.parametrize("method", list(ltsd.METHODS))
def test_every_method_with_two_classes_one_tail_image_and_a_last_batch_of_one(method, tmp_path, capsys):
    root = make_folder(tmp_path / "Ü 猫", {"viele": 5, "eins ß": 1}, size=16, per_class=1)
    flags = ["--method", method, "--batch-size", "5", "--teacher-batch-size", "3", "--reat-tail", "intended"]
    assert ltsd.main([*FOLDER, *flags, "--data-dir", str(root), "--out", str(tmp_path / "o")]) == 0
    assert not capsys.readouterr().err
    rows = sane(tmp_path / "o", 2)
    assert list(rows) == ["teacher", "best", "last"][not ltsd.METHODS[method].teacher :]
    about = json.loads((tmp_path / "o" / "results.json").read_text())["data"]
    assert about["counts"] == [5, 1] and about["tail_classes"] == [1] and about["classes"] == ["viele", "eins ß"]


@pytest.mark.parametrize("teacher", ["at-bsl", "robal", "reat"])
def test_a_thousand_classes(teacher, tmp_path, monkeypatch):
    labels = torch.arange(1000)
    images = torch.randint(0, 256, (1000, 3, 16, 16), dtype=torch.uint8)
    everything = [*labels.tolist(), 0, 0]
    data = ltsd.Data(images[everything], labels[everything], images[:1], labels[:1], [str(c) for c in labels.tolist()])
    monkeypatch.setattr(ltsd, "load_folder", lambda *a: data)
    flags = ["--stage", "teacher", "--teacher-method", teacher, "--teacher-batch-size", "400"]
    assert ltsd.main([*FOLDER, *flags, "--out", str(tmp_path)]) == 0
    weights = torch.load(tmp_path / "teacher.pt", weights_only=True)["state_dict"]
    assert weights["linear.weight"].shape == (1000, 64) and all(v.isfinite().all() for v in weights.values())
    assert "teacher: " + teacher + " on 1000 images, 1 to 1 a class" in (tmp_path / "log.txt").read_text()


def test_a_batch_larger_than_the_set_is_the_whole_set(small_run, tmp_path):
    rows = json.loads((small_run[0] / "results.json").read_text())["checkpoints"]  # batch 128, 6 images
    for size in ("6", str(2**63 - 1)):
        assert ltsd.main([*small_run[1], "--batch-size", size, "--out", str(tmp_path / size)]) == 0
        assert sane(tmp_path / size, 2) == rows


def test_equal_counts_limits_of_one_and_a_radius_of_zero(tmp_path, capsys):
    root = make_folder(tmp_path / "d", {"b": 3, "a": 3, "c": 3}, size=16)
    argv = [*FOLDER, "--method", "at-bsl", "--data-dir", str(root)]
    one = ["--ir", "3", "--train-limit", "9", "--test-limit", "1", "--out", str(tmp_path / "o")]
    assert ltsd.main([*argv, *one, "--eps", "0"]) == 0 and not capsys.readouterr().err
    rows = sane(tmp_path / "o", 3)
    about = json.loads((tmp_path / "o" / "results.json").read_text())["data"]
    assert about["counts"] == [3, 1, 1] and about["classes"] == ["a", "b", "c"] and about["test"] == 3
    assert all(row["clean"] == row["pgd"] for row in rows.values())
    refused(capsys, [*argv, "--ir", "3", "--train-limit", "1", "--out", tmp_path / "p"], "--ir 3", "at most 1")


def test_autoattack_on_two_classes_from_the_command_line(small_run, tmp_path, capsys):
    shutil.copytree(small_run[0], tmp_path / "run")
    flags = ["--stage", "eval", "--eval-eps", "255", "--attacks", "aa", "--out", str(tmp_path / "run")]
    assert ltsd.main([*small_run[1], *flags]) == 0 and not capsys.readouterr().err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["evaluations"]["eps 255 step 2 steps 20"]
    assert list(rows) == ["best", "last"] and all(
        row["aa"] <= 50 and len(row["class_aa"]) == 2 for row in rows.values()
    )


def test_a_class_without_test_images():
    model = ltsd.build_model("resnet8", 4)
    with torch.no_grad():
        model.linear.bias[2] = 1e4  # it always says 2
    images, labels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 0, 2, 2, 2])
    row = ltsd.evaluate(model, images, labels, tail=[1, 3], attacks=("clean",))
    assert row == dict(clean=60.0, class_clean=[0.0, 0.0, 100.0], tail_clean=None, balanced_clean=50.0)
