"""Attention in blocks against the formula in float64: values, gradients, bits, meshes, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigtrain import sharding
from bigtrain.kernels.attention import Form, blockwise, plain
from bigtrain.kernels.attention.block import Settings
from bigtrain.mesh import Mesh
from tests.kernels import attention
from tests.kernels.attention import FORMS, distances, exact, gradients

T = 14  # Two blocks of queries and of keys, the last of each not full.


@pytest.fixture(params=["written out", "in loops"])
def small_blocks(request, monkeypatch):
  monkeypatch.setattr(blockwise, "QUERIES", 8)
  monkeypatch.setattr(blockwise, "KEYS", 8)
  monkeypatch.setattr(blockwise, "UNROLLED", T if request.param == "written out" else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ["packed", "padded"])
def test_blocks_equal_the_formula(small_blocks, form, rows):
  c = attention.call(FORMS[form], T, segments=rows == "packed", bias=form != "causal")
  assert max(distances(gradients(blockwise.attend, c), exact(c))) < 2e-6
