"""Wrong calls: the right exception, saying what was expected, what came, and what to do."""

import pytest
import torch

from dcngen.ops import dcnv4, dcnv4_reference, offset_mask_channels

INPUT, OFFSET_MASK = torch.zeros(2, 5, 6, 8), torch.zeros(2, 5, 6, 56)

WRONG_CALLS = {
    "not a tensor": ([INPUT.numpy(), OFFSET_MASK], {}, TypeError, "input.*torch.Tensor.*ndarray"),
    "integers": ([INPUT.int(), OFFSET_MASK.int()], {}, TypeError, "float32.*got torch.int32"),
    "two dtypes": ([INPUT, OFFSET_MASK.half()], {}, TypeError, "torch.float32.*got torch.float16.*autocast"),
    "two devices": ([INPUT, OFFSET_MASK.to("meta")], {}, ValueError, "device of input, cpu, got meta"),
    "three dimensions": ([INPUT[0], OFFSET_MASK], {}, ValueError, r"input: expected 4 dimensions.*\(5, 6, 8\)"),
    "flat offset_mask": ([INPUT, OFFSET_MASK.flatten(1, 2)], {}, ValueError, "offset_mask: expected 4 dimensions"),
    "groups": ([INPUT, OFFSET_MASK], {"groups": 3}, ValueError, r"groups=3 divides, got 8.*permute"),
    "no groups": ([INPUT, OFFSET_MASK], {"groups": 0}, ValueError, "groups: expected at least 1, got 0"),
    "fractional groups": ([INPUT, OFFSET_MASK], {"groups": 2.0}, TypeError, "groups: expected an int, got 2.0"),
    "map size": ([INPUT, OFFSET_MASK], {"stride": 2}, ValueError, r"expected \(2, 3, 3, 56\).*got \(2, 5, 6, 56\)"),
    "channels": ([INPUT, OFFSET_MASK[..., :48]], {}, ValueError, r"expected \(2, 5, 6, 56\).*offset_mask_channels"),
    "many channels": ([INPUT, torch.zeros(2, 5, 6, 64)], {}, ValueError, r"got \(2, 5, 6, 64\)"),
    "batch": ([INPUT[:1], OFFSET_MASK], {}, ValueError, r"expected \(1, 5, 6, 56\)"),
    "no pixels": ([INPUT[:, :0], OFFSET_MASK], {}, ValueError, "at least one pixel"),
    "too small": ([INPUT[:, :1], OFFSET_MASK], {"padding": 0}, ValueError, "1x6 map is too small.*more padding"),
    "kernel of floats": ([INPUT, OFFSET_MASK], {"kernel_size": 3.0}, TypeError, "kernel_size: expected an int or"),
    "three strides": ([INPUT, OFFSET_MASK], {"stride": (1, 1, 1)}, TypeError, r"stride: .*got \(1, 1, 1\)"),
    "stride 0": ([INPUT, OFFSET_MASK], {"stride": 0}, ValueError, "stride: expected at least 1"),
    "negative padding": ([INPUT, OFFSET_MASK], {"padding": -1}, ValueError, "padding: expected at least 0"),
    "scale of text": ([INPUT, OFFSET_MASK], {"offset_scale": "1.0"}, TypeError, "expected a number, got '1.0'"),
    "infinite scale": ([INPUT, OFFSET_MASK], {"offset_scale": float("inf")}, ValueError, "finite number, got inf"),
    "even centre": (
        [INPUT, OFFSET_MASK],
        {"kernel_size": 2, "remove_center": True},
        ValueError,
        "odd kernel sizes.*remove_center=False",
    ),
    "only a centre": ([INPUT, OFFSET_MASK], {"kernel_size": 1, "remove_center": True}, ValueError, "no other tap"),
}


@pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")
def test_a_plan_for_right_tensors_does_not_serve_wrong_ones():
    """Tensors of the meta device have the shapes, strides and device index of CPU tensors, and no memory."""
    dcnv4(INPUT, OFFSET_MASK, groups=2)
    for tensors in ((INPUT, OFFSET_MASK.to("meta")), (INPUT.to("meta"), OFFSET_MASK)):
        with pytest.raises(ValueError, match="device"):
            dcnv4(*tensors, groups=2)
    with pytest.raises(TypeError, match="dtype"):
        dcnv4(INPUT, OFFSET_MASK.bfloat16(), groups=2)


@pytest.mark.filterwarnings("ignore::dcngen.ops.FallbackWarning")
@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.parametrize("function", [dcnv4, dcnv4_reference])
def test_message(function, name):
    tensors, arguments, kind, message = WRONG_CALLS[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        function(*tensors, **{"groups": 2, **arguments})


def test_message_under_compile_names_the_shapes():
    compiled = torch.compile(lambda x, om: dcnv4(x, om, groups=2), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"expected \(2, 5, 6, 56\)"):
        compiled(INPUT, OFFSET_MASK[:, :4])


def test_offset_mask_channels_checks_its_arguments():
    with pytest.raises(ValueError, match="groups"):
        offset_mask_channels(0)
    with pytest.raises(TypeError, match="kernel_size"):
        offset_mask_channels(2, "3")
