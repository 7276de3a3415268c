import dataclasses
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dcngen.data import DataConfig, open_images
from dcngen.data.images import LazyPixels, evenly_over_classes, to_square


def config_for(root, tmp_path, **options):
    return DataConfig(name=str(root), image_size=8, cache_dir=str(tmp_path / "cache"), **options)


def test_folder_has_sorted_classes_and_both_splits(image_folder, tmp_path):
    config = config_for(image_folder, tmp_path)
    train = open_images(config, progress=False)
    reference = open_images(config, "reference", progress=False)
    assert train.class_names == reference.class_names == ["cat", "dog"]
    assert train.class_counts == [5, 3] and reference.class_counts == [2, 2]
    assert reference.split == "held-out"
    image, label = train[5]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and label == 1
    images, labels = train.batch([5, 0])
    assert torch.equal(images[0], image) and labels.tolist() == [1, 0]


def test_items_are_the_cropped_and_resized_files(image_folder, tmp_path):
    train = open_images(config_for(image_folder, tmp_path), progress=False)
    file = Image.open(image_folder / "train" / "dog" / "001.png")
    expected = np.asarray(file.crop((3, 0, 17, 14)).resize((8, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(train[6][0].permute(1, 2, 0).numpy(), expected)


def test_the_held_out_part_numbers_the_classes_as_training_does(image_folder, tmp_path, picture):
    (image_folder / "train" / "eel").mkdir()
    picture(300).save(image_folder / "train" / "eel" / "000.png")
    config = config_for(image_folder, tmp_path)
    shutil.rmtree(image_folder / "test" / "cat")
    reference = open_images(config, "reference", progress=False)
    assert reference.class_names == ["cat", "dog", "eel"] and reference.class_counts == [0, 2, 0]
    # Another class in training moves the numbers of an unchanged held-out part: the cache must not answer.
    (image_folder / "train" / "ant").mkdir()
    picture(301).save(image_folder / "train" / "ant" / "000.png")
    assert open_images(config, "reference", progress=False).class_counts == [0, 0, 2, 0]
    (image_folder / "test" / "fox").mkdir()
    picture(302).save(image_folder / "test" / "fox" / "000.png")
    with pytest.raises(ValueError, match=r"test expected the classes of the training pictures .*got fox too"):
        open_images(config, "reference", progress=False)


def test_folder_without_a_held_out_part_compares_with_train(image_folder, tmp_path):
    config = config_for(image_folder / "train", tmp_path)
    assert open_images(config, "reference", progress=False).digest == open_images(config, progress=False).digest
    with pytest.raises(ValueError, match="no held-out part"):
        open_images(config_for(image_folder / "train", tmp_path, reference="held-out"), "reference", progress=False)


def test_reference_train_uses_the_training_pictures(image_folder, tmp_path):
    config = config_for(image_folder, tmp_path, reference="train")
    assert len(open_images(config, "reference", progress=False)) == 8


def test_digest_follows_content_not_place(image_folder, tmp_path, picture):
    first = open_images(config_for(image_folder, tmp_path), progress=False)
    moved = image_folder.rename(tmp_path / "moved")
    assert open_images(config_for(moved, tmp_path / "other"), progress=False).digest == first.digest
    picture(999).save(moved / "train" / "cat" / "000.png")
    assert open_images(config_for(moved, tmp_path), progress=False).digest != first.digest


def test_folders_that_differ_in_content_alone_share_no_cache(tmp_path):
    shades = []
    for place, shade in (("a", 0), ("b", 255)):
        file = tmp_path / place / "pics" / "x" / "0.bmp"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade,) * 3).save(file)
        os.utime(file, (1, 1))
        pictures = open_images(config_for(tmp_path / place / "pics", tmp_path), progress=False)
        shades.append(int(pictures[0][0].max()))
    assert shades == [0, 255]


def test_limit_takes_pictures_evenly(image_folder, tmp_path):
    limited = open_images(config_for(image_folder, tmp_path, limit=4), progress=False)
    everything = open_images(config_for(image_folder, tmp_path), progress=False)
    assert limited.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(limited[3][0], everything[7][0])


def test_corrupt_picture_is_named_and_nothing_is_left(image_folder, tmp_path):
    broken = image_folder / "train" / "dog" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"dog/002\.png.*replace or remove"):
        open_images(config_for(image_folder, tmp_path), progress=False)
    assert list((tmp_path / "cache" / "images").iterdir()) == []


@pytest.mark.parametrize(
    ("arrange", "error", "message"),
    [
        (lambda root: None, FileNotFoundError, "not a folder"),
        (lambda root: root.mkdir(), ValueError, "no subfolders"),
        (lambda root: (root / "cat").mkdir(parents=True), ValueError, "holds no pictures"),
    ],
)
def test_missing_or_empty_folder_is_a_clear_error(arrange, error, message, tmp_path):
    arrange(tmp_path / "set")
    with pytest.raises(error, match=message):
        open_images(config_for(tmp_path / "set", tmp_path), progress=False)


def test_grey_palette_alpha_and_16_bit_become_rgb(picture):
    grey = to_square(picture(1, mode="L"), 8)
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
    transparent = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    assert (to_square(transparent, 8) == 255).all()
    deep = Image.fromarray(np.full((8, 8), 257 * 40, dtype=np.uint16))
    assert (to_square(deep, 8) == 40).all()
    assert to_square(picture(2, mode="P"), 8).shape == (8, 8, 3)


