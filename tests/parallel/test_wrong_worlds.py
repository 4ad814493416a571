"""Worlds that get one thing wrong, as others have, must fail the contract of worlds."""

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch.parallel import context, gather, ring, runs
from dilated_attention_pytorch.parallel.layouts import Layout
from dilated_attention_pytorch.problem import Problem, Run
from parallel.transports import StrictTransport, strict_transport
from parallel.world_contract import MOST_GROWTH, Trial, ask, attempt, cases, errors, half_type_errors
from parallel.worlds import run_world


def is_own(problem: Problem) -> bool:
    return problem.query_positions == problem.key_positions


def around(module, name, change):
    """``change(real, *arguments)`` instead of a function of a module."""
    real = getattr(module, name)
    return mock.patch.object(module, name, lambda *arguments, **options: change(real, *arguments, **options))


def mean(real, out, lse, part_out, part_lse):
    both = (lse > -torch.inf) & (part_lse > -torch.inf)
    out.copy_(
        torch.where(
            both[..., None], (out + part_out) / 2, torch.where(lse[..., None] > part_lse[..., None], out, part_out)
        )
    )
    lse.copy_(torch.logaddexp(lse, part_lse))


def own_denominator(real, problem, pattern, dout, dlse, out, lse, backend):
    own_out, own_lse = runs.partial_forward(problem, pattern, backend)
    return real(problem, pattern, dout, dlse, own_out, own_lse, backend)


def without_own_keys(real, problem, pattern, backend):
    out, lse = real(problem, pattern, backend)
    return (torch.zeros_like(out), torch.full_like(lse, -torch.inf)) if is_own(problem) else (out, lse)


def in_half(real, *arguments):
    out, lse = real(*arguments)
    return out.bfloat16().to(out), lse


def gradients_in_half(real, *arguments):
    grads = real(*arguments)
    return type(grads)(*(x.bfloat16().to(x) for x in (grads.q, grads.k, grads.v)))


def padding_of_others_seen(real, problem, *rest):
    return real(problem if is_own(problem) else replace(problem, key_lengths=None), *rest)


def mask_repeated_on_every_hop(real, problem, *rest):
    first = problem.query_positions[0].start
    return real(replace(problem, key_positions=(Run(first, 1, problem.key_length),)), *rest)


def lse_gradient_dropped(real, problem, pattern, dout, dlse, *rest):
    return real(problem, pattern, dout, None, *rest)


def steps_left_out(real, problem, *rest):
    out, lse = real(problem, *rest)
    return (out, lse) if is_own(problem) else (torch.zeros_like(out), torch.full_like(lse, -torch.inf))


def own_padding_only(real, group, mask, positions):
    real(group, mask, positions)
    return tuple((~mask).sum(1).tolist())


class Tampered(StrictTransport):
    """Changes the message of one number on its way."""

    def __init__(self, number, change):
        super().__init__()
        self.number, self.change = number, change

    def _sent(self, tensor):
        copy = super()._sent(tensor)
        if self.messages == self.number and copy.numel():
            copy.copy_(self.change(copy.clone()))
        return copy


def second_half_twice(x):
    return x.view(2, -1)[[1, 1]].view_as(x)


