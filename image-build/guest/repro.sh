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

names='first a-directory-with-another-name'
for name in $names; do
	tree=$work/$name/tree
	mkdir -p "$tree" "$work/$name/cache/image"
	(cd "$repo" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tree")
	ln -s "$debs" "$work/$name/cache/image/debs"
	for t in "$cache"/tools-*; do [ ! -e "$t/.done" ] || ln -s "$t" "$work/$name/cache/image/"; done
done

# build NAME: programs, then both variants of the image.
build() {
	make -s -C "$work/$1/tree" build VERSION="$VERSION" &&
		for variant in '' --debug; do
			CVM_CACHE=$work/$1/cache "$work/$1/tree/image-build/guest/build.sh" seal --signers "$signer" $variant --out "$work/$1/image$variant" || return 1
		done
}
pids=''
for name in $names; do
	build "$name" >"$work/$name/log" 2>&1 &
	pids="$pids $!"
done
failed=0
for pid in $pids; do wait "$pid" || failed=1; done
for name in $names; do
	[ $failed = 0 ] || tail -n 20 "$work/$name/log" >&2
	grep -h '^image: .* s$' "$work/$name/log" | sed "s/^image:/image-repro: $name:/" >&2 || true
done
[ $failed = 0 ] || die "image-repro: a build failed"

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
