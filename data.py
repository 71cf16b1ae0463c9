"""Tracklets, clips and batches for video person re-identification.

What the five paper scripts share on the way from files to batches, in the order of this file: data sets (five public ones,
your own folder, and a synthetic one that is drawn on first use in MARS' layout), clip sampling, frame reading and
augmentation, the clip data sets, and the samplers. A batch of clips is (B, T, 3, H, W), uint8; `normalize` runs on the device.

    python data.py --check --data mars --root DIR                                         # decode every frame
    python data.py --synthetic DIR --identities 64 --cameras 4 --frames 5 12 --seed 0     # draw a synthetic set
"""
import argparse
import bisect
import colorsys
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

try:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:  # torchvision 0.29 announces that its decoders will go
    decode_jpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class UserError(Exception):
    """Something the user can mend; a script prints it as one line and exits with code 2.

    A DataLoader worker's exception comes back with the worker's traceback as its text: only the last line is kept.
    """

    def __init__(self, message):
        super().__init__(str(message).strip().rsplit("\n", 1)[-1].removeprefix("data.UserError: "))


# ---------------------------------------------------------------------------------------------------------- data sets

class Tracklet(NamedTuple):
    """The frames of one person under one camera, in temporal order."""
    frames: tuple  # paths of the frames
    pid: int       # identity; in `train` a label 0..n-1; in the gallery 0 is a distractor, which matches no query
    cam: int       # camera


class Dataset(NamedTuple):
    """A re-identification data set: lists of `Tracklet`. The labels of `train` are 0..n-1 in the order of the pids."""
    name: str
    train: list
    query: list
    gallery: list

    @property
    def num_identities(self):
        """Number of training identities, the classes of the classifier."""
        return 1 + max(t.pid for t in self.train)

    def summary(self):
        """A table of the three subsets, ready to print."""
        lines = [f"{self.name:8} identities  tracklets  cameras     frames   per tracklet: min   mean  max"]
        for subset in ("train", "query", "gallery"):
            tracklets = getattr(self, subset)
            lengths = [len(t.frames) for t in tracklets]
            # a pid of 0 is a label in `train` and the distractors elsewhere
            pids = {t.pid for t in tracklets if t.pid > 0 or subset == "train"}
            lines.append(f"  {subset:7}{len(pids):10,}{len(tracklets):11,}{len({t.cam for t in tracklets}):9}{sum(lengths):11,}"
                         f"{min(lengths):20}{sum(lengths) / len(lengths):7.1f}{max(lengths):5}")
        cameras = {}
        for t in self.train:
            cameras.setdefault(t.pid, set()).add(t.cam)
        single = sum(len(c) == 1 for c in cameras.values())
        if single:
            lines.append(f"  {single:,} training identities are seen by one camera only")
        own = {t.frames[0] for t in self.query} & {t.frames[0] for t in self.gallery}
        distractors = sum(t.pid == 0 for t in self.gallery)
        lines.append(f"  the gallery holds {len(own):,} of the query tracklets and {distractors:,} distractors; "
                     "a query's own camera is left out of its ranking")
        return "\n".join(lines)


def load_dataset(name, root, split=0, chunk=0, draw=True):
    """Reads the index of data set `name`, one of DATA_SETS, in the folder `root`/`name` or in `root` itself.

    split: 0 to 9, of "ilids" and "prid"; chunk: training tracklets are cut into pieces of so many frames (0: not); draw: draw
    "synthetic" when it is missing. Prints a warning when the counts are not the published ones. Raises UserError when a file is
    missing or the files disagree.
    """
    loader, signs = DATA_SETS[name]
    folder = Path(root) / name
    try:
        if not folder.is_dir() and any((Path(root) / sign).is_dir() for sign in signs):
            folder = Path(root)                                # the set itself
        if name == "synthetic" and draw and not folder.exists():
            print(f"drawing the synthetic data set into {folder} (once)", flush=True)
            draw_synthetic(folder)
        dataset = loader(folder, name, **({"split": split} if name in SPLIT_SETS else {}))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from None
    for subset in ("train", "query", "gallery"):
        if not getattr(dataset, subset):
            raise UserError(f"{folder}: no {subset} tracklets")
        expected, found = PUBLISHED.get(name, {}).get(subset), len(getattr(dataset, subset))
        if expected and found != expected:
            print(f"warning: {folder}: {expected:,} {subset} tracklets expected, {found:,} found: "
                  f"{abs(expected - found):,} {'are missing' if found < expected else 'too many'}", flush=True)
    cameras = {}
    for t in dataset.gallery:
        cameras.setdefault(t.pid, set()).add(t.cam)
    if not any(cameras.get(t.pid, set()) - {t.cam} for t in dataset.query if t.pid > 0):
        raise UserError(f"{folder}: no query has a match, a gallery tracklet of its identity under another camera")
    if chunk:
        dataset = dataset._replace(train=[t._replace(frames=t.frames[i:i + chunk]) for t in dataset.train for i in range(0, len(t.frames), chunk)])
    return dataset


def _need(folder, wanted, layout):
    missing = [w for w in wanted if not (folder / w).exists()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}; expected {folder}/{layout}")


def natural(name):
    """A sorting key that takes numbers in a name as numbers: F2 before F10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(name))], str(name)


def _folders(folder):
    """The folders in a folder, by name, in natural order; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted((e.name for e in entries if e.is_dir() and not e.name.startswith(".")), key=natural)


def _subfolders(folder, layout):
    """As _folders; raises UserError when there is none, because images that lie too high would be left out without a word."""
    names = _folders(folder)
    if not names:
        raise UserError(f"{folder}: no folders in it; expected {layout}")
    return names


def _frames(names):
    """Frame names, given in alphabetical order, in natural order; fast where they differ in one number only."""
    same = len(os.path.commonprefix((names[0], names[-1])).rstrip("0123456789"))
    numbers = [name[same:name.rindex(".")] for name in names]
    if "".join(numbers).isdecimal() and all(numbers) and len({name[-4:] for name in names}) == 1:
        return [name for _, name in sorted(zip(map(int, numbers), names))]
    return sorted(names, key=natural)


def _is_image(name):
    return name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")


def _images(folder, least=1):
    """The images in a folder, paths in natural order: the frames of a tracklet. Raises UserError when there are fewer than `least`."""
    names = sorted(filter(_is_image, os.listdir(folder)))
    if len(names) < least:
        raise UserError(f"{folder}: no images in this tracklet")
    return tuple([f"{folder}/{name}" for name in _frames(names)]) if names else ()


def _relabel(name, train, query, gallery):
    """Identities as labels in natural order of their names: of `train` from 0, of the others together from 1."""
    def labels(tracklets, first):
        return {pid: label for label, pid in enumerate(sorted({t.pid for t in tracklets}, key=natural), first)}
    label, other = labels(train, 0), labels(query + gallery, 1)
    return Dataset(name, [t._replace(pid=label[t.pid]) for t in train],
                   *([t._replace(pid=other[t.pid]) for t in part] for part in (query, gallery)))


