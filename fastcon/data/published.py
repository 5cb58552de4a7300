"""The paper's data sets: what they are, where a user gets them, and readers of their official files, as published."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

Labels = tuple[str, ...]
Pairs = list[tuple[str, Labels]]
"""(path under the root, its class names) of images."""


@dataclasses.dataclass(frozen=True)
class Files:
    """Images in a fixed order: paths under `root` with the names of their classes."""

    root: Path
    pairs: Pairs
    multi_label: bool = False
    """Whether an image may have several labels, or none."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set of the paper: what it is, where a user gets it, what must lie under its root, and who reads that."""

    title: str
    classes: int
    parts: dict[str, int]
    """Images in each part, as published."""
    where: str
    files: str
    read: Callable[..., Iterable[tuple[str, Labels]] | Path]
    """(root, part[, group]) → the images of a part, or the class folders that hold them."""
    train: str
    """The part that trains."""
    test: str | None = None
    """The part that tests; None: no official one, --holdout stands in."""
    group: str | None = None
    """Of a multi-label set: which labels."""
    per_class: dict[str, int] = dataclasses.field(default_factory=dict)
    """Images per class in each part where all classes have as many."""

    def elsewhere(self, root: Path, part: str) -> Path | None:
        """A part in another layout that people have: class folders PART/CLASS, or shards PART.tar, PART-*.tar with them.

        The union of train and val is looked for as either, too. A part "all" may be the root itself. None: there is neither,
        or the set has several labels per image, which no folder says.
        """
        if self.group is not None:
            return None
        short = part.partition("-")[0]
        places = [_class_folders(root, [short]), _shards(root, [short])]
        if part == "trainval":
            places += [_class_folders(root, ["train", "val"]), _shards(root, ["train", "val"])]
        if part == "all":
            places += [_class_folders(root, ["."]), _shards(root, ["*"])]
        return next((place for place in places if place is not None), None)


def _class_folders(root: Path, parts: list[str]) -> Path | None:
    """Folders that all hold at least two folders."""
    for part in parts:
        folder = root / part
        if not folder.is_dir() or sum(entry.is_dir() for entry in os.scandir(folder)) < 2:
            return None
    return root / _braces(parts)


def _shards(root: Path, parts: list[str]) -> Path | None:
    shards = [sorted({*root.glob(f"{part}.tar"), *root.glob(f"{part}-*.tar")}) for part in parts]
    return root / _braces([path.name for paths in shards for path in paths]) if all(shards) else None


def _braces(names: list[str]) -> str:
    """Several names as one of IMAGES: {a,b}."""
    return names[0] if len(names) == 1 else "{" + ",".join(names) + "}"


def _folders(below: str) -> Callable[[Path, str], Path]:
    """A data set that is class folders under root/below, where {part} is the part."""

    def read(root: Path, part: str) -> Path:
        folder = root / below.format(part=part)
        if not folder.is_dir():
            raise FileNotFoundError(2, "missing", str(folder))
        return folder

    return read


def _torchvision(name: str, **options: Any) -> Callable[[Path, str], Iterator[Any]]:
    """A reader of torchvision's; "trainval" are train and val together where torchvision does not know it."""

    def read(root: Path, part: str) -> Iterator[Any]:
        import torchvision

        factory = getattr(torchvision.datasets, name)
        union = part == "trainval" and name != "FGVCAircraft"
        for split in ("train", "val") if union else (part,):
            try:
                files = torchvision_files(factory(str(root), split=split, **options))
            except RuntimeError as error:  # torchvision says no more than that something is missing or corrupted
                raise FileNotFoundError(2, str(error), f"{root}: what torchvision.datasets.{name} looks for") from error
            assert files is not None
            for path, labels in files.pairs:
                yield os.path.relpath(files.root / path, root), labels

    return read


def _places(root: Path, part: str) -> Iterator[Any]:
    """Images of the original size or, where those are not there, of 256 px (data_256_standard, val_256)."""
    large = root / ("data_large_standard" if part.startswith("train") else "val_large")
    return _torchvision("Places365", small=not large.is_dir())(root, part)


def _cub(root: Path, part: str) -> Pairs:
    def table(name: str) -> dict[str, str]:
        lines = (root / "CUB_200_2011" / name).read_text().splitlines()
        return dict(line.split(maxsplit=1) for line in lines if line.strip())  # type: ignore[arg-type]

    images, label, classes = table("images.txt"), table("image_class_labels.txt"), table("classes.txt")
    flag = "1" if part == "train" else "0"
    chosen = [number for number, training in table("train_test_split.txt").items() if training == flag]
    return [(f"CUB_200_2011/images/{images[k]}", (classes[label[k]],)) for k in chosen]


