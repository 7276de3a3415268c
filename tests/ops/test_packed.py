"""dcnv4 of one tensor with input and offset_mask side by side: the same function as with two."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import dcngen.ops
from dcngen.ops import NativeLibraryError, dcnv4, dcnv4_packed, dcnv4_packed_reference, native
from dcngen.ops import packed as packed_operator

pytestmark = pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")

CHANNELS, GROUPS = 8, 2
USED = CHANNELS + 3 * GROUPS * 9
SCALARS = (3, 3, 1, 1, 1, 1, 1, 1, GROUPS, 1.0, False, False)


@pytest.fixture(params=["reference", "native"])
def forced(request):
    if request.param == "native":
        try:
            native.cpu_library()
        except NativeLibraryError:
            pytest.skip("the compiled CPU library is not built")
    with dcngen.ops.backend(request.param):
        yield request.param


def make(width=USED + 6, dtype=torch.float32, seed=0):
    """(2, 5, 6, width); what lies between the two parts is NaN. Offsets on a lattice that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    packed = (torch.randn(2, 5, 6, width, generator=generator) * 16).round() / 16
    packed[..., USED - CHANNELS : width - CHANNELS] = float("nan")
    return packed.to(dtype)


def gradients(packed, grad, **options):
    packed = packed.detach().requires_grad_()
    output = dcnv4_packed(packed, channels=CHANNELS, groups=GROUPS, **options)
    return output, torch.autograd.grad(output, packed, grad)[0]


@pytest.mark.parametrize("width", [USED, USED + 2, USED + 6, USED + 66])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_two_tensors(forced, width, dtype):
    packed = make(width, dtype)
    grad = torch.randn(2, 5, 6, CHANNELS).to(dtype)
    output, gradient = gradients(packed, grad)
    parts = [packed[..., -CHANNELS:].contiguous(), packed[..., : USED - CHANNELS].contiguous()]
    parts = [part.requires_grad_() for part in parts]
    expected = dcnv4(*parts, groups=GROUPS)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    of_input, of_offset_mask = torch.autograd.grad(expected, parts, grad)
    torch.testing.assert_close(gradient[..., -CHANNELS:], of_input, rtol=0, atol=0)
    torch.testing.assert_close(gradient[..., : USED - CHANNELS], of_offset_mask, rtol=0, atol=0)
    assert gradient.is_contiguous() and gradient.shape == packed.shape
    assert (gradient[..., USED - CHANNELS : width - CHANNELS] == 0).all()


def test_layouts_that_are_copied(forced):
    packed, grad = make(), torch.randn(2, 5, 6, CHANNELS)
    turned = packed.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for got, expected in zip(gradients(turned, grad), gradients(packed, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_opcheck(forced):
    packed = make(USED)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_packed.default, (packed.requires_grad_(), CHANNELS, *SCALARS))
    grad = torch.randn(2, 5, 6, CHANNELS)
    arguments = (grad, packed.detach(), CHANNELS, *SCALARS)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_packed_backward.default, arguments)


def projected_twice(function):
    """Output of the operator behind a linear, with its bias as usual and with `packed_bias`."""

    def usual(x, weight, bias):
        return function(F.linear(x, weight, bias), channels=CHANNELS, groups=GROUPS)

    def by_the_operator(x, weight, bias):
        return function(F.linear(x, weight, bias.detach()), bias, channels=CHANNELS, groups=GROUPS)

    return usual, by_the_operator


@pytest.mark.parametrize("function", [dcnv4_packed, dcnv4_packed_reference])
def test_packed_bias_takes_the_gradient_of_a_bias(forced, function):
    arguments = [torch.randn(shape).requires_grad_() for shape in ((2, 5, 6, 7), (USED, 7), (USED,))]
    usual, by_the_operator = (f(*arguments) for f in projected_twice(function))
    torch.testing.assert_close(by_the_operator, usual, rtol=0, atol=0)
    grad = torch.randn_like(usual)
    for got, expected in zip(*(torch.autograd.grad(y, arguments, grad) for y in (by_the_operator, usual)), strict=True):
        torch.testing.assert_close(got, expected)


