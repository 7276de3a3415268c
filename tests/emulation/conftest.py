import platform

import pytest


@pytest.fixture(scope="session")
def emulated(pytestconfig, tmp_path_factory):
    """The CUDA kernels on the CPU. Compiled once for what the sources are, and kept where pytest keeps things."""
    if platform.system() != "Linux":
        pytest.skip("the emulation of the CUDA kernels is made for Linux")
    from emulation import library
    from emulation.helpers import Emulated

    if library.compiler() is None:
        pytest.skip("no C++ compiler on this machine: the CUDA kernels cannot be emulated")
    kept = hasattr(pytestconfig, "cache")  # not with -p no:cacheprovider
    folder = pytestconfig.cache.mkdir("emulation") if kept else tmp_path_factory.mktemp("emulation")
    return Emulated(library.load(library.build(folder)))
