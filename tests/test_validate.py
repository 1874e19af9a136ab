"""What an experiment is refused for before any device work, and how it is shrunk."""

import dataclasses
import math
import pathlib

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from bigtrain import hints, load
from bigtrain.config import Refused, config
from bigtrain.data.datasets import FASHION_MNIST, FashionMNIST, fetched
from bigtrain.data.mixture import Mixture, Source
from bigtrain.data.sources import Files
from bigtrain.data.spans import Spans
from bigtrain.data.text import TextData
from bigtrain.data.tokenizers import TokenizerFile
from bigtrain.experiment import Checkpoints, Evaluation
from bigtrain.mesh import AXES, OTHER_NAMES, Mesh
from bigtrain.models.attention import AttentionConfig
from bigtrain.models.encoder import EncoderConfig, TextClassifierConfig
from bigtrain.models.feed_forward import FeedForwardConfig
from bigtrain.models.mlp import MLPConfig
from bigtrain.models.moe import MoEConfig
from bigtrain.models.transformer import BlockConfig
from bigtrain.models.vit import ViTConfig
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.schedule import Cosine, InverseSqrt
from bigtrain.parallel.expert import Dropless
from bigtrain.smoke import shrink
from bigtrain.validate import remarks, validate
from tests import toys

MESH = Mesh(data=2, fsdp=2)
BLOCK = BlockConfig(
  attention=AttentionConfig(heads=4, causal=False), feed_forward=FeedForwardConfig(hidden=8)
)
STACK = {"dim": 16, "layers": 2, "pattern": (BLOCK,)}
VIT = ViTConfig(image=28, channels=1, patch=7, classes=10, **STACK)
MLP = MLPConfig(inputs=784, hidden=(16,), classes=10)
TEXTS = TextClassifierConfig(encoder=EncoderConfig(vocab=300, **STACK), classes=10)


@pytest.fixture(autouse=True)
def of_command():
  """Remedies are said as to who runs a command."""
  with hints.of_command():
    yield


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    (
      {"batch": 30, "mesh": MESH},
      "batch 30 is not divisible by the 4 batch shards of the mesh (data=2, fsdp=2); use 28 or 32",
    ),
    ({"batch": 2, "mesh": MESH}, "(data=2, fsdp=2); use 4"),
    ({"batch": 32, "microbatches": 3}, "batch 32 is not divisible by 3 microbatches; use 30 or 33"),
    (
      {"batch": 36, "microbatches": 3, "mesh": MESH, "batch_stages": ((5, 30),)},
      "batch_stages.0.1 30 is not divisible by the 4 batch shards of the mesh (data=2, fsdp=2) "
      "times 3 microbatches; use 24 or 36",
    ),
    (
      {"evaluation": Evaluation(batch=6), "mesh": MESH},
      "evaluation.batch 6 is not divisible by the 4 batch shards of the mesh (data=2, fsdp=2); "
      "use 4 or 8",
    ),
    (
      {"model": toys.Model(dim=66), "mesh": Mesh(fsdp=4)},
      "model.dim 66 is not divisible by 4, the mesh's fsdp=4; use 64 or 68, or set --mesh.fsdp 2",
    ),
    (
      {"model": toys.Model(pattern=(toys.Attention(kv_heads=2),)), "mesh": Mesh(fsdp=1, tensor=4)},
      "model.pattern.0.kv_heads 2 is not divisible by 4, the mesh's tensor=4; use 4, "
      "or set --mesh.tensor 2",
    ),
    (
      {
        "model": toys.Model(vocab=257),
        "data": toys.Data(tokens=257),
        "mesh": Mesh(fsdp=2, tensor=2),
      },
      "model.vocab 257 is not divisible by 2, the mesh's tensor=2; use 384, or set --mesh.tensor 1",
    ),
    ({"mesh": Mesh(data=3, fsdp=1)}, "mesh wants 3 devices (data=3, fsdp=1, tensor=1) but 4 are"),
    (
      {"mesh": Mesh(data=3, fsdp=1)},
      "attached; set --mesh.fsdp -1 and the other axes to a divisor of 4 to use what is there, or "
      "JAX_NUM_CPU_DEVICES=3 to try it on CPU",
    ),
    ({"mesh": Mesh(tensor=8)}, "attached; set the other axes to a divisor of 4 to use what is"),
    ({"steps": 0}, "steps must be at least 1, or epochs given in their place"),
    ({"steps": -5}, "steps must be at least 1, not -5, or epochs given in their place"),
    ({"steps": 9, "epochs": 2.0}, "steps 9 and epochs 2.0 are both given; set --epochs None"),
    ({"steps": 0, "epochs": 0.0}, "epochs must be above 0, not 0.0"),
    ({"steps": "100"}, "steps must be int, not '100' (str)"),
    ({"evaluation": Evaluation(every=-1)}, "evaluation.every must be at least 0, not -1"),
    ({"checkpoints": Checkpoints(verify=2)}, "checkpoints.verify is 2; it is a share"),
    ({"evaluation": Evaluation(temperature=-0.5)}, "evaluation.temperature must be at least 0"),
    ({"batch_stages": ((9, 32), (5, 32))}, "batch_stages start at steps [9, 5]"),
    ({"batch_stages": ((9, 0),)}, "batch_stages: every batch must be at least 1"),
    (
      {"steps": 2**27, "batch": 32},
      "steps take 4294967296 examples; the data position holds 2**32",
    ),
    (
      {"data": toys.Data(tokens=257)},
      "model.vocab is 256 but the tokenizer has 257 tokens; set --model.vocab 257 (or up to 384,",
    ),
    (
      {"data": toys.Data(length=512)},
      "the data's rows have 512 tokens but the model 256 positions; give the model 512",
    ),
    (
      {"model": toys.Model(pattern=(toys.Attention(), toys.Attention(kv_heads=3)))},
      "model.pattern.1: 4 heads are not divisible by kv_heads=3",
    ),
  ],
)
def test_an_impossible_experiment_is_refused_in_one_line(fields, expected):
  fields = {"mesh": Mesh(), **fields}
  devices = 4
  with pytest.raises(Refused) as refusal:
    validate(toys.experiment(**fields), devices)
  assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"mesh": MESH, "microbatches": 2, "batch_stages": ((5, 64), (50, 8))},
    {"model": toys.Model(vocab=384), "data": toys.Data(tokens=257)},
    {"data": toys.Data(tokens=None)},
    {"steps": 2**27 - 1, "batch": 32, "mesh": Mesh(data=4, fsdp=1)},
    {"steps": 2**27, "batch": 32, "batch_stages": ((100, 16),)},
    {"steps": 100, "batch_stages": ((100, 2**32),)},
  ],
)
def test_a_possible_experiment_passes(fields):
  validate(toys.experiment(**fields), devices=4)


