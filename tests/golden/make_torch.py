"""The loss and the gradients of a whole step of official torch code, on arrays.py's images, actions and weights.

  python tests/golden/make_torch.py NAME REPOSITORY     (torch, torchvision; see README.md)

REPOSITORY: a checkout of what README.md names; it is imported, and nothing of it is here.
"""
import pathlib
import sys
from argparse import Namespace

import arrays
import numpy as np
import side
import torch
import torchvision
from side import encoder, fill, headless, image, mlp, stub
from torch import nn

HERE = pathlib.Path(__file__).parent
CPU = torch.device('cpu')


class Optimizer:
  def zero_grad(self):
    pass

  step = zero_grad


def parameters(views: int, more: bool) -> list[torch.Tensor]:
  """EquiMod's vector of each view, [B 15], or with blur and solarization [B 18]."""
  a = arrays.actions(views)
  columns = [a['box'], a['flip'][..., None], a['jittered'][..., None], a['order'], a['factors'], a['hue'][..., None],
             a['gray'][..., None]]
  columns += [a[k][..., None] for k in ('blurred', 'sigma', 'solarized')] if more else []
  return list(torch.from_numpy(np.concatenate(columns, axis=-1).astype(np.float64)).unbind(1))


def equimod(byol: bool):
  stub('torch.utils.tensorboard', 'idr_torch')
  torchvision.models.resnet18 = side.Small
  import main
  with side.widths({4096: 12, 2048: 12, 256: 12, 128: 6, 64: side.WIDTH}):
    kw = {} if byol else {'proj_head_eq_layers': '2048-2048-', 'proj_head_t_layers': '128', 'predictor_eq_layers': 'one'}
    model = main.EquiMod('resnet18', 256 if byol else 128, 128, 18 if byol else 15, cifar10=True, **kw)
  named = encoder(model.resnet) | mlp(model.proj_head_inv, 'projector')
  heads = {'project': model.proj_head_eq, 'encode_action': model.proj_head_t, 'predict': model.predictor_eq}
  for part, layers in heads.items():
    named |= mlp(layers, f'heads_equimod/{part}')
  if byol:
    named |= mlp(model.predictor_inv, 'predictor')
  tracker = side.Nothing()
  tracker.get = lambda name: Namespace(count=4)
  main.tracker = tracker
  fill(named)
  views, told, (reference,) = image('views'), parameters(2, byol), image('reference', 1)
  criterion = {'NTXentLoss': main.NTXentLoss()} | ({'BYOLLoss': main.BYOLLoss()} if byol else {})
  args = Namespace(dataset_name='cifar10', precision='full', hardware='', temperature_z=.5, temperature_y=.2, lmbd=1.,
                   nb_epochs=100)
  rest = (Optimizer(), criterion, [((reference, views[0], told[0], views[1], told[1]), None)], None, None, args, CPU, False,
          0, 1)
  losses = side.caught()
  if byol:
    momentum = main.MomentumResNet(model.resnet, model.proj_head_inv, .996)
    fill(encoder(momentum.m_resnet) | mlp(momentum.m_proj_head_inv, 'projector'), 'target/')
    main.train_repr(model, momentum, *rest)
  else:
    main.train_repr(model, *rest)
  return losses[0], named