def _ifood(root: Path, part: str) -> Pairs:
    """The list is annot/train_info.csv (image,class number) or, from Kaggle, train_labels.csv with a header."""
    lists = [root / name for name in (f"annot/{part}_info.csv", f"{part}_labels.csv") if (root / name).exists()]
    named = [path for path in (root / "annot/class_list.txt", root / "class_list.txt") if path.exists()]
    if not lists or not named:
        raise FileNotFoundError(2, "missing", str(root / f"annot/{part}_info.csv" if not lists else "class_list.txt"))
    classes = dict(line.split(maxsplit=1) for line in named[0].read_text().splitlines() if line.strip())
    with open(lists[0], newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[1].strip().isdigit()]
    return [(f"{part}_set/{row[0]}", (classes[row[1].strip()].strip(),)) for row in rows]


def _inaturalist(root: Path, part: str) -> Pairs:
    listed = json.loads((root / f"{part}2019.json").read_text())
    names = {item["id"]: str(item.get("name", item["id"])) for item in listed["categories"]}
    label = {item["image_id"]: item["category_id"] for item in listed["annotations"]}
    return [(image["file_name"], (names[label[image["id"]]],)) for image in listed["images"]]


def _ifashion(root: Path, part: str, group: str) -> Iterator[tuple[str, Labels]]:
    """PART.json lists label numbers, the label map names them and their group; images are PART/NUMBER.jpg.

    Both spellings are read: image_id and label_id (the data set's page) and imageId and labelId (Kaggle).
    """
    maps = ("iMat_fashion_2018_label_map_228.csv", "label_map_228.csv")
    label_maps = [root / name for name in maps if (root / name).exists()]
    if not label_maps:
        raise FileNotFoundError(2, "missing", str(root / maps[0]))
    with open(label_maps[0], newline="", encoding="utf-8-sig") as file:
        names = {int(r["labelId"]): r["labelName"] for r in csv.DictReader(file) if r["taskName"].strip() == group}
    if not names:
        raise ValueError(f"{label_maps[0].name} names no label of the group {group!r}")
    lists = [root / name for name in ((f"{part}.json", "validation.json") if part == "val" else (f"{part}.json",))]
    listed = next((path for path in lists if path.exists()), lists[0])
    for item in json.loads(listed.read_text())["annotations"]:
        numbers = [int(number) for number in item.get("label_id", item.get("labelId"))]
        image = item.get("image_id", item.get("imageId"))
        yield f"{listed.stem}/{image}.jpg", tuple(names[number] for number in numbers if number in names)


def _fashion(group: str, classes: int) -> DataSet:
    return DataSet(
        f"iMaterialist-Fashion attributes, {group} (multi-label)",
        classes,
        {"train": 1_012_947, "val": 9_897},
        "github.com/visipedia/imat_fashion_comp (lists; images by their URLs)",
        "train.json, val.json, label_map_228.csv (labelId, taskName, labelName), train/NUMBER.jpg, val/NUMBER.jpg",
        _ifashion,
        "train",
        "val",
        group,
    )


