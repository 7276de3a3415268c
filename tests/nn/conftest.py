import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def randomize():
    """randomize(module): every parameter drawn anew, so that zero initialisations hide nothing."""

    def apply(module, scale=0.3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, scale)
        return module

    return apply
