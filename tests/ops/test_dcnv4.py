"""The public operator: every implementation that this machine has, inside torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import dcngen.ops
from dcngen.ops import NativeLibraryError, dcnv4, dcnv4_reference, native, offset_mask_channels

pytestmark = pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")

SCALARS = (3, 3, 1, 1, 1, 1, 1, 1, 2, 1.0, False, False)  # the schema's, for groups=2


def _has_cpu_library():
    try:
        native.cpu_library()
    except NativeLibraryError:
        return False
    return True


@pytest.fixture(params=["reference", "native"])
def forced(request):
    """Each test below runs in plain torch and, where it is there, in the compiled library."""
    if request.param == "native" and not _has_cpu_library():
        pytest.skip("the compiled CPU library is not built")
    with dcngen.ops.backend(request.param):
        yield request.param


def _float32(make_inputs, *shape, **kwargs):
    # Places on a lattice of 1/64 pixel are exact in float32: no derivative changes sides at a whole coordinate.
    input, offset_mask = make_inputs(*shape, **kwargs)
    return input.float(), ((offset_mask * 64).round() / 64).float()


def _with_gradients(function, input, offset_mask, grad=None, **kwargs):
    input, offset_mask = input.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = function(input, offset_mask, **kwargs)
    if grad is None:
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output.dtype)
    return (output, *torch.autograd.grad(output, (input, offset_mask), grad.to(output.dtype)))


def test_output_and_gradients(forced, make_inputs):
    input, offset_mask = _float32(make_inputs, 3, 7, 7, 2, 5)
    ours = _with_gradients(dcnv4, input, offset_mask, groups=2)
    expected = _with_gradients(dcnv4_reference, input.double(), offset_mask.double(), groups=2)
    for mine, exact in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_geometry(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel, stride, dilation = ((draw(1, 5), draw(1, 5)), (draw(1, 3), draw(1, 3)), (draw(1, 2), draw(1, 2)))
    padding, size = (draw(0, 4), draw(0, 4)), (draw(5, 11), draw(5, 11))
    extent = [s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    if min(extent) < 1:
        return
    height_out, width_out = ((e - 1) // s + 1 for e, s in zip(extent, stride, strict=True))
    batch, groups, depth = draw(0, 3), draw(1, 3), draw(1, 9)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(0, 10**6))
    input = torch.randn(batch, *size, groups * depth, generator=generator).to(dtype)
    shape = batch, height_out, width_out, offset_mask_channels(groups, kernel)
    offset_mask = (torch.randn(shape, generator=generator) * data.draw(st.sampled_from([0.5, 4.0]))).to(dtype)
    kwargs = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    kwargs |= dict(offset_scale=data.draw(st.sampled_from([0.5, 1.0, 2.0])), softmax=data.draw(st.booleans()))
    output = dcnv4(input, offset_mask, **kwargs)
    exact = dcnv4_reference(input.double(), offset_mask.double(), **kwargs)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert output.dtype == dtype and output.shape == exact.shape
    torch.testing.assert_close(
        output.double(), exact, rtol=tolerance, atol=tolerance * (exact.abs().amax().item() if exact.numel() else 1)
    )


def test_slices_of_wider_tensors_and_other_layouts(forced, make_inputs):
    input, offset_mask = _float32(make_inputs, 2, 5, 6, 2, 4)
    expected = _with_gradients(dcnv4, input, offset_mask, groups=2)
    wide_input, wide_offset_mask = torch.full((2, 5, 6, 21), float("nan")), torch.full((2, 5, 6, 70), float("nan"))
    wide_input[..., 3:11], wide_offset_mask[..., 2:58] = input, offset_mask
    layouts = {
        "slices": (wide_input[..., 3:11], wide_offset_mask[..., 2:58]),
        "NCHW": (input.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), offset_mask),
        "turned": (input.transpose(1, 2).contiguous().transpose(1, 2), offset_mask.flip(2).flip(2)),
        "of an expanded batch": (input[:1].expand(2, -1, -1, -1), offset_mask),
    }
    for name, (x, om) in layouts.items():
        want = expected
        if name == "of an expanded batch":
            want = _with_gradients(dcnv4, input[:1].repeat(2, 1, 1, 1), offset_mask, groups=2)
        for got, exact in zip(_with_gradients(dcnv4, x, om, groups=2), want, strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    # gradients that arrive expanded, or as a slice
    sliced = torch.randn(2, 5, 6, 30)[..., 5:13]
    for grad in (torch.ones(()).expand(2, 5, 6, 8), sliced):
        got = _with_gradients(dcnv4, input, offset_mask, grad=grad, groups=2)
        exact = _with_gradients(dcnv4, input, offset_mask, grad=grad.contiguous(), groups=2)
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


def test_slices_are_read_in_place(make_inputs):
    from dcngen.ops.plan import pixel_stride

    wide = torch.zeros(2, 5, 6, 24)
    assert pixel_stride(wide) == 24
    assert pixel_stride(wide[..., 8:16]) == 24
    assert pixel_stride(wide[:, :1, :1, 8:16]) == 5 * 6 * 24  # only the step between images is left
    assert pixel_stride(wide[:, :, :3]) is None  # rows are not dense
    assert pixel_stride(wide[:, ::2]) is None
    assert pixel_stride(wide.permute(0, 3, 1, 2)) is None
    assert pixel_stride(wide[..., ::2]) is None
    assert pixel_stride(wide[:1].expand(2, -1, -1, -1)) is None


def test_inputs_cut_from_one_tensor_do_not_share_plans(forced, make_inputs):
    """The plan is kept by shape and stride: another slice of the same shape is another call."""
    input, offset_mask = _float32(make_inputs, 1, 4, 4, 2, 4)
    wide = torch.cat([input, 2 * input], -1)
    first, second = dcnv4(wide[..., :8], offset_mask, groups=2), dcnv4(wide[..., 8:], offset_mask, groups=2)
    torch.testing.assert_close(second, 2 * first)


def test_opcheck(forced, make_inputs):
    input, offset_mask = _float32(make_inputs, 2, 5, 6, 2, 4)
    arguments = (input.clone().requires_grad_(), offset_mask.clone().requires_grad_(), *SCALARS)
    torch.library.opcheck(torch.ops.dcngen.dcnv4.default, arguments)
    grad = torch.randn(2, 5, 6, 8)
    torch.library.opcheck(torch.ops.dcngen.dcnv4_backward.default, (grad, input, offset_mask, *SCALARS))


def test_the_schema_is_pinned():
    scalars = (
        "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, "
        "int dilation_w, int groups, float offset_scale, bool remove_center, bool softmax"
    )
    forward, backward = torch.ops.dcngen.dcnv4.default._schema, torch.ops.dcngen.dcnv4_backward.default._schema
    assert str(forward) == f"dcngen::dcnv4(Tensor input, Tensor offset_mask, {scalars}) -> Tensor"
    tensors = "Tensor grad_output, Tensor input, Tensor offset_mask"
    assert str(backward) == f"dcngen::dcnv4_backward({tensors}, {scalars}) -> (Tensor, Tensor)"


def test_compiles_whole_and_once(forced, make_inputs):
    torch._dynamo.reset()
    compilations = CompileCounterWithBackend("aot_eager")

    def function(x, om):
        return dcnv4(x.relu(), om, groups=2).square()

    compiled = torch.compile(function, fullgraph=True, backend=compilations)
    input, offset_mask = _float32(make_inputs, 2, 5, 6, 2, 4)
    for _ in range(2):
        got = _with_gradients(lambda x, om: compiled(x, om), input, offset_mask)
        torch.testing.assert_close(got, _with_gradients(function, input, offset_mask))
    assert compilations.frame_count == 1


def test_compiles_once_for_any_batch(make_inputs):
    torch._dynamo.reset()
    compilations = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, om: dcnv4(x, om, groups=2), fullgraph=True, backend=compilations, dynamic=True)
    counts = []
    for batch in (2, 3, 5):
        input, offset_mask = _float32(make_inputs, batch, 5, 6, 2, 4)
        torch.testing.assert_close(compiled(input, offset_mask), dcnv4(input, offset_mask, groups=2))
        counts.append(compilations.frame_count)
    assert counts[0] > 0 and counts == counts[:1] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_autocast_unifies_dtypes(forced, dtype, dtypes, make_inputs):
    input, offset_mask = _float32(make_inputs, 2, 5, 6, 2, 4)
    x, om = input.to(dtypes[0]).requires_grad_(), offset_mask.to(dtypes[1]).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = dcnv4(x, om, groups=2)
    assert output.dtype == dtype
    torch.testing.assert_close(output, dcnv4(x.detach().to(dtype), om.detach().to(dtype), groups=2))
    output.float().sum().backward()
    assert x.grad.dtype == dtypes[0] and om.grad.dtype == dtypes[1]
    with torch.autocast("cpu", dtype=dtype, enabled=False), pytest.raises(TypeError, match="autocast"):
        dcnv4(x, om, groups=2)


def test_autocast_compiles(make_inputs):
    torch._dynamo.reset()
    input, offset_mask = _float32(make_inputs, 2, 5, 6, 2, 4)
    compiled = torch.compile(lambda x, om: dcnv4(x, om, groups=2), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(input, offset_mask.bfloat16())
    assert output.dtype == torch.bfloat16


def test_second_derivatives(make_inputs):
    input, offset_mask = make_inputs(1, 2, 2, 1, 2, kernel_size=(1, 2), padding=(0, 1), spread=0.6)

    def function(a, b):
        return dcnv4(a, b, kernel_size=(1, 2), padding=(0, 1), groups=1)

    inputs = input.requires_grad_(), offset_mask.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_of_the_compiled_kernels_output(forced, make_inputs):
    """A gradient penalty in float32: the first derivative is taken with create_graph, whatever computed the output."""
    input, offset_mask = _float32(make_inputs, 1, 4, 4, 1, 3)

    def penalty(function, x, om):
        x, om = x.detach().requires_grad_(), om.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, om, groups=1).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x, om))

    expected = penalty(dcnv4_reference, input.double(), offset_mask.double())
    for mine, exact in zip(penalty(dcnv4, input, offset_mask), expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-3 * exact.abs().max().item())


def test_only_one_input_wants_a_gradient(forced, make_inputs):
    input, offset_mask = _float32(make_inputs, 1, 4, 4, 1, 3)
    _, of_input, of_offset_mask = _with_gradients(dcnv4, input, offset_mask, torch.ones(1, 4, 4, 3), groups=1)
    for wanted, expected in ((0, of_input), (1, of_offset_mask)):
        tensors = [input.clone(), offset_mask.clone()]
        tensors[wanted].requires_grad_()
        dcnv4(*tensors, groups=1).sum().backward()
        torch.testing.assert_close(tensors[wanted].grad, expected)
        assert tensors[1 - wanted].grad is None


def test_transforms_and_forward_mode(make_inputs):
    input, offset_mask = make_inputs(3, 3, 3, 1, 2, spread=0.6)
    of_input = torch.func.grad(lambda x: dcnv4(x, offset_mask, groups=1).square().sum())(input)
    expected = input.clone().requires_grad_()
    dcnv4(expected, offset_mask, groups=1).square().sum().backward()
    torch.testing.assert_close(of_input, expected.grad)
    tangent = torch.randn_like(input)
    _, derivative = torch.func.jvp(lambda x: dcnv4(x, offset_mask, groups=1), (input,), (tangent,))
    torch.testing.assert_close(derivative, dcnv4(tangent, offset_mask, groups=1))  # linear in the input


def test_meta_and_fake_tensors(make_inputs):
    input, offset_mask = _float32(make_inputs, 2, 9, 7, 2, 4, stride=2)
    output = dcnv4(input.to("meta"), offset_mask.to("meta"), stride=2, groups=2)
    assert output.device.type == "meta" and output.shape == (2, 5, 4, 8)


def test_profiler_sees_the_operator(make_inputs):
    input, offset_mask = _float32(make_inputs, 1, 4, 4, 1, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dcnv4(input, offset_mask, groups=1)
    assert "dcngen::dcnv4" in {event.name for event in profile.events()}


def test_export_keeps_the_operator(make_inputs):
    class Layer(torch.nn.Module):
        def forward(self, x, om):
            return dcnv4(x, om, groups=2)

    program = torch.export.export(Layer(), _float32(make_inputs, 2, 5, 6, 2, 4))
    assert torch.ops.dcngen.dcnv4.default in {node.target for node in program.graph.nodes}


def test_autocast_leaves_float64_alone(make_inputs):
    input, offset_mask = make_inputs(1, 4, 5, 2, 4)
    packed = torch.cat([offset_mask, input], -1)
    with torch.autocast("cpu", torch.bfloat16), dcngen.ops.backend("reference"):
        assert dcnv4(input, offset_mask, groups=2).dtype == torch.float64
        assert dcngen.ops.dcnv4_packed(packed, channels=8, groups=2).dtype == torch.float64
