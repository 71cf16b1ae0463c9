"""Tracklets, clips and batches for video person re-identification.

What the five paper scripts share on the way from files to batches: five public data sets, your own
folder and a synthetic set; clips, (B, T, 3, H, W), uint8; augmentation, samplers.

    python data.py --check --data mars --root DIR                          # decode every frame
    python data.py --synthetic DIR --identities 64 --cameras 4 --seed 0    # draw a synthetic set
"""
import argparse
import bisect
import codecs
import collections
import colorsys
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class UserError(Exception):
    """Something the user can mend; a script prints it as one line and exits with code 2."""

    def __init__(self, message):
        text = str(message).strip()
        if re.match(r"Caught \w+ in .*\nOriginal Traceback", text):  # from a DataLoader's worker
            text = text.rsplit("\n", 1)[-1].removeprefix("data.UserError: ")
        super().__init__(printable(text))


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def printable(text):
    """The text in one line without control characters, which are written as escapes: the name of a
    file can neither begin a new line nor send commands, such as a colour, to the terminal."""
    return "".join(character if character.isprintable()
                   else character.encode("unicode_escape").decode() for character in str(text))


def first_line(error):
    """What an exception says, in one line of at most 160 characters."""
    return printable(" ".join(str(error).split()))[:160] or type(error).__name__


def progress(items=None, what="", total=None, *, unit, hidden=False, **bar):
    """How far long work is: tqdm's bar where somebody looks at a terminal, and elsewhere, in the
    log of a cluster or of nohup, a line about once a minute.

    It is used as tqdm's bar is: `for item in progress(items, ...)`, or `update` in a `with`.
    items: what is worked through, None for `update`; what: the work; total: the number of items,
    where `len` does not say it; unit: the name of an item, with a space before it; hidden: True in
    processes that are not the first; bar: further options of tqdm's bar.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(items, what, total, unit=unit, disable=hidden, **bar)
    return ProgressLines(items, what, len(items) if total is None else total, unit)


class ProgressLines:
    """Prints a line about once a minute: how far the work is, and how long the rest will take when
    it goes on as fast as so far. See `progress`."""

    def __init__(self, items, what, total, unit):
        self.items = items
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = self.printed = monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for item in self.items:
            yield item
            self.update()

    def update(self, count=1):
        """Counts items that are done."""
        self.done += count
        now = monotonic()
        if now - self.printed >= 60 and 0 < self.done < self.total:
            self.printed = now
            left = (now - self.start) * (self.total - self.done) / self.done
            print(f"{self.what}: {self.done:,} of {self.total:,}{self.unit}, "
                  f"{tqdm.format_interval(now - self.start)} gone, "
                  f"about {tqdm.format_interval(left)} left", flush=True)

    def set_postfix(self, **_):
        """What tqdm's bar shows beside it, the loss, stands in the line of each epoch."""


def last_line(error):
    """The last line of what an exception says, where torch tells the reason behind pages of advice,
    without the codes that colour a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[-1].startswith("Check the documentation"):
        lines.pop()
    return first_line(lines[-1] if lines else type(error).__name__)


@contextlib.contextmanager
def replacing(path):
    """A file to write, which takes the place of `path` when it is whole and on disk."""
    aside = Path(f"{path}.tmp")
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:  # Ctrl-C, too, leaves no half file behind
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        why = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(why, OSError):  # torch makes a RuntimeError of a full disk
            raise
        whole = "; the previous one is still whole" if os.path.exists(path) else ""
        raise UserError(f"{path}: cannot be written ({first_line(why)}){whole}") from None


def locked(path, text="", wait=False):
    """An open file with this text, which no other process gets before this one closes it or ends;
    wait: for another one that has it, which otherwise is a UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        try:
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{path.parent}: another run is writing there") from None
        except (ImportError, OSError):  # Windows, or a file system without locks
            pass
        file.truncate(0)
        print(text, file=file, flush=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    return file


def save_rows(rows, path):
    """Dicts as a CSV file, with the keys of the first as its head; no rows, no file."""
    if rows:
        with replacing(path) as file:
            text = codecs.getwriter("utf-8")(file, "surrogateescape")  # names may be no text
            csv.writer(text).writerows([rows[0], *(row.values() for row in rows)])


def _numpy_scalar(module):
    """What torch.load calls for the NumPy number in a file that says numpy.core (before NumPy 2) or
    numpy._core: it reads numbers alone, never an object."""
    def scalar(dtype, content):
        return np.frombuffer(content, dtype)[0]
    scalar.__module__ = module
    scalar.__qualname__ = scalar.__name__
    return scalar


NUMPY_NUMBERS = [np.dtype, *map(_numpy_scalar, ("numpy.core.multiarray", "numpy._core.multiarray")),
                 *(type(np.dtype(kind)) for kind in "fdeilqhbIBQH?")]


def load_file(path):
    """A dict that torch.save wrote, as a zip file or in the older form, on the CPU.

    NumPy's numbers may be in it, beside the weights; nothing in the file is executed. The checksums
    of a zip file are compared, which torch.load alone does not do.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not start.startswith((b"PK", b"\x80")):  # a zip file, or a pickle as torch wrote before
            raise ValueError(f"torch.save writes no file that begins with {start!r}")
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()
        state = {}
        if not damaged:
            with torch.serialization.safe_globals(NUMPY_NUMBERS):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path or '(an empty name)'}: no such file") from None
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({last_line(error)})") from None
    if damaged:
        raise UserError(f"{path}: is damaged, the checksum of its entry {damaged} does not fit")
    return state if isinstance(state, dict) else {}


# ---------------------------------------------------------------------------------------- data sets

class Tracklet(NamedTuple):
    """The frames of one person under one camera, in temporal order."""
    frames: tuple  # paths of the frames
    pid: int       # identity; in `train` a label 0..n-1; in the gallery 0 is a distractor
    cam: int       # camera


class Dataset(NamedTuple):
    """A data set: lists of `Tracklet`. Labels of `train` are 0..n-1 in the order of the pids."""
    name: str
    train: list
    query: list
    gallery: list

    @property
    def num_identities(self):
        """Number of training identities, the classes of the classifier."""
        return 1 + max((t.pid for t in self.train), default=-1)

    def ids(self):
        """(query pids, query cameras, gallery pids, gallery cameras), arrays."""
        return [np.array([getattr(t, key) for t in part])
                for part in (self.query, self.gallery) for key in ("pid", "cam")]

    def has_a_match(self):
        """Whether any query can be ranked: another camera must have seen the same identity."""
        cameras = collections.defaultdict(set)
        for t in self.gallery:
            cameras[t.pid].add(t.cam)
        return any(cameras[query.pid] - {query.cam} for query in self.query)

    def summary(self):
        """A table of the three subsets, ready to print."""
        lines = [f"{self.name:8} identities  tracklets  cameras     frames"
                 "   per tracklet: min   mean  max"]
        for subset, tracklets in zip(self._fields[1:], self[1:]):
            if not tracklets:
                lines.append(f"  {subset:7}         -")
                continue
            lengths = [len(t.frames) for t in tracklets]
            # a pid of 0 is a label in `train` and the distractors elsewhere
            pids = {t.pid for t in tracklets if t.pid > 0 or subset == "train"}
            cams = {t.cam for t in tracklets}
            lines.append(f"  {subset:7}{len(pids):10,}{len(tracklets):11,}{len(cams):9}"
                         f"{sum(lengths):11,}{min(lengths):20}"
                         f"{sum(lengths) / len(lengths):7.1f}{max(lengths):5}")
        cameras = collections.Counter(pid for pid, _ in {(t.pid, t.cam) for t in self.train})
        if single := [*cameras.values()].count(1):
            lines.append(f"  {single:,} training identities are seen by one camera only")
        own = {t.frames[0] for t in self.query} & {t.frames[0] for t in self.gallery}
        distractors = sum(t.pid == 0 for t in self.gallery)
        lines.append(f"  the gallery holds {len(own):,} of the query tracklets and {distractors:,} "
                     "distractors; a query's own camera is left out of its ranking")
        return "\n".join(lines)


def load_dataset(name, root, split=0, chunk=0, training=True, images=True):
    """Reads the index of data set `name`, one of DATA_SETS, in `root`/`name` or in `root` itself.

    Prints a warning of what is odd. Raises UserError when a file is missing or the files disagree.

    Args:
        split: 0 to 9, which of the ten splits of "ilids" and "prid" is read.
        chunk: training tracklets are cut into pieces of so many frames, of which the last takes
            the remainder, too; 0 cuts nothing.
        training: whether a network will be trained on the data set. Only then is a "synthetic" set
            that is missing drawn, and only then does "folder" need its `train`.
        images: whether the frames will be read. Then the first one of every tracklet must be there;
            False is for work with the index alone.
    """
    loader, signs, published = DATA_SETS[name]
    folder = Path(root) / name
    options = {}
    if name in SPLIT_SETS:
        options["split"] = split
    if name == "folder":
        options["training"] = training
    if loader is load_mars:
        options["images"] = images
    _odd.clear()
    try:
        if not folder.is_dir() and any((Path(root) / sign).is_dir() for sign in signs):
            folder = Path(root)  # the set itself
        if name == "synthetic" and training and not folder.exists():
            print(f"drawing the synthetic data set into {printable(folder)} (once)", flush=True)
            draw_synthetic(folder)
        if not folder.is_dir():
            raise UserError(_where_it_should_be(name, root, signs))
        dataset = loader(folder, name, **options)
        if images:
            _need_first_frames(folder, dataset[1:] if training else dataset[2:])
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    finally:  # before an error, too, of which the warnings may tell the cause
        for what, places in _odd.items():
            if places:
                print(f"warning: {printable(places[0])}: {what} ({len(places):,} in all)",
                      flush=True)
    for subset, found, expected in zip(dataset._fields[1:], map(len, dataset[1:]), published):
        if not found and (training or subset != "train"):
            raise UserError(f"{folder}: no {subset} tracklets")
        if expected not in (None, found):
            print(f"warning: {printable(folder)}: {expected:,} {subset} tracklets expected, "
                  f"{found:,} found")
    if not dataset.has_a_match():
        if name != "folder":
            raise UserError(f"{folder}: no query has a match, a gallery tracklet of its identity "
                            "under another camera")
        so = "the training goes without its test" if training else "nothing can be ranked"
        print(f"warning: {printable(folder)}: {NO_MATCH}; {so}", flush=True)
    if chunk:
        pieces = []
        for t in dataset.train:
            starts = range(0, max(1, len(t.frames) - chunk + 1), chunk)
            for start, end in zip(starts, [*starts[1:], None]):
                pieces.append(t._replace(frames=t.frames[start:end]))
        dataset = dataset._replace(train=pieces)
    return dataset


def _where_it_should_be(name, root, signs):
    """Says that a root holds no data set of this name, and what was looked for there."""
    here = os.path.abspath(root)
    if not os.path.exists(here):
        says = f"{here}: no such folder"
    elif not os.path.isdir(here):
        says = f"{here}: is no folder"
    else:
        says = f"{here}: holds neither a folder {name} nor the data set itself"
        below = [f"{here}/{inner}" for inner in sorted(os.listdir(here))
                 if any(os.path.isdir(f"{here}/{inner}/{sign}") for sign in signs)]
        if below:
            says += f", but {below[0]} looks like it"
    says += (f"; --root names the folder that holds {name}/, or the data set itself, which has "
             f"the folders {', '.join(signs)}")
    if name == "synthetic":
        says += "; only a training and data.py --synthetic draw it"
    return says


def _need_first_frames(folder, parts):
    """Finds out in seconds, not after a long training, that a list names images that are not
    there: the first frame of every tracklet must be."""
    firsts = {t.frames[0]: None for part in parts for t in part}
    missing = [frame for frame in firsts if not _is_there(frame)]
    if missing:
        raise UserError(f"{folder}: {len(missing):,} of {len(firsts):,} tracklets lack their first "
                        f"frame, as {missing[0]}{_why_missing(folder, missing[0])}")


def _is_there(path):
    """As os.path.exists, which takes a file that may not be looked at for one that is missing."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _why_missing(folder, frame):
    """The cause, where it shows, why a frame of a data set is not there; it may be empty."""
    parts = os.path.relpath(frame, folder).split(os.sep)
    top, image = parts[0], parts[-1]
    if os.path.islink(frame):
        return ", which is a link to nothing"
    if os.path.isdir(f"{folder}/{top}/{top}"):
        return f": the images seem to lie in {folder}/{top}/{top}, move them one folder up"
    if os.path.exists(f"{folder}/{top}/{image}"):
        return f": the images lie in {folder}/{top} itself, not in a folder for each identity"
    if archives := _archives(folder, folder / top):
        return archives
    return "" if os.listdir(folder / top) else f": {folder / top} is empty"


def _archives(*folders):
    """Says that archives lie in these folders, which may hold what is missing; empty if none do."""
    kinds = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
    found = [f"{folder}/{name}" for folder in folders if os.path.isdir(folder)
             for name in sorted(os.listdir(folder)) if name.lower().endswith(kinds)]
    return f": {found[0]} seems not to be unpacked" if found else ""


def _need(folder, wanted, layout):
    missing = [w for w in wanted if not (folder / w).exists()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}; expected {folder}/{layout}"
                        + _archives(folder))