def test_all_problems_that_do_not_depend_on_each_other_are_named_at_once():
  model = toys.Model(dim=66, pattern=(toys.Attention(kv_heads=3),))
  with pytest.raises(Refused) as refusal:
    validate(toys.experiment(steps=0, batch_stages=((9, 0),), model=model))
  first, second, third = str(refusal.value).splitlines()
  assert first.startswith("steps must") and second.startswith("model.pattern.0: 4 heads")
  assert third.startswith("batch_stages")
  fields = {"batch": 30, "model": toys.Model(dim=66), "mesh": Mesh(fsdp=4)}
  with pytest.raises(Refused) as refusal:
    validate(toys.experiment(data=toys.Data(tokens=257, length=512), **fields), devices=4)
  starts = ("model.vocab is 256", "the data's rows", "batch 30", "model.dim 66")
  for line, start in zip(str(refusal.value).splitlines(), starts, strict=True):
    assert line.startswith(start)


@pytest.mark.parametrize(
  ("model", "data", "said"),
  [
    (VIT, {"classes": 7}, "model.classes is 10 but the data has 7 classes; set --model.classes 7"),
    (MLP, {"classes": 7}, "model.classes is 10 but the data has 7 classes; set --model.classes 7"),
    (TEXTS, {"classes": 7}, "model.classes is 10 but the data has 7 classes; set --model.classes"),
    (
      VIT,
      {"shape": (32, 32, 1)},
      "28x28 pixels and 1 channels, not (32, 32, 1); set --model.image",
    ),
    (
      VIT,
      {"shape": (28, 28, 3)},
      "28x28 pixels and 1 channels, not (28, 28, 3); set --model.image",
    ),
    (VIT, {"shape": (784,)}, "not (784,); give ImageData, whose examples are (height, width, "),
    (MLP, {"shape": (8, 8, 1)}, "784 inputs but the data's examples have 64 numbers, (8, 8, 1)"),
  ],
)
def test_what_the_model_takes_must_be_what_the_data_has(model, data, said):
  fits = toys.Labelled(shape=(28, 28, 1), classes=10)
  validate(toys.experiment(model=model, data=fits))
  with pytest.raises(Refused) as refusal:
    validate(toys.experiment(model=model, data=dataclasses.replace(fits, **data)))
  assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_data_without_classes_or_inputs_fits_any_model_and_a_model_without_them_any_data():
  validate(toys.experiment(model=VIT))
  validate(toys.experiment(data=toys.Labelled(shape=(5,), classes=3)))


