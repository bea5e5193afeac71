"""Laws of the codecs: how far a decoded value may be off, the bytes of a payload, and that packing is lossless."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distri.core.codec import Codec, payload_bytes
from distri.nn import codec as codec_module
from distri.nn.codec import channels_last, decode, encode, restore

CODED = [codec for codec in Codec if codec is not Codec.NONE]
INTEGER = [codec for codec in CODED if codec is not Codec.FP8]
TINY = 2.0**-120

seeds = st.integers(0, 2**31 - 1)
channels = st.integers(1, 5)
lengths = st.integers(1, 37)
magnitudes = st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 300.0, 6e4])


def drawn(seed, num_channels, length, magnitude):
    """Channels of very different sizes, some of them with one outlier."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_channels, length, generator=generator) * magnitude
    values *= 10.0 ** torch.randint(-3, 1, (num_channels, 1), generator=generator)
    values[:, 0] *= torch.randint(1, 3, (num_channels,), generator=generator)
    return values


def scales_of(codec, payload, num_channels):
    return payload[-2 * num_channels :].clone().view(torch.bfloat16).float()[:, None]


@pytest.mark.parametrize("codec", INTEGER)
@given(seed=seeds, num_channels=channels, length=lengths, magnitude=magnitudes)
def test_an_integer_codec_is_off_by_half_a_scale_at_most(codec, seed, num_channels, length, magnitude):
    values = drawn(seed, num_channels, length, magnitude)
    payload = encode(codec, values)
    error = (decode(codec, payload, num_channels, length) - values).abs()
    assert torch.all(error <= 0.5 * (1 + 2**-20) * scales_of(codec, payload, num_channels) + TINY)


@pytest.mark.parametrize("codec", CODED)
@given(seed=seeds, num_channels=channels, length=lengths, magnitude=magnitudes)
def test_a_scale_is_a_channels_largest_value_over_the_largest_code(
    codec, seed, num_channels, length, magnitude
):
    """To the rounding of bfloat16; channels do not disturb each other."""
    values = drawn(seed, num_channels, length, magnitude)
    largest = codec_module.FP8_MAX if codec is Codec.FP8 else 2 ** (codec.bits - 1) - 1
    scales = scales_of(codec, encode(codec, values), num_channels)
    wanted = values.abs().amax(dim=1, keepdim=True) / largest
    assert torch.all((scales - wanted).abs() <= 2**-8 * wanted + TINY)


@given(seed=seeds, num_channels=channels, length=lengths, magnitude=magnitudes)
def test_fp8_is_off_by_a_sixteenth_of_the_value_at_most(seed, num_channels, length, magnitude):
    """Three bits of mantissa; below the normal range, by half of the smallest step."""
    values = drawn(seed, num_channels, length, magnitude)
    payload = encode(Codec.FP8, values)
    error = (decode(Codec.FP8, payload, num_channels, length) - values).abs()
    assert torch.all(error <= values.abs() / 16 + 2**-10 * scales_of(Codec.FP8, payload, num_channels) + TINY)


@pytest.mark.parametrize("codec", CODED)
@given(seed=seeds, num_channels=channels, length=lengths)
def test_a_payload_has_exactly_the_bytes_that_the_plan_counts(codec, seed, num_channels, length):
    payload = encode(codec, drawn(seed, num_channels, length, 1.0))
    assert payload.dtype == torch.uint8
    assert payload.numel() == payload_bytes(codec, num_channels * length, num_channels, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(data=st.data(), num_channels=channels, length=lengths)
def test_packing_and_unpacking_is_the_identity(bits, data, num_channels, length):
    integer = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    row = st.lists(integer, min_size=length, max_size=length)
    rows = data.draw(st.lists(row, min_size=num_channels, max_size=num_channels))
    integers = torch.tensor(rows, dtype=torch.int16)
    packed = codec_module._pack(integers, bits)
    assert packed.shape == (num_channels, -(-length * bits // 8))
    assert torch.equal(codec_module._unpack(packed, bits)[:, :length], integers)


@pytest.mark.parametrize("codec", CODED)
@given(num_channels=channels, length=lengths)
def test_zeros_are_exact(codec, num_channels, length):
    zeros = torch.zeros(num_channels, length)
    assert torch.equal(decode(codec, encode(codec, zeros), num_channels, length), zeros)


@pytest.mark.parametrize("codec", INTEGER)
@given(seed=seeds, num_channels=channels, length=lengths)
def test_what_was_decoded_is_coded_exactly(codec, seed, num_channels, length):
    """Whole multiples of a scale are on the grid: coding a second time changes nothing."""
    once = decode(codec, encode(codec, drawn(seed, num_channels, length, 1.0)), num_channels, length)
    twice = decode(codec, encode(codec, once), num_channels, length)
    assert torch.allclose(once, twice, rtol=2**-7)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (6, 2, 3), (1, 1, 4)])
def test_parts_become_channels_and_come_back(shape):
    part = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = channels_last(part)
    assert torch.equal(restore(values, part.shape), part)
    if len(shape) == 4:
        assert torch.equal(values[shape[1] * (shape[0] - 1)], part[-1, 0].reshape(-1))
    else:
        assert torch.equal(values[-1], part[:, -1, -1])