def natural(name):
    """A sorting key that takes numbers in a name as numbers: F2 before F10."""
    parts = re.split(r"(\d+)", str(name))
    parts[1::2] = map(int, parts[1::2])
    return parts, str(name)


def _numbered(key, first, *parts):
    """Lists of tracklets with numbers from `first`, in natural order, in the place of the key."""
    names = sorted({getattr(t, key) for part in parts for t in part}, key=natural)
    numbers = {name: i for i, name in enumerate(names, first)}
    return [[t._replace(**{key: numbers[getattr(t, key)]}) for t in part] for part in parts]


_IMAGES = (".jpg", ".jpeg", ".png")
_OF_THE_SYSTEM = ("thumbs.db", "desktop.ini")  # as hidden files, no warning is due for these
_NO_DIGITS = str.maketrans("", "", "0123456789")
# A number with one dot or comma between its digits. A chain of three or more, as in the date
# 2020.1.2 or in the version 1.10.2, is none.
_WITH_A_DOT = re.compile(r"(?<![\d])(?<!\d[.,])(\d+)[.,](\d+)(?![.,]?\d)")
_NUMBER = re.compile(_WITH_A_DOT.pattern + r"|(\d+)")
_odd = collections.defaultdict(list)  # {what is odd, but usable: places}, for load_dataset to say
_ANOTHER = "another person or camera in the file name than in the folder's"


def _listing(folder):
    """(names in a folder, those of them that are symbolic links)."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_symlink()) for entry in entries]
    return [name for name, _ in found], {name for name, link in found if link}


def _names(folder):
    """The names in a folder, sorted, without hidden files. A link to nothing is left out, too,
    which is odd."""
    names, links = _listing(folder)
    names = sorted(n for n in names if n[0] != "." and n.lower() not in _OF_THE_SYSTEM)
    dead = {name for name in links if not os.path.exists(f"{folder}/{name}")}
    _odd["a link to nothing, left out"] += [f"{folder}/{name}" for name in names if name in dead]
    return [name for name in names if name not in dead]


def _folders(folder):
    names = _names(folder)
    folders = {name for name in names if os.path.isdir(f"{folder}/{name}")}
    for name in names:
        if name not in folders:
            kind = "an image" if name.lower().endswith(_IMAGES) else "a file"
            _odd[f"{kind} beside the folders, left out"].append(f"{folder}/{name}")
    return sorted(folders, key=natural)


def _images(folder):
    names = _names(folder)
    images = [name for name in names if name.lower().endswith(_IMAGES)]
    if len(images) < len(names):
        _odd["no .jpg, .jpeg or .png file, left out"] += [
            f"{folder}/{name}" for name in names if not name.lower().endswith(_IMAGES)]
    return images


def _instead(folder, start=""):
    """Says what a folder holds whose names start so, where something else is missing in it."""
    names = sorted(name for name in os.listdir(folder) if name.startswith(start))
    return f", but {len(names):,} like {names[0]}" if names else ""


def _frames(folder, names):
    """The paths of a tracklet's frames, in natural order, that of times where they are named so."""
    same = len(os.path.commonprefix(names).rstrip("0123456789.,"))
    plain = sorted(names, key=lambda name: natural(name[same:]))
    names, form = plain, plain[-1].translate(_NO_DIGITS)
    forms = [name.translate(_NO_DIGITS) for name in names]
    if re.search(r"\d[.,]\d", "\n".join(names)):
        times = sorted(names, key=lambda name: _as_times(name[same:]))
        if times != plain:
            decimal, sure = _are_decimals([name[same:] for name in names])
            if not sure:
                _odd["the numbers behind the dot have unequal lengths in this tracklet, they are "
                     "taken as decimals: .25 before .5"].append(f"{folder}/{times[0]}")
            names = times if decimal else plain
        forms = [_NUMBER.sub("", name) for name in names]
        form = forms[-1]
    others = [f"{folder}/{name}" for name, own in zip(names, forms) if own != form]
    _odd["a frame that is named otherwise than the last of its tracklet"] += others[:1]
    return tuple([f"{folder}/{name}" for name in names])


def _as_times(name):
    """A sorting key that takes 12.25, but not 1.2.25, as a number with decimals: before 12.5."""
    parts = _NUMBER.split(name)  # text, before the dot, behind it, a number without one, text ...
    key = parts[:1]
    for whole, decimals, number, text in zip(*(parts[i::4] for i in range(1, 5))):
        key += [(int(number or whole), (decimals or "").rstrip("0")), text]
    return key, name


