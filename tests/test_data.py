"""MARS' layout, clip sampling, frames and augmentation, the samplers, the synthetic set."""
import collections
import io
import itertools
import math
import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps
from scipy.io import loadmat, savemat

import data
from conftest import MARS_INFO, write_mars_index
from data import (
    AllClips,
    PKSampler,
    TrackletSampler,
    TrainClips,
    UserError,
    draw_synthetic,
    load_dataset,
    load_mars,
    normalize,
    random_erase,
    random_flip,
    read_clip,
    sample_adjacent,
    sample_segments,
    sample_strided,
    split_consecutive,
    split_segments,
    split_whole,
)

TRAIN_TABLE = "info/tracks_train_info.mat"
TRAIN_NAMES = "info/train_name.txt"
QUERIES = "info/query_IDX.mat"


# -------------------------------------------------------------------------------------------- MARS

@pytest.fixture(scope="module")
def mars_index(tmp_path_factory):
    """MARS without images: its real tables, and name lists rebuilt from them."""
    folder = tmp_path_factory.mktemp("mars")
    for name in ("bbox_train", "bbox_test"):
        (folder / name).mkdir()
    write_mars_index(folder)
    return folder


def test_mars_real_index(mars_index):
    start = time.perf_counter()
    mars = load_mars(mars_index)
    print(f"index built in {time.perf_counter() - start:.2f} s")
    assert mars.num_identities == 625
    assert (len(mars.train), len(mars.query), len(mars.gallery)) == (8298, 1980, 11310)
    assert sum(len(t.frames) for t in mars.train) == 509_914
    assert sorted({t.pid for t in mars.train}) == list(range(625))
    assert sum(t.pid == 0 for t in mars.gallery) == 3248
    assert not any(t.pid < 0 for t in mars.gallery)
    gallery = {t.frames[0]: t for t in mars.gallery}
    assert all(gallery[t.frames[0]] == t for t in mars.query)  # the queries are in the gallery
    queries = {t.frames[0] for t in mars.query}
    others = [t for t in mars.gallery if t.frames[0] not in queries]
    assert len(others) == 9330
    matched = {(t.pid, t.cam) for t in others}
    alone = [q for q in mars.query if not any(p == q.pid and c != q.cam for p, c in matched)]
    assert len(alone) == 140
    assert max(len(t.frames) for t in mars.train + mars.gallery) == 920
    assert mars.train[0].frames[0].endswith("bbox_train/0001/0001C1T0001F001.jpg")
    assert {t.cam for t in mars.gallery} == set(range(1, 7))
    for text in ("8,298", "11,310", "3,248 distractors"):
        assert text in mars.summary()


def test_the_test_part_needs_no_images_of_the_training_part(small_root, tmp_path):
    shutil.copytree(small_root / "synthetic", tmp_path / "mars")
    shutil.rmtree(tmp_path / "mars/bbox_train")
    dataset = load_dataset("mars", tmp_path, training=False)
    assert dataset.query and dataset.gallery
    with pytest.raises(UserError, match="missing bbox_train"):
        load_dataset("mars", tmp_path)


def test_mars_labels_follow_sorted_pids(mars_index):
    rows = loadmat(MARS_INFO / "tracks_train_info.mat")["track_train_info"]
    pids = sorted(set(rows[:, 2].tolist()))
    assert [t.pid for t in load_mars(mars_index).train] == [pids.index(p) for p in rows[:, 2]]


def drop_last_line(folder):
    path = folder / "info/test_name.txt"
    path.write_text("\n".join(path.read_text().split()[:-1]))


def change_a_name(folder):
    path = folder / TRAIN_NAMES
    path.write_text(path.read_text().replace("0002C1", "0003C1", 1))


def put_in_a_name(name):
    def damage(folder):
        path = folder / TRAIN_NAMES
        path.write_text("\n".join([name, *path.read_text().split()[1:]]))
    return damage


def cut_test_table(size):
    def damage(folder):
        path = folder / "info/tracks_test_info.mat"
        path.write_bytes(path.read_bytes()[:size])
    return damage


def change_rows(change):
    def damage(folder):
        rows = loadmat(folder / TRAIN_TABLE)["track_train_info"].astype(int)
        change(rows)
        savemat(folder / TRAIN_TABLE, {"track_train_info": rows})
    return damage


def repeat_a_row(rows):
    rows[1] = rows[0]


def end_early(rows):
    rows[0, 1] -= 1


def train_table(name, values):
    return lambda folder: savemat(folder / TRAIN_TABLE, {name: values})


def queries(values):
    return lambda folder: savemat(folder / QUERIES, {"query_IDX": values})


def repeat_a_query(folder):
    first = loadmat(folder / QUERIES)["query_IDX"][0, 0]
    queries([[first, first]])(folder)


@pytest.mark.parametrize("damage, says", [
    (shutil.rmtree, "missing bbox_train, bbox_test, info/train_name.txt"),
    (lambda f: (f / QUERIES).unlink(), "missing info/query_IDX.mat; this folder should hold"),
    (drop_last_line, "of test_name.txt, some of which do not exist"),
    (change_a_name, "train_name.txt: line "),
    (cut_test_table(150), "tracks_test_info.mat: not a readable .mat file"),
    (cut_test_table(0), "tracks_test_info.mat: not a readable .mat file"),
    (train_table("tracks", np.ones((1, 4))), "not a readable .mat file with track_train_info"),
    (train_table("track_train_info", np.ones((1, 3))), "found shape (1, 3)"),
    (queries([[9999]]), "9999 is not the number of a person's tracklet"),
    (queries([[1]]), "1 is not the number of a person's tracklet"),  # junk
    (repeat_a_query, "or occurs twice"),
    (change_rows(repeat_a_row), "tracks_train_info.mat: row 2 refers to lines 1 to"),
    (put_in_a_name("../../etc/passwd"),
     "train_name.txt: line 1 is '../../etc/passwd', but row 1 of"),
    (put_in_a_name("0001C1T../../x"), "train_name.txt: line 1 is '0001C1T../../x', but row 1"),
])
def test_damaged_sets_are_one_line(small_root, tmp_path, damage, says):
    shutil.copytree(small_root / "synthetic", tmp_path / "synthetic")
    damage(tmp_path / "synthetic")
    with pytest.raises(UserError) as error:
        load_mars(tmp_path / "synthetic")
    assert says in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_odd_but_usable_is_a_warning(small_root, tmp_path, capsys):
    """Lines that no row takes, rows that end too early, frames out of order: the first is named."""
    folder = tmp_path / "synthetic"
    shutil.copytree(small_root / "synthetic", folder)
    names = (folder / TRAIN_NAMES).read_text().split()
    last = loadmat(folder / TRAIN_TABLE)["track_train_info"][0, 1]
    load_dataset("synthetic", tmp_path)
    assert "warning" not in capsys.readouterr().out
    change_rows(end_early)(folder)
    swapped = "\n".join([names[1], names[0], *names[2:]])
    (folder / TRAIN_NAMES).write_text("\ufeff" + swapped, "utf-8")  # with a byte-order mark
    train = load_dataset("synthetic", tmp_path).train
    out = capsys.readouterr().out
    left = (f"{folder / TRAIN_NAMES}: line {last}: no row of tracks_train_info.mat refers to this "
            "line")
    mixed = (f"{folder / TRAIN_TABLE}: row 1: the row's frames belong to several tracklets or are "
             "not in temporal order")
    assert f"warning: {left} (1 in all)" in out and f"warning: {mixed} (1 in all)" in out
    assert len(train[0].frames) == last - 1


