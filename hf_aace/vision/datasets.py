# SPDX-License-Identifier: Apache-2.0
"""Labelled images as `datasets`: scikit-learn's digits, a folder, or the Hub; checked before training starts."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from sklearn.datasets import load_digits
from transformers.utils import logging

from .columns import find_columns, unseen_classes, untyped_images, with_classes
from .images import IMAGE_SUFFIXES, find_corrupt, first_few


logger = logging.get_logger(__name__)

_DIGITS_TEST_SIZE = 500
_TEST_FRACTION = 0.2
# Test images stay the same whatever the seed of a run, or the runs could not be compared.
_SPLIT_SEED = 0
TEST_SPLITS = ("test", "validation")
# What folders that hold a split are called, as a word in their name: `test`, `test_set`, `val2017`.
_SPLIT_WORDS = {
    split: re.compile(rf"(?:^|[^a-z])(?:{words})(?:$|[^a-z])", re.IGNORECASE)
    for split, words in {
        "train": "train|training",
        "test": "test|testing|eval|evaluation",
        "validation": "validation|valid|val|dev",
    }.items()
}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files that hold many images, by their suffix, and what of `datasets` reads them.
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_image_dataset(
    name: str,
    *,
    seed: int,
    train_size: int | None = None,
    label_noise: float = 0.0,
    validation_size: float = 0.0,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    skip_corrupt_images: bool = False,
) -> DatasetDict:
    """
    Loads a data set for image classification.

    Args:
        name (`str`):
            `"digits"` for the 1797 scans of 8x8 pixels that come with scikit-learn; or a folder of images in one
            sub-folder for each class, perhaps below `train` and `test`; or a folder written by `save_to_disk`; or a file,
            or a folder of files, in parquet or as WebDataset shards (`.tar`); or the id of a data set on the Hub. Anything
            that is a folder here is read as one, save `"digits"`: write `"./digits"` for a folder of that name.
        seed (`int`):
            Draws the images that `train_size` and `validation_size` take and those that `label_noise` changes. The test
            images do not depend on it.
        train_size (`int`, *optional*):
            Keep this many training images, with about the shares that the classes have, and each class at least once.
            Defaults to all.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, whose label is replaced by another class, drawn uniformly; of the
            validation images too, as they come from the same source. Test labels are never changed.
        validation_size (`float`, *optional*, defaults to `0.0`):
            Share of the training images, in `[0, 1)`, to set apart as validation images, before `train_size` is taken of
            the rest.
        image_column_name (`str`, *optional*):
            The column of the images. Found if left out, see [`~hf_aace.vision.columns.find_columns`].
        label_column_name (`str`, *optional*):
            The column of the labels: classes, strings or integers. Found if left out. A field of a JSON column is named
            `json.field`.
        skip_corrupt_images (`bool`, *optional*, defaults to `False`):
            Whether to decode every image beforehand and leave out those that cannot be, with a warning that names and
            counts them. Otherwise they are an error, for local images beforehand too, for those of the Hub when a batch
            is made.

    Returns:
        `DatasetDict`: The splits `train` and `test`, and `validation` if `validation_size` asks for it or the data set has
        it beside `test`, with the columns `image` ([`~datasets.Image`]) and `label` ([`~datasets.ClassLabel`]). A data set
        without a labelled `test` split has that of `validation` as `test`, and without either a fifth of its images.

    Raises:
        `ValueError`: If an argument is out of range, or the data set cannot be found, lacks images, labels or classes,
            or a local image cannot be read; the message names it and says how to mend it.
    """
    if not 0 <= label_noise < 1:
        raise ValueError(f"`label_noise` must lie in [0, 1), got {label_noise}. Use 0 for the labels as they are.")
    if not 0 <= validation_size < 1:
        raise ValueError(
            f"`validation_size` must lie in [0, 1), got {validation_size}. Use 0 for no validation images."
        )
    if name == "digits":
        splits = _load_digits()
    else:
        splits = _image_and_label(name, load_splits(name), image_column_name, label_column_name)
        if skip_corrupt_images or Path(name).exists():  # of the Hub, checking all may take longer than training
            splits = _without_corrupt(name, splits, skip_corrupt_images)
        splits = _train_and_test(name, splits)
    test = splits.pop("test")
    if validation_size > 0:
        if splits.pop("validation", None) is not None:
            logger.warning(
                f"The validation images of {name!r} are not used, as `validation_size` sets others apart. Leave it out."
            )
        size = round(validation_size * len(splits["train"]))
        if not 1 <= size <= len(splits["train"]) - len(np.unique(_labels(splits["train"]))):
            raise ValueError(
                f"`validation_size={validation_size}` of the {len(splits['train'])} training images are {size}: that must "
                "be one at least, and leave one of each class to train on."
            )
        splits = _split(splits["train"], size, seed)
        splits["validation"] = splits.pop("test")
    if train_size is not None:
        splits["train"] = _take(splits["train"], train_size, seed)
    if label_noise > 0:
        splits = DatasetDict({name: _with_label_noise(split, label_noise, seed) for name, split in splits.items()})
    return DatasetDict(**splits, test=test)


def _load_digits() -> DatasetDict:
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    dataset = Dataset.from_dict(
        {"image": [PIL.Image.fromarray(array) for array in pixels], "label": digits.target},
        features=Features(image=Image(), label=ClassLabel(names=[str(name) for name in digits.target_names])),
    )
    return _split(dataset, _DIGITS_TEST_SIZE, _SPLIT_SEED)


def load_splits(name: str, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Loads the splits of a data set as they are.

    Args:
        name (`str`): The data set, as [`load_image_dataset`] takes it, but for `"digits"`.
        streaming (`bool`, *optional*, defaults to `False`): Whether not to read it yet.

    Raises:
        `ValueError`: If there is no such data set, or it cannot be streamed.
    """
    options = {"streaming": True} if streaming else {}
    path = Path(name)
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(
                f"`dataset_name` is the file {name!r}, but a file must be of {' or '.join(_BUILDERS)}. Give a folder."
            )
        with _explained(name):
            return load_dataset(builder, data_files=name, **options)
    if path.is_dir():
        builder = _builder_of_folder(path)
        if builder is not None:
            with _explained(name):
                return load_dataset(builder, data_dir=name, **options)
        if streaming:
            raise ValueError(
                f"`streaming` is for data sets on the Hub and for files of {' or '.join(_BUILDERS)}. The folder {name!r} is "
                "read image by image, or mapped into memory, without it."
            )
        return _load_folder(name)
    try:
        return load_dataset(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`dataset_name` is {name!r}: neither `digits`, nor a folder or file, nor a data set that could be loaded from "
            f"the Hub: {error}"
        ) from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Context manager that makes one sentence of what reading local files raises."""
    try:
        yield
    except (DatasetsError, ValueError, tarfile.TarError) as error:
        cause = error.__cause__ or error  # `datasets` says itself only that it failed
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"The data set {name!r} cannot be read: {reason}") from error


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _builder_of_folder(path: Path) -> str | None:
    """What of `datasets` reads the files in a folder, `None` if it is one of images or was saved by `datasets`."""
    if _is_saved(path):
        return None
    files = list(files_in(path))
    suffixes = {file.suffix.lower() for file in files}
    # One beside the files, or in a folder `assets`, is a logo or a figure; but images of two classes are in two folders.
    folders = {file.parent for file in files if file.suffix.lower() in IMAGE_SUFFIXES} - {path}
    if len(folders) > 1 or any(file.name in _METADATA for file in files):
        return None
    for suffix, builder in _BUILDERS.items():
        if suffix in suffixes:
            return builder
    if suffixes & IMAGE_SUFFIXES:
        return None
    raise ValueError(
        f"The folder {str(path)!r} given as `dataset_name` holds no images. Put them into one sub-folder for each class. "
        f"(Nor is it a data set written by `save_to_disk`, nor does it hold files of {' or '.join(_BUILDERS)}.)"
    )


def _load_folder(name: str) -> DatasetDict:
    if _is_saved(Path(name)):
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    folders = _split_folders(Path(name)) or {"train": Path(name)}
    _check_files(name, folders)
    # Not `data_dir`: that also takes a class called `test`, or an image, for a split, and is many times as slow.
    patterns = {split: found for split, path in folders.items() if (found := _patterns(path))}
    splits = load_dataset("imagefolder", data_files=patterns)
    # `imagefolder` leaves the labels out, of the column or altogether, where it finds no two classes at one depth. With
    # a metadata file there are columns of its own instead.
    if any(
        set(split.column_names) <= {"image", "label"} and not ("label" in split.column_names and _is_labelled(split))
        for split in splits.values()
    ):
        places = sorted({str(Path(path).parent) for path in _paths(splits)})
        archives = sorted(file.name for file in files_in(Path(name)) if file.suffix.lower() in _ARCHIVES)
        raise ValueError(
            f"The folder {name!r} given as `dataset_name` must have one sub-folder for each class, at least two of "
            f"them to train on and all at the same depth, but its images lie in: {first_few(places)}."
            + f" What is in {first_few(archives)} counts too: move it away."
            * bool(archives)
        )
    if not any(
        file.name in _METADATA for file in files_in(Path(name))
    ):  # or the labels have nothing to do with folders
        _check_folders(name, folders, splits)
    return splits


def _check_files(name: str, folders: dict[str, Path]) -> None:
    """Says what of the files of a folder of images is not read, or would be read otherwise than it was meant."""
    suffixes = [file.suffix.lower() for path in folders.values() for file in files_in(path)]
    unread = [suffix for suffix in suffixes if suffix in IMAGE_SUFFIXES and suffix not in ImageFolder.EXTENSIONS]
    if unread and len(unread) == sum(suffix in IMAGE_SUFFIXES for suffix in suffixes):
        raise ValueError(f"The images in {name!r} are of a kind that is not read: {', '.join(sorted(set(unread)))}.")
    if unread:
        logger.warning(
            f"{len(unread)} images in {name!r} are of a kind that is not read: {', '.join(sorted(set(unread)))}."
        )
    for split, path in folders.items():
        if not any(True for _ in files_in(path)):
            logger.warning(f"The folder {str(path)!r} is empty, so that {name!r} has no split `{split}`.")
    for file in files_in(Path(name)):
        if file.name in _METADATA and len(folders) == 1:
            beside = [path.name for path in _sub_folders(file.parent) if _names_a_split(path.name)]
            if len(beside) > 1:
                raise ValueError(
                    f"{str(file)!r} holds the labels of what looks like splits, {first_few(beside)}, which would be one. Put "
                    f"a {file.name} into each of these folders."
                )


def files_in(folder: Path) -> Iterator[Path]:
    """
    All files in a folder, at any depth, those behind links to folders too.

    Args:
        folder (`Path`): The folder.
    """
    for parent, _, names in _walk(folder):
        yield from (Path(parent, name) for name in names)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that follows links to folders, but not to those that it is in."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(parent, name).resolve())]
        yield parent, folders, names


def _patterns(folder: Path) -> list[str]:
    """What matches all files in a folder; `**` itself goes behind no link."""
    links = [
        Path(parent, name)
        for parent, names, _ in _walk(folder)
        for name in names
        if os.path.islink(os.path.join(parent, name))
    ]
    return [
        f"{glob.escape(str(start))}/**"
        for start in (folder, *links)
        if any(names for _, _, names in os.walk(start))  # a pattern that matches nothing is an error
    ]


def _sub_folders(folder: Path) -> list[Path]:
    """The folders in a folder, but for hidden ones and those that a Mac or a Synology adds, which hold no images."""
    _, names, _ = next(_walk(folder))
    return [folder / name for name in sorted(names) if not name.startswith((".", "__", "@"))]


def _names_a_split(name: str) -> bool:
    return any(words.search(name) for words in _SPLIT_WORDS.values())


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders in which a folder of images has its splits, perhaps further down as in some archives; empty if it has none."""
    inside, found = _sub_folders(folder), {}
    for split, words in _SPLIT_WORDS.items():
        # Of images alone it is a class of that name.
        candidates = [
            path
            for path in inside
            if words.search(path.name) and (_sub_folders(path) or any((path / file).is_file() for file in _METADATA))
        ]
        matches = [path for path in candidates if words.fullmatch(path.name)] or candidates
        if len(matches) > 1:
            raise ValueError(
                f"Which of the folders {first_few([path.name for path in matches])} in {str(folder)!r} are the images to "
                f"{'train on' if split == 'train' else split}? Call that one `{split}`, or move the others away."
            )
        if matches:
            found[split] = matches[0]
    if "train" in found:
        return found
    below = {path: splits for path in inside if (splits := _split_folders(path))}
    if len(below) > 1:
        raise ValueError(
            f"Several folders in {str(folder)!r} have splits: {first_few([path.name for path in below])}. Give one of them as "
            "`dataset_name`."
        )
    return next(iter(below.values()), {})