def test_without_devices_microbatches_are_checked_beside_the_rest():
  fields = {"data": toys.Data(length=512)}
  with pytest.raises(Refused, match=r"(?s)batch 9 is not divisible by 2 micro.*\nthe data's rows"):
    validate(toys.experiment(batch=9, microbatches=2, **fields))


def test_a_warm_up_longer_than_the_run_is_remarked_on():
  of = lambda warmup: toys.experiment(
    steps=40, optimizer=AdamW(lr=1e-3, schedule=Cosine(warmup=warmup))
  )
  assert [*remarks(of(40))] == []
  assert [*remarks(of(41))] == [
    "optimizer.schedule.warmup is 41 steps but the run has 40: it never reaches its learning rate; "
    "set --optimizer.schedule.warmup 4, or more steps"
  ]


def test_room_for_the_worst_case_of_experts_is_remarked_on():
  of = lambda buffer, expert: toys.experiment(
    model=MoEConfig(experts=8, top_k=2, hidden=8, dispatch=Dropless(buffer=buffer)),
    mesh=Mesh(expert=expert),
  )
  assert [*remarks(of(1.5, 8), 8)] == [*remarks(of(None, 2), 8)] == []
  (remark,) = remarks(of(None, 8), 8)
  assert remark.startswith("model.dispatch: each of 8 devices has room for 8 times the tokens")
  assert "--model.dispatch.buffer 1.5 bounds that" in remark


def test_in_python_remedies_are_python(monkeypatch):
  monkeypatch.setattr(hints, "_commanded", False)
  with pytest.raises(Refused, match=r"set experiment\.model\.classes = 7, or"):
    validate(toys.experiment(model=VIT, data=toys.Labelled(shape=(28, 28, 1), classes=7)))
  (remark,) = remarks(toys.experiment(steps=40, optimizer=AdamW(lr=1, schedule=Cosine(warmup=41))))
  assert remark.endswith("set experiment.optimizer.schedule.warmup = 4, or more steps")


def test_without_devices_only_the_mesh_is_not_checked():
  validate(toys.experiment(batch=30, mesh=MESH))
  with pytest.raises(Refused, match="steps"):
    validate(toys.experiment(steps=0))


def test_a_shrunk_experiment_is_small_valid_anywhere_and_leaves_the_original_alone():
  heads = toys.Attention(heads=12, kv_heads=6, position=toys.Learned(length=1024))
  model = toys.Model(vocab=50304, dim=768, layers=12, pattern=(heads,))
  e = toys.experiment(
    model=model,
    data=toys.Data(tokens=50257, length=1024),
    steps=10_000,
    batch=512,
    microbatches=2,
    batch_stages=((1000, 1024), (5000, 2048)),
    mesh=Mesh(data=4, fsdp=64),
    weights_from="runs/x",
  )
  small = shrink(e)
  assert e.model.dim == 768 and e.steps == 10_000 and e.evaluation.every == 500
  assert (small.model.dim, small.model.layers, small.data.length) == (64, 4, 128)
  assert (small.model.pattern[0].heads, small.model.pattern[0].kv_heads) == (4, 2)
  assert (small.model.pattern[0].position.length, small.model.vocab) == (128, 50304)
  assert (small.steps, small.batch) == (20, 16) and small.batch_stages == ((6, 16), (12, 16))
  assert small.evaluation.every == small.checkpoints.every == 10 and small.weights_from is None
  validate(small, devices=8)


def test_shrinking_asks_a_config_that_knows_how_it_is_small():
  @config
  class Own(toys.Model):
    def smoke(self):
      return Own(dim=8, vocab=self.vocab)

  assert shrink(toys.experiment(model=Own(dim=1024))).model.dim == 8


