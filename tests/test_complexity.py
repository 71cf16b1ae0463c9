"""Parameters and multiply-adds of every row of every script, and the values that the papers print:
see counting.py."""

import importlib

import pytest
import torch

import bicnet_tks
import counting
import strf
from common import row_of, settings
from conftest import multiply_adds

PRINTED = [
    (script, row) for script in counting.SCRIPTS for row in counting.with_printed_costs(script)
]
OURS = {  # parameters without neck, classifier and projection; multiply-adds of a clip
    "bicnet_tks": {
        "bicnet-tks": (29_291_648, 14_891_979_776),
        "base-s": (23_508_032, 8_106_541_056),
        "base-b": (23_508_032, 32_426_164_224),
        "tb": (23_508_032, 14_186_446_848),
        "tb+csp": (27_636_800, 14_790_426_624),
        "tb+csp+ao": (27_668_544, 14_791_201_792),
        "tb+csp+dao": (27_668_544, 14_791_201_792),
        "bicnet-tk": (29_242_432, 14_891_930_624),
        "height-64": (23_508_032, 2_026_635_264),
        "height-256+128": (23_508_032, 20_266_352_640),
        "height-256+128+64": (23_508_032, 15_959_752_704),
        "tb-alpha1": (23_508_032, 20_266_352_640),
        "tb-alpha2": (23_508_032, 18_239_717_376),
        "tb-alpha4": (23_508_032, 16_213_082_112),
        "tks-k3": (28_456_000, 14_841_533_440),
        "tks-k5": (28_456_000, 14_841_533_440),
        "tks-k7": (28_456_000, 14_841_533_440),
        "tks-k37": (29_291_648, 14_891_979_776),
        "tks-k57": (29_291_648, 14_891_979_776),
        "tks-k357": (30_094_464, 14_942_360_576),
        "tks-stage1": (28_074_592, 14_816_412_672),
        "tks-stage3": (34_158_784, 15_194_182_656),
        "tks-stage4": (53_625_152, 16_402_863_104),
        "tks-stage23": (35_781_888, 15_294_960_640),
    },
    "m3d": {
        "two-stream": (48_250_972, 43_527_482_176),
        "2d": (23_508_032, 2_669_150_208),
        "m3d": (24_552_512, 22_158_508_032),
        "m3d+ral-s": (24_568_652, 22_174_108_288),
        "m3d+ral-t": (24_552_752, 22_165_848_256),
        "m3d+ral-c": (24_726_560, 22_166_020_096),
        "m3d+ral": (24_742_940, 22_174_280_512),
        "m3d-t16": (25_945_152, 46_464_499_712),
        "i3d": (46_161_344, 41_913_679_872),
        "i3d-t16": (46_161_344, 83_827_359_744),
        "p3d-a": (27_288_000, 24_574_427_136),
        "p3d-a-t16": (27_288_000, 49_148_854_272),
        "p3d-b": (27_280_448, 24_574_427_136),
        "p3d-b-t16": (27_280_448, 49_148_854_272),
        "p3d-c": (27_280_448, 24_574_427_136),
        "p3d-c-t16": (27_280_448, 49_148_854_272),
        "m3d-all-blocks": (27_280_448, 24_574_427_136),
    },
    "sinet": {
        "sinet": (29_565_046, 17_309_630_464),
        "base": (23_508_032, 16_213_082_112),
        "base+sbm": (25_108_598, 16_235_888_640),
        "base+idm": (27_964_480, 17_286_823_936),
        "base+nonlocal": (24_561_216, 22_655_533_056),
        "base+nonlocal-ones": (24_035_904, 17_286_823_936),
        "base+nonlocal-inverse": (24_561_216, 22_655_533_056),
        "base+gc": (23_575_810, 16_217_341_952),
        "base+sbm-cal": (23_535_734, 16_234_315_776),
        "base+sbm-cpm": (25_108_598, 16_235_888_640),
        "base+sbm-samepos": (25_108_598, 16_235_888_640),
        "base+1idm": (25_736_256, 16_749_953_024),
        "base+2idm": (27_964_480, 17_286_823_936),
        "base+3idm": (30_192_704, 17_823_694_848),
        "base+sbm-k1": (25_083_974, 16_217_014_272),
        "base+sbm-k5": (25_157_846, 16_273_637_376),
        "base+sbm-k7": (25_231_718, 16_330_260_480),
        "base+idm-r2": (32_420_928, 19_434_307_584),
        "base+idm-r8": (25_736_256, 16_615_735_296),
        "base+idm-r16": (24_622_144, 16_380_854_272),
    },
    "strf": {
        "strf-p3dc": (24_253_504, 26_502_060_032),
        "strf-i3d": (27_694_144, 36_407_103_488),
        "strf-p3da": (24_253_504, 26_502_060_032),
        "strf-p3db": (24_253_504, 32_553_586_688),
        "i3d": (27_636_800, 29_450_502_144),
        "p3da": (24_196_160, 25_596_985_344),
        "p3db": (24_196_160, 25_596_985_344),
        "p3dc": (24_196_160, 25_596_985_344),
        "p3dc+nonlocal": (24_659_520, 29_100_474_368),
        "p3dc+fine": (24_210_496, 26_010_109_440),
        "p3dc+coarse": (24_210_496, 26_010_109_440),
        "p3dc+dynamic": (24_210_496, 26_010_109_440),
        "p3dc+static": (24_210_496, 26_010_109_440),
        "p3dc+fine+coarse": (24_224_832, 26_049_522_688),
        "p3dc+dynamic+static": (24_224_832, 26_049_522_688),
        "p3dc+fine+dynamic": (24_224_832, 26_423_233_536),
        "p3dc+coarse+static": (24_224_832, 26_423_233_536),
        "stage1": (24_222_784, 31_595_626_496),
        "stage12": (24_230_976, 32_329_400_320),
        "stage123": (24_280_128, 32_500_701_184),
        "stage234": (25_957_440, 28_014_966_784),
        "stage1234": (25_984_064, 34_013_607_936),
        "resolutions-11": (24_253_504, 26_502_060_032),
        "resolutions-15": (24_253_504, 26_502_060_032),
        "resolutions-35": (24_253_504, 26_502_060_032),
        "pool-t-max-s-avg": (24_253_504, 26_502_060_032),
        "pool-t-avg-s-max": (24_253_504, 26_502_060_032),
        "pool-t-avg-s-avg": (24_253_504, 26_502_060_032),
        "order-st": (24_253_504, 26_502_060_032),
        "order-parallel": (24_253_504, 26_502_060_032),
        "strf-nofam": (24_196_160, 27_091_828_736),
    },
    "tclnet": {
        "tclnet": (30_070_848, 16_226_451_456),
        "tclnet-xent": (30_070_848, 16_226_451_456),
        "base": (23_508_032, 16_213_082_112),
        "base+tse-wo-seo": (27_970_624, 16_213_082_112),
        "base+tse": (30_069_824, 16_218_062_848),
        "base+tsb": (23_509_056, 16_221_470_720),
        "tclnet-tsb1": (30_070_336, 16_234_840_064),
        "tclnet-tsb3": (30_071_872, 16_222_257_152),
        "tclnet-tsb23": (30_072_896, 16_230_645_760),
        "base+tse-n3": (34_532_416, 12_166_889_472),
        "base+tse-n4": (38_995_008, 16_226_975_744),
        "base+tse-he2": (30_069_824, 16_218_062_848),
        "base+tse-he4": (30_069_824, 16_218_062_848),
        "base+tse-he5": (30_069_824, 16_218_062_848),
        "base+dropblock": (23_508_032, 16_213_082_112),
        "base+re": (23_508_032, 16_213_082_112),
        "base+tse+re": (30_069_824, 16_218_062_848),
        "base+3d": (32_166_976, 22_722_641_920),
        "base+nl": (25_609_792, 17_555_259_392),
        "base+tse+nl": (32_171_584, 17_560_240_128),
    },
}


