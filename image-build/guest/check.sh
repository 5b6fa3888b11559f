#!/bin/sh
# check.sh IMAGEDIR: unpacks the image's root and holds image and root to image_test.go.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
[ $# = 1 ] && [ -e "$1/root.squashfs" ] || die "check.sh takes the directory of an image: make image first"
image=$(cd "$1" && pwd)
tools=$cache/tools-$(tools_stamp)
work=$(mktemp -d "$cache/check.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp "$image/root.squashfs" "$work/"
in_tools "$work" unsquashfs -quiet -no-progress -d /mnt/root /mnt/root.squashfs >/dev/null
cd "$here"
CVM_IMAGE=$image CVM_IMAGE_ROOT=$work/root GOFLAGS="${GOFLAGS:-} -tags=image" go test -count=1 .
