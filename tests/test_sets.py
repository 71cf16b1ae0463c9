"""The public data sets in their true layout, written small, and a folder of one's own: what they
hold, what is wrong or odd in them, and random damage."""
import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

import data
from data import UserError, load_dataset

LIST = "list_sequence/list_seq_train.txt"
QUERIES = "test/data/info_test.mat"
SPLITS = "train-test people splits/train_test_splits_ilidsvid.mat"
JSON = "splits_prid2011.json"
DRAWN = "drawn_splits_prid.json"


def image(path, colour=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 16), (colour % 256,) * 3).save(path)


def write_duke(root, new_names=False):
    """Two tracklets a training identity, three test identities under two or three cameras; frame
    numbers start at 2."""
    pattern = "{}_C{}_F{:04}_X{}.jpg" if new_names else "{}C{}F{:04}X{}.jpg"

    def tracklet(part, pid, number, cam, frames):
        for f in range(2, 2 + frames):
            name = pattern.format(pid, cam, f, 9 * f)
            image(root / f"duke/{part}/{pid}/{number:04}/{name}", f)

    for i, pid in enumerate(("0007", "0001", "0100")):
        tracklet("train", pid, 1, 2, 12 + i)
        tracklet("train", pid, 2, 5, 3)
    for i, pid in enumerate(("0002", "0010", "0005")):
        tracklet("query", pid, 1, 1, 2)
        tracklet("gallery", pid, 2, 3, 4)
        tracklet("gallery", pid, 3, 4, 1 + i)
    return root / "duke"


def write_lsvid(root):
    folder = root / "lsvid"
    (folder / "list_sequence").mkdir(parents=True)
    for part, pids in (("train", (3, 1)), ("test", (9, 4, 7))):
        rows = []
        for pid in pids:
            for cam in (2, 11):
                start = f"tracklet_{part}/{pid:04}/{pid:04}_{cam}0_{cam:02}"
                rows.append(f"{start}_1 {pid}")
                for f in (1, 2, 10):
                    image(folder / f"{start}_1_{f}.jpg", f)
                image(folder / f"{start}_10_7.jpg")  # of another tracklet, ..._10
        (folder / f"list_sequence/list_seq_{part}.txt").write_text("\n".join(rows) + "\n")
    hdf5([[1.0], [3.0], [5.0]])(folder)
    return folder


def write_ilids(root, persons=8):
    folder = root / "ilids"
    sequences = folder / "i-LIDS-VID/sequences"
    for number in range(3, 3 * persons + 1, 3):
        for cam in (1, 2):
            for f in (2, 9, 10):
                name = f"cam{cam}_person{number:03}_{f}.png"
                image(sequences / f"cam{cam}/person{number:03}/{name}", f)
    image(sequences / "cam1/person999/cam1_person999_1.png")  # under one camera only
    rows = [np.random.default_rng(i).permutation(persons) + 1 for i in range(10)]
    (folder / SPLITS).parent.mkdir()
    savemat(folder / SPLITS, {"ls_set": np.array(rows, np.uint16)})
    return folder


def write_prid(root, persons=6, folder="prid"):
    """The last of the persons has a frame too few; persons 201 and 202 are others under camera a
    than under camera b."""
    folder = root / folder
    numbers = {**dict.fromkeys(range(1, persons), 27), persons: 26, 201: 27, 202: 27}
    for number, frames in numbers.items():
        for cam in "ab":
            where = folder / f"multi_shot/cam_{cam}/person_{number:04}"
            image(where / "0001.png")
            for f in range(2, frames + 1):
                shutil.copy(where / "0001.png", where / f"{f:04}.png")
    image(folder / "multi_shot/cam_b/person_0700/0001.png")
    return folder


def write_folder(root):
    folder = root / "folder"
    cams = ("door", "hall 2", "hall 10")
    for part, pids, cams in (
        ("train", ("bob", "alice"), cams),
        ("gallery", ("Zoë", "user 10", "user 9"), cams),
        ("query", ("user 9", "Zoë"), ("hall 2",)),
    ):
        for pid in pids:
            for cam in cams:
                for f in (1, 2, 11):
                    image(folder / part / pid / cam / f"t one/{f}.jpg", f)
    return folder


WRITE = {
    "duke": write_duke,
    "lsvid": write_lsvid,
    "ilids": write_ilids,
    "prid": write_prid,
    "folder": write_folder,
}


MATLAB_CLASS = {"u1": "uint8", "i2": "int16", "u2": "uint16", "i4": "int32", "i8": "int64",
                "f4": "single", "f8": "double"}


def save_7_3(path, name, values):
    """As MATLAB's save(..., '-v7.3'): dimensions in reverse order, the class in an attribute, and
    512 bytes before the HDF5 file."""
    values = np.atleast_2d(values)
    with h5py.File(path, "w", userblock_size=512) as file:
        file[name] = values.T
        kind = MATLAB_CLASS.get(values.dtype.str[1:], "char")
        file[name].attrs["MATLAB_class"] = np.bytes_(kind)
    with open(path, "r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")


def hdf5(values, name="query"):
    """Writes LS-VID's table of the queries."""
    def write(folder):
        (folder / QUERIES).parent.mkdir(parents=True, exist_ok=True)
        save_7_3(folder / QUERIES, name, values)
    return write


def numbers(tracklet):
    """Frame numbers out of the file names, in the order of the tracklet."""
    return [int(re.findall(r"\d+", Path(f).name)[-1]) for f in tracklet.frames]


def labels(tracklets):
    return [(t.pid, t.cam) for t in tracklets]


def above(tracklets, level=2):
    """Names of the folders that the tracklets lie in."""
    return [t.frames[0].split("/")[-level] for t in tracklets]


# ----------------------------------------------------------------------------- what the sets hold