def renumber(folder, number):
    """Identities of the training by another number, in MARS' layout; number: of the old one."""
    rows = loadmat(folder / TRAIN_TABLE)["track_train_info"].astype(int)
    for path in sorted((folder / "bbox_train").rglob("*.jpg")):
        new = number(path.name[:4])
        (folder / "bbox_train" / new).mkdir(exist_ok=True)
        path.rename(folder / "bbox_train" / new / (new + path.name[4:]))
    names = (folder / TRAIN_NAMES).read_text().split()
    (folder / TRAIN_NAMES).write_text("\n".join(number(n[:4]) + n[4:] for n in names))
    rows[:, 2] = [int(number(f"{pid:04}")) for pid in rows[:, 2]]
    savemat(folder / TRAIN_TABLE, {"track_train_info": rows})


@pytest.mark.parametrize("number", [
    lambda old: f"{int(old) + 9996:04}",  # 9997 to 10002
    lambda old: f"0{old}",  # five digits for all
], ids=["10001", "00001"])
def test_identities_of_five_digits(small_root, tmp_path, number):
    shutil.copytree(small_root / "synthetic", tmp_path / "mars")
    before = load_dataset("synthetic", tmp_path / "mars")
    renumber(tmp_path / "mars", number)
    d = load_dataset("mars", tmp_path)
    assert [(t.pid, t.cam, len(t.frames)) for t in d.train] == [
        (t.pid, t.cam, len(t.frames)) for t in before.train]
    assert read_clip(d.train[-1].frames, (64, 32)).any()


def move_down(folder):
    (folder / "bbox_train").rename(folder / "x")
    (folder / "bbox_train").mkdir()
    (folder / "x").rename(folder / "bbox_train/bbox_train")


def put_flat(folder):
    for path in [*(folder / "bbox_train").rglob("*.jpg")]:
        path.rename(folder / "bbox_train" / path.name)


def keep_in_archive(folder):
    shutil.rmtree(folder / "bbox_train")
    (folder / "bbox_train").mkdir()
    (folder / "bbox_train.zip").touch()


def lose_a_person(folder):
    shutil.rmtree(folder / "bbox_train/0003")


def lose_all(folder):
    shutil.rmtree(folder / "bbox_train")
    (folder / "bbox_train").mkdir()


def unlink_the_target(folder):
    frame = min((folder / "bbox_train").rglob("*F001.jpg"))
    frame.unlink()
    frame.symlink_to(folder / "gone.jpg")


@pytest.mark.parametrize("damage, says", [
    (move_down, "14 of 28 .*; the images seem to be in .*/bbox_train/bbox_train: move"),
    (put_flat, "14 of 28 .*; the images are in .*/bbox_train itself, not in a folder for each"),
    (keep_in_archive, "14 of 28 .*/bbox_train.zip seems not to have been unpacked$"),
    (lose_all, "14 of 28 .*/bbox_train is empty$"),
    (lose_a_person, "2 of 28 tracklets lack their first frame, such as .*/0003C1T0001F001.jpg$"),
    (unlink_the_target, "1 of 28 .*/0001C1T0001F001.jpg, which is a broken symbolic link$"),
])
def test_frames_that_are_not_there_are_found_at_loading(small_root, tmp_path, damage, says):
    folder = tmp_path / "mars"
    shutil.copytree(small_root / "synthetic", folder)
    whole = load_dataset("mars", tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=f"^{folder}: {says}") as error:
        load_dataset("mars", tmp_path)
    assert "\n" not in str(error.value)
    assert load_dataset("mars", tmp_path, images=False) == whole  # the index alone
    assert load_dataset("mars", tmp_path, training=False) == whole  # train is not read there


def test_an_archive_in_the_place_of_its_folder_is_named(small_root, tmp_path):
    shutil.copytree(small_root / "synthetic", tmp_path / "mars")
    shutil.rmtree(tmp_path / "mars/bbox_test")
    (tmp_path / "mars/bbox_test.tar.gz").touch()
    with pytest.raises(UserError, match="missing bbox_test; .*/bbox_test.tar.gz seems not to"):
        load_dataset("mars", tmp_path)