@pytest.mark.parametrize("script, row", [(script, row) for script in OURS for row in OURS[script]])
def test_parameters_and_multiply_adds(script, row):
    ours = counting.cost(script, row)
    assert (ours.parameters, ours.macs) == OURS[script][row]


def test_every_row_is_held():
    """Those that are the same as another row have its settings."""
    for script in counting.SCRIPTS:
        rows = importlib.import_module(script).ROWS
        assert {row_of(rows, name) for name in rows} == {rows[name] for name in OURS[script]}


@pytest.mark.parametrize("script, row", PRINTED)
def test_the_printed_values(script, row):
    """Ours, counted as the paper seems to, is equal or differs by what is known."""
    assert counting.compare(script, row) == counting.DIFFERENCES[script].get(row, {})


def test_the_differences_are_of_printed_values():
    for script, rows in counting.DIFFERENCES.items():
        for row, differences in rows.items():
            assert differences.keys() <= counting.with_printed_costs(script)[row].costs.keys()


def test_totals():
    total = counting.totals()
    assert total[:3] == (97, 59, 53) and [*map(len, total[3:])] == [26, 15, 3]
    each = [counting.totals([script])[:3] for script in counting.SCRIPTS]
    assert each == [(48, 24, 24), (10, 10, 3), (3, 3, 0), (8, 8, 8), (28, 14, 18)]


