"""What do tests generate with, where any model will do? A small one of bytes, as a Generator."""

import math

import jax

from data.tokenizers import ByteTokenizer
from decode.generator import Generator
from model import transformer
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh


def config_of(max_length: int, **changes) -> ModelConfig:
  """A model whose logits are far from alike."""
  sizes = dict(vocabulary=259, width=16, layers=2, heads=2, feed_forward=24, init_scale=1.0)
  return ModelConfig(**sizes | {'max_length': max_length} | changes)


def generator_of(config: ModelConfig, seed: int = 0, **sizes: int) -> Generator:
  """Of initialised parameters; sizes: of the mesh, which is one device where none is given."""
  mesh = make_mesh(MeshConfig(**{'data': 1} | sizes), jax.devices()[: math.prod(sizes.values())])
  with jax.set_mesh(mesh):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, seed)
  return Generator(model, ByteTokenizer(), mesh)