def load_mars(folder, name="mars"):
    """MARS (Zheng et al., ECCV 2016): the true layout, read without touching an image.

    625 training identities in 8,298 tracklets; 1,980 query and 11,310 gallery tracklets, 6 cameras. Of the 12,180 test
    tracklets the 870 junk ones (pid -1, false detections) are dropped and the 3,248 distractors (pid 0) kept. The
    gallery contains the query tracklets (9,330 + 1,980): without them 140 queries have no match.

    folder: holds bbox_train/, bbox_test/ and info/ with two name lists and three .mat tables.
    Raises UserError when one is missing or unreadable, when a name list and its table disagree, or when a frame belongs to two rows.
    """
    folder = Path(folder)
    wanted = ["bbox_train", "bbox_test", *(f"info/{f}" for f in ("train_name.txt", "test_name.txt", "tracks_train_info.mat",
                                                                 "tracks_test_info.mat", "query_IDX.mat"))]
    missing = [w for w in wanted if not (folder / w).exists()]
    if missing:
        raise UserError(f"{folder}: missing {', '.join(missing)}; expected {folder}/{{bbox_train/0001/*.jpg, bbox_test/0000/*.jpg, "
                        "info/{train_name.txt, test_name.txt, tracks_train_info.mat, tracks_test_info.mat, query_IDX.mat}}"
                        " (the info folder is the one of MARS-evaluation)")

    def tracklets(part):
        table, listing = folder / f"info/tracks_{part}_info.mat", folder / f"info/{part}_name.txt"
        text = listing.read_text("utf-8-sig", "replace")
        if "/" in text or "\\" in text:
            raise UserError(f"{listing}: file names only, no folders")
        names, rows = text.split(), _read_mat(table, f"track_{part}_info")
        well_formed = re.compile(r"[\d-]{4}C\d+T\d+F\d+\.jpg", re.ASCII).fullmatch
        if not all(map(well_formed, names)):
            line = next(line for line, name in enumerate(names, 1) if not well_formed(name))
            raise UserError(f"{listing}: line {line} is {names[line - 1][:60]!r}, no file name like 0001C1T0001F001.jpg")
        if rows.ndim != 2 or rows.shape[1] != 4:
            raise UserError(f"{table}: expected rows of (first line, last line, pid, camera), found shape {rows.shape}")
        found, mixed, owner = [], [], np.zeros(len(names), int)      # owner: the row that takes a line
        for number, (first, last, pid, cam) in enumerate(rows.tolist(), 1):
            if not 1 <= first <= last <= len(names):
                raise UserError(f"{table}: row {number} takes lines {first} to {last} of {listing.name}, which has {len(names)}")
            if owner[first - 1:last].any():
                raise UserError(f"{table}: row {number} takes lines of {listing.name} that row {owner[first - 1:last].max()} takes, too")
            owner[first - 1:last] = number
            person = f"{pid:0>4}"                              # 0001, 0000 for distractors, 00-1 for junk
            prefix, start = f"{person}C{cam}T", f"{folder}/bbox_{part}/{person}/"
            frames = names[first - 1:last]
            for line, frame in enumerate(frames, first):
                if not frame.startswith(prefix):
                    raise UserError(f"{listing}: line {line} is {frame}, but row {number} of {table.name} says pid {pid}, camera {cam}")
            if frames[0].split("F")[0] != frames[-1].split("F")[0] or sorted(set(frames)) != frames:
                mixed.append(number)
            found.append(Tracklet(tuple([start + frame for frame in frames]), pid, cam))
        if mixed:
            print(f"warning: {table}: {len(mixed):,} rows mix tracklets or are not in the order of their frames, first: row {mixed[0]}", flush=True)
        if not owner.all():
            print(f"warning: {listing}: {(owner == 0).sum():,} lines belong to no row of {table.name}, first: {names[owner.argmin()]}", flush=True)
        return found

    train, test = tracklets("train"), tracklets("test")
    labels = {pid: label for label, pid in enumerate(sorted({t.pid for t in train if t.pid > 0}))}
    train = [t._replace(pid=labels[t.pid]) for t in train if t.pid > 0]
    query = []
    for number in _read_mat(folder / "info/query_IDX.mat", "query_IDX").ravel().tolist():
        if not 1 <= number <= len(test) or test[number - 1].pid < 1:
            raise UserError(f"{folder / 'info/query_IDX.mat'}: {number} is not a tracklet of a person in tracks_test_info.mat")
        query.append(test[number - 1])
    if len(set(query)) < len(query):
        raise UserError(f"{folder / 'info/query_IDX.mat'}: a query stands twice")
    return Dataset(name, train, query, [t for t in test if t.pid >= 0])


def load_duke(folder, name="duke"):
    """DukeMTMC-VideoReID (Wu et al., CVPR 2018; Ristani et al., 2016): {train,query,gallery}/<pid>/<tracklet>/*.jpg.

    702 training and 702 test identities, 2,196 training and 2,636 gallery tracklets, 8 cameras. File names carry the camera and the
    frame, 0001C6F0099X30823.jpg or 0001_C6_F0099_X30823.jpg; frame numbers may start at 2. The queries are not in the gallery.
    """
    folder = Path(folder)
    _need(folder, ("train", "query", "gallery"), "{train,query,gallery}/0001/0001/*.jpg")

    def tracklets(part):
        found = []
        for pid in _folders(folder / part):
            for tracklet in _subfolders(folder / part / pid, "<pid>/<tracklet>/*.jpg"):
                frames, numbers, cams = _images(f"{folder}/{part}/{pid}/{tracklet}"), [], set()
                for frame in frames:
                    match = re.search(r"C(\d+)_?F(\d+)", frame.rsplit("/", 1)[1])
                    if not match:
                        raise UserError(f"{frame}: the file name carries no camera and frame (C1 and F0001)")
                    cams.add(int(match[1]))
                    numbers.append(int(match[2]))
                if len(cams) > 1:
                    raise UserError(f"{folder}/{part}/{pid}/{tracklet}: frames of cameras {', '.join(map(str, sorted(cams)))} in one tracklet")
                found.append(Tracklet(tuple(f for _, f in sorted(zip(numbers, frames))), pid, *cams))
        return found
    return _relabel(name, *map(tracklets, ("train", "query", "gallery")))