def test_a_value_is_compared_as_it_is_printed(monkeypatch):
    """Cut or rounded to its own number of digits."""

    def compared(script, row, **values):
        monkeypatch.setitem(counting.COUNT, script, lambda row: values)
        return counting.compare(script, row)

    assert not compared("tclnet", "base", million_parameters=23.59, gflops_of_4_frames=16.2464)
    assert not compared("tclnet", "base", million_parameters=23.5, gflops_of_4_frames=16.2455)
    off = compared("tclnet", "base", million_parameters=23.6, gflops_of_4_frames=16.2466)
    assert off == {"million_parameters": 0.426, "gflops_of_4_frames": 0.004}
    off = compared("tclnet", "base", million_parameters=23.49, gflops_of_4_frames=16.2454)
    assert off == {"million_parameters": -0.043, "gflops_of_4_frames": -0.004}
    assert not compared("m3d", "m3d", more_megabytes=4.15)
    assert compared("m3d", "m3d", more_megabytes=4.25) == {"more_megabytes": 1.19}


# -------------------------------------------------------------------- what counting.py says of each


def printed(script, cost):
    """{row: what the paper prints}"""
    rows = counting.with_printed_costs(script)
    return {row: rows[row].costs[cost] for row in rows if cost in rows[row].costs}


def test_bicnet_tks():
    """How many GFLOPs agree with regions of either kind, and which parameters do not."""
    rows = counting.with_printed_costs("bicnet_tks")
    assert len(rows) == 24 and all(len(row.costs) == 2 for row in rows.values())
    agree = {}
    for pixels in (False, True):
        differences = {
            row: counting.compare("bicnet_tks", row, regions_of_pixels=pixels) for row in rows
        }
        agree[pixels] = {row for row in rows if "gflops_a_frame" not in differences[row]}
    assert agree[False] == {"tb", "tb+csp", "tb+csp+ao", "tb+csp+dao", "height-64"}
    tks = {row for row in rows if row.startswith("tks")}
    assert agree[True] == agree[False] | tks | {"bicnet-tks"} and len(agree[True]) == 16
    lower = {row for row in rows if "million_parameters" in differences[row]}
    assert lower == {"tks-k3", "tks-k5", "tks-k7", "bicnet-tk", "tks-stage4"}
    for row in lower:  # the paper has 0.1 million less
        ours = counting.bicnet_tks(row)["million_parameters"]
        assert int(10 * ours) == round(10 * rows[row].costs["million_parameters"]) + 1


def test_what_is_added_for_bicnet_tks():
    def args(row, **changes):
        changes["weights"] = "none"
        return settings(bicnet_tks.RECIPE, bicnet_tks.ROWS, row, **changes)

    stem = 64 * 3 * 49 * 128 * 64
    assert counting.full_size_stem(args("tb")) == 6 * stem * 3 // 4
    assert counting.full_size_stem(args("base-s")) == 0  # no big frames beside them
    assert counting.full_size_stem(args("base-b")) == 0
    with torch.device("meta"):
        pixels = bicnet_tks.build(args("bicnet-tks", grid=(8, 8)), 3)
    more = multiply_adds(pixels, 8, 256, 128) - counting.cost("bicnet_tks", "bicnet-tks").macs
    assert more == counting.pixel_regions(args("bicnet-tks"))


