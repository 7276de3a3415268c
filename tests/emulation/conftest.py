import platform

import pytest


@pytest.fixture(scope="session")
def emulated(pytestconfig):
    """The CUDA kernels on the CPU. Compiled once for what the sources are, and kept where pytest keeps things."""
    if platform.system() != "Linux":
        pytest.skip("the emulation of the CUDA kernels is made for Linux")
    from emulation import library
    from emulation.helpers import Emulated

    if library.compiler() is None:
        pytest.skip("no C++ compiler on this machine: the CUDA kernels cannot be emulated")
    return Emulated(library.load(library.build(pytestconfig.cache.mkdir("emulation"))))
