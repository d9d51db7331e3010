"""What is a run? One frozen Config: how it is built, checked, saved, loaded and compared; flags:
training/overrides.py.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import typing

import files
import names
from data.config import OF_TRAINING, DataConfig
from model.adaptation import AdapterConfig
from model.config import ModelConfig, named_axes
from model.execution import FREE, ExecutionConfig
from objectives import kinds
from objectives.objective import Objective, Role
from parallel.mesh import MeshConfig
from training.costs import ReportConfig
from training.optimizer import OptimizerConfig, make_schedule
from training.tasks import EvaluationConfig

FILE = 'config.json'
RATES = 'model.dropout.rates'  # of train.dropout; for the runs that have some


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """How long to train, what to watch and when to keep it.

  Attributes:
    steps: optimizer updates in all; 0 where epochs says how many. seed: of the initial parameters.
    epochs: how often all training rows are gone through, in the place of steps; a last batch that
      is not full counts, and is filled from the next epoch. Of several sources only where weights
      are in proportion to their rows.
    accumulation: microbatches of a step; exactly equal to one big batch.
    compiler: options that the step is compiled with (parallel/compiler.py): 'auto' the table for
      the chip and the mesh, 'none' none, or a table's name; behind it, or alone, NAME=VALUE changes
      one option, NAME= takes it out.
    dropout: shares that are left out in training, each step and row others (model/dropout.py):
      entries such as residual=0.1, of embedding, residual, attention, feed_forward, or all.
    offload_optimizer: where the optimizer's state is kept between steps: '' on the device, 'host'
      in the host's memory (parallel.offload), 'disk' in files without a name (training.spill). It
      may change when a run goes on.
    spill_dir: on the disk for 'disk', best a local one; default: the run's directory; '~' is the
      home directory.
    offload_parameters: keeps the matrices of stacked layers, and their gradients, in the host's
      memory; layers are on the device one at a time. Needs remat='full' or 'dots', accumulation=1,
      zero=3, no stages.
    trained, frozen: patterns over names of parameters such as 'policy.stack.blocks.0.attention.q'
      ('*' matches dots, too): trained is what any of the first matches and none of the second does
      (training/trainable.py).
    log_every, eval_every, save_every: in steps; eval_every=0 evaluates only at the end.
    eval_batches: validation batches an evaluation reads, of several sources at least one of each; 0
      reads all (the last evaluation always does).
    sample_every: in steps; what the model writes then, and at the end, comes into the report and
      TensorBoard (workdir/samples.py); 0 never writes. sample_prompts: after what.
    keep_last: checkpoints to keep besides the best one.
    save_timeout: seconds that a save may take, beside the steps, before the run ends because of it:
      its disk does not answer.
    best: which checkpoint is the best, and what training waits for: 'lowest' or 'highest' and the
      name of what evaluations say, of a validation or of a task (config.evaluation), as in
      'highest boolq-0/accuracy'.
    patience: evaluations that were no better before training stops; 0 never stops early.
    nonfinite: what a loss or gradient that is not finite does: 'stop' the run or 'skip' the update.
      (Steps that overflow under f16 loss scaling are always skipped: they correct the scale.)
  """

  steps: int = 200
  epochs: float = 0.0
  seed: int = 0
  accumulation: int = 1
  compiler: tuple[str, ...] = ('auto',)
  dropout: tuple[str, ...] = ()
  offload_optimizer: str = ''
  offload_parameters: bool = False
  spill_dir: str = ''
  trained: tuple[str, ...] = ('*',)
  frozen: tuple[str, ...] = ()
  log_every: int = 10
  eval_every: int = 0
  eval_batches: int = 0
  sample_every: int = 0
  sample_prompts: tuple[str, ...] = ('',)
  save_every: int = 100
  keep_last: int = 2
  save_timeout: int = 3600
  best: str = 'lowest validation_loss'
  patience: int = 0
  nonfinite: str = 'stop'

  def __post_init__(self):
    for field, least in (
      ('steps', 0),
      ('epochs', 0),
      ('accumulation', 1),
      ('log_every', 1),
      ('save_every', 1),
      ('keep_last', 1),
      ('save_timeout', 1),
      ('eval_every', 0),
      ('eval_batches', 0),
      ('sample_every', 0),
      ('patience', 0),
      ('seed', 0),
    ):
      if not least <= getattr(self, field) < math.inf:
        raise ValueError(
          f'train.{field}={getattr(self, field)} must be at least {least}, and finite'
        )
    if (self.steps > 0) == (self.epochs > 0):
      raise ValueError(
        f'train.steps={self.steps} and train.epochs={self.epochs}: one of them says how long to '
        'train; set the other to 0'
      )
    if self.seed >= 2**32:
      raise ValueError(
        f'train.seed={self.seed} must be below 2**32, of which jax.random.key keeps no more bits'
      )
    names.imported('parallel.compiler.parsed')(self.compiler)
    names.check('train.offload_optimizer', self.offload_optimizer, ('', 'host', 'disk'))
    if self.spill_dir and self.offload_optimizer != 'disk':
      raise ValueError(
        f"train.spill_dir={self.spill_dir!r} would not be read: "
        f"train.offload_optimizer={self.offload_optimizer!r} is not 'disk'; leave it empty"
      )
    object.__setattr__(self, 'spill_dir', os.path.expanduser(self.spill_dir))
    if self.dropout:
      names.imported(RATES)(self.dropout)
    names.check('train.nonfinite', self.nonfinite, ('stop', 'skip'))
    if not re.fullmatch('(lowest|highest) .+', self.best):
      raise ValueError(
        f'train.best={self.best!r} must be lowest or highest and the name of a metric, as in '
        "'lowest validation_loss' or 'highest boolq-0/accuracy'"
      )
    if self.sample_every and not self.sample_prompts:
      raise ValueError(
        f'train.sample_every={self.sample_every} without train.sample_prompts; an empty one is the '
        'beginning of a text'
      )
    if self.patience and not (self.eval_every or self.best_of_task):
      raise ValueError(
        f'train.patience={self.patience} counts evaluations, train.eval_every=0 makes none; set '
        'train.eval_every'
      )

  @property
  def best_of_task(self) -> bool:
    """Whether `best` is what a task says, 'highest boolq-0/accuracy', and not the objective."""
    return '/' in self.best and ' validation_' not in self.best


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that decides a run.

  Attributes:
    objective: what is minimised; its kind decides which fields it has (objectives/kinds.py).
    init: directory of a run, trained here or imported (convert.py), whose parameters training
      starts from; see training/overrides.py.

  Raises ValueError for parts that do not fit together.
  """

  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  objective: Objective = dataclasses.field(default_factory=kinds.default)
  mesh: MeshConfig = MeshConfig()
  report: ReportConfig = ReportConfig()
  adapter: AdapterConfig = AdapterConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  init: str = ''

  def __post_init__(self):
    T, B = self.data.sequence_length, self.data.batch_size
    longest = self.objective.longest_row(self.data)
    if 0 < self.model.max_length < longest:
      of_targets = f'objective.{self.objective.target_field}'
      field = 'data.sequence_length' if longest == T else of_targets
      raise ValueError(
        f'{field}={longest} passes model.max_length={self.model.max_length}; raise it, or set it '
        'to 0'
      )
    if B % self.train.accumulation:
      raise ValueError(
        f'data.batch_size={B} is not divisible by train.accumulation={self.train.accumulation}; '
        'make the batch a multiple'
      )
    rows = self.objective.rows
    if B // self.train.accumulation % rows:
      raise ValueError(
        f'data.batch_size={B} with train.accumulation={self.train.accumulation} does not fall into '
        f'whole records of {rows} rows ({self.objective.record}); make the batch a multiple of '
        f'{rows * self.train.accumulation}'
      )
    if rows > 1 and self.model.execution.pipeline.schedule == '1f1b':
      raise NotImplementedError(
        "model.execution.pipeline.schedule='1f1b' finds the loss of rows one by one, and "
        f"objective.kind={self.objective.kind!r} has records of {rows} rows; use 'gpipe'"
      )
    if (
      self.model.moe.balance_loss
      and self.model.moe.balance_over == 'batch'
      and self.train.accumulation > 1
    ):
      raise ValueError(
        "model.moe.balance_over='batch' looks at a microbatch when "
        f"train.accumulation={self.train.accumulation}: parts would not add up to the whole; use "
        "balance_over='sequence', or no accumulation"
      )
    if self.draws:
      names.imported('training.drawing.check')(self)
    if self.adapter.kind:
      names.imported('training.together.check_adapter')(self)
    if self.train.best_of_task and not self.evaluation.tasks:
      names.imported('training.together.check_best')(self)
    if self.train.offload_parameters:
      names.imported('training.together.check_offloaded')(self)
    if self.train.steps:
      # Raises where warm-up and decay do not fit into the run.
      make_schedule(self.optimizer, self.train.steps)

  @property
  def dropout(self):
    """The model.dropout.Rates of what training leaves out."""
    return names.imported(RATES)(self.train.dropout)

  @property
  def draws(self) -> bool:
    """Whether a step draws anything (training/drawing.py)."""
    left_out = self.train.dropout and any(dataclasses.astuple(self.dropout))
    return any((left_out, self.adapter.dropout, self.objective.neftune_alpha))

  def resolve(self, vocabulary: int, rows: int = 2**20) -> 'Config':
    """With the sizes that are open filled in from the data: vocabulary of the tokenizer, longest
    sequence, steps that go through so many training rows (any, for programs without data).

    Raises ValueError when the model's vocabulary is too small for the tokenizer.
    """
    model = dataclasses.replace(
      self.model,
      vocabulary=self.model.vocabulary or vocabulary,
      max_length=self.model.max_length or self.objective.longest_row(self.data),
    )
    if model.vocabulary < vocabulary:
      raise ValueError(
        f'model.vocabulary={model.vocabulary} is smaller than the tokenizer\'s {vocabulary}; set '
        'it to 0 to take that'
      )
    if not self.train.epochs:
      return dataclasses.replace(self, model=model)
    # In binary 1.1 is a little more than it says, and would be a step more.
    steps = math.ceil(round(self.train.epochs * rows / self.data.batch_size, 6))
    train = dataclasses.replace(self.train, steps=steps, epochs=0)
    return dataclasses.replace(self, model=model, train=train)

  def check_mesh(self, sizes: dict[str, int]) -> None:
    """Raises ValueError when an array cannot be split evenly over a mesh of these sizes."""
    rows = sizes['data'] * sizes['fsdp'] * sizes['expert']
    micro, records = self.data.batch_size // self.train.accumulation, self.objective.rows
    if micro % (rows * records):
      together = f', {records} of which are {self.objective.record},' if records > 1 else ''
      raise ValueError(
        f'a microbatch of {micro} sequences (data.batch_size={self.data.batch_size} / train.'
        f'accumulation={self.train.accumulation}){together} does not split over {rows} devices '
        f'(mesh data {sizes["data"]} x fsdp {sizes["fsdp"]} x expert {sizes["expert"]}); make it a '
        f'multiple of {rows * records}'
      )
    self.objective.check_mesh(self.data, sizes)
    m, tensor, stages = self.model, sizes['tensor'], sizes['stage']
    read = micro // self.objective.joined
    if stages > 1 and self.train.offload_parameters:
      raise NotImplementedError(
        'train.offload_parameters brings layers to the device one by one, a stage of a pipeline '
        f'holds its own all the time: mesh.stage={stages}; use fsdp'
      )
    if stages > 1 and read % (rows * m.execution.pipeline.count(stages)):
      raise ValueError(
        f'{read} sequences that a model reads (data.batch_size={self.data.batch_size} / '
        f'train.accumulation={self.train.accumulation}) on {rows} devices do not split into '
        f'model.execution.pipeline.microbatches={m.execution.pipeline.count(stages)} (default: '
        'mesh.stage); make the batch a multiple, or the microbatches fewer'
      )
    for name, role in self.objective.models(m).items():
      other = network(role, m)
      other.check_stages(stages)
      other.check_parameters(sizes)
      if 0 < other.max_length < self.objective.longest_row(self.data):
        raise ValueError(
          f'rows of {self.objective.longest_row(self.data)} tokens (data.sequence_length) pass '
          f'max_length={other.max_length} of {name} ({role.directory or "model"}); shorten them'
        )
    if self.data.sequence_length % (sizes['context'] * tensor):
      raise ValueError(
        f'data.sequence_length={self.data.sequence_length} does not split over '
        f'{named_axes(sizes, ("context", "tensor"))}, which share the residual stream; make it a '
        'multiple'
      )
    if sizes['context'] > 1:
      names.imported('training.together.check_split_rows')(self, sizes)