@pytest.mark.parametrize("new_names", [False, True])
def test_duke(tmp_path, new_names, capsys):
    folder = write_duke(tmp_path, new_names)
    (folder / "train/.hidden").mkdir()
    d = load_dataset("duke", tmp_path)
    assert d.num_identities == 3
    assert labels(d.train) == [(0, 2), (0, 5), (1, 2), (1, 5), (2, 2), (2, 5)]
    assert [len(t.frames) for t in d.train] == [13, 3, 12, 3, 14, 3]
    assert labels(d.query) == [(1, 1), (2, 1), (3, 1)]
    assert {t.cam for t in d.gallery} == {3, 4} and len(d.gallery) == 6
    assert not {t.frames for t in d.query} & {t.frames for t in d.gallery}
    by_number = [int(re.search(r"F(\d+)", f)[1]) for f in d.train[0].frames]
    assert by_number == list(range(2, 15))
    out = capsys.readouterr().out
    assert "2,196 train tracklets expected, 6 found" in out
    assert load_dataset("duke", folder).train == d.train  # the set itself as --root


@pytest.mark.parametrize("pattern", [
    "{}C{}T0001F{:03}.jpg",  # as in MARS
    "{}C{}F{:03}.jpg", "{}_c{}_f{:07}.jpg", "{}_C{}_T1_F{}.jpg", "{}_c{}s1_f{:06}_01.jpg",
    "C{1}F{2:03}.jpg", "{}-C{}-F{:04}.jpg",
])
def test_dukes_cameras_are_read_from_other_names(tmp_path, pattern):
    folder = write_duke(tmp_path)
    before = load_dataset("duke", tmp_path)
    for path in [*folder.rglob("*.jpg")]:
        pid, cam, frame, _ = re.fullmatch(r"(\d+)C(\d+)F(\d+)X(\d+)", path.stem).groups()
        path.rename(path.with_name(pattern.format(pid, cam, int(frame))))
    d = load_dataset("duke", tmp_path)
    for part in ("train", "query", "gallery"):
        assert labels(getattr(d, part)) == labels(getattr(before, part))


def test_lsvid(tmp_path):
    write_lsvid(tmp_path)
    d = load_dataset("lsvid", tmp_path)
    assert labels(d.train) == [(1, 2), (1, 11), (0, 2), (0, 11)]  # pids 3 and 1
    assert labels(d.gallery) == [(3, 2), (3, 11), (1, 2), (1, 11), (2, 2), (2, 11)]
    assert d.query == d.gallery[::2]
    for t in d.train + d.gallery:
        assert numbers(t) == [1, 2, 10]  # in numeric order, and not those of ..._10


def test_ilids_and_its_splits(tmp_path):
    folder = write_ilids(tmp_path)
    rows = loadmat(folder / SPLITS)["ls_set"]
    for split in (0, 9):
        d = load_dataset("ilids", tmp_path, split)
        persons = [f"person{number * 3:03}" for number in rows[split]]
        assert set(above(d.train)) == set(persons[4:])
        assert set(above(d.query)) == set(above(d.gallery)) == set(persons[:4])
        assert len(d.train) == 8 and d.num_identities == 4
        assert {t.cam for t in d.query} == {1}
        assert {t.cam for t in d.gallery} == {2}
        assert numbers(d.train[0]) == [2, 9, 10]
    with pytest.raises(UserError, match="row 10 of ls_set is not a permutation"):
        load_dataset("ilids", tmp_path, 10)


def test_prid_draws_splits_and_says_so(tmp_path, capsys, monkeypatch):
    folder = write_prid(tmp_path)
    (folder / "multi_shot/cam_a/person_0800").mkdir()  # empty, and under both cameras: not used
    (folder / "multi_shot/cam_b/person_0800").mkdir()
    few = load_dataset("prid", tmp_path, 3)
    out = capsys.readouterr().out
    assert "drawn with a fixed seed" in out and "178 train tracklets expected, 4 found" in out
    assert os.listdir(folder) == ["multi_shot"]

    monkeypatch.setattr(data, "PRID_PERSONS", 5)
    d = load_dataset("prid", tmp_path, 3)
    says = "split 3 is one of ten drawn with a fixed seed, not one of the published ones"
    assert says in capsys.readouterr().out and d == few
    assert sorted(os.listdir(folder)) == [DRAWN, "multi_shot"]  # never the published name
    text = (folder / DRAWN).read_text()
    splits = json.loads(text)
    used = {f"person_{i:04}" for i in range(1, 6)}  # the 6th has 26 frames
    assert len(splits) == 10 and {*splits[3]["train"], *splits[3]["test"]} == used
    assert set(above(d.train)) == set(splits[3]["train"])
    assert len(d.query) == len(d.gallery) == len(splits[3]["test"]) == 3

    changed = [splits[0]] * 10
    (folder / DRAWN).write_text(json.dumps(changed))  # those that were drawn once stay
    assert set(above(load_dataset("prid", tmp_path, 3).train)) == set(splits[0]["train"])
    assert says in capsys.readouterr().out  # from the second run on, too
    (folder / DRAWN).unlink()
    assert load_dataset("prid", tmp_path, 3) == d
    assert (folder / DRAWN).read_text() == text  # a fixed seed
    (folder / DRAWN).write_text("[{")
    with pytest.raises(UserError, match=f"{DRAWN}: not a JSON list"):
        load_dataset("prid", tmp_path, 3)


def test_prid_numbers_above_200_are_other_people(tmp_path):
    cams = tmp_path / "prid/multi_shot"
    numbers = {"a": [*range(1, 7), *range(201, 205)], "b": [*range(1, 7), *range(201, 207)]}
    for cam, persons in numbers.items():
        for number in persons:
            for f in range(1, 28):
                path = cams / f"cam_{cam}/person_{number:04}/{f:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    d = load_dataset("prid", tmp_path)
    people = {f"person_{i:04}" for i in range(1, 7)}
    assert {*above(d.train), *above(d.query), *above(d.gallery)} == people
    assert len(d.train) == 6 and len(d.query) == len(d.gallery) == 3


MINE = [{"train": ["person_0002"], "test": ["person_0001", "person_0003"]}]


