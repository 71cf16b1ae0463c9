"""How each paper seems to count its parameters and GFLOPs, and what ours are when counted so.

This is an audit of the printed values, for test_complexity.py and for the README. How a paper
counts was concluded from the values that it prints, out of several ways that were tried. That a
value agrees shows therefore that our reading is possible, not that it is the authors'.
"""

import functools
import importlib
import math
from collections import namedtuple
from unittest import mock

import torch
import torch.nn as nn

import common

SCRIPTS = ("bicnet_tks", "m3d", "sinet", "strf", "tclnet")
MARS = 625  # identities of the classifier

# Of a row: its settings, parameters without neck, classifier and projection, those of the
# classifier, multiply-adds of a clip, and the elements that all BatchNorms write for a clip.
Cost = namedtuple("Cost", "args parameters classifier macs elements")


def rows_of(script):
    """The rows of a script that are not the same as another one."""
    rows = importlib.import_module(script).ROWS
    return {name: row for name, row in rows.items() if not row.same}


def with_printed_costs(script):
    """Those of them for which the paper prints parameters or GFLOPs."""
    return {name: row for name, row in rows_of(script).items() if row.costs}


@functools.cache
def cost(script, row):
    """What the network of a row costs at the paper's size, counted without computing."""
    module, elements = importlib.import_module(script), []
    args = common.settings(module.RECIPE, module.ROWS, row, weights="none")
    with torch.device("meta"):
        model = module.build(args, MARS)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_hook(lambda *call: elements.append(call[-1].numel()))
    # BatchNorm has no multiply-adds that are counted, and takes most of the time on meta
    with mock.patch.object(nn.functional, "batch_norm", lambda x, *_, **__: x):
        parameters, macs = common.complexity(model, args.frames, args.height, args.width,
                                             without=("neck", "classifier", "projection"))
    classifier = sum(p.numel() for p in model.classifier.parameters())
    return Cost(args, parameters, classifier, macs, sum(elements))


# ---------------------------------------------------------------- our values, counted as the papers


