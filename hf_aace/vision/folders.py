# SPDX-License-Identifier: Apache-2.0
"""Find the splits of a dataset: in a folder of images, in parquet or WebDataset files, in a saved dataset, on the Hub."""

import glob
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
from datasets import Dataset, DatasetDict, Image, IterableDatasetDict, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from transformers.utils import logging

from .images import IMAGE_SUFFIXES
from .messages import first_few, first_line


logger = logging.get_logger(__name__)

# The words in a folder's name that make it a split: `test`, `test_set`, `val2017`.
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
# Files that may hold the labels of images beside them.
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx")
# Files that hold many images, by their suffix, and the builder of `datasets` that reads them.
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
# Images that Pillow does not know by their suffix.
_RAW_SUFFIXES = (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
_FOREIGN_SUFFIXES = (".heic", ".heif", ".jxl", ".svg", ".dcm", *_RAW_SUFFIXES)


def load_splits(name: str, streaming: bool = False, one_class: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Load the splits of a dataset as they are; with `streaming` open it without reading it. `name` is as for
    [`~hf_aace.vision.datasets.load_image_dataset`], except for `"digits"`. Refuse a dataset that does not exist, or that cannot
    be read or streamed, and a folder of a single class unless `one_class` is true.
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
        builder = _builder(path)
        if builder in _BUILDERS.values():
            with _explained(name):  # not by `data_dir`, which takes the files beside for some of the dataset
                suffixes = [suffix for suffix in _BUILDERS if _BUILDERS[suffix] == builder]
                files = DataFilesDict.from_patterns(get_data_patterns(name), name, allowed_extensions=suffixes)
                return load_dataset(builder, data_files=files, **options)
        if streaming:
            raise ValueError(
                f"`streaming` is for datasets on the Hub and for files of {' or '.join(_BUILDERS)}. The folder {name!r} is "
                "read image by image, or mapped into memory, without it."
            )
        if builder == "imagefolder":
            return _load_images(name, one_class)
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    try:
        return load_dataset(name, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        # `DatasetsError` only says that it failed.
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(
            f"`dataset_name` is {name!r}: neither `digits`, nor a folder or file, nor a dataset that could be loaded from "
            f"the Hub: {cause}"
        ) from error


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Replace the errors of reading local files by one sentence."""
    try:
        yield
    except (DatasetsError, OSError, ValueError, LookupError, tarfile.TarError) as error:
        cause = error.__cause__ or error  # `datasets` itself only says that it failed
        raise ValueError(f"The dataset {name!r} cannot be read: {first_line(cause)}.{metadata_hint(name)}") from error


def _builder(folder: Path) -> str | None:
    """Name the builder of `datasets` that reads the folder, `None` for a dataset written by `save_to_disk`."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return None
    files = [file for file in files_in(folder) if not _is_hidden(file.relative_to(folder))]
    if odd := [ascii(str(file)) for file in files if not is_utf8(file)]:
        raise ValueError(
            f"The names of {len(odd)} files in {str(folder)!r}, such as {odd[0]}, are not in UTF-8, so that they cannot be read. Rename them."
        )
    images = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS]
    # A picture beside the files or in one folder, such as `assets`, is a logo; images of two classes lie in two folders.
    if len({file.parent for file in images} - {folder}) > 1 or any(file.name in _METADATA for file in files):
        return "imagefolder"
    for suffix, builder in _BUILDERS.items():
        if any(file.suffix.lower() == suffix for file in files):
            return builder
    if images:
        return "imagefolder"
    unread = _listed(_unread_images(folder, "imagefolder", set()))
    raise ValueError(
        f"The folder {str(folder)!r} given as `dataset_name` holds no images{unread and ' but ' + unread}. Put images into one "
        "sub-folder for each class. (Nor is it a dataset written by `save_to_disk`, nor does it hold files of "
        f"{' or '.join(_BUILDERS)}.)"
    )


def _load_images(name: str, one_class: bool) -> DatasetDict:
    """Load a folder of images, whose labels are the names of their folders or columns of a metadata file."""
    folders = split_folders(Path(name)) or {"train": Path(name)}
    for split, path in folders.items():
        if not any(True for _ in files_in(path)):
            logger.warning(f"The folder {str(path)!r} is empty, so that {name!r} has no split `{split}`.")
    metadata = _metadata_files(Path(name))
    for file in metadata if len(folders) == 1 else ():
        beside = [path.name for path in _sub_folders(file.parent) if _names_a_split(path.name)]
        if len(beside) > 1:
            raise ValueError(
                f"{str(file)!r} holds the labels of what looks like splits, {first_few(beside)}, which would be one. Put "
                f"a {file.name} into each of these folders."
            )
    # Not `data_dir`, which is many times as slow and takes also a class, or an image, called `test` for a split.
    patterns = {split: found for split, path in folders.items() if (found := _patterns(path))}
    with _explained(name):
        # Told to, `imagefolder` takes the folder for the label even if there is only one.
        splits = load_dataset("imagefolder", data_files=patterns, drop_labels=False if one_class else None)
    if not metadata:
        _check_class_folders(name, splits)
    return splits


def _check_class_folders(name: str, splits: DatasetDict) -> None:
    """Refuse folders that are no classes, and warn of classes that may be splits under another name."""
    places = {split: {str(Path(path).parent) for path in _image_paths(part)} for split, part in splits.items()}
    # `imagefolder` leaves out the labels, all or their column, unless it finds two classes at one depth.
    if any("label" not in part.column_names or None in part.unique("label") for part in splits.values()):
        archives = sorted(file.name for file in files_in(Path(name)) if file.suffix.lower() in _ARCHIVES)
        raise ValueError(
            f"The folder {name!r} given as `dataset_name` must have one sub-folder for each class, at least two of "
            f"them to train on and all at the same depth, but its images lie in: {first_few(sorted(set().union(*places.values())))}."
            + f" What is in {first_few(archives)} counts too: move it away." * bool(archives)
            + _table_hint(Path(name))
        )
    labels = {Path(place).name for found in places.values() for place in found}
    if all(map(_names_a_split, labels)):
        raise ValueError(
            f"The classes of the folder {name!r} would be {', '.join(sorted(labels))}. Put the folders of the classes "
            f"into those of the splits, not the other way round.{_table_hint(Path(name))}"
        )
    for found in places.values():
        for label in sorted(labels):
            several = sorted(place for place in found if Path(place).name == label)
            if len(several) > 1:
                logger.warning(
                    f"The images of the class {label!r} of {name!r} lie in several folders, which are read as one: "
                    f"{first_few(several)}. Splits have `train`, `test` or `validation` as a word in the names of "
                    "their folders."
                )
                break


def _table_hint(folder: Path) -> str:
    """Say, for an error, how `datasets` takes the labels from a table; "" if there is none."""
    tables = sorted(str(file.relative_to(folder)) for file in files_in(folder) if file.suffix.lower() in _TABLES)
    if not tables:
        return ""
    return (
        f" If {first_few(tables)} holds the labels: name it metadata.csv (with commas; or metadata.jsonl), call its column of the "
        "images `file_name`, with the ending and the path from where it lies, and that of the labels `label`. Each split needs one "
        "of its own, in its folder."
    )


def warn_of_unused_images(name: str, loaded: DatasetDict | IterableDatasetDict, used: Iterable[str]) -> None:
    """Warn, once and by reason, of images in a dataset, `loaded` by [`load_splits`], or its folder that no `used` split has."""
    folder, read = Path(name), set()
    builder = _builder(folder) if folder.is_dir() else None
    reasons = {}
    if builder == "imagefolder":
        read = {path for split in used for path in _image_paths(loaded[split])}
    else:
        for split in [split for split in loaded if split not in used and isinstance(loaded[split], Dataset)]:
            why = f"of the split `{split}`, which has no labels or is not called `train`, `test` or `validation`"
            reasons[why] = [f"row {row}" for row in range(len(loaded[split]))]
    if folder.is_dir():
        reasons |= _unread_images(folder, builder, read)
    if reasons:
        count = sum(map(len, reasons.values()))
        logger.warning(f"{count} of the images of {name!r} are not used: {_listed(reasons)}.")


def _unread_images(folder: Path, builder: str | None, read: set[str]) -> dict[str, list[str]]:
    """List the image files in a folder that are not in `read`, by the reason."""
    metadata = first_few([str(file.relative_to(folder)) for file in _metadata_files(folder)])
    splits = split_folders(folder) if builder == "imagefolder" else {}

    def reason(file: Path) -> str:
        if _is_hidden(file.relative_to(folder)):
            return "hidden, as a name in their path begins with `.` or `__`"
        if builder != "imagefolder":
            return "beside the files that hold the dataset"
        if file.suffix.lower() in (*_BUILDERS, ".npy"):
            return "in files beside the folders of images"
        if file.suffix.lower() not in ImageFolder.EXTENSIONS:
            return f"of a kind that is not read, {file.suffix or 'without an ending'}"
        if splits and not any(file.is_relative_to(path) for path in splits.values()):
            return f"outside the folders of the splits, {', '.join(path.name for path in splits.values())}"
        if metadata:
            return f"not listed, or without a label, in {metadata}"
        return "left out by `datasets`, as broken links are"

    reasons = {}
    for file in sorted(files_in(folder)):
        holds_images = builder == "imagefolder" and file.suffix.lower() in (*_BUILDERS, ".npy")
        if os.path.abspath(file) not in read and file.name not in _METADATA and (holds_images or is_image(file)):
            reasons.setdefault(reason(file), []).append(str(file.relative_to(folder)))
    return reasons


def _listed(reasons: dict[str, list[str]]) -> str:
    """Count the files for each reason, with the first of every folder as an example."""
    examples = {why: {os.path.dirname(file): file for file in reversed(files)} for why, files in reasons.items()}
    return "; ".join(
        f"{len(files)} {why} ({first_few(sorted(examples[why].values()))})" for why, files in reasons.items()
    )


def is_image(file: Path) -> bool:
    """Tell whether a file holds an image, even of a kind that is not read."""
    suffix = file.suffix.lower()
    if file.name.startswith("._"):  # a Mac's notes on the file of that name
        return False
    if suffix in (*IMAGE_SUFFIXES, *_FOREIGN_SUFFIXES):
        return True
    if suffix in PIL.Image.registered_extensions():  # of a document, which Pillow only writes
        return False
    try:
        with PIL.Image.open(file):
            return True
    except Exception:  # of any kind, from the decoders of Pillow
        return False


def is_utf8(file: Path) -> bool:
    """Tell whether the name of a file is in UTF-8. Archives of older systems have others, which no table can hold."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_hidden(path: Path) -> bool:
    """Tell whether `datasets` leaves out a file for its path below the folder of the dataset."""
    return any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parent.parts)


def _image_paths(dataset: Dataset) -> Iterator[str]:
    for column in [column for column, feature in dataset.features.items() if isinstance(feature, Image)]:
        encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
        yield from (os.path.abspath(image["path"]) for image in encoded[column] if image and image["path"])


def _metadata_files(folder: Path) -> list[Path]:
    return sorted(
        file for file in files_in(folder) if file.name in _METADATA and not _is_hidden(file.relative_to(folder))
    )


def metadata_hint(name: str) -> str:
    """Say, for an error, that metadata files hide the names of the folders; "" if the dataset is no folder with such files."""
    files = _metadata_files(Path(name)) if Path(name).is_dir() else []
    if not files:
        return ""
    return (
        f" The columns come from {first_few([str(file) for file in files])}, which hides the names of the folders: move it away "
        "to take these for the classes, or give each image a label in it. Its `file_name` is the path of an image from there, with "
        "the ending; in a .csv, columns are separated by commas."
    )


def files_in(folder: Path) -> Iterator[Path]:
    """List all files in a folder, at any depth, including those behind links to folders."""
    for parent, _, names in _walk(folder):
        yield from (Path(parent, name) for name in names)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as `os.walk` does, following links to folders except to those above."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(parent, name).resolve())]
        yield parent, folders, names


def _patterns(folder: Path) -> list[str]:
    """List patterns that match all files in a folder; `**` by itself follows no links."""
    links = [
        Path(parent, name) for parent, names, _ in _walk(folder) for name in names if Path(parent, name).is_symlink()
    ]
    return [
        f"{glob.escape(str(start))}/**"
        for start in (folder, *links)
        if any(names for _, _, names in os.walk(start))  # a pattern that matches nothing is an error
    ]


def _sub_folders(folder: Path) -> list[Path]:
    """List the folders in a folder, except hidden ones and those that a Mac or a Synology adds."""
    _, names, _ = next(_walk(folder))
    return [folder / name for name in sorted(names) if not name.startswith((".", "__", "@"))]


def _names_a_split(name: str) -> bool:
    return any(words.search(name) for words in _SPLIT_WORDS.values())


def split_folders(folder: Path) -> dict[str, Path]:
    """
    Find the folder of each split, `train` among them, or none, in a folder of images, perhaps further down as in some archives.
    Refuse several folders that could be one split, or that have splits of their own.
    """
    inside, found = _sub_folders(folder), {}
    for split, words in _SPLIT_WORDS.items():
        # A folder that holds images alone is a class of that name.
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
    below = {path: splits for path in inside if (splits := split_folders(path))}
    if len(below) > 1:
        raise ValueError(
            f"Several folders in {str(folder)!r} have splits: {first_few([path.name for path in below])}. Give one of them as "
            "`dataset_name`."
        )
    return next(iter(below.values()), {})