@pytest.mark.parametrize("root", ["prid", "prid2011/prid_2011", "datasets"])
@pytest.mark.parametrize("where", ["beside", "one folder up"])
@pytest.mark.parametrize("file", [JSON, "train_test_splits_prid.mat"])
def test_prid_splits_are_found(tmp_path, root, where, file, capsys, monkeypatch):
    """Beside the images or, where torchreid puts them, one folder up; also by --root . there."""
    inner = "datasets/prid" if root == "datasets" else root
    folder = write_prid(tmp_path, folder=inner)
    place = folder if where == "beside" else folder.parent
    if file == JSON:
        (place / file).write_text(json.dumps(MINE), "utf-8-sig")
        test = ["person_0001", "person_0003"]
    else:  # the numbers of the sorted persons; the first half are those of the test
        rows = np.array([[1, 3, 2, 4]] * 10, np.uint16)
        savemat(place / file, {"ls_set": rows})
        shutil.rmtree(folder / "multi_shot/cam_a/person_0002")  # persons 1, 3, 4, 5
        test = ["person_0001", "person_0004"]
    monkeypatch.setattr(data, "PRID_PERSONS", 5)
    for start, named in ((tmp_path, root), (folder, ".")):
        monkeypatch.chdir(start)
        assert above(load_dataset("prid", named).query) == test
        assert "drawn" not in capsys.readouterr().out
    assert not [*tmp_path.rglob("drawn*")]


@pytest.mark.parametrize("junk", ["0000", "00-1", "0", "-1", "00000"])
@pytest.mark.parametrize("part", ["train", "query", "gallery"])
def test_in_a_folder_every_identity_is_a_person_and_marss_names_are_warned_of(
        tmp_path, part, junk, capsys):
    folder = write_folder(tmp_path)
    image(folder / part / "1000" / "door/t one/1.jpg")  # and no other is
    plain = load_dataset("folder", tmp_path)
    assert "junk" not in capsys.readouterr().out
    for cam in ("door", "hall 2"):
        image(folder / part / junk / cam / "t one/1.jpg")
    d = load_dataset("folder", tmp_path)
    says = f"warning: {folder}/{part}/{junk}: this identity is named like the junk or the "
    assert says in capsys.readouterr().out
    more = [len(getattr(d, p)) - len(getattr(plain, p)) for p in ("train", "query", "gallery")]
    assert more == [2 * (p == part) for p in ("train", "query", "gallery")]
    assert all(t.pid > 0 for t in d.query + d.gallery)


def test_an_identity_of_0_is_a_person_in_duke_and_lsvid(tmp_path):
    folder = write_duke(tmp_path)
    shutil.copytree(folder / "gallery/0002", folder / "gallery/0000")
    for path in [*(folder / "gallery/0000").rglob("*.jpg")]:
        path.rename(path.with_name("0000" + path.name[4:]))
    assert all(t.pid > 0 for t in load_dataset("duke", tmp_path).gallery)
    folder = write_lsvid(tmp_path)
    listing = folder / "list_sequence/list_seq_test.txt"
    listing.write_text(listing.read_text().replace(" 4", " 0").replace(" 9", " -1"))
    assert all(t.pid > 0 for t in load_dataset("lsvid", tmp_path).gallery)


def test_folder(tmp_path, capsys):
    write_folder(tmp_path)
    d = load_dataset("folder", tmp_path)
    # alice and bob; door, hall 2 and hall 10
    assert labels(d.train) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert above(d.train[::3], 4) == ["alice", "bob"]
    assert numbers(d.train[0]) == [1, 2, 11]
    assert labels(d.query) == [(1, 2), (2, 2)] and len(d.gallery) == 9
    assert "warning" not in capsys.readouterr().out

    shutil.rmtree(tmp_path / "folder/query")
    image(tmp_path / "folder/gallery/user 9/door/t two/1.jpg")
    d = load_dataset("folder", tmp_path)
    assert "a query (9 in all)" in capsys.readouterr().out
    assert len(d.query) == 9 and len(d.gallery) == 10
    assert all(t in d.gallery for t in d.query)
    assert "t two" not in above(d.query)


@pytest.mark.parametrize("frames, pieces", [
    (1, [1]), (31, [31]), (32, [32]), (33, [33]), (63, [63]), (64, [32, 32]), (70, [32, 38]),
    (95, [32, 63]), (96, [32, 32, 32]),
])
def test_the_last_piece_takes_the_remainder(tmp_path, frames, pieces):
    write_duke(tmp_path)
    for f in range(frames):
        image(tmp_path / f"duke/train/0001/0003/0001C7F{f:04}X1.jpg")
    whole = load_dataset("duke", tmp_path)
    cut = load_dataset("duke", tmp_path, chunk=32)
    assert [len(t.frames) for t in cut.train if t.cam == 7] == pieces
    assert (cut.query, cut.gallery) == (whole.query, whole.gallery)
    in_order = [(f, t.pid) for t in whole.train for f in t.frames]
    assert [(f, t.pid) for t in cut.train for f in t.frames] == in_order


def test_chunks_of_the_published_sets():
    assert data.CHUNK == {"duke": 32, "lsvid": 64}


def test_seen_by_one_camera_only_is_counted(tmp_path):
    folder = write_folder(tmp_path)
    assert "one camera only" not in load_dataset("folder", tmp_path).summary()
    for cam in ("door", "hall 2"):
        shutil.rmtree(folder / "train/bob" / cam)
    says = "1 training identities are seen by one camera only"
    assert says in load_dataset("folder", tmp_path).summary()


@pytest.mark.parametrize("name", WRITE)
def test_labels_do_not_depend_on_the_file_system(tmp_path, name, monkeypatch):
    WRITE[name](tmp_path)
    first = load_dataset(name, tmp_path)
    listing = data._listing
    (tmp_path / "prid" / DRAWN).unlink(missing_ok=True)
    monkeypatch.setattr(data, "_listing", lambda path: (listing(path)[0][::-1], set()))
    assert load_dataset(name, tmp_path) == first


