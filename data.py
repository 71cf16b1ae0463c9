"""Everything between image files and training batches for video person re-identification.

The five paper scripts share: loaders for five public data sets, for your own folder and for a
synthetic set; clip sampling; decoding and augmentation; data sets of clips and batch samplers.
A batch of clips is uint8, (B, T, 3, H, W).

Everything random depends on numbers that the caller gives: batches on the seed and the epoch, a
training clip on the seed, the epoch and its position in the epoch, synthetic people on their seed.
Neither the number of workers nor the order in which they finish matters.

    python data.py --check --data mars --root DIR                          # decodes every frame
    python data.py --synthetic DIR --identities 64 --cameras 4 --seed 0    # makes a synthetic set
"""
import argparse
import bisect
import codecs
import collections
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
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# -------------------------------------------------------------------------------- errors and files

class UserError(Exception):
    """An error that the user can fix; a script prints its one line and exits with code 2."""

    def __init__(self, message):
        text = str(message).strip()
        if re.match(r"Caught \w+ in .*\nOriginal Traceback", text):
            # An error in a DataLoader worker arrives as a traceback whose last line is the message.
            text = text.rsplit("\n", 1)[-1].removeprefix("data.UserError: ")
        super().__init__(printable(text))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of exiting."""

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def printable(text) -> str:
    """The text with control characters escaped, so that a file name can neither start a new line
    nor send commands, such as a colour, to the terminal."""
    escaped = []
    for character in str(text):
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        escaped.append(character)
    return "".join(escaped)


def first_line(error: Exception) -> str:
    """The message of an exception on one line, cut to 160 characters. Without a message it is the
    name of the exception's class."""
    text = printable(" ".join(str(error).split()))[:160]
    if not text:
        return type(error).__name__
    return text


def progress(items=None, what: str = "", total: int = None, *, unit: str, hidden: bool = False,
             **tqdm_options):
    """Shows the progress of long work: a tqdm bar on a terminal, and elsewhere (a cluster's log,
    nohup) a line about once a minute.

    It is used like tqdm: iterate over it, or call `update` inside a `with` block.

    Args:
        items: iterable to go through; None if `update` is called instead.
        what: name of the work.
        total: number of items; by default len(items).
        unit: name of an item, with a leading space.
        hidden: True shows nothing, for processes other than the first.
        tqdm_options: further options of the tqdm bar.
    """
    if hidden or sys.stderr.isatty():
        return tqdm(items, desc=what, total=total, unit=unit, disable=hidden, **tqdm_options)
    if total is None:
        total = len(items)
    return ProgressLines(items, what, total, unit)


class ProgressLines:
    """Prints about once a minute how much work is done and how long the rest is likely to take.

    Args:
        items, what, total, unit: as in `progress`, which makes the object.
    """

    def __init__(self, items, what, total, unit):
        self.items = items
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self.start = monotonic()
        self.printed = self.start

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __iter__(self):
        for item in self.items:
            yield item
            self.update()

    def update(self, count: int = 1):
        """Adds `count` finished items."""
        self.done += count
        now = monotonic()
        if now - self.printed >= 60 and 0 < self.done < self.total:
            self.printed = now
            elapsed = now - self.start
            left = elapsed * (self.total - self.done) / self.done
            print(f"{self.what}: {self.done:,} of {self.total:,}{self.unit}, "
                  f"{tqdm.format_interval(elapsed)} elapsed, "
                  f"about {tqdm.format_interval(left)} left", flush=True)

    def set_postfix(self, **_):
        """Ignores the loss that a tqdm bar would show; the line printed after each epoch has it."""


