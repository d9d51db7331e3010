"""What do drafts gain on real text? A trained model goes on from documents
that it was not trained on, with drafts and without.

    make demo && python -m benchmarks.speculation --workdir=runs/demo [--json FILE]

Greedy, one row at a time; of each document the first tokens are the prompt. Every way runs on every
document twice, the ways in turn, and the better time counts. The text is the same by law, and
compared. Ways may stop drafting by themselves, where they lose (decode.drafting).
"""

import itertools

import commands

WAYS = {
  'plain': {},
  'lookup 2': dict(lookup=2),
  'lookup 3': dict(lookup=3),
  'lookup 3, 8 drafted': dict(lookup=3, draft_tokens=8),
  'early exit 1': dict(early_exit=1),
  'early exit 2': dict(early_exit=2),
}


def prompts(workdir: str, count: int, tokens: int) -> list[list[int]]:
  """The first ids of as many held-out documents of a run as are long enough."""
  from data.prepare import prepare
  from training import config

  prepared = prepare(config.load(workdir).data, log=lambda line: None)
  encode = prepared.tokenizer.encode
  rows = (
    [prepared.tokenizer.bos, *encode(document[: 16 * tokens])][:tokens]
    for document in prepared.validation_documents()
  )
  found = list(itertools.islice((row for row in rows if len(row) == tokens), count))
  if not found:
    raise SystemExit(
      f'error: {workdir} holds no document of {tokens} tokens out; give fewer with --prompt_tokens'
    )
  return found


def main():
  arguments = commands.parser(__doc__)
  arguments.add_argument('--workdir', required=True, help='of a run of train.py')
  arguments.add_argument('--documents', type=int, default=8)
  arguments.add_argument('--prompt_tokens', type=int, default=128)
  arguments.add_argument('--max_new_tokens', type=int, default=128)
  options = arguments.parse_args()

  from decode.generator import Generator

  g = Generator.load(options.workdir)
  rows = prompts(options.workdir, options.documents, options.prompt_tokens)
  layers = g.model.config.L
  ways = {name: way for name, way in WAYS.items() if way.get('early_exit', 0) < layers}
  best, texts = {}, {}
  for turn in range(3):  # the first compiles
    for (index, row), (name, way) in itertools.product(enumerate(rows), ways.items()):
      (completion,) = g(
        row,
        max_new_tokens=options.max_new_tokens,
        temperature=0.0,
        logit_bias={g.tokenizer.eos: -float('inf')},
        **way,
      )
      assert texts.setdefault(index, completion.ids) == completion.ids, (
        f'{name}: another text than plain'
      )
      if turn and ((name, index) not in best or g.report.seconds < best[name, index].seconds):
        best[name, index] = g.report

  results, tokens = {}, options.max_new_tokens * len(rows)
  for name in ways:
    reports = [best[name, index] for index in range(len(rows))]
    drafted, accepted = (
      sum(getattr(report, of) for report in reports) for of in ('drafted', 'accepted')
    )
    results[name] = {
      'tokens_per_second': tokens / sum(report.seconds for report in reports),
      'drafted': drafted,
      'accepted': accepted,
      'fell_back': sum(report.fell_back for report in reports),
    }

  plain = results['plain']['tokens_per_second']
  commands.table(
    f'{options.workdir}: {len(rows)} held-out documents, {options.prompt_tokens} + '
    f'{options.max_new_tokens} tokens each, greedy',
    ['', 'tokens/s', 'x plain', 'drafts kept', 'of', 'stopped drafting'],
    [
      [
        name,
        way['tokens_per_second'],
        way['tokens_per_second'] / plain,
        f'{way["accepted"] / way["drafted"]:.0%}' if way['drafted'] else '-',
        way['drafted'],
        f'{way["fell_back"]} of {len(rows)}',
      ]
      for name, way in results.items()
    ],
  )
  commands.write_json(options.json, 'speculation', results)


if __name__ == '__main__':
  main()