def test_shrinking_shortens_a_warm_up_with_the_run():
  e = toys.experiment(steps=10_000, optimizer=AdamW(lr=1e-3, schedule=InverseSqrt(warmup=4000)))
  small = shrink(e)
  assert 1 <= small.optimizer.schedule.warmup < small.steps / 2
  validate(small)


def test_a_shrunk_vision_transformer_keeps_the_images_and_has_few_patches():
  for image, patch, shrunk in (
    (224, 16, 28),
    (28, 7, 7),
    (30, 15, 15),
    (64, 64, 64),
    (518, 14, 74),
  ):
    model = dataclasses.replace(VIT, image=image, patch=patch, layers=40)
    data = toys.Labelled(shape=(image, image, 1), classes=10)
    small = shrink(toys.experiment(model=model, data=data))
    assert (small.model.image, small.model.patch, small.model.layers) == (image, shrunk, 4)
    validate(small)


def test_shrinking_follows_data_whose_classes_change():
  @config
  class Own(toys.Labelled):
    def smoke(self):
      return dataclasses.replace(self, classes=3)

  e = toys.experiment(model=VIT, data=Own(shape=(28, 28, 1), classes=10))
  assert shrink(e).model.classes == 3
  validate(shrink(e))


def test_shrinking_follows_a_tokenizer_that_shrinks():
  @config
  class Own(toys.Data):
    def smoke(self):
      return Own(tokens=257)

  small = shrink(toys.experiment(model=toys.Model(vocab=50304), data=Own(tokens=50257)))
  assert small.model.vocab == 384


def test_shrinking_says_what_it_takes_in_the_place_of_files_that_are_not_there(tmp_path, capsys):
  (tmp_path / "a.txt").write_text("text")
  of = lambda name: TextData(source=Files(pattern=f"{tmp_path}/{name}"))
  sources = (Source(name="web", data=of("a.txt")), Source(name="books", data=of("b/*.jsonl")))
  shrink(toys.experiment(data=Mixture(sources=sources)))
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f"bigtrain: data.sources.1.data.source: no files match {tmp_path}/b/*.jsonl: {tmp_path}/ has no"
    " b; there is a.txt; --smoke takes Austen in its place"
  )
  large = Files(pattern=f"{tmp_path}/a.txt")
  (tmp_path / "a.txt").write_bytes(b" " * (2**24 + 1))
  file = TokenizerFile(path="none.json")
  shrink(toys.experiment(data=TextData(source=large, tokenizer=file)))
  first, second = capsys.readouterr().err.splitlines()
  assert first == "bigtrain: data.source: it is too large to try; --smoke takes Austen in its place"
  assert second.startswith("bigtrain: data.tokenizer: tokenizer none.json is not a file")
  assert second.endswith("; --smoke takes Bytes in its place")


EXPERIMENTS = sorted((pathlib.Path(__file__).parent.parent / "experiments").glob("*.py"))


def supply(e):
  """Puts empty files where a study's data should be, and a tokenizer of the size it states."""
  if isinstance(getattr(e.data, "source", None), FashionMNIST):
    for name in FASHION_MNIST:
      (folder := fetched("fashion_mnist")).mkdir(parents=True, exist_ok=True)
      (folder / name).touch()
  if isinstance(e.data, TextData) and isinstance(e.data.source, Files):
    file = pathlib.Path(e.data.source.pattern.replace("**/", "").replace("*", "a"))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
  if isinstance(getattr(e.data, "tokenizer", None), TokenizerFile):
    sentinels = [f"<extra_id_{i}>" for i in range(100 * isinstance(e.data, Spans))]
    others = [*sentinels, e.data.tokenizer.eot]
    numbers = map(str, range(e.model.vocabulary() - len(others)))
    vocab = {name: i for i, name in enumerate([*numbers, *others])}
    path = pathlib.Path(e.data.tokenizer.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="0"))
    tokenizer.add_special_tokens(sentinels)
    tokenizer.save(str(path))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_function_in_experiments_is_valid_whole_and_shrunk(path, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("BIGTRAIN_CACHE", str(tmp_path / "cache"))
  functions = load.functions(path)
  assert "base" in functions
  for function in functions.values():
    assert (function.__doc__ or "").strip(), f"{function.__name__} does not say what it is"
    e = function()
    validate(shrink(e), devices=1)  # Also without its data.
    supply(e)
    axes = (getattr(e.mesh, axis) for axis in AXES if axis not in OTHER_NAMES)
    validate(e, devices=math.prod(n for n in axes if n != -1))
