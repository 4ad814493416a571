"""Runs of the byte reader by several forked ranks, joined as torchrun's processes are."""

import os
import socket
from datetime import timedelta

import torch
import torch._dynamo  # fully_shard wants it: read here once, not in every forked rank
import torch.distributed as dist
from byte_reader import Reader

from dilated_attention_pytorch.training.faults import together
from dilated_attention_pytorch.training.loop import train
from dilated_attention_pytorch.training.ranks import form_ranks
from dilated_attention_pytorch.training.run import Run


def losses(run):
    return [line["bits_per_byte"] for line in run.read_metrics()]


def calm_reader():
    """A reader without dropout, whose numbers do not depend on the number of ranks."""
    torch.manual_seed(5)
    reader = Reader()
    reader.dropout.p = 0.0
    return reader


def dropping_reader():
    torch.manual_seed(5)
    return Reader()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def rank_trains(path, port, build=calm_reader, on_step=lambda step: None, last=None, timeout=20.0):
    """One rank's part of the run in `path`, up to step `last`; for `run_world`. Gives the steps done."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    done = []

    def work():
        run = Run.open(path)
        ranks = form_ranks(run.settings, timedelta(seconds=timeout))

        def note(step):
            done.append(step.step)
            on_step(step)

        return train(build(), run, note, lambda: last is not None and done[-1:] == [last], ranks)

    return together("cpu", timedelta(seconds=timeout), work)