def last_line(error):
    """The last line of an exception's message, without terminal colours. Torch puts the reason
    there, after pages of advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[-1].startswith("Check the documentation"):
        lines.pop()  # torch.load gives the reason in the line before this advice
    if not lines:
        return type(error).__name__
    return first_line(lines[-1])


@contextlib.contextmanager
def replacing(path):
    """Context manager that opens a temporary binary file. This replaces `path` once it is
    completely on disk.

    Raises UserError if it cannot be written; the previous file is unchanged then.
    """
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C, too, leaves no partial file
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = error
        # on a full disk, torch.save raises a RuntimeError while handling the OSError
        if isinstance(error, RuntimeError):
            cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        hint = ""
        if os.path.exists(path):
            hint = "; the previous file is unchanged"
        raise UserError(f"{path}: cannot be written ({first_line(cause)}){hint}") from None


def locked(path: Path, text: str = "", wait: bool = False):
    """Opens a file that is locked for this process until it closes the file or ends.

    Args:
        path: the file, which is made if it does not exist.
        text: its new contents.
        wait: True waits while another process has the lock; False raises UserError then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
        if not _lock(file, wait):
            raise UserError(f"{path.parent}: another run is writing there")
        file.truncate(0)
        print(text, file=file, flush=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None
    return file


def _lock(file, wait):
    """Tries to lock an open file. Returns False if another process holds the lock, and True
    otherwise, also on Windows and on file systems without such locks, where nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return True
    flags = fcntl.LOCK_EX
    if not wait:
        flags |= fcntl.LOCK_NB
    try:
        fcntl.lockf(file, flags)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def save_rows(rows: list, path):
    """Writes dicts to a CSV file; the keys of the first are its header. Writes nothing if the list
    is empty."""
    if not rows:
        return
    with replacing(path) as file:
        # "surrogateescape", because file names are not always valid UTF-8
        writer = csv.writer(codecs.getwriter("utf-8")(file, "surrogateescape"))
        writer.writerow(rows[0].keys())
        for row in rows:
            writer.writerow(row.values())


def _numpy_scalar(module):
    """Returns a safe substitute for NumPy's `scalar`, the function that a pickle calls to rebuild a
    NumPy number. The substitute builds only numbers, never objects. `module` is the module under
    which the pickle looks it up."""
    def scalar(dtype, content):
        return np.frombuffer(content, dtype)[0]
    scalar.__module__ = module
    scalar.__qualname__ = scalar.__name__
    return scalar


# the globals that a checkpoint may use besides tensors: those of NumPy's numbers, of the kinds
# float, int, uint and bool
SAFE_NUMPY_GLOBALS = [
    np.dtype,
    _numpy_scalar("numpy.core.multiarray"),   # before NumPy 2
    _numpy_scalar("numpy._core.multiarray"),  # since NumPy 2
]
SAFE_NUMPY_GLOBALS += [type(np.dtype(code)) for code in "fdeilqhbIBLQH?"]


def load_file(path) -> dict:
    """Loads a dict that torch.save has written, as a zip file or in the older format, to the CPU.

    The file may hold tensors and NumPy numbers; no code in it is run. Unlike torch.load, this
    verifies the checksums of a zip file. The result is {} if the file holds anything but a dict.
    Raises UserError if the file is missing or damaged, or holds other objects.
    """
    damaged = None
    state = {}
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if not start.startswith((b"PK", b"\x80")):  # neither a zip file nor a pickle
            raise ValueError(f"torch.save writes no file that begins with {start!r}")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # the name of the first damaged entry, or None
        if damaged is None:
            with torch.serialization.safe_globals(SAFE_NUMPY_GLOBALS):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path or '(an empty name)'}: no such file") from None
    except Exception as error:  # a damaged file raises many kinds
        raise UserError(f"{path}: not a readable checkpoint ({last_line(error)})") from None
    if damaged is not None:
        raise UserError(f"{path}: the file is damaged: the checksum of its entry {damaged} is "
                        "wrong")
    if not isinstance(state, dict):
        return {}
    return state


# ---------------------------------------------------------------------------------------- data sets

class Tracklet(NamedTuple):
    """The frames of one person under one camera, in temporal order.

    Args:
        frames: paths of the frames. `extract` of common.py also takes the frames themselves, uint8
            arrays (H, W, 3); a `Dataset` does not.
        pid: identity. In `train` it is a label 0..n-1 for the classifier. In `query` and `gallery`
            it is a number of the test set; 0 is a distractor, which only MARS and the synthetic
            set have.
        cam: number of the camera.
    """
    frames: tuple
    pid: int
    cam: int


class Dataset(NamedTuple):
    """A data set: its name and three lists of `Tracklet`.

    The labels of `train` are 0..n-1 in the sorted order of the original identities. They have
    nothing to do with the identities of `query` and `gallery`, which are other people.
    """
    name: str
    train: list
    query: list
    gallery: list

    @property
    def num_identities(self):
        """The number of training identities, which are the classes of the classifier."""
        return 1 + max((t.pid for t in self.train), default=-1)

    def ids(self):
        """Four arrays: query pids, query cameras, gallery pids, gallery cameras."""
        query_pids = np.array([t.pid for t in self.query])
        query_cams = np.array([t.cam for t in self.query])
        gallery_pids = np.array([t.pid for t in self.gallery])
        gallery_cams = np.array([t.cam for t in self.gallery])
        return [query_pids, query_cams, gallery_pids, gallery_cams]

    def has_a_match(self):
        """Whether any query has a match: a gallery tracklet of its identity under another camera.
        Without one there is nothing to rank."""
        cameras = collections.defaultdict(set)
        for t in self.gallery:
            cameras[t.pid].add(t.cam)
        return any(cameras[query.pid] - {query.cam} for query in self.query)

    def summary(self):
        """A table of the three subsets, ready to print."""
        lines = [f"{self.name:8} identities  tracklets  cameras     frames"
                 "   per tracklet: min   mean  max"]
        for subset in ("train", "query", "gallery"):
            tracklets = getattr(self, subset)
            if not tracklets:
                lines.append(f"  {subset:7}         -")
                continue
            lengths = [len(t.frames) for t in tracklets]
            # In `train` the pid 0 is an identity; elsewhere it marks the distractors.
            pids = {t.pid for t in tracklets if t.pid > 0 or subset == "train"}
            cams = {t.cam for t in tracklets}
            lines.append(f"  {subset:7}{len(pids):10,}{len(tracklets):11,}{len(cams):9}"
                         f"{sum(lengths):11,}{min(lengths):20}"
                         f"{sum(lengths) / len(lengths):7.1f}{max(lengths):5}")
        cameras_of = collections.defaultdict(set)
        for t in self.train:
            cameras_of[t.pid].add(t.cam)
        single = sum(len(cameras) == 1 for cameras in cameras_of.values())
        if single:
            lines.append(f"  {single:,} training identities are seen by one camera only")
        shared = {t.frames[0] for t in self.query} & {t.frames[0] for t in self.gallery}
        distractors = sum(t.pid == 0 for t in self.gallery)
        lines.append(f"  the gallery holds {len(shared):,} of the query tracklets and "
                     f"{distractors:,} distractors; a query is not compared with its own identity "
                     "under its own camera")
        return "\n".join(lines)


# The default of --chunk, 0 for the other data sets. A script may replace it in its RELEASE, whether
# or not --release is given.
CHUNK = {"duke": 32, "lsvid": 64}
PRID_PERSONS = 178  # the number of persons that the published splits of PRID-2011 divide
NO_MATCH = ("no query has a match, that is, a gallery tracklet of its identity under another "
            "camera (to rank the tracklets of a single camera, give each query tracklet a camera "
            "name that no other tracklet has)")


def load_dataset(name: str, root, split: int = 0, chunk: int = 0, *, training: bool = True,
                 images: bool = True) -> Dataset:
    """Reads the index of a data set in `root`/`name`, or in `root` itself.

    Prints a warning for what is unusual but usable. It is not thread-safe: the warnings of
    concurrent calls would be mixed.

    Args:
        name: one of DATA_SETS, the table after the loaders.
        root: the folder that holds the folder `name`, or the data set's own folder.
        split: number of the split of "ilids" and "prid" into training and test, 0 to 9.
        chunk: training tracklets are cut into pieces of this many frames, the last of which also
            takes the remainder; 0 keeps the tracklets whole.
        training: whether a network will be trained on the data set. If so, a "synthetic" set that
            is missing is made, "folder" needs its subfolder `train`, and "mars" its `bbox_train`.
        images: whether the frames will be read. If so, the first frame of every tracklet must
            exist, of the training ones only if `training` is True. False is for work with the index
            alone. For the sets without an index of their frames, "duke", "lsvid", "ilids" and
            "prid", the frames of both parts must be there in any case.

    Raises UserError if a file is missing or the files contradict each other.
    """
    source = DATA_SETS[name]
    folder = Path(root) / name
    options = {"split": split, "training": training, "images": images}
    options = {option: options[option] for option in source.options}
    _warnings.clear()
    try:
        if not folder.is_dir() and source.is_in(root):
            folder = Path(root)  # root is the data set's own folder
        if name == "synthetic" and training and not folder.exists():
            print(f"drawing the synthetic data set into {printable(folder)} (once)", flush=True)
            draw_synthetic(folder)
        if not folder.is_dir():
            raise UserError(_not_found_message(name, root))
        dataset = source.load(folder, name, **options)
        if images:
            used = [dataset.query, dataset.gallery]
            if training:
                used.insert(0, dataset.train)
            _check_first_frames(folder, used)
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where}: cannot be read ({error.strerror or error})") from None
    finally:  # also before an error, which the warnings may explain
        for warning, places in _warnings.items():
            print(f"warning: {printable(places[0])}: {warning} ({len(places):,} in all)",
                  flush=True)
    for subset, expected in zip(("train", "query", "gallery"), source.counts):
        found = len(getattr(dataset, subset))
        needed = training or subset != "train"
        if needed and not found:
            raise UserError(f"{folder}: no {subset} tracklets")
        if expected is not None and expected != found:
            print(f"warning: {printable(folder)}: {expected:,} {subset} tracklets expected, "
                  f"{found:,} found")
    if not dataset.has_a_match():
        if name != "folder":
            raise UserError(f"{folder}: no query has a match, that is, a gallery tracklet of its "
                            "identity under another camera")
        consequence = "the training runs without a test" if training else "nothing can be ranked"
        print(f"warning: {printable(folder)}: {NO_MATCH}; {consequence}", flush=True)
    if chunk:
        pieces = []
        for tracklet in dataset.train:
            pieces += _pieces(tracklet, chunk)
        dataset = dataset._replace(train=pieces)
    return dataset


def _pieces(tracklet, length):
    """The tracklet cut into pieces of `length` frames; the last one also has the remainder."""
    frames = tracklet.frames
    pieces = []
    for start in range(0, max(1, len(frames) - length + 1), length):
        pieces.append(tracklet._replace(frames=frames[start:start + length]))
    pieces[-1] = tracklet._replace(frames=frames[start:])
    return pieces


# what is missing in a data set

def _not_found_message(name, root):
    """The error message for a root that does not hold the data set `name`."""
    source = DATA_SETS[name]
    here = os.path.abspath(root)
    if not os.path.exists(here):
        message = f"{here}: no such folder;"
    elif not os.path.isdir(here):
        message = f"{here}: not a folder;"
    else:
        message = f"{here}: holds neither a folder {name} nor the data set itself;"
        inner = [f"{here}/{entry}" for entry in sorted(os.listdir(here))]
        candidates = [folder for folder in inner if source.is_in(folder)]
        if candidates:
            message += f" did you mean --root {candidates[0]}?"
    message += (f" --root names the folder that holds {name}/, or the data set itself, which has "
                f"the folders {', '.join(source.folders)}")
    if name == "synthetic":
        message += "; only a training run or data.py --synthetic makes the synthetic set"
    return message


def _check_layout(folder, wanted, layout):
    """Raises UserError if one of the `wanted` paths in a data set's folder is missing. `layout`
    describes in the message what the folder should hold."""
    missing = [path for path in wanted if not (folder / path).exists()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}; this folder should hold {layout}"
                        + _archive_hint(folder))


def _check_first_frames(folder, parts):
    """Raises UserError if the first frame of any tracklet is missing: an incomplete copy is found
    in seconds, and not after hours of training."""
    firsts = dict.fromkeys(t.frames[0] for part in parts for t in part)
    missing = [frame for frame in firsts if not _exists(frame)]
    if missing:
        raise UserError(f"{folder}: {len(missing):,} of {len(firsts):,} tracklets lack their first "
                        f"frame, such as {missing[0]}{_missing_frame_hint(folder, missing[0])}")


def _exists(path):
    """Like os.path.exists, but a missing permission raises PermissionError instead of counting as a
    missing file."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _missing_frame_hint(folder, frame):
    """A guess why a frame of a data set is missing, to end a message with; it may be empty."""
    parts = os.path.relpath(frame, folder).split(os.sep)
    top = parts[0]
    image = parts[-1]
    if os.path.islink(frame):
        return ", which is a broken symbolic link"
    if os.path.isdir(f"{folder}/{top}/{top}"):
        return f"; the images seem to be in {folder}/{top}/{top}: move them one folder up"
    if os.path.exists(f"{folder}/{top}/{image}"):
        return f"; the images are in {folder}/{top} itself, not in a folder for each identity"
    archive = _archive_hint(folder, folder / top)
    if archive:
        return archive
    if not os.listdir(folder / top):
        return f"; {folder / top} is empty"
    return ""


def _archive_hint(*folders):
    """Returns a hint that names an archive in these folders that may not have been unpacked; it is
    empty if there is none."""
    endings = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".rar", ".7z")
    for folder in filter(os.path.isdir, folders):
        for name in sorted(os.listdir(folder)):
            if name.lower().endswith(endings):
                return f"; {folder}/{name} seems not to have been unpacked"
    return ""


def _similar_names_hint(folder, start=""):
    """Returns the end of a message that says what is missing in a folder. It names what is there
    instead, counting only names that begin with `start`, and is empty if there is nothing."""
    names = sorted(name for name in os.listdir(folder) if name.startswith(start))
    if not names:
        return ""
    return f", but other files or folders, such as {names[0]} ({len(names):,} in all)"


# names of files and folders

_warnings = {}  # {warning: the places that it is about}; load_dataset clears and prints it


def _warn(warning, *places):
    """Collects the places of a warning. load_dataset prints each warning once, with the first of
    its places and their number."""
    if places:
        _warnings.setdefault(warning, []).extend(places)


def natural_key(name):
    """A sort key that compares the numbers in a name by value: F2 comes before F10."""
    parts = re.split(r"(\d+)", str(name))
    parts[1::2] = [int(number) for number in parts[1::2]]
    return parts, str(name)


_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # skipped without a warning, like hidden files
_NAME_MISMATCH = "the file name and its folder disagree on the person or the camera"
_WITHOUT_DIGITS = str.maketrans("", "", "0123456789")
# A decimal number, such as 12.25 or 12,25, but no part of a longer chain, such as the date 2020.1.2
# or the version 1.10.2.
_DECIMAL = re.compile(r"""
    (?<!\d)             # no digit stands before it,
    (?<!\d[.,])         # nor a digit and a dot;
    (\d+)[.,](\d+)
    (?![.,]?\d)         # no digit follows, with or without a dot before it
    """, re.VERBOSE)
_NUMBER = re.compile(rf"{_DECIMAL.pattern}|(\d+)", re.VERBOSE)  # or a whole number


