"""The captioner with a sequential guide."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.typing

from jaxbo_models.captioner import cell, recurrence
from jaxbo_models.captioner.attention import AttentionParameters, matmul
from jaxbo_models.captioner.check import check_features, check_flags, check_tokens
from jaxbo_models.captioner.recurrence import CaptionerOutput, DecoderState, Encoded
from jaxbo_models.mesh import zeros_like
from jaxbo_models.rows import rows


class GuidedCaptioner(nn.Module):
  r"""Writes captions with an LSTM decoder that a second LSTM guides, word by word.

  The model embeds the features :math:`a_i` of an image's cells once. Then each step reads a word
  :math:`w_t` and predicts the next one:

  .. math::
    A_i &= \mathrm{relu}(W_a a_i + b_a), \quad f = \mathrm{relu}(W_f \bar a + b_f), \quad
    k_i = U A_i + b_u, \quad e_t = \mathrm{relu}(E_{w_t}) \\
    (v_t, c^g_t) &= \mathrm{LSTM}_g([e_t; f; h_{t-1}], (v, c^g)_{t-1}) \\
    \alpha_t &= \mathrm{softmax}_i(w^\top \tanh(k_i + W_q q_t)), \quad
    z_t = \textstyle\sum_i \alpha_{ti} A_i \\
    (h_t, c_t) &= \mathrm{LSTM}_d([e_t; v_t; z_t], (h, c)_{t-1}), \quad
    \mathrm{logits}_t = W_o h_t + b_o

  This model is a *reconstruction*. We had only the abstract of the paper (Sow, Qin, Niasse and Wan,
  *A sequential guiding network with attention for image captioning*, ICASSP 2019,
  https://arxiv.org/abs/1811.00228), which names a CNN, a decoder with attention, and an LSTM that
  guides the decoder during generation. We chose the rest after the code of related models: what the
  guide reads, where its output goes, the attention's query, the initial states and all sizes. Each
  choice is an attribute. Other values give these published models:

  * ``guide="none"``, ``attention_query="hidden"``, ``candidate="maxout"`` and
    ``context_gates="candidate"``: Att2in; with ``context_gates="all"``: Att2all (Rennie et al.,
    https://arxiv.org/abs/1612.00563);
  * ``decoder_word=False``: Up-Down, whose attention LSTM is the guide (Anderson et al.,
    https://arxiv.org/abs/1707.07998);
  * ``guide="static"``: the guide is a function of the image, as in LTG (Jiang et al.,
    https://arxiv.org/abs/1804.00887); the function :math:`v = \tanh(W_v f + b_v)` is our choice;
  * ``guide="none"``: an LSTM with attention.

  >>> model = GuidedCaptioner(vocab_size=9488)
  >>> features = jax.ShapeDtypeStruct((5, 196, 2048), jnp.float32)
  >>> tokens = jax.ShapeDtypeStruct((5, 17), jnp.int32)
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), features, tokens)
  >>> output = jax.eval_shape(model.apply, variables, features, tokens)
  >>> output.logits.shape, output.attention.shape
  ((5, 17, 9488), (5, 17, 196))
  >>> sum(leaf.size for leaf in jax.tree.leaves(variables))
  20741905

  Parameters are float32:

  * ``embedding [vocab_size, embed_dim]``, initially normal with standard deviation 1;
  * ``cells`` and ``keys`` and, where the attributes need them, ``pooled``, ``static_guide``,
    ``initial`` and ``attributes``: :class:`flax.linen.Dense` with its default initializers;
  * ``encoder``, if there is one;
  * ``attention/{query,bias,score,score_bias}``;
  * ``decoder_lstm`` and, for the sequential guide, ``guide_lstm``: a kernel for each input,
    ``recurrent`` and ``bias``; their blocks are the input, forget and output gates and the
    candidates;
  * ``output_kernel`` and ``output_bias``.

  Cost: the products with words run before the scan over words, and the logits after it. For each
  caption, a step of the scan computes the recurrent products, the guide's products, and
  ``num_cells * attention_dim`` tanhs. ``remat`` recomputes the tanhs instead of storing them.

  Attributes:
    vocab_size: number of tokens; ids are in [0, vocab_size).
    embed_dim: width of word embeddings.
    hidden_dim: number of units of each LSTM, and width of embedded cells.
    attention_dim: width of keys.
    guide: ``"sequential"``, ``"static"`` or ``"none"``.
    attention_query: the query :math:`q_t`: ``"guide"`` for :math:`v_t`, ``"hidden"`` for
      :math:`h_{t-1}`, or ``"hidden_word"`` for :math:`[h_{t-1}; e_t]`. In our experiments, queries
      that do not read the last word did not learn to find the object that the word names.
    guide_pooled: whether the sequential guide reads :math:`f`.
    guide_scale: factor on the guiding vector; 0 mutes the guide.
    decoder_word: whether the decoder reads :math:`e_t`; with False only the sequential guide reads
      the words.
    context_gates: ``"all"`` feeds :math:`z_t` into the decoder's gates and its candidate;
      ``"candidate"`` into its candidate only.
    candidate: the decoder's candidate: ``"tanh"``, or ``"maxout"`` for the larger of two.
    init_state: the states before the first word: ``"zeros"``, or ``"pooled"`` for the tanh of a
      dense layer on :math:`f`.
    num_attributes: number of words that :math:`W_s \max_t v_t + b_s` scores, for the discriminative
      term of :func:`caption_losses`; 0 for no scores.
    dropout: with ``train=True``, the probability of dropping an entry of :math:`A`, :math:`f`,
      :math:`e_t`, and of :math:`h_t` before the logits, in [0, 1). Published models use 0.5.
    encoder: a module that maps images to features ``[batch, num_cells, dim]``, such as
      :class:`PatchEncoder`. With an encoder, pass images instead of features.
    unroll: number of words in one step of the scan, at least 1; more words take longer to compile
      and less time to run.
    remat: whether to recompute each step in the backward pass.
    dtype: dtype of products and hidden states. Parameters, LSTM cells, softmax and logits are
      float32 at least.

  Raises:
    ValueError: an attribute is out of its range, or two attributes exclude each other.
  """

  vocab_size: int
  embed_dim: int = 512
  hidden_dim: int = 512
  attention_dim: int = 512
  guide: str = "sequential"
  attention_query: str = "guide"
  guide_pooled: bool = True
  guide_scale: float = 1.0
  decoder_word: bool = True
  context_gates: str = "all"
  candidate: str = "tanh"
  init_state: str = "zeros"
  num_attributes: int = 0
  dropout: float = 0.0
  encoder: nn.Module | None = None
  unroll: int = 1
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self):
    check_flags(self)
    super().__post_init__()

  def setup(self):
    """Declares all parts; parts that no attribute turns on create no parameters."""
    width = self.hidden_dim
    dense = lambda features: nn.Dense(features, dtype=self.dtype)
    init = nn.initializers.normal(1.0)
    self.embedding = self.param("embedding", init, (self.vocab_size, self.embed_dim), jnp.float32)
    self.cells, self.keys = dense(width), dense(self.attention_dim)
    self.pooled = dense(width)
    self.static_guide = dense(width)
    self.initial = dense(4 * width if self.guide == "sequential" else 2 * width)
    self.attributes = dense(self.num_attributes)
    query = width + self.embed_dim if self.attention_query == "hidden_word" else width
    self.attention = AttentionParameters(query, self.attention_dim, self.dtype)
    inputs = {"word": self.embed_dim, "hidden": width}
    inputs |= {"pooled": width} if self.guide_pooled else {}
    self.guide_cell = cell.CellParameters(inputs, width, "tanh", (), self.dtype, name="guide_lstm")
    inputs = {"context": width}
    inputs |= {"word": self.embed_dim} if self.decoder_word else {}
    inputs |= {"guide": width} if self.guide != "none" else {}
    partial = ("context",) if self.context_gates == "candidate" else ()
    self.decoder_cell = cell.CellParameters(
      inputs, width, self.candidate, partial, self.dtype, name="decoder_lstm"
    )
    init = nn.initializers.lecun_normal()
    self.output_kernel = self.param("output_kernel", init, (width, self.vocab_size), jnp.float32)
    zeros = nn.initializers.zeros
    self.output_bias = self.param("output_bias", zeros, (self.vocab_size,), jnp.float32)
    self.drop = nn.Dropout(self.dropout)

  def __call__(
    self,
    features: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    cell_mask: jax.Array | None = None,
    train: bool = False,
    sampling_rate: float | jax.Array = 0.0,
  ) -> CaptionerOutput:
    """Returns logits, attention, guiding vectors and attribute scores of given captions.

    Args:
      features: ``[batch, num_cells, dim]`` floats, or images if the model has an encoder.
      tokens: ``[batch, length]``, integers in [0, vocab_size); each caption starts with its
        beginning token. The logits predict the next tokens. An id outside the vocabulary makes the
        logits of its caption NaN from that position on.
      mask: ``[batch, length]``, bool: True for real tokens, False for padding; None if all are
        real. Padding is at the end; its ids are ignored. Ignore the output at padding.
      cell_mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.
      train: whether to apply dropout; ``apply`` then needs ``rngs={"dropout": key}`` unless
        ``dropout`` is 0.
      sampling_rate: scheduled sampling (https://arxiv.org/abs/1506.03099): the probability, for
        each word after the first, that the model reads a word drawn from its own prediction instead
        of the given word. A nonzero or traced rate needs ``rngs={"sampling": key}`` in ``apply``.
        The draw has no derivative, so keep the rate at 0 if you take hypergradients.

    Raises:
      ValueError: an array has another shape or dtype.
    """
    check_tokens(tokens, mask)
    if mask is not None:
      tokens = jnp.where(mask, tokens, 0)  # An unknown id would give NaN, and 0 * NaN is NaN.
    encoded = self.encode(features, cell_mask, train=train)
    weights, state = self._weights(), self.initial_state(encoded)

    time_major = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)
    if isinstance(sampling_rate, (int, float)) and sampling_rate == 0:
      embedded = self.drop(self._embed(tokens), deterministic=not train)
      xs = time_major(recurrence.inputs(self, weights, encoded, embedded))
      body = lambda state, words: recurrence.advance(self, weights, encoded, words, state)
    else:
      ones = jnp.ones((*tokens.shape, self.embed_dim), self.dtype)
      kept = self.drop(ones, deterministic=not train)
      length = tokens.shape[1]
      keys = jax.random.split(self.make_rng("sampling"), length)
      rates = jnp.where(jnp.arange(length) == 0, 0, sampling_rate)
      xs = *time_major((tokens, kept)), keys, rates
      body = self._sampling_body(weights, encoded)
      state = state, jnp.zeros((len(tokens), self.vocab_size), self._high)

    if self.remat:
      body = jax.checkpoint(body, prevent_cse=self.unroll > 1)  # pyright: ignore
    _, steps = jax.lax.scan(body, state, xs, unroll=self.unroll)
    steps = time_major(steps)
    scores = None
    if self.num_attributes:
      guide = steps.guide
      if mask is not None:
        guide = jnp.where(mask[:, :, None], guide, jnp.finfo(guide.dtype).min)
        guide = jnp.where(mask.any(axis=1)[:, None, None], guide, 0)
      scores = self.attributes(guide.max(axis=1)).astype(self._high)
    logits = self._logits(self.drop(steps.hidden, deterministic=not train))
    return CaptionerOutput(logits, steps.attention, steps.guide, scores)

  def encode(
    self, features: jax.Array, cell_mask: jax.Array | None = None, *, train: bool = False
  ) -> Encoded:
    """Returns what the model computes once for each image.

    Args:
      features: ``[batch, num_cells, dim]`` floats, or images if the model has an encoder.
      cell_mask: ``[batch, num_cells]``, bool: True for cells that are present; None if all are.
      train: whether to apply dropout; ``apply`` then needs ``rngs={"dropout": key}`` unless
        ``dropout`` is 0.

    Raises:
      ValueError: an array has another shape or dtype.
    """
    if self.encoder is not None:
      features = self.encoder(features)  # pyright: ignore[reportCallIssue]
    made_for = None
    if not self.is_initializing():
      made_for = self.variables["params"]["cells"]["kernel"].shape[0]
    check_features(features, cell_mask, made_for)
    features = features.astype(self.dtype)
    if cell_mask is None:
      mean = features.mean(axis=1, dtype=self._high)
    else:
      features = jnp.where(cell_mask[:, :, None], features, 0)
      count = jnp.maximum(cell_mask.sum(axis=1, keepdims=True), 1)
      mean = features.sum(axis=1, dtype=self._high) / count
    drop = lambda x: self.drop(nn.relu(x), deterministic=not train)
    cells = drop(self.cells(features))
    sequential = self.guide == "sequential" and self.guide_pooled
    pooled, vector = None, None
    if sequential or self.guide == "static" or self.init_state == "pooled":
      pooled = drop(self.pooled(mean.astype(self.dtype)))
    if self.guide == "static":
      vector = jnp.tanh(self.static_guide(pooled))
    return Encoded(cells, self.keys(cells), cell_mask, pooled, vector)

  def initial_state(self, encoded: Encoded) -> DecoderState:
    """Returns the state before the first word, ``[batch, hidden_dim]``."""
    parts = 4 if self.guide == "sequential" else 2
    if self.init_state == "pooled":
      states = jnp.split(jnp.tanh(self.initial(encoded.pooled)), parts, axis=-1)
    else:
      states = [zeros_like(encoded.cells[:, 0], self.dtype)] * parts
    hidden, new_cell, *guide = states
    guide_hidden, guide_cell = guide or (None, None)
    if guide_cell is not None:
      guide_cell = guide_cell.astype(self._high)
    return DecoderState(hidden, new_cell.astype(self._high), guide_hidden, guide_cell)

  def step(
    self, tokens: jax.Array, state: DecoderState, encoded: Encoded
  ) -> tuple[jax.Array, DecoderState]:
    """Reads one word of each caption; returns the log-probabilities of the next and the new state.

    Args:
      tokens: ``[batch, ...]``, integers; entries on the axes after the first (for example, beams)
        share an image.
      state: the state before the word, with leaves ``[batch, ..., hidden_dim]``.
      encoded: the result of :meth:`encode`.

    Returns:
      Log-probabilities ``[batch, ..., vocab_size]``, in float32 at least, and the new state.
    """
    weights = self._weights()
    words = recurrence.inputs(self, weights, encoded, self._embed(tokens))
    state, output = recurrence.advance(self, weights, encoded, words, state)
    return jax.nn.log_softmax(self._logits(output.hidden)), state

  @property
  def _high(self) -> Any:
    return jnp.promote_types(self.dtype, jnp.float32)

  def _weights(self) -> recurrence.Weights:
    guide = self.guide_cell() if self.guide == "sequential" else None
    return recurrence.Weights(guide, self.attention(), self.decoder_cell())

  def _embed(self, tokens: jax.Array) -> jax.Array:
    return nn.relu(rows(self.embedding, tokens)).astype(self.dtype)

  def _logits(self, hidden: jax.Array) -> jax.Array:
    bias = self.output_bias.astype(self._high)
    return matmul(hidden, self.output_kernel) + bias.reshape((1,) * (hidden.ndim - 1) + (-1,))

  def _sampling_body(self, weights: recurrence.Weights, encoded: Encoded) -> Any:
    """Returns a step that may read a word it drew; its carry also holds the last logits."""

    def body(carry, xs):
      (state, logits), (given, kept, key, rate) = carry, xs
      word_key, coin_key = jax.random.split(key)
      drawn = jax.random.categorical(word_key, logits)
      tokens = jnp.where(jax.random.bernoulli(coin_key, rate, given.shape), drawn, given)
      words = recurrence.inputs(self, weights, encoded, self._embed(tokens) * kept)
      state, output = recurrence.advance(self, weights, encoded, words, state)
      return (state, self._logits(output.hidden)), output

    return body