def _check_folders(name: str, folders: dict[str, Path], splits: DatasetDict) -> None:
    """Warns of folders that are not read, and of classes that may be splits under another name."""
    where = next(iter(folders.values()))
    beside = [] if where == Path(name) else _sub_folders(where.parent)
    if left_out := [path.name for path in beside if path not in folders.values()]:
        logger.warning(
            f"Of {name!r} the folders {', '.join(path.name for path in folders.values())} are read, as the splits "
            f"{', '.join(folders)}, and not: {first_few(left_out)}."
        )
    labels = {Path(path).parent.name for path in _paths(splits)}
    if all(map(_names_a_split, labels)):
        raise ValueError(
            f"The classes of the folder {name!r} would be {', '.join(sorted(labels))}. Put the folders of the classes "
            "into those of the splits, not the other way round."
        )
    for split in splits.values():
        places = {}
        for path in _paths(DatasetDict(train=split)):
            places.setdefault(Path(path).parent.name, set()).add(str(Path(path).parent))
        for label, several in places.items():
            if len(several) > 1:
                logger.warning(
                    f"The images of the class {label!r} of {name!r} lie in several folders, which are read as one: "
                    f"{first_few(sorted(several))}. Splits have `train`, `test` or `validation` as a word in the names of "
                    "their folders."
                )
                break


