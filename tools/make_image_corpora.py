"""Makes the embedded images, bigtrain/data/corpus/{fashion_mnist,digits}.

`python tools/make_image_corpora.py FASHION_MNIST DIGITS`, where FASHION_MNIST is the folder of the
four original IDX files (github.com/zalandoresearch/fashion-mnist) and DIGITS the file
sklearn/datasets/data/digits.csv.gz of scikit-learn 1.9.
"""

import lzma
import pathlib
import sys

import numpy as np

from bigtrain.data.arrays import read_idx
from bigtrain.data.sources import CORPUS

EACH = {"train": 450, "t10k": 100}  # The first images of each class: about 2 MB in all.


def main() -> None:
  folder, digits = map(pathlib.Path, sys.argv[1:])
  for part, n in EACH.items():
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == c)[:n] for c in range(10)]))
    write(CORPUS / "fashion_mnist" / part, images[kept], labels[kept])
  table = np.loadtxt(digits, delimiter=",").astype(np.uint8)
  write(CORPUS / "digits" / "digits", table[:, :-1].reshape(-1, 8, 8), table[:, -1])


def write(prefix: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
  prefix.parent.mkdir(exist_ok=True)
  for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    data = lzma.compress(header + array.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    pathlib.Path(f"{prefix}-{kind}-ubyte.xz").write_bytes(data)


if __name__ == "__main__":
  main()