@pytest.mark.parametrize("folder", ["x" * 300, "locked/inside"])
def test_roots_that_the_system_refuses(tmp_path, folder, monkeypatch):
    def is_dir(path):
        raise PermissionError(13, "Permission denied", str(path))

    if folder == "locked/inside":
        monkeypatch.setattr(data.Path, "is_dir", is_dir)
    for name in data.DATA_SETS:
        with pytest.raises(UserError, match="cannot be read|cannot draw|no such folder") as error:
            load_dataset(name, tmp_path / folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot draw"):
        draw_synthetic(tmp_path / ("x" * 300))


def test_the_set_itself_is_a_root(small_root, tmp_path):
    inside = load_dataset("synthetic", small_root / "synthetic")
    assert inside == load_dataset("synthetic", small_root)
    assert not (small_root / "synthetic/synthetic").exists()
    shutil.copytree(small_root / "synthetic", tmp_path / "set")
    shutil.rmtree(tmp_path / "set/info")
    with pytest.raises(UserError, match=f"^{tmp_path}/set: missing info/train_name.txt"):
        load_dataset("mars", tmp_path / "set")


# ----------------------------------------------------------------------------------- clip sampling

@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 31, 920])
@pytest.mark.parametrize("T", [1, 4, 8])
def test_samplers(n, T):
    rng = np.random.default_rng(0)
    for _ in range(60):
        strided = sample_strided(n, T, rng, 4)
        adjacent = sample_adjacent(n, T, rng)
        segments = sample_segments(n, T, rng)
        for frames in (strided, adjacent, segments):
            assert frames.shape == (T,) and frames.min() >= 0 and frames.max() < n
        if n >= T * 4:
            assert (np.diff(strided) == 4).all()
        else:  # different frames where there are enough, in order
            assert (np.diff(strided) >= (1 if n >= T else 0)).all()
        if n < T:
            assert adjacent.tolist() == [i % n for i in range(T)]
            assert (np.diff(segments) >= 0).all() and set(segments.tolist()) == set(range(n))
            continue
        assert (np.diff(adjacent) == 1).all()
        for part, frame in enumerate(segments):
            assert part * n // T <= frame < (part + 1) * n // T


def test_samplers_reach_every_frame():
    rng = np.random.default_rng(0)
    for sample in (sample_strided, sample_adjacent, sample_segments):
        reached = {int(frame) for _ in range(2000) for frame in sample(19, 4, rng)}
        assert reached == set(range(19))
    starts = {int(sample_strided(n=19, T=4, rng=rng)[0]) for _ in range(500)}
    assert starts == set(range(7))  # 0, 4, 8, 12 to 6, 10, 14, 18
    short = {tuple(sample_strided(n=5, T=4, rng=rng).tolist()) for _ in range(500)}
    assert short == set(itertools.combinations(range(5), 4))
    shorter = {tuple(sample_strided(n=2, T=3, rng=rng).tolist()) for _ in range(500)}
    assert shorter == {(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1)}


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 30, 921])
def test_splits_use_every_frame(n):
    consecutive = split_consecutive(n, 4)
    segments = split_segments(n, 4)
    clips = math.ceil(n / 4)
    assert consecutive.shape == segments.shape == (clips, 4)
    assert consecutive.ravel().tolist() == [i % n for i in range(4 * clips)]  # cycled to the end
    uses = np.bincount(segments.ravel(), minlength=n)
    assert uses.min() >= 1 and uses.max() <= math.ceil(4 * clips / n)
    assert (np.diff(segments) >= 0).all()
    for clip in segments:
        for part, frame in enumerate(clip):  # one frame of each part
            assert part * n // 4 <= frame < math.ceil((part + 1) * n / 4)


@pytest.mark.parametrize("n, T, clips", [
    (3, 8, 1), (8, 8, 1), (15, 8, 1), (16, 8, 2), (920, 8, 115), (1, 1, 1),
])
def test_split_whole_drops_the_rest(n, T, clips):
    expected = [[i % n for i in range(c * T, c * T + T)] for c in range(clips)]
    assert split_whole(n, T).tolist() == expected


# -------------------------------------------------------------------------------- reading of frames

def write_frames(folder, count, size=(20, 12), suffix="png"):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(folder / f"{i}.{suffix}"))
        Image.fromarray(frame).save(paths[-1])
    return paths, frames


def picture(mode="RGB", size=(61, 127)):
    """A smooth random picture of width and height `size`."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.BICUBIC).convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_read_clip_keeps_frames_that_fit_and_resizes_others(tmp_path):
    paths, frames = write_frames(tmp_path, 3)
    clip = read_clip(paths, (20, 12))
    assert clip.dtype == torch.uint8 and clip.shape == (3, 3, 20, 12)
    np.testing.assert_array_equal(clip.permute(0, 2, 3, 1), frames)
    assert read_clip(paths, (40, 10)).shape == (3, 3, 40, 10)
    Image.fromarray(frames[0][:, :, 0]).save(paths[1])  # a grey frame among coloured ones
    assert read_clip(paths, (20, 12)).shape == (3, 3, 20, 12)


def pixels(path):
    """A frame of 127 x 61 pixels through `read_clip`, (H, W, 3)."""
    return read_clip([str(path)], (127, 61))[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode, options", [
    ("RGB", dict(subsampling=0)), ("RGB", dict(subsampling=2)), ("RGB", dict(progressive=True)),
    ("L", {}), ("CMYK", {}),
])
@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png"])
def test_jpegs_have_the_pixels_of_pillow(tmp_path, mode, options, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(picture(mode), "JPEG", quality=80, **options))
    with Image.open(path) as image:
        assert np.array_equal(pixels(path), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pngs_have_the_pixels_of_pillow(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(picture(mode), "PNG"))
    assert np.array_equal(pixels(path), picture(mode).convert("RGB"))


def test_transparent_palettes_are_read(tmp_path):
    image = picture("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert np.array_equal(pixels(tmp_path / "a.png"), image.convert("RGB"))


def test_16_bits_are_scaled_to_8(tmp_path):
    values = np.arange(127 * 61, dtype=np.uint16).reshape(127, 61) * 8
    values[0, :3] = (65535, 257 * 100, 128)
    Image.fromarray(values).save(tmp_path / "a.png")
    found = pixels(tmp_path / "a.png")
    assert found[0, :3, 0].tolist() == [255, 100, 0]
    assert np.array_equal(found, np.rint(values / 257)[..., None].repeat(3, 2))


def oriented(kind, orientation, mode="RGB", size=(64, 32)):
    """An image with an Exif orientation, as cameras write it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(mode, size), kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"),
                                        ("PNG", "RGB"), ("PNG", "P")])
