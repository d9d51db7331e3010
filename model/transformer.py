"""What is the network? An embedding, a stack of blocks scanned over its layers, a head; and, where
the config asks, an encoder.

B batch · T length · S source or cache length · D width · V vocabulary · L layers · E experts
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import names
from kernels.mask import Mask, Relative
from model import router
from model.attention import Attention, LatentAttention, View
from model.config import Kind, ModelConfig
from model.layers import Embedding, FeedForward, Head, Norm, Pooler, rope_angles
from model.params import param
from model.places import AnyCache, AnySlots, Places, without
from model.weights import Weight, gathered, joined, read
from parallel import axes as ax, mesh, offload, pipeline, remat


class Output(NamedTuple):
  """Attributes:
  hidden: [B, T, D] final hidden states, in the compute dtype: what `logits` and loss.cross_entropy
    score.
  cache: with the tokens appended; None without one.
  router: what the experts report (model.moe), summed over the batch: `load` [layers with experts,
    E] and `dropped` of the same layers; `balance_loss` and `router_z_loss`, weighted and summed
    over layers; None without experts.
  """

  hidden: Any
  cache: AnyCache | None
  router: dict[str, Array] | None


class Block(nnx.Module):
  """Attention, cross-attention where there is an encoder, feed-forward or experts; each with a
  residual.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, kind: Kind = Kind(), cross: bool = False):
    self.placement, self.dtype = config.norm_placement, config.execution.dtype

    def norm(wanted=True):
      return Norm(config, config.D, rngs) if wanted else None

    both = config.norm_placement == 'both'
    self.attention_norm, self.attention_post_norm = norm(), norm(both)
    self.attention = (LatentAttention if config.latent.width else Attention)(
      config, rngs, kind.window
    )
    self.cross_norm, self.cross_post_norm = norm(cross), norm(cross and both)
    self.cross = Attention(config, rngs, cross=True) if cross else None
    self.feed_forward_norm, self.feed_forward_post_norm = norm(), norm(both)
    layer = names.imported('model.moe.MoE') if kind.moe else FeedForward
    self.feed_forward = layer(config, rngs)

  def __call__(self, x: Float[Array, 'B T D'], view: View, slots: AnySlots | None):
    """The new x, the slots written, and what the experts report ({} without)."""
    x = remat.named(x, 'block')
    with jax.named_scope('attention'):
      mixed, slots = self.attention(self._before(x, self.attention_norm), view, slots)
      x = self._after(x, remat.named(mixed, 'attention_out'), view, 'attention')
    if self.cross is not None:
      with jax.named_scope('cross'):
        mixed = self.cross.cross(self._before(x, self.cross_norm), view, slots)
        x = self._after(x, mixed, view, 'cross')
    with jax.named_scope('feed_forward'):
      report = {}
      if not isinstance(self.feed_forward, FeedForward):  # experts gather themselves
        h, report = self.feed_forward(
          self._normed(x, self.feed_forward_norm), view.mask.query_segments
        )
      else:
        h = self.feed_forward(self._before(x, self.feed_forward_norm), view.dropped)
      x = self._after(x, remat.named(h, 'feed_forward_out'), view, 'feed_forward')
    return x, slots, report

  def _before(self, x, norm):
    # The products need all tokens of a device's sequences; what is gathered is normed already, and
    # in the compute dtype.
    return ax.place(self._normed(x, norm), 'batch', 'length', 'width')

  def _normed(self, x, norm):
    # The stream may be of a wider type (ModelConfig.stream_dtype).
    return (x if self.placement == 'post' else norm(x)).astype(self.dtype)

  def _after(self, x, new, view, part):
    norm, post_norm = getattr(self, f'{part}_norm'), getattr(self, f'{part}_post_norm')
    if self.placement == 'post':
      return norm(x + view.dropped(new, part))
    return x + view.dropped(new if post_norm is None else post_norm(new), part)


