"""Serves a model to many, by the API that OpenAI's clients speak:

  python serve.py --workdir=runs/chat --port=8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "hello"}]}'

What a request gets depends on its prompt, options and seed alone, whoever else asks: docs/serve.md.
SIGTERM, or Ctrl-C, drains it. `python serve.py serve` is how SageMaker starts its containers.
"""

from parallel import hosts

if __name__ == '__main__':
  hosts.use_huge_pages()
  hosts.leave_at_signals()

import contextlib
import os
import pathlib
import socket
import sys
import time

from absl import app, flags, logging

import commands
import files
import names
from decode import opening
from decode.defaults import model_defaults
from decode.embedder import POOLINGS
from decode.generator import Generator
from decode.prompts import named_runs
from parallel.flag import mesh_of
from parallel.mesh import make_mesh
from serving.call import Limits
from serving.running import Running
from training import config as configs

LOCAL = ('127.0.0.1', 'localhost', '::1')
PORT, SAGEMAKER_PORT = 8000, 8080
SAGEMAKER_MODEL = '/opt/ml/model'

WORKDIR, CHECKPOINT, MESH, WEIGHTS = opening.define(required=False)
HOST = flags.DEFINE_string(
  'host', LOCAL[0], 'Address to listen at; another than this machine alone demands --api_keys.'
)
PORT_FLAG = flags.DEFINE_integer(
  'port', PORT, '0: one that is free.', lower_bound=0, upper_bound=2**16 - 1
)
HOSTS = flags.DEFINE_list(
  'hosts', [], "More names that clients call this machine by (their Host header); '*': any."
)
API_KEYS = flags.DEFINE_string(
  'api_keys', None, 'A file of keys, one a line: KEY, or NAME KEY. It is read anew as it changes.'
)
NAME = flags.DEFINE_string(
  'served_model_name', None, "Of the model in requests; default: the directory's."
)
ADAPTERS = flags.DEFINE_list(
  'adapters',
  [],
  'name=DIR,..: runs that trained an adapter on this one; requests have the name for their model.',
)
ROWS = flags.DEFINE_integer(
  'rows',
  None,
  'Texts that are written at a time. Default: 16 for each part of the mesh.',
  lower_bound=1,
)
MAX_MODEL_LEN = flags.DEFINE_integer(
  'max_model_len',
  None,
  "Tokens of a prompt and its text together; of an encoder-decoder, of each. Default: the model's "
  'context; where it has no end, 4,096, of an encoder-decoder 1,024.',
  lower_bound=2,
)
CACHE_DTYPE = flags.DEFINE_string(
  'cache_dtype', '', 'Of keys and values: float32, bfloat16, int8; default: as the model computes.'
)
LOOKUP = flags.DEFINE_integer(
  'lookup',
  0,
  'Drafts what followed the last so many tokens of a text where it had them before; 0: nothing '
  'drafts. For what repeats its prompt, on an accelerator: each step judges all --draft_tokens.',
  lower_bound=0,
)
DRAFT_TOKENS = flags.DEFINE_integer(
  'draft_tokens', None, 'Drafted at a time, with --lookup. Default: 4.', lower_bound=1
)
PAGES = flags.DEFINE_integer(
  'pages',
  0,
  'Of 128 tokens each, that all texts share; 0: each row has room for --max_model_len.',
  lower_bound=0,
)
HOST_PAGES = flags.DEFINE_integer(
  'host_pages',
  0,
  'That have room in the host\'s memory besides, where texts wait that --pages do not hold.',
  lower_bound=0,
)
DEFAULTS = flags.DEFINE_enum(
  'defaults',
  'openai',
  ['openai', 'model'],
  "Of options that a request does not give: OpenAI's, or those of the model's "
  'generation_config.json, which are printed.',
)
USUAL_TOKENS = flags.DEFINE_integer(
  'default_max_tokens',
  None,
  'max_tokens of requests that do not give it. Default: 16 of a completion; of a chat all that '
  'fits, for which --pages have to have room.',
  lower_bound=1,
)
REASONING = flags.DEFINE_enum(
  'reasoning',
  'auto',
  ['auto', 'think', 'none'],
  'Whether <think>..</think> of a chat is its reasoning_content; auto: where the chat template has '
  'these marks.',
)
WAITING = flags.DEFINE_integer(
  'waiting',
  Limits.waiting,
  'Samples that wait for a row at most; beyond: status 429.',
  lower_bound=1,
)
PROMPT_LOGPROBS = flags.DEFINE_bool(
  'prompt_logprobs',
  False,
  'Whether requests may ask for log-probabilities of their prompts: one more row, and a program.',
)
POOLING = flags.DEFINE_enum(
  'pooling',
  None,
  POOLINGS,
  "How /v1/embeddings makes one vector of those of a text's tokens. Default: mean of an encoder, "
  'which has nothing but that; of a decoder, no embeddings.',
)
SAMPLES = flags.DEFINE_integer('max_n', Limits.samples, 'n of a request at most.', lower_bound=1)
MAX_GAP_MS = flags.DEFINE_float(
  'max_gap_ms', Limits.gap_ms, 'Between two tokens of a text, about, at most.', lower_bound=1
)
DRAIN_SECONDS = flags.DEFINE_float(
  'drain_seconds',
  25.0,
  'That texts have to end after SIGTERM; what there is of them then is their answer.',
  lower_bound=0,
)
ACCESS_LOG = flags.DEFINE_bool(
  'access_log', True, 'A line of JSON on stderr for each request, without prompts and texts.'
)
LOG_PROMPTS = flags.DEFINE_bool(
  'log_prompts', False, 'Whether the access log has what is asked, and what is written, too.'
)
COORDINATOR = flags.DEFINE_string(
  'coordinator',
  '',
  'HOST:PORT of process 0, where several processes serve one model over the devices of all: each '
  'is started with the same flags, and process 0 speaks HTTP.',
)
PROCESSES = flags.DEFINE_integer(
  'processes', 0, 'With --coordinator: how many processes there are.'
)
PROCESS = flags.DEFINE_integer('process', -1, 'With --coordinator: which one this is, from 0.')
MEETING = flags.DEFINE_integer(
  'meeting_timeout',
  hosts.MEETING_TIMEOUT,
  'Seconds that each process waits for all of them at the start.',
  lower_bound=1,
)
TRACES = flags.DEFINE_string(
  'traces', None, 'Collector of OpenTelemetry that gets a span of each request: http://host:4318.'
)


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def check_flags(sagemaker: bool) -> None:
  """Raises ValueError for flags that make no sense, before anything takes time."""
  if not WORKDIR.value:
    raise ValueError('--workdir is missing: give the directory of a run of train.py or convert.py')
  files.check_local('--workdir', WORKDIR.value, buckets=True)
  if LOG_PROMPTS.value and not ACCESS_LOG.value:
    raise ValueError(
      '--log_prompts with --noaccess_log, whose lines they would be in; leave out one'
    )
  if DRAFT_TOKENS.value and not LOOKUP.value:
    raise ValueError(
      f'--draft_tokens={DRAFT_TOKENS.value}, and nothing drafts; give --lookup=3, or leave it out'
    )
  if HOST.value not in LOCAL and API_KEYS.value is None and not sagemaker:
    raise ValueError(
      f'--host={HOST.value} is for others, too, and --api_keys is not given; give a file of keys, '
      'one a line, each drawn by: python -c "import secrets; print(secrets.token_urlsafe(32))"'
    )
  if '*' in HOSTS.value and API_KEYS.value is None and not sagemaker:
    say(
      'NOTE: --hosts=* without --api_keys: a page of any site whose name is made to point here can '
      'ask in the name of whoever looks at it; name the hosts that you mean'
    )


