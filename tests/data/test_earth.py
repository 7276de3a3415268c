import numpy as np
import pytest

from dcngen.data import earth


@pytest.fixture
def scene():
    """64 x 256 pixels: relief sea, a shore, forest, desert, from left to right."""
    generator = np.random.default_rng(0)
    colours = {"ocean": (6, 24, 60), "vegetation": (40, 60, 20), "arid": (170, 140, 100)}
    names = ["ocean", "ocean", "vegetation", "arid"]
    picture = np.concatenate([np.broadcast_to(colours[name], (64, 64, 3)) for name in names], axis=1)
    waves = generator.normal(0, 12, (64, 256, 1)) * np.array([0.5, 0.8, 1.2])
    return np.clip(picture + waves, 0, 255).astype(np.uint8)


def test_colour_rule_finds_the_four_classes(scene):
    tops, lefts, classes = earth.classify_patches(scene, 32, 16)
    found = {int(left): earth.CLASS_NAMES[c] for left, top, c in zip(lefts, tops, classes, strict=True) if top == 0}
    assert found[0] == found[64] == "ocean"
    assert found[112] == "coast"
    assert found[144] == "vegetation"
    assert found[224] == "arid"


def test_flat_water_and_snow_are_left_out():
    flat_water = np.broadcast_to(np.uint8([2, 5, 20]), (32, 32, 3))
    snow = np.broadcast_to(np.uint8([230, 232, 235]), (32, 32, 3))
    for picture in (flat_water, snow):
        assert earth.classify_patches(picture, 32, 16)[2].tolist() == [-1]


def test_splits_share_no_pixel(scene, monkeypatch):
    monkeypatch.setattr(earth, "NUM_BANDS", 4)
    columns = {}
    for split in ("train", "held-out"):
        source = earth.EarthSource("unused", 16, split)
        source.__dict__["picture"] = scene
        _, lefts, _ = source.patches
        assert len(source) == len(lefts) > 0
        columns[split] = {int(left) + offset for left in lefts for offset in range(16)}
        assert source.read(0).shape == (16, 16, 3)
    assert not columns["train"] & columns["held-out"]


def test_wrong_file_is_refused(tmp_path):
    path = tmp_path / "bmng.jpg"
    path.write_bytes(b"not the Blue Marble")
    with pytest.raises(RuntimeError, match=r"sha256.*expected.*\n.*remedy"):
        earth.blue_marble_path(tmp_path, str(path))
    with pytest.raises(FileNotFoundError, match="not a file"):
        earth.blue_marble_path(tmp_path, str(tmp_path / "absent.jpg"))