def full_size_stem(args):
    """What the first convolution costs more where small frames are resized behind it only."""
    if not args.shares[0]:  # no big frames are beside them
        return 0
    stem = 64 * 3 * 7**2 * (args.height // 2) * (args.width // 2)
    more = sum(share * (stem - stem // 4**i) for i, share in enumerate(args.shares))
    return args.frames // sum(args.shares) * more


def pixel_regions(args):
    """What TKS costs more for all frames if a region has 4 x 2 pixels of the big maps, instead of
    a frame having 4 x 2 regions."""
    channels, positions = {1: 256, 2: 512, 3: 1024, 4: 2048}, {1: 256, 2: 64, 3: 16, 4: 16}
    more = 0
    for stage in args.tks:  # of the convolutions, and of Eq. 8
        more += (3 * channels[stage] ** 2 + channels[stage]) * (positions[stage] - 8)
    return len(args.kernels) * more * args.frames


def bicnet_tks(row, regions_of_pixels=False):
    """The paper cuts its values instead of rounding them. Its GFLOPs are those of an average frame,
    with the small frames resized behind the first convolution, where the text says that the input
    is resized. 5 of its 24 GFLOPs agree so, and 16 if a region of TKS has 4 x 2 pixels, where the
    text says that a frame has 4 x 2 regions. No count that we tried meets more of them: the paper's
    own values follow from no single one."""
    ours = cost("bicnet_tks", row)
    macs = ours.macs + full_size_stem(ours.args)
    if regions_of_pixels:
        macs += pixel_regions(ours.args)
    return {"million_parameters": ours.parameters / 1e6,
            "gflops_a_frame": macs / ours.args.frames / 1e9}


def m3d(row):
    """The paper prints megabytes, with 4 bytes a parameter. The 95.7 MB of its 2D network fit no
    count, so we compare what the other networks have more, as its text does. The P3D networks would
    have the printed 15.2 MB with a 7x1x1 convolution of the stem, too, which we do not build."""
    more = cost("m3d", row).parameters - cost("m3d", "2d").parameters
    return {"more_megabytes": 4 * more / 1e6}


def sinet(row):
    """The paper prints the multiply-adds of a clip that a module adds to the baseline. The value of
    SBM is that of its convolutions, without P A^T and squeeze-and-excitation. The value of IDM
    seems to have some element-wise work in it. The value of Non-local fits nothing that we tried.
    We count all convolutions and matrix products, and no other work."""
    return {"more_gflops": (cost("sinet", row).macs - cost("sinet", "base").macs) / 1e9}


def strf(row):
    """The paper prints rounded parameters, with the classifier of MARS' 625 identities and its
    bias, and without a neck."""
    ours = cost("strf", row)
    return {"million_parameters": (ours.parameters + ours.classifier) / 1e6}


def uncounted(args):
    """What TCLNet's paper does not count of SEO: the sum of G * F, and w^T f_k, which is needed for
    several learners, after the first time."""
    if not args.seo or args.learners == 1:
        return 0
    positions = -(-args.height // 16) * -(-args.width // 16)
    again = math.comb(args.learners - 1, 2) * args.frames // args.learners
    return args.frames * positions * 1024 + again * 2048 * 1024


def tclnet(row):
    """The paper prints the GFLOPs of 4 frames and adds one operation for each element that a
    BatchNorm writes. Of SEO it counts w^T f_k once for each f_k, and the correlation maps, but not
    the sum of G * F. It cuts its parameters instead of rounding them. Its GFLOPs of Non-local have
    the cost of this block four times."""
    ours = cost("tclnet", row)
    macs = ours.macs - uncounted(ours.args) + ours.elements
    return {"million_parameters": ours.parameters / 1e6,
            "gflops_of_4_frames": macs * 4 / ours.args.frames / 1e9}


COUNT = {function.__name__: function for function in (bicnet_tks, m3d, sinet, strf, tclnet)}
CUT = {  # the others are rounded
    "bicnet_tks": {"million_parameters", "gflops_a_frame"},
    "tclnet": {"million_parameters"},
}


def compare(script, row, **options):
    """{what the paper prints: the difference of ours to it in per cent}, without what is equal to
    the last digit that the paper prints."""
    values, differences = COUNT[script](row, **options), {}
    for key, printed in rows_of(script)[row].costs.items():
        unit = 10 ** len(str(printed).partition(".")[2])
        half = 0 if key in CUT.get(script, ()) else 0.5
        # 1e-9: float64 has an error, which must not move what lies on the boundary
        if math.floor(values[key] * unit + half + 1e-9) != round(printed * unit):
            differences[key] = round(100 * values[key] / printed - 100, 3)
    return differences


# --------------------------------------------------------------------------------------- the result

DIFFERENCES = {  # what compare() gives, for the rows where it gives something
    "bicnet_tks": {
        "bicnet-tks": {"gflops_a_frame": -4.279},
        "base-s": {"gflops_a_frame": -0.655},
        "base-b": {"gflops_a_frame": -0.655},
        "bicnet-tk": {"million_parameters": 0.489, "gflops_a_frame": -0.27},
        "height-256+128": {"gflops_a_frame": 0.478},
        "height-256+128+64": {"gflops_a_frame": 3.219},
        "tb-alpha1": {"gflops_a_frame": -0.304},
        "tb-alpha2": {"gflops_a_frame": -0.233},
        "tb-alpha4": {"gflops_a_frame": -0.147},
        "tks-k3": {"million_parameters": 0.551, "gflops_a_frame": -2.137},
        "tks-k5": {"million_parameters": 0.551, "gflops_a_frame": -2.137},
        "tks-k7": {"million_parameters": 0.551, "gflops_a_frame": -2.137},
        "tks-k37": {"gflops_a_frame": -4.279},
        "tks-k57": {"gflops_a_frame": -4.279},
        "tks-k357": {"gflops_a_frame": -6.316},
        "tks-stage1": {"gflops_a_frame": -4.754},
        "tks-stage3": {"gflops_a_frame": -2.381},
        "tks-stage4": {"million_parameters": 0.234, "gflops_a_frame": -8.572},
        "tks-stage23": {"gflops_a_frame": -6.449},
    },
    "m3d": {
        "m3d-t16": {"more_megabytes": 132.107},
        "p3d-a": {"more_megabytes": -0.527},
        "p3d-a-t16": {"more_megabytes": -0.527},
        "p3d-b": {"more_megabytes": -0.726},
        "p3d-b-t16": {"more_megabytes": -0.726},
        "p3d-c": {"more_megabytes": -0.726},
        "p3d-c-t16": {"more_megabytes": -0.726},
    },
    "sinet": {
        "base+sbm": {"more_gflops": 62.904},
        "base+idm": {"more_gflops": -0.671},
        "base+nonlocal": {"more_gflops": 190.724},
    },
    "strf": {},
    "tclnet": {
        "tclnet": {"million_parameters": 0.571},
        "tclnet-xent": {"million_parameters": 0.571},
        "base+tse": {"million_parameters": 0.568},
        "base+tsb": {"gflops_of_4_frames": 0.004},
        "tclnet-tsb1": {"million_parameters": 0.57},
        "tclnet-tsb3": {"million_parameters": 0.575},
        "tclnet-tsb23": {"million_parameters": 0.578},
        "base+3d": {"million_parameters": -4.549},
        "base+nl": {"gflops_of_4_frames": -18.626},
        "base+tse+nl": {"gflops_of_4_frames": -18.621},
    },
}


Totals = namedtuple("Totals", "values rows equal near middle far")


def totals(scripts=SCRIPTS):
    """Of the printed values, and of the rows that have some: how many values are equal, and the
    sizes, in per cent and in order, of the differences below 1, from 1 to 19, and above."""
    rows = [(script, row) for script in scripts for row in with_printed_costs(script)]
    values = sum(len(rows_of(script)[row].costs) for script, row in rows)
    found = [DIFFERENCES[script].get(row, {}).values() for script, row in rows]
    sizes = sorted(abs(difference) for differences in found for difference in differences)
    parts = [[size for size in sizes if low <= size < high]
             for low, high in ((0, 1), (1, 19), (19, math.inf))]
    return Totals(values, len(rows), values - len(sizes), *parts)
