"""What the tests of equivariance objectives share: a wiring by hand."""
from equivariant_ssl import augment, registry
from equivariant_ssl.types import Wiring


def wiring(*told: str, seen: tuple[str, ...] = ('crop',), sensitive: bool = False, size: int = 8, batch: int = 8,
           name: str = 'own') -> Wiring:
  """An objective told of the ops `told` (default: flip); seen by the invariance's views too unless `sensitive`."""
  told = told or ('flip',)

  def ops(names, side: int, changes: dict):
    kw = lambda n: {**({'size': side} if n == 'crop' else {}), **changes.get(n, {})}
    return augment.chain(*(registry.make(augment, n, **kw(n)) for n in names))

  order = tuple(n for n in seen if n not in told) + told
  own = lambda side, changes: (ops(order, side, changes),) * 2
  seen_chain = ops([n for n in seen if n not in told], size, {}) if sensitive else own(size, {})[0]
  return Wiring(name, (seen_chain, seen_chain), own(size, {}), ops(told, size, {}), sensitive, size, batch, own)
