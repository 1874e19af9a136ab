import io
import os

import numpy as np
import pytest
from PIL import Image

from bigtrain.config import Refused
from bigtrain.data import survey
from bigtrain.data.folders import ImageFolder
from bigtrain.data.vision import ImageData
from bigtrain.validate import validate
from tests import toys

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture
def root(tmp_path, monkeypatch):
  """Folders train/ and val/ of pictures that have the colour of their class's name."""
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  for part, n in (("train", 6), ("val", 2)):
    for name, colour in COLOURS.items():
      (tmp_path / part / name).mkdir(parents=True)
      for i in range(n):
        pixels = np.full((20 + i, 30, 3), colour, np.uint8)
        pixels[0, 0] = i + 10 * (part == "val")  # No two files are equal.
        kind = ("png", "jpg")[i % 2]
        Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.{kind}", quality=95)
  return tmp_path


def data(root, **fields):
  train, held_out = str(root / "train"), str(root / "val")
  source = ImageFolder(**{"train": train, "validation": held_out, "classes": 3} | fields)
  return ImageData(source=source, size=8).make(0)


def test_classes_are_numbered_in_order_of_their_folders_names(root):
  made = data(root)
  assert (made.examples(), made.eval_examples(), made.kept_out()) == (18, 6, None)
  for batch in (made.batch(0, 18), made.eval_batch(0, 6)):
    middle = batch["inputs"][:, 4, 4] > 0
    wanted = np.array([COLOURS[name] for name in sorted(COLOURS)]) > 0
    np.testing.assert_array_equal(middle, wanted[batch["labels"]])
  assert made.about() == f"{root}/train: 18 examples of 3 classes, 6 held out"


def test_a_share_of_one_folder_can_be_held_out(root):
  made = data(root, validation=0.3)
  assert made.examples() + made.eval_examples() == 18 and 0 < made.eval_examples() < 12


def test_damaged_files_are_counted_kept_out_and_named(root):
  whole = (root / "train/red/1.jpg").read_bytes()
  (root / "train/red/1.jpg").write_bytes(whole[: len(whole) // 2])
  (root / "train/red/2.png").write_bytes((root / "train/red/2.png").read_bytes()[:-30])
  (root / "train/blue/notes.txt").write_text("text")
  (root / "val/green/0.png").write_bytes(b"")
  (root / "train/red/.hidden").write_text("left alone")
  made = data(root)
  assert (made.examples(), made.eval_examples()) == (16, 5)
  found = str(made.kept_out())
  assert "2 are damaged" in found
  assert "2 are no JPEG, PNG, WEBP or BMP image" in found
  assert f"{root}/train/blue/notes.txt" in found
  with pytest.raises(Refused, match=r"bad examples: .*damaged.*on_error"):
    data(root, on_error="refuse").examples()


def test_images_of_another_size_are_counted_where_all_must_have_one(root):
  made = data(root, size=(20, 30), validation=0.0)
  assert made.examples() == 3 and "3 have 21 x 30 pixels, not 20 x 30" in str(made.kept_out())


def test_modes_that_are_no_picture_are_counted(root):
  floats = Image.fromarray(np.zeros((4, 4), np.float32))
  file = io.BytesIO()
  floats.save(file, "tiff")
  (root / "train/red/x.tif").write_bytes(file.getvalue())
  assert "1 is no JPEG, PNG, WEBP or BMP image" in str(data(root).kept_out())


def test_a_held_out_file_that_is_also_trained_on_is_kept_out_of_training(root):
  twin = (root / "val/red/0.png").read_bytes()
  (root / "train/red/twin.png").write_bytes(twin)
  made = data(root)
  assert made.examples() == 18
  assert f"{root}/train/red/twin.png is also held out" in str(made.kept_out())


def test_files_are_decoded_once_for_ever_and_again_when_one_changes(root, monkeypatch):
  looked = []
  real = survey._look
  monkeypatch.setattr(survey, "_look", lambda *args: looked.append(1) or real(*args))
  first = data(root).digest()
  assert len(looked) == 2 and data(root).digest() == first and len(looked) == 2
  Image.new("RGB", (9, 9)).save(root / "train/red/0.png")
  assert data(root).digest() != first and len(looked) == 3
  # A look is not shared by data that is looked at in another way.
  smaller = data(root, size=(20, 30), validation=0.0)
  with pytest.raises(Refused, match=r"class 2.*kept out of the data: .*not 20 x 30"):
    smaller.examples()
  assert len(looked) == 4


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (
      {"classes": 4},
      "has folders of 3 classes, blue, green, red, but `classes` is 4; set experime",
    ),
    (
      {"train": "{}/train/red", "classes": 2},
      "red holds images, not .*; give the folder above, .*n",
    ),
    ({"train": "{}/trian"}, "trian is not there.*did you mean 'train'"),
    ({"validation": "{}/train"}, "must not be trained on"),
    ({"validation": "{}/train/red"}, "must not be trained on"),
    ({"train": "{}/all", "validation": 0.1}, "all holds .*/all/train and .*/all/val, not classes"),
  ],
)
def test_wrong_folders_are_refused(root, fields, said):
  (root / "all").mkdir()
  for part in ("train", "val"):
    os.symlink(root / part, root / "all" / part)
  fields = {k: v.format(root) if isinstance(v, str) else v for k, v in fields.items()}
  with pytest.raises(Refused, match=said):
    made = data(root, **fields)
    validate(toys.experiment(data=made._config))
    made.examples()


def test_a_held_out_class_that_is_not_trained_on_and_an_empty_one_are_refused(root):
  (root / "val/read").mkdir()
  with pytest.raises(Refused, match=r"'read', not trained on; did you mean 'red'\?"):
    data(root).examples()
  (root / "val/read").rmdir()
  for path in (root / "train/green").iterdir():
    path.unlink()
  with pytest.raises(
    Refused, match=r"train/green has no image \(class 1\); add some, or rem.*classes = 2"
  ):
    data(root).examples()