def _listing(folder):
    """Returns the names in a folder and the set of those that are symbolic links."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_symlink()) for entry in entries]
    names = [name for name, _ in found]
    links = {name for name, is_link in found if is_link}
    return names, links


def _names(folder):
    """The sorted names in a folder without hidden and system files. Broken symbolic links are
    ignored with a warning."""
    names, links = _listing(folder)
    names = sorted(n for n in names if n[0] != "." and n.lower() not in _SYSTEM_FILES)
    broken = {name for name in links if not os.path.exists(f"{folder}/{name}")}
    _warn("this broken symbolic link is ignored",
          *[f"{folder}/{name}" for name in names if name in broken])
    return [name for name in names if name not in broken]


def _folders(folder):
    """The names of the folders in a folder, in natural order. Warns of files."""
    names = _names(folder)
    folders = {name for name in names if os.path.isdir(f"{folder}/{name}")}
    for name in names:
        if name not in folders:
            kind = "image" if name.lower().endswith(_IMAGE_SUFFIXES) else "file"
            _warn(f"this {kind} next to the folders is ignored", f"{folder}/{name}")
    return sorted(folders, key=natural_key)


def _images(folder):
    """The sorted names of the images in a folder. Warns of everything else."""
    names = _names(folder)
    images = [name for name in names if name.lower().endswith(_IMAGE_SUFFIXES)]
    if len(images) < len(names):
        others = [name for name in names if not name.lower().endswith(_IMAGE_SUFFIXES)]
        _warn("this is not a .jpg, .jpeg or .png file and is ignored",
              *[f"{folder}/{name}" for name in others])
    return images


def _frames(folder, names):
    """The paths of a tracklet's frames in temporal order, which is that of the numbers in their
    names. A number such as 12.25 is read as a decimal number, for example a time in seconds, unless
    the names show that the digits after the dot are a counter. Warns if the names of the tracklet
    differ in more than their numbers.
    """
    # Only what follows the common prefix is compared; the prefix must not end inside a number.
    start = len(os.path.commonprefix(names).rstrip("0123456789.,"))
    ordered = sorted(names, key=lambda name: natural_key(name[start:]))
    if re.search(r"\d[.,]\d", "\n".join(names)):
        by_time = sorted(names, key=lambda name: _decimal_key(name[start:]))
        if by_time != ordered:
            decimal, sure = _are_decimals([name[start:] for name in names])
            if not sure:
                _warn("the numbers in the file names may be decimals or counters; they are read as "
                      "decimals, so that .25 comes before .5", f"{folder}/{by_time[0]}")
            if decimal:
                ordered = by_time
        forms = [_NUMBER.sub("", name) for name in ordered]
    else:
        forms = [name.translate(_WITHOUT_DIGITS) for name in ordered]
    others = [name for name, form in zip(ordered, forms) if form != forms[-1]]
    if others:
        _warn("the file name differs from that of the tracklet's last frame in more than its "
              "numbers", f"{folder}/{others[0]}")
    return tuple([f"{folder}/{name}" for name in ordered])


def _decimal_key(name):
    """A sort key that reads 12.25 as a decimal number, so that it comes before 12.5. A chain, such
    as 1.2.25, is not a decimal number."""
    key = []  # text, number before the dot, digits after it, text, ...
    text_start = 0
    for number in _NUMBER.finditer(name):
        before_dot, after_dot, whole = number.groups()
        key.append(name[text_start:number.start()])
        if whole is not None:
            key += [int(whole), ""]
        else:
            key += [int(before_dot), after_dot.rstrip("0")]
        text_start = number.end()
    key.append(name[text_start:])
    return key, name


def _are_decimals(names):
    """Whether the digits after the dots in these names are decimals, and not a counter, as in a.1
    to a.10. Returns (decimal, sure). When the names do not settle it, this is (True, False)."""
    endings = {found[2] for name in names for found in _DECIMAL.finditer(name)}
    shortest = min(map(len, endings), default=0)
    # Digits of unequal lengths are either decimals without trailing zeros (.05, .5) or a counter
    # without padding (.5, .10). A leading zero in one of the longer ones speaks for decimals, a
    # trailing zero in one of several digits for a counter.
    looks_decimal = any(len(digits) > shortest and digits[0] == "0" for digits in endings)
    looks_counted = any(len(digits) > 1 and digits[-1] == "0" for digits in endings)
    if looks_decimal == looks_counted:
        return True, False
    return looks_decimal, True


def _tracklets_below(folder, depth, layout, parents=()):
    """Yields (names, paths of the frames) for each tracklet. Its folder is `depth` levels below
    `folder`, and `names` are the names of the folders on these levels, its own the last. `layout`
    describes in an error message what is expected. `parents` has the names of the levels that the
    recursion has already passed.
    """
    if depth == 0:
        names = _images(folder)
        if not names:
            raise UserError(f"{folder}: no images in it{_similar_names_hint(folder)}; expected "
                            f"{layout} (.jpg, .jpeg or .png files)")
        yield parents, _frames(folder, names)
        return
    names = _folders(folder)
    if not names:
        raise UserError(f"{folder}: no folders in it{_similar_names_hint(folder)}; expected "
                        f"{layout}")
    for name in names:
        yield from _tracklets_below(f"{folder}/{name}", depth - 1, layout, (*parents, name))


# from names to numbers

def _names_to_numbers(*parts, field, first):
    """Returns the parts, lists of tracklets, with the names in `field` ("pid" or "cam") replaced by
    numbers. The names of all parts are numbered together, from `first` on and in natural order."""
    names = {getattr(t, field) for part in parts for t in part}
    number_of = {name: i for i, name in enumerate(sorted(names, key=natural_key), first)}
    numbered = []
    for part in parts:
        numbered.append([t._replace(**{field: number_of[getattr(t, field)]}) for t in part])
    return numbered


def _numbered_dataset(name, train, query, gallery):
    """The data set with numbers for the names of identities: from 0 in `train`, as the labels of
    the classifier, and from 1 in `query` and `gallery`, where 0 would be a distractor."""
    (train,) = _names_to_numbers(train, field="pid", first=0)
    query, gallery = _names_to_numbers(query, gallery, field="pid", first=1)
    return Dataset(name, train, query, gallery)


def _query_tracklets(table, variable, tracklet_of):
    """Returns the query tracklets. `table` is the file with their numbers; `tracklet_of` maps the
    numbers that belong to persons to their tracklets."""
    numbers = _read_table(table, variable).ravel().tolist()
    for number, count in collections.Counter(numbers).items():
        if number not in tracklet_of or count > 1:
            raise UserError(f"{table}: {number} is not the number of a person's tracklet, or "
                            "occurs twice")
    return [tracklet_of[number] for number in numbers]


def _read_table(path, variable, columns=None):
    """Reads a matrix of whole numbers, int64, from a .mat file of MATLAB 7.3 (HDF5) or earlier.

    `columns` is the number of columns that the matrix should have. MATLAB stores matrices
    transposed in HDF5, and other programs may not. Without MATLAB's attribute MATLAB_class, the
    matrix is transposed only if it does not have `columns` columns already.
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
        raise UserError(f"{path}: not a readable .mat file with {variable} ({first_line(error)})"
                        ) from None
    all_whole = False
    if values.dtype.kind in "iuf":
        in_range = abs(values) < 2 ** 53  # a float64 holds every whole number up to here
        all_whole = (in_range & (values == np.rint(values))).all()
    if not all_whole:
        raise UserError(f"{path}: {variable} is not a matrix of whole numbers")
    return values.astype(np.int64)


# the loaders

def load_mars(folder: Path, name: str = "mars", *, training: bool = True,
              images: bool = True) -> Dataset:
    """MARS (Zheng et al., ECCV 2016). Only its official lists are read; no image is opened.

    Of the 12,180 test tracklets the 870 junk ones (pid -1, false detections) are dropped and the
    3,248 distractors (pid 0) are kept. The pids -1 and 0 have these meanings only in MARS and in
    the synthetic set. The gallery consists of 9,330 tracklets and the 1,980 queries: without the
    queries in it 140 of them would have no match. MARS has 6 cameras and 625 training identities.

    Args:
        folder: holds bbox_train, bbox_test and info.
        name: name of the data set.
        training: False allows bbox_train to be missing.
        images: False allows both folders of images to be missing.
    """
    wanted = ["info/train_name.txt", "info/test_name.txt", "info/tracks_train_info.mat",
              "info/tracks_test_info.mat", "info/query_IDX.mat"]
    if images:
        wanted.insert(0, "bbox_test")
    if images and training:
        wanted.insert(0, "bbox_train")
    _check_layout(folder, wanted, "bbox_train/0001/*.jpg, bbox_test/0000/*.jpg and info/*, which "
                  "is the folder info of MARS-evaluation")
    persons = [t for t in _mars_part(folder, "train") if t.pid > 0]
    (train,) = _names_to_numbers(persons, field="pid", first=0)
    test = _mars_part(folder, "test")
    tracklet_of = {number: t for number, t in enumerate(test, 1) if t.pid > 0}
    query = _query_tracklets(folder / "info/query_IDX.mat", "query_IDX", tracklet_of)
    gallery = [t for t in test if t.pid >= 0]
    return Dataset(name, train, query, gallery)


def _mars_part(folder, part):
    """All tracklets of `part`, "train" or "test", with the pids of MARS.

    A row of the table is a tracklet: (first line, last line, pid, camera). The lines are those of
    the list of file names, and the first of all is line 1.
    """
    table = folder / f"info/tracks_{part}_info.mat"
    list_file = folder / f"info/{part}_name.txt"
    names = list_file.read_text("utf-8-sig", "replace").split()
    rows = _read_table(table, f"track_{part}_info", columns=4)
    if rows.shape[1:] != (4,):
        raise UserError(f"{table}: found shape {rows.shape}, not rows of four numbers")
    well_formed = re.compile(r"(\d+|0*-1)C\d+T\d+F\d+\.jpg").fullmatch
    unused_lines = set(range(1, len(names) + 1))  # no row so far has used them
    tracklets = []
    for number, (first, last, pid, cam) in enumerate(rows.tolist(), 1):
        lines = range(first, last + 1)
        if not lines or not unused_lines.issuperset(lines):
            raise UserError(f"{table}: row {number} refers to lines {first} to {last} of "
                            f"{list_file.name}, some of which do not exist or belong to another "
                            "row")
        unused_lines.difference_update(lines)
        frames = names[first - 1:last]
        person = f"{pid:0>4}"  # 0001, 0000 for distractors, 00-1 for junk
        pid_in_name = frames[0].partition("C")[0]
        if pid_in_name and pid_in_name.lstrip("0") == person.lstrip("0"):
            # the list may pad the pid with another number of zeros, as sets of five-digit pids do
            person = pid_in_name
        prefix = f"{person}C{cam}T"
        for line, frame in enumerate(frames, first):
            if not (frame.startswith(prefix) and well_formed(frame)):
                raise UserError(f"{list_file}: line {line} is {frame[:60]!r}, but row {number} of "
                                f"{table.name} needs a file name like {prefix}0001F001.jpg")
        mixed = frames[0].split("F")[0] != frames[-1].split("F")[0]
        if mixed or sorted(set(frames)) != frames:
            _warn("the row's frames belong to several tracklets or are not in temporal order",
                  f"{table}: row {number}")
        folder_of_person = f"{folder}/bbox_{part}/{person}/"
        paths = tuple([folder_of_person + frame for frame in frames])
        tracklets.append(Tracklet(paths, pid, cam))
    _warn(f"no row of {table.name} refers to this line",
          *[f"{list_file}: line {line}" for line in sorted(unused_lines)])
    return tracklets


