import hashlib
import pathlib

import numpy as np
import pytest

from bigtrain import cli
from bigtrain.config import Refused
from bigtrain.data import datasets, fetch
from bigtrain.data.arrays import read_idx
from bigtrain.data.datasets import Digits, FashionMNIST, FashionMNISTSubset, Synthetic
from bigtrain.data.features import FeatureData
from bigtrain.data.shuffle import key_of
from bigtrain.data.sources import CORPUS
from bigtrain.data.vision import ImageData
from bigtrain.exit_codes import Exit
from bigtrain.validate import validate
from tests import toys


def test_the_digits_are_those_of_scikit_learn():
  split, _ = Digits().open()
  images, labels = split.read(np.arange(1797))
  # hashlib.sha256 of load_digits() of scikit-learn 1.9.1, data.astype(np.uint8) and target.
  digest = hashlib.sha256((images // 15).tobytes() + labels.tobytes()).hexdigest()
  assert digest == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
  assert not (images % 15).any() and images.max() == 240
  # Its documented counts by class.
  assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_the_subset_of_fashion_mnist_has_as_many_of_every_class():
  train, held_out = FashionMNISTSubset().open()
  for split, each in ((train, 450), (held_out, 100)):
    images, labels = split.read(np.arange(len(split)))
    assert np.bincount(labels).tolist() == [each] * 10 and images.shape[1:] == (28, 28)
  assert len(FashionMNISTSubset.names) == 10
  first = train.read(np.array([0]))
  # The first training image, an ankle boot: sum of its pixels in the original files.
  assert (first[1][0], int(first[0].sum())) == (9, 76247)
  size = sum(path.stat().st_size for path in (CORPUS / "fashion_mnist").iterdir())
  assert size < 2.2e6


def test_made_up_features_are_fixed_by_their_seed():
  read = lambda **c: Synthetic(**c).open().train.read(np.arange(50))[0]
  np.testing.assert_array_equal(read(), read())
  assert not np.array_equal(read(), read(seed=1))
  assert np.abs(read()).sum() == pytest.approx(4273.004, abs=0.01)


@pytest.mark.parametrize(("classes", "distance"), [(2, 1.0), (10, 4.0)])
def test_the_best_possible_accuracy_is_reached_by_the_best_classifier(classes, distance):
  source = Synthetic(examples=classes, held_out=40_000, classes=classes, distance=distance)
  x_NC, labels_N = source.open().held_out.read(np.arange(40_000))
  centres_CL = np.linalg.qr(datasets._normal(key_of(0, 0), 100, classes))[0]
  accuracy = (np.abs(x_NC @ centres_CL).argmax(1) == labels_N).mean()
  assert abs(accuracy - source.best_accuracy()) < 0.007
  assert np.bincount(labels_N).min() == 40_000 // classes


def test_no_linear_model_learns_the_made_up_classes():
  data = FeatureData(source=Synthetic()).make(0)
  train, held_out = data.batch(0, 10_000), data.eval_batch(0, 2_000)
  weights = np.linalg.lstsq(train["inputs"], np.eye(10)[train["labels"]], rcond=None)[0]
  accuracy = ((held_out["inputs"] @ weights).argmax(1) == held_out["labels"]).mean()
  assert accuracy < 0.14
  assert Synthetic().best_accuracy() > 0.97


@pytest.mark.parametrize("fields", [{"classes": 101}, {"classes": 1}, {"examples": 5}])
def test_impossible_made_up_data_is_refused(fields):
  with pytest.raises(Refused, match="at least"):
    validate(toys.experiment(data=FeatureData(source=Synthetic(**fields))))


@pytest.fixture
def published(tmp_path, monkeypatch):
  """A folder with four small files in place of the real ones, and their digests."""
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  folder = tmp_path / "published"
  folder.mkdir()
  for name in datasets.FASHION_MNIST:
    data = (CORPUS / "fashion_mnist" / name.replace(".gz", ".xz")).read_bytes()
    (folder / name.replace(".gz", ".xz")).write_bytes(data)
  digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
  monkeypatch.setattr(datasets, "FASHION_MNIST", digests)
  monkeypatch.setitem(fetch.DATASETS, "fashion_mnist", (digests, (f"{folder.as_uri()}/",)))
  return folder


def test_the_whole_set_is_refused_until_it_is_fetched_and_then_used(published, capsys):
  data = ImageData(source=FashionMNIST(), size=28)
  with pytest.raises(Refused, match="bigtrain data fetch fashion_mnist"):
    validate(toys.experiment(data=data))
  assert data.smoke().source == FashionMNISTSubset()  # Another set, so that the code can be tried.
  features = FeatureData(source=FashionMNIST())
  assert (features.smoke().input_shape(), features.smoke().n_classes()) == ((784,), 10)
  assert cli.main(["data", "fetch", "fashion_mnist"]) == Exit.DONE
  validate(toys.experiment(data=data))
  assert data.make(0).about().startswith("Fashion-MNIST: ")
  path = pathlib.Path(capsys.readouterr().out.strip()) / "train-images-idx3-ubyte.xz"
  assert len(read_idx(path)) == 4_500
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(Refused, match=r"is damaged; run `bigtrain data fetch fashion_mnist`"):
    data.make(0).examples()
  assert cli.main(["data", "fetch", "fashion_mnist"]) == Exit.DONE  # Only that file again.
  assert data.make(0).examples() == 4_500


def test_a_copy_in_a_folder_serves_and_one_with_another_digest_does_not(
  published, tmp_path, capsys
):
  out = ["--out", str(tmp_path / "out")]
  copy = ["data", "fetch", "fashion_mnist", "--source", str(published), *out]
  assert cli.main(copy) == Exit.DONE
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(datasets.FASHION_MNIST)
  (published / "t10k-labels-idx1-ubyte.xz").write_bytes(b"other")
  (tmp_path / "out" / "t10k-labels-idx1-ubyte.xz").unlink()
  assert cli.main(copy) == Exit.REFUSED
  assert "is another file or damaged" in capsys.readouterr().err
  assert len(list((tmp_path / "out").iterdir())) == 3  # Nothing half done is left.


def test_a_folder_that_is_not_there_is_told_with_the_files_that_are_wanted(
  published, tmp_path, capsys
):
  copy = ["data", "fetch", "fashion_mnist", "--source", str(tmp_path / "publisher")]
  assert cli.main(copy) == Exit.REFUSED
  said = capsys.readouterr().err
  assert "publisher is not there" in said and "did you mean 'published'?" in said
  assert all(name in said for name in datasets.FASHION_MNIST) and not (tmp_path / "cache").exists()


def test_help_names_the_datasets(capsys):
  with pytest.raises(SystemExit):
    cli.main(["data", "fetch", "--help"])
  assert "fashion_mnist" in capsys.readouterr().out


def test_where_no_mirror_answers_each_is_named_with_its_reason(published, tmp_path, capsys):
  for path in published.iterdir():
    path.unlink()
  assert cli.main(["data", "fetch", "fashion_mnist"]) == Exit.REFUSED
  said = capsys.readouterr().err
  assert published.as_uri() in said and "--source FOLDER" in said


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["fech"], "did you mean 'fetch'?"),
    (["fetch"], "takes the name of a dataset first"),
    (["fetch", "fashon_mnist"], "did you mean 'fashion_mnist'?"),
  ],
)
def test_a_mistyped_command_is_answered_with_what_may_be_meant(arguments, said, capsys):
  assert cli.main(["data", *arguments]) == Exit.REFUSED
  assert said in capsys.readouterr().err