def to_dict(config) -> dict:
  """Nested plain dict of a config, for JSON and flags; tuples stay tuples."""
  return dataclasses.asdict(config)


def from_dict(cls, values: dict, path: str = 'config'):
  """A config dataclass from a nested dict. Raises ValueError for unknown names and wrong types."""
  hints = typing.get_type_hints(cls)
  known = {field.name for field in dataclasses.fields(cls)}
  for name in values:
    if name not in known:
      kind = cls().kind if issubclass(cls, Objective) else ''
      raise ValueError(unknown_field(path, name, sorted(known), kind))
  return cls(
    **{name: _convert(hints[name], value, f'{path}.{name}') for name, value in values.items()}
  )


def _convert(hint, value, path):
  if hint is Objective:
    hint = kinds.of(value.get('kind', kinds.DEFAULT))
  if dataclasses.is_dataclass(hint):
    return from_dict(hint, value, path)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if not isinstance(value, (list, tuple)):
      raise ValueError(f'{path}={value!r} must be a list of {getattr(item, "__name__", item)}')
    return tuple(_convert(item, v, f'{path}[{i}]') for i, v in enumerate(value))
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise ValueError(f'{path}={value!r} is {type(value).__name__}, must be {hint.__name__}')
  return value


# Fields that have another name than they had: flags are told, a config.json is read all the same.
MOVED = {'train.z_loss': 'objective.z_loss'} | {
  f'model.{field.name}': f'model.execution.{field.name}'
  for field in dataclasses.fields(ExecutionConfig)
}