def test_resampling_is_antialiased():
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = to_square(np.repeat(checkers[..., None], 3, axis=2), 8)
    assert small.min() > 110 and small.max() < 145


def test_set_beyond_the_pixel_cache_is_read_from_its_files(image_folder, tmp_path, monkeypatch):
    kept = open_images(config_for(image_folder, tmp_path), progress=False)
    monkeypatch.setenv("DCNGEN_PIXEL_CACHE_GB", "1e-7")
    lazy = open_images(config_for(image_folder, tmp_path / "other"), progress=False)
    assert isinstance(lazy.pixels, LazyPixels)
    assert torch.equal(lazy.batch(range(8))[0], kept.batch(range(8))[0])
    assert torch.equal(lazy[2][0], kept[2][0])


def test_pickle_carries_no_pixels(image_folder, tmp_path):
    train = open_images(config_for(image_folder, tmp_path), progress=False)
    data = pickle.dumps(train)
    assert train.folder is not None and b"\x93NUMPY" not in data
    assert torch.equal(pickle.loads(data)[3][0], train[3][0])


def test_hub_data_set_saved_locally(tmp_path, picture):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])})
    rows = {"img": [picture(i) for i in range(4)], "label": [0, 1, 1, 0]}
    from dcngen.data.sources import HubSource

    source = HubSource(datasets.Dataset.from_dict(rows, features=features), "local", None, None)
    assert source.class_names == ["x", "y"] and source.labels.tolist() == [0, 1, 1, 0]
    assert np.array_equal(to_square(source.read(2), 8), to_square(rows["img"][2], 8))
    with pytest.raises(ValueError, match="no column 'photo'"):
        HubSource(source.dataset, "local", "photo", None)


def test_hub_name_is_loaded_split_by_split(tmp_path, picture, monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "species": datasets.ClassLabel(names=["x", "y"])})

    def part(seeds):
        rows = {"image": [picture(i) for i in seeds], "species": [i % 2 for i in seeds]}
        return datasets.Dataset.from_dict(rows, features=features)

    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return {"train": part(range(4)), "validation": part(range(4, 6))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(name="owner/birds:small", image_size=8, cache_dir=str(tmp_path))
    train, reference = open_images(config, progress=False), open_images(config, "reference", progress=False)
    assert asked[0] == ("owner/birds", "small")
    assert len(train) == 4 and len(reference) == 2 and reference.split == "held-out"
    assert np.array_equal(reference[1][0].permute(1, 2, 0).numpy(), to_square(picture(5), 8))

    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(RuntimeError, match=r"neither a preset, nor a folder here.*no route"):
        open_images(DataConfig(name="owner/fish", cache_dir=str(tmp_path)), progress=False)


def hub_splits(monkeypatch, label_type, **splits):
    """Let the hub have one data set, with these labels by split."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": label_type(datasets)})
    small = Image.new("RGB", (8, 8))

    def part(labels):
        return datasets.Dataset.from_dict({"image": [small] * len(labels), "label": labels}, features=features)

    loaded = {key: part(labels) for key, labels in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)


@pytest.mark.parametrize("kind", ["ClassLabel", "Value"])
def test_hub_split_with_hidden_labels_is_passed_over(tmp_path, monkeypatch, kind):
    def label_type(datasets):
        return datasets.ClassLabel(names=["x", "y"]) if kind == "ClassLabel" else datasets.Value("int64")

    hub_splits(monkeypatch, label_type, train=[0, 1, 0], validation=[1, 0], test=[-1] * 4)
    config = DataConfig(name="owner/birds", image_size=8, cache_dir=str(tmp_path), label_column="label")
    assert open_images(config, "reference", progress=False).labels.tolist() == [1, 0]
    hub_splits(monkeypatch, label_type, train=[0, 1, 0], test=[-1] * 4)
    assert open_images(config, "reference", progress=False).split == "train"
    with pytest.raises(ValueError, match="no held-out part"):
        open_images(dataclasses.replace(config, reference="held-out"), "reference", progress=False)


def test_hub_classes_without_a_type_are_numbered_as_in_training(tmp_path, monkeypatch):
    config = DataConfig(name="owner/birds", image_size=8, cache_dir=str(tmp_path), label_column="label")
    hub_splits(monkeypatch, lambda datasets: datasets.Value("string"), train=["owl", "jay", "tit"], test=["tit", "owl"])
    reference = open_images(config, "reference", progress=False)
    assert reference.class_names == ["jay", "owl", "tit"] and reference.labels.tolist() == [2, 1]
    hub_splits(monkeypatch, lambda datasets: datasets.Value("string"), train=["owl", "jay"], test=["tit", "owl"])
    with pytest.raises(ValueError, match="got tit too"):
        open_images(config, "reference", progress=False)


@pytest.mark.parametrize(
    "options", [{"name": ""}, {"image_size": 0}, {"limit": 0}, {"reference": "test"}], ids=lambda o: next(iter(o))
)
def test_config_rejects_nonsense(options):
    with pytest.raises(ValueError, match="data"):
        DataConfig(**options)


def test_even_choice_keeps_classes_that_take_turns():
    labels = np.arange(90) % 3
    chosen = evenly_over_classes(labels, 30)
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 10]
    assert len(np.unique(chosen)) == 30 and (np.diff(chosen) > 0).all()
    assert evenly_over_classes(labels, None).tolist() == evenly_over_classes(labels, 99).tolist() == list(range(90))
