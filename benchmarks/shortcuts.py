import functools
import jax, jax.numpy as jnp, numpy as np
from equivariant_ssl import augment, modules
from equivariant_ssl.keys import key_for
from equivariant_ssl.types import Image

SIDE = 32

@functools.cache
def noise(kind, many, seed):
  rng = np.random.default_rng(seed)
  field = rng.standard_normal((many, SIDE*(1+(kind=='1/f')), SIDE*(1+(kind=='1/f')), 3), np.float32)
  if kind == '1/f':
    f = np.hypot.outer(np.fft.fftfreq(2*SIDE), np.fft.rfftfreq(2*SIDE)); f = np.hypot(np.fft.fftfreq(2*SIDE)[:,None], np.fft.rfftfreq(2*SIDE)[None])
    f[0,0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(field, axes=(1,2)) / f[None,:,:,None].astype(np.float32), axes=(1,2))
  field = field[:, :SIDE, :SIDE]
  field = field/field.std()
  return np.clip(np.round(127.5 + 40*field), 0, 255).astype(np.uint8)

def network(channels=24):
  rng = np.random.default_rng(1)
  k1 = rng.standard_normal((3,3,3,channels)).astype(np.float32)/np.sqrt(27)
  k2 = rng.standard_normal((3,3,channels,2*channels)).astype(np.float32)/np.sqrt(9*channels)
  def conv(x,k,s): return jax.lax.conv_general_dilated(x,k,(s,s),'VALID',dimension_numbers=('NHWC','HWIO','NHWC'))
  def features(x):
    x = (x-.5)/.16
    a = jax.nn.relu(conv(x,k1,1)); b = jax.nn.relu(conv(a,k2,2))
    out=[]
    for y in (a,b):
      out += [y.mean((1,2)), y.std((1,2))]
    B,h,w,C = b.shape
    g = b[:, :h//3*3, :w//3*3].reshape(B,3,h//3,3,w//3,C).mean((2,4)).reshape(B,-1)
    return jnp.concatenate(out+[g],1)
  return features

def probe(X, y, train):
  K = y.max()+1
  mean, std = X[:train].mean(0), X[:train].std(0)+1e-6
  X = np.concatenate([(X-mean)/std, np.ones((len(X),1),np.float32)],1).astype(np.float64)
  A = X[:train].T@X[:train] + .03*train*np.eye(X.shape[1])
  out = {}
  W = np.linalg.solve(A, X[:train].T@(np.eye(K)[y[:train]]-1/K))
  pred=(X[train:]@W).argmax(1)
  t=y[train:]
  return (pred==t).mean(), np.bincount(t).max()/len(t)

def views(op, pixels, chunk=1000):
  feats = network()
  @jax.jit
  def run(start, px):
    def one(i, p):
      v, a = augment.augment(op, key_for(jax.random.key(3), i), Image(p.astype(jnp.float32)/255., jnp.full(2, float(SIDE))))
      return v.pixels, a
    v, a = jax.vmap(one)(start+jnp.arange(len(px)), px)
    return feats(v), a
  fs, acts = [], []
  for s in range(0, len(pixels), chunk):
    f,a = run(jnp.int32(s), pixels[s:s+chunk]); fs.append(np.asarray(f)); acts.append(jax.tree.map(np.asarray,a))
  return np.concatenate(fs), jax.tree.map(lambda *x: np.concatenate(x), *acts)
def bins(x, k=3, lo=None, hi=None):
  return np.searchsorted(np.quantile(x, np.arange(1,k)/k), x)