def as_sagemaker() -> None:
  """What is not given is as its containers have it; who may ask is AWS's matter there."""
  for flag, value in (
    (WORKDIR, SAGEMAKER_MODEL),
    (PORT_FLAG, SAGEMAKER_PORT),
    (HOST, '0.0.0.0'),
    (HOSTS, ['*']),
  ):
    if not flag.present:
      flags.FLAGS[flag.name].value = value


def known_hosts() -> list[str]:
  """Names that clients may call it by."""
  more = [] if HOST.value in LOCAL else [socket.gethostname(), socket.getfqdn()]
  return [*LOCAL, HOST.value, *HOSTS.value, *more]


def defaults_of(generator: Generator) -> dict:
  """Options of requests that do not give them."""
  usual = {'max_new_tokens': USUAL_TOKENS.value} if USUAL_TOKENS.value else {}
  if DEFAULTS.value == 'openai':
    return usual
  options, left = model_defaults(generator.tokenizer.generation)
  shown = ', '.join(f'{name}={value}' for name, value in options.items()) or 'none'
  say(f'defaults of the model: {shown}')
  if left:
    say(f'NOTE: of generation_config.json, not taken: {", ".join(left)}')
  return options | usual


def address(opened: socket.socket) -> str:
  """As a person opens it."""
  host = HOST.value if HOST.value not in ('0.0.0.0', '::') else socket.gethostname()
  host = f'[{host}]' if ':' in host else host
  return f'http://{host}:{opened.getsockname()[1]}/'


