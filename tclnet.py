"""TCLNet: Temporal Complementary Learning for Video Person Re-identification.

Hou, Chang, Ma, Shan, Chen. ECCV 2020. https://arxiv.org/abs/2007.09357
The authors' release: https://github.com/blue-blue272/VideoReID-TCLNet

The frames of a clip are much alike, and a network finds the same salient part in each of them.
Temporal saliency erasing (TSE) has one learner for each frame of a short segment; a learner is the
last stage of the network. TSE erases from a frame the regions that the learners of the previous
frames attended to, so that the frame's own learner finds another part. Temporal saliency boosting
(TSB) comes before TSE. It looks in the other frames for the salient part of a frame, and adds the
features that it finds there to the frame. This makes up for the information that erasing removes.

    python tclnet.py                          # a small run on synthetic data, on any machine
    python tclnet.py --data mars --gpu 0      # the paper's recipe on MARS
    python tclnet.py --data mars --plan       # print what that command would train and test
    python tclnet.py --data mars --gpu 0 --variant base+tse --h-e 6    # a variant with another h_e
    python tclnet.py --data ilids --gpu 0 --split all   # run all ten splits and average the results

Where the paper's parts are:
  Eq. 1-2   Sec. 3.1, Fig. 2 (a)  TemporalSaliencyErasing (TSE): learners and their vectors f_n
  Eq. 3     Sec. 3.1, Fig. 2 (b)  CorrelationLayer: R_nk
            Sec. 3.1, Fig. 2 (b)  BlockBinarization: B_nk, the block that is erased
  Eq. 4-5   Sec. 3.1, Fig. 2 (b)  SaliencyErasingOperation (SEO): B_n, G_n and the erased map
  Eq. 6     Sec. 3.2, Fig. 3      probability_map: A; TemporalSaliencyBoosting (TSB): o and E
  Eq. 7     Sec. 3.3, Fig. 4      TemporalSaliencyErasing: the segments C_k and their c_k
            Sec. 3.3, Fig. 4      TCLNet builds the backbone and computes v_1 ... v_N;
                                  TCLNet.finish computes the v that the test compares
            Sec. 3.3              loss_weights, losses: the objective function
            Sec. 4.1              RECIPE: all settings; SAMPLER, SAMPLE: batches and training
                                  clips; SPLIT, METRIC: clips and distance of the test; CMC and
                                  mAP are computed by evaluate in common.py
            Sec. 4.1, Adam        make_optimizer; StepLR in train lowers the learning rate
            Tables 1-4            ROWS: the variants (the paper's TCLNet is tclnet-xent, and its
                                  TCLNet-tri is tclnet, the default); --complexity prints
                                  parameters and GFLOPs as we count them, beside the paper's
            Sec. 4.3              single-shot re-ID: --variant base+tse --frames 1 gives one image
                                  to all learners. The paper has 85.3 mAP (baseline: 80.3, though
                                  it calls the difference 3.2) on Market-1501, for which there is
                                  no loader here.
            Sec. 4.4, Table 4     NonLocalBlock, TemporalConv (3D); DropBlock is in TCLNet; random
                                  erasing (RE) of input frames is --erase
            Fig. 2, 3 (b), 5, 6   --figure FOLDER draws them (function picture); in place of the
                                  t-SNE of Fig. 6, common.py draws a PCA

The shapes of one clip through the network, for T = 4 frames of 256x128 and N = 2 learners:
  clip              4 x    3 x 256 x 128
  stem              4 x   64 x  64 x  32
  stage 1           4 x  256 x  64 x  32
  stage 2           4 x  512 x  32 x  16
    TSB             4 x  512 x  32 x  16   For each frame: q has 512 numbers, the memory M has
                                           3 x 32 x 16 = 1,536 positions.
  stage 3           4 x 1024 x  16 x   8   F_1 ... F_4, cut into segments C_1 = F_1, F_2 and
                                           C_2 = F_3, F_4. Frames 1 and 3 go to learner 1, frames
                                           2 and 4 to learner 2.
    SEO             4 x 1024 x  16 x   8   In frames 2 and 4 a block of 3 x 8 positions is erased.
                                           Nothing is erased in the first frame of a segment.
  stage 4           4 x 2048 x  16 x   8   L_1 and L_2: the first two blocks are shared.
    GAP             4 x 2048               f_1 ... f_4
  mean over C_k     2 x 2048               v_1, the mean of f_1 and f_3, and v_2, of f_2 and f_4
  training          Each v_i has its own BatchNorm, classifier and losses.
  test              1 x 4096               The outputs of both BatchNorms are concatenated and
                                           averaged over all clips of a tracklet. Then `finish`
                                           L2-normalises each half of 2048 by itself, which gives
                                           v. Tracklets are compared by the cosine of their v.

To reuse a class elsewhere, also copy the classes and functions that its docstring names at its end.

Deviations from the paper (what the paper has, what we do, and the flag for the paper's form):
  Eq. 3         The paper has F^T (w^T f). We divide it by sqrt(D), as the release does, because
                otherwise the softmax of Eq. 5 saturates. --no-scaled restores the paper's form.
  f_k           In the paper's Eq. 3 a learner's loss also reaches the previous learners, through
                their f_k. We stop this gradient, as the release does. --no-stop-gradient restores
                the paper's form.
  TSB's BN      The paper duplicates o over all positions "before entering the BN layer". We do it
                afterwards. This changes only the running variance, an unbiased estimate with the
                factor n / (n - 1): with us n is the number of frames in a batch, in the paper it is
                the number of all their positions. There is no flag for this.
  test          The paper takes "an input of entire video". We cut it into clips of T frames, so
                that the memory of TSB holds the other frames of one clip, as in training. A larger
                --frames makes the clips longer, in the test and in training.
  Table 3a      "Four frames" cannot be cut into segments of N = 3 frames: the variant base+tse-n3
                takes clips of 3. (The paper's GFLOPs are those of 3 frames times 4/3.) With
                --frames 6 a clip has two segments.
Eq. 3 is as in the paper with both flags, --no-scaled --no-stop-gradient.

Unspecified in the paper; our choice ("release": the authors' release does the same):
  erased map    F * B + BN(sum over all positions of G * F), where the second term is added at every
                position. Through this term gradients reach w, which they cannot do through B. It
                costs only the 2,048 parameters of the BN, whose weight starts at zero.
  first frame   Nothing is erased: B = 1. An empty product of correlation maps is 1 everywhere, so
                that G is uniform. The BN term of the erased map is added to the first frame, too.
  SEO           All frames of a segment, also the first, share one BN. The learners run in turn:
                this BN and the two blocks that they share are called once for the first frames of
                all segments, once for the second frames, and so on, each time with the statistics
                of these frames (release). f_k is always an average over positions, even with --pool
                max (release).
  block         If several blocks have the highest sum, the first is erased. h_e and w_e refer to a
                16x8 map and are scaled to the size of the actual map. The strides are not scaled.
  TSB           tau = 5; the weight of the BN starts at zero.
  new layers    Initially the weights of the classifiers, which have no bias, are normal with a
                standard deviation of 0.001, and those of the BatchNorms in TSB, SEO and the
                Non-local block are zero. Each learner starts as a copy of the last block of
                ResNet-50.
  backbone      The last stride of ResNet-50 is removed, which the paper's GFLOPs confirm.
  neck          Each v_i goes through its own BatchNorm (neck). Classifier, triplet loss and test
                take its output, so that v has BN(v_i) in place of v_i.
  losses        They are summed over the learners. The triplet loss has the cosine distance and a
                margin of 0.4.
  batch         32 clips are 8 identities with 4 clips each.
  weight decay  We use 5e-4.
  epoch         An epoch goes through the tracklets, in groups of K tracklets of the same identity
                (release), and leaves out the tracklets that remain beyond full groups and batches.
                On MARS this takes 235 steps. With --epoch identities an epoch shows every identity
                once, in 79 steps.
  frames        Sec. 4.1 says only that four frames are sampled, and Sec. 3.3 calls the frames of a
                clip consecutive. In training ours are 8 apart. A tracklet of 4 to 31 frames gives 4
                different frames, which are drawn at random and kept in temporal order. A tracklet
                of fewer than 4 frames gives some of its frames more than once (release). In the
                test the frames of a clip are consecutive, and the last clip is filled by starting
                the tracklet again: 10 frames are 3 clips of 4.
  flip          A training clip is flipped left to right with a probability of 0.5.
  resizing      Frames are resized by bicubic interpolation (release).
  pieces        Training tracklets are cut into pieces of 32 frames on Duke and of 64 on LS-VID
                (release). --chunk 0 keeps them whole.
  parameters    For N = 2 learners with SEO and without Non-local the paper has 29.9 million, but
                the modules that it describes have 30.07 million. The paper's values for N = 3 and 4
                agree with our count, if it is cut off after one decimal.
  Table 4, NL   One Non-local block comes after stage 3. Its inner layers have half the channels,
                and its convolutions have biases. (The paper's parameter count fits both with and
                without biases. The GFLOPs that the paper gives for the block are four times ours.)
  Table 4, RE   Random erasing has the probability 0.5.
  DropBlock     (Table 4) It comes after stages 3 and 4, with probability 0.1 and blocks of 7x7, or
                of the largest odd size that fits into the map.
  Table 4, 3D   The first convolution of every residual block becomes 3x1x1. This gives the paper's
                GFLOPs, but 32.2 million parameters, not 33.7.

The authors' release departs from the paper's equations in these points; we follow the equations:
  TSB           The release averages the memory over 2x2 positions before it is compared with q,
                and has a 1x1 convolution with a bias before the BatchNorm. The paper has neither.
  SEO           The release has a 1x1 convolution with a bias before the BatchNorm. Its softmax runs
                over the positions that are not erased. In Eq. 5 it runs over all positions, and its
                result is multiplied by B.
  block         The release averages the correlation map over its width, and tries a block of three
                rows centred on each row, so that at the top and bottom border only two rows are
                erased.
  pooling       The release takes the maximum over the last map for the vectors that are averaged
                to v_1 ... v_N, and the average for the f_k of Eq. 3. The paper has GAP for both.
                --pool max gives the release's form.
  batches       The release's batches are 8 groups, each of one identity. In some of its batches the
                same identity comes twice; in ours it never does.
"""
import copy
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (Row, Run, at_least_float32, batch_hard_triplet, command_line, energy, figures,
                    gather, load_network, overlays, plan, run_script, watch)
