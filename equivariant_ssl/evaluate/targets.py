"""The data sets of protocol 'transfer': their splits, their metric, and the commands that make
them.

The texts are a part of the protocol's definition: where one changes, stored results are computed
again.
"""
from typing import NamedTuple

BUILD = ('tfds build {dataset} --file_format=array_record --data_dir={root}'
         '   (where TensorFlow is installed)')
MIT67 = (
    'bash -c \'mkdir -p "$0" && cd "$0" || exit;\n'
    ' curl -LO http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar;'
    ' tar xf indoorCVPR_09.tar;\n'
    ' for s in Train Test; do'
    ' curl -L http://web.mit.edu/torralba/www/${{s}}Images.txt | tr -d "\\r" |\n'
    ' while read -r p || [ -n "$p" ]; do d=mit67/${{s,,}}/${{p%/*}}; mkdir -p $d;'
    ' cp "Images/$p" $d; done; done\' {root}')
AIRCRAFT = (
    'bash -c \'mkdir -p "$0" && cd "$0" || exit; n=fgvc-aircraft-2013b;\n'
    ' curl -L https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/$n.tar.gz | tar xz;'
    ' for s in train val test; do\n'
    ' while read -r i c; do d="aircraft/$s/${{c//\\//-}}"; mkdir -p "$d";'
    ' cp $n/data/images/$i.jpg "$d";\n'
    ' done < $n/data/images_variant_$s.txt; done\' {root}')
GONE = 'its own address, which TFDS knows, is gone. '
CARS = GONE + (
    'kaggle datasets download cyizhuo/stanford-cars-by-classes-folder --unzip -p {root}/cars   '
    '(then move what it holds to {root}/cars/train/CLASS/ and {root}/cars/test/CLASS/)')
SUN397 = GONE + (
    'From a copy of SUN397 put what Training_01.txt lists into {root}/sun397/train/CLASS/, and '
    'what Testing_01.txt lists into {root}/sun397/test/CLASS/')


class Target(NamedTuple):
  """A data set of transfer.

  dataset: its name in TFDS; '' means that TFDS does not have it. train, valid, test: its splits;
  where valid is '', the share `held` of each training class is held out. metric: 'top1' or
  'per_class'. note: the numbers of images that are published. prepare: the command that makes it
  where it is not on disk.
  """
  dataset: str
  train: str = 'train'
  valid: str = ''
  test: str = 'test'
  held: float = .1
  metric: str = 'top1'
  note: str = ''
  prepare: str = BUILD


# Splits and metrics are those of Lee et al. 2021, official code. Notes: training + validation /
# test images.
DATASETS = {
    'cifar10': Target('cifar10', note='45,000 + 5,000 / 10,000',
                      prepare='eqssl data prepare cifar10 --root {root}'),
    'cifar100': Target('cifar100', note='45,000 + 5,000 / 10,000'),
    'food101': Target('food101', test='validation', note='68,175 + 7,575 / 25,250'),
    'mit67': Target('', held=.125, note='4,690 + 670 / 1,340', prepare=MIT67),
    'pets': Target('oxford_iiit_pet', held=.2, metric='per_class', note='2,940 + 740 / 3,669'),
    'flowers': Target('oxford_flowers102', valid='validation', metric='per_class',
                      note='1,020 + 1,020 / 6,149'),
    'caltech101': Target('caltech101', held=1 / 6, metric='per_class',
                         note='2,525 + 505 / 5,647, not TFDS\'s split'),
    'cars': Target('cars196', held=1650 / 8144, note='6,494 + 1,650 / 8,041', prepare=CARS),
    'aircraft': Target('', valid='val', metric='per_class', note='3,334 + 3,333 / 3,333',
                       prepare=AIRCRAFT),
    'dtd': Target('dtd', valid='validation', note='1,880 + 1,880 / 1,880, split 1'),
    'sun397': Target('sun397/standard-part1-120k', held=.2,
                     note='15,880 + 3,970 / 19,850, split 1', prepare=SUN397),
    'stl10': Target('stl10', note='4,500 + 500 / 8,000'),
}
