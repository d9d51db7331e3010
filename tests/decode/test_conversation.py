"""Is an answer what generating from the whole history at once gives, whatever was taken back,
stopped or said anew? And does a console lose nothing, whatever is typed?
"""

import io
import itertools
import json
import re

import jax
import pytest

from data.huggingface import HuggingFaceTokenizer
from data.tokenizers import ByteTokenizer
from decode import conversation as conversations
from decode.console import Console
from decode.conversation import Conversation, Turn
from decode.generator import Generator
from model import transformer
from model.config import ModelConfig
from parallel.mesh import MeshConfig, make_mesh
from tests.data import tokenizer_families as families
from tests.data.templates import CHATML

OPTIONS = dict(max_new_tokens=4, seed=3, temperature=0.8)
# So many tokens that calls and sessions have caches of one size: few programs compile.
SYSTEM = 'Q' * 40


@pytest.fixture(scope='module')
def generator():
  """Of a tokenizer with a chat template."""
  contents = families.contents('qwen') | {'chat_template.jinja': CHATML.encode()}
  tokenizer = HuggingFaceTokenizer(contents)
  config = ModelConfig(
    vocabulary=tokenizer.vocabulary,
    width=16,
    layers=1,
    heads=1,
    feed_forward=24,
    max_length=128,
    init_scale=1.0,
  )
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    model = jax.jit(transformer.init, static_argnums=(0, 1))(config, 0)
  return Generator(model, tokenizer, mesh)


def say(conversation, text):
  return ''.join(conversation.say(text))


def at_once(generator, messages, **options):
  return ''.join(generator.chat(messages, **OPTIONS | options))


def messages_of(*contents, system=SYSTEM):
  turns = zip(itertools.cycle(['user', 'assistant']), contents)
  return [{'role': role, 'content': content} for role, content in [('system', system), *turns]]


def talk_of(generator, **options):
  talk = Conversation(generator, **OPTIONS | options)
  if talk.chat:
    talk.set_system(SYSTEM)
  return talk


def test_answers_are_those_of_the_whole_history_at_once(generator, monkeypatch):
  read, append = [], conversations.Session.append
  monkeypatch.setattr(
    conversations.Session, 'append', lambda self, ids: read.append(ids) or append(self, ids)
  )
  talk = talk_of(generator)
  said = []
  for text in ('two <|im_end|>', 'naïve'):
    expected = at_once(generator, messages_of(*said, text))
    assert say(talk, text) == expected
    said += [text, expected]
  assert talk.messages == messages_of(*said)
  # A turn reads what is new in it; the last answer may be spelled by other ids than it was.
  assert len(read) == 2 and len(read[1]) < len(read[0]) / 2

  other = 'Q' * 39 + 'x'
  talk.undo()
  talk.set_system(other)
  assert say(talk, 'fox') == at_once(generator, messages_of(*said[:2], 'fox', system=other))


def test_a_turn_taken_back_and_said_again_has_the_same_answer(generator):
  talk = talk_of(generator)
  say(talk, 'lazy')
  answer = say(talk, 'two cats')
  assert talk.undo() == Turn('two cats', answer)
  say(talk, 'fox')
  talk.undo()
  assert say(talk, 'two cats') == answer
  talk.reset()
  assert talk.turns == []
  assert say(talk, 'two cats') == at_once(generator, messages_of('two cats'))
  talk.reset()
  with pytest.raises(ValueError, match='no turn is there'):
    talk.undo()


def test_what_is_stopped_in_the_middle_goes_on(generator):
  talk = talk_of(generator, max_new_tokens=9)
  with pytest.raises(KeyboardInterrupt):
    for piece in talk.say('the'):
      raise KeyboardInterrupt
  (turn,) = talk.turns
  assert turn == Turn('the', turn.answer) and turn.answer.startswith(piece)
  assert say(talk, 'fox') == at_once(
    generator, messages_of('the', turn.answer, 'fox'), max_new_tokens=9
  )


def test_a_session_grows_with_its_text(generator, monkeypatch):
  monkeypatch.setattr(conversations, 'ROOM', 80)
  talk = talk_of(generator)
  first, second = say(talk, 'fox'), say(talk, 'over lazy')
  assert talk._session.capacity == 128
  assert second == at_once(generator, messages_of('fox', first, 'over lazy'))


def test_without_a_template_text_goes_on(generator):
  talk = talk_of(generator, chat=False)
  first = say(talk, 'Q' * 70)
  assert first == ''.join(generator.stream('Q' * 70, **OPTIONS))
  second = say(talk, '')
  assert second == ''.join(generator.stream('Q' * 70 + first, **OPTIONS))
  assert talk.text == f'{"Q" * 70}{first}{second}'


def test_the_end_of_the_context_is_said_and_nothing_is_dropped(generator):
  never = {'logit_bias': {generator.tokenizer.eos: -99.0}}
  talk = talk_of(generator, chat=False, **never)
  say(talk, 'Q' * 80)
  assert talk.note == 'max_new_tokens=4 ended it; start with more of them'
  before, room = list(talk.turns), talk.room
  assert 2 < room < 60
  with pytest.raises(ValueError, match=rf'max_length=128 .*: {room} remain; .*/undo or /reset'):
    talk.say('Q' * room)
  assert talk.turns == before
  say(talk, 'Q' * (room - 2))
  assert 'the context ended it' in talk.note and '/undo or /reset' in talk.note


