#!/bin/sh -e
# A model of yours in diffusers' format (here one that makes pixels without a prompt: UNet2DModel), distilled by regression to its own images:
#
#   examples/own_teacher.sh my-model/
#
# A model that takes prompts: `--prompts FILE --cfg 3` for the pairs, and recipes/d2g_sd_cfg3.yaml (see d2o recipes) instead of quickstart.
TEACHER=${1:-my-model/}
d2o pairs --teacher $TEACHER --n 20000 --solver ddim --steps 50 --out runs/own/pairs
d2o train quickstart --set teacher=$TEACHER --set pairs.path=runs/own/pairs --set pairs.n=20000 --set pairs.solver=ddim --set pairs.steps=50 --set eval=null --set images=400000 --out runs/own/student
d2o sample runs/own/student --n 64 --out runs/own/samples.zip --grid runs/own/samples.png
d2o export runs/own/student --format diffusers --out runs/own/one-call