from data import PKSampler, load_dataset, normalize, sample_strided, split_consecutive


# -------------------------------------------------------------- Sec. 3.1: temporal saliency erasing

class CorrelationLayer(nn.Module):
    """Eq. 3: correlates every position of a frame with the vectors of the previous frames.

    Takes the map F_n of a frame, (B, D, H, W), and the vectors f_1 ... f_K of K previous frames,
    (B, K, D1). Returns the correlation maps R_n1 ... R_nK, (B, K, H, W), in float32 (in float64 for
    float64 maps).

    Args:
        channels: number of channels D of the map.
        feature_size: length D1 of a frame's vector.
        scaled: whether to divide by sqrt(D). False is the paper's form.
        stop_gradient: whether to stop the gradient of Eq. 3 at the vectors. False is the paper's
            form.

    Raises ValueError on maps that do not have D channels and on vectors of another length than D1.
    """

    def __init__(self, channels: int, feature_size: int, *, scaled: bool = True,
                 stop_gradient: bool = True):
        super().__init__()
        self.w = nn.Linear(feature_size, channels, bias=False)            # f -> w^T f
        self.scaled = scaled
        self.stop_gradient = stop_gradient

    def forward(self, x, previous_vectors):
        D, H, W = x.shape[1:]
        feature_size = previous_vectors.shape[2]
        if D != self.w.out_features or feature_size != self.w.in_features:
            raise ValueError(f"SEO was built for maps with {self.w.out_features} channels and "
                             f"vectors of length {self.w.in_features}, not for maps with {D} "
                             f"channels and vectors of length {feature_size}")
        if self.stop_gradient:
            previous_vectors = previous_vectors.detach()
        # R = F^T (w^T f). We divide by sqrt(D) already here, before the product with F, because
        # the sums of that product could otherwise overflow float16.
        projected = self.w(previous_vectors) / math.sqrt(D)
        r = projected @ x.flatten(2)                                      # Eq. 3, over sqrt(D)
        r = r.to(torch.promote_types(r.dtype, torch.float32))
        if not self.scaled:
            r = r * math.sqrt(D)                                          # Eq. 3 as in the paper
        return r.unflatten(2, (H, W))


class BlockBinarization(nn.Module):
    """Block binarization layer: a mask that is 0 in the block of the highest correlation and 1
    elsewhere.

    Takes correlation maps R, (..., H, W). Returns masks B, (..., H, W), each of which has exactly
    h_e * w_e zeros. No gradient goes through.

    Args:
        erased_block: height and width (h_e, w_e) of the block that is erased, in positions of the
            map; at least 1x1, at most the map.
        block_stride: vertical and horizontal stride (s_h, s_w) of the sliding block, at least 1.

    Raises ValueError if a side of the block or a stride is smaller than 1, and on maps that are
    smaller than the block.
    """

    def __init__(self, erased_block: tuple[int, int], *, block_stride: tuple[int, int] = (1, 1)):
        super().__init__()
        if min(erased_block) < 1 or min(block_stride) < 1:
            raise ValueError("SEO takes blocks and strides of at least 1x1, not a block of "
                             f"{erased_block[0]}x{erased_block[1]} and a stride of "
                             f"{block_stride[0]}x{block_stride[1]}")
        self.erased_block = tuple(erased_block)
        self.block_stride = tuple(block_stride)

    @torch.no_grad()
    def forward(self, r):
        H, W = r.shape[-2:]
        h_e, w_e = self.erased_block
        s_h, s_w = self.block_stride
        if h_e > H or w_e > W:
            raise ValueError(f"a block of {h_e}x{w_e} does not fit into maps of {H}x{W}")
        # All blocks have the same size, so the block with the highest mean also has the highest
        # sum. `means` has one value for each of the N_pos positions of the sliding block.
        means = F.avg_pool2d(r.reshape(-1, 1, H, W), self.erased_block, self.block_stride)
        best = means.flatten(1).argmax(1).view(-1, 1, 1)
        blocks_in_a_row = means.shape[-1]
        block_row = best // blocks_in_a_row
        block_column = best % blocks_in_a_row
        top = block_row * s_h
        left = block_column * s_w
        row = torch.arange(H, device=r.device).view(H, 1)
        column = torch.arange(W, device=r.device)
        in_rows = (row >= top) & (row < top + h_e)                        # (maps, H, 1)
        in_columns = (column >= left) & (column < left + w_e)             # (maps, 1, W)
        kept = ~(in_rows & in_columns)
        return kept.to(r.dtype).view_as(r)


