"""compile_model: few checks before a call, and none of those left out that training needs."""

import functools

import pytest
import torch

from dcngen.models import compiled
from dcngen.models.compiled import compile_model

needs_filters = pytest.mark.skipif(not hasattr(torch.compiler, compiled.FROM), reason="this torch filters no guards")


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch):
    """Traced and guarded as ever, but nothing to wait for."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


class Dropping(torch.nn.Module):
    """Zeros in training, else a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(4, 4), torch.nn.Dropout(1.0)

    def forward(self, x):
        return self.dropout(self.linear(x))


def test_training_and_evaluation_are_told_apart_and_kept():
    model, x = Dropping(), torch.randn(2, 4)
    compile_model(model, fullgraph=True)
    for stance in ("default", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert not model.train()(x).any()
            torch.testing.assert_close(model.eval()(x), model.linear(x))


def test_other_arguments_are_noticed():
    model = Dropping().eval()
    compile_model(model)
    for x in (torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 4).double()):
        if x.dtype == torch.float64:
            with pytest.raises(RuntimeError, match="dtype"):
                model(x)
        else:
            torch.testing.assert_close(model(x), model.linear(x))
    with torch.no_grad():
        assert not model(torch.randn(2, 4)).requires_grad
    assert model(torch.randn(2, 4)).requires_grad


@needs_filters
def test_modules_are_not_checked_at_every_call(monkeypatch, make_unet, make_batch):
    counts = []
    real = compiled._guards_to_keep

    def counted(guards):
        kept = real(guards)
        counts.append((len(guards), sum(kept)))
        return kept

    monkeypatch.setattr(compiled, "_guards_to_keep", counted)
    model = make_unet(conv_operator="dcnv4", attention_operator="dcnv4", dropout=0.1).train()
    compile_model(model)(*make_batch())
    ((of, kept),) = counts
    assert kept < of / 5


@pytest.mark.parametrize("known", [True, False], ids=["filters", "none"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_the_mode_reaches_torch(monkeypatch, mode, known):
    if not known:
        monkeypatch.setattr(compiled, "FROM", "not of torch.compiler")
    given = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: given.append(options) or call)
    compile_model(Dropping(), mode)
    (options,) = given
    graphs = options.get("options", {}).get("triton.cudagraphs", options.get("mode") == "reduce-overhead")
    assert bool(graphs) == (mode == "reduce-overhead") and options["dynamic"] is False
