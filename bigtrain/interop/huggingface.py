"""Weights of Hugging Face models (see the tables) as those of our modules.

The tables say, for each of our parameters, the tensor that holds it and the order of its dims
there; our own order is the parameter's suffix.

Dims: D model, K kv heads, G queries per kv head, H head, F hidden, E expert, X router output, T
position, V vocabulary, P pixels and channels of a patch, Q the class token, C classes, R relative
bucket; heads' as in models/encoder.py.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bigtrain.config import Refused

M = TypeVar("M", bound=nnx.Module)

# Names within a layer begin with a dot, or with their stack where there are several. GPT-2 stores
# (in, out), the others (out, in).
GPT2 = {
  "embed_VD": "wte.weight VD",
  "position_TD": "wpe.weight TD",
  "norm.scale_D": "ln_f.weight D",
  "norm.bias_D": "ln_f.bias D",
  ".attention_norm.scale_D": "h.{}.ln_1.weight D",
  ".attention_norm.bias_D": "h.{}.ln_1.bias D",
  ".attention.q_DKGH": "h.{}.attn.q_attn.weight DKGH",
  ".attention.k_DKH": "h.{}.attn.k_attn.weight DKH",
  ".attention.v_DKH": "h.{}.attn.v_attn.weight DKH",
  ".attention.o_KGHD": "h.{}.attn.c_proj.weight KGHD",
  ".attention.q_bias_KGH": "h.{}.attn.q_attn.bias KGH",
  ".attention.k_bias_KH": "h.{}.attn.k_attn.bias KH",
  ".attention.v_bias_KH": "h.{}.attn.v_attn.bias KH",
  ".attention.o_bias_D": "h.{}.attn.c_proj.bias D",
  ".feed_forward_norm.scale_D": "h.{}.ln_2.weight D",
  ".feed_forward_norm.bias_D": "h.{}.ln_2.bias D",
  ".feed_forward.up_DF": "h.{}.mlp.c_fc.weight DF",
  ".feed_forward.up_bias_F": "h.{}.mlp.c_fc.bias F",
  ".feed_forward.down_FD": "h.{}.mlp.c_proj.weight FD",
  ".feed_forward.down_bias_D": "h.{}.mlp.c_proj.bias D",
}
LLAMA = {  # And Qwen3, Mixtral and Qwen3 with experts, of which `_stacked` makes one tensor.
  "embed_VD": "embed_tokens.weight VD",
  "output_table_VD": "lm_head.weight VD",
  "norm.scale_D": "norm.weight D",
  ".attention_norm.scale_D": "layers.{}.input_layernorm.weight D",
  ".attention.q_DKGH": "layers.{}.self_attn.q_proj.weight KGHD",
  ".attention.k_DKH": "layers.{}.self_attn.k_proj.weight KHD",
  ".attention.v_DKH": "layers.{}.self_attn.v_proj.weight KHD",
  ".attention.o_KGHD": "layers.{}.self_attn.o_proj.weight DKGH",
  ".attention.q_norm.scale_D": "layers.{}.self_attn.q_norm.weight D",
  ".attention.k_norm.scale_D": "layers.{}.self_attn.k_norm.weight D",
  ".feed_forward_norm.scale_D": "layers.{}.post_attention_layernorm.weight D",
  ".feed_forward.gate_DF": "layers.{}.mlp.gate_proj.weight FD",
  ".feed_forward.up_DF": "layers.{}.mlp.up_proj.weight FD",
  ".feed_forward.down_FD": "layers.{}.mlp.down_proj.weight DF",
  ".feed_forward.router_DX": "layers.{}.mlp.gate.weight XD",
  ".feed_forward.gate_EDF": "layers.{}.mlp.experts.gate_proj.weight EFD",
  ".feed_forward.up_EDF": "layers.{}.mlp.experts.up_proj.weight EFD",
  ".feed_forward.down_EFD": "layers.{}.mlp.experts.down_proj.weight EDF",
}
BERT = {
  "embed_VD": "embeddings.word_embeddings.weight VD",
  "position_TD": "embeddings.position_embeddings.weight TD",
  "type_YD": "embeddings.token_type_embeddings.weight YD",
  "embed_norm.scale_D": "embeddings.LayerNorm.weight D",
  "embed_norm.bias_D": "embeddings.LayerNorm.bias D",
  "pooler_DM": "pooler.dense.weight MD",
  "pooler_bias_M": "pooler.dense.bias M",
  "transform_DM": "cls.predictions.transform.dense.weight MD",
  "transform_bias_M": "cls.predictions.transform.dense.bias M",
  "transform_norm.scale_D": "cls.predictions.transform.LayerNorm.weight D",
  "transform_norm.bias_D": "cls.predictions.transform.LayerNorm.bias D",
  "output_bias_V": "cls.predictions.bias V",
  "next_MC": "cls.seq_relationship.weight CM",
  "next_bias_C": "cls.seq_relationship.bias C",
  "classes_MC": "classifier.weight CM",
  "classes_bias_C": "classifier.bias C",
  ".attention.q_DKGH": "encoder.layer.{}.attention.self.query.weight KGHD",
  ".attention.k_DKH": "encoder.layer.{}.attention.self.key.weight KHD",
  ".attention.v_DKH": "encoder.layer.{}.attention.self.value.weight KHD",
  ".attention.o_KGHD": "encoder.layer.{}.attention.output.dense.weight DKGH",
  ".attention.q_bias_KGH": "encoder.layer.{}.attention.self.query.bias KGH",
  ".attention.k_bias_KH": "encoder.layer.{}.attention.self.key.bias KH",
  ".attention.v_bias_KH": "encoder.layer.{}.attention.self.value.bias KH",
  ".attention.o_bias_D": "encoder.layer.{}.attention.output.dense.bias D",
  ".attention_norm.scale_D": "encoder.layer.{}.attention.output.LayerNorm.weight D",
  ".attention_norm.bias_D": "encoder.layer.{}.attention.output.LayerNorm.bias D",
  ".feed_forward.up_DF": "encoder.layer.{}.intermediate.dense.weight FD",
  ".feed_forward.up_bias_F": "encoder.layer.{}.intermediate.dense.bias F",
  ".feed_forward.down_FD": "encoder.layer.{}.output.dense.weight DF",
  ".feed_forward.down_bias_D": "encoder.layer.{}.output.dense.bias D",
  ".feed_forward_norm.scale_D": "encoder.layer.{}.output.LayerNorm.weight D",
  ".feed_forward_norm.bias_D": "encoder.layer.{}.output.LayerNorm.bias D",
}
VIT = {
  "class_QD": "vit.embeddings.cls_token QD",
  "position_TD": "vit.embeddings.position_embeddings TD",
  "patch_PD": "vit.embeddings.patch_embeddings.projection.weight DP",
  "patch_bias_D": "vit.embeddings.patch_embeddings.projection.bias D",
  "norm.scale_D": "vit.layernorm.weight D",
  "norm.bias_D": "vit.layernorm.bias D",
  "head_DC": "classifier.weight CD",
  "head_bias_C": "classifier.bias C",
  ".attention_norm.scale_D": "vit.encoder.layer.{}.layernorm_before.weight D",
  ".attention_norm.bias_D": "vit.encoder.layer.{}.layernorm_before.bias D",
  ".attention.q_DKGH": "vit.encoder.layer.{}.attention.attention.query.weight KGHD",
  ".attention.q_bias_KGH": "vit.encoder.layer.{}.attention.attention.query.bias KGH",
  ".attention.k_DKH": "vit.encoder.layer.{}.attention.attention.key.weight KHD",
  ".attention.k_bias_KH": "vit.encoder.layer.{}.attention.attention.key.bias KH",
  ".attention.v_DKH": "vit.encoder.layer.{}.attention.attention.value.weight KHD",
  ".attention.v_bias_KH": "vit.encoder.layer.{}.attention.attention.value.bias KH",
  ".attention.o_KGHD": "vit.encoder.layer.{}.attention.output.dense.weight DKGH",
  ".attention.o_bias_D": "vit.encoder.layer.{}.attention.output.dense.bias D",
  ".feed_forward_norm.scale_D": "vit.encoder.layer.{}.layernorm_after.weight D",
  ".feed_forward_norm.bias_D": "vit.encoder.layer.{}.layernorm_after.bias D",
  ".feed_forward.up_DF": "vit.encoder.layer.{}.intermediate.dense.weight FD",
  ".feed_forward.up_bias_F": "vit.encoder.layer.{}.intermediate.dense.bias F",
  ".feed_forward.down_FD": "vit.encoder.layer.{}.output.dense.weight DF",
  ".feed_forward.down_bias_D": "vit.encoder.layer.{}.output.dense.bias D",
}
T5 = {"embed_VD": "shared.weight VD", "output_table_VD": "lm_head.weight VD"}
for _stack, _last in (("encoder", 1), ("decoder", 2)):
  _layer = f"{_stack}.block.{{}}.layer"
  _bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight RKG"
  T5 |= {
    f"{_stack}.relative_bias_RKG": f"{_stack}.{_bias}",
    f"{_stack}_norm.scale_D": f"{_stack}.final_layer_norm.weight D",
    f"{_stack}.attention_norm.scale_D": f"{_layer}.0.layer_norm.weight D",
    f"{_stack}.cross_norm.scale_D": f"{_layer}.1.layer_norm.weight D",
    f"{_stack}.feed_forward_norm.scale_D": f"{_layer}.{_last}.layer_norm.weight D",
    f"{_stack}.feed_forward.gate_DF": f"{_layer}.{_last}.DenseReluDense.wi_0.weight FD",
    f"{_stack}.feed_forward.up_DF": f"{_layer}.{_last}.DenseReluDense.wi_1.weight FD",
    f"{_stack}.feed_forward.down_FD": f"{_layer}.{_last}.DenseReluDense.wo.weight DF",
  }
  for _ours, _theirs in (("attention", "0.SelfAttention"), ("cross", "1.EncDecAttention")):
    T5 |= {
      f"{_stack}.{_ours}.q_DKGH": f"{_layer}.{_theirs}.q.weight KGHD",
      f"{_stack}.{_ours}.k_DKH": f"{_layer}.{_theirs}.k.weight KHD",
      f"{_stack}.{_ours}.v_DKH": f"{_layer}.{_theirs}.v.weight KHD",
      f"{_stack}.{_ours}.o_KGHD": f"{_layer}.{_theirs}.o.weight DKGH",
    }
PATCHES = VIT["patch_PD"].split()[0]
MARKS = {  # Of a table's checkpoints.
  "wte.weight": GPT2,
  "embeddings.word_embeddings.weight": BERT,
  PATCHES: VIT,
  "shared.weight": T5,
}
BASE = re.compile(r"^(transformer|model|bert)\.")  # Checkpoints of the bare model lack it.
# Not weights, or (the decoder of BERT's head, T5's embedding by side) others once more.
BUFFERS = re.compile(
  r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$|\.position_ids$|^cls\.predictions\.decoder\."
  r"|^(en|de)coder\.embed_tokens\.weight$"
)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors file by name.

  Raises:
    Refused: there is no such file, or it is something else.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load_file

  try:
    return load_file(os.path.expanduser(path))
  except (OSError, SafetensorError) as error:
    raise Refused(f"{path} cannot be read as .safetensors: {error}") from None


def load_weights(model: M, tensors: Mapping[str, np.ndarray]) -> M:
  """A copy of a model with these weights in place of its own, in float32.

  Args:
    model: the module, or its shapes (`jax.eval_shape(config.make, key)`), of the same shape as the
      checkpoint: sizes, biases and norms are the config's to state.
    tensors: the checkpoint, by the names of `transformers`.

  Raises:
    Refused: a tensor that the model needs is missing or has another size, or one is left over.
  """
  loaded, unused = load_some(model, tensors, is_new=lambda name: False)
  if unused:
    raise Refused(f"the model has no place for {unused[0]} and {len(unused) - 1} more weights")
  return loaded


def load_some(
  model: M, tensors: Mapping[str, np.ndarray], is_new: Callable[[str], bool]
) -> tuple[M, list[str]]:
  """As load_weights, but leaves what `is_new` names, as in "encoder.pooler_DM", as it is.

  Returns:
    The model, and the names of the tensors that it has no place for.
  """
  tensors = {BASE.sub("", name): x for name, x in tensors.items() if not BUFFERS.search(name)}
  table = next((table for mark, table in MARKS.items() if mark in tensors), LLAMA)
  if table is GPT2:
    tensors = _split(tensors)
  elif table is LLAMA:
    tensors = _stacked(tensors)
  elif table is VIT:  # Channels come last in our patches.
    tensors[PATCHES] = np.asarray(tensors[PATCHES]).transpose(0, 2, 3, 1)
  elif table is T5:  # Its first version has one product where the second has a gate and it.
    tensors = {name.replace(".wi.", ".wi_1."): x for name, x in tensors.items()}
  unused = set(tensors)
  if getattr(model, "output_table_VD", None) is None:
    unused.discard("lm_head.weight")  # The embedding once more.

  def load(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    if is_new(name):
      return leaf
    ours, layers = _place(model, name)
    if ours not in table:  # Heads have their encoder within them.
      ours = ours.removeprefix("encoder.")
    if ours not in table:
      raise Refused(f"these weights have nothing for {ours}; are they of the model's family?")
    theirs, order = table[ours].split()
    names = [theirs.format(layer) for layer in layers or (0,)]
    if missing := [name for name in names if name not in tensors]:
      raise Refused(f"these weights have no {missing[0]}, as {ours} needs; compare the configs")
    unused.difference_update(names)
    shape = leaf.shape if layers is None else leaf.shape[1:]
    parts = [_reordered(name, tensors[name], order, ours, shape) for name in names]
    return jnp.asarray(parts[0] if layers is None else np.stack(parts), jnp.float32)

  loaded = jax.tree_util.tree_map_with_path(load, model)
  return loaded, sorted(unused)


def _split(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """GPT-2's one tensor of queries, keys and values as three."""
  split = {}
  for name, x in tensors.items():
    if ".c_attn." in name:
      parts = zip("qkv", np.split(np.asarray(x), 3, axis=-1), strict=True)
      split |= {name.replace("c_attn", f"{letter}_attn"): part for letter, part in parts}
    else:
      split[name] = x
  return split


