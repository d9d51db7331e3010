"""How many operations does the model need? Multiply-adds x 2 of the matrix products,
and nothing else.

Model FLOPs, as in PaLM (arXiv:2204.02311, appendix B): what the mathematics asks for, not what the
program runs, so recomputation (remat), masked-out blocks and optimizer work don't count. Unlike
there, causal attention counts only the keys that a query may see. Norms, softmax, activations and
the embedding lookup are no matrix products and are left out.

D width, L layers, N heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, E experts, T sequence length.
"""

from model.config import ModelConfig

Number = int | float


def mean_keys(
  sequence_length: Number, window: int = 0, document_length: Number | None = None
) -> Number:
  """Keys that a query attends to under a causal mask, itself included, averaged over the positions.

  (T + 1) / 2 without a window; with a window W < T, position t sees min(t + 1, W),
  whose mean is W - W (W - 1) / (2 T).

  Packed documents end the view earlier: `document_length` takes the place of T when it is shorter.
  For documents of different lengths d pass the mean as a token sees it, E[d^2] / E[d], which makes
  the result exact without a window. Raises ValueError for lengths below 1 and a negative window.
  """
  if sequence_length < 1 or (document_length is not None and document_length < 1) or window < 0:
    raise ValueError(
      f'{sequence_length=}, {document_length=} and {window=}: '
      'lengths start at 1 and window at 0 (none)'
    )
  length = sequence_length if document_length is None else min(sequence_length, document_length)
  if not window or window >= length:
    return (length + 1) / 2
  return window - window * (window - 1) / (2 * length)


def forward_flops_per_token(
  model: ModelConfig, sequence_length: Number, document_length: Number | None = None
) -> Number:
  """FLOPs of one token's forward pass: 2 x (weights that multiply it)
  + attention's two products, summed over layers.

      2 [2 D N H + 2 D K H + g D F] + 4 N H keys, each layer, and 2 D V,
      g = 3 if gated else 2, keys = mean_keys(...)

  keys follows the layer's window. Of a layer with experts, F is that of the experts that see a
  token (those chosen and the shared one), and the router adds D E. Latent attention counts its own
  projections, every key formed as in training. Tying the embeddings changes the number of
  parameters, not of operations: the head multiplies either way. Raises ValueError while the
  vocabulary is 0 (open), NotImplementedError for an encoder-decoder, whose tokens are of two kinds.
  """
  if model.V < 1:
    raise ValueError(
      f'vocabulary={model.V}: the head has no size yet; resolve the config with the tokenizer first'
    )
  if model.encoder_layers:
    raise NotImplementedError(
      f'model.encoder_layers={model.encoder_layers}: '
      'FLOPs per token are counted for one stack of layers only'
    )
  total = 2 * model.D * model.V
  for kind in model.kinds:
    keys = mean_keys(sequence_length, kind.window, document_length)
    keys = keys if model.causal else 2 * keys - 1  # on either side, the token itself once
    total += 2 * (attention_weights(model) + feed_forward_weights(model, kind.moe))
    total += 2 * model.N * (model.H + model.rope_width + model.value_width) * keys
  return total


def pair_flops(
  model: ModelConfig, source: Number, target: Number, seen: tuple[Number, ...] = ()
) -> Number:
  """FLOPs of an encoder-decoder's forward pass over a source of so many tokens and a target: those
  of either stack as above, without masks in the encoder, and in every layer of the decoder
  cross-attention: projections of the target (queries, output) and of the source (keys, values), and
  the two products.

  seen: of packed rows, in which no pair sees another: the length of the source that a token of one
    stands in, of the target that a token of one does, and of the source that a token of a target
    sees. Means over tokens make the result exact without a window, as in mean_keys.
  Raises ValueError for a model without an encoder, and while the vocabulary is 0.
  """
  if model.V < 1 or not model.encoder_layers:
    raise ValueError(
      f'vocabulary={model.V}, encoder_layers={model.encoder_layers}: only an encoder-decoder whose '
      'vocabulary is known reads a source and gives a target'
    )
  source_seen, target_seen, crossing = seen or (source, target, source)
  dense = 2 * (attention_weights(model) + feed_forward_weights(model, False))
  per_key = 4 * model.N * model.H
  encoder = model.encoder_layers * source * (dense + per_key * source_seen)
  keys = sum(mean_keys(target_seen, kind.window) for kind in model.kinds)
  crossed = 4 * model.D * model.H * (model.N * target + model.K * source)
  decoder = model.L * (target * (dense + per_key * crossing) + crossed) + target * per_key * keys
  return encoder + decoder + 2 * model.D * model.V * target


def attention_weights(model: ModelConfig) -> int:
  """Weights of one layer's attention that multiply a token."""
  D, N, H, latent = model.D, model.N, model.H, model.latent
  if not latent.width:
    return 2 * D * H * (N + model.K)
  queries = latent.query_width or D
  return (
    (D * queries if latent.query_width else 0)
    + queries * N * (H + latent.rope_width)
    + D * (latent.width + latent.rope_width)
    + latent.width * N * (H + model.value_width)
    + N * model.value_width * D
  )


def feed_forward_weights(model: ModelConfig, moe: bool) -> int:
  """Weights of one layer's feed-forward, or of its router and the experts that see a token,
  that multiply it.
  """
  matrices = 3 if model.gated else 2
  if not moe:
    return matrices * model.D * model.F
  width = model.moe.per_token * (model.moe.feed_forward or model.F) + model.moe.shared_feed_forward
  return matrices * model.D * width + model.D * model.E


def train_flops_per_token(
  model: ModelConfig, sequence_length: Number, document_length: Number | None = None
) -> Number:
  """FLOPs of training on one token: the forward pass and twice
  that backward (d inputs and d weights).
  """
  return 3 * forward_flops_per_token(model, sequence_length, document_length)


def six_nd(parameters: Number, tokens: Number) -> Number:
  """The usual estimate of training FLOPs, 6 N D (arXiv:2001.08361, section 2.1);
  attention is not in it.
  """
  return 6 * parameters * tokens


def mfu(flops_per_second: Number, devices: int, peak: Number | None) -> Number | None:
  """Model FLOPs utilisation, 0 to 1: model FLOPs per second / (devices x peak of one),
  or None for an unknown peak.
  """
  return None if peak is None else flops_per_second / (devices * peak)
