import pytest


@pytest.fixture
def traced_products():
    """traced_products(module, x): names of the matrix products in the traced forward, and "add" for one of a bias."""
    from torch._ops import OpOverload
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    products = ("addmm", "mm", "bmm", "baddbmm", "linear", "matmul")

    def trace(module, x):
        parameters = dict(module.named_parameters())
        graph = make_fx(lambda parameters, x: functional_call(module, parameters, (x,)))(parameters, x).graph
        calls = [node for node in graph.nodes if isinstance(node.target, OpOverload)]
        found = [(call, call.target.overloadpacket.__name__) for call in calls]
        return [name for call, name in found if name in products or (name == "add" and adds_a_bias(call))]

    def adds_a_bias(call):
        ranks = [len(node.meta["tensor_meta"].shape) for node in (call, *call.all_input_nodes)]
        return ranks[0] > 1 and 1 in ranks

    return trace