def _are_decimals(names):
    """(whether the numbers behind the dots of these names are decimals, not counted from 1 on as
    in a.1 to a.10; whether that is sure)."""
    numbers = {found[2] for name in names for found in _WITH_A_DOT.finditer(name)}
    shortest = min(map(len, numbers), default=0)
    # Decimals of unequal lengths were cut behind their last digit that is not 0, as 0.05 and 0.5.
    # Who counts reaches 10, and writes 05 only where the others have two digits or more as well.
    decimal = any(len(number) > shortest and number[0] == "0" for number in numbers)
    counted = any(len(number) > 1 and number[-1] == "0" for number in numbers)
    return decimal or not counted, decimal != counted


def _walk(folder, depth, layout, above=()):
    """(names of the folders on the way, frames) of the tracklets, `depth` folders deep."""
    names = _folders(folder) if depth else _images(folder)
    if not names:
        kind, ends = ("folders", "") if depth else ("images", " (.jpg, .jpeg or .png files)")
        raise UserError(f"{folder}: no {kind} in it{_instead(folder)}; expected {layout}{ends}")
    if depth == 0:
        yield above, _frames(folder, names)
        return
    for name in names:
        yield from _walk(f"{folder}/{name}", depth - 1, layout, (*above, name))


def _relabel(name, train, query, gallery):
    """The data set with numbers for identities: those of `train` from 0, the others from 1."""
    return Dataset(name, *_numbered("pid", 0, train), *_numbered("pid", 1, query, gallery))


def _queries(table, variable, persons):
    """The tracklets whose numbers a table holds; persons: {number: tracklet}."""
    numbers = _read_table(table, variable).ravel().tolist()
    for number, times in collections.Counter(numbers).items():
        if number not in persons or times > 1:
            raise UserError(f"{table}: {number} is not a tracklet of a person, or stands twice")
    return [persons[number] for number in numbers]


def load_mars(folder, name="mars", images=True):
    """MARS (Zheng et al., ECCV 2016): the true layout, read without touching an image.

    Of the 12,180 test tracklets the 870 junk ones (pid -1, false detections) are dropped and the
    3,248 distractors (pid 0) kept. Only here and in the synthetic set these two numbers mean so.
    The gallery contains the query tracklets (9,330 + 1,980): without them 140 queries have no
    match. 6 cameras, 625 training identities.
    """
    wanted = ["bbox_train", "bbox_test", "info/train_name.txt", "info/test_name.txt",
              "info/tracks_train_info.mat", "info/tracks_test_info.mat", "info/query_IDX.mat"]
    if not images:
        wanted = wanted[2:]
    _need(folder, wanted, "{bbox_train/0001/*.jpg, bbox_test/0000/*.jpg, info/*} (the info folder "
          "is the one of MARS-evaluation)")
    train, = _numbered("pid", 0, [t for t in _mars_part(folder, "train") if t.pid > 0])
    test = _mars_part(folder, "test")
    persons = {number: t for number, t in enumerate(test, 1) if t.pid > 0}
    query = _queries(folder / "info/query_IDX.mat", "query_IDX", persons)
    return Dataset(name, train, query, [t for t in test if t.pid >= 0])


def _mars_part(folder, part):
    """All tracklets of "train" or "test" in MARS' layout, with the pids of the table, whose rows
    are first and last line of the name list, pid, camera."""
    table = folder / f"info/tracks_{part}_info.mat"
    listing = folder / f"info/{part}_name.txt"
    names = listing.read_text("utf-8-sig", "replace").split()
    rows = _read_table(table, f"track_{part}_info", columns=4)
    if rows.shape[1:] != (4,):
        raise UserError(f"{table}: found shape {rows.shape}, not rows of four numbers")
    well_formed = re.compile(r"(\d+|0*-1)C\d+T\d+F\d+\.jpg").fullmatch
    free = set(range(1, len(names) + 1))  # lines of the name list
    tracklets = []
    for number, (first, last, pid, cam) in enumerate(rows.tolist(), 1):
        lines = range(first, last + 1)
        if not lines or not free.issuperset(lines):
            raise UserError(f"{table}: row {number} takes lines {first} to {last} of "
                            f"{listing.name}, some of which are not there or another row's")
        free.difference_update(lines)
        frames = names[first - 1:last]
        person = f"{pid:0>4}"  # 0001, 0000 for distractors, 00-1 for junk
        written = frames[0].partition("C")[0]
        if written and written.lstrip("0") == person.lstrip("0"):
            person = written  # with another number of zeros, as in a set of five-digit identities
        prefix = f"{person}C{cam}T"
        for line, frame in enumerate(frames, first):
            if not (frame.startswith(prefix) and well_formed(frame)):
                raise UserError(f"{listing}: line {line} is {frame[:60]!r}, no file name like "
                                f"{prefix}0001F001.jpg, as row {number} of {table.name} says")
        if frames[0].split("F")[0] != frames[-1].split("F")[0] or sorted(set(frames)) != frames:
            _odd["mixes tracklets, or is not in the order of its frames"].append(
                f"{table}: row {number}")
        start = f"{folder}/bbox_{part}/{person}/"
        tracklets.append(Tracklet(tuple([start + frame for frame in frames]), pid, cam))
    _odd[f"belongs to no row of {table.name}"] += [f"{listing}: line {i}" for i in sorted(free)]
    return tracklets


def load_duke(folder, name="duke"):
    """DukeMTMC-VideoReID (Wu et al., CVPR 2018): {train,query,gallery}/<pid>/<tracklet>/*.jpg.

    8 cameras; file names carry them and the frame, 0001C6F0099X30823.jpg or
    0001_C6_F0099_X30823.jpg; as in MARS' names, 0001C6T0001F0099.jpg, there may be something in
    between. The queries are not in the gallery.
    """
    layout = "{train,query,gallery}/<pid>/<tracklet>/*.jpg"
    _need(folder, ("train", "query", "gallery"), layout)
    marks = re.compile(r"(\d*)_?(?<![A-Z])C(\d+)(?:\D.*?)??F\d", re.IGNORECASE).search

    def tracklets(part):
        found = []
        for (pid, _), frames in _walk(folder / part, 2, layout):
            cam = None
            for frame in frames:
                mark = marks(os.path.basename(frame))
                if not mark:
                    raise UserError(f"{frame}: the file name carries no camera and frame, as "
                                    "0001C6F0099X30823.jpg does: C6 and F0099")
                if cam not in (None, int(mark[2])):
                    raise UserError(f"{frame}: the file name carries another camera, {mark[2]}, "
                                    f"than those before it in its tracklet, {cam}")
                if mark[1] not in ("", pid):
                    _odd[_ANOTHER].append(frame)
                cam = int(mark[2])
            found.append(Tracklet(frames, pid, cam))
        return found
    return _relabel(name, *map(tracklets, ("train", "query", "gallery")))


def load_lsvid(folder, name="lsvid"):
    """LS-VID (Li et al., ICCV 2019): text lists of tracklets, and an HDF5 table of the queries.

    15 cameras. A line of list_sequence/list_seq_{train,test}.txt is "<path prefix> <pid>", the
    frames are the files with that prefix, the camera is the third field of the file name. The
    gallery contains the queries, as for MARS.
    """
    wanted = ["list_sequence/list_seq_train.txt", "list_sequence/list_seq_test.txt",
              "test/data/info_test.mat"]
    _need(folder, wanted, f"{{{', '.join(wanted)}}} and the frames")
    images = functools.cache(_images)
    taken = set()  # frames of the lines so far

    def tracklets(listing):
        found = []
        text = listing.read_text("utf-8-sig", "replace").rstrip()
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{listing}: line {number}"
            try:
                prefix, pid = line.split()
                pid = int(pid)
            except ValueError:
                raise UserError(f"{where} is not '<path prefix> <pid>': {line[:80]!r}") from None
            path = folder / prefix.replace("\\", "/")
            start = path.name
            try:
                names = images(path.parent)
                last = bisect.bisect_left(names, start + "\U0010ffff")
                names = names[bisect.bisect_left(names, start):last]
                if start[-1:].isdecimal():  # ..._1 is not the start of ..._10
                    names = [name for name in names if not name[len(start)].isdecimal()]
                cam, = {int(name.split("_")[2]) for name in names}
            except (OSError, IndexError, ValueError):
                instead = _instead(path.parent, start) if path.parent.is_dir() else ""
                raise UserError(f"{where}: no frames start with {path}{instead}, or the third "
                                "field of their names is not one camera") from None
            frames = _frames(path.parent, names)
            if not taken.isdisjoint(frames):
                raise UserError(f"{where}: frames of {start} belong to another line, too")
            taken.update(frames)
            found.append(Tracklet(frames, pid, cam))
        return found

    train, test = (tracklets(folder / path) for path in wanted[:2])
    query = _queries(folder / wanted[2], "query", dict(enumerate(test, 1)))
    return _relabel(name, train, query, test)