def run(sagemaker: bool) -> Running | None:
  """Serves, until it is told to end; what is left of it. None where process 0 serves."""
  try:
    from serving import http, listening
    from serving.guard import ApiKeys
    from serving.wire import Served
  except ImportError as error:
    raise ImportError(
      f'what serves is not installed ({error}): pip install starlette uvicorn prometheus-client '
      'outlines-core (the extra tandem[serve])'
    ) from error

  check_flags(sagemaker)
  keys = None if API_KEYS.value is None else ApiKeys(API_KEYS.value)
  adapters = named_runs(ADAPTERS.value)
  name = NAME.value or files.place(WORKDIR.value).resolve().name
  if name in adapters:
    raise ValueError(f'--adapters: one is called {name!r}, as the model is; give another name')
  traces = None if TRACES.value is None else traces_to(TRACES.value, name)
  first = PROCESS.value <= 0
  opened = listening.bound(HOST.value, PORT_FLAG.value) if first else None
  generator = loaded(adapters)
  options = options_of(generator)
  if not first:
    follow(generator, options)
    return None
  writes = generator.model.config.causal
  service = Running(
    generator,
    limits=Limits(waiting=WAITING.value, samples=SAMPLES.value, gap_ms=MAX_GAP_MS.value),
    **options,
  )
  served = Served(
    name=name, defaults=defaults_of(generator), created=int(time.time()), reasoning=REASONING.value
  )
  if ACCESS_LOG.value:
    listening.log_access()
  say(f'{name!r}: {what_it_does(service, writes)}: {address(opened)}')
  made = http.app(
    service,
    served,
    hosts=known_hosts(),
    keys=keys,
    traced=(lambda inner: inner) if traces is None else traces.before(service.clock),
    log_prompts=LOG_PROMPTS.value,
  )
  listening.listen(made, service, opened, DRAIN_SECONDS.value, say)
  if traces is not None:
    traces.close()
  return service


def loaded(adapters: dict[str, str]) -> Generator:
  """The model, on this machine's devices, or on those of all processes."""
  import jax

  hosts.cache_compilations(pathlib.Path(configs.load(WORKDIR.value).data.cache_dir) / 'xla')
  mesh = mesh_of(MESH.value)
  if hosts.count() > 1:
    mesh = make_mesh(mesh, jax.devices())
  return Generator.load(WORKDIR.value, CHECKPOINT.value, mesh, WEIGHTS.value, adapters)