DATASETS = {
    "cars196": DataSet(
        "Stanford Cars",
        196,
        {"train": 8_144, "test": 8_041},
        "ai.stanford.edu/~jkrause/cars/car_dataset.html (its links are dead: mirrors carry the files)",
        "stanford_cars/devkit, cars_train, cars_test, cars_test_annos_withlabels.mat",
        _torchvision("StanfordCars"),
        "train",
        "test",
    ),
    "resisc45": DataSet(
        "NWPU-RESISC45, aerial scenes",
        45,
        {"all": 31_500},
        "gcheng-nwpu.github.io",
        "NWPU-RESISC45/CLASS/*.jpg",
        _folders("NWPU-RESISC45"),
        "all",
        per_class={"all": 700},
    ),
    "ifood": DataSet(
        "iFood 2019 (FoodX-251)",
        251,
        {"train": 118_475, "val": 11_994},
        "github.com/karansikka1/iFood_2019",
        "annot/train_info.csv, val_info.csv, class_list.txt (or Kaggle's train_labels.csv …), train_set, val_set",
        _ifood,
        "train",
        "val",
    ),
    "food101": DataSet(
        "Food-101",
        101,
        {"train": 75_750, "test": 25_250},
        "data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "food-101/images, food-101/meta",
        _torchvision("Food101"),
        "train",
        "test",
        per_class={"train": 750, "test": 250},
    ),
    "ifashion-category": _fashion("category", 105),
    "ifashion-sleeve": _fashion("sleeve", 4),
    "dtd": DataSet(
        "Describable Textures, split 1",
        47,
        {"train": 1_880, "val": 1_880, "trainval": 3_760, "test": 1_880},
        "www.robots.ox.ac.uk/~vgg/data/dtd",
        "dtd/dtd/images, dtd/dtd/labels",
        _torchvision("DTD"),
        "trainval",
        "test",
        per_class={"train": 40, "val": 40, "trainval": 80, "test": 40},
    ),
    "flowers": DataSet(
        "Oxford Flowers 102",
        102,
        {"train": 1_020, "val": 1_020, "trainval": 2_040, "test": 6_149},
        "www.robots.ox.ac.uk/~vgg/data/flowers/102",
        "flowers-102/jpg, imagelabels.mat, setid.mat",
        _torchvision("Flowers102"),
        "trainval",
        "test",
        per_class={"train": 10, "val": 10, "trainval": 20},
    ),
    "caltech256": DataSet(
        "Caltech-256, with its clutter",
        257,
        {"all": 30_607},
        "data.caltech.edu/records/nyy15-4j048",
        "256_ObjectCategories/CLASS/*.jpg",
        _folders("256_ObjectCategories"),
        "all",
    ),
    "cub": DataSet(
        "CUB-200-2011 birds",
        200,
        {"train": 5_994, "test": 5_794},
        "www.vision.caltech.edu/datasets/cub_200_2011",
        "CUB_200_2011/images, images.txt, image_class_labels.txt, classes.txt, train_test_split.txt",
        _cub,
        "train",
        "test",
    ),
    "aircraft": DataSet(
        "FGVC-Aircraft, variants",
        100,
        {"train": 3_334, "val": 3_333, "trainval": 6_667, "test": 3_333},
        "www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft",
        "fgvc-aircraft-2013b/data",
        _torchvision("FGVCAircraft"),
        "trainval",
        "test",
    ),
    "inaturalist": DataSet(
        "iNaturalist 2019",
        1_010,
        {"train": 265_213, "val": 3_030},
        "github.com/visipedia/inat_comp/tree/master/2019",
        "train2019.json, val2019.json, train_val2019",
        _inaturalist,
        "train",
        "val",
        per_class={"val": 3},
    ),
    "imagenet": DataSet(
        "ImageNet (ILSVRC2012)",
        1_000,
        {"train": 1_281_167, "val": 50_000},
        "image-net.org",
        "train/WNID/*.JPEG (and val/WNID/*.JPEG)",
        _folders("{part}"),
        "train",
        "val",
        per_class={"val": 50},
    ),
    "places365": DataSet(
        "Places365-Standard",
        365,
        {"train-standard": 1_803_460, "val": 36_500},
        "places2.csail.mit.edu",
        "categories_places365.txt, places365_train_standard.txt, places365_val.txt, data_large_standard, val_large (or "
        "data_256_standard, val_256)",
        _places,
        "train-standard",
        "val",
        per_class={"val": 100},
    ),
    "logo2k": DataSet(
        "Logo-2K+",
        2_341,
        {"all": 167_140},
        "github.com/msn199959/Logo-2k-plus-Dataset",
        "Logo-2K+/CATEGORY/BRAND/*.jpg",
        _folders("Logo-2K+"),
        "all",
    ),
}
"""The paper's data sets by name; its Cars196, Aircrafts and Birds (CUB) among them."""
RELATED = {"ifood": ["food101"], "inaturalist": ["flowers", "cub"], "ifashion-category": ["ifashion-sleeve"]}
"""Tasks that the paper counts as related to a teacher of a data set, besides the data set itself."""


def torchvision_files(dataset: Any) -> Files | None:
    """The files and labels that a torchvision data set keeps, in its order; None where it keeps none."""
    pairs = _paths_and_labels(dataset)
    if pairs is None:
        return None
    root = Path(os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path, _ in pairs]))
    names = [name if isinstance(name, str) else ", ".join(name) for name in getattr(dataset, "classes", [])]
    return Files(
        root,
        [(os.path.relpath(path, root), (names[label] if label < len(names) else str(label),)) for path, label in pairs],
    )


def _paths_and_labels(dataset: Any) -> list[tuple[str, int]] | None:
    for attribute in ("samples", "_samples", "imgs"):
        pairs = getattr(dataset, attribute, None)
        if pairs and isinstance(pairs[0][0], str | Path) and isinstance(pairs[0][1], Integral):
            return [(str(path), int(label)) for path, label in pairs]
    for files, labels in (("_image_files", "_labels"), ("_images", "_labels")):
        if hasattr(dataset, files) and isinstance(getattr(dataset, labels, None), list):
            paths = (str(path) for path in getattr(dataset, files))
            return list(zip(paths, getattr(dataset, labels), strict=True))
    return None
