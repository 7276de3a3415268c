"""The blocks that stand where a convolution or an attention stood: shapes, layout, call, checkpointing."""

import pytest
import torch
import torch.nn.functional as F

from dcngen.nn import DCNv4, DCNv4Attention, DCNv4Conv2d, group_channels_for


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "channels, wanted, expected", [(320, 32, 32), (48, 32, 16), (40, 32, 8), (36, 32, 4), (7, 32, 1), (96, 48, 48)]
)
def test_group_channels_halve_until_they_divide(channels, wanted, expected):
    assert group_channels_for(channels, wanted) == expected


def test_group_channels_below_one_are_refused():
    with pytest.raises(ValueError, match="at least one channel"):
        group_channels_for(16, 0)


@pytest.mark.parametrize("kernel_size, stride, padding", [(3, 1, 1), (3, 2, 1), (5, 1, None), (3, 2, 0), (1, 1, 0)])
def test_conv_block_has_the_shape_of_the_convolution(kernel_size, stride, padding):
    block = DCNv4Conv2d(16, 64, kernel_size, stride, padding, mask_init=0.1)
    conv = torch.nn.Conv2d(16, 64, kernel_size, stride, kernel_size // 2 if padding is None else padding)
    x = channels_last(2, 16, 9, 8)
    assert block(x).shape == conv(x).shape
    assert (block.in_channels, block.out_channels) == (16, 64)


@pytest.mark.parametrize("kernel_size, dilation", [(3, 2), (5, 3), ((3, 5), (2, 1)), (1, 4)])
def test_blocks_keep_the_size_without_a_padding(kernel_size, dilation):
    x = channels_last(2, 16, 8, 9)
    assert DCNv4Conv2d(16, 32, kernel_size, dilation=dilation)(x).shape == (2, 32, 8, 9)
    assert DCNv4Attention(16, kernel_size=kernel_size, dilation=dilation)(x).shape == x.shape


def test_blocks_refuse_even_kernels_without_a_padding():
    for build in (lambda: DCNv4Conv2d(16, 16, 2), lambda: DCNv4Attention(16, kernel_size=(3, 4))):
        with pytest.raises(ValueError, match="kernel_size: expected an odd size"):
            build()
    assert DCNv4Conv2d(16, 16, 2, 2, 0)(torch.randn(1, 16, 8, 8)).shape == (1, 16, 4, 4)


@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (1, 4, 4, 16), (16, 4, 4)])
def test_blocks_refuse_maps_of_other_channels(shape):
    for block in (DCNv4Conv2d(16, 16), DCNv4Attention(16)):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\) with C = 16 channels, got .* channels come second"):
            block(torch.randn(shape))


def test_conv_block_copies_nothing_on_channels_last():
    block = DCNv4Conv2d(16, 32, mask_init=0.1)
    x = channels_last(2, 16, 6, 5)
    seen = []
    block.value_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = block(x)
    assert seen[0].is_contiguous() and seen[0].data_ptr() == x.data_ptr()
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x.contiguous()), output)


def test_conv_block_has_the_documented_parameters():
    channels = 256
    block = DCNv4Conv2d(channels, channels, group_channels=32)
    weights = sum(p.numel() for name, p in block.named_parameters() if name.endswith("weight"))
    assert weights == 2 * channels**2 + 27 * 8 * channels
    assert weights / channels**2 == pytest.approx(2.84, abs=0.01)


def test_uniform_masks_start_a_conv_block_as_projected_mean():
    block = DCNv4Conv2d(8, 16, group_channels=8, mask_init=1 / 9)
    x = torch.randn(2, 8, 5, 5)
    value = F.conv2d(x, block.value_proj.weight[:, :, None, None])
    expected = F.conv2d(F.avg_pool2d(value, 3, 1, 1), block.output_proj.weight[:, :, None, None])
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_block_is_norm_operator_residual(randomize):
    norm = torch.nn.GroupNorm(4, 16)
    block = randomize(DCNv4Attention(16, norm, rescale_output_factor=2.0))
    x = channels_last(2, 16, 6, 5)
    inner = block.dcn(norm(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    output = block(x, temb=torch.randn(2, 8))
    torch.testing.assert_close(output, (x + inner) / 2)
    assert isinstance(block.dcn, DCNv4) and output.is_contiguous(memory_format=torch.channels_last)


def test_attention_block_without_norm_and_residual(randomize):
    block = randomize(DCNv4Attention(16, None, residual_connection=False))
    x = torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(block(x), block.dcn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("kwargs", [{"encoder_hidden_states": torch.zeros(1)}, {"attention_mask": torch.zeros(1)}])
def test_attention_block_refuses_what_it_cannot_do(kwargs):
    with pytest.raises(ValueError, match="self-attention without a mask"):
        DCNv4Attention(16)(torch.randn(1, 16, 4, 4), **kwargs)


def test_attention_block_refuses_sequences():
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        DCNv4Attention(16)(torch.randn(1, 16, 4))


def test_attention_block_honours_gradient_checkpointing(randomize):
    block = randomize(DCNv4Attention(16, torch.nn.GroupNorm(4, 16)))
    x = channels_last(2, 16, 6, 5).requires_grad_()
    expected = torch.autograd.grad(block(x).square().sum(), x)[0]
    calls = []

    def checkpoint(module, *args):
        calls.append(module)
        return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=False)

    block.gradient_checkpointing, block._gradient_checkpointing_func = True, checkpoint
    torch.testing.assert_close(torch.autograd.grad(block(x).square().sum(), x)[0], expected)
    assert calls == [block.dcn]
    with torch.no_grad():
        block(x)
    assert len(calls) == 1