def load_ilids(folder, name="ilids", split=0):
    """iLIDS-VID (Wang et al., ECCV 2014): i-LIDS-VID/sequences/cam{1,2}/person*/*.png.

    Query: camera 1, gallery: camera 2. split: row of `ls_set`, 0 to 9, whose first half are the
    persons of the test, 1-based in the order of the sorted folders.
    """
    cams = [f"i-LIDS-VID/sequences/cam{cam}" for cam in (1, 2)]
    table = "train-test people splits/train_test_splits_ilidsvid.mat"
    _need(folder, [*cams, table], f"{{i-LIDS-VID/sequences/cam{{1,2}}/person*/*.png, {table}}}")
    tracks = _two_cameras(folder, cams, 1)
    for person, pair in tracks.items():
        for cam, frames in enumerate(pair, 1):
            start = f"/cam{cam}_{person}_"
            _odd[_ANOTHER] += [frame for frame in frames if start not in frame]
    train, test = _split_of_table(folder / table, split, list(tracks),
                                  "persons with images under both cameras")
    return _halves(name, tracks, train, test)


def _split_of_table(table, split, persons, who):
    """(persons of the training, of the test) by row `split` of a table `ls_set`, whose first half
    are those of the test, as 1-based numbers of the sorted persons. who: says who they are."""
    rows = _read_table(table, "ls_set", columns=len(persons))
    order = rows[split:split + 1].ravel().tolist()
    if sorted(order) != list(range(1, len(persons) + 1)):
        raise UserError(f"{table}: row {split} of ls_set is no order of the {len(persons)} {who}")
    order = [persons[number - 1] for number in order]
    return order[len(order) // 2:], order[:len(order) // 2]


def load_prid(folder, name="prid", split=0):
    """PRID-2011 (Hirzer et al., SCIA 2011): multi_shot/cam_{a,b}/person_NNNN/*.png.

    Only persons 1 to 200 are the same under both cameras: a larger number is one person under
    camera a and another one under camera b. Used are the 178 of them with at least 27 frames under
    both cameras. (Wang et al., ECCV 2014, write "more than 21", which is true of up to 183, but
    their splits are of 178.) Query: camera a, gallery: camera b.

    split: 0 to 9, of splits_prid2011.json, a list of {"train": [...], "test": [...]}, or of
    train_test_splits_prid.mat, which comes with iLIDS-VID's archive. The file lies beside
    multi_shot or one folder up. Where there is none, ten splits are drawn with a fixed seed.
    """
    cams = ["multi_shot/cam_a", "multi_shot/cam_b"]
    _need(folder, cams, "multi_shot/cam_{a,b}/person_0001/*.png")
    tracks = {}
    for person, pair in _two_cameras(folder, cams, 27).items():
        number = re.fullmatch(r"person_(\d+)", person)
        if not number:
            _odd["no folder like person_0001, left out"].append(f"{folder / cams[0]}/{person}")
        elif 1 <= int(number[1]) <= 200:
            tracks[person] = pair
    who = "persons 1 to 200 with at least 27 frames under both cameras"
    above = Path(os.path.abspath(folder)).parent  # where torchreid puts the file
    names = ("splits_prid2011.json", "train_test_splits_prid.mat")
    files = [place / file for file in names for place in (folder, above)
             if (place / file).exists()]
    if files and files[0].suffix == ".mat":
        train, test = _split_of_table(files[0], split, list(tracks), who)
        return _halves(name, tracks, train, test)
    path = files[0] if files else folder / "drawn_splits_prid.json"
    if not files:
        print(f"warning: neither {' nor '.join(names)} is in {printable(folder)} or one folder up: "
              f"split {split} is one of ten drawn with a fixed seed, not one of the published ones",
              flush=True)
    try:
        splits = (json.loads(path.read_text("utf-8-sig", "replace")) if path.exists()
                  else _draw_splits(path, list(tracks)))
        train, test = (splits[split][part] for part in ("train", "test"))
        named = collections.Counter([*train, *test])
    except (ValueError, LookupError, TypeError) as error:
        layout = '{"train": [...], "test": [...]}'
        raise UserError(f"{path}: not JSON, or no split {split} like {layout} ({error})") from None
    for person, times in named.items():
        if person not in tracks or times > 1:
            raise UserError(f"{path}: split {split} names {str(person)[:60]!r}, who is none of the "
                            f"{who}, or is named twice")
    return _halves(name, tracks, train, test)


def _draw_splits(path, persons):
    """Ten random halvings of PRID's persons; written to `path` when no person is missing, so that
    another version of NumPy draws no others."""
    rng = np.random.default_rng(0)
    half = len(persons) // 2
    orders = [rng.permutation(persons).tolist() for _ in range(10)]
    splits = [{"train": sorted(order[:half]), "test": sorted(order[half:])} for order in orders]
    if len(persons) == PRID_PERSONS:
        try:
            with replacing(path) as file:
                file.write(json.dumps(splits, indent=1).encode() + b"\n")
        except UserError as error:
            print(f"warning: {error}; next time the same are drawn")
    return splits


def _two_cameras(folder, cams, least):
    """{person: frames under each of two cameras}, of those with `least` or more under both."""
    tracks = collections.defaultdict(list)
    for cam in cams:
        for person in _folders(folder / cam):
            path = folder / cam / person
            names = _images(path)
            if len(names) >= least:
                tracks[person].append(_frames(path, names))
    return {person: pair for person, pair in tracks.items() if len(pair) == 2}


def _halves(name, tracks, train, test):
    """The data set of a split of `_two_cameras`: query is the first camera, gallery the second."""
    def tracklets(persons, cam):
        return [Tracklet(tracks[p][cam - 1], p, cam) for p in sorted(persons, key=natural)]
    return _relabel(name, tracklets(train, 1) + tracklets(train, 2), tracklets(test, 1),
                    tracklets(test, 2))


def load_folder(folder, name="folder", training=True):
    """Your own tracklets: {train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}, any names.

    Names are names: every identity is a person, also one called 0000 or -1, which in MARS are no
    persons. An identity of the gallery without a query is a distractor. Without `query`, the
    first tracklet of each (pid, cam) of `gallery` is a query, too. `train` is needed for training.
    """
    layout = "{train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}"
    _need(folder, ("train", "gallery") if training else ("gallery",), layout)

    def tracklets(part):
        return [Tracklet(frames, pid, cam)
                for (pid, cam, _), frames in _walk(folder / part, 3, layout)]
    train = tracklets("train") if (folder / "train").is_dir() else []
    gallery = tracklets("gallery")
    if (folder / "query").is_dir():
        query = tracklets("query")
    else:
        query = list({(t.pid, t.cam): t for t in reversed(gallery)}.values())[::-1]
        print(f"{printable(folder)}/query is missing: the first of the gallery's tracklets of each "
              f"identity and camera is a query, {len(query):,} in all", flush=True)
    shared = {t.pid for t in train} & {t.pid for t in query + gallery}
    _odd["a training identity of the same name as one of the test"] += [
        f"{folder}/train/{pid}" for pid in sorted(shared)]
    for part, members in (("train", train), ("query", query), ("gallery", gallery)):
        _odd["an identity named like the junk or the distractors of MARS, but a person here, like "
             "every other; remove its folder if it is none"] += [
            f"{folder}/{part}/{pid}" for pid in sorted({t.pid for t in members})
            if re.fullmatch("0+|0*-1", pid) and (folder / part).is_dir()]
    return _relabel(name, *_numbered("cam", 1, train, query, gallery))


def _read_table(path, variable, columns=None):
    """The whole numbers of a variable of a .mat file, int64: of MATLAB 7.3 (HDF5) or earlier.

    columns: how many the matrix should have. An HDF5 file of MATLAB holds its dimensions in reverse
    order; one that does not bear MATLAB's mark is taken as it is when that has so many columns.
    """
    import h5py
    from scipy.io import loadmat
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                stored = file[variable]
                values = np.asarray(stored[()])
                if "MATLAB_class" in stored.attrs or values.shape[1:] != (columns,):
                    values = values.T
        else:
            values = np.asarray(loadmat(path, variable_names=[variable])[variable])
    except Exception as error:  # a damaged file raises many kinds
        says = first_line(error)
        raise UserError(f"{path}: not a readable .mat file with {variable} ({says})") from None
    if (values.dtype.kind not in "iuf"
            or not ((abs(values) < 2 ** 53) & (values == np.rint(values))).all()):
        raise UserError(f"{path}: {variable} is no matrix of whole numbers")
    return values.astype(np.int64)


# name: loader; folders in it, each of which tells it from the folder above; published numbers of
# training, query and gallery tracklets
DATA_SETS = {
    "mars": (load_mars, ("info", "bbox_train", "bbox_test"), (8298, 1980, 11310)),
    "duke": (load_duke, ("train", "query", "gallery"), (2196, 702, 2636)),
    "lsvid": (load_lsvid, ("list_sequence", "test"), (2831, 3504, 11333)),
    "ilids": (load_ilids, ("i-LIDS-VID", "train-test people splits"), (300, 150, 150)),
    "prid": (load_prid, ("multi_shot",), (178, 89, 89)),
    "synthetic": (load_mars, ("info", "bbox_train", "bbox_test"), (None, None, None)),
    "folder": (load_folder, ("train", "query", "gallery"), (None, None, None)),
}
SPLIT_SETS = ("ilids", "prid")
PRID_PERSONS = 178  # of persons 1 to 200, with at least 27 frames under both cameras
NO_MATCH = ("no query has a match, a gallery tracklet of its identity under another camera (to "
            "rank within one camera, give each query tracklet a camera name of its own)")
CHUNK = {"duke": 32, "lsvid": 64}  # default of --chunk; others: 0


# ------------------------------------------------------------------------------------ clip sampling
# From a tracklet's number of frames n to frame indices: in training (T,), in the test (clips, T).

def sample_strided(n, T, rng, stride=4):
    """T frames, `stride` apart, from a random start.

    A tracklet of fewer than T * stride frames gives T different ones, drawn at random, in order;
    one of fewer than T frames gives some of them twice or more.
    """
    if n < T * stride:
        return np.sort(rng.choice(n, T, replace=n < T))
    return rng.integers(n - (T - 1) * stride) + stride * np.arange(T)


def sample_adjacent(n, T, rng):
    """T consecutive frames from a random start; a tracklet with fewer than T frames is cycled."""
    return (rng.integers(max(1, n - T + 1)) + np.arange(T)) % n


def sample_segments(n, T, rng):
    """A random frame of each of T equal parts, in order (TSN, ECCV 2016); n < T: some repeat."""
    edges = np.arange(T + 1) * n // T
    return rng.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))