def unknown_field(path: str, name: str, known, kind: str = '') -> str:
  """What to say of a field that is not there. kind: where it is one of the objective, of which kind
  that is.
  """
  moved = MOVED.get(f'{path}.{name}'.removeprefix('config.'))
  if moved:
    return f'{path}.{name} is config.{moved} now'
  if kind and kinds.foreign(kind, name):
    return kinds.foreign(kind, name)
  near = difflib.get_close_matches(name, known, 1)
  return (
    f'{path} has no field {name!r}'
    + (f'; did you mean {near[0]!r}?' if near else '.')
    + f' Known: {", ".join(known)}'
  )


def save(config: Config, directory: str | os.PathLike) -> None:
  """Writes config.json, sealed, atomically."""
  values = files.sealed(json.loads(json.dumps(to_dict(config))))
  files.replace(files.place(directory) / FILE, json.dumps(values, indent=2) + '\n')


def load(directory: str | os.PathLike) -> Config:
  """Reads config.json. Raises FileNotFoundError, or ValueError for a file that is not a Config, or
  was edited since it was sealed.
  """
  path = files.place(directory) / FILE
  if not path.exists():
    raise FileNotFoundError(
      f'{path} does not exist: {directory} is not the directory of a run; train one with train.py '
      '--workdir'
    )
  remedy = f'where that is meant, run python convert.py seal --workdir {directory}'
  return of(files.unsealed(files.json_object(path.read_bytes(), path), path, remedy), str(path))