def test_frames_are_upright(tmp_path, kind, mode, orientation):
    """Pixels as Pillow turns them, of every orientation and every way through the decoders."""
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(oriented(kind, orientation, mode))
    size = (32, 64) if orientation < 5 else (64, 32)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image.convert("RGB"))
    assert expected.size == size[::-1]
    found = read_clip([str(path)], size)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_frame_that_is_stored_lying_stands(tmp_path, kind):
    """By hand: red on the left, and the camera was turned, so that red is on top."""
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", kind, exif=exif)
    frame = data._decode(tmp_path / "a.jpg").astype(int)
    assert frame.shape == (64, 32, 3)
    assert (frame[:28, :, 0] > 200).all() and (frame[36:, :, 2] > 200).all()


def test_other_exif_data_is_no_orientation(tmp_path):
    """Exif without the tag, with one that does not exist, or damaged; XMP, which has it, too."""
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    for content in (encoded(picture(size=(64, 32)), "JPEG", exif=exif), oriented("JPEG", 9),
                    encoded(picture(size=(64, 32)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff")):
        (tmp_path / "a.jpg").write_bytes(content)
        assert data._decode(tmp_path / "a.jpg").shape == (32, 64, 3)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    (tmp_path / "a.jpg").write_bytes(encoded(picture(size=(64, 32)), "JPEG", xmp=xmp))
    assert data._decode(tmp_path / "a.jpg").shape == (64, 32, 3)


def frames_only(paths):
    """A data set of one tracklet."""
    return data.Dataset("made", [data.Tracklet(tuple(map(str, paths)), 0, 0)], [], [])


@pytest.mark.parametrize("white, dark", [(65535, False), (4095, True), (1023, True), (0, False)])
def test_check_warns_of_12_bits_in_16(tmp_path, capsys, white, dark):
    """Grey as Pillow and colours as OpenCV or libpng write them: both become nearly black."""
    values = np.linspace(0, white, 64 * 32).astype(np.uint16).reshape(64, 32)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths[1:]:
        Image.fromarray(values).save(path)
    paths[0].write_bytes(encoded(Image.new("L", (32, 64), 9), "PNG"))  # 8 bits: dark as meant
    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 64, 16, 2, 0, 0, 0)),
              (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    colours = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)
    paths.append(tmp_path / "3.png")
    paths[3].write_bytes(colours)
    assert data.check_images(frames_only(paths)) == 0
    out = capsys.readouterr().out
    assert out.endswith("4 frames checked, 0 missing or damaged\n")
    warned = f"warning: {tmp_path}/1.png: this PNG of 16 bits" in out and "(3 in all)" in out
    assert warned == dark
    assert ("warning" in out) == dark


def test_check_counts_what_is_missing_after_the_first_five(tmp_path, capsys):
    """A folder that is not there would be a line for each of its frames; damaged frames, which are
    mended one by one, are named."""
    paths = [tmp_path / f"{i:04}.jpg" for i in range(1020)]
    whole = encoded(picture(), "JPEG")
    for path in paths[1000:]:
        path.write_bytes(whole[:200])
    paths[-1].write_bytes(whole)
    assert data.check_images(frames_only(paths)) == 1019
    lines = capsys.readouterr().out.splitlines()
    assert sum("no such frame" in line for line in lines) == 5
    assert sum("unreadable image" in line for line in lines) == 19
    assert lines[-2:] == ["... and 995 more that are missing",
                          "1,020 frames checked, 1,019 missing or damaged"]
    for path in paths[:700]:
        path.write_bytes(whole[:200])
    assert data.check_images(frames_only(paths)) == 1019
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + 100 + 3 and "... and 619 more that are damaged" in lines


def unusual_subsampling():
    """A whole JPEG of 16 x 16 pixels whose components are sampled 2x1, 1x2 and 2x1.

    Six blocks with the same tables, of a picture of 16 x 8 pixels, read in another arrangement.
    """
    content = bytearray(encoded(picture(size=(16, 8)), "JPEG", keep_rgb=True, subsampling=0))
    frame = content.index(b"\xff\xc0")
    content[frame + 6] = 16
    content[frame + 11:frame + 18:3] = b"\x21\x12\x21"
    return bytes(content)


def test_whole_jpegs_that_simplejpeg_does_not_take_are_read(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(unusual_subsampling())
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(path.read_bytes())
    with Image.open(path) as image:
        found = read_clip([str(path)], (16, 16))[0].permute(1, 2, 0)
        assert np.array_equal(found, image.convert("RGB"))


def png_chunks(content):
    """(kind, data, whether its checksum is right) of the chunks of a PNG, to the end of the file.

    Raises struct.error where the file is cut.
    """
    at = 8
    kind = None
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", content, at)
        body = content[at + 8:at + 8 + size]
        checksum, = struct.unpack_from(">I", content, at + 8 + size)
        yield kind, body, checksum == zlib.crc32(kind + body)
        at += 12 + size


def with_png_size(content, width, height):
    """A PNG with another size in its header, the checksum put right."""
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def with_jpeg_size(content, width, height):
    """A JPEG with another size in its header."""
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    return content[:frame + 5] + struct.pack(">HH", height, width) + content[frame + 9:]


def with_gif_size(content, width, height):
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


@pytest.mark.parametrize("content, says", [
    (with_jpeg_size(encoded(picture(), "JPEG"), 20000, 20000), "20000 x 20000 pixels"),
    (with_jpeg_size(encoded(picture("CMYK"), "JPEG"), 20000, 20000), "20000 x 20000 pixels"),
    (with_png_size(encoded(picture(), "PNG"), 12000, 9000), "12000 x 9000 pixels"),
    (with_png_size(encoded(picture(), "PNG"), 20000, 20000), "20000 x 20000 pixels"),
    (with_gif_size(encoded(picture(), "GIF"), 12000, 9000), "12000 x 9000 pixels"),  # as a.jpg
], ids=["jpeg", "cmyk", "png", "larger png", "gif"])
@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, content, says, monkeypatch):
    def decode(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    monkeypatch.setattr(data.Image.Image, "load", decode)
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/a.jpg: unreadable image .*{says}") as error:
        read_clip([str(tmp_path / "a.jpg")], (64, 32))
    assert "\n" not in str(error.value)


def test_the_import_leaves_the_warnings_of_the_process_alone():
    code = "import warnings; before = warnings.filters[:]; import data; " \
           "assert not [f for f in warnings.filters if f not in before and f[0] == 'error']"
    subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, check=True)


def damaged(content, rng):
    """Bits flipped, the end cut off, a page lost, or another size in the header."""
    kind = rng.integers(4)
    if kind == 0:
        flipped = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 6)):
            flipped[place] ^= 1 << rng.integers(8)
        return bytes(flipped)
    start = int(rng.integers(len(content)))
    if kind == 1:
        return content[:start]
    if kind == 2:
        return content[:start] + bytes(len(content[start:start + 512])) + content[start + 512:]
    size = rng.integers(1, 200, 2).tolist()
    if content.startswith(b"\xff\xd8"):
        return with_jpeg_size(content, *size)
    if rng.random() < 0.5:
        return content[:16] + struct.pack(">II", *size) + content[24:]
    return with_png_size(content, *size)


