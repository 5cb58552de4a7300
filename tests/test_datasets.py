"""Named data sets: each reader on a tiny copy in the official layout, with labels that a shift by one would change."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision
from PIL import Image

from fastcon.data import datasets
from fastcon.data.check import check
from fastcon.data.manifest import index
from fastcon.data.published import DATASETS
from fastcon.errors import FastconError


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 14, 3), shade % 256, np.uint8)).save(path)


def lines(path: Path, *text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in text))


def labels(source: str) -> dict[str, str]:
    """File name → class name, as a manifest has it."""
    found = index([source])
    return {found.name(k).split("/")[-1]: found.classes[label] for k, label in enumerate(found.labels)}


def tags(source: str) -> dict[str, list[str]]:
    """File name → class names of a multi-label set."""
    found = index([source])
    return {
        found.name(k).split("/")[-1]: [found.classes[c] for c in np.flatnonzero(row)]
        for k, row in enumerate(found.multi_hot)
    }


def cars(root: Path) -> None:
    base = root / "stanford_cars"
    names = np.array(["AM General Hummer", "Acura RL", "Acura TL"], dtype=object)

    def annotations(rows):
        kinds = [(key, "O") for key in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        return {"annotations": np.array([(1, 1, 9, 9, np.uint8(label), name) for name, label in rows], dtype=kinds)}

    (base / "devkit").mkdir(parents=True)
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": names})
    scipy.io.savemat(base / "devkit" / "cars_train_annos.mat", annotations([("1.jpg", 2), ("2.jpg", 3), ("3.jpg", 1)]))
    scipy.io.savemat(base / "cars_test_annos_withlabels.mat", annotations([("1.jpg", 3), ("2.jpg", 1)]))
    for k in range(3):
        picture(base / "cars_train" / f"{k + 1}.jpg", 40 * k)
        picture(base / "cars_test" / f"{k + 1}.jpg", 40 * k + 20)


def test_cars196(tmp_path):
    cars(tmp_path)
    assert labels(f"data:cars196?root={tmp_path}") == {
        "1.jpg": "Acura RL",
        "2.jpg": "Acura TL",
        "3.jpg": "AM General Hummer",
    }
    assert labels(f"data:cars196?root={tmp_path}&part=test") == {"1.jpg": "Acura TL", "2.jpg": "AM General Hummer"}


def test_resisc45_caltech256_logo2k_and_imagenet_are_folders(tmp_path):
    for name, below, part in (
        ("resisc45", "NWPU-RESISC45", "all"),
        ("caltech256", "256_ObjectCategories", "all"),
        ("logo2k", "Logo-2K+/Food", "all"),
        ("imagenet", "val", "val"),
    ):
        root = tmp_path / name
        picture(root / below / "001.first" / "a.jpg", 1)
        picture(root / below / "002.second" / "b.jpg", 2)
        assert labels(f"data:{name}?root={root}&part={part}") == {"a.jpg": "001.first", "b.jpg": "002.second"}


@pytest.mark.parametrize("layout", ["github", "kaggle"])
def test_ifood(tmp_path, layout):
    if layout == "github":
        lines(tmp_path / "annot/class_list.txt", "0 macaron", "1 beignet", "2 cruller")
        lines(tmp_path / "annot/train_info.csv", "train_000000.jpg,2", "train_000001.jpg,1")
        lines(tmp_path / "annot/val_info.csv", "val_000000.jpg,0", "val_000001.jpg,2")
    else:
        lines(tmp_path / "class_list.txt", "0 macaron", "1 beignet", "2 cruller")
        lines(tmp_path / "train_labels.csv", "img_name,label", "train_000000.jpg,2", "train_000001.jpg,1")
        lines(tmp_path / "val_labels.csv", "img_name,label", "val_000000.jpg,0", "val_000001.jpg,2")
    for part in ("train", "val"):
        for k in range(2):
            picture(tmp_path / f"{part}_set" / f"{part}_00000{k}.jpg", k)
    source = f"data:ifood?root={tmp_path}"
    assert labels(source) == {"train_000000.jpg": "cruller", "train_000001.jpg": "beignet"}
    assert labels(f"{source}&part=val") == {"val_000000.jpg": "macaron", "val_000001.jpg": "cruller"}


def test_food101(tmp_path):
    meta = tmp_path / "food-101/meta"
    meta.mkdir(parents=True)
    (meta / "train.json").write_text(json.dumps({"baklava": ["baklava/7", "baklava/8"], "waffles": ["waffles/5"]}))
    (meta / "test.json").write_text(json.dumps({"baklava": ["baklava/9"], "waffles": ["waffles/6"]}))
    for name in ("baklava/7", "baklava/8", "baklava/9", "waffles/5", "waffles/6"):
        picture(tmp_path / f"food-101/images/{name}.jpg", ord(name[-1]))
    source = f"data:food101?root={tmp_path}"
    assert labels(source) == {"7.jpg": "baklava", "8.jpg": "baklava", "5.jpg": "waffles"}
    assert labels(f"{source}&part=test") == {"9.jpg": "baklava", "6.jpg": "waffles"}


@pytest.mark.parametrize("spelling", [("image_id", "label_id", "val"), ("imageId", "labelId", "validation")])
def test_ifashion(tmp_path, spelling):
    image, label, val = spelling
    lines(
        tmp_path / "iMat_fashion_2018_label_map_228.csv",
        "labelId,taskId,labelName,taskName",
        "1,6,Argyle,pattern",
        "3,8,Athletic Pants,category",
        "4,8,Athletic Sets,category",
        "17,5,Long Sleeved,sleeve",
        "18,5,Sleeveless,sleeve",
    )
    kind = str if image == "imageId" else int
    for part, rows in (("train", {1: [3, 17], 2: [1], 3: [3, 4, 18]}), (val, {1: [18], 2: [4]})):
        annotations = [{image: kind(k), label: [kind(number) for number in found]} for k, found in rows.items()]
        (tmp_path / f"{part}.json").write_text(json.dumps({"images": [], "annotations": annotations}))
        for k in rows:
            picture(tmp_path / part / f"{k}.jpg", 50 * k)
    source = f"data:ifashion-{{}}?root={tmp_path}"
    assert tags(source.format("category")) == {
        "1.jpg": ["Athletic Pants"],
        "2.jpg": [],
        "3.jpg": ["Athletic Pants", "Athletic Sets"],
    }
    assert tags(source.format("sleeve")) == {"1.jpg": ["Long Sleeved"], "2.jpg": [], "3.jpg": ["Sleeveless"]}
    (tmp_path / "train" / "2.jpg").unlink()  # a dead URL
    found = index([source.format("sleeve")])
    assert (len(found), found.rejects) == (2, [("train/2.jpg", "cannot be read: No such file or directory")])


def test_a_group_of_which_no_image_has_two_is_multi_label_all_the_same(tmp_path):
    test_ifashion(tmp_path, ("image_id", "label_id", "val"))
    assert index([f"data:ifashion-sleeve?root={tmp_path}"]).multi_hot.shape == (2, 2)


def test_dtd(tmp_path):
    base = tmp_path / "dtd/dtd"
    for part, name in (("train", "a"), ("val", "b"), ("test", "c")):
        lines(base / f"labels/{part}1.txt", f"banded/banded_{name}.jpg", f"zigzagged/zigzagged_{name}.jpg")
        for kind in ("banded", "zigzagged"):
            picture(base / f"images/{kind}/{kind}_{name}.jpg", ord(name))
    both = {f"{kind}_{name}.jpg": kind for kind in ("banded", "zigzagged") for name in "ab"}
    assert labels(f"data:dtd?root={tmp_path}") == both
    assert labels(f"data:dtd?root={tmp_path}&part=test") == {
        "banded_c.jpg": "banded",
        "zigzagged_c.jpg": "zigzagged",
    }


def test_flowers(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    base.mkdir()
    for k in range(1, 6):
        picture(base / f"jpg/image_{k:05d}.jpg", k)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([77, 1, 2, 3, 102])})
    scipy.io.savemat(
        base / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3, 5]), "tstid": np.array([4, 1])}
    )
    monkeypatch.setattr(torchvision.datasets.flowers102, "check_integrity", lambda path, md5: True)  # MD5 sums
    source = f"data:flowers?root={tmp_path}"
    assert labels(source) == {
        "image_00001.jpg": "passion flower",
        "image_00002.jpg": "pink primrose",
        "image_00003.jpg": "hard-leaved pocket orchid",
        "image_00005.jpg": "blackberry lily",
    }
    assert labels(f"{source}&part=test") == {
        "image_00001.jpg": "passion flower",
        "image_00004.jpg": "canterbury bells",
    }


def test_aircraft(tmp_path):
    base = tmp_path / "fgvc-aircraft-2013b/data"
    lines(base / "variants.txt", "707-320", "727-200", "737-200")
    lines(base / "images_variant_trainval.txt", "0000001 727-200", "0000002 737-200")
    lines(base / "images_variant_test.txt", "0000003 707-320", "0000004 727-200")
    for k in range(1, 5):
        picture(base / f"images/000000{k}.jpg", k)
    source = f"data:aircraft?root={tmp_path}"
    assert labels(source) == {"0000001.jpg": "727-200", "0000002.jpg": "737-200"}
    assert labels(f"{source}&part=test") == {"0000003.jpg": "707-320", "0000004.jpg": "727-200"}


def test_cub(tmp_path):
    base = tmp_path / "CUB_200_2011"
    names = ["001.Albatross/a.jpg", "002.Auklet/b.jpg", "002.Auklet/c.jpg", "001.Albatross/d.jpg"]
    lines(base / "images.txt", *(f"{k} {name}" for k, name in enumerate(names, 1)))
    lines(base / "image_class_labels.txt", "1 1", "2 2", "3 2", "4 1")
    lines(base / "classes.txt", "1 001.Albatross", "2 002.Auklet")
    lines(base / "train_test_split.txt", "1 1", "2 0", "3 1", "4 0")
    for name in names:
        picture(base / "images" / name, ord(name[-5]))
    assert labels(f"data:cub?root={tmp_path}") == {"a.jpg": "001.Albatross", "c.jpg": "002.Auklet"}
    assert labels(f"data:cub?root={tmp_path}&part=test") == {"b.jpg": "002.Auklet", "d.jpg": "001.Albatross"}


def test_inaturalist(tmp_path):
    for part, k in (("train", 0), ("val", 10)):
        images = [
            {"id": k + 7, "file_name": f"train_val2019/Birds/3/{part}1.jpg"},
            {"id": k + 8, "file_name": f"train_val2019/Fungi/0/{part}2.jpg"},
        ]
        annotations = [{"image_id": k + 8, "category_id": 0}, {"image_id": k + 7, "category_id": 3}]
        categories = [{"id": 3, "name": "bird three"}, {"id": 0, "name": "fungus zero"}]
        facts = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{part}2019.json").write_text(json.dumps(facts))
        for image in images:
            picture(tmp_path / image["file_name"], image["id"])
    assert labels(f"data:inaturalist?root={tmp_path}") == {"train1.jpg": "bird three", "train2.jpg": "fungus zero"}
    assert labels(f"data:inaturalist?root={tmp_path}&part=val") == {"val1.jpg": "bird three", "val2.jpg": "fungus zero"}


def test_places365(tmp_path, monkeypatch):
    lines(tmp_path / "categories_places365.txt", "/a/airfield 0", "/b/bakery/shop 1")
    lines(tmp_path / "places365_train_standard.txt", "/b/bakery/shop/1.jpg 1", "/a/airfield/2.jpg 0")
    lines(tmp_path / "places365_val.txt", "v1.jpg 0", "v2.jpg 1")
    picture(tmp_path / "data_large_standard/b/bakery/shop/1.jpg", 1)
    picture(tmp_path / "data_large_standard/a/airfield/2.jpg", 2)
    picture(tmp_path / "val_large/v1.jpg", 3)
    picture(tmp_path / "val_large/v2.jpg", 4)
    monkeypatch.setattr(torchvision.datasets.Places365, "_check_integrity", lambda self, file, md5, download: True)
    source = f"data:places365?root={tmp_path}"
    assert labels(source) == {"1.jpg": "/b/bakery/shop", "2.jpg": "/a/airfield"}
    assert labels(f"{source}&part=val") == {"v1.jpg": "/a/airfield", "v2.jpg": "/b/bakery/shop"}


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_what_is_missing_is_named_with_where_to_get_it(name, tmp_path):
    with pytest.raises(FastconError, match="should hold") as error:
        index([f"data:{name}?root={tmp_path}"])
    assert str(tmp_path) in str(error.value)
    assert datasets.DATASETS[name].where in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_data_set(tmp_path):
    for source, message in (
        ("data:cars?root=x", "no data set 'cars': there are cars196, resisc45"),
        ("data:cars196", "data sets are data:NAME"),
        ("data:cars196?root=x&split=train", "'split' is no option"),
        ("data:cars196?root=x&part=val", "cars196 has no part 'val': there are train, test"),
        ("rendered:houses", "what is rendered is glyphs"),
        ("rendered:glyphs?classes=5-2", "options of glyphs are classes, images"),
        ("rendered:digits?images=5", "options of digits are none"),
    ):
        with pytest.raises(FastconError, match=message):
            index([source])
    lines(tmp_path / "CUB_200_2011/images.txt", "1 001.Albatross/a.jpg")
    for name in ("image_class_labels", "classes", "train_test_split"):
        lines(tmp_path / f"CUB_200_2011/{name}.txt", "1")
    with pytest.raises(FastconError, match="are not as published"):
        index([f"data:cub?root={tmp_path}"])
    cars(tmp_path)
    (tmp_path / "stanford_cars/devkit/cars_train_annos.mat").write_bytes(b"")
    with pytest.raises(FastconError, match="are not as published"):
        index([f"data:cars196?root={tmp_path}"])


def shards(path: Path, *members: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for k, member in enumerate(members):
            buffer = io.BytesIO()
            Image.fromarray(np.full((12, 14, 3), k, np.uint8)).save(buffer, "JPEG")
            header = tarfile.TarInfo(member)
            header.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(header, buffer)


def test_other_layouts_that_people_have(tmp_path):
    """Class folders and tar shards of a part instead of the official files; the union of two parts; the root itself."""
    picture(tmp_path / "folders/train/roses/1.jpg", 1)
    picture(tmp_path / "folders/train/tulips/2.jpg", 2)
    picture(tmp_path / "folders/val/roses/3.jpg", 3)
    picture(tmp_path / "folders/val/tulips/4.jpg", 4)
    both = {"1.jpg": "roses", "2.jpg": "tulips", "3.jpg": "roses", "4.jpg": "tulips"}
    assert labels(f"data:flowers?root={tmp_path}/folders") == both
    assert labels(f"data:flowers?root={tmp_path}/folders&part=val") == {"3.jpg": "roses", "4.jpg": "tulips"}
    shards(tmp_path / "tars/train-000.tar", "a/1.jpg", "b/2.jpg")
    shards(tmp_path / "tars/train-001.tar", "a/3.jpg")
    shards(tmp_path / "tars/test.tar", "b/9.jpg", "a/8.jpg")
    assert labels(f"data:cars196?root={tmp_path}/tars") == {"1.jpg": "a", "2.jpg": "b", "3.jpg": "a"}
    assert labels(f"data:cars196?root={tmp_path}/tars&part=test") == {"9.jpg": "b", "8.jpg": "a"}
    picture(tmp_path / "root/airport/1.jpg", 1)
    picture(tmp_path / "root/bridge/2.jpg", 2)
    assert labels(f"data:resisc45?root={tmp_path}/root") == {"1.jpg": "airport", "2.jpg": "bridge"}
    with pytest.raises(FastconError) as refused:
        index([f"data:dtd?root={tmp_path}/nothing"])
    assert f"{tmp_path}/nothing should hold dtd/dtd/images" in str(refused.value)
    assert "or trainval/CLASS/*.jpg, or trainval*.tar with class folders" in str(refused.value)


def test_places365_of_256_pixels(tmp_path):
    lines(tmp_path / "categories_places365.txt", *(f"/c/class{k:03d} {k}" for k in range(365)))
    lines(tmp_path / "places365_train_standard.txt", "/a/1.jpg 3", "/a/2.jpg 1")
    lines(tmp_path / "places365_val.txt", "v1.jpg 2", "v2.jpg 0")
    for name in ("data_256_standard/a/1.jpg", "data_256_standard/a/2.jpg", "val_256/v1.jpg", "val_256/v2.jpg"):
        picture(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:  # it would compare checksums of lists with 1.8 million lines
        patch.setattr(torchvision.datasets.places365, "check_integrity", lambda *_, **__: True)
        assert labels(f"data:places365?root={tmp_path}") == {"1.jpg": "/c/class003", "2.jpg": "/c/class001"}
        assert labels(f"data:places365?root={tmp_path}&part=val") == {"v1.jpg": "/c/class002", "v2.jpg": "/c/class000"}


def test_whether_a_copy_is_whole(tmp_path, monkeypatch):
    for k in range(6):
        picture(tmp_path / f"NWPU-RESISC45/{'abc'[k % 3]}/{k}.jpg", k)
    small = dataclasses.replace(DATASETS["resisc45"], classes=3, parts={"all": 6}, per_class={"all": 2})
    monkeypatch.setitem(DATASETS, "resisc45", small)
    [part], absent = check("resisc45", str(tmp_path))
    assert (part.images, part.classes, part.per_class, part.faults, absent) == (6, 3, (2, 2), [], {})
    (tmp_path / "NWPU-RESISC45/b/1.jpg").unlink()
    [part], _ = check("resisc45", str(tmp_path))
    assert part.faults == ["5 of 6 images", "1 to 2 images per class instead of 2"]
    cars(tmp_path / "cars")
    (tmp_path / "cars/stanford_cars/cars_train/2.jpg").unlink()
    train, test = check("cars196", str(tmp_path / "cars"))[0]
    assert train.faults[0] == "2 of 8,144 images"
    assert train.faults[1:] == ["3 of 196 classes", "1 listed but missing, first stanford_cars/cars_train/2.jpg"]
    assert test.images == 2
    parts, absent = check("imagenet", str(tmp_path))
    assert parts == []
    assert set(absent) == {"train", "val"}


def test_roots_with_a_plus_or_a_percent(tmp_path):
    for name, written in (("a+b", "a+b"), ("a b&c", "a%20b%26c")):
        picture(tmp_path / name / "NWPU-RESISC45/x/1.jpg", 1)
        picture(tmp_path / name / "NWPU-RESISC45/y/2.jpg", 2)
        assert labels(f"data:resisc45?root={tmp_path}/{written}") == {"1.jpg": "x", "2.jpg": "y"}


def test_rendered_images_are_made_once():
    found = index(["rendered:shapes?classes=3-5&images=4"])
    assert (len(found), found.classes) == (12, ["shape-003", "shape-004", "shape-005"])
    assert index(["rendered:shapes?classes=3-5&images=4"]).digest == found.digest
    both = index(["rendered:pairs?classes=0-3&images=20"])
    assert both.multi_hot.shape == (20, 4)
    assert set(both.multi_hot.sum(1).tolist()) == {1, 2}
    assert len(index(["rendered:mixed?images=9"])) == 9
