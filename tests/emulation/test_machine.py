"""The emulation itself: that it shows mistakes, in a kernel that makes them, how it rounds, and the translation."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from emulation.helpers import ORDERS
from emulation.translate import TranslationError, translate

# In the order of the mistakes in machine_test.cu, with the error of each; None where the result is wrong instead.
_RACE = "(reads in shared memory what is written|writes to shared memory what is read) by thread .*, and no barrier is"
ERRORS = {
    "too few at a barrier": "threads wait for others that never come: 48 at __syncthreads, 16 at __syncwarp",
    "two places of a warp": "lanes of a warp meet at different places: (__any_sync|__syncwarp) and (__any_|__sync)",
    "a lane that ended": "it ended, but its warp waits for it at __shfl|__shfl_xor_sync for lane 8, which has ended",
    "outside": "an access of 4 bytes at shared address 2048: the block has 1024 bytes",
    "outside by pointer": "shared memory was written outside what the block has",
    "misaligned": "an access of 16 bytes at shared address 1032, not a multiple of 16",
    "never written": None,
    "no wait for a copy": None,
    "no barrier after writes": None,
    "no __syncwarp after writes": None,
    "a barrier of no copy": "threads wait for others that never come: 64 at a barrier of the copy engine",
    "no wait for a box": "a block ended while the copy engine was still writing",
    "no wait for a store": "a thread ended before the copy engine had read",
    "global memory outside": "an access of 16 bytes in global memory, outside every tensor",
    "global memory at a wrong alignment": "an access of 16 bytes in global memory, not at a multiple of 16",
    "too much shared memory": "invalid launch",
    "memory that is not there": "thread 5: an access of memory at 0x1000",
    "endless recursion": "an access of memory at",
    "read in a warp": _RACE,
    "read in a block": _RACE,
    "write after read": _RACE,
    "no fence": "the copy engine stores what thread 9 wrote without a fence after it",
}


@pytest.fixture
def run_mistake(emulated):
    """run_mistake(number) -> the errors and the results in each order of threads."""
    library = emulated.library
    library.emulation_mistake.restype = ctypes.c_char_p
    library.emulation_mistake.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    numbers = torch.arange(64, dtype=torch.float32)

    def run(mistake):
        errors, results = [], []
        for order in range(ORDERS):
            result = torch.full((1,), float("nan"))
            library.emulation_order(order)
            library.emulation_announce(numbers.data_ptr(), 256)
            errors.append(library.emulation_mistake(numbers.data_ptr(), result.data_ptr(), mistake).decode())
            library.emulation_forget()
            results.append(result.item())
        return errors, results

    return run


def test_without_a_mistake(run_mistake):
    assert run_mistake(0) == ([""] * ORDERS, [2016.0] * ORDERS)


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_show(run_mistake, name):
    errors, results = run_mistake(1 + list(ERRORS).index(name))
    if ERRORS[name] is None:
        assert errors == [""] * ORDERS and any(result != 2016.0 for result in results)
    else:
        for error in errors:
            assert re.search(ERRORS[name], error), error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_sixteen_bits(emulated, dtype):
    """Every number of the type, the floats next to it and in the middle between it and the next one."""
    library = emulated.library
    library.emulation_round.restype = None
    library.emulation_round.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool]
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
    around = [middle, *(torch.nextafter(middle, torch.full_like(middle, to)) for to in (-float("inf"), float("inf")))]
    values, got = torch.cat(around), torch.empty(3 * len(middle), dtype=dtype)
    library.emulation_round(values.data_ptr(), got.data_ptr(), len(values), dtype == torch.float16)
    torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert (got[values.isnan()].view(torch.int16) == 0x7FFF).all()


def test_translation_of_an_asm_statement():
    source = """
  asm volatile("{\\n"
               ".reg .pred counts;\\n"
               "setp.ne.b32 counts, %2, 0;\\n"
               "@!counts ld.shared::cta.v2.b32 {%0,%1}, [%3];\\n"
               "}\\n" : "=r"(v.x), "=r"(f(")", 1)) : "r"(n ? a::b : 0), "l"(from) : "memory");
  int line;
"""
    got = translate(source, "a.cuh").splitlines()
    assert got[0] == '#line 1 "a.cuh"'
    assert got[2] == (
        "  do { bool counts_0 = false; ::emulation::ptx::setp_ne_b32(counts_0, (n ? a::b : 0), 0); if (!counts_0) "
        '::emulation::ptx::ld_shared_cta_v2_b32((v.x), (f(")", 1)), (from)); } while (false)'
    )
    assert got[7] == "  int line;"


@pytest.mark.parametrize("source", ['asm("$weird");', "__shared__ int a, b;", "kernel_of(x)<<<1, 2>>>(y);"])
def test_what_cannot_be_translated_is_an_error(source):
    with pytest.raises(TranslationError, match=r"a\.cuh, line 2"):
        translate("\n" + source, "a.cuh")