class SaliencyErasingOperation(nn.Module):
    """SEO, Eq. 3-5, Fig. 2 (b): erases from a frame what the previous frames' learners attended to.

    Takes the map F_n of a frame, (B, D, H, W), and the vectors f_1 ... f_(n-1) of the previous
    frames, (B, n - 1, D1). Returns the erased map, (B, D, H, W). For the first frame the vectors
    are an empty tensor (B, 0, D1), and nothing is erased.

    Args:
        channels: number of channels D of the map.
        feature_size: length D1 of a frame's vector.
        erased_block: height and width (h_e, w_e) of the block that is erased, in positions of the
            map; the default is the paper's, for maps of 16x8.
        block_stride: vertical and horizontal stride (s_h, s_w) of the sliding block, at least 1.
        scaled: whether to divide Eq. 3 by sqrt(D). False is the paper's form.
        stop_gradient: whether to stop the gradient of Eq. 3 at the vectors. False is the paper's
            form.

    Raises ValueError on invalid blocks and strides, on maps that do not have D channels or are
    smaller than the block, and on vectors of another length than D1. To reuse this class, also copy
    CorrelationLayer and BlockBinarization.
    """

    def __init__(self, channels: int, feature_size: int, *,
                 erased_block: tuple[int, int] = (3, 8), block_stride: tuple[int, int] = (1, 1),
                 scaled: bool = True, stop_gradient: bool = True):
        super().__init__()
        self.correlation = CorrelationLayer(channels, feature_size, scaled=scaled,
                                            stop_gradient=stop_gradient)
        self.binarization = BlockBinarization(erased_block, block_stride=block_stride)
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x, previous_vectors):
        B, D, H, W = x.shape
        if previous_vectors.shape[1] == 0:
            # For the first frame the products of Eq. 4 and 5 are empty and thus 1. The ones are
            # written out because ONNX cannot export a product over an empty dimension.
            dtype = torch.promote_types(x.dtype, torch.float32)
            r = x.new_ones(B, H, W, dtype=dtype)
            b = x.new_ones(B, H, W, dtype=dtype)                          # B_1 = 1
        else:
            correlation_maps = self.correlation(x, previous_vectors)      # R_n1, R_n2 ..., Eq. 3
            r = correlation_maps.prod(1)                                  # R_n1 * R_n2 * ...
            b = self.binarization(correlation_maps).prod(1)               # B_n, Eq. 4
        g = r.flatten(1).softmax(1) * b.flatten(1)                        # G_n, Eq. 5; (B, H*W)
        # the erased map: F_n * B_n + BN(sum over all positions of G_n * F_n)
        attended = x.flatten(2) @ g.to(x.dtype).unsqueeze(2)              # (B, D, 1)
        attended = self.bn(attended.squeeze(2)).to(x.dtype)
        return x * b.unsqueeze(1).to(x.dtype) + attended.view(B, D, 1, 1)


def unbind_frames(x):
    """Takes maps (B, T, C, H, W) and returns a list of T maps (B, C, H, W), in channels_last.

    The channels are moved to the end before `unbind` for the sake of the backward pass. There
    `unbind` allocates the gradient of its input contiguously, in the order of the dimensions. With
    the channels at the end this gradient is in channels_last, too. Otherwise the preceding layers
    would have to copy the gradient of every map.
    """
    channels_at_the_end = x.movedim(2, 4)                                 # (B, T, H, W, C)
    frames = []
    for frame in channels_at_the_end.unbind(1):                           # (B, H, W, C)
        frame = frame.movedim(3, 1)                                       # (B, C, H, W)
        frames.append(frame.contiguous(memory_format=torch.channels_last))
    return frames