_DUKE_NAME = re.compile(r"""
    (\d*)_?             # the number of the person, which may be missing
    (?<![A-Z])C(\d+)    # the camera, such as C6; no letter stands directly before the C
    (?:\D.*?)??         # other fields, such as T0001
    F\d                 # the frame, such as F0099
    """, re.IGNORECASE | re.VERBOSE)


def load_duke(folder: Path, name: str = "duke") -> Dataset:
    """DukeMTMC-VideoReID (Wu et al., CVPR 2018): {train,query,gallery}/<pid>/<tracklet>/*.jpg.

    The set has 8 cameras. A file name holds the camera and the frame, as 0001C6F0099X30823.jpg and
    0001_C6_F0099_X30823.jpg do. Other fields may stand between the two, as in the names of MARS,
    0001C6T0001F0099.jpg. The queries are not in the gallery.
    """
    layout = "{train,query,gallery}/<pid>/<tracklet>/*.jpg"
    _check_layout(folder, ("train", "query", "gallery"), layout)
    train = _duke_part(folder / "train", layout)
    query = _duke_part(folder / "query", layout)
    gallery = _duke_part(folder / "gallery", layout)
    return _numbered_dataset(name, train, query, gallery)


def _duke_part(folder, layout):
    """The tracklets of one of Duke's three folders. Their pids are still names, those of the
    folders."""
    tracklets = []
    for (pid, _), frames in _tracklets_below(folder, 2, layout):
        cam = None
        for frame in frames:
            fields = _DUKE_NAME.search(os.path.basename(frame))
            if not fields:
                raise UserError(f"{frame}: no camera and frame number in the file name; expected a "
                                "name like 0001C6F0099X30823.jpg, camera 6 and frame 99")
            if cam is not None and cam != int(fields[2]):
                raise UserError(f"{frame}: the file name says camera {fields[2]}, but the earlier "
                                f"frames of this tracklet are of camera {cam}")
            if fields[1] not in ("", pid):
                _warn(_NAME_MISMATCH, frame)
            cam = int(fields[2])
        tracklets.append(Tracklet(frames, pid, cam))
    return tracklets


def load_lsvid(folder: Path, name: str = "lsvid") -> Dataset:
    """LS-VID (Li et al., ICCV 2019): text lists of tracklets, and an HDF5 table of the queries.

    The set has 15 cameras. A line of list_sequence/list_seq_{train,test}.txt is
    "<path prefix> <pid>". The frames of the tracklet are the files with that prefix; the third
    field of their names is the camera. The gallery contains the queries, as in MARS.
    """
    train_list = "list_sequence/list_seq_train.txt"
    test_list = "list_sequence/list_seq_test.txt"
    query_table = "test/data/info_test.mat"
    wanted = [train_list, test_list, query_table]
    _check_layout(folder, wanted, f"{', '.join(wanted)} and the frames")
    images = functools.cache(_images)  # the tracklets of a person are in one folder
    used_frames = set()
    train = _lsvid_part(folder, folder / train_list, images, used_frames)
    test = _lsvid_part(folder, folder / test_list, images, used_frames)
    query = _query_tracklets(folder / query_table, "query", dict(enumerate(test, 1)))
    return _numbered_dataset(name, train, query, test)


def _lsvid_part(folder, list_file, images, used_frames):
    """The tracklets of a list of LS-VID. `images` lists the images of a folder; `used_frames` are
    the frames of all tracklets so far, and those of the new ones are added to it."""
    tracklets = []
    text = list_file.read_text("utf-8-sig", "replace").rstrip()
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{list_file}: line {number}"
        try:
            prefix, pid = line.split()
            pid = int(pid)
        except ValueError:
            raise UserError(f"{where}: expected '<path prefix> <pid>', found {line[:80]!r}"
                            ) from None
        path = folder / prefix.replace("\\", "/")
        start = path.name
        try:
            names = _names_with_prefix(images(path.parent), start)
        except (OSError, ValueError):  # ValueError: a path with a null byte
            names = []
        if not names:
            hint = _similar_names_hint(path.parent, start) if path.parent.is_dir() else ""
            raise UserError(f"{where}: no frames start with {path}{hint}")
        cam = _lsvid_camera(names)
        if cam is None:
            raise UserError(f"{where}: the file names that start with {path} must all have the "
                            "same camera number as their third field")
        frames = _frames(path.parent, names)
        if not used_frames.isdisjoint(frames):
            raise UserError(f"{where}: frames of {start} are also in another line")
        used_frames.update(frames)
        tracklets.append(Tracklet(frames, pid, cam))
    return tracklets


def _names_with_prefix(names, start):
    """Returns the names in a sorted list that begin with `start`. A number at its end must be
    complete: ..._1 does not match ..._10. The search is by bisection, as a folder can hold 5,000
    names."""
    first = bisect.bisect_left(names, start)
    end = bisect.bisect_left(names, start + "\U0010ffff")  # the last of all characters
    found = names[first:end]
    if start[-1:].isdecimal():
        found = [name for name in found if not name[len(start)].isdecimal()]
    return found


def _lsvid_camera(names):
    """The camera in the third field of these file names; None if it is not one and the same."""
    try:
        cams = {int(name.split("_")[2]) for name in names}
    except (IndexError, ValueError):
        return None
    if len(cams) > 1:
        return None
    return cams.pop()


def load_ilids(folder: Path, name: str = "ilids", *, split: int = 0) -> Dataset:
    """iLIDS-VID (Wang et al., ECCV 2014): i-LIDS-VID/sequences/cam{1,2}/person*/*.png.

    The queries are of camera 1, and the gallery is of camera 2.

    Args:
        folder: holds i-LIDS-VID and the folder of the splits.
        name: name of the data set.
        split: row of the matrix `ls_set`, 0 to 9. A row is a permutation of the persons' numbers,
            from 1 in the order of the sorted folders, and its first half is the test set.
    """
    cams = [f"i-LIDS-VID/sequences/cam{cam}" for cam in (1, 2)]
    table = "train-test people splits/train_test_splits_ilidsvid.mat"
    _check_layout(folder, [*cams, table],
                  f"i-LIDS-VID/sequences/cam{{1,2}}/person*/*.png and {table}")
    tracks = _two_camera_tracks(folder, cams, min_frames=1)
    for person, pair in tracks.items():
        for cam, frames in enumerate(pair, 1):
            mismatched = [frame for frame in frames if f"/cam{cam}_{person}_" not in frame]
            _warn(_NAME_MISMATCH, *mismatched)
    train, test = _split_of_table(folder / table, split, list(tracks),
                                  "persons with images under both cameras")
    return _two_camera_dataset(name, tracks, train, test)


def load_prid(folder: Path, name: str = "prid", *, split: int = 0) -> Dataset:
    """PRID-2011 (Hirzer et al., SCIA 2011): multi_shot/cam_{a,b}/person_NNNN/*.png.

    Only the numbers 1 to 200 are the same person under both cameras; a larger one is one person
    under camera a and another one under camera b. The data set uses the 178 of these 200 persons
    who have at least 27 frames under both cameras. (Wang et al., ECCV 2014, write "more than 21"
    frames, which would admit up to 183 persons, but their splits divide 178.) The queries are of
    camera a, and the gallery is of camera b.

    The splits are read from splits_prid2011.json, a list of {"train": [...], "test": [...]}, or
    from train_test_splits_prid.mat, which comes with the archive of iLIDS-VID. Either file is
    looked for next to multi_shot and one folder up. Without them ten splits are drawn with a fixed
    seed.

    Args:
        folder: holds multi_shot.
        name: name of the data set.
        split: number of the split, 0 to 9.
    """
    cams = ["multi_shot/cam_a", "multi_shot/cam_b"]
    _check_layout(folder, cams, "multi_shot/cam_{a,b}/person_0001/*.png")
    tracks = {}
    for person, pair in _two_camera_tracks(folder, cams, min_frames=27).items():
        number = re.fullmatch(r"person_(\d+)", person)
        if not number:
            _warn("this folder is ignored, because its name is not like person_0001",
                  f"{folder / cams[0]}/{person}")
        elif 1 <= int(number[1]) <= 200:
            tracks[person] = pair
    description = "persons 1 to 200 with at least 27 frames under both cameras"
    one_up = Path(os.path.abspath(folder)).parent  # where torchreid keeps the file of the splits
    names = ("splits_prid2011.json", "train_test_splits_prid.mat")
    candidates = [place / file for file in names for place in (folder, one_up)]
    files = [file for file in candidates if file.exists()]
    if files and files[0].suffix == ".mat":
        train, test = _split_of_table(files[0], split, list(tracks), description)
        return _two_camera_dataset(name, tracks, train, test)
    if files:
        path = files[0]
    else:
        path = folder / "drawn_splits_prid.json"
        print(f"warning: neither {' nor '.join(names)} is in {printable(folder)} or one folder up: "
              f"split {split} is one of ten drawn with a fixed seed, not one of the published ones",
              flush=True)
    try:
        if path.exists():
            splits = json.loads(path.read_text("utf-8-sig", "replace"))
        else:
            splits = _draw_splits(path, list(tracks))
        train = splits[split]["train"]
        test = splits[split]["test"]
        counts = collections.Counter([*train, *test])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a JSON list whose entry {split} is like "
                        f'{{"train": [...], "test": [...]}} ({error})') from None
    for person, count in counts.items():
        if person not in tracks or count > 1:
            raise UserError(f"{path}: split {split} names {str(person)[:60]!r}, who is listed "
                            f"twice or is not one of the {description}")
    return _two_camera_dataset(name, tracks, train, test)


def _draw_splits(path, persons):
    """Draws ten random splits of PRID's persons into halves. They are saved to `path` if no person
    is missing, so that they do not change with the version of NumPy."""
    rng = np.random.default_rng(0)
    half = len(persons) // 2
    orders = [rng.permutation(persons).tolist() for _ in range(10)]
    splits = [{"train": sorted(order[:half]), "test": sorted(order[half:])} for order in orders]
    if len(persons) == PRID_PERSONS:
        try:
            with replacing(path) as file:
                file.write(json.dumps(splits, indent=1).encode() + b"\n")
        except UserError as error:
            print(f"warning: {error}; the splits are not saved, but the next run draws the same "
                  "ones")
    return splits