def options_of(generator: Generator) -> dict:
  """What Running is asked for by flags; see there. Raises ValueError for what makes no sense."""
  sizes = {'rows': ROWS.value, 'capacity': MAX_MODEL_LEN.value, 'cache_dtype': CACHE_DTYPE.value}
  sizes |= {'lookup': LOOKUP.value, 'draft_tokens': DRAFT_TOKENS.value}
  sizes |= {'pages': PAGES.value, 'host_pages': HOST_PAGES.value}
  check_length(generator)
  writes = generator.model.config.causal
  if not writes:
    check_encoder()
  asked = {name: value for name, value in sizes.items() if value}
  asked['scores'] = PROMPT_LOGPROBS.value
  asked['pooling'] = POOLING.value or ('' if writes else 'mean')
  return asked


def follow(generator: Generator, options: dict) -> None:
  """What another process than the first does, until that one ends."""
  from serving import several

  rows = several.following(generator, **options)
  several.heed(say)
  say(f'process {PROCESS.value} of {PROCESSES.value}: does what process 0 does')
  rows.follow()


def what_it_does(service: Running, writes: bool) -> str:
  if not writes:
    return f'embeds texts of {service.room(0)} tokens at most; compiling. /v1/embeddings is below'
  return (
    f'{service.stats().rows} rows of {service.room(0)} tokens{in_pages(service)}; compiling. A '
    'page to talk to it, and the API below /v1'
  )


def in_pages(service: Running) -> str:
  """What is said of memory that rows share."""
  if not PAGES.value:
    return ''
  host = f', {HOST_PAGES.value} more on the host' if HOST_PAGES.value else ''
  return f' in {PAGES.value} pages of {service.page} tokens{host}'


def traces_to(endpoint: str, name: str):
  """See serving.tracing."""
  try:
    from serving import tracing
  except ImportError as error:
    raise ImportError(
      f'--traces: what traces is not installed ({error}): pip install opentelemetry-sdk '
      'opentelemetry-exporter-otlp-proto-http (the extra tandem[trace])'
    ) from error
  return tracing.Traces(tracing.exporter_to(endpoint), name)


FLAGS_OF_WRITING = ROWS, CACHE_DTYPE, LOOKUP, DRAFT_TOKENS, PAGES, HOST_PAGES
FLAGS_OF_WRITING += MAX_GAP_MS, SAMPLES, REASONING, DEFAULTS, USUAL_TOKENS


def check_encoder() -> None:
  """Raises ValueError for flags of what an encoder does not do."""
  for flag in FLAGS_OF_WRITING:
    if flag.present:
      raise ValueError(
        f'--{flag.name}: the model is an encoder, which writes nothing; leave it out'
      )


def check_length(generator: Generator) -> None:
  """Raises ValueError for more tokens than the model has positions for."""
  context, asked = generator.model.config.max_length, MAX_MODEL_LEN.value
  if asked and context and asked > context:
    raise ValueError(
      f'--max_model_len={asked} passes model.max_length={context}; give at most that'
    )


def main(arguments):
  sagemaker = arguments[1:] == ['serve']
  if sagemaker:
    as_sagemaker()
  else:
    names.only_flags(arguments, '--workdir=runs/chat')
  logging.set_verbosity(logging.WARNING)
  with together():
    with commands.mendable(FloatingPointError, ImportError):
      service = run(sagemaker)
    if service is not None and service.error:
      sys.exit(f'error: the server has failed: {service.error}')
  say('ended')
  if service is not None and not service.closed(0):
    os._exit(0)  # a program is being compiled still, and nobody waits for it


def together() -> contextlib.AbstractContextManager:
  """Where several processes have met; nothing where there is one."""
  if not (COORDINATOR.value or PROCESSES.value or PROCESS.value != -1):
    return contextlib.nullcontext()
  with commands.mendable():
    return hosts.connect(
      COORDINATOR.value, PROCESSES.value, PROCESS.value, meeting_timeout=MEETING.value
    )


if __name__ == '__main__':
  commands.end(lambda: app.run(main))
