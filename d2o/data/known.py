"""How to get the data sets of the papers: names, sizes, file names, terms. Recipes refer to these texts by name
(`data.get`)."""

from __future__ import annotations

GET = {
    "cifar10": (
        """\
CIFAR-10: 50,000 training images of 32 px in 10 classes. No licence is stated; its authors ask to cite Krizhevsky 2009.
- cifar-10-python.tar.gz (163 MB, md5 c58f30108f718f92721af3b95e74349a) from www.cs.toronto.edu/~kriz/cifar.html.
  Give the file as it is, or the folder cifar-10-batches-py that is in it. Its pickles are read as data, never executed.
- Or EDM's cifar10-32x32.zip (dataset_tool.py of github.com/NVlabs/edm makes it of that file), or a folder with
  a sub-folder per class."""
    ),
    "celeba_hq": (
        """\
CelebA-HQ: 30,000 faces of 1024 px. For non-commercial research only.
- CelebAMask-HQ.zip (about 3 GB, JPEG) from github.com/switchablenorms/CelebAMask-HQ: unzip it and give its
  folder CelebA-HQ-img.
- The version at 256 px without loss that NVAE and DD-GAN take (27,000 for training): celeba-tfr.tar from
  storage.googleapis.com/glow-demo/data/celeba-tfr.tar, made into an LMDB by
  scripts/convert_tfrecord_to_lmdb.py of github.com/NVlabs/NVAE: give the folder train.lmdb (some 5 GB).
- Or the original: CelebA with the deltas of github.com/tkarras/progressive_growing_of_gans, as a folder or zip
  of images."""
    ),
    "lsun_church": (
        """\
LSUN, category church_outdoor: 126,227 photographs for training, short side 256 px. No licence is stated; they were
found on the web.
- church_outdoor_train_lmdb.zip (about 2.3 GB) from http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip, or by
  `python3 download.py -c church_outdoor` of github.com/fyu/lsun: unzip it and give the folder
  church_outdoor_train_lmdb, which holds data.mdb.
- Or a folder or zip of the images that `data.py export` of the same repository takes out of it."""
    ),
    "imagenet64": (
        """\
ImageNet (ILSVRC 2012): 1,281,167 training images in 1000 classes. For non-commercial research only.
- From image-net.org, after registration. EDM's dataset_tool.py makes the zip that its statistics belong to:
  python dataset_tool.py --source=ILSVRC/Data/CLS-LOC/train --dest=imagenet-64x64.zip --resolution=64x64 \\
    --transform=center-crop
- Any other way of scaling gives other images than those that the teacher and the reference were made from."""
    ),
    "imagenet512": (
        """\
ImageNet (ILSVRC 2012): 1,281,167 training images in 1000 classes. For non-commercial research only.
- From image-net.org, after registration. EDM2's dataset_tool.py makes a zip of some hundred GB at 512 px:
  python dataset_tool.py convert --source=ILSVRC/Data/CLS-LOC/train --dest=img512.zip --resolution=512x512 \\
    --transform=center-crop-dhariwal
- Or what that tool makes of it: python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip: means and
  standard deviations of the latents, 8 x 64 x 64 floats an image, 168 GB in all. Nothing is encoded in
  training then."""
    ),
    "ffhq": (
        """\
FFHQ: 70,000 faces of 1024 px. CC BY-NC-SA 4.0 (NVIDIA); the single photographs have licences of their own.
- images1024x1024 (89 GB) from github.com/NVlabs/ffhq-dataset. EDM's dataset_tool.py makes the zip that its statistics
  belong to: python dataset_tool.py --source=images1024x1024 --dest=ffhq-64x64.zip --resolution=64x64"""
    ),
    "afhqv2": (
        """\
AFHQv2: 15,803 cats, dogs and wild animals of 512 px. CC BY-NC 4.0 (NAVER).
- afhq_v2.zip from github.com/clovaai/stargan-v2. EDM's dataset_tool.py makes the zip that its statistics belong to:
  python dataset_tool.py --source=afhqv2 --dest=afhqv2-64x64.zip --resolution=64x64"""
    ),
}
