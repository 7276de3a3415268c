import pytest
import torch

from dcngen.diffusion import Objective
from dcngen.training.batches import EpochOrder, LatentBatches


def make(latents, **options):
    defaults = {"seed": 1, "batch_size": 4, "null_class": 2, "label_dropout": 0.3}
    return LatentBatches(latents, lambda sampled: sampled, Objective(), **{**defaults, **options})


def test_each_epoch_visits_every_item_once_in_a_new_order():
    order = EpochOrder(10, seed=3, stream="x")
    stream = torch.cat([order(start, 7) for start in range(0, 70, 7)])
    epochs = stream.view(7, 10)
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 7


def test_order_does_not_depend_on_how_it_is_read():
    whole = EpochOrder(10, 3, "x")(0, 64)
    assert torch.equal(EpochOrder(10, 3, "x")(35, 20), whole[35:55])
    assert not torch.equal(EpochOrder(10, 4, "x")(0, 64), whole)
    assert not torch.equal(EpochOrder(10, 3, "y")(0, 64), whole)


@pytest.mark.parametrize("resident", [True, False])
def test_a_batch_is_a_function_of_its_step(latents, resident):
    first, again = make(latents), make(latents, resident=resident)
    for step in range(7):
        first(step)
    a, b = first(5), again(5)
    assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("latents", "noise", "timesteps", "labels"))
    assert not torch.equal(a.noise, again(6).noise)
    assert not torch.equal(a.noise, make(latents, seed=2)(5).noise)


def test_processes_and_accumulation_share_the_stream_without_overlap(latents):
    alone = make(latents, batch_size=12)
    together = [make(latents, batch_size=2, accumulation_steps=3, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(5):
        parts = [batches._indices(step * 3 + micro) for micro in range(3) for batches in together]
        assert torch.equal(torch.cat(parts), alone._indices(step))
    assert not torch.equal(together[0](0, 0).noise, together[1](0, 0).noise)
    assert not torch.equal(together[0](0, 0).noise, together[0](0, 1).noise)


def test_labels_belong_to_their_latents_and_are_dropped_as_often_as_asked(latents):
    kept = make(latents, label_dropout=0.0)
    for step in range(3):
        assert torch.equal(kept(step).labels, latents.labels[kept._indices(step)])
    dropping = make(latents, batch_size=20, label_dropout=0.3)
    labels = torch.cat([dropping(step).labels for step in range(200)])
    assert (labels == 2).double().mean().item() == pytest.approx(0.3, abs=0.03)
    assert make(latents, null_class=None)(0).labels is None


def test_latents_are_drawn_from_the_posterior(latents):
    """With every item in the batch, the mean over many draws is the posterior's mean."""
    batches = make(latents, batch_size=len(latents))
    draws = []
    for step in range(300):
        unsort = batches._indices(step).argsort()
        draws.append(batches(step).latents[unsort])
    draws = torch.stack(draws)
    mean, logvar = latents.moments.float().chunk(2, dim=1)
    std = (0.5 * logvar).exp()
    assert ((draws.mean(0) - mean) / std * 300**0.5).abs().mean() < 1.0  # 0.8 for a standard normal
    assert (draws.std(0) / std).mean().item() == pytest.approx(1.0, abs=0.02)
