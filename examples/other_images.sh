#!/bin/sh -e
# Images that another program made, measured against real ones: both a folder, a zip, a tar or an .npz. With `--metrics fid` as the papers count it
# (fetches Inception, 91 MB); `--protocol` has the papers' own settings.
#
#   examples/other_images.sh theirs.zip real/
THEIRS=${1:-theirs.zip}
REAL=${2:-real:digits}
d2o eval $THEIRS --against $REAL --metrics fd,kid,prdc --bootstrap 100 --markdown theirs.md
