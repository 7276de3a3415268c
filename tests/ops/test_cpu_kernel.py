"""The compiled CPU kernels, called through their C interface, against the reference in float64.

Offsets lie on a lattice of 1/64 pixel, where the float32 coordinates are exact: the derivative of a bilinear sample
jumps at whole coordinates, and there the two sides must agree, too.
"""

import ctypes
import os
import shutil
import signal
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcngen.ops import dcnv4_reference, native, offset_mask_channels

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALVES = (torch.float16, torch.bfloat16)
MAX_THREADS = 4


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def pixel_stride(tensor):
    return tensor.stride(2)


class Case:
    """One call: its tensors, and what the C interface wants to know about them; outputs are poisoned with NaN."""

    def __init__(
        self,
        batch=2,
        size=(7, 6),
        groups=2,
        group_channels=16,
        kernel_size=3,
        stride=1,
        padding=1,
        dilation=1,
        offset_scale=1.0,
        remove_center=False,
        softmax=False,
        spread=1.5,
        dtype=torch.float32,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.arguments = dict(
            kernel_size=pair(kernel_size),
            stride=pair(stride),
            padding=pair(padding),
            dilation=pair(dilation),
            groups=groups,
            offset_scale=offset_scale,
            remove_center=remove_center,
            softmax=softmax,
        )
        self.groups, self.group_channels = groups, group_channels
        self.taps = pair(kernel_size)[0] * pair(kernel_size)[1] - remove_center
        sizes = zip(size, *(pair(v) for v in (padding, dilation, kernel_size, stride)), strict=True)
        size_out = [(n + 2 * p - (d * (k - 1) + 1)) // s + 1 for n, p, d, k, s in sizes]
        channels = offset_mask_channels(groups, kernel_size, remove_center)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.input = normal(batch, *size, groups * group_channels).to(dtype)
        self.offset_mask = ((normal(batch, *size_out, channels) * spread * 64).round() / 64).to(dtype)
        self.grad_output = normal(batch, *size_out, groups * group_channels).to(dtype)
        self.new_outputs()

    def new_outputs(self):
        self.output = torch.full_like(self.grad_output, float("nan"))
        self.grad_input = torch.full_like(self.input, float("nan"))
        self.grad_offset_mask = torch.full_like(self.offset_mask, float("nan"))

    def group(self, g):
        """The channels of group g: a view (N, H_out, W_out, 3 * taps) of offset_mask."""
        return self.offset_mask[..., 3 * self.taps * g : 3 * self.taps * (g + 1)]

    def params(self):
        values = self.arguments
        of_pairs = (values[name] for name in ("kernel_size", "stride", "padding", "dilation"))
        return native.DCNv4Params(
            *self.input.shape[:3],
            *self.output.shape[1:3],
            *map(pixel_stride, (self.input, self.offset_mask, self.output, self.grad_input, self.grad_offset_mask)),
            self.offset_mask.shape[3],
            self.groups,
            self.group_channels,
            *(n for one in of_pairs for n in one),
            values["offset_scale"],
            values["remove_center"],
            values["softmax"],
            DTYPE_CODES[self.input.dtype],
            1,
        )

    def run(self, library, threads=1):
        """Forward and backward; returns (output, grad_input, grad_offset_mask)."""
        params = self.params()
        address = ctypes.addressof(params)
        inputs = [t.data_ptr() for t in (self.input, self.offset_mask)]
        grads = [t.data_ptr() for t in (self.grad_input, self.grad_offset_mask)]
        failed = library.dcngen_cpu_dcnv4_forward(address, *inputs, self.output.data_ptr(), threads)
        assert not failed, library.dcngen_cpu_last_error().decode()
        failed = library.dcngen_cpu_dcnv4_backward(address, self.grad_output.data_ptr(), *inputs, *grads, threads)
        assert not failed, library.dcngen_cpu_last_error().decode()
        return self.output, self.grad_input, self.grad_offset_mask

    def reference(self, dtype=torch.float64):
        """The same three by dcnv4_reference and autograd."""
        input = self.input.detach().to(dtype).requires_grad_()
        offset_mask = self.offset_mask.detach().to(dtype).requires_grad_()
        output = dcnv4_reference(input, offset_mask, **self.arguments)
        grads = torch.autograd.grad(output, (input, offset_mask), self.grad_output.to(dtype))
        return output.detach(), *grads


def relative_error(got, expected):
    if not expected.numel():
        return 0.0
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)).item()


