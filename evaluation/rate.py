"""Which of two runs do people prefer, or how good do they find one? Serves a page to rate answers
on, and says what was made of them.

    python evaluate.py rate runs/a/evaluation runs/b/evaluation    blind pairs, left or right
    python evaluate.py rate A B --mode=scales                      1 to 5, one answer at a time
    python evaluate.py rate A B --report --export=ratings.csv      what came of it

A and B are directories of results of tasks that generate, or files of JSON lines, each with a
`prompt` and an `answer`.
"""

import argparse
import itertools
import math
import pathlib
import secrets
import socket
import sys
from collections.abc import Sequence

import numpy as np

import commands
import files
import names
from evaluation import ratings
from evaluation.agreement import cohen_estimate, krippendorff_estimate
from evaluation.intervals import RESAMPLES, Estimate, summed, wilson
from evaluation.paired import difference
from evaluation.ratings import CRITERIA, MODES, PAIRS, SCALES, Study
from evaluation.strengths import FIRST, SECOND, TIE, strengths

FILE = 'ratings.sqlite'
LOCAL = ('127.0.0.1', 'localhost', '::1')
CONNECTIONS = 64
PORT = 8765
TOKEN = 8  # characters of a token, at least
SHOWN = 10  # pairs of raters, those of five, of each criterion


def main(arguments: Sequence[str] | None = None) -> None:
  """The command line; what its user can mend ends it with a message, not a traceback."""
  options = parser().parse_args(arguments)
  with commands.mendable(ImportError):
    if options.json and not options.report:
      raise ValueError(f'--json={options.json} is what the report says; add --report')
    if options.report or options.export:
      _report(options)
    else:
      serve(_study(options), options)