class TemporalSaliencyErasing(nn.Module):
    """TSE, Eq. 1-2 and 7, Fig. 2 (a): N ordered learners, one for each frame of a segment. Each
    learner gets its frame without the regions that the learners before it attended to.

    Takes the maps F of clips, (B, T, D, H, W), where T is a multiple of N. Returns the vectors c of
    the frames, grouped by segments, (B, T / N, N, D1). T may also be 1: then all learners get the
    same frame, and the vectors are (B, 1, N, D1).

    Args:
        shared: the layers that all learners share, applied before each of them.
        learners: a list of N modules. The paper's learner L_n is `shared`, followed by
            `learners[n - 1]`.
        channels: number of channels D of the maps.
        feature_size: number of channels D1 of the learners' outputs, the length of a vector.
        erased_block: height and width (h_e, w_e) of the block that is erased, in positions of the
            map; the default is the paper's, for maps of 16x8.
        block_stride: vertical and horizontal stride (s_h, s_w) of the sliding block, at least 1.
        seo: whether to erase. False is the paper's "TSE-wo-SEO".
        scaled: whether to divide Eq. 3 by sqrt(D). False is the paper's form.
        stop_gradient: whether to stop the gradient of Eq. 3 at the vectors of the previous frames.
            False is the paper's form.
        pool: pooling of a learner's output into the returned vector: "avg" (GAP, as in the paper)
            or "max". The vectors f_k that SEO takes are averages in both cases.

    Raises ValueError on an invalid block, stride or pooling, if T is neither 1 nor a multiple of N,
    on maps that do not have D channels or are smaller than the block, and on learners whose outputs
    do not have D1 channels. To reuse this class, also copy CorrelationLayer, BlockBinarization,
    SaliencyErasingOperation and unbind_frames.
    """

    def __init__(self, shared: nn.Module, learners: list[nn.Module], channels: int,
                 feature_size: int, *, erased_block: tuple[int, int] = (3, 8),
                 block_stride: tuple[int, int] = (1, 1), seo: bool = True, scaled: bool = True,
                 stop_gradient: bool = True, pool: str = "avg"):
        super().__init__()
        if pool not in ("max", "avg"):
            raise ValueError(f"the pooling of the last maps must be max or avg, not {pool}")
        self.shared = shared
        self.learners = nn.ModuleList(learners)
        self.channels = channels
        self.feature_size = feature_size
        self.pool = pool
        self.seo = None
        if seo and len(learners) > 1:
            self.seo = SaliencyErasingOperation(
                channels, feature_size, erased_block=erased_block, block_stride=block_stride,
                scaled=scaled, stop_gradient=stop_gradient)

    def forward(self, x):
        B, T, D, H, W = x.shape
        N = len(self.learners)
        if D != self.channels:
            raise ValueError(f"TSE was built for maps with {self.channels} channels, not {D}")
        if T == 1:                                                        # Sec. 4.3: one image
            x = x.expand(-1, N, -1, -1, -1)
            T = N
        if T % N != 0:
            raise ValueError(f"TSE with {N} learners needs a multiple of {N} frames, not {T}")
        segments = x.reshape(B * T // N, N, D, H, W)                      # C_k, all in one batch
        previous_vectors = x.new_empty(B * T // N, 0, self.feature_size)  # f_1 ... f_(n-1)
        vectors = []
        for learner, frame in zip(self.learners, unbind_frames(segments)):
            if self.seo is not None:
                frame = self.seo(frame, previous_vectors)                 # the erased map, Eq. 2
            y = learner(self.shared(frame))                               # L_n
            if y.shape[1] != self.feature_size:
                raise ValueError("TSE was built for learners whose outputs have "
                                 f"{self.feature_size} channels, not {y.shape[1]}")
            f_n = y.mean((2, 3))                                          # GAP(L_n), Eq. 1-2
            previous_vectors = torch.cat([previous_vectors, f_n.unsqueeze(1)], dim=1)
            if self.pool == "max":
                vectors.append(y.amax((2, 3)))
            else:
                vectors.append(f_n)
        return torch.stack(vectors, 1).view(B, T // N, N, -1)             # c_1 ... c_L, Eq. 7


# ------------------------------------------------------------- Sec. 3.2: temporal saliency boosting

def query_and_memory(x):
    """Sec. 3.2: takes maps (B, T, D, H, W) and returns q, (B, T, D), the average of every frame
    over its positions, and the local descriptors of all frames, (B, T*H*W, D). The memory M of a
    frame is those of the other frames; `probability_map` leaves out its own."""
    memory = x.movedim(2, 4).flatten(1, 3)
    dtype = torch.promote_types(x.dtype, torch.float32)       # float16 cannot hold the sum of a map
    query = memory.unflatten(1, (x.shape[1], -1)).mean(2, dtype=dtype)    # GAP
    return query, memory


def probability_map(query, memory, *, tau: float = 5.0):
    """Computes Eq. 6: how well each position of the other frames matches a frame, the query.

    Returns A, (B, T, T*H*W), in float32 (in float64 for a float64 memory). For each query the
    T*H*W probabilities sum to 1. They are 0 at the positions of the query's own frame, because in
    the paper the memory of a query holds only the other frames.

    Args:
        query: q, (B, T, D), the average of every frame over its positions.
        memory: (B, T*H*W, D), the local descriptors of all frames, frame after frame.
        tau: the temperature: the larger it is, the more A prefers the best matches.
    """
    T = query.shape[1]
    positions_per_frame = memory.shape[1] // T
    dtype = torch.promote_types(memory.dtype, torch.float32)
    q = F.normalize(query.to(dtype), dim=2)
    m = F.normalize(memory.to(dtype), dim=2)
    # A_i = exp(tau q^T m_i) / sum over j of exp(tau q^T m_j)            # Eq. 6
    exponents = tau * q @ m.transpose(1, 2)                               # (B, T, T*H*W)
    is_own_frame = torch.eye(T, dtype=torch.bool, device=memory.device)
    is_own_position = is_own_frame.repeat_interleave(positions_per_frame, dim=1)  # (T, T*H*W)
    return exponents.masked_fill(is_own_position, -math.inf).softmax(2)


class TemporalSaliencyBoosting(nn.Module):
    """TSB, Eq. 6, Fig. 3: adds to each frame what the other frames show of its salient part.

    Takes maps Q, (B, T, D, H, W), with T of at least 2. Returns maps E of the same shape. The
    module starts as the identity, because the weight of its BatchNorm starts at zero.

    Args:
        channels: number of channels D of the maps.
        tau: temperature of Eq. 6: the larger it is, the more the best matches count.

    Raises ValueError on a single frame and on maps that do not have D channels. To reuse this
    class, also copy query_and_memory and probability_map.
    """

    def __init__(self, channels: int, *, tau: float = 5.0):
        super().__init__()
        self.tau = tau
        self.bn = nn.BatchNorm1d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x):
        B, T, D = x.shape[:3]
        if T < 2:
            raise ValueError(f"TSB needs at least 2 frames, not {T}, because it looks for the "
                             "salient part of each frame in the others")
        if D != self.bn.num_features:
            raise ValueError(f"TSB was built for maps with {self.bn.num_features} channels, "
                             f"not {D}")
        q, m = query_and_memory(x)
        a = probability_map(q, m, tau=self.tau).to(x.dtype)
        o = a @ m                                                         # o = M^T A; (B, T, D)
        residual = self.bn(o.flatten(0, 1)).to(x.dtype)
        return residual.view(B, T, D, 1, 1) + x                           # E = BN(o) + Q


# ------------------------------ Sec. 4.4, Table 4: the modules that TSE and TSB are compared with

class NonLocalBlock(nn.Module):
    """Non-local block (Wang et al., CVPR 2018) in its embedded Gaussian form, over all positions of
    all frames of a clip.

    Takes maps X, (B, T, C, H, W), and returns maps of the same shape. It starts as the identity,
    because the weight of its BatchNorm starts at zero.

    Args:
        channels: number of channels C of the maps.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 2, 1)
        self.phi = nn.Conv2d(channels, channels // 2, 1)
        self.g = nn.Conv2d(channels, channels // 2, 1)
        self.out = nn.Sequential(nn.Conv2d(channels // 2, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.out[1].weight)

    def project_positions(self, layer, x):
        """Applies a 1x1 convolution to X and returns the vectors of all positions of a clip in one
        dimension, (B, 1, T*H*W, C / 2)."""
        B, T, C, H, W = x.shape
        y = layer(x.flatten(0, 1)).view(B, T, -1, H, W)
        return y.movedim(2, 4).reshape(B, 1, T * H * W, -1)

    def forward(self, x):
        B, T, C, H, W = x.shape
        theta = self.project_positions(self.theta, x)
        phi = self.project_positions(self.phi, x)
        g = self.project_positions(self.g, x)
        y = F.scaled_dot_product_attention(theta, phi, g, scale=1.0)      # softmax(theta phi^T) g
        y = y.reshape(B * T, H, W, -1).movedim(3, 1)
        return self.out(y).view(B, T, C, H, W) + x


class TemporalConv(nn.Module):
    """A 3x1x1 convolution that replaces a 1x1 convolution and at first has the same outputs.

    Takes the frames of clips as a batch, (B*T, C, H, W), and returns (B*T, C', H, W), as the first
    1x1 convolution of a residual block does.

    Args:
        conv: the convolution to start from: 1x1 with stride 1, no padding, one group and no bias.
        frames: number of frames T of a clip.

    Raises ValueError if `conv` is any other convolution.
    """

    def __init__(self, conv: nn.Conv2d, frames: int):
        super().__init__()
        is_1x1 = conv.kernel_size == (1, 1) and conv.stride == (1, 1)
        has_no_padding = conv.padding in ((0, 0), "valid", "same")
        is_plain = is_1x1 and has_no_padding and conv.bias is None and conv.groups == 1
        if not is_plain:
            raise ValueError("TemporalConv takes only 1x1 convolutions with stride 1, no padding, "
                             f"one group and no bias, not {conv}")
        self.frames = frames
        self.conv = nn.Conv3d(conv.in_channels, conv.out_channels, (3, 1, 1), padding=(1, 0, 0),
                              bias=False, device=conv.weight.device, dtype=conv.weight.dtype)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :, 1] = conv.weight     # the middle one of the three frames

    def forward(self, x):
        clips = x.unflatten(0, (-1, self.frames)).transpose(1, 2)         # (B, C, T, H, W)
        return self.conv(clips).transpose(1, 2).flatten(0, 1)


# ---------------------------------------------------------------------------- Sec. 3.3: the network

def resnet50(weights="none", last_stride=1):  # same in every script
    """torchvision's ResNet-50 without its classifier.

    Args:
        weights: where its weights come from: "imagenet" (torchvision's V1 weights, which are
            downloaded once), "none" (random weights), a state_dict of torchvision's resnet50, or
            the path of a file with one.
        last_stride: stride of stage 4. With 1 its maps are as large as those of stage 3, as is
            usual in re-identification; torchvision's own is 2.

    Raises OSError when the weights cannot be read or downloaded, and RuntimeError when they are not
    those of a ResNet-50.
    """
    v1 = "IMAGENET1K_V1" if weights == "imagenet" else None
    # From random weights a network whose residual branches start at zero learns much sooner.
    net = torchvision.models.resnet50(weights=v1, zero_init_residual=True)
    net.fc = nn.Identity()
    if weights not in ("imagenet", "none"):
        state = weights
        if not isinstance(weights, dict):
            state = torch.load(weights, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    for layer in (net.layer4[0].conv2, net.layer4[0].downsample[0]):
        layer.stride = (last_stride, last_stride)
    return net


def scale_block(erased_block: tuple[int, int], height: int, width: int):
    """Scales `erased_block`, a size on the paper's 16x8 map, to a map of height x width positions.
    Returns (h_e, w_e), rounded (halves up), and at least 1x1."""
    h_e = math.floor(erased_block[0] * height / 16 + 0.5)
    w_e = math.floor(erased_block[1] * width / 8 + 0.5)
    return max(1, h_e), max(1, w_e)


class TCLNet(nn.Module):
    """TCLNet, Sec. 3.3, Fig. 4: ResNet-50 with a TSB after stage 2, and with stage 4 turned
    into the learners of TSE.

    Takes clips (B, T, 3, H, W), normalised as for ImageNet. In train mode it returns the embeddings
    of the N learners, (B, N, 2048), and their logits, (B, N, num_classes). In eval mode it returns
    the embeddings one after the other, (B, N * 2048): average them over the clips of a tracklet and
    give the result to `finish`.

    Args:
        num_classes: number of identities that the classifiers tell apart.
        frames: number of frames T of a clip: a multiple of N, or 1 (without TSB).
        height: height H of the frames in pixels.
        width: width W of the frames in pixels.
        learners: number N of learners of TSE; 1 is a network without erasing.
        seo: whether TSE erases. False is the paper's "TSE-wo-SEO".
        erased_block: height and width (h_e, w_e) of the erased block on a 16x8 map, at most 16x8.
            It is scaled to the actual map size. N - 1 blocks must be too small to cover the whole
            map.
        block_stride: vertical and horizontal stride (s_h, s_w) of the sliding block, at least 1.
        scaled: whether to divide Eq. 3 by sqrt(D). False is the paper's form.
        stop_gradient: whether to stop the gradient of Eq. 3 at the vectors of the previous frames.
            False is the paper's form.
        tsb: stages of ResNet-50 (from 1, 2 and 3) after which a TSB is inserted; () for no TSB.
        tau: temperature of TSB, Eq. 6: the larger it is, the more the best matches count.
        extra: the alternative of Table 4 to TSE and TSB: "nl" (a Non-local block after stage 3),
            "dropblock", "3d" (temporal convolutions, with one learner only) or "none".
        pool: "avg" (GAP, as in the paper) or "max", over the last map of a frame.
        weights: initial weights of the backbone: "imagenet" (torchvision's), "none", or the name of
            a file with a state_dict of torchvision's resnet50.

    Raises ValueError on invalid arguments, and what resnet50 raises on weights that it cannot load.
    To reuse this class, also copy all classes and functions above it.
    """

    def __init__(self, num_classes: int, frames: int = 4, height: int = 256, width: int = 128, *,
                 learners: int = 2, seo: bool = True, erased_block: tuple[int, int] = (3, 8),
                 block_stride: tuple[int, int] = (1, 1), scaled: bool = True,
                 stop_gradient: bool = True, tsb: tuple[int, ...] = (2,), tau: float = 5.0,
                 extra: str = "none", pool: str = "avg", weights: str = "none"):
        super().__init__()
        if learners < 1:
            raise ValueError(f"TCLNet takes 1 learner or more, not {learners}")
        if not set(tsb) <= {1, 2, 3}:
            raise ValueError(f"TCLNet takes TSBs after stages 1, 2 and 3, not {tsb}")
        if frames > 1 and frames % learners != 0:
            raise ValueError(f"{learners} learners take clips of {learners}, {2 * learners}, "
                             f"{3 * learners} ... frames, not {frames}")
        if tsb and frames < 2:
            raise ValueError(f"TSB needs at least 2 frames, not {frames}, because it looks for the "
                             "salient part of each frame in the others")
        if extra not in ("none", "nl", "dropblock", "3d"):
            raise ValueError(f"extra must be nl, dropblock, 3d or none, not {extra}")
        if extra == "3d" and learners > 1:
            raise ValueError(f'extra "3d" takes one learner, not {learners}')
        if extra == "nl" and 3 in tsb:
            raise ValueError('extra "nl" takes the place of the TSB after stage 3: remove 3 from '
                             f"tsb, which is {tsb}")
        fits_into_16x8 = 1 <= erased_block[0] <= 16 and 1 <= erased_block[1] <= 8
        if not fits_into_16x8:
            raise ValueError("the erased block, which is given for a map of 16x8 positions, must "
                             "have 1x1 to 16x8 positions itself, not "
                             f"{erased_block[0]}x{erased_block[1]}")
        map_height = math.ceil(height / 16)             # of the maps that TSE takes
        map_width = math.ceil(width / 16)
        h_e, w_e = scale_block(erased_block, map_height, map_width)
        blocks_to_cover_the_map = math.ceil(map_height / h_e) * math.ceil(map_width / w_e)
        erased_blocks = learners - 1                    # the most that a map can lose
        if seo and erased_blocks >= blocks_to_cover_the_map:
            raise ValueError(f"{erased_blocks} erased block(s) of {h_e}x{w_e} can cover the whole "
                             f"{map_height}x{map_width} map of {height}x{width} frames: take a "
                             "smaller block, larger frames or fewer learners")
        net = resnet50(weights)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1 = net.layer1                        # the paper's stage 1
        self.layer2 = net.layer2
        self.layer3 = net.layer3
        self.after = nn.ModuleDict()  # {stage: the TSB or Non-local block that comes after it}
        channels = {1: 256, 2: 512, 3: 1024}
        for stage in tsb:
            self.after[f"layer{stage}"] = TemporalSaliencyBoosting(channels[stage], tau=tau)
        if extra == "nl":
            self.after["layer3"] = NonLocalBlock(channels[3])
        if extra == "3d":
            for bottleneck in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
                bottleneck.conv1 = TemporalConv(bottleneck.conv1, frames)
        # Stage 4: the learners share the first two blocks, and each has its own copy of the last.
        *shared, last = net.layer4
        if extra == "dropblock":
            block_size = min(7, map_height, map_width)
            if block_size % 2 == 0:                     # DropBlock takes odd sizes
                block_size = block_size - 1
            drop = torchvision.ops.DropBlock2d(0.1, block_size)
            shared = [drop, *shared]                    # after stage 3
            last = nn.Sequential(last, drop)            # after stage 4
        self.tse = TemporalSaliencyErasing(
            nn.Sequential(*shared),
            [copy.deepcopy(last) for _ in range(learners)],
            channels=1024,
            feature_size=2048,
            erased_block=(h_e, w_e),
            block_stride=block_stride,
            seo=seo,
            scaled=scaled,
            stop_gradient=stop_gradient,
            pool=pool,
        )
        # a neck and a classifier for each learner
        self.neck = nn.ModuleList(nn.BatchNorm1d(2048) for _ in range(learners))
        self.classifier = nn.ModuleList(
            nn.Linear(2048, num_classes, bias=False) for _ in range(learners))
        for layer in self.classifier:
            nn.init.normal_(layer.weight, std=0.001)

    def forward(self, clips):
        B, T = clips.shape[:2]
        x = self.stem(clips.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        for name in ("layer1", "layer2", "layer3"):
            x = getattr(self, name)(x)
            if name in self.after:
                x = self.after[name](x.unflatten(0, (B, T))).flatten(0, 1)
        c = self.tse(x.unflatten(0, (B, T)))                              # Eq. 7: (B, L, N, 2048)
        v = c.mean(1)                                                     # TAP: v_1 ... v_N
        v = v.to(self.neck[0].weight.dtype)             # from autocast's bfloat16 to float32
        embeddings = [neck(v[:, n]) for n, neck in enumerate(self.neck)]
        if not self.training:
            # In eval mode a BatchNorm is affine, so that averaging its outputs over the clips
            # equals applying it to the v_n of the whole tracklet, which is the mean of the clips'
            # v_n. The caller averages; `finish` then normalises.
            return torch.cat(embeddings, 1)
        logits = [layer(e) for layer, e in zip(self.classifier, embeddings)]
        return torch.stack(embeddings, 1), torch.stack(logits, 1)

    def finish(self, embeddings):
        """Computes the video representation v = [v_1 / |v_1|, ..., v_N / |v_N|] of Sec. 3.3, in
        which we take the outputs of the BatchNorms for v_1 ... v_N.

        Takes the outputs of eval mode, averaged over the clips of each tracklet, (B, N * 2048).
        Returns v of the same shape, in which the part of each learner has the length 1.
        """
        v = embeddings.unflatten(1, (len(self.neck), -1))
        v = v.to(torch.promote_types(v.dtype, torch.float32))
        return F.normalize(v, dim=2).flatten(1)


# ----------------------------------------------------------------------------- Sec. 3.3: the losses

def loss_weights(args):
    """Returns the weights of the two losses of each learner, {name: weight}. The triplet loss has
    the weight 0 unless --loss is xent+tri."""
    if args.loss == "xent+tri":
        return {"xent": 1.0, "triplet": 1.0}
    return {"xent": 1.0, "triplet": 0.0}


def losses(outputs, pids, args):
    """Returns the losses of Sec. 3.3, {name: weighted scalar}. Each is summed over the learners.
    A loss whose weight is 0 is left out. Training minimises their sum.

    Args:
        outputs: the network's outputs in train mode, embeddings (B, N, 2048) and logits
            (B, N, num_classes).
        pids: the identities of the clips, (B,).
        args: the settings, of which the losses use `loss` and `margin`.
    """
    embeddings, logits = outputs
    weights = loss_weights(args)
    logits = at_least_float32(logits)
    cross_entropies = [F.cross_entropy(x, pids) for x in logits.unbind(1)]  # one for each learner
    loss_terms = {"xent": weights["xent"] * sum(cross_entropies)}
    if weights["triplet"] > 0:
        triplets = [batch_hard_triplet(x, pids, args.margin) for x in embeddings.unbind(1)]
        loss_terms["triplet"] = weights["triplet"] * sum(triplets)
    return loss_terms


# ----------------------------------------------------------------------------- Sec. 4.1: the recipe

RECIPE = {  # flag: (the paper's value, or ours; the small run's; meaning and source[, choices])
    "frames": (4, 4, "number of frames in a clip, T, a multiple of the learners (Sec. 4.1)"),
    "height": (256, 128, "height of the resized frames in pixels (Sec. 4.1)"),
    "width": (128, 64, "width of the resized frames in pixels (Sec. 4.1)"),
    "ids": (8, 4, "identities in a batch, P (Sec. 4.1: batches of 32 clips; P is our choice)"),
    "clips": (4, 2,
              "clips of each identity in a batch, K (Sec. 4.1: batches of 32 clips; K is our "
              "choice)"),
    "epoch": ("tracklets", "identities",
              "whether an epoch goes through the tracklets or shows every identity once (our "
              "choice, as in the authors' release)",
              ("tracklets", "identities")),
    "erase": (0.0, 0.0, "probability of random erasing, in the input frames (Sec. 4.1, Table 4a)"),
    "epochs": (150, 8, "number of training epochs (Sec. 4.1)"),
    "lr": (3e-4, 5e-4, "learning rate of Adam (Sec. 4.1)"),
    "lr_step": (40, 7,
                "divide the learning rate by 10 every so many epochs (Sec. 4.1)"),
    "weight_decay": (5e-4, 5e-4, "weight decay of Adam (our choice)"),
    "weights": ("imagenet", "none",
                "initial weights of ResNet-50: imagenet, none, or the path of a state_dict of "
                "torchvision's resnet50 (Sec. 3.3)"),
    "pool": ("avg", "max", "pooling of a frame's last map: average (GAP, Eq. 1-2) or maximum",
             ("avg", "max")),
    "learners": (2, 2,
                 "N, the number of learners of temporal saliency erasing (TSE) and of frames in a "
                 "segment; with 1 nothing is erased (Sec. 4.1, Table 3a)"),
    "seo": (True, True,
            "erase from a frame what the previous frames' learners attended to; --no-seo keeps the "
            "learners and erases nothing (Table 2: TSE-wo-SEO)"),
    "h_e": (3, 3,
            "height of the block that is erased from a frame's feature map, in rows of a map with "
            "16 rows; it is scaled to maps of other heights (Sec. 4.1, Table 3b)"),
    "w_e": (8, 8,
            "width of the block that is erased from a frame's feature map, in columns of a map "
            "with 8 columns; it is scaled to maps of other widths (Sec. 4.1)"),
    "s_h": (1, 1,
            "vertical stride of the sliding block: it is placed at every s_h-th row (Sec. 4.1)"),
    "s_w": (1, 1,
            "horizontal stride of the sliding block: it is placed at every s_w-th column "
            "(Sec. 4.1)"),
    "scaled": (True, True,
               "divide the correlation maps of Eq. 3 by sqrt(D), where D is the number of channels "
               "of a frame's map, so that the softmax of Eq. 5 does not saturate; --no-scaled is "
               "the paper's form (our choice, as in the authors' release)"),
    "stop_gradient": (True, True,
                      "stop the gradient of Eq. 3 at the previous frames' vectors f_k, so that it "
                      "does not reach their learners; --no-stop-gradient is the paper's form (our "
                      "choice, as in the authors' release)"),
    "tsb": ((2,), (2,),
            "stages of ResNet-50 (from 1, 2 and 3) after which a module for temporal saliency "
            "boosting (TSB) is inserted (Sec. 4.1, Table 2)"),
    "tau": (5.0, 5.0,
            "temperature of TSB's softmax: the larger it is, the more the best matches count "
            "(Eq. 6; the value is our choice)"),
    "extra": ("none", "none",
              "the alternative of Table 4 to TSE and TSB: nl (a Non-local block after stage 3), "
              "dropblock (after stages 3 and 4), 3d (3x1x1 convolutions in all residual blocks) or "
              "none",
              ("none", "nl", "dropblock", "3d")),
    "loss": ("xent+tri", "xent+tri",
             "objective: cross entropy, alone (xent) or with the triplet loss (xent+tri) "
             "(Sec. 3.3)",
             ("xent", "xent+tri")),
    "margin": (0.4, 0.4,
               "margin of the triplet loss, whose distance is the cosine distance (our choice)"),
}
SAMPLER = PKSampler            # a batch: K clips of each of P identities
SAMPLE = functools.partial(sample_strided, stride=8)  # a training clip: T frames, 8 apart
SPLIT = split_consecutive      # the test: all frames, in clips of T consecutive frames
METRIC = "cosine"              # the test: distance between the vectors v that TCLNet.finish gives

ROWS = {
    # The Row of a variant has its place and name in the paper, the settings that define it (even
    # where RECIPE has the same values), and the paper's (mAP, rank-1) and costs. same="NAME" says
    # that the variant is the same as the variant NAME. All other settings are as in RECIPE.

    # Tables 1 and 2: the whole network and its components. Only the variant tclnet has the triplet
    # loss. All others, also those of Tables 3 and 4, have the cross entropy alone (Sec. 4.3).
    "tclnet": Row(
        "Table 1: TCLNet-tri, with triplet loss",
        learners=2, seo=True, tsb=(2,), loss="xent+tri",
        mars=(85.1, 89.8), duke=(96.2, 96.9), ilids=(None, 86.6),
        gflops_of_4_frames=16.259, million_parameters=29.9,
    ),
    "tclnet-xent": Row(
        "Tables 1, 2, 4b: TCLNet (TSE+TSB)",
        learners=2, seo=True, tsb=(2,), loss="xent",
        mars=(83.0, 88.8), duke=(95.2, 96.3), ilids=(None, 84.3),
        gflops_of_4_frames=16.259, million_parameters=29.9,
    ),
    "base": Row(
        "Tables 2-4: base.",
        learners=1, tsb=(), loss="xent",
        mars=(79.6, 86.8), gflops_of_4_frames=16.246, million_parameters=23.5,
    ),
    "base+tse-wo-seo": Row(
        "Table 2: base.+TSE-wo-SEO",
        learners=2, seo=False, tsb=(), loss="xent",
        mars=(80.9, 87.2), gflops_of_4_frames=16.246, million_parameters=27.9,
    ),
    "base+tse": Row(
        "Tables 2-4: base.+TSE",
        learners=2, seo=True, tsb=(), loss="xent",
        mars=(82.5, 88.2), gflops_of_4_frames=16.251, million_parameters=29.9,
    ),
    "base+tsb": Row(
        "Tables 2, 4b: base.+TSB",
        learners=1, tsb=(2,), loss="xent",
        mars=(82.3, 87.6), gflops_of_4_frames=16.254, million_parameters=23.5,
    ),
    "tclnet-tsb1": Row(
        "Table 2: TCLNet (TSE+TSB-stage1)",
        learners=2, seo=True, tsb=(1,), loss="xent",
        mars=(82.2, 87.4), gflops_of_4_frames=16.267, million_parameters=29.9,
    ),
    "tclnet-tsb2": Row(
        "Table 2: TCLNet (TSE+TSB-stage2)",
        same="tclnet-xent",
    ),
    "tclnet-tsb3": Row(
        "Table 2: TCLNet (TSE+TSB-stage3)",
        learners=2, seo=True, tsb=(3,), loss="xent",
        mars=(82.6, 88.2), gflops_of_4_frames=16.255, million_parameters=29.9,
    ),
    "tclnet-tsb23": Row(
        "Table 2: TCLNet (TSE+TSB-stage23)",
        learners=2, seo=True, tsb=(2, 3), loss="xent",
        mars=(82.7, 88.2), gflops_of_4_frames=16.263, million_parameters=29.9,
    ),

    # Table 3a: number N of learners
    "base+tse-n1": Row(
        "Table 3a: 1 learner (base.)",
        same="base",
    ),
    "base+tse-n2": Row(
        "Table 3a: N = 2 learners",
        same="base+tse",
    ),
    "base+tse-n3": Row(
        "Table 3a: N = 3 learners",
        learners=3, seo=True, frames=3, tsb=(), loss="xent",
        mars=(82.4, 88.4), gflops_of_4_frames=16.252, million_parameters=34.5,
    ),
    "base+tse-n4": Row(
        "Table 3a: N = 4 learners",
        learners=4, seo=True, frames=4, tsb=(), loss="xent",
        mars=(81.0, 87.0), gflops_of_4_frames=16.253, million_parameters=38.9,
    ),

    # Table 3b: height h_e of the erased block; 3 is the default
    "base+tse-he2": Row(
        "Table 3b: erased height h_e = 2",
        learners=2, seo=True, h_e=2, tsb=(), loss="xent",
        mars=(81.8, 87.2),
    ),
    "base+tse-he3": Row(
        "Table 3b: erased height h_e = 3",
        same="base+tse",
    ),
    "base+tse-he4": Row(
        "Table 3b: erased height h_e = 4",
        learners=2, seo=True, h_e=4, tsb=(), loss="xent",
        mars=(82.0, 87.4),
    ),
    "base+tse-he5": Row(
        "Table 3b: erased height h_e = 5",
        learners=2, seo=True, h_e=5, tsb=(), loss="xent",
        mars=(81.7, 87.2),
    ),

    # Table 4: TSE and other ways to erase (a), TSB and other ways to propagate features (b)
    "base+dropblock": Row(
        "Table 4a: base.+DropBlock",
        learners=1, tsb=(), extra="dropblock", loss="xent",
        mars=(79.8, 86.9),
    ),
    "base+re": Row(
        "Table 4a: base.+RE, random erasing",
        learners=1, tsb=(), erase=0.5, loss="xent",
        mars=(81.5, 86.6),
    ),
    "base+tse+re": Row(
        "Table 4a: base.+TSE+RE",
        learners=2, seo=True, tsb=(), erase=0.5, loss="xent",
        mars=(82.9, 88.1),
    ),
    "base+3d": Row(
        "Table 4b: base.+3D",
        learners=1, tsb=(), extra="3d", loss="xent",
        mars=(80.0, 86.1), gflops_of_4_frames=22.756, million_parameters=33.7,
    ),
    "base+nl": Row(
        "Table 4b: base.+NL, Non-local",
        learners=1, tsb=(), extra="nl", loss="xent",
        mars=(82.4, 87.6), gflops_of_4_frames=21.615, million_parameters=25.6,
    ),
    "base+tse+nl": Row(
        "Table 4b: base.+TSE+NL",
        learners=2, seo=True, tsb=(), extra="nl", loss="xent",
        mars=(82.6, 87.6), gflops_of_4_frames=21.619, million_parameters=32.1,
    ),
}
RELEASE = None                 # the authors offer no trained weights


def build(args, num_classes):
    """Builds the network for the settings `args`.

    With --resume the weights come from the checkpoint, so that none are loaded here.
    """
    weights = args.weights
    if args.resume:
        weights = "none"
    return TCLNet(
        num_classes,
        frames=args.frames,
        height=args.height,
        width=args.width,
        learners=args.learners,
        seo=args.seo,
        erased_block=(args.h_e, args.w_e),
        block_stride=(args.s_h, args.s_w),
        scaled=args.scaled,
        stop_gradient=args.stop_gradient,
        tsb=args.tsb,
        tau=args.tau,
        extra=args.extra,
        pool=args.pool,
        weights=weights,
    )


def make_optimizer(model, args):
    """Sec. 4.1: Adam; its weight decay is our choice."""
    return torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                            fused=True)


# ---------------------------------------------------------------------------------------- training

def train(args):  # same in every script
    """Trains the network, tests it (--evaluate) or draws it (--figure); returns the last result."""
    if args.plan:
        return plan(args, recipe=RECIPE, sampler=SAMPLER, split=SPLIT, metric=METRIC, build=build,
                    loss_weights=loss_weights)
    run = Run(args)                                     # device, processes, folder, checkpoint
    with run.setting_up():                              # one process creates or downloads first
        dataset = load_dataset(args.data, args.root, split=int(args.split), chunk=args.chunk,
                               training=not args.evaluate)
        print(dataset.summary())
        model = build(args, run.num_classes(dataset))
    model = run.prepare(model)                          # to the device, with the saved weights
    if args.figure:
        return figures(run, model, dataset, split=SPLIT, metric=METRIC, picture=picture, load=load)
    if args.evaluate:
        return run.test(model, dataset, SPLIT, METRIC)
    optimizer = make_optimizer(model, args)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_step, gamma=0.1)
    loader = run.loader(dataset.train, SAMPLER, SAMPLE)
    # After --resume this restores all three; under torchrun `network` is wrapped for several GPUs.
    network = run.start(model=model, optimizer=optimizer, scheduler=scheduler)
    if run.evaluates_first:
        run.test(model, dataset, SPLIT, METRIC)         # of the untrained network
    for epoch in run.epochs():
        model.train()
        for clips, pids in run.batches(loader, epoch):  # a signal saves a checkpoint and exits
            with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
                outputs = network(normalize(clips))
            parts = losses(gather(outputs), gather(pids), args)  # clips of all processes
            optimizer.zero_grad()
            run.backward(sum(parts.values()))
            optimizer.step()
            run.log(parts)
        if run.test_is_due(epoch):
            run.test(model, dataset, SPLIT, METRIC)
        scheduler.step()
    return run.finish()


def load(file, **settings):  # same in every script
    """Loads the network of a checkpoint, a run's last.pt, in eval mode on the CPU.

    Its attribute `args` has its settings. A checkpoint of an earlier version may lack settings of
    the recipe, which are then given here: load(file, pool="avg").
    """
    return load_network(file, build, settings, recipe=RECIPE, rows=ROWS, release=RELEASE,
                        script=__file__)


def main():  # same in every script
    """Does what the command line asks for."""
    run_script(train, build, recipe=RECIPE, rows=ROWS, release=RELEASE, text=__doc__,
               script=__file__)


# ------------------------------------------------------------------------------------- the picture

def picture(model, clips, frames):
    """Prepares what --figure draws: maps over the frames of a clip, like Fig. 2, 3 (b) and 5.

    For each frame it draws the map of the frame's learner and, from the second learner on, the
    correlation R and the erased block. For each TSB it draws A with the first frame as the query.

    Takes the network, a clip (1, T, 3, H, W), normalised, and its frames (T, 3, H, W), uint8.
    Returns a title and {label: row of the picture}.
    """
    learners = model.tse.learners
    N = len(learners)

    def in_order_of_frames(maps):
        """Takes for each learner a tensor or list with one map for each segment, and returns a
        list of the maps of all frames in temporal order."""
        in_order = []
        for segment in range(len(maps[0])):
            for maps_of_learner in maps:
                in_order.append(maps_of_learner[segment])
        return in_order

    learner_maps = []
    for calls in watch(model, clips, *learners):
        _, output = calls[0]                            # (segments, 2048, h, w)
        learner_maps.append(output)
    maps = torch.stack(in_order_of_frames(learner_maps))
    if len(frames) == 1:                                # the image, once for each learner
        frames = frames.expand(N, -1, -1, -1)
    captions = [f"learner {n % N + 1}" for n in range(len(maps))]
    label = "map of the frame's learner, divided by its mean"
    rows = {label: overlays(frames, energy(maps), captions)}
    if model.tse.seo is not None:
        # Nothing is erased for the first learner, so its frames have no correlation maps.
        first_learner_maps = [None] * (len(maps) // N)
        correlations = [first_learner_maps]
        erased = [first_learner_maps]
        seo = model.tse.seo
        r_calls, b_calls = watch(model, clips, seo.correlation, seo.binarization)
        for r_call, b_call in zip(r_calls, b_calls):    # one call for each further learner
            _, r = r_call                               # (inputs, output)
            _, b = b_call
            correlations.append(r.mean(1))              # over the previous frames
            erased.append(1 - b.prod(1))                # 1 - B_n
        rows["similarity to what the previous learners attend to"] = overlays(
            frames, in_order_of_frames(correlations))
        rows["block that is erased from the frame"] = overlays(frames, in_order_of_frames(erased))
    for stage, tsb in model.after.items():
        if not isinstance(tsb, TemporalSaliencyBoosting):
            continue
        calls = watch(model, clips, tsb)[0]
        inputs, _ = calls[0]
        x = inputs[0]                                   # the maps that TSB was given
        T, _, h, w = x.shape[1:]
        query, memory = query_and_memory(x)
        a = probability_map(query, memory, tau=tsb.tau)
        maps_of_first_query = a[0, 0].view(T, h, w)     # the first frame is the query
        drawn_maps = [None]                             # the query is not in its own memory
        drawn_maps.extend(maps_of_first_query[1:])
        label = f"TSB after {stage}: similarity to frame 1, the query"
        rows[label] = overlays(frames, drawn_maps)
    return "TCLNet: what the learners see", rows


if __name__ == "__main__":  # same in every script
    command_line(main)
