"""DistributedDataParallel between real processes, against the same micro-batches in one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msam
from msam.reference import msam_gradient
from tests.msam.ddp_worker import IGNORED, RHO
from tests.msam.small import convnet, data, loss_of, mlp, pure_loss

WORLD = 2
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank saw in each scenario of ddp_worker.py."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.msam.ddp_worker"]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in range(WORLD)
    ]
    said = [worker.communicate(timeout=240)[0].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORLD, "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def of_one_process(parts, rho=RHO, weights=None):
    model = mlp()
    w = {name: p.detach() for name, p in model.named_parameters()}
    return msam_gradient(pure_loss(model), w, parts, weights or [len(p[1]) for p in parts], rho)


def check(ranks, scenario, expected):
    for seen in ranks:
        torch.testing.assert_close(seen[scenario]["grad"], expected, rtol=1e-12, atol=1e-14)
    first, second = (seen[scenario]["grad"] for seen in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scenario", ["equal", "bucket_views", "find_unused", "in_one_pass"])
def test_two_ranks_with_half_the_micro_batches_are_one_rank_with_all(ranks, scenario):
    check(ranks, scenario, of_one_process(msam.split(data(16, 5), 4)))


@pytest.mark.parametrize("scenario", ["equal", "bucket_views", "find_unused", "in_one_pass"])
def test_each_parameter_is_sent_once_and_in_the_last_backward_only(ranks, scenario):
    parameters = sum(p.numel() for p in mlp().parameters())
    for seen in ranks:
        assert sum(seen[scenario]["sent"]) == parameters
        assert len(seen[scenario]["sent"]) > 1, "in several buckets, so that sending overlaps the backward pass"
        passes = 2 if scenario == "in_one_pass" else 4
        assert seen[scenario]["before_pass"] == [0] * passes, "nothing was sent before the last pass"


def test_one_micro_batch_on_each_rank(ranks):
    check(ranks, "one_micro_batch", of_one_process(msam.split(data(16, 5), 2)))


def test_rho_zero_is_the_plain_gradient_over_all_examples(ranks):
    model, batch = mlp(), data(16, 5)
    loss_of(model)(batch).backward()
    check(ranks, "control", {name: p.grad for name, p in model.named_parameters()})


def test_ranks_count_by_their_examples(ranks):
    x, y = data(9, 5)
    check(ranks, "uneven", of_one_process(list(zip(x.split([3, 3, 2, 1]), y.split([3, 3, 2, 1]), strict=True))))


def test_weights_are_summed_over_the_ranks(ranks):
    x, y = data(12, 5)
    y[[0, 4]] = IGNORED
    parts = [(a[b != IGNORED], b[b != IGNORED]) for a, b in zip(x[:9].split(3), y[:9].split(3), strict=True)]
    check(ranks, "counted", of_one_process(parts))


def test_unused_parameters_and_a_last_micro_batch_of_weight_0(ranks):
    torch.manual_seed(0)  # the model of the scenario
    x, y = data(12, 5)
    parts = list(zip(x[:9].split(3), y[:9].split(3), strict=True))
    check(ranks, "unused_and_empty", of_one_process(parts))


@pytest.mark.parametrize("scenario", ["rolled_back", "rolled_back_bucket_views"])
def test_an_exception_in_the_last_backward_pass_leaves_everything_as_it_was(ranks, scenario):
    assert [seen[scenario] for seen in ranks] == [{"raised": True, "kept": True, "same": True}] * WORLD


def test_accumulation_under_no_sync_is_reduced_by_the_call_after_it(ranks):
    first, second = (of_one_process(msam.split(data(8, 5, seed=seed), 4)) for seed in (1, 2))
    check(ranks, "accumulated", {name: first[name] + second[name] for name in first})
    assert all(seen["accumulated"]["same_tensors"] for seen in ranks)
    a, b = (seen["accumulated"]["alone"] for seen in ranks)
    assert not torch.equal(a["0.weight"], b["0.weight"]), "under no_sync nothing was reduced"


def test_replicas_are_equal_to_the_bit_after_50_steps(ranks):
    first, second = (seen["drift"]["weights"] for seen in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.weight"], convnet().float()[0].weight), "and they have moved"


def test_running_statistics_are_each_ranks_own_until_rank_0_sends_its(ranks):
    first, second = (seen["buffers"] for seen in ranks)
    assert first["own"]
    assert second["own"]
    assert not torch.equal(first["after_step"], second["after_step"])
    assert torch.equal(second["after_next_forward"], first["after_step"])


def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_all(ranks):
    for seen in ranks:
        assert not all(seen["not_finite"]["finite"])
        assert seen["not_finite"]["kept"]
    assert ranks[0]["not_finite"]["finite"] == ranks[1]["not_finite"]["finite"]


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("bare_module", "call the wrapped model in loss_fn"),
        ("sync_batchnorm", "use BatchNorm"),
        ("sync_batchnorm_inside", "use BatchNorm"),
        ("static_graph", "leave static_graph out"),
        ("joined", "leave join() out"),
        ("fsdp2", "use DistributedDataParallel"),
    ],
)
def test_refusals(ranks, scenario, words):
    for seen in ranks:
        assert words in (seen[scenario]["said"] or "")


def shared_by_rank(groups, counts=None):
    """Of 7 examples in 3 micro-batches and 5 in 2; or of valid ones."""
    x, y = data(12, 5)
    if counts:
        y[7:10] = IGNORED
        parts = [*msam.split((x[:7], y[:7]), 2), *msam.split((x[7:], y[7:]), 2)]
        kept = [part[1] != IGNORED for part in parts]
        parts = [(part[0][k], part[1][k]) for part, k in zip(parts, kept, strict=True) if k.any()]
    else:
        parts = [*msam.split((x[:7], y[:7]), 3), *msam.split((x[7:], y[7:]), 2)]
    model = mlp()
    w = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [len(part[1]) for part in parts]
    return msam_gradient(pure_loss(model), w, parts, sizes, RHO, groups=groups or [range(len(parts))])


def test_one_perturbation_for_each_rank_or_for_all(ranks):
    check(ranks, "shared", shared_by_rank([[0, 1, 2], [3, 4]]))
    check(ranks, "shared_over_ranks", shared_by_rank(None))
    check(ranks, "shared_over_ranks_in_views", shared_by_rank(None))
    check(ranks, "shared_counts_over_ranks", shared_by_rank(None, counts=True))
    norms = [seen["shared_over_ranks"]["norms"] for seen in ranks]
    assert torch.equal(*norms)
    assert not torch.equal(*[seen["shared"]["norms"] for seen in ranks])


def test_refuses_engines_by_name():
    class DeepSpeedEngine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = mlp()

    model = DeepSpeedEngine()
    with pytest.raises(NotImplementedError, match="DeepSpeedEngine"):
        msam.backward(lambda part: F.cross_entropy(model.module(part[0]), part[1]), data(4, 5), model, rho=0.1)


# msam.loss

REDUCED_ONCE = ["loss_equal", "loss_bucket_views", "loss_find_unused", "loss_inside", "loss_inside_find_unused"]


@pytest.mark.parametrize("scenario", REDUCED_ONCE)
def test_a_loss_is_reduced_once_and_in_its_backward(ranks, scenario):
    """By the user's wrapper, or from within its forward pass as in Lightning."""
    check(ranks, scenario, of_one_process(msam.split(data(16, 5), 4)))
    parameters = sum(p.numel() for p in mlp().parameters())
    for seen in ranks:
        assert seen[scenario]["before_backward"] == []
        assert sum(seen[scenario]["sent"]) == parameters


