"""What holds for all five networks and for the classes that several scripts have: float16, export
and tracing, twins, and the sizes that modules refuse."""

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import bicnet_tks
import m3d
import sinet
import strf
import tclnet
from common import settings
from conftest import wake
from data import PKSampler

SCRIPTS = ["bicnet_tks", "m3d", "sinet", "strf", "tclnet"]
each_script = pytest.mark.parametrize("name", SCRIPTS)


def network(name, batch=2):
    """(the full model of a script in eval mode, clips): small clips, but all modules, none of which
    is the identity, and BatchNorms with the statistics of such clips."""
    script = importlib.import_module(name)
    args = settings(script.RECIPE, script.ROWS, [*script.ROWS][0], weights="none", height=64,
                    width=64)
    model = wake(script.build(args, 5)).train()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, args.frames, 3, 64, 64))
    return model.eval(), torch.randn(batch, args.frames, 3, 64, 64)


# ----------------------------------------------------------------------------------------- float16

@each_script
@torch.no_grad()
def test_networks_in_float16(name, one_backbone):
    """By autocast, as a GPU's default is, and with weights in float16."""
    model, clips = network(name)
    expected = model(clips)
    with torch.autocast("cpu", torch.float16):
        by_autocast = model(clips)
    for found in (by_autocast, model.half()(clips.half())):
        assert found.isfinite().all()
        assert F.cosine_similarity(found.float(), expected).min() > 0.999


class Correlation(nn.Module):
    """TCLNet's CorrelationLayer with the vectors of maps in the place of the previous learners'."""

    def __init__(self, scaled):
        super().__init__()
        self.layer = tclnet.CorrelationLayer(1024, 1024, scaled=scaled)

    def forward(self, x):
        return self.layer(x[:, 0], x[:, 1:].mean((3, 4)))


class Suppress(sinet.SuppressOperation):
    """SO with the kernel's taps taken from the maps."""

    def forward(self, x):
        return super().forward(x, x[:, :, :, :3, :3].mean(1).flatten(2).transpose(1, 2))


class Cross(sinet.CrossPropagationModule):
    def forward(self, x):
        return super().forward(x[:, :1], x[:, 1:], x[:, 1:] / 2)


class ProbabilityMap(nn.Module):
    def forward(self, x):
        return tclnet.probability_map(*tclnet.query_and_memory(x))



WIDE = (1, 4, 64, 32, 16)
DEEP = (1, 4, 1024, 4, 4)
# (a module, shape and size of its maps): sizes at which sums over a map are beyond 65,504, and 0
IN_FLOAT16 = {
    "CAL": (lambda: sinet.ChannelAttentionLayer(64), WIDE, 100),
    "KGM": (lambda: sinet.KernelGenerationModule(64), WIDE, 10),
    "KGM of zeros": (lambda: sinet.KernelGenerationModule(64), WIDE, 0),
    "SO": (Suppress, DEEP, 20),
    "CPM": (Cross, WIDE, 100),
    "SBM": (lambda: sinet.SalientToBroadModule(64, 1), WIDE, 100),
    "GC": (lambda: sinet.GlobalContextBlock(64), WIDE, 10),
    "IDM": (lambda: sinet.IntegrationDistributionModule(64, 4, 32, 16), WIDE, 10),
    "RAL": (lambda: m3d.ResidualAttentionLayer(64, 4), WIDE, 10),
    "M3D layer": (lambda: OnFrames(m3d.M3DLayer(nn.Conv2d(64, 8, 3, padding=1), 4)), WIDE, 100),
    "FAM": (
        lambda: strf.FactorizedAttentionMask(64, dimension="t", resolution=3), WIDE, 100),
    "FAM of zeros": (
        lambda: strf.FactorizedAttentionMask(64, dimension="s", resolution=3), WIDE, 0),
    "STRF": (lambda: strf.STRF(64), WIDE, 100),
    "self-product": (lambda: strf.SelfProductMask(normalize=False), WIDE, 100),
    "self-product of zeros": (strf.SelfProductMask, WIDE, 0),
    "correlation": (lambda: Correlation(True), DEEP, 400),
    "TSB": (lambda: tclnet.TemporalSaliencyBoosting(64), WIDE, 400),
    "A of Eq. 6 of zeros": (ProbabilityMap, WIDE, 0),
    "CSP": (lambda: Halves(bicnet_tks.CrossScalePath(64, alpha=3)), WIDE, 100),
    "DAO": (lambda: bicnet_tks.DiverseAttentionsOperation(64, 4, 32, 16), WIDE, 10),
    "TKS": (lambda: bicnet_tks.TemporalKernelSelection(64), WIDE, 100),
}


