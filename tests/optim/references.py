"""Optimizers by their papers' formulas, in numpy and float64, for one matrix or vector.

Each is a function (w, gradients, rates, decay) -> w after all updates. None knows of stacks, meshes
or trees: a test takes these apart.
"""

import numpy as np


def steps(direction):
  """w -= rate * (direction + decay * w), at every update t from 1."""

  def run(w, gradients, rates, decay):
    s = {}
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
      w = w - rate * (direction(s, t, g, w) + decay * w)
    return w

  return run


def sgd(momentum, nesterov=False):
  """Sutskever 2013, in the form of one velocity that does not hold the rate."""

  def direction(s, t, g, w):
    s["u"] = momentum * s.get("u", 0) + g
    return g + momentum * s["u"] if nesterov else s["u"]

  return steps(direction)


def adagrad(start, eps):
  """Duchi 2011, figure 1, with diagonal matrices."""

  def direction(s, t, g, w):
    s["sum"] = s.get("sum", start) + g**2
    return g / np.sqrt(s["sum"] + eps)

  return steps(direction)


def rmsprop(decay, eps, momentum):
  """Tieleman & Hinton 2012, lecture 6e; momentum as in Graves 2013, arXiv:1308.0850."""

  def direction(s, t, g, w):
    s["v"] = decay * s.get("v", 0) + (1 - decay) * g**2
    s["u"] = momentum * s.get("u", 0) + g / (np.sqrt(s["v"]) + eps)
    return s["u"]

  return steps(direction)


def _adam(b1, b2, eps):
  """Kingma & Ba 2014, algorithm 1."""

  def direction(s, t, g, w):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return s["m"] / (1 - b1**t) / (np.sqrt(s["v"] / (1 - b2**t)) + eps)

  return direction


def adam(b1, b2, eps):
  return steps(_adam(b1, b2, eps))


def nadam(b1, b2, eps):
  """Dozat 2016, algorithm 2, with one mu and without the b2 that it multiplies v with."""

  def direction(s, t, g, w):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    m = b1 * s["m"] / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    return m / (np.sqrt(s["v"] / (1 - b2**t)) + eps)

  return steps(direction)


def ademamix(b1, b2, b3, alpha, eps, rise):
  """Pagliardini 2024, algorithm 1 and the schedulers of section 3.1."""

  def direction(s, t, g, w):
    share = min(t / rise, 1)
    slow = np.log(b1) * np.log(b3) / ((1 - share) * np.log(b3) + share * np.log(b1))
    decay = min(np.exp(slow), b3)
    s["m1"] = b1 * s.get("m1", 0) + (1 - b1) * g
    s["m2"] = decay * s.get("m2", 0) + (1 - decay) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    m = s["m1"] / (1 - b1**t) + share * alpha * s["m2"]
    return m / (np.sqrt(s["v"] / (1 - b2**t)) + eps)

  return steps(direction)


def lion(b1, b2):
  """Chen 2023, algorithm 2."""

  def direction(s, t, g, w):
    m = s.get("m", 0)
    s["m"] = b2 * m + (1 - b2) * g
    return np.sign(b1 * m + (1 - b1) * g)

  return steps(direction)


def lamb(b1, b2, eps):
  """You 2019, algorithm 2, phi the identity."""

  def run(w, gradients, rates, decay):
    s, adam = {}, _adam(b1, b2, eps)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
      r = adam(s, t, g, w) + decay * w
      w = w - rate * np.linalg.norm(w) / np.linalg.norm(r) * r
    return w

  return run


def adafactor(decay, threshold, eps, least):
  """Shazeer & Stern 2018, algorithms 4 (matrices) and 5 (vectors); `least` None for plain rates."""
  rms = lambda x: np.sqrt(np.mean(x**2))

  def direction(s, t, g, w):
    beta = 1 - t**-decay
    follow = lambda name, x: s.update({name: beta * s.get(name, 0) + (1 - beta) * x})
    square = g**2 + eps
    if g.ndim == 2:
      follow("r", square.sum(1))
      follow("c", square.sum(0))
      v = np.outer(s["r"], s["c"]) / s["r"].sum()
    else:
      follow("v", square)
      v = s["v"]
    u = g / np.sqrt(v)
    return u / max(1, rms(u) / threshold) * (1 if least is None else max(least, rms(w)))

  return steps(direction)


def muon(momentum, iterations, scale):
  """Jordan 2024: Nesterov momentum, five quintic Newton-Schulz iterations, on (out, in)."""

  def direction(s, t, g, w):
    s["b"] = momentum * s.get("b", 0) + g
    x = (g + momentum * s["b"]).T
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / np.linalg.norm(x)
    for _ in range(iterations):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if tall else x
    out, into = x.shape
    factors = {"spectral": max(1, out / into) ** 0.5, "rms": 0.2 * max(out, into) ** 0.5}
    return factors[scale] * x.T

  return steps(direction)


def soap(b1, b2, eps, every, largest):
  """Vyas 2024, algorithms 3 and 4; the first basis by eigh, as in its code."""

  def direction(s, t, g, w):
    grams = [g @ g.T, g.T @ g]
    wanted = [n <= largest for n in g.shape]
    if t == 1:
      s["p"] = [np.zeros_like(gram) for gram in grams]
      pairs = zip(grams, wanted, strict=True)
      s["q"] = [np.linalg.eigh(gram)[1] if on else np.eye(len(gram)) for gram, on in pairs]
    left, right = s["q"]
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * (left.T @ g @ right) ** 2
    m = left.T @ s["m"] @ right / (1 - b1**t)
    n = left @ (m / (np.sqrt(s["v"] / (1 - b2**t)) + eps)) @ right.T
    s["p"] = [b2 * p + (1 - b2) * gram for p, gram in zip(s["p"], grams, strict=True)]
    if t % every == 0:
      sides = zip(s["p"], s["q"], wanted, strict=True)
      s["q"] = [np.linalg.qr(p @ q)[0] if on else q for p, q, on in sides]
    return n

  return steps(direction)


def schedule_free(b1, b2, eps, evaluated=False):
  """Defazio 2024, algorithm 1 (AdamW): y, where gradients are taken, or x, which is evaluated."""

  def run(w, gradients, rates, decay):
    x = y = z = w
    v = total = 0.0
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
      v = b2 * v + (1 - b2) * g**2
      z = z - rate * (g / (np.sqrt(v / (1 - b2**t)) + eps) + decay * y)
      total += max(rates[:t]) ** 2
      c = max(rates[:t]) ** 2 / total
      x = (1 - c) * x + c * z
      y = (1 - b1) * z + b1 * x
    return x if evaluated else y

  return run
