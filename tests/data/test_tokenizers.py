import json

import numpy as np
import pytest
import tokenizers

from bigtrain.config import Refused
from bigtrain.data.tokenizers import BPE, EOT, Bytes, FileTokenizer, TokenizerFile

TEXTS = ["Hello, hello world!\n\n  Twice.", "é 漢字 😀\x00\t", f"a {EOT} b", " ", "naïve " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, folder):
  config = Bytes() if request.param == "bytes" else BPE(vocab=300)
  return config.make("corpus", lambda: TEXTS, folder)


def test_every_text_comes_back_and_its_bytes_add_up(tokenizer):
  lengths = tokenizer.byte_lengths()
  assert lengths.shape == (tokenizer.vocab,)
  for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
    assert tokenizer.decode(ids) == text
    assert lengths[ids].sum() == len(text.encode())
    assert np.array_equal(ids, tokenizer.encode(text))
    assert ids.dtype == np.int32


def test_a_text_that_spells_end_of_text_does_not_end(tokenizer):
  assert tokenizer.eot not in tokenizer.encode(EOT)
  assert tokenizer.byte_lengths()[tokenizer.eot] == 0
  assert tokenizer.decode([tokenizer.eot]) == ""


def test_bpe_learns_merges_once_and_from_other_texts_anew(folder):
  opened = []

  def texts(text="abcabcabcabc " * 20):
    opened.append(text)
    return [text]

  made = [BPE(vocab=270).make("x", texts, folder) for _ in range(2)]
  assert len(opened) == 1
  assert made[0].digest == made[1].digest
  assert len(made[0].encode("abcabc")) < 6
  assert BPE(vocab=270).make("y", lambda: texts("zzz " * 30), folder).digest != made[0].digest


def test_bpe_of_a_tiny_text_has_the_stated_vocabulary(folder):
  made = BPE(vocab=5000).make("tiny", lambda: ["a"], folder)
  assert made.vocab == BPE(vocab=5000).size() == len(made.byte_lengths()) == 5000
  assert made.decode([4999]) == ""
  with pytest.raises(Refused, match="at least 257"):
    BPE(vocab=256).check()


def save(folder, name, tokenizer):
  path = folder / name
  tokenizer.save(str(path))
  return path


def word_level():
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "bc": 2}, "[UNK]"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(["</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 3)]
  )
  return made


def test_any_tokenizer_file_is_read_without_its_special_tokens(folder):
  path = save(folder, "words.json", word_level())
  made = TokenizerFile(path=str(path), eot="</s>").make("x", list, folder)
  assert (made.vocab, made.eot) == (4, 3)
  assert made.encode("a bc a").tolist() == [1, 2, 1]


def test_bytes_of_sentencepiece_tokens_are_read_as_that_library_writes_them(folder):
  pieces = ["<unk>", "<0x0A>", "▁", "▁the", "é", "##ing"]
  vocab = [(piece, 0.0) for piece in pieces]
  path = save(folder, "pieces.json", tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0)))
  lengths = FileTokenizer(path, "<unk>").byte_lengths()
  assert lengths.tolist() == [0, 1, 1, 4, 2, 3]


def test_wrong_tokenizer_files_are_refused_with_the_nearest_name(folder):
  path = save(folder, "words2.json", word_level())
  with pytest.raises(Refused, match=r"no token '<s>'; did you mean '</s>'\?"):
    TokenizerFile(path=str(path), eot="<s>").size()
  with pytest.raises(Refused, match=r"is not a file; did you mean 'words2.json'\?"):
    TokenizerFile(path=str(folder / "word2.json")).size()
  (folder / "bad.json").write_text("{}")
  with pytest.raises(Refused, match="not a tokenizer"):
    TokenizerFile(path=str(folder / "bad.json")).size()


def test_special_tokens_are_named_have_ids_and_come_from_no_text(folder):
  config = BPE(vocab=300, special=("[CLS]", "[MASK]"))
  made = config.make("corpus", lambda: TEXTS, folder)
  assert {made.eot, made.id_of("[CLS]"), made.id_of("[MASK]")} == {0, 1, 2} and made.vocab == 300
  ids = made.encode("a [MASK] b")
  assert made.id_of("[MASK]") not in ids and made.decode(ids) == "a [MASK] b"
  assert BPE(vocab=300).make("corpus", lambda: TEXTS, folder).digest != made.digest
  with pytest.raises(Refused, match=r"'\[MSK\]'; did you mean '\[MASK\]'"):
    made.id_of("[MSK]")
  with pytest.raises(Refused, match="bytes has no"):
    Bytes().make("corpus", lambda: TEXTS, folder).id_of("[MASK]")
  with pytest.raises(Refused, match="at least 259"):
    BPE(vocab=258, special=("[CLS]", "[MASK]")).check()
  with pytest.raises(Refused, match="twice"):
    BPE(special=("[MASK]", "[MASK]")).check()


def test_words_begin_at_spaces_or_where_wordpiece_says_nothing(tokenizer, folder):
  starts = tokenizer.word_starts()[tokenizer.encode(" naïve world")]
  assert starts.shape == (len(tokenizer.encode(" naïve world")),)
  assert starts.sum() == 2 and starts[0]
  pieces = {"[UNK]": 0, "un": 1, "##able": 2, "to": 3, "[SEP]": 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
  made.add_special_tokens(["[SEP]"])
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / "pieces.json"))
  read = FileTokenizer(folder / "pieces.json", "[SEP]")
  assert read.word_starts()[read.encode("unable to")].tolist() == [True, False, True]


def test_a_file_at_which_the_library_panics_is_refused(tmp_path):
  made = {"model": {"type": "BPE", "continuing_subword_prefix": "abcdef", "vocab": {"a": 0, "b": 1},
                    "merges": [["a", "b"]]}}  # fmt: skip
  (tmp_path / "tokenizer.json").write_text(json.dumps(made))
  with pytest.raises(Refused, match=r"is not a tokenizer.json"):
    TokenizerFile(path=str(tmp_path / "tokenizer.json"), eot="a").size()