@pytest.mark.parametrize("names", [
    ["f2.jpg", "f10.jpg", "f1.jpg"],
    ["f02.jpg", "f10.jpg", "f01.jpg"],
    ["f1.png", "f1.jpg"],
    ["a.jpg"],
    ["9_1.jpg", "10_1.jpg"],
    ["f1a2.jpg", "f10b.jpg", "f1a1.jpg"],
    ["1.jpeg", "12.jpg", "2.jpeg"],
    ["f (2).jpg", "f (10).jpg", "f (1).jpg"],
])
def test_frames_are_in_natural_order(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    frames = data._frames(tmp_path, data._images(tmp_path))
    assert [Path(f).name for f in frames] == sorted(names, key=data.natural_key)


@pytest.mark.parametrize("names, warned", [
    # times: the second number of each is a decimal fraction
    (["1700000000.125", "1700000000.25", "1700000000.5"], True),
    (["1700000000.05", "1700000000.5"], False),  # who counts writes 5 and 05 alike
    (["1699999999.9", "1700000000.05", "1700000000.125", "1700000001.5"], False),
    (["12.05s", "12.5s", "13.25s"], False),
    (["12.25s", "12.5s", "13.5s"], True),
    (["12,05", "12,5"], False),
    (["cam1.2_12.05", "cam1.2_12.5"], False),
    (["12-30-05.06", "12-30-05.6"], False),
    (["9.123456", "10.123456"], False),  # the same either way
    (["0", "0.5", "1", "1.25", "1.5", "10"], True),
    # counted: as in sections, takes, versions
    (["1.1", "1.2", "1.9", "1.10", "1.11"], False),
    (["1.01", "1.02", "1.10", "1.99", "1.100"], False),
    (["frame.5", "frame.25", "frame.125"], False),  # there is no number before the dot
    (["12_5", "12_25", "12_125"], False),
    (["12-5", "12-25"], False),
    (["2020.1.2", "2020.1.15", "2020.2.3", "2020.11.3"], False),
    (["v1.2.9", "v1.2.12", "v1.11.1", "v1.11.25"], False),
    (["2020.1.2_5", "2020.1.2_25"], False),
])
def test_frames_named_by_times_are_in_the_order_of_time(tmp_path, names, warned, capsys):
    folder = write_folder(tmp_path) / "train/bob/door/t two"
    for name in names[::-1]:
        image(folder / f"{name}.jpg")
    train = load_dataset("folder", tmp_path).train
    (found,) = [t.frames for t in train if "/t two/" in t.frames[0]]
    assert [Path(f).stem for f in found] == names
    out = capsys.readouterr().out
    says = f"warning: {folder}/{names[0]}.jpg: the numbers in the file names may be decimals or"
    assert (says in out) == warned and out.count("warning") == warned, out


def test_a_large_index_builds_in_seconds(tmp_path, monkeypatch):
    """15,000 tracklets of 100 frames in 300 folders: one listing for each folder, and numeric
    order. No file is made."""
    folder = tmp_path / "lsvid"
    rows = []
    files = {}
    for pid in range(300):
        names = []
        for k in range(50):
            start = f"{pid:04}_{k}_{k % 15:02}_{k}"
            rows.append(f"t/{pid:04}/{start} {pid}")
            names += [f"{start}_{f}.jpg" for f in range(100)]
        files[folder / f"t/{pid:04}"] = names
    (folder / "list_sequence").mkdir(parents=True)
    for part, these in (("train", rows[:7500]), ("test", rows[7500:])):
        (folder / f"list_sequence/list_seq_{part}.txt").write_text("\n".join(these))
    hdf5([[1.0], [2.0]])(folder)
    listings = []
    monkeypatch.setattr(
        data, "_listing", lambda path: listings.append(path) or (files[path], set()))
    start = time.perf_counter()
    d = load_dataset("lsvid", tmp_path, images=False)
    seconds = time.perf_counter() - start
    print(f"index of {len(d.train) + len(d.gallery):,} tracklets built in {seconds:.2f} s")
    assert len(d.train) + len(d.gallery) == 15_000
    assert len(listings) == 300 and seconds < 60
    assert all(numbers(t) == list(range(100)) for t in d.train[::500])


# ------------------------------------------------------------------------------------ what is odd

def copy_frame(path, name):
    shutil.copy(path, path.with_name(name))


def rename_frame(path, name):
    path.rename(path.with_name(name))


TRACK = "train/0001/0001"  # of Duke
CAM = "i-LIDS-VID/sequences/cam1"
FOREIGN = "the file name and its folder disagree on the person or the camera"
BESIDE = "this image next to the folders is ignored"
OTHERWISE = "the file name differs from that of the tracklet's last frame in more than its numbers"
IGNORED = "this is not a .jpg, .jpeg or .png file and is ignored"


@pytest.mark.parametrize("name, damage, first, says", [
    ("duke", lambda f: rename_frame(f / TRACK / "0001C2F0003X27.jpg", "0016C2F0003X27.jpg"),
     f"{TRACK}/0016C2F0003X27.jpg", FOREIGN),
    ("duke", lambda f: copy_frame(f / TRACK / "0001C2F0003X27.jpg", "0001C2F0003X27 (1).jpg"),
     f"{TRACK}/0001C2F0003X27 (1).jpg", OTHERWISE),
    ("duke", lambda f: image(f / TRACK / "0001C2F0099X1.png"),
     f"{TRACK}/0001C2F0002X18.jpg", OTHERWISE),
    ("duke", lambda f: image(f / TRACK / "0001C2F0099X1.BMP"),
     f"{TRACK}/0001C2F0099X1.BMP", IGNORED),
    ("duke", lambda f: image(f / "train/0001/0001C2F0099X1.jpg"),
     "train/0001/0001C2F0099X1.jpg", BESIDE),
    ("ilids", lambda f: image(f / CAM / "person003/cam2_person012_1.png"),
     f"{CAM}/person003/cam2_person012_1.png", FOREIGN),
    ("ilids", lambda f: image(f / CAM / "person003/cam1_person021_1.png"),
     f"{CAM}/person003/cam1_person021_1.png", FOREIGN),
    ("ilids", lambda f: image(f / CAM / "cam1_person003_1.png"),
     f"{CAM}/cam1_person003_1.png", BESIDE),
    ("prid", lambda f: image(f / "multi_shot/cam_b/person_0001/0099.tif"),
     "multi_shot/cam_b/person_0001/0099.tif", IGNORED),
    ("lsvid", lambda f: image(f / "tracklet_train/0003/0003_20_02_1_11.png"),
     "tracklet_train/0003/0003_20_02_1_1.jpg", OTHERWISE),
    ("lsvid", lambda f: image(f / "tracklet_train/0003/0003_20_02_1_11.webp"),
     "tracklet_train/0003/0003_20_02_1_11.webp", IGNORED),
    ("lsvid", lambda f: image(f / "tracklet_train/0003/0003_20_02_1_2 (1).jpg"),
     "tracklet_train/0003/0003_20_02_1_2 (1).jpg", OTHERWISE),
    ("folder", lambda f: image(f / "train/x.jpg"), "train/x.jpg", BESIDE),
    ("folder", lambda f: image(f / "train/bob/x.jpg"), "train/bob/x.jpg", BESIDE),
    ("folder", lambda f: image(f / "gallery/Zoë/door/x.png"), "gallery/Zoë/door/x.png", BESIDE),
    ("folder", lambda f: image(f / "train/bob/door/t one/3.png"),
     "train/bob/door/t one/3.png", OTHERWISE),
    ("folder", lambda f: shutil.copytree(f / "train/bob", f / "gallery/bob"),
     "train/bob", "this identity is in both the training and the test set"),
])
def test_what_is_odd_but_usable_is_one_warning(tmp_path, name, damage, first, says, capsys):
    folder = WRITE[name](tmp_path)
    load_dataset(name, tmp_path)
    before = capsys.readouterr().out.splitlines()
    damage(folder)
    load_dataset(name, tmp_path)
    new = [line for line in capsys.readouterr().out.splitlines() if line not in before]
    assert len(new) == 1
    assert new[0].startswith(f"warning: {folder}/{first}: {says}") and "1 in all" in new[0]


OTHERS = ("jfif", "PPM", "avif", "heic", "jp2", "jxl", "bmp", "mp4", "jpg.part", "txt", "npy")


@pytest.mark.parametrize("name, inside", [
    ("duke", TRACK), ("ilids", f"{CAM}/person003"), ("prid", "multi_shot/cam_b/person_0001"),
    ("lsvid", "tracklet_train/0003"), ("folder", "train/bob/door/t one"),
])
def test_no_file_is_left_out_in_silence(tmp_path, name, inside, capsys):
    folder = WRITE[name](tmp_path)
    load_dataset(name, tmp_path)
    before = capsys.readouterr().out.splitlines()
    for file in ("Thumbs.db", "desktop.ini", ".DS_Store"):  # but those of the system
        (folder / inside / file).touch()
    for suffix in OTHERS:
        (folder / inside / f"0001C1F0001.{suffix}").touch()
    load_dataset(name, tmp_path)
    new = [line for line in capsys.readouterr().out.splitlines() if line not in before]
    says = f"{IGNORED} ({len(OTHERS)} in all)"
    assert new == [f"warning: {folder}/{inside}/0001C1F0001.PPM: {says}"]


@pytest.mark.parametrize("name, link", [
    ("duke", f"{TRACK}/0001C2F0001X9.jpg"), ("duke", "train/0001/0009"), ("duke", "gallery/0009"),
    ("ilids", f"{CAM}/person003/cam1_person003_1.png"), ("ilids", f"{CAM}/person004"),
    ("lsvid", "tracklet_train/0003/0003_20_02_1_3.jpg"),
    ("folder", "train/bob/door/t one/3.jpg"), ("folder", "train/bob/door/t two"),
    ("folder", "query/Zoë/gate"), ("folder", "gallery/eve"), ("folder", "train/bob/door/t one/x"),
])
def test_links_to_nothing_are_left_out_with_a_warning(tmp_path, name, link, capsys):
    folder = WRITE[name](tmp_path)
    whole = load_dataset(name, tmp_path)
    before = capsys.readouterr().out.splitlines()
    (folder / link).symlink_to(tmp_path / "gone")
    assert load_dataset(name, tmp_path) == whole
    new = [line for line in capsys.readouterr().out.splitlines() if line not in before]
    assert new == [f"warning: {folder}/{link}: this broken symbolic link is ignored (1 in all)"]


def test_links_to_frames_and_folders_are_followed(tmp_path, capsys):
    folder = write_folder(tmp_path)
    (folder / "gallery").rename(tmp_path / "elsewhere")
    (folder / "gallery").mkdir()
    for path in (tmp_path / "elsewhere").iterdir():
        (folder / "gallery" / path.name).symlink_to(path)
    (folder / "train/bob/door/t one/3.jpg").symlink_to(folder / "train/bob/door/t one/2.jpg")
    d = load_dataset("folder", tmp_path)
    assert len(d.gallery) == 9 and max(len(t.frames) for t in d.train) == 4
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("name, inside, says", [
    ("duke", TRACK, f"{TRACK}: no images in it, but other files or folders, such as a.jfif (2 in"),
    ("folder", "train/bob/door/t one",
     "train/bob/door/t one: no images in it, but other files or folders, such as a.jfif (2 in"),
    ("folder", "train/bob/door",
     "train/bob/door: no folders in it, but other files or folders, such as a.jfif (2 in all);"),
    ("lsvid", "tracklet_train/0003", "no frames start with"),
    ("ilids", f"{CAM}/person003", "is not a permutation of the 7 persons"),
])
def test_a_folder_of_other_files_only_says_what_it_holds(tmp_path, name, inside, says, capsys):
    folder = WRITE[name](tmp_path) / inside
    shutil.rmtree(folder)
    folder.mkdir()
    for file in ("b.jfif", "a.jfif"):
        (folder / file).touch()
    with pytest.raises(UserError, match=re.escape(says)):
        load_dataset(name, tmp_path)
    out = capsys.readouterr().out  # what is odd is said before an error, too
    assert f"warning: {folder}/a.jfif: " in out and "ignored (2 in all)" in out


def test_many_odd_frames_are_one_line(tmp_path, capsys):
    folder = write_duke(tmp_path)
    for f in range(7):
        image(folder / f"train/0001/0001/0001C2F{f:04}X1.bmp")
    load_dataset("duke", tmp_path)
    odd = [line for line in capsys.readouterr().out.splitlines() if "ignored" in line]
    assert len(odd) == 1
    assert f"{folder}/train/0001/0001/0001C2F0000X1.bmp" in odd[0] and "7 in all" in odd[0]


def test_frames_that_are_all_numbered_in_brackets_are_no_copies(tmp_path, capsys):
    folder = write_folder(tmp_path)
    for f in range(3):
        image(folder / f"train/bob/door/t two/walk ({f}).jpg")
    load_dataset("folder", tmp_path)
    assert "warning" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------- what is wrong

def rows_of(change):
    """Changes the lines of LS-VID's list of the training tracklets."""
    def damage(folder):
        rows = (folder / LIST).read_text().splitlines()
        (folder / LIST).write_text("\n".join(change(rows)) + "\n")
    return damage


def first_row(change):
    return rows_of(lambda rows: [change(rows[0]), *rows[1:]])


def ls_set(values):
    return lambda folder: savemat(folder / SPLITS, {"ls_set": values})


def splits(text):
    return lambda folder: (folder / JSON).write_text(text)


def cut(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def remove(pattern):
    """Removes the files and folders of a pattern."""
    def damage(folder):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return damage


def test_to_test_needs_no_train(tmp_path, capsys):
    folder = write_folder(tmp_path)
    whole = load_dataset("folder", tmp_path)
    shutil.rmtree(folder / "train")
    d = load_dataset("folder", tmp_path, training=False)
    assert d.train == [] and d.num_identities == 0
    assert (d.query, len(d.gallery)) == (whole.query, len(whole.gallery))
    assert "train           -" in d.summary()
    shutil.rmtree(folder / "query")
    assert len(load_dataset("folder", tmp_path, training=False).query) == 9
    with pytest.raises(UserError, match="missing train; this folder should hold"):
        load_dataset("folder", tmp_path)


def test_to_train_a_folder_needs_no_match(tmp_path, capsys):
    folder = write_folder(tmp_path)
    rename_gallery(folder)
    d = load_dataset("folder", tmp_path)
    assert not d.has_a_match() and len(d.train) == 6
    out = capsys.readouterr().out
    assert f"warning: {folder}: no query has a match" in out
    assert "give each query tracklet a camera name that no other tracklet has" in out
    assert "the training runs without a test" in out


def test_within_one_camera_as_the_warning_says(tmp_path, capsys):
    """A camera name for each tracklet: every one is a query, and only it is left out."""
    for pid in ("eve", "bob"):
        for number in range(3):
            image(tmp_path / f"gallery/{pid}/door {number}/t/1.jpg")
    d = load_dataset("folder", tmp_path, training=False)
    assert d.has_a_match() and len(d.query) == 6 and "warning" not in capsys.readouterr().out


def rename_gallery(folder):
    """Other identities than those of the queries."""
    for path in list((folder / "gallery").iterdir()):
        path.rename(path.with_name("9" + path.name))


BAD = {
    "duke": [
        (remove("query"), "missing query; this folder should hold"),
        (remove("train/0001/0001/*"), "train/0001/0001: no images in it"),
        (lambda f: image(f / "train/0001/0001/x.jpg"),
         "x.jpg: no camera and frame number in the file name"),
        (lambda f: image(f / "train/0001/0001/0001C7F0001X1.jpg"),
         "0001C7F0001X1.jpg: the file name says camera 7, but the earlier frames of this tracklet "
         "are of camera 2"),
        (remove("train/*"), "duke/train: no folders in it"),
        (rename_gallery, "no query has a match"),
        (lambda f: image(f / "train/0900/0900C1F0001X1.jpg"),
         "train/0900: no folders in it, but other files or folders, such as 0900C1F0001X1.jpg "
         "(1 in all); expected {train,query,gallery}/<pid>/<tracklet>"),
    ],
    "lsvid": [
        (remove(LIST), f"missing {LIST}"),
        (rows_of(lambda rows: [*rows[:2], rows[2].split()[0], *rows[3:]]),
         f"{LIST}: line 3: expected '<path prefix> <pid>', found"),
        (first_row(lambda row: row + "x"), f"{LIST}: line 1: expected"),
        (first_row(lambda row: "../" + row), f"{LIST}: line 1: no frames start with"),
        (first_row(lambda row: "/etc/passwd 1"), f"{LIST}: line 1: no frames start with"),
        (first_row(lambda row: "a\0b/c_1_2 1"), f"{LIST}: line 1: no frames start with"),
        (first_row(lambda row: row.replace("_1 ", "_4 ")), f"{LIST}: line 1: no frames start with"),
        (rows_of(lambda rows: ["tracklet_train/0003/0003 3", *rows]),
         "must all have the same camera number as their third field"),
        (rows_of(lambda rows: []), "no train tracklets"),
        (rows_of(lambda rows: [*rows, rows[0]]), f"{LIST}: line 5: "),
        (rows_of(lambda rows: [rows[0].replace("_1 ", "_ "), *rows]),
         "are also in another line"),
        (remove("tracklet_train/0003/0003_20_02_1_*"), "line 1: no frames start with"),
        (hdf5([[0.0]]), "info_test.mat: 0 is not the number of a person's tracklet"),
        (hdf5([[7.0]]), "info_test.mat: 7 is not the number of a person's tracklet"),
        (hdf5([[1.0], [1.0]]), "or occurs twice"),
        (hdf5(np.ones(99)), "or occurs twice"),
        (hdf5([[1.5]]), "query is not a matrix of whole numbers"),
        (hdf5([[np.nan]]), "query is not a matrix of whole numbers"),
        (hdf5(b"text"), "query is not a matrix of whole numbers"),
        (hdf5([1.0], "q"), "not a readable .mat file with query"),
        (hdf5([1.0], "query/deeper"), "not a readable .mat file"),
        (cut(QUERIES, 900), "not a readable .mat file"),
        (cut(QUERIES, 0), "not a readable .mat file"),
    ],
    "ilids": [
        (remove(SPLITS), "missing train-test people splits"),
        (cut(SPLITS, 140), "not a readable .mat file"),
        (cut(SPLITS, 200), "not a readable .mat file"),
        (lambda f: savemat(f / SPLITS, {"set": np.ones((10, 8))}),
         "not a readable .mat file with ls_set"),
        (ls_set(np.ones((10, 8))), "row 0 of ls_set is not a permutation of the 8 persons"),
        (ls_set(np.full((10, 8), 1.5)), "ls_set is not a matrix of whole numbers"),
        (ls_set(np.full((10, 8), np.inf)), "ls_set is not a matrix of whole numbers"),
        (ls_set(np.full((10, 8), 1e300)), "ls_set is not a matrix of whole numbers"),
        (ls_set(np.full((10, 8), 1j)), "ls_set is not a matrix of whole numbers"),
        (ls_set("text"), "ls_set is not a matrix of whole numbers"),
        (remove("i-LIDS-VID/sequences/cam2/person006"), "not a permutation of the 7 persons"),
        (remove("i-LIDS-VID/sequences/cam2/person006/*"), "not a permutation of the 7 persons"),
    ],
    "prid": [
        (splits("[{"), "splits_prid2011.json: not a JSON list whose entry 0 is like"),
        (splits("[]"), "whose entry 0 is like"),
        (splits('{"train": 1}'), "whose entry 0 is like"),
        (splits('[{"train": ["../../etc"], "test": ["person_0001"]}]'),
         "names '../../etc', who is listed twice or is not one of the persons 1 to 200 with at "
         "least 27 frames"),
        (splits('[{"train": ["person_0201"], "test": ["person_0001"]}]'),
         "names 'person_0201', who is listed twice or is not one of the persons 1 to 200"),
        (splits('[{"train": ["person_0001"], "test": ["person_0001"]}]'), "who is listed twice or"),
        (splits('[{"train": ["person_0001"], "test": []}]'), "no query tracklets"),
    ],
    "folder": [
        (remove("gallery"), "missing gallery; this folder should hold"),
        (lambda f: (f / "train/bob/door/empty").mkdir(),
         "train/bob/door/empty: no images in it"),
        (remove("query/*"), "folder/query: no folders in it"),
        (lambda f: image(f / "train/eve/door/1.jpg"),
         "train/eve/door: no folders in it, but other files or folders, such as 1.jpg (1 in all); "
         "expected {train,query,gallery}/<pid>/<cam>/"),
    ],
}
@pytest.mark.parametrize("name", [*data.DATA_SETS])
def test_a_root_that_is_not_there_is_said_so(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    signs = ", ".join(data.DATA_SETS[name][1])
    for root, says in (("mine2", "no such folder;"), ("file", "not a folder;"),
                       ("empty", f"holds neither a folder {name} nor the data set itself;")):
        with pytest.raises(UserError) as error:
            load_dataset(name, root, training=False)
        assert str(error.value).startswith(
            f"{tmp_path}/{root}: {says} --root names the folder that holds {name}/, or the data "
            f"set itself, which has the folders {signs}")
        assert os.listdir("empty") == [] and not os.path.exists("mine2")


def test_a_set_one_folder_further_down_is_named(tmp_path):
    write_prid(tmp_path, folder="prid2011/prid_2011")
    says = f"; did you mean --root {tmp_path}/prid2011/prid_2011[?] --root names"
    with pytest.raises(UserError, match=says):
        load_dataset("prid", tmp_path / "prid2011")


CASES = [(name, damage, says) for name, cases in BAD.items() for damage, says in cases]


@pytest.mark.parametrize("name, damage, says", [
    *((name, shutil.rmtree, f"holds neither a folder {name} nor") for name in WRITE), *CASES,
])
def test_bad_data_is_one_line(tmp_path, name, damage, says):
    damage(WRITE[name](tmp_path))
    with pytest.raises(UserError) as error:
        load_dataset(name, tmp_path)
    assert says in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", MATLAB_CLASS)
@pytest.mark.parametrize("options", [{}, {"do_compression": True}, {"format": "4"}, "7.3"], ids=str)
def test_every_kind_of_mat_file_is_read(tmp_path, dtype, options):
    if dtype == "i8" and options == {"format": "4"}:
        pytest.skip("MATLAB 4 has no such type")
    path = tmp_path / "a.mat"
    values = np.random.default_rng(0).integers(0, 100, (7, 3)).astype(dtype)
    for shape in ((7, 3), (1, 21), (21, 1)):
        x = values.reshape(shape)
        if options == "7.3":
            save_7_3(path, "x", x)
        else:
            savemat(path, {"other": np.ones((2, 2)), "text": "x", "x": x}, **options)
        found = data._read_table(path, "x")
        assert found.dtype == np.int64 and np.array_equal(found, x)


@pytest.mark.parametrize("turned", [False, True])
def test_hdf5_files_of_others_than_matlab_are_read_as_they_fit(tmp_path, turned):
    x = np.arange(21).reshape(7, 3)
    with h5py.File(tmp_path / "a.mat", "w") as file:
        file["x"] = x.T if turned else x
    assert np.array_equal(data._read_table(tmp_path / "a.mat", "x", columns=3), x)


def as_7_3(path):
    """Writes the one variable of a .mat file as MATLAB 7.3 does."""
    (name, values), = ((k, v) for k, v in loadmat(path).items() if not k.startswith("__"))
    save_7_3(path, name, values)


def test_the_tables_of_the_sets_may_be_of_matlab_7_3(tmp_path, small_root):
    shutil.copytree(small_root / "synthetic", tmp_path / "synthetic")
    write_ilids(tmp_path)
    before = [load_dataset(name, tmp_path) for name in ("synthetic", "ilids")]
    for path in [*(tmp_path / "synthetic/info").glob("*.mat"), tmp_path / "ilids" / SPLITS]:
        as_7_3(path)
    assert [load_dataset(name, tmp_path) for name in ("synthetic", "ilids")] == before


def test_mars_own_tables_are_read():
    for file in (Path(__file__).parent / "mars_info").glob("*.mat"):
        variable = next(key for key in loadmat(file) if not key.startswith("__"))
        assert np.array_equal(data._read_table(file, variable), loadmat(file)[variable])


# ---------------------------------------------------------------------------------- random damage

def mutate(content, rng):
    """A random change: cut, flip bits, swap two pieces, repeat one, or put in something."""
    content = bytearray(content)
    kind = rng.randrange(5)
    a, b = sorted(rng.randrange(len(content)) for _ in range(2))
    if kind == 0:
        del content[a:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        size = rng.randrange(1, 20)
        content[a:a + size], content[b:b + size] = content[b:b + size], content[a:a + size]
    elif kind == 3:
        content[b:b] = content[a:a + rng.randrange(1, 40)]
    else:
        pieces = (b"\n", b"\0", b" ", b"../", b"9" * 30, b"-1", b"\xff\xfe", b"nan")
        content[a:a] = rng.choice(pieces)
    return bytes(content)


def cut_off(content, rng):
    return content[:rng.randrange(len(content))]


def owner(frame, name):
    """(camera, person) of a frame by its path below the folder `name`."""
    path = frame.rsplit(f"/{name}/", 1)[1]
    if name == "mars":
        return int(path.rsplit("/", 1)[1][5]), path.rsplit("/", 1)[1][:4]
    cam = {"prid": r"cam_(\w)", "ilids": r"cam(\d)", "lsvid": r"/\d+_\d+_(\d+)_"}[name]
    cam = re.search(cam, path)[1]
    person = re.search(r"person_?\d+|\d{4}(?=_\d)", path)[0]
    return "ab".index(cam) + 1 if cam in "ab" else int(cam), person


@pytest.mark.parametrize("name, file, damage", [
    ("mars", "info/train_name.txt", mutate),
    ("mars", "info/tracks_test_info.mat", cut_off),  # scipy's reader can crash on other damage
    ("mars", "info/query_IDX.mat", cut_off),
    ("lsvid", LIST, mutate),
    ("lsvid", "list_sequence/list_seq_test.txt", mutate),
    ("lsvid", QUERIES, mutate),
    ("ilids", SPLITS, cut_off),
    ("prid", DRAWN, mutate),
])
def test_random_damage_is_a_clean_error_or_a_correct_load(
        tmp_path, small_root, name, file, damage, monkeypatch):
    """60 damages each. The tracklets of a load that passes are of one person and camera, in
    order."""
    monkeypatch.setattr(data, "PRID_PERSONS", 5)
    if name == "mars":
        shutil.copytree(small_root / "synthetic", tmp_path / "mars")
    else:
        WRITE[name](tmp_path)
    good = load_dataset(name, tmp_path)
    known = {f for t in good.train + good.query + good.gallery for f in t.frames}
    path = tmp_path / name / file
    content = path.read_bytes()
    rng = random.Random(0)
    passed = 0
    for _ in range(60):
        path.write_bytes(damage(content, rng))
        start = time.perf_counter()
        try:
            found = load_dataset(name, tmp_path)
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            continue
        assert time.perf_counter() - start < 5
        passed += 1
        persons = {}  # label: the person, one of each
        for part, members in (("train", found.train), ("test", found.query + found.gallery)):
            for t in members:
                assert t.frames and len(set(t.frames)) == len(t.frames)
                if name != "mars":  # there a changed name is found when it is read
                    assert known.issuperset(t.frames)
                    assert numbers(t) == sorted(numbers(t))
                (cam, person), = {owner(frame, name) for frame in t.frames}
                assert cam == t.cam
                assert persons.setdefault((part, t.pid), person) == person
        assert sorted({t.pid for t in found.train}) == list(range(found.num_identities))
    assert passed < 60
    if damage is mutate and "list_seq" not in file:  # a list of four lines survives nothing
        assert passed


# --------------------------------------------------------------------------------------- --check

def test_check_names_every_bad_image(run, tmp_path):
    folder = write_lsvid(tmp_path / "sets")
    check = ("data.py", "--check", "--data", "lsvid", "--root", tmp_path / "sets")
    done = run(*check)
    assert done.returncode == 0 and " 0 missing or damaged" in done.stdout, done.stderr
    frames = sorted(p for p in folder.rglob("*.jpg") if "_10_7" not in p.name)[:3]
    content = frames[0].read_bytes()
    frames[0].write_bytes(b"")
    frames[1].write_bytes(content[:300])
    frames[2].write_bytes(content[:-2])  # libjpeg reads it, and complains
    done = run(*check)
    assert done.returncode == 1 and " 3 missing or damaged" in done.stdout
    assert "Traceback" not in done.stderr
    assert all(f"{frame}: unreadable image" in done.stdout for frame in frames)


@pytest.mark.parametrize("wrong", [
    ("--data", "lsvid"), ("--data", "synthetic"), ("--data", "marz"), ("--frames", "x"),
])
def test_check_draws_nothing(run, tmp_path, wrong):
    done = run("data.py", "--check", "--root", tmp_path / "nowhere", *wrong)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "nowhere").exists()
