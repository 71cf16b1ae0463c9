"""Data sets in the true layout, clip sampling, augmentation, the sampler, the synthetic set."""
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat

import data
from data import (PKSampler, TrackletSampler, split_whole, AllClips, TrainClips, UserError, draw_synthetic, load_dataset, load_mars, normalize, random_erase,
                  random_flip, read_clip, sample_adjacent, sample_segments, sample_strided, split_consecutive, split_segments)

MARS_INFO = Path(__file__).parent / "mars_info"   # MARS' public track tables (Zheng et al., ECCV 2016)


@pytest.fixture(scope="module")
def mars_index(tmp_path_factory):
    """MARS without images: its real tables, and name lists rebuilt from them."""
    folder = tmp_path_factory.mktemp("mars")
    for name in ("bbox_train", "bbox_test", "info"):
        (folder / name).mkdir()
    for file in MARS_INFO.glob("*.mat"):
        shutil.copy(file, folder / "info")
    for part in ("train", "test"):
        number, names = {}, []
        for first, last, pid, cam in loadmat(MARS_INFO / f"tracks_{part}_info.mat")[f"track_{part}_info"].tolist():
            assert first == len(names) + 1
            number[pid, cam] = number.get((pid, cam), 0) + 1
            names += [f"{pid:0>4}C{cam}T{number[pid, cam]:04}F{f:03}.jpg" for f in range(1, last - first + 2)]
        (folder / f"info/{part}_name.txt").write_text("\n".join(names) + "\n")
    return folder


def test_mars_real_index(mars_index):
    start = time.perf_counter()
    mars = load_mars(mars_index)
    print(f"index built in {time.perf_counter() - start:.2f} s")
    assert mars.num_identities == 625
    assert (len(mars.train), len(mars.query), len(mars.gallery)) == (8298, 1980, 11310)
    assert sum(len(t.frames) for t in mars.train) == 509_914
    assert sorted({t.pid for t in mars.train}) == list(range(625))
    assert sum(t.pid == 0 for t in mars.gallery) == 3248 and not any(t.pid < 0 for t in mars.gallery)
    gallery = {t.frames[0]: t for t in mars.gallery}
    assert all(gallery[t.frames[0]] == t for t in mars.query)            # the queries are in the gallery
    others = [t for t in mars.gallery if t.frames[0] not in {q.frames[0] for q in mars.query}]
    assert len(others) == 9330
    matched = {(t.pid, t.cam) for t in others}
    assert sum(not any(p == q.pid and c != q.cam for p, c in matched) for q in mars.query) == 140
    assert max(len(t.frames) for t in mars.train + mars.gallery) == 920
    assert mars.train[0].frames[0].endswith("bbox_train/0001/0001C1T0001F001.jpg")
    assert "8,298" in mars.summary() and "11,310" in mars.summary() and "3,248 distractors" in mars.summary()
    assert {t.cam for t in mars.gallery} == set(range(1, 7))


def test_mars_labels_follow_sorted_pids(mars_index):
    rows = loadmat(MARS_INFO / "tracks_train_info.mat")["track_train_info"]
    pids = sorted(set(rows[:, 2].tolist()))
    assert [t.pid for t in load_mars(mars_index).train] == [pids.index(p) for p in rows[:, 2]]


def break_list(folder):
    lines = (folder / "info/test_name.txt").read_text().split()
    (folder / "info/test_name.txt").write_text("\n".join(lines[:-1]))


def break_line(folder):
    text = (folder / "info/train_name.txt").read_text()
    (folder / "info/train_name.txt").write_text(text.replace("0002C1", "0003C1", 1))


def truncate(folder):
    path = folder / "info/tracks_test_info.mat"
    path.write_bytes(path.read_bytes()[:150])


def change_rows(change):
    def damage(folder):
        path = folder / "info/tracks_train_info.mat"
        rows = loadmat(path)["track_train_info"].astype(int)
        change(rows)
        savemat(path, {"track_train_info": rows})
    return damage


def widen(rows):
    rows[0, 1] = rows[1, 0] if rows[1, 2:].tolist() == rows[0, 2:].tolist() else rows[0, 1]
    rows[1] = rows[0]                                             # or a whole row twice


