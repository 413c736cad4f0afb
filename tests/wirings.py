"""A wiring made by hand, for the tests of equivariance objectives."""
from equivariant_ssl import augment, registry
from equivariant_ssl.types import Op, Wiring


def make_wiring(*augmentations: str, views: tuple[str, ...] = ('crop',), sensitive: bool = False,
                size: int = 8, batch: int = 8, name: str = 'own') -> Wiring:
  """The wiring of an objective about `augmentations` (by default the flip).

  They have the role `both`, or `sensitive`. The invariance's views have the other ops `views`.
  """
  augmentations = augmentations or ('flip',)

  def build_chain(names, side: int, changes: dict) -> Op:
    fields = lambda n: {**({'size': side} if n == 'crop' else {}), **changes.get(n, {})}
    return augment.chain(*(registry.make(augment, n, **fields(n)) for n in names))

  others = tuple(n for n in views if n not in augmentations)

  def build_own_chains(side: int, changes: dict) -> tuple[Op, ...]:
    return (build_chain(others + augmentations, side, changes),) * 2
  own = build_own_chains(size, {})
  chains = (build_chain(others, size, {}),) * 2 if sensitive else (own[0], own[0])
  return Wiring(name, chains, own, build_chain(augmentations, size, {}), sensitive, size, batch,
                build_own_chains)
