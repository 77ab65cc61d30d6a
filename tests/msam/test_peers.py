"""A second oracle: the SAM of pytorch_optimizer, for one micro-batch."""

import pytest
import torch

import msam
from tests.msam.small import data, loss_of, mlp


@pytest.mark.needs("pytorch_optimizer")
@pytest.mark.parametrize("adaptive", [False, True])
def test_twenty_steps_of_sgd_with_momentum(adaptive):
    from pytorch_optimizer import SAM

    ours, theirs = mlp(), mlp()
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = torch.optim.SGD(ours.parameters(), **settings)
    peer = SAM(theirs.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, perturb_eps=1e-12, **settings)
    for step in range(20):
        batch = data(8, 5, seed=step)
        optimizer.zero_grad()
        msam.backward(loss_of(ours), batch, ours, rho=0.2, adaptive=adaptive)
        optimizer.step()
        loss_of(theirs)(batch).backward()
        peer.first_step(zero_grad=True)
        loss_of(theirs)(batch).backward()
        peer.second_step(zero_grad=True)
    found, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # whose norm is taken in float32


@pytest.mark.needs("pytorch_optimizer")
def test_a_closure_without_the_backward_pass_before_it_is_plain_training():
    """What docs/migration.md says of that style; `msam.backward` has no such pass to forget."""
    from pytorch_optimizer import SAM

    plain, theirs, batch = mlp(), mlp(), data(8, 5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    peer = SAM(theirs.parameters(), torch.optim.SGD, rho=0.2, lr=0.1)

    def closure():
        peer.zero_grad()
        loss = loss_of(theirs)(batch)
        loss.backward()
        return loss

    peer.step(closure)
    loss_of(plain)(batch).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), theirs.parameters(), strict=True))
