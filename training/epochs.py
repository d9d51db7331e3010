"""How many steps are so many epochs, and are they as many of each source?"""

NEAR = 0.1  # of the epochs asked for, what the passes of a source may differ from them


def described(epochs: float, config, prepared) -> str:
  """A line for the log. config: of the run, with its steps; prepared: what the loader reads.

  Raises ValueError where sources are mixed so that epochs are those of none of them.
  """
  steps, rows = config.train.steps, prepared.rows
  line = f'train.epochs={epochs:g} of {rows:,} rows: {steps:,} steps'
  # Prompts have no weights: all of them come once before one comes again.
  sources = [source for source in prepared.train if hasattr(source, 'weight')]
  if len(sources) < 2:
    return line
  total = sum(source.weight for source in sources)
  passes = [epochs * rows * source.weight / total / len(source) for source in sources]
  said = ', '.join(
    f'{count:.3g} of {source.name} ({len(source):,} rows, weight {source.weight:g})'
    for count, source in zip(passes, sources, strict=True)
  )
  if any(abs(count / epochs - 1) > NEAR for count in passes):
    least = min(map(len, sources))
    fitting = ', '.join(f'{len(source) / least:.3g}' for source in sources)
    raise ValueError(
      f'{line}, which by the weights are passes: {said}; so no epoch of any of them. Say how long '
      f'to train by train.steps={steps} (and train.epochs=0), or give data.sources weights in '
      f'proportion to their rows: {fitting}'
    )
  return f'{line}; passes: {said}'