class OnFrames(nn.Module):
    """A module on frames as batch."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.flatten(0, 1))


class Halves(nn.Module):
    """CSP on one frame and three small ones."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x[:, :1], x[:, 1:, :, ::2, ::2])


@pytest.mark.parametrize("name", IN_FLOAT16)
@torch.no_grad()
def test_modules_in_float16(name):
    make, shape, size = IN_FLOAT16[name]
    module, x = make().eval(), (size * torch.rand(shape)).half()
    for p in module.parameters():
        if p.ndim == 1 and not p.any() and size:
            nn.init.ones_(p)
    assert not size or not x.sum((2, 3, 4)).isfinite().all()  # the case is what it says
    expected, found = module.double()(x.double()), module.half()(x)
    if isinstance(found, (tuple, list)):
        expected, found = expected[0], found[0]
    assert found.isfinite().all()
    error = (found.double() - expected).abs().max()
    assert error <= 0.01 * expected.abs().max()


# ------------------------------------------------------------------------------ export and tracing

@each_script
@torch.no_grad()
def test_networks_are_exported_with_a_free_batch_size(name, one_backbone):
    """From two clips, for any number of them."""
    model, clips = network(name, batch=3)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (clips[:2],), dynamic_shapes=({0: batch},)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are checked, and that it is deprecated
        traced = torch.jit.trace(model, (clips[:2],), check_trace=False)
    for number in (1, 2, 3):
        expected = model(clips[:number])
        for other in (exported, traced):
            torch.testing.assert_close(other(clips[:number]), expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------- twins
# Classes that two scripts or three have, because each is to be read and copied alone.

INFLATED = [m3d.InflatedConv, strf.InflatedConv]
P3D = [m3d.P3DConv, strf.P3DConv]


def conv(bias=False, inputs=4, outputs=6, size=3, padding=1, **options):
    return nn.Conv2d(inputs, outputs, size, padding=padding, bias=bias, **options).double()


@pytest.mark.parametrize("twin", INFLATED, ids=["m3d", "strf"])
@pytest.mark.parametrize("options", [
    dict(), dict(stride=2), dict(stride=(2, 1)), dict(padding=0), dict(padding=(2, 0)),
    dict(size=1, padding=0), dict(size=(3, 5), padding=(1, 2)), dict(size=7, stride=2, padding=3),
])
def test_inflated_convolutions_start_as_the_2d_one(twin, options):
    start, x = conv(**options), torch.randn(8, 4, 9, 8, dtype=torch.float64)
    inflated = twin(start, 4)
    torch.testing.assert_close(inflated(x), start(x), atol=1e-9, rtol=1e-9)
    assert inflated.conv.weight.dtype == torch.float64 and inflated.conv.weight.shape[2] == 3


@pytest.mark.parametrize("twin", [*INFLATED, tclnet.TemporalConv], ids=["m3d", "strf", "tclnet"])
@pytest.mark.parametrize("options", [
    dict(bias=True), dict(groups=2), dict(dilation=2), dict(padding="same"),
    dict(padding_mode="replicate"),
])
def test_inflated_convolutions_refuse_what_they_would_drop(twin, options):
    with pytest.raises(ValueError, match="one group and no bias, not Conv2d"):
        twin(conv(**options), 4)


@pytest.mark.parametrize("options", [dict(bias=True), dict(stride=2), dict(groups=2), dict(size=3)])
def test_temporal_convolutions_refuse_what_they_would_drop(options):
    with pytest.raises(ValueError, match="1x1 convolutions.*not Conv2d"):
        tclnet.TemporalConv(conv(**{"size": 1, "padding": 0, **options}), 4)


@pytest.mark.parametrize("twin", P3D, ids=["m3d", "strf"])
@pytest.mark.parametrize("kind", ["a", "b", "c"])
@pytest.mark.parametrize("options", [
    dict(), dict(stride=2), dict(bias=True), dict(groups=2), dict(dilation=2, padding=2),
    dict(size=1, padding=0), dict(padding="same"), dict(size=(3, 5), padding=(1, 2)),
])
def test_p3d_starts_as_the_2d_convolution(twin, kind, options):
    start, x = conv(**options), torch.randn(8, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(twin(start, 4, kind)(x), start(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("twin", P3D, ids=["m3d", "strf"])
def test_p3d_refuses(twin):
    with pytest.raises(ValueError, match="kind a, b or c, not d"):
        twin(conv(), 4, "d")
    for options in (dict(padding=0), dict(dilation=2), dict(size=2), dict(padding="valid")):
        twin(conv(**options), 4, "c")
        with pytest.raises(ValueError, match="only its stride changes the size of maps"):
            twin(conv(**options), 4, "b")


def test_twins_are_alike():
    """With the same weights they give the same."""
    x = torch.randn(2, 4, 8, 6, 5, dtype=torch.float64)
    first, *others = (module.NonLocalBlock(8).double() for module in (sinet, strf, tclnet))
    for p in first.parameters():
        nn.init.normal_(p, std=0.5)
    for other in others:
        other.load_state_dict(first.state_dict())
        torch.testing.assert_close(other(x), first(x), atol=1e-9, rtol=1e-9)
    frames, start = x.flatten(0, 1), conv(inputs=8, outputs=8)
    for twins, kinds in ((INFLATED, [()]), (P3D, [("a",), ("b",), ("c",)])):
        for kind in kinds:
            ours, theirs = (twin(copy.deepcopy(start), 4, *kind) for twin in twins)
            for p in ours.parameters():
                nn.init.normal_(p, std=0.5)
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(theirs(frames), ours(frames), atol=1e-9, rtol=1e-9)
    point = conv(inputs=8, outputs=8, size=1, padding=0)
    temporal, inflated = tclnet.TemporalConv(point, 4), m3d.InflatedConv(point, 4)
    for p in temporal.parameters():
        nn.init.normal_(p, std=0.5)
    inflated.load_state_dict(temporal.state_dict())
    torch.testing.assert_close(inflated(frames), temporal(frames), atol=1e-9, rtol=1e-9)


# ------------------------------------------------------------------------- sizes that are refused

def tse(features=32, seo=True):
    learners = [nn.Conv2d(16, 32, 1), nn.Conv2d(16, 32, 1)]
    return tclnet.TemporalSaliencyErasing(nn.ReLU(), learners, channels=16, feature_size=features,
                                          erased_block=(2, 2), seo=seo)


# a module, built for 16 channels and four frames of 8x4; what it is given; what its error names
REFUSED = [
    (lambda: sinet.SalientToBroadModule(16, 1), [(2, 4, 8, 8, 4)], "16 channels, not 8"),
    (lambda: sinet.IntegrationDistributionModule(16, 4, 8, 4), [(2, 4, 8, 8, 4)],
     r"\(T, C, H, W\) = \(4, 16, 8, 4\), not \(4, 8, 8, 4\)"),
    (tse, [(2, 4, 8, 8, 4)], "16 channels, not 8"),
    (lambda: tse(seo=False), [(2, 4, 8, 8, 4)], "16 channels, not 8"),
    (lambda: tse(features=24), [(2, 4, 16, 8, 4)], "24 channels, not 32"),
    (lambda: tclnet.SaliencyErasingOperation(16, 32, erased_block=(2, 2)),
     [(2, 8, 8, 4), (2, 1, 32)],
     "vectors of length 32, not for maps with 8 channels and vectors of length 32"),
    (lambda: tclnet.SaliencyErasingOperation(16, 32, erased_block=(2, 2)),
     [(2, 16, 8, 4), (2, 1, 24)],
     "vectors of length 32, not for maps with 16 channels and vectors of length 24"),
    (lambda: tclnet.TemporalSaliencyBoosting(16), [(2, 4, 8, 8, 4)], "16 channels, not 8"),
    (lambda: bicnet_tks.CrossScalePath(16, alpha=3), [(2, 1, 8, 8, 4), (2, 3, 8, 4, 2)],
     r"16 channels.*\(1, 8, 8, 4\)"),
    (lambda: bicnet_tks.CrossScalePath(16, alpha=3), [(2, 1, 16, 8, 4), (2, 2, 16, 4, 2)],
     r"\(3, 16, 4, 2\).*not \(2, 16, 4, 2\)"),
    (lambda: bicnet_tks.CrossScalePath(16, alpha=3), [(2, 1, 16, 8, 5), (2, 3, 16, 4, 2)], "even"),
    (lambda: bicnet_tks.DiverseAttentionsOperation(16, 4, 8, 4), [(2, 4, 8, 8, 4)],
     r"\(4, 16, 8, 4\), not \(4, 8, 8, 4\)"),
    (lambda: bicnet_tks.TemporalKernelSelection(16), [(2, 4, 8, 8, 4)], "16 channels, not 8"),
    (lambda: m3d.M3DLayer(nn.Conv2d(16, 8, 3, padding=1), 4), [(8, 8, 8, 4)],
     "16 channels and a multiple of 4 frames, not 8 channels and 8 frames"),
    (lambda: m3d.M3DLayer(nn.Conv2d(16, 8, 3, padding=1), 4, per_tap=True), [(6, 16, 8, 4)],
     "16 channels and a multiple of 4 frames, not 16 channels and 6 frames"),
    (lambda: m3d.ResidualAttentionLayer(16, 4), [(2, 4, 8, 8, 4)], r"\(4, 16\), not \(4, 8\)"),
    (lambda: m3d.ResidualAttentionLayer(16, 4), [(2, 3, 16, 8, 4)], r"\(4, 16\), not \(3, 16\)"),
    (lambda: strf.STRF(16), [(2, 4, 8, 8, 4)], "16 channels, not 8"),
]


@pytest.mark.parametrize("make, shapes, says", REFUSED)
def test_modules_refuse_other_sizes(make, shapes, says):
    with pytest.raises(ValueError, match=says):
        make().eval()(*map(torch.rand, shapes))


@pytest.mark.parametrize("make, says", [
    (lambda: bicnet_tks.BiCnet(5, pool="mean"), "must be max or avg, not mean"),
    (lambda: m3d.Stream(4, pool="mean"), "must be max or avg, not mean"),
    (lambda: sinet.SINet(5, pool="mean"), "must be max or avg, not mean"),
    (lambda: sinet.SINet(5, mixer="nl"), "idm, gc, softmax, ones or inverse, not nl"),
    (lambda: sinet.NonLocalBlock(16, affinity="gaussian"), "softmax, ones or inverse, not gauss"),
    (lambda: strf.STRFNet(5, pool="mean"), "must be max or avg, not mean"),
    (lambda: tclnet.TCLNet(5, pool="mean"), "must be max or avg, not mean"),
    (lambda: tclnet.TCLNet(5, learners=1, extra="2d"), "nl, dropblock, 3d or none, not 2d"),
    (lambda: PKSampler([1, 2], 2, 2, shows="people"), "tracklets or identities, not people"),
])
def test_unknown_choices_are_refused(make, says, one_backbone):
    """Not taken for one of the others."""
    with pytest.raises(ValueError, match=says):
        make()