def _image_and_label(
    name: str, splits: DatasetDict, image_column_name: str | None, label_column_name: str | None
) -> DatasetDict:
    """The splits with two columns: `image`, and `label` with classes."""
    if "train" not in splits:
        raise ValueError(f"The data set {name!r} must have a split named `train`, but has: {', '.join(splits)}.")
    parts, columns = {}, None
    for split in ("train", *TEST_SPLITS):  # another may have other columns
        if split in splits:
            part = splits[split]
            for column in untyped_images(part.features):
                part = part.cast_column(column, Image())
            part = part.flatten()  # the fields of a JSON column by names of their own
            columns = columns or find_columns(name, part.features, image_column_name, label_column_name)
            if not set(columns) <= set(part.column_names):
                continue  # a test split without labels
            part = part.select_columns(list(columns))
            part = part.rename_columns(
                {old: new for old, new in zip(columns, ("image", "label"), strict=True) if old != new}
            )
            parts[split] = part if isinstance(part.features["image"], Image) else part.cast_column("image", Image())
    return with_classes(name, DatasetDict(parts))


def _train_and_test(name: str, splits: DatasetDict) -> DatasetDict:
    """Makes of the splits of a data set those that [`load_image_dataset`] returns, or says why it cannot."""
    train = splits["train"]
    if not _is_labelled(train):
        raise ValueError(f"Some training images of the data set {name!r} have no label. Leave them out.")
    names, present = train.features["label"].names, np.unique(_labels(train))
    if len(present) < 2:
        found = f"of one class, {names[present[0]]!r}" if len(present) else "gone: there is none"
        raise ValueError(
            f"All training images of the data set {name!r} are {found}. Classification needs two classes at least."
        )
    # The test labels of a public competition are often withheld.
    labelled = [split for split in TEST_SPLITS if split in splits and _is_labelled(splits[split])]
    if not labelled:
        size = max(1, round(_TEST_FRACTION * len(train)))
        if len(train) - size < len(present):
            raise ValueError(
                f"The data set {name!r} has {len(train)} images of {len(present)} classes and no test split: too few to set "
                "some apart for the test. Add some."
            )
        parts = _split(train, size, _SPLIT_SEED)
    else:
        parts = DatasetDict(train=train, test=splits[labelled[0]])
        if len(labelled) > 1:
            parts["validation"] = splits[labelled[1]]
        for split, part in zip(
            labelled, [parts[part] for part in ("test", "validation") if part in parts], strict=True
        ):
            if unseen := np.setdiff1d(_labels(part), present).tolist():
                raise unseen_classes(name, split, [names[index] for index in unseen])
            if len(part) == 0:
                raise ValueError(f"The split `{split}` of the data set {name!r} has no image that could be read.")
    if missing := np.setdiff1d(present, _labels(parts["test"])).tolist():
        logger.warning(
            f"Among the test images of {name!r} is none of the classes: {first_few([names[index] for index in missing])}. "
            "What is measured by them says nothing of these."
        )
    return parts


