"""What each of several processes does for test_processes.py; by hand:

    torchrun --nproc_per_node N tests/processes.py DATA OUT

The first one writes to OUT what `evaluation` gives and, for two processes, the gradients of every
script.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import bicnet_tks, m3d, sinet, strf, tclnet  # noqa: E401
from common import (
    Run,
    evaluate,
    extract,
    gather,
    parse_args,
    pick_device,
    process_rank,
    world_size,
)
from data import load_dataset

PIDS = torch.tensor([0, 0, 1, 1])
SIZES = {bicnet_tks: (4, 32), m3d: (4, 32), sinet: (4, 48), strf: (2, 32), tclnet: (2, 32)}


def evaluation(root):
    """The result of an all-frames evaluation, and the features. BatchNorm's statistics differ, as
    after a training on CPUs."""
    dataset = load_dataset("synthetic", root)
    torch.manual_seed(0)
    model = sinet.SINet(6, 4, 48, 40)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += process_rank()
    options = dict(split_clips=sinet.SPLIT, clip_length=4, size=(48, 40), batch_size=3)
    return {
        "result": evaluate(model, dataset, **options),
        "features": extract(model, dataset.query, **options),
    }


def gradients(script):
    """{name: (alone, together)}: of the whole batch's gradient up to 1,000 numbers, its norm and
    its sum; once in the first process alone, once with each process on its identities. BatchNorm in
    eval mode, float64, nothing zero-initialised."""
    frames, width = SIZES[script]
    flags = f"--height 64 --width {width} --frames {frames} --gpu cpu --output nowhere"
    sys.argv = [script.__name__ + ".py", *flags.split()]
    run = Run(parse_args(script.RECIPE, script.ROWS, script.__doc__, script.__file__))
    torch.manual_seed(0)
    model = script.build(run.args, 2).double().train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    clips = torch.randn(4, frames, 3, 64, width, dtype=torch.float64)

    def summary():
        return [
            torch.cat([p.grad.flatten()[:1000], p.grad.norm()[None], p.grad.sum()[None]])
            for p in model.parameters()
        ]

    alone = []
    if process_rank() == 0:
        sum(script.losses(model(clips), PIDS, run.args).values()).backward()
        alone = summary()
        model.zero_grad()
    torch.distributed.barrier()
    network = torch.nn.parallel.DistributedDataParallel(model)
    mine = PIDS % world_size() == process_rank()
    outputs, pids = gather(network(clips[mine])), gather(PIDS[mine])
    run.backward(sum(script.losses(outputs, pids, run.args).values()))
    return {name: pair for (name, _), *pair in zip(model.named_parameters(), alone, summary())}


if __name__ == "__main__":
    pick_device("cpu")
    torch.set_num_threads(1)
    state = evaluation(sys.argv[1])
    out, to_float = sys.argv[2], torch.Tensor.float
    if world_size() == 2:
        torch.Tensor.float = lambda x: (
            x if x.dtype == torch.float64 else to_float(x)
        )  # the losses, too, in float64
        state |= {
            script.__name__: gradients(script) for script in (bicnet_tks, m3d, sinet, strf, tclnet)
        }
    if process_rank() == 0:
        torch.save(state, out)
    torch.distributed.barrier()
    os._exit(0)
