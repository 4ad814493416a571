"""A language model trained with FSDP2 and context parallelism on one mesh: sharded weights, sharded sequences.

The mesh has two dims: over "data" each row of ranks reads other texts, over "context" the ranks of a row share each
text. Weights, gradients and the optimizer's state are sharded over all ranks. The printed loss is that of the whole
batch, and the same (up to rounding) however many ranks there are.

Run: torchrun --standalone --nproc-per-node 4 examples/context_parallel_lm.py --context 2
     python examples/context_parallel_lm.py      (one process)
"""

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.nn import set_context_parallel
from dilated_attention_pytorch.parallel import ContextParallel

BATCH, LENGTH = 4, 255  # sequences, and bytes to predict in each: a number that no world divides


def batches(steps: int) -> Tensor:
    """Bytes (steps, BATCH, LENGTH + 1) of a module of Python's standard library, the same on every rank."""
    text = torch.frombuffer(bytearray(Path(json.decoder.__file__).read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - LENGTH - 1, (steps, BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]


def main(steps: int = 20, context: int = 1) -> list[float]:
    """Train, and return the loss of each step in nats per byte."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // context, context), mesh_dim_names=("data", "context"))
    everyone = init_device_mesh("cpu", (world,))
    shared = ContextParallel(mesh=mesh["context"], layout="zigzag")

    torch.manual_seed(0)  # the same weights everywhere, before each rank keeps its share
    model = LongNetLM(
        256, 64, 4, num_decoder_layers=2, dim_feedforward=128, segment_lengths=[64, 256], dilation_rates=[1, 2]
    )
    set_context_parallel(model, shared)
    for block in model.decoder.layers:
        fully_shard(block, mesh=everyone)
    fully_shard(model, mesh=everyone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    losses = []
    for step, batch in enumerate(batches(steps)):
        own = batch.chunk(world // context)[mesh.get_local_rank("data")]
        tokens, labels = shared.shard(own[:, :-1]), shared.shard(own[:, 1:])
        total = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
        share = total / (BATCH * LENGTH)  # shards differ in length: divide by the count of all tokens
        (share * world).backward()  # FSDP2 takes the mean over ranks; the sum is wanted
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = share.detach()
        dist.all_reduce(loss)
        losses.append(float(loss))
        if dist.get_rank() == 0 and (step % 5 == 0 or step == steps - 1):
            print(f"step {step:3d}  loss {losses[-1]:.4f}  ({world} ranks, {context} to a sequence)")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="LongNetLM with FSDP2 and context parallelism")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--context", type=int, default=1, help="ranks that share a sequence; divides the world")
    options = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main(options.steps, options.context)
    dist.destroy_process_group()