def complains(content):
    """Whether a decoder of its own or a checksum finds something wrong in a JPEG or PNG."""
    try:
        if not content.startswith(b"\x89PNG"):
            simplejpeg.decode_jpeg(content, "RGB", strict=True)
            return False
        if not all(right for _, _, right in png_chunks(content)):
            return True
        Image.open(io.BytesIO(content)).load()
        return False
    except Exception:
        return True


def test_no_damaged_image_passes_and_no_whole_one_is_refused(tmp_path):
    images = [encoded(picture(size=(32, 64)), "JPEG", quality=q, subsampling=s, progressive=p)
              for q in (50, 90) for s in (0, 1, 2) for p in (False, True)]
    images.append(encoded(picture("L", (32, 64)), "JPEG"))
    images.append(encoded(picture(size=(32, 64)), "JPEG", restart_marker_blocks=2))
    for mode in ("L", "P", "RGB", "RGBA"):
        images += [encoded(picture(mode, (32, 64)), "PNG", compress_level=c) for c in (1, 6, 9)]
    rng = np.random.default_rng(0)
    contents = images + [damaged(images[i % len(images)], rng) for i in range(400)]
    refused = []
    for number, content in enumerate(contents):
        suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(content)
        try:
            read_clip([str(path)], (64, 32))
        except UserError as error:
            assert str(error).startswith(f"{path}: unreadable image (") and "\n" not in str(error)
            refused.append(number)
    assert refused == [i for i, content in enumerate(contents) if complains(content)]
    assert min(refused) >= len(images) and 250 < len(refused) < 400


def test_read_clip_names_the_bad_frame(tmp_path):
    paths, _ = write_frames(tmp_path, 3, suffix="jpg")
    for content in (b"", b"not an image", Path(paths[0]).read_bytes()[:200]):
        Path(paths[1]).write_bytes(content)
        with pytest.raises(UserError, match="1.jpg: unreadable image"):
            read_clip(paths, (20, 12))
    Path(paths[1]).unlink()
    with pytest.raises(UserError, match="1.jpg: no such frame"):
        read_clip(paths, (20, 12))


def test_bad_frame_in_a_worker_stays_one_line(tmp_path):
    paths, _ = write_frames(tmp_path, 3, suffix="jpg")
    Path(paths[1]).write_bytes(b"")
    clips = AllClips([data.Tracklet(tuple(paths), 1, 1)], split_consecutive, 3, (20, 12))
    with pytest.raises(UserError) as error:
        list(torch.utils.data.DataLoader(clips, num_workers=1))
    assert str(error.value).startswith(paths[1]) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------ augmentation

MEAN = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]


def test_flip_and_erase_treat_all_frames_alike_with_the_stated_probability():
    clip = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    flips = 0
    boxes = 0
    for _ in range(1000):
        flipped = random_flip(clip, rng, 0.3)
        if not torch.equal(flipped, clip):
            flips += 1
            assert torch.equal(flipped, clip.flip(-1))
        erased = random_erase(clip, rng, 0.3)
        changed = (erased != clip).any(1)  # (T, H, W)
        if changed.any():
            boxes += 1
            filled = (erased == MEAN).all(1).all(0)
            ys, xs = torch.nonzero(filled, as_tuple=True)
            box = torch.zeros(32, 16, dtype=torch.bool)
            box[ys.min():ys.max() + 1, xs.min():xs.max() + 1] = True
            assert torch.equal(box, filled)  # one box, the same in all frames
            assert not changed[:, ~box].any()
            assert 0.01 * 512 <= filled.sum() <= 0.45 * 512
    assert abs(flips - 300) < 50 and abs(boxes - 300) < 50