def test_a_loss_of_a_compiled_wrapper(ranks):
    check(ranks, "loss_compiled", of_one_process(msam.split(data(16, 5), 4)))


def test_a_loss_is_averaged_over_ranks_as_in_plain_training(ranks):
    x, y = data(9, 5)
    parts = [list(zip(x[a:b].split(size), y[a:b].split(size), strict=True)) for a, b, size in ((0, 6, 3), (6, 9, 2))]
    first, second = (of_one_process(part) for part in parts)
    check(ranks, "loss_uneven", {name: first[name] + second[name] for name in first})  # times 2


def test_losses_accumulate_under_no_sync(ranks):
    each = [of_one_process(msam.split(data(8, 5, seed=seed), 4)) for seed in (1, 2, 3)]
    check(ranks, "loss_accumulated", {name: sum(g[name] for g in each) / 3 for name in each[0]})
    a, b = (seen["loss_accumulated"]["alone"] for seen in ranks)
    assert not torch.equal(a["0.weight"], b["0.weight"]), "under no_sync nothing was reduced"


def test_a_loss_that_leaves_a_layer_out(ranks):
    check(ranks, "loss_spare", of_one_process(msam.split(data(16, 5), 4)))


def test_replicas_that_use_losses_stay_equal_to_the_bit(ranks):
    first, second = (seen["loss_drift"]["state"] for seen in ranks)
    running = ("running_mean", "running_var")
    assert all(torch.equal(first[name], second[name]) for name in first if not name.endswith(running))
