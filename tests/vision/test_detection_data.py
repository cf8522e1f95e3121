"""What the detection recipe reads and scores: handwritten annotations in the formats of COCO and Pascal VOC."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("sklearn", reason="needs the extra rebnn_hf[recipes]")
pytest.importorskip("datasets", reason="needs the extra rebnn_hf[recipes]")

from PIL.Image import new

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from detection_data import default_pair, digest, load_folder, load_shapes, spread
from detection_images import AnnotatedImage, TrainingDetections, flipped, with_good_boxes

COCO = {
    "images": [
        {"id": 7, "file_name": "b.jpg", "width": 60, "height": 40},
        {"id": 3, "file_name": "deep/a.png", "width": 50, "height": 50},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "bbox": [10, 5, 20, 30], "iscrowd": 0, "area": 600},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0.5, 0, 59.75, 40.25], "iscrowd": 1},
    ],
}

VOC = """
<annotation>
  <folder>VOC2007</folder><filename>000005.jpg</filename>
  <size><width>50</width><height>37</height><depth>3</depth></size>
  <object>
    <name>chair</name><pose>Rear</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>26</xmin><ymin>21</ymin><xmax>32</xmax><ymax>34</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>
  <object>
    <name>boat</name><difficult>1</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>50</xmax><ymax>37</ymax></bndbox>
  </object>
