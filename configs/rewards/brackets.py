"""Is an answer, behind its prompt, balanced brackets? For prompts such as `([`: 1 where every
bracket is closed by its own kind, and nothing else is written; else 0.
"""

CLOSED_BY = {'(': ')', '[': ']', '{': '}'}


def reward(text: str, record: dict) -> float:
  """1 or 0; record: the prompt's, of which `prompt` is read."""
  waiting = []
  for character in record['prompt'] + text:
    if character in CLOSED_BY:
      waiting.append(CLOSED_BY[character])
    elif not waiting or waiting.pop() != character:
      return 0.0
  return float(not waiting)