def split_consecutive(n, T):
    """ceil(n/T) clips of T consecutive frames; the last one is filled by cycling the tracklet."""
    return (np.arange(-(-n // T) * T) % n).reshape(-1, T)


def split_whole(n, T):
    """floor(n/T) clips of T consecutive frames, the rest dropped; fewer than T are cycled."""
    return (np.arange(max(n // T, 1) * T) % n).reshape(-1, T)


def split_segments(n, T):
    """ceil(n/T) clips, each with one frame of each of T equal parts, in order, as in training;
    every frame used, some of them twice where T does not divide n."""
    places = -(-n // T) * T
    return (np.arange(places) * n // places).reshape(T, -1).T


# -------------------------------------------------------------------------- frames and augmentation

def _need_believable_size(width, height):
    """Raises ValueError where Pillow merely warns of a "decompression bomb"."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels by its header, too many to be true")


def _orientation(image):
    """How a camera was held, 1 to 8, by an image's Exif or XMP data; 1, upright, without them. What
    cannot be read there is no damage of the picture."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the readers of Exif raise many kinds
        return 1


def _upright(frame, orientation):
    """A frame (H, W, 3) as it is to be seen: orientations from 5 on are stored lying."""
    if orientation in (5, 6, 7, 8):
        frame = frame.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    if orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    return np.ascontiguousarray(frame)


def _decode(path):
    """A frame, uint8 (H, W, 3), upright. What a decoder complains of is an error: JPEGs go to
    simplejpeg, because Pillow keeps libjpeg's complaints to itself."""
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith(b"\xff\xd8"):  # a JPEG, whatever its name
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            _need_believable_size(width, height)
            four = colours in ("CMYK", "YCCK")
            frame = simplejpeg.decode_jpeg(content, "CMYK" if four else "RGB", strict=True)
            # APP1, in which Exif and XMP are, stands before the scan; most crops have none
            if b"\xff\xe1" in content[:content.find(b"\xff\xda")] and not four:
                with contextlib.suppress(OSError), Image.open(io.BytesIO(content)) as image:
                    return _upright(frame, _orientation(image))
            if not four:
                return frame
        except ValueError as error:
            if "subsampling" not in str(error):  # an unusual one, which simplejpeg does not take
                raise
    if content.startswith(b"\x89PNG"):  # before Pillow warns of its size
        _need_believable_size(*(int.from_bytes(content[i:i + 4], "big") for i in (16, 20)))
    with Image.open(path) as image:
        _need_believable_size(*image.size)
        image.verify()  # the checksums of a PNG; the image has to be opened again
    with Image.open(path) as image:
        image.load()  # raises here what is wrong; Exif may stand behind the pixels
        orientation = _orientation(image)
        if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        return _upright(np.asarray(image.convert("RGB")), orientation)


def _pixels(frame):
    """A frame that is in memory, an array or a tensor, as an array (H, W, 3)."""
    pixels = frame.numpy(force=True) if torch.is_tensor(frame) else frame
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError("a frame in memory is RGB, uint8 (height, width, 3), not "
                        f"{pixels.dtype} {pixels.shape}")
    return pixels


def read_clip(paths, size):
    """Frames of `size` (height, width), resized where they are not: uint8 (T, 3, H, W). Raises
    UserError with the file's name when one is missing or damaged: a clip is never shortened.

    paths: files, or frames that are in memory, uint8 (h, w, 3)."""
    height, width = size
    clip = np.empty((len(paths), height, width, 3), np.uint8)
    for t, path in enumerate(paths):
        try:
            frame = _pixels(path) if hasattr(path, "dtype") else _decode(path)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{path}: no such frame, although the data set lists it") from None
        except Exception as error:  # the decoders raise many kinds
            raise UserError(f"{path}: unreadable image ({first_line(error)})") from None
        if frame.shape[:2] != (height, width):
            frame = Image.fromarray(frame).resize((width, height), Image.BICUBIC)
        clip[t] = frame
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def _is_dark_16_bit(path):
    """Whether a frame is a PNG of 16 bits that becomes nearly black in 8 bits, as that of a sensor
    of 12 bits does, whose white is 4095."""
    with open(path, "rb") as file:
        head = file.read(25)
    return head.startswith(b"\x89PNG") and head[24:] == b"\x10" and 0 < _decode(path).max() < 64


# How many frames of a kind `check_images` names before it only counts them: what is missing is
# missing by folders, while each damaged frame has to be mended.
NAMED = {"missing": 5, "damaged": 100}


def check_images(dataset):
    """Decodes every frame of a data set, names bad ones, and returns their number. Warns of frames
    that are probably not meant as they are read."""
    def look(path):
        """(kind of the problem or None, what it is)"""
        try:
            read_clip([path], (1, 1))
        except UserError as error:
            return "damaged" if os.path.exists(path) else "missing", str(error)
        return "dark" if _is_dark_16_bit(path) else None, path

    paths = sorted({frame for tracklets in dataset[1:] for t in tracklets for frame in t.frames})
    count, first_dark = collections.Counter(), None
    with ThreadPool(16) as pool:
        found = progress(pool.imap(look, paths, 64), "checking", len(paths), unit=" frames")
        for kind, text in found:
            count[kind] += 1
            if kind in NAMED and count[kind] <= NAMED[kind]:
                tqdm.write(text)
            if kind == "dark":
                first_dark = first_dark or text
    for kind, most in NAMED.items():
        if count[kind] > most:
            print(f"... and {count[kind] - most:,} more that are {kind}")
    if first_dark:
        print(f"warning: {printable(first_dark)}: a PNG of 16 bits that becomes nearly black, as "
              f"one with values of 12 bits does ({count['dark']:,} in all): 65535 is taken for "
              "white")
    bad = count["missing"] + count["damaged"]
    print(f"{len(paths):,} frames checked, {bad:,} bad")
    return bad


def random_flip(clip, rng, p=0.5):
    """Mirrors all frames of a clip (..., W), with probability p."""
    return clip.flip(-1) if rng.random() < p else clip


def random_erase(clip, rng, p=0.5, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)):
    """Erases one box, the same in all frames of a uint8 clip (T, 3, H, W), with probability p.

    Random erasing (Zhong et al., AAAI 2020) with ImageNet's mean colour; area: the box's share of
    the frame; aspect: its height over width.
    """
    if rng.random() >= p:
        return clip
    H, W = clip.shape[-2:]
    for _ in range(100):
        size = rng.uniform(*area) * H * W
        ratio = math.exp(rng.uniform(*np.log(aspect)))
        h = max(1, round(math.sqrt(size * ratio)))
        w = max(1, round(math.sqrt(size / ratio)))
        if h <= H and w <= W:
            y = rng.integers(H - h + 1)
            x = rng.integers(W - w + 1)
            mean = torch.tensor([round(255 * m) for m in IMAGENET_MEAN], dtype=torch.uint8)
            clip = clip.clone()
            clip[:, :, y:y + h, x:x + w] = mean[:, None, None]
            break
    return clip


def normalize(clips):
    """uint8 clips (..., 3, H, W) -> float32 by ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=clips.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device=clips.device)[:, None, None]
    return (clips.float() / 255 - mean) / std


# --------------------------------------------------------------------- clip data sets and samplers

class TrainClips(torch.utils.data.Dataset):
    """Augmented training clips; an item is (clip uint8 (T, 3, H, W), pid).

    It is asked with what `PKSampler` yields, (tracklet, seed, epoch, place): the frames and the
    augmentation depend on these numbers alone, not on the worker.

    sample: a function of (n, T, rng) that draws frame indices; erase: probability.
    """

    def __init__(self, tracklets, sample, T, size, erase=0.5):
        self.tracklets = tracklets
        self.sample = sample
        self.T = T
        self.size = size
        self.erase = erase

    def __getitem__(self, item):
        index, *seed = item
        rng = np.random.default_rng([_CLIP_SEED, *seed])
        frames, pid, _ = self.tracklets[index]
        clip = read_clip([frames[i] for i in self.sample(len(frames), self.T, rng)], self.size)
        return random_erase(random_flip(clip, rng), rng, self.erase), pid


class AllClips(torch.utils.data.Dataset):
    """All clips of all tracklets in turn; an item is (clip uint8 (T, 3, H, W), its tracklet's
    number). split: a function of (n, T) that gives all clips' frame indices, (clips, T)."""

    def __init__(self, tracklets, split, T, size):
        self.tracklets = tracklets
        self.size = size
        self.clips = [(number, clip) for number, tracklet in enumerate(tracklets)
                      for clip in split(len(tracklet.frames), T)]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, item):
        number, clip = self.clips[item]
        frames = self.tracklets[number].frames
        return read_clip([frames[i] for i in clip], self.size), number


# NumPy takes [seed, epoch] and [seed, epoch, 0] for the same seed: what each is for stands first
_BATCHES_SEED, _CLIP_SEED = 1, 2


class PKSampler(torch.utils.data.Sampler):
    """Batches of P distinct identities with K clips each (Hermans et al., 2017).

    Yields lists of (tracklet, seed, epoch, the clip's place in the epoch). Call
    `set_epoch(epoch, start)` before each epoch; `start` skips batches. The batches of an epoch
    depend on the seed and the epoch alone.

    shows="tracklets": an epoch shows all tracklets, as those of the authors' releases do. The
    tracklets of each identity are shuffled and cut into groups of K. What remains waits for the
    next epoch's shuffle; an identity with fewer than K tracklets fills its group by showing them
    again. A batch is P groups of P distinct identities; an incomplete last batch is left out. An
    identity with more groups than there are batches cannot be in a batch twice: its other groups
    are left out of this epoch, too.

    shows="identities": an epoch shows every identity at least once, in ceil(identities / P)
    batches, the last one filled up with identities of the first.

    Args:
        pids: label of every training tracklet.
        P, K: identities a batch, and clips of each of them.
        shows: "tracklets" or "identities".
        seed: a whole number.
        rank, world: this process is number `rank` of `world` and takes P / world identities of each
            batch.

    Raises UserError when P or K do not fit the identities or the processes.
    """
    unit = "identities"

    def __init__(self, pids, P, K, *, shows="tracklets", seed=0, rank=0, world=1):
        self.tracklets = collections.defaultdict(list)
        for index, pid in enumerate(pids):
            self.tracklets[pid].append(index)
        if P > len(self.tracklets):
            raise UserError(f"a batch needs {P} {self.unit}, the training set has "
                            f"{len(self.tracklets)}: use fewer --ids or --clips")
        if P % world:
            raise UserError(f"{P} {self.unit} a batch do not divide over {world} processes: "
                            f"use a multiple of {world}")
        if P * K == world:
            raise UserError(f"a batch of {P * K} leaves each of {world} processes a single clip, "
                            "BatchNorm needs two: use more --ids or --clips")
        self.P = P
        self.K = K
        self.shows = shows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pids = sorted(self.tracklets)
        if shows == "tracklets":
            groups = np.array([max(1, len(self.tracklets[pid]) // K) for pid in self.pids])
            # b batches need P * b groups, of each identity b at the most
            self.batches = groups.sum() // P
            while np.minimum(groups, self.batches).sum() < P * self.batches:
                self.batches -= 1
            self.groups = np.minimum(groups, self.batches)
        else:
            self.batches = -(-len(self.pids) // P)
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        self.epoch = epoch
        self.start = start

    def __len__(self):
        return int(self.batches) - self.start

    def _batches_of_identities(self, rng):
        """P identities for each batch, so that every identity is there at least once."""
        order = rng.permutation(self.pids)
        fill = order[:-len(order) % self.P]  # other identities than those of the last batch
        for batch in np.concatenate([order, fill]).reshape(-1, self.P):
            yield [(pid, np.resize(rng.permutation(self.tracklets[pid]), self.K)) for pid in batch]

    def _batches_of_tracklets(self, rng):
        """P identities for each batch, each as often in the epoch as it has groups of tracklets."""
        shuffled = [rng.permutation(self.tracklets[pid]) for pid in self.pids]
        left = self.groups.copy()  # groups that are still to be shown
        surplus = left.sum() - self.P * self.batches  # of the incomplete last batch
        dropped = rng.choice(np.repeat(np.arange(len(left)), left), surplus, replace=False)
        np.subtract.at(left, dropped, 1)
        for more in range(int(self.batches) - 1, -1, -1):  # batches after this one
            # whoever has a group for each of these batches and for this one has to be in this one
            batch = np.flatnonzero(left > more)
            if len(batch) < self.P:
                others = np.flatnonzero((left > 0) & (left <= more))
                drawn = rng.choice(others, self.P - len(batch), replace=False,
                                   p=left[others] / left[others].sum())
                batch = np.concatenate([batch, drawn])
            left[batch] -= 1
            groups = []
            for i in batch:
                first = left[i] * self.K
                group = np.resize(shuffled[i], max(self.K, len(shuffled[i])))[first:first + self.K]
                groups.append((self.pids[i], group))
            yield groups

    def __iter__(self):
        rng = np.random.default_rng([_BATCHES_SEED, self.seed, self.epoch])
        if self.shows == "tracklets":
            batches = self._batches_of_tracklets(rng)
        else:
            batches = self._batches_of_identities(rng)
        for number, batch in enumerate(batches):
            if number >= self.start:
                first = number * self.P * self.K
                yield [(int(batch[p][1][k]), self.seed, self.epoch, first + p * self.K + k)
                       for p in range(self.rank, self.P, self.world) for k in range(self.K)]


class TrackletSampler(PKSampler):
    """Batches of P * K tracklets, whatever their identities; an epoch shows every tracklet once,
    the last batch is filled up with the first ones. Otherwise as PKSampler."""
    unit = "tracklets"

    def __init__(self, pids, P, K, *, seed=0, rank=0, world=1):
        super().__init__(range(len(pids)), P * K, 1, shows="identities", seed=seed, rank=rank,
                         world=world)


# ------------------------------------------------------------------------------ the synthetic set
# Small drawn pedestrians, in look-alike groups that share the upper clothes, which are salient.

_UPPER = "#c4242a #2a54ba #248442 gold #ececdf #26262a #e87624 hotpink #703c92 #22808f".split()
_LOWER = "#2c3e70 #222226 #84848a #ccb892 #68462e #e4e4de #5c6238 #86222c".split()
# in a group each has the next ones of _IN_TURN; of the others everyone has his own
_IN_TURN = dict(lower=_LOWER, cut="trousers shorts skirt coat".split(),
                head="short long bun cap bald".split(), bag="none backpack shoulder hand".split())
_TINTS = dict(bag_colour=_UPPER, cap=_UPPER, hair="#1c1816 #54361e #cea85c sienna #9c9c9e".split(),
              skin="#f0ccb2 #d8a882 #a87450 #62402c".split(), shoes=_LOWER)
_BODY = dict(build=(0.82, 1.25), height=(0.9, 1.04), leg=(0.47, 0.53))
_GAIT = dict(frequency=(0.55, 1.0), stride=(0.3, 0.6), arms=(0.15, 0.7))
_GAITS = dict(frequency=(0.3, 1.6), stride=(0.2, 0.7), arms=(0.0, 0.8))  # with gait
_SUPER = 3  # frames are drawn three times as large and averaged down


def _shade(colour, factor):
    colour = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    return tuple(int(min(255, c * factor)) for c in colour)


def _draw_people(count, rng, group=4, gait=False):
    """Looks and gaits of people in look-alike groups; gait: all but it is the same in a group."""
    people, walks = [], _GAITS if gait else _GAIT
    while len(people) < count:
        upper, second = rng.choice(_UPPER, 2, replace=False)
        shared = dict(upper=upper, second=second, sleeves=rng.random() < 0.65,
                      pattern=rng.choice(("plain", "plain", "hoops", "stripes", "halves")))
        orders = {what: rng.permutation(looks) for what, looks in _IN_TURN.items()}
        for i in range(min(group, count - len(people))):
            if i == 0 or not gait:
                own = {what: order[i % len(order)] for what, order in orders.items()}
                own |= {what: rng.choice(colours) for what, colours in _TINTS.items()}
                own |= {what: rng.uniform(*limits) for what, limits in _BODY.items()}
            walk = {what: rng.uniform(*limits) for what, limits in walks.items()}
            people.append(SimpleNamespace(**shared, **own, **walk))
    return people


def _draw_camera(index, rng, zoom):
    """A camera: its look and the scene along which people walk, `zoom` times 420 x 150 pixels."""
    def colour(low, high):
        return 255 * np.array(colorsys.hsv_to_rgb(rng.random(), 0.12, rng.uniform(low, high)))
    wall, floor, edge = colour(0.5, 0.8), colour(0.4, 0.7), int(rng.integers(52, 90))
    image = Image.new("RGB", (420, 150), _shade(wall, 1))
    draw = ImageDraw.Draw(image)
    step, wide, high = ((16, 14, 6), (60, 40, 46))[index % 2]  # bricks or windows
    for y in range(edge - high - 2, -high, -high - 2):
        for x in range(y % 2 * step // 2, 420, step):
            draw.rectangle([x, y, x + wide, y + high], _shade(wall, rng.uniform(0.8, 1.05)))
    draw.rectangle([0, edge, 420, 150], _shade(floor, 1))
    for x in rng.integers(0, 420, 5).tolist():
        draw.rectangle([x, edge, x + 30, 150], _shade(floor, rng.uniform(0.8, 1.1)))
        if index % 3 == 0:  # a tree
            draw.rectangle([x - 3, edge - 40, x + 3, edge], (84, 62, 44))
            draw.ellipse([x - 18, edge - 58, x + 18, edge - 22], (50, 85, 45))
    pixels = (np.asarray(image) + rng.normal(0, 6, (150, 420, 1))).clip(0, 255).astype(np.uint8)
    hue = np.array(colorsys.hsv_to_rgb(rng.random(), 1, 1))
    return SimpleNamespace(
        cast=(1 + 0.16 * (hue - 0.5)) * rng.uniform(0.9, 1.1), gamma=rng.uniform(0.9, 1.1),
        light=0.15 * rng.choice([-1, 1]), scale=rng.uniform(0.85, 0.97),
        yaw=[0.25, 1.35, 2.75, -1.1, 0.9, -2.2][index % 6] + rng.uniform(-0.15, 0.15),
        blur=rng.uniform(0.0, 0.7), noise=rng.uniform(1, 3),
        scene=Image.fromarray(pixels).resize((round(420 * zoom), round(150 * zoom))))


def _draw_person(image, who, phase, yaw, x, y, h):
    """Draws `who`, h pixels tall, the feet at (x, y), at `phase` of the gait; yaw 0 faces the
    camera, pi/2 walks right. Places are in heights, upwards from the feet; `at` makes pixels."""
    draw = ImageDraw.Draw(image)
    s, c = math.sin(yaw), math.cos(yaw)
    ahead = math.copysign(1, s)  # where the person walks, and the side nearer to the camera
    across = who.build * (0.6 * abs(s) + abs(c))  # a body is flatter from the side
    hip, shoulder, head = (high + 0.008 * math.cos(2 * phase) for high in (who.leg, 0.82, 0.905))
    chest, waist = 0.145 * across, 0.11 * across

    def at(dx, dy):
        return x + dx * h, y - dy * h

    def limb(a, b, width, colour):  # a bar with round ends
        r = width * h / 2
        draw.line([at(*a), at(*b)], colour, round(2 * r))
        for px, py in (at(*a), at(*b)):
            draw.ellipse([px - r, py - r, px + r, py + r], colour)

    def oval(dx, dy, r, colour, half=False):
        px, py = at(dx, dy)
        shape = [px - 0.9 * r * h, py - r * h, px + 0.9 * r * h, py + r * h]
        draw.pieslice(shape, 180, 360 if half else 540, colour)

    def joint(start, length, swing):  # a limb's other end
        return start[0] + 1.25 * length * math.sin(swing) * s, start[1] - length * math.cos(swing)

    def leg(side):
        swing = who.stride * math.sin(phase) * side
        bend = 0.9 * who.stride * max(0.0, math.cos(phase) * side) + 0.05
        top = side * 0.055 * who.build * c, hip
        knee = joint(top, 0.5 * hip, swing)
        ankle = joint(knee, 0.46 * hip, swing - bend)
        dark = 1.0 if side == ahead else 0.82
        cloth, bare = _shade(who.lower, dark), _shade(who.skin, dark)
        limb(knee, ankle, 0.06 * who.build, bare if who.cut in ("shorts", "skirt") else cloth)
        limb(top, knee, 0.09 * who.build, bare if who.cut == "skirt" else cloth)
        toe = ankle[0] + 0.07 * s, ankle[1] - 0.012 - 0.018 * max(c, 0)
        limb(ankle, toe, 0.045, _shade(who.shoes, dark))

    def arm(side):
        swing = -who.arms * math.sin(phase) * side
        dark = 0.95 if side == ahead else 0.78
        sleeve, bare = _shade(who.upper, dark), _shade(who.skin, dark)
        top = side * (chest - 0.01) * c, shoulder - 0.025
        elbow = joint(top, 0.16, swing)
        hand = joint(elbow, 0.14, swing + 0.3)
        limb(elbow, hand, 0.05 * who.build, sleeve if who.sleeves else bare)
        limb(top, elbow, 0.06 * who.build, sleeve)
        limb(hand, hand, 0.045, bare)
        if who.bag == "hand" and side == 1:
            limb((hand[0], hand[1] - 0.06), (hand[0], hand[1] - 0.11), 0.12, who.bag_colour)

    def band(top, low, colour):  # of the body between two heights
        wide = [chest + (waist - chest) * (shoulder - v) / (shoulder - hip) for v in (top, low)]
        draw.polygon([at(-wide[0], top), at(wide[0], top), at(wide[1], low), at(-wide[1], low)],
                     colour)

    def backpack(seen):
        if who.bag == "backpack" and seen:
            limb((-0.16 * s, shoulder - 0.06), (-0.16 * s, hip + 0.12), 0.15, who.bag_colour)

    limb((-0.12, 0), (0.12, 0), 0.025, (60, 60, 64))  # the shadow
    arm(-ahead)  # from the far side to the near one
    leg(-ahead)
    leg(ahead)
    backpack(c > 0)
    if who.cut == "coat":
        limb((0, hip), (0, hip - 0.12), 2 * waist, _shade(who.upper, 0.9))
    limb((-0.8 * chest, shoulder - 0.015), (0.8 * chest, shoulder - 0.015), 0.05, who.upper)
    band(shoulder, hip - 0.02, who.upper)
    if who.pattern == "hoops":
        for i in range(4):
            band(shoulder - 0.03 - 0.08 * i, shoulder - 0.065 - 0.08 * i, who.second)
    elif who.pattern == "stripes":
        for u in (-0.6, 0, 0.6):
            limb((u * chest, shoulder - 0.02), (u * waist, hip), 0.025, who.second)
    elif who.pattern == "halves":
        band((shoulder + hip) / 2, hip - 0.02, who.second)
    if who.cut == "skirt":
        draw.polygon([at(-waist, hip + 0.03), at(waist, hip + 0.03), at(1.4 * waist, hip / 2),
                      at(-1.4 * waist, hip / 2)], who.lower)
    backpack(c <= 0)
    limb((0, shoulder), (0, head), 0.06, _shade(who.skin, 0.85))
    if who.head == "long":
        limb((-0.02 * s, head), (-0.03 * s, shoulder - 0.03), 0.13, who.hair)
    elif who.head == "bun":
        oval(-0.06 * s, head + 0.07, 0.035, who.hair)
    oval(0.015 * s, head, 0.06, who.skin)
    if who.head == "cap":
        oval(0, head + 0.01, 0.066, who.cap, half=True)
        limb((0, head + 0.015), (0.09 * s, head + 0.015), 0.02, _shade(who.cap, 0.75))
    elif who.head != "bald":
        oval(-0.012 * s, head + 0.008, 0.064, who.hair, half=c > -0.3)
    arm(ahead)
    if who.bag == "shoulder":
        side = math.copysign(waist, c)
        limb((-side, shoulder), (side, hip), 0.02, _shade(who.bag_colour, 0.7))
        limb((side, hip), (side, hip - 0.04), 0.12, who.bag_colour)


def _draw_tracklet(who, passer, camera, frames, size, occlusion, rng):
    """The frames, of (height, width) `size`, of `who` (None: a false detection) past `camera`; with
    probability `occlusion` a pole, a box on a cart or the person `passer` gets in the way."""
    height, width = size
    unit = _SUPER * height / 128
    h, w = _SUPER * height, _SUPER * width
    yaw = camera.yaw + rng.choice([0, 0.5], p=[0.8, 0.2]) + rng.uniform(-0.2, 0.2)
    phase, start = rng.uniform(0, 2 * math.pi), rng.uniform(40, 280)
    kind = rng.choice(["pole", "box", "passer"]) if rng.random() < occlusion else "none"
    when = rng.uniform(0, frames)
    tint = _shade((1, 1, 1), rng.uniform(50, 150))
    light = 1 + camera.light * np.linspace(-1, 1, width)[:, None]
    colour = (camera.cast * rng.uniform(0.9, 1.1) * light / 255).astype(np.float32)
    drift = rng.normal(0, 1, 2)
    for i in range(frames):
        drift = 0.7 * drift + rng.normal(0, 1, 2)  # the detector's box trembles
        left = (start + 2.5 * i * math.sin(yaw) + drift[0]) * unit
        left = int(np.clip(left, 0, camera.scene.width - w))
        image = camera.scene.crop((left, 5, left + w, 5 + h))
        middle, feet = w / 2 + 1.2 * drift[0] * unit, 0.965 * h + drift[1] * unit
        if who:
            step = phase + 2 * math.pi * who.frequency * i / 8
            tall = h * camera.scale * who.height * rng.uniform(0.96, 1.04)
            _draw_person(image, who, step, yaw, middle, feet, tall)
        x = w * (0.5 + (i - when) / 6)
        if kind == "pole":
            ImageDraw.Draw(image).rectangle([x - 0.06 * w, 0, x + 0.06 * w, h], tint)
        elif kind == "box":
            ImageDraw.Draw(image).rectangle([x - 0.3 * w, 0.7 * h, x + 0.3 * w, h], tint)
        elif kind == "passer":
            _draw_person(image, passer, i, math.pi / 2, x, 1.02 * h, 0.95 * h)
        image = image.reduce(_SUPER)
        blur = camera.blur + (rng.uniform(0.4, 1.0) if rng.random() < 0.12 else 0)
        image = image.filter(ImageFilter.GaussianBlur(blur * height / 128))
        pixels = 255 * (np.asarray(image) * colour).clip(0, 1) ** np.float32(camera.gamma)
        pixels += camera.noise * rng.standard_normal((height, width, 1), np.float32)
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_mat(path, variable, values):
    """As scipy's savemat, without the time in the header."""
    from scipy.io import savemat
    with open(path, "wb") as file:
        savemat(file, {variable: values})
        file.seek(0)
        file.write(b"MATLAB 5.0 MAT-file, synthetic pedestrians".ljust(116))


def draw_synthetic(folder, identities=64, test_identities=20, cameras=4, frames=(5, 12),
                   size=(128, 64), group=4, occlusion=0.2, gait=False, seed=0):
    """Draws a set of synthetic pedestrians in MARS' layout into `folder`, which must not exist yet:
    by one process at a time, aside, so that an interrupted drawing leaves no half data set.

    Every identity has one or two tracklets of frames[0] to frames[1] frames under each camera, the
    first of which is a query. The test part has a junk tracklet and two distractors for each
    camera, too. The same arguments give the same bytes. size: (height, width) in pixels; group:
    people in a group who share the upper clothes, or with gait all but their way to walk;
    occlusion: probability that something passes in front of a tracklet.
    """
    folder, file = Path(folder), None
    aside, lock = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "lock"))
    people = [None, *_draw_people(2 * cameras, np.random.default_rng([seed, 1]), group=1)]
    people += _draw_people(identities, np.random.default_rng([seed, 2]), group, gait)
    people += _draw_people(test_identities, np.random.default_rng([seed, 3]), group, gait)
    views = [_draw_camera(cam, np.random.default_rng([seed, 4, cam]), _SUPER * size[0] / 128)
             for cam in range(cameras)]
    names, rows, query = {"train": [], "test": []}, {"train": [], "test": []}, []
    try:
        if folder.exists():
            raise UserError(f"{folder} exists already: name another folder, or remove it first")
        file = locked(lock, wait=True)
        if folder.exists():  # by another process, meanwhile
            return
        shutil.rmtree(aside, ignore_errors=True)  # left by one that was killed
        (aside / "info").mkdir(parents=True)
        for number, who in enumerate(progress(people, "drawing", unit=" people")):
            pid = max(0, number - 2 * cameras) if who else -1  # 0: the strangers, -1: nobody
            part = "train" if 0 < pid <= identities else "test"
            where = aside / f"bbox_{part}/{pid:0>4}"
            where.mkdir(parents=True, exist_ok=True)
            cams = [number % cameras] if pid == 0 else range(cameras)
            for cam, tracklet in itertools.product(cams, (1, 2)):
                rng = np.random.default_rng([seed, 5, number, cam, tracklet])
                if tracklet == 2 and (pid < 1 or rng.random() < 0.75):
                    continue
                start = f"{pid:0>4}C{cam + 1}T{tracklet if pid else number:04}"
                first = len(names[part]) + 1
                count = rng.integers(*frames, endpoint=True)
                passer = people[1 + rng.integers(2 * cameras)]
                images = _draw_tracklet(who, passer, views[cam], count, size, occlusion, rng)
                for i, image in enumerate(images, 1):
                    names[part].append(f"{start}F{i:03}.jpg")
                    image.save(where / names[part][-1], quality=90)
                rows[part].append((first, len(names[part]), pid, cam + 1))
                if part == "test" and pid > 0 and tracklet == 1:
                    query.append(len(rows[part]))
        for part in names:
            (aside / f"info/{part}_name.txt").write_text("\n".join(names[part]) + "\n")
            _write_mat(aside / f"info/tracks_{part}_info.mat", f"track_{part}_info",
                       np.array(rows[part], np.int32))
        _write_mat(aside / "info/query_IDX.mat", "query_IDX", np.array([query], np.uint16))
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot draw the synthetic data set there "
                        f"({error.strerror or error})") from None
    finally:
        if file:
            shutil.rmtree(aside, ignore_errors=True)
            # The lock's file stays: another process may have opened it and wait for its lock, and
            # a third one would make and lock a new file beside it.
            file.close()


# ------------------------------------------------------------------------------ the command line

def _main():
    parser = Parser(
        description="Draws a synthetic data set of pedestrians in MARS' layout, or checks a set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--synthetic", metavar="DIR", type=os.path.expanduser,
                      help="folder to make; must not exist yet")
    what.add_argument("--check", action="store_true",
                      help="decode every frame of --data; exit code 1 when one is bad")
    parser.add_argument("--data", choices=DATA_SETS, default="mars", help="data set to check")
    parser.add_argument("--root", metavar="DIR", default="datasets", type=os.path.expanduser,
                        help="folder that holds the data sets, or the set itself")
    parser.add_argument("--frames", type=int, nargs=2, default=(5, 12), metavar=("MIN", "MAX"),
                        help="frames a tracklet, 1 to 999")
    numbers = {
        "identities": (64, 1, 4999, "training identities"),
        "test_identities": (20, 1, 4999, "test identities, others than those of the training"),
        "cameras": (4, 2, 9, "cameras"),
        "height": (128, 32, 1024, "height of a frame in pixels"),
        "width": (64, 8, 1024, "width of a frame in pixels, a quarter to all of the height"),
        "group": (4, 1, 4999, "people in a group who share the upper clothes"),
        "occlusion": (20, 0, 100, "percent of the tracklets with something passing in front"),
        "seed": (0, 0, 2 ** 32, "same seed, same bytes"),
    }
    for name, (default, low, high, meaning) in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N",
                            help=f"{meaning}, {low} to {high}")
    parser.add_argument("--gait", action="store_true",
                        help="people of a group differ in their way to walk only")
    args = parser.parse_args()
    if args.check:
        # the images that are missing are counted below
        dataset = load_dataset(args.data, args.root, training=False, images=False)
        print(dataset.summary())
        return check_images(dataset) > 0
    for name, (_, low, high, _) in numbers.items():
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be {low} to {high}")
    if not 1 <= args.frames[0] <= args.frames[1] <= 999:
        parser.error("--frames must be 1 <= MIN <= MAX <= 999")
    if not args.height <= 4 * args.width <= 4 * args.height:
        parser.error("--width must be a quarter to all of the height")
    draw_synthetic(args.synthetic, args.identities, args.test_identities, args.cameras,
                   args.frames, (args.height, args.width), args.group, args.occlusion / 100,
                   args.gait, args.seed)
    print(load_dataset("synthetic", args.synthetic).summary())


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        sys.exit(_main())
    except UserError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        sys.exit(130)