</annotation>
"""


def write_coco(folder: Path, name: str, content: dict) -> Path:
    for image in COCO["images"]:
        file = folder / name / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        new("RGB", (image["width"], image["height"]), (255, 0, 51)).save(file)
    annotations = folder / "annotations" / f"instances_{name}.json"
    annotations.parent.mkdir(exist_ok=True)
    annotations.write_text(json.dumps(content))
    return annotations


@pytest.fixture
def coco(tmp_path) -> Path:
    for name in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", name, COCO)
    return tmp_path / "coco"


def write_voc(folder: Path, lists: dict[str, str], text: str = VOC) -> None:
    for name in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(content)
    (folder / "Annotations" / "000005.xml").write_text(text)
    new("L", (50, 37), 102).save(folder / "JPEGImages" / "000005.jpg")


@pytest.fixture
def voc(tmp_path) -> Path:
    lists = {"trainval": "000005\n", "test": "000005\n\n", "train": "", "val": "", "boat_trainval": "000005 -1\n"}
    write_voc(tmp_path / "voc", lists)
    return tmp_path / "voc"


def load(folder: Path, train=(), validation=(), skip_bad=False):
    return load_folder(folder, list(train), list(validation), skip_bad)


def test_coco(coco):
    task, splits = load(coco)
    assert task.labels == ("person", "dog") and task.name == "coco" and (task.min_size, task.epochs) == (800, 12)
    first, second = splits["train"]
    assert first.boxes.tolist() == [[10, 5, 30, 35], [0.5, 0, 60, 40]]  # the last is cut by a quarter of a pixel
    assert first.labels.tolist() == [1, 0] and first.crowd.tolist() == [False, True]
    assert (first.width, first.height, first.file) == (60, 40, coco / "train2017" / "b.jpg")
    assert second.file.name == "a.png" and second.boxes.shape == (0, 4) and second.labels.dtype == np.int64
    assert second.pixels()[:, 4, 9].tolist() == pytest.approx([1, 0, 0.2]) and second.pixels().shape == (3, 50, 50)


def test_voc(voc):
    task, splits = load(voc)
    assert task.labels == ("boat", "chair")
    (image,) = splits["train"]
    assert image.boxes.tolist() == [[25, 20, 32, 34], [0, 0, 50, 37]]
    assert image.labels.tolist() == [1, 0] and image.crowd.tolist() == [False, True]
    assert (image.width, image.height) == (50, 37) and splits["validation"][0].file.name == "000005.jpg"
    assert image.pixels().shape == (3, 37, 50) and image.pixels().mean().item() == pytest.approx(0.4)


def test_splits_of_several_years(tmp_path, voc):
    write_voc(tmp_path / "kit" / "VOC2007", {"trainval": "000005", "test": "000005"})
    write_voc(tmp_path / "kit" / "VOC2012", {"trainval": "000005"}, VOC.replace("boat", "sofa"))
    years = ["VOC2007/trainval", "VOC2012/trainval"]
    task, splits = load(tmp_path / "kit", years, ["VOC2007/test"])
    assert task.labels == ("boat", "chair", "sofa") and len(splits["train"]) == 2 and len(splits["validation"]) == 1
    assert [image.labels.tolist() for image in splits["train"]] == [[1, 0], [1, 2]]
    assert default_pair(voc) == ("trainval", "test")


def changed(where: str, index: int, **values) -> dict:
    content = json.loads(json.dumps(COCO))
    content[where][index].update(values)
    return content


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (changed("annotations", 0, category_id=2), "annotation 1 in .* category_id 2, which the file does not define"),
        (changed("annotations", 0, image_id=9), "annotation 1 in .* image_id 9, which"),
        (changed("annotations", 1, bbox=[1, 2, 3]), r"annotation 2 in .* bbox \[1, 2, 3\]: expected \[x, y, width"),
        (changed("images", 0, file_name="c.jpg"), "names the image c.jpg, which is not in"),
        (
            changed("annotations", 0, bbox=[10, 5, 0, 30]),
            r"1 boxes are empty or leave .*\[10.0, 5.0, 10.0, 35.0\].*b.jpg",
        ),
        (changed("annotations", 0, bbox=[50, 5, 20, 30]), r"60 x 40 pixels\).*--skip_bad_boxes"),
        ({"images": []}, "has no annotations, categories"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_said(coco, content, complaint):
    write_coco(coco, "train2017", content)
    with pytest.raises(ValueError, match=complaint):
        load(coco)


def test_bad_boxes_can_be_left_out(coco):
    write_coco(coco, "train2017", changed("annotations", 0, bbox=[50, 5, 20, 30]))
    _, splits = load(coco, skip_bad=True)
    assert splits["train"][0].boxes.tolist() == [[0.5, 0, 60, 40]] and splits["train"][0].labels.tolist() == [0]


def test_files_that_are_missing_or_broken_are_named(coco, voc, tmp_path):
    with pytest.raises(ValueError, match=r"there is no split .*dev: neither .*instances_dev.json .* nor .*dev.txt"):
        load(coco, ["train2017"], ["dev"])
    with pytest.raises(ValueError, match="is no folder"):
        load(tmp_path / "nowhere")
    (coco / "annotations" / "instances_val2017.json").rename(coco / "annotations" / "instances_x.json")
    with pytest.raises(ValueError, match="has the splits train2017, x, in annotations"):
        load(coco)
    (coco / "annotations" / "instances_x.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        load(coco, ["x"], ["x"])
    annotation = voc / "Annotations" / "000005.xml"
    for text, complaint in (
        ("<annotation>", "is no XML file"),
        (VOC.replace("xmax", "xend"), "has no bndbox/xmax in its <object>"),
        (VOC.replace("000005.jpg", "6.jpg"), "names the image 6.jpg, which is not in"),
        (VOC.replace("<xmax>32", "<xmax>52"), "1 boxes are empty or leave"),
    ):
        annotation.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            load(voc)
    annotation.unlink()
    with pytest.raises(ValueError, match=r"000005.xml does not exist, but its image is in the list"):
        load(voc)
    with pytest.raises(ValueError, match="has no images to be used for train"):
        load(voc, ["train"], ["val"])


def test_classes_must_be_known_from_training(coco):
    content = changed("categories", 0, name="cat")
    write_coco(coco, "val2017", content)
    with pytest.raises(ValueError, match=r"b.jpg has an object of class 'cat', which .*: they have person, dog"):
        load(coco)
    content["categories"].reverse()
    content["categories"][0]["name"], content["categories"][1]["name"] = "x", "dog"
    content["annotations"] = content["annotations"][:1]
    write_coco(coco, "val2017", content)
    assert load(coco)[1]["validation"][0].labels.tolist() == [1]  # by name, whatever the ids


def test_an_image_of_another_size_is_refused(coco):
    (image, _) = load(coco)[1]["train"]
    with pytest.raises(ValueError, match=r"b.jpg is 60 x 40 pixels, but its annotations are for 61 x 40"):
        replace(image, width=61).pixels()


def test_flipping_twice_changes_nothing():
    pixels = torch.rand(3, 4, 6)
    boxes = torch.tensor([[1.0, 0, 3, 4]])
    other, turned = flipped(pixels, boxes)
    assert turned.tolist() == [[3, 0, 5, 4]]
    torch.testing.assert_close(other[:, :, 3:5], pixels[:, :, 1:3].flip(-1), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(flipped(other, turned), (pixels, boxes), strict=True))


def test_training_images_depend_on_seed_epoch_and_index_alone(tmp_path):
    _, splits = load_shapes(tmp_path)
    data = TrainingDetections(splits["train"], seed=1)
    first, again, later = data[0, 5], data[0, 5], [data[epoch, 5] for epoch in range(1, 9)]
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    turned = [not torch.equal(first["pixel_values"], other["pixel_values"]) for other in later]
    assert any(turned) and not all(turned)
    for example in (first, later[turned.index(True)]):
        for x1, y1, x2, y2 in example["labels"]["boxes"].int().tolist():
            inside = example["pixel_values"][:, y1:y2, x1:x2]
            assert inside.max(0).values[(y2 - y1) // 2].min() > 0.45  # the shape reaches from side to side
            assert example["pixel_values"][:, y1:y2, max(x1 - 1, 0)].amax() < 0.3 or x1 == 0  # and not beyond
    image = splits["train"][5]
    crowd = replace(image, crowd=np.ones_like(image.crowd))
    assert TrainingDetections([crowd], seed=1)[0, 0]["labels"]["boxes"].shape == (0, 4)


def test_shapes_are_the_same_every_time(tmp_path):
    tasks, digests = zip(*((t, digest(s, t.labels)) for t, s in (load_shapes(tmp_path / n) for n in "ab")), strict=True)
    assert digests[0] == digests[1] and tasks[0].labels == ("disc", "rectangle")
    _, splits = load_shapes(tmp_path / "a")
    assert (len(splits["train"]), len(splits["validation"])) == (48, 16)
    counts = np.bincount(np.concatenate([image.labels for image in splits["train"]]))
    assert counts.min() > 30 and len(with_good_boxes(splits["train"], skip_bad=False)) == 48
    splits["train"][0].boxes[0, 0] += 1
    assert digest(splits, ("disc", "rectangle")) != digests[0]
    assert [image.file.name for image in spread(splits["validation"], 3)] == ["00.png", "07.png", "15.png"]
    assert isinstance(splits["train"][0], AnnotatedImage)