def _stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of all experts of a layer as one, by the names that Qwen3 gives them."""
  ours = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # Of Mixtral's.
  found, experts = {}, {}
  for name, x in tensors.items():
    name = name.replace(".block_sparse_moe.", ".mlp.")
    if match := re.fullmatch(r"(.+\.experts\.)(\d+)\.(\w+)(\.weight)", name):
      name = match[1] + ours.get(match[3], match[3]) + match[4]
      experts.setdefault(name, {})[int(match[2])] = x
    else:
      found[name] = x
  return found | {name: np.stack([x[e] for e in sorted(x)]) for name, x in experts.items()}


def _place(model, path: str) -> tuple[str, range | None]:
  """A parameter's name in the tables, and the layers that it stacks; None outside of them."""
  if not (found := re.fullmatch(r"(.+?)\.segments\.(\d+)\.(\d+)(\..+)", path)):
    return path, None
  segment, block = int(found[2]), int(found[3])
  stack: Any = functools.reduce(getattr, found[1].split("."), model)
  *before, (blocks, repeats) = stack.c.segments()[: segment + 1]
  start = sum(len(blocks) * repeats for blocks, repeats in before)
  where = found[1].removesuffix("transformer") + found[4]
  return where, range(start + block, start + len(blocks) * repeats, len(blocks))


def _reordered(name: str, tensor, theirs: str, ours: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor whose (merged) dims are in the order `theirs`, in the order of our suffix."""
  letters = ours.rsplit("_", 1)[1]
  sizes = dict(zip(letters, shape, strict=True))
  if tensor.size != math.prod(shape):
    raise Refused(f"{name} has shape {tuple(tensor.shape)} but {ours} {shape}; compare the configs")
  whole = np.asarray(tensor).reshape([sizes[letter] for letter in theirs])
  return whole.transpose([theirs.index(letter) for letter in letters])