def test_packed_bias_alone_and_in_lower_precision(forced):
    packed, bias = make(USED + 2, torch.bfloat16), torch.zeros(USED + 2, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 5, 6, CHANNELS).bfloat16()
    expected = gradients(packed, grad)[1].float().sum((0, 1, 2)).bfloat16()
    output = dcnv4_packed(packed, bias, channels=CHANNELS, groups=GROUPS)
    torch.testing.assert_close(torch.autograd.grad(output, bias, grad)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"is_cuda": False},
        {"dtype": torch.float32},
        {"width": 1412},
        {"channels": 384},
        {"size": 4},
        {"stride": 2},
        {"dilation": 2},
        {"softmax": True},
        {"device_has": False},
    ],
)
def test_where_the_kernels_have_the_sums(monkeypatch, changes):
    """Elsewhere the sum stands outside the operator, where torch.compile makes its own kernel of it."""
    monkeypatch.setattr(packed_operator, "_device_has_sums", lambda _: changes.get("device_has", True))
    packed = SimpleNamespace(
        is_cuda=changes.get("is_cuda", True),
        dtype=changes.get("dtype", torch.bfloat16),
        device=torch.device("cuda", 0),
        shape=(2, *[changes.get("size", 5)] * 2, changes.get("width", 1408)),
    )
    stride, dilation = changes.get("stride", 1), changes.get("dilation", 1)
    scalars = (3, 3, stride, stride, 1, 1, dilation, dilation, 16, 1.0, False, changes.get("softmax", False))
    assert packed_operator._kernels_have_sums(packed, changes.get("channels", 512), scalars) == (not changes)


def test_opcheck_with_packed_bias(forced):
    packed, bias = make(USED), torch.randn(USED, requires_grad=True)
    arguments = (packed.requires_grad_(), CHANNELS, *SCALARS, bias)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_packed.default, arguments)
    arguments = (torch.randn(2, 5, 6, CHANNELS), packed.detach(), CHANNELS, *SCALARS)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_packed_backward_with_sums.default, arguments)


def test_second_derivatives_with_packed_bias():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) / 4).requires_grad_()
        for shape in ((1, 2, 3, 3), (USED, 3), (USED,))
    )
    usual, by_the_operator = projected_twice(dcnv4_packed)
    both = []
    for function in (usual, by_the_operator):
        found = torch.autograd.grad(function(x, weight, bias).pow(2).sum(), (x, weight, bias), create_graph=True)
        both.append((*found, *torch.autograd.grad(sum(g.pow(2).sum() for g in found), (x, weight))))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected)


def test_second_derivatives():
    packed = (make(USED, torch.float64)[:1, :2, :3] + 1 / 64).requires_grad_()  # off the kinks at whole coordinates
    assert torch.autograd.gradgradcheck(lambda p: dcnv4_packed(p, channels=CHANNELS, groups=GROUPS), packed)


def test_function_transforms():
    packed = make(USED, torch.float64)
    together = dcnv4_packed(packed, channels=CHANNELS, groups=GROUPS)
    one_by_one = torch.func.vmap(lambda p: dcnv4_packed(p[None], channels=CHANNELS, groups=GROUPS)[0])(packed)
    torch.testing.assert_close(one_by_one, together)


def test_compiles_whole_and_only_once(forced):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p: dcnv4_packed(p, channels=CHANNELS, groups=GROUPS), backend=counter, fullgraph=True
    )
    packed, grad = make(USED), torch.randn(2, 5, 6, CHANNELS)
    for _ in range(2):
        inputs = packed.clone().requires_grad_()
        gradient = torch.autograd.grad(compiled(inputs), inputs, grad)[0]
    assert counter.frame_count == 1
    torch.testing.assert_close(gradient, gradients(packed, grad)[1], rtol=0, atol=0)


def test_autocast(forced):
    packed = make(USED)
    with torch.autocast("cpu", torch.bfloat16):
        output = dcnv4_packed(packed, channels=CHANNELS, groups=GROUPS)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, dcnv4_packed(packed.bfloat16(), channels=CHANNELS, groups=GROUPS))


def test_the_reference_is_the_same_function():
    packed = make(USED, torch.float64)
    expected = dcnv4(packed[..., -CHANNELS:], packed[..., :-CHANNELS], groups=GROUPS, softmax=True)
    got = dcnv4_packed_reference(packed, channels=CHANNELS, groups=GROUPS, softmax=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"packed": "no tensor"}, TypeError, "packed: expected a torch.Tensor, got str"),
        ({"packed": torch.zeros(2, 5, 6, USED - 1)}, ValueError, f"at least 54 . {CHANNELS} channels"),
        ({"packed": torch.zeros(5, 6, USED)}, ValueError, r"got \(5, 6, 62\)"),
        ({"stride": 2}, ValueError, "keeps the map's size"),
        ({"packed_bias": torch.zeros(USED)}, ValueError, rf"expected the shape \({USED + 6},\).*got \({USED},\)"),
        ({"padding": 0}, ValueError, "use dcnv4 with two tensors"),
        ({"channels": 7, "packed": torch.zeros(2, 5, 6, USED)}, ValueError, "groups=2 divides"),
        ({"groups": 2.0}, TypeError, "groups: expected an int"),
    ],
)
def test_wrong_arguments_are_refused(change, error, message):
    arguments = {"packed": make(), "channels": CHANNELS, "groups": GROUPS} | change
    with pytest.raises(error, match=message):
        dcnv4_packed(arguments.pop("packed"), **arguments)