class Stack(nnx.Module):
  """Blocks and a final norm. `blocks[j]` holds, stacked, all layers that are at one place of a
  repeating period.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, encoder: bool = False):
    self.remat, run = config.kept, config.execution
    self.pipeline, self.dtype = run.pipeline, run.dtype
    self.periods = config.encoder_stacks if encoder else config.stacks
    self.shared = config.shared_layers
    cross = bool(config.encoder_layers) and not encoder
    config.check_stages(ax.size('layers'))

    def born(kind, repeats, axis):
      # vmap lays out what it stacks as it finds the keys.
      keys = ax.place(jax.random.split(rngs.params(), repeats), axis)
      return jax.vmap(lambda key: Block(config, nnx.Rngs(params=key), kind, cross))(keys)

    split = pipeline.split_scan(self.periods)
    self.blocks = nnx.List(
      [
        born(kind, repeats // self.shared, 'layers' if i == split else None)
        for i, (kinds, repeats) in enumerate(self.periods)
        for kind in kinds
      ]
    )
    self.norm = None if config.norm_placement == 'post' else Norm(config, config.D, rngs)
    self.bidirectional, self.distance = encoder or not config.causal, config.relative_distance
    self.relative = (
      param(
        rngs,
        (config.relative_buckets, config.N),
        (None, 'heads'),
        config.D**-0.5,
        kind='vector',
        dtype=config.execution.parameter_dtype,
      )
      if config.position == 'relative'
      else None
    )

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    view: View,
    cache: AnyCache | None,
    counts: Int[Array, 'B'] | None = None,
    fresh: bool = False,
    rows: Int[Array, 'B'] | None = None,
  ) -> Output:
    """Final hidden states of x; counts, fresh, rows: see Decoder."""
    if self.relative is not None:
      view = dataclasses.replace(
        view,
        relative=Relative(
          table=self.relative[...], bidirectional=self.bidirectional, max_distance=self.distance
        ),
      )
    if cache is None:
      places = without(len(self.blocks))
    else:
      places = cache.places(x.shape[1], counts, fresh, rows)

    # One scan after another, each over the blocks and the buffers of its own places.
    reports, written, first = [], [], 0
    parts = places.split(len(kinds) for kinds, _ in self.periods)
    for i, ((kinds, _), part) in enumerate(zip(self.periods, parts, strict=True)):
      blocks = tuple(list(self.blocks)[first : first + len(kinds)])
      split = ax.size('layers') > 1 and i == pipeline.split_scan(self.periods)
      if view.drawn is not None:
        axis = 'layers' if split else None
        blocks = view.drawn.numbered(blocks, self.periods, i, axis, self.shared)
      run = self._pipelined if split else self.scan
      x, part, scanned = run(blocks, x, view, part)
      reports += router.in_order(scanned)
      written.append(part)
      first += len(kinds)

    if cache is not None:
      cache = cache.longer(places.joined(written).held, places.counts, rows)
    return Output(self.normed(x), cache, router.summed(reports) if reports else None)

  def normed(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    """What the last block leaves, as it is scored."""
    x = x if self.norm is None else self.norm(x)
    return ax.place(x.astype(self.dtype), 'batch', 'length', 'width')

  def scan(self, blocks, x, view, places: Places | None = None):
    """Periods of blocks, one after another: the new x, `places` with the tokens written, and what
    each place of the period reports. Without `places` there is no cache.
    """

    # The barrier keeps XLA from casting the weights of all layers before the loop, which takes half
    # a parameter's memory again. On GPUs XLA does not, and a barrier there makes it copy every
    # layer's weights, and their gradients, before it casts them. With `x` the barrier keeps jax
    # from gathering all layers of a stage before the loop over ticks. What lies in the host's
    # memory comes to the device here, forward and backward.
    def guarded(block, x, slots):
      block = offload.to_device(block)
      if pipeline.inside():
        block, x = jax.lax.optimization_barrier((block, x))
      elif mesh.platform() != 'gpu':
        block = jax.lax.optimization_barrier(block)
      return block(x, view, slots)

    alone = self.remat.alone(blocks) and self.shared == 1
    if alone and not pipeline.inside():

      def run(block, x, slots):
        return block(x, view, slots)
    else:
      run = remat.remat(guarded, self.remat)
    places = without(len(blocks)) if places is None else places

    def period(carry, blocks):
      x, buffers, layer = carry
      before, after, reports = places.carrying(buffers), [], []
      for place, block in enumerate(blocks):
        x, slots, report = run(block, x, before.slots(place, layer))
        after.append(slots and slots.held)
        reports += [report] if report else []
      return (x, tuple(after), layer + 1), reports

    def shared(carry, blocks):
      # The same parameters for every layer of a set, and a layer of the buffers for each.
      def use(carry, i):
        return period(carry, blocks if view.drawn is None else view.drawn.used(blocks, i))

      return jax.lax.scan(use, carry, jnp.arange(self.shared, dtype=jnp.uint32))

    # Only buffers go from layer to layer: what else the places say is the same for all of them, and
    # need not be carried.
    carry = x, places.held, 0 if alone else jnp.int32(0)
    step = period if self.shared == 1 else shared
    (x, buffers, _), reports = remat.scan(step, carry, blocks, self.remat)
    if self.shared > 1:
      reports = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), reports)
    return x, places.carrying(buffers), reports

  def _pipelined(self, blocks, x, view, places):
    """As scan, over the stages of the mesh."""
    # Then what is gathered is kept: once, and not for every microbatch.
    if self.remat.policy == 'none':
      blocks = joined(blocks, gathered(blocks, self.dtype), reduce=False)
    fields = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
    whole = {'relative': fields.pop('relative')}
    if places.lengths is None:

      def layers(blocks, x, shared, whole):
        x, _, reports = self.scan(blocks, x, View(**shared, **whole))
        return x, reports

      x, reports = pipeline.run(layers, blocks, x, fields, whole, self.pipeline)
      return x, places, reports

    def cached(blocks, x, buffers, shared, active):
      lengths, counts, shared = shared
      here = dataclasses.replace(
        places.carrying(buffers),
        lengths=lengths,
        counts=jnp.where(active, counts, 0),  # an idle stage writes nothing
      )
      x, here, reports = self.scan(blocks, x, View(**shared), here)
      return x, here.held, reports

    shared = places.lengths, places.counts, fields | whole
    x, buffers, reports = pipeline.relay(cached, blocks, x, places.held, shared)
    return x, places.carrying(buffers), reports

  def keys_values(
    self, memory: Float[Array, 'B S D']
  ) -> tuple[tuple[Float[Array, 'R B S K H'], Float[Array, 'R B S K H']], ...]:
    """Of cross-attention to `memory`, of every place."""

    def of_place(block):
      return jax.lax.scan(lambda _, block: (None, block.cross.keys_values(memory)), None, block)[1]

    return tuple(map(of_place, self.blocks))


class Decoder(nnx.Module):
  """A language model: `model(tokens, ...)` gives final hidden states, `model.logits` the scores of
  them.

  With config.causal=False it is an encoder (BERT): every token sees all of its row or segment.
  """

  drawn = None  # what training draws in a call (model.drawn.put)

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    if not config.V:
      raise ValueError(
        'model.vocabulary=0: set it to the size of the tokenizer before building the model'
      )
    if config.position == 'learned' and not config.max_length:
      raise ValueError('model.max_length=0: learned positions need the length of their table')
    self.config = config
    self.embedding = Embedding(config, rngs)
    self.stack = Stack(config, rngs)
    self.head = Head(config, rngs)
    self.pooler = Pooler(config, rngs) if config.pooler else None

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
    cache: AnyCache | None = None,
    *,
    types: Int[Array, 'B T'] | None = None,
    laid: Mask = Mask(),
    counts: Int[Array, 'B'] | None = None,
    fresh: bool = False,
    rows: Int[Array, 'B'] | None = None,
  ) -> Output:
    """Final hidden states, the cache with the tokens appended, and what the experts report.

    Args:
      positions: of each token in its document; default: 0..T-1, or after the row's cached tokens.
      segments: document of each token in a packed row; tokens of different segments never see each
        other.
      cache: what earlier calls left; the row's new tokens follow its cached ones. Not together with
        segments.
      types: rows of the table of token types; default 0.
      laid: how all arguments are, and hidden states: a mask's zigzag, branches and trunk.
      counts: with a cache, how many of the tokens are the row's; the others are padding behind
        them, and not kept. Default: all.
      fresh: with a cache, that it is empty: tokens then look at each other as in training, and not
        at slots.
      rows: with a cache, which of its rows these are, as model.cache.Slots numbers them; the others
        stay as they are. Default: all, in order.
    Raises ValueError for more tokens than model.max_length, and for arguments that exclude each
    other; NotImplementedError for rows with fresh, and over pipeline stages.
    """
    split = cache is None or (fresh and tokens.shape[1] % ax.size('length') == 0)
    with ax.whole_rows(not split):
      begin = None if cache is None else cache.lengths_of(rows)
      x, view = self._view(tokens, positions, segments, begin, types, laid)
      return self.scaled(self.stack(x, view, cache, counts, fresh, rows))

  def _view(self, tokens, positions, segments, begin, types, laid=Mask(), encoder=False):
    """What the stack is called with: the embedded tokens, and what its layers share.

    begin: [B], how many tokens a cache holds of each row; None without.
    """
    config, (B, T) = self.config, tokens.shape
    longest = laid.trunk + (T - laid.trunk) // laid.branches
    if begin is not None and (segments is not None or laid.branches > 1):
      raise ValueError('a cache has a text a row: segments, branches and cache exclude each other')
    if 0 < config.max_length < longest:
      limit = f'model.max_length={config.max_length}'
      raise ValueError(f'{longest} tokens in a row pass {limit}; give fewer, or raise it')
    if types is not None and not config.token_types:
      raise ValueError(
        'token types were given to a model without a table of them; set model.token_types'
      )
    if begin is not None:
      tokens = ax.place(tokens, 'batch', 'length')
    if positions is None:
      index = jnp.broadcast_to(laid.positions(T, T)[0], (B, T))
      positions = ax.place(index if begin is None else index + begin[:, None], 'batch', 'length')
    mask = dataclasses.replace(laid, causal=config.causal).of_segments(segments)
    with jax.named_scope('embed'):
      x = self.embedding(tokens, positions, types)
    view = View(mask, *self.angles(positions), prefix=self.embedding.prefix(tokens))
    return (x, view) if self.drawn is None else self.drawn.entered(x, view, encoder)

  def angles(self, positions: Int[Array, 'B T']):
    """Of rotary positions, and those of layers with a window; None, None without."""
    config, width = self.config, self.config.rope_width or self.config.H
    return tuple(
      rope_angles(positions, width, config.rope, local) if config.position == 'rope' else None
      for local in (False, True)
    )

  def scaled(self, output: Output) -> Output:
    """With hidden states times config.logit_scale."""
    return (
      output
      if self.config.logit_scale == 1
      else output._replace(hidden=output.hidden * self.config.logit_scale)
    )

  def scored(self, x: Float[Array, '*B D']) -> tuple[Float[Array, '*B E'], Float[Array, 'V E']]:
    """What final hidden states become before they are scored, and the table they are scored
    against, in the compute dtype.

    The table is laid out as it is stored, but for one with a bias, which is whole along E.
    """
    return self._output_embedding().scored(
      self.head(x), self._output_bias(), self.config.execution.dtype
    )

  def logits(self, x: Float[Array, '*B D']) -> Float[Array, '*B V']:
    """Scores over the vocabulary in f32, of a few positions: training uses loss.cross_entropy,
    which never holds them all.
    """
    logits = self._output_embedding().scores(
      self.head(x), self._output_bias(), self.config.execution.dtype
    )
    cap = self.config.logit_softcap
    return cap * jnp.tanh(logits / cap) if cap else logits

  def _output_embedding(self) -> Weight:
    return read(self.embedding.tokens if self.head.tokens is None else self.head.tokens)

  def _output_bias(self) -> Array | None:
    return None if self.head.bias is None else self.head.bias[...]


class EncoderDecoder(Decoder):
  """A decoder whose blocks also look at what an encoder, of the same sizes and with the same
  embedding, made of a source.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    if ax.size('length') > 1:
      raise NotImplementedError(
        f'an encoder-decoder does not split its rows: mesh.context={ax.size("length")}; use data, '
        'fsdp or tensor'
      )
    super().__init__(config, rngs)
    self.encoder = Stack(config, rngs, encoder=True)

  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    positions: Int[Array, 'B T'] | None = None,
    segments: Int[Array, 'B T'] | None = None,
    cache: AnyCache | None = None,
    *,
    source: Int[Array, 'B S'] | None = None,
    source_positions: Int[Array, 'B S'] | None = None,
    source_segments: Int[Array, 'B S'] | None = None,
    counts: Int[Array, 'B'] | None = None,
    fresh: bool = False,
    rows: Int[Array, 'B'] | None = None,
  ) -> Output:
    """As Decoder.__call__; the source comes with the call, or was read into the cache before
    (`read`).

    source_segments: document of each source token, 0 for padding; the tokens of a segment see the
      source of the same number. Without segments every row is document 1.
    """
    if (source is None) == (cache is None):
      raise ValueError(
        'an encoder-decoder needs its source: give it with the call, or read it into the cache '
        'first, and not both'
      )
    begin = None if cache is None else cache.lengths_of(rows)
    x, view = self._view(tokens, positions, segments, begin, None)
    if cache is not None:
      if cache.memory is None:
        raise ValueError('the cache holds no source; call EncoderDecoder.read first')
      return self.scaled(self.stack(x, view, cache, counts, fresh, rows))

    memory, keys = self.encode(source, source_positions, source_segments), source_segments
    if segments is None:
      segments = ax.place(jnp.ones(tokens.shape, jnp.int32), 'batch', 'length')
    if keys is None:
      keys = ax.place(jnp.ones(source.shape, jnp.int32), 'batch', 'length')
    mask = Mask(causal=False, query_segments=segments, key_segments=keys)
    view = dataclasses.replace(view, memory=memory, memory_mask=mask)
    return self.scaled(self.stack(x, view, None))

  def encode(
    self,
    source: Int[Array, 'B S'],
    positions: Int[Array, 'B S'] | None = None,
    segments: Int[Array, 'B S'] | None = None,
  ) -> Float[Array, 'B S D']:
    """The encoder's final hidden states; segments: 0 for padding."""
    x, view = self._view(source, positions, segments, None, None, encoder=True)
    return self.encoder(
      x, dataclasses.replace(view, mask=dataclasses.replace(view.mask, causal=False)), None
    ).hidden

  def read(
    self,
    cache: AnyCache,
    source: Int[Array, 'B S'],
    lengths: Int[Array, 'B'],
    rows: Int[Array, 'B'] | None = None,
  ) -> AnyCache:
    """Encodes sources, of so many tokens and padding behind them, and keeps, in the cache, what
    every layer of the decoder looks up of them. rows: as of Decoder.__call__.
    """
    real = (jnp.arange(source.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    memory = self.stack.keys_values(self.encode(source, segments=real))
    return cache.remembering(memory, lengths, rows)


def init(config: ModelConfig, seed: int) -> Decoder:
  """A new model, born sharded on the mesh in context. Traced: use under jit or jax.eval_shape."""
  kind = EncoderDecoder if config.encoder_layers else Decoder
  model = kind(config, nnx.Rngs(params=jax.random.key(seed)))
  if config.execution.stored:
    return names.imported('model.weights.scheme.stored')(model, config.execution.stored)
  return model