class Counting:
    """A generator that counts its numbers."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.calls = 0

    def __getattr__(self, name):
        self.calls += 1
        return getattr(self.rng, name)


def test_a_clip_that_no_box_fits_into_stays_as_it_is():
    clip = torch.randint(0, 256, (2, 3, 400, 1), dtype=torch.uint8)
    rng = Counting(0)
    assert torch.equal(random_erase(clip, rng, 1, area=(0.3, 0.4)), clip)
    assert rng.calls <= 201  # 100 boxes of two numbers


def test_erase_draws_the_same_numbers_as_ever():
    clip = torch.zeros(1, 3, 64, 32, dtype=torch.uint8)
    boxes = []
    for seed in range(4):
        filled = (random_erase(clip, np.random.default_rng(seed), 1)[0] == MEAN).all(0)
        ys, xs = torch.nonzero(filled, as_tuple=True)
        boxes.append([ys.min().item(), ys.max().item(), xs.min().item(), xs.max().item()])
    assert boxes == [[4, 12, 0, 27], [9, 37, 8, 20], [18, 41, 2, 12], [37, 58, 13, 22]]


def test_normalize():
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    mean = torch.tensor(data.IMAGENET_MEAN, dtype=torch.float64)[:, None, None]
    std = torch.tensor(data.IMAGENET_STD, dtype=torch.float64)[:, None, None]
    expected = (clips.double() / 255 - mean) / std
    # three roundings of numbers up to 1, then a division by 0.22 or more
    limit = 4 * torch.finfo(torch.float32).eps / 0.22
    assert (normalize(clips) - expected).abs().max() < limit
    assert normalize(MEAN).abs().max() < 0.5 / 255 / 0.22 + limit  # the colour of an erased box


def test_normalize_divides_by_the_numbers_that_torch_tensor_makes(monkeypatch):
    """To the bit, also traced and exported; and it does not use torch.tensor, whose copy to a GPU
    waits for all work."""
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    mean = torch.tensor(data.IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(data.IMAGENET_STD)[:, None, None]
    expected = (clips.float() / 255 - mean) / std

    class Normalize(torch.nn.Module):
        def forward(self, x):
            return normalize(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        traced = torch.jit.trace(Normalize(), clips)
    exported = torch.export.export(Normalize(), (clips,)).module()
    found = [traced(clips), exported(clips)]
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("torch.tensor was called"))
    assert all(torch.equal(x, expected) for x in [*found, normalize(clips)])


def test_train_clips_do_not_depend_on_the_workers(small_root):
    train = load_dataset("synthetic", small_root).train

    def batches(workers):
        sampler = PKSampler([t.pid for t in train], 3, 2, shows="identities", seed=5)
        sampler.set_epoch(2)
        clips = TrainClips(train, sample_segments, 4, (64, 32))
        return list(torch.utils.data.DataLoader(clips, batch_sampler=sampler, num_workers=workers))

    for (clips, pids), (same_clips, same_pids) in zip(batches(0), batches(2)):
        assert clips.dtype == torch.uint8 and clips.shape == (6, 4, 3, 64, 32)
        assert torch.equal(clips, same_clips) and torch.equal(pids, same_pids)


def test_a_training_clip_is_flipped_and_erased_as_a_whole(small_root):
    train = load_dataset("synthetic", small_root).train
    plain, erased = (TrainClips(train, sample_segments, 4, (64, 32), erase=p) for p in (0, 1))
    flips = 0
    for item in [(0, 5, epoch, place) for epoch in (1, 2) for place in range(4)]:
        frames = sample_segments(len(train[0].frames), 4, np.random.default_rng([2, *item[1:]]))
        before = read_clip([train[0].frames[i] for i in frames], (64, 32))
        clip = plain[item][0]
        flips += torch.equal(clip, before.flip(-1))
        assert torch.equal(clip, before) or torch.equal(clip, before.flip(-1))
        box = (erased[item][0] == MEAN).all(1).all(0)
        assert box.any() and torch.equal(erased[item][0][:, :, ~box], clip[:, :, ~box])
    assert 0 < flips < 8


# ---------------------------------------------------------------------------------------- samplers

PIDS = [0] * 1 + [1] * 2 + [2] * 3 + [3] * 9 + [4] * 4 + [5] * 4 + [6] * 2


def test_an_epoch_of_identities():
    sampler = PKSampler(PIDS, P=3, K=4, shows="identities", seed=1)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3
        items = [item for batch in batches for item in batch]
        assert {PIDS[index] for index, *_ in items} == set(PIDS)  # everyone, each epoch
        assert [item[1:] for item in items] == [(1, epoch, place) for place in range(36)]
        for batch in batches:
            groups = [[index for index, *_ in batch[p * 4:p * 4 + 4]] for p in range(3)]
            assert len({PIDS[group[0]] for group in groups}) == 3  # P distinct identities
            for group in groups:
                assert len({PIDS[index] for index in group}) == 1
                tracklets = PIDS.count(PIDS[group[0]])
                assert len(set(group)) == min(4, tracklets)  # repeats only when it must


def groups_of(sampler, K):
    """Of an epoch the tracklets of each group, by batch."""
    return [[[index for index, *_ in batch[i:i + K]] for i in range(0, len(batch), K)]
            for batch in sampler]


@pytest.mark.parametrize("P, K, batches", [(3, 2, 4), (2, 2, 6), (5, 2, 2), (3, 4, 2), (7, 3, 1)])
def test_an_epoch_of_tracklets(P, K, batches):
    """With K = 2 the identities of PIDS have 1, 1, 1, 4, 2, 2 and 1 groups, 12 in all."""
    sampler = PKSampler(PIDS, P, K, shows="tracklets", seed=1)
    left_out = set(range(len(PIDS)))
    for epoch in range(40):
        sampler.set_epoch(epoch)
        assert len(sampler) == batches
        found = groups_of(sampler, K)
        assert [len(batch) for batch in found] == [P] * batches
        for batch in found:
            assert len({PIDS[group[0]] for group in batch}) == P  # distinct identities
        shown = collections.Counter()
        for group in sum(found, []):
            assert len({PIDS[index] for index in group}) == 1
            tracklets = PIDS.count(PIDS[group[0]])
            assert len(set(group)) == min(K, tracklets)  # repeats only to fill a group
            shown.update(set(group))
        assert set(shown.values()) == {1}  # no tracklet stands in two groups
        left_out -= shown.keys()
    assert not left_out  # what remains in one epoch comes in another


def test_an_epoch_of_all_tracklets_where_they_divide():
    """Nothing is left out, and nothing stands twice: 4 identities with 6 tracklets, in pairs."""
    pids = [i // 6 for i in range(24)]
    sampler = PKSampler(pids, 2, 2, seed=3)
    assert sorted(index for batch in sampler for index, *_ in batch) == list(range(24))


def test_an_identity_with_more_groups_than_batches():
    """Of 13 groups the identity with 10 gets one in each of 4 batches, as it can be in a batch only
    once: a fifth would need a batch without it."""
    pids = [0] * 20 + [1] * 4 + [2] * 2
    sampler = PKSampler(pids, 2, 2, seed=0)
    found = groups_of(sampler, 2)
    assert len(sampler) == 3 and [len(batch) for batch in found] == [2, 2, 2]
    assert all(0 in (pids[a[0]], pids[b[0]]) for a, b in found)


def test_steps_of_the_real_mars(mars_index):
    """Those of the authors' releases: 235 batches of 32 clips, 117 of 64."""
    train = load_dataset("mars", mars_index, images=False).train
    pids = [t.pid for t in train]
    assert len(PKSampler(pids, 8, 4)) == 235 and len(PKSampler(pids, 16, 4)) == 117
    sampler = PKSampler(pids, 8, 4)
    assert sum(sampler.groups) * 4 == 7532
    batches = list(sampler)
    assert len(batches) == 235
    shown = {index for batch in batches for index, *_ in batch}
    assert len(shown) > 0.89 * len(pids) and len({pids[index] for index in shown}) == 625
    assert all(len({pids[index] for index, *_ in batch}) == 8 for batch in batches)