@pytest.mark.parametrize("damage, says", [
    (lambda f: shutil.rmtree(f), "missing bbox_train, bbox_test, info/train_name.txt"),
    (lambda f: (f / "info/query_IDX.mat").unlink(), "missing info/query_IDX.mat; expected"),
    (break_list, "of test_name.txt, which has"),
    (break_line, "train_name.txt: line "),
    (truncate, "tracks_test_info.mat: not a readable .mat file"),
    (lambda f: (f / "info/tracks_test_info.mat").write_bytes(b""), "tracks_test_info.mat: not a readable .mat file"),
    (lambda f: savemat(f / "info/tracks_train_info.mat", {"tracks": np.ones((1, 4))}), "no variable track_train_info"),
    (lambda f: savemat(f / "info/tracks_train_info.mat", {"track_train_info": np.ones((1, 3))}), "found shape (1, 3)"),
    (lambda f: savemat(f / "info/query_IDX.mat", {"query_IDX": [[9999]]}), "9999 is not a tracklet of a person"),
    (lambda f: savemat(f / "info/query_IDX.mat", {"query_IDX": [[1]]}), "1 is not a tracklet of a person"),   # junk
    (lambda f: savemat(f / "info/query_IDX.mat", {"query_IDX": np.r_[[loadmat(f / "info/query_IDX.mat")["query_IDX"][0, 0]] * 2]}), "a query stands twice"),
    (change_rows(widen), "row 2 takes lines of train_name.txt that row 1 takes, too"),
    (lambda f: (f / "info/train_name.txt").write_text("../../etc/passwd\n"), "file names only"),
])
def test_damaged_sets_are_one_line(small_root, tmp_path, damage, says):
    shutil.copytree(small_root / "synthetic", tmp_path / "synthetic")
    damage(tmp_path / "synthetic")
    with pytest.raises(UserError) as error:
        load_mars(tmp_path / "synthetic")
    assert says in str(error.value) and "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_what_is_odd_but_usable_is_a_warning(small_root, tmp_path, capsys):
    """Lines that no row takes, rows that end too early, frames out of order: the first is named."""
    shutil.copytree(small_root / "synthetic", tmp_path / "synthetic")
    names = (tmp_path / "synthetic/info/train_name.txt").read_text().split()
    rows = loadmat(tmp_path / "synthetic/info/tracks_train_info.mat")["track_train_info"]
    load_mars(tmp_path / "synthetic")
    assert "warning" not in capsys.readouterr().out
    last = rows[0, 1]
    change_rows(lambda rows: rows[0].__setitem__(1, last - 1))(tmp_path / "synthetic")
    (tmp_path / "synthetic/info/train_name.txt").write_text("\ufeff" + "\n".join([names[1], names[0], *names[2:]]), "utf-8")   # with a byte-order mark
    train = load_mars(tmp_path / "synthetic").train
    out = capsys.readouterr().out
    assert f"1 lines belong to no row of tracks_train_info.mat, first: {names[last - 1]}" in out and "1 rows mix tracklets" in out and "first: row 1" in out
    assert len(train[0].frames) == last - 1


@pytest.mark.parametrize("folder", ["x" * 300, "locked/inside"])
def test_roots_that_the_system_refuses(tmp_path, folder, monkeypatch):
    def is_dir(path):
        raise PermissionError(13, "Permission denied", str(path))
    if folder == "locked/inside":
        monkeypatch.setattr(data.Path, "is_dir", is_dir)
    for name in data.DATA_SETS:
        with pytest.raises(UserError, match="cannot be read|cannot draw|missing") as error:
            data.load_dataset(name, tmp_path / folder)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot draw"):
        data.draw_synthetic(tmp_path / ("x" * 300))


def test_the_set_itself_is_a_root(small_root, tmp_path):
    inside, above = data.load_dataset("synthetic", small_root / "synthetic"), data.load_dataset("synthetic", small_root)
    assert inside == above and not (small_root / "synthetic/synthetic").exists()
    shutil.copytree(small_root / "synthetic", tmp_path / "set")
    shutil.rmtree(tmp_path / "set/info")
    with pytest.raises(UserError, match=f"^{tmp_path}/set: missing info/train_name.txt"):
        data.load_dataset("mars", tmp_path / "set")


# ------------------------------------------------------------------------------------------------------ clip sampling

