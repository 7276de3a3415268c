"""torch.func transforms, forward mode, batched gradients and autocast around the operators, eager and compiled."""

import pytest
import torch

import dcngen.ops
from dcngen.ops import dcnv4, dcnv4_packed, dcnv4_packed_linear, dcnv4_reference, projected
from dcngen.ops.backends import native_library

pytestmark = pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")

GROUPS, CHANNELS = 2, 8
SCALARS = (3, 3, 1, 1, 1, 1, 1, 1, GROUPS, 1.0, False, False)


@pytest.fixture
def tensors(make_inputs):
    return make_inputs(2, 4, 5, GROUPS, CHANNELS // GROUPS, dtype=torch.float32, spread=0.6)


def separate(offset_mask):
    return lambda x: dcnv4(x, offset_mask, groups=GROUPS)


def packed(offset_mask):
    return lambda x: dcnv4_packed(torch.cat([offset_mask, x], -1), channels=CHANNELS, groups=GROUPS)


def packed_linear(offset_mask):
    weight = torch.eye(CHANNELS)
    return lambda x: dcnv4_packed_linear(torch.cat([offset_mask, x], -1), weight, channels=CHANNELS, groups=GROUPS)


ALL = pytest.mark.parametrize("make", [separate, packed, packed_linear])


def reference(offset_mask):
    return lambda x: dcnv4_reference(x, offset_mask, groups=GROUPS)


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager")


@ALL
def test_forward_mode_within_compile(make, tensors):
    """The operator has no forward-mode rule: taken for an opaque one, its tangent would be 0 without a word."""
    x, offset_mask = tensors
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    derivative = compiled(lambda a: torch.func.jvp(make(offset_mask), (a,), (tangent,))[1])(x)
    expected = torch.func.jvp(reference(offset_mask), (x,), (tangent,))[1]
    torch.testing.assert_close(derivative, expected)
    assert expected.abs().max() > 0.1


@ALL
def test_gradient_transform_within_compile(make, tensors):
    x, offset_mask = tensors
    gradient = compiled(torch.func.grad(lambda a: make(offset_mask)(a).square().sum()))(x)
    torch.testing.assert_close(gradient, torch.func.grad(lambda a: reference(offset_mask)(a).square().sum())(x))


@ALL
def test_batched_gradients(make, tensors):
    x, offset_mask = tensors
    x = x.clone().requires_grad_()
    output = make(offset_mask)(x)
    grads = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(2))
    (together,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(one_by_one))


@pytest.mark.parametrize("make", [separate, packed])
def test_autocast_holds_under_transforms(make, tensors):
    x, offset_mask = tensors
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = torch.func.vmap(lambda a, om: make(om[None])(a[None])[0])(x, offset_mask)
        torch.testing.assert_close(mapped, make(offset_mask)(x), rtol=0.05, atol=0.05)  # same dtype
    assert mapped.dtype == torch.bfloat16


def test_a_backward_under_another_autocast_is_right(tensors):
    """grad_output then comes in autocast's dtype, which the kernels would have read as the input's."""
    both = torch.cat(tensors, -1).half().requires_grad_()
    weight = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(3)).half()
    output = torch.ops.dcngen.dcnv4_packed_linear(both, weight, None, CHANNELS, True, *SCALARS)[0]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).half()
    (expected,) = torch.autograd.grad(output, both, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(output, both, grad)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_a_gradient_of_another_dtype_or_shape_is_refused(tensors):
    x, offset_mask = tensors
    grad = torch.ones_like(x)
    if native_library("cpu", torch.float32) is None:
        pytest.skip("the compiled CPU library is not built")
    for wrong in (grad.bfloat16(), grad.double()):
        with pytest.raises(
            TypeError, match=r"grad_output: expected torch.float32 on cpu as input, got torch.(bf|float64)"
        ):
            torch.ops.dcngen.dcnv4_backward(wrong, x, offset_mask, *SCALARS)
    with pytest.raises(
        ValueError, match=r"grad_output: expected the output's shape \(2, 4, 5, 8\), got \(2, 4, 4, 8\)"
    ):
        torch.ops.dcngen.dcnv4_backward(grad[:, :, :4], x, offset_mask, *SCALARS)


def test_windows_larger_than_the_cpu_kernel_takes(make_inputs):
    x, offset_mask = make_inputs(1, 6, 5, 1, 2, kernel_size=13, padding=6, dtype=torch.float32)
    options = {"kernel_size": 13, "padding": 6, "groups": 1}
    torch.testing.assert_close(dcnv4(x, offset_mask, **options), dcnv4_reference(x, offset_mask, **options))
    if native_library("cpu", torch.float32) is None:
        pytest.skip("the compiled CPU library is not built")
    with dcngen.ops.backend("native"), pytest.raises(ValueError, match="at most 144 taps, got 169"):
        dcnv4(x, offset_mask, **options)


def test_packed_linear_names_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"packed: expected a torch.Tensor, got list"):
        projected.dcnv4_packed_linear([1], torch.eye(8), channels=8, groups=2)