@pytest.mark.parametrize("shows", ["tracklets", "identities"])
def test_pk_is_a_function_of_seed_and_epoch(shows):
    a = PKSampler(PIDS, 3, 2, shows=shows, seed=1)
    b = PKSampler(PIDS, 3, 2, shows=shows, seed=1)
    a.set_epoch(4)
    b.set_epoch(4)
    assert list(a) == list(b)
    clips = [clip for batch in a for clip in batch]  # with the seeds of their augmentation
    assert [clip[1:] for clip in clips] == [(1, 4, place) for place in range(len(clips))]
    b.set_epoch(5)
    assert list(a) != list(b)
    assert list(a) != list(PKSampler(PIDS, 3, 2, shows=shows, seed=2))


@pytest.mark.parametrize("shows", ["tracklets", "identities"])
def test_pk_resumes_within_an_epoch_and_shards(shows):
    whole = PKSampler(PIDS, 4, 2, shows=shows)
    later = PKSampler(PIDS, 4, 2, shows=shows)
    later.set_epoch(0, start=1)
    assert list(later) == list(whole)[1:] and len(later) == len(whole) - 1 >= 1
    shards = [list(PKSampler(PIDS, 4, 2, shows=shows, rank=rank, world=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *shards):
        assert sorted(batch) == sorted(sum(parts, []))
        assert all(len(part) == 4 for part in parts)


def test_batches_and_clips_have_streams_of_their_own(small_root):
    """The first clip of an epoch is not drawn with the numbers that made its batches."""
    train = load_dataset("synthetic", small_root).train
    drawn = []

    def sample(n, T, rng):
        drawn.append(rng.integers(2 ** 62))
        return np.zeros(T, int)

    TrainClips(train, sample, 4, (8, 8))[0, 7, 3, 0]
    sampler = PKSampler([t.pid for t in train], 3, 2, seed=7)
    sampler.set_epoch(3)
    made = []
    sampler._batches_of_tracklets = lambda rng: made.append(rng.integers(2 ** 62)) or []
    assert list(sampler) == [] and made[0] != drawn[0]


def test_tracklet_batches():
    pids = [i // 7 for i in range(20)]
    sampler = TrackletSampler(pids, 3, 2, seed=1)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 4
    assert all(len({index for index, *_ in batch}) == 6 for batch in whole)
    items = [item for batch in whole for item in batch]
    order = [index for index, *_ in items]
    assert sorted(order[:20]) == list(range(20))  # every tracklet once
    assert order[20:] == order[:4]  # then filled up with the first
    assert [item[1:] for item in items] == [(1, 0, place) for place in range(24)]
    sampler.set_epoch(0, start=2)
    assert list(sampler) == whole[2:] and len(sampler) == 2
    sampler.set_epoch(1)
    assert list(sampler) != whole
    parts = [list(TrackletSampler(pids, 3, 2, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]


def test_batches_are_the_same_as_ever():
    sampler = PKSampler(PIDS, 3, 2, shows="tracklets", seed=1)
    sampler.set_epoch(3)
    assert [[index for index, *_ in batch] for batch in sampler] == [
        [13, 9, 18, 15, 20, 19], [7, 12, 4, 3, 23, 24], [11, 8, 22, 21, 16, 17],
        [0, 0, 2, 1, 14, 10]]
    sampler = PKSampler(PIDS, 3, 2, shows="identities", seed=1)
    sampler.set_epoch(3)
    assert [[index for index, *_ in batch] for batch in sampler] == [
        [15, 16, 2, 1, 4, 5], [14, 8, 19, 22, 23, 24], [0, 0, 18, 16, 2, 1]]
    sampler = TrackletSampler(PIDS, 3, 4, seed=1)
    sampler.set_epoch(3)
    assert [[index for index, *_ in batch] for batch in sampler] == [
        [14, 10, 17, 23, 21, 2, 13, 1, 7, 24, 22, 20],
        [5, 3, 12, 18, 4, 15, 6, 9, 19, 11, 0, 16],
        [8, 14, 10, 17, 23, 21, 2, 13, 1, 7, 24, 22],
    ]


def test_samplers_refuse():
    for says, sampler, arguments in (
        ("a batch needs 8 identities, but the training set has only 7", PKSampler, (PIDS, 8, 2)),
        ("4 identities in a batch cannot be divided evenly among 3", PKSampler, (PIDS, 4, 2, 3)),
        ("leaves each of 4 processes a single clip", PKSampler, (PIDS, 4, 1, 4)),
        ("a batch needs 27 tracklets, but the training set has only 25", TrackletSampler,
         (PIDS, 9, 3)),
        ("3 tracklets in a batch cannot be divided evenly among 2",
         TrackletSampler, (PIDS, 3, 1, 2)),
        ("leaves each of 4 processes a single clip", TrackletSampler, (PIDS, 4, 1, 4)),
    ):
        pids, P, K, *world = arguments
        with pytest.raises(UserError, match=says):
            sampler(pids, P, K, world=world[0] if world else 1)


# ------------------------------------------------------------------------------- the synthetic set

def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def draw_small(folder, seed):
    draw_synthetic(folder, identities=3, test_identities=2, cameras=2, frames=(2, 5),
                   size=(48, 24), seed=seed)


def test_synthetic_is_reproducible_and_in_mars_layout(tmp_path):
    draw_small(tmp_path / "a", 3)
    time.sleep(1.1)  # a time stamp in a file would differ now
    draw_small(tmp_path / "b", 3)
    draw_small(tmp_path / "c", 4)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    drawn = load_mars(tmp_path / "a")
    assert drawn.num_identities == 3 and len(drawn.query) == 4
    assert {t.cam for t in drawn.train} == {1, 2}
    assert sum(t.pid == 0 for t in drawn.gallery) == 4
    assert (tmp_path / "a/bbox_test/00-1").is_dir()  # junk is there, and left out by the loader
    for tracklet in drawn.train + drawn.gallery:
        assert 2 <= len(tracklet.frames) <= 5
        assert read_clip(tracklet.frames, (48, 24)).shape[1:] == (3, 48, 24)


def test_masks_show_where_the_person_is_visible(tmp_path):
    """Black and white images beside unchanged frames. Without occlusion a mask is one person in the
    middle; what passes in front hides parts of some; junk shows nobody."""
    def draw(name, **options):
        draw_synthetic(tmp_path / name, identities=4, test_identities=2, cameras=2, size=(64, 32),
                       **options)
        frames = sorted((tmp_path / name).glob("bbox_*/*/*.jpg"))
        folder = tmp_path / name / "masks"
        files = [folder / frame.relative_to(tmp_path / name).with_suffix(".png")
                 for frame in frames]
        assert sorted(folder.rglob("*.png")) == (files if folder.exists() else [])
        return frames, files

    def read(file):
        with Image.open(file) as image:
            assert (image.mode, image.size) == ("L", (32, 64))
            return np.array(image)

    plain, _ = draw("plain", occlusion=1)
    beside, occluded = draw("beside", occlusion=1, masks=True)
    assert [p.read_bytes() for p in plain] == [p.read_bytes() for p in beside]
    assert load_mars(tmp_path / "beside").num_identities == 4
    _, whole = draw("whole", occlusion=0, masks=True)
    for file in whole + occluded:
        mask = read(file)
        assert set(mask.ravel().tolist()) <= {0, 255}
        if "00-1" in file.name:
            assert not mask.any()
    assert any("00-1" in file.name for file in whole)
    whole_shares, occluded_shares = ([read(file).mean() / 255 for file in files
                                      if "00-1" not in file.name] for files in (whole, occluded))
    assert 0.1 < min(whole_shares) < max(whole_shares) < 0.5
    assert min(occluded_shares) < 0.9 * min(whole_shares)
    for file in whole:
        chest = read(file)[20:30, 13:19]
        assert "00-1" in file.name or chest.mean() > 200, file


def test_synthetic_identities_look_alike_in_groups():
    people = data._random_people(12, np.random.default_rng(0))
    for group in (people[:4], people[4:8], people[8:]):
        assert len({(p.shirt, p.sash) for p in group}) == 1
        assert len({(p.trousers, p.boots, p.cap) for p in group}) == 4
        for what in ("build", "height", "frequency", "stride", "arms"):
            assert len({getattr(p, what) for p in group}) == 4, what


def test_synthetic_people_may_differ_in_their_gait_only():
    group = data._random_people(20, np.random.default_rng(0), group=20, gait=True)
    for what in vars(group[0]).keys() - {"frequency", "stride", "arms"}:
        assert len({getattr(p, what) for p in group}) == 1, what
    for what in ("frequency", "stride", "arms"):
        assert len({getattr(p, what) for p in group}) == 20, what


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_draw_person", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_synthetic(tmp_path / "set", identities=2, test_identities=2, cameras=2)
    assert os.listdir(tmp_path) == [".set.lock"]


def test_killed_drawing_is_not_taken_for_a_set(tmp_path):
    code = "import sys, data; print('go', flush=True); data.draw_synthetic(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "set"],
                               stdout=subprocess.PIPE, cwd=Path(data.__file__).parent)
    process.stdout.readline()
    deadline = time.time() + 60
    while not list(tmp_path.glob(".set.part/bbox_train/*/*.jpg")) and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "set").exists()
    assert list(tmp_path.glob(".set.part/bbox_train/*/*.jpg"))
    draw_small(tmp_path / "set", 0)  # what is left is not in the way, and goes
    assert sorted(os.listdir(tmp_path)) == [".set.lock", "set"]
    assert load_mars(tmp_path / "set").num_identities == 3


DRAWS = """
import fcntl, os, sys, time
file = open(sys.argv[1] + "/.synthetic.lock", "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("drawing", flush=True)
time.sleep(0.3)
os.rename(sys.argv[1] + "/drawn", sys.argv[1] + "/synthetic")
"""


def test_two_first_runs_draw_one_set(tmp_path):
    """The second waits for the first, another process, and takes what it has drawn."""
    draw_small(tmp_path / "drawn", 0)
    command = [sys.executable, "-c", DRAWS, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"drawing\n"
        assert load_dataset("synthetic", tmp_path).num_identities == 3
    assert sorted(os.listdir(tmp_path)) == [".drawn.lock", ".synthetic.lock", "synthetic"]


WAITS = """
import fcntl, sys
file = open(sys.argv[1], "a")
print("waits", flush=True)
for step in sys.stdin:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("has it", flush=True)
"""


def test_a_failed_drawing_lets_no_two_others_in(tmp_path, monkeypatch):
    """One waits for the lock, the one that has it fails, a third one starts."""
    def fail(*_, **__):
        raise KeyboardInterrupt

    lock = tmp_path / ".set.lock"
    command = [sys.executable, "-c", WAITS, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as second:
        assert second.stdout.readline() == b"waits\n"
        monkeypatch.setattr(data, "_draw_person", fail)
        with pytest.raises(KeyboardInterrupt):
            draw_synthetic(tmp_path / "set", identities=2, test_identities=2, cameras=2)
        second.stdin.write(b"go on\n")
        second.stdin.flush()
        assert second.stdout.readline() == b"has it\n"
        with pytest.raises(UserError, match="another run is writing there"):
            data.locked(lock)
        second.stdin.close()


def test_a_tilde_is_the_home_folder(small_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets").symlink_to(small_root)
    monkeypatch.chdir(tmp_path)
    for words in (["--check", "--data=synthetic", "--root=~/sets"],
                  ["--synthetic=~/new", "--identities", "1", "--test-identities", "1"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        assert not data._main()
    assert (tmp_path / "new/info").is_dir() and not (tmp_path / "~").exists()


def test_data_command_line(run, tmp_path):
    done = run("data.py", "--synthetic", tmp_path / "s", "--identities", 2, "--test-identities", 2,
               "--cameras", 2, "--frames", 2, 3)
    assert done.returncode == 0 and "train" in done.stdout
    assert len(load_mars(tmp_path / "s").query) == 4
    for arguments, says in (
        ((tmp_path / "s",), "exists already"),
        ((".",), "exists already"),
        ((tmp_path / "t", "--cameras", 1), "--cameras: must be a whole number from 2 to 9"),
        ((tmp_path / "t", "--frames", 5, 2), "--frames must be"),
    ):
        failed = run("data.py", "--synthetic", *arguments)
        assert failed.returncode == 2 and says in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "t").exists()
