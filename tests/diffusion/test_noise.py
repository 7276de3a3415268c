"""Seeds: noise as a pure function of integers."""

import pytest
import torch

from dcngen.diffusion import derive_seed, seeded_generator, seeded_noise


def test_derived_seeds_differ_in_every_part_and_never_change():
    parts = [(0, "noise", 0, 0), (0, "noise", 0, 1), (0, "noise", 1, 0), (1, "noise", 0, 0), (0, "label", 0, 0)]
    assert len({derive_seed(*each) for each in parts}) == len(parts)
    assert derive_seed(1, "1") != derive_seed("1", 1) != derive_seed("11")
    assert derive_seed(0, "noise", 3) == 3598013454707825169  # resumed runs rely on it from version to version


def test_derived_seeds_refuse_what_is_not_exact():
    for part in (1.0, True, None):
        with pytest.raises(TypeError, match="integers and strings"):
            derive_seed(0, part)
    with pytest.raises(ValueError, match="at least one"):
        derive_seed()


def test_generators_repeat():
    first, second = (torch.randn(5, generator=seeded_generator(3, "x")) for _ in range(2))
    assert torch.equal(first, second)


def test_noise_of_a_sample_depends_on_its_seed_alone():
    noise = seeded_noise((4, 8, 8), [5, 0, 2**32 - 1])
    assert noise.shape == (3, 4, 8, 8) and noise.dtype == torch.float32
    for sample, seed in zip(noise, [5, 0, 2**32 - 1], strict=True):
        assert torch.equal(sample, torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)))
    torch.rand(3)  # the global generator has no say
    assert torch.equal(noise[:1], seeded_noise((4, 8, 8), [5]))
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_the_cpu_generator_would_fold_are_refused(seed):
    with pytest.raises(ValueError, match="2\\*\\*32"):
        seeded_noise((1,), [seed])