@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 31, 920])
@pytest.mark.parametrize("T", [1, 4, 8])
def test_samplers(n, T):
    rng = np.random.default_rng(0)
    for _ in range(30):
        for draw in (lambda: sample_strided(n, T, rng, 4), lambda: sample_adjacent(n, T, rng), lambda: sample_segments(n, T, rng)):
            frames = draw()
            assert frames.shape == (T,) and frames.min() >= 0 and frames.max() < n
        strided, adjacent, tsn = sample_strided(n, T, rng, 4), sample_adjacent(n, T, rng), sample_segments(n, T, rng)
        if n >= T:
            step = np.diff(strided)
            assert (step == step[:1]).all() and (T == 1 or step[0] == min(4, (n - 1) // (T - 1)))
            assert (np.diff(adjacent) == 1).all()
            for part, frame in enumerate(tsn):
                assert part * n // T <= frame < (part + 1) * n // T
        else:
            assert strided.tolist() == adjacent.tolist() == [i % n for i in range(T)]
            assert (np.diff(tsn) >= 0).all() and set(tsn.tolist()) == set(range(n))


def test_samplers_reach_every_frame():
    rng = np.random.default_rng(0)
    for sample in (sample_strided, sample_adjacent, sample_segments):
        assert {int(i) for _ in range(2000) for i in sample(19, 4, rng)} == set(range(19))


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 30, 921])
def test_splits_use_every_frame(n):
    consecutive, segments = split_consecutive(n, 4), split_segments(n, 4)
    clips = -(-n // 4)
    assert consecutive.shape == segments.shape == (clips, 4)
    assert sorted(consecutive.ravel().tolist()) == sorted(i % n for i in range(4 * clips))   # filled by cycling
    assert consecutive[0].tolist() == [i % n for i in range(4)]
    assert consecutive[-1].tolist() == [i % n for i in range(4 * clips - 4, 4 * clips)]
    assert sorted(set(segments.ravel().tolist())) == list(range(n)) and np.bincount(segments.ravel()).max() <= -(-4 * clips // n)
    assert (np.diff(segments) >= 0).all()
    for clip in segments:                                                                    # one frame of each part
        assert all(part * n // 4 <= frame < -(-(part + 1) * n // 4) for part, frame in enumerate(clip))


# ------------------------------------------------------------------------------------------------ frames, augmentation

def write_frames(folder, count, size=(20, 12), suffix="png"):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (count, size[0], size[1], 3), dtype=np.uint8)
    paths = []
    for i, frame in enumerate(frames):
        paths.append(str(folder / f"{i}.{suffix}"))
        Image.fromarray(frame).save(paths[-1])
    return paths, frames


def test_read_clip_keeps_frames_that_fit_and_resizes_others(tmp_path):
    paths, frames = write_frames(tmp_path, 3)
    clip = read_clip(paths, (20, 12))
    assert clip.dtype == torch.uint8 and clip.shape == (3, 3, 20, 12)
    np.testing.assert_array_equal(clip.permute(0, 2, 3, 1), frames)
    assert read_clip(paths, (40, 10)).shape == (3, 3, 40, 10)
    Image.fromarray(frames[0][:, :, 0]).save(paths[1])                    # a grey frame among coloured ones
    assert read_clip(paths, (20, 12)).shape == (3, 3, 20, 12)


@pytest.mark.parametrize("mode, options", [("RGB", dict(subsampling=0)), ("RGB", dict(subsampling=2)), ("L", {}), ("CMYK", {})])
def test_both_decoders_give_the_same_pixels(tmp_path, mode, options, monkeypatch):
    """JPEG goes to torchvision, and to Pillow where that cannot read it: a PNG named .jpg, too."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)).resize((61, 127), Image.BICUBIC).convert(mode)
    noise.save(tmp_path / "a.jpg", quality=80, **options)
    noise.convert("RGB").save(tmp_path / "b.jpg", "PNG")
    paths = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    fast = data.read_clip(paths, (127, 61))
    assert np.array_equal(fast[1].permute(1, 2, 0), noise.convert("RGB")) and not torch.equal(fast[0], fast[1])

    def missing(*_):
        raise RuntimeError("torchvision was built without libjpeg")
    for decoder in (missing, None):
        monkeypatch.setattr(data, "decode_jpeg", decoder)
        assert torch.equal(data.read_clip(paths, (127, 61)), fast)


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


def test_flip_and_erase_treat_all_frames_alike_with_the_stated_probability():
    clip = torch.randint(0, 256, (4, 3, 32, 16), dtype=torch.uint8)
    rng = np.random.default_rng(0)
    flips = erased = 0
    for _ in range(1000):
        flipped = random_flip(clip, rng, 0.3)
        if not torch.equal(flipped, clip):
            flips += 1
            assert torch.equal(flipped, clip.flip(-1))
        out = random_erase(clip, rng, 0.3)
        changed = (out != clip).any(1)                                     # (T, H, W)
        if changed.any():
            erased += 1
            fill = (out == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]).all(1).all(0)
            ys, xs = torch.nonzero(fill, as_tuple=True)
            box = torch.zeros(32, 16, dtype=torch.bool)
            box[ys.min():ys.max() + 1, xs.min():xs.max() + 1] = True
            assert torch.equal(box, fill) and not changed[:, ~box].any()   # one box, the same in all frames
            assert 0.01 * 512 <= fill.sum() <= 0.45 * 512
    assert abs(flips / 1000 - 0.3) < 0.05 and abs(erased / 1000 - 0.3) < 0.05
    assert normalize(out.new_tensor([124, 116, 104])[:, None, None]).abs().max() < 0.01


def test_normalize():
    clips = torch.randint(0, 256, (2, 4, 3, 5, 6), dtype=torch.uint8)
    expected = (clips[1, 2, 1, 3, 4].item() / 255 - 0.456) / 0.224
    assert abs(normalize(clips)[1, 2, 1, 3, 4].item() - expected) < 1e-6


def test_train_clips_do_not_depend_on_the_workers(small_root):
    train = load_dataset("synthetic", small_root).train

    def batches(workers):
        sampler = PKSampler([t.pid for t in train], 3, 2, seed=5)
        sampler.set_epoch(2)
        clips = TrainClips(train, sample_segments, 4, (64, 32))
        return list(torch.utils.data.DataLoader(clips, batch_sampler=sampler, num_workers=workers))

    for (a, p), (b, q) in zip(batches(0), batches(2)):
        assert torch.equal(a, b) and torch.equal(p, q) and a.dtype == torch.uint8 and a.shape == (6, 4, 3, 64, 32)


# ------------------------------------------------------------------------------------------------------- P x K sampler

PIDS = [0] * 1 + [1] * 2 + [2] * 3 + [3] * 9 + [4] * 4 + [5] * 4 + [6] * 2


def test_pk_batches():
    sampler = PKSampler(PIDS, P=3, K=4, seed=1)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 3
        assert {PIDS[i] for batch in batches for i, *_ in batch} == set(PIDS)                  # everyone, each epoch
        for batch in batches:
            groups = [[i for i, *_ in batch[p * 4:p * 4 + 4]] for p in range(3)]
            assert len({PIDS[g[0]] for g in groups}) == 3                                      # P distinct identities
            for group in groups:
                assert len({PIDS[i] for i in group}) == 1
                assert len(set(group)) == min(4, PIDS.count(PIDS[group[0]]))                  # repeats only when it must
        assert len({item[1:] for batch in batches for item in batch}) == 36                    # no two clips share a seed


def test_pk_is_a_function_of_seed_and_epoch():
    a, b = PKSampler(PIDS, 3, 2, seed=1), PKSampler(PIDS, 3, 2, seed=1)
    a.set_epoch(4), b.set_epoch(4)
    assert list(a) == list(b)
    b.set_epoch(5)
    assert list(a) != list(b)
    assert list(a) != list(PKSampler(PIDS, 3, 2, seed=2))


def test_pk_resumes_within_an_epoch_and_shards():
    whole = PKSampler(PIDS, 4, 2)
    later = PKSampler(PIDS, 4, 2)
    later.set_epoch(0, start=1)
    assert list(later) == list(whole)[1:] and len(later) == 1
    shards = [list(PKSampler(PIDS, 4, 2, rank=r, world=2)) for r in range(2)]
    for batch, *parts in zip(whole, *shards):
        assert sorted(batch) == sorted(sum(parts, [])) and all(len(p) == 4 for p in parts)


def test_tracklet_batches():
    pids = [i // 7 for i in range(20)]
    sampler = TrackletSampler(pids, 3, 2, seed=1)
    batches = [[item[0] for item in batch] for batch in sampler]
    assert len(batches) == len(sampler) == 4 and {len(b) for b in batches} == {6}
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:20]) == list(range(20)) and flat[20:] == flat[:4]   # every tracklet once, then filled up with the first
    assert all(len(set(batch)) == 6 for batch in batches)
    whole = list(sampler)
    assert [item[1:] for batch in whole for item in batch] == [(1, 0, place) for place in range(24)]
    sampler.set_epoch(0, start=2)
    assert list(sampler) == whole[2:] and len(sampler) == 2
    sampler.set_epoch(1)
    assert list(sampler) != whole
    parts = [list(TrackletSampler(pids, 3, 2, 1, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts)] == [sorted(batch) for batch in whole]
    for arguments, says in (((pids, 7, 3), "a batch needs 21 tracklets, the training set has 20"), ((pids, 3, 1, 0, 0, 2), "do not divide over 2 processes")):
        with pytest.raises(UserError, match=says):
            TrackletSampler(*arguments)


@pytest.mark.parametrize("n, T, clips", [(3, 8, 1), (8, 8, 1), (15, 8, 1), (16, 8, 2), (920, 8, 115), (1, 1, 1)])
def test_split_whole_drops_the_rest(n, T, clips):
    expected = [[i % n for i in range(c * T, c * T + T)] for c in range(clips)]
    assert split_whole(n, T).tolist() == expected


def test_pk_refuses():
    with pytest.raises(UserError, match="use --ids 7 or fewer"):
        PKSampler(PIDS, 8, 2)
    with pytest.raises(UserError, match="do not divide over 3 processes"):
        PKSampler(PIDS, 4, 2, world=3)
    for sampler in (PKSampler, TrackletSampler):
        with pytest.raises(UserError, match="leaves each of 4 processes a single clip"):
            sampler(PIDS, 4, 1, world=4)


# --------------------------------------------------------------------------------------------------- the synthetic set

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_synthetic_is_reproducible_and_in_mars_layout(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_synthetic(tmp_path / name, identities=3, test_identities=2, cameras=2, frames=(2, 5), size=(48, 24), seed=seed)
        if name == "a":
            time.sleep(1.1)                                               # a time stamp in a file would differ now
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
    drawn = load_mars(tmp_path / "a")
    assert drawn.num_identities == 3 and len(drawn.query) == 4
    assert {t.cam for t in drawn.train} == {1, 2} and sum(t.pid == 0 for t in drawn.gallery) == 4
    assert (tmp_path / "a/bbox_test/00-1").is_dir()                       # junk is there, and left out by the loader
    for tracklet in drawn.train + drawn.gallery:
        assert 2 <= len(tracklet.frames) <= 5
        assert read_clip(tracklet.frames, (48, 24)).shape[1:] == (3, 48, 24)


def test_synthetic_identities_look_alike_in_groups():
    people = data._draw_people(12, np.random.default_rng(0))
    for group in (people[:4], people[4:8], people[8:]):
        assert len({(p["upper"], p["second"], p["pattern"], p["coat"], p["sleeves"]) for p in group}) == 1
        assert len({p["lower"] for p in group}) == len({p["hair"] for p in group}) == len({p["bag"] for p in group}) == 4
        assert len({(p["frequency"], p["stride"], p["arms"], p["build"]) for p in group}) == 4


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "_draw_occluder", stop)
    with pytest.raises(KeyboardInterrupt):
        draw_synthetic(tmp_path / "set", identities=2, test_identities=2, cameras=2)
    assert list(tmp_path.iterdir()) == []


def test_killed_drawing_is_not_taken_for_a_set(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(Path(data.__file__).parent)!r}); import data; print('go', flush=True); data.draw_synthetic({str(tmp_path / 'set')!r})"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    process.stdout.readline()
    deadline = time.time() + 60
    while not list(tmp_path.glob(".set-*/bbox_train/*/*.jpg")) and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "set").exists() and list(tmp_path.glob(".set-*/bbox_train/*/*.jpg"))


def test_data_command_line(run, tmp_path):
    done = run("data.py", "--synthetic", tmp_path / "s", "--identities", 2, "--test-identities", 2, "--cameras", 2, "--frames", 2, 3)
    assert done.returncode == 0 and "train" in done.stdout
    assert len(load_mars(tmp_path / "s").query) == 4
    for arguments, says in ((("--synthetic", tmp_path / "s"), "exists already"),
                            (("--synthetic", tmp_path / "t", "--cameras", 1), "--cameras must be 2 to 9"),
                            (("--synthetic", tmp_path / "t", "--frames", 5, 2), "--frames must be")):
        failed = run("data.py", *arguments)
        assert failed.returncode == 2 and says in failed.stderr and failed.stderr.count("\n") == 1
    assert not (tmp_path / "t").exists()
