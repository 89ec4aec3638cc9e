"""The loss of flow heads: its velocities are the sampler's, and the sampler then does what was taught."""

from __future__ import annotations

import pytest
import torch

from sqap.models import VLA
from sqap.models.heads import FlowHead
from sqap.models.heads.flow_loss import draw_times, flow_loss
from sqap.models.heads.velocity import FlowInputs
from tests.families import family_config, random_inputs, random_model

CPU = torch.device("cpu")


def head_inputs(family: str, batch: int) -> tuple[VLA, FlowHead, FlowInputs]:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, batch)
    (stream,) = model.decoder.run(model.streams([inputs]))
    assert isinstance(model.head, FlowHead)
    return model, model.head, model.head.inputs(model.decoder, stream, model.layout(inputs), inputs)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("family", ["flow", "pi0"])
def test_the_loss_is_the_error_of_the_samplers_velocity(
    family: str, draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At t noise + (1 - t) actions it is noise - actions that is wanted, whatever the other draws are."""
    _, head, given = head_inputs(family, 2)
    torch.manual_seed(5)
    noise = torch.randn(2, draws, *given.noise.shape[1:])
    times = draw_times((2, draws), CPU)
    actions, errors = given.noise.clamp(-1, 1), []
    for i in range(2):
        for j in range(draws):
            time = times[i, j].item()
            alone = FlowInputs(
                [(k[i : i + 1], v[i : i + 1]) for k, v in given.prefix],
                noise[i : i + 1, j],
                given.layout,
                None if given.state is None else given.state[i : i + 1],
            )
            x = time * noise[i, j] + (1 - time) * actions[i]
            error = head.velocity(alone, x[None], time)[0] - (noise[i, j] - actions[i])
            errors.append(error.square().mean())
    torch.manual_seed(5)
    found = flow_loss(head, actions, given, draws)
    torch.testing.assert_close(found, torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_a_head_that_was_trained_on_a_chunk_samples_it() -> None:
    """Were time or sign the sampler's opposite, the loss would fall just as well, and this would fail."""
    _, head, given = head_inputs("flow", 2)
    actions = torch.tensor([0.7, -0.4])[:, None, None].expand_as(given.noise)
    optimizer = torch.optim.Adam(head.requires_grad_().parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(150):
        loss = flow_loss(head, actions, given, draws=16)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])
    with torch.inference_mode():
        sampled = head.act(None, given)  # type: ignore[arg-type]
    assert (sampled - actions).abs().mean() < 0.15


def test_times_are_drawn_from_beta() -> None:
    torch.manual_seed(0)
    times = draw_times((20_000,), CPU).sort().values
    expected = torch.distributions.Beta(1.5, 1.0).sample((20_000,)).sort().values
    assert times.min() >= 1e-3
    assert times.max() <= 1
    torch.testing.assert_close(times, expected, rtol=0, atol=0.03)


def test_heads_without_a_time_mlp_have_no_loss() -> None:
    _, head, given = head_inputs("pi0.5", 1)
    with pytest.raises(ValueError, match="joins the time to actions by an MLP"):
        flow_loss(head, given.noise, given)
    model, _, given = head_inputs("flow", 1)
    model.fix_steps()
    assert isinstance(model.head, FlowHead)
    with pytest.raises(ValueError, match="not compressed"):
        flow_loss(model.head, given.noise, given)
