"""Compresses the six Austen novels into bigtrain/data/corpus: the maker of the embedded corpus.

`python tools/make_austen_corpus.py FOLDER`, where FOLDER holds the six .txt files named in NOVELS
(package janeaustenr 1.0.0 on CRAN, one file a novel, lines joined by newlines).
"""

import pathlib
import sys

import zstandard

from bigtrain.data.sources import CORPUS, NOVELS


def main() -> None:
  folder = pathlib.Path(sys.argv[1])
  compressor = zstandard.ZstdCompressor(level=22, write_checksum=True)
  for name in NOVELS:
    data = (folder / f"{name}.txt").read_bytes()
    (CORPUS / f"{name}.txt.zst").write_bytes(compressor.compress(data))


if __name__ == "__main__":
  main()
