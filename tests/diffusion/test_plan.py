"""SamplePlan: labels, digests, refusals."""

import json
from dataclasses import replace

import pytest

from dcngen.diffusion import SamplePlan


def test_labels_cycle_or_balance():
    assert SamplePlan(num_images=5, class_labels=[2, 0]).labels(3) == [2, 0, 2, 0, 2]
    assert SamplePlan(num_images=7).labels(3) == [0, 1, 2, 0, 1, 2, 0]
    assert SamplePlan(num_images=2).labels(0) is None
    assert SamplePlan(num_images=1, class_labels=[3]).labels(3) == [3]  # the null class, by name


def test_every_field_counts_in_the_digest():
    plan = SamplePlan(num_images=8, class_labels=(0, 1))
    others = [
        dict(num_images=9), dict(seed=1), dict(class_labels=(1, 0)), dict(class_labels=None), dict(sampler="heun"),
        dict(steps=20), dict(guidance_scale=1.4), dict(mixed_precision="bf16"),
    ]  # fmt: skip
    digests = {plan.digest(), *(replace(plan, **other).digest() for other in others)}
    assert len(digests) == len(others) + 1
    assert plan.digest() == SamplePlan(num_images=8, class_labels=[0, 1], guidance_scale=1).digest()


def test_round_trip_through_json():
    plan = SamplePlan(num_images=3, class_labels=(1,), guidance_scale=1.4)
    again = SamplePlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan and again.digest() == plan.digest()
    with pytest.raises(ValueError, match="eta"):
        SamplePlan.from_dict(plan.to_dict() | {"eta": 1})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_images=0), "at least 1"),
        (dict(seed=-1), r"2\*\*32"),
        (dict(seed=2**32 - 3, num_images=4), r"2\*\*32"),
        (dict(class_labels=[]), "None balances"),
        (dict(sampler="plms"), "dpm-solver"),
        (dict(steps=0), "at least 1"),
        (dict(mixed_precision="fp8"), "bf16"),
        (dict(image_rule="truncate"), "sample them again"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplePlan(**arguments)


def test_refuses_labels_and_guidance_that_the_model_lacks():
    with pytest.raises(ValueError, match=r"0 to 2 for this model, got \[4, 9\]"):
        SamplePlan(class_labels=[9, 1, 4]).labels(3)
    with pytest.raises(ValueError, match="unconditional"):
        SamplePlan(class_labels=[0]).labels(0)
    with pytest.raises(ValueError, match="unconditional"):
        SamplePlan(guidance_scale=2.0).labels(0)
