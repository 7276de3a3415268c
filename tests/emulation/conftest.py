import platform

import pytest


@pytest.fixture(scope="session")
def emulated(pytestconfig, tmp_path_factory):
    """The CUDA kernels on the CPU, as of sm_90."""
    return _emulated(90, pytestconfig, tmp_path_factory)


@pytest.fixture(scope="session")
def emulated_sm_86(pytestconfig, tmp_path_factory):
    """As of sm_86, which has neither the bulk copy engine nor more than 99 KB of shared memory a block."""
    return _emulated(86, pytestconfig, tmp_path_factory)


def _emulated(architecture: int, pytestconfig, tmp_path_factory):
    """Compiled once for what the sources are, and kept where pytest keeps things."""
    if platform.system() != "Linux":
        pytest.skip("the emulation of the CUDA kernels is made for Linux")
    from emulation import library
    from emulation.helpers import Emulated

    if library.compiler() is None:
        pytest.skip("no C++ compiler on this machine: the CUDA kernels cannot be emulated")
    kept, name = hasattr(pytestconfig, "cache"), f"emulation_sm_{architecture}"  # not with -p no:cacheprovider
    folder = pytestconfig.cache.mkdir(name) if kept else tmp_path_factory.mktemp(name)
    return Emulated(library.load(library.build(folder, architecture)))