def load_lsvid(folder, name="lsvid"):
    """LS-VID (Li et al., ICCV 2019): text lists of tracklets, and an HDF5 table of the queries.

    842 training and 2,730 test identities, 2,831 training, 3,504 query and 7,829 other gallery tracklets, 15 cameras. A line of
    list_sequence/list_seq_{train,test}.txt is "<path prefix> <pid>", the frames are the files with that prefix, the camera is the
    third field of the file name. The gallery contains the queries, as for MARS (a release that leaves them out has other numbers).
    """
    folder = Path(folder)
    lists = {part: folder / f"list_sequence/list_seq_{part}.txt" for part in ("train", "test")}
    table = folder / "test/data/info_test.mat"
    _need(folder, ("list_sequence/list_seq_train.txt", "list_sequence/list_seq_test.txt", "test/data/info_test.mat"),
          "{list_sequence/list_seq_{train,test}.txt, test/data/info_test.mat} and the frames")
    listings = {}                                              # folder: its images, sorted, and which of them have an owner

    def tracklets(part):
        found = []
        for number, line in enumerate(lists[part].read_text("utf-8-sig", "replace").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{lists[part]}: line {number}"
            try:
                prefix, pid = line.split()
                pid = int(pid)
            except ValueError:
                raise UserError(f"{where} is not '<path prefix> <pid>': {line[:80]!r}") from None
            prefix = prefix.replace("\\", "/").removeprefix("./")
            if prefix.startswith("/") or ".." in prefix.split("/") or ":" in prefix or "\0" in prefix:
                raise UserError(f"{where} leaves the data root: {prefix[:80]!r}")
            parent, _, start = prefix.rpartition("/")
            if parent not in listings:
                try:
                    names = sorted(filter(_is_image, os.listdir(folder / parent)))
                except OSError:
                    raise UserError(f"{where}: no folder {folder / parent}") from None
                listings[parent] = names, bytearray(len(names)), f"{folder / parent}/"
            names, owned, path = listings[parent]
            mine = range(bisect.bisect_left(names, start), bisect.bisect_left(names, start + "\U0010ffff"))
            if start[-1:].isdecimal():                         # ..._1 is not the start of ..._10
                mine = [i for i in mine if not names[i][len(start):len(start) + 1].isdecimal()]
            if not start or not mine:
                raise UserError(f"{where}: no frames start with {path}{start}")
            for i in mine:
                if owned[i]:
                    raise UserError(f"{where}: {path}{names[i]} belongs to another line, too")
                owned[i] = 1
            mine = [names[i] for i in mine]
            fields = start.split("_")                          # the camera is whole in the prefix, or else in each name
            cam, *others = {fields[2]} if len(fields) > 3 else {(n.rsplit(".", 1)[0].split("_") + [""] * 3)[2] for n in mine}
            if others or not cam.isdecimal():
                raise UserError(f"{where}: the frames of {prefix} do not carry one camera in the third field of their names")
            found.append(Tracklet(tuple([path + n for n in _frames(mine)]), pid, int(cam)))
        return found

    train, test = tracklets("train"), tracklets("test")
    numbers = _read_hdf5(table, "query", len(test))
    if len(set(numbers)) != len(numbers) or not all(1 <= n <= len(test) for n in numbers):
        raise UserError(f"{table}: query must hold different lines of {lists['test'].name}, 1 to {len(test)}")
    return _relabel(name, train, [test[n - 1] for n in numbers], test)


def load_ilids(folder, name="ilids", split=0):
    """iLIDS-VID (Wang et al., ECCV 2014): i-LIDS-VID/sequences/cam{1,2}/person*/*.png and ten official splits.

    300 persons under 2 cameras, 150 for training and 150 for the test of each split. Query: camera 1, gallery: camera 2.
    split: row of `ls_set`, 0 to 9, whose first half are the persons of the test, 1-based in the order of the sorted folders.
    """
    folder = Path(folder)
    table = folder / "train-test people splits/train_test_splits_ilidsvid.mat"
    _need(folder, ("i-LIDS-VID/sequences/cam1", "i-LIDS-VID/sequences/cam2", str(table.relative_to(folder))),
          "{i-LIDS-VID/sequences/cam{1,2}/person*/*.png, train-test people splits/train_test_splits_ilidsvid.mat}")
    cams = {c: folder / f"i-LIDS-VID/sequences/cam{c}" for c in (1, 2)}
    both = set(_folders(cams[2]))
    persons = [p for p in _folders(cams[1]) if p in both]
    rows = _read_mat(table, "ls_set")
    if rows.ndim != 2 or split >= len(rows):
        raise UserError(f"{table}: ls_set has no row {split}, its shape is {rows.shape}")
    order = rows[split].tolist()
    if sorted(order) != list(range(1, len(persons) + 1)):
        raise UserError(f"{table}: row {split} of ls_set is no order of the {len(persons)} persons that both cameras have")
    test, train = ([persons[i - 1] for i in half] for half in (order[:len(order) // 2], order[len(order) // 2:]))
    return _two_cameras(name, cams, train, test)


def load_prid(folder, name="prid", split=0):
    """PRID-2011 (Hirzer et al., SCIA 2011): multi_shot/cam_{a,b}/person_NNNN/*.png.

    Used are the 178 persons who appear under both cameras with more than 21 frames in each (Wang et al., ECCV 2014), 89 for training and
    89 for the test. Query: camera a, gallery: camera b. split: 0 to 9, of splits_prid2011.json, a list of {"train": [...], "test": [...]};
    where it is missing, ten splits are drawn with a fixed seed and, when all 178 persons are there, written to it.
    """
    folder = Path(folder)
    _need(folder, ("multi_shot/cam_a", "multi_shot/cam_b"), "multi_shot/cam_{a,b}/person_0001/*.png")
    cams, path = {1: folder / "multi_shot/cam_a", 2: folder / "multi_shot/cam_b"}, folder / "splits_prid2011.json"
    both = set(_folders(cams[2]))
    persons = [p for p in _folders(cams[1]) if p in both and all(len(_images(cam / p, 0)) > 21 for cam in cams.values())]
    if not path.exists():
        rng, splits = np.random.default_rng(0), []
        for _ in range(10):
            order = [persons[i] for i in rng.permutation(len(persons))]
            splits.append({"train": sorted(order[:len(order) // 2]), "test": sorted(order[len(order) // 2:])})
        whole = len(persons) == PRID_PERSONS                   # splits of a half-copied set must not stay
        print(f"{path} is missing: ten splits are drawn with a fixed seed" + (" and written there" if whole else
              f", but not written there: {PRID_PERSONS} persons expected, {len(persons)} found"), flush=True)
        try:
            if whole:
                aside = path.with_name(f".{path.name}-{os.getpid()}")
                aside.write_text(json.dumps(splits, indent=1) + "\n")
                aside.replace(path)
        except OSError as error:
            print(f"warning: {path}: cannot be written ({error.strerror}); the same splits are drawn the next time", flush=True)
    else:
        try:
            splits = json.loads(path.read_text("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error})") from None
    try:
        train, test = splits[split]["train"], splits[split]["test"]
        unknown = [p for p in [*train, *test] if p not in persons]
        twice = len({*train, *test}) < len(train) + len(test)
    except (LookupError, TypeError):
        raise UserError(f'{path}: no split {split} like {{"train": [...], "test": [...]}}') from None
    if unknown or twice:
        raise UserError(f"{path}: split {split} " + (f"names {str(unknown[0])[:60]!r}, who is no person with more than 21 frames under both cameras"
                                                     if unknown else "names a person twice"))
    if len(train) + len(test) < len(persons):
        print(f"warning: {path}: split {split} leaves out {len(persons) - len(train) - len(test)} of the {len(persons)} persons", flush=True)
    return _two_cameras(name, cams, train, test)


def _two_cameras(name, cams, train, test):
    """Two cameras, one tracklet of each person under each: query is camera 1, gallery camera 2."""
    def tracklets(persons, cam):
        return [Tracklet(_images(cams[cam] / p), p, cam) for p in sorted(persons, key=natural)]
    return _relabel(name, tracklets(train, 1) + tracklets(train, 2), tracklets(test, 1), tracklets(test, 2))


def load_folder(folder, name="folder"):
    """Your own tracklets: {train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}, any names; frames in natural order.

    The cameras of all parts are numbered together. Without `query`, the first tracklet of each (pid, cam) of `gallery` is a query, too.
    """
    folder = Path(folder)
    _need(folder, ("train", "gallery"), "{train,query,gallery}/<pid>/<cam>/<tracklet>/*.{jpg,png}")

    def tracklets(part):
        layout = "<pid>/<cam>/<tracklet>/*.{jpg,png}"
        return [Tracklet(_images(f"{folder}/{part}/{pid}/{cam}/{tracklet}"), pid, cam) for pid in _folders(folder / part)
                for cam in _subfolders(folder / part / pid, layout) for tracklet in _subfolders(folder / part / pid / cam, layout)]
    train, gallery = tracklets("train"), tracklets("gallery")
    if (folder / "query").is_dir():
        query = tracklets("query")
    else:
        query = list({(t.pid, t.cam): t for t in reversed(gallery)}.values())[::-1]
        print(f"{folder}/query is missing: the first of the gallery's tracklets of each identity and camera is a query, {len(query):,} in all", flush=True)
    cams = {cam: i for i, cam in enumerate(sorted({t.cam for t in train + query + gallery}, key=natural), 1)}
    return _relabel(name, *([t._replace(cam=cams[t.cam]) for t in part] for part in (train, query, gallery)))


_MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def _mat_elements(content, order):
    """(type, bytes) of the data elements of a MATLAB v5 file, one after another; raises ValueError where one is cut."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack(order + "II", content[at:at + 8])
        if kind >> 16:                                         # a small element: size and type in one word, then up to 4 bytes
            kind, size, start, at = kind & 0xffff, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError("a small element of more than 4 bytes")
        else:
            start, at = at + 8, at + 8 + size + (-size % 8 if kind != 15 else 0)
            if start + size > len(content):
                raise ValueError(f"cut after {len(content):,} bytes")
        yield kind, content[start:start + size]


def _read_mat(path, variable):
    """A numeric matrix of whole numbers in a MATLAB v5 file. (scipy's reader can crash the process on a damaged file.)"""
    try:
        content = Path(path).read_bytes()
        order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
        if order is None:
            raise ValueError("no header of MATLAB v5")
        for kind, element in _mat_elements(content[128:], order):
            if kind == 15:                                     # compressed
                (kind, element), = _mat_elements(zlib.decompressobj().decompress(element, 1 << 28), order)
            if kind != 14:                                     # a matrix
                continue
            (_, flags), (_, shape), (_, name), *values = _mat_elements(element, order)
            if name.decode("latin-1") != variable:
                continue
            if not 6 <= struct.unpack(order + "I", flags[:4])[0] & 0xff <= 15 or len(values) != 1 or values[0][0] not in _MAT_TYPES:
                raise ValueError(f"{variable} is no matrix of real numbers")
            shape, values = np.frombuffer(shape, order + "i4"), np.frombuffer(values[0][1], order + _MAT_TYPES[values[0][0]])
            if (shape < 0).any() or (abs(values.astype("f8")) > 2 ** 53).any() or math.prod(shape.tolist()) != len(values) or not (np.isfinite(values) & (values == np.floor(values))).all():
                raise ValueError(f"{variable} holds no whole numbers of its shape {tuple(shape.tolist())}")
            return values.reshape(shape.tolist(), order="F").astype(np.int64)
    except (ValueError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: not a readable .mat file ({error})") from None
    raise UserError(f"{path}: no variable {variable}")


def _read_hdf5(path, variable, most):
    """The whole numbers of a dataset in a MATLAB v7.3 file, at most `most` of them."""
    try:
        import h5py
        with h5py.File(path, "r") as file:
            if variable not in file:
                raise UserError(f"{path}: no variable {variable}")
            if not isinstance(file.get(variable, getlink=True), h5py.HardLink) or file[variable].external:
                raise ValueError(f"{variable} lies in another file")
            if file[variable].size > most:
                raise UserError(f"{path}: {variable} has {file[variable].size:,} entries, more than the {most:,} test tracklets")
            values = file[variable][()].ravel().tolist()
        if any(v != int(v) for v in values):
            raise ValueError(f"{variable} holds no whole numbers")
        return [int(v) for v in values]
    except UserError:
        raise
    except Exception as error:  # h5py raises many kinds for a damaged file
        raise UserError(f"{path}: not a readable HDF5 .mat file ({' '.join(str(error).split())[:200]})") from None


# name: loader, and folders in it, each of which tells it from the folder above
DATA_SETS = {"mars": (load_mars, ("info", "bbox_train", "bbox_test")), "duke": (load_duke, ("train", "query", "gallery")),
             "lsvid": (load_lsvid, ("list_sequence", "test")), "ilids": (load_ilids, ("i-LIDS-VID", "train-test people splits")),
             "prid": (load_prid, ("multi_shot",)), "synthetic": (load_mars, ("info", "bbox_train", "bbox_test")),
             "folder": (load_folder, ("train", "query", "gallery"))}
SPLIT_SETS = ("ilids", "prid")
PRID_PERSONS = 178                                             # under both cameras with more than 21 frames
CHUNK = {"duke": 32, "lsvid": 64}                              # default of --chunk; others: 0
PUBLISHED = {"mars": dict(train=8298, query=1980, gallery=11310), "duke": dict(train=2196, query=702, gallery=2636),
             "lsvid": dict(train=2831, query=3504, gallery=11333), "ilids": dict(train=300, query=150, gallery=150),
             "prid": dict(train=178, query=89, gallery=89)}


# ------------------------------------------------------------------------------------------------------ clip sampling
# From the number of frames n of a tracklet to frame indices. Training: one clip, (T,). Test: every clip, (clips, T).

def sample_strided(n, T, rng, stride=4):
    """T frames, `stride` apart, from a random start; a short tracklet takes the largest stride that fits, one with
    fewer than T frames is cycled."""
    stride = max(1, min(stride, (n - 1) // max(T - 1, 1)))
    return (rng.integers(max(1, n - (T - 1) * stride)) + stride * np.arange(T)) % n


def sample_adjacent(n, T, rng):
    """T consecutive frames from a random start; a tracklet with fewer than T frames is cycled."""
    return sample_strided(n, T, rng, stride=1)


def sample_segments(n, T, rng):
    """One random frame of each of T equal parts (TSN: Wang et al., ECCV 2016); with n < T frames are repeated in order."""
    edges = np.arange(T + 1) * n // T
    return rng.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))


def split_consecutive(n, T):
    """ceil(n/T) clips of T consecutive frames, every frame used; the last clip is filled by cycling the tracklet."""
    return (np.arange(-(-n // T) * T) % n).reshape(-1, T)


def split_whole(n, T):
    """floor(n/T) clips of T consecutive frames, the rest dropped; a tracklet with fewer than T frames is cycled to one clip."""
    return (np.arange(max(n // T, 1) * T) % n).reshape(-1, T)


def split_segments(n, T):
    """ceil(n/T) clips, each with one frame of each of T equal parts, in order, as in training; every frame used, some of them twice
    where T does not divide n."""
    places = -(-n // T) * T
    return (np.arange(places) * n // places).reshape(T, -1).T


# ------------------------------------------------------------------------------------------- frames and augmentation

def _decode(path):
    """A frame, uint8 (H, W, 3). JPEG by torchvision, faster than Pillow and with the same pixels; Pillow takes the rest, and says what is wrong."""
    if decode_jpeg and path.lower().endswith((".jpg", ".jpeg")):
        try:
            return decode_jpeg(read_file(path), ImageReadMode.RGB).permute(1, 2, 0).numpy()
        except RuntimeError:
            pass
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def read_clip(paths, size):
    """Decodes frames and resizes those that are not of `size` (height, width) yet: uint8 (T, 3, H, W).

    Raises UserError with the file's name when a frame is missing or unreadable: a clip is never shortened.
    """
    height, width = size = tuple(size)
    clip = np.empty((len(paths), height, width, 3), np.uint8)
    for t, path in enumerate(paths):
        try:
            frame = _decode(path)
            clip[t] = frame if frame.shape[:2] == size else Image.fromarray(frame).resize((width, height), Image.BILINEAR)
        except FileNotFoundError:
            raise UserError(f"{path}: no such frame, although the data set lists it") from None
        except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: unreadable image ({' '.join(str(error).split())})") from None
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def random_flip(clip, rng, p=0.5):
    """Mirrors all frames of a clip (..., W), with probability p."""
    return clip.flip(-1) if rng.random() < p else clip


def random_erase(clip, rng, p=0.5, area=(0.02, 0.4), aspect=(0.3, 1 / 0.3)):
    """Erases one box, the same in all frames of a uint8 clip (T, 3, H, W), with probability p.

    Random erasing (Zhong et al., AAAI 2020): `area` is the box's share of the frame, `aspect` its height over width. The
    box takes ImageNet's mean colour, which normalisation maps to 0.
    """
    if rng.random() >= p:
        return clip
    H, W = clip.shape[-2:]
    while True:
        size, ratio = rng.uniform(*area) * H * W, math.exp(rng.uniform(*np.log(aspect)))
        h, w = max(1, round(math.sqrt(size * ratio))), max(1, round(math.sqrt(size / ratio)))
        if h <= H and w <= W:
            break
    y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
    clip = clip.clone()
    clip[:, :, y:y + h, x:x + w] = torch.tensor([round(255 * m) for m in IMAGENET_MEAN], dtype=torch.uint8)[:, None, None]
    return clip


def normalize(clips):
    """uint8 clips (..., 3, H, W) -> float32, with ImageNet's mean and standard deviation; runs where the clips are."""
    mean, std = (torch.tensor(v, device=clips.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips.float() / 255 - mean) / std


class TrainClips(torch.utils.data.Dataset):
    """Augmented training clips; an item is (clip uint8 (T, 3, H, W), pid).

    It is asked with what `PKSampler` yields, (tracklet, seed...): the frames and the augmentation depend on these numbers
    alone, not on the worker, so that a run can be repeated with any number of workers.

    sample: a function of (n, T, rng) that draws frame indices; flip, erase: probabilities.
    """

    def __init__(self, tracklets, sample, T, size, flip=0.5, erase=0.5):
        self.tracklets, self.sample, self.T, self.size, self.flip, self.erase = tracklets, sample, T, size, flip, erase

    def __len__(self):
        return len(self.tracklets)

    def __getitem__(self, item):
        index, *seed = item
        rng = np.random.default_rng(seed)
        frames, pid, _ = self.tracklets[index]
        clip = read_clip([frames[i] for i in self.sample(len(frames), self.T, rng)], self.size)
        return random_erase(random_flip(clip, rng, self.flip), rng, self.erase), pid


class AllClips(torch.utils.data.Dataset):
    """All clips of all tracklets, one after another; an item is (clip uint8 (T, 3, H, W), number of its tracklet).

    split: a function of (n, T) that gives the frame indices of all clips, (clips, T).
    """

    def __init__(self, tracklets, split, T, size):
        self.tracklets, self.split, self.T, self.size = tracklets, split, T, size
        self.clips = [(i, j) for i, t in enumerate(tracklets) for j in range(len(split(len(t.frames), T)))]

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, item):
        index, clip = self.clips[item]
        frames = self.tracklets[index].frames
        return read_clip([frames[i] for i in self.split(len(frames), self.T)[clip]], self.size), index


def _two_clips(batch, world):
    if batch == world:
        raise UserError(f"a batch of {batch} leaves each of {world} processes a single clip, BatchNorm needs two: use more --ids or --clips")


class PKSampler(torch.utils.data.Sampler):
    """Batches of P distinct identities with K clips each (Hermans et al., 2017).

    An epoch shows every identity at least once: ceil(identities / P) batches, the last one filled up with identities of
    the first. Clips of an identity come from different tracklets as long as it has enough of them. Yields lists of
    (tracklet, seed, epoch, position), a pure function of (seed, epoch); position is the clip's place in the epoch.

    pids: label of every training tracklet; rank, world: this process takes P / world identities of each batch.
    Call `set_epoch(epoch, start)` before each epoch; `start` skips batches of an epoch that was begun already.
    """

    def __init__(self, pids, P, K, seed=0, rank=0, world=1):
        self.tracklets = {}
        for index, pid in enumerate(pids):
            self.tracklets.setdefault(pid, []).append(index)
        self.pids = sorted(self.tracklets)
        if P > len(self.pids):
            raise UserError(f"a batch needs {P} identities, the training set has {len(self.pids)}: use --ids {len(self.pids)} or fewer")
        if P % world:
            raise UserError(f"{P} identities a batch do not divide over {world} processes: use a multiple of {world}")
        _two_clips(P * K, world)
        self.P, self.K, self.seed, self.rank, self.world = P, K, seed, rank, world
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return -(-len(self.pids) // self.P) - self.start

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.pids)
        order = np.concatenate([order, order[:-len(order) % self.P]]).reshape(-1, self.P)  # the fill is of other identities
        for number, batch in enumerate(order):
            picks = []
            for pid in batch:
                mine = self.tracklets[pid]
                picks.append([mine[i] for i in np.resize(rng.permutation(len(mine)), self.K)])
            if number >= self.start:
                places = np.arange(self.P * self.K).reshape(self.P, self.K) + number * self.P * self.K
                yield [(index, self.seed, self.epoch, int(place)) for p in range(self.rank, self.P, self.world)
                       for index, place in zip(picks[p], places[p])]


class TrackletSampler(PKSampler):
    """Batches of P * K tracklets, whatever their identities; an epoch shows every tracklet once, the last batch is filled up
    with the first ones. Otherwise as PKSampler."""

    def __init__(self, pids, P, K, seed=0, rank=0, world=1):
        if P * K > len(pids):
            raise UserError(f"a batch needs {P * K} tracklets, the training set has {len(pids)}: use fewer --ids or --clips")
        if P * K % world:
            raise UserError(f"{P * K} tracklets a batch do not divide over {world} processes: use a multiple of {world}")
        _two_clips(P * K, world)
        self.count, self.batch, self.seed, self.rank, self.world = len(pids), P * K, seed, rank, world
        self.set_epoch(0)

    def __len__(self):
        return -(-self.count // self.batch) - self.start

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        order = np.resize(order, len(order) + -len(order) % self.batch).reshape(-1, self.batch)
        for number, batch in enumerate(order):
            if number >= self.start:
                yield [(int(batch[i]), self.seed, self.epoch, int(number * self.batch + i)) for i in range(self.rank, self.batch, self.world)]


# ------------------------------------------------------------------------------------------------ the synthetic data set
# Small drawn pedestrians. People come in look-alike groups that share the salient upper clothes and differ in the rest.

_CLOTH = [(196, 36, 42), (42, 84, 186), (36, 132, 66), (232, 196, 52), (236, 236, 230), (38, 38, 42), (232, 118, 36),
          (232, 138, 172), (112, 60, 146), (34, 142, 152)]
_LOWER = [(44, 62, 112), (34, 34, 38), (132, 132, 138), (204, 184, 146), (104, 70, 46), (228, 228, 222), (92, 98, 56), (134, 34, 44)]
_HAIR = [(28, 24, 22), (84, 54, 30), (206, 168, 92), (150, 62, 30), (156, 156, 158)]
_SKIN = [(240, 204, 178), (216, 168, 130), (168, 116, 80), (98, 64, 44)]
_SHOES = [(28, 28, 30), (236, 236, 234), (184, 40, 40), (120, 82, 50), (60, 110, 190)]
_BAGS = [(30, 30, 32), (170, 40, 40), (40, 90, 160), (120, 80, 44), (226, 180, 60), (60, 130, 80)]
_SUPER = 3  # frames are drawn three times as large and averaged down


def _draw_people(count, rng, group=4):
    people = []
    while len(people) < count:
        upper, second = rng.choice(len(_CLOTH), 2, replace=False)
        shared = dict(upper=_CLOTH[upper], second=_CLOTH[second], coat=rng.random() < 0.3, sleeves=rng.random() < 0.65,
                      pattern=["plain", "plain", "hoops", "stripes", "checks", "halves"][rng.integers(6)])
        lower, cut, hair, bag = (rng.permutation(n) for n in (len(_LOWER), 4, 5, 4))
        for i in range(min(group, count - len(people))):
            people.append(dict(
                shared, lower=_LOWER[lower[i]], cut=["trousers", "shorts", "skirt", "trousers"][cut[i]],
                hair=["short", "long", "bun", "cap", "bald"][hair[i]], hair_colour=_HAIR[rng.integers(5)],
                bag=["none", "backpack", "shoulder", "hand"][bag[i]], bag_colour=_BAGS[rng.integers(6)],
                cap=_BAGS[rng.integers(6)], skin=_SKIN[rng.integers(4)], shoes=_SHOES[rng.integers(5)],
                build=rng.uniform(0.82, 1.25), height=rng.uniform(0.9, 1.04), leg=rng.uniform(0.47, 0.53),
                frequency=rng.uniform(0.55, 1.0), stride=rng.uniform(0.3, 0.6), arms=rng.uniform(0.15, 0.7)))
    return people


def _draw_camera(index, rng, zoom):
    return dict(cast=1 + 0.16 * (np.array(colorsys.hsv_to_rgb(rng.random(), 1, 1)) - 0.5), gain=rng.uniform(0.8, 1.15),
                gamma=rng.uniform(0.85, 1.2), saturation=rng.uniform(0.75, 1.1), light=0.15 * rng.choice([-1, 1]),
                yaw=[0.25, 1.35, 2.75, -1.1, 0.9, -2.2][index % 6] + rng.uniform(-0.15, 0.15), scale=rng.uniform(0.85, 0.97),
                blur=rng.uniform(0.0, 0.7), noise=rng.uniform(1, 5), scene=_draw_scene(rng, zoom))


def _draw_scene(rng, zoom):
    """The wide background along which people walk, `zoom` times 420 x 150: a floor, and bricks, windows or trees above."""
    width, height = 420, 150
    wall = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.0, 0.12), rng.uniform(0.5, 0.8)))
    floor = 255 * np.array(colorsys.hsv_to_rgb(rng.choice([0.1, 0.28, 0.6]), rng.uniform(0.0, 0.15), rng.uniform(0.4, 0.7)))
    edge = int(rng.uniform(0.35, 0.6) * height)
    image = Image.new("RGB", (width, height), _shade(wall))
    draw = ImageDraw.Draw(image)
    kind = rng.integers(3)
    if kind == 0:
        for y in range(0, edge, 8):
            draw.line([0, y, width, y], _shade(wall, 0.8))
            for x in range(y % 16, width, 16):
                draw.line([x, y, x, y + 8], _shade(wall, 0.8))
    elif kind == 1:
        for x in range(0, width, 60):
            draw.rectangle([x + 6, 12, x + 46, edge - 8], _shade(wall, rng.uniform(0.4, 1.2)))
    else:
        for x in rng.integers(0, width, 9).tolist():
            r = int(rng.integers(14, 24))
            draw.rectangle([x - 3, edge - 40, x + 3, edge], (84, 62, 44))
            draw.ellipse([x - r, edge - 40 - r, x + r, edge - 40 + r], _shade(rng.integers([30, 80, 30], [70, 130, 60])))
    draw.rectangle([0, edge, width, height], _shade(floor))
    for x in rng.integers(0, width, 5).tolist():
        draw.rectangle([x, edge, x + int(rng.integers(10, 40)), height], _shade(floor, rng.uniform(0.8, 1.1)))
    for i in range(1, 7):
        y = edge + (height - edge) * i * i // 40
        draw.line([0, y, width, y], _shade(floor, 0.88))
    pixels = (np.asarray(image) + rng.normal(0, 6, (height, width, 1))).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8)).resize((round(zoom * width), round(zoom * height)), Image.BILINEAR)


def _shade(colour, factor=1.0):
    return tuple(int(min(255, c * factor)) for c in colour)


def _limb(draw, a, b, wa, wb, colour):
    """A rounded bar from a to b, wa and wb half its width at the ends."""
    length = math.dist(a, b) or 1
    nx, ny = (a[1] - b[1]) / length, (b[0] - a[0]) / length
    draw.polygon([(a[0] + nx * wa, a[1] + ny * wa), (b[0] + nx * wb, b[1] + ny * wb),
                  (b[0] - nx * wb, b[1] - ny * wb), (a[0] - nx * wa, a[1] - ny * wa)], colour)
    for (x, y), w in ((a, wa), (b, wb)):
        draw.ellipse([x - w, y - w, x + w, y + w], colour)


def _draw_person(image, who, phase, yaw, x, y, h):
    """Draws `who`, h pixels tall, the feet at (x, y), at `phase` of the gait; yaw 0 faces the camera, pi/2 walks right."""
    draw = ImageDraw.Draw(image)
    s, c, build, skin, upper, bag, bag_colour = (math.sin(yaw), math.cos(yaw), who["build"], who["skin"], who["upper"], who["bag"],
                                                 who["bag_colour"])
    ahead, near = math.copysign(1, s), 1 if s >= 0 else -1     # walking direction; the side that is nearer to the camera
    bob = 0.008 * math.cos(2 * phase)
    hip, shoulder, head = who["leg"] + bob, 0.82 + bob, 0.905 + bob
    across = 0.6 * abs(s) + abs(c)                             # a body is flatter from the side
    chest, waist = 0.118 * build * across, 0.088 * build * across

    def at(dx, dy):                                            # body units (height 1, y up) -> pixels
        return x + 1.25 * dx * h, y - dy * h

    def box(x0, y0, x1, y1):                                   # the same for a box with corners in any order
        (x0, y0), (x1, y1) = at(x0, y0), at(x1, y1)
        return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]

    def pen(width):
        return max(1, int(width * h))

    def leg(side):
        dark, swing = 1.0 if side == near else 0.82, who["stride"] * math.sin(phase) * side
        bend = 0.9 * who["stride"] * max(0.0, math.cos(phase) * side) + 0.05
        top = (side * 0.045 * build * c, hip)
        knee = (top[0] + 0.5 * hip * math.sin(swing) * s, hip - 0.5 * hip * math.cos(swing))
        ankle = (knee[0] + 0.46 * hip * math.sin(swing - bend) * s, knee[1] - 0.46 * hip * math.cos(swing - bend))
        toe = (ankle[0] + 0.055 * s, ankle[1] - 0.012 - 0.018 * max(c, 0))
        bare, cloth, w = _shade(skin, dark), _shade(who["lower"], dark), 0.046 * build * h
        trousers = who["cut"] == "trousers"
        _limb(draw, at(*knee), at(*ankle), w * 0.72, w * (0.62 if trousers else 0.45), cloth if trousers else bare)
        _limb(draw, at(*top), at(*knee), w * 1.12, w * 0.82, bare if who["cut"] == "skirt" else cloth)
        _limb(draw, at(*ankle), at(*toe), 0.024 * h, 0.021 * h, _shade(who["shoes"], dark))

    def arm(side):
        dark, swing = 0.95 if side == near else 0.78, -who["arms"] * math.sin(phase) * side
        top = (side * (chest - 0.012) * c * min(1.0, abs(c) / 0.3), shoulder - 0.025)
        elbow = (top[0] + 0.16 * math.sin(swing) * s + side * 0.018 * c, top[1] - 0.16 * math.cos(swing))
        hand = (elbow[0] + 0.14 * math.sin(swing + 0.3) * s, elbow[1] - 0.14 * math.cos(swing + 0.25))
        sleeve, bare, w = _shade(who["second" if who["pattern"] == "halves" else "upper"], dark), _shade(skin, dark), 0.031 * build * h
        _limb(draw, at(*elbow), at(*hand), w * 0.85, w * 0.7, sleeve if who["sleeves"] else bare)
        _limb(draw, at(*top), at(*elbow), w, w * 0.88, sleeve)
        _limb(draw, at(*hand), at(hand[0], hand[1] - 0.015), w * 0.7, w * 0.6, bare)
        if bag == "hand" and side == 1:
            draw.line([at(*hand), at(hand[0], hand[1] - 0.05)], _shade(bag_colour, 0.7), pen(0.012))
            draw.rectangle(box(hand[0] - 0.055, hand[1] - 0.04, hand[0] + 0.055, hand[1] - 0.15), bag_colour)

    def torso():
        low, wide = (hip - 0.13, 1.3) if who["coat"] else (hip - 0.01, 1.08)
        right = [(0.75 * chest, shoulder + 0.015), (chest, shoulder - 0.02), (1.05 * waist, hip + 0.05), (wide * waist, low)]
        outline = [at(*p) for p in right] + [at(-dx, dy) for dx, dy in right[::-1]]
        if who["pattern"] == "plain":
            draw.polygon(outline, upper)
        else:
            mask, cloth = Image.new("L", image.size), Image.new("RGB", image.size, upper)
            ImageDraw.Draw(mask).polygon(outline, 255)
            paint = ImageDraw.Draw(cloth)
            if who["pattern"] in ("hoops", "checks"):
                for i in range(7):
                    paint.rectangle(box(-0.3, shoulder - 0.03 - 0.07 * i, 0.3, shoulder - 0.065 - 0.07 * i), who["second"])
            if who["pattern"] in ("stripes", "checks"):
                for i in range(-4, 5):
                    paint.rectangle(box(0.055 * i * across - 0.012, 1, 0.055 * i * across + 0.012, 0), who["second"])
            if who["pattern"] == "halves":
                paint.rectangle(box(-0.3, 1, 0.3, (shoulder + hip) / 2 + 0.04), who["second"])
            image.paste(cloth, mask=mask)
        draw.line([at(-waist, low + 0.004), at(waist, low + 0.004)], _shade(upper, 0.6), pen(0.008))

    def skirt():
        flare = 1.35 * waist + 0.125 * who["stride"] * abs(math.sin(phase) * s)
        draw.polygon([at(-waist, hip + 0.03), at(waist, hip + 0.03), at(flare, 0.52 * hip), at(-flare, 0.52 * hip)], who["lower"])

    def backpack():
        draw.rounded_rectangle(box(-ahead * 0.55 * chest, shoulder - 0.01, -ahead * (0.55 * chest + 0.11 * abs(s)), hip + 0.07),
                               0.03 * h, bag_colour)           # stands out behind

    def straps():
        dark = _shade(bag_colour, 0.7)
        if c < -0.35:                                          # from behind it hides most of the back
            draw.rounded_rectangle(box(-0.68 * chest, shoulder - 0.01, 0.68 * chest, hip + 0.07), 0.04 * h, bag_colour)
            draw.line([at(-0.5 * chest, shoulder - 0.1), at(0.5 * chest, shoulder - 0.1)], dark, pen(0.012))
        else:
            for side in (-1, 1) if c > 0.5 else (ahead * 0.6,):
                draw.line([at(side * 0.5 * chest, shoulder + 0.01), at(side * 0.55 * chest, hip + 0.15)], dark, pen(0.02))

    def face():
        hair, turn = who["hair_colour"], 0.012 * s
        _limb(draw, at(0, shoulder), at(0, head - 0.03), 0.027 * h, 0.025 * h, _shade(skin, 0.85))
        if who["hair"] == "long":
            draw.rounded_rectangle(box(-0.062 - turn, head + 0.02, 0.062 - turn, shoulder - (0.05 if c < 0.3 else 0.01)), 0.03 * h, hair)
        draw.ellipse(box(-0.053 + turn, head + 0.06, 0.053 + turn, head - 0.06), skin)
        if who["hair"] == "cap":
            draw.pieslice(box(-0.06, head + 0.072, 0.06, head - 0.057), 180, 360, who["cap"])
            peak = [min(0, 0.1 * s) - 0.045 * abs(c), max(0, 0.1 * s) + 0.045 * abs(c)]
            draw.rectangle(box(peak[0], head + 0.022, peak[1], head + 0.006), _shade(who["cap"], 0.75))
        elif who["hair"] != "bald":
            if c < -0.3:
                draw.ellipse(box(-0.057, head + 0.068, 0.057, head - 0.036), hair)
            else:
                draw.pieslice(box(-0.06, head + 0.072, 0.06, head - 0.057), 180, 360, hair)
            if abs(s) > 0.3:                                   # the back of the head, from the side
                draw.ellipse(box(-0.035 * ahead - 0.032, head + 0.06, -0.035 * ahead + 0.032,
                                 head - (0.054 if who["hair"] == "long" else 0.018)), hair)
            if who["hair"] == "bun":
                draw.ellipse(box(-0.045 * s - 0.03, head + 0.11, -0.045 * s + 0.03, head + 0.05), hair)

    draw.ellipse(box(-0.16, 0.012, 0.16, -0.022), (60, 60, 64))  # from the far side to the near one
    arm(-near), leg(-near), leg(near)
    if who["cut"] == "skirt":
        skirt()
    if bag == "backpack" and abs(s) > 0.35:
        backpack()
    torso()
    if bag == "backpack":
        straps()
    face()
    if abs(c) > 0.5:
        arm(-near)
    arm(near)
    if bag == "shoulder":
        side = math.copysign(1, c)
        draw.line([at(-0.6 * side * chest, shoulder), at(1.1 * side * waist, hip + 0.03)], _shade(bag_colour, 0.7), pen(0.018))
        draw.rounded_rectangle(box(1.1 * side * waist - 0.06, hip + 0.045, 1.1 * side * waist + 0.06, hip - 0.075), 0.015 * h, bag_colour)


def _draw_occluder(draw, kind, x, w, h, tint):
    """Something that passes in front: a pole, a box on a cart, or another pedestrian."""
    if kind == "pole":
        draw.rectangle([x - 0.06 * w, 0, x + 0.06 * w, h], tint)
    elif kind == "box":
        draw.rectangle([x - 0.5 * w, 0.68 * h, x + 0.3 * w, h], tint)
        draw.rectangle([x - 0.3 * w, 0.62 * h, x + 0.2 * w, 0.68 * h], _shade(tint, 1.3))
    elif kind == "passer":
        draw.ellipse([x - 0.1 * w, 0.1 * h, x + 0.1 * w, 0.23 * h], (120, 90, 70))
        draw.rounded_rectangle([x - 0.2 * w, 0.22 * h, x + 0.2 * w, 0.6 * h], 0.06 * w, tint)
        draw.rectangle([x - 0.14 * w, 0.58 * h, x + 0.14 * w, h], _shade(tint, 0.5))


def _draw_tracklet(who, camera, frames, size, rng):
    """Yields the frames (PIL images of (height, width) `size`) of `who` (None: a false detection) walking past `camera`."""
    height, width = size
    h, w, unit = _SUPER * height, _SUPER * width, height / 128
    yaw = camera["yaw"] + rng.choice([0, 0.5], p=[0.8, 0.2]) + rng.uniform(-0.2, 0.2)
    phase, start, gain = rng.uniform(0, 2 * math.pi), rng.uniform(40, 280), camera["gain"] * rng.uniform(0.9, 1.1)
    kind = rng.choice(["none", "pole", "passer", "box"], p=[0.64, 0.12, 0.12, 0.12])
    when, tint = rng.uniform(0, frames), _shade(rng.uniform(50, 150) + rng.uniform(-30, 30, 3))
    drift, colour = rng.normal(0, 1, 2), (camera["cast"] * gain * (1 + camera["light"] * np.linspace(-1, 1, width)[:, None]) / 255)
    colour = colour.astype(np.float32)
    for i in range(frames):
        drift = 0.7 * drift + rng.normal(0, 1, 2)              # the detector's box trembles
        left = int(np.clip((start + 2.5 * i * math.sin(yaw) + drift[0]) * _SUPER * unit, 0, camera["scene"].width - w))
        image = camera["scene"].crop((left, 5, left + w, 5 + h))
        if who:
            _draw_person(image, who, phase + 2 * math.pi * who["frequency"] * i / 8, yaw, w / 2 + 1.2 * drift[0] * unit * _SUPER,
                         0.965 * h + drift[1] * unit * _SUPER, h * camera["scale"] * who["height"] * rng.uniform(0.96, 1.04))
        _draw_occluder(ImageDraw.Draw(image), kind, w * (0.5 + (i - when) / 6), w, h, tint)
        image = image.reduce(_SUPER)
        blur = camera["blur"] + (rng.uniform(0.4, 1.0) if rng.random() < 0.12 else 0)
        if blur > 0.3:
            image = image.filter(ImageFilter.GaussianBlur(blur * unit))
        pixels = np.asarray(image, np.float32)
        grey = pixels @ np.full((3, 1), 1 / 3, np.float32)
        pixels = ((grey + np.float32(camera["saturation"]) * (pixels - grey)) * colour).clip(0, 1) ** np.float32(camera["gamma"])
        pixels = 255 * pixels + np.float32(camera["noise"]) * rng.standard_normal((height, width, 1), np.float32)
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_synthetic(folder, identities=64, test_identities=20, cameras=4, frames=(5, 12), size=(128, 64), seed=0):
    """Draws a data set of synthetic pedestrians in MARS' layout into `folder`, which must not exist yet.

    Every identity has one or two tracklets of frames[0] to frames[1] frames under each camera; the first of each is a
    query. The test part has a junk tracklet and two distractors for each camera, too. The same arguments give the same
    bytes. It is drawn aside and renamed at the end, so that an interrupted drawing leaves no half data set.

    size: (height, width) of a frame in pixels. Raises UserError when the folder exists or cannot be written.
    """
    from scipy.io import savemat
    folder = Path(folder)
    try:
        if folder.exists():
            raise UserError(f"{folder} exists already: name another folder, or remove it first")
    except OSError as error:
        raise UserError(f"{folder}: cannot draw the synthetic data set there ({error.strerror or error})") from None
    views = [_draw_camera(i, np.random.default_rng([seed, 0, i]), _SUPER * size[0] / 128) for i in range(cameras)]
    people = {"train": _draw_people(identities, np.random.default_rng([seed, 1])),
              "test": _draw_people(test_identities, np.random.default_rng([seed, 2])),
              "distractors": _draw_people(2 * cameras, np.random.default_rng([seed, 3]), group=1)}
    plan = {"train": [], "test": []}                           # (pid, camera, number, who, seeds)
    for cam in range(cameras):
        plan["test"].append((-1, cam, 1, None, (4, cam)))
    for cam in range(cameras):
        plan["test"] += [(0, cam, i + 1, people["distractors"][2 * cam + i], (5, cam, i)) for i in range(2)]
    for part, first in (("train", 1), ("test", 1 + identities)):
        for pid, who in enumerate(people[part], first):
            for cam in range(cameras):
                repeats = 1 + (np.random.default_rng([seed, 6, pid, cam]).random() < 0.25)
                plan[part] += [(pid, cam, i + 1, who, (7, pid, cam, i)) for i in range(repeats)]

    def mat(path, variable, values):                           # scipy writes the time into the header: take it out
        buffer = io.BytesIO()
        savemat(buffer, {variable: values})
        path.write_bytes(b"MATLAB 5.0 MAT-file, synthetic pedestrians".ljust(116) + buffer.getvalue()[116:])

    aside = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        (aside / "info").mkdir(parents=True)
        with tqdm(total=sum(map(len, plan.values())), desc="drawing", unit=" tracklets", disable=None) as bar:
            for part, tracklets in plan.items():
                names, rows, query = [], [], []
                for pid, cam, number, who, seeds in tracklets:
                    rng, person = np.random.default_rng([seed, *seeds]), f"{pid:0>4}"
                    where, first = aside / f"bbox_{part}" / person, len(names) + 1
                    where.mkdir(parents=True, exist_ok=True)
                    count = int(rng.integers(frames[0], frames[1] + 1))
                    for i, image in enumerate(_draw_tracklet(who, views[cam], count, size, rng), 1):
                        names.append(f"{person}C{cam + 1}T{number:04}F{i:03}.jpg")
                        image.save(where / names[-1], quality=90)
                    rows.append((first, len(names), pid, cam + 1))
                    if pid > 0 and number == 1:
                        query.append(len(rows))
                    bar.update()
                (aside / f"info/{part}_name.txt").write_text("\n".join(names) + "\n")
                mat(aside / f"info/tracks_{part}_info.mat", f"track_{part}_info", np.array(rows, np.int32))
        mat(aside / "info/query_IDX.mat", "query_IDX", np.array([query], np.uint16))
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot draw the synthetic data set there ({error.strerror or error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_images(dataset):
    """Decodes every frame of a data set, with a progress bar, and prints a line for each that cannot be; returns their number."""
    def problem(path):
        try:
            read_clip([path], (1, 1))
        except UserError as error:
            return str(error)
    paths, bad = sorted({frame for part in (dataset.train, dataset.query, dataset.gallery) for t in part for frame in t.frames}), 0
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool, tqdm(total=len(paths), desc="checking", unit=" frames", disable=None) as bar:
        for start in range(0, len(paths), 4096):
            for line in pool.map(problem, paths[start:start + 4096]):
                bar.update()
                if line:
                    bad += 1
                    bar.write(line, file=sys.stdout)
    print(f"{len(paths):,} frames checked, {bad:,} bad")
    return bad


def _main():
    parser = argparse.ArgumentParser(description="Draws a synthetic data set of pedestrians in the layout of MARS, or checks a data set.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--synthetic", metavar="DIR", help="folder to make; must not exist yet")
    what.add_argument("--check", action="store_true", help="decode every frame of --data and name the bad ones; exit code 1 when there are any")
    parser.add_argument("--data", choices=DATA_SETS, default="mars", help="data set to check")
    parser.add_argument("--root", metavar="DIR", default="datasets", help="folder that holds the data sets, or the set itself")
    parser.add_argument("--identities", type=int, default=64, metavar="N", help="training identities, 1 to 4999")
    parser.add_argument("--test-identities", type=int, default=20, metavar="N", help="test identities, others than those of the training, 1 to 4999")
    parser.add_argument("--cameras", type=int, default=4, metavar="C", help="cameras, 2 to 9")
    parser.add_argument("--frames", type=int, nargs=2, default=(5, 12), metavar=("MIN", "MAX"), help="frames a tracklet, 1 to 999")
    parser.add_argument("--height", type=int, default=128, help="height of a frame in pixels, 32 to 1024")
    parser.add_argument("--width", type=int, default=64, help="width of a frame in pixels, a quarter to all of the height")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bytes; 0 or more")
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (--help lists the flags)"))
    args = parser.parse_args()
    if args.check:
        dataset = load_dataset(args.data, args.root, draw=False)
        print(dataset.summary())
        return 1 if check_images(dataset) else 0
    low, high = args.frames
    for good, flag, needs in ((1 <= args.identities <= 4999, "--identities", "1 to 4999"), (2 <= args.cameras <= 9, "--cameras", "2 to 9"),
                              (1 <= args.test_identities <= 4999, "--test-identities", "1 to 4999"),
                              (1 <= low <= high <= 999, "--frames", "1 <= MIN <= MAX <= 999"), (args.seed >= 0, "--seed", "0 or more"),
                              (32 <= args.height <= 1024, "--height", "32 to 1024"),
                              (args.height <= 4 * args.width <= 4 * args.height, "--width", "a quarter to all of the height")):
        if not good:
            raise UserError(f"{flag} must be {needs}")
    draw_synthetic(args.synthetic, args.identities, args.test_identities, args.cameras, (low, high), (args.height, args.width), args.seed)
    print(load_mars(args.synthetic, "synthetic").summary())


if __name__ == "__main__":
    try:
        sys.exit(_main())
    except UserError as error:
        sys.exit(print(f"data.py: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("data.py: interrupted", file=sys.stderr) or 130)
