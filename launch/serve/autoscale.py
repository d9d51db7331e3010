"""How many replicas are there to be? The formula of Kubernetes' HorizontalPodAutoscaler, with its
tolerance, its bounds, its policies and its windows.

    desired = ceil(replicas * mean / target), of all metrics the greatest
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

TOLERANCE = 0.1  # of mean / target around 1, within which nothing changes
SYNC = 15.0  # seconds between two looks


@dataclasses.dataclass(frozen=True)
class Direction:
  """What holds one way, up or down.

  Attributes:
    window: seconds; of what was desired within them the least (up) or the greatest (down) counts.
    policies: (Percent or Pods, value, seconds) that one may change by; of several the greatest, or
      the least.
    least: whether it is the least. sign: 1 up, -1 down.
  """

  window: float
  policies: Sequence[tuple[str, float, float]]
  least: bool
  sign: int

  @classmethod
  def read(cls, said: Mapping, unsaid: 'Direction') -> 'Direction':
    """What a document says, and what Kubernetes takes where it says nothing.

    Raises ValueError for a direction that is disabled.
    """
    if (chosen := said.get('selectPolicy', 'Max')) == 'Disabled':
      raise ValueError('selectPolicy: Disabled never changes the replicas: nothing to rehearse')
    policies = [
      (each['type'], each['value'], each['periodSeconds']) for each in said.get('policies', ())
    ]
    window = said.get('stabilizationWindowSeconds', unsaid.window)
    return cls(window, policies or unsaid.policies, chosen == 'Min', unsaid.sign)

  def change(self, replicas: int, changes: Sequence[tuple[float, int]], now: float) -> float:
    """By how many replicas it may change, after changes at times."""
    allowed = []
    for kind, value, seconds in self.policies:
      done = sum(by for at, by in changes if now - at < seconds)
      # A share of how many there were when the period began.
      most = value if kind == 'Pods' else math.ceil((replicas - self.sign * done) * value / 100)
      allowed.append(most - done)
    return max(0, (min if self.least else max)(allowed))


# What Kubernetes does where a document does not say (autoscaling/v2, HorizontalPodAutoscaler).
UP = Direction(0.0, [('Pods', 4, 15.0), ('Percent', 100, 15.0)], False, 1)
DOWN = Direction(300.0, [('Percent', 100, 15.0)], False, -1)


class Autoscaler:
  """Of one Deployment.

  Attributes: targets: mean of each metric that is aimed at. least, most: replicas.
  """

  def __init__(self, document: Mapping):
    """document: an autoscaling/v2 HorizontalPodAutoscaler of Pods' metrics."""
    spec = document['spec']
    self.least, self.most = spec.get('minReplicas', 1), spec['maxReplicas']
    self.targets = {
      each['pods']['metric']['name']: float(each['pods']['target']['averageValue'])
      for each in spec['metrics']
    }
    behavior = spec.get('behavior', {})
    self._up = Direction.read(behavior.get('scaleUp', {}), UP)
    self._down = Direction.read(behavior.get('scaleDown', {}), DOWN)
    self._wanted: list[tuple[float, int]] = []
    self._changes: list[tuple[float, int]] = []

  def formula(self, replicas: int, means: Mapping[str, float]) -> int:
    """What the formula says, within the bounds."""
    wanted = 0
    for name, target in self.targets.items():
      ratio = means[name] / target
      near = abs(ratio - 1) <= TOLERANCE
      wanted = max(wanted, replicas if near else math.ceil(replicas * ratio))
    return min(self.most, max(self.least, wanted))

  def desired(self, replicas: int, means: Mapping[str, float], now: float) -> int:
    """How many there are to be, now. means: of each metric, over the pods that are ready."""
    self._wanted.append((now, self.formula(replicas, means)))
    longest = max(self._up.window, self._down.window)
    self._wanted = [each for each in self._wanted if now - each[0] <= longest]

    def within(window):
      return [wanted for at, wanted in self._wanted if now - at <= window]

    least, greatest = min(within(self._up.window)), max(within(self._down.window))
    desired = min(max(replicas, least), greatest)
    ups = [(at, by) for at, by in self._changes if by > 0]
    downs = [(at, -by) for at, by in self._changes if by < 0]
    desired = min(desired, replicas + self._up.change(replicas, ups, now))
    desired = int(max(desired, replicas - self._down.change(replicas, downs, now)))
    if desired != replicas:
      self._changes.append((now, desired - replicas))
    return desired