def parser() -> argparse.ArgumentParser:
  """What the command takes."""
  made = argparse.ArgumentParser(
    prog='python evaluate.py rate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = made.add_argument
  add('places', nargs='*', metavar='A B', help='results, or files of JSON lines')
  add('--mode', default='', help=f'{PAIRS} (default of two places) or {SCALES}')
  add('--criteria', default=','.join(CRITERIA), help='of scales, by commas')
  add('--ratings', default='', metavar='FILE', help=f'where they are kept; default: A/{FILE}')
  add('--limit', type=int, default=0, help='only so many questions; 0: all')
  add('--seed', type=int, default=0, help='of the order and of the sides')
  add('--host', default=LOCAL[0], help='address to serve at; elsewhere than here with a token')
  add('--port', type=int, default=PORT, help='0: one that is free')
  add('--hosts', default='', help='more names that browsers may call this machine by, by commas')
  add('--token', default='', help='that callers from elsewhere need; default: one is drawn')
  add('--report', action='store_true', help='say what was rated, and serve nothing')
  add('--export', default='', metavar='FILE.csv', help='write all ratings, and serve nothing')
  add('--json', default='', metavar='FILE', help='write what the report says')
  return made


def _study(options) -> Study:
  """Made of the places, or gone on with."""
  places = options.places
  if not 1 <= len(places) <= 2:
    raise ValueError(f'{len(places)} places; give one or two directories of results, or files')
  mode = options.mode or (PAIRS if len(places) == 2 else SCALES)
  names.check('--mode', mode, MODES)
  if options.limit < 0 or not 0 <= options.port < 2**16:
    raise ValueError(f'--limit={options.limit} --port={options.port}: no such number')
  criteria = [name.strip() for name in options.criteria.split(',')]
  if not all(criteria) or len({*criteria}) < len(criteria):
    raise ValueError(f'--criteria={options.criteria} must be different names, by commas')
  for place in places:
    files.check_local('A B', place)
  systems = [str(pathlib.Path(place)) for place in places]
  if len({*systems}) < len(systems):
    raise ValueError(f'{systems[0]} twice; give two different places')
  items, left_out = ratings.items_of([ratings.read_answers(place) for place in places])
  for reason, count in left_out.items():
    if count:
      print(f'NOTE: {count} questions {reason} are not shown')
  items = items[: options.limit or None]
  return Study(_file(options), systems, items, mode, criteria, options.seed)


def _file(options) -> pathlib.Path:
  if options.ratings:
    return pathlib.Path(options.ratings)
  if not options.places:
    raise ValueError('give A and B, or --ratings=FILE')
  first = pathlib.Path(options.places[0])
  return (first if first.is_dir() else first.parent) / FILE


def serve(study: Study, options) -> None:
  """Until it is interrupted."""
  try:
    import uvicorn

    from evaluation import rating_page
  except ImportError as error:
    raise ImportError(
      f'the page is served by starlette and uvicorn ({error}): pip install starlette uvicorn (the '
      'extra tandem[evaluate])'
    ) from error

  here = options.host in LOCAL
  token = options.token or ('' if here else secrets.token_urlsafe(16))
  if token and len(token) < TOKEN:
    raise ValueError(f'--token has {len(token)} characters; give {TOKEN} at least')
  opened = _bound(options.host, options.port)
  port = opened.getsockname()[1]
  hosts = [*LOCAL, options.host, *filter(None, options.hosts.split(','))]
  if not here:
    hosts += [socket.gethostname(), socket.getfqdn()]

  shown = options.host if here or options.host not in ('0.0.0.0', '::') else socket.gethostname()
  shown = f'[{shown}]' if ':' in shown else shown
  address = f'http://{shown}:{port}/' + (f'#token={token}' if token else '')
  done = {each.rater for each in study.ratings()}
  print(f'{len(study.items)} questions, {study.mode}; ratings are kept in {study.path}')
  if done:
    print(f'{len(done)} have rated before: {", ".join(sorted(done))}')
  print(f'Open {address}   (Ctrl-C ends)', flush=True)
  config = uvicorn.Config(
    rating_page.app(study, hosts, token),
    log_level='warning',
    access_log=False,
    server_header=False,
    limit_concurrency=CONNECTIONS,
    timeout_keep_alive=30,
    timeout_graceful_shutdown=2,
    lifespan='off',
  )
  try:
    uvicorn.Server(config).run(sockets=[opened])
  except KeyboardInterrupt:
    pass  # how it is ended, as was said; ratings were saved when they were given
  finally:
    study.close()
  print('\nended; every rating is saved. What came of them: the same command with --report')


def _bound(host: str, port: int) -> socket.socket:
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  opened = socket.socket(family, socket.SOCK_STREAM)
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    opened.bind((host, port))
    opened.listen()  # who comes before the server is up waits
  except OSError as error:
    raise ValueError(
      f'--host={host} --port={port}: {error.strerror}; give another --port (0: one that is free)'
    ) from error
  return opened


def _report(options) -> None:
  study = Study.open(_file(options))
  rated = {pathlib.Path(system).resolve() for system in study.systems}
  others = [place for place in options.places if pathlib.Path(place).resolve() not in rated]
  if others:
    raise ValueError(
      f'{study.path} has ratings of {" and ".join(study.systems)}, and none of {others[0]}; give '
      'what was rated, or the file of others by --ratings'
    )
  if options.export:
    files.replace(options.export, ''.join(study.exported()))
    print(f'wrote {options.export}, {len(study.ratings())} ratings')
  if options.report:
    said = report(study, options.seed)
    commands.write_json(options.json, 'ratings', said)
  study.close()


def report(study: Study, seed: int = 0, resamples: int = RESAMPLES) -> dict:
  """Prints what was rated, how far raters agree, and what came of it; the same, JSON-able."""
  given = study.ratings()
  if not given:
    raise ValueError(f'{study.path} has no ratings yet; rate some answers first')
  raters = sorted({each.rater for each in given})
  units = len(study.order(''))
  rows = [[rater, len(study.done(rater)), units] for rater in raters]
  commands.table(f'{study.path}: {study.mode}', ['rater', 'rated', 'of'], rows)
  draws = seed, resamples
  said = _pairs(study, draws) if study.mode == PAIRS else _scales(study, draws)
  said |= {'raters': raters, 'agreement': _agreement(study, raters, draws)}
  print(f'Of {len(study.items)} questions and their answers, digest {study.digest}, seed {seed}')
  of = {'n': len(study.items), 'digest': study.digest, 'seed': seed}
  return of | {'systems': [*study.systems]} | said


def _pairs(study: Study, draws: tuple[int, int]) -> dict:
  first, second = study.systems
  given = study.ratings()
  # Of each question how often was said of it: the first, the second, a tie.
  counts = np.zeros((len(study.items), 3))
  for each in given:
    counts[each.item, each.value] += 1
  counts = counts[counts.sum(1) > 0]
  shares = {
    first: summed(counts, lambda t: _share(t[FIRST] + t[TIE] / 2, t.sum()), *draws),
    second: summed(counts, lambda t: _share(t[SECOND] + t[TIE] / 2, t.sum()), *draws),
  }
  scores = strengths(study.comparisons(), *draws)
  total = counts.sum(0).astype(int)
  rows = [
    [name, wins, int(total[TIE]), str(shares[name]), str(scores[name])]
    for name, wins in ((first, int(total[FIRST])), (second, int(total[SECOND])))
  ]
  headers = ['', 'better', 'equal', 'preferred (a tie is half)', 'Bradley-Terry']
  commands.table(f'{len(counts)} questions, with 95% intervals over them', headers, rows)
  if shares[first].low > 0.5 or shares[second].low > 0.5:
    print(f'\n{first if shares[first].low > 0.5 else second} is preferred')
  else:
    print('\nNo preference is shown: the intervals hold 1/2')
  chosen = [each for each in given if each.value != TIE]
  said = {'preferred': _values(shares), 'bradley_terry': _values(scores), 'counts': total.tolist()}
  if chosen:
    left = wilson(sum(each.value == each.left for each in chosen), len(chosen))
    print(f'The left one was chosen, whichever it was: {left}')
    said['left'] = left.values()
  return said


def _scales(study: Study, draws: tuple[int, int]) -> dict:
  said: dict = {'means': {}, 'differences': {}}
  n, many = len(study.items), len(study.systems)
  rows = []
  for criterion in study.criteria:
    # Sums of points and how many, of each question and system.
    sums = np.zeros((n, many, 2))
    for each in study.ratings():
      if each.criterion == criterion:
        sums[each.item, each.system] += each.value, 1
    means = {}
    for i, name in enumerate(study.systems):
      rated = sums[sums[:, i, 1] > 0, i]
      if len(rated):
        means[name] = summed(rated, lambda t: _share(t[0], t[1]), *draws)
    said['means'][criterion] = _values(means)
    row = [criterion, *(str(means.get(name, 'none')) for name in study.systems)]
    if many == 2:
      both = sums[(sums[:, :, 1] > 0).all(1)]
      gap = None
      if len(both):
        gap = difference(both[:, 0], both[:, 1], lambda t: _share(t[0], t[1]), *draws)
        said['differences'][criterion] = gap.values()
      row.append(str(gap or 'none'))
    rows.append(row)
  headers = ['1 to 5', *study.systems, *(['second less first'] if many == 2 else [])]
  commands.table('Means, with 95% intervals over questions', headers, rows)
  return said


def _agreement(study: Study, raters: Sequence[str], draws: tuple[int, int]) -> dict:
  """How far raters agree, printed."""
  said: dict = {'alpha': {}, 'kappa': {}}
  if len(raters) < 2:
    print('\nOne rater: agreement needs two')
    return said
  place = {unit: i for i, unit in enumerate(study.order(''))}
  scale, weights = ('nominal', 'none') if study.mode == PAIRS else ('ordinal', 'quadratic')
  rows, beside, pairs = [], [], [*itertools.combinations(range(len(raters)), 2)]
  for criterion in study.criteria:
    values = np.full((len(place), len(raters)), math.nan)
    for each in study.ratings():
      if each.criterion == criterion:
        unit = ratings.Unit(each.item, each.system)
        values[place[unit], raters.index(each.rater)] = each.value
    alpha = krippendorff_estimate(values, scale, *draws)
    said['alpha'][criterion] = alpha and alpha.values()
    kappas = {
      f'{raters[i]}, {raters[j]}': cohen_estimate(values[:, i], values[:, j], weights, *draws)
      for i, j in pairs
    }
    said['kappa'][criterion] = {k: v and v.values() for k, v in kappas.items()}
    shown = [*kappas.items()][:SHOWN]
    beside += [[criterion, k, v.n if v else '', str(v or 'undefined')] for k, v in shown]
    both = int((~np.isnan(values)).sum(1).__gt__(1).sum())
    rows.append([criterion, both, str(alpha or 'undefined')])
  headers = ['', 'rated by two', f"Krippendorff's alpha, {scale}"]
  commands.table('Agreement: 1 always, 0 as by chance', headers, rows)
  kappa = "Cohen's kappa" + (', quadratic' if weights != 'none' else '')
  commands.table('Of every two raters', ['', 'raters', 'rated by both', kappa], beside)
  if len(pairs) > SHOWN:
    print(f'NOTE: {len(pairs) - SHOWN} of {len(pairs)} pairs of raters are not shown; --json=FILE')
  return said


def _share(part: float, whole: float) -> float:
  return float(part / whole) if whole else math.nan


def _values(estimates: dict[str, Estimate]) -> dict:
  return {name: estimate.values() for name, estimate in estimates.items()}


if __name__ == '__main__':
  commands.end(lambda: main(sys.argv[1:]))
