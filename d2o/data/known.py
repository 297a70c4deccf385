"""How to get the data sets of the papers: names, sizes, file names, terms. Recipes refer to these texts by name (`data.get`)."""

from __future__ import annotations

GET = {
    "cifar10": """\
CIFAR-10: 50,000 training images of 32 px in 10 classes. No licence is stated; its authors ask to cite Krizhevsky 2009.
- cifar-10-python.tar.gz (163 MB, md5 c58f30108f718f92721af3b95e74349a) from www.cs.toronto.edu/~kriz/cifar.html.
  Give the file as it is, or the folder cifar-10-batches-py that is in it. Its pickles are read as data, never executed.
- Or EDM's cifar10-32x32.zip (dataset_tool.py of github.com/NVlabs/edm makes it of that file), or a folder with a sub-folder per class.""",
    "celeba_hq": """\
CelebA-HQ: 30,000 faces of 1024 px. For non-commercial research only.
- CelebAMask-HQ.zip (about 3 GB, JPEG) from github.com/switchablenorms/CelebAMask-HQ: unzip it and give its folder CelebA-HQ-img.
- The version at 256 px without loss that NVAE and DD-GAN take (27,000 for training): celeba-tfr.tar from
  storage.googleapis.com/glow-demo/data/celeba-tfr.tar, made into an LMDB by scripts/convert_tfrecord_to_lmdb.py of github.com/NVlabs/NVAE:
  give the folder train.lmdb (some 5 GB; reading it takes `pip install 'd2o[lsun]'`).
- Or the original: CelebA with the deltas of github.com/tkarras/progressive_growing_of_gans, as a folder or zip of images.""",
    "lsun_church": """\
LSUN, category church_outdoor: 126,227 photographs for training, short side 256 px. No licence is stated; they were found on the web.
- church_outdoor_train_lmdb.zip (about 2.3 GB) from http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip, or by
  `python3 download.py -c church_outdoor` of github.com/fyu/lsun: unzip it and give the folder church_outdoor_train_lmdb, which holds data.mdb.
  Reading it takes `pip install 'd2o[lsun]'`.
- Or a folder or zip of the images that `data.py export` of the same repository takes out of it.""",
}