def _labels(dataset: Dataset) -> np.ndarray:
    return np.array(dataset["label"][:])


def _is_labelled(dataset: Dataset) -> bool:
    return all(label is not None and (isinstance(label, str) or label >= 0) for label in dataset["label"])


def _split(dataset: Dataset, test_size: int, seed: int) -> DatasetDict:
    train = _draw_stratified(_labels(dataset), len(dataset) - test_size, seed)
    test = np.setdiff1d(np.arange(len(dataset)), train)
    return DatasetDict(train=dataset.select(train), test=dataset.select(test))


def _take(train: Dataset, train_size: int, seed: int) -> Dataset:
    labels = _labels(train)
    classes = len(np.unique(labels))
    if not classes <= train_size <= len(train):
        raise ValueError(
            f"`train_size` must lie between the number of classes, {classes}, and that of training images, "
            f"{len(train)}, got {train_size}."
        )
    return train.select(_draw_stratified(labels, train_size, seed))


def _draw_stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """
    Draws `size` indices, in ascending order, such that each class keeps about its share. Unlike scikit-learn's splitter
    it takes at least one of each class if `size` allows, and a class may have a single image.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = np.arange(len(members)) / len(members)
    # The drawn order breaks the ties between classes.
    return np.sort(order[np.argsort(place[order], kind="stable")[:size]])


def _with_label_noise(train: Dataset, label_noise: float, seed: int) -> Dataset:
    feature = train.features["label"]
    labels = _labels(train)
    generator = np.random.default_rng(seed)
    changed = generator.choice(len(labels), size=round(label_noise * len(labels)), replace=False)
    shift = generator.integers(1, feature.num_classes, size=len(changed))
    labels[changed] = (labels[changed] + shift) % feature.num_classes
    return train.remove_columns("label").add_column("label", labels, feature=feature)


def _paths(splits: DatasetDict) -> list[str]:
    encoded = splits.cast_column("image", Image(decode=False))
    return [image["path"] for split in encoded.values() for image in split["image"]]


def _without_corrupt(name: str, splits: DatasetDict, skip: bool) -> DatasetDict:
    """Leaves out the images that cannot be decoded, or raises an error if there are any."""
    corrupt = {split: find_corrupt(dataset) for split, dataset in splits.items()}
    problems = [problem for of_split in corrupt.values() for problem in of_split.values()]
    if not problems:
        return splits
    total = sum(len(dataset) for dataset in splits.values())
    found = f"{len(problems)} of the {total} images of {name!r} cannot be read"
    if not skip:
        for problem in problems:
            logger.warning(f"Unreadable: {problem}")
        raise ValueError(
            f"{found}: {first_few(problems)}. Replace or delete them, or set `skip_corrupt_images` to leave them out."
        )
    logger.warning(f"{found} and are left out: {', '.join(problems)}.")
    return DatasetDict(
        {
            split: dataset.select([index for index in range(len(dataset)) if index not in corrupt[split]])
            for split, dataset in splits.items()
        }
    )