def test_m3d():
    """95.7 MB for the 2D network, which no count gives, and differences to it."""
    trunk = counting.cost("m3d", "2d").parameters
    assert round(trunk * 4 / 1e6, 2) == 94.03
    p3d = {f"p3d-{kind}{frames}": 15.2 for kind in "abc" for frames in ("", "-t16")}
    expected = p3d | {"m3d": 4.2, "m3d-t16": 4.2, "i3d": 90.6, "i3d-t16": 90.6}
    assert printed("m3d", "more_megabytes") == expected
    # Eq. 6 gives seven kernels for 16 frames
    assert round(counting.m3d("m3d-t16")["more_megabytes"], 2) == 9.75
    for row in p3d:  # with one that takes seven frames and 64 channels
        ours = counting.m3d(row)["more_megabytes"]
        assert round(ours, 1) == 15.1 and round(ours + 4 * 7 * 64 * 64 / 1e6, 1) == 15.2


def test_sinet():
    rows = {"base+sbm": 0.014, "base+idm": 1.081, "base+nonlocal": 2.216}
    assert printed("sinet", "more_gflops") == rows
    convolutions = sum(9 * 1024 * 128 * (s + (4 - s)) for s in (1, 2, 3))
    assert round(convolutions / 1e9, 3) == 0.014
    products = sum(9 * 1024 * 128 * s for s in (1, 2, 3))
    assert counting.sinet("base+sbm")["more_gflops"] == pytest.approx(
        (convolutions + products + 3 * 2 * 1024 * 256) / 1e9, rel=1e-9
    )


def test_strf():
    rows = ("i3d", "strf-i3d", "p3dc", "strf-p3dc")
    counts = [counting.cost("strf", row)[1:3] for row in rows]
    assert [classifier for _, classifier in counts] == 4 * [625 * 2048 + 625]
    sums = [sum(count) for count in counts]
    assert sums == [28_917_425, 28_974_769, 25_476_785, 25_534_129]
    values = printed("strf", "million_parameters")
    assert [values[row] for row in rows] == [28.92, 28.97, 25.48, 25.53]
    assert f"({counts[0][1] / 1e6:.2f}M)" in strf.__doc__


def test_tclnet():
    def uncounted(row):
        return counting.uncounted(counting.cost("tclnet", row).args)

    assert uncounted("base") == uncounted("base+tse-wo-seo") == 0
    assert uncounted("base+tse") == 4 * 128 * 1024
    # of the 6 pairs of 4 frames 3 have a new f_k
    assert uncounted("base+tse-n4") == 4 * 128 * 1024 + 3 * 2048 * 1024
    # 29.9 million of the rows with two learners contradict those with three and four
    rows = counting.DIFFERENCES["tclnet"]
    values = printed("tclnet", "million_parameters")
    two = {row for row, value in values.items() if value == 29.9}
    assert two == {row for row in rows if "million_parameters" in rows[row]} - {"base+3d"}
    for row in two:
        assert int(10 * counting.tclnet(row)["million_parameters"]) == 300
    assert int(10 * counting.tclnet("base+3d")["million_parameters"]) == 321
    assert values["base+3d"] == 33.7 and "gflops_of_4_frames" not in rows["base+3d"]
    for row, value in (("base+tsb", 16.255), ("base+nl", 17.589), ("base+tse+nl", 17.593)):
        assert round(counting.tclnet(row)["gflops_of_4_frames"], 3) == value
    block = 1_342_177_280  # of Non-local
    for row in ("base+nl", "base+tse+nl"):
        four = counting.tclnet(row)["gflops_of_4_frames"] + 3 * block / 1e9
        assert four == pytest.approx(printed("tclnet", "gflops_of_4_frames")[row], abs=1e-3)