def assert_close(case, library, threads=1, tolerance=1e-5):
    names = ("output", "grad_input", "grad_offset_mask")
    for name, got, expected in zip(names, case.run(library, threads), case.reference(), strict=True):
        error = relative_error(got, expected)
        assert error <= tolerance, f"{name}: relative error {error:.2e} for {case.arguments}"  # NaN fails, too


@pytest.fixture(scope="module")
def library():
    try:
        return native.cpu_library()
    except native.NativeLibraryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["baseline", "avx2", "avx512"])
def isa_library(request, library, tmp_path_factory):
    """The library held to one instruction set. A copy of the file is a library of its own, which chooses afresh."""
    path = shutil.copy(library._name, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCNGEN_CPU_ISA", request.param)
        held = ctypes.CDLL(path)
        for name, (result, arguments) in native._SIGNATURES["cpu"].items():
            function = getattr(held, name)
            function.restype, function.argtypes = result, arguments
        chosen = held.dcngen_cpu_isa().decode()
    if chosen != request.param and (chosen, request.param) != ("neon", "baseline"):
        pytest.skip(f"this machine runs {chosen}, not {request.param}")
    return held


GEOMETRIES = [
    pytest.param(dict(batch=4, size=(7, 7), groups=8), id="odd-size-batch-4"),
    pytest.param(dict(batch=3, size=(13, 9), groups=1, group_channels=32), id="13x9"),
    pytest.param(dict(size=(1, 1), batch=3), id="1x1"),
    pytest.param(dict(size=(1, 70), groups=1, group_channels=8), id="one-long-row"),
    pytest.param(dict(stride=2, size=(9, 8)), id="stride-2"),
    pytest.param(dict(kernel_size=5, padding=2, size=(9, 8)), id="kernel-5"),
    pytest.param(dict(kernel_size=7, padding=3, dilation=2, size=(11, 12), groups=1), id="kernel-7-dilated"),
    pytest.param(dict(kernel_size=1, padding=0), id="kernel-1"),
    pytest.param(dict(kernel_size=4, padding=1), id="even-kernel"),
    pytest.param(dict(kernel_size=(3, 5), stride=(2, 1), padding=(0, 3), dilation=(1, 2)), id="axes-differ"),
    pytest.param(dict(remove_center=True, softmax=True, offset_scale=2.0), id="softmax-without-center"),
    pytest.param(dict(offset_scale=0.5, spread=8.0), id="half-scale-wide-offsets"),
    pytest.param(dict(size=(3, 3), groups=40, group_channels=32), id="1280-channels"),
    pytest.param(dict(padding=5), id="padding-wider-than-kernel"),
]


@pytest.mark.parametrize("options", GEOMETRIES)
def test_geometries_match_reference(library, options):
    assert_close(Case(**options), library)


@pytest.mark.parametrize("group_channels", [1, 3, 8, 16, 24, 48, 64, 100, 203])
def test_every_group_width_matches_on_every_instruction_set(isa_library, group_channels):
    assert_close(Case(group_channels=group_channels, size=(6, 11)), isa_library)
    assert_close(Case(group_channels=group_channels, size=(5, 5), softmax=True, kernel_size=5, spread=4.0), isa_library)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    options=st.fixed_dictionaries(
        dict(
            batch=st.integers(1, 3),
            size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
            groups=st.integers(1, 4),
            group_channels=st.sampled_from([1, 2, 5, 8, 16, 24, 33, 64]),
            kernel_size=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([3, 5, 7])),
            stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
            dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
            offset_scale=st.sampled_from([1.0, 0.5, 2.0, 1.25]),
            remove_center=st.booleans(),
            softmax=st.booleans(),
            spread=st.sampled_from([0.0, 0.5, 1.0, 3.0, 100.0]),
            seed=st.integers(0, 1000),
        )
    ),
    extra_padding=st.integers(0, 2),
    threads=st.integers(1, MAX_THREADS),
)
def test_random_calls_match_reference(library, options, extra_padding, threads):
    # At least "same" padding, so that the kernel fits whatever the size.
    padding = tuple(
        d * (k - 1) // 2 + extra_padding for d, k in zip(options["dilation"], options["kernel_size"], strict=True)
    )
    assert_close(Case(padding=padding, **options), library, threads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group_channels", [3, 16, 40])
def test_halves_err_at_most_twice_as_much_as_plain_torch(isa_library, dtype, group_channels):
    case = Case(group_channels=group_channels, size=(9, 7), softmax=group_channels == 40, dtype=dtype)
    names = ("output", "grad_input", "grad_offset_mask")
    of_three = zip(names, case.run(isa_library), case.reference(dtype), case.reference(), strict=True)
    for name, got, plain, exact in of_three:
        ours, theirs = relative_error(got, exact), relative_error(plain, exact)
        assert ours <= 2 * theirs, f"{name}: error {ours:.2e}, plain torch {theirs:.2e}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_and_rounded_as_torch_does(isa_library, dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).clone()
    case = Case(batch=1, size=(1, 1), groups=1, group_channels=2**16, kernel_size=1, padding=0, dtype=dtype)
    case.input.copy_(every.view_as(case.input))
    for mask in (1.0, 1 / 3, 2.0**-12):
        case.offset_mask.copy_(torch.tensor([0, 0, mask, 0, 0, 0, 0, 0]).view_as(case.offset_mask))
        output, _, _ = case.run(isa_library)
        expected = (every.float() * case.offset_mask.flatten()[2].float()).to(dtype)
        torch.testing.assert_close(output.flatten(), expected, rtol=0, atol=0, equal_nan=True)


def test_a_place_at_minus_one_or_at_the_size_does_not_count(library):
    case = Case(batch=1, size=(4, 5), groups=1, spread=0.0)
    masks = case.group(0)[..., 18:]
    masks.fill_(1.0)
    _, _, grad_offset_mask = case.run(library)
    # With zero offsets, taps of the border pixels lie exactly at -1, W and H: their three gradients are 0.
    by_tap = lambda k: grad_offset_mask[..., [2 * k, 2 * k + 1, 18 + k]]  # noqa: E731
    for i in range(3):
        for j in range(3):
            grads = by_tap(3 * i + j)[0]
            x = torch.arange(5) + i - 1
            y = torch.arange(4) + j - 1
            counts = ((x > -1) & (x < 5))[None, :] & ((y > -1) & (y < 4))[:, None]
            assert (grads[~counts] == 0).all()
            assert (grads[counts][:, 2] != 0).all()
    assert_close(case, library)


@pytest.mark.parametrize("coordinate", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3e9, -3e9, 1e5])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_and_nan_places_touch_nothing(library, coordinate, axis):
    case = Case(batch=1, size=(6, 5), groups=2)
    offsets = case.group(1)[..., :18]
    offsets[..., axis::2] = coordinate
    case.group(1)[..., 18:] = float("nan")  # nor do their masks
    case.input[..., 16:] = float("nan")  # nor what lies in the image
    output, grad_input, grad_offset_mask = case.run(library)
    assert (output[..., 16:] == 0).all()
    assert (grad_input[..., 16:] == 0).all()
    assert (grad_offset_mask[..., 27:] == 0).all()
    case.input[..., 16:] = 0.0
    for got, expected in zip((output, grad_input, grad_offset_mask), case.reference(), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_places_outside_carry_no_infinite_gradient(isa_library):
    case = Case(batch=1, size=(6, 5), groups=2)
    case.group(1)[..., :18] = 50.0
    case.grad_output[..., 16:] = float("inf")
    output, grad_input, grad_offset_mask = case.run(isa_library)
    assert (output[..., 16:] == 0).all()
    assert (grad_input[..., 16:] == 0).all()
    assert (grad_offset_mask[..., 27:] == 0).all()
    assert grad_input.isfinite().all() and grad_offset_mask.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_an_input_without_pixels_gives_zeros(library, threads):
    case = Case(batch=2, size=(0, 40), groups=2, padding=3, spread=4.0)
    output, grad_input, grad_offset_mask = case.run(library, threads)
    assert output.numel() and (output == 0).all()
    assert (grad_offset_mask == 0).all()
    assert not grad_input.numel()


def test_softmax_of_large_and_infinite_logits(library):
    case = Case(softmax=True)
    case.group(0)[..., 18:] *= 200
    case.group(1)[..., 20] = float("-inf")
    assert_close(case, library)


def test_padding_channels_get_zero_gradients(library):
    case = Case(groups=3)
    assert case.offset_mask.shape[3] > 81
    case.offset_mask[..., 81:] = float("nan")  # and are never read
    _, _, grad_offset_mask = case.run(library)
    assert (grad_offset_mask[..., 81:] == 0).all()
    assert grad_offset_mask.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_slices_of_wider_tensors(library, dtype):
    case = Case(groups=3, group_channels=8, dtype=dtype)
    expected = [t.clone() for t in case.run(library)]
    names = ("input", "offset_mask", "grad_output", "output", "grad_input", "grad_offset_mask")
    frames = {}
    for margin, name in enumerate(names, start=1):
        tensor = getattr(case, name)
        if name == "output":
            margin = frames["grad_output"].shape[3] - tensor.shape[3] - 1  # one stride stands for both
        frames[name] = torch.full((*tensor.shape[:3], tensor.shape[3] + margin + 1), 7.0, dtype=dtype)
        inner = frames[name][..., 1 : 1 + tensor.shape[3]]
        setattr(case, name, inner.copy_(tensor) if name in names[:3] else inner)
    for got, wanted in zip(case.run(library, 2), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    for name, frame in frames.items():
        width = getattr(case, name).shape[3]
        assert (frame[..., 0] == 7).all() and (frame[..., 1 + width :] == 7).all(), f"{name}: wrote beside its slice"


def test_zero_batch(library):
    assert_close(Case(batch=0), library, threads=2)


@pytest.mark.parametrize(
    "options",
    [
        dict(batch=1, size=(48, 40), groups=1, group_channels=72),  # fewer groups than threads: cut by channels
        dict(batch=2, size=(20, 40), groups=3, group_channels=20),
        dict(batch=9, size=(9, 9), groups=4),
        dict(batch=1, size=(48, 40), groups=1, group_channels=72, dtype=torch.bfloat16),
    ],
)
def test_results_do_not_depend_on_the_number_of_threads(library, options):
    case = Case(**options)
    first = [t.clone() for t in case.run(library, threads=1)]
    for threads in (2, 3, 16, 0):
        case.new_outputs()
        for got, expected in zip(case.run(library, threads), first, strict=True):
            assert torch.equal(got, expected), f"{threads} threads"


def test_calls_from_several_threads_at_once(library):
    cases = [Case(batch=1, size=(30, 30), groups=4, seed=seed) for seed in range(4)]
    expected = [[t.clone() for t in case.run(library)] for case in cases]

    def repeat(case):
        for _ in range(5):
            case.new_outputs()
            case.run(library, 2)

    callers = [threading.Thread(target=repeat, args=(case,)) for case in cases]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for case, wanted in zip(cases, expected, strict=True):
        assert all(map(torch.equal, (case.output, case.grad_input, case.grad_offset_mask), wanted))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_in_a_forked_process(library):
    case = Case(batch=2, size=(30, 30), groups=4)
    expected = case.run(library, 2)[0].numpy().tobytes()
    case.new_outputs()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs ends with a signal, which the parent sees
        os._exit(0 if case.run(library, 2)[0].numpy().tobytes() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("offset_mask_channels", 8, "expected offset_mask_channels of at least 3 * groups * taps, got 8"),
        ("height_out", 9, "expected height_out"),
        ("kernel_h", 0, "expected kernel sizes, strides and dilations of at least 1"),
        ("kernel_w", 1000, "expected at most 144 taps"),
        ("groups", 0, "expected groups of at least 1, got 0"),
        ("dtype", 9, "expected a dcngen_dtype, got 9"),
        ("input_pixel_stride", 31, "expected input_pixel_stride of at least the channels, got 31"),
        ("width_in", 2**31, "expected heights and widths"),
    ],
)
def test_bad_parameters_are_refused_with_a_message(library, field, value, message):
    case = Case()
    params = case.params()
    setattr(params, field, value)
    pointers = (case.input.data_ptr(), case.offset_mask.data_ptr(), case.output.data_ptr())
    assert library.dcngen_cpu_dcnv4_forward(ctypes.addressof(params), *pointers, 1) != 0
    assert message in library.dcngen_cpu_last_error().decode()
    assert case.output.isnan().all()
