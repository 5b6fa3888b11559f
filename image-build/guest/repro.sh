#!/bin/sh
# repro.sh: copies the tree to two directories, builds programs, root and image
# in each with caches of their own, and compares every artefact bit for bit.
# Shared are only the .deb files, each held to its hash, and the tools chroot.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
. "$here/lib.sh"
work=$(mktemp -d "${TMPDIR:-/tmp}/cvm-repro.XXXXXX")
trap 'rm -rf "$work"' EXIT
# A signer is needed for the case to be complete; nobody holds this one's key.
signer=$(printf 'image-repro' | sha256sum | cut -d' ' -f1)
mkdir -p "$debs"

for name in first a-directory-with-another-name; do
	tree=$work/$name/tree
	mkdir -p "$tree" "$work/$name/cache/image"
	(cd "$repo" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tree")
	ln -s "$debs" "$work/$name/cache/image/debs"
	for t in "$cache"/tools-*; do [ ! -e "$t/.done" ] || ln -s "$t" "$work/$name/cache/image/"; done
	say "build in $name"
	make -s -C "$tree" build VERSION="$VERSION" >&2
	for variant in '' --debug; do
		CVM_CACHE=$work/$name/cache "$tree/image-build/guest/build.sh" seal --signers "$signer" $variant --out "$work/$name/image$variant" >/dev/null
	done
done

differ=0 same=0
cd "$work/first"
for f in image/* image--debug/*; do
	case $f in */image.json) continue ;; esac # it has the seconds
	if cmp -s "$f" "$work/a-directory-with-another-name/$f"; then
		same=$((same + 1))
		printf '%s  %s\n' "$(sha256sum <"$f" | cut -c1-64)" "$f"
	else
		differ=$((differ + 1))
		say "$f differs"
	fi
done
[ "$differ" = 0 ] || die "image-repro: $differ artefacts differ"
echo "image-repro: $same artefacts are bit for bit the same"