def _split_of_table(table, split, persons, description):
    """Returns the training persons and the test persons by row `split` of the matrix `ls_set`.

    The row is a permutation of the numbers of the sorted persons, from 1, and its first half is the
    test set. `description` says in an error message who the persons are.
    """
    rows = _read_table(table, "ls_set", columns=len(persons))
    numbers = rows[split:split + 1].ravel().tolist()
    if sorted(numbers) != list(range(1, len(persons) + 1)):
        raise UserError(f"{table}: row {split} of ls_set is not a permutation of the "
                        f"{len(persons)} {description}")
    order = [persons[number - 1] for number in numbers]
    half = len(order) // 2
    return order[half:], order[:half]


def _two_camera_tracks(folder, cams, min_frames):
    """{person: (frames under the first camera, frames under the second)} of the persons who have at
    least `min_frames` under both."""
    tracks = collections.defaultdict(list)
    for cam in cams:
        for person in _folders(folder / cam):
            path = folder / cam / person
            names = _images(path)
            if len(names) >= min_frames:
                tracks[person].append(_frames(path, names))
    return {person: pair for person, pair in tracks.items() if len(pair) == 2}


def _two_camera_dataset(name, tracks, train, test):
    """The data set for the result of `_two_camera_tracks` and a split into training and test
    persons. The queries are of the first camera, and the gallery is of the second."""
    def tracklets(persons, cam):
        ordered = sorted(persons, key=natural_key)
        return [Tracklet(tracks[person][cam - 1], person, cam) for person in ordered]
    return _numbered_dataset(
        name,
        train=tracklets(train, 1) + tracklets(train, 2),
        query=tracklets(test, 1),
        gallery=tracklets(test, 2),
    )


def load_folder(folder: Path, name: str = "folder", *, training: bool = True) -> Dataset:
    """Your own tracklets: {train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}, any names.

    Names have no special meaning. An identity called 0000 or -1, which MARS uses for distractors
    and junk, is an ordinary person. Gallery identities without a query act as distractors. Without
    the folder `query`, the first gallery tracklet of each identity and camera is also a query.

    Args:
        folder: holds train, gallery and, if there is one, query.
        name: name of the data set.
        training: whether the folder `train` is needed.
    """
    layout = "{train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}"
    wanted = ["gallery"]
    if training:
        wanted.insert(0, "train")
    _check_layout(folder, wanted, layout)
    found = {}
    for part in ("train", "query", "gallery"):
        found[part] = []
        if (folder / part).is_dir():
            for (pid, cam, _), frames in _tracklets_below(folder / part, 3, layout):
                found[part].append(Tracklet(frames, pid, cam))
    for part, tracklets in found.items():
        pids = sorted({t.pid for t in tracklets})
        named_as_in_mars = [pid for pid in pids if re.fullmatch("0+|0*-1", pid)]
        _warn("this identity is named like the junk or the distractors of MARS, but is treated as "
              "a person; remove its folder if that is wrong",
              *[f"{folder}/{part}/{pid}" for pid in named_as_in_mars])
    if not (folder / "query").is_dir():
        first = {}
        for t in found["gallery"]:
            first.setdefault((t.pid, t.cam), t)
        found["query"] = list(first.values())
        print(f"{printable(folder)}/query is missing: the first gallery tracklet of each identity "
              f"and camera serves as a query ({len(first):,} in all)", flush=True)
    tested = {t.pid for t in found["query"] + found["gallery"]}
    shared = {t.pid for t in found["train"]} & tested
    _warn("this identity is in both the training and the test set",
          *[f"{folder}/train/{pid}" for pid in sorted(shared)])
    train, query, gallery = _names_to_numbers(found["train"], found["query"], found["gallery"],
                                      field="cam", first=1)
    return _numbered_dataset(name, train, query, gallery)


class Source(NamedTuple):
    """How a data set is found and read.

    Args:
        load: its loader, a function of (folder, name).
        folders: names of its top-level folders; a folder with any of them is taken for the data
            set.
        counts: the published numbers of training, query and gallery tracklets, None where there
            are none.
        options: those of the arguments `split`, `training` and `images` of load_dataset that the
            loader takes, too.
    """
    load: object
    folders: tuple
    counts: tuple
    options: tuple = ()

    def is_in(self, folder):
        """Whether a folder looks like the data set itself."""
        return any(os.path.isdir(f"{folder}/{name}") for name in self.folders)


# A new data set needs a loader, which is a function of (folder, name) that returns a Dataset, and a
# line in this table.
DATA_SETS = {
    "mars": Source(load_mars, ("info", "bbox_train", "bbox_test"), (8298, 1980, 11310),
                   options=("training", "images")),
    "duke": Source(load_duke, ("train", "query", "gallery"), (2196, 702, 2636)),
    "lsvid": Source(load_lsvid, ("list_sequence", "test"), (2831, 3504, 11333)),
    "ilids": Source(load_ilids, ("i-LIDS-VID", "train-test people splits"), (300, 150, 150),
                    options=("split",)),
    "prid": Source(load_prid, ("multi_shot",), (178, 89, 89), options=("split",)),
    "synthetic": Source(load_mars, ("info", "bbox_train", "bbox_test"), (None, None, None),
                        options=("training", "images")),
    "folder": Source(load_folder, ("train", "query", "gallery"), (None, None, None),
                     options=("training",)),
}
# the data sets with ten splits into training and test
SPLIT_SETS = [name for name, source in DATA_SETS.items() if "split" in source.options]


# ------------------------------------------------------------------------------------ clip sampling
# These functions choose frame indices for a tracklet of n frames. A sample_* function draws one
# training clip of T frames, (T,). A split_* function gives all test clips, (clips, T).

def sample_strided(n: int, T: int, rng, stride: int = 4):
    """T frames, `stride` apart, from a random start.

    A tracklet with fewer than T * stride frames gives T different frames, drawn at random and put
    in order. If it has fewer than T frames, some of them repeat.
    """
    if n < T * stride:
        return np.sort(rng.choice(n, T, replace=n < T))
    start = rng.integers(n - (T - 1) * stride)
    return start + stride * np.arange(T)


def sample_adjacent(n: int, T: int, rng):
    """T consecutive frames from a random start. If n < T, the tracklet is repeated."""
    start = rng.integers(max(1, n - T + 1))
    return (start + np.arange(T)) % n


def sample_segments(n: int, T: int, rng):
    """A random frame of each of T equal parts, in order (TSN, ECCV 2016). If n < T, some frames
    repeat."""
    edges = np.arange(T + 1) * n // T
    return rng.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))


def split_consecutive(n: int, T: int):
    """ceil(n / T) clips of T consecutive frames. The last clip is completed with the first frames
    of the tracklet, which is repeated as often as needed."""
    clips = math.ceil(n / T)
    return (np.arange(clips * T) % n).reshape(clips, T)


def split_whole(n: int, T: int):
    """floor(n / T) clips of T consecutive frames; the remaining frames are dropped. If n < T, there
    is one clip, of the repeated tracklet."""
    clips = max(n // T, 1)
    return (np.arange(clips * T) % n).reshape(clips, T)


def split_segments(n: int, T: int):
    """ceil(n / T) clips, each with one frame of each of T equal parts, in order, as in training.
    Every frame is used. If T does not divide n, some are used more than once."""
    clips = math.ceil(n / T)
    frames = np.arange(clips * T) * n // (clips * T)
    return frames.reshape(T, clips).T


# -------------------------------------------------------------------------- frames and augmentation

def _check_image_size(width, height):
    """Raises ValueError if an image claims more pixels than Image.MAX_IMAGE_PIXELS, where Pillow
    only warns."""
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"its header claims {width} x {height} pixels, which is implausible")


