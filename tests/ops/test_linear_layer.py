"""dcngen.ops.linear where no kernel computes it: F.linear, and one operator to torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from dcngen.nn import DCNv4
from dcngen.ops import has_linear_kernel, linear, linear_layer

pytestmark = pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")

operator = torch.ops.dcngen.linear.default


def tensors(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(2, 3, 4), normal(5, 4), normal(5) if bias else None


def on_cuda(*shape, dtype=torch.bfloat16):
    """What the choice of a kernel asks of a tensor on a GPU."""
    device = torch.device("cuda", 0)
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=device, shape=shape, dim=lambda: len(shape))


def gradients(run, arguments, grad):
    wanted = [t for t in arguments if t is not None and t.requires_grad]
    return torch.autograd.grad(run(*arguments), wanted, grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (0, 1)])
def test_the_operator_is_the_linear(bias, frozen):
    arguments = [None if t is None else t.requires_grad_(i not in frozen) for i, t in enumerate(tensors(bias=bias))]
    if not any(t is not None and t.requires_grad for t in arguments):
        pytest.skip("nothing is left to differentiate")
    grad = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(operator(*arguments), F.linear(*arguments))
    torch.testing.assert_close(gradients(operator, arguments, grad), gradients(F.linear, arguments, grad))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    torch.library.opcheck(operator, tensors(torch.float32, bias))


def test_second_derivatives():
    assert torch.autograd.gradgradcheck(operator, tensors())


def test_the_backward_operator():
    """What a kernel would compute; the differentiable path does not use it."""
    grad, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    of_input, sums = torch.ops.dcngen.linear_backward(grad, weight.t())
    torch.testing.assert_close(of_input, grad @ weight)
    torch.testing.assert_close(sums.sum(0), grad.sum((0, 1)))


def test_it_compiles_whole(monkeypatch):
    """As on a device with the kernels, whose place the operators' other implementations take here."""
    called = []
    monkeypatch.setattr(linear_layer, "has_linear_kernel", lambda *_: True)
    monkeypatch.setattr(linear_layer, "_of_input_and_bias", by_the_operator)
    torch._dynamo.reset()

    def note(graph, _):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    compiled = torch.compile(linear, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    arguments, grad = tensors(torch.float32), torch.randn(2, 3, 5)
    torch.testing.assert_close(gradients(compiled, arguments, grad), gradients(F.linear, arguments, grad))
    assert {operator, torch.ops.dcngen.linear_backward.default} <= set(called)


def by_the_operator(grad_output, weight, wants_bias):
    of_input, sums = torch.ops.dcngen.linear_backward(grad_output, weight.t())
    return of_input, sums.sum(0)


def test_the_sums_of_all_parts_are_added(monkeypatch):
    grad, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)

    def in_two_parts(grad, weight_transposed):
        of_input = grad @ weight_transposed.t()
        return of_input.detach(), torch.stack([grad[0].sum(0), grad[1].sum(0)])

    monkeypatch.setattr(linear_layer, "LEAST_ROWS", 1)
    monkeypatch.setattr(linear_layer, "_parts", lambda *_: 2)
    monkeypatch.setattr(linear_layer, "_backward_op", in_two_parts)
    with torch.no_grad():
        of_input, of_weight, of_bias = linear_layer.linear_gradients(grad, weight, grad, (True, False, True))
    assert of_weight is None
    torch.testing.assert_close(of_input, grad @ weight)
    torch.testing.assert_close(of_bias, grad.sum((0, 1)))
    # create_graph=True: no kernel has derivatives of its own
    with torch.enable_grad():
        of_input, *_ = linear_layer.linear_gradients(grad, weight.requires_grad_(), grad, (True, False, False))
    assert of_input.requires_grad


def test_autocast():
    arguments = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(*arguments).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 2**15 - 1},
        {"rows": 2**31},
        {"in_features": 64},
        {"dtype": torch.float32},
        {"weight_dtype": torch.float32},
        {"is_cuda": False},
        {"weight_device": "cuda:1"},
        {"parts": -1},
    ],
    ids=str,
)
def test_where_there_are_kernels(monkeypatch, changes):
    monkeypatch.setattr(linear_layer, "_device_parts", lambda *_: changes.get("parts", 264))
    dtype = changes.get("dtype", torch.bfloat16)
    input = on_cuda(changes.get("rows", 2**15), changes.get("in_features", 128), dtype=dtype)
    input.is_cuda = changes.get("is_cuda", True)
    weight = on_cuda(192, 128, dtype=changes.get("weight_dtype", dtype))
    weight.device = torch.device(changes.get("weight_device", "cuda:0"))
    assert has_linear_kernel(input, weight) == has_linear_kernel(input, weight, backward=True) == (not changes)


def test_a_kernel_for_the_forward_alone(monkeypatch):
    monkeypatch.setattr(linear_layer, "_device_parts", lambda *_: 0)
    input, weight = on_cuda(2**15, 256), on_cuda(704, 256)
    assert has_linear_kernel(input, weight)
    assert not has_linear_kernel(input, weight, backward=True)


def test_autocast_decides_the_dtype(monkeypatch):
    asked = []
    monkeypatch.setattr(linear_layer, "_device_parts", lambda *arguments: asked.append(arguments) or 264)
    input, weight = on_cuda(2**15, 128, dtype=torch.float32), on_cuda(192, 128, dtype=torch.float32)
    assert not has_linear_kernel(input, weight)
    # What torch.autocast("cuda", torch.float16) sets where there is a device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.float16)
    assert has_linear_kernel(input, weight)
    assert asked == [(0, torch.float16, 192, 128)]


@pytest.mark.parametrize("bias", [torch.zeros(5), torch.zeros(4, dtype=torch.float64)], ids=["dtype", "length"])
def test_a_bias_that_does_not_fit_is_refused_by_torch(monkeypatch, bias):
    """The kernel would read beyond it, or other numbers."""
    monkeypatch.setattr(linear_layer, "has_linear_kernel", lambda *_: True)
    monkeypatch.setattr(linear_layer, "_op", lambda *_: pytest.fail("the operator was called"))
    input, weight, _ = tensors()
    with pytest.raises(RuntimeError):
        linear(input, weight, bias)


@pytest.mark.parametrize("center_feature_scale", [False, True])
def test_the_layer_leaves_the_biases_to_it(monkeypatch, center_feature_scale):
    """Where it has kernels the operator's backward need not sum its gradients."""
    layer, x = DCNv4(16, group=2, mask_init=0.1, center_feature_scale=center_feature_scale), torch.randn(1, 4, 4, 16)
    grad = torch.randn(1, 4, 4, 16)
    expected = torch.autograd.grad(layer(x), list(layer.parameters()), grad)
    monkeypatch.setattr("dcngen.nn.dcnv4.has_linear_kernel", lambda *_, **__: True)
    monkeypatch.setattr("dcngen.nn.dcnv4.linear", operator)
    packed, packed_bias = layer._project_at_once(x)
    assert packed_bias is None and packed.requires_grad
    torch.testing.assert_close(torch.autograd.grad(layer(x), list(layer.parameters()), grad), expected)
