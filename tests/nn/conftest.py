import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

PRODUCTS = ("addmm", "mm", "bmm", "baddbmm", "linear", "matmul")


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


@pytest.fixture
def traced_products():
    """traced_products(module, x): names of the matrix products in the traced forward, and "add" for one of a bias."""

    def trace(module, x):
        parameters = dict(module.named_parameters())
        graph = make_fx(lambda parameters, x: functional_call(module, parameters, (x,)))(parameters, x).graph
        calls = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        found = [(call, call.target.overloadpacket.__name__) for call in calls]
        return [name for call, name in found if name in PRODUCTS or (name == "add" and _adds_a_bias(call))]

    return trace


def _adds_a_bias(call):
    ranks = [len(node.meta["tensor_meta"].shape) for node in (call, *call.all_input_nodes)]
    return ranks[0] > 1 and 1 in ranks