FULL = Trial("full")
CAUSAL = Trial("causal", "zigzag")
# By name: what makes the world wrong, and a trial that must notice. Of two ranks the messages of a trial are: keys and
# values forward, again backward, gradients; a gather sends nothing again.
WRONG = {
    "mean for merge, ring": (lambda: around(ring, "merge_into", mean), FULL),
    "mean for merge, runs": (lambda: around(runs, "merge_into", mean), Trial("dropout_full", "zigzag")),
    "mean for merge, gather": (lambda: around(gather, "merge_into", mean), Trial("longnet", method="gather")),
    "own denominator, ring": (lambda: around(ring, "partial_backward", own_denominator), FULL),
    "own denominator, gather": (
        lambda: around(gather, "partial_backward", own_denominator),
        Trial("longnet", method="gather"),
    ),
    "own keys dropped": (lambda: around(ring, "partial_forward", without_own_keys), CAUSAL),
    "partial results in half": (lambda: around(ring, "partial_forward", in_half), FULL),
    "padding of others seen": (lambda: around(ring, "partial_forward", padding_of_others_seen), Trial("padded")),
    "mask repeated": (lambda: around(ring, "partial_forward", mask_repeated_on_every_hop), CAUSAL),
    "lse gradient dropped": (lambda: around(ring, "partial_backward", lse_gradient_dropped), FULL),
    "steps left out": (lambda: around(ring, "partial_forward", steps_left_out), FULL),
    "padding counted on one rank": (lambda: around(context, "agree_on_padding", own_padding_only), Trial("padded")),
    "chunks of a zigzag off by one": (
        lambda: around(Layout, "_chunk", lambda real, self, n, chunks: real(self, (n + 1) % chunks, chunks)),
        CAUSAL,
    ),
    "gradients of a hop lost": (lambda: Tampered(3, torch.zeros_like), FULL),
    "values over keys": (lambda: Tampered(1, second_half_twice), FULL),
    "values over keys backward": (lambda: Tampered(2, second_half_twice), FULL),
    "gathered rows off by one": (lambda: Tampered(1, lambda x: x.roll(1, 0)), Trial("longnet", method="gather")),
    "gathered gradients off by one": (lambda: Tampered(2, lambda x: x.roll(1, 0)), Trial("longnet", method="gather")),
    "heads off by one": (lambda: Tampered(1, lambda x: x.roll(1, 0)), Trial("longnet", method="all_to_all")),
}


def _found_wrong(problems):
    """In each rank: the largest error of a right world, then of every wrong one."""
    largest = []
    for change, trial in [(nullcontext, FULL), *WRONG.values()]:
        wrong = change()
        tampered = wrong if isinstance(wrong, Tampered) else None
        with strict_transport(tampered), nullcontext() if tampered else wrong:
            found = attempt(problems[trial.case], trial)
            assert not isinstance(found, str), found
            told = errors(problems[trial.case], trial.layout, found)
            largest.append(max(float("inf") if error != error else error for error in told.values()))
    return largest


def test_every_wrong_world_is_noticed():
    problems = {
        name: ask(replace(cases()[name], query_length=48, visible=visible))
        for name, visible in {
            **dict.fromkeys(("full", "causal", "longnet", "dropout_full")),
            "padded": (48, 20),
        }.items()
    }
    right, *wrong = map(max, zip(*run_world(2, _found_wrong, problems)))
    assert right < 1e-12
    assert {name: error for name, error in zip(WRONG, wrong, strict=True) if error < 1e-6} == {}


def test_rounded_partial_results_are_noticed_in_half_types():
    (right,) = half_type_errors(1, "ring")
    for name, change in (("partial_forward", in_half), ("partial_backward", gradients_in_half)):
        with around(ring, name, change):
            (wrong,) = half_type_errors(3, "ring")
        assert any(wrong[x] > MOST_GROWTH * right[x] for x in ("out", "dq", "dk", "dv")), name


def _overwrites(early):
    """Two ranks exchange a number; one that writes into its message while it is under way is told so."""
    peer = 1 - dist.get_rank()
    with strict_transport() as transport:
        sent, received = torch.ones(3), torch.zeros(3)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)])
        assert bool(received.isnan().all())
        if early:
            sent.fill_(2)
        for work in works:
            work.wait()
        if not early:
            sent.fill_(2)
        assert received.tolist() == [1, 1, 1]
        if not early:
            transport.check("late")
            return
        with pytest.raises(AssertionError, match="written to while it was under way"):
            transport.check("early")


@pytest.mark.parametrize("early", [True, False])
def test_the_strict_transport_notices_a_message_that_is_written_to(early):
    run_world(2, _overwrites, early)
