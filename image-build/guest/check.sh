#!/bin/sh
# check.sh IMAGEDIR: unpacks the image's root and initrd and holds them, and the
# image's other files, to the tests of this folder that have the tag image.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
[ $# = 1 ] && [ -e "$1/root.squashfs" ] || die "check.sh takes the directory of an image: make image first"
image=$(cd "$1" && pwd)
tools=$cache/tools-$(tools_stamp)
work=$(mktemp -d "$cache/check.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp "$image/root.squashfs" "$image/initrd.cpio" "$work/"
mkdir "$work/initrd"
in_tools "$work" unsquashfs -quiet -no-progress -d /mnt/root /mnt/root.squashfs >/dev/null
in_tools "$work" sh -c 'cd /mnt/initrd && zstd -qdc /mnt/initrd.cpio | cpio --quiet -idm'
cd "$here"
CVM_IMAGE=$image CVM_IMAGE_ROOT=$work/root CVM_IMAGE_INITRD=$work/initrd GOFLAGS="${GOFLAGS:-} -tags=image" go test -count=1 .
