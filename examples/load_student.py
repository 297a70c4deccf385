"""A student's images: `python examples/load_student.py runs/quickstart`."""

import sys

import torch

import d2o

student = d2o.load_student(sys.argv[1])  # a checkpoint, or a run folder
noise = torch.randn(8, *student.spec.shape, generator=torch.Generator().manual_seed(0))
labels = torch.arange(8) % student.spec.classes if student.spec.classes else None
images = student.decode(student(noise, labels))  # [8, C, H, W] in [-1, 1]
print(f"{tuple(images.shape)} from {student.nfe} network call(s), {images.min():.2f} to {images.max():.2f}")