def network(role: Role, model: ModelConfig) -> ModelConfig:
  """Of a model that a run takes beside its own: what another run's is, but run as this one's."""
  if role.config is not None:
    return role.config
  other = load(role.directory).model
  stored = {name: getattr(other.execution, name) for name in ('parameter_dtype', 'stored', 'scan')}
  # Of what is frozen nothing is kept for a backward pass, there is none.
  plain = {} if role.trained else {'remat': 'none', 'remat_save': (), 'remat_offload': ()}
  run = dataclasses.replace(model.execution, **stored, **plain)
  return dataclasses.replace(other, execution=run)


def of(values: dict, place: str) -> Config:
  """The Config of what `to_dict` gave, by this version or an older one.

  Raises ValueError, naming the place that they come from.
  """
  try:
    return from_dict(Config, _renamed(values))
  except (ValueError, TypeError, AttributeError) as error:
    raise ValueError(f'{place}: {error}') from error


def _renamed(values: dict) -> dict:
  """The values of a config.json with those that have moved in their new places, and without those
  that no tokenizer read.
  """
  tokenizer = values.get('data', {}).get('tokenizer', {})
  if tokenizer.get('path') or tokenizer.get('kind', 'sentencepiece') != 'sentencepiece':
    for unread in OF_TRAINING:  # was taken, and changed nothing
      tokenizer.pop(unread, None)
  for old, new in MOVED.items():
    part, name = old.split('.')
    if name in values.get(part, {}):
      *parts, new_name = new.split('.')
      holder = values
      for new_part in parts:
        holder = holder.setdefault(new_part, {})
      holder[new_name] = values[part].pop(name)
  return values