def test_what_a_conversation_cannot_have_is_refused_as_it_begins(generator):
  without = Generator(generator.model, ByteTokenizer(), generator.mesh)
  with pytest.raises(ValueError, match='has no chat template'):
    Conversation(without)
  with pytest.raises(ValueError, match='num_samples=2'):
    Conversation(generator, num_samples=2)
  with pytest.raises(ValueError, match='top_p'):
    Conversation(generator, top_p=3.0)
  with pytest.raises(NotImplementedError, match='lookup'):
    Conversation(generator, lookup=2)


def typed(conversation, *lines, out=None):
  """What a console shows for these lines, of which an exception is raised where it is awaited."""
  left = iter([*lines, EOFError()])
  out = out or io.StringIO()

  def read(prompt):
    line = next(left)
    if isinstance(line, BaseException):
      raise line
    out.write(f'{prompt}{line}\n')
    return line

  Console(conversation, read, out).run()
  assert next(left, None) is None, 'it ended before the lines did'
  return out.getvalue()


def test_a_console_shows_answers_and_what_commands_did(generator, tmp_path):
  talk = Conversation(generator, **OPTIONS)
  file = tmp_path / 'talk.jsonl'
  shown = typed(
    talk,
    f'/system {SYSTEM}',
    'two \\',
    'cats',
    '',
    '/undo',
    'fox',
    f'/save {file}',
    '/help',
    '/reset',
  )
  answer = at_once(generator, messages_of('fox'))
  assert f'> fox\n{answer}\n' in shown and "(taken back: 'two \\ncats'; left: 0 turns)" in shown
  assert json.loads(file.read_text()) == {'messages': messages_of('fox', answer)}
  for name in ('help', 'reset', 'undo', 'save FILE', 'system TEXT'):
    assert f'/{name}: ' in shown
  assert '1 turn so far' in shown and 'of model.max_length=128' in shown
  assert talk.turns == [] and 'without 1 turn; what the system says stays' in shown


@pytest.mark.parametrize(
  'line, said',
  [
    ('/undoo', "'/undoo' is unknown; did you mean '/undo'.*Begin the line with a space"),
    ('/undo that', "/undo takes nothing behind it, and 'that' is there"),
    ('/save', '/save needs a file'),
    ('/save {}', '/save .*: a file is there.*give another name'),
    ('/save {}/x', 'File exists; a file is where a directory should be'),
    ('/save /', 'Is a directory'),
    ('/save gs://x/y', 'is an address'),
    ('fox ' * 300, r'of model.max_length=128 at most, answer included: \d+ remain'),
    ('\ud800', 'half of a surrogate pair|surrogates not allowed'),
  ],
)
def test_what_is_typed_amiss_gets_one_line_and_loses_nothing(generator, tmp_path, line, said):
  talk = Conversation(generator, **OPTIONS)
  talk.turns = [Turn('fox', 'dogs')]
  talk.system = 'cats'
  file = tmp_path / 'file'
  file.write_text('kept')

  out = io.StringIO()
  shown = typed(talk, line.format(file), out=out).split('> ', 1)[1].split('\n')[1:]
  assert len(shown) == 3 and shown[0].startswith('error: ') and re.search(said, shown[0]), shown
  assert talk.turns == [Turn('fox', 'dogs')] and talk.system == 'cats'
  assert file.read_text() == 'kept' and [*tmp_path.iterdir()] == [file]


def test_what_is_no_command_is_said_to_the_model(generator):
  talk = talk_of(generator, chat=False, max_new_tokens=1)
  talk.turns = [Turn(SYSTEM * 2, '')]
  typed(talk, '// note', ' /undo', '/usr/bin')
  assert [turn.said for turn in talk.turns[1:]] == ['// note', ' /undo', '/usr/bin']


class Interrupting(io.StringIO):
  """Ctrl-C comes as the first piece of the first answer is shown."""

  awaited = False

  def write(self, text):
    count = super().write(text)
    if self.awaited:
      self.awaited = False
      raise KeyboardInterrupt
    self.awaited = text == f'> {SYSTEM * 2}\n'
    return count


def test_ctrl_c_stops_an_answer_and_not_the_chat(generator):
  talk = talk_of(generator, chat=False, max_new_tokens=9)
  shown = typed(talk, SYSTEM * 2, 'd', out=Interrupting())
  assert '(stopped; what is written stays' in shown and len(talk.turns) == 2
  first, second = talk.turns
  text = f'{SYSTEM * 2}{first.answer}d'
  assert second.answer == ''.join(generator.stream(text, **OPTIONS | {'max_new_tokens': 9}))


def test_ctrl_c_where_a_line_is_awaited_ends_it_at_the_second_time(generator):
  talk = talk_of(generator, chat=False, max_new_tokens=1)
  shown = typed(talk, KeyboardInterrupt(), '/undo', KeyboardInterrupt(), 'a')
  assert shown.count('Ctrl-C again') == 2 and len(talk.turns) == 1
  with pytest.raises(AssertionError, match='ended before'):
    typed(talk, KeyboardInterrupt(), KeyboardInterrupt(), 'not read any more')