def _orientation(image):
    """The orientation, 1 to 8, in the Exif or XMP data of an image. Returns 1 (upright) if there is
    none. Unreadable data count as none, because the picture itself may be sound."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # the readers of Exif raise many kinds
        return 1


def _upright(frame, orientation):
    """A frame (H, W, 3), turned and mirrored as its Exif orientation demands."""
    if orientation in (5, 6, 7, 8):  # rows and columns are exchanged
        frame = frame.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        frame = frame[::-1]
    if orientation in (2, 3, 6, 7):
        frame = frame[:, ::-1]
    return np.ascontiguousarray(frame)


def _decode(path):
    """Reads a frame, uint8 (H, W, 3), upright. JPEGs go to simplejpeg, which raises libjpeg's
    warnings as errors, so that no damaged frame is used; Pillow would hide them. All other images,
    and the few JPEGs that simplejpeg cannot convert, go to Pillow."""
    with open(path, "rb") as file:
        content = file.read()
    if content.startswith(b"\xff\xd8"):  # a JPEG, whatever its name
        frame = _decode_jpeg(content)
        if frame is not None:
            return frame
    if content.startswith(b"\x89PNG"):  # check the size before Image.open, which would warn of it
        width = int.from_bytes(content[16:20], "big")
        height = int.from_bytes(content[20:24], "big")
        _check_image_size(width, height)
    with Image.open(path) as image:
        _check_image_size(*image.size)
        image.verify()  # compares the checksums of a PNG; the image has to be opened again
    with Image.open(path) as image:
        image.load()  # decodes now: errors are raised here, and Exif at the file's end is found
        orientation = _orientation(image)
        if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
        return _upright(np.asarray(image.convert("RGB")), orientation)


def _decode_jpeg(content):
    """The frame (H, W, 3) in the bytes of a JPEG. Returns None for the JPEGs that simplejpeg cannot
    convert to RGB, and the caller then reads them with Pillow. These are JPEGs with unusual chroma
    subsampling, and CMYK ones, which simplejpeg has at least checked for damage before."""
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(content)
        _check_image_size(width, height)
        if colour_space in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(content, "CMYK", strict=True)
            return None
        frame = simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except ValueError as error:
        if "subsampling" in str(error):
            return None
        raise
    # Exif and XMP are in the segment APP1, which comes before the image; most crops have none.
    header = content[:content.find(b"\xff\xda")]
    if b"\xff\xe1" in header:
        with contextlib.suppress(OSError), Image.open(io.BytesIO(content)) as image:
            return _upright(frame, _orientation(image))
    return frame


def _as_array(frame):
    """A frame in memory, an array or a tensor, as an array (H, W, 3)."""
    if torch.is_tensor(frame):
        frame = frame.numpy(force=True)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise UserError("a frame in memory must be RGB, uint8 (height, width, 3), not "
                        f"{frame.dtype} {frame.shape}")
    return frame


def read_clip(frames, size: tuple):
    """Reads a clip, uint8 (T, 3, H, W).

    Args:
        frames: T paths, or frames in memory, uint8 arrays or tensors (height, width, 3).
        size: (H, W); frames of another size are resized to it by bicubic interpolation.

    Raises UserError, with the name of the file, if a frame is missing or damaged. No frame is
    skipped.
    """
    height, width = size
    clip = np.empty((len(frames), height, width, 3), np.uint8)
    for t, path in enumerate(frames):
        try:
            if hasattr(path, "dtype"):
                frame = _as_array(path)
            else:
                frame = _decode(path)
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
    """Whether a file is a PNG of 16 bits that becomes nearly black in 8 bits, for example because
    it holds 12-bit values, whose white is 4095."""
    with open(path, "rb") as file:
        header = file.read(25)
    bit_depth = header[24:]
    if not header.startswith(b"\x89PNG") or bit_depth != b"\x10":
        return False
    return 0 < _decode(path).max() < 64


# How many frames of a kind check_images names before it only counts them. Missing frames usually
# are whole folders, while damaged ones are repaired one by one.
MAX_NAMED = {"missing": 5, "damaged": 100}


def check_images(dataset: Dataset) -> int:
    """Decodes every frame of the three parts of a data set, prints the bad ones and returns their
    number. Also warns of PNGs of 16 bits that become nearly black. Decodes in 16 threads."""
    paths = sorted({frame for part in (dataset.train, dataset.query, dataset.gallery)
                    for tracklet in part for frame in tracklet.frames})
    count = collections.Counter()
    first_dark = None
    with ThreadPool(16) as pool:
        results = pool.imap(_classify_frame, paths, chunksize=64)
        for kind, text in progress(results, "checking", len(paths), unit=" frames"):
            count[kind] += 1
            if kind in MAX_NAMED and count[kind] <= MAX_NAMED[kind]:
                tqdm.write(text)
            if kind == "dark" and first_dark is None:
                first_dark = text
    for kind, limit in MAX_NAMED.items():
        if count[kind] > limit:
            print(f"... and {count[kind] - limit:,} more that are {kind}")
    if first_dark is not None:
        print(f"warning: {printable(first_dark)}: this PNG of 16 bits becomes nearly black in 8 "
              f"bits; it may hold 12-bit values, whose white is 4095 ({count['dark']:,} in all)")
    bad = count["missing"] + count["damaged"]
    print(f"{len(paths):,} frames checked, {bad:,} missing or damaged")
    return bad


def _classify_frame(path):
    """Checks a frame. Returns ("missing" or "damaged", message), ("dark", path), or (None, path) if
    it is fine."""
    try:
        read_clip([path], (1, 1))
    except UserError as error:
        kind = "damaged" if os.path.exists(path) else "missing"
        return kind, str(error)
    if _is_dark_16_bit(path):
        return "dark", path
    return None, path


def random_flip(clip, rng, p: float = 0.5):
    """Mirrors all frames of a clip (..., W) with probability p."""
    if rng.random() >= p:
        return clip
    return clip.flip(-1)


def random_erase(clip, rng, p: float = 0.5, *, area: tuple = (0.02, 0.4),
                 aspect: tuple = (0.3, 1 / 0.3)):
    """Erases one box, the same in all frames, with probability p (Zhong et al., AAAI 2020). The box
    is filled with ImageNet's mean colour.

    Args:
        clip: uint8 (T, 3, H, W).
        rng: NumPy's random generator.
        p: probability, 0 to 1.
        area: range of the box's area, as a share of the frame's.
        aspect: range of the box's height divided by its width.
    """
    if rng.random() >= p:
        return clip
    H, W = clip.shape[-2:]
    for _ in range(100):  # until a box fits into the frame; if none does, nothing is erased
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
    """Converts uint8 clips (..., 3, H, W) to float32, normalised with ImageNet's mean and standard
    deviation."""
    mean = _per_channel(IMAGENET_MEAN, clips.device)
    std = _per_channel(IMAGENET_STD, clips.device)
    return (clips.float() / 255 - mean) / std


def _per_channel(values, device):
    """Three numbers as a tensor (3, 1, 1) on a device.

    The device itself fills them in. `torch.tensor(values, device=device)` would copy them from the
    CPU, which on a GPU would have to wait until all earlier work is done, in every training step.
    """
    return torch.cat([torch.full((1, 1, 1), value, device=device) for value in values])


# --------------------------------------------------------------------- data sets of clips, samplers

class TrainClips(torch.utils.data.Dataset):
    """Augmented training clips. An item is (clip uint8 (T, 3, H, W), pid).

    The index of an item is what the samplers below yield: (tracklet, seed, epoch, position in the
    epoch). Its frames and its augmentation depend on these numbers alone. Nothing is kept between
    items, so that any number of workers may read them, in any order. A loader of batches is made by

        clips = TrainClips(dataset.train, sample_segments, T=4, size=(256, 128))
        batches = PKSampler([t.pid for t in dataset.train], P=8, K=4)
        loader = torch.utils.data.DataLoader(clips, batch_sampler=batches, num_workers=4)

    Args:
        tracklets: list of Tracklet.
        sample: a function of (n, T, rng) that draws frame indices, such as sample_strided.
        T: number of frames in a clip.
        size: (height, width) of the frames.
        erase: probability of random erasing, 0 to 1.
    """

    def __init__(self, tracklets, sample, T: int, size: tuple, *, erase: float = 0.5):
        self.tracklets = tracklets
        self.sample = sample
        self.T = T
        self.size = size
        self.erase = erase

    def __getitem__(self, item):
        index, seed, epoch, position = item
        rng = np.random.default_rng([_CLIP_SEED, seed, epoch, position])
        frames, pid, _ = self.tracklets[index]
        indices = self.sample(len(frames), self.T, rng)
        clip = read_clip([frames[i] for i in indices], self.size)
        clip = random_flip(clip, rng)
        clip = random_erase(clip, rng, self.erase)
        return clip, pid


class AllClips(torch.utils.data.Dataset):
    """All test clips of all tracklets in turn. An item is (clip uint8 (T, 3, H, W), index of its
    tracklet).

    Args:
        tracklets: list of Tracklet.
        split: a function of (n, T) that gives the frame indices of all clips, (clips, T), such as
            split_consecutive.
        T: number of frames in a clip.
        size: (height, width) of the frames.
    """

    def __init__(self, tracklets, split, T: int, size: tuple):
        self.tracklets = tracklets
        self.size = size
        self.clips = []  # (index of the tracklet, indices of the frames)
        for index, tracklet in enumerate(tracklets):
            for clip in split(len(tracklet.frames), T):
                self.clips.append((index, clip))

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, item):
        index, clip = self.clips[item]
        frames = self.tracklets[index].frames
        return read_clip([frames[i] for i in clip], self.size), index


# The first number of a seed keeps the generators of batches and of clips apart; without it,
# [seed, epoch] and [seed, epoch, 0] would give the same generator.
_BATCHES_SEED = 1
_CLIP_SEED = 2


class PKSampler(torch.utils.data.Sampler):
    """Batches of P distinct identities with K clips each (Hermans et al., 2017).

    Yields lists of (tracklet, seed, epoch, position of the clip in the epoch), for TrainClips. The
    batches of an epoch depend on the seed and the epoch alone. Call `set_epoch` before each epoch.

    With shows="tracklets", an epoch goes through the tracklets, as in the authors' releases. The
    tracklets of each identity are shuffled and cut into groups of K. An identity with fewer than K
    tracklets has one group, in which they repeat. A batch has one group of each of P identities.
    An epoch leaves out:
      - tracklets that do not fill a group;
      - groups that do not fill the last batch;
      - groups of an identity in excess of the number of batches, since an identity occurs at most
        once in a batch.
    The next epoch shuffles again, so that all tracklets are shown in the long run.

    With shows="identities", an epoch has every identity at least once, in ceil(identities / P)
    batches. The last batch is completed with the epoch's first identities.

    Args:
        pids: labels of the training tracklets.
        P: number of identities in a batch.
        K: number of clips of each of them.
        shows: "tracklets" or "identities".
        seed: a whole number from 0 on.
        rank: number of this process, from 0. It takes P / world identities of each batch.
        world: number of processes.

    Raises ValueError for another `shows`, and UserError if P or K do not fit the identities or the
    number of processes.
    """
    unit = "identities"  # the noun for P in error messages
    flags = "--ids"      # the flags that set P

    def __init__(self, pids, P: int, K: int, *, shows: str = "tracklets", seed: int = 0,
                 rank: int = 0, world: int = 1):
        if shows not in ("tracklets", "identities"):
            raise ValueError(f"an epoch shows tracklets or identities, not {shows}")
        self.tracklets_of = collections.defaultdict(list)
        for index, pid in enumerate(pids):
            self.tracklets_of[pid].append(index)
        if P > len(self.tracklets_of):
            raise UserError(f"a batch needs {P} {self.unit}, but the training set has only "
                            f"{len(self.tracklets_of)}: use a smaller {self.flags}")
        if P % world:
            raise UserError(f"{P} {self.unit} in a batch cannot be divided evenly among {world} "
                            f"processes: use a multiple of {world}")
        if P * K == world:
            raise UserError(f"a batch of {P * K} clips leaves each of {world} processes a single "
                            "clip, but BatchNorm needs at least two: use a larger --ids or --clips")
        self.P = P
        self.K = K
        self.shows = shows
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pids = sorted(self.tracklets_of)
        if shows == "tracklets":
            groups = np.array([max(1, len(self.tracklets_of[pid]) // K) for pid in self.pids])
            self.batches = self._most_batches(groups)
            # for each identity, the number of its groups that an epoch can show
            self.groups = np.minimum(groups, self.batches)
        else:
            self.batches = math.ceil(len(self.pids) / P)
        self.set_epoch(0)

    def _most_batches(self, groups):
        """Returns the largest number b of batches that can be filled. They need P * b groups, of
        which each identity can give at most b. `groups` has the number of groups of each."""
        batches = groups.sum() // self.P
        while np.minimum(groups, batches).sum() < self.P * batches:
            batches -= 1
        return int(batches)

    def set_epoch(self, epoch: int, start: int = 0):
        """Selects the epoch. A resumed run skips its first `start` batches."""
        self.epoch = epoch
        self.start = start

    def __len__(self):
        return self.batches - self.start

    def _batches_of_identities(self, rng):
        """Yields batches of P identities, for each its K tracklets, in which every identity occurs
        at least once."""
        order = rng.permutation(self.pids)
        free = self.batches * self.P - len(order)  # places in the last batch, 0 if it is full
        order = np.concatenate([order, order[:free]])
        for batch in order.reshape(-1, self.P):
            groups = []
            for pid in batch:
                shuffled = rng.permutation(self.tracklets_of[pid])
                # np.resize repeats the tracklets if there are fewer than K
                groups.append(np.resize(shuffled, self.K))
            yield groups

    def _batches_of_tracklets(self, rng):
        """Yields batches of P identities, for each its K tracklets, in which each identity occurs
        once for each of its groups that the epoch shows."""
        shuffled = [rng.permutation(self.tracklets_of[pid]) for pid in self.pids]
        left = self.groups.copy()  # for each identity, the number of groups still to be shown
        surplus = left.sum() - self.P * self.batches  # groups that do not fill a last batch
        identity_of_group = np.repeat(np.arange(len(left)), left)
        for identity in rng.choice(identity_of_group, surplus, replace=False):
            left[identity] -= 1
        for batches_after in reversed(range(self.batches)):
            # An identity that has more groups left than there are batches after this one must be in
            # this batch.
            batch = np.flatnonzero(left > batches_after)
            if len(batch) < self.P:
                # The other places are drawn: the more groups an identity has left, the likelier.
                others = np.flatnonzero((left > 0) & (left <= batches_after))
                share = left[others] / left[others].sum()
                drawn = rng.choice(others, self.P - len(batch), replace=False, p=share)
                batch = np.concatenate([batch, drawn])
            left[batch] -= 1
            groups = []
            for i in batch:
                tracklets = shuffled[i]
                if len(tracklets) < self.K:
                    tracklets = np.resize(tracklets, self.K)  # repeats them
                first = left[i] * self.K
                groups.append(tracklets[first:first + self.K])
            yield groups

    def __iter__(self):
        rng = np.random.default_rng([_BATCHES_SEED, self.seed, self.epoch])
        if self.shows == "tracklets":
            batches = self._batches_of_tracklets(rng)
        else:
            batches = self._batches_of_identities(rng)
        for number, batch in enumerate(batches):
            if number < self.start:
                continue
            items = []
            for p in range(self.rank, self.P, self.world):
                for k in range(self.K):
                    position = (number * self.P + p) * self.K + k
                    items.append((int(batch[p][k]), self.seed, self.epoch, position))
            yield items


class TrackletSampler(PKSampler):
    """Batches of P * K different tracklets of any identities. An epoch shows every tracklet at
    least once: its last batch is completed with its first tracklets. Yields the same items as
    PKSampler.

    Args:
        pids: labels of the training tracklets, of which only the number matters.
        P, K: their product is the number of tracklets in a batch.
        seed: a whole number from 0 on.
        rank: number of this process, from 0. It takes P * K / world tracklets of each batch.
        world: number of processes.

    Raises UserError if P * K does not fit the tracklets or the number of processes.
    """
    unit = "tracklets"
    flags = "--ids or --clips"

    def __init__(self, pids, P: int, K: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        # every tracklet is an identity of its own, with one clip in a batch
        super().__init__(range(len(pids)), P * K, 1, shows="identities", seed=seed, rank=rank,
                         world=world)


# ------------------------------------------------------------------------------- synthetic people
# Small pedestrians in groups. The people of a group wear the same shirt and sash, the clothes that
# one sees best. They differ in the colours of their cap, trousers and boots, in skin, build and
# height, and in their gait.

# the colours of shirts and sashes, of caps, trousers and boots, and of skins
_SHIRTS = "#c4242a #2a54ba #248442 gold #ececdf #26262a #e87624 hotpink #703c92 #22808f".split()
_OTHERS = "#2c3e70 #222226 #84848a #ccb892 #68462e #e4e4de #5c6238 #86222c".split()
_SKINS = "#f0ccb2 #d8a882 #a87450 #62402c".split()
_SUPERSAMPLING = 3  # frames are drawn three times as wide and as high and averaged down


def _random_people(count, rng, group=4, gait=False):
    """People in groups of `group`; with `gait` those of a group differ in their gait only."""
    people = []
    for i in range(count):
        member = i % group
        if member == 0:  # a new group; its 512 outfits are taken in turn
            shirt, sash = rng.choice(_SHIRTS, 2, replace=False)
            outfits = rng.permutation(list(itertools.product(_OTHERS, repeat=3)))
        if member == 0 or not gait:
            trousers, boots, cap = outfits[member % len(outfits)]
            looks = dict(shirt=shirt, sash=sash, trousers=trousers, boots=boots, cap=cap,
                         skin=rng.choice(_SKINS), build=rng.uniform(0.82, 1.25),
                         height=rng.uniform(0.9, 1.04))
        walk = dict(frequency=rng.uniform(0.3, 1.6),  # cycles in eight frames
                    stride=rng.uniform(0.2, 0.7),  # how far the legs swing, in radians
                    arms=rng.uniform(0, 0.8))  # how far the arms swing, in radians
        people.append(SimpleNamespace(**looks, **walk))
    return people


def _random_camera(index, rng, height):
    """A camera: a background, along which people walk, a direction in which they walk, and a light.
    The background is `height` pixels high and about three times as wide."""
    wall_hue, floor_hue = rng.integers(360, size=2)
    horizon = rng.integers(50, 85)
    background = Image.new("RGB", (400, 128), f"hsl({wall_hue}, 15%, 60%)")
    draw = ImageDraw.Draw(background)
    for x, y, side, lightness in rng.integers((0, 0, 8, 50), (400, 40, 40, 70), (30, 4)):
        draw.rectangle([x, y, x + side, y + side], f"hsl({wall_hue}, 15%, {lightness}%)")
    draw.rectangle([0, horizon, 400, 128], f"hsl({floor_hue}, 15%, 50%)")
    brightness = rng.uniform(0.86, 1.14)
    tint = rng.uniform(0.91, 1.09, 3)  # a factor for each of red, green and blue
    return SimpleNamespace(background=background.resize((height * 400 // 128, height)),
                           yaw=(0.25, 1.35, 2.75, -1.1, 0.9, -2.2)[index % 6],
                           light=brightness * tint)


def _draw_person(image, person, *, phase, yaw, x, y, height):
    """Draws a person of `height` pixels whose feet are at the pixel (x, y).

    `phase` is that of the gait and `yaw` the direction of the walk, in radians: 0 is towards the
    camera, pi / 2 to the right. Lengths below are fractions of the person's height, and a point is
    (how far to the right of x, how far above the feet).
    """
    draw = ImageDraw.Draw(image)
    sine, cosine = math.sin(yaw), math.cos(yaw)
    front = math.copysign(1, sine)  # 1 or -1: the side whose arm and leg are drawn in front
    hip, shoulder, head = 0.5, 0.82, 0.91
    chest = 0.14 * person.build * (0.6 * abs(sine) + abs(cosine))  # half of the torso's width

    def bar(start, end, thickness, colour, light=1.0):
        """Draws a straight bar with round ends, or a disc if it starts where it ends."""
        pixels = [(x + right * height, y - up * height) for right, up in (start, end)]
        radius = thickness * height / 2
        colour = tuple(round(light * channel) for channel in ImageColor.getrgb(colour))
        draw.line(pixels, colour, round(2 * radius))
        for column, row in pixels:
            draw.ellipse([column - radius, row - radius, column + radius, row + radius], colour)

    def limb(side, *, distance, top, length, swing, thickness, colours):
        """Draws an arm or a leg that hangs from `top`, `distance` beside the middle of the body,
        and swings by up to the angle `swing`. The one that is not in front is darker."""
        light = 1.0 if side == front else 0.8
        angle = side * swing * math.sin(phase)
        right, down = length * math.sin(angle) * sine, length * math.cos(angle)
        start = (side * distance * cosine, top)
        middle = (start[0] + right / 2, top - down / 2)  # the elbow or the knee
        end = (start[0] + right, top - down)
        bar(middle, end, thickness, colours[1], light=light)
        bar(start, middle, 1.3 * thickness, colours[0], light=light)

    # an arm swings against the leg of its side
    arm = dict(distance=chest, top=shoulder - 0.03, length=0.3, swing=-person.arms,
               thickness=0.05 * person.build, colours=(person.shirt, person.skin))
    leg = dict(distance=0.055 * person.build, top=hip, length=hip - 0.03, swing=person.stride,
               thickness=0.075 * person.build, colours=(person.trousers, person.boots))
    limb(-front, **arm)
    limb(-front, **leg)
    limb(front, **leg)
    for right in (-0.45 * chest, 0.45 * chest):  # the torso: two bars side by side
        bar((right, shoulder - 0.06), (right, hip + 0.04), 1.1 * chest, person.shirt)
    bar((-0.7 * chest, shoulder - 0.03), (0.7 * chest, hip + 0.02), 0.09, person.sash)
    bar((0, head + 0.02), (0, head + 0.02), 0.12, person.cap)
    bar((0.02 * sine, head), (0, shoulder), 0.09, person.skin)  # the face and the neck
    limb(front, **arm)


def _draw_tracklet(person, camera, *, frames, size, occlusion, rng):
    """Yields `frames` pairs of a frame and its mask, which `draw_synthetic` describes. The person
    walks past the camera; if `person` is None, the background stays empty. `size` is (height,
    width) of a frame. With probability `occlusion` a post passes in front, from left to right."""
    height, width = _SUPERSAMPLING * size[0], _SUPERSAMPLING * size[1]
    yaw = camera.yaw + rng.uniform(-0.3, 0.3)
    phase = rng.uniform(0, 2 * math.pi)
    start = rng.uniform(0.3, 2.2)  # left edge of the first frame, in heights of a frame
    post = rng.random() < occlusion
    when = rng.uniform(0, frames)  # when the post passes the middle, in frames from the start
    for i in range(frames):
        shift = rng.normal(0, 0.01, 2)  # of the person against the background
        left = height * (start + 0.02 * i * math.sin(yaw) + shift[0])
        # the view stops at the end of the background, while the person walks on
        left = int(np.clip(left, 0, camera.background.width - width))
        image = camera.background.crop((left, 0, left + width, height))
        layer = Image.new("RGBA", image.size)  # transparent where no person is drawn
        if person:
            _draw_person(layer, person, phase=phase + 2 * math.pi * person.frequency * i / 8,
                         yaw=yaw, x=0.5 * width + shift[0] * height,
                         y=(0.965 + shift[1]) * height,
                         height=0.91 * height * person.height * rng.uniform(0.94, 1.06))
        image.paste(layer, mask=layer)
        mask = layer.getchannel("A")
        if post:
            middle = width * (0.5 + (i - when) / 6)
            box = (round(middle - 0.15 * width), 0, round(middle + 0.15 * width), height)
            image.paste("dimgray", box)
            mask.paste(0, box)
        pixels = np.asarray(image.reduce(_SUPERSAMPLING)) * camera.light
        pixels += rng.normal(0, 2, (*size, 1))  # the same noise in red, green and blue
        mask = mask.reduce(_SUPERSAMPLING).point(lambda value: 255 if value > 127 else 0)
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def draw_synthetic(folder, identities: int = 64, test_identities: int = 20, cameras: int = 4, *,
                   frames: tuple = (5, 12), size: tuple = (128, 64), group: int = 4,
                   occlusion: float = 0.2, gait: bool = False, seed: int = 0,
                   masks: bool = False):
    """Makes a data set of synthetic pedestrians in the layout of MARS.

    Every identity has one or two tracklets under each camera; in the test part the first of them
    is a query. The test part also has a junk tracklet and two distractors for each camera. The same
    arguments give the same bytes, with the same versions of the libraries. If several processes
    make a folder at the same time, the first one draws, and the others wait for it and take what it
    has drawn (not on Windows and on file systems without locks). It draws into a temporary folder
    and renames it at the end, so that an interrupted drawing leaves no incomplete set under that
    name.

    Args:
        folder: the folder to make, which must not exist yet.
        identities: number of training identities, 1 to 4999.
        test_identities: number of test identities, who are other people, 1 to 4999.
        cameras: number of cameras, 2 to 9.
        frames: the least and the largest number of frames in a tracklet, 1 to 999.
        size: (height, width) of a frame in pixels; the width is at most the height.
        group: number of people in a group, who wear the same shirt and sash.
        occlusion: probability that a post passes in front of the person of a tracklet, 0 to 1.
        gait: True makes the people of a group differ in their gait only.
        seed: a whole number from 0 on.
        masks: True also writes a mask of the person for each frame, in black and white (mode "L"):
            it is 255 where the person is visible and 0 elsewhere, that is, in the background and
            where the post is in front of the person. The mask of
            bbox_test/0001/0001C1T0001F001.jpg is masks/bbox_test/0001/0001C1T0001F001.png. The
            frames are the same with and without masks.

    Raises UserError if the folder exists already or cannot be written.
    """
    folder = Path(folder)
    lock_file = None
    try:
        if folder.exists():
            raise UserError(f"{folder} exists already: name another folder, or remove it first")
        temporary = folder.with_name(f".{folder.name}.part")
        lock_file = locked(folder.with_name(f".{folder.name}.lock"), wait=True)
        if folder.exists():  # another process has made it while this one waited
            return
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process killed while drawing
        strangers = _random_people(2 * cameras, np.random.default_rng([seed, 1]), group=1)
        trained = _random_people(identities, np.random.default_rng([seed, 2]), group, gait)
        tested = _random_people(test_identities, np.random.default_rng([seed, 3]), group, gait)
        people = [(-1, None)]  # (pid, person); junk tracklets show no person
        people += [(0, person) for person in strangers]  # distractors, each under one camera
        people += enumerate(trained + tested, 1)
        views = [_random_camera(cam, np.random.default_rng([seed, 4, cam]),
                                height=_SUPERSAMPLING * size[0]) for cam in range(cameras)]
        names = {"train": [], "test": []}
        rows = {"train": [], "test": []}  # rows of MARS's tables
        queries = []  # the numbers of the test rows that are queries, from 1
        for number, (pid, person) in enumerate(progress(people, "drawing", unit=" people")):
            part = "train" if 0 < pid <= identities else "test"
            for cam, tracklet in itertools.product(range(cameras), (1, 2)):
                rng = np.random.default_rng([seed, 5, number, cam, tracklet])
                if pid == 0 and cam != number % cameras:
                    continue
                if tracklet == 2 and (pid < 1 or rng.random() < 0.75):
                    continue
                count = rng.integers(*frames, endpoint=True)
                drawn = _draw_tracklet(person, views[cam], frames=count, size=size,
                                       occlusion=occlusion, rng=rng)
                # distractors share the pid 0, so their tracklets have numbers of their own
                tracklet_number = number if pid == 0 else tracklet
                person_name = f"{pid:0>4}"  # 00-1 for junk, as in MARS
                tracklet_name = f"{person_name}C{cam + 1}T{tracklet_number:04}"
                first = len(names[part]) + 1
                for i, (image, mask) in enumerate(drawn, 1):
                    names[part].append(f"{tracklet_name}F{i:03}.jpg")
                    file = f"bbox_{part}/{person_name}/{tracklet_name}F{i:03}"
                    _save(image, temporary / f"{file}.jpg", quality=90)
                    if masks:
                        _save(mask, temporary / f"masks/{file}.png")
                rows[part].append((first, len(names[part]), pid, cam + 1))
                if part == "test" and pid > 0 and tracklet == 1:
                    queries.append(len(rows[part]))
        (temporary / "info").mkdir()
        for part in names:
            (temporary / f"info/{part}_name.txt").write_text("\n".join(names[part]) + "\n")
            _write_mat(temporary / f"info/tracks_{part}_info.mat", f"track_{part}_info",
                       np.array(rows[part], np.int32))
        _write_mat(temporary / "info/query_IDX.mat", "query_IDX", np.array([queries], np.uint16))
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot draw the synthetic data set there "
                        f"({error.strerror or error})") from None
    finally:
        if lock_file:
            shutil.rmtree(temporary, ignore_errors=True)
            # The lock's file stays. If it were deleted, a process that waits for it would lock the
            # deleted file while a third one locks a new file, and both would draw.
            lock_file.close()


def _save(image, path, **options):
    """Saves an image in a folder that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def _write_mat(path, variable, values):
    """Writes `values` as scipy's savemat does, but without the time in the header: the same values
    give the same bytes."""
    from scipy.io import savemat
    with open(path, "wb") as file:
        savemat(file, {variable: values})
        file.seek(0)
        file.write(b"MATLAB 5.0 MAT-file, synthetic pedestrians".ljust(116))