# What decides the parameters' shapes and values, the optimizer's state, or which example is when.
# All else may change when a run goes on: how long it is, its schedule, what is logged, the mesh.
IDENTITY = (
  'model',
  'data',
  'objective.kind',
  'objective.stored_reference',
  *(f'adapter.{x.name}' for x in dataclasses.fields(AdapterConfig) if x.name != 'dropout'),
  'optimizer.name',
  'optimizer.prune',
  'train.seed',
  'train.trained',
  'train.frozen',
)
# What lies at data.tokenizer.path is part of the data's key.
INDIFFERENT = ('data.cache_dir', 'data.tokenizer.path', *(f'model.execution.{x}' for x in FREE))


def differences(old: Config, new: Config) -> list[str]:
  """Lines 'path: old -> new' of what changes the model or the data order; empty when `new` may
  resume `old`.
  """
  return [line for path, line in changes(old, new).items() if _under(path, IDENTITY)]


def changes(old: Config, new: Config) -> dict[str, str]:
  """The same lines by path, of all that changes what a step does."""
  before, after = flat(to_dict(old)), flat(to_dict(new))
  return {
    path: f'{path}: {before.get(path)!r} -> {after.get(path)!r}'
    for path in sorted({*before, *after})
    if before.get(path) != after.get(path) and not _under(path, INDIFFERENT)
  }


def _under(path: str, names_: tuple[str, ...]) -> bool:
  return any(path == name or path.startswith(name + '.') for name in names_)


def flat(value, path: str = '') -> dict:
  """What `to_dict` gave, by path: 'data.sources.0.path' and the like."""
  if isinstance(value, dict):
    return {
      k: v
      for name, item in value.items()
      for k, v in flat(item, f'{path}.{name}' if path else name).items()
    }
  if isinstance(value, (list, tuple)) and any(isinstance(v, dict) for v in value):
    return {k: v for i, item in enumerate(value) for k, v in flat(item, f'{path}.{i}').items()}
  return {path: value}
