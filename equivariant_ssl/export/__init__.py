"""The export and import of weights, in files that torch, timm and this package read.

The names and layouts of the tensors are those of torchvision and timm.
"""