# ------------------------------------------------------------------------------- the command line

def _whole_number(low, high):
    """The type of a flag: a whole number from `low` to `high`."""
    def parse(text):
        if not re.fullmatch(r"[+-]?\d+", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}")
        return int(text)
    return parse


def _main():
    parser = Parser(
        description="Makes a data set of synthetic pedestrians in the layout of MARS, or checks "
                    "the images of a data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--synthetic", metavar="DIR", type=os.path.expanduser,
                        help="make a synthetic data set in this folder, which must not exist yet")
    action.add_argument("--check", action="store_true",
                        help="decode every frame of the training and the test part of --data; the "
                             "exit code is 1 if any is damaged, or missing though a list names it")
    parser.add_argument("--data", choices=DATA_SETS, default="mars", help="data set to check")
    parser.add_argument("--root", metavar="DIR", default="datasets", type=os.path.expanduser,
                        help="folder that holds the data sets, or the data set itself")
    parser.add_argument("--frames", type=_whole_number(1, 999), nargs=2, default=(5, 12),
                        metavar=("MIN", "MAX"), help="least and largest number of frames in a "
                                                     "tracklet, 1 to 999")
    for name, default, low, high, meaning in (
        ("--identities", 64, 1, 4999, "number of training identities"),
        ("--test-identities", 20, 1, 4999, "number of test identities, who are other people"),
        ("--cameras", 4, 2, 9, "number of cameras"),
        ("--height", 128, 32, 1024, "height of a frame in pixels"),
        ("--width", 64, 8, 1024, "width of a frame in pixels; at least a quarter of the height and "
                                 "at most the height"),
        ("--group", 4, 1, 4999, "number of people in a group, who wear the same shirt and "
                                 "sash"),
        ("--occlusion", 20, 0, 100, "probability in per cent that a tracklet is occluded"),
        ("--seed", 0, 0, 2 ** 32, "seed of all random numbers; the same seed gives the same files"),
    ):
        parser.add_argument(name, type=_whole_number(low, high), default=default, metavar="N",
                            help=f"{meaning}, {low} to {high}")
    parser.add_argument("--gait", action="store_true",
                        help="make the people of a group differ in their gait only")
    parser.add_argument("--masks", action="store_true",
                        help="also write a mask of the person for each frame, into DIR/masks")
    args = parser.parse_args()
    if args.check:
        # images=False, because check_images reports the missing images of an index itself
        dataset = load_dataset(args.data, args.root, training=False, images=False)
        print(dataset.summary())
        return check_images(dataset) > 0
    if args.frames[0] > args.frames[1]:
        parser.error("--frames must be MIN and MAX, and MIN at most MAX")
    if not args.height <= 4 * args.width <= 4 * args.height:
        parser.error("--width must be at least a quarter of the height and at most the height")
    draw_synthetic(
        args.synthetic,
        args.identities,
        args.test_identities,
        args.cameras,
        frames=args.frames,
        size=(args.height, args.width),
        group=args.group,
        occlusion=args.occlusion / 100,
        gait=args.gait,
        seed=args.seed,
        masks=args.masks,
    )
    print(load_dataset("synthetic", args.synthetic).summary())
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names are not always valid UTF-8
    try:
        sys.exit(_main())
    except UserError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        sys.exit(130)
