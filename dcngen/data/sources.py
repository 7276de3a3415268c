"""Where pictures come from: a source knows its classes, its labels and how to read picture i."""

import json
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("test", "testing", "val", "valid", "validation")


class Source(ABC):
    """An ordered set of labelled pictures, before cropping and resizing.

    Attributes:
        class_names: names by label.
        labels: (N,) int64.
        fingerprint: a string that changes whenever the pictures may have changed; cheap to compute.
        provenance: where the pictures come from, for people: credit, licence, version.
    """

    class_names: list[str]
    labels: np.ndarray
    fingerprint: str
    provenance: str

    @abstractmethod
    def read(self, index: int) -> Image.Image | np.ndarray:
        """Picture ``index``, of any mode and size: a PIL image or a uint8 array (H, W, 3)."""

    def describe(self, index: int) -> str:
        """What to call picture ``index`` in an error message."""
        return f"picture {index}"

    def __len__(self) -> int:
        return len(self.labels)


class FolderSource(Source):
    """Pictures in class subfolders; the sorted names of the subfolders are the classes.

    Args:
        root: the folder that holds the class subfolders. Pictures may lie deeper inside a class.
        class_names: the classes by label, where another part of the data set says them; not each needs a subfolder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no class subfolder, a class without a picture, or a subfolder that is none of ``class_names``.
    """

    def __init__(self, root: Path, class_names: list[str] | None = None):
        root = Path(root)
        folders = class_folders(root)
        found = [folder.name for folder in folders]
        self.root = root
        self.class_names = found if class_names is None else list(class_names)
        self.paths: list[Path] = []
        labels = []
        for label, folder in zip(_numbers_of(found, self.class_names, root), folders, strict=True):
            paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not paths:
                raise ValueError(f"class folder {folder} holds no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
            self.paths += paths
            labels += [label] * len(paths)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.provenance = f"folder {root.name}"

    @property
    def fingerprint(self) -> str:
        # With its place: equal names, sizes and times (a copy keeps them, an archive sets them) are not equal pictures.
        lines = [str(self.root.resolve())]
        for path in self.paths:
            stat = path.stat()
            lines.append(f"{path.relative_to(self.root)}:{stat.st_size}:{stat.st_mtime_ns}")
        return "\n".join(["folder", *self.class_names, *lines])

    def read(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            image.load()
            return image

    def describe(self, index: int) -> str:
        return str(self.paths[index])


class HubSource(Source):
    """One split of a Hugging Face data set with a picture column and, if there is one, a class column.

    Args:
        dataset: a ``datasets.Dataset``.
        name: the name it was loaded by.
        image_column, label_column: columns; found by their types when None. Without a class column every picture
            has class 0.
        class_names: the classes by label, where another split says them and the column's type does not.

    Attributes:
        hidden_labels: every label is -1, and that is no class: classes kept back, as those of imagenet-1k's test split.

    Raises:
        ValueError: no such column, or a class that is none of ``class_names``.
    """

    def __init__(
        self,
        dataset,
        name: str,
        image_column: str | None,
        label_column: str | None,
        class_names: list[str] | None = None,
    ):
        self.dataset = dataset
        self.name = name
        self.image_column = image_column or self._column_of("Image", required=True)
        for column in (self.image_column, label_column):
            if column is not None and column not in dataset.features:
                raise ValueError(f"{name} has no column {column!r}; its columns: {', '.join(dataset.features)}")
        label_column = label_column or self._column_of("ClassLabel", required=False)
        if label_column is None:
            self.class_names = ["all"]
            self.labels = np.zeros(len(dataset), dtype=np.int64)
            self.hidden_labels = False
        else:
            values = np.asarray(dataset[label_column])
            no_class = class_names is not None and "-1" not in class_names
            self.hidden_labels = no_class and bool((values == -1).all())
            self.class_names, self.labels = self._number_classes(label_column, values, class_names)
        classes = json.dumps(self.class_names)
        self.fingerprint = f"hub:{name}:{dataset._fingerprint}:{self.image_column}:{label_column}:{classes}"
        self.provenance = f"Hugging Face data set {name}"

    def _column_of(self, feature_type: str, required: bool) -> str | None:
        columns = [key for key, feature in self.dataset.features.items() if type(feature).__name__ == feature_type]
        if columns:
            return columns[0]
        if required:
            raise ValueError(
                f"{self.name} has no column of type {feature_type}; its columns: {', '.join(self.dataset.features)}. "
                f"Name one with --data.image_column"
            )
        return None

    def _number_classes(self, column: str, values, class_names: list[str] | None) -> tuple[list[str], np.ndarray]:
        names = getattr(self.dataset.features[column], "names", None)
        if names is not None:
            return list(names), values.astype(np.int64)
        if self.hidden_labels:
            return list(class_names), values.astype(np.int64)
        found, places = np.unique(values, return_inverse=True)
        found = [str(name) for name in found]
        class_names = found if class_names is None else list(class_names)
        numbers = np.asarray(_numbers_of(found, class_names, f"{self.name}, column {column!r}"), dtype=np.int64)
        return class_names, numbers[places]

    def read(self, index: int) -> Image.Image:
        return self.dataset[index][self.image_column]

    def describe(self, index: int) -> str:
        return f"{self.name}, row {index}"


def class_folders(root: Path) -> list[Path]:
    """The class subfolders, sorted by name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no subfolders.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; expected class subfolders with pictures in it")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(
            f"{root} has no subfolders; expected one per class, such as {root / 'cat'}/001.png "
            f"(for pictures without classes, put them all into one subfolder)"
        )
    return folders


def _numbers_of(found: list[str], class_names: list[str], where: Path | str) -> list[int]:
    """The label of each class that was found."""
    numbers = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in found if name not in numbers]
    if unknown:
        known = ", ".join(class_names[:10]) + (", ..." if len(class_names) > 10 else "")
        raise ValueError(
            f"{where} expected the classes of the training pictures ({known}), got {', '.join(unknown)} too; rename or "
            f"remove what is not trained, or set data.reference to train"
        )
    return [numbers[name] for name in found]


def folder_source(root: Path, split: str) -> Source | None:
    """The train or held-out part of an image folder; None when the folder has no held-out part.

    ``root/train`` and ``root/test`` (or ``val``, ...) are the splits if ``root/train`` is there; otherwise the class
    subfolders lie directly in ``root``. Both parts number the classes as the training part does.
    """
    train = next((root / name for name in TRAIN_FOLDERS if (root / name).is_dir()), None)
    if split == "train":
        return FolderSource(train or root)
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if train is None or held_out is None:
        return None
    return FolderSource(held_out, [folder.name for folder in class_folders(train)])


def hub_source(name: str, split: str, image_column: str | None, label_column: str | None) -> Source | None:
    """The train or held-out part of a hub data set; None when the data set has no held-out part with classes.

    Raises:
        ModuleNotFoundError: the ``datasets`` package is not installed.
        RuntimeError: the data set could not be loaded; the original error is chained.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name!r} names a hub data set; run `pip install datasets` to load it") from error
    path, _, config = name.partition(":")
    try:
        splits = datasets.load_dataset(path, config or None)
    except Exception as error:
        raise RuntimeError(
            f"{name!r} is neither a preset, nor a folder here, nor a data set that could be loaded from the hub: "
            f"{type(error).__name__}: {error}"
        ) from error

    def part(key: str, class_names: list[str] | None = None) -> HubSource:
        return HubSource(splits[key], f"{name}[{key}]", image_column, label_column, class_names)

    train = part(next((key for key in TRAIN_FOLDERS if key in splits), next(iter(splits))))
    if split == "train":
        return train
    held_out = (part(key, train.class_names) for key in HELD_OUT_FOLDERS if key in splits)
    return next((source for source in held_out if not source.hidden_labels), None)
