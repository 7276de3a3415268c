"""dcnv4_packed_linear where no kernel computes both: the same function as the two calls, and one operator to torch."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4
from dcngen.ops import dcnv4_packed, dcnv4_packed_linear, projected

pytestmark = pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")

CHANNELS, GROUPS, OUT = 8, 2, 6
WIDTH = CHANNELS + 3 * GROUPS * 9
SCALARS = (3, 3, 1, 1, 1, 1, 1, 1, GROUPS, 1.0, False, False)


def tensors(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(2, 3, 4, WIDTH), normal(OUT, CHANNELS), normal(OUT) if bias else None


def separate(packed, weight, bias):
    return F.linear(dcnv4_packed(packed, channels=CHANNELS, groups=GROUPS), weight, bias)


def operator(packed, weight, bias, save_output=True):
    return torch.ops.dcngen.dcnv4_packed_linear(packed, weight, bias, CHANNELS, save_output, *SCALARS)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save_output", [False, True])
def test_the_operator_is_both_calls(bias, save_output):
    arguments = tensors(bias=bias)
    wanted = [t for t in arguments if t is not None]
    got, expected = operator(*arguments, save_output), separate(*arguments)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, wanted, grad), torch.autograd.grad(expected, wanted, grad))


def test_only_what_is_asked_for_gets_a_gradient():
    packed, weight, bias = tensors()
    result = operator(packed.detach(), weight, bias.detach())
    grad = torch.randn_like(result)
    (expected,) = torch.autograd.grad(separate(packed, weight, bias), weight, grad)
    torch.testing.assert_close(torch.autograd.grad(result, weight, grad)[0], expected)


def test_packed_bias_alone_gets_a_gradient():
    packed, weight, bias = (t.detach() for t in tensors())
    packed_bias = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    arguments = packed, weight, bias, CHANNELS, True, *SCALARS, packed_bias
    result = torch.ops.dcngen.dcnv4_packed_linear(*arguments)[0]
    grad = torch.randn_like(result)
    expected = torch.autograd.grad(separate(packed + packed_bias, weight, bias), packed_bias, grad)
    torch.testing.assert_close(torch.autograd.grad(result, packed_bias, grad), expected)


@pytest.mark.parametrize("save_output", [False, True])
def test_opcheck(save_output):
    arguments = (*tensors(torch.float32), CHANNELS, save_output, *SCALARS)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_packed_linear.default, arguments)


def test_second_derivatives():
    packed, weight, bias = tensors()
    packed = packed.detach()[:1, :2, :3].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(operator, (packed, weight, bias))


def test_the_function_runs_anywhere():
    arguments = tensors()
    got = dcnv4_packed_linear(*arguments, channels=CHANNELS, groups=GROUPS)
    torch.testing.assert_close(got, separate(*arguments))
    mapped = torch.func.vmap(
        lambda p: dcnv4_packed_linear(p[None], *arguments[1:], channels=CHANNELS, groups=GROUPS)[0]
    )
    torch.testing.assert_close(mapped(arguments[0]), got)


def test_it_compiles_whole(monkeypatch):
    """As on a device with the kernel, whose place the operator's other implementation takes here."""
    monkeypatch.setattr(projected, "_is_one_kernel", lambda *_: True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *arguments: dcnv4_packed_linear(*arguments, channels=CHANNELS, groups=GROUPS),
        backend="aot_eager",
        fullgraph=True,
    )
    arguments = tensors(torch.float32)
    for run in (compiled, partial(dcnv4_packed_linear, channels=CHANNELS, groups=GROUPS)):
        got, expected = run(*arguments), separate(*arguments)
        grad = torch.randn_like(expected)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got, arguments, grad), torch.autograd.grad(expected, arguments, grad)
        )
        with torch.no_grad():
            torch.testing.assert_close(run(*arguments), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channels": 192},
        {"batch": 63},
        {"dtype": torch.float32},
        {"groups": 16},
        {"stride": 2},
        {"dilation": 2},
        {"softmax": True},
    ],
)
def test_where_one_kernel_is_chosen(monkeypatch, changes):
    monkeypatch.setattr(projected, "_device_has_kernel", lambda _: True)
    channels, groups = changes.get("channels", 128), changes.get("groups", 2)
    packed = SimpleNamespace(
        is_cuda=True,
        dtype=changes.get("dtype", torch.float16),
        device=torch.device("cuda", 0),
        shape=(changes.get("batch", 64), 32, 32, 312),
        numel=lambda: math.prod(packed.shape),
    )
    stride, dilation = changes.get("stride", 1), changes.get("dilation", 1)
    scalars = (3, 3, stride, stride, 1, 1, dilation, dilation, groups, 1.0, False, changes.get("softmax", False))
    weight = torch.empty(channels, channels, device="meta")
    assert projected._is_one_kernel(packed, weight, channels, scalars) == (not changes)


def test_autocast():
    arguments = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(*arguments).dtype == torch.bfloat16


def test_a_replaced_output_projection_is_called():
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    module, x = DCNv4(16, group=2), torch.randn(1, 4, 4, 16)
    module.output_proj = Adapter(16, 16)
    torch.nn.init.zeros_(module.output_proj.bias)
    torch.testing.assert_close(module(x), torch.ones(1, 4, 4, 16))  # masks of 0: the bias, and what the adapter adds
