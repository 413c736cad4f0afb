"""Weights in and out: torchvision's names and layouts, in files that torch, timm and this package read."""
