#!/bin/sh -e
# Images of yours (a folder, one sub-folder a class or none; a zip; a tar) to a teacher, and the teacher to a student of one call:
#
#   examples/own_images.sh my-images/
IMAGES=${1:-my-images/}
d2o train teacher_digits --data $IMAGES --set data.resolution=32 --set network.channel_mult=[1,2,2] --set eval=null --set images=2000000 --out runs/mine/teacher
d2o pairs --teacher runs/mine/teacher/checkpoints/last.safetensors --n 20000 --out runs/mine/pairs
d2o train quickstart --set teacher=runs/mine/teacher/checkpoints/last.safetensors --set pairs.path=runs/mine/pairs --set pairs.n=20000 --set eval=null --set images=400000 --out runs/mine/student
d2o eval runs/mine/student --against $IMAGES --n 5000