def essl(loss: str):
  side.on_this_cpu()
  import main
  views, (third,) = image('views'), image('turned', 1, arrays.SIDE // 2)
  main.torchvision.datasets.CIFAR10 = main.knn_loop = lambda *a, **kw: 0.
  main.torch.utils.data.DataLoader = lambda dataset, **kw: [([*views, third], None)]
  named, wrapped = {}, {}

  def filled(cls, name):  # what the loop builds gets our weights before its first step
    def make(*a, **kw):
      with side.widths({512: side.WIDTH, 2048: 12}):
        made = cls(*a, **kw)
      parts = (encoder(made.encoder) | mlp(made.projector, 'projector') | mlp(made.predictor2, 'heads_essl/classify')
               if name == 'Branch' else mlp(made, 'predictor'))
      fill(parts)
      named.update(parts)
      return made
    return make
  for name in ('Branch', 'PredictionMLP'):
    wrapped[name] = getattr(main, name)
    setattr(main, name, filled(wrapped[name], name))
  losses = side.caught()
  args = Namespace(checkpoint_path=None, path_dir='/tmp/essl-golden', loss=loss, dim_proj='2048,2048', dim_pred=512, lr=.06,
                   bsz=arrays.B, wd=5e-4, epochs=1, warmup_epochs=10, fp16=False, save_every=9, num_workers=0, lmbd=.4)
  main.ssl_loop(args, encoder=headless())
  return losses[0], named


def kornia_stubs():
  stub('ignite', 'ignite.engine', 'ignite.distributed', 'kornia', 'kornia.augmentation', 'kornia.augmentation.functional',
       'kornia.augmentation.utils', 'timm', 'timm.models', 'timm.models.layers', 'timm.models.layers.helpers',
       'timm.models.vision_transformer', 'tqdm')
  sys.modules['kornia'].augmentation = sys.modules['kornia.augmentation']
  sys.modules['kornia.augmentation'].functional = sys.modules['kornia.augmentation.functional']


class Transforms(list):
  """AugSelf's transforms of a view that did the fixed actions; the images are already views."""
  def __call__(self, x):
    return x


def transforms(module, view: int) -> Transforms:
  a = {k: torch.from_numpy(v[:, view].copy()) for k, v in arrays.actions(2, same_flips=True).items()}
  flip, jitter = module.K.RandomHorizontalFlip(), module.ColorJitter()
  flip._params, on = {'batch_prob': a['flip']}, a['jittered']
  jitter._params = {'batch_prob': on, 'hue_factor': a['hue'][on]}
  for k, name in enumerate(('brightness', 'contrast', 'saturation')):
    jitter._params[f'{name}_factor'] = a['factors'][on, k]
    setattr(jitter, name, (.6, 1.4))
  jitter.hue = (-.1, .1)
  return Transforms([flip, jitter])


def augself():
  kornia_stubs()
  import models
  import trainers
  import transforms as module
  objective = trainers.SSObjective(crop=1., color=1.)
  backbone, projector = headless(), models.load_mlp(side.WIDTH, side.WIDTH, 6, num_layers=2, last_bn=False)
  predictors = models.load_ss_predictor(side.WIDTH, objective, n_hidden=12)
  named = encoder(backbone) | mlp(projector, 'projector')
  for name, head in (('crop', 'crop'), ('jitter', 'color')):
    named |= mlp(predictors[head], f'heads_augself/ask_{name}')
  fill(named)
  boxes = torch.from_numpy(arrays.actions()['box'] / arrays.SIZE)
  x = image('views')
  engine = trainers.simclr(backbone, projector, predictors, transforms(module, 0), transforms(module, 1), [Optimizer()], CPU,
                           objective, T=.2)
  losses = side.caught()
  engine.given[0](None, (((x[0], boxes[:, 0].clone()), (x[1], boxes[:, 1].clone())), None))
  return losses[0], named


def cassle():
  kornia_stubs()
  import cond_utils
  import trainers_cond
  sizes = {'blur': 1, 'color': 4, 'color_diff': 3, 'crop': 4, 'grayscale': 1}
  args = Namespace(num_backbone_features=side.WIDTH, aug_treatment='mlp', aug_hn_type='mlp', aug_nn_depth=6, aug_nn_width=6,
                   aug_cond=list(sizes), aug_inj_type='proj-cat')
  backbone, projector = headless(), cond_utils.AugProjector(args, proj_out_dim=6, proj_depth=2)
  named = (encoder(backbone) | mlp(projector.projector, 'projector')
           | mlp(projector.aug_processor, 'heads_cassle/encode_action'))
  fill(named)
  describe = lambda t, w: dict(zip(sizes, torch.from_numpy(arrays.head_numbers(t, 13)).split(list(sizes.values()), 1), strict=True))
  trainers_cond.extract_aug_descriptors, trainers_cond.extract_diff = describe, lambda *a: {}
  class View(str):
    def __call__(self, x):
      return x
  engine = trainers_cond.simclr(backbone, projector, {}, View('told 0'), View('told 1'), [Optimizer()], CPU,
                                trainers_cond.SSObjective(), list(sizes), T=.2)
  losses = side.caught()
  engine.given[0](None, (tuple((x, None) for x in image('views')), None))
  return losses[0], named


def sie():
  side.alone()
  import src.models as models
  models.resnet.tiny = lambda zero_init_residual: (headless(), side.WIDTH)
  args = Namespace(arch='tiny', equi=side.WIDTH // 2, mlp='12-12-12', predictor_type='hypernetwork', hypernetwork='linear',
                   bias_hypernet=False, predictor='', bias_pred=False, predictor_relu=False, sim_coeff=10., equi_factor=.45,
                   std_coeff=10., cov_coeff=1., batch_size=arrays.B, tf_num_layers=1)
  model = models.SIE(args)
  named = (encoder(model.backbone) | mlp(model.projector_inv, 'projector') | mlp(model.projector_equi, 'heads_sie/project'))
  hyper = {'heads_sie/predict/kernel': model.predictor.hypernet.net[0].weight}
  return step_of(lambda: model(*image('views'), torch.from_numpy(arrays.head_numbers('told', 4)), torch.zeros(arrays.B).long())[0],
                 named, hyper, 6)


def step_of(loss, named: dict, hyper: dict, E: int):
  """Of a loss that is computed at once; hyper: the weights [E E, A] of matrices, our [A E E]."""
  fill(named)
  for path, p in hyper.items():
    kernel = arrays.weight(path, (p.shape[1], E, E))
    p.data.copy_(torch.from_numpy(kernel.transpose(2, 1, 0).reshape(E * E, -1)))
  value = loss()
  value.backward()
  grads = side.gradients(named)
  grads |= {path: p.grad.numpy().reshape(E, E, -1).transpose(2, 1, 0) for path, p in hyper.items()}
  return value.item(), grads


def stl():
  torchvision.models.resnet18 = side.Small
  import model as models
  model = models.STL(Namespace(trans_backbone='6-6', projector='12-6', trans_projector='6-6', batch_size=arrays.B, inv=1.,
                               equi=1., trans=.1, temperature=.2))
  parts = {'read': model.trans_backbone, 'project': model.equi_projector, 'project_read': model.trans_projector}
  named = encoder(model.backbone) | mlp(model.inv_projector, 'projector')
  for part, layers in parts.items():
    named |= mlp(layers, f'heads_stl/{part}')
  return step_of(lambda: model(*image('views'))[0], named,
                 {'heads_stl/move/kernel': model.equi_transform.hypernet.weight}, side.WIDTH)


def sen():
  torchvision.models.resnet18 = side.Small
  stub('moviepy', 'src.utils', 'utils')
  import models
  with side.widths({2048: 12, 2052: 16, 64: side.WIDTH}):
    model = models.SEN_Contrastive(10, 4, False, None, .2, True)
  named = encoder(model.encoder) | mlp(model.projector_equi, 'heads_sen/project')
  fill(named)
  weight = model.predictor[0].weight
  kernel = arrays.weight('heads_sen/predict/linear_0/kernel', (16, 12))  # ours reads the source first, theirs what is told
  weight.data.copy_(torch.from_numpy(np.concatenate([kernel[12:], kernel[:12]]).T))
  loss = model(*image('views'), torch.from_numpy(arrays.head_numbers('told', 4)))[0]
  loss.backward()
  grad = weight.grad.numpy().T
  return loss.item(), side.gradients(named) | {'heads_sen/predict/linear_0/kernel': np.concatenate([grad[4:], grad[:4]])}


def care():
  stub('pandas', 'wandb', 'cv2', 'tqdm', 'functorch', 'functorch.experimental')
  torchvision.models.resnet.resnet18 = side.Small
  import main
  class Bar(list):
    def __init__(self, rows, **kw):
      super().__init__(rows)
    set_description = lambda self, text: None
  main.tqdm, torch.float = Bar, torch.float64
  views, own = image('views'), image('care')
  main.vmap = lambda f, **kw: lambda x: [o.reshape(x.shape) for o in own]
  main.log.compute_similarities = lambda a, b: (torch.zeros(()), torch.zeros(()), torch.zeros((1, 1)))
  main.args = Namespace(lr_schedule_type=None, loss_subtype='infonce', batch_size=arrays.B, equiv_splits=4, epochs=1)
  with side.widths({512: side.WIDTH, 128: 6, 64: side.WIDTH}):
    model = main.Model(Namespace(model='resnet18', feature_dim=128))
  net = Namespace(conv1=model.f[0], bn1=model.f[1], layer1=model.f[4])
  named = encoder(net) | mlp(model.g, 'projector')
  fill(named)
  losses = side.caught()
  main.train(1, model, [(views[0], *views, None)], Optimizer(), .5, .03)
  return losses[0], named


def barlow():
  side.alone()
  torchvision.models.resnet50 = side.Small
  import main
  with side.widths({2048: side.WIDTH, 8192: 12}):
    model = main.BarlowTwins(Namespace(projector='8192-8192-8192', batch_size=arrays.B, lambd=.0051))
  return step_of(lambda: model(*image('views')), encoder(model.backbone) | mlp(model.projector, 'projector'), {}, 0)


def vicreg():
  side.alone()
  import main_vicreg
  main_vicreg.resnet.tiny = lambda zero_init_residual: (headless(), side.WIDTH)
  model = main_vicreg.VICReg(Namespace(arch='tiny', mlp='12-12-12', sim_coeff=25., std_coeff=25., cov_coeff=1.,
                                       batch_size=arrays.B))
  return step_of(lambda: model(*image('views')), encoder(model.backbone) | mlp(model.projector, 'projector'), {}, 0)


def simsiam():
  import main_simsiam
  from simsiam.builder import SimSiam
  model = SimSiam(side.Small, 12, 6)
  net, fc = model.encoder, model.encoder.fc
  fc[6].bias.data.zero_()
  projector = {k: p for k, p in mlp(fc, 'projector').items() if p is not fc[6].bias}  # it is not learned
  named = encoder(net) | projector | mlp(model.predictor, 'predictor')
  fill(named)
  losses = side.caught()
  main_simsiam.train([(image('views'), None)], model, nn.CosineSimilarity(dim=1), Optimizer(), 0,
                     Namespace(gpu=None, print_freq=1))
  return losses[0], named


def solo(name: str):
  """solo-learn's loss functions, behind a projector as its methods build it and its stem for CIFAR."""
  stub('solo', 'solo.utils', 'solo.utils.misc')
  sys.modules['solo.utils.misc'].gather = lambda z: z
  sys.path.insert(0, sys.path[0] + '/solo/losses')
  net, layers = headless(padding=2), []
  for D, E in ((side.WIDTH, 12), (12, 12)):
    layers += [nn.Linear(D, E), nn.BatchNorm1d(E), nn.ReLU()]
  projector = nn.Sequential(*layers, nn.Linear(12, 12))
  if name == 'vicreg':
    from vicreg import vicreg_loss_func
    of = lambda a, b: vicreg_loss_func(a, b, 25., 25., 1.)
  else:
    from barlow import barlow_loss_func
    of = lambda a, b: barlow_loss_func(a, b, lamb=.0051, scale_loss=.1)
  return step_of(lambda: of(*(projector(net(x)) for x in image('views'))), encoder(net) | mlp(projector, 'projector'), {}, 0)


STEPS = {  # name: the folder of the repository that is imported from, and what runs its step
    'equimod_simclr': ('src', lambda: equimod(False)), 'equimod_byol': ('src', lambda: equimod(True)),
    'essl_simclr': ('cifar10', lambda: essl('simclr')), 'essl_simsiam': ('cifar10', lambda: essl('simsiam')),
    'augself': ('', augself), 'cassle': ('', cassle), 'sie': ('', sie), 'stl': ('', stl), 'sen': ('seq-jepa/src', sen),
    'care': ('cifar10_cifar100_stl10', care), 'barlow': ('', barlow), 'vicreg': ('', vicreg), 'simsiam': ('', simsiam),
    'solo_vicreg': ('', lambda: solo('vicreg')), 'solo_barlow': ('', lambda: solo('barlow'))}


if __name__ == '__main__':
  name, repository = sys.argv[1:]
  folder, step = STEPS[name]
  sys.path.insert(0, str(pathlib.Path(repository).resolve() / folder))
  loss, found = step()
  grads = found if all(isinstance(g, np.ndarray) for g in found.values()) else side.gradients(found)
  np.savez_compressed(HERE / f'{name}.npz', loss=loss, **grads)
  print(name, loss, len(grads), 'arrays', sum(np.abs(g).max() == 0 for g in grads.values()), 'of zeros')
